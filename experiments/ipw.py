"""ipw.py: a small model that is asked n times, or a large one that is asked once: which is the
better buy?

    python -m experiments.ipw               3 seeds, 3 minutes on two cores

Five GPTs of different widths learn the same task in as many steps (tasks/totals.py: sums modulo 5,
line by line, from demonstrations that are right). Each then answers every held-out question n times
for n = 1 to 64, and one of the n is kept: by a verifier that knows the right one, or by a vote on
the total, which asks nobody. meter.py counts what the answers cost. The idea is that of
intelligence per watt (Saad-Falcon et al., arXiv 2511.07885): accuracy over what it costs. Where the
machine tells joules, metrics.jsonl has them beside the FLOPs.

What to see: each curve begins at one answer. With a verifier a model that is nearly never right can
get to half of the questions by asking 64 times; a vote does nothing for it, because what it gets
wrong most it votes for. But the best buy is neither: it is the smallest model whose greedy answer
(circles) is right, asked once.

How this differs from the paper: it compares models and accelerators at one answer a question; the
models here are of one kind, were trained for equally many steps, and only they differ. What the
training cost is not counted, nor what a verifier costs.
"""

import random
from collections import Counter
from dataclasses import dataclass
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import torch

import tasks
from engine import generate
from experiment import (
    Flags,
    Run,
    UserError,
    band,
    claim,
    command,
    flag,
    parse_args,
    pick_device,
    seeds_of,
)
from meter import Meter
from model import GPT, GPTConfig
from tasks import totals

SOURCE = "Saad-Falcon et al., arXiv 2511.07885"
WIDTHS = 24, 28, 32, 48, 96
RULES = "verifier", "vote"
TARGET = 0.9  # of the questions


@dataclass
class Config(Flags):
    seeds: int = flag(3, "repeat over this many seeds", quick=1, low=1)
    steps: int = flag(400, "steps that each model learns", quick=5, low=1)
    questions: int = flag(256, "held-out questions", quick=8, low=1, high=2**16)
    samples: int = flag(64, "answers to each, a power of 2", quick=8, low=2, high=2**12)

    def __post_init__(self):
        if self.samples & (self.samples - 1):
            raise UserError(f"--samples {self.samples}: must be a power of 2")

    @property
    def ns(self):
        """1, 2, 4 ... samples."""
        return [2**i for i in range(self.samples.bit_length())]


def build(width, device):
    shape = GPTConfig(
        totals.tokenizer.n_vocab,
        block_size=64,
        n_layer=2,
        n_head=2,
        n_embd=width,
        qk_norm=True,
    )
    return GPT(shape).to(device)


def train(config, run, width, seed, device):
    """A GPT that has read demonstrations, short ones too."""
    torch.manual_seed(seed)
    model = build(width, device)
    rng = random.Random(seed)

    def draw():
        problem = totals.draw(rng, rng.randint(1, totals.SIZE))
        return totals.prompt(problem), totals.demonstrate(rng, problem)

    return tasks.imitate(model, totals.tokenizer, draw, run, f"{width} {seed}", config.steps, rng)


# --------------------------------------------------------------------------------------------------
# What n answers are worth, and what they cost


