"""kernels.py: the two places where a language model spends its memory and time, written so that it
does not.

1. `token_logprobs`: log-probability and entropy of every target token, straight from the hidden
   states and the head's weight. With logits z = h W^T / temperature, p = softmax(z) and lse = log
   sum exp z,

       logp = z[target] - lse          d logp / dz = onehot(target) - p
       H    = lse - sum_v p_v z_v      d H    / dz = -p * (log p + H)

   Both gradients need nothing but p, and p can be recomputed from z and lse. So the (tokens, V)
   logits are never stored: the forward pass walks over blocks of the vocabulary with an online
   softmax (Milakov & Gimelshein, arXiv 1805.02867), keeps one lse and one H per token, and the
   backward pass computes each block of logits a second time (Cut Cross-Entropy, Wijmans et al.,
   arXiv 2411.09009). Price: 4 matrix products instead of 3. Walking over the vocabulary, not over
   the tokens, writes each row of the weight's gradient once, so it is never accumulated in bf16.

   On a GPU (`triton`) the products stay cuBLAS's, and one Triton kernel makes a single pass over
   each block between them. A block of logits costs 4 bytes of traffic in the forward and 10 in the
   backward pass, against 8 C operations per logit: at C = 4,096 that is 2,300 operations per byte
   where an H200 balances at about 200. A kernel that also multiplies, as CCE's do, would save that
   tenth of the time and lose more to cuBLAS. (Counted, not measured: no GPU was at hand.)

2. `attention`: grouped-query, causal or sliding-window. `reference` spells the equation out; `sdpa`
   calls torch's kernels; `triton` is FlashAttention-2 (Dao, arXiv 2307.08691), forward and
   backward. With S = Q K^T / sqrt(D), P = softmax(S) and O = P V:

       dV = P^T dO        dP = dO V^T        dQ = dS K / sqrt(D)        dK = dS^T Q / sqrt(D)
       dS = P * (dP - delta),  delta_i = sum_j P_ij dP_ij = sum_j P_ij (dO_i . V_j) = dO_i . O_i

   dS is softmax's own gradient, diag(p) - p p^T for each row, and delta, the one thing in it that
   needs a whole row, is known from O alone. So with one lse per row every tile of P is 2^(S - lse),
   computed again wherever it is needed: forward the tile's 2 products, backward 3 for dQ and 4 for
   dK and dV, in two kernels that each write their own rows once: 7 products instead of 5, no
   atomics, the same sum every time (for the same tile). Nothing of size T^2 ever reaches memory.

   Why that is fast. A tile of M queries by N keys is 4 M N D operations forward and reads 4 N D
   bytes of K and V (bf16): M operations per byte, 128 here, and the neighbours that read the same K
   and V find them in the L2 cache. Spelled out, attention writes and reads its scores at least
   twice, 8 bytes per 4 D operations: 32 per byte at D = 64, a sixth of what the GPU needs to be
   busy. What is left to save is the softmax itself: a Hopper multiprocessor does 4,096 operations
   of products a cycle but 16 exponentials, so at D = 64 the one exp2 of a score takes as long as
   its 4 D = 256 operations. Hence scale and log2(e) in one multiply-add before it, tiles that
   nobody sees skipped, and masks only in tiles at an edge.

3. `RMSNormFunction`: the norm whose backward pass torch leaves in pieces.

`python bench.py kernels` measures all of them.
"""

import functools
import math
import os
import shutil
from itertools import pairwise
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from meter import spend

try:
    import triton
    import triton.language as tl
except ImportError:  # the Triton kernels below are then defined but cannot run
    triton = None
    tl = SimpleNamespace(constexpr=bool)

# MKL chooses its exp, log and cos at the first call. Two threads that make it together may get two
# of them, one with half the digits (seen in a tenth of all runs): so one thread calls first
torch.ones(1).exp()
# Triton runs its kernels in numpy: slow, but needs no GPU
INTERPRET = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
# Logits in flight at once: 64 MiB in fp32. Larger blocks are no faster, smaller ones starve the
# matrix product.
BLOCK = 2**24
# Vocabularies from this size on repay the 5 to 20 s that torch.compile takes on its first call.
COMPILE_V = 16384


