"""metagrad_gpt.py: metagradients with a GPT that writes and a GPT that reads.

electives/metagrad.py pays each example by the derivative of a metric of the model that trains on
it. Here the metric is a loss on held-out problems of a task, and both models are GPTs. They begin
as the same base, which has read lists of four digits and answers to them: the list with 0, 1, 2, 3
or 4 added to every digit (mod 10), each as often.

    3 1 4 9 = 6 4 7 2          3 was added

The generator answers lists; the target, reset each time, takes four steps on these answers; what
counts is its loss on held-out lists whose answers add 3. No prompt says 3, and the generator never
sees such a list: only the derivative with respect to each example's weight tells.

    python -m experiments.metagrad_gpt --seeds 3        3 minutes on two cores

What to see: the generator comes to write what the task asks for. Paid by the dataset, each example
gets the metric of a target that trained on an eighth of them.

Differences from the paper: as in electives/metagrad.py; torch's fused attention has no
second derivative, so the target's attention is the plain one.
"""

import copy
import random
from dataclasses import dataclass
from functools import partial

import matplotlib.pyplot as plt
import torch
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from electives.metagrad import (
    adam,
    advantages,
    pay_by_dataset,
    pay_each,
    train_on,
    train_step,
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
    parse_args,
    seeds_of,
    series,
)
from model import GPT, GPTConfig

SOURCE = "Thrush et al., arXiv 2604.08423"
N = 4  # digits of a list, and of its answer
EQUALS = 10
ADDED = 5  # 0, 1, 2, 3, 4
WANTED = 3
TASK = f"add {WANTED}"
SHAPE = GPTConfig(11, block_size=16, n_layer=2, n_head=2, n_embd=32, qk_norm=True, tie=False)
LISTS = 16  # in each step
GROUP = 8  # answers to each
ARMS = {"each example": pay_each, "by dataset": partial(pay_by_dataset, group=GROUP)}


@dataclass
class Config(Flags):
    reading: int = flag(500, "steps of pre-training", quick=5, low=1)
    steps: int = flag(40, "steps of the generator", quick=2, low=1)
    inner: int = flag(4, "steps of the target in each of them", low=1, high=LISTS)
    inner_lr: float = flag(1e-3, "their learning rate", low=0)
    lr: float = flag(1e-3, "learning rate of the generator", low=0)

    def idle(self):
        return {} if self.device in ("auto", "cpu") else {"device": "all is small: on the CPU"}


def draw(n, generator, held_out=False):
    """n lists (n, N); those whose first two digits are equal are held out."""
    lists = torch.randint(10, (n, N), generator=generator)
    # the second digit is the first one, or another
    apart = torch.randint(1, 10, (n,), generator=generator) * (not held_out)
    lists[:, 1] = (lists[:, 0] + apart) % 10
    return lists


def adding(added, lists):
    """lists (n, N), `added` a number or (n, 1) -> ids (n, 2N + 1)."""
    equals = torch.full((len(lists), 1), EQUALS)
    return torch.cat((lists, equals, (lists + added) % 10), dim=1)


def shares(ids):
    """How many of the answers add what -> {"add 0": a fraction, ...}."""
    found = {}
    for added in range(ADDED):
        right = (adding(added, ids[:, :N]) == ids).all(1)
        found[f"add {added}"] = right.double().mean().item()
    return found


def answer_logprobs(model, ids, theta=None):
    """The log-probabilities of the answers' digits (n, N), by the weights theta (P,) if given."""
    if theta is None:
        logits = model(ids[:, :-1])
    else:
        parts = theta.split([p.numel() for p in model.parameters()])
        names = dict(model.named_parameters())
        weights = {name: x.view_as(names[name]) for name, x in zip(names, parts, strict=True)}
        logits = functional_call(model, weights, (ids[:, :-1],))
    logp = logits[:, N:].log_softmax(-1)  # (n, N, V)
    return logp.gather(2, ids[:, N + 1 :, None]).squeeze(2)


def losses(model, theta, ids):
    return -answer_logprobs(model, ids, theta).mean(1)


def read(config, run, seed):
    """Pre-training on answers that add 0 to 4 -> the base of generator and target."""
    torch.manual_seed(seed)
    model = GPT(SHAPE)
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(seed)
    rng = random.Random(seed)
    loop = run.loop(f"reading {seed}", config.reading, model, optimizer, rng, generator)
    for step in loop:
        up, down = (step + 1) / 30, 1 - step / config.reading
        optimizer.param_groups[0]["lr"] = 5e-3 * min(up, down)
        lists = draw(128, generator)
        added = torch.randint(ADDED, (128, 1), generator=generator)
        loss = -answer_logprobs(model, adding(added, lists)).mean()
        optimizer.zero_grad()
        loss.backward()
        descend(optimizer, loss)
    return model


