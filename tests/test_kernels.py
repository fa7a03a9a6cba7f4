"""kernels.py against float64: every impl of token_logprobs and of attention gives the same values
and the same gradients.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from kernels import attention, token_logprobs

V, C = 1009, 24  # a prime: no block size divides it
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def problem(*shape, V=V, dtype=torch.float32, seed=0):
    """hidden, weight, targets, and an upstream gradient for each output with zeros and negatives in
    it.
    """
    g = torch.Generator().manual_seed(seed)
    hidden, weight = (
        torch.randn(*shape, C, generator=g).to(dtype),
        torch.randn(V, C, generator=g).to(dtype),
    )
    targets = torch.randint(V, shape, generator=g)
    # the first and the last of the vocabulary and of blocks
    edges = torch.tensor([V - 1, 252, 251, 504, 756, 0])
    targets.view(-1)[:6] = edges[: targets.numel()].clamp_max(V - 1)
    upstream = [
        torch.randn(shape, generator=g) * (torch.rand(shape, generator=g) > 0.3) for _ in range(2)
    ]
    return hidden, weight, targets, upstream


def exact(hidden, weight, targets, temperature):
    logp = (hidden.double() @ weight.double().T / temperature).log_softmax(-1)
    return logp.gather(-1, targets[..., None])[..., 0], -(logp.exp() * logp).sum(-1)


def values_and_gradients(f, hidden, weight, targets, temperature, upstream):
    """logp, entropy, d/dhidden and d/dweight of sum(upstream * outputs) in float64; an upstream
    gradient of None: output not used.
    """
    hidden, weight = (
        hidden.detach().clone().requires_grad_(),
        weight.detach().clone().requires_grad_(),
    )
    outputs = f(hidden, weight, targets, temperature)
    sum((g * o).sum() for g, o in zip(upstream, outputs, strict=True) if g is not None).backward()
    return [t.detach().double() for t in (*outputs, hidden.grad, weight.grad)]


def impl(name):
    return lambda *args: token_logprobs(*args, impl=name)


def small_blocks(monkeypatch):
    # 256 columns is the least a block has: 4 of them
    monkeypatch.setattr(kernels, "BLOCK", 256)
    assert kernels.block_starts(6, V) == [0, 252, 504, 756, V]


@pytest.mark.parametrize("name", ["reference", "chunked", "auto"])
@pytest.mark.parametrize("temperature", [0.7, 1, 2])
@pytest.mark.parametrize("shape", [(2, 3), (7,), (1,), (2, 1, 4)])
def test_logp_and_entropy_and_their_gradients_are_exact(monkeypatch, name, temperature, shape):
    small_blocks(monkeypatch)
    hidden, weight, targets, upstream = problem(*shape)
    ours = values_and_gradients(impl(name), hidden, weight, targets, temperature, upstream)
    true = values_and_gradients(exact, hidden, weight, targets, temperature, upstream)
    for a, b in zip(ours, true, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not kernels.can_compile(), reason="no C++ compiler")
def test_compiled_blocks_are_exact_at_any_temperature(monkeypatch):
    small_blocks(monkeypatch)
    hidden, weight, targets, upstream = problem(2, 3)
    for temperature in (0.7, 1.0, 2.0):
        ours = values_and_gradients(
            impl("compiled"), hidden, weight, targets, temperature, upstream
        )
        true = values_and_gradients(exact, hidden, weight, targets, temperature, upstream)
        for a, b in zip(ours, true, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("unused", [0, 1])
def test_one_output_can_be_used_without_the_other(monkeypatch, unused):
    small_blocks(monkeypatch)
    hidden, weight, targets, upstream = problem(2, 3)
    upstream[unused] = None
    ours = values_and_gradients(impl("chunked"), hidden, weight, targets, 0.7, upstream)
    for a, b in zip(
        ours, values_and_gradients(exact, hidden, weight, targets, 0.7, upstream), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("emulated", [True, False])
def test_bf16_errs_no_more_than_1_5_times_the_reference_in_bf16(monkeypatch, emulated):
    small_blocks(monkeypatch)
    if not emulated:  # the path of a CPU or GPU that has bf16 units
        monkeypatch.setattr(kernels, "gemm_dtype", lambda x: x.dtype)
    # 391 blocks: a sum kept in bf16 would show
    hidden, weight, targets, upstream = problem(64, V=100003, dtype=torch.bfloat16)
    args = hidden, weight, targets, 0.7, upstream
    true = values_and_gradients(exact, hidden.double(), weight.double(), targets, 0.7, upstream)
    for ours, reference, t in zip(
        values_and_gradients(impl("chunked"), *args),
        values_and_gradients(impl("reference"), *args),
        true,
        strict=True,
    ):
        assert (ours - t).abs().max() <= 1.5 * (reference - t).abs().max()
        assert (ours - t).norm() <= 1.5 * (reference - t).norm()


def test_where_the_target_is_nearly_certain_its_small_gradient_is_not_lost_in_bf16(monkeypatch):
    small_blocks(monkeypatch)
    monkeypatch.setattr(kernels, "gemm_dtype", lambda x: x.dtype)
    weight = torch.zeros(V, C, dtype=torch.bfloat16)
    weight[:C] = torch.eye(C)
    # logits of 16 and 0: exact in bf16, as 1 - p = 0.0001 is, but not p
    hidden = 16 * weight[:C]
    args = hidden, weight, torch.arange(C), 1, [torch.ones(C), torch.zeros(C)]
    for ours, t in zip(
        values_and_gradients(impl("chunked"), *args),
        values_and_gradients(exact, hidden.double(), weight.double(), *args[2:]),
        strict=True,
    ):
        assert 0 < (ours - t).norm() <= 0.02 * t.norm()


def test_autocast_of_fp32_parameters_returns_fp32_and_errs_no_more_than_1_5_times_the_reference(
    monkeypatch,
):
    small_blocks(monkeypatch)
    hidden, weight, targets, upstream = problem(64)

    def autocast(name):
        def f(*args):
            with torch.autocast("cpu", torch.bfloat16):
                outputs = token_logprobs(*args, impl=name)
            assert all(o.dtype == torch.float32 for o in outputs)
            return outputs

        return values_and_gradients(f, hidden, weight, targets, 1, upstream)

    true = values_and_gradients(exact, hidden.double(), weight.double(), targets, 1, upstream)
    for ours, reference, t in zip(autocast("chunked"), autocast("reference"), true, strict=True):
        assert (ours - t).norm() <= 1.5 * (reference - t).norm()


def test_autocast_multiplies_in_its_dtype():
    hidden, weight, targets, _ = problem(7)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = token_logprobs(hidden, weight, targets, impl="chunked")
    for a, b in zip(
        outputs,
        token_logprobs(hidden.bfloat16(), weight.bfloat16(), targets, impl="chunked"),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["reference", "chunked"])
@pytest.mark.parametrize("backward_inside", [False, True])
def test_autocast_returns_fp32_gradients(monkeypatch, name, backward_inside):
    small_blocks(monkeypatch)
    hidden, weight, targets, upstream = problem(2, 3)
    hidden.requires_grad_()
    weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = token_logprobs(hidden, weight, targets, impl=name)
        if backward_inside:
            torch.autograd.backward(outputs, upstream)
    if not backward_inside:
        torch.autograd.backward(outputs, upstream)
    for x, true in zip(
        (hidden, weight),
        values_and_gradients(exact, hidden, weight, targets, 1, upstream)[2:],
        strict=True,
    ):
        assert x.grad.dtype == torch.float32
        assert (x.grad - true).norm() <= 0.1 * true.norm()


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor):
                self.elements = max(self.elements, t.numel())
        return out


def test_chunked_never_holds_the_logits_of_all_tokens(monkeypatch):
    small_blocks(monkeypatch)
    N = 128
    held = {}
    for name in ("reference", "chunked"):
        hidden, weight, targets, upstream = problem(N)
        with Largest() as largest:
            values_and_gradients(impl(name), hidden, weight, targets, 1, upstream)
        held[name] = largest.elements
    assert held["reference"] == N * V  # the meter sees them where they are
    assert held["chunked"] <= N * 256  # one block


@pytest.mark.parametrize("name", ["reference", "chunked"])
def test_scoring_leaves_its_inputs_unchanged(monkeypatch, name):
    small_blocks(monkeypatch)
    hidden, weight, targets, upstream = problem(2, 3)
    before = [t.clone() for t in (hidden, weight, targets, *upstream)]
    hidden.requires_grad_()
    weight.requires_grad_()
    torch.autograd.backward(token_logprobs(hidden, weight, targets, 0.7, impl=name), upstream)
    assert all(
        torch.equal(a, b) for a, b in zip(before, (hidden, weight, targets, *upstream), strict=True)
    )


def test_extreme_logits_stay_finite(monkeypatch):
    small_blocks(monkeypatch)
    hidden, weight, targets, upstream = problem(7)
    for t in values_and_gradients(impl("chunked"), 1e4 * hidden, weight, targets, 1, upstream):
        assert t.isfinite().all()


def test_auto_is_the_reference_when_one_block_holds_the_logits_and_chunked_when_not(monkeypatch):
    hidden, weight, targets, _ = problem(7)
    for block, name in ((7 * V, "reference"), (7 * V - 1, "chunked")):
        monkeypatch.setattr(kernels, "BLOCK", block)
        for a, b in zip(
            token_logprobs(hidden, weight, targets),
            token_logprobs(hidden, weight, targets, impl=name),
            strict=True,
        ):
            assert torch.equal(a, b)


def second_derivative(outputs, x):
    (gradient,) = torch.autograd.grad(sum(o.pow(2).sum() for o in outputs), x, create_graph=True)
    gradient.pow(2).sum().backward()


@pytest.mark.parametrize(
    "name",
    [
        "chunked",
        pytest.param(
            "triton",
            marks=pytest.mark.skipif(kernels.triton is None, reason="triton is not installed"),
        ),
    ],
)
def test_a_second_derivative_is_an_error_but_for_the_reference(name):
    hidden, weight, targets, _ = [x.to(DEVICE) if torch.is_tensor(x) else x for x in problem(7)]
    hidden.requires_grad_()
    second_derivative(token_logprobs(hidden, weight, targets, impl="reference"), hidden)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        second_derivative(token_logprobs(hidden, weight, targets, impl=name), hidden)


@pytest.mark.parametrize(
    "kwargs",
    [dict(impl="fast"), dict(temperature=0), dict(temperature=-1.0), dict(temperature=1e-39)],
)
def test_bad_arguments_are_value_errors(kwargs):
    with pytest.raises(ValueError):
        token_logprobs(*problem(7)[:3], **kwargs)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("target", [-100, 300])
def test_a_target_that_is_no_token_is_a_value_error_whatever_the_impl(impl, target):
    hidden, weight, targets = problem(7)[:3]
    targets.view(-1)[0] = target if target < 0 else len(weight)
    with pytest.raises(ValueError, match="targets"):
        token_logprobs(hidden, weight, targets, impl=impl)


# --------------------------------------------------------------------------------------------------
# attention


def naive_attention(q, k, v, causal=True, window=None, mask=None):
    """One query at a time."""
    (B, H, T, D), (_, K, S, _) = q.shape, k.shape
    out = []
    for b in range(B):
        for h in range(H):
            for t in range(T):
                now = S - T + t  # the T queries are the last T of the S positions
                sees = [
                    s
                    for s in range(S)
                    if (
                        mask[b % len(mask), 0, t, s]
                        if mask is not None
                        else (s <= now or not causal) and (window is None or now - s < window)
                    )
                ]
                group = h // (H // K)
                out.append((k[b, group, sees] @ q[b, h, t] / D**0.5).softmax(0) @ v[b, group, sees])
    return torch.stack(out).view(B, H, T, D)


# (2, 1, 1, 7)
RAGGED = torch.tensor([[1, 1, 0, 0, 0, 1, 0], [0, 0, 1, 1, 1, 1, 1]], dtype=torch.bool)[
    :, None, None
]
CASES = {
    "causal": dict(),
    "not causal": dict(causal=False),
    "window": dict(window=3),
    "window of one": dict(window=1),
    "window past the start": dict(window=50),
    "window, not causal": dict(window=3, causal=False),
    "last queries": dict(T=3),
    "last queries, not causal": dict(T=3, causal=False),
    "last queries, window": dict(T=3, window=2),
    "one query": dict(T=1),
    "one query, window": dict(T=1, window=4),
    "mask": dict(T=1, mask=RAGGED),
    "mask of many queries": dict(T=3, mask=RAGGED.expand(2, 1, 3, 7)),
    "one mask for all rows": dict(T=1, mask=RAGGED[:1]),
}


@pytest.mark.parametrize("name", ["reference", "sdpa", "auto"])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("case", CASES)
def test_attention_and_its_gradients_equal_a_loop_over_queries(name, heads, case):
    g = torch.Generator().manual_seed(0)
    kwargs = {**CASES[case]}
    T, (H, K) = kwargs.pop("T", 7), heads
    qkv = [torch.randn(2, n, t, 8, generator=g) for n, t in ((H, T), (K, 7), (K, 7))]
    upstream = torch.randn(2, H, T, 8, generator=g)
    results = []
    for f, dtype in (
        (lambda *a, **kw: attention(*a, **kw, impl=name), torch.float32),
        (naive_attention, torch.float64),
    ):
        inputs = [x.to(dtype).requires_grad_() for x in qkv]
        out = f(*inputs, **kwargs)
        results.append([out, *torch.autograd.grad(out, inputs, upstream.to(dtype))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
@pytest.mark.parametrize(
    "T, window", [(128, 1), (128, 8), (130, 31), (200, 32), (161, 33), (300, 75), (127, 8)]
)
def test_attention_in_a_short_window_goes_by_blocks_and_is_exact(heads, T, window):
    g, (H, K) = torch.Generator().manual_seed(0), heads
    qkv = [torch.randn(2, n, T, 8, generator=g) for n in (H, K, K)]
    upstream = torch.randn(2, H, T, 8, generator=g)
    results = []
    for name, dtype in (("auto", torch.float32), ("reference", torch.float64)):
        inputs = [x.to(dtype).requires_grad_() for x in qkv]
        out = attention(*inputs, window=window, impl=name)
        results.append([out, *torch.autograd.grad(out, inputs, upstream.to(dtype))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


# (2, 1, 1, 128): rows with 5 and 60 slots of padding on the left
MANY = torch.arange(128) >= torch.tensor([[[[5]]], [[[60]]]])


@pytest.mark.parametrize("name", ["reference", "auto"])
@pytest.mark.parametrize(
    "case",
    [
        dict(T=1),
        dict(T=127),
        dict(T=128, causal=False),
        dict(T=1, mask=MANY),
        dict(T=128, mask=MANY.expand(2, 1, 128, 128)),
    ],
)
def test_attention_in_a_short_window_is_exact_where_blocks_do_not_apply(name, case):
    g, kwargs = torch.Generator().manual_seed(0), {**case}
    T = kwargs.pop("T")
    q, k, v = (torch.randn(2, n, t, 8, generator=g) for n, t in ((2, T), (1, 128), (1, 128)))
    ours = attention(q, k, v, window=8, impl=name, **kwargs)
    if "mask" in kwargs:  # replaces the window
        true = (q.double() @ k.double().mT / 8**0.5).masked_fill(
            ~kwargs["mask"], -torch.inf
        ).softmax(-1) @ v.double()
    else:
        true = exact_attention(q.double(), k.double(), v.double(), window=8, **kwargs)
    torch.testing.assert_close(ours.double(), true, rtol=1e-5, atol=1e-5)


def test_attention_in_a_short_window_holds_no_square(monkeypatch):
    sizes, original = [], torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        kernels.F,
        "scaled_dot_product_attention",
        lambda q, k, v, **more: (
            sizes.append((q.shape[-2], k.shape[-2])) or original(q, k, v, **more)
        ),
    )
    qkv = torch.randn(3, 1, 2, 512, 8)
    attention(*qkv, window=8)
    attention(*qkv, window=200)
    assert sizes == [(32, 64), (512, 512)]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_attention_in_bf16_is_as_exact_as_its_rounded_inputs_allow(case, autocast):
    g = torch.Generator().manual_seed(0)
    kwargs = {**CASES[case]}
    T = kwargs.pop("T", 7)
    qkv = [
        torch.randn(2, n, t, 8, generator=g).bfloat16().requires_grad_()
        for n, t in ((4, T), (2, 7), (2, 7))
    ]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = attention(*qkv, **kwargs)
    gradients = torch.autograd.grad(out, qkv, torch.ones_like(out))
    wide = [x.detach().double().requires_grad_() for x in qkv]
    exact = naive_attention(*wide, **kwargs)
    assert out.dtype == torch.bfloat16 and all(x.dtype == torch.bfloat16 for x in gradients)
    for a, b in zip(
        (out, *gradients),
        (exact, *torch.autograd.grad(exact, wide, torch.ones_like(exact))),
        strict=True,
    ):
        torch.testing.assert_close(a.double(), b, rtol=0.02, atol=0.02)


def test_autocast_does_not_narrow_what_attention_has_widened():
    qkv = torch.randn(3, 1, 2, 40, 16).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(*qkv)
    assert torch.equal(out, attention(*qkv))


@pytest.mark.parametrize("name", ["reference", "sdpa"])
@pytest.mark.parametrize("heads, T, S", [((4, 3), 5, 5), ((4, 4), 6, 5)])
def test_heads_that_cannot_be_grouped_and_queries_without_a_position_are_refused(name, heads, T, S):
    q, k = torch.randn(1, heads[0], T, 8), torch.randn(1, heads[1], S, 8)
    with pytest.raises(AssertionError):
        attention(q, k, k, impl=name)


def test_an_unknown_attention_is_a_value_error():
    with pytest.raises(ValueError):
        attention(*torch.randn(3, 1, 1, 2, 4), impl="fast")


# --------------------------------------------------------------------------------------------------
# Triton: in its interpreter without a GPU (see conftest.py), natively with one

needs_triton = pytest.mark.skipif(kernels.triton is None, reason="triton is not installed")
needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="bf16 and fp16 need a GPU: the interpreter has no products of their own",
)


@pytest.fixture
def tiles(monkeypatch):
    """Sets the tile (M, N) of the three attention kernels. On a GPU they keep their own."""

    def set(M, N):
        if DEVICE == "cpu":
            for kernel in (kernels.forward_kernel, kernels.dq_kernel, kernels.dkv_kernel):
                monkeypatch.setattr(kernel, "configs", [kernels.triton.Config(dict(M=M, N=N))])

    return set


@pytest.fixture(params=["left", "right"])
def fused(request, monkeypatch):
    """The interpreter computes as a GPU does: a product of fp32 numbers goes unrounded into the sum
    or difference that follows, which is rounded once. (In fp64 such a product is exact.) Where both
    sides are products a compiler takes either: the left or the right one. A GPU does all this by
    itself.
    """
    if DEVICE == "cuda":
        return
    from triton.runtime.interpreter import InterpreterBuilder as Builder

    multiply, select = Builder.create_fmul, Builder.create_select

    def exact(x):
        return x.attr.get("exact", x.data)

    def create_fmul(self, a, b):
        out = multiply(self, a, b)
        if out.data.dtype == np.float32:
            out.set_attr("exact", a.data.astype(np.float64) * b.data)
        return out

    def create_select(self, condition, a, b):
        out = select(self, condition, a, b)
        if "exact" in a.attr or "exact" in b.attr:
            out.set_attr("exact", np.where(condition.data, exact(a), exact(b)))
        return out

    def fusing(plain, sign):
        def create(self, a, b):
            out = plain(self, a, b)
            left, right = "exact" in a.attr, "exact" in b.attr
            if left or right:
                take_left = left and (request.param == "left" or not right)
                x, y = (exact(a), b.data) if take_left else (a.data, exact(b))
                out.data = np.add(x, sign * y, dtype=np.float64).astype(np.float32)
            return out

        return create

    for name, f in dict(
        create_fmul=create_fmul,
        create_select=create_select,
        create_fadd=fusing(Builder.create_fadd, 1),
        create_fsub=fusing(Builder.create_fsub, -1),
    ).items():
        monkeypatch.setattr(Builder, name, f)


def exact_attention(q, k, v, causal=True, window=None):
    T, S, G = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    now, key = torch.arange(S - T, S)[:, None], torch.arange(S)
    hidden = (key > now) & causal | (now - key >= (window or 10**9))
    k, v = (x.repeat_interleave(G, dim=1) for x in (k, v))
    return (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(hidden.to(q.device), -torch.inf).softmax(
        -1
    ) @ v


def attention_case(B=1, H=1, K=1, T=40, S=40, D=16, dtype=torch.float32):
    """q, k, v and an upstream gradient with rows of zeros."""
    g = torch.Generator().manual_seed(0)
    q, k, v, upstream = (
        torch.randn(B, n, t, D, generator=g) for n, t in ((H, T), (K, S), (K, S), (H, T))
    )
    upstream[:, :, torch.rand(T, generator=g) < 0.2] = 0
    return [x.to(DEVICE, dtype) for x in (q, k, v, upstream)]


def out_and_gradients(f, q, k, v, upstream, **kwargs):
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]  # keeps the strides
    out = f(*inputs, **kwargs)
    return [t.detach().double() for t in (out, *torch.autograd.grad(out, inputs, upstream))]


def assert_triton_attention_is_exact(q, k, v, upstream, **kwargs):
    ours = out_and_gradients(impl_attention("triton"), q, k, v, upstream, **kwargs)
    true = out_and_gradients(
        exact_attention, q.double(), k.double(), v.double(), upstream.double(), **kwargs
    )
    for a, b in zip(ours, true, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def impl_attention(name):
    return lambda *args, **kwargs: attention(*args, **kwargs, impl=name)


@needs_triton
@pytest.mark.parametrize("tile", [(16, 16), (32, 16), (16, 32)])
@pytest.mark.parametrize(
    "T, S, causal, window",
    [
        (48, 48, True, None),
        (37, 37, True, None),
        (37, 50, True, None),
        (16, 64, True, None),
        (1, 1, True, None),
        (1, 33, True, None),
        (33, 49, False, None),
        (64, 64, True, 1),
        (40, 72, True, 33),
        (72, 72, True, 40),
        (40, 40, True, 1000),
        (3, 64, True, 20),
        (40, 50, False, 7),
        (40, 40, False, 40),
    ],
)
def test_triton_attention_and_its_gradients_are_exact(tiles, tile, T, S, causal, window):
    tiles(*tile)
    assert_triton_attention_is_exact(*attention_case(T=T, S=S), causal=causal, window=window)


@needs_triton
def test_triton_attention_is_exact_for_every_window_around_a_tile():
    for window in range(1, 20):
        assert_triton_attention_is_exact(*attention_case(T=33, S=38), window=window)
    for window in (35, 36, 37):  # one tile or two lie whole inside the window
        assert_triton_attention_is_exact(*attention_case(T=64, S=69), window=window)


@needs_triton
def test_triton_attention_is_exact_for_every_length_around_a_tile():
    for n in range(1, 20):
        for S in {n, 19}:
            assert_triton_attention_is_exact(*attention_case(T=n, S=S))


@needs_triton
@pytest.mark.parametrize("D", [2, 24, 32, 128])
def test_triton_attention_is_exact_for_any_head_size(D):
    assert_triton_attention_is_exact(*attention_case(T=19, S=21, D=D))


@needs_triton
def test_triton_attention_reads_no_channel_past_the_head():
    assert_triton_attention_is_exact(
        *(
            torch.nn.functional.pad(x, (0, 8), value=torch.nan)[..., :24]
            for x in attention_case(T=19, S=21, D=24)
        )
    )


@needs_triton
@pytest.mark.parametrize("B, H, K", [(2, 2, 2), (2, 6, 2), (1, 4, 1), (3, 1, 1)])
def test_triton_attention_is_exact_for_grouped_heads_and_batches(B, H, K):
    assert_triton_attention_is_exact(*attention_case(B, H, K, 20, 23), window=9)


@needs_triton
@pytest.mark.parametrize(
    "layout",
    ["time before heads", "channels first", "slices", "one head for all", "one gradient for all"],
)
def test_triton_attention_takes_any_strides(layout):
    q, k, v, upstream = attention_case(2, 2, 2, 19, 19)
    if layout == "time before heads":
        q, k, v, upstream = (
            x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v, upstream)
        )
    elif layout == "channels first":
        q, k, v, upstream = (x.mT.contiguous().mT for x in (q, k, v, upstream))
    elif layout == "slices":  # as in model.py: split from one (B, T, heads, D)
        qkv = torch.cat((q, k, v), 1).transpose(1, 2).contiguous()
        q, k, v = (x.transpose(1, 2) for x in qkv.split([2, 2, 2], dim=2))
        assert not q.is_contiguous()
    elif layout == "one head for all":
        q, k, v = (x[:, :1].expand(2, 2, 19, 16) for x in (q, k, v))
    else:
        upstream = torch.ones((), device=DEVICE).expand_as(q)
    assert_triton_attention_is_exact(q, k, v, upstream)


@needs_triton
def test_triton_attention_without_an_upstream_gradient_has_none():
    q, k, v, upstream = attention_case()
    assert all(
        (t == 0).all()
        for t in out_and_gradients(impl_attention("triton"), q, k, v, 0 * upstream)[1:]
    )


@needs_triton
def test_triton_attention_has_no_second_derivative():
    q, k, v, _ = attention_case(T=5, S=5)
    q.requires_grad_()
    with pytest.raises(RuntimeError, match="once_differentiable"):
        second_derivative([attention(q, k, v, impl="triton")], q)


@needs_triton
def test_triton_attention_survives_large_scores():
    q, k, v, upstream = attention_case()
    for scale in (30, 3000):  # most softmaxes are one-hot, all are
        ours = out_and_gradients(impl_attention("triton"), scale * q, k, v, upstream, window=20)
        true = out_and_gradients(
            exact_attention,
            scale * q.double(),
            k.double(),
            v.double(),
            upstream.double(),
            window=20,
        )
        for a, b in zip(ours, true, strict=True):
            assert a.isfinite().all() and (scale == 3000 or (a - b).norm() <= 1e-5 * b.norm())


@needs_triton
@pytest.mark.parametrize("D", [*range(2, 33, 2), 48, 64, 80, 96, 112, 128])
def test_no_rounding_that_a_fused_multiply_add_leaves_out_is_trusted_by_attention(fused, D):
    # rows whose first tile is all hidden
    assert_triton_attention_is_exact(*attention_case(T=33, S=70, D=D), window=9)
    assert_triton_attention_is_exact(*attention_case(T=3, S=40, D=D), window=20)


@needs_triton
@pytest.mark.parametrize("temperature", [1e-30, 1e-9, 1e-3, 0.7, 2, 1e6])
def test_no_rounding_that_a_fused_multiply_add_leaves_out_is_trusted_by_logprobs(
    fused, monkeypatch, temperature
):
    monkeypatch.setattr(kernels, "BLOCK", 256)
    hidden, weight, targets, upstream = (
        x if isinstance(x, list) else x.to(DEVICE) for x in problem(7, V=2500)
    )
    # certain at a low temperature: its logp is 0, the others' far below
    targets[3:] = (hidden @ weight.T).argmax(1)[3:]
    upstream = [g.to(DEVICE) * temperature for g in upstream]  # gradients of order 1
    ours = values_and_gradients(impl("triton"), hidden, weight, targets, temperature, upstream)
    true = values_and_gradients(exact, hidden, weight, targets, temperature, upstream)
    for a, b in zip(ours, true, strict=True):
        torch.testing.assert_close(a.clamp_min(-1e30), b.clamp_min(-1e30), rtol=1e-4, atol=1e-4)


@needs_triton
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("D", [32, 64, 96, 128])
@pytest.mark.parametrize("window", [None, 100])
def test_triton_attention_in_half_precision_errs_no_more_than_1_5_times_the_reference(
    dtype, D, window
):
    args = attention_case(2, 4, 2, 500, 700, D, dtype)
    true = out_and_gradients(exact_attention, *(x.double() for x in args), window=window)
    for ours, reference, t in zip(
        *(
            out_and_gradients(impl_attention(name), *args, window=window)
            for name in ("triton", "reference")
        ),
        true,
        strict=True,
    ):
        assert (ours - t).norm() <= 1.5 * (reference - t).norm()


@needs_triton
@pytest.mark.parametrize(
    "kwargs",
    [
        dict(mask=torch.ones(1, 1, 3, 3, dtype=torch.bool)),
        dict(D=130),
        dict(dtype=torch.float64),
        dict(no_triton=True),
    ],
)
def test_triton_where_it_cannot_run_is_a_value_error(monkeypatch, kwargs):
    x = torch.randn(1, 1, 3, kwargs.get("D", 16), device=DEVICE).to(
        kwargs.get("dtype", torch.float32)
    )
    if "no_triton" in kwargs:
        monkeypatch.setattr(kernels, "triton", None)
    with pytest.raises(ValueError, match="attention, impl 'triton': "):
        attention(x, x, x, mask=kwargs.get("mask"), impl="triton")


@needs_triton
@pytest.mark.parametrize("temperature", [0.7, 2])
@pytest.mark.parametrize(
    "shape, V", [((2, 3), 1009), ((1,), 1009), ((2, 1, 4), 1024), ((6,), 100), ((9,), 2500)]
)
def test_triton_logp_and_entropy_and_their_gradients_are_exact(monkeypatch, temperature, shape, V):
    monkeypatch.setattr(kernels, "BLOCK", 256)  # blocks of 128 or 256 columns
    args = (
        [x.to(DEVICE) for x in (problem(*shape, V=V)[:3])],
        [x.to(DEVICE) for x in problem(*shape, V=V)[3]],
    )
    ours = values_and_gradients(impl("triton"), *args[0], temperature, args[1])
    true = values_and_gradients(exact, *args[0], temperature, args[1])
    for a, b in zip(ours, true, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@needs_triton
def test_triton_logprobs_walk_over_tiles_within_a_block():
    hidden, weight = (x.to(DEVICE) for x in problem(3, V=5000)[:2])
    # a kernel takes 2,048 columns at a time
    targets = torch.tensor([2047, 2048, 4999], device=DEVICE)
    upstream = [torch.tensor([1, -2, 0.5], device=DEVICE)] * 2
    for a, b in zip(
        *(
            values_and_gradients(f, hidden, weight, targets, 1, upstream)
            for f in (impl("triton"), exact)
        ),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@needs_triton
def test_triton_logprobs_of_strided_inputs_and_unused_or_zero_gradients(monkeypatch):
    monkeypatch.setattr(kernels, "BLOCK", 256)
    hidden, weight, targets, upstream = problem(2, 3)
    args = (
        hidden.transpose(0, 1).to(DEVICE),
        weight.T.contiguous().T.to(DEVICE),
        targets.T.to(DEVICE),
        0.7,
    )
    for g in (
        [upstream[0].T, None],
        [None, upstream[1].T],
        [torch.ones(()).expand(3, 2), upstream[1].T],
        [upstream[0].T, 0 * upstream[1].T],
    ):
        g = [x if x is None else x.to(DEVICE) for x in g]
        for a, b in zip(
            *(values_and_gradients(f, *args, g) for f in (impl("triton"), exact)), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@needs_triton
def test_triton_logprobs_of_targets_that_are_a_column_of_many():
    hidden, weight, _, upstream = problem(7)
    targets = torch.randint(V, (7, 3), generator=torch.Generator().manual_seed(0)).to(DEVICE)[:, 1]
    assert targets.stride() == (3,)
    args = hidden.to(DEVICE), weight.to(DEVICE), targets, 1, [x.to(DEVICE) for x in upstream]
    for a, b in zip(
        *(values_and_gradients(f, *args) for f in (impl("triton"), exact)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@needs_triton
def test_triton_logprobs_of_a_sum_take_its_one_gradient_for_all():
    hidden, weight, targets, _ = [x.to(DEVICE) if torch.is_tensor(x) else x for x in problem(7)]
    grads = []
    for f, dtype in ((impl("triton"), torch.float32), (exact, torch.float64)):
        x = hidden.to(dtype).requires_grad_()
        logp, entropy = f(x, weight.to(dtype), targets, 1)
        # expanded, with a stride of 0
        grads += torch.autograd.grad(logp.sum() + 3 * entropy.sum(), x)
    torch.testing.assert_close(grads[0].double(), grads[1], rtol=1e-5, atol=1e-5)


@needs_triton
def test_triton_logprobs_of_extreme_logits_stay_finite_and_certain(monkeypatch):
    monkeypatch.setattr(kernels, "BLOCK", 256)
    hidden, weight, targets, upstream = problem(7)
    args = (
        1e4 * hidden.to(DEVICE),
        weight.to(DEVICE),
        targets.to(DEVICE),
        1,
        [x.to(DEVICE) for x in upstream],
    )
    for t in values_and_gradients(impl("triton"), *args):
        assert t.isfinite().all()
    # every logit + 1e4: same entropy
    offset = (
        torch.cat((hidden, torch.full((7, 1), 1e4)), 1),
        torch.cat((weight, torch.ones(len(weight), 1)), 1),
    )
    entropy = token_logprobs(*(x.to(DEVICE) for x in (*offset, targets)), impl="triton")[1]
    torch.testing.assert_close(
        entropy.cpu().double(),
        exact(hidden.double(), weight.double(), targets, 1)[1],
        rtol=0,
        atol=0.01,
    )


@needs_triton
def test_triton_never_holds_the_logits_of_all_tokens_and_leaves_its_inputs_alone(monkeypatch):
    monkeypatch.setattr(kernels, "BLOCK", 256)
    inputs = hidden, weight, targets, upstream = problem(32)
    before = [t.clone() for t in (hidden, weight, targets, *upstream)]
    with Largest() as largest:
        values_and_gradients(
            impl("triton"), *(x.to(DEVICE) for x in inputs[:3]), 1, [x.to(DEVICE) for x in upstream]
        )
    assert largest.elements < 32 * V  # the interpreter copies the block as bytes
    assert all(
        torch.equal(a, b) for a, b in zip(before, (hidden, weight, targets, *upstream), strict=True)
    )


@needs_triton
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_triton_logprobs_in_half_precision_err_no_more_than_1_5_times_the_reference(dtype):
    hidden, weight, targets, upstream = problem(300, V=100003, dtype=dtype)
    args = hidden.to(DEVICE), weight.to(DEVICE), targets.to(DEVICE)
    upstream = [x.to(DEVICE) for x in upstream]
    true = values_and_gradients(exact, args[0].double(), args[1].double(), args[2], 0.7, upstream)
    for ours, reference, t in zip(
        *(
            values_and_gradients(impl(name), *args, 0.7, upstream)
            for name in ("triton", "reference")
        ),
        true,
        strict=True,
    ):
        assert (ours - t).norm() <= 1.5 * (reference - t).norm()


@pytest.mark.parametrize("why", ["no triton", "no GPU", "float64"])
def test_triton_logprobs_where_they_cannot_run_are_a_value_error(monkeypatch, why):
    hidden, weight, targets, _ = problem(
        7, dtype=torch.float64 if why == "float64" else torch.float32
    )
    if why == "no triton":
        monkeypatch.setattr(kernels, "triton", None)
    if why == "no GPU":
        monkeypatch.setattr(kernels, "INTERPRET", False)
    with pytest.raises(ValueError, match="token_logprobs, impl 'triton': "):
        token_logprobs(hidden, weight, targets, impl="triton")


def natively(**more):
    """The environment without the interpreter."""
    return {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | more


def test_kernels_import_and_run_without_triton(tmp_path):
    (tmp_path / "triton.py").write_text("raise ImportError")
    code = """if True:
        import sys, torch, kernels
        assert kernels.triton is None
        x = torch.randn(1, 2, 5, 8, requires_grad=True)
        kernels.attention(x, x, x, window=2).sum().backward()
        rows = torch.randn(3, 4), torch.randn(9, 4), torch.arange(3)
        kernels.token_logprobs(*rows, impl="chunked")
        for f, args in ((kernels.attention, (x, x, x)), (kernels.token_logprobs, rows)):
            try:
                f(*args, impl="triton")
                sys.exit(1)
            except ValueError as e:
                assert "triton is not installed" in str(e)
        for _ in range(2):
            assert not kernels.triton_runs("attention", x, "sdpa")"""
    environment = natively(PYTHONPATH=f"{tmp_path}{os.pathsep}{Path(kernels.__file__).parent}")
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout == "attention: triton is not installed, takes sdpa instead\n"  # once


COMPILE = """if True:
    import json, sys, kernels, torch, triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    SIZES = "H", "G", "T", "S", "before", "after", "size", "stride", "first", "width"
    HALF = "q", "k", "v", "o", "do", "dq", "dk", "dv", "z"
    UNITS = {"80": "mma.sync", "90": "wgmma.mma_async", "100": "tcgen05.mma"}
    arch, *names = sys.argv[1:]
    tuned = len(names) == 3                     # attention's: at two head sizes
    for name, D in [(name, D) for name in names for D in ((64, 128) if tuned else (0,))]:
        kernel, attributes, constants, signature = getattr(kernels, name), {}, {}, {}
        config, count = triton.Config({}, num_warps=4, num_stages=3), []
        if tuned:                               # the last of those for so many channels
            for dtype in torch.float32, torch.bfloat16:
                args = dict(q=torch.empty(0, dtype=dtype))
                fits = kernel.early_config_prune(kernel.configs, args, D=D, DP=D)
                count.append([c.kwargs["N"] for c in fits])
            config = fits[-1]
        given = dict(D=D, DP=D, **config.kwargs) if tuned else dict(COLS=2048)
        fn = kernel.fn if tuned else kernel
        for i, p in enumerate(fn.params):
            if p.name in given:
                signature[p.name], constants[p.name] = "constexpr", given[p.name]
            elif p.name.endswith("_s"):         # strides: multiples of 16, the last one 1
                signature[p.name], constants[(i, 3)] = ("i32", "i32", "i32", "constexpr"), 1
                attributes |= {(i, j): [["tt.divisibility", 16]] for j in range(3)}
            elif p.name in SIZES:
                signature[p.name] = "i32"
            elif p.name in ("c", "scale", "inv_t"):
                signature[p.name] = "fp32"
            else:
                kind = "bf16" if p.name in HALF else "i64" if p.name == "y" else "fp32"
                signature[p.name] = "*" + kind
                attributes[i,] = [["tt.divisibility", 16]]
        options = {k: getattr(config, k) for k in ("num_warps", "num_stages")}
        binary = triton.compile(
            ASTSource(fn, signature, constants, attributes),
            target=GPUTarget("cuda", int(arch), 32),
            options=options | dict(enable_fp_fusion=True),
        )
        products = binary.asm["ptx"].count(UNITS[arch])
        print(json.dumps([name, binary.metadata.shared, products, count]))"""


@pytest.mark.parametrize(
    "T, trains, dtype",
    [(256, True, torch.float32), (257, True, torch.bfloat16), (256, False, torch.bfloat16)],
)
def test_a_cpu_with_tiles_trains_short_rows_of_bf16_in_fp32(monkeypatch, T, trains, dtype):
    seen, sdpa = [], kernels.F.scaled_dot_product_attention
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    monkeypatch.setattr(
        kernels.F,
        "scaled_dot_product_attention",
        lambda q, *args, **kwargs: seen.append(q.dtype) or sdpa(q, *args, **kwargs),
    )
    q, k, v = torch.randn(3, 1, 2, T, 16, dtype=torch.bfloat16).requires_grad_(trains)
    assert attention(q, k, v).dtype == torch.bfloat16
    assert seen == [dtype]


@needs_triton
@pytest.mark.parametrize(
    "arch, names",
    [
        (80, ["forward_kernel", "dq_kernel", "dkv_kernel"]),
        (90, ["forward_kernel", "dq_kernel", "dkv_kernel"]),
        (100, ["forward_kernel", "dq_kernel", "dkv_kernel"]),
        (90, ["fold_kernel", "slope_kernel"]),
    ],
)
def test_triton_kernels_compile_for_three_kinds_of_gpu_without_spills_and_fit_everywhere(
    tmp_path, names, arch
):
    environment = natively(
        PYTHONPATH=str(Path(kernels.__file__).parent),
        TRITON_CACHE_DIR=str(tmp_path),
        TRITON_DUMP_PTXAS_LOG="1",
    )
    script = tmp_path / "compile_kernels.py"
    script.write_text(COMPILE)
    run = subprocess.run(
        [sys.executable, script, str(arch), *names], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]
    lines = [line for line in run.stdout.splitlines() if line.startswith("[")]
    multiplies = len(names) == 3
    assert len(lines) == (6 if multiplies else 2)  # heads of 64 and of 128 channels
    for name, shared, products, fits in map(json.loads, lines):
        # the tile that has to run everywhere: no GPU from sm_80 on has less than 99 KiB (sm_100,
        # which has 227, wants more for the same tile)
        assert shared <= (227 if arch == 100 else 99) * 1024, name
        assert (products > 0) == multiplies, name
        # for fp32 a tile of its own, for half precision two to try
        assert [len(n) for n in fits] == ([1, 2] if multiplies else [])
        assert not fits or (fits[0] == [32] and 32 not in fits[1])
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes", run.stdout)
    assert spills == [("0", "0")] * len(lines)
