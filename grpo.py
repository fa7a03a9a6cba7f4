"""grpo.py: reinforcement learning with verifiable rewards, whole: seven losses, one loop.

A small GPT has read answers by demonstrators who do not take care (tasks/addition.py: they guess
their carries, and are right about one time in four). It answers each problem many times, a program
says which answers are right, and a step makes the tokens of those likelier. Of token t of answer i,
with rho = exp(logp - old_logp), the probability now over the one before the batch's first gradient
step:

    loss = sum_{i,t} a_{i,t} * (L(rho_{i,t}, A_i) + beta * KL_{i,t} - entropy_bonus * H_{i,t})

    1. advantage A:    how much better the answer's reward r_i is than a baseline
       std             (r_i - mean) / std of the answers to the same problem
       mean            r_i - mean
       positive        the same, but never below 0
       rloo            r_i - mean of the others
       batch           r_i - mean of all problems
    2. ratio L:        what is minimised, where clip(rho) lies in 1 - eps_low .. 1 + eps_high
       none            -A logp
       token           -min(rho A, clip(rho) A)
       sequence        the same, with the geometric mean of the answer's rho
       cispo           -clip(rho) A logp, and no gradient through clip(rho)
    3. aggregation a:  1 / what a token's loss is divided by
       sequence        tokens of its answer * number of answers
       token           tokens of all answers
       constant        tokens that an answer may have * number of answers
       sum             number of answers
    4. off by default:
       KL              to the base model, estimated (`kl_estimate`); --beta
       H               the entropy of the model's next token; --entropy-bonus

`LOSSES` has the usual combinations by their names. To try another, add a row there (advantage,
ratio, eps_low, eps_high, aggregation, and True for dynamic sampling) and name it after --loss.

How this differs from the papers:
1. One gradient step on each batch of answers: by default rho = 1, and ratio and eps do nothing
   unless --minibatches > 1. experiments/variants.py takes 4.
2. DAPO (arXiv 2503.14476): clip-higher, token aggregation (over the batch, not by group) and
   dynamic sampling; no reward that depends on length.
3. GSPO's clip range (arXiv 2507.18071: 3e-4, 4e-4) is 100 times wider here: a small model's
   sequence ratio moves more in one step.
4. A KL in the reward (--kl k1) is not divided by a group's std: in a group without a right answer
   that would blow its noise up to 1.

    python grpo.py                                under 3 minutes on two cores
    python grpo.py --loss grpo --beta 0.01        another method, and a pull to the base
    python grpo.py --task countdown --size 3      another task
    python grpo.py --task sorting.py --size 5     your own (docs/bring_your_own_task.md)

What to see: held-out pass@1 from about .27 to .95 in 45 steps; guessed carries from half of the
lines to almost none. (With one seed in four they stay: it reads the carry off the digits.) The
value of the loss says nothing about success: watch `reward`.
"""

import copy
import math
import random
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F

import tasks
from engine import Rollout, generate
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
from kernels import token_logprobs
from meter import Meter
from model import GPT, GPTConfig
from tasks import pass_at_k


class Loss(NamedTuple):
    advantage: str
    ratio: str
    eps_low: float  # the clip range is 1 - eps_low .. 1 + eps_high
    eps_high: float
    aggregation: str
    dynamic: bool = False  # sample on until there are enough groups with right and wrong answers


