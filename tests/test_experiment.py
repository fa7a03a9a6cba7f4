"""experiment.py: a checkpoint loses nothing, flags are typed and checked, a mistake is one line, an
interrupt saves first.
"""

import copy
import dataclasses
import importlib
import json
import math
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import pytest
import torch
from common import ROOT, check_whole

import experiment
import tasks
from experiment import (
    Flags,
    NotFinite,
    Run,
    UserError,
    band,
    claim,
    command,
    descend,
    flag,
    load_checkpoint,
    parse_args,
    pick_device,
    restore,
    save_checkpoint,
    seeds_of,
    series,
    snapshot,
)
from kernels import token_logprobs
from model import GPT, GPTConfig, need_memory
from tasks.wordproblems import fingerprint

SCRIPTS = [
    "reinforce.py",
    "grpo.py",
    "opd.py",
    "selfteach.py",
    "curriculum.py",
    "coverage.py",
    "ttt.py",
    "pretrain.py",
]


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
    whole, numbers = fresh_training(), random.Random(3)
    train(*whole, 6)
    gpt, optimizer, g = fresh_training()
    train(gpt, optimizer, g, 2)
    save_checkpoint(tmp_path / "model.pt", **snapshot(2, gpt, optimizer, numbers, g))
    gpt, optimizer, g = fresh_training()
    again = random.Random(4)
    step = restore(load_checkpoint(tmp_path / "model.pt"), gpt, optimizer, again, g)
    train(gpt, optimizer, g, 6 - step)
    assert all(
        torch.equal(a, b) for a, b in zip(whole[0].parameters(), gpt.parameters(), strict=True)
    )
    assert torch.equal(whole[2].get_state(), g.get_state()) and again.random() == numbers.random()


def test_a_snapshot_stands_still_while_training_goes_on_and_restores_all_of_it(tmp_path):
    gpt, optimizer, g = fresh_training()
    rng = random.Random(3)
    train(gpt, optimizer, g, 2)
    state = snapshot(2, gpt, optimizer, rng, g, dict(more="said"))
    weights, moments = (
        copy.deepcopy(gpt.state_dict()),
        copy.deepcopy(optimizer.state_dict()["state"]),
    )
    save_checkpoint(tmp_path / "model.pt", **state)
    train(gpt, optimizer, g, 2)
    drawn = rng.random()
    for kept in (state, load_checkpoint(tmp_path / "model.pt")):
        (gpt2, optimizer2, g2), rng2 = fresh_training(), random.Random(4)
        assert restore(None, gpt2, optimizer2, rng2) == 0
        assert (
            restore(kept, gpt2, optimizer2, rng2, g2) == 2
            and rng2.random() == drawn
            and kept["kept"] == {"more": "said"}
        )
        train(gpt2, optimizer2, g2, 2)
        assert all(
            torch.equal(p, q) for p, q in zip(gpt.parameters(), gpt2.parameters(), strict=True)
        )
        assert torch.equal(g.get_state(), g2.get_state())
        assert all(torch.equal(kept["model"][k], v) for k, v in weights.items())
        assert all(
            torch.equal(kept["optimizer"]["state"][i][k], v)
            for i, of in moments.items()
            for k, v in of.items()
        )


def test_a_snapshot_can_do_without_optimizer_and_generator():
    gpt, _, _ = fresh_training()
    state = snapshot(7, gpt, None, random.Random(3))
    assert state["optimizer"] is None
    assert state["generator"] is None
    assert restore(state, gpt, None, random.Random(4)) == 7


def test_an_interrupted_save_leaves_the_old_checkpoint_whole(tmp_path, monkeypatch):
    def interrupted(state, f):
        write = f.write if hasattr(f, "write") else Path(f).write_bytes
        write(b"half of it")
        raise KeyboardInterrupt

    save_checkpoint(tmp_path / "model.pt", step=1)
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(torch, "save", interrupted)
        save_checkpoint(tmp_path / "model.pt", step=2)
    assert load_checkpoint(tmp_path / "model.pt") == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda b: None,
        lambda b: b[:-100],
        lambda b: b[:10],
        lambda b: b"",
        lambda b: b"not a checkpoint",
    ],
)
def test_a_missing_or_damaged_checkpoint_is_a_user_error_that_names_it(tmp_path, damage):
    path = tmp_path / "model.pt"
    save_checkpoint(path, weight=torch.randn(100))
    damaged = damage(path.read_bytes())
    path.unlink() if damaged is None else path.write_bytes(damaged)
    with pytest.raises(UserError, match=re.escape(str(path))):
        load_checkpoint(path)


