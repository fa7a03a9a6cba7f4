"""decoding.py: the fast steps give what the plain ones give. Its kernels run in Triton's
interpreter without a GPU (see conftest.py), natively with one, and are compiled for three
generations of GPUs.
"""

import gc
import re
import subprocess
import sys
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch
from common import PROMPTS, VARIANTS, make, seeded
from test_kernels import DEVICE, fused, natively, needs_triton  # noqa: F401
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    _get_current_dispatch_mode,
)
from torch.utils._pytree import tree_leaves

import decoding
import engine
import kernels
from decoding import FusedCache, MaskedCache, NativeCache, compiled, native
from engine import KVCache, generate
from model import GPTConfig, rotate, rotations

N = 16  # keys of a tile in fp32


def written(lens, H=2, K=1, D=16, window=None, capacity=0, dtype=torch.float32):
    """A cache of rows that hold lens tokens, nan in the slots that hold none."""
    capacity = capacity or max(lens) + 1
    config = GPTConfig(8, capacity, 1, H, H * D, n_kv_head=K, head_dim=D, window=window)
    cache = KVCache(config, len(lens), capacity, device=DEVICE, dtype=dtype)
    for t in cache.k + cache.v:
        t.copy_(torch.randn(t.shape, generator=seeded(len(t) + D)))
        for row, n in zip(t, lens, strict=True):
            row[n:] = torch.nan
    cache.set_lens(lens)
    return cache


def step_of(cache, parts=1):
    """One more token in each row of the cache -> FusedCache's outputs, and what went in. parts
    None: NativeCache's.
    """
    R, H, K, D = cache.rows, cache.config.n_head, cache.config.n_kv_head, cache.config.head_dim
    qkv = torch.randn(R, 1, H + 2 * K, D, generator=seeded(1)).to(cache.k[0])
    q, k, v = qkv.split([H, K, K], dim=2)
    k = k.contiguous()  # as a norm leaves it, with another stride than q's
    if parts is None:
        fast = native(cache)
        assert isinstance(fast, NativeCache)
    else:
        fast = FusedCache(cache)
        fast.parts = parts
        fast.out = torch.full((R, H, parts, D), torch.nan, device=DEVICE)
        fast.lse = torch.full((R, H, parts), torch.nan, device=DEVICE)
    positions, mask = fast.extend(1)
    assert mask is None
    rope = rotations(cache.config).to(DEVICE)[positions]
    return fast.attend(0, q, k, v, rope), (q, k, v, rope)


def exact_step(cache, lens, before, q, k, v, rope):
    """The same in fp64, from the cache as it was `before`: row by row, query head by query head."""
    H, K, window = cache.config.n_head, cache.config.n_kv_head, cache.config.window
    q, k = rotate(q, rope), rotate(k, rope)
    out = []
    for r, n in enumerate(lens.tolist()):
        first = 0 if window is None else max(0, n + 1 - window)
        for h in range(H):
            g = h // (H // K)
            keys = torch.cat((before[0][r, first:n, g], k[r, :, g])).double()
            values = torch.cat((before[1][r, first:n, g], v[r, :, g])).double()
            scores = keys @ q[r, 0, h].double() / q.shape[-1] ** 0.5
            out.append(scores.softmax(0) @ values)
    return torch.stack(out).view(len(lens), 1, -1), k[:, 0]


def plain_step(lens, H, K, D, q, k, v, rope):
    """The same in bf16 by the reference."""
    masked = MaskedCache(written(lens, H, K, D, dtype=torch.bfloat16))
    q, k = rotate(q, rope), rotate(k, rope)
    _, mask = masked.extend(1)
    kv = (t.nan_to_num().transpose(1, 2) for t in masked.append(0, k, v))
    theirs = kernels.attention(q.transpose(1, 2), *kv, mask=mask, impl="reference")
    return theirs.transpose(1, 2).flatten(2)


