"""bench.py: what is measured is what is said."""

import json
import os
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from common import complain, finish, launch

import bench
import engine


@pytest.fixture
def at_once(monkeypatch):
    """Everything in this process, and nothing compiled: seconds instead of a minute."""
    monkeypatch.setattr(bench, "apart", lambda f, *args, device: f(*args, device))
    monkeypatch.setattr(bench, "can_compile", lambda device: False)


def arguments(**values):
    return SimpleNamespace(
        **{**dict(device="cpu", quick=True, nanogpt=None, roof=dict(copy=1e9)), **values}
    )


# --------------------------------------------------------------------------------------------------
# kernels


@pytest.mark.parametrize(
    "work, shape, impl",
    [("token_logprobs", (64, 16, 500), "chunked"), ("attention", (1, 2, 32, 16), "sdpa")],
)
def test_the_benchmark_measures_both_passes_and_the_error_and_draws_them(
    tmp_path, work, shape, impl
):
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        forward, backward, mib, error = bench.measure(work, shape, dtype, impl, "cpu")
        assert forward > 0 and backward > 0 and mib >= 0 and 0 < error < tolerance
    row = dict(work=work, impl=impl, dtype="float32", intensity=100, flops=1e9, of_roof=0.5)
    bench.plot_roofline([row], dict(float32=2e9, bfloat16=4e9, copy=1e9), tmp_path / "kernels.png")
    assert (tmp_path / "kernels.png").stat().st_size > 10000


@pytest.mark.parametrize(
    "distort, error",
    [
        (lambda logp, entropy: (logp, 1.5 * entropy), 0.5),
        # gradients alone are wrong
        (lambda *outputs: [2 * o - o.detach() for o in outputs], 1),
    ],
)
def test_the_benchmarks_error_is_that_of_the_worst_output_or_gradient(monkeypatch, distort, error):
    right = bench.run
    monkeypatch.setattr(
        bench,
        "run",
        lambda work, impl, args: (
            right(work, impl, args) if impl == "reference" else distort(*right(work, impl, args))
        ),
    )
    assert bench.error("token_logprobs", torch.float32, "chunked", "cpu") == pytest.approx(
        error, abs=1e-3
    )


def test_the_benchmark_gives_medians_and_the_first_steps_memory(monkeypatch):
    ticks = [0]
    for forward, backward in ((90, 80), (1, 30), (2, 10), (6, 20)):  # the first warms up
        ticks += [ticks[-1], ticks[-1] + forward, ticks[-1] + forward + backward]
    clock = iter(ticks[1:])
    grown = 1000 + 5 * 2 ** (20 if sys.platform == "darwin" else 10)
    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    monkeypatch.setattr(
        "resource.getrusage",
        lambda _: SimpleNamespace(ru_maxrss=1000 if clock.__length_hint__() == 12 else grown),
    )
    assert bench.measure("attention", (1, 1, 8, 8), torch.float32, "sdpa", "cpu")[:3] == (2, 20, 5)
    assert next(clock, None) is None


def test_the_roof_is_the_fastest_product_and_copy(monkeypatch):
    n = 2048
    # seconds: fp32's, bf16's, the copy's best
    ticks = [t for best in (2, 4, 1) for i in range(6) for t in (0, best + (i - 3) ** 2)]
    clock = iter(ticks)
    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    monkeypatch.setattr(torch, "mm", lambda a, b, out: out.view(-1)[:1])
    peak = bench.roof("cpu")
    # emulated bf16: fp32's
    assert peak == dict(float32=2 * n**3 / 2, bfloat16=2 * n**3 / 2, copy=2 * 16 * n * n * 4)


