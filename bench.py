"""bench.py: every speed and memory that this project speaks of, beside the peers it has.

    python bench.py             all four parts, one after the other, each at most two minutes
    python bench.py kernels     token_logprobs, attention: seconds, memory, error, share of the roof
    python bench.py sampling    generate, beside Hugging Face's (pip install transformers)
    python bench.py training    a training step, beside nanoGPT's (--nanogpt FOLDER, a checkout)
    python bench.py decoding    the share of the memory's bandwidth that decoding reaches

On a GPU the kernels' peers are Liger, Cut Cross-Entropy and FlashAttention (pip install
liger-kernel, cut-cross-entropy, flash-attn). None is required: a line says which are left out. A
peer's row says which part of the work it does not do.

How it is measured:
1. One thing at a time. Rivals take turns in one run and the median counts, so that a machine's good
   and bad minutes meet all of them.
2. Everything runs once before it is timed: compilers, tuners and allocators do their work then.
3. The roof is what this machine reaches, not what its maker promises: the fastest of six matrix
   products, the fastest of six copies.
4. A kernel's error is that of its worst output or gradient, on a small problem, against fp64.
5. On a CPU each kernel has a process of its own, because a process's peak memory never falls. On a
   GPU the peak can be reset: one process runs all kernels, starts once, and searches Triton's tiles
   once for each shape.

The numbers mean something on an idle machine only. --out (default out/bench) takes benchmark.json,
where a part that is measured again replaces its own rows, and kernels.png: kernels under the roof.
"""

import argparse
import json
import multiprocessing
import sys
import time
import warnings
from functools import partial
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from statistics import median

import matplotlib.pyplot as plt
import torch
from torch.nn.utils.rnn import pad_sequence

import engine
from experiment import UserError, command, out_of_memory, pick_device, whole
from kernels import attention, can_compile, gemm_dtype, no_triton, token_logprobs
from model import GPT, GPTConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# What is sampled from and trained
SIZES = {
    "4 x 128": GPTConfig(64, 256, 4, 4, 128, tie=False),
    "GPT-2 size": GPTConfig(50257, 1024, 12, 12, 768),
    "GPT-2 size, padded": GPTConfig(50304, 1024, 12, 12, 768),  # nanoGPT's: a multiple of 64 ids
    "SmolLM2-135M size": GPTConfig(49152, 2048, 30, 9, 576, n_kv_head=3, n_hidden=1536),
    "Qwen2.5-0.5B size": GPTConfig(151936, 1024, 24, 14, 896, n_kv_head=2, n_hidden=4864),
}


