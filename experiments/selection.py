"""selection.py: which checkpoint to take? The best loss, or a tournament of coverage.

(The coverage principle, Chen et al., arXiv 2510.15020, Section 6.)

    python -m experiments.selection         3 minutes on two cores

The lesson (coverage.py) shows that the checkpoint with the best loss is the wrong one to sample N
answers from. Coverage itself needs the data's probabilities, which nobody has. The tournament needs
no more than validation answers y to prompts x; the lowest score wins (Eq. 29):

    score of a checkpoint p  =  max over the other checkpoints q of  Pr[ q(y|x) / p(y|x) >= N ]

The offset variant (Eq. 32) subtracts what p says of its own answers y': 2 N^a times
Pr[ q(y'|x) / p(y'|x) >= N ]. A fourth rule, a fair comparison, is Pass@8 of the validation answers:
it takes the answer that is given for the only right one, as here it is.

What to see: the tournament's checkpoint is near the top of Pass@8, that of the best validation loss
near its bottom. Pass@8 itself picks a still better one; the tournament works where a prompt has
many right answers, too.

How this differs from the paper: N = 4 and a = 0 for the offset tournament, whose theorem asks for
N^(1 - 2a) >= 8.
"""

import copy
from dataclasses import dataclass
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import torch

import coverage as lesson
from coverage import PROMPT, SOURCE, coverage, measure_logp, pass_at_k, share, spearman
from experiment import (
    NotFinite,
    Run,
    band,
    claim,
    command,
    parse_args,
    pick_device,
    seeds_of,
    series,
)
from tasks import paths

LOSS = "best validation loss"
PASS = "validation Pass@8"
TOURNAMENT = "tournament"
OFFSET = "offset"
MARKERS = {LOSS: "o", TOURNAMENT: "D", OFFSET: "s", PASS: "^"}
COLORS = {LOSS: "C3", TOURNAMENT: "C2", OFFSET: "C1", PASS: "C4"}


@dataclass
class Config(lesson.Config):
    """The lesson's."""


# -------------------------------------------------------------------------------------------------
# Tournaments


def sound(logp):
    """Which checkpoints (C,) have log-probabilities (C, n) that are all numbers.

    -inf is one: a probability of 0.
    """
    return (logp < np.inf).all(-1)


def worst_rival(score, fit):
    """score (C, C) of each checkpoint against each rival, fit (C,) -> (C,): the largest.

    A checkpoint that is not fit scores inf, and is nobody's rival.
    """
    return np.where(fit, score[:, fit].max(1, initial=-np.inf), np.inf)


def beaten(own, rivals, N):
    """Pr[rival / own >= N] from log-probabilities own (n,), rivals (C, n) -> (C,).

    Where both give 0 own is beaten, too.
    """
    with np.errstate(invalid="ignore"):
        return coverage(rivals - own, N)


def tournament(logp, N):
    """Checkpoints' log-probabilities of validation answers (C, n) -> score (C,), lower is better.

    Eq. 29. For Pass@K take N of about K / 2. Where N is too large, many score 0.
    """
    return worst_rival(np.array([beaten(own, logp, N) for own in logp]), sound(logp))


def offset_tournament(logp, own, N, a=0.0):
    """The same minus 2 N^a Pr[rival / own >= N] over the checkpoint's own answers (Eq. 32).

    own (C, C, n): own[i, j] is j's log-probability of i's answers.
    """
    scores = []
    for i in range(len(logp)):
        offset = 2 * N**a * beaten(own[i, i], own[i], N)
        scores.append(beaten(logp[i], logp, N) - offset)
    return worst_rival(np.array(scores), sound(logp) & sound(own).all(0))


def best(score, logp):
    """The checkpoint (an index) with the lowest score (C,), of equals the one with the better loss.

    logp (C, n). NotFinite if there is none whose score and log-probabilities are numbers.
    """
    fit = np.flatnonzero(sound(logp) & ~np.isnan(score))
    if not len(fit):
        raise NotFinite("no checkpoint has a score that is a number")
    return int(min(fit, key=lambda i: (score[i], -logp[i].mean())))


# -------------------------------------------------------------------------------------------------
# Checkpoints, and what each rule picks


def data(config, seed, stream, n):
    """n graphs of the data; stream: a pair of numbers, so that no two sets share a random stream."""
    classes = np.random.default_rng([seed, stream[1]]).choice(2, n, p=lesson.DATA[:2])
    return paths.graphs(np.random.default_rng([seed, stream[0]]), classes)


def fine_tune(config, run, seed, base):
    """The lesson's fine-tuning -> the model, and of its checkpoints what a selection needs:

    log-probabilities of the validation answers {step: (n,)}, and the weights of every fourth
    {step: state}.
    """
    kept = dict(valid={}, weights={})
    validation = data(config, seed, (2, 3), 2 * config.eval_prompts)

    def keep(step, model):
        kept["valid"][step] = torch.from_numpy(measure_logp(model, validation))
        if step % (4 * config.eval_every) == 0:
            kept["weights"][step] = {k: v.clone() for k, v in model.state_dict().items()}

    model = lesson.fine_tune(config, run, "cross-entropy", seed, base, keep=keep, kept=kept)
    return model, kept["valid"], kept["weights"]


