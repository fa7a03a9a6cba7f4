"""electives/bestofn.py: the rules against enumeration and brute force, their laws by chi-squared,
the table, the reward model, and the command.
"""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from common import check_help, check_mistake, check_quick, check_resume, make, seeded

from electives import bestofn
from electives.bestofn import (
    Config,
    RewardModel,
    best_of_n,
    best_of_n_law,
    draw_table,
    final_answer,
    majority,
    make_table,
    outcome,
    pessimism,
    pessimistic_law,
    soft_best_of_n,
    threshold,
    tune,
    weights,
)
from engine import Rollout

SCRIPT = "electives.bestofn"
P = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
SCORES = torch.tensor([0.1, 0.6, 0.6, 1.0], dtype=torch.float64)  # two are equal


def likely(counts, law):
    """Whether counts of independent draws may well come from a law: chi-squared, 5 sigma."""
    expected = counts.sum() * law
    assert not counts[law == 0].any()
    seen = law > 0
    statistic = ((counts - expected)[seen] ** 2 / expected[seen]).sum().item()
    freedom = int(seen.sum()) - 1
    return statistic < freedom + 5 * (2 * freedom) ** 0.5


def drawn(R, N, seed=0):
    """R times N draws of P -> which outcomes (R, N)."""
    return torch.multinomial(P, R * N, True, generator=seeded(seed)).view(R, N)


def bisected(scores, beta, p):
    low, high = scores.min() - beta, scores.max()
    for _ in range(200):
        a = (low + high) / 2
        too_low = (p * (scores - a).clamp_min(0)).sum() / beta > 1
        low, high = (a, high) if too_low else (low, a)
    return a


# --------------------------------------------------------------------------------------------------
# The rules


@pytest.mark.parametrize("beta", (1e-3, 0.05, 0.7, 20.0))
def test_the_threshold_is_that_of_bisection_and_makes_the_mean_weight_one(beta):
    scores = torch.randn(8, 40, generator=seeded(), dtype=torch.float64)
    scores[:, 5] = scores[:, 9]  # a tie
    p = torch.rand(8, 40, generator=seeded(1), dtype=torch.float64)
    p /= p.sum(1, keepdim=True)
    uniform = torch.full_like(p, 1 / 40)
    for law, a in ((p, threshold(scores, beta, p)), (uniform, threshold(scores, beta))):
        expected = torch.stack([bisected(s, beta, q) for s, q in zip(scores, law, strict=True)])
        assert a.tolist() == pytest.approx(expected.tolist(), abs=1e-9)
        assert (law * weights(scores, a, beta)).sum(1).tolist() == pytest.approx([1.0] * 8)


def test_the_pessimistic_law_beats_every_other_law_at_its_own_aim():
    beta, rng = 0.3, np.random.default_rng(0)
    p, s = P.numpy(), SCORES.numpy()

    def aim(q):
        return q @ s - beta / 2 * (q**2 / p).sum()

    best = pessimistic_law(P, SCORES, beta).numpy()
    assert best.sum() == pytest.approx(1) and (best >= 0).all()
    for _ in range(3000):
        # far away, and close by
        other = rng.dirichlet(np.ones(4))
        assert aim(other) < aim(best) and aim(0.99 * best + 0.01 * other) <= aim(best) + 1e-12


def test_no_answer_becomes_more_than_w_times_as_likely():
    a = threshold(SCORES[None], 0.3, P[None])
    largest = (1.0 - a.item()) / 0.3
    ratio = pessimistic_law(P, SCORES, 0.3) / P
    assert ratio.max().item() == pytest.approx(largest)
    # a smaller beta allows more
    assert (pessimistic_law(P, SCORES, 0.03) / P).max() > ratio.max()


@pytest.mark.parametrize("N", (1, 2, 3, 5))
def test_best_of_n_law_is_that_of_enumeration(N):
    law = torch.zeros(4, dtype=torch.float64)
    for ys in itertools.product(range(4), repeat=N):
        law[ys[best_of_n(SCORES[list(ys)][None]).item()]] += P[list(ys)].prod()
    assert best_of_n_law(P, SCORES, N).tolist() == pytest.approx(law.tolist())


