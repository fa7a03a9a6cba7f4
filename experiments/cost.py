"""cost.py: what does a token cost with test-time training, and what with full attention, as the
context gets longer?

    python -m experiments.cost          a minute on two cores

The models of ttt.py, untrained, read up to 16,384 random tokens, then write some more, one at a
time. Test-time training keeps a window and the fast weights: its time and its memory should not
depend on the length. Full attention (here in every layer) keeps everything and looks at all of it.

What to see: full attention's time per token rises with the context, and so does what it keeps; the
other two stay where they are.
"""

import ctypes
import dataclasses
import functools
import math
import time
from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
import torch
from tqdm import tqdm

from engine import KVCache
from experiment import (
    Flags,
    Run,
    claim,
    command,
    flag,
    parse_args,
    pick_device,
    seeds_of,
    series,
)
from tasks.maps import V
from ttt import SOURCE, build, score_then_step

FULL = "full attention, every layer"
WRITTEN = 5  # chunks that are written after the context


@dataclass
class Config(Flags):
    seeds: int = flag(3, "rounds", quick=1, low=1)
    chunk: int = flag(64, "tokens between two inner steps", quick=16, low=1, high=2**16)
    window: int = flag(32, "tokens that attention sees", quick=8, low=1, high=2**16)
    eta: float = flag(1.0, "step size of the inner loop", low=0)
    n_layer: int = flag(3, "layers", low=1, high=64)
    n_head: int = flag(4, "heads", low=1)
    n_embd: int = flag(128, "channels", quick=32, low=8, high=4096)
    n_fast: int = flag(256, "width of the fast MLP", quick=32, low=1, high=4096)
    context: int = flag(16384, "the longest context in tokens", quick=256, low=128, high=2**20)


class Reader:
    """Reads on and on at a constant cost, wherever the text ends.

    Its state is a cache of the window, the fast weights and the unfinished chunk. The token that
    ends a chunk is the first one of the next: a step is taken when it comes in. A cache of full
    attention grows to `capacity`.
    """

    def __init__(self, model, rows, eta, chunk, capacity=0):
        self.model, self.eta, self.chunk = model, eta, chunk
        self.fast = model.fast(rows)
        weight = model.lm_head.weight
        window = model.config.window
        capacity = 2 * (window + chunk) if window else capacity
        self.cache = KVCache(model.config, rows, capacity, weight.device, weight.dtype)
        # the unfinished chunk: its states (B, c, C) and its tokens (B, c)
        self.x = weight.new_empty(rows, 0, weight.shape[1])
        self.ids = torch.empty(rows, 0, dtype=torch.long, device=weight.device)

    @torch.no_grad()
    def feed(self, ids):
        """ids (B, t), any t -> the logits of the token after each, (B, t, V)."""
        out = []
        while ids.shape[1]:
            if self.x.shape[1] == self.chunk:  # and now the last target is here, too
                self.step(ids[:, :1])
            part = ids[:, : self.chunk - self.x.shape[1]]
            ids = ids[:, part.shape[1] :]
            x = self.model.hidden(part, self.cache)
            self.x = torch.cat((self.x, x), 1)
            self.ids = torch.cat((self.ids, part), 1)
            out.append(self.model.logits(x, self.fast))
        return torch.cat(out, 1)

    def step(self, first):
        """Step on the finished chunk; `first` (B, 1) is the token that follows it."""
        if self.eta:
            y = torch.cat((self.ids[:, 1:], first), 1)
            _, *self.fast = score_then_step(self.model, self.x, y, self.fast, self.eta)
        self.x = self.x[:, :0]
        self.ids = self.ids[:, :0]


def clock(device):
    """Seconds so far: on a CPU those that this process had it for, as others may be at work."""
    return time.process_time() if device == "cpu" else time.perf_counter()


class Counts(ctypes.Structure):
    """What glibc's mallinfo2 returns."""

    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]


def allocated(device):
    """Bytes in use, as the allocator counts them: torch's on a GPU, glibc's on a CPU.

    None where neither can be asked.
    """
    if device == "cuda":
        return torch.cuda.memory_allocated()
    if device == "mps":
        return torch.mps.current_allocated_memory()
    try:
        ask = ctypes.CDLL(None).mallinfo2
    except (AttributeError, OSError, TypeError):
        return None
    ask.restype = Counts
    counts = ask()
    return counts.uordblks + counts.hblkhd


