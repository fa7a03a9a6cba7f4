"""squarecb.py: which way of decoding suits this prompt? Learn it while answering.

(SquareCB, inverse gap weighting: Foster and Rakhlin, arXiv 2002.04926; lecture notes 2312.16730.)
Prompts come one by one. Of A ways of answering one is taken, and only its reward is seen; a linear
regression f(x, a) predicts rewards. To take the best prediction gets stuck on early luck. To
explore now and then at random tries what is known to be bad, too. Inverse gap weighting explores a
way the less, the further it is behind the best one, b:

    p(a) = 1 / (A + gamma (f(x, b) - f(x, a)))  for a != b,    p(b) = the rest

For any true rewards f*, with gamma > 0,

    max f* - E_p f*  <=  A / gamma + gamma E_p (f - f*)^2

so that regret is paid for by the error of the regression, which shrinks.

    python -m experiments.squarecb          a minute on two cores

What to see: left, ten ways whose rewards are linear in eight numbers of the prompt, the noise as
large as they: inverse gap weighting loses least. Right, ways of electives/backtrack.py on its
brackets, where a right answer is worth 200 calls of the verifier. Several ways are nearly as good
as the best there, and epsilon-greedy is no worse; to explore nothing now and then settles on a bad
way for good.

How this differs from the paper: ridge regression for each way; gamma = c sqrt(A t) at round t.
"""

from dataclasses import dataclass
from functools import partial
from itertools import product

import matplotlib.pyplot as plt
import numpy as np

from electives import backtrack
from experiment import (
    Flags,
    Run,
    band,
    claim,
    command,
    flag,
    parse_args,
    pick_device,
)
from tasks import dyck

SOURCE = "Foster and Rakhlin, arXiv 2312.16730"
WAYS = (  # methods, each with a budget of calls (one of backtrack.BUDGETS)
    ("outcome-level", 8),
    ("outcome-level", 32),
    ("1x4", 32),
    ("2x8", 32),
    ("action-level", 32),
    ("action-level", 64),
    (backtrack.FIRST, 64),
)
PRICE = 0.005  # of a call, where a right answer is worth 1
SCALES = {
    "greedy": (0.0,),
    "epsilon-greedy": (0.03, 0.1, 0.3, 1.0, 3.0, 10.0),
    "inverse gap": (1.0, 3.0, 10.0, 30.0, 100.0, 300.0),
}
COLORS = {"greedy": "C7", "epsilon-greedy": "C3", "inverse gap": "C0"}


@dataclass
class Config(Flags):
    seeds: int = flag(10, "bandits to test on; as many to tune with", quick=2, low=1, high=1000)
    steps: int = flag(8000, "rounds", quick=20, low=2)
    size: int = flag(6, "brackets of a problem, and of its answer", quick=3, low=3, high=8)
    base_steps: int = flag(600, "steps of imitation", quick=5, low=1)
    rollouts: int = flag(2000, "answers of the base that teach the verifier", quick=32, low=1)
    value_steps: int = flag(300, "steps of the verifier", quick=5, low=1)
    walks: int = flag(100, "sampled answers a problem: its rewards", quick=4, low=1)


def inverse_gap(gap, gamma):
    """How often each way is taken (S, A), from how far its prediction is behind the best (S, A)."""
    S, A = gap.shape
    best = np.arange(S), gap.argmin(1)
    p = 1 / (A + gamma * gap)
    p[best] = 0
    p[best] = 1 - p.sum(1)
    return p


def epsilon_greedy(gap, epsilon):
    """The best prediction, but any way with probability epsilon."""
    A = gap.shape[1]
    best = np.eye(A)[gap.argmin(1)]
    return (1 - epsilon) * best + epsilon / A


def explore(method, scale, gap, t):
    """The law (S, A) of round t, from 1."""
    if method == "inverse gap":
        A = gap.shape[1]
        return inverse_gap(gap, scale * np.sqrt(A * t))
    epsilon = min(1.0, scale * t ** (-1 / 3))
    return epsilon_greedy(gap, epsilon)


def learn(inverse, moment, theta, taken, x, reward):
    """Ridge regression of what was taken, with one more prompt x (S, d) and its reward (S,).

    inverse (S, A, d, d), moment and theta (S, A, d) are changed in place. taken: bandits, ways.
    """
    # The matrix grows by x x^T: so its inverse changes by this (Sherman and Morrison)
    v = np.einsum("sde,se->sd", inverse[taken], x)
    grown = 1 + (v * x).sum(1)
    inverse[taken] -= np.einsum("sd,se,s->sde", v, v, 1 / grown)
    moment[taken] += np.einsum("s,sd->sd", reward, x)
    theta[taken] = np.einsum("sde,se->sd", inverse[taken], moment[taken])


