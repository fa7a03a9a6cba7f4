"""Reflection's bookkeeping, with a model whose every answer is known."""

import random

import numpy as np
import pytest
import torch
from common import check_help, check_mistake, check_quick, check_resume

from experiment import Flags, Run
from experiments import reflect
from tasks import addition

SCRIPT = "experiments.reflect"
PROBLEMS = [[(1, 6), (3, 7)], [(5, 5), (2, 2)], [(0, 1), (4, 4)]]
CONFIG = reflect.Config(size=2, problems=3)


def done_rightly(problem):
    carry, text = 0, ""
    for c, (x, y) in zip("ab", problem, strict=True):
        text += f"{c}{x}{c.upper()}{y}{carry}{x + y + carry:02d}"
        carry = (x + y + carry) // 10
    return text


def test_a_transcript_ends_when_an_attempt_is_right_and_each_is_marked_as_it_deserves():
    rng = random.Random(0)
    counts = []
    for _ in range(300):
        problem = addition.draw(rng, 3)
        text = reflect.transcript(rng, problem)
        attempts = text.replace("!", "?").split("?")[:-1]
        marks = [c for c in text if c in "!?"]
        right = [addition.reward(problem, attempt) for attempt in attempts]
        assert [m == "!" for m in marks] == [y == 1 for y in right]
        assert "!" not in marks[:-1] and len(marks) <= reflect.ATTEMPTS
        assert marks[-1] == "!" or len(marks) == reflect.ATTEMPTS
        counts.append(len(marks))
    assert set(counts) == {1, 2, 3, 4}


def scripted(monkeypatch, plan):
    """attempt() answers problem i for the k-th time as plan[i][k] says: right?, own verdict."""
    asked = []

    def attempt(model, texts, config, generator, n=1):
        answers, verdicts, lengths = [], [], []
        for text in texts:
            i = next(j for j, p in enumerate(PROBLEMS) if text.startswith(addition.prompt(p)))
            k = text.count("!") + text.count("?")
            right, verdict = plan[i][k]
            asked.append((i, k, text))
            answer = done_rightly(PROBLEMS[i])
            answers.append(answer if right else answer[:-1] + "x")
            verdicts.append(verdict)
            lengths.append(10 * (k + 1))
        return answers, verdicts, np.array(lengths)

    monkeypatch.setattr(reflect, "attempt", attempt)
    return asked


def test_the_last_answer_counts_and_what_is_accepted_gets_no_further_one(monkeypatch):
    plan = [
        [(True, "?"), (False, "?"), (True, "!")],  # right at first, doubted, and right again
        [(False, "!")],  # wrong and accepted
        [(False, "?"), (True, "!")],
    ]
    asked = scripted(monkeypatch, plan)
    accuracy, tokens, judged, ends = reflect.reflect(None, PROBLEMS, CONFIG, None, outside=False)
    assert accuracy == pytest.approx([1 / 3, 1 / 3, 2 / 3, 2 / 3])
    assert tokens == pytest.approx([10, (30 + 10 + 30) / 3, 100 / 3, 100 / 3])
    assert len(judged) == len(asked) == 6
    assert judged[judged[:, 0] == 1, 1].tolist() == [False, True, True]
    assert judged[judged[:, 0] == 0, 1].sum() == 1
    assert [right for _, right in ends] == [1, 0, 1]
    # each attempt has read all before it, with the verdicts that it got
    right = done_rightly(PROBLEMS[0])
    assert asked[-1][2] == addition.prompt(PROBLEMS[0]) + f"{right}?{right[:-1]}x?"


def test_a_test_from_outside_replaces_the_verdict_and_not_the_answer(monkeypatch):
    plan = [
        [(True, "?")],
        [(False, "!"), (True, "?")],
        [(False, "!")] * 4,
    ]
    asked = scripted(monkeypatch, plan)
    accuracy, tokens, _, ends = reflect.reflect(None, PROBLEMS, CONFIG, None, outside=True)
    assert accuracy == pytest.approx([1 / 3, 2 / 3, 2 / 3, 2 / 3])
    assert [text[-1] for text, _ in ends] == ["!", "!", "?"] and len(asked) == 1 + 2 + 4
    assert tokens[-1] == pytest.approx((10 + 30 + 100) / 3)


