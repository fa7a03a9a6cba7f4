"""curriculum.py and its experiments: the p^k model against exact values, the task and its parser by
hand, the budget rule, the trainers, and the commands.
"""

import itertools
import math
import os
import random
import signal
import zlib
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from common import (
    Memory,
    check_help,
    check_mistake,
    check_quick,
    check_resume,
    check_whole,
    complain,
    finish,
    launch,
    metrics,
)

import curriculum
import tasks
from curriculum import (
    BASES,
    BUDGETS,
    TASK,
    Config,
    advantages,
    build,
    evaluate,
    verdict_gap,
    verdicts_by_place,
)
from engine import generate
from experiment import UserError, parse_args
from experiments import budget, coupled, mask, negatives
from experiments.coupled import TESTS, budget_rule
from experiments.negatives import at_success, pk_reuse, pk_train, steps_to
from tasks import numbers
from tasks.guesses import pk_exact, pk_gradient, pk_sample, pk_start, pk_sums
from tasks.numbers import behaviour, demonstrate, draw, draw_single, hits, parse, prompt, reward

MODULES = {
    "curriculum.py": curriculum,
    "experiments.budget": budget,
    "experiments.coupled": coupled,
    "experiments.mask": mask,
}
PROBLEM = [3, 11, 8, 2, 6, 12], 14
TRIES = "3 +6 =9 NO 11 +2 =13 NO "
FOUND = "8 +6 =14 OK "


def ids_of(problem, text=""):
    return TASK.encode(prompt(problem) + " " + text)


def small(Config=Config, **choices):
    return Config(
        **{
            **dict(
                n_layer=1,
                n_head=2,
                n_embd=16,
                prompts=3,
                group=4,
                steps=2,
                eval_prompts=8,
                eval_every=1,
            ),
            **choices,
        }
    )


def policy(seed=0, sharp=3.0):
    torch.manual_seed(seed)
    model = build(small(), "cpu")
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(sharp)
    return model


# --------------------------------------------------------------------------------------------------
# The p^k model


def episodes(M, right, budget):
    """All episodes of a table, one by one: (probability, draws after the first, their entropies
    summed, the right action or None).
    """
    p, K = M.softmax(-1).tolist(), len(M)
    entropy = [-sum(x * math.log(x) for x in row) for row in p]

    def go_on(probability, last, draws, nats):
        if draws == budget - 1:
            return [(probability, draws, nats, None)]
        ends = []
        for action in range(K + 1):
            so_far = probability * p[last][action], draws + 1, nats + entropy[last]
            if right <= action < K:
                ends += go_on(so_far[0], action, *so_far[1:])
            else:
                ends.append((*so_far, action if action < right else None))
        return ends

    return [e for first in range(right, K) for e in go_on(1 / (K - right), first, 0, 0.0)]


@pytest.mark.parametrize("right, budget", [(1, 2), (1, 4), (2, 2), (2, 5)])
def test_exact_values_are_those_of_all_episodes_one_by_one(right, budget):
    M = pk_start(K=5, right=right, stop=0.5, low=-1.0)
    p, draws, nats, found = map(np.array, zip(*episodes(M, right, budget), strict=True))
    assert p.sum() == pytest.approx(1)
    success, entropy, length, different = pk_exact(M, right, budget)
    solved = np.not_equal(found, None)
    assert success == pytest.approx(p[solved].sum(), abs=1e-12)
    assert length == pytest.approx(1 + p @ draws)
    share = np.array([p[found == i].sum() for i in range(right)]) / success
    assert entropy == pytest.approx((p @ nats) / (p @ draws))
    assert different == pytest.approx(math.exp(-(share * np.log(share)).sum()))


def test_the_first_action_is_uniform_over_the_wrong_ones_whatever_the_table_says():
    M = torch.full((6, 7), 0.0, dtype=torch.float64)
    M[:, 3], M[:, 0] = 8.0, -8.0  # all it wants is action 3
    draws, *_ = pk_sample(M, 1, 2, 10_000, np.random.default_rng(0))
    assert len(pk_start(6)) == 6, (
        "no row of a start, that could learn to say the right action first"
    )
    assert draws[0].tolist() == list(range(10_000))
    assert np.bincount(draws[1], minlength=6).tolist()[0] == 0
    assert abs(np.bincount(draws[1], minlength=6)[1:] / 10_000 - 0.2).max() < 0.02


def test_an_episode_ends_with_a_right_action_with_stop_or_with_the_budget():
    draws, success, lengths = pk_sample(pk_start(K=6, right=2), 2, 5, 500, np.random.default_rng(0))
    for i in range(500):
        actions = draws[2][draws[0] == i].tolist()
        before = draws[1][draws[0] == i].tolist()
        assert lengths[i] == 1 + len(actions) <= 5
        assert before[1:] == actions[:-1]
        assert all(2 <= a < 6 for a in before)
        assert success[i] == (actions[-1] < 2) and (lengths[i] == 5 or not 2 <= actions[-1] < 6)
    assert 0 < success.mean() < 1 and 0 < (lengths == 5).mean() < 1


def test_the_closed_form_of_the_log_likelihoods_gradient():
    M = pk_start(K=5).requires_grad_()
    draws, right, _ = pk_sample(M.detach(), 1, 6, 50, np.random.default_rng(0))
    weight = np.where(right, 1.0, -1.0)
    logp = M.log_softmax(-1)[draws[1], draws[2]]
    (expected,) = torch.autograd.grad((torch.as_tensor(weight)[draws[0]] * logp).sum(), M)
    assert torch.allclose(pk_gradient(M.detach(), pk_sums(M, draws, weight)), expected, atol=1e-10)


@pytest.mark.parametrize("adv, factor", [((0.0, 1.0), 1), ((-1.0, 1.0), 2), ((-1.0, 0.0), 1)])
def test_the_sampled_gradient_has_the_exact_one_as_its_mean(adv, factor):
    M, n = pk_start(K=5, low=-1.0).requires_grad_(), 200_000
    p, alive, success = M.softmax(-1), torch.ones(5, dtype=M.dtype) / 4, 0
    for _ in range(5):
        alive = torch.cat([0 * alive[:1], alive[1:]])
        success, alive = success + alive @ p[:, 0], alive @ p[:, :5]
    (exact,) = torch.autograd.grad(factor * success, M)
    draws, right, lengths = pk_sample(M.detach(), 1, 6, n, np.random.default_rng(0))
    assert right.mean() == pytest.approx(pk_exact(M.detach(), 1, 6)[0], abs=0.005)
    assert draws.shape[1] == (lengths - 1).sum()
    sampled = pk_gradient(M.detach(), pk_sums(M, draws, np.where(right, adv[1], adv[0]))) / n
    assert (sampled - exact).abs().max() < 0.003 and exact.abs().max() > 0.015


def test_negatives_make_the_pk_model_learn_sooner():
    full, masked = (steps_to(pk_train(m, seed=0, steps=700)) for m in (False, True))
    assert full * 1.3 < masked < 700


def test_the_path_of_the_pk_model_is_what_its_draws_were():
    path, M = pk_train(False, seed=3, steps=1), pk_start(30, seed=3)
    draws, right, lengths = pk_sample(M, 1, 60, 256, np.random.default_rng(3))
    # of each draw, given the one before
    entropy = -(M.softmax(-1) * M.log_softmax(-1)).sum(-1).numpy()[draws[1]]
    assert path[0] == pytest.approx((right.mean(), lengths.mean(), entropy.mean()), rel=1e-9)


