"""run.py: a checkpoint loses nothing, flags are typed and checked, a mistake is one line, an interrupt saves first."""
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys

import pytest
import torch

from common import ROOT, check_whole
from kernels import token_logprobs
from model import GPT, GPTConfig
from run import Run, UserError, flag, load_checkpoint, parse_args, save_checkpoint


def fresh_training():
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(vocab_size=11, block_size=8, n_layer=1, n_head=2, n_embd=16))
    return gpt, torch.optim.AdamW(gpt.parameters(), lr=0.01), torch.Generator().manual_seed(5)


def train(gpt, optimizer, generator, steps):
    for _ in range(steps):
        ids = torch.randint(11, (4, 8), generator=generator)
        loss = -token_logprobs(gpt.hidden(ids[:, :-1]), gpt.lm_head.weight, ids[:, 1:])[0].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_a_resumed_training_is_the_uninterrupted_one_to_the_bit(tmp_path):
    whole = fresh_training()
    train(*whole, 6)
    gpt, optimizer, g = fresh_training()
    train(gpt, optimizer, g, 2)
    save_checkpoint(tmp_path / "model.pt", model=gpt.state_dict(), optimizer=optimizer.state_dict(), generator=g.get_state(), step=2)
    gpt, optimizer, g = fresh_training()
    state = load_checkpoint(tmp_path / "model.pt")
    gpt.load_state_dict(state["model"]), optimizer.load_state_dict(state["optimizer"]), g.set_state(state["generator"])
    train(gpt, optimizer, g, 6 - state["step"])
    assert all(torch.equal(a, b) for a, b in zip(whole[0].parameters(), gpt.parameters()))
    assert torch.equal(whole[2].get_state(), g.get_state())


def test_an_interrupted_save_leaves_the_old_checkpoint_whole(tmp_path, monkeypatch):
    def interrupted(state, f):
        (f if hasattr(f, "write") else open(f, "wb")).write(b"half of it")
        raise KeyboardInterrupt

    save_checkpoint(tmp_path / "model.pt", step=1)
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(torch, "save", interrupted)
        save_checkpoint(tmp_path / "model.pt", step=2)
    assert load_checkpoint(tmp_path / "model.pt") == {"step": 1}


@pytest.mark.parametrize("damage", [lambda b: None, lambda b: b[:-100], lambda b: b[:10], lambda b: b"", lambda b: b"not a checkpoint"])
def test_a_missing_or_damaged_checkpoint_is_a_user_error_that_names_it(tmp_path, damage):
    path = tmp_path / "model.pt"
    save_checkpoint(path, weight=torch.randn(100))
    damaged = damage(path.read_bytes())
    path.unlink() if damaged is None else path.write_bytes(damaged)
    with pytest.raises(UserError, match=re.escape(str(path))):
        load_checkpoint(path)


@dataclasses.dataclass
class Config:
    out: str = flag("out/test", "folder")
    resume: bool = flag(False, "go on")
    quick: bool = flag(False, "seconds")
    steps: int = flag(100, "steps", quick=2, low=0)
    lr: float = flag(1e-3, "learning rate", low=0, high=1)
    beta: float = flag(0.0, "coefficient", low=0)
    loss: str = flag("grpo", "loss", choices=("grpo", "dapo"))
    window: int | None = flag(None, "an option without a default", low=1)


def test_flags_have_the_types_and_defaults_of_the_fields():
    assert parse_args(Config, "", []) == Config()
    config = parse_args(Config, "", "--steps 7 --lr 0.5 --loss dapo --window 3 --out x --quick".split())
    assert config == Config(out="x", quick=True, steps=7, lr=0.5, loss="dapo", window=3)


@pytest.mark.parametrize("flags", ["--nonsense", "--step 3", "--steps many", "--steps 1.5", "--steps -1", "--lr 2", "--beta nan", "--loss ppo",
                                   "--window 0", "--steps", "stray"])
def test_a_mistaken_flag_is_a_user_error(flags):
    with pytest.raises(UserError):
        parse_args(Config, "", flags.split())


