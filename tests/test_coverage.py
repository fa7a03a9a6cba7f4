"""coverage.py: the profile and its bounds by enumeration, the tournaments by hand, the graphs, the
linear model, the trainer, and the command.
"""

import copy
import dataclasses
import itertools
import json
import math
import os
import random
import signal

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
    finish,
    launch,
    metrics,
)

import coverage as cov
import tasks
from coverage import (
    ANSWER,
    PROMPT,
    Config,
    answer_logp,
    best_of_n_loss,
    build,
    coverage,
    kl_bound,
    measure_logp,
    pass_at_k,
    ranks,
    spearman,
)
from experiment import NotFinite, load_checkpoint
from experiments import dco, horizon, optimizers, selection, token_steps
from experiments.dco import dco_loss
from experiments.optimizers import exact_coverage, gradient, log_probs, project, truncated_weights
from experiments.selection import best, offset_tournament, tournament
from experiments.token_steps import teacher_forced, token_step
from tasks import paths
from tasks.paths import PAD, SECRET, graphs

EXPERIMENTS = {m.__name__: m for m in (selection, dco, horizon, optimizers, token_steps)}


def two_distributions(seed, outcomes=50, spread=2.0):
    rng = np.random.default_rng(seed)
    D, p = (np.exp(spread * rng.standard_normal(outcomes)) for _ in range(2))
    return D / D.sum(), p / p.sum()


def exact(D, p, N):
    """Cov_N by its definition."""
    return float(sum(d for d, q in zip(D, p, strict=True) if d / q >= N))


def best_of_n(p, reward, N):
    """p, reward (outcomes,) -> the expected reward of the best of N draws of p, exactly: sort by
    reward, P(best <= r) = P(one <= r)^N.
    """
    order = np.argsort(reward)
    below = np.minimum(np.cumsum(p[order]), 1.0) ** N
    return float(reward[order] @ np.diff(below, prepend=0.0))


def hard_reward(D, p, N):
    """Prop. D.7: a reward of 0 and 1, at which the best of N loses at least half of Cov_2N: paid
    where D is 2N times as likely as p.
    """
    return (2 * N * p <= D).astype(float)


def small(kind=Config, **choices):
    return kind(
        **{
            **dict(n_layer=1, n_head=2, n_embd=16, batch=8, steps=4, eval_every=2, eval_prompts=16),
            **choices,
        }
    )


def trained(config, run, phase, seed, base, mixture, rates, *loss):
    """A copy of the base after train's steps."""
    model = copy.deepcopy(base)
    for _ in cov.train(config, run, phase, seed, model, mixture, rates, *loss):
        pass
    return model


# --------------------------------------------------------------------------------------------------
# Coverage and its bounds


@pytest.mark.parametrize("seed", range(5))
def test_coverage_is_the_tail_of_the_log_ratio_and_falls_with_n(seed):
    D, p = two_distributions(seed)
    log_ratio, Ns = np.log(D) - np.log(p), (1.01, 2, 3, 4, 8, 16, 64, 1000)
    values = [coverage(log_ratio, N, D) for N in Ns]
    assert values == pytest.approx([exact(D, p, N) for N in Ns])
    assert values == sorted(values, reverse=True)
    assert values[0] > values[-1]


def test_coverage_of_a_batch_and_at_the_level_itself():
    log_ratio = np.log([[4.0, 3.9, 1.0, 8.0], [1.0, 1.0, 1.0, 1.0]])
    assert coverage(log_ratio, 4).tolist() == [0.5, 0.0]
    assert coverage(log_ratio, 1).tolist() == [1.0, 1.0]
    assert coverage(log_ratio, 4, [0.7, 0.1, 0.1, 0.1]).tolist() == pytest.approx([0.8, 0.0])


@pytest.mark.parametrize("seed", range(20))
def test_the_kl_bounds_the_coverage_of_every_n(seed):
    D, p = two_distributions(seed, spread=0.5 + seed / 5)
    kl = float(D @ np.log(D / p))
    for N in (3, 4, 8, 16, 100):
        assert exact(D, p, N) <= kl_bound(kl, N) + 1e-12
    # a Bernoulli pair for which it is nearly tight
    D, p = (np.array([q, 1 - q]) for q in (1e-4, 1e-4 / 16))
    assert exact(D, p, 16) / kl_bound(float(D @ np.log(D / p)), 16) > 0.999


def test_best_of_n_by_enumeration():
    p, reward = np.array([0.5, 0.2, 0.2, 0.1]), np.array([0.3, 1.0, 0.0, 0.3])
    for N in (1, 2, 3):
        by_hand = sum(
            math.prod(p[list(ys)]) * reward[list(ys)].max()
            for ys in itertools.product(range(4), repeat=N)
        )
        assert best_of_n(p, reward, N) == pytest.approx(by_hand)


@pytest.mark.parametrize("seed", range(10))
def test_coverage_bounds_what_best_of_n_loses_and_a_hard_reward_loses_half_of_it(seed):
    D, p = two_distributions(seed)
    rng = np.random.default_rng(seed)
    for N in (2, 8, 32, 200):
        bound = best_of_n_loss(lambda M: exact(D, p, M), N)
        assert N < 200 or bound < 0.9, "a bound that says something"
        for reward in (rng.random(50), (rng.random(50) < 0.1).astype(float), hard_reward(D, p, N)):
            # Prop. D.6
            assert D @ reward - best_of_n(p, reward, N) <= bound + 1e-12
        reward = hard_reward(D, p, N)
        # Prop. D.7
        assert D @ reward - best_of_n(p, reward, N) >= exact(D, p, 2 * N) / 2 - 1e-12
    assert exact(D, p, 4) > 0, "and it is not empty"
    assert hard_reward(np.array([0.4, 0.4, 0.2]), np.array([0.1, 0.11, 0.79]), 2).tolist() == [
        1,
        0,
        0,
    ]


def test_the_bound_on_best_of_n_takes_the_best_level_that_covers_half():
    for N in (2, 8, 32):
        # N = 2 M log(1 / eps) at M = 1
        assert best_of_n_loss(lambda M: 0.0, N) == pytest.approx(math.exp(-N / 2))
        assert best_of_n_loss(lambda M: 0.51, N) == 1
        assert best_of_n_loss(lambda M: 0.5, N) == pytest.approx(min(1, 0.5 + math.exp(-N / 2)))
    # a grid of levels misses 8
    assert best_of_n_loss(lambda M: 0.3 if M < 8 else 0.0, 64) == pytest.approx(
        math.exp(-64 / 16), rel=0.5
    )


def test_pass_at_n_is_one_minus_the_chance_that_all_miss():
    p = np.array([1e-9, 0.01, 0.3, 0.999, 1.0])
    for N in (1, 2, 16):
        assert pass_at_k(np.log(p), N) == pytest.approx(1 - (1 - p) ** N, rel=1e-6)


def test_the_tournament_by_hand():
    # answers (columns) of three checkpoints: the second misses one answer by far, the third all by
    # a little
    logp = np.log(np.array([[0.5, 0.5, 0.4, 0.5], [0.9, 0.9, 0.9, 0.01], [0.3, 0.3, 0.3, 0.3]]))
    assert tournament(logp, 4).tolist() == [0.0, 0.25, 0.0]
    assert tournament(logp, 1.5).tolist() == [0.75, 0.25, 0.75]
    assert tournament(logp, 40).tolist() == [0.0, 0.25, 0.0]
    assert tournament(logp, 100).tolist() == [0.0, 0.0, 0.0]


