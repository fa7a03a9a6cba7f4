"""kernels.py: the two places where a language model spends its memory and time, written so that it does not.

1. `token_logprobs`: log-probability and entropy of every target token, straight from the hidden states and the head's weight.
   With logits z = h W^T / temperature, p = softmax(z) and lse = log sum exp z,

       logp = z[target] - lse          d logp / dz = onehot(target) - p
       H    = lse - sum_v p_v z_v      d H    / dz = -p * (log p + H)

   Both gradients need nothing but p, and p can be recomputed from z and lse. So the (tokens, V) logits are never stored: the
   forward pass walks over blocks of the vocabulary with an online softmax (Milakov & Gimelshein, arXiv 1805.02867), keeps one
   lse and one H per token, and the backward pass computes each block of logits a second time (Cut Cross-Entropy, Wijmans et
   al., arXiv 2411.09009). Price: 4 matrix products instead of 3. Walking over the vocabulary, not over the tokens, writes each
   row of the weight's gradient once, so it is never accumulated in bf16.

2. `attention`: grouped-query, causal or sliding-window attention: `reference` spells the equation out; `sdpa` calls torch's kernels.

`python kernels.py` prints time, peak memory and the fraction of the measured matrix-product roof for every impl: about 4 minutes
on two cores, most of it in the naive rows; `--quick` takes 20 s on a smaller problem.
"""
import argparse
import json
import multiprocessing
import os
import resource
import shutil
import sys
import time

import torch
import torch.nn.functional as F

BLOCK = 2 ** 24     # logits in flight at once: 64 MiB in fp32. Larger blocks are no faster, smaller ones starve the matrix product
COMPILE_V = 16384   # vocabularies from this size on repay the 5 to 20 s that torch.compile takes on its first call


# ---------------------------------------------------------------------------------------------------------------------------
# token_logprobs

def token_logprobs(hidden, weight, targets, temperature=1.0, impl="auto"):
    """Log-probability of each target, and entropy of the distribution it comes from, both in nats.

    hidden (..., C), weight (V, C), targets (...) int64 in [0, V) -> logp (...), entropy (...), both fp32. Differentiable in hidden and
    weight with any per-token upstream gradient. `impl`: reference | chunked | compiled | auto (the fastest that runs here).
    Raises ValueError for an unknown impl or a temperature that is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive to score tokens, got {temperature}")
    shape, V = targets.shape, weight.shape[0]
    h, y = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)    # (N, C), (N,)
    if impl == "auto":      # one block would hold all the logits anyway: then plain autograd, with no second matrix product
        impl = "reference" if y.numel() * V <= BLOCK else "compiled" if V >= COMPILE_V and can_compile(h.device.type) else "chunked"
    if impl == "reference":
        logp, entropy = reference_logprobs(h, weight, y, temperature)
    elif impl in ("chunked", "compiled"):
        if torch.is_autocast_enabled(h.device.type):    # round to its dtype here; inside, the blocks choose their own
            dtype = torch.get_autocast_dtype(h.device.type)
            h, weight = h.to(dtype), weight.to(dtype)
        with torch.autocast(h.device.type, enabled=False):
            logp, entropy = ChunkedLogprobs.apply(h, weight, y, 1.0 / temperature, impl == "compiled")
    else:
        raise ValueError(f"unknown impl {impl!r}: reference, chunked, compiled or auto")
    return logp.view(shape), entropy.view(shape)


def reference_logprobs(h, weight, y, temperature):
    """The oracle: what the other impls must equal. Holds every logit, several times over."""
    z = F.linear(h, weight).float() / temperature       # (N, V)
    logp = z.log_softmax(-1)                            # (N, V)
    entropy = -(logp.exp() * logp).sum(-1)              # (N,)
    return logp.gather(-1, y[:, None]).squeeze(-1), entropy


def forward_block(z, inv_t, m, s, s1):
    """Online softmax: fold a block of raw logits z (N, b) into the running max m, sum e^(z-m) and sum z e^(z-m), each (N,)."""
    z = z.float().mul_(inv_t)
    m_new = torch.maximum(m, z.amax(-1))
    e = (z - m_new[:, None]).exp_()
    rescale = (m - m_new).exp()
    return m_new, s * rescale + e.sum(-1), s1 * rescale + e.mul_(z).sum(-1)


def backward_block(z, inv_t, lse, entropy, g_logp, g_ent):
    """dLoss/dz for a block of raw logits z (N, b), but for the onehot: -p * (g_logp + g_ent * (log p + H))."""
    logp = z.float().mul_(inv_t).sub_(lse[:, None])
    p = logp.exp()
    slope = logp.add_(entropy[:, None]).mul_(g_ent[:, None]).add_(g_logp[:, None])
    return p.mul_(slope).mul_(-inv_t)


def block_starts(N, V):
    """Even blocks of the vocabulary: at most BLOCK logits, but never under 256 columns (by then h itself is the larger)."""
    n = -(-V // min(V, max(256, BLOCK // max(N, 1))))
    return [V * i // n for i in range(n + 1)]


def gemm_dtype(x):
    """The dtype to multiply matrices of x's dtype in. bf16 on a CPU without bf16 units is emulated, 4x slower than fp32: fp32."""
    emulated = x.device.type == "cpu" and x.dtype == torch.bfloat16 and not torch.cpu._is_avx512_bf16_supported()
    return torch.float32 if emulated else x.dtype


class ChunkedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, weight, y, inv_t, compiled):
        N, V = h.shape[0], weight.shape[0]
        fold = compile_block(forward_block) if compiled else forward_block
        x = h.to(gemm_dtype(h))
        m = torch.full((N,), -torch.inf, device=h.device)
        s, s1, target = torch.zeros_like(m), torch.zeros_like(m), torch.zeros_like(m)
        starts = block_starts(N, V)
        for a, b in zip(starts, starts[1:]):
            z = F.linear(x, weight[a:b].to(x.dtype))                                # (N, b - a)
            z_y = z.gather(1, (y - a).clamp(0, b - a - 1)[:, None]).squeeze(1).float() * inv_t
            target = torch.where((y >= a) & (y < b), z_y, target)
            m, s, s1 = fold(z, inv_t, m, s, s1)                                     # overwrites z
        lse = m + s.log()
        entropy = lse - s1 / s
        ctx.save_for_backward(h, weight, y, lse, entropy)
        ctx.inv_t, ctx.compiled = inv_t, compiled
        return target - lse, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g_logp, g_ent):
        h, weight, y, lse, entropy = ctx.saved_tensors
        N, V = h.shape[0], weight.shape[0]
        slope = compile_block(backward_block) if ctx.compiled else backward_block
        x = h.to(gemm_dtype(h))
        dh = torch.zeros(h.shape, dtype=torch.float32, device=h.device)             # summed over the blocks: fp32
        dweight = torch.empty_like(weight)                                          # each block written once
        starts = block_starts(N, V)
        for a, b in zip(starts, starts[1:]):
            w = weight[a:b].to(x.dtype)
            dz = slope(F.linear(x, w), ctx.inv_t, lse, entropy, g_logp, g_ent)      # (N, b - a)
            onehot = torch.where((y >= a) & (y < b), g_logp * ctx.inv_t, 0)         # (1 - p) g cancels: add in fp32, then round
            dz = dz.scatter_add_(1, (y - a).clamp(0, b - a - 1)[:, None], onehot[:, None]).to(x.dtype)
            dh += dz @ w
            torch.mm(dz.T, x, out=dweight[a:b]) if x.dtype == weight.dtype else dweight[a:b].copy_(dz.T @ x)
        return dh.to(h.dtype), dweight, None, None, None


_compiled = {}


def compile_block(f):
    if f not in _compiled:
        _compiled[f] = torch.compile(f, dynamic=True)
    return _compiled[f]


def can_compile(device="cpu"):
    """torch.compile needs a C++ compiler for the CPU and brings Triton for CUDA; elsewhere it is an experiment."""
    return device == "cuda" or device == "cpu" and (shutil.which("g++") or shutil.which("clang++")) is not None


# ---------------------------------------------------------------------------------------------------------------------------
# attention

