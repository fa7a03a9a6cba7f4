"""Fast and slow: a prompt that evolves beside weights that learn (Tiwari et al., arXiv 2605.12484).

    python -m experiments.fastslow          about 3 minutes on two cores

Three stages; in each, answers must obey a rule that nobody names. The base model knows each rule by
a word in the hint slot.

fast (the prompt)    every 6 steps the population, at most 4 words for the hint slot, and 4 random
                     others are tried on 8 prompts each; those with at least half of the best one's
                     reward live on
slow (the weights)   GRPO, each group's answers spread over the population

What to see: with both, every stage is learnt, the first one from fewer sampled tokens than by the
weights alone.
"""

import copy
import random
from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
import torch

from engine import generate
from experiment import (
    Flags,
    Run,
    UserError,
    claim,
    command,
    descend,
    flag,
    parse_args,
    pick_device,
    seeds_of,
    series,
)
from opd import advantages, divergence
from tasks.walkers import (
    answer,
    answer_logprobs,
    curves,
    first_at,
    from_scratch,
    mean,
    model_files,
    over,
    shape,
)
from tasks.walks import (
    ANSWER,
    EOS,
    NOHINT,
    PASSWORDS,
    PROMPT,
    RULES,
    crossing,
    prompt,
    renames,
    reward,
    text,
)

# arm: its name in the figure
ARMS = {"fast and slow": "both", "slow": "weights only", "fast": "prompt only"}
SLOTS = (NOHINT, *RULES, *PASSWORDS[:8], *range(8))  # what may stand in the third hint slot


@dataclass
class Config(Flags):
    seeds: int = flag(3, "repeat over this many seeds", quick=1, low=1, high=1000)
    steps: int = flag(60, "steps of a stage", quick=2, low=1)
    batch: int = flag(64, "answers per step", quick=8, low=8, high=4096)
    group: int = flag(8, "answers per prompt", quick=4, low=2)
    lr: float = flag(1e-3, "learning rate (AdamW, constant)", low=0, high=1)
    n_embd: int = flag(64, "channels of the model", quick=32, low=8, high=1024)
    sft_steps: int = flag(1800, "steps of training the base model", quick=10, low=1)

    def __post_init__(self):
        if self.group > 0 and self.batch % self.group:
            raise UserError(f"--batch {self.batch} is no multiple of --group {self.group}")
        shape(self.n_embd)


def prompt_with(word):
    """pair -> its prompt with a word in the hint slot."""
    return lambda pair: prompt(pair, third=word)


def obeyed(pair, tokens, rule):
    return reward(pair, tokens) * renames(tokens, rule)


def attempt(model, pairs, words, rule, generator):
    """One answer to each pair with its word in the hint slot -> the rollout, rewards (B,)."""
    prompts = [prompt_with(word)(pair) for pair, word in zip(pairs, words, strict=True)]
    rollout = generate(model, prompts, 1, ANSWER, stop=EOS, generator=generator)
    rewards = [
        obeyed(pair, tokens, rule) for pair, tokens in zip(pairs, rollout.tokens(), strict=True)
    ]
    return rollout, torch.tensor(rewards, device=rollout.ids.device)


def survivors(trial, rewards):
    """The words of `trial`, at most 4, with half of the best one's reward or more, best first.

    rewards: 8 for each word, word by word.
    """
    scores = rewards.view(-1, 8).mean(1).tolist()
    ranked = sorted(zip(scores, trial, strict=True), key=lambda pair: -pair[0])
    best = ranked[0][0]
    return [word for score, word in ranked if score >= best / 2][:4]


