"""curriculum.py: e3, learning to explore (Setlur et al., arXiv 2506.09026). Answers that try, check and try again, and what makes them grow.

    python curriculum.py                        `explore`: the asymmetry and the negative gradient, within 5 minutes on two cores
    python curriculum.py --figure curriculum    easy problems at a short budget, then hard ones at a longer one, against three rivals
    python curriculum.py --figure budget        one training budget each, tested at all

A problem is a few numbers and the sum of two of them. An answer tries pairs, one attempt of four tokens after the other, then names one:

    BOS 3 11 8 2 6 12 ?14           3 6 =9 NO   11 2 =13 NO   8 6 =14 OK   ANS 8 6 EOS          reward 1: 8 + 6 = 14

RL (GRPO, reward at the end only) can raise the success of an attempt, or the number of attempts. Three ingredients for the second:
1. asymmetry: the base model judges an attempt better than it makes one (`verdict_gap`). Its rival has the same format, but empty verdicts.
2. negative gradient: a wrong answer that stopped makes stopping less likely. Masked, max(A, 0), only right answers teach.
3. coupled curriculum: easy problems at a short budget, then hard ones at B* = min {B >= B0: J(2B) <= kappa J(B)} (`budget_rule`).

The p^k model is the smallest case: a table of logits over 30 guesses and `stop`, an episode that ends at the right guess. Raising p or k?

How this differs from the paper:
1. A model of 0.2 million parameters from scratch, sums for equations, budgets of 16 to 256 tokens for 1k to 32k.
2. One gradient step per batch, no KL term, temperature 1: rho = 1, no clipping.
3. Positions: with theta = 1e24 one pair of channels turns, by a radian a token, and the others do not (NoPE); the two numbers of an
   attempt have tokens of their own. A longer trace then shows the model nothing new, and `verdicts_by_place` measures it: the base,
   trained on 10 attempts, judges 20 and more. With theta = 10,000 or 10 its verdicts on hits fall to chance after 8.

What to see: attempts per answer grow several times with the asymmetry, not at all without; accuracy goes on rising past the training budget.
"""
import copy
import itertools
import math
import random
import time
from dataclasses import dataclass, replace

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from tqdm import tqdm

from kernels import token_logprobs
from model import (GPT, GPTConfig, Run, band, claim, command, flag, generate, parse_args, pick_device, restore, seeds_of, series, snapshot)

FIGURES = {"explore": "asymmetry, negative gradient, the p^k model (within 5 minutes)",
           "curriculum": "the coupled curriculum against three rivals at equal tokens, tested to 4 times the budget (about 15 minutes)",
           "budget": "training budgets of 16 to 128 tokens, each tested at all budgets (about 10 minutes)"}
SOURCE = "Setlur et al., arXiv 2506.09026"


@dataclass
class Config:
    seed: int = flag(0, "random seed; with --seeds K: the first of K")
    seeds: int = flag(None, "repeat over this many seeds (default: 1 for explore, 3 for the others)", low=1)
    device: str = flag("auto", "where to run", choices=("auto", "cpu", "cuda", "mps"))
    dtype: str = flag("float32", "bfloat16: autocast training", choices=("float32", "bfloat16"))
    out: str = flag("out/curriculum", "folder for figure, metrics, claims and checkpoint")
    resume: bool = flag(False, "go on from the checkpoint in --out")
    quick: bool = flag(False, "a run of a few seconds that shows nothing but that it runs")
    figure: str = flag("explore", "which figure: " + "; ".join(f"{k}: {v}" for k, v in FIGURES.items()), choices=tuple(FIGURES))
    steps: int = flag(60, "RL steps of an arm; `curriculum` counts tokens instead", quick=2, low=1)
    numbers: int = flag(6, "numbers in a problem", low=3, high=8)
    budget: int = flag(64, "tokens that an answer may have in training", low=8, high=256)
    kappa: float = flag(1.2, "budget rule: doubling the budget must multiply the success by more than this", low=1)
    prompts: int = flag(32, "problems per step", quick=4, low=1)
    group: int = flag(8, "answers per problem", quick=4, low=2)
    lr: float = flag(1e-3, "RL learning rate (AdamW, constant)", low=0)
    entropy_bonus: float = flag(0.01, "coefficient of the entropy in the arm that has one", low=0)
    n_layer: int = flag(2, "layers", low=1)
    n_head: int = flag(4, "heads", low=1)
    n_embd: int = flag(64, "channels", quick=32, low=8)
    sft_steps: int = flag(1200, "steps of training each base model", quick=10, low=1)
    sft_batch: int = flag(64, "traces per step", quick=8, low=1)
    sft_lr: float = flag(6e-3, "learning rate of the base models (up in 50 steps, then linear to 0)", low=0)
    eval_every: int = flag(10, "RL steps between evaluations", low=1)
    eval_prompts: int = flag(256, "held-out problems", quick=8, low=1)


