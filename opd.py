"""opd.py: on-policy distillation and its family. A student learns from an expert.

    python opd.py                        six methods, one base model, 2 seeds: 4 minutes, two cores
    python opd.py --arms opd,opd_jsd     any rows of METHODS

The task is a map that only the weights know (tasks/walks.py): a prompt names two places, an answer
is a walk from one to the other. The base model, where every student starts, finds a far place once
in ten times; the expert is a larger model that knows the map.

Distillation minimises a divergence between student p and teacher q at each prefix of an answer y:

    loss = sum_t m_t D(p, q)_t / sum_t m_t          m_t = 1 on the answer's tokens

y is data, whoever wrote it: no gradient goes through the draw. GRPO has no q: its D is the token's
-log p, times the advantage of its answer.

A method is a row of METHODS, three choices:

    1. rollout     who writes the answers: the student (on-policy), the teacher (off-policy), a
                   blend of both within a trust region (TRB), a draft by the student that the
                   teacher corrects (SKD)
    2. teacher     whose q: the expert's; or none: GRPO is told only right or wrong
    3. divergence  D: token -log p(y); forward KL(q|p); reverse KL(p|q); jsd;
                   sampled sg[log p(y)/q(y)] log p(y); three estimates from the student's top 4

How this differs from the papers:
1. Their models have billions of parameters and answers of thousands of tokens. Here an answer has
   at most 18, so TRB's budget is 0.1 nats a token (0.001 to 0.05 there), and SKD's teacher accepts
   its top 4 of 99 tokens (25 of 256,000).
2. SKD's teacher corrects with a sample of its top tokens, not of all.
3. GRPO takes one step per batch (no ratio, no clip), and the mean over all tokens.
4. One map: "held out" means pairs of places that the method never asks for, in neither direction.
   The base met them with hints only; the expert learns the shortest paths of all pairs: a teacher
   knows the answers.
5. Seeds vary prompts and samples. The base models are the same for all seeds, and evaluations draw
   the same random numbers for all arms.

What to see: OPD at the expert's level with a fraction of GRPO's sampled tokens; SFT fast, then
lower. Watch pass@1: what a loss can fall to depends on its D (a divergence's is 0, that of `token`
the entropy of the answers).

More: python -m experiments.cold (a base without any success), experiments.few (24 prompts),
experiments.estimators (why a raw top-k KL fails). selfteach.py is the same without an expert.
"""

import copy
import math
import random
from dataclasses import dataclass
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import torch

from engine import KVCache, generate, inverse_cdf
from experiment import (
    Flags,
    NotFinite,
    Run,
    UserError,
    claim,
    command,
    descend,
    flag,
    parse_args,
    pick_device,
    seeds_of,
    series,
)
from tasks.walkers import (
    advantages,
    alive,
    answer_logprobs,
    at,
    curves,
    end,
    evaluate,
    first_at,
    from_scratch,
    model_files,
    over,
    shape,
    show,
)
from tasks.walks import ANSWER, EOS, PROMPT, VOCAB, far_task, prompt

# fmt: off
#  name:        rollout, teacher, divergence (top4: the k that --top has by default). A new rollout
#  goes into `collect`, a new divergence into `divergence`
METHODS = {
    "sft": ("teacher", "expert", "token"),
    "kd": ("teacher", "expert", "forward"),
    "grpo": ("student", None, "token"),                     # Shao et al., arXiv 2402.03300
    "opd": ("student", "expert", "reverse"),                # arXiv 2306.13649; Lu 2025
    "trb": ("blend", "expert", "reverse"),                  # Plyusov et al., arXiv 2605.31159
    "skd": ("draft", "expert", "reverse"),                  # Xu et al., arXiv 2410.11325
    "opd_forward": ("student", "expert", "forward"),
    "opd_jsd": ("student", "expert", "jsd"),
    "opd_sampled": ("student", "expert", "sampled"),
    "opd_top4": ("student", "expert", "top_raw"),           # biased: arXiv 2605.11182
    "opd_top4_renormalised": ("student", "expert", "top_renormalised"),
    "opd_top4_stopgrad": ("student", "expert", "top_stopgrad"),         # arXiv 2604.13016
}
# fmt: on


