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
from coverage import (
    PROMPT,
    SOURCE,
    coverage,
    measure_logp,
    pass_at_k,
    share,
    spearman_of_seeds,
)
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
STYLES = {
    LOSS: dict(marker="o", color="C3", ec="k", zorder=3),
    TOURNAMENT: dict(marker="D", color="C2", ec="k", zorder=3),
    OFFSET: dict(marker="s", color="C1", ec="k", zorder=3),
    PASS: dict(marker="^", color="C4", ec="k", zorder=3),
}


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
    worst = score[:, fit].max(1, initial=-np.inf)
    return np.where(fit, worst, np.inf)


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
    scores = [beaten(own, logp, N) for own in logp]
    return worst_rival(np.array(scores), sound(logp))


def offset_tournament(logp, own, N, a=0.0):
    """The same minus 2 N^a Pr[rival / own >= N] over the checkpoint's own answers (Eq. 32).

    own (C, C, n): own[i, j] is j's log-probability of i's answers.
    """
    scores = []
    for i in range(len(logp)):
        # A rival that is surer of everything, p's own answers too, is not the better one for it
        beaten_at_home = beaten(own[i, i], own[i], N)
        offset = 2 * N**a * beaten_at_home
        scores.append(beaten(logp[i], logp, N) - offset)
    fit = sound(logp) & sound(own).all(0)
    return worst_rival(np.array(scores), fit)


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
    """n graphs of the data. stream: two numbers, so that no two sets share a random stream."""
    of_graphs, of_classes = stream
    rng = np.random.default_rng([seed, of_classes])
    classes = rng.choice(2, n, p=lesson.DATA[:2])
    rng = np.random.default_rng([seed, of_graphs])
    return paths.graphs(rng, classes)


def fine_tune(config, run, seed, base):
    """The lesson's fine-tuning -> the model, and of its checkpoints what a selection needs:

    log-probabilities of the validation answers {step: (n,)}, and the weights of every fourth
    {step: state}.
    """
    kept = dict(valid={}, weights={})
    validation = data(config, seed, (2, 3), 2 * config.eval_prompts)

    def keep(step, model):
        # A tensor, because checkpoints of a run hold no numpy arrays
        kept["valid"][step] = torch.from_numpy(measure_logp(model, validation))
        if step % (4 * config.eval_every) == 0:
            kept["weights"][step] = copy.deepcopy(model.state_dict())

    arm = "cross-entropy"
    model = lesson.fine_tune(config, run, arm, seed, base, on_checkpoint=keep, kept=kept)
    return model, kept["valid"], kept["weights"]


def select(config, model, valid, weights, seed, N=4):
    """The steps of the checkpoints that the rules choose, offset of those with weights.

    For the offset tournament each checkpoint answers other prompts, and all of them score all
    answers.
    """
    steps = list(valid)
    logp = torch.stack(list(valid.values())).numpy()  # (C, n)
    # The offset variant: the checkpoints that kept their weights answer
    models = [copy.deepcopy(model) for _ in weights]
    for checkpoint, state in zip(models, weights.values(), strict=True):
        checkpoint.load_state_dict(state)
    ids = data(config, seed, (5, 6), config.eval_prompts)
    own = []  # of each checkpoint's answers, every checkpoint's log-probabilities
    for checkpoint in models:
        answers = lesson.sample_answers(checkpoint, ids, 1, seed)[:, 0]
        answered = np.concatenate([ids[:, :PROMPT], answers], 1)
        own.append([measure_logp(rival, answered) for rival in models])
    logp_ids = np.array([measure_logp(checkpoint, ids) for checkpoint in models])
    pass8 = pass_at_k(logp, 8).mean(1)
    offset_score = offset_tournament(logp_ids, np.array(own), N)
    return {
        LOSS: steps[best(-logp.mean(1), logp)],
        PASS: steps[best(-pass8, logp)],
        TOURNAMENT: steps[best(tournament(logp, N), logp)],
        OFFSET: list(weights)[best(offset_score, logp_ids)],
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
    picked = [r for r in run.rows if r["phase"] == "picks" and r["step"] == config.steps]
    picks = {}  # rule -> the index of its checkpoint (seeds,)
    for rule in STYLES:
        picked_steps = [r[rule] for r in picked]
        picks[rule] = np.searchsorted(steps, picked_steps)

    def at(y, rule):
        """y (seeds, checkpoints) at the checkpoint that a rule picks -> (seeds,)."""
        return y[np.arange(n), picks[rule]]

    fig, axes = plt.subplots(1, 3, figsize=(17, 5), layout="constrained")
    for N, color in ((8, "C0"), (16, "C5")):
        band(axes[0], steps, passed[N], f"Pass@{N}", color=color)
        for rule, style in STYLES.items():
            label = rule if N == 8 else None
            x = steps[picks[rule]]
            axes[0].scatter(x, at(passed[N], rule), label=label, **style)
    axes[0].set(xlabel="step of fine-tuning", ylabel="Pass@N, exact")
    axes[0].set_title("What each rule picks")
    measures = {"KL (nats)": kl, "Cov_8": curve("cov@8")}
    for ax, (name, x) in zip(axes[1:], measures.items(), strict=True):
        colors = np.tile(steps, n)
        points = ax.scatter(x, passed[16], c=colors, cmap="viridis", s=18)
        for rule, style in STYLES.items():
            ax.scatter(at(x, rule), at(passed[16], rule), s=90, label=rule, **style)
        correlation = spearman_of_seeds(passed[16], x).mean()
        ax.set_title(f"Pass@16 against {name}: rank correlation {correlation:+.2f}")
        ax.set(xlabel=name, ylabel="Pass@16")
    fig.colorbar(points, ax=axes[2], label="step of fine-tuning")
    for ax in axes:
        ax.legend()
    pass8 = {rule: at(passed[8], rule) for rule in STYLES}
    fig.suptitle(
        f"Pass@8 of the checkpoint with the best loss {pass8[LOSS].mean():.3f}, "
        f"of the tournament's {pass8[TOURNAMENT].mean():.3f} ({n} seed{'s' if n > 1 else ''})"
    )
    return fig, judge(passed[8].max(1), pass8)


def judge(best8, pass8):
    """The claims, from Pass@8 of the best checkpoint (seeds,) and of the picks {rule: (seeds,)}."""
    chosen = pass8[TOURNAMENT]
    lowest = pass8[LOSS]
    regret = share(best8 - chosen, best8 - lowest).max()
    near_best = "Pass@8 that the tournament loses, share of best loss's, worst seed"
    rival = "Pass@8, tournament minus validation Pass@8's pick"
    gain = "tournament minus best validation loss"
    fair = "fair comparison"
    rival_gain = chosen - pass8[PASS]
    offset_gain = pass8[OFFSET] - lowest
    n = len(best8)
    return [
        claim("tournament", f"Pass@8, {gain}", SOURCE, "0.04", chosen - lowest, ">=", 0.015, n),
        claim("near best", near_best, SOURCE, "at the top", regret, "<=", 0.25, n),
        claim("rival", rival, fair, "-", rival_gain, ">", 0, n),
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
