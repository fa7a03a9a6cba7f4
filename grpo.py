"""grpo.py: reinforcement learning with verifiable rewards, whole: a task, a base model, a policy gradient, an honest evaluation.

    python grpo.py                        the main run: `train`, under 3 minutes on two cores
    python grpo.py --figure variants      every loss at the same number of sampled tokens, 3 seeds
    python grpo.py --figure length        why wrong answers grow long under GRPO, without a model and with one
    torchrun --nproc-per-node 2 grpo.py   the same run by two processes: each samples and trains on its share of the prompts
    python grpo.py --init Qwen/Qwen2.5-0.5B-Instruct --chat --data gsm8k --max-new-tokens 300 --dtype bfloat16      a real model, real data

The task is column addition. A problem is two numbers, their digits named by column; the answer fills in the columns, one by one:

    c8C3b3B7a1A6=       831 + 376: column c holds 8 and 3, b holds 3 and 7, a (the units) 1 and 6
    a1A6007             column a: 1 and 6, carry in 0, make 07
    b3B7010             column b: 3 and 7, carry in 0, make 10
    c8C3112             column c: 8 and 3, carry in 1, make 12          the last digits say 207 (the last carry is not asked for): reward 1

The base model is trained on demonstrators who take the columns in random order, guess a carry that they can't know yet, and now
and then go back to a column. It can do every step, and is right about a quarter of the time. The reward says only whether the
final digits are right. What RL has to find is what every child is told: work from right to left, and nothing is guessed.

The loss, with rho = exp(logp - old_logp), is four independent choices (`LOSSES` lists the usual combinations by their names):

    loss = sum_{i,t} a_{i,t} * ( w_{i,t} * L(rho_{i,t}, A_i)  +  beta * KL_{i,t}  -  entropy_bonus * H_{i,t} )
    1. advantage    A_i:  r_i - mean;  (r_i - mean) / std;  r_i - mean of the others (rloo);  r_i - mean of the batch
    2. ratio        L:    none -A logp;  token, sequence -min(rho A, clip(rho, 1 - eps_low, 1 + eps_high) A);  cispo -sg(clip(rho)) A logp
    3. aggregation  a:    what a token's loss is divided by: its sequence's length, the batch's tokens, a constant, or the rows only
    4. correction   w:    old policy over sampler, truncated, where the sampler is not the policy that is trained (bf16)

How this differs from the papers:
1. One gradient step per rollout batch (--minibatches 1), so rho = 1 and clipping is idle: fewer things to tune. `variants` takes 4.
2. DAPO (arXiv 2503.14476): clip-higher, token aggregation (over the batch, not by group) and dynamic sampling; no overlong reward.
3. GSPO's clip range (arXiv 2507.18071: 3e-4, 4e-4) is 100 times wider: a small model's sequence ratio moves more in one step.
4. With stratified or lattice samples a group's answers depend on one another: its mean is no longer an unbiased baseline.
5. Word problems (--data) are drawn with replacement, not in epochs. Their verifier is that of GSM8K's authors (arXiv 2110.14168): the first
   "#### number" of the answer, without commas and a dot at its end, must be the reference's, letter by letter; an answer need not be finished.
6. A KL in the reward (--kl-in reward) is not divided by a group's std: in a group without a right answer that would blow its noise up to 1.

What to see: held-out pass@1 from about .27 to over .95 in 45 steps; guessed carries from half of the lines to almost none.
The value of a policy gradient's loss says nothing about success: watch `reward` and `pass@1`.
"""
import copy
import math
import random
import time
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F

from engine import Rollout, generate, skip_draws
from experiment import (
    Run,
    UserError,
    all_sum,
    band,
    claim,
    command,
    descend,
    fingerprint,
    flag,
    gathered,
    join,
    need_memory,
    parse_args,
    pick_device,
    same_weights,
    seeds_of,
    series,
    share,
    sum_gradients,
    world,
)
from kernels import token_logprobs
from model import GPT, GPTConfig, checkpoint_for
from tasks.wordproblems import word_problems
from tokenizer import CharTokenizer

FIGURES = {"train": "one run: reward, pass@1, entropy, lengths, pass@k against the base (under 3 minutes)",
           "variants": "every loss at the same number of sampled tokens, 3 seeds (about half an hour)",
           "length": "the length bias of the 1/|o| normalisation, model-free and with the GPT (about 5 minutes)"}
# what --help calls a default that depends on the figure; with --init the learning rate is 1e-5
DEFAULTS = dict(seeds=1, steps=45, minibatches=1, lr=3e-4, max_new_tokens=56, sft_steps=1200, eval_every=15)
# variants: the learning rate by trial: at 3e-4, 4 steps a batch, `reinforce` fell to 0 (one seed; the README tells). length: rambling is quickly learnt
OF_FIGURE = {"train": {}, "variants": dict(seeds=3, steps=10 ** 9, minibatches=4, lr=1e-4, eval_every=3),
             "length": dict(seeds=3, steps=60, max_new_tokens=64, sft_steps=150)}
# name: advantage, ratio, eps_low, eps_high, aggregation, dynamic sampling
LOSSES = {"reinforce": ("batch", "none", 0.2, 0.2, "sum", False),
          "rloo": ("rloo", "none", 0.2, 0.2, "sum", False),             # Ahmadian et al., arXiv 2402.14740
          "grpo": ("std", "token", 0.2, 0.2, "sequence", False),        # Shao et al., arXiv 2402.03300
          "dr_grpo": ("mean", "token", 0.2, 0.2, "constant", False),    # Liu et al., arXiv 2503.20783
          "dapo": ("std", "token", 0.2, 0.28, "token", True),           # Yu et al., arXiv 2503.14476
          "gspo": ("std", "sequence", 0.03, 0.04, "sequence", False),   # Zheng et al., arXiv 2507.18071
          "cispo": ("std", "cispo", 1.0, 4.0, "token", False)}          # MiniMax-M1, arXiv 2506.13585; cap 5 as in ScaleRL


