"""quasi_rl.py: does reinforcement learning need fewer steps if a group's answers are spread out?

(QuasiMoTTo, Li et al., arXiv 2607.01179.) A group of G answers that is all right or all wrong
teaches nothing: its advantages are 0. If the numbers that drive the answers are spread out
(electives/quasi.py), fewer groups are. Each answer is still an exact sample, but the group's mean
is no longer a baseline that is independent of the other answers, and that scales the gradient. With
C right answers in a group, p the probability of one,

    D = var(C) / (G p (1 - p))                     1 for independent answers, 0 for constant C
    E[gradient] / true gradient = 1 - D / G        group's mean as the baseline
                                  (G - D) / (G - 1)    mean of the others (leave one out)

if the answers of a kind, right or wrong, have the same gradient on average, wherever they fall.
So spreading takes the bias of the group's mean away, and puts one on leaving one out.

The task (tasks/safe.py) is made for the method: three digits decide, one answer in sixteen is
right, and the right answer is one interval of [0, 1). GRPO without division by the group's std;
each sampler at the best of LRS for it.

    python -m experiments.quasi_rl          5 seeds, MINUTES on two cores

What to see: ...
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
from experiment import Run, band, claim, command, flag, parse_args, pick_device, seeds_of, series
from kernels import token_logprobs
from tasks import safe

SAMPLERS = "independent", "stratified", "lattice", "sobol"
LRS = 3e-4, 1e-3, 3e-3
GOAL = 0.9


@dataclass
class Config(grpo.Config):
    seeds: int = flag(5, "repeat over this many seeds", quick=1, low=1)
    size: int = flag(3, "dials", low=1, high=8)
    n_embd: int = flag(64, "channels of the GPT: 2 layers, 8 heads", quick=32, low=8, high=4096)
    sft_steps: int = flag(300, "steps of supervised warm-up", quick=10, low=1)
    steps: int = flag(80, "steps of reinforcement learning, at most", quick=2, low=1)
    group: int = flag(8, "answers to each problem", quick=4, low=2, high=1024)
    micro_batch: int = flag(256, "answers in a forward pass", low=1, high=65536)
    eval_prompts: int = flag(256, "held-out problems", quick=8, low=1, high=65536)

    def idle(self):
        return dict(
            task="it is the safe", lr="all of LRS are run", eval_every="every step is evaluated"
        )


def warm_up(config, run, seed, device):
    """A GPT that has read demonstrations."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    model = grpo.build(config, safe, device)

    def demonstration():
        problem = safe.draw(rng, config.size)
        return safe.prompt(problem), safe.demonstrate(rng, problem)

    return tasks.imitate(model, safe.tokenizer, demonstration, run, seed, config.sft_steps, rng)


def success(model, problems):
    """The exact probability of the right answer to each problem (P,), with gradients."""
    pairs = [(safe.prompt(problem), problem) for problem in problems]
    ids, mask = tasks.padded(pairs, safe.tokenizer)
    hidden = model.hidden(ids[:, :-1])
    logp, _ = token_logprobs(hidden, model.lm_head.weight, ids[:, 1:])
    return (logp * mask[:, 1:]).sum(1).exp()


def sample(config, model, problems, kind, generator):
    """A group of answers to each problem -> the rollout, rewards (P, G)."""
    budget = safe.budget(config.size)
    uniforms = group_uniforms(kind, len(problems), config.group, budget, generator)
    rollout, _, rewards = grpo.sample(
        model, safe, problems, config.group, config, generator, uniforms
    )
    return rollout, rewards


def gradient(model, loss):
    """The gradient of a loss in all weights, one vector."""
    parameters = list(model.parameters())
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])


def baseline(config, model, kind, seed):
    """What the group's mean, as the baseline, makes of the gradient: by `repeats` groups for each
    problem, against the exact gradient of the mean success.
    """
    rng, generator = random.Random(f"baseline {seed}"), torch.Generator().manual_seed(seed)
    problems = [safe.draw(rng, config.size) for _ in range(config.prompts)]
    p = success(model, problems)  # (P,)
    true = gradient(model, p.mean())
    estimate = torch.zeros_like(true)
    counts = []
    for _ in range(config.repeats):
        rollout, rewards = sample(config, model, problems, kind, generator)
        adv = grpo.advantages(rewards, "mean").view(-1, 1)  # (P * G, 1)
        logp, _ = grpo.score(model, rollout, torch.arange(len(adv)), config)
        estimate += gradient(model, (adv * logp * rollout.mask).sum() / len(adv))
        counts.append(rewards.sum(1))
    C, G = torch.stack(counts).double(), config.group  # (repeats, P)
    p = p.detach().double()
    dispersion = ((C - G * p) ** 2).mean() / (G * p * (1 - p)).mean()
    estimate /= config.repeats
    return dict(
        zero_variance=((C == 0) | (C == G)).double().mean().item(),
        dispersion=dispersion.item(),
        scale=(estimate @ true / (true @ true)).item(),
        cosine=torch.cosine_similarity(estimate, true, 0).item(),
    )


def train(config, run, kind, lr, seed, base):
    """GRPO until the exact held-out pass@1 is at GOAL, or to the end."""
    model = copy.deepcopy(base)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    rng, generator = random.Random(seed + 1), torch.Generator().manual_seed(seed + 1)
    held_rng = random.Random("held out")
    held = [safe.draw(held_rng, config.size, held_out=True) for _ in range(config.eval_prompts)]
    budget = safe.budget(config.size)
    where = dict(phase="rl", arm=kind, lr=lr, seed=seed)
    for step in run.loop(f"{kind} {lr} {seed}", config.steps, model, optimizer, rng, generator):
        with torch.no_grad():
            now = success(model, held).mean().item()
        problems = [safe.draw(rng, config.size) for _ in range(config.prompts)]
        rollout, rewards = sample(config, model, problems, kind, generator)
        row = grpo.update(model, base, optimizer, rollout, rewards, config, budget, generator)
        dull = (rewards.std(1) == 0).double().mean().item()
        run.log(**where, step=step, success=now, zero_variance=dull, entropy=row["entropy"])
        run.say(success=now)
    return model