def wide(x):
    """x in fp32, or in the wider type it has: where bf16 would round a sum."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# --------------------------------------------------------------------------------------------------
# token_logprobs


def token_logprobs(hidden, weight, targets, temperature=1.0, impl="auto"):
    """Log-probability of each target, and entropy of the distribution it comes from, both in nats.

    hidden (..., C), weight (V, C), targets (...) int64 in [0, V) -> logp (...), entropy (...), both
    fp32 (reference: fp64 of fp64). Differentiable in hidden and weight with any per-token upstream
    gradient. `impl`: reference | chunked | compiled | triton | auto (the fastest that runs here).
    Raises ValueError for an unknown impl, for triton where it cannot run, for a temperature below
    1e-30, and on a CPU for a target that is none (on a GPU the logp of such a token is nan, or an
    assertion of the device's).
    """
    if not temperature >= 1e-30:
        raise ValueError(f"temperature must be positive (1e-30 at least), got {temperature}")
    V = weight.shape[0]
    on_cpu = targets.device.type == "cpu"  # on a GPU, to look is to wait
    if on_cpu and targets.numel() and not 0 <= targets.min() <= targets.max() < V:
        raise ValueError(f"targets must be in [0, {V})")
    h = hidden.reshape(-1, hidden.shape[-1])  # (N, C)
    y = targets.reshape(-1).contiguous()  # (N,)
    spend(2 * h.numel() * V)
    if impl == "auto":
        impl = logprobs_impl(h, V)
    if impl == "triton" and no_triton(h):
        raise ValueError(f"token_logprobs, impl 'triton': {no_triton(h)}")
    if impl == "reference":
        logp, entropy = reference_logprobs(h, weight, y, temperature)
    elif impl in ("chunked", "compiled", "triton"):
        # round to autocast's dtype here; inside, the blocks choose their own
        if torch.is_autocast_enabled(h.device.type):
            dtype = torch.get_autocast_dtype(h.device.type)
            h, weight = h.to(dtype), weight.to(dtype)
        with torch.autocast(h.device.type, enabled=False):
            if impl == "triton":
                with torch.cuda.device_of(h):
                    logp, entropy = FusedLogprobs.apply(h, weight, y, 1.0 / temperature)
            else:
                compiled = impl == "compiled"
                logp, entropy = ChunkedLogprobs.apply(h, weight, y, 1.0 / temperature, compiled)
    else:
        raise ValueError(f"unknown impl {impl!r}: reference, chunked, compiled, triton or auto")
    return logp.view(targets.shape), entropy.view(targets.shape)


def logprobs_impl(h, V):
    """The fastest impl of token_logprobs for hidden states h (N, C) and a vocabulary of V."""
    if len(h) * V <= BLOCK:  # one block would hold all logits: then do not compute them twice
        return "reference"
    if h.is_cuda and triton_runs("token_logprobs", h, "compiled or chunked"):
        return "triton"
    if V >= COMPILE_V and can_compile(h.device.type):
        return "compiled"
    return "chunked"


def reference_logprobs(h, weight, y, temperature):
    """The oracle: what the other impls must equal. Holds every logit, several times over."""
    z = wide(F.linear(h, weight)) / temperature  # (N, V)
    logp = z.log_softmax(-1)  # (N, V)
    entropy = -(logp.exp() * logp).sum(-1)  # (N,)
    return logp.gather(-1, y[:, None]).squeeze(-1), entropy


def forward_block(z, inv_t, m, s, s1):
    """Online softmax: fold a block of raw logits z (N, b), times inv_t, into the running max m, sum
    e^(z-m) and sum z e^(z-m), each (N,).
    """
    z = z.float().mul_(inv_t)
    m_new = torch.maximum(m, z.amax(-1))
    e = (z - m_new[:, None]).exp_()
    rescale = (m - m_new).exp()
    return m_new, s * rescale + e.sum(-1), s1 * rescale + e.mul_(z).sum(-1)


def backward_block(z, inv_t, lse, entropy, g_logp, g_ent):
    """dLoss/dz for a block of raw logits z (N, b), but for the onehot: -p * (g_logp + g_ent * (log
    p + H)) / temperature.
    """
    logp = z.float().mul_(inv_t).sub_(lse[:, None])
    p = logp.exp()
    slope = logp.add_(entropy[:, None]).mul_(g_ent[:, None]).add_(g_logp[:, None])
    return p.mul_(slope).mul_(-inv_t)


def block_starts(N, V):
    """Bounds of even blocks of the vocabulary: at most BLOCK logits in each, but never under 256
    columns (by then h itself is no smaller, if C >= 256).
    """
    width = min(V, max(256, BLOCK // max(N, 1)))
    n = -(-V // width)  # rounded up
    return [V * i // n for i in range(n + 1)]


def gemm_dtype(x):
    """The dtype to multiply matrices of x's dtype in. bf16 on a CPU without bf16 units is emulated,
    4x slower than fp32: fp32.
    """
    emulated = (
        x.device.type == "cpu"
        and x.dtype == torch.bfloat16
        and not torch.cpu._is_avx512_bf16_supported()
    )
    return torch.float32 if emulated else x.dtype


class ChunkedLogprobs(torch.autograd.Function):
    """(N, C), (V, C), (N,) -> logp, entropy (N,) fp32, a block of the vocabulary at a time;
    `compiled` fuses what is done to a block.
    """

    @staticmethod
    def forward(ctx, h, weight, y, inv_t, compiled):
        N, V = h.shape[0], weight.shape[0]
        fold = compile_block(forward_block) if compiled else forward_block
        x = h.to(gemm_dtype(h))
        # what forward_block keeps of each row, (N,): maximum and two sums relative to it
        m = torch.full((N,), -torch.inf, device=h.device)
        s, s1 = torch.zeros_like(m), torch.zeros_like(m)
        target = torch.full_like(m, torch.nan)  # the targets' logits
        for a, b in pairwise(block_starts(N, V)):
            z = F.linear(x, weight[a:b].to(x.dtype))  # (N, b - a)
            column = (y - a).clamp(0, b - a - 1)[:, None]
            z_y = z.gather(1, column).squeeze(1).float() * inv_t  # (N,), of the targets in here
            target = torch.where((y >= a) & (y < b), z_y, target)
            m, s, s1 = fold(z, inv_t, m, s, s1)  # overwrites z
        lse = m + s.log()
        entropy = lse - s1 / s
        ctx.save_for_backward(h, weight, y, lse, entropy)
        ctx.inv_t = inv_t
        ctx.compiled = compiled
        return target - lse, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g_logp, g_ent):
        h, weight, y, lse, entropy = ctx.saved_tensors
        N, V = h.shape[0], weight.shape[0]
        slope = compile_block(backward_block) if ctx.compiled else backward_block
        x = h.to(gemm_dtype(h))
        # dh is summed over the blocks: in fp32. dweight is written once, block by block
        dh = torch.zeros(h.shape, dtype=torch.float32, device=h.device)
        dweight = torch.empty_like(weight)
        for a, b in pairwise(block_starts(N, V)):
            w = weight[a:b].to(x.dtype)
            dz = slope(F.linear(x, w), ctx.inv_t, lse, entropy, g_logp, g_ent)  # (N, b - a)
            # g (onehot - p) nearly cancels where p is nearly 1: add in fp32, then round
            onehot = torch.where((y >= a) & (y < b), g_logp * ctx.inv_t, 0)  # (N,)
            column = (y - a).clamp(0, b - a - 1)[:, None]
            dz.scatter_add_(1, column, onehot[:, None])
            dz = dz.to(x.dtype)
            add_product(dh, dz, w)
            if x.dtype == weight.dtype:
                torch.mm(dz.T, x, out=dweight[a:b])
            else:
                dweight[a:b].copy_(dz.T @ x)
        return dh.to(h.dtype), dweight, None, None, None


def add_product(c, a, b):
    """c += a b, c in fp32. On a GPU the product of half-precision matrices goes straight into the
    sum: no rounding, no buffer.
    """
    if c.dtype == a.dtype:
        c.addmm_(a, b)
    elif c.is_cuda:
        torch.addmm(c, a, b, out_dtype=c.dtype, out=c)
    else:
        c += a @ b


@functools.cache
def compile_block(f):
    return torch.compile(f, dynamic=True)


def can_compile(device="cpu"):
    """torch.compile needs a C++ compiler for the CPU and brings Triton for CUDA; elsewhere it is an
    experiment.
    """
    compilers = shutil.which("g++") or shutil.which("clang++")
    return device == "cuda" or device == "cpu" and compilers is not None


# --------------------------------------------------------------------------------------------------
# attention


def attention(q, k, v, causal=True, window=None, mask=None, impl="auto"):
    """softmax(q k^T / sqrt(D)) v, with H query heads sharing Hkv key heads in groups of H / Hkv.

    q (B, H, T, D), k and v (B, Hkv, S, D) -> (B, H, T, D). The T queries are the last T of the S
    positions. `causal`: a query sees no later key; `window`: of those, only the last `window` >= 1
    (its own included). `mask` (B or 1, 1, T, S) bool, True = sees, replaces both (a ragged cache
    knows better). `impl`: reference | sdpa (torch's kernels) | triton (FlashAttention-2, see above)
    | auto (triton on a GPU in bf16 and fp16, else sdpa). Raises ValueError for an unknown impl, and
    for triton where it cannot run; AssertionError if H is no multiple of Hkv or T > S.
    """
    T, S = q.shape[2], k.shape[2]
    assert q.shape[1] % k.shape[1] == 0, f"{q.shape[1]} query heads over {k.shape[1]} key heads"
    assert T <= S, f"{T} queries cannot be the last of {S} positions"
    if impl == "auto":
        impl = attention_impl(q, mask)
    if impl == "triton":
        return flash_attention(q, k, v, causal=causal, window=window, mask=mask)
    if impl == "reference":
        if mask is None:
            mask = visible(T, S, causal=causal, window=window, device=q.device)
        return reference_attention(q, k, v, mask)
    if impl == "sdpa":
        return sdpa_attention(q, k, v, causal=causal, window=window, mask=mask)
    raise ValueError(f"unknown impl {impl!r}: reference, sdpa, triton or auto")


def attention_impl(q, mask):
    """triton on a GPU, but not for one query or fp32: there is nothing for tensor cores to do."""
    fits = q.is_cuda and mask is None and q.shape[-1] <= 128
    pays = q.shape[2] > 1 and q.dtype != torch.float32
    if fits and pays and not torch.compiler.is_compiling() and triton_runs("attention", q, "sdpa"):
        return "triton"
    return "sdpa"


def reference_attention(q, k, v, mask):
    """The equation. mask (B or 1, 1, T, S). Holds every score."""
    group = q.shape[1] // k.shape[1]
    k = k.repeat_interleave(group, dim=1)  # (B, H, S, D)
    v = v.repeat_interleave(group, dim=1)
    scores = wide(q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5  # (B, H, T, S)
    return scores.masked_fill(~mask, -torch.inf).softmax(-1).to(v.dtype) @ v


def flash_attention(q, k, v, causal, window, mask):
    """The Triton kernels below. ValueError where they cannot run."""
    why = no_triton(q)
    if mask is not None or q.shape[-1] > 128:
        why = why or "no masks, and no more than 128 channels a head"
    if why:
        raise ValueError(f"attention, impl 'triton': {why}")
    if torch.is_autocast_enabled(q.device.type):
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    before = FAR if window is None else window - 1
    with torch.cuda.device_of(q):
        return FlashAttention.apply(q, k, v, before, 0 if causal else FAR)


def sdpa_attention(q, k, v, causal, window, mask):
    """torch's kernels, and where they need help."""
    (B, H, T, D), (K, S) = q.shape, k.shape[1:3]
    if mask is None and window is not None:
        width = max(window, 32)  # of a band: smaller ones do not pay
        if causal and T == S >= 4 * width:
            return banded(q, k, v, window, width)
        if window < S:
            mask = visible(T, S, causal=causal, window=window, device=q.device)
    # without tile units a CPU is twice as fast in fp32 as in bf16; with them torch's backward pass
    # of short rows is, up to ten times
    slow = T <= 256 and q.requires_grad or not torch.cpu._is_amx_tile_supported()
    if slow and q.device.type == "cpu" and q.dtype == torch.bfloat16:
        with torch.autocast("cpu", enabled=False):
            in_fp32 = (x.float() for x in (q, k, v))
            y = sdpa_attention(*in_fp32, causal=causal, window=None, mask=mask)
        return y.to(q.dtype)
    # decoding: the heads of a group become the queries of one head, no copy of k, v
    if T == 1 and K < H:
        y = F.scaled_dot_product_attention(q.reshape(B, K, H // K, D), k, v, attn_mask=mask)
        return y.reshape_as(q)
    # torch's is_causal aligns the first query with the first key; ours the last with the last
    if mask is None and causal and 1 < T < S:
        mask = visible(T, S, causal=True, window=None, device=q.device)
    is_causal = causal and mask is None and T > 1
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=K < H
    )


def banded(q, k, v, window, b):
    """Causal attention in a window of at most b, in blocks of b queries: each sees its own block of
    keys and the one before, T 2b pairs for T^2.
    """
    B, _, T, _ = q.shape
    n = -(-T // b)  # blocks, rounded up

    def blocks(x):
        """(B, heads, T, D) -> (B, n, heads, b, D), zeros past T."""
        return F.pad(x, (0, 0, 0, n * b - T)).unflatten(2, (n, b)).transpose(1, 2)

    def with_the_one_before(x):
        """(B, n, K, b, D) -> (B n, K, 2b, D). Zeros come before the first block."""
        before = torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), 1)
        return torch.cat((before, x), 3).flatten(0, 1)

    q = blocks(q).flatten(0, 1)  # (B n, H, b, D)
    k = with_the_one_before(blocks(k))
    v = with_the_one_before(blocks(v))
    mask = visible(b, 2 * b, causal=True, window=window, device=q.device)  # (1, 1, b, 2b)
    mask = mask.repeat(n, 1, 1, 1)
    mask[0, :, :, :b] = False
    mask = mask.repeat(B, 1, 1, 1)  # (B n, 1, b, 2b)
    y = sdpa_attention(q, k, v, causal=True, window=None, mask=mask)  # (B n, H, b, D)
    return y.unflatten(0, (B, n)).transpose(1, 2).flatten(2, 3)[:, :, :T]


def visible(T, S, causal, window, device):
    """(1, 1, T, S) bool: which of S keys each of the last T positions sees."""
    keys = torch.arange(S, device=device)
    distance = keys[S - T :, None] - keys  # (T, S), > 0 for the past
    seen = torch.ones_like(distance, dtype=torch.bool)
    if causal:
        seen &= distance >= 0
    if window is not None:
        seen &= distance < window
    return seen[None, None]


# --------------------------------------------------------------------------------------------------
# Norms


def inverse_rms(x, eps):
    """1 / sqrt(mean of squares + eps) over the last dimension: (..., C) -> (..., 1)."""
    return (torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.shape[-1] + eps).rsqrt()


class RMSNormFunction(torch.autograd.Function):
    """y = w x r with r = 1 / rms(x), and by the chain rule dx = r (g w) - x (g w . x) r^3 / C.

    torch's own is a chain of small operations on a CPU, three times slower than its layer norm: a
    tenth of a training step.
    """

    @staticmethod
    def forward(ctx, x, weight, eps):
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return (wide(x) * inverse_rms(wide(x), eps)).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx, g):
        saved_x, saved_weight = ctx.saved_tensors
        x, weight, g = wide(saved_x), wide(saved_weight), wide(g)
        # once more: a gradient of this gradient has to see x in it
        r = inverse_rms(x, ctx.eps)  # (..., 1)
        gx = g * x  # (..., C)
        slope = (gx @ weight)[..., None] * r**3 / x.shape[-1]  # (..., 1)
        dx = (g * weight).mul_(r).addcmul_(x, slope, value=-1)
        dweight = r.flatten() @ gx.flatten(0, -2)  # (C,), summed over all rows
        return dx.to(saved_x.dtype), dweight.to(saved_weight.dtype), None


# --------------------------------------------------------------------------------------------------
# Triton: what all kernels share

FAR = 2**30  # "no limit": how far a query sees back (`before`) or ahead (`after`)
# a * b + c in one instruction: Triton's default is about to change
FMA = dict(enable_fp_fusion=True)


def no_triton(x):
    """Why the Triton kernels cannot run on tensors like x; None if they can."""
    if triton is None:
        return "triton is not installed"
    if x.device.type == "cuda":
        if torch.version.cuda and torch.cuda.get_device_capability(x.device) < (8, 0):
            return "needs a GPU of compute capability 8.0 or later"
    elif not INTERPRET:
        kind = x.device.type
        return f"needs a GPU, not {kind} (or TRITON_INTERPRET=1 in the environment, for tests)"
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"no kernel for {x.dtype}"
    return None


say_once = functools.cache(print)  # a text that was printed before is not printed again


def triton_runs(what, x, instead):
    """Whether the kernels run on tensors like x; says once what runs instead without Triton."""
    if triton is None:
        say_once(f"{what}: triton is not installed, takes {instead} instead")
    return no_triton(x) is None


def jit(**options):
    """triton.jit, where there is Triton; inside, only constants, and functions that are jit
    themselves.
    """
    return triton.jit(**options) if triton else lambda f: f


def autotuned(*tiles):
    """Times a kernel at each (M, N, warps, stages) that fits, on the first call of its dtype, head
    size and power of two of lengths; keeps the fastest. The interpreter has a tile of its own.

    tiles: two for heads of up to 64 channels, two for 128: the fastest on an H200, and one for the
    registers and shared memory of every GPU from sm_80 on. The last is fp32's: it does without
    tensor cores and needs four times the registers.
    """
    if triton is None:
        return lambda f: f
    if INTERPRET:
        tiles = [(16, 16, 1, 1)]

    def fitting(configs, args, D, **_):
        if INTERPRET:
            return configs
        if args["q"].dtype == torch.float32:
            return configs[4:]
        return configs[:2] if D <= 64 else configs[2:4]

    configs = [
        triton.Config(dict(M=M, N=N), num_warps=warps, num_stages=stages)
        for M, N, warps, stages in tiles
    ]
    prune = dict(early_config_prune=fitting)
    return triton.autotune(configs, key=["size", "D"], prune_configs_by=prune)


@jit()
def dot(a, b, c):
    """c + a b, summed in fp32. "ieee": fp32 stays fp32, not tf32. The interpreter would multiply
    the bit patterns of bf16, hence the cast.
    """
    if INTERPRET:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, c, input_precision="ieee")


