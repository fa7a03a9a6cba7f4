"""What the tests of every script share: a stand-in for a Run, the command as a user gives it, and
the four checks of its behaviour.
"""

import contextlib
import dataclasses
import importlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import experiment
from model import GPT, GPTConfig

ROOT = Path(__file__).resolve().parents[1]
V = 11
PROMPTS = [[3], [1, 4, 1, 5, 9, 2, 6], [5, 3, 5], [8, 9, 7, 9]]
VARIANTS = {
    "multi-head": {},
    "grouped-query": dict(n_kv_head=2),
    "multi-query": dict(n_kv_head=1),
    "window": dict(window=4, n_kv_head=2),
    "qk_norm": dict(qk_norm=True),
    "qkv_bias": dict(qkv_bias=True),
    "tied": dict(tie=True),
}


def make(seed=0, **kwargs):
    """A small GPT whose every weight, norm and bias is random and large: at init nothing depends on
    much.
    """
    gpt = GPT(
        GPTConfig(
            **{
                **dict(vocab_size=V, block_size=64, n_layer=2, n_head=4, n_embd=32, tie=False),
                **kwargs,
            }
        )
    ).requires_grad_(False)
    g = torch.Generator().manual_seed(seed)
    for p in gpt.parameters():
        p.copy_(torch.randn(p.shape, generator=g) * 0.2 + (p.dim() == 1))
    return gpt


def known(probs):
    """A GPT that gives every token these probabilities, whatever came before."""
    gpt = make(vocab_size=len(probs), n_layer=1, n_head=1, n_embd=2)
    gpt.lm_head.register_forward_hook(
        lambda _, inputs, out: torch.tensor(probs).log().expand_as(out)
    )
    return gpt


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class Memory(experiment.Run):
    """A Run without a folder: it keeps rows and state, and is never due."""

    due = False

    def __init__(self):
        self.rows, self.state, self.kept_rows, self.place, self.bar = [], {}, 0, "", None
        self.saved = self.kept = time.time()
        self.signal, self.busy, self.keep_seconds, self.save_seconds = 0, False, 0, 0
        self.metrics = io.FileIO(os.devnull, "w")

    def save(self):
        pass


def launch(script, *flags):
    """The command, in this process and on one thread (importing torch anew takes longer than most
    runs) -> exit code, stdout, stderr.
    """
    module, out, err, threads = (
        importlib.import_module(script.removesuffix(".py")),
        io.StringIO(),
        io.StringIO(),
        torch.get_num_threads(),
    )
    # Run takes over two signals: give them back
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    torch.set_num_threads(1)
    try:
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            pytest.MonkeyPatch.context() as patch,
        ):
            patch.setattr(sys, "argv", [script, *map(str, flags)])
            module.command(module.main)
        return 0, out.getvalue(), err.getvalue()
    except SystemExit as stop:
        return stop.code or 0, out.getvalue(), err.getvalue()
    finally:
        plt.close("all")
        torch.set_num_threads(threads)
        for s, handler in handlers.items():
            signal.signal(s, handler)


def finish(script, *flags):
    code, out, err = launch(script, *flags)
    assert code == 0, err
    return out


def complain(script, *flags):
    """The command with flags that it must refuse: exit code 2 and one line on stderr."""
    code, out, err = launch(script, *flags)
    assert code == 2 and out == "" and err.startswith(f"{script}: error: ") and err.count("\n") == 1
    return err


def torchrun(script, *flags, processes=2, **environment):
    """A script, or a piece of code, in several processes -> exit code, all they wrote."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(processes),
            script,
            *map(str, flags),
        ],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
            **environment,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )
    return done.returncode, done.stdout


def metrics(folder):
    """The rows, without what no two runs share."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in row.items() if k != "seconds" and not k.endswith("_per_s")}
        for row in rows
    ]


def check_whole(folder, also=()):
    """All that design.md promises of a run's folder, and nothing else -> the figure's name."""
    (figure,) = [p.stem for p in folder.glob("*.png")]
    assert {
        f"{figure}.png",
        "metrics.jsonl",
        "claims.json",
        "cost.json",
        "config.json",
        "model.pt",
        *also,
    } == {p.name for p in folder.iterdir()}
    assert (folder / f"{figure}.png").read_bytes().startswith(b"\x89PNG")
    assert metrics(folder)
    assert all("step" in row for row in metrics(folder))
    for claim in json.loads((folder / "claims.json").read_text()):
        assert list(claim) == [
            "id",
            "claim",
            "source",
            "paper",
            "ours",
            "threshold",
            "holds",
            "seeds",
        ]
        assert isinstance(claim["holds"], bool)
    return figure


def check_quick(script, folder, *flags, also=()):
    finish(script, "--quick", "--out", folder, *flags)
    return check_whole(folder, also)


def check_help(script):
    text, module = finish(script, "--help"), importlib.import_module(script.removesuffix(".py"))
    assert all(f"--{f.name.replace('_', '-')}" in text for f in dataclasses.fields(module.Config))


def check_mistake(script, flags, folder):
    complain(script, "--out", folder, *flags.split())
    assert not list(folder.iterdir())


def interrupting(mark, number):
    """A Run.log that sends this process a signal at the first row with the mark, and a list that
    then holds the row.
    """
    log, seen = experiment.Run.log, []

    def interrupted(self, **row):
        log(self, **row)
        if mark.items() <= row.items() and not seen:
            seen.append(row)
            os.kill(os.getpid(), number)

    return interrupted, seen


def check_resume(script, folder, marks, *flags):
    """Interrupt a run when a row with the first mark is logged, resume it, interrupt it again at
    the second mark, which comes later, and resume it: its rows and claims are those of a run that
    nothing interrupted, to the bit.
    """
    finish(script, *flags, "--out", folder / "whole")
    out = folder / "interrupted"
    for mark, number in zip(marks, (signal.SIGINT, signal.SIGTERM), strict=True):
        interrupted, seen = interrupting(mark, number)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(experiment.Run, "log", interrupted)
            code, written, _ = launch(script, *flags, "--out", out)
        assert code == 128 + number and "--resume" in written and seen
        assert 0 < len(metrics(out)) < len(metrics(folder / "whole"))
        flags = ("--resume",)
    finish(script, "--resume", "--out", out)
    assert metrics(out) == metrics(folder / "whole")
    assert (out / "claims.json").read_text() == (folder / "whole" / "claims.json").read_text()