def answer(model, problems, n, seed, temperature=1.0):
    """n answers to each problem -> texts (P * n,), right (P, n) bool."""
    prompts = [totals.tokenizer.encode(totals.prompt(problem)) for problem in problems]
    generator = torch.Generator().manual_seed(seed)
    texts = []
    at_once = max(1, 1024 // n)  # problems: more answers at a time are slower on a CPU
    for i in range(0, len(prompts), at_once):
        rollout = generate(
            model,
            prompts[i : i + at_once],
            n=n,
            max_new_tokens=totals.budget(totals.SIZE),
            temperature=temperature,
            stop=totals.tokenizer.stop,
            generator=generator,
        )
        texts += rollout.texts(totals.tokenizer)
    right = [totals.reward(problems[i // n], text) > 0 for i, text in enumerate(texts)]
    return texts, np.array(right).reshape(-1, n)


def found(right, n):
    """Whether one of n answers is right: right (P, N) -> its mean, over all groups of n in N."""
    return right.reshape(len(right), -1, n).any(2).mean()


def voted(right, finals, n):
    """Whether the most frequent total of n answers is right; finals: the totals (P, N)."""
    groups = zip(right.reshape(-1, n), finals.reshape(-1, n), strict=True)
    wins = 0
    for flags, totals_of in groups:
        most, _ = Counter(totals_of.tolist()).most_common(1)[0]  # of equals the first
        wins += flags[(totals_of == most).argmax()]
    return wins / (right.size // n)


def measure(config, model, seed):
    """What each rule makes of n answers, and what a question costs: FLOPs, seconds, joules."""
    rng = random.Random(f"held out {seed}")
    problems = [totals.draw(rng, held_out=True) for _ in range(config.questions)]
    meter = Meter()
    _, greedy = answer(model, problems, 1, seed, temperature=0)
    first = meter.read()
    meter = Meter()
    texts, right = answer(model, problems, config.samples, seed)
    spent = meter.read()
    finals = np.array([text[-1:] for text in texts]).reshape(right.shape)
    row = dict(greedy=greedy.mean(), greedy_flops=first["flops"] / config.questions)
    for key, total in spent.items():
        # a prompt is read once for all: n answers cost n times what one adds to it
        if total is not None:
            row[key] = total / right.size
    row["verifier"] = [found(right, n) for n in config.ns]
    row["vote"] = [voted(right, finals, n) for n in config.ns]
    return row


# --------------------------------------------------------------------------------------------------
# The figure


def of(run, key, width):
    """A number of each seed (seeds,), or a list of each (seeds, ns)."""
    return np.array([row[key] for row in run.rows if row.get("width") == width and key in row])


def prices(config, row):
    """The FLOPs a question of 1, 2, 4 ... answers (ns,): each question is read once for all of
    them. Measured were one answer, and a share of `samples` of them.
    """
    one, share = row["greedy_flops"], row["flops"]
    reading = (one - share) * config.samples / (config.samples - 1)
    return reading + np.array(config.ns) * (one - reading)


def best_buy(config, run, rule):
    """The least FLOPs a question, of all widths and n, at which the target is reached, over those
    of the largest model's greedy answer: by seed, infinity if it never is.
    """
    ratios = []
    for seed in sorted({row["seed"] for row in run.rows if "width" in row}):
        rows = [row for row in run.rows if "width" in row and row["seed"] == seed]
        costs = [np.inf]
        for row in rows:
            reached = np.maximum.accumulate(row[rule] if rule in RULES else [row[rule]])
            if reached[-1] >= TARGET:
                logs = np.log2(prices(config, row)[: len(reached)])
                costs.append(2 ** np.interp(TARGET, reached, logs))
        ratios.append(min(costs) / rows[-1]["greedy_flops"])
    return np.array(ratios)


def figure(config, run):
    n = config.seeds
    fig, axes = plt.subplots(1, 2, figsize=(14, 5.5), layout="constrained", sharey=True)
    buys = {rule: best_buy(config, run, rule) for rule in (*RULES, "greedy")}
    for ax, rule in zip(axes, RULES, strict=True):
        for width in WIDTHS:
            rows = [row for row in run.rows if row.get("width") == width]
            flops = np.mean([prices(config, row) for row in rows], 0)  # (ns,)
            band(ax, flops, of(run, rule, width), f"{width} channels", marker=".")
            greedy = of(run, "greedy", width).mean()
            ax.plot(flops[0], greedy, "o", color=ax.lines[-1].get_color(), mfc="none", ms=9)
        ax.axhline(TARGET, color="k", lw=0.5)
        ax.set_xscale("log")
        ax.set(title=f"Kept by a {rule}", xlabel="FLOPs a question", ylim=(-0.02, 1.05))
        ax.legend(loc="lower right")
    axes[0].set_ylabel("held-out questions answered rightly (fraction)")
    told = [f"{rule} {buy.mean():.2f}" for rule, buy in buys.items()]
    fig.suptitle(
        f"{TARGET:.0%} right, in what the largest model's greedy answer costs: {', '.join(told)} "
        f"(circles: greedy; lines: 1 to {config.samples} samples; {n} seed{'s' * (n > 1)})"
    )
    return fig, judge(run, buys, n)


def judge(run, buys, n):
    gain = {rule: of(run, rule, WIDTHS[0]) for rule in RULES}  # of the smallest model
    gain = {rule: curve[:, -1] - curve[:, 0] for rule, curve in gain.items()}
    largest = of(run, "greedy", WIDTHS[-1])
    rows = [
        ("largest", "the largest model's greedy answer is right", largest, ">=", TARGET),
        ("small", "greedy: best buy over the largest", buys["greedy"], "<=", 0.5),
    ]
    for rule in RULES:
        over = buys[rule] / buys["greedy"]
        rows += [
            (f"{rule} buy", f"{rule}: best buy over the best greedy one", over, "<=", 0.99),
            (f"{rule} again", f"smallest, {rule}: all answers minus one", gain[rule], ">=", 0.3),
        ]
    return [claim(id, text, SOURCE, "-", *rest, n) for id, text, *rest in rows]


def examples(model, problems):
    texts, right = answer(model, problems, 1, seed=0, temperature=0)
    return list(zip(texts, right[:, 0].astype(float), strict=True))


def main():
    config = parse_args(Config, __doc__)
    device = pick_device(config.device)
    problems = [totals.draw(random.Random(i), held_out=True) for i in range(3)]
    with Run(config) as run:
        run.introduce(device, build(WIDTHS[-1], device).config.parameters)
        written = {}
        for seed in seeds_of(config):
            for width in WIDTHS:
                model = train(config, run, width, seed, device)
                row = partial(measure, config, model, seed)
                run.log_once(row, width=width, seed=seed, step=config.steps)
                written[f"{width} channels"] = examples(model, problems)
        run.samples([totals.prompt(problem) for problem in problems], **written)
        run.finish(*figure(config, run))


if __name__ == "__main__":
    command(main)
