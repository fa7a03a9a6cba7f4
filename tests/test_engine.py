"""engine.py: the cache changes nothing, samples follow the model's law."""

import contextlib
import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from common import PROMPTS, VARIANTS, V, known, make, seeded
from torch.utils._python_dispatch import TorchDispatchMode

import decoding
import engine
from engine import (
    KVCache,
    Rollout,
    generate,
    inverse_cdf,
    inverse_cdf_in_two,
    truncate,
)
from experiment import NotFinite
from kernels import gemm_dtype, token_logprobs
from meter import counter
from tokenizer import train_bpe


def follows(counts, probs):
    """Pearson's chi-squared test at the level 1e-4, rare cells pooled. Both (..., cells); each
    leading index is one more sample.
    """
    counts, expected = (
        np.atleast_2d(counts),
        np.atleast_2d(probs) * np.atleast_2d(counts).sum(-1, keepdims=True),
    )
    rare = expected < 5

    def pool(x):
        return np.append(x[~rare], x[rare].sum())

    observed, expected = pool(counts), pool(expected)
    df = len(observed) - (0 if rare.any() else 1) - len(counts)
    # Wilson and Hilferty's approximation
    critical = df * (1 - 2 / (9 * df) + 3.72 * (2 / (9 * df)) ** 0.5) ** 3
    return ((observed - expected) ** 2 / np.maximum(expected, 1e-9)).sum() < critical


def prefill(gpt, lens, capacity):
    """A cache that has read random prompts of these lengths, padded on the right, and what each row
    has read.
    """
    torch.manual_seed(0)
    ids = torch.randint(V, (len(lens), max(lens)))
    cache = KVCache(gpt.config, len(lens), capacity)
    gpt.hidden(ids, cache)
    cache.set_lens(lens)
    return cache, [row[:n].tolist() for row, n in zip(ids, lens, strict=True)]


def feed(gpt, cache, histories, T=1):
    """Give each row T more tokens through the cache: the logits must be those of a full pass over
    the row alone.
    """
    new = torch.randint(V, (len(histories), T))
    logits = gpt.lm_head(gpt.hidden(new, cache))
    for row, h, ours in zip(new.tolist(), histories, logits, strict=True):
        h += row
        torch.testing.assert_close(ours, gpt(torch.tensor([h]))[0, -T:], rtol=0, atol=1e-5)


def test_more_positions_than_the_block_are_an_error_with_a_cache_and_without():
    gpt = make(block_size=8)
    cache, _ = prefill(gpt, [3, 8], 20)
    for ids, past in (
        (torch.zeros(1, 9, dtype=torch.long), None),
        (torch.zeros(2, 1, dtype=torch.long), cache),
    ):
        with pytest.raises(AssertionError, match="block_size"):
            gpt.hidden(ids, past)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("lens", [[5, 5], [2, 7, 1, 5]])
def test_cached_logits_are_those_of_the_full_pass(variant, lens):
    gpt = make(**VARIANTS[variant])
    cache, histories = prefill(gpt, lens, 20)
    for T in (1, 1, 4, 1, 3):
        feed(gpt, cache, histories, T)


@pytest.mark.parametrize(
    "lens, T, capacity",
    [([3, 3], 1, 4), ([3, 3], 1, 7), ([3, 3], 3, 6), ([2, 5], 1, 7), ([2, 5, 4], 2, 9)],
)
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
    histories = [h[:n] for h, n in zip(histories, rolled_back, strict=True)]
    for T in (1, 3):
        feed(gpt, cache, histories, T)


def test_rolling_back_past_what_a_sliding_cache_holds_is_an_error_not_a_wrong_answer():
    gpt = make(window=4)
    cache, histories = prefill(gpt, [3, 3], 7)
    for _ in range(5):
        feed(gpt, cache, histories)  # 8 tokens: the first 4 are gone
    with pytest.raises(AssertionError):  # 5 tokens: the next one would see token 2
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


