"""budget.py: how long should answers be in training? Four budgets, each tested at all of them.

(Setlur et al., arXiv 2506.09026.) Each arm is the GRPO of curriculum.py from the same base, with
answers of at most 16, 32, 64 or 128 tokens.

    python -m experiments.budget            3 seeds, 13 minutes of one core

What to see: answers of 16 tokens leave room for three attempts. Even so RL makes the model try more
often, and with more tokens it uses them. What the paper saw, that the shortest budget stays flat
beyond its own length and is best at it, does not come back at this size.
"""

from dataclasses import dataclass

import matplotlib.pyplot as plt

import curriculum
from curriculum import BUDGETS, SOURCE, build, draw_budgets, of, show, tested, train, warm_up
from experiment import Run, claim, command, flag, parse_args, pick_device, seeds_of

TRAINED_AT = BUDGETS[:-1]


@dataclass
class Config(curriculum.Config):
    seeds: int = flag(3, "repeat over this many seeds", quick=1, low=1)

    def idle(self):
        return {"budget": "all of them are trained"}


def figure(config, run):
    fig, ax = plt.subplots(figsize=(8, 5), layout="constrained")
    curves = {"base": tested(run, f"budget {TRAINED_AT[0]}", False)}  # (seeds, budgets) each
    curves |= {f"trained at {b}": tested(run, f"budget {b}") for b in TRAINED_AT}
    longest = {b: of(run, f"budget {b}", f"pass@1 of {BUDGETS[-1]}").mean() for b in TRAINED_AT}
    draw_budgets(
        ax,
        curves,
        f"At {BUDGETS[-1]} tokens: {longest[16]:.2f} if trained at 16, "
        f"{longest[128]:.2f} if trained at 128 ({config.steps} steps, {config.seeds} seeds)",
    )

    def at(trained, budget):
        """Success of an arm at a test budget, of each seed (seeds,)."""
        return of(run, f"budget {trained}", f"pass@1 of {budget}")

    short_text = "tested at 64 tokens: trained at 64 minus trained at 16"
    flat_text = "trained at 16: pass@1 at 256 tokens minus at 64"
    gain_text = "trained at 64: pass@1 at 256 tokens minus at 64"
    long_text = "tested at 16 tokens: trained at 16 minus trained at 128"
    short, flat = at(64, 64) - at(16, 64), at(16, 256) - at(16, 64)
    gain, long = at(64, 256) - at(64, 64), at(16, 16) - at(128, 16)
    n = config.seeds
    return fig, [
        claim("short", short_text, SOURCE, "positive", short, ">=", 0.03, n),
        claim("flat", flat_text, SOURCE, "flat (4k)", flat, "<=", 0.05, n),
        claim("gain", gain_text, SOURCE, "+0.13", gain, ">=", 0.03, n),
        claim("long", long_text, SOURCE, "short is best", long, ">=", 0.03, n),
    ]


def table(run):
    """The figure's numbers, means over the seeds."""
    lines = ["trained at, tested at " + " ".join(f"{b:>7}" for b in BUDGETS)]
    for b in TRAINED_AT:
        success = tested(run, f"budget {b}").mean(0)
        lines.append(f"{b:>21} " + " ".join(f"{x:7.3f}" for x in success))
    return "\n".join(lines)


def main():
    config = parse_args(Config, __doc__)
    device = pick_device(config.device)
    size = sum(p.numel() for p in build(config, device).parameters())
    with Run(config) as run:
        run.introduce(device, size)
        for seed in seeds_of(config):
            base = warm_up(config, run, seed, device)
            models = {b: train(config, run, f"budget {b}", seed, base, b) for b in TRAINED_AT}
        trained = {f"trained {b}": model for b, model in models.items()}
        show(run, config.size, BUDGETS[-1], base=base, **trained)
        print(table(run))
        run.finish(*figure(config, run))


if __name__ == "__main__":
    command(main)
