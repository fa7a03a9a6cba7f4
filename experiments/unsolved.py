"""unsolved.py: nobody knows the answer, some weak validators say yes. How much of what passes is
right, and what does one more validator add?

(The validators of UQ, Nie et al., arXiv 2508.17580, as a law of votes and as small networks.)

    python -m experiments.unsolved          half a minute of one core

experiments/weaver.py has 32 answers to a question, and asks which one to keep, and whom to trust.
Here there is one answer, seldom right: is it accepted? A validator says yes to a right answer with
probability t, to a wrong one with f. With P the share of right answers,

    precision = P Pr[accepted | right] / (P Pr[accepted | right] + (1 - P) Pr[accepted | wrong])

Validators that are made alike err alike. Let rho be the correlation of two votes on answers of the
same kind. Votes drawn from Polya's urn have it: the next one says yes, after j of i have, with
probability

    ((1 - rho) rate + rho j) / (1 - rho + rho i)

The same law: every answer has a rate of its own, from a Beta distribution, and votes are
independent given that rate. Infinitely many votes tell this rate and nothing more, which is a cap
on the precision of any rule that accepts a fixed share of the right answers, if rho > 0.

Left: unanimity and majority, exact. Middle: the threshold on the number of yes that accepts half of
the right answers, exact. Right: the same of networks that judge column additions
(tasks/addition.py); they learnt from judged answers to solved questions. A vote is a coin with the
network's own probability of "right", as a language model's verdict is. The votes come from one
network that is asked again; from 16 that learnt from the same 1,000 answers; from 16 that had 1,000
each; and from one that learnt from all 16,000. Laws of counts are exact: no vote is drawn.

What to see: with independent validators precision rises as near to 1 as one likes, with correlated
ones it levels off, though later than one would think. A majority of correlated ones is hardly
better than one of them. One network asked 16 times is worth less than 16 of the same answers, these
less than 16 with answers of their own. One that learnt from all answers needs no other.
"""

import random
from dataclasses import dataclass
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F

from experiment import Flags, Run, band, claim, command, descend, flag, parse_args, seeds_of, series
from tasks import addition

RATES = 0.8, 0.3  # t and f of the exact panels
RHOS = 0.0, 0.1, 0.3, 0.6
MANY = [2**i for i in range(9)]  # numbers of validators
NETWORKS = 16
AGAIN = "one, asked again"
SAME = "16, same answers"
OWN = "16, own answers"
ALL = "one, all answers"
ARMS = AGAIN, SAME, OWN, ALL
HIDDEN = 32


@dataclass
class Config(Flags):
    seeds: int = flag(5, "repeat over this many seeds", quick=1, low=1)
    right: float = flag(0.1, "share P of right answers to unsolved questions", low=1e-6, high=0.99)
    judged: int = flag(1000, "judged answers that a network learns from", quick=50, low=20)
    steps: int = flag(300, "its training steps", quick=3, low=1)

    def idle(self):
        return {} if self.device in ("auto", "cpu") else {"device": "it is small: the CPU does"}


# --------------------------------------------------------------------------------------------------
# Votes. A law is the probability of each number of yes (m + 1,)


def urn(m, rate, rho):
    """The law of m votes of this rate, any two of which have the correlation rho."""
    law = np.ones(1)
    for i in range(m):
        yes = ((1 - rho) * rate + rho * np.arange(i + 1)) / (1 - rho + rho * i)
        # the next vote leaves the number of yes as it is, or makes it one more
        law = np.append(law * (1 - yes), 0) + np.append(0, law * yes)
    return law


def count(chances):
    """The law of independent votes: chances (n, m) of a yes, each its own; the mean of n laws."""
    law = np.ones((len(chances), 1))
    none = np.zeros((len(chances), 1))
    for yes in chances.T[:, :, None]:  # (n, 1)
        law = np.hstack([law * (1 - yes), none]) + np.hstack([none, law * yes])
    return law.mean(0)


