"""optimizers.py: which step rules keep the coverage when answers get longer?

(The coverage principle, Chen et al., arXiv 2510.15020, Sections 4 and 5.)

    python -m experiments.optimizers        a minute
    python -m experiments.token_steps       the same model with a step after every token

An autoregressive linear model learns two prompts (the construction of the lower bound's proof).
The gradients of the loud one grow with the length H of its answers; the quiet one is seen twice in
100. SGD's step eta must shrink with H, or it bounces on the loud one (eta H B = 2.5, B the norm of
its features); where it shrinks, the quiet one stays unlearnt. Two rules take one step size for all
lengths:

    normalised      eta * g / (1 + |g|)
    distilled       the truth's probabilities are known, and the gradient of a sequence ends
                    where its divergence from the model has reached log N

What to see: the largest Cov_16 of both is far below that of SGD with the best single step size.

How this differs from the paper: there the sections are theory without experiments. Step sizes are
found by trial (normalised SGD with batches of one; distillation with longer steps than the
theorem's).
"""

import math
from dataclasses import dataclass
from functools import partial

import matplotlib.pyplot as plt
import numpy as np

from coverage import SOURCE, missed
from experiment import (
    Flags,
    Run,
    band,
    claim,
    command,
    flag,
    parse_args,
    series,
)

LENGTHS = (16, 64, 256, 1024, 4096)  # tokens of an answer
LOUD = 0.98  # the loud prompt's share of the data
B_LOUD = 35.0  # norms of the two prompts' features
B_QUIET = 14.0
# Features (prompt, token, dim) of tokens -1, 0, 1: the loud prompt has two dimensions, the quiet
# one the third
FEATURES = np.zeros((2, 3, 3))
FEATURES[0, :, :2] = [(0.6, -0.8), (1.0, 0.0), (0.6, 0.8)]
FEATURES[0] *= B_LOUD
FEATURES[1, :, 2] = [-1, 0, 1]
FEATURES[1] *= B_QUIET
TRUTH = np.array([1.0, 0.0, 1.0])  # theta (3,)
START = np.array([0.6, 0.8, 0.0])

NORMALISED_ETA = 0.2
DISTILLED_ETA = 0.002
NORMALISED = f"normalised SGD, eta = {NORMALISED_ETA}"
DISTILLED = f"distilled, truncated, eta = {DISTILLED_ETA}"


@dataclass
class Config(Flags):
    seeds: int = flag(50, "repeat over this many seeds", quick=1, low=1, high=10**4)
    steps: int = flag(800, "sequences of a pass", quick=4, low=2, high=10**6)

    def idle(self):
        return {} if self.device in ("auto", "cpu") else {"device": "numpy works on the CPU"}


# -------------------------------------------------------------------------------------------------
# The linear model


def log_probs(theta, prompt):
    """log pi_theta(token | prompt), alike at every position.

    theta (..., 3), prompt (...) -> (..., 3).
    """
    logits = FEATURES[prompt] @ theta[..., None]  # (..., 3, 1)
    logits = logits.squeeze(-1)
    logits = logits - logits.max(-1, keepdims=True)
    total = np.exp(logits).sum(-1, keepdims=True)
    return logits - np.log(total)


def project(theta):
    """theta (..., 3), its first two dimensions moved onto the unit ball, its third onto [-1, 1]."""
    theta = theta.copy()
    norm = np.linalg.norm(theta[..., :2], axis=-1, keepdims=True)
    theta[..., :2] /= np.maximum(1, norm)
    theta[..., 2] = theta[..., 2].clip(-1, 1)
    return theta


def gradient(theta, prompt, counts):
    """The log-likelihood's of sequences that hold each token `counts` (..., 3) times, in theta.

    theta (..., 3), prompt (...) -> (..., 3).
    """
    H = counts.sum(-1, keepdims=True)
    expected = np.exp(log_probs(theta, prompt)) * H
    surplus = counts - expected
    return (surplus[..., None] * FEATURES[prompt]).sum(-2)


def draw_prompts(rng, shape):
    """0 (loud) or 1 (quiet)."""
    return (rng.random(shape) >= LOUD).astype(int)


