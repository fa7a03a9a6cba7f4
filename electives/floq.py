"""floq.py: a critic that integrates: the value as the end of a flow from noise.

(floq: Agrawalla et al., arXiv 2509.06863.) A critic is asked for Q(s, a), the value of an action,
and learns it from its own guess of what comes after (temporal differences). An ordinary one answers
in one pass. This one holds a velocity field v(t, z | s, a) and moves a number z along it, from
noise at t = 0 to the value at t = 1, in K steps of Euler: more compute for the same parameters.

    read     z_0 ~ U[-kappa, 0],   z <- z + v(i / K, z | s, a) / K   for i = 0, ..., K - 1
    target   y = r + gamma sum_a' pi(a' | s') Q(s', a'),   Q: the mean of z_K over z_0, an older v
    loss     ( v(t, (1 - t) z + t y | s, a) - (y - z) )^2,   z ~ U[-kappa, 0],   t ~ U[0, 1]

So every t is trained, not only the end. The best field for a known y is (y - z) / (1 - t): Euler is
exact on it whatever K is, and each step mends what the ones before it did wrong.

The worlds are mazes of 85 cells. An agent walks to the goal and slips now and then; rewards are
-(1 - gamma), so that values lie in [-1, 0]. A linear system gives the exact ones: all errors here
are exact, and told as a share of the spread of the values (1: as bad as one constant for all). Then
the goal moves, twice, and the same critics have to follow (plasticity). The rivals:

    plain          (Q(s, a) - y)^2, as wide as the flow's network, or with as many parameters
    HL-Gauss       classification: y becomes a bell over 51 bins, the loss is a cross-entropy;
                   with as many parameters as the flow
    t = 0 only     the flow trained where one step of Euler reads it

    python -m electives.floq                2 minutes on two cores
    python -m electives.floq --seeds 3      what results/ holds

What to see: left, the error falls steeply from one step to two, and hardly after: a field that was
trained at all times is poor at its first. But plain critics have half of the flow's error, HL-Gauss
a tenth: at this size the flow does not pay. Right, when the goal
moves, plain critics follow fastest; HL-Gauss is slower than the flow at first, ahead in the end.

How this differs from the paper:
1. A policy is judged, none is learnt: no actor, no distilled critic, no ensemble of two.
2. All pairs (s, a) of a small maze with known steps; targets are made anew for all of them every
   20 updates, with the exact mean over a'; they are cut to [-1, 0], for all critics.
3. Reading starts from the midpoints of 4 equal parts of the noise, not from draws.
4. z is told to the network by 16 smooth features, not 50, and t by cos(t), as in the authors' code;
   both quietly: louder ones made it worse here.
"""

import copy
import math
import random
from dataclasses import dataclass
from functools import partial
from itertools import product
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

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
    series,
)

SOURCE = "Agrawalla et al., arXiv 2509.06863"
LATER_SOURCE = "the same group, arXiv 2603.04333"
SIDE = 11
WALLS = 36
CELLS = SIDE**2 - WALLS  # C, the free ones
MOVES = {
    "^": (-1, 0),
    ">": (0, 1),
    "v": (1, 0),
    "<": (0, -1),
}
A = len(MOVES)
GAMMA = 0.95
SLIP = 0.2  # chance that a move is any of the four
INPUTS = 2 + A  # row, column, one number for each action
EDGES = torch.linspace(-1.05, 0.05, 52)  # of HL-Gauss's bins: a little wider than the values
SIGMA = 0.75 * (EDGES[1] - EDGES[0]).item()  # of its bells
CENTRES = (EDGES[1:] + EDGES[:-1]) / 2
SOFT_EDGES = torch.linspace(-1.05, 0.05, 17)  # of the features of z
WIDTH = 64  # of the flow's two hidden layers, and of plain's
STARTS = 4  # of a reading
REFRESH = 20  # updates between two targets
TAU = 0.05  # how fast the older weights follow


@dataclass
class Config(Flags):
    goals: int = flag(3, "goals, one after the other", quick=2, low=2, high=CELLS)
    steps: int = flag(4000, "updates for each of them", quick=8, low=4)
    batch: int = flag(128, "pairs (s, a) in an update", low=1)
    noises: int = flag(4, "noises for each of them", low=1)
    kappa: float = flag(0.25, "width of the noise; the values' is 1", low=0, high=1)
    lr: float = flag(1.0, "all critics' learning rates times this", low=0)
    eval_every: int = flag(200, "updates between two measurements", quick=2, low=1)


# --------------------------------------------------------------------------------------------------
# Mazes, one for each of S seeds, and the exact values in them