def assert_exact(cache, parts=1):
    before, lens = [t.clone() for t in cache.k + cache.v], cache.lens
    out, inputs = step_of(cache, parts)
    true, keys = exact_step(cache, lens, before, *inputs)
    v = inputs[2]
    torch.testing.assert_close(out.double(), true, rtol=1e-5, atol=1e-5)
    rows = torch.arange(cache.rows, device=DEVICE)
    for old, now, new in zip(before, cache.k + cache.v, (keys, v[:, 0]), strict=True):
        torch.testing.assert_close(now[rows, lens], new, rtol=1e-6, atol=1e-6)
        now[rows, lens] = torch.nan
        assert torch.equal(now.nan_to_num(7), old.nan_to_num(7))  # nothing else was written
    assert out.isfinite().all()


@needs_triton
@pytest.mark.parametrize("D", [2, 16, 24, 32, 64, 80, 96, 128])
def test_a_step_is_exact_at_any_head_size(D):
    assert_exact(written([N + 3, 1], D=D), parts=2)


@needs_triton
@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("lens", [[0, N - 2, N - 1], [N, 2 * N - 1, 2 * N], [3 * N - 1, 2, 70]])
def test_a_step_is_exact_at_lengths_around_a_tile_and_with_parts_that_hold_nothing(lens, parts):
    assert_exact(written(lens, capacity=130), parts)


@needs_triton
@pytest.mark.parametrize("H, K", [(1, 1), (3, 3), (4, 2), (6, 2), (7, 1), (17, 1)])
def test_a_step_is_exact_for_grouped_heads(H, K):
    assert_exact(written([40, 5], H, K), parts=2)


@needs_triton
@pytest.mark.parametrize("window", [1, 2, N - 1, N, N + 1, 71, 500])
def test_a_step_sees_its_window_and_no_more(window):
    assert_exact(written([70, 40, 3], H=1, window=window), parts=2)


@needs_triton
@pytest.mark.parametrize("D", [16, 32, 64, 80])
def test_no_rounding_that_a_fused_multiply_add_leaves_out_is_trusted(fused, D):  # noqa: F811
    assert_exact(written([40, 0], D=D), parts=4)


@needs_triton
def test_a_step_survives_large_scores():
    cache = written([70, 33])
    cache.k[0] *= 3000
    before, lens = [t.clone() for t in cache.k + cache.v], cache.lens
    out, inputs = step_of(cache, 2)
    true, _ = exact_step(cache, lens, before, *inputs)
    torch.testing.assert_close(out.double(), true, rtol=1e-3, atol=1e-3)


@needs_triton
@pytest.mark.parametrize("D, H, K", [(64, 2, 2), (128, 7, 1)])
def test_a_step_in_bf16_errs_no_more_than_1_5_times_the_reference(D, H, K):
    lens = [1, 63, 64, 200]
    for parts in (1, 2):
        cache = written(lens, H, K, D, dtype=torch.bfloat16)
        before = [t.clone() for t in cache.k + cache.v]
        out, inputs = step_of(cache, parts)
        true, _ = exact_step(cache, cache.lens, before, *inputs)
        theirs = plain_step(lens, H, K, D, *inputs)
        # the interpreter cuts bits off where a GPU rounds
        slack = 1.5 if DEVICE == "cuda" else 3
        assert (out - true).norm() <= slack * (theirs - true).norm()


# --------------------------------------------------------------------------------------------------
# decoding.cpp, in the same steps

needs_compiler = pytest.mark.skipif(
    DEVICE != "cpu" or not compiled(16, "float"), reason="needs g++ and a CPU"
)


@needs_compiler
@pytest.mark.parametrize("D", [2, 6, 16, 32, 64, 128])
def test_a_compiled_step_is_exact_at_any_head_size(D):
    assert_exact(written([19, 0, 1], D=D), None)


