"""dataweights.py: which labels are wrong? Ask the derivative of a held-out loss.

(Data weights: Engstrom et al., arXiv 2503.13751.) Two in five training labels are flipped. Each
training point has a weight in the loss, and electives/metagrad.py gives the exact derivative of the
loss on a few clean held-out points with respect to every weight, through all steps of the training.
A point whose weight should shrink is suspect. One derivative, or thirty steps down it:

    w <- max(0, w - 0.1 sign(d held-out loss / d w))

    python -m experiments.dataweights           2 minutes on one core

Rivals that watch the training: a point's loss after it, and in the mean over it (a network learns
true labels first); the norm of its gradient; the alignment of its gradient with that of the
held-out loss, summed over training (TracIn, Pruthi et al., arXiv 2002.08484). And the plain one,
which also has the clean points: the loss under a model that trained on these alone.

What to see: how well each finds the flipped labels (AUROC), by the number of clean held-out points;
and the accuracy on test points after the worst two in five are left out. Beside it that of the
held-out points alone: who has enough of them needs no derivative.

How this differs from the paper: an MLP on points of the plane, full batches, labels instead of
a language model's corpus.
"""

from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F

from electives.metagrad import advance, metagradient, sgd, train_step, train_target
from experiment import Flags, Run, claim, command, flag, parse_args, seeds_of

SOURCE = "Engstrom et al., arXiv 2503.13751"
SETTINGS = 15, 30, 60  # clean held-out points
HIDDEN = 32
SIZES = 2 * HIDDEN, HIDDEN, HIDDEN, 1  # weights and biases of an MLP with two inputs
ONE, DESCENT = "metagradient", "metagradient, 30 steps"
HELD = "loss of a held-out model"
NOTHING, ALL, ALONE = "nothing left out", "all flipped left out", "held-out points alone"
WATCHING = "loss", "mean loss", "gradient norm", "TracIn"
RULES = ONE, DESCENT, *WATCHING, HELD


@dataclass
class Config(Flags):
    seeds: int = flag(5, "repeat over this many seeds", quick=1, low=1)
    points: int = flag(300, "training points", quick=30, low=10, high=10**4)
    inner: int = flag(100, "steps of training", quick=4, low=1)
    outer: int = flag(30, "steps down the metagradient", quick=2, low=1)

    def idle(self):
        return {} if self.device in ("auto", "cpu") else {"device": "all is small: on the CPU"}


def logit(theta, x):
    """An MLP's for label +1: theta (P,), x (n, 2) -> (n,)."""
    into, bias, out, offset = theta.split(SIZES)
    h = torch.tanh(x @ into.view(2, HIDDEN) + bias)  # (n, HIDDEN)
    return h @ out + offset


def losses(theta, batch):
    """batch: x (n, 2), y (n,) of -1 and 1 -> cross-entropies (n,)."""
    x, y = batch
    return F.softplus(-y * logit(theta, x))