# ---------------------------------------------------------------------------------------------------------------------------
# The p^k model: a softmax table, actions 0 (right) to K - 1 (wrong) and K (stop)

def pk_start(K=30, stop=1.5, right=-3.0, seed=0):
    """Logits (K + 1, K + 1) float64 of the next action given the last. Row K is the start: like any other."""
    M = torch.as_tensor(np.random.default_rng(seed).uniform(-0.3, 0.3, (K + 1, K + 1)))
    M[:, 0], M[:, K] = right, stop
    return M


def pk_value(M, budget):
    """The exact probability that action 0 is drawn before stop and within the budget, by dynamic programming. Differentiable in M."""
    p, value = M.softmax(-1), torch.zeros(len(M) - 2, dtype=M.dtype)          # value of each wrong action as the last one
    for _ in range(budget - 1):
        value = p[1:-1, 0] + p[1:-1, 1:-1] @ value
    return p[-1, 0] + p[-1, 1:-1] @ value


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
    """Gradient ascent with rewards of 1 and -1 and no baseline; masked: 1 and 0. -> success, length, entropy at each step (steps, 3)."""
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
VOCAB, LONGEST = 77, 256                                    # tokens of the longest answer


def sum_token(s):
    """=s for 3 to 23: tokens 15 to 35."""
    return HIGHEST + s


def target_token(t):
    """?t for 3 to 23: tokens 44 to 64."""
    return 41 + t


def second(b):
    """A number in second place has a token of its own, 65 to 76: a model without positions can tell the two apart."""
    return 64 + b


def draw_problem(rng, numbers):
    """Distinct numbers and the sum of two of them -> (numbers, target)."""
    xs = rng.sample(range(1, HIGHEST + 1), numbers)
    return xs, xs[0] + xs[1] if numbers == 2 else sum(rng.sample(xs, 2))


def prompt(problem):
    xs, target = problem
    return [BOS, *xs, target_token(target)]


def demonstrate(rng, problem, gap, patience=0.7, attempts=10):
    """A trace of random attempts up to the first verdict OK, or until patience ends; the last pair is the answer.

    With the gap sums and verdicts are honest. Without, a verdict is a coin that falls on OK as often as a random pair is right.
    """
    (xs, target), trace = problem, []
    for _ in range(attempts):
        a, b = rng.sample(xs, 2)
        ok = a + b == target if gap else rng.random() < 0.1
        trace += [a, second(b), sum_token(a + b if gap else rng.randrange(3, 2 * HIGHEST)), OK if ok else NO]
        if ok or rng.random() > patience:
            break
    return [*trace, ANS, a, second(b), EOS]