@needs_compiler
@pytest.mark.parametrize("H, K", [(1, 1), (3, 3), (6, 2), (7, 1)])
@pytest.mark.parametrize("lens", [[0], [15, 16, 17], [200, 3]])
def test_a_compiled_step_is_exact_for_grouped_heads_and_rows_of_any_length(H, K, lens):
    assert_exact(written(lens, H, K), None)


@needs_compiler
@pytest.mark.parametrize("size", [30, 3000])
def test_a_compiled_step_survives_large_scores(size):
    cache = written([70, 33])
    cache.k[0] *= size
    before, lens = [t.clone() for t in cache.k + cache.v], cache.lens
    out, inputs = step_of(cache, None)
    true, _ = exact_step(cache, lens, before, *inputs)
    torch.testing.assert_close(out.double(), true, rtol=1e-3, atol=1e-3)


@needs_compiler
def test_thousands_of_keys_far_below_the_likeliest_weigh_nothing_together():
    cache = written([2000])
    cache.k[0] *= 300
    before, lens = [t.clone() for t in cache.k + cache.v], cache.lens
    out, inputs = step_of(cache, None)
    true, _ = exact_step(cache, lens, before, *inputs)
    torch.testing.assert_close(out.double(), true, rtol=0, atol=1e-4)


@needs_compiler
@pytest.mark.parametrize("D, H, K", [(64, 2, 2), (16, 7, 1)])
def test_a_compiled_step_in_bf16_errs_no_more_than_the_reference(D, H, K):
    cache = written([1, 63, 64, 200], H, K, D, dtype=torch.bfloat16)
    before, lens = [t.clone() for t in cache.k + cache.v], cache.lens
    out, inputs = step_of(cache, None)
    true, keys = exact_step(cache, lens, before, *inputs)
    assert torch.equal(cache.k[0][torch.arange(4), lens], keys)  # rotated and rounded as we do
    theirs = plain_step([1, 63, 64, 200], H, K, D, *inputs)
    assert (out - true).norm() <= 1.05 * (theirs - true).norm()


@needs_compiler
def test_a_row_of_nan_stays_nan_and_alone():
    cache = written([5, 9, 2])
    cache.k[0][1, 4] = torch.nan
    out, _ = step_of(cache, None)
    assert out[1].isnan().all() and out[[0, 2]].isfinite().all()


@needs_compiler
def test_a_compiled_step_is_the_same_for_any_number_of_threads():
    outs = []
    for threads in 1, 2, 3:
        torch.set_num_threads(threads)
        outs.append(step_of(written([40, 7, 0, 19, 3], 4, 2), None)[0])
    torch.set_num_threads(1)
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


@needs_compiler
@pytest.mark.parametrize(
    "settings", [dict(n=3, stop=[2, 7]), dict(temperature=0), dict(n=4, stop=5)]
)
@pytest.mark.parametrize("variant", ["multi-head", "grouped-query", "qk_norm", "qkv_bias"])
def test_compiled_steps_give_the_tokens_and_log_probabilities_of_plain_ones(
    monkeypatch, variant, settings
):
    gpt, rollouts, attend = make(**VARIANTS[variant]), [], NativeCache.attend
    calls = []
    monkeypatch.setattr(
        NativeCache, "attend", lambda *args: calls.append(len(args[2])) or attend(*args)
    )
    for types in {}, decoding.NATIVE:
        calls.clear()
        monkeypatch.setattr(decoding, "NATIVE", types)
        more = dict(max_new_tokens=24, generator=seeded())
        rollouts.append(generate(gpt, PROMPTS, **settings, **more))
        assert bool(calls) == bool(types)
    assert "stop" not in settings or len(set(calls)) > 2  # rows leave on the way
    plain, fast = rollouts
    assert fast.tokens() == plain.tokens() and torch.equal(fast.mask, plain.mask)
    torch.testing.assert_close(fast.logp, plain.logp, rtol=0, atol=2e-5)


