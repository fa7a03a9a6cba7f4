"""What if the base is never right? And what are TRB's blended prefixes worth?

    python -m experiments.cold          about 7 minutes on two cores

1. The methods of opd.py from a base model that has seen single moves only: hardly one of its
   answers is right. GRPO has nothing to learn from, while a teacher has a word for every token.
2. TRB's probe (Plyusov et al., arXiv 2605.31159): the first tokens of an answer are drawn from the
   blend, the expert writes the rest. The larger the blend's KL budget, the more often it is right.

What to see: OPD learns at once, GRPO does not; the probe rises with the budget.
"""

import itertools
from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
import torch

from engine import generate
from experiment import Run, band, claim, command, flag, parse_args, pick_device, seeds_of, series
from opd import Config as Lesson
from opd import blended, train_arms, write_together
from tasks.walkers import alive, at, curves, end, from_scratch, mean, model_files, over, shape, show
from tasks.walks import ANSWER, EOS, far_task, prompt, reward

BUDGETS = (0, 0.02, 0.1, 0.3, 1.0)  # nats a token
LENGTHS = (2, 4, 6)  # blended tokens


@dataclass
class Config(Lesson):
    seeds: int = flag(3, "repeat over this many seeds", quick=1, low=1, high=1000)
    arms: str = flag("opd,trb,skd,sft,grpo", "its methods")
    eval_every: int = flag(5, "steps between evaluations", low=1)


@torch.no_grad()
def continuation(student, teacher, task, eps, length, config, seed, n=1024):
    """Success of answers whose first `length` tokens are blended with budget eps and whose rest the
    teacher writes."""
    n = 16 if config.quick else n
    rounds = n // len(task.test) + 1
    pairs = (task.test * rounds)[:n]
    prompts = [prompt(pair) for pair in pairs]
    generator = torch.Generator().manual_seed(seed)
    y, mask, _ = write_together(student, teacher, prompts, blended(eps), generator, limit=length)
    rows = y.tolist()
    lengths = mask.sum(1).int().tolist()
    begun = [row[:size] for row, size in zip(rows, lengths, strict=True)]
    longer = [p + b for p, b in zip(prompts, begun, strict=True)]
    rest = generate(teacher, longer, 1, ANSWER - length, stop=EOS, generator=generator).tokens()
    # An answer that ended among the blended tokens is left as it is
    answers = [b if b[-1] == EOS else b + r for b, r in zip(begun, rest, strict=True)]
    rewards = [reward(*a) for a in zip(pairs, answers, strict=True)]
    return mean(rewards)


def probe(config, run, base, expert, task):
    for seed, length, eps in itertools.product(seeds_of(config), LENGTHS, BUDGETS):

        def measure(seed=seed, length=length, eps=eps):
            success = continuation(base, expert, task, eps, length, config, seed)
            return {"pass@1": success}

        run.log_once(measure, phase="probe", seed=seed, step=0, length=length, eps=eps)


def early(run, arm, rival, steps=40):
    """pass@1 of an arm minus a rival's, each the mean of steps 1 to `steps`; the same of as many
    sampled tokens: what the thriftier one needs for these steps. Both of each seed (seeds,)."""
    x, ours = series(run, "pass@1", phase="train", arm=arm)
    theirs = series(run, "pass@1", phase="train", arm=rival)[1]  # (seeds, n)
    our_tokens = series(run, "sampled_tokens", phase="train", arm=arm)[1]
    their_tokens = series(run, "sampled_tokens", phase="train", arm=rival)[1]
    part = (x > 0) & (x <= steps)
    by_tokens = []
    for seed in range(len(ours)):
        budget = min(our_tokens[seed, part][-1], their_tokens[seed, part][-1])
        grid = np.linspace(0, budget, 200)
        our_mean = np.interp(grid, our_tokens[seed], ours[seed]).mean()
        their_mean = np.interp(grid, their_tokens[seed], theirs[seed]).mean()
        by_tokens.append(our_mean - their_mean)
    by_steps = (ours - theirs)[:, part].mean(1)
    return by_steps, np.array(by_tokens)


def probed(run):
    """Success of the probe (seeds, LENGTHS, BUDGETS)."""
    rows = [row["pass@1"] for row in run.rows if row["phase"] == "probe"]
    sizes = (-1, len(LENGTHS), len(BUDGETS))
    return np.array(rows).reshape(sizes)