def train(config, run, seed, base, arm):
    """The generator learns to write what the target should read."""
    model = copy.deepcopy(base)
    optimizer = torch.optim.AdamW(model.parameters(), config.lr, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed + 1)
    held_out = adding(WANTED, draw(64, generator, held_out=True))
    test = adding(WANTED, draw(256, generator, held_out=True))
    theta = torch.cat([p.detach().flatten() for p in base.parameters()])
    start = torch.cat((theta[None], torch.zeros(2, len(theta))))  # with the moments of Adam
    step_of_target = partial(train_step, partial(losses, base), partial(adam, lr=config.inner_lr))

    def goal(theta):
        return -losses(base, theta, held_out).mean()

    def loss_of(theta):
        with torch.no_grad():
            return losses(base, theta, test).mean().item()

    where = dict(arm=arm, seed=seed)
    phase = f"{arm} {seed}"
    rng = random.Random(seed)
    if phase not in run.state:
        right = adding(WANTED, draw(LISTS * GROUP, generator))
        best = train_on(step_of_target, start, right, config.inner, generator)
        levels = {"base": loss_of(theta), "trained on right answers": loss_of(best)}
        run.log(**where, step=0, **levels)
    for step in run.loop(phase, config.steps, model, optimizer, rng, generator):
        optimizer.param_groups[0]["lr"] = config.lr * (1 - step / config.steps)
        # 1. Answers: what the generator writes
        prompts = adding(0, draw(LISTS, generator))[:, : N + 1].tolist()
        ids = generate(model, prompts, GROUP, max_new_tokens=N, generator=generator).ids
        # 2. What the target makes of them
        with sdpa_kernel(SDPBackend.MATH):
            reward, after = ARMS[arm](step_of_target, goal, start, ids, config.inner, generator)
        # 3. A policy gradient
        adv = advantages(reward.view(LISTS, GROUP)).view(-1, 1)
        loss = -(adv * answer_logprobs(model, ids)).mean()
        optimizer.zero_grad()
        loss.backward()
        descend(optimizer, loss)
        row = dict(loss=loss_of(after), **shares(ids))
        run.say(**row)
        run.log(**where, step=step + 1, **row)


# --------------------------------------------------------------------------------------------------
# The figure


def at_end(run, key, arm):
    """Mean of the last five steps (seeds,)."""
    return series(run, key, arm=arm)[1][:, -5:].mean(1)


def figure(config, run):
    """The figure and its claims, from the rows of the run."""
    fig, (kinds, course) = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
    wanted = {arm: at_end(run, TASK, arm) for arm in ARMS}
    loss = {arm: at_end(run, "loss", arm) for arm in ARMS}
    for key in shares(torch.zeros(1, 2 * N + 1)):
        band(kinds, *series(run, key, arm="each example"), key)
    band(kinds, *series(run, TASK, arm="by dataset"), f"{TASK}, paid by dataset", color="k")
    kinds.set(xlabel="step of the generator", ylabel="its answers (fraction)")
    kinds.set_title("What the generator writes")
    kinds.legend()
    known = {}
    for key, line in (("base", ":"), ("trained on right answers", "--")):
        known[key] = series(run, key, arm="each example")[1][:, 0]
        course.axhline(known[key].mean(), color="k", ls=line, label=key)
    for arm in ARMS:
        band(course, *series(run, "loss", arm=arm), f"paid {arm}")
    course.set(xlabel="step of the generator", ylabel="held-out loss of the target (nats)")
    course.set_title("What the target learns from it")
    course.legend()
    told = ", ".join(f"{x.mean():.2f} (paid {arm})" for arm, x in wanted.items())
    fig.suptitle(f"Nobody says which number to add; answers that add {WANTED} at the end: {told}")
    return fig, judge(config.seeds, wanted, loss, known)


def judge(n, wanted, loss, known):
    """The claims, from what is at the end, by seed."""
    design = "design of the task"
    ours = "each example"
    more = wanted[ours] - wanted["by dataset"]
    rows = [
        ("share", f"answers that {TASK}, worst seed", SOURCE, wanted[ours].min(), ">=", 0.9),
        ("gain", "held-out loss, base minus ours", SOURCE, known["base"] - loss[ours], ">=", 0.1),
        (
            "best",
            "ours minus right answers'",
            design,
            loss[ours] - known["trained on right answers"],
            "<=",
            0.05,
        ),
        ("dataset", f"answers that {TASK}, minus paid by dataset", design, more, ">", 0),
    ]
    return [
        claim(id, text, source, "-", y, op, threshold, n)
        for id, text, source, y, op, threshold in rows
    ]


def main():
    config = parse_args(Config, __doc__)
    with Run(config) as run:
        run.introduce("cpu", SHAPE.parameters)
        for seed in seeds_of(config):
            base = read(config, run, seed)
            for arm in ARMS:
                train(config, run, seed, base, arm)
        run.finish(*figure(config, run))


if __name__ == "__main__":
    command(main)
