"""negatives.py: what are negative rewards worth? A table of logits, where all is exact, and one
update a batch beside 16.

(The p^k model of e3, Setlur et al., arXiv 2506.09026, Section 4.) An episode draws guesses until
one is right or it draws `stop`; p is the success of a guess, k their number. Raising p or k?

`full` means rewards of 1 and -1 (or advantages of both signs), `masked` has no negative ones. With
rewards of 0 and 1 and advantages that sum to 0 in a group, a prompt of success p has

    E[masked gradient] = (1 - p) E[full gradient],         because E[grad log pi] = 0.

So one on-policy update a batch follows the same path with and without negatives, at another speed.
They part where a batch is used several times, and what parts them is PPO's clip.

    python -m experiments.negatives         half a minute of one core

What to see: both arms learn to go on first, to be right later. Negatives halve the time, by
doubling the step. At equal success the entropies are the same with one update a batch, apart with
16 under the clip, the same with 16 without it.

How this differs from the paper: 30 guesses and 60 draws for 100 and 100; logits start within .3 of
0 for 3, stop at 1.5 for 4, the right guess at -3 for -4 (with the paper's an episode begins at 7
draws, in its figure at 15); 256 episodes a step at a rate of 30 for one at .01. The second task,
with 5 right guesses of 30, group advantages and several updates a batch, is not the paper's.
"""

import math
from dataclasses import dataclass
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import torch

from curriculum import SOURCE, told
from experiment import Flags, Run, band, claim, command, flag, parse_args, seeds_of
from tasks.guesses import pk_exact, pk_gradient, pk_sample, pk_start, pk_sums

ARMS = ("full", "masked")
LEVELS = np.linspace(0.05, 0.95, 19)  # of success
AT = -2  # the level of the claims: .9
# updates a batch, batches, learning rate, clip
REGIMES = {
    "1 update": (1, 200, 10.0, 0.2),
    "16 updates, clipped": (16, 80, 3.0, 0.2),
    "16 updates, no clip": (16, 40, 3.0, math.inf),
}


@dataclass
class Config(Flags):
    seeds: int = flag(8, "repeat over this many seeds (the first task: over five)", quick=1, low=1)
    steps: int = flag(800, "steps of the first task", quick=20, low=10)

    def idle(self):
        if self.device in ("auto", "cpu"):
            return {}
        return {"device": "a table needs the CPU alone"}


# --------------------------------------------------------------------------------------------------
# The method, on a table of logits


def pk_train(masked, seed, K=30, budget=60, lr=30.0, n=256, steps=1500):
    """Gradient ascent with rewards of 1 and -1 and no baseline; masked: 1 and 0 -> success, length,
    entropy at each step (steps, 3).

    As E[grad log pi] = 0 the masked gradient has half the mean of the full one: the direction is
    the same, the step is half as long.
    """
    M = pk_start(K, seed=seed)
    rng = np.random.default_rng(seed)
    path = []
    for _ in range(steps):
        draws, right, lengths = pk_sample(M, 1, budget, n, rng)
        p = M.softmax(-1)
        visits = torch.as_tensor(np.bincount(draws[1], minlength=K)).double()  # (K,)
        entropy = -(p * p.log()).sum(1) @ (visits / visits.sum())
        path.append((right.mean(), lengths.mean(), entropy.item()))
        rewards = np.where(right, 1.0, 0.0 if masked else -1.0)  # (n,)
        sums = pk_sums(M, draws, rewards)
        M = M + lr * pk_gradient(M, sums) / draws.shape[1]
    return np.array(path)


