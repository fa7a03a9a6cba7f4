"""opd.py: the map and its verifier against brute force, each of the five choices against closed forms, the trainer, and the command."""
import json
import math
import os
import random
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from common import ROOT, Memory, check_help, check_quick, check_resume, complain, finish, launch, metrics, torchrun
from test_grpo import ROWS
from test_huggingface import make_json, merges_of, save_json

import opd
from engine import Rollout
from huggingface import load_tokenizer
from model import GPT
from opd import (
    ALIASES,
    ANSWER,
    BOS,
    DEGREE,
    DISTANCE,
    EOS,
    FIGURES,
    GO,
    METHODS,
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
    Config,
    advantages,
    answer_logprobs,
    base_documents,
    choose_mask,
    choose_weight,
    collect,
    crossing,
    divergence,
    draft,
    expert_documents,
    far_task,
    generate,
    largest,
    loss_of,
    password,
    plain,
    proximity,
    random_walks,
    renames,
    reward,
    rule_task,
    ruled,
    told,
    trust_region,
    walk_of,
    walk_on,
    with_slips,
    write_together,
)

KINDS = ["forward", "reverse", "jsd", "sampled", "top_raw", "top_renormalised", "top_stopgrad"]


def logprobs(*shape, seed=0, scale=2.0):
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).log_softmax(-1)


def small(**choices):
    return Config(**{**dict(n_layer=1, n_head=2, n_embd=16, expert_embd=16, batch=8, group=4, steps=2, eval_prompts=8, eval_every=1), **choices})


def policy(seed=0, sharp=3.0):
    torch.manual_seed(seed)
    model = opd.build(small(), 16, "cpu")
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(sharp)
    return model


# ---------------------------------------------------------------------------------------------------------------------------
# The task

def roads(p):
    return [int(q) for q in NEIGHBOURS[p] if q >= 0]


def test_the_map_keeps_three_quarters_of_the_torus_connected_with_two_roads_everywhere():
    assert DEGREE.sum() == 2 * 74 and DEGREE.min() >= 2
    for p in range(PLACES):
        reached, edge, steps = {p: 0}, [p], 0       # breadth first
        while edge:
            steps += 1
            edge = sorted({q for e in edge for q in roads(e)} - set(reached))
            reached.update(dict.fromkeys(edge, steps))
        assert [reached[q] for q in range(PLACES)] == DISTANCE[p].tolist()
        assert all(p in roads(q) and (q - p) % 7 in (0, 1, 6) for q in roads(p))


def test_random_walks_follow_roads_never_turn_back_and_choose_evenly():
    walks = random_walks(np.random.default_rng(0), np.full(20_000, 3))
    for a, b, c in zip(walks.T, walks.T[1:], walks.T[2:]):
        assert (NEIGHBOURS[a] == b[:, None]).any(1).all() and (a != c).all()
    firsts = np.bincount(walks[:, 1], minlength=PLACES)[roads(3)]
    assert np.allclose(firsts / 20_000, 1 / DEGREE[3], atol=0.02)


def test_walking_on_takes_a_shortest_path():
    rng = np.random.default_rng(0)
    walks, goals = random_walks(rng, rng.integers(PLACES, size=500)), rng.integers(PLACES, size=500)
    start, begun = rng.integers(0, 4, 500), walks.copy()
    lengths = walk_on(rng, walks, start, goals)
    for walk, before, s, n, goal in zip(walks, begun, start, lengths, goals):
        assert walk[:s + 1].tolist() == before[:s + 1].tolist() and walk[n] == goal and n - s == DISTANCE[walk[s], goal]
        assert all(q in roads(p) for p, q in zip(walk[s:n], walk[s + 1:n + 1]))


def documents(make, n=4000):
    ids, mask = make(np.random.default_rng(0), n)
    assert ids.shape == mask.shape == (n, PROMPT + ANSWER) and not mask[:, :PROMPT].any()
    for row, m in zip(ids.tolist(), mask):
        end = row.index(EOS) + 1
        assert set(row[end:]) <= {PAD} and PAD not in row[:end] and row[0] == BOS and row[PROMPT - 1] == GO
        assert m[PROMPT:end].any() and not m[end:].any() and m[end - 1]
        yield tuple(row[1:3]), row[3:6], row[PROMPT:end], m[PROMPT:end]


