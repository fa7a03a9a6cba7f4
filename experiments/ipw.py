"""ipw.py: a small model that is asked n times, or a large one that is asked once: which is the
better buy?

    python -m experiments.ipw               3 seeds, 3 minutes on two cores

Five GPTs of different widths learn the same task in as many steps (tasks/totals.py: sums modulo 5,
line by line, from demonstrations that are right). Each then answers every held-out question n times
for n = 1 to 64, and one of the n is kept: by a verifier that knows the right one, or by a vote on
the total, which asks nobody. meter.py counts what the answers cost. The idea is that of
intelligence per watt (Saad-Falcon et al., arXiv 2511.07885): accuracy over what it costs. Where the
machine tells joules, metrics.jsonl has them beside the FLOPs.

What to see: each curve begins at one answer. With a verifier those of small models climb past where
larger ones begin: how far to the left of it they do is what is saved. With a vote, what a small
model gets wrong as a rule stays wrong. The dots are greedy answers: what to beat.

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


def price_of(curve, flops, ns, target):
    """The FLOPs a question at which a curve (ns,) of accuracy reaches a target, or infinity."""
    reached = np.maximum.accumulate(curve)
    if reached[-1] < target:
        return np.inf
    return flops * 2 ** np.interp(target, reached, np.log2(ns))


def best_buy(run, rule, ns, target):
    """The cheapest model and n that answer the target's share of the questions -> by seed, what it
    costs over what the largest model costs that is asked once.
    """
    ratios = []
    for i, whole in enumerate(of(run, "flops", WIDTHS[-1])):
        prices = [
            price_of(of(run, rule, width)[i], of(run, "flops", width)[i], ns, target)
            for width in WIDTHS
        ]
        ratios.append(min(prices) / whole)
    return np.array(ratios)


def figure(config, run):
    ns, n = config.ns, config.seeds
    fig, axes = plt.subplots(1, 2, figsize=(14, 5.5), layout="constrained", sharey=True)
    buys = {rule: best_buy(run, rule, ns, TARGET) for rule in RULES}
    for ax, rule in zip(axes, RULES, strict=True):
        for width in WIDTHS:
            flops = of(run, "flops", width).mean() * np.array(ns)
            band(ax, flops, of(run, rule, width), f"{width} channels", marker=".")
            greedy = of(run, "greedy_flops", width).mean(), of(run, "greedy", width).mean()
            ax.plot(*greedy, "o", color=ax.lines[-1].get_color(), mfc="none", ms=9)
        ax.axhline(TARGET, color="k", lw=0.5)
        ax.set_xscale("log")
        title = f"{TARGET:.0%} right for {buys[rule].mean():.2f} of what the largest model costs"
        ax.set(title=f"Kept by a {rule}: {title}", xlabel="FLOPs a question", ylim=(-0.02, 1.02))
        ax.legend(loc="lower right")
    axes[0].set_ylabel("held-out questions answered rightly (fraction)")
    fig.suptitle(
        f"1 to {ns[-1]} answers of models of five sizes; circles: one greedy answer ({n} "
        f"seed{'s' * (n > 1)})"
    )
    return fig, judge(run, buys, n)


def judge(run, buys, n):
    gain = {rule: of(run, rule, WIDTHS[0]) for rule in RULES}  # of the smallest model
    gain = {rule: curve[:, -1] - curve[:, 0] for rule, curve in gain.items()}
    largest = of(run, "greedy", WIDTHS[-1])
    rows = [
        ("largest", "the largest model's greedy answer is right", largest, ">=", TARGET),
        (
            "verifier",
            "verifier: best buy over the largest, asked once",
            buys["verifier"],
            "<=",
            0.5,
        ),
        ("vote", "vote: best buy over the largest, asked once", buys["vote"], "<=", 0.5),
        ("again", "smallest, verifier: all answers minus one", gain["verifier"], ">=", 0.3),
        ("no judge", "smallest, vote: all answers minus one", gain["vote"], ">=", 0.3),
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