def clock(device):
    """Seconds, once the device has done all that it was asked for."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def roof(device):
    """What this machine can do: FLOP/s of a matrix product in each dtype; bytes/s of a copy.

    Bytes are read and written. Where bf16 is emulated its roof is fp32's, which does as well.
    """
    n = 8192 if device == "cuda" else 2048
    best = {}
    for name in (*DTYPES, "copy"):
        rows = 16 * n if name == "copy" else n
        a = torch.randn(n, rows, dtype=DTYPES.get(name), device=device)
        b = torch.empty_like(a)
        seconds = []
        for _ in range(6):
            started = clock(device)
            b.copy_(a) if name == "copy" else torch.mm(a, a, out=b)
            seconds.append(clock(device) - started)
        best[name] = (2 * a.nbytes if name == "copy" else 2 * n**3) / min(seconds)
    best["bfloat16"] = max(best["float32"], best["bfloat16"])
    return best


# --------------------------------------------------------------------------------------------------
# python bench.py kernels

# A peer's module, what it computes, and what it leaves out of it
PEERS = {
    "liger": (
        "liger_kernel",
        "token_logprobs",
        "the summed loss only, gradients already in forward",
    ),
    "cce": ("cut_cross_entropy", "token_logprobs", "no entropy"),
    "flash": ("flash_attn", "attention", ""),
}
MARKERS = dict(
    reference="o", chunked="s", compiled="D", sdpa="^", triton="*", liger="<", cce=">", flash="v"
)


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
    if impl == "liger":
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        hidden, weight, targets = args
        return (LigerFusedLinearCrossEntropyLoss(reduction="sum")(weight, hidden, targets),)
    if impl == "cce":
        from cut_cross_entropy import linear_cross_entropy

        return (-linear_cross_entropy(*args, reduction="none"),)
    if impl == "flash":
        from flash_attn import flash_attn_func

        return (flash_attn_func(*(x.transpose(1, 2) for x in args), causal=True).transpose(1, 2),)
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
    """Median seconds forward and backward, peak MiB above the inputs, error (None for a peer)."""
    if impl == "compiled" and device == "cpu":
        # It compiles in `error`, in this process: before the memory that counts is looked at
        torch._inductor.config.compile_threads = 1
    worst = None if impl in PEERS else error(work, dtype, impl, device)
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
    forward, backward = map(median, zip(*(step() for _ in range(repeats)), strict=True))
    return forward, backward, (peak - before) / 2**20, worst


def left_out(impl, device):
    """Why this machine cannot run an impl or a peer, or None."""
    if impl == "compiled" and not can_compile(device):
        return "no C++ compiler found"
    if impl == "triton":
        return no_triton(torch.empty(0, device=device))
    if impl in PEERS and not find_spec(PEERS[impl][0]):
        return "not installed"


def apart(f, *args, device):
    """f(*args, device), on a CPU in a process of its own. MemoryError if that is killed."""
    if device == "cuda":
        return f(*args, device)
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=send, args=(sender, f, *args, device), daemon=True)
    process.start()
    sender.close()  # ours: the other end is now the process's alone, and closes with it
    try:
        result = receiver.recv()
    except EOFError:
        raise MemoryError("its process ended without a result") from None
    finally:
        process.kill()
        process.join()
    if isinstance(result, Exception):
        raise result
    return result


def send(sender, f, *args):
    """Send f(*args), or what it raises, to the process that waits for it."""
    try:
        result = f(*args)
    except Exception as e:
        result = e
    sender.send(result)


def useful(work, shape):
    """FLOPs of a forward and backward pass, and the elements that any impl has to move."""
    if work == "token_logprobs":
        N, C, V = shape
        # 3 products: z, dh, dW. h and W are read twice, and their gradients written
        return 6 * N * C * V, 3 * (N + V) * C
    B, H, T, D = shape
    # Causal: 7 products of half a square, 2 forward, 5 backward.
    # q, k, v, o move in the forward pass; these and do, dq, dk, dv in the backward pass
    return 7 * B * H * T * T * D, 12 * B * H * T * D


def kernel_jobs(args):
    """What to compute, in which shape and dtype, by which impls and peers, the reference first."""
    cuda = args.device == "cuda"
    if args.quick:
        heads, squares = (512, 256, 8192), [(1, 4, 256, 64)]
    elif cuda:
        heads, squares = (16384, 4096, 128256), [(8, 16, 4096, 64), (8, 16, 4096, 128)]
    else:
        heads, squares = (2048, 512, 32000), [(4, 12, 1024, 64)]
    jobs = [("token_logprobs", heads, ["reference", "chunked", "compiled"])]
    jobs += [("attention", square, ["reference", "sdpa"]) for square in squares]
    for work, shape, impls in jobs:
        if cuda:
            impls += ["triton"] + [peer for peer in PEERS if PEERS[peer][1] == work]
        # A GPU is used in bf16, and its peers know nothing else: fp32 is tested there, not timed
        for dtype in ["bfloat16"] if cuda else DTYPES:
            yield work, shape, dtype, impls


def measure_kernels(args):
    """Seconds, peak memory, error and share of the roof of each impl and peer."""
    if args.device != "cuda":
        print(f"triton, {', '.join(PEERS)}: need a GPU, left out")
    print(
        f"{'':<52} {'seconds':>8} {'forward':>8} {'backward':>8} {'peak MiB':>9} {'of roof':>8} "
        f"{'error':>7} {'time':>7} {'memory':>7}  (ratios to the first)"
    )
    rows = []
    for work, shape, dtype, impls in kernel_jobs(args):
        flops, elements = useful(work, shape)
        intensity = flops / (elements * DTYPES[dtype].itemsize)
        bound = min(args.roof[dtype], args.roof["copy"] * intensity)  # FLOP/s
        first = None
        for impl in impls:
            title = f"{work} {'x'.join(map(str, shape))} {dtype} {impl}"
            why_not = left_out(impl, args.device)
            try:
                if not why_not:
                    measured = apart(measure, work, shape, DTYPES[dtype], impl, device=args.device)
            except Exception as e:
                if impl not in PEERS and not out_of_memory(e):
                    raise
                why_not = f"{type(e).__name__}: {e}".splitlines()[0]
            if why_not:
                print(f"{title}: {why_not}, row left out", flush=True)
                continue
            forward, backward, peak, worst = measured
            seconds = forward + backward
            row = dict(work=work, shape=shape, dtype=dtype, impl=impl, error=worst, peak_mib=peak)
            row |= dict(seconds=seconds, forward_seconds=forward, backward_seconds=backward)
            row |= dict(intensity=intensity, flops=flops / seconds, of_roof=flops / seconds / bound)
            first = first or row
            row |= dict(
                time_ratio=seconds / first["seconds"],
                memory_ratio=peak / max(first["peak_mib"], 1e-9),
                lacks=PEERS[impl][2] if impl in PEERS else "",
            )
            rows.append(row)
            print(
                f"{title:<52} {seconds:>8.3f} {forward:>8.3f} {backward:>8.3f} {peak:>9.0f} "
                f"{row['of_roof']:>8.0%} {'-' if worst is None else format(worst, '.0e'):>7} "
                f"{row['time_ratio']:>6.2f}x {row['memory_ratio']:>6.2f}x  {row['lacks']}".rstrip(),
                flush=True,
            )
    return rows


def plot_roofline(rows, peak, path):
    """FLOPs per byte that must be moved, against FLOP/s: below the line is what an impl wastes."""
    fig, ax = plt.subplots(figsize=(10, 5), layout="constrained")
    colors = {"float32": "tab:blue", "bfloat16": "tab:orange"}
    labels = {}
    for dtype, color in colors.items():
        ridge = peak[dtype] / peak["copy"]  # FLOP/byte from which on products are what takes time
        line = [peak["copy"], peak[dtype], peak[dtype]]
        (labels[f"roof, {dtype}"],) = ax.plot([1, ridge, 1e5], line, color=color)
    for row in rows:
        style = dict(marker=MARKERS[row["impl"]], linestyle="", color=colors[row["dtype"]])
        style["fillstyle"] = "full" if row["work"] == "attention" else "none"
        label = "{work}, {impl}, {dtype}".format(**row)  # one for all shapes
        (labels[label],) = ax.plot(row["intensity"], row["flops"], **style)
    best = max(rows, key=lambda row: row["of_roof"])
    ax.set(
        xscale="log",
        yscale="log",
        xlabel="operations per byte that must be moved (FLOP/byte)",
        ylabel="achieved (FLOP/s)",
        title="Closest to the roof: {work}, {impl}, {dtype}, {of_roof:.0%}".format(**best),
    )
    ax.legend(labels.values(), labels, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    with whole(path) as f:
        fig.savefig(f, dpi=110, format="png")


# --------------------------------------------------------------------------------------------------
# python bench.py sampling, training, decoding


def compare(title, racers, device):
    """Median tokens/s of each racer: name -> function that makes tokens and returns how many.

    Three rounds, in which all take turns; the first warms up. ratio: our best over others' best.
    """
    speeds = {name: [] for name in racers}
    for _ in range(3):
        for name, race in racers.items():
            started = clock(device)
            tokens = race()
            speeds[name].append(tokens / (clock(device) - started))
    middle = {name: median(speed[1:]) for name, speed in speeds.items()}
    ours = [speed for name, speed in middle.items() if name.startswith("rollout")]
    others = [speed for name, speed in middle.items() if not name.startswith("rollout")]
    ratio = max(ours) / max(others) if others else None
    text = ", ".join(f"{name} {speed:,.0f}" for name, speed in middle.items())
    print(f"{title:<66} {text} tokens/s" + (f"; ratio {ratio:.2f}" if others else ""), flush=True)
    return dict(work=title, tokens_per_s=middle, ratio=ratio)


def llama(config, dtype, device):
    """Hugging Face's model of the same shape, with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.n_embd,
        intermediate_size=config.n_hidden,
        num_hidden_layers=config.n_layer,
        num_attention_heads=config.n_head,
        num_key_value_heads=config.n_kv_head,
        max_position_embeddings=config.block_size,
        tie_word_embeddings=config.tie,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(shape).to(device, dtype).eval()