@pytest.mark.parametrize("N", (2, 5, 6))
def test_pessimism_draws_from_the_law_of_enumeration(N):
    """Over the first half, which makes the threshold, and the tries of the other half, exactly."""
    beta, top = 0.15, 1.2
    law = torch.zeros(4, dtype=torch.float64)
    for ys in itertools.product(range(4), repeat=N // 2):
        a = threshold(SCORES[list(ys)][None], beta)
        accept = weights(SCORES[None], a, beta)[0] / ((top - a.item()) / beta)
        tries = N - N // 2 - 1  # the last draw is not judged
        once = (P * accept).sum().item()
        reached = sum((1 - once) ** k for k in range(tries))
        mixture = P * accept * reached + P * (1 - once) ** tries
        law += P[list(ys)].prod() * mixture
    assert law.sum().item() == pytest.approx(1)
    ys = drawn(40_000, N)
    kept = pessimism(SCORES[ys], beta, top, seeded(5))
    assert (kept >= N // 2).all() and (kept < N).all()
    counts = torch.bincount(ys.gather(1, kept[:, None]).squeeze(1), minlength=4)
    assert likely(counts, law)
    # the test can tell the law from its neighbours
    assert not likely(counts, best_of_n_law(P, SCORES, N))
    assert N == 2 or not likely(counts, P)


def test_with_many_draws_pessimism_draws_from_the_pessimistic_law():
    ys = drawn(3000, 600)
    kept = pessimism(SCORES[ys], 0.3, 1.0, seeded(5))
    counts = torch.bincount(ys.gather(1, kept[:, None]).squeeze(1), minlength=4)
    assert likely(counts, pessimistic_law(P, SCORES, 0.3))


def test_soft_best_of_n_is_between_the_base_and_the_best():
    scores = torch.tensor([[0.0, 0.5, 1.0, 0.5]]).repeat(20_000, 1)
    law = (scores[0] / 0.4).softmax(0).double()
    counts = torch.bincount(soft_best_of_n(scores, 0.4, seeded()), minlength=4)
    assert likely(counts, law) and not likely(counts, (scores[0] / 0.3).softmax(0).double())
    assert (soft_best_of_n(scores, 1e-3, seeded()) == best_of_n(scores)).all()
    hot = torch.bincount(soft_best_of_n(scores, 1e6, seeded()), minlength=4)
    assert likely(hot, torch.full((4,), 0.25, dtype=torch.float64))


def test_majority_is_the_first_of_the_most_frequent():
    kinds = torch.randint(5, (200, 9), generator=seeded())
    for row, kept in zip(kinds.tolist(), majority(kinds).tolist(), strict=True):
        counts = Counter(row)
        most = max(counts.values())
        assert kept == next(i for i, kind in enumerate(row) if counts[kind] == most)


# --------------------------------------------------------------------------------------------------
# The table


def test_the_tables_bad_answers_are_rare_and_score_above_all_others():
    p, score, reward = make_table(0)
    bad = score > 1
    assert 0.0015 < p[bad].sum() < 0.002 and p.sum().item() == pytest.approx(1)
    assert (reward[bad] == 0.05).all() and score[bad].max() <= bestofn.TOP
    assert score[~bad].max() <= 1 and reward.min() >= 0 and reward.max() <= 1


def test_the_rules_on_the_table_get_what_their_exact_laws_say(monkeypatch):
    monkeypatch.setattr(bestofn, "LARGEST", 1024)
    p, score, reward = make_table(3)
    draws = draw_table(Config(runs=1500), 3)
    for N in (1, 4, 64, 512):
        exact = (best_of_n_law(p, score, N) @ reward).item()
        assert outcome("best-of-n", draws, N, {})[0] == pytest.approx(exact, abs=0.03)
    exact = (pessimistic_law(p, score, 0.05) @ reward).item()
    knobs = dict(beta=0.05, top=bestofn.TOP)
    assert outcome("pessimism", draws, 1024, knobs)[0] == pytest.approx(exact, abs=0.03)


def test_tuning_takes_the_best_of_each_grid_at_all_draws():
    scores = torch.rand(300, 32, generator=seeded(), dtype=torch.float64)
    rewards = (scores > 0.6) & (scores < 0.97)  # the largest are bad
    draws = scores, rewards.double(), None
    found = tune(draws, 1.0)
    for rule, knob, grid in (
        ("pessimism", "beta", bestofn.BETAS),
        ("soft best-of-n", "temperature", bestofn.TEMPERATURES),
    ):
        reached = [outcome(rule, draws, 32, {knob: x, "top": 1.0})[0] for x in grid]
        assert outcome(rule, draws, 32, found)[0] == max(reached)
        assert max(reached) > outcome("best-of-n", draws, 32, {})[0]


# --------------------------------------------------------------------------------------------------
# The GPT


def test_a_score_is_read_off_the_last_token_and_padding_changes_nothing():
    model = RewardModel(make()).requires_grad_(False)
    ids = torch.randint(11, (3, 12), generator=seeded())
    lengths = torch.tensor([4, 7, 2])
    mask = torch.zeros(3, 12)
    for row, n in zip(mask, lengths.tolist(), strict=True):
        row[5 : 5 + n] = 1
    rollout = Rollout(ids, mask, mask, torch.full((3,), 5))
    scores = model(rollout)
    other = Rollout(
        torch.where(mask.bool() | (torch.arange(12) < 5), ids, 3), mask, mask, rollout.prompt_lens
    )
    assert torch.equal(model(other), scores)
    for i, n in enumerate(lengths.tolist()):
        alone = model.body.hidden(ids[i : i + 1, : 5 + n])[0, -1]
        assert scores[i].item() == pytest.approx(model.head(alone).item(), abs=1e-5)


def test_the_final_answer_is_the_last_digit_of_each_column():
    assert final_answer("a1A6007b3B7010c8C3112") == "a7b0c2"
    assert final_answer("b3B7011a1A6007b3B7010") == "a7b0"
    assert final_answer("b3B7010a1A6007") == final_answer("a1A6007b3B7010")


# --------------------------------------------------------------------------------------------------
# The command


def test_a_quick_run_writes_all_its_files(tmp_path):
    check_quick(SCRIPT, tmp_path, also=("samples.txt",))


def test_help_names_every_flag():
    check_help(SCRIPT)


@pytest.mark.parametrize("flags", ("--draws 1", "--temperature 0", "--runs none"))
def test_a_mistake_is_one_line(flags, tmp_path):
    check_mistake(SCRIPT, flags, tmp_path)


def test_an_interrupted_run_goes_on_to_the_bit(tmp_path):
    marks = dict(phase="rules", world="table", step=4), dict(phase="reward model", step=2)
    check_resume(SCRIPT, tmp_path, marks, "--quick")
