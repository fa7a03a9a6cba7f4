"""metagrad.py: pay each example by the derivative of the model that trains on it.

(Dataset Policy Gradients, Thrush et al., arXiv 2604.08423.) A generator writes training data, a
target model trains on it, and a metric of the trained target says how good that was: any function
of its weights that can be differentiated. One reward for a whole dataset tells next to nothing
about its examples. But give example i a weight w_i = 1 in the target's loss:

    L_t = mean of w_i l_i(theta_t) over batch t      theta_(t+1) = optimizer(theta_t, grad L_t)
    tau_i = d metric(theta_M) / d w_i

which is exact: the chain rule, backwards through every step that the target took, second moments
of Adam included. tau_i is the reward of example i, and the generator takes an ordinary policy
gradient: advantages within the group of examples that begin alike, times log-probabilities.

Backwards through M steps needs every state of the training. To keep all with their graphs takes
too much memory for anything large; `metagradient` keeps about sqrt(M) states, and computes the
others again when the way back comes to them (REPLAY, Engstrom et al., arXiv 2503.13751).

The metric here: a picture. Where it has a dot, the target's output weight (channel = row,
token = column) shall have grown, elsewhere it shall have shrunk. Nobody tells the generator what
the picture is, nor touches the weights: sequences of tokens do.

    python -m electives.metagrad                half a minute on two cores
    python -m electives.metagrad --seeds 3      what results/ holds
    python -m experiments.dataweights           the same derivative finds wrong labels

What to see: the picture stands in the weights after some 50 steps. Paid by the dataset (each
example gets the metric of a target that trained on a sixteenth of the data), the generator gets
there far more slowly: an example's reward is mostly the doing of the others.

How this differs from the paper:
1. The target is an MLP of one token, the generator a table of next-token logits; there GPT-2 and
   Llama. The generator learns with Adam from nothing; there it is a pre-trained model.
2. Adam's root has 1e-4 added inside, there 1e-9. Where a second moment is small, Adam turns a small
   change of a gradient into a large one of the weight: the derivative is right, but of little use.
   A larger root makes training smoother ("metasmooth", Engstrom et al.).
3. Checkpoints at every sqrt(M) steps; there all states are kept, in Engstrom et al. a tree.
"""

import math
import random
from dataclasses import dataclass
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from experiment import (
    Flags,
    Run,
    band,
    claim,
    command,
    descend,
    flag,
    parse_args,
    seeds_of,
    series,
)

SOURCE = "Thrush et al., arXiv 2604.08423"
V, D, T = 96, 32, 12  # tokens; channels of the target; tokens that are written after the first
PICTURE = (
    ".....####.....",
    "...##....##...",
    "..#........#..",
    ".#..........#.",
    ".#..##..##..#.",
    "#...##..##...#",
    "#............#",
    "#............#",
    "#.##......##.#",
    ".#..#....#..#.",
    ".#...####...#.",
    "..#........#..",
    "...##....##...",
    ".....####.....",
)
SIGNS = torch.tensor(
    [[1 if dot == "#" else -1 for dot in row] for row in PICTURE],
    dtype=torch.float64,
)
ROWS, COLUMNS = SIGNS.shape
SHARP = 20  # in the metric: a change of a weight by 1 / SHARP is a clear one
SHAPES = (V, D), (D, D), (V, D)  # of the target: embedding, hidden layer, output weights
PROMPTS = 16  # first tokens in each step
GROUP = 16  # examples that begin with each of them
# arm: optimizer of the target, whether examples are paid one by one, how many times the steps
ARMS = {
    "SGD": ("SGD", True, 1),
    "Adam": ("Adam", True, 1),
    "by dataset": ("SGD", False, 1),
    "by dataset, 4 times the data": ("SGD", False, 4),
}