def sampling_racers(ours, peer, prompts, n, new, stop):
    """n continuations of each prompt, by ours and by transformers with each of its caches.

    Tokens count up to the stop token.
    """

    def rollout():
        return int(engine.generate(ours, prompts, n, new, stop=stop).mask.sum())

    racers = {"rollout": rollout}
    if peer is None:
        return racers
    device = ours.lm_head.weight.device
    # transformers wants its padding on the left; no prompt holds a 0
    ids = pad_sequence([torch.tensor(p) for p in prompts], True, 0, "left").to(device)
    mask = (ids > 0).long()  # (prompts, width)

    def transformers(cache):
        out = peer.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=True,
            top_k=0,
            num_return_sequences=n,
            max_new_tokens=new,
            eos_token_id=stop,
            cache_implementation=cache,
        )[:, ids.shape[1] :]  # (prompts * n, new)
        stops = (out == (-1 if stop is None else stop)).long()
        earlier_stops = stops.cumsum(1) - stops
        return int((earlier_stops == 0).sum())

    racers["transformers"] = partial(transformers, None)
    racers["transformers, static cache"] = partial(transformers, "static")
    return racers


def measure_sampling(args):
    """generate beside transformers, on the same Llama architecture with random weights."""
    torch.manual_seed(0)
    ragged = torch.randint(8, 41, (16,)).tolist()
    # A model, its dtype, the prompts' lengths, samples of each, new tokens
    if args.quick:
        works = [("4 x 128", "float32", [3, 8], 2, 8)]
    elif args.device == "cuda":
        works = [
            ("4 x 128", "bfloat16", ragged, 16, 128),
            ("Qwen2.5-0.5B size", "bfloat16", [32] * 32, 8, 256),
        ]
    else:
        works = [
            ("4 x 128", "float32", ragged, 16, 128),
            ("4 x 128", "bfloat16", ragged, 16, 128),
            ("GPT-2 size", "bfloat16", [32] * 8, 1, 24),
            ("SmolLM2-135M size", "bfloat16", [32] * 8, 1, 24),
            ("SmolLM2-135M size", "bfloat16", [32] * 32, 1, 24),
        ]
    installed = find_spec("transformers")
    if not installed:
        print("transformers: not installed, left out")
    rows = []
    for name, dtype, lens, n, new in works:
        config = SIZES[name]
        ours = GPT(config).to(args.device, DTYPES[dtype])
        peer = llama(config, DTYPES[dtype], args.device) if installed else None
        prompts = [torch.randint(1, config.vocab_size, (T,)).tolist() for T in lens]
        # The toy stops at token 0, in the mean after 64 tokens; of a large vocabulary none comes up
        stop = 0 if name == "4 x 128" else None
        title = f"{name}, {len(lens)} prompts x {n}, up to {new} tokens, {dtype}"
        racers = sampling_racers(ours, peer, prompts, n, new, stop)
        rows.append(compare(title, racers, args.device))
    return rows