def distances(successor, goal):
    """Moves from each cell to the goal (C,); infinite where no way leads there."""
    d = torch.full((CELLS,), math.inf)
    d[goal] = 0
    for _ in range(CELLS):
        d = torch.minimum(d, 1 + d[successor].amin(1))
    return d


def maze(seed, goals):
    """A maze in one piece -> its cells, where each move leads (C, A), some goals."""
    rng = random.Random(seed)
    while True:
        cells = list(product(range(SIDE), repeat=2))
        cells = sorted(rng.sample(cells, CELLS))
        number = {cell: k for k, cell in enumerate(cells)}
        successor = torch.zeros(CELLS, A, dtype=torch.long)
        for (i, j), k in number.items():
            for a, (down, right) in enumerate(MOVES.values()):
                # a move into a wall leads nowhere
                successor[k, a] = number.get((i + down, j + right), k)
        if distances(successor, 0).isfinite().all():
            return cells, successor, rng.sample(range(CELLS), goals)


def policy(successor, goal):
    """pi(a | s) (C, A): a shortest way to the goal, but for slips."""
    after = distances(successor, goal)[successor]  # (C, A)
    best = (after == after.amin(1, keepdim=True)).float()
    best = best / best.sum(1, keepdim=True)
    return SLIP / A + (1 - SLIP) * best


def backup(world, v):
    """r + gamma v(s') (S, C, A) from the values of cells (S, C); the goal's is 0, it ends there."""
    v = v.scatter(1, world.goal[:, None], 0)
    after = v.gather(1, world.successor.flatten(1))
    after = after.view_as(world.policy)
    return GAMMA * after - (1 - GAMMA)


def exact(world):
    """The Q (S, C, A) that is its own backup: v = r + gamma P v, a linear system."""
    pi = world.policy.double()
    leads = F.one_hot(world.successor, CELLS)  # (S, C, A, C)
    P = (pi[..., None] * leads).sum(2)  # (S, C, C)
    at_goal = F.one_hot(world.goal, CELLS)[:, None]
    P = P * (1 - at_goal)  # nothing comes after the goal
    r = torch.full_like(P[..., 0], GAMMA - 1)  # (S, C)
    identity = torch.eye(CELLS).to(P)
    v = torch.linalg.solve(identity - GAMMA * P, r)
    return backup(world, v)


def world_of(mazes, g, device):
    """The mazes with their g-th goals: successor, policy (S, C, A), goal (S,), Q (S, C, A)."""
    _, successors, goals = zip(*mazes, strict=True)
    goals = [some[g] for some in goals]
    world = SimpleNamespace(
        successor=torch.stack(successors).to(device),
        goal=torch.tensor(goals, device=device),
        policy=torch.stack(list(map(policy, successors, goals))).to(device),
    )
    world.q = exact(world)
    return world


def pairs(mazes, device):
    """What a critic is told of each pair (s, a): row, column, action -> (S, C * A, INPUTS)."""
    cells = torch.tensor([cells for cells, _, _ in mazes])  # (S, C, 2)
    place = cells * 2 / (SIDE - 1) - 1  # in [-1, 1]
    place = place.repeat_interleave(A, 1)  # (S, C * A, 2)
    action = torch.eye(A).repeat(len(mazes), CELLS, 1)  # (S, C * A, A)
    return torch.cat((place, action), dim=2).to(device)


# --------------------------------------------------------------------------------------------------
# Critics: value(x), and the loss of pairs x (S, B, INPUTS) with targets y (S, B) -> (S, B, ...)


class MLPs(nn.Module):
    """A network for each seed, two hidden layers: (S, B, inputs) -> (S, B, outputs)."""

    def __init__(self, seeds, inputs, width, outputs):
        super().__init__()
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.weights = nn.ParameterList()
        self.biases = nn.ParameterList()
        layers = (
            (inputs, width, INPUTS**-0.5),  # scaled for x, whatever else it is told
            (width, width, width**-0.5),
            (width, outputs, 0),  # all answers are 0 at the start
        )
        for n, m, scale in layers:
            draws = [torch.randn(n, m, generator=g) for g in generators]
            w = torch.stack(draws)
            b = torch.zeros(len(seeds), 1, m)
            self.weights.append(nn.Parameter(w * scale))
            self.biases.append(nn.Parameter(b))

    def forward(self, x):
        *hidden, last = zip(self.biases, self.weights, strict=True)
        for b, w in hidden:
            x = F.gelu(torch.baddbmm(b, x, w))  # (S, B, width)
            x = F.layer_norm(x, x.shape[-1:])
        b, w = last
        return torch.baddbmm(b, x, w)


