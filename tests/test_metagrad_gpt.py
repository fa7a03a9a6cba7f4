"""experiments/metagrad_gpt.py: lists and answers, a GPT by its weights in a row, its metagradient
against finite differences, the claims, the command.
"""

import itertools
from functools import partial

import matplotlib.pyplot as plt
import pytest
import torch
from common import Memory, check_help, check_mistake, check_quick, check_resume, seeded
from torch.nn.attention import SDPBackend, sdpa_kernel

from electives.metagrad import metagradient, sgd, train_step, train_target
from experiments import metagrad_gpt
from experiments.metagrad_gpt import (
    ARMS,
    SHAPE,
    TASK,
    WANTED,
    Config,
    N,
    adding,
    answer_logprobs,
    draw,
    losses,
    shares,
)
from model import GPT

SCRIPT = "experiments.metagrad_gpt"


def small(seed=0):
    torch.manual_seed(seed)
    model = GPT(SHAPE)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model, torch.cat([p.detach().flatten() for p in model.parameters()])


def test_held_out_lists_begin_with_a_digit_twice_and_no_other_does():
    for held_out in (False, True):
        lists = draw(2000, seeded(), held_out)
        assert ((lists[:, 0] == lists[:, 1]) == held_out).all()
        assert all(column.unique().tolist() == list(range(10)) for column in lists.T)


def test_an_answer_adds_one_number_to_every_digit():
    ids = adding(torch.tensor([[3], [0]]), torch.tensor([[3, 1, 4, 9], [1, 2, 3, 4]]))
    assert ids.tolist() == [[3, 1, 4, 9, 10, 6, 4, 7, 2], [1, 2, 3, 4, 10, 1, 2, 3, 4]]
    assert shares(ids) == {"add 0": 0.5, "add 1": 0, "add 2": 0, "add 3": 0.5, "add 4": 0}
    ids[0, -1] = 5  # one digit wrong
    assert shares(ids)["add 3"] == 0


def test_the_weights_in_a_row_are_the_model():
    model, theta = small()
    ids = adding(2, draw(3, seeded()))
    logp = answer_logprobs(model, ids)
    assert torch.allclose(answer_logprobs(model, ids, theta), logp, atol=1e-6)
    # digit t of the answer, given all that comes before it
    for i, t in itertools.product(range(3), range(N)):
        read = model(ids[i : i + 1, : N + 1 + t])[0, -1].log_softmax(-1)
        assert logp[i, t].item() == pytest.approx(read[ids[i, N + 1 + t]].item(), abs=1e-5)
    other = answer_logprobs(model, ids, theta + 0.1 * torch.randn(len(theta), generator=seeded()))
    assert (other - logp).abs().max() > 0.01
    assert torch.allclose(losses(model, theta, ids), -logp.mean(1), atol=1e-6)


def test_a_gpts_metagradient_equals_finite_differences(h=0.02):
    model, theta = small()
    step = partial(train_step, partial(losses, model), partial(sgd, lr=0.3))
    batches = [adding(i, draw(3, seeded(i))) for i in range(2)]
    weights = [torch.ones(3), torch.ones(3)]
    held_out = adding(WANTED, draw(20, seeded(5), held_out=True))

    def goal(theta):
        return -losses(model, theta, held_out).mean()

    with sdpa_kernel(SDPBackend.MATH):
        tau, _ = metagradient(step, goal, theta[None].clone(), batches, weights)
        finite = []
        for t, i in itertools.product(range(2), range(3)):
            ends = []
            for by in (h, -h):
                moved = [w.clone() for w in weights]
                moved[t][i] += by
                ends.append(goal(train_target(step, theta[None], batches, moved)[0]).item())
            finite.append((ends[0] - ends[1]) / (2 * h))
    error = (torch.cat(tau) - torch.tensor(finite)).norm() / torch.tensor(finite).norm()
    assert error < 0.01


def told(share=0.95, loss=0.1, rival=0.5):
    run = Memory()
    for seed, arm in itertools.product((0, 1), ARMS):
        levels = {"base": 0.5, "trained on right answers": 0.08}
        run.log(arm=arm, seed=seed, step=0, **levels)
        for step in range(1, 9):
            found = dict.fromkeys(shares(torch.zeros(1, 2 * N + 1)), 0.0)
            found[TASK] = share if arm == "each example" else rival
            run.log(arm=arm, seed=seed, step=step, loss=loss, **found)
    return run


def claimed(run):
    fig, claims = metagrad_gpt.figure(Config(seeds=2, steps=8), run)
    plt.close(fig)
    return {c["id"]: (float(c["ours"].split()[0]), c["holds"]) for c in claims}


def test_the_claims_compare_what_they_say_and_each_can_fail():
    ours = claimed(told())
    assert {k: v for k, (v, _) in ours.items()} == pytest.approx(
        {"share": 0.95, "gain": 0.4, "best": 0.02, "dataset": 0.45}
    )
    assert all(holds for _, holds in ours.values())
    assert not any(holds for _, holds in claimed(told(share=0.5, loss=0.45)).values())


def test_a_quick_run_writes_all_its_files(tmp_path):
    check_quick(SCRIPT, tmp_path)


def test_help_names_every_flag():
    check_help(SCRIPT)


def test_a_mistake_is_one_line(tmp_path):
    check_mistake(SCRIPT, "--inner 17", tmp_path)


def test_an_interrupted_run_goes_on_to_the_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(plt.Figure, "savefig", lambda self, f, **_: f.write(b"\x89PNG"))
    marks = dict(arm="each example", step=1), dict(arm="by dataset", step=1)
    check_resume(SCRIPT, tmp_path, marks, "--quick")
