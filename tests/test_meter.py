"""FLOPs against torch's own counter; joules against files and a library made up here."""

import ctypes
import json
import math
from types import SimpleNamespace

import matplotlib.pyplot as plt
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import decoding
import engine
import meter
import model
import roof
import ttt
from electives import forget, relay
from engine import KVCache, generate
from experiment import Flags, Run, parse_args
from kernels import attention, token_logprobs
from model import GPT, GPTConfig

SHAPES = {
    "plain": {},
    "grouped": dict(n_kv_head=2),
    "wide heads": dict(head_dim=12, qkv_bias=True, qk_norm=True),
    "untied": dict(tie=False, n_hidden=40),
}


@pytest.fixture(params=SHAPES, ids=str)
def gpt(request, monkeypatch):
    """A GPT with attention of two plain products (torch's counter does not know the CPU's kernel)
    and norms without any (ours sums its weights' gradient by one).
    """
    monkeypatch.setattr(
        model, "attention", lambda *args, **kwargs: attention(*args, **kwargs, impl="reference")
    )

    def norm(x, weight, eps):
        return x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * weight

    monkeypatch.setattr(model, "RMSNormFunction", SimpleNamespace(apply=norm))
    torch.manual_seed(0)
    shape = dict(vocab_size=20, block_size=16, n_layer=2, n_head=4, n_embd=32)
    return GPT(GPTConfig(**shape, **SHAPES[request.param]))


def both(work):
    """What work() costs by our count, and by torch's."""
    spent, theirs = meter.Meter(), FlopCounterMode(display=False)
    with theirs:
        work()
    return spent.read()["flops"], theirs.get_total_flops()


IDS = torch.arange(33).view(3, 11) % 20


def test_a_forward_and_a_backward_pass_cost_what_torch_counts(gpt):
    ours, theirs = both(lambda: gpt(IDS).logsumexp(-1).sum().backward())
    assert ours == theirs > 0


def test_a_forward_pass_without_gradients_costs_a_third(gpt):
    with torch.no_grad():
        ours, theirs = both(lambda: gpt(IDS))
    trained, _ = both(lambda: gpt(IDS))
    assert ours == theirs == trained / 3


def test_models_with_a_forward_pass_of_their_own_cost_what_torch_counts(monkeypatch):
    monkeypatch.setattr(
        model, "attention", lambda *args, **kwargs: attention(*args, **kwargs, impl="reference")
    )
    plain = GPT(GPTConfig(20, 16, 2, 4, 32))
    denoiser, learner = relay.Denoiser(2), ttt.build(parse_args(ttt.Config, "", []), 20)
    canvas, h = torch.zeros(3, 36, dtype=torch.long), torch.zeros(3, 36, relay.WIDTH)
    masks = torch.ones(2, 3, 11, 11, dtype=torch.bool).tril()
    with torch.no_grad():
        for work in (
            lambda: forget.read(plain, IDS, masks),
            lambda: denoiser(canvas, h),
            lambda: learner(IDS),
        ):
            ours, theirs = both(work)
            assert ours == theirs > 0


def test_log_probabilities_cost_the_product_with_the_head(gpt):
    def work():
        hidden = gpt.hidden(IDS)
        logp, _ = token_logprobs(hidden, gpt.lm_head.weight, IDS, impl="reference")
        logp.sum().backward()

    ours, theirs = both(work)
    assert ours == theirs > 0


def test_what_is_computed_twice_to_save_memory_counts_once(gpt):
    def work():
        hidden = gpt.hidden(IDS)
        token_logprobs(hidden, gpt.lm_head.weight, IDS, impl="chunked")[0].sum().backward()

    plain, _ = both(work)
    gpt.checkpointing = True
    again, theirs = both(work)
    assert again == plain < theirs


def test_reading_on_with_a_cache_costs_what_torch_counts(gpt):
    cache = KVCache(gpt.config, 3, 16)
    with torch.no_grad():
        gpt.hidden(IDS[:, :5], cache)
        ours, theirs = both(lambda: gpt.hidden(IDS[:, 5:9], cache))
    assert ours == theirs > 0


@pytest.mark.parametrize("stop", [None, 3])
def test_sampling_costs_what_torch_counts_although_rows_retire(gpt, stop, monkeypatch):
    monkeypatch.setattr(decoding, "NATIVE", {})  # torch counts its own operations only
    prompts = [[1, 2, 3], [4, 5], [6]]
    generator = torch.Generator().manual_seed(0)
    ours, theirs = both(
        lambda: generate(gpt, prompts, n=8, max_new_tokens=12, stop=stop, generator=generator)
    )
    assert ours == theirs > 0


