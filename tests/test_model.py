"""model.py: the cache changes nothing, samples follow the model's law, tokenizers lose nothing."""
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import zlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import regex
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from common import ROOT, Memory, check_help, check_resume, check_whole, complain, finish, launch, metrics

import model
from kernels import token_logprobs
from model import SPLIT, GPT, CharTokenizer, GPTConfig, KVCache, NotFinite, Rollout, UserError, bpe_merges, generate, inverse_cdf, load_checkpoint, train_bpe, truncate

V = 11
PROMPTS = [[3], [1, 4, 1, 5, 9, 2, 6], [5, 3, 5], [8, 9, 7, 9]]
VARIANTS = {"multi-head": {}, "grouped-query": dict(n_kv_head=2), "multi-query": dict(n_kv_head=1), "window": dict(window=4, n_kv_head=2),
            "qk_norm": dict(qk_norm=True), "qkv_bias": dict(qkv_bias=True), "tied": dict(tie=True)}


def make(seed=0, **kwargs):
    """A small GPT whose every weight, norm and bias is random and large: at init nothing depends on much."""
    gpt = GPT(GPTConfig(**{**dict(vocab_size=V, block_size=64, n_layer=2, n_head=4, n_embd=32, tie=False), **kwargs})).requires_grad_(False)
    g = torch.Generator().manual_seed(seed)
    for p in gpt.parameters():
        p.copy_(torch.randn(p.shape, generator=g) * 0.2 + (p.dim() == 1))
    return gpt


def known(probs):
    """A GPT that gives every token these probabilities, whatever came before."""
    gpt = make(vocab_size=len(probs), n_layer=1, n_head=1, n_embd=2)
    gpt.lm_head.register_forward_hook(lambda _, inputs, out: torch.tensor(probs).log().expand_as(out))
    return gpt


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def follows(counts, probs):
    """Pearson's chi-squared test at the level 1e-4, rare cells pooled. Both (..., cells); each leading index is one more sample."""
    counts, expected = np.atleast_2d(counts), np.atleast_2d(probs) * np.atleast_2d(counts).sum(-1, keepdims=True)
    rare = expected < 5
    pool = lambda x: np.append(x[~rare], x[rare].sum())
    observed, expected = pool(counts), pool(expected)
    df = len(observed) - (0 if rare.any() else 1) - len(counts)
    critical = df * (1 - 2 / (9 * df) + 3.72 * (2 / (9 * df)) ** 0.5) ** 3      # Wilson and Hilferty's approximation
    return ((observed - expected) ** 2 / np.maximum(expected, 1e-9)).sum() < critical


# ---------------------------------------------------------------------------------------------------------------------------
# The model

def equations(gpt, ids):
    """The forward pass of the Llama family, head by head, in float64."""
    c, T = gpt.config, len(ids)
    H, K, D = c.n_head, c.n_kv_head, c.head_dim
    double = lambda name: dict(gpt.named_parameters(remove_duplicate=False))[name].double()
    norm = lambda x, name: x / (x.square().mean(-1, keepdim=True) + c.norm_eps).sqrt() * double(name + ".weight")
    angle = torch.arange(T)[:, None] * c.rope_theta ** (-torch.arange(0, D, 2).double() / D)
    distance = torch.arange(T)[:, None] - torch.arange(T)
    unseen = (distance < 0) | (distance >= (c.window or T))

    def rotated(x):     # (T, D)
        a, b = x[:, 0::2], x[:, 1::2]
        return torch.stack((a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()), -1).flatten(-2)

    x = double("wte.weight")[ids]
    for i in range(c.n_layer):
        at = f"blocks.{i}."
        qkv = norm(x, at + "norm1") @ double(at + "attn.qkv.weight").T + (double(at + "attn.qkv.bias") if c.qkv_bias else 0)
        q, k, v = (t.unflatten(-1, (-1, D)) for t in qkv.split([H * D, K * D, K * D], -1))      # (T, H or K, D)
        if c.qk_norm:
            q, k = norm(q, at + "attn.q_norm"), norm(k, at + "attn.k_norm")
        heads = []
        for h in range(H):
            group = h * K // H
            scores = rotated(q[:, h]) @ rotated(k[:, group]).T / D ** 0.5
            heads.append(scores.masked_fill(unseen, -torch.inf).softmax(-1) @ v[:, group])
        x = x + torch.cat(heads, -1) @ double(at + "attn.proj.weight").T
        z = norm(x, at + "norm2")
        gate = z @ double(at + "mlp.gate.weight").T
        x = x + (gate * gate.sigmoid() * (z @ double(at + "mlp.up.weight").T)) @ double(at + "mlp.proj.weight").T
    return norm(x, "norm") @ double("wte.weight" if c.tie else "lm_head.weight").T


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_the_equations(variant):
    gpt, ids = make(**VARIANTS[variant]), torch.randint(V, (20,), generator=seeded())
    torch.testing.assert_close(gpt(ids[None])[0].double(), equations(gpt, ids), rtol=1e-4, atol=1e-4)


def test_a_token_changes_nothing_before_it_and_nothing_past_the_window():
    gpt = make(n_layer=1, window=4)
    ids = torch.randint(V, (1, 12), generator=seeded())
    other = ids.clone()
    other[0, 5] = (ids[0, 5] + 1) % V
    changed = (gpt(ids) != gpt(other)).any(-1)[0]
    assert changed.tolist() == [5 <= t < 9 for t in range(12)]


def test_bf16_weights_leave_the_rotation_complex_and_exact():
    gpt = make()
    rope = gpt.rope.clone()
    gpt.to(torch.bfloat16)
    assert gpt.rope.dtype == torch.complex64 and torch.equal(gpt.rope, rope)
    assert gpt(torch.tensor([PROMPTS[1]])).dtype == torch.bfloat16
    assert generate(gpt, PROMPTS, max_new_tokens=4, generator=seeded()).lengths.tolist() == [4] * 4


def test_the_gradient_of_a_norm_is_that_of_finite_differences():
    x, weight = (torch.randn(shape, generator=seeded(), dtype=torch.float64, requires_grad=True) for shape in ((2, 3, 6), (6,)))
    assert torch.autograd.gradcheck(model.RMSNormFunction.apply, (x, weight, 1e-2))


def test_at_the_start_biases_are_zero_and_what_writes_into_the_stream_is_smaller_by_the_number_of_writers():
    torch.manual_seed(0)
    for name, p in GPT(GPTConfig(500, 8, 8, 4, 64, qkv_bias=True, qk_norm=True)).named_parameters():
        if p.dim() == 1:
            assert p.eq(0 if "bias" in name else 1).all()
        else:
            assert p.std().item() == pytest.approx(0.02 / 16 ** 0.5 if "proj" in name else 0.02, rel=0.05)


