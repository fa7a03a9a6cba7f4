"""model.py: a GPT. What the methods in this folder train.

It is the Llama family's: RMSNorm before attention and before the MLP, rotary positions, SwiGLU,
grouped-query attention; sliding window, QKV bias and QK-norm are options. `GPT.hidden` maps token
ids to hidden states, with or without a KV cache (engine.py); the head is applied by whoever needs
it, because training never wants all the logits (kernels.token_logprobs) and sampling wants the last
row only. `GPT.from_pretrained` reads Hugging Face folders (Llama, SmolLM2, Qwen2, Qwen2.5, Qwen3),
`save_pretrained` writes them: huggingface.py knows their names for things.

Shapes: B batch, T time, C channels, H query heads, K key heads, D channels of a head, V vocabulary,
S positions that a query may see (T, and those in the cache).
"""

import ctypes
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from experiment import UserError
from huggingface import hf_config, hf_save, hf_state, hub_folder
from kernels import RMSNormFunction, attention
from meter import spend


@dataclass
class GPTConfig:
    """The shape of a GPT. UserError for one that cannot be."""

    vocab_size: int
    block_size: int  # positions; longer input is an error
    n_layer: int
    n_head: int
    n_embd: int
    n_kv_head: int | None = None  # key heads, each shared by n_head / n_kv_head query heads
    head_dim: int | None = None  # default n_embd / n_head
    # SwiGLU's width. The default, 8/3 n_embd down to a multiple of 16, makes its three matrices as
    # large as the two of a plain MLP of width 4 n_embd
    n_hidden: int | None = None
    window: int | None = None  # a token sees the last `window` tokens, itself included
    qkv_bias: bool = False
    qk_norm: bool = False  # RMSNorm on each head's query and key before the rotation
    tie: bool = True  # the head shares the embedding's weight
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
            raise UserError(f"head_dim {self.head_dim} is odd: rotary positions turn pairs")

    @property
    def parameters(self):
        """How many numbers a GPT of this shape has to learn, without making it."""
        C, D = self.n_embd, self.head_dim
        qkv = (self.n_head + 2 * self.n_kv_head) * D * (C + self.qkv_bias)
        attention = qkv + self.n_head * D * C + 2 * D * self.qk_norm
        block = attention + 3 * C * self.n_hidden + 2 * C  # an MLP and two norms
        embeddings = self.vocab_size * C * (1 if self.tie else 2)
        return embeddings + self.n_layer * block + C  # the last norm

    def flops(self, rows, tokens, positions):
        """Of a forward pass, but for the head: `tokens` new tokens in each row, which look at
        `positions` positions. See meter.py.
        """
        C, D = self.n_embd, self.head_dim
        weights = (2 * self.n_head + 2 * self.n_kv_head) * D * C + 3 * C * self.n_hidden
        looks = 2 * self.n_head * D * positions  # q k^T, and the weighted sum of v
        return 2 * rows * tokens * self.n_layer * (weights + looks)


class RMSNorm(nn.Module):
    """x / rms(x) * weight, over the last dimension (Zhang & Sennrich, arXiv 1910.07467)."""

    def __init__(self, C, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(C))
        self.eps = eps

    def forward(self, x):
        if x.dtype == self.weight.dtype and not torch.is_grad_enabled():
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return RMSNormFunction.apply(x, self.weight, self.eps)


def need_memory(size, what):
    """UserError if `size` bytes are more than the machine has: said before they are allocated."""
    has = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > has:
        needs = f"{size / 2**30:,.1f} GiB, of which this machine has {has / 2**30:,.1f}"
        raise UserError(f"{what}: {needs}")


def rotations(config):
    """Rotary positions (Su et al., arXiv 2104.09864): e^(i position theta_j), (block_size, 1, D/2)
    complex64. Theta falls from 1 to nearly 1 / rope_theta: fast pairs tell neighbours apart, slow
    ones tell how far away a token is.
    """
    D = config.head_dim
    with torch.device("cpu"):  # true numbers, even for a model of shapes without memory
        theta = config.rope_theta ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)  # (D/2,)
        positions = torch.arange(config.block_size, dtype=torch.float64)
    angle = torch.outer(positions, theta)  # (block_size, D/2)
    return torch.polar(torch.ones_like(angle), angle).to(torch.complex64)[:, None]


