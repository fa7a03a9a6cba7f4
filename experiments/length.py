"""length.py: why do wrong answers grow long under GRPO, where nothing rewards length?

A loss that is divided by its answer's length punishes a long wrong answer less per token, and
rewards a short right one more. Twice the same experiment, with a policy that is two stop
probabilities and no model, and with a GPT that rambles. A coin decides what is right, and is thrown
before the answer: the question says beforehand whether the answer will count as right.

    python -m experiments.length            3 seeds, 5 minutes

What to see: under grpo wrong answers get many times as long as right ones, under dr_grpo, whose
loss is divided by a constant, both stay as they are.
"""

import copy
import math
import random
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import torch

import grpo
import tasks
from engine import generate
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
from grpo import LOSSES, advantages, aggregation_weights, mean
from tokenizer import CharTokenizer

BUDGET = 64  # tokens of an answer
# name: advantage, aggregation
ARMS = {
    "grpo": ("std", "sequence"),
    "token mean of the batch": ("std", "token"),
    "dr_grpo": ("mean", "constant"),
}
# The letters of tasks/addition.py, of which only digits and = are used
rambling = SimpleNamespace(tokenizer=CharTokenizer("0123456789abcdefghABCDEFGH="))


@dataclass
class Config(grpo.Config):
    seeds: int = flag(3, "repeat over this many seeds", quick=1, low=1)
    sft_steps: int = flag(150, "steps of supervised warm-up", quick=10, low=1)
    steps: int = flag(60, "steps of reinforcement learning", quick=2, low=1)

    def idle(self):
        compared = dict.fromkeys(
            ("loss", "advantage", "aggregation"), "grpo and dr_grpo are compared"
        )
        names = "task", "size", "eval_every", "eval_prompts"
        return (
            super().idle() | compared | dict.fromkeys(names, "a coin is asked for, none held out")
        )


def length_bias(
    advantage,
    aggregation,
    seed,
    steps=300,
    prompts=32,
    group=8,
    cap=64,
    hazard=0.1,
    lr=2.0,
):
    """A policy that is right or wrong by a coin, and stops with a learnt hazard for each outcome.

    Nothing about length is rewarded, so an unbiased loss leaves both lengths alone.
    -> expected length (steps + 1, 2): wrong, right.
    """
    rng = np.random.default_rng(seed)
    logit = np.full(2, np.log(hazard / (1 - hazard)))
    lengths = []
    for _ in range(steps + 1):
        h = 1 / (1 + np.exp(-logit))
        lengths.append((1 - (1 - h) ** cap) / h)  # the mean of a geometric length cut at the cap
        right = rng.integers(0, 2, prompts * group)
        drawn = rng.geometric(h[right])
        length = np.minimum(drawn, cap)
        mask = torch.as_tensor(np.arange(cap) < length[:, None]).float()  # (R, cap)
        # one weight for all tokens of a row
        a = aggregation_weights(mask, aggregation, 1 / hazard)[:, 0].numpy()  # (R,)
        rewards = torch.as_tensor(right).float().view(prompts, group)
        adv = advantages(rewards, advantage).flatten().numpy()  # (R,)
        # d logp / d logit is 1 for a stop that was drawn, and -h for each draw
        slope = a * adv * ((drawn <= cap) - h[right] * length)
        logit = logit + lr * np.array([slope[right == 0].sum(), slope[right == 1].sum()])
    return np.array(lengths)


def path(arm, seed):
    """Every tenth point of length_bias's path, as a row of metrics."""
    wrong, right = length_bias(*ARMS[arm], seed)[::10].T.tolist()
    return dict(at=list(range(0, 301, 10)), wrong=wrong, right=right)


def ramble(rng):
    """A question that says if its answer is right (1) or wrong (0), and digits of any number."""
    question = f"{rng.randrange(2)}="
    digits = int(math.log(1 - rng.random()) / math.log(0.9))  # each is the last with probability .1
    return question, "".join(rng.choice("0123456789") for _ in range(digits))


