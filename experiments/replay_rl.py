"""replay_rl.py: does RL collapse without replay masks, once more than one token is written?

(After Neural Garbage Collection, Li et al., arXiv 2604.18002.)

    python -m experiments.replay_rl                6 minutes on one thread
    python -m experiments.replay_rl --seeds 3      what results/ holds

Trained without replay masks, which hide from a token what had been forgotten when it was written,
the paper's model collapses (2.5% in place of 49.6%); the lesson's (electives/forget.py), which
writes one token, does not. experiments/replay.py lets it write L answers and finds that without
masks they are scored several nats off. Here the same model, on the same questions, is trained:

    loss = - advantage * [ sum of log p(answer) over the L answers + log p(what was kept) ]
    advantage = share of right answers - its mean over the readings of a stream

both log-probabilities from a pass with replay masks, or both from one without. A third arm has
masks for the answers only: which of the two terms needs them? All arms start from one base and take
as many steps on as many samples. At the longest L the lesson's learning rate and a higher one are
tried, in both arms.

Said before it was run:
    end         the mean accuracy of the last three evaluations
    collapse    at some evaluation accuracy is .1 or more below where it began, on every seed

What to see: no collapse that masks would prevent, up to 16 answers, 140 steps. At the rate of 3e-4
the arms rise side by side, though scores stay off by several nats; at 1e-3 the one with masks is
behind; 3e-3 destroys both. (One claim was added after the run: "best", each arm at its best rate.)

Why, as far as one can tell from here: the answers' gradient is wrong, but in this task it points
nowhere harmful. A pass that sees everything is sure of a right answer and gives it no push; a wrong
one it pushes down with the fact in sight, as reading should anyway. What RL has to find out is what
to keep, and that is scored nearly as well without masks. Where seeing what was forgotten would not
settle the next token, as in reasoning, none of this follows.

How this differs from the lesson: 8 streams a step in place of 32, and a rate of 3e-4 in place of
1e-3.
"""

import copy
import random
from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
import torch

from electives import forget
from electives.forget import BLOCK, BLOCKS, N_KEYS, SOURCE, STREAM
from experiment import (
    Run,
    band,
    claim,
    command,
    flag,
    parse_args,
    pick_device,
    seeds_of,
    series,
)
from experiments import replay

LENGTHS = (1, 4, 16)  # answers to a stream, L
LONGEST = LENGTHS[-1]
LR = 3e-4
FASTER = (1e-3, 3e-3)  # the lesson's, and one above it
WITH, WITHOUT, HALF = "masks", "no masks", "answers only"
ARMS = {WITH: (True, True), WITHOUT: (False, False), HALF: (True, False)}  # answers, what was kept
BOTH = (WITH, WITHOUT)
EVEN = BLOCKS // 2  # facts of a stream that may be asked for


@dataclass
class Config(replay.Config):
    streams: int = flag(8, "streams a step", quick=2, low=1)
    steps: int = flag(140, "steps of reinforcement learning", quick=1, low=1)
    trial: int = flag(60, "steps at other learning rates", quick=1, low=1)
    test: int = flag(256, "streams to measure on", quick=4, low=1)
    eval_every: int = flag(20, "steps between two measurements", quick=1, low=1)


def policy_loss(model, batch, arm):
    """The loss of a batch as the arm scores it -> loss, how far the answers' scores are off."""
    ids, sampled, rounds, _, advantage = batch
    for_answers, for_memory = ARMS[arm]
    logp, memory = replay.scored(model, ids, rounds, for_answers)
    if for_memory != for_answers:
        _, memory = replay.scored(model, ids, rounds, for_memory)
    loss = -(advantage * (logp.sum(1) + memory)).mean()
    return loss, (logp - sampled).abs().mean()


