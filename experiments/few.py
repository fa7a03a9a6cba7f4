"""What can be learnt from 24 prompts?

    python -m experiments.few           about 5 minutes on two cores

A teacher has a word for every token of every answer, so a few prompts go a long way, as long as the
student writes the answers: they are new each time it changes. The teacher's answers to 24 prompts
are soon known by heart, and a reward is one bit for an answer. (Lu and Thinking Machines 2025 train
on one prompt.)

What to see: opd ends above sft, and sft above grpo.
"""

from dataclasses import dataclass

import matplotlib.pyplot as plt

from experiment import Run, claim, command, flag, parse_args, pick_device
from opd import Config as Lesson
from opd import train_arms
from tasks.walkers import curves, end, from_scratch, model_files, shape, show
from tasks.walks import far_task


@dataclass
class Config(Lesson):
    seeds: int = flag(3, "repeat over this many seeds", quick=1, low=1, high=1000)
    arms: str = flag("opd,kd,sft,grpo", "its methods")


def figure(config, run):
    opd, sft, grpo = (end(run, arm) for arm in ("opd", "sft", "grpo"))
    n = config.seeds
    fig, ax = plt.subplots(figsize=(8, 5), layout="constrained")
    title = (
        f"24 training prompts: opd ends at {opd.mean():.2f}, sft at {sft.mean():.2f}, "
        f"grpo at {grpo.mean():.2f} ({n} seeds)"
    )
    curves(ax, run, config.methods, "pass@1", title, "held-out pass@1")
    ax.legend()
    # fmt: off
    return fig, [
        claim("opd", "OPD minus SFT at the end",
              "Lu and Thinking Machines 2025", "one prompt suffices",
              opd - sft, ">=", 0.05, n,
              f" ({opd.mean():.2f}, {sft.mean():.2f})"),
        claim("sft", "SFT minus GRPO at the end",
              "design of the task", "-",
              sft - grpo, ">=", 0.03, n, f" ({grpo.mean():.2f})"),
    ]
    # fmt: on


def main():
    config = parse_args(Config, __doc__)
    device = pick_device(config.device)
    task = far_task(train=24)
    with Run(config, also=model_files(config, "base", "expert")) as run:
        run.introduce(device, shape(config.n_embd).parameters)
        base = from_scratch(config, run, "base", device)
        expert = from_scratch(config, run, "expert", device)
        trained = train_arms(config, run, base, expert, task)
        show(run, task, base=base, **trained)
        run.finish(*figure(config, run))


if __name__ == "__main__":
    command(main)