@needs_compiler
def test_what_decoding_cpp_cannot_do_is_left_to_the_plain_step():
    assert isinstance(native(written([3])), NativeCache)
    for cache in (written([3], window=2), written([3], dtype=torch.float64)):
        assert native(cache) is cache
    cache = written([3])
    with torch.autocast("cpu", torch.bfloat16):
        assert native(cache) is cache


@needs_compiler
@pytest.mark.parametrize("why", ["no compiler", "it fails", "no folder to write to"])
def test_without_a_compiled_step_generate_takes_the_plain_one(monkeypatch, tmp_path, why):
    source = tmp_path / "decoding.py"
    (tmp_path / "decoding.cpp").write_text("" if why == "it fails" else "int attend;")
    if why == "no folder to write to":
        (tmp_path / "__pycache__").write_text("a file")
    if why == "no compiler":
        monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(decoding, "__file__", str(source))
    monkeypatch.setattr(decoding, "compiled", decoding.compiled.__wrapped__)
    if why == "it fails":
        (tmp_path / "decoding.cpp").write_text("no C++")
    cache = written([3])
    assert native(cache) is cache
    assert why == "no folder to write to" or not list((tmp_path / "__pycache__").iterdir())


@needs_compiler
def test_a_compiled_step_is_kept_for_this_source_these_flags_and_this_processor(
    monkeypatch, tmp_path
):
    (tmp_path / "decoding.cpp").write_text('extern "C" void attend() {}')
    monkeypatch.setattr(decoding, "__file__", str(tmp_path / "decoding.py"))
    runs, run = [], subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: runs.append(a) or run(*a, **k))
    compile_ = compiled.__wrapped__
    for channels, expected in ((8, 2), (8, 2), (16, 4)):  # it is compiled and linked
        assert compile_(channels, "float") and len(runs) == expected
    (tmp_path / "decoding.cpp").write_text('extern "C" void attend() { }')
    assert compile_(8, "float") and len(runs) == 6
    monkeypatch.setattr(decoding.re, "search", lambda *_: ["flags: another processor's"])
    assert compile_(8, "float") and len(runs) == 8


# --------------------------------------------------------------------------------------------------
# Within generate


@pytest.fixture
def both(monkeypatch):
    """What the plain step samples, and the fused one."""

    def sample(gpt, prompts=PROMPTS[:2], new=3, **kwargs):
        rollouts = []
        for where in (), (DEVICE,):
            monkeypatch.setattr(engine, "STATIC_ON", where)
            monkeypatch.setattr(decoding, "FUSED_ON", where)
            rollouts.append(
                generate(gpt.to(DEVICE), prompts, max_new_tokens=new, generator=seeded(), **kwargs)
            )
        plain, fast = rollouts
        assert fast.tokens() == plain.tokens() and torch.equal(fast.mask, plain.mask)
        torch.testing.assert_close(fast.logp, plain.logp, rtol=0, atol=2e-5)
        return fast

    return sample


@needs_triton
@pytest.mark.parametrize("variant", ["multi-head", "window", "qk_norm", "qkv_bias"])
def test_fused_steps_give_the_tokens_and_log_probabilities_of_plain_ones(both, variant):
    both(make(**VARIANTS[variant]))


@needs_triton
@pytest.mark.parametrize(
    "settings",
    [
        dict(temperature=0),
        dict(uniforms=torch.tensor([0.3, 0.8], dtype=torch.float64)),
        dict(uniforms=torch.rand(2, 6, generator=seeded(3), dtype=torch.float64), top_k=4),
    ],
)
def test_fused_steps_draw_by_whatever_rule_generate_was_given(both, settings):
    both(make(n_kv_head=1, n_layer=1), new=6, **settings)