def test_the_benchmark_counts_operations_bytes_and_ratios(monkeypatch, tmp_path):
    peak = dict(float32=1e9, bfloat16=2e9, copy=1e7)

    def apart(f, *args, device):
        seconds = 4 if args[3:4] == ("reference",) else 1
        return peak if f is bench.roof else (seconds / 4, 3 * seconds / 4, 25 * seconds, 1e-7)

    monkeypatch.setattr(bench, "apart", apart)
    monkeypatch.setattr(bench, "plot_roofline", lambda *args: None)
    monkeypatch.setattr(bench, "can_compile", lambda device: False)
    for _ in range(2):  # the second time into its own folder again
        finish("bench.py", "kernels", "--quick", "--device", "cpu", "--out", tmp_path)
    rows = json.loads((tmp_path / "benchmark.json").read_text())["kernels"]["rows"]
    assert [(r["work"], r["dtype"], r["impl"]) for r in rows] == [
        (work, dtype, impl)
        for work, fast in (("token_logprobs", "chunked"), ("attention", "sdpa"))
        for dtype in ("float32", "bfloat16")
        for impl in ("reference", fast)
    ]
    for r in rows:
        bytes_each, fast = 4 if r["dtype"] == "float32" else 2, r["impl"] != "reference"
        if r["work"] == "token_logprobs":
            N, C, V = r["shape"]
            flops = 2 * N * C * V + 2 * N * V * C + 2 * V * N * C  # z, dh, dW
            # h and W are read twice, their gradients written
            moved = 2 * (N * C + V * C) + (N * C + V * C)
        else:
            B, H, T, D = r["shape"]
            # S, O; S, dP, dV, dQ, dK, each of half a square
            flops = 7 * 2 * B * H * T * T * D / 2
            # q, k, v, o; these and do, dq, dk, dv
            moved = 4 * B * H * T * D + 8 * B * H * T * D
        intensity, seconds = flops / (moved * bytes_each), 1 if fast else 4
        bound = min(peak[r["dtype"]], peak["copy"] * intensity)
        assert [r[k] for k in ("seconds", "intensity", "flops", "of_roof")] == pytest.approx(
            [seconds, intensity, flops / seconds, flops / seconds / bound]
        )
        assert (r["time_ratio"], r["memory_ratio"]) == ((0.25, 0.25) if fast else (1, 1))


def test_a_kernel_without_memory_and_a_failing_peer_lose_their_rows_and_no_other_error_is_hidden(
    monkeypatch, at_once, capsys
):
    errors = dict(chunked=MemoryError("no more"), liger=ImportError("a\nlong story"))

    def measure(work, shape, dtype, impl, device):
        if impl in errors:
            raise errors[impl]
        return 1, 1, 1, None

    monkeypatch.setattr(bench, "measure", measure)
    monkeypatch.setattr(bench, "left_out", lambda impl, device: None)
    monkeypatch.setattr(
        bench,
        "kernel_jobs",
        lambda args: [
            ("token_logprobs", (2, 2, 2), "float32", ["reference", "chunked", "liger", "cce"])
        ],
    )
    args = arguments(roof=dict(float32=1, copy=1))
    rows = bench.measure_kernels(args)
    assert [(r["impl"], r["lacks"]) for r in rows] == [("reference", ""), ("cce", "no entropy")]
    out = capsys.readouterr().out
    assert "chunked: MemoryError: no more, row left out" in out
    assert "liger: ImportError: a, row left out" in out
    assert out.endswith("no entropy\n")
    errors["chunked"] = ValueError("a bug of ours")
    with pytest.raises(ValueError):
        bench.measure_kernels(args)


def test_peers_that_cannot_run_here_are_named(monkeypatch, at_once, capsys):
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    monkeypatch.setattr(bench, "no_triton", lambda x: "triton is not installed")
    assert {impl: bench.left_out(impl, "cpu") for impl in bench.MARKERS} == dict(
        reference=None,
        chunked=None,
        sdpa=None,
        compiled="no C++ compiler found",
        triton="triton is not installed",
        liger="not installed",
        cce="not installed",
        flash="not installed",
    )
    on_gpu = {impl for *_, impls in bench.kernel_jobs(arguments(device="cuda")) for impl in impls}
    assert on_gpu == set(bench.MARKERS)
    monkeypatch.setattr(bench, "measure", lambda *args: (1, 1, 1, 1))
    bench.measure_kernels(arguments(roof=dict(float32=1, bfloat16=1, copy=1)))
    bench.measure_sampling(arguments())
    bench.measure_training(arguments())
    out = capsys.readouterr().out
    assert all(
        words in out
        for words in (
            "triton, liger, cce, flash: need a GPU",
            "transformers: not installed",
            "nanoGPT: no checkout",
            "torch.compile: no C++",
        )
    )


def end(device):
    os._exit(9)