LOSSES = {
    # without a ratio nothing is clipped; reinforce.py itself is Loss("mean", "none", 0, 0, "token")
    "reinforce": Loss("batch", "none", 0, 0, "sum"),
    "rloo": Loss("rloo", "none", 0, 0, "sum"),  # Ahmadian et al., arXiv 2402.14740
    "grpo": Loss("std", "token", 0.2, 0.2, "sequence"),  # Shao et al., arXiv 2402.03300
    "dr_grpo": Loss("mean", "token", 0.2, 0.2, "constant"),  # Liu et al., arXiv 2503.20783
    "dapo": Loss("std", "token", 0.2, 0.28, "token", True),  # Yu et al., arXiv 2503.14476
    "gspo": Loss("std", "sequence", 0.03, 0.04, "sequence"),  # Zheng et al., arXiv 2507.18071
    "cispo": Loss("std", "cispo", 1.0, 4.0, "token"),  # MiniMax-M1, 2506.13585; ScaleRL's cap of 5
}
ADVANTAGES = "std", "mean", "rloo", "batch", "positive"
AGGREGATIONS = "sequence", "token", "constant", "sum"


@dataclass
class Config(Flags):
    task: str = flag(
        "addition", "addition, countdown, another of tasks.TASKS, or a file like those in tasks/"
    )
    size: int = flag(5, "how large a problem is: columns, or numbers", low=1, high=8)
    n_embd: int = flag(128, "channels of the GPT: 2 layers, 8 heads", quick=32, low=8, high=4096)
    sft_steps: int = flag(1200, "steps of supervised warm-up", quick=10, low=1)
    steps: int = flag(45, "steps of reinforcement learning", quick=2, low=1)
    lr: float = flag(3e-4, "RL learning rate (AdamW, constant)", low=0)
    loss: str = flag("dr_grpo", "the method, a row of LOSSES", choices=tuple(LOSSES))
    advantage: str = flag(None, "in the place of the method's own", choices=ADVANTAGES)
    aggregation: str = flag(None, "in the place of the method's own", choices=AGGREGATIONS)
    beta: float = flag(0.0, "coefficient of the KL to the base model", low=0)
    kl: str = flag(
        "k3", "KL estimator: k2, k3 in the loss, k1 in the reward", choices=("k1", "k2", "k3")
    )
    entropy_bonus: float = flag(0.0, "coefficient of the entropy", low=0)
    prompts: int = flag(32, "problems in a step", quick=4, low=1, high=4096)
    group: int = flag(16, "answers to each problem", quick=4, low=2, high=1024)
    temperature: float = flag(1.0, "of sampling, in training and evaluation", low=1e-3)
    minibatches: int = flag(1, "gradient steps on a batch of answers", low=1)
    micro_batch: int = flag(64, "answers in a forward pass", low=1, high=65536)
    eval_every: int = flag(15, "RL steps between evaluations", quick=1, low=1)
    eval_prompts: int = flag(128, "held-out problems", quick=8, low=1, high=65536)

    def __post_init__(self):
        # dynamic sampling may keep no more than one group
        answers = self.group * (1 if self.method.dynamic else self.prompts)
        if self.minibatches > answers:
            raise UserError(f"--minibatches: a batch may have no more than {answers} answers")

    def idle(self):
        """The flags that do nothing beside the others -> why."""
        return {} if self.beta else {"kl": "--beta is 0"}

    @property
    def ks(self):
        """The k of the pass@k after training: 1, 2, 4 ... 64."""
        return [2**i for i in range(3 if self.quick else 7)]

    @property
    def method(self):
        """The row of LOSSES, after the flags that change it."""
        row = LOSSES[self.loss]
        return row._replace(
            advantage=self.advantage or row.advantage,
            aggregation=self.aggregation or row.aggregation,
        )


# --------------------------------------------------------------------------------------------------
# The loss: pure functions of tensors. P problems, G answers to each: R = P * G rows of T tokens, a
# problem, its answer, padding on the right. mask (R, T): 1 on the answer's tokens and its end


