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
import decoding
import engine
import meter
import peers
import roof


@pytest.fixture
def at_once(monkeypatch):
    """Everything in this process, and nothing compiled: seconds instead of a minute."""
    monkeypatch.setattr(bench, "apart", lambda f, *args, device: f(*args, device))
    monkeypatch.setattr(bench, "can_compile", lambda device: False)


def arguments(**values):
    """What `parse` makes of --quick."""
    usual = dict(device="cpu", quick=True, part=None, nanogpt=None, works=bench.WORKS["quick"])
    return SimpleNamespace(**{**usual, "roof": ROOF, **values})


ROOF = dict(float32=1e9, bfloat16=2e9, copy=1e7)


def stopwatch(monkeypatch, seconds):
    """time.perf_counter gives what `seconds` does."""
    monkeypatch.setattr(roof, "time", SimpleNamespace(perf_counter=seconds))


# --------------------------------------------------------------------------------------------------
# Rows


def a_row(who, turns, **more):
    return bench.row("a race", who, "float32", turns, ROOF, gib=None, note="", **more)


def test_a_limit_is_the_products_or_the_memory_whichever_takes_longer():
    # seconds, tokens, FLOPs, bytes: 4e9 / 1e9 = 4 s of products, 2e7 / 1e7 = 2 s of copying
    row = a_row("rollout", [(16, 80, 4e9, 2e7)])
    assert (row["tokens_per_s"], row["limit"], row["bound"]) == (5, 20, "products")
    assert row["reached"] == row["mfu"] == 4 / 16
    assert (row["flops"], row["intensity"]) == (4e9 / 16, 200)
    row = a_row("rollout", [(16, 80, 4e9, 8e7)])
    assert (row["limit"], row["bound"], row["reached"], row["mfu"]) == (10, "memory", 0.5, 0.25)
    fast = bench.row("a race", "rollout", "bfloat16", [(16, 80, 4e9, 1)], ROOF)
    assert fast["mfu"] == 2 / 16


def test_a_rows_speed_is_the_median_of_its_turns():
    turns = [(10, 60, 1, 1), (2, 60, 1, 1), (4, 60, 1, 1)]
    assert a_row("rollout", turns)["tokens_per_s"] == 15


def test_rows_are_printed_in_one_form_with_the_ratio_to_the_fastest_peer(capsys):
    rows = [
        a_row("rollout", [(1, 3000, 1e9 / 2, 1)]),
        a_row("transformers, static cache", [(1, 1200, 1e9, 1)]),
        a_row("sdpa", [(1, 800, 1e9 / 4, 1e7)]),
        a_row("nanoGPT", [(1, 1000, 1e9 / 8, 1)]),
    ]
    rows[0] |= dict(gib=1.5, note="warm")
    assert bench.show(rows) is rows
    assert [row["ratio"] for row in rows] == [2.5, 1, 800 / 1200, 1000 / 1200]
    title, *lines = capsys.readouterr().out.splitlines()
    assert title == "a race"
    # each value ends where its heading does
    head = f"{'':<32}{bench.HEAD}"
    columns = ("tokens/s", "x peer", "limit", "reached", "MFU", "GiB")
    ends = [head.index(name) + len(name) for name in columns]
    assert [[line[:end].split()[-1] for end in ends] for line in lines] == [
        ["3,000", "2.5", "6,000", "50%", "50%", "1.5"],
        ["1,200", "1", "1,200", "100%", "100%", "-"],
        ["800", "0.667", "800", "100%", "25%", "-"],
        ["1,000", "0.833", "8,000", "12%", "12%", "-"],
    ]
    assert ["memory" in line for line in lines] == [False, False, True, False]
    assert ["products" in line for line in lines] == [True, True, False, True]
    assert [line[ends[-1] :].strip() for line in lines] == [
        "warm",
        "without log-probabilities",
        "",
        "without rotations, gates and entropy",
    ]
    alone = bench.show([a_row("rollout", [(1, 3000, 1, 1)])])
    assert alone[0]["ratio"] is None


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
        forward, backward, mib, first, error = bench.measure(work, shape, dtype, impl, "cpu")
        assert forward > 0 and backward > 0 and mib >= 0 and 0 < error < tolerance
        assert first > forward + backward
    row = a_row(impl, [(1, 10, 1e9, 1e7)])
    bench.plot_roofline([row], ROOF, tmp_path / "kernels.png")
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
        if forward == 90:
            ticks += ticks[-1:]  # the end of the first call
    clock = iter(ticks)
    grown = 1000 + 5 * 2 ** (20 if sys.platform == "darwin" else 10)
    stopwatch(monkeypatch, lambda: next(clock))
    monkeypatch.setattr(
        "resource.getrusage",
        lambda _: SimpleNamespace(ru_maxrss=1000 if clock.__length_hint__() == 13 else grown),
    )
    measured = bench.measure("attention", (1, 1, 8, 8), torch.float32, "sdpa", "cpu")
    assert measured[:4] == (2, 20, 5, 170)
    assert next(clock, None) is None


