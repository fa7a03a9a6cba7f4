"""Which divergence, and may it be estimated from the student's top 4 tokens?

    python -m experiments.estimators        about 18 minutes on two cores

Seven rows of opd.py's METHODS that differ in nothing but D. A language model has a tail of unlikely tokens; our base is surer of
itself. So here it has read (and learnt to make) slips of the pen, one style word in a hundred: an even tail of 32 unlikely words.
The expert has read them, too, but does not make them.

What to see: the plain sum of p log(p / q) over the top 4 (opd_top4) falls when probability leaves them, and is least where each
has p = q / e. Sampling suffers, greedy decoding does not notice. Renormalised, or as an advantage without gradient, four tokens
are enough.
"""
import math
from dataclasses import dataclass

import matplotlib.pyplot as plt
import torch

import opd
from experiment import Run, claim, command, flag, parse_args, pick_device
from opd import train_arms
from tasks.walkers import answer, curves, end, evaluate, from_scratch, mean, model_files, shape, show
from tasks.walks import STYLES, far_task, prompt, reward

SLIPS = 0.01        # of the style words that the models read


@dataclass
class Config(opd.Config):
    seeds: int = flag(3, "repeat over this many seeds", quick=1, low=1, high=1000)
    arms: str = flag("opd,opd_sampled,opd_jsd,opd_forward,opd_top4_renormalised,opd_top4_stopgrad,opd_top4", "its methods")
    steps: int = flag(300, "steps of a method", quick=2, low=1)


@torch.no_grad()
def style_mass(model, prompts):
    """The probability that an answer begins with a style word, as it should: the expert gives a quarter to each of the four."""
    prompts = torch.tensor(prompts, device=model.lm_head.weight.device)
    logits = model.lm_head(model.hidden(prompts)[:, -1])                        # (B, V)
    return logits.softmax(-1)[:, STYLES].sum(1).mean().item()


def evaluate_both(model, task, config, seed):
    """`evaluate`, and what only greedy decoding and the probabilities show."""
    row = evaluate(model, task, config, seed)
    pairs = task.test[:config.eval_prompts]
    row["greedy"] = mean([reward(*a) for a in answer(model, pairs, prompt, 1, seed, temperature=0.0)])
    row["style_mass"] = style_mass(model, [prompt(pair) for pair in pairs])
    return row


def figure(config, run):
    arms = config.methods
    fig, axes = plt.subplots(1, 3, figsize=(16, 5), layout="constrained")
    curves(axes[0], run, arms, "pass@1", "Sampled at temperature 1", "held-out pass@1", unit="step")
    curves(axes[1], run, arms, "greedy", "Greedy", "held-out pass@1", unit="step")
    curves(axes[2], run, arms, "style_mass", "Where four words are equally good (dotted: 1/e)", "probability of the four", unit="step")
    axes[2].axhline(1 / math.e, color="k", ls=":", lw=1)
    axes[1].legend(loc="lower center")
    raw, greedy, n = end(run, "opd_top4"), end(run, "opd_top4", "greedy"), config.seeds
    fig.suptitle(f"A raw top-{config.top} KL (opd_top4) at the end: greedy {greedy.mean():.2f}, sampled {raw.mean():.2f} ({n} seeds)")
    source, gkd = "arXiv 2605.11182", "Agarwal et al., arXiv 2306.13649"
    origins = dict(zip(arms, (gkd, "Lu and Thinking Machines 2025", gkd, gkd, source, "arXiv 2604.13016")))
    mass = end(run, "opd_top4", "style_mass").mean()
    return fig, [
        claim("raw sampled", f"top {config.top}, raw: greedy minus sampled pass@1 at the end (each; probability of the four words)", source, "biased gradient",
              greedy - raw, ">=", 0.75, n, f" ({greedy.mean():.2f}, {raw.mean():.2f}; {mass:.2f})"),
        claim("raw greedy", f"top {config.top}, raw: greedy pass@1 at the end", source, "-", greedy, ">=", 0.95, n),
        *(claim(arm, f"{arm}: sampled pass@1 at the end", origin, "-", end(run, arm), ">=", 0.92, n) for arm, origin in origins.items()),
    ]


def main():
    config = parse_args(Config, __doc__)
    device = pick_device(config.device)
    task = far_task()
    with Run(config, also=model_files(config, "base", "expert")) as run:
        run.introduce(device, shape(config.n_embd).parameters)
        base, expert = (from_scratch(config, run, name, device, slips=SLIPS) for name in ("base", "expert"))
        trained = train_arms(config, run, base, expert, task, measure=evaluate_both)
        show(run, task, base=base, **trained)
        run.finish(*figure(config, run))


if __name__ == "__main__":
    command(main)