def play(method, scale, x, mean, draw, rng):
    """S bandits at once -> regret so far, after each round (T, S).

    x (T, S, d): the prompts. mean (T, S, A): what each way's reward is on average. draw: from the
    means (S,) of what was taken, and which that was (S,), to the rewards seen (S,).
    """
    T, S, A = mean.shape
    d = x.shape[2]
    row = np.arange(S)
    inverse = np.tile(np.eye(d), (S, A, 1, 1))  # of ridge regression's matrix, for each way
    moment = np.zeros((S, A, d))
    theta = np.zeros((S, A, d))
    regret = np.zeros((T, S))
    for t in range(T):
        prediction = np.einsum("sad,sd->sa", theta, x[t])
        gap = prediction.max(1, keepdims=True) - prediction
        p = explore(method, scale, gap, t + 1)
        expected = (p * mean[t]).sum(1)
        regret[t] = mean[t].max(1) - expected
        u = rng.random((S, 1))
        a = (p.cumsum(1) < u).sum(1).clip(max=A - 1)
        reward = draw(mean[t, row, a], a)
        learn(inverse, moment, theta, (row, a), x[t], reward)
    return regret.cumsum(0)


def linear(config):
    """Rewards linear in the prompt, with noise as large as they -> x (T, S, 8), mean, draw."""
    rng = np.random.default_rng(config.seed)
    S = 2 * config.seeds
    x = rng.standard_normal((config.steps, S, 8)) / np.sqrt(8)
    theta = rng.standard_normal((S, 10, 8))
    mean = np.einsum("tsd,sad->tsa", x, theta)  # (T, S, 10)

    def draw(mean, a):
        noise = rng.standard_normal(len(mean))
        return mean + noise

    return x, mean, draw


def measure_problems(config, run, device):
    """How often each way is right, within its calls, on every problem of the elective's."""
    base = backtrack.imitate(config, run, config.seed, device)
    verifier = backtrack.learn_value(config, run, config.seed, base)

    def success(text):
        tree = backtrack.tree_of(base, verifier, text)
        rng = np.random.default_rng([config.seed, *text.encode()])
        within = backtrack.count_calls(tree, config.walks, rng)
        budgets = backtrack.BUDGETS
        return dict(success=[within[name][budgets.index(calls)] for name, calls in WAYS])

    for brackets in product("()", repeat=config.size):
        text = "".join(brackets)
        stack = dyck.still_open(text)
        if stack is not None:
            where = dict(phase="problem", text=text, step=len(stack))
            run.log_once(partial(success, text), **where)


def brackets(config, run):
    """Problems in random order -> x (T, S, size + 2), mean (T, S, A), draw."""
    features = []
    success = []
    for row in run.rows:
        if row["phase"] == "problem":
            signs = [1 if c == "(" else -1 for c in row["text"]]
            features.append([1, row["step"], *signs])
            success.append(row["success"])
    x = np.array(features) / np.sqrt(config.size + 2)
    price = PRICE * np.array([calls for _, calls in WAYS])
    mean = np.array(success) - price
    rng = np.random.default_rng(config.seed)
    shape = config.steps, 2 * config.seeds
    drawn = rng.integers(len(x), size=shape)

    def draw(mean, a):
        right = rng.random(len(mean)) < mean + price[a]
        return right - price[a]

    return x[drawn], mean[drawn], draw


def compete(method, config, world):
    """The method at the scale that is best on the first half of the bandits, on the other half."""
    x, mean, draw = world
    rng = np.random.default_rng(config.seed + 1)
    scales = SCALES[method]
    curves = [play(method, scale, x, mean, draw, rng) for scale in scales]
    tuning = [curve[-1, : config.seeds].mean() for curve in curves]
    best = int(np.argmin(tuning))
    shown = np.linspace(0, config.steps - 1, 50).astype(int)
    regret = curves[best][shown, config.seeds :].T  # (seeds, shown)
    rounds = shown + 1
    return dict(scale=scales[best], rounds=rounds.tolist(), regret=regret.tolist())


def figure(config, run):
    fig, axes = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    n = config.seeds
    claims = []
    for ax, world in zip(axes, ("linear", "brackets"), strict=True):
        last = {}
        rows = [row for row in run.rows if row["phase"] == world]
        for row in rows:
            regret = np.array(row["regret"])  # (seeds, shown)
            name = row["method"]
            label = name if name == "greedy" else f"{name}, scale {row['scale']}"
            band(ax, row["rounds"], regret, label, color=COLORS[name])
            last[name] = regret[:, -1]
        for rival, most in (("epsilon-greedy", 0.95), ("greedy", 0.5)):
            text = f"{world}: regret, inverse gap over {rival}"
            with np.errstate(divide="ignore", invalid="ignore"):  # a rival that lost nothing
                ratio = last["inverse gap"] / last[rival]
            name = f"{world} {rival}"
            claims.append(claim(name, text, SOURCE, "less", ratio, "<=", most, n))
        ours = last["inverse gap"].mean()
        theirs = last["epsilon-greedy"].mean()
        ax.set_title(f"{world}: inverse gap weighting {ours:.0f}, epsilon-greedy {theirs:.0f}")
        ax.set(xlabel="round", ylabel="regret so far (sum of rewards lost)", ylim=(0, None))
        ax.legend()
    return fig, claims


def main():
    config = parse_args(Config, __doc__)
    device = pick_device(config.device)
    with Run(config) as run:
        measure_problems(config, run, device)
        worlds = {"linear": partial(linear, config), "brackets": partial(brackets, config, run)}
        for name, make in worlds.items():
            for method in SCALES:
                once = partial(compete, method, config, make())
                run.log_once(once, phase=name, method=method, step=config.steps)
        run.finish(*figure(config, run))


if __name__ == "__main__":
    command(main)
