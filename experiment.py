"""experiment.py: what every script needs and none should say twice.

A script is a `Config` whose fields are flags, and a `main` that hands it to a `Run`. The run writes
config.json, metrics.jsonl, samples.txt, claims.json and the figure to --out, saves what a loop
needs to go on, and survives an interrupt: `--resume` goes on to the bit on a CPU.

    config = parse_args(Config, __doc__)
    with Run(config) as run:
        for step in run.loop("train 0", config.steps, model, optimizer, rng):
            ...
            descend(optimizer, loss)
            run.log(seed=0, step=step + 1, loss=loss.item())
        run.finish(figure, claims)
"""

import argparse
import contextlib
import copy
import dataclasses
import hashlib
import io
import json
import math
import operator
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
    """A mistake of the person at the keyboard: one line on stderr, exit code 2 (see `command`)."""


class NotFinite(UserError):
    """A loss, gradient norm, weight or logit that is no number: ends a run before it is saved."""


class LostProcess(UserError):
    """What one process knows and rank 0 may not: printed by whichever rank it happens to."""


def command(main):
    """Run a script's main, and turn what ends it into an exit code and at most one line on stderr.

    UserError and lack of memory: 2, said by rank 0 only. SIGINT: 130, SIGTERM: 143. A closed pipe:
    141. Characters that the terminal lacks are replaced: they keep no run from writing its results.
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
        text = str(e) if isinstance(e, UserError) else f"out of memory ({str(e)[:200]})"
        if int(os.environ.get("RANK", 0)) == 0 or isinstance(e, LostProcess):
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
    """A Config field that is a flag: default, help line, value under --quick, values allowed."""
    about = dict(help=help, quick=quick, choices=choices, low=low, high=high)
    return field(default=default, metadata=about)


def dashed(name):
    """The flag of a field."""
    return "--" + name.replace("_", "-")


@dataclass
class Flags:
    """What every script takes. A script's Config adds its own, or gives these other defaults."""

    seed: int = flag(0, "random seed; with --seeds K: the first of K", low=0, high=2**32 - 1)
    seeds: int = flag(1, "repeat over this many seeds", quick=1, low=1)
    device: str = flag("auto", "where to run", choices=("auto", "cpu", "cuda", "mps"))
    out: str = flag("", "folder for all that a run writes (default: out/ and the script's name)")
    resume: bool = flag(False, "go on from the checkpoint in --out")
    quick: bool = flag(False, "a run of a few seconds that shows nothing but that it runs")

    @property
    def name(self):
        """A run is named for the file that its Config stands in."""
        return Path(sys.modules[type(self).__module__].__file__).stem


# a seed's range; what fp32 numbers can be squared to
LARGEST = {int: 2**32 - 1, float: 1e30}


def parse_args(Config, doc, argv=None):
    """A Config from the command line. Every field is a flag; --quick sets the quick values.

    Explicit flags win over --quick. --resume takes the flags of the run in --out; to contradict
    them is an error (but more --steps: train on). A Config may have a method `idle() -> {field:
    why}`, the flags that do nothing beside the others: to give one of them is an error, too.
    """
    given = vars(make_parser(Config, doc).parse_args(argv))
    values = {}
    if given.get("quick"):
        quick = {f.name: f.metadata["quick"] for f in dataclasses.fields(Config)}
        values = {name: value for name, value in quick.items() if value is not None}
    if given.get("resume"):
        values = resumed(Config, given)
    config = Config(**{**values, **given})
    config.out = config.out or f"out/{config.name}"
    check_ranges(config)
    for name, why in (config.idle() if hasattr(config, "idle") else {}).items():
        if name in given:
            raise UserError(f"{dashed(name)} does nothing here: {why}")
    return config


def make_parser(Config, doc):
    """argparse's, with a flag for every field; it leaves out what was not given."""

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
        default = "" if f.default in (None, "", False) else f" (default {f.default})"
        options = dict(help=f.metadata["help"] + default)
        if f.type is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["type"] = f.type
            options["choices"] = f.metadata["choices"]
            options["metavar"] = None if f.metadata["choices"] else f.type.__name__.upper()
        parser.add_argument(dashed(f.name), **options)
    return parser


