"""Soft prompts, prefixes and the search for words against what they must equal."""

import itertools
import random

import numpy as np
import pytest
import torch
from common import check_help, check_mistake, check_quick, check_resume

from electives import prompt
from electives.prompt import (
    Prefix,
    SoftPrompt,
    accuracy,
    answer_loss,
    examples,
    function_of,
    learner_of,
    search,
    write,
)
from experiment import Flags, Run
from tasks import orders

SCRIPT = "electives.prompt"


@pytest.fixture
def base():
    torch.manual_seed(0)
    model = prompt.build("cpu")
    for p in model.parameters():
        p.data += 0.2 * torch.randn_like(p)  # attention that prefers something
    return model.requires_grad_(False)


IDS = prompt.encode([("abcde=", "edcba"), ("hhaag=", "gaahh")], "cpu")


def tokens(text):
    return torch.tensor(orders.tokenizer.encode(text))


def test_a_soft_prompt_of_the_vocabularys_rows_is_the_prompt(base):
    words = tokens("RaN=")
    soft = SoftPrompt(base, base.wte.weight[words])
    plain = base(torch.cat((words.expand(2, 4), IDS), dim=1))[:, 4:]
    torch.testing.assert_close(soft(IDS), plain)


def test_a_prefix_of_some_words_is_those_words_as_a_prompt(base):
    words = tokens("RaN=")
    plain = base(torch.cat((words.expand(2, 4), IDS), dim=1))[:, 4:]
    torch.testing.assert_close(Prefix(base, words)(IDS), plain, atol=1e-5, rtol=1e-4)


def test_only_the_prompt_is_trained_and_its_gradient_is_that_of_finite_differences(base):
    base = base.double()
    for learner, size in (
        (learner_of(base, "soft", 2, 0), 2 * 64),
        (learner_of(base, "prefix", 2, 0), 3 * 2 * 2 * 64),
    ):
        (p,) = learner.parameters()
        assert p.numel() == size
        answer_loss(learner(IDS), IDS).backward()
        assert all(weight.grad is None for weight in base.parameters())
        direction = torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            ends = []
            for step in (1e-4, -1e-4):
                p += step * direction
                ends.append(answer_loss(learner(IDS), IDS))
                p -= step * direction
        slope = (ends[0] - ends[1]) / 2e-4
        torch.testing.assert_close((p.grad * direction).sum(), slope, rtol=1e-4, atol=1e-7)


def test_all_weights_are_trained_of_a_copy(base):
    learner = learner_of(base, "full", 0, 0)
    assert sum(p.numel() for p in learner.parameters() if p.requires_grad) == 144160
    with torch.no_grad():
        learner.wte.weight += 1
    assert not torch.equal(learner.wte.weight, base.wte.weight)


def test_a_prompt_that_begins_as_words_has_rows_of_words_and_else_rows_as_large(base):
    words = learner_of(base, "soft", 8, 3).rows
    table = base.wte.weight
    assert all((row == table[: len(orders.WORDS)]).all(1).any() for row in words)
    noise = learner_of(base, "soft", 8, 3, words=False).rows
    assert not any((row == table).all(1).any() for row in noise)
    assert 0.8 < noise.std() / table.std() < 1.2


def test_search_finds_the_least_loss_of_all_prompts_of_one_and_two_tokens(base):
    losses = {}
    V = base.config.vocab_size
    for k in (1, 2):
        for p in itertools.product(range(V), repeat=k):
            ids = torch.cat((torch.tensor(p).expand(2, k), IDS), dim=1)
            losses[p] = answer_loss(base(ids), ids).item()
    assert tuple(search(base, IDS)) == min(losses, key=losses.get)


def test_the_loss_and_the_accuracy_are_of_the_five_letters_of_the_answer():
    logits = torch.zeros(2, 11, 18)
    for i, row in enumerate(IDS):
        logits[i, range(5, 10), row[6:]] = 1.0
    logits[:, :5] = torch.randn(2, 5, 18)  # what comes before is no answer
    logits[:, 10] = torch.randn(2, 18)
    assert accuracy(logits, IDS) == 1
    expected = np.log(17 + np.e) - 1
    assert answer_loss(logits, IDS).item() == pytest.approx(expected, rel=1e-5)
    logits[0, 7] = 0
    logits[0, 7, 3] = 9  # one letter of one answer
    assert accuracy(logits, IDS) == 0.5


def test_greedy_writing_and_accuracy_agree(base):
    soft = learner_of(base, "soft", 2, 0)
    for text in ("abcde", "gfahc", "ddbca", "hagfe"):
        written = write(soft, text, "cpu")
        if len(written) == orders.SIZE:  # an end within decodes to nothing
            ids = prompt.encode([(f"{text}=", written)], "cpu")
            assert accuracy(soft(ids), ids) == 1
            other = "R" if written[2] != "R" else "S"
            ids = prompt.encode([(f"{text}=", written[:2] + other + written[3:])], "cpu")
            assert accuracy(soft(ids), ids) == 0
            return
    raise AssertionError("nothing was compared")


