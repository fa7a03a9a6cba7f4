"""experiments/isoflop.py: what a run costs against torch's own counter, fits of laws that are
known, and the command.
"""

from functools import partial

import numpy as np
import pytest
import torch
from common import check_help, check_mistake, check_quick, check_resume, seeded
from torch.utils.flop_counter import FlopCounterMode

import model as gpt
from experiments.isoflop import (
    SIZES,
    Config,
    fit,
    flops_per_token,
    plan,
    predict,
    shape_of,
    valley,
    weights,
)
from kernels import attention, token_logprobs

SCRIPT = "experiments.isoflop"


@pytest.mark.parametrize("width", [8, 48])
def test_operations_counted_from_the_shapes_are_those_that_torch_counts(width, monkeypatch):
    # the fused kernel is one operation to the counter
    monkeypatch.setattr(gpt, "attention", partial(attention, impl="reference"))
    shape = shape_of(Config(), width)
    model = gpt.GPT(shape)
    ids = torch.randint(shape.vocab_size, (5, 17), generator=seeded())
    with FlopCounterMode(display=False) as counter:
        hidden = model.hidden(ids[:, :-1])
        logp, _ = token_logprobs(hidden, model.lm_head.weight, ids[:, 1:], impl="reference")
        logp.sum().backward()
    # norms are not counted by either, but the gradient of their weights is a product in kernels.py:
    # three as wide as the model, two as wide as all heads are
    norms = 2 * 5 * width
    assert counter.get_total_flops() == 5 * 16 * (flops_per_token(shape) + norms)
    assert weights(shape) == sum(p.numel() for p in model.parameters() if p.dim() == 2)


def test_a_plan_spends_its_budget():
    config = Config()
    for times, widths in SIZES.items():
        for width in widths:
            rows, steps = plan(config, width, times * config.flops)
            spent = rows * steps * config.block_size * flops_per_token(shape_of(config, width))
            assert spent == pytest.approx(times * config.flops, rel=0.02)


def test_a_valley_s_lowest_point_is_the_parabola_s():
    N = np.array([1e3, 2e3, 4e3, 8e3, 1.6e4])
    best, lowest = valley(N, 2 + 0.1 * (np.log(N) - np.log(5e3)) ** 2)
    assert np.exp(best) == pytest.approx(5e3) and lowest == pytest.approx(2)
    # upside down: the lowest run
    best, lowest = valley(N, 2 - 0.1 * (np.log(N) - np.log(3e3)) ** 2)
    assert np.exp(best) == pytest.approx(1.6e4) and lowest < 2


def test_known_laws_are_recovered_and_predicted_beyond_their_runs():
    C = 4e9 * np.array([*SIZES])
    law = fit(1.8 + 900 * C**-0.35, C)
    assert law[0] == pytest.approx(1.8, abs=1e-6) and law[2] == pytest.approx((0.35,))
    assert predict(law, 1e12) == pytest.approx(1.8 + 900 * 1e12**-0.35, abs=1e-6)
    N, D = (x.flatten() for x in np.meshgrid(np.geomspace(1e3, 1e5, 5), np.geomspace(1e4, 1e7, 5)))
    law = fit(1.8 + 30 * N**-0.5 + 80 * D**-0.4, N, D)
    assert law[0] == pytest.approx(1.8, abs=1e-6)
    assert law[1] == pytest.approx([30, 80], rel=1e-4) and law[2] == pytest.approx((0.5, 0.4))
    assert predict(law, 4e5, 4e7) == pytest.approx(1.8 + 30 * 4e5**-0.5 + 80 * 4e7**-0.4, abs=1e-6)


def test_no_term_of_a_law_grows_with_what_is_spent():
    C = np.array([1.0, 2.0, 4.0, 8.0])
    E, A, _ = fit(1 - 1 / C + 0.1 * C**-0.5 + np.array([0, 0.5, -0.7, 0.3]), C)
    assert (A >= 0).all() and np.isfinite(E)


def test_a_quick_run_writes_all_its_files(tmp_path):
    check_quick(SCRIPT, tmp_path)


def test_help_names_every_flag():
    check_help(SCRIPT)


def test_a_mistake_is_one_line(tmp_path):
    check_mistake(SCRIPT, "--flops 10", tmp_path)


def test_an_interrupted_run_goes_on_to_the_bit(tmp_path):
    marks = dict(seed=0, times=2.5), dict(seed=0, times=16)
    check_resume(SCRIPT, tmp_path, marks, "--quick")
