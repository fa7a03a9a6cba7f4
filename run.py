"""run.py: what every script needs and none should say twice: flags, the folder of a run, checkpoints, several processes, claims.

A script is a `Config` whose fields are flags, and a `main` that hands it to a `Run`. The run writes config.json, metrics.jsonl, claims.json
and the figure to --out, saves what a loop needs to go on, and survives an interrupt: `--resume` goes on to the bit on a CPU.
"""
import argparse
import copy
import dataclasses
import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
from dataclasses import field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist


# ---------------------------------------------------------------------------------------------------------------------------
# Flags

class UserError(ValueError):
    """A mistake of the person at the keyboard: `command` prints it as one line and exits with code 2."""


def command(main):
    try:
        main()
    except UserError as e:
        print(f"{Path(sys.argv[0]).name}: error: {e}", file=sys.stderr)
        raise SystemExit(2) from None
    if dist.is_initialized():
        dist.destroy_process_group()


def flag(default, help, quick=None, choices=None, low=None, high=None):
    """A Config field that is a flag: its default, its help line, its value under --quick, the values it may take."""
    return field(default=default, metadata=dict(help=help, quick=quick, choices=choices, low=low, high=high))


def parse_args(Config, doc, argv=None):
    """A Config from the command line. Every field is a flag; --quick sets the fields' quick values, explicit flags win.

    --resume takes the flags of the run in --out; an explicit flag that contradicts them is an error (but more --steps: train on).
    """
    def fail(message):
        raise UserError(message)

    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
                                     argument_default=argparse.SUPPRESS)
    parser.error = fail
    for f in dataclasses.fields(Config):
        name = "--" + f.name.replace("_", "-")
        text = f.metadata["help"] + ("" if f.default in (None, "", False) else f" (default {f.default})")
        if f.type is bool:
            parser.add_argument(name, action=argparse.BooleanOptionalAction, help=text)
        else:
            parser.add_argument(name, type=f.type, choices=f.metadata["choices"], help=text,
                                metavar=None if f.metadata["choices"] else f.type.__name__.upper())
    given = vars(parser.parse_args(argv))
    values = {}
    if given.get("quick"):
        values = {f.name: f.metadata["quick"] for f in dataclasses.fields(Config) if f.metadata["quick"] is not None}
    if given.get("resume"):
        out = given.get("out", Config.out)
        saved = load_checkpoint(Path(out) / "model.pt")
        if not isinstance(saved, dict) or not {"config", "state", "rows", "revision"} <= set(saved):
            fail(f"--resume: {Path(out) / 'model.pt'} is not a run's")
        values = {**saved["config"], "out": out}
        if set(values) != {f.name for f in dataclasses.fields(Config)}:
            fail("--resume: the checkpoint was made by another version of this script")
        for name in set(given) - {"resume", "steps", "out"}:
            if given[name] != values.get(name):
                fail(f"--resume continues a run with {name} = {values.get(name)}, not {given[name]}")
        if given.get("steps", math.inf) < (values["steps"] or 0):
            fail(f"--resume goes on with a run of {values['steps']} steps: {given['steps']} are fewer")
    config = Config(**{**values, **given})
    for f in dataclasses.fields(Config):
        value, low, high = getattr(config, f.name), f.metadata["low"], f.metadata["high"]
        if isinstance(value, float) and not math.isfinite(value):
            fail(f"--{f.name.replace('_', '-')} is {value}: must be finite")
        if value is not None and (low is not None and value < low or high is not None and value > high):
            fail(f"--{f.name.replace('_', '-')} is {value}: must be {'' if low is None else f'at least {low}'}"
                 f"{' and ' if None not in (low, high) else ''}{'' if high is None else f'at most {high}'}")
    return config


