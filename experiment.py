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
import inspect
import io
import json
import math
import operator
import os
import platform
import shlex
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
from tqdm import tqdm

from meter import Meter

matplotlib.use("Agg")  # figures are files: no display is needed


# --------------------------------------------------------------------------------------------------
# Flags


class UserError(ValueError):
    """A mistake of the person at the keyboard: one line on stderr, exit code 2 (see `command`)."""


class NotFinite(UserError):
    """A loss, gradient norm, weight or logit that is no number: ends a run before it is saved."""


SIGNALS = signal.SIGINT, signal.SIGTERM


def command(main):
    """Run a script's main, and turn what ends it into an exit code and at most one line on stderr.

    UserError and lack of memory: 2. SIGINT: 130, SIGTERM: 143. A closed pipe: 141. Characters that
    the terminal lacks are replaced: they keep no run from writing its results.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    for s in SIGNALS:
        signal.signal(s, leave)
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:
        # the interpreter flushes stdout once more when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        raise SystemExit(128 + signal.SIGPIPE) from None
    except (UserError, MemoryError, RuntimeError) as e:
        text = str(e)
        if out_of_memory(e):
            text = f"out of memory ({text[:200]})"
        elif not isinstance(e, UserError):
            raise
        print(f"{Path(sys.argv[0]).name}: error: {' '.join(text.split())}", file=sys.stderr)
        raise SystemExit(2) from None


def leave(number, _):
    """The handler of SIGINT and SIGTERM: end at once, wherever the program is."""
    raise SystemExit(128 + number)


def out_of_memory(e):
    return isinstance(e, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(e)


def flag(default, help, quick=None, choices=None, low=-math.inf, high=math.inf):
    """A Config field that is a flag: default, help line, value under --quick, values allowed."""
    return field(
        default=default,
        metadata=dict(help=help, quick=quick, choices=choices, low=low, high=high),
    )


def dashed(name):
    """The flag of a field."""
    return "--" + name.replace("_", "-")


@dataclass
class Flags:
    """What every script takes. A script's Config adds its own, or gives these other defaults."""

    seed: int = flag(0, "random seed; with --seeds K: the first of K", low=0, high=2**32 - 1)
    seeds: int = flag(1, "repeat over this many seeds", quick=1, low=1)
    device: str = flag("auto", "where to run", choices=("auto", "cpu", "cuda", "mps"))
    out: str = flag("", "folder for all that a run writes (default: out/NAME, out/NAME_quick)")
    resume: bool = flag(False, "go on from the checkpoint in --out")
    quick: bool = flag(False, "a run of a few seconds that shows nothing but that it runs")

    @property
    def name(self):
        """A run is named for the file that its Config stands in."""
        return Path(inspect.getfile(type(self))).stem

    def idle(self):
        """The flags that do nothing beside the others -> {field: why}."""
        return {}


# a seed's range; what fp32 numbers can be squared to
LARGEST = {int: 2**32 - 1, float: 1e30}


def parse_args(Config, doc, argv=None):
    """A Config from the command line. Every field is a flag; --quick sets the quick values.

    Explicit flags win over --quick. --resume takes the flags of the run in --out; to contradict
    them is an error (but more --steps: train on). So is a flag that `idle` says does nothing.
    """
    given = vars(make_parser(Config, doc).parse_args(argv))
    quick = {f.name: f.metadata["quick"] for f in dataclasses.fields(Config)}
    values = {name: x for name, x in quick.items() if given.get("quick") and x is not None}
    if given.get("resume"):
        values = resumed(Config, given)
    config = Config(**{**values, **given})
    # a quick run must not replace what took minutes
    config.out = config.out or f"out/{config.name}{'_quick' * config.quick}"
    check_ranges(config)
    for name, why in config.idle().items():
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
            options |= dict(type=f.type, choices=f.metadata["choices"])
        parser.add_argument(dashed(f.name), **options)
    return parser