def precision(prior, right, wrong):
    """From the shares of right and of wrong answers that are accepted."""
    return prior * right / (prior * right + (1 - prior) * wrong)


def precisions(prior, right, wrong):
    """What passes three rules, from the laws of votes on right and on wrong answers."""
    # at least k say yes, k = m down to 0: unanimity comes first
    right, wrong = (law[::-1].cumsum() for law in (right, wrong))  # (m + 1,)
    most = (len(right) - 2) // 2  # more than half say yes
    # between two thresholds a coin decides
    wrong_at_half = np.interp(0.5, np.append(0, right), np.append(0, wrong))
    return dict(
        unanimity=precision(prior, right[0], wrong[0]),
        majority=precision(prior, right[most], wrong[most]),
        half=precision(prior, 0.5, wrong_at_half),
    )


# --------------------------------------------------------------------------------------------------
# Networks that judge additions


def judged(rng, n):
    """n answers of demonstrators who guess carries -> digits (n, D), right (n,) bool."""
    digits, right = [], []
    for _ in range(n):
        problem = addition.draw(rng, 4)
        text = addition.demonstrate(rng, problem, revisit=0)
        lines = sorted(text[i : i + 7] for i in range(0, len(text), 7))
        # of a1A6007: the two digits, the carry, both digits of the sum
        digits.append([int(c) for c in "".join(lines) if c.isdigit()])
        right.append(addition.reward(problem, text) == 1)
    return F.one_hot(torch.tensor(digits), 10).flatten(1).float(), torch.tensor(right)


class Networks(torch.nn.Module):
    """M networks of one hidden layer, side by side: answers (M or 1, n, D) -> logits (M, n)."""

    def __init__(self, M, D):
        super().__init__()
        self.into = torch.nn.Parameter(torch.randn(M, D, HIDDEN) / D**0.5)
        self.bias = torch.nn.Parameter(torch.zeros(M, 1, HIDDEN))
        self.out = torch.nn.Parameter(torch.randn(M, HIDDEN, 1) / HIDDEN**0.5)

    def forward(self, x):
        return ((x @ self.into + self.bias).relu() @ self.out).squeeze(2)


