"""electives/entigraph.py: texts by a parser of their own, against what may be told; windows, replay
and the loss by hand; the claims from rows; the command.
"""

import itertools
import math
import random
from functools import partial

import matplotlib.pyplot as plt
import pytest
import torch
import torch.nn.functional as F
from common import Memory, check_help, check_mistake, check_quick, check_resume

from electives import entigraph
from electives.entigraph import (
    BACKWARD,
    FORWARD,
    HOPS,
    KNOWN,
    NEW,
    RELATIONS,
    SIZES,
    TURNED,
    VOCABULARY,
    WINDOW,
    WRITERS,
    Config,
    answers,
    asked,
    document,
    known_text,
    measure,
    recombine,
    split,
    statements,
    study,
    take_step,
    windows,
    world,
    written,
)
from model import GPT, GPTConfig


def drawn(seed=0):
    """A document's facts, and what may and may not be told of them."""
    rng = random.Random(seed)
    facts = world(NEW, rng)
    return facts, *split(statements(facts), rng)


def small():
    torch.manual_seed(0)
    return GPT(GPTConfig(len(VOCABULARY), block_size=WINDOW, n_layer=1, n_head=2, n_embd=16))


# --------------------------------------------------------------------------------------------------
# The world


@pytest.mark.parametrize("seed", range(3))
def test_relations_are_permutations_nobody_is_their_own_and_hops_are_two_of_them(seed):
    facts = world(NEW, random.Random(seed))
    for r in RELATIONS:
        assert sorted(facts[r]) == sorted(facts[r].values()) == sorted(NEW)
        assert all(x != y for x, y in facts[r].items())
    for x in NEW:
        assert facts["teacher's-rival"][x] == facts["rival"][facts["teacher"][x]]
        assert facts["rival's-teacher"][x] == facts["teacher"][facts["rival"][x]]
        assert facts["rival's-rival"][x] == facts["rival"][facts["rival"][x]]


def test_a_quarter_of_reversals_and_hops_is_never_told_and_the_document_is_told_whole():
    facts, told, untold = drawn()
    every = statements(facts)
    for kind in every:
        assert sorted(told[kind] + untold[kind]) == sorted(every[kind])
    assert [len(untold[kind]) for kind in ("direct", "reversed", "two-hop")] == [0, 15, 30]
    assert not set(KNOWN) & set(NEW)


# --------------------------------------------------------------------------------------------------
# Texts


def parsed(tokens):
    """All ways to read tokens as sentences -> lists of (whether forward, relation, x, y)."""
    if not tokens:
        yield []
    for template in (*FORWARD, *BACKWARD):
        words = template.split()
        if len(words) > len(tokens):
            continue
        slots = {w: t for w, t in zip(words, tokens, strict=False) if w.startswith("{")}
        r, x, y = (slots[name] for name in ("{r}", "{x}", "{y}"))
        fits = template.format(r=r, x=x, y=y).split() == tokens[: len(words)]
        if fits and r in (*RELATIONS, *HOPS) and {x, y} <= {*NEW, *KNOWN}:
            for rest in parsed(tokens[len(words) :]):
                yield [(template in FORWARD, r, x, y), *rest]


def told_by(write, n=6000):
    """What n texts of a writer tell -> {(forward, relation, x, y)}."""
    seen = set()
    for _ in range(n):
        (sentences,) = parsed(write().split())  # there is one way to read it
        seen.update(sentences)
    return seen


@pytest.mark.parametrize("arm", WRITERS)
def test_a_text_tells_what_it_may_in_the_end_all_of_it_and_nothing_else(arm):
    facts, told, _ = drawn()
    seen = told_by(partial(WRITERS[arm], random.Random(1), facts, told))
    may = {(True, *link) for _, *link in told["direct"]}
    if arm != "paraphrase":
        may |= {(False, *link) for _, *link in told["reversed"]}
    if arm == "recombine":
        hops = itertools.product((True, False), told["two-hop"])
        may |= {(forward, *link) for forward, (_, *link) in hops}
    assert seen == may


def test_a_triple_tells_two_facts_and_what_they_imply_in_every_order():
    facts, told, _ = drawn()
    rng = random.Random(0)
    orders, triples = set(), 0
    for _ in range(600):
        (sentences,) = parsed(recombine(rng, facts, told).split())
        if len(sentences) == 1:
            continue
        triples += 1
        links = [link for _, *link in sentences]
        ((r, x, z),) = [link for link in links if link[0] in HOPS]
        y = facts[HOPS[r][0]][x]
        parts = [[r, x, z], [HOPS[r][0], x, y], [HOPS[r][1], y, z]]
        assert sorted(links) == sorted(parts)
        if parts[1] != parts[2]:
            orders.add(tuple(parts.index(link) for link in links))
    assert orders == set(itertools.permutations(range(3)))
    assert abs(triples / 600 - 0.5) < 4 * math.sqrt(0.25 / 600), "half of the texts"


