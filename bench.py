"""bench.py: every speed and memory that this project speaks of, beside the peers it has.

    python bench.py             all five parts, one after the other, each about two minutes at most
    python bench.py kernels     token_logprobs, attention, forward and backward
    python bench.py sampling    generate, beside Hugging Face's (pip install transformers)
    python bench.py training    a training step, beside nanoGPT's (--nanogpt FOLDER, a checkout)
    python bench.py decoding    generate alone; on a GPU step by step and as CUDA graphs
    python bench.py profile     what a step spends its time on

On a GPU the kernels' peers are Liger, Cut Cross-Entropy and FlashAttention (pip install
liger-kernel, cut-cross-entropy, flash-attn). None is required: a line says which are left out.

All rows have one form: tokens/s; how many times the fastest peer's (`x peer`; a peer's row ends
with the part of the work that it goes without); the limit, in tokens/s, which of two sets it, and
the share of it that is reached; the share of the matrix products' roof (`MFU`, model FLOPs
utilization, Chowdhery et al., arXiv 2204.02311); the peak memory above weights and inputs.

How it is measured:
1. One thing at a time. Rivals take turns in one run and the median counts, so that a machine's good
   and bad minutes meet all of them.
2. Everything runs once before it is timed: compilers, tuners and allocators do their work then.
3. The roof is what this machine reaches, not what its maker promises: the fastest of six matrix
   products, the fastest of six copies.
4. The limit is the roof over what nobody can do without, counted from shapes as in meter.py: the
   FLOPs of the products, or the bytes to be moved through the memory, whichever takes longer. Of
   causal attention a kernel's count has half a square, a model's the whole, as is usual. What stays
   in a CPU's caches can be faster than its memory: small models have no strict limit.
5. A kernel's error is that of its worst output or gradient, on a small problem, against fp64. Its
   first call is that small problem and a large one: with what it compiles and tunes.
6. On a CPU each kernel has a process of its own, because a process's peak memory never falls. On a
   GPU the peak can be reset: one process runs all kernels, starts once, and searches Triton's tiles
   once for each shape.
7. What only a GPU does in seconds is left out on a CPU. On a GPU all parts together leave out the
   peers' and our own minutes of compilation: name the part, and it has them.

The numbers mean something on an idle machine only. --out (default out/bench) takes benchmark.json,
where a part that is measured again replaces its own rows, and kernels.png: kernels under the roof.
"""

import argparse
import json
import multiprocessing
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from statistics import median
from unittest.mock import patch

import matplotlib.pyplot as plt
import torch

import decoding
import engine
import model
import peers
from experiment import UserError, command, out_of_memory, pick_device, whole
from kernels import attention, can_compile, gemm_dtype, no_triton, token_logprobs
from model import GPT, GPTConfig
from roof import clock, generating, profiled, roof

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# What is sampled from and trained
SIZES = {
    "4 x 128": GPTConfig(64, 256, 4, 4, 128, tie=False),
    "GPT-2 size": GPTConfig(50257, 1024, 12, 12, 768),
    "GPT-2 size, padded": GPTConfig(50304, 1024, 12, 12, 768),  # nanoGPT's: a multiple of 64 ids
    "SmolLM2-135M size": GPTConfig(49152, 2048, 30, 9, 576, n_kv_head=3, n_hidden=1536),
    "Qwen2.5-0.5B size": GPTConfig(151936, 1024, 24, 14, 896, n_kv_head=2, n_hidden=4864),
}