@pytest.mark.parametrize(
    "masked, eps", [(False, 0.2), (True, 0.2), (False, math.inf), (True, math.inf)]
)
def test_a_batch_used_again_gives_ppos_gradient_draw_by_draw(masked, eps):
    M, lr, right = pk_start(30, 5, seed=1).requires_grad_(), 30.0, 5
    draws, success, _ = pk_sample(M.detach(), right, 40, 64, np.random.default_rng(1))
    rewards = torch.as_tensor(success).double().view(8, 8)
    adv = (rewards - rewards.mean(1, keepdim=True)).flatten()
    adv = (adv.clamp_min(0) if masked else adv)[draws[0]]
    old = M.detach().log_softmax(-1)[draws[1], draws[2]]
    for _ in range(6):
        rho = (M.log_softmax(-1)[draws[1], draws[2]] - old).exp()
        gain = torch.minimum(rho * adv, rho.clamp(1 - eps, 1 + eps) * adv).sum() / 64
        (gradient,) = torch.autograd.grad(gain, M)
        M = (M + lr * gradient).detach().requires_grad_()
    assert math.isinf(eps) or (abs(rho - 1) > eps).any(), "something was clipped"
    assert pk_reuse(masked, 1, updates=6, batches=1, lr=lr, eps=eps)[-1] == pytest.approx(
        pk_exact(M.detach(), right, 40), rel=1e-9
    )


def test_masking_negatives_scales_the_expected_gradient_by_1_minus_p_whatever_the_groups_size():
    """E[masked] = (1 - p) E[full]: over all groups of `size` answers of a softmax over four, two of
    which are right; the lesson's own advantages.
    """
    logits = torch.tensor([0.3, -0.5, 0.9, 0.1], dtype=torch.float64)
    p, right = logits.softmax(0), torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    success = (p * right).sum()
    scores = torch.eye(4, dtype=torch.float64) - p  # grad log p of each answer
    for size in (2, 4, 8):
        groups = torch.tensor(list(itertools.product(range(4), repeat=size)))
        chance = p[groups].prod(1)
        full, masked = (
            (chance[:, None, None] * adv[..., None] * scores[groups]).sum((0, 1))
            for adv in (advantages(right[groups]), advantages(right[groups]).clamp_min(0))
        )
        assert chance.sum().item() == pytest.approx(1) and full.abs().max() > 0.05
        assert torch.allclose(masked, (1 - success) * full, atol=1e-12), size


def test_steps_to_finds_the_first_window_above_the_level():
    path = np.array([[0.0, 0, 0]] * 20 + [[1.0, 0, 0]] * 20)
    assert steps_to(path, 0.5, window=10) == 24 and steps_to(0 * path) == 40


def test_values_at_equal_success_are_where_it_is_first_reached():
    success, y = np.array([0.1, 0.3, 0.2, 0.3, 0.5, 0.4]), np.array([1.0, 2.0, 9.0, 8.0, 4.0, 9.0])
    assert at_success(success, y, np.array([0.1, 0.2, 0.3, 0.4, 0.5])).tolist() == pytest.approx(
        [1, 1.5, 2, 3, 4]
    )
    assert np.isnan(at_success(success, y, np.array([0.05, 0.6]))).all(), (
        "below its start, and never reached"
    )


def test_differences_at_equal_success_do_not_depend_on_the_speed_and_are_paired_by_seed():
    run = Memory()
    for seed in (0, 1):
        for arm, speed in (("full", 4), ("masked", 1)):
            for step in range(0, 41, 2):
                success = min(0.1 + 0.02 * speed * step, 0.9)
                run.log(
                    phase="rl",
                    arm=arm,
                    seed=seed,
                    step=step,
                    success=success,
                    nats=2 - success**2 + 0.1 * (seed + 1) * (arm == "full"),
                )
    assert mask.equal_success(run, "full", "masked", "nats", "success").tolist() == pytest.approx(
        [0.1, 0.2], abs=0.01
    )
    never = Memory()
    never.rows = [row | {"success": 0.0} for row in run.rows]
    assert np.isnan(mask.equal_success(never, "full", "masked", "nats", "success")).all()


# --------------------------------------------------------------------------------------------------
# The task


def test_texts_are_parsed_into_attempts_and_what_they_name():
    attempts, named = parse(TRIES + FOUND + "ANS 8 +6")
    assert attempts == [(3, 6, False), (11, 2, False), (8, 6, True)] and named == (8, 6)
    assert parse(TRIES + "ANS 8") == (attempts[:2], None)
    assert parse("3 +6 =9 NO 11 +2") == (attempts[:1], None)
    assert parse("") == ([], None)
    assert parse(TRIES) == (attempts[:2], None) and parse("ANS 8 +6 OK") == ([], None)
    for words in ("OK +6", "<pad> +6", "3 6", "3 =6", "+3 +6"):
        assert parse(words + " =9 NO") == ([], None)
    assert parse("ANS 8 +6") == ([], (8, 6))
    assert parse(TRIES + "ANS 8 +6 +6")[1] is None
    assert parse("<pad> " + TRIES) == ([], None)


def test_only_two_numbers_of_the_problem_with_its_sum_are_right():
    for text, right in (
        (TRIES + FOUND + "ANS 8 +6", 1),
        ("ANS 12 +2", 1),
        ("ANS 6 +8", 1),
        ("ANS 11 +2", 0),
        ("ANS 8", 0),
        ("ANS 7 +7", 0),
        ("ANS 10 +4", 0),
        ("ANS 2 =12", 0),
        ("OK 8 +6", 0),
    ):
        assert reward(PROBLEM, text) == right, text
    for a, b, right in ((5, 4, 1), (3, 6, 0), (6, 3, 0), (4, 4, 0), (3, 5, 0)):
        assert reward(([5, 3, 4], 8 if a == b else 9), f"ANS {a} +{b}") == right, (
            "one number alone is of the problem; or one, twice"
        )


def test_every_word_has_an_id_of_its_own_and_the_end_decodes_to_nothing():
    assert len(set(TASK.words)) == TASK.n_vocab == 77 and TASK.stop == [TASK.eos]
    text = prompt(PROBLEM) + " " + TRIES + FOUND + "ANS 8 +6"
    assert TASK.decode([*TASK.encode(text), TASK.eos]) == text
    for size in range(1, 9):  # whoever trains on the smaller ones, too
        problem = draw(random.Random(size), size)
        text = demonstrate(random.Random(0), problem, patience=(1, 1))
        assert set(TASK.encode(prompt(problem) + " " + text)) <= set(range(77))
        assert numbers.budget(size) <= 116
    assert numbers.budget(6) == 64


def test_every_problem_has_an_answer_and_every_demonstration_its_format():
    rng, mean = random.Random(0), {}
    for size in (4, 6, 8):
        for kind, how in BASES.items():
            problems, texts, count, true_sums = [], [], 0, []
            for _ in range(300):
                problem = xs, target = draw(rng, size)
                assert len(set(xs)) == size
                assert any(a + b == target for a in xs for b in xs if a != b)
                assert prompt(problem) == f"from {' '.join(map(str, xs))} ?{target}"
                text = demonstrate(rng, problem, **how)
                attempts, named = parse(text)
                assert 1 <= len(attempts) <= 16
                assert len(text.split()) == 4 * len(attempts) + 3
                assert named == attempts[-1][:2]
                assert not any(ok for *_, ok in attempts[:-1])
                true_sums.append(np.mean([f"{a} +{b} ={a + b} " in text for a, b, _ in attempts]))
                count += len(attempts)
                problems.append(problem)
                texts.append(text)
            gap, mean[kind] = verdict_gap(problems, texts), count / 300
            assert np.mean(true_sums) < 0.15 if kind == "no gap" else min(true_sums) == 1
            assert (
                kind != "no gap" or abs(np.mean([parse(t)[0][-1][2] for t in texts]) - 0.3) < 0.1
            ), "a coin of 0.1, tossed about three times"
            assert abs(gap - {"gap": 0.9, "no gap": 0.4}[kind]) < 0.15, (kind, gap)
        assert mean["gap"] > 2 and (size == 4 or mean["gap"] > 2.7), mean