def test_the_roof_is_the_fastest_product_and_copy(monkeypatch):
    n = 2048
    # seconds: fp32's, bf16's, the copy's best
    ticks = [t for best in (2, 4, 1) for i in range(6) for t in (0, best + (i - 3) ** 2)]
    clock = iter(ticks)
    stopwatch(monkeypatch, lambda: next(clock))
    monkeypatch.setattr(torch, "mm", lambda a, b, out: out.view(-1)[:1])
    peak = roof.roof("cpu")
    # emulated bf16: fp32's
    assert peak == dict(float32=2 * n**3 / 2, bfloat16=2 * n**3 / 2, copy=2 * 16 * n * n * 4)


def test_the_benchmark_counts_operations_bytes_and_ratios(monkeypatch, tmp_path):
    def apart(f, *args, device):
        seconds = 4 if args[3:4] == ("reference",) else 1
        return ROOF if f is bench.roof else (seconds / 4, 3 * seconds / 4, 1024 * seconds, 9, 1e-7)

    monkeypatch.setattr(bench, "apart", apart)
    monkeypatch.setattr(bench, "plot_roofline", lambda *args: None)
    monkeypatch.setattr(bench, "can_compile", lambda device: False)
    for _ in range(2):  # the second time into its own folder again
        finish("bench.py", "kernels", "--quick", "--device", "cpu", "--out", tmp_path)
    rows = json.loads((tmp_path / "benchmark.json").read_text())["kernels"]["rows"]
    assert [(r["work"].split()[0], r["dtype"], r["who"]) for r in rows] == [
        (work, dtype, impl)
        for work, fast in (("token_logprobs", "chunked"), ("attention", "sdpa"))
        for dtype in ("float32", "bfloat16")
        for impl in ("reference", fast)
    ]
    for r in rows:
        bytes_each, fast = 4 if r["dtype"] == "float32" else 2, r["who"] != "reference"
        shape = [int(n) for n in r["work"].split()[1].split("x")]
        if r["work"].startswith("token_logprobs"):
            N, C, V = shape
            tokens = N
            flops = 2 * N * C * V + 2 * N * V * C + 2 * V * N * C  # z, dh, dW
            # h and W are read twice, their gradients written
            moved = 2 * (N * C + V * C) + (N * C + V * C)
        else:
            B, H, T, D = shape
            tokens = B * T
            # S, O; S, dP, dV, dQ, dK, each of half a square
            flops = 7 * 2 * B * H * T * T * D / 2
            # q, k, v, o; these and do, dq, dk, dv
            moved = 4 * B * H * T * D + 8 * B * H * T * D
        seconds = 1 if fast else 4
        least = max(flops / ROOF[r["dtype"]], moved * bytes_each / ROOF["copy"])
        assert [r[k] for k in ("tokens_per_s", "limit", "reached", "intensity", "flops")] == (
            pytest.approx(
                [
                    tokens / seconds,
                    tokens / least,
                    least / seconds,
                    flops / (moved * bytes_each),
                    flops / seconds,
                ]
            )
        )
        assert r["mfu"] == pytest.approx(flops / ROOF[r["dtype"]] / seconds)
        assert (r["gib"], r["first_call_seconds"]) == (seconds, 9)
        # `sdpa` is torch's, `reference` what everybody would write
        peer = 1 if r["work"].startswith("attention") else 4
        assert r["ratio"] == pytest.approx(peer / seconds)


