"""coverage.py: the profile and its bounds by enumeration, the tournaments by hand, the graphs, the linear model, the trainer, and the command."""
import itertools
import math

import numpy as np
import pytest
import torch

from common import Memory, check_help, check_mistake, check_quick, check_resume

import coverage as cov
from coverage import (ANSWER, FIGURES, PAD, PROMPT, SECRET, Config, best_of_n, best_of_n_loss, build, coverage, dco_loss, exact_coverage, gradient, graphs, hard_reward,
                      kl_bound, log_probs, offset_tournament, pass_at, project, ranks, score, score_all, spearman, teacher_forced, token_step, tournament, truncated_weights)


def two_distributions(seed, outcomes=50, spread=2.0):
    rng = np.random.default_rng(seed)
    D, p = (np.exp(spread * rng.standard_normal(outcomes)) for _ in range(2))
    return D / D.sum(), p / p.sum()


def exact(D, p, N):
    """Cov_N by its definition."""
    return float(sum(d for d, q in zip(D, p) if d / q >= N))


def small(**choices):
    return Config(**{**dict(n_layer=1, n_head=2, n_embd=16, batch=8, steps=4, eval_every=2, eval_prompts=16), **choices})


# ---------------------------------------------------------------------------------------------------------------------------
# Coverage and its bounds

@pytest.mark.parametrize("seed", range(5))
def test_coverage_is_the_tail_of_the_log_ratio_and_falls_with_n(seed):
    D, p = two_distributions(seed)
    log_ratio, Ns = np.log(D) - np.log(p), (1.01, 2, 3, 4, 8, 16, 64, 1000)
    values = [coverage(log_ratio, N, D) for N in Ns]
    assert values == pytest.approx([exact(D, p, N) for N in Ns]) and values == sorted(values, reverse=True) and values[0] > values[-1]


def test_coverage_of_a_batch_and_at_the_level_itself():
    log_ratio = np.log([[4.0, 3.9, 1.0, 8.0], [1.0, 1.0, 1.0, 1.0]])
    assert coverage(log_ratio, 4).tolist() == [0.5, 0.0] and coverage(log_ratio, 1).tolist() == [1.0, 1.0]
    assert coverage(log_ratio, 4, [0.7, 0.1, 0.1, 0.1]).tolist() == pytest.approx([0.8, 0.0])


@pytest.mark.parametrize("seed", range(20))
def test_the_kl_bounds_the_coverage_of_every_n(seed):
    D, p = two_distributions(seed, spread=0.5 + seed / 5)
    kl = float(D @ np.log(D / p))
    for N in (3, 4, 8, 16, 100):
        assert exact(D, p, N) <= kl_bound(kl, N) + 1e-12
    p = np.array([1 / 16 / 16, 1 - 1 / 16 / 16])        # a Bernoulli pair for which it is nearly tight
    D = np.array([1 / 16, 1 - 1 / 16])
    assert exact(D, p, 16) / kl_bound(float(D @ np.log(D / p)), 16) > 0.9


def test_best_of_n_by_enumeration():
    p, reward = np.array([0.5, 0.2, 0.2, 0.1]), np.array([0.3, 1.0, 0.0, 0.3])
    for N in (1, 2, 3):
        by_hand = sum(math.prod(p[list(ys)]) * reward[list(ys)].max() for ys in itertools.product(range(4), repeat=N))
        assert best_of_n(p, reward, N) == pytest.approx(by_hand)


@pytest.mark.parametrize("seed", range(10))
def test_coverage_bounds_what_best_of_n_loses_and_a_hard_reward_loses_half_of_it(seed):
    D, p = two_distributions(seed)
    rng = np.random.default_rng(seed)
    for N in (2, 8, 32, 200):
        bound = best_of_n_loss(lambda M: exact(D, p, M), N)
        assert N < 200 or bound < 0.9, "a bound that says something"
        for reward in (rng.random(50), (rng.random(50) < 0.1).astype(float), hard_reward(D, p, N)):
            assert D @ reward - best_of_n(p, reward, N) <= bound + 1e-12                          # Prop. D.6
        reward = hard_reward(D, p, N)
        assert D @ reward - best_of_n(p, reward, N) >= exact(D, p, 2 * N) / 2 - 1e-12              # Prop. D.7
    assert exact(D, p, 4) > 0, "and it is not empty"