def learn(config, run, arm, seed, inputs, right):
    """Each network from its own inputs (M, n, D), right (M, n) -> the networks."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    M, n, D = inputs.shape
    networks = Networks(M, D)
    optimizer = torch.optim.AdamW(
        networks.parameters(),
        lr=3e-3,
    )
    own = torch.arange(M)[:, None]
    for _ in run.loop(f"{arm} {seed}", config.steps, networks, optimizer, rng, generator):
        # one network alone sees as many answers in a step as 16 do
        drawn = torch.randint(n, (M, 64 * NETWORKS // M), generator=generator)
        logits = networks(inputs[own, drawn])
        loss = F.binary_cross_entropy_with_logits(logits, right[own, drawn].float())
        optimizer.zero_grad()
        loss.backward()
        descend(optimizer, loss)
    return networks


# --------------------------------------------------------------------------------------------------
# What is measured


def law_of(chances, m, again):
    """m votes of networks whose chances of a yes are (N, M): of the first m, each one vote.

    again: m votes of one of them, the mean over which one.
    """
    if again:
        return np.mean([count(np.repeat([yes], m, 0).T) for yes in chances.T], 0)
    return count(chances[:, :m])


def measure(config, run):
    for rho in RHOS:
        for m in MANY:
            laws = [urn(m, rate, rho) for rate in RATES]
            row = partial(precisions, config.right, *laws)
            run.log_once(row, arm=f"rho = {rho}", seed=config.seed, step=m)
    for seed in seeds_of(config):
        # 1. Judged answers: 16 times as many as a network reads; and answers to unsolved questions
        inputs, right = judged(random.Random(seed), NETWORKS * config.judged)
        tests, truth = judged(random.Random(f"test {seed}"), 4 * config.judged)
        truth = truth.numpy()
        # 2. Which of them each network reads
        own = inputs.view(NETWORKS, config.judged, -1), right.view(NETWORKS, -1)
        same = [x[:1].expand_as(x) for x in own]
        read = {AGAIN: own, SAME: same, OWN: own, ALL: (inputs[None], right[None])}
        # 3. What they say to the tests, and what would pass if a share P of these were right
        for arm in ARMS:
            networks = learn(config, run, arm, seed, *read[arm])
            p = networks(tests[None]).sigmoid().T.detach().double().numpy()  # (N, M)
            again = arm in (AGAIN, ALL)
            for m in MANY[:5]:
                laws = [law_of(p[of], m, again) for of in (truth, ~truth)]
                row = partial(precisions, config.right, *laws)
                run.log_once(row, arm=arm, seed=seed, step=m)


# --------------------------------------------------------------------------------------------------
# The figure


def figure(config, run):
    fig, (left, middle, right) = plt.subplots(1, 3, figsize=(17, 5.4), layout="constrained")
    for i, rho in enumerate(RHOS):
        arm = f"rho = {rho}"
        color = f"C{i}"
        band(left, *series(run, "unanimity", arm=arm), arm, color=color)
        band(left, *series(run, "majority", arm=arm), "_", color=color, ls=":")
        band(middle, *series(run, "half", arm=arm), arm, color=color, marker="o")
    for arm in ARMS:
        band(right, *series(run, "half", arm=arm), arm, marker="o")
    few, many = (at(run, "half", "rho = 0.3", m)[0] for m in (16, 256))
    again, own = (at(run, "half", arm, 16).mean() for arm in (AGAIN, OWN))
    left.set_title("Exact: all say yes (lines), more than half do (dots)")
    middle.set_title(f"Exact, rho = .3: {few:.2f} with 16, {many:.2f} with 256")
    right.set_title(f"16 votes of one network {again:.2f}, of 16 {own:.2f} ({config.seeds} seeds)")
    for ax in fig.axes:
        ax.axhline(config.right, color="0.6", lw=0.8)
        ax.set(xscale="log", ylim=(0, 1.03), xlabel="validators, or votes")
        ax.set_ylabel("precision, where half of the right answers pass")
        ax.legend(loc="lower right")
    left.set_ylabel("precision of what passes")
    fig.suptitle(
        f"{config.right:.0%} of all answers are right (grey line): "
        "what validators have in common caps the precision of what passes"
    )
    return fig, judge(run, config.seeds, few, many)


def at(run, key, arm, m):
    """The value of each seed with m votes (seeds,)."""
    steps, y = series(run, key, arm=arm)
    return y[:, steps == m].squeeze(1)


def judge(run, n, few, many):
    """The claims; those of networks by pairs, seed by seed."""

    def more(id, text, arm, rival):
        gain = at(run, "half", arm, 16) - at(run, "half", rival, 16)
        return claim(
            id,
            text,
            "design of the task",
            "-",
            gain,
            ">",
            0,
            n,
        )

    def exact(id, text, value, op, threshold):
        return claim(
            id,
            text,
            "derived",
            "-",
            value,
            op,
            threshold,
            1,
        )

    alone = at(run, "unanimity", "rho = 0.0", 8)
    most = at(run, "majority", "rho = 0.3", 256)
    return [
        exact("independent", "rho = 0: precision of 8 that agree", alone, ">=", 0.95),
        exact("cap", "rho = .3, half pass: precision of 256 minus 16", many - few, "<=", 0.02),
        exact("majority", "rho = .3: precision of the majority of 256", most, "<=", 0.5),
        more("others", "16 networks minus one asked 16 times", OWN, AGAIN),
        more("own", "16 networks, own answers minus the same answers", OWN, SAME),
        more("all", "16 networks minus one that learnt from all answers", OWN, ALL),
    ]


def main():
    config = parse_args(Config, __doc__)
    with Run(config) as run:
        run.introduce("cpu", 202 * HIDDEN)
        measure(config, run)
        run.save()
        run.finish(*figure(config, run))


if __name__ == "__main__":
    command(main)