@dataclass
class Config:
    seed: int = flag(0, "random seed; with --seeds K: the first of K", low=0, high=2 ** 32 - 1)
    seeds: int = flag(None, "repeat over this many seeds (default: 1 for train, 3 for the others)", low=1)
    device: str = flag("auto", "where to run", choices=("auto", "cpu", "cuda", "mps"))
    dtype: str = flag("float32", "bfloat16: autocast training, sampling from a bf16 copy", choices=("float32", "bfloat16"))
    out: str = flag("out/grpo", "folder for figure, metrics, claims and checkpoint")
    resume: bool = flag(False, "go on from the checkpoint in --out")
    quick: bool = flag(False, "a run of a few seconds that shows nothing but that it runs")
    figure: str = flag("train", "which figure: " + "; ".join(f"{k}: {v}" for k, v in FIGURES.items()), choices=tuple(FIGURES))
    steps: int = flag(None, "RL steps (default: 45, for length 60; variants counts tokens)", quick=2, low=0)
    init: str = flag("", "start from this Hugging Face folder or hub id, not from the toy's warm-up; with --data")
    data: str = flag("", "word problems: gsm8k, or a .jsonl or .parquet file with the columns question and answer, the answer with '#### number'; "
                         "of a file a tenth is held out")
    template: str = flag("{question}\\nThink step by step. End with the answer as: #### number", "the prompt of a word problem; \\n is a new line")
    chat: bool = flag(False, "put the prompt into the checkpoint's own chat template, as a user's message")
    checkpointing: bool = flag(False, "keep no activations inside a layer, compute them again: less memory, a third more time")
    loss: str = flag("dr_grpo", "the method; the next five flags override its choices one by one", choices=tuple(LOSSES))
    advantage: str = flag(None, "std | mean | rloo | batch", choices=("std", "mean", "rloo", "batch"))
    ratio: str = flag(None, "none | token | sequence | cispo", choices=("none", "token", "sequence", "cispo"))
    aggregation: str = flag(None, "sequence | token | constant | sum", choices=("sequence", "token", "constant", "sum"))
    eps_low: float = flag(None, "clip range below 1", low=0)
    eps_high: float = flag(None, "clip range above 1", low=0)
    correction: str = flag("none", "weight for old policy over sampler: tis (per token), seq_tis, mis (drop)", choices=("none", "tis", "seq_tis", "mis"))
    beta: float = flag(0.0, "coefficient of the KL to the base model", low=0)
    kl: str = flag(None, "KL estimator (Schulman 2020): k2 or k3 (default) in the loss, k1 in the reward", choices=("k1", "k2", "k3"))
    kl_in: str = flag("loss", "where the KL goes", choices=("loss", "reward"))
    entropy_bonus: float = flag(0.0, "coefficient of the entropy", low=0)
    positive_only: bool = flag(False, "mask negative advantages")
    sampler: str = flag("iid", "a group's uniforms: independent, or spread out (QuasiMoTTo, arXiv 2607.01179)", choices=("iid", "stratified", "lattice"))
    prompts: int = flag(32, "problems per step", quick=4, low=1)
    group: int = flag(16, "samples per problem", quick=4, low=2)
    minibatches: int = flag(None, "gradient steps per rollout batch (default: 1, for variants 4)", low=1)
    micro_batch: int = flag(64, "rows per forward pass; changes memory, the gradient only by rounding", low=1)
    temperature: float = flag(1.0, "sampling temperature, in training and evaluation; the scorer uses the same", low=1e-3)
    lr: float = flag(None, "RL learning rate (AdamW, constant; default: 3e-4, for variants 1e-4, with --init 1e-5)", low=0)
    digits: int = flag(5, "columns of a problem", low=1, high=8)
    max_new_tokens: int = flag(None, "budget of an answer (default: 56, for length 64); columns: at most 224, and unfinished ones are wrong", low=1)
    n_layer: int = flag(2, "layers", low=1)
    n_head: int = flag(8, "heads", low=1)
    n_embd: int = flag(128, "channels", quick=32, low=8)
    sft_steps: int = flag(None, "steps of supervised warm-up (default: 1200, for length 150)", quick=10, low=0)
    sft_batch: int = flag(32, "demonstrations per warm-up step", low=2)
    sft_lr: float = flag(3e-3, "warm-up learning rate (up in 50 steps, then linear to 0)", low=0)
    eval_every: int = flag(None, "RL steps between evaluations (default: 15, for variants 3)", quick=1, low=1)
    eval_prompts: int = flag(128, "held-out problems", quick=8, low=1)
    eval_samples: int = flag(16, "answers to each of them", low=1)

    def __post_init__(self):
        for name, value in (DEFAULTS | (dict(lr=1e-5) if self.init else {}) | OF_FIGURE[self.figure] | (dict(seeds=1) if self.quick else {})).items():
            setattr(self, name, value if getattr(self, name) is None else getattr(self, name))
        if bool(self.init) != bool(self.data) or self.init and (self.figure != "train" or "{question}" not in self.template):
            raise UserError("--init and --data need one another, --figure train, and {question} in the --template")
        if self.init and Path(self.init).resolve().parent == Path(self.out).resolve():
            raise UserError(f"--init {self.init} lies in --out {self.out}: a run writes its model there")
        if self.max_new_tokens > 224 and not self.data:
            raise UserError(f"--max-new-tokens {self.max_new_tokens}: must be at most 224")
        columns = self.figure != "length" and not self.data
        if self.max_new_tokens < LINE * self.digits + 1 and not self.quick and columns:
            raise UserError(f"--max-new-tokens {self.max_new_tokens}: {self.digits} columns take at least {LINE * self.digits + 1}")
        rows = self.group * (1 if self.figure == "variants" or self.method.dynamic else self.prompts)
        if self.minibatches > rows:
            raise UserError(f"--minibatches {self.minibatches}: a batch may have no more than {rows} answers to be dealt out")
        if self.beta and self.kl and (self.kl == "k1") != (self.kl_in == "reward"):
            raise UserError(f"--kl {self.kl} --kl-in {self.kl_in} does not pull to the base: in the loss k1's gradient has mean zero, "
                            "in the reward only k1 has the KL's gradient")

    def idle(self):
        """The flags that do nothing beside the others -> why."""
        why = {}

        def say(reason, *names):
            why.update(dict.fromkeys(names, reason))

        if self.figure != "train":
            say(f"--figure {self.figure} compares the losses as they are", "loss", "advantage", "ratio", "aggregation", "eps_low", "eps_high")
        elif self.minibatches == 1:
            say("with one gradient step a batch (--minibatches 1) every ratio is 1", "ratio", "eps_low", "eps_high")
        elif self.method.ratio == "none":
            say("without a ratio nothing is clipped", "eps_low", "eps_high")
        if self.figure == "length":
            say("--figure length asks no sums, a question once, and holds none out", "digits", "sampler", "eval_every", "eval_prompts", "eval_samples")
        if self.init:
            say("the model is --init's", "n_layer", "n_head", "n_embd", "sft_steps", "sft_batch", "sft_lr", "digits")
        else:
            say("it is for --data", "template", "chat")
        if self.sft_steps == 0:
            say("--sft-steps is 0", "sft_batch", "sft_lr")
        if self.beta == 0:
            say("--beta is 0", "kl", "kl_in")
        if self.dtype == "float32" and self.correction != "none":
            say("in float32 the sampler is the policy that is trained", "correction")
        if self.steps == 0:
            say("--steps is 0", "loss", "advantage", "ratio", "aggregation", "eps_low", "eps_high", "correction", "beta", "kl", "kl_in", "entropy_bonus",
                "positive_only", "sampler", "minibatches", "micro_batch", "lr", "eval_every")
            if self.init or self.sft_steps == 0:
                say("nothing is trained", "checkpointing")
        return why

    @property
    def method(self):
        """The choices that --loss makes, after the flags that override them."""
        names = "advantage", "ratio", "eps_low", "eps_high", "aggregation", "dynamic"
        chosen = {n: v if getattr(self, n, None) is None else getattr(self, n) for n, v in zip(names, LOSSES[self.loss])}
        return SimpleNamespace(**chosen)

    @property
    def name(self):
        return self.figure


