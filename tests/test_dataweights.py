"""experiments/dataweights.py: the judge by brute force, the rivals against their definitions, what
weights do, the command.
"""

from functools import partial

import pytest
import torch
from common import check_help, check_mistake, check_quick, check_resume, seeded

from electives.metagrad import sgd, train_step
from experiments.dataweights import (
    DESCENT,
    ONE,
    RULES,
    SETTINGS,
    SIZES,
    Config,
    auroc,
    compare,
    descend_weights,
    losses,
    watch_training,
    world,
)

SCRIPT = "experiments.dataweights"
SMALL = Config(points=40, inner=5, outer=3)


def setting(config=SMALL, lr=1.0):
    here = world(config, SETTINGS[1], 0)
    step = partial(train_step, losses, partial(sgd, lr=lr))
    return config, here, step, [here.train] * config.inner


def test_the_auroc_counts_pairs_and_ties_by_half():
    score = torch.randint(4, (50,), generator=seeded()).double()
    flipped = torch.rand(50, generator=seeded(1)) < 0.4
    pairs = [(a, b) for a in score[flipped] for b in score[~flipped]]
    wins = sum((a > b).item() + (a == b).item() / 2 for a, b in pairs)
    assert auroc(score, flipped) == pytest.approx(wins / len(pairs))
    assert auroc(flipped.double(), flipped) == 1 and auroc(torch.zeros(50), flipped) == 0.5


def test_two_in_five_labels_are_flipped_and_held_out_and_test_labels_are_true():
    here = world(Config(points=10**4), 60, 0)
    assert here.flipped.double().mean().item() == pytest.approx(0.4, abs=0.02)
    x, told = here.train
    true_train = (x, torch.where(here.flipped, -told, told))
    for x, y in (true_train, here.held, here.test):
        field = ((x / 1.5).round() + 1).clamp(0, 2)
        true = 1 - 2 * ((3 * field[:, 0] + field[:, 1]) % 2)  # but where noise left the field
        assert (y == true).double().mean().item() > 0.9
    assert len(here.held[0]) == 60 and len(here.test[0]) == 1000


def test_a_loss_is_the_cross_entropy_of_an_mlp():
    theta = torch.randn(sum(SIZES), generator=seeded()).double()
    x, y = torch.randn(6, 2, generator=seeded(1)).double(), torch.tensor([1.0, -1.0] * 3).double()
    into, bias, out, offset = theta.split(SIZES)
    z = torch.tanh(x @ into.view(2, -1) + bias) @ out + offset
    expected = torch.nn.functional.binary_cross_entropy_with_logits(
        z, (y + 1) / 2, reduction="none"
    )
    assert torch.allclose(losses(theta, (x, y)), expected)


def test_one_derivative_is_the_first_step_and_later_steps_lower_the_held_out_loss():
    config, here, step, batches = setting()
    scores, course = descend_weights(config, here, step, batches)
    assert len(course) == 3 and course[2] < course[1] < course[0]
    # one step: weights are 1.1 where the loss falls with them, .9 where it rises
    one = Config(points=40, inner=5, outer=1)
    after, _ = descend_weights(one, here, step, batches)
    assert torch.equal(after[ONE], scores[ONE])
    assert torch.allclose(-after[DESCENT], 1 - 0.1 * scores[ONE].sign(), atol=1e-5)


def test_a_first_derivative_of_tiny_steps_is_what_tracin_sums():
    config, here, step, batches = setting(lr=1e-6)
    scores, _ = descend_weights(config, here, step, batches)
    watched = watch_training(config, here, step, batches)
    expected = watched["TracIn"] * 1e-6 / config.points  # the mean over points, times lr
    assert torch.allclose(scores[ONE], expected, rtol=1e-3)


def test_losses_and_gradient_norms_are_those_of_each_point_by_itself():
    config, here, step, batches = setting(lr=0.0)  # nothing is learnt
    watched = watch_training(config, here, step, batches)
    for i in (0, 7, 39):
        theta = here.start[0].clone().requires_grad_()
        loss = losses(theta, tuple(part[i : i + 1] for part in here.train)).sum()
        (slope,) = torch.autograd.grad(loss, theta)
        assert watched["loss"][i].item() == pytest.approx(loss.item())
        assert watched["mean loss"][i].item() == pytest.approx(loss.item())
        assert watched["gradient norm"][i].item() == pytest.approx(slope.norm().item())


def test_a_row_has_every_rule_and_leaving_out_all_flipped_is_best():
    row = compare(Config(points=200, inner=40, outer=1), SETTINGS[1], 0)
    assert set(row["auroc"]) == set(RULES) <= set(row["accuracy"])
    accuracy = row["accuracy"]
    assert accuracy["all flipped left out"] > accuracy["nothing left out"]
    assert accuracy["all flipped left out"] == max(accuracy.values())


def test_a_quick_run_writes_all_its_files(tmp_path):
    check_quick(SCRIPT, tmp_path)


def test_help_names_every_flag():
    check_help(SCRIPT)


@pytest.mark.parametrize("flags", ["--points 9", "--device cuda"])
def test_a_mistake_is_one_line(flags, tmp_path):
    check_mistake(SCRIPT, flags, tmp_path)


def test_an_interrupted_run_goes_on_to_the_bit(tmp_path):
    marks = dict(seed=0, held=15), dict(seed=1, held=30)
    check_resume(SCRIPT, tmp_path, marks, "--seeds", 2, "--points", 30, "--inner", 4, "--outer", 2)