def test_a_kernel_without_memory_and_a_failing_peer_lose_their_rows_and_no_other_error_is_hidden(
    monkeypatch, at_once, capsys
):
    errors = dict(chunked=MemoryError("no more"), liger=ImportError("a\nlong story"))

    def measure(work, shape, dtype, impl, device):
        if impl in errors:
            raise errors[impl]
        return 1, 1, 1, 1, None

    monkeypatch.setattr(bench, "measure", measure)
    monkeypatch.setattr(bench, "left_out", lambda impl, device: None)
    monkeypatch.setattr(
        bench,
        "kernel_jobs",
        lambda args: [
            ("token_logprobs", (2, 2, 2), ["reference", "chunked", "liger", "cce"], "float32")
        ],
    )
    args = arguments()
    rows = bench.measure_kernels(args)
    assert [(r["who"], r["without"]) for r in rows] == [
        ("reference", ""),
        ("cce", "without entropy"),
    ]
    out = capsys.readouterr().out
    assert "chunked: MemoryError: no more, row left out" in out
    assert "liger: ImportError: a, row left out" in out
    assert out.endswith("without entropy\n")
    errors["chunked"] = ValueError("a bug of ours")
    with pytest.raises(ValueError):
        bench.measure_kernels(args)


def test_peers_that_cannot_run_here_are_named(monkeypatch, at_once, capsys):
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    monkeypatch.setattr(bench, "no_triton", lambda x: "triton is not installed")
    why_not = dict(
        reference=None,
        chunked=None,
        sdpa=None,
        compiled="no C++ compiler found",
        triton="triton is not installed",
        liger="not installed",
        cce="not installed",
        flash="not installed",
    )
    assert {impl: bench.left_out(impl, "cpu") for impl in why_not} == why_not
    jobs = [
        job for device in ("cpu", "cuda") for job in bench.kernel_jobs(arguments(device=device))
    ]
    assert {impl for _, _, impls, _ in jobs for impl in impls} == set(why_not)
    monkeypatch.setattr(bench, "measure", lambda *args: (1, 1, 1, 1, 1))
    bench.measure_kernels(arguments())
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
            "Qwen2.5-0.5B size: 8 GB and minutes on a CPU, left out",
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
    seconds = dict(rollout=iter([99, 2, 4, 3]), nanoGPT=iter([99, 10, 10, 10]))
    seconds["transformers"] = iter([1, 5, 5, 5])
    seconds["rollout, compiled"] = iter([99, 1, 3, 2])

    def racer(name):
        def race():
            order.append(name)
            now[0] += next(seconds[name])
            return 60, 6e8, 1

        return race

    stopwatch(monkeypatch, lambda: now[0])
    racers = {name: racer(name) for name in seconds}
    rows = bench.compare("a race", "float32", racers, arguments())
    assert order == [*seconds] * 4
    assert [row["tokens_per_s"] for row in rows] == [20, 6, 12, 30]
    assert [row["ratio"] for row in rows] == [20 / 12, 0.5, 1, 30 / 12]
    assert [row["limit"] for row in rows] == [100] * 4
    seconds["rollout"] = iter([1, 1, 1, 1])
    (row,) = bench.compare("alone", "float32", dict(rollout=racer("rollout")), arguments())
    assert row["ratio"] is None


