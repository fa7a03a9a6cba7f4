"""tasks/pipelines.py and electives/compose.py: functions, grader and parser by hand, the maths
against enumeration, the trainers, and the command.
"""

import copy
import itertools
import random

import pytest
import torch
from common import Memory, check_help, check_mistake, check_quick, check_resume

import tasks
from electives import compose
from electives.compose import (
    ARMS,
    TASK,
    Config,
    advantages,
    answer,
    build,
    imitate_right,
    policy_loss,
    score,
    train,
    warm_up,
)
from experiment import UserError
from model import GPT, GPTConfig
from tasks import padded, pipelines
from tasks.pipelines import (
    BRIDGE,
    FUNCTIONS,
    HELD_OUT,
    LENGTH,
    LETTERS,
    NAMES,
    TRAINED,
    apply,
    bridged,
    demonstrate,
    draw,
    listed,
    mistake,
    parse,
    prompt,
    reward,
)

SCRIPT = "electives.compose"
SOURCES = {
    "trained": (lambda rng: draw(rng, 3), TRAINED),
    "held out": (lambda rng: draw(rng, 3, held_out=True), HELD_OUT),
    "listed": (listed, NAMES),
    "bridged": (bridged, BRIDGE),
}


def small(**choices):
    return Config(**{**dict(steps=2, prompts=3, group=4, rounds=2, eval_prompts=4), **choices})


@pytest.fixture
def model():
    torch.manual_seed(0)
    return build("cpu")


@pytest.fixture
def tiny(monkeypatch):
    """A model of one narrow layer: what is tested doesn't depend on what it learns."""

    def build(device):
        shape = GPTConfig(TASK.n_vocab, block_size=80, n_layer=1, n_head=2, n_embd=16)
        return GPT(shape).to(device)

    monkeypatch.setattr(compose, "build", build)


# --------------------------------------------------------------------------------------------------
# The task


def test_the_functions_are_bijections_and_no_two_are_alike():
    strings = ["".join(s) for s in itertools.product(LETTERS, repeat=LENGTH)]
    tables = {name: tuple(apply(name, s) for s in strings) for name in NAMES}
    assert set(FUNCTIONS) == set(NAMES) and len(set(tables.values())) == len(NAMES)
    assert all(len(set(table)) == len(strings) for table in tables.values())


def test_the_roles_share_no_function():
    assert sorted(TRAINED + HELD_OUT + BRIDGE) == sorted(NAMES)


def test_an_application_by_hand(monkeypatch):
    monkeypatch.setitem(FUNCTIONS, "A", ((1, 0), (0, 2)))
    monkeypatch.setitem(FUNCTIONS, "B", ((0, 1), (1, 1)))
    problem = [("hb", "AB"), ("cc", "A")]
    assert prompt(problem) == "AhbB..Acc?"
    # swapped to bh, the second moved on by two, around the end; then both by one
    assert demonstrate(None, problem) == "Ahb=bb;Bbb=cc;Acc=ce;"


@pytest.mark.parametrize("source", SOURCES)
def test_a_demonstration_is_right_and_composes_only_what_its_source_may(source):
    make, names = SOURCES[source]
    rng = random.Random(0)
    lines = set()
    for _ in range(200):
        problem = make(rng)
        text = demonstrate(rng, problem)
        assert reward(problem, text) == 1 and mistake(problem, text) is None
        if source in ("trained", "held out"):
            assert len(TASK.encode(text)) < pipelines.budget(3)
        lines.add(len(parse(text)))
        composed = "".join(functions for _, functions in problem if len(functions) > 1)
        assert set(composed) <= set(names)
        if source == "listed":
            assert not composed
        if source in ("trained", "held out"):
            assert all(set(functions) <= set(names) for _, functions in problem)
    assert (
        lines
        == {
            "trained": {3, 4},
            "held out": {3},
            "listed": {1, 2, 3, 4, 5},
            "bridged": {2, 3, 4, 5, 6},
        }[source]
    )


def changed(text, place, by):
    return text[:place] + by + text[place + len(by) :]


def test_any_other_string_at_the_end_of_a_pipeline_is_wrong_and_the_way_there_is_free():
    problem = [("ab", "AB"), ("de", "C")]
    text = demonstrate(None, problem)
    lines = parse(text)
    for other in itertools.product(LETTERS, repeat=LENGTH):
        string = "".join(other)
        assert reward(problem, changed(text, 11, string)) == (string == lines[1][2])
        assert reward(problem, changed(text, 18, string)) == (string == lines[2][2])
        assert reward(problem, changed(text, 4, string)) == 1
        assert reward(problem, changed(text, 8, string)) == 1


@pytest.mark.parametrize("text", ["", "?", "Aab=ba", "Aab=ba;B", "A", "Aab=ba;;", "=;"])
def test_what_is_no_line_is_wrong_and_ignores_the_question(text):
    problem = [("ab", "A")]
    assert reward(problem, text) == 0 and parse(text) is None
    assert mistake(problem, text) == "ignored"


