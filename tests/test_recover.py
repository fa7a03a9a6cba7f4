"""electives/recover.py, tasks/totals.py: the page, the hand that slips, what the oracle writes."""

import itertools
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from common import Memory, check_help, check_mistake, check_quick, check_resume, known, make, seeded

from electives import recover
from electives.recover import (
    ARMS,
    BACK,
    BLOT,
    EOS,
    LETTERS,
    RETRIES,
    Config,
    act,
    demonstration,
    enough,
    figure,
    imitation_loss,
    intervention,
    lesson,
    shaky_demonstration,
    slipping,
    teach,
)
from engine import generate
from model import GPTConfig
from tasks import totals

PROBLEM = [3, 4, 1, 2]
RIGHT, CROSSED, LEFT = "a3Db4Cc1Dd2A", "a3Db4*<b4Cc1Dd2A", "a3Db4*c1Dd2A"


def page_of(ids):
    return totals.tokenizer.decode(ids).partition("=")[2]


def test_the_docstrings_examples_are_right_and_what_is_near_them_is_wrong():
    for text in (totals.prompt(PROBLEM), RIGHT, CROSSED, LEFT):
        assert f"    {text} " in totals.__doc__
    assert totals.demonstrate(None, PROBLEM) == RIGHT
    assert [totals.reward(PROBLEM, text) for text in (RIGHT, CROSSED, LEFT)] == [1.0] * 3
    wrong = ("", RIGHT[:-3], RIGHT[:-1], RIGHT[:-1] + "B", RIGHT + "<", "<" + RIGHT, RIGHT + "a3D")
    assert not any(totals.reward(PROBLEM, text) for text in wrong)


def test_the_verifier_agrees_with_a_search_of_all_pages():
    problem, right = [3, 4], set()
    edge = [("", ())]
    while edge:  # (text, the letters that stand), by every legal move
        text, stand = edge.pop()
        right |= {text} if len(stand) == 2 and stand[1] == "C" else set()
        moves = [("<", stand[:-1])] * bool(stand)
        if len(stand) < 2:
            name = "a3b4"[2 * len(stand) :][:2]
            moves += [(name + letter, (*stand, letter)) for letter in "CD*"]
        edge += [(text + more, after) for more, after in moves if len(text + more) <= 13]
    parts = ("a3", "b4", "b3", "C", "D", "*", "<", "a3D", "b4C", "b4*")
    tried = {"".join(p) for n in range(6) for p in itertools.product(parts, repeat=n)}
    assert len(right) > 20 and len(right & tried) > 10
    for text in tried | right:
        if len(text) <= 13:
            assert totals.reward(problem, text) == float(text in right), text


@pytest.mark.parametrize(
    "text, page",
    [
        (RIGHT, None),
        (CROSSED, None),
        (LEFT, None),
        ("a3Db4E", "a3Db4E"),
        ("a3Db4Ec1Ad2B", "a3Db4E"),
        ("a3Db4E<b4A", "a3Db4A"),
        ("a3Db4Ec1D<c1A", "a3Db4E"),
        ("a3Db4Ec1Dd2B", "a3Db4Ec1Dd2B"),
        ("a3Db4Eb4C", "a3Db4E"),
        ("b4C", None),
    ],
)
def test_a_mistake_is_the_first_wrong_line_about_which_nothing_is_done(text, page):
    found = totals.mistake(PROBLEM, text)
    assert (found and "".join(found)) == page


def test_the_hand_slips_as_often_as_it_should_and_only_where_a_letter_is_meant():
    p = torch.full((totals.tokenizer.n_vocab,), 0.02)
    p[1] = 1.02 - p.sum()
    model = known(p.tolist())
    with slipping(model, 0.3, forbidden=[BACK]):
        rollout = generate(model, [[0]], 40_000, 1, generator=seeded())
    law = p.clone()
    law[:LETTERS] *= 0.7
    law[BLOT] = 0.3 * p[:LETTERS].sum()
    law[BACK] = 0
    law /= law.sum()
    counts = torch.bincount(rollout.ids[:, 1], minlength=len(p)).double()
    assert counts[BACK] == 0
    seen = law > 0
    chi2 = ((counts - 40_000 * law) ** 2 / (40_000 * law))[seen].sum()
    assert chi2 < 50  # 21 degrees of freedom: 1 in 2,000
    with torch.no_grad():  # the hook is gone
        assert torch.allclose(model(torch.tensor([[0]])).softmax(-1)[0, 0], p, atol=1e-6)


