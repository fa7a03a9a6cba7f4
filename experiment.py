"""experiment.py: what every script needs and none should say twice: flags, the folder of a run,
checkpoints, several processes, claims.

A script is a `Config` whose fields are flags, and a `main` that hands it to a `Run`. The run writes
config.json, metrics.jsonl, claims.json and the figure to --out, saves what a loop needs to go on,
and survives an interrupt: `--resume` goes on to the bit on a CPU.
"""

import argparse
import contextlib
import copy
import dataclasses
import hashlib
import json
import math
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

matplotlib.use("Agg")  # figures are files: no display is needed


# --------------------------------------------------------------------------------------------------
# Flags


class UserError(ValueError):
    """A mistake of the person at the keyboard: `command` prints it as one line and exits with code
    2.
    """


class NotFinite(UserError):
    """A loss, a gradient norm, a weight or a logit that is no number: the run ends before it can
    spoil what is saved.
    """


class LostProcess(UserError):
    """What one process knows and rank 0 may not: printed by whichever rank it happens to."""


def command(main):
    """Run a script's main. A UserError is one line on stderr and exit code 2, said by rank 0 only;
    SIGINT and SIGTERM exit with 130 and 143, a closed pipe with 141.

    Nothing that a terminal or a pipe can't take keeps a run from writing its results: characters
    that it lacks are replaced.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, leave)
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:
        # the interpreter flushes stdout once more when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        raise SystemExit(128 + signal.SIGPIPE) from None
    except (UserError, MemoryError, RuntimeError) as e:
        if not isinstance(e, UserError) and not out_of_memory(e):
            raise
        if int(os.environ.get("RANK", 0)) == 0 or isinstance(e, LostProcess):
            text = (
                str(e)
                if isinstance(e, UserError)
                else f"out of memory ({str(e).splitlines()[0] if str(e) else 'no more to be had'})"
            )
            print(f"{Path(sys.argv[0]).name}: error: {' '.join(text.split())}", file=sys.stderr)
        else:
            time.sleep(10)  # torchrun ends all when the first one goes: rank 0 speaks before
        raise SystemExit(2) from None
    if dist.is_initialized():
        dist.destroy_process_group()


def leave(number, _):
    """The handler of SIGINT and SIGTERM: end at once, wherever the program is."""
    raise SystemExit(128 + number)


def out_of_memory(e):
    return isinstance(e, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(e)


def flag(default, help, quick=None, choices=None, low=None, high=None):
    """A Config field that is a flag: its default, its help line, its value under --quick, the
    values it may take.
    """
    return field(
        default=default, metadata=dict(help=help, quick=quick, choices=choices, low=low, high=high)
    )


@dataclass
class Flags:
    """What every script takes. A script's Config adds its own, and may give these other defaults."""

    seed: int = flag(0, "random seed; with --seeds K: the first of K", low=0, high=2**32 - 1)
    seeds: int = flag(1, "repeat over this many seeds", quick=1, low=1)
    device: str = flag("auto", "where to run", choices=("auto", "cpu", "cuda", "mps"))
    out: str = flag(
        "",
        "folder for figure, samples, metrics, claims and checkpoint (default out/ and the script's name)",
    )
    resume: bool = flag(False, "go on from the checkpoint in --out")
    quick: bool = flag(False, "a run of a few seconds that shows nothing but that it runs")

    @property
    def name(self):
        """A run is named for the file that its Config stands in."""
        return Path(sys.modules[type(self).__module__].__file__).stem


