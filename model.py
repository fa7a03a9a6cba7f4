"""model.py: a GPT, its KV cache, its sampler, its tokenizers. What the methods in this folder stand on.

    python model.py                      train a small GPT on the Python standard library's own sources (3 minutes, two cores)
    python model.py --data FILE|FOLDER|HF_DATASET       the same on your text
    python model.py --bench              tokens/s of generate and of a training step, beside the peers that are installed

The model is the Llama family's: RMSNorm before each block, rotary positions, SwiGLU, grouped-query attention; sliding window,
QKV bias and QK-norm are options. `GPT.hidden` maps token ids to hidden states, with or without a `KVCache`; the head is applied
by whoever needs it, because training never wants all the logits (kernels.token_logprobs) and sampling wants the last row only.
`GPT.from_pretrained` and `load_tokenizer` read Hugging Face folders (Llama, SmolLM2, Qwen2, Qwen2.5, Qwen3), `save_pretrained` writes them:
pretrained.py knows their names for things. Flags, checkpoints and the folder of a run are in run.py.

What to know before changing `generate`:
1. A cache slot is a position. Prompts of different lengths are padded on the right, every row then appends at its own length,
   and a mask hides what lies beyond. Row i of a batch is therefore the row alone, up to float rounding.
2. A prompt is read once, then its cache is cloned to its n samples. A row that has met the stop token leaves the batch: the
   last live row moves into its place, so that a step costs only what is still alive.
3. Every token is drawn by inverting the CDF at a uniform number. Independent samples use a new number per token; `uniforms`
   gives each row ONE number for its whole sequence (arithmetic decoding, Vilnis et al., arXiv 2210.15458): after each token the
   number is rescaled to its place inside the bin it fell in, and is uniform again.
4. On a GPU a step of a small model is a few hundred launches that each take longer to ask for than to run. There the same step runs
   on fixed shapes with all that changes in tensors, is captured once in a CUDA graph and replayed (`decode_static`).
"""
import copy
import hashlib
import heapq
import importlib.util
import json
import math
import os
import random
import time
import warnings
import zlib
from collections import Counter, defaultdict
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import tiktoken
import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint

from kernels import attention, can_compile, gemm_dtype, say_once, token_logprobs, wide
from pretrained import SPLIT, hf_config, hf_save, hf_state, hub_folder, load_tokenizer, short_runs                    # noqa: F401
from run import (NotFinite, Run, UserError, band, claim, command, descend, flag, load_checkpoint, need_memory, parse_args,        # noqa: F401, one door
                 pick_device, save_checkpoint, seeds_of, series)


# ---------------------------------------------------------------------------------------------------------------------------
# The model

@dataclass
class GPTConfig:
    vocab_size: int
    block_size: int                 # positions; longer input is an error
    n_layer: int
    n_head: int
    n_embd: int
    n_kv_head: int | None = None    # fewer key heads than query heads: grouped-query attention (default: as many)
    head_dim: int | None = None     # default n_embd / n_head
    n_hidden: int | None = None     # SwiGLU's width; default 8/3 n_embd to a multiple of 16: as many weights as a 4x MLP
    window: int | None = None       # a token sees the last `window` tokens, itself included
    qkv_bias: bool = False
    qk_norm: bool = False           # RMSNorm on each head's query and key before the rotation
    tie: bool = True                # the head shares the embedding's weight
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5

    def __post_init__(self):
        if self.head_dim is None and self.n_embd % self.n_head:
            raise UserError(f"n_embd {self.n_embd} is no multiple of n_head {self.n_head}")
        self.n_kv_head = self.n_kv_head or self.n_head
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        self.n_hidden = self.n_hidden or max(16, 8 * self.n_embd // 3 // 16 * 16)
        if self.n_head % self.n_kv_head:
            raise UserError(f"n_head {self.n_head} is no multiple of n_kv_head {self.n_kv_head}")
        if self.window is not None and self.window < 1:
            raise UserError(f"window {self.window}: a token sees at least itself")
        if self.head_dim % 2:
            raise UserError(f"rotary positions turn pairs of channels: head_dim {self.head_dim} is odd")

    @property
    def parameters(self):
        """How many numbers a GPT of this shape has to learn, without making it."""
        C, D, H, K = self.n_embd, self.head_dim, self.n_head, self.n_kv_head
        attention = (H + 2 * K) * D * (C + self.qkv_bias) + H * D * C + 2 * D * self.qk_norm
        block = attention + 3 * C * self.n_hidden + 2 * C
        return (1 if self.tie else 2) * self.vocab_size * C + self.n_layer * block + C


def inverse_rms(x, eps):
    return (torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.shape[-1] + eps).rsqrt()


class RMSNormFunction(torch.autograd.Function):
    """y = w x r with r = 1 / rms(x), and by the chain rule dx = r (g w) - x (g w . x) r^3 / C.

    torch's own is a chain of small operations on a CPU, three times slower than its layer norm: a tenth of a training step.
    """

    @staticmethod
    def forward(ctx, x, weight, eps):
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return (wide(x) * inverse_rms(wide(x), eps)).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx, g):
        saved, eps = ctx.saved_tensors, ctx.eps
        x, weight, g = wide(saved[0]), wide(saved[1]), wide(g)
        r, gx = inverse_rms(x, eps), g * x                              # (..., 1), (..., C)
        slope = (gx @ weight)[..., None] * r ** 3 / x.shape[-1]         # (..., 1)
        dx = (g * weight).mul_(r).addcmul_(x, slope, value=-1)
        return dx.to(saved[0].dtype), (r.flatten() @ gx.flatten(0, -2)).to(saved[1].dtype), None


class RMSNorm(nn.Module):
    def __init__(self, C, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(C)), eps

    def forward(self, x):
        return RMSNormFunction.apply(x, self.weight, self.eps)