# What is measured where
RAGGED = [*range(8, 40, 2)]  # lengths of prompts
WORKS = {
    "quick": dict(
        kernels=[("token_logprobs", (512, 256, 8192)), ("attention", (1, 4, 256, 64))],
        # a model, its dtype, the prompts' lengths, samples of each, new tokens
        sampling=[("4 x 128", "float32", [3, 8], 2, 8)],
        training=[("4 x 128", 2)],  # a model, rows of a step
        decoding=[("4 x 128", "bfloat16", [32] * 2, 1, 8)],
    ),
    "cpu": dict(
        kernels=[("token_logprobs", (2048, 512, 32000)), ("attention", (4, 12, 1024, 64))],
        sampling=[
            ("4 x 128", "float32", RAGGED, 16, 128),
            ("4 x 128", "bfloat16", RAGGED, 16, 128),
            ("GPT-2 size", "bfloat16", [32] * 8, 1, 64),
            ("SmolLM2-135M size", "bfloat16", [32] * 32, 1, 24),
        ],
        training=[("4 x 128", 64)],
        decoding=[
            ("GPT-2 size", "bfloat16", [32] * 8, 1, 64),
            ("Qwen2.5-0.5B size", "bfloat16", [32] * 8, 1, 24),
        ],
    ),
    "cuda": dict(
        kernels=[
            ("token_logprobs", (16384, 4096, 128256)),
            ("attention", (8, 16, 4096, 64)),
            ("attention", (8, 16, 4096, 128)),
        ],
        sampling=[
            ("4 x 128", "bfloat16", RAGGED, 16, 128),
            ("Qwen2.5-0.5B size", "bfloat16", [32] * 32, 8, 256),
        ],
        training=[("GPT-2 size, padded", 16), ("Qwen2.5-0.5B size", 8)],
        decoding=[
            ("GPT-2 size", "bfloat16", [32] * 64, 1, 512),
            ("Qwen2.5-0.5B size", "bfloat16", [32] * 64, 1, 128),
        ],
    ),
}


def row(work, who, dtype, turns, roof, **more):
    """What one racer reached: the median over its turns, each of them (seconds, tokens, FLOPs,
    bytes that must be moved).
    """
    speed = median(tokens / seconds for seconds, tokens, *_ in turns)
    _, tokens, flops, moved = turns[-1]
    products = roof[dtype] / flops * tokens  # tokens/s, if nothing else took time
    memory = roof["copy"] / moved * tokens
    limit, bound = min((products, "products"), (memory, "memory"))
    return dict(
        work=work,
        who=who,
        dtype=dtype,
        tokens_per_s=speed,
        limit=limit,
        bound=bound,
        reached=speed / limit,
        mfu=speed / products,
        flops=speed * flops / tokens,  # FLOP/s
        intensity=flops / moved,
        without=peers.WITHOUT.get(who.partition(",")[0]),  # None for ours
        **more,
    )


HEAD = f"{'tokens/s':>13} x peer {'limit':>13} {'':<8} reached   MFU     GiB"


def show(rows):
    """Print the rows of one race, and give each its ratio: its speed over the fastest peer's."""
    best = max((row["tokens_per_s"] for row in rows if row["without"] is not None), default=None)
    print(rows[0]["work"])
    for row in rows:
        row["ratio"] = best and row["tokens_per_s"] / best
        ratio, gib = ("-" if row[x] is None else f"{row[x]:.3g}" for x in ("ratio", "gib"))
        note = ", ".join(filter(None, (row["note"], row["without"])))
        print(
            "    {who:<28}{tokens_per_s:>13,.0f}".format(**row),
            f"{ratio:>6}",
            "{limit:>13,.0f} {bound:<8} {reached:>7.0%} {mfu:>5.0%}".format(**row),
            f"{gib:>7}  {note}".rstrip(),
            flush=True,
        )
    return rows


# --------------------------------------------------------------------------------------------------
# python bench.py kernels


