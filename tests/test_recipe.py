"""experiments/recipe.py: the teacher's laws, what filters keep, and the command."""

import itertools
import random
from collections import Counter

import matplotlib.pyplot as plt
import pytest
from common import check_help, check_mistake, check_quick, check_resume

from experiments.recipe import ARMS, FILTERS, LONGER, collect, keep, teach
from tasks import addition, held_out

SCRIPT = "experiments.recipe"


def test_a_teacher_without_faults_is_always_right():
    rng = random.Random(0)
    for _ in range(200):
        problem = addition.draw(rng, 3)
        assert addition.reward(problem, teach(rng, problem, 0, 0)) == 1


def test_slips_are_as_frequent_as_they_should_be():
    rng, slip, n = random.Random(0), 0.2, 20_000
    right = 0
    for _ in range(n):
        problem = [(rng.randrange(10), rng.randrange(10)) for _ in range(3)]
        text = teach(rng, problem, slip, 0)
        assert text[11] == text[5] and text[18] == text[12]  # a line takes the carry that stands
        right += addition.reward(problem, text)
    assert right / n == pytest.approx(exact_share_right(slip), abs=0.012)


def exact_share_right(slip):
    """By dynamic programming over the true carry and the carry that stands there."""
    states = {(0, 0): 1.0}
    for _ in range(3):
        after = Counter()
        for (true, stands), share in states.items():
            for x, y in itertools.product(range(10), repeat=2):
                p = share / 100
                ends = (x + y + true) % 10
                carry = (x + y + true) // 10
                if (x + y + stands) % 10 == ends:
                    after[carry, (x + y + stands) // 10] += p * (1 - slip)
                for total in range(20):
                    if total % 10 == ends:
                        after[carry, total // 10] += p * slip / 20
        states = after
    return sum(states.values())


def test_a_habit_forgets_carries_of_one_and_nothing_else():
    rng = random.Random(0)
    problem = [(7, 5), (9, 3), (1, 1)]  # 1 is carried twice: three digits, 2, 3, 3
    answers = Counter(teach(rng, problem, 0, 0.6) for _ in range(20_000))
    share = {text[6::7]: n / 20_000 for text, n in answers.items()}
    # 12; then 9 + 3 and 1 or 0; then 1 + 1 and 1 or 0
    assert share["233"] == pytest.approx(0.16, abs=0.01)
    assert share["223"] == pytest.approx(0.24, abs=0.01)
    assert share["232"] == pytest.approx(0.24, abs=0.01)
    assert share["222"] == pytest.approx(0.36, abs=0.01)
    no_carry = [(1, 2), (3, 4), (5, 1)]
    assert {teach(rng, no_carry, 0, 0.6) for _ in range(50)} == {"a1A2003b3B4007c5C1006"}


def test_filters_keep_what_they_say():
    problem = [(7, 5), (9, 3), (1, 1)]
    right, wrong, other = "a7A5012b9B3113c1C1103", "a7A5012b9B3012c1C1103", "a7A5018b9B3113c1C1103"
    unlike = "a7A5102b9B3113c1C1103"  # another way to the same result
    answers = [wrong, right, unlike, wrong, wrong, other]
    assert keep(problem, answers, "none") == answers
    assert keep(problem, answers, "majority") == [wrong] * 3
    assert keep(problem, answers, "verified") == [right, unlike]
    assert keep(problem, [right, unlike, wrong], "majority") == [right, unlike]
    assert keep(problem, [wrong, right], "majority") == [wrong]  # a tie: the first
    assert keep(problem, [wrong], "majority") == [wrong]
    assert keep(problem, [wrong], "verified") == []


@pytest.mark.parametrize("arm", ARMS, ids=str)
def test_all_arms_have_the_same_number_of_tokens(arm):
    teacher, n, rule = arm
    pairs, about = collect(random.Random(0), *arm, rows=320)
    assert len(pairs) == 320 and {len(p + a) for p, a in pairs} == {13 + 21}
    assert all(len(text) == 21 for _, text in pairs)
    most = max(Counter(prompt for prompt, _ in pairs).values())
    assert most <= n and about["questions"] >= 320 / n
    if rule in ("none", LONGER):
        assert about["drawn"] == 320 and about["questions"] == 320 // n
        assert about["right"] == pytest.approx(0.5, abs=0.13)
    if rule == "verified":
        assert about["right"] == 1 and about["drawn"] > 320
    if rule == "majority":
        assert about["drawn"] > 320
    assert rule in (*FILTERS, LONGER) and teacher in ("slips", "habit")


def test_no_question_is_held_out():
    pairs, _ = collect(random.Random(0), "slips", 4, "verified", rows=320)
    assert not any(held_out(prompt) for prompt, _ in pairs)


def test_a_quick_run_writes_all_its_files(tmp_path):
    check_quick(SCRIPT, tmp_path, also=("samples.txt",))


def test_help_names_every_flag():
    check_help(SCRIPT)


def test_a_mistake_is_one_line(tmp_path):
    check_mistake(SCRIPT, "--steps 0", tmp_path)


def test_an_interrupted_run_goes_on_to_the_bit(tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.recipe.ARMS", ARMS[-3:])
    monkeypatch.setattr("experiments.recipe.figure", lambda config, run: (plt.figure(), []))
    marks = dict(filter="majority", seed=0), dict(filter="verified", seed=0)
    check_resume(SCRIPT, tmp_path, marks, "--seeds", 1, "--steps", 1, "--problems", 3)