def test_pass_at_n_is_one_minus_the_chance_that_all_miss():
    p = np.array([1e-9, 0.01, 0.3, 0.999, 1.0])
    for N in (1, 2, 16):
        assert pass_at(np.log(p), N) == pytest.approx(1 - (1 - p) ** N, rel=1e-6)


def test_the_tournament_by_hand():
    # answers (columns) of three checkpoints: the second misses one answer by far, the third all by a little
    logp = np.log(np.array([[0.5, 0.5, 0.4, 0.5], [0.9, 0.9, 0.9, 0.01], [0.3, 0.3, 0.3, 0.3]]))
    assert tournament(logp, 4).tolist() == [0.0, 0.25, 0.0] and tournament(logp, 1.5).tolist() == [0.75, 0.25, 0.75] and tournament(logp, 40).tolist() == [0.0, 0.25, 0.0]
    assert tournament(logp, 100).tolist() == [0.0, 0.0, 0.0]


def test_the_offset_tournament_forgives_what_a_checkpoint_says_of_itself():
    rng = np.random.default_rng(0)
    logp, own = np.log(rng.random((3, 40))), np.log(rng.random((3, 3, 40)))
    for N, a in ((2, 0.0), (4, 0.25)):
        scores = []
        for i in range(3):
            rivals = [np.mean(logp[j] - logp[i] >= math.log(N)) - 2 * N ** a * np.mean(own[i, j] - own[i, i] >= math.log(N)) for j in range(3)]
            scores.append(max(rivals))
        assert offset_tournament(logp, own, N, a) == pytest.approx(scores)


def test_dco_switches_confident_answers_off_by_its_factor():
    for N in (1, 2, 8):
        logp = torch.log(torch.tensor([1e-4, 0.05, 0.3, 0.9], dtype=torch.float64)).requires_grad_()
        loss = dco_loss(logp, N)
        p = logp.detach().exp()
        loss.sum().backward()
        assert torch.allclose(loss.detach(), -torch.log(1 - (1 - p) ** N), rtol=1e-8)
        factor = N * p * (1 - p) ** (N - 1) / (1 - (1 - p) ** N)
        assert torch.allclose(-logp.grad, factor, rtol=1e-6) and (N > 1 or torch.allclose(factor, torch.ones(4, dtype=torch.float64)))


def test_rank_correlation_with_ties():
    x = np.array([3.0, 1.0, 3.0, 7.0])
    assert ranks(x).tolist() == [2.5, 1.0, 2.5, 4.0]
    assert spearman(x, x ** 3) == pytest.approx(1) and spearman(x, -x) == pytest.approx(-1) and spearman(x, 0 * x) == 0


# ---------------------------------------------------------------------------------------------------------------------------
# The graphs

def read(row):
    """A prompt's edges, s, t and the answer."""
    edges = [tuple(e) for e in row[:PROMPT - 4].reshape(-1, 2).tolist() if e[0] != PAD]
    assert row[PROMPT - 4] == cov.SLASH and row[PROMPT - 1] == cov.EQUALS
    return edges, int(row[PROMPT - 3]), int(row[PROMPT - 2]), row[PROMPT:].tolist()


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_a_graph_has_four_paths_and_the_answer_is_the_one_of_its_class(kind):
    shares, first = [], []
    for row in graphs(np.random.default_rng(0), np.full(300, kind)):
        edges, s, t, answer = read(row)
        assert len(set(edges)) == len(edges) in (14, 16)
        after = {}
        for u, v in edges:
            after.setdefault(u, set()).add(v)
        paths = [p for p in itertools.product(*[sorted(set().union(*after.values()))] * 3)
                 if p[0] in after[s] and p[1] in after.get(p[0], ()) and p[2] in after.get(p[1], ()) and t in after.get(p[2], ())]
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
        assert all(place[v] < min(i for i, e in enumerate(edges) if e == (u, v)) for u, v in edges if v in after), "a node's own edges come first"
        first.append(bit)
    shares = np.mean(shares, 0)
    assert shares.tolist() == ([1, 0], [0, 1])[kind] if kind < 2 else (abs(shares - 0.25) < 0.1).all() and 0.3 < np.mean(first) < 0.7


