"""curriculum.py: e3, learning to explore (Setlur et al., arXiv 2506.09026). Answers that try, check and try again, and what makes them grow.

    python curriculum.py                        `explore`: the asymmetry and the negative gradient, within 5 minutes on two cores
    python curriculum.py --figure curriculum    easy problems at a short budget, then hard ones at a longer one, against three rivals
    python curriculum.py --figure budget        four training budgets, each tested at all budgets
    python curriculum.py --figure mask          what negative advantages are worth, at one update a batch and at 16

A problem is a few numbers and the sum of two of them. An answer tries pairs, one attempt of four tokens after the other, then names one:

    BOS 3 11 8 2 6 12 ?14           3 6 =9 NO   11 2 =13 NO   8 6 =14 OK   ANS 8 6 EOS          reward 1: 8 + 6 = 14

RL (GRPO, reward at the end only) can raise the success of an attempt, or the number of attempts. Three ingredients for the second:
1. asymmetry: the base model judges an attempt better than it makes one (`verdict_gap`). Its rival has the same format, but empty verdicts.
2. negative gradient: a wrong answer that stopped makes stopping less likely. Masked, max(A, 0), only right answers teach.
3. coupled curriculum: easy problems at a short budget, then hard ones at B* = min {B >= B0: J(2B) <= kappa J(B)} (`budget_rule`).

Of 2: with rewards of 0 and 1 and advantages that sum to 0 in a group, a prompt of success p has E[masked gradient] = (1 - p) E[full gradient],
because E[grad log pi] = 0. One on-policy update a batch follows the same path with and without negatives, at another speed. They part
where a batch is used several times under PPO's clip.

The p^k model is the smallest case: a table of logits over 30 guesses and `stop`, an episode that ends at a right guess. Raising p or k?

How this differs from the paper:
1. A model of 0.1 million parameters from scratch, sums for equations, budgets of 16 to 512 tokens for 1k to 32k.
2. One gradient step per batch (rho = 1, no clipping; an arm of `mask` takes 16, each on its share of the answers), no KL term, temperature 1.
3. Positions: only four of eight pairs of channels turn (partial rotary, periods of 6 to 35 tokens, all seen in training), the
   others look for content alone. A longer trace then shows the model little that is new, and `verdicts_by_place` measures how little.
4. The p^k model: 30 guesses and 60 draws for 100 and 100; logits start within .3 of 0 for 3, stop at 1.5 for 4, the right guess at -3 for -4 (with
   the paper's an episode begins at 7 draws, in its figure at 15); 256 episodes a step at a rate of 30 for one at .01. Its second
   task, with 5 right guesses of 30, group advantages and several updates a batch, is not the paper's.

What to see: attempts per answer grow several times with the asymmetry, and fall without; accuracy goes on rising past the training budget.
Negative advantages are worth nothing but speed at one update a batch. At 16 under the clip they keep the entropy of the p^k model up.
"""
import copy
import math
import random
import zlib
from dataclasses import dataclass

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch

from engine import generate
from experiment import Run, UserError, band, claim, command, descend, flag, need_memory, parse_args, pick_device, restore, seeds_of, series
from kernels import token_logprobs
from model import GPT, GPTConfig

FIGURES = {"explore": "asymmetry, negative gradient, the p^k model (within 5 minutes)",
           "curriculum": "the coupled curriculum against three rivals at equal tokens, tested to 4 times the budget (about 25 minutes)",
           "budget": "training budgets of 16 to 128 tokens, each tested at all budgets (about 15 minutes)",
           "mask": "GRPO with and without its negative advantages, at one update a batch and at 16 (about 12 minutes)"}
#  a base model: what is different about its demonstrations
BASES = {"gap": dict(),
         "no gap": dict(honest=False)}              # the same format; sums and verdicts mean nothing
SOURCE = "Setlur et al., arXiv 2506.09026"


@dataclass
class Config:
    seed: int = flag(0, "random seed; with --seeds K: the first of K", low=0, high=2 ** 32 - 1)
    seeds: int = flag(None, "repeat over this many seeds (default: 1 for explore, 3 for the others)", low=1)
    device: str = flag("auto", "where to run", choices=("auto", "cpu", "cuda", "mps"))
    dtype: str = flag("float32", "bfloat16: autocast training", choices=("float32", "bfloat16"))
    out: str = flag("out/curriculum", "folder for figure, metrics, claims and checkpoint")
    resume: bool = flag(False, "go on from the checkpoint in --out")
    quick: bool = flag(False, "a run of a few seconds that shows nothing but that it runs")
    figure: str = flag("explore", "which figure: " + "; ".join(f"{k}: {v}" for k, v in FIGURES.items()), choices=tuple(FIGURES))
    steps: int = flag(None, "RL steps of an arm (default: 80, for mask 40; curriculum counts tokens)", quick=2, low=1)
    numbers: int = flag(6, "numbers in a problem (curriculum has its own)", choices=(3, 4, 6, 8))
    budget: int = flag(64, "tokens that an answer may have in training (budget and curriculum have their own)", choices=(16, 32, 64, 128))
    stage_tokens: int = flag(400_000, "curriculum: sampled tokens of each of its two stages, at most", quick=6_000, low=1)
    kappa: float = flag(1.2, "budget rule: doubling the budget must multiply the success by more than this", low=1)
    prompts: int = flag(32, "problems per step", quick=4, low=1, high=10_000)
    group: int = flag(8, "answers per problem", quick=4, low=2, high=10_000)
    lr: float = flag(4e-4, "RL learning rate (AdamW, constant)", low=0)
    gate: float = flag(0.6, "verdict gap that a base needs before RL starts", quick=-1.0)
    n_layer: int = flag(2, "layers", low=1)
    n_head: int = flag(4, "heads", low=1)
    n_embd: int = flag(64, "channels", quick=32, low=8)
    sft_steps: int = flag(1200, "steps of training each base model", quick=10, low=1)
    sft_batch: int = flag(64, "traces per step", quick=8, low=1, high=100_000)
    sft_lr: float = flag(6e-3, "learning rate of the base models (up in 50 steps, then linear to 0)", low=0)
    eval_every: int = flag(None, "RL steps between evaluations (default: 20, for mask 4)", low=1)
    eval_prompts: int = flag(1024, "held-out problems at the first and the last evaluation, a quarter of them on the way", quick=8, low=4, high=1_000_000)

    def idle(self):
        """The flags that do nothing beside the others: name -> why."""
        if self.figure == "curriculum":
            why = "has its own problems and budgets, and counts tokens"
            return dict.fromkeys(("numbers", "budget", "steps"), f"--figure curriculum {why}")
        idle = dict.fromkeys(("stage_tokens", "kappa"), "it belongs to --figure curriculum")
        return idle | (dict(budget="--figure budget has its own") if self.figure == "budget" else {})

    @property
    def name(self):
        return self.figure


