"""isoflop.py: how large should a model be for the compute there is, and what will it reach? From
runs that are cheap, with an answer that is known.

(Hoffmann et al. 2022, "Chinchilla", arXiv 2203.15556, approaches 2 and 3.)

Training a model of N weights on D tokens takes C = (6 N + attention) D operations. Five budgets C
are each spent on five sizes: too small a model has not the room, too large a one sees not the text.
Two ways to find the best size between them, and where all this leads:

    parabola     a parabola in log N through the losses of each budget; its lowest points N*(C) and
                 L*(C) are then fitted by  log N* = n log C + const  and  L* = E + K / C^k
    parametric   L = E + A / N^a + B / D^b  through all runs; for a budget, its least value

E is what no size and no text removes: the entropy. Here text comes from a source of known entropy
(tasks/source.py), so E can be checked. Both ways then predict the loss at four times the largest
budget, a model of the size that the first one calls best is trained, and they are held to it.

    python -m experiments.isoflop        8 minutes of one core

What to see: a valley at each budget, its lowest point further right and lower at each.

How this differs from the paper: N counts the matrices that multiply (blocks and head); Muon
(experiments/optimizers_muon.py) for AdamW, its rate falls with the steps, the batch rises with the
root of the tokens: both by trial on another source; plain least squares instead of Huber's loss.
"""

import itertools
import random
from dataclasses import dataclass
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import torch

from experiment import (
    Flags,
    Run,
    band,
    claim,
    command,
    descend,
    flag,
    lr_at,
    parse_args,
    pick_device,
    seeds_of,
)
from experiments.optimizers_muon import Muon, split
from model import GPT, GPTConfig
from pretrain import loss_on
from tasks import source as text

SOURCE = "Hoffmann et al., arXiv 2203.15556"
BUDGETS = (1, 3, 9, 27, 81)  # times --flops
CHECK = 4 * BUDGETS[-1]
WIDTHS = (8, 12, 16, 20, 24, 32, 40, 48, 64)  # the i-th budget is spent on five, from the i-th on
VOCAB = 32
TEST_ROWS = 1024
EXPONENTS = np.arange(0.05, 1.5, 0.025)


@dataclass
class Config(Flags):
    seeds: int = flag(3, "repeat over this many seeds, each with its own source", quick=1, low=1)
    flops: float = flag(2e9, "the smallest budget, in operations", quick=2e6, low=1e6, high=1e15)
    # not flags: what pretrain.loss_on asks for
    block_size = 16
    dtype = "float32"


# --------------------------------------------------------------------------------------------------
# What a run costs


def shape_of(config, width):
    return GPTConfig(VOCAB, config.block_size, 1, 2, width, qk_norm=True)


def weights(shape):
    """N: the weights that each token is multiplied with, in the blocks and in the head."""
    C, D = shape.n_embd, shape.head_dim
    attention = (2 * shape.n_head + 2 * shape.n_kv_head) * D * C
    return shape.n_layer * (attention + 3 * C * shape.n_hidden) + shape.vocab_size * C


def flops_per_token(shape):
    """Operations of a forward and a backward pass, per token.

    A weight is multiplied and added (2), and twice more in the backward pass: once for the gradient
    of its input, once for its own. So are query with key and weight with value, at each position.
    """
    looks = shape.n_layer * 2 * shape.block_size * shape.n_head * shape.head_dim
    return 6 * (weights(shape) + looks)


def plan(config, width, budget):
    """Texts per step and steps that a budget buys: both rise with the root of the tokens."""
    tokens = budget / flops_per_token(shape_of(config, width))
    rows = max(4, round(0.1 * tokens**0.5))
    return rows, max(1, round(tokens / rows / config.block_size))


# --------------------------------------------------------------------------------------------------
# Training