def test_quick_sets_quick_values_and_explicit_flags_win():
    assert parse_args(Config, "", ["--quick"]).steps == 2
    assert parse_args(Config, "", ["--quick", "--steps", "9"]).steps == 9


def test_resume_takes_the_runs_flags_but_for_steps_and_refuses_contradictions(tmp_path):
    out = str(tmp_path)
    with pytest.raises(UserError):
        parse_args(Config, "", ["--resume", "--out", out])      # nothing there
    save_checkpoint(tmp_path / "model.pt", config=dataclasses.asdict(Config(out=out, lr=0.25, steps=5)))
    assert parse_args(Config, "", ["--resume", "--out", out]) == Config(out=out, lr=0.25, steps=5, resume=True)
    assert parse_args(Config, "", ["--resume", "--out", out, "--lr", "0.25", "--steps", "8"]).steps == 8
    with pytest.raises(UserError, match="lr"):
        parse_args(Config, "", ["--resume", "--out", out, "--lr", "0.5"])


@pytest.mark.parametrize("script", ["model.py", "grpo.py", "opd.py"])
def test_a_mistake_on_the_command_line_is_one_line_and_exit_code_2(tmp_path, script):
    done = subprocess.run([sys.executable, ROOT / script, "--nonsense"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(script + ": .*--nonsense.*\n", done.stderr)


@pytest.fixture
def handlers():
    """Run takes over two signals: give them back."""
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    yield
    for s, handler in before.items():
        signal.signal(s, handler)


def test_a_resumed_run_goes_on_from_the_checkpoints_rows(tmp_path, handlers):
    config = Config(out=str(tmp_path / "run"))
    run = Run(config)
    run.log(step=1)
    run.log(step=2)
    run.save("base", weight=torch.ones(3))
    run.log(step=3)     # after the checkpoint: made again
    again = Run(dataclasses.replace(config, resume=True))
    assert again.rows == [{"step": 1}, {"step": 2}] and torch.equal(again.state["base"]["weight"], torch.ones(3))
    again.log(step=3, again=True)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 1}, {"step": 2}, {"step": 3, "again": True}]
    assert json.loads((tmp_path / "run" / "config.json").read_text())["config"]["steps"] == 100


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_first_then_ends_the_process_with_its_code(tmp_path, handlers, number):
    run = Run(Config(out=str(tmp_path)))
    assert not run.due
    os.kill(os.getpid(), number)
    assert run.due
    with pytest.raises(SystemExit) as stopped:
        run.save("train", step=7)
    assert stopped.value.code == 128 + number
    assert load_checkpoint(tmp_path / "model.pt")["state"] == {"train": {"step": 7}}


# ---------------------------------------------------------------------------------------------------------------------------
# The machine

def test_no_test_reaches_beyond_this_machine(reached):
    """Every script runs in this process, `--quick`, under the fixture that this test tries out."""
    import urllib.request
    with pytest.raises(OSError):
        urllib.request.urlopen("http://huggingface.co", timeout=1)
    assert reached == ["huggingface.co"]
    reached.clear()


def test_a_run_without_triton_compiler_display_or_network(tmp_path):
    """A bare machine: the same folder in the end. Nothing in it can be found, drawn on or reached."""
    code = """if True:
        import socket, sys
        sys.modules["triton"] = None
        socket.socket.connect = socket.getaddrinfo = None
        import kernels, grpo, torch
        assert kernels.triton is None and not kernels.can_compile("cpu")
        kernels.token_logprobs(torch.randn(4, 8), torch.randn(5000, 8), torch.arange(4))
        grpo.command(grpo.main)"""
    env = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "WAYLAND_DISPLAY", "CXX")} | {"PATH": str(tmp_path), "MPLBACKEND": "TkAgg", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code, "--quick", "--out", tmp_path / "run"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "cpu, float32" in done.stdout.splitlines()[0], done.stderr
    assert check_whole(tmp_path / "run") == "train"