def test_votes_count_equal_answers_and_cost_as_many_tokens_as_they_have(monkeypatch):
    right = [done_rightly(p) for p in PROBLEMS]
    wrong = [text[:-1] + "9" if text[-1] != "9" else text[:-1] + "0" for text in right]
    odd = [text[:-1] + "7" if text[-1] != "7" else text[:-1] + "1" for text in right]
    eight = [
        [odd[0], wrong[0], right[0], right[0], right[0], wrong[0], wrong[0], wrong[0]],
        [right[1]] * 8,
        [wrong[2], wrong[2], right[2], right[2], right[2], wrong[2], right[2], right[2]],
    ]

    def attempt(model, texts, config, generator, n=1):
        assert n == 8 and texts == [addition.prompt(p) for p in PROBLEMS]
        return sum(eight, []), ["!"] * 24, np.arange(24) % 2 * 2 + 14

    monkeypatch.setattr(reflect, "attempt", attempt)
    accuracy, tokens = reflect.vote(None, PROBLEMS, CONFIG, None)
    # 1, 2: the first; 3: right has 1 of 3; 4: 2 of 4; 6: 3 of 6; 8: 3 of 8 against 4
    assert accuracy == pytest.approx([1 / 3, 1 / 3, 1 / 3, 2 / 3, 2 / 3, 2 / 3])
    assert tokens == pytest.approx([15, 30, 45, 60, 90, 120])


def test_an_attempt_ends_with_its_verdict_which_is_no_part_of_it():
    torch.manual_seed(0)
    model = reflect.build("cpu")
    generator = torch.Generator().manual_seed(0)
    texts = [addition.prompt(p) for p in PROBLEMS]
    answers, verdicts, lengths = reflect.attempt(model, texts, CONFIG, generator, n=40)
    assert len(answers) == len(verdicts) == len(lengths) == 120
    assert not any(c in "!?" for answer in answers for c in answer)
    assert {"!", "?"} <= set(verdicts)
    for answer, verdict, length in zip(answers, verdicts, lengths, strict=True):
        if verdict in ("!", "?"):
            assert length == len(answer) + 1


def test_reflection_is_compared_with_a_vote_on_as_many_tokens(tmp_path):
    row = {
        "vote": [0.4, 0.4, 0.5, 0.6, 0.7, 0.8],
        "vote tokens": [10.0, 20.0, 30.0, 40.0, 60.0, 80.0],
        "own": [0.4, 0.42, 0.44, 0.46],
        "own tokens": [11.0, 15.0, 20.0, 25.0],
        "outside": [0.4, 0.6, 0.7, 0.9],
        "outside tokens": [11.0, 25.0, 30.0, 50.0],
        "accepts right": 0.7,
        "accepts wrong": 0.5,
    }
    with Run(Flags(out=str(tmp_path))) as run:
        run.log(phase="reflect", seed=0, step=1, **row)
        _, claims = reflect.figure(reflect.Config(seeds=1), run)
    ours = {c["id"]: float(c["ours"]) for c in claims}
    assert ours == pytest.approx(
        {"outside 2": 0.15, "outside": 0.25, "own": -0.01, "most": 0.34}, abs=1e-6
    )
    assert {c["id"]: c["holds"] for c in claims}["own"] is False


def test_the_run_writes_all_it_promises(tmp_path):
    check_quick(SCRIPT, tmp_path, also=("samples.txt",))


def test_help_and_a_mistake(tmp_path):
    check_help(SCRIPT)
    check_mistake(SCRIPT, "--problems 2", tmp_path)


def test_a_resumed_run_is_the_whole_one_to_the_bit(tmp_path):
    marks = {"phase": "sft", "step": 0}, {"phase": "sft", "step": 4}
    check_resume(SCRIPT, tmp_path, marks, "--quick")
