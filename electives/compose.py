"""compose.py: who knows f(x) and g(x), and is rewarded for f(g(x)), learns to compose.

(Yuan et al., arXiv 2509.25123.) A small GPT has read every string function of tasks/pipelines.py
one at a time, and then a few pipelines of four bridge functions, until it begins to compose. It
knows all the atoms and seldom composes them. Then it practises pairs of eight functions, and is
tested on pipelines of five that it never saw composed. What carries over is no function, but
composition.

Reinforcement learning, on pipelines of one function or of two (r = 1 where the answer is right):

    A_i  = r_i - mean of the rewards of the same problem's answers
    loss = - sum_{i,t} A_i log p(token_{i,t} | problem, tokens before) / tokens of all answers

Its rivals sample as many answers to pipelines of two. Rejection fine-tuning imitates its own right
answers, a round at a time. "No negatives" is the same RL with max(A_i, 0) in the place of A_i.
Each has the learning rate with which two bases of their own (--seed 3 and 104) were right most
often about two functions never composed. On those rejection fine-tuning with two passes over its
answers was as good as with one; on the reported bases it forgot single functions: it has one.

    python -m electives.compose                 2 minutes on one core
    python -m electives.compose --seeds 3       the figure with error bands

What to see: RL on two functions learns to compose two that it never saw composed; RL on one learns
nothing about that. Longer pipelines gain less. The answers at the end show what was missing: most
often the result that should go on is garbled.

How this differs from the paper:
1. A model of 0.1 million parameters from scratch, 17 functions of two letters, answers that write
   down each step; the paper has Llama-3.1-8B and 25 functions written in Python.
2. A model from scratch has no idea that results go on. Pipelines of the bridge functions,
   which are neither trained on nor tested, tell it; RL begins when it is right about some of the
   pairs (--gate), not after a number of steps, because that comes all at once: within 45 to 150
   steps on the five seeds that we looked at.
3. Half of the training problems hold one more application, beside the pipeline: an answer to pairs
   alone would always have two lines, and that is learnt first.
4. Advantages are not divided by their spread; no groups are filtered: theirs are 0.
"""

import copy
import random
from collections import Counter
from dataclasses import dataclass
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import torch

import tasks
from experiment import (
    Flags,
    Run,
    UserError,
    band,
    claim,
    command,
    descend,
    flag,
    parse_args,
    pick_device,
    seeds_of,
)
from kernels import token_logprobs
from meter import Meter
from model import GPT, GPTConfig
from tasks import padded, pass_at_k, pipelines

SOURCE = "Yuan et al., arXiv 2509.25123"
LEVELS = (1, 2, 3, 4, 5)  # functions in a pipeline of a test
EASY, HARD = 2, 4  # levels of pass@k
ARMS = "RL level 2", "RL level 2, no negatives", "rejection level 2", "RL level 1"
TASK = pipelines.tokenizer


@dataclass
class Config(Flags):
    steps: int = flag(80, "RL steps of an arm", quick=2, low=1)
    prompts: int = flag(16, "problems per step", quick=4, low=1, high=1000)
    group: int = flag(16, "answers per problem", quick=4, low=2, high=1000)
    lr: float = flag(2e-4, "RL learning rate (AdamW, constant)", low=0)
    rounds: int = flag(5, "rounds of rejection fine-tuning, as many answers in all", quick=2, low=1)
    tries: int = flag(2, "its answers per problem", low=1, high=1000)
    epochs: int = flag(1, "its passes over the right answers of a round", low=1, high=1000)
    rejection_lr: float = flag(1e-4, "its learning rate (AdamW, constant)", low=0)
    atoms: float = flag(0.9, "success on atoms, from which on the base reads pipelines", quick=0.0)
    bridge: float = flag(0.1, "share of bridge pipelines from then on", low=0, high=1)
    gate: float = flag(0.3, "success on those, of two functions, that ends the warm-up", quick=0.0)
    warm_up: int = flag(1500, "steps of the warm-up at most", quick=25, low=1)
    warm_up_lr: float = flag(2e-3, "its learning rate (AdamW)", low=0)
    eval_prompts: int = flag(512, "held-out problems of each level", quick=8, low=1, high=100_000)

    def __post_init__(self):
        if self.answers % (self.rounds * self.tries):
            raise UserError(
                f"--rounds {self.rounds} of {self.tries} answers to each problem don't make the "
                f"{self.answers} answers of an RL arm"
            )

    @property
    def answers(self):
        """What an arm samples."""
        return self.steps * self.prompts * self.group

    @property
    def ks(self):
        """The k of pass@k: 1, 2, 4 ... 64."""
        return [2**i for i in range(3 if self.quick else 7)]


