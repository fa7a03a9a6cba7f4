"""frontier.py: pay in training or with every question? Reinforcement learning and best-of-n move
along one frontier.

    python -m experiments.frontier          3 seeds, 10 minutes of one core

With a judge that says right or wrong, all that counts of a new policy is how often it is right: to
be right on a share q of one prompt's answers instead of a share p costs at least

    KL = q log(q / p) + (1 - q) log((1 - q) / (1 - p))        nats away from the base,

spent by whoever makes all right answers likelier by the same factor, and nothing else. Both
methods aim at such a policy: the best of n (any right one of n draws) has q = 1 - (1 - p)^n, and
reward - beta * KL is largest at logit q = logit p + 1 / beta. GRPO with its KL in the reward
(--kl k1) is trained at four beta; its accuracy and its KL on held-out problems are measured, and
compared with what the accuracy has to cost there.

    break-even = sampled tokens of the training / ((n - 1) * tokens of an answer)     questions

is when the training has cost less than drawing n answers to each question (n: such that the best of
n is right as often).

What to see: best-of-n lies on the frontier. GRPO lies below it, never above: it gets better, and
spends more nats on it than it would have to.

How this differs from the papers (Beirami et al., arXiv 2401.01879; Gao et al., arXiv 2210.10760):
the reward is the truth, so that nothing is overoptimised, and all curves are of a prompt's own p.
"""

import copy
import dataclasses
import random
from dataclasses import dataclass
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import torch

import grpo
from experiment import Run, claim, command, flag, parse_args, pick_device, seeds_of
from tasks import addition

SOURCE = "derived"
BETAS = 1.0, 0.5, 0.25, 0.1
NS = 1, 2, 4, 8, 16, 32, 64


@dataclass
class Config(grpo.Config):
    seeds: int = flag(3, "repeat over this many seeds", quick=1, low=1)
    size: int = flag(3, "columns of an addition", quick=2, low=1, high=8)
    n_embd: int = flag(64, "channels of the GPT: 2 layers, 8 heads", quick=32, low=8, high=4096)
    sft_steps: int = flag(1000, "steps of supervised warm-up", quick=10, low=1)
    steps: int = flag(50, "steps of reinforcement learning at each beta", quick=2, low=1)
    lr: float = flag(6e-4, "RL learning rate (AdamW, constant)", low=0)
    kl: str = flag("k1", "KL estimator: k1 is in the reward", choices=("k1", "k2", "k3"))
    prompts: int = flag(16, "problems in a step", quick=4, low=1, high=4096)
    group: int = flag(8, "answers to each problem", quick=4, low=2, high=1024)
    eval_prompts: int = flag(12, "held-out problems", quick=4, low=1, high=65536)
    draws: int = flag(256, "answers to each, of each policy", quick=64, low=64, high=2**14)

    def idle(self):
        return dict.fromkeys(("task", "beta", "eval_every"), f"additions; beta is each of {BETAS}")


# --------------------------------------------------------------------------------------------------
# The frontier: p, q of each prompt (P,)


def bernoulli_kl(q, p):
    """The least KL of a policy that is right on q from a base that is right on p, in nats."""
    right = q * np.log(q / p)
    wrong = (1 - q) * np.log((1 - q) / (1 - p))
    return right + wrong


def best_of_n(p, n):
    """How often the best of n is right."""
    return 1 - (1 - p) ** n


def tilted(p, beta):
    """How often the best policy for reward - beta * KL is right."""
    return p / (p + (1 - p) * np.exp(-1 / beta))


# --------------------------------------------------------------------------------------------------
# Policies


def train(config, run, seed, beta, base):
    """GRPO with beta times the KL in the reward -> the trained model, and the tokens it sampled."""
    config = dataclasses.replace(config, beta=beta)
    model = copy.deepcopy(base)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        config.lr,
        betas=(0.9, 0.95),
        weight_decay=0.0,
    )
    rng = random.Random(seed + 1)
    generator = torch.Generator().manual_seed(seed + 1)
    kept = dict(sampled=0)
    budget = addition.budget(config.size)
    phase = f"beta {beta} {seed}"
    for step in run.loop(
        phase,
        config.steps,
        model,
        optimizer,
        rng,
        generator,
        kept,
    ):
        rollout, rewards, row = grpo.collect(model, addition, config, rng, generator)
        grpo.update(
            model,
            base,
            optimizer,
            rollout,
            rewards,
            config,
            budget,
            generator,
        )
        kept["sampled"] += row["tokens"]
        run.log(phase="rl", beta=beta, seed=seed, step=step + 1, reward=row["reward"])
        run.say(reward=row["reward"])
    return model, kept["sampled"]


@torch.no_grad()
def policy_kl(model, base, rollout, config):
    """KL(model || base) of a whole answer, from the model's own answers, in nats."""
    log_ratio = grpo.score_all(model, rollout, config) - grpo.score_all(base, rollout, config)
    return (log_ratio * rollout.mask).sum(1).mean().item()


def measure(config, model, base, seed):
    """Of each held-out problem the share of right answers and the KL to the base, from the same
    draws; and an answer's mean length.
    """
    rng, generator = random.Random("held out"), torch.Generator().manual_seed(seed)
    right, kl, lengths = [], [], []
    for _ in range(config.eval_prompts):
        problem = [addition.draw(rng, config.size, held_out=True)]
        rollout, _, rewards = grpo.sample(model, addition, problem, config.draws, config, generator)
        right.append(rewards.mean().item())
        kl.append(policy_kl(model, base, rollout, config))
        lengths.append(rollout.lengths.float().mean().item())
    return dict(right=right, kl=kl, tokens=float(np.mean(lengths)))