def advantages(rewards, kind="std"):
    """How much better each answer is than its baseline: rewards (P, G) -> (P, G).

    kind: as in the equation above. A group of equal rewards gets exactly 0 (but for `batch`), not
    rounding noise over 1e-6.
    """
    if kind == "batch":
        return rewards - rewards.mean()
    equal = (rewards == rewards[:, :1]).all(1, keepdim=True)  # (P, 1)
    centred = torch.where(equal, 0.0, rewards - rewards.mean(1, keepdim=True))  # (P, G)
    G = rewards.shape[1]
    if kind == "rloo":  # r_i minus the mean of the others
        return centred * G / (G - 1)
    if kind == "std":
        return centred / (rewards.std(1, keepdim=True) + 1e-6)
    if kind == "positive":
        return centred.clamp_min(0)
    if kind == "mean":
        return centred
    raise ValueError(f"no such advantage: {kind}")


def policy_loss(logp, old_logp, adv, mask, ratio, eps_low, eps_high):
    """L of each token (R, T), and whether the clip silenced the token (R, T).

    logp, old_logp, mask (R, T), adv (R, 1). The clip takes the gradient away only where A > 0 and
    rho > 1 + eps_high, or A < 0 and rho < 1 - eps_low: where the step already went far enough.
    """
    if ratio == "none":  # REINFORCE
        return -adv * logp, torch.zeros_like(mask)
    log_rho = logp - old_logp  # token
    if ratio == "sequence":
        # GSPO-token: rho's value is the geometric mean over the answer, its gradient the token's
        # own: logp - logp.detach() is 0, and has the gradient of logp
        lengths = mask.sum(1, keepdim=True).clamp_min(1)  # (R, 1)
        mean_log_rho = (log_rho * mask).sum(1, keepdim=True) / lengths  # (R, 1)
        log_rho = mean_log_rho.detach() + logp - logp.detach()
    rho = log_rho.clamp(-20, 20).exp()  # (R, T); never inf, and exp(20) is beyond every clip
    clipped = rho.clamp(1 - eps_low, 1 + eps_high)
    if ratio == "cispo":  # the weight is clipped, the gradient never lost
        return -clipped.detach() * adv * logp, torch.zeros_like(mask)
    if ratio not in ("token", "sequence"):
        raise ValueError(f"no such ratio: {ratio}")
    # which tokens get no gradient is counted, no more
    silenced = ((adv > 0) & (rho > 1 + eps_high)) | ((adv < 0) & (rho < 1 - eps_low))
    # where the clipped product is the smaller one, the loss is constant
    return -torch.minimum(rho * adv, clipped * adv), silenced.float() * mask


def aggregation_weights(mask, kind, budget):
    """The weight a of each token's loss: mask (R, T) -> (R, T).

    Made from all rows of a gradient step, before they are cut into micro-batches. sequence: mean
    over rows of the mean over tokens. token: mean over all tokens. constant: sum / (R * budget),
    where budget is what an answer may take. sum: sum / R.
    """
    R = len(mask)
    divisor = {
        "sequence": R * mask.sum(1, keepdim=True).clamp_min(1),  # (R, 1)
        "token": mask.sum().clamp_min(1),
        "constant": R * budget,
        "sum": R,
    }
    return mask / divisor[kind]


def kl_estimate(logp, ref_logp, kind):
    """KL(pi || ref) of each token, estimated from samples of pi (Schulman 2020): (R, T) -> (R, T).

    As a number to look at: k1 and k3 are right on average, k2 is a little off; k3 is never below 0.
    As a loss, what counts is the gradient, on average over samples. k1's is 0 (exercise 4 of
    docs/exercises.md), k2's that of the token's KL, k3's that of KL(ref || pi). None of them sees
    what a token does to later ones: for that k1 goes into the reward (--kl k1), where its sum over
    an answer has the gradient of the whole answer's KL.
    """
    d = (logp - ref_logp).clamp(-20, 20)
    return {"k1": d, "k2": d**2 / 2, "k3": (-d).exp() + d - 1}[kind]


# --------------------------------------------------------------------------------------------------
# The base model


def build(config, task, device):
    shape = GPTConfig(
        task.tokenizer.n_vocab,
        block_size=256,
        n_layer=2,
        n_head=8,
        n_embd=config.n_embd,
        qk_norm=True,
    )
    return GPT(shape).to(device)


