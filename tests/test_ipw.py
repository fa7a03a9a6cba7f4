"""What answers are worth and cost, against counting by hand."""

import numpy as np
import pytest
import torch
from common import Memory, check_help, check_mistake, check_quick, check_resume

from experiments import ipw
from tasks import totals

SCRIPT = "experiments.ipw"


def test_n_answers_hold_a_right_one_in_as_many_groups_as_there_are():
    right = np.array([[0, 0, 1, 0], [0, 0, 0, 0], [1, 1, 0, 1]], bool)
    assert ipw.found(right, 1) == pytest.approx(4 / 12)
    assert ipw.found(right, 2) == pytest.approx(3 / 6)
    assert ipw.found(right, 4) == pytest.approx(2 / 3)


def test_a_vote_takes_the_first_of_the_most_frequent_totals():
    finals = np.array([list("ABBC"), list("ABCA")])
    right = finals == np.array([["B"], ["C"]])
    assert ipw.voted(right, finals, 1) == pytest.approx(3 / 8)
    # A of AB (a tie), B of BC; A of AB, C of CA
    assert ipw.voted(right, finals, 2) == pytest.approx(2 / 4)
    assert ipw.voted(right, finals, 4) == pytest.approx(1 / 2)


def test_a_question_is_read_once_whatever_the_number_of_answers(monkeypatch):
    torch.manual_seed(0)
    model = ipw.build(24, "cpu")
    monkeypatch.setattr(totals.tokenizer, "stop", [])  # answers of equal length
    config = ipw.Config(questions=4, samples=8)
    row = ipw.measure(config, model, seed=0)
    shape, T = model.config, 2 * totals.SIZE + 1
    head = 2 * shape.n_embd * shape.vocab_size
    reading = shape.flops(1, T, T) + head
    new = totals.budget(totals.SIZE)
    steps = sum(shape.flops(1, 1, T + i) + head for i in range(1, new))
    expected = [reading + n * steps for n in config.ns]
    assert ipw.prices(config, row) == pytest.approx(expected, rel=1e-9)
    assert row["greedy_flops"] == pytest.approx(reading + steps)


def rows_of(*plan):
    """Rows of widths, each (greedy, greedy_flops, verifier, vote); a question costs 10 to read."""
    run = Memory()
    run.rows = [
        dict(
            width=width,
            seed=0,
            step=1,
            greedy=greedy,
            greedy_flops=flops,
            flops=(10 + 4 * (flops - 10)) / 4,
            verifier=verifier,
            vote=vote,
        )
        for width, (greedy, flops, verifier, vote) in zip(ipw.WIDTHS, plan, strict=True)
    ]
    return run


def test_the_best_buy_is_the_cheapest_of_all_that_reach_the_target():
    config = ipw.Config(seeds=1, samples=4)
    never = [0.0, 0.1, 0.2]
    run = rows_of(
        (0.2, 20.0, [0.5, 0.7, 0.9], never),  # three doublings: 10 + 4 * 10 = 50
        (0.95, 40.0, never, never),
        (0.3, 70.0, never, [0.8, 1.0, 0.5]),  # between 70 and 130, along the logarithm
        (0.5, 90.0, never, never),
        (1.0, 100.0, never, never),
    )
    assert ipw.prices(config, run.rows[0]) == pytest.approx([20, 30, 50])
    assert ipw.best_buy(config, run, "greedy") == pytest.approx([0.4])
    assert ipw.best_buy(config, run, "verifier") == pytest.approx([0.5])
    assert ipw.best_buy(config, run, "vote") == pytest.approx([np.sqrt(70 * 130) / 100])
    _, claims = ipw.figure(config, run)
    ours = {c["id"]: (float(c["ours"]), c["holds"]) for c in claims}
    assert ours["small"] == (0.4, True) and ours["verifier buy"] == (1.25, False)
    assert ours["verifier again"] == (0.4, True) and ours["vote again"] == (0.2, False)


def test_a_target_that_nobody_reaches_has_no_price():
    config = ipw.Config(seeds=1, samples=4)
    run = rows_of(*[(0.1, 20.0, [0.1, 0.2, 0.3], [0.1, 0.1, 0.1])] * 5)
    assert ipw.best_buy(config, run, "verifier") == pytest.approx([np.inf])


def test_the_run_writes_all_it_promises(tmp_path):
    check_quick(SCRIPT, tmp_path, also=("samples.txt",))


def test_help_and_a_mistake(tmp_path):
    check_help(SCRIPT)
    check_mistake(SCRIPT, "--samples 1", tmp_path)
    check_mistake(SCRIPT, "--samples 12", tmp_path)


def test_a_resumed_run_is_the_whole_one_to_the_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(ipw, "WIDTHS", (24, 28))
    marks = {"width": 24}, {"phase": "sft", "seed": "28 0", "step": 4}
    check_resume(SCRIPT, tmp_path, marks, "--quick")