def test_the_score_is_the_answers_log_probability():
    torch.manual_seed(0)
    model, ids = build(small(), "cpu"), torch.as_tensor(graphs(np.random.default_rng(0), np.array([0, 1, 2])))
    by_hand = model(ids[:, :-1]).log_softmax(-1).gather(-1, ids[:, 1:, None])[:, -ANSWER:, 0].sum(1)
    assert torch.allclose(score(model, ids), by_hand, atol=1e-4) and score_all(model, ids) == pytest.approx(by_hand.detach().numpy(), abs=1e-4)


def test_exact_and_sampled_pass_at_n_agree():
    torch.manual_seed(0)
    config = small(n_layer=2, n_embd=32, batch=32)
    model = cov.train(config, Memory(), "base", 0, build(config, "cpu"), (1.0, 0.0, 0.0), 150, 1e-2)
    sampled, logp = cov.sampled_pass(model, 0, 200)
    exactly = [pass_at(logp, k).mean() for k in range(1, 201)]
    assert exactly[-1] > 0.2 and np.abs(sampled - exactly).max() < 0.06


# ---------------------------------------------------------------------------------------------------------------------------
# A table, a coin, the linear model

def test_the_table_counts_and_the_coin_can_be_infinitely_wrong():
    kl, c16 = cov.table(8, 2000, 0)
    assert kl == pytest.approx(1.51, abs=0.1) and cov.table(64, 2000, 0)[0] == pytest.approx(8 * kl, rel=0.1) and cov.table(64, 2000, 0)[1] == pytest.approx(c16, rel=0.1)
    infinite, cov2 = cov.coin(20, 0)
    q = np.arange(21) / 20
    mass = np.array([math.comb(20, k) * 0.01 ** k * 0.99 ** (20 - k) for k in range(21)])
    assert infinite == pytest.approx(mass[0] + mass[-1], abs=0.01) and cov2 == pytest.approx(mass @ (0.01 * (q <= 0.005) + 0.99 * (1 - q <= 0.495)), abs=0.0005)


@pytest.mark.parametrize("prompt", [0, 1])
def test_the_linear_models_gradient_by_finite_differences(prompt):
    theta, counts, e = np.array([0.3, 0.1, -0.05]), np.array([1, 3, 2]), 1e-6
    value = lambda theta: (log_probs(theta, prompt) * counts).sum()
    numeric = [(value(theta + e * d) - value(theta - e * d)) / (2 * e) for d in np.eye(3)]
    assert gradient(theta, prompt, counts) == pytest.approx(numeric, rel=1e-5, abs=1e-5) and np.exp(log_probs(theta, prompt)).sum() == pytest.approx(1)


def test_projection():
    assert project(np.array([[3.0, 4.0, -2.0], [0.1, 0.2, 0.5]])).tolist() == [pytest.approx([0.6, 0.8, -1.0]), [0.1, 0.2, 0.5]]