def draw(rng, H, shape):
    """Sequences of H tokens of the truth -> prompt (shape), counts of each token (*shape, 3)."""
    prompt = draw_prompts(rng, shape)
    truth = log_probs(np.broadcast_to(TRUTH, (*shape, 3)), prompt)
    return prompt, rng.multinomial(H, np.exp(truth))


def exact_coverage(theta, H, N, most=3):
    """Cov_N (...) of theta (..., 3) on answers of H tokens, by enumeration.

    Exact but for sequences with more than `most` unlikely tokens of either kind.
    """
    total = 0.0
    for prompt, share in ((0, LOUD), (1, 1 - LOUD)):
        truth = log_probs(TRUTH, prompt)
        own = log_probs(theta, np.full(theta.shape[:-1], prompt))
        likely = int(truth.argmax())
        u, v = (i for i in range(3) if i != likely)
        # i tokens u, j tokens v, the rest likely ones: so many sequences, and the chance of each
        for i in range(min(most, H) + 1):
            for j in range(min(most, H - i) + 1):
                rest = H - i - j
                log_choose = math.lgamma(H + 1) - math.lgamma(i + 1)
                log_choose = log_choose - math.lgamma(j + 1) - math.lgamma(rest + 1)
                counts = np.zeros(3)
                counts[[u, v, likely]] = i, j, rest
                chance = math.exp(log_choose + counts @ truth)
                log_ratio = (truth - own) @ counts
                total = total + share * chance * missed(log_ratio, N)
    return total


# -------------------------------------------------------------------------------------------------
# Steps on whole sequences


def truncated_weights(e, A):
    """Weights alpha_h (..., H) of tokens with divergences e_h: 1 while their running sum is at most
    A, a fraction where it crosses, then 0.

    sum alpha e = min(A, sum e): the truncated distillation gradient (Section 5).
    """
    before = np.cumsum(e, -1) - e  # what the tokens before have spent
    return np.clip((A - before) / np.maximum(e, 1e-300), 0, 1)