def resumed(Config, given):
    """The flags of the run in --out. UserError if there is none, or if `given` contradicts it."""
    out = given.get("out") or f"out/{Config().name}"
    path = Path(out) / "model.pt"
    saved = load_checkpoint(path)
    if not isinstance(saved, dict) or not {"config", "state", "rows", "revision"} <= set(saved):
        raise UserError(f"--resume: {path} is not a run's")
    values = {**saved["config"], "out": out}
    if set(values) != {f.name for f in dataclasses.fields(Config)}:
        raise UserError("--resume: the checkpoint was made by another version of this script")
    for name in set(given) - {"resume", "steps", "out"}:
        if given[name] != values[name]:
            was, now = values[name], given[name]
            raise UserError(f"--resume continues a run with {name} = {was}, not {now}")
    before = values.get("steps") or 0
    if given.get("steps", math.inf) < before:
        now = given["steps"]
        raise UserError(f"--resume goes on with a run of {before} steps: {now} are fewer")
    return values


def check_ranges(config):
    """UserError for a value outside a flag's `low` and `high`, or one that no arithmetic holds."""
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if type(value) not in LARGEST:
            continue
        largest = LARGEST[type(value)]
        low = -largest if f.metadata["low"] is None else f.metadata["low"]
        high = largest if f.metadata["high"] is None else f.metadata["high"]
        if not math.isfinite(value):
            raise UserError(f"{dashed(f.name)} is {value}: must be finite")
        if value < low:
            raise UserError(f"{dashed(f.name)} is {value}: must be at least {low}")
        if value > high:
            raise UserError(f"{dashed(f.name)} is {value}: must be at most {high}")


def need_memory(size, what, device="cpu"):
    """UserError if `size` bytes are more than the machine has: said before they are allocated."""
    if device == "cuda":
        has = torch.cuda.mem_get_info()[1]
    else:
        has = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > has:
        name = "GPU" if device == "cuda" else "machine"
        gib = f"{size / 2**30:,.1f} GiB, of which this {name} has {has / 2**30:,.1f}"
        raise UserError(f"{what}: {gib}")


def pick_device(name):
    """--device's value -> "cpu", "cuda" or "mps"; auto takes the fastest that there is."""
    available = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()
    available.append("cpu")
    name = available[0] if name == "auto" else name
    if name not in available:
        raise UserError(f"--device {name}: this machine has none")
    # cuDNN's attention plans anew for each length, and decoding meets a new one at every step
    if name == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)
    return name


def world():
    """This process's rank, and how many there are: (0, 1) but in scale.py under torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def all_sum(x):
    """The sum of a tensor over the processes, in each of them; without torchrun, the tensor."""
    if not dist.is_initialized():
        return x
    total = x.to("cuda" if dist.get_backend() == "nccl" else "cpu", copy=True)
    try:
        dist.all_reduce(total)
    except torch.OutOfMemoryError:  # a RuntimeError too
        raise
    except RuntimeError as e:
        lost = f"rank {world()[0]} lost another process of this run ({type(e).__name__})"
        raise LostProcess(lost) from None
    return total.to(x.device)


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
    """What save_checkpoint wrote, as a dict on the CPU. UserError if it is missing or damaged."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"no checkpoint at {path}") from None
    except Exception as e:
        raise UserError(f"{path} is not a readable checkpoint ({type(e).__name__})") from None


def fingerprint(path):
    """A hash of a file or of a folder's files; of what is neither (a hub id), the name itself.

    A run depends on it beside its flags: --resume compares it.
    """
    digest = hashlib.sha256()
    files = [path] if os.path.isfile(path) else []
    if os.path.isdir(path):
        files = sorted(p for p in Path(path).rglob("*") if p.is_file())
    try:
        for file in files:
            digest.update(str(Path(file).relative_to(path)).encode())
            with open(file, "rb") as f:
                while block := f.read(2**24):
                    digest.update(block)
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from None
    return digest.hexdigest() if files else str(path)


def descend(optimizer, loss, clip=1.0):
    """The end of every training step -> the gradient's norm before it is cut to at most `clip`.

    loss: the step's, a number. NotFinite, and no step, if it or the norm is none: the weights are
    then as they were.
    """
    loss = loss.item() if isinstance(loss, torch.Tensor) else loss
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip).item()
    for name, value in (("loss", loss), ("gradient norm", norm)):
        if not math.isfinite(value):
            raise NotFinite(f"the {name} is {value}")
    optimizer.step()
    return norm