def warm_up(config, task, run, seed, device):
    """Supervised training on demonstrations, from scratch -> the base model."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    model = build(config, task, device)

    def demonstration():  # smaller problems teach the same steps sooner
        problem = task.draw(rng, rng.randint(1, config.size))
        return task.prompt(problem), task.demonstrate(rng, problem)

    return tasks.imitate(model, task.tokenizer, demonstration, run, seed, config.sft_steps, rng)


# --------------------------------------------------------------------------------------------------
# A step: sample, judge, descend


def sample(model, task, problems, n, config, generator, uniforms=None):
    """n answers to each problem -> Rollout (ids, mask, logp: engine.py), texts, rewards (P, n).

    Rewards are 0 or 1 (pass@k counts them), and 0 for what did not end. uniforms: instead of fresh
    random numbers, for experiments/.
    """
    # P prompts of any lengths; row i of the R = P * n answers is one to problem i // n
    prompts = [task.tokenizer.encode(task.prompt(problem)) for problem in problems]
    stop = task.tokenizer.stop
    rollout = generate(
        model,
        prompts,
        n,
        task.budget(config.size),
        config.temperature,
        stop=stop,
        generator=generator,
        uniforms=uniforms,
    )
    texts = rollout.texts(task.tokenizer)
    ended = rollout.ended(stop).tolist()
    rewards = [task.reward(problems[i // n], text) * ended[i] for i, text in enumerate(texts)]
    return rollout, texts, torch.tensor(rewards).float().view(-1, n)


def collect(model, task, config, rng, generator):
    """A batch of answers -> Rollout of P * G rows, rewards (P, G), statistics of all answers drawn.

    Dynamic sampling (DAPO) drops groups that are all right or all wrong and samples on until there
    are `prompts` others, at most 4 times; P may be less.
    """
    P, dynamic = config.prompts, config.method.dynamic
    rollouts, kept, drawn = [], [], []  # kept and drawn: rewards
    tokens = 0
    # once; with dynamic sampling up to 4 times
    while not drawn or dynamic and sum(map(len, kept)) < P and len(drawn) < 4:
        problems = [task.draw(rng, config.size) for _ in range(P)]
        rollout, _, rewards = sample(model, task, problems, config.group, config, generator)
        # all right or all wrong says nothing of what was better: the group's advantages are 0
        keep = (rewards.std(1) > 0) | (not dynamic)  # (P,)
        rollouts.append(rollout[keep.repeat_interleave(config.group)])
        kept.append(rewards[keep])
        drawn.append(rewards)
        tokens += int(rollout.mask.sum())
    # These three tell of all answers that were drawn, dropped ones included
    everything = torch.cat(drawn).double()  # (P of all calls, G)
    statistics = dict(
        reward=everything.mean().item(),
        zero_variance=(everything.std(1) == 0).double().mean().item(),
        tokens=tokens,
    )
    rewards = torch.cat(kept)[:P]  # the last call may have brought more
    if not len(rewards):  # the last batch as it is: advantages within its groups are all 0
        return rollout, drawn[-1], statistics
    # the first P * G rows: the answers of these P problems
    return Rollout.cat(rollouts)[: rewards.numel()], rewards, statistics


def score(model, rollout, rows, config):
    """Log-probability and entropy of each token of some rows (len(rows), T) each.

    Both with gradients, under the temperature that they were sampled with; meaningless where the
    mask is 0.
    """
    part = rollout[rows]  # cut to its longest row
    hidden = model.hidden(part.ids[:, :-1])  # (rows, its T - 1, C)
    logp, entropy = token_logprobs(
        hidden, model.lm_head.weight, part.ids[:, 1:], config.temperature
    )
    # A state predicts the token after it: column 0 has no score. Back to (rows, T): a column of
    # zeros on the left for it, and on the right as many as `part` was cut by
    pad = (1, rollout.ids.shape[1] - part.ids.shape[1])
    return F.pad(logp, pad), F.pad(entropy, pad)


@torch.no_grad()
def score_all(model, rollout, config):
    """The log-probability of each token (R, T), without gradients."""
    parts = torch.arange(len(rollout.ids)).split(config.micro_batch)
    return torch.cat([score(model, rollout, rows, config)[0] for rows in parts])


def row_advantages(rewards, rollout, old_logp, ref_logp, config):
    """The advantage of each row (R, 1). With --kl k1 an answer's KL is taken off its reward."""
    kind = config.method.advantage
    adv = advantages(rewards.to(rollout.mask.device), kind)  # (P, G)
    if config.beta and config.kl == "k1":
        kl = kl_estimate(old_logp, ref_logp, "k1") * rollout.mask  # (R, T)
        # the KL's own baseline, never divided by std
        kind = "rloo" if kind == "rloo" else "mean"
        adv = adv - config.beta * advantages(kl.sum(1).view_as(adv), kind)
    return adv.reshape(-1, 1)