# --------------------------------------------------------------------------------------------------
# The method: pure functions of tensors. P problems, G answers to each, R = P * G rows, T tokens


def advantages(rewards, negatives=True):
    """How much better each answer is than the others to its problem: rewards (P, G) -> (P, G)."""
    centred = rewards - rewards.mean(1, keepdim=True)
    return centred if negatives else centred.clamp_min(0)


def policy_loss(logp, mask, weight):
    """-weight * logp of each answer token, over the number of tokens: logp, mask (R, T), weight
    (R, 1). An advantage as the weight is REINFORCE, 1 is imitation.
    """
    return -(weight * logp * mask).sum() / mask.sum()


# --------------------------------------------------------------------------------------------------
# A step


def score(model, ids):
    """The log-probability (R, T - 1) of each token of ids (R, T) given those before it."""
    hidden = model.hidden(ids[:, :-1])  # (R, T - 1, C)
    return token_logprobs(hidden, model.lm_head.weight, ids[:, 1:])[0]


def answer(model, problems, n, generator):
    """n sampled answers to each problem -> Rollout, texts, rewards (P, n): 1 for right."""
    budget = pipelines.budget(max(len(names) for p in problems for _, names in p))
    at_once = max(1, 512 // n)  # problems
    return tasks.answer(model, pipelines, problems, n, budget, generator, at_once=at_once)


def practise(model, optimizer, problems, negatives, config, generator):
    """One step of RL -> its metrics."""
    # 1. Answers, and how much better each is than its siblings
    rollout, _, rewards = answer(model, problems, config.group, generator)
    adv = advantages(rewards, negatives).view(-1, 1).to(rollout.ids.device)  # (R, 1)
    # 2. More of what was better, less of what was worse
    loss = policy_loss(score(model, rollout.ids), rollout.mask[:, 1:], adv)
    optimizer.zero_grad()
    loss.backward()
    descend(optimizer, loss)
    return dict(reward=rewards.mean().item(), loss=loss.item())


def imitate_right(model, optimizer, problems, config, generator):
    """One round of rejection fine-tuning -> its metrics."""
    # 1. Answers, of which the right ones stay
    rollout, _, rewards = answer(model, problems, config.tries, generator)
    right = rollout[rewards.flatten().to(rollout.ids.device) > 0]
    # 2. Imitation of these, in another order each time
    loss = torch.zeros(())
    for _ in range(config.epochs):
        order = torch.randperm(len(right.ids), generator=generator)
        for i in range(0, len(order), 64):
            part = right[order[i : i + 64]]
            loss = policy_loss(score(model, part.ids), part.mask[:, 1:], 1.0)
            optimizer.zero_grad()
            loss.backward()
            descend(optimizer, loss)
    return dict(reward=rewards.mean().item(), loss=loss.item())


# --------------------------------------------------------------------------------------------------
# Training


def build(device):
    shape = GPTConfig(TASK.n_vocab, block_size=80, n_layer=3, n_head=4, n_embd=64, qk_norm=True)
    return GPT(shape).to(device)


def adamw(model, lr, weight_decay=0.0):
    return torch.optim.AdamW(
        model.parameters(), lr, betas=(0.9, 0.95), weight_decay=weight_decay, fused=True
    )


def demonstration(rng, bridge):
    """What the base model reads -> prompt, answer: the atoms, and a share of bridge pipelines."""
    problem = pipelines.bridged(rng) if rng.random() < bridge else pipelines.listed(rng)
    return pipelines.prompt(problem), pipelines.demonstrate(rng, problem)


def bridge_success(model, size, seed):
    """Success on bridge functions, `size` of them in a pipeline."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    problems = [[pipelines.pipeline(rng, size, pipelines.BRIDGE)] for _ in range(128)]
    return answer(model, problems, 1, generator)[2].mean().item()


def warm_up(config, run, seed, device):
    """Imitation, from scratch -> the base model: atoms until it knows them, then, at a tenth of the
    learning rate, bridge pipelines among them until it begins to compose (--gate). UserError if it
    never does.
    """
    torch.manual_seed(seed)
    rng = random.Random(seed)
    model = build(device)
    optimizer = adamw(model, config.warm_up_lr, weight_decay=0.01)
    kept = dict(bridge=0.0, over=False)
    phase = f"base {seed}"
    for step in run.loop(
        phase, config.warm_up, model, optimizer, rng, kept=kept, until=partial(kept.get, "over")
    ):
        rate = config.warm_up_lr * (0.1 if kept["bridge"] else min(1, (step + 1) / 50))
        optimizer.param_groups[0]["lr"] = rate
        pairs = [demonstration(rng, kept["bridge"]) for _ in range(32)]
        ids, mask = (x.to(device) for x in padded(pairs, TASK))
        loss = policy_loss(score(model, ids), mask[:, 1:], 1.0)
        optimizer.zero_grad()
        loss.backward()
        descend(optimizer, loss)
        if (step + 1) % (5 if kept["bridge"] else 20) == 0:
            success = bridge_success(model, 2 if kept["bridge"] else 1, step)
            run.say(loss=loss.item(), bridge=success)
            if kept["bridge"]:
                kept["over"] = success >= config.gate
            elif success >= config.atoms:
                kept["bridge"] = config.bridge
    if not kept["over"]:
        raise UserError(
            f"{phase} does not compose bridge functions after {config.warm_up} steps "
            f"(--gate {config.gate}): there is nothing to build on, try another --seed"
        )
    run.log_once(partial(test, model, config, seed), phase="test", arm="base", seed=seed, step=0)
    return model


def held_out(level, n, seed):
    rng = random.Random(f"held out {level} {seed}")
    return [pipelines.draw(rng, level, held_out=True) for _ in range(n)]


def test(model, config, seed):
    """Success at each level, and the share of each kind of mistake, of answers to held-out
    problems, the same for all arms.
    """
    row = {}
    for level in LEVELS:
        problems = held_out(level, config.eval_prompts, seed)
        generator = torch.Generator().manual_seed(seed)
        _, texts, rewards = answer(model, problems, 1, generator)
        row[f"level {level}"] = rewards.mean().item()
        kinds = Counter(map(pipelines.mistake, problems, texts))
        for kind in pipelines.MISTAKES:
            row[f"{kind} at {level}"] = kinds[kind] / len(problems)
    return row


def test_many(model, config, seed):
    """pass@k on held-out problems, from as many answers to each as the largest k."""
    n = max(config.ks)
    row = {}
    for level in (EASY, HARD):
        problems = held_out(level, max(1, config.eval_prompts // 8), seed)
        meter = Meter()
        _, _, rewards = answer(model, problems, n, torch.Generator().manual_seed(seed))
        right = rewards.sum(1)  # (P,)
        row[f"level {level}"] = [pass_at_k(n, right, k).mean().item() for k in config.ks]
    return row | meter.solved(right.sum())  # at the hard level


def train(config, run, arm, seed, base):
    """One arm from the base -> the trained model."""
    model = copy.deepcopy(base)
    rejection = arm.startswith("rejection")
    optimizer = adamw(model, config.rejection_lr if rejection else config.lr)
    rng, generator = random.Random(seed + 1), torch.Generator().manual_seed(seed + 1)
    level = 1 if "level 1" in arm else 2
    steps = config.rounds if rejection else config.steps
    P = config.answers // (config.rounds * config.tries) if rejection else config.prompts
    for step in run.loop(f"{arm} {seed}", steps, model, optimizer, rng, generator):
        problems = [pipelines.draw(rng, level) for _ in range(P)]
        if rejection:
            row = imitate_right(model, optimizer, problems, config, generator)
        else:
            negatives = "no negatives" not in arm
            row = practise(model, optimizer, problems, negatives, config, generator)
        run.log(phase="train", arm=arm, seed=seed, step=step + 1, **row)
        run.say(**row)
    where = dict(phase="test", arm=arm, seed=seed, step=steps)
    run.log_once(partial(test, model, config, seed), **where)
    return model


# --------------------------------------------------------------------------------------------------
# The figure and its claims


def logged(run, phase, arm, key):
    """What was measured of an arm, of each seed (seeds, ...)."""
    rows = [r for r in run.rows if r["phase"] == phase and r["arm"] == arm]
    return np.array([r[key] for r in rows])


def levels(run, arm):
    """Success at each level (seeds, LEVELS)."""
    return np.stack([logged(run, "test", arm, f"level {level}") for level in LEVELS], 1)


def gains(run, level):
    """pass@k after RL on two functions minus before (seeds, ks)."""
    before, after = (logged(run, "pass@k", arm, f"level {level}") for arm in ("base", ARMS[0]))
    return after - before


def figure(config, run):
    success = {arm: levels(run, arm) for arm in ("base", *ARMS)}
    fig, axes = plt.subplots(1, 4, figsize=(19, 4.8), layout="constrained")
    draw_levels(axes[0], success)
    for ax, level in zip(axes[1:3], (EASY, HARD), strict=True):
        draw_tries(ax, config, run, level)
    draw_mistakes(axes[3], run)
    two, three = ({arm: y[:, i].mean() for arm, y in success.items()} for i in (1, 2))
    fig.suptitle(
        f"Rewarded for f(g(x)), two functions never composed before: {two['base']:.2f} → "
        f"{two[ARMS[0]]:.2f}; three: {three['base']:.2f} → {three[ARMS[0]]:.2f}, by rejection "
        f"fine-tuning {three[ARMS[2]]:.2f} ({config.seeds} seed{'s' * (config.seeds > 1)})"
    )
    return fig, claims_of(config, run, success)


def told(x, y):
    return f" ({x.mean():.2f}, {y.mean():.2f})"


def claims_of(config, run, success):
    n = config.seeds
    two, three = ({arm: y[:, i] for arm, y in success.items()} for i in (1, 2))
    rl, masked, rejection, single = ARMS
    # what was not composed: all mistakes but an atomic slip
    lost = {
        arm: sum(logged(run, "test", arm, f"{kind} at 2") for kind in pipelines.MISTAKES[1:])
        for arm in ("base", rl)
    }
    return [
        claim(
            "gain",
            "level 2: RL level 2 minus base, worst seed",
            SOURCE,
            "-",
            (two[rl] - two["base"]).min(),
            ">=",
            0.3,
            n,
            told(two["base"], two[rl]),
        ),
        claim(
            "composes",
            "level 2: answers of RL level 2 that do not compose (base)",
            SOURCE,
            "0 ignore it",
            lost[rl],
            "<=",
            0.05,
            n,
            f" ({lost['base'].mean():.2f})",
        ),
        claim(
            "atoms",
            "level 2: RL level 1 minus base, best seed",
            SOURCE,
            "like the base",
            (two[single] - two["base"]).max(),
            "<=",
            0.1,
            n,
        ),
        *against_rivals(three[rl], three[rejection], three[masked]),
        *reranking(config, run),
    ]


def against_rivals(rl, rejection, masked):
    """All at level 3 (seeds,)."""
    n = len(rl)
    return [
        claim(
            "over rejection",
            "level 3: RL level 2 minus rejection fine-tuning",
            SOURCE,
            "0.24",
            rl - rejection,
            ">=",
            0.1,
            n,
            told(rl, rejection),
        ),
        claim(
            "ratio",
            "level 3: RL level 2 over rejection fine-tuning",
            SOURCE,
            "10",
            rl.mean() / max(rejection.mean(), 1e-9),
            ">=",
            3,
            n,
        ),
        claim(
            "negatives",
            "level 3: RL level 2 minus the same without negatives",
            "design of the task",
            "-",
            rl - masked,
            ">",
            0,
            n,
            told(rl, masked),
        ),
    ]


def reranking(config, run):
    """Whether the gain of RL shrinks with the number of answers, or widens."""
    claims = []
    for level, op, paper in ((EASY, "<", "shrinks"), (HARD, ">", "0.21 (k = 1024)")):
        gain = gains(run, level)  # (seeds, ks)
        one, many = gain[:, 0], gain[:, -1]
        text = f"level {level}: gain at pass@{config.ks[-1]} minus gain at pass@1"
        beside = told(many, one)
        claims.append(
            claim(f"gap at {level}", text, SOURCE, paper, many - one, op, 0, config.seeds, beside)
        )
    return claims


def draw_levels(ax, success):
    for arm, y in success.items():
        style = dict(color="k", ls="--") if arm == "base" else {}
        band(ax, np.array(LEVELS), y, arm, marker="o", **style)
    ax.set(title="Composing functions never composed in training", xlabel="functions in a pipeline")
    ax.set(ylabel="held-out pass@1", ylim=(0, 1.02), xticks=LEVELS)
    ax.legend()


def draw_tries(ax, config, run, level):
    gain = gains(run, level)
    for arm, style in (("base", dict(color="k", ls="--")), (ARMS[0], {})):
        band(ax, config.ks, logged(run, "pass@k", arm, f"level {level}"), arm, marker="o", **style)
    k = config.ks[-1]
    first, last = gain[:, 0].mean(), gain[:, -1].mean()
    ax.set_title(f"{level} functions: {first:+.2f} at k = 1, {last:+.2f} at k = {k}")
    ax.set(xlabel="k (answers)", ylabel="held-out pass@k", ylim=(0, 1.02))
    ax.set_xscale("log", base=2)
    ax.legend()


def draw_mistakes(ax, run, level=2):
    arms = ("base", *ARMS)
    left = np.zeros(len(arms))
    for kind in pipelines.MISTAKES:
        share = np.array([logged(run, "test", arm, f"{kind} at {level}").mean() for arm in arms])
        ax.barh(arms, share, left=left, label=kind)
        left += share
    ax.invert_yaxis()
    ax.set(title=f"First mistake in the steps, {level} functions", xlabel="share of answers")
    ax.legend(loc="center right")


def main():
    config = parse_args(Config, __doc__)
    device = pick_device(config.device)
    with Run(config) as run:
        run.introduce(device, sum(p.numel() for p in build(device).parameters()))
        for seed in seeds_of(config):
            models = {"base": warm_up(config, run, seed, device)}
            for arm in ARMS:
                models[arm] = train(config, run, arm, seed, models["base"])
            for arm in ("base", ARMS[0]):
                where = dict(phase="pass@k", arm=arm, seed=seed, step=config.steps)
                run.log_once(partial(test_many, models[arm], config, seed), **where)
        problems = held_out(3, 3, "shown")
        written = {}
        for arm, model in models.items():
            generator = torch.Generator().manual_seed(0)
            _, texts, rewards = answer(model, problems, 1, generator)
            written[arm] = list(zip(texts, rewards.flatten().tolist(), strict=True))
        run.samples([pipelines.prompt(p) for p in problems], **written)
        run.finish(*figure(config, run))


if __name__ == "__main__":
    command(main)