# ---------------------------------------------------------------------------------------------------------------------------
# The p^k model: a softmax table. Of its actions the first `right` are right, those up to K - 1 wrong, and K is stop

def pk_start(K=30, right=1, stop=1.5, low=-3.0, seed=0):
    """Logits (K, K + 1) float64 of the next action given the last: stop has no row. The first action is nobody's choice (`pk_sample`)."""
    M = torch.as_tensor(np.random.default_rng(seed).uniform(-0.3, 0.3, (K, K + 1)))
    M[:, :right], M[:, K] = low, stop
    return M


def pk_sample(M, right, budget, n, rng):
    """n episodes of at most `budget` draws, of which the first is uniform over the wrong actions whatever M is (the paper's pi_0)
    -> draws (3, N): episode, last, next; success (n,); lengths (n,), the first draw included."""
    K, cdf = len(M), M.softmax(-1).cumsum(-1).numpy()
    last, alive, draws = rng.integers(right, K, n), np.arange(n), []
    success, lengths = np.zeros(n, bool), np.ones(n, int)
    for _ in range(budget - 1):
        action = np.minimum((rng.random(len(alive))[:, None] > cdf[last[alive]]).sum(1), K)
        draws.append(np.stack((alive, last[alive], action)))
        lengths[alive] += 1
        last[alive], success[alive] = action, action < right
        alive = alive[(action >= right) & (action < K)]
    return np.concatenate(draws, 1), success, lengths


def pk_sums(M, draws, weight):
    """The weights (n,) of the episodes, summed over the draws of each (last, next): (K, K + 1). All that a table's gradient needs of them."""
    sums = np.zeros(M.shape)
    np.add.at(sums, (draws[1], draws[2]), weight[draws[0]])
    return torch.as_tensor(sums)


def pk_gradient(M, sums):
    """sum A grad log pi over the draws, by d log pi(a) / dM_b = 1[a = b] - pi_b."""
    return sums - sums.sum(1, keepdim=True) * M.softmax(-1)


def pk_exact(M, right, budget):
    """Success, entropy per draw of the table (nats), draws per episode, and exp of the entropy of which right action it was. No sampling."""
    p, K = M.softmax(-1), len(M)
    last, entropy = torch.full((K,), 1 / (K - right), dtype=M.dtype), torch.special.entr(p).sum(1)
    draws, nats, found = 1.0, 0.0, torch.zeros(right, dtype=M.dtype)
    for _ in range(budget - 1):
        last[:right] = 0                            # found: the episode is over
        draws, nats, found = draws + last.sum().item(), nats + (last @ entropy).item(), found + last @ p[:, :right]
        last = last @ p[:, :K]
    share = found / found.sum()
    return found.sum().item(), nats / (draws - 1), draws, torch.special.entr(share).sum().exp().item()


def pk_train(masked, seed, K=30, budget=60, lr=30.0, n=256, steps=1500):
    """Gradient ascent with rewards of 1 and -1 and no baseline; masked: 1 and 0. -> success, length, entropy at each step (steps, 3).

    As E[grad log pi] = 0 the masked gradient has half the mean of the full one: the direction is the same, the step is half as long.
    """
    M, rng, path = pk_start(K, seed=seed), np.random.default_rng(seed), []
    for _ in range(steps):
        draws, right, lengths = pk_sample(M, 1, budget, n, rng)
        p, visits = M.softmax(-1), torch.as_tensor(np.bincount(draws[1], minlength=K)).double()
        path.append((right.mean(), lengths.mean(), (-(p * p.log()).sum(1) @ (visits / visits.sum())).item()))
        M = M + lr * pk_gradient(M, pk_sums(M, draws, np.where(right, 1.0, 0.0 if masked else -1.0))) / draws.shape[1]
    return np.array(path)


def pk_reuse(masked, seed, updates, batches, lr, eps=0.2, right=5, K=30, budget=40, groups=8, size=8):
    """GRPO on one prompt with `right` right answers; each batch gives `updates` steps of gradient ascent, under PPO's clip (eps; inf: without)
    -> `pk_exact` before each batch and at the end (batches + 1, 4).

    A table's ratio is one number for each (last, next), so that PPO's gradient needs of a batch no more than two tables of summed advantages.
    """
    M, rng, path = pk_start(K, right, seed=seed), np.random.default_rng(seed), []
    for _ in range(batches):
        path.append(pk_exact(M, right, budget))
        draws, success, _ = pk_sample(M, right, budget, groups * size, rng)
        rewards = success.reshape(groups, size).astype(float)
        adv = (rewards - rewards.mean(1, keepdims=True)).flatten()
        good, bad = pk_sums(M, draws, adv.clip(0)), pk_sums(M, draws, adv.clip(max=0) * (not masked))
        old = M.softmax(-1)
        for _ in range(updates):
            rho = M.softmax(-1) / old
            sums = rho * (good * (rho <= 1 + eps) + bad * (rho >= 1 - eps))         # what is clipped has no gradient
            M = M + lr * pk_gradient(M, sums) / len(adv)
    return np.array([*path, pk_exact(M, right, budget)])


def steps_to(path, level=0.5, window=10):
    """The first step at which the mean success of the last `window` steps reaches the level; the number of steps if it never does."""
    mean = np.convolve(path[:, 0], np.ones(window) / window, "valid")
    reached = np.flatnonzero(mean >= level)
    return int(reached[0]) + window - 1 if len(reached) else len(path)


def at_success(success, y, levels):
    """y (n,) where success (n,), step by step, first reaches each of the levels, between two steps linear; nan if it never does or starts above."""
    best = np.maximum.accumulate(success)
    first = np.unique(best, return_index=True)[1]           # the steps that set a record
    return np.interp(levels, best[first], y[first], left=math.nan, right=math.nan)