def pk_reuse(
    masked,
    seed,
    updates,
    batches,
    lr,
    eps=0.2,
    right=5,
    K=30,
    budget=40,
    groups=8,
    size=8,
):
    """GRPO on one prompt with `right` right answers; each batch gives `updates` steps of gradient
    ascent, under PPO's clip (eps; inf: without) -> `pk_exact` before each batch and at the end
    (batches + 1, 4).

    A table's ratio is one number for each (last, next), so that PPO's gradient needs of a batch no
    more than two tables of summed advantages.
    """
    M = pk_start(K, right, seed=seed)
    rng = np.random.default_rng(seed)
    path = []
    for _ in range(batches):
        path.append(pk_exact(M, right, budget))
        draws, success, _ = pk_sample(M, right, budget, groups * size, rng)
        rewards = success.reshape(groups, size).astype(float)
        adv = (rewards - rewards.mean(1, keepdims=True)).flatten()
        good = pk_sums(M, draws, adv.clip(0))
        bad = pk_sums(M, draws, adv.clip(max=0) * (not masked))
        old = M.softmax(-1)
        for _ in range(updates):
            rho = M.softmax(-1) / old
            # what is clipped has no gradient
            sums = rho * (good * (rho <= 1 + eps) + bad * (rho >= 1 - eps))
            M = M + lr * pk_gradient(M, sums) / len(adv)
    return np.array([*path, pk_exact(M, right, budget)])


# --------------------------------------------------------------------------------------------------
# What is measured


def steps_to(path, level=0.5, window=10):
    """The first step at which the mean success of the last `window` steps reaches the level; the
    number of steps if it never does.
    """
    mean = np.convolve(path[:, 0], np.ones(window) / window, "valid")
    reached = np.flatnonzero(mean >= level)
    return int(reached[0]) + window - 1 if len(reached) else len(path)


def at_success(success, y, levels):
    """y (n,) where success (n,), step by step, first reaches each of the levels, between two steps
    linear; nan if it never does or starts above.
    """
    best = np.maximum.accumulate(success)
    first = np.unique(best, return_index=True)[1]  # the steps that set a record
    return np.interp(levels, best[first], y[first], left=math.nan, right=math.nan)


def speed(masked, seed, steps):
    """Of a path of `pk_train`: steps to half success, growth of the draws and of the entropy up to
    their peaks; every tenth point.
    """
    path = pk_train(masked, seed, steps=steps)
    return dict(
        steps_to_half=steps_to(path),
        longer=path[:, 1].max() / path[0, 1],
        risen=path[:, 2].max() - path[0, 2],
        at=list(range(0, steps, 10)),
        draws=path[::10, 1].tolist(),
    )


def reuse(masked, seed, regime, quick):
    """Of a path of `pk_reuse`: entropy, draws, different right answers at LEVELS of success (None
    where it is never reached).
    """
    updates, batches, lr, eps = REGIMES[regime]
    path = pk_reuse(masked, seed, updates, 2 if quick else batches, lr, eps)
    row = {}
    for i, name in enumerate(("nats", "draws", "different"), 1):
        y = at_success(path[:, 0], path[:, i], LEVELS)
        row[name] = [x if math.isfinite(x) else None for x in y.tolist()]
    return row


def measure(config, run):
    for arm in ARMS:
        for seed in seeds_of(config)[:5]:
            where = dict(phase="speed", arm=arm, seed=seed, step=config.steps)
            run.log_once(partial(speed, arm == "masked", seed, config.steps), **where)
    for regime, (_, batches, *_) in REGIMES.items():
        for arm in ARMS:
            for seed in seeds_of(config):
                where = dict(phase=regime, arm=arm, seed=seed, step=batches)
                run.log_once(partial(reuse, arm == "masked", seed, regime, config.quick), **where)


def of(run, phase, arm, key):
    """A metric of each seed (seeds,) or (seeds, n)."""
    rows = [row[key] for row in run.rows if row["phase"] == phase and row["arm"] == arm]
    return np.array(rows, dtype=float)  # None: nan