def resumed(Config, given):
    """The flags of the run in --out. UserError if there is none, or if `given` contradicts it."""
    out = given.get("out") or f"out/{Config().name}{'_quick' * given.get('quick', False)}"
    path = Path(out) / "model.pt"
    saved = load_checkpoint(path)
    if not isinstance(saved, dict) or not {"config", "state", "rows", "revision"} <= set(saved):
        raise UserError(f"--resume: {path} is not a run's")
    values = {**saved["config"], "out": out}
    if set(values) != {f.name for f in dataclasses.fields(Config)}:
        raise UserError("--resume: the checkpoint was made by another version of this script")
    for name, now in given.items():
        was = values[name]
        if name == "steps" and now < (was or 0):
            raise UserError(f"--resume goes on with a run of {was} steps: {now} are fewer")
        if name not in ("resume", "steps", "out") and now != was:
            raise UserError(f"--resume continues a run with {name} = {was}, not {now}")
    return values


def check_ranges(config):
    """UserError for a value outside a flag's `low` and `high`, or one that no arithmetic holds."""
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        largest = LARGEST.get(type(value))
        if largest is None:
            continue
        low = max(f.metadata["low"], -largest)
        high = min(f.metadata["high"], largest)
        if not low <= value <= high:  # nor is nan
            raise UserError(f"{dashed(f.name)} is {value}: must be from {low} to {high}")