def parse_args(Config, doc, argv=None):
    """A Config from the command line. Every field is a flag; --quick sets the fields' quick values,
    explicit flags win.

    --resume takes the flags of the run in --out; an explicit flag that contradicts them is an error
    (but more --steps: train on). A Config may have a method `idle() -> {field: why}`: the flags
    that do nothing beside the others. To give one of them is an error, too.
    """

    def fail(message):
        raise UserError(message)

    parser = argparse.ArgumentParser(
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.error = fail
    for f in dataclasses.fields(Config):
        name = "--" + f.name.replace("_", "-")
        text = f.metadata["help"] + (
            "" if f.default in (None, "", False) else f" (default {f.default})"
        )
        if f.type is bool:
            parser.add_argument(name, action=argparse.BooleanOptionalAction, help=text)
        else:
            parser.add_argument(
                name,
                type=f.type,
                choices=f.metadata["choices"],
                help=text,
                metavar=None if f.metadata["choices"] else f.type.__name__.upper(),
            )
    given = vars(parser.parse_args(argv))
    values = {}
    if given.get("quick"):
        values = {
            f.name: f.metadata["quick"]
            for f in dataclasses.fields(Config)
            if f.metadata["quick"] is not None
        }
    if given.get("resume"):
        out = given.get("out") or f"out/{Config().name}"
        saved = load_checkpoint(Path(out) / "model.pt")
        if not isinstance(saved, dict) or not {"config", "state", "rows", "revision"} <= set(saved):
            fail(f"--resume: {Path(out) / 'model.pt'} is not a run's")
        values = {**saved["config"], "out": out}
        if set(values) != {f.name for f in dataclasses.fields(Config)}:
            fail("--resume: the checkpoint was made by another version of this script")
        for name in set(given) - {"resume", "steps", "out"}:
            if given[name] != values.get(name):
                fail(
                    f"--resume continues a run with {name} = {values.get(name)}, not {given[name]}"
                )
        if given.get("steps", math.inf) < (values["steps"] or 0):
            fail(
                f"--resume goes on with a run of {values['steps']} steps: {given['steps']} are fewer"
            )
    config = Config(**{**values, **given})
    config.out = config.out or f"out/{config.name}"
    for f in dataclasses.fields(Config):
        value, low, high = getattr(config, f.name), f.metadata["low"], f.metadata["high"]
        if isinstance(value, float) and not math.isfinite(value):
            fail(f"--{f.name.replace('_', '-')} is {value}: must be finite")
        if value is not None and (
            low is not None and value < low or high is not None and value > high
        ):
            fail(
                f"--{f.name.replace('_', '-')} is {value}: must be {'' if low is None else f'at least {low}'}"
                f"{' and ' if None not in (low, high) else ''}{'' if high is None else f'at most {high}'}"
            )
        if type(value) in (int, float) and abs(value) > LARGEST[type(value)]:
            fail(f"--{f.name.replace('_', '-')} is {value}: must be at most {LARGEST[type(value)]}")
    for name, why in (config.idle() if hasattr(config, "idle") else {}).items():
        if name in given:
            fail(f"--{name.replace('_', '-')} does nothing here: {why}")
    return config


# a seed's range; what squares of fp32 numbers that are used with a flag can nearly hold
LARGEST = {int: 2**32 - 1, float: 1e30}


def need_memory(size, what, device="cpu"):
    """UserError if `size` bytes are more than the machine (or its GPU) has: said before anything is
    allocated.
    """
    has = (
        torch.cuda.mem_get_info()[1]
        if device == "cuda"
        else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    )
    if size > has:
        raise UserError(
            f"{what}: {size / 2**30:,.1f} GiB, of which this {'GPU' if device == 'cuda' else 'machine'} has {has / 2**30:,.1f}"
        )


def pick_device(name):
    """--device's value -> "cpu", "cuda" or "mps"; auto takes the fastest there is. UserError for
    one that this machine lacks.
    """
    available = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    name = next(d for d in ("cuda", "mps", "cpu") if available[d]) if name == "auto" else name
    if not available[name]:
        raise UserError(f"--device {name}: this machine has none")
    # cuDNN's attention plans anew for each length, and decoding meets a new one at every step
    if name == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)
    return name


# --------------------------------------------------------------------------------------------------
# Several processes: all they ever exchange is sums