@pytest.mark.parametrize("wrong", [dict(n_head=3), dict(n_kv_head=3), dict(window=0), dict(head_dim=5)])
def test_a_shape_that_cannot_be_is_a_user_error(wrong):
    with pytest.raises(UserError):
        GPTConfig(**{**dict(vocab_size=V, block_size=8, n_layer=1, n_head=4, n_embd=32), **wrong})


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_count_of_parameters_is_that_of_the_model(variant):
    config = GPTConfig(**{**dict(vocab_size=V, block_size=8, n_layer=3, n_head=4, n_embd=48, head_dim=10, tie=False), **VARIANTS[variant]})
    assert config.parameters == sum(p.numel() for p in GPT(config).parameters())


@pytest.mark.parametrize("huge", [dict(n_layer=4_000_000_000), dict(n_embd=100_000_000), dict(vocab_size=10 ** 11), dict(block_size=10 ** 12), dict(head_dim=10 ** 10)])
def test_a_model_that_the_machine_cannot_hold_is_a_user_error_before_anything_is_allocated(huge, monkeypatch):
    config = GPTConfig(**{**dict(vocab_size=V, block_size=8, n_layer=1, n_head=4, n_embd=32), **huge})
    for part in ("Embedding", "Linear"):
        monkeypatch.setattr(model.nn, part, lambda *_, **__: pytest.fail("allocates"))
    with pytest.raises(UserError, match=f"{config.parameters:,} parameters.*GiB"):
        GPT(config)


def test_shapes_without_memory_may_be_of_any_size():
    with torch.device("meta"):
        assert GPT(GPTConfig(V, 8, 1, 4, 1_000_000)).wte.weight.shape == (V, 1_000_000)


def test_more_positions_than_the_block_are_an_error_with_a_cache_and_without():
    gpt = make(block_size=8)
    cache, _ = prefill(gpt, [3, 8], 20)
    for ids, cache in (torch.zeros(1, 9, dtype=torch.long), None), (torch.zeros(2, 1, dtype=torch.long), cache):
        with pytest.raises(AssertionError, match="block_size"):
            gpt.hidden(ids, cache)


# ---------------------------------------------------------------------------------------------------------------------------
# The cache

def prefill(gpt, lens, capacity):
    """A cache that has read random prompts of these lengths, padded on the right, and what each row has read."""
    torch.manual_seed(0)
    ids = torch.randint(V, (len(lens), max(lens)))
    cache = KVCache(gpt.config, len(lens), capacity)
    gpt.hidden(ids, cache)
    cache.set_lens(lens)
    return cache, [row[:n].tolist() for row, n in zip(ids, lens)]


