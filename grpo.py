"""grpo.py: reinforcement learning with verifiable rewards, whole: a task, a base model, a policy gradient, an honest evaluation.

    python grpo.py                        the main run: `train`, under 3 minutes on two cores
    python grpo.py --figure variants      every loss at the same number of sampled tokens, 3 seeds
    python grpo.py --figure length        why wrong answers grow long under GRPO, without a model and with one

The task is column addition. A problem is two numbers, their digits named by column; the answer fills in the columns, one by one:

    c8C3b3B7a1A6=       831 + 376: column c holds 8 and 3, b holds 3 and 7, a (the units) 1 and 6
    a1A6007             column a: 1 and 6, carry in 0, make 07
    b3B7010             column b: 3 and 7, carry in 0, make 10
    c8C3112             column c: 8 and 3, carry in 1, make 12          the last digits say 207, the last carry 1: reward 1

The base model is trained on demonstrators who take the columns in random order, guess a carry that they can't know yet, and now
and then go back to a column. It can do every step, and is right about a third of the time. The reward says only whether the
final digits are right. What RL has to discover is what every child is told: work from right to left, and nothing is guessed.

The loss, with rho = exp(logp - old_logp), is four independent choices (`LOSSES` names the usual combinations, as TRL does):

    loss = sum_{i,t} a_{i,t} * w_{i,t} * L(rho_{i,t}, A_i)  +  beta * KL  -  entropy_bonus * H
    1. advantage    A_i:  r_i - mean, that over std, or r_i - mean of the others (rloo), or r_i - batch mean (reinforce)
    2. ratio        L:    none -A logp;  token and sequence -min(rho A, clip(rho, 1 - eps_low, 1 + eps_high) A);  cispo
    3. aggregation  a:    how a token's loss is weighted: by its sequence's length, the batch's tokens, a constant, or not at all
    4. correction   w:    old policy over sampler, truncated, where the sampler is not the policy that is trained (bf16)

How this differs from the papers:
1. One gradient step per rollout batch (--minibatches 1), so rho = 1 and clipping is idle: right for a small model. `variants` takes 4.
2. DAPO (arXiv 2503.14476): clip-higher, token aggregation and dynamic sampling; no overlong reward, the task has no long answers.
3. GSPO's clip range (arXiv 2507.18071) is wider: log s has a larger spread in a model this small.

What to see: held-out pass@1 from about .3 to over .9 in 60 steps; guessed carries from a third of the columns to almost none.
The loss of a policy gradient says nothing (on-policy its value is near 0 by construction): watch `reward` and `pass@1`.
"""
import copy
import math
import random
import time
import zlib
from dataclasses import dataclass, replace
from types import SimpleNamespace

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from kernels import token_logprobs
from model import (GPT, CharTokenizer, GPTConfig, Rollout, Run, UserError, command, flag, generate, parse_args, pick_device)

FIGURES = {"train": "one run: reward, pass@1, entropy, lengths, pass@k against the base (under 3 minutes)",
           "variants": "every loss at the same number of sampled tokens (about 25 minutes at 3 seeds)",
           "length": "the length bias of the 1/|o| normalisation, model-free and with the GPT (about 8 minutes at 3 seeds)"}
# name: advantage, ratio, eps_low, eps_high, aggregation, dynamic sampling; methods in the order of their papers
LOSSES = {"reinforce": ("batch", "none", 0.2, 0.2, "sum", False),
          "rloo": ("rloo", "none", 0.2, 0.2, "sum", False),             # Ahmadian et al., arXiv 2402.14740
          "grpo": ("std", "token", 0.2, 0.2, "sequence", False),        # Shao et al., arXiv 2402.03300
          "dr_grpo": ("mean", "token", 0.2, 0.2, "constant", False),    # Liu et al., arXiv 2503.20783
          "dapo": ("std", "token", 0.2, 0.28, "token", True),           # Yu et al., arXiv 2503.14476
          "gspo": ("std", "sequence", 0.03, 0.04, "sequence", False),   # Zheng et al., arXiv 2507.18071
          "cispo": ("std", "cispo", 1.0, 4.0, "token", False)}          # MiniMax-M1, arXiv 2506.13585; cap 5 as in ScaleRL


