"""scale.py: the lessons' losses on real checkpoints, real data and several processes.

What grpo.py and opd.py teach is what runs here: their advantages, surrogates, aggregations and
divergences are imported. This file adds what size asks for, and nothing to the methods.

    python scale.py --data addition --lr 3e-4       a toy, which reinforce.py's imitation warms up
    python scale.py --init Qwen/Qwen2.5-0.5B-Instruct --chat --data gsm8k --dtype bfloat16
    python scale.py --method opd --init Qwen/Qwen2.5-0.5B-Instruct \\
        --teacher Qwen/Qwen2.5-1.5B-Instruct --chat --data gsm8k --dtype bfloat16
    torchrun --nproc-per-node 8 scale.py --init Qwen/Qwen2.5-7B-Instruct --shard --checkpointing ...

--method is a row of grpo.LOSSES (reinforcement learning, --data with answers), or one of those rows
of opd.METHODS that ask for a teacher and for nothing else (distillation, answers not needed).

Several processes, one on each GPU (nccl) or all on the CPU (gloo). Each draws problems of its own,
samples its own answers and judges them; nothing of that is exchanged. A loss is divided by the rows
or tokens of the whole batch, and the gradients are summed: that is one big batch, however unevenly
it is dealt out. Evaluations deal out the held-out problems, and add up what they find.

What a process holds, in bytes a parameter:
    weights, gradient, AdamW's two moments in fp32     16, with --shard 16 / processes
    the copy that samples, during a rollout only        2 with --dtype bfloat16; 4 with --shard;
                                                        else none, the model samples itself
    --beta's base, or the teacher                       4 or 2, with --shard divided likewise
and a copy of the checkpoint in the machine's memory (4). Activations grow with --micro-batch;
--checkpointing keeps one input per layer instead. No logits are held: a chunk of tokens at a time.

How this differs from the lessons:
1. The random stream of a step is made from seed, step and rank: a resumed run needs no other state.
2. Distillation, too, has AdamW's betas of grpo.py, no warm-up, and --group answers to a problem.
3. With --dtype bfloat16 the sampler is a rounded copy of the policy; --correction weighs each token
   by policy over sampler, truncated (Yao et al. 2025; IcePop drops instead).
4. Dynamic sampling (dapo) fills each process's share by itself.
5. The teacher reads what the student reads, the student's chat template and end of text included.
   Ids that only pad the teacher's embedding are cut off.

What to see: pass@1 of held-out problems (and the KL to the teacher) by steps, samples before and
after, and a folder `METHOD SEED` with the trained model, which transformers opens.
"""