class Author:
    """In place of `generate`: writes what the demonstrations say, slips, and crosses out a wrong
    line as soon as he may.
    """

    def __init__(self, slip):
        self.slip, self.rng, self.may = slip, random.Random(0), True

    def slipping(self, model, slip, forbidden):
        self.may = BACK not in forbidden
        return pytest.MonkeyPatch.context()  # anything that can be entered

    def generate(self, model, prompts, n, new, stop, generator):
        return SimpleNamespace(tokens=lambda: [self.go_on(ids) for ids in prompts])

    def go_on(self, ids):
        text = totals.tokenizer.decode(ids)
        problem = [int(d) for d in text.partition("=")[0][1::2]]
        page, out = page_of(ids), ""
        while len(page + out) < 3 * len(problem):
            i = len(page + out) // 3
            line = totals.line(problem, i)
            slipped = self.rng.random() < self.slip
            out += line[:2] + ("*" if slipped else line[2])
            if slipped and self.may:
                return totals.tokenizer.encode(out + "<")
        return totals.tokenizer.encode(out) + [EOS]


def test_success_of_a_faultless_author_is_the_chance_that_no_more_lines_go_wrong(monkeypatch):
    problems = [totals.draw(random.Random(i)) for i in range(3000)]
    for retries in (0, 1, 3):
        author = Author(slip=0.2)
        monkeypatch.setattr(recover, "generate", author.generate)
        monkeypatch.setattr(recover, "slipping", author.slipping)
        texts, rewards = act(None, problems, 0.2, retries, None)
        crossed = [text.count("<") for text in texts]
        assert max(crossed) == retries
        last = ["".join([*totals.replay(p, t)][-1]) for p, t in zip(problems, texts, strict=True)]
        right = [
            page == totals.demonstrate(None, p) for page, p in zip(last, problems, strict=True)
        ]
        expected = enough(retries, slip=0.2, lines=totals.SIZE)
        assert np.mean(right) == pytest.approx(expected, abs=0.03)
        assert np.mean(rewards) >= np.mean(right)
        if not retries:
            assert expected == pytest.approx(0.8**totals.SIZE)


def test_no_answer_has_more_crossings_out_than_it_may_and_each_takes_a_line_off_the_page():
    p = torch.full((totals.tokenizer.n_vocab,), 1e-9)
    p[BACK], p[:LETTERS] = 0.6, 0.08
    read = []

    def remember(model, prompts, *more, **kwargs):
        read.append([page_of(ids) for ids in prompts])
        return generate(model, prompts, *more, **kwargs)

    problems = [totals.draw(random.Random(i)) for i in range(50)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recover, "generate", remember)
        texts, _ = act(known(p.tolist()), problems, 0.1, 3, seeded())
    assert [text.count("<") for text in texts] == [3] * 50
    for i, text in enumerate(texts):
        page = ""
        for part, pages in zip(text.split("<"), read, strict=False):
            assert pages[i] == page
            page = (page + part)[:-3]


def test_the_oracle_leads_back_to_a_right_page_or_ahead_to_one():
    for i in range(200):
        rng = random.Random(i)
        problem = totals.draw(rng)
        lines = [totals.line(problem, k) for k in range(8)]
        wrong = rng.randrange(8)
        letter = rng.choice("*" + totals.LETTERS.replace(lines[wrong][2], ""))
        page = [*lines[:wrong], lines[wrong][:2] + letter]
        text = "".join(page)
        # it may have gone on
        text += "".join([lines[k][:2] + lines[k - 1][2] for k in range(wrong + 1, 8)][: i % 3])
        if totals.mistake(problem, text) != page:
            continue  # it went on to a right line by chance
        for arm in ("recover", "correct"):
            lessons = intervention(arm, problem, text)
            for ids, weights in lessons:
                assert len(ids) == len(weights) and EOS not in ids
                given = weights.index(1)
                assert weights == [0] * given + [1] * (len(ids) - given)
                shown = page_of(ids)
                reached = [*totals.replay(problem, shown)][-1]
                assert totals.is_right(problem, reached)
                rest = "".join(lines[len(reached) :])
                assert totals.reward(problem, shown + rest) == 1.0
            shown = [page_of(ids) for ids, _ in lessons]
            if arm == "recover" or wrong == 7:
                assert shown == ["".join(page) + "<", "".join(lines[: wrong + 1])]
            else:
                assert shown == ["".join(page) + lines[wrong + 1]]
    assert intervention("recover", PROBLEM, CROSSED) == intervention("correct", PROBLEM, LEFT) == []