# ---------------------------------------------------------------------------------------------------------------------------
# The task

COLUMNS = "abcdefgh"        # a: units
LINE = 7                    # characters in a line of work
tokenizer = CharTokenizer("0123456789" + COLUMNS + COLUMNS.upper() + "=")


def draw_problem(rng, digits, held_out=False):
    """Pairs of digits, units first. A tenth of all problems, by a hash of their text, is never trained on."""
    while True:
        problem = [(rng.randrange(10), rng.randrange(10)) for _ in range(digits)]
        if (zlib.crc32(question(problem).encode()) % 10 == 0) == held_out:
            return problem


def question(problem):
    return "".join(f"{c}{x}{c.upper()}{y}" for c, (x, y) in reversed(list(zip(COLUMNS, problem)))) + "="


def demonstrate(rng, problem, revisit=0.1):
    """A demonstrator's answer: columns in random order, unknown carries guessed, a finished column sometimes done again."""
    order, carry_out, lines = list(range(len(problem))), {}, []
    rng.shuffle(order)
    while order:
        j = rng.choice(sorted(carry_out)) if carry_out and rng.random() < revisit else order.pop()
        x, y = problem[j]
        carry = 0 if j == 0 else carry_out.get(j - 1, rng.randrange(2))
        carry_out[j] = (x + y + carry) // 10
        lines.append(f"{COLUMNS[j]}{x}{COLUMNS[j].upper()}{y}{carry}{x + y + carry:02d}")
    return "".join(lines)