@dataclass
class Config(Flags):
    seeds: int = flag(2, "repeat over this many seeds", quick=1, low=1, high=1000)
    arms: str = flag("sft,kd,grpo,opd,trb,skd", "which rows of METHODS, separated by commas")
    steps: int = flag(150, "steps of a method", quick=2, low=1)
    batch: int = flag(64, "answers per step", quick=8, low=8, high=4096)
    group: int = flag(8, "answers per prompt where there is no teacher (grpo)", quick=4, low=2)
    lr: float = flag(1e-3, "learning rate: 5 steps of warm-up, then constant", low=0, high=1)
    top: int = flag(4, "k of the student's top-k estimators", low=1, high=VOCAB)
    skd_top: int = flag(4, "SKD: k of the teacher's tokens that pass", low=1, high=VOCAB)
    trb_eps: float = flag(0.1, "TRB: KL budget of a token (nats), falling to 0", low=0)
    trb_steps: int = flag(50, "TRB: steps until the budget is 0", quick=1, low=1)
    n_embd: int = flag(64, "channels of the student", quick=32, low=8, high=1024)
    expert_embd: int = flag(96, "channels of the expert", quick=32, low=8, high=1024)
    sft_steps: int = flag(
        1800, "steps of training the base model, before any method", quick=10, low=1
    )
    expert_steps: int = flag(1000, "steps of training the expert", quick=10, low=1)
    eval_every: int = flag(10, "steps between evaluations", low=1)
    eval_prompts: int = flag(256, "held-out pairs of places", quick=16, low=1, high=256)

    def __post_init__(self):
        unknown = sorted(set(self.methods) - set(METHODS))
        if unknown:
            names = ", ".join(METHODS)
            raise UserError(f"--arms: no such method: {', '.join(unknown)}; there are {names}")
        if len(set(self.methods)) < len(self.methods):
            raise UserError(f"--arms {self.arms}: a method stands there twice")
        untaught = any(METHODS[name][1] is None for name in self.methods)
        if untaught and self.group > 0 and self.batch % self.group:  # ranges are checked later
            raise UserError(f"--batch {self.batch} is no multiple of --group {self.group}")
        for width in (self.n_embd, self.expert_embd):
            shape(width)  # an error if there is no such model

    @property
    def methods(self):
        return self.arms.split(",")

    def idle(self):
        """The flags that do nothing beside the others -> {field: why}."""
        useful_to = {
            "group": [name for name, row in METHODS.items() if row[1] is None],
            "trb_eps": ["trb"],
            "trb_steps": ["trb"],
            "skd_top": ["skd"],
            "top": [name for name, row in METHODS.items() if row[2].startswith("top")],
        }
        idle = {
            name: f"none of {', '.join(arms)} is trained"
            for name, arms in useful_to.items()
            if not set(arms) & set(self.methods)
        }
        if type(self) is not Config:
            idle["arms"] = f"{self.name} has its own"
        return idle


# ------------------------------------------------------------------------------------------------
# The loss


def divergence(lp, lq, y, kind, top=4):
    """D at each position (B, T), from the log-probabilities of student lp and teacher lq (B, T, V)
    and the tokens y (B, T) that stand there.

    Where p = q the gradient of every kind is 0 (of `token`: its mean over y ~ p), but for
    top_raw's.
    """
    if kind == "token":
        return -lp.gather(2, y[..., None]).squeeze(2)
    if kind == "forward":
        # The student must cover all that the teacher might say
        return (lq.exp() * (lq - lp)).sum(-1)
    if kind == "reverse":
        # The student must say nothing that the teacher would not
        return (lp.exp() * (lp - lq)).sum(-1)
    if kind == "jsd":
        # Both are compared with their even mixture: beta = 1/2 of arXiv 2306.13649
        lm = torch.logaddexp(lp, lq) - math.log(2)
        return (lq.exp() * (lq - lm)).sum(-1) / 2 + (lp.exp() * (lp - lm)).sum(-1) / 2
    if kind == "sampled":
        # A policy gradient with the advantage log q(y) - log p(y): its mean over y ~ p is the
        # gradient of the reverse KL
        logp = lp.gather(2, y[..., None]).squeeze(2)
        logq = lq.gather(2, y[..., None]).squeeze(2)
        return (logp - logq).detach() * logp
    # Only the student's `top` likeliest tokens are looked at
    lp, index = lp.topk(top)  # (B, T, top)
    lq = lq.gather(2, index)
    if kind == "top_raw":
        # Its gradient is the sum of p (log p/q + 1) grad log p. Over the whole vocabulary the 1
        # would
        # add nothing; over the top it lets mass leave until p = q / e there. It spreads too thinly
        # to join the top,
        # whose likeliest token stays a good one: greedy decoding does not notice
        return divergence(lp, lq, y, "reverse")
    if kind == "top_renormalised":
        # Both are made distributions over these tokens
        return divergence(lp.log_softmax(-1), lq.log_softmax(-1), y, "reverse")
    # top_stopgrad: as `sampled`, with all top tokens in the place of one draw, each as likely as
    # the student makes it among them
    return ((lp.softmax(-1) * (lp - lq)).detach() * lp).sum(-1)


