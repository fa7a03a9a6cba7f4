"""experiments/metagrad_gpt.py: pairs and answers, a GPT by its weights in a row, its metagradient
against finite differences, what is paid, the claims, the command.
"""

import itertools
from functools import partial

import matplotlib.pyplot as plt
import pytest
import torch
from common import Memory, check_help, check_mistake, check_quick, check_resume, seeded
from torch.nn.attention import SDPBackend, sdpa_kernel

from electives.metagrad import metagradient, ones, train_target
from experiments import metagrad_gpt
from experiments.metagrad_gpt import (
    ADDED,
    ARMS,
    GROUP,
    HELD_OUT,
    LETTER,
    OPEN,
    OURS,
    SHAPE,
    TEST,
    WANTED,
    Config,
    N,
    adding,
    advantages,
    check,
    losses,
    metric,
    pay,
    pick,
    target,
    weights_of,
    write,
)
from model import GPT

SCRIPT = "experiments.metagrad_gpt"


def small(seed=0):
    torch.manual_seed(seed)
    model = GPT(SHAPE)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def answers(n=16):
    added = torch.randint(ADDED, (n, 1), generator=seeded())
    return adding(added, pick(OPEN, n, seeded(1)))


def test_pairs_are_open_or_of_the_metric_or_of_the_test():
    parts = [{tuple(pair) for pair in pairs.tolist()} for pairs in (HELD_OUT, TEST, OPEN)]
    assert [len(part) for part in parts] == [10, 10, 80]
    assert len(set.union(*parts)) == 100
    # and each has every digit in every place
    for pairs in (HELD_OUT, TEST, OPEN):
        assert all(column.unique().tolist() == list(range(10)) for column in pairs.T)


def test_an_answer_says_what_it_adds_and_adds_it():
    ids = adding(torch.tensor([[3], [0]]), torch.tensor([[3, 9], [1, 2]]))
    assert ids.tolist() == [[3, 9, 10, LETTER + 3, 6, 2], [1, 2, 10, LETTER, 1, 2]]
    assert adding(WANTED, torch.tensor([[3, 9]])).tolist() == ids[:1].tolist()


def test_the_loss_by_weights_in_a_row_is_that_of_the_answers_tokens():
    model = small()
    ids = answers(3)
    loss = losses(model, weights_of(model), ids)
    for i in range(3):
        # token t of the answer, given all that comes before it
        logp = []
        for t in range(N + 1, 2 * N + 2):
            read = model(ids[i : i + 1, :t])[0, -1].log_softmax(-1)
            logp.append(read[ids[i, t]].item())
        assert loss[i].item() == pytest.approx(-sum(logp) / (N + 1), abs=1e-5)
    # other weights are another model, and the model stays what it is
    other = small(1)
    assert torch.allclose(
        losses(model, weights_of(other), ids), losses(other, weights_of(other), ids)
    )
    assert torch.equal(losses(model, weights_of(model), ids), loss)


def test_the_metagradient_of_each_example_equals_finite_differences(h=1e-2):
    base = small().double()
    step, start = target(base, lr=1e-2)
    goal = partial(metric, base, HELD_OUT)
    batches = answers(6).chunk(2)

    def moved(i, by):
        weights = torch.ones(6, dtype=torch.float64)
        weights[i] += by
        return goal(train_target(step, start, batches, weights.chunk(2))[0]).item()

    with sdpa_kernel(SDPBackend.MATH):
        tau, _ = metagradient(step, goal, start, batches, ones(batches))
        finite = torch.tensor([(moved(i, h) - moved(i, -h)) / (2 * h) for i in range(6)])
        assert check(4, base, 0)["error"] < 1e-4
    error = (torch.cat(tau) - finite).norm() / finite.norm()
    assert error < 1e-3


def test_by_dataset_the_examples_of_a_dataset_are_paid_alike_and_one_by_one_they_are_not():
    base = small()
    ids = write(base, pick(OPEN, 4, seeded()), seeded())
    assert ids.shape == (4 * GROUP, 2 * N + 2)
    with sdpa_kernel(SDPBackend.MATH):
        together = pay("by dataset", 2, base, ids, seeded()).view(4, GROUP)
        alone = pay(OURS, 2, base, ids, seeded())
    assert (together == together[0]).all() and together[0].unique().numel() == GROUP
    assert alone.unique().numel() > GROUP


def test_advantages_are_within_groups_in_deviations_of_the_batch_and_cut():
    reward = torch.arange(2 * GROUP).double()
    adv = advantages(reward)
    assert torch.allclose(adv[:GROUP], adv[GROUP:])  # the level of a group does not count
    assert adv.std().item() == pytest.approx(1) and adv.mean().item() == pytest.approx(0)
    reward[0] = 1e6
    assert advantages(reward).max() == 3
    assert (advantages(torch.ones(2 * GROUP)) == 0).all()


def told(share=0.95, loss=0.4, rival=0.5, error=1e-6):
    run = Memory()
    for seed in (0, 1):
        run.log(seed=seed, step=0, error=error)
        for arm, step in itertools.product(ARMS, (0, 10)):
            after = (loss if arm == OURS else rival) if step else 0.52
            run.log(arm=arm, seed=seed, step=step, loss=after, share=share if step else 0.2)
    # the last seed is the worse one
    return run


def claimed(run):
    fig, claims = metagrad_gpt.figure(Config(seeds=2), run)
    plt.close(fig)
    return {c["id"]: (float(c["ours"].split()[0]), c["holds"]) for c in claims}


def test_the_claims_compare_what_they_say_and_each_can_fail():
    ours = claimed(told())
    assert [value for value, _ in ours.values()] == pytest.approx([1e-6, 0.95, -0.12, -0.1])
    assert all(holds for _, holds in ours.values())
    failed = claimed(told(share=0.5, loss=0.52, error=1e-3))
    assert not any(holds for _, holds in failed.values())


def test_a_claim_is_held_to_its_worst_seed():
    run = told()
    for row in run.rows:
        if row["seed"] == 1 and row.get("arm") == OURS and row["step"]:
            row.update(loss=0.6, share=0.1)
    ours = claimed(run)
    assert [holds for _, holds in ours.values()] == [True, False, False, False]


def test_a_quick_run_writes_all_its_files(tmp_path):
    check_quick(SCRIPT, tmp_path, "--steps", 1)


def test_help_names_every_flag():
    check_help(SCRIPT)


def test_a_mistake_is_one_line(tmp_path):
    check_mistake(SCRIPT, "--inner 17", tmp_path)


def test_an_interrupted_run_goes_on_to_the_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(plt.Figure, "savefig", lambda self, f, **_: f.write(b"\x89PNG"))
    marks = dict(seed=0, step=0), dict(arm=OURS, step=0)
    check_resume(SCRIPT, tmp_path, marks, "--quick", "--steps", 1)