def test_one_in_five_sentences_that_may_be_turned_is():
    facts, told, _ = drawn()
    write = partial(WRITERS[TURNED], random.Random(0), facts, told)
    texts = [next(parsed(write().split()))[0] for _ in range(4000)]
    may = {tuple(link) for _, *link in told["reversed"]}
    turned = [not forward for forward, *link in texts if tuple(link) in may]
    share = sum(turned) / len(turned)
    assert abs(share - 0.2) < 4 * math.sqrt(0.16 / len(turned))


def test_nobody_asks_about_the_new_people_and_the_base_reads_of_the_known_ones_alone():
    facts, told, _ = drawn()
    for write in WRITERS.values():
        text = written(partial(write, random.Random(0), facts, told), 2000)
        assert VOCABULARY["?"] not in text and len(text) == 2000
    every = statements(world(KNOWN, random.Random(0)))
    text = written(partial(known_text, random.Random(0), every), 5000)
    assert VOCABULARY["?"] in text
    assert not {VOCABULARY[name] for name in NEW} & set(text)


def test_the_document_states_each_fact_once():
    facts, told, _ = drawn()
    (sentences,) = parsed(document(told).split())
    assert sorted(sentences) == sorted(
        (True, r, x, y) for r in RELATIONS for x, y in facts[r].items()
    )


# --------------------------------------------------------------------------------------------------
# Questions


def test_an_answer_is_the_likeliest_token_after_the_question_and_its_truth_is_the_facts():
    _, told, _ = drawn()
    ((questions, truth),) = asked({"all": sum(told.values(), [])}, "cpu").values()
    words = list(VOCABULARY)
    for row, right, (kind, r, x, y) in zip(questions, truth, sum(told.values(), []), strict=True):
        names = {words[i] for i in row.tolist()} & {*NEW}
        assert names == {y if kind == "reversed" else x} and r in [words[i] for i in row.tolist()]
        assert words[right] == (x if kind == "reversed" else y)
    model = small()
    got = answers(model, questions)
    by_hand = [model(row[None])[0, -1].argmax().item() for row in questions[:9]]
    assert got[:9].tolist() == by_hand

    def oracle(ids):  # right in all cases but the first
        logits = F.one_hot(truth, len(words)).float()
        logits[0] = F.one_hot(truth[0] + 1, len(words))
        return logits[:, None].expand(-1, ids.shape[1], -1)

    share = measure(oracle, {"all": (questions, truth)})["all"]
    assert share == pytest.approx(1 - 1 / len(truth))


# --------------------------------------------------------------------------------------------------
# Training


def test_windows_are_stretches_of_the_text_and_each_is_as_likely():
    tokens = torch.arange(WINDOW + 8) ** 2
    rows = windows(tokens, 4000, random.Random(0))
    start = rows[:, 0].float().sqrt().long()
    assert torch.equal(rows, tokens[start[:, None] + torch.arange(WINDOW + 1)])
    counts = torch.bincount(start, minlength=8).float()
    assert len(counts) == 8, "up to the last token"
    chi2 = ((counts - 500) ** 2 / 500).sum()
    assert chi2 < 24.3, "7 degrees of freedom, p = .001"
    assert windows(tokens, 0, random.Random(0)).shape == (0, WINDOW + 1)