def test_a_racers_memory_is_what_it_keeps_and_what_a_turn_adds(monkeypatch):
    held, peak = [7 * 2**30], [0]

    def racer(keeps, adds):
        kept = []

        def race():
            if not kept:
                held[0] += keeps * 2**30
                kept.append(keeps)
                peak[0] = held[0] + 100 * 2**30  # compilation
            peak[0] = max(peak[0], held[0] + adds * 2**30)
            return 1, 1, 1

        return race

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: held[0])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: peak[0])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: peak.__setitem__(0, held[0]))
    racers = dict(rollout=racer(3, 2), nanoGPT=racer(5, 4))
    rows = bench.compare("a race", "float32", racers, arguments(device="cuda"))
    assert [row["gib"] for row in rows] == [3 + 2, 5 + 4]


def test_only_tokens_up_to_the_stop_token_count(monkeypatch):
    prompts, model = [[1, 2, 3], [4]], bench.GPT(bench.SIZES["4 x 128"])
    asked = {}

    def generate(input_ids, attention_mask, **flags):
        asked.update(flags, ids=input_ids.tolist(), mask=attention_mask.tolist())
        return torch.cat((input_ids, torch.tensor([[5, 0, 7, 7], [5, 6, 7, 0]])), 1)

    peer = SimpleNamespace(generate=generate, device="cpu")
    racers = bench.sampling_racers(model, peer, prompts, 1, 4, 0)
    cost = roof.generating(model.config, 4, [3, 1], [2, 4])
    assert racers["transformers"]() == cost and cost[0] == 2 + 4
    assert asked["cache_implementation"] is None
    assert racers["transformers, static cache"]() == cost
    assert asked["cache_implementation"] == "static"
    assert asked["ids"] == [[1, 2, 3], [0, 0, 4]] and asked["mask"] == [[1, 1, 1], [0, 0, 1]]
    racers = bench.sampling_racers(model, peer, prompts, 1, 4, None)
    assert racers["transformers"]()[0] == 8
    with torch.no_grad():
        model.lm_head.weight.zero_()  # all 64 tokens are equally likely, the stop token too
    torch.manual_seed(0)
    assert bench.sampling_racers(model, None, prompts, 200, 4, 0)["rollout"]()[0] < 2 * 200 * 4
    assert bench.sampling_racers(model, None, prompts, 2, 4, None)["rollout"]()[0] == 2 * 2 * 4


def test_the_eager_racer_takes_no_graph_and_the_switch_stays_as_it_was(monkeypatch):
    model, seen = bench.GPT(bench.SIZES["4 x 128"]), []

    def generate(*args, **kwargs):
        seen.append(engine.STATIC_ON)
        return SimpleNamespace(lengths=torch.tensor([1]))

    monkeypatch.setattr(engine, "generate", generate)
    racers = bench.sampling_racers(model, None, [[1]], 1, 1, None)
    for race in racers.values():
        race()
    assert seen == [engine.STATIC_ON, ()] and engine.STATIC_ON


@pytest.mark.skipif(not bench.find_spec("transformers"), reason="is not installed")
def test_transformers_samples_from_the_weights_of_ours():
    torch.manual_seed(0)
    model = bench.GPT(bench.GPTConfig(64, 32, 2, 4, 32, n_kv_head=2, tie=False))
    ids = torch.randint(64, (2, 9))
    with torch.no_grad():
        assert (peers.llama(model)(ids).logits - model(ids)).abs().max() < 1e-4
    assert peers.llama(model.to(torch.bfloat16)).dtype == torch.bfloat16


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
    PeerGPT, PeerConfig = peers.load_nanogpt(tmp_path)
    nanogpt = lambda config: models.append(PeerGPT(config)) or models[-1], PeerConfig
    config = bench.GPTConfig(64, 16, 1, 2, 16)
    for dtype in bench.DTYPES.values():
        models.clear()
        racers = bench.training_racers(config, 3, dtype, "cpu", nanogpt, False)
        before = [[p.clone() for p in model.parameters()] for model in models]
        assert list(racers) == ["rollout", "nanoGPT"]
        before_all = meter.counter.flops
        costs = [race() for race in racers.values()]
        # what AdamW reads and writes: weights, two moments; the gradient, written and read
        parameters = sum(p.numel() for p in models[0].parameters())
        moved = 4 * parameters * (2 * 3 + 2)
        assert costs == [(3 * 16, meter.counter.flops - before_all, moved)] * 2
        for model, old in zip(models, before, strict=True):
            assert all((p != q).any() for p, q in zip(model.parameters(), old, strict=True))
    assert list(bench.training_racers(config, 3, dtype, "cpu", nanogpt, True)) == [
        "rollout",
        "rollout, compiled",
        "nanoGPT",
        "nanoGPT, compiled",
    ]


