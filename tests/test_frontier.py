"""experiments/frontier.py: the frontier against enumeration, the measured KL against the exact one,
and the command.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from common import check_help, check_mistake, check_quick, check_resume, make, seeded

from engine import generate
from experiments.frontier import (
    Config,
    bernoulli_kl,
    best_of_n,
    break_even,
    policy_kl,
    tilted,
)

SCRIPT = "experiments.frontier"


def kl(q, p):
    return float((q * np.log(q / p)).sum())


@pytest.mark.parametrize("n", (1, 2, 3, 6))
def test_the_best_of_n_is_on_the_frontier_and_below_log_n(n):
    """Its law, by enumeration: any right one of n draws of five outcomes, two of them right."""
    p = np.array([0.05, 0.15, 0.4, 0.3, 0.1])
    law = np.zeros(5)
    for ys in itertools.product(range(5), repeat=n):
        right = [y for y in ys if y < 2] or list(ys)
        for y in right:
            law[y] += np.prod(p[list(ys)]) / len(right)
    q = law[:2].sum()
    assert q == pytest.approx(best_of_n(0.2, n))
    assert kl(law, p) == pytest.approx(bernoulli_kl(q, 0.2))
    assert kl(law, p) <= math.log(n) - (n - 1) / n + 1e-12


def test_no_law_with_that_accuracy_is_nearer_to_the_base():
    rng = np.random.default_rng(0)
    p = np.array([0.05, 0.15, 0.4, 0.3, 0.1])
    for _ in range(500):
        q = rng.dirichlet(np.ones(5))
        assert kl(q, p) >= bernoulli_kl(q[:2].sum(), 0.2) - 1e-12


@pytest.mark.parametrize("beta", (0.1, 0.5, 2.0))
def test_the_tilted_accuracy_is_the_best_for_reward_minus_beta_kl(beta):
    q = np.linspace(1e-6, 1 - 1e-6, 200_001)
    best = q[(q - beta * bernoulli_kl(q, 0.2)).argmax()]
    assert tilted(0.2, beta) == pytest.approx(best, abs=1e-4)


def test_the_measured_kl_is_that_of_enumeration():
    model, base = make(0), make(1)
    ids = torch.tensor([[3, *ys] for ys in itertools.product(range(11), repeat=2)])  # all answers

    def logp(gpt):
        steps = gpt(ids[:, :-1]).log_softmax(-1).gather(2, ids[:, 1:, None])
        return steps.sum((1, 2)).double()

    exact = (logp(model).exp() * (logp(model) - logp(base))).sum().item()
    rollout = generate(model, [[3]], 6000, 2, generator=seeded())
    assert policy_kl(model, base, rollout, Config()) == pytest.approx(exact, rel=0.05)
    assert policy_kl(model, model, rollout, Config()) == 0


def test_break_even_is_training_over_what_the_draws_cost():
    p = np.array([0.1, 0.3])
    n, questions = break_even(p, best_of_n(p, 5), dict(sampled=8000, tokens=20.0))
    assert n == 5 and questions == 8000 / (4 * 20)


def test_a_quick_run_writes_all_its_files(tmp_path):
    check_quick(SCRIPT, tmp_path, "--eval-prompts", 1, also=("samples.txt",))


def test_help_names_every_flag():
    check_help(SCRIPT)


@pytest.mark.parametrize("flags", ("--draws 10", "--beta 1"))
def test_a_mistake_is_one_line(flags, tmp_path):
    check_mistake(SCRIPT, flags, tmp_path)


def test_an_interrupted_run_goes_on_to_the_bit(tmp_path):
    marks = dict(phase="best-of-n"), dict(phase="policy", beta=0.5)
    check_resume(SCRIPT, tmp_path, marks, "--quick", "--eval-prompts", 1)
