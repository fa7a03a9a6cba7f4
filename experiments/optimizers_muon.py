"""optimizers_muon.py: Muon against AdamW, both at their best learning rate: how many steps does it
save, and does that last?

(Muon: Jordan et al. 2024, github.com/KellerJordan/Muon. The comparison: Wen et al., arXiv
2509.02046.)

AdamW scales each number of a gradient by itself. Muon takes a weight matrix for what it is, a map:
its step is the momentum with all singular values set to (nearly) 1, so that directions in which
gradients are small and rare move as far as the loud ones.

    m <- .95 m + .05 g        u = .05 g + .95 m (Nesterov)        G = u / |u|
    5 times:  A = G G^T,   G <- a G + (b A + c A^2) G             (Newton-Schulz)
    W <- (1 - lr decay) W - lr sqrt(max(1, rows / columns)) G

An odd polynomial of a matrix acts on its singular values alone, so no SVD is needed. The embedding
(here also the head) and the norms are left to AdamW, at one rate in both arms.

Models of pretrain.py read text of known entropy (tasks/source.py). Each arm has a full sweep of
learning rates at every budget of steps, and every run its own full decay. The speed-up: the steps
that AdamW needs for the loss of Muon, by interpolation between its budgets, over Muon's.

    python -m experiments.optimizers_muon        10 minutes of one core

What to see: Muon is ahead by a tenth of a nat or more after equal steps.

How this differs from the study: tiny models, one size, few tokens per parameter, so that the ratio
is not theirs (1.4 at most); one of AdamW's settings is swept, the others were tried on a source of
their own (see REST); float32.
"""

import math
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
from model import GPT, GPTConfig
from pretrain import loss_on
from tasks import source as text

SOURCE = "Wen et al., arXiv 2509.02046"
# learning rates of the hidden matrices that are swept; multiples of --steps that are budgets
RATES = {
    "AdamW": (0.0025, 0.005, 0.01, 0.02),
    "Muon": (0.005, 0.01, 0.02, 0.04, 0.08, 0.16),
}
BUDGETS = {"AdamW": (1, 2, 4, 8, 16, 32), "Muon": (1, 2, 4, 8)}
# The rate of all else, in both arms. On another source AdamW at 400 steps was .1 nats better with
# it than with one rate for all; betas of (.9, .99), a decay of 0 or .3 gained nothing beyond that
REST = 0.03
DECAY = 0.1
VOCAB = 64
TEST_ROWS = 512


@dataclass
class Config(Flags):
    seeds: int = flag(3, "repeat over this many seeds, each with its own source", quick=1, low=1)
    n_embd: int = flag(48, "channels", quick=16, low=8)
    steps: int = flag(100, "training steps of the smallest budget", quick=2, low=1, high=10**5)
    batch: int = flag(32, "texts per step", quick=4, low=1, high=2**12)
    # not flags: what pretrain.loss_on asks for
    block_size = 16
    dtype = "float32"


# --------------------------------------------------------------------------------------------------
# Muon