def test_a_process_apart_returns_raises_or_is_missed():
    parent = os.getpid()
    assert bench.apart(os.path.join, "a", device="b") == "a/b" and os.getpid() == parent
    with pytest.raises(ValueError, match="invalid literal"):
        bench.apart(int, device="x")
    # as when the system kills it
    with pytest.raises(MemoryError, match="ended without a result"):
        bench.apart(end, device="cpu")


# --------------------------------------------------------------------------------------------------
# sampling, training, decoding


def test_a_comparison_takes_turns_drops_the_first_round_and_sets_the_best_against_the_best(
    monkeypatch,
):
    now, order = [0.0], []
    seconds = dict(rollout=iter([99, 2, 4]), peer=iter([99, 10, 10]), faster=iter([1, 5, 5]))
    seconds["rollout, compiled"] = iter([99, 1, 3])

    def racer(name):
        def race():
            order.append(name)
            now[0] += next(seconds[name])
            return 60

        return race

    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    row = bench.compare("a race", {name: racer(name) for name in seconds}, "cpu")
    assert order == [*seconds] * 3
    assert row == dict(
        work="a race",
        tokens_per_s={"rollout": 22.5, "peer": 6, "faster": 12, "rollout, compiled": 40},
        ratio=40 / 12,
    )
    seconds["rollout"] = iter([1, 1, 1])
    assert bench.compare("alone", dict(rollout=racer("rollout")), "cpu")["ratio"] is None


def test_only_tokens_up_to_the_stop_token_count(monkeypatch):
    prompts, model = [[1, 2, 3], [4]], bench.GPT(bench.SIZES["4 x 128"])
    asked = {}

    def generate(input_ids, attention_mask, **flags):
        asked.update(flags, ids=input_ids.tolist(), mask=attention_mask.tolist())
        return torch.cat((input_ids, torch.tensor([[5, 0, 7, 7], [5, 6, 7, 0]])), 1)

    racers = bench.sampling_racers(model, SimpleNamespace(generate=generate), prompts, 1, 4, 0)
    assert racers["transformers"]() == 2 + 4 and asked["cache_implementation"] is None
    assert racers["transformers, static cache"]() == 2 + 4
    assert asked["cache_implementation"] == "static"
    assert asked["ids"] == [[1, 2, 3], [0, 0, 4]] and asked["mask"] == [[1, 1, 1], [0, 0, 1]]
    assert (
        bench.sampling_racers(model, SimpleNamespace(generate=generate), prompts, 1, 4, None)[
            "transformers"
        ]()
        == 8
    )
    with torch.no_grad():
        model.lm_head.weight.zero_()  # all 64 tokens are equally likely, the stop token too
    torch.manual_seed(0)
    assert bench.sampling_racers(model, None, prompts, 200, 4, 0)["rollout"]() < 2 * 200 * 4
    assert bench.sampling_racers(model, None, prompts, 2, 4, None)["rollout"]() == 2 * 2 * 4


NANOGPT = """
import torch
from dataclasses import dataclass

@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float
    bias: bool

class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.wte = torch.nn.Embedding(config.vocab_size, config.vocab_size)

    def forward(self, x, y):
        logits = self.wte(x)
        flat = logits.view(-1, logits.shape[-1])
        return logits, torch.nn.functional.cross_entropy(flat, y.view(-1))
"""


def test_a_training_step_of_ours_and_of_nanogpt_trains_and_counts_its_tokens(monkeypatch, tmp_path):
    (tmp_path / "model.py").write_text(NANOGPT)
    models = []
    monkeypatch.setattr(
        bench, "GPT", lambda config, make=bench.GPT: models.append(make(config)) or models[-1]
    )
    PeerGPT, PeerConfig = bench.load_nanogpt(tmp_path)
    nanogpt = lambda config: models.append(PeerGPT(config)) or models[-1], PeerConfig
    config = bench.GPTConfig(64, 16, 1, 2, 16)
    for dtype in bench.DTYPES.values():
        models.clear()
        racers = bench.training_racers(config, 3, dtype, "cpu", nanogpt, False)
        before = [[p.clone() for p in model.parameters()] for model in models]
        assert list(racers) == ["rollout", "nanoGPT"]
        assert [race() for race in racers.values()] == [3 * 16] * 2
        for model, old in zip(models, before, strict=True):
            assert all((p != q).any() for p, q in zip(model.parameters(), old, strict=True))
    assert list(bench.training_racers(config, 3, dtype, "cpu", nanogpt, True)) == [
        "rollout",
        "rollout, compiled",
        "nanoGPT",
        "nanoGPT, compiled",
    ]


