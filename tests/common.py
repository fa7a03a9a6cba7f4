"""What the tests of every script share: a stand-in for a Run, the command run as a user would, and the four checks of its behaviour."""
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


class Memory:
    """Stands in for a Run: keeps the rows, saves nothing to disk."""
    def __init__(self):
        self.rows, self.state, self.due = [], {}, False

    def log(self, **row):
        self.rows.append(row)

    def log_once(self, measure, **where):
        if not any(where.items() <= row.items() for row in self.rows):
            self.log(**where, **measure())

    def save(self, phase, **state):
        self.state[phase] = state


def start(script, *flags):
    return subprocess.Popen([sys.executable, ROOT / script, *map(str, flags)], env={**os.environ, "OMP_NUM_THREADS": "1"},
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(script, *flags):
    process = start(script, *flags)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def metrics(folder):
    """The rows, without what no two runs share."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds" and not k.endswith("_per_s")} for row in rows]


def check_quick(script, folder, *flags, also=()):
    finish(script, "--quick", "--out", folder, *flags)
    figure, = [p.stem for p in folder.glob("*.png")]
    assert {f"{figure}.png", "metrics.jsonl", "claims.json", "config.json", "model.pt", *also} == {p.name for p in folder.iterdir()}
    assert (folder / f"{figure}.png").read_bytes().startswith(b"\x89PNG") and all("step" in row for row in metrics(folder))
    for claim in json.loads((folder / "claims.json").read_text()):
        assert list(claim) == ["id", "claim", "source", "paper", "ours", "threshold", "holds", "seeds"] and isinstance(claim["holds"], bool)
    return figure


def check_help(module, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        module.command(module.main)
    text = capsys.readouterr().out
    assert stop.value.code == 0 and all(f"--{f.name.replace('_', '-')}" in text for f in dataclasses.fields(module.Config))


def check_mistake(module, flags, folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", "--out", str(folder), *flags.split()])
    with pytest.raises(SystemExit) as stop:
        module.command(module.main)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith(f"{module.__name__}.py: error: ") and err.count("\n") == 1 and not list(folder.iterdir())


def check_resume(script, folder, marks, *flags):
    """Interrupt a run when a row with each mark appears, resume it: its rows are those of a run that nothing interrupted, to the bit."""
    finish(script, *flags, "--out", folder / "whole")
    for i, mark in enumerate(marks):
        out, number = folder / str(i), (signal.SIGINT, signal.SIGTERM)[i % 2]
        process, log = start(script, *flags, "--out", out), out / "metrics.jsonl"
        while not (log.exists() and mark in log.read_text()):
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.01)
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 128 + number, output
        finish(script, "--resume", "--out", out)
        assert metrics(out) == metrics(folder / "whole")
