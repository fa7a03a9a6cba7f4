"""bestofn.py: draw N answers and keep one. Which one, when the score that ranks them is flawed?

A reward model's score s stands in for the true reward. The best of N answers by s gets better up
to some N; from there on more draws only find what the model overrates, and the true reward falls
(Gao et al., arXiv 2210.10760). Four rules that keep one of N draws y_1 .. y_N of a base p:

    best-of-n        the largest s_i
    soft best-of-n   i with probability softmax(s / temperature)_i (Verdun et al., 2505.03156)
    majority         the first whose final answer is the most frequent one: needs no score
    pessimism        try half of the draws in turn, keep the first that passes with probability
                     w_i / W, the last one if none does (Huang et al., arXiv 2503.21878), where

        w_i = max(0, s_i - a) / beta      with a such that the mean of w on the other half is 1
        W   = (top - a) / beta            top: the largest score that there can be

Pessimism draws from q(y) = p(y) w(y), the law that maximises E_q[s] - beta / 2 E_q[q / p]. Nothing
becomes more than W times as likely as the base makes it, however many draws there are: what is
rare and overrated stays rare. Best-of-n makes it up to N times as likely.

    python -m electives.bestofn                 2 minutes on two cores
    python -m experiments.frontier              reinforcement learning and best-of-n, one frontier
    python -m experiments.weaver                many weak judges, combined without a label

Two worlds: a table of 20,000 answers, of which two draws in a thousand are bad ones that score
above all others; and a GPT that adds (tasks/addition.py), with a reward model that learnt from its
judged answers. That one nobody made hackable: it has seldom seen the slips that the GPT makes when
it is sampled at a higher temperature (a digit left out, or no answer at all), and some of them look
better to it than any right answer.

What to see: under best-of-n the score goes up with N; the true reward goes up, and comes down below
that of a single draw. Pessimism needs more draws to get anywhere, and then stays where it is. Soft
best-of-n with a tuned temperature is not far behind it. `samples.txt` has what the best of all
draws looks like. Majority, which asks no reward model, beats them all on additions: a right answer
is the same each time, wrong ones differ.

How this differs from the papers:
1. N counts all draws: pessimism spends half of them on `a`. The paper draws N for each.
2. beta and the temperature are those with the largest true reward at the largest N on another
   table, or on other problems. The paper tries some values of beta.
3. The true reward of the GPT's answers is 0 or 1, and the reward model a classifier: `top` is 1.
"""

import copy
import random
from dataclasses import dataclass
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F

import tasks
from experiment import (
    Flags,
    Run,
    band,
    claim,
    command,
    descend,
    flag,
    parse_args,
    pick_device,
    seeds_of,
    series,
)
from model import GPT, GPTConfig
from tasks import addition

SOURCE = "Huang et al., arXiv 2503.21878"
RULES = "best-of-n", "soft best-of-n", "majority", "pessimism"
BETAS = 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5  # of pessimism
TEMPERATURES = 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5  # of soft best-of-n
WORLDS = "table", "GPT"
LARGEST = 4096  # N of the table
TOP = 1.02  # and its largest score
ORDERS = 16  # in which each problem's draws are taken


@dataclass
class Config(Flags):
    runs: int = flag(1500, "times that each rule chooses from the table", 20, low=1, high=10**4)
    size: int = flag(4, "columns of an addition", quick=2, low=1, high=8)
    sft_steps: int = flag(1200, "steps of imitation, for the base", quick=5, low=1)
    judged: int = flag(1024, "judged answers that the reward model learns from", quick=16, low=1)
    rm_steps: int = flag(300, "its steps", quick=3, low=1)
    rm_lr: float = flag(2e-3, "its learning rate (up in 20 steps, then linear to 0)", low=0)
    problems: int = flag(32, "held-out problems, and as many to tune on", 4, low=3, high=2**12)
    draws: int = flag(1024, "the GPT's answers to each: the largest N", quick=8, low=2, high=2**12)
    temperature: float = flag(1.3, "of these draws; judged were draws at 1", low=1e-3)


# --------------------------------------------------------------------------------------------------
# The rules. scores (R, N): R times N independent draws -> which draw is kept (R,)


