"""mask.py: what are negative advantages worth to a GPT, at one update a batch and at 16?

(The second ingredient of e3, Setlur et al., arXiv 2506.09026: a wrong answer that stopped makes
stopping less likely.) `full` uses all advantages, `masked` sets the negative ones to 0. As masking
weighs hard problems up, by the factor 1 - p (experiments/negatives.py says why), all problems are
equally hard here: one pair of 15 is right. Each of 16 updates takes its own share of the answers,
under PPO's clip (.2 and .5, the paper's).

    python -m experiments.mask              3 seeds, 10 minutes of one core

What to see: with one update a batch both arms follow the same curves, as the identity says. With 16
nearly all is learnt in eight batches, and up to there the curves are the same, too. Then the arm
with negatives keeps more entropy, the paper's sign, and less success, not the paper's.
"""

import copy
import math
import random
from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
import torch

import curriculum
from curriculum import (
    SOURCE,
    adamw,
    advantages,
    answer,
    build,
    evaluate,
    of,
    outcome,
    score,
    show,
    told,
    warm_up,
)
from experiment import (
    Run,
    band,
    claim,
    command,
    descend,
    flag,
    parse_args,
    pick_device,
    seeds_of,
    series,
)
from experiments.negatives import at_success
from tasks import numbers

ARMS = ("full", "masked")
DESIGNS = {"1 update": 1, "16 updates": 16}
LOW, HIGH = 0.2, 0.5  # of the clip


@dataclass
class Config(curriculum.Config):
    seeds: int = flag(3, "repeat over this many seeds", quick=1, low=1)
    steps: int = flag(40, "batches of an arm", quick=2, low=1)
    eval_every: int = flag(4, "batches between evaluations", low=1)


def reuse(model, optimizer, rollout, adv, generator, updates):
    """`updates` steps on one batch, each on its own share of the answers, with PPO's clip on the
    ratio to the sampler; adv (P, G) -> row of metrics of the last step.
    """
    adv = adv.view(-1, 1).to(rollout.ids.device)  # (R, 1)
    order = torch.randperm(len(adv), generator=generator).to(adv.device)
    for share in order.chunk(updates):
        count = rollout.mask[share].sum()
        row = dict(loss=0.0, entropy=0.0)
        optimizer.zero_grad()
        for rows in share[rollout.lengths[share].argsort()].split(64):  # less padding
            part = rollout[rows]
            mask = part.mask[:, 1:]  # (64, T - 1)
            logp, entropy = score(model, part.ids)
            rho = (logp - part.logp[:, 1:]).exp()
            gain = torch.minimum(rho * adv[rows], rho.clamp(1 - LOW, 1 + HIGH) * adv[rows])
            loss = -(gain * mask).sum() / count
            loss.backward()
            row["loss"] += loss.item()
            row["entropy"] += ((entropy * mask).sum() / count).item()
        row["grad_norm"] = descend(optimizer, row["loss"])
    return row


def train(config, run, arm, seed, base, masked, updates):
    """GRPO on problems with one right pair -> the trained model. Masked: without the negative
    advantages.
    """
    phase = f"{arm} {seed}"
    model = copy.deepcopy(base)
    optimizer = adamw(model, config)
    rng, generator = random.Random(seed + 1), torch.Generator().manual_seed(seed + 1)
    kept = {"sampled": 0}
    budgets = (config.budget, 2 * config.budget)

    def test(step, **row):
        n = config.eval_prompts if step in (0, config.steps) else config.eval_prompts // 4
        row |= evaluate(model, config.size, budgets, f"{seed} {step}", n, draw=numbers.draw_single)
        run.log(phase="rl", arm=arm, seed=seed, step=step, sampled_tokens=kept["sampled"], **row)
        return row

    if phase not in run.state:
        test(0)
    for step in run.loop(phase, config.steps, model, optimizer, rng, generator, kept):
        problems = [numbers.draw_single(rng, config.size) for _ in range(config.prompts)]
        rollout, _, rewards = answer(model, problems, config.group, config.budget, generator)
        adv = advantages(rewards)
        if masked:
            adv = adv.clamp_min(0)
        if updates == 1:
            row = curriculum.update(model, optimizer, rollout, adv)
        else:
            row = reuse(model, optimizer, rollout, adv, generator, updates)
        kept["sampled"] += int(rollout.mask.sum())
        if (step + 1) % config.eval_every == 0 or step + 1 == config.steps:
            row = test(step + 1, **row, **outcome(rollout, rewards))
            run.say(success=row[f"pass@1 of {budgets[-1]}"], attempts=row["attempts"])
    return model


def by_success(run, arm, key, success):
    """The path of an arm -> for each seed, success (n,) and a metric (n,)."""
    return zip(
        series(run, success, phase="rl", arm=arm)[1],
        series(run, key, phase="rl", arm=arm)[1],
        strict=True,
    )