def pick_device(name):
    """--device's value -> "cpu", "cuda" or "mps"; auto takes the fastest that there is."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    there = ["cuda"] * cuda + ["mps"] * mps + ["cpu"]
    if name not in ("auto", *there):
        raise UserError(f"--device {name}: this machine has none")
    return there[0] if name == "auto" else name


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


def copied(x):
    """A copy, with all tensors on the CPU, which stands still while the model trains on."""
    if isinstance(x, torch.Tensor):
        return x.detach().to("cpu", copy=True)
    if isinstance(x, dict):
        return {key: copied(value) for key, value in x.items()}
    return copy.deepcopy(x)


def snapshot(step, model, optimizer, rng, generator=None, kept=None):
    """All that a loop needs to go on, to the bit. NotFinite if a weight is no number."""
    weights = model.state_dict()
    if not all(torch.isfinite(p).all() for p in weights.values()):
        raise NotFinite("a weight is no longer finite")
    state = dict(
        step=step,
        model=weights,
        optimizer=optimizer and optimizer.state_dict(),
        rng=rng.getstate(),
        generator=generator and generator.get_state(),
        kept=kept,
    )
    return copied(state)


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
    fingerprint of what the run depends on beside its flags; resume refuses others. UserError for a
    folder that cannot be written or holds somebody else's files, or a checkpoint without its rows.
    """

    alone = True  # no other processes
    silent = False  # no progress bar

    def __init__(self, config, also=(), inputs=None):
        self.config = dataclasses.asdict(config)
        self.name = config.name
        self.dir = Path(config.out)
        self.rows = []
        self.state = {}
        self.inputs = inputs or {}
        task = Path(self.config.get("task", ""))
        if task.is_file():  # one of the user's own
            self.inputs[f"the file of --task {task}"] = task.read_text()
        self.kept_rows = 0  # rows that go with what is kept
        self.place = "the start"  # where the run is, for a person
        self.bar = None  # of the loop that is on
        self.saved = self.kept = time.time()
        self.meter = Meter()
        self.save_seconds = self.keep_seconds = 0  # what the last ones took
        self.signal = 0  # that came while busy
        self.busy = False
        self.revision = revision()
        if config.resume:
            self.go_on_from(load_checkpoint(self.dir / "model.pt"))
        self.begin(also)

    def begin(self, also):
        """Take the folder; from now on a signal ends the run."""
        if self.alone and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise UserError("this script runs in one process")
        self.take_folder(also)
        # first: it says whose folder this is
        self.write(
            "config.json",
            dict(
                name=self.name,
                config=self.config,
                revision=self.revision,
                torch=torch.__version__,
                python=platform.python_version(),
                threads=torch.get_num_threads(),
            ),
        )
        self.write("metrics.jsonl", "".join(json.dumps(row) + "\n" for row in self.rows))
        self.metrics = io.FileIO(self.dir / "metrics.jsonl", "a")  # without a buffer
        self.handlers = {s: signal.signal(s, self.interrupt) for s in SIGNALS}

    def go_on_from(self, checkpoint):
        """Take over state and rows. What was logged after the checkpoint is made again."""
        for name, value in self.inputs.items():
            if checkpoint["inputs"].get(name) != value:
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
            raise UserError(
                f"{path} does not hold the {self.kept_rows} rows that model.pt goes on from"
            )
        before = checkpoint["revision"]  # the code that made the rows, not only the last one
        if not before.endswith(self.revision):
            before += f", resumed at {self.revision}"
        self.revision = before

    def take_folder(self, also):
        """Make the folder, or clear it of an earlier run's files. UserError for somebody else's."""
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
            owned = self.owned()
            if self.config["resume"]:
                return
            foreign = self.files(self.name) - owned if owned else self.files(self.name).union(also)
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
        names = "config.json", "metrics.jsonl", "claims.json", "cost.json", "samples.txt"
        return {*names, "model.pt", f"{name}.png"}

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
        if isinstance(error, NotFinite):
            self.save()
            error.args = (f"{error} at {self.place}; {model} holds what was finite",)
        if isinstance(error, (SystemExit, BrokenPipeError)):
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

    def write(self, name, content):
        """Text, bytes or what JSON holds, whole or not at all."""
        if isinstance(content, (dict, list)):
            content = json.dumps(content, indent=1)
        with whole(self.dir / name) as f:
            f.write(content.encode() if isinstance(content, str) else content)

    def log(self, **row):
        """One line of metrics.jsonl, which is strict JSON: NotFinite for a number that is none."""
        for key, value in row.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise NotFinite(f"{key} is {value}")
        line = json.dumps(row, allow_nan=False).encode() + b"\n"
        with self.uncut():
            end = self.metrics.seek(0, os.SEEK_END)
            try:
                if self.metrics.write(line) < len(line):
                    raise OSError(28, "No space left on device")
            except OSError as e:
                self.metrics.truncate(end)
                raise UserError(f"cannot write {self.metrics.name}: {e.strerror}") from None
            self.rows.append(row)

    def introduce(self, device, parameters):
        """The first line that a run prints."""
        print(
            f"{self.name}: seed {self.config['seed']}, {self.config['seeds']} in all, {device}, "
            f"{parameters:,} parameters"
        )

    def say(self, **numbers):
        """Put some numbers beside the progress bar."""
        self.bar.set_postfix_str(", ".join(f"{k} {value:.3f}" for k, value in numbers.items()))

    def samples(self, prompts, **answers):
        """Print, and write to samples.txt, what each model answers to some prompts.

        answers: a model's name -> [(text, reward)], one for each prompt.
        """
        lines = []
        for prompt, *written in zip(prompts, *answers.values(), strict=True):
            lines.append(prompt)
            for name, (text, reward) in zip(answers, written, strict=True):
                lines.append(f"    {name:<12} {'right' if reward else 'wrong'}   {text}")
        text = "\n".join(lines) + "\n"
        self.write("samples.txt", text)
        print(f"\nHeld-out problems, and what the models answer:\n{text}")

    def finish(self, fig, claims):
        """The last things that a run does: the figure, the claims, the time it took."""
        picture = io.BytesIO()
        fig.savefig(picture, dpi=110, format="png")
        self.write(f"{self.name}.png", picture.getvalue())
        # each claim holds or does not: both are results
        self.write("claims.json", claims)
        print(
            f"\n{'claim':<58} {'paper':>18} {'ours':>16} {'threshold':>10}  holds"
            f"{' (--quick: nothing was learnt)' * self.config['quick']}"
        )
        for c in claims:
            print(
                "{claim:<58} {paper!s:>18} {ours:>16} {threshold:>10} ".format(**c),
                "yes" if c["holds"] else "NO",
            )
        self.write("cost.json", self.meter.total())
        print(f"\n{self.dir}: figure, claims, metrics, samples, model. Cost: {self.meter}")

    def log_once(self, measure, **where):
        """Log measure() -> {name: value} as the row `where`, but not again in a resumed run."""
        if not any(where.items() <= row.items() for row in self.rows):
            self.place = ", ".join(f"{k} {v}" for k, v in where.items())
            self.log(**where, **measure())
            self.keep()
            if self.due:
                self.save()

    def loop(self, phase, steps, model, optimizer, rng, generator=None, kept=None, until=None):
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
        self.bar = tqdm(desc=phase, initial=step, total=total, disable=self.silent)
        while step < steps and not (until and until()):
            self.place = f"step {step + 1} of {phase}"
            yield step
            step += 1
            self.bar.update()
            if self.time_to_keep():
                started = time.time()
                self.keep(phase, snapshot(step, model, optimizer, rng, generator, kept))
                self.keep_seconds = self.kept - started
            if self.due:
                self.save()
        self.bar.close()
        self.bar = None
        self.keep(phase, snapshot(step, model, optimizer, rng, generator, kept))
        self.save()

    def time_to_keep(self):
        """Keeping takes a fiftieth of the time."""
        return self.due or time.time() - self.kept > 50 * self.keep_seconds

    @property
    def due(self):
        """Whether it is time to save: every 30 s, or 20 times what a save takes."""
        return time.time() - self.saved > max(30, 20 * self.save_seconds)

    def keep(self, phase=None, state=None):
        """Remember, in memory, what a phase needs to go on, and that the rows so far go with it.

        Without a phase: the rows alone, and only outside of loops.
        """
        with self.uncut():
            self.kept = time.time()
            if phase is not None:
                self.state[phase] = state
            if phase is not None or self.bar is None:
                self.kept_rows = len(self.rows)

    def save(self):
        """Write what is kept to model.pt."""
        started = time.time()
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