def load_nanogpt(folder):
    """GPT and GPTConfig of a checkout of karpathy/nanoGPT. UserError if they are not there."""
    path = Path(folder) / "model.py"
    spec = spec_from_file_location("nanogpt_model", path)
    module = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        return module.GPT, module.GPTConfig
    except Exception as e:
        raise UserError(f"--nanogpt {folder}: no checkout of nanoGPT: {e}") from None


def training_racers(config, batch, dtype, device, nanogpt, compiles):
    """Whole training steps: forward, backward, clip, AdamW; bf16 by autocast.

    nanogpt: its GPT and GPTConfig, or None. compiles: each model also under torch.compile.
    """
    torch.manual_seed(0)
    ids = torch.randint(config.vocab_size, (batch, config.block_size + 1), device=device)
    x = ids[:, :-1]  # (B, T)
    y = ids[:, 1:].contiguous()  # (B, T)
    racers = {}

    def enter(name, model, forward, loss_of):
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)

        def step(forward):
            with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
                loss = loss_of(forward)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            return y.numel()

        racers[name] = partial(step, forward)
        if compiles:
            racers[f"{name}, compiled"] = partial(step, torch.compile(forward))

    ours = GPT(config).to(device)

    def our_loss(hidden):
        return -token_logprobs(hidden(x), ours.lm_head.weight, y)[0].mean()

    enter("rollout", ours, ours.hidden, our_loss)
    if nanogpt:
        fields = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")
        shape = {name: getattr(config, name) for name in fields}
        PeerGPT, PeerConfig = nanogpt
        peer = PeerGPT(PeerConfig(**shape, dropout=0.0, bias=False)).to(device)
        enter("nanoGPT", peer, peer, lambda model: model(x, y)[1])
    return racers