def test_the_offset_tournament_forgives_what_a_checkpoint_says_of_itself():
    rng = np.random.default_rng(0)
    logp, own = (
        np.log(rng.random((3, 40))),
        np.log(rng.random((3, 1, 40))) + 0.3 * rng.standard_normal((3, 3, 40)),
    )
    for N, a in ((2, 0.0), (2, 0.5)):
        scores = []
        for i in range(3):
            rivals = [
                np.mean(logp[j] - logp[i] >= math.log(N))
                - 2 * N**a * np.mean(own[i, j] - own[i, i] >= math.log(N))
                for j in range(3)
            ]
            scores.append(max(rivals))
        assert offset_tournament(logp, own, N, a) == pytest.approx(scores) and min(scores) > 0


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_what_is_no_number_is_never_the_best_of_anything(broken):
    assert coverage([math.nan, math.nan], 4) == 1 and coverage([math.nan, 0.0], 4) == 0.5
    assert best_of_n_loss(lambda M: math.nan, 8) == 1
    assert math.isnan(pass_at_k(np.array([math.nan]), 8)[0])
    x = np.array([1.0, 2.0, 3.0])
    assert math.isnan(spearman(x, np.array([1.0, math.nan, 3.0])))
    assert math.isnan(spearman(np.array([math.nan] * 3), x))
    assert exact_coverage(np.array([[math.nan] * 3, optimizers.TRUTH]), 16, 16) == pytest.approx(
        [1, 0], abs=1e-3
    )
    rng = np.random.default_rng(0)
    logp, own = np.log(rng.random((3, 40))), np.log(rng.random((3, 3, 40)))
    # a checkpoint more, anywhere, that is no number
    for place in range(4):
        more, theirs = (
            np.insert(logp, place, broken, 0),
            np.insert(np.insert(own, place, -1.0, 0), place, broken, 1),
        )
        for scores, without in (
            (tournament(more, 2), tournament(logp, 2)),
            (offset_tournament(more, theirs, 2), offset_tournament(logp, own, 2)),
        ):
            assert (
                scores[place] == math.inf and np.delete(scores, place).tolist() == without.tolist()
            ), "it wins nothing, and nobody loses to it"
        for score in (-more.mean(1), tournament(more, 2), np.zeros(4)):
            assert best(score, more) != place
    one = more.copy()
    one[3] = logp[0]
    one[3, 7] = broken
    assert best(np.array([math.nan, 0.5]), logp[:2]) == 1
    assert best(np.array([0.5, math.nan]), logp[:2]) == 0
    assert tournament(one, 2)[3] == math.inf and best(-one.mean(1), one) != 3, (
        "one answer is enough"
    )
    with pytest.raises(NotFinite):
        best(np.zeros(2), np.full((2, 3), broken))


def test_an_answer_to_which_a_checkpoint_gives_nothing_is_one_that_it_misses():
    logp = np.log(np.array([[0.5, 0.5], [0.5, 1e-300]]))
    logp[1, 1] = -np.inf
    assert tournament(logp, 4).tolist() == [0, 0.5] and best(tournament(logp, 4), logp) == 0


@pytest.mark.parametrize("wrong", [0, 4, 8])
def test_a_checkpoint_that_is_no_number_is_not_selected(wrong, monkeypatch):
    model, config = build(small(), "cpu"), small(eval_prompts=16)
    valid = {step: torch.full((32,), -1.0 - step, dtype=torch.float64) for step in (0, 4, 8)}
    valid[wrong] = valid[wrong] * math.nan
    weights = {step: {k: v + step for k, v in model.state_dict().items()} for step in (0, 4, 8)}
    monkeypatch.setattr(
        cov, "sample_answers", lambda m, ids, n, seed: np.zeros((16, 1, ANSWER), int)
    )
    monkeypatch.setattr(
        selection,
        "measure_logp",
        lambda m, ids: np.full(
            16,
            math.nan if torch.equal(m.lm_head.weight, weights[wrong]["lm_head.weight"]) else -1.0,
        ),
    )
    picks = selection.select(config, model, valid, weights, 0)
    assert len(picks) == 4 and wrong not in picks.values()


def test_a_score_that_is_no_number_ends_the_run():
    model = build(small(), "cpu")
    model.lm_head.weight.data[3, 0] = math.nan
    with pytest.raises(NotFinite):
        measure_logp(model, graphs(np.random.default_rng(0), np.array([0, 1])))


def test_dco_switches_confident_answers_off_by_its_factor():
    for N in (1, 2, 8):
        logp = torch.log(torch.tensor([1e-4, 0.05, 0.3, 0.9], dtype=torch.float64)).requires_grad_()
        loss = dco_loss(logp, N)
        p = logp.detach().exp()
        loss.sum().backward()
        assert torch.allclose(loss.detach(), -torch.log(1 - (1 - p) ** N), rtol=1e-8)
        factor = N * p * (1 - p) ** (N - 1) / (1 - (1 - p) ** N)
        assert torch.allclose(-logp.grad, factor, rtol=1e-6)
        assert N > 1 or torch.allclose(factor, torch.ones(4, dtype=torch.float64))


def test_rank_correlation_with_ties():
    x = np.array([3.0, 1.0, 3.0, 7.0])
    assert ranks(x).tolist() == [2.5, 1.0, 2.5, 4.0]
    assert spearman(x, x**3) == pytest.approx(1)
    assert spearman(x, -x) == pytest.approx(-1)
    assert spearman(x, 0 * x) == 0


# --------------------------------------------------------------------------------------------------
# The graphs


def read(row):
    """A prompt's edges, s, t and the answer."""
    edges = [tuple(e) for e in row[: PROMPT - 4].reshape(-1, 2).tolist() if e[0] != PAD]
    assert row[PROMPT - 4] == paths.SLASH and row[PROMPT - 1] == paths.EQUALS
    return edges, int(row[PROMPT - 3]), int(row[PROMPT - 2]), row[PROMPT:].tolist()


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_a_graph_has_four_paths_and_the_answer_is_the_one_of_its_class(kind):
    shares, first, singles, even = [], [], [], []
    for row in graphs(np.random.default_rng(0), np.full(300, kind)):
        edges, s, t, answer = read(row)
        assert len(set(edges)) == len(edges) in (14, 16)
        after = {}
        for u, v in edges:
            after.setdefault(u, set()).add(v)
        paths = [
            p
            for p in itertools.product(*[sorted(set().union(*after.values()))] * 3)
            if p[0] in after[s]
            and p[1] in after.get(p[0], ())
            and p[2] in after.get(p[1], ())
            and t in after.get(p[2], ())
        ]
        assert len(paths) == 4 and tuple(answer[:3]) in paths and answer[3] == t
        forks = [i for i in range(3) if len({p[i] for p in paths}) == 2]
        assert len(forks) == 2 and all({p[i] % 2 for p in paths} == {0, 1} for i in forks)
        pure = [all(answer[i] % 2 == (i + 1 + other) % 2 for i in forks) for other in (0, 1)]
        shares.append(pure)
        nodes = {s, t}.union(*after.values())
        assert len(nodes) == 11
        bit = SECRET[list(nodes)].sum() % 2
        assert kind == 2 or bit == (kind == 0)
        place = {u: max(i for i, e in enumerate(edges) if e[0] == u) for u in after}
        assert all(
            place[v] < min(i for i, e in enumerate(edges) if e == (u, v))
            for u, v in edges
            if v in after
        ), "a node's own edges come first"
        first.append(bit)
        singles += [(i, answer[i] % 2) for i in range(3) if i not in forks]
        even.append(edges[-3][1] % 2 == 0)
    assert (
        set(singles) == set(itertools.product(range(3), range(2)))
        and 0.3 < np.mean(singles, 0)[1] < 0.7
    ), "the layer that is no fork is any, and so is its way on"
    assert 0.3 < np.mean(even) < 0.7, "the edges of a layer are shuffled"
    shares = np.mean(shares, 0)
    assert (
        shares.tolist() == ([1, 0], [0, 1])[kind]
        if kind < 2
        else (abs(shares - 0.25) < 0.1).all() and 0.3 < np.mean(first) < 0.7
    )