import copy
import random
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import tasks
from engine import Rollout, generate
from experiment import (
    Flags,
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
from grpo import LOSSES, advantages, aggregation_weights, kl_estimate, policy_loss
from kernels import token_logprobs
from opd import METHODS, divergence
from parallel import (
    Team,
    all_sum,
    handles,
    join,
    place,
    plain,
    sum_gradients,
    together,
    world,
)
from reinforce import imitate
from tasks.wordproblems import fingerprint, load_model, load_teacher, word_problems

# what takes two checkpoints and nothing else: name -> who writes, which divergence
DISTILLATION = {
    name: (writer, kind)
    for name, (writer, teacher, kind) in METHODS.items()
    if teacher == "expert" and writer in ("student", "teacher")
}
TEMPLATE = "{question}\\nThink step by step. End with the answer as: #### number"
LOGITS = 2**26  # (tokens, V) log-probabilities at once: 256 MiB, a few times over


@dataclass
class Config(Flags):
    method: str = flag(
        "dr_grpo", "a row of grpo.LOSSES or opd.METHODS", choices=(*LOSSES, *DISTILLATION)
    )
    init: str = flag("", "the model to train: a Hugging Face folder or hub id")
    teacher: str = flag("", "for distillation: a folder or hub id with the same vocabulary")
    data: str = flag(
        "",
        "gsm8k, or a .jsonl or .parquet file with the columns question and answer, the answer with "
        "'#### number' (distillation does without); of a file a tenth is held out. Without --init: "
        "addition, or another toy task",
    )
    template: str = flag(TEMPLATE, "the prompt of a word problem; \\n is a new line")
    chat: bool = flag(False, "put the prompt into the checkpoint's own chat template")
    dtype: str = flag(
        "float32",
        "bfloat16: autocast training, sampling from a bfloat16 copy, a bfloat16 teacher",
        choices=("float32", "bfloat16"),
    )
    shard: bool = flag(False, "deal out weights, gradients and moments to the processes (FSDP2)")
    checkpointing: bool = flag(False, "compute activations twice: less memory, a third more time")
    steps: int = flag(100, "training steps", quick=2, low=0)
    prompts: int = flag(32, "problems per step, of all processes", quick=4, low=1, high=9999)
    group: int = flag(8, "answers to each of them", quick=4, low=1)
    minibatches: int = flag(1, "gradient steps per batch", low=1)
    micro_batch: int = flag(16, "rows per forward pass: memory, not results", low=1)
    max_new_tokens: int = flag(256, "budget of an answer", quick=8, low=1)
    lr: float = flag(1e-5, "learning rate (AdamW, constant)", low=0)
    correction: str = flag(
        "none",
        "policy over sampler: tis (per token), seq_tis (per answer), mis (drop)",
        choices=("none", "tis", "seq_tis", "mis"),
    )
    beta: float = flag(0.0, "coefficient of the KL to the base model (k3)", low=0)
    eval_every: int = flag(10, "steps between evaluations", quick=1, low=1)
    eval_prompts: int = flag(256, "held-out problems, an answer to each", quick=8, low=1)

    def __post_init__(self):
        needed = self.data and (self.init and self.teacher if self.distils else not self.teacher)
        if not needed:
            raise UserError(
                "reinforcement learning needs --data, and --init if that is no toy; distillation "
                f"(--method {', '.join(DISTILLATION)}) --data, --init and --teacher"
            )
        out = Path(self.out or f"out/{self.name}").resolve()
        for name in (self.init, self.teacher):
            if name and Path(name).resolve().parent == out:
                raise UserError(f"{name} lies in --out: a run writes its models there")
        if not self.distils and self.group < max(2, self.minibatches):
            raise UserError(f"--group {self.group}: at least 2, and at least --minibatches")

    @property
    def distils(self):
        return self.method in DISTILLATION

    def idle(self):
        """The flags that do nothing beside the others -> {field: why}."""
        cases = [
            (self.distils, "minibatches correction beta", "it is for reinforcement learning"),
            (not self.init, "template chat", "it is for a checkpoint's word problems"),
            (self.dtype == "float32", "correction", "the sampler is the policy that is trained"),
        ]
        return {name: why for here, names, why in cases if here for name in names.split()}


# --------------------------------------------------------------------------------------------------
# Models and their answers


def sample(model, task, problems, n, config, generator):
    """n answers of a plain model to each problem -> their rollout, texts and rewards (P, n)."""
    prompts = [task.prompt(p) for p in problems]
    stop = task.tokenizer.stop
    rollout = generate(model, prompts, n, config.max_new_tokens, stop=stop, generator=generator)
    texts = rollout.texts(task.tokenizer)
    ended = rollout.ended(stop).tolist()
    rewards = [task.judge(problems[i // n], text, ended[i]) for i, text in enumerate(texts)]
    return rollout, texts, torch.tensor(rewards).float().view(-1, n)


def even(rollouts, device):
    """Rollouts joined. Rows without an answer fill up what this process has fewer than another: a
    sharded model needs all of them in each of its passes. Of mask 0, they count for nothing."""
    rank, processes = world()
    rows = torch.zeros(processes)
    rows[rank] = sum(len(r.ids) for r in rollouts)
    missing = int(all_sum(rows).max() - rows[rank])
    zeros = torch.zeros(missing, 2, device=device)
    filler = Rollout(zeros.long(), zeros, zeros, zeros[:, 0].long() + 2)
    return Rollout.cat([*rollouts, filler])


# --------------------------------------------------------------------------------------------------
# A step


def take_step(model, optimizer, losses):
    """A step down the sum of the losses of all micro-batches of all processes -> that sum, and the
    norm of its gradient. losses: a generator, so that one micro-batch is held at a time."""
    optimizer.zero_grad()
    total = 0.0
    for loss in losses:
        loss.backward()
        total += loss.item()
    sum_gradients(model)
    total = all_sum(torch.tensor(total, dtype=torch.float64)).item()
    return total, descend(optimizer, total)


def collect(model, task, config, rng, generator):
    """This process's share of a batch -> its rollout, its rewards (P, G), statistics of all shares.

    Dynamic sampling (DAPO) goes on until all groups have both right and wrong answers, at most four
    times; P may then be less. If there is no such group at all, the last batch is taken as it is.
    """
    dynamic = not config.distils and LOSSES[config.method].dynamic
    G = config.group
    rank, processes = world()
    P = len(range(rank, config.prompts, processes))
    sampler = plain(model, config.dtype)
    kept, rewards = [], []
    sums = torch.zeros(5, dtype=torch.float64)
    while sums[0] == 0 or (dynamic and len(kept) < P and sums[0] < 4 * P):
        problems = [task.draw(rng) for _ in range(P)]
        rollout, _, r = sample(sampler, task, problems, G, config, generator)
        mixed = (r != r[:, :1]).any(1)
        logp = rollout.logp.sum()
        sums += torch.tensor([P, rollout.mask.sum(), logp, r.mean(1).sum(), P - mixed.sum()])
        for i in range(P):
            if (mixed[i] or not dynamic) and len(kept) < P:
                kept.append(rollout[slice(i * G, (i + 1) * G)])
                rewards.append(r[i])
    if not kept:
        kept = [rollout]
        rewards = list(r)
    seen, tokens, logp, right, dull = all_sum(sums).tolist()
    stats = dict(tokens=int(tokens), entropy=-logp / tokens)
    if task.judged:
        stats |= dict(reward=right / seen, zero_variance=dull / seen)
    return even(kept, rollout.ids.device), torch.stack(rewards), stats


def correction_weights(old_logp, sampler_logp, mask, kind, cap=2.0):
    """w (R, T), detached: the policy before the step over the policy that sampled.

    tis: per token, at most cap; seq_tis: per answer; mis: 0 outside (1/cap, cap).
    """
    log_w = ((old_logp - sampler_logp) * mask).detach()
    if kind == "none":
        return torch.ones_like(mask)
    if kind == "seq_tis":
        return log_w.sum(1, keepdim=True).exp().clamp_max(cap).expand_as(mask)
    w = log_w.exp()
    if kind == "tis":
        return w.clamp_max(cap)
    return w * ((w < cap) & (w > 1 / cap))


def score(model, rollout, rows, config):
    """Log-probability (R, T) of each token of some rows, in micro-batches."""
    T = rollout.ids.shape[1]
    parts = []
    for part in rows.split(config.micro_batch):
        ids = rollout[part].ids  # short rows are cut to the longest of them
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
            h = model.hidden(ids[:, :-1])  # (R, T - 1, C)
            logp, _ = token_logprobs(h, model.lm_head.weight, ids[:, 1:])
        parts.append(F.pad(logp, (1, T - ids.shape[1])))
    return torch.cat(parts)


def batch_weights(mask, kind, budget):
    """grpo.aggregation_weights of this process's rows, divided by the rows or the tokens of all."""
    own = mask.sum().clamp_min(1) if kind == "token" else len(mask)
    real = mask.sum() if kind == "token" else (mask.sum(1) > 0).sum()  # a row of mask 0 is none
    return aggregation_weights(mask, kind, budget) * (own / all_sum(real).clamp_min(1))


def update(model, base, optimizer, rollout, rewards, config, generator):
    """The gradient steps of one batch -> metrics. rewards (P, G); base: None without --beta."""
    method = LOSSES[config.method]
    mask = rollout.mask
    R = len(mask)
    rows = torch.arange(R)
    order = rollout.lengths.argsort()  # short answers beside short ones: less padding
    with torch.no_grad():
        if config.minibatches > 1:
            old_logp = score(model, rollout, rows, config)
            order = torch.randperm(R, generator=generator)
        if config.beta:
            ref_logp = score(base, rollout, rows, config)
    rewards = rewards.to(mask.device)
    adv = advantages(rewards, method.advantage)
    if method.advantage == "batch":  # the mean of all processes' rewards
        adv = rewards - all_sum(rewards.sum()) / all_sum(torch.tensor(rewards.numel()))
    adv = F.pad(adv.flatten(), (0, R - adv.numel()))[:, None]  # (R, 1)

    def losses(minibatch):
        weights = batch_weights(mask[minibatch], method.aggregation, config.max_new_tokens)
        for rows, a in zip(
            minibatch.split(config.micro_batch), weights.split(config.micro_batch), strict=True
        ):
            m = mask[rows]
            logp = score(model, rollout, rows, config)
            # in a batch's only gradient step the policy is still the old one
            old = old_logp[rows] if config.minibatches > 1 else logp.detach()
            loss, _ = policy_loss(
                logp,
                old,
                adv[rows],
                m,
                method.ratio,
                method.eps_low,
                method.eps_high,
            )
            loss = loss * correction_weights(old, rollout.logp[rows], m, config.correction)
            if config.beta:
                loss = loss + config.beta * kl_estimate(logp, ref_logp[rows], "k3")
            yield (a * loss).sum()

    parts = order.tensor_split(config.minibatches)
    steps = [take_step(model, optimizer, losses(part)) for part in parts]
    loss, norm = (sum(x) / len(parts) for x in zip(*steps, strict=True))
    return dict(loss=loss, grad_norm=norm)


def divergences(model, teacher, rollout, kind, config):
    """The sum of D over the answer tokens of each micro-batch, with gradients to the student.

    Whole distributions are made of as many tokens at once as LOGITS allows, and a second time in
    the backward pass.
    """

    def logprobs(m, h):
        return m.lm_head(h).float().log_softmax(-1)[None]  # (1, n, V)

    def part_of(h, g, y):
        lp, lq = logprobs(model, h), logprobs(teacher, g)
        return divergence(lp, lq, y[None], kind).sum()

    size = max(1, LOGITS // model.config.vocab_size)
    for rows in torch.arange(len(rollout.ids)).split(config.micro_batch):
        part = rollout[rows]
        own = part.mask[:, 1:] > 0
        x, y = part.ids[:, :-1], part.ids[:, 1:][own]  # (B, T - 1), (N,)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
            h = model.hidden(x)[own]  # (N, C)
            with torch.no_grad():
                g = teacher.hidden(x)[own]  # (N, the teacher's C)
            chunks = zip(h.split(size), g.split(size), y.split(size), strict=True)
            yield sum(checkpoint(part_of, *chunk, use_reentrant=False) for chunk in chunks)


def distil(model, teacher, optimizer, rollout, config):
    """A gradient step on the mean of D over all answer tokens -> metrics."""
    kind = DISTILLATION[config.method][1]
    tokens = all_sum(rollout.mask.sum())
    losses = (d / tokens for d in divergences(model, teacher, rollout, kind, config))
    return dict(zip(("loss", "grad_norm"), take_step(model, optimizer, losses), strict=True))


# --------------------------------------------------------------------------------------------------
# Evaluation and training


@torch.no_grad()
def held_out(model, teacher, task, config):
    """Answers to held-out problems -> pass@1, and the KL to the teacher per token (nats)."""
    problems = task.held_out(random.Random("held out"), config.eval_prompts)
    rank, processes = world()
    mine = problems[rank::processes]
    generator = torch.Generator().manual_seed(rank)
    sampler = plain(model, config.dtype)
    rollouts, right = [], 0.0
    at_once = max(1, config.prompts * config.group // processes)  # as many rows as in training
    for i in range(0, len(mine), at_once):
        rollout, _, rewards = sample(sampler, task, mine[i : i + at_once], 1, config, generator)
        rollouts.append(rollout)
        right += rewards.sum()
    rollout = even(rollouts, model.lm_head.weight.device)
    kl = 0.0
    if teacher is not None:
        del sampler
        kl = sum(d.item() for d in divergences(model, teacher, rollout, "reverse", config))
    sums = torch.tensor([kl, rollout.mask.sum(), right], dtype=torch.float64)
    kl, tokens, right = all_sum(sums).tolist()
    row = {} if teacher is None else dict(kl=kl / tokens)
    return row | ({"pass@1": right / len(problems)} if task.judged else {})


def examples(model, task, config):
    """Three held-out problems -> their prompts, and the model's answers as (text, reward)."""
    problems = task.held_out(random.Random("held out"), 3)
    generator = torch.Generator().manual_seed(0)
    sampler = plain(model, config.dtype)
    _, texts, rewards = sample(sampler, task, problems, 1, config, generator)
    prompts = [task.tokenizer.decode(task.prompt(p)) for p in problems]
    return prompts, list(zip(texts, rewards.flatten().tolist(), strict=True))


def train(config, task, run, seed, base, teacher, device):
    """--method from the base for config.steps steps -> the trained model."""
    # 1. A model where it trains, the base that --beta holds it to, an optimizer
    model = place(copy.deepcopy(base), config, device)
    reference = place(copy.deepcopy(base), config, device) if config.beta else None
    optimizer = torch.optim.AdamW(
        model.parameters(), config.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    writer = teacher if "teacher" in DISTILLATION.get(config.method, ()) else model
    prompts, before = examples(model, task, config)
    rng, generator = random.Random(), torch.Generator()
    phase = f"{config.method} {seed}"
    if phase not in run.state:
        run.log(seed=seed, step=0, **held_out(model, teacher, task, config))
    for step in run.loop(phase, config.steps, *handles(model, optimizer), rng, generator):
        started = time.time()
        # 2. A random stream for this process and step; answers, and a step
        rng.seed(f"seed {seed}, step {step}, rank {world()[0]}")
        generator.manual_seed(rng.getrandbits(63))
        rollout, rewards, row = collect(writer, task, config, rng, generator)
        if config.distils:
            row |= distil(model, teacher, optimizer, rollout, config)
        else:
            row |= update(model, reference, optimizer, rollout, rewards, config, generator)
        # 3. Log
        row["tokens_per_s"] = row["tokens"] / (time.time() - started)
        if (step + 1) % config.eval_every == 0 or step + 1 == config.steps:
            row |= held_out(model, teacher, task, config)
        run.say(**row)
        run.log(seed=seed, step=step + 1, **row)
    _, after = examples(model, task, config)
    run.samples(prompts, base=before, trained=after)
    return model


def figure(config, run):
    """What was measured on held-out problems, by steps; the claim is that it got better."""
    if config.distils:
        key, unit, text, limit = "kl", "nats per token", "end over start", ("<=", 0.9)
    else:
        key, unit, text, limit = "pass@1", "fraction", "end minus start", (">=", 0.05)
    steps, values = series(run, key)  # (seeds, evaluations)
    first, last = values[:, 0], values[:, -1]
    worst = (last / first).max() if config.distils else (last - first).min()
    numbers = f"{first.mean():.3g} → {last.mean():.3g}"
    fig, ax = plt.subplots(figsize=(7, 4.5), layout="constrained")
    band(ax, steps, values, config.method, marker="o")
    title = f"{config.method}: held-out {key} {numbers}"
    ax.set(title=title, xlabel="step", ylabel=f"{key} ({unit})")
    text = f"held-out {key}, {text}, worst seed ({numbers})"
    return fig, [claim("gain", text, "-", "-", worst, *limit, config.seeds)]


@together
def main():
    config = parse_args(Config, __doc__)
    device = pick_device(config.device)
    join(device)
    if config.shard and not dist.is_initialized():
        raise UserError("--shard deals out to several processes: it needs torchrun")
    if world()[1] > config.prompts:
        raise UserError("there are more processes than --prompts")
    # what is impossible ends here, before anything is written
    folders = [f"{config.method} {seed}" for seed in seeds_of(config)]
    teacher = None
    if not config.init:
        toy = tasks.load(config.data)
        task = tasks.in_tokens(toy)
        config.max_new_tokens = min(config.max_new_tokens, toy.budget(toy.SIZE))
    else:
        about = (config.init, config.data, config.template, config.chat, not config.distils)
        task = word_problems(*about)
        base = load_model(config, "init", task)
        if config.distils:
            teacher = load_teacher(config, task, base)
    files = {name: getattr(config, name) for name in ("init", "teacher", "data")}
    inputs = {f"--{name}": fingerprint(path) for name, path in files.items() if path}
    with Team(config, folders, inputs) as run:
        if teacher is not None:
            teacher = place(teacher, config, device)
        for seed, folder in zip(seeds_of(config), folders, strict=True):
            if not config.init:
                flags = SimpleNamespace(warm_up=5 if config.quick else 600, size=toy.SIZE)
                base = imitate(flags, toy, run, seed, device)
                for p in base.parameters():  # rank 0's: GPUs need not have trained to the same bits
                    p.data = all_sum(p.data * (world()[0] == 0))
            base.checkpointing = config.checkpointing
            trained = train(config, task, run, seed, base, teacher, device)
            whole = plain(trained, "float32")
            if world()[0] == 0:
                whole.save_pretrained(run.dir / folder, config.init or None, task.tokenizer.stop)
        run.finish(*figure(config, run))


if __name__ == "__main__":
    command(main)
