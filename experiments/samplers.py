"""samplers.py: do answers that are spread out leave fewer groups from which nothing is learnt?

A group that is all right or all wrong has advantages of 0. An answer is a deterministic function of
the numbers that its tokens are drawn with; if one number drives a whole answer (engine.generate's
`uniforms`), those of a group can be spread out, each still uniform on its own (QuasiMoTTo, arXiv
2607.01179). Measured on the base model of grpo.py, before any reinforcement learning.

    python -m experiments.samplers          3 seeds, 4 minutes

A group's answers then depend on one another: its mean is no longer an unbiased baseline.
"""

import random
from dataclasses import dataclass
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import torch

import grpo
import tasks
from experiment import Run, claim, command, flag, parse_args, pick_device, seeds_of

SAMPLERS = "iid", "stratified", "lattice"


@dataclass
class Config(grpo.Config):
    seeds: int = flag(3, "repeat over this many seeds", quick=1, low=1)
    prompts: int = flag(512, "problems", quick=8, low=1, high=4096)

    def idle(self):
        measured = "task", "size", "n_embd", "sft_steps", "prompts", "group", "temperature"
        common = "seed", "seeds", "device", "out", "resume", "quick"
        rest = set(vars(self)) - {*measured, *common}
        return dict.fromkeys(rest, "the base is measured, nothing is reinforced")


def group_uniforms(prompts, group, kind, generator):
    """The number in [0, 1) that drives all of an answer's draws: (prompts * group,); iid: None.

    stratified: one in each of `group` equal intervals, in random order. lattice: an even grid with
    one random shift for each group.
    """
    if kind == "iid":
        return None
    grid = torch.arange(group, dtype=torch.float64) / group
    if kind == "lattice":
        shift = torch.rand(prompts, 1, dtype=torch.float64, generator=generator)
        return ((grid + shift) % 1).flatten()
    u = grid + torch.rand(prompts, group, dtype=torch.float64, generator=generator) / group
    order = torch.rand(prompts, group, generator=generator).argsort(1)  # (prompts, group)
    return u.gather(1, order).flatten()


def measure(config, task, base, kind, seed):
    """The fraction of groups that are all right or all wrong, and of answers that are right."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    rewards = []
    for _ in range(0, config.prompts, 32):
        count = min(32, config.prompts)
        problems = [task.draw(rng, config.size) for _ in range(count)]
        uniforms = group_uniforms(len(problems), config.group, kind, generator)
        drawn = grpo.sample(base, task, problems, config.group, config, generator, uniforms)
        rewards.append(drawn[2])
    rewards = torch.cat(rewards)  # (prompts, group)
    dull = (rewards.std(1) == 0).double().mean().item()
    return dict(zero_variance=dull, reward=rewards.double().mean().item())


def figure(config, run):
    rows = {(row["arm"], row["seed"]): row for row in run.rows if row["phase"] == "samplers"}
    dull = {
        kind: np.array([rows[kind, seed]["zero_variance"] for seed in seeds_of(config)])
        for kind in SAMPLERS
    }
    fig, ax = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for i, kind in enumerate(SAMPLERS):
        ax.plot([i] * config.seeds, dull[kind], "o", color=f"C{i}", alpha=0.6)
        ax.plot(i, dull[kind].mean(), "_", ms=30, color="k")
    ax.set_xticks(range(len(SAMPLERS)), SAMPLERS)
    ax.set(
        ylabel="groups all right or all wrong (fraction)",
        ylim=(0, None),
        title=f"Groups of {config.group} from which nothing is learnt: independent "
        f"{dull['iid'].mean():.2f}, lattice {dull['lattice'].mean():.2f} (a dot is a seed)",
    )
    claims = []
    for kind in ("stratified", "lattice"):
        text = f"groups without variance, {kind} minus independent, same base and problems"
        less = dull[kind] - dull["iid"]
        source = "arXiv 2607.01179"
        claims.append(claim(kind, text, source, "fewer", less, "<", 0, config.seeds))
    return fig, claims


def main():
    config = parse_args(Config, __doc__)
    device = pick_device(config.device)
    task = tasks.load(config.task)
    grpo.build(config, task, device)
    with Run(config) as run:
        for seed in seeds_of(config):
            base = grpo.warm_up(config, task, run, seed, device)
            for kind in SAMPLERS:
                where = dict(phase="samplers", arm=kind, seed=seed, step=config.sft_steps)
                run.log_once(partial(measure, config, task, base, kind, seed), **where)
        run.finish(*figure(config, run))


if __name__ == "__main__":
    command(main)