def rotate(x, rope):
    """Rotary positions (Su et al., arXiv 2104.09864): channels 2i, 2i+1 are one complex number, turned by position * theta_i.

    x (B, T, H, D); rope (T, 1, D/2) or (B, T, 1, D/2), complex.
    """
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))     # (B, T, H, D/2)
    return torch.view_as_real(pairs * rope).flatten(-2).to(x.dtype)     # (B, T, H, D)


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.n_head, self.n_kv_head, self.window = layer, config.n_head, config.n_kv_head, config.window
        D = self.head_dim = config.head_dim
        self.qkv = nn.Linear(config.n_embd, (self.n_head + 2 * self.n_kv_head) * D, bias=config.qkv_bias)
        self.proj = nn.Linear(self.n_head * D, config.n_embd, bias=False)
        self.q_norm = RMSNorm(D, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(D, config.norm_eps) if config.qk_norm else None

    def forward(self, x, rope, mask=None, cache=None):
        B, T, _ = x.shape
        H, K = self.n_head, self.n_kv_head
        qk, v = self.qkv(x).view(B, T, H + 2 * K, self.head_dim).split([H + K, K], dim=2)      # (B, T, H + K, D), (B, T, K, D)
        if self.q_norm:
            qk = torch.cat((self.q_norm(qk[:, :, :H]), self.k_norm(qk[:, :, H:])), dim=2)
        q, k = rotate(qk, rope).split([H, K], dim=2)                    # (B, T, H, D), (B, T, K, D)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)                       # (B, S, K, D): all that this layer can see
        y = attention(*(t.transpose(1, 2) for t in (q, k, v)), window=self.window, mask=mask)   # (B, H, T, D)
        return self.proj(y.transpose(1, 2).flatten(2))                  # (B, T, C)


class SwiGLU(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate = nn.Linear(config.n_embd, config.n_hidden, bias=False)
        self.up = nn.Linear(config.n_embd, config.n_hidden, bias=False)
        self.proj = nn.Linear(config.n_hidden, config.n_embd, bias=False)

    def forward(self, x):
        return self.proj(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.norm1, self.attn = RMSNorm(config.n_embd, config.norm_eps), Attention(config, layer)
        self.norm2, self.mlp = RMSNorm(config.n_embd, config.norm_eps), SwiGLU(config)

    def forward(self, x, rope, mask=None, cache=None):
        x = x + self.attn(self.norm1(x), rope, mask, cache)
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """UserError for one that this machine could not train: weights, gradient and AdamW's two moments, 16 bytes a parameter, and the rotary table."""

    def __init__(self, config):
        super().__init__()
        if torch.get_default_device().type != "meta":
            need_memory(16 * config.parameters + 4 * config.block_size * config.head_dim,
                        f"a model of {config.parameters:,} parameters, its gradient, AdamW's two moments and {config.block_size:,} positions")
        self.config, self.checkpointing = config, False     # True: a block keeps its input only, and is computed again in the backward pass
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd, config.norm_eps)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        theta = config.rope_theta ** (-torch.arange(0, config.head_dim, 2, dtype=torch.float64, device="cpu") / config.head_dim)
        angle = torch.outer(torch.arange(config.block_size, dtype=torch.float64, device="cpu"), theta)      # (block_size, D/2)
        self.rope = torch.polar(torch.ones_like(angle), angle).to(torch.complex64)[:, None]     # no buffer: .to(bf16) must not round it
        for name, p in self.named_parameters():
            if p.dim() == 2:    # GPT-2's rule: what writes into the residual stream starts smaller, by the number of writers
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if "proj" in name else 0.02)
            elif "bias" in name:
                nn.init.zeros_(p)
        if config.tie:
            self.lm_head.weight = self.wte.weight

    def hidden(self, ids, cache=None):
        """ids (B, T) int64 -> final hidden states (B, T, C). With a cache, ids continue its rows and are added to it.

        AssertionError past block_size positions.
        """
        B, T = ids.shape
        self.rope = self.rope.to(ids.device)
        assert T + (0 if cache is None else cache.length) <= self.config.block_size, f"past block_size {self.config.block_size}"
        positions, mask = (slice(0, T), None) if cache is None else cache.extend(T)
        x, rope = self.wte(ids), self.rope[positions]       # (B, T, C)
        again = self.checkpointing and torch.is_grad_enabled()
        for block in self.blocks:
            x = torch.utils.checkpoint.checkpoint(block, x, rope, mask, cache, use_reentrant=False) if again else block(x, rope, mask, cache)
        return self.norm(x)

    def forward(self, ids):
        return self.lm_head(self.hidden(ids))               # (B, T, V)

    @classmethod
    def from_pretrained(cls, name, dtype=None, block_size=None):
        """The model in a Hugging Face folder, or of a hub id: Llama, SmolLM2, Qwen2, Qwen2.5, Qwen3.

        dtype: of the weights (default: as they are stored). block_size: fewer positions than the checkpoint's, for a smaller rotary table.
        UserError for what can't be read or is not supported, and for a tensor that is missing, left over, or of the wrong shape.
        """
        folder = hub_folder(name)
        fields = hf_config(folder / "config.json", block_size)
        try:
            config = GPTConfig(**fields)
        except UserError as e:
            raise UserError(f"{folder / 'config.json'}: {e}") from None
        with torch.device("meta"):              # shapes without memory: the weights come from the file
            model = cls(config)
        model.load_state_dict(hf_state(folder, model, dtype), strict=False, assign=True)
        if config.tie:
            model.lm_head.weight = model.wte.weight
        return model

    def save_pretrained(self, folder, like=None, stop=None):
        """Write config.json and model.safetensors, which `transformers` opens, whole or not at all. like: the folder or hub id whose tokenizer goes
        with them. stop: the ids that end a text (default: like's).

        What an earlier save left in the folder goes. UserError for a folder with files by these names that no save wrote, for one that can't be
        written, and if the model has no name there: a sliding window, or biases together with QK-norm.
        """
        hf_save(self, Path(folder), like, stop)


def checkpoint_for(task, what, name, max_new_tokens, dtype=torch.float32):
    """The model in a folder or of a hub id, if it can hold the task's longest prompt with its answer, and knows the tokenizer's ids. what: the flag."""
    model, positions = GPT.from_pretrained(name, dtype), task.longest + max_new_tokens - 1
    if model.config.block_size < positions or model.config.vocab_size < task.tokenizer.n_vocab:
        raise UserError(f"{what} {name}: has {model.config.block_size} positions and {model.config.vocab_size} ids; the longest prompt and "
                        f"--max-new-tokens need {positions}, the tokenizer {task.tokenizer.n_vocab}")
    return model


# ---------------------------------------------------------------------------------------------------------------------------
# The cache and the sampler

class KVCache:
    """Keys and values of every layer, (rows, capacity, K, D), allocated once. The token at position p of a row sits in slot p.

    A step writes its tokens at each row's own length (`lens`) and reads the slots up to the longest row's (`length`), exactly:
    a mask is needed only while the rows' lengths differ. With a sliding window, slots that nobody can see any more are given
    up when the capacity is reached (`base` is the position of slot 0), so that memory is constant at any length. Slots start
    as zeros, not as whatever memory held: a masked slot counts 0 times, and 0 * nan is nan.
    """

    def __init__(self, config, rows, capacity, device="cpu", dtype=torch.float32):
        shape = (rows, capacity, config.n_kv_head, config.head_dim)
        self.config, self.capacity, self.rows, self.base = config, capacity, rows, 0
        self.k = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.v = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.set_lens([0] * rows)

    def set_lens(self, lens):
        """The tokens that each row truly holds: forgets the padding of a prefill, or rejected draft tokens."""
        assert self.base <= max(0, min(lens) - (self.config.window or 0) + 1), "a sliding cache has given up what these rows would see"
        self.lens = torch.as_tensor(lens, device=self.k[0].device)
        self.length, self.ragged = max(lens), len(set(lens)) > 1

    def extend(self, T):
        """Room for T more tokens in each row -> their positions, a slice or (rows, T), and the mask if causality is not enough."""
        if self.length - self.base + T > self.capacity:
            self.slide(T)
        self.start, self.length, mask = self.length, self.length + T, None
        positions = slice(self.start, self.length)
        if self.ragged:
            positions = self.lens[:, None] + torch.arange(T, device=self.lens.device)                       # (rows, T)
            distance = positions[:, None, :, None] - torch.arange(self.base, self.length, device=self.lens.device)
            mask = distance >= 0                                                                            # (rows, 1, T, S)
            if self.config.window is not None:
                mask &= distance < self.config.window
            self.slots = torch.arange(self.rows, device=self.lens.device)[:, None], positions - self.base
        self.lens = self.lens + T
        return positions, mask

    def slide(self, T):
        """Make room for T more tokens: give up the slots that no row will see again."""
        first = int(self.lens.min()) - (self.config.window or math.inf) + 1     # the oldest position that can still be seen
        drop = max(first, 0) - self.base
        assert self.length - self.base - drop + T <= self.capacity, f"cache of {self.capacity} tokens is full"
        for t in self.k + self.v:
            t[:self.rows, :self.length - self.base - drop] = t[:self.rows, drop:self.length - self.base].clone()
        self.base += drop

    def append(self, layer, k, v):
        """Write the (rows, T, K, D) that extend made room for -> this layer's keys and values so far, (rows, S, K, D)."""
        window = self.config.window
        a = self.base if self.ragged or window is None else max(self.base, self.start - window + 1)     # older ones are out of sight
        where = self.slots if self.ragged else (slice(self.rows), slice(self.start - self.base, self.length - self.base))
        self.k[layer][where], self.v[layer][where] = k.to(self.k[layer].dtype), v.to(self.v[layer].dtype)
        seen = slice(self.rows), slice(a - self.base, self.length - self.base)
        return self.k[layer][seen], self.v[layer][seen]

    def expand(self, n, capacity):
        """Each row of a fresh prefill n times, into a new cache: one prefill serves the n samples of a prompt."""
        assert self.rows == len(self.k[0]) and self.base == 0, "expand before rows are dropped or the window slides"
        new = KVCache(self.config, self.rows * n, capacity, self.k[0].device, self.k[0].dtype)
        for old, t in zip(self.k + self.v, new.k + new.v):
            t[:, :self.length] = old[:, :self.length].repeat_interleave(n, dim=0)
        new.set_lens(self.lens.repeat_interleave(n).tolist())
        return new

    def keep(self, alive):
        """Drop the rows that are not alive (rows,) bool: live rows from the end move into the holes -> their order (live,)."""
        n = int(alive.sum())
        order = torch.arange(n, device=alive.device)
        holes, movers = (~alive[:n]).nonzero().squeeze(1), n + alive[n:].nonzero().squeeze(1)
        order[holes] = movers
        for t in self.k + self.v:
            t[holes, :self.length - self.base] = t[movers, :self.length - self.base]
        self.rows = n
        if n:
            self.set_lens(self.lens[order].tolist())
        return order


class StaticCache:
    """Some steps of one token each over a KVCache, every one the same kernels on the same addresses: what a CUDA graph needs. Positions are
    a tensor that each step advances in place; each step reads all the slots that the last one will, and a mask hides the rest."""
    length = 0      # a tensor now: generate has checked that all steps fit

    def __init__(self, cache, steps):
        device, S = cache.lens.device, min(cache.capacity, -(-(cache.length + steps) // 64) * 64)
        self.cache, self.lens = cache, cache.lens.clone()
        self.rows, self.slots = torch.arange(cache.rows, device=device), torch.arange(S, device=device)

    def extend(self, T):
        self.now = self.lens.clone()
        distance = self.now[:, None, None, None] - self.slots       # (rows, 1, 1, S)
        self.lens += T
        return self.now[:, None], (distance >= 0) & (distance < (self.cache.config.window or self.cache.capacity + 1))

    def append(self, layer, k, v):
        k_slots, v_slots = self.cache.k[layer], self.cache.v[layer]
        k_slots[self.rows, self.now], v_slots[self.rows, self.now] = k[:, 0], v[:, 0]
        return k_slots[:len(self.rows), :len(self.slots)], v_slots[:len(self.rows), :len(self.slots)]


@dataclass
class Rollout:
    """Sampled continuations, row order prompt-major. Prompt first, then the generated tokens, then padding (any id: trust `mask`)."""
    ids: torch.Tensor           # (R, T) int64
    mask: torch.Tensor          # (R, T) fp32, 1 on generated tokens up to and with the stop token
    logp: torch.Tensor          # (R, T) fp32, log-probability of each generated token under the distribution it was drawn from
    prompt_lens: torch.Tensor   # (R,) int64
    rows = None                 # (R,) int64, set where several processes hold a batch together: the places of this one's rows in it

    @property
    def lengths(self):
        """Generated tokens in each row, the stop token included (R,)."""
        return self.mask.sum(1).long()

    def tokens(self):
        """The generated tokens of each row, a list of lists."""
        spans = zip(self.ids.tolist(), self.prompt_lens.tolist(), self.lengths.tolist())
        return [row[p:p + n] for row, p, n in spans]

    def texts(self, tokenizer):
        """The generated text of each row, without the ids that end a text."""
        return [tokenizer.decode([t for t in row if t not in tokenizer.stop]) for row in self.tokens()]

    def __getitem__(self, rows):
        """The rows of an index or mask, the columns cut to the longest of them."""
        T = max((self.prompt_lens + self.lengths)[rows].tolist(), default=1)
        return Rollout(self.ids[rows, :T], self.mask[rows, :T], self.logp[rows, :T], self.prompt_lens[rows])

    @staticmethod
    def cat(rollouts):
        """The rows of several rollouts, one after the other, padded to the longest."""
        T = max(r.ids.shape[1] for r in rollouts)
        pad = lambda name: torch.cat([F.pad(getattr(r, name), (0, T - r.ids.shape[1])) for r in rollouts])
        return Rollout(pad("ids"), pad("mask"), pad("logp"), torch.cat([r.prompt_lens for r in rollouts]))


def truncate(logits, top_k=None, top_p=None):
    """(R, V) logits with -inf outside the top_k largest (and their ties), then outside the smallest set that holds top_p of what is left."""
    if top_k is not None:
        logits = logits.masked_fill(logits < logits.topk(min(top_k, logits.shape[-1])).values[:, -1:], -torch.inf)
    if top_p is not None and top_p < 1:
        probs, order = logits.softmax(-1).sort(-1, descending=True)
        before = torch.empty_like(probs).scatter_(-1, order, probs.cumsum(-1) - probs)      # the mass above each token
        logits = logits.masked_fill(before >= top_p, -torch.inf)
    return logits


def inverse_cdf(probs, u):
    """Draw by inversion. probs (R, V), u (R,) in [0, 1) -> token (R,), and the place of u inside the token's bin (R,), uniform again."""
    cdf = probs.cumsum(-1, dtype=u.dtype)                                       # (R, V)
    total = cdf[:, -1:]
    v = torch.minimum(u[:, None] * total, total.nextafter(torch.zeros_like(total)))     # (R, 1), strictly below the total
    token = torch.searchsorted(cdf, v, right=True).clamp_max(probs.shape[-1] - 1)       # (R, 1): the first bin that ends above v
    low = cdf.gather(1, (token - 1).clamp_min(0)).masked_fill(token == 0, 0)
    place = (v - low) / (cdf.gather(1, token) - low)
    return token.squeeze(1), place.squeeze(1).clamp(0, 1 - torch.finfo(u.dtype).eps)


def among(token, stops):
    """Which of the tokens (R,) are one of the ids (n,), bool. torch.isin may sort, which a CUDA graph cannot hold."""
    return (token[:, None] == stops).any(1)


def decode_eager(model, cache, logits, draw, fresh, u, spent, stops):
    """The second part of generate, one step at a time. fresh (R, max_new_tokens) decides its length; stops (n,) int64: the ids that end a row."""
    R, new = fresh.shape
    tokens, logps = torch.full((R, new), -1, device=fresh.device), torch.zeros(R, new, device=fresh.device)
    rows = torch.arange(R, device=fresh.device)                                             # the output row of each live row
    for t in range(new):
        token, logp, u, spent = draw(logits, fresh[rows, t], u, spent)
        tokens[rows, t], logps[rows, t] = token, logp
        if t + 1 == new:
            break
        if len(stops) and not (alive := ~among(token, stops)).all():
            order = cache.keep(alive)
            rows, token, u, spent = rows[order], token[order], u[order], spent[order]
            if len(rows) == 0:
                break
        logits = model.lm_head(model.hidden(token[:, None], cache)[:, -1])                  # (live, V)
    return tokens, logps


STATIC_ON = ("cuda",)   # where generate decodes with decode_static
SPAN = 128              # steps between two looks at which rows have stopped, and two captures


def decode_static(model, cache, logits, draw, fresh, u, spent, stops):
    """decode_eager for a GPU: nothing comes back from the device for SPAN steps, of which all but the first are one CUDA graph's replays.
    Then rows that have stopped leave, and the graph is captured again for the rows left and the slots that they have come to need."""
    R, new = fresh.shape
    tokens, logps = torch.full((R, new), -1, device=fresh.device), torch.zeros(R, new, device=fresh.device)
    rows = torch.arange(R, device=fresh.device)
    token, logps[:, 0], u, spent = draw(logits, fresh[:, 0], u, spent)
    tokens[:, 0] = token
    for start in range(1, new, SPAN):
        if len(stops):
            order = cache.keep(~among(token, stops))
            rows, token, u, spent = rows[order], token[order], u[order], spent[order]
            if len(rows) == 0:
                break
        steps = min(SPAN, new - start)
        static, numbers, t = StaticCache(cache, steps), fresh[rows, start:start + steps], torch.zeros(1, dtype=torch.long, device=fresh.device)
        state = [x.clone() for x in (token, u, spent)]
        drawn, scored = torch.full(numbers.shape, -1, device=fresh.device), torch.zeros(numbers.shape, device=fresh.device)

        def step():
            old = state[0]
            z = model.lm_head(model.hidden(old[:, None], static)[:, -1])                    # (live, V)
            token, logp, u, spent = draw(z, numbers.index_select(1, t).squeeze(1), *state[1:])
            done = among(old, stops)                                # a row that has stopped goes on drawing, unrecorded
            drawn.index_copy_(1, t, token.masked_fill(done, -1)[:, None]), scored.index_copy_(1, t, logp.masked_fill(done, 0)[:, None])
            for x, y in zip(state, (torch.where(done, old, token), u, spent)):
                x.copy_(y)
            t.add_(1)

        step()
        again = captured(step, fresh.device) if steps > 8 else step
        for _ in range(steps - 1):
            again()
        tokens[rows, start:start + steps], logps[rows, start:start + steps] = drawn, scored
        token, u, spent = state
        cache.set_lens(static.lens.tolist())
    return tokens, logps


def captured(step, device):
    """A function that repeats what `step` does on the device: a CUDA graph's replay; where there are none, step itself, from then on without trying."""
    global STATIC_ON
    if device.type != "cuda":
        return step
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream(device)
    try:
        with torch.cuda.graph(graph):
            step()
    except RuntimeError as e:
        STATIC_ON = ()
        torch.cuda.set_stream(stream)       # a capture that fails may leave us on its own
        say_once(f"generate: this step cannot be a CUDA graph, runs it eagerly instead ({str(e).splitlines()[0]})")
        return step
    return graph.replay


@torch.no_grad()
def generate(model, prompts, n=1, max_new_tokens=128, temperature=1.0, top_k=None, top_p=None, stop=None, generator=None,
             uniforms=None):
    """n continuations of each prompt (a list of non-empty token lists of any lengths) -> Rollout with R = len(prompts) * n rows.

    stop: token id that ends a row, a list of them, or None. temperature 0 is greedy: then logp is 0, the choice being certain. uniforms (R,) in
    [0, 1): one number drives its whole row. A number of b bits pays -log2 p for each token; once half of the b are spent, the row
    goes on with fresh bits from `generator`: the low half of a uniform is independent of its high half, so the law stays exact,
    up to the 2^(-b/2) that the last number drawn with is rounded to.
    Raises ValueError for an empty prompt, an argument out of its range, or more positions than the model's block_size; NotFinite for a
    model whose logits are not all finite.
    """
    lens, device = [len(p) for p in prompts], model.lm_head.weight.device
    if not lens or min(lens) < 1:
        raise ValueError("every prompt needs at least one token")
    if max(lens) + max_new_tokens - 1 > model.config.block_size:
        raise ValueError(f"prompt of {max(lens)} + {max_new_tokens} new tokens: past block_size {model.config.block_size}")
    for name, value, good in (("temperature", temperature, temperature == 0 or temperature >= 1e-30), ("n", n, n >= 1), ("max_new_tokens", max_new_tokens, max_new_tokens >= 1),
                              ("top_k", top_k, top_k is None or top_k >= 1), ("top_p", top_p, top_p is None or 1e-30 <= top_p <= 1)):
        if not good:
            raise ValueError(f"{name} is out of range: {value}")
    if gemm_dtype(model.lm_head.weight) != model.lm_head.weight.dtype:      # emulated bf16: the same weights in fp32 are twice as fast
        model = copy.deepcopy(model).float()
    R, P = len(prompts) * n, max(lens)
    real = torch.float32 if device.type == "mps" else torch.float64
    fresh = torch.rand(R, max_new_tokens, generator=generator, dtype=real, device=generator.device if generator else None).to(device)
    u, spent = fresh[:, 0], torch.zeros(R, device=device)       # both are for `uniforms` only
    stops = torch.as_tensor([] if stop is None else stop, dtype=torch.long, device=device).flatten()
    finite = torch.ones((), dtype=torch.bool, device=device)    # whether all logits were: looked at once, at the end
    if uniforms is not None:
        if uniforms.shape != (R,) or not (uniforms.is_floating_point() and 0 <= uniforms.min() <= uniforms.max() < 1):
            raise ValueError(f"{R} rows need {R} uniforms in [0, 1)")
        u, budget = uniforms.to(device, real), -math.log2(max(torch.finfo(uniforms.dtype).eps, torch.finfo(real).eps)) / 2      # bits

    # 1. Read each prompt once (padding on the right is invisible to what comes before it), then clone its cache to its n rows.
    ids = torch.zeros(len(prompts), P, dtype=torch.long)
    for i, p in enumerate(prompts):
        ids[i, :lens[i]] = torch.as_tensor(p)
    ids = ids.to(device)
    cache = KVCache(model.config, len(prompts), P, device, model.lm_head.weight.dtype)
    x = model.hidden(ids, cache)[torch.arange(len(prompts)), torch.as_tensor(lens) - 1]     # (prompts, C): each one's last token
    cache.set_lens(lens)
    cache = cache.expand(n, P + max_new_tokens - 1)
    logits = model.lm_head(x).repeat_interleave(n, dim=0)                                   # (R, V)

    # 2. Draw, retire the rows that stop, step the others.
    def draw(logits, number, u, spent):
        """logits (R, V), a fresh number, the row's own number and the bits it has paid, each (R,) -> token, logp, u, spent."""
        finite.logical_and_(logits.isfinite().all())
        if temperature == 0:
            return logits.argmax(-1), torch.zeros_like(number, dtype=torch.float32), u, spent
        probs = truncate(logits.float() / temperature, top_k, top_p).softmax(-1)            # (R, V)
        token, place = inverse_cdf(probs, number if uniforms is None else u)
        logp = probs.gather(1, token[:, None]).squeeze(1).log()
        if uniforms is not None:
            spent = spent - logp / math.log(2)
            used_up = spent > budget
            u, spent = torch.where(used_up, number, place), spent.masked_fill(used_up, 0)
        return token, logp, u, spent

    decode = decode_static if device.type in STATIC_ON and not torch.is_autocast_enabled(device.type) else decode_eager
    tokens, logps = decode(model, cache, logits, draw, fresh, u, spent, stops)              # (R, max_new_tokens); token -1: never drawn
    if not finite:
        raise NotFinite("generate: the model's logits are not all finite")

    # 3. Prompt and continuation of each row side by side.
    drawn = tokens >= 0
    prompt_lens = torch.as_tensor(lens, device=device).repeat_interleave(n)                 # (R,)
    T = int((prompt_lens + drawn.sum(1)).max())
    out = torch.zeros(R, P + max_new_tokens, dtype=torch.long, device=device)
    mask, logp = torch.zeros(out.shape, device=device), torch.zeros(out.shape, device=device)
    out[:, :P] = ids.repeat_interleave(n, dim=0)
    columns = prompt_lens[:, None] + torch.arange(max_new_tokens, device=device)            # (R, max_new_tokens)
    out.scatter_(1, columns, tokens.clamp_min(0)), mask.scatter_(1, columns, drawn.float()), logp.scatter_(1, columns, logps)
    return Rollout(out[:, :T], mask[:, :T], logp[:, :T], prompt_lens)


def skip_draws(rows, config, generator):
    """Draw, and drop, the numbers that generate takes for so many rows: processes that share a batch share one random stream."""
    torch.rand(rows, config.max_new_tokens, dtype=torch.float64, generator=generator)


# ---------------------------------------------------------------------------------------------------------------------------
# Tokenizers: each has encode, decode, `stop` (the ids that end a text) and `eos`, the first of them

class CharTokenizer:
    """One id per character of the alphabet, in its order; `eos` comes after the last one and decodes to nothing."""

    def __init__(self, alphabet):
        assert len(set(alphabet)) == len(alphabet), "a character stands twice in the alphabet"
        self.alphabet, self.eos, self.n_vocab = alphabet, len(alphabet), len(alphabet) + 1
        self.stop = [self.eos]
        self.index = {c: i for i, c in enumerate(alphabet)}

    def encode(self, text):
        """KeyError for a character that is not in the alphabet."""
        return [self.index[c] for c in text]

    def decode(self, ids):
        return "".join(self.alphabet[i] for i in ids if i != self.eos)


def next_pair(word, a, b, start):
    """Where in word, from start on, a is followed by b; len(word) if nowhere."""
    try:
        while word[(start := word.index(a, start)) + 1] != b:
            start += 1
        return start
    except (ValueError, IndexError):
        return len(word)


def bpe_merges(text, n_merges):
    """Byte-pair encoding (Sennrich et al., arXiv 1508.07909) over the bytes of GPT-2's pre-tokens -> merged byte strings, in order.

    Each step merges the most frequent adjacent pair; of equally frequent ones, the lexicographically greater pair of byte
    strings. Counts are kept up to date: a merge visits only the words that hold the pair, and a heap finds the next one. Only pairs with
    the merged token become more frequent, so only they are pushed; an entry whose count is out of date is put back with the right one.
    So there are a few heap operations for each pair that a merge replaces, of which a text has no more than bytes.
    """
    import regex    # \p{L}: the standard library's re does not know Unicode classes; comes with tiktoken
    words = Counter(regex.findall(SPLIT, text))
    counts, words = list(words.values()), [[bytes([b]) for b in w.encode()] for w in words]
    pairs, where = Counter(), defaultdict(set)      # pair -> its count; pair -> the words that hold it, or once did
    for i, w in enumerate(words):
        for pair in zip(w, w[1:]):
            pairs[pair] += counts[i]
            where[pair].add(i)
    descending = lambda b: tuple(255 - x for x in b) + (256,)       # heapq pops the smallest: turn the order round
    entry = lambda pair: (-pairs[pair], descending(pair[0]), descending(pair[1]), pair)
    heap, merges, known = [entry(p) for p in pairs], [], {bytes([b]) for b in range(256)}
    heapq.heapify(heap)
    while heap and len(merges) < n_merges:
        count, *_, pair = heapq.heappop(heap)
        if -count != pairs[pair]:
            if pairs[pair] > 0:
                heapq.heappush(heap, entry(pair))
            continue
        a, b = pair
        merged = a + b
        if merged not in known:     # two pairs can spell the same bytes: one token, one rank
            known.add(merged)
            merges.append(merged)
        grown = set()
        for i in where.pop(pair):
            old, new, j = words[i], [], 0
            while (k := next_pair(old, a, b, j)) < len(old):
                new += old[j:k]
                j = k + 2
                pairs[pair] -= counts[i]
                beside = [((new[-1], a), (new[-1], merged))] if new else []     # what was a pair with a or b, and is one with merged now
                beside += [((b, old[j]), (merged, old[j]))] if j < len(old) else []
                for before, after in beside:
                    pairs[before] -= counts[i]
                    pairs[after] += counts[i]
                    where[after].add(i)
                    grown.add(after)
                new.append(merged)
            words[i] = new + old[j:]
        for p in grown:
            if pairs[p] > 0:        # not merged again by the next site
                heapq.heappush(heap, entry(p))
    return merges


def train_bpe(text, vocab_size):
    """A byte-level BPE of `vocab_size` ids as a tiktoken.Encoding: 256 bytes, the merges, and <|endoftext|> last, its `eos`.

    A short text may run out of pairs to merge: then there are fewer ids (`n_vocab`). ValueError for a vocab_size below 257.
    """
    if vocab_size < 257:
        raise ValueError(f"a byte-level BPE needs 256 bytes and <|endoftext|>: vocab_size {vocab_size} < 257")
    return byte_level(bpe_merges(text, vocab_size - 257))


class BPE(tiktoken.Encoding):
    def encode_ordinary(self, text):
        """The ids of a text. Its longest runs of spaces are cut: tiktoken's regular expression cannot take them."""
        ids = []
        for part in short_runs(text):
            ids += super().encode_ordinary(part)
        return ids


def byte_level(merges):
    """The tiktoken.Encoding that these merged byte strings make, in their order."""
    vocab = [bytes([b]) for b in range(256)] + merges
    encoding = BPE("rollout", pat_str=SPLIT, mergeable_ranks={b: i for i, b in enumerate(vocab)},
                   special_tokens={"<|endoftext|>": len(vocab)})
    encoding.eos, encoding.stop = encoding.eot_token, [encoding.eot_token]
    return encoding


# ---------------------------------------------------------------------------------------------------------------------------
# python model.py: pre-training, the smallest that is worth looking at

@dataclass
class Config:
    seed: int = flag(0, "random seed; with --seeds K: the first of K", low=0, high=2 ** 32 - 1)
    seeds: int = flag(1, "repeat over this many seeds", low=1)
    device: str = flag("auto", "where to run", choices=("auto", "cpu", "cuda", "mps"))
    dtype: str = flag("float32", "bfloat16: autocast training", choices=("float32", "bfloat16"))
    out: str = flag("out/model", "folder for figure, metrics, claims and checkpoint")
    resume: bool = flag(False, "go on from the checkpoint in --out")
    quick: bool = flag(False, "a run of a few seconds that shows nothing but that it runs")
    figure: str = flag("loss", "which figure: loss (about 3 minutes)", choices=("loss",))
    steps: int = flag(600, "training steps", quick=5, low=1)
    bench: bool = flag(False, "train nothing: measure generate and a training step on the CPU beside installed peers (6 minutes), decoding on a GPU")
    nanogpt: str = flag("", "with --bench: a checkout of karpathy/nanoGPT to compare the training step with")
    data: str = flag("", "a text file, a folder, or a Hugging Face dataset with a text column (default: the standard library's sources)")
    vocab_size: int = flag(1024, "size of the BPE vocabulary", quick=300, low=257)
    block_size: int = flag(256, "context in tokens", quick=64, low=2)
    n_layer: int = flag(4, "layers", quick=1, low=1)
    n_head: int = flag(4, "heads", low=1)
    n_kv_head: int = flag(2, "key heads", low=1)
    n_embd: int = flag(128, "channels", quick=32, low=8)
    batch: int = flag(16, "sequences per step", quick=4, low=1)
    lr: float = flag(3e-3, "peak learning rate (AdamW, warm-up then cosine to a tenth)", low=0)
    compile: bool = flag(False, "torch.compile the model: a minute to compile, then faster steps")
    eval_every: int = flag(50, "steps between evaluations", quick=5, low=1)

    def idle(self):
        if self.bench:
            return dict.fromkeys({f.name for f in fields(self)} - {"bench", "nanogpt"}, "--bench trains nothing")
        return {"nanogpt": "only --bench compares"}


def load_documents(data):
    """'' -> the standard library's modules; a text file -> [text]; a folder -> its text files, or if it has none what `datasets`
    makes of it; any other name -> the texts of that Hugging Face dataset."""
    path, suffixes = Path(data) if data else Path(os.__file__).parent, (".txt", ".md", ".py", ".rst")
    read = lambda file: file.read_text("utf-8", errors="replace")
    try:
        if path.is_file():
            texts = [read(path)]
        else:
            files = (p for p in path.rglob("*") if p.suffix in suffixes and p.is_file()) if data else path.glob("*.py")
            texts = [read(file) for file in sorted(files)]
    except OSError as e:        # of a name that is too long, too
        raise UserError(f"--data {data}: cannot read {e.filename or path} ({e.strerror})") from None
    if not texts:
        try:
            import datasets
            texts = list(datasets.load_dataset(data, split="train")["text"])
        except Exception as e:
            raise UserError(f"--data {data}: no text file, no folder of texts, no dataset with a text column ({type(e).__name__})") from None
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise UserError(f"--data {data}: row {i + 1} is no text but {text!r:.40}")
    if not "".join(texts).strip():
        raise UserError(f"--data {data}: no text in it")
    return texts


def split(texts):
    """Training and held-out documents: every tenth is held out; where there are no more than ten, the last tenth of each."""
    if len(texts) > 10:
        return [t for i, t in enumerate(texts) if i % 10], texts[::10]
    cuts = [len(t) * 9 // 10 for t in texts]
    return [t[:n] for t, n in zip(texts, cuts)], [t[n:] for t, n in zip(texts, cuts)]


def lr_at(step, steps, peak, warmup=20):
    """The learning rate of a step: up to `peak` in a line over `warmup` steps, then down in a cosine to a tenth of it."""
    return peak * min((step + 1) / warmup, 0.55 + 0.45 * math.cos(math.pi * step / steps))


def pretrain(config, run, seed, device, gpt_config, train_ids, val_ids, bytes_per_token):
    """Next-token prediction on random windows of train_ids -> the model. Logs the training and the held-out loss.

    train_ids, val_ids (N,) int64 on the CPU; bytes_per_token turns nats per held-out token into bits per byte of its text.
    """
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = GPT(gpt_config).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), config.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    hidden = torch.compile(model.hidden) if config.compile else model.hidden
    T = config.block_size

    def loss_on(ids, starts):
        x = torch.stack([ids[i:i + T + 1] for i in starts]).to(device)          # (B, T + 1)
        with torch.autocast(device, torch.bfloat16, enabled=config.dtype == "bfloat16"):
            return -token_logprobs(hidden(x[:, :-1]), model.lm_head.weight, x[:, 1:])[0].mean()

    for step in run.loop(f"gpt {seed}", config.steps, model, optimizer, random.Random(seed), generator):
        started = time.time()
        for g in optimizer.param_groups:
            g["lr"] = lr_at(step, config.steps, config.lr)
        loss = loss_on(train_ids, torch.randint(len(train_ids) - T, (config.batch,), generator=generator))
        optimizer.zero_grad()
        loss.backward()
        value = loss.item()
        norm = descend(optimizer, value)
        row = dict(seed=seed, step=step + 1, tokens=(step + 1) * config.batch * T, loss=value, grad_norm=norm, seconds=time.time() - started)
        if (step + 1) % config.eval_every == 0 or step + 1 == config.steps:
            with torch.no_grad():
                starts = torch.arange(0, len(val_ids) - T, T)           # every window at the end, about 64 of them on the way
                starts = starts if step + 1 == config.steps else starts[::max(1, len(starts) // 64)]
                row["val_loss"] = sum(loss_on(val_ids, part).item() * len(part) for part in starts.split(16)) / len(starts)
            row["val_bits_per_byte"] = row["val_loss"] / math.log(2) / bytes_per_token
            run.bar.set_postfix_str(f"loss {value:.3f}, held out {row['val_loss']:.3f} nats/token = {row['val_bits_per_byte']:.3f} bits/byte")
        run.log(**row)
    return model


def main():
    config = parse_args(Config, __doc__)
    if config.bench:
        return bench(config.nanogpt)
    device = pick_device(config.device)
    if config.compile and not can_compile(device):
        raise UserError("--compile: torch.compile does not work on this machine")
    texts, started = load_documents(config.data), time.time()
    train_docs, val_docs = split(texts)
    # 1. Train the BPE on the training text, encode both; a run that goes on has its BPE in the checkpoint
    saved = load_checkpoint(Path(config.out) / "model.pt")["state"].get("tokenizer") if config.resume else None
    tokenizer = byte_level(saved["merges"]) if saved else train_bpe("".join(train_docs), config.vocab_size)
    train_ids, val_ids = (torch.tensor([i for ids in tokenizer.encode_ordinary_batch(docs) for i in [*ids, tokenizer.eos]])
                          for docs in (train_docs, val_docs))
    val_text = "".join(val_docs)
    if min(len(train_ids), len(val_ids)) <= config.block_size + 1:
        raise UserError(f"--data: {len(train_ids)} + {len(val_ids)} held-out tokens are too few for --block-size {config.block_size}")
    val_bytes = val_text.encode()
    bytes_per_token = len(val_bytes) / len(val_ids)
    gpt_config = GPTConfig(tokenizer.n_vocab, config.block_size, config.n_layer, config.n_head, config.n_embd, config.n_kv_head, qk_norm=True)
    GPT(gpt_config)         # UserError if it is too large
    need_memory(16 * config.batch * config.block_size * config.n_layer * config.n_embd,      # two norms in a layer, each keeps its input and its output
                f"what the backward pass needs of --batch {config.batch} x --block-size {config.block_size}", device)
    # 2. Only now the folder: a mistake in the flags leaves the last run's alone
    data = hashlib.sha256(json.dumps(texts).encode()).hexdigest()
    with Run(config, also=("samples.txt",), inputs={f"the text of --data {config.data}".strip(): data}) as run:
        run.keep("tokenizer", merges=[tokenizer.decode_single_token_bytes(i) for i in range(256, tokenizer.eos)])
        run.introduce(device, gpt_config.parameters)
        print(f"{len(train_ids):,} tokens to train on, {len(val_ids):,} held out, {tokenizer.n_vocab} ids, {bytes_per_token:.2f} bytes per token, "
              f"BPE and encoding {time.time() - started:.0f} s")
        # 3. Train, sample
        for seed in seeds_of(config):
            model = pretrain(config, run, seed, device, gpt_config, train_ids, val_ids, bytes_per_token)
        prompt = "def " if not config.data else val_text[:20]
        start = tokenizer.encode_ordinary(prompt)[:config.block_size]
        sample = generate(model, [start], max_new_tokens=min(120, config.block_size + 1 - len(start)), temperature=0.8,
                          stop=tokenizer.stop, generator=torch.Generator().manual_seed(config.seed))
        written = prompt + sample.texts(tokenizer)[0]
        run.write("samples.txt", written + "\n")
        print(f"\nA sample at temperature 0.8:\n{written}\n")
        # 4. Figure and claim
        final = series(run, "val_bits_per_byte")[1][:, -1]          # (seeds,)
        gzip = 8 * len(zlib.compress(val_bytes, 9)) / len(val_bytes)
        run.finish(plot_loss(run, config, gzip, final.mean()),
                   [claim("compression", "held-out bits per byte; threshold: gzip -9", "-", "-", final, "<=", gzip, config.seeds)])


def plot_loss(run, config, gzip, final):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for key, label in (("loss", "training batch"), ("val_loss", "held out")):
        steps, y = series(run, key)
        band(ax, steps * config.batch * config.block_size / 1e6, y, label, alpha=0.5 if key == "loss" else 1)
    ax.set(xlabel="training tokens (millions)", ylabel="loss (nats per token)", title=f"A small GPT needs {final:.2f} bits per byte of held-out text, gzip {gzip:.2f}")
    ax.legend()
    return fig


# ---------------------------------------------------------------------------------------------------------------------------
# python model.py --bench

def bench(nanogpt, rounds=2):
    """Our speed beside the peers', interleaved in one run: Hugging Face generate (if transformers is installed), nanoGPT's step."""
    warnings.simplefilter("ignore")
    if nanogpt and not (Path(nanogpt) / "model.py").is_file():
        raise UserError(f"--nanogpt {nanogpt}: no checkout of nanoGPT, it has no model.py")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}; medians of {rounds} interleaved rounds\n")
    generator = torch.Generator().manual_seed(0)
    toy = GPTConfig(64, 256, 4, 4, 128, tie=False)
    prompts = [torch.randint(1, 64, (int(n),), generator=generator).tolist() for n in torch.randint(8, 41, (16,), generator=generator)]
    for dtype in (torch.float32, torch.bfloat16):
        compare(f"rollout, 16 prompts x 16, stop token, {str(dtype)[6:]}", rollout_racers(toy, prompts, 16, 128, 0, dtype), rounds)
    gpt2, smollm2 = GPTConfig(50257, 1024, 12, 12, 768), GPTConfig(49152, 2048, 30, 9, 576, n_kv_head=3, n_hidden=1536)
    for name, config, batch in (("GPT-2", gpt2, 8), ("SmolLM2-135M", smollm2, 8), ("SmolLM2-135M", smollm2, 32)):
        prompts = [torch.randint(1, config.vocab_size, (32,), generator=generator).tolist() for _ in range(batch)]
        compare(f"{name} size, batch {batch}, 24 tokens, bfloat16", rollout_racers(config, prompts, 1, 24, None, torch.bfloat16), rounds)
    for dtype in (torch.float32, torch.bfloat16):
        compare(f"training step, 4 x 128, batch 64 x 256, {str(dtype)[6:]}", step_racers(nanogpt, dtype), rounds)
    if torch.cuda.is_available():
        bench_decoding()


def bench_decoding(batch=64, prompt=32, new=512):
    """On a GPU: a GPT-2's steps replayed as CUDA graphs beside the same steps launched one by one, and the memory traffic they reach."""
    global STATIC_ON
    gpt, block = GPT(GPTConfig(50257, 1024, 12, 12, 768)).to("cuda", torch.bfloat16), torch.empty(2 ** 32, dtype=torch.uint8, device="cuda")
    other, where, speed = block.clone(), STATIC_ON, {}

    def seconds(work):      # best of three
        times = []
        for _ in range(3):
            torch.cuda.synchronize()
            started = time.perf_counter()
            work(), torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
        return min(times)

    roof = 2 * block.nbytes / seconds(lambda: other.copy_(block))     # bytes read and written in a second
    per_token = 2 * 12 * 768 * 2                            # keys and values of one token, bytes
    per_step = sum(p.nbytes for p in gpt.parameters()) + batch * (prompt + new / 2) * per_token
    for name, STATIC_ON in (("eager", ()), ("CUDA graphs", ("cuda",))):
        speed[name] = batch * new / seconds(lambda: generate(gpt, [[1] * prompt] * batch, 1, new))
        print(f"GPT-2 size on {torch.cuda.get_device_name()}, batch {batch}, {new} tokens, bfloat16, {name}: {speed[name]:,.0f} tokens/s, "
              f"{speed[name] / batch * per_step / 1e9:,.0f} GB/s of a copy's {roof / 1e9:,.0f}")
    print(f"ratio {speed['CUDA graphs'] / speed['eager']:.2f}")
    STATIC_ON = where


def compare(title, racers, rounds):
    """racers: name -> function that returns tokens per second. Prints their medians and the ratio of our best to the others' best."""
    results = [{name: race() for name, race in racers.items()} for _ in range(rounds + 1)][1:]     # the first round warms up
    median = {name: float(np.median([r[name] for r in results])) for name in racers}
    ours, others = ([v for k, v in median.items() if k.startswith("rollout") == mine] for mine in (True, False))
    print(f"{title:<58} " + ", ".join(f"{k} {v:,.0f}" for k, v in median.items()) + " tokens/s"
          + (f"; ratio {max(ours) / max(others):.2f}" if others else ""), flush=True)


def tokens_per_s(work):
    """work() -> the tokens it made."""
    started = time.perf_counter()
    tokens = work()
    return tokens / (time.perf_counter() - started)


def rollout_racers(config, prompts, n, new, stop, dtype):
    """Ours and Hugging Face's generate, on the same Llama architecture with random weights; useful tokens: up to the stop token."""
    torch.manual_seed(0)
    model, racers = GPT(config).to(dtype), {}
    racers["rollout"] = lambda: tokens_per_s(lambda: int(generate(model, prompts, n, new, stop=stop).mask.sum()))
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        return racers
    peer = LlamaForCausalLM(LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.n_embd, intermediate_size=config.n_hidden, num_hidden_layers=config.n_layer,
        num_attention_heads=config.n_head, num_key_value_heads=config.n_kv_head, max_position_embeddings=config.block_size,
        tie_word_embeddings=config.tie, bos_token_id=None, eos_token_id=stop, pad_token_id=0)).to(dtype).eval()
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])

    def hugging_face(cache):
        out = peer.generate(input_ids=ids, attention_mask=mask, do_sample=True, top_k=0, num_return_sequences=n, max_new_tokens=new,
                            eos_token_id=stop, cache_implementation=cache)[:, width:]
        stopped = (out == stop).long().cumsum(1) - (out == stop).long() if stop is not None else torch.zeros_like(out)
        return int((stopped == 0).sum())

    racers["transformers"] = lambda: tokens_per_s(lambda: hugging_face(None))
    racers["transformers, static cache"] = lambda: tokens_per_s(lambda: hugging_face("static"))
    return racers


def step_racers(nanogpt, dtype, B=64, T=256):
    """A whole training step (forward, backward, clip, AdamW), bf16 by autocast. nanoGPT's model.py is imported from its checkout."""
    ids = torch.randint(64, (B, T + 1), generator=torch.Generator().manual_seed(0))
    x, y = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def racer(model, loss_of):
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)

        def step():
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                loss = loss_of()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            return B * T
        return lambda: tokens_per_s(step)

    ours = GPT(GPTConfig(64, T, 4, 4, 128))
    loss_of = lambda hidden: -token_logprobs(hidden(x), ours.lm_head.weight, y)[0].mean()
    racers = {"rollout": racer(ours, lambda: loss_of(ours.hidden))}
    if can_compile("cpu"):
        compiled_hidden = torch.compile(ours.hidden)
        racers["rollout, compiled"] = racer(ours, lambda: loss_of(compiled_hidden))
    if nanogpt:
        spec = importlib.util.spec_from_file_location("nanogpt_model", Path(nanogpt) / "model.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        peer = module.GPT(module.GPTConfig(block_size=T, vocab_size=64, n_layer=4, n_head=4, n_embd=128, dropout=0.0, bias=False))
        compiled = torch.compile(peer)
        racers["nanoGPT"] = racer(peer, lambda: peer(x, y)[1])
        racers["nanoGPT, compiled"] = racer(compiled, lambda: compiled(x, y)[1])
    return racers


if __name__ == "__main__":
    command(main)
