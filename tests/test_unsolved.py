"""experiments/unsolved.py: laws of votes against enumeration, and the command."""

import itertools
import math
import random

import numpy as np
import pytest
import torch
from common import check_help, check_mistake, check_quick, check_resume

from experiments.unsolved import (
    OWN,
    SAME,
    Networks,
    count,
    judged,
    law_of,
    precisions,
    urn,
)

SCRIPT = "experiments.unsolved"


def beta(a, b):
    return math.exp(math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b))


@pytest.mark.parametrize(("rate", "rho"), [(0.8, 0.1), (0.3, 0.3), (0.3, 0.6)])
def test_the_urn_is_independent_votes_whose_rate_is_drawn_from_a_beta_distribution(rate, rho):
    a, b = rate * (1 / rho - 1), (1 - rate) * (1 / rho - 1)
    m = 9
    law = [math.comb(m, k) * beta(a + k, b + m - k) / beta(a, b) for k in range(m + 1)]
    assert urn(m, rate, rho) == pytest.approx(law)


def test_any_two_votes_of_the_urn_have_its_rate_and_its_correlation():
    for rate, rho in itertools.product((0.1, 0.7), (0, 0.3, 0.9)):
        law = urn(12, rate, rho)
        k = np.arange(13)
        one, two = law @ k / 12, law @ (k * (k - 1)) / (12 * 11)
        assert law.sum() == pytest.approx(1) and one == pytest.approx(rate)
        assert (two - one**2) / (one * (1 - one)) == pytest.approx(rho, abs=1e-12)


def test_the_law_of_unlike_votes_is_that_of_all_their_outcomes():
    chances = np.random.default_rng(0).random((3, 5))
    law = np.zeros(6)
    for outcome in itertools.product((0, 1), repeat=5):
        law[sum(outcome)] += np.where(outcome, chances, 1 - chances).prod(1).mean()
    assert count(chances) == pytest.approx(law)


def test_votes_are_one_of_each_network_or_all_of_one():
    chances = np.array([[0.0, 1.0]])
    assert law_of(chances, 2, again=False) == pytest.approx([0, 1, 0])
    assert law_of(chances, 2, again=True) == pytest.approx([0.5, 0, 0.5])
    assert law_of(chances, 1, again=False) == pytest.approx([1, 0])


def test_precisions_are_those_of_drawn_votes():
    rng = np.random.default_rng(0)
    prior, m = 0.3, 4
    right = rng.random(400_000) < prior
    yes = rng.binomial(m, np.where(right, 0.8, 0.3))
    found = precisions(prior, urn(m, 0.8, 0), urn(m, 0.3, 0))
    assert found["unanimity"] == pytest.approx(right[yes == m].mean(), abs=0.01)
    assert found["majority"] == pytest.approx(right[yes > m / 2].mean(), abs=0.01)
    # unanimity accepts .41 of the right answers; a coin on those with one no makes it a half
    share = (0.5 - 0.8**4) / (4 * 0.8**3 * 0.2)
    passed = (yes == m) | ((yes == m - 1) & (rng.random(len(yes)) < share))
    assert passed[right].mean() == pytest.approx(0.5, abs=0.01)
    assert found["half"] == pytest.approx(right[passed].mean(), abs=0.01)
    # where unanimity accepts more than half, the coin decides on unanimous ones
    one = precisions(prior, urn(1, 0.8, 0), urn(1, 0.3, 0))
    assert one["half"] == pytest.approx(one["unanimity"])


def test_votes_that_carry_no_news_leave_the_share_of_right_answers():
    law = urn(6, 0.4, 0.2)
    assert list(precisions(0.1, law, law).values()) == pytest.approx([0.1] * 3)
    # (nearly) copies of one vote are worth one vote
    one, many = (precisions(0.1, urn(m, 0.8, 1 - 1e-9), urn(m, 0.3, 1 - 1e-9)) for m in (1, 50))
    assert many == pytest.approx(one, abs=1e-6)


def test_an_answers_digits_tell_whether_it_is_right():
    digits, right = judged(random.Random(0), 300)
    x = digits.view(300, 4, 5, 10).argmax(3)  # column: two digits, the carry in, both of the sum
    assert (x[:, :, :3].sum(2) == 10 * x[:, :, 3] + x[:, :, 4]).all()  # nobody adds wrongly
    carries = torch.cat([torch.zeros(300, 1).long(), x[:, :-1, 3]], 1)
    assert ((x[:, :, 2] == carries).all(1) | ~right).all()
    assert right.float().mean() == pytest.approx(0.39, abs=0.1)


def test_networks_side_by_side_are_networks_alone():
    torch.manual_seed(0)
    two, x = Networks(2, 6), torch.randn(1, 5, 6)
    two.bias.data.normal_()
    for i, y in enumerate(two(x)):
        one = Networks(1, 6)
        one.load_state_dict({k: v[i : i + 1] for k, v in two.state_dict().items()})
        assert torch.allclose(one(x)[0], y, atol=1e-6)


def test_a_quick_run_writes_all_its_files(tmp_path):
    check_quick(SCRIPT, tmp_path)


def test_help_names_every_flag():
    check_help(SCRIPT)


def test_a_mistake_is_one_line(tmp_path):
    check_mistake(SCRIPT, "--right 1", tmp_path)


def test_an_interrupted_run_goes_on_to_the_bit(tmp_path):
    marks = dict(arm=SAME, step=4), dict(arm=OWN, step=16)
    check_resume(SCRIPT, tmp_path, marks, "--judged", 20, "--steps", 3, "--seeds", 1)