def warm_up(config, run, seed, device):
    """Supervised training on rambling answers -> the base model."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    model = grpo.build(config, rambling, device)
    return tasks.imitate(
        model, rambling.tokenizer, lambda: ramble(rng), run, seed, config.sft_steps, rng
    )


def train(config, run, seed, base):
    """RL from the base: a coin, which the question shows, decides if an answer counts as right."""
    arm = config.loss
    model = copy.deepcopy(base)
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), config.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    encode, stop = rambling.tokenizer.encode, rambling.tokenizer.stop
    for step in run.loop(f"{arm} {seed}", config.steps, model, optimizer, rng, generator):
        coins = [rng.randrange(2) for _ in range(config.prompts * config.group)]
        prompts = [encode(f"{coin}=") for coin in coins]
        rollout = generate(
            model, prompts, 1, BUDGET, config.temperature, stop=stop, generator=generator
        )
        coins = torch.tensor(coins)
        rewards = coins.float().view(config.prompts, config.group)
        grpo.update(model, base, optimizer, rollout, rewards, config, BUDGET, generator)
        wrong, right = (mean(rollout.lengths[coins == coin].float()) for coin in (0, 1))
        run.log(
            phase="rl", arm=arm, seed=seed, step=step + 1, length_right=right, length_wrong=wrong
        )


def told(x):
    """The mean of x (seeds,) and its standard deviation, as text."""
    return f"{x.mean():.3g}" + (f" ± {x.std(ddof=1):.2g}" if len(x) > 1 else "")


def flat(ratio):
    """Wrong over right length -> the longer over the shorter."""
    return np.maximum(ratio, 1 / ratio)


def figure(config, run):
    fig, (without, with_gpt) = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
    ratio, gpt = {}, {}
    for i, arm in enumerate(ARMS):
        paths = [row for row in run.rows if row["phase"] == "no model" and row["arm"] == arm]
        ends, tails = [], []
        for outcome, style in (("wrong", "-"), ("right", "--")):
            look = dict(label=f"{arm}, {outcome}", ls=style, color=f"C{i}")
            y = np.array([row[outcome] for row in paths])  # (8 seeds, n)
            band(without, np.array(paths[0]["at"]), y, **look)
            ends.append(y[:, -1])
            if arm in LOSSES:
                x, y = series(run, f"length_{outcome}", phase="rl", arm=arm)  # y (seeds, steps)
                band(with_gpt, x, y, **look)
                # no row at all has such a length where few coins are drawn
                tails.append(y[:, -10:].mean(1) if len(x) else np.array([np.nan]))
        ratio[arm] = ends[0] / ends[1]
        if tails:  # a wrong answer that is a stop alone has no length to speak of
            gpt[arm] = np.where(tails[0] > 1, tails[0] / tails[1], np.nan)
    without.set(
        title="Without a model: one stop probability per outcome (8 seeds)",
        xlabel="step",
        ylabel="expected length (tokens)",
    )
    with_gpt.set(
        title=f"With a GPT ({config.seeds} seeds)", xlabel="RL step", ylabel="mean length (tokens)"
    )
    for ax in fig.axes:
        if ax.lines:
            ax.legend()
    fig.suptitle(
        "The question says beforehand whether the answer will count as right; nothing rewards "
        f"length.\nWith a GPT wrong answers end {told(gpt['grpo'])} times as long as right ones "
        "if a loss is divided by its answer's length;\nif by a constant, the longer are "
        f"{told(flat(gpt['dr_grpo']))} times as long as the shorter",
        fontsize="medium",
    )
    return fig, claims_of(ratio, gpt, config.seeds)


def claims_of(ratio, gpt, seeds):
    """Of wrong over right length: ratio without a model (8,), gpt with one (seeds,)."""
    liu = "Liu et al., arXiv 2503.20783"
    token = ratio["token mean of the batch"] - ratio["grpo"]
    longer = "the longer over the shorter, dr_grpo"
    return [
        claim(
            "grpo",
            "no model: wrong over right length, grpo",
            liu,
            "wrong grow",
            ratio["grpo"],
            ">=",
            5,
            8,
        ),
        claim(
            "token",
            "no model: token mean of the batch, minus grpo's",
            "derived",
            "below grpo",
            token,
            "<",
            0,
            8,
        ),
        claim("dr_grpo", f"no model: {longer}", liu, "flat", flat(ratio["dr_grpo"]), "<=", 1.2, 8),
        claim(
            "gpt grpo",
            "GPT: wrong over right length, grpo",
            liu,
            "wrong grow",
            gpt["grpo"],
            ">=",
            5,
            seeds,
        ),
        claim("gpt dr_grpo", f"GPT: {longer}", liu, "flat", flat(gpt["dr_grpo"]), "<=", 1.2, seeds),
    ]


def main():
    config = parse_args(Config, __doc__)
    device = pick_device(config.device)
    model = grpo.build(config, rambling, device)  # an impossible shape ends here
    with Run(config) as run:
        run.introduce(device, model.config.parameters)
        for arm in ARMS:
            for seed in range(config.seed, config.seed + 8):
                where = dict(phase="no model", arm=arm, seed=seed, step=300)
                run.log_once(partial(path, arm, seed), **where)
        for seed in seeds_of(config):
            base = warm_up(config, run, seed, device)
            for loss in ("grpo", "dr_grpo"):
                train(replace(config, loss=loss), run, seed, base)
        run.finish(*figure(config, run))


if __name__ == "__main__":
    command(main)
