"""A student's file with all functions of the course, as plainly as they can be written: what
test_assignment.py grades whole, and breaks in one place at a time. It imports nothing of ours.
"""

import math
from collections import Counter
from itertools import pairwise

import torch


def bpe_merges(words, n_merges):
    counts = Counter(tuple(bytes([b]) for b in word) for word in words)
    merges = []
    while len(merges) < n_merges:
        pairs = Counter()
        for word, n in counts.items():
            for pair in pairwise(word):
                pairs[pair] += n
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best[0] + best[1])
        joined = Counter()
        for word, n in counts.items():
            new, i = [], 0
            while i < len(word):
                if word[i : i + 2] == best:
                    new.append(word[i] + word[i + 1])
                    i += 2
                else:
                    new.append(word[i])
                    i += 1
            joined[tuple(new)] += n
        counts = joined
    return merges


def rms_norm(x, weight, eps):
    rms = (x.square().mean(-1, keepdim=True) + eps).sqrt()
    return weight * (x / rms)


def rotary(x, positions, theta):
    D = x.shape[-1]
    j = torch.arange(D // 2, dtype=x.dtype)
    angle = positions[:, :, None, None] * theta ** (-2 * j / D)
    u = x[..., 0::2]
    w = x[..., 1::2]
    turned = u * angle.cos() - w * angle.sin(), u * angle.sin() + w * angle.cos()
    return torch.stack(turned, -1).flatten(-2)


def attention(q, k, v, window=None):
    T, S = q.shape[2], k.shape[2]
    group = q.shape[1] // k.shape[1]
    k = k.repeat_interleave(group, 1)
    v = v.repeat_interleave(group, 1)
    distance = torch.arange(S - T, S)[:, None] - torch.arange(S)
    seen = distance >= 0
    if window is not None:
        seen = seen & (distance < window)
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    return scores.masked_fill(~seen, -math.inf).softmax(-1) @ v


def cache_step(keys, values, lens, q, k, v):
    rows = torch.arange(len(lens))
    keys[rows, lens] = k
    values[rows, lens] = v
    seen = torch.arange(keys.shape[1]) <= lens[:, None]
    scores = (keys * q[:, None]).sum(-1) / math.sqrt(q.shape[-1])
    p = scores.masked_fill(~seen, -math.inf).softmax(-1)
    out = torch.where(seen[..., None], p[..., None] * values, 0).sum(1)
    return out, lens + 1


def inverse_cdf(probs, u):
    cdf = probs.cumsum(-1)
    token = (cdf <= u[:, None]).sum(-1)
    last = (probs > 0).long().cumsum(-1).argmax(-1)
    return torch.minimum(token, last)


def truncate(logits, top_k=None, top_p=None):
    if top_k is not None:
        smallest = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -math.inf)
    if top_p is not None and top_p < 1:
        probs, order = logits.softmax(-1).sort(-1, descending=True)
        above = probs.cumsum(-1) - probs
        mass = torch.empty_like(above).scatter(-1, order, above)
        logits = logits.masked_fill((mass >= top_p) & (mass > 0), -math.inf)
    return logits


def stratified_uniforms(prompts, group, generator):
    place = torch.rand(prompts, group, dtype=torch.float64, generator=generator)
    interval = torch.rand(prompts, group, generator=generator).argsort(1)
    return (interval + place) / group


def lattice_uniforms(prompts, group, generator):
    shift = torch.rand(prompts, 1, dtype=torch.float64, generator=generator)
    return (torch.arange(group) / group + shift) % 1


def pass_at_k(n, correct, k):
    if not 1 <= k <= n:
        raise ValueError(f"k = {k}, n = {n}")
    j = torch.arange(n - k + 1, n + 1, dtype=torch.float64)
    return 1 - (1 - correct[:, None] / j).prod(-1)


def advantages(rewards, kind):
    if kind == "batch":
        return rewards - rewards.mean()
    G = rewards.shape[1]
    equal = (rewards == rewards[:, :1]).all(1, keepdim=True)
    centred = (rewards - rewards.mean(1, keepdim=True)).masked_fill(equal, 0)
    if kind == "rloo":
        return centred * G / (G - 1)
    if kind == "std":
        return centred / (rewards.std(1, keepdim=True) + 1e-6)
    return centred


def policy_loss(logp, old_logp, adv, mask, ratio, eps_low, eps_high):
    logp = torch.where(mask > 0, logp, 0)
    if ratio == "none":
        return -adv * logp
    log_rho = torch.where(mask > 0, logp - old_logp.detach(), 0)
    if ratio == "sequence":
        mean = log_rho.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp_min(1)
        log_rho = mean.detach() + logp - logp.detach()
    rho = log_rho.exp()
    clipped = rho.clamp(1 - eps_low, 1 + eps_high)
    if ratio == "cispo":
        return -clipped.detach() * adv * logp
    return -torch.minimum(rho * adv, clipped * adv)