@needs_triton
def test_fused_steps_go_on_when_rows_have_left(both, monkeypatch):
    monkeypatch.setattr(decoding, "SPAN", 2)
    monkeypatch.setattr(decoding, "parts_of", lambda *_: 2)
    rows = both(make(n_kv_head=1, n_layer=1), PROMPTS, new=7, stop=2)
    assert len(set(rows.lengths.tolist())) > 2


@pytest.mark.parametrize("n_kv_head, stop", [(1, None), (4, 5)])
def test_the_log_probabilities_of_many_replayed_steps_are_the_models(monkeypatch, n_kv_head, stop):
    monkeypatch.setattr(engine, "STATIC_ON", (DEVICE,))
    monkeypatch.setattr(decoding, "SPAN", 12)  # rows leave between two captures
    gpt = make(n_embd=256, n_kv_head=n_kv_head, block_size=300).to(DEVICE)
    r = generate(gpt, PROMPTS, n=3, max_new_tokens=200, stop=stop, generator=seeded())
    assert r.lengths.min() == 200 if stop is None else r.lengths.min() < 12 < r.lengths.max()
    with torch.no_grad():
        hidden = gpt.hidden(r.ids[:, :-1])
        logp, _ = kernels.token_logprobs(hidden, gpt.lm_head.weight, r.ids[:, 1:])
    torch.testing.assert_close(r.logp[:, 1:], logp * r.mask[:, 1:], rtol=0, atol=1e-3)


def test_a_graph_is_captured_once_for_each_number_of_rows(monkeypatch):
    shapes = []

    def captured(step, device):
        shapes.append(step.__self__.rows)
        return step

    monkeypatch.setattr(engine, "STATIC_ON", ("cpu",))
    monkeypatch.setattr(decoding, "captured", captured)
    monkeypatch.setattr(decoding, "SPAN", 10)
    generate(make(), PROMPTS, max_new_tokens=45, generator=seeded())
    assert shapes == [4]
    rows = generate(make(), PROMPTS, n=3, max_new_tokens=45, stop=[1, 2], generator=seeded())
    alive = [sum(n > start for n in rows.lengths.tolist()) for start in range(1, 36, 10)]
    assert shapes[1:] == sorted(set(alive) - {0}, reverse=True) and len(shapes) > 2


@pytest.mark.parametrize("new", [5, 50])
def test_a_cache_is_freed_as_soon_as_its_rows_are_written(monkeypatch, new):
    caches, init = [], decoding.Steps.__init__

    def spy(steps, *args):
        init(steps, *args)
        caches.append(weakref.ref(steps.cache))

    monkeypatch.setattr(engine, "STATIC_ON", ("cpu",))
    monkeypatch.setattr(decoding.Steps, "__init__", spy)
    gc.disable()
    try:
        generate(make(), PROMPTS, max_new_tokens=new, generator=seeded())
        assert [cache() for cache in caches] == [None]
    finally:
        gc.enable()


@pytest.mark.parametrize(
    "V, law, one_number",
    [
        (70, dict(temperature=0), False),
        (70, dict(top_k=5, top_p=0.8), False),
        (20001, dict(top_p=0.9), False),
        (20001, {}, True),
    ],
)
def test_a_step_fetches_nothing_from_the_device(V, law, one_number):
    """Tensors of torch's meta device have no values: whoever asks for one gets an error, as while
    a CUDA graph is captured.
    """
    gpt = make(vocab_size=V, qk_norm=True, window=6).to("meta")
    fresh = torch.rand(2, 9, dtype=torch.float64, device="meta")
    stops = torch.ones(2, dtype=torch.long, device="meta")
    law = dict(temperature=1.0, top_k=None, top_p=None) | law
    sampler = engine.Sampler(fresh, None, stops, **law)
    if one_number:
        sampler.number = torch.rand_like(fresh[:, 0])
        sampler.spent = torch.zeros(2, device="meta")
        sampler.budget = 26
    cache = KVCache(gpt.config, 2, 12, device="meta")
    steps = decoding.Steps(gpt, decoding.padded(gpt.lm_head), cache, sampler, 1)
    with torch.no_grad():
        steps.step()