def best_of_n(scores):
    """The largest. The draws are in random order, so that the first of equals is a fair choice."""
    return scores.argmax(1)


def soft_best_of_n(scores, temperature, generator):
    """Temperature 0 would be best-of-n, infinity the base."""
    law = (scores / temperature).softmax(1)  # (R, N)
    return torch.multinomial(law, 1, generator=generator).squeeze(1)


def majority(kinds):
    """kinds (R, N) int64 >= 0: the final answer of each draw, numbered. Self-consistency (Wang et
    al., arXiv 2203.11171).
    """
    counts = torch.zeros(len(kinds), int(kinds.max()) + 1)  # (R, K)
    counts.scatter_add_(1, kinds, torch.ones(kinds.shape))
    return counts.gather(1, kinds).argmax(1)  # the first draw with the largest count


def threshold(scores, beta, p=None):
    """The a with sum_i p_i max(0, s_i - a) / beta = 1: scores (R, N), p alike, or 1 / N -> (R,).

    Exact, by sorting. If a lay just below the k largest scores, then it would be
    a_k = (sum of their p s - beta) / (sum of their p). The others' terms are not below 0, so that
    the true a is no smaller than any a_k; and it is one of them: the largest.
    """
    p = torch.full_like(scores, 1 / scores.shape[1]) if p is None else p
    scores, order = scores.sort(1, descending=True)
    p = p.gather(1, order)
    a = ((p * scores).cumsum(1) - beta) / p.cumsum(1)  # (R, N): a_1, a_2 ...
    return a.max(1).values


def weights(scores, a, beta):
    """w: how much likelier pessimism makes each answer. scores (R, N), a (R,)."""
    return (scores - a[:, None]).clamp_min(0) / beta