@dataclasses.dataclass
class Config(Flags):
    steps: int = flag(100, "steps", quick=2, low=0)
    lr: float = flag(1e-3, "learning rate", low=0, high=1)
    beta: float = flag(0.0, "coefficient", low=0)
    loss: str = flag("grpo", "loss", choices=("grpo", "dapo"))
    window: int = flag(None, "an option without a default", low=1)
    two_words: int = flag(1, "a name of two words")


@dataclasses.dataclass
class Other(Config):
    name = "other"


def test_flags_have_the_types_and_defaults_of_the_fields():
    assert parse_args(Config, "", []) == Config(out="out/test_experiment")
    assert parse_args(Config, "", ["--quick"]).out == "out/test_experiment_quick"
    flags = "--steps 7 --lr 0.5 --loss dapo --window 3 --out x --quick"
    assert parse_args(Config, "", flags.split()) == Config(
        out="x", quick=True, steps=7, lr=0.5, loss="dapo", window=3
    )


@pytest.mark.parametrize(
    "flags",
    [
        "--nonsense",
        "--step 3",
        "--steps many",
        "--steps 1.5",
        "--steps -1",
        "--lr 2",
        "--beta nan",
        "--loss ppo",
        "--window 0",
        "--steps",
        "stray",
    ],
)
def test_a_mistaken_flag_is_a_user_error(flags):
    with pytest.raises(UserError):
        parse_args(Config, "", flags.split())


def test_a_value_may_be_its_bound_and_two_words_are_joined_by_a_dash():
    flags = "--lr 1 --steps 0 --two-words 3 --out x"
    assert parse_args(Config, "", flags.split()) == Config(lr=1, steps=0, two_words=3, out="x")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_seed_is_what_every_generator_takes(script):
    Config = importlib.import_module(script.removesuffix(".py")).Config
    for seed in (0, 2**32 - 1):
        assert parse_args(Config, "", ["--seed", str(seed)]).seed == seed
        torch.manual_seed(10_000 + 1000 * seed)
    for seed in (-1, 2**32):
        with pytest.raises(UserError, match="--seed"):
            parse_args(Config, "", ["--seed", str(seed)])


def test_quick_sets_quick_values_and_explicit_flags_win():
    assert parse_args(Config, "", ["--quick"]).steps == 2
    assert parse_args(Config, "", ["--quick", "--steps", "9"]).steps == 9


def test_resume_takes_the_runs_flags_but_for_more_steps_and_refuses_contradictions(tmp_path):
    out, rest = str(tmp_path), dict(state={}, rows=0, revision="")
    with pytest.raises(UserError):
        parse_args(Config, "", ["--resume", "--out", out])  # nothing there
    save_checkpoint(
        tmp_path / "model.pt", config=dataclasses.asdict(Config(out=out, lr=0.25, steps=5)), **rest
    )
    assert parse_args(Config, "", ["--resume", "--out", out]) == Config(
        out=out, lr=0.25, steps=5, resume=True
    )
    assert (
        parse_args(Config, "", ["--resume", "--out", out, "--lr", "0.25", "--steps", "8"]).steps
        == 8
    )
    with pytest.raises(UserError, match="lr"):
        parse_args(Config, "", ["--resume", "--out", out, "--lr", "0.5"])
    with pytest.raises(UserError, match="5 steps: 4 are fewer"):
        parse_args(Config, "", ["--resume", "--out", out, "--steps", "4"])
    os.rename(tmp_path / "model.pt", tmp_path / "moved.pt")
    (tmp_path / "moved").mkdir()
    os.rename(tmp_path / "moved.pt", tmp_path / "moved" / "model.pt")
    assert parse_args(Config, "", ["--resume", "--out", str(tmp_path / "moved")]).out == str(
        tmp_path / "moved"
    )
    save_checkpoint(
        tmp_path / "model.pt",
        config={k: v for k, v in dataclasses.asdict(Config()).items() if k != "beta"},
        **rest,
    )
    with pytest.raises(UserError, match="another version"):
        parse_args(Config, "", ["--resume", "--out", out])
    save_checkpoint(tmp_path / "model.pt", config=dataclasses.asdict(Config(steps=None)), **rest)
    # what took no steps has none to lose
    assert parse_args(Config, "", ["--resume", "--out", out, "--steps", "1"]).steps == 1