@torch.no_grad()
def measure(model, config, test):
    """On test streams, with the best answers and the best blocks:

    accuracy    the share of right answers
    kept        of the facts that may be asked for, the share that the last layer holds at the end
    whole       accuracy where nothing is forgotten
    """
    ids, questions, right = test
    text, _, rounds = replay.write(model, ids, questions, config.keep)
    accuracy = (replay.said(text) == right).float().mean()
    # blocks from 12 on hold answers
    n = BLOCKS + rounds[-1].max().item()
    held = forget.left(rounds[-1], n)[-1, :, :BLOCKS]  # (R, 12)
    even = ids[:, ::BLOCK] % 2 == 0  # (R, 12)
    kept = held[even].float().mean()
    logits = model(replay.text(ids, questions, right))
    whole = (logits[:, STREAM::2].argmax(2) == right).float().mean()
    return dict(accuracy=accuracy.item(), kept=kept.item(), whole=whole.item())


def reinforce(config, run, base, L, arm, lr, seed, device):
    """RL with L answers to a stream -> the trained model."""
    model = copy.deepcopy(base)
    optimizer = forget.optimizer_of(model, lr)
    generator = torch.Generator().manual_seed(seed + 1)  # the same for all arms
    test = replay.ask(config.test, L, EVEN, torch.Generator().manual_seed(10**6), device)
    where = dict(L=L, arm=arm, lr=lr, seed=seed)
    phase = f"{arm} {L} {lr} {seed}"
    if phase not in run.state:
        run.log(**where, step=0, **measure(model, config, test))
    steps = config.steps if lr == LR else config.trial
    for step in run.loop(phase, steps, model, optimizer, random.Random(seed), generator):
        # 1. Streams are read and answers written with a cache that forgets
        batch = replay.practise(model, config, L, generator, device)
        # 2. A step, by what the arm takes their log-probabilities for
        loss, off = policy_loss(model, batch, arm)
        forget.step_on(optimizer, loss)
        row = dict(reward=batch[3].mean().item(), mismatch=off.item())
        if (step + 1) % config.eval_every == 0 or step + 1 == steps:
            row |= measure(model, config, test)
            run.say(reward=row["reward"], accuracy=row["accuracy"])
        run.log(**where, step=step + 1, **row)
    return model


def train(config, run, seed, device):
    """All arms from one base -> models by name: the base, and those of the longest L."""
    base = replay.teach(config, run, seed, device)
    models = dict(base=base)
    for L in LENGTHS:
        for arm in ARMS if L == LONGEST else BOTH:
            models[arm] = reinforce(config, run, base, L, arm, LR, seed, device)
    for lr in FASTER:
        for arm in BOTH:
            reinforce(config, run, base, LONGEST, arm, lr, seed, device)
    return models


def show(config, run, models, device):
    """What models answer to questions about each of three streams."""
    ids, questions, right = replay.ask(3, LONGEST, EVEN, torch.Generator().manual_seed(7), device)
    answers = {}
    for name, model in models.items():
        text, _, _ = replay.write(model, ids, questions, config.keep)
        values = replay.said(text)  # (3, L)
        hits = (values == right).sum(1)
        answers[name] = [
            (f"{n} of {LONGEST} right: {(row - N_KEYS).tolist()}", n == LONGEST)
            for n, row in zip(hits, values, strict=True)
        ]
    prompts = [
        f"{forget.written(row[: STREAM + 1])} {row[STREAM + 2 :: 2]}" for row in text.tolist()
    ]
    run.samples(prompts, **answers)


# --------------------------------------------------------------------------------------------------
# The figure


def curve(run, L, arm, lr=LR):
    """Accuracy by step -> steps (n,), accuracy (seeds, n)."""
    return series(run, "accuracy", L=L, arm=arm, lr=lr)


def end(run, L, arm):
    """The mean of the last three evaluations (seeds,)."""
    return curve(run, L, arm)[1][:, -3:].mean(1)


def early(config, run, arm, lr):
    """Accuracy where the runs at other rates end (seeds,)."""
    steps, accuracy = curve(run, LONGEST, arm, lr)
    return accuracy[:, steps <= config.trial][:, -1]


def lowest(run, arm, lr):
    """At the longest L: the lowest accuracy that follows the start, minus the start (seeds,)."""
    _, accuracy = curve(run, LONGEST, arm, lr)
    return accuracy[:, 1:].min(1) - accuracy[:, 0]


