"""curriculum.py: e3, learning to explore (Setlur et al., arXiv 2506.09026). Answers that try, check and try again, and what makes them grow.

    python curriculum.py                        `explore`: the asymmetry and the negative gradient, within 5 minutes on two cores
    python curriculum.py --figure curriculum    easy problems at a short budget, then hard ones at a longer one, against three rivals
    python curriculum.py --figure budget        four training budgets, each tested at all budgets
    python curriculum.py --figure mask          what negative advantages are worth, in five designs

A problem is a few numbers and the sum of two of them. An answer tries pairs, one attempt of four tokens after the other, then names one:

    BOS 3 11 8 2 6 12 ?14           3 6 =9 NO   11 2 =13 NO   8 6 =14 OK   ANS 8 6 EOS          reward 1: 8 + 6 = 14

RL (GRPO, reward at the end only) can raise the success of an attempt, or the number of attempts. Three ingredients for the second:
1. asymmetry: the base model judges an attempt better than it makes one (`verdict_gap`). Its rival has the same format, but empty verdicts.
2. negative gradient: a wrong answer that stopped makes stopping less likely. Masked, max(A, 0), only right answers teach.
3. coupled curriculum: easy problems at a short budget, then hard ones at B* = min {B >= B0: J(2B) <= kappa J(B)} (`budget_rule`).

The p^k model is the smallest case: a table of logits over 30 guesses and `stop`, an episode that ends at the right guess. Raising p or k?

How this differs from the paper:
1. A model of 0.1 million parameters from scratch, sums for equations, budgets of 16 to 256 tokens for 1k to 32k.
2. One gradient step per batch (rho = 1, no clipping; two designs of `mask` take four, each on a quarter of the answers), no KL term, temperature 1.
3. Positions: only four of eight pairs of channels turn (partial rotary, periods of 6 to 35 tokens, all seen in training), the
   others look for content alone. A longer trace then shows the model little that is new, and `verdicts_by_place` measures how little.

What to see: attempts per answer grow several times with the asymmetry, and fall without; accuracy goes on rising past the training budget.
Negative advantages speed up the p^k model, by as much as a step twice as long. In the GPT they do not help in any design of `mask`.
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
from tqdm import tqdm

from kernels import token_logprobs
from model import GPT, GPTConfig, generate
from run import Run, UserError, band, claim, command, flag, parse_args, pick_device, restore, seeds_of, series, snapshot

FIGURES = {"explore": "asymmetry, negative gradient, the p^k model (within 5 minutes)",
           "curriculum": "the coupled curriculum against three rivals at equal tokens, tested to 4 times the budget (about 20 minutes)",
           "budget": "training budgets of 16 to 128 tokens, each tested at all budgets (about 15 minutes)",
           "mask": "GRPO with and without its negative advantages, in five designs (about an hour)"}
#  a base model: what is different about its demonstrations
BASES = {"gap": dict(),
         "no gap": dict(honest=False),              # the same format; sums and verdicts mean nothing
         "careless": dict(wrong=0.1),               # a tenth of the verdicts are wrong
         "impatient": dict(patience=(0.0, 0.4))}    # right answers are mostly first tries
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
    steps: int = flag(None, "RL steps of an arm (default: 80, for mask 200; curriculum counts tokens)", quick=2, low=1)
    numbers: int = flag(6, "numbers in a problem (curriculum has its own)", choices=(3, 4, 6, 8))
    budget: int = flag(64, "tokens that an answer may have in training (budget and curriculum have their own)", choices=(16, 32, 64, 128))
    stage_tokens: int = flag(400_000, "curriculum: sampled tokens of each of its two stages", quick=2_000, low=1)
    kappa: float = flag(1.2, "budget rule: doubling the budget must multiply the success by more than this", low=1)
    prompts: int = flag(32, "problems per step", quick=4, low=1)
    group: int = flag(8, "answers per problem", quick=4, low=2)
    lr: float = flag(4e-4, "RL learning rate (AdamW, constant)", low=0)
    entropy_bonus: float = flag(0.01, "coefficient of the entropy in the arm that has one", low=0)
    gate: float = flag(0.6, "verdict gap that a base needs before RL starts", quick=-1.0)
    n_layer: int = flag(2, "layers", low=1)
    n_head: int = flag(4, "heads", low=1)
    n_embd: int = flag(64, "channels", quick=32, low=8)
    sft_steps: int = flag(1200, "steps of training each base model", quick=10, low=1)
    sft_batch: int = flag(64, "traces per step", quick=8, low=1)
    sft_lr: float = flag(6e-3, "learning rate of the base models (up in 50 steps, then linear to 0)", low=0)
    eval_every: int = flag(20, "RL steps between evaluations", low=1)
    eval_prompts: int = flag(1024, "held-out problems at the first and the last evaluation, a quarter of them on the way", quick=8, low=4)


# ---------------------------------------------------------------------------------------------------------------------------
# The p^k model: a softmax table, actions 0 (right) to K - 1 (wrong) and K (stop)

def pk_start(K=30, stop=1.5, right=-3.0, seed=0):
    """Logits (K + 1, K + 1) float64 of the next action given the last. Row K is the start: like any other."""
    M = torch.as_tensor(np.random.default_rng(seed).uniform(-0.3, 0.3, (K + 1, K + 1)))
    M[:, 0], M[:, K] = right, stop
    return M


def pk_sample(M, budget, n, rng):
    """n episodes -> how often each (last, next) was drawn in right and in wrong ones (2, K + 1, K + 1), right (n,), lengths (n,)."""
    K, cdf = len(M) - 1, M.softmax(-1).cumsum(-1).numpy()
    last, alive, right, lengths, draws = np.full(n, K), np.ones(n, bool), np.zeros(n, bool), np.zeros(n, int), []
    for _ in range(budget):
        rows = np.flatnonzero(alive)
        action = np.minimum((rng.random(len(rows))[:, None] > cdf[last[rows]]).sum(1), K)
        draws.append((rows, last[rows], action))
        lengths[rows] += 1
        last[rows], right[rows], alive[rows] = action, action == 0, (action != 0) & (action != K)
    counts = np.zeros((2, K + 1, K + 1))
    for rows, before, action in draws:
        np.add.at(counts, (right[rows].astype(int), before, action), 1)
    return counts, right, lengths


def pk_gradient(M, counts, adv):
    """sum A grad log pi over the draws, by d log pi(a) / dM_b = 1[a = b] - pi_b. adv: the advantage of wrong and of right episodes."""
    weight = torch.as_tensor(adv[0] * counts[0] + adv[1] * counts[1])
    return weight - weight.sum(1, keepdim=True) * M.softmax(-1)


def pk_train(masked, seed, K=30, budget=60, lr=30.0, n=256, steps=1500):
    """Gradient ascent with rewards of 1 and -1 and no baseline; masked: 1 and 0. -> success, length, entropy at each step (steps, 3).

    As E[grad log pi] = 0 the masked gradient has half the mean of the full one: the direction is the same, the step is half as long.
    """
    M, rng, path = pk_start(K, seed=seed), np.random.default_rng(seed), []
    for _ in range(steps):
        counts, right, lengths = pk_sample(M, budget, n, rng)
        p = M.softmax(-1)
        visits = torch.as_tensor(counts.sum((0, 2)))
        path.append((right.mean(), lengths.mean(), (-(p * p.log()).sum(1) @ visits / visits.sum()).item()))
        M = M + lr * pk_gradient(M, counts, (0.0 if masked else -1.0, 1.0)) / counts.sum()
    return np.array(path)


def steps_to(path, level=0.5, window=10):
    """The first step at which the mean success of the last `window` steps reaches the level; the number of steps if it never does."""
    mean = np.convolve(path[:, 0], np.ones(window) / window, "valid")
    reached = np.flatnonzero(mean >= level)
    return int(reached[0]) + window - 1 if len(reached) else len(path)


# ---------------------------------------------------------------------------------------------------------------------------
# The task: which two numbers have this sum?

HIGHEST = 12                                                # numbers 1 to 12 are tokens 1 to 12
OK, NO, ANS, EOS, BOS = range(36, 41)
VOCAB = 77
LONGEST = 256                                               # tokens of the longest answer


def sum_token(s):
    """=s for 3 to 23: tokens 15 to 35."""
    return HIGHEST + s


def target_token(t):
    """?t for 3 to 23: tokens 44 to 64."""
    return 41 + t


def second(b):
    """A number in second place has a token of its own, 65 to 76: the two can be told apart wherever they stand."""
    return 64 + b


def draw_problem(rng, numbers, held_out=False):
    """Distinct numbers and the sum of two of them -> (numbers, target). A tenth of all problems, by a hash, is never trained on."""
    while True:
        xs = rng.sample(range(1, HIGHEST + 1), numbers)
        target = sum(rng.sample(xs, 2))
        if (zlib.crc32(bytes([*sorted(xs), target])) % 10 == 0) == held_out:
            return xs, target


def prompt(problem):
    xs, target = problem
    return [BOS, *xs, target_token(target)]


def demonstrate(rng, problem, honest=True, wrong=0.0, patience=(0.4, 1.0), attempts=16):
    """A trace of random attempts: after a NO it goes on with a probability drawn from `patience` once a trace. The last pair is the answer.

    Honest verdicts are wrong with probability `wrong`. Others are coins, after a random sum: OK one time in ten, about as often as a pair of six numbers is right.
    """
    xs, target = problem
    trace, go_on = [], rng.uniform(*patience)
    for _ in range(attempts):
        a, b = rng.sample(xs, 2)
        ok = (a + b == target) != (rng.random() < wrong) if honest else rng.random() < 0.1
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
    """{budget: J} -> the smallest budget whose double does not multiply J by more than kappa (Eq. 6.1); the largest if there is none."""
    budgets = sorted(success)
    return next((b for b in budgets if 2 * b in success and success[2 * b] <= kappa * success[b]), budgets[-1])


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


def clip_and_step(optimizer, model):
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
    optimizer.step()
    return norm


def warm_up(config, run, seed, device, kind="gap"):
    """Supervised training on traces, from scratch -> a base model of a row of BASES. A gap between judging and guessing is measured, and is a condition."""
    phase, rng = f"base {kind} {seed}", random.Random(seed)
    torch.manual_seed(seed)
    model = build(config, device)
    optimizer = torch.optim.AdamW(model.parameters(), config.sft_lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    start = restore(run.state.get(phase), model, optimizer, rng)
    bar = tqdm(range(start, config.sft_steps), phase, initial=start, total=config.sft_steps)
    for step in bar:
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
        clip_and_step(optimizer, model)
        if step % 50 == 0 or step + 1 == config.sft_steps:
            run.log(phase="sft", arm=phase, seed=seed, step=step, loss=total)
            bar.set_postfix_str(f"loss {total:.3f}")
        if run.due:
            run.save(phase, **snapshot(step + 1, model, optimizer, rng))
    run.save(phase, **snapshot(config.sft_steps, model, None, rng))
    gap = evaluate(model, config, config.numbers, (64,), "gate")[1]["gap"]
    print(f"{phase}: the balanced accuracy of its verdicts is {gap:.2f} above the success of its attempts")
    if kind != "no gap" and gap < config.gate:
        raise UserError(f"{phase}: a verdict gap of {gap:.2f} is no asymmetry to build on (--gate {config.gate}); give it more --sft-steps")
    return model


def advantages(rewards, masked, raw=False):
    """rewards (P, G), 0 or 1 -> (P, G): minus the group's mean, over its standard deviation; exactly 0 in a group of equals.

    Raw: 1 and -1, no baseline. Masked: then max(A, 0).
    """
    centred = torch.where((rewards == rewards[:, :1]).all(1, keepdim=True), 0.0, rewards - rewards.mean(1, keepdim=True))
    a = 2 * rewards - 1 if raw else centred / (rewards.std(1, keepdim=True) + 1e-6)
    return a.clamp_min(0) if masked else a


def answers_to(model, problems, n, budget, generator):
    """n sampled answers to each problem -> Rollout of R = len(problems) * n rows, their tokens, the problem of each."""
    rollout = generate(model, [prompt(p) for p in problems], n, budget, stop=EOS, generator=generator)
    return rollout, rollout.tokens(), [p for p in problems for _ in range(n)]


def evaluate(model, config, numbers, budgets, seed=0, n=None, held_out=True):
    """One answer to each of n held-out (or training) problems at the largest budget, cut to the smaller ones -> {budget: success}, behaviour at the largest."""
    rng, n = random.Random(f"{numbers} {seed}"), n or config.eval_prompts
    problems = [draw_problem(rng, numbers, held_out) for _ in range(n)]
    _, answers, _ = answers_to(model, problems, 1, max(budgets), torch.Generator().manual_seed(rng.getrandbits(32)))
    success = {b: sum(reward(p, t[:b]) for p, t in zip(problems, answers)) / n for b in budgets}
    return success, behaviour(problems, answers) | {"gap": verdict_gap(problems, answers)}


def update(model, optimizer, rollout, adv, config, generator, updates=1, entropy_bonus=0.0, eps=(0.2, 0.5)):
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
            loss = -((gain + entropy_bonus * entropy) * mask).sum() / count
            loss.backward()
            total["loss"] += loss.item()
            total["entropy"] += ((entropy * mask).sum() / count).item()
        total["grad_norm"] = clip_and_step(optimizer, model)
    return total


def train(config, run, arm, seed, base, stages, budgets, masked=False, raw=False, updates=1, entropy_bonus=0.0):
    """GRPO from the base through stages of (numbers, budget, sampled tokens or None: config.steps steps) -> the trained model.

    Logs the success at each of the budgets, on held-out problems of the last stage's size. masked, raw: see `advantages`; updates: see `update`.
    """
    phase, model, device = f"{arm} {seed}", copy.deepcopy(base), base.lm_head.weight.device
    optimizer = torch.optim.AdamW(model.parameters(), config.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    rng, generator, state = random.Random(seed + 1), torch.Generator().manual_seed(seed + 1), run.state.get(phase)
    step, sampled = restore(state, model, optimizer, rng, generator), state["sampled"] if state else 0

    def log(divisor, **row):
        success, how = evaluate(model, config, stages[-1][0], budgets, f"{seed} {step}", config.eval_prompts // divisor)
        run.log(phase="rl", arm=arm, seed=seed, step=step, sampled_tokens=sampled, **row, **{f"pass@1 of {b}": s for b, s in success.items()}, **how)
        bar.set_postfix_str(f"success at {budgets[-1]} tokens {success[budgets[-1]]:.3f}, attempts {how['attempts']:.1f}")

    limits = np.cumsum([tokens or math.inf for *_, tokens in stages])       # sampled tokens at which each stage ends
    by_steps = math.isinf(limits[-1])
    bar = tqdm(total=config.steps if by_steps else int(limits[-1]), desc=phase, initial=step if by_steps else sampled)
    if state is None:
        log(1)
    done = lambda: step >= config.steps if by_steps else sampled >= limits[-1]
    while not done():
        numbers, budget, _ = stages[int(np.searchsorted(limits, sampled, "right"))]
        problems = [draw_problem(rng, numbers) for _ in range(config.prompts)]
        rollout, answers, repeated = answers_to(model, problems, config.group, budget, generator)
        rewards = torch.tensor([reward(p, t) for p, t in zip(repeated, answers)], device=device)
        adv = advantages(rewards.view(-1, config.group), masked, raw).view(-1, 1)
        metrics = update(model, optimizer, rollout, adv, config, generator, updates, entropy_bonus)
        tokens, step = int(rollout.mask.sum()), step + 1
        sampled += tokens
        bar.update(1 if by_steps else tokens)
        if step % config.eval_every == 0 or done():
            lengths, right = rollout.lengths.float().cpu(), rewards.cpu() > 0
            mean = lambda x: x.mean().item() if len(x) else None
            log(1 if done() else 4, **metrics, reward=rewards.mean().item(), length=lengths.mean().item(),
                length_right=mean(lengths[right]), length_wrong=mean(lengths[~right]))
        if run.due:
            run.save(phase, **snapshot(step, model, optimizer, rng, generator, sampled=sampled))
    run.save(phase, **snapshot(step, model, optimizer, rng, generator, sampled=sampled))        # all of it: --resume --steps goes on
    bar.close()
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


def tested(run, arm, last=True):
    """Success at each of BUDGETS (seeds, budgets)."""
    return np.stack([of(run, arm, f"pass@1 of {b}", last) for b in BUDGETS], 1)


def draw_budgets(ax, curves, title):
    for label, y in curves.items():
        band(ax, np.array(BUDGETS), y, label, marker="o")
    ax.set(title=title, xlabel="test budget (tokens)", ylabel="held-out pass@1", xscale="log", ylim=(0, 1))
    ax.set_xticks(BUDGETS, BUDGETS)
    ax.minorticks_off()
    ax.legend()


def mask_claims(run, full, masked, budget, n, design=""):
    """What negative advantages are worth: three claims on the pair of arms."""
    mean = lambda arm, key: of(run, arm, key).mean()
    prefix, twice = f"{design}: " if design else "", f"pass@1 of {2 * budget}"
    return [
        claim(f"mask entropy {design}".strip(), f"{prefix}entropy, full over masked", SOURCE, "0.11 / 0.015", mean(full, "entropy") / mean(masked, "entropy"), ">=", 1.5, n,
              f" ({mean(full, 'entropy'):.2f}, {mean(masked, 'entropy'):.2f})"),
        claim(f"mask unique {design}".strip(), f"{prefix}different attempts, full over masked", SOURCE, "more", mean(full, "unique_attempts") / mean(masked, "unique_attempts"), ">=",
              1.2, n, f" ({mean(full, 'unique_attempts'):.1f}, {mean(masked, 'unique_attempts'):.1f})"),
        claim(f"mask accuracy {design}".strip(), f"{prefix}pass@1 at twice the budget, full minus masked", SOURCE, "+0.23", mean(full, twice) - mean(masked, twice), ">=", 0.03, n,
              f" ({mean(full, twice):.2f}, {mean(masked, twice):.2f})")]


def figure_explore(config, run, device):
    n, budget = config.seeds, config.budget
    arms = {"full": ("gap", budget, {}), "no gap": ("no gap", budget, {}), "masked": ("gap", budget, dict(masked=True)),
            "masked, entropy bonus": ("gap", budget, dict(masked=True, entropy_bonus=config.entropy_bonus)), "budget 16": ("gap", 16, {})}
    for seed in seeds_of(config):
        bases = {kind: warm_up(config, run, seed, device, kind) for kind in ("gap", "no gap")}
        run.log_once(lambda: {"right": verdicts_by_place(bases["gap"], config, seed)}, phase="places", seed=seed, step=0)
        for arm, (kind, tokens, options) in arms.items():
            train(config, run, arm, seed, bases[kind], [(config.numbers, tokens, None)], BUDGETS, **options)
    steps = 20 if config.quick else 1200
    pk = {arm: np.array([pk_train(arm == "masked", seed, steps=steps) for seed in range(5)]) for arm in ("full", "masked")}     # (5, steps, 3)
    ratio = np.median([steps_to(m) / steps_to(f) for f, m in zip(pk["full"], pk["masked"])])

    fig, axes = plt.subplots(2, 3, figsize=(16, 9), layout="constrained")
    for i, (title, ylabel) in enumerate((("p^k model: rewards 1 and -1 (full), 1 and 0 (masked)", "success"), ("p^k model: first more tries, then better ones", "draws per episode"))):
        for arm, paths in pk.items():
            band(axes[0, i], np.arange(steps), paths[:, :, i], f"{arm} (5 seeds)")
        axes[0, i].set(title=title, xlabel="step", ylabel=ylabel, xlim=(0, min(steps, 400)), ylim=(0, None if i else 1.02))
    right = np.array([r["right"] for r in run.rows if r["phase"] == "places"])
    band(axes[0, 2], np.arange(1, right.shape[1] + 1), right, "the base, made to read on")
    axes[0, 2].axvline(16, color="k", ls=":", lw=1, label="longest demonstration")
    axes[0, 2].set(title="Reading far beyond the demonstrations", xlabel="attempt", ylabel="balanced accuracy of the verdict", ylim=(0, 1.02))
    for arm in ("full", "no gap", "masked", "masked, entropy bonus"):
        band(axes[1, 0], *series(run, "attempts", phase="rl", arm=arm), arm)
        band(axes[1, 1], *series(run, "entropy", phase="rl", arm=arm), arm)
    axes[1, 0].set(title=f"Attempts grow where verdicts can be trusted (of {BUDGETS[-1]} tokens)", xlabel="RL step", ylabel="attempts per answer")
    axes[1, 1].set(title="Entropy", xlabel="RL step", ylabel="nats per token", ylim=(0, None))
    draw_budgets(axes[1, 2], {"base": tested(run, "full", False), "trained at 16": tested(run, "budget 16"), f"trained at {budget}": tested(run, "full"),
                              f"no gap, trained at {budget}": tested(run, "no gap")}, "Success beyond the training budget")
    for ax in axes.flat[:5]:
        ax.legend()
    grown = {arm: (of(run, arm, "attempts") / of(run, arm, "attempts", False)) for arm in ("full", "no gap")}
    rise = {arm: (of(run, arm, f"pass@1 of {budget}") - of(run, arm, f"pass@1 of {budget}", False)) for arm in ("full", "no gap")}
    fig.suptitle(f"A model that can check its guesses learns to make more of them: attempts x{grown['full'].mean():.1f}, without the gap x{grown['no gap'].mean():.1f} "
                 f"({n} seed{'s' if n > 1 else ''})")
    short, entropy = tested(run, "budget 16").T, pk["full"][:, :, 2]
    return fig, [
        claim("pk", "p^k: steps to 50%, masked over full (median of 5)", SOURCE, "masked is flat", ratio, ">=", 1.5, 5),
        claim("pk length", "p^k, full: length at its peak over the start", SOURCE, "3", pk["full"][:, :, 1].max(1) / pk["full"][:, 0, 1], ">=", 2.5, 5),
        claim("pk entropy", "p^k, full: rise of the entropy above its start (nats)", SOURCE, "rises", entropy.max(1) - entropy[:, 0], ">=", 0.05, 5),
        claim("gap", "verdict gap of the base, worst seed (a condition)", SOURCE, "a gap", of(run, "full", "gap", False).min(), ">=", config.gate, n),
        claim("no gap", "the same of the base without a gap, largest", SOURCE, "no gap", of(run, "no gap", "gap", False).max(), "<=", 0.5, n),
        claim("positions", "verdicts: mean of attempts 17 to 56 minus that of 1 to 16", "design of the task", "-", right[:, 16:].mean(1) - right[:, :16].mean(1), ">=", -0.05, n),
        claim("attempts", "attempts (of 256 tokens), after over before, gap", SOURCE, "grow", grown["full"], ">=", 2.5, n),
        claim("attempts no gap", "the same without a gap", SOURCE, "flat", grown["no gap"], "<=", 1.15, n),
        claim("rise", "rise of pass@1 at the training budget, gap", SOURCE, "0.2 to 0.5", rise["full"], ">=", 0.30, n),
        claim("rise no gap", "the same without a gap", SOURCE, "about 0", rise["no gap"], "<=", 0.04, n),
        claim("extrapolation", "trained at 16 tokens: pass@1 at 64 minus at 16", SOURCE, "+0.11", short[2] - short[0], ">=", 0.15, n, f" ({short[0].mean():.2f}, {short[2].mean():.2f})"),
        *mask_claims(run, "full", "masked", budget, n),
        claim("bonus", "entropy, masked with bonus over masked", SOURCE, "0.06 / 0.03", of(run, "masked, entropy bonus", "entropy").mean() / of(run, "masked", "entropy").mean(),
              ">=", 1.5, n)]


def figure_curriculum(config, run, device):
    tokens, easy, hard, first = config.stage_tokens, 4, 8, BUDGETS[0]
    rivals, grid, J, chosen = ["hard only", "data only", "budget only"], [b for b in BUDGETS if 4 * b <= LONGEST], [], []
    for seed in seeds_of(config):
        base = warm_up(config, run, seed, device)
        stage1 = train(config, run, "stage 1", seed, base, [(easy, first, tokens)], BUDGETS)
        run.log_once(lambda: {f"J of {b}": s for b, s in evaluate(stage1, config, hard, BUDGETS, f"rule {seed}", held_out=False)[0].items()}, phase="rule", seed=seed, step=0)
        J.append({b: next(r[f"J of {b}"] for r in run.rows if r["phase"] == "rule" and r["seed"] == seed) for b in BUDGETS})
        chosen.append(min(budget_rule(J[-1], config.kappa), grid[-1]))          # 4 times the budget must be tested
        print(f"\nseed {seed}: J(B) of stage 1 on hard problems: " + ", ".join(f"{b}: {x:.3f}" for b, x in J[-1].items()) + f" -> B* = {chosen[-1]}")
        for b in grid:
            train(config, run, f"stage 2 at {b}", seed, stage1, [(hard, b, tokens)], BUDGETS)
        b = chosen[-1]
        for arm, stages in zip(rivals, ([(hard, b, 2 * tokens)], [(easy, b, tokens), (hard, b, tokens)], [(hard, first, tokens), (hard, b, tokens)])):
            train(config, run, arm, seed, base, stages, BUDGETS)
    n = config.seeds
    of_rule = lambda y, factor: np.array([row[BUDGETS.index(b * factor)] for row, b in zip(y, chosen)])        # at a multiple of each seed's B* (seeds,)
    coupled = np.stack([tested(run, f"stage 2 at {b}")[i] for i, b in enumerate(chosen)])
    curves = {"coupled": coupled} | {arm: tested(run, arm) for arm in rivals} | {"base": tested(run, "hard only", False)}
    fig, axes = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
    draw_budgets(axes[0], curves, f"Hard problems, {2 * tokens // 1000}k sampled tokens each ({n} seeds)")
    trained = np.stack([tested(run, f"stage 2 at {b}") for b in grid], 1)                                       # (seeds, trained at, tested at)
    draw_budgets(axes[1], {"after stage 1: J(B)": np.array([[x[b] for b in BUDGETS] for x in J])} | {f"stage 2 at {b}": trained[:, i] for i, b in enumerate(grid)},
                 "Where the rule looks, and what training at each budget gives")
    for b in set(chosen):
        axes[1].axvline(b, color="k", ls=":", lw=1)
    one, two, four = (of_rule(coupled, factor) for factor in (1, 2, 4))
    rival = max(of_rule(curves[arm], 4).mean() for arm in rivals)
    fig.suptitle(f"Easy and short, then hard and long: {one.mean():.2f} at the training budget, {two.mean():.2f} at twice, {four.mean():.2f} at 4 times; the best rival {rival:.2f}")
    lost = trained[:, :, -1].max(1) - np.array([trained[i, grid.index(b), -1] for i, b in enumerate(chosen)])
    print("\ntrained at (B* = " + ", ".join(map(str, chosen)) + "), tested at " + " ".join(f"{b:>7}" for b in BUDGETS))
    for b, row in zip(grid, trained.mean(0)):
        print(f"{b:>40} " + " ".join(f"{x:7.3f}" for x in row))
    return fig, [
        claim("twice", "coupled: pass@1 at 2x the training budget minus at 1x", SOURCE, "grows", two - one, ">=", 0.05, n, f" ({one.mean():.2f}, {two.mean():.2f})"),
        *[claim(f"over {arm}", f"coupled minus {arm}, at 4x", SOURCE, paper, four - of_rule(curves[arm], 4), ">=", 0.03, n)
          for arm, paper in zip(rivals, ("+0.09", "more", "+0.07"))],
        claim("rule", f"pass@1 at {LONGEST} tokens: best training budget minus B*'s (64 at most)", SOURCE, "at the plateau", lost, "<=", 0.03, n)]


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
        claim("long", "tested at 16 tokens: trained at 16 minus trained at 128", SOURCE, "short is best", matrix[16][0] - matrix[128][0], ">=", 0, config.seeds)]


#  design of `mask`:    base, choices of train
DESIGNS = {"four updates": ("gap", dict(updates=4)),
           "no baseline": ("gap", dict(raw=True)),
           "careless verifier": ("careless", {}),
           "impatient base": ("impatient", {}),
           "impatient, four updates": ("impatient", dict(updates=4))}


def figure_mask(config, run, device):
    arms, budget, n = ("full", "masked"), config.budget, config.seeds
    for seed in seeds_of(config):
        bases = {kind: warm_up(config, run, seed, device, kind) for kind in dict.fromkeys(kind for kind, _ in DESIGNS.values())}
        for design, (kind, choices) in DESIGNS.items():
            for arm in arms:
                train(config, run, f"{design}, {arm}", seed, bases[kind], [(config.numbers, budget, None)], BUDGETS, masked=arm == "masked", **choices)
    keys = ("entropy", "unique_attempts", "gives_up", f"pass@1 of {2 * budget}")
    fig, axes = plt.subplots(len(keys), len(DESIGNS), figsize=(18, 10), layout="constrained", sharex=True, sharey="row")
    print(f"\n{'':<32}" + " ".join(f"{key:>16}" for key in ("attempts", *keys)))
    for column, design in zip(axes.T, DESIGNS):
        for arm in arms:
            print(f"{design + ', ' + arm:<32}" + " ".join(f"{of(run, f'{design}, {arm}', key).mean():16.3f}" for key in ("attempts", *keys)))
            for ax, key in zip(column, keys):
                band(ax, *series(run, key, phase="rl", arm=f"{design}, {arm}"), arm)
        column[0].set_title(design)
        column[-1].set_xlabel("RL step")
    for ax, label in zip(axes[:, 0], ("entropy (nats per token)", "different attempts", "P(stop | last verdict NO)", f"pass@1 at {2 * budget} tokens")):
        ax.set_ylabel(label)
        ax.set_ylim(0, None)
    axes[0, 0].legend()
    claims = [c for design in DESIGNS for c in mask_claims(run, f"{design}, full", f"{design}, masked", budget, n, design)]
    fig.suptitle(f"With and without negative advantages: {sum(c['holds'] for c in claims)} of {len(claims)} predicted effects seen ({config.steps} steps, {n} seeds)")
    return fig, claims


def main():
    config = parse_args(Config, __doc__)
    config.seeds = config.seeds or (1 if config.figure == "explore" or config.quick else 3)
    config.steps = config.steps or (200 if config.figure == "mask" else 80)
    device = pick_device(config.device)
    size = sum(p.numel() for p in build(config, device).parameters())        # an impossible shape ends here, before anything is written
    run = Run(config)
    run.introduce(device, size)
    fig, claims = globals()[f"figure_{config.figure}"](config, run, device)
    run.finish(fig, claims)


if __name__ == "__main__":
    command(main)