def test_a_line_too_many_or_too_few_is_wrong():
    problem = [("ab", "AB")]
    text = demonstrate(None, problem)
    for other in (text[:7], text[7:], text + text[7:], text[:7] + text):
        assert reward(problem, other) == 0 and mistake(problem, other) == "ignored"


def written(*lines):
    """Each line's result is right, whatever its argument."""
    return "".join(f"{name}{argument}={apply(name, argument)};" for name, argument in lines)


def test_mistakes_by_hand():
    problem = [("ab", "AB")]
    through = apply("A", "ab")
    other = next(s for s in ("ad", "ee") if s not in (through, "ab"))
    good = written(("A", "ab"), ("B", through))
    assert mistake(problem, good) is None
    # works on the question's string where it should go on
    assert mistake(problem, written(("A", "ab"), ("B", "ab"))) == "ignored"
    assert mistake(problem, written(("A", "ab"), ("C", through))) == "ignored"
    assert mistake(problem, written(("B", "ab"), ("A", apply("B", "ab")))) == "order"
    assert mistake(problem, written(("A", "ab"), ("B", other))) == "garbled"
    assert mistake(problem, written(("A", other), ("B", apply("A", other)))) == "garbled"
    # the first mistake counts: what follows goes on from what was written
    assert mistake(problem, f"Aab={other};B{other}={apply('B', other)};") == "slip"
    wrong = other if other != apply("B", through) else "hh"
    assert mistake(problem, f"{good[:11]}{wrong};") == "slip"


# --------------------------------------------------------------------------------------------------
# The maths


def test_advantages_have_no_mean_and_equal_rewards_give_exactly_none():
    rewards = torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0], [0.1, 0.1, 0.1, 0.1]])
    adv = advantages(rewards)
    assert adv[0].tolist() == [0.75, -0.25, -0.25, -0.25] and not adv[1:].any()
    assert advantages(rewards, negatives=False)[0].tolist() == [0.75, 0, 0, 0]


@pytest.mark.parametrize("group", [2, 4])
def test_without_negatives_the_mean_gradient_is_the_full_one_times_the_failure_rate(group):
    """By enumeration of all groups of answers: on-policy, masking changes each problem's step by
    the factor 1 - p and nothing else.
    """
    logits = torch.tensor([0.3, -1.0, 0.5], dtype=torch.float64, requires_grad=True)
    right = torch.tensor([1.0, 0, 0], dtype=torch.float64)
    logp = logits.log_softmax(0)
    p = (logp.exp() * right).sum().item()
    mean = {True: 0, False: 0}
    for answers in itertools.product(range(3), repeat=group):
        rows = torch.tensor(answers)
        chance = logp[rows].sum().exp().item()
        for negatives in mean:
            adv = advantages(right[rows][None], negatives)  # (1, G)
            loss = -(adv[0] * logp[rows]).sum()
            mean[negatives] += chance * torch.autograd.grad(loss, logits, retain_graph=True)[0]
    torch.testing.assert_close(mean[False], (1 - p) * mean[True])


def test_the_loss_is_a_mean_over_answer_tokens_and_padding_changes_nothing(model):
    pairs = [("AabB..?", "Aab=ba;"), ("Cdd?", "Cdd=aa;Daa=dd;")]
    weight = torch.tensor([[0.5], [-2.0]])
    gradients, losses = [], []
    for extra in (0, 7):
        ids, mask = padded(pairs, TASK)
        ids = torch.nn.functional.pad(ids, (0, extra), value=3)
        mask = torch.nn.functional.pad(mask, (0, extra))
        loss = policy_loss(score(model, ids), mask[:, 1:], weight)
        losses.append(loss)
        gradients.append(torch.autograd.grad(loss, model.wte.weight)[0])
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*gradients)
    by_hand = 0.0
    for (question, text), w in zip(pairs, (0.5, -2.0), strict=True):
        ids = torch.tensor([TASK.encode(question + text) + [TASK.eos]])
        by_hand -= w * score(model, ids)[0, len(question) - 1 :].sum()
    torch.testing.assert_close(losses[0], by_hand / (8 + 15))


# --------------------------------------------------------------------------------------------------
# The trainers


def test_answers_are_sampled_in_the_law_that_they_are_scored_in(model):
    problems = [draw(random.Random(i)) for i in range(3)]
    rollout, texts, rewards = answer(model, problems, 4, torch.Generator().manual_seed(0))
    logp = score(model, rollout.ids) * rollout.mask[:, 1:]
    torch.testing.assert_close(logp, rollout.logp[:, 1:], atol=1e-4, rtol=0)
    assert len(texts) == 12 and rewards.shape == (3, 4)


def test_answers_in_pieces_stand_in_the_problems_order(model, monkeypatch):
    """Two answers to each of 520 problems are sampled in three pieces."""
    problems = [[("ab", NAMES[i % 17])] for i in range(520)]
    monkeypatch.setattr(pipelines, "reward", lambda problem, text: float(problem[0][1] == "B"))
    monkeypatch.setattr(tasks.Rollout, "ended", lambda self, stop: torch.ones(len(self.ids)))
    rollout, _, rewards = answer(model, problems, 2, torch.Generator().manual_seed(0))
    names = [functions for ((_, functions),) in problems]
    assert rollout.ids[:, 0].tolist() == [TASK.index[name] for name in names for _ in range(2)]
    assert rewards.tolist() == [[name == "B"] * 2 for name in names]