def figure(config, run):
    fig, axes = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
    title = "Trained from the cold base"
    curves(axes[0], run, config.methods, "pass@1", title, "held-out pass@1", unit="step")
    axes[0].legend()
    success = probed(run)
    for i, length in enumerate(LENGTHS):
        x = np.arange(len(BUDGETS))
        band(axes[1], x, success[:, i], f"first {length} tokens blended", marker="o")
    axes[1].set_title("TRB's probe (warm base): the expert completes an answer")
    axes[1].set(xlabel="KL budget (nats per token)", ylabel="pass@1")
    axes[1].set_xticks(range(len(BUDGETS)), BUDGETS)
    axes[1].legend()
    step = min(20, config.steps)
    start = at(run, "opd", 0).mean()
    grpo = at(run, "grpo", step).mean()
    opd = at(run, "opd", step).mean()
    fig.suptitle(
        f"From a base that is right in {start:.3f} of its answers: after {step} steps "
        f"grpo is at {grpo:.2f}, opd at {opd:.2f} ({config.seeds} seeds)"
    )
    return fig, claims(config, run)


def claims(config, run):
    n = config.seeds
    step = min(20, config.steps)
    opd = at(run, "opd", step)
    grpo = at(run, "grpo", step)
    both = f" ({opd.mean():.2f}, {grpo.mean():.2f})"
    success = probed(run)
    gain = success[:, 1, 2] - success[:, 1, 0]  # 4 tokens, eps .1 over 0
    smallest = np.diff(success).min((1, 2))
    trb, trb_tokens = early(run, "trb", "opd")
    skd, skd_tokens = early(run, "skd", "opd")
    trb_end = end(run, "trb") - end(run, "opd")
    trb_end = alive(run, "opd", trb_end)
    replaced = series(run, "changed", phase="train", arm="skd")[1]
    late = end(run, "skd", "changed")
    anneals = over(late, replaced[:, 0])
    plyusov = "Plyusov et al., arXiv 2605.31159"
    xu = "Xu et al., arXiv 2410.11325"
    # fmt: off
    return [
        claim("grpo", f"OPD minus GRPO, pass@1 at step {step}",
              "design of the task", "-",
              opd - grpo, ">=", 0.5, n, both),
        claim("opd", f"OPD, pass@1 at step {step}",
              "design of the task", "-",
              opd, ">=", 0.60, n),
        claim("probe", "TRB's probe: gain of eps .1 over 0, 4 tokens",
              plyusov, "positive",
              gain, ">=", 0.08, n),
        claim("probe monotone", "TRB's probe: smallest step up in eps",
              plyusov, "grows",
              smallest, ">", 0, n),
        claim("trb", "TRB minus OPD, mean pass@1 of steps 1 to 40",
              plyusov, "+0.004 to +0.009",
              trb, ">", 0, n),
        claim("trb tokens", "TRB minus OPD, mean pass@1 at equally many sampled tokens",
              plyusov, "-",
              trb_tokens, ">", 0, n),
        claim("trb end", "TRB minus OPD at the end",
              plyusov, "+0.004 to +0.009",
              trb_end, ">=", -0.02, n),
        claim("skd", "SKD minus OPD, mean pass@1 of steps 1 to 40",
              xu, "better",
              skd, ">", 0, n),
        claim("skd tokens", "SKD minus OPD, mean pass@1 at equally many sampled tokens",
              xu, "-",
              skd_tokens, ">", 0, n),
        claim("skd anneals", "SKD: tokens replaced, last third over first evaluation",
              xu, "falls by itself",
              anneals, "<=", 0.33, n),
    ]
    # fmt: on


def main():
    config = parse_args(Config, __doc__)
    device = pick_device(config.device)
    task = far_task()
    with Run(config, also=model_files(config, "base", "cold base", "expert")) as run:
        run.introduce(device, shape(config.n_embd).parameters)
        base = from_scratch(config, run, "base", device)
        cold = from_scratch(config, run, "cold base", device)
        expert = from_scratch(config, run, "expert", device)
        trained = train_arms(config, run, cold, expert, task)
        probe(config, run, base, expert, task)
        show(run, task, cold=cold, **trained)
        run.finish(*figure(config, run))


if __name__ == "__main__":
    command(main)