def parse(tokens):
    """An answer's attempts [(a, b, sum, verdict), ...] and what it names, (a, b), or None if that is cut off or malformed."""
    attempts, i = [], 0
    while i + 4 <= len(tokens) and tokens[i + 3] in (OK, NO) and 1 <= tokens[i] <= HIGHEST and tokens[i + 1] > second(0):
        attempts.append((tokens[i], tokens[i + 1] - second(0), tokens[i + 2] - HIGHEST, tokens[i + 3] == OK))
        i += 4
    rest = tokens[i:]
    return attempts, (rest[1], rest[2] - second(0)) if len(rest) == 4 and rest[0] == ANS and rest[3] == EOS else None


def reward(problem, tokens):
    """1.0 if the named pair are two different numbers of the problem with its sum, else 0.0."""
    (xs, target), (_, named) = problem, parse(tokens)
    return float(named is not None and named[0] != named[1] and set(named) <= set(xs) and sum(named) == target)


def behaviour(problems, answers):
    """Means over the answers: attempts, different pairs among them, their hits, and P(stop | the last verdict was NO)."""
    parsed = [parse(tokens) for tokens in answers]
    count = sum(len(attempts) for attempts, _ in parsed)
    hits = sum(a + b == problem[1] for problem, (attempts, _) in zip(problems, parsed) for a, b, *_ in attempts)
    after_no = sum(not ok for attempts, _ in parsed for *_, ok in attempts)
    gave_up = sum(bool(attempts) and not attempts[-1][3] and named is not None for attempts, named in parsed)
    return dict(attempts=count / len(answers), unique_attempts=sum(len({frozenset(t[:2]) for t in attempts}) for attempts, _ in parsed) / len(answers),
                hit_rate=hits / max(count, 1), gives_up=gave_up / max(after_no, 1))


def verdict_gap(problems, answers):
    """Balanced accuracy of the verdicts minus the success of an attempt: how much better the model judges than it guesses."""
    judged = [(a + b == problem[1], ok) for problem, tokens in zip(problems, answers) for a, b, _, ok in parse(tokens)[0]]
    rate = lambda truth: np.mean([ok == truth for hit, ok in judged if hit == truth] or [0.5])
    return float((rate(True) + rate(False)) / 2 - np.mean([hit for hit, _ in judged] or [0.0]))


def budget_rule(success, kappa):
    """{budget: J} -> the smallest budget whose double does not multiply J by more than kappa (Eq. 6.1); the largest if there is none."""
    budgets = sorted(success)
    return next((b for b in budgets if 2 * b in success and success[2 * b] <= kappa * success[b]), budgets[-1])


# ---------------------------------------------------------------------------------------------------------------------------
# Training

def build(config, device):
    return GPT(GPTConfig(VOCAB, 2 + 8 + LONGEST, config.n_layer, config.n_head, config.n_embd, n_hidden=4 * config.n_embd, qk_norm=True, tie=False,
                         rope_theta=1e24)).to(device)


def score(model, ids, config):
    """Log-probability and entropy (R, T - 1) of each token given those before it."""
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
        return token_logprobs(model.hidden(ids[:, :-1]), model.lm_head.weight, ids[:, 1:])


def step_of(optimizer, model, loss):
    optimizer.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
    optimizer.step()
    return norm