def pick_device(name):
    """--device's value -> "cpu", "cuda" or "mps"; auto takes the fastest there is. UserError for one that this machine lacks."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    name = next(d for d in ("cuda", "mps", "cpu") if available[d]) if name == "auto" else name
    if not available[name]:
        raise UserError(f"--device {name}: this machine has none")
    if name == "cuda":      # cuDNN's attention plans anew for each length, and decoding meets a new one at every step
        torch.backends.cuda.enable_cudnn_sdp(False)
    return name


# ---------------------------------------------------------------------------------------------------------------------------
# Several processes: all they ever exchange is sums

def join(device):
    """Under torchrun, meet the other processes, one on each GPU (nccl) or all on the CPU (gloo). Only rank 0 prints."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    if not {"RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} <= set(os.environ):
        raise UserError("WORLD_SIZE is set, but not by torchrun: start several processes with torchrun")
    local = int(os.environ["LOCAL_RANK"])
    if device == "mps" or device == "cuda" and local >= torch.cuda.device_count():
        raise UserError(f"process {local + 1} of this machine finds no {device} device of its own; --device cpu takes any number")
    if device == "cuda":
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    if world()[0]:
        sys.stdout = open(os.devnull, "w")


def world():
    """This process's rank, and how many there are: (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def share(n):
    """This process's slice of n things."""
    rank, processes = world()
    return slice(n * rank // processes, n * (rank + 1) // processes)


def all_sum(x):
    """The sum of a tensor over the processes, in each of them: the same bits. UserError if one of them is no longer there."""
    if not dist.is_initialized():
        return x
    total = x.to("cuda" if dist.get_backend() == "nccl" else "cpu", copy=True)
    try:
        dist.all_reduce(total)
    except torch.OutOfMemoryError:      # a RuntimeError too
        raise
    except RuntimeError as e:
        raise UserError(f"rank {world()[0]} lost another process of this run ({type(e).__name__})") from None
    return total.to(x.device)


def gathered(part, rows, n):
    """A tensor of n rows, of which this process holds those at `rows` (a slice or an index) -> all of it."""
    whole = part.new_zeros(n, *part.shape[1:])
    whole[rows] = part
    return all_sum(whole)


def sum_gradients(model):
    """What data parallelism is: every process has the gradient of its own rows, the batch's is their sum, and all take the same step.

    A sum, not a mean, because each loss is divided by the counts of the whole batch (all_sum of rows and tokens): a mean of means would give
    a token of the process that has fewer of them more weight. DistributedDataParallel hides this, and overlaps it with the backward pass.
    """
    if dist.is_initialized():
        flat = all_sum(torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()]))
        for p, g in zip(model.parameters(), flat.split([p.numel() for p in model.parameters()])):
            p.grad = g.view_as(p)


def same_weights(model):
    """Rank 0's weights in every process: GPUs need not have trained to the same bits."""
    for p in model.parameters():
        if world()[0]:
            p.data.zero_()
        p.data.copy_(all_sum(p.data))
    return model


# ---------------------------------------------------------------------------------------------------------------------------
# Checkpoints and the folder of a run

