"""replay_rl.py: does training without replay masks collapse when more is written?

(After Neural Garbage Collection, Li et al., arXiv 2604.18002.)

    python -m experiments.replay_rl             2 minutes on two cores
    python -m experiments.replay_rl --seeds 3   what results/ holds

experiments/replay.py shows that without replay masks (which hide from a token what had been
forgotten when it was written) the gradient points elsewhere. Here both are followed: the same bases
and streams, 4 or 16 answers to each, equal steps. The paper's model collapses without masks, 2.5%
where masks reach 49.6%; in electives/forget.py, with one answer, nothing happens.

The learning rate is the one of two (1e-3, 3e-4) at which training WITH masks ended better after 40
steps (4 answers, one seed); the arm without did about as well at both.

What to see: "long" and "falls" among the claims say whether it comes at 16 answers in these steps.
"""

import copy
import random
from dataclasses import dataclass

import matplotlib.pyplot as plt
import torch

from electives import forget
from electives.forget import N_KEYS
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
from experiments.replay import ARMS, BLOCKS, SOURCE, said

LENGTHS = (4, 16)  # answers to a stream, L


@dataclass
class Config(replay.Config):
    streams: int = flag(16, "streams a step", quick=2, low=1)
    steps: int = flag(40, "steps of reinforcement learning", quick=2, low=1)
    lr: float = flag(3e-4, "its learning rate", low=0)
    test: int = flag(256, "streams to measure on", quick=8, low=1)
    eval_every: int = flag(10, "steps between two measurements", quick=1, low=1)


def measure(model, config, test, L):
    """Accuracy on L questions to test streams."""
    ids, questions, right = test
    ids, _, _ = replay.write(model, ids, questions[:, :L], config.keep)
    return dict(accuracy=(said(ids) == right[:, :L]).float().mean().item())


def reinforce(config, run, L, arm, seed, base, test):
    """RL on L answers -> the trained model."""
    model = copy.deepcopy(base)
    optimizer = forget.optimizer_of(model, config.lr)
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed + 2)
    phase = f"{arm} {L} {seed}"
    where = dict(L=L, arm=arm, seed=seed)
    if phase not in run.state:
        run.log(**where, step=0, **measure(model, config, test, L))
    for step in run.loop(phase, config.steps, model, optimizer, rng, generator):
        batch = replay.practise(model, config, L, generator, test[0].device)
        ids, sampled, rounds, reward, advantage = batch
        logp, memory = replay.scored(model, ids, rounds, ARMS[arm])
        forget.step_on(optimizer, -(advantage * (logp.sum(1) + memory)).mean())
        off = (logp - sampled).abs().mean().item()
        row = dict(reward=reward.mean().item(), mismatch=off)
        if (step + 1) % config.eval_every == 0 or step + 1 == config.steps:
            row |= measure(model, config, test, L)
            run.say(**row)
        run.log(**where, step=step + 1, **row)
    return model


def figure(config, run):
    """The figure and its claims, from the rows of the run."""
    fig, axes = plt.subplots(1, 3, figsize=(16, 5), layout="constrained")
    *training, mismatch = axes
    n = config.seeds
    claims = []
    for ax, L in zip(training, LENGTHS, strict=True):
        ends = []
        for arm in ARMS:
            steps, accuracy = series(run, "accuracy", L=L, arm=arm)
            band(ax, steps, accuracy, arm, marker=".")
            ends.append(accuracy[:, -1])
        worth = ends[0] - ends[1]
        gain = accuracy[:, -1] - accuracy[:, 0]  # of the arm without masks
        ax.set(xlabel="step of RL", ylabel="accuracy", ylim=(0, 1))
        ax.set_title(f"{L} answers: masks are worth {worth.mean():+.3f}")
        text = f"{L} answers: with masks minus without"
        claims.append(
            claim(
                f"masks {L}",
                text,
                SOURCE,
                "47.1",
                worth,
                ">",
                0,
                n,
            )
        )
        text = f"{L} answers, no masks: end minus start"
        claims.append(
            claim(
                f"falls {L}",
                text,
                SOURCE,
                "-",
                gain,
                "<",
                0,
                n,
            )
        )
        steps, off = series(run, "mismatch", L=L, arm="no replay masks")
        band(mismatch, steps, off, f"{L} answers, no replay masks")
    mismatch.set_title(f"Scores stay wrong: {off[:, -1].mean():.1f} nats at the end, 16 answers")
    mismatch.set(xlabel="step of RL", ylabel="|log p trained - log p sampled| (nats)")
    for ax in axes:
        ax.legend()
    return fig, claims


def answers(model, share, test):
    """What a model says to streams, and whether all of it is right."""
    ids, questions, right = test
    ids, _, _ = replay.write(model, ids, questions, share)
    hits = said(ids) == right  # (R, L)
    told = (said(ids) - N_KEYS).tolist()
    return [(str(row), all(hit)) for row, hit in zip(told, hits.tolist(), strict=True)]


def main():
    config = parse_args(Config, __doc__)
    device = pick_device(config.device)
    generator = torch.Generator().manual_seed(10**6)  # the same streams for every seed
    test = replay.ask(config.test, max(LENGTHS), BLOCKS // 2, generator, device)
    with Run(config) as run:
        for seed in seeds_of(config):
            base = replay.teach(config, run, seed, device)
            models = {}
            for L in LENGTHS:
                for arm in ARMS:
                    models[arm] = reinforce(config, run, L, arm, seed, base, test)
        few = [test[0][:3], *(t[:3, :4] for t in test[1:])]
        prompts = [f"{asked} = ?" for asked in few[1].tolist()]
        models = {"base": base, **models}
        told = {name: answers(m, config.keep, few) for name, m in models.items()}
        run.samples(prompts, **told)
        run.finish(*figure(config, run))


if __name__ == "__main__":
    command(main)
