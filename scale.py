"""scale.py: the lessons' losses on real checkpoints, real data and several processes.

What grpo.py and opd.py teach is what runs here: their advantages, surrogates, aggregations and
divergences are imported. This file adds what size asks for, and nothing to the methods.

    python scale.py --task addition             the toy: a model that reinforce.py has warmed up
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
2. The learning rate warms up over five steps. AdamW's betas are grpo.py's for distillation, too.
3. With --dtype bfloat16 the sampler is a rounded copy of the policy; --correction weighs each token
   by policy over sampler, truncated (Yao et al. 2025; IcePop drops instead).
4. Dynamic sampling (dapo) fills each process's share by itself.
5. The teacher reads what the student reads, the student's chat template and end of text included.
   Ids that only pad the teacher's embedding are cut off.

What to see: pass@1 of held-out problems (and the KL to the teacher) by steps, samples before and
after, and a folder `METHOD SEED` with the trained model, which transformers opens.
"""

import copy
import os
import random
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.checkpoint import state_dict as whole_state
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

import tasks
from engine import Rollout, generate
from experiment import (
    Flags,
    LostProcess,
    Run,
    UserError,
    all_sum,
    band,
    claim,
    command,
    descend,
    fingerprint,
    flag,
    parse_args,
    pick_device,
    seeds_of,
    series,
    world,
)
from grpo import LOSSES, advantages, aggregation_weights, kl_estimate, pass_at_k, surrogate
from huggingface import load_tokenizer, saved_files
from kernels import token_logprobs
from model import GPT
from opd import METHODS, divergence
from reinforce import imitate
from tasks.wordproblems import word_problems

# the rows that need a teacher but no map, no hint and no judge: name -> who writes, which divergence
DISTILLATION = {
    name: (writer, kind)
    for name, (writer, teacher, kind, mask, weight) in METHODS.items()
    if teacher == "expert" and writer in ("student", "teacher") and (mask, weight) == ("all", "one")
}
TEMPLATE = "{question}\\nThink step by step. End with the answer as: #### number"
LOGITS = 2**26  # (tokens, V) log-probabilities at once: 256 MiB, a few times over
TOP = 4  # k of the top-k estimators, as in opd.py


@dataclass
class Config(Flags):
    method: str = flag(
        "dr_grpo", "a row of grpo.LOSSES or opd.METHODS", choices=(*LOSSES, *DISTILLATION)
    )
    init: str = flag("", "the model to train: a Hugging Face folder or hub id; with --data")
    teacher: str = flag("", "for distillation: a folder or hub id with the same vocabulary")
    data: str = flag(
        "",
        "gsm8k, or a .jsonl or .parquet file with the columns question and answer, the answer with "
        "'#### number' (distillation does without); of a file a tenth is held out",
    )
    task: str = flag("", "instead of --init and --data: addition, or another toy task")
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
    prompts: int = flag(32, "problems per step, of all processes", quick=4, low=1, high=2**16)
    group: int = flag(8, "answers to each of them", quick=4, low=2, high=2**12)
    minibatches: int = flag(1, "gradient steps per batch, at most --group", low=1)
    micro_batch: int = flag(16, "rows per forward pass: memory, not results", low=1, high=2**16)
    max_new_tokens: int = flag(256, "budget of an answer", quick=8, low=1)
    temperature: float = flag(1.0, "of sampling and of scoring", low=1e-3)
    lr: float = flag(1e-5, "learning rate (AdamW, five steps of warm-up, constant)", low=0, high=1)
    correction: str = flag(
        "none",
        "policy over sampler: tis (per token), seq_tis (per answer), mis (drop)",
        choices=("none", "tis", "seq_tis", "mis"),
    )
    beta: float = flag(0.0, "coefficient of the KL to the base model (k3)", low=0)
    eval_every: int = flag(10, "steps between evaluations", quick=1, low=1)
    eval_prompts: int = flag(128, "held-out problems", quick=8, low=1, high=2**16)
    eval_samples: int = flag(4, "answers to each of them", quick=2, low=1, high=2**12)

    def __post_init__(self):
        if bool(self.task) == bool(self.init) or bool(self.init) != bool(self.data):
            raise UserError("either --init and --data, or --task")
        if bool(self.teacher) != self.distils or self.task and self.distils:
            names = ", ".join(DISTILLATION)
            raise UserError(
                f"--teacher and --data are what the methods {names} need, and only they"
            )
        if "{question}" not in self.template:
            raise UserError("--template: has no {question}")
        out = Path(self.out or f"out/{self.name}").resolve()
        for name in (self.init, self.teacher):
            if name and Path(name).resolve().parent == out:
                raise UserError(f"{name} lies in --out: a run writes its models there")
        if self.minibatches > self.group:
            raise UserError(f"--minibatches {self.minibatches}: at most --group {self.group}")
        if self.distils:
            self.eval_samples = 1

    @property
    def distils(self):
        return self.method in DISTILLATION

    def idle(self):
        """The flags that do nothing beside the others -> {field: why}."""
        rl = "group minibatches temperature correction beta eval_samples"
        cases = [
            (self.distils, rl, "it is for reinforcement learning"),
            (self.task, "template chat", "it is for --data"),
            (self.dtype == "float32", "correction", "the sampler is the policy that is trained"),
        ]
        return {name: why for here, names, why in cases if here for name in names.split()}