def save_checkpoint(path, **state):
    """Write a checkpoint whole or not at all: to a temporary name, flushed to disk, then renamed over the old one."""
    path = Path(path)
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as f:
        torch.save(state, f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def load_checkpoint(path):
    """What save_checkpoint wrote, as a dict on the CPU. A file that is missing or damaged is a UserError that names it."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"no checkpoint at {path}") from None
    except Exception as e:
        raise UserError(f"{path} is not a readable checkpoint ({type(e).__name__})") from None


def snapshot(step, model, optimizer, rng, generator=None, **more):
    """All that a loop needs to go on, to the bit."""
    still = lambda tensors: {k: v.detach().to("cpu", copy=True) for k, v in tensors.items()}        # the model trains on, and so do its moments
    if optimizer:
        optimizer = optimizer.state_dict()
        optimizer["state"] = {i: still(moments) for i, moments in optimizer["state"].items()}
    return dict(step=step, model=still(model.state_dict()), optimizer=optimizer, rng=rng.getstate(), generator=generator and generator.get_state(), **more)


def restore(state, model, optimizer, rng, generator=None):
    """Put a snapshot back (None: nothing to do) -> the step to go on with."""
    if state is None:
        return 0
    model.load_state_dict(state["model"])
    rng.setstate(state["rng"])
    if state["optimizer"]:
        optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))        # it takes tensors as they are, and trains on in them
    if state["generator"] is not None:
        generator.set_state(state["generator"])
    return state["step"]


class Run:
    """The folder of one run: config.json, metrics.jsonl, claims.json, and model.pt with the state of each phase of the run.

    `state` maps a phase ("base 0", "dapo 2") to what it needs to go on. `save` writes it all; a loop calls it whenever `due`: every
    30 s (less often if saving takes longer than 1.5 s), and at once after SIGINT or SIGTERM: then save ends the process, with code 130 or 143.
    Of several processes rank 0 writes, saves and heeds signals; the others end when they lose it. UserError for a folder that cannot be
    written or has a config.json that no run wrote, or a checkpoint without its rows.
    """

    def __init__(self, config):
        self.config, self.dir, self.rows, self.state = dataclasses.asdict(config), Path(config.out), [], {}
        self.started = self.saved = time.time()
        self.signal, self.cost = 0, 0       # the signal that came; the seconds that the last save took
        if config.resume:
            checkpoint = load_checkpoint(self.dir / "model.pt")
            self.state, n = checkpoint["state"], checkpoint["rows"]
            try:                                                    # what came after the checkpoint is made again
                self.rows = [json.loads(line) for line in (self.dir / "metrics.jsonl").read_text().splitlines()[:n]]
            except (OSError, ValueError):
                self.rows = []
            if len(self.rows) < n:
                raise UserError(f"{self.dir / 'metrics.jsonl'} does not hold the {n} rows that model.pt goes on from")
        if int(os.environ.get("WORLD_SIZE", 1)) != world()[1]:
            raise UserError("this script, or what its flags ask for, runs in one process")
        if world()[0]:
            all_sum(torch.zeros(1))     # wait for rank 0's folder
            self.metrics, self.write, self.save, self.saved = open(os.devnull, "w"), lambda *_: None, lambda *_, **__: None, math.inf
            for s in (signal.SIGINT, signal.SIGTERM):
                signal.signal(s, signal.SIG_IGN)
            return
        figures = next(f.metadata["choices"] for f in dataclasses.fields(config) if f.name == "figure")
        try:
            if (self.dir / "config.json").exists():
                json.loads((self.dir / "config.json").read_text())["config"]["out"]
            self.dir.mkdir(parents=True, exist_ok=True)
            if not config.resume:       # another run's: nothing of it goes with this one's rows
                for name in ("model.pt", "claims.json", *(f"{figure}.png" for figure in figures)):
                    (self.dir / name).unlink(missing_ok=True)
            self.write("metrics.jsonl", "".join(json.dumps(row) + "\n" for row in self.rows))
            self.metrics = open(self.dir / "metrics.jsonl", "a")
        except OSError as e:
            raise UserError(f"cannot write to {self.dir}: {e.strerror}") from None
        except (ValueError, LookupError, TypeError):
            raise UserError(f"{self.dir / 'config.json'} is not a run's: choose another --out") from None
        try:
            revision = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent).stdout
        except OSError:     # no git here
            revision = ""
        self.revision = revision.strip() or "unknown"
        if config.resume:       # the code that made the rows, not only the last to touch them
            before = checkpoint["revision"]
            self.revision = before if before.endswith(self.revision) else f"{before}, resumed at {self.revision}"
        self.write("config.json", json.dumps({
            "config": self.config, "torch": torch.__version__, "python": platform.python_version(),
            "threads": torch.get_num_threads(), "revision": self.revision}, indent=1))
        all_sum(torch.zeros(1))         # the others wait for it
        for s in (signal.SIGINT, signal.SIGTERM):
            signal.signal(s, self.interrupt)

    def interrupt(self, number, _):
        """Ask the loop to save and end; a second signal does not ask."""
        self.signal = number
        signal.signal(number, signal.SIG_DFL)

    def write(self, name, text):
        """Whole or not at all."""
        (self.dir / (name + ".tmp")).write_text(text)
        os.replace(self.dir / (name + ".tmp"), self.dir / name)

    def log(self, **row):
        """One line of metrics.jsonl."""
        self.rows.append(row)
        self.metrics.write(json.dumps(row) + "\n")
        self.metrics.flush()

    def introduce(self, device, parameters):
        """The first line that a run prints."""
        c = self.config
        print(f"{Path(sys.argv[0]).name}: figure {c['figure']}, seed {c['seed']}, {c['seeds']} seed{'s' * (c['seeds'] > 1)}, {device}, {c['dtype']}, "
              f"{torch.get_num_threads()} threads, {parameters:,} parameters", flush=True)

    def finish(self, fig, claims):
        """The last things that a run does: the figure, the claims, the time it took. After a signal that no loop saw, save."""
        if world()[0] == 0:
            fig.savefig(self.dir / f"{self.config['figure']}.png", dpi=110)
        self.claims(claims)
        print(f"\n{self.dir / self.config['figure']}.png, metrics.jsonl, claims.json, model.pt: {time.time() - self.started:.0f} s")
        if self.signal:
            self.save("finish")

    def log_once(self, measure, **where):
        """Log measure() -> {name: value} as the row `where`, and save if that is due. A resumed run that has the row does not measure again."""
        if not any(where.items() <= row.items() for row in self.rows):
            self.log(**where, **measure())
            if self.due:
                self.save("log_once")

    @property
    def due(self):
        return self.signal or time.time() - self.saved > max(30, 20 * self.cost)

    def save(self, phase, **state):
        """Keep what this phase needs to go on, and write model.pt. After a signal this is the end of the process."""
        self.state[phase], started = state, time.time()
        save_checkpoint(self.dir / "model.pt", state=self.state, rows=len(self.rows), config=self.config, revision=self.revision)
        self.saved, self.cost = time.time(), time.time() - started
        if self.signal:
            print(f"\nsaved {self.dir / 'model.pt'}: --resume goes on from here", flush=True)
            raise SystemExit(128 + self.signal)

    def claims(self, claims):
        """Write claims.json and print it as a table. Each claim holds or does not: both are results."""
        self.write("claims.json", json.dumps(claims, indent=1))
        print(f"\n{'claim':<58} {'paper':>18} {'ours':>16} {'threshold':>10}  holds")
        for c in claims:
            print(f"{c['claim']:<58} {c['paper']!s:>18} {c['ours']!s:>16} {c['threshold']:>10}  {'yes' if c['holds'] else 'NO'}")


def claim(id, text, source, paper, value, op, threshold, seeds, beside=""):
    """One row of claims.json: what was measured, held to its threshold. value: a number, or one of each seed (seeds,), of which the mean is held
    to the threshold and told with the standard deviation. `beside` is printed next to it."""
    value = np.asarray(value, dtype=float)
    mean, spread = value.mean(), f" ± {value.std(ddof=1):.2g}" if value.size > 1 else ""
    holds = mean >= threshold if op == ">=" else mean <= threshold
    return dict(id=id, claim=text, source=source, paper=paper, ours=f"{mean:.3g}{spread}{beside}", threshold=f"{op} {threshold:.3g}", holds=bool(holds), seeds=seeds)


def seeds_of(config):
    return range(config.seed, config.seed + config.seeds)


def series(run, key, **where):
    """A metric by seed -> the steps that every seed has (n,), values (seeds, n)."""
    rows = [r for r in run.rows if r.get(key) is not None and all(r.get(k) == v for k, v in where.items())]
    by_seed = [{r["step"]: r[key] for r in rows if r["seed"] == seed} for seed in sorted({r["seed"] for r in rows})]
    x = sorted(set.intersection(*map(set, by_seed))) if by_seed else []
    return np.array(x), np.array([[d[i] for i in x] for d in by_seed])


def band(ax, x, y, label, **style):
    """The mean of y (seeds, n), with one standard deviation over the seeds shaded."""
    if len(x):
        line, = ax.plot(x, y.mean(0), label=label, **style)
        spread = y.std(0, ddof=1) if len(y) > 1 else 0 * y[0]
        ax.fill_between(x, y.mean(0) - spread, y.mean(0) + spread, color=line.get_color(), alpha=0.15, lw=0)