class Tape(TorchDispatchMode):
    """A CUDA graph of the CPU: what a step asked for, of torch and of Triton, on which tensors."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        return self.record(partial(f, *args, **(kwargs or {})))

    def record(self, call):
        out = call()
        self.calls.append((call, out))
        return out

    def replay(self):
        for call, out in self.calls:
            for old, new in zip(tree_leaves(out), tree_leaves(call()), strict=True):
                if isinstance(new, torch.Tensor) and new.data_ptr() != old.data_ptr():
                    old.copy_(new)  # where the graph has it, and nowhere else


class Taped:
    """A Triton kernel whose launches are on the tape that is being recorded."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        def launch(*args, **options):
            tape = _get_current_dispatch_mode()
            with _disable_current_modes():
                call = partial(self.kernel[grid], *args, **options)
                return tape.record(call) if tape else call()

        return launch


def tensors_of(steps):
    held = [list(vars(x).values()) for x in (steps, steps.fixed, steps.sampler)]
    return tree_leaves([steps.cache.k, steps.cache.v, held])


def taped(step, device):
    """As decoding.captured: nothing that the step does while it is recorded lasts."""
    lasting = [x for x in tensors_of(step.__self__) if isinstance(x, torch.Tensor)]
    before = [x.clone() for x in lasting]
    with Tape() as tape:
        step()
    for x, old in zip(lasting, before, strict=True):
        x.copy_(old)
    return tape.replay


@needs_triton
@pytest.mark.parametrize(
    "kernels_too, new, settings",
    [
        (True, 12, dict(uniforms=torch.tensor([0.2, 0.99], dtype=torch.float64))),
        (False, 45, dict(uniforms=torch.linspace(0, 0.99, 4, dtype=torch.float64))),
        (False, 45, dict(stop=2)),
        (False, 45, dict(stop=[1, 2], temperature=0)),
        (False, 45, dict(stop=2, top_k=9, top_p=0.8)),
    ],
)
def test_a_step_recorded_once_and_replayed_is_the_step(monkeypatch, kernels_too, new, settings):
    monkeypatch.setattr(engine, "STATIC_ON", (DEVICE,))
    monkeypatch.setattr(decoding, "SPAN", 11)
    if kernels_too:
        monkeypatch.setattr(decoding, "FUSED_ON", (DEVICE,))
        for name in ("place_kernel", "part_kernel", "whole_kernel"):
            monkeypatch.setattr(decoding, name, Taped(getattr(decoding, name)))
    else:
        monkeypatch.setattr(decoding, "fuses", lambda cache: False)
    gpt = make(n_kv_head=2, n_layer=1, window=6).to(DEVICE)
    prompts = PROMPTS[:2] if kernels_too else PROMPTS  # the interpreter is slow
    rollouts = []
    for how in (lambda step, device: None), taped:
        monkeypatch.setattr(decoding, "captured", how)
        rollouts.append(generate(gpt, prompts, 1, new, generator=seeded(), **settings))
    plain, replayed = rollouts
    assert torch.equal(replayed.ids, plain.ids) and torch.equal(replayed.logp, plain.logp)
    assert "stop" not in settings or len(set(plain.lengths.tolist())) > 1


def test_the_padded_head_gives_the_heads_logits_and_leaves_alone_what_it_may_not_replace():
    x = torch.randn(3, 32, generator=seeded())
    gpt = make(vocab_size=70)
    head = decoding.padded(gpt.lm_head)
    assert head is not gpt.lm_head and head(x).shape == (3, 70)
    torch.testing.assert_close(head(x), gpt.lm_head(x))
    assert decoding.padded(make(vocab_size=128).lm_head).out_features == 128
    gpt.lm_head.register_forward_hook(lambda _, inputs, out: out + 1)
    assert decoding.padded(gpt.lm_head) is gpt.lm_head