def test_the_exact_coverage_by_enumeration_of_all_sequences(monkeypatch):
    monkeypatch.setattr(cov, "FEATURES", cov.FEATURES / 10)             # so that unlikely tokens are seen
    theta, H = np.array([[0.2, 0.6, -0.3], [0.9, 0.1, 0.8]]), 4
    for i, th in enumerate(theta):
        for N in (2, 16):
            total = 0.0
            for prompt, share in ((0, cov.LOUD), (1, 1 - cov.LOUD)):
                truth, own = log_probs(cov.TRUTH, prompt), log_probs(th, prompt)
                for y in itertools.product(range(3), repeat=H):
                    total += share * math.exp(truth[list(y)].sum()) * ((truth - own)[list(y)].sum() >= math.log(N))
            assert exact_coverage(theta, H, N, most=4)[i] == pytest.approx(total, abs=1e-9) and (i or total > 0.0005)


def test_truncated_weights_spend_the_budget_and_no_more():
    rng = np.random.default_rng(0)
    e = rng.exponential(size=(50, 20)) * rng.random((50, 1))
    for A in (0.5, 3.0):
        w = truncated_weights(e, A)
        assert (w * e).sum(1) == pytest.approx(np.minimum(A, e.sum(1))) and (np.diff(w, axis=1) <= 0).all() and ((w == 0) | (w == 1)).mean() > 0.9
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
        assert together[i] == pytest.approx(total) and teacher_forced(theta0, prompt, tokens[i], 0.01) == pytest.approx(total)
        frozen = log_probs(theta0, prompt)[tokens[i]].sum()
        assert abs(total - frozen) > 1e-3 and teacher_forced(theta0, prompt, tokens[i], 0.0) == pytest.approx(frozen)
    logs = [teacher_forced(theta0, 1, np.array(y), 0.01) for y in itertools.product(range(3), repeat=3)]
    assert np.exp(logs).sum() == pytest.approx(1), "it is a distribution"


def test_a_token_step_is_sgd_on_one_token():
    logp, theta = token_step(np.array([0.5, 0.3, 0.2]), 1, 2, 0.001)
    assert theta[:2].tolist() == [0.5, 0.3] and theta[2] == pytest.approx(0.2 + 0.001 * 14 * (1 - np.exp([-2.8, 0, 2.8]) @ [-1, 0, 1] / np.exp([-2.8, 0, 2.8]).sum()))
    assert logp == pytest.approx(2.8 - math.log(np.exp([-2.8, 0, 2.8]).sum()))


def test_sgd_bounces_where_the_step_is_long_and_normalised_sgd_does_not():
    assert cov.linear("sgd", 2.5 / (256 * 35), 256, 300, 2).min() > 0.9
    assert cov.linear("sgd", 1 / (16 * 35), 16, 800, 4).max() < 0.005 and cov.linear("normalised", 0.2, 256, 1000, 2).max() < 0.001
    assert cov.linear("distilled", 0.002, 256, 800, 8).mean() < 0.005 and cov.ttt_coverage(0.003, 64, 300, 8).mean() < 0.005
    assert cov.linear("sgd", 0.25 / (4096 * 35), 4096, 300, 2).min() > 0.015, "the rare prompt is not learnt"


# ---------------------------------------------------------------------------------------------------------------------------
# Training

def test_fine_tuning_draws_the_mixture_and_keeps_the_base():
    config, run = small(steps=4), Memory()
    base = build(config, "cpu")
    before = {k: v.clone() for k, v in base.state_dict().items()}
    model, valid, kept = cov.fine_tune(config, run, "a", 0, base)
    assert all(torch.equal(v, before[k]) for k, v in base.state_dict().items()) and sorted(kept) == [0] and sorted(valid) == [0, 2, 4]
    assert all(torch.equal(a, b) for a, b in zip(kept[0].values(), before.values())) and not torch.equal(model.lm_head.weight, kept[0]["lm_head.weight"])
    rows = [r for r in run.rows if r["phase"] == "finetune"]
    test, weights = cov.held_out(0, config.eval_prompts)
    assert [r["step"] for r in rows] == [0, 2, 4] and rows[-1]["kl"] == pytest.approx(-score_all(model, test) @ weights) and weights.sum() == pytest.approx(1)
    assert weights[:16].sum() == pytest.approx(0.9)