@pytest.mark.parametrize(
    "content", [{"weight": torch.ones(2)}, {"config": {}, "model": {}}, torch.ones(2), 7]
)
def test_resuming_from_a_torch_file_that_no_run_wrote_is_a_user_error_that_names_it(
    tmp_path, content
):
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(UserError, match=re.escape(f"{tmp_path / 'model.pt'} is not a run's")):
        parse_args(Config, "", ["--resume", "--out", str(tmp_path)])


def test_auto_takes_the_fastest_device_and_a_missing_one_is_a_user_error(monkeypatch):
    for cuda, mps, best in ((True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda mps=mps: mps)
        assert pick_device("auto") == best and pick_device("cpu") == "cpu"
    with pytest.raises(UserError, match="cuda"):
        pick_device("cuda")


def test_a_mistake_on_the_command_line_is_one_line_and_exit_code_2(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "reinforce.py", "--nonsense"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch("reinforce.py: .*--nonsense.*\n", done.stderr)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_is_run_as_a_command(script):
    assert (
        (ROOT / script).read_text().endswith('\n\nif __name__ == "__main__":\n    command(main)\n')
    )


def test_only_a_users_mistake_is_one_line(capsys, monkeypatch):
    def fails(error):
        raise error

    monkeypatch.setattr(sys, "argv", ["folder/script.py"])
    with pytest.raises(SystemExit) as stopped:
        command(lambda: fails(UserError("no")))
    assert stopped.value.code == 2 and capsys.readouterr().err == "script.py: error: no\n"
    with pytest.raises(ValueError):
        command(lambda: fails(ValueError("a bug")))


@pytest.fixture
def handlers():
    """Run takes over two signals: give them back."""
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    yield
    for s, handler in before.items():
        signal.signal(s, handler)


def saved(run, phase, **state):
    run.keep(phase, state)
    run.save()


def test_a_resumed_run_goes_on_from_the_checkpoints_rows(tmp_path, handlers):
    config = Config(out=str(tmp_path / "run"))
    run = Run(config)
    run.log(step=1)
    run.log(step=2)
    saved(run, "base", weight=torch.ones(3))
    run.log(step=3)  # after the checkpoint: made again
    again = Run(dataclasses.replace(config, resume=True))
    assert again.rows == [{"step": 1}, {"step": 2}]
    assert torch.equal(again.state["base"]["weight"], torch.ones(3))
    again.log(step=3, again=True)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 1},
        {"step": 2},
        {"step": 3, "again": True},
    ]
    assert json.loads((tmp_path / "run" / "config.json").read_text())["config"]["steps"] == 100


def test_a_new_run_in_an_old_folder_forgets_all_of_the_old_one_and_a_resumed_one_nothing(
    tmp_path, handlers
):
    run = Run(Config(out=str(tmp_path)))
    whole = {
        "config.json",
        "metrics.jsonl",
        "model.pt",
        "claims.json",
        "cost.json",
        "test_experiment.png",
        "mine.png",
    }
    run.log(step=1)
    saved(run, "base", step=1)
    saved(run, "train", step=2)
    assert load_checkpoint(tmp_path / "model.pt")["state"] == {
        "base": {"step": 1},
        "train": {"step": 2},
    }
    run.finish(plt.figure(), [])
    (tmp_path / "mine.png").touch()
    Run(Config(out=str(tmp_path), resume=True))
    assert {p.name for p in tmp_path.iterdir()} == whole
    again = Run(Other(out=str(tmp_path)))
    assert again.rows == [] and again.state == {} and (tmp_path / "metrics.jsonl").read_text() == ""
    assert {p.name for p in tmp_path.iterdir()} == whole - {
        "model.pt",
        "claims.json",
        "cost.json",
        "test_experiment.png",
    }