def test_a_shaky_demonstration_teaches_the_whole_answer_and_the_way_back_from_every_slip():
    rng, slips = random.Random(0), 0
    for _ in range(2000):
        problem = totals.draw(rng)
        whole, *others = shaky_demonstration(rng, problem, 0.2)
        assert [whole] == demonstration(problem) and whole[1].count(1) == 3 * 8 + 1
        slips += len(others)
        for ids, weights in others:
            text = page_of(ids)
            before, page = [*totals.replay(problem, text)][-2:]
            assert not totals.is_right(problem, before) and totals.is_right(problem, page)
            assert text[-1] == "<" and weights[-4:] == [1, 1, 0, 1] and sum(weights) == 3
    # a line is written until it is right: q / (1 - q) slips each
    assert slips / 16_000 == pytest.approx(0.2 / 0.8, abs=0.015)


@pytest.mark.parametrize("arm", ARMS)
def test_a_round_costs_no_more_than_it_may_and_nearly_that(arm, monkeypatch):
    config = Config(tokens=100)

    def blots(model, problems, slip, retries, generator):
        return [totals.prompt(problem)[:2] + "*" for problem in problems], []

    monkeypatch.setattr(recover, "act", blots)
    lessons = teach(config, arm, None, random.Random(0), None)
    assert 60 < sum(sum(weights) for _, weights in lessons) <= 100


def test_only_the_oracles_tokens_are_learnt_however_long_the_others_are():
    model = make(vocab_size=totals.tokenizer.n_vocab, qk_norm=True)
    one, two = lesson("a3b4=a3D", "b4C"), lesson("a1=", "a1B", end=True)
    loss = imitation_loss(model, [one, two])
    means = []
    for ids, weights in (one, two):
        logp = model(torch.tensor([ids])).log_softmax(-1)[0]
        taught = [logp[t - 1, ids[t]].item() for t in range(len(ids)) if weights[t]]
        means.append(np.mean(taught))
    assert loss.item() == pytest.approx(-np.mean(means), abs=1e-5)


def rows(full, shaky, correct, recover, capped):
    ends = dict(full=full, shaky=shaky, correct=correct, recover=recover)
    run = Memory()
    for seed in range(3):
        for arm, end in ends.items():
            for step, success in enumerate((0.5, end + 0.01 * seed)):
                where = dict(phase="rounds", arm=arm, seed=seed, step=step)
                run.rows.append(dict(where, tokens=100 * step, success=success))
        for step, success in zip(RETRIES, capped, strict=True):
            run.rows.append(dict(phase="retries", seed=seed, step=step, success=success))
    return run


def holding(**numbers):
    _, claims = figure(Config(seeds=3), rows(**numbers))
    return {c["id"] for c in claims if c["holds"]}


def test_every_claim_can_fail():
    all_of = {"full", "shaky", "correct", "steady", "retries"}
    good = dict(full=0.5, shaky=0.6, correct=0.8, recover=0.9, capped=(0.5, 0.6, 0.7, 0.8, 0.9))
    assert holding(**good) == all_of
    for name in ("full", "shaky", "correct"):
        assert holding(**good | {name: 0.9}) == all_of - {name}
    assert holding(**good | dict(capped=(0.5, 0.6, 0.6, 0.8, 0.9))) == all_of - {"steady"}
    assert holding(**good | dict(capped=(0.5, 0.51, 0.52, 0.53, 0.9))) == all_of - {"retries"}


def test_a_quick_run_leaves_a_whole_folder(tmp_path):
    assert check_quick("electives.recover", tmp_path, also=("samples.txt",)) == "recover"


def test_the_help_names_every_flag():
    check_help("electives.recover")


def test_a_slip_above_one_is_a_mistake(tmp_path):
    check_mistake("electives.recover", "--slip 1.5", tmp_path)


def test_a_resumed_run_is_the_run(tmp_path, monkeypatch):
    tokens = totals.tokenizer.n_vocab
    narrow = GPTConfig(tokens, block_size=512, n_layer=1, n_head=2, n_embd=16, tie=False)
    monkeypatch.setattr(recover, "SHAPE", narrow)  # whatever the model can learn
    marks = [dict(phase="rounds", arm="shaky", step=1), dict(phase="retries", step=2)]
    check_resume("electives.recover", tmp_path, marks, "--quick", "--problems", 4)