def loss_of(method, lp, lq, y, mask, rewards, config):
    """The whole family: sum m D / sum m, D times the advantage where there is no teacher.

    lp, lq (B, T, V), lq None without a teacher; y, mask (B, T); rewards (B,), prompt by prompt.
    """
    _, teacher, kind = METHODS[method]
    d = divergence(lp, lq, y, kind, config.top)
    if teacher is None:
        # GRPO: tokens of answers better than their siblings become likelier, of worse ones rarer
        d = d * advantages(rewards.view(-1, config.group)).view(-1, 1)
    return (d * mask).sum() / mask.sum()


# ------------------------------------------------------------------------------------------------
# Who writes the answers


def trust_region(lp, lq, eps, iterations=18):
    """TRB's mixture: p^(1-b) q^b / Z with the largest b in [0, 1] whose KL to p is at most eps ->
    its log-probabilities (B, V), b (B,).

    lp, lq (B, V). The KL grows with b (its slope is b times the variance of log q - log p):
    bisection.
    """

    def mixed(b):
        return ((1 - b)[:, None] * lp + b[:, None] * lq).log_softmax(-1)

    def within(b):
        return (mixed(b).exp() * (mixed(b) - lp)).sum(-1) <= eps

    low = torch.zeros(len(lp), device=lp.device)
    high = torch.ones(len(lp), device=lp.device)
    low = torch.where(within(high), high, low)  # the teacher itself may be near enough
    for _ in range(iterations):
        middle = (low + high) / 2
        inside = within(middle)
        low = torch.where(inside, middle, low)
        high = torch.where(inside, high, middle)
    return mixed(low), low


def blended(eps):
    """TRB's choice for write_together: a token of the mixture, and its b."""

    def choose(lp, lq, u):
        mixture, b = trust_region(lp, lq, eps)
        return inverse_cdf(mixture.exp(), u[:, 0])[0], b  # [0]: the token that u falls on

    return choose


def draft(lp, lq, u, top):
    """SKD with drafts of one token: the student's, or where that is not among the teacher's `top`
    tokens, a sample of those -> tokens, replaced (B,).

    u (B, 2): a uniform number for each of the two draws. top = V is the student alone, top = 1 the
    teacher's argmax.
    """
    y = inverse_cdf(lp.exp(), u[:, 0])[0]  # (B,)
    values, index = lq.topk(top)  # (B, top)
    replaced = (index != y[:, None]).all(1)  # (B,): the draft is not among them
    choice = inverse_cdf(values.softmax(-1), u[:, 1])[0]
    correction = index.gather(1, choice[:, None]).squeeze(1)  # (B,)
    return torch.where(replaced, correction, y), replaced.float()