@pytest.mark.parametrize("stop", [None, 3])
def test_generating_counts_what_is_spent_on_prompts_of_one_length(gpt, stop, monkeypatch):
    monkeypatch.setattr(decoding, "NATIVE", {})  # torch counts its own operations only

    def work():
        nonlocal lengths
        generator = torch.Generator().manual_seed(0)
        prompts = [[1, 2, 3], [4, 5, 6]]
        out = generate(gpt, prompts, n=4, max_new_tokens=12, stop=stop, generator=generator)
        lengths = out.lengths.tolist()

    lengths = None
    ours, theirs = both(work)
    tokens, flops, _ = roof.generating(gpt.config, 4, [3, 3], lengths)
    assert ours == theirs == flops and tokens == sum(lengths)
    assert stop is None or min(lengths) < 12


def test_generating_moves_the_weights_once_a_step_and_each_rows_keys_and_values():
    config = GPTConfig(50, 64, 3, 4, 32, n_kv_head=2, tie=False)
    lens, lengths = [5, 9], [4, 1, 7, 2]  # two samples of each prompt
    moved = 0
    for step in range(7):  # the first reads the prompts
        moved += config.parameters
        for P, L in zip([5, 5, 9, 9], lengths, strict=True):
            if 0 < step < L:  # the token drawn last is not read again
                moved += (P + step) * 2 * config.n_layer * config.n_kv_head * config.head_dim
    assert roof.generating(config, 2, lens, lengths)[2] == 2 * moved


def test_generating_of_prompts_of_many_lengths_does_not_count_their_padding():
    config = GPTConfig(50, 64, 3, 4, 32)
    both_at_once = roof.generating(config, 2, [5, 9], [4, 1, 7, 2])
    apart = [roof.generating(config, 2, [5], [4, 1]), roof.generating(config, 2, [9], [7, 2])]
    assert both_at_once[:2] == (14, apart[0][1] + apart[1][1])


def test_steps_of_a_fixed_shape_cost_as_often_as_they_are_taken(gpt, monkeypatch):
    prompts = [[1, 2, 3], [4, 5, 6]]
    plain, _ = both(lambda: generate(gpt, prompts, n=2, max_new_tokens=13))
    monkeypatch.setattr(engine, "STATIC_ON", ("cpu",))
    # a capture runs the step once for nothing, and a replay does not come by the counter
    steps = []

    def captured(step, device):
        step()
        steps.append(step)
        return lambda: None

    eager, _ = both(lambda: generate(gpt, prompts, n=2, max_new_tokens=13))
    monkeypatch.setattr(decoding, "captured", captured)
    replayed, _ = both(lambda: generate(gpt, prompts, n=2, max_new_tokens=13))
    assert steps and replayed == eager == plain


def test_processors_tell_joules_and_their_counters_may_begin_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(meter, "POWERCAP", tmp_path)
    for i, used in enumerate((10_000_000, 990_000_000)):
        domain = tmp_path / f"intel-rapl:{i}"
        domain.mkdir()
        (domain / "energy_uj").write_text(f"{used}\n")
        (domain / "max_energy_range_uj").write_text("1000000000\n")
    part = tmp_path / "intel-rapl:0:0"  # of domain 0: counted there
    part.mkdir()
    (part / "energy_uj").write_text("5\n")
    (part / "max_energy_range_uj").write_text("1000000000\n")
    spent = meter.Meter()
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("14000000\n")
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("2000000\n")
    # 4 J, and 10 J to the end of the range with 2 J after it
    assert spent.read()["joules"] == pytest.approx(4 + 12)
    assert str(spent).endswith(" s, 16 J")


def test_a_machine_that_does_not_tell_says_nothing_of_joules(tmp_path, monkeypatch):
    monkeypatch.setattr(meter, "POWERCAP", tmp_path)
    (tmp_path / "intel-rapl:0").mkdir()  # its files are not there, or not ours to read
    spent = meter.Meter()
    assert spent.read()["joules"] is None and "J" not in str(spent)


def test_what_failed_is_paid_for_by_what_was_solved(monkeypatch):
    monkeypatch.setattr(meter, "counter", meter.Counter())
    monkeypatch.setattr(meter.time, "time", iter((100, 110, 120, 130, 140)).__next__)
    monkeypatch.setattr(meter, "processors", lambda: [])
    spent = meter.Meter()
    with torch.no_grad():
        meter.spend(6000)
    assert spent.solved(torch.tensor(4.0)) == dict(flops_per_solved=1500)
    assert spent.total()["per_solved"] == dict(flops=1500, seconds=2.5, joules=None)
    told = "6e+03 FLOPs, 30 s; of a held-out problem solved at the end: 1.5e+03 FLOPs, 2.5 s"
    assert str(spent) == told


