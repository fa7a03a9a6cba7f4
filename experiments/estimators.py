"""Which divergence, and may it be estimated from the student's top 4 tokens?

    python -m experiments.estimators        about 18 minutes on two cores

Seven rows of opd.py's METHODS that differ in nothing but D. A language model has a tail of unlikely
tokens; our base is surer of itself. So here it has read (and learnt to make) slips of the pen, one
style word in a hundred: an even tail of 32 unlikely words. The expert has read them, too, but does
not make them.

What to see: the plain sum of p log(p / q) over the top 4 (opd_top4) falls when probability leaves
them, and is least where each has p = q / e. Sampling suffers, greedy decoding does not notice.
Renormalised, or as an advantage without gradient, four tokens are enough.
"""

import math
from dataclasses import dataclass

import matplotlib.pyplot as plt
import torch

from experiment import Run, claim, command, flag, parse_args, pick_device
from opd import Config as Lesson
from opd import train_arms
from tasks.walkers import (
    answer,
    curves,
    end,
    evaluate,
    from_scratch,
    mean,
    model_files,
    shape,
    show,
)
from tasks.walks import STYLES, far_task, prompt, reward

SLIPS = 0.01  # of the style words that the models read
GKD = "Agarwal et al., arXiv 2306.13649"
BIAS = "arXiv 2605.11182"
ORIGINS = {
    "opd": GKD,
    "opd_sampled": "Lu and Thinking Machines 2025",
    "opd_jsd": GKD,
    "opd_forward": GKD,
    "opd_top4_renormalised": BIAS,
    "opd_top4_stopgrad": "arXiv 2604.13016",
}


@dataclass
class Config(Lesson):
    seeds: int = flag(3, "repeat over this many seeds", quick=1, low=1, high=1000)
    arms: str = flag(",".join(ORIGINS) + ",opd_top4", "its methods")
    steps: int = flag(300, "steps of a method", quick=2, low=1)


@torch.no_grad()
def style_mass(model, prompts):
    """The probability that an answer begins with a style word, as it should: the expert gives a
    quarter to each of the four."""
    prompts = torch.tensor(prompts, device=model.lm_head.weight.device)
    logits = model.lm_head(model.hidden(prompts)[:, -1])  # (B, V)
    return logits.softmax(-1)[:, STYLES].sum(1).mean().item()


def evaluate_both(model, task, config, seed):
    """`evaluate`, and what only greedy decoding and the probabilities show."""
    row = evaluate(model, task, config, seed)
    pairs = task.test[: config.eval_prompts]
    greedy = answer(model, pairs, prompt, 1, seed, temperature=0.0)
    row["greedy"] = mean([reward(*a) for a in greedy])
    row["style_mass"] = style_mass(model, [prompt(pair) for pair in pairs])
    return row


def figure(config, run):
    fig, axes = plt.subplots(1, 3, figsize=(16, 5), layout="constrained")
    titles = {
        "pass@1": ("Sampled at temperature 1", "held-out pass@1"),
        "greedy": ("Greedy", "held-out pass@1"),
        "style_mass": (
            "Where four words are equally good (dotted: 1/e)",
            "probability of the four",
        ),
    }
    for ax, (key, labels) in zip(axes, titles.items(), strict=True):
        curves(ax, run, config.methods, key, *labels, unit="step")
    axes[2].axhline(1 / math.e, color="k", ls=":", lw=1)
    axes[1].legend(loc="lower center")
    n = config.seeds
    top = f"top {config.top}, raw"
    raw = end(run, "opd_top4")
    greedy = end(run, "opd_top4", "greedy")
    mass = end(run, "opd_top4", "style_mass").mean()
    fig.suptitle(
        f"A raw top-{config.top} KL (opd_top4) at the end: greedy {greedy.mean():.2f}, "
        f"sampled {raw.mean():.2f} ({n} seeds)"
    )
    each = "(each; probability of the four words)"
    beside = f" ({greedy.mean():.2f}, {raw.mean():.2f}; {mass:.2f})"
    # fmt: off
    return fig, [
        claim("raw sampled", f"{top}: greedy minus sampled pass@1 at the end {each}",
              BIAS, "biased gradient",
              greedy - raw, ">=", 0.75, n, beside),
        claim("raw greedy", f"{top}: greedy pass@1 at the end",
              BIAS, "-",
              greedy, ">=", 0.95, n),
        *(claim(arm, f"{arm}: sampled pass@1 at the end",
                origin, "-",
                end(run, arm), ">=", 0.92, n) for arm, origin in ORIGINS.items()),
    ]
    # fmt: on


def main():
    config = parse_args(Config, __doc__)
    device = pick_device(config.device)
    task = far_task()
    with Run(config, also=model_files(config, "base", "expert")) as run:
        run.introduce(device, shape(config.n_embd).parameters)
        base = from_scratch(config, run, "base", device, slips=SLIPS)
        expert = from_scratch(config, run, "expert", device, slips=SLIPS)
        trained = train_arms(config, run, base, expert, task, measure=evaluate_both)
        show(run, task, base=base, **trained)
        run.finish(*figure(config, run))


if __name__ == "__main__":
    command(main)