@torch.no_grad()
def write_together(student, teacher, prompts, choose, generator, limit=ANSWER):
    """Answers that student and teacher decode side by side -> tokens (B, T), mask (B, T), how much
    was changed (mean over tokens).

    choose(lp, lq, u) -> the next tokens (B,) and how far they were taken from the student (B,),
    given log-probabilities (B, V) and uniforms (B, 2).
    """
    device = student.lm_head.weight.device
    models = (student, teacher)
    caches = [KVCache(m.config, len(prompts), PROMPT + limit, device) for m in models]
    unread = torch.tensor(prompts, device=device)  # (B, PROMPT), then (B, 1)
    unfinished = torch.ones(len(prompts), dtype=torch.bool, device=device)
    tokens, mask, changed = [], [], []
    while len(tokens) < limit and unfinished.any():
        # What each of the two would write next, (B, V)
        hidden = (m.hidden(unread, cache)[:, -1] for m, cache in zip(models, caches, strict=True))
        lp, lq = (m.lm_head(h).log_softmax(-1) for m, h in zip(models, hidden, strict=True))
        if not (lp.isfinite().all() and lq.isfinite().all()):
            raise NotFinite("a log-probability of the next token is no number")
        u = torch.rand(len(prompts), 2, generator=generator).to(device)
        token, change = choose(lp, lq, u)
        tokens.append(token)
        mask.append(unfinished.float())
        changed.append(change)
        unfinished = unfinished & (token != EOS)  # a finished row is decoded on, and masked
        unread = token[:, None]
    tokens = torch.stack(tokens, 1)  # (B, T)
    mask = torch.stack(mask, 1)
    changed = torch.stack(changed, 1)
    return tokens, mask, ((changed * mask).sum() / mask.sum()).item()


def collect(author, student, teacher, prompts, eps, config, generator):
    """One answer to each prompt -> tokens (B, T), mask (B, T), how much the teacher changed."""
    if author == "draft":
        choose = partial(draft, top=config.skd_top)
        return write_together(student, teacher, prompts, choose, generator)
    if author == "blend" and eps > 0:  # a budget of 0 is the student alone
        return write_together(student, teacher, prompts, blended(eps), generator)
    writer = teacher if author == "teacher" else student
    rollout = generate(writer, prompts, n=1, max_new_tokens=ANSWER, stop=EOS, generator=generator)
    return rollout.ids[:, PROMPT:], rollout.mask[:, PROMPT:], float(author == "teacher")


# ------------------------------------------------------------------------------------------------
# Training


