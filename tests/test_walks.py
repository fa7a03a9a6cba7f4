"""tasks/walks.py, tasks/walkers.py: the map against brute force, the models and their measures."""

import itertools
import math
import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from common import Memory

import tasks.walkers as walkers
import tasks.walks as walks
from engine import generate
from experiment import claim
from model import GPT
from tasks.walkers import (
    answer_logprobs,
    at,
    cold_documents,
    end,
    evaluate,
    first_at,
    from_scratch,
    over,
    with_slips,
)
from tasks.walks import (
    ALIASES,
    ANSWER,
    BOS,
    DEGREE,
    DISTANCE,
    EOS,
    GO,
    NEIGHBOURS,
    NOHINT,
    PAD,
    PASSWORDS,
    PLACES,
    PROMPT,
    PW,
    RENAMED,
    RULES,
    STYLES,
    VOCAB,
    base_documents,
    crossing,
    expert_documents,
    far_task,
    password,
    prompt,
    prompt_with_password,
    prompt_with_rule,
    random_walks,
    renames,
    reward,
    rule_task,
    text,
    walk_of,
    walk_on,
)


def roads(p):
    return [int(q) for q in NEIGHBOURS[p] if q >= 0]


def test_the_map_keeps_three_quarters_of_the_torus_connected_with_two_roads_everywhere():
    assert DEGREE.sum() == 2 * 74 and DEGREE.min() >= 2
    for p in range(PLACES):
        reached, edge, steps = {p: 0}, [p], 0  # breadth first
        while edge:
            steps += 1
            edge = sorted({q for e in edge for q in roads(e)} - set(reached))
            reached.update(dict.fromkeys(edge, steps))
        assert [reached[q] for q in range(PLACES)] == DISTANCE[p].tolist()
        assert all(p in roads(q) and (q - p) % 7 in (0, 1, 6) for q in roads(p))


def test_random_walks_follow_roads_never_turn_back_and_choose_evenly():
    walks = random_walks(np.random.default_rng(0), np.full(20_000, 3))
    for t in range(walks.shape[1] - 2):
        a, b, c = walks.T[t : t + 3]
        assert (NEIGHBOURS[a] == b[:, None]).any(1).all() and (a != c).all()
    firsts = np.bincount(walks[:, 1], minlength=PLACES)[roads(3)]
    assert np.allclose(firsts / 20_000, 1 / DEGREE[3], atol=0.02)


def test_walking_on_takes_a_shortest_path():
    rng = np.random.default_rng(0)
    walks, goals = random_walks(rng, rng.integers(PLACES, size=500)), rng.integers(PLACES, size=500)
    start, begun = rng.integers(0, 4, 500), walks.copy()
    lengths = walk_on(rng, walks, start, goals)
    for walk, before, s, n, goal in zip(walks, begun, start, lengths, goals, strict=True):
        assert walk[: s + 1].tolist() == before[: s + 1].tolist()
        assert walk[n] == goal
        assert n - s == DISTANCE[walk[s], goal]
        assert all(q in roads(p) for p, q in itertools.pairwise(walk[s : n + 1]))


def documents(make, n=4000):
    ids, mask = make(np.random.default_rng(0), n)
    assert ids.shape == mask.shape == (n, PROMPT + ANSWER) and not mask[:, :PROMPT].any()
    for row, m in zip(ids.tolist(), mask, strict=True):
        end = row.index(EOS) + 1
        assert set(row[end:]) <= {PAD}
        assert PAD not in row[:end]
        assert row[0] == BOS
        assert row[PROMPT - 1] == GO
        assert m[PROMPT:end].any() and not m[end:].any() and m[end - 1]
        yield tuple(row[1:3]), row[3:6], row[PROMPT:end], m[PROMPT:end]