def attention(q, k, v, causal=True, window=None, mask=None, impl="auto"):
    """softmax(q k^T / sqrt(D)) v, with H query heads sharing Hkv key heads in groups of H / Hkv.

    q (B, H, T, D), k and v (B, Hkv, S, D) -> (B, H, T, D). The T queries are the last T of the S positions. `causal`: a query
    sees no later key; `window`: of those, only the last `window` (its own included). `mask` (B or 1, 1, T, S) bool, True = sees,
    replaces both (a ragged cache knows better). `impl`: reference | sdpa | auto. Raises ValueError for an unknown impl.
    """
    T, S = q.shape[2], k.shape[2]
    assert q.shape[1] % k.shape[1] == 0, f"{q.shape[1]} query heads over {k.shape[1]} key heads"
    if impl in ("sdpa", "auto") and mask is None and causal and window is not None and T == S >= 4 * max(window, 32):
        return banded(q, k, v, window, max(window, 32))
    if mask is None and window is not None and window < S:
        mask = visible(T, S, causal, window, q.device)
    if impl == "reference":
        if mask is None:
            mask = visible(T, S, causal, None, q.device)
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5                    # (B, H, T, S)
        return scores.masked_fill(~mask, -torch.inf).softmax(-1).to(v.dtype) @ v
    if impl not in ("sdpa", "auto"):
        raise ValueError(f"unknown impl {impl!r}: reference, sdpa or auto")
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and not torch.cpu._is_amx_tile_supported():   # without tiles fp32 is twice as fast
        with torch.autocast("cpu", enabled=False):
            return attention(q.float(), k.float(), v.float(), causal, None, mask, impl).to(q.dtype)
    if T == 1 and k.shape[1] < q.shape[1]:      # decoding: the heads of a group become the queries of one head, no copy of k, v
        B, H, _, D = q.shape
        return F.scaled_dot_product_attention(q.reshape(B, k.shape[1], -1, D), k, v, attn_mask=mask).reshape(B, H, 1, D)
    if mask is None and causal and 1 < T < S:   # torch's is_causal aligns the first query with the first key; ours the last with the last
        mask = visible(T, S, causal, None, q.device)
    is_causal = causal and mask is None and T > 1
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=k.shape[1] < q.shape[1])