def test_a_decoding_step_reads_all_weights_and_the_cache_of_its_rows(capsys):
    usual = engine.STATIC_ON
    (row,) = bench.measure_decoding(arguments())
    assert usual == engine.STATIC_ON
    config = bench.SIZES["4 x 128"]
    size = 2 if "bfloat16" in row["work"] else 4
    # of a row's cache, before and after a step
    lengths = [32 + t + 0.5 for t in range(8)]
    # 2 rows; keys and values
    cache = 2 * sum(lengths) / 8 * 2 * config.n_layer * config.n_embd * size
    assert row["step_bytes"] == pytest.approx(config.parameters * size + cache)
    share = row["tokens_per_s"]["rollout, eager"] / 2 * row["step_bytes"] / 1e9
    assert f"reads at {share:.0%} of the speed of a copy" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------
# The command


def test_all_parts_run_and_a_part_measured_again_replaces_its_own_rows_alone(tmp_path, at_once):
    (tmp_path / "nanogpt").mkdir()
    (tmp_path / "nanogpt/model.py").write_text(NANOGPT)
    flags = ["--quick", "--device", "cpu", "--out", tmp_path / "out"]
    out = finish("bench.py", "--nanogpt", tmp_path / "nanogpt", *flags)
    assert [line for line in out.splitlines() if line in bench.PARTS] == list(bench.PARTS)
    results = json.loads((tmp_path / "out/benchmark.json").read_text())
    assert list(results) == list(bench.PARTS) and all(part["rows"] for part in results.values())
    assert all(
        part["device"] == "cpu" and part["torch"] == torch.__version__ and part["roof"]["copy"] > 0
        for part in results.values()
    )
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"benchmark.json", "kernels.png"}
    finish("bench.py", "decoding", *flags)
    again = json.loads((tmp_path / "out/benchmark.json").read_text())
    assert {part for part in results if again[part] != results[part]} == {"decoding"}


@pytest.mark.parametrize(
    "flags, words",
    [
        (["everything"], "everything"),
        (["--against", "nobody"], "nobody"),
        (["training", "--nanogpt", "/nonexistent"], "/nonexistent"),
        (["sampling", "--nanogpt", "/nonexistent"], "--nanogpt does nothing"),
        (["sampling", "--steps", 3], "--steps"),
        (["--device", "tpu"], "tpu"),
    ],
)
def test_the_benchmark_refuses_at_once_what_it_cannot_do(tmp_path, flags, words):
    started = time.time()
    assert words in complain("bench.py", *flags, "--out", tmp_path / "out")
    assert time.time() - started < 5
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["import nobody_has_this", "x = 1", "(", "raise OSError('no')"])
def test_a_checkout_that_is_not_nanogpts_is_one_line_and_exit_code_2(tmp_path, text):
    (tmp_path / "model.py").write_text(text)
    assert "no checkout of nanoGPT" in complain(
        "bench.py", "--nanogpt", tmp_path, "--out", tmp_path / "out"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="has one")
def test_a_missing_gpu_is_one_line_and_exit_code_2(tmp_path):
    assert "--device cuda: this machine has none" in complain(
        "bench.py", "--device", "cuda", "--out", tmp_path / "out"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name, text",
    [
        ("kernels.png", "mine"),
        ("benchmark.json", "mine"),
        ("benchmark.json", "[]"),
        ("benchmark.json", "{}"),
        ("benchmark.json", "3"),
        ("benchmark.json", '{"rows": []}'),
        ("benchmark.json", '{"kernels": 1}'),
        ("benchmark.json", '{"kernels": {"rows": []}, "mine": {"rows": []}}'),
    ],
)
def test_the_benchmark_overwrites_no_file_that_no_benchmark_wrote(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert name in complain("bench.py", "--quick", "--out", tmp_path)
    assert [p.read_text() for p in tmp_path.iterdir()] == [text]
    assert "cannot write to" in complain("bench.py", "--quick", "--out", tmp_path / name)


def test_help_names_every_part_and_flag():
    code, out, _ = launch("bench.py", "--help")
    assert code == 0
    assert all(word in out for word in (*bench.PARTS, "--quick", "--device", "--nanogpt", "--out"))
