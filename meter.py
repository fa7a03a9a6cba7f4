"""meter.py: what a run costs: FLOPs, seconds and, where the machine tells, joules. And for bench.py
the most that this machine can do, and what a step spends its seconds on.

FLOPs are counted from shapes, where the matrices are multiplied: a multiplication and an addition
for each weight and token, two products for each pair of a query and a key. Norms, rotations and
softmax are left out, as usual, and so is what is computed twice to save memory: these are the FLOPs
that the mathematics asks for ("model FLOPs": Chowdhery et al., arXiv 2204.02311, appendix B). The
half of attention that the causal mask hides counts. A backward pass is two forward passes.
"""

import ctypes
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from torch.profiler import profile, record_function

POWERCAP = Path("/sys/class/powercap")  # Linux: what the processors of this machine have used
NVML = "libnvidia-ml.so.1"  # and its GPUs


class Counter:
    """FLOPs of this process so far, and the cost of each problem that it solved last."""

    flops = 0
    solved = None


counter = Counter()


@torch.compiler.disable  # a compiler would take the number for a constant
def spend(flops):
    """Count those of a forward pass, and of the backward pass that follows if gradients are on."""
    counter.flops += flops * (3 if torch.is_grad_enabled() else 1)


def processors():
    """Joules that the processors have used since some moment, and the joules at which each of their
    counters begins anew -> [(joules, range)], none where the machine does not tell.
    """
    read = []
    for domain in sorted(POWERCAP.glob("intel-rapl:?")):
        try:
            used, most = (
                int((domain / name).read_text()) / 1e6
                for name in ("energy_uj", "max_energy_range_uj")
            )
        except (OSError, ValueError):  # for the superuser's eyes only, on most machines
            continue
        read.append((used, most))
    return read


def gpus():
    """Joules that each GPU has used since its driver was loaded -> [(joules, range)]."""
    if not torch.cuda.is_available():
        return []
    try:
        nvml = ctypes.CDLL(NVML)
        nvml.nvmlInit_v2()
    except (OSError, AttributeError):
        return []
    read = []
    for i in range(torch.cuda.device_count()):
        handle, used = ctypes.c_void_p(), ctypes.c_ulonglong()
        nvml.nvmlDeviceGetHandleByIndex_v2(i, ctypes.byref(handle))
        if nvml.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(used)) == 0:
            read.append((used.value / 1000, float("inf")))
    return read


def in_words(flops, seconds, joules):
    """A cost, without what is not counted or not known."""
    words = f"{flops:.2g} FLOPs, " if flops else ""
    words += f"{seconds:,.0f} s" if seconds >= 10 else f"{seconds:.2g} s"
    return words if joules is None else f"{words}, {joules:,.4g} J"


class Meter:
    """What has been spent since it was made."""

    def __init__(self):
        self.flops = counter.flops
        self.started = time.time()
        self.energy = processors() + gpus()

    def read(self):
        """-> {"flops", "seconds", "joules"}; joules of all that this machine did, None where it
        does not tell.
        """
        joules = 0
        for (before, most), (now, _) in zip(self.energy, processors() + gpus(), strict=False):
            joules += now - before + (most if now < before else 0)
        return dict(
            flops=counter.flops - self.flops,
            seconds=time.time() - self.started,
            joules=joules if self.energy else None,
        )

    def solved(self, n):
        """n held-out problems (a number or a tensor) have been solved since it was made -> what one
        of them cost, those that failed paid for, as a row's entry; None where n is 0. The last line
        of a run says it, too.
        """
        each = {name: x and x / float(n) for name, x in self.read().items()} if n else None
        counter.solved = each
        return dict(flops_per_solved=each and each["flops"])

    def total(self):
        """read(), and the cost of a held-out problem solved, as last measured (None: never)."""
        return dict(**self.read(), per_solved=counter.solved)

    def __str__(self):
        """total() in words."""
        words = in_words(**self.read())
        if counter.solved:
            words += f"; of a held-out problem solved at the end: {in_words(**counter.solved)}"
        return words


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