def rotate(x, rope):
    """Channels 2j and 2j + 1 are one complex number, turned by the angle of their position. The
    product of a query and a key then depends on the distance between the two only.

    x (B, T, H, D); rope (T, 1, D/2) or (B, T, 1, D/2), complex.
    """
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))  # (B, T, H, D/2)
    return torch.view_as_real(pairs * rope).flatten(-2).to(x.dtype)  # (B, T, H, D)


class Attention(nn.Module):
    """Causal self-attention. layer: its number, by which a cache knows what is its own."""

    def __init__(self, config, layer):
        super().__init__()
        self.layer = layer
        self.n_head = config.n_head
        self.n_kv_head = config.n_kv_head
        self.head_dim = config.head_dim
        self.window = config.window
        heads = self.n_head + 2 * self.n_kv_head  # queries, keys and values in one product
        self.qkv = nn.Linear(config.n_embd, heads * self.head_dim, bias=config.qkv_bias)
        self.proj = nn.Linear(self.n_head * self.head_dim, config.n_embd, bias=False)
        self.q_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else None

    def forward(self, x, rope, mask=None, cache=None):
        """x (B, T, C) -> (B, T, C). mask: what each token sees, where lengths differ in a cache."""
        B, T, _ = x.shape
        H, K = self.n_head, self.n_kv_head
        qkv = self.qkv(x).view(B, T, H + 2 * K, self.head_dim)
        q, k, v = qkv.split([H, K, K], dim=2)  # (B, T, H, D), (B, T, K, D), (B, T, K, D)
        if self.q_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if hasattr(cache, "attend"):  # a step of generate has kernels of its own: decoding.py
            return self.proj(cache.attend(self.layer, q, k, v, rope))
        q, k = rotate(q, rope), rotate(k, rope)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # (B, S, K, D): all that this layer can see
        # heads come before time: (B, H, T, D) and (B, K, S, D) -> y (B, H, T, D)
        y = attention(*(t.transpose(1, 2) for t in (q, k, v)), window=self.window, mask=mask)
        return self.proj(y.transpose(1, 2).flatten(2))  # (B, T, C)


