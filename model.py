"""model.py: a GPT. What the methods in this folder train.

It is the Llama family's: RMSNorm before each block, rotary positions, SwiGLU, grouped-query
attention; sliding window, QKV bias and QK-norm are options. `GPT.hidden` maps token ids to hidden
states, with or without a KV cache (engine.py); the head is applied by whoever needs it, because
training never wants all the logits (kernels.token_logprobs) and sampling wants the last row only.
`GPT.from_pretrained` reads Hugging Face folders (Llama, SmolLM2, Qwen2, Qwen2.5, Qwen3),
`save_pretrained` writes them: huggingface.py knows their names for things.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint

from experiment import UserError, need_memory
from huggingface import hf_config, hf_save, hf_state, hub_folder
from kernels import RMSNormFunction, attention


@dataclass
class GPTConfig:
    vocab_size: int
    block_size: int  # positions; longer input is an error
    n_layer: int
    n_head: int
    n_embd: int
    # fewer key heads than query heads: grouped-query attention (default: as many)
    n_kv_head: int | None = None
    head_dim: int | None = None  # default n_embd / n_head
    # SwiGLU's width; default 8/3 n_embd to a multiple of 16: as many weights as a 4x MLP
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
            raise UserError(
                f"rotary positions turn pairs of channels: head_dim {self.head_dim} is odd"
            )

    @property
    def parameters(self):
        """How many numbers a GPT of this shape has to learn, without making it."""
        C, D, H, K = self.n_embd, self.head_dim, self.n_head, self.n_kv_head
        attention = (H + 2 * K) * D * (C + self.qkv_bias) + H * D * C + 2 * D * self.qk_norm
        block = attention + 3 * C * self.n_hidden + 2 * C
        return (1 if self.tie else 2) * self.vocab_size * C + self.n_layer * block + C


class RMSNorm(nn.Module):
    def __init__(self, C, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(C)), eps

    def forward(self, x):
        return RMSNormFunction.apply(x, self.weight, self.eps)


def rotate(x, rope):
    """Rotary positions (Su et al., arXiv 2104.09864): channels 2i, 2i+1 are one complex number,
    turned by position * theta_i.

    x (B, T, H, D); rope (T, 1, D/2) or (B, T, 1, D/2), complex.
    """
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))  # (B, T, H, D/2)
    return torch.view_as_real(pairs * rope).flatten(-2).to(x.dtype)  # (B, T, H, D)


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.n_head, self.n_kv_head, self.window = (
            layer,
            config.n_head,
            config.n_kv_head,
            config.window,
        )
        D = self.head_dim = config.head_dim
        self.qkv = nn.Linear(
            config.n_embd, (self.n_head + 2 * self.n_kv_head) * D, bias=config.qkv_bias
        )
        self.proj = nn.Linear(self.n_head * D, config.n_embd, bias=False)
        self.q_norm = RMSNorm(D, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(D, config.norm_eps) if config.qk_norm else None

    def forward(self, x, rope, mask=None, cache=None):
        B, T, _ = x.shape
        H, K = self.n_head, self.n_kv_head
        # (B, T, H + K, D), (B, T, K, D)
        qk, v = self.qkv(x).view(B, T, H + 2 * K, self.head_dim).split([H + K, K], dim=2)
        if self.q_norm:
            qk = torch.cat((self.q_norm(qk[:, :, :H]), self.k_norm(qk[:, :, H:])), dim=2)
        q, k = rotate(qk, rope).split([H, K], dim=2)  # (B, T, H, D), (B, T, K, D)
        if cache is not None:
            # (B, S, K, D): all that this layer can see
            k, v = cache.append(self.layer, k, v)
        # (B, H, T, D)
        y = attention(*(t.transpose(1, 2) for t in (q, k, v)), window=self.window, mask=mask)
        return self.proj(y.transpose(1, 2).flatten(2))  # (B, T, C)


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
    """UserError for one that this machine could not train: weights, gradient and AdamW's two
    moments, 16 bytes a parameter, and the rotary table.
    """

    def __init__(self, config):
        super().__init__()
        if torch.get_default_device().type != "meta":
            need_memory(
                16 * config.parameters + 4 * config.block_size * config.head_dim,
                f"a model of {config.parameters:,} parameters, its gradient, AdamW's two moments and {config.block_size:,} positions",
            )
        # True: a block keeps its input only, and is computed again in the backward pass
        self.config, self.checkpointing = config, False
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd, config.norm_eps)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        theta = config.rope_theta ** (
            -torch.arange(0, config.head_dim, 2, dtype=torch.float64, device="cpu")
            / config.head_dim
        )
        # (block_size, D/2)
        angle = torch.outer(
            torch.arange(config.block_size, dtype=torch.float64, device="cpu"), theta
        )
        # no buffer: .to(bf16) must not round it
        self.rope = torch.polar(torch.ones_like(angle), angle).to(torch.complex64)[:, None]
        for name, p in self.named_parameters():
            # GPT-2's rule: what writes into the residual stream starts smaller, by the number of
            # writers
            if p.dim() == 2:
                nn.init.normal_(
                    p, std=0.02 / math.sqrt(2 * config.n_layer) if "proj" in name else 0.02
                )
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
        self.rope = self.rope.to(ids.device)
        assert T + (0 if cache is None else cache.length) <= self.config.block_size, (
            f"past block_size {self.config.block_size}"
        )
        positions, mask = (slice(0, T), None) if cache is None else cache.extend(T)
        x, rope = self.wte(ids), self.rope[positions]  # (B, T, C)
        again = self.checkpointing and torch.is_grad_enabled()
        for block in self.blocks:
            x = (
                torch.utils.checkpoint.checkpoint(block, x, rope, mask, cache, use_reentrant=False)
                if again
                else block(x, rope, mask, cache)
            )
        return self.norm(x)

    def forward(self, ids):
        return self.lm_head(self.hidden(ids))  # (B, T, V)

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
        except UserError as e:
            raise UserError(f"{folder / 'config.json'}: {e}") from None
        # shapes without memory: the weights come from the file
        with torch.device("meta"):
            model = cls(config)
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


def checkpoint_for(task, what, name, max_new_tokens, dtype=torch.float32):
    """The model in a folder or of a hub id, if it can hold the task's longest prompt with its
    answer, and knows the tokenizer's ids. what: the flag.
    """
    model, positions = GPT.from_pretrained(name, dtype), task.longest + max_new_tokens - 1
    if model.config.block_size < positions or model.config.vocab_size < task.tokenizer.n_vocab:
        raise UserError(
            f"{what} {name}: has {model.config.block_size} positions and {model.config.vocab_size} ids; the longest prompt and "
            f"--max-new-tokens need {positions}, the tokenizer {task.tokenizer.n_vocab}"
        )
    return model