# ---------------------------------------------------------------------------------------------------------------------------
# The task: which two numbers have this sum?

HIGHEST = 12                                                # numbers 1 to 12 are tokens 1 to 12
OK, NO, ANS, EOS, BOS = range(36, 41)
VOCAB = 77
LONGEST = 512                                               # tokens of the longest answer


def sum_token(s):
    """=s for 3 to 23: tokens 15 to 35."""
    return HIGHEST + s


def target_token(t):
    """?t for 3 to 23: tokens 44 to 64."""
    return 41 + t


def second(b):
    """A number in second place has a token of its own, 65 to 76: the two can be told apart wherever they stand."""
    return 64 + b


def draw_problem(rng, numbers, held_out=False, single=False):
    """Distinct numbers and the sum of two of them -> (numbers, target). A tenth of all problems, by a hash, is never trained on.

    single: one pair alone has the sum, so that all problems are equally hard to guess.
    """
    while True:
        xs = rng.sample(range(1, HIGHEST + 1), numbers)
        target = sum(rng.sample(xs, 2))
        if single and sum(target - x in xs for x in xs if 2 * x != target) > 2:
            continue
        if (zlib.crc32(bytes([*sorted(xs), target])) % 10 == 0) == held_out:
            return xs, target


def prompt(problem):
    xs, target = problem
    return [BOS, *xs, target_token(target)]


def demonstrate(rng, problem, honest=True, patience=(0.4, 1.0), attempts=16):
    """A trace of random attempts: after a NO it goes on with a probability drawn from `patience` once a trace. The last pair is the answer.

    Verdicts that are not honest are coins, after a random sum: OK one time in ten, about as often as a pair of six numbers is right.
    """
    xs, target = problem
    trace, go_on = [], rng.uniform(*patience)
    for _ in range(attempts):
        a, b = rng.sample(xs, 2)
        coin = rng.random() < 0.1       # tossed for both kinds: their other draws are then alike
        ok = a + b == target if honest else coin
        trace += [a, second(b), sum_token(a + b if honest else rng.randrange(3, 2 * HIGHEST)), OK if ok else NO]
        if ok or rng.random() > go_on:
            break
    return [*trace, ANS, a, second(b), EOS]


def parse(tokens):
    """An answer's attempts [(a, b, sum, verdict), ...] and what it names, (a, b), or None if that is cut off or malformed."""
    attempts, i = [], 0
    while i + 4 <= len(tokens) and tokens[i + 3] in (OK, NO) and 1 <= tokens[i] <= HIGHEST and tokens[i + 1] > second(0):
        attempts.append((tokens[i], tokens[i + 1] - second(0), tokens[i + 2] - HIGHEST, tokens[i + 3] == OK))
        i += 4
    rest = tokens[i:]
    finished = len(rest) == 4 and rest[0] == ANS and rest[3] == EOS
    return attempts, (rest[1], rest[2] - second(0)) if finished else None


def hits(problem, a, b):
    """Whether a and b are two different numbers of the problem with its sum."""
    xs, target = problem
    return a != b and a in xs and b in xs and a + b == target


def reward(problem, tokens):
    """1.0 if the answer is finished and the pair that it names hits, else 0.0."""
    named = parse(tokens)[1]
    return float(named is not None and hits(problem, *named))


def behaviour(problems, answers):
    """Means over the answers: attempts, different pairs among them, their hits, and P(stop | the last verdict was NO)."""
    parsed = [parse(tokens) for tokens in answers]
    count = sum(len(attempts) for attempts, _ in parsed)
    found = sum(hits(problem, a, b) for problem, (attempts, _) in zip(problems, parsed) for a, b, *_ in attempts)
    after_no = sum(not ok for attempts, _ in parsed for *_, ok in attempts)
    gave_up = sum(bool(attempts) and not attempts[-1][3] and named is not None for attempts, named in parsed)
    return dict(attempts=count / len(answers), unique_attempts=sum(len({frozenset(t[:2]) for t in attempts}) for attempts, _ in parsed) / len(answers),
                hit_rate=found / max(count, 1), gives_up=gave_up / max(after_no, 1))


def verdict_gap(problems, answers):
    """Balanced accuracy of the verdicts minus the success of an attempt: how much better the model judges than it guesses. A coin's is about .4."""
    judged = [(hits(problem, a, b), ok) for problem, tokens in zip(problems, answers) for a, b, _, ok in parse(tokens)[0]]
    rate = lambda truth: np.mean([ok == truth for hit, ok in judged if hit == truth] or [0.5])
    return float((rate(True) + rate(False)) / 2 - np.mean([hit for hit, _ in judged] or [0.0]))


def budget_rule(success, kappa):
    """{budget: J} -> the smallest budget whose double was measured and does not multiply J by more than kappa (Eq. 6.1); the largest of them if none.

    Where J is 0 nothing was seen, no plateau either: measure pass@k instead, as the paper does.
    """
    budgets = [b for b in sorted(success) if 2 * b in success]
    return next((b for b in budgets if 0 < success[2 * b] <= kappa * success[b]), budgets[-1])


# ---------------------------------------------------------------------------------------------------------------------------
# Training