def join(device):
    """Under torchrun, meet the other processes, one on each GPU (nccl) or all on the CPU (gloo).
    Only rank 0 prints.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    if not {"RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} <= set(os.environ):
        raise UserError(
            "WORLD_SIZE is set, but not by torchrun: start several processes with torchrun"
        )
    local = int(os.environ["LOCAL_RANK"])
    if device == "mps" or device == "cuda" and local >= torch.cuda.device_count():
        raise LostProcess(
            f"process {local + 1} of this machine finds no {device} device of its own; --device cpu takes any number"
        )
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
    """The sum of a tensor over the processes, in each of them: the same bits. UserError if one of
    them is no longer there.
    """
    if not dist.is_initialized():
        return x
    total = x.to("cuda" if dist.get_backend() == "nccl" else "cpu", copy=True)
    try:
        dist.all_reduce(total)
    except torch.OutOfMemoryError:  # a RuntimeError too
        raise
    except RuntimeError as e:
        raise LostProcess(
            f"rank {world()[0]} lost another process of this run ({type(e).__name__})"
        ) from None
    return total.to(x.device)


def gathered(part, rows, n):
    """A tensor of n rows, of which this process holds those at `rows` (a slice or an index) -> all
    of it.
    """
    whole = part.new_zeros(n, *part.shape[1:])
    whole[rows] = part
    return all_sum(whole)


def sum_gradients(model):
    """What data parallelism is: every process has the gradient of its own rows, the batch's is
    their sum, and all take the same step.

    A sum, not a mean, because each loss is divided by the counts of the whole batch (all_sum of
    rows and tokens): a mean of means would give a token of the process that has fewer of them more
    weight. DistributedDataParallel hides this, and overlaps it with the backward pass.
    """
    if dist.is_initialized():
        flat = all_sum(
            torch.cat(
                [
                    (torch.zeros_like(p) if p.grad is None else p.grad).flatten()
                    for p in model.parameters()
                ]
            )
        )
        for p, g in zip(model.parameters(), flat.split([p.numel() for p in model.parameters()])):
            p.grad = g.view_as(p)


def same_weights(model):
    """Rank 0's weights in every process: GPUs need not have trained to the same bits."""
    for p in model.parameters():
        if world()[0]:
            p.data.zero_()
        p.data.copy_(all_sum(p.data))
    return model


# --------------------------------------------------------------------------------------------------
# Checkpoints and the folder of a run


@contextlib.contextmanager
def whole(path):
    """A binary file that is written whole or not at all: under a name of its own, flushed to disk,
    then renamed over `path`.

    UserError if it can't be written (no right, no room): then nothing new is left, and an older
    file is as it was.
    """
    path = Path(path)
    try:
        handle, temporary = tempfile.mkstemp(".tmp", f".{path.name}.", path.parent)
        try:
            with open(handle, "wb") as f:
                os.fchmod(handle, 0o644)
                yield f
                f.flush()
                os.fsync(handle)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror}") from None


def save_checkpoint(path, **state):
    """Write a checkpoint whole or not at all."""
    with whole(path) as f:
        try:
            torch.save(state, f)
        except RuntimeError as e:  # what torch's writer makes of a full disk
            raise UserError(f"cannot write {path}: {str(e).splitlines()[0]}") from None