def policies(config, run, device):
    """The base, twice (the second draws are best-of-n's), and GRPO at each beta, each measured."""
    for seed in seeds_of(config):
        base = grpo.warm_up(config, addition, run, seed, device)
        for phase, draw_seed in (("base", seed), ("best-of-n", seed + 1000)):
            row = partial(measure, config, base, base, draw_seed)
            run.log_once(row, phase=phase, seed=seed, step=0)
        for beta in BETAS:
            model, sampled = train(config, run, seed, beta, base)
            where = dict(phase="policy", beta=beta, seed=seed, step=config.steps, sampled=sampled)
            run.log_once(partial(measure, config, model, base, seed), **where)
    return base, model


# --------------------------------------------------------------------------------------------------
# The figure


def shares(config, right):
    """Shares of right answers, none of them 0 or 1, whose logarithms would be infinite."""
    return (np.array(right) * config.draws + 0.5) / (config.draws + 1)


def break_even(p, q, row):
    """n such that the best of n is right as often as the policy, and after how many questions the
    policy's training has cost fewer tokens.
    """
    n = next((n for n in range(2, 4096) if best_of_n(p, n).mean() >= q.mean()), 4096)
    return n, row["sampled"] / ((n - 1) * row["tokens"])


def figure(config, run):
    fig, ax = plt.subplots(figsize=(9, 6), layout="constrained")
    behind = []  # (seeds, betas): nats that GRPO spends above what its accuracy costs
    off = []  # (seeds,): best-of-n's accuracy off the closed form
    even = []  # (seeds, 2): see break_even
    for seed in seeds_of(config):
        base, best, *trained = (r for r in run.rows if r["seed"] == seed and "right" in r)
        named = seed == config.seed  # in the legend
        p = shares(config, base["right"])  # (P,)
        draw_frontier(ax, p, named)
        off.append(draw_best_of_n(ax, config, p, best, named))
        spent = []
        for i, row in enumerate(trained):
            q = shares(config, row["right"])  # (P,)
            kl = np.array(row["kl"])
            spent.append(np.mean(kl - bernoulli_kl(q, p)))
            label = f"GRPO, beta = {row['beta']}" if named else None
            ax.plot(kl.mean(), q.mean(), "D", color=f"C{i + 1}", label=label)
        behind.append(spent)
        even.append(break_even(p, q, trained[-1]))  # of the smallest beta
    behind = np.array(behind)
    n, questions = np.mean(even, 0)
    ax.set_xlabel("KL to the base (nats an answer, mean over held-out problems)")
    ax.set_ylabel("right answers (fraction)")
    ax.legend(loc="lower right")
    seeds = f"{config.seeds} seed{'s' * (config.seeds > 1)}"
    ax.set_title(
        f"Best-of-n is on the frontier within {max(off):.3f}, "
        f"GRPO {behind.min():.2f} to {behind.max():.2f} nats behind it ({seeds})\n"
        f"beta = {BETAS[-1]} is cheaper than the best of {n:.0f} after {questions:,.0f} questions"
    )
    beside = f" ({questions:,.0f} questions to break even)"
    return fig, judge(behind, np.array(off), beside)


def draw_frontier(ax, p, named):
    """The best policies for reward - beta * KL, at all beta."""
    beta = 1 / np.linspace(1e-3, 16, 400)[:, None]
    q = tilted(p, beta)  # (400, P)
    cost = bernoulli_kl(q, p).mean(1)
    label = "frontier of a seed" if named else None
    ax.plot(cost, q.mean(1), "k", lw=0.8, label=label)


def draw_best_of_n(ax, config, p, row, named):
    """The accuracy of the best of n by other draws than p's -> how far off the closed form."""
    correct = torch.tensor(row["right"]).mul(config.draws).round()  # (P,)
    measured = [grpo.pass_at_k(config.draws, correct, n).mean().item() for n in NS]
    closed = [best_of_n(p, n) for n in NS]
    cost = [bernoulli_kl(q, p).mean() for q in closed]
    label = f"best of n = 1 to {NS[-1]}, measured" if named else None
    ax.plot(cost, measured, "o", color="C0", ms=5, label=label)
    return np.abs(np.array(measured) - np.mean(closed, 1)).max()


def judge(behind, off, beside):
    n = len(behind)
    least = "GRPO: nats behind the frontier, mean over problems, least of 4 beta"
    most = "GRPO: nats behind the frontier, mean over problems, most of 4 beta"
    best = "best-of-n: accuracy off the closed form, largest of 7 n"
    return [
        claim(
            "never above",
            least,
            SOURCE,
            "0",
            behind.min(1),
            ">=",
            -0.05,
            n,
        ),
        claim(
            "on it",
            most,
            SOURCE,
            "0",
            behind.max(1),
            "<=",
            0.05,
            n,
            beside,
        ),
        claim(
            "best-of-n",
            best,
            SOURCE,
            "0",
            off,
            "<=",
            0.02,
            n,
        ),
    ]


def main():
    config = parse_args(Config, __doc__)
    device = pick_device(config.device)
    parameters = grpo.build(config, addition, device).config.parameters
    problems = [addition.draw(random.Random(i), config.size, held_out=True) for i in range(3)]
    with Run(config) as run:
        run.introduce(device, parameters)
        base, model = policies(config, run, device)
        examples = {}
        for name, policy in (("base", base), (f"beta {BETAS[-1]}", model)):
            generator = torch.Generator().manual_seed(0)
            _, texts, rewards = grpo.sample(policy, addition, problems, 1, config, generator)
            examples[name] = list(zip(texts, rewards.flatten().tolist(), strict=True))
        run.samples([addition.prompt(problem) for problem in problems], **examples)
        run.finish(*figure(config, run))


if __name__ == "__main__":
    command(main)