def world(config, held, seed):
    """A board of nine fields, true labels alternate -> training, held-out, test points, flipped."""
    generator = torch.Generator().manual_seed(seed)
    n = config.points + held + 1000
    field = torch.randint(9, (n,), generator=generator)
    centre = torch.stack((field // 3, field % 3), dim=1) - 1
    noise = torch.randn(n, 2, generator=generator).double()
    x = 1.5 * centre + 0.3 * noise
    y = 1 - 2 * (field % 2).double()
    flipped = torch.rand(n, generator=generator) < 0.4
    told = torch.where(flipped, -y, y)
    at = (config.points, held, 1000)
    x, held_x, test_x = x.split(at)
    _, held_y, test_y = y.split(at)
    theta = torch.randn(sum(SIZES), generator=generator).double()
    theta[3 * HIDDEN :] *= 0.1  # the output layer begins small
    return SimpleNamespace(
        train=(x, told[: config.points]),
        held=(held_x, held_y),
        test=(test_x, test_y),
        flipped=flipped[: config.points],
        start=theta[None],
    )


def auroc(score, flipped):
    """The chance that a flipped label has the larger score; a tie counts half."""
    above = score[flipped][:, None] - score[~flipped]  # (flipped, clean)
    wins = above.sign().double().mean().item()
    return (wins + 1) / 2


# --------------------------------------------------------------------------------------------------
# Who is suspect: scores (n,), large where a label is thought to be wrong


def descend_weights(config, world, step, batches):
    """Down the held-out loss by the weights -> scores of the first and of the last step, and the
    held-out loss at each.
    """

    def goal(theta):
        return -losses(theta, world.held).mean()

    w = torch.ones(config.points).double()
    taus, course = [], []
    for _ in range(config.outer):
        tau, last = metagradient(step, goal, world.start, batches, [w] * config.inner)
        taus.append(sum(tau))  # a weight counts in every step
        course.append(-goal(last[0]).item())
        w = (w + 0.1 * taus[-1].sign()).clamp_min(0)
    # weights of 0 are many: of these the last derivative decides
    return {ONE: -taus[0], DESCENT: -w - 1e-6 * taus[-1].sign()}, course


def watch_training(config, world, step, batches):
    """What a training shows of its points -> scores of the rivals that look at it."""
    jacobian = torch.func.jacrev(losses)
    state = world.start
    ones = torch.ones(config.points).double()
    mean_loss = aligned = 0
    for t in range(config.inner):
        mean_loss = mean_loss + losses(state[0], world.train) / config.inner
        towards = jacobian(state[0], world.held).mean(0)  # (P,)
        slopes = jacobian(state[0], world.train)  # (n, P)
        aligned = aligned + slopes @ towards
        state = advance(step, state, t, batches[t], ones)
    theta = state[0]
    return {
        "loss": losses(theta, world.train),
        "mean loss": mean_loss,
        "gradient norm": jacobian(theta, world.train).norm(dim=1),
        "TracIn": -aligned,
    }


def compare(config, n_held, seed):
    """One world -> a row: AUROC of each rule, and test accuracy without the points it suspects."""
    here = world(config, n_held, seed)
    step = partial(train_step, losses, partial(sgd, lr=1.0))
    batches = [here.train] * config.inner
    scores, course = descend_weights(config, here, step, batches)
    scores |= watch_training(config, here, step, batches)

    def trained(batch, weights):
        steps = config.inner
        last = train_target(step, here.start, [batch] * steps, [weights] * steps)
        return last[0]

    def accuracy(theta):
        x, y = here.test
        return (logit(theta, x) * y > 0).double().mean().item()

    def without(places):
        weights = torch.ones(config.points).double()
        weights[places] = 0
        return accuracy(trained(here.train, weights))

    held = trained(here.held, torch.ones(n_held).double())
    scores[HELD] = losses(held, here.train)
    # every rule leaves out as many points as are flipped
    wrong = int(here.flipped.sum())
    after = {rule: without(score.topk(wrong).indices) for rule, score in scores.items()}
    after[NOTHING] = without([])
    after[ALL] = without(here.flipped)
    after[ALONE] = accuracy(held)
    found = {rule: auroc(score, here.flipped) for rule, score in scores.items()}
    return dict(auroc=found, accuracy=after, course=course)


# --------------------------------------------------------------------------------------------------
# The figure


def of(run, held, key, rule):
    """A number of each seed (seeds,)."""
    rows = [row for row in run.rows if row["held"] == held]
    return np.array([row[key][rule] for row in rows])


def bars(ax, run, key, rules):
    """Means over seeds with one standard deviation, a row for each rule, a colour a setting."""
    for i, held in enumerate(SETTINGS):
        y = np.array([of(run, held, key, rule) for rule in rules])  # (rules, seeds)
        spread = y.std(1, ddof=int(y.shape[1] > 1))
        at = np.arange(len(rules)) + 0.28 * i
        drawn = ax.barh(at, y.mean(1), 0.26, xerr=spread, label=f"{held} held-out points")
        ax.bar_label(drawn, fmt="%.3f")
    ax.set_yticks(np.arange(len(rules)) + 0.28, rules)
    ax.invert_yaxis()
    ax.set_xlim(0, 1.15)


def figure(config, run):
    """The figure and its claims, from the rows of the run."""
    fig, (found, after) = plt.subplots(1, 2, figsize=(14, 6), layout="constrained")
    bars(found, run, "auroc", RULES)
    found.set_xlabel("AUROC of the score for flipped labels (1/2: chance)")
    bars(after, run, "accuracy", (*RULES, NOTHING, ALL, ALONE))
    fig.legend(*found.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    after.set_xlabel("accuracy on test points without the worst two in five (fraction)")
    told = [f"{of(run, held, 'auroc', DESCENT).mean():.2f}" for held in SETTINGS]
    fig.suptitle(
        f"Thirty steps find flipped labels: AUROC {', '.join(told)} "
        f"with {', '.join(map(str, SETTINGS))} held-out points\n"
        "(lines: one standard deviation over seeds)"
    )
    return fig, judge(run, config.seeds)


def judge(run, n):
    """The claims, seed by seed."""
    claims = []
    for held in SETTINGS:
        auc = {rule: of(run, held, "auroc", rule) for rule in RULES}
        # the best of four in each seed
        rival = np.max(
            [auc[rule] for rule in WATCHING],
            axis=0,
        )
        ours = auc[DESCENT]
        accuracy = of(run, held, "accuracy", DESCENT)
        alone = of(run, held, "accuracy", ALONE)
        for what, *rest in (
            ("AUROC of thirty steps", ours, ">=", 0.95),
            ("AUROC of thirty steps, minus one", ours - auc[ONE], ">", 0),
            ("AUROC of one, minus the best that watches training", auc[ONE] - rival, ">", 0),
            ("AUROC of thirty, minus the held-out model's", ours - auc[HELD], ">", 0),
            ("accuracy after thirty, minus the held-out points alone", accuracy - alone, ">", 0),
        ):
            text = f"{held} held-out points: {what}"
            claims.append(
                claim(text, text, "design of the task", "-", *rest, n),
            )
    courses = np.array([row["course"][:11] for row in run.rows])
    falls = (np.diff(courses) < 0).mean()
    text = "first ten steps down: share that lower the held-out loss"
    claims.append(
        claim("falls", text, SOURCE, "all", falls, ">=", 1.0, n),
    )
    return claims


def main():
    config = parse_args(Config, __doc__)
    with Run(config) as run:
        run.introduce("cpu", sum(SIZES))
        for seed in seeds_of(config):
            for held in SETTINGS:
                row = partial(compare, config, held, seed)
                run.log_once(row, held=held, seed=seed, step=config.outer)
        run.save()
        run.finish(*figure(config, run))


if __name__ == "__main__":
    command(main)