def load_checkpoint(path):
    """What save_checkpoint wrote, as a dict on the CPU. A file that is missing or damaged is a
    UserError that names it.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"no checkpoint at {path}") from None
    except Exception as e:
        raise UserError(f"{path} is not a readable checkpoint ({type(e).__name__})") from None


def fingerprint(path):
    """A hash of a file, or of all files of a folder, that a run depends on; of a name that is
    neither, the name. Resume compares it.
    """
    path, digest = Path(path), hashlib.sha256()
    files = (
        sorted(p for p in path.rglob("*") if p.is_file())
        if path.is_dir()
        else [path]
        if path.is_file()
        else []
    )
    try:
        for file in files:
            digest.update(str(file.relative_to(path)).encode())
            with open(file, "rb") as f:
                while block := f.read(2**24):
                    digest.update(block)
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from None
    return digest.hexdigest() if files else str(path)


def descend(optimizer, loss, clip=1.0):
    """The end of every training step: cut the gradient to norm `clip`, take the optimizer's step ->
    the norm before the cut.

    loss: the step's, a number. NotFinite, and no step, if it or the norm is none: the weights are
    then as they were.
    """
    loss = loss.item() if isinstance(loss, torch.Tensor) else loss
    norm = torch.nn.utils.clip_grad_norm_(
        [p for group in optimizer.param_groups for p in group["params"]], clip
    ).item()
    for name, value in (("loss", loss), ("gradient norm", norm)):
        if not math.isfinite(value):
            raise NotFinite(f"the {name} is {value}")
    optimizer.step()
    return norm


def snapshot(step, model, optimizer, rng, generator=None, **more):
    """All that a loop needs to go on, to the bit. NotFinite if a weight is no number: such a state
    is never saved.
    """
    if not all(torch.isfinite(p).all() for p in model.state_dict().values()):
        raise NotFinite("a weight is no longer finite")
    # the model trains on, and so do its moments
    still = lambda tensors: {k: v.detach().to("cpu", copy=True) for k, v in tensors.items()}
    if optimizer:
        optimizer = optimizer.state_dict()
        optimizer["state"] = {i: still(moments) for i, moments in optimizer["state"].items()}
    return dict(
        step=step,
        model=still(model.state_dict()),
        optimizer=optimizer,
        rng=rng.getstate(),
        generator=generator and generator.get_state(),
        **more,
    )


def restore(state, model, optimizer, rng, generator=None):
    """Put a snapshot back (None: nothing to do) -> the step to go on with."""
    if state is None:
        return 0
    model.load_state_dict(state["model"])
    rng.setstate(state["rng"])
    if state["optimizer"]:
        # it takes tensors as they are, and trains on in them
        optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
    if state["generator"] is not None:
        generator.set_state(state["generator"])
    return state["step"]


class Run:
    """The folder of one run: config.json, metrics.jsonl, claims.json, the figure, and model.pt with
    the state of each phase of the run.

        with Run(config) as run:
            for step in run.loop("base 0", config.steps, model, optimizer, rng): ...

    `state` maps a phase ("base 0", "dapo 2") to what it needs to go on. `loop` keeps it after every
    step, in memory, and writes it when that is `due`: every 30 s (less often if writing takes
    longer than 1.5 s). SIGINT and SIGTERM end the run at once, wherever it is, during an evaluation
    too; so does a number that is not finite. What was kept last is then written: --resume makes
    anew only what came after it.

    The folder is the run's own if it holds a run's config.json: files that no run wrote are never
    deleted or overwritten. also: names of further files that the script writes. inputs: name ->
    fingerprint of what the run depends on beside its flags; resume refuses others. Of several
    processes rank 0 writes, saves and heeds signals; the others end when they lose it. UserError
    for a folder that cannot be written or holds somebody else's files, or a checkpoint without its
    rows.
    """

    def __init__(self, config, also=(), inputs=None):
        self.config, self.name, self.dir, self.rows, self.state = (
            dataclasses.asdict(config),
            config.name,
            Path(config.out),
            [],
            {},
        )
        self.inputs, self.kept_rows, self.place, self.bar = inputs or {}, 0, "", None
        self.started = self.saved = self.kept = time.time()
        # the signal that came while busy; the seconds that the last save took
        self.signal, self.busy, self.cost, self.keep_cost = 0, False, 0, 0
        if config.resume:
            checkpoint = load_checkpoint(self.dir / "model.pt")
            self.state, n = checkpoint["state"], checkpoint["rows"]
            for name, value in self.inputs.items():
                if checkpoint.get("inputs", {}).get(name) != value:
                    raise UserError(
                        f"--resume: {name} is no longer what the run in {self.dir} began with"
                    )
            # what came after the checkpoint is made again
            try:
                self.rows = [
                    json.loads(line)
                    for line in (self.dir / "metrics.jsonl").read_text().splitlines()[:n]
                ]
            except (OSError, ValueError):
                self.rows = []
            if len(self.rows) < n:
                raise UserError(
                    f"{self.dir / 'metrics.jsonl'} does not hold the {n} rows that model.pt goes on from"
                )
            self.kept_rows = n
        if int(os.environ.get("WORLD_SIZE", 1)) != world()[1]:
            raise UserError("this script, or what its flags ask for, runs in one process")
        self.handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
        if world()[0]:
            try:
                all_sum(torch.zeros(1))  # wait for rank 0's folder
            except LostProcess:
                raise UserError("rank 0 says what is wrong with its folder") from None
            self.metrics, self.write, self.save, self.saved = (
                open(os.devnull, "wb", buffering=0),
                lambda *_: None,
                lambda *_, **__: None,
                math.inf,
            )
            for s in self.handlers:
                signal.signal(s, signal.SIG_IGN)
            return
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
            mine = {*self.files(self.name), *also}
            owned = self.owned()
            if not config.resume:
                foreign = mine - owned - set(also if owned else ())
                for name in sorted(foreign):
                    if os.path.lexists(self.dir / name):
                        raise UserError(
                            f"{self.dir} holds {name}, which no run wrote: choose another --out"
                        )
                # another run's: nothing of it goes with this one's rows
                for name in owned - {"config.json"}:
                    (self.dir / name).unlink(missing_ok=True)
        except OSError as e:
            raise UserError(f"cannot write to {self.dir}: {e.strerror}") from None
        try:
            revision = subprocess.run(
                ["git", "describe", "--always", "--dirty"],
                capture_output=True,
                text=True,
                cwd=Path(__file__).parent,
            ).stdout
        except OSError:  # no git here
            revision = ""
        self.revision = revision.strip() or "unknown"
        if config.resume:  # the code that made the rows, not only the last to touch them
            before = checkpoint["revision"]
            self.revision = (
                before
                if before.endswith(self.revision)
                else f"{before}, resumed at {self.revision}"
            )
        self.write(
            "config.json",
            json.dumps(
                {  # first of all: it says whose folder this is
                    "name": self.name,
                    "config": self.config,
                    "torch": torch.__version__,
                    "python": platform.python_version(),
                    "threads": torch.get_num_threads(),
                    "revision": self.revision,
                },
                indent=1,
            ),
        )
        self.write("metrics.jsonl", "".join(json.dumps(row) + "\n" for row in self.rows))
        self.metrics = open(self.dir / "metrics.jsonl", "ab", buffering=0)
        all_sum(torch.zeros(1))  # the others wait for it
        for s in self.handlers:
            signal.signal(s, self.interrupt)

    def files(self, name):
        """What the run of a script writes."""
        return {
            "config.json",
            "metrics.jsonl",
            "claims.json",
            "samples.txt",
            "model.pt",
            f"{name}.png",
        }

    def owned(self):
        """The names in the folder that the run whose config.json is there has written: none if
        there is no config.json. UserError if it is not a run's.
        """
        try:
            past = json.loads((self.dir / "config.json").read_text())
            return self.files(past["name"]) if past["config"] and past["revision"] else set()
        except FileNotFoundError:
            return set()
        except (ValueError, LookupError, TypeError):
            raise UserError(
                f"{self.dir / 'config.json'} is not a run's: choose another --out"
            ) from None

    def __enter__(self):
        return self

    def __exit__(self, kind, error, _):
        """After a signal, a closed pipe or a number that is not finite: write what was kept last."""
        if self.bar is not None:
            self.bar.close()
        if world()[0] == 0 and isinstance(error, NotFinite):
            self.save()
            error.args = (
                f"{error}{self.place and ' at '}{self.place}; {self.dir / 'model.pt'} holds what was finite",
            )
        if world()[0] == 0 and isinstance(error, (SystemExit, BrokenPipeError)):
            for s in self.handlers:
                signal.signal(s, signal.SIG_DFL)  # a second signal does not wait
            self.save()
            with contextlib.suppress(BrokenPipeError):
                print(f"\nsaved {self.dir / 'model.pt'}: --resume goes on from here", flush=True)
        self.metrics.close()
        for s, handler in self.handlers.items():
            signal.signal(s, handler)

    def interrupt(self, number, _):
        """The handler while the run is on: end at once, or as soon as what must not be cut in two
        is done.
        """
        self.signal = number
        if not self.busy:
            raise SystemExit(128 + number)

    @contextlib.contextmanager
    def uncut(self):
        """What a signal must not cut in two: it is heeded at the end."""
        self.busy = True
        try:
            yield
        finally:
            self.busy = False
        if self.signal:
            raise SystemExit(128 + self.signal)

    def write(self, name, text):
        """Whole or not at all."""
        with whole(self.dir / name) as f:
            f.write(text.encode())

    def log(self, **row):
        """One line of metrics.jsonl, which is strict JSON: NotFinite for a number that is none."""
        for key, value in row.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise NotFinite(f"{key} is {value}")
        line = (json.dumps(row, allow_nan=False) + "\n").encode()
        with self.uncut():
            end = self.metrics.seek(0, os.SEEK_END) if self.metrics.seekable() else 0
            try:
                if self.metrics.write(line) < len(line):
                    raise OSError(28, "No space left on device")
            except OSError as e:
                self.metrics.truncate(end)
                raise UserError(
                    f"cannot write {self.dir / 'metrics.jsonl'}: {e.strerror}"
                ) from None
            self.rows.append(row)

    def introduce(self, device, parameters):
        """The first line that a run prints."""
        seed, seeds = self.config["seed"], self.config["seeds"]
        print(
            f"{self.name}: seed {seed}, {seeds} seed{'s' * (seeds > 1)}, {device}, {torch.get_num_threads()} threads, {parameters:,} parameters",
            flush=True,
        )

    def say(self, **numbers):
        """Put some numbers beside the progress bar."""
        self.bar.set_postfix_str(
            ", ".join(f"{name} {value:.3f}" for name, value in numbers.items())
        )

    def samples(self, prompts, **answers):
        """Print, and write to samples.txt, what each model answers to some prompts. answers:
        model's name -> [(text, reward)], one for each prompt.
        """
        lines = []
        for i, prompt in enumerate(prompts):
            lines.append(prompt)
            for name, written in answers.items():
                text, reward = written[i]
                lines.append(f"    {name:<12} {'right' if reward else 'wrong'}   {text}")
        text = "\n".join(lines) + "\n"
        self.write("samples.txt", text)
        print(f"\nHeld-out problems, and what the models answer:\n{text}")

    def finish(self, fig, claims):
        """The last things that a run does: the figure, the claims, the time it took."""
        if world()[0] == 0:
            with whole(self.dir / f"{self.name}.png") as f:
                fig.savefig(f, dpi=110, format="png")
        self.claims(claims)
        print(
            f"\n{self.dir / self.name}.png, metrics.jsonl, claims.json, model.pt: {time.time() - self.started:.0f} s"
        )

    def log_once(self, measure, **where):
        """Log measure() -> {name: value} as the row `where`, and save if that is due. A resumed run
        that has the row does not measure again.
        """
        if not any(where.items() <= row.items() for row in self.rows):
            self.place = ", ".join(f"{k} {v}" for k, v in where.items())
            self.log(**where, **measure())
            self.keep()
            if self.due:
                self.save()

    def loop(
        self, phase, steps, model, optimizer, rng, generator=None, kept=None, until=None, bar=True
    ):
        """The steps that a phase has still to take: `for step in run.loop(...)`, from 0 or from
        where the run was interrupted, to steps - 1.

        Restores model, optimizer and random streams, keeps them after each step, shows a bar
        (`run.bar`). kept: a dict of whatever else the loop carries from step to step; what was
        saved of it is put into it. until() ends the loop before `steps`. Never `break`: the end
        saves, too.
        """
        state = self.state.get(phase)
        step = restore(state, model, optimizer, rng, generator)
        if kept is not None and state is not None:
            kept.update(copy.deepcopy(state["kept"]))
        self.bar = tqdm(
            desc=phase,
            initial=step,
            total=None if steps >= 10**9 else steps,
            disable=not bar or world()[0] > 0,
        )
        # what was kept must not change with what goes on
        still = lambda: snapshot(step, model, optimizer, rng, generator, kept=copy.deepcopy(kept))
        while step < steps and not (until and until()):
            self.place = f"step {step + 1} of {phase}"
            yield step
            step += 1
            self.bar.update()
            if self.due or time.time() - self.kept > 50 * self.keep_cost:
                started = time.time()
                self.keep(phase, **still())
                self.kept, self.keep_cost = time.time(), time.time() - started
            if self.due:
                self.save()
        self.bar.close()
        self.bar = None
        self.save(phase, **still())

    @property
    def due(self):
        return time.time() - self.saved > max(30, 20 * self.cost)

    def keep(self, phase=None, **state):
        """Remember, in memory, what a phase needs to go on, and that the rows so far go with it.
        Without a phase: the rows alone, outside of loops.
        """
        with self.uncut():
            if phase is not None:
                self.state[phase] = state
            if phase is not None or self.bar is None:
                self.kept_rows = len(self.rows)

    def save(self, phase=None, **state):
        """`keep` if there is a phase, then write what is kept to model.pt."""
        started = time.time()
        if phase is not None:
            self.keep(phase, **state)
        save_checkpoint(
            self.dir / "model.pt",
            state=self.state,
            rows=self.kept_rows,
            config=self.config,
            revision=self.revision,
            inputs=self.inputs,
        )
        self.saved, self.cost = time.time(), time.time() - started

    def claims(self, claims):
        """Write claims.json and print it as a table. Each claim holds or does not: both are
        results.
        """
        self.write("claims.json", json.dumps(claims, indent=1))
        print(f"\n{'claim':<58} {'paper':>18} {'ours':>16} {'threshold':>10}  holds")
        for c in claims:
            print(
                f"{c['claim']:<58} {c['paper']!s:>18} {c['ours']!s:>16} {c['threshold']:>10}  {'yes' if c['holds'] else 'NO'}"
            )


def claim(id, text, source, paper, value, op, threshold, seeds, beside=""):
    """One row of claims.json: what was measured, held to its threshold. value: a number, or one of
    each seed (seeds,), of which the mean is held to the threshold and told with the standard
    deviation; what is not finite never holds. op: >= or <=; > or < where the threshold is 0,
    because there a tie must not hold. `beside` is printed next to it.
    """
    assert op in ((">", "<") if threshold == 0 else (">=", "<=", ">", "<")), (
        f"{id}: {op} {threshold} would hold on a tie"
    )
    value = np.asarray(value, dtype=float)
    with np.errstate(invalid="ignore"):  # the spread of what is not finite is nan
        mean, spread = value.mean(), f" ± {value.std(ddof=1):.2g}" if value.size > 1 else ""
    holds = {
        ">=": mean >= threshold,
        "<=": mean <= threshold,
        ">": mean > threshold,
        "<": mean < threshold,
    }[op] and np.isfinite(value).all()
    return dict(
        id=id,
        claim=text,
        source=source,
        paper=paper,
        ours=f"{mean:.3g}{spread}{beside}",
        threshold=f"{op} {threshold:.3g}",
        holds=bool(holds),
        seeds=seeds,
    )


def seeds_of(config):
    return range(config.seed, config.seed + config.seeds)


def series(run, key, **where):
    """A metric by seed -> the steps that every seed has (n,), values (seeds, n)."""
    rows = [
        r
        for r in run.rows
        if r.get(key) is not None and all(r.get(k) == v for k, v in where.items())
    ]
    by_seed = [
        {r["step"]: r[key] for r in rows if r["seed"] == seed}
        for seed in sorted({r["seed"] for r in rows})
    ]
    x = sorted(set.intersection(*map(set, by_seed))) if by_seed else []
    return np.array(x), np.array([[d[i] for i in x] for d in by_seed])


def band(ax, x, y, label, **style):
    """The mean of y (seeds, n), with one standard deviation over the seeds shaded."""
    if len(x):
        (line,) = ax.plot(x, y.mean(0), label=label, **style)
        spread = y.std(0, ddof=1) if len(y) > 1 else 0 * y[0]
        ax.fill_between(
            x, y.mean(0) - spread, y.mean(0) + spread, color=line.get_color(), alpha=0.15, lw=0
        )


def lr_at(step, steps, peak, warmup=20):
    """The learning rate of a step: up to `peak` in a line over `warmup` steps, then down in a
    cosine to a tenth of it.
    """
    return peak * min((step + 1) / warmup, 0.55 + 0.45 * math.cos(math.pi * step / steps))
