"""metagrad_gpt.py: metagradients with a GPT that writes and a GPT that reads.

(Thrush et al., arXiv 2604.08423.) electives/metagrad.py pays each example by the derivative of a
metric of the model that trains on it. Here the metric is a loss on held-out problems of a task, and
both models are GPTs. They begin as the same base, which has read pairs of digits and answers to
them: 0, 1, 2, 3 or 4 is added to both digits (mod 10), each as often, and the answer says first
which.

    3 9 = D 6 2          D: 3 was added

The generator answers pairs; the target, reset each time, takes four steps on these answers; what
counts is its loss on held-out pairs whose answers add 3. No prompt says 3, and the generator never
sees such a pair: only the derivative with respect to each example's weight tells.

    python -m experiments.metagrad_gpt          2 minutes on one core

The rival gets the same number of answers from the same pairs, and is paid by the dataset: the
metric of a target that trained on an eighth of them.

What to see: how many answers add 3; and the held-out loss of another copy of the base, that reads
512 answers of the generator.

How this differs from the paper: as in electives/metagrad.py. Adam's root inside has 1e-2 added and
its rate is small: a GPT that has learnt its answers well is so sharp that larger steps make the
derivatives noise. For the same reason advantages are cut at three deviations of the batch. Torch's
fused attention has no second derivative, so the target's attention is the plain one.
"""

import copy
import random
from dataclasses import dataclass
from functools import partial

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parameters_to_vector

from electives.metagrad import (
    adam,
    metagradient,
    ones,
    pay_by_dataset,
    pay_each,
    train_on,
    train_step,
    train_target,
)
from engine import generate
from experiment import (
    Flags,
    Run,
    band,
    claim,
    command,
    descend,
    flag,
    lr_at,
    parse_args,
    seeds_of,
    series,
)
from model import GPT, GPTConfig

N = 2  # digits of a problem, and of its answer
EQUALS, LETTER = 10, 11  # ids: 10 digits, "=", a letter for each number that is added
ADDED = 5  # 0, 1, 2, 3, 4
WANTED = 3
SHAPE = GPTConfig(
    LETTER + ADDED,
    block_size=8,
    n_layer=2,
    n_head=2,
    n_embd=32,
    tie=False,
)
PAIRS, GROUP = 16, 8  # in each step; answers to each
OURS = "each example"
# how the generator is paid, and its learning rate, the best of three on another seed
ARMS = {OURS: 1e-3, "by dataset": 3e-4}

PAIR = torch.cartesian_prod(torch.arange(10), torch.arange(10))
GAP = (PAIR[:, 1] - PAIR[:, 0]) % 10
# the metric is taken on pairs of twice the same digit, the test on pairs 5 apart
HELD_OUT, TEST, OPEN = PAIR[GAP == 0], PAIR[GAP == 5], PAIR[GAP % 5 != 0]


@dataclass
class Config(Flags):
    seeds: int = flag(3, "repeat over this many seeds", quick=1, low=1)
    reading: int = flag(500, "steps of pre-training", quick=5, low=1)
    steps: int = flag(121, "steps of the generator", quick=11, low=1)
    inner: int = flag(4, "steps of the target in each of them", low=1, high=PAIRS)

    def idle(self):
        return {} if self.device in ("auto", "cpu") else {"device": "all is small: on the CPU"}


def pick(pairs, n, generator):
    return pairs[torch.randint(len(pairs), (n,), generator=generator)]


def adding(added, pairs):
    """pairs (n, N), `added` (n or 1, 1) -> ids (n, 2N + 2): digits, =, the letter, the answer."""
    added = torch.as_tensor(added).expand(len(pairs), 1)
    equals = torch.full((len(pairs), 1), EQUALS)
    return torch.cat((pairs, equals, LETTER + added, (pairs + added) % 10), dim=1)


def losses(model, theta, ids):
    """theta (P,): weights in the model's stead; ids (n, T) -> the loss on each answer (n,)."""
    parts = theta.split([p.numel() for p in model.parameters()])
    named = zip(model.named_parameters(), parts, strict=True)
    weights = {name: part.view_as(p) for (name, p), part in named}
    logits = functional_call(model, weights, (ids[:, :-1],))[:, N:]  # (n, N + 1, V)
    return F.cross_entropy(logits.mT, ids[:, N + 1 :], reduction="none").mean(1)


def weights_of(model):
    return parameters_to_vector(model.parameters())


def write(model, pairs, generator):
    """GROUP answers to each pair -> ids."""
    prompts = adding(0, pairs)[:, : N + 1].tolist()
    return generate(model, prompts, GROUP, max_new_tokens=N + 1, generator=generator).ids


def read(config, run, seed):
    """Pre-training on answers that add 0 to 4 -> the base of generator and target."""
    torch.manual_seed(seed)
    model = GPT(SHAPE)
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(seed)
    rng = random.Random(seed)
    for step in run.loop(f"reading {seed}", config.reading, model, optimizer, rng, generator):
        optimizer.param_groups[0]["lr"] = lr_at(step, config.reading, 5e-3)
        added = torch.randint(ADDED, (128, 1), generator=generator)
        ids = adding(added, pick(PAIR, 128, generator))
        loss = losses(model, weights_of(model), ids).mean()
        optimizer.zero_grad()
        loss.backward()
        descend(optimizer, loss)
    return model