def uncached_greedy(gpt, prompt, n):
    ids = list(prompt)
    for _ in range(n):
        ids.append(int(gpt(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("variant", VARIANTS)
def test_cached_greedy_is_uncached_greedy_token_for_token(variant):
    gpt = make(**VARIANTS[variant])
    rollout = generate(gpt, PROMPTS, max_new_tokens=20, temperature=0)
    assert rollout.tokens() == [uncached_greedy(gpt, p, 20) for p in PROMPTS]
    assert rollout.logp.eq(0).all()  # a choice that is certain


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_row_of_a_batch_is_the_row_alone(variant):
    # a number that drives many tokens magnifies rounding
    gpt = make(**VARIANTS[variant]).double()
    u = torch.rand(8, generator=seeded(), dtype=torch.float64)
    batch = generate(gpt, PROMPTS, n=2, max_new_tokens=6, uniforms=u, generator=seeded())
    for r, tokens in enumerate(batch.tokens()):
        alone = generate(
            gpt, [PROMPTS[r // 2]], max_new_tokens=6, uniforms=u[r : r + 1], generator=seeded()
        )
        assert alone.tokens() == [tokens]
        torch.testing.assert_close(
            batch.logp[r][batch.mask[r] > 0], alone.logp[alone.mask > 0], rtol=0, atol=1e-5
        )


SETTINGS = {
    "sampled": dict(),
    "greedy": dict(temperature=0),
    "stop": dict(stop=1),
    "stops": dict(stop=[4, 1]),
    "truncated": dict(top_k=9, top_p=0.8, temperature=0.7, stop=2),
    "uniforms": dict(uniforms=torch.rand(24, generator=seeded(), dtype=torch.float64), stop=3),
}


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=pytest.mark.skipif(
                not torch.cuda.is_available(), reason="CUDA graphs need a GPU"
            ),
        ),
    ],
)
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_decoding_on_fixed_shapes_gives_the_tokens_of_decoding_step_by_step(
    monkeypatch, variant, settings, device
):
    gpt, rollouts = make(**VARIANTS[variant]).double().to(device), []
    for where, span in ((), 1), ((device,), 1), ((device,), 5), ((device,), 100):
        monkeypatch.setattr(engine, "STATIC_ON", where)
        monkeypatch.setattr(decoding, "SPAN", span)
        rollouts.append(
            generate(gpt, PROMPTS, n=6, max_new_tokens=17, generator=seeded(), **SETTINGS[settings])
        )
    if "stop" in SETTINGS[settings]:
        assert len(set(rollouts[0].lengths.tolist())) > 1  # rows do leave on the way
    for static in rollouts[1:]:
        assert static.tokens() == rollouts[0].tokens() and static.mask.equal(rollouts[0].mask)
        torch.testing.assert_close(static.logp, rollouts[0].logp, rtol=0, atol=1e-5)


def test_decoding_on_fixed_shapes_goes_on_past_the_slots_of_a_span(monkeypatch):
    gpt, rollouts = make(block_size=200).double(), []
    monkeypatch.setattr(decoding, "SPAN", 30)
    for where in (), ("cpu",):
        monkeypatch.setattr(engine, "STATIC_ON", where)
        rollouts.append(generate(gpt, PROMPTS, max_new_tokens=150, generator=seeded()).tokens())
    assert rollouts[0] == rollouts[1]


# 0 is also the padding, and every prompt holds some stop
@pytest.mark.parametrize("stop", range(4))
@pytest.mark.parametrize("uniforms", [None, torch.linspace(0, 0.999, 32, dtype=torch.float64)])
@pytest.mark.parametrize(
    "gpt, length", [(make(vocab_size=4, window=6).double(), 12), (known([0.4, 0.3, 0.2, 0.1]), 40)]
)
def test_stopping_cuts_rows_and_changes_nothing_else(gpt, length, uniforms, stop):
    prompts = [[0, 0, 1], [2], [0, 3, 0, 0, 2, 0], [1, 0]]

    def sample(stop):
        return generate(
            gpt,
            prompts,
            n=8,
            max_new_tokens=length,
            stop=stop,
            uniforms=uniforms,
            generator=seeded(),
        )

    free, stopped = sample(None), sample(stop)
    lengths = [row.index(stop) + 1 if stop in row else length for row in free.tokens()]
    assert len(set(lengths)) > 4
    assert stopped.tokens() == [row[:n] for row, n in zip(free.tokens(), lengths, strict=True)]
    for r, n in enumerate(lengths):
        p = len(prompts[r // 8])
        assert stopped.ids[r, :p].tolist() == prompts[r // 8]
        assert stopped.mask[r].tolist() == [
            float(p <= t < p + n) for t in range(stopped.mask.shape[1])
        ]
        torch.testing.assert_close(
            stopped.logp[r, p : p + n], free.logp[r, p : p + n], rtol=0, atol=1e-5
        )
        assert stopped.logp[r, :p].eq(0).all() and stopped.logp[r, p + n :].eq(0).all()


@pytest.mark.parametrize("where", [(), ("cpu",)])
def test_a_row_ends_at_whichever_of_several_ids_comes_first(monkeypatch, where):
    monkeypatch.setattr(engine, "STATIC_ON", where)
    monkeypatch.setattr(decoding, "SPAN", 5)

    def sample(stop):
        return generate(
            known([0.4, 0.3, 0.2, 0.1]),
            [[0, 0, 1], [2]],
            n=8,
            max_new_tokens=40,
            stop=stop,
            generator=seeded(),
        )

    free = sample(None).tokens()
    for stop in ([], [3], [0], [3, 2], [1, 2, 3], [7]):
        ends = [[t for t, token in enumerate(row) if token in stop] for row in free]
        rows = sample(stop)
        assert rows.tokens() == [
            row[: end[0] + 1] if end else row for row, end in zip(free, ends, strict=True)
        ]
        assert rows.lengths.tolist() == [len(row) for row in rows.tokens()]
        assert rows.mask.sum() == rows.lengths.sum()
    assert sample([3]).tokens() == sample(3).tokens() == sample(torch.tensor([3])).tokens()
    assert sample([]).tokens() == free


@pytest.mark.parametrize("where", [(), ("cpu",)])
@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("bad_step", [0, 1, 6])
def test_a_logit_that_is_not_finite_is_an_error_at_whatever_step(
    monkeypatch, where, temperature, wrong, bad_step
):
    monkeypatch.setattr(engine, "STATIC_ON", where)
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
    monkeypatch.setattr(engine, "STATIC_ON", ("cpu",))
    fetched = []
    for new in (5, 50):
        with Looks() as looks:
            generate(make(), PROMPTS, max_new_tokens=new, stop=[1, 2], generator=seeded())
        fetched.append(looks.n)
    assert 0 < fetched[0] == fetched[1]


def test_memory_that_was_never_written_is_never_felt():
    gpt = make()
    wanted = generate(gpt, PROMPTS, max_new_tokens=8, temperature=0).tokens()
    torch.use_deterministic_algorithms(True)  # fills uninitialised memory with nan
    try:
        assert torch.empty(3).isnan().all()
        assert generate(gpt, PROMPTS, max_new_tokens=8, temperature=0).tokens() == wanted
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_generators_seed_decides_the_tokens():
    gpt = make()

    def draw(seed):
        return generate(gpt, PROMPTS, n=4, max_new_tokens=8, generator=seeded(seed)).tokens()

    assert draw(1) == draw(1) != draw(2)


def test_the_models_weights_are_not_trained_by_sampling():
    gpt = make().requires_grad_(True)
    assert not generate(gpt, PROMPTS, max_new_tokens=3, generator=seeded()).logp.requires_grad


def test_prompts_of_different_lengths_can_be_continued_under_autocast_and_no_rows_at_all_be_read():
    gpt = make()
    with torch.autocast("cpu", torch.bfloat16):
        assert generate(gpt, PROMPTS, n=2, max_new_tokens=4, generator=seeded()).ids.shape[
            0
        ] == 2 * len(PROMPTS)
    assert gpt.hidden(torch.zeros(0, 3, dtype=torch.long)).shape == (0, 3, gpt.config.n_embd)


def test_a_step_that_cannot_be_captured_runs_eagerly_from_then_on_and_on_the_stream_it_came_from(
    monkeypatch,
):
    streams, sides, gpu = [], [], torch.device("cuda", 1)

    def capture(graph, stream):
        sides.append(stream)
        raise RuntimeError("not while capturing")

    for name, stub in dict(
        CUDAGraph=lambda: None,
        graph=capture,
        current_stream=lambda device: "the caller's",
        set_stream=streams.append,
        Stream=lambda device: f"of {device}",
    ).items():
        monkeypatch.setattr(torch.cuda, name, stub)
    monkeypatch.setattr(decoding, "side_stream", decoding.side_stream.__wrapped__)
    monkeypatch.setattr(decoding, "GRAPHS_ON", ("cuda",))

    def step():
        return None

    assert decoding.captured(step, gpu) is None
    assert sides == ["of cuda:1"]
    assert streams == ["the caller's"]
    assert decoding.GRAPHS_ON == ()


@pytest.mark.parametrize(
    "prompts, kwargs",
    [
        ([[1], []], {}),
        ([], {}),
        ([[1] * 60], dict(max_new_tokens=6)),
        ([[1] * 65], dict(max_new_tokens=1)),
        *(
            ([[1]], wrong)
            for wrong in (
                dict(temperature=-0.5),
                dict(temperature=1e-39),
                dict(uniforms=torch.tensor([float("nan")])),
                dict(uniforms=torch.tensor([0])),
                dict(n=0),
                dict(max_new_tokens=0),
                dict(top_k=0),
                dict(top_p=0),
                dict(top_p=1e-46),
                dict(top_p=float("nan")),
                dict(top_p=1.5),
                dict(uniforms=torch.tensor([1.0])),
                dict(uniforms=torch.tensor([-0.1])),
                dict(n=2, uniforms=torch.rand(1)),
                dict(uniforms=torch.rand(1, 3)),
                dict(uniforms=torch.tensor([[0.5, 1.0]])),
            )
        ),
    ],
)
def test_bad_requests_are_value_errors(prompts, kwargs):
    with pytest.raises(ValueError):
        generate(make(), prompts, **{"max_new_tokens": 2, **kwargs})


def test_emulated_bf16_is_sampled_from_a_copy_in_fp32(monkeypatch):
    gpt = make().bfloat16()
    monkeypatch.setattr(engine, "gemm_dtype", lambda x: torch.float32)
    rows = generate(gpt, PROMPTS, n=4, max_new_tokens=8, generator=seeded()).tokens()
    assert {p.dtype for p in gpt.parameters()} == {torch.bfloat16}
    assert (
        rows == generate(gpt.float(), PROMPTS, n=4, max_new_tokens=8, generator=seeded()).tokens()
    )


def test_the_last_position_of_the_block_can_be_used():
    gpt = make()
    assert generate(gpt, [[1] * 60], max_new_tokens=5, temperature=0).tokens() == [
        uncached_greedy(gpt, [1] * 60, 5)
    ]


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
    rows = generate(
        gpt, prompts, n, 3, temperature, stop=stop, generator=seeded(1), uniforms=uniforms
    ).tokens()
    for i, prompt in enumerate(prompts):
        exact, counts = (
            law(gpt, prompt, 3, stop, temperature),
            Counter(map(tuple, rows[i * n : (i + 1) * n])),
        )
        assert set(counts) <= set(exact) and abs(sum(exact.values()) - 1) < 1e-9
        assert follows([counts[s] for s in exact], list(exact.values()))


def test_first_tokens_of_a_group_follow_the_models_probabilities():
    gpt = make()
    rollout = generate(gpt, PROMPTS, n=2000, max_new_tokens=1, generator=seeded())
    for i, prompt in enumerate(PROMPTS):
        first = [row[0] for row in rollout.tokens()[i * 2000 : (i + 1) * 2000]]
        assert follows(
            np.bincount(first, minlength=V),
            gpt(torch.tensor([prompt]))[0, -1].double().softmax(-1).numpy(),
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("probs", [[1 / 8] * 8, [1 / 2, 1 / 4, 1 / 8, 1 / 8], [0.6, 0.1, 0.3]])
def test_one_number_drives_64_tokens_exactly(dtype, probs):
    """8 equal tokens take 3 bits each: without fresh bits a float32 is spent after 8 tokens, a
    float64 after 18.
    """
    n, V = 2000, len(probs)
    uniforms = torch.rand(n, generator=seeded(1), dtype=dtype)
    # (n, 63)
    rows = np.array(
        generate(known(probs), [[0]], n, 63, uniforms=uniforms, generator=seeded(2)).tokens()
    )
    assert len({*map(tuple, rows)}) == n
    assert follows([np.bincount(column, minlength=V) for column in rows.T], [probs] * 63)
    # odd and even: fresh bits arrive between the two tokens of some pair
    for start in (19, 20):
        pairs = rows[:, start : start + 42].reshape(-1, 2)
        assert follows(
            np.bincount(pairs[:, 0] * V + pairs[:, 1], minlength=V * V),
            np.outer(probs, probs).ravel(),
        )


def test_fresh_bits_arrive_when_half_of_a_number_is_spent():
    """8 equal tokens take 3 bits each, one octal digit: the 26 bits of half a float64 last for 9
    tokens.
    """
    u, fresh = (
        torch.rand(50, generator=seeded(1), dtype=torch.float64),
        torch.rand(50, 27, generator=seeded(2), dtype=torch.float64),
    )
    rows = torch.tensor(
        generate(known([1 / 8] * 8), [[0]], 50, 27, uniforms=u, generator=seeded(2)).tokens()
    )

    def octal(x):
        return (x[:, None] * 8 ** torch.arange(1, 10)).floor() % 8

    assert torch.equal(
        rows, torch.cat([octal(u), octal(fresh[:, 8]), octal(fresh[:, 17])], dim=1).long()
    )


def test_rows_with_neighbouring_numbers_part_for_good():
    """Lattice points that agree on their first bits get fresh bits of their own."""
    rows = np.array(
        generate(
            known([1 / 8] * 8), [[0]], 200, 60, uniforms=torch.full((200,), 0.3), generator=seeded()
        ).tokens()
    )
    assert (rows[:, 0] == rows[0, 0]).all()
    assert follows(
        [np.bincount(column, minlength=8) for column in rows[:, 20:].T], [[1 / 8] * 8] * 40
    )


@pytest.mark.parametrize("stop", [None, 3])
def test_a_number_for_each_token_stands_in_the_place_of_the_generators(stop):
    gpt = make()
    given = torch.rand(8, 6, generator=seeded(1), dtype=torch.float64)
    ours = generate(gpt, PROMPTS, 2, 6, stop=stop, uniforms=given, generator=seeded(2))
    drawn = generate(gpt, PROMPTS, 2, 6, stop=stop, generator=seeded(1))
    assert ours.tokens() == drawn.tokens() and torch.equal(ours.logp, drawn.logp)


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
        assert (
            (counts - k * gpt(torch.tensor([PROMPTS[1]]))[0, -1].softmax(-1)).abs() < 1 + 1e-4
        ).all()


def test_inverse_cdf_never_leaves_the_support():
    probs = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0], [0.1, 0.2, 0.7, 0.0, 0.0]])
    for u in (0.0, 0.5, 1 - 2**-53, 1.0):  # a float32 rounded up by the caller can be 1
        token, place = inverse_cdf(probs, torch.full((2,), u, dtype=torch.float64))
        assert (probs.gather(1, token[:, None]) > 0).all()
        assert ((place >= 0) & (place <= 1)).all()


def large(V, rows=50):
    """probs (rows, V) of which some are large, most small and some 0, and a number for each row."""
    g = seeded(V)
    probs = (3 * torch.randn(rows, V, generator=g)).softmax(-1)
    return probs * (torch.rand(rows, V, generator=g) < 0.9), torch.rand(
        rows, generator=g, dtype=torch.float64
    )


@pytest.mark.parametrize("V", [40, 255, 256, 257, 512, 5000])
def test_drawing_a_block_and_then_a_token_in_it_gives_the_token_and_the_place_of_one_cdf(V):
    probs, u = large(V)
    (token, place), (two, place_in_two) = inverse_cdf(probs, u), inverse_cdf_in_two(probs, u)
    assert torch.equal(token, two)
    # a place is known up to the rounding of the CDF over the width of its bin
    error = (place - place_in_two).abs()
    assert (error * probs.gather(1, token[:, None])[:, 0] < 1e-15).all()
    assert error.median() < 1e-12


def test_drawing_a_block_and_then_a_token_in_it_never_leaves_the_support():
    probs = torch.zeros(5, 1024)
    probs[0, 700] = 1
    probs[1, [255, 256]] = 0.5
    probs[2, [0, 1023]] = 0.5
    probs[3, 256:512] = 1 / 256
    probs[4] = 0.1  # no sum of these is exact, nor 1
    for u in (0.0, 0.5, 1 - 2**-53, 1.0):
        token, place = inverse_cdf_in_two(probs, torch.full((5,), u, dtype=torch.float64))
        assert (probs.gather(1, token[:, None]) > 0).all()
        assert ((place >= 0) & (place < 1)).all()


@pytest.mark.parametrize("V", [256, 600])
def test_drawing_a_block_and_then_a_token_in_it_follows_the_law(V):
    probs, _ = large(V, rows=3)
    probs /= probs.sum(1, keepdim=True)
    n = 20000
    u = torch.rand(3 * n, generator=seeded(5), dtype=torch.float64)
    token, place = inverse_cdf_in_two(probs.repeat_interleave(n, 0), u)
    counts = [np.bincount(t, minlength=V) for t in token.view(3, n).numpy()]
    assert follows(counts, probs.double().numpy())
    # the place is uniform again, whatever was drawn
    assert follows(np.bincount((place * 50).long(), minlength=50), [1 / 50] * 50)


@pytest.mark.parametrize(
    "uniforms", [None, torch.rand(12, generator=seeded(), dtype=torch.float64)]
)
def test_a_large_vocabulary_is_drawn_from_in_two_steps_and_gives_the_same_tokens(
    monkeypatch, uniforms
):
    gpt = known((3 * torch.randn(20000, generator=seeded())).softmax(-1).tolist())
    rows, steps = [], []

    def draw(probs, u):
        steps.append(len(u))
        return inverse_cdf(probs, u)

    for f in (inverse_cdf_in_two, draw):
        monkeypatch.setattr(engine, "inverse_cdf_in_two", f)
        rows.append(generate(gpt, [[1]], 12, 9, uniforms=uniforms, generator=seeded(1)))
    assert rows[0].tokens() == rows[1].tokens() and len(steps) == 9
    assert torch.equal(rows[0].logp, rows[1].logp)


def test_logits_of_a_large_vocabulary_that_are_not_finite_are_an_error_too():
    gpt = known([float("nan")] * 16385)
    with pytest.raises(NotFinite):
        generate(gpt, [[1]], 3, 2, generator=seeded())


@pytest.mark.parametrize("temperature", [0.5, 1, 1.7])
@pytest.mark.parametrize("variant", ["multi-head", "window"])
def test_the_samplers_logp_is_the_scorers(temperature, variant):
    gpt = make(**VARIANTS[variant])
    r = generate(
        gpt, PROMPTS, n=8, max_new_tokens=16, temperature=temperature, stop=5, generator=seeded()
    )
    logp, _ = token_logprobs(
        gpt.hidden(r.ids[:, :-1]), gpt.lm_head.weight, r.ids[:, 1:], temperature
    )
    assert r.lengths.unique().numel() > 2
    torch.testing.assert_close(r.logp[:, 1:], logp * r.mask[:, 1:], rtol=0, atol=1e-4)


@pytest.mark.parametrize("top_k, top_p", [(3, None), (None, 0.7), (5, 0.8)])
def test_under_top_k_and_top_p_logp_is_that_of_the_truncated_distribution(top_k, top_p):
    gpt = make()
    r = generate(
        gpt,
        PROMPTS,
        n=8,
        max_new_tokens=10,
        temperature=1.5,
        top_k=top_k,
        top_p=top_p,
        generator=seeded(),
    )
    scores = truncate(gpt(r.ids)[:, :-1].flatten(0, 1) / 1.5, top_k, top_p).log_softmax(-1)
    logp = scores.gather(-1, r.ids[:, 1:].reshape(-1, 1)).view(r.ids[:, 1:].shape)
    drawn = r.mask[:, 1:] > 0
    torch.testing.assert_close(r.logp[:, 1:][drawn], logp[drawn], rtol=0, atol=1e-4)


def test_top_k_of_one_is_greedy():
    gpt = make()
    assert generate(gpt, PROMPTS, max_new_tokens=10, top_k=1, generator=seeded()).tokens() == [
        uncached_greedy(gpt, p, 10) for p in PROMPTS
    ]


@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("top_k", [None, 1, 6, 100])
def test_truncate_keeps_the_smallest_set_of_the_k_largest_that_reaches_p(top_k, top_p):
    logits = 2 * torch.randn(50, V, generator=seeded(), dtype=torch.float64)
    for row, kept in zip(logits, truncate(logits, top_k, top_p), strict=True):
        order = row.argsort(descending=True)[:top_k]
        p = row[order].softmax(-1)
        size = next(m for m in range(1, len(p) + 1) if p[:m].sum() >= top_p)
        assert {*kept.isfinite().nonzero()[:, 0].tolist()} == {*order[:size].tolist()}
        assert torch.equal(kept[order[:size]], row[order[:size]])


def test_truncate_stops_at_the_token_that_reaches_p():
    assert [
        truncate(torch.zeros(1, 4), None, p).isfinite().sum().item() for p in (0.25, 0.5, 0.51, 1)
    ] == [1, 2, 3, 4]


def test_the_texts_are_what_was_generated_without_the_stop_token():
    tokenizer = train_bpe("naïve café 🙂", 257)
    rows = torch.tensor([[*b"ab", *b"cd", 256, 0], [*b"a", *b"efg", *b"xx"]])
    mask = torch.tensor([[0.0, 0, 1, 1, 1, 0], [0, 1, 1, 1, 0, 0]])
    rollout = Rollout(rows, mask, mask, torch.tensor([2, 1]))
    assert rollout.texts(tokenizer) == ["cd", "efg"]
    tokenizer.stop = [256, ord("g")]
    assert rollout.texts(tokenizer) == ["cd", "ef"]


def test_indexing_and_joining_rollouts_keep_every_row():
    gpt = make()
    a, b = (
        generate(gpt, PROMPTS, n=3, max_new_tokens=n, stop=0, generator=seeded(n)) for n in (3, 15)
    )
    both = Rollout.cat([a, b])
    assert both.tokens() == a.tokens() + b.tokens()
    order = torch.tensor([20, 3, 13, 0])
    for rows in (order, both.lengths < 4):
        part = both[rows]
        index = torch.arange(24)[rows].tolist()
        assert part.tokens() == [both.tokens()[i] for i in index]
        assert part.ids.shape[1] == max(
            len(PROMPTS[i % 12 // 3]) + len(both.tokens()[i]) for i in index
        )
        torch.testing.assert_close(part.logp.sum(1), both.logp[rows].sum(1))
        assert torch.equal(part.prompt_lens, both.prompt_lens[rows])


@pytest.fixture
def bf16():
    if gemm_dtype(torch.zeros(1, dtype=torch.bfloat16)) != torch.bfloat16:
        pytest.skip("bf16 is emulated here: models are sampled from in fp32")
    return make(qkv_bias=True).bfloat16()


def test_ordered_weights_change_no_number_and_no_count(bf16, monkeypatch):
    def sampled():
        generator = torch.Generator().manual_seed(0)
        before = counter.flops
        rollout = generate(bf16, [[1, 2, 3], [4]], 3, 30, stop=7, generator=generator)
        return rollout, counter.flops - before

    ordered, cost = sampled()
    monkeypatch.setattr(engine, "packed", lambda *_: contextlib.nullcontext())
    plain, plain_cost = sampled()
    assert torch.equal(ordered.ids, plain.ids) and torch.equal(ordered.logp, plain.logp)
    assert cost == plain_cost > 0


def test_weights_are_ordered_for_many_steps_of_bf16_only_and_the_model_is_left_as_it_was(bf16):
    def replaced(model):
        return sum("forward" in vars(m) for m in model.modules())

    with pytest.raises(KeyError), engine.packed(bf16, 24):
        assert replaced(bf16) == 1 + 2 * 5  # the head, and five products in each layer
        raise KeyError
    assert replaced(bf16) == 0
    with engine.packed(bf16, 23):
        assert replaced(bf16) == 0
    bf16.blocks[1].mlp.proj.weight = None  # as if there were no memory to order this one
    with pytest.raises(AttributeError), engine.packed(bf16, 24):
        pass
    assert replaced(bf16) == 0
    with engine.packed(bf16.float(), 100):
        assert replaced(bf16) == 0


def test_rows_that_leave_late_write_nothing_more(monkeypatch):
    gpt, steps = make(), 24
    rows = []  # of each step

    def sampled():
        rows.clear()
        return generate(gpt, PROMPTS, 3, steps, stop=[2, 7], generator=seeded(0))

    hidden = gpt.hidden
    monkeypatch.setattr(
        gpt, "hidden", lambda ids, cache: rows.append(len(ids)) or hidden(ids, cache)
    )
    at_once, numbers = sampled(), set(rows)
    monkeypatch.setattr(engine, "leave_by", lambda rows, dtype: 4)
    late = sampled()
    assert torch.equal(late.ids, at_once.ids) and torch.equal(late.mask, at_once.mask)
    torch.testing.assert_close(late.logp, at_once.logp)
    assert len(set(rows)) < len(numbers)