def train(config, run, arm, seed, base, expert, task, measure=evaluate):
    """A row of METHODS from the base for config.steps steps -> the trained model. measure: what is
    logged of it."""
    # 1. A copy of the base, two random streams: pairs, and everything else
    author, teacher, _ = METHODS[arm]  # teacher: "expert" or None
    phase = f"{arm} {seed}"
    model = copy.deepcopy(base)
    device = base.lm_head.weight.device
    optimizer = torch.optim.AdamW(
        model.parameters(), config.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True
    )
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    group = 1 if teacher else config.group
    eval_seed = 10_000 + 1000 * seed  # the same random numbers for every arm
    kept = dict(sampled=0)  # what a checkpoint holds beside the weights
    if phase not in run.state:  # not when it goes on after an interrupt
        row = measure(model, task, config, eval_seed)
        run.log(phase="train", arm=arm, seed=seed, step=0, sampled_tokens=0, **row)
    for step in run.loop(phase, config.steps, model, optimizer, rng, generator, kept):
        for parameters in optimizer.param_groups:
            parameters["lr"] = config.lr * min(1, (step + 1) / 5)
        # 2. Pairs, answers, rewards
        asked = rng.choices(task.train, k=config.batch // group)
        pairs = [pair for pair in asked for _ in range(group)]
        prompts = [prompt(pair) for pair in pairs]
        eps = config.trb_eps * max(0, 1 - step / config.trb_steps)
        y, mask, changed = collect(author, model, expert, prompts, eps, config, generator)
        lengths = mask.sum(1).int().tolist()
        answers = [row[:n] for row, n in zip(y.tolist(), lengths, strict=True)]
        rewards = torch.tensor(
            [task.reward(*a) for a in zip(pairs, answers, strict=True)], device=device
        )
        # 3. The loss on the answers' tokens, a step
        ids = torch.cat((torch.tensor(prompts, device=device), y), 1)  # (B, PROMPT + T)
        lq = None
        if teacher:  # the expert: there is no other
            with torch.no_grad():
                lq = answer_logprobs(expert, ids)  # (B, T, V): at t what it says in place of y_t
        loss = loss_of(arm, answer_logprobs(model, ids), lq, y, mask, rewards, config)
        optimizer.zero_grad()
        loss.backward()
        norm = descend(optimizer, loss)  # cuts the gradient and steps -> its norm before
        kept["sampled"] += int(mask.sum())
        # 4. Log
        if (step + 1) % config.eval_every == 0 or step + 1 == config.steps:
            row = measure(model, task, config, eval_seed + step + 1)
            row |= dict(loss=loss.item(), grad_norm=norm, reward=rewards.mean().item())
            row |= dict(changed=changed, sampled_tokens=kept["sampled"])
            run.log(phase="train", arm=arm, seed=seed, step=step + 1, **row)
            run.say(**{"pass@1": row["pass@1"]})
    return model


def train_arms(config, run, base, expert, task, measure=evaluate):
    """All arms of all seeds -> {arm: the model of the last seed}."""
    trained = {}
    for seed in seeds_of(config):
        for arm in config.methods:
            trained[arm] = train(config, run, arm, seed, base, expert, task, measure)
    return trained


# ------------------------------------------------------------------------------------------------
# The figure


def figure(config, run):
    level = next(r["pass@1"] for r in run.rows if r["phase"] == "expert")
    fig, ax = plt.subplots(figsize=(8, 5), layout="constrained")
    curves(ax, run, config.methods, "pass@1", "", "held-out pass@1")
    ax.axhline(level, color="k", ls=":", lw=1, label="expert")
    ax.legend()
    if config.arms != Config.arms:  # the title and the claims are about the default arms
        return fig, []
    n = config.seeds
    opd = end(run, "opd")
    sft = end(run, "sft")
    grpo = end(run, "grpo")
    ax.set_title(
        f"In the last third of training: an expert's word on each of the student's tokens (opd) "
        f"{opd.mean():.2f},\nits answers alone (sft) {sft.mean():.2f}, "
        f"right or wrong alone (grpo) {grpo.mean():.2f} ({n} seeds)",
        fontsize="medium",
    )
    # Sampled tokens to .85, of each seed (inf: never). Such a seed of GRPO needs at least all that
    # it sampled
    opd_tokens = first_at(run, "opd", 0.85)
    grpo_tokens = first_at(run, "grpo", 0.85)
    spent = series(run, "sampled_tokens", phase="train", arm="grpo")[1][:, -1]
    ratio = over(np.minimum(grpo_tokens, spent), opd_tokens)
    never = " (at least: not all seeds get there)" * bool(np.isinf(grpo_tokens).any())
    behind = alive(run, "opd", level - opd)
    beside = f" ({at(run, 'opd', 0).mean():.2f}; {grpo.mean():.2f})"
    qwen = "Qwen3, arXiv 2505.09388, table 21"
    lu = "Lu and Thinking Machines 2025"
    gkd = "Agarwal et al., arXiv 2306.13649"
    # fmt: off
    return fig, [
        claim("opd", "OPD, pass@1 at the end (the base that OPD and GRPO start from; GRPO)",
              qwen, "0.744 (0.550; 0.676)",
              opd, ">=", 0.94, n, beside),
        claim("opd grpo", "OPD minus GRPO at the end",
              qwen, "0.068",
              opd - grpo, ">=", 0.02, n),
        claim("opd expert", "expert minus OPD",
              lu, "-",
              behind, "<=", 0.04, n, f" ({level:.3f})"),
        claim("sft", "SFT on the expert's answers, pass@1 at the end",
              "design of the task", "-",
              sft, ">=", 0.88, n),
        claim("sft plateau", "OPD minus SFT at the end",
              gkd, "on-policy is better",
              opd - sft, ">=", 0.005, n),
        claim("grpo tokens", f"sampled tokens to .85, GRPO over OPD{never}",
              qwen, "10x (GPU hours)",
              ratio, ">=", 2.5, n),
    ]
    # fmt: on


def main():
    config = parse_args(Config, __doc__)
    device = pick_device(config.device)
    task = far_task()
    with Run(config, also=model_files(config, "base", "expert")) as run:
        run.introduce(device, shape(config.n_embd).parameters)
        base = from_scratch(config, run, "base", device)
        expert = from_scratch(config, run, "expert", device)
        run.log_once(lambda: evaluate(expert, task, config, 0), phase="expert", step=0)
        trained = train_arms(config, run, base, expert, task)
        show(run, task, base=base, expert=expert, **trained)
        run.finish(*figure(config, run))


if __name__ == "__main__":
    command(main)
