"""The mistakes that students make: for each function of the course what has to be replaced in
tests/solution.py to make it, and a piece of what the grader must then say.
"""

# name: [(old, new, what is said)]; old stands once in the function
WRONG = {
    "bpe_merges": [
        # each word once, as if the text were a set
        ("in words)", "in set(words))", "three times counts three times"),
        ("(pairs[pair], pair)", "pairs[pair]", "the greater one is joined"),
        ("counts = joined", "pass", "the pairs are counted again"),
        # the later one of two that overlap
        ("== best:", "== best != word[i + 1 : i + 3]:", "from left to right"),
        ("if not pairs:", "if not pairs and merges.append(b''):", "the list ends early"),
        # one long word
        ("counts = Counter(", 'words = [b"".join(words)]\n    counts = Counter(', "are no pair"),
    ],
    "rms_norm": [
        ("weight * (x / rms)", "weight * (x - x.mean(-1, keepdim=True)) / rms", "LayerNorm"),
        ("mean(-1, keepdim=True)", "sum(-1, keepdim=True)", "not the sum"),
        ("mean(-1, keepdim=True)", "mean()", "of each row is 1"),
        ("+ eps).sqrt()", ").sqrt() + eps", "under the root"),
        ("rms = (x", "x = weight * x\n    rms = (x", "what has been normalised"),
        ("rms = ", "x /= 2\n    x *= 2\n    x -= 1\n    rms = ", "`x` was changed"),
    ],
    "rotary": [
        (
            "u = x[..., 0::2]\n    w = x[..., 1::2]\n",
            "u, w = x.chunk(2, -1)\n    return torch.cat((u * angle.cos() - w * angle.sin(), "
            "u * angle.sin() + w * angle.cos()), -1)\n",
            "(neighbours), not j and j + D/2",
        ),
        ("-2 * j / D", "-j / D", "theta^(-2j / D)"),
        ("angle = positions", "angle = -positions", "counter-clockwise"),
        (
            "positions[:, :, None, None]",
            "torch.arange(1, 1 + x.shape[1])[None, :, None, None]",
            "At position 0",
        ),
        (
            "positions[:, :, None, None]",
            "positions[:1, :, None, None]",
            "not by its place in the tensor",
        ),
    ],
    "attention": [
        ("distance >= 0", "distance > 0", "its own position"),
        ("distance >= 0", "distance > -S", "nothing later"),
        ("distance < window", "distance <= window", "the query's own included"),
        ("v.repeat_interleave(group, 1)", "v.repeat(1, group, 1, 1)", "0 0 1 1"),
        (" / math.sqrt(q.shape[-1])", " / q.shape[-1]", "sqrt(D)"),
        (" / math.sqrt(q.shape[-1])", "", "sqrt(D)"),
        ("torch.arange(S - T, S)", "torch.arange(T)", "the last T positions"),
        (
            "scores.masked_fill(~seen, -math.inf).softmax(-1)",
            "seen * scores.exp() / (seen * scores.exp()).sum(-1, keepdim=True)",
            "the largest is subtracted before exp",
        ),
    ],
    "cache_step": [
        ("keys[rows, lens] = k", "keys[:, lens.max()] = k", "go into slot lens[r]"),
        ("values[rows, lens] = v", "values[rows, lens + 1] = v", "count from 0"),
        ("<= lens[:, None]", "< lens[:, None]", "sees itself"),
        ("<= lens[:, None]", "<= lens.max()", "nothing beyond"),
        ("lens + 1", "lens", "plus 1"),
        (" / math.sqrt(q.shape[-1])", "", "sqrt(D)"),
        ("lens + 1", "lens.add_(1)", "`lens` was changed: make a new tensor, as `lens + 1` is"),
        (
            "torch.where(seen[..., None], p[..., None] * values, 0)",
            "(p[..., None] * values)",
            "not multiplied by 0",
        ),
        (
            "masked_fill(~seen, -math.inf).softmax(-1)",
            "exp() * seen\n    p = p / p.sum(-1, keepdim=True)",
            "not multiplied by 0",
        ),
        (
            "-math.inf).softmax(-1)",
            "-math.inf).exp()\n    p = p / p.sum(-1, keepdim=True)",
            "the largest is subtracted before exp",
        ),
        ("-math.inf", "-30", "a score of -inf, not just a low one"),
        ("-math.inf", "-1e4", "a score of -inf, not just a low one"),
        ("lens + 1", "(lens + 1).int()", "not int64"),
    ],
    "inverse_cdf": [
        ("cdf <= u", "cdf < u", "the number .25 draws token 1"),
        ("u[:, None]", "u[:1, None]", "must not share their token"),
        ("torch.minimum(token, last)", "token", "beyond it"),
        ("torch.minimum(token, last)", "token.clamp_max(probs.shape[1] - 1)", "beyond it"),
        (
            "probs.cumsum(-1)\n    token",
            "probs.sort(-1, descending=True).values.cumsum(-1)\n    token",
            "an index of the vocabulary",
        ),
        ("torch.minimum(token, last)", "torch.multinomial(probs, 1)[:, 0]", "its own u"),
    ],
    "truncate": [
        ("mass >= top_p", "mass + logits.softmax(-1) > top_p", "the token that crosses the line"),
        ("mass >= top_p", "mass > top_p", "of equal tokens no more than it takes"),
        (
            "(mass >= top_p) & (mass > 0)",
            "logits.softmax(-1) < probs[above < top_p].min()",
            "of equal tokens no more than it takes",
        ),
        ("& (mass > 0)", "", "top_p = 0 keeps one"),
        ("top_p is not None and top_p < 1", "top_p and top_p < 1", "top_p = 0 keeps one"),
        (".scatter(-1, order, above)", ".copy_(above)", "its own place in the vocabulary"),
        ("values[:, -1:]", "values.min()", "of each row"),
        ("min(top_k, logits.shape[-1])", "top_k", "beyond V keeps all"),
        ("smallest, -math.inf", "smallest, 0.0", "become -inf"),
        (
            "if top_k is not None:",
            "if top_k and top_p:\n        return truncate(truncate(logits, None, top_p), top_k)\n"
            "    if top_k is not None:",
            "a share of what it has left",
        ),
        ("logits < smallest", "logits <= smallest", "as they are"),
    ],
    "stratified_uniforms": [
        (
            "torch.rand(prompts, group, generator=generator).argsort(1)",
            "torch.arange(group)",
            "two rows share theirs by chance only",
        ),
        (
            "torch.rand(prompts, group, generator=generator).argsort(1)",
            "torch.rand(1, group, generator=generator).argsort(1)",
            "two rows share theirs by chance only",
        ),
        ("(interval + place)", "(interval + 0 * place + 0.5)", "not the middle"),
        (
            "place = torch.rand(prompts, group,",
            "place = torch.rand(prompts, 1,",
            "share their place",
        ),
        ("(interval + place) / group", "place", "one lies in each"),
        ("generator=generator).arg", ").arg", "the same seed gives"),
        (
            "place = torch",
            "generator.manual_seed(generator.initial_seed())\n    place = torch",
            "a second call with the same one gives other numbers",
        ),
    ],
    "lattice_uniforms": [
        (" % 1", "", "outside of [0, 1)"),
        ("+ shift", "+ shift[:1].expand(prompts, 1)", "a shift of its own"),
        ("+ shift", "+ shift / group", "not only within the first interval"),
        ("torch.rand(prompts, 1,", "torch.rand(prompts, group,", "an even grid"),
        (", generator=generator", "", "the same seed gives"),
        (
            "shift = torch",
            "generator.manual_seed(generator.initial_seed())\n    shift = torch",
            "a second call with the same one gives other numbers",
        ),
        (
            "torch.rand(prompts, 1, dtype=torch.float64, generator=generator)",
            "torch.randint(100, (prompts, 1), generator=generator).double() / 100",
            "many shifts or places are possible",
        ),
        (
            "(torch.arange(group) / group + shift) % 1",
            "((torch.arange(group) / group + shift) % 1).sort(1).values",
            "do not sort",
        ),
    ],
    "pass_at_k": [
        (
            "1 - (1 - correct[:, None] / j).prod(-1)",
            "1 - (1 - correct.double() / n) ** k",
            "drawn without replacement",
        ),
        ("raise ValueError", "str", "nothing can be said"),
        ("n - k + 1, n + 1", "n - k, n", "counted here for n = 5"),
        (
            "1 - (1 - correct[:, None] / j).prod(-1)",
            "torch.tensor([1 - float(math.comb(n - int(c), k)) / float(math.comb(n, k))"
            " for c in correct], dtype=torch.float64)",
            "overflows",
        ),
    ],
    "advantages": [
        ("rewards.std(1, keepdim=True)", "rewards.std()", "the same problem's rewards"),
        ("std(1, keepdim=True)", "std(1, keepdim=True, correction=0)", "the one with G - 1"),
        ("centred * G / (G - 1)", "centred", "the answer's own left out"),
        (".masked_fill(equal, 0)", "", "is no advantage"),
        ("mean(1, keepdim=True)).m", "mean(0, keepdim=True)).m", "other problems do not"),
        ("rewards - rewards.mean()\n", "rewards - rewards.mean(1, keepdim=True)\n", "one mean"),
    ],
    "policy_loss": [
        ("torch.minimum", "torch.maximum", "has become likelier keeps its gradient"),
        ("-torch.minimum(rho * adv, clipped * adv)", "-clipped * adv", "keeps its gradient"),
        ("logp - old_logp.detach()", "old_logp.detach() - logp", "the new probability over"),
        ("1 - eps_low, 1 + eps_high", "1 - eps_high, 1 + eps_low", "eps_low is how far down"),
        ("mask.sum(1, keepdim=True).clamp_min(1)", "mask.shape[1]", "not even as a length"),
        ("(1, keepdim=True).cl", "(1, keepdim=True)[:1].cl", "each row has a length of its own"),
        (".clamp_min(1)", "", "also in a row without any token"),
        (
            "torch.where(mask > 0, logp - old_logp.detach(), 0)",
            "logp - old_logp",
            "geometric mean",
        ),
        (
            'torch.where(mask > 0, logp, 0)\n    if ratio == "none":\n        return -adv * logp\n'
            "    log_rho = torch.where(mask > 0, logp - old_logp.detach(), 0)",
            'logp\n    if ratio == "none":\n        return -adv * logp\n'
            "    log_rho = (logp - old_logp.detach()) * mask",
            "not multiplied by 0",
        ),
        # nan where the mask is 0 meets exp, and is left out afterwards
        (
            "logp = torch.where(mask > 0, logp, 0)",
            'if ratio == "token":\n        rho = (logp - old_logp.detach()).exp()\n'
            "        clipped = rho.clamp(1 - eps_low, 1 + eps_high)\n"
            "        return torch.where(mask > 0, -torch.minimum(rho * adv, clipped * adv), 0)\n"
            "    logp = torch.where(mask > 0, logp, 0)",
            "mask what goes in",
        ),
        ("logp - old_logp.detach()", "logp - old_logp", "old_logp is a constant"),
        ("rho = log_rho.exp()", "rho = log_rho.clamp(-10, 10).exp()", "however large rho is"),
        (
            "-torch.minimum(rho * adv, clipped * adv)",
            "-torch.where(adv < 0, torch.minimum(rho * adv, clipped * adv).maximum(3 * adv),"
            " torch.minimum(rho * adv, clipped * adv))",
            "however large rho is",
        ),
        (
            "clipped = rho.clamp(1 - eps_low, 1 + eps_high)",
            "clipped = rho.clamp(1 - eps_low, 1 + eps_high).detach()",
            "shares it",
        ),
        ("mean.detach() + logp - logp.detach()", "mean.expand_as(logp)", "not a share of"),
        ("clipped.detach() * adv", "clipped * adv", "a weight without gradient"),
        ("-clipped.detach() * adv * logp", "-rho.detach() * adv * logp", "-clip(rho) A"),
        ("return -adv * logp", "return adv * logp", "`none` is -A logp"),
        ("-torch.minimum(rho * adv, clipped * adv)", "-rho * adv", "has gone far enough"),
    ],
    "aggregation_weights": [
        ("R * mask.sum(1, keepdim=True)", "mask.sum(1, keepdim=True)", "each answer counts 1 / R"),
        (
            "mask / mask.sum().clamp_min(1)",
            "mask / (R * mask.sum(1, keepdim=True).clamp_min(1))",
            "not a mean of means",
        ),
        ("mask / (R * budget)", "mask / (R * mask.sum(1).max())", "the budget is given"),
        ("mask / (R * budget)", "torch.full_like(mask, 1 / (R * budget))", "no padding"),
        ("mask.sum(1, keepdim=True).clamp_min(1)", "mask.sum(1, keepdim=True)", "0 / 0"),
        ("mask.sum(1, keepdim=True).clamp_min(1)", "mask.shape[1]", "shared by its own tokens"),
    ],
    "kl_estimate": [
        ("d = logp - ref_logp", "d = ref_logp - logp", "not minus that"),
        ("(-d).exp() - 1 + d", "d.exp() - 1 - d", "upside down"),
        ("d**2 / 2", "d**2", "half of the square"),
        ("(-d).exp() - 1 + d", "(-d).exp() + d", "k3 has the KL as its mean"),
    ],
    "token_logprobs": [
        ("s = s * scale + e.sum(1)", "s = s + e.sum(1)", "scaled down when a later block"),
        ("s1 = s1 * scale", "s1 = s1", "scaled down when a later block"),
        (" / temperature", "", "divided by the temperature"),
        ("lse - s1 / s, lse", "lse - temperature * s1 / s, lse", "for the entropy as well"),
        ("range(0, V, block)", "range(0, V - block + 1, block)", "narrower block"),
        ("torch.maximum(m, z.amax(1))", "torch.zeros_like(m)", "overflow nothing"),
        ("new_full((N,), -math.inf)", "new_zeros(N)", "or of minus a thousand"),
        ("lse - s1 / s, lse", "lse - target, lse", "what the definitions give"),
        ("len(weight)\n", "len(weight)\n    block = V\n", "never exist"),
        ("m + s.log()", "m + s.log2()", "in nats"),
    ],
    "token_logprobs_backward": [
        ("dz /= temperature", "pass", "by the chain rule it divides"),
        ("+= g_logp[here]", "+= 0 * g_logp[here]", "the target pulls up"),
        ("dz -= p *", "dz += p *", "-p (log p + entropy)"),
        ("(logp + entropy[:, None])", "logp", "-p (log p + entropy)"),
        ("(logp + entropy[:, None])", "(logp - entropy[:, None])", "MINUS the entropy"),
        ("dhidden += dz @ w", "dhidden = dz @ w", "a SUM over the blocks"),
        ("g_logp[here]", "g_logp.mean()", "its own g_logp"),
        ("p = logp.exp()", "p = logp.softmax(1)", "with the lse given, not the block's own"),
        (
            "dz[here, targets[here] - a] += g_logp[here]",
            "dz[torch.arange(len(dz)), targets % len(w)] += g_logp",
            "a target counts in its own block only",
        ),
        ("dz.T @ hidden", "dz.T @ hidden / len(hidden)", "the gradient of weight"),
        (
            "for a in range",
            "block = len(weight)\n    for a in range",
            "computed anew in each block",
        ),
    ],
    "flash_attention": [
        ("acc = acc * scale[:, None] + p", "acc = acc + p", "AND the output so far"),
        ("s = s * scale + p.sum(1)", "s = s + p.sum(1)", "the sum AND"),
        (
            "torch.arange(b, b + len(keys)) > rows",
            "torch.arange(len(keys)) > rows",
            "itself and the past",
        ),
        (" > rows[:, None]", " >= rows[:, None]", "itself and the past"),
        ("/ math.sqrt(D)", "", "sqrt(D)"),
        ("acc / s[:, None]", "acc", "divides once, at the end"),
        ("torch.maximum(m, z.amax(1))", "torch.zeros_like(m)", "Scores of hundreds"),
        ("new_full((len(part),), -math.inf)", "new_zeros(len(part))", "begins at -inf"),
        (
            "torch.maximum(m, z.amax(1))",
            "torch.maximum(m, z.amax().expand(len(m)))",
            "each query's own, not one for the tile",
        ),
        (
            "z = z.masked_fill(future, -math.inf)\n            new = torch.maximum(m, z.amax(1))",
            "new = torch.maximum(m, z.amax(1))\n            z = z.masked_fill(future, -math.inf)",
            "after the causal mask",
        ),
        ("torch.maximum(m, z.amax(1))", "m if b else z.amax(1)", "growing after the first tile"),
        ("m + s.log()", "(m + s.log()) / math.log(2)", "the log of how many it sees"),
        ("T, D = q.shape", "T, D = q.shape\n    tile = T", "never meets more"),
        ("range(0, a + len(part), tile)", "range(0, a + 1, tile + 1)", "so far"),
    ],
    "reverse_kl": [
        ("lp.exp() * (lp - lq)", "lq.exp() * (lq - lp)", "by the STUDENT's probabilities"),
        (".sum(-1)", ".mean(-1)", "not averaged"),
        ("lp.exp()", "lp.exp().detach()", "must not be detached"),
        (".sum(-1)", ".sum(-1).mean(1, keepdim=True).expand(lp.shape[:2])", "of its own"),
    ],
    "jsd": [
        ("(to_p + to_q) / 2", "to_p + to_q", "log 2, its largest value"),
        ("torch.logaddexp(lp, lq) - math.log(2)", "(lp + lq) / 2", "(not of their logs)"),
        ("torch.logaddexp(lp, lq) - math.log(2)", "torch.logaddexp(lp, lq)", "agree it is 0"),
        ("(to_p + to_q) / 2", "to_p", "half of KL(q || m)"),
        ("(lp.exp() *", "(lp.exp().detach() *", "with nothing detached"),
        (
            "(to_p + to_q) / 2",
            "((lp.exp() - lq.exp()) * (lp - lq)).sum(-1) / 4",
            "log 2, its largest value",
        ),
    ],
    "sampled_reverse_kl": [
        ("(logp - logq).detach() * logp", "logp - logq", "a mean gradient of 0"),
        ("(logp - logq).detach() * logp", "(logq - logp).detach() * logp", "it lowers the KL"),
        (
            "(logp - logq).detach() * logp",
            "(logp - logq + 1).detach() * logp",
            "of that very sample",
        ),
        (
            "lp.gather(2, y[..., None])",
            "lp.gather(2, lp.argmax(-1, keepdim=True))",
            "the gradient adds up",
        ),
        (
            "(logp - logq).detach() * logp",
            "((logp - logq).detach() * logp).mean(1)",
            "not (B, T)",
        ),
        ("(logp - logq).detach() * logp", "(lp.exp() * (lp - lq)).sum(-1)", "looks at the token y"),
    ],
    "trust_region": [
        (
            "((1 - b)[:, None] * lp + b[:, None] * lq).log_softmax(-1)",
            "((1 - b)[:, None] * lp.exp() + b[:, None] * lq.exp()).log()",
            "mixes log-probabilities",
        ),
        (".log_softmax(-1)", "", "add up to 1"),
        ("(m.exp() * (m - lp))", "(lp.exp() * (lp - m))", "from the mixture to the student"),
        (
            "(m.exp() * (m - lp)).sum(-1) <= eps",
            "((m.exp() * (m - lp)).sum(-1) <= eps).all().expand(len(lp))",
            "in each row on its own",
        ),
        ("torch.where(within(high), high, 0 * high)", "0 * high", "b = 1, exactly"),
        ("<= eps", "<= 2 * eps", "is eps, and not above it"),
        ("within(high)", "within(high).all()", "A batch may mix rows"),
        (
            "within(high)",
            "(lq.exp() * (lq - lp)).sum(-1).mean() <= eps",
            "A batch may mix rows",
        ),
        ("for _ in", "high = torch.maximum(low, high / 2)\n    for _ in", "above 1/2 too"),
        ("(m.exp() * (m - lp))", "(m.exp() * (m - lq))", "was measured to the teacher"),
    ],
    "budget_rule": [
        ("return b\n", "return 2 * b\n", "not its double"),
        ("if 2 * b in success", "if 2 * b in success][::-1", "not the last one"),
        ("sorted(success)", "success", "in any order"),
        ("0 < success[2 * b] <= kappa", "0 < success[2 * b] < kappa", "at most kappa times"),
        ("0 < success", "success", "nothing was seen"),
        ("return budgets[-1]", "return max(success)", "whose double was measured"),
        (
            "0 < success[2 * b] <= kappa",
            "0 < success[min(x for x in success if x > b)] <= kappa",
            "with the double of a budget",
        ),
    ],
    "coverage_profile": [
        ("[~(log_ratio <", "[(log_ratio <", "that are MISSED"),
        ("math.log(n) - 1e-12", "n", "compared with log N"),
        ("math.log(n) - 1e-12", "math.log(n) + 1e-9", "at least N, not above N"),
        ("~(log_ratio < math.log(n) - 1e-12)", "log_ratio >= math.log(n)", "no number (nan)"),
        (
            "missed = ",
            "log_ratio = log_ratio[log_ratio.isfinite()]\n    missed = ",
            "is missed at every",
        ),
    ],
    "tournament": [
        ("logp[None] - logp[:, None]", "logp[:, None] - logp[None]", "p_j / p_i, not p_i / p_j"),
        ("lost.amax(1)", "lost.mean(1)", "the worst rival"),
        ("math.log(n) - 1e-12", "n", "compared with log n"),
        (">= math.log(n) - 1e-12", "> math.log(n)", "a ratio of n counts"),
        (
            "lost.amax(1)",
            "((logp.amax(0) - logp) >= math.log(n) - 1e-12).double().mean(1)",
            "Each rival's share is counted on its own",
        ),
    ],
    "inner_update": [
        ("w - scale", "w + scale", "downhill"),
        ("squares.clamp_min(1)", "squares", "never made longer"),
        ("squares.clamp_min(1)", "squares.max().clamp_min(1)", "does not shorten another's"),
        (
            "scale.view(-1, *[1] * (g.dim() - 1)) * g",
            "eta * g / g.flatten(1).norm(dim=1).clamp_min(1).view(-1, 1, 1)",
            "all of its tensors together",
        ),
        ("squares.clamp_min(1)", "(1 + 0 * squares)", "the step is as long as eta"),
        ("w - scale", "w.detach() - scale", "nothing detached"),
        ("- 1)) * g", "- 1)) * g.detach()", "nothing detached"),
        ("squares.clamp_min(1)", "squares.detach().clamp_min(1)", "the length included"),
        ("view(-1, *[1] * (g.dim() - 1))", "view(-1, 1, 1)", "any number of dimensions"),
        ("squares.clamp_min(1)", "(squares / squares.clamp_max(1))", "With a gradient of 0"),
        ("squares.clamp_min(1).sqrt()", "squares.sqrt().clamp_min(1)", "is it nan at 0"),
    ],
}
