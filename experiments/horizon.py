"""horizon.py: is a longer answer harder to learn? By the KL it is; by coverage not, up to a point.

(The coverage principle, Chen et al., arXiv 2510.15020, Section 3.)

    python -m experiments.horizon           a second

A table of a thousand prompts, each with one answer of H tokens, is learnt by counting. A prompt
that was never drawn costs log-probability at every token, so that the KL grows with H; but its
answer is missed only once (Cov_N does not ask by how much). Beside it a coin that is nearly always
tails: after 20 throws its KL is infinite in most runs, and Cov_2 small.

What to see: Cov_16 stays what it is up to about a hundred tokens. From there on the smoothing of
the counts loses the prompts drawn once, too, and the first claim fails: for this learner coverage
is free of the length up to a point.

How this differs from the paper: there a transformer learns graphs of growing depth.
"""

from dataclasses import dataclass
from functools import partial

import matplotlib.pyplot as plt
import numpy as np

from coverage import SOURCE, coverage, kl_bound
from experiment import (
    Flags,
    Run,
    band,
    claim,
    command,
    flag,
    parse_args,
    seeds_of,
    series,
)

LENGTHS = (8, 16, 32, 64, 128, 256)  # tokens of an answer
DRAWS = (500, 2000, 8000)  # of the table
THROWS = (20, 50, 100, 200, 500)  # of the coin


@dataclass
class Config(Flags):
    seeds: int = flag(5, "repeat over this many seeds", quick=1, low=1)

    def idle(self):
        return {} if self.device in ("auto", "cpu") else {"device": "numpy works on the CPU"}


def table(H, n, seed, prompts=1000, V=4, a=0.01):
    """1,000 prompts of Zipf frequencies, each with one answer of H tokens of V, learnt by counting
    n draws with a little smoothing -> KL, Cov_16.

    The smoothing costs a prompt that was drawn once a factor of 1.03 a token: from 95 tokens on
    these are lost to Cov_16, too (those drawn twice: from 187 on).
    """
    p = 1 / np.arange(1, prompts + 1)
    p /= p.sum()
    rng = np.random.default_rng([seed, n, H])
    count = rng.multinomial(n, p)
    # At each token the data are sure, and the table gives (count + a) / (count + V a)
    ratio = (count + V * a) / (count + a)
    log_ratio = H * np.log(ratio)
    return {"kl": p @ log_ratio, "cov@16": coverage(log_ratio, 16, p)}


def coin(n, seed, p=0.01, runs=20_000):
    """Maximum likelihood of a coin from n throws -> how often its KL is infinite, mean of Cov_2."""
    rng = np.random.default_rng([seed, n])
    q = rng.binomial(n, p, runs) / n  # (runs,): the heads seen
    heads_missed = p >= 2 * q
    tails_missed = 1 - p >= 2 * (1 - q)
    cov = p * heads_missed + (1 - p) * tails_missed
    never_seen = (q == 0) | (q == 1)
    return {"kl_infinite": never_seen.mean(), "cov@2": cov.mean()}


def measure(config, run):
    for seed in seeds_of(config):
        for n in DRAWS:
            for H in LENGTHS:
                where = dict(phase="table", seed=seed, draws=n, step=H)
                run.log_once(partial(table, H, n, seed), **where)
        for n in THROWS:
            run.log_once(partial(coin, n, seed), phase="coin", seed=seed, step=n)


def figure(config, run):
    fig, axes = plt.subplots(1, 3, figsize=(16, 5), layout="constrained")
    cov = {n: series(run, "cov@16", phase="table", draws=n)[1] for n in DRAWS}  # (seeds, lengths)
    kl = {n: series(run, "kl", phase="table", draws=n)[1] for n in DRAWS}
    draw_table(axes[0], axes[1], kl, cov)
    draw_coin(axes[2], run)
    for ax in axes:
        ax.minorticks_off()
        ax.legend()
    axes[1].legend(loc="upper left", bbox_to_anchor=(0, 0.85))
    n = config.seeds
    fig.suptitle(
        f"Answers 8 times as long, after 2,000 draws: {times(kl, 64):.1f} times the KL, "
        f"{times(cov, 64):.2f} times the Cov_16 ({n} seed{'s' if n > 1 else ''})"
    )
    longer = cov[2000][:, -1] / cov[2000][:, 0]
    at_64 = {draws: y[:, LENGTHS.index(64)] for draws, y in cov.items()}
    more = at_64[8000] / at_64[500]
    longer_text = "Cov_16 at 256 tokens over that at 8, 2,000 draws"
    more_text = "Cov_16 after 8,000 draws over that after 500, 64 tokens"
    return fig, [
        claim("coverage", longer_text, SOURCE, "constant", longer, "<=", 1.1, n),
        claim("draws", more_text, SOURCE, "about 1 / n", more, "<=", 0.12, n),
    ]


def times(y, H):
    """What a curve (seeds, lengths) after 2,000 draws is at H tokens, over what it is at 8."""
    mean = y[2000].mean(0)
    return mean[LENGTHS.index(H)] / mean[0]


def draw_table(left, right, kl, cov):
    for n in DRAWS:
        band(left, LENGTHS, kl[n], f"{n} draws", marker="o")
        band(right, LENGTHS, cov[n], f"{n} draws", marker="o")
    right.axvline(95, color="k", lw=0.5, label="drawn once: lost from here (see `table`)")
    bound = kl_bound(kl[2000].mean(0), 16)
    right.plot(LENGTHS, bound.clip(max=1), "k:", label="bound by the KL, 2000 draws")
    left.set(ylabel="KL (nats)", yscale="log")
    right.set(ylabel="Cov_16", ylim=(0, 1.02))
    for ax, name, y in ((left, "KL", kl), (right, "Cov_16", cov)):
        longer = f"x {times(y, 64):.2f}, to 256 x {times(y, 256):.1f}"
        ax.set_title(f"{name}: from 8 to 64 tokens {longer}")
        ax.set(xlabel="tokens of an answer", xscale="log")
        ax.set_xticks(LENGTHS, LENGTHS)


def draw_coin(ax, run):
    infinite = series(run, "kl_infinite", phase="coin")[1]  # (seeds, throws)
    cov = series(run, "cov@2", phase="coin")[1]
    band(ax, THROWS, infinite, "KL is infinite", marker="o")
    band(ax, THROWS, cov, "Cov_2", marker="o")
    after_20 = f"KL infinite in {infinite.mean(0)[0]:.0%}, Cov_2 {cov.mean(0)[0]:.3f}"
    ax.set_title(f"A coin, 20 throws: {after_20}")
    ax.set(xlabel="throws of a coin that shows heads once in 100", xscale="log")
    ax.set(ylabel="probability; mean", ylim=(0, 1))
    ax.set_xticks(THROWS, THROWS)


def main():
    config = parse_args(Config, __doc__)
    with Run(config) as run:
        run.introduce("cpu", 1000)
        measure(config, run)
        run.save()
        run.finish(*figure(config, run))


if __name__ == "__main__":
    command(main)
