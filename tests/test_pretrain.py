"""pretrain.py: what is held out is never trained on, a resumed run is the whole one."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from common import (
    ROOT,
    Memory,
    check_help,
    check_resume,
    check_whole,
    complain,
    finish,
    launch,
    metrics,
    seeded,
)

import experiment
import pretrain
from experiment import UserError, load_checkpoint
from model import GPT, GPTConfig
from tokenizer import train_bpe


def test_documents_come_from_the_standard_library_a_file_a_folder_or_a_dataset(tmp_path):
    assert any("import" in text for text in pretrain.load_documents(""))
    (tmp_path / "texts").mkdir()
    (tmp_path / "rows").mkdir()
    (tmp_path / "empty").mkdir()
    for name in ("b.txt", "a.md", "c.bin"):
        (tmp_path / "texts" / name).write_text(name)
    (tmp_path / "rows" / "data.jsonl").write_text(
        "".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(3))
    )
    assert pretrain.load_documents(str(tmp_path / "texts" / "b.txt")) == ["b.txt"]
    assert pretrain.load_documents(str(tmp_path / "texts")) == ["a.md", "b.txt"]
    # through datasets
    assert pretrain.load_documents(str(tmp_path / "rows")) == ["row 0", "row 1", "row 2"]
    with pytest.raises(UserError, match="empty"):
        pretrain.load_documents(str(tmp_path / "empty"))


@pytest.mark.parametrize(
    "rows, words",
    [
        ([{"text": "a"}, {"text": None}], "row 2 is no text but None"),
        ([{"text": 5}] * 3, "row 1 is no text but 5"),
    ],
)
def test_a_dataset_row_that_is_no_text_is_one_line_with_its_number(tmp_path, rows, words):
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=words):
        pretrain.load_documents(str(tmp_path))


@pytest.mark.parametrize("inside", ["", "a.txt"])
def test_a_text_that_cannot_be_read_is_one_line_that_names_it(tmp_path, monkeypatch, inside):
    (tmp_path / "a.txt").write_text("text")

    def denied(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_text", denied)
    error = complain(
        "pretrain.py", "--quick", "--data", tmp_path / inside, "--out", tmp_path / "out"
    )
    assert "a.txt" in error and "Permission denied" in error


def test_a_name_that_no_file_can_have_is_one_line():
    assert "name too long" in complain("pretrain.py", "--quick", "--data", "x" * 300).lower()


@pytest.mark.parametrize("sizes", [[200], [10, 990], [5000, *[10] * 9]])
def test_of_ten_documents_or_fewer_a_tenth_is_held_out_by_size(sizes):
    texts = ["".join(random.Random(n).choices("abc", k=n)) for n in sizes]
    train, held_out = pretrain.hold_out(texts)
    assert [a + b for a, b in zip(train, held_out, strict=True)] == texts
    assert sum(map(len, held_out)) == pytest.approx(sum(sizes) / 10, abs=len(sizes))


def test_of_more_than_ten_documents_every_tenth_is_held_out():
    assert pretrain.hold_out([str(i) for i in range(12)]) == (
        ["1", "2", "3", "4", "5", "6", "7", "8", "9", "11"],
        ["0", "10"],
    )


TINY = "--quick --device cpu --steps 10 --eval-every 4 --seeds 2 --batch 2 --block-size 16"


def written(folder, documents):
    """Texts of several bytes a character: one file, or one for each document, some in a folder of
    their own.
    """
    texts = [
        "".join(
            random.Random(i).choices(
                ["über ", "das ", "東京 ", "theme ", "these\n"], k=4000 // documents
            )
        )
        for i in range(documents)
    ]
    for i, text in enumerate(texts):
        path = folder / ("texts/more", "texts")[i < 10] / f"{i:02d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
    return texts, folder / "texts" / ("00.txt" if documents == 1 else "")


@pytest.mark.parametrize("documents", [1, 12])
def test_pretraining_is_measured_on_all_of_the_held_out_text_and_none_of_it_is_trained_on(
    tmp_path, documents, monkeypatch
):
    texts, data = written(tmp_path, documents)
    seen = []
    monkeypatch.setattr(
        pretrain, "train_bpe", lambda text, size: seen.append(text) or train_bpe(text, size)
    )
    finish("pretrain.py", *TINY.split(), "--data", data, "--out", tmp_path / "out")
    assert check_whole(tmp_path / "out", also=("samples.txt",)) == "pretrain"
    cut = len(texts[0]) * 9 // 10
    train, held_out = (
        (texts[1:10] + texts[11:], [texts[0], texts[10]])
        if documents > 1
        else ([texts[0][:cut]], [texts[0][cut:]])
    )
    assert seen == ["".join(train)]

    tokenizer, rows = train_bpe("".join(train), 300), metrics(tmp_path / "out")
    ids = [i for text in held_out for i in tokenizer.encode_ordinary(text) + [tokenizer.eos]]
    state, bits, data = (
        load_checkpoint(tmp_path / "out" / "model.pt")["state"],
        [],
        "".join(held_out).encode(),
    )
    windows = torch.tensor([ids[i : i + 17] for i in range(0, len(ids) - 16, 16)])
    assert len(windows) > 16 and len(windows) % 16  # a last part that is shorter
    for seed in range(2):
        gpt = GPT(GPTConfig(tokenizer.n_vocab, 16, 1, 4, 32, 2, qk_norm=True)).requires_grad_(False)
        gpt.load_state_dict(state[f"gpt {seed}"]["model"])
        nats = torch.nn.functional.cross_entropy(
            gpt(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten()
        )
        bits.append(float(nats) / np.log(2) * len(ids) / len(data))
        mine = [r for r in rows if r.get("seed") == seed]
        assert [(r["step"], r["tokens"]) for r in mine] == [(t, t * 2 * 16) for t in range(1, 11)]
        assert [r["step"] for r in mine if "val_loss" in r] == [4, 8, 10]
        np.testing.assert_allclose(
            (mine[-1]["val_loss"], mine[-1]["val_bits_per_byte"]),
            (float(nats), bits[seed]),
            rtol=1e-4,
        )
    (claim,) = json.loads((tmp_path / "out" / "claims.json").read_text())
    gzip = 8 * len(zlib.compress(data, 9)) / len(data)
    told = [float(x) for x in re.findall(r"[\d.]+", claim["ours"] + claim["threshold"])]
    assert told == [pytest.approx(x, rel=6e-2) for x in (np.mean(bits), np.std(bits, ddof=1), gzip)]
    assert claim["seeds"] == 2
    assert abs(bits[0] - bits[1]) > 0.003 and claim["holds"] == (np.mean(bits) <= gzip)


def test_pretraining_is_adamw_on_clipped_gradients_of_random_windows_from_a_seed_of_its_own():
    config = pretrain.Config(steps=4, seed=5, batch=3, block_size=8, eval_every=10, lr=0.03)
    ids, run = torch.randint(8, (100,), generator=seeded()), Memory()
    gpt_config = GPTConfig(8, 8, 1, 2, 64, 1)
    ours = pretrain.pretrain(config, run, 6, "cpu", gpt_config, pretrain.Corpus(ids, ids[:40], 1.0))
    torch.manual_seed(6)
    gpt, g = GPT(gpt_config), seeded(6)
    optimizer = torch.optim.AdamW(gpt.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(4):
        lr = experiment.lr_at(step, 4, 0.03)
        optimizer.param_groups[0]["lr"] = lr
        x = torch.stack([ids[i : i + 9] for i in torch.randint(92, (3,), generator=g)])
        loss = torch.nn.functional.cross_entropy(gpt(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        norm = torch.stack([p.grad.norm() for p in gpt.parameters()]).norm()
        for p in gpt.parameters():
            p.grad /= max(norm, 1)
        optimizer.step()
        np.testing.assert_allclose(
            (run.rows[step]["loss"], run.rows[step]["grad_norm"]),
            (loss.item(), norm.item()),
            rtol=1e-4,
        )
    assert run.rows[0]["grad_norm"] > 1.5
    for p, q in zip(ours.parameters(), gpt.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


def test_the_learning_rate_warms_up_then_falls_in_a_cosine_to_a_tenth():
    assert [experiment.lr_at(t, 1000, 2.0) for t in (0, 9, 500, 1000)] == pytest.approx(
        [0.1, 1.0, 1.1, 0.2]
    )
    assert experiment.lr_at(20, 1000, 2.0) == pytest.approx(2, rel=0.01)
    assert experiment.lr_at(250, 1000, 2.0) == pytest.approx(1.1 + 0.9 / 2**0.5)


def test_interrupt_and_resume_give_the_metrics_of_an_uninterrupted_pretraining_to_the_bit(tmp_path):
    check_resume(
        "pretrain.py",
        tmp_path,
        (dict(seed=0, step=3), dict(seed=1, step=7)),
        *TINY.split(),
        "--data",
        written(tmp_path, 1)[1],
    )


def interrupted_at(step, monkeypatch, *flags):
    """A pretraining that SIGTERM ends at a step of seed 0."""
    log = pretrain.Run.log

    def stopping(self, **row):
        log(self, **row)
        if row["step"] == step:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(pretrain.Run, "log", stopping)
        assert launch("pretrain.py", *flags)[0] == 143


def test_a_resumed_run_has_its_tokenizer_in_the_checkpoint_and_refuses_other_data(
    tmp_path, monkeypatch
):
    texts, data = written(tmp_path, 1)
    flags, out = [*TINY.split(), "--data", data, "--out"], tmp_path / "out"
    finish("pretrain.py", *flags, tmp_path / "whole")
    interrupted_at(3, monkeypatch, *flags, out)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    data.write_text(texts[0] + "one more", "utf-8")
    assert "--data" in complain("pretrain.py", "--resume", "--out", out)
    assert before == {p.name: p.read_bytes() for p in out.iterdir()}
    data.write_text(texts[0], "utf-8")
    monkeypatch.setattr(pretrain, "train_bpe", lambda *_: pytest.fail("trains the tokenizer again"))
    finish("pretrain.py", "--resume", "--out", out)
    assert metrics(out) == metrics(tmp_path / "whole")


@pytest.mark.parametrize("given", ["", "folder", "a/hub/id"])
def test_a_resumed_run_refuses_other_data_wherever_they_come_from(tmp_path, monkeypatch, given):
    texts = written(tmp_path, 12)[0]
    data = tmp_path / "texts" if given == "folder" else given
    if given != "folder":
        monkeypatch.setattr(pretrain, "load_documents", lambda data: [*texts])
    interrupted_at(2, monkeypatch, *TINY.split(), "--data", data, "--out", tmp_path / "out")
    texts.append("a new file")
    (tmp_path / "texts" / "new.txt").write_text(texts[-1])
    assert "is no longer what the run" in complain(
        "pretrain.py", "--resume", "--out", tmp_path / "out"
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_a_long_evaluation_is_heeded_at_once_and_nothing_is_lost(
    tmp_path, monkeypatch, number
):
    flags = [*TINY.split(), "--data", written(tmp_path, 1)[1], "--out"]
    finish("pretrain.py", *flags, tmp_path / "whole")
    scored, sent = pretrain.token_logprobs, []

    def slow(*args):
        if not torch.is_grad_enabled():
            if not sent:
                sent.append(time.time())
                os.kill(os.getpid(), number)
            time.sleep(2)
        return scored(*args)

    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "token_logprobs", slow)
        code, out, _ = launch("pretrain.py", *flags, tmp_path / "out")
    assert code == 128 + number and "--resume" in out and time.time() - sent[0] < 2
    # the evaluation is at the end of step 4
    assert [row["step"] for row in metrics(tmp_path / "out")] == [1, 2, 3]
    finish("pretrain.py", "--resume", "--out", tmp_path / "out")
    assert metrics(tmp_path / "out") == metrics(tmp_path / "whole")
    assert (tmp_path / "out" / "claims.json").read_text() == (
        tmp_path / "whole" / "claims.json"
    ).read_text()


def test_a_learning_rate_that_ruins_the_weights_is_one_line_and_the_last_finite_checkpoint_stays(
    tmp_path,
):
    flags = [*TINY.split(), "--lr", 1e30, "--data", written(tmp_path, 1)[1]]
    code, _, err = launch("pretrain.py", *flags, "--out", tmp_path / "out")
    assert code == 2
    assert re.search(
        r"pretrain.py: error: the (loss|gradient norm) is (nan|inf) at step \d+ of gpt 0; "
        r".*model.pt holds what was finite\n$",
        err,
    )
    assert all(np.isfinite(row["loss"]) for row in metrics(tmp_path / "out"))
    assert all(
        p.isfinite().all()
        for p in load_checkpoint(tmp_path / "out" / "model.pt")["state"]["gpt 0"]["model"].values()
    )
    assert not (tmp_path / "out" / "claims.json").exists()


def test_results_are_written_whatever_the_terminal_can_print_and_a_closed_pipe_is_no_traceback(
    tmp_path,
):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "cp1252"}
    flags = [*TINY.split(), "--seeds", "1", "--data", written(tmp_path, 1)[1]]
    command = [sys.executable, ROOT / "pretrain.py", *flags, "--out"]
    done = subprocess.run(
        [*command, tmp_path / "out"], env=environment, capture_output=True, timeout=120
    )
    assert done.returncode == 0, done.stderr.decode("cp1252")
    check_whole(tmp_path / "out", also=("samples.txt",))
    sample = (tmp_path / "out" / "samples.txt").read_text("utf-8")
    assert re.search("[東京]", sample) and "?" in done.stdout.decode("cp1252")
    piped = subprocess.Popen(
        [*command, tmp_path / "piped"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    piped.stdout.readline()
    piped.stdout.close()
    assert "Traceback" not in piped.stderr.read().decode("cp1252") and piped.wait(120) in (0, 141)
    assert all("step" in row for row in metrics(tmp_path / "piped"))


def test_help_names_every_flag():
    check_help("pretrain.py")


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--block-size", 9999], "too few"),
        (["--n-head", 5], "n_head 5"),
        (["--dtype", "int8"], "int8"),
        (["--n-layer", 100000000000], "--n-layer"),
        (["--n-layer", 4000000000], "parameters"),
        (["--n-embd", 100000000], "GiB"),
        (["--batch", 1000000000], "--batch"),
    ],
)
def test_a_mistake_is_one_line_and_harms_nothing(flags, words, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.pt").write_text("another run's")
    flags = ["--data", written(tmp_path, 1)[1], *flags, "--out", tmp_path / "out"]
    assert words in complain("pretrain.py", "--quick", *flags)
    assert [p.read_text() for p in (tmp_path / "out").iterdir()] == ["another run's"]


def test_compile_is_refused_where_it_cannot_work(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "can_compile", lambda device: False)
    monkeypatch.setattr(
        sys,
        "argv",
        ["pretrain.py", "--quick", "--compile", "--device", "cpu", "--out", str(tmp_path)],
    )
    with pytest.raises(UserError, match="--compile"):
        pretrain.main()
    assert not list(tmp_path.iterdir())