class Plain(nn.Module):
    """The usual critic: one pass, squared errors."""

    def __init__(self, config, seeds, width=WIDTH):
        super().__init__()
        self.net = MLPs(seeds, INPUTS, width, 1)

    def value(self, x):
        return self.net(x).squeeze(2)

    def loss(self, x, y, generator):
        return (self.value(x) - y) ** 2


def bell(y, edges, sigma):
    """The mass of a normal law around y (...) in each bin -> (..., bins), sums are 1."""
    edges = edges.to(y.device)
    below = torch.erf((edges - y[..., None]) / sigma / 2**0.5)  # (..., bins + 1)
    mass = below.diff(dim=-1)  # (..., bins)
    return mass / mass.sum(-1, keepdim=True)


class Categorical(nn.Module):
    """HL-Gauss: a law over bins, of which the value is the mean."""

    def __init__(self, config, seeds, width=WIDTH):
        super().__init__()
        self.net = MLPs(seeds, INPUTS, width, len(CENTRES))

    def value(self, x):
        return self.net(x).softmax(2) @ CENTRES.to(x.device)

    def loss(self, x, y, generator):
        target = bell(y, EDGES, SIGMA)  # (S, B, bins)
        logp = self.net(x).log_softmax(2)
        return -(target * logp).sum(2)


def interpolate(z, y, t):
    """Where the straight path from z to y is at time t, and its velocity."""
    return (1 - t) * z + t * y, y - z


def integrate(velocity, z, K):
    """Euler's method from t = 0 to 1 in K steps."""
    for i in range(K):
        z = z + velocity(z, torch.full_like(z, i / K)) / K
    return z


class Flow(nn.Module):
    """A velocity field; its value is read in K steps. latest: t is trained up to there."""

    def __init__(self, config, seeds, width=WIDTH, K=8, latest=1.0):
        super().__init__()
        self.net = MLPs(seeds, INPUTS + len(SOFT_EDGES), width, 1)
        self.kappa = config.kappa
        self.noises = config.noises
        self.latest = latest
        self.K = K

    def velocity(self, x, z, t):
        """x (S, B, INPUTS), n numbers z at times t for each (S, B, n) -> (S, B, n)."""
        x = x[:, :, None].expand(*z.shape, INPUTS)
        place = bell(z, SOFT_EDGES, 0.35)  # (S, B, n, 16), smooth and bounded
        time = 0.3 * t.cos()[..., None]
        told = torch.cat((x, place, time), dim=3)
        return self.net(told.flatten(1, 2)).view_as(z)

    def value(self, x, K=None):
        middles = (torch.arange(STARTS) + 0.5) / STARTS
        z = -self.kappa * middles.to(x)
        z = z.expand(*x.shape[:2], STARTS)
        z = integrate(partial(self.velocity, x), z, K or self.K)
        return z.mean(2)

    def loss(self, x, y, generator):
        shape = (*y.shape, self.noises)
        z = torch.rand(shape, generator=generator).to(y)
        t = torch.rand(shape, generator=generator).to(y)
        z *= -self.kappa
        t *= self.latest
        z_t, v = interpolate(z, y[..., None], t)  # (S, B, n) each
        return (self.velocity(x, z_t, t) - v) ** 2


STEPS = (1, 2, 4, 8, 16)
SETTLED = 0.25  # the last part of a goal's updates, over which an error is averaged
# label -> critic, learning rate: near the best of .001, .003, .01, .02 for plain, HL-Gauss and the
# flow on two mazes of their own (--seed 100 --seeds 2); the other two take plain's and the flow's
ARMS = {
    "plain": (Plain, 0.01),
    "plain, as many parameters": (partial(Plain, width=72), 0.01),
    "HL-Gauss": (partial(Categorical, width=52), 0.02),
    "flow, t = 0 only": (partial(Flow, K=1, latest=0.0), 0.01),
    **{f"flow, K = {K}": (partial(Flow, K=K), 0.01) for K in STEPS},
}
PLAIN, MATCHED, HL_GAUSS, AT_ZERO = list(ARMS)[:4]
FLOW = "flow, K = 8"  # as in the paper
READ = "flow, trained with 16 steps, read with K"
RIVALS = {AT_ZERO: "C4", PLAIN: "C2", MATCHED: "C3", HL_GAUSS: "k"}  # and their colours
FOLLOW = PLAIN, MATCHED, HL_GAUSS, FLOW  # the goal moves for these