@dataclass
class Config:
    seed: int = flag(0, "random seed; with --seeds K: the first of K")
    seeds: int = flag(None, "repeat over this many seeds (default: 1 for train, 3 for the others)", low=1)
    device: str = flag("auto", "where to run", choices=("auto", "cpu", "cuda", "mps"))
    dtype: str = flag("float32", "bfloat16: autocast training, sampling from a bf16 copy", choices=("float32", "bfloat16"))
    out: str = flag("out/grpo", "folder for figure, metrics, claims and checkpoint")
    resume: bool = flag(False, "go on from the checkpoint in --out")
    quick: bool = flag(False, "a run of a few seconds that shows nothing but that it runs")
    figure: str = flag("train", "which figure: " + "; ".join(f"{k}: {v}" for k, v in FIGURES.items()), choices=tuple(FIGURES))
    steps: int = flag(60, "RL steps", quick=2, low=0)
    loss: str = flag("dr_grpo", "the method; the next five flags override its choices one by one", choices=tuple(LOSSES))
    advantage: str = flag(None, "std | mean | rloo | batch", choices=("std", "mean", "rloo", "batch"))
    ratio: str = flag(None, "none | token | sequence | cispo", choices=("none", "token", "sequence", "cispo"))
    aggregation: str = flag(None, "sequence | token | constant | sum", choices=("sequence", "token", "constant", "sum"))
    eps_low: float = flag(None, "clip range below 1", low=0)
    eps_high: float = flag(None, "clip range above 1", low=0)
    correction: str = flag("none", "weight for old policy over sampler: tis (per token), seq_tis, mis (drop)", choices=("none", "tis", "seq_tis", "mis"))
    beta: float = flag(0.0, "coefficient of the KL to the base model", low=0)
    kl: str = flag("k3", "KL estimator (Schulman 2020)", choices=("k1", "k2", "k3"))
    kl_in: str = flag("loss", "where the KL goes", choices=("loss", "reward"))
    entropy_bonus: float = flag(0.0, "coefficient of the entropy", low=0)
    positive_only: bool = flag(False, "mask negative advantages")
    sampler: str = flag("iid", "a group's uniforms: independent, or spread out (QuasiMoTTo, arXiv 2607.01179)", choices=("iid", "stratified", "lattice"))
    prompts: int = flag(32, "problems per step", quick=4, low=1)
    group: int = flag(16, "samples per problem", quick=4, low=2)
    minibatches: int = flag(1, "gradient steps per rollout batch", low=1)
    micro_batch: int = flag(512, "rows per forward pass; changes memory, never the gradient", low=1)
    temperature: float = flag(1.0, "sampling temperature, in training and evaluation; the scorer uses the same", low=1e-3)
    lr: float = flag(3e-4, "RL learning rate (AdamW, constant)", low=0)
    digits: int = flag(5, "columns of a problem", low=1, high=8)
    max_new_tokens: int = flag(56, "budget of an answer; unfinished ones are wrong", low=1, high=224)
    n_layer: int = flag(2, "layers", low=1)
    n_head: int = flag(8, "heads", low=1)
    n_embd: int = flag(128, "channels", quick=32, low=8)
    sft_steps: int = flag(1200, "steps of supervised warm-up", quick=10, low=0)
    sft_batch: int = flag(32, "demonstrations per warm-up step", low=1)
    sft_lr: float = flag(3e-3, "warm-up learning rate (linear to 0)", low=0)
    eval_every: int = flag(10, "RL steps between evaluations", low=1)
    eval_prompts: int = flag(128, "held-out problems", quick=8, low=1)

    def __post_init__(self):
        if self.beta and self.kl == "k1" and self.kl_in == "loss":
            raise UserError("--kl k1 in the loss has a gradient of mean zero, it pulls nowhere: use --kl k2 or k3, or --kl-in reward")

    @property
    def method(self):
        """The choices that --loss makes, after the flags that override them."""
        names = "advantage", "ratio", "eps_low", "eps_high", "aggregation", "dynamic"
        chosen = {n: v if getattr(self, n, None) is None else getattr(self, n) for n, v in zip(names, LOSSES[self.loss])}
        return SimpleNamespace(**chosen)


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
    """The fraction of lines, units apart, that were written before the column to their right: their carry was a guess."""
    columns = text[::LINE]
    lines = [i for i, c in enumerate(columns) if c != "a"]
    return sum(COLUMNS[COLUMNS.find(columns[i]) - 1] not in columns[:i] for i in lines) / max(len(lines), 1)


# ---------------------------------------------------------------------------------------------------------------------------
# The algorithm