@pytest.mark.parametrize(
    "theirs", ['{"model_type": "llama"}', '{"config": 3}', "[1]", "7", "{", ""]
)
def test_a_folder_with_a_config_that_no_run_wrote_is_refused_and_not_touched(
    tmp_path, handlers, theirs
):
    (tmp_path / "config.json").write_text(theirs)
    (tmp_path / "model.pt").touch()
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "config.json"))):
        Run(Config(out=str(tmp_path)))
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {
        "config.json": theirs,
        "model.pt": "",
    }


def test_rows_that_are_missing_are_a_user_error(tmp_path, handlers):
    run = Run(Config(out=str(tmp_path)))
    run.log(step=1)
    run.log(step=2)
    saved(run, "base")
    for damaged in ('{"step": 1}\n', '{"step": 1}\n{"st'):
        (tmp_path / "metrics.jsonl").write_text(damaged)
        with pytest.raises(UserError, match="2 rows"):
            Run(Config(out=str(tmp_path), resume=True))


def test_a_resumed_run_names_the_code_that_began_it_and_the_code_that_went_on(
    tmp_path, handlers, monkeypatch
):
    for revision, named in (("a1", "a1"), ("a1", "a1"), *2 * [("b2", "a1, resumed at b2")]):
        monkeypatch.setattr(experiment, "revision", lambda revision=revision: revision)
        run = Run(Config(out=str(tmp_path), resume=(tmp_path / "model.pt").exists()))
        saved(run, "base")
        assert (
            run.revision == named == json.loads((tmp_path / "config.json").read_text())["revision"]
        )


def test_a_row_is_logged_once(tmp_path, handlers):
    run = Run(Config(out=str(tmp_path)))
    run.log(step=1, arm="other")
    run.log(step=2, arm="this")
    for value in (3, 4):
        run.log_once(lambda value=value: {"reward": value}, step=1, arm="this")
    assert run.rows[2:] == [dict(step=1, arm="this", reward=3)]


def test_a_save_is_due_after_half_a_minute_or_twenty_times_what_one_takes(
    tmp_path, handlers, monkeypatch
):
    run, now = Run(Config(out=str(tmp_path))), time.time()
    for cost, seconds, due in ((0, 29, False), (0, 31, True), (10, 199, False), (10, 201, True)):
        run.saved, run.save_seconds = now, cost
        monkeypatch.setattr(time, "time", lambda then=now + seconds: then)
        assert bool(run.due) == due


def test_a_claim_holds_at_its_threshold_and_on_its_side_of_it(tmp_path, handlers, capsys):
    assert [
        claim("x", "", "", "", v, op, 1, 1)["holds"] for op in (">=", "<=") for v in (0.9, 1, 1.1)
    ] == [False, True, True, True, True, False]
    rows = [
        claim("a", "a claim", "-", "-", torch.tensor(0.12345), ">=", 0.5, 2, " (0.1)"),
        claim("b", "other", "-", "-", 0.5, ">=", 0.5, 2),
    ]
    assert rows[0] == dict(
        id="a",
        claim="a claim",
        source="-",
        paper="-",
        ours="0.123 (0.1)",
        threshold=">= 0.5",
        holds=False,
        seeds=2,
    )
    Run(Config(out=str(tmp_path))).finish(plt.figure(), rows)
    assert json.loads((tmp_path / "claims.json").read_text()) == rows
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()[-4:-2]] == [
        "NO",
        "yes",
    ]


def test_a_series_has_the_steps_of_every_seed_and_a_band_their_mean_and_spread():
    assert list(seeds_of(SimpleNamespace(seed=3, seeds=2))) == [3, 4]
    rows = [
        dict(seed=s, step=t, arm=arm, phase="rl", reward=10 * s + t)
        for arm in "ab"
        for s in (4, 3)
        for t in (3, 1, 2)
        if (s, t) != (4, 3)
    ]
    x, y = series(
        SimpleNamespace(
            rows=[
                *rows,
                dict(seed=3, step=9, arm="a", phase="rl"),
                dict(seed=3, step=1, arm="a", phase="sft", reward=0),
            ]
        ),
        "reward",
        arm="a",
        phase="rl",
    )
    assert x.tolist() == [1, 2] and y.tolist() == [[31, 32], [41, 42]]
    assert not len(series(SimpleNamespace(rows=rows), "reward", arm="c")[0])
    ax = plt.figure().add_subplot()
    band(ax, x, y, "reward")
    band(ax, x, y[:1], "one seed")
    assert [line.get_ydata().tolist() for line in ax.lines] == [[36, 37], [31, 32]]
    edges = [
        (p.vertices[:, 1].min(), p.vertices[:, 1].max())
        for c in ax.collections
        for p in c.get_paths()
    ]
    # 50: the variance of 31 and 41 over 2 - 1
    assert edges == [pytest.approx((36 - 50**0.5, 37 + 50**0.5)), pytest.approx((31, 32))]
    plt.close("all")