def test_where_nothing_is_solved_no_price_is_named(monkeypatch):
    monkeypatch.setattr(meter, "counter", meter.Counter())
    spent = meter.Meter()
    assert spent.solved(0) == dict(flops_per_solved=None)
    assert spent.total()["per_solved"] is None and "solved" not in str(spent)


def test_gpus_tell_millijoules(monkeypatch):
    class Library:
        def __init__(self, name):
            assert "nvidia-ml" in name

        def nvmlInit_v2(self):
            return 0

        def nvmlDeviceGetHandleByIndex_v2(self, i, handle):
            handle._obj.value = i + 1

        def nvmlDeviceGetTotalEnergyConsumption(self, handle, used):
            used._obj.value = 7000 * handle.value
            return 0 if handle.value < 3 else 3  # the third one does not support it

    monkeypatch.setattr(ctypes, "CDLL", Library)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert meter.gpus() == [(7, math.inf), (14, math.inf)]


def test_a_run_ends_with_what_it_cost(tmp_path, capsys, gpt):
    with Run(Flags(out=str(tmp_path))) as run:
        gpt(IDS)
        fig, _ = plt.subplots()
        run.finish(fig, [])
        plt.close(fig)
    cost = json.loads((tmp_path / "cost.json").read_text())
    assert set(cost) == {"flops", "seconds", "joules", "per_solved"} and cost["flops"] > 0
    assert f"{cost['flops']:.2g} FLOPs" in capsys.readouterr().out.splitlines()[-1]


# --------------------------------------------------------------------------------------------------
# What a step spends its seconds on


def event(name, microseconds, around=None, number=-1, kind=torch.autograd.DeviceType.CPU):
    return SimpleNamespace(
        name=name,
        cpu_parent=around,
        self_cpu_time_total=microseconds,
        self_device_time_total=10 * microseconds,
        sequence_nr=number,
        device_type=kind,
    )


def test_an_events_time_goes_to_the_outermost_group_and_a_backward_ones_to_its_forwards():
    attention = event("attention", 1)
    product = event("aten::linear", 2)
    norm = event("norms", 4)
    scale = event("aten::mul", 8, norm, number=7)
    node = event("autograd::engine::evaluate_function: MulBackward0", 16, number=7)
    events = [
        attention,
        event("aten::mm", 32, attention, number=5),  # a product inside attention is attention's
        product,
        event("mkldnn::_linear_pointwise", 64),
        norm,
        scale,
        event("aten::silu", 128, number=8),
        node,
        event("aten::mm", 256, event("MulBackward0", 0, node, number=7)),
        event("autograd::engine::evaluate_function: SiluBackward0", 512, number=8),
        event("aten::add", 1024),
        event("Optimizer.step#AdamW.step", 2048),
        event("attention", 4096, kind=torch.autograd.DeviceType.CUDA),  # the same on the GPU
    ]
    groups = ["matrix products", "attention", "norms", "optimizer"]
    expected = dict(zip(groups, (2 + 64, 1 + 32, 4 + 8 + 16 + 256, 2048), strict=True))
    found = roof.shares(events, groups, 4096e-6, "cpu")
    rest = found.pop("the rest, Python")
    assert found == pytest.approx({group: t / 4096 for group, t in expected.items()})
    assert rest == pytest.approx(1 - sum(expected.values()) / 4096)
    # on a GPU: the time of the kernels that an operation launched
    on_gpu = roof.shares(events, groups, 40960e-6, "cuda")
    assert on_gpu == pytest.approx(found | {"the rest, Python": rest})


def test_what_is_profiled_runs_as_before_and_is_left_as_it_was():
    calls, place = (
        [],
        SimpleNamespace(sleep=lambda n: calls.append(n) or torch.ones(n, n) @ torch.ones(n, n)),
    )
    usual = place.sleep
    milliseconds, parts = roof.profiled(
        lambda: place.sleep(200), dict(naps=(place, "sleep")), "cpu"
    )
    assert calls == [200] * 3 and place.sleep is usual and milliseconds > 0
    assert list(parts) == ["matrix products", "naps", "the rest, Python"]
    assert parts["naps"] > 0 and sum(parts.values()) == pytest.approx(1)