def group_uniforms(prompts, group, kind, generator):
    """One number in [0, 1) per row (prompts * group,), float64, each uniform on its own; None for independent tokens.

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
    """rewards (P, G) -> advantages (P, G). Of a group with equal rewards (but for `batch`): exactly 0, not noise over epsilon."""
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
    if ratio == "sequence":     # GSPO: the geometric mean over the sequence; its value for every token, the token's own gradient
        mean = (log_rho * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp_min(1)
        log_rho = mean.detach() + logp - logp.detach()
    rho = log_rho.clamp(-20, 20).exp()
    clipped = rho.clamp(1 - eps_low, 1 + eps_high)
    if ratio == "cispo":        # the weight is clipped, the gradient never lost
        return -clipped.detach() * adv * logp, torch.zeros_like(mask)
    silenced = ((adv > 0) & (rho > 1 + eps_high)) | ((adv < 0) & (rho < 1 - eps_low))
    return -torch.minimum(rho * adv, clipped * adv), silenced.float() * mask


def aggregation_weights(mask, kind, budget):
    """(R, T) weights; the loss is their sum with the per-token loss. Made from the WHOLE batch, so micro-batches cannot change it.

    sequence: mean over rows of the mean over tokens. token: mean over all tokens. constant: sum over rows * budget. sum: over rows.
    """
    R = mask.shape[0]
    return mask / {"sequence": R * mask.sum(1, keepdim=True).clamp_min(1), "token": mask.sum().clamp_min(1),
                   "constant": R * budget, "sum": R}[kind]


def kl_estimate(logp, ref_logp, kind):
    """Per-token KL(pi || ref) from samples of pi (Schulman 2020). As values k1 and k3 are unbiased; k2 is biased, its gradient is not."""
    d = (logp - ref_logp).clamp(-20, 20)
    return {"k1": d, "k2": d ** 2 / 2, "k3": (-d).exp() + d - 1}[kind]


def correction_weights(old_logp, sampler_logp, mask, kind, cap=2.0):
    """w (R, T): old policy over the policy that sampled, detached. tis: per token, at most cap; seq_tis: per sequence; mis: 0 outside."""
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
    j = torch.arange(n - k + 1, n + 1, dtype=torch.float64)         # C(n-c, k) / C(n, k) = prod over j of 1 - c / j, 0 once c > n - k
    return 1 - (1 - c[..., None] / j).clamp_min(0).prod(-1)


# ---------------------------------------------------------------------------------------------------------------------------
# Training

def build(config, device):
    return GPT(GPTConfig(tokenizer.n_vocab, 256, config.n_layer, config.n_head, config.n_embd, qk_norm=True)).to(device)


def warm_up(config, run, seed, device):
    """Supervised training on demonstrations, from scratch -> the base model. Loss on the answer's tokens only."""
    phase, rng, torch_state = f"base {seed}", random.Random(seed), torch.manual_seed(seed)
    model = build(config, device)
    optimizer = torch.optim.AdamW(model.parameters(), config.sft_lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    start = restore(run.state.get(phase), model, optimizer, rng)
    bar = tqdm(range(start, config.sft_steps), f"warm-up, seed {seed}", initial=start, total=config.sft_steps)
    for step in bar:
        for g in optimizer.param_groups:
            g["lr"] = config.sft_lr * min((step + 1) / 50, 1 - step / config.sft_steps)
        pairs = []
        for _ in range(config.sft_batch):       # shorter problems too: the steps are the same and show up sooner
            problem = draw_problem(rng, rng.randint(1, config.digits))
            pairs.append((tokenizer.encode(question(problem)), tokenizer.encode(demonstrate(rng, problem)) + [tokenizer.eos]))
        T = max(len(q) + len(a) for q, a in pairs)
        ids, mask = torch.zeros(len(pairs), T, dtype=torch.long), torch.zeros(len(pairs), T)
        for i, (q, a) in enumerate(pairs):
            ids[i, :len(q) + len(a)], mask[i, len(q):len(q) + len(a)] = torch.tensor(q + a), 1
        ids, mask = ids.to(device), mask.to(device)
        with torch.autocast(device, torch.bfloat16, enabled=config.dtype == "bfloat16"):
            logp, _ = token_logprobs(model.hidden(ids[:, :-1]), model.lm_head.weight, ids[:, 1:])
        loss = -(logp * mask[:, 1:]).sum() / mask[:, 1:].sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step + 1 == config.sft_steps:
            run.log(phase="sft", seed=seed, step=step, loss=loss.item())
            bar.set_postfix_str(f"loss {loss.item():.3f}")
        if run.due:
            run.save(phase, **snapshot(step + 1, model, optimizer, rng))
    run.save(phase, **snapshot(config.sft_steps, model, None, rng))
    return model


def snapshot(step, model, optimizer, rng, generator=None, **more):
    """All that a loop needs to go on, to the bit."""
    return dict(step=step, model=model.state_dict(), optimizer=optimizer and optimizer.state_dict(), rng=rng.getstate(),
                generator=generator and generator.get_state(), **more)


def restore(state, model, optimizer, rng, generator=None):
    """Put a snapshot back (None: nothing to do) -> the step to go on with."""
    if state is None:
        return 0
    model.load_state_dict(state["model"])
    rng.setstate(state["rng"])
    if state["optimizer"]:
        optimizer.load_state_dict(state["optimizer"])
    if state["generator"] is not None:
        generator.set_state(state["generator"])
    return state["step"]


def score(model, rollout, config, T):
    """Log-probability and entropy (R, T) of each token under the temperature it was sampled with. 0 in column 0 and past the rows' end."""
    with torch.autocast(rollout.ids.device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
        logp, entropy = token_logprobs(model.hidden(rollout.ids[:, :-1]), model.lm_head.weight, rollout.ids[:, 1:], config.temperature)
    pad = (1, T - rollout.ids.shape[1])     # a micro-batch of short rows is cut to its longest
    return F.pad(logp, pad), F.pad(entropy, pad)


def sample(model, problems, n, config, generator, sampler="iid"):
    """-> Rollout of n answers per problem, their texts, their rewards (P, n)."""
    sampling = copy.deepcopy(model).bfloat16() if config.dtype == "bfloat16" else model
    rollout = generate(sampling, [tokenizer.encode(question(p)) for p in problems], n, config.max_new_tokens, config.temperature,
                       stop=tokenizer.eos, generator=generator, uniforms=group_uniforms(len(problems), n, sampler, generator))
    texts = rollout.texts(tokenizer)
    last = rollout.ids.gather(1, (rollout.prompt_lens + rollout.lengths - 1)[:, None]).squeeze(1)
    finished = (last == tokenizer.eos).tolist()
    rewards = torch.tensor([reward(problems[i // n], t) * finished[i] for i, t in enumerate(texts)])
    return rollout, texts, rewards.view(-1, n)


def collect(model, config, rng, generator):
    """One batch of rollouts -> (rollout, rewards (P, G), tokens sampled, fraction of groups without variance).

    Dynamic sampling (DAPO) keeps sampling until `prompts` groups have both right and wrong answers, at most 4 times.
    """
    dynamic, kept, rewards, tokens, dull, seen = config.method.dynamic, [], [], 0, 0, 0
    while seen == 0 or dynamic and len(kept) < config.prompts and seen < 4 * config.prompts:
        problems = [draw_problem(rng, config.digits) for _ in range(config.prompts)]
        rollout, _, r = sample(model, problems, config.group, config, generator, config.sampler)
        tokens, seen, mixed = tokens + int(rollout.mask.sum()), seen + config.prompts, r.std(1) > 0
        dull += int((~mixed).sum())
        for i in range(config.prompts):
            if (mixed[i] or not dynamic) and len(kept) < config.prompts:
                kept.append(rollout[slice(i * config.group, (i + 1) * config.group)])
                rewards.append(r[i])
    if not kept:            # nothing mixed in 4 batches: the last one, whose advantages are all 0
        kept, rewards = [rollout], list(r)
    return Rollout.cat(kept), torch.stack(rewards), tokens, dull / seen


@torch.no_grad()
def score_all(model, rollout, config):
    """score's log-probabilities without gradients, in micro-batches."""
    rows = torch.arange(len(rollout.ids)).split(config.micro_batch)
    return torch.cat([score(model, rollout[r], config, rollout.ids.shape[1])[0] for r in rows])


def update(model, base, optimizer, rollout, rewards, config, generator):
    """The gradient steps of one rollout batch -> metrics. rewards (P, G)."""
    method, mask, R = config.method, rollout.mask, len(rollout.ids)
    old_logp = score_all(model, rollout, config) if config.minibatches > 1 or config.kl_in == "reward" else None
    ref_logp = score_all(base, rollout, config) if config.beta else None
    if config.beta and config.kl_in == "reward":
        rewards = rewards - config.beta * (kl_estimate(old_logp, ref_logp, config.kl) * mask).sum(1).view_as(rewards)
    adv = advantages(rewards, method.advantage).to(mask.device)
    if config.positive_only:
        adv = adv.clamp_min(0)
    adv = adv.reshape(R, 1)
    order = torch.arange(R) if config.minibatches == 1 else torch.randperm(R, generator=generator)
    total = dict.fromkeys(("loss", "entropy", "kl", "clip_fraction", "grad_norm"), 0.0)
    for minibatch in order.chunk(config.minibatches):
        weights = aggregation_weights(mask[minibatch], method.aggregation, config.max_new_tokens)
        optimizer.zero_grad()
        for rows, a in zip(minibatch.split(config.micro_batch), weights.split(config.micro_batch)):
            m = mask[rows]
            logp, entropy = score(model, rollout[rows], config, mask.shape[1])
            old = logp.detach() if old_logp is None else old_logp[rows]     # the first gradient step: the old policy is this one
            loss, silenced = surrogate(logp, old, adv[rows], m, method.ratio, method.eps_low, method.eps_high)
            loss = loss * correction_weights(old, rollout.logp[rows], m, config.correction) - config.entropy_bonus * entropy
            if config.beta:
                kl = kl_estimate(logp, ref_logp[rows], config.kl)
                total["kl"] += ((kl * m).sum() / mask.sum()).item()
                loss = loss + config.beta * kl if config.kl_in == "loss" else loss
            loss = (a * loss).sum()
            loss.backward()
            total["loss"] += loss.item() / config.minibatches
            total["entropy"] += ((entropy * m).sum() / mask.sum()).item()
            total["clip_fraction"] += (silenced.sum() / mask.sum()).item()
        total["grad_norm"] += torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item() / config.minibatches
        optimizer.step()
    return total


def evaluate(model, config, n):
    """n answers to each held-out problem -> how many are right (P,), and the fraction of lines whose carry was a guess."""
    rng, generator = random.Random("held out"), torch.Generator().manual_seed(0)
    problems = [draw_problem(rng, config.digits, held_out=True) for _ in range(config.eval_prompts)]
    _, texts, rewards = sample(model, problems, n, config, generator)
    return rewards.sum(1), sum(map(guessed_carries, texts)) / len(texts)


def held_out(model, config, n=16):
    correct, guesses = evaluate(model, config, n)
    return {f"pass@{k}": pass_at_k(n, correct, k).mean().item() for k in (1, n)} | {"guessed_carries": guesses}


def train(config, run, arm, seed, base, tokens=math.inf):
    """RL from the base for config.steps steps, or until `tokens` are sampled -> the trained model. One row of metrics a step."""
    # 1. A copy of the base, an optimizer, two random streams: problems, and everything else
    phase, model, device = f"{arm} {seed}", copy.deepcopy(base), base.lm_head.weight.device
    optimizer = torch.optim.AdamW(model.parameters(), config.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    rng, generator = random.Random(seed + 1), torch.Generator().manual_seed(seed + 1)
    state = run.state.get(phase)
    step = restore(state, model, optimizer, rng, generator)
    sampled = state["sampled"] if state else 0
    if step == 0:
        run.log(phase="rl", arm=arm, seed=seed, step=0, sampled_tokens=0, **held_out(model, config))
        print(f"{'step':>5} {'reward':>7} {'pass@1':>7} {'loss':>8} {'entropy':>8} {'length':>7} {'right':>6} {'wrong':>6} {'no var':>6} {'guess':>6} {'clip':>6} {'tok/s':>7}")
    while step < config.steps and sampled < tokens:
        # 2. Sample, score with the verifier, take the gradient steps
        started = time.time()
        rollout, rewards, new_tokens, dull = collect(model, config, rng, generator)
        metrics = update(model, base, optimizer, rollout, rewards, config, generator)
        sampled, step, seconds = sampled + new_tokens, step + 1, time.time() - started
        # 3. Log
        lengths, right = rollout.lengths.float(), rewards.flatten() > 0
        row = dict(phase="rl", arm=arm, seed=seed, step=step, reward=rewards.mean().item(), **metrics, length=lengths.mean().item(),
                   length_right=lengths[right].mean().item(), length_wrong=lengths[~right].mean().item(), zero_variance=dull,
                   sampled_tokens=sampled, seconds=seconds, tokens_per_s=new_tokens / seconds)
        row = {k: None if v != v else v for k, v in row.items()}        # a mean over no answers
        if step % config.eval_every == 0 or step == config.steps or sampled >= tokens:
            row |= held_out(model, config)
        run.log(**row)
        show = [row["reward"], row.get("pass@1"), row["loss"], row["entropy"], row["length"], row["length_right"], row["length_wrong"], dull,
                row.get("guessed_carries"), row["clip_fraction"]]
        widths = 7, 7, 8, 8, 7, 6, 6, 6, 6, 6
        print(f"{step:>5} " + " ".join(f"{'':>{w}}" if x is None else f"{x:>{w}.{1 if 3 < i < 7 else 3}f}" for i, (x, w) in enumerate(zip(show, widths)))
              + f" {row['tokens_per_s']:>7.0f}", flush=True)
        # 4. Save now and then, and at once when interrupted
        if run.due:
            run.save(phase, **snapshot(step, model, optimizer, rng, generator, sampled=sampled))
    run.save(phase, **snapshot(step, model, optimizer, rng, generator, sampled=sampled))
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
        length = np.minimum(rng.geometric(h[right]), cap)
        mask = torch.as_tensor(np.arange(cap) < length[:, None]).float()
        a = aggregation_weights(mask, aggregation, 1 / hazard)[:, 0].numpy()       # one weight for all tokens of a row
        adv = advantages(torch.as_tensor(right).float().view(prompts, group), advantage).flatten().numpy()
        stopped = length < cap                      # d logp / d logit = 1 for the stop that was drawn, -h for each draw
        slope = a * adv * (stopped - h[right] * length)
        logit = logit + lr * np.array([slope[right == 0].sum(), slope[right == 1].sum()])
    return np.array(path)


# ---------------------------------------------------------------------------------------------------------------------------
# Figures and claims

def claim(id, text, source, paper, ours, threshold, holds, seeds):
    return dict(id=id, claim=text, source=source, paper=paper, ours=ours, threshold=threshold, holds=bool(holds), seeds=seeds)


def seeds_of(config):
    return range(config.seed, config.seed + config.seeds)


def curve(run, key, by="step", **where):
    """Mean and standard deviation over seeds of a metric -> x, mean, std, at the values of `by` that every seed has."""
    rows = [r for r in run.rows if r.get(key) is not None and all(r.get(k) == v for k, v in where.items())]
    series = {s: {r[by]: r[key] for r in rows if r["seed"] == s} for s in {r["seed"] for r in rows}}
    x = sorted(set.intersection(*map(set, series.values()))) if series else []
    y = np.array([[d[i] for i in x] for d in series.values()]).reshape(-1, len(x)) if x else np.zeros((1, 0))
    return np.array(x), y.mean(0), y.std(0)


def band(ax, run, key, label, by="step", **where):
    x, mean, std = curve(run, key, by, **where)
    line, = ax.plot(x, mean, label=label)
    ax.fill_between(x, mean - std, mean + std, color=line.get_color(), alpha=0.2, lw=0)


def figure_train(config, run, device):
    n = 4 if config.quick else 64
    ks = [2 ** i for i in range(int(math.log2(n)) + 1)]
    for seed in seeds_of(config):
        base = warm_up(config, run, seed, device)
        for arm, model in (("base", base), (config.loss, None)):
            model = model or train(config, run, arm, seed, base)
            if not any(r.get("phase") == "pass@k" and r["arm"] == arm and r["seed"] == seed for r in run.rows):
                correct, guesses = evaluate(model, config, n)
                passes = torch.stack([pass_at_k(n, correct, k) for k in ks])                # (len(ks), P)
                run.log(phase="pass@k", arm=arm, seed=seed, k=ks, mean=passes.mean(1).tolist(), guessed_carries=guesses,
                        stderr=(passes.std(1) / config.eval_prompts ** 0.5).tolist())
                print(f"{arm}: held-out pass@1 {passes[0].mean():.3f}, pass@{n} {passes[-1].mean():.3f}, guessed carries {guesses:.3f}")
    rows = {arm: [r for r in run.rows if r.get("phase") == "pass@k" and r["arm"] == arm] for arm in ("base", config.loss)}
    value = lambda arm, k: np.array([r["mean"][ks.index(k)] for r in rows[arm]])
    guess = {arm: np.array([r["guessed_carries"] for r in rows[arm]]) for arm in rows}
    p0, p1 = value("base", 1), value(config.loss, 1)

    fig, axes = plt.subplots(2, 3, figsize=(13, 7), layout="constrained")
    fig.suptitle(f"Told only right or wrong, the model stops guessing carries: held-out pass@1 {p0.mean():.2f} → {p1.mean():.2f}")
    where = dict(phase="rl", arm=config.loss)
    for ax, title, ylabel, keys in zip(axes.flat, ("It learns", "... by working from right to left", "Entropy falls as it decides",
                                                   "Length of right and wrong answers", "Groups that teach nothing"),
                                       ("fraction right", "lines with a guessed carry", "entropy (nats per token)", "length (tokens)", "all right or all wrong"),
                                       (dict(reward="reward (train)", **{"pass@1": "pass@1 (held out)"}), dict(guessed_carries=""), dict(entropy=""),
                                        dict(length_right="right", length_wrong="wrong"), dict(zero_variance=""))):
        for key, label in keys.items():
            band(ax, run, key, label, **where)
        ax.set(title=title, xlabel="RL step", ylabel=ylabel)
        if "length_right" not in keys:
            ax.set_ylim(bottom=0)
        if len(keys) > 1:
            ax.legend()
    for arm in rows:
        mean, spread = np.mean([r["mean"] for r in rows[arm]], 0), np.mean([r["stderr"] for r in rows[arm]], 0)
        axes[1, 2].plot(ks, mean, "o-", label="base" if arm == "base" else "after RL")
        axes[1, 2].fill_between(ks, mean - spread, mean + spread, alpha=0.2, lw=0)
    axes[1, 2].set(title="pass@k: the base could, but rarely did", xlabel="k (samples)", ylabel="held-out pass@k", xscale="log", ylim=(0, 1.02))
    axes[1, 2].set_xticks(ks, ks)
    axes[1, 2].legend()
    seeds = config.seeds
    return fig, [
        claim("base", "the base model is right at most 40% of the time", "design of the task", "-", f"{p0.max():.3f}", "<= 0.40", p0.max() <= 0.40, seeds),
        claim("train", "after RL, held-out pass@1 (worst seed)", "design of the task", "-", f"{p1.min():.3f}", ">= 0.90", p1.min() >= 0.90, seeds),
        claim("order", "carries guessed after RL (base in brackets)", "design of the task", "-", f"{guess[config.loss].max():.3f} ({guess['base'].mean():.2f})",
              "<= 0.05", guess[config.loss].max() <= 0.05, seeds),
        claim("sharpening", f"the base's pass@{n} reaches the trained model's: sharpening, no discovery", "Yue et al., arXiv 2504.13837", "base >= RL at large k",
              f"{value('base', n).mean():.3f} vs {value(config.loss, n).mean():.3f}", "base >= RL", value("base", n).mean() >= value(config.loss, n).mean(), seeds)]


def figure_variants(config, run, device):
    budget = 2_000 if config.quick else 300_000
    config = replace(config, minibatches=4, steps=10 ** 9, eval_every=1 if config.quick else 4)
    for seed in seeds_of(config):
        base = warm_up(config, run, seed, device)
        for loss in LOSSES:
            train(replace(config, loss=loss), run, loss, seed, base, tokens=budget)
    fig, axes = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
    final, clip = {}, {}
    grid = np.linspace(0, budget, 21)
    for loss in LOSSES:
        rows = [[r for r in run.rows if r.get("arm") == loss and r["seed"] == s] for s in seeds_of(config)]
        evals = [[(r["sampled_tokens"], r["pass@1"]) for r in rs if "pass@1" in r] for rs in rows]
        final[loss], start = np.array([e[-1][1] for e in evals]), np.mean([e[0][1] for e in evals])
        clip[loss] = np.mean([r["clip_fraction"] for rs in rows for r in rs if r["step"]])
        y = np.array([np.interp(grid, *zip(*e)) for e in evals])     # seeds sample different lengths: a common grid
        line, = axes[0].plot(grid / 1e3, y.mean(0), label=loss)
        axes[0].fill_between(grid / 1e3, y.mean(0) - y.std(0), y.mean(0) + y.std(0), color=line.get_color(), alpha=0.15, lw=0)
    axes[0].set(xlabel="sampled tokens (thousands)", ylabel="held-out pass@1", title="Learning curves", ylim=(0, 1))
    axes[0].legend()
    axes[1].bar(list(final), [f.mean() for f in final.values()], yerr=[f.std() for f in final.values()], capsize=4)
    axes[1].set(ylabel=f"held-out pass@1 after {budget // 1000}k tokens", title=f"Mean and standard deviation over {config.seeds} seeds", ylim=(0, 1))
    best = max(final, key=lambda k: final[k].mean())
    fig.suptitle(f"Seven losses, the same {budget // 1000}k sampled tokens, 4 gradient steps a batch: {best} leads")
    worst = min(f.mean() for f in final.values())
    gspo = clip["gspo"] / max(clip["grpo"], 1e-9)
    return fig, [
        claim("all learn", "every loss raises pass@1 (the least successful one is shown)", "Yue et al., arXiv 2504.13837: six algorithms similar", "similar",
              f"{start:.3f} to {worst:.3f}", ">= +0.20", worst >= start + 0.2, config.seeds),
        claim("gspo clips more", "GSPO clips more tokens than GRPO (ratio of clip fractions)", "Zheng et al., arXiv 2507.18071", "about 100x",
              f"{gspo:.1f}x", ">= 10x", gspo >= 10, config.seeds)]


def figure_length(config, run, device):
    config = replace(config, max_new_tokens=24 if config.quick else 84, eval_every=10 ** 9)
    config = config if config.quick else replace(config, steps=min(config.steps, 40))
    for seed in seeds_of(config):
        base = warm_up(config, run, seed, device)
        for loss in ("grpo", "dr_grpo"):
            train(replace(config, loss=loss), run, loss, seed, base)
    arms = {"grpo": ("std", "sequence"), "token mean of the batch": ("std", "token"), "dr_grpo": ("mean", "constant")}
    paths = {arm: np.array([length_bias(*choice, seed) for seed in range(8)]) for arm, choice in arms.items()}      # (8, steps + 1, 2)
    fig, axes = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
    ratio = {}
    for i, (arm, p) in enumerate(paths.items()):
        ratio[arm] = (p[:, -1, 0] / p[:, -1, 1]).mean()
        for outcome, style in ((0, "-"), (1, "--")):
            y = p[:, :, outcome]
            axes[0].plot(y.mean(0), style, color=f"C{i}", label=f"{arm}, {'right' if outcome else 'wrong'}")
            axes[0].fill_between(range(y.shape[1]), y.mean(0) - y.std(0), y.mean(0) + y.std(0), color=f"C{i}", alpha=0.15, lw=0)
    axes[0].set(title="No model: a coin decides right or wrong (8 seeds)", xlabel="step", ylabel="expected length (tokens)")
    gpt = {}
    for i, loss in enumerate(("grpo", "dr_grpo")):
        for key, style in (("length_wrong", "-"), ("length_right", "--")):
            x, mean, std = curve(run, key, phase="rl", arm=loss)
            axes[1].plot(x, mean, style, color=f"C{2 * i}", label=f"{loss}, {key[7:]}")
            axes[1].fill_between(x, mean - std, mean + std, color=f"C{2 * i}", alpha=0.15, lw=0)
        x, mean, _ = curve(run, "length_wrong", phase="rl", arm=loss)
        gpt[loss] = mean[-5:].mean() / mean[:5].mean()
    axes[1].set(title=f"The GPT on column addition ({config.seeds} seeds)", xlabel="RL step", ylabel="mean length (tokens)")
    for ax in axes:
        ax.legend()
    fig.suptitle("Divided by its own length, a long wrong answer is punished less per token: wrong answers grow under grpo, not under dr_grpo")
    source = "Liu et al., arXiv 2503.20783"
    return fig, [
        claim("grpo", "model-free: wrong/right length under grpo", source, "wrong answers grow", f"{ratio['grpo']:.1f}", ">= 5", ratio["grpo"] >= 5, 8),
        claim("dr_grpo", "model-free: wrong/right length under dr_grpo", source, "no growth", f"{ratio['dr_grpo']:.2f}", "<= 1.2", ratio["dr_grpo"] <= 1.2, 8),
        claim("token", "model-free: the batch's token mean lies between", "derived", "-", f"{ratio['token mean of the batch']:.2f}", "between",
              ratio["dr_grpo"] <= ratio["token mean of the batch"] <= ratio["grpo"], 8),
        claim("gpt", "GPT: growth of wrong answers, grpo over dr_grpo", source, "> 1", f"{gpt['grpo']:.2f} vs {gpt['dr_grpo']:.2f}", ">= 1.2x",
              gpt["grpo"] >= 1.2 * gpt["dr_grpo"], config.seeds)]


def main():
    config = parse_args(Config, __doc__)
    config.seeds = config.seeds or (1 if config.figure == "train" or config.quick else 3)
    device = pick_device(config.device)
    run, started = Run(config), time.time()
    model = build(config, device)
    print(f"grpo.py: figure {config.figure}, seed {config.seed}, {config.seeds} seeds, {device}, {config.dtype}, {torch.get_num_threads()} threads, "
          f"{sum(p.numel() for p in model.parameters()):,} parameters")
    fig, claims = {"train": figure_train, "variants": figure_variants, "length": figure_length}[config.figure](config, run, device)
    fig.savefig(run.dir / f"{config.figure}.png", dpi=110)
    run.claims(claims)
    print(f"\n{run.dir / config.figure}.png, metrics.jsonl, claims.json, model.pt: {time.time() - started:.0f} s")


if __name__ == "__main__":
    command(main)
