"""decoding.py: faster steps of `generate`. engine.decode_eager is the plain loop that this file
equals, token for token.

On a GPU asking for a kernel takes longer than running it. So:

1. One CUDA graph. All that changes from step to step lives in tensors that are written in place, so
   a step is the same kernels on the same addresses: captured once, then replayed. It depends on the
   number of rows only, and is captured again when rows have left.
2. Fewer kernels (`FusedCache`). Rotations and the write into the cache are one, attention is two.
   They know each row's true length: no masks, and no slot that holds nothing is read. The head has
   its columns padded to a multiple of 64: cuBLAS has no fast product for others.
3. One query has nothing to share its keys with: attention reads a key once, for 4 D operations. All
   that counts is that the whole GPU reads, also where rows are few and long. So the keys of a row
   are split (Flash-Decoding: Dao, Haziza, Massa and Sizov, 2023). Each part leaves its output o_i
   and its log-sum-exp l_i, in bits; the whole is

       o = (sum_i 2^(l_i - max l) o_i) / (sum_i 2^(l_i - max l))

   The query heads that share a key head are one tile: a key is read once for all of them.

On a CPU there is one kernel, rotation, write and attention, in C++: decoding.cpp.

Shapes: R live rows, H query heads, K key heads, G = H / K, D channels of a head, C channels, V
vocabulary.
"""

import ctypes
import functools
import hashlib
import math
import os
import re
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F

from kernels import FAR, FMA, dot, jit, no_triton, say_once, tl, triton
from meter import counter

SPAN = 128  # steps between two looks at which rows have stopped
GRAPHS_ON = ("cuda",)  # where a step is captured in a graph,
FUSED_ON = ("cuda",)  # and where its attention is FusedCache's


def decode_static(model, cache, logits, sampler):
    """engine.decode_eager for a GPU: nothing comes back from the device for SPAN steps. Then rows
    that have stopped leave.
    """
    new = sampler.fresh.shape[1]
    head = padded(model.lm_head)
    sampler.draw(logits, 0)
    steps = None
    with torch.cuda.device_of(logits):
        for start in range(1, new, SPAN):
            if not sampler.retire(cache):
                break
            if steps is None or steps.rows != cache.rows:
                steps = Steps(model, head, cache, sampler, start)
            steps.run(min(SPAN, new - start))


def padded(head):
    """The head, its weight padded to a multiple of 64 columns once, the logits sliced each time."""
    V = head.out_features
    if V % 64 == 0 or head._forward_hooks or head._forward_pre_hooks:
        return head
    weight = F.pad(head.weight, (0, 0, 0, -V % 64))
    return lambda x: F.linear(x, weight)[:, :V]


class Steps:
    """Tokens `start`, `start` + 1, ... of every live row."""

    def __init__(self, model, head, cache, sampler, start):
        self.model = model
        self.head = head
        self.cache = cache
        self.rows = cache.rows
        self.sampler = sampler
        self.fixed = FusedCache(cache) if fuses(cache) else MaskedCache(cache)
        self.t = torch.full((1,), start, device=cache.lens.device)
        self.replay = None

    def step(self):
        x = self.model.hidden(self.sampler.token[:, None], self.fixed)  # (R, 1, C)
        self.sampler.draw(self.head(x[:, -1]), self.t)
        self.t.add_(1)

    def run(self, n):
        """The next n tokens. The first step ever is run, the others are replays of its graph."""
        before = counter.flops
        left = n
        if self.replay is None:
            self.step()
            left -= 1
            self.replay = captured(self.step, self.t.device) if left > 8 else None
        # (no field holds self.step: a cycle would keep the cache until a garbage collection)
        for _ in range(left):
            (self.replay or self.step)()
        counter.flops = before + self.flops(n)  # a replay counts nothing
        self.cache.set_lens(self.fixed.lens.tolist())

    def flops(self, n):
        """What decode_eager would count for n steps."""
        config, length = self.model.config, self.cache.length
        head = 2 * self.rows * config.n_embd * config.vocab_size
        return sum(head + config.flops(self.rows, 1, length + i + 1) for i in range(n))


def captured(step, device):
    """A function that repeats what `step` does on the device: a CUDA graph's replay; where there
    are none, None, from then on without trying.
    """
    global GRAPHS_ON
    if device.type not in GRAPHS_ON:
        return None
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.current_stream(device)
    try:
        with torch.cuda.graph(graph, stream=side_stream(device)):
            step()
    except RuntimeError as e:
        GRAPHS_ON = ()
        torch.cuda.set_stream(stream)  # a capture that fails may leave us on its own
        why = str(e).splitlines()[0]
        say_once(f"generate: this step cannot be a CUDA graph, runs it eagerly instead ({why})")
        return None
    return graph.replay


