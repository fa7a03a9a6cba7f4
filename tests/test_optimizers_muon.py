"""experiments/optimizers_muon.py: what Newton-Schulz does to singular values, what Muon takes and
how far it goes, how steps are compared, and the command.
"""

import copy
import math

import numpy as np
import pytest
import torch
from common import check_help, check_mistake, check_quick, check_resume, make, seeded

from experiments.optimizers_muon import REST, Muon, build, newton_schulz, speed_up, split

SCRIPT = "experiments.optimizers_muon"


@pytest.mark.parametrize("shape", [(128, 512), (48, 32), (16, 48)])
def test_newton_schulz_moves_all_singular_values_to_about_1_and_turns_nothing(shape):
    G = torch.randn(shape, generator=seeded())
    X = newton_schulz(G)
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    values = (U.T @ X @ Vh.T).diagonal()
    assert ((values > 0.6) & (values < 1.3)).all()
    # the singular vectors are G's: nothing is left beside the diagonal
    assert (U @ values.diag() @ Vh - X).abs().max() < 1e-4


def test_newton_schulz_of_the_transpose_is_the_transpose_and_ignores_the_scale():
    G = torch.randn(20, 50, generator=seeded())
    assert (newton_schulz(G.T) - newton_schulz(G).T).abs().max() < 1e-5
    assert (newton_schulz(1e-3 * G) - newton_schulz(G)).abs().max() < 1e-3
    assert newton_schulz(torch.zeros(3, 4)).abs().max() == 0


def test_each_parameter_has_one_rule_and_muon_takes_the_matrices_of_the_blocks():
    model = make(qk_norm=True, tie=True)
    hidden, rest = split(model)
    names = {id(p): name for name, p in model.named_parameters()}
    assert sorted(names) == sorted(map(id, hidden + rest))  # each of them once
    assert {names[id(p)].split(".", 2)[2] for p in hidden} == {
        "attn.qkv.weight",
        "attn.proj.weight",
        "mlp.gate.weight",
        "mlp.up.weight",
        "mlp.proj.weight",
    }
    for arm in ("AdamW", "Muon"):
        groups = build(arm, model.requires_grad_(), 0.5).param_groups
        assert [len(group["params"]) for group in groups] == [len(hidden), len(rest)]
        assert [group["lr"] for group in groups] == [0.5, REST]


def step_with(optimizers, parameters, steps=4):
    """Steps of each optimizer on its own copy of the parameters, with the same gradients."""
    for t in range(steps):
        for i, copies in enumerate(zip(*parameters, strict=True)):
            g = torch.randn(copies[0].shape, generator=seeded(100 * t + i))
            for p in copies:
                p.grad = g.clone()
        for optimizer in optimizers:
            optimizer.step()


def test_its_steps_are_torch_s_own_muon_s_and_adamw_s():
    shapes = (40, 20), (20, 40), (32, 32)
    ours = [torch.nn.Parameter(torch.randn(s, generator=seeded(i))) for i, s in enumerate(shapes)]
    ours.append(torch.nn.Parameter(torch.randn(7, generator=seeded(9))))
    theirs = [copy.deepcopy(p) for p in ours]
    start = [p.detach().clone() for p in ours]
    step_with(
        [
            Muon(ours[:3], ours[3:], 0.02, 0.01),
            torch.optim.Muon(theirs[:3], lr=0.02, weight_decay=0.1, momentum=0.95),
            torch.optim.AdamW(theirs[3:], 0.01, betas=(0.9, 0.95), weight_decay=0.1),
        ],
        [ours, theirs],
    )
    for p, q, before in zip(ours[:3], theirs[:3], start, strict=False):
        # torch's iterates in bfloat16
        assert (p - q).norm() < 0.02 * (q - before).norm()
    assert ours[3].detach() == pytest.approx(theirs[3].detach(), abs=1e-6)


def test_a_step_has_the_length_of_its_rate_whatever_the_gradient_s():
    for shape, factor in (((64, 16), 2.0), ((16, 64), 1.0)):
        for scale in (1e-3, 1e3):
            p = torch.nn.Parameter(torch.zeros(shape))
            p.grad = scale * torch.randn(shape, generator=seeded())
            Muon([p], [], lr=0.1, rest_lr=0).step()
            # RMS: all min(rows, columns) singular values are about 1
            rms = 0.1 * factor * math.sqrt(min(shape) / p.numel())
            assert p.detach().square().mean().sqrt().item() == pytest.approx(rms, rel=0.25)


def test_the_speed_up_is_read_off_a_power_law():
    steps = {"AdamW": np.array([100, 200, 400, 800, 1600]), "Muon": np.array([100, 200, 400])}
    law = steps["AdamW"][:, None] ** -0.5
    # as far as AdamW is after three times the steps; the last is beyond what it ever reached
    excess = {"AdamW": law, "Muon": np.array([[300**-0.5], [600**-0.5], [1e-3]])}
    assert speed_up(steps, excess)[:, 0] == pytest.approx([3, 3, 4])
    # a budget at which it was worse than before changes nothing
    excess["AdamW"] = np.where(law < 0.03, 1, law)
    assert speed_up(steps, excess)[:2, 0] == pytest.approx([3, 3])


def test_a_quick_run_writes_all_its_files(tmp_path):
    check_quick(SCRIPT, tmp_path)


def test_help_names_every_flag():
    check_help(SCRIPT)


def test_a_mistake_is_one_line(tmp_path):
    check_mistake(SCRIPT, "--steps 0", tmp_path)


def test_an_interrupted_run_goes_on_to_the_bit(tmp_path):
    marks = dict(arm="AdamW", step=8, lr=0.005), dict(arm="Muon", step=4, lr=0.02)
    check_resume(SCRIPT, tmp_path, marks, "--quick")