class SwiGLU(nn.Module):
    """An MLP with gated hidden units: proj(silu(gate x) * up x) (Shazeer, arXiv 2002.05202)."""

    def __init__(self, config):
        super().__init__()
        self.gate = nn.Linear(config.n_embd, config.n_hidden, bias=False)
        self.up = nn.Linear(config.n_embd, config.n_hidden, bias=False)
        self.proj = nn.Linear(config.n_hidden, config.n_embd, bias=False)

    def forward(self, x):
        return self.proj(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """One layer: tokens exchange something in attention, then each thinks for itself in the MLP.
    Both add to x, the residual stream.
    """

    def __init__(self, config, layer):
        super().__init__()
        self.norm1 = RMSNorm(config.n_embd, config.norm_eps)
        self.attn = Attention(config, layer)
        self.norm2 = RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = SwiGLU(config)

    def forward(self, x, rope, mask=None, cache=None):
        x = x + self.attn(self.norm1(x), rope, mask=mask, cache=cache)
        return x + self.mlp(self.norm2(x))


class Head(nn.Linear):
    """Hidden states (..., C) -> logits (..., V), counted."""

    def forward(self, x):
        spend(2 * x.numel() * self.out_features)
        return super().forward(x)


class GPT(nn.Module):
    """Embedding, blocks, a last norm, and the head that makes logits of hidden states.

    checkpointing = True: a block keeps its input only, and is computed again in the backward pass.
    UserError for a model that this machine could not train: weights, gradient and AdamW's two
    moments, 16 bytes a parameter, and the rotations.
    """

    def __init__(self, config):
        super().__init__()
        size = 16 * config.block_size * config.head_dim  # rotations are numbers in any case
        if torch.get_default_device().type != "meta":  # there, shapes take no memory
            size += 16 * config.parameters
        what = f"a model of {config.parameters:,} parameters, its gradient, AdamW's two moments"
        need_memory(size, f"{what} and {config.block_size:,} positions")
        self.config = config
        self.checkpointing = False
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd, config.norm_eps)
        self.lm_head = Head(config.n_embd, config.vocab_size, bias=False)
        self.rope = rotations(config)  # no buffer: .to(bf16) must not round it
        # GPT-2's start. Each layer writes into the residual stream twice, with a `proj`: those
        # start smaller, so that the stream's size does not grow with the number of layers
        for name, p in self.named_parameters():
            if p.dim() == 2:
                std = 0.02 / math.sqrt(2 * config.n_layer) if "proj" in name else 0.02
                nn.init.normal_(p, std=std)
            elif "bias" in name:
                nn.init.zeros_(p)
        if config.tie:
            self.lm_head.weight = self.wte.weight

    def hidden(self, ids, cache=None):
        """ids (B, T) int64 -> final hidden states (B, T, C). With a cache, ids continue its rows
        and are added to it.

        AssertionError past block_size positions.
        """
        B, T = ids.shape
        seen = 0 if cache is None else cache.length
        assert seen + T <= self.config.block_size, f"past block_size {self.config.block_size}"
        spend(self.config.flops(B, T, seen + T))
        # without a cache token t stands at position t, and causal attention needs no mask
        positions, mask = (slice(T), None) if cache is None else cache.extend(T)
        self.rope = self.rope.to(ids.device)
        rope = self.rope[positions]  # (T, 1, D/2); (B, T, 1, D/2) where rows differ in length
        x = self.wte(ids)  # (B, T, C)
        for block in self.blocks:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, rope, mask, cache, use_reentrant=False)
            else:
                x = block(x, rope, mask=mask, cache=cache)
        return self.norm(x)

    def forward(self, ids):
        """ids (B, T) -> logits (B, T, V)."""
        return self.lm_head(self.hidden(ids))

    @classmethod
    def from_pretrained(cls, name, dtype=None, block_size=None):
        """The model in a Hugging Face folder, or of a hub id: Llama, SmolLM2, Qwen2, Qwen2.5,
        Qwen3.

        dtype: of the weights (default: as they are stored). block_size: fewer positions than the
        checkpoint's, for a smaller rotary table. UserError for what can't be read or is not
        supported, and for a tensor that is missing, left over, or of the wrong shape.
        """
        folder = hub_folder(name)
        fields = hf_config(folder / "config.json", block_size)
        try:
            config = GPTConfig(**fields)
            # shapes without memory: the weights come from the file
            with torch.device("meta"):
                model = cls(config)
        except UserError as e:
            raise UserError(f"{folder / 'config.json'}: {e}") from None
        model.load_state_dict(hf_state(folder, model, dtype), strict=False, assign=True)
        if config.tie:
            model.lm_head.weight = model.wte.weight
        return model

    def save_pretrained(self, folder, like=None, stop=None):
        """Write config.json and model.safetensors, which `transformers` opens, whole or not at all.
        like: the folder or hub id whose tokenizer goes with them. stop: the ids that end a text
        (default: like's).

        What an earlier save left in the folder goes. UserError for a folder with files by these
        names that no save wrote, for one that can't be written, and if the model has no name there:
        a sliding window, or biases together with QK-norm.
        """
        hf_save(self, Path(folder), like, stop)


# --------------------------------------------------------------------------------------------------
# Memory


def keep_memory():
    """What a step frees stays with the process. Otherwise glibc hands it back to the system, and
    the next step gets it anew, page by page: a tenth of a small model's time.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD: blocks of up to 32 MiB come from the heap,
        libc.mallopt(-1, 2**30)  # M_TRIM_THRESHOLD: which keeps up to 1 GiB of free ones


keep_memory()