def test_patience_is_drawn_once_a_demonstration():
    rng, drawn = random.Random(0), []
    rng.uniform = lambda *range: drawn.append(range) or 0.9
    for n in range(1, 9):
        demonstrate(rng, PROBLEM)
        assert drawn == [(0.4, 1.0)] * n


def test_a_tenth_of_the_problems_is_held_out_whatever_the_order_of_the_numbers():
    rng, name = random.Random(0), lambda p: (tuple(sorted(p[0])), p[1])
    trained, held_out = (
        {name(draw(rng, 6, h)) for _ in range(n)} for h, n in ((False, 30_000), (True, 3_000))
    )
    assert not trained & held_out and abs(len(held_out) / len(trained | held_out) - 0.1) < 0.03
    assert {x for xs, _ in trained for x in xs} == set(range(1, 13))
    assert {xs for xs, _ in trained} & {xs for xs, _ in held_out}


@pytest.mark.parametrize("size", [3, 6, 8])
def test_a_single_problem_has_one_right_pair(size):
    rng = random.Random(0)

    def pairs(problem):
        return sum(hits(problem, a, b) for a, b in itertools.combinations(problem[0], 2))

    assert all(
        pairs(draw_single(rng, size, held_out)) == 1
        for held_out in (True, False)
        for _ in range(100)
    )
    assert size == 3 or max(pairs(draw(rng, size)) for _ in range(100)) > 1


@pytest.mark.parametrize("single", [False, True])
def test_training_never_sees_a_held_out_problem(single, monkeypatch):
    shown = []
    config = small(
        mask.Config if single else Config, sft_steps=3, sft_batch=32, gate=-1.0, steps=3, budget=16
    )
    monkeypatch.setattr(numbers, "prompt", lambda problem: shown.append(problem) or prompt(problem))
    base = curriculum.warm_up(config, Memory(), 0, "cpu")
    if single:
        mask.train(config, Memory(), "a", 0, base, masked=True, updates=2)
    else:
        curriculum.train(config, Memory(), "a", 0, base, 16)

    def held_out(xs, target):
        return zlib.crc32(bytes([*sorted(xs), target])) % 10 == 0

    apart = {h: [p for p in shown if held_out(*p) == h] for h in (True, False)}
    assert len(apart[False]) == 3 * 32 + 3 * 3 and len(apart[True]) == 8 + 8 + 2 + 2 + 8, (
        "a quarter on the way"
    )
    assert apart[True][8:16] != apart[True][-8:]


def test_behaviour_counts_attempts_different_pairs_hits_and_giving_up():
    texts = [TRIES + FOUND + "ANS 8 +6", TRIES + "6 +3 =9 NO ANS 6 +3", TRIES + "ANS"]
    # 3, 3 and 2 attempts; 2, 3 and 2 of them NO; the second gives up, the third is cut
    how = behaviour([PROBLEM] * 3, texts)
    assert how == pytest.approx(
        dict(attempts=8 / 3, unique_attempts=7 / 3, hit_rate=1 / 8, gives_up=1 / 7)
    )


def test_the_budget_rule_takes_the_papers_choice():
    success = dict(zip((256, 512, 1024, 2048, 4096), (0.06, 0.17, 0.23, 0.24, 0.24), strict=True))
    assert budget_rule(success, 1.2) == 1024
    assert budget_rule(success, 1.5) == 512
    assert budget_rule(success, 3.0) == 256
    assert budget_rule({16: 0.1, 32: 0.2, 64: 0.4}, 1.2) == 32, (
        "no plateau in sight: the largest that could have been one"
    )


def test_zeros_are_no_plateau():
    assert budget_rule({16: 0.0, 32: 0.0, 64: 0.1, 128: 0.11, 256: 0.2}, 1.2) == 64
    assert budget_rule(dict.fromkeys((16, 32, 64, 128, 256), 0.0), 1.2) == 128


def test_advantages_are_divided_by_the_groups_deviation_and_exactly_0_among_equals():
    rewards = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 1], [0.1, 0.1, 0.1, 0.1], [1, 1, 0, 1]])
    adv = advantages(rewards)
    assert (adv[1:3] == 0).all()
    assert adv[0].tolist() == pytest.approx([1.5, -0.5, -0.5, -0.5], abs=1e-4)
    assert adv[3].tolist() == pytest.approx([0.5, 0.5, -1.5, 0.5], abs=1e-4)


@pytest.mark.parametrize("masked", [False, True])
def test_masked_advantages_are_the_positive_part_after_grouping(masked, monkeypatch):
    seen, original = [], mask.reuse
    monkeypatch.setattr(numbers, "reward", lambda problem, text: float(len(text) % 2))
    monkeypatch.setattr(
        mask,
        "reuse",
        lambda model, optimizer, rollout, adv, *how: (
            seen.append((rollout, adv)) or original(model, optimizer, rollout, adv, *how)
        ),
    )
    mask.train(
        small(mask.Config, steps=3, budget=16), Memory(), "a", 0, policy(), masked, updates=2
    )
    ended = [
        rollout.ended(TASK.stop).float()
        * torch.tensor([float(len(text) % 2) for text in rollout.texts(TASK)])
        for rollout, _ in seen
    ]
    full = [advantages(rewards.view(3, 4)) for rewards in ended]
    assert any((adv < 0).any() for adv in full)
    assert all(
        torch.equal(adv, expected.clamp_min(0) if masked else expected)
        for (_, adv), expected in zip(seen, full, strict=True)
    )


# --------------------------------------------------------------------------------------------------
# Training


def test_a_cut_answer_is_the_answer_with_the_smaller_budget():
    model, rng = policy(), random.Random(0)
    prompts = [ids_of(draw(rng, 6)) for _ in range(8)]
    longest = generate(model, prompts, 1, 64, temperature=0, stop=TASK.stop).tokens()
    for tokens in (4, 16, 32):
        assert generate(model, prompts, 1, tokens, temperature=0, stop=TASK.stop).tokens() == [
            t[:tokens] for t in longest
        ]