# --------------------------------------------------------------------------------------------------
# attention in Triton. A program owns one tile of rows, walks over the tiles that its rows can see,
# and writes its result once.


@jit()
def head(x, strides, b, h):
    """Row b, head h of a (B, H, n, D) tensor: the (n, D) matrix as a pointer and the stride of its
    rows.
    """
    return x + b.to(tl.int64) * strides[0] + h.to(tl.int64) * strides[1], strides[2]


@jit()
def tile_of(matrix, start, R: tl.constexpr, DP: tl.constexpr):
    """Pointers to rows [start, start + R), (R, DP). 64 bits for the tile's start, 32 inside it:
    registers are what these kernels run out of.
    """
    x, stride = matrix
    tile = tl.arange(0, R)[:, None] * stride + tl.arange(0, DP)[None, :]
    return x + start * tl.cast(stride, tl.int64) + tile


@jit()
def inside(start, n, R: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """Which elements of that tile lie in a matrix of n rows and D columns."""
    return (start + tl.arange(0, R)[:, None] < n) & (tl.arange(0, DP)[None, :] < D)


@jit()
def load_tile(
    matrix, start, n, R: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, EDGE: tl.constexpr
):
    """Zeros past D and, at an edge, past row n."""
    if EDGE or DP > D:
        return tl.load(tile_of(matrix, start, R, DP), mask=inside(start, n, R, D, DP), other=0.0)
    else:
        return tl.load(tile_of(matrix, start, R, DP))


@jit()
def store_tile(matrix, start, n, tile, R: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    rounded = tile.to(matrix[0].dtype.element_ty)
    tl.store(tile_of(matrix, start, R, DP), rounded, mask=inside(start, n, R, D, DP))


@jit()
def spans(first, last, before, after, n, TILE: tl.constexpr):
    """Positions first..last each see from `before` back to `after` ahead, within [0, n) -> lo,
    full, edge, hi: something is seen in [lo, hi) only, and everything by everybody in [full, edge),
    whole tiles. So [lo, full) and [edge, hi) need a mask, the bulk between them does not.
    """
    lo = tl.maximum(first - before, 0) // TILE * TILE
    hi = tl.maximum(tl.minimum(last + after + 1, n), lo)
    full = tl.minimum(tl.cdiv(tl.maximum(last - before, 0), TILE) * TILE, hi)
    edge = tl.maximum(tl.maximum(tl.minimum(first + after + 1, n), 0) // TILE * TILE, full)
    return lo, full, edge, hi


@jit()
def walk(lo, full, edge, hi, EDGE: tl.constexpr):
    """The bounds of a loop over those tiles: over the whole ones, [full, edge), or over the others
    (EDGE): [lo, full) and [edge, hi) as one loop, which `skip` takes over the gap.
    """
    if EDGE:
        return lo, hi - (edge - full)
    else:
        return full, edge


@jit()
def skip(i, full, edge, EDGE: tl.constexpr):
    if EDGE:
        return i + tl.where(i >= full, edge - full, 0)
    else:
        return i


@jit()
def hide(s, query, key, before, after, S):
    """Scores of pairs that must not meet become -inf: exp2(s * c - m) is then 0 whatever finite m
    is, fused or not. A large constant here would be subtracted from its own rounded product, and
    one multiply-add of it leaves the rounding error of that product: 1e20 and more.
    """
    return tl.where((query - key <= before) & (key - query <= after) & (key < S), s, -float("inf"))


@autotuned(
    (128, 64, 4, 3),
    (128, 64, 8, 3),
    (64, 64, 4, 3),
    (64, 64, 4, 2),
    (32, 32, 8, 1),
)
@jit(do_not_specialize=["T", "S", "before", "after", "size"])
def forward_kernel(
    q, k, v,
    o, lse,  # written here
    q_s, k_s, v_s, o_s,  # strides
    H, G,  # heads of what is written; query heads to a key head
    T, S,  # queries, keys
    before, after,  # how far a query sees
    c,  # log2(e) / sqrt(D): the factor that makes scores powers of two
    size,  # the lengths' power of two, for `autotuned` only
    D: tl.constexpr,  # channels
    DP: tl.constexpr,  # with padding
    M: tl.constexpr,  # queries of a tile
    N: tl.constexpr,  # keys of a tile
):  # fmt: skip
    """o (B, H, T, D) and lse (B, H, T), the log2-sum-exp2 of a row's scores, for a tile of M
    queries.
    """
    tiles = tl.cdiv(T, M)
    pid = tl.program_id(0)
    start = (tiles - 1 - pid % tiles) * M  # the longest rows first
    b = pid // tiles // H
    h = pid // tiles % H
    rows = start + tl.arange(0, M)  # in q
    first = start + S - T  # the position of the first one
    lo, full, edge, hi = spans(first, tl.minimum(first + M, S) - 1, before, after, S, N)
    q = load_tile(head(q, q_s, b, h), start, T, M, D, DP, True)
    k = head(k, k_s, b, h // G)
    v = head(v, v_s, b, h // G)
    acc = tl.zeros((M, DP), tl.float32)  # the weighted sum of values,
    total = tl.zeros((M,), tl.float32)  # the sum of its weights,
    # and the maximum, to which both are relative. Finite: it stays where a row sees nothing in its
    # first tiles, and -inf + inf is nan
    m = tl.full((M,), -1e30, tl.float32)
    for EDGE in tl.static_range(2):  # unrolled: the whole tiles, then those that need a mask
        begin, end = walk(lo, full, edge, hi, EDGE)
        for i in range(begin, end, N):
            j = skip(i, full, edge, EDGE)
            s = dot(q, tl.trans(load_tile(k, j, S, N, D, DP, EDGE)), None)  # (M, N)
            if EDGE:
                keys = j + tl.arange(0, N)
                s = hide(s, (rows + S - T)[:, None], keys[None, :], before, after, S)
            m_new = tl.maximum(m, tl.max(s, 1) * c)
            p = tl.exp2(s * c - m_new[:, None])  # one multiply-add and one exp2 per score
            rescale = tl.exp2(m - m_new)
            total = total * rescale + tl.sum(p, 1)
            acc = dot(p.to(q.dtype), load_tile(v, j, S, N, D, DP, EDGE), acc * rescale[:, None])
            m = m_new
    store_tile(head(o, o_s, b, h), start, T, acc / total[:, None], M, D, DP)
    tl.store(lse + (b * H + h).to(tl.int64) * T + rows, m + tl.log2(total), mask=rows < T)


@autotuned(
    (64, 128, 4, 3),
    (64, 64, 4, 3),
    (128, 64, 8, 3),
    (64, 64, 4, 2),
    (16, 32, 4, 2),
)
@jit(do_not_specialize=["T", "S", "before", "after", "size"])
def dq_kernel(
    q, k, v, o, do, lse,
    delta, dq,  # written here
    q_s, k_s, v_s, o_s, do_s, dq_s,  # strides
    H, G,  # heads of what is written; query heads to a key head
    T, S,  # queries, keys
    before, after,  # how far a query sees
    c,  # log2(e) / sqrt(D): the factor that makes scores powers of two
    scale,  # 1 / sqrt(D)
    size,  # the lengths' power of two, for `autotuned` only
    D: tl.constexpr,  # channels
    DP: tl.constexpr,  # with padding
    M: tl.constexpr,  # queries of a tile
    N: tl.constexpr,  # keys of a tile
):  # fmt: skip
    """dq of a tile of M queries; leaves delta = rowsum(do * o), (B, H, T), for the next kernel."""
    tiles = tl.cdiv(T, M)
    pid = tl.program_id(0)
    start = (tiles - 1 - pid % tiles) * M  # the longest rows first
    b = pid // tiles // H
    h = pid // tiles % H
    rows = start + tl.arange(0, M)  # in q
    first = start + S - T  # the position of the first one
    lo, full, edge, hi = spans(first, tl.minimum(first + M, S) - 1, before, after, S, N)
    q = load_tile(head(q, q_s, b, h), start, T, M, D, DP, True)
    k = head(k, k_s, b, h // G)
    v = head(v, v_s, b, h // G)
    o = load_tile(head(o, o_s, b, h), start, T, M, D, DP, True)
    do = load_tile(head(do, do_s, b, h), start, T, M, D, DP, True)
    sums = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)  # delta
    at = (b * H + h).to(tl.int64) * T + rows
    tl.store(delta + at, sums, mask=rows < T)
    lse = tl.load(lse + at, mask=rows < T, other=0.0)
    acc = tl.zeros((M, DP), tl.float32)
    for EDGE in tl.static_range(2):
        begin, end = walk(lo, full, edge, hi, EDGE)
        for i in range(begin, end, N):
            j = skip(i, full, edge, EDGE)
            k_tile = load_tile(k, j, S, N, D, DP, EDGE)  # (N, DP)
            s = dot(q, tl.trans(k_tile), None)  # (M, N)
            if EDGE:
                keys = j + tl.arange(0, N)
                s = hide(s, (rows + S - T)[:, None], keys[None, :], before, after, S)
            p = tl.exp2(s * c - lse[:, None])
            dp = dot(do, tl.trans(load_tile(v, j, S, N, D, DP, EDGE)), None)
            acc = dot((p * (dp - sums[:, None])).to(q.dtype), k_tile, acc)
    store_tile(head(dq, dq_s, b, h), start, T, acc * scale, M, D, DP)


@autotuned(
    (128, 64, 4, 2),
    (64, 128, 8, 2),
    (64, 128, 8, 3),
    (64, 64, 8, 2),
    (32, 32, 8, 1),
)
@jit(do_not_specialize=["T", "S", "before", "after", "size"])
def dkv_kernel(
    q, k, v, do, lse, delta,
    dk, dv,  # written here
    q_s, k_s, v_s, do_s, dk_s, dv_s,  # strides
    H, G,  # heads of what is written; query heads to a key head
    T, S,  # queries, keys
    before, after,  # how far a query sees
    c,  # log2(e) / sqrt(D): the factor that makes scores powers of two
    scale,  # 1 / sqrt(D)
    size,  # the lengths' power of two, for `autotuned` only
    D: tl.constexpr,  # channels
    DP: tl.constexpr,  # with padding
    M: tl.constexpr,  # queries of a tile
    N: tl.constexpr,  # keys of a tile
):  # fmt: skip
    """dk and dv of a tile of N keys: a sum over the queries that see them, in the G heads of their
    group.
    """
    tiles = tl.cdiv(S, N)
    pid = tl.program_id(0)
    start = pid % tiles * N
    b = pid // tiles // (H // G)
    h = pid // tiles % (H // G)  # a key head
    keys = start + tl.arange(0, N)  # in k
    first = start + T - S  # the row of q that stands at the first one's position
    # keys look the other way: who sees `before` back is seen from `before` ahead
    lo, full, edge, hi = spans(first, tl.minimum(first + N, T) - 1, after, before, T, M)
    k = load_tile(head(k, k_s, b, h), start, S, N, D, DP, True)
    v = load_tile(head(v, v_s, b, h), start, S, N, D, DP, True)
    dk_acc = tl.zeros((N, DP), tl.float32)
    dv_acc = tl.zeros((N, DP), tl.float32)
    # (what the loops inside have in common stays there: kept for all heads, it would not fit into
    # the registers)
    for g in tl.range(G, disable_licm=True):
        q_g = head(q, q_s, b, h * G + g)
        do_g = head(do, do_s, b, h * G + g)
        at = (b * H + h * G + g).to(tl.int64) * T
        for EDGE in tl.static_range(2):
            begin, end = walk(lo, full, edge, hi, EDGE)
            for i in range(begin, end, M):
                j = skip(i, full, edge, EDGE)
                rows = j + tl.arange(0, M)
                q_tile = load_tile(q_g, j, T, M, D, DP, EDGE)  # zeros past T add nothing
                do_tile = load_tile(do_g, j, T, M, D, DP, EDGE)
                # (N, M), transposed: then p^T and ds^T are left factors, straight from registers
                s = dot(k, tl.trans(q_tile), None)
                if EDGE:
                    s = hide(s, (rows + S - T)[None, :], keys[:, None], before, after, S)
                lse_tile = tl.load(lse + at + rows, mask=rows < T, other=0.0)
                p = tl.exp2(s * c - lse_tile[None, :])
                dv_acc = dot(p.to(q_tile.dtype), do_tile, dv_acc)
                dp = dot(v, tl.trans(do_tile), None)
                sums = tl.load(delta + at + rows, mask=rows < T, other=0.0)
                ds = p * (dp - sums[None, :])
                dk_acc = dot(ds.to(q_tile.dtype), q_tile, dk_acc)
    store_tile(head(dk, dk_s, b, h), start, S, dk_acc * scale, N, D, DP)
    store_tile(head(dv, dv_s, b, h), start, S, dv_acc, N, D, DP)


class FlashAttention(torch.autograd.Function):
    """A query sees `before` positions back and `after` ahead. Shapes as in `attention`."""

    @staticmethod
    def forward(ctx, q, k, v, before, after):
        B, H, T, D = q.shape
        K, S = k.shape[1:3]
        q, k, v = (unit_stride(x) for x in (q, k, v))
        o = torch.empty_like(q)  # laid out as q is
        lse = torch.empty(B, H, T, device=q.device)
        ctx.sizes = H, H // K, T, S, before, after, D**-0.5 * math.log2(math.e)
        ctx.options = dict(
            size=triton.next_power_of_2(max(S, 256)),
            D=D,
            DP=max(16, triton.next_power_of_2(D)),
            **FMA,
        )

        def grid(tile):
            return (triton.cdiv(T, tile["M"]) * B * H,)

        forward_kernel[grid](q, k, v, o, lse, *strides(q, k, v, o), *ctx.sizes, **ctx.options)
        ctx.save_for_backward(q, k, v, o, lse)
        return o

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do):
        q, k, v, o, lse = ctx.saved_tensors
        B, H, T, D = q.shape
        K, S = k.shape[1:3]
        do = unit_stride(do)
        dq, dk, dv, delta = (torch.empty_like(x) for x in (q, k, v, lse))
        sizes = (*ctx.sizes, D**-0.5)

        def q_grid(tile):
            return (triton.cdiv(T, tile["M"]) * B * H,)

        def k_grid(tile):
            return (triton.cdiv(S, tile["N"]) * B * K,)

        tensors = q, k, v, o, do, lse, delta, dq
        dq_kernel[q_grid](*tensors, *strides(q, k, v, o, do, dq), *sizes, **ctx.options)
        tensors = q, k, v, do, lse, delta, dk, dv
        dkv_kernel[k_grid](*tensors, *strides(q, k, v, do, dk, dv), *sizes, **ctx.options)
        return dq, dk, dv, None, None


def strides(*tensors):
    return [x.stride() for x in tensors]


def unit_stride(x):
    return x if x.stride(-1) == 1 else x.contiguous()


# --------------------------------------------------------------------------------------------------
# token_logprobs in Triton: between the matrix products, one pass over a block of logits. A program
# owns one row of the block.

LOG2_E = tl.constexpr(1.4426950408889634)


@jit()
def bits_below(z, m, c):
    """How far logits lie below m >= z, in bits: c (z - m) with c = log2(e) / temperature. The
    difference comes first: no product is ever rounded before something is subtracted from it. Not
    below -200: 2^-200 is 0 already, and 0 * -inf would be nan.
    """
    bits = (z - m) * c
    return tl.where(bits < -200, -200.0, bits)


@jit()
def fold_kernel(z, y, m, s, s1, target, stride, first, width, c, COLS: tl.constexpr):
    """Fold raw logits z (N, width), the vocabulary's [first, first + width), into each row's
    running max m of z, sum s of 2^b and sum s1 of b 2^b, where b = bits_below(z, m, c). All is
    relative to m: large logits cancel nothing.
    """
    row = tl.program_id(0).to(tl.int64)
    z += row * stride
    m_old = tl.load(m + row)
    s_old = tl.load(s + row)
    s1_old = tl.load(s1 + row)
    for start in range(0, width, COLS):
        cols = start + tl.arange(0, COLS)
        x = tl.load(z + cols, mask=cols < width, other=-float("inf")).to(tl.float32)
        m_new = tl.maximum(m_old, tl.max(x, 0))
        bits = bits_below(x, m_new, c)
        e = tl.exp2(bits)
        # the old sums, relative to the new maximum, and what this stretch adds
        step = bits_below(m_old, m_new, c)
        rescale = tl.exp2(step)
        s1_old = rescale * (s1_old + step * s_old) + tl.sum(e * bits, 0)
        s_old = rescale * s_old + tl.sum(e, 0)
        m_old = m_new
    tl.store(m + row, m_old)
    tl.store(s + row, s_old)
    tl.store(s1 + row, s1_old)
    col = tl.load(y + row) - first
    here = (col >= 0) & (col < width)
    tl.store(target + row, tl.load(z + col, mask=here, other=0.0).to(tl.float32), mask=here)


@jit()
def slope_kernel(
    z, y, m, log_sum, entropy, g_logp, g_ent,
    stride, first, width, c, inv_t, COLS: tl.constexpr,
):  # fmt: skip
    """Overwrite raw logits z (N, width) by dLoss/dz = (g_logp (onehot - p) - g_ent p (log p + H)) /
    temperature. log_sum in bits, the rest in nats.
    """
    row = tl.program_id(0).to(tl.int64)
    z += row * stride
    m_row = tl.load(m + row)
    log_sum_row = tl.load(log_sum + row)
    entropy_row = tl.load(entropy + row)
    g = tl.load(g_logp + row)
    g_h = tl.load(g_ent + row)
    col = tl.load(y + row) - first
    for start in range(0, width, COLS):
        cols = start + tl.arange(0, COLS)
        x = tl.load(z + cols, mask=cols < width, other=-float("inf")).to(tl.float32)
        logp = bits_below(x, m_row, c) - log_sum_row  # in bits; below 0, however it is rounded
        slope = g + g_h * (logp / LOG2_E + entropy_row)
        dz = tl.where(cols == col, g, 0.0) - tl.exp2(logp) * slope
        tl.store(z + cols, (dz * inv_t).to(z.dtype.element_ty), mask=cols < width)


class FusedLogprobs(torch.autograd.Function):
    """ChunkedLogprobs on a GPU: the same four products, by cuBLAS, and one kernel instead of a
    dozen operations between them.
    """

    @staticmethod
    def blocks(h, V):
        """A buffer for a block of logits and the block's bounds. As wide as h at least: then dh is
        not re-read more often than its products take; at most 128 MiB in bf16, or h's own size;
        rows of 256 bytes, which tensor cores want.
        """
        N, C = h.shape
        width = -(-max(4 * BLOCK // max(N, 1), C) // 128) * 128  # up to a multiple of 128
        width = min(width, -(-V // 8) * 8)
        return h.new_empty(N, width), [(a, min(a + width, V)) for a in range(0, V, width)]

    @staticmethod
    def forward(ctx, h, weight, y, inv_t):
        N, V = h.shape[0], weight.shape[0]
        m = torch.full((N,), -1e30, device=h.device)
        target = torch.full((N,), torch.nan, device=h.device)  # the targets' logits
        s, s1 = torch.zeros(2, N, device=h.device)
        c = inv_t * math.log2(math.e)
        buffer, bounds = FusedLogprobs.blocks(h, V)
        for a, b in bounds:
            z = buffer[:, : b - a]
            torch.mm(h, weight[a:b].T, out=z)
            fold_kernel[(N,)](z, y, m, s, s1, target, z.stride(0), a, b - a, c, COLS=2048, **FMA)
        log_sum = s.log2()  # lse = c m + log_sum, in bits
        entropy = (log_sum - s1 / s) * math.log(2)  # in nats
        ctx.save_for_backward(h, weight, y, m, log_sum, entropy)
        ctx.scales = c, inv_t
        return ((target - m) * c - log_sum) * math.log(2), entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g_logp, g_ent):
        h, weight, y, m, log_sum, entropy = ctx.saved_tensors
        dh = h.new_zeros(h.shape, dtype=torch.float32)
        dweight = torch.empty_like(weight)
        buffer, bounds = FusedLogprobs.blocks(h, weight.shape[0])
        of_rows = y, m, log_sum, entropy, g_logp.contiguous(), g_ent.contiguous()
        for a, b in bounds:
            z = buffer[:, : b - a]
            torch.mm(h, weight[a:b].T, out=z)
            sizes = z.stride(0), a, b - a, *ctx.scales
            slope_kernel[(len(h),)](z, *of_rows, *sizes, COLS=2048, **FMA)
            add_product(dh, z, weight[a:b])
            torch.mm(z.T, h, out=dweight[a:b])
        return dh.to(h.dtype), dweight, None, None