def test_rejection_imitates_the_right_answers_only(model, monkeypatch):
    """One round, one pass, one step: its gradient is that of the right rows' likelihood."""
    problems = [draw(random.Random(i)) for i in range(4)]
    config = small(epochs=1)
    rollout, texts, _ = answer(model, problems, config.tries, torch.Generator().manual_seed(0))
    good = [0, 3, 5]
    monkeypatch.setattr(pipelines, "reward", lambda _, text: float(texts.index(text) in good))
    monkeypatch.setattr(tasks.Rollout, "ended", lambda self, stop: torch.ones(len(self.ids)))
    loss = policy_loss(score(model, rollout.ids[good]), rollout.mask[good][:, 1:], 1.0)
    loss.backward()
    wanted = [p.grad.clone() for p in model.parameters()]
    seen = []

    class Watched(torch.optim.SGD):
        def step(self):
            seen.append([p.grad.clone() for p in model.parameters()])

    monkeypatch.setattr(compose, "descend", lambda optimizer, loss: optimizer.step())
    optimizer = Watched(model.parameters(), 0.0)
    row = imitate_right(model, optimizer, problems, config, torch.Generator().manual_seed(0))
    assert row["reward"] == 3 / 8 and len(seen) == 1
    for got, want in zip(seen[0], wanted, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("arm", [a for a in ARMS if a != "RL level 1"])
def test_where_no_answer_is_right_nothing_changes(model, monkeypatch, arm):
    monkeypatch.setattr(pipelines, "reward", lambda *_: 0.0)
    trained = train(small(), Memory(), arm, 0, copy.deepcopy(model))
    for a, b in zip(model.parameters(), trained.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_samples_as_many_answers_of_its_own_level(model, monkeypatch, arm):
    config, asked = small(), []

    def judged(problem, text):
        asked.append(problem)
        return 0.0

    monkeypatch.setattr(pipelines, "reward", judged)
    monkeypatch.setattr(compose, "test", lambda *_: {})
    train(config, Memory(), arm, 0, model)
    assert len(asked) == config.answers
    longest = max(len(functions) for problem in asked for _, functions in problem)
    assert longest == (1 if arm == "RL level 1" else 2)
    assert {name for p in asked for _, functions in p for name in functions} <= set(TRAINED)


def test_the_warm_up_reads_pipelines_once_it_knows_the_atoms_and_ends_when_it_composes(
    monkeypatch, tiny
):
    found, sizes = iter((0.5, 0.95, 0.1, 0.3)), []
    rates, shares = [], []
    step, read = compose.descend, compose.demonstration

    def success(model, size, seed):
        sizes.append(size)
        return next(found)

    def reading(rng, bridge):
        shares.append(bridge)
        return read(rng, bridge)

    def watched(optimizer, loss):
        rates.append(optimizer.param_groups[0]["lr"])
        return step(optimizer, loss)

    monkeypatch.setattr(compose, "bridge_success", success)
    monkeypatch.setattr(compose, "demonstration", reading)
    monkeypatch.setattr(compose, "descend", watched)
    monkeypatch.setattr(compose, "test", lambda *_: {})
    monkeypatch.setattr(Memory, "say", lambda *_, **__: None)
    warm_up(Config(), Memory(), 0, "cpu")
    # asked about atoms every 20 steps until it knows them, then about pairs every 5
    assert sizes == [1, 1, 2, 2] and len(rates) == 50
    assert shares == [0.0] * 40 * 32 + [0.1] * 10 * 32
    assert rates[:2] + rates[39:] == pytest.approx([4e-5, 8e-5, 1.6e-3] + [2e-4] * 10)


@pytest.mark.parametrize("success", [0.1, 0.95])
def test_a_base_that_never_composes_is_one_line(monkeypatch, tiny, success):
    monkeypatch.setattr(compose, "bridge_success", lambda _, size, __: success / size**4)
    monkeypatch.setattr(Memory, "say", lambda *_, **__: None)
    with pytest.raises(UserError, match="nothing to build on"):
        warm_up(Config(warm_up=25), Memory(), 0, "cpu")


# --------------------------------------------------------------------------------------------------
# The command


def test_a_quick_run_writes_what_a_run_writes(tmp_path, tiny):
    check_quick(SCRIPT, tmp_path, also=("samples.txt",))
    marked = (tmp_path / "samples.txt").read_text()
    assert all(marked.count(f"    {arm} ") == 3 for arm in ("base", *ARMS))


def test_help_tells_every_flag():
    check_help(SCRIPT)


def test_answers_that_cannot_be_shared_out_are_one_line(tmp_path):
    check_mistake(SCRIPT, "--rounds 7", tmp_path)


def test_a_run_that_was_interrupted_goes_on_to_the_bit(tmp_path, tiny):
    marks = dict(phase="train", arm=ARMS[0], step=1), dict(phase="test", arm=ARMS[2])
    check_resume(SCRIPT, tmp_path, marks, "--quick", "--eval-prompts", 1)
