"""quasi_rl.py: does reinforcement learning need fewer steps if a group's answers are spread out?

(QuasiMoTTo, Li et al., arXiv 2607.01179.) A group of G answers that is all right or all wrong
teaches nothing: its advantages are 0. If the numbers that drive the answers are spread out
(electives/quasi.py), fewer groups are. Each answer is still an exact sample, but the group's mean
is no longer a baseline that is independent of the other answers, and that scales the gradient. With
C right answers in a group, p the probability of one,

    D = var(C) / (G p (1 - p))                    1 for independent answers, 0 for constant C
    E[gradient] / true gradient = 1 - D / G               with the group's mean as the baseline
                                  (G - D) / (G - 1)       with the mean of the others

if the answers of a kind, right or wrong, have the same gradient on average, wherever they fall.
So spreading takes the bias of the group's mean away, and gives one to the mean of the others.

The task (tasks/safe.py) is made for the method: three digits decide, one answer in sixteen is
right, and the right answer is one interval of [0, 1). GRPO without division by the group's std, 8
problems a step, stopped at an exact pass@1 of .9; each sampler at the best of LRS for it.

    python -m experiments.quasi_rl          5 seeds, 5 minutes on two cores

What to see: at a low rate all samplers take as many steps. At the rates where few steps suffice,
runs on independent groups now and then end at a success of 0 and never come back; on a lattice none
of these did (at 4e-3 one in five), so it can be trained faster. With 32 problems a step, where the
gradient has less noise, there was no difference in a first try (2 seeds). The law of the baseline's
bias misses Sobol: wrong answers are not all alike, some share digits with the right one, and Sobol
spreads each digit.
"""

import copy
import random
from dataclasses import dataclass
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import torch

import grpo
import tasks
from electives.quasi import SOURCE, group_uniforms
from experiment import (
    Run,
    claim,
    command,
    flag,
    parse_args,
    pick_device,
    seeds_of,
    series,
)
from kernels import token_logprobs
from tasks import safe

SAMPLERS = "independent", "stratified", "lattice", "sobol"
LRS = 1e-3, 1.4e-3, 2e-3, 2.8e-3
GOAL = 0.9
BUDGET = safe.budget()


@dataclass
class Config(grpo.Config):
    seeds: int = flag(5, "repeat over this many seeds", quick=1, low=1)
    n_embd: int = flag(64, "channels of the GPT: 2 layers, 8 heads", quick=16, low=8, high=4096)
    sft_steps: int = flag(300, "steps of supervised warm-up", quick=10, low=1)
    steps: int = flag(120, "steps of reinforcement learning, at most", quick=2, low=1)
    group: int = flag(8, "answers to each problem", quick=4, low=2, high=1024)
    prompts: int = flag(8, "problems in a step", quick=4, low=1, high=4096)
    micro_batch: int = flag(256, "answers in a forward pass", low=1, high=65536)
    repeats: int = flag(32, "groups for each problem, to measure the baseline", quick=2, low=1)
    eval_prompts: int = flag(256, "held-out problems", quick=8, low=1, high=65536)

    def idle(self):
        return dict(
            task="it is the safe",
            size="a safe has three digits",
            lr="all of LRS are run",
            eval_every="every step is evaluated",
        )


def success(model, problems):
    """The exact probability of the right answer to each problem (P,), with gradients."""
    pairs = [(safe.prompt(problem), problem) for problem in problems]
    ids, mask = tasks.padded(pairs, safe.tokenizer)
    hidden = model.hidden(ids[:, :-1])
    logp, _ = token_logprobs(hidden, model.lm_head.weight, ids[:, 1:])
    return (logp * mask[:, 1:]).sum(1).exp()


def sample(config, model, problems, kind, generator):
    """A group of answers to each problem -> the rollout, rewards (P, G)."""
    uniforms = group_uniforms(kind, len(problems), config.group, BUDGET, generator)
    rollout, _, rewards = grpo.sample(
        model, safe, problems, config.group, config, generator, uniforms
    )
    return rollout, rewards


def gradient(model, value):
    """The gradient of a number in all weights, one vector."""
    grads = torch.autograd.grad(value, list(model.parameters()))
    return torch.cat([g.flatten() for g in grads])


def baseline(config, model, kind, seed):
    """What the group's mean, as the baseline, makes of the gradient: by `repeats` groups for each
    problem, against the exact gradient of the mean success.
    """
    rng = random.Random(f"baseline {seed}")
    generator = torch.Generator().manual_seed(seed)
    problems = [safe.draw(rng) for _ in range(32)]
    p = success(model, problems)  # (P,)
    true = gradient(model, p.mean())
    # Many groups for each problem: what is left of their mean is bias
    estimate = 0
    counts = []
    for _ in range(config.repeats):
        rollout, rewards = sample(config, model, problems, kind, generator)
        # the policy gradient as grpo.py takes it, but of nothing except the sum
        adv = grpo.advantages(rewards, "mean").view(-1, 1)  # (P * G, 1)
        logp, _ = grpo.score(model, rollout, torch.arange(len(adv)), config)
        value = (adv * logp * rollout.mask).sum() / len(adv)
        estimate += gradient(model, value) / config.repeats
        counts.append(rewards.sum(1))
    C = torch.stack(counts)  # (repeats, P): how many are right
    G = config.group
    variance = (C - G * p) ** 2
    independent = G * p * (1 - p)
    dispersion = variance.mean() / independent.mean()
    dull = (C == 0) | (C == G)
    return dict(
        zero_variance=dull.float().mean().item(),
        dispersion=dispersion.item(),
        scale=(estimate @ true / (true @ true)).item(),
    )