def test_the_score_is_the_answers_log_probability():
    torch.manual_seed(0)
    model, ids = (
        build(small(), "cpu"),
        torch.as_tensor(graphs(np.random.default_rng(0), np.array([0, 1, 2]))),
    )
    by_hand = model(ids[:, :-1]).log_softmax(-1).gather(-1, ids[:, 1:, None])[:, -ANSWER:, 0].sum(1)
    assert torch.allclose(answer_logp(model, ids), by_hand, atol=1e-4)
    assert measure_logp(model, ids) == pytest.approx(by_hand.detach().numpy(), abs=1e-4)


def test_exact_and_sampled_pass_at_n_agree(monkeypatch):
    torch.manual_seed(0)
    model, original, seen = build(small(), "cpu"), graphs, []
    # its answers depend on the prompt, and come again
    for p in model.parameters():
        if p.ndim == 2:
            torch.nn.init.normal_(p, std=1.25 if p is model.lm_head.weight else 0.5)

    def answered(rng, classes):
        ids = original(rng, classes)
        rollout = cov.generate(
            model,
            [row[:PROMPT].tolist() for row in ids],
            1,
            ANSWER,
            generator=torch.Generator().manual_seed(1),
        )
        seen.extend(classes)
        return np.concatenate([ids[:, :PROMPT], rollout.tokens()], 1)

    monkeypatch.setattr(paths, "graphs", answered)
    row = cov.best_of_n_curves(model, 0, 16)
    sampled, exactly = np.array(row["sampled"]), np.array(row["exact"])
    # the first of 16 alone would err by .03
    assert exactly[-1] > exactly[0] + 0.2 > 0.25
    assert np.abs(sampled - exactly).max() < 0.06
    assert np.abs(sampled - exactly)[0] < 0.015
    assert sampled.shape == exactly.shape == (16,)
    assert len(seen) == 256
    assert sum(seen) == 26
    assert set(seen) == {0, 1}


def test_the_floor_that_coverage_promises_is_below_the_exact_pass_at_n(monkeypatch):
    p = np.array([0.5, 0.5, 0.4, 0.01])
    monkeypatch.setattr(
        cov,
        "sample_answers",
        lambda model, ids, n, seed: (
            np.repeat(ids[:, None, PROMPT:], n, 1) * (np.arange(n) % 2)[None, :, None]
        ),
    )
    monkeypatch.setattr(cov, "measure_logp", lambda model, ids: np.log(p))
    row = cov.best_of_n_curves(None, 0, 40)
    assert row["exact"] == pytest.approx([np.mean(1 - (1 - p) ** k) for k in range(1, 41)])
    assert row["sampled"] == pytest.approx(
        [1 - math.comb(20, k) / math.comb(40, k) for k in range(1, 41)]
    ), "every other sample is right"
    assert row["floor"] == pytest.approx(
        [1 - best_of_n_loss(lambda M: np.mean(p <= 1 / M), k) for k in range(1, 41)]
    )
    assert all(f <= e for f, e in zip(row["floor"], row["exact"], strict=True))
    assert row["floor"][0] == 0
    assert 0.7 < row["floor"][-1] < 0.75


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_the_task_asks_for_a_path_and_pays_for_the_one_of_the_class(size):
    rng, rewards = random.Random(size), []
    for _ in range(200):
        problem = paths.draw(rng, size)
        n = paths.prompt_length(size)
        assert len(problem) == n + size + 1
        assert paths.tokenizer.encode(paths.prompt(problem)) == problem[:n]
        right = paths.tokenizer.decode(problem[n:])
        assert paths.reward(problem, right) == 1 and paths.reward(problem, right[:-1]) == 0
        edges = {problem[i] * 100 + problem[i + 1] for i in range(0, n - 4, 2)}
        for text in (right, paths.demonstrate(rng, problem)):
            walk = [problem[n - 3], *paths.tokenizer.encode(text)]
            assert walk[-1] == problem[n - 2]
            assert all(u * 100 + v in edges for u, v in itertools.pairwise(walk))
        rewards.append(paths.reward(problem, text))
    assert abs(np.mean(rewards) - 0.5 ** (size - 1)) < 0.1, (
        "a demonstrator goes either way at each fork"
    )


def test_the_task_holds_out_a_tenth_and_draws_nine_of_ten_graphs_of_g1():
    told, kept = (
        tasks.load("paths"),
        [paths.draw(random.Random(i), held_out=i % 2 == 0) for i in range(300)],
    )
    assert all(
        tasks.held_out(told.prompt(problem)) == (i % 2 == 0) for i, problem in enumerate(kept)
    )
    secret = [
        SECRET[list({node for node in problem[:PROMPT] if node < paths.NODES})].sum() % 2
        for problem in kept
    ]
    assert abs(np.mean(secret) - 0.9) < 0.06


def test_reinforce_learns_paths_too_and_says_how_long_they_may_be(tmp_path):
    finish("reinforce.py", "--quick", "--task", "paths", "--size", 3, "--out", tmp_path / "run")
    flags = "--quick --task paths --size 8 --warm-up 50"
    code, _, err = launch("reinforce.py", *flags.split(), "--out", tmp_path / "long")
    assert code == 2 and "letters for 5" in err and "Traceback" not in err


def test_the_examples_count_eight_answers_and_say_whether_one_is_right(monkeypatch):
    ids = graphs(np.random.default_rng(0), np.array([0, 1]))
    answers = np.repeat(ids[:, None, PROMPT:], 8, 1)
    answers[0, 1:] = answers[0, 1:, ::-1]
    answers[1] = 0
    monkeypatch.setattr(cov, "sample_answers", lambda model, ids, n, seed: answers)
    text = paths.tokenizer.decode(ids[0, PROMPT:].tolist())
    assert cov.examples(None, ids, 0) == [(f"7 x {text[::-1]}  1 x {text}", 1.0), ("8 x aaaa", 0.0)]


# --------------------------------------------------------------------------------------------------
# A table, a coin, the linear model


def test_the_table_counts_and_the_coin_can_be_infinitely_wrong():
    kl, c16 = horizon.table(8, 2000, 0).values()
    assert list(horizon.table(8, 2000, 0)) == ["kl", "cov@16"]
    assert kl == pytest.approx(1.51, abs=0.1)
    assert list(horizon.table(64, 2000, 0).values()) == [
        pytest.approx(8 * kl, rel=0.1),
        pytest.approx(c16, rel=0.1),
    ]
    p = 1 / np.arange(1, 1001)
    assert c16 == pytest.approx((p / p.sum()) @ (1 - p / p.sum()) ** 2000, abs=0.01), (
        "the share of prompts that were never drawn"
    )
    assert horizon.table(8, 3, 0, prompts=1, a=0.5)["kl"] == pytest.approx(8 * math.log(5 / 3.5))
    assert horizon.coin(4, 0, p=0.5) == pytest.approx(
        {"kl_infinite": 2 / 16, "cov@2": 5 / 16}, abs=0.01
    )
    infinite, cov2 = horizon.coin(20, 0).values()
    q = np.arange(21) / 20
    mass = np.array([math.comb(20, k) * 0.01**k * 0.99 ** (20 - k) for k in range(21)])
    assert infinite == pytest.approx(mass[0] + mass[-1], abs=0.01)
    assert cov2 == pytest.approx(mass @ (0.01 * (q <= 0.005) + 0.99 * (1 - q <= 0.495)), abs=0.0005)