def problem(work, shape, dtype, device):
    """What to differentiate, the other arguments, and a gradient for each output.

    shape: (N, C, V) for token_logprobs, (B, H, T, D) for attention.
    """
    torch.manual_seed(0)
    if work == "token_logprobs":
        N, C, V = shape
        # hidden (N, C), weight (V, C)
        leaves = [torch.randn(n, C, dtype=dtype, device=device) for n in (N, V)]
        g = torch.randn(N, device=device)
        targets = torch.randint(V, (N,), device=device)
        return [x.mul_(0.5).requires_grad_() for x in leaves], [targets], [g, 0.01 * g]
    q, k, v, g = (torch.randn(shape, dtype=dtype, device=device) for _ in range(4))
    return [x.requires_grad_() for x in (q, k, v)], [], [g]


def run(work, impl, args):
    """The outputs of one of our impls, or of a peer: as many as it has."""
    if impl in peers.KERNELS:
        return (peers.KERNELS[impl](*args),)
    if work == "token_logprobs":
        return token_logprobs(*args, impl=impl)
    return (attention(*args, impl=impl),)


def error(work, dtype, impl, device):
    """The error of the worst output or gradient: its norm over that of the same in fp64."""
    # On a GPU 16 heads: Triton compiles anew for a number of heads that is no multiple of 16
    heads = 16 if device == "cuda" else 2
    small = (64, 64, 1000) if work == "token_logprobs" else (1, heads, 128, 64)
    leaves, rest, upstream = problem(work, small, dtype, device)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    results = []
    for name, inputs in ((impl, leaves), ("reference", exact)):
        outputs = run(work, name, (*inputs, *rest))
        gradients = [g.to(o.dtype) for g, o in zip(upstream, outputs, strict=True)]
        results.append([*outputs, *torch.autograd.grad(outputs, inputs, gradients)])
    return max(
        ((ours.double() - true).norm() / true.norm()).item()
        for ours, true in zip(*results, strict=True)
    )