@needs_triton
def test_where_the_kernels_cannot_run_a_mask_hides_what_is_not_there(monkeypatch):
    monkeypatch.setattr(decoding, "FUSED_ON", (DEVICE,))
    assert decoding.fuses(written([3]))
    assert not decoding.fuses(written([3], D=130))
    assert not decoding.fuses(written([3], dtype=torch.float64))
    monkeypatch.setattr(decoding, "FUSED_ON", ())
    assert not decoding.fuses(written([3]))
    monkeypatch.setattr(decoding, "FUSED_ON", (DEVICE,))
    monkeypatch.setattr(kernels, "triton", None)
    assert not decoding.fuses(written([3]))


@pytest.mark.parametrize(
    "heads, capacity, parts",
    [(768, 544, 2), (96, 10000, 16), (2, 10000, 64), (8, 300, 2), (8, 100, 1), (9999, 1000, 1)],
)
def test_keys_are_split_until_the_gpu_is_busy_but_not_below_128(
    monkeypatch, heads, capacity, parts
):
    class Properties:
        multi_processor_count = 132

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    assert decoding.parts_of(capacity, heads, torch.device("cuda")) == parts
    assert decoding.parts_of(capacity, heads, torch.device("cpu")) >= 1


COMPILE = """if True:
    import decoding, triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    NUMBERS = dict.fromkeys(("capacity", "window", "K", "H", "q_s", "k_s", "v_s"), "i32")
    part, others = decoding.part_kernel, [decoding.place_kernel, decoding.whole_kernel]
    CASES = [(kernel, 90, 128, "bf16") for kernel in (part, *others)]
    CASES += [(part, 90, 64, "bf16"), (part, 90, 128, "fp32")]
    CASES += [(part, 80, 128, "bf16"), (part, 100, 128, "bf16")]
    for kernel, arch, D, kind in CASES:
        given = dict(G=7, GP=16, N=64 if kind == "bf16" else 16, D=D, DP=D, HALF=D // 2)
        given |= dict(PARTS=64)
        types = NUMBERS | dict(c="fp32", lens="*i64", angles="*fp32", out="*fp32", lse="*fp32")
        types |= dict.fromkeys(given, "constexpr")
        names = [p.name for p in kernel.params]
        signature = {n: types.get(n, f"*{kind}") for n in names}
        aligned = [i for i, n in enumerate(names) if signature[n][0] == "*"]
        binary = triton.compile(
            ASTSource(
                kernel,
                signature,
                {n: given[n] for n in names if n in given},
                {(i,): [["tt.divisibility", 16]] for i in aligned},
            ),
            target=GPUTarget("cuda", arch, 32),
            options=dict(num_warps=4, num_stages=3, enable_fp_fusion=True),
        )
        copies = binary.asm["ptx"].count("cp.async.cg")  # to shared memory, ahead of time
        print("of", kernel.__name__, binary.metadata.shared, copies)"""


@needs_triton
def test_the_kernels_of_a_step_compile_without_spills_and_read_ahead_on_three_kinds_of_gpu(
    tmp_path,
):
    script = tmp_path / "compile_kernels.py"
    script.write_text(COMPILE)
    environment = natively(
        PYTHONPATH=str(Path(decoding.__file__).parent),
        TRITON_CACHE_DIR=str(tmp_path),
        TRITON_DUMP_PTXAS_LOG="1",  # printed before each kernel's own line
    )
    run = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    kernel_lines = re.findall(r"^of (\S+) (\d+) (\d+)$", run.stdout, re.M)
    assert len(kernel_lines) == 7
    assert re.findall(r"(\d+) bytes spill stores, (\d+) bytes", run.stdout) == [("0", "0")] * 7
    for name, shared, copies in kernel_lines:
        assert int(shared) <= 99 * 1024, name  # also what a GPU for games has
        assert (int(copies) > 0) == (name == "part_kernel"), name