@pytest.mark.parametrize("where", bench.WORKS)
def test_what_is_to_be_measured_there_can_be_measured(where):
    works = bench.WORKS[where]
    assert set(works) == set(bench.PARTS) - {"profile"}
    assert {name for name, _ in works["training"]} <= set(bench.SIZES)
    for name, dtype, lens, _, new in works["sampling"] + works["decoding"]:
        assert dtype in bench.DTYPES
        assert max(lens) + max(new, 32) - 1 <= bench.SIZES[name].block_size
    for work, shape in works["kernels"]:
        assert all(count > 0 for count in bench.useful(work, shape))


def test_on_a_gpu_decoding_also_runs_eagerly_and_compilation_waits_to_be_named(monkeypatch, capsys):
    raced = {}

    def compare(title, dtype, racers, args):
        raced[title] = [*racers]
        return []

    monkeypatch.setattr(bench, "compare", compare)
    monkeypatch.setattr(bench, "drawn", lambda name, *_: bench.GPT(bench.SIZES["4 x 128"]))
    monkeypatch.setattr(peers, "llama", lambda ours: SimpleNamespace(device="cpu"))
    monkeypatch.setattr(bench, "find_spec", lambda name: True)
    for part in (None, "sampling"):
        for measure in (bench.measure_sampling, bench.measure_decoding):
            raced.clear()
            measure(arguments(device="cuda", part=part))
            (names,) = raced.values()
            decodes = measure is bench.measure_decoding
            expected = ["rollout", "rollout, eager"] if decodes else ["rollout", "transformers"]
            if part and not decodes:
                expected.append("transformers, static cache")
            assert names == expected
    assert "static cache: compiles, left out" in capsys.readouterr().out


def test_a_step_is_told_by_groups_that_add_up_to_all_of_it(capsys):
    rows = bench.measure_profile(arguments())
    assert [row["work"] for row in rows] == ["training, 4 x 128", "sampling, 4 x 128"] + [
        "sampling, 4 x 128"
    ] * (len(rows) - 2)
    for row in rows:
        assert len(row["shares"]) == 8 and row["milliseconds"] > 0
        assert sum(row["shares"].values()) == pytest.approx(1)
        # nothing counts twice
        assert all(0 <= share < 1 for share in row["shares"].values())
        named = {group for group, share in row["shares"].items() if share > 0}
        sampling = {"sampler", "attention, decoding.cpp"}
        never = sampling if row is rows[0] else {"optimizer"}
        if not decoding.compiled(32, "float"):
            never |= {"attention, decoding.cpp"}
        assert named == set(row["shares"]) - never
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 8 + 1 and lines[-1].startswith("milliseconds")


# --------------------------------------------------------------------------------------------------
# The command


def test_all_parts_run_and_a_part_measured_again_replaces_its_own_rows_alone(tmp_path, at_once):
    (tmp_path / "nanogpt").mkdir()
    (tmp_path / "nanogpt/model.py").write_text(NANOGPT)
    flags = ["--quick", "--device", "cpu", "--out", tmp_path / "out"]
    out = finish("bench.py", "--nanogpt", tmp_path / "nanogpt", *flags)
    # each after an empty line
    assert [block.split()[0] for block in out.split("\n\n")[1:]] == list(bench.PARTS)
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