def newton_schulz(G, rounds=5):
    """G (rows, columns) with its singular values moved to about 1 (from .7 to 1.2).

    The coefficients are the ones that lift small values fastest, not ones that converge to 1.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = G if G.shape[0] <= G.shape[1] else G.T  # the smaller A of the two
    X = wide / (wide.norm() + 1e-7)  # no singular value is above 1
    for _ in range(rounds):
        A = X @ X.T
        X = a * X + (b * A + c * A @ A) @ X
    return X if wide is G else X.T


def split(model):
    """The matrices of the blocks, and all else: embedding, head, norms."""
    hidden = [p for p in model.blocks.parameters() if p.dim() == 2]
    taken = set(map(id, hidden))
    return hidden, [p for p in model.parameters() if id(p) not in taken]


class Muon(torch.optim.Optimizer):
    """Muon for the matrices `hidden`, at lr; AdamW for the `rest`, at rest_lr."""

    def __init__(self, hidden, rest, lr, rest_lr, weight_decay=DECAY):
        groups = [dict(params=hidden, lr=lr, muon=True), dict(params=rest, lr=rest_lr, muon=False)]
        super().__init__(groups, dict(weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            rule = self.muon if group["muon"] else self.adam
            for p in group["params"]:
                update = rule(self.state[p], p.grad)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(update, alpha=group["lr"])

    def muon(self, state, g, beta=0.95):
        m = state.setdefault("m", torch.zeros_like(g))
        m.lerp_(g, 1 - beta)
        # Nesterov: look ahead by the momentum that is about to be taken
        u = g.lerp(m, beta)
        rows, columns = g.shape
        return newton_schulz(u) * math.sqrt(max(1, rows / columns))

    def adam(self, state, g, betas=(0.9, 0.95), eps=1e-8):
        if not state:
            state.update(t=0, m=torch.zeros_like(g), v=torch.zeros_like(g))
        state["t"] += 1
        state["m"].lerp_(g, 1 - betas[0])
        state["v"].lerp_(g * g, 1 - betas[1])
        # both began at 0
        m = state["m"] / (1 - betas[0] ** state["t"])
        v = state["v"] / (1 - betas[1] ** state["t"])
        return m / (v.sqrt() + eps)


def build(arm, model, lr):
    """The arm's optimizer: its first group are the hidden matrices."""
    hidden, rest = split(model)
    if arm == "Muon":
        return Muon(hidden, rest, lr, REST)
    groups = [dict(params=hidden, lr=lr), dict(params=rest, lr=REST)]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=DECAY, fused=True)


# --------------------------------------------------------------------------------------------------
# Training


def shape_of(config):
    return GPTConfig(VOCAB, config.block_size, 1, 2, config.n_embd, qk_norm=True)


def train(config, run, device, source, texts, test, arm, seed, steps, lr):
    """A model from scratch, one pass over the first texts (rows, T + 1) -> its distance from the
    entropy on the test (rows, T + 1).
    """
    torch.manual_seed(seed)
    model = GPT(shape_of(config)).to(device)
    optimizer = build(arm, model, lr)
    length = config.block_size + 1
    phase = f"{arm} {seed}, {steps} steps, lr {lr:g}"
    # nothing is drawn here: the loop saves a random stream all the same
    for step in run.loop(phase, steps, model, optimizer, random.Random(seed)):
        for group, peak in zip(optimizer.param_groups, (lr, REST), strict=True):
            group["lr"] = lr_at(step, steps, peak)
        starts = range(step * config.batch * length, (step + 1) * config.batch * length, length)
        loss = loss_on(config, model.hidden, model.lm_head.weight, texts.flatten(), starts)
        optimizer.zero_grad()
        loss.backward()
        descend(optimizer, loss)
    run.state.pop(phase)  # done: of 150 models none is needed again
    with torch.no_grad():
        logq = torch.log_softmax(model(test[:, :-1].to(device)), -1).cpu()
    return dict(excess=text.excess(source, test, logq))


def measure(config, run, device):
    for seed in seeds_of(config):
        source = text.make(seed, VOCAB)
        run.log_once(partial(about, source), phase="source", seed=seed, step=0)
        generator = torch.Generator().manual_seed(seed)
        length = config.block_size + 1
        test = text.draw(source, generator, TEST_ROWS, length)
        rows = config.steps * config.batch * max(BUDGETS["AdamW"])
        texts = text.draw(source, generator, rows, length)
        for arm, budgets in BUDGETS.items():
            for budget in budgets:
                for lr in RATES[arm]:
                    steps = budget * config.steps
                    cell = (config, run, device, source, texts, test, arm, seed, steps, lr)
                    run.log_once(
                        partial(train, *cell), phase="train", arm=arm, seed=seed, step=steps, lr=lr
                    )


def about(source):
    return dict(entropy=text.entropy(source))


# --------------------------------------------------------------------------------------------------
# The figure


def swept(config, run, arm):
    """The excess of every run (budgets, rates, seeds)."""
    cells = {
        (row["step"], row["lr"], row["seed"]): row["excess"]
        for row in run.rows
        if row.get("arm") == arm
    }
    return np.array(
        [
            [[cells[b * config.steps, lr, seed] for seed in seeds_of(config)] for lr in RATES[arm]]
            for b in BUDGETS[arm]
        ]
    )


