"""experiments/squarecb.py: the laws, the inequality behind them, the regression, the command."""

import numpy as np
import pytest
from common import check_help, check_mistake, check_quick, check_resume

from experiments.squarecb import epsilon_greedy, inverse_gap, learn, play


def random_gaps(seed, S=1000, A=5):
    rng = np.random.default_rng(seed)
    f = rng.standard_normal((S, A))
    return f, f.max(1, keepdims=True) - f, rng


@pytest.mark.parametrize("gamma", [0.1, 1.0, 10.0, 1000.0])
def test_regret_is_paid_for_by_the_error_of_the_regression(gamma):
    f, gap, rng = random_gaps(0)
    p = inverse_gap(gap, gamma)
    A = f.shape[1]
    # close to the prediction, far from it, and the worst case: the best way is the one seldom taken
    for size in (0.01, 0.3, 3.0):
        true = f + size * rng.standard_normal(f.shape)
        regret = true.max(1) - (p * true).sum(1)
        bound = A / gamma + gamma * (p * (f - true) ** 2).sum(1)
        assert (regret <= bound + 1e-9).all()
    true = f + 0.5 / (gamma * p) * np.eye(A)[p.argmin(1)]
    regret = true.max(1) - (p * true).sum(1)
    assert (regret <= A / gamma + gamma * (p * (f - true) ** 2).sum(1) + 1e-9).all()


def test_ways_behind_are_taken_by_the_inverse_of_their_gap():
    p = inverse_gap(np.array([[0.0, 1.0, 3.0]]), 2.0)
    np.testing.assert_allclose(p, [[1 - 1 / 5 - 1 / 9, 1 / 5, 1 / 9]])
    _, gap, _ = random_gaps(1)
    p = inverse_gap(gap, 7.0)
    np.testing.assert_allclose(p.sum(1), 1)
    assert (p > 0).all() and (p.argmax(1) == gap.argmin(1)).all()


def test_epsilon_greedy_explores_with_epsilon():
    p = epsilon_greedy(np.array([[0.5, 0.0, 3.0]]), 0.3)
    np.testing.assert_allclose(p, [[0.1, 0.8, 0.1]])
    np.testing.assert_allclose(epsilon_greedy(np.array([[0.5, 0.0]]), 0.0), [[0, 1]])


def test_the_regression_is_ridge_regression_on_what_was_taken():
    rng = np.random.default_rng(0)
    S, A, d, T = 2, 3, 4, 25
    inverse = np.tile(np.eye(d), (S, A, 1, 1))
    moment, theta = np.zeros((S, A, d)), np.zeros((S, A, d))
    x, a, reward = rng.standard_normal((T, S, d)), rng.integers(A, size=(T, S)), rng.random((T, S))
    for t in range(T):
        learn(inverse, moment, theta, (np.arange(S), a[t]), x[t], reward[t])
    for s in range(S):
        for way in range(A):
            X = x[a[:, s] == way, s]
            r = reward[a[:, s] == way, s]
            exact = np.linalg.solve(np.eye(d) + X.T @ X, X.T @ r)
            np.testing.assert_allclose(theta[s, way], exact, atol=1e-9)


def test_regret_is_what_is_lost_to_the_best_way_of_each_prompt():
    T, S = 400, 3
    x = np.ones((T, S, 1))
    mean = np.tile([0.2, 0.9], (T, S, 1))
    rng = np.random.default_rng(0)
    uniform = play("epsilon-greedy", 1e9, x, mean, lambda m, a: m, rng)
    np.testing.assert_allclose(uniform[-1], T * 0.35)
    learnt = play("inverse gap", 3.0, x, mean, lambda m, a: m, rng)
    assert (learnt[-1] < 0.3 * uniform[-1]).all()
    assert (np.diff(learnt, axis=0) >= 0).all()
    # never explores: the first way is taken, is good enough, and the better one is never tried
    np.testing.assert_allclose(play("greedy", 0.0, x, mean, lambda m, a: m, rng)[-1], T * 0.7)


def test_quick(tmp_path):
    assert check_quick("experiments.squarecb", tmp_path) == "squarecb"


def test_help():
    check_help("experiments.squarecb")


@pytest.mark.parametrize("flags", ["--size 9", "--steps 1", "--seeds 0"])
def test_a_mistake_is_one_line(flags, tmp_path):
    check_mistake("experiments.squarecb", flags, tmp_path)


def test_resume(tmp_path):
    marks = dict(phase="problem"), dict(phase="linear")
    check_resume("experiments.squarecb", tmp_path, marks, "--quick")