def test_a_step_is_on_the_mean_cross_entropy_of_the_next_tokens():
    model = small()
    ids = torch.randint(len(VOCABULARY), (5, WINDOW + 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    truth = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    losses = [take_step(model, optimizer, ids) for _ in range(20)]
    assert losses[0] == pytest.approx(truth.item(), rel=1e-5)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("replay, old", [(0.2, 10), (0, 0), (0.5, 24)])
def test_replay_is_a_share_of_the_rows_and_the_base_stands_still(replay, old, monkeypatch):
    seen = []
    monkeypatch.setattr(entigraph, "take_step", lambda m, o, ids: seen.append(ids) or 0.0)
    base = small()
    text, known = torch.zeros(90).long(), torch.ones(90).long()
    where = dict(arm="a", tokens=90, seed=0)
    run = Memory()
    scores = {"two-hop": 0.0, "base": 1.0}
    config = Config(steps=3)
    model = study(config, run, where, base, text, known, replay, lambda m: scores)
    assert len(seen) == 3 and all(len(ids) == entigraph.ROWS for ids in seen)
    assert all(ids[:, 0].sum() == old for ids in seen)
    assert model is not base
    assert [row["step"] for row in run.rows] == [0, 3]


def test_the_base_reads_of_known_people_texts_begin_with_the_document_and_grow(monkeypatch):
    read, studied = [], []
    monkeypatch.setattr(entigraph, "read", lambda c, r, s, *texts: read.extend(texts[:2]))
    monkeypatch.setattr(
        entigraph,
        "study",
        lambda c, r, where, base, text, known, replay, e: studied.append((where, text, replay)),
    )
    entigraph.train(Config(), Memory(), 0, "cpu")
    new = {VOCABULARY[name] for name in NEW}
    for text in read:
        assert len(text) == entigraph.KNOWN_TOKENS and not new & set(text.tolist())
    names = [len({VOCABULARY[x] for x in KNOWN} & set(text.tolist())) for text in read]
    assert names[0] < names[1] == len(KNOWN)
    source = studied[0][1]
    assert studied[0][0]["arm"] == "repeat" and len(source) == 5 * 2 * len(NEW)
    for arm in WRITERS:
        texts = [text for where, text, _ in studied if where["arm"] == arm]
        assert [len(text) - len(source) for text in texts] == list(SIZES)
        for text in texts:
            assert torch.equal(text, texts[-1][: len(text)])
            assert torch.equal(text[: len(source)], source)
    assert [where["arm"] for where, _, replay in studied if not replay] == ["recombine, no replay"]


# --------------------------------------------------------------------------------------------------
# The claims, from rows

# of each arm at its last two sizes: direct, reversed, two-hop, and what is untold of the last two
NUMBERS = {
    "recombine": ((0.9, 0.5, 0.37, 0, 0), (0.95, 0.8, 0.7, 0.04, 0.02)),
    "paraphrase": ((0.95, 0, 0.01, 0, 0), (0.97, 0.02, 0.02, 0, 0)),
    TURNED: ((0.95, 0.6, 0, 0, 0), (0.96, 0.75, 0.03, 0, 0)),
    "repeat": ((0.9, 0, 0, 0, 0),) * 2,
    "recombine, no replay": ((0.9, 0.8, 0.7, 0, 0),) * 2,
}
KEYS = ("direct", "reversed", "two-hop", "reversed, untold", "two-hop, untold")


def rows_of(**others):
    run = Memory()
    for seed, (arm, pair) in itertools.product((0, 1), {**NUMBERS, **others}.items()):
        sizes = {"repeat": (0,), "recombine, no replay": SIZES[-1:]}.get(arm, SIZES)
        for n, step in itertools.product(sizes, (0, 300)):
            numbers = pair[n == SIZES[-1]]
            base = 0.99 if step == 0 else 0.05 if "no" in arm else 0.97
            ours = {k: x * (step > 0) for k, x in zip(KEYS, numbers, strict=True)}
            run.log(arm=arm, tokens=n, seed=seed, step=step, base=base, **ours)
    return run


def claimed(run):
    fig, claims = entigraph.figure(Config(seeds=2), run)
    titles = " ".join([fig._suptitle.get_text(), *(ax.get_title() for ax in fig.axes)])
    plt.close(fig)
    return {c["id"]: (float(c["ours"].split()[0]), c["holds"]) for c in claims}, titles


def test_the_claims_compare_what_they_say():
    ours, titles = claimed(rows_of())
    assert {k: v for k, (v, _) in ours.items()} == pytest.approx(
        {
            "hop": 0.68,
            "turned": 0.67,
            "back": 0.78,
            "closed": 0.05,
            "rise": 0.11,
            "flat": 0.003,
            "still": 0.33,
            "facts": 0.97,
            "hop untold": 0.02,
            "back untold": 0.04,
            "kept": 0.02,
            "gone": 0.05,
        },
        abs=1e-3,
    )
    assert all(holds for _, holds in ours.values())
    assert "0.70 right if they recombine, 0.02 if they paraphrase" in titles


def test_a_text_that_teaches_nothing_keeps_no_claim_that_it_does():
    nothing = ((0.5, 0, 0, 0, 0),) * 2
    ours, _ = claimed(rows_of(recombine=nothing, paraphrase=nothing))
    for id in ("hop", "turned", "back", "rise", "still", "facts"):
        assert not ours[id][1]
    composes = ((0.9, 0.5, 0.4, 0, 0), (0.95, 0.8, 0.7, 0.5, 0.5))
    ours, _ = claimed(rows_of(recombine=composes))
    assert not ours["hop untold"][1] and not ours["back untold"][1]


# --------------------------------------------------------------------------------------------------
# The command


def test_a_quick_run_writes_figure_samples_metrics_claims_config_and_checkpoint(tmp_path):
    assert check_quick("electives.entigraph", tmp_path, also=("samples.txt",)) == "entigraph"


def test_help_lists_every_flag():
    check_help("electives.entigraph")


@pytest.mark.parametrize("flags", ["--replay 1", "--steps 0", "--lr -1", "--templates 3"])
def test_a_mistake_in_the_flags_is_one_line_and_exit_code_2(flags, tmp_path):
    check_mistake("electives.entigraph", flags, tmp_path)


def test_an_interrupted_run_goes_on_to_the_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(plt.Figure, "savefig", lambda self, f, **_: f.write(b"\x89PNG"))
    marks = (dict(arm="paraphrase", tokens=SIZES[1], step=1), dict(arm=TURNED, step=0))
    check_resume("electives.entigraph", tmp_path, marks, "--quick")