def train(config, run, device, source, seed, budget, width):
    """A model of that width, trained for the budget -> what it cost, and its loss."""
    shape = shape_of(config, width)
    rows, steps = plan(config, width, budget)
    length = config.block_size + 1
    generator = torch.Generator().manual_seed(seed)
    test = text.draw(source, generator, TEST_ROWS, length)
    texts = text.draw(source, generator, rows * steps, length).flatten()
    torch.manual_seed(seed)
    model = GPT(shape).to(device)
    peaks = min(0.1, 10 / steps), 0.1
    optimizer = Muon(*split(model), *peaks)
    phase = f"{budget:.2g} operations, {width} channels, seed {seed}"
    # nothing is drawn here: the loop saves a random stream all the same
    for step in run.loop(phase, steps, model, optimizer, random.Random(seed)):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = lr_at(step, steps, peak)
        starts = range(step * rows * length, (step + 1) * rows * length, length)
        loss = loss_on(config, model.hidden, model.lm_head.weight, texts, starts)
        optimizer.zero_grad()
        loss.backward()
        descend(optimizer, loss)
    run.state.pop(phase)  # done: this model is not needed again
    with torch.no_grad():
        logq = torch.log_softmax(model(test[:, :-1].to(device)), -1).cpu()
    entropy = text.entropy(source)
    tokens = rows * steps * config.block_size
    cost = dict(step=steps, weights=weights(shape), tokens=tokens)
    return dict(**cost, entropy=entropy, loss=entropy + text.excess(source, test, logq))


def measure(config, run, device):
    for seed in seeds_of(config):
        source = text.make(seed, VOCAB)
        for i, factor in enumerate(BUDGETS):
            for width in WIDTHS[i : i + 5]:
                cell = partial(train, config, run, device, source, seed, factor * config.flops)
                where = dict(phase="train", seed=seed, budget=factor, width=width)
                run.log_once(partial(cell, width), **where)
        # the size that the valleys say is best; heads are even
        line = laws(config, run, seed)[3]
        N = np.exp(np.polyval(line, np.log(CHECK * config.flops)))
        width = min(range(8, 257, 4), key=lambda w: abs(weights(shape_of(config, w)) - N))
        cell = partial(train, config, run, device, source, seed, CHECK * config.flops, width)
        run.log_once(cell, phase="check", seed=seed, budget=CHECK, width=width)


# --------------------------------------------------------------------------------------------------
# The fits


def valley(N, L):
    """The lowest point of the parabola in log N through the losses -> log N*, L*.

    Where it opens downwards there is none: the lowest run instead.
    """
    x = np.log(N)
    bend, slope, level = np.polyfit(x, L, 2)
    if bend <= 0:
        return x[L.argmin()], L.min()
    return -slope / (2 * bend), level - slope**2 / (4 * bend)


def fit(L, *xs):
    """Least squares of L (n,) = E + sum_i A_i / x_i^e_i with A_i >= 0 -> E, [A_i], [e_i].

    Given the exponents it is linear in all else, so only they are searched.
    """
    best = np.inf, None
    for exponents in itertools.product(EXPONENTS, repeat=len(xs)):
        terms = [x**-e for x, e in zip(xs, exponents, strict=True)]
        X = np.stack([np.ones_like(L), *terms], 1)
        scale = X.max(0)
        solution = np.linalg.lstsq(X / scale, L, rcond=None)[0] / scale
        error = ((X @ solution - L) ** 2).sum()
        if error < best[0] and (solution[1:] >= 0).all():
            best = error, (solution[0], solution[1:], exponents)
    return best[1]


def predict(law, *xs):
    E, A, exponents = law
    return E + sum(a / x**e for a, x, e in zip(A, xs, exponents, strict=True))


def laws(config, run, seed):
    """What a seed's runs say -> their N and L (budgets, sizes), the valleys' L*, and three laws: of
    log N* (a line in log C), of L* (see `fit`), of all runs (the same).
    """
    rows = [row for row in run.rows if row["phase"] == "train" and row["seed"] == seed]
    cells = [[row[key] for row in rows] for key in ("weights", "tokens", "loss")]
    N, D, L = np.array(cells, dtype=float).reshape(3, len(BUDGETS), -1)
    C = config.flops * np.array(BUDGETS)
    sizes, lowest = np.array([valley(n, y) for n, y in zip(N, L, strict=True)]).T
    line = np.polyfit(np.log(C), sizes, 1)
    return N, L, lowest, line, fit(lowest, C), fit(L.flatten(), N.flatten(), D.flatten())