def pessimism(scores, beta, top, generator):
    """Rejection sampling from p w, which a sees through the first half of the draws only (N >= 2).

    Were a made from the draws that are then tried, the law would not be p w.
    """
    N = scores.shape[1]
    # 1. Where the weights begin, by the first half
    a = threshold(scores[:, : N // 2], beta)  # (R,)
    # 2. Each draw of the other half passes by itself, the surer the larger its weight
    tried = scores[:, N // 2 :]  # (R, N - N // 2)
    most = weights(torch.full((len(a), 1), top).to(scores), a, beta)  # (R, 1): W
    chance = weights(tried, a, beta) / most
    passed = torch.rand(tried.shape, generator=generator) < chance
    # 3. The first that passed; if none did, the last: a plain draw of the base
    passed[:, -1] = True
    return N // 2 + passed.int().argmax(1)


def best_of_n_law(p, scores, N):
    """What best-of-n draws from p, exactly: p, scores (K,) -> (K,).

    The best is no better than s with probability P(s_i <= s)^N. Equals share by their p.
    """
    levels, level = scores.unique(return_inverse=True)  # levels ascend
    mass = torch.zeros_like(levels).index_add_(0, level, p)
    below = mass.cumsum(0).clamp_max(1) ** N
    of_level = below.diff(prepend=below.new_zeros(1))
    return of_level[level] * p / mass[level]


def pessimistic_law(p, scores, beta):
    """What pessimism draws from with infinitely many draws: p, scores (K,) -> (K,)."""
    a = threshold(scores[None], beta, p[None])
    return p * weights(scores[None], a, beta)[0]


# --------------------------------------------------------------------------------------------------
# A table, whose every answer has a known probability, reward and score


def make_table(seed, K=20_000, overrated=0.002):
    """K answers -> their probability, score and reward (K,) each.

    The score is the reward and some noise, cut to [0, 1]. But for a few bad answers, a share of
    `overrated` of all draws: those score 1 to TOP, above every other.
    """
    rng = np.random.default_rng(seed)
    p = np.exp(rng.standard_normal(K))
    p /= p.sum()
    reward = (0.3 + 0.2 * rng.standard_normal(K)).clip(0, 1)
    score = (reward + 0.15 * rng.standard_normal(K)).clip(0, 1)
    bad = p.cumsum() < overrated  # the answers are in no order: the first are any
    reward[bad] = 0.05
    score[bad] = rng.uniform(1, TOP, bad.sum())  # never a tie with what is cut to 1
    return map(torch.from_numpy, (p, score, reward))


def draw_table(config, seed):
    """The scores and rewards (runs, LARGEST) of independent draws; there are no final answers."""
    p, score, reward = make_table(seed)
    generator = torch.Generator().manual_seed(seed)
    u = torch.rand((config.runs, LARGEST), generator=generator, dtype=p.dtype)
    drawn = torch.searchsorted(p.cumsum(0), u).clamp_max(len(p) - 1)  # (runs, LARGEST)
    return score[drawn], reward[drawn], None


# --------------------------------------------------------------------------------------------------
# A GPT that adds, and a reward model of its answers


class RewardModel(torch.nn.Module):
    """The base's body, and a linear head on the last token's state, which has seen all others."""

    def __init__(self, base):
        super().__init__()
        self.body = copy.deepcopy(base)
        self.head = torch.nn.Linear(base.config.n_embd, 1)

    def forward(self, rollout):
        """Its answers -> logits (R,) of being right."""
        hidden = self.body.hidden(rollout.ids)  # (R, T, C)
        rows = torch.arange(len(hidden), device=hidden.device)
        last = rollout.prompt_lens + rollout.lengths - 1  # (R,)
        return self.head(hidden[rows, last]).squeeze(1)


def build(device):
    shape = GPTConfig(
        addition.tokenizer.n_vocab,
        block_size=160,
        n_layer=2,
        n_head=4,
        n_embd=64,
        qk_norm=True,
    )
    return GPT(shape).to(device)


def imitate(config, run, seed, device):
    """The base, which imitates demonstrators who guess their carries."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    model = build(device)

    def demonstration():  # smaller problems teach the same steps sooner
        problem = addition.draw(rng, rng.randint(1, config.size))
        return addition.prompt(problem), addition.demonstrate(rng, problem)

    return tasks.imitate(model, addition.tokenizer, demonstration, run, seed, config.sft_steps, rng)


def answer(model, problems, n, size, temperature, generator):
    """n answers to each problem -> Rollout, texts, rewards (P, n): 1 for right, 0 for wrong."""
    budget, at_once = addition.budget(size), max(1, 512 // n)
    return tasks.answer(model, addition, problems, n, budget, generator, temperature, at_once)


def learn_reward(config, run, seed, base):
    """Cross-entropy on judged answers of the base -> the reward model.

    Half of an answer's mistakes are the base's guesses: small problems, too, so that more is right.
    """
    torch.manual_seed(seed)
    model = RewardModel(base).to(base.lm_head.weight.device)
    rng, generator = random.Random(seed + 1), torch.Generator().manual_seed(seed + 1)
    problems = [addition.draw(rng, rng.randint(1, config.size)) for _ in range(config.judged)]
    rollout, _, rewards = answer(base, problems, 1, config.size, 1.0, generator)
    rewards = rewards[:, 0].to(rollout.ids.device)  # (judged,): one answer to each problem
    optimizer = torch.optim.AdamW(model.parameters(), config.rm_lr, weight_decay=0.01, fused=True)
    for step in run.loop(f"reward model {seed}", config.rm_steps, model, optimizer, rng):
        left = 1 - step / config.rm_steps
        optimizer.param_groups[0]["lr"] = config.rm_lr * min((step + 1) / 20, left)
        rows = torch.tensor([rng.randrange(len(rewards)) for _ in range(32)])
        loss = F.binary_cross_entropy_with_logits(model(rollout[rows]), rewards[rows])
        optimizer.zero_grad()
        loss.backward()
        descend(optimizer, loss)
        if step % 50 == 0 or step + 1 == config.rm_steps:
            run.log(phase="reward model", seed=seed, step=step, loss=loss.item())
            run.say(loss=loss.item())
    return model


def final_answer(text):
    """What majority counts: the digit last written for each column."""
    lines = [text[i : i + addition.LINE] for i in range(0, len(text), addition.LINE)]
    written = {line[0]: line[-1] for line in lines}
    return "".join(column + digit for column, digit in sorted(written.items()))


@torch.no_grad()
def draw_gpt(config, base, reward_model, seed, held_out):
    """Draws of the base for some problems, each problem's in ORDERS random orders -> scores,
    rewards, kinds (problems * ORDERS, draws) each, and problems, texts, scores before that.
    """
    rng, generator = random.Random(f"{seed} {held_out}"), torch.Generator().manual_seed(seed)
    problems = [addition.draw(rng, config.size, held_out) for _ in range(config.problems)]
    rollout, texts, rewards = answer(
        base, problems, config.draws, config.size, config.temperature, generator
    )
    # 1. A score for each answer
    parts = torch.arange(len(texts)).split(512)
    logits = torch.cat([reward_model(rollout[rows]) for rows in parts])
    scores = logits.double().sigmoid().cpu().view_as(rewards)  # (P, draws)
    # 2. Equal final answers get equal numbers, for majority
    numbers = {}
    kinds = [numbers.setdefault(final_answer(text), len(numbers)) for text in texts]
    kinds = torch.tensor(kinds).view_as(rewards)
    # 3. Which draws come first is chance: several orders make the curves smoother
    order = torch.rand((len(problems) * ORDERS, config.draws), generator=generator).argsort(1)
    shuffled = (x.repeat_interleave(ORDERS, 0).gather(1, order) for x in (scores, rewards, kinds))
    return tuple(shuffled), (problems, texts, rewards, scores)


# --------------------------------------------------------------------------------------------------
# Every rule at every N


def outcome(rule, draws, N, knobs):
    """The mean true reward and the mean score of what a rule keeps of the first N draws.

    draws: scores, rewards, kinds (R, largest N). knobs: a value for each of a rule's parameters.
    """
    scores, rewards, kinds = draws
    scores = scores[:, :N]
    generator = torch.Generator().manual_seed(N)
    if N == 1:
        kept = torch.zeros(len(scores), dtype=torch.long)
    elif rule == "best-of-n":
        kept = best_of_n(scores)
    elif rule == "soft best-of-n":
        kept = soft_best_of_n(scores, knobs["temperature"], generator)
    elif rule == "majority":
        kept = majority(kinds[:, :N])
    else:
        kept = pessimism(scores, knobs["beta"], knobs["top"], generator)
    kept = kept[:, None]  # (R, 1)
    return rewards.gather(1, kept).mean().item(), scores.gather(1, kept).mean().item()


def tune(draws, top):
    """The beta and the temperature with the largest true reward at the largest N."""
    N = draws[0].shape[1]

    def best(rule, knob, values):
        reached = [outcome(rule, draws, N, {knob: value, "top": top})[0] for value in values]
        return values[int(np.argmax(reached))]

    return dict(
        top=top,
        beta=best("pessimism", "beta", BETAS),
        temperature=best("soft best-of-n", "temperature", TEMPERATURES),
    )


def compare(draws, N, knobs):
    """A row: what each rule of this world gets out of N draws."""
    row = {}
    for rule in RULES:
        if rule == "majority" and draws[2] is None:
            continue  # no two answers of the table are the same
        row[rule], row[f"{rule}, score"] = outcome(rule, draws, N, knobs)
    return row


def measure(run, world, seed, draws, others, top):
    """Tune on other draws, then every rule at N = 1, 2, 4 ... -> the knobs."""
    where = dict(world=world, seed=seed)
    run.log_once(partial(tune, others, top), phase="tune", **where, step=0)
    knobs = next(row for row in run.rows if (where | {"phase": "tune"}).items() <= row.items())
    largest = draws[0].shape[1]
    for N in [2**i for i in range(largest.bit_length())]:
        run.log_once(partial(compare, draws, N, knobs), phase="rules", **where, step=N)
    return knobs


# --------------------------------------------------------------------------------------------------
# The figure and its claims


def figure(config, run):
    fig, axes = plt.subplots(2, 2, figsize=(13, 8.5), layout="constrained", sharex="col")
    claims = []
    lost = []
    for world, (above, below) in zip(WORLDS, axes.T, strict=True):
        curves = {}
        for rule, color in zip(RULES, ("C3", "C1", "C7", "C0"), strict=True):
            for ax, key in ((above, rule), (below, f"{rule}, score")):
                N, y = series(run, key, phase="rules", world=world)
                band(ax, N, y, rule, color=color, marker="o", ms=4)
                curves[key] = y
        best = curves["best-of-n"]  # (seeds, Ns)
        peak = best.max(1).mean()
        last = best[:, -1].mean()
        kept = curves["pessimism"][:, -1].mean()
        many = 2 ** (best.shape[1] - 1)
        lost.append(f"{peak - last:.2f} ({world})")
        above.set_title(
            f"{world}, best of {many:,}: {last:.2f} (peak {peak:.2f}); pessimism: {kept:.2f}"
        )
        above.set(ylabel="true reward of the answer kept", ylim=(0, 1.05))
        below.set(
            ylabel="the reward model's score of it", xlabel="N (draws of an answer)", ylim=(0, 1.1)
        )
        below.set_xscale("log", base=2)
        above.legend()
        claims += judge(world, curves)
    seeds = f"{config.seeds} seed{'s' * (config.seeds > 1)}"
    fig.suptitle(
        f"More draws, a higher score, a worse answer: best-of-n falls below its peak by "
        f"{' and '.join(lost)} ({seeds})"
    )
    return fig, claims


def judge(world, curves):
    """The claims about one world, from the rules' true rewards (seeds, Ns), seed by seed."""
    best, careful = curves["best-of-n"], curves["pessimism"]
    peak = best.max(1)
    last = careful[:, -1]
    half = careful[:, careful.shape[1] // 2 :]  # 64 to 4,096 draws; 32 to 1,024
    dip = (np.maximum.accumulate(half, 1) - half).max(1)
    against_soft = last - curves["soft best-of-n"][:, -1]
    rows = [
        (
            "falls",
            "best-of-n: its peak minus the largest N",
            "falls",
            peak - best[:, -1],
            ">=",
            0.3,
        ),
        (
            "level",
            "pessimism at the largest N minus best-of-n's peak",
            "-",
            last - peak,
            ">=",
            -0.01,
        ),
        (
            "monotone",
            "pessimism: largest loss by more draws, from the middle N on",
            "0",
            dip,
            "<=",
            0.02,
        ),
        ("soft", "pessimism minus soft best-of-n, largest N", "-", against_soft, ">", 0),
    ]
    if curves["majority"].size:
        gain = last - curves["majority"][:, -1]
        rows.append(("majority", "pessimism minus majority, largest N", "-", gain, ">", 0))
    return [
        claim(f"{world} {id}", f"{world}, {text}", SOURCE, paper, y, op, threshold, len(best))
        for id, text, paper, y, op, threshold in rows
    ]


# --------------------------------------------------------------------------------------------------
# The run


def examples(pool, knobs):
    """The first three problems -> their texts, and what each rule keeps of all draws."""
    problems, texts, rewards, scores = pool
    n = scores.shape[1]
    generator = torch.Generator().manual_seed(0)
    kept = {
        "first draw": torch.zeros(3, dtype=torch.long),
        "best-of-n": best_of_n(scores[:3]),
        "pessimism": pessimism(scores[:3], knobs["beta"], knobs["top"], generator),
    }
    written = {}
    for rule, index in kept.items():
        written[rule] = [(texts[i * n + k], rewards[i, k].item()) for i, k in enumerate(index)]
    return [addition.prompt(problem) for problem in problems[:3]], written


def main():
    config = parse_args(Config, __doc__)
    device = pick_device(config.device)
    parameters = build(device).config.parameters
    with Run(config) as run:
        run.introduce(device, parameters)
        for seed in seeds_of(config):
            tables = draw_table(config, seed), draw_table(config, seed + 1000)
            measure(run, "table", seed, *tables, top=TOP)
            base = imitate(config, run, seed, device)
            reward_model = learn_reward(config, run, seed, base)
            others, _ = draw_gpt(config, base, reward_model, seed, held_out=False)
            draws, pool = draw_gpt(config, base, reward_model, seed, held_out=True)
            knobs = measure(run, "GPT", seed, draws, others, top=1.0)
        prompts, written = examples(pool, knobs)
        run.samples(prompts, **written)
        run.finish(*figure(config, run))


if __name__ == "__main__":
    command(main)
