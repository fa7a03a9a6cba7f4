"""experiments/weaver.py: Bayes by counting, rates from exact moments, and the command."""

import itertools

import numpy as np
import pytest
from common import check_help, check_mistake, check_quick, check_resume

from experiments.weaver import RULES, SETTINGS, compare, em, posterior, simulate, triplets

SCRIPT = "experiments.weaver"
TPR = np.array([0.8, 0.6, 0.8, 0.6, 0.8])
FPR = np.array([0.2, 0.2, 0.4, 0.4, 0.2])


def population():
    """Votes of five independent judges whose every moment is exact: all combinations of five
    equally likely draws a judge and five of Y, two of which are right -> votes, right.
    """
    grid = np.array(list(itertools.product(range(5), repeat=6)))
    right = grid[:, :1] < 2
    return (grid[:, 1:] < 5 * np.where(right, TPR, FPR) - 1e-9).astype(float), right[:, 0]


def test_the_posterior_is_bayes_by_counting():
    votes, right = population()
    log_odds = posterior(votes, TPR, FPR, 0.4)
    for pattern in itertools.product((0, 1), repeat=5):
        rows = (votes == pattern).all(1)
        assert 1 / (1 + np.exp(-log_odds[rows])) == pytest.approx(right[rows].mean())


def test_triplets_recover_the_rates_from_exact_moments():
    tpr, fpr, prior = triplets(population()[0])
    assert tpr == pytest.approx(TPR) and fpr == pytest.approx(FPR) and prior == pytest.approx(0.4)


def test_em_recovers_the_rates_and_each_round_raises_the_likelihood():
    votes, _ = population()
    tpr, fpr, prior = em(votes, 2000)
    assert tpr == pytest.approx(TPR, abs=2e-3) and fpr == pytest.approx(FPR, abs=2e-3)
    assert prior == pytest.approx(0.4, abs=2e-3)

    def likelihood(rounds):
        tpr, fpr, prior = em(votes, rounds)
        of_right = prior * np.prod(np.where(votes == 1, tpr, 1 - tpr), 1)
        of_wrong = (1 - prior) * np.prod(np.where(votes == 1, fpr, 1 - fpr), 1)
        return np.log(of_right + of_wrong).mean()

    values = [likelihood(rounds) for rounds in range(1, 12)]
    assert values == sorted(values) and values[0] < values[-1]


def test_judges_have_their_rates_and_share_their_noise_only_where_they_should():
    for shared in (False, True):
        right, kinds, votes, tpr, fpr = simulate(np.random.default_rng(0), 4000, shared)
        assert ((kinds == 0) == right).all() and kinds.max() == 5
        yes, no = votes[right], votes[~right]
        assert yes.mean(0) == pytest.approx(tpr, abs=0.01)
        assert no.mean(0) == pytest.approx(fpr, abs=0.01)
        correlation = np.corrcoef(no.T)
        among_four = correlation[:4, :4][~np.eye(4, dtype=bool)]
        assert (among_four.min() > 0.1) if shared else (abs(among_four).max() < 0.02)
        assert abs(correlation[4:, :4]).max() < 0.02


def test_no_rule_without_labels_beats_the_true_rates_by_more_than_chance():
    rows = [compare(200, SETTINGS[0], seed) for seed in range(5)]
    mean = {rule: np.mean([row[rule] for row in rows]) for rule in RULES}
    assert all(mean["true rates"] >= mean[rule] - 0.02 for rule in RULES)
    assert mean["one answer"] < mean["majority"] < mean["true rates"]
    assert mean["one answer"] == pytest.approx(0.375, abs=0.06)  # the mean of Beta(.6, 1)


def test_a_quick_run_writes_all_its_files(tmp_path):
    check_quick(SCRIPT, tmp_path)


def test_help_names_every_flag():
    check_help(SCRIPT)


def test_a_mistake_is_one_line(tmp_path):
    check_mistake(SCRIPT, "--questions 1", tmp_path)


def test_an_interrupted_run_goes_on_to_the_bit(tmp_path):
    marks = dict(seed=0, setting=SETTINGS[1]), dict(seed=1, setting=SETTINGS[0])
    check_resume(SCRIPT, tmp_path, marks, "--seeds", 2, "--questions", 20)