def figure(config, run):
    C = config.flops * np.array(BUDGETS)
    wide = np.geomspace(C[0], config.flops * CHECK)
    checks = [row for row in run.rows if row["phase"] == "check"]
    entropy = np.array([row["entropy"] for row in checks])
    reached = np.array([row["loss"] for row in checks])
    N, L, lowest, line, curve, law = zip(
        *(laws(config, run, seed) for seed in seeds_of(config)), strict=True
    )
    ours = np.array([predict(c, config.flops * CHECK) for c in curve])
    pairs = zip(law, checks, strict=True)
    theirs = np.array([predict(p, row["weights"], row["tokens"]) for p, row in pairs])
    E = np.array([c[0] for c in curve]), np.array([p[0] for p in law])
    # exponents of the best size: for the parametric law, where A/N^a + B/D^b is least at N D = C
    grows = np.array([slope for slope, _ in line])
    grows_too = np.array([b / (a + b) for _, _, (a, b) in law])

    fig, axes = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
    above = np.array(L) - entropy[:, None, None]  # (seeds, budgets, sizes)
    for n, y, budget in zip(N[0], above.transpose(1, 0, 2), C, strict=True):
        band(axes[0], n, y, f"{budget:.2g} operations", marker="o", ls="none")
        x = np.geomspace(n[0], n[-1])
        parabola = np.polyval(np.polyfit(np.log(n), y.mean(0), 2), np.log(x))
        axes[0].plot(x, parabola, color=axes[0].lines[-1].get_color())
    axes[0].set(xscale="log", xlabel="weights N", title="A valley at each budget")
    band(axes[1], C, np.array(lowest) - entropy[:, None], "lowest points", marker="o", ls="none")
    drawn = np.array([predict(c, wide) for c in curve]) - entropy[:, None]
    band(axes[1], wide, drawn, "their power law", color="tab:blue")
    far = np.full(config.seeds, config.flops * CHECK)
    axes[1].plot(far, reached - entropy, "k*", ms=10, label="the check: one run a seed")
    axes[1].plot(far, theirs - entropy, "r+", ms=10, label="parametric prediction of it")
    axes[1].axhline(0, color="grey", label="entropy of the source")
    for e, name, colour in zip(E, ("power law", "parametric"), ("tab:blue", "red"), strict=True):
        gap = (e - entropy).mean()
        axes[1].axhline(gap, color=colour, ls=":", label=f"E of the {name}: {gap:+.3f}")
    axes[1].set(xscale="log", xlabel="operations C", title="Four times further")
    for ax in axes:
        ax.set_ylabel("nats per token above the entropy")
        ax.legend(fontsize="small")
    off = abs(ours - reached)
    fig.suptitle(
        f"Predicted at 4 times the largest budget: {off.mean():.3f} nats off "
        f"(parametric {abs(theirs - reached).mean():.3f}); the best size grows as "
        f"C^{grows.mean():.2f} (parametric {grows_too.mean():.2f})"
    )
    inside = [((y.argmin(1) > 0) & (y.argmin(1) < y.shape[1] - 1)).sum() for y in L]
    rows = [
        ("valleys", "budgets of 5 whose lowest run is not at an end", inside, ">=", 5),
        ("entropy", "E from the valleys, off the entropy (nats)", abs(E[0] - entropy), "<=", 0.03),
        ("entropy 2", "E of the parametric law, the same", abs(E[1] - entropy), "<=", 0.03),
        ("check", "valleys' prediction at 4 times the budget, off (nats)", off, "<=", 0.03),
        ("check 2", "parametric prediction, the same", abs(theirs - reached), "<=", 0.03),
        ("sizes", "exponents of the best size, apart", abs(grows - grows_too), "<=", 0.1),
    ]
    return fig, [claim(id, what, SOURCE, "-", *row, config.seeds) for id, what, *row in rows]


def main():
    config = parse_args(Config, __doc__)
    device = pick_device(config.device)
    with Run(config) as run:
        run.introduce(device, shape_of(config, WIDTHS[-1]).parameters)
        measure(config, run, device)
        run.finish(*figure(config, run))


if __name__ == "__main__":
    command(main)