def revision():
    """What git calls the code that runs; "unknown" without git."""
    folder = shlex.quote(os.path.dirname(__file__))
    status, text = subprocess.getstatusoutput(f"git -C {folder} describe --always --dirty")
    return "unknown" if status else text


def claim(id, text, source, paper, value, op, threshold, seeds, beside=""):
    """One row of claims.json: what was measured, held to its threshold.

    value: a number, or one of each seed (seeds,), of which the mean is held to the threshold and
    told with the standard deviation; what is not finite never holds. op: >= or <=; > or < where the
    threshold is 0, because there a tie must not hold. `beside` is printed next to the value.
    """
    assert threshold or op in (">", "<"), f"{id}: {op} {threshold} would hold on a tie"
    value = np.asarray(value, dtype=float)
    mean = value.mean()
    ours = f"{mean:.3g}"
    if value.size > 1:
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
        if row.get(key) is not None and where.items() <= row.items():
            by_seed.setdefault(row["seed"], {})[row["step"]] = row[key]
    curves = [by_seed[seed] for seed in sorted(by_seed)]
    steps = sorted(set.intersection(*map(set, curves))) if curves else []
    return np.array(steps), np.array([[curve[step] for step in steps] for curve in curves])


def band(ax, x, y, label, **style):
    """The mean of y (seeds, n), with one standard deviation over the seeds shaded."""
    if len(x):
        mean = y.mean(0)
        spread = y.std(0, ddof=int(len(y) > 1))
        (line,) = ax.plot(x, mean, label=label, **style)
        ax.fill_between(x, mean - spread, mean + spread, color=line.get_color(), alpha=0.15, lw=0)


def lr_at(step, steps, peak, warmup=20):
    """A step's learning rate: up to `peak` in `warmup` steps, down in a cosine to a tenth of it."""
    return peak * min((step + 1) / warmup, 0.55 + 0.45 * math.cos(math.pi * step / steps))