def losses(run, steps, fresh, surprise=lambda step: None, **flags):
    """A small training through run.loop -> its weights. surprise(step) is called as an evaluation
    would be: after the step, before the row.
    """
    gpt, optimizer, generator = fresh
    kept = dict(seen=0)
    for step in run.loop(
        "train", steps, gpt, optimizer, random.Random(0), generator, kept, **flags
    ):
        ids = torch.randint(11, (4, 8), generator=generator)
        loss = -token_logprobs(gpt.hidden(ids[:, :-1]), gpt.lm_head.weight, ids[:, 1:])[0].mean()
        optimizer.zero_grad()
        loss.backward()
        descend(optimizer, loss)
        kept["seen"] += 1
        surprise(step)
        run.log(step=step + 1, loss=loss.item(), seen=kept["seen"])
    return gpt


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_within_a_step_ends_the_run_at_once_and_a_resumed_run_is_the_whole_one_to_the_bit(
    tmp_path, number, capsys
):
    with Run(Config(out=str(tmp_path / "whole"))) as whole:
        weights = losses(whole, 6, fresh_training())
    after = []

    def surprise(step):
        if step == 3:
            os.kill(os.getpid(), number)
            after.append("an evaluation that went on")

    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as stopped, Run(Config(out=str(tmp_path / "run"))) as run:
        losses(run, 6, fresh_training(), surprise)
    assert stopped.value.code == 128 + number
    assert not after
    assert "--resume" in capsys.readouterr().out
    assert signal.getsignal(number) == before
    with Run(Config(out=str(tmp_path / "run"), resume=True)) as again:
        assert 0 < len(again.rows) == again.state["train"]["step"] <= 3
        assert again.rows == whole.rows[: len(again.rows)]
        resumed = losses(again, 6, fresh_training())
    assert again.rows == whole.rows
    assert all(map(torch.equal, weights.parameters(), resumed.parameters()))
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == (
        tmp_path / "whole" / "metrics.jsonl"
    ).read_text()