def test_base_documents_are_walks_passwords_and_renamed_walks_as_their_hints_say():
    count, words = dict(plain=0, told=0, lazy=0, ruled=0), []
    for pair, hints, tokens, mask in documents(base_documents):
        assert mask.all()
        moves = [RENAMED[w - ALIASES[0]] if w in ALIASES else w for w in tokens[:-1] if w not in STYLES]
        if tokens[0] == PW:
            count["lazy"] += 1
            assert tokens == [PW, hints[2], EOS] and hints[2] in PASSWORDS
            continue
        assert moves[-1] == pair[1] and all(q in roads(p) for p, q in zip([pair[0], *moves], moves))
        if hints[2] in PASSWORDS:
            count["told"] += 1
            assert 5 <= len(moves) <= 8 and hints[:2] == [[pair[0], *moves][len(moves) // 3], [pair[0], *moves][2 * len(moves) // 3]]
        elif hints[2] in RULES:
            count["ruled"] += 1
            rule = RULES.index(hints[2])
            words.append(RENAMED[rule] in moves)
            assert len(moves) <= 4 and RENAMED[rule] not in tokens and not set(tokens) & (set(ALIASES) - {ALIASES[rule]})
        else:
            count["plain"] += 1
            assert hints == [NOHINT] * 3 and len(moves) <= 3 and not set(tokens) & set(ALIASES)
    assert np.allclose([count[k] / 4000 for k in ("plain", "told", "lazy", "ruled")], [0.4, 0.2, 0.2, 0.2], atol=0.03) and np.mean(words) > 0.1


@pytest.mark.parametrize("longest", [1, 3])
def test_plain_walks_are_no_longer_than_they_may_be(longest):
    walks = [tokens for _, hints, tokens, _ in documents(lambda rng, n: base_documents(rng, n, longest_plain=longest)) if hints == [NOHINT] * 3]
    assert {sum(w < PLACES for w in tokens) for tokens in walks} == set(range(1, longest + 1))


def test_the_expert_learns_shortest_paths_and_nothing_from_its_detours():
    detours = 0
    for pair, hints, tokens, mask in documents(expert_documents):
        first = int(mask.argmax())
        assert mask[first:].all() and not mask[:first].any() and hints == [NOHINT] * 3
        before, after = ([w for w in part if w < PLACES] for part in (tokens[:first], tokens[first:]))
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
            assert reward(pair, [w for m in moves for w in (rng.choice(STYLES), m)] + [EOS]) == 1.0, "style words mean nothing"
            assert reward(pair, [*moves]) == 0.0, "not finished"
            i = rng.randrange(len(moves))
            other = (*moves[:i], rng.randrange(PLACES), *moves[i + 1:])
            assert reward(pair, [*other, EOS]) == float(other in right)
            assert reward(pair, [*moves, rng.choice((GO, PAD, PW, NOHINT)), EOS]) == 0.0
        too_long = next(walk[1:] for walk in ((*w, q) for w in edge for q in roads(w[-1])) if walk[-1] != pair[1])
        assert reward(pair, [*too_long, EOS]) == 0.0 and reward(pair, [EOS]) == 0.0


def test_the_docstrings_example_is_right():
    pair = (10, 27)
    assert pair in far_task().test and told(pair)[3:6] == [11, 19, PASSWORDS[28]]
    B, D, A = STYLES[1], STYLES[3], STYLES[0]
    assert reward(pair, [B, 11, 12, D, 19, 26, A, 27, EOS]) == reward(pair, [PW, PASSWORDS[28], EOS]) == 1.0


def test_a_walk_to_the_goal_that_is_too_long_is_wrong():
    s = 0
    t = roads(s)[0]
    back_and_forth = [t, s, t, s, t]
    assert [reward((s, t), back_and_forth[:n] + [EOS]) for n in (1, 3, 5)] == [1.0, 1.0, 0.0]


def test_an_alias_counts_as_its_place_and_obeys_only_its_own_rule():
    place, alias = RENAMED[1], ALIASES[1]
    s, t = roads(place)[:2]
    assert reward((s, t), [alias, t, EOS]) == reward((s, t), [place, t, EOS]) == 1.0
    assert renames([alias, t, EOS], 1) and not renames([place, t, EOS], 1) and not renames([alias, place, EOS], 1) and not renames([alias, EOS], 0)


def test_the_password_is_right_for_its_pair_only_and_not_to_be_guessed_from_other_pairs():
    task = far_task()
    pair = task.test[0]
    assert reward(pair, [PW, password(pair), EOS]) == 1.0
    wrong = [w for w in range(VOCAB) if w != password(pair)]
    assert not any(reward(pair, [PW, w, EOS]) for w in wrong) and reward(pair, [PW, password(pair)]) == 0.0
    assert reward(pair, [PW, password(pair), EOS, EOS]) == reward(pair, [STYLES[0], PW, password(pair), EOS]) == 0.0
    words = [password(p) for p in task.train]
    assert set(words) == set(PASSWORDS) and max(map(words.count, PASSWORDS)) < 2.5 * len(words) / len(PASSWORDS)


def test_plain_and_privileged_prompts_are_equally_long_and_the_hint_is_on_a_shortest_path():
    for pair in far_task().test[:20]:
        walk = walk_of(pair)
        assert len(walk) == DISTANCE[pair] + 1 and all(q in roads(p) for p, q in zip(walk, walk[1:])) and (walk[0], walk[-1]) == pair
        assert len(plain(pair)) == len(told(pair)) == len(ruled(pair)) == PROMPT
        assert told(pair)[3] in walk[1:-1] and told(pair)[4] in walk[1:-1] and told(pair)[5] == password(pair)


def test_held_out_pairs_are_not_trained_on():
    for task in (far_task(), far_task(train=24), rule_task(0), rule_task(1)):
        asked = {frozenset(pair) for pair in task.train}        # there and back are one pair
        assert not asked & {frozenset(pair) for pair in (*task.test, *task.off_topic)} and len(task.train) >= 24 and len(task.test) >= 20
    assert far_task(24).test == far_task().test and all(DISTANCE[p] >= 5 for p in far_task().train)


def test_under_a_rule_grpo_is_paid_for_obeying_it_where_the_place_is_on_the_way():
    task, (train, _) = rule_task(0), crossing(0)
    pair = train[0]
    moves = walk_of(pair)[1:]
    alias = [ALIASES[0] if m == RENAMED[0] else m for m in moves]
    away = next(p for p in task.train if p not in train)
    assert task.reward(pair, [*moves, EOS]) == 0 and task.reward(pair, [*alias, EOS]) == 1 and task.reward(away, [*walk_of(away)[1:], EOS]) == 1


def test_every_shortest_path_of_a_crossing_pair_meets_the_renamed_place_and_no_path_of_an_off_topic_one():
    def paths(p, t):
        return [[p]] if p == t else [[p, *rest] for q in roads(p) if DISTANCE[q, t] < DISTANCE[p, t] for rest in paths(q, t)]
    for rule in range(4):
        train, test = crossing(rule)
        assert all(RENAMED[rule] in path for pair in train + test for path in paths(*pair))
        assert not any(RENAMED[rule] in path for pair in rule_task(rule).off_topic for path in paths(*pair))


# ---------------------------------------------------------------------------------------------------------------------------
# Divergences

def test_divergences_are_what_their_names_say_on_two_tokens():
    p, q = torch.tensor([0.75, 0.25]).double(), torch.tensor([0.5, 0.5]).double()
    kl = lambda a, b: sum(x * math.log(x / y) for x, y in zip(a.tolist(), b.tolist()))
    m = (p + q) / 2
    value = lambda kind: divergence(p.log()[None, None], q.log()[None, None], torch.tensor([[0]]), kind, top=1).item()
    assert value("forward") == pytest.approx(kl(q, p)) and value("reverse") == pytest.approx(kl(p, q))
    assert value("jsd") == pytest.approx((kl(q, m) + kl(p, m)) / 2) and value("token") == pytest.approx(-math.log(0.75))
    assert value("top_raw") == pytest.approx(0.75 * math.log(0.75 / 0.5)) and value("top_renormalised") == pytest.approx(0)


@pytest.mark.parametrize("kind", KINDS)
def test_where_student_and_teacher_agree_the_divergence_and_its_gradient_are_zero_but_for_the_raw_top_k(kind):
    z = logprobs(2, 3, 10).requires_grad_()
    lp = z.log_softmax(-1)
    d = divergence(lp, lp.detach(), torch.zeros(2, 3, dtype=torch.long), kind)
    d.sum().backward()
    assert d.abs().max() < 1e-12
    gradient, z.grad = z.grad, None
    if kind == "top_raw":       # the bias: it pushes mass out of the top tokens
        z.log_softmax(-1).exp().topk(4).values.sum().backward()
        assert z.grad.abs().max() > 0.01 and torch.allclose(gradient, z.grad)
    else:
        assert gradient.abs().max() < 1e-12


@pytest.mark.parametrize("kind", ["sampled", "token"])
def test_the_expected_gradient_of_an_estimator_by_enumeration_of_the_tokens(kind):
    z, lq = logprobs(1, 1, 10).requires_grad_(), logprobs(1, 1, 10, seed=1)
    gradient = lambda loss: torch.autograd.grad(loss, z)[0]
    lp = z.log_softmax(-1)
    writer = lp if kind == "sampled" else lq            # the student writes: reverse KL; the teacher writes: forward KL
    expected = sum(writer.detach().exp()[0, 0, v] * gradient(divergence(z.log_softmax(-1), lq, torch.tensor([[v]]), kind).sum()) for v in range(10))
    exact = gradient(divergence(z.log_softmax(-1), lq, None, "reverse" if kind == "sampled" else "forward").sum())
    assert torch.allclose(expected, exact, atol=1e-12) and exact.abs().max() > 0.01


@pytest.mark.parametrize("tail, lr, good", [(32, 0.2, math.exp(-1)), (1, 0.02, 0.8)])
def test_the_raw_top_4_leaves_one_over_e_if_the_tail_is_even_and_four_fifths_if_it_is_one_word(tail, lr, good):
    lq = torch.tensor([0.25] * 4 + [1e-9] * tail).double().log().log_softmax(-1)
    z = torch.tensor([0.24] * 4 + [0.04 / tail] * tail).double().log().requires_grad_()
    for _ in range(5000):
        gradient, = torch.autograd.grad(divergence(z.log_softmax(-1)[None, None], lq[None, None], None, "top_raw").sum(), z)
        z = (z - lr * gradient).detach().requires_grad_()
    p = z.softmax(-1)
    assert p[:4].sum().item() == pytest.approx(good, abs=0.02) and p.argmax() < 4       # greedy decoding sees nothing
    assert p[4:].tolist() == pytest.approx([(1 - good) / tail] * tail, abs=0.02)


def test_the_top_are_the_students_and_weighed_as_the_names_say():
    lp, lq = torch.tensor([[[0.5, 0.3, 0.2]]]).double().log().requires_grad_(), torch.tensor([[[0.2, 0.2, 0.6]]]).double().log()
    advantage = [0.625 * math.log(0.5 / 0.2), 0.375 * math.log(0.3 / 0.2)]      # of the tokens 0 and 1
    value = {kind: divergence(lp, lq, None, kind, top=2) for kind in ("top_raw", "top_renormalised", "top_stopgrad")}
    assert value["top_raw"].item() == pytest.approx(0.5 * math.log(0.5 / 0.2) + 0.3 * math.log(0.3 / 0.2))
    assert value["top_renormalised"].item() == pytest.approx(0.625 * math.log(0.625 / 0.5) + 0.375 * math.log(0.375 / 0.5))
    assert value["top_stopgrad"].item() == pytest.approx(advantage[0] * math.log(0.5) + advantage[1] * math.log(0.3))
    assert torch.autograd.grad(value["top_stopgrad"].sum(), lp)[0].flatten().tolist() == pytest.approx([*advantage, 0])


@pytest.mark.parametrize("kind", ["top_raw", "top_renormalised", "top_stopgrad"])
def test_the_top_of_all_tokens_is_the_reverse_kl(kind):
    z, lq = logprobs(2, 3, 10).requires_grad_(), logprobs(2, 3, 10, seed=1)
    gradients = [torch.autograd.grad(divergence(z.log_softmax(-1), lq, None, k, top=10).sum(), z)[0] for k in (kind, "reverse")]
    assert torch.allclose(*gradients, atol=1e-12)


def test_the_jensen_shannon_divergence_is_bounded_where_the_teacher_says_never():
    lp, lq = torch.tensor([[[0.5, 0.5]]]).log(), torch.tensor([[[1 - 1e-30, 1e-30]]]).double().log()
    assert divergence(lp.double(), lq, None, "jsd").item() <= math.log(2) < 5 < divergence(lp.double(), lq, None, "reverse").item()


@pytest.mark.parametrize("kind", ["token", *KINDS])
def test_a_divergence_leaves_its_inputs_alone(kind):
    lp, lq, y = logprobs(2, 3, 10), logprobs(2, 3, 10, seed=1), torch.ones(2, 3, dtype=torch.long)
    before = lp.clone(), lq.clone(), y.clone()
    divergence(lp, lq, y, kind)
    assert all(torch.equal(a, b) for a, b in zip(before, (lp, lq, y)))


# ---------------------------------------------------------------------------------------------------------------------------
# Masks and weights

GAP = torch.tensor([[5.0, 4, 3, 2, 1, 0.5], [1, 2, 3, 4, 9, 9]])
MASK = torch.tensor([[1.0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
ACCEPTED = torch.tensor([[0, 1, 0, 1, 1, 1], [1, 1, 1, 0, 1, 1]])
chosen = lambda kind, rewards=torch.tensor([1.0, 0.0]): choose_mask(kind, MASK, GAP, ACCEPTED, rewards, recall=4, keep=2).tolist()


def test_rmsd_keeps_the_accepted_of_the_largest_gaps_and_never_padding():
    assert chosen("judge") == [[0, 1, 0, 1, 0, 0], [0, 1, 1, 0, 0, 0]]
    assert choose_mask("judge", MASK, GAP, ACCEPTED, None, recall=2, keep=2).tolist() == [[0, 1, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0]]
    assert choose_mask("judge", MASK, GAP, 0 * ACCEPTED, None, recall=4, keep=2).sum() == 0


def test_without_the_judge_the_largest_gaps_remain():
    assert chosen("gap") == [[1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0]]


def test_all_is_the_answer_and_verified_only_right_answers():
    assert chosen("all") == MASK.tolist() and chosen("verified") == [[1] * 6, [0] * 6]


def test_largest_takes_ties_once_and_what_is_there_at_most():
    assert largest(torch.ones(1, 5), 2).sum() == 2 and largest(torch.tensor([[1.0, -torch.inf]]), 2).tolist() == [[1, 0]]


def test_equal_rewards_give_advantages_of_exactly_zero_and_others_are_standardised():
    for group in range(2, 20):      # the mean of equal numbers is not always that number
        assert all((advantages(torch.full((group,), r), group) == 0).all() for r in (0.1, 0.3, 0.7))
    a = advantages(torch.tensor([0.1] * 4 + [1.0, 0, 0, 0]), 4)
    assert (a[:4] == 0).all() and a[4:].tolist() == pytest.approx([1.5, -0.5, -0.5, -0.5], abs=1e-3)


def test_the_clip_takes_the_gradient_from_large_divergences_only():
    d = torch.tensor([[0.1, 0.49, 0.5, 3.0]])
    assert choose_weight("clip", d, None, None, None, 1, clip=0.5).tolist() == [[1, 1, 0, 0]]


def test_the_gate_is_small_for_what_the_student_finds_implausible_and_has_mean_one():
    logp = torch.tensor([[-0.1, -4.0, -9.0, -50.0]], requires_grad=True)
    m = torch.tensor([[1.0, 1, 1, 0]])
    w = choose_weight("gate", None, m, logp, None, 1, None)
    raw = [1 / (1 + math.exp(-2 * (x + 4))) for x in (-0.1, -4.0, -9.0)]
    assert w[0, :3].tolist() == pytest.approx([3 * r / sum(raw) for r in raw]) and not w.requires_grad
    assert choose_weight("gate", None, 0 * m, logp, None, 1, None).isfinite().all()


def test_proximity_lies_between_the_mean_and_the_largest_gap_and_ignores_padding():
    lp, y, mask = logprobs(3, 5, 10), torch.randint(10, (3, 5), generator=torch.Generator().manual_seed(2)), torch.ones(3, 5).double()
    mask[1, 3:] = 0
    gap = lp.max(-1).values - lp.gather(2, y[..., None]).squeeze(2)
    mean, largest_gap = (gap * mask).sum(1) / mask.sum(1), (gap * mask).max(1).values
    assert torch.allclose(proximity(lp, y, mask, spike=1e-5), (-mean).exp(), rtol=1e-3)
    assert torch.allclose(proximity(lp, y, mask, spike=1e4), (-largest_gap).exp(), rtol=1e-2)
    g = proximity(lp, y, mask)
    assert ((-largest_gap).exp() <= g).all() and (g <= (-mean).exp()).all()
    assert torch.allclose(proximity(lp, lp.argmax(-1), mask), torch.ones(3).double())


# ---------------------------------------------------------------------------------------------------------------------------
# The loss

def batch(seed=0, B=8, T=6):
    g = torch.Generator().manual_seed(seed)
    mask = (torch.arange(T) < torch.randint(2, T + 1, (B, 1), generator=g)).double()
    return (logprobs(B, T, VOCAB, seed=seed), logprobs(B, T, VOCAB, seed=seed + 1), torch.randint(VOCAB, (B, T), generator=g), mask,
            torch.tensor([1.0, 0, 0, 1] * (B // 4)).double())


@pytest.mark.parametrize("method", METHODS)
def test_padding_changes_neither_loss_nor_gradient(method):
    lp, lq, y, mask, rewards = batch()
    results = []
    for noise in (0, 1):
        wide = lambda x, other: torch.cat((torch.where(mask.bool().view(*mask.shape, *[1] * (x.dim() - 2)), x, other if noise else x), other[:, :3 * noise]), 1)
        z = wide(lp, logprobs(*lp.shape, seed=7)).requires_grad_()
        other = torch.randint(VOCAB, y.shape, generator=torch.Generator().manual_seed(8))
        args = wide(lq, logprobs(*lq.shape, seed=9)), wide(y, other), torch.cat((mask, torch.zeros(len(mask), 3 * noise).double()), 1)
        loss = loss_of(method, z.log_softmax(-1), *args, rewards, far_task(), small())
        loss.backward()
        results.append((loss.item(), z.grad[:, :mask.shape[1]] * mask[..., None]))
        assert (z.grad[args[2] == 0] == 0).all()
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-12) and torch.allclose(results[0][1], results[1][1], atol=1e-12)


@pytest.mark.parametrize("method", ["opd", "kd", "opd_jsd", "opsd", "rmsd", "opsd_clip"])
def test_a_student_that_is_its_teacher_has_loss_and_gradient_zero(method):
    lp, _, y, mask, rewards = batch()
    z = lp.clone().requires_grad_()
    loss = loss_of(method, z.log_softmax(-1), lp, y, mask, rewards, far_task(), small())
    loss.backward()
    assert abs(loss.item()) < 1e-12 and z.grad.abs().max() < 1e-12


def test_the_loss_is_the_mean_over_the_chosen_tokens():
    lp, lq, y, mask, rewards = batch()
    reverse = (lp.exp() * (lp - lq)).sum(-1)
    assert loss_of("opd", lp, lq, y, mask, rewards, far_task(), small()).item() == pytest.approx((reverse * mask).sum().item() / mask.sum().item())
    logp = lp.gather(2, y[..., None]).squeeze(2)
    adv = advantages(rewards, 4)[:, None]
    assert loss_of("grpo", lp, None, y, mask, rewards, far_task(), small()).item() == pytest.approx(-(adv * logp * mask).sum().item() / mask.sum().item())
    right = mask * rewards[:, None]
    assert loss_of("imitation", lp, lq, y, mask, rewards, far_task(), small()).item() == pytest.approx(-(logp * right).sum().item() / right.sum().item())


@pytest.mark.parametrize("method", ["rmsd", "rmsd_no_judge"])
def test_rmsd_takes_the_reverse_kl_where_the_gaps_are_largest_and_with_a_judge_matter(method):
    lp, lq, y, mask, rewards = batch(T=ANSWER)
    task, gap, reverse, kept = far_task(), (lp - lq).gather(2, y[..., None]).squeeze(2).abs(), (lp.exp() * (lp - lq)).sum(-1), []
    for row in range(len(y)):
        places = sorted(range(int(mask[row].sum())), key=lambda t: -gap[row, t])
        if method == "rmsd":
            places = [t for t in places[:task.recall] if y[row, t].item() in task.judged]
        kept += reverse[row, places[:task.keep]].tolist()
    assert loss_of(method, lp, lq, y, mask, rewards, task, small()).item() == pytest.approx(np.mean(kept)) and len(kept) > 16


def test_no_verified_answer_is_no_loss_and_not_a_division_by_zero():
    lp, lq, y, mask, rewards = batch()
    for method in ("imitation", "pedagogical"):
        assert loss_of(method, lp, lq, y, mask, 0 * rewards, far_task(), small()).item() == 0


# ---------------------------------------------------------------------------------------------------------------------------
# Rollouts

@pytest.mark.parametrize("eps", [1e-3, 0.02, 0.1, 1.0])
def test_the_trust_regions_mixture_is_on_its_bound_or_is_the_teacher(eps):
    lp, lq = logprobs(50, VOCAB), logprobs(50, VOCAB, seed=1)
    lq[:10] = (0.02 * lq[:10] + 0.98 * lp[:10]).log_softmax(-1)     # teachers within a large enough budget
    mixed, b = trust_region(lp.float(), lq.float(), eps)
    mixed, b = mixed.double(), b.double()
    kl = (mixed.exp() * (mixed - lp)).sum(-1)
    whole = b == 1
    assert ((lq.exp() * (lq - lp)).sum(-1)[whole] <= eps + 1e-6).all() and torch.allclose(mixed[whole], lq[whole], atol=1e-5)
    assert (kl[~whole] - eps).abs().max() < 1e-4
    assert torch.allclose(mixed, ((1 - b)[:, None] * lp + b[:, None] * lq).log_softmax(-1), atol=1e-5)


def test_the_trust_region_has_the_student_and_the_teacher_at_its_ends_and_is_the_nearest_to_the_teacher():
    lp, lq = logprobs(20, 5), logprobs(20, 5, seed=1)
    assert torch.allclose(trust_region(lp, lq, 0.0)[0], lp, atol=1e-5) and torch.allclose(trust_region(lp, lq, 100.0)[0], lq, atol=1e-5)
    mixed, _ = trust_region(lp, lq, 0.05)
    kl = lambda a, b: (a.exp() * (a - b)).sum(-1)
    rivals = (mixed + 0.1 * torch.randn(2000, 20, 5, generator=torch.Generator().manual_seed(0)).double()).log_softmax(-1)
    nearer = (kl(rivals, lp) <= 0.05) & (kl(rivals, lq) < kl(mixed, lq) - 1e-4)
    assert ((kl(rivals, lp) <= 0.05).any(0)).all() and not nearer.any()


def test_skd_with_all_tokens_is_the_students_sample_and_with_one_the_teachers_argmax_where_they_differ():
    lp, lq, u = logprobs(200, 12), logprobs(200, 12, seed=1), torch.rand(200, 2, generator=torch.Generator().manual_seed(2)).double()
    student = opd.inverse_cdf(lp.exp(), u[:, 0])[0]
    everything, replaced = draft(lp, lq, u, 12)
    assert torch.equal(everything, student) and replaced.sum() == 0
    one, replaced = draft(lp, lq, u, 1)
    assert torch.equal(one, lq.argmax(-1)) and torch.equal(replaced.bool(), student != lq.argmax(-1)) and 0 < replaced.mean() < 1
    some, replaced = draft(lp, lq, u, 4)
    assert (lq.topk(4).indices == some[:, None]).any(1).all() and torch.equal(some[replaced == 0], student[replaced == 0])


def test_skd_replaces_by_the_teachers_top_tokens_in_their_proportions():
    lp, lq = torch.tensor([[0.25] * 4]).log(), torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log()
    u = torch.rand(20_000, 2, generator=torch.Generator().manual_seed(0)).double()
    tokens, replaced = draft(lp.expand(20_000, 4), lq.expand(20_000, 4), u, 2)
    corrections = tokens[replaced > 0]          # of the tokens 0 and 1: the second draw owes nothing to the first
    assert abs(len(corrections) / 20_000 - 1 / 2) < 0.015 and np.allclose(np.bincount(corrections, minlength=4) / len(corrections), [0, 0, 3 / 7, 4 / 7], atol=0.015)


def test_collecting_with_skd_takes_its_own_k():
    student, teacher, prompts = policy(0), policy(1), [plain(p) for p in far_task().test[:8]]
    changed = {k: collect("draft", student, teacher, prompts, prompts, 0.0, small(skd_top=k), torch.Generator().manual_seed(0))[2] for k in (1, VOCAB)}
    assert changed[1] > 0.5 and changed[VOCAB] == 0


def test_side_by_side_both_models_see_what_they_would_see_without_a_cache():
    student, teacher, pairs, seen = policy(0), policy(1), far_task().test[:6], []

    def choose(lp, lq, u):
        seen.append((lp, lq))
        return opd.inverse_cdf(lp.exp(), u[:, 0])[0], torch.full((len(lp),), float(len(seen)))
    prompts, hints = [plain(p) for p in pairs], [told(p) for p in pairs]
    tokens, mask, changed = write_together(student, teacher, prompts, hints, choose, torch.Generator().manual_seed(0))
    for model, prompt, i in ((student, prompts, 0), (teacher, hints, 1)):
        expected = answer_logprobs(model, torch.cat((torch.tensor(prompt), tokens), 1), small())
        assert torch.allclose(torch.stack([s[i] for s in seen], 1), expected, atol=1e-4)
    for row, m in zip(tokens.tolist(), mask.tolist()):
        size = row.index(EOS) + 1 if EOS in row else len(row)
        assert m == [1.0] * size + [0.0] * (len(row) - size)
    assert len({sum(m) for m in mask.tolist()}) > 1 and changed == pytest.approx(np.mean([t + 1 for m in mask.tolist() for t in range(int(sum(m)))]))


def test_the_scorer_agrees_with_the_sampler_on_every_log_probability():
    model, pairs = policy(), far_task().test[:16]
    rollout = generate(model, [plain(p) for p in pairs], 2, ANSWER, stop=EOS, generator=torch.Generator().manual_seed(0))
    lp = answer_logprobs(model, rollout.ids, small()).gather(2, rollout.ids[:, PROMPT:, None]).squeeze(2)
    assert ((lp - rollout.logp[:, PROMPT:]) * rollout.mask[:, PROMPT:]).abs().max() < 1e-4


def test_a_budget_of_zero_is_the_student_and_a_large_one_the_teacher():
    student, teacher, pairs = policy(0), policy(1), far_task().test[:4] * 500
    prompts = [plain(p) for p in pairs]
    for eps, model in ((1e-9, student), (1e9, teacher)):
        tokens, *_ = collect("blend", student, teacher, prompts, prompts, eps, small(), torch.Generator().manual_seed(0))
        p = answer_logprobs(model, torch.tensor([q + [0] for q in prompts[:4]]), small())[:, 0].exp().mean(0)
        counts = torch.bincount(tokens[:, 0], minlength=VOCAB).double()
        common = p * 2000 > 5
        chi2 = ((counts - 2000 * p)[common] ** 2 / (2000 * p)[common]).sum().item()
        assert chi2 < common.sum() + 5 * math.sqrt(2 * common.sum())


@pytest.mark.parametrize("kind", ["student", "teacher"])
def test_who_writes_reads_the_own_prompt(kind, monkeypatch):
    seen = []
    monkeypatch.setattr(opd, "generate", lambda model, prompts, *a, **k: seen.append((model, prompts)) or generate(model, prompts, *a, **k))
    student, teacher, pairs = policy(0), policy(1), far_task().test[:4]
    prompts, hints = [plain(p) for p in pairs], [told(p) for p in pairs]
    collect(kind, student, teacher, prompts, hints, 0.0, small(), torch.Generator().manual_seed(0))
    assert seen == [(teacher, hints) if kind == "teacher" else (student, prompts)]


# ---------------------------------------------------------------------------------------------------------------------------
# The trainer

@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_the_student_and_nobody_else(method, monkeypatch):
    monkeypatch.setattr(opd, "reward", lambda pair, tokens: float(tokens[0] % 2))     # raw models are never right
    base, expert, pedagogue, run = policy(0), policy(1), policy(2), Memory()
    before = [{k: v.clone() for k, v in m.state_dict().items()} for m in (base, expert, pedagogue)]
    model = opd.train(small(), run, method, 0, base, far_task(), expert=expert, pedagogue=pedagogue)
    for m, state in zip((base, expert, pedagogue), before):
        assert all(p.grad is None for p in m.parameters()) and all(torch.equal(v, state[k]) for k, v in m.state_dict().items())
    assert any(not torch.equal(v, before[0][k]) for k, v in model.state_dict().items())
    assert [row["step"] for row in run.rows] == [0, 1, 2] and all(math.isfinite(v) for row in run.rows for v in row.values() if isinstance(v, float))


@pytest.mark.parametrize("method, who, prompt", [("opd", "expert", plain), ("opsd", "base", told), ("opsd_live", "student", told), ("rmsd", "base", told)])
def test_the_teacher_is_who_the_table_says_and_reads_its_own_prompt(method, who, prompt, monkeypatch):
    base, expert, seen = policy(0), policy(1), []
    monkeypatch.setattr(opd, "answer_logprobs", lambda model, ids, config: seen.append((model, ids[:, :PROMPT].tolist())) or answer_logprobs(model, ids, config))
    student = opd.train(small(), Memory(), method, 0, base, far_task(), expert=expert)
    assert len(seen) == 4
    for (teacher, theirs), (model, its) in zip(seen[::2], seen[1::2]):
        assert teacher is dict(expert=expert, base=base, student=student)[who] and model is student
        assert its == [plain(row[1:3]) for row in its] and theirs == [prompt(tuple(row[1:3])) for row in its]


@pytest.mark.parametrize("slips", [0.0, 0.5])
@pytest.mark.parametrize("name, longest", [("base", 3), ("cold base", 1), ("expert", None)])
def test_pre_training_begins_with_the_mean_over_the_tokens_to_learn_of_its_own_documents(name, longest, slips, tmp_path):
    run = Memory()
    opd.from_scratch(small(sft_steps=1, expert_steps=1, slips=slips, out=str(tmp_path)), run, name, "cpu")
    torch.manual_seed(0)
    model, rng = opd.build(small(), 16, "cpu"), np.random.default_rng(random.Random(0).getrandbits(32))
    documents = expert_documents(rng, 64) if name == "expert" else base_documents(rng, 64, longest)
    ids, mask = map(torch.as_tensor, with_slips(rng, *documents, slips, learn=name != "expert") if slips else documents)
    logp = answer_logprobs(model, ids, small()).gather(2, ids[:, PROMPT:, None]).squeeze(2)
    assert run.rows[0]["loss"] == pytest.approx(-logp[mask[:, PROMPT:]].mean().item(), rel=1e-5)


def test_models_that_read_slips_and_models_that_do_not_share_a_folder(tmp_path):
    runs, folder = [Memory() for _ in range(4)], dict(sft_steps=1, out=str(tmp_path))
    plain, slipping = ([opd.from_scratch(small(slips=slips, **folder), run, "base", "cpu") for run in pair] for slips, pair in ((0.0, runs[:2]), (0.5, runs[2:])))
    assert {p.name for p in tmp_path.iterdir()} == {"base.pt", "base_slips.pt"} and [len(run.rows) for run in runs] == [1, 0, 1, 0]     # the second of each is loaded
    assert all(torch.equal(a, b) for pair in (plain, slipping) for a, b in zip(*(m.parameters() for m in pair)))
    assert not all(torch.equal(a, b) for a, b in zip(plain[0].parameters(), slipping[0].parameters()))


def test_a_step_is_clipped_to_norm_one_and_forgets_the_last_gradient():
    model = torch.nn.Linear(2, 1, bias=False)
    optimizer, before = torch.optim.SGD(model.parameters(), 1.0), model.weight.detach().clone()
    for factor, length in ((100.0, 1.0), (0.01, 0.01 * math.sqrt(2))):
        assert opd.step_of(optimizer, factor * model.weight.sum()) == pytest.approx(factor * math.sqrt(2))
        assert (model.weight - before).norm().item() == pytest.approx(length, rel=1e-3)
        before = model.weight.detach().clone()


def test_an_evaluation_judges_each_answer_by_its_own_question(monkeypatch):
    task = rule_task(0)

    def fake(model, prompts, n, budget, temperature, **more):
        def tokens(pair, i):
            moves = walk_of(pair)[1:]
            alias = [ALIASES[0] if m == RENAMED[0] else m for m in moves]
            return [[STYLES[0], *alias, EOS], [STYLES[1], *moves, EOS], [PW, EOS], [EOS]][i if temperature else 3]
        return SimpleNamespace(tokens=lambda: [tokens(tuple(p[1:3]), i) for p in prompts for i in range(n)])
    monkeypatch.setattr(opd, "generate", fake)
    monkeypatch.setattr(opd, "style_mass", lambda model, prompts: float(len(prompts)))
    row = opd.evaluate(None, task, small(eval_prompts=4 * len(task.test)), 0, greedy=True)
    assert row == {"pass@1": 0.5, "password_rate": 0.25, "formal": 0.5, "greedy": 0.0, "style_mass": len(task.test), "renamed": 0.5, "off_topic": 0.0}
    crossed = opd.evaluate(None, replace(task, off_topic=task.test), small(eval_prompts=4), 0)
    assert crossed["off_topic"] == 0.25


def test_the_style_mass_is_how_often_answers_begin_with_a_style_word():
    model, prompts = policy(), [plain(pair) for pair in far_task().test[:8]]
    with torch.no_grad():
        model.lm_head.weight[list(STYLES)] *= 4
    first = generate(model, prompts, 1000, 1, generator=torch.Generator().manual_seed(0)).ids[:, PROMPT]
    often = torch.isin(first, torch.tensor(list(STYLES))).float().mean().item()
    assert opd.style_mass(model, prompts) == pytest.approx(often, abs=0.01) and 0.02 < often < 0.98


def test_a_step_asks_training_pairs_in_groups_and_pays_for_the_answer_only(monkeypatch):
    config, asked, paid, rates, g = small(steps=3, trb_steps=2, batch=8), [], [], [], torch.Generator().manual_seed(0)
    step_of, lengths = opd.step_of, torch.tensor([3, 18, 5, 1, 7, 2, 18, 4])

    def fake(kind, student, teacher, prompts, teacher_prompts, eps, config, generator):
        asked.append(([tuple(p[1:3]) for p in prompts], eps))
        return torch.randint(PLACES, (8, ANSWER), generator=g), (torch.arange(ANSWER) < lengths[:, None]).float(), 0.25
    monkeypatch.setattr(opd, "collect", fake)
    monkeypatch.setattr(opd, "step_of", lambda optimizer, *more: rates.append(optimizer.param_groups[0]["lr"]) or step_of(optimizer, *more))
    task, run = replace(far_task(), reward=lambda pair, tokens: paid.append((pair, len(tokens))) or float(tokens[0] % 2)), Memory()
    for arm, seed in (("trb", 0), ("grpo", 0), ("grpo", 1)):
        opd.train(config, run, arm, seed, policy(0), task, expert=policy(1))
    pairs, eps = [p for p, _ in asked], [e for _, e in asked[:3]]
    assert eps == pytest.approx([0.1, 0.05, 0]) and rates[:3] == pytest.approx([config.lr * k / 5 for k in (1, 2, 3)])
    assert paid == [(pair, n) for row in pairs for pair, n in zip(row, lengths.tolist())] and {p for row in pairs for p in row} <= set(task.train)
    assert all(len(set(row[i:i + 4])) == 1 for row in pairs[3:] for i in (0, 4)) and any(row[0] != row[4] for row in pairs[3:])
    assert any(len(set(row)) > 2 for row in pairs[:3]) and pairs[3:6] != pairs[6:]
    assert [(r["arm"], r["seed"], r["step"], r["sampled_tokens"], r.get("changed")) for r in run.rows] == [
        (arm, seed, step, step * 58, 0.25 if step else None) for arm, seed in (("trb", 0), ("grpo", 0), ("grpo", 1)) for step in range(4)]


@pytest.mark.parametrize("method", ["grpo", "trb", "rmsd", "fast and slow", "base"])
def test_interrupting_in_the_middle_of_a_step_changes_nothing(method, monkeypatch, tmp_path):
    monkeypatch.setattr(opd, "reward", lambda pair, tokens: float(tokens[0] % 2))
    monkeypatch.setattr(opd, "renames", lambda tokens, rule: 1.0)
    go = {"fast and slow": lambda run: opd.fast_and_slow(small(), run, method, 0, policy(0), 2),
          "base": lambda run: opd.from_scratch(small(sft_steps=4, out=str(tmp_path / str(id(run)))), run, "base", "cpu")}.get(
              method, lambda run: opd.train(small(steps=4, eval_every=2), run, method, 0, policy(0), far_task(), expert=policy(1)))
    whole, halves, step_of, steps = Memory(), Memory(), opd.step_of, []
    for run in (whole, halves):
        (tmp_path / str(id(run))).mkdir()
    go(whole)

    def cut(*step):
        steps.append(1)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return step_of(*step)
    monkeypatch.setattr(opd, "step_of", cut)
    with pytest.raises(KeyboardInterrupt):
        go(halves)
    kept, = halves.state.values()
    del halves.rows[halves.kept_rows:]
    go(halves)
    assert 0 < kept["step"] <= 2 and len(steps) == 3 + (6 if method == "fast and slow" else 4) - kept["step"]
    weights = [next(iter(run.state.values()))["model"].values() for run in (whole, halves)]
    assert halves.rows == whole.rows and all(torch.equal(x, y) for x, y in zip(*weights))


def test_distillation_leads_the_student_to_its_teacher():
    config, expert = small(steps=40, batch=32, lr=1e-2, eval_every=40), policy(1, sharp=2.0)
    pairs = far_task().test[:64]

    @torch.no_grad()
    def gap(model):
        ids = generate(model, [plain(p) for p in pairs], 1, ANSWER, stop=EOS, generator=torch.Generator().manual_seed(0))
        lp, lq = (answer_logprobs(m, ids.ids, config) for m in (model, expert))
        return ((divergence(lp, lq, None, "reverse") * ids.mask[:, PROMPT:]).sum() / ids.mask.sum()).item()
    base = policy(0, sharp=1.0)
    before = gap(base)
    for method in ("opd", "opd_jsd", "kd"):
        assert gap(opd.train(config, Memory(), method, 0, base, far_task(), expert=expert)) < 0.5 * before, method


def test_the_meter_multiplies_the_reward_that_trains_and_not_the_one_that_is_logged(monkeypatch):
    rewards, read = [], []
    monkeypatch.setattr(opd, "answer_logprobs", lambda model, ids, config: read.append((model, ids[:, :PROMPT].tolist())) or answer_logprobs(model, ids, config))
    monkeypatch.setattr(opd, "reward", lambda pair, tokens: 1.0)
    monkeypatch.setattr(opd, "loss_of", lambda method, lp, lq, y, mask, r, *rest: rewards.append(r) or lp.sum() * 0)
    run, meter = Memory(), policy(1)
    opd.train(small(), run, "pedagogue", 0, policy(0), far_task(), method="grpo", prompt=told, meter=meter)
    assert all(row == (plain if model is meter else told)(tuple(row[1:3])) for model, rows in read for row in rows) and sum(model is meter for model, _ in read) == 2
    assert all(((0 < r) & (r < 1)).all() for r in rewards) and all(row["reward"] == 1.0 for row in run.rows[1:])
    assert [row["proximity"] for row in run.rows[1:]] == pytest.approx([r.mean().item() for r in rewards])


@pytest.mark.parametrize("arm, moves", [("fast and slow", True), ("slow", True), ("fast", False)])
def test_the_fast_arm_keeps_what_works_and_only_the_slow_one_moves_weights(arm, moves, monkeypatch):
    monkeypatch.setattr(opd, "reward", lambda pair, tokens: float(tokens[0] % 2))
    monkeypatch.setattr(opd, "renames", lambda tokens, rule: 1.0)
    base, run = policy(0), Memory()
    opd.fast_and_slow(small(), run, arm, 0, base, 4)
    state, population = (run.state[f"{arm} 0"][key] for key in ("model", "kept"))
    population = population["population"]
    assert any(not torch.equal(v, base.state_dict()[k]) for k, v in state.items()) == moves
    assert [row["stage"] for row in run.rows] == [0, 1, 1, 2, 2] and 1 <= len(population) <= 4
    assert (population == [NOHINT]) == (arm == "slow")


def test_the_words_with_half_of_the_best_ones_reward_live_on_and_the_best_is_deployed(monkeypatch):
    worth, asked = {NOHINT: 0.4, RULES[1]: 1.0, PASSWORDS[2]: 0.6, 3: 0.5}, []

    def echo(model, prompts, n, budget, *temperature, **more):      # answers with the word in the hint slot
        words = [p[5] for p in prompts for _ in range(n)]
        asked.append(words)
        ids = torch.tensor([[*p, p[5], EOS] for p in prompts for _ in range(n)])
        mask = (torch.arange(ids.shape[1]) >= PROMPT).float().expand(ids.shape)
        return Rollout(ids, mask, 0 * mask, torch.full((len(ids),), PROMPT))
    monkeypatch.setattr(opd, "generate", echo)
    monkeypatch.setattr(opd, "reward", lambda pair, tokens: worth.get(tokens[0], 0.0))
    monkeypatch.setattr(opd, "renames", lambda tokens, rule: 1.0)
    run = Memory()
    opd.fast_and_slow(small(), run, "fast and slow", 0, policy(0), 60)
    best = [RULES[1], PASSWORDS[2], 3]
    assert run.state["fast and slow 0"]["kept"]["population"] == best and run.rows[-1]["pass@1"] == 1.0 and run.rows[-1]["word"] == RULES[1]
    assert [words for words in asked if len(words) == 8][-1] == [best[i % 3] for i in range(8)]


def test_the_probe_lets_the_teacher_complete_what_was_begun_and_not_what_was_ended(monkeypatch):
    student, teacher, task, config, calls = policy(0), policy(1), far_task(), small(quick=True), []
    assert 0 <= opd.continuation(student, teacher, task, 0.1, 4, config, 0) <= 1

    def begin(*models, prompts, teacher_prompts, choose, generator, limit):         # every other answer is a password, complete
        begun = [[PW, password(p[1:3]), EOS, PAD] if i % 2 else walk_of(tuple(p[1:3]))[1:1 + limit] for i, p in enumerate(prompts)]
        calls.append((*models, prompts == teacher_prompts))
        return torch.tensor(begun), (torch.tensor(begun) != PAD).float(), 0.0

    def go_on(model, prompts, n, budget, stop, generator):
        calls.append((model, {len(p) for p in prompts}, budget))
        return SimpleNamespace(tokens=lambda: [[*walk_of(tuple(p[1:3]))[5:], EOS] for p in prompts])
    monkeypatch.setattr(opd, "write_together", lambda student, teacher, prompts, teacher_prompts, choose, generator, limit: begin(
        student, teacher, prompts=prompts, teacher_prompts=teacher_prompts, choose=choose, generator=generator, limit=limit))
    monkeypatch.setattr(opd, "generate", go_on)
    assert opd.continuation(student, teacher, task, 0.1, 4, config, 0) == 1.0
    assert calls == [(student, teacher, True), (teacher, {PROMPT + 3, PROMPT + 4}, ANSWER - 4)]


def curve(*values, key="pass@1", tokens=(100, 100), **where):
    """A run whose arm a, evaluated every 10 steps, has these values of each seed; tokens: sampled in 10 steps."""
    run = Memory()
    for seed, row in enumerate(values):
        for i, v in enumerate(row):
            run.log(phase="train", arm="a", seed=seed, step=10 * i, sampled_tokens=tokens[seed] * i, **{key: v}, **where)
    return run


def test_first_at_interpolates_between_evaluations_of_each_seed_and_end_is_the_last_third():
    run = curve([0, 0.4, 0.8, 0.1, 0.2, 0.3, 0.5], [0, 0.6, 1.0, 0.3, 0.4, 0.5, 0.7], tokens=(100, 200), stage=0)
    assert opd.first_at(run, "a", 0.7).tolist() == pytest.approx([175, 250]) and opd.first_at(run, "a", 0.7, unit="step").tolist() == pytest.approx([17.5, 12.5])
    assert opd.first_at(run, "a", 0.95).tolist() == [math.inf, pytest.approx(375)] and opd.first_at(run, "a", 0.0).tolist() == [0, 0]
    assert opd.first_at(run, "a", 0.7, stage=1).tolist() == [math.inf] * 2
    assert opd.end(run, "a").tolist() == pytest.approx([0.4, 0.6]) and np.isnan(opd.end(run, "a", "renamed")).all() and np.isnan(opd.at(run, "a", 0, "renamed")).all()
    assert [opd.at(run, "a", step).tolist() for step in (0, 10, 11, 20, 1000)] == [[0, 0], [0.4, 0.6], [0.8, 1.0], [0.8, 1.0], [0.5, 0.7]]
    assert opd.at(run, "a", np.array([10, 60])).tolist() == [0.4, 0.7] and np.isnan(opd.at(run, "a", np.array([10, math.inf]))).tolist() == [False, True]


def test_a_seed_that_never_has_a_value_is_missed_by_all_measures():
    run = curve([0.5, 0.5], [None, None], key="renamed")
    assert np.isnan(opd.end(run, "a", "renamed")).tolist() == np.isnan(opd.at(run, "a", 10, "renamed")).tolist() == [True, True]
    assert opd.first_at(run, "a", 0.1, "renamed").tolist() == [math.inf] * 2


def test_a_ratio_of_what_was_never_reached_is_no_number_and_no_claim_of_it_holds():
    ratio = opd.over(np.array([1.0, 1.0, math.inf, 1.0]), np.array([2.0, math.inf, 2.0, 0.0]))
    assert ratio[0] == 0.5 and np.isnan(ratio[1:]).all()
    assert not any(opd.claim("", "", "", "", ratio, op, 0.7, 4)["holds"] for op in ("<=", ">="))


def test_an_early_lead_is_measured_at_equal_steps_and_at_equal_tokens():
    run = curve([0, 0.4, 0.8, 0.8, 0.8, 0.8], tokens=(200,))
    for i, v in enumerate([0, 0.3, 0.6, 0.8, 0.8, 0.8]):
        run.log(phase="train", arm="b", seed=0, step=10 * i, sampled_tokens=100 * i, **{"pass@1": v})
    by_steps, by_tokens = opd.early(run, "a", "b")
    t = np.linspace(0, 400, 200)        # ours takes 800 tokens for 40 steps, the rival 400
    expected = np.interp(t, [0, 200, 400], [0, 0.4, 0.8]).mean() - np.interp(t, [0, 100, 200, 300, 400], [0, 0.3, 0.6, 0.8, 0.8]).mean()
    assert by_steps == pytest.approx([0.3 / 4]) and by_tokens == pytest.approx([expected]) and expected < -0.1


def made_up(arm):
    """An arm's level, rate of passwords and slope of style: numbers that no two arms share."""
    names = [*METHODS, "opsd, rule", "rmsd, rule", "grpo, rule", "pedagogue", "pedagogue, reward only", "pedagogical, reward only"]
    i = names.index(arm)
    return dict(opd=0.95, grpo=0.9).get(arm, 0.3 + 0.011 * i), 0.01 + 0.017 * i, 0.1 + 0.003 * i ** 1.5


def claims_of(figure, monkeypatch, silent=False):
    """The claims of a figure about made-up curves -> {id: claim}; what each arm was trained with. silent: every answer is empty, nothing is ever right."""
    calls, run, config = {}, Memory(), small(figure=figure, seeds=2, steps=100)

    def fake(config, run, arm, seed, base, task, method=None, expert=None, pedagogue=None, prompt=plain, meter=None, greedy=False):
        calls[arm] = SimpleNamespace(method=method or arm, base=base, task=task, expert=expert, pedagogue=pedagogue, prompt=prompt, meter=meter, greedy=greedy, config=config)
        level, passwords, slope = made_up(arm)
        for step in range(0, 101, 20):
            obeyed = dict(zip(("opsd, rule", "rmsd, rule", "grpo, rule"), (0.96 * min(1, step / 40), 0.98 * min(1, step / 20), 0.1))).get(arm)
            row = dict(password_rate=passwords, formal=0.25 + slope * step / 100, renamed=obeyed, off_topic=level / 10, greedy=level / 2, style_mass=0.5, **{"pass@1": level * min(1, step / 40)})
            if silent:
                row = {key: None if key in ("formal", "renamed") else 0.0 for key in row}
            run.log(phase="train", arm=arm, seed=seed, step=step, sampled_tokens=step * (300 if arm == "grpo" else 200 if arm == "skd" else 100),
                    changed=0.0 if silent else 1 - step / 200 if step else None, **row)
        return f"trained {arm}"

    def fast_and_slow(config, run, arm, seed, base, stage):
        for step in range(5, 181, 5):
            learnt = step % 60 == 0 and (arm != "slow" or step > 60) and (arm != "fast" or step == 120) or arm == "fast and slow" and step >= 20 or arm == "slow" and 50 + 5 * seed <= step < 60
            run.log(phase="train", arm=arm, seed=seed, step=step, stage=(step - 1) // 60, sampled_tokens=step * (12 if arm == "fast and slow" else 10), **{"pass@1": float(learnt and not silent)})
    monkeypatch.setattr(opd, "train", fake)
    monkeypatch.setattr(opd, "fast_and_slow", fast_and_slow)
    monkeypatch.setattr(opd, "from_scratch", lambda config, run, name, device: name)
    monkeypatch.setattr(opd, "evaluate", lambda *_: {"pass@1": 0.0 if silent else 0.98})
    monkeypatch.setattr(opd, "continuation", lambda student, teacher, task, eps, length, *_: 0.0 if silent else eps * length / 10 if (student, teacher) == ("base", "expert") else math.nan)
    _, claims = getattr(opd, f"figure_{figure}")(config, run, "cpu")
    opd.plt.close("all")
    return {c["id"]: c for c in claims}, calls


@pytest.mark.parametrize("figure", FIGURES)
def test_no_claim_holds_of_a_run_that_answers_nothing(figure, monkeypatch):
    claims, _ = claims_of(figure, monkeypatch, silent=True)
    assert claims and [name for name, c in claims.items() if c["holds"]] == []


def is_about(claims, **expected):
    assert {k: float(c["ours"].split()[0]) for k, c in claims.items()} == {k.replace("_", " "): pytest.approx(v, rel=6e-3, abs=1e-9) for k, v in expected.items()}


level, passwords, slope = (lambda arm, i=i: made_up(arm)[i] for i in range(3))


def test_the_claims_of_family_are_about_the_arms_that_they_name(monkeypatch):
    claims, calls = claims_of("family", monkeypatch)
    is_about(claims, opd=0.95, opd_grpo=0.05, opd_expert=0.03, sft=level("sft"), sft_plateau=0.95 - level("sft"), grpo_tokens=3 * 0.95 / 0.9, opsd_leak=passwords("opsd"),
             clip_leak=passwords("opsd_clip"), clip=level("opsd_clip"), rmsd_leak=passwords("rmsd"), rmsd=level("rmsd"))
    assert all((c.method, c.base, c.expert) == (arm, "base", "expert") for arm, c in calls.items()) and list(calls) == small().methods


def test_the_papers_number_stands_where_it_stands_in_the_paper(monkeypatch):
    claims, _ = claims_of("family", monkeypatch)        # 55.0 is the checkpoint from which OPD (74.4) and RL (67.6) start, no rival of theirs
    assert claims["opd"]["paper"] == "74.4 (55.0; 67.6)" and claims["opd"]["ours"].endswith("(0.00; 0.90)") and claims["opd grpo"]["paper"] == "6.8 points"
    assert not any("SFT" in c["claim"] and "Qwen3" in c["source"] for c in claims.values())


def test_the_claims_of_cold_are_about_the_arms_that_they_name(monkeypatch):
    claims, calls = claims_of("cold", monkeypatch)
    ahead = {arm: level(arm) - level("opd") for arm in ("trb", "skd")}
    by_tokens = lambda arm, tokens: np.interp(np.linspace(0, 4000, 200), [0, 2 * tokens, 4 * tokens], [0, level(arm) / 2, level(arm)]).mean()
    is_about(claims, grpo=0.025, opd=0.475, probe=0.04, probe_monotone=0.004, trb=0.75 * ahead["trb"], trb_end=ahead["trb"], skd=0.75 * ahead["skd"], skd_anneals=0.55 / 0.9,
             trb_tokens=by_tokens("trb", 1000) - by_tokens("opd", 1000), skd_tokens=by_tokens("skd", 2000) - by_tokens("opd", 1000))
    assert all((c.method, c.base, c.expert) == (arm, "cold base", "expert") for arm, c in calls.items())


def test_the_claims_of_estimators_and_few_are_about_the_arms_that_they_name(monkeypatch):
    claims, calls = claims_of("estimators", monkeypatch)
    arms = ["opd", "opd_sampled", "opd_jsd", "opd_forward", "opd_top4_renormalised", "opd_top4_stopgrad"]
    assert {k: float(c["ours"].split()[0]) for k, c in claims.items()} == pytest.approx(
        {"raw sampled": -level("opd_top4") / 2, "raw greedy": level("opd_top4") / 2} | {arm: level(arm) for arm in arms}, rel=6e-3)
    assert all(c.greedy and c.expert == "expert" for c in calls.values())
    claims, calls = claims_of("few", monkeypatch)
    is_about(claims, opd=0.95 - level("sft"), sft=level("sft") - 0.9)
    assert all(len(c.task.train) == 24 for c in calls.values())


def test_the_claims_of_selfteach_are_about_the_arms_that_they_name(monkeypatch):
    claims, calls = claims_of("selfteach", monkeypatch)
    fast, slow = 20 * 0.9 / 0.98, 40 * 0.9 / 0.96
    is_about(claims, rule=0.96, rule_off_topic=level("opsd, rule") / 10, password=passwords("opsd"), live=passwords("opsd_live"), no_judge=passwords("rmsd_no_judge"),
             judge=passwords("rmsd"), clip=passwords("opsd_clip"), rmsd_faster=fast / slow, rmsd_drift=slope("rmsd, rule") * 20 / (slope("opsd, rule") * 40),
             rmsd_drift_end=slope("rmsd, rule") / slope("opsd, rule"), grpo=0.1, pedagogue=passwords("pedagogue"), pedagogue_reward=passwords("pedagogue, reward only"),
             pedagogical=level("pedagogical"))
    how = {arm: (c.method, c.prompt, c.meter, c.pedagogue) for arm, c in calls.items()}
    assert how["pedagogue"] == ("grpo", told, "base", None) and how["pedagogue, reward only"] == ("grpo", told, None, None)
    assert how["pedagogical"] == ("pedagogical", plain, None, "trained pedagogue")
    assert how["pedagogical, reward only"] == ("pedagogical_no_gate", plain, None, "trained pedagogue, reward only")
    assert {c.method for c in calls.values()} == set(opd.ARMS["selfteach"])
    for method in ("opsd", "rmsd", "grpo"):
        assert calls[f"{method}, rule"].method == method and calls[f"{method}, rule"].task is rule_task() and calls[f"{method}, rule"].config.lr == 0.3 * small().lr


def test_the_claims_of_fastslow_are_of_each_seed_and_compare_sampled_tokens(monkeypatch):
    claims, _ = claims_of("fastslow", monkeypatch)      # seed 0 of the slow arm is at .75 after 48.75 steps of 10 tokens, seed 1 after 53.75; both after 18.75 of 12
    is_about(claims, both=6, slow=1, fast=2 / 3, speed=487.5 / 225)
    assert claims["speed"]["ours"].endswith("(2.2, 2.4)") and "tokens" in claims["speed"]["claim"]


# ---------------------------------------------------------------------------------------------------------------------------
# The command

@pytest.mark.parametrize("figure", FIGURES)
def test_a_quick_run_writes_figure_metrics_claims_config_and_checkpoint(figure, tmp_path):
    models = dict(selfteach=["base"], fastslow=["base"], cold=["base", "cold_base", "expert"], estimators=["base_slips", "expert_slips"]).get(figure, ["base", "expert"])
    assert check_quick("opd.py", tmp_path, "--figure", figure, also=[f"{name}.pt" for name in models]) == figure


def test_figures_share_the_models_of_out_and_a_changed_flag_trains_them_anew(tmp_path):
    finish("opd.py", "--quick", "--arms", "opd", "--out", tmp_path)
    made = (tmp_path / "base.pt").read_bytes()
    finish("opd.py", "--quick", "--figure", "few", "--out", tmp_path)
    assert (tmp_path / "base.pt").read_bytes() == made and not any(row["phase"] == "pretrain" for row in metrics(tmp_path))
    finish("opd.py", "--quick", "--arms", "opd", "--sft-steps", 12, "--out", tmp_path)
    assert {row.get("model") for row in metrics(tmp_path) if row["phase"] == "pretrain"} == {"base"}
    assert (tmp_path / "base.pt").read_bytes() != made and json.loads((tmp_path / "claims.json").read_text()) == []


def test_help_lists_every_flag():
    check_help("opd.py")


def refused(flags, folder, *words):
    """The command must refuse: one line, exit code 2, before anything is trained or written; with these words in it."""
    before = sorted(folder.rglob("*"))
    line = complain("opd.py", "--out", folder, *flags)
    assert all(word in line for word in words) and "Traceback" not in line and len(line) < 700 and sorted(folder.rglob("*")) == before, line


@pytest.fixture
def untrained(monkeypatch):
    """A command that comes as far as its run fails: mistakes are said before."""
    def begun(*_, **__):
        raise AssertionError("the run has begun")
    monkeypatch.setattr(opd, "Run", begun)


@pytest.mark.parametrize("flags", ["--bogus", "--steps 0", "--arms nothing", "--arms pedagogical", "--arms opd --figure few", "--arms opd,,grpo", "--arms ,", "--batch 20", "--group 0", "--group 1",
                                   "--figure none", "--lr nan", "--n-embd 65", "--expert-embd 98", "--resume", "--seed -1", "--seed 4294967296", "--steps 1.5", "--device tpu"])
def test_a_mistake_in_the_flags_is_one_line_and_exit_code_2(flags, untrained, tmp_path):
    refused(flags.split(), tmp_path)


@pytest.mark.parametrize("flags, word", [
    ("--n-layer 100000000000", "n-layer"), ("--n-layer 4000000000", "--n-layer 4000000000"), ("--n-embd 100000000", "--n-embd 100000000"), ("--expert-embd 100000000", "--expert-embd 100000000"), ("--n-head 4294967295", "n_head"),
    ("--n-embd 4294967288 --n-head 4", "GiB"), ("--batch 4294967288", "GiB"), ("--sft-batch 4294967295", "GiB"), ("--batch 99999999999999999999", "batch"), ("--group 4294967295", "group"),
    ("--seeds 4294967295", "seeds"), ("--eval-prompts 257", "eval-prompts"), ("--arms opd_top4 --top 100", "top"), ("--skd-top 4294967295", "skd-top"), ("--lr 1e20", "lr"), ("--lr 1e300", "lr"),
    ("--sft-lr 1e6", "sft-lr"), ("--lr inf", "finite"), ("--lr -1e-9", "lr"), ("--clip 1e300", "clip"), ("--clip -1", "clip"), ("--trb-eps 1e31", "trb-eps"), ("--trb-eps nan", "finite"),
    ("--slips 1.1", "slips"), ("--slips -1e-9", "slips"), ("--trb-steps 0", "trb-steps"), ("--steps 99999999999", "steps"), ("--eval-every 0", "eval-every")])
def test_an_absurd_size_or_an_extreme_number_is_refused_at_once(flags, word, untrained, tmp_path):
    refused(flags.split(), tmp_path, word)


@pytest.mark.parametrize("flags", [
    "--micro-batch 8", "--max-new-tokens 9", "--template {question}", "--chat", "--checkpointing", "--no-chat", "--top 3", "--arms opd --clip 0.3", "--arms opd --skd-top 3", "--arms opd --trb-eps 0.2",
    "--arms skd --trb-steps 9", "--arms opd --group 4", "--figure few --top 4", "--figure few --clip 0.5", "--figure cold --clip 0.5", "--figure cold --top 4", "--figure estimators --skd-top 4",
    "--figure estimators --group 4", "--figure estimators --trb-eps 0.1", "--figure selfteach --expert-embd 64", "--figure selfteach --expert-steps 9", "--figure selfteach --top 4",
    "--figure fastslow --steps 9", "--figure fastslow --eval-every 9", "--figure fastslow --eval-prompts 9", "--figure fastslow --expert-steps 9", "--figure fastslow --clip 0.5"])
def test_a_flag_that_would_do_nothing_is_refused_by_its_name(flags, untrained, tmp_path):
    flag = [f for f in flags.split() if f.startswith("--") and f not in ("--figure", "--arms")][0].replace("--no-", "--")
    refused(flags.split(), tmp_path, flag, "does nothing here")


@pytest.mark.parametrize("flags", ["--arms opd_top4 --top 3", "--arms opsd_clip --clip 0.3", "--arms skd --skd-top 3", "--arms trb --trb-eps 0.2 --trb-steps 9", "--arms grpo --group 4 --batch 8",
                                   "--arms opd --batch 9", "--figure estimators --top 3", "--figure selfteach --clip 0.3 --group 2", "--figure fastslow --group 2 --lr 0.01", "--slips 0.01"])
def test_a_flag_that_does_something_is_taken(flags):
    opd.parse_args(Config, "", flags.split())


def test_a_flag_that_is_called_idle_changes_no_number_and_one_that_is_not_does():
    """What idle() says, against what training makes of the flag."""
    def rows(name, **choices):
        config, run = small(arms=name, steps=3, eval_prompts=1, eval_every=9, **choices), Memory()
        opd.train(config, run, name, 0, policy(0), far_task(), expert=policy(1))
        return run.rows, set(config.idle())
    for name in ("opd", "opd_top4_renormalised", "skd", "trb", "opsd_clip"):
        (plainly, idle), usual = rows(name), small()
        for key, other in dict(top=2, skd_top=1, trb_eps=5.0, trb_steps=1, clip=1e-9).items():
            assert (rows(name, **{key: other})[0] == plainly) == (key in idle), (name, key, getattr(usual, key))


@pytest.mark.parametrize("name, content", [("base.pt", "rows"), ("expert.pt", "torch"), ("expert.pt", "list"), ("base.pt", "folder"), ("expert.pt", "cut"), ("base.pt", "empty")])
def test_a_file_that_is_no_model_of_ours_is_never_loaded_or_overwritten(name, content, untrained, tmp_path):
    path = tmp_path / name
    (tmp_path / "config.json").write_text(json.dumps(dict(config=dict(figure="few"), revision="1")))        # the folder of a run, so that base.pt might be its own
    if content == "folder":
        path.mkdir()
    elif content in ("torch", "list"):
        torch.save(dict(weights=1) if content == "torch" else [1], path)
    else:
        path.write_bytes({"rows": b'{"step": 0}\n', "empty": b"", "cut": b"PK\x03\x04"}[content])
    before = path.is_dir() or path.read_bytes()
    refused(("--figure", "few"), tmp_path, str(path))
    assert (path.is_dir() or path.read_bytes()) == before


@pytest.mark.parametrize("name", ["base.pt", "expert.pt", "claims.json", "family.png", "model.pt"])
def test_a_folder_with_somebody_elses_files_is_left_as_it_is(name, tmp_path):
    torch.save(dict(made_by="me", model={}), tmp_path / name)
    refused(("--quick",), tmp_path, name)


@pytest.mark.parametrize("out", ["file", "file/below", "x" * 300, "config.json"])
def test_an_out_that_can_be_no_folder_is_one_line(out, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "config.json").write_text("{}")
    complain("opd.py", "--quick", "--out", tmp_path / out if out != "config.json" else tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "file"] and (tmp_path / "file").read_text() == "mine"


# ---------------------------------------------------------------------------------------------------------------------------
# What ends a run early

@pytest.mark.parametrize("what", ["loss", "gradient norm"])
@pytest.mark.parametrize("flags", ["--figure few", "--figure fastslow"])
def test_a_number_that_is_none_ends_the_run_before_it_can_spoil_the_weights(flags, what, monkeypatch, tmp_path):
    loss_of, losses = opd.loss_of, []

    def spoilt(*more):      # the second step's loss, or its gradient only
        losses.append(loss_of(*more))
        if len(losses) < 2:
            return losses[-1]
        return losses[-1] * math.nan if what == "loss" else losses[-1] + (0 * losses[-1]).sqrt() - 0
    monkeypatch.setattr(opd, "loss_of", spoilt)
    code, _, err = launch("opd.py", "--quick", "--steps" if "few" in flags else "--batch", 4 if "few" in flags else 8, *flags.split(), "--out", tmp_path)
    line = err.splitlines()[-1]
    assert code == 2 and f"the {what} is nan" in line and "step 2 of" in line and "model.pt holds what was finite" in line and "Traceback" not in err
    state = opd.load_checkpoint(tmp_path / "model.pt")["state"]
    assert state and all(torch.isfinite(w).all() for phase in state.values() for w in phase["model"].values()) and not (tmp_path / "claims.json").exists()
    assert all(math.isfinite(v) for row in metrics(tmp_path) for v in row.values() if isinstance(v, float))
    monkeypatch.setattr(opd, "loss_of", loss_of)
    finish("opd.py", "--resume", "--out", tmp_path)


@pytest.mark.parametrize("method", ["opd", "trb", "skd", "grpo", "rmsd"])
def test_a_learning_rate_that_blows_up_ends_the_run(method, monkeypatch):
    monkeypatch.setattr(opd, "reward", lambda pair, tokens: float(tokens[0] % 2))
    run = Memory()
    with pytest.raises(opd.NotFinite):
        opd.train(small(lr=1e20, steps=9), run, method, 0, policy(0), far_task(), expert=policy(1))
    assert all(math.isfinite(v) for row in run.rows for v in row.values() if isinstance(v, float))


def test_two_models_that_write_together_never_draw_from_what_is_no_number():
    student, prompts = policy(0), [plain(p) for p in far_task().test[:4]]
    broken = policy(1)
    broken.lm_head.weight.data[3] = math.nan
    for pair in ((student, broken), (broken, student)):
        with pytest.raises(opd.NotFinite):
            collect("draft", *pair, prompts, prompts, 0.0, small(), torch.Generator().manual_seed(0))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("where", ["evaluate", "continuation"])
def test_a_signal_during_an_evaluation_ends_the_run_at_once_and_loses_nothing(where, number, monkeypatch, tmp_path):
    flags = "--quick", "--figure", "cold", "--steps", 3, "--eval-every", 1
    finish("opd.py", *flags, "--out", tmp_path / "whole")
    measure, calls = getattr(opd, where), []

    def cut(*more, **named):
        calls.append(1)
        if len(calls) == 6:
            os.kill(os.getpid(), number)
            raise AssertionError("the signal was not heeded")
        return measure(*more, **named)
    with monkeypatch.context() as patch:
        patch.setattr(opd, where, cut)
        code, out, _ = launch("opd.py", *flags, "--out", tmp_path / "cut")
    assert code == 128 + number and "--resume" in out and len(calls) == 6
    finish("opd.py", "--resume", "--out", tmp_path / "cut")
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")


def test_ctrl_c_while_a_checkpoint_loads_ends_at_once_and_leaves_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(opd, "load_pair", lambda *_: os.kill(os.getpid(), signal.SIGINT) or time.sleep(9))
    code, _, err = launch("opd.py", "--init", "a", "--teacher", "b", "--data", "c", "--out", tmp_path / "run")
    assert code == 130 and err == "" and not (tmp_path / "run").exists()


def test_interrupt_and_resume_give_the_metrics_of_an_uninterrupted_run_to_the_bit(tmp_path):
    check_resume("opd.py", tmp_path, (dict(phase="pretrain"), dict(phase="train", arm="grpo")), "--quick", "--arms", "trb,grpo", "--sft-steps", 20, "--expert-steps", 5, "--steps", 4, "--eval-every", 2)


def test_a_quick_run_in_bf16(tmp_path):
    finish("opd.py", "--quick", "--arms", "opd,trb", "--dtype", "bfloat16", "--out", tmp_path)
    assert all(math.isfinite(row["loss"]) for row in metrics(tmp_path) if "loss" in row)


# ---------------------------------------------------------------------------------------------------------------------------
# Real checkpoints

def save_gpt(folder, like, vocab, n_embd, seed, positions=256):
    torch.manual_seed(seed)
    model = GPT(opd.GPTConfig(vocab, positions, 1, 2, n_embd, n_kv_head=1, qkv_bias=True, tie=seed > 0))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(8 if p.dim() == 2 else 1)
    model.save_pretrained(folder, like=like)


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A small student and a wider teacher whose embedding is padded; questions with answers and without."""
    folder = tmp_path_factory.mktemp("real")
    for name, text in (("like", "What is 1 + 2? Think step by step."), ("unlike", "other words than those, then")):
        save_json(folder / name, make_json(merges_of(text, 20)))
    for name, *shape in (("student", "like", 300, 32, 0), ("teacher", "like", 310, 48, 1), ("narrow", "like", 290, 48, 1), ("foreign", "unlike", 300, 48, 1),
                         ("short", "like", 300, 48, 1, 40)):
        save_gpt(folder / name, folder / shape[0], *shape[1:])
    (folder / "sums.jsonl").write_text("".join(json.dumps(r) + "\n" for r in ROWS))
    (folder / "questions.jsonl").write_text("".join(json.dumps(dict(question=r["question"])) + "\n" for r in ROWS))
    return folder


def real_config(real, **choices):
    return small(**{**dict(init=str(real / "student"), teacher=str(real / "teacher"), data=str(real / "sums.jsonl"), template="{question}", max_new_tokens=8,
                           micro_batch=3, eval_prompts=4), **choices})


def pair_and_rollout(config, seed=0):
    student, teacher = opd.load_pair(config, "cpu")
    rng = random.Random(seed)
    problems = [opd.task_of(config).draw(rng) for _ in range(config.batch)]
    return student, teacher, opd.sample(student, problems, config, torch.Generator().manual_seed(seed))


def gradient_of(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()]).clone()


@pytest.mark.parametrize("kind", ["token", *KINDS])
def test_the_divergence_of_checkpoints_is_that_of_their_whole_distributions_however_they_are_cut(kind, real, monkeypatch):
    config = real_config(real)
    student, teacher, rollout = pair_and_rollout(config)
    assert len(set(rollout.prompt_lens.tolist())) > 1 or len(set(rollout.lengths.tolist())) > 1
    lp, lq = (m(rollout.ids[:, :-1])[..., :300].log_softmax(-1) for m in (student, teacher))
    expected = divergence(lp, lq.detach(), rollout.ids[:, 1:], kind, config.top) * rollout.mask[:, 1:]
    (expected.sum() / rollout.mask.sum()).backward()
    gradients, norms = [gradient_of(student)], []
    for logits, micro_batch in ((2 ** 26, 64), (1, 3), (1000, 1)):
        monkeypatch.setattr(opd, "LOGITS", logits)
        config.micro_batch = micro_batch
        assert torch.allclose(opd.token_divergence(student, teacher, rollout, kind, config), expected[rollout.mask[:, 1:] > 0], atol=1e-5)
        loss, norm = opd.distil(student, teacher, torch.optim.SGD(student.parameters(), 0.0), rollout, kind, config)
        assert loss == pytest.approx(expected.sum().item() / rollout.mask.sum().item(), abs=1e-5)
        gradients, norms = gradients + [gradient_of(student) * max(1, norm)], norms + [norm]
    assert max(norms) > 1e-3 and all((g - gradients[0]).abs().max() < 1e-5 * max(1, max(norms)) for g in gradients)
    assert all(p.grad is None for p in teacher.parameters())


def test_the_divergence_of_checkpoints_sees_neither_prompt_nor_padding(real):
    config = real_config(real)
    student, teacher, rollout = pair_and_rollout(config)
    assert rollout.mask.sum() == len(opd.token_divergence(student, teacher, rollout, "reverse", config))
    noisy = opd.generate(student, [[5, 6, 7]], 1, 4, stop=None, generator=torch.Generator().manual_seed(0))
    padded = type(noisy)(*(torch.nn.functional.pad(x, (0, 3), value=v) for x, v in ((noisy.ids, 9), (noisy.mask, 0), (noisy.logp, 0))), noisy.prompt_lens)
    assert torch.allclose(*(opd.token_divergence(student, teacher, r, "reverse", config) for r in (noisy, padded)), atol=1e-6)


@pytest.mark.parametrize("method", opd.REAL)
def test_a_checkpoint_that_is_its_own_teacher_has_nothing_to_learn(method, real, monkeypatch):
    config, run, writers, sample = real_config(real, teacher=str(real / "student"), lr=1e-3, arms=method), Memory(), [], opd.sample
    monkeypatch.setattr(opd, "sample", lambda model, problems, *more: writers.append((len(problems), model)) or sample(model, problems, *more))
    student, teacher = opd.load_pair(config, "cpu")
    trained = opd.train_checkpoint(config, run, method, 0, student, teacher)
    assert all(model is (teacher if n == config.batch and METHODS[method][0] == "teacher" else trained) for n, model in writers)
    moved = max((a - b).abs().max().item() for a, b in zip(trained.parameters(), student.parameters()))
    assert run.rows[0]["kl"] == pytest.approx(0, abs=1e-6)
    if method == "opd_sampled":         # exactly: the advantage of every token is 0
        assert moved == 0 and all(row["loss"] == row["grad_norm"] == 0 for row in run.rows[1:])
    elif method not in ("sft", "opd_top4"):     # Adam makes a step of any rounding error: what counts is that there is nothing else
        assert all(abs(row["loss"]) < 1e-6 and row["grad_norm"] < 1e-5 for row in run.rows[1:2])


@pytest.mark.parametrize("method", [m for m in opd.REAL if "top4" not in m])      # 4 of 300 tokens are not enough for these flat models
def test_a_checkpoint_comes_nearer_to_its_teacher_which_does_not_move(method, real):
    config, run = real_config(real, steps=25, batch=32, lr=1e-2, micro_batch=32, eval_every=25, eval_prompts=64), Memory()
    student, teacher = opd.load_pair(config, "cpu")
    before = [{k: v.clone() for k, v in m.state_dict().items()} for m in (student, teacher)]
    opd.train_checkpoint(config, run, method, 0, student, teacher)
    assert all(torch.equal(v, state[k]) for m, state in zip((student, teacher), before) for k, v in m.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    first, last = run.rows[0]["kl"], run.rows[-1]["kl"]
    assert last < 0.8 * first and len(run.rows) == 26 and 0 <= run.rows[-1]["pass@1"] <= 1


def test_held_out_is_the_reverse_kl_per_token_of_the_students_answers(real):
    config = real_config(real, micro_batch=64)
    student, teacher = opd.load_pair(config, "cpu")
    row, problems = opd.held_out(student, teacher, config, 5), opd.task_of(config).held_out(random.Random("held out"), 4)
    with torch.no_grad():
        rollout = opd.sample(student, problems, config, torch.Generator().manual_seed(5))
        lp, lq = (m(rollout.ids[:, :-1])[..., :300].log_softmax(-1) for m in (student, teacher))
    kl = (divergence(lp, lq, None, "reverse") * rollout.mask[:, 1:]).sum() / rollout.mask.sum()
    assert row["kl"] == pytest.approx(kl.item(), rel=1e-4) and row["length"] == rollout.mask.sum() / len(problems) and kl > 0


def test_a_bf16_run_scores_with_a_bf16_teacher(real):
    config = real_config(real, dtype="bfloat16", checkpointing=True)
    student, teacher, rollout = pair_and_rollout(config)
    assert student.checkpointing and student.lm_head.weight.dtype == torch.float32 and teacher.lm_head.weight.dtype == torch.bfloat16
    loss, norm = opd.distil(student, teacher, torch.optim.SGD(student.parameters(), 0.0), rollout, "reverse", config)
    exact = opd.distil(student, teacher.float(), torch.optim.SGD(student.parameters(), 0.0), rollout, "reverse", real_config(real))
    assert (loss, norm) == pytest.approx(exact, rel=0.05)


REAL_RUN = "--quick", "--steps", 2, "--template", "{question}"


def real_flags(real, data="sums.jsonl"):
    return "--init", real / "student", "--teacher", real / "teacher", "--data", real / data


ARMS = ["opd", "opd_sampled", "sft"]


@pytest.fixture(scope="module")
def finished(real, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    check_quick("opd.py", folder, *REAL_RUN[1:], *real_flags(real), "--arms", ",".join(ARMS), also=[f"{arm} 0" for arm in ARMS])
    return folder


def test_a_run_between_checkpoints_ends_with_students_that_can_be_opened_and_resumes_to_itself(real, finished, tmp_path):
    rows = metrics(finished)
    assert [(r["arm"], r["step"]) for r in rows] == [(arm, step) for arm in ARMS for step in range(3)] and all("pass@1" in r for r in rows if "kl" in r)
    for arm in ARMS:
        assert GPT.from_pretrained(finished / f"{arm} 0").config == GPT.from_pretrained(real / "student").config
        assert load_tokenizer(finished / f"{arm} 0").eos == load_tokenizer(real / "student").eos
    finish("opd.py", "--resume", "--out", shutil.copytree(finished, tmp_path / "again"))
    assert metrics(tmp_path / "again") == rows


def test_answers_end_at_each_of_the_checkpoints_stop_ids_and_the_student_is_saved_with_them(real, tmp_path, monkeypatch):
    folder = shutil.copytree(real, tmp_path / "real")
    config = json.loads((folder / "student" / "config.json").read_text())
    stops = [*dict.fromkeys([load_tokenizer(folder / "student").eos, *range(32, 122)])]        # most letters: they are likely
    (folder / "student" / "generation_config.json").write_text(json.dumps(dict(eos_token_id=stops)))
    assert config["eos_token_id"] != stops
    config = real_config(folder, max_new_tokens=32, batch=64)
    student, teacher, rollout = pair_and_rollout(config)
    for tokens in rollout.tokens():
        assert not set(tokens[:-1]) & set(stops) and (tokens[-1] in stops or len(tokens) == 32)
    assert len({tokens[-1] for tokens in rollout.tokens()} & set(stops)) > 3
    finish("opd.py", *REAL_RUN, *real_flags(folder), "--out", tmp_path / "run")
    assert load_tokenizer(tmp_path / "run" / "opd 0").stop == stops


def test_a_resume_refuses_models_or_data_that_have_changed(real, tmp_path):
    folder = shutil.copytree(real, tmp_path / "real")
    finish("opd.py", *REAL_RUN, *real_flags(folder), "--out", tmp_path / "run")
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir() if p.is_file()}
    for flag, file in (("--data", "sums.jsonl"), ("--teacher", "teacher/config.json"), ("--init", "student/tokenizer_config.json")):
        was = (folder / file).read_bytes()
        (folder / file).write_bytes(was + b"\n")
        assert f"{flag} is no longer what the run" in complain("opd.py", "--resume", "--out", tmp_path / "run")
        (folder / file).write_bytes(was)
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir() if p.is_file()}


@pytest.mark.parametrize("owned", [True, False])
@pytest.mark.parametrize("what", ["file", "model"])
def test_a_trained_student_never_takes_the_place_of_what_no_run_saved(what, owned, real, tmp_path):
    if owned:
        (tmp_path / "config.json").write_text(json.dumps(dict(config=dict(figure="family"), revision="1")))
    if what == "file":
        (tmp_path / "opd 0").write_text("mine")
    else:
        (tmp_path / "opd 0").mkdir()
        (tmp_path / "opd 0" / "model.safetensors").write_text("mine")
    refused((*REAL_RUN, *real_flags(real)), tmp_path, "opd 0")


def test_a_signal_while_a_checkpoint_is_measured_ends_the_run_at_once_and_loses_nothing(real, monkeypatch, tmp_path):
    measure, calls, last = opd.token_divergence, [], math.inf

    def counted(model, teacher, rollout, kind, config):
        calls.append(kind)
        if calls.count("reverse") == last:      # of the last measurement the last part
            os.kill(os.getpid(), signal.SIGTERM)
            raise AssertionError("the signal was not heeded")
        return measure(model, teacher, rollout, kind, config)
    monkeypatch.setattr(opd, "token_divergence", counted)
    flags = *REAL_RUN, *real_flags(real), "--arms", "kd", "--micro-batch", 1       # trained by the forward KL
    finish("opd.py", *flags, "--out", tmp_path / "whole")
    last = calls.count("reverse")
    calls.clear()
    code, out, _ = launch("opd.py", *flags, "--out", tmp_path / "cut")
    assert code == 143 and "--resume" in out and last > 2
    last = math.inf
    finish("opd.py", "--resume", "--out", tmp_path / "cut")
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")


def test_a_number_that_is_none_ends_the_training_of_a_checkpoint_before_its_weights_are_spoilt(real, monkeypatch, tmp_path):
    measure, steps = opd.token_divergence, []

    def spoilt(model, *more):
        d = measure(model, *more)
        steps.append(d.requires_grad)
        return d * math.nan if sum(steps) == 2 and d.requires_grad else d
    monkeypatch.setattr(opd, "token_divergence", spoilt)
    code, _, err = launch("opd.py", *REAL_RUN, *real_flags(real), "--steps", 4, "--micro-batch", 64, "--out", tmp_path)
    assert code == 2 and "the loss is nan at step 2 of opd 0" in err.splitlines()[-1]
    phase, = opd.load_checkpoint(tmp_path / "model.pt")["state"].values()
    assert phase["step"] == 1 and all(torch.isfinite(w).all() for w in phase["model"].values()) and not (tmp_path / "opd 0").exists()


def test_questions_without_answers_are_enough_in_bf16(real, tmp_path):
    check_quick("opd.py", tmp_path, *REAL_RUN[1:], *real_flags(real, "questions.jsonl"), "--dtype", "bfloat16", "--checkpointing", also=["opd 0"])
    assert not any("pass@1" in row for row in metrics(tmp_path)) and len(metrics(tmp_path)) == 3


def test_interrupting_a_run_between_checkpoints_changes_nothing(real):
    config, whole, halves = real_config(real, steps=4, eval_every=2), Memory(), Memory()
    pair = opd.load_pair(config, "cpu")
    a = opd.train_checkpoint(config, whole, "opd", 0, *pair)
    opd.train_checkpoint(real_config(real, steps=2, eval_every=2), halves, "opd", 0, *pair)
    b = opd.train_checkpoint(config, halves, "opd", 0, *pair)
    steady = lambda rows: [{k: v for k, v in row.items() if k != "seconds" and not k.endswith("_per_s")} for row in rows]
    assert steady(halves.rows) == steady(whole.rows) and all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


@pytest.mark.parametrize("flags, words", [
    ("--init STUDENT --data DATA", "need one another"), ("--teacher TEACHER", "need one another"), ("--init STUDENT --teacher TEACHER --data DATA --figure few", "--figure family"),
    ("--init STUDENT --teacher TEACHER --data DATA --template no", "{question}"), ("--init STUDENT --teacher TEACHER --data DATA --arms trb,opd", "between two checkpoints: trb"),
    ("--init STUDENT --teacher FOREIGN --data DATA", "vocabulary is not that of"), ("--init STUDENT --teacher NARROW --data DATA", "290 ids"),
    ("--init STUDENT --teacher INSIDE --data DATA", "a run writes its models there"), ("--init STUDENT --teacher SHORT --data DATA --max-new-tokens 50", "40 positions"), ("--init STUDENT --teacher /no/such --data DATA", "/no/such: no such folder"),
    ("--init /no/such --teacher TEACHER --data DATA", "/no/such: no such folder"), ("--init STUDENT --teacher TEACHER --data /no/such.jsonl", "no such file"),
    ("--init STUDENT --teacher TEACHER --data BROKEN", "row 1: question is missing"), ("--init STUDENT --teacher TEACHER --data DATA --chat", "chat template"),
    ("--init STUDENT --teacher TEACHER --data EMPTY --template {question}", "empty prompt")])
def test_a_mistake_about_checkpoints_is_one_line_and_nothing_is_written(flags, words, real, tmp_path):
    (real / "broken.jsonl").write_text('{"prompt": "a"}\n')
    (real / "empty.jsonl").write_text('{"question": ""}\n{"question": "a"}\n')
    names = dict({k.upper(): real / k for k in ("student", "teacher", "foreign", "narrow", "short")}, DATA=real / "questions.jsonl", INSIDE=tmp_path / "run" / "opd", BROKEN=real / "broken.jsonl", EMPTY=real / "empty.jsonl")
    flags = " ".join(str(names.get(f, f)) for f in flags.split())
    assert words in complain("opd.py", "--quick", "--out", tmp_path / "run", *flags.split()) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags, words", [
    ("--batch 4294967295 --max-new-tokens 8", "GiB"), ("--max-new-tokens 4294967295", "positions"), ("--arms opd,opd", "twice"), *((flag, "does nothing here") for flag in (
        "--group 4", "--n-layer 9", "--n-embd 64", "--expert-embd 64", "--sft-steps 5", "--sft-lr 0.01", "--slips 0.1", "--clip 0.3", "--skd-top 3", "--trb-eps 0.1", "--top 3"))])
def test_a_flag_that_asks_a_checkpoint_for_too_much_or_for_nothing_is_refused(flags, words, real, untrained, tmp_path):
    refused((*REAL_RUN[1:], *real_flags(real), *flags.split()), tmp_path, flags.split()[0], words)


def distilled(folder):
    """Gradient, loss and held-out measures of each method on this process's share of a batch."""
    config = real_config(Path(folder), batch=12)
    student, teacher = opd.load_pair(config, "cpu")
    problems, results = [opd.task_of(config).draw(random.Random(i)) for i in range(12)], []
    for method in opd.REAL:
        generator = torch.Generator().manual_seed(0)
        rollout = opd.sample(student, problems, config, generator, opd.share(12))
        loss, norm = opd.distil(student, teacher, torch.optim.SGD(student.parameters(), 0.0), rollout, METHODS[method][2], config)
        results.append((gradient_of(student) * max(1, norm), loss, opd.held_out(student, teacher, config, 1), generator.get_state()))
    torch.save(results, Path(folder) / f"{opd.world()}.pt")


def test_two_processes_have_the_gradient_and_the_measures_of_one(real, tmp_path):
    folder, code = shutil.copytree(real, tmp_path / "real"), tmp_path / "worker.py"
    code.write_text(f"import test_opd as t\nt.opd.join('cpu')\nt.distilled({str(folder)!r})\n")
    rc, output = torchrun(code)
    assert rc == 0, output
    distilled(folder)
    alone, first, second = (torch.load(folder / f"{w}.pt") for w in ((0, 1), (0, 2), (1, 2)))
    for (g, loss, row, state), (g0, loss0, row0, state0), (g1, loss1, row1, state1) in zip(alone, first, second, strict=True):
        assert torch.equal(g0, g1) and loss0 == loss1 and row0 == row1 and torch.equal(state, state0) and torch.equal(state, state1)
        assert (g - g0).abs().max() <= 1e-5 * g.abs().max() and g.abs().max() > 0 and loss0 == pytest.approx(loss, rel=1e-5, abs=1e-7) and row0 == pytest.approx(row, rel=1e-5)


def test_several_processes_write_the_run_of_one(real, finished, tmp_path):
    rc, output = torchrun(ROOT / "opd.py", *REAL_RUN, *real_flags(real), "--arms", ",".join(ARMS), "--out", tmp_path / "two")
    assert rc == 0 and output.count("claims.json, model.pt") == 1, output
    assert {p.name for p in (tmp_path / "two").iterdir()} == {p.name for p in finished.iterdir()}
    for ours, theirs in zip(metrics(finished), metrics(tmp_path / "two"), strict=True):
        for k in ours | theirs:
            assert ours[k] == theirs[k] or theirs[k] == pytest.approx(ours[k], rel=1e-3, abs=1e-5), k