@dataclass
class Config(Flags):
    steps: int = flag(100, "steps of the generator", quick=2, low=1)
    inner: int = flag(4, "steps of the target in each of them", low=1, high=PROMPTS)
    lr: float = flag(0.3, "learning rate of the generator (down to 0 in a line)", low=0)
    checked: int = flag(48, "examples whose derivative is checked", quick=2, low=1, high=256)

    def idle(self):
        return {} if self.device in ("auto", "cpu") else {"device": "all is small: on the CPU"}


# --------------------------------------------------------------------------------------------------
# The derivative through a training


def sgd(state, grad, t, lr):
    """state (1, P): the weights -> the next state."""
    return state - lr * grad


def adam(state, grad, t, lr, beta1=0.9, beta2=0.95, root=1e-4):
    """state (3, P): weights, first and second moment -> the next state."""
    theta, m, v = state
    m = beta1 * m + (1 - beta1) * grad
    v = beta2 * v + (1 - beta2) * grad**2
    m_hat = m / (1 - beta1 ** (t + 1))
    v_hat = v / (1 - beta2 ** (t + 1))
    # the square root has no derivative at 0: `root` is inside
    theta = theta - lr * m_hat / (v_hat + root).sqrt()
    return torch.stack((theta, m, v))


def train_step(losses, rule, state, t, batch, weights):
    """Step t of a training -> the next state, which can be differentiated.

    losses(theta (P,), batch) -> (n,). rule: sgd or adam. state: requires a gradient.
    """
    theta = state[0]
    loss = (weights * losses(theta, batch)).mean()
    # create_graph: the gradient is itself a function of theta and the weights
    (grad,) = torch.autograd.grad(loss, theta, create_graph=True)
    return rule(state, grad, t)


def advance(step, state, t, batch, weights):
    """A step, and nothing kept for the way back."""
    return step(state.detach().requires_grad_(), t, batch, weights).detach()


def train_target(step, state, batches, weights):
    """All steps -> the last state."""
    for t, (batch, w) in enumerate(zip(batches, weights, strict=True)):
        state = advance(step, state, t, batch, w)
    return state


def metagradient(step, metric, start, batches, weights):
    """d metric(theta after training) / d weights -> it (one for each batch), and the last state.

    step(state, t, batch, weights) -> state, as train_step. Holds the graph of one step at a time
    and about 2 sqrt(M) states. (Engstrom et al., section 3; here one level of their tree.)
    """
    M = len(batches)
    every = math.isqrt(M - 1) + 1
    # forward: keep each `every`-th state
    kept = {}
    state = start
    for t in range(M):
        if t % every == 0:
            kept[t] = state
        state = advance(step, state, t, batches[t], weights[t])
    last = state
    theta = last[0].clone().requires_grad_()
    # pull: the derivative with respect to the state that the way back has come to
    pull = torch.zeros_like(last)
    (pull[0],) = torch.autograd.grad(metric(theta), theta)
    tau = [None] * M
    for first in reversed(range(0, M, every)):
        # from a kept state forward again, to the next one
        states = [kept.pop(first)]
        for t in range(first, min(first + every, M) - 1):
            states.append(advance(step, states[-1], t, batches[t], weights[t]))
        # and back, one step at a time
        while states:
            t = first + len(states) - 1
            state = states.pop().detach().requires_grad_()
            w = weights[t].detach().requires_grad_()
            after = step(state, t, batches[t], w)
            pull, tau[t] = torch.autograd.grad(after, (state, w), pull)
    return tau, last


# --------------------------------------------------------------------------------------------------
# The target, and the picture in it

RULES = {"SGD": partial(sgd, lr=3.0), "Adam": partial(adam, lr=0.05)}