def test_fine_tuning_is_nine_tenths_g1(monkeypatch):
    seen, original = [], graphs
    monkeypatch.setattr(cov, "graphs", lambda rng, classes: seen.extend(classes.tolist()) or original(rng, classes))
    cov.train(small(batch=500), Memory(), "a", 0, build(small(), "cpu"), (0.9, 0.1, 0.0), 2, 1e-3)
    assert 2 not in seen and abs(np.mean(seen) - 0.1) < 0.03


def test_selection_takes_the_best_loss_the_tournaments_winner_and_of_equals_the_better_loss():
    model = build(small(), "cpu")
    weights = {0: model.state_dict(), 8: {k: v + 0.1 * torch.randn_like(v) for k, v in model.state_dict().items()}}
    logp = np.log(np.array([[0.3] * 4, [0.5] * 4, [0.99, 0.99, 0.99, 0.1]]))             # 4 * 0.1 < 0.5: the last one loses the tournament
    valid = {0: torch.tensor(logp[0]), 4: torch.tensor(logp[1]), 8: torch.tensor(logp[2])}
    picks = cov.select(small(), model, valid, weights, 0)
    assert picks["best validation loss"] == (8 if logp[2].mean() > logp[1].mean() else 4) and picks["tournament"] == 4 and picks["offset"] in (0, 8)


def test_every_loss_sees_the_same_graphs(monkeypatch):
    draws, original = [], graphs
    monkeypatch.setattr(cov, "graphs", lambda rng, classes: draws.append(original(rng, classes)) or draws[-1])
    base = build(small(), "cpu")
    for loss in (None, lambda logp: dco_loss(logp, 8)):
        cov.train(small(), Memory(), "a", 0, base, (0.9, 0.1, 0.0), 3, 1e-3, loss)
    assert all((a == b).all() for a, b in zip(draws[:3], draws[3:])) and (draws[0] != draws[1]).any()


def test_interrupting_between_two_steps_changes_nothing():
    config, base, halves = small(), build(small(), "cpu"), Memory()
    whole = cov.train(config, Memory(), "a", 0, base, (0.9, 0.1, 0.0), 4, 1e-3, decay=True)

    def save(phase, **state):
        halves.state[phase] = copy_of(state)
        if state["step"] == 2 and halves.due:
            raise KeyboardInterrupt
    copy_of = lambda state: {k: v for k, v in state.items()}
    halves.due, halves.save = True, save
    with pytest.raises(KeyboardInterrupt):
        cov.train(config, halves, "a", 0, base, (0.9, 0.1, 0.0), 4, 1e-3, decay=True)
    halves.due = False
    again = cov.train(config, halves, "a", 0, base, (0.9, 0.1, 0.0), 4, 1e-3, decay=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values()))


# ---------------------------------------------------------------------------------------------------------------------------
# The command

@pytest.mark.parametrize("figure", FIGURES)
def test_a_quick_run_writes_figure_metrics_claims_config_and_checkpoint(figure, tmp_path):
    assert check_quick("coverage.py", tmp_path, "--figure", figure) == figure


def test_help_lists_every_flag():
    check_help("coverage.py")


@pytest.mark.parametrize("flags", ["--bogus", "--steps 0", "--dco 0", "--figure none", "--lr nan", "--eval-prompts 4", "--n-embd 65", "--resume"])
def test_a_mistake_in_the_flags_is_one_line_and_exit_code_2(flags, tmp_path):
    check_mistake("coverage.py", flags, tmp_path)


def test_interrupt_and_resume_give_the_metrics_of_an_uninterrupted_run_to_the_bit(tmp_path):
    check_resume("coverage.py", tmp_path, (dict(phase="pretrain"), dict(phase="finetune")), "--quick", "--sft-steps", 100, "--steps", 40, "--eval-every", 10)