def aggregation_weights(mask, kind, budget):
    R = len(mask)
    if kind == "sequence":
        return mask / (R * mask.sum(1, keepdim=True).clamp_min(1))
    if kind == "token":
        return mask / mask.sum().clamp_min(1)
    return mask / (R * budget)


def kl_estimate(logp, ref_logp, kind):
    d = logp - ref_logp
    if kind == "k1":
        return d
    if kind == "k2":
        return d**2 / 2
    return (-d).exp() - 1 + d


def token_logprobs(hidden, weight, targets, temperature, block):
    N, V = len(hidden), len(weight)
    m = hidden.new_full((N,), -math.inf)
    s = hidden.new_zeros(N)
    s1 = hidden.new_zeros(N)
    target = hidden.new_zeros(N)
    for a in range(0, V, block):
        z = hidden @ weight[a : a + block].T / temperature
        here = (targets >= a) & (targets < a + block)
        target[here] = z[here, targets[here] - a]
        new = torch.maximum(m, z.amax(1))
        e = (z - new[:, None]).exp()
        scale = (m - new).exp()
        s = s * scale + e.sum(1)
        s1 = s1 * scale + (e * z).sum(1)
        m = new
    lse = m + s.log()
    return target - lse, lse - s1 / s, lse


def token_logprobs_backward(
    hidden, weight, targets, lse, entropy, g_logp, g_entropy, temperature, block
):
    dhidden = torch.zeros_like(hidden)
    dweight = torch.zeros_like(weight)
    for a in range(0, len(weight), block):
        w = weight[a : a + block]
        logp = hidden @ w.T / temperature - lse[:, None]
        p = logp.exp()
        dz = -p * g_logp[:, None]
        dz -= p * (logp + entropy[:, None]) * g_entropy[:, None]
        here = (targets >= a) & (targets < a + block)
        dz[here, targets[here] - a] += g_logp[here]
        dz /= temperature
        dhidden += dz @ w
        dweight[a : a + block] = dz.T @ hidden
    return dhidden, dweight


def flash_attention(q, k, v, tile):
    T, D = q.shape
    o = torch.zeros_like(q)
    lse = q.new_zeros(T)
    for a in range(0, T, tile):
        part = q[a : a + tile]
        rows = torch.arange(a, a + len(part))
        m = part.new_full((len(part),), -math.inf)
        s = torch.zeros_like(m)
        acc = torch.zeros_like(part)
        for b in range(0, a + len(part), tile):
            keys = k[b : b + tile]
            z = part @ keys.T / math.sqrt(D)
            future = torch.arange(b, b + len(keys)) > rows[:, None]
            z = z.masked_fill(future, -math.inf)
            new = torch.maximum(m, z.amax(1))
            p = (z - new[:, None]).exp()
            scale = (m - new).exp()
            s = s * scale + p.sum(1)
            acc = acc * scale[:, None] + p @ v[b : b + tile]
            m = new
        o[a : a + tile] = acc / s[:, None]
        lse[a : a + tile] = m + s.log()
    return o, lse


def reverse_kl(lp, lq):
    return (lp.exp() * (lp - lq)).sum(-1)


def jsd(lp, lq):
    lm = torch.logaddexp(lp, lq) - math.log(2)
    to_p = (lp.exp() * (lp - lm)).sum(-1)
    to_q = (lq.exp() * (lq - lm)).sum(-1)
    return (to_p + to_q) / 2


def sampled_reverse_kl(lp, lq, y):
    logp = lp.gather(2, y[..., None])[..., 0]
    logq = lq.gather(2, y[..., None])[..., 0]
    return (logp - logq).detach() * logp


def trust_region(lp, lq, eps):
    def mixture(b):
        return ((1 - b)[:, None] * lp + b[:, None] * lq).log_softmax(-1)

    def within(b):
        m = mixture(b)
        return (m.exp() * (m - lp)).sum(-1) <= eps

    high = lp.new_ones(len(lp))
    low = torch.where(within(high), high, 0 * high)
    for _ in range(20):
        middle = (low + high) / 2
        inside = within(middle)
        low = torch.where(inside, middle, low)
        high = torch.where(inside, high, middle)
    return mixture(low), low


def budget_rule(success, kappa):
    budgets = [b for b in sorted(success) if 2 * b in success]
    for b in budgets:
        if 0 < success[2 * b] <= kappa * success[b]:
            return b
    return budgets[-1]


def coverage_profile(log_ratio, ns):
    missed = [~(log_ratio < math.log(n) - 1e-12) for n in ns]
    return torch.stack(missed).double().mean(1)


def tournament(logp, n):
    ratio = logp[None] - logp[:, None]
    lost = (ratio >= math.log(n) - 1e-12).double().mean(-1)
    return lost.amax(1)


def inner_update(fast, grads, eta):
    squares = sum(g.square().reshape(len(g), -1).sum(1) for g in grads)
    scale = eta / squares.clamp_min(1).sqrt()
    pairs = zip(fast, grads, strict=True)
    return tuple(w - scale.view(-1, *[1] * (g.dim() - 1)) * g for w, g in pairs)