def linear(kind, eta, H, steps, seeds, seed=0, N=16):
    """One pass of `steps` sequences, `seeds` times -> the mean of Cov_N over the second half of the
    iterates (seeds,).

    kind: sgd, normalised, distilled. All passes are columns of one random stream: independent, but
    none of them can be made alone.
    """
    rng = np.random.default_rng(seed)
    theta = np.tile(START, (seeds, 1))  # (seeds, 3)
    total = 0.0
    for step in range(steps):
        prompt, counts = draw(rng, H, (seeds,))
        if kind == "distilled":
            # Tokens are independent: the first ones' weights, in expectation over the order,
            # scale the counts
            truth = log_probs(np.broadcast_to(TRUTH, theta.shape), prompt)
            log_ratio = truth - log_probs(theta, prompt)
            e = (np.exp(truth) * log_ratio).sum(-1, keepdims=True)  # (seeds, 1), of each token
            weights = truncated_weights(np.broadcast_to(e, (seeds, H)), math.log(N))
            used = weights.mean(-1, keepdims=True)
            counts = counts * used
        g = gradient(theta, prompt, counts)
        if kind == "normalised":  # as long for a long sequence as for a short one
            g = g / (1 + np.linalg.norm(g, axis=-1, keepdims=True))
        theta = project(theta + eta * g)
        if step >= steps // 2:  # the first half is still on its way
            total = total + exact_coverage(theta, H, N)
    return total / (steps - steps // 2)


# -------------------------------------------------------------------------------------------------
# The figure

# SGD: name -> step sizes, one of each length
EACH = {}  # a step size for each length
for k in (0.25, 1, 2, 2.5):
    EACH[f"SGD, eta H B = {k}"] = [k / (H * B_LOUD) for H in LENGTHS]
ONE = {}  # one for all lengths, the edge (eta H B = 2) of one of them
for H in LENGTHS:
    ONE[f"SGD, eta = {2 / (H * B_LOUD):.2g}"] = [2 / (H * B_LOUD)] * 5


def measure(config, run):
    arms = [(arm, "sgd", etas) for arm, etas in EACH.items()]
    arms += [(NORMALISED, "normalised", [NORMALISED_ETA] * 5)]
    arms += [(DISTILLED, "distilled", [DISTILLED_ETA] * 5)]
    arms += [(arm, "sgd", etas) for arm, etas in ONE.items()]
    for arm, kind, etas in arms:
        for H, eta in zip(LENGTHS, etas, strict=True):
            log_cell(config, run, arm, H, partial(linear, kind, eta))


def log_cell(config, run, arm, H, measured):
    """A row for each seed. A resumed run that has them does not measure again."""
    cell = dict(arm=arm, step=H, sequences=config.steps)
    if any(cell.items() <= row.items() for row in run.rows):
        return
    cov = measured(H, config.steps, config.seeds, config.seed)
    for seed, value in enumerate(cov, config.seed):
        where = dict(arm=arm, seed=seed, step=H, sequences=config.steps)
        run.log(phase="linear", **where, **{"cov@16": value})
    print(f"{arm:<42} H {H:5d}  Cov_16 {np.mean(cov):.4f}", flush=True)
    run.keep()
    if run.due:
        run.save()


def figure(config, run):
    n = config.seeds
    everything = (*EACH, *ONE, NORMALISED, DISTILLED)
    where = dict(phase="linear", sequences=config.steps)
    cov = {
        arm: series(run, "cov@16", arm=arm, **where)[1] for arm in everything
    }  # (seeds, lengths)
    worst = {arm: y.mean(0).max() for arm, y in cov.items()}  # of all lengths
    tuned = min(EACH, key=lambda arm: cov[arm][:, -1].mean())  # at 4,096 tokens
    single = min(ONE, key=worst.get)

    fig, ax = plt.subplots(figsize=(12, 5), layout="constrained")
    for arm in (*EACH, single, NORMALISED, DISTILLED):
        label = f"{arm}, the best of {len(ONE)}" if arm == single else arm
        band(ax, LENGTHS, cov[arm], label, marker="o")
    fig.suptitle(
        f"One step size for all lengths, the largest Cov_16: SGD {worst[single]:.2g}, "
        f"normalised {worst[NORMALISED]:.2g}, distilled {worst[DISTILLED]:.2g}\n"
        f"(means of {n} seeds; SGD with the best of 4 step sizes for 4,096 tokens: "
        f"{cov[tuned][:, -1].mean():.2g})"
    )
    show_lengths(ax, LENGTHS)
    normalised = cov[NORMALISED]
    gain = cov[single].max(1) - normalised.max(1)
    tuned_gain = cov[tuned][:, -1] - normalised[:, -1]
    bounces = cov["SGD, eta H B = 2.5"].mean(0).min()
    gain_text = "one eta, largest Cov_16 of a seed: SGD minus normalised"
    tuned_text = "Cov_16 at 4,096 tokens: SGD, best eta of 4, minus normalised"
    bounce_text = "SGD at eta H B = 2.5: Cov_16, smallest of all lengths"
    normalised_text = "normalised SGD, one eta: Cov_16, largest of all lengths"
    distilled_text = "truncated distillation, one eta: Cov_16, largest of all lengths"
    rows = [
        ("one eta", gain_text, "> 0", gain, ">=", 0.01),
        ("sgd", tuned_text, ">= c H / T", tuned_gain, ">=", 0.001),
        ("bounces", bounce_text, ">= c", bounces, ">=", 0.9),
        ("normalised", normalised_text, "no H", worst[NORMALISED], "<=", 0.001),
        ("distilled", distilled_text, "no H", worst[DISTILLED], "<=", 0.005),
    ]
    claims = [claim(id, text, SOURCE, *row, n) for id, text, *row in rows]
    return fig, claims


def show_lengths(ax, lengths):
    ax.set(xlabel="tokens of an answer", xscale="log")
    ax.set_ylabel("Cov_16, mean of the second half of training")
    ax.set_yscale("symlog", linthresh=1e-3)
    ax.set_ylim(-1e-4, 1.5)
    ax.set_xticks(lengths, lengths)
    ax.minorticks_off()
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))


def main():
    config = parse_args(Config, __doc__)
    with Run(config) as run:
        run.introduce("cpu", len(START))
        measure(config, run)
        run.save()
        run.finish(*figure(config, run))


if __name__ == "__main__":
    command(main)