def decode(model, context, eta, config, device, seed):
    """Read `context` random tokens, then write some chunks one token at a time.

    -> microseconds per token of each, and the bytes that the reader kept in between, as the
    allocator has it: those that are free when the reader is gone. Every chunk has one inner step in
    it. The first one written warms up, of the others the median counts.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(V, (1, context + WRITTEN * config.chunk), generator=generator).to(device)
    reader = Reader(model, 1, eta, config.chunk, ids.shape[1])
    pieces = [ids[:, :context].split(config.chunk, 1)]
    pieces += [part.split(1, 1) for part in ids[:, context:].split(config.chunk, 1)]
    seconds = []
    for parts in pieces:
        started = clock(device)
        for part in parts:
            logits = reader.feed(part)
        logits.sum().item()  # waits for a GPU
        seconds.append(clock(device) - started)
    del logits
    kept = allocated(device)
    del reader
    if kept is not None:
        kept -= allocated(device)
    return {
        "read_us_per_token": 1e6 * seconds[0] / context,
        "us_per_token": 1e6 * np.median(seconds[2:]).item() / config.chunk,
        "bytes": kept,
    }


def contexts(config):
    return [config.context // k for k in (16, 8, 4, 2, 1)]


def arms(config):
    """Name -> (model, eta)."""
    unlimited = dataclasses.replace(config, window=None)
    return {
        "TTT": (build(config, V), config.eta),
        "sliding window": (build(config, V), 0),
        FULL: (build(unlimited, V), 0),
    }


def measure(config, run, device, models):
    for model, eta in models.values():
        decode(model.to(device), contexts(config)[0], eta, config, device, 0)  # the first of all
    for seed in tqdm(seeds_of(config), "round"):
        for context in contexts(config):
            for arm, (model, eta) in models.items():
                run.log_once(
                    functools.partial(decode, model, context, eta, config, device, seed),
                    phase="cost",
                    arm=arm,
                    seed=seed,
                    step=context,
                )


# --------------------------------------------------------------------------------------------------
# The figure


def costs(run, arm, key):
    """(rounds, contexts); empty where no allocator could be asked."""
    return series(run, key, phase="cost", arm=arm)[1]


def growth(run, arm, key):
    """The longest context's cost over the shortest's (rounds,)."""
    y = costs(run, arm, key)
    return y[:, -1] / y[:, 0] if y.size else math.nan


def draw(ax, config, run, key, unit):
    """Each arm's cost against the length of the context: median and range of the rounds."""
    lengths = contexts(config)
    for arm, style in zip(("TTT", "sliding window", FULL), ("o-", "s--", "o-"), strict=True):
        y = costs(run, arm, key) / unit
        if not y.size:
            continue
        median = np.median(y, 0)
        slope = 1000 * unit * np.polyfit(lengths, median, 1)[0]
        label = arm
        if key == "us_per_token":
            label += f": {slope:+.0f} µs per 1,000 tokens"
        (line,) = ax.plot(lengths, median, style, label=label)
        ax.fill_between(lengths, y.min(0), y.max(0), color=line.get_color(), alpha=0.15, lw=0)
        ax.legend()
    ax.set(xlabel="length of the context (tokens)", xscale="log")
    ax.set_xticks(lengths, lengths)
    ax.minorticks_off()


def figure(config, run):
    first, *_, last = contexts(config)
    n = config.seeds
    time_ttt, time_full = (growth(run, arm, "us_per_token") for arm in ("TTT", FULL))
    memory = growth(run, "TTT", "bytes")
    fig, axes = plt.subplots(1, 3, figsize=(16, 5), layout="constrained")
    fig.suptitle(
        f"From {first:,} to {last:,} tokens of context: a token takes "
        f"{np.median(time_ttt):.2f} times the time with test-time training, "
        f"{np.median(time_full):.1f} times with full attention"
    )
    draw(axes[0], config, run, "us_per_token", 1000)
    axes[0].set(title=f"Writing the next token (median and range of {n} rounds)")
    draw(axes[1], config, run, "read_us_per_token", 1000)
    axes[1].set(title=f"Reading, {config.chunk} tokens at a time")
    for ax in axes[:2]:
        ax.set(ylabel="time per token (ms; on a CPU its time)", ylim=(0, None))
    draw(axes[2], config, run, "bytes", 2**20)
    measured = costs(run, "TTT", "bytes").size > 0
    what = "What is kept between two tokens" if measured else "No allocator that could be asked"
    axes[2].set(title=what, ylabel="allocated, beside the weights (MiB)", yscale="log")
    name = f"{last:,} over {first:,} tokens of context"
    return fig, [
        claim(
            "time",
            f"TTT, time per token: {name}",
            SOURCE,
            "constant",
            time_ttt,
            "<=",
            1.15,
            n,
        ),
        claim(
            "memory",
            f"TTT, memory (allocated): {name}",
            SOURCE,
            "constant",
            memory,
            "<=",
            1.15,
            n,
        ),
        claim(
            "full time",
            f"full attention, time per token: {name}",
            SOURCE,
            "grows",
            time_full,
            ">=",
            1.5,
            n,
        ),
    ]


def main():
    config = parse_args(Config, __doc__)
    device = pick_device(config.device)
    models = arms(config)  # an impossible shape ends here
    with Run(config) as run:
        run.introduce(device, sum(p.numel() for p in models["TTT"][0].parameters()))
        measure(config, run, device, models)
        run.save()
        run.finish(*figure(config, run))


if __name__ == "__main__":
    command(main)