def banded(q, k, v, window, b):
    """Causal attention in a window of at most b, in blocks of b queries: each sees its own block of keys and the one before, T 2b pairs for T^2."""
    B, H, T, D = q.shape
    n = -(-T // b)
    blocks = lambda x: F.pad(x, (0, 0, 0, n * b - T)).unflatten(2, (n, b)).transpose(1, 2)     # (B, n, heads, b, D)
    q, k, v = map(blocks, (q, k, v))
    k, v = (torch.cat((F.pad(x, (0, 0) * 3 + (1, 0))[:, :-1], x), 3).flatten(0, 1) for x in (k, v))     # (B n, Hkv, 2b, D)
    mask = visible(b, 2 * b, True, window, q.device).repeat(n, 1, 1, 1)                         # (n, 1, b, 2b)
    mask[0, :, :, :b] = False                                                                   # nothing comes before the first block
    y = attention(q.flatten(0, 1), k, v, mask=mask.repeat(B, 1, 1, 1), impl="sdpa")             # (B n, H, b, D)
    return y.unflatten(0, (B, n)).transpose(1, 2).flatten(2, 3)[:, :, :T]


def visible(T, S, causal, window, device):
    """(1, 1, T, S) bool: which of S keys each of the last T positions sees."""
    distance = torch.arange(S - T, S, device=device)[:, None] - torch.arange(S, device=device)  # (T, S), > 0 for the past
    seen = torch.ones_like(distance, dtype=torch.bool)
    if causal:
        seen &= distance >= 0
    if window is not None:
        seen &= distance < window
    return seen[None, None]


# ---------------------------------------------------------------------------------------------------------------------------
# python kernels.py: the benchmark. Every row runs in a process of its own, so that its peak memory is its own.

def measure(work, shape, dtype, impl, device, repeats=3):
    """Seconds (median) and peak MiB over the inputs, of one forward and backward pass."""
    torch.manual_seed(0)
    if work == "token_logprobs":
        N, C, V = shape
        leaves = [torch.randn(n, C, dtype=dtype, device=device).mul_(0.5).requires_grad_() for n in (N, V)]
        y, g = torch.randint(V, (N,), device=device), torch.randn(N, device=device)

        def step():
            logp, entropy = token_logprobs(*leaves, y, impl=impl)
            torch.autograd.backward((logp, entropy), (g, 0.01 * g))
    else:
        B, H, T, D = shape
        leaves = [torch.randn(B, H, T, D, dtype=dtype, device=device, requires_grad=True) for _ in range(3)]
        g = torch.randn(B, H, T, D, dtype=dtype, device=device)

        def step():
            attention(*leaves, impl=impl).backward(g)

    cuda, times = device == "cuda", []
    if impl == "compiled":      # compile first, in this process: inductor's own memory is not the kernel's
        torch._inductor.config.compile_threads = 1
        small = [torch.randn(n, C, dtype=dtype, device=device, requires_grad=True) for n in (64, 300)]
        token_logprobs(*small, y[:64] % 300, impl=impl)[0].sum().backward()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(1 + repeats):
        for leaf in leaves:
            leaf.grad = None
        started = time.perf_counter()
        step()
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
        if len(times) == 1:
            peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 2 ** 20 if cuda or sys.platform == "darwin" else 2 ** 10     # Linux counts ru_maxrss in KiB, macOS in bytes
    return sorted(times[1:])[repeats // 2], (peak - start) / unit


def roof(device):
    """The fastest matrix product of this machine at each dtype, in FLOP/s; where bf16 is emulated, fp32's counts for both."""
    best, n = {}, 8192 if device == "cuda" else 2048
    for dtype in (torch.float32, torch.bfloat16):
        a, times = torch.randn(n, n, dtype=dtype, device=device), []
        for _ in range(6):
            started = time.perf_counter()
            (a @ a)[0, 0].item()        # waits for a GPU
            times.append(time.perf_counter() - started)
        best[dtype] = 2 * n ** 3 / min(times)
    best[torch.bfloat16] = max(best.values())
    return best


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="small shapes, 20 s")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--out", default="out/kernels", help="folder for benchmark.json")
    args = parser.parse_args()
    peak = roof(args.device)
    print(f"{args.device}, {torch.get_num_threads()} threads, torch {torch.__version__}; matrix products reach "
          + ", ".join(f"{v / 1e9:.0f} GFLOP/s in {str(k)[6:]}" for k, v in peak.items()))
    print(f"\n{'':<34} {'seconds':>8} {'peak MiB':>9} {'of roof':>8} {'time':>7} {'memory':>7}   (ratios to reference)")
    jobs = [("token_logprobs", (512, 256, 8192) if args.quick else (4096, 768, 50257), ("reference", "chunked", "compiled")),
            ("attention", (1, 4, 256, 64) if args.quick else (4, 12, 1024, 64), ("reference", "sdpa"))]
    rows = []
    for work, shape, impls in jobs:
        flops = 6 * shape[0] * shape[1] * shape[2] if work == "token_logprobs" else 7 * shape[0] * shape[1] * shape[2] ** 2 * shape[3]
        for dtype in (torch.float32, torch.bfloat16):       # useful work: 3 products for the head; causal attention 7 half squares
            for impl in impls:
                if impl == "compiled" and not can_compile(args.device):
                    print("compiled: no C++ compiler found, row left out")
                    continue
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    seconds, mib = pool.apply(measure, (work, shape, dtype, impl, args.device))
                row = dict(work=work, shape=shape, dtype=str(dtype)[6:], impl=impl, seconds=seconds, peak_mib=mib, of_roof=flops / seconds / peak[dtype])
                first = row if impl == "reference" else first
                row |= dict(time_ratio=seconds / first["seconds"], memory_ratio=mib / max(first["peak_mib"], 1e-9))
                rows.append(row)
                print(f"{work + ' ' + row['dtype'] + ' ' + impl:<34} {seconds:>8.3f} {mib:>9.0f} {row['of_roof']:>8.0%} "
                      f"{row['time_ratio']:>6.2f}x {row['memory_ratio']:>6.2f}x", flush=True)
    os.makedirs(args.out, exist_ok=True)
    with open(os.path.join(args.out, "benchmark.json"), "w") as f:
        json.dump(dict(device=args.device, threads=torch.get_num_threads(), torch=torch.__version__, rows=rows), f, indent=1)


if __name__ == "__main__":
    main()