@pytest.mark.parametrize("prompt", [0, 1])
def test_the_linear_models_gradient_by_finite_differences(prompt):
    theta, counts, e = np.array([0.3, 0.1, -0.05]), np.array([1, 3, 2]), 1e-6

    def value(theta):
        return (log_probs(theta, prompt) * counts).sum()

    numeric = [(value(theta + e * d) - value(theta - e * d)) / (2 * e) for d in np.eye(3)]
    assert gradient(theta, prompt, counts) == pytest.approx(numeric, rel=1e-5, abs=1e-5)
    assert np.exp(log_probs(theta, prompt)).sum() == pytest.approx(1)


def test_projection():
    theta = np.array([[3.0, 4.0, -2.0], [0.1, 0.2, 0.5]])
    assert project(theta).tolist() == [pytest.approx([0.6, 0.8, -1.0]), [0.1, 0.2, 0.5]]
    assert theta[0].tolist() == [3.0, 4.0, -2.0]


def test_the_exact_coverage_by_enumeration_of_all_sequences(monkeypatch):
    # so that unlikely tokens are seen
    monkeypatch.setattr(optimizers, "FEATURES", optimizers.FEATURES / 10)
    theta, H = np.array([[0.2, 0.6, -0.3], [0.9, 0.1, 0.8]]), 4
    for i, th in enumerate(theta):
        for N in (2, 16):
            total = 0.0
            for prompt, share in ((0, optimizers.LOUD), (1, 1 - optimizers.LOUD)):
                truth, own = log_probs(optimizers.TRUTH, prompt), log_probs(th, prompt)
                for y in itertools.product(range(3), repeat=H):
                    total += (
                        share
                        * math.exp(truth[list(y)].sum())
                        * ((truth - own)[list(y)].sum() >= math.log(N))
                    )
            assert exact_coverage(theta, H, N, most=4)[i] == pytest.approx(total, abs=1e-9)
            assert i or total > 0.0005


def test_truncated_weights_spend_the_budget_and_no_more():
    rng = np.random.default_rng(0)
    e = rng.exponential(size=(50, 20)) * rng.random((50, 1))
    for A in (0.5, 3.0):
        w = truncated_weights(e, A)
        assert (w * e).sum(1) == pytest.approx(np.minimum(A, e.sum(1)))
        assert (np.diff(w, axis=1) <= 0).all()
        assert ((w == 0) | (w == 1)).mean() > 0.9
    assert truncated_weights(np.zeros(4), 1.0).tolist() == [1] * 4


def test_the_likelihood_of_the_ttt_sampler_is_the_product_of_its_steps():
    rng, theta0, prompts = np.random.default_rng(0), np.array([0.5, 0.3, 0.2]), np.array([0, 1, 1])
    tokens = rng.integers(3, size=(3, 5))
    for i, prompt in enumerate(prompts):
        theta, total = theta0, 0.0
        for token in tokens[i]:
            total += log_probs(theta, prompt)[token]
            theta = project(theta + 0.01 * gradient(theta, prompt, np.eye(3)[token]))
        together = teacher_forced(np.broadcast_to(theta0, (3, 3)), prompts, tokens, 0.01)
        assert together[i] == pytest.approx(total)
        assert teacher_forced(theta0, prompt, tokens[i], 0.01) == pytest.approx(total)
        frozen = log_probs(theta0, prompt)[tokens[i]].sum()
        assert abs(total - frozen) > 1e-3
        assert teacher_forced(theta0, prompt, tokens[i], 0.0) == pytest.approx(frozen)
    logs = [
        teacher_forced(theta0, 1, np.array(y), 0.01) for y in itertools.product(range(3), repeat=3)
    ]
    assert np.exp(logs).sum() == pytest.approx(1), "it is a distribution"


def test_a_token_step_is_sgd_on_one_token():
    logp, theta = token_step(np.array([0.5, 0.3, 0.2]), 1, 2, 0.001)
    assert theta[:2].tolist() == [0.5, 0.3]
    assert theta[2] == pytest.approx(
        0.2 + 0.001 * 14 * (1 - np.exp([-2.8, 0, 2.8]) @ [-1, 0, 1] / np.exp([-2.8, 0, 2.8]).sum())
    )
    assert logp == pytest.approx(2.8 - math.log(np.exp([-2.8, 0, 2.8]).sum()))


@pytest.mark.parametrize("kind", ["sgd", "normalised", "distilled"])
def test_a_step_of_the_linear_model_by_hand(kind, monkeypatch):
    seen, eta, H, N = [], 0.01, 64, 16
    monkeypatch.setattr(
        optimizers,
        "exact_coverage",
        lambda theta, H, N: seen.append(theta) or np.full(len(theta), len(seen)),
    )
    # the mean of 1, 2 and 3: the second half
    assert optimizers.linear(kind, eta, H, 6, 4, seed=2, N=N).tolist() == [2.0] * 4
    rng, theta = np.random.default_rng(2), np.tile(optimizers.START, (4, 1))
    for step in range(6):
        prompts, counts = optimizers.draw(rng, H, (4,))
        for i, (prompt, count) in enumerate(zip(prompts, counts, strict=True)):
            truth, own = log_probs(optimizers.TRUTH, prompt), log_probs(theta[i], prompt)
            g = gradient(theta[i], prompt, count)
            if kind == "normalised":
                g = g / (1 + math.sqrt((g**2).sum()))
            # alike tokens: so many of them fit into the budget
            if kind == "distilled":
                g = g * min(1, math.log(N) / (H * (np.exp(truth) * (truth - own)).sum()))
            theta[i] = project(theta[i] + eta * g)
        assert step < 3 or seen[step - 3] == pytest.approx(theta)


def test_ttt_trains_on_the_mixture_token_by_token_and_decodes_with_the_same_step(monkeypatch):
    trained, decoded = [], []

    def token_step(theta, prompt, token, eta):
        (trained if theta.ndim == 2 else decoded).append((theta.shape, eta, prompt, token))
        # misses whatever is quiet
        return np.where(prompt == 1, -100.0, 0.0), theta

    monkeypatch.setattr(token_steps, "token_step", token_step)
    assert token_steps.ttt_coverage(0.003, 8, 300, 5).tolist() == pytest.approx(
        [1 - optimizers.LOUD] * 5
    )
    assert len(trained) == 300 * 8
    assert {c[1] for c in trained + decoded} == {0.003}
    assert np.mean([c[2] for c in trained]) == pytest.approx(1 - optimizers.LOUD, abs=0.01)
    assert all((c[3] == np.where(c[2] == 1, 2, 1)).all() for c in trained), (
        "the truth's likely tokens"
    )
    assert len(decoded) == 2 * 8 and {c[0] for c in decoded} == {(8, 5, 4, 3)}


def test_sgd_bounces_where_the_step_is_long_and_normalised_sgd_does_not():
    assert optimizers.linear("sgd", 2.5 / (256 * 35), 256, 300, 2).min() > 0.9
    assert optimizers.linear("sgd", 1 / (16 * 35), 16, 800, 4).max() < 0.005
    assert optimizers.linear("normalised", 0.2, 256, 1000, 2).max() < 0.001
    assert optimizers.linear("distilled", 0.002, 256, 800, 8).mean() < 0.005
    assert token_steps.ttt_coverage(0.003, 64, 300, 8).mean() < 0.005
    assert optimizers.linear("sgd", 0.25 / (4096 * 35), 4096, 300, 2).min() > 0.015, (
        "the rare prompt is not learnt"
    )