def test_an_answer_belongs_to_its_problem_and_one_that_does_not_end_is_wrong(monkeypatch):
    rng, asked = random.Random(0), []
    problems = [draw(rng, size) for size in (3, 8, 4, 6)]
    monkeypatch.setattr(
        numbers, "reward", lambda problem, text: asked.append((problem, text)) or 1.0
    )
    rollout, texts, rewards = curriculum.answer(
        policy(), problems, 8, 100, torch.Generator().manual_seed(0)
    )
    assert asked == [(problems[i // 8], text) for i, text in enumerate(texts)]
    assert rewards.shape == (4, 8)
    for ids, tokens, text, (problem, _), right in zip(
        rollout.ids.tolist(),
        rollout.tokens(),
        texts,
        asked,
        rewards.flatten().tolist(),
        strict=True,
    ):
        assert ids[: len(problem[0]) + 2] == ids_of(problem) and TASK.eos not in tokens[:-1]
        assert text == TASK.decode(tokens) and right == (tokens[-1] == TASK.eos)
    assert 4 < rewards.sum() < 32


def test_evaluation_scores_the_cut_answers(monkeypatch):
    asked, drawn = [], []

    def answer(model, problems, n, budget, generator):
        asked.append((len(problems), n, budget, generator.initial_seed()))
        rollout = SimpleNamespace(
            logp=torch.full((8, 12), -0.5), mask=torch.ones(8, 12), lengths=torch.full((8,), 12)
        )
        return rollout, ["3 +6 =9 NO " + FOUND + "ANS 8 +6"] * 8, torch.ones(8, 1)

    monkeypatch.setattr(curriculum, "answer", answer)
    for seed in "ab":
        row = evaluate(
            None,
            6,
            (4, 8, 11, 12, 64),
            seed,
            8,
            draw=lambda rng, size, held_out: drawn.append(rng.random()) or PROBLEM,
        )
        assert [row[f"pass@1 of {b}"] for b in (4, 8, 11, 12, 64)] == [0, 0, 0, 1, 1]
        assert row["attempts"] == 2
        assert row["nats"] == 0.5
    assert [call[:3] for call in asked] == [(8, 1, 64)] * 2
    assert asked[0] != asked[1]
    assert len(set(drawn)) == 16


def test_of_k_answers_one_must_be_right(monkeypatch):
    table = torch.tensor([[0, 0, 1, 0], [0, 0, 0, 0], [1, 1, 0, 0]]).float()
    rollout = SimpleNamespace(
        logp=torch.zeros(12, 8), mask=torch.ones(12, 8), lengths=torch.full((12,), 8)
    )
    monkeypatch.setattr(
        curriculum, "answer", lambda *_: (rollout, [FOUND + "ANS 8 +6"] * 12, table)
    )
    row = evaluate(None, 6, (8,), 0, n=3, k=4, draw=lambda *_: PROBLEM)
    assert row["pass@4 of 8"] == pytest.approx(2 / 3)


def test_the_entropy_of_an_evaluation_is_the_policys():
    model = policy(sharp=1.0)
    row = evaluate(model, 6, (1,), 0, 400)
    logp = model(torch.tensor([ids_of(draw(random.Random(i), 6, True)) for i in range(400)]))[
        :, -1
    ].log_softmax(-1)
    assert row["nats"] == pytest.approx(-(logp.exp() * logp).sum(-1).mean().item(), abs=0.05)


def test_verdicts_by_place_reads_sums_and_verdicts_of_a_model_that_knows_them(monkeypatch):
    drawn = []
    monkeypatch.setattr(
        numbers,
        "draw",
        lambda rng, size, held_out=False: (
            drawn.append((size, held_out)) or draw(rng, size, held_out)
        ),
    )

    class Knows(torch.nn.Module):
        lm_head = torch.nn.Linear(1, 1)

        def forward(self, ids):
            logits = torch.zeros(*ids.shape, TASK.n_vocab)
            for i, row in enumerate(ids.tolist()):
                words = [TASK.words[t] for t in row]
                for t in range(7, len(row)):
                    place = (t - 7) % 4  # after: the target or a verdict, a, b, the sum
                    if "<pad>" in words[: t + 1]:
                        continue
                    if place == 2:
                        logits[i, t, TASK.index[f"={int(words[t - 1]) + int(words[t])}"]] = 1
                    if place == 3:
                        logits[i, t, TASK.index["OK" if words[t][1:] == words[7][1:] else "NO"]] = 1
            return logits

    assert verdicts_by_place(Knows(), small(), 0, places=5, n=8)["right"] in (
        [1.0] * 5,
        pytest.approx([1.0] * 5),
    )
    assert set(drawn) == {(6, True)}


def test_a_base_that_cannot_judge_is_refused():
    with pytest.raises(UserError, match="verdict gap"):
        curriculum.warm_up(small(sft_steps=2, gate=0.6), Memory(), 0, "cpu")
    curriculum.warm_up(small(sft_steps=2, gate=0.6), Memory(), 0, "cpu", "no gap")


@pytest.mark.parametrize("updates", [1, 4])
def test_the_update_is_the_clipped_policy_gradient_over_all_tokens(updates):
    rng, generator = random.Random(0), torch.Generator().manual_seed(0)
    model, reference = policy(), policy()
    rollout, _, _ = curriculum.answer(model, [draw(rng, 6) for _ in range(40)], 4, 24, generator)
    adv = torch.randn(160, 1)
    optimizers = [torch.optim.SGD(m.parameters(), 0.5) for m in (model, reference)]
    state = generator.get_state()
    if updates == 1:
        last = curriculum.update(model, optimizers[0], rollout, adv.view(40, 4))
    else:
        last = mask.reuse(model, optimizers[0], rollout, adv.view(40, 4), generator, updates)
    generator.set_state(state)
    order = torch.randperm(160, generator=generator) if updates > 1 else torch.arange(160)
    clipped = 0
    for rows in order.chunk(updates):  # by hand, in one piece
        log_p = reference(rollout.ids[rows, :-1]).log_softmax(-1)
        logp, entropy, trained_on = (
            log_p.gather(-1, rollout.ids[rows, 1:, None])[..., 0],
            -(log_p.exp() * log_p).sum(-1),
            rollout.mask[rows, 1:],
        )
        rho = (logp - rollout.logp[rows, 1:]).exp()
        good = adv[rows] > 0
        gain = torch.where(good, rho.clamp(max=1.5) * adv[rows], rho.clamp(min=0.8) * adv[rows])
        clipped += int((((rho > 1.5) & good | (rho < 0.8) & ~good) * trained_on).sum())
        loss = -(gain * trained_on).sum() / trained_on.sum()
        optimizers[1].zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        optimizers[1].step()
    assert bool(clipped) == (updates > 1)
    assert last["loss"] == pytest.approx(loss.item(), abs=1e-4)
    assert last["entropy"] == pytest.approx(
        ((entropy * trained_on).sum() / trained_on.sum()).item(), abs=1e-4
    )
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-4)


def test_half_of_the_channels_turn_with_the_position_and_half_do_not():
    model = policy()
    turning = (model.rope[-1] != 1).flatten()
    assert 2 * int(turning.sum()) == turning.numel() and turning[0] and not turning[-1]
    assert model.rope[1:, 0, turning].angle().abs().max() > 0.5


def test_a_model_that_always_says_no_judges_by_chance_everywhere():
    class Denies(torch.nn.Module):
        lm_head = torch.nn.Linear(1, 1)

        def forward(self, ids):
            return torch.nn.functional.one_hot(
                torch.full_like(ids, TASK.index["NO"]), TASK.n_vocab
            ).float()

    assert verdicts_by_place(Denies(), small(), 0, places=5, n=8)["right"] == [0.5] * 5


def test_of_is_each_seeds_own_last_row_though_they_end_at_different_steps():
    run = Memory()
    for seed, last in ((0, 41), (1, 43)):
        for step in (0, 20, last):
            run.log(
                phase="rl",
                arm="a",
                seed=seed,
                step=step,
                x=100 * seed + step,
                **{f"pass@1 of {b}": b * step for b in BUDGETS},
            )
    assert curriculum.of(run, "a", "x").tolist() == [41, 143]
    assert curriculum.of(run, "a", "x", False).tolist() == [0, 100]
    assert curriculum.tested(run, "a").tolist() == [
        [b * 41 for b in BUDGETS],
        [b * 43 for b in BUDGETS],
    ]
    assert not curriculum.tested(run, "a", False).any()


def test_the_base_learns_every_token_of_an_answer_and_none_of_a_problem(monkeypatch):
    monkeypatch.setattr(
        torch.optim, "AdamW", lambda parameters, lr, **_: torch.optim.SGD(parameters, lr)
    )
    config, run, rng = (
        small(sft_steps=1, sft_batch=40, sft_lr=10.0, gate=-1.0),
        Memory(),
        random.Random(3),
    )
    model = curriculum.warm_up(config, run, 3, "cpu")
    torch.manual_seed(3)
    reference, logp = build(config, "cpu"), []
    # by hand, each alone
    for _ in range(40):
        problem = draw(rng, rng.choice((3, 4, 6, 8)))
        answer = [*TASK.encode(demonstrate(rng, problem)), TASK.eos]
        ids = torch.tensor([ids_of(problem) + answer])
        logp.append(
            reference(ids[:, :-1])
            .log_softmax(-1)
            .gather(-1, ids[:, 1:, None])[0, -len(answer) :, 0]
        )
    loss = -torch.cat(logp).mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
    torch.optim.SGD(reference.parameters(), 10 / 50).step()
    assert run.rows[0]["loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert all(
        torch.allclose(a, b, atol=1e-5)
        for a, b in zip(model.parameters(), reference.parameters(), strict=True)
    )


def test_the_bases_learning_rate_rises_for_50_steps_and_then_falls_to_0(monkeypatch):
    rates = []
    monkeypatch.setattr(
        tasks, "descend", lambda optimizer, loss: rates.append(optimizer.param_groups[0]["lr"])
    )
    curriculum.warm_up(small(sft_steps=200, sft_batch=1, sft_lr=2.0, gate=-1.0), Memory(), 0, "cpu")
    assert rates == pytest.approx([2 * min((i + 1) / 50, 1 - i / 200) for i in range(200)])


def test_each_base_and_each_arm_of_each_seed_is_trained_apart_and_once(monkeypatch):
    paid_by_chance(monkeypatch)
    run, config = Memory(), small(sft_steps=2, sft_batch=4, gate=-1.0, steps=1)

    def all_of_them():
        models = [
            curriculum.warm_up(config, run, seed, "cpu", kind)
            for seed in (0, 1)
            for kind in ("gap", "no gap")
        ]
        models += [
            mask.train(config, run, arm, seed, models[0], arm == "b", updates=1)
            for seed in (0, 1)
            for arm in "ab"
        ]
        models += [
            curriculum.train(config, run, arm, seed, models[0], 16)
            for seed in (0, 1)
            for arm in "cd"
        ]
        return [torch.cat([p.flatten() for p in model.parameters()]) for model in models]

    weights, rows = all_of_them(), len(run.rows)
    assert all(not torch.equal(a, b) for i, a in enumerate(weights[:8]) for b in weights[:i])
    assert not torch.equal(weights[8], weights[10])
    assert all(torch.equal(a, b) for a, b in zip(weights, all_of_them(), strict=True))
    assert len(run.rows) == rows


def paid_by_chance(monkeypatch):
    monkeypatch.setattr(curriculum, "answer", paid(curriculum.answer))
    monkeypatch.setattr(mask, "answer", curriculum.answer)


def paid(original):
    """Answers of which those that begin with an odd token are right."""

    def answer(model, problems, n, budget, generator):
        rollout, texts, rewards = original(model, problems, n, budget, generator)
        return (
            rollout,
            texts,
            torch.tensor([tokens[0] % 2 for tokens in rollout.tokens()]).float().view(-1, n),
        )

    return answer


@pytest.mark.parametrize("masked", [None, False, True])
def test_a_run_trains_its_copy_and_logs_every_budget(masked, monkeypatch):
    paid_by_chance(monkeypatch)
    base, run = policy(), Memory()
    before = {k: v.clone() for k, v in base.state_dict().items()}

    def train(run, **choices):
        if masked is None:
            return curriculum.train(small(**choices), run, "a", 0, base, 16)
        return mask.train(
            small(mask.Config, **choices, budget=16), run, "a", 0, base, masked, updates=1
        )

    model = train(run)
    assert all(torch.equal(v, before[k]) for k, v in base.state_dict().items())
    assert any(not torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(torch.equal(v, before[k]) for k, v in train(Memory(), lr=0.0).state_dict().items())
    tests = BUDGETS if masked is None else (16, 32)
    assert [row["step"] for row in run.rows] == [0, 1, 2]
    assert all(f"pass@1 of {b}" in row for row in run.rows for b in tests)


@pytest.mark.parametrize("masked, updates", [(True, 1), (False, 4)])
def test_every_option_reaches_the_weights(masked, updates, monkeypatch):
    paid_by_chance(monkeypatch)
    config = small(mask.Config, steps=5, budget=16)
    plain, other = (
        mask.train(config, Memory(), "a", 0, policy(), *how)
        for how in ((False, 1), (masked, updates))
    )
    assert any(
        (a - b).abs().max() > 1e-5
        for a, b in zip(plain.state_dict().values(), other.state_dict().values(), strict=True)
    )


def spied(monkeypatch):
    """A list that grows with every batch sampled: (numbers, budget, tokens)."""
    seen, original = [], curriculum.answer

    def answer(model, problems, n, budget, generator):
        rollout, texts, rewards = original(model, problems, n, budget, generator)
        seen.append((len(problems[0][0]), budget, int(rollout.lengths.sum())))
        return rollout, texts, rewards

    monkeypatch.setattr(curriculum, "answer", answer)
    return seen


def test_a_stage_ends_where_its_next_batch_might_sample_too_much(monkeypatch):
    # 3 x 4 answers a batch
    seen, run, config = spied(monkeypatch), Memory(), small(coupled.Config, eval_every=100)
    coupled.train(config, run, "a", 0, policy(), [(4, 8, 300), (8, 16, 500)])
    assert seen[0][:2] == seen[-1][:2] == (8, 512), "evaluated on the last stage's problems"
    sampled = 0
    for size, tokens_each, tokens in seen[1:-1]:
        assert (size, tokens_each) == ((4, 8) if sampled + 12 * 8 <= 300 else (8, 16))
        assert sampled + 12 * tokens_each <= 800
        sampled += tokens
    assert (
        run.rows[-1]["sampled_tokens"]
        == run.state["a 0"]["kept"]["sampled"]
        == sampled
        <= 800
        < sampled + 12 * 16
    )


def test_an_arm_that_goes_on_after_another_is_the_arm_that_never_stopped(monkeypatch):
    """With its optimizer, random streams and tokens: the curriculum is treated like its rivals."""
    paid_by_chance(monkeypatch)
    config, run, stages = (
        small(coupled.Config, eval_every=100),
        Memory(),
        [(4, 8, 300), (8, 16, 500)],
    )
    whole = coupled.train(config, Memory(), "whole", 0, policy(), stages)
    coupled.train(config, run, "first", 0, policy(), stages[:1])
    halves = coupled.train(config, run, "second", 0, policy(), stages, after="first")
    assert all(
        torch.equal(a, b)
        for a, b in zip(whole.state_dict().values(), halves.state_dict().values(), strict=True)
    )
    assert any(
        not torch.equal(a, b)
        for a, b in zip(halves.state_dict().values(), policy().state_dict().values(), strict=True)
    )


def test_arms_that_count_tokens_are_tested_on_the_same_problems_in_the_end(monkeypatch):
    asked, original = [], curriculum.evaluate
    monkeypatch.setattr(
        coupled,
        "evaluate",
        lambda *how, **choices: asked.append(how[3]) or original(*how, **choices),
    )
    for tokens in (8, 16):
        coupled.train(
            small(coupled.Config, eval_every=100), Memory(), "a", 0, policy(), [(6, tokens, 800)]
        )
    assert asked[:2] == asked[2:] and asked[0] != asked[1]


def test_lengths_of_right_and_of_wrong_answers_are_told_apart(monkeypatch):
    monkeypatch.setattr(numbers, "reward", lambda problem, text: float(len(text.split()) < 8))
    run = Memory()
    curriculum.train(small(steps=6), run, "a", 0, policy(), 16)
    both = [row for row in run.rows[1:] if row["length_right"] and row["length_wrong"]]
    assert both
    assert all(
        row["length_right"] < row["length"] < row["length_wrong"] and row["length_right"] <= 8
        for row in both
    )


def test_an_answer_is_compared_with_the_others_to_its_problem(monkeypatch):
    seen, original = [], curriculum.advantages
    sampled = curriculum.answer

    def by_problem(model, problems, n, *how):
        return (
            *sampled(model, problems, n, *how)[:2],
            torch.tensor([[float(p[1] % 2)] * n for p in problems]),
        )

    monkeypatch.setattr(curriculum, "answer", by_problem)
    monkeypatch.setattr(
        curriculum, "advantages", lambda rewards: seen.append(rewards) or original(rewards)
    )
    curriculum.train(small(steps=4), Memory(), "a", 0, policy(), 16)
    assert all(rewards.shape == (3, 4) and (rewards == rewards[:, :1]).all() for rewards in seen)
    assert 0 < torch.stack(seen).mean() < 1


@pytest.mark.parametrize("what", ["base", "rl", "mask"])
def test_interrupting_between_two_steps_changes_nothing(what, monkeypatch):
    paid_by_chance(monkeypatch)
    whole, halves, config = (
        Memory(),
        Memory(),
        small(steps=4, eval_every=2, sft_steps=4, sft_batch=4, gate=-1.0),
    )

    def go(run):
        if what == "mask":
            return mask.train(config, run, "a", 0, policy(), masked=True, updates=1)
        return (
            curriculum.warm_up(config, run, 0, "cpu")
            if what == "base"
            else curriculum.train(config, run, "a", 0, policy(), 16)
        )

    a = go(whole)
    steps, descend = [], curriculum.descend

    def interrupted(optimizer, loss):
        steps.append(loss)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return descend(optimizer, loss)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tasks if what == "base" else curriculum, "descend", interrupted)
        go(halves)
    (phase,) = halves.state
    assert 0 < halves.state[phase]["step"] <= 2
    halves.rows = halves.rows[: halves.kept_rows]
    b = go(halves)
    assert halves.rows == whole.rows
    assert all(
        torch.equal(x, y)
        for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


def test_a_finished_run_resumed_with_more_steps_is_the_longer_run_to_the_bit(monkeypatch):
    paid_by_chance(monkeypatch)
    run = Memory()
    a = curriculum.train(small(steps=4), Memory(), "a", 0, policy(), 16)
    curriculum.train(small(steps=2), run, "a", 0, policy(), 16)
    b = curriculum.train(small(steps=4), run, "a", 0, policy(), 16)
    assert all(
        torch.equal(x, y)
        for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )
    assert [row["step"] for row in run.rows] == [0, 1, 2, 3, 4]


# --------------------------------------------------------------------------------------------------
# The figures: which arms they train, and what they claim


def measured(arm, key, seed=None, last=True):
    """A number of its own for whatever a claim could be about; without a seed, the mean of two."""
    return np.mean(
        [
            random.Random(f"{arm}, {key}, {s}, {last}").uniform(0.1, 1)
            for s in ((0, 1) if seed is None else (seed,))
        ]
    )


class Folderless(Memory):
    """What main writes to: it keeps the figure's title and the claims."""

    def __exit__(self, *_):
        pass

    def introduce(self, *_):
        pass

    def finish(self, fig, claims):
        self.title, self.claimed = fig.get_suptitle(), claims
        plt.close(fig)


def make(module, monkeypatch, seeds=2):
    """main, where models are names and metrics are `measured` -> the figure's title, {claim: its
    value}, the claims with an upper bound, {(arm, seed): base and the rest of what train was
    given}, the claims that hold.
    """
    arms, run = {}, Folderless()

    def train(config, run, arm, seed, base, *how):
        arms[arm, seed] = base, *how
        for last in (False, True):
            run.log(
                phase="rl",
                arm=arm,
                seed=seed,
                step=int(last),
                **{
                    key: measured(arm, key, seed, last)
                    for key in (
                        "attempts",
                        "unique_attempts",
                        "nats",
                        "gap",
                        *(f"pass@1 of {b}" for b in TESTS),
                    )
                },
            )
        return f"{arm} {seed}"

    monkeypatch.setattr(module, "train", train)
    monkeypatch.setattr(module, "show", lambda *_, **__: None)
    monkeypatch.setattr(
        module, "warm_up", lambda config, run, seed, device, kind="gap": f"{kind} {seed}"
    )
    monkeypatch.setattr(
        module, "parse_args", lambda Config, doc: small(Config, seeds=seeds, device="cpu")
    )
    monkeypatch.setattr(module, "Run", lambda config: run)
    module.main()
    claims = run.claimed
    return (
        run.title,
        {c["id"]: float(c["ours"].split()[0]) for c in claims},
        {c["id"] for c in claims if c["threshold"].startswith("<=")},
        arms,
        {c["id"] for c in claims if c["holds"]},
    )


def claimed(expected):
    return pytest.approx(expected, rel=6e-3)  # three digits


def test_the_lesson_compares_arms_that_differ_in_one_thing(monkeypatch):
    monkeypatch.setattr(
        curriculum,
        "verdicts_by_place",
        lambda base, config, seed: dict(right=[measured(base, "place", i) for i in range(56)]),
    )
    _, claims, upper, arms, _ = make(curriculum, monkeypatch)
    for seed in (0, 1):
        assert {arm: how for (arm, s), how in arms.items() if s == seed} == {
            "full": (f"gap {seed}", 64),
            "no gap": (f"no gap {seed}", 64),
            "budget 16": (f"gap {seed}", 16),
        }
    place = np.array([[measured(f"gap {seed}", "place", i) for i in range(56)] for seed in (0, 1)])
    grown = {
        arm: np.mean(
            [measured(arm, "attempts", s) / measured(arm, "attempts", s, False) for s in (0, 1)]
        )
        for arm in ("full", "no gap")
    }
    rise = {
        arm: measured(arm, "pass@1 of 64") - measured(arm, "pass@1 of 64", last=False)
        for arm in ("full", "no gap")
    }

    def gain(arm, last=True):
        return measured(arm, "pass@1 of 64", last=last) - measured(arm, "pass@1 of 16", last=last)

    assert claims == claimed(
        {
            "no gap": max(measured("no gap", "gap", s, False) for s in (0, 1)),
            "positions": place[:, 16:].mean() - place[:, :16].mean(),
            "attempts": grown["full"],
            "attempts no gap": grown["no gap"],
            "rise": rise["full"],
            "rise no gap": rise["no gap"],
            "extrapolation": gain("budget 16") - gain("full", last=False),
        }
    )
    assert upper == {"no gap", "attempts no gap", "rise no gap"}


def tables(monkeypatch, pk_train, pk_reuse, seeds=8):
    """The p^k experiment with other paths -> {claim: its value}, the claims with an upper bound,
    those that hold.
    """
    run = Folderless()
    monkeypatch.setattr(negatives, "pk_train", pk_train)
    monkeypatch.setattr(negatives, "pk_reuse", pk_reuse)
    monkeypatch.setattr(negatives, "parse_args", lambda Config, doc: Config(seeds=seeds))
    monkeypatch.setattr(negatives, "Run", lambda config: run)
    negatives.main()
    claims = run.claimed
    return (
        {c["id"]: float(c["ours"].split()[0]) for c in claims},
        {c["id"] for c in claims if c["threshold"].startswith("<=")},
        {c["id"] for c in claims if c["holds"]},
    )


def test_the_claims_on_tables_are_differences_of_full_and_masked_seed_by_seed(monkeypatch):
    # half of a window of 10 is right 4 steps after the start
    def pk_train(masked, seed, steps):
        path = np.full((steps, 3), 1.0)
        path[: (300 if masked else 100) + 16 * seed, 0] = 0
        path[50, 1:] = (90, 1.5) if masked else (3 + seed, 1.1 + 0.1 * seed)
        return path

    def pk_reuse(masked, seed, updates, batches, lr, eps):
        asked.append((masked, seed, updates, lr, eps))
        success = np.linspace(0, 1, 3 if masked else 9)
        shift = 0 if masked else {1: 0.03, 16: 2 if eps == 0.2 else -0.07}[updates] + 0.01 * seed
        return np.stack(
            (success, 4 - success + shift, 9 + success - shift, 1 + success + 2 * shift), 1
        )

    asked = []
    claims, upper, _ = tables(monkeypatch, pk_train, pk_reuse)
    assert sorted(asked) == sorted(
        (masked, seed, *how)
        for masked in (False, True)
        for seed in range(8)
        for how in ((1, 10.0, 0.2), (16, 3.0, 0.2), (16, 3.0, math.inf))
    )
    assert claims == claimed(
        {
            "pk": (304 + 32) / (104 + 32),
            "pk length": 5,
            "pk entropy": 0.3,
            "pk entropy masked": -0.2,
            "pk one update": 0.065,
            "pk clip": 2.035,
            "pk no clip": 0.035,
            "pk clip answers": 4.07,
            "pk clip draws": -2.035,
        }
    )
    assert upper == {"pk one update", "pk no clip"}


def test_a_success_that_is_never_reached_holds_no_claim(monkeypatch):
    success = np.linspace(0, 0.5, 9)
    _, upper, held = tables(
        monkeypatch,
        lambda masked, seed, steps: np.zeros((steps, 3)) + 1,
        lambda *_: np.stack((success,) * 4, 1),
    )
    assert held == set() and upper


def judged(monkeypatch, tables):
    """coupled's `evaluate`: J(B) by the name of stage 1's model and k."""

    def evaluate(model, size, budgets, seed, n, held_out, k):
        assert (size, budgets, held_out, n) == (
            8,
            BUDGETS,
            False,
            small().eval_prompts // (4 if k > 1 else 1),
        )
        assert seed == f"rule {model[-1]}"
        return {f"pass@{k} of {b}": x for b, x in zip(BUDGETS, tables[model, k], strict=True)}

    monkeypatch.setattr(coupled, "evaluate", evaluate)


def test_the_curriculum_and_its_rivals_have_the_same_tokens_and_train_what_the_rule_picks(
    monkeypatch,
):
    judged(
        monkeypatch,
        {
            ("stage 1 0", 1): (1, 2, 2, 2, 2),
            ("stage 1 1", 1): (2, 2, 2, 2, 2),
            ("stage 1 2", 1): (1, 2, 3, 4, 4.1),
        },
    )
    title, claims, upper, arms, _ = make(coupled, monkeypatch, seeds=3)
    T, chosen = 400_000, (32, 16, 128)
    for seed, b in enumerate(chosen):
        assert {arm: how for (arm, s), how in arms.items() if s == seed} == {
            "stage 1": (f"gap {seed}", [(4, 16, T)]),
            **{
                f"stage 2 at {at}": (f"gap {seed}", [(4, 16, T), (8, at, T)], "stage 1")
                for at in (16, 32, 64, 128)
            },
            "hard only": (f"gap {seed}", [(8, b, 2 * T)]),
            "data only": (f"gap {seed}", [(4, b, T), (8, b, T)]),
            "budget only": (f"gap {seed}", [(8, 16, T), (8, b, T)]),
        }

    def at(arm, factor):
        return np.mean(
            [
                measured(arm.format(b), f"pass@1 of {b * factor}", seed)
                for seed, b in enumerate(chosen)
            ]
        )

    ahead = {
        arm: at("stage 2 at {}", 4) - at(arm, 4)
        for arm in ("hard only", "data only", "budget only")
    }
    longest = np.array(
        [
            [measured(f"stage 2 at {b}", "pass@1 of 512", seed) for b in (16, 32, 64, 128)]
            for seed in range(3)
        ]
    )
    assert claims == claimed(
        {
            **{f"over {arm}": x for arm, x in ahead.items()},
            "rule": (longest.max(1) - longest[[0, 1, 2], [1, 0, 3]]).mean(),
        }
    )
    assert upper == {"rule"}
    assert all(f"{x:+.2f}" in title for x in ahead.values())


def test_where_stage_1_solves_no_hard_problem_the_rule_looks_at_pass_at_16(monkeypatch):
    judged(
        monkeypatch,
        {
            ("stage 1 0", 1): (0, 0, 0.3, 0.3, 0.3),
            ("stage 1 0", 16): (0.1, 0.3, 0.35, 0.6, 0.7),
            ("stage 1 1", 1): (0.1, 0.11, 0.3, 0.3, 0.3),
        },
    )
    *_, arms, _ = make(coupled, monkeypatch)
    assert [arms["hard only", seed][1][0][1] for seed in (0, 1)] == [32, 16]


def test_budgets_differ_in_the_budget_alone(monkeypatch):
    _, claims, upper, arms, _ = make(budget, monkeypatch)
    assert arms == {
        (f"budget {b}", seed): (f"gap {seed}", b) for b in (16, 32, 64, 128) for seed in (0, 1)
    }

    def at(trained, tested):
        return measured(f"budget {trained}", f"pass@1 of {tested}")

    assert claims == claimed(
        dict(
            short=at(64, 64) - at(16, 64),
            flat=at(16, 256) - at(16, 64),
            gain=at(64, 256) - at(64, 64),
            long=at(16, 16) - at(128, 16),
        )
    )
    assert upper == {"flat"}


def test_designs_of_mask_differ_in_the_mask_alone(monkeypatch):
    def equal_success(run, full, masked, key, success):
        assert success == "pass@1 of 64" and full.replace("full", "masked") == masked
        return np.array(
            [measured(full, key, seed) - measured(masked, key, seed) for seed in (0, 1)]
        )

    monkeypatch.setattr(mask, "equal_success", equal_success)
    _, claims, upper, arms, _ = make(mask, monkeypatch)
    designs = {"1 update": 1, "16 updates": 16}
    assert arms == {
        (f"{design}, {arm}", seed): (f"gap {seed}", arm == "masked", updates)
        for design, updates in designs.items()
        for arm in ("full", "masked")
        for seed in (0, 1)
    }

    def apart(design, key):
        return measured(f"{design}, full", key) - measured(f"{design}, masked", key)

    assert claims == claimed(
        {
            "one entropy": abs(apart("1 update", "nats")),
            "reuse entropy": apart("16 updates", "nats"),
            "reuse entropy end": apart("16 updates", "nats"),
            "reuse attempts": apart("16 updates", "unique_attempts"),
            **{f"accuracy {design}": apart(design, "pass@1 of 128") for design in designs},
        }
    )
    assert upper == {"one entropy"}


@pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)
def test_where_all_arms_are_alike_no_claim_of_a_difference_holds(module, monkeypatch):
    import test_curriculum

    monkeypatch.setattr(test_curriculum, "measured", lambda *_: 0.5)
    monkeypatch.setattr(curriculum, "verdicts_by_place", lambda *_: dict(right=[0.5] * 56))
    monkeypatch.setattr(mask, "equal_success", lambda *_: np.zeros(2))
    monkeypatch.setattr(
        coupled, "evaluate", lambda *_, k, **__: {f"pass@{k} of {b}": 0.5 for b in BUDGETS}
    )
    _, _, upper, _, held = make(module, monkeypatch)
    assert upper <= held <= upper | {"positions"}, "a fall that must not be there"


def test_where_negatives_change_nothing_no_claim_on_tables_of_a_difference_holds(monkeypatch):
    success = np.linspace(0, 1, 9)
    _, upper, held = tables(
        monkeypatch,
        lambda masked, seed, steps: np.ones((steps, 3)),
        lambda *_: np.stack((success,) * 4, 1),
    )
    assert held == upper


# --------------------------------------------------------------------------------------------------
# The command


@pytest.mark.parametrize(
    "module, seeds, steps, eval_every",
    [(curriculum, 1, 80, 20), (coupled, 3, 80, 20), (budget, 3, 80, 20), (mask, 3, 40, 4)],
)
def test_an_experiments_own_seeds_and_steps(module, seeds, steps, eval_every):
    config = parse_args(module.Config, "", [])
    assert (config.seeds, config.steps, config.eval_every) == (seeds, steps, eval_every)
    assert config.out == f"out/{module.__name__.split('.')[-1]}"
    assert parse_args(module.Config, "", ["--quick"]).seeds == 1


@pytest.mark.parametrize("script", MODULES)
def test_a_quick_run_writes_figure_samples_metrics_claims_config_and_checkpoint(script, tmp_path):
    assert (
        check_quick(script, tmp_path, "--n-layer", 1, also=("samples.txt",))
        == script.removesuffix(".py").split(".")[-1]
    )
    rows = (tmp_path / "samples.txt").read_text().splitlines()
    assert sum(row.startswith("from ") for row in rows) == 3
    assert sum(row.split()[0] == "base" for row in rows) == 3


def test_a_quick_run_on_tables_writes_figure_metrics_claims_and_config(tmp_path):
    assert check_quick("experiments.negatives", tmp_path) == "negatives"


@pytest.mark.parametrize("script", [*MODULES, "experiments.negatives"])
def test_help_lists_every_flag(script):
    check_help(script)


@pytest.mark.parametrize(
    "flags",
    [
        "--bogus",
        "--steps 0",
        "--size 20",
        "--budget 4",
        "--gate nan",
        "--n-embd 65",
        "--resume",
        "--n-layer 4000000000",
        "--n-embd 100000000",
        "--n-layer 100000000000",
        "--prompts 1001",
        "--sft-batch 1000000000",
        "--lr 1e300",
        "--seeds 0",
        "--steps -1",
        "--lr -1",
    ],
)
def test_a_mistake_in_the_flags_is_one_line_and_exit_code_2(flags, tmp_path):
    check_mistake("curriculum.py", flags, tmp_path)


@pytest.mark.parametrize(
    "flags", ["--kappa nan", "--kappa 1e31", "--stage-tokens 1", "--quick --stage-tokens 2047"]
)
def test_a_mistake_in_the_flags_of_the_curriculum_is_one_line_and_exit_code_2(flags, tmp_path):
    check_mistake("experiments.coupled", flags, tmp_path)


@pytest.mark.parametrize(
    "script, flags",
    [
        ("experiments.budget", "--budget 32"),
        ("experiments.coupled", "--size 4"),
        ("experiments.coupled", "--steps 5"),
        ("experiments.coupled", "--budget 32"),
    ],
)
def test_a_flag_that_does_nothing_is_one_line_that_says_so(script, flags, tmp_path):
    assert "does nothing here" in complain(script, "--quick", "--out", tmp_path, *flags.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "script, flags",
    [
        ("experiments.budget", "--steps 1 --eval-every 1"),
        ("experiments.budget", "--steps 3 --eval-every 1000 --lr 0"),
        ("curriculum.py", "--prompts 1 --group 2 --n-head 1 --n-embd 8"),
        ("experiments.budget", "--size 3 --eval-prompts 4"),
        ("curriculum.py", "--sft-steps 1 --sft-batch 1 --sft-lr 0"),
        ("experiments.budget", "--seed 4294967294 --seeds 2"),
        ("experiments.mask", "--size 8 --budget 32"),
        ("experiments.mask", "--steps 1 --prompts 1 --group 2"),
        ("experiments.coupled", "--stage-tokens 2048 --kappa 1 --eval-every 1000"),
    ],
)
def test_odd_command_lines_run(script, flags, tmp_path):
    finish(script, "--quick", "--n-layer", 1, "--out", tmp_path, *flags.split())
    check_whole(tmp_path, ("samples.txt",))


@pytest.mark.parametrize("flag", ["--lr", "--sft-lr"])
def test_a_run_that_diverges_ends_with_one_line_and_keeps_what_was_finite(
    flag, tmp_path, monkeypatch
):
    paid_by_chance(monkeypatch)
    code, _, err = launch(
        "experiments.budget", "--quick", "--n-layer", 1, "--out", tmp_path, flag, "1e20"
    )
    error = err.splitlines()[-1]
    assert code == 2
    assert error.startswith("experiments.budget: error: ")
    assert "model.pt" in error
    assert not (tmp_path / "claims.json").exists()
    assert all(
        math.isfinite(x) for row in metrics(tmp_path) for x in row.values() if isinstance(x, float)
    )
    states = torch.load(tmp_path / "model.pt", weights_only=True)["state"]
    assert all(
        torch.isfinite(p).all() for state in states.values() for p in state["model"].values()
    )
    assert flag == "--sft-lr" or states


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_an_evaluation_is_heeded_at_once_and_nothing_is_lost(
    number, tmp_path, monkeypatch
):
    flags, calls, original = ("--quick", "--n-layer", 1), [], numbers.behaviour
    finish("experiments.budget", *flags, "--out", tmp_path / "whole")

    def behaviour(*how):
        calls.append("evaluating")
        if len(calls) == 5:  # the gate, then twice an arm
            os.kill(os.getpid(), number)
            calls.append("went on")
        return original(*how)

    with monkeypatch.context() as patch:
        patch.setattr(numbers, "behaviour", behaviour)
        code, out, _ = launch("experiments.budget", *flags, "--out", tmp_path / "cut")
    assert code == 128 + number and calls == ["evaluating"] * 5 and "--resume" in out
    finish("experiments.budget", "--resume", "--out", tmp_path / "cut")
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")


def test_interrupt_and_resume_give_the_metrics_of_an_uninterrupted_run_to_the_bit(tmp_path):
    marks = dict(phase="sft"), dict(phase="rl")
    flags = "--quick --n-layer 1 --sft-steps 40 --steps 4"
    check_resume("curriculum.py", tmp_path, marks, *flags.split())


def test_an_interrupted_curriculum_goes_on_after_stage_1_as_if_nothing_had_happened(
    tmp_path, monkeypatch
):
    """Tests of 512 tokens would take most of the time: here they tell the weights that they were
    asked about.
    """

    def evaluate(model, size, budgets, seed, n, held_out=True, k=1):
        return {f"pass@{k} of {b}": 0.5 for b in budgets} | {
            "attempts": sum(p.abs().sum().item() for p in model.parameters())
        }

    monkeypatch.setattr(coupled, "evaluate", evaluate)
    paid_by_chance(monkeypatch)
    # the second cut is in the middle of an arm
    marks = dict(phase="rule"), dict(phase="rl", arm="stage 2 at 64", step=3)
    flags = "--quick --n-layer 1 --stage-tokens 4096 --eval-every 1"
    check_resume("experiments.coupled", tmp_path, marks, *flags.split())
    weights = {
        row["arm"]: row["attempts"] for row in metrics(tmp_path / "whole") if row["phase"] == "rl"
    }
    assert len(set(weights.values())) > 4, "the arms were trained"


def test_an_interrupted_experiment_on_tables_measures_nothing_twice(tmp_path):
    check_resume(
        "experiments.negatives",
        tmp_path,
        (dict(phase="speed", arm="masked"), dict(phase="16 updates, clipped")),
        "--quick",
    )


@pytest.mark.parametrize("task", ["numbers"])
def test_the_first_rung_learns_this_task_too(task, tmp_path):
    finish("reinforce.py", "--task", task, "--quick", "--out", tmp_path)