# --------------------------------------------------------------------------------------------------
# Several processes


def join(device):
    """Under torchrun, meet the other processes: one on each GPU (nccl), or all on the CPU (gloo).

    Only rank 0 prints.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    if not dist.is_torchelastic_launched():
        raise UserError("WORLD_SIZE is set, but not by torchrun: start several processes with it")
    local = int(os.environ["LOCAL_RANK"])
    if device == "mps" or device == "cuda" and local >= torch.cuda.device_count():
        raise LostProcess(
            f"process {local + 1} of this machine finds no {device} device of its own"
        )
    if device == "cuda":
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    if world()[0]:
        sys.stdout = open(os.devnull, "w")


def share(n):
    """This process's slice of n things."""
    rank, processes = world()
    return slice(n * rank // processes, n * (rank + 1) // processes)


def same_weights(model):
    """Rank 0's weights in every process: GPUs need not have trained to the same bits."""
    if dist.is_initialized():
        for p in model.parameters():
            dist.broadcast(p.data, 0)
    return model


def is_sharded(model):
    return isinstance(model.norm.weight, DTensor)


def sum_gradients(model):
    """What data parallelism is: each process has the gradient of its own rows, the batch's is their
    sum, and all take the same step. A sum, not a mean: each loss is already divided by the counts of
    the whole batch. A sharded model has done it in its backward pass.
    """
    if dist.is_initialized() and not is_sharded(model):
        parameters = list(model.parameters())
        total = all_sum(torch.cat([p.grad.flatten() for p in parameters]))
        for p, g in zip(parameters, total.split([p.numel() for p in parameters])):
            p.grad = g.view_as(p)


def place(model, config, device):
    """The model where it trains. With --shard each process keeps a slice of every weight; a block's
    are gathered when it is computed, and the gradients are summed slice by slice."""
    if not config.shard:
        return model.to(device)
    mesh = dist.init_device_mesh(device, (world()[1],))
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh)
        module.set_gradient_divide_factor(1.0)  # a sum, not a mean
        module.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(model, "hidden")
    return model


def plain(model, dtype):
    """The model as one whole, to sample from: itself, or a copy if it is sharded or of another dtype.

    With --shard all processes have to call it.
    """
    if not is_sharded(model) and model.lm_head.weight.dtype == dtype:
        return model
    with torch.device("meta"):  # shapes without memory
        whole = GPT(model.config)
    weights = model.state_dict()
    for name, w in weights.items():
        weights[name] = (w.full_tensor() if is_sharded(model) else w).to(dtype)
    whole.load_state_dict(weights, assign=True)
    if model.config.tie:
        whole.lm_head.weight = whole.wte.weight
    return whole


def handles(model, optimizer):
    """What a run saves and restores. Of a sharded model: the whole of it, in rank 0's memory."""
    if not is_sharded(model):
        return model, optimizer
    options = whole_state.StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = SimpleNamespace(
        state_dict=partial(whole_state.get_model_state_dict, model, options=options),
        load_state_dict=partial(whole_state.set_model_state_dict, model, options=options),
    )
    both = (model, optimizer)
    moments = SimpleNamespace(
        state_dict=partial(whole_state.get_optimizer_state_dict, *both, options=options),
        load_state_dict=partial(whole_state.set_optimizer_state_dict, *both, options=options),
    )
    return weights, moments


