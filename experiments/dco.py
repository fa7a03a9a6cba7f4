"""dco.py: what if the loss left answers alone that are likely enough?

(Direct coverage optimisation, Chen et al., arXiv 2502.07154.)

    python -m experiments.dco               4 minutes on two cores

Cross-entropy, -log p, goes on pushing answers that N samples would find anyway. DCO takes what
best-of-N is judged by, Pass@N, as the likelihood:

    DCO = -log(1 - (1 - p)^N)

Its gradient is cross-entropy's times N p (1 - p)^(N-1) / (1 - (1 - p)^N), which is about 1 where p
is far below 1/N, and about 0 where it is far above. The task, the base and the graphs are those of
the lesson (coverage.py).

What to see: with DCO the KL falls less, and neither Pass@8 nor Pass@16 falls. (The paper of the
coverage principle draws no such curve.)
"""

from dataclasses import dataclass
from functools import partial

import matplotlib.pyplot as plt
import torch

import coverage as lesson
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


@dataclass
class Config(lesson.Config):
    dco: int = flag(8, "N of the DCO loss (there are half a million answers)", low=1, high=10**6)


def dco_loss(logp, N):
    """-log(1 - (1 - p)^N) of each answer (R,), p = exp(logp).

    An answer below 1e-8 has no gradient.
    """
    p = logp.exp().clamp(1e-8, 1 - 1e-6)
    # log1p and expm1 keep the digits of a small p
    return -torch.log(-torch.expm1(N * torch.log1p(-p)))


def losses(config):
    """The arms: name -> loss of log-probabilities (R,)."""
    return {
        "cross-entropy": lesson.cross_entropy,
        f"DCO, N = {config.dco}": partial(dco_loss, N=config.dco),
    }


def measure(config, run, device):
    for seed in seeds_of(config):
        base = lesson.pretrain(config, run, seed, device)
        for arm, loss in losses(config).items():
            lesson.fine_tune(config, run, arm, seed, base, loss)


def figure(config, run):
    fig, (left, right) = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    ends = {key: [] for key in ("kl", "pass@8", "pass@16")}  # of each arm (seeds,)
    for arm, style in zip(losses(config), ("-", "--"), strict=True):
        curves = {key: series(run, key, phase="finetune", arm=arm) for key in ends}
        band(left, *curves["kl"], arm, color="k", ls=style)
        band(right, *curves["pass@8"], f"Pass@8, {arm}", ls=style, color="C0")
        band(right, *curves["pass@16"], f"Pass@16, {arm}", ls=style, color="C1")
        for key, (_, y) in curves.items():
            ends[key].append(y[:, -1])
    for ax, name, key in ((left, "KL", "kl"), (right, "Pass@16", "pass@16")):
        plain, dco = ends[key]
        ax.set_title(f"{name} at the end: cross-entropy {plain.mean():.3f}, DCO {dco.mean():.3f}")
        ax.set_xlabel("step of fine-tuning")
        ax.legend()
    left.set(ylabel="KL of the data from the model (nats)", ylim=(0, None))
    right.set_ylabel(f"Pass@N, exact (axis from {right.get_ylim()[0]:.3f})")
    plain, dco = ends["pass@8"]
    n = config.seeds
    fig.suptitle(
        f"Pass@8 after fine-tuning: with cross-entropy {plain.mean():.3f}, "
        f"with DCO (direct coverage optimisation) {dco.mean():.3f} ({n} seed{'s' if n > 1 else ''})"
    )
    text = "Pass@8 at the end, DCO minus cross-entropy"
    source = "Chen et al., arXiv 2502.07154"
    return fig, [claim("dco", text, source, "rescues", dco - plain, ">=", 0.025, n)]


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