def metric(base, pairs, theta):
    return -losses(base, theta, adding(WANTED, pairs)).mean()


def target(base, lr=5e-4):
    """The base as a target: its step, and the state that it begins with."""
    theta = weights_of(base).detach()
    start = torch.stack((theta, 0 * theta, 0 * theta))  # with Adam's moments
    rule = partial(adam, lr=lr, root=1e-2)
    return partial(train_step, partial(losses, base), rule), start


def judged(base, ids, generator):
    """The test loss of a target that trained on the 512 ids."""
    step, start = target(base)
    return -metric(base, TEST, train_on(step, start, ids, 16, generator)).item()


def pay(arm, inner, base, ids, generator):
    """The reward of each example (n,)."""
    goal = partial(metric, base, HELD_OUT)
    step, start = target(base)
    if arm == "by dataset":
        return pay_by_dataset(step, goal, start, ids, inner, generator, group=GROUP)[0]
    return pay_each(step, goal, start, ids, inner, generator)[0]


def advantages(reward):
    """reward (n,), groups in a row -> above the mean of the group, in deviations of the batch."""
    groups = reward.view(-1, GROUP)
    centred = groups - groups.mean(1, keepdim=True)
    return (centred / (centred.std() + 1e-12)).clamp(-3, 3).flatten()


def train(config, run, seed, base, arm):
    """The generator learns to write what the target should read."""
    model = copy.deepcopy(base)
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(seed + 1)
    loop = run.loop(f"{arm} {seed}", config.steps, model, optimizer, random.Random(seed), generator)
    for step in loop:
        optimizer.param_groups[0]["lr"] = ARMS[arm] * min((step + 1) / 10, 1 - step / config.steps)
        if step % 10 == 0:
            data = write(model, pick(OPEN, 64, generator), generator)
            loss = judged(base, data, generator)
            # answers that are right from the letter to the last digit
            share = (adding(WANTED, data[:, :N]) == data).all(1).double().mean().item()
            run.log(arm=arm, seed=seed, step=step, loss=loss, share=share)
        # 1. Answers: what the generator writes
        ids = write(model, pick(OPEN, PAIRS, generator), generator)
        # 2. What the target makes of them
        reward = pay(arm, config.inner, base, ids, generator)
        # 3. A policy gradient
        loss = (advantages(reward) * losses(model, weights_of(model), ids)).mean()
        optimizer.zero_grad()
        loss.backward()
        descend(optimizer, loss)


def check(inner, base, seed, h=1e-2):
    """The metric's slope along random weights, in fp64, against finite differences."""
    generator = torch.Generator().manual_seed(seed)
    base = copy.deepcopy(base).double()
    step, start = target(base)
    goal = partial(metric, base, HELD_OUT)
    batches = adding(WANTED, pick(OPEN, PAIRS, generator)).chunk(inner)
    along = torch.randn(PAIRS, generator=generator).double()

    def moved(by):
        weights = (1 + by * along).chunk(inner)
        return goal(train_target(step, start, batches, weights)[0])

    tau, _ = metagradient(step, goal, start, batches, ones(batches))
    finite = (moved(h) - moved(-h)) / (2 * h)
    return {"error": (torch.cat(tau) @ along / finite - 1).abs().item()}


# --------------------------------------------------------------------------------------------------
# The figure


def figure(config, run):
    """The figure and its claims, from the rows of the run."""
    fig, axes = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
    ends = {}
    names = {
        "share": f"answers that add {WANTED} (fraction)",
        "loss": "test loss of a target that read 512 of them (nats a token)",
    }
    for ax, key in zip(axes, names, strict=True):
        for arm in ARMS:
            steps, values = series(run, key, arm=arm)
            band(ax, steps, values, f"paid {arm}")
            ends[key, arm] = values[:, -1]
        ax.set(xlabel="step of the generator", ylabel=names[key])
    axes[1].legend()
    told = ", ".join(f"{ends['share', arm].mean():.2f} (paid {arm})" for arm in ARMS)
    fig.suptitle(f"Nobody says what to add. Answers that add {WANTED} at the end:\n{told}")
    loss = ends["loss", OURS]
    # each claim is one of the worst seed
    rows = [
        ("relative error of the derivative", series(run, "error")[1].max(), "<=", 1e-4),
        (f"answers that add {WANTED}", ends["share", OURS].min(), ">=", 0.9),
        (
            "test loss, after minus before",
            (loss - series(run, "loss", arm=OURS)[1][:, 0]).max(),
            "<",
            0,
        ),
    ]
    rival = loss - ends["loss", "by dataset"]
    rows.append(("test loss, minus paid by dataset", rival.max(), "<", 0))
    return fig, [
        claim(text, f"{text}, worst seed", "design of the task", "-", *rest, config.seeds)
        for text, *rest in rows
    ]


def main():
    config = parse_args(Config, __doc__)
    # fused attention has no second derivative
    with Run(config) as run, sdpa_kernel(SDPBackend.MATH):
        run.introduce("cpu", SHAPE.parameters)
        for seed in seeds_of(config):
            base = read(config, run, seed)
            run.log_once(partial(check, config.inner, base, seed), seed=seed, step=0)
            for arm in ARMS:
                train(config, run, seed, base, arm)
        run.finish(*figure(config, run))


if __name__ == "__main__":
    command(main)