def token_losses(model, rollout, rows, adv, old_logp, ref_logp, config):
    """The bracket of the equation at the top, for each token -> (rows, T), and its metrics."""
    method = config.method
    logp, entropy = score(model, rollout, rows, config)
    # Where a batch has one gradient step, the old policy is the one that is trained: rho is 1
    old = logp.detach() if old_logp is None else old_logp[rows]
    loss, silenced = policy_loss(
        logp,
        old,
        adv[rows],
        rollout.mask[rows],
        method.ratio,
        method.eps_low,
        method.eps_high,
    )
    # An entropy bonus keeps the policy from deciding too early
    loss = loss - config.entropy_bonus * entropy
    metrics = dict(entropy=entropy, clip_fraction=silenced)
    # A KL to the base keeps it from drifting (k1 is in the advantage already)
    if config.beta:
        kl = kl_estimate(logp, ref_logp[rows], config.kl)
        metrics["kl"] = kl
        if config.kl != "k1":
            loss = loss + config.beta * kl
    return loss, metrics


def update(model, base, optimizer, rollout, rewards, config, budget, generator):
    """The gradient steps on a batch of answers -> metrics.

    rollout has R rows, rewards are theirs (P, G); budget: the tokens that an answer may take.
    """
    tokens = rollout.mask.sum()
    # 1. What stays as it is while the weights move
    several = config.minibatches > 1
    # (rollout.logp is nearly the same, but the sampler's rounding would be in the ratio)
    old_logp = score_all(model, rollout, config) if several or config.kl == "k1" else None
    ref_logp = score_all(base, rollout, config) if config.beta else None
    adv = row_advantages(rewards, rollout, old_logp, ref_logp, config)  # (R, 1)
    # 2. One gradient step for each part of the rows
    # Several steps: by chance, as each part should be like the whole. One step is a sum over all
    # rows, in any order: short answers beside short ones have less padding
    R = len(rollout.mask)
    order = torch.randperm(R, generator=generator) if several else rollout.lengths.argsort()
    total = Counter()
    a = torch.zeros_like(rollout.mask)  # of the equation at the top
    for minibatch in order.tensor_split(config.minibatches):
        mask = rollout.mask[minibatch]
        a[minibatch] = aggregation_weights(mask, config.method.aggregation, budget)
        optimizer.zero_grad()
        # 3. The gradient is summed over pieces that the memory can hold
        for rows in minibatch.split(config.micro_batch):
            losses, metrics = token_losses(model, rollout, rows, adv, old_logp, ref_logp, config)
            loss = (a[rows] * losses).sum()
            loss.backward()
            total["loss"] += loss.item() / config.minibatches  # logged: the mean of the steps
            for name, values in metrics.items():  # means over all tokens of the batch
                total[name] += ((values * rollout.mask[rows]).sum() / tokens).item()
        # cuts the gradient and steps -> its norm before; a loss that is no number ends the run
        total["grad_norm"] += descend(optimizer, total["loss"]) / config.minibatches
    return total