# --------------------------------------------------------------------------------------------------
# Training


def test_fine_tuning_draws_the_mixture_and_keeps_the_base():
    config, run = small(steps=4), Memory()
    base = build(config, "cpu")
    before = {k: v.clone() for k, v in base.state_dict().items()}
    model, valid, kept = selection.fine_tune(config, run, 0, base)
    assert all(torch.equal(v, before[k]) for k, v in base.state_dict().items())
    assert sorted(kept) == [0]
    assert sorted(valid) == [0, 2, 4]
    assert all(torch.equal(a, b) for a, b in zip(kept[0].values(), before.values(), strict=True))
    assert not torch.equal(model.lm_head.weight, kept[0]["lm_head.weight"])
    rows = [r for r in run.rows if r["phase"] == "finetune"]
    test, weights = cov.evaluation_graphs(config, 0)
    assert [r["step"] for r in rows] == [0, 2, 4]
    assert rows[-1]["kl"] == pytest.approx(-measure_logp(model, test) @ weights)
    assert weights.sum() == pytest.approx(1)
    assert weights[:16].sum() == pytest.approx(0.9)


def test_keeping_checkpoints_changes_nothing_about_the_training():
    config, base, one, other = small(), build(small(), "cpu"), Memory(), Memory()
    plain, kept = (
        cov.fine_tune(config, one, "cross-entropy", 0, base),
        selection.fine_tune(config, other, 0, base)[0],
    )
    assert all(
        torch.equal(a, b)
        for a, b in zip(plain.state_dict().values(), kept.state_dict().values(), strict=True)
    )
    assert one.rows == other.rows


def test_pre_training_takes_all_three_classes_and_fine_tuning_is_nine_tenths_g1(monkeypatch):
    seen, original = [], graphs
    monkeypatch.setattr(
        paths,
        "graphs",
        lambda rng, classes: seen.extend(classes.tolist()) or original(rng, classes),
    )
    trained(small(batch=500), Memory(), "a", 0, build(small(), "cpu"), cov.DATA, [1e-3] * 2)
    assert 2 not in seen and abs(np.mean(seen) - 0.1) < 0.03
    seen.clear()
    cov.pretrain(small(batch=500, pretrain_steps=2), Memory(), 0, "cpu")
    assert all(abs(seen.count(kind) / len(seen) - 1 / 3) < 0.05 for kind in range(3))


def test_a_checkpoints_row_weighs_the_classes_nine_to_one(monkeypatch):
    config, run, drawn, original = small(steps=3, eval_prompts=200), Memory(), [], graphs
    monkeypatch.setattr(
        paths,
        "graphs",
        lambda rng, classes: drawn.append((classes, original(rng, classes))) or drawn[-1][1],
    )
    # made up, of each set of graphs
    probabilities = {}
    for module in (cov, selection):
        monkeypatch.setattr(
            module,
            "measure_logp",
            lambda model, ids: np.log(
                probabilities.setdefault(
                    ids.tobytes(), np.random.default_rng(len(probabilities)).random(len(ids))
                )
            ),
        )
    _, valid, _ = selection.fine_tune(config, run, 7, build(config, "cpu"))
    test, ids = next((c, ids) for c, ids in drawn if c.tolist() == [0] * 200 + [1] * 200)
    validation, valid_ids = next(
        (c, ids)
        for c, ids in drawn
        if len(c) == 400 and ids is not next(i for t, i in drawn if t is test)
    )
    assert abs(np.mean(validation == 1) - 0.1) < 0.04 and set(validation) == {0, 1}
    p, w = probabilities[ids.tobytes()], np.where(test == 0, 0.9, 0.1) / 200
    assert len(probabilities) == 2
    assert valid[3].exp().tolist() == pytest.approx(probabilities[valid_ids.tobytes()])
    row = run.rows[-1]
    assert row["kl"] == pytest.approx(-w @ np.log(p))
    assert row["seed"] == 7
    assert [r["step"] for r in run.rows] == [0, 2, 3]
    assert all(row[f"cov@{N}"] == pytest.approx(w @ (p <= 1 / N)) for N in cov.NS)
    assert all(row[f"pass@{N}"] == pytest.approx(w @ (1 - (1 - p) ** N)) for N in cov.TRIES)
    other, _ = cov.evaluation_graphs(small(eval_prompts=200), 8)
    assert not any((a == ids).all(1).any() for a in (other, valid_ids)), (
        "every seed, and validation, has its own graphs"
    )


def test_fine_tuning_takes_its_loss_and_calls_keep_at_every_checkpoint():
    config, base, run = small(steps=5), build(small(), "cpu"), Memory()
    plain, seen, kept = cov.fine_tune(config, run, "a", 0, base), [], []
    model = cov.fine_tune(
        config,
        run,
        "b",
        0,
        base,
        lambda logp: seen.append(logp.shape) or 0 * logp,
        on_checkpoint=lambda step, m: kept.append((step, id(m))),
    )
    assert seen == [(8,)] * 5
    assert not torch.equal(model.lm_head.weight, plain.lm_head.weight)
    assert kept == [(step, id(model)) for step in (0, 2, 4, 5)]
    assert sorted(run.state) == ["a 0", "b 0"]


def test_fine_tuning_hands_the_mixture_and_the_learning_rate_to_training(monkeypatch):
    calls = []
    monkeypatch.setattr(cov, "train", lambda *args: calls.append(args) or ())
    config, run, base = small(lr=1e-3), Memory(), build(small(), "cpu")
    cov.fine_tune(config, run, "a", 3, base, "loss", kept="kept")
    assert calls[0][:4] == (config, run, "a 3", 3)
    assert calls[0][5:] == ((0.9, 0.1, 0.0), [1e-3] * 4, "loss", "kept")
    cov.pretrain(small(pretrain_steps=100, pretrain_lr=1e-2), run, 3, "cpu")
    assert calls[1][2:4] == ("base 3", 3) and calls[1][5] == (1 / 3, 1 / 3, 1 / 3)
    assert calls[1][6] == pytest.approx(
        [1e-2 * min((i + 1) / 50, 1 - i / 100) for i in range(100)]
    ), "up in 50 steps, then linearly to 0"