def equal_success(run, full, masked, key, success):
    """Full minus masked of a metric, at the successes that both pass through: the mean over these,
    of each seed (seeds,).
    """
    differences = []
    for (s, y), (masked_s, masked_y) in zip(
        by_success(run, full, key, success), by_success(run, masked, key, success), strict=True
    ):
        low, high = max(s[0], masked_s[0]), min(s.max(), masked_s.max())
        levels = np.linspace(low, high, 21)
        apart = at_success(s, y, levels) - at_success(masked_s, masked_y, levels)
        differences.append(apart.mean() if low < high else math.nan)
    return np.array(differences)


def figure(config, run):
    n = config.seeds
    success, twice = f"pass@1 of {config.budget}", f"pass@1 of {2 * config.budget}"
    names = {design: [f"{design}, {arm}" for arm in ARMS] for design in DESIGNS}
    equal = {
        key: {design: equal_success(run, *names[design], key, success) for design in DESIGNS}
        for key in ("nats", "unique_attempts")
    }
    at_end = {
        key: {
            design: of(run, full, key) - of(run, masked, key)
            for design, (full, masked) in names.items()
        }
        for key in ("nats", twice, "gap")
    }
    fig, axes = plt.subplots(2, 2, figsize=(14, 9), layout="constrained")
    axes = axes.flatten()
    axes[1].sharey(axes[0])
    for design, color in zip(DESIGNS, ("C0", "C1"), strict=True):
        for arm, style in zip(names[design], ("-", "--"), strict=True):
            for i, (s, y) in enumerate(by_success(run, arm, "nats", success)):
                levels = np.linspace(s[0], s.max(), 50)
                look = dict(color=color, ls=style, label=None if i else arm)
                axes[0].plot(levels, at_success(s, y, levels), **look)
            for ax, key in zip(axes[1:], at_end, strict=True):
                band(ax, *series(run, key, phase="rl", arm=arm), arm, color=color, ls=style)

    def both(y, digits=2):
        return "; ".join(f"{design} {told(x, digits)}" for design, x in y.items())

    nats = equal["nats"]
    axes[0].set(title=f"At equal success: {both(nats, 3)}", ylabel="entropy (nats per token)")
    axes[0].set_xlabel(f"held-out pass@1 at {config.budget} tokens (a line is a seed)")
    labels = (
        "entropy (nats per token)",
        f"held-out pass@1 at {2 * config.budget} tokens",
        "verdict gap",
    )
    for ax, (key, y), label in zip(axes[1:], at_end.items(), labels, strict=True):
        ax.set(title=f"At the end: {both(y)}", ylabel=label, xlabel="batches")
        ax.set_ylim((0, 1) if key != "nats" else None)
    for ax in axes:
        ax.legend()
    fig.suptitle(
        "Full minus masked: with and without negative advantages, at one update a batch and at 16 "
        f"({config.steps} batches, {n} seed{'s' * (n > 1)})"
    )
    return fig, claims_of(equal, at_end["nats"], at_end[twice], n)


def claims_of(equal, nats_at_end, success_at_end, n):
    one, many = DESIGNS
    nats, apart = equal["nats"], equal["unique_attempts"][many]
    ending = nats_at_end[many]
    size = "1 update a batch: size of the entropy's difference at equal success"
    text = "16 updates: entropy at equal success, full minus masked"
    tries = "16 updates: different attempts at equal success, full minus masked"
    end = "16 updates: entropy at the end, full minus masked"
    beside = f" ({told(nats[one], 3)})"
    return [
        claim("one entropy", size, "derived", "0", abs(nats[one].mean()), "<=", 0.05, n, beside),
        claim("reuse entropy", text, SOURCE, "0.095", nats[many], ">=", 0.05, n),
        claim("reuse entropy end", end, SOURCE, "0.095", ending, ">=", 0.05, n),
        claim("reuse attempts", tries, SOURCE, "more", apart, ">=", 0.5, n),
        *[accuracy(design, y, n) for design, y in success_at_end.items()],
    ]


def accuracy(design, difference, n):
    text = f"{design}: pass@1 at twice the budget, full minus masked"
    return claim(f"accuracy {design}", text, SOURCE, "+0.23", difference, ">=", 0.03, n)


def main():
    config = parse_args(Config, __doc__)
    device = pick_device(config.device)
    size = sum(p.numel() for p in build(config, device).parameters())
    with Run(config) as run:
        run.introduce(device, size)
        for seed in seeds_of(config):
            base = warm_up(config, run, seed, device)
            models = {}
            for design, updates in DESIGNS.items():
                for arm in ARMS:
                    name, masked = f"{design}, {arm}", arm == "masked"
                    models[name] = train(config, run, name, seed, base, masked, updates)
        show(run, config.size, 2 * config.budget, base=base, **models)
        run.finish(*figure(config, run))


if __name__ == "__main__":
    command(main)