def measure_training(args):
    """A training step of ours, as it stands and under torch.compile, beside nanoGPT's."""
    cuda = args.device == "cuda"
    name, batch = ("GPT-2 size, padded", 16) if cuda else ("4 x 128", 2 if args.quick else 64)
    config = SIZES[name]
    compiles = can_compile(args.device) and not args.quick  # compilation takes a minute
    if not compiles:
        print("torch.compile: no C++ compiler found, or --quick: left out")
    if not args.nanogpt:
        print("nanoGPT: no checkout given by --nanogpt: left out")
    rows = []
    for dtype in ["bfloat16"] if cuda else DTYPES:
        title = f"training step, {name}, batch {batch} x {config.block_size}, {dtype}"
        racers = training_racers(config, batch, DTYPES[dtype], args.device, args.nanogpt, compiles)
        rows.append(compare(title, racers, args.device))
    return rows


def measure_decoding(args):
    """How near decoding comes to reading no more than it must, as fast as the memory can.

    A step must read all weights, and the keys and values of its rows. On a GPU twice: each kernel
    launched by Python, and the whole step replayed as a CUDA graph.
    """
    cuda = args.device == "cuda"
    name = "4 x 128" if args.quick else "GPT-2 size"
    config = SIZES[name]
    batch, new = (2, 8) if args.quick else (64, 512) if cuda else (8, 64)
    # Where bf16 is emulated, generate would make the weights fp32: then they are from the start
    dtype = gemm_dtype(torch.empty(0, dtype=torch.bfloat16, device=args.device))
    model = GPT(config).to(args.device, dtype)
    token_bytes = 2 * config.n_layer * config.n_kv_head * config.head_dim * dtype.itemsize
    cache_bytes = batch * (32 + new / 2) * token_bytes  # a step's, on average
    step_bytes = sum(p.nbytes for p in model.parameters()) + cache_bytes

    def decode(static_on):
        engine.STATIC_ON = static_on
        engine.generate(model, [[1] * 32] * batch, 1, new)
        return batch * new

    racers = {"rollout, eager": partial(decode, ())}
    if cuda:
        racers["rollout, CUDA graphs"] = partial(decode, ("cuda",))
    usual = engine.STATIC_ON
    title = f"{name}, batch {batch}, {new} tokens, {str(dtype)[6:]}"
    row = compare(title, racers, args.device)
    engine.STATIC_ON = usual
    for racer, speed in row["tokens_per_s"].items():
        share = speed / batch * step_bytes / args.roof["copy"]
        print(f"    {racer}: reads at {share:.0%} of the speed of a copy")
    row["step_bytes"] = step_bytes
    return [row]


# --------------------------------------------------------------------------------------------------
# The command

PARTS = dict(
    kernels=measure_kernels,
    sampling=measure_sampling,
    training=measure_training,
    decoding=measure_decoding,
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
    args.nanogpt = load_nanogpt(args.nanogpt) if args.nanogpt else None
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
        print(f"\n{part}", flush=True)
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