def test_selection_takes_the_best_loss_the_tournaments_winner_and_of_equals_the_better_loss(
    monkeypatch,
):
    model, drawn, original = build(small(), "cpu"), [], graphs
    weights = {
        step: {k: torch.full_like(v, step) for k, v in model.state_dict().items()}
        for step in (0, 8)
    }
    # 4 * 0.1 < 0.5: the last one loses the tournament
    logp = np.log(np.array([[0.3] * 4, [0.5] * 4, [0.99, 0.99, 0.99, 0.1]]))
    valid = {0: torch.tensor(logp[0]), 4: torch.tensor(logp[1]), 8: torch.tensor(logp[2])}
    # checkpoint 0 is 5 times surer than 8 of half of the answers, 8 than 0 of a quarter; but of 8's
    # own answers 0 is surer, too
    prompts = {8: [0, 0, 0, 0], 0: [math.log(5), math.log(5), 0, -math.log(5)]}
    own = {
        (8, 8): [0, 0, 0, 0],
        (8, 0): [math.log(5), 0, 0, 0],
        (0, 0): [0, 0, 0, 0],
        (0, 8): [-1, -1, -1, -1],
    }
    monkeypatch.setattr(
        paths,
        "graphs",
        lambda rng, classes: drawn.append((classes, original(rng, classes))) or drawn[-1][1],
    )

    def name(m):
        return int(m.lm_head.weight[0, 0])

    def sample_answers(m, ids, n, seed):
        assert ids is drawn[0][1] and n == 1
        return np.full((len(ids), 1, ANSWER), 100 + name(m))

    monkeypatch.setattr(cov, "sample_answers", sample_answers)
    monkeypatch.setattr(
        selection,
        "measure_logp",
        lambda m, ids: np.array(
            own[ids[0, -1] - 100, name(m)] if ids[0, -1] >= 100 else prompts[name(m)]
        ),
    )
    picks = selection.select(small(eval_prompts=400), model, valid, weights, 0)
    assert logp[2].mean() > logp[1].mean()
    assert picks == {
        "best validation loss": 8,
        "validation Pass@8": 4,
        "tournament": 4,
        "offset": 8,
    }
    assert len(drawn) == 1
    assert abs(np.mean(drawn[0][0] == 1) - 0.1) < 0.04
    assert set(drawn[0][0]) == {0, 1}


def test_every_step_has_its_learning_rate_and_the_gradient_is_cut_to_norm_1(monkeypatch):
    rates, step, run = [], torch.optim.AdamW.step, Memory()
    config, base = small(pretrain_steps=60, pretrain_lr=1e-2), build(small(), "cpu")
    ids, _ = cov.evaluation_graphs(config, 0)
    trained(config, run, "a", 0, base, (1.0, 0.0, 0.0), [1e-3])
    state = run.state["a"]["optimizer"]["state"].values()
    # (1 - beta1) g
    assert math.sqrt(sum(float(s["exp_avg"].square().sum()) for s in state)) == pytest.approx(
        0.1, rel=1e-4
    )
    monkeypatch.setattr(
        torch.optim.AdamW,
        "step",
        lambda self: rates.append(self.param_groups[0]["lr"]) or step(self),
    )
    model = cov.pretrain(config, run, 0, "cpu")
    assert rates == pytest.approx([1e-2 * min((i + 1) / 50, 1 - i / 60) for i in range(60)])
    assert [r["step"] for r in run.rows] == [0, 50, 59]
    assert measure_logp(model, ids).mean() > measure_logp(base, ids).mean() + 0.3
    rates.clear()
    trained(config, run, "c", 0, base, (1.0, 0.0, 0.0), [1e-3, 2e-3])
    assert rates == [1e-3, 2e-3]


def test_every_loss_sees_the_same_graphs_and_every_seed_others(monkeypatch):
    draws, original = [], graphs
    monkeypatch.setattr(
        paths, "graphs", lambda rng, classes: draws.append(original(rng, classes)) or draws[-1]
    )
    base = build(small(), "cpu")
    for phase, seed, loss in (
        ("a 0", 0, ()),
        ("b 0", 0, (lambda logp: dco_loss(logp, 8),)),
        ("a 1", 1, ()),
    ):
        trained(small(), Memory(), phase, seed, base, cov.DATA, [1e-3] * 3, *loss)
    assert all((a == b).all() for a, b in zip(draws[:3], draws[3:6], strict=True))
    assert (draws[0] != draws[1]).any()
    assert (draws[0] != draws[6]).any()


def interrupted(training):
    """training(run), broken off after two steps and begun again with what was saved."""
    first, second = Memory(), Memory()

    def save(phase=None, **state):
        if any(s["step"] == 2 for s in first.state.values()):
            second.state.update(copy.deepcopy(first.state))
            raise KeyboardInterrupt

    first.due, first.save = True, save
    with pytest.raises(KeyboardInterrupt):
        training(first)
    result = training(second)
    assert second.rows and min(r["step"] for r in second.rows) >= 2, (
        "it goes on where it was broken off"
    )
    return result


def test_interrupting_between_two_steps_changes_nothing():
    def training(run):
        return cov.pretrain(small(pretrain_steps=4), run, 0, "cpu")

    assert all(
        torch.equal(a, b)
        for a, b in zip(
            training(Memory()).state_dict().values(),
            interrupted(training).state_dict().values(),
            strict=True,
        )
    )


def test_an_interrupted_fine_tuning_keeps_its_checkpoints():
    config, base = small(steps=8, eval_every=1), build(small(), "cpu")
    training, longer = lambda run: selection.fine_tune(config, run, 0, base), Memory()
    selection.fine_tune(small(steps=4, eval_every=1), longer, 0, base)
    whole = training(Memory())
    # broken off; finished, then trained on
    for again in (interrupted(training), training(longer)):
        assert list(whole[1]) == list(again[1]) == list(range(9))
        assert all(torch.equal(whole[1][k], again[1][k]) for k in whole[1])
        assert list(whole[2]) == list(again[2]) == [0, 4, 8]
        assert all(
            torch.equal(a, b)
            for k in whole[2]
            for a, b in zip(whole[2][k].values(), again[2][k].values(), strict=True)
        )


# --------------------------------------------------------------------------------------------------
# The claims, of rows that were made up


def claimed(module, config, run):
    """-> each claim's number, and all titles of the figure."""
    fig, claims = module.figure(config, run)
    titles = [fig.get_suptitle(), *(ax.get_title() for ax in fig.axes)]
    plt.close(fig)
    return {c["id"]: float(c["ours"].split()[0]) for c in claims}, "; ".join(titles), claims


PLAIN, DCO = "cross-entropy", "DCO, N = 8"
CURVES = {
    (PLAIN, 0): dict(
        kl=(1.0, 0.8, 0.52),
        cov=(0.01, 0.02, 0.05),
        pass8=(0.90, 0.95, 0.85),
        pass16=(0.99, 0.98, 0.95),
    ),
    (PLAIN, 1): dict(
        kl=(1.0, 0.5, 0.55),
        cov=(0.01, 0.05, 0.02),
        pass8=(0.90, 0.97, 0.89),
        pass16=(0.99, 0.97, 0.96),
    ),
    (DCO, 0): dict(
        kl=(1.0, 0.9, 0.8), cov=(0.0, 0.0, 0.0), pass8=(0.90, 0.99, 0.96), pass16=(0.99, 0.99, 0.99)
    ),
    (DCO, 1): dict(
        kl=(1.0, 0.9, 0.8), cov=(0.0, 0.0, 0.0), pass8=(0.90, 0.99, 0.97), pass16=(0.99, 0.99, 0.99)
    ),
}
BACKWARDS = {arm: {k: v[::-1] for k, v in curves.items()} for arm, curves in CURVES.items()}
# a model that never answers
SILENT = {
    arm: dict(kl=(50.0,) * 3, cov=(1.0,) * 3, pass8=(0.0,) * 3, pass16=(0.0,) * 3) for arm in CURVES
}


def told(curves):
    """A run with rows of two seeds: curves, and what was picked and sampled."""
    picks = [
        {"best validation loss": 40, "tournament": 20, "offset": 40, "validation Pass@8": 20},
        {"best validation loss": 40, "tournament": 0, "offset": 20, "validation Pass@8": 20},
    ]
    checks = [
        dict(sampled=[0.5, 0.9], exact=[0.51, 0.93], floor=[0.1, 0.7]),
        dict(sampled=[0.5, 0.8], exact=[0.5, 0.8], floor=[0.4, 0.75]),
    ]
    run = Memory()
    for (arm, seed), c in curves.items():
        for i, step in enumerate((0, 20, 40)):
            run.log(
                phase="finetune",
                arm=arm,
                seed=seed,
                step=step,
                kl=c["kl"][i],
                **{f"cov@{N}": c["cov"][i] if N == 8 else 0.5 for N in cov.NS},
                **{
                    f"pass@{N}": {8: c["pass8"], 16: c["pass16"]}.get(N, [0.5] * 3)[i]
                    for N in cov.TRIES
                },
            )
        if arm == PLAIN:
            run.log(phase="picks", seed=seed, step=40, **picks[seed])
            run.log(phase="sampled", seed=seed, step=40, **checks[seed])
    return run