def fast_and_slow(config, run, arm, seed, base):
    """The three stages of an arm -> the trained model, its best word. Logs their success."""
    phase = f"{arm} {seed}"
    model = copy.deepcopy(base)
    optimizer = torch.optim.AdamW(
        model.parameters(), config.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True
    )
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    kept = dict(population=[NOHINT], sampled=0)
    for step in run.loop(phase, 3 * config.steps, model, optimizer, rng, generator, kept):
        rule = step // config.steps
        train_pairs, test_pairs = crossing(rule)
        # 1. Fast: which words to go on with
        if "fast" in arm and step % 6 == 0:
            others = [word for word in SLOTS if word not in kept["population"]]
            trial = kept["population"] + rng.sample(others, 4)
            pairs = rng.choices(train_pairs, k=8) * len(trial)
            words = [word for word in trial for _ in range(8)]
            rollout, rewards = attempt(model, pairs, words, rule, generator)
            kept["sampled"] += int(rollout.mask.sum())
            kept["population"] = survivors(trial, rewards)
        population = kept["population"]
        # 2. Slow: a step of GRPO
        if "slow" in arm:
            asked = rng.choices(train_pairs, k=config.batch // config.group)
            pairs = [pair for pair in asked for _ in range(config.group)]
            words = [population[i % len(population)] for i in range(config.batch)]
            rollout, rewards = attempt(model, pairs, words, rule, generator)
            kept["sampled"] += int(rollout.mask.sum())
            y, mask = rollout.ids[:, PROMPT:], rollout.mask[:, PROMPT:]
            lp = answer_logprobs(model, rollout.ids)  # (B, T, V)
            advantage = advantages(rewards.view(-1, config.group)).view(-1, 1)  # (B, 1)
            loss = (advantage * divergence(lp, None, y, "token") * mask).sum() / mask.sum()
            optimizer.zero_grad()
            loss.backward()
            descend(optimizer, loss)
        # 3. Log
        if (step + 1) % 5 == 0 or (step + 1) % config.steps == 0:
            word = population[0]
            eval_seed = 10_000 + 1000 * seed + step
            answers = answer(model, test_pairs, prompt_with(word), 4, eval_seed)
            row = {"pass@1": mean([obeyed(*a, rule) for a in answers]), "word": word}
            row |= dict(stage=rule, sampled_tokens=kept["sampled"])
            run.log(phase="train", arm=arm, seed=seed, step=step + 1, **row)
            run.say(**{"stage": rule, "pass@1": row["pass@1"]})
    return model, kept["population"][0]


def show(run, **deployed):
    """What each model, with its word, answers to three held-out problems of the last stage."""
    pairs = crossing(2)[1][:3]
    written = {}
    for name, (model, word) in deployed.items():
        answers = answer(model, pairs, prompt_with(word), 1, 0)
        written[name] = [(text(tokens), obeyed(pair, tokens, 2)) for pair, tokens in answers]
    run.samples([text(prompt(pair)) for pair in pairs], **written)


def figure(config, run):
    n, stage = config.seeds, config.steps
    fig, axes = plt.subplots(1, 2, figsize=(14, 5), layout="constrained")
    ylabel = "held-out pass@1 under the stage's rule"
    curves(axes[0], run, ARMS, "pass@1", "", ylabel, unit="step")
    axes[0].legend(axes[0].lines, ARMS.values())
    for i in (1, 2):
        axes[0].axvline(i * stage, color="k", lw=0.5)
    ends, spent = {}, {}
    for i, arm in enumerate(ARMS):
        x, y = series(run, "pass@1", phase="train", arm=arm)
        ends[arm] = y[:, np.isin(x, [stage, 2 * stage, 3 * stage])]  # (seeds, stages)
        first_stage = dict(phase="train", arm=arm, stage=0)
        spent[arm] = series(run, "sampled_tokens", **first_stage)[1]
        y = series(run, "pass@1", **first_stage)[1]
        axes[1].plot(spent[arm].T / 1e3, y.T, color=f"C{i}", lw=1, marker=".")
    learnt = {arm: (e >= 0.75).sum(1) for arm, e in ends.items()}  # (seeds,)
    stages = {arm: count.sum() for arm, count in learnt.items()}
    # Who never gets there has needed at least all that it sampled
    slow = first_at(run, "slow", 0.75, stage=0)
    both = first_at(run, "fast and slow", 0.75, stage=0)
    ratio = over(np.minimum(slow, spent["slow"][:, -1]), both)
    never = " (at least: not all seeds get there)" * bool(np.isinf(slow).any())
    ratios = ", ".join(f"{r:.1f}" for r in ratio)
    counts = ", ".join(f"{name} {stages[arm]}" for arm, name in ARMS.items())
    axes[0].set_title(f"Stages learnt, of {3 * n}: {counts}")
    axes[1].axhline(0.75, color="k", ls=":", lw=1)
    axes[1].set_title(f"First stage, each seed: tokens to .75, weights only over both: {ratios}")
    axes[1].set(xlabel="sampled tokens (thousands)", ylabel="held-out pass@1", ylim=(-0.02, 1.02))
    more = learnt["fast and slow"] - learnt["slow"]
    higher = (ends["fast and slow"] - ends["fast"]).mean(1)
    speed = f"tokens to .75 in the first stage, weights only over both, worst seed{never}"
    source = "Tiwari et al., arXiv 2605.12484"
    # fmt: off
    return fig, [
        claim("both", f"stages at .75 or more, both (of {3 * n})",
              source, "all 3",
              stages["fast and slow"], ">=", 3 * n, n),
        claim("slow", "stages of three at .75 or more, both minus weights only",
              source, "weights stall",
              more, ">=", 1, n, f" ({stages['slow']} of {3 * n})"),
        claim("fast", "pass@1 at the ends of the stages, both minus prompt only",
              source, "lower ceiling",
              higher, ">", 0, n, f" ({stages['fast']} of {3 * n})"),
        claim("speed", speed,
              source, "1.4 to 3 (steps)",
              ratio.min(), ">=", 1.4, n, f" ({ratios})"),
    ]
    # fmt: on


def main():
    config = parse_args(Config, __doc__)
    device = pick_device(config.device)
    with Run(config, also=model_files(config, "base")) as run:
        run.introduce(device, shape(config.n_embd).parameters)
        base = from_scratch(config, run, "base", device)
        deployed = {"base": (base, NOHINT)}
        for seed in seeds_of(config):
            for arm in ARMS:
                deployed[arm] = fast_and_slow(config, run, arm, seed, base)
        show(run, **deployed)
        run.finish(*figure(config, run))


if __name__ == "__main__":
    command(main)