def train(config, run, kind, lr, seed, base):
    """GRPO until the exact held-out pass@1 has reached GOAL, or to the end."""
    model = copy.deepcopy(base)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    rng = random.Random(seed + 1)
    generator = torch.Generator().manual_seed(seed + 1)
    held_rng = random.Random("held out")  # the same notes for all
    held = [safe.draw(held_rng, held_out=True) for _ in range(config.eval_prompts)]
    kept = dict(success=0.0)
    where = dict(phase="rl", arm=kind, lr=lr, seed=seed)

    def enough():
        return kept["success"] >= GOAL

    phase = f"{kind} {lr} {seed}"
    for step in run.loop(phase, config.steps, model, optimizer, rng, generator, kept, enough):
        # 1. Groups of answers, each group driven by numbers of its own
        problems = [safe.draw(rng) for _ in range(config.prompts)]
        rollout, rewards = sample(config, model, problems, kind, generator)
        # 2. grpo.py's step
        grpo.update(model, base, optimizer, rollout, rewards, config, BUDGET, generator)
        # 3. The exact success
        with torch.no_grad():
            kept["success"] = success(model, held).mean().item()
        run.log(**where, step=step + 1, **kept)
        run.say(**kept)


def steps_of(config, run, kind, lr):
    """The steps to GOAL (seeds,). A run that does not arrive counts as one more than it had."""
    where = dict(phase="rl", arm=kind, lr=lr)
    steps = {}
    for row in run.rows:
        if where.items() <= row.items():  # the last row of a seed stays
            steps[row["seed"]] = row["step"] + (row["success"] < GOAL)
    return np.array([steps[seed] for seed in seeds_of(config)])


def figure(config, run):
    n, G = config.seeds, config.group
    fig, (left, right) = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
    best = {}  # of each sampler, the steps at the rate with the fewest in the mean (seeds,)
    bias = {key: {} for key in ("zero_variance", "dispersion", "scale")}
    for i, kind in enumerate(SAMPLERS):
        tried = [steps_of(config, run, kind, lr) for lr in LRS]  # (seeds,) each
        best[kind] = min(tried, key=np.mean)
        for lr, steps in zip(LRS, tried, strict=True):
            aside = lr * 1.03 ** (i - 1.5)  # so that dots do not hide one another
            left.plot([aside] * n, steps, "o", color=f"C{i}", alpha=0.6)
        label = f"{kind}, at its best {best[kind].mean():.0f}"
        left.plot(LRS, np.mean(tried, 1), color=f"C{i}", label=label)
        for key, by_kind in bias.items():
            _, values = series(run, key, phase="baseline", arm=kind)  # (seeds, 1)
            by_kind[kind] = values[:, 0]
        law = 1 - bias["dispersion"][kind] / G
        right.plot(law, bias["scale"][kind], "o", color=f"C{i}", label=kind)
    ratio = {kind: best[kind] / best["independent"] for kind in SAMPLERS}
    title = f"Lattice: {ratio['lattice'].mean():.2f} times the steps, each at its best rate"
    left.set(title=f"{title} ({n} seeds)", xlabel="learning rate", xscale="log")
    left.set(ylabel=f"steps to pass@1 {GOAL} (top: never)", ylim=(0, None))
    left.set_xticks(LRS, LRS)
    left.minorticks_off()
    scale = {kind: bias["scale"][kind].mean() for kind in SAMPLERS}
    title = f"gradient {scale['independent']:.2f} of the true, lattice {scale['lattice']:.2f}"
    right.set(title=f"Group's mean as baseline: {title}", xlabel="1 - D / G")
    right.set(ylabel="gradient over the exact one (a dot is a seed)")
    right.axline((1, 1), slope=1, color="k", ls=":")
    left.legend()
    right.legend()
    slow = {kind: steps_of(config, run, kind, LRS[0]) for kind in SAMPLERS}
    same = slow["lattice"] / slow["independent"]
    return fig, claims_of(n, G, ratio, same, **bias)


def claims_of(n, G, ratio, same, zero_variance, dispersion, scale):
    claims = []
    for kind in ("stratified", "lattice"):
        text = f"{kind}: steps to {GOAL} over independent's, each at its best rate"
        steps = claim(f"{kind} steps", text, SOURCE, "0.5", ratio[kind], "<=", 0.75, n)
        fewer = zero_variance[kind] - zero_variance["independent"]
        text = f"{kind} minus independent: groups of the base without variance"
        groups = claim(f"{kind} groups", text, SOURCE, "fewer", fewer, "<", 0, n)
        claims += [steps, groups]
    text = f"lattice: steps to {GOAL} over independent's, both at the rate {LRS[0]:g}"
    claims.append(claim("same rate", text, SOURCE, "0.5", same, "<=", 0.75, n))
    wrong = []
    for kind in SAMPLERS:
        law = 1 - dispersion[kind] / G
        wrong.append(np.mean(scale[kind] - law))
    text = "gradient over the exact one, minus 1 - D / G: largest of the means"
    worst = np.abs(wrong).max()
    return [*claims, claim("law", text, "derived", "-", worst, "<=", 0.03, n)]


def main():
    config = parse_args(Config, __doc__)
    device = pick_device(config.device)
    model = grpo.build(config, safe, device)  # an impossible shape ends here
    with Run(config) as run:
        run.introduce(device, model.config.parameters)
        for seed in seeds_of(config):
            base = grpo.warm_up(config, safe, run, seed, device)
            for kind in SAMPLERS:
                where = dict(phase="baseline", arm=kind, seed=seed, step=0)
                run.log_once(partial(baseline, config, base, kind, seed), **where)
                for lr in LRS:
                    train(config, run, kind, lr, seed, base)
        run.finish(*figure(config, run))


if __name__ == "__main__":
    command(main)