def peak_memory(device):
    """The most bytes ever in use: of this process, or on the GPU since the peak was last reset."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 2**10  # Linux counts in KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measure(work, shape, dtype, impl, device, repeats=3):
    """Median seconds forward and backward, peak MiB above the inputs, seconds of the first call,
    error (None for a peer's module).
    """
    if impl == "compiled" and device == "cpu":
        # It compiles in `error`, in this process: before the memory that counts is looked at
        torch._inductor.config.compile_threads = 1
    started = clock(device)
    worst = None if impl in peers.MODULES else error(work, dtype, impl, device)
    leaves, rest, upstream = problem(work, shape, dtype, device)

    def step():
        started = clock(device)
        outputs = run(work, impl, (*leaves, *rest))
        middle = clock(device)
        # Liger's loss takes no gradient per token
        gradients = [torch.ones_like(outputs[0])] if impl == "liger" else upstream[: len(outputs)]
        torch.autograd.backward(outputs, gradients)
        ended = clock(device)
        for leaf in leaves:
            leaf.grad = None
        return middle - started, ended - middle

    if device == "cuda":
        step()  # Triton tunes and compiles, in memory that is not the kernel's
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    before = peak_memory(device)
    step()
    peak = peak_memory(device)
    first = clock(device) - started
    forward, backward = map(median, zip(*(step() for _ in range(repeats)), strict=True))
    return forward, backward, (peak - before) / 2**20, first, worst


def left_out(impl, device):
    """Why this machine cannot run an impl or a peer, or None."""
    if impl == "compiled" and not can_compile(device):
        return "no C++ compiler found"
    if impl == "triton":
        return no_triton(torch.empty(0, device=device))
    if impl in peers.MODULES and not find_spec(peers.MODULES[impl]):
        return "not installed"


def apart(f, *args, device):
    """f(*args, device), on a CPU in a process of its own. MemoryError if that is killed."""
    if device == "cuda":
        return f(*args, device)
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(1, mp_context=context)
    try:
        return pool.submit(f, *args, device).result()
    except BrokenProcessPool:
        raise MemoryError("its process ended without a result") from None
    finally:
        for process in multiprocessing.active_children():
            process.kill()
        pool.shutdown()


def useful(work, shape):
    """Tokens, FLOPs of a forward and backward pass, and the elements that any impl has to move."""
    if work == "token_logprobs":
        N, C, V = shape
        # 3 products: z, dh, dW. h and W are read twice, and their gradients written
        return N, 6 * N * C * V, 3 * (N + V) * C
    B, H, T, D = shape
    # Causal: 7 products of half a square, 2 forward, 5 backward.
    # q, k, v, o move in the forward pass; these and do, dq, dk, dv in the backward pass
    return B * T, 7 * B * H * T * T * D, 12 * B * H * T * D


def kernel_jobs(args):
    """What to compute, in which shape, by which impls and peers, in which dtype."""
    impls = dict(token_logprobs=["reference", "chunked"], attention=["reference", "sdpa"])
    dtypes = DTYPES
    if args.device == "cuda":
        impls["token_logprobs"] += ["triton", "liger", "cce"]
        impls["attention"] += ["triton", "flash"]
        # A GPU is used in bf16, and its peers know nothing else: fp32 is tested there, not timed
        dtypes = ["bfloat16"]
    else:
        impls["token_logprobs"].append("compiled")
    shapes = args.works["kernels"]
    return [(work, shape, impls[work], dtype) for work, shape in shapes for dtype in dtypes]


def measure_kernels(args):
    """A forward and a backward pass of each impl and peer."""
    if args.device != "cuda":
        print(f"triton, {', '.join(peers.MODULES)}: need a GPU, left out")
    rows = []
    for work, shape, impls, dtype in kernel_jobs(args):
        title = f"{work} {'x'.join(map(str, shape))} {dtype}"
        tokens, flops, elements = useful(work, shape)
        race = []
        for impl in impls:
            why_not = left_out(impl, args.device)
            try:
                if not why_not:
                    measured = apart(measure, work, shape, DTYPES[dtype], impl, device=args.device)
            except Exception as e:
                if impl not in peers.MODULES and not out_of_memory(e):
                    raise
                why_not = f"{type(e).__name__}: {e}".splitlines()[0]
            if why_not:
                print(f"{title} {impl}: {why_not}, row left out", flush=True)
                continue
            forward, backward, mib, first, worst = measured
            note = f"{forward:.4f} + {backward:.4f} s, first call {first:.1f} s"
            if worst is not None:
                note += f", error {worst:.0e}"
            turn = forward + backward, tokens, flops, elements * DTYPES[dtype].itemsize
            more = dict(gib=mib / 2**10, note=note, forward_seconds=forward)
            more |= dict(backward_seconds=backward, first_call_seconds=first, error=worst)
            race.append(row(title, impl, dtype, [turn], args.roof, **more))
        rows += show(race)
    return rows


def plot_roofline(rows, peak, path):
    """FLOPs per byte that must be moved, against FLOP/s: below the line is what an impl wastes."""
    fig, ax = plt.subplots(figsize=(10, 5), layout="constrained")
    for dtype, color in (("float32", "tab:blue"), ("bfloat16", "tab:orange")):
        ridge = peak[dtype] / peak["copy"]  # FLOP/byte from which on products are what takes time
        line = [peak["copy"], peak[dtype], peak[dtype]]
        ax.plot([1, ridge, 1e5], line, color=color, label=f"roof, {dtype}")
        points = [row for row in rows if row["dtype"] == dtype]
        for row, marker in zip(points, cycle("osD^*<>vpXPhd")):
            label = "{work}, {who}".format(**row)
            ax.plot(row["intensity"], row["flops"], marker, color=color, label=label)
    best = max(rows, key=lambda row: row["reached"])
    ax.set(
        xscale="log",
        yscale="log",
        xlabel="operations per byte that must be moved (FLOP/byte)",
        ylabel="achieved (FLOP/s)",
        title="Closest to the roof: {work}, {who}, {reached:.0%}".format(**best),
    )
    ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    with whole(path) as f:
        fig.savefig(f, dpi=110, format="png")


# --------------------------------------------------------------------------------------------------
# python bench.py sampling, training, decoding


def compare(work, dtype, racers, args):
    """The rows of a race. racers: name -> function that does some work and returns its tokens,
    FLOPs and bytes.

    Three rounds, on a CPU four, in which all take turns; the first warms up. On a GPU memory is
    what a racer keeps from its first turn on (gradients, moments), and the most that its last turn
    adds.
    """
    cuda = args.device == "cuda"
    turns = {name: [] for name in racers}
    kept, gib = {}, dict.fromkeys(racers)
    for _ in range(3 if cuda else 4):
        for name, race in racers.items():
            if cuda:
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            started = clock(args.device)
            cost = race()
            turns[name].append((clock(args.device) - started, *cost))
            if cuda:
                kept.setdefault(name, torch.cuda.memory_allocated() - before)
                gib[name] = (peak_memory("cuda") - before + kept[name]) / 2**30
    return show(
        [
            row(work, name, dtype, turns[name][1:], args.roof, gib=gib[name], note="")
            for name in racers
        ]
    )


def sampling_racers(ours, peer, prompts, n, new, stop):
    """n continuations of each prompt, up to the stop token, by ours and by transformers."""
    itemsize = ours.lm_head.weight.itemsize
    cost = partial(generating, ours.config, itemsize, [len(p) for p in prompts])

    def rollout(static_on):
        with patch.object(engine, "STATIC_ON", static_on):
            return engine.generate(ours, prompts, n, new, stop=stop).lengths.tolist()

    racers = {"rollout": partial(rollout, engine.STATIC_ON), "rollout, eager": partial(rollout, ())}
    if peer:
        racers |= peers.transformers(peer, prompts, n, new, stop)
    return {name: (lambda race=race: cost(race())) for name, race in racers.items()}


def drawn(name, dtype, device):
    """A model with random weights, made where it is used. Where bf16 is emulated, generate would
    turn it into fp32: then it is from the start.
    """
    torch.manual_seed(0)
    with torch.device(device):
        return GPT(SIZES[name]).to(gemm_dtype(torch.empty(0, dtype=DTYPES[dtype])))


def sample(args, part, leave_out=(), beside=False):
    """The races of generate in that part."""
    rows = []
    for name, dtype, lens, n, new in args.works[part]:
        ours = drawn(name, dtype, args.device)
        dtype = str(ours.lm_head.weight.dtype).removeprefix("torch.")
        prompts = [torch.randint(1, ours.config.vocab_size, (T,)).tolist() for T in lens]
        # The toy stops at token 0, in the mean after 64 tokens; of a large vocabulary none comes up
        stop = 0 if name == "4 x 128" else None
        peer = peers.llama(ours) if beside else None
        racers = sampling_racers(ours, peer, prompts, n, new, stop)
        racers = {name: race for name, race in racers.items() if name not in leave_out}
        title = f"{name}, {len(lens)} prompts x {n}, up to {new} tokens, {dtype}"
        rows += compare(title, dtype, racers, args)
    return rows


def measure_sampling(args):
    """generate beside transformers, on the same model."""
    leave_out = ["rollout, eager"]
    if args.device == "cuda" and not args.part:
        leave_out.append("transformers, static cache")
        print("transformers, static cache: compiles, left out unless the part is named")
    installed = find_spec("transformers") is not None
    if not installed:
        print("transformers: not installed, left out")
    return sample(args, "sampling", leave_out, beside=installed)


def measure_decoding(args):
    """How near decoding comes to reading no more than it must, as fast as the memory can. On a GPU
    twice: the whole step replayed as a CUDA graph, and each kernel launched by Python.
    """
    return sample(args, "decoding", () if args.device == "cuda" else ["rollout, eager"])


def training_racers(config, batch, dtype, device, nanogpt, compiles):
    """Whole training steps: forward, backward, clip, AdamW; bf16 by autocast.

    nanogpt: its GPT and GPTConfig, or None. compiles: each model also under torch.compile.
    """
    torch.manual_seed(0)
    T = config.block_size
    ids = torch.randint(config.vocab_size, (batch, T + 1), device=device)
    x = ids[:, :-1]  # (B, T)
    y = ids[:, 1:].contiguous()  # (B, T)
    head = 2 * y.numel() * config.n_embd * config.vocab_size
    # AdamW reads and writes the weights and two moments, the gradient is written and read, in fp32
    cost = y.numel(), 3 * (config.flops(batch, T, T) + head), 32 * config.parameters
    racers = {}

    def enter(name, gpt, forward, loss_of):
        optimizer = torch.optim.AdamW(gpt.parameters(), 1e-3, fused=True)

        def step(forward):
            with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
                loss = loss_of(forward)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(gpt.parameters(), 1.0)
            optimizer.step()
            return cost

        racers[name] = partial(step, forward)
        if compiles:
            racers[f"{name}, compiled"] = partial(step, torch.compile(forward))

    with torch.device(device):
        ours = GPT(config)

    def our_loss(hidden):
        return -token_logprobs(hidden(x), ours.lm_head.weight, y)[0].mean()

    enter("rollout", ours, ours.hidden, our_loss)
    if nanogpt:
        peer = peers.nanogpt(nanogpt, config).to(device)
        enter("nanoGPT", peer, peer, lambda peer: peer(x, y)[1])
    return racers


def measure_training(args):
    """A training step of ours, as it stands and under torch.compile, beside nanoGPT's."""
    cuda = args.device == "cuda"
    compiles = can_compile(args.device) and not args.quick and (args.part or not cuda)
    if not compiles:
        print("torch.compile: no C++ compiler, --quick, or a GPU and the part not named: left out")
    if not args.nanogpt:
        print("nanoGPT: no checkout given by --nanogpt: left out")
    if args.device == "cpu":
        print("Qwen2.5-0.5B size: 8 GB and minutes on a CPU, left out")
    rows = []
    for name, batch in args.works["training"]:
        config = SIZES[name]
        # nanoGPT has no grouped heads
        peer = args.nanogpt if config.n_kv_head == config.n_head else None
        for dtype in ["bfloat16"] if cuda else DTYPES:
            title = f"training step, {name}, batch {batch} x {config.block_size}, {dtype}"
            how = dict(nanogpt=peer, compiles=compiles)
            racers = training_racers(config, batch, DTYPES[dtype], args.device, **how)
            rows += compare(title, dtype, racers, args)
    return rows


# --------------------------------------------------------------------------------------------------
# python bench.py profile

# What is timed by name: our functions, where they are called from
RANGES = {
    "attention": (model, "attention"),
    "attention, decoding.cpp": (decoding.NativeCache, "attend"),
    "norms": (model.RMSNorm, "forward"),
    "rotation": (model, "rotate"),
    "sampler": (engine.Sampler, "draw"),
    "optimizer": (torch.nn.utils, "clip_grad_norm_"),
}


def measure_profile(args):
    """Where a step's time goes: each kernel launched by Python, on a GPU too."""
    warm_up = GPTConfig(64, 32, 4, 4, 128, tie=False)  # the short rows that lessons imitate
    train = training_racers(warm_up, 32, torch.float32, args.device, nanogpt=None, compiles=False)
    races = {"training, 4 x 128": (train["rollout"], 1)}
    for name, dtype, lens, n, _ in (args.works["sampling"][0], args.works["decoding"][0]):
        ours = drawn(name, dtype, args.device)
        racers = sampling_racers(ours, None, [[1] * T for T in lens], n, 32, None)
        races[f"sampling, {name}"] = racers["rollout, eager"], 32
    rows = []
    for work, (race, steps) in races.items():
        milliseconds, shares = profiled(race, RANGES, args.device)
        rows.append(dict(work=work, milliseconds=milliseconds / steps, shares=shares))
    print(f"{'share of a step':<24}", *(f"{row['work']:>22}" for row in rows))
    for group in rows[0]["shares"]:
        print(f"{group:<24}", *(f"{row['shares'][group]:>22.0%}" for row in rows))
    print(f"{'milliseconds':<24}", *(f"{row['milliseconds']:>22.1f}" for row in rows))
    return rows


# --------------------------------------------------------------------------------------------------
# The command

PARTS = dict(
    kernels=measure_kernels,
    sampling=measure_sampling,
    training=measure_training,
    decoding=measure_decoding,
    profile=measure_profile,
)


def parse():
    """The command line. UserError for what it cannot mean."""

    def fail(message):
        raise UserError(message)

    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.error = fail
    parser.add_argument("part", nargs="?", choices=PARTS, help="default: all")
    parser.add_argument(
        "--quick", action="store_true", help="seconds a part: shows only that it runs"
    )
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, choices=("cpu", "cuda"))
    parser.add_argument(
        "--nanogpt", default="", help="training's peer: a checkout of karpathy/nanoGPT"
    )
    parser.add_argument(
        "--out", type=Path, default="out/bench", help="folder to write to, default: %(default)s"
    )
    args = parser.parse_args()
    if args.nanogpt and args.part not in (None, "training"):
        fail("--nanogpt does nothing here: it is training's peer")
    pick_device(args.device)  # UserError for one that is not there
    args.works = WORKS["quick" if args.quick else args.device]
    args.nanogpt = peers.load_nanogpt(args.nanogpt) if args.nanogpt else None
    return args