def even(rollouts, device):
    """Rollouts joined. Rows without an answer fill up what this process has fewer than another: a
    sharded model needs all of them in each of its passes. Of mask 0, they count for nothing."""
    rank, processes = world()
    rows = torch.zeros(processes)
    rows[rank] = sum(len(r.ids) for r in rollouts)
    missing = int(all_sum(rows).max() - rows[rank])
    zeros = torch.zeros(missing, 2, device=device)
    lens = torch.full((missing,), 2, device=device)
    return Rollout.cat([*rollouts, Rollout(zeros.long(), zeros, zeros, lens)])


# --------------------------------------------------------------------------------------------------
# Models and their answers


def open_checkpoint(task, config, flag, dtype):
    """The model that a flag names. UserError if it can't hold the longest prompt with its answer, or
    lacks ids of the tokenizer."""
    name = getattr(config, flag)
    model = GPT.from_pretrained(name, dtype)
    positions = task.longest + config.max_new_tokens - 1
    ids = task.tokenizer.n_vocab
    if model.config.block_size < positions or model.config.vocab_size < ids:
        raise UserError(
            f"--{flag} {name}: has {model.config.block_size} positions and {model.config.vocab_size} "
            f"ids; the longest prompt and --max-new-tokens need {positions}, the tokenizer {ids}"
        )
    return model


def open_teacher(task, config, V):
    """The frozen teacher of a student with V ids. UserError if their tokenizers differ."""
    name = config.teacher
    mine, its = load_tokenizer(config.init), load_tokenizer(name)
    if (mine._mergeable_ranks, mine._special_tokens) != (its._mergeable_ranks, its._special_tokens):
        raise UserError(f"--teacher {name}: its vocabulary is not that of --init {config.init}")
    teacher = open_checkpoint(task, config, "teacher", getattr(torch, config.dtype))
    if teacher.config.vocab_size < V:
        raise UserError(f"--teacher {name}: has {teacher.config.vocab_size} ids, the student {V}")
    for layer in (teacher.wte, teacher.lm_head):  # both distributions are over the student's ids
        layer.weight = torch.nn.Parameter(layer.weight[:V])
    teacher.config.vocab_size = V
    return teacher.requires_grad_(False)