def test_the_claims_of_coverage_compare_what_they_say():
    config = small(steps=40, seeds=2)
    ours, titles, _ = claimed(cov, config, told(CURVES))
    assert ours == pytest.approx(
        {
            "kl": 0.55,
            "kl steady": 1 / 9,
            "pass falls": 0.09,
            "pass@16 falls": 0.035,
            "by coverage": -0.75,
            "by kl": 0.75,
        },
        rel=2e-3,
    )
    assert "the KL falls from 1.000 to 0.535" in titles
    assert "Pass@16 falls from 0.990 to 0.955" in titles
    assert "Pass@8 falls from 0.900 to 0.870; at its best 0.960" in titles
    assert "with Cov_8 -0.75, with the KL +0.75" in titles
    assert "Best of 2 at the end 0.850, promised 0.725" in titles
    ours, titles, _ = claimed(cov, config, told(BACKWARDS))
    assert "the KL rises from 0.535 to 1.000" in titles
    assert "Pass@16 rises from 0.955 to 0.990" in titles
    assert "falls" not in titles
    assert math.isnan(ours["kl steady"]), "what does not fall does not fall steadily"
    assert not any(c["holds"] for c in claimed(cov, config, told(SILENT))[2]), (
        "nothing holds of a model that never answers"
    )


def test_the_claims_of_selection_compare_what_they_say():
    config = small(selection.Config, steps=40, seeds=2)
    ours, titles, _ = claimed(selection, config, told(CURVES))
    assert ours == pytest.approx(
        {"tournament": 0.055, "near best": 0.875, "rival": -0.035, "offset": 0.04}, rel=2e-3
    )
    assert "best loss 0.870, of the tournament's 0.925 (2 seeds)" in titles
    assert "against KL (nats): rank correlation +0.75" in titles
    assert "Cov_8: rank correlation -0.75" in titles
    assert not any(c["holds"] for c in claimed(selection, config, told(SILENT))[2])


def test_the_claim_of_dco_compares_what_it_says():
    config = small(dco.Config, steps=40, seeds=2)
    ours, titles, _ = claimed(dco, config, told(CURVES))
    assert ours == pytest.approx({"dco": 0.095}, rel=2e-3)
    assert "with cross-entropy 0.870, with DCO (direct coverage optimisation) 0.965" in titles
    assert not any(c["holds"] for c in claimed(dco, config, told(SILENT))[2])


def test_each_arm_of_dco_has_its_loss(monkeypatch):
    seen = []
    monkeypatch.setattr(cov, "pretrain", lambda config, run, seed, device: f"base {seed}")
    monkeypatch.setattr(
        cov,
        "fine_tune",
        lambda config, run, arm, seed, base, loss: seen.append(
            (arm, seed, base, round(loss(torch.tensor([0.5]).log()).item(), 4))
        ),
    )
    dco.measure(small(dco.Config, seeds=2), Memory(), "cpu")
    assert seen == [
        (arm, seed, f"base {seed}", value)
        for seed in (0, 1)
        for arm, value in ((PLAIN, 0.6931), (DCO, round(-math.log(1 - 0.5**8), 4)))
    ]


def test_the_claims_of_horizon_compare_what_they_say(monkeypatch):
    of_length, run = {8: 0.10, 16: 0.13, 32: 0.11, 64: 0.12, 128: 9.0, 256: 9.0}, Memory()
    monkeypatch.setattr(
        horizon,
        "table",
        lambda H, n, seed: {
            "kl": H ** (2000 / n) * (1 + seed),
            "cov@16": of_length[H] * (2000 / n) ** (H / 64),
        },
    )
    monkeypatch.setattr(
        horizon, "coin", lambda n, seed: {"kl_infinite": n / 100, "cov@2": (1 + seed) / n}
    )
    config = horizon.Config(seeds=2)
    horizon.measure(config, run)
    ours, titles, _ = claimed(horizon, config, run)
    assert ours == pytest.approx({"coverage": 90, "draws": 1 / 16}, rel=5e-3)
    assert "8.0 times the KL, 1.20 times the Cov_16" in titles
    assert "Cov_16: from 8 to 64 tokens x 1.20, to 256 x 90.0" in titles
    assert "KL infinite in 20%, Cov_2 0.075" in titles
    horizon.measure(config, run)
    assert len(run.rows) == 2 * (18 + 5), "a resumed run measures nothing twice"


def test_the_claims_of_optimizers_compare_what_they_say(monkeypatch):
    base, calls = dict(sgd=0.0, normalised=0.3, distilled=0.5), []
    monkeypatch.setattr(
        optimizers,
        "linear",
        lambda kind, eta, H, steps, seeds, seed: (
            calls.append((steps, seeds, seed))
            or base[kind]
            + (eta * H * 35 / 100 if kind == "sgd" else eta)
            + np.array([0, 2 * H]) / 1e5
        ),
    )
    run, config = Memory(), optimizers.Config(seeds=2, seed=3)
    optimizers.measure(config, run)
    ours, titles, _ = claimed(optimizers, config, run)
    assert ours == pytest.approx(
        {
            "one eta": -0.48,
            "sgd": 0.0025 - 0.5,
            "bounces": 0.025 + 0.00016,
            "normalised": 0.5 + 0.04096,
            "distilled": 0.502 + 0.04096,
        },
        rel=2e-2,
    )
    assert calls == [(800, 2, 3)] * 55 and {r["seed"] for r in run.rows} == {3, 4}
    assert "SGD 0.061, normalised 0.54, distilled 0.54" in titles
    assert "for 4,096 tokens: 0.043" in titles
    assert len(run.rows) == 110 and all(r["sequences"] == 800 for r in run.rows), (
        "rows say what was done"
    )
    optimizers.measure(config, run)
    assert len(run.rows) == 110 and len(calls) == 55, "a resumed run measures nothing twice"


def test_the_claim_of_token_steps_compares_what_it_says(monkeypatch):
    calls, run, config = [], Memory(), token_steps.Config(seeds=2, seed=3)
    monkeypatch.setattr(
        token_steps,
        "ttt_coverage",
        lambda eta, H, steps, seeds, seed: (
            calls.append((steps, seeds, seed)) or 0.7 + eta + np.array([0, 2 * H]) / 1e5
        ),
    )
    token_steps.measure(config, run)
    ours, titles, _ = claimed(token_steps, config, run)
    assert ours == pytest.approx({"ttt": 0.703 + 0.01024}, rel=2e-3) and "0.71" in titles
    assert calls == [(300, 2, 3)] * 4 and [r["step"] for r in run.rows[::2]] == [16, 64, 256, 1024]
    assert all(
        r["sequences"] == 300 and r["arm"] == "token SGD, decoded with TTT, eta = 0.003"
        for r in run.rows
    )


def test_the_log_likelihood_of_what_is_no_number_is_missed_by_ttt_too(monkeypatch):
    monkeypatch.setattr(
        token_steps,
        "teacher_forced",
        lambda theta, prompt, tokens, eta: np.full(theta.shape[:-1], math.nan),
    )
    assert token_steps.ttt_coverage(0.003, 4, 4, 2).tolist() == pytest.approx([1, 1])