@functools.cache
def side_stream(device):
    """Where that GPU's steps are captured. torch's own stream for captures belongs to the GPU that
    came first: nothing that runs on another would be in the graph.
    """
    return torch.cuda.Stream(device)


# --------------------------------------------------------------------------------------------------
# What stands in for the KVCache meanwhile. `lens`, the tokens that each row holds, is a tensor that
# every step advances in place.


class MaskedCache:
    """For torch's kernels: a step reads all slots there are, and a mask hides those that hold
    nothing yet.
    """

    def __init__(self, cache):
        device = cache.lens.device
        self.cache = cache
        self.length = cache.capacity - 1  # as if every row were as long as it may get
        self.lens = cache.lens.clone()
        self.rows = torch.arange(cache.rows, device=device)
        self.slots = torch.arange(cache.capacity, device=device)

    def extend(self, T):
        self.now = self.lens.clone()  # the position of each row's token
        self.lens += T
        distance = self.now[:, None, None, None] - self.slots  # (R, 1, 1, S)
        window = self.cache.config.window or FAR
        return self.now[:, None], (distance >= 0) & (distance < window)

    def append(self, layer, k, v):
        keys, values = self.cache.k[layer], self.cache.v[layer]
        keys[self.rows, self.now] = k[:, 0]
        values[self.rows, self.now] = v[:, 0]
        return keys[: len(self.rows)], values[: len(self.rows)]


def fuses(cache):
    """Whether the kernels of FusedCache run on a cache like this."""
    k = cache.k[0]  # (rows, capacity, K, D)
    return k.device.type in FUSED_ON and k.shape[-1] <= 128 and not no_triton(k)


