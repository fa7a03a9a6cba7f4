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

    python -m experiments.isoflop        7 minutes of one core

What to see: a valley at each budget, its lowest point further right and lower at each.

How this differs from the paper: N counts the matrices that multiply (blocks and head); Muon
(experiments/optimizers_muon.py) for AdamW, its rate falls with the steps, the batch rises with the
root of the tokens: both by trial on another source; plain least squares instead of Huber's loss.
"""

import itertools
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import torch

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
from experiments.optimizers_muon import Muon, read, split
from model import GPT, GPTConfig
from tasks import source as text

SOURCE = "Hoffmann et al., arXiv 2203.15556"
# a budget, in multiples of --flops -> the widths of the five models that it is spent on
SIZES = {
    1: (8, 12, 16, 24, 32),
    2.5: (12, 16, 20, 24, 32),
    6: (12, 16, 24, 32, 40),
    16: (16, 20, 24, 32, 40),
    40: (20, 24, 32, 40, 48),
}
CHECK = 160
VOCAB = 32
EXPONENTS = np.arange(0.05, 1.5, 0.025)


@dataclass
class Config(Flags):
    seeds: int = flag(3, "repeat over this many seeds, each with its own source", quick=1, low=1)
    flops: float = flag(4e9, "the smallest budget, in operations", quick=2e6, low=1e6, high=1e15)
    # not flags: what pretrain.loss_on asks for
    block_size = 16
    dtype = "float32"


# --------------------------------------------------------------------------------------------------
# What a run costs


def shape_of(config, width):
    return GPTConfig(VOCAB, config.block_size, 1, 2, width, qk_norm=True)


def weights(shape):
    """N: the weights that each token is multiplied with, in the blocks and in the head."""
    return shape.flops(1, 1, 0) // 2 + shape.vocab_size * shape.n_embd


def flops_per_token(shape):
    """Operations of a forward and a backward pass, per token.

    A weight is multiplied and added (2), and twice more in the backward pass: once for the gradient
    of its input, once for its own. So are query with key and weight with value, at each position.
    """
    head = 2 * shape.vocab_size * shape.n_embd
    return 3 * (shape.flops(1, 1, shape.block_size) + head)


def plan(config, width, budget):
    """Texts per step and steps that a budget buys: both rise with the root of the tokens."""
    tokens = budget / flops_per_token(shape_of(config, width))
    rows = max(4, round(0.1 * tokens**0.5))
    return rows, max(1, round(tokens / rows / config.block_size))


# --------------------------------------------------------------------------------------------------
# Training


def train(config, run, device, source, seed, times, width):
    """A model of that width, trained for the budget -> what it cost, and its loss."""
    shape = shape_of(config, width)
    rows, steps = plan(config, width, times * config.flops)
    length = config.block_size + 1
    generator = torch.Generator().manual_seed(seed)
    test = text.draw(source, generator, 1024, length)  # the same for all models of a seed
    texts = text.draw(source, generator, steps * rows, length)
    torch.manual_seed(seed)
    model = GPT(shape).to(device)
    optimizer = Muon(*split(model), lr=min(0.1, 10 / steps), rest_lr=0.1)
    phase = f"budget {times}, {width} channels, seed {seed}"
    read(config, run, phase, model, optimizer, texts.view(steps, -1))
    entropy = text.entropy(source)
    return dict(
        step=steps,
        weights=weights(shape),
        tokens=steps * rows * config.block_size,
        entropy=entropy,
        loss=entropy + text.excess(source, model, test.to(device)),
    )


def measure(config, run, device):
    for seed in seeds_of(config):
        source = text.make(seed, VOCAB)
        for times, widths in SIZES.items():
            for width in widths:
                log_cell(config, run, device, source, seed, times, width)
        # the size that the valleys call best; heads are even
        best = np.exp(np.polyval(laws(config, run, seed).sizes, np.log(CHECK * config.flops)))
        width = min(range(8, 257, 4), key=lambda w: abs(weights(shape_of(config, w)) - best))
        log_cell(config, run, device, source, seed, CHECK, width)


def log_cell(config, run, device, source, seed, times, width):
    where = dict(seed=seed, times=times, width=width)
    cell = partial(train, config, run, device, source, **where)
    run.log_once(cell, **where)


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
    """Least squares of L (n,) = E + sum_i A_i / x_i^e_i, with A_i >= 0 -> E, [A_i], [e_i].

    Given the exponents it is linear in all else, so only they are searched.
    """
    least = np.inf
    law = L.mean(), np.zeros(len(xs)), np.ones(len(xs))  # if nothing falls
    for exponents in itertools.product(EXPONENTS, repeat=len(xs)):
        X = np.array([np.ones_like(L), *map(np.power, xs, np.negative(exponents))])
        scale = X.max(1)  # columns of like size are solved best
        A = np.linalg.lstsq((X.T / scale), L, rcond=None)[0] / scale
        error = ((A @ X - L) ** 2).sum()
        if error < least and (A[1:] >= 0).all():
            least = error
            law = A[0], A[1:], exponents
    return law


def predict(law, *xs):
    E, A, exponents = law
    return E + sum(a / x**e for a, x, e in zip(A, xs, exponents, strict=True))


def laws(config, run, seed):
    """What a seed's runs say: N and loss (budgets, sizes), the valleys' lowest losses, and three
    laws: of log N* (a line in log C), of the lowest losses (see `fit`), of all runs (the same).
    """
    rows = [row for row in run.rows if row["seed"] == seed and row["times"] != CHECK]
    columns = [[row[key] for row in rows] for key in ("weights", "tokens", "loss")]
    N, D, L = np.reshape(columns, (3, len(SIZES), -1))
    C = config.flops * np.array([*SIZES])
    points = [valley(n, losses) for n, losses in zip(N, L, strict=True)]
    best, lowest = np.array(points).T
    return SimpleNamespace(
        N=N,
        loss=L,
        lowest=lowest,
        sizes=np.polyfit(np.log(C), best, 1),
        valleys=fit(lowest, C),
        parametric=fit(L.flatten(), N.flatten(), D.flatten()),
    )


# --------------------------------------------------------------------------------------------------
# The figure


def figure(config, run):
    C = config.flops * np.array([*SIZES, CHECK])
    checks = [row for row in run.rows if row["times"] == CHECK]
    above, lowest, curves, off, inside = [], [], [], [], []
    for seed, check in zip(seeds_of(config), checks, strict=True):
        said = laws(config, run, seed)
        H = check["entropy"]
        above.append(said.loss - H)
        lowest.append(said.lowest - H)
        curves.append(predict(said.valleys, C) - H)
        # both predictions of the check's loss
        ours = predict(said.valleys, C[-1]) - check["loss"]
        theirs = predict(said.parametric, check["weights"], check["tokens"]) - check["loss"]
        off.append([said.valleys[0] - H, said.parametric[0] - H, ours, theirs])
        at = said.loss.argmin(1)  # (budgets,), from 0 to 4
        inside.append((at % 4 > 0).sum())
    E, E2, miss, miss2 = abs(np.array(off)).T  # (seeds,) each
    reached = [check["loss"] - check["entropy"] for check in checks]

    fig, axes = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    for n, y, budget in zip(said.N, np.swapaxes(above, 0, 1), C[:-1], strict=True):
        band(axes[0], n, y, f"{budget:.2g} operations", marker="o")
    band(
        axes[1],
        C[:-1],
        np.array(lowest),
        "lowest points of the valleys",
        marker="o",
    )
    band(axes[1], C, np.array(curves), "their power law")
    far = np.full(len(checks), C[-1])
    axes[1].plot(
        far,
        reached,
        "k*",
        label="the check, one for each seed",
    )
    axes[1].axhline(0, color="grey", ls=":", label="the entropy")
    axes[0].set(title="A valley for each budget", xlabel="weights N", xscale="log")
    axes[1].set(title="Four times further", xlabel="operations C", xscale="log")
    for ax in axes:
        ax.set_ylabel("nats per token above the entropy")
        ax.legend()
    fig.suptitle(
        f"From the valleys the entropy is found within {E.mean():.3f} nats, "
        f"a loss at 4 times the budget within {miss.mean():.3f} ({config.seeds} seeds)"
    )
    rows = [
        ("valleys", "budgets of 5 whose lowest run is not at an end", inside, ">=", 5),
        ("entropy", "E of the valleys, nats off the entropy", E, "<=", 0.03),
        ("entropy 2", "E of the parametric law, nats off the entropy", E2, "<=", 0.03),
        ("check", "loss at 4 times the budget, nats off, valleys", miss, "<=", 0.03),
        ("check 2", "loss at 4 times the budget, nats off, parametric law", miss2, "<=", 0.03),
    ]
    return fig, [claim(id, what, SOURCE, "-", *row, config.seeds) for id, what, *row in rows]


def main():
    config = parse_args(Config, __doc__)
    device = pick_device(config.device)
    with Run(config) as run:
        run.introduce(device, shape_of(config, SIZES[40][-1]).parameters)
        measure(config, run, device)
        run.finish(*figure(config, run))


if __name__ == "__main__":
    command(main)
