"""experiments/infinite.py: ensembles by enumeration, decay as AdamW's, fits of exact power laws,
and what is chosen by which part of the text.
"""

from itertools import combinations

import numpy as np
import pytest
import torch
from common import Memory, check_help, check_mistake, check_quick, check_resume, known, seeded

from experiment import lr_at
from experiments import infinite
from experiments.infinite import (
    BATCH,
    MEMBER,
    MEMBERS,
    RATE,
    WIDTHS,
    Config,
    T,
    V,
    asymptote,
    bend,
    chosen,
    ensemble_losses,
    measure,
    rise,
    shape,
    train,
)
from model import GPT

SCRIPT = "experiments.infinite"


def texts():
    """Forty documents, each of a letter pair of its own."""
    return [(chr(40 + 2 * i) + chr(41 + 2 * i)) * 40 for i in range(40)]


@pytest.fixture
def short(monkeypatch):
    """Texts and a grid that take no time."""
    monkeypatch.setattr(infinite, "load_documents", lambda _: texts())
    monkeypatch.setattr(infinite, "DECAYS", (0.1, 4.0))
    monkeypatch.setattr(infinite, "EPOCHS", (4, 8))
    monkeypatch.setattr(infinite, "LAST", 8)


def test_an_ensemble_is_the_mean_of_probabilities_over_all_choices_of_members():
    laws = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.3, 0.3, 0.4]])
    ids = torch.randint(3, (20, T + 1), generator=seeded())
    counts = torch.bincount(ids[:, 1:].flatten(), minlength=3) / (20 * T)
    losses = ensemble_losses([known(law.tolist()) for law in laws], ids)
    for k, loss in enumerate(losses, 1):
        means = [laws[list(c)].mean(0) for c in combinations(range(3), k)]
        assert loss == pytest.approx(np.mean([-(counts @ p.log()).item() for p in means]), abs=1e-5)
    assert losses[0] > losses[1] > losses[2]  # Jensen


def test_training_decays_the_blocks_matrices_as_adamw_does_and_nothing_else():
    width, decay, epochs = 16, 10.0, 3
    x, y = torch.randint(V, (2, BATCH, T), generator=seeded())
    ours = train(Memory(), "x", 5, (width, decay, epochs), x, y)
    generator = torch.manual_seed(5)
    model = GPT(shape(width))
    of_blocks = {id(p) for p in model.blocks.parameters() if p.dim() == 2}
    groups = [
        dict(params=[p for p in model.parameters() if (id(p) in of_blocks) == inside])
        for inside in (True, False)
    ]
    groups[0]["weight_decay"], groups[1]["weight_decay"] = decay, 0.0
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    for step in range(epochs):
        for group in groups:
            group["lr"] = lr_at(step, epochs, RATE * 3**0.5)  # 3: 48 / 16
        for group, mine in zip(optimizer.param_groups, groups, strict=True):
            group["lr"] = mine["lr"]
        rows = torch.randint(BATCH, (BATCH,), generator=generator)
        loss = -model(x[rows]).log_softmax(-1).gather(-1, y[rows][..., None]).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    for p, q in zip(ours.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-4)