class FusedCache:
    """For the kernels below: model.Attention leaves all between its two products to `attend`."""

    def __init__(self, cache):
        config = cache.config
        k = cache.k[0]
        self.cache = cache
        self.length = cache.capacity - 1
        self.lens = cache.lens.clone()
        self.window = config.window or FAR
        self.parts = parts_of(cache.capacity, cache.rows * config.n_kv_head, k.device)
        # the queries, and what each part of a row's keys leaves
        self.q = k.new_empty(cache.rows, config.n_head, config.head_dim)
        shape = cache.rows, config.n_head, self.parts
        self.out = k.new_empty(*shape, config.head_dim, dtype=torch.float32)
        self.lse = k.new_empty(shape, dtype=torch.float32)

    def extend(self, T):
        now = self.lens.clone()
        self.lens += T
        return now[:, None], None

    def attend(self, layer, q, k, v, rope):
        """q (R, 1, H, D) and k (R, 1, K, D) are rotated by rope (R, 1, 1, D/2), k and v go into the
        cache -> softmax(q k^T / sqrt(D)) v over all that each row then holds, (R, 1, H D).
        """
        (R, _, H, D), K = q.shape, k.shape[2]
        keys, values = self.cache.k[layer], self.cache.v[layer]
        angles = torch.view_as_real(rope)  # (R, 1, 1, D/2, 2)
        where = keys, values, self.lens, self.cache.capacity
        strides = [x.stride(0) for x in (q, k, v)]
        half = triton.next_power_of_2(D // 2)
        place_kernel[R, triton.cdiv(H + 2 * K, 16)](
            q, k, v, *strides, angles, self.q, *where, H, K, D=D, HALF=half, **FMA
        )
        shape = dict(D=D, DP=max(16, 2 * half), **FMA)
        part_kernel[R * K, self.parts](
            self.q,
            *where,
            self.out,
            self.lse,
            self.window,
            D**-0.5 * math.log2(math.e),
            K,
            G=H // K,
            GP=max(16, triton.next_power_of_2(H // K)),  # tensor cores multiply 16 rows
            N=16 if keys.dtype == torch.float32 else 64,
            **shape,
        )
        o = torch.empty_like(self.q)
        whole_kernel[R * H,](self.out, self.lse, o, PARTS=self.parts, **shape)
        return o.flatten(1)[:, None]


def parts_of(capacity, heads, device):
    """Into how many parts to split the keys of each of R K heads: 16 programs for each
    multiprocessor, so that some read while others wait, if that leaves 128 keys to a part. A power
    of two: every other number would be one more kernel to compile.
    """
    processors = 1
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    parts = max(1, min(16 * processors // heads, capacity // 128, 64))
    return 2 ** int(math.log2(parts))


# --------------------------------------------------------------------------------------------------
# FusedCache's kernels


@jit(do_not_specialize=["capacity"])
def place_kernel(
    q,
    k,
    v,
    q_s,  # strides of a row
    k_s,
    v_s,
    angles,
    turned,  # q is written here, k and v into keys and values
    keys,
    values,
    lens,
    capacity,
    H,
    K,
    D: tl.constexpr,  # channels
    HALF: tl.constexpr,  # pairs of channels, with padding
):
    """A program owns 16 heads of a row: first come queries, then keys, then values."""
    r = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * 16 + tl.arange(0, 16)[:, None]  # (16, 1)
    pair = tl.arange(0, HALF)[None, :]  # (1, HALF)
    here = (h < H + 2 * K) & (pair < D // 2)
    turns = (h < H + K) & (pair < D // 2)  # values do not
    x = tl.where(h < H + K, k + r * k_s - H * D, v + r * v_s - (H + K) * D)
    x = tl.where(h < H, q + r * q_s, x)
    x += h * D + 2 * pair
    a = tl.load(x, mask=here, other=0.0).to(tl.float32)
    b = tl.load(x + 1, mask=here, other=0.0).to(tl.float32)
    angle = angles + r * D + 2 * pair + 0 * h
    cos = tl.load(angle, mask=turns, other=1.0)
    sin = tl.load(angle + 1, mask=turns, other=0.0)
    slot = tl.load(lens + r) - 1
    to_key = keys + ((r * K + h - H) * capacity + slot) * D
    to_value = values + ((r * K + h - H - K) * capacity + slot) * D
    y = tl.where(h < H + K, to_key, to_value)
    y = tl.where(h < H, turned + (r * H + h) * D, y)
    y += 2 * pair
    tl.store(y, (a * cos - b * sin).to(keys.dtype.element_ty), mask=here)
    tl.store(y + 1, (a * sin + b * cos).to(keys.dtype.element_ty), mask=here)


@jit(do_not_specialize=["capacity", "window"])
def part_kernel(
    q,
    keys,
    values,
    lens,
    capacity,
    out,  # written here, (R, H, parts, D)
    lse,  # and here, (R, H, parts)
    window,
    c,  # log2(e) / sqrt(D): the factor that makes scores powers of two
    K,
    G: tl.constexpr,  # query heads of a key head,
    GP: tl.constexpr,  # with padding
    N: tl.constexpr,  # keys of a tile
    D: tl.constexpr,
    DP: tl.constexpr,
):
    """A program owns one of the parts of a row's keys, and a key head."""
    r = (tl.program_id(0) // K).to(tl.int64)
    h = tl.program_id(0) % K
    part = tl.program_id(1)
    parts = tl.num_programs(1)
    end = tl.load(lens + r).to(tl.int32)
    first = tl.maximum(end - window, 0)
    width = tl.cdiv(end - first, parts * N) * N  # of a part: whole tiles, for the last perhaps 0
    begin = first + part * width
    end = tl.minimum(begin + width, end)
    channel = tl.arange(0, DP)[None, :]
    g = tl.arange(0, GP)[:, None]  # the heads of the group
    head = (r * K + h) * G + g  # as rows of q, (GP, 1)
    mine = (g < G) & (channel < D)
    q_tile = tl.load(q + head * D + channel, mask=mine, other=0.0)
    of_head = (r * K + h) * capacity * D  # where the head's keys begin, and its values
    acc = tl.zeros((GP, DP), tl.float32)  # the weighted sum of values,
    total = tl.zeros((GP, 1), tl.float32)  # the sum of their weights,
    m = tl.full((GP, 1), -float("inf"), tl.float32)  # and the maximum: finite after a tile of keys
    for i in range(begin, end, N):
        key = i + tl.arange(0, N)
        at = key[:, None] * D + channel  # (N, DP)
        seen = (key[:, None] < end) & (channel < D)
        k_tile = tl.load(keys + of_head + at, mask=seen, other=0.0)
        s = dot(q_tile, tl.trans(k_tile), None)  # (GP, N)
        s = tl.where(key[None, :] < end, s, -float("inf"))
        m_new = tl.maximum(m, tl.max(s, 1, keep_dims=True) * c)
        p = tl.exp2(s * c - m_new)
        rescale = tl.exp2(m - m_new)
        total = total * rescale + tl.sum(p, 1, keep_dims=True)
        v_tile = tl.load(values + of_head + at, mask=seen, other=0.0)
        acc = dot(p.to(v_tile.dtype), v_tile, acc * rescale)
        m = m_new
    total = tl.where(total > 0, total, 1.0)  # a part without keys leaves 0, and -inf
    at = head * parts + part
    tl.store(out + at * D + channel, acc / total, mask=mine)
    tl.store(lse + at, m + tl.log2(total), mask=g < G)


@jit()
def whole_kernel(
    out,
    lse,
    o,  # written here, (R, H, D)
    PARTS: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
):
    """A program puts the parts of a row and query head together. The first part is never empty: a
    row sees itself.
    """
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, DP)[None, :]
    at = row * PARTS + tl.arange(0, PARTS)[:, None]  # (PARTS, 1)
    bits = tl.load(lse + at)
    weight = tl.exp2(bits - tl.max(bits))
    parts = tl.load(out + at * D + channel, mask=channel < D, other=0.0)  # (PARTS, DP)
    whole = tl.sum(parts * weight, 0, keep_dims=True) / tl.sum(weight)
    tl.store(o + row * D + channel, whole.to(o.dtype.element_ty), mask=channel < D)


# --------------------------------------------------------------------------------------------------
# On a CPU

NATIVE = {torch.float32: "float", torch.bfloat16: "bf16"}  # decoding.cpp's types


def native(cache):
    """What stands in for a KVCache on a CPU where decoding.cpp can be compiled, else the cache."""
    k = cache.k[0]
    autocast = torch.is_autocast_enabled("cpu")
    if k.device.type != "cpu" or k.dtype not in NATIVE or cache.config.window or autocast:
        return cache
    attend = compiled(k.shape[-1], NATIVE[k.dtype])
    return NativeCache(cache, attend) if attend else cache


class NativeCache:
    """For decoding.cpp. Between two steps rows may leave the KVCache that it stands in for."""

    def __init__(self, cache, compiled_attend):
        self.cache = cache
        self.compiled_attend = compiled_attend

    @property
    def length(self):
        return self.cache.length

    def extend(self, T):
        now = self.cache.lens
        self.cache.lens = now + T
        self.cache.length += T
        assert self.cache.length <= self.cache.capacity, "the cache is full"
        return now[:, None], None

    def attend(self, layer, q, k, v, rope):
        """As FusedCache.attend."""
        cache = self.cache
        o = q.new_empty(q.shape)  # (R, 1, H, D)
        angles = torch.view_as_real(rope)  # (R, 1, 1, D/2, 2)
        tensors = q, k, v, angles, cache.k[layer], cache.v[layer], cache.lens, o
        strides = (x.stride(0) for x in (q, k, v))
        shape = cache.rows, q.shape[2], k.shape[2], cache.capacity
        self.compiled_attend(*(x.data_ptr() for x in tensors), *strides, *shape)
        return o.flatten(2)


@functools.cache
def compiled(channels, dtype):
    """decoding.cpp's `attend` for heads of so many channels, in float or bf16. None where it cannot
    be compiled: there is no g++, or no Linux. Takes a second, once for each machine: it is kept
    where Python keeps what it compiles.
    """
    source = Path(__file__).with_suffix(".cpp")
    # the compiler may choose the order of a sum, but nan stays nan
    flags = ["-O3", "-march=native", "-ffast-math", "-fno-finite-math-only", "-fopenmp", "-fPIC"]
    flags += [f"-DD={channels}", f"-DT={dtype}"]
    try:
        processor = re.search("(flags|Features).*", Path("/proc/cpuinfo").read_text())[0]
        key = f"{source.read_text()} {flags} {processor}"
        folder = source.parent / "__pycache__"
        library = folder / f"decoding-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
        if not library.exists():
            folder.mkdir(exist_ok=True)
            with TemporaryDirectory(dir=folder) as parts:
                compiling = ["g++", "-c", *flags, source, "-o", "decoding.o"]
                # without -fopenmp: the threads shall be torch's
                linking = ["g++", "-shared", "decoding.o", "-o", "decoding.so"]
                for command in (compiling, linking):
                    subprocess.run(command, cwd=parts, check=True, capture_output=True)
                os.replace(f"{parts}/decoding.so", library)  # whole or not at all
        attend = ctypes.CDLL(library).attend
    except (OSError, TypeError, subprocess.CalledProcessError):
        return None
    attend.argtypes = [ctypes.c_void_p] * 8 + [ctypes.c_long] * 7
    attend.restype = None
    return attend