# --------------------------------------------------------------------------------------------------
# Training


def evaluate(model, task, config, ks=(1, 16)):
    """pass@k of max(ks) answers to each held-out problem; guessed carries if the task has them."""
    # The same problems and random numbers at each evaluation
    rng, generator = random.Random("held out"), torch.Generator().manual_seed(0)
    problems = [task.draw(rng, config.size, held_out=True) for _ in range(config.eval_prompts)]
    n = max(ks)
    meter = Meter()
    # as many answers at once as in training: more are slower on a CPU
    at_once = max(1, config.prompts * config.group // n)
    texts, correct = [], []
    for i in range(0, len(problems), at_once):
        _, written, rewards = sample(model, task, problems[i : i + at_once], n, config, generator)
        texts += written
        correct.append(rewards.sum(1))  # (at_once,)
    correct = torch.cat(correct)  # (eval_prompts,)
    row = meter.solved(correct.sum())
    row |= {f"pass@{k}": pass_at_k(n, correct, k).mean().item() for k in ks}
    if guessed_carries := getattr(task, "guessed_carries", None):
        rates = [rate for rate in map(guessed_carries, texts) if rate is not None]
        row["guessed_carries"] = sum(rates) / len(rates) if rates else None
    return row


def mean(x):
    """A number, or None of an empty tensor."""
    return x.mean().item() if len(x) else None


def train(config, task, run, seed, base, tokens=math.inf):
    """RL from the base, config.steps steps or until `tokens` are sampled -> the trained model.

    tokens: for experiments that compare losses at as many sampled tokens (experiments/variants.py).
    """
    # 1. A copy of the base, an optimizer, two random streams: problems, and everything else
    model = copy.deepcopy(base)
    optimizer = torch.optim.AdamW(
        model.parameters(), config.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    rng, generator = random.Random(seed + 1), torch.Generator().manual_seed(seed + 1)
    phase = f"{config.loss} {seed}"
    # arm: what is compared in a figure, here the loss's name
    where = dict(phase="rl", arm=config.loss, seed=seed)
    if phase not in run.state:
        run.log(**where, step=0, sampled_tokens=0, **evaluate(model, task, config))
    kept = dict(sampled=0)  # what a checkpoint holds beside the weights

    def enough():
        return kept["sampled"] >= tokens

    for step in run.loop(phase, config.steps, model, optimizer, rng, generator, kept, enough):
        # 2. Sample, judge, take the gradient steps
        rollout, rewards, row = collect(model, task, config, rng, generator)
        kept["sampled"] += row.pop("tokens")
        budget = task.budget(config.size)
        row |= update(model, base, optimizer, rollout, rewards, config, budget, generator)
        # 3. Log
        lengths, right = rollout.lengths.float().cpu(), rewards.flatten() > 0  # (R,) each
        row |= dict(
            length=mean(lengths),
            length_right=mean(lengths[right]),
            length_wrong=mean(lengths[~right]),
            sampled_tokens=kept["sampled"],
        )
        if enough() or step + 1 == config.steps or (step + 1) % config.eval_every == 0:
            row |= evaluate(model, task, config)
        run.log(**where, step=step + 1, **row)
        run.say(reward=row["reward"])
    return model


# --------------------------------------------------------------------------------------------------
# The figure and its claims


def figure(config, run):
    arms = "base", config.loss
    last = {(row["arm"], row["seed"]): row for row in run.rows if row["phase"] == "pass@k"}

    def final(key):
        """What was measured after training, of the base and of the trained model: (seeds,) each."""
        values = [[last[arm, seed][key] for seed in seeds_of(config)] for arm in arms]
        return np.array(values, float)  # nan where there is no such number

    base, trained = final("pass@1")
    told = f"held-out pass@1 {base.mean():.2f} → {trained.mean():.2f}"
    panels = [
        ("Right answers: reward in training, pass@1 held out", "fraction", "reward", "pass@1"),
        ("Gradient before it is cut", "norm", "grad_norm"),
        ("Entropy", "nats per token", "entropy"),
        ("Length of right and wrong answers", "tokens", "length_right", "length_wrong"),
        ("Groups all right or all wrong", "fraction", "zero_variance"),
    ]
    source, seeds = "design of the task", config.seeds
    means = f" ({base.mean():.2f}, {trained.mean():.2f})"
    text = "held-out pass@1 after RL minus before, worst seed"
    claims = [
        claim("gain", text, source, "-", (trained - base).min(), ">=", 0.5, seeds, means),
        claim(
            "trained", "pass@1 after RL, worst seed", source, "-", trained.min(), ">=", 0.9, seeds
        ),
    ]
    if "guessed_carries" in run.rows[-1]:
        base, trained = final("guessed_carries")
        told = f"guessed carries {base.mean():.2f} → {trained.mean():.2f}, {told}"
        panels[1] = ("Lines whose carry was a guess, held out", "fraction", "guessed_carries")
        text, means = "carries guessed after RL, worst seed (base)", f" ({base.mean():.2f})"
        claims.append(claim("order", text, source, "-", trained.max(), "<=", 0.05, seeds, means))

    fig, axes = plt.subplots(2, 3, figsize=(13, 7), layout="constrained")
    fig.suptitle(f"Told only right or wrong: {told} ({seeds} seed{'s' * (seeds > 1)})")
    for i, (title, unit, *keys) in enumerate(panels):
        ax = axes.flat[i]
        for key in keys:
            band(ax, *series(run, key, phase="rl", arm=config.loss), key)
        ax.set(title=title, xlabel="RL step", ylabel=unit)
        if ax.lines:
            ax.legend()
    ax = axes[1, 2]
    curves = np.array([final(f"pass@{k}") for k in config.ks])  # (ks, arms, seeds)
    for i, name in enumerate(("base", f"after RL ({config.loss})")):
        band(ax, config.ks, curves[:, i].T, name, marker="o")
    base, trained = curves[-1].mean(1)
    title = f"pass@{config.ks[-1]}: base {base:.2f}, after RL {trained:.2f}"
    if base == trained == 1:
        title += "\n(both at 1: a crossing can't be seen)"
    ax.set(title=title, xlabel="k (samples)", ylabel="held-out pass@k", ylim=(0, 1.02))
    ax.set_xscale("log", base=2)
    ax.legend()
    return fig, claims


def main():
    config = parse_args(Config, __doc__)
    device = pick_device(config.device)
    task = tasks.load(config.task)
    untrained = build(config, task, device)  # an impossible shape ends here, before a run begins
    problems = [task.draw(random.Random(i), config.size, held_out=True) for i in range(3)]
    with Run(config) as run:
        run.introduce(device, untrained.config.parameters)
        for seed in seeds_of(config):
            base = warm_up(config, task, run, seed, device)
            trained = train(config, task, run, seed, base)
            examples = {}
            for arm, model in (("base", base), (config.loss, trained)):
                run.log_once(
                    lambda model=model: evaluate(model, task, config, config.ks),
                    phase="pass@k",
                    arm=arm,
                    seed=seed,
                    step=config.steps,
                )
                _, texts, rewards = sample(
                    model, task, problems, 1, config, torch.Generator().manual_seed(0)
                )
                examples[arm] = list(zip(texts, rewards.flatten().tolist(), strict=True))
        # of the last seed
        run.samples([task.prompt(problem) for problem in problems], **examples)
        run.finish(*figure(config, run))


if __name__ == "__main__":
    command(main)