def test_characters_and_their_one_hot_probabilities_teach_the_same():
    x, y = torch.randint(V, (2, BATCH, T), generator=seeded())
    setting = 16, 0.1, 3
    hard = train(Memory(), "x", 5, setting, x, y)
    soft = train(Memory(), "x", 5, setting, x, torch.nn.functional.one_hot(y, V).float())
    for p, q in zip(hard.parameters(), soft.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("E, A, gamma", [(2.0, 0.5, 1.0), (1.3, 0.2, 0.4), (3.0, 1.5, 2.5)])
def test_the_fit_recovers_an_exact_power_law(E, A, gamma):
    for n in (np.arange(1, 5), np.array([5e3, 17e3, 56e3, 236e3])):
        fit = asymptote(n, E + A * (n[0] / n) ** gamma)
        assert fit == pytest.approx((E, A, gamma), rel=0.02)


def test_the_fit_is_the_least_squares_of_all_gammas():
    n, loss = np.arange(1, 5), np.array([2.4, 2.25, 2.21, 2.17])
    E, A, gamma = asymptote(n, loss)
    error = ((E + A / n**gamma - loss) ** 2).sum()
    for other in np.linspace(0.1, 5, 50):
        z = np.stack([np.ones(4), 1.0 / n**other], 1)
        best = z @ np.linalg.lstsq(z, loss, rcond=None)[0]
        assert error <= ((best - loss) ** 2).sum() + 1e-8


def test_settings_are_chosen_by_one_part_and_told_by_the_other():
    run = Memory()
    for decay, tune, test in ((0.1, [2.0, 1.9], [1.0, 0.9]), (3.0, [2.1, 1.8], [3.0, 2.8])):
        run.log(arm="text", seed=0, width=64, decay=decay, step=8, tune=tune, test=test)
    run.log(arm="text", seed=1, width=64, decay=9.0, step=8, tune=[0.0, 0.0], test=[0.0, 0.0])
    run.log(arm="student", seed=0, step=8, tune=[0.5], test=[0.7])
    assert chosen(run, 0)["decay"] == 0.1
    assert chosen(run, 0, 2)["decay"] == 3.0
    assert chosen(run, 0, decay=3.0)["test"] == [3.0, 2.8]
    assert chosen(run, 0, arm="student")["test"] == [0.7]


def test_a_bend_needs_both_ends_above_and_a_fall_every_step_down():
    falls, rises, bends, flat = [4.0, 3, 2, 1], [1.0, 2, 3, 4], [3.0, 1, 2, 5], [1.0, 1, 1, 1]
    loss = np.array([falls, rises, bends, flat])
    assert bend(loss).tolist() == [0, 0, 2, 0]
    assert rise(loss).tolist() == [-1, 1, 3, 0]


def test_texts_are_apart_and_every_model_has_a_start_of_its_own(short, monkeypatch):
    read, seeds, drawn = set(), {}, []
    stretches = infinite.stretches

    def recorded(rng, docs, B, length):
        drawn.append({i for doc in docs for i in doc.tolist()})
        return stretches(rng, docs, B, length)

    def untrained(run, phase, seed, setting, x, y):
        read.update(x.flatten().tolist())
        if not phase.startswith("student"):
            seeds.setdefault(setting, set()).add(seed)
        torch.manual_seed(seed)
        return GPT(shape(setting[0]))

    monkeypatch.setattr(infinite, "stretches", recorded)
    monkeypatch.setattr(infinite, "train", untrained)
    monkeypatch.setattr(infinite, "generate", lambda m, firsts, **law: Written(firsts, law["n"]))
    run = Memory()
    for seed in (0, 1):
        measure(Config(passages=4), run, seed)
    text, tune, test = drawn[:3]
    assert not text & tune and not text & test and not tune & test
    assert read <= text
    for setting, used in seeds.items():
        assert len(used) == 2 * (MEMBERS if setting[0] == MEMBER else 1)
    assert len(seeds) == 4 * 2 * 2


class Written:
    """A Rollout that repeats its first characters."""

    def __init__(self, firsts, n):
        self.ids = torch.tensor(firsts).repeat_interleave(n, 0).expand(-1, T)


def test_the_larger_rival_has_at_least_four_times_the_parameters_of_a_member():
    assert shape(WIDTHS[-1]).parameters >= 4 * shape(MEMBER).parameters


def test_a_quick_run_writes_all_its_files(tmp_path, short):
    check_quick(SCRIPT, tmp_path)


def test_help_names_every_flag():
    check_help(SCRIPT)


def test_a_mistake_is_one_line(tmp_path):
    check_mistake(SCRIPT, "--passages 1", tmp_path)


def test_an_interrupted_run_goes_on_to_the_bit(tmp_path, short):
    marks = dict(width=MEMBER, decay=4.0), dict(arm="student")
    check_resume(SCRIPT, tmp_path, marks, "--passages", 4, "--seeds", 2)