def test_a_signal_while_a_row_is_written_waits_for_its_end(tmp_path, monkeypatch):
    with pytest.raises(SystemExit) as stopped, Run(Config(out=str(tmp_path))) as run:
        seek = run.metrics.seek
        run.metrics = SimpleNamespace(
            seekable=lambda: True,
            write=run.metrics.write,
            close=run.metrics.close,
            seek=lambda *at: (os.kill(os.getpid(), signal.SIGTERM), seek(*at))[1],
        )
        run.log(step=1)
    assert stopped.value.code == 143 and (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'


@pytest.mark.parametrize("mark", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_there_is_a_run_is_no_traceback(mark, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["script.py"])
    with pytest.raises(SystemExit) as stopped:
        command(lambda: os.kill(os.getpid(), mark))
    assert stopped.value.code == 128 + mark and capsys.readouterr().err == ""


def test_a_resumed_run_that_is_interrupted_at_once_loses_nothing(tmp_path):
    with Run(Config(out=str(tmp_path))) as run:
        losses(run, 2, fresh_training())
    for _ in range(2):
        with pytest.raises(SystemExit), Run(Config(out=str(tmp_path), resume=True)) as again:
            assert again.rows == run.rows
            raise SystemExit(130)


def test_until_ends_a_loop_and_what_it_carries_comes_back(tmp_path):
    with Run(Config(out=str(tmp_path))) as run:
        kept = dict(seen=0)
        for _ in run.loop(
            "train",
            10**9,
            *fresh_training()[:2],
            random.Random(0),
            kept=kept,
            until=lambda: kept["seen"] >= 5,
        ):
            kept["seen"] += 2
    with Run(Config(out=str(tmp_path), resume=True)) as run:
        assert run.state["train"]["step"] == 3
        kept = dict(seen=0)
        assert not list(
            run.loop(
                "train",
                10**9,
                *fresh_training()[:2],
                random.Random(0),
                kept=kept,
                until=lambda: kept["seen"] >= 5,
            )
        )
        assert kept == dict(seen=6)


def test_rows_logged_outside_of_loops_survive_and_rows_inside_go_with_their_state(tmp_path):
    with pytest.raises(SystemExit), Run(Config(out=str(tmp_path))) as run:
        run.log_once(lambda: dict(x=1), step=0)
        for step in run.loop("train", 3, *fresh_training()[:2], random.Random(0)):
            run.kept, run.keep_seconds = time.time(), 1000  # too dear to keep again
            run.log_once(lambda: dict(x=2), step=step + 1)
            if step == 1:
                raise SystemExit(130)
    with Run(Config(out=str(tmp_path), resume=True)) as again:
        assert again.rows == [dict(step=0, x=1)] and "train" not in again.state


# --------------------------------------------------------------------------------------------------
# Numbers that are none


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_loss_or_gradient_that_is_no_number_ends_the_run_and_keeps_the_last_finite_state(
    tmp_path, number
):
    gpt, optimizer, generator = fresh_training()

    def spoil(step):
        if step == 2:
            # found in the next loss, or when the state is kept
            next(gpt.parameters()).data.view(-1)[0] = number

    kept = re.escape(str(tmp_path / "model.pt"))
    said = f"at step [34] of train; {kept} holds what was finite"
    with pytest.raises(NotFinite, match=said), Run(Config(out=str(tmp_path))) as run:
        losses(run, 6, (gpt, optimizer, generator), spoil)
    saved = load_checkpoint(tmp_path / "model.pt")
    assert saved["state"]["train"]["step"] in (1, 2)
    assert all(p.isfinite().all() for p in saved["state"]["train"]["model"].values())
    assert [
        json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ] == [1, 2, 3]
    for loss, gradient in ((number, 1.0), (1.0, number)):
        weight = torch.nn.Parameter(torch.ones(3))
        weight.grad = torch.full((3,), gradient)
        with pytest.raises(NotFinite, match="loss|gradient norm"):
            descend(torch.optim.SGD([weight], 1.0), loss)
        assert weight.tolist() == [1, 1, 1]


def test_weights_that_are_no_numbers_are_never_saved(tmp_path):
    gpt, optimizer, _ = fresh_training()
    with (
        pytest.raises(NotFinite, match="a weight is no longer finite at step 2"),
        Run(Config(out=str(tmp_path))) as run,
    ):
        for step in run.loop("train", 2, gpt, optimizer, random.Random(0)):
            if step == 1:
                # a step so long that fp32 ends
                next(gpt.parameters()).data.view(-1)[0] = math.inf
    assert load_checkpoint(tmp_path / "model.pt")["state"]["train"]["step"] == 1


def test_a_step_cuts_the_gradient_and_tells_the_norm_before_the_cut():
    weight = torch.nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([3.0, 4.0])
    assert descend(torch.optim.SGD([weight], 1.0), torch.tensor(0.5)) == pytest.approx(5)
    assert weight.tolist() == pytest.approx([-0.6, -0.8], abs=1e-5)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_metrics_are_strict_json(tmp_path, number):
    with pytest.raises(NotFinite, match="reward is"), Run(Config(out=str(tmp_path))) as run:
        run.log(step=1, reward=None)
        run.log(step=2, reward=number)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "reward": null}\n'


def test_no_claim_holds_of_what_is_no_number_or_on_a_tie_with_0():
    assert not any(
        claim("x", "", "", "", value, op, 1, 1)["holds"]
        for value in (math.nan, [math.nan, 5], [5, math.inf], -math.inf)
        for op in (">=", "<=", ">", "<")
    )
    assert [
        claim("x", "", "", "", v, op, 0, 1)["holds"] for op in (">", "<") for v in (-1, 0, 1)
    ] == [False, False, True, True, False, False]
    for op in (">=", "<="):
        with pytest.raises(AssertionError, match="tie"):
            claim("x", "", "", "", 1, op, 0, 1)


# --------------------------------------------------------------------------------------------------
# Whose folder, whole files

MINE = ("model.pt", "claims.json", "metrics.jsonl", "test_experiment.png", "base.pt")


@pytest.mark.parametrize("name", MINE)
@pytest.mark.parametrize("resume", [False, True])
def test_a_file_that_no_run_wrote_is_never_deleted_or_overwritten(tmp_path, name, resume):
    (tmp_path / name).write_text("mine")
    (tmp_path / "model.tmp").write_text("mine")
    (tmp_path / "other.png").write_text("mine")
    with pytest.raises(
        UserError,
        match=re.escape(f"{tmp_path} holds {name}, which no run wrote")
        if not resume
        else "checkpoint|not a run's",
    ):
        if resume:
            parse_args(Config, "", ["--resume", "--out", str(tmp_path)])
        Run(Config(out=str(tmp_path)), also=("base.pt",))
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == dict.fromkeys(
        [name, "model.tmp", "other.png"], "mine"
    )


def test_a_runs_folder_may_hold_files_of_yours_under_other_names(tmp_path):
    for name in ("model.tmp", "other.png", "notes"):
        (tmp_path / name).write_text("mine")
    for _ in range(2):
        with Run(Config(out=str(tmp_path))) as run:
            run.log(step=1)
            saved(run, "train", step=1)
            run.finish(plt.figure(), [])
    assert all(
        (tmp_path / name).read_text() == "mine" for name in ("model.tmp", "other.png", "notes")
    )
    with pytest.raises(UserError, match="other.png"):  # the figure of this one
        Run(Other(out=str(tmp_path)))
    plt.close("all")


@pytest.fixture
def full_disk():
    """Call it: from then on a file can hold no more than `size` bytes, as if the disk were full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_on_a_full_disk_a_file_is_whole_or_as_it_was_and_nothing_else_is_left(tmp_path, full_disk):
    with Run(Config(out=str(tmp_path))) as run:
        run.log(step=1)
        saved(run, "train", weight=torch.ones(10))
        run.write("claims.json", "[]")
        before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
        full_disk(30)
        for write in (
            lambda: saved(run, "train", weight=torch.ones(100_000)),
            lambda: run.write("claims.json", "x" * 100),
            lambda: run.finish(plt.figure(), []),
            lambda: run.log(step=2, text="x" * 100),
            lambda: save_checkpoint(tmp_path / "new.pt", weight=torch.ones(100_000)),
        ):
            with pytest.raises(UserError, match="cannot write"):
                write()
        full_disk(2**40)
        assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
        run.log(step=2)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'
    plt.close("all")


def test_resume_refuses_inputs_that_have_changed(tmp_path):
    data, out = tmp_path / "data", str(tmp_path / "run")
    data.mkdir()
    (data / "a.txt").write_text("one")
    first = fingerprint(data)
    with Run(Config(out=out), inputs={"--data": first}) as run:
        saved(run, "train", step=1)
    with Run(Config(out=out, resume=True), inputs={"--data": fingerprint(data)}) as run:
        assert run.state["train"] == {"step": 1}
    (data / "a.txt").write_text("two")
    assert fingerprint(data) != first
    assert fingerprint(data / "a.txt") != first
    assert fingerprint("some/hub-id") == "some/hub-id"
    with pytest.raises(UserError, match="--data is no longer what"):
        Run(Config(out=out, resume=True), inputs={"--data": fingerprint(data)})


# --------------------------------------------------------------------------------------------------
# The terminal

PRINTS = """import sys
sys.path.insert(0, {root!r})
import experiment as run, test_experiment as t
def main():
    with run.Run(t.Config(out=sys.argv[1])) as r:
        for step in range(3):
            print("pass@1 .3 \u2192 .9")
            r.log(step=step)
        r.write("claims.json", "[]")
run.command(main)
"""


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_results_are_written_whatever_the_terminal_can_print(tmp_path, encoding):
    done = subprocess.run(
        [sys.executable, "-c", PRINTS.format(root=str(ROOT)), tmp_path / "run"],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": encoding, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
    )
    assert done.returncode == 0 and done.stderr == b"" and b"pass@1 .3 ? .9" in done.stdout
    assert (tmp_path / "run" / "claims.json").read_text() == "[]"


def test_a_closed_pipe_ends_the_run_without_a_traceback_and_saves_first(tmp_path):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-uc", PRINTS.format(root=str(ROOT)), tmp_path / "run"],
        stdout=write,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
    )
    os.close(write)
    assert done.returncode == 141
    assert done.stderr == b""
    assert (tmp_path / "run" / "model.pt").exists()


def test_more_memory_than_the_machine_has_is_one_line(monkeypatch, capsys):
    need_memory(2**20, "a model")
    with pytest.raises(UserError, match=r"a model: 1,048,576\.0 GiB, of which this machine has"):
        need_memory(2**50, "a model")
    monkeypatch.setattr(sys, "argv", ["script.py"])
    for work in (lambda: torch.empty(2**60), lambda: bytearray(2**62)):
        with pytest.raises(SystemExit) as stopped:
            command(work)
        assert stopped.value.code == 2
        assert re.fullmatch("script.py: error: out of memory .*\n", capsys.readouterr().err)


def test_resume_refuses_a_task_whose_file_has_changed(tmp_path):
    @dataclasses.dataclass
    class Tasked(Config):
        task: str = flag("addition", "a task")

    path = tmp_path / "mine.py"
    path.write_text("one")
    config = Tasked(out=str(tmp_path / "out"), task=str(path))
    with Run(config) as run:
        run.save()
    config.resume = True
    with Run(config):
        pass
    path.write_text("two")
    with pytest.raises(UserError, match="the file of --task .* is no longer what the run"):
        Run(config)


def test_a_number_that_no_arithmetic_holds_is_a_user_error():
    for flags in (["--beta", "1e300"], ["--steps", str(10**30)]):
        with pytest.raises(UserError, match="must be from"):
            parse_args(Config, "", flags)


@pytest.mark.parametrize(
    "name", ["nothing", "no.py", "/" + "x" * 300, "/" + "x" * 300 + ".py", "__init__", "..", ""]
)
def test_a_task_that_is_none_is_a_user_error_that_names_it(name):
    with pytest.raises(UserError, match="task "):
        tasks.load(name)


def test_a_flag_that_does_nothing_beside_the_others_is_a_user_error_that_says_why():
    class Idle(Config):
        def idle(self):
            return {"beta": "there are no --steps"} if self.steps == 0 else {}

    assert parse_args(Idle, "", ["--steps", "0"]).steps == 0
    assert parse_args(Idle, "", ["--beta", "0.5"]).beta == 0.5
    with pytest.raises(UserError, match="--beta does nothing here: there are no --steps"):
        parse_args(Idle, "", ["--beta", "0.5", "--steps", "0"])


# --------------------------------------------------------------------------------------------------
# The machine


def test_no_test_reaches_beyond_this_machine(reached):
    """Every script runs in this process, `--quick`, under the fixture that this test tries out."""
    import urllib.request

    with pytest.raises(OSError):
        urllib.request.urlopen("http://huggingface.co", timeout=1)
    assert reached == ["huggingface.co"]
    reached.clear()


def test_a_run_without_triton_compiler_display_or_network(tmp_path):
    """A bare machine: the same folder in the end. Nothing there can be found, drawn on, reached."""
    code = """if True:
        import socket, sys
        sys.modules["triton"] = None
        socket.socket.connect = socket.getaddrinfo = None
        import kernels, grpo, torch
        assert kernels.triton is None and not kernels.can_compile("cpu")
        kernels.token_logprobs(torch.randn(4, 8), torch.randn(5000, 8), torch.arange(4))
        grpo.command(grpo.main)"""
    env = {
        k: v for k, v in os.environ.items() if k not in ("DISPLAY", "WAYLAND_DISPLAY", "CXX")
    } | {"PATH": str(tmp_path), "MPLBACKEND": "TkAgg", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, "--quick", "--out", tmp_path / "run"],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "1 in all, cpu" in done.stdout.splitlines()[0], done.stderr
    assert check_whole(tmp_path / "run", also=("samples.txt",)) == "grpo"
