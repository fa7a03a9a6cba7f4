"""bench.py: what is measured is what is said."""
import json
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from common import (
    complain,
)

import bench


@pytest.mark.parametrize("work, shape, impl", [("token_logprobs", (64, 16, 500), "chunked"), ("attention", (1, 2, 32, 16), "sdpa")])
def test_the_benchmark_measures_both_passes_and_the_error_and_draws_them(tmp_path, work, shape, impl):
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        forward, backward, mib, error = bench.measure(work, shape, dtype, impl, "cpu")
        assert forward > 0 and backward > 0 and mib >= 0 and 0 < error < tolerance
    row = dict(work=work, impl=impl, dtype="float32", intensity=100, flops=1e9, of_roof=0.5)
    bench.plot_roofline([row], {torch.float32: 2e9, torch.bfloat16: 4e9, None: 1e9}, tmp_path / "kernels.png")
    assert (tmp_path / "kernels.png").stat().st_size > 10000
    assert bench.left_out("liger", torch.bfloat16, "cpu") == "needs a GPU"


@pytest.mark.parametrize("distort, error", [(lambda logp, entropy: (logp, 1.5 * entropy), 0.5),
                                            (lambda *outputs: [2 * o - o.detach() for o in outputs], 1)])      # gradients alone are wrong
def test_the_benchmarks_error_is_that_of_the_worst_output_or_gradient(monkeypatch, distort, error):
    right = bench.run
    monkeypatch.setattr(bench, "run", lambda work, impl, args: right(work, impl, args) if impl == "reference" else distort(*right(work, impl, args)))
    assert bench.error("token_logprobs", torch.float32, "chunked", "cpu") == pytest.approx(error, abs=1e-3)


def test_the_benchmark_gives_medians_and_the_first_steps_memory(monkeypatch):
    ticks = [0]
    for forward, backward in ((90, 80), (1, 30), (2, 10), (6, 20)):      # the first warms up
        ticks += [ticks[-1], ticks[-1] + forward, ticks[-1] + forward + backward]
    clock = iter(ticks[1:])
    grown = 1000 + 5 * 2 ** (20 if sys.platform == "darwin" else 10)
    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    monkeypatch.setattr("resource.getrusage", lambda _: SimpleNamespace(ru_maxrss=1000 if clock.__length_hint__() == 12 else grown))
    assert bench.measure("attention", (1, 1, 8, 8), torch.float32, "sdpa", "cpu")[:3] == (2, 20, 5)
    assert next(clock, None) is None


def test_the_roof_is_the_fastest_product_and_copy(monkeypatch):
    n = 2048
    ticks = [t for best in (2, 4, 1) for i in range(6) for t in (0, best + (i - 3) ** 2)]      # seconds: fp32's, bf16's, the copy's best
    clock = iter(ticks)
    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    monkeypatch.setattr(torch, "mm", lambda a, b, out: out.view(-1)[:1])
    peak = bench.roof("cpu")
    assert peak == {torch.float32: 2 * n ** 3 / 2, torch.bfloat16: 2 * n ** 3 / 2, None: 2 * 16 * n * n * 4}      # emulated bf16: fp32's


def test_the_benchmark_counts_operations_bytes_and_ratios(monkeypatch, tmp_path):
    peak = {torch.float32: 1e9, torch.bfloat16: 2e9, None: 1e7}

    def apart(f, *args):
        seconds = 4 if args[3:4] == ("reference",) else 1
        return peak if f is bench.roof else (seconds / 4, 3 * seconds / 4, 25 * seconds, 1e-7)
    monkeypatch.setattr(bench, "apart", apart)
    monkeypatch.setattr(bench, "plot_roofline", lambda *args: None)
    monkeypatch.setattr(bench, "can_compile", lambda device: False)
    monkeypatch.setattr(sys, "argv", ["bench.py", "--quick", "--device", "cpu", "--out", str(tmp_path)])
    bench.main()
    bench.main()      # into its own folder again
    rows = json.loads((tmp_path / "benchmark.json").read_text())["rows"]
    assert [(r["work"], r["dtype"], r["impl"]) for r in rows] == [(work, dtype, impl) for work, fast in (("token_logprobs", "chunked"), ("attention", "sdpa"))
                                                                  for dtype in ("float32", "bfloat16") for impl in ("reference", fast)]
    for r in rows:
        bytes_each, fast = 4 if r["dtype"] == "float32" else 2, r["impl"] != "reference"
        if r["work"] == "token_logprobs":
            N, C, V = r["shape"]
            flops = 2 * N * C * V + 2 * N * V * C + 2 * V * N * C                   # z, dh, dW
            moved = 2 * (N * C + V * C) + (N * C + V * C)                           # h and W are read twice, their gradients written
        else:
            B, H, T, D = r["shape"]
            flops = 7 * 2 * B * H * T * T * D / 2                                   # S, O; S, dP, dV, dQ, dK, each of half a square
            moved = 4 * B * H * T * D + 8 * B * H * T * D                           # q, k, v, o; these and do, dq, dk, dv
        intensity, seconds = flops / (moved * bytes_each), 1 if fast else 4
        bound = min(peak[getattr(torch, r["dtype"])], peak[None] * intensity)
        assert [r[k] for k in ("seconds", "intensity", "flops", "of_roof")] == pytest.approx([seconds, intensity, flops / seconds, flops / seconds / bound])
        assert (r["time_ratio"], r["memory_ratio"]) == ((0.25, 0.25) if fast else (1, 1))


def test_an_unknown_peer_is_one_line_and_exit_code_2(tmp_path):
    assert "no peer is called nobody" in complain("bench.py", "--against", "nobody", "--out", tmp_path / "out") and not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="has one")
def test_a_missing_gpu_is_one_line_and_exit_code_2(tmp_path):
    assert "--device cuda: this machine has none" in complain("bench.py", "--device", "cuda", "--out", tmp_path / "out") and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name, text", [("kernels.png", "mine"), ("benchmark.json", "mine"), ("benchmark.json", "[]"), ("benchmark.json", '{"rows": []}')])
def test_the_benchmark_overwrites_no_file_that_no_benchmark_wrote(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert name in complain("bench.py", "--quick", "--out", tmp_path)
    assert [p.read_text() for p in tmp_path.iterdir()] == [text]
    assert "cannot write to" in complain("bench.py", "--quick", "--out", tmp_path / name)


@pytest.mark.parametrize("flags, words", [(["--bench", "--nanogpt", "/nonexistent"], "/nonexistent"), (["--nanogpt", "/nonexistent"], "--nanogpt does nothing"),
                                          (["--bench", "--steps", 3], "--steps does nothing")])
def test_the_benchmark_refuses_at_once_what_it_cannot_do(flags, words):
    started = time.time()
    assert words in complain("model.py", *flags) and time.time() - started < 5