def feed(gpt, cache, histories, T=1):
    """Give each row T more tokens through the cache: the logits must be those of a full pass over the row alone."""
    new = torch.randint(V, (len(histories), T))
    logits = gpt.lm_head(gpt.hidden(new, cache))
    for row, h, ours in zip(new.tolist(), histories, logits):
        h += row
        torch.testing.assert_close(ours, gpt(torch.tensor([h]))[0, -T:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("lens", [[5, 5], [2, 7, 1, 5]])
def test_cached_logits_are_those_of_the_full_pass(variant, lens):
    gpt = make(**VARIANTS[variant])
    cache, histories = prefill(gpt, lens, 20)
    for T in (1, 1, 4, 1, 3):
        feed(gpt, cache, histories, T)


@pytest.mark.parametrize("lens, T, capacity", [([3, 3], 1, 4), ([3, 3], 1, 7), ([3, 3], 3, 6), ([2, 5], 1, 7), ([2, 5, 4], 2, 9)])
def test_a_window_needs_a_cache_of_its_own_size_only_at_any_length(lens, T, capacity):
    gpt = make(window=4)
    cache, histories = prefill(gpt, lens, capacity)
    for _ in range(50 // T):
        feed(gpt, cache, histories, T)


def test_without_a_window_a_full_cache_is_an_error_not_a_wrong_answer():
    gpt = make()
    cache, histories = prefill(gpt, [3, 3], 4)
    feed(gpt, cache, histories)
    with pytest.raises(AssertionError):
        feed(gpt, cache, histories)


@pytest.mark.parametrize("rolled_back", [[6, 6], [8, 5]])
@pytest.mark.parametrize("window", [None, 4])
def test_rejected_tokens_leave_no_trace(rolled_back, window):
    gpt = make(window=window)
    cache, histories = prefill(gpt, [5, 5], 20)
    feed(gpt, cache, histories, 4)
    cache.set_lens(rolled_back)
    histories = [h[:n] for h, n in zip(histories, rolled_back)]
    for T in (1, 3):
        feed(gpt, cache, histories, T)


def test_rolling_back_past_what_a_sliding_cache_holds_is_an_error_not_a_wrong_answer():
    gpt = make(window=4)
    cache, histories = prefill(gpt, [3, 3], 7)
    for _ in range(5):
        feed(gpt, cache, histories)     # 8 tokens: the first 4 are gone
    with pytest.raises(AssertionError):     # 5 tokens: the next one would see token 2
        cache.set_lens([5, 5])


@pytest.mark.parametrize("lens", [[4, 4], [2, 5]])
def test_the_clones_of_a_prefill_go_their_own_ways(lens):
    gpt = make(n_kv_head=2)
    cache, histories = prefill(gpt, lens, 12)
    clones, clone_histories = cache.expand(3, 12), [[*h] for h in histories for _ in range(3)]
    for _ in range(3):
        feed(gpt, clones, clone_histories)
        feed(gpt, cache, histories)
    clones.keep(torch.arange(6) > 0)
    with pytest.raises(AssertionError, match="before rows are dropped"):
        clones.expand(2, 12)


@pytest.mark.parametrize("lens", [[5, 5, 5, 5, 5], [1, 3, 2, 3, 1]])
@pytest.mark.parametrize("window, capacity", [(None, 30), (4, 7)])
def test_rows_that_leave_do_not_disturb_those_that_stay(lens, window, capacity):
    gpt = make(window=window)
    cache, histories = prefill(gpt, lens, capacity)
    for alive in ([1, 0, 1, 1, 1], [0, 1, 1, 1], [1, 1, 0], [0, 1]):
        for _ in range(4):
            feed(gpt, cache, histories)
        histories = [histories[i] for i in cache.keep(torch.tensor(alive, dtype=torch.bool))]
        assert len(histories) == cache.rows == sum(alive)
    feed(gpt, cache, histories)


# ---------------------------------------------------------------------------------------------------------------------------
# generate: the same tokens as without cache, batch or early stopping

def uncached_greedy(gpt, prompt, n):
    ids = list(prompt)
    for _ in range(n):
        ids.append(int(gpt(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt):]


@pytest.mark.parametrize("variant", VARIANTS)
def test_cached_greedy_is_uncached_greedy_token_for_token(variant):
    gpt = make(**VARIANTS[variant])
    rollout = generate(gpt, PROMPTS, max_new_tokens=20, temperature=0)
    assert rollout.tokens() == [uncached_greedy(gpt, p, 20) for p in PROMPTS]
    assert rollout.logp.eq(0).all()     # a choice that is certain


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_row_of_a_batch_is_the_row_alone(variant):
    gpt = make(**VARIANTS[variant]).double()    # a number that drives many tokens magnifies rounding
    u = torch.rand(8, generator=seeded(), dtype=torch.float64)
    batch = generate(gpt, PROMPTS, n=2, max_new_tokens=6, uniforms=u, generator=seeded())
    for r, tokens in enumerate(batch.tokens()):
        alone = generate(gpt, [PROMPTS[r // 2]], max_new_tokens=6, uniforms=u[r:r + 1], generator=seeded())
        assert alone.tokens() == [tokens]
        torch.testing.assert_close(batch.logp[r][batch.mask[r] > 0], alone.logp[alone.mask > 0], rtol=0, atol=1e-5)


SETTINGS = {"sampled": dict(), "greedy": dict(temperature=0), "stop": dict(stop=1), "stops": dict(stop=[4, 1]), "truncated": dict(top_k=9, top_p=0.8, temperature=0.7, stop=2),
            "uniforms": dict(uniforms=torch.rand(24, generator=seeded(), dtype=torch.float64), stop=3)}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU"))])
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_decoding_on_fixed_shapes_gives_the_tokens_of_decoding_step_by_step(monkeypatch, variant, settings, device):
    gpt, rollouts = make(**VARIANTS[variant]).double().to(device), []
    for where, span in ((), 1), ((device,), 1), ((device,), 5), ((device,), 100):
        monkeypatch.setattr(model, "STATIC_ON", where), monkeypatch.setattr(model, "SPAN", span)
        rollouts.append(generate(gpt, PROMPTS, n=6, max_new_tokens=17, generator=seeded(), **SETTINGS[settings]))
    if "stop" in SETTINGS[settings]:
        assert len(set(rollouts[0].lengths.tolist())) > 1       # rows do leave on the way
    for static in rollouts[1:]:
        assert static.tokens() == rollouts[0].tokens() and static.mask.equal(rollouts[0].mask)
        torch.testing.assert_close(static.logp, rollouts[0].logp, rtol=0, atol=1e-5)


def test_decoding_on_fixed_shapes_goes_on_past_the_slots_of_a_span(monkeypatch):
    gpt, rollouts = make(block_size=200).double(), []
    monkeypatch.setattr(model, "SPAN", 30)
    for where in (), ("cpu",):
        monkeypatch.setattr(model, "STATIC_ON", where)
        rollouts.append(generate(gpt, PROMPTS, max_new_tokens=150, generator=seeded()).tokens())
    assert rollouts[0] == rollouts[1]


@pytest.mark.parametrize("stop", range(4))      # 0 is also the padding, and every prompt holds some stop
@pytest.mark.parametrize("uniforms", [None, torch.linspace(0, 0.999, 32, dtype=torch.float64)])
@pytest.mark.parametrize("gpt, length", [(make(vocab_size=4, window=6).double(), 12), (known([0.4, 0.3, 0.2, 0.1]), 40)])
def test_stopping_cuts_rows_and_changes_nothing_else(gpt, length, uniforms, stop):
    prompts = [[0, 0, 1], [2], [0, 3, 0, 0, 2, 0], [1, 0]]
    sample = lambda stop: generate(gpt, prompts, n=8, max_new_tokens=length, stop=stop, uniforms=uniforms, generator=seeded())
    free, stopped = sample(None), sample(stop)
    lengths = [row.index(stop) + 1 if stop in row else length for row in free.tokens()]
    assert len(set(lengths)) > 4
    assert stopped.tokens() == [row[:n] for row, n in zip(free.tokens(), lengths)]
    for r, n in enumerate(lengths):
        p = len(prompts[r // 8])
        assert stopped.ids[r, :p].tolist() == prompts[r // 8]
        assert stopped.mask[r].tolist() == [float(p <= t < p + n) for t in range(stopped.mask.shape[1])]
        torch.testing.assert_close(stopped.logp[r, p:p + n], free.logp[r, p:p + n], rtol=0, atol=1e-5)
        assert stopped.logp[r, :p].eq(0).all() and stopped.logp[r, p + n:].eq(0).all()


@pytest.mark.parametrize("where", [(), ("cpu",)])
def test_a_row_ends_at_whichever_of_several_ids_comes_first(monkeypatch, where):
    monkeypatch.setattr(model, "STATIC_ON", where), monkeypatch.setattr(model, "SPAN", 5)
    sample = lambda stop: generate(known([0.4, 0.3, 0.2, 0.1]), [[0, 0, 1], [2]], n=8, max_new_tokens=40, stop=stop, generator=seeded())
    free = sample(None).tokens()
    for stop in ([], [3], [0], [3, 2], [1, 2, 3], [7]):
        ends = [[t for t, token in enumerate(row) if token in stop] for row in free]
        rows = sample(stop)
        assert rows.tokens() == [row[:end[0] + 1] if end else row for row, end in zip(free, ends)]
        assert rows.lengths.tolist() == [len(row) for row in rows.tokens()] and rows.mask.sum() == rows.lengths.sum()
    assert sample([3]).tokens() == sample(3).tokens() == sample(torch.tensor([3])).tokens() and sample([]).tokens() == free


@pytest.mark.parametrize("where", [(), ("cpu",)])
@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("bad_step", [0, 1, 6])
def test_a_logit_that_is_not_finite_is_an_error_at_whatever_step(monkeypatch, where, temperature, wrong, bad_step):
    monkeypatch.setattr(model, "STATIC_ON", where)
    gpt, steps = make(), itertools.count()

    def spoil(_, inputs, out):
        if next(steps) == bad_step:
            out[-1, 3] = wrong
        return out
    gpt.lm_head.register_forward_hook(spoil)
    with pytest.raises(NotFinite, match="finite"):
        generate(gpt, PROMPTS, max_new_tokens=7, temperature=temperature, generator=seeded())


class Looks(TorchDispatchMode):
    """How often a value is fetched from the device."""
    n = 0

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        self.n += f is torch.ops.aten._local_scalar_dense.default
        return f(*args, **(kwargs or {}))


def test_nothing_is_fetched_from_the_device_between_two_looks_at_who_has_stopped(monkeypatch):
    monkeypatch.setattr(model, "STATIC_ON", ("cpu",))
    fetched = []
    for new in (5, 50):
        with Looks() as looks:
            generate(make(), PROMPTS, max_new_tokens=new, stop=[1, 2], generator=seeded())
        fetched.append(looks.n)
    assert 0 < fetched[0] == fetched[1]


def test_memory_that_was_never_written_is_never_felt():
    gpt = make()
    wanted = generate(gpt, PROMPTS, max_new_tokens=8, temperature=0).tokens()
    torch.use_deterministic_algorithms(True)    # fills uninitialised memory with nan
    try:
        assert torch.empty(3).isnan().all()
        assert generate(gpt, PROMPTS, max_new_tokens=8, temperature=0).tokens() == wanted
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_generators_seed_decides_the_tokens():
    gpt = make()
    draw = lambda seed: generate(gpt, PROMPTS, n=4, max_new_tokens=8, generator=seeded(seed)).tokens()
    assert draw(1) == draw(1) != draw(2)


def test_the_models_weights_are_not_trained_by_sampling():
    gpt = make().requires_grad_(True)
    assert not generate(gpt, PROMPTS, max_new_tokens=3, generator=seeded()).logp.requires_grad


def test_prompts_of_different_lengths_can_be_continued_under_autocast_and_no_rows_at_all_be_read():
    gpt = make()
    with torch.autocast("cpu", torch.bfloat16):
        assert generate(gpt, PROMPTS, n=2, max_new_tokens=4, generator=seeded()).ids.shape[0] == 2 * len(PROMPTS)
    assert gpt.hidden(torch.zeros(0, 3, dtype=torch.long)).shape == (0, 3, gpt.config.n_embd)


def test_a_step_that_cannot_be_captured_runs_eagerly_from_then_on_and_on_the_stream_it_came_from(monkeypatch):
    streams, gpu = [], torch.device("cuda")

    def capture(graph):
        raise RuntimeError("not while capturing")
    for name, stub in dict(CUDAGraph=lambda: None, graph=capture, current_stream=lambda device: "the caller's", set_stream=streams.append).items():
        monkeypatch.setattr(torch.cuda, name, stub)
    monkeypatch.setattr(model, "STATIC_ON", ("cuda",))
    step = lambda: None
    assert model.captured(step, gpu) is step and streams == ["the caller's"] and model.STATIC_ON == ()


@pytest.mark.parametrize("prompts, kwargs", [([[1], []], {}), ([], {}), ([[1] * 60], dict(max_new_tokens=6)), ([[1] * 65], dict(max_new_tokens=1)),
                                             *(([[1]], wrong) for wrong in (
                                                 dict(temperature=-0.5), dict(temperature=1e-39), dict(uniforms=torch.tensor([float("nan")])), dict(uniforms=torch.tensor([0])), dict(n=0), dict(max_new_tokens=0), dict(top_k=0), dict(top_p=0), dict(top_p=1e-46), dict(top_p=float("nan")), dict(top_p=1.5),
                                                 dict(uniforms=torch.tensor([1.0])), dict(uniforms=torch.tensor([-0.1])), dict(n=2, uniforms=torch.rand(1))))])
def test_bad_requests_are_value_errors(prompts, kwargs):
    with pytest.raises(ValueError):
        generate(make(), prompts, **{"max_new_tokens": 2, **kwargs})


def test_emulated_bf16_is_sampled_from_a_copy_in_fp32(monkeypatch):
    gpt = make().bfloat16()
    monkeypatch.setattr(model, "gemm_dtype", lambda x: torch.float32)
    rows = generate(gpt, PROMPTS, n=4, max_new_tokens=8, generator=seeded()).tokens()
    assert {p.dtype for p in gpt.parameters()} == {torch.bfloat16}
    assert rows == generate(gpt.float(), PROMPTS, n=4, max_new_tokens=8, generator=seeded()).tokens()


def test_skipping_draws_takes_the_numbers_that_sampling_takes():
    a, b = seeded(), seeded()
    generate(make(), PROMPTS, n=3, max_new_tokens=5, generator=a, stop=1)
    model.skip_draws(12, SimpleNamespace(max_new_tokens=5), b)
    assert torch.equal(a.get_state(), b.get_state())


def test_the_last_position_of_the_block_can_be_used():
    gpt = make()
    assert generate(gpt, [[1] * 60], max_new_tokens=5, temperature=0).tokens() == [uncached_greedy(gpt, [1] * 60, 5)]


# ---------------------------------------------------------------------------------------------------------------------------
# generate: samples follow the model's law

def law(gpt, prompt, length, stop, temperature):
    """The probability of every sequence, by enumeration."""
    open_, closed = {(): 1.0}, {}
    for _ in range(length):
        grown = {}
        for seq, p in open_.items():
            probs = (gpt(torch.tensor([[*prompt, *seq]]))[0, -1].double() / temperature).softmax(-1)
            grown.update({(*seq, t): p * q for t, q in enumerate(probs.tolist())})
        closed.update({s: p for s, p in grown.items() if s[-1] == stop})
        open_ = {s: p for s, p in grown.items() if s[-1] != stop}
    return {**open_, **closed}


@pytest.mark.parametrize("dtype", [None, torch.float64, torch.float32])
@pytest.mark.parametrize("stop, temperature", [(None, 1.0), (2, 1.6)])
def test_sampled_sequences_follow_the_exact_law(dtype, stop, temperature):
    gpt, n = make(vocab_size=3), 10000
    prompts = [[1], [0, 2, 0, 1]]
    uniforms = None if dtype is None else torch.rand(2 * n, generator=seeded(3), dtype=dtype)
    rows = generate(gpt, prompts, n, 3, temperature, stop=stop, generator=seeded(1), uniforms=uniforms).tokens()
    for i, prompt in enumerate(prompts):
        exact, counts = law(gpt, prompt, 3, stop, temperature), Counter(map(tuple, rows[i * n:(i + 1) * n]))
        assert set(counts) <= set(exact) and abs(sum(exact.values()) - 1) < 1e-9
        assert follows([counts[s] for s in exact], list(exact.values()))


def test_first_tokens_of_a_group_follow_the_models_probabilities():
    gpt = make()
    rollout = generate(gpt, PROMPTS, n=2000, max_new_tokens=1, generator=seeded())
    for i, prompt in enumerate(PROMPTS):
        first = [row[0] for row in rollout.tokens()[i * 2000:(i + 1) * 2000]]
        assert follows(np.bincount(first, minlength=V), gpt(torch.tensor([prompt]))[0, -1].double().softmax(-1).numpy())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("probs", [[1 / 8] * 8, [1 / 2, 1 / 4, 1 / 8, 1 / 8], [0.6, 0.1, 0.3]])
def test_one_number_drives_64_tokens_exactly(dtype, probs):
    """8 equal tokens take 3 bits each: without fresh bits a float32 is spent after 8 tokens, a float64 after 18."""
    n, V = 2000, len(probs)
    uniforms = torch.rand(n, generator=seeded(1), dtype=dtype)
    rows = np.array(generate(known(probs), [[0]], n, 63, uniforms=uniforms, generator=seeded(2)).tokens())      # (n, 63)
    assert len({*map(tuple, rows)}) == n
    assert follows([np.bincount(column, minlength=V) for column in rows.T], [probs] * 63)
    for start in (19, 20):      # odd and even: fresh bits arrive between the two tokens of some pair
        pairs = rows[:, start:start + 42].reshape(-1, 2)
        assert follows(np.bincount(pairs[:, 0] * V + pairs[:, 1], minlength=V * V), np.outer(probs, probs).ravel())


def test_fresh_bits_arrive_when_half_of_a_number_is_spent():
    """8 equal tokens take 3 bits each, one octal digit: the 26 bits of half a float64 last for 9 tokens."""
    u, fresh = torch.rand(50, generator=seeded(1), dtype=torch.float64), torch.rand(50, 27, generator=seeded(2), dtype=torch.float64)
    rows = torch.tensor(generate(known([1 / 8] * 8), [[0]], 50, 27, uniforms=u, generator=seeded(2)).tokens())
    octal = lambda x: (x[:, None] * 8 ** torch.arange(1, 10)).floor() % 8
    assert torch.equal(rows, torch.cat([octal(u), octal(fresh[:, 8]), octal(fresh[:, 17])], dim=1).long())


def test_rows_with_neighbouring_numbers_part_for_good():
    """Lattice points that agree on their first bits get fresh bits of their own."""
    rows = np.array(generate(known([1 / 8] * 8), [[0]], 200, 60, uniforms=torch.full((200,), 0.3), generator=seeded()).tokens())
    assert (rows[:, 0] == rows[0, 0]).all()
    assert follows([np.bincount(column, minlength=8) for column in rows[:, 20:].T], [[1 / 8] * 8] * 40)


def test_the_first_token_inverts_the_cdf_at_the_rows_number():
    gpt = make()
    u = torch.rand(500, generator=seeded(), dtype=torch.float64)
    cdf = gpt(torch.tensor([PROMPTS[1]]))[0, -1].double().softmax(-1).cumsum(-1).numpy()
    first = [row[0] for row in generate(gpt, [PROMPTS[1]], 500, 1, uniforms=u).tokens()]
    assert first == np.searchsorted(cdf, u.numpy(), side="right").tolist()


def test_a_lattice_covers_the_first_tokens_evenly():
    gpt, k = make(), 64
    for delta in torch.rand(20, generator=seeded(), dtype=torch.float64):
        u = (torch.arange(k, dtype=torch.float64) / k + delta) % 1
        counts = generate(gpt, [PROMPTS[1]], k, 1, uniforms=u).ids[:, -1].bincount(minlength=V)
        assert ((counts - k * gpt(torch.tensor([PROMPTS[1]]))[0, -1].softmax(-1)).abs() < 1 + 1e-4).all()


def test_inverse_cdf_never_leaves_the_support():
    probs = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0], [0.1, 0.2, 0.7, 0.0, 0.0]])
    for u in (0.0, 0.5, 1 - 2 ** -53, 1.0):     # a float32 rounded up by the caller can be 1
        token, place = inverse_cdf(probs, torch.full((2,), u, dtype=torch.float64))
        assert (probs.gather(1, token[:, None]) > 0).all()
        assert ((0 <= place) & (place <= 1)).all()


# ---------------------------------------------------------------------------------------------------------------------------
# Rollout: the sampled distribution is the scored distribution

@pytest.mark.parametrize("temperature", [0.5, 1, 1.7])
@pytest.mark.parametrize("variant", ["multi-head", "window"])
def test_the_samplers_logp_is_the_scorers(temperature, variant):
    gpt = make(**VARIANTS[variant])
    r = generate(gpt, PROMPTS, n=8, max_new_tokens=16, temperature=temperature, stop=5, generator=seeded())
    logp, _ = token_logprobs(gpt.hidden(r.ids[:, :-1]), gpt.lm_head.weight, r.ids[:, 1:], temperature)
    assert r.lengths.unique().numel() > 2
    torch.testing.assert_close(r.logp[:, 1:], logp * r.mask[:, 1:], rtol=0, atol=1e-4)


@pytest.mark.parametrize("top_k, top_p", [(3, None), (None, 0.7), (5, 0.8)])
def test_under_top_k_and_top_p_logp_is_that_of_the_truncated_distribution(top_k, top_p):
    gpt = make()
    r = generate(gpt, PROMPTS, n=8, max_new_tokens=10, temperature=1.5, top_k=top_k, top_p=top_p, generator=seeded())
    scores = truncate(gpt(r.ids)[:, :-1].flatten(0, 1) / 1.5, top_k, top_p).log_softmax(-1)
    logp = scores.gather(-1, r.ids[:, 1:].reshape(-1, 1)).view(r.ids[:, 1:].shape)
    drawn = r.mask[:, 1:] > 0
    torch.testing.assert_close(r.logp[:, 1:][drawn], logp[drawn], rtol=0, atol=1e-4)


def test_top_k_of_one_is_greedy():
    gpt = make()
    assert generate(gpt, PROMPTS, max_new_tokens=10, top_k=1, generator=seeded()).tokens() == [uncached_greedy(gpt, p, 10) for p in PROMPTS]


@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("top_k", [None, 1, 6, 100])
def test_truncate_keeps_the_smallest_set_of_the_k_largest_that_reaches_p(top_k, top_p):
    logits = 2 * torch.randn(50, V, generator=seeded(), dtype=torch.float64)
    for row, kept in zip(logits, truncate(logits, top_k, top_p)):
        order = row.argsort(descending=True)[:top_k]
        p = row[order].softmax(-1)
        size = next(m for m in range(1, len(p) + 1) if p[:m].sum() >= top_p)
        assert {*kept.isfinite().nonzero()[:, 0].tolist()} == {*order[:size].tolist()}
        assert torch.equal(kept[order[:size]], row[order[:size]])


def test_truncate_stops_at_the_token_that_reaches_p():
    assert [truncate(torch.zeros(1, 4), None, p).isfinite().sum().item() for p in (0.25, 0.5, 0.51, 1)] == [1, 2, 3, 4]


def test_the_texts_are_what_was_generated_without_the_stop_token():
    tokenizer = train_bpe(TEXT, 257)
    rows = torch.tensor([[*b"ab", *b"cd", 256, 0], [*b"a", *b"efg", *b"xx"]])
    mask = torch.tensor([[0., 0, 1, 1, 1, 0], [0, 1, 1, 1, 0, 0]])
    rollout = Rollout(rows, mask, mask, torch.tensor([2, 1]))
    assert rollout.texts(tokenizer) == ["cd", "efg"]
    tokenizer.stop = [256, ord("g")]
    assert rollout.texts(tokenizer) == ["cd", "ef"]


def test_indexing_and_joining_rollouts_keep_every_row():
    gpt = make()
    a, b = (generate(gpt, PROMPTS, n=3, max_new_tokens=n, stop=0, generator=seeded(n)) for n in (3, 15))
    both = Rollout.cat([a, b])
    assert both.tokens() == a.tokens() + b.tokens()
    order = torch.tensor([20, 3, 13, 0])
    for rows in (order, both.lengths < 4):
        part = both[rows]
        index = torch.arange(24)[rows].tolist()
        assert part.tokens() == [both.tokens()[i] for i in index]
        assert part.ids.shape[1] == max(len(PROMPTS[i % 12 // 3]) + len(both.tokens()[i]) for i in index)
        torch.testing.assert_close(part.logp.sum(1), both.logp[rows].sum(1))
        assert torch.equal(part.prompt_lens, both.prompt_lens[rows])


# ---------------------------------------------------------------------------------------------------------------------------
# Tokenizers

TEXT = ("Der Übermut der Ärzte: naïve façade, naïve œuvre… 東京都と京都、東京タワー 🙂🙂🙃 it's they'll we've\n\n"
        "the theme of the thesis is the thing; banana bandana aaaa aaaaa aaaaaaa 1234 12 123   \tindent\n")
TEXT += " ".join("".join(random.Random(i).choices("aabé", k=i % 9)) for i in range(200))    # many ties, and words of one letter


def naive_bpe(text, n):
    """Count every pair again at each step -> merges, and the words as they end up."""
    words, merges = [[bytes([b]) for b in w.encode()] for w in regex.findall(SPLIT, text)], []
    while len(merges) < n and (pairs := Counter(p for w in words for p in zip(w, w[1:]))):
        best = max(pairs, key=lambda p: (pairs[p], p))
        if best[0] + best[1] not in merges:
            merges.append(best[0] + best[1])
        for w in words:
            j = 0
            while j < len(w) - 1:
                if (w[j], w[j + 1]) == best:
                    w[j:j + 2] = [best[0] + best[1]]
                j += 1
    return merges, words


def test_bpe_merges_are_those_of_the_worked_example():
    text = "\n".join(["low"] * 5 + ["lower"] * 2 + ["widest"] * 3 + ["newest"] * 6)     # CS336's, after Sennrich et al.
    assert bpe_merges(text, 6) == [b"st", b"est", b"ow", b"low", b"west", b"ne"]


def test_of_equally_frequent_pairs_the_greater_is_merged():
    assert bpe_merges("ab\nzy\nza\nz", 1) == [b"zy"]
    assert bpe_merges("aba\nabb\nabc\nbab", 3) == [b"ab", b"bab", b"abc"]     # (b, ab), (ab, c), ...: pairs of bytes, not of ids


def test_bpe_with_kept_counts_is_bpe_with_fresh_counts():
    assert bpe_merges(TEXT, 120) == naive_bpe(TEXT, 120)[0]


@pytest.mark.parametrize("alphabet", ["a", "ab", "acgt", "ab é", "東京都タ ", "abc  \n1"])
def test_bpe_merges_of_random_texts_are_those_of_brute_force_to_the_last_pair(alphabet):
    for seed in range(60):
        text = "".join(random.Random(seed).choices(alphabet, k=2 * seed))
        for n in (3, 1000):
            assert bpe_merges(text, n) == naive_bpe(text, n)[0]


@pytest.mark.parametrize("characters", ["acgt", "".join(map(chr, range(0x4e00, 0x5200)))])
def test_text_without_spaces_takes_a_few_heap_operations_for_each_byte_however_many_merges(monkeypatch, characters):
    text = "".join(random.Random(0).choices(characters, k=4000))
    operations = Counter()

    def counted(name):
        original = getattr(model.heapq, name)
        return lambda heap, *item: operations.update([name]) or original(heap, *item)
    for name in ("heappush", "heappop"):
        monkeypatch.setattr(model.heapq, name, counted(name))
    assert len(bpe_merges(text, 700)) == 700
    assert operations.total() <= 4 * len(text.encode())


def test_tiktoken_cuts_the_training_text_as_training_did():
    encoding = train_bpe(TEXT, 256 + 120 + 1)
    assert [encoding.decode_single_token_bytes(t) for t in encoding.encode(TEXT)] == list(itertools.chain(*naive_bpe(TEXT, 120)[1]))


@pytest.mark.parametrize("text", [TEXT, "", "never seen: ß ü \x00 \U0001f9ea 한국어\r\n\t  x "])
def test_a_trained_bpe_gives_any_text_back(text):
    encoding = train_bpe(TEXT, 300)
    assert encoding.decode(encoding.encode(text)) == text


@pytest.mark.parametrize("space", [" ", "\n"])
def test_a_million_spaces_are_text_like_any_other(space):
    text = "a b" + 10 ** 6 * space + "c"
    encoding = train_bpe(text, 300)
    assert encoding.decode(encoding.encode_ordinary(text)) == text
    assert encoding.encode_ordinary_batch([text, "a b"]) == [encoding.encode_ordinary(text), encoding.encode("a b")]


def test_the_end_of_text_is_the_last_id():
    encoding = train_bpe(TEXT, 300)
    assert encoding.eos == 299 == encoding.n_vocab - 1 and encoding.stop == [299]
    assert train_bpe(TEXT, 257).eos == 256


def test_a_vocabulary_too_small_for_bytes_is_a_value_error():
    with pytest.raises(ValueError):
        train_bpe(TEXT, 256)


def test_characters_come_back_and_eos_decodes_to_nothing():
    tokenizer = CharTokenizer("abc =é")
    assert tokenizer.decode(tokenizer.encode("a = bé") + [tokenizer.eos]) == "a = bé"
    assert tokenizer.eos == 6 == tokenizer.n_vocab - 1 and tokenizer.stop == [6]
    with pytest.raises(AssertionError):
        CharTokenizer("abca")


# ---------------------------------------------------------------------------------------------------------------------------
# python model.py

def test_documents_come_from_the_standard_library_a_file_a_folder_or_a_dataset(tmp_path):
    assert any("import" in text for text in model.load_documents(""))
    (tmp_path / "texts").mkdir(), (tmp_path / "rows").mkdir(), (tmp_path / "empty").mkdir()
    for name in ("b.txt", "a.md", "c.bin"):
        (tmp_path / "texts" / name).write_text(name)
    (tmp_path / "rows" / "data.jsonl").write_text("".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(3)))
    assert model.load_documents(str(tmp_path / "texts" / "b.txt")) == ["b.txt"]
    assert model.load_documents(str(tmp_path / "texts")) == ["a.md", "b.txt"]
    assert model.load_documents(str(tmp_path / "rows")) == ["row 0", "row 1", "row 2"]      # through datasets
    with pytest.raises(UserError, match="empty"):
        model.load_documents(str(tmp_path / "empty"))


@pytest.mark.parametrize("rows, words", [([{"text": "a"}, {"text": None}], "row 2 is no text but None"), ([{"text": 5}] * 3, "row 1 is no text but 5")])
def test_a_dataset_row_that_is_no_text_is_one_line_with_its_number(tmp_path, rows, words):
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=words):
        model.load_documents(str(tmp_path))


@pytest.mark.parametrize("inside", ["", "a.txt"])
def test_a_text_that_cannot_be_read_is_one_line_that_names_it(tmp_path, monkeypatch, inside):
    (tmp_path / "a.txt").write_text("text")

    def denied(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))
    monkeypatch.setattr(Path, "read_text", denied)
    error = complain("model.py", "--quick", "--data", tmp_path / inside, "--out", tmp_path / "out")
    assert "a.txt" in error and "Permission denied" in error


def test_a_name_that_no_file_can_have_is_one_line():
    assert "name too long" in complain("model.py", "--quick", "--data", "x" * 300).lower()


@pytest.mark.parametrize("flags, words", [(["--bench", "--nanogpt", "/nonexistent"], "/nonexistent"), (["--nanogpt", "/nonexistent"], "--nanogpt does nothing"),
                                          (["--bench", "--steps", 3], "--steps does nothing")])
def test_the_benchmark_refuses_at_once_what_it_cannot_do(flags, words):
    started = time.time()
    assert words in complain("model.py", *flags) and time.time() - started < 5


@pytest.mark.parametrize("sizes", [[200], [10, 990], [5000, *[10] * 9]])
def test_of_ten_documents_or_fewer_a_tenth_is_held_out_by_size(sizes):
    texts = ["".join(random.Random(n).choices("abc", k=n)) for n in sizes]
    train, held_out = model.split(texts)
    assert [a + b for a, b in zip(train, held_out)] == texts
    assert sum(map(len, held_out)) == pytest.approx(sum(sizes) / 10, abs=len(sizes))


def test_of_more_than_ten_documents_every_tenth_is_held_out():
    assert model.split([str(i) for i in range(12)]) == (["1", "2", "3", "4", "5", "6", "7", "8", "9", "11"], ["0", "10"])


TINY = ["--quick", "--device", "cpu", "--steps", 10, "--eval-every", 4, "--seeds", 2, "--batch", 2, "--block-size", 16]


def written(folder, documents):
    """Texts of several bytes a character: one file, or one for each document, some in a folder of their own."""
    texts = ["".join(random.Random(i).choices(["über ", "das ", "東京 ", "theme ", "these\n"], k=4000 // documents)) for i in range(documents)]
    for i, text in enumerate(texts):
        path = folder / ("texts/more", "texts")[i < 10] / f"{i:02d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
    return texts, folder / "texts" / ("00.txt" if documents == 1 else "")


@pytest.mark.parametrize("documents", [1, 12])
def test_pretraining_is_measured_on_all_of_the_held_out_text_and_none_of_it_is_trained_on(tmp_path, documents, monkeypatch):
    texts, data = written(tmp_path, documents)
    seen = []
    monkeypatch.setattr(model, "train_bpe", lambda text, size: seen.append(text) or train_bpe(text, size))
    finish("model.py", *TINY, "--data", data, "--out", tmp_path / "out")
    assert check_whole(tmp_path / "out", also=("samples.txt",)) == "loss"
    cut = len(texts[0]) * 9 // 10
    train, held_out = (texts[1:10] + texts[11:], [texts[0], texts[10]]) if documents > 1 else ([texts[0][:cut]], [texts[0][cut:]])
    assert seen == ["".join(train)]

    tokenizer, rows = train_bpe("".join(train), 300), metrics(tmp_path / "out")
    ids = [i for text in held_out for i in tokenizer.encode_ordinary(text) + [tokenizer.eos]]
    state, bits, data = load_checkpoint(tmp_path / "out" / "model.pt")["state"], [], "".join(held_out).encode()
    windows = torch.tensor([ids[i:i + 17] for i in range(0, len(ids) - 16, 16)])
    assert len(windows) > 16 and len(windows) % 16       # a last part that is shorter
    for seed in range(2):
        gpt = GPT(GPTConfig(tokenizer.n_vocab, 16, 1, 4, 32, 2, qk_norm=True)).requires_grad_(False)
        gpt.load_state_dict(state[f"gpt {seed}"]["model"])
        nats = torch.nn.functional.cross_entropy(gpt(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())
        bits.append(float(nats) / np.log(2) * len(ids) / len(data))
        mine = [r for r in rows if r["seed"] == seed]
        assert [(r["step"], r["tokens"]) for r in mine] == [(t, t * 2 * 16) for t in range(1, 11)]
        assert [r["step"] for r in mine if "val_loss" in r] == [4, 8, 10]
        np.testing.assert_allclose((mine[-1]["val_loss"], mine[-1]["val_bits_per_byte"]), (float(nats), bits[seed]), rtol=1e-4)
    claim, = json.loads((tmp_path / "out" / "claims.json").read_text())
    gzip = 8 * len(zlib.compress(data, 9)) / len(data)
    told = [float(x) for x in re.findall(r"[\d.]+", claim["ours"] + claim["threshold"])]
    assert told == [pytest.approx(x, rel=6e-2) for x in (np.mean(bits), np.std(bits, ddof=1), gzip)] and claim["seeds"] == 2
    assert abs(bits[0] - bits[1]) > 0.003 and claim["holds"] == (np.mean(bits) <= gzip)


def test_pretraining_is_adamw_on_clipped_gradients_of_random_windows_from_a_seed_of_its_own():
    config = model.Config(steps=4, seed=5, batch=3, block_size=8, eval_every=10, lr=0.03)
    ids, run = torch.randint(8, (100,), generator=seeded()), Memory()
    gpt_config = GPTConfig(8, 8, 1, 2, 64, 1)
    ours = model.pretrain(config, run, 6, "cpu", gpt_config, ids, ids[:40], 1.0)
    torch.manual_seed(6)
    gpt, g = GPT(gpt_config), seeded(6)
    optimizer = torch.optim.AdamW(gpt.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(4):
        lr = model.lr_at(step, 4, 0.03)
        optimizer.param_groups[0]["lr"] = lr
        x = torch.stack([ids[i:i + 9] for i in torch.randint(92, (3,), generator=g)])
        loss = torch.nn.functional.cross_entropy(gpt(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        norm = torch.stack([p.grad.norm() for p in gpt.parameters()]).norm()
        for p in gpt.parameters():
            p.grad /= max(norm, 1)
        optimizer.step()
        np.testing.assert_allclose((run.rows[step]["loss"], run.rows[step]["grad_norm"]), (loss.item(), norm.item()), rtol=1e-4)
    assert run.rows[0]["grad_norm"] > 1.5
    for p, q in zip(ours.parameters(), gpt.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


def test_the_learning_rate_warms_up_then_falls_in_a_cosine_to_a_tenth():
    assert [model.lr_at(t, 1000, 2.0) for t in (0, 9, 500, 1000)] == pytest.approx([0.1, 1.0, 1.1, 0.2])
    assert model.lr_at(20, 1000, 2.0) == pytest.approx(2, rel=0.01) and model.lr_at(250, 1000, 2.0) == pytest.approx(1.1 + 0.9 / 2 ** 0.5)


def test_interrupt_and_resume_give_the_metrics_of_an_uninterrupted_pretraining_to_the_bit(tmp_path):
    check_resume("model.py", tmp_path, (dict(seed=0, step=3), dict(seed=1, step=7)), *TINY, "--data", written(tmp_path, 1)[1])


def interrupted_at(step, monkeypatch, *flags):
    """A pretraining that SIGTERM ends at a step of seed 0."""
    log = model.Run.log

    def stopping(self, **row):
        log(self, **row)
        if row["step"] == step:
            os.kill(os.getpid(), signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(model.Run, "log", stopping)
        assert launch("model.py", *flags)[0] == 143


def test_a_resumed_run_has_its_tokenizer_in_the_checkpoint_and_refuses_other_data(tmp_path, monkeypatch):
    texts, data = written(tmp_path, 1)
    flags, out = [*TINY, "--data", data, "--out"], tmp_path / "out"
    finish("model.py", *flags, tmp_path / "whole")
    interrupted_at(3, monkeypatch, *flags, out)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    data.write_text(texts[0] + "one more", "utf-8")
    assert "--data" in complain("model.py", "--resume", "--out", out)
    assert before == {p.name: p.read_bytes() for p in out.iterdir()}
    data.write_text(texts[0], "utf-8")
    monkeypatch.setattr(model, "train_bpe", lambda *_: pytest.fail("trains the tokenizer again"))
    finish("model.py", "--resume", "--out", out)
    assert metrics(out) == metrics(tmp_path / "whole")


@pytest.mark.parametrize("given", ["", "folder", "a/hub/id"])
def test_a_resumed_run_refuses_other_data_wherever_they_come_from(tmp_path, monkeypatch, given):
    texts = written(tmp_path, 12)[0]
    data = tmp_path / "texts" if given == "folder" else given
    if given != "folder":
        monkeypatch.setattr(model, "load_documents", lambda data: [*texts])
    interrupted_at(2, monkeypatch, *TINY, "--data", data, "--out", tmp_path / "out")
    texts.append("a new file")
    (tmp_path / "texts" / "new.txt").write_text(texts[-1])
    assert "is no longer what the run" in complain("model.py", "--resume", "--out", tmp_path / "out")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_a_long_evaluation_is_heeded_at_once_and_nothing_is_lost(tmp_path, monkeypatch, number):
    flags = [*TINY, "--data", written(tmp_path, 1)[1], "--out"]
    finish("model.py", *flags, tmp_path / "whole")
    scored, sent = model.token_logprobs, []

    def slow(*args):
        if not torch.is_grad_enabled():
            if not sent:
                sent.append(time.time())
                os.kill(os.getpid(), number)
            time.sleep(2)
        return scored(*args)
    with monkeypatch.context() as patch:
        patch.setattr(model, "token_logprobs", slow)
        code, out, _ = launch("model.py", *flags, tmp_path / "out")
    assert code == 128 + number and "--resume" in out and time.time() - sent[0] < 2
    assert [row["step"] for row in metrics(tmp_path / "out")] == [1, 2, 3]       # the evaluation is at the end of step 4
    finish("model.py", "--resume", "--out", tmp_path / "out")
    assert metrics(tmp_path / "out") == metrics(tmp_path / "whole")
    assert (tmp_path / "out" / "claims.json").read_text() == (tmp_path / "whole" / "claims.json").read_text()


def test_a_learning_rate_that_ruins_the_weights_is_one_line_and_the_last_finite_checkpoint_stays(tmp_path):
    code, _, err = launch("model.py", *TINY, "--lr", 1e30, "--data", written(tmp_path, 1)[1], "--out", tmp_path / "out")
    assert code == 2 and re.search(r"model.py: error: the (loss|gradient norm) is (nan|inf) at step \d+ of gpt 0; .*model.pt holds what was finite\n$", err)
    assert all(np.isfinite(row["loss"]) for row in metrics(tmp_path / "out"))
    assert all(p.isfinite().all() for p in load_checkpoint(tmp_path / "out" / "model.pt")["state"]["gpt 0"]["model"].values())
    assert not (tmp_path / "out" / "claims.json").exists()


def test_results_are_written_whatever_the_terminal_can_print_and_a_closed_pipe_is_no_traceback(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "cp1252"}
    command = [sys.executable, ROOT / "model.py", *map(str, TINY), "--seeds", "1", "--data", written(tmp_path, 1)[1], "--out"]
    done = subprocess.run([*command, tmp_path / "out"], env=environment, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode("cp1252")
    check_whole(tmp_path / "out", also=("samples.txt",))
    sample = (tmp_path / "out" / "samples.txt").read_text("utf-8")
    assert re.search("[東京]", sample) and "?" in done.stdout.decode("cp1252")
    piped = subprocess.Popen([*command, tmp_path / "piped"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    piped.stdout.readline()
    piped.stdout.close()
    assert "Traceback" not in piped.stderr.read().decode("cp1252") and piped.wait(120) in (0, 141)
    assert all("step" in row for row in metrics(tmp_path / "piped"))


def test_help_names_every_flag():
    check_help("model.py")


@pytest.mark.parametrize("flags, words", [(["--block-size", 9999], "too few"), (["--n-head", 5], "n_head 5"), (["--dtype", "int8"], "int8"),
                                          (["--n-layer", 100000000000], "--n-layer"), (["--n-layer", 4000000000], "parameters"), (["--n-embd", 100000000], "GiB"), (["--batch", 1000000000], "--batch")])
def test_a_mistake_is_one_line_and_harms_nothing(flags, words, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.pt").write_text("another run's")
    assert words in complain("model.py", "--quick", "--data", written(tmp_path, 1)[1], *flags, "--out", tmp_path / "out")
    assert [p.read_text() for p in (tmp_path / "out").iterdir()] == ["another run's"]


def test_compile_is_refused_where_it_cannot_work(tmp_path, monkeypatch):
    monkeypatch.setattr(model, "can_compile", lambda device: False)
    monkeypatch.setattr(sys, "argv", ["model.py", "--quick", "--compile", "--device", "cpu", "--out", str(tmp_path)])
    with pytest.raises(UserError, match="--compile"):
        model.main()
    assert not list(tmp_path.iterdir())
