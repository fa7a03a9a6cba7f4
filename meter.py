"""meter.py: what a run costs: FLOPs, seconds and, where the machine tells, joules.

FLOPs are counted from shapes, where the matrices are multiplied: a multiplication and an addition
for each weight and token, two products for each pair of a query and a key. Norms, rotations and
softmax are left out, as usual, and so is what is computed twice to save memory: these are the FLOPs
that the mathematics asks for ("model FLOPs": Chowdhery et al., arXiv 2204.02311, appendix B). The
half of attention that the causal mask hides counts. A backward pass is two forward passes.
"""

import ctypes
import time
from pathlib import Path

import torch

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
        """-> {"flops", "seconds", "joules"}; flops None where nothing that counts was multiplied
        (tables, numpy); joules of all that this machine did, None where it does not tell.
        """
        joules = 0
        for (before, most), (now, _) in zip(self.energy, processors() + gpus(), strict=False):
            joules += now - before + (most if now < before else 0)
        return dict(
            flops=(counter.flops - self.flops) or None,
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