# --------------------------------------------------------------------------------------------------
# Training


def errors(world, q):
    """The root mean square error of Q (S, C * A), by the spread of the exact one -> (S,)."""
    truth = world.q.flatten(1)
    rms = (q - truth).square().mean(1).sqrt()
    return rms / truth.std(1, correction=0)


def target(world, critic, x):
    """One backup of what a critic says of all pairs -> (S, C * A)."""
    q = critic.value(x).view_as(world.policy)
    v = (world.policy * q).sum(2)  # (S, C), the mean over what the agent does next
    y = backup(world, v)
    return y.flatten(1).clamp(-1, 0)


def measure(config, run, world, q, where):
    """A row for each seed."""
    error = errors(world, q).tolist()
    for seed, e in zip(seeds_of(config), error, strict=True):
        run.log(**where, seed=seed, error=e)


def learn(config, run, arm, goals, x):
    """TD learning of a critic for each seed, with a goal that moves -> the older weights."""
    make, lr = ARMS[arm]
    critic = make(config, seeds_of(config)).to(x.device)
    older = copy.deepcopy(critic).requires_grad_(False)
    both = nn.ModuleList((critic, older))  # what --resume needs
    optimizer = torch.optim.Adam(critic.parameters(), lr * config.lr)
    rng = random.Random(config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    kept = {}
    if arm not in FOLLOW:
        goals = goals[:1]
    steps = config.steps * len(goals)
    for step in run.loop(arm, steps, both, optimizer, rng, generator, kept):
        world = goals[step // config.steps]
        # 1. Now and then new targets, from the older weights
        if step % REFRESH == 0 or step % config.steps == 0:
            kept["y"] = target(world, older, x)  # (S, C * A)
        # 2. A step on some of the pairs
        rows = torch.randint(x.shape[1], (config.batch,), generator=generator)
        y = kept["y"].to(x)
        loss = critic.loss(x[:, rows], y[:, rows], generator)
        # a sum over seeds: the network of each has a loss of its own
        loss = loss.flatten(1).mean(1).sum()
        optimizer.zero_grad()
        loss.backward()
        descend(optimizer, loss, clip=math.inf)  # one norm for all seeds would tie them together
        # 3. The older weights follow
        for old, new in zip(older.parameters(), critic.parameters(), strict=True):
            old.lerp_(new.detach(), TAU)
        if (step + 1) % config.eval_every == 0:
            where = dict(arm=arm, step=step + 1)
            measure(config, run, world, older.value(x), where)
            run.say(loss=loss.item())
    return older


# --------------------------------------------------------------------------------------------------
# The figure


def settled(config, run, arm, goal=1):
    """A critic's error near the end of its time with a goal, by default the first -> (S,)."""
    steps, error = series(run, "error", arm=arm)  # (S, measurements)
    end = goal * config.steps
    near = (steps > end - SETTLED * config.steps) & (steps <= end)
    return error[:, near].mean(1)


def figure(config, run):
    """The figure and its claims, from the rows of the run."""
    first = {arm: settled(config, run, arm) for arm in ARMS}
    by_steps = np.stack([first[f"flow, K = {K}"] for K in STEPS], axis=1)  # (S, 5)
    fig, (left, right) = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
    band(left, STEPS, by_steps, "flow, trained and read with K steps", marker="o")
    band(left, *series(run, "error", arm=READ), READ, marker="s")
    for arm, color in RIVALS.items():
        left.axhline(first[arm].mean(), color=color, ls="--", label=arm)
    one, *_, many = by_steps.mean(0)
    title = f"More steps of integration: error {one:.2f} → {many:.2f}"
    left.set(title=f"{title}; HL-Gauss {first[HL_GAUSS].mean():.3f}")
    left.set_xlabel("steps of integration K")
    left.set_xscale("log", base=2)
    left.set_xticks(STEPS, STEPS)

    later = {}  # mean errors since the goal moved first
    for arm in FOLLOW:
        steps, error = series(run, "error", arm=arm)  # (S, measurements)
        band(right, steps, error, arm, color=RIVALS.get(arm, "C0"))
        later[arm] = error[:, steps > config.steps].mean(1)
    for g in range(1, config.goals):
        right.axvline(g * config.steps, color="gray", lw=1)
    ours, plain, bins = (later[arm].mean() for arm in (FLOW, MATCHED, HL_GAUSS))
    right.set_title(
        f"Since the goal moved: flow {ours:.2f}, plain {plain:.2f}, HL-Gauss {bins:.2f}"
    )
    right.set_xlabel("updates (gray: the goal moves)")
    for ax in (left, right):
        ax.set_yscale("log")
        ax.set_ylabel("error of Q (share of the spread of its values)")
        ax.legend()
    return fig, judge(config, run, first, later)


def judge(config, run, first, later):
    """The claims, paired by seed."""
    n = config.seeds
    design = "design of the task"
    fewer = "error with 1 step minus with 16, worst seed"
    more = "error with 2 steps minus with 8, worst seed"
    falls = first["flow, K = 1"] - first["flow, K = 16"]
    falls_on = first["flow, K = 2"] - first["flow, K = 8"]
    claims = [
        claim("steps", fewer, SOURCE, "falls", falls.min(), ">", 0, n),
        claim("more", more, SOURCE, "falls", falls_on.min(), ">", 0, n),
    ]

    def ahead(id, error, arm, source, paper, when=""):
        theirs, ours = error[arm], error[FLOW]
        text = f"error of {arm} minus flow's, K = 8{when}"
        beside = f" ({theirs.mean():.3f}, {ours.mean():.3f})"
        claims.append(claim(id, text, source, paper, theirs - ours, ">", 0, n, beside))

    moved = ", since the goal moved"
    ahead("zero", first, AT_ZERO, SOURCE, "> 0")
    ahead("plain", first, PLAIN, SOURCE, "> 0")
    ahead("matched", first, MATCHED, SOURCE, "> 0")
    ahead("categorical", first, HL_GAUSS, design, "-")
    ahead("moved", later, MATCHED, LATER_SOURCE, "> 0", moved)
    ahead("moved_categorical", later, HL_GAUSS, design, "-", moved)
    # goals differ in difficulty, but for both alike
    last = {arm: settled(config, run, arm, config.goals) for arm in FOLLOW}
    rise = {arm: np.log(last[arm] / first[arm]) for arm in FOLLOW}
    lost = rise[FLOW] - rise[MATCHED]
    text = "log of the last goal's error by the first's, flow's minus plain's"
    claims.append(claim("plastic", text, LATER_SOURCE, "< 0", lost, "<", 0, n))
    return claims


# --------------------------------------------------------------------------------------------------
# The run


def picture(cells, start, goal):
    """A maze as text."""
    letter = dict.fromkeys(cells, ".")
    letter[cells[start]] = "S"
    letter[cells[goal]] = "G"
    rows = []
    for i in range(SIDE):
        row = (letter.get((i, j), "#") for j in range(SIDE))
        rows.append("".join(row))
    return "\n".join(rows)


def walk(successor, q, start, goal):
    """The way that always takes the best move by q (C, A) -> its text, and 1.0 if it arrives."""
    cell, seen, moves = start, set(), ""
    while cell != goal:
        if cell in seen:
            return f"{moves} in a circle", 0.0
        seen.add(cell)
        a = q[cell].argmax().item()
        moves += list(MOVES)[a]
        cell = successor[cell, a].item()
    return f"{moves} ({len(moves)} moves)", 1.0


def examples(maze, world, critics, x):
    """Ways to the last goal from far, half as far and near, in the last maze."""
    cells, successor, goals = maze
    goal = goals[-1]
    by_distance = distances(successor, goal).argsort().tolist()
    starts = [by_distance[k] for k in (-1, CELLS // 2, CELLS // 5)]
    prompts = [picture(cells, start, goal) for start in starts]
    known = {"exact": world.q}
    for arm in FOLLOW:
        known[arm] = critics[arm].value(x).view_as(world.q)
    answers = {
        name: [walk(successor, q[-1], start, goal) for start in starts] for name, q in known.items()
    }
    return prompts, answers


def main():
    config = parse_args(Config, __doc__)
    if 4 * config.eval_every > config.steps:
        raise UserError("--eval-every: at most a quarter of --steps")
    device = pick_device(config.device)
    with Run(config) as run:
        mazes = [maze(seed, config.goals) for seed in seeds_of(config)]
        goals = [world_of(mazes, g, device) for g in range(config.goals)]
        x = pairs(mazes, device)  # (S, C * A, INPUTS)
        critics = {arm: learn(config, run, arm, goals, x) for arm in ARMS}
        # one field, read in more and more steps
        deepest = critics[f"flow, K = {STEPS[-1]}"]
        for K in STEPS:
            where = dict(arm=READ, step=K)
            measure(config, run, goals[0], deepest.value(x, K), where)
        prompts, answers = examples(mazes[-1], goals[-1], critics, x)
        run.samples(prompts, **answers)
        run.finish(*figure(config, run))


if __name__ == "__main__":
    command(main)