def figure(config, run):
    """The figure and its claims, from the rows of the run."""
    fig, axes = plt.subplots(2, 2, figsize=(13, 9), layout="constrained")
    training, lengths, rates, scores = axes.flat
    fraction = "right answers (fraction)"

    for arm in ARMS:
        band(training, *curve(run, LONGEST, arm), arm)
    training.set(
        title=f"{LONGEST} answers, no masks: its lowest after the start is "
        f"{lowest(run, WITHOUT, LR).mean():+.2f} from the start",
        ylabel=fraction,
    )

    gap = np.stack([end(run, L, WITH) - end(run, L, WITHOUT) for L in LENGTHS], 1)
    band(lengths, LENGTHS, gap, "masks minus no masks, seed by seed", marker="o")  # (seeds, L)
    lengths.axhline(0, color="k")
    lengths.set(
        title=f"Masks are worth {gap[:, 0].mean():+.2f} at 1 answer"
        f", {gap[:, -1].mean():+.2f} at {LONGEST}",
        ylabel=f"difference in {fraction}, at the end",
    )
    lengths.set_xscale("log", base=2)
    lengths.set_xticks(LENGTHS, LENGTHS)

    for lr in FASTER:
        for arm in BOTH:
            band(rates, *curve(run, LONGEST, arm, lr), f"{arm}, rate {lr:g}")
    rates.set(
        title=f"{LONGEST} answers, rate {FASTER[-1]:g}, masks: its lowest is "
        f"{lowest(run, WITH, FASTER[-1]).mean():+.2f} from the start",
        ylabel=fraction,
    )

    change = []
    for L in LENGTHS:
        steps, off = series(run, "mismatch", L=L, arm=WITHOUT, lr=LR)  # (seeds, steps)
        band(scores, steps, off, f"L = {L}")
        change.append(off[:, -20:].mean(1) / off[:, :20].mean(1))
    scores.set(
        title=f"Scores off, no masks, end over start: {change[0].mean():.2f} at 1 answer"
        f", {change[-1].mean():.2f} at {LONGEST}",
        ylabel="|log p trained - log p sampled| (nats)",
    )
    for ax in axes.flat:
        ax.set_xlabel("step of RL")
        ax.legend()
    lengths.set_xlabel("answers to a stream")
    return fig, claims_of(config, run, gap, change)


def claims_of(config, run, gap, change):
    n = config.seeds
    claims = []
    for lr, arm in ((LR, WITHOUT), (FASTER[0], WITHOUT), (FASTER[1], WITHOUT), (FASTER[1], WITH)):
        text = f"collapse, {arm}, rate {lr:g}: lowest minus start, best seed"
        low = lowest(run, arm, lr).max()
        claims.append(claim(f"{arm} {lr:g}", text, SOURCE, "-", low, "<=", -0.1, n))
    # would another rate have served an arm better?
    tried = {arm: [early(config, run, arm, lr) for lr in (LR, *FASTER)] for arm in BOTH}
    ours, theirs, _ = tried[WITHOUT]
    best, rival = (max(rates, key=np.mean) for rates in tried.values())
    half = end(run, LONGEST, HALF) - end(run, LONGEST, WITHOUT)
    long = gap[:, -1]
    worth = f"masks minus none at {LONGEST} answers"
    for id, text, value, op, threshold in (
        ("gap", f"{worth}, worst seed", long.min(), ">=", 0.1),
        ("length", f"{worth}, minus that at 1", long - gap[:, 0], ">", 0),
        ("answers", "masks for answers only minus none, worst seed", half.min(), ">=", 0.1),
        ("rate", f"no masks: rate {FASTER[0]:g} minus {LR:g}, early", theirs - ours, "<", 0),
        ("best", f"{worth}, each at its best rate, early", best - rival, ">", 0),
        ("heals", "scores off, end over start: at 1 minus at 16", change[0] - change[-1], "<", 0),
    ):
        claims.append(claim(id, text, SOURCE, "-", value, op, threshold, n))
    return claims


def main():
    config = parse_args(Config, __doc__)
    device = pick_device(config.device)
    with Run(config) as run:
        for seed in seeds_of(config):
            models = train(config, run, seed, device)
        show(config, run, models, device)
        run.finish(*figure(config, run))


if __name__ == "__main__":
    command(main)