def warm_up(config, run, seed, device, gap=True):
    """Supervised training on traces, from scratch -> a base model that verifies (gap) or only looks like it."""
    phase, rng = f"base {'gap' if gap else 'no gap'} {seed}", random.Random(seed)
    torch.manual_seed(seed)
    model = build(config, device)
    optimizer = torch.optim.AdamW(model.parameters(), config.sft_lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    start = restore(run.state.get(phase), model, optimizer, rng)
    bar = tqdm(range(start, config.sft_steps), phase, initial=start, total=config.sft_steps)
    for step in bar:
        for g in optimizer.param_groups:
            g["lr"] = config.sft_lr * min((step + 1) / 50, 1 - step / config.sft_steps)
        problems = [draw_problem(rng, rng.choice((3, 4, 6, 8))) for _ in range(config.sft_batch)]
        pairs = [(prompt(p), demonstrate(rng, p, gap)) for p in problems]
        T = max(len(q) + len(a) for q, a in pairs)
        ids, mask = torch.zeros(len(pairs), T, dtype=torch.long), torch.zeros(len(pairs), T)
        for i, (q, a) in enumerate(pairs):
            ids[i, :len(q) + len(a)], mask[i, len(q):len(q) + len(a)] = torch.tensor(q + a), 1
        ids, mask = ids.to(device), mask[:, 1:].to(device)
        loss = -(score(model, ids, config)[0] * mask).sum() / mask.sum()
        step_of(optimizer, model, loss)
        if step % 50 == 0 or step + 1 == config.sft_steps:
            run.log(phase="sft", arm=phase, seed=seed, step=step, loss=loss.item())
            bar.set_postfix_str(f"loss {loss.item():.3f}")
        if run.due:
            run.save(phase, **snapshot(step + 1, model, optimizer, rng))
    run.save(phase, **snapshot(config.sft_steps, model, None, rng))
    return model


def advantages(rewards, masked):
    """rewards (P, G) -> (P, G): minus the group's mean, over its standard deviation; exactly 0 in a group of equals. Masked: then max(A, 0)."""
    centred = torch.where((rewards == rewards[:, :1]).all(1, keepdim=True), 0.0, rewards - rewards.mean(1, keepdim=True))
    a = centred / (rewards.std(1, keepdim=True) + 1e-6)
    return a.clamp_min(0) if masked else a


def answers_to(model, problems, n, budget, generator):
    rollout = generate(model, [prompt(p) for p in problems], n, budget, stop=EOS, generator=generator)
    return rollout, rollout.tokens(), [p for p in problems for _ in range(n)]


def evaluate(model, config, numbers, budgets, seed=0):
    """One answer to each of held-out problems at the largest budget, cut to the smaller ones -> {budget: success}, behaviour at the largest."""
    rng = random.Random(f"held out {numbers} {seed}")
    problems = [draw_problem(rng, numbers) for _ in range(config.eval_prompts)]
    _, answers, _ = answers_to(model, problems, 1, max(budgets), torch.Generator().manual_seed(seed))
    success = {b: sum(reward(p, t[:b]) for p, t in zip(problems, answers)) / len(problems) for b in budgets}
    return success, behaviour(problems, answers) | {"gap": verdict_gap(problems, answers)}


def train(config, run, arm, seed, base, stages, masked=False, entropy_bonus=0.0, budgets=(64,)):
    """GRPO from the base through stages of (numbers, budget, sampled tokens or None: config.steps steps) -> the trained model.

    Logs the success at each of the budgets, on held-out problems of the last stage's size.
    """
    phase, model, device = f"{arm} {seed}", copy.deepcopy(base), base.lm_head.weight.device
    optimizer = torch.optim.AdamW(model.parameters(), config.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    rng, generator, state = random.Random(seed + 1), torch.Generator().manual_seed(seed + 1), run.state.get(phase)
    step, sampled = restore(state, model, optimizer, rng, generator), state["sampled"] if state else 0

    def log(**row):
        success, how = evaluate(model, config, stages[-1][0], budgets, seed)
        run.log(phase="rl", arm=arm, seed=seed, step=step, sampled_tokens=sampled, **row, **{f"pass@1 of {b}": s for b, s in success.items()}, **how)
        bar.set_postfix_str(f"success at {budgets[-1]} tokens {success[budgets[-1]]:.3f}, attempts {how['attempts']:.1f}")

    limits = np.cumsum([tokens or math.inf for *_, tokens in stages])
    bar = tqdm(total=config.steps if math.isinf(limits[-1]) else int(limits[-1]), desc=phase, initial=step if math.isinf(limits[-1]) else sampled)
    if state is None:
        log()
    done = lambda: step >= config.steps if math.isinf(limits[-1]) else sampled >= limits[-1]
    while not done():
        numbers, budget, _ = stages[int(np.searchsorted(limits, sampled, "right"))]
        problems = [draw_problem(rng, numbers) for _ in range(config.prompts)]
        rollout, answers, repeated = answers_to(model, problems, config.group, budget, generator)
        rewards = torch.tensor([reward(p, t) for p, t in zip(repeated, answers)], device=device)
        adv, mask = advantages(rewards.view(-1, config.group), masked).view(-1, 1), rollout.mask[:, 1:]
        logp, entropy = score(model, rollout.ids, config)
        loss = -((adv * logp + entropy_bonus * entropy) * mask).sum() / mask.sum()          # the mean over all tokens of the batch
        norm = step_of(optimizer, model, loss)
        tokens, step = int(mask.sum()), step + 1
        sampled += tokens
        bar.update(1 if math.isinf(limits[-1]) else tokens)
        if step % config.eval_every == 0 or done():
            lengths, right = rollout.lengths.float().cpu(), rewards.cpu() > 0
            mean = lambda x: x.mean().item() if len(x) else None
            log(loss=loss.item(), grad_norm=norm, reward=rewards.mean().item(), entropy=((entropy * mask).sum() / mask.sum()).item(),
                length=lengths.mean().item(), length_right=mean(lengths[right]), length_wrong=mean(lengths[~right]))
        if run.due:
            run.save(phase, **snapshot(step, model, optimizer, rng, generator, sampled=sampled))
    run.save(phase, **snapshot(step, model, None, rng, None, sampled=sampled))
    bar.close()
    return model


@torch.no_grad()
def verdicts_by_place(model, config, seed, places=56, n=16):
    """Balanced accuracy of the verdict on the 1st, 2nd, ... attempt (places,), of long traces that the model is made to read: all misses, then a hit.

    The base model stops early; this asks whether it could go on, and so whether positions are what fails in long answers.
    """
    rng, rows, hit = random.Random(seed), [], []
    for place in list(range(places)) * n:
        problem = xs, target = draw_problem(rng, config.numbers)
        pairs = [(a, b) for a in xs for b in xs if a != b]
        misses, hits = ([p for p in pairs if (sum(p) == target) == h] for h in (False, True))
        trace = [t for a, b in rng.choices(misses, k=place) for t in (a, second(b), sum_token(a + b), NO)]
        a, b = rng.choice(hits)
        rows.append(prompt(problem) + trace + [a, second(b), sum_token(a + b), OK] + [0] * 4 * (places - 1 - place))
        hit.append(place)
    ids, hit = torch.tensor(rows, device=model.lm_head.weight.device), torch.tensor(hit)
    right = torch.cat([(model(part[:, :-1]).argmax(-1) == part[:, 1:]) for part in ids.split(64)])[:, -1 - 4 * (places - 1)::4].float().cpu()
    at = torch.arange(places)                                               # right (rows, places): the verdict of each attempt
    return [((right[hit > i, i].mean() if i + 1 < places else right[hit == i, i].mean()) + right[hit == i, i].mean()).item() / 2 for i in at]


# ---------------------------------------------------------------------------------------------------------------------------
# Figures and claims

BUDGETS = (16, 32, 64, 128, 256)


def of(run, arm, key, last=True):
    """The last (first) value of a metric, of each seed (seeds,)."""
    return series(run, key, phase="rl", arm=arm)[1][:, -1 if last else 0]


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


def log_once(run, measure, **where):
    """Log a measurement, but not again in a resumed run."""
    if not any(where.items() <= r.items() for r in run.rows):
        run.log(**where, **measure())


def figure_explore(config, run, device):
    n, budgets = config.seeds, (config.budget,)
    for seed in seeds_of(config):
        bases = {name: warm_up(config, run, seed, device, name == "gap") for name in ("gap", "no gap")}
        log_once(run, lambda: {"right": verdicts_by_place(bases["gap"], config, seed)}, phase="places", seed=seed, step=0)
        for arm, base, budget, masked, bonus in (("full", "gap", config.budget, False, 0.0), ("no gap", "no gap", config.budget, False, 0.0),
                                                 ("masked", "gap", config.budget, True, 0.0),
                                                 ("masked, entropy bonus", "gap", config.budget, True, config.entropy_bonus),
                                                 ("budget 16", "gap", 16, False, 0.0)):
            train(config, run, arm, seed, bases[base], [(config.numbers, budget, None)], masked, bonus, BUDGETS)
    steps = 20 if config.quick else 1200
    pk = {arm: np.array([pk_train(arm == "masked", seed, steps=steps) for seed in range(5)]) for arm in ("full", "masked")}     # (5, steps, 3)
    ratio = np.median([steps_to(m) / steps_to(f) for f, m in zip(pk["full"], pk["masked"])])

    fig, axes = plt.subplots(2, 3, figsize=(16, 9), layout="constrained")
    for i, (title, ylabel) in enumerate((("p^k model: without negatives later", "success"), ("p^k model: first more tries, then better ones", "episode length"))):
        for arm, paths in pk.items():
            band(axes[0, i], np.arange(steps), paths[:, :, i], f"{arm} (5 seeds)")
        axes[0, i].set(title=title, xlabel="step", ylabel=ylabel)
    right = np.array([r["right"] for r in run.rows if r["phase"] == "places"])
    band(axes[0, 2], np.arange(1, right.shape[1] + 1), right, "the base, made to read on")
    axes[0, 2].set(title="Positions are not what fails in long answers", xlabel="attempt", ylabel="sum and verdict right", ylim=(0, 1.02))
    for arm in ("full", "no gap", "masked", "masked, entropy bonus"):
        band(axes[1, 0], *series(run, "attempts", phase="rl", arm=arm), arm)
        band(axes[1, 1], *series(run, "entropy", phase="rl", arm=arm), arm)
    axes[1, 0].set(title=f"Attempts grow where verdicts can be trusted (of {max(BUDGETS)} tokens)", xlabel="RL step", ylabel="attempts per answer")
    axes[1, 1].set(title="Entropy", xlabel="RL step", ylabel="nats per token")
    draw_budgets(axes[1, 2], {"base": tested(run, "full", False), "trained at 16": tested(run, "budget 16"), f"trained at {config.budget}": tested(run, "full"),
                              "no gap": tested(run, "no gap")}, "Success beyond the training budget")
    for ax in axes.flat[:5]:
        ax.legend()
    grown = {arm: (of(run, arm, "attempts") / of(run, arm, "attempts", False)).mean() for arm in ("full", "no gap")}
    at_own = BUDGETS.index(config.budget) if config.budget in BUDGETS else 2
    rise = {arm: (tested(run, arm) - tested(run, arm, False)).mean(0)[at_own] for arm in ("full", "no gap")}
    fig.suptitle(f"A model that can check its guesses learns to make more of them: attempts x{grown['full']:.1f}, without the gap x{grown['no gap']:.1f} "
                 f"({n} seed{'s' if n > 1 else ''})")
    short = tested(run, "budget 16").mean(0)
    mean = lambda arm, key: of(run, arm, key).mean()
    twice = min(at_own + 1, len(BUDGETS) - 1)
    return fig, [
        claim("pk", "p^k: steps to 50%, masked over full (median of 5)", SOURCE, "masked is flat", ratio, ">=", 1.5, 5),
        claim("pk entropy", "p^k, full: rise of the entropy above its start (nats)", SOURCE, "rises", (pk["full"][:, :, 2].max(1) - pk["full"][:, 0, 2]).mean(), ">=", 0.05, 5),
        claim("gate", "verdict gap of the base, worst seed", SOURCE, "a gap", of(run, "full", "gap", False).min(), ">=", 0.6, n),
        claim("no gate", "the same of the base without a gap, largest", SOURCE, "no gap", of(run, "no gap", "gap", False).max(), "<=", 0.5, n),
        claim("positions", "verdicts right: last 8 attempts of long traces minus first 8", "-", "-", (right[:, -8:].mean() - right[:, :8].mean()), ">=", -0.05, n),
        claim("attempts", "attempts per answer, after over before, gap", SOURCE, "grow", grown["full"], ">=", 2.5, n),
        claim("attempts no gap", "the same without a gap", SOURCE, "flat", grown["no gap"], "<=", 1.15, n),
        claim("rise", "rise of pass@1 at the training budget, gap", SOURCE, "0.2 to 0.5", rise["full"], ">=", 0.30, n),
        claim("rise no gap", "the same without a gap", SOURCE, "about 0", rise["no gap"], "<=", 0.04, n),
        claim("extrapolation", "trained at 16 tokens: pass@1 at 64 minus at 16", SOURCE, "+0.11", short[2] - short[0], ">=", 0.15, n, f" ({short[0]:.2f}, {short[2]:.2f})"),
        claim("mask entropy", "entropy, full over masked", SOURCE, "0.11 / 0.015", mean("full", "entropy") / mean("masked", "entropy"), ">=", 1.5, n),
        claim("mask unique", "different attempts, full over masked", SOURCE, "more", mean("full", "unique_attempts") / mean("masked", "unique_attempts"), ">=", 1.2, n),
        claim("mask accuracy", "pass@1 at twice the budget, full minus masked", SOURCE, "+0.23", (tested(run, "full") - tested(run, "masked")).mean(0)[twice], ">=", 0.03, n)]


def figure_curriculum(config, run, device):
    tokens, easy, hard, first = 2_000 if config.quick else 300_000, 4, 8, 16         # tokens: of a stage
    rivals, rules, reached = ["hard only", "data only", "budget only"], [], []
    for seed in seeds_of(config):
        base = warm_up(config, run, seed, device)
        stage1 = train(config, run, "stage 1", seed, base, [(easy, first, tokens)], budgets=BUDGETS)
        success, _ = evaluate(stage1, config, hard, BUDGETS, seed)
        chosen = min(budget_rule(success, config.kappa), 64 if config.quick else 128)
        rules.append((success, chosen))
        print(f"\nseed {seed}: J(B) of stage 1 on hard problems: " + ", ".join(f"{b}: {s:.3f}" for b, s in success.items()) + f" -> B* = {chosen}")
        for budget in BUDGETS[:-1]:
            train(config, run, f"stage 2 at {budget}", seed, stage1, [(hard, budget, tokens)], budgets=BUDGETS + (512,)[:0])
        log_once(run, lambda: {"chosen": chosen, "J": {str(b): s for b, s in success.items()}}, phase="rule", seed=seed, step=0)
        for arm, stages in zip(rivals, ([(hard, chosen, 2 * tokens)], [(easy, chosen, tokens), (hard, chosen, tokens)], [(hard, first, tokens), (hard, chosen, tokens)])):
            train(config, run, arm, seed, base, stages, budgets=BUDGETS)
    n = config.seeds
    coupled = np.stack([tested(run, f"stage 2 at {b}")[i] for i, (_, b) in enumerate(rules)])
    curves = {"coupled": coupled} | {arm: tested(run, arm) for arm in rivals} | {"base": tested(run, "hard only", False)}
    fig, axes = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
    draw_budgets(axes[0], curves, f"Hard problems, {2 * tokens // 1000}k sampled tokens each ({n} seeds)")
    band(axes[1], np.array(BUDGETS), np.array([[s[b] for b in BUDGETS] for s, _ in rules]), "after stage 1: J(B)", marker="o")
    trained = np.stack([tested(run, f"stage 2 at {b}")[:, BUDGETS.index(b)] for b in BUDGETS[:-1]], 1)
    band(axes[1], np.array(BUDGETS[:-1]), trained, "after stage 2 at B, tested at B", marker="o")
    axes[1].set(title="The rule chose B* = " + ", ".join(str(b) for _, b in rules), xlabel="budget (tokens)", ylabel="held-out pass@1", xscale="log")
    axes[1].set_xticks(BUDGETS, BUDGETS)
    axes[1].minorticks_off()
    axes[1].legend()
    at = lambda y, factor: np.mean([row[min(BUDGETS.index(b * factor) if b * factor in BUDGETS else len(BUDGETS) - 1, len(BUDGETS) - 1)] for row, (_, b) in zip(y, rules)])
    gain, best = at(coupled, 2) - at(coupled, 1), max(at(curves[arm], 4) for arm in rivals)
    fig.suptitle(f"Coupled curriculum: {at(coupled, 1):.2f} at its training budget, {at(coupled, 2):.2f} at twice, {at(coupled, 4):.2f} at 4 times; best rival {best:.2f}")
    final = np.stack([tested(run, f"stage 2 at {b}")[:, -1] for b in BUDGETS[:-1]], 1)              # (seeds, training budgets), tested at the largest
    ranks = [final[i].max() - final[i][BUDGETS.index(b)] for i, (_, b) in enumerate(rules)]
    return fig, [
        claim("twice", "coupled: pass@1 at 2x the training budget minus at 1x", SOURCE, "grows", gain, ">=", 0.05, n),
        claim("rivals", "coupled minus the best rival at 4x", SOURCE, "+0.07 to +0.09", at(coupled, 4) - best, ">=", 0.03, n),
        claim("rule", "best training budget minus the chosen one, at the largest test budget", SOURCE, "where gains flatten", np.mean(ranks), "<=", 0.03, n)]


def figure_budget(config, run, device):
    arms = {b: f"budget {b}" for b in BUDGETS[:-1]}
    for seed in seeds_of(config):
        base = warm_up(config, run, seed, device)
        for b, arm in arms.items():
            train(config, run, arm, seed, base, [(config.numbers, b, None)], budgets=BUDGETS)
    fig, ax = plt.subplots(figsize=(8, 5), layout="constrained")
    draw_budgets(ax, {"base": tested(run, arms[16], False)} | {f"trained at {b}": tested(run, arm) for b, arm in arms.items()},
                 f"Every training budget, tested at all: {config.steps} steps each ({config.seeds} seeds)")
    matrix = {b: tested(run, arm).mean(0) for b, arm in arms.items()}
    print("\ntrained at " + " ".join(f"{b:>8}" for b in BUDGETS))
    for b, row in matrix.items():
        print(f"{b:>10} " + " ".join(f"{x:8.3f}" for x in row))
    best = max(matrix, key=lambda b: matrix[b][2])
    return fig, [
        claim("short", f"tested at 64 tokens: best (trained at {best}) minus trained at 16", SOURCE, "4k flat from 8k on", matrix[best][2] - matrix[16][2], ">=", 0.03, config.seeds)]


def main():
    config = parse_args(Config, __doc__)
    config.seeds = config.seeds or (1 if config.figure == "explore" or config.quick else 3)
    device = pick_device(config.device)
    run, started = Run(config), time.time()
    print(f"curriculum.py: figure {config.figure}, seed {config.seed}, {config.seeds} seeds, {device}, {config.dtype}, {torch.get_num_threads()} threads, "
          f"{sum(p.numel() for p in build(config, device).parameters()):,} parameters")
    fig, claims = {"explore": figure_explore, "curriculum": figure_curriculum, "budget": figure_budget}[config.figure](config, run, device)
    fig.savefig(run.dir / f"{config.figure}.png", dpi=110)
    run.claims(claims)
    print(f"\n{run.dir / config.figure}.png, metrics.jsonl, claims.json, model.pt: {time.time() - started:.0f} s")


if __name__ == "__main__":
    command(main)