def select(config, model, valid, weights, seed, N=4):
    """The steps of the checkpoints that the rules choose, offset of those with weights.

    For the offset tournament each checkpoint answers other prompts, and all of them score all
    answers.
    """
    steps = list(valid)
    logp = torch.stack(list(valid.values())).numpy()
    models = [copy.deepcopy(model) for _ in weights]
    for checkpoint, state in zip(models, weights.values(), strict=True):
        checkpoint.load_state_dict(state)
    ids = data(config, seed, (5, 6), config.eval_prompts)
    own = []
    for checkpoint in models:
        answers = lesson.sample_answers(checkpoint, ids, 1, seed)[:, 0]
        answered = np.concatenate([ids[:, :PROMPT], answers], 1)
        own.append([measure_logp(rival, answered) for rival in models])
    logp_ids = np.array([measure_logp(checkpoint, ids) for checkpoint in models])
    return {
        LOSS: steps[best(-logp.mean(1), logp)],
        PASS: steps[best(-pass_at_k(logp, 8).mean(1), logp)],
        TOURNAMENT: steps[best(tournament(logp, N), logp)],
        OFFSET: list(weights)[best(offset_tournament(logp_ids, np.array(own), N), logp_ids)],
    }


def measure(config, run, device):
    for seed in seeds_of(config):
        base = lesson.pretrain(config, run, seed, device)
        checkpoints = fine_tune(config, run, seed, base)
        where = dict(phase="picks", seed=seed, step=config.steps)
        run.log_once(partial(select, config, *checkpoints, seed), **where)


# -------------------------------------------------------------------------------------------------
# The figure


def figure(config, run):
    n = config.seeds

    def curve(key):
        return series(run, key, phase="finetune", arm="cross-entropy")[1]  # (seeds, checkpoints)

    steps, kl = series(run, "kl", phase="finetune", arm="cross-entropy")
    passed = {N: curve(f"pass@{N}") for N in (8, 16)}
    rows = [r for r in run.rows if r["phase"] == "picks" and r["step"] == config.steps]
    picks = {rule: np.array([list(steps).index(r[rule]) for r in rows]) for rule in MARKERS}

    def at(y, rule):
        """y (seeds, checkpoints) at the checkpoint that a rule picks -> (seeds,)."""
        return y[np.arange(n), picks[rule]]

    fig, axes = plt.subplots(1, 3, figsize=(17, 5), layout="constrained")
    for N, color in ((8, "C0"), (16, "C5")):
        band(axes[0], steps, passed[N], f"Pass@{N}", color=color)
        for rule, marker in MARKERS.items():
            style = dict(marker=marker, color=COLORS[rule], ec="k", zorder=3)
            label = rule if N == 8 else None
            axes[0].scatter(steps[picks[rule]], at(passed[N], rule), label=label, **style)
    axes[0].set(xlabel="step of fine-tuning", ylabel="Pass@N, exact")
    axes[0].set_title("What each rule picks")
    for ax, x, label in ((axes[1], kl, "KL (nats)"), (axes[2], curve("cov@8"), "Cov_8")):
        points = ax.scatter(x, passed[16], c=np.tile(steps, n), cmap="viridis", s=18)
        for rule, marker in MARKERS.items():
            style = dict(marker=marker, color=COLORS[rule], ec="k", s=90, label=rule)
            ax.scatter(at(x, rule), at(passed[16], rule), **style)
        correlation = np.mean([spearman(passed[16][i], x[i]) for i in range(n)])
        ax.set_title(f"Pass@16 against {label}: rank correlation {correlation:+.2f}")
        ax.set(xlabel=label, ylabel="Pass@16")
    fig.colorbar(points, ax=axes[2], label="step of fine-tuning")
    for ax in axes:
        ax.legend()
    pass8 = {rule: at(passed[8], rule) for rule in MARKERS}
    fig.suptitle(
        f"Pass@8 of the checkpoint with the best loss {pass8[LOSS].mean():.3f}, "
        f"of the tournament's {pass8[TOURNAMENT].mean():.3f} ({n} seed{'s' if n > 1 else ''})"
    )
    return fig, judge(passed[8].max(1), pass8)


def judge(best8, pass8):
    """The claims: Pass@8 of the best checkpoint (seeds,), and of each rule's pick {rule: (seeds,)}."""
    chosen, lowest = pass8[TOURNAMENT], pass8[LOSS]
    regret = share(best8 - chosen, best8 - lowest).max()
    near_best = "Pass@8 that the tournament loses, share of best loss's, worst seed"
    rival = "Pass@8, tournament minus validation Pass@8's pick"
    gain = "tournament minus best validation loss"
    fair = "fair comparison"
    offset_gain = pass8[OFFSET] - lowest
    n = len(best8)
    return [
        claim("tournament", f"Pass@8, {gain}", SOURCE, "0.04", chosen - lowest, ">=", 0.015, n),
        claim("near best", near_best, SOURCE, "at the top", regret, "<=", 0.25, n),
        claim("rival", rival, fair, "-", chosen - pass8[PASS], ">", 0, n),
        claim("offset", f"Pass@8, offset {gain}", SOURCE, "-", offset_gain, ">=", 0.015, n),
    ]


def main():
    config = parse_args(Config, __doc__)
    device = pick_device(config.device)
    parameters = lesson.build(config, device).parameters()  # an impossible shape ends here
    with Run(config) as run:
        run.introduce(device, sum(p.numel() for p in parameters))
        measure(config, run, device)
        run.finish(*figure(config, run))


if __name__ == "__main__":
    command(main)
