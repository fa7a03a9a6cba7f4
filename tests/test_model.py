"""model.py: logits are those of the equations, shapes that cannot be are refused."""

import ctypes
import sys

import pytest
import torch
from common import PROMPTS, VARIANTS, V, make, seeded

import model
from engine import generate
from experiment import UserError
from model import GPT, GPTConfig


def equations(gpt, ids):
    """The forward pass of the Llama family, head by head, in float64."""
    c, T = gpt.config, len(ids)
    H, K, D = c.n_head, c.n_kv_head, c.head_dim

    def double(name):
        return dict(gpt.named_parameters(remove_duplicate=False))[name].double()

    def norm(x, name):
        return (
            x / (x.square().mean(-1, keepdim=True) + c.norm_eps).sqrt() * double(name + ".weight")
        )

    angle = torch.arange(T)[:, None] * c.rope_theta ** (-torch.arange(0, D, 2).double() / D)
    distance = torch.arange(T)[:, None] - torch.arange(T)
    unseen = (distance < 0) | (distance >= (c.window or T))

    def rotated(x):  # (T, D)
        a, b = x[:, 0::2], x[:, 1::2]
        return torch.stack(
            (a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()), -1
        ).flatten(-2)

    x = double("wte.weight")[ids]
    for i in range(c.n_layer):
        at = f"blocks.{i}."
        qkv = norm(x, at + "norm1") @ double(at + "attn.qkv.weight").T + (
            double(at + "attn.qkv.bias") if c.qkv_bias else 0
        )
        # (T, H or K, D)
        q, k, v = (t.unflatten(-1, (-1, D)) for t in qkv.split([H * D, K * D, K * D], -1))
        if c.qk_norm:
            q, k = norm(q, at + "attn.q_norm"), norm(k, at + "attn.k_norm")
        heads = []
        for h in range(H):
            group = h * K // H
            scores = rotated(q[:, h]) @ rotated(k[:, group]).T / D**0.5
            heads.append(scores.masked_fill(unseen, -torch.inf).softmax(-1) @ v[:, group])
        x = x + torch.cat(heads, -1) @ double(at + "attn.proj.weight").T
        z = norm(x, at + "norm2")
        gate = z @ double(at + "mlp.gate.weight").T
        x = (
            x
            + (gate * gate.sigmoid() * (z @ double(at + "mlp.up.weight").T))
            @ double(at + "mlp.proj.weight").T
        )
    return norm(x, "norm") @ double("wte.weight" if c.tie else "lm_head.weight").T


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_the_equations(variant):
    gpt, ids = make(**VARIANTS[variant]), torch.randint(V, (20,), generator=seeded())
    torch.testing.assert_close(
        gpt(ids[None])[0].double(), equations(gpt, ids), rtol=1e-4, atol=1e-4
    )


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_without_gradients_is_torchs_and_that_is_ours(dtype):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    norm = model.RMSNorm(96, 1e-3).to(device, dtype)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(5, 7, 96, generator=seeded()).to(device, dtype)
    ours = norm(x)  # with gradients
    with torch.no_grad():
        chosen = norm(x)
    theirs = torch.nn.functional.rms_norm(x, (96,), norm.weight, 1e-3)
    assert torch.equal(chosen, theirs)
    torch.testing.assert_close(theirs, ours)


def test_the_gradient_of_a_norm_is_that_of_finite_differences():
    x, weight = (
        torch.randn(shape, generator=seeded(), dtype=torch.float64, requires_grad=True)
        for shape in ((2, 3, 6), (6,))
    )
    assert torch.autograd.gradcheck(model.RMSNormFunction.apply, (x, weight, 1e-2))


def test_at_the_start_biases_are_0_and_what_writes_into_the_stream_shrinks_with_the_writers():
    torch.manual_seed(0)
    for name, p in GPT(GPTConfig(500, 8, 8, 4, 64, qkv_bias=True, qk_norm=True)).named_parameters():
        if p.dim() == 1:
            assert p.eq(0 if "bias" in name else 1).all()
        else:
            assert p.std().item() == pytest.approx(
                0.02 / 16**0.5 if "proj" in name else 0.02, rel=0.05
            )


@pytest.mark.parametrize(
    "wrong", [dict(n_head=3), dict(n_kv_head=3), dict(window=0), dict(head_dim=5)]
)
def test_a_shape_that_cannot_be_is_a_user_error(wrong):
    with pytest.raises(UserError):
        GPTConfig(**{**dict(vocab_size=V, block_size=8, n_layer=1, n_head=4, n_embd=32), **wrong})


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_count_of_parameters_is_that_of_the_model(variant):
    config = GPTConfig(
        **{
            **dict(
                vocab_size=V, block_size=8, n_layer=3, n_head=4, n_embd=48, head_dim=10, tie=False
            ),
            **VARIANTS[variant],
        }
    )
    assert config.parameters == sum(p.numel() for p in GPT(config).parameters())


@pytest.mark.parametrize(
    "huge",
    [
        dict(n_layer=4_000_000_000),
        dict(n_embd=100_000_000),
        dict(vocab_size=10**11),
        dict(block_size=10**12),
        dict(head_dim=10**10),
    ],
)
def test_a_model_that_the_machine_cannot_hold_is_a_user_error_before_anything_is_allocated(
    huge, monkeypatch
):
    config = GPTConfig(
        **{**dict(vocab_size=V, block_size=8, n_layer=1, n_head=4, n_embd=32), **huge}
    )
    for part in ("Embedding", "Linear"):
        monkeypatch.setattr(model.nn, part, lambda *_, **__: pytest.fail("allocates"))
    with pytest.raises(UserError, match=f"{config.parameters:,} parameters.*GiB"):
        GPT(config)


def test_shapes_without_memory_may_be_of_any_size():
    with torch.device("meta"):
        assert GPT(GPTConfig(V, 8, 1, 4, 1_000_000)).wte.weight.shape == (V, 1_000_000)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's own")
def test_a_block_of_30_mib_comes_from_the_heap_that_keeps_what_is_freed():
    class Info(ctypes.Structure):
        names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
        _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        pytest.skip("an older libc, or another")
    libc.mallinfo2.restype = Info
    blocks = libc.mallinfo2().hblks  # those that go back to the system at once
    x = torch.ones(30 * 2**18)
    assert libc.mallinfo2().hblks == blocks and len(x)
