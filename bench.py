"""bench.py"""
import argparse
import importlib
import json
import math
import multiprocessing
import os
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch

from engine import generate
from experiment import UserError, whole
from kernels import attention, can_compile, no_triton, token_logprobs
from model import GPT, GPTConfig

PEERS = {"liger": ("liger_kernel", "token_logprobs"), "cce": ("cut_cross_entropy", "token_logprobs"), "flash": ("flash_attn", "attention")}
MARKERS = dict(reference="o", chunked="s", compiled="D", sdpa="^", triton="*", liger="<", cce=">", flash="v")


def problem(work, shape, dtype, device):
    """The leaves, the rest of the arguments, and an upstream gradient for each output. shape (N, C, V) or (B, H, T, D)."""
    torch.manual_seed(0)
    if work == "token_logprobs":
        N, C, V = shape
        leaves = [torch.randn(n, C, dtype=dtype, device=device).mul_(0.5).requires_grad_() for n in (N, V)]
        g = torch.randn(N, device=device)
        return leaves, [torch.randint(V, (N,), device=device)], [g, 0.01 * g]
    *leaves, g = (torch.randn(shape, dtype=dtype, device=device, requires_grad=i < 3) for i in range(4))
    return leaves, [], [g]


def run(work, impl, args):
    """The outputs of an impl or a peer, a tuple. Liger gives the sum of -logp only, CCE no entropy."""
    if impl == "liger":
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
        return LigerFusedLinearCrossEntropyLoss(reduction="sum")(args[1], args[0], args[2]),
    if impl == "cce":
        from cut_cross_entropy import linear_cross_entropy
        return -linear_cross_entropy(*args, reduction="none"),
    if impl == "flash":
        from flash_attn import flash_attn_func
        return flash_attn_func(*(x.transpose(1, 2) for x in args), causal=True).transpose(1, 2),
    return token_logprobs(*args, impl=impl) if work == "token_logprobs" else (attention(*args, impl=impl),)


def error(work, dtype, impl, device):
    """Largest error of an output or gradient on a small problem, relative to the same in fp64, in norm."""
    leaves, rest, upstream = problem(work, (64, 64, 1000) if work == "token_logprobs" else (1, 2, 128, 64), dtype, device)
    results = []
    for name, x in ((impl, leaves), ("reference", [leaf.detach().double().requires_grad_() for leaf in leaves])):
        outputs = run(work, name, (*x, *rest))
        results.append([*outputs, *torch.autograd.grad(outputs, x, [g.to(o.dtype) for g, o in zip(upstream, outputs)])])
    return max(((a.double() - b).norm() / b.norm()).item() for a, b in zip(*results))