def sample(model, task, problems, n, config, generator):
    """n answers of a plain model to each problem -> their rollout, texts and rewards (P, n)."""
    rollout = generate(
        model,
        [task.prompt(p) for p in problems],
        n,
        config.max_new_tokens,
        config.temperature,
        stop=task.tokenizer.stop,
        generator=generator,
    )
    texts = rollout.texts(task.tokenizer)
    ended = rollout.ended(task.tokenizer.stop).tolist()
    rewards = [task.judge(problems[i // n], text, ended[i]) for i, text in enumerate(texts)]
    return rollout, texts, torch.tensor(rewards).view(-1, n)


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
    """This process's share of a batch -> its rollout, its rewards (P, G), and what all sampled.
    Distillation needs one answer to a problem, and no reward.

    Dynamic sampling (DAPO) goes on until all groups have both right and wrong answers, at most four
    times; P may then be less. If there is no such group at all, the last batch is taken as it is.
    """
    dynamic = not config.distils and LOSSES[config.method][-1]
    G = 1 if config.distils else config.group
    P = len(range(config.prompts)[share(config.prompts)])
    sampler = plain(model, getattr(torch, config.dtype))
    kept, rewards = [], []
    right = dull = seen = tokens = 0
    while seen == 0 or (dynamic and len(kept) < P and seen < 4 * P):
        problems = [task.draw(rng) for _ in range(P)]
        rollout, _, r = sample(sampler, task, problems, G, config, generator)
        mixed = (r != r[:, :1]).any(1)
        seen += P
        right += r.mean(1).sum()
        dull += (~mixed).sum()
        tokens += rollout.mask.sum().cpu()
        for i in range(P):
            if (mixed[i] or not dynamic) and len(kept) < P:
                kept.append(rollout[slice(i * G, (i + 1) * G)])
                rewards.append(r[i])
    if not kept:
        kept, rewards = [rollout], list(r)
    sums = torch.tensor([right, dull, seen, tokens], dtype=torch.float64)
    right, dull, seen, tokens = all_sum(sums).tolist()
    stats = dict(tokens=int(tokens))
    if not config.distils:
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
    return w.clamp_max(cap) if kind == "tis" else w * ((w < cap) & (w > 1 / cap))


def score(model, rollout, config, T):
    """Log-probability and entropy (R, T) of each token, at the temperature it was sampled with."""
    ids = rollout.ids
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
        h = model.hidden(ids[:, :-1])  # (R, T - 1, C)
        logp, entropy = token_logprobs(h, model.lm_head.weight, ids[:, 1:], config.temperature)
    pad = (1, T - ids.shape[1])  # a micro-batch of short rows is cut to its longest
    return F.pad(logp, pad), F.pad(entropy, pad)


@torch.no_grad()
def score_all(model, rollout, config):
    """score's log-probabilities without gradients, in micro-batches."""
    T = rollout.ids.shape[1]
    parts = torch.arange(len(rollout.ids)).split(config.micro_batch)
    return torch.cat([score(model, rollout[rows], config, T)[0] for rows in parts])


def batch_advantages(rewards, kind):
    """grpo.advantages; `batch` takes the mean of the rewards of all processes."""
    if kind == "batch" and dist.is_initialized():
        return rewards - all_sum(rewards.sum()) / all_sum(torch.tensor(rewards.numel()))
    return advantages(rewards, kind)


def batch_weights(mask, kind, budget):
    """grpo.aggregation_weights of this process's rows, divided by the rows or the tokens of all."""
    own = mask.sum().clamp_min(1) if kind == "token" else len(mask)
    real = mask.sum() if kind == "token" else (mask.sum(1) > 0).sum()  # a row of mask 0 is none
    return aggregation_weights(mask, kind, budget) * (own / all_sum(real).clamp_min(1))


def update(model, base, optimizer, rollout, rewards, config, generator):
    """The gradient steps of one batch -> metrics. rewards (P, G); base: None without --beta."""
    advantage, ratio, eps_low, eps_high, aggregation, _ = LOSSES[config.method]
    mask = rollout.mask
    R, T = mask.shape
    tokens = all_sum(mask.sum())
    old_logp = score_all(model, rollout, config) if config.minibatches > 1 else None
    ref_logp = score_all(base, rollout, config) if config.beta else None
    adv = batch_advantages(rewards.to(mask.device), advantage).flatten()
    adv = F.pad(adv, (0, R - len(adv)))[:, None]  # (R, 1)
    sums = dict(entropy=0.0, clip_fraction=0.0) | (dict(kl=0.0) if config.beta else {})

    def losses(minibatch):
        weights = batch_weights(mask[minibatch], aggregation, config.max_new_tokens)
        for rows, a in zip(minibatch.split(config.micro_batch), weights.split(config.micro_batch)):
            m = mask[rows]
            logp, entropy = score(model, rollout[rows], config, T)
            # in a batch's only gradient step the policy is still the old one
            old = logp.detach() if old_logp is None else old_logp[rows]
            loss, silenced = surrogate(logp, old, adv[rows], m, ratio, eps_low, eps_high)
            loss = loss * correction_weights(old, rollout.logp[rows], m, config.correction)
            if config.beta:
                kl = kl_estimate(logp, ref_logp[rows], "k3")
                sums["kl"] += ((kl * m).sum() / tokens).item()
                loss = loss + config.beta * kl
            sums["entropy"] += ((entropy * m).sum() / tokens).item()
            sums["clip_fraction"] += (silenced.sum() / tokens).item()
            yield (a * loss).sum()

    order = torch.arange(R)
    if config.minibatches > 1:
        order = torch.randperm(R, generator=generator)
    parts = order.tensor_split(config.minibatches)
    steps = [take_step(model, optimizer, losses(part)) for part in parts]
    loss, norm = (sum(x) / len(parts) for x in zip(*steps))
    total = all_sum(torch.tensor(list(sums.values())))
    return dict(loss=loss, grad_norm=norm) | dict(zip(sums, total.tolist()))


def token_divergence(model, teacher, rollout, kind, config):
    """D of every answer token of a rollout, row by row (N,), with gradients to the student.

    Two log-probabilities of the token that stands there are enough for token and sampled. The other
    kinds need whole distributions: of as many tokens at once as LOGITS allows, made a second time in
    the backward pass.
    """

    def logprobs(m, h):
        return m.lm_head(h).float().log_softmax(-1)[None]  # (1, n, V)

    def part_of(h, g, y):
        return divergence(logprobs(model, h), logprobs(teacher, g), y[None], kind, TOP)[0]

    own = rollout.mask[:, 1:] > 0
    x, y = rollout.ids[:, :-1], rollout.ids[:, 1:][own]  # (B, T - 1), (N,)
    with torch.autocast(y.device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
        h = model.hidden(x)[own]  # (N, C)
        with torch.no_grad():
            g = teacher.hidden(x)[own]  # (N, the teacher's C)
        if kind in ("token", "sampled"):  # as if the vocabulary had one token: (1, N, 1)
            logp, _ = token_logprobs(h, model.lm_head.weight, y)
            logq, _ = token_logprobs(g, teacher.lm_head.weight, y)
            only = torch.zeros_like(y)[None]
            return divergence(logp[None, :, None], logq[None, :, None], only, kind)[0]
        size = max(1, LOGITS // model.config.vocab_size)
        parts = zip(h.split(size), g.split(size), y.split(size))
        return torch.cat([checkpoint(part_of, *part, use_reentrant=False) for part in parts])


def divergences(model, teacher, rollout, kind, config):
    """The sum of D over each micro-batch of a rollout, one after the other."""
    for rows in torch.arange(len(rollout.ids)).split(config.micro_batch):
        yield token_divergence(model, teacher, rollout[rows], kind, config).sum()


def distil(model, teacher, optimizer, rollout, config):
    """A gradient step on the mean of D over all answer tokens -> metrics."""
    kind = DISTILLATION[config.method][1]
    tokens = all_sum(rollout.mask.sum())
    losses = (d / tokens for d in divergences(model, teacher, rollout, kind, config))
    return dict(zip(("loss", "grad_norm"), take_step(model, optimizer, losses)))


# --------------------------------------------------------------------------------------------------
# Evaluation and training


@torch.no_grad()
def held_out(model, teacher, task, config):
    """Answers to held-out problems -> pass@k, mean length, KL to the teacher per token (nats)."""
    n = config.eval_samples
    problems = task.held_out(random.Random("held out"), config.eval_prompts)
    mine = problems[share(len(problems))]
    generator = torch.Generator().manual_seed(world()[0])
    sampler = plain(model, getattr(torch, config.dtype))
    rollouts, correct = [], torch.zeros(0)
    at_once = max(1, config.prompts // world()[1])
    for i in range(0, len(mine), at_once):
        rollout, _, rewards = sample(sampler, task, mine[i : i + at_once], n, config, generator)
        rollouts.append(rollout)
        correct = torch.cat((correct, rewards.sum(1)))
    rollout = even(rollouts, model.lm_head.weight.device)
    kl = 0.0
    if teacher is not None:
        kl = sum(d.item() for d in divergences(model, teacher, rollout, "reverse", config))
    ks = sorted({1, n})
    right = [pass_at_k(n, correct, k).sum().item() for k in ks]
    sums = torch.tensor([kl, rollout.mask.sum(), *right], dtype=torch.float64)
    kl, tokens, *right = all_sum(sums).tolist()
    row = dict(length=tokens / len(problems) / n)
    if task.judged:
        row |= {f"pass@{k}": r / len(problems) for k, r in zip(ks, right)}
    return row if teacher is None else row | dict(kl=kl / tokens)


def examples(model, task, config):
    """The answers to three held-out problems -> (text, reward) of each; the same in each process."""
    problems = task.held_out(random.Random("held out"), 3)
    sampler = plain(model, getattr(torch, config.dtype))
    generator = torch.Generator().manual_seed(0)
    _, texts, rewards = sample(sampler, task, problems, 1, config, generator)
    return list(zip(texts, rewards.flatten().tolist()))


def train(config, task, run, seed, base, teacher, device):
    """--method from the base for config.steps steps -> the trained model, examples before, after."""
    # 1. A model where it trains, the base that --beta holds it to, an optimizer
    model = place(copy.deepcopy(base), config, device)
    reference = place(copy.deepcopy(base), config, device) if config.beta else None
    optimizer = torch.optim.AdamW(
        model.parameters(), config.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    before = examples(model, task, config)
    rng, generator = random.Random(), torch.Generator()
    phase, kept = f"{config.method} {seed}", dict(sampled=0)
    if phase not in run.state:
        measures = held_out(model, teacher, task, config)
        run.log(seed=seed, step=0, sampled_tokens=0, **measures)
    loop = run.loop(phase, config.steps, *handles(model, optimizer), rng, generator, kept)
    for step in loop:
        started = time.time()
        for g in optimizer.param_groups:
            g["lr"] = config.lr * min(1, (step + 1) / 5)
        # 2. A random stream for this process and step; answers, and a step
        rng.seed(f"seed {seed}, step {step}, rank {world()[0]}")
        generator.manual_seed(rng.getrandbits(63))
        if config.distils:
            writer = teacher if DISTILLATION[config.method][0] == "teacher" else model
            rollout, _, row = collect(writer, task, config, rng, generator)
            row |= distil(model, teacher, optimizer, rollout, config)
        else:
            rollout, rewards, row = collect(model, task, config, rng, generator)
            row |= update(model, reference, optimizer, rollout, rewards, config, generator)
        # 3. Log
        tokens, seconds = row.pop("tokens"), time.time() - started
        kept["sampled"] += tokens
        if (step + 1) % config.eval_every == 0 or step + 1 == config.steps:
            row |= held_out(model, teacher, task, config)
        run.say(**{k: row[k] for k in ("reward", "loss", "kl", "pass@1") if k in row})
        row |= dict(sampled_tokens=kept["sampled"], seconds=seconds, tokens_per_s=tokens / seconds)
        run.log(seed=seed, step=step + 1, **row)
    return model, before, examples(model, task, config)


def figure(config, run):
    """What was measured on held-out problems, by steps; the claim is that it got better."""
    fig, ax = plt.subplots(figsize=(7, 4.5), layout="constrained")
    if config.distils:
        keys, label = ["kl"], "reverse KL to the teacher (nats per token)"
    else:
        keys, label = ["pass@1", f"pass@{config.eval_samples}"], "right answers (fraction)"
    for key in dict.fromkeys(keys):
        band(ax, *series(run, key), key, marker="o")
    _, values = series(run, keys[0])  # (seeds, evaluations)
    first, last = values[:, 0], values[:, -1]
    what = Path(config.init or config.task).name
    numbers = f"{first.mean():.3g} → {last.mean():.3g}"
    ax.set(
        title=f"{what}, {config.method}: held-out {keys[0]} {numbers}", xlabel="step", ylabel=label
    )
    ax.legend()
    if config.distils:
        change, text, limit = (last / first).max(), "KL to the teacher, end over start", ("<=", 0.9)
    else:
        change, text, limit = (last - first).min(), "pass@1, end minus start", (">=", 0.05)
    text = f"held-out {text}, worst seed"
    return fig, [claim("gain", text, "-", "-", change, *limit, config.seeds, f" ({numbers})")]


def check_folders(config, names):
    """UserError if --out has something by these names that no run saved: said before training."""
    for path in (Path(config.out) / name for name in names):
        files = {file.name for file in path.iterdir()} if path.is_dir() else {"a file"}
        if os.path.lexists(path) and files - saved_files(path):
            raise UserError(f"{path} is not what a run of this script saved: choose another --out")


def main():
    config = parse_args(Config, __doc__)
    device = pick_device(config.device)
    join(device)
    if not config.shard < world()[1] <= config.prompts:
        raise UserError(f"{world()[1]} processes: --shard takes several, --prompts as many or more")
    # what is impossible ends here, before anything is written
    folders = [f"{config.method} {seed}" for seed in seeds_of(config)]
    check_folders(config, folders)
    teacher = None
    if config.task:
        toy = tasks.load(config.task)
        task = tasks.in_tokens(toy)
        config.max_new_tokens = min(config.max_new_tokens, toy.budget(toy.SIZE))
    else:
        answers = not config.distils
        task = word_problems(config.init, config.data, config.template, config.chat, answers)
        base = open_checkpoint(task, config, "init", torch.float32)
        if config.distils:
            teacher = open_teacher(task, config, base.config.vocab_size)
    named = [name for name in ("init", "teacher", "data") if getattr(config, name)]
    inputs = {f"--{name}": fingerprint(getattr(config, name)) for name in named}
    with Run(config, folders, inputs) as run:
        if teacher is not None:
            teacher = place(teacher, config, device)
        for seed, folder in zip(seeds_of(config), folders):
            if config.task:
                lesson = SimpleNamespace(warm_up=5 if config.quick else 600, size=toy.SIZE)
                base = same_weights(imitate(lesson, toy, run, seed, device))
            base.checkpointing = config.checkpointing
            trained, before, after = train(config, task, run, seed, base, teacher, device)
            whole = plain(trained, torch.float32)
            if world()[0] == 0:
                stop = task.tokenizer.stop
                whole.save_pretrained(run.dir / folder, like=config.init or None, stop=stop)
        problems = task.held_out(random.Random("held out"), 3)
        prompts = [task.tokenizer.decode(task.prompt(p)) for p in problems]
        run.samples(prompts, base=before, trained=after)
        run.finish(*figure(config, run))


if __name__ == "__main__":
    command(main)