def copied(tensors):
    """Copies on the CPU, which stand still while the model trains on."""
    return {name: x.detach().to("cpu", copy=True) for name, x in tensors.items()}


def snapshot(step, model, optimizer, rng, generator=None, **more):
    """All that a loop needs to go on, to the bit. NotFinite if a weight is no number."""
    weights = model.state_dict()
    if not all(torch.isfinite(p).all() for p in weights.values()):
        raise NotFinite("a weight is no longer finite")
    if optimizer:
        optimizer = optimizer.state_dict()
        moments = optimizer.get("state", {})  # of a sharded model's, rank 0 alone has them
        optimizer["state"] = {i: copied(tensors) for i, tensors in moments.items()}
    return dict(
        step=step,
        model=copied(weights),
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
        self.config = dataclasses.asdict(config)
        self.name = config.name
        self.dir = Path(config.out)
        self.rows = []
        self.state = {}
        self.inputs = inputs or {}
        self.kept_rows = 0  # rows that go with what is kept
        self.place = ""  # where the run is, for a person
        self.bar = None  # of the loop that is on
        self.started = self.saved = self.kept = time.time()
        self.save_seconds = self.keep_seconds = 0  # what the last ones took
        self.signal = 0  # that came while busy
        self.busy = False
        self.revision = revision()
        self.handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
        if int(os.environ.get("WORLD_SIZE", 1)) != world()[1]:
            raise UserError("this script, or what its flags ask for, runs in one process")
        if config.resume:
            self.go_on_from(load_checkpoint(self.dir / "model.pt"))
        if world()[0]:
            self.follow()
            return
        self.take_folder(config.resume, set(also))
        about = {"name": self.name, "config": self.config, "revision": self.revision}
        about["torch"] = torch.__version__
        about["python"] = platform.python_version()
        about["threads"] = torch.get_num_threads()
        # first: it says whose folder this is
        self.write("config.json", json.dumps(about, indent=1))
        self.write("metrics.jsonl", "".join(json.dumps(row) + "\n" for row in self.rows))
        self.metrics = io.FileIO(self.dir / "metrics.jsonl", "a")  # without a buffer
        all_sum(torch.zeros(1))  # the others wait for the folder
        for s in self.handlers:
            signal.signal(s, self.interrupt)

    def go_on_from(self, checkpoint):
        """Take over state and rows. What was logged after the checkpoint is made again."""
        for name, value in self.inputs.items():
            if checkpoint.get("inputs", {}).get(name) != value:
                raise UserError(
                    f"--resume: {name} is no longer what the run in {self.dir} began with"
                )
        self.state = checkpoint["state"]
        self.kept_rows = checkpoint["rows"]
        path = self.dir / "metrics.jsonl"
        try:
            lines = path.read_text().splitlines()[: self.kept_rows]
            self.rows = [json.loads(line) for line in lines]
        except (OSError, ValueError):
            self.rows = []
        if len(self.rows) < self.kept_rows:
            n = self.kept_rows
            raise UserError(f"{path} does not hold the {n} rows that model.pt goes on from")
        before = checkpoint["revision"]  # the code that made the rows, not only the last one
        resumed_at = f"{before}, resumed at {self.revision}"
        self.revision = before if before.endswith(self.revision) else resumed_at

    def follow(self):
        """What a Run is in the other processes of scale.py: it writes nothing, heeds no signal."""
        try:
            all_sum(torch.zeros(1))  # wait for rank 0's folder
        except LostProcess:
            raise UserError("rank 0 says what is wrong with its folder") from None
        self.metrics = io.FileIO(os.devnull, "w")
        self.write = lambda *_: None
        self.save = lambda *_, **__: None
        self.saved = math.inf
        for s in self.handlers:
            signal.signal(s, signal.SIG_IGN)

    def take_folder(self, resume, also):
        """Make the folder, or clear it of an earlier run's files. UserError for somebody else's."""
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
            owned = self.owned()
            if resume:
                return
            foreign = self.files(self.name) | also
            foreign -= owned | also if owned else set()
            for name in sorted(foreign):
                if os.path.lexists(self.dir / name):
                    raise UserError(
                        f"{self.dir} holds {name}, which no run wrote: choose another --out"
                    )
            for name in owned - {"config.json"}:
                (self.dir / name).unlink(missing_ok=True)
        except OSError as e:
            raise UserError(f"cannot write to {self.dir}: {e.strerror}") from None

    def files(self, name):
        """What the run of a script writes."""
        names = "config.json", "metrics.jsonl", "claims.json", "samples.txt", "model.pt"
        return {*names, f"{name}.png"}

    def owned(self):
        """The files of the run whose config.json is there; none if there is none."""
        path = self.dir / "config.json"
        try:
            past = json.loads(path.read_text())
            return self.files(past["name"]) if past["config"] and past["revision"] else set()
        except FileNotFoundError:
            return set()
        except (ValueError, LookupError, TypeError):
            raise UserError(f"{path} is not a run's: choose another --out") from None

    def __enter__(self):
        return self

    def __exit__(self, kind, error, _):
        """After a signal, a closed pipe or what is not finite: write what was kept last."""
        if self.bar is not None:
            self.bar.close()
        model = self.dir / "model.pt"
        if world()[0] == 0 and isinstance(error, NotFinite):
            self.save()
            where = f" at {self.place}" if self.place else ""
            error.args = (f"{error}{where}; {model} holds what was finite",)
        if world()[0] == 0 and isinstance(error, (SystemExit, BrokenPipeError)):
            for s in self.handlers:
                signal.signal(s, signal.SIG_DFL)  # a second signal does not wait
            self.save()
            with contextlib.suppress(BrokenPipeError):
                print(f"\nsaved {model}: --resume goes on from here", flush=True)
        self.metrics.close()
        for s, handler in self.handlers.items():
            signal.signal(s, handler)

    def interrupt(self, number, _):
        """The handler while the run is on: end at once, or when what must not be cut is done."""
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
                path = self.dir / "metrics.jsonl"
                raise UserError(f"cannot write {path}: {e.strerror}") from None
            self.rows.append(row)

    def introduce(self, device, parameters):
        """The first line that a run prints."""
        seeds = f"seed {self.config['seed']}, {self.config['seeds']} in all"
        threads = f"{torch.get_num_threads()} threads"
        print(f"{self.name}: {seeds}, {device}, {threads}, {parameters:,} parameters", flush=True)

    def say(self, **numbers):
        """Put some numbers beside the progress bar."""
        self.bar.set_postfix_str(", ".join(f"{k} {value:.3f}" for k, value in numbers.items()))

    def samples(self, prompts, **answers):
        """Print, and write to samples.txt, what each model answers to some prompts.

        answers: a model's name -> [(text, reward)], one for each prompt.
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
        path = self.dir / f"{self.name}.png"
        if world()[0] == 0:
            with whole(path) as f:
                fig.savefig(f, dpi=110, format="png")
        self.claims(claims)
        seconds = time.time() - self.started
        print(f"\n{path}, metrics.jsonl, claims.json, model.pt: {seconds:.0f} s")

    def log_once(self, measure, **where):
        """Log measure() -> {name: value} as the row `where`, but not again in a resumed run."""
        if not any(where.items() <= row.items() for row in self.rows):
            self.place = ", ".join(f"{k} {v}" for k, v in where.items())
            self.log(**where, **measure())
            self.keep()
            if self.due:
                self.save()

    def loop(
        self, phase, steps, model, optimizer, rng, generator=None, kept=None, until=None, bar=True
    ):
        """The steps that a phase has still to take: `for step in run.loop(...)`, up to steps - 1.

        They begin at 0, or where the run was interrupted: model, optimizer and random streams are
        restored, kept after each step, and saved when due. kept: a dict of whatever else the loop
        carries from step to step; what was saved of it is put into it. until() ends the loop before
        `steps`. Never `break`: the end saves, too.
        """
        state = self.state.get(phase)
        step = restore(state, model, optimizer, rng, generator)
        if kept is not None and state is not None:
            kept.update(copy.deepcopy(state["kept"]))
        total = None if steps >= 10**9 else steps
        hidden = not bar or world()[0] > 0
        self.bar = tqdm(desc=phase, initial=step, total=total, disable=hidden)
        while step < steps and not (until and until()):
            self.place = f"step {step + 1} of {phase}"
            yield step
            step += 1
            self.bar.update()
            if self.time_to_keep():
                started = time.time()
                carried = copy.deepcopy(kept)  # must not change with what goes on
                self.keep(phase, **snapshot(step, model, optimizer, rng, generator, kept=carried))
                self.kept = time.time()
                self.keep_seconds = self.kept - started
            if self.due:
                self.save()
        self.bar.close()
        self.bar = None
        carried = copy.deepcopy(kept)
        self.save(phase, **snapshot(step, model, optimizer, rng, generator, kept=carried))

    def time_to_keep(self):
        """Keeping takes a fiftieth of the time. Rank 0 decides: each may hold a part of it."""
        now = self.due or time.time() - self.kept > 50 * self.keep_seconds
        return bool(all_sum(torch.tensor(float(now and world()[0] == 0))))

    @property
    def due(self):
        """Whether it is time to save: every 30 s, or 20 times what a save takes."""
        return time.time() - self.saved > max(30, 20 * self.save_seconds)

    def keep(self, phase=None, **state):
        """Remember, in memory, what a phase needs to go on, and that the rows so far go with it.

        Without a phase: the rows alone, and only outside of loops.
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
        self.saved = time.time()
        self.save_seconds = self.saved - started

    def claims(self, claims):
        """Write claims.json and print it as a table. Each holds or does not: both are results."""
        self.write("claims.json", json.dumps(claims, indent=1))
        layout = "{:<58} {:>18} {:>16} {:>10}  {}"
        print("\n" + layout.format("claim", "paper", "ours", "threshold", "holds"))
        for c in claims:
            holds = "yes" if c["holds"] else "NO"
            print(layout.format(c["claim"], str(c["paper"]), c["ours"], c["threshold"], holds))


def revision():
    """What git calls the code that runs; "unknown" without git."""
    ask = ["git", "describe", "--always", "--dirty"]
    try:
        answer = subprocess.run(ask, capture_output=True, text=True, cwd=Path(__file__).parent)
    except OSError:
        return "unknown"
    return answer.stdout.strip() or "unknown"


def claim(id, text, source, paper, value, op, threshold, seeds, beside=""):
    """One row of claims.json: what was measured, held to its threshold.

    value: a number, or one of each seed (seeds,), of which the mean is held to the threshold and
    told with the standard deviation; what is not finite never holds. op: >= or <=; > or < where the
    threshold is 0, because there a tie must not hold. `beside` is printed next to the value.
    """
    allowed = (">", "<") if threshold == 0 else (">=", "<=", ">", "<")
    assert op in allowed, f"{id}: {op} {threshold} would hold on a tie"
    value = np.asarray(value, dtype=float)
    mean = value.mean()
    ours = f"{mean:.3g}"
    if value.size > 1:
        with np.errstate(invalid="ignore"):  # the spread of what is not finite is nan
            ours += f" ± {value.std(ddof=1):.2g}"
    compare = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}[op]
    return dict(
        id=id,
        claim=text,
        source=source,
        paper=paper,
        ours=ours + beside,
        threshold=f"{op} {threshold:.3g}",
        holds=bool(compare(mean, threshold) and np.isfinite(value).all()),
        seeds=seeds,
    )