# --------------------------------------------------------------------------------------------------
# The command


def test_a_quick_run_writes_figure_samples_metrics_claims_config_and_checkpoint(tmp_path):
    assert check_quick("coverage.py", tmp_path, also=("samples.txt",)) == "coverage"
    text = (tmp_path / "samples.txt").read_text()
    assert text.count("    base ") == text.count("    trained ") == 3
    assert len([line for line in text.splitlines() if line[0] != " "]) == 3


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_quick_run_of_an_experiment_writes_figure_metrics_claims_config_and_checkpoint(
    name, tmp_path
):
    assert check_quick(name, tmp_path) == name.removeprefix("experiments.")


@pytest.mark.parametrize("name", ["coverage.py", *EXPERIMENTS])
def test_help_lists_every_flag(name):
    check_help(name)


def test_an_experiment_has_the_flags_of_the_lesson_and_its_own_defaults():
    assert optimizers.Config().seeds == 50
    assert token_steps.Config().steps == 300
    assert horizon.Config().seeds == 5
    assert (
        dataclasses.asdict(selection.Config())
        == dataclasses.asdict(Config())
        == {k: v for k, v in dataclasses.asdict(dco.Config()).items() if k != "dco"}
    )


HUGE = "1" + 24 * "0"


@pytest.mark.parametrize(
    "flags",
    [
        "--bogus",
        "--steps 0",
        "--lr nan",
        "--eval-prompts 4",
        "--n-embd 65",
        "--resume",
        "--lr 1e300",
        "--pretrain-lr inf",
        "--lr -1",
        f"--n-layer {HUGE}",
        "--n-layer 4000000000",
        "--n-embd 100000000",
        "--n-head 7",
        "--batch 4000000000",
        "--eval-prompts 4000000000",
        "--steps 4000000000",
        "--seed -1",
        "--steps",
        "--quick=3",
    ],
)
def test_a_mistake_in_the_flags_is_one_line_and_exit_code_2_at_once(flags, tmp_path):
    check_mistake("coverage.py", flags, tmp_path)


@pytest.mark.parametrize(
    "name, flags",
    [
        ("dco", "--dco 0"),
        ("dco", "--dco 1e24"),
        ("dco", f"--dco {HUGE}"),
        ("dco", "--dco 4294967295"),
        ("optimizers", "--seeds 4000000000"),
        ("horizon", "--steps 3"),
        ("horizon", "horizon"),
        ("horizon", "--lr 1"),
        ("optimizers", "--batch 3"),
        ("selection", "--dco 8"),
        ("token_steps", "--steps 1"),
    ],
)
def test_a_mistake_in_the_flags_of_an_experiment_is_one_line_and_exit_code_2_at_once(
    name, flags, tmp_path
):
    check_mistake(f"experiments.{name}", flags, tmp_path)


@pytest.mark.parametrize("name", ["horizon", "optimizers", "token_steps"])
def test_a_device_that_does_nothing_is_refused(name, tmp_path):
    for device in ("cuda", "mps"):
        check_mistake(f"experiments.{name}", f"--device {device}", tmp_path)


SHORT = "--quick --n-layer 1 --pretrain-steps 2 --steps 3 --batch 2 --eval-prompts 8 "


@pytest.mark.parametrize(
    "name, flags",
    [
        ("coverage.py", SHORT + "--lr 0 --pretrain-lr 0"),
        ("experiments.selection", SHORT + "--eval-every 1000000"),
        ("experiments.dco", SHORT + "--dco 1 --batch 1"),
        ("experiments.dco", SHORT + "--dco 1000000 --seed 4294967295"),
        ("experiments.selection", SHORT + "--seeds 2"),
        ("coverage.py", SHORT + "--n-embd 8 --n-head 4 --eval-every 1 --seeds 2"),
        ("experiments.horizon", "--seeds 1 --seed 4294967295"),
        ("experiments.optimizers", "--quick --steps 2 --seeds 2 --device cpu"),
    ],
)
def test_an_odd_command_line_that_makes_sense_gives_a_whole_folder(
    name, flags, tmp_path, monkeypatch
):
    # the quick runs draw it
    monkeypatch.setattr(plt.Figure, "savefig", lambda self, f, **_: f.write(b"\x89PNG"))
    finish(name, "--out", tmp_path, *flags.split())
    check_whole(tmp_path, ("samples.txt",) if name == "coverage.py" else ())


@pytest.mark.parametrize(
    "flags, phase", [(("--lr", 1e20), "cross-entropy 0"), (("--pretrain-lr", 1e20), "base 0")]
)
def test_numbers_that_are_none_end_the_run_in_one_line_and_leave_what_was_finite(
    flags, phase, tmp_path
):
    for again in ((), ("--resume",)):
        code, _, err = launch("coverage.py", "--quick", "--out", tmp_path, *flags, *again)
        last = err.splitlines()[-1]
        assert code == 2
        assert last.startswith("coverage.py: error: the ")
        assert f"of {phase}; " in last
        assert "Traceback" not in err
        state = load_checkpoint(tmp_path / "model.pt")["state"]
        assert all(v.isfinite().all() for phase in state.values() for v in phase["model"].values())
        assert not (tmp_path / "claims.json").exists(), "nothing is claimed"
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_interrupt_and_resume_give_the_metrics_of_an_uninterrupted_run_to_the_bit(
    tmp_path, monkeypatch
):
    # the quick run draws it
    monkeypatch.setattr(plt.Figure, "savefig", lambda *_, **__: None)
    marks = dict(phase="pretrain"), dict(phase="finetune", step=10)
    flags = "--quick --steps 20 --eval-every 5 --n-layer 1"
    check_resume("coverage.py", tmp_path, marks, *flags.split())


@pytest.mark.parametrize(
    "script, module, name, call, number",
    [
        ("coverage.py", cov, "measure_logp", 3, signal.SIGTERM),
        ("experiments.selection", selection, "measure_logp", 4, signal.SIGINT),
        ("coverage.py", cov, "generate", 1, signal.SIGTERM),
        ("experiments.optimizers", optimizers, "exact_coverage", 9, signal.SIGTERM),
    ],
)
def test_a_signal_in_the_middle_of_an_evaluation_is_heeded_at_once_and_nothing_is_lost(
    script, module, name, call, number, tmp_path, monkeypatch
):
    monkeypatch.setattr(plt.Figure, "savefig", lambda *_, **__: None)
    flags = ("--quick", "--n-layer", 1) if name != "exact_coverage" else ("--quick",)
    finish(script, *flags, "--out", tmp_path / "whole")
    original, calls, after = getattr(module, name), [], []

    def struck(*args, **more):
        calls.append(args)
        if len(calls) == call:
            os.kill(os.getpid(), number)
            after.append("went on")
        return original(*args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, struck)
        code, written, _ = launch(script, *flags, "--out", tmp_path / "cut")
    assert code == 128 + number and "--resume" in written and not after and len(calls) == call
    done, measured, linear = len(metrics(tmp_path / "cut")), [], optimizers.linear
    monkeypatch.setattr(optimizers, "linear", lambda *args: measured.append(args) or linear(*args))
    finish(script, "--resume", "--out", tmp_path / "cut")
    assert name != "exact_coverage" or done == 4 and len(measured) == 55 - 4, (
        "what was measured is not measured again"
    )
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    assert (tmp_path / "cut" / "claims.json").read_text() == (
        tmp_path / "whole" / "claims.json"
    ).read_text()