def speed_up(steps, excess, rival_steps, rival_excess):
    """The steps that a rival needs for the same excess, over ours, at each of our budgets.

    Its own budgets (n,) are joined by straight lines, log against log. What lies beyond its largest
    counts as that: a bound from below.
    """
    x = np.log(rival_excess[::-1])  # interp wants it to rise
    needed = np.exp(np.interp(np.log(excess), x, np.log(rival_steps[::-1])))
    return needed / steps


def best_of(config, run, arm):
    """The best rate of each budget, for the mean of the seeds (budgets,), and the excess there
    (budgets, seeds).
    """
    excess = swept(config, run, arm)
    best = excess.mean(-1).argmin(1)
    return best, excess[np.arange(len(best)), best]


def figure(config, run):
    steps = {arm: config.steps * np.array(budgets) for arm, budgets in BUDGETS.items()}
    fig, axes = plt.subplots(1, 3, figsize=(15, 4.8), layout="constrained")
    tuned, beyond = {}, []
    for arm, style, colours in (("AdamW", "o-", plt.cm.Blues), ("Muon", "s--", plt.cm.Oranges)):
        best, tuned[arm] = best_of(config, run, arm)
        beyond += [min(i, len(RATES[arm]) - 1 - i) for i in best]
        shades = colours(np.linspace(0.35, 0.95, len(best)))
        for n, y, shade in zip(steps[arm], swept(config, run, arm).mean(-1), shades, strict=True):
            axes[0].loglog(RATES[arm], y, style, color=shade, label=f"{arm}, {n:,} steps")
        band(axes[1], steps[arm], tuned[arm].T, arm, marker="o", color=shades[-2])
    axes[0].set(title="Every budget has its own sweep", xlabel="peak rate of the hidden matrices")
    axes[1].set(title="Each at its best rate", xlabel="training steps, fully decayed")
    axes[1].set(xscale="log", yscale="log")

    gap = tuned["AdamW"][: len(steps["Muon"])] - tuned["Muon"]  # (budgets, seeds)
    # the best so far: more steps at a worse rate are no reason to need more of them
    rival = np.minimum.accumulate(tuned["AdamW"])
    ours = tuned["Muon"].T
    ratio = [
        speed_up(steps["Muon"], y, steps["AdamW"], r) for y, r in zip(ours, rival.T, strict=True)
    ]
    ratio = np.array(ratio)  # (seeds, budgets)
    band(axes[2], steps["Muon"], ratio, "AdamW's steps for Muon's loss / Muon's", marker="o")
    axes[2].axhline(1, color="grey", ls=":", label="no speed-up")
    axes[2].set(title="The speed-up", xlabel="Muon's steps", ylabel="ratio of steps", xscale="log")
    for ax in axes:
        ax.set(ylabel=ax.get_ylabel() or "nats per token above the entropy")
        ax.legend(fontsize="small")
    first, last = ratio.mean(0)[[0, -1]]
    fig.suptitle(
        f"AdamW needs {first:.2f} times the steps that Muon needs at {steps['Muon'][0]}, "
        f"{last:.2f} times at {steps['Muon'][-1]} ({config.seeds} seeds)"
    )
    least = gap.mean(1).argmin()
    growth = np.diff(ratio)
    largest = growth[:, growth.mean(0).argmax()]
    trend = ratio[:, -1] - ratio[:, 0]
    at = f"nats ahead of AdamW at equal steps, least of 4 budgets: {steps['Muon'][least]} steps"
    beyond_text = "grid points on either side of the best rate, least of all sweeps"
    rows = [
        ("interior", beyond_text, "-", min(beyond), ">=", 1),
        ("gap", at, "-", gap[least], ">=", 0.1),
        ("falls", "ratio of steps, largest budget minus smallest", "shrinks", trend, "<", 0),
        ("monotone", "ratio of steps, largest rise to the next budget", "-", largest, "<", 0),
    ]
    return fig, [claim(id, what, SOURCE, *row, config.seeds) for id, what, *row in rows]


def main():
    config = parse_args(Config, __doc__)
    device = pick_device(config.device)
    shape = shape_of(config)  # an impossible one ends here
    with Run(config) as run:
        run.introduce(device, shape.parameters)
        measure(config, run, device)
        run.finish(*figure(config, run))


if __name__ == "__main__":
    command(main)