def make_folder(out):
    """The folder for benchmark.json and kernels.png -> what earlier runs measured, by parts.

    UserError if it cannot be made, or holds files by these names that no benchmark wrote.
    """
    earlier = {}
    try:
        out.mkdir(parents=True, exist_ok=True)
        names = {"benchmark.json", "kernels.png"} & {path.name for path in out.iterdir()}
        if "benchmark.json" in names:
            earlier = json.loads((out / "benchmark.json").read_text())
            ours = all(name in PARTS and "rows" in part for name, part in earlier.items())
    except OSError as e:
        raise UserError(f"cannot write to {out}: {e.strerror}") from None
    except (ValueError, TypeError, AttributeError):  # no JSON, or not of this form
        ours = False
    if names and not (earlier and ours):
        raise UserError(f"{out} holds {min(names)}, which no benchmark wrote: choose another --out")
    return earlier


def main():
    args = parse()
    results = make_folder(args.out)
    warnings.simplefilter("ignore")  # compilers and peers warn of much
    args.roof = apart(roof, device=args.device)
    machine = dict(
        device=torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        roof=args.roof,
    )
    print("{device}, {threads} threads, torch {torch}".format(**machine))
    fp32, bf16, copy = (speed / 1e9 for speed in args.roof.values())
    print(f"roof: {fp32:,.0f} GFLOP/s in float32, {bf16:,.0f} in bfloat16; a copy {copy:,.0f} GB/s")
    for part in [args.part] if args.part else PARTS:
        print(f"\n{part:<32}{'' if part == 'profile' else HEAD}".rstrip(), flush=True)
        # cuDNN's attention plans anew for each length: fast where all are the same, not in sampling
        torch.backends.cuda.enable_cudnn_sdp(part in ("kernels", "training"))
        rows = PARTS[part](args)
        results[part] = dict(**machine, rows=rows)
        with whole(args.out / "benchmark.json") as f:
            f.write(json.dumps(results, indent=1).encode())
        if part == "kernels":
            plot_roofline(rows, args.roof, args.out / "kernels.png")


if __name__ == "__main__":
    command(main)