@pytest.mark.parametrize(
    "word, made",
    [
        ("R", "adbec"),
        ("S", "abcde"),
        ("L", "ebdac"),
        ("W", "aebdc"),
        ("E", "ecdba"),
        ("N", "dfcea"),
        ("P", "bdahc"),
        ("M", "fdgeh"),
    ],
)
def test_what_a_word_makes_of_a_text(word, made):
    given = {"N": "cebdh", "P": "cebad"}.get(word, "cebda")
    assert orders.follow(word, given) == made
    assert orders.follow("", given) == given


def test_words_are_followed_from_left_to_right_and_some_pairs_are_never_drawn():
    assert orders.follow("LN", "abcde") == "cdefb"
    assert orders.follow("SR", "cabba") == "cbbaa" and orders.follow("RS", "cabba") == "aabbc"
    rng = random.Random(0)
    drawn = {orders.draw_words(rng) for _ in range(3000)}
    assert drawn == {
        a + b for a, b in itertools.product(orders.WORDS, repeat=2) if a + b not in orders.UNSEEN
    }


def test_no_pair_that_is_trained_on_does_what_an_unseen_one_does():
    rng = random.Random(2)
    texts = [orders.draw_text(rng) for _ in range(50)]
    for unseen in orders.UNSEEN:
        wanted = [orders.follow(unseen, x) for x in texts]
        for pair in itertools.product(orders.WORDS, repeat=2):
            same = [orders.follow(pair, x) for x in texts] == wanted
            assert not same or "".join(pair) in orders.UNSEEN, pair
        assert all([orders.follow(word, x) for x in texts] != wanted for word in orders.WORDS)


def test_a_new_task_is_no_pair_of_words_and_the_unseen_one_is_unseen():
    rng = random.Random(1)
    texts = [orders.draw_text(rng) for _ in range(50)]
    pairs = [a + b for a, b in itertools.product(orders.WORDS, repeat=2)]
    for seed in range(5):
        new = [function_of("new", seed)(x) for x in texts]
        assert all([orders.follow(pair, x) for x in texts] != new for pair in pairs)
        unseen = [function_of("unseen", seed)(x) for x in texts]
        assert unseen in [[orders.follow(pair, x) for x in texts] for pair in orders.UNSEEN]


def test_texts_that_are_tested_on_are_never_trained_on():
    function = function_of("known", 0)
    sets = [
        set(map(tuple, examples(function, random.Random(0), 400, "cpu", held_out)[:, :5].tolist()))
        for held_out in (False, True)
    ]
    assert sets[0].isdisjoint(sets[1]) and len(sets[1]) > 300


def test_the_claims_are_differences_of_seeds(tmp_path):
    """A run of made-up rows."""
    accuracies = {"soft 16": (0.9, 0.7), "full 0": (1.0, 0.8), "prefix 3": (0.95, 0.8)}
    with Run(Flags(out=str(tmp_path), seeds=2)) as run:
        for seed in range(2):
            for task in prompt.TASKS:
                run.log(phase="search", task=task, seed=seed, accuracy=0.5, prompt="R", step=0)
                names = [f"{m} {k}" for m, k in prompt.ARMS] + ["random start"]
                for name in names:
                    for step in (1, 2):
                        y = accuracies.get(name, (0.6, 0.6))[seed] * step / 2
                        y = 0.25 * step if name == "random start" else y
                        size = 1000 if name == "full 0" else 7
                        run.log(
                            phase="tune",
                            task=task,
                            arm=name,
                            seed=seed,
                            size=size,
                            step=step,
                            accuracy=y,
                        )
        _, claims = prompt.figure(run_config := prompt.Config(seeds=2), run)
    assert run_config.seeds == 2
    by = {c["id"]: c for c in claims}
    assert by["known"]["ours"].startswith("-0.1 ±")
    assert not by["known"]["holds"] and by["new"]["holds"]
    assert by["prefix"]["ours"].startswith("0.075 ±") and by["prefix"]["holds"]
    assert by["words"]["ours"].startswith("0.3 ±")
    assert by["share"]["ours"] == "0.007"
    assert by["start"]["ours"].startswith("0.075 ±")  # of all steps


def test_the_run_writes_all_it_promises(tmp_path):
    check_quick(SCRIPT, tmp_path, also=("samples.txt",))
    text = (tmp_path / "samples.txt").read_text()
    assert all(task in text for task in prompt.TASKS) and text.count("prefix") == 3


def test_help_and_a_mistake(tmp_path):
    check_help(SCRIPT)
    check_mistake(SCRIPT, "--batch 0", tmp_path)


def test_a_resumed_run_is_the_whole_one_to_the_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(prompt, "SOFT", (8, 16))
    monkeypatch.setattr(prompt, "PREFIX", (3,))
    arms = [("soft", 8), ("soft", 16), ("prefix", 3), ("full", 0)]
    monkeypatch.setattr(prompt, "ARMS", arms)
    monkeypatch.setattr(prompt, "search", lambda model, ids: [0, 1])  # another test's
    marks = {"phase": "tune", "arm": "soft 16", "step": 2}, {"phase": "search", "task": "new"}
    check_resume(SCRIPT, tmp_path, marks, "--quick")
