"""roof.py: for bench.py: the most that this machine can do, what sampling cannot do without, and
what a step spends its time on.
"""

import time
from contextlib import ExitStack
from functools import partial
from unittest.mock import patch

import torch
from torch.profiler import profile, record_function

# --------------------------------------------------------------------------------------------------
# What this machine can do


def clock(device):
    """Seconds, once the device has done all that it was asked for."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def fastest(work, device):
    """Seconds of the fastest of six."""
    seconds = []
    for _ in range(6):
        started = clock(device)
        work()
        seconds.append(clock(device) - started)
    return min(seconds)


def roof(device):
    """What this machine can do: FLOP/s of a matrix product in each dtype; bytes/s of a copy.

    Bytes are read and written. Where bf16 is emulated its roof is fp32's, which does as well.
    """
    n = 8192 if device == "cuda" else 2048
    best = {}
    for name in ("float32", "bfloat16"):
        a = torch.randn(n, n, dtype=getattr(torch, name), device=device)
        best[name] = 2 * n**3 / fastest(partial(torch.mm, a, a, out=a.clone()), device)
    best["bfloat16"] = max(best.values())
    a = torch.randn(n, 16 * n, device=device)
    best["copy"] = 2 * a.nbytes / fastest(partial(a.clone().copy_, a), device)
    return best


# --------------------------------------------------------------------------------------------------
# What sampling cannot do without


def generating(config, itemsize, lens, lengths):
    """Tokens, FLOPs and bytes of writing so many tokens in each row (lengths) behind prompts of so
    many (lens), prompt-major; a weight, a key, a value is of itemsize bytes.

    A prompt is read once for all its samples. A row's last token is drawn, and not read again. A
    step reads all weights once, and the keys and values of each row.
    """
    n = len(lengths) // len(lens)
    head = 2 * config.n_embd * config.vocab_size
    flops = sum(config.flops(1, P, P) + head for P in lens)
    seen = 0  # positions, by all tokens together
    for i, L in enumerate(lengths):
        looks = lens[i // n] + L / 2  # P + 1 to P + L - 1, on average
        flops += config.flops(1, L - 1, looks) + (L - 1) * head
        seen += (L - 1) * looks
    each = 2 * config.n_layer * config.n_kv_head * config.head_dim  # key and value of a position
    return sum(lengths), flops, (max(lengths) * config.parameters + seen * each) * itemsize


# --------------------------------------------------------------------------------------------------
# What a step spends its seconds on

# Groups of what torch names itself
TORCHS = {
    "Optimizer.step#AdamW.step": "optimizer",
    "aten::linear": "matrix products",
    "aten::matmul": "matrix products",
    "aten::mm": "matrix products",
    "aten::addmm": "matrix products",
    "mkldnn::_linear_pointwise": "matrix products",
    "mkldnn::_reorder_linear_weight": "matrix products",  # once for many
}


def profiled(work, ranges, device):
    """Milliseconds of work(), and the share of them that each group takes. ranges: group -> object
    and name of the function whose calls are that group's.

    The profiler slows small operations down: the milliseconds are without it, the shares with it.
    On a GPU the kernels count, and the rest is mostly waiting for Python to launch one.
    """

    def seconds():
        started = clock(device)
        work()
        return clock(device) - started

    seconds()  # warms up
    alone = seconds()
    with ExitStack() as stack:
        for group, (owner, name) in ranges.items():
            named = record_function(group)(getattr(owner, name))
            stack.enter_context(patch.object(owner, name, named))
        profiler = stack.enter_context(profile())
        watched = seconds()
    groups = ["matrix products", *ranges]
    return 1000 * alone, shares(profiler.events(), groups, watched, device)


def shares(events, groups, seconds, device):
    """group -> its share of the seconds, by the profiler's events. An event belongs to the
    outermost group around it, one of a backward pass to that of its forward event; what no event of
    a group explains is the rest.
    """
    spent = dict.fromkeys(groups, 0.0)
    forward = {}  # the groups of forward events, by the number that their backward event has too
    for event in events:
        if event.device_type != torch.autograd.DeviceType.CPU:
            continue  # a kernel: its time is also that of the operation which launched it
        found = None
        around = event
        while around is not None:
            name = TORCHS.get(around.name, around.name)
            if around.name.startswith("autograd::"):
                name = forward.get(around.sequence_nr)
            found = name if name in spent else found
            around = around.cpu_parent
        if event.sequence_nr >= 0 and not event.name.startswith("autograd::"):
            forward[event.sequence_nr] = found
        if found:
            on_cpu = device == "cpu"
            time_of = event.self_cpu_time_total if on_cpu else event.self_device_time_total
            spent[found] += time_of / 1e6 / seconds  # from microseconds
    return spent | {"the rest, Python": 1 - sum(spent.values())}