def seeds_of(config):
    return range(config.seed, config.seed + config.seeds)


def series(run, key, **where):
    """A metric by seed -> the steps that every seed has (n,), values (seeds, n)."""
    by_seed = {}
    for row in run.rows:
        if row.get(key) is not None and all(row.get(k) == v for k, v in where.items()):
            by_seed.setdefault(row["seed"], {})[row["step"]] = row[key]
    curves = [by_seed[seed] for seed in sorted(by_seed)]
    steps = sorted(set.intersection(*map(set, curves))) if curves else []
    return np.array(steps), np.array([[curve[step] for step in steps] for curve in curves])


def band(ax, x, y, label, **style):
    """The mean of y (seeds, n), with one standard deviation over the seeds shaded."""
    if len(x):
        mean = y.mean(0)
        spread = y.std(0, ddof=1) if len(y) > 1 else 0 * mean
        (line,) = ax.plot(x, mean, label=label, **style)
        color = line.get_color()
        ax.fill_between(x, mean - spread, mean + spread, color=color, alpha=0.15, lw=0)


def lr_at(step, steps, peak, warmup=20):
    """A step's learning rate: up to `peak` in `warmup` steps, down in a cosine to a tenth of it."""
    return peak * min((step + 1) / warmup, 0.55 + 0.45 * math.cos(math.pi * step / steps))