def make_target(seed, rule):
    """The state that each training of the target begins with."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for shape, scale in zip(SHAPES, (1, D**-0.5, 0.1), strict=True):
        parts.append(scale * torch.randn(shape, generator=generator).flatten())
    theta = torch.cat(parts).double()
    moments = torch.zeros(2 * (rule == "Adam"), len(theta), dtype=torch.float64)
    return torch.cat((theta[None], moments))


def losses(theta, ids):
    """theta (P,), ids (n, T + 1) -> mean next-token cross-entropy of each example (n,)."""
    parts = theta.split([V * D, D * D, V * D])
    embedding, hidden, output = (part.view(-1, D) for part in parts)
    h = torch.tanh(embedding[ids[:, :-1]] @ hidden)  # (n, T, D)
    logp = (h @ output.T).log_softmax(-1)  # (n, T, V)
    logp = logp.gather(2, ids[:, 1:, None]).squeeze(2)  # (n, T)
    return -logp.mean(1)


def change(theta, before):
    """What training did to the output weights under the picture (ROWS, COLUMNS)."""
    output = (theta - before)[-V * D :].view(V, D)
    return output[:COLUMNS, :ROWS].T


def metric(theta, before):
    """-softplus(-SHARP * sign * change), mean over pixels: 0 is the most, nothing moved -log 2."""
    return F.logsigmoid(SHARP * SIGNS * change(theta, before)).mean()


def pixels_right(theta, before):
    right = change(theta, before).sign() == SIGNS
    return right.double().mean().item()


# --------------------------------------------------------------------------------------------------
# The generator, and what its examples are paid


def write(table, prompts, generator):
    """table (V, V), logits of the next token; prompts (n,) -> ids (n, T + 1)."""
    p = table.softmax(-1)
    ids = prompts[:, None]
    for _ in range(T):
        token = p[ids[:, -1]].multinomial(1, generator=generator)  # (n, 1)
        ids = torch.cat((ids, token), dim=1)
    return ids


def logprobs(table, ids):
    """ids (n, T + 1) -> the log-probability of each example, given its first token (n,)."""
    logp = table.log_softmax(-1)
    return logp[ids[:, :-1], ids[:, 1:]].sum(1)


def ones(batches):
    return [torch.ones(len(batch), dtype=torch.float64) for batch in batches]


def pay_each(step, goal, start, ids, inner, generator):
    """tau of each example (n,) for a goal(theta), and the weights of the target trained on all."""
    order = torch.randperm(len(ids), generator=generator)  # groups are mixed in the batches
    batches = ids[order].chunk(inner)
    tau, last = metagradient(step, goal, start, batches, ones(batches))
    reward = torch.empty(len(ids), dtype=torch.float64)
    reward[order] = torch.cat(tau)
    return reward, last[0]


def train_on(step, start, ids, inner, generator):
    """The weights of the target after one pass over ids, shuffled."""
    batches = ids[torch.randperm(len(ids), generator=generator)].chunk(inner)
    return train_target(step, start, batches, ones(batches))[0]


def pay_by_dataset(step, goal, start, ids, inner, generator, group=GROUP):
    """As pay_each, but each example gets the goal of a target that trained on its dataset.

    Dataset k is the k-th example of each group: to compare within a group compares datasets.
    """
    rewards = []
    for k in range(group):
        theta = train_on(step, start, ids[k::group], inner, generator)
        rewards.append(goal(theta))
    # the picture is judged as in the other arms: in a target that trains on all examples
    theta = train_on(step, start, ids, inner, generator)
    return torch.stack(rewards).repeat(len(ids) // group), theta


def advantages(reward):
    """reward (prompts, GROUP) -> how much better than the others of the group, in deviations."""
    centred = reward - reward.mean(1, keepdim=True)
    return centred / (reward.std(1, keepdim=True) + 1e-12)


def train(config, run, seed, arm):
    """The generator learns to write data that write the picture."""
    rule, one_by_one, times = ARMS[arm]
    pay = pay_each if one_by_one else pay_by_dataset
    step_of_target = partial(train_step, losses, RULES[rule])
    start = make_target(seed, rule)
    goal = partial(metric, before=start[0])
    table = nn.Embedding(V, V)
    nn.init.zeros_(table.weight)
    optimizer = torch.optim.Adam(table.parameters(), config.lr)
    generator = torch.Generator().manual_seed(seed)
    steps = config.steps * times
    loop = run.loop(f"{arm} {seed}", steps, table, optimizer, random.Random(seed), generator)
    for step in loop:
        optimizer.param_groups[0]["lr"] = config.lr * (1 - step / steps)
        # 1. Examples
        prompts = torch.randperm(V, generator=generator)[:PROMPTS].repeat_interleave(GROUP)
        with torch.no_grad():
            ids = write(table.weight, prompts, generator)  # (n, T + 1)
        # 2. What the target makes of them
        reward, theta = pay(step_of_target, goal, start, ids, config.inner, generator)
        # 3. A policy gradient
        adv = advantages(reward.view(PROMPTS, GROUP)).flatten()
        loss = -(adv * logprobs(table.weight, ids)).mean()
        optimizer.zero_grad()
        loss.backward()
        descend(optimizer, loss)
        row = dict(pixels=pixels_right(theta, start[0]), metric=goal(theta).item())
        run.say(**row)
        if step in (0, steps - 1):
            row["change"] = change(theta, start[0]).tolist()
        run.log(arm=arm, seed=seed, step=step + 1, **row)


def check_derivative(config, seed, rule, h=1e-4):
    """tau of some examples of an untrained generator, and (metric(1 + h) - metric(1 - h)) / 2h."""
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.arange(PROMPTS).repeat_interleave(GROUP)
    batches = write(torch.zeros(V, V), prompts, generator).chunk(config.inner)
    step = partial(train_step, losses, RULES[rule])
    start = make_target(seed, rule)
    goal = partial(metric, before=start[0])
    tau, _ = metagradient(step, goal, start, batches, ones(batches))

    def moved(i, by):
        weights = torch.ones(len(prompts), dtype=torch.float64)
        weights[i] += by
        last = train_target(step, start, batches, weights.chunk(config.inner))
        return goal(last[0]).item()

    every = math.ceil(len(prompts) / config.checked)
    finite = []
    for i in range(0, len(prompts), every):
        finite.append((moved(i, h) - moved(i, -h)) / (2 * h))
    return dict(exact=torch.cat(tau)[::every].tolist(), finite=finite)


# --------------------------------------------------------------------------------------------------
# The figure


def at_end(run, arm):
    """The share of right pixels, mean of the last ten steps (seeds,)."""
    return series(run, "pixels", arm=arm)[1][:, -10:].mean(1)


def pictures(run, arm, seed):
    """The rows of the first and the last step: they hold the change of the weights."""
    rows = [row for row in run.rows if "change" in row]
    return [row for row in rows if row["arm"] == arm and row["seed"] == seed]


def draw_picture(ax, run, arm, seed, which, name):
    """What stands in the weights at the first or the last step of one seed."""
    row = pictures(run, arm, seed)[which]
    ax.imshow(row["change"], cmap="RdBu_r", vmin=-0.5 / SHARP, vmax=0.5 / SHARP)
    title = f"{name}\nseed {seed}: {row['pixels']:.0%} right"
    ax.set(title=title, xlabel="token", ylabel="channel")
    ax.set(xticks=[], yticks=[])


def derivatives(run, rule):
    """exact, finite (seeds, examples), and the relative error of each seed (seeds,)."""
    rows = [row for row in run.rows if row.get("rule") == rule]
    exact = np.array([row["exact"] for row in rows])
    finite = np.array([row["finite"] for row in rows])
    error = np.linalg.norm(exact - finite, axis=1)
    return exact, finite, error / np.linalg.norm(finite, axis=1)


def figure(config, run):
    """The figure and its claims, from the rows of the run."""
    fig, axes = plt.subplot_mosaic(
        [list("abcd"), list("eeff")],
        figsize=(13, 8.5),
        layout="constrained",
        height_ratios=(1, 1.3),
    )
    for place, arm, which, name in (
        ("a", "SGD", 0, "first step"),
        ("b", "SGD", -1, "last step, SGD inside"),
        ("c", "Adam", -1, "last step, Adam inside"),
        ("d", "by dataset", -1, "paid by dataset"),
    ):
        draw_picture(axes[place], run, arm, config.seed, which, name)
    ends = {arm: at_end(run, arm) for arm in ARMS}
    for arm in ARMS:
        band(axes["e"], *series(run, "pixels", arm=arm), arm)
    axes["e"].axhline(0.95, color="k", lw=0.5, label="asked for: 0.95")
    xlabel = f"step of the generator ({PROMPTS * GROUP} examples each)"
    axes["e"].set(xscale="log", xlabel=xlabel)
    axes["e"].set_ylabel("pixels right (fraction)")
    told = ", ".join(f"{arm} {ends[arm].mean():.2f}" for arm in list(ARMS)[:3])
    axes["e"].set_title(f"Mean of the last ten steps: {told}")
    axes["e"].legend()
    errors = {}
    for rule, size in zip(RULES, (40, 8), strict=True):
        exact, finite, errors[rule] = derivatives(run, rule)
        axes["f"].scatter(finite, exact, s=size, alpha=0.6, label=f"{rule} inside")
    axes["f"].axline((0, 0), slope=1, color="k", lw=0.5)
    axes["f"].set(xlabel="finite difference of the metric", ylabel="metagradient of the example")
    worst = max(error.max() for error in errors.values())
    axes["f"].set_title(f"The derivative is exact: relative error at most {worst:.0e}")
    axes["f"].legend()
    fig.suptitle(
        "A picture written into another model's output weights by training data alone: "
        f"{ends['SGD'].mean():.0%} of {SIGNS.numel()} pixels\n"
        f"(paid by dataset: {ends['by dataset'].mean():.0%}; means of the last ten steps, "
        f"{config.seeds} seed{'s' * (config.seeds > 1)}). Blue: shrunk, red: grown"
    )
    return fig, judge(config.seeds, ends, errors)


def judge(n, ends, errors):
    """The claims, from the right pixels at the end and the errors of the derivative, by seed."""
    derived, design = "derived", "design of the task"
    together = ends["by dataset"]
    longer = ends["by dataset, 4 times the data"]
    claims = []
    for rule, error in errors.items():
        text = f"{rule}: relative error of the derivative, worst seed"
        claims.append(
            claim(f"{rule} exact", text, derived, "0", error.max(), "<=", 1e-5, n),
        )
    for rule in RULES:
        text = f"{rule}: pixels right, worst seed"
        claims.append(
            claim(rule, text, SOURCE, "readable", ends[rule].min(), ">=", 0.95, n),
        )
    text = "paid by dataset: pixels right"
    claims.append(
        claim("dataset", text, design, "-", together, "<=", 0.85, n),
    )
    text = "SGD minus paid by dataset"
    claims.append(
        claim("gain", text, design, "-", ends["SGD"] - together, ">=", 0.1, n),
    )
    text = "SGD minus paid by dataset, 4 times the data"
    claims.append(
        claim("longer", text, design, "-", ends["SGD"] - longer, ">", 0, n),
    )
    return claims


def read_picture(run, seed, which):
    """The rows of the picture as the weights hold them, each with whether it is right."""
    read = []
    for line, wanted in zip(pictures(run, "SGD", seed)[which]["change"], PICTURE, strict=True):
        text = "".join("#" if moved > 0 else "." for moved in line)
        read.append((text, text == wanted))
    return read


def main():
    config = parse_args(Config, __doc__)
    with Run(config) as run:
        run.introduce("cpu", V * V)
        for seed in seeds_of(config):
            for rule in RULES:
                check = partial(check_derivative, config, seed, rule)
                run.log_once(check, rule=rule, seed=seed, step=0)
            for arm in ARMS:
                train(config, run, seed, arm)
        prompts = [
            f"not held out: row {i:<2} of the picture   {row}" for i, row in enumerate(PICTURE)
        ]
        read = {"first step": read_picture(run, seed, 0), "last step": read_picture(run, seed, -1)}
        run.samples(prompts, **read)
        run.finish(*figure(config, run))


if __name__ == "__main__":
    command(main)