def reward(problem, text):
    """1.0 if the last line of every column ends in the right digit and there are only whole lines, else 0.0."""
    written = {line[0]: line[-1] for line in (text[i:i + LINE] for i in range(0, len(text), LINE))}
    total = sum((x + y) * 10 ** j for j, (x, y) in enumerate(problem))
    right = {c: str(total // 10 ** j % 10) for j, c in enumerate(COLUMNS[:len(problem)])}
    return float(written == right and len(text) % LINE == 0)


def guessed_carries(text):
    """The fraction of an answer's lines, units apart, written before the column to their right: their carry was a guess. None where there are none."""
    columns = text[::LINE]
    lines = [i for i, c in enumerate(columns) if c in COLUMNS[1:]]
    return sum(COLUMNS[COLUMNS.find(columns[i]) - 1] not in columns[:i] for i in lines) / len(lines) if lines else None


def task_of(config):
    """How the problems that the flags speak of are drawn, held out, asked and judged."""
    if config.data:
        return word_problems(config.init, config.data, config.template, config.chat)
    return SimpleNamespace(tokenizer=tokenizer, prompt=lambda p: tokenizer.encode(question(p)), draw=lambda rng: draw_problem(rng, config.digits),
                           held_out=lambda rng, n: [draw_problem(rng, config.digits, held_out=True) for _ in range(n)],
                           judge=lambda p, text, finished: reward(p, text) * finished)


# ---------------------------------------------------------------------------------------------------------------------------
# The algorithm

def group_uniforms(prompts, group, kind, generator):
    """The number in [0, 1) that drives each answer's inverse-CDF draws: (prompts * group,), each uniform on its own. None for iid.

    stratified: one number in each of `group` equal intervals, in random order. lattice: a grid with one random shift per group.
    """
    if kind == "iid":
        return None
    grid = torch.arange(group, dtype=torch.float64) / group
    if kind == "lattice":
        return ((grid + torch.rand(prompts, 1, dtype=torch.float64, generator=generator)) % 1).flatten()
    u = grid + torch.rand(prompts, group, dtype=torch.float64, generator=generator) / group
    return u.gather(1, torch.rand(prompts, group, generator=generator).argsort(1)).flatten()


def advantages(rewards, kind):
    """rewards (P, G) -> advantages (P, G), `kind` as in --advantage. A group of equal rewards gets exactly 0 (but for `batch`), not rounding noise over 1e-6."""
    if kind == "batch":
        return rewards - rewards.mean()
    centred = torch.where((rewards == rewards[:, :1]).all(1, keepdim=True), 0.0, rewards - rewards.mean(1, keepdim=True))
    if kind == "rloo":      # r_i minus the mean of the others
        return centred * rewards.shape[1] / (rewards.shape[1] - 1)
    return centred / (rewards.std(1, keepdim=True) + 1e-6) if kind == "std" else centred


def surrogate(logp, old_logp, adv, mask, ratio, eps_low, eps_high):
    """Per-token loss L (R, T) and whether the clip silenced the token (R, T). adv (R, 1); mask (R, T).

    The clip takes the gradient away only where A > 0 and rho > 1 + eps_high, or A < 0 and rho < 1 - eps_low.
    """
    if ratio == "none":
        return -adv * logp, torch.zeros_like(mask)
    log_rho = logp - old_logp
    if ratio == "sequence":     # GSPO-token: the value is the sequence's geometric mean, the gradient the token's own
        mean = (log_rho * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp_min(1)
        log_rho = mean.detach() + logp - logp.detach()
    rho = log_rho.clamp(-20, 20).exp()
    clipped = rho.clamp(1 - eps_low, 1 + eps_high)
    if ratio == "cispo":        # the weight is clipped, the gradient never lost
        return -clipped.detach() * adv * logp, torch.zeros_like(mask)
    silenced = ((adv > 0) & (rho > 1 + eps_high)) | ((adv < 0) & (rho < 1 - eps_low))
    return -torch.minimum(rho * adv, clipped * adv), silenced.float() * mask


def aggregation_weights(mask, kind, budget, rows=None, tokens=None):
    """(R, T) weights a. Made from all rows of a gradient step, before they are cut into micro-batches, which then cannot change them.

    sequence: mean over rows of the mean over tokens. token: mean over all tokens. constant: sum / (rows * budget). sum: sum / rows.
    rows, tokens: how many the step has, where other processes hold some of them (default: those of mask).
    """
    R = rows or mask.shape[0]
    tokens = mask.sum() if tokens is None else tokens
    return mask / {"sequence": R * mask.sum(1, keepdim=True).clamp_min(1), "token": tokens.clamp_min(1),
                   "constant": R * budget, "sum": R}[kind]


def kl_estimate(logp, ref_logp, kind):
    """Per-token estimate of KL(pi || ref) from samples of pi (Schulman 2020). As values k1 and k3 are unbiased, k2 is not.

    As losses, on-policy: k2 has the gradient of each token's own KL given what stands before, k3 that of KL(ref || pi), k1 none; none of them
    sees what a token does to later ones. In the reward, k1 summed over an answer has the gradient of the whole answer's KL.
    """
    d = (logp - ref_logp).clamp(-20, 20)
    return {"k1": d, "k2": d ** 2 / 2, "k3": (-d).exp() + d - 1}[kind]


def correction_weights(old_logp, sampler_logp, mask, kind, cap=2.0):
    """w (R, T): old policy over the policy that sampled, detached. tis: per token, at most cap; seq_tis: per sequence; mis: 0 outside (1/cap, cap)."""
    log_w = ((old_logp - sampler_logp) * mask).detach()
    if kind == "none":
        return torch.ones_like(mask)
    if kind == "seq_tis":
        return log_w.sum(1, keepdim=True).exp().clamp_max(cap).expand_as(mask)
    w = log_w.exp()
    return w.clamp_max(cap) if kind == "tis" else w * ((w < cap) & (w > 1 / cap))


def pass_at_k(n, correct, k):
    """Unbiased pass@k (Chen et al., arXiv 2107.03374): 1 - C(n-c, k) / C(n, k) of each problem. correct (...) counts out of n."""
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs 1 <= k <= n, have n = {n} samples")
    c = torch.as_tensor(correct).double()
    j = torch.arange(n - k + 1, n + 1, dtype=torch.float64)         # C(n-c, k) / C(n, k) = prod_j (1 - c / j): 0 once c > n - k
    return 1 - (1 - c[..., None] / j).prod(-1)


# ---------------------------------------------------------------------------------------------------------------------------
# Training

def build(config, device):
    if config.init:         # fp32 weights; bf16 is for the products (autocast) and for the copy that samples
        model = checkpoint_for(task_of(config), "--init", config.init, config.max_new_tokens)
    else:
        model = GPT(GPTConfig(tokenizer.n_vocab, 256, config.n_layer, config.n_head, config.n_embd, qk_norm=True))
    model.checkpointing = config.checkpointing
    return model.to(device)


def check_memory(config, shape, device):
    """UserError if the machine is smaller than what is held at once, at the least: said before anything is allocated. shape: a GPTConfig."""
    number = 2 if config.dtype == "bfloat16" else 4
    tokens = config.max_new_tokens + (task_of(config).longest if config.data else 4 * config.digits)
    rows = config.prompts * config.group
    at_once = max(rows // world()[1], config.eval_samples)
    layers = shape.n_layer * shape.n_embd * number          # of one token: what each layer was given is kept for the backward pass
    for size, what in ((at_once * tokens * shape.n_layer * shape.n_kv_head * shape.head_dim * 2 * number, f"keys and values of {at_once:,} answers at once"),
                       (min(config.micro_batch, rows) * tokens * layers, f"a backward pass over --micro-batch {config.micro_batch:,} rows"),
                       (config.sft_batch // 2 * LINE * layers * (not config.init), f"a backward pass over --sft-batch {config.sft_batch:,} rows"),
                       (config.eval_prompts * config.eval_samples * 50, f"{config.eval_prompts:,} x {config.eval_samples:,} held-out answers")):
        need_memory(size, what, device)


def draw_demonstration(rng, digits):
    """A question and a demonstrator's answer. Shorter problems teach the same steps sooner."""
    problem = draw_problem(rng, rng.randint(1, digits))
    return question(problem), demonstrate(rng, problem)


def warm_up(config, run, seed, device, draw=draw_demonstration):
    """Supervised training on drawn (question, answer) texts, from scratch -> the base model. Loss on the answer's tokens only."""
    phase, rng = f"base {seed}", random.Random(seed)
    torch.manual_seed(seed)
    model = build(config, device)
    if config.init:         # somebody else has warmed it up
        return model
    optimizer = torch.optim.AdamW(model.parameters(), config.sft_lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    for step in run.loop(phase, config.sft_steps, model, optimizer, rng):
        for g in optimizer.param_groups:
            g["lr"] = config.sft_lr * min((step + 1) / 50, 1 - step / config.sft_steps)
        texts = [draw(rng, config.digits) for _ in range(config.sft_batch)]
        pairs = sorted(((tokenizer.encode(q), tokenizer.encode(a) + [tokenizer.eos]) for q, a in texts), key=lambda p: len(p[0] + p[1]))
        count, total = sum(len(a) for _, a in pairs), 0.0
        optimizer.zero_grad()
        for part in (pairs[:len(pairs) // 2], pairs[len(pairs) // 2:]):         # the short half, then the long one: less padding
            T = max(len(q + a) for q, a in part)
            ids, mask = torch.zeros(len(part), T, dtype=torch.long), torch.zeros(len(part), T)
            for i, (q, a) in enumerate(part):
                ids[i, :len(q + a)], mask[i, len(q):len(q + a)] = torch.tensor(q + a), 1
            ids, mask = ids.to(device), mask.to(device)
            with torch.autocast(device, torch.bfloat16, enabled=config.dtype == "bfloat16"):
                logp, _ = token_logprobs(model.hidden(ids[:, :-1]), model.lm_head.weight, ids[:, 1:])
            loss = -(logp * mask[:, 1:]).sum() / count
            loss.backward()
            total += loss.item()
        descend(optimizer, total)
        if step % 50 == 0 or step + 1 == config.sft_steps:
            run.log(phase="sft", seed=seed, step=step, loss=total)
            run.bar.set_postfix_str(f"loss {total:.3f}")
    return same_weights(model)


def score(model, rollout, config, T):
    """Log-probability and entropy (R, T) of each token under the temperature it was sampled with. Meaningless where mask is 0."""
    with torch.autocast(rollout.ids.device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
        logp, entropy = token_logprobs(model.hidden(rollout.ids[:, :-1]), model.lm_head.weight, rollout.ids[:, 1:], config.temperature)
    pad = (1, T - rollout.ids.shape[1])     # a micro-batch of short rows is cut to its longest
    return F.pad(logp, pad), F.pad(entropy, pad)


def answers(model, prompts, n, config, generator, uniforms=None):
    """generate with the flags' temperature, budget and dtype, which `score` uses, too."""
    sampling = copy.deepcopy(model).bfloat16() if config.dtype == "bfloat16" else model
    return generate(sampling, prompts, n, config.max_new_tokens, config.temperature, stop=task_of(config).tokenizer.stop, generator=generator, uniforms=uniforms)


def sample(model, problems, n, config, generator, sampler="iid", mine=slice(None)):
    """-> Rollout of n answers per problem, their texts, their rewards (P, n). mine: the slice of the problems that this process answers."""
    task, (first, end, _) = task_of(config), mine.indices(len(problems))
    uniforms = group_uniforms(len(problems), n, sampler, generator)
    skip_draws(first * n, config, generator)
    rollout = answers(model, [task.prompt(p) for p in problems[mine]], n, config, generator, None if uniforms is None else uniforms[first * n:end * n])
    skip_draws((len(problems) - end) * n, config, generator)
    texts = rollout.texts(task.tokenizer)
    last = rollout.ids.gather(1, (rollout.prompt_lens + rollout.lengths - 1)[:, None]).squeeze(1)
    finished = torch.isin(last, torch.tensor(task.tokenizer.stop, device=last.device)).tolist()
    rewards = torch.tensor([task.judge(problems[first + i // n], t, finished[i]) for i, t in enumerate(texts)])
    return rollout, texts, rewards.view(-1, n)


def collect(model, config, rng, generator):
    """One batch of rollouts -> (rollout of this process's prompts, rewards (P, G) of all, statistics of all that was sampled).

    Dynamic sampling (DAPO) keeps sampling until `prompts` groups have both right and wrong answers, at most 4 times; P may be less.
    """
    mine, G, dynamic, draw = share(config.prompts), config.group, config.method.dynamic, task_of(config).draw
    kept, rows, rewards = [], [], []        # this process's groups, the places of their rows in the batch; the rewards of all groups
    tokens = dull = right = seen = 0
    while seen == 0 or (dynamic and len(rewards) < config.prompts and seen < 4 * config.prompts):
        problems = [draw(rng) for _ in range(config.prompts)]
        rollout, _, r = sample(model, problems, G, config, generator, config.sampler, mine)
        r = gathered(r, mine, config.prompts)
        mixed = r.std(1) > 0
        seen += config.prompts
        tokens += int(all_sum(rollout.mask.sum()))
        dull += int((~mixed).sum())
        right += r.mean(1).sum().item()
        for i in range(config.prompts):
            if (mixed[i] or not dynamic) and len(rewards) < config.prompts:
                if mine.start <= i < mine.stop:
                    kept.append(rollout[slice((i - mine.start) * G, (i - mine.start + 1) * G)])
                    rows += range(len(rewards) * G, len(rewards) * G + G)
                rewards.append(r[i])
    if not rewards:         # nothing mixed in 4 batches: the last one as it is (advantages within groups are all 0)
        kept, rows, rewards = [rollout], range(mine.start * G, mine.stop * G), list(r)
    rollout = Rollout.cat(kept or [rollout[:0]])
    rollout.rows = torch.tensor(list(rows), dtype=torch.long)
    return rollout, torch.stack(rewards), dict(reward=right / seen, zero_variance=dull / seen, tokens=tokens)


@torch.no_grad()
def score_all(model, rollout, config):
    """score's log-probabilities without gradients, in micro-batches."""
    rows = torch.arange(len(rollout.ids)).split(config.micro_batch)
    return torch.cat([score(model, rollout[r], config, rollout.ids.shape[1])[0] for r in rows if len(r)] or [rollout.logp])


def update(model, base, optimizer, rollout, rewards, config, generator):
    """The gradient steps of one rollout batch -> metrics. rewards (P, G) are those of all rows, of which the rollout may hold a process's share."""
    method, mask, R, tokens = config.method, rollout.mask, rewards.numel(), all_sum(rollout.mask.sum())
    mine = torch.arange(R) if rollout.rows is None else rollout.rows
    place = torch.full((R,), -1).index_copy(0, mine, torch.arange(len(mine)))       # of each row in this process's rollout, -1: in another's
    kl_in_reward = config.beta > 0 and config.kl_in == "reward"
    old_logp = score_all(model, rollout, config) if config.minibatches > 1 or kl_in_reward else None
    ref_logp = score_all(base, rollout, config) if config.beta else None
    adv = advantages(rewards.to(mask.device), method.advantage)
    if kl_in_reward:        # with the same baseline, but never divided by std
        k1 = gathered((kl_estimate(old_logp, ref_logp, "k1") * mask).sum(1), mine, R).view_as(adv)
        adv = adv - config.beta * advantages(k1, "mean" if method.advantage == "std" else method.advantage)
    if config.positive_only:
        adv = adv.clamp_min(0)
    adv = adv.reshape(R, 1)[mine]
    order = torch.arange(R) if config.minibatches == 1 else torch.randperm(R, generator=generator)
    minibatches = order.tensor_split(config.minibatches)
    total, norm = dict(loss=0.0, entropy=0.0, clip_fraction=0.0) | (dict(kl=0.0) if config.beta else {}), 0.0
    for minibatch in minibatches:
        here = place[minibatch][place[minibatch] >= 0]
        weights = aggregation_weights(mask[here], method.aggregation, config.max_new_tokens, len(minibatch), all_sum(mask[here].sum()))
        optimizer.zero_grad()
        for rows, a in zip(here.split(config.micro_batch), weights.split(config.micro_batch)) if len(here) else ():
            m = mask[rows]
            logp, entropy = score(model, rollout[rows], config, mask.shape[1])
            old = logp.detach() if old_logp is None else old_logp[rows]     # the only gradient step: the old policy is this one
            loss, silenced = surrogate(logp, old, adv[rows], m, method.ratio, method.eps_low, method.eps_high)
            loss = loss * correction_weights(old, rollout.logp[rows], m, config.correction) - config.entropy_bonus * entropy
            if config.beta:
                kl = kl_estimate(logp, ref_logp[rows], config.kl or "k3")
                total["kl"] += ((kl * m).sum() / tokens).item()
                loss = loss + config.beta * kl if config.kl_in == "loss" else loss
            (a * loss).sum().backward()
            total["loss"] += (a * loss).sum().item() / len(minibatches)
            total["entropy"] += ((entropy * m).sum() / tokens).item()
            total["clip_fraction"] += (silenced.sum() / tokens).item()
        sum_gradients(model)
        norm += descend(optimizer, all_sum(torch.tensor(total["loss"]))) / len(minibatches)
    return dict(zip(total, all_sum(torch.tensor(list(total.values()), dtype=torch.float64)).tolist()), grad_norm=norm)


def evaluate(model, config, n):
    """n answers to each held-out problem -> how many are right (P,), and the mean of `guessed_carries` over the answers that have such lines, None if none has."""
    rng, generator = random.Random("held out"), torch.Generator().manual_seed(0)
    problems = task_of(config).held_out(rng, config.eval_prompts)
    size, mine = max(1, config.prompts * config.group // n), share(len(problems))   # as many rows at once as in training: more are slower on a CPU
    skip_draws(mine.start * n, config, generator)
    parts = [sample(model, problems[i:min(i + size, mine.stop)], n, config, generator)[1:] for i in range(mine.start, mine.stop, size)]
    texts, rewards = [t for texts, _ in parts for t in texts], torch.cat([torch.zeros(0, n)] + [r for _, r in parts])
    guesses = [g for g in map(guessed_carries, texts) if g is not None]
    total, count = all_sum(torch.tensor([sum(guesses), len(guesses)], dtype=torch.float64)).tolist()
    return gathered(rewards.sum(1), mine, len(problems)), total / count if count else None


def held_out(model, config, n=None, ks=None):
    """pass@k of n answers to each held-out problem (k: 1 and n, unless ks says otherwise) and guessed carries, by their names in a row of metrics."""
    n = n or config.eval_samples
    correct, guesses = evaluate(model, config, n)
    return {f"pass@{k}": pass_at_k(n, correct, k).mean().item() for k in ks or (1, n)} | ({} if config.data else {"guessed_carries": guesses})


def mean(x):
    """Of nothing there is no mean: None, not nan."""
    return x.mean().item() if len(x) else None


def told(x):
    """The mean of x (seeds,) and its standard deviation, as text."""
    return f"{x.mean():.3g}" + (f" ± {x.std(ddof=1):.2g}" if len(x) > 1 else "")


SHOWN = ("step", "reward", "pass@1", "guessed_carries", "entropy", "length_right", "length_wrong", "zero_variance", "clip_fraction", "tokens_per_s")


def train(config, run, arm, seed, base, tokens=math.inf):
    """RL from the base for config.steps steps, or until `tokens` are sampled -> the trained model, with --init saved, too. One row of metrics a step."""
    # 1. A copy of the base, an optimizer, two random streams: problems, and everything else
    phase, model = f"{arm} {seed}", copy.deepcopy(base)
    optimizer = torch.optim.AdamW(model.parameters(), config.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    rng, generator = random.Random(seed + 1), torch.Generator().manual_seed(seed + 1)
    if phase not in run.state:
        run.log(phase="rl", arm=arm, seed=seed, step=0, sampled_tokens=0, **held_out(model, config))
    shown = [k for k in SHOWN if k != "guessed_carries" or not config.data]
    print("  ".join(shown))
    kept = dict(sampled=0)
    for step in run.loop(phase, config.steps, model, optimizer, rng, generator, kept, until=lambda: kept["sampled"] >= tokens, bar=False):
        # 2. Sample, score with the verifier, take the gradient steps
        started = time.time()
        rollout, rewards, stats = collect(model, config, rng, generator)
        metrics = update(model, base, optimizer, rollout, rewards, config, generator)
        tokens_now, seconds = stats.pop("tokens"), time.time() - started
        kept["sampled"] += tokens_now
        # 3. Log
        lengths, right = gathered(rollout.lengths.float().cpu(), rollout.rows, rewards.numel()), rewards.flatten() > 0
        row = dict(phase="rl", arm=arm, seed=seed, step=step + 1, **stats, **metrics, length=mean(lengths), length_right=mean(lengths[right]),
                   length_wrong=mean(lengths[~right]), sampled_tokens=kept["sampled"], seconds=seconds, tokens_per_s=tokens_now / seconds)
        if (step + 1) % config.eval_every == 0 or step + 1 == config.steps or kept["sampled"] >= tokens:
            row |= held_out(model, config)
        run.log(**row)
        cells = (f"{row[k]:.{3 if isinstance(row[k], float) and row[k] < 10 else 0}f}" if row.get(k) is not None else "" for k in shown)
        print("  ".join(f"{cell:>{len(k)}}" for k, cell in zip(shown, cells)), flush=True)
    if config.init and world()[0] == 0:
        model.save_pretrained(run.dir / phase, like=config.init, stop=task_of(config).tokenizer.stop)
    return model


# ---------------------------------------------------------------------------------------------------------------------------
# The length bias, without a model

def length_bias(advantage, aggregation, seed, steps=300, prompts=32, group=8, cap=64, hazard=0.1, lr=2.0):
    """A policy that is right or wrong by a coin it can't influence, and stops with a learnt hazard, one for each outcome.

    Nothing about length is rewarded, so an unbiased loss leaves both lengths alone. -> expected length (steps + 1, 2): wrong, right.
    """
    rng = np.random.default_rng(seed)
    logit, path = np.full(2, np.log(hazard / (1 - hazard))), []
    for step in range(steps + 1):
        h = 1 / (1 + np.exp(-logit))
        path.append((1 - (1 - h) ** cap) / h)       # the mean of a geometric length cut at the cap
        right = rng.integers(0, 2, prompts * group)
        drawn = rng.geometric(h[right])
        length = np.minimum(drawn, cap)
        mask = torch.as_tensor(np.arange(cap) < length[:, None]).float()
        a = aggregation_weights(mask, aggregation, 1 / hazard)[:, 0].numpy()       # one weight for all tokens of a row
        adv = advantages(torch.as_tensor(right).float().view(prompts, group), advantage).flatten().numpy()
        slope = a * adv * ((drawn <= cap) - h[right] * length)      # d logp / d logit: 1 for a stop that was drawn, -h for each draw
        logit = logit + lr * np.array([slope[right == 0].sum(), slope[right == 1].sum()])
    return np.array(path)


def draw_rambling(rng, _):
    """A question that says whether its answer is right (1) or wrong (0), and an answer of random digits that stops with probability 0.1."""
    return f"{rng.randrange(2)}=", "".join(rng.choice("0123456789") for _ in range(int(math.log(1 - rng.random()) / math.log(0.9))))


def length_bias_gpt(config, run, arm, seed, base):
    """The same for a GPT that rambles: a coin, which the question shows, decides whether the answer counts as right."""
    model, rng, generator = copy.deepcopy(base), random.Random(seed), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), config.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    phase = f"{arm} {seed}"
    for step in run.loop(phase, config.steps, model, optimizer, rng, generator, bar=False):
        coins = torch.tensor([rng.randrange(2) for _ in range(config.prompts * config.group)])
        questions = [tokenizer.encode(f"{c}=") for c in coins.tolist()]
        rollout = answers(model, questions, 1, config, generator)
        update(model, base, optimizer, rollout, coins.float().view(config.prompts, config.group), config, generator)
        wrong, right = (mean(rollout.lengths[coins == c].float()) for c in (0, 1))
        run.log(phase="rl", arm=arm, seed=seed, step=step + 1, length_right=right, length_wrong=wrong)
        if step + 1 == config.steps:
            print(f"{arm}, seed {seed}: wrong answers {wrong or math.nan:.1f} tokens, right answers {right or math.nan:.1f}")


# ---------------------------------------------------------------------------------------------------------------------------
# Figures and claims

def figure_train(config, run, device):
    real, arms = bool(config.data), ("base", config.loss)
    n = config.eval_samples if real else 4 if config.quick else 64
    ks = [2 ** i for i in range(int(math.log2(n)) + 1)]
    for seed in seeds_of(config):
        base = warm_up(config, run, seed, device)
        trained = train(config, run, config.loss, seed, base)
        for arm, model in zip(arms, (base, trained)):
            run.log_once(lambda: held_out(model, config, n, ks), phase="pass@k", arm=arm, seed=seed, step=config.steps)

    def final(arm, key):
        """(seeds,); nan for a seed that has no such number."""
        rows = [r for r in run.rows if r["phase"] == "pass@k" and r["arm"] == arm]
        return np.array([[r[key] for r in rows if r["seed"] == seed][-1] for seed in seeds_of(config)], dtype=float)

    p0, p1 = (final(arm, "pass@1") for arm in arms)
    g0, g1 = (None, None) if real else (final(arm, "guessed_carries") for arm in arms)
    print(f"\nheld-out pass@1: base {p0.mean():.3f}, {config.loss} {p1.mean():.3f}" + ("" if real else f"; guessed carries {g0.mean():.3f}, {g1.mean():.3f}"))

    fig, axes = plt.subplots(2, 3, figsize=(13, 7), layout="constrained")
    what = f"{Path(config.init).name} on {Path(config.data).name}" if real else f"Told only right or wrong: guessed carries {g0.mean():.2f} → {g1.mean():.2f}"
    fig.suptitle(f"{what}, held-out pass@1 {p0.mean():.2f} → {p1.mean():.2f} ({config.seeds} seed{'s' if config.seeds > 1 else ''})")
    panels = [("Answers that are right", "fraction", {"reward": "training problems", "pass@1": "held-out problems"}),
              ("Gradient", "norm", {"grad_norm": "before it is cut to 1"}) if real else
              ("Lines whose carry was a guess", "fraction", {"guessed_carries": "held-out problems"}),
              ("Entropy", "nats per token", {"entropy": "training problems"}),
              ("Length of right and wrong answers", "tokens", {"length_right": "right", "length_wrong": "wrong"}),
              ("Groups all right or all wrong", "fraction", {"zero_variance": "training problems"})]
    for ax, (title, unit, keys) in zip(axes.flat, panels):
        for key, label in keys.items():
            band(ax, *series(run, key, phase="rl", arm=config.loss), label)
        ax.set(title=title, xlabel="RL step", ylabel=unit)
        if ax.lines:
            ax.legend()
    curves = [np.stack([final(arm, f"pass@{k}") for k in ks], 1) for arm in arms]       # (seeds, len(ks)) each
    for curve, label in zip(curves, ("base", "after RL")):
        band(axes[1, 2], ks, curve, label, marker="o")
    last, trained_last = (curve[:, -1].mean() for curve in curves)
    unseen = "\n(both at 1: a crossing can't be seen)" if last == trained_last == 1 else ""
    axes[1, 2].set(title=f"pass@{n}: base {last:.2f}, after RL {trained_last:.2f}{unseen}", xlabel="k (samples)", ylabel="held-out pass@k", xscale="log", ylim=(0, 1.02))
    axes[1, 2].set_xticks(ks, ks)
    axes[1, 2].minorticks_off()
    axes[1, 2].legend()
    source = "-" if real else "design of the task"
    gain = claim("gain", "held-out pass@1 after RL minus before, worst seed", source, "-", (p1 - p0).min(), ">=", 0.05 if real else 0.5, config.seeds,
                 f" ({p0.mean():.2f}, {p1.mean():.2f})")
    return fig, [gain] if real else [
        gain, claim("trained", "pass@1 after RL, worst seed", source, "-", p1.min(), ">=", 0.90, config.seeds),
        claim("order", "carries guessed after RL, worst seed (base)", source, "-", g1.max(), "<=", 0.05, config.seeds, f" ({g0.mean():.2f})")]


def figure_variants(config, run, device):
    budget = 1_000 if config.quick else 300_000
    for seed in seeds_of(config):
        base = warm_up(config, run, seed, device)
        for loss in LOSSES:
            train(replace(config, loss=loss), run, loss, seed, base, tokens=budget)
    rows = {loss: [[r for r in run.rows if r.get("arm") == loss and r["seed"] == s] for s in seeds_of(config)] for loss in LOSSES}
    reach = min(budget, *(rs[-1]["sampled_tokens"] for of_loss in rows.values() for rs in of_loss))      # --steps may end an arm before the budget
    fig, axes = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
    grid, final, clip = np.linspace(0, reach, 21), {}, {}
    for loss in LOSSES:     # answers differ in length: put every seed's evaluations on one grid of sampled tokens
        evals = [[(r["sampled_tokens"], r["pass@1"]) for r in rs if "pass@1" in r] for rs in rows[loss]]
        y = np.array([np.interp(grid, *zip(*e)) for e in evals])
        if loss == "grpo":
            band(axes[0], grid / 1e3, y, loss, color="k")
        else:
            axes[0].plot(grid / 1e3, y.mean(0), label=loss)
        final[loss], start = y[:, -1], y[:, 0]
        clip[loss] = np.array([np.mean([r["clip_fraction"] for r in rs if r["step"]] or [math.nan]) for rs in rows[loss]])
    many, where = f"{config.seeds} seed{'s' if config.seeds > 1 else ''}", f"at {reach / 1000:.3g}k sampled tokens"
    axes[0].set(xlabel="sampled tokens (thousands)", ylabel="held-out pass@1", title=f"Means ({config.minibatches} gradient steps per batch); shaded: grpo's spread over {many}")
    axes[0].legend()
    # all losses start from the same base and meet the same problems, seed by seed: what differs between them is told by pairs
    paired = {loss: final[loss] - final["grpo"] for loss in LOSSES if loss != "grpo"}
    order = sorted(paired, key=lambda loss: paired[loss].mean())
    spread = [paired[loss].std(ddof=1) if config.seeds > 1 else 0 for loss in order]
    colours = dict(zip([loss for loss in LOSSES if loss != "grpo"], (f"C{i}" for i in range(9))))      # those of the curves
    axes[1].errorbar(range(len(order)), [paired[loss].mean() for loss in order], spread, fmt="_", ms=20, capsize=4, color="k")
    for i, loss in enumerate(order):
        axes[1].plot([i] * config.seeds, paired[loss], "o", color=colours[loss], alpha=0.6)
    axes[1].axhline(0, color="k", lw=1, ls=":")
    axes[1].set_xticks(range(len(order)), order)
    axes[1].set(ylabel="held-out pass@1 minus grpo's", title=f"{where.capitalize()}, minus grpo on the same seed; a dot is a seed")
    low, high = (f"{told(paired[loss])} ({loss})" for loss in (order[0], order[-1]))
    fig.suptitle(f"Held-out pass@1 of six losses {where}, minus grpo's on the same seed: from {low} to {high}")
    worst, furthest = order[0], max(order, key=lambda loss: abs(paired[loss].mean()))
    worst = worst if paired[worst].mean() < 0 else "grpo"
    with np.errstate(divide="ignore", invalid="ignore"):
        clipped = clip["gspo"] / clip["grpo"]
    distance = paired[furthest] * np.sign(paired[furthest].mean())
    distance = np.where(final["grpo"] > start, distance, math.nan)      # where nothing is learnt all are alike, and that is not what is claimed
    source = "Yue et al., arXiv 2504.13837"
    return fig, [
        claim("all learn", f"gain in pass@1 of the least successful loss ({worst})", source, "all learn", final[worst] - start, ">=", 0.2, config.seeds),
        claim("similar", f"pass@1, furthest from grpo on the same seed ({furthest})", source, "six are similar",
              distance, "<=", 0.05, config.seeds),
        claim("gspo clips more", "tokens clipped, GSPO over GRPO (fractions)", "Zheng et al., arXiv 2507.18071", "about 100x", clipped, ">=", 10, config.seeds,
              f" ({clip['gspo'].mean():.2g}, {clip['grpo'].mean():.2g})")]


def figure_length(config, run, device):
    arms = {"grpo": ("std", "sequence"), "token mean of the batch": ("std", "token"), "dr_grpo": ("mean", "constant")}
    paths = {arm: np.array([length_bias(*choice, config.seed + i) for i in range(8)]) for arm, choice in arms.items()}      # (8, steps + 1, 2)
    for seed in seeds_of(config):
        base = warm_up(config, run, seed, device, draw_rambling)
        for loss in ("grpo", "dr_grpo"):
            length_bias_gpt(replace(config, loss=loss), run, loss, seed, base)
    fig, axes = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
    for i, (arm, p) in enumerate(paths.items()):
        for outcome, (name, style) in enumerate((("wrong", "-"), ("right", "--"))):
            band(axes[0], np.arange(p.shape[1]), p[:, :, outcome], f"{arm}, {name}", ls=style, color=f"C{i}")
            if arm in LOSSES:
                band(axes[1], *series(run, f"length_{name}", phase="rl", arm=arm), f"{arm}, {name}", ls=style, color=f"C{i}")
    axes[0].set(title="Without a model: one stop probability per outcome (8 seeds)", xlabel="step", ylabel="expected length (tokens)")
    axes[1].set(title=f"With a GPT ({config.seeds} seeds)", xlabel="RL step", ylabel="mean length (tokens)")
    for ax in axes:
        if ax.lines:
            ax.legend()
    ratio = {arm: p[:, -1, 0] / p[:, -1, 1] for arm, p in paths.items()}
    gpt = {}
    for arm in ("grpo", "dr_grpo"):
        wrong, right = (series(run, f"length_{name}", phase="rl", arm=arm)[1] for name in ("wrong", "right"))
        tails = [y[:, -10:].mean(1) if y.ndim == 2 else np.array([math.nan]) for y in (wrong, right)]       # (seeds,); --steps 0 has no rows
        gpt[arm] = np.where(tails[0] > 1, tails[0] / tails[1], math.nan)        # a wrong answer that is a stop alone has no length to speak of
    flat = lambda ratio: np.maximum(ratio, 1 / ratio)
    fig.suptitle(f"Nothing rewards length. With a GPT wrong answers end {told(gpt['grpo'])} times as long as right ones "
                 f"if a loss is divided by its answer's length, {told(gpt['dr_grpo'])} times if by a constant", fontsize="medium")
    source = "Liu et al., arXiv 2503.20783"
    return fig, [
        claim("grpo", "no model: wrong over right length, grpo", source, "wrong grow", ratio["grpo"], ">=", 5, 8),
        claim("token", "no model: token mean of the batch, minus grpo's", "derived", "below grpo", ratio["token mean of the batch"] - ratio["grpo"], "<", 0, 8),
        claim("dr_grpo", "no model: the longer over the shorter, dr_grpo", source, "flat", flat(ratio["dr_grpo"]), "<=", 1.2, 8),
        claim("gpt grpo", "GPT: wrong over right length, grpo", source, "wrong grow", gpt["grpo"], ">=", 5, config.seeds),
        claim("gpt dr_grpo", "GPT: the longer over the shorter, dr_grpo", source, "flat", flat(gpt["dr_grpo"]), "<=", 1.2, config.seeds)]


def main():
    config = parse_args(Config, __doc__)
    device = pick_device(config.device)
    join(device)
    if world()[1] > (1 if config.figure == "length" else config.prompts):
        raise UserError(f"{world()[1]} processes: --figure length takes one, the others no more than there are --prompts")
    model = build(config, device)       # an impossible shape ends here, before anything is written
    check_memory(config, model.config, device)
    size = sum(p.numel() for p in model.parameters())
    del model
    inputs = {f"--{name}": fingerprint(getattr(config, name)) for name in ("init", "data") if config.init}
    with Run(config, [f"{config.loss} {seed}" for seed in seeds_of(config)] if config.init else (), inputs) as run:
        run.introduce(device, size)
        fig, claims = globals()[f"figure_{config.figure}"](config, run, device)
        run.finish(fig, claims)


if __name__ == "__main__":
    command(main)