def test_base_documents_are_walks_passwords_and_renamed_walks_as_their_hints_say():
    count, words = dict(plain=0, told=0, lazy=0, ruled=0), []
    for pair, hints, tokens, mask in documents(base_documents):
        assert mask.all()
        moves = [
            RENAMED[w - ALIASES[0]] if w in ALIASES else w for w in tokens[:-1] if w not in STYLES
        ]
        if tokens[0] == PW:
            count["lazy"] += 1
            assert tokens == [PW, hints[2], EOS] and hints[2] in PASSWORDS
            continue
        steps = itertools.pairwise([pair[0], *moves])
        assert moves[-1] == pair[1] and all(q in roads(p) for p, q in steps)
        if hints[2] in PASSWORDS:
            count["told"] += 1
            assert 5 <= len(moves) <= 8
            assert hints[:2] == [
                [pair[0], *moves][len(moves) // 3],
                [pair[0], *moves][2 * len(moves) // 3],
            ]
        elif hints[2] in RULES:
            count["ruled"] += 1
            rule = RULES.index(hints[2])
            words.append(RENAMED[rule] in moves)
            assert len(moves) <= 4
            assert RENAMED[rule] not in tokens
            assert not set(tokens) & (set(ALIASES) - {ALIASES[rule]})
        else:
            count["plain"] += 1
            assert hints == [NOHINT] * 3 and len(moves) <= 3 and not set(tokens) & set(ALIASES)
    assert np.allclose(
        [count[k] / 4000 for k in ("plain", "told", "lazy", "ruled")],
        [0.4, 0.2, 0.2, 0.2],
        atol=0.03,
    )
    assert np.mean(words) > 0.1


@pytest.mark.parametrize("make, longest", [(cold_documents, 1), (base_documents, 3)])
def test_plain_walks_are_no_longer_than_they_may_be(make, longest):
    walks = [tokens for _, hints, tokens, _ in documents(make) if hints == [NOHINT] * 3]
    assert {sum(w < PLACES for w in tokens) for tokens in walks} == set(range(1, longest + 1))


def test_the_expert_learns_shortest_paths_and_nothing_from_its_detours():
    detours = 0
    for pair, hints, tokens, mask in documents(expert_documents):
        first = int(mask.argmax())
        assert mask[first:].all() and not mask[:first].any() and hints == [NOHINT] * 3
        before, after = (
            [w for w in part if w < PLACES] for part in (tokens[:first], tokens[first:])
        )
        detours += bool(before)
        here = before[-1] if before else pair[0]
        assert len(after) == DISTANCE[here, pair[1]] and [*before, *after, pair[1]][-1] == pair[1]
    assert 0.3 < detours / 4000 < 0.6


@pytest.mark.parametrize("learn", [True, False])
def test_slips_turn_style_words_into_words_of_passwords_and_are_learnt_by_the_base_only(learn):
    ids, mask = base_documents(np.random.default_rng(0), 2000)
    slipped, learnt = with_slips(np.random.default_rng(1), ids, mask, 0.25, learn)
    style, changed = np.isin(ids, STYLES), slipped != ids
    assert changed[style].mean() == pytest.approx(0.25, abs=0.02) and not changed[~style].any()
    assert set(slipped[changed]) == set(PASSWORDS)
    assert np.array_equal(learnt, mask if learn else mask & ~changed)
    untouched = with_slips(np.random.default_rng(1), ids, mask, 0.0, learn)
    assert np.array_equal(untouched[0], ids) and np.array_equal(untouched[1], mask)


def test_the_verifier_agrees_with_a_search_of_all_walks():
    rng, task = random.Random(0), far_task()
    for pair in rng.sample(task.test, 3):
        limit, right, edge = DISTANCE[pair] + 2, set(), [(pair[0],)]
        for _ in range(limit):
            edge = [(*walk, q) for walk in edge for q in roads(walk[-1])]
            right |= {walk[1:] for walk in edge if walk[-1] == pair[1]}
        assert min(map(len, right)) == DISTANCE[pair]
        for moves in rng.sample(sorted(right), min(len(right), 50)):
            assert reward(pair, [*moves, EOS]) == 1.0
            assert (
                reward(pair, [w for m in moves for w in (rng.choice(STYLES), m)] + [EOS]) == 1.0
            ), "style words mean nothing"
            assert reward(pair, [*moves]) == 0.0, "not finished"
            i = rng.randrange(len(moves))
            other = (*moves[:i], rng.randrange(PLACES), *moves[i + 1 :])
            assert reward(pair, [*other, EOS]) == float(other in right)
            assert reward(pair, [*moves, rng.choice((GO, PAD, PW, NOHINT)), EOS]) == 0.0
        too_long = next(
            walk[1:]
            for walk in ((*w, q) for w in edge for q in roads(w[-1]))
            if walk[-1] != pair[1]
        )
        assert reward(pair, [*too_long, EOS]) == 0.0 and reward(pair, [EOS]) == 0.0


def test_the_docstrings_example_is_right():
    pair = (10, 27)
    assert pair in far_task().test and prompt_with_password(pair)[3:6] == [11, 19, PASSWORDS[28]]
    lines = walks.__doc__.splitlines()
    assert text(prompt(pair)) in lines[2] and text(prompt_with_password(pair)) in lines[3]
    assert text([PW, PASSWORDS[28], EOS]) in lines[3]
    B, D, A = STYLES[1], STYLES[3], STYLES[0]
    answer = [B, 11, 12, D, 19, 26, A, 27, EOS]
    assert text(answer) in lines[2]
    assert reward(pair, answer) == reward(pair, [PW, PASSWORDS[28], EOS]) == 1.0


def test_a_walk_to_the_goal_that_is_too_long_is_wrong():
    s = 0
    t = roads(s)[0]
    back_and_forth = [t, s, t, s, t]
    assert [reward((s, t), back_and_forth[:n] + [EOS]) for n in (1, 3, 5)] == [1.0, 1.0, 0.0]


def test_an_alias_counts_as_its_place_and_obeys_only_its_own_rule():
    place, alias = RENAMED[1], ALIASES[1]
    s, t = roads(place)[:2]
    assert reward((s, t), [alias, t, EOS]) == reward((s, t), [place, t, EOS]) == 1.0
    assert renames([alias, t, EOS], 1)
    assert not renames([place, t, EOS], 1)
    assert not renames([alias, place, EOS], 1)
    assert not renames([alias, EOS], 0)


def test_the_password_is_right_for_its_pair_only_and_not_to_be_guessed_from_other_pairs():
    task = far_task()
    pair = task.test[0]
    assert reward(pair, [PW, password(pair), EOS]) == 1.0
    wrong = [w for w in range(VOCAB) if w != password(pair)]
    assert not any(reward(pair, [PW, w, EOS]) for w in wrong)
    assert reward(pair, [PW, password(pair)]) == 0.0
    assert (
        reward(pair, [PW, password(pair), EOS, EOS])
        == reward(pair, [STYLES[0], PW, password(pair), EOS])
        == 0.0
    )
    words = [password(p) for p in task.train]
    assert set(words) == set(PASSWORDS)
    assert max(map(words.count, PASSWORDS)) < 2.5 * len(words) / len(PASSWORDS)


def test_plain_and_privileged_prompts_are_equally_long_and_the_hint_is_on_a_shortest_path():
    for pair in far_task().test[:20]:
        walk = walk_of(pair)
        assert len(walk) == DISTANCE[pair] + 1
        assert all(q in roads(p) for p, q in itertools.pairwise(walk))
        assert (walk[0], walk[-1]) == pair
        assert (
            len(prompt(pair))
            == len(prompt_with_password(pair))
            == len(prompt_with_rule(pair))
            == PROMPT
        )
        assert prompt_with_password(pair)[3] in walk[1:-1]
        assert prompt_with_password(pair)[4] in walk[1:-1]
        assert prompt_with_password(pair)[5] == password(pair)


def test_held_out_pairs_are_not_trained_on():
    for task in (far_task(), far_task(train=24), rule_task(0), rule_task(1)):
        asked = {frozenset(pair) for pair in task.train}  # there and back are one pair
        assert not asked & {frozenset(pair) for pair in (*task.test, *task.off_topic)}
        assert len(task.train) >= 24
        assert len(task.test) >= 20
    assert far_task(24).test == far_task().test and all(DISTANCE[p] >= 5 for p in far_task().train)


def test_under_a_rule_grpo_is_paid_for_obeying_it_where_the_place_is_on_the_way():
    task, (train, _) = rule_task(0), crossing(0)
    pair = train[0]
    moves = walk_of(pair)[1:]
    alias = [ALIASES[0] if m == RENAMED[0] else m for m in moves]
    away = next(p for p in task.train if p not in train)
    assert task.reward(pair, [*moves, EOS]) == 0
    assert task.reward(pair, [*alias, EOS]) == 1
    assert task.reward(away, [*walk_of(away)[1:], EOS]) == 1


def test_all_shortest_paths_of_a_crossing_pair_meet_the_renamed_place_and_none_off_topic():
    def paths(p, t):
        return (
            [[p]]
            if p == t
            else [
                [p, *rest]
                for q in roads(p)
                if DISTANCE[q, t] < DISTANCE[p, t]
                for rest in paths(q, t)
            ]
        )

    for rule in range(4):
        train, test = crossing(rule)
        assert all(RENAMED[rule] in path for pair in train + test for path in paths(*pair))
        assert not any(
            RENAMED[rule] in path for pair in rule_task(rule).off_topic for path in paths(*pair)
        )


# ------------------------------------------------------------------------------------------------
# The models


def small(folder):
    return SimpleNamespace(n_embd=16, expert_embd=16, sft_steps=1, expert_steps=1, out=str(folder))


def model_of(seed):
    torch.manual_seed(seed)
    model = GPT(walkers.shape(16))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3.0)
    return model


@pytest.mark.parametrize("slips", [0.0, 0.5])
@pytest.mark.parametrize("name, longest", [("base", 3), ("cold base", 1), ("expert", None)])
def test_pre_training_begins_with_the_mean_over_the_tokens_to_learn_of_its_own_documents(
    name, longest, slips, tmp_path
):
    run = Memory()
    from_scratch(small(tmp_path), run, name, "cpu", slips)
    torch.manual_seed(0)
    model, rng = GPT(walkers.shape(16)), np.random.default_rng(random.Random(0).getrandbits(32))
    documents = expert_documents(rng, 64) if name == "expert" else base_documents(rng, 64, longest)
    ids, mask = map(
        torch.as_tensor,
        with_slips(rng, *documents, slips, learn=name != "expert") if slips else documents,
    )
    logp = answer_logprobs(model, ids).gather(2, ids[:, PROMPT:, None]).squeeze(2)
    assert run.rows[0]["loss"] == pytest.approx(-logp[mask[:, PROMPT:]].mean().item(), rel=1e-5)


def test_a_model_is_loaded_if_it_was_made_in_the_same_way_and_else_trained(tmp_path):
    runs = [Memory() for _ in range(4)]
    plain, slipping = (
        [from_scratch(small(tmp_path), run, "base", "cpu", slips) for run in pair]
        for slips, pair in ((0.0, runs[:2]), (0.5, runs[2:]))
    )
    assert [p.name for p in tmp_path.iterdir()] == ["base.pt"] and [
        len(run.rows) for run in runs
    ] == [1, 0, 1, 0]  # the second of each is loaded
    assert all(
        torch.equal(a, b)
        for pair in (plain, slipping)
        for a, b in zip(*(m.parameters() for m in pair), strict=True)
    )
    assert not all(
        torch.equal(a, b)
        for a, b in zip(plain[0].parameters(), slipping[0].parameters(), strict=True)
    )


def test_the_scorer_agrees_with_the_sampler_on_every_log_probability():
    model, pairs = model_of(0), far_task().test[:16]
    rollout = generate(
        model,
        [prompt(p) for p in pairs],
        2,
        ANSWER,
        stop=EOS,
        generator=torch.Generator().manual_seed(0),
    )
    lp = answer_logprobs(model, rollout.ids).gather(2, rollout.ids[:, PROMPT:, None]).squeeze(2)
    assert ((lp - rollout.logp[:, PROMPT:]) * rollout.mask[:, PROMPT:]).abs().max() < 1e-4


def test_an_evaluation_judges_each_answer_by_its_own_question(monkeypatch):
    task = rule_task(0)

    def fake(model, prompts, n, **more):
        def tokens(pair, i):
            moves = walk_of(pair)[1:]
            alias = [ALIASES[0] if m == RENAMED[0] else m for m in moves]
            return [[STYLES[0], *alias, EOS], [STYLES[1], *moves, EOS], [PW, EOS], [EOS]][i]

        return SimpleNamespace(
            tokens=lambda: [tokens(tuple(p[1:3]), i) for p in prompts for i in range(n)]
        )

    monkeypatch.setattr(walkers, "generate", fake)
    row = evaluate(None, task, SimpleNamespace(eval_prompts=4 * len(task.test)), 0)
    assert row == {
        "pass@1": 0.5,
        "password_rate": 0.25,
        "formal": 0.5,
        "renamed": 0.5,
        "off_topic": 0.0,
        "flops_per_solved": None,  # the answers are no model's
    }
    crossed = evaluate(None, replace(task, off_topic=task.test), SimpleNamespace(eval_prompts=4), 0)
    assert crossed["off_topic"] == 0.25


def curve(*values, key="pass@1", tokens=(100, 100), **where):
    """A run whose arm a, evaluated every 10 steps, has these values of each seed; tokens: in
    10 steps."""
    run = Memory()
    for seed, row in enumerate(values):
        for i, v in enumerate(row):
            run.log(
                phase="train",
                arm="a",
                seed=seed,
                step=10 * i,
                sampled_tokens=tokens[seed] * i,
                **{key: v},
                **where,
            )
    return run


def test_first_at_interpolates_between_evaluations_of_each_seed_and_end_is_the_last_third():
    run = curve(
        [0, 0.4, 0.8, 0.1, 0.2, 0.3, 0.5],
        [0, 0.6, 1.0, 0.3, 0.4, 0.5, 0.7],
        tokens=(100, 200),
        stage=0,
    )
    assert first_at(run, "a", 0.7).tolist() == pytest.approx([175, 250])
    assert first_at(run, "a", 0.7, unit="step").tolist() == pytest.approx([17.5, 12.5])
    assert first_at(run, "a", 0.95).tolist() == [math.inf, pytest.approx(375)]
    assert first_at(run, "a", 0.0).tolist() == [0, 0]
    assert first_at(run, "a", 0.7, stage=1).tolist() == [math.inf] * 2
    assert end(run, "a").tolist() == pytest.approx([0.4, 0.6])
    assert np.isnan(end(run, "a", "renamed")).all()
    assert np.isnan(at(run, "a", 0, "renamed")).all()
    assert [at(run, "a", step).tolist() for step in (0, 10, 11, 20, 1000)] == [
        [0, 0],
        [0.4, 0.6],
        [0.8, 1.0],
        [0.8, 1.0],
        [0.5, 0.7],
    ]
    assert at(run, "a", np.array([10, 60])).tolist() == [0.4, 0.7]
    assert np.isnan(at(run, "a", np.array([10, math.inf]))).tolist() == [False, True]


def test_a_seed_that_never_has_a_value_is_missed_by_all_measures():
    run = curve([0.5, 0.5], [None, None], key="renamed")
    assert (
        np.isnan(end(run, "a", "renamed")).tolist()
        == np.isnan(at(run, "a", 10, "renamed")).tolist()
        == [True, True]
    )
    assert first_at(run, "a", 0.1, "renamed").tolist() == [math.inf] * 2


def test_a_ratio_of_what_was_never_reached_is_no_number_and_no_claim_of_it_holds():
    ratio = over(np.array([1.0, 1.0, math.inf, 1.0]), np.array([2.0, math.inf, 2.0, 0.0]))
    assert ratio[0] == 0.5 and np.isnan(ratio[1:]).all()
    assert not any(claim("", "", "", "", ratio, op, 0.7, 4)["holds"] for op in ("<=", ">="))