def measure(work, shape, dtype, impl, device, repeats=3):
    """Seconds of a forward and of a backward pass (medians), peak MiB over the inputs, error."""
    cuda = device == "cuda"
    if impl == "compiled":      # compiles in error, in this process: inductor's own memory is not the kernel's
        torch._inductor.config.compile_threads = 1
    err = None if impl in PEERS else error(work, dtype, impl, device)
    leaves, rest, upstream = problem(work, shape, dtype, device)
    if not cuda:
        import resource  # not on Windows
    memory = torch.cuda.max_memory_allocated if cuda else lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def clock():
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def step():
        started = clock()
        outputs = run(work, impl, (*leaves, *rest))
        middle = clock()
        torch.autograd.backward(outputs, [torch.ones_like(o) if impl == "liger" else g for g, o in zip(upstream, outputs)])
        ended = clock()
        for leaf in leaves:
            leaf.grad = None
        return middle - started, ended - middle

    if cuda:
        step()      # Triton tunes and compiles
        torch.cuda.reset_peak_memory_stats()
    start, _, peak = memory(), step(), memory()
    times = [step() for _ in range(repeats)]
    forward, backward = (sorted(t[i] for t in times)[repeats // 2] for i in (0, 1))
    unit = 2 ** 20 if cuda or sys.platform == "darwin" else 2 ** 10     # Linux counts ru_maxrss in KiB, macOS in bytes
    return forward, backward, (peak - start) / unit, err


def roof(device):
    """What this machine can do: {dtype: FLOP/s of the fastest matrix product (where bf16 is emulated, fp32's), None: bytes/s of a copy}."""
    best, n = {}, 8192 if device == "cuda" else 2048
    for dtype in (torch.float32, torch.bfloat16, None):
        a, times = torch.randn(n, n if dtype else 16 * n, dtype=dtype, device=device), []
        b = torch.empty_like(a)
        for _ in range(6):
            started = time.perf_counter()
            (torch.mm(a, a, out=b) if dtype else b.copy_(a)).flatten()[0].item()        # waits for a GPU
            times.append(time.perf_counter() - started)
        best[dtype] = (2 * n ** 3 if dtype else 2 * a.nbytes) / min(times)
    best[torch.bfloat16] = max(best[torch.float32], best[torch.bfloat16])
    return best


def plot_roofline(rows, peak, path):
    """Useful operations per byte that any impl must move, against operations per second: the distance to the line is what an impl wastes."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots(figsize=(7.5, 5), layout="constrained")
    x, labels = torch.logspace(0, 5, 200).tolist(), {}
    for dtype, color in ((torch.float32, "tab:blue"), (torch.bfloat16, "tab:orange")):
        name = str(dtype)[6:]
        labels[f"roof, {name}"], = ax.plot(x, [min(peak[dtype], peak[None] * i) for i in x], color=color)
        for row in (r for r in rows if r["dtype"] == name):
            fill = None if row["work"] == "attention" else "none"
            ax.plot(row["intensity"], row["flops"], MARKERS[row["impl"]], color=color, mfc=fill)
            labels[f"{row['impl']}, {row['work']}"], = ax.plot([], [], MARKERS[row["impl"]], color="k", mfc=fill)      # the legend's: of both colours
    best = max(rows, key=lambda r: r["of_roof"])
    ax.set(xscale="log", yscale="log", xlabel="operations per byte that must be moved (FLOP/byte)", ylabel="achieved (FLOP/s)",
           title=f"Closest to the roof: {best['work']}, {best['impl']}, {best['dtype']}, {best['of_roof']:.0%}")
    ax.legend(labels.values(), labels, fontsize=8)
    with whole(path) as f:
        fig.savefig(f, dpi=110, format="png")


def left_out(impl, dtype, device):
    """Why this machine cannot run this row, or None."""
    if impl == "compiled":
        return None if can_compile(device) else "no C++ compiler found"
    if impl == "triton":
        return no_triton(torch.empty(0, device=device))
    if impl in PEERS:
        found = importlib.util.find_spec(PEERS[impl][0])
        return "needs a GPU" if device != "cuda" else "not installed" if not found else "bf16 only" if dtype == torch.float32 else None


def apart(f, *args):
    """f(*args) in a process of its own, so that its peak memory is its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(f, args)


def main():
    def fail(message):
        raise UserError(message)

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="small shapes, 20 s")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--against", default="", help="peers to add, with commas: " + ", ".join(PEERS))
    parser.add_argument("--out", default="out/kernels", help="folder for benchmark.json and kernels.png, default: %(default)s")
    parser.error = fail
    args = parser.parse_args()
    peers, cuda = [p for p in args.against.split(",") if p], args.device == "cuda"
    if unknown := set(peers) - set(PEERS):
        fail(f"--against: no peer is called {', '.join(sorted(unknown))}")
    if cuda and not torch.cuda.is_available():
        fail("--device cuda: this machine has none")
    make_folder(args.out)
    peak, rows = apart(roof, args.device), []
    print(f"{args.device}, {torch.get_num_threads()} threads, torch {torch.__version__}; matrix products reach "
          + ", ".join(f"{v / 1e9:.0f} GFLOP/s in {str(k)[6:]}" for k, v in peak.items() if k) + f"; a copy moves {peak[None] / 1e9:.0f} GB/s")
    print(f"\n{'':<52} {'seconds':>8} {'forward':>8} {'backward':>8} {'peak MiB':>9} {'of roof':>8} {'error':>7} {'time':>7} {'memory':>7}"
          "  (ratios to reference)")
    heads = (512, 256, 8192) if args.quick else (16384, 4096, 128256) if cuda else (4096, 768, 50257)
    squares = [(1, 4, 256, 64)] if args.quick else [(8, 16, 4096, 64), (8, 16, 4096, 128)] if cuda else [(4, 12, 1024, 64)]
    jobs = [("token_logprobs", heads, ["reference", "chunked", "compiled"])] + [("attention", shape, ["reference", "sdpa"]) for shape in squares]
    for work, shape, impls in jobs:
        impls = impls + ["triton"] * cuda + [p for p in peers if PEERS[p][1] == work]
        for dtype in (torch.float32, torch.bfloat16):
            if work == "token_logprobs":    # useful work: 3 products; h and W move three times: read, read again, and their gradients
                flops, elements = 6 * math.prod(shape), 3 * (shape[0] + shape[2]) * shape[1]
            else:                           # causal: 7 half squares; q, k, v, o move, then the same with do, dq, dk, dv
                flops, elements = 7 * math.prod(shape) * shape[2], 12 * math.prod(shape)
            intensity, first = flops / (elements * dtype.itemsize), None
            for impl in impls:
                name, why_not = f"{work} {'x'.join(map(str, shape))} {str(dtype)[6:]} {impl}", left_out(impl, dtype, args.device)
                try:
                    forward, backward, mib, err = (None,) * 4 if why_not else apart(measure, work, shape, dtype, impl, args.device)
                except torch.OutOfMemoryError:
                    why_not = "out of memory"
                if why_not:
                    print(f"{name}: {why_not}, row left out")
                    continue
                seconds = forward + backward
                row = dict(work=work, shape=shape, dtype=str(dtype)[6:], impl=impl, seconds=seconds, forward_seconds=forward,
                           backward_seconds=backward, peak_mib=mib, error=err, intensity=intensity, flops=flops / seconds,
                           of_roof=flops / seconds / min(peak[dtype], peak[None] * intensity))
                first = first or row
                row |= dict(time_ratio=seconds / first["seconds"], memory_ratio=mib / max(first["peak_mib"], 1e-9))
                rows.append(row)
                print(f"{name:<52} {seconds:>8.3f} {forward:>8.3f} {backward:>8.3f} {mib:>9.0f} {row['of_roof']:>8.0%} "
                      f"{'-' if err is None else format(err, '.0e'):>7} {row['time_ratio']:>6.2f}x {row['memory_ratio']:>6.2f}x", flush=True)
    with whole(os.path.join(args.out, "benchmark.json")) as f:
        f.write(json.dumps(dict(device=args.device, threads=torch.get_num_threads(), torch=torch.__version__, rows=rows), indent=1).encode())
    plot_roofline(rows, peak, os.path.join(args.out, "kernels.png"))


def bench_model(nanogpt, rounds=2):
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


def make_folder(out):
    """The folder for benchmark.json and kernels.png. UserError if it cannot be made, or holds files by these names that no benchmark wrote."""
    ours = False
    try:
        os.makedirs(out, exist_ok=True)
        names = {"benchmark.json", "kernels.png"} & set(os.listdir(out))
        if "benchmark.json" in names:
            with open(os.path.join(out, "benchmark.json")) as f:
                ours = {"device", "threads", "torch", "rows"} == set(json.load(f))
    except OSError as e:
        raise UserError(f"cannot write to {out}: {e.strerror}") from None
    except (ValueError, TypeError):     # no JSON, no object
        pass
    if names and not ours:
        raise UserError(f"{out} holds {min(names)}, which no benchmark wrote: choose another --out")


if __name__ == "__main__":
    main()