def figure(config, run):
    fig, axes = plt.subplots(1, 3, figsize=(18, 5), layout="constrained")
    at = next(row["at"] for row in run.rows if row["phase"] == "speed")
    for arm in ARMS:
        draws = of(run, "speed", arm, "draws")  # (seeds, n)
        band(axes[0], at, draws, f"{arm} ({len(draws)} seeds)")
    half = {arm: of(run, "speed", arm, "steps_to_half") for arm in ARMS}
    ratio = np.median(half["masked"] / half["full"])
    longer = of(run, "speed", "full", "longer")
    axes[0].set_title(
        f"p^k model: x{longer.mean():.1f} draws at the peak; masked takes {ratio:.1f} times as long"
    )
    axes[0].set(xlabel="step", ylabel="draws per episode", ylim=(0, None))
    for ax, regime in zip((axes[1], axes[2], axes[2]), REGIMES, strict=True):
        free = "no clip" in regime
        for arm, color in zip(ARMS, ("C0", "C1"), strict=True):
            nats = of(run, regime, arm, "nats")  # (seeds, levels)
            label = f"{arm}, no clip" if free else arm
            band(ax, LEVELS, nats, label, color=color, ls=":" if free else "-")
    one, clipped, free = (apart(run, regime, "nats") for regime in REGIMES)
    axes[1].set_title(f"One update a batch, at .9: full - masked = {told(one)} nats")
    axes[2].set_title(f"16 under PPO's clip: {told(clipped)}; without it: {told(free)}")
    n = config.seeds
    for ax in axes[1:]:
        ax.set_xlabel(f"success (exact, {n} seeds)")
        ax.set_ylabel("entropy of a draw (nats, exact)")
        ax.set_ylim(0)
    for ax in axes:
        ax.legend()
    fig.suptitle(
        f"Tables of logits: at equal success negatives change the entropy by {told(one)} nats at "
        f"one update a batch, {told(clipped)} at 16 clipped ones"
    )
    return fig, claims_of(run, ratio, longer)


def apart(run, regime, key):
    """Full minus masked at .9 success, seed by seed (seeds,)."""
    return of(run, regime, "full", key)[:, AT] - of(run, regime, "masked", key)[:, AT]


def claims_of(run, ratio, longer):
    risen = of(run, "speed", "full", "risen")
    against = risen - of(run, "speed", "masked", "risen")
    one, clipped, free = (apart(run, regime, "nats") for regime in REGIMES)
    different = apart(run, "16 updates, clipped", "different")
    draws = apart(run, "16 updates, clipped", "draws")
    few = len(longer)
    many = len(one)

    def within(id, text, y):
        return claim(id, text, "derived", "0", abs(y.mean()), "<=", 0.1, many, f" ({told(y)})")

    def of_paper(id, text, paper, y, op, threshold, seeds):
        return claim(id, text, SOURCE, paper, y, op, threshold, seeds)

    # fmt: off
    return [
        of_paper("pk", f"p^k: steps to 50%, masked over full (median of {few})",
                 "masked is flat", ratio, ">=", 1.5, few),
        of_paper("pk length", "p^k, full: length at its peak over the start",
                 "3", longer, ">=", 2.5, few),
        of_paper("pk entropy", "p^k, full: rise of the entropy above its start (nats)",
                 "rises", risen, ">=", 0.05, few),
        of_paper("pk entropy masked", "p^k: rise of the entropy, full minus masked",
                 "masked is flat", against, ">", 0, few),
        within("pk one update", "entropy at equal success, full minus masked: 1 update", one),
        of_paper("pk clip", "entropy at equal success, full minus masked: 16 updates, clipped",
                 "0.095", clipped, ">=", 0.5, many),
        within("pk no clip", "entropy at equal success, full minus masked: 16 without clip", free),
        of_paper("pk clip answers", "16 clipped updates: distinct right answers, full minus masked",
                 "more", different, ">=", 0.5, many),
        of_paper("pk clip draws", "16 clipped updates: draws per episode, full minus masked",
                 "more", draws, ">", 0, many),
    ]
    # fmt: on


def main():
    config = parse_args(Config, __doc__)
    with Run(config) as run:
        measure(config, run)
        run.save()
        run.finish(*figure(config, run))


if __name__ == "__main__":
    command(main)