def build(config, device):
    model = GPT(GPTConfig(VOCAB, 2 + 8 + LONGEST, config.n_layer, config.n_head, config.n_embd, n_hidden=4 * config.n_embd, qk_norm=True, tie=False,
                          rope_theta=100.0)).to(device)
    model.rope[..., model.rope.shape[-1] // 2:] = 1         # partial rotary: the slower half of the pairs does not turn
    return model


def score(model, ids, config):
    """Log-probability and entropy (R, T - 1) of each token given those before it."""
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
        return token_logprobs(model.hidden(ids[:, :-1]), model.lm_head.weight, ids[:, 1:])


def warm_up(config, run, seed, device, kind="gap"):
    """Supervised training on traces, from scratch -> a base model of a row of BASES. A gap between judging and guessing is measured, and is a condition."""
    phase, rng = f"base {kind} {seed}", random.Random(seed)
    torch.manual_seed(seed)
    model = build(config, device)
    optimizer = torch.optim.AdamW(model.parameters(), config.sft_lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    for step in run.loop(phase, config.sft_steps, model, optimizer, rng):
        for g in optimizer.param_groups:
            g["lr"] = config.sft_lr * min((step + 1) / 50, 1 - step / config.sft_steps)
        problems = [draw_problem(rng, rng.choice((3, 4, 6, 8))) for _ in range(config.sft_batch)]
        pairs = sorted(((prompt(p), demonstrate(rng, p, **BASES[kind])) for p in problems), key=lambda pair: len(pair[0] + pair[1]))
        count, total = sum(len(a) for _, a in pairs), 0.0
        optimizer.zero_grad()
        for part in (pairs[i:i + 16] for i in range(0, len(pairs), 16)):        # short traces together: less padding
            T = max(len(q + a) for q, a in part)
            ids, mask = torch.zeros(len(part), T, dtype=torch.long), torch.zeros(len(part), T)
            for i, (q, a) in enumerate(part):
                ids[i, :len(q + a)], mask[i, len(q):len(q + a)] = torch.tensor(q + a), 1
            loss = -(score(model, ids.to(device), config)[0] * mask[:, 1:].to(device)).sum() / count
            loss.backward()
            total += loss.item()
        descend(optimizer, total)
        if step % 50 == 0 or step + 1 == config.sft_steps:
            run.log(phase="sft", arm=phase, seed=seed, step=step, loss=total)
            run.bar.set_postfix_str(f"loss {total:.3f}")
    gap = evaluate(model, config, config.numbers, (64,), "gate")[1]["gap"]
    print(f"{phase}: the balanced accuracy of its verdicts is {gap:.2f} above the success of its attempts")
    if kind != "no gap" and gap < config.gate:
        raise UserError(f"{phase}: a verdict gap of {gap:.2f} is no asymmetry to build on (--gate {config.gate}); give it more --sft-steps")
    return model


def advantages(rewards, masked):
    """rewards (P, G), 0 or 1 -> (P, G): minus the group's mean, over its standard deviation; exactly 0 in a group of equals. Masked: then max(A, 0)."""
    centred = torch.where((rewards == rewards[:, :1]).all(1, keepdim=True), 0.0, rewards - rewards.mean(1, keepdim=True))
    a = centred / (rewards.std(1, keepdim=True) + 1e-6)
    return a.clamp_min(0) if masked else a


def answers_to(model, problems, n, budget, generator):
    """n sampled answers to each problem -> Rollout of R = len(problems) * n rows, their tokens, the problem of each."""
    rollout = generate(model, [prompt(p) for p in problems], n, budget, stop=EOS, generator=generator)
    return rollout, rollout.tokens(), [p for p in problems for _ in range(n)]


def evaluate(model, config, numbers, budgets, seed=0, n=None, held_out=True, single=False, k=1):
    """k answers to each of n held-out (or training) problems at the largest budget, cut to the smaller ones
    -> {budget: share of the problems that one of the k solves}, behaviour at the largest, `nats` per token (of its log-probabilities) included."""
    rng, n = random.Random(f"{numbers} {seed}"), n or config.eval_prompts
    problems = [draw_problem(rng, numbers, held_out, single) for _ in range(n)]
    rollout, answers, repeated = answers_to(model, problems, k, max(budgets), torch.Generator().manual_seed(rng.getrandbits(32)))
    right = lambda b: np.array([reward(p, t[:b]) for p, t in zip(repeated, answers)]).reshape(n, k).max(1)
    how = behaviour(repeated, answers) | {"gap": verdict_gap(repeated, answers), "nats": -(rollout.logp.sum() / rollout.mask.sum()).item()}
    return {b: right(b).sum() / n for b in budgets}, how


def update(model, optimizer, rollout, adv, config, generator, updates=1, eps=(0.2, 0.5)):
    """The gradient steps of one batch -> metrics of the last. adv (R, 1). More than one: the ratio to the sampler is clipped (eps: the paper's).

    Each step has its own share of the answers; its loss is the mean over all their tokens.
    """
    order = torch.randperm(len(adv), generator=generator).to(adv.device) if updates > 1 else torch.arange(len(adv), device=adv.device)
    for step in order.chunk(updates):
        count, total = rollout.mask[step].sum(), dict(loss=0.0, entropy=0.0)
        optimizer.zero_grad()
        for rows in step[rollout.lengths[step].argsort()].split(64):            # short answers together: less padding
            part = rollout[rows]
            mask, (logp, entropy) = part.mask[:, 1:], score(model, part.ids, config)
            rho = (logp - (logp.detach() if updates == 1 else part.logp[:, 1:])).exp()
            gain = torch.minimum(rho * adv[rows], rho.clamp(1 - eps[0], 1 + eps[1]) * adv[rows])
            loss = -(gain * mask).sum() / count
            loss.backward()
            total["loss"] += loss.item()
            total["entropy"] += ((entropy * mask).sum() / count).item()
        total["grad_norm"] = descend(optimizer, total["loss"])
    return total


def train(config, run, arm, seed, base, stages, budgets, masked=False, updates=1, single=False, after=None):
    """GRPO from the base through stages of (numbers, budget, sampled tokens or None: config.steps steps) -> the trained model.

    A stage ends where its next batch might sample more than its tokens. after: an arm whose state this one goes on with, optimizer and random
    streams included: its stages are the first of this arm's. Logs the success at each of the budgets, on held-out problems of the last stage's
    size. masked: see `advantages`; updates: see `update`; single: see `draw_problem`.
    """
    phase, model, device = f"{arm} {seed}", copy.deepcopy(base), base.lm_head.weight.device
    optimizer = torch.optim.AdamW(model.parameters(), config.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    rng, generator, kept = random.Random(seed + 1), torch.Generator().manual_seed(seed + 1), {"sampled": 0}
    if after:
        before = run.state[f"{after} {seed}"]
        restore(before, model, optimizer, rng, generator)
        kept.update(before["kept"])
    limits = np.cumsum([tokens or math.inf for *_, tokens in stages])       # sampled tokens at which each stage ends
    by_steps = math.isinf(limits[-1])

    def stage():
        """(numbers, budget) of the next batch; None at the end."""
        return next(((n, b) for (n, b, _), limit in zip(stages, limits) if kept["sampled"] + config.prompts * config.group * b <= limit), None)

    def log(step, divisor, **row):
        name = step if by_steps else "the end" if step else "the start"     # arms that end at different steps are tested on the same problems
        success, how = evaluate(model, config, stages[-1][0], budgets, f"{seed} {name}", config.eval_prompts // divisor, single=single)
        run.log(phase="rl", arm=arm, seed=seed, step=step, sampled_tokens=kept["sampled"], **row, **{f"pass@1 of {b}": s for b, s in success.items()}, **how)
        return f"success at {budgets[-1]} tokens {success[budgets[-1]]:.3f}, attempts {how['attempts']:.1f}"

    if phase not in run.state:
        log(0, 1)
    for step in run.loop(phase, config.steps if by_steps else 10 ** 9, model, optimizer, rng, generator, kept, until=lambda: stage() is None):
        numbers, budget = stage()
        problems = [draw_problem(rng, numbers, single=single) for _ in range(config.prompts)]
        rollout, answers, repeated = answers_to(model, problems, config.group, budget, generator)
        rewards = torch.tensor([reward(p, t) for p, t in zip(repeated, answers)], device=device)
        adv = advantages(rewards.view(-1, config.group), masked).view(-1, 1)
        metrics = update(model, optimizer, rollout, adv, config, generator, updates)
        kept["sampled"] += int(rollout.mask.sum())
        done = step + 1 == config.steps if by_steps else stage() is None
        if (step + 1) % config.eval_every == 0 or done:
            lengths, right = rollout.lengths.float().cpu(), rewards.cpu() > 0
            mean = lambda x: x.mean().item() if len(x) else None
            run.bar.set_postfix_str(log(step + 1, 1 if done else 4, **metrics, reward=rewards.mean().item(), length=lengths.mean().item(),
                                        length_right=mean(lengths[right]), length_wrong=mean(lengths[~right])))
    return model


@torch.no_grad()
def verdicts_by_place(model, config, seed, places=56, n=16):
    """Balanced accuracy of the verdict on the 1st, 2nd, ... attempt (places,), of long traces that the model is made to read: misses, then a hit.

    The base model stops early; this asks whether it could go on, and so whether positions are what fails in long answers.
    """
    rng, rows, hit_at = random.Random(f"places {seed}"), [], []
    for place in list(range(places + 1)) * n:           # the last trace has no hit
        problem = xs, target = draw_problem(rng, config.numbers, held_out=True)
        pairs = [(a, b) for a in xs for b in xs if a != b]
        good, bad = ([p for p in pairs if hits(problem, *p) == h] for h in (True, False))
        trace = [t for a, b in rng.choices(bad, k=place) for t in (a, second(b), sum_token(a + b), NO)]
        if place < places:
            a, b = rng.choice(good)
            trace += [a, second(b), sum_token(a + b), OK]
        rows.append(prompt(problem) + trace + [0] * (4 * places - len(trace)))
        hit_at.append(place)
    ids, hit_at = torch.tensor(rows, device=model.lm_head.weight.device), torch.tensor(hit_at)
    right = torch.cat([model(part[:, :-1]).argmax(-1) == part[:, 1:] for part in ids.split(64)])[:, -1 - 4 * (places - 1)::4].float().cpu()
    return [((right[hit_at > i, i].mean() + right[hit_at == i, i].mean()) / 2).item() for i in range(places)]


# ---------------------------------------------------------------------------------------------------------------------------
# Figures and claims

BUDGETS = (16, 32, 64, 128, 256)


def of(run, arm, key, last=True):
    """The last (first) value of a metric, of each seed (seeds,): arms that count tokens end at different steps."""
    rows = [r for r in run.rows if r["phase"] == "rl" and r["arm"] == arm and r.get(key) is not None]
    return np.array([[r[key] for r in rows if r["seed"] == seed][-1 if last else 0] for seed in sorted({r["seed"] for r in rows})])


def tested(run, arm, last=True, budgets=BUDGETS):
    """Success at each of the budgets (seeds, budgets)."""
    return np.stack([of(run, arm, f"pass@1 of {b}", last) for b in budgets], 1)


def told(difference, digits=2):
    """A paired difference of each seed (seeds,): its mean and standard deviation."""
    return f"{difference.mean():+.{digits}f}" + (f" ± {difference.std(ddof=1):.{digits}f}" if len(difference) > 1 else "")


def draw_budgets(ax, curves, title, budgets=BUDGETS):
    for label, y in curves.items():
        band(ax, np.array(budgets), y, label, marker="o")
    ax.set(title=title, xlabel="test budget (tokens)", ylabel="held-out pass@1", xscale="log", ylim=(0, 1))
    ax.set_xticks(budgets, budgets)
    ax.minorticks_off()
    ax.legend()


def pk_panels(axes, quick):
    """The negative gradient in a table of logits: three panels -> what they show, their claims."""
    steps, arms, levels = 20 if quick else 800, ("full", "masked"), np.linspace(0.05, 0.95, 19)
    paths = {arm: np.array([pk_train(arm == "masked", seed, steps=steps) for seed in range(5)]) for arm in arms}        # (5, steps, 3)
    ratio = np.array([steps_to(m) / steps_to(f) for f, m in zip(paths["full"], paths["masked"])])
    longer = {arm: y[:, :, 1].max(1) / y[:, 0, 1] for arm, y in paths.items()}
    risen = {arm: y[:, :, 2].max(1) - y[:, 0, 2] for arm, y in paths.items()}
    for arm, y in paths.items():
        band(axes[0], np.arange(steps), y[:, :, 1], f"{arm} (5 seeds)")
    axes[0].set(title=f"p^k model: x{longer['full'].mean():.1f} draws at the peak; masked takes {np.median(ratio):.1f} times as long",
                xlabel="step", ylabel="draws per episode", ylim=(0, None))
    regimes = {"1 update": (1, 200, 10.0), "16 updates, clipped": (16, 80, 3.0), "16 updates, no clip": (16, 40, 3.0, math.inf)}
    apart = {}
    for ax, (regime, (updates, batches, *how)) in zip((*axes[1:], axes[2]), regimes.items()):
        runs = {arm: [pk_reuse(arm == "masked", seed, updates, 2 if quick else batches, *how) for seed in range(8)] for arm in arms}
        curves = {arm: np.array([[at_success(run[:, 0], run[:, i], levels) for i in (1, 2, 3)] for run in runs[arm]]) for arm in arms}      # (8, 3, levels)
        apart[regime] = (curves["full"] - curves["masked"])[:, :, -2].T         # entropy, draws, different right answers at .9 success (3, 8)
        for arm, color in zip(arms, ("C0", "C1")):
            band(ax, levels, curves[arm][:, 0], arm if "no" not in regime else f"{arm}, no clip", color=color, ls=":" if "no" in regime else "-")
    one, clipped, free = apart.values()
    axes[1].set(title=f"One update a batch, at .9: full - masked = {told(one[0])} nats")
    axes[2].set(title=f"16 under PPO's clip: {told(clipped[0])}; without it: {told(free[0])}")
    for ax in axes[1:]:
        ax.set(xlabel="success (exact, 8 seeds)", ylabel="entropy of a draw (nats, exact)", xlim=(0, 1), ylim=(0, None))
    within = lambda id, text, y: claim(id, text, "derived", "0", abs(y.mean()), "<=", 0.1, 8, f" ({told(y)})")
    return f"{told(one[0])} nats at one update a batch, {told(clipped[0])} at 16 clipped ones", [
        claim("pk", "p^k: steps to 50%, masked over full (median of 5)", SOURCE, "masked is flat", np.median(ratio), ">=", 1.5, 5),
        claim("pk length", "p^k, full: length at its peak over the start", SOURCE, "3", longer["full"], ">=", 2.5, 5),
        claim("pk entropy", "p^k, full: rise of the entropy above its start (nats)", SOURCE, "rises", risen["full"], ">=", 0.05, 5),
        claim("pk entropy masked", "p^k: that rise, full minus masked", SOURCE, "masked is flat", risen["full"] - risen["masked"], ">", 0, 5),
        within("pk one update", "entropy at equal success, full minus masked: 1 update", one[0]),
        claim("pk clip", "the same: 16 updates a batch, clipped (nats)", SOURCE, "0.095", clipped[0], ">=", 0.5, 8),
        within("pk no clip", "the same: 16 updates a batch without the clip", free[0]),
        claim("pk clip answers", "16 clipped updates: different right answers, the same", SOURCE, "more", clipped[2], ">=", 0.5, 8),
        claim("pk clip draws", "16 clipped updates: draws per episode, the same", SOURCE, "more", clipped[1], ">", 0, 8)]


def figure_explore(config, run, device):
    n, budget = config.seeds, config.budget
    arms = {"full": ("gap", budget), "no gap": ("no gap", budget), "budget 16": ("gap", 16)}
    for seed in seeds_of(config):
        bases = {kind: warm_up(config, run, seed, device, kind) for kind in BASES}
        run.log_once(lambda: {"right": verdicts_by_place(bases["gap"], config, seed)}, phase="places", seed=seed, step=0)
        for arm, (kind, tokens) in arms.items():
            train(config, run, arm, seed, bases[kind], [(config.numbers, tokens, None)], BUDGETS)

    fig, axes = plt.subplots(2, 3, figsize=(18, 9), layout="constrained")
    negatives, pk = pk_panels(axes[0], config.quick)
    with np.errstate(divide="ignore"):      # a base without a single attempt
        grown = {arm: of(run, arm, "attempts") / of(run, arm, "attempts", False) for arm in ("full", "no gap")}
    rise = {arm: of(run, arm, f"pass@1 of {budget}") - of(run, arm, f"pass@1 of {budget}", False) for arm in ("full", "no gap")}
    for arm in ("full", "no gap"):
        band(axes[1, 0], *series(run, "attempts", phase="rl", arm=arm), "gap" if arm == "full" else arm)
    axes[1, 0].set(title=f"A base that checks its guesses: attempts x{grown['full'].mean():.1f}; one that cannot: x{grown['no gap'].mean():.1f}",
                   xlabel="RL step", ylabel=f"attempts per answer (of {BUDGETS[-1]} tokens)", ylim=(0, None))
    right = np.array([r["right"] for r in run.rows if r["phase"] == "places"])
    near, far = right[:, :16].mean(1), right[:, 16:].mean(1)
    band(axes[1, 1], np.arange(1, right.shape[1] + 1), right, "the base, made to read on")
    axes[1, 1].axvline(16, color="k", ls=":", lw=1, label="longest demonstration")
    axes[1, 1].set(title=f"Verdicts of attempts 1 to 16: {near.mean():.2f} right, beyond: {far.mean():.2f}", xlabel="attempt",
                   ylabel="balanced accuracy of the verdict", ylim=(0, 1.02))
    base, short = tested(run, "full", False).T, tested(run, "budget 16").T
    draw_budgets(axes[1, 2], {"base": base.T, "trained at 16": short.T, f"trained at {budget}": tested(run, "full"), f"no gap, trained at {budget}": tested(run, "no gap")},
                 f"From 16 to 64 tokens: {short[0].mean():.2f} to {short[2].mean():.2f} trained at 16; base {base[0].mean():.2f} to {base[2].mean():.2f}")
    for ax in axes.flat[:5]:
        ax.legend()
    fig.suptitle(f"Above, tables of logits: negatives change the entropy by {negatives}. "
                 f"Below, GPTs: attempts x{grown['full'].mean():.1f} with verdicts to trust, x{grown['no gap'].mean():.1f} without ({n} seed{'s' * (n > 1)})")
    return fig, [
        *pk,
        claim("no gap", "verdict gap of the base without one, largest", SOURCE, "no gap", of(run, "no gap", "gap", False).max(), "<=", 0.5, n),
        claim("positions", "verdicts: mean of attempts 17 to 56 minus that of 1 to 16", "design of the task", "-", far - near, ">=", -0.05, n),
        claim("attempts", "attempts (of 256 tokens), after over before, gap", SOURCE, "grow", grown["full"], ">=", 2.5, n),
        claim("attempts no gap", "the same without a gap", SOURCE, "flat", grown["no gap"], "<=", 1.15, n),
        claim("rise", "rise of pass@1 at the training budget, gap", SOURCE, "0.2 to 0.5", rise["full"], ">=", 0.30, n),
        claim("rise no gap", "the same without a gap", SOURCE, "about 0", rise["no gap"], "<=", 0.04, n),
        claim("extrapolation", "pass@1 at 64 minus at 16 tokens: trained at 16 minus base", SOURCE, "+0.11", short[2] - short[0] - (base[2] - base[0]), ">=", 0.1, n,
              f" ({(short[2] - short[0]).mean():.2f}, {(base[2] - base[0]).mean():.2f})")]


def figure_curriculum(config, run, device):
    tokens, easy, hard, first, n = config.stage_tokens, 4, 8, BUDGETS[0], config.seeds
    grid, tests = BUDGETS[:-1], (*BUDGETS, LONGEST)             # what the rule can pick, and up to 4 times that
    rivals, J, chosen = ["hard only", "data only", "budget only"], [], []

    def judge(model, seed):
        """J(B) on hard problems: pass@1, or, where a budget sees next to none, pass@16."""
        for k in (1, 16):
            problems = config.eval_prompts // (4 if k > 1 else 1)
            J = evaluate(model, config, hard, BUDGETS, f"rule {seed}", problems, held_out=False, k=k)[0]
            if min(J.values()) >= 0.01:
                break
        return {"k": k} | {f"J of {b}": x for b, x in J.items()}

    for seed in seeds_of(config):
        base = warm_up(config, run, seed, device)
        stage1 = train(config, run, "stage 1", seed, base, [(easy, first, tokens)], tests)
        run.log_once(lambda: judge(stage1, seed), phase="rule", seed=seed, step=0)
        rule = next(r for r in run.rows if r["phase"] == "rule" and r["seed"] == seed)
        J.append({b: rule[f"J of {b}"] for b in BUDGETS})
        chosen.append(budget_rule(J[-1], config.kappa))
        print(f"\nseed {seed}: J(B) of stage 1 on hard problems (pass@{rule['k']}): " + ", ".join(f"{b}: {x:.3f}" for b, x in J[-1].items()) + f" -> B* = {chosen[-1]}")
        for b in grid:
            train(config, run, f"stage 2 at {b}", seed, base, [(easy, first, tokens), (hard, b, tokens)], tests, after="stage 1")
        b = chosen[-1]
        for arm, stages in zip(rivals, ([(hard, b, 2 * tokens)], [(easy, b, tokens), (hard, b, tokens)], [(hard, first, tokens), (hard, b, tokens)])):
            train(config, run, arm, seed, base, stages, tests)
    at = lambda arm, last=True: tested(run, arm, last, tests)
    trained = np.stack([at(f"stage 2 at {b}") for b in grid], 1)                                                # (seeds, trained at, tested at)
    coupled = np.stack([trained[i, grid.index(b)] for i, b in enumerate(chosen)])
    of_rule = lambda y, factor: np.array([row[tests.index(b * factor)] for row, b in zip(y, chosen)])          # at a multiple of each seed's B* (seeds,)
    ahead = {arm: np.stack([of_rule(coupled, f) - of_rule(at(arm), f) for f in (1, 2, 4)], 1) for arm in rivals}        # paired (seeds, 3)
    lost = trained[:, :, -1].max(1) - coupled[:, -1]
    fig, axes = plt.subplots(1, 3, figsize=(18, 5), layout="constrained")
    draw_budgets(axes[0], {"coupled": coupled} | {arm: at(arm) for arm in rivals} | {"base": at("hard only", False)},
                 f"Hard problems, {2 * tokens // 1000}k sampled tokens each; B* = {', '.join(map(str, chosen))}", tests)
    for arm, y in ahead.items():
        band(axes[1], np.array([1, 2, 4]), y, f"coupled minus {arm}", marker="o")
    axes[1].axhline(0, color="k", lw=1)
    axes[1].set(title="Coupled minus each rival at 4x: " + ", ".join(told(y[:, 2]) for y in ahead.values()), xlabel="test budget over B*",
                ylabel="difference of pass@1, seed by seed", xscale="log")
    axes[1].set_xticks((1, 2, 4), (1, 2, 4))
    axes[1].minorticks_off()
    axes[1].legend()
    draw_budgets(axes[2], {"after stage 1": np.pad(np.array([list(x.values()) for x in J]), ((0, 0), (0, 1)), constant_values=np.nan)}
                 | {f"stage 2 at {b}": trained[:, i] for i, b in enumerate(grid)}, f"B* against the best of {len(grid)} budgets, at {LONGEST} tokens: {told(-lost)}", tests)
    for b in set(chosen):
        axes[2].axvline(b, color="k", ls=":", lw=1)
    fig.suptitle("Easy problems and short answers, then hard ones and longer answers: " + ", ".join(f"{told(y[:, 2])} against {arm}" for arm, y in ahead.items())
                 + f" ({n} seed{'s' * (n > 1)})")
    print("\ntrained at (B* = " + ", ".join(map(str, chosen)) + "), tested at " + " ".join(f"{b:>7}" for b in tests))
    for b, row in zip(grid, trained.mean(0)):
        print(f"{b:>40} " + " ".join(f"{x:7.3f}" for x in row))
    return fig, [
        *[claim(f"over {arm}", f"coupled minus {arm}, at 4x", SOURCE, paper, ahead[arm][:, 2], ">=", 0.03, n)
          for arm, paper in zip(rivals, ("+0.09", "more", "+0.07"))],
        claim("rule", f"pass@1 at {LONGEST} tokens: best training budget minus B*'s", SOURCE, "at the plateau", lost, "<=", 0.03, n)]


def figure_budget(config, run, device):
    arms = {b: f"budget {b}" for b in BUDGETS[:-1]}
    for seed in seeds_of(config):
        base = warm_up(config, run, seed, device)
        for b, arm in arms.items():
            train(config, run, arm, seed, base, [(config.numbers, b, None)], BUDGETS)
    matrix = {b: tested(run, arm).T for b, arm in arms.items()}          # (budgets, seeds)
    fig, ax = plt.subplots(figsize=(8, 5), layout="constrained")
    draw_budgets(ax, {"base": tested(run, arms[16], False)} | {f"trained at {b}": tested(run, arm) for b, arm in arms.items()},
                 f"At {LONGEST} tokens: {matrix[16][-1].mean():.2f} if trained at 16, {matrix[128][-1].mean():.2f} if trained at 128 ({config.steps} steps, {config.seeds} seeds)")
    print("\ntrained at, tested at " + " ".join(f"{b:>7}" for b in BUDGETS))
    for b, row in matrix.items():
        print(f"{b:>21} " + " ".join(f"{x:7.3f}" for x in row.mean(1)))
    return fig, [
        claim("short", "tested at 64 tokens: trained at 64 minus trained at 16", SOURCE, "positive", matrix[64][2] - matrix[16][2], ">=", 0.03, config.seeds),
        claim("flat", "trained at 16: pass@1 at 256 tokens minus at 64", SOURCE, "flat (4k)", matrix[16][4] - matrix[16][2], "<=", 0.05, config.seeds),
        claim("gain", "trained at 64: pass@1 at 256 tokens minus at 64", SOURCE, "+0.13", matrix[64][4] - matrix[64][2], ">=", 0.03, config.seeds),
        claim("long", "tested at 16 tokens: trained at 16 minus trained at 128", SOURCE, "short is best", matrix[16][0] - matrix[128][0], ">=", 0.03, config.seeds)]


def equal_success(run, full, masked, key, success):
    """Full minus masked of a metric, at the successes that both pass through: the mean over these, of each seed (seeds,)."""
    differences = []
    for pair in zip(*(zip(series(run, success, phase="rl", arm=arm)[1], series(run, key, phase="rl", arm=arm)[1]) for arm in (full, masked))):
        levels = np.linspace(max(s[0] for s, _ in pair), min(s.max() for s, _ in pair), 21)
        a, b = (at_success(s, y, levels) for s, y in pair)
        differences.append((a - b).mean() if levels[0] < levels[-1] else math.nan)
    return np.array(differences)


def figure_mask(config, run, device):
    arms, budget, n = ("full", "masked"), config.budget, config.seeds
    designs = {"1 update": 1, "16 updates": 16}
    for seed in seeds_of(config):
        base = warm_up(config, run, seed, device)
        for design, updates in designs.items():
            for arm in arms:
                train(config, run, f"{design}, {arm}", seed, base, [(config.numbers, budget, None)], (budget, 2 * budget), masked=arm == "masked", updates=updates, single=True)
    success, twice = f"pass@1 of {budget}", f"pass@1 of {2 * budget}"
    names = {design: [f"{design}, {arm}" for arm in arms] for design in designs}
    nats, tries = ({design: equal_success(run, *names[design], key, success) for design in designs} for key in ("nats", "unique_attempts"))
    at_end = {key: {design: of(run, names[design][0], key) - of(run, names[design][1], key) for design in designs} for key in ("nats", twice, "gap")}
    fig, axes = plt.subplots(2, 2, figsize=(14, 9), layout="constrained")
    axes = axes.flatten()
    axes[1].sharey(axes[0])
    for design, color in zip(designs, ("C0", "C1")):
        for arm, style in zip(names[design], ("-", "--")):
            for i, (s, y) in enumerate(zip(series(run, success, phase="rl", arm=arm)[1], series(run, "nats", phase="rl", arm=arm)[1])):
                levels = np.linspace(s[0], s.max(), 50)
                axes[0].plot(levels, at_success(s, y, levels), style, color=color, label=arm if i == 0 else None)
            for ax, key in zip(axes[1:], at_end):
                band(ax, *series(run, key, phase="rl", arm=arm), arm, color=color, ls=style)
    both = lambda y, digits=2: "; ".join(f"{design} {told(x, digits)}" for design, x in y.items())
    axes[0].set(title=f"At equal success: {both(nats, 3)}", ylabel="entropy (nats per token)", xlabel=f"held-out pass@1 at {budget} tokens (a line is a seed)")
    for ax, (key, y), label in zip(axes[1:], at_end.items(), ("entropy (nats per token)", f"held-out pass@1 at {2 * budget} tokens", "verdict gap")):
        ax.set(title=f"At the end: {both(y)}", ylabel=label, xlabel="batches", ylim=(0, 1) if key != "nats" else None)
    for ax in axes:
        ax.legend()
    fig.suptitle(f"Full minus masked: with and without negative advantages, at one update a batch and at 16 ({config.steps} batches, {n} seed{'s' * (n > 1)})")
    many, one = "16 updates", nats["1 update"]
    return fig, [
        claim("one entropy", "1 update a batch: size of the entropy's difference at equal success", "derived", "0", abs(one.mean()), "<=", 0.05, n, f" ({told(one, 3)})"),
        claim("reuse entropy", "16 updates: entropy at equal success, full minus masked", SOURCE, "0.095", nats[many], ">=", 0.05, n),
        claim("reuse entropy end", "16 updates: entropy at the end, the same", SOURCE, "0.095", at_end["nats"][many], ">=", 0.05, n),
        claim("reuse attempts", "16 updates: different attempts at equal success, the same", SOURCE, "more", tries[many], ">=", 0.5, n),
        *[claim(f"accuracy {design}", f"{design}: pass@1 at twice the budget, full minus masked", SOURCE, "+0.23", at_end[twice][design], ">=", 0.03, n) for design in designs]]


def main():
    config = parse_args(Config, __doc__)
    config.seeds = config.seeds or (1 if config.figure == "explore" or config.quick else 3)
    config.steps = config.steps or (40 if config.figure == "mask" else 80)
    config.eval_every = config.eval_every or (4 if config.figure == "mask" else 20)
    device = pick_device(config.device)
    weights = 2 * VOCAB * config.n_embd + 16 * config.n_layer * config.n_embd ** 2
    rows = max(config.prompts * config.group, config.eval_prompts)
    need_memory(4 * 4 * weights, f"{weights:,} parameters, their gradients and moments", device)
    need_memory(4 * 2 * rows * LONGEST * config.n_layer * config.n_embd, f"the keys and values of {rows:,} answers", device)
    batch = config.prompts * config.group * BUDGETS[-2]
    if config.figure == "curriculum" and config.stage_tokens < batch:
        raise UserError(f"--stage-tokens {config.stage_tokens}: too few for a batch, which may sample {batch}")
    size = sum(p.numel() for p in build(config, device).parameters())        # an impossible shape ends here, before anything is written
    with Run(config) as run:
        run.introduce(device, size)
        fig, claims = globals()[f"figure_{config.figure}"](config, run, device)
        run.finish(fig, claims)


if __name__ == "__main__":
    command(main)
