"""token_steps.py: with a step after every token, does one step size do for all lengths?

(The coverage principle, Chen et al., arXiv 2510.15020, Section 5.)

    python -m experiments.token_steps       half a minute

The linear model and the two prompts of experiments/optimizers.py. SGD steps on each token instead
of on a sequence's sum, so that the length of an answer no longer makes steps longer. The sampler
does what training did: it goes on training on what it writes (test-time training), and starts anew
with each answer.

What to see: Cov_16 stays small up to 1,024 tokens.

How this differs from the paper: there the section is theory without experiments, and its steps are
shorter. 300 sequences, because it is slow.
"""

from dataclasses import dataclass
from functools import partial

import matplotlib.pyplot as plt
import numpy as np

from coverage import SOURCE, missed
from experiment import Run, band, claim, command, flag, parse_args, series
from experiments import optimizers
from experiments.optimizers import (
    LOUD,
    START,
    TRUTH,
    draw_prompts,
    gradient,
    log_probs,
    project,
)

ETA = 0.003
ARM = f"token SGD, decoded with TTT, eta = {ETA}"


@dataclass
class Config(optimizers.Config):
    steps: int = flag(300, "sequences of a pass", quick=4, low=2, high=10**6)


def lengths(config):
    """Tokens of an answer."""
    return optimizers.LENGTHS[: 2 if config.quick else 4]


def draw_tokens(rng, prompt, n):
    """n tokens of the truth for each prompt (...) -> (..., n), by inverting the CDF."""
    cdf = np.exp(log_probs(TRUTH, prompt)).cumsum(-1)[..., None, :-1]
    return (rng.random((*np.shape(prompt), n, 1)) > cdf).sum(-1)


def token_step(theta, prompt, token, eta):
    """One step on one token of each prompt.

    theta (..., 3), prompt and token (...) -> log pi_theta(token) (...), and the new theta.
    """
    counts = np.eye(3)[token]
    logp = (log_probs(theta, prompt) * counts).sum(-1)
    return logp, project(theta + eta * gradient(theta, prompt, counts))


def teacher_forced(theta, prompt, tokens, eta):
    """The log-likelihood (...) of tokens (..., H) under test-time training.

    Each token is scored, then stepped on. The caller's theta stays.
    """
    total = 0.0
    for h in range(tokens.shape[-1]):
        logp, theta = token_step(theta, prompt, tokens[..., h], eta)
        total = total + logp
    return total


def ttt_coverage(eta, H, steps, seeds, seed=0, N=16, n=4, kept=8):
    """Token-level SGD, never reset, on `steps` sequences; decoding by `teacher_forced` with the
    same eta -> Cov_N (seeds,).

    Averaged over `kept` iterates of the second half and n sequences of each prompt (nearly all
    alike: the truth is all but deterministic).
    """
    rng = np.random.default_rng(seed)
    theta = np.tile(START, (seeds, 1))
    iterates = []
    for step in range(steps):
        prompt = draw_prompts(rng, seeds)
        tokens = draw_tokens(rng, prompt, H)  # (seeds, H)
        for h in range(H):
            _, theta = token_step(theta, prompt, tokens[:, h], eta)
        if step >= steps // 2 and step % max(1, steps // 2 // kept) == 0:
            iterates.append(theta)
    theta = np.stack(iterates)[:, :, None]  # (kept, seeds, 1, 3)
    total = 0.0
    # Cov_N by sampling: the likelihood of an answer depends on the order of its tokens
    for prompt, share in ((0, LOUD), (1, 1 - LOUD)):
        tokens = draw_tokens(rng, np.full(n, prompt), H)  # (n, H)
        shape = (*theta.shape[:2], n)
        own = teacher_forced(
            np.broadcast_to(theta, (*shape, 3)),
            np.full(shape, prompt),
            np.broadcast_to(tokens, (*shape, H)),
            eta,
        )
        truth = log_probs(TRUTH, prompt)[tokens].sum(-1)
        total = total + share * missed(truth - own, N).mean((0, 2))
    return total


def measure(config, run):
    for H in lengths(config):
        optimizers.log_cell(config, run, ARM, H, partial(ttt_coverage, ETA))


def figure(config, run):
    _, cov = series(run, "cov@16", phase="linear", arm=ARM, sequences=config.steps)
    worst = cov.mean(0).max()
    fig, ax = plt.subplots(figsize=(10, 5), layout="constrained")
    band(ax, lengths(config), cov, ARM, marker="o")
    optimizers.show_lengths(ax, lengths(config))
    ax.legend()
    fig.suptitle(
        f"A step after every token, one step size for all lengths: the largest Cov_16 is "
        f"{worst:.2g}\n(means of {config.seeds} seeds, {config.steps} sequences)"
    )
    text = f"TTT decoding, one eta, {config.steps} sequences: Cov_16, largest of 16 to 1,024 tokens"
    return fig, [claim("ttt", text, SOURCE, "no H", worst, "<=", 0.005, config.seeds)]


def main():
    config = parse_args(Config, __doc__)
    with Run(config) as run:
        run.introduce("cpu", len(START))
        measure(config, run)
        run.save()
        run.finish(*figure(config, run))


if __name__ == "__main__":
    command(main)
