"""grpo.py: the task, each choice of the loss against closed forms, the gradient of a whole update, and the command with its resume."""
import copy
import dataclasses
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from common import ROOT, Memory, check_help, check_mistake, check_resume, check_whole, complain, finish, launch, metrics, torchrun
from test_huggingface import make_json, merges_of, save_json

import grpo
from experiment import Run
from grpo import (
    COLUMNS,
    LINE,
    LOSSES,
    Config,
    Rollout,
    UserError,
    advantages,
    aggregation_weights,
    correction_weights,
    demonstrate,
    draw_problem,
    generate,
    group_uniforms,
    guessed_carries,
    kl_estimate,
    length_bias,
    pass_at_k,
    question,
    reward,
    surrogate,
    tokenizer,
)
from huggingface import load_chat_template, load_tokenizer
from model import GPT, GPTConfig
from tasks.wordproblems import extract_answer, load_problems

REWARDS = torch.tensor([[1, 0, 0, 1], [0, 1, 1, 1], [0, 0, 0, 1], [1, 1, 0, 0.]])      # every group has right and wrong answers
each_loss = pytest.mark.parametrize("loss", LOSSES)


def small(**choices):
    return Config(**{**dict(n_layer=1, n_head=2, n_embd=32, digits=2, prompts=4, group=4, max_new_tokens=16, eval_prompts=4), **choices})


def policy(config, seed=0):
    """A random model, sharpened until its distribution is far from uniform."""
    torch.manual_seed(seed)
    model = grpo.build(config, "cpu")
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(6 if p.dim() == 2 else 1)
    return model


def answers(model, config, seed=0):
    """A ragged rollout: questions of 1 to 3 columns, answers of any length up to the budget."""
    rng = random.Random(seed)
    problems = [draw_problem(rng, 1 + i % 3) for i in range(config.prompts)]
    return grpo.sample(model, problems, config.group, config, torch.Generator().manual_seed(seed), config.sampler)[0]


def flat(model, gradient=False):
    return torch.cat([(p.grad if gradient else p).flatten() for p in model.parameters()]).detach().clone()


def one_update(config, rollout, lr=0.0, rewards=REWARDS):
    """A fresh policy after one update by plain SGD -> its last gradient (before the norm was cut), its weights, the logged metrics."""
    model, base = policy(config), policy(config, seed=1)
    metrics = grpo.update(model, base, torch.optim.SGD(model.parameters(), lr), rollout, rewards, config, torch.Generator().manual_seed(0))
    return flat(model, gradient=True) * max(1, metrics["grad_norm"]), flat(model), metrics


def close(a, b, tolerance=1e-5):
    """Largest difference over largest number."""
    return (a - b).abs().max() <= tolerance * b.abs().max()


def same_metrics(a, b):
    return a == pytest.approx(b, rel=1e-4, abs=1e-6)


# ---------------------------------------------------------------------------------------------------------------------------
# The task

PROBLEM = [(1, 6), (3, 7), (8, 3)]      # 831 + 376, units first
ANSWER = "a1A6007b3B7010c8C3112"        # right to left


def solve(problem, order):
    """The answer with every carry right, columns in the given order."""
    carry = [0]
    for x, y in problem:
        carry.append((x + y + carry[-1]) // 10)
    return "".join(f"{COLUMNS[j]}{x}{COLUMNS[j].upper()}{y}{carry[j]}{x + y + carry[j]:02d}" for j in order for x, y in [problem[j]])


def test_reward_accepts_the_right_answer_in_any_order_of_columns():
    assert solve(PROBLEM, range(3)) == ANSWER
    assert all(reward(PROBLEM, solve(PROBLEM, order)) == 1 for order in itertools.permutations(range(3)))


def test_reward_reads_the_last_line_of_a_column():
    assert reward(PROBLEM, "a1A6008" + ANSWER) == 1
    assert reward(PROBLEM, ANSWER + "a1A6008") == 0


@pytest.mark.parametrize("text", [ANSWER.replace("007", "008"), ANSWER.replace("010", "011"), ANSWER.replace("112", "113"), ANSWER[:-LINE], ANSWER[LINE:],
                                  ANSWER + "a", ANSWER + "a7", ANSWER + "a1A600", ANSWER + "d0D0000", ANSWER[:-1], ""])
def test_reward_rejects_a_wrong_digit_a_missing_or_extra_column_and_a_partial_line(text):
    assert reward(PROBLEM, text) == 0


def test_each_answer_is_judged_by_its_own_problem_and_earns_nothing_without_its_stop_token(monkeypatch):
    q, a = tokenizer.encode(question(PROBLEM)), tokenizer.encode(ANSWER)
    mask = torch.zeros(6, len(q + a) + 1)
    mask[:, len(q):] = 1
    mask[2::3, -1] = 0      # the third answer of each problem was cut off by the budget
    rollout = Rollout(torch.tensor([q + a + [tokenizer.eos]] * 6), mask, mask, torch.tensor([len(q)] * 6))
    monkeypatch.setattr(grpo, "generate", lambda *_, **__: rollout)
    _, texts, rewards = grpo.sample(None, [PROBLEM, PROBLEM[::-1]], 3, small(), None)
    assert texts == [ANSWER] * 6 and rewards.tolist() == [[1, 1, 0], [0, 0, 0]]


def test_an_answer_is_finished_at_each_stop_id_of_its_tokenizer(monkeypatch):
    ids = torch.tensor([[0, 1, 7], [0, 1, 9], [0, 1, 5], [0, 7, 0]])        # the last one ends after its second token
    mask = torch.tensor([[0.0, 1, 1]] * 3 + [[0, 1, 0]])
    task = SimpleNamespace(tokenizer=SimpleNamespace(eos=7, stop=[7, 9], decode=str), prompt=lambda p: [0], judge=lambda p, text, finished: float(finished))
    monkeypatch.setattr(grpo, "task_of", lambda _: task)
    monkeypatch.setattr(grpo, "generate", lambda *_, **__: Rollout(ids, mask, mask, torch.ones(4, dtype=torch.long)))
    assert grpo.sample(None, ["problem"], 4, small(), None)[2].tolist() == [[1, 1, 0, 1]]


def test_demonstrations_are_whole_lines_of_right_arithmetic_and_only_a_wrong_guess_spoils_one():
    rng, spoilt = random.Random(0), 0
    for _ in range(1000):
        problem = draw_problem(rng, 5)
        text, written = demonstrate(rng, problem), {}
        assert re.fullmatch(r"([a-e]\d[A-E]\d{4})+", text)
        for line in re.findall("." * LINE, text):
            j, x, y, carry, total = COLUMNS.index(line[0]), int(line[1]), int(line[3]), int(line[4]), int(line[5:])
            assert line[2] == line[0].upper() and (x, y) == problem[j] and x + y + carry == total
            known = 0 if j == 0 else written[j - 1] // 10 if j - 1 in written else None
            assert carry in ((0, 1) if known is None else (known,))
            written[j] = total
        truth = {COLUMNS.index(line[0]): int(line[5:]) for line in re.findall("." * LINE, solve(problem, range(5)))}
        assert reward(problem, text) == (written == truth)
        spoilt += written != truth
    assert 0.60 < spoilt / 1000 < 0.85      # the base is right 15% to 40% of the time


def test_guessed_carries_are_0_from_right_to_left_and_all_from_left_to_right():
    assert guessed_carries(solve(PROBLEM, [0, 1, 2])) == 0 and guessed_carries(solve(PROBLEM, [2, 1, 0])) == 1
    assert guessed_carries(solve(PROBLEM, [0, 2, 1])) == 0.5
    assert guessed_carries("9999999b000000") == 1      # what is no column is no guess
    assert guessed_carries("9999999") is guessed_carries("") is guessed_carries("a1A6007") is None        # and where nothing could be guessed there is no rate


def fake_sample(calls, rewards):
    """In place of grpo.sample: answers of 1 to 5 tokens whose ids say in which call and group they were drawn."""
    def sample(_, problems, n, *__):
        R = len(problems) * n
        column, group = torch.arange(6), torch.arange(R) // n
        mask = ((column > 0) & (column <= 1 + torch.arange(R)[:, None] % 5)).float()
        calls.append(problems)
        ids = (100 * len(calls) + group)[:, None].expand(R, 6)
        return Rollout(ids, mask, mask, torch.ones(R, dtype=torch.long)), [""] * R, rewards(len(calls), len(problems), n)
    return sample


def test_a_tenth_of_all_problems_is_held_out():
    rng, held = random.Random(0), {question(draw_problem(random.Random(i), 2, held_out=True)) for i in range(3000)}
    seen = {question(draw_problem(rng, 2)) for _ in range(3000)}
    assert 700 < len(held) < 1200 and len(seen) > 2500        # of 10,000


def test_held_out_problems_are_never_trained_on(monkeypatch):
    config, shown, sampled = small(prompts=1000, sft_steps=30, eval_prompts=300), [], []
    monkeypatch.setattr(grpo, "demonstrate", lambda rng, problem: shown.append(problem) or demonstrate(rng, problem))
    monkeypatch.setattr(grpo, "sample", fake_sample(sampled, lambda _, P, n: torch.zeros(P, n)))
    grpo.warm_up(config, Memory(), 0, "cpu")
    grpo.collect(None, config, random.Random(0), None)
    grpo.evaluate(None, config, 1)
    warmed, trained, held_out = ({question(p) for p in problems} for problems in (shown, *sampled))
    assert min(map(len, (warmed, trained, held_out))) > 200 and not held_out & (warmed | trained)


# ---------------------------------------------------------------------------------------------------------------------------
# The estimators, each against a closed form

@pytest.mark.parametrize("kind", ["std", "mean", "rloo"])
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 0.1 + 0.2, 1 / 3])
@pytest.mark.parametrize("G", [2, 7, 16])
def test_equal_rewards_give_advantages_of_exactly_zero(kind, value, G):
    adv = advantages(torch.cat([torch.full((3, G), value), torch.arange(G)[None] * 1.0]), kind)
    assert (adv[:3] == 0).all() and (adv[3] != 0).any()


def test_rloo_is_each_reward_minus_the_mean_of_the_others():
    r = torch.rand(5, 7, generator=torch.Generator().manual_seed(0))
    others = torch.stack([r[:, [j for j in range(7) if j != i]].mean(1) for i in range(7)], dim=1)
    torch.testing.assert_close(advantages(r, "rloo"), r - others)
    torch.testing.assert_close(advantages(r, "rloo"), advantages(r, "mean") * 7 / 6)


def test_advantages_are_centred_by_group_or_batch_and_std_scales_to_one():
    r = torch.rand(5, 7, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(advantages(r, "mean"), r - r.mean(1, keepdim=True))
    torch.testing.assert_close(advantages(r, "batch"), r - r.mean())
    torch.testing.assert_close(advantages(r, "std").std(1), torch.ones(5))
    torch.testing.assert_close(advantages(r, "std").mean(1), torch.zeros(5), atol=1e-6, rtol=0)


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("rho, A, alive", [(0.5, 1, True), (0.9, 1, True), (1.2, 1, True), (1.5, 1, False),
                                           (0.5, -1, False), (0.9, -1, True), (1.2, -1, True), (1.5, -1, True)])
def test_the_clip_silences_only_a_good_token_above_and_a_bad_one_below(ratio, rho, A, alive):
    logp = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    loss, silenced = surrogate(logp, logp.detach() - math.log(rho), torch.tensor([[A]]), torch.ones(1, 2), ratio, 0.2, 0.28)
    loss.sum().backward()
    torch.testing.assert_close(logp.grad, torch.full((1, 2), -A * rho * alive))
    torch.testing.assert_close(loss.detach(), torch.full((1, 2), -A * (rho if alive else min(max(rho, 0.8), 1.28))))
    assert (silenced == (not alive)).all()


@pytest.mark.parametrize("rho, weight", [(0.1, 0.1), (1.0, 1.0), (4.9, 4.9), (9.0, 5.0)])
@pytest.mark.parametrize("A", [1, -1])
def test_cispo_cuts_the_weight_and_never_loses_the_gradient(rho, weight, A):
    logp = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    loss, silenced = surrogate(logp, logp.detach() - math.log(rho), torch.tensor([[A]]), torch.ones(1, 2), "cispo", 1.0, 4.0)
    loss.sum().backward()
    torch.testing.assert_close(logp.grad, torch.full((1, 2), -A * weight))
    assert not silenced.any()


def test_gspo_is_the_geometric_mean_of_the_ratios_and_its_gradient_is_the_finite_difference():
    g = torch.Generator().manual_seed(0)
    old = torch.randn(3, 5, generator=g, dtype=torch.double)
    logp = (old + 0.3 * torch.randn(3, 5, generator=g, dtype=torch.double)).requires_grad_()
    mask = (torch.arange(5) < torch.tensor([5, 2, 3])[:, None]).double()
    adv = torch.tensor([[1.0], [-2.0], [0.5]], dtype=torch.double)
    per_token = lambda logp: surrogate(logp, old, adv, mask, "sequence", 0.9, 9.0)[0]
    for i, n in enumerate((5, 2, 3)):
        ratio = (logp - old)[i, :n].exp().prod() ** (1 / n)
        torch.testing.assert_close(per_token(logp)[i, :n], (-adv[i] * ratio).expand(n))
    assert torch.autograd.gradcheck(lambda x: (per_token(x) * aggregation_weights(mask, "sequence", 5)).sum(), logp)


@each_loss
def test_each_name_is_the_loss_of_its_paper(loss):
    """Two answers, right and wrong, of 1 and 3 tokens, every ratio far off: the sum that the paper writes, term by term."""
    cut = lambda x, low, high: max(low, min(high, x))
    size = dict(reinforce=0.5, dr_grpo=0.5, rloo=1.0).get(loss, 0.5 ** 0.5)        # of the advantages of rewards 1 and 0, whose std is 0.5 ** 0.5
    A, rho, mask = [size, -size], [[6.0, 1.0, 1.0], [0.5, 0.6, 1.25]], torch.tensor([[1.0, 0, 0], [1, 1, 1]])
    logp = torch.tensor([[-1.0, -9, -9], [-2, -0.5, -3]])
    m = small(loss=loss).method
    adv = advantages(torch.tensor([[1.0, 0.0]]), m.advantage).view(2, 1)
    per_token, _ = surrogate(logp, logp - torch.tensor(rho).log(), adv, mask, m.ratio, m.eps_low, m.eps_high)
    ours = (aggregation_weights(mask, m.aggregation, 8) * per_token).sum()
    terms = [[], []]
    for i, n in enumerate((1, 3)):
        s = math.prod(rho[i][:n]) ** (1 / n)
        for t in range(n):
            r, lp = rho[i][t], logp[i, t].item()
            ppo = lambda r, low, high: -min(r * A[i], cut(r, low, high) * A[i])
            terms[i].append(dict(reinforce=-A[i] * lp, rloo=-A[i] * lp, grpo=ppo(r, 0.8, 1.2), dr_grpo=ppo(r, 0.8, 1.2), dapo=ppo(r, 0.8, 1.28),
                                 gspo=ppo(s, 0.97, 1.04), cispo=-min(r, 5) * A[i] * lp)[loss])
    a, b = map(sum, terms)
    expected = dict(reinforce=(a + b) / 2, rloo=(a + b) / 2, grpo=(a + b / 3) / 2, gspo=(a + b / 3) / 2, dr_grpo=(a + b) / (2 * 8), dapo=(a + b) / 4, cispo=(a + b) / 4)
    assert ours.item() == pytest.approx(expected[loss], rel=1e-4) and m.dynamic == (loss == "dapo")


def test_a_flag_overrides_one_choice_of_the_method_and_leaves_the_others():
    ours, dapo = small(loss="dapo", eps_high=0.0, advantage="mean").method, small(loss="dapo").method
    assert vars(ours) == {**vars(dapo), "eps_high": 0.0, "advantage": "mean"} and dapo.eps_high == 0.28


@pytest.mark.parametrize("kind, short, long", [("sequence", 1 / 8, 1 / 128), ("token", 1 / 68, 1 / 68), ("constant", 1 / 128, 1 / 128), ("sum", 1 / 2, 1 / 2)])
def test_a_token_of_a_short_and_of_a_long_answer_weighs_what_its_paper_says(kind, short, long):
    mask = (torch.arange(70) < torch.tensor([[4], [64]])).float()
    a = aggregation_weights(mask, kind, 64)
    torch.testing.assert_close(a, mask * torch.tensor([[short], [long]]))


def categoricals():
    """Two distributions over 50 symbols, the first as logits with a gradient -> logits, logp, ref_logp, fp64."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(50, generator=g, dtype=torch.double).requires_grad_()
    return logits, logits.log_softmax(-1), (logits.detach() + torch.randn(50, generator=g, dtype=torch.double)).log_softmax(-1)


def kl(logp, logq):
    return (logp.exp() * (logp - logq)).sum()


def test_k1_and_k3_have_the_kl_as_their_mean_and_k2_half_the_second_moment():
    _, logp, ref = categoricals()
    mean = {k: (logp.exp() * kl_estimate(logp, ref, k)).sum() for k in ("k1", "k2", "k3")}
    torch.testing.assert_close(mean["k1"], kl(logp, ref))
    torch.testing.assert_close(mean["k3"], kl(logp, ref))
    variance = (logp.exp() * (logp - ref - kl(logp, ref)) ** 2).sum()
    torch.testing.assert_close(mean["k2"] - kl(logp, ref), (variance + kl(logp, ref) ** 2) / 2 - kl(logp, ref))     # the bias
    assert abs(mean["k2"] / mean["k1"] - 1) > 0.05
    assert (kl_estimate(logp, ref, "k3") >= 0).all()


@pytest.mark.parametrize("kind, closed_form", [("k1", lambda logp, ref: 0 * logp.sum()), ("k2", kl), ("k3", lambda logp, ref: kl(ref, logp))])
def test_in_the_loss_k1_pulls_nowhere_k2_down_the_kl_and_k3_down_the_reverse_one(kind, closed_form):
    logits, logp, ref = categoricals()
    ours, = torch.autograd.grad((logp.detach().exp() * kl_estimate(logp, ref, kind)).sum(), logits, retain_graph=True)
    exact, = torch.autograd.grad(closed_form(logp, ref), logits)
    torch.testing.assert_close(ours, exact)


def test_in_the_reward_k1_pulls_down_the_kl():
    logits, logp, ref = categoricals()
    ours, = torch.autograd.grad((logp.detach().exp() * kl_estimate(logp, ref, "k1").detach() * logp).sum(), logits, retain_graph=True)
    torch.testing.assert_close(ours, torch.autograd.grad(kl(logp, ref), logits)[0])


@pytest.mark.parametrize("kind, where", [("k1", "loss"), ("k2", "reward"), ("k3", "reward")])
def test_an_estimator_is_refused_where_it_does_not_pull_to_the_base(kind, where):
    with pytest.raises(UserError, match=kind):
        small(beta=0.1, kl=kind, kl_in=where)
    small(beta=0.1, kl=kind, kl_in={"loss": "reward", "reward": "loss"}[where])


def ratios(*rows):
    """old_logp and sampler_logp of which one row each has these ratios old / sampler, and a mask; past a row's end lies junk."""
    T = max(map(len, rows)) + 1
    log_w = torch.tensor([[math.log(w) for w in row] + [9.0] * (T - len(row)) for row in rows])
    mask = torch.tensor([[1.0] * len(row) + [0.0] * (T - len(row)) for row in rows])
    sampler = -torch.rand(mask.shape, generator=torch.Generator().manual_seed(0))
    return (sampler + log_w).requires_grad_(), sampler, mask


@pytest.mark.parametrize("kind, expected", [
    ("none", [[1, 1, 1], [1, 1, 1]]), ("tis", [[0.3, 1.5, 2], [1, 2, 1]]), ("mis", [[0, 1.5, 0], [1, 0, 1]]),
    ("seq_tis", [[0.3 * 1.5 * 3] * 3, [2] * 3])])
def test_corrections_are_old_over_sampler_capped_dropped_or_by_sequence_and_carry_no_gradient(kind, expected):
    old, sampler, mask = ratios([0.3, 1.5, 3.0], [1.0, 2.5, 1.0])
    w = correction_weights(old, sampler, mask, kind)
    torch.testing.assert_close(w[:, :3], torch.tensor(expected, dtype=torch.float32))
    assert not w.requires_grad


@pytest.mark.parametrize("kind", ["none", "tis", "seq_tis", "mis"])
def test_a_correction_is_exactly_one_where_the_sampler_is_the_old_policy(kind):
    old, _, mask = ratios([0.3, 1.5, 3.0], [1.0, 2.5])
    assert (correction_weights(old, old.detach().clone(), mask, kind) == 1).all()


def test_pass_at_k_is_the_fraction_of_subsets_with_a_right_answer():
    for n, k in itertools.product(range(1, 8), repeat=2):
        for c in range(n + 1 if k <= n else 0):
            subsets = list(itertools.combinations(range(n), k))
            brute = sum(min(s) < c for s in subsets) / len(subsets)     # samples 0 .. c - 1 are right
            assert pass_at_k(n, c, k).item() == pytest.approx(brute, abs=1e-12)


def test_pass_at_k_is_zero_without_a_right_answer_one_with_too_few_wrong_ones_and_grows_with_k():
    counts = torch.tensor([[0, 1, 7], [32, 61, 64]])
    curve = torch.stack([pass_at_k(64, counts, k) for k in range(1, 65)])       # (64, 2, 3)
    assert (curve[:, 0, 0] == 0).all() and (curve[32:, 1, 0] == 1).all() and (curve[3:, 1, 1] == 1).all() and (curve[:, 1, 2] == 1).all()
    assert (curve.diff(dim=0) >= 0).all() and (curve[:10, 0, 1:].diff(dim=0) > 0).all()
    torch.testing.assert_close(curve[0], counts.double() / 64)


@pytest.mark.parametrize("n, k", [(4, 5), (4, 0), (1, 2)])
def test_pass_at_k_refuses_more_samples_than_there_are(n, k):
    with pytest.raises(ValueError):
        pass_at_k(n, 0, k)


# ---------------------------------------------------------------------------------------------------------------------------
# The uniforms of a group

def uniforms(kind, P=4000, G=8):
    g = torch.Generator().manual_seed(0)
    u = torch.rand(P * G, dtype=torch.double, generator=g) if kind == "iid" else group_uniforms(P, G, kind, g)
    return u.view(P, G)


@pytest.mark.parametrize("kind", ["stratified", "lattice"])
def test_every_number_of_a_group_is_uniform_on_its_own(kind):
    for column in uniforms(kind).T:
        ks = (column.sort().values - torch.linspace(0, 1, 4000)).abs().max()
        assert ks < 1.95 / math.sqrt(4000)      # Kolmogorov and Smirnov: passed by chance in 999 of 1000
        assert column.min() >= 0 and column.max() < 1


def test_a_lattice_is_an_even_grid_with_its_own_shift_in_each_group():
    u = uniforms("lattice").sort(1).values
    torch.testing.assert_close(u.diff(dim=1), torch.full((4000, 7), 1 / 8, dtype=torch.double), atol=1e-12, rtol=0)
    assert len((u[:, 0] * 1e9).long().unique()) > 3990


def test_stratified_has_one_number_per_stratum_in_an_order_of_its_own():
    strata = (uniforms("stratified") * 8).long()
    assert (strata.sort(1).values == torch.arange(8)).all()
    assert all((row.bincount(minlength=8) / 4000 - 1 / 8).abs().max() < 0.025 for row in strata.T)


def test_independent_samples_take_no_uniforms():
    assert group_uniforms(4, 8, "iid", None) is None


def test_spread_out_samples_leave_fewer_groups_without_variance():
    right = {kind: ((uniforms(kind) >= 0.05) & (uniforms(kind) < 0.175)).sum(1) for kind in ("iid", "stratified", "lattice")}   # p = 1/8, G = 8
    dull = {kind: ((c == 0) | (c == 8)).double().mean().item() for kind, c in right.items()}
    assert (right["lattice"] == 1).all() and dull["lattice"] == 0
    assert dull["iid"] == pytest.approx((7 / 8) ** 8 + (1 / 8) ** 8, abs=0.02) and 0 < dull["stratified"] < dull["iid"] - 0.1


def test_the_lattice_sampler_spreads_the_first_tokens_of_a_group():
    config = small(group=64, prompts=2, sampler="lattice")
    model, problems = policy(config), [PROBLEM, PROBLEM]
    rollout, *_ = grpo.sample(model, problems, 64, config, torch.Generator().manual_seed(0), "lattice")
    n = rollout.prompt_lens[0]
    p = model(rollout.ids[:1, :n]).softmax(-1)[0, -1]
    for group in rollout.ids[:, n].view(2, 64):
        assert ((group.bincount(minlength=len(p)) - 64 * p).abs() < 1.001).all()


# ---------------------------------------------------------------------------------------------------------------------------
# Sampling, scoring, one update

@pytest.mark.parametrize("sampler", ["iid", "stratified", "lattice"])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_the_sampler_and_the_scorer_agree_on_every_log_probability(temperature, sampler):
    config = small(temperature=temperature, sampler=sampler)
    model = policy(config)
    rollout = answers(model, config)
    logp = grpo.score_all(model, rollout, config)
    assert ((logp - rollout.logp) * rollout.mask).abs().max() < 1e-4 and (rollout.logp * rollout.mask).sum() < -10


def test_the_stop_token_is_trained_on_and_a_question_may_hold_any_token():
    config = small(max_new_tokens=32)
    model = policy(config)
    prompts = [[t] * (1 + t % 4) for t in range(tokenizer.n_vocab)]     # the padding (0) and the stop token among them
    rollout = generate(model, prompts, 4, 32, stop=tokenizer.eos, generator=torch.Generator().manual_seed(0))
    logp, finished = grpo.score_all(model, rollout, config), 0
    for i, (row, mask) in enumerate(zip(rollout.ids, rollout.mask)):
        a, n = len(prompts[i // 4]), int(mask.sum())
        assert row[:a].tolist() == prompts[i // 4] and (mask[a:a + n] == 1).all()
        assert (row[a:a + n - 1] != tokenizer.eos).all() and (n == 32 or row[a + n - 1] == tokenizer.eos)
        finished += row[a + n - 1] == tokenizer.eos
        alone = model(row[None, :a + n])[0, a - 1:-1].log_softmax(-1).gather(1, row[a:a + n, None])[:, 0]
        torch.testing.assert_close(logp[i, a:a + n], alone, atol=1e-4, rtol=0)
    assert finished > 10


def with_padding(rollout, columns=5):
    """Junk wherever the mask is 0: in the tokens past a row's end, there and before it in the log-probabilities; and more columns of it."""
    g = torch.Generator().manual_seed(0)
    ids, mask, logp = (F.pad(t, (0, columns)) for t in (rollout.ids, rollout.mask, rollout.logp))
    past = torch.arange(ids.shape[1]) >= (rollout.prompt_lens + rollout.lengths)[:, None]
    ids = torch.where(past, torch.randint(tokenizer.n_vocab, ids.shape, generator=g), ids)
    return Rollout(ids, mask, torch.where(mask > 0, logp, torch.randn(mask.shape, generator=g)), rollout.prompt_lens)


@each_loss
@pytest.mark.parametrize("more", [dict(kl="k3", correction="seq_tis"), dict(kl="k1", kl_in="reward", correction="tis"), dict(minibatches=2, kl="k2")])
def test_padding_changes_neither_loss_nor_gradient_and_the_update_leaves_its_inputs_alone(loss, more):
    config = small(loss=loss, beta=0.1, entropy_bonus=0.01, micro_batch=8, **more)
    rollout = answers(policy(config), config)
    before = copy.deepcopy(rollout)
    gradient, weights, metrics = one_update(config, rollout, lr=0.05)
    padded_gradient, padded_weights, padded_metrics = one_update(config, with_padding(rollout), lr=0.05)
    assert same_metrics(padded_metrics, metrics)
    assert close(padded_gradient, gradient, 1e-4) and close(padded_weights, weights)
    assert all(torch.equal(getattr(rollout, f.name), getattr(before, f.name)) for f in dataclasses.fields(Rollout))


@each_loss
@pytest.mark.parametrize("minibatches", [1, 2])
def test_the_gradient_and_the_metrics_are_the_same_for_any_micro_batch(loss, minibatches):
    config = small(loss=loss, minibatches=minibatches, beta=0.1, entropy_bonus=0.01, correction="tis")
    rollout = answers(policy(config), config)
    rollout.logp += 0.3 * torch.randn(rollout.logp.shape, generator=torch.Generator().manual_seed(0))      # as from another sampler
    gradient, weights, metrics = one_update(config, rollout, lr=0.05)
    assert metrics["grad_norm"] > 0
    for size in (1, 2, 4, 8):
        g, w, m = one_update(dataclasses.replace(config, micro_batch=size), rollout, lr=0.05)
        assert same_metrics(m, metrics) and close(g, gradient, 1e-4) and close(w, weights)


@each_loss
@pytest.mark.parametrize("minibatches", [1, 4, 7])      # 7 does not divide the 16 rows
def test_the_logged_loss_is_that_of_the_full_batch(loss, minibatches):
    config, rewards = small(loss=loss, prompts=2, group=8, minibatches=minibatches, beta=0.1, entropy_bonus=0.01, micro_batch=2), REWARDS.view(2, 8)
    model, base, method = policy(config), policy(config, seed=1), config.method
    rollout, losses = answers(model, config), []
    (logp, entropy), ref = (grpo.score(model, rollout, config, rollout.ids.shape[1])), grpo.score_all(base, rollout, config)
    adv = advantages(rewards, method.advantage).view(-1, 1)
    L = -adv * (logp if method.ratio in ("none", "cispo") else 1) + 0.1 * kl_estimate(logp, ref, "k3") - 0.01 * entropy
    rows = torch.arange(16) if minibatches == 1 else torch.randperm(16, generator=torch.Generator().manual_seed(0))
    for chunk in rows.tensor_split(minibatches):
        losses.append((L[chunk] * aggregation_weights(rollout.mask[chunk], method.aggregation, 16)).sum())
    *_, metrics = one_update(config, rollout, rewards=rewards)
    assert len(losses) == minibatches
    mean = lambda x: ((x * rollout.mask).sum() / rollout.mask.sum()).item()
    expected = dict(loss=sum(losses).item() / len(losses), entropy=mean(entropy), kl=mean(kl_estimate(logp, ref, "k3")))
    assert same_metrics({k: metrics[k] for k in expected}, expected)


def test_each_minibatch_takes_its_own_step_with_its_own_gradient_and_the_norm_is_their_mean():
    config, seen = small(loss="rloo", minibatches=2), []
    model, norms = policy(config), []
    rollout, adv = answers(model, config), advantages(REWARDS, "rloo").view(16, 1)
    step = lambda: seen.append(flat(model, gradient=True))
    optimizer = SimpleNamespace(zero_grad=model.zero_grad, step=step, param_groups=[dict(params=list(model.parameters()))])
    metrics = grpo.update(model, None, optimizer, rollout, REWARDS, config, torch.Generator().manual_seed(0))
    for rows, step in zip(torch.randperm(16, generator=torch.Generator().manual_seed(0)).chunk(2), seen, strict=True):
        model.zero_grad()
        logp, _ = grpo.score(model, rollout[rows], config, rollout.ids.shape[1])
        (-adv[rows] * logp * rollout.mask[rows] / 8).sum().backward()
        norms.append(flat(model, gradient=True).norm().item())
        assert close(step * max(1, norms[-1]), flat(model, gradient=True), 1e-4)
    assert metrics["grad_norm"] == pytest.approx(sum(norms) / 2, rel=1e-3)


def test_a_kl_in_the_reward_lowers_each_answers_reward_and_stays_out_of_the_loss():
    config = small(loss="rloo", beta=0.1, kl_in="reward")
    model, base = policy(config), policy(config, seed=1)
    rollout = answers(model, config)
    k1 = ((grpo.score_all(model, rollout, config) - grpo.score_all(base, rollout, config)) * rollout.mask).sum(1).view(4, 4)
    gradient, _, metrics = one_update(config, rollout)
    plain, _, without = one_update(dataclasses.replace(config, beta=0.0), rollout, rewards=REWARDS - 0.1 * k1)
    assert close(gradient, plain) and metrics["loss"] == pytest.approx(without["loss"], rel=1e-4)


@pytest.mark.parametrize("advantage", ["std", "mean", "rloo", "batch"])
def test_a_kl_in_the_reward_pulls_as_strongly_as_beta_says_whatever_the_advantage(advantage):
    pull = {}
    for beta in (0.1, 0.001):
        config = small(advantage=advantage, beta=beta, kl_in="reward")
        pull[beta], *_ = one_update(config, answers(policy(config), config), rewards=torch.zeros(4, 4))     # groups all wrong: nothing but the KL
    assert close(pull[0.1], 100 * pull[0.001], 1e-4) and pull[0.1].abs().max() > 0


@pytest.mark.parametrize("prompts, group, minibatches", [(3, 2, 4), (3, 3, 4), (2, 8, 16), (4, 4, 1)])
def test_a_batch_takes_as_many_gradient_steps_as_asked_for(prompts, group, minibatches):
    config, steps = small(loss="grpo", prompts=prompts, group=group, minibatches=minibatches), []
    model = policy(config)
    optimizer = SimpleNamespace(zero_grad=model.zero_grad, step=lambda: steps.append(1), param_groups=[dict(params=list(model.parameters()))])
    grpo.update(model, None, optimizer, answers(model, config), torch.arange(prompts * group).view(prompts, group) % 2.0, config, torch.Generator().manual_seed(0))
    assert len(steps) == minibatches


@pytest.mark.parametrize("choices, rows", [(dict(loss="grpo"), 16), (dict(loss="dapo"), 4), (dict(figure="variants"), 4)])
def test_more_gradient_steps_than_a_batch_may_have_rows_are_refused(choices, rows):
    small(minibatches=rows, **choices)
    with pytest.raises(UserError, match=f"no more than {rows}"):
        small(minibatches=rows + 1, **choices)


@pytest.mark.parametrize("aggregation", ["sequence", "token", "constant", "sum"])
def test_on_policy_every_ratio_has_the_gradient_of_reinforce(aggregation):
    config = small(advantage="std", aggregation=aggregation, ratio="none")
    rollout = answers(policy(config), config)
    reinforce, *_ = one_update(config, rollout)
    for loss in ("grpo", "dapo", "gspo", "cispo"):
        gradient, _, metrics = one_update(dataclasses.replace(config, loss=loss, ratio=None), rollout)
        assert close(gradient, reinforce, 1e-6) and metrics["clip_fraction"] == 0


@pytest.mark.parametrize("kind", ["tis", "seq_tis", "mis"])
def test_a_correction_changes_nothing_when_the_sampler_is_the_policy(kind):
    config = small()
    rollout = answers(policy(config), config)
    plain, *_ = one_update(config, rollout)
    assert close(one_update(dataclasses.replace(config, correction=kind), rollout)[0], plain)
    rollout.logp += 0.5
    assert not close(one_update(dataclasses.replace(config, correction=kind), rollout)[0], plain)


@pytest.mark.parametrize("loss, clips", [("reinforce", False), ("grpo", True), ("dapo", True), ("gspo", True), ("cispo", False)])
def test_clipping_sets_in_after_the_first_gradient_step_of_a_batch(loss, clips):
    config = small(loss=loss, minibatches=4)
    rollout = answers(policy(config), config)
    *_, metrics = one_update(config, rollout, lr=1.0)
    assert (metrics["clip_fraction"] > 0) == clips and metrics["clip_fraction"] < 1


def test_a_gradient_is_cut_to_norm_1_and_logged_as_it_was():
    config = small(loss="rloo")
    rollout = answers(policy(config), config)
    gradient, weights, metrics = one_update(config, rollout, lr=0.5)
    assert metrics["grad_norm"] > 2 and (weights - flat(policy(config))).norm() == pytest.approx(0.5, rel=1e-3)
    assert gradient.norm() == pytest.approx(metrics["grad_norm"], rel=1e-3)


def test_positive_only_takes_no_gradient_from_answers_below_their_baseline():
    config = small(positive_only=True)
    rollout = answers(policy(config), config)
    changed = copy.deepcopy(rollout)
    for i in (REWARDS.flatten() == 0).nonzero():
        changed.ids[i] = torch.where(rollout.mask[i] > 0, (rollout.ids[i] + 7) % 20, rollout.ids[i])
    gradient, *_ = one_update(config, rollout)
    assert torch.equal(one_update(config, changed)[0], gradient) and gradient.abs().max() > 1e-3
    both = dataclasses.replace(config, positive_only=False)
    assert not close(one_update(both, changed)[0], one_update(both, rollout)[0], 0.1)


@each_loss
def test_a_constant_reward_moves_no_weight(loss, monkeypatch):
    config, sample, norms = small(loss=loss, steps=2, minibatches=2, lr=0.01), grpo.sample, []
    base, run = policy(config), Memory()

    def all_right(*args):
        rollout, texts, rewards = sample(*args)
        return rollout, texts, torch.ones_like(rewards)

    run.log = lambda **row: norms.append(row["grad_norm"]) if row["step"] else None
    monkeypatch.setattr(grpo, "sample", all_right)
    assert torch.equal(flat(grpo.train(config, run, loss, 0, base)), flat(base)) and norms == [0, 0]


@pytest.mark.parametrize("kind, where", [("k2", "loss"), ("k3", "loss"), ("k1", "reward")])
def test_without_a_reward_the_kl_term_leads_back_to_the_base(kind, where):
    config = small(beta=1.0, kl=kind, kl_in=where, loss="rloo", group=32, digits=1, max_new_tokens=8)
    base = policy(config)
    model, g = copy.deepcopy(base), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn(p.shape, generator=g)
    held = answers(base, config, seed=99)

    def distance():
        with torch.no_grad():
            logp, ref = model(held.ids[:, :-1]).log_softmax(-1), base(held.ids[:, :-1]).log_softmax(-1)
        return ((logp.exp() * (logp - ref)).sum(-1) * held.mask[:, 1:]).sum() / held.mask.sum()

    before, optimizer = distance(), torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.0)
    for seed in range(40):
        grpo.update(model, base, optimizer, answers(model, config, seed), torch.zeros(4, 32), config, g)
    assert before > 0.05 and distance() < before / 2


def test_dynamic_sampling_keeps_only_mixed_groups_and_counts_every_token(monkeypatch):
    def rewards(call, P, n):        # in call c only group c % P is mixed, and its first c answers are right
        r = torch.zeros(P, n)
        r[call % P, :call], r[(call + 1) % P] = 1, 1
        return r

    calls = []
    monkeypatch.setattr(grpo, "sample", fake_sample(calls, rewards))
    config = small(loss="dapo", prompts=3, group=5)
    rollout, kept, stats = grpo.collect(None, config, random.Random(0), None)
    per_call = sum(1 + i % 5 for i in range(15))
    assert len(calls) == 3 and stats == pytest.approx(dict(tokens=3 * per_call, zero_variance=2 / 3, reward=21 / 45))     # of all that was sampled
    assert kept.sum(1).tolist() == [1, 2, 3] and rollout.ids[::5, 0].tolist() == [101, 202, 300]       # each group with its own rewards
    assert len(rollout.ids) == 15

    calls.clear()
    rollout, kept, stats = grpo.collect(None, dataclasses.replace(config, loss="grpo"), random.Random(0), None)
    assert len(calls) == 1 and stats["tokens"] == per_call and kept.sum(1).tolist() == [0, 1, 5] and rollout.ids[::5, 0].tolist() == [100, 101, 102]


def test_dynamic_sampling_gives_up_after_four_batches(monkeypatch):
    calls, config = [], small(loss="dapo")
    monkeypatch.setattr(grpo, "sample", fake_sample(calls, lambda _, P, n: torch.ones(P, n)))
    rollout, rewards, stats = grpo.collect(None, config, random.Random(0), None)
    assert len(calls) == 4 and stats["zero_variance"] == 1 and stats["tokens"] == 4 * rollout.mask.sum() and (advantages(rewards, "std") == 0).all()


@pytest.mark.parametrize("mine", [slice(0, 1), slice(1, 3)])
def test_dynamic_sampling_of_several_processes_ends_when_together_they_have_enough(mine, monkeypatch):
    calls, config = [], small(loss="dapo", prompts=3)
    monkeypatch.setattr(grpo, "sample", fake_sample(calls, lambda _, P, n: torch.eye(n)[:P]))       # every group is mixed
    monkeypatch.setattr(grpo, "share", lambda n: mine)
    monkeypatch.setattr(grpo, "gathered", lambda part, rows, n: part)
    rollout, rewards, _ = grpo.collect(None, config, random.Random(0), None)
    assert len(calls) == 1 and len(rewards) == 3 and rollout.rows.tolist() == list(range(4 * mine.start, 4 * mine.stop))


# ---------------------------------------------------------------------------------------------------------------------------
# Warm-up, evaluation, the loop

PAIRS = [(question(problem), solve(problem, range(len(problem)))) for problem in (PROBLEM[:1], PROBLEM[:1], PROBLEM, PROBLEM * 2)]


def test_the_warm_up_minimises_the_mean_over_all_answer_tokens_and_teaches_the_stop_token(monkeypatch):
    lrs, run, config, draws = [], Memory(), small(sft_steps=100, sft_batch=4), itertools.cycle(PAIRS)
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: (lrs.append(self.param_groups[0]["lr"]), step(self)))
    torch.manual_seed(5)
    model, nll = grpo.build(config, "cpu"), []
    trained = grpo.warm_up(config, run, 5, "cpu", lambda *_: next(draws))
    for q, a in PAIRS:
        ids = torch.tensor([tokenizer.encode(q + a) + [tokenizer.eos]])
        nll.append(-model(ids[:, :-1]).log_softmax(-1).gather(2, ids[:, 1:, None])[0, len(q) - 1:, 0])
    assert run.rows[0]["loss"] == pytest.approx(torch.cat(nll).mean().item(), rel=1e-4)
    assert lrs == pytest.approx([3e-3 * min((i + 1) / 50, 1 - i / 100) for i in range(100)])
    assert run.rows[-1]["step"] == 99 and run.rows[-1]["loss"] < run.rows[0]["loss"] and not torch.equal(flat(trained), flat(model))


def test_an_evaluation_counts_right_answers_and_guessed_carries_over_all_independent_samples(monkeypatch):
    config, orders = small(eval_prompts=5, sampler="lattice", prompts=1, group=8), {1: [1, 0], 0: [0, 1]}     # 4 problems x 2 answers at a time

    def sample(_, problems, n, config, generator, sampler="iid", mine=slice(None)):
        assert sampler == "iid"
        right = torch.tensor([[1, question(p) < "b5"] for p in problems]).float()
        return None, [solve(p, orders[int(r)]) for p, row in zip(problems, right) for r in row], right

    monkeypatch.setattr(grpo, "sample", sample)
    row = grpo.held_out(None, config, 2, (1, 2))
    correct, guesses = grpo.evaluate(None, config, 2)
    right = correct.sum().item() / 10
    assert row == {"pass@1": pytest.approx(right), "pass@2": 1, "guessed_carries": pytest.approx(right)} and guesses == row["guessed_carries"]
    assert correct.min() == 1 and correct.max() == 2


def test_each_seed_trains_its_own_copy_of_the_base_on_its_own_problems_and_answers_and_a_row_tells_right_from_wrong(monkeypatch):
    seen, run, config = {}, Memory(), small(steps=2, eval_every=5)
    base = policy(config)
    before, rollout = flat(base), Rollout(torch.zeros(4, 9, dtype=torch.long), torch.zeros(4, 9), torch.zeros(4, 9), torch.ones(4, dtype=torch.long))
    for i, n in enumerate((2, 4, 6, 8)):
        rollout.mask[i, 1:n + 1] = 1
    rollout.rows = torch.arange(4)

    def collect(model, config, rng, generator):
        draws.append((rng.random(), torch.rand(1, generator=generator).item()))
        return rollout, torch.tensor([[1.0, 0], [0, len(draws) - 1]]), dict(reward=0.25, zero_variance=0.5, tokens=20)

    def update(model, *_):
        with torch.no_grad():
            model.lm_head.weight.add_(1)
        return {}

    monkeypatch.setattr(grpo, "collect", collect)
    monkeypatch.setattr(grpo, "update", update)
    monkeypatch.setattr(grpo, "held_out", lambda *_: {"pass@1": 0.5})
    for seed in (0, 1):
        draws = seen[seed] = []
        trained = grpo.train(config, run, "arm", seed, base)
        assert torch.equal(flat(base), before) and not torch.equal(flat(trained), before)
    assert len({*seen[0], *seen[1]}) == 4 and len(run.state) == 2
    rows = [r for r in run.rows if r["seed"] == 1]
    assert [r["step"] for r in rows] == [0, 1, 2] and ["pass@1" in r for r in rows] == [True, False, True]
    assert [(r["length"], r["length_right"], r["length_wrong"], r["sampled_tokens"]) for r in rows[1:]] == [(5, 2, 6, 20), (5, 5, 5, 40)]
    grpo.train(config, run, "arm", 1, base)      # finished: nothing to do
    assert len(run.rows) == 6
    grpo.train(dataclasses.replace(config, steps=9), run, "budget", 0, base, tokens=30)
    assert [(r["step"], r["sampled_tokens"], "pass@1" in r) for r in run.rows[6:]] == [(0, 0, True), (1, 20, False), (2, 40, True)]


def test_each_seed_warms_up_a_base_of_its_own():
    run, config = Memory(), small(sft_steps=2, sft_batch=4)
    bases = [grpo.warm_up(config, run, seed, "cpu") for seed in (0, 1, 0)]      # the last one is read from the checkpoint
    assert torch.equal(flat(bases[0]), flat(bases[2])) and not close(flat(bases[1]), flat(bases[0]), 0.1) and len(run.state) == 2
    untrained = [grpo.warm_up(small(sft_steps=0), Memory(), seed, "cpu") for seed in (0, 1)]
    assert not close(flat(untrained[1]), flat(untrained[0]), 0.1)


# ---------------------------------------------------------------------------------------------------------------------------
# The length bias, and the command

def test_wrong_answers_grow_under_the_sequence_mean_and_not_under_a_constant():
    ratio = {}
    for name, choice in dict(grpo=("std", "sequence"), token=("std", "token"), dr_grpo=("mean", "constant")).items():
        ends = [length_bias(*choice, seed)[-1] for seed in range(4)]
        ratio[name] = sum(wrong / right for wrong, right in ends) / 4
    assert ratio["grpo"] >= 5 and 1 / 1.2 <= ratio["dr_grpo"] <= 1.2 and ratio["dr_grpo"] < ratio["token"] < ratio["grpo"]


def test_a_step_of_the_policy_without_a_model_is_the_gradient_of_its_loss():
    path = length_bias("mean", "sequence", 1, steps=1, prompts=8, group=4, cap=3, hazard=0.4, lr=0.5)
    rng = np.random.default_rng(1)
    right, drawn = torch.tensor(rng.integers(0, 2, 32)), torch.tensor(rng.geometric(0.4, 32))
    logit = torch.full((2,), math.log(0.4 / 0.6), dtype=torch.double, requires_grad=True)
    h, n = logit.sigmoid()[right], drawn.clamp_max(3)
    logp = (n - 1) * (1 - h).log() + torch.where(drawn <= 3, h, 1 - h).log()        # the third token stops, or is cut off
    loss = -(advantages(right.double().view(8, 4), "mean").flatten() * logp / n / 32).sum()
    h = (logit - 0.5 * torch.autograd.grad(loss, logit)[0]).sigmoid()
    assert path[1].tolist() == pytest.approx((1 + (1 - h) + (1 - h) ** 2).tolist(), rel=1e-5) and (drawn == 3).any() and path[1].tolist() != path[0].tolist()


def test_the_coin_in_the_question_is_the_reward_and_a_finished_arm_resumes(monkeypatch):
    run, config, coins = Memory(), small(loss="grpo", steps=3, prompts=8, max_new_tokens=24, lr=0.0), []
    base, update = policy(config), grpo.update

    def spy(model, base, optimizer, rollout, rewards, *rest):
        first = torch.tensor([int(tokenizer.decode(row[:1])) for row in rollout.ids.tolist()])
        assert torch.equal(rewards.flatten(), first.float())        # the question says what the answer will earn
        coins.append([rollout.lengths[first == c].float().mean().item() for c in (1, 0)])
        return update(model, base, optimizer, rollout, rewards, *rest)

    monkeypatch.setattr(grpo, "update", spy)
    for _ in range(2):
        grpo.length_bias_gpt(config, run, "grpo", 0, base)
    assert [[r["length_right"], r["length_wrong"]] for r in run.rows] == coins and len(coins) == 3


@pytest.mark.parametrize("choices", [dict(temperature=0.5), dict(dtype="bfloat16")])
def test_what_rambles_is_scored_as_it_was_sampled(choices, monkeypatch):
    config = small(loss="grpo", steps=1, prompts=1, group=2, max_new_tokens=24, lr=0.0, seed=1, **choices)
    apart, run = [], Memory()

    def spy(model, base, optimizer, rollout, rewards, config, generator):
        with torch.no_grad():
            apart.append(((grpo.score(model, rollout, config, rollout.ids.shape[1])[0] - rollout.logp) * rollout.mask).abs().max().item())
    real, sampled_in = grpo.generate, set()
    monkeypatch.setattr(grpo, "generate", lambda model, *args, **more: sampled_in.add(model.lm_head.weight.dtype) or real(model, *args, **more))
    monkeypatch.setattr(grpo, "update", spy)
    for seed in range(4):
        grpo.length_bias_gpt(config, run, "grpo", seed, policy(config))
    assert sampled_in == {getattr(torch, config.dtype)} and max(apart) < (0.1 if config.dtype == "bfloat16" else 1e-4)
    assert any(None in (r["length_right"], r["length_wrong"]) for r in run.rows) and not any(r[k] != r[k] for r in run.rows for k in r)      # never nan


def claims_of(figure, run, monkeypatch, config, **stubs):
    for name, stub in stubs.items():
        monkeypatch.setattr(grpo, name, stub)
    fig, claims = getattr(grpo, f"figure_{figure}")(config, run, "cpu")
    grpo.plt.close(fig)
    return {c["id"]: (c["ours"], c["holds"]) for c in claims}


def test_the_claims_of_train_compare_the_base_with_the_trained_model_by_the_seed_that_matters(monkeypatch):
    run, config = Memory(), small(seeds=2, steps=1)
    where = {("base", 0): (0.20, 0.7, 0.99), ("base", 1): (0.45, 0.5, 0.97), ("dr_grpo", 0): (0.95, 0.02, 0.95), ("dr_grpo", 1): (0.85, 0.10, 0.95)}

    def held_out(arm_seed, config, n, ks):
        p, guessed, last = where[arm_seed]
        return {**{f"pass@{k}": p for k in ks}, "pass@64": last, "guessed_carries": guessed}

    def train(config, run, arm, seed, base):
        run.log(phase="rl", arm=arm, seed=seed, step=1, **{"pass@1": 0.9}, **dict.fromkeys(("reward", "guessed_carries", "entropy", "length_right", "length_wrong", "zero_variance"), 1))
        return arm, seed

    claims = claims_of("train", run, monkeypatch, config, held_out=held_out, train=train, warm_up=lambda c, r, seed, d: ("base", seed))
    assert claims == dict(gain=("0.4 (0.33, 0.90)", False), trained=("0.85", False), order=("0.1 (0.60)", False))


@pytest.mark.parametrize("base, trained", [(0.9, 1.0), (1.0, 1.0), (1.0, 0.9), (0.9, 0.9)])
def test_the_panel_of_pass_at_k_says_whether_a_crossing_can_be_seen_at_all(base, trained, monkeypatch):
    monkeypatch.setattr(grpo, "held_out", lambda model, *_: {f"pass@{2 ** i}": model for i in range(7)} | dict(guessed_carries=0.5))
    monkeypatch.setattr(grpo, "train", lambda *_: trained)
    monkeypatch.setattr(grpo, "warm_up", lambda *_: base)
    fig, claims = grpo.figure_train(small(seeds=2, steps=0), Memory(), "cpu")
    title = fig.axes[-1].get_title()
    assert f"pass@64: base {base:.2f}, after RL {trained:.2f}" in title and ("can't be seen" in title) == (base == trained == 1)
    assert {c["id"] for c in claims} == {"gain", "trained", "order"}        # none about a tie
    grpo.plt.close(fig)


def fake_arms(gain, clip, seen=None, last=300_000):
    """In place of grpo.train: an arm of each seed goes from .2 (a seed more: .1 more) to its gain above that, in two steps, and samples `last` tokens."""
    def train(config, run, arm, seed, base, tokens):
        if seen is not None:
            seen.add((config.loss, arm, config.minibatches, round(config.lr, 9), config.method.aggregation))
        for step in range(3):
            run.log(phase="rl", arm=arm, seed=seed, step=step, sampled_tokens=step * last / 2, clip_fraction=clip.get(arm, [0, 0])[seed],
                    **{"pass@1": 0.2 + 0.1 * seed + gain[arm][seed] * step / 2})
    return train


def test_the_claims_of_variants_compare_losses_on_the_same_seed(monkeypatch):
    config, seen = small(seeds=2, figure="variants", lr=0.1), set()
    gain = {loss: (0.35, 0.30) for loss in LOSSES} | dict(rloo=(0.29, 0.24), dapo=(0.30, 0.37))         # rloo: .06 behind grpo on each seed; dapo is so on one
    clip = dict(gspo=(0.1, 0.3), grpo=(0.01, 0.01))
    claims = claims_of("variants", Memory(), monkeypatch, config, train=fake_arms(gain, clip, seen), warm_up=lambda *_: None)
    assert claims == {"all learn": ("0.265 ± 0.035", True), "similar": (claims["similar"][0], False), "gspo clips more": ("20 ± 14 (0.2, 0.01)", True)}
    distance, spread = map(float, claims["similar"][0].split(" ± "))
    assert distance == 0.06 and spread < 1e-9
    assert seen == {(loss, loss, 4, 0.1, LOSSES[loss][4]) for loss in LOSSES}


@pytest.mark.parametrize("last", [300_000, 42_000])
def test_the_figure_of_variants_says_how_much_was_sampled(last, monkeypatch):
    config = small(seeds=2, figure="variants")
    for name, stub in dict(train=fake_arms(dict.fromkeys(LOSSES, (0.3, 0.4)), {}, last=last), warm_up=lambda *_: None).items():
        monkeypatch.setattr(grpo, name, stub)
    fig, claims = grpo.figure_variants(config, Memory(), "cpu")
    curves, differences = fig.axes
    assert f"{last // 1000}k sampled tokens" in fig._suptitle.get_text() and f"{last // 1000}k sampled tokens" in differences.get_title()
    assert max(line.get_xdata().max() for line in curves.lines) == pytest.approx(last / 1000)
    assert next(c for c in claims if c["id"] == "all learn")["ours"] == "0.35 ± 0.071"
    grpo.plt.close(fig)


def test_a_figure_has_its_own_defaults_and_takes_what_it_is_told():
    choices = lambda **flags: [getattr(Config(**flags), name) for name in ("seeds", "steps", "minibatches", "lr", "max_new_tokens", "sft_steps", "eval_every")]
    assert choices() == [1, 45, 1, 3e-4, 56, 1200, 15]
    assert choices(figure="variants") == [3, 10 ** 9, 4, 1e-4, 56, 1200, 3]
    assert choices(figure="length") == [3, 60, 1, 3e-4, 64, 150, 15]
    told = dict(seeds=2, steps=0, minibatches=8, lr=0.0, max_new_tokens=40, sft_steps=0, eval_every=1)
    for figure in grpo.FIGURES:
        assert choices(figure=figure, **told) == list(told.values())


def fake_lengths(wrong_of, right=5):
    """In place of grpo.length_bias_gpt: answers of 5 tokens, in the last 10 steps wrong ones of wrong_of[loss][seed]."""
    def gpt(config, run, arm, seed, base):
        for step in range(20):
            run.log(phase="rl", arm=arm, seed=seed, step=step + 1, length_wrong=5 if step < 10 else wrong_of[config.loss][seed], length_right=right)
    return gpt


def test_the_claims_of_length_are_wrong_over_right_seed_by_seed(monkeypatch):
    path = {"sequence": [[10, 10], [60, 2]], "token": [[10, 10], [12, 8]], "constant": [[10, 10], [8, 10]]}
    bias = lambda advantage, aggregation, seed: torch.tensor(path[aggregation]).numpy()
    stubs = dict(length_bias=bias, length_bias_gpt=fake_lengths(dict(grpo=(20, 40), dr_grpo=(5, 3))), warm_up=lambda *_: None)
    claims = claims_of("length", Memory(), monkeypatch, small(seeds=2, figure="length"), **stubs)
    assert {k: v for k, (v, _) in claims.items()} == {"grpo": "30 ± 0", "token": "-28.5 ± 0", "dr_grpo": "1.25 ± 0", "gpt grpo": "6 ± 2.8", "gpt dr_grpo": "1.33 ± 0.47"}
    assert [holds for _, holds in claims.values()] == [True, True, False, True, False]       # right answers that grow are a bias, too
    stubs["length_bias_gpt"] = lambda *_: None       # --steps 0: the panel without a model alone
    assert claims_of("length", Memory(), monkeypatch, small(seeds=1, figure="length"), **stubs)["gpt grpo"] == ("nan", False)


def test_no_claim_of_a_model_that_writes_nothing_holds(monkeypatch):
    nothing = {"guessed_carries": None}
    log = lambda config, run, arm, seed, base: run.log(phase="rl", arm=arm, seed=seed, step=1, **{"pass@1": 0.0, "guessed_carries": None, "length_right": None},
                                                       **dict.fromkeys(("reward", "entropy", "length_wrong", "zero_variance"), 1))
    claims = claims_of("train", Memory(), monkeypatch, small(seeds=2, steps=1), held_out=lambda model, config, n, ks: nothing | {f"pass@{k}": 0.0 for k in ks},
                       train=log, warm_up=lambda *_: None)
    assert claims["order"] == ("nan (nan)", False) and not any(holds for _, holds in claims.values())
    claims = claims_of("variants", Memory(), monkeypatch, small(seeds=2, figure="variants"), train=fake_arms(dict.fromkeys(LOSSES, (0, 0)), {}), warm_up=lambda *_: None)
    assert not any(holds for _, holds in claims.values())
    claims = claims_of("length", Memory(), monkeypatch, small(seeds=2, figure="length"), warm_up=lambda *_: None,
                       length_bias_gpt=fake_lengths(dict.fromkeys(("grpo", "dr_grpo"), (1, 1)), right=1))
    assert not claims["gpt grpo"][1] and not claims["gpt dr_grpo"][1]


def test_an_evaluation_without_a_line_has_no_guessed_carries_and_one_without_lines_in_some_answers_counts_the_others(monkeypatch):
    texts = ["", "", "a1A6007", solve(PROBLEM, [2, 1, 0])]
    monkeypatch.setattr(grpo, "sample", lambda _, problems, n, *__, **___: (None, texts[:len(problems) * n], torch.zeros(len(problems), n)))
    assert grpo.evaluate(None, small(eval_prompts=3), 1)[1] is None and grpo.evaluate(None, small(eval_prompts=4), 1)[1] == 1


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "quick"
    finish("grpo.py", "--quick", "--out", folder)
    return folder


def test_a_quick_run_writes_figure_metrics_claims_config_and_checkpoint(quick):
    assert check_whole(quick) == "train"
    assert {row["phase"] for row in metrics(quick)} == {"sft", "rl", "pass@k"}


@pytest.mark.parametrize("figure", ["variants", "length"])
def test_the_other_figures_run(figure, tmp_path):
    finish("grpo.py", "--quick", "--figure", figure, "--out", tmp_path, "--prompts", 16, "--group", 8)     # few large steps: faster
    assert check_whole(tmp_path) == figure


def test_help_lists_every_flag():
    check_help("grpo.py")


@pytest.mark.parametrize("flags", ["--bogus", "--steps x", "--steps -1", "--loss ppo", "--group 1", "--beta nan", "--beta 0.1 --kl k1", "--n-embd 65", "--resume"])
def test_a_mistake_in_the_flags_is_one_line_and_exit_code_2(flags, tmp_path):
    check_mistake("grpo.py", "--quick " + flags, tmp_path)


IDLE = [("--figure variants --loss grpo", "--loss"), ("--figure length --loss grpo", "--loss"), ("--figure variants --advantage std", "--advantage"),
        ("--figure length --ratio none", "--ratio"), ("--figure length --aggregation sum", "--aggregation"), ("--figure length --eps-low 0.1", "--eps-low"),
        ("--figure length --digits 3", "--digits"), ("--figure length --sampler lattice", "--sampler"), ("--figure length --eval-every 2", "--eval-every"),
        ("--figure length --eval-prompts 2", "--eval-prompts"), ("--figure length --eval-samples 2", "--eval-samples"),
        ("--ratio token", "--ratio"), ("--eps-high 0.3", "--eps-high"), ("--loss rloo --minibatches 2 --eps-low 0.3", "--eps-low"),
        ("--minibatches 2 --ratio none --eps-high 1", "--eps-high"), ("--kl k3", "--kl"), ("--kl-in reward", "--kl-in"), ("--correction tis", "--correction"),
        ("--template {question}", "--template"), ("--chat", "--chat"), ("--sft-steps 0 --sft-lr 1", "--sft-lr"), ("--sft-steps 0 --sft-batch 4", "--sft-batch"),
        ("--steps 0 --sft-steps 0 --checkpointing", "--checkpointing"),
        *((f"--steps 0 {flag}", flag.split()[0]) for flag in ("--loss grpo", "--beta 1", "--entropy-bonus 1", "--positive-only", "--sampler lattice",
                                                             "--minibatches 2", "--micro-batch 2", "--lr 1", "--eval-every 2"))]


@pytest.mark.parametrize("flags, idle", IDLE, ids=[f for f, _ in IDLE])
def test_a_flag_that_does_nothing_beside_the_others_is_one_line(flags, idle, tmp_path):
    assert f"{idle} does nothing here" in complain("grpo.py", "--quick", *flags.split(), "--out", tmp_path / "run") and not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags", ["--n-layer 1", "--n-head 2", "--n-embd 32", "--sft-steps 5", "--sft-batch 8", "--sft-lr 0.1", "--digits 3"])
def test_a_flag_of_the_toy_beside_a_checkpoint_is_one_line(flags, real, tmp_path):
    err = complain("grpo.py", *REAL, "--init", real / "checkpoint", "--data", real / "sums.jsonl", *flags.split(), "--out", tmp_path / "run")
    assert f"{flags.split()[0]} does nothing here" in err and not (tmp_path / "run").exists()


ODD = ["--seed -1", "--seed 4294967296", "--seeds 0", "--seed 1.5", "--steps 1e3", "--steps 99999999999999999999", "--lr inf", "--lr -1", "--lr 1e31", "--lr x",
       "--minibatches 2 --eps-high 1e300", "--minibatches 2 --eps-low -0.1", "--beta -1", "--beta 1e99", "--temperature 0", "--temperature nan", "--temperature 1e39",
       "--entropy-bonus inf", "--prompts 0", "--prompts 4294967295", "--prompts 100000000000", "--group 1", "--group 4294967295", "--minibatches 0", "--minibatches 17",
       "--micro-batch 0", "--prompts 2000000000 --micro-batch 4294967295", "--digits 0", "--digits 9", "--max-new-tokens 0", "--max-new-tokens 4294967295",
       "--n-layer 4294967295", "--n-embd 4294967288", "--n-head 0", "--n-head 7", "--n-embd 7", "--n-embd 33", "--sft-batch 1", "--sft-batch 4294967295", "--sft-steps -1", "--eval-every 0", "--eval-prompts 0",
       "--eval-prompts 4294967295", "--eval-samples 0", "--eval-samples 4294967295", "--eval-prompts 3000000 --eval-samples 3000000", "--device tpu", "--dtype float16",
       "--figure none", "--loss GRPO", "--figure variants --eval-every 0", "--figure length --group 1", "--figure length --max-new-tokens 225", "--resum",
       "--data x --figure length", "--init x", "--quick 1", "stray", "--out", "--beta 0.1 --kl k1", "--beta 0.1 --kl k2 --kl-in reward", "--loss dapo --minibatches 5",
       "--out FILE", "--out FILE/deeper", "--out LONG", "--resume --out EMPTY", "--resume --out FILE", "--resume --out DIRECTORY", "--out FOREIGN", "--out STRANGE", "--out HOLDS"]


@pytest.mark.parametrize("flags", ODD)
def test_an_odd_command_line_is_one_line_before_anything_is_written(flags, tmp_path):
    (tmp_path / "FILE").write_text("mine")
    for folder in ("EMPTY", "DIRECTORY/model.pt", "FOREIGN", "STRANGE/config.json", "HOLDS/metrics.jsonl"):       # folders where files belong, and files of others
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "FOREIGN/claims.json").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    flags = [str(tmp_path / f) if f.split("/")[0].isupper() and f.split("/")[0] in ("FILE", "EMPTY", "DIRECTORY", "FOREIGN", "STRANGE", "HOLDS") else
             str(tmp_path / ("x" * 300)) if f == "LONG" else f for f in flags.split()]
    complain("grpo.py", "--quick", *(() if "--out" in flags else ("--out", tmp_path / "run")), *flags)
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "FILE").read_text() == (tmp_path / "FOREIGN/claims.json").read_text() == "mine"


def test_a_pipe_that_is_closed_ends_the_run_without_a_traceback(tmp_path):
    process = subprocess.Popen([sys.executable, ROOT / "grpo.py", "--quick", "--out", tmp_path], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert "Traceback" not in process.stderr.read() and process.wait(60) == 141


@pytest.mark.parametrize("flags, where", [(["--lr", "1e20", "--entropy-bonus", "0.01", "--steps", "4"], "step 2 of dr_grpo 0"), (["--sft-lr", "1e20"], "of base 0"),
                                          (["--figure", "length", "--lr", "1e20", "--steps", "4"], "of grpo 0")])
def test_a_number_that_is_none_ends_the_run_in_one_line_and_the_last_finite_weights_stay(flags, where, tmp_path):
    for again in ((), ("--resume",)):
        code, _, err = launch("grpo.py", *(again or ("--quick", *flags)), "--out", tmp_path)
        error = [line for line in err.splitlines() if "error:" in line]
        assert code == 2 and len(error) == 1 and where in error[0] and re.search(r"the (loss|gradient norm) is (nan|inf)", error[0]) and "Traceback" not in err
        state = torch.load(tmp_path / "model.pt", weights_only=True)["state"]
        assert state and all(torch.isfinite(t).all() for phase in state.values() for t in phase["model"].values())
        for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
            json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
        assert not (tmp_path / "claims.json").exists()


def test_resuming_with_a_contradicting_flag_or_a_damaged_checkpoint_is_refused_and_harms_nothing(quick, tmp_path):
    folder = shutil.copytree(quick, tmp_path / "run")
    before = (folder / "metrics.jsonl").read_bytes()
    assert "seed" in complain("grpo.py", "--resume", "--out", folder, "--seed", 5)
    whole = (folder / "model.pt").read_bytes()
    for damaged in (b"", b"no checkpoint", whole[:len(whole) // 2]):
        (folder / "model.pt").write_bytes(damaged)
        assert "model.pt" in complain("grpo.py", "--resume", "--out", folder)
    (folder / "model.pt").unlink()
    assert "model.pt" in complain("grpo.py", "--resume", "--out", folder)
    assert (folder / "metrics.jsonl").read_bytes() == before


# a bonus on the entropy: without it no answer of a model this raw is right, and nothing would move
LONGER = ("--quick", "--sft-steps", 150, "--sft-batch", 4, "--steps", 8, "--eval-every", 4, "--max-new-tokens", 24, "--entropy-bonus", 0.1,
          "--minibatches", 2, "--sampler", "stratified")


def test_interrupt_and_resume_give_the_metrics_of_an_uninterrupted_run_to_the_bit(tmp_path):
    check_resume("grpo.py", tmp_path, (dict(phase="sft"), dict(phase="rl", step=3)), *LONGER)
    assert all(row["grad_norm"] > 0 for row in metrics(tmp_path / "whole") if row["phase"] == "rl" and row["step"])


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "longer"
    finish("grpo.py", *LONGER, "--out", folder)
    return folder


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_a_held_out_evaluation_is_heeded_within_two_seconds_and_nothing_is_lost(number, uninterrupted, tmp_path, monkeypatch):
    evaluate, calls, sent = grpo.evaluate, [], []

    def long(*args):        # from the second evaluation on, after step 4, one takes half a minute, and the signal comes in its midst
        calls.append(1)
        if len(calls) == 2:
            threading.Timer(0.3, lambda: (sent.append(time.time()), os.kill(os.getpid(), number))).start()
        started = time.time()
        while len(calls) >= 2 and time.time() - started < 30:
            evaluate(*args)
        return evaluate(*args)

    with monkeypatch.context() as patch:
        patch.setattr(grpo, "evaluate", long)
        code, output, _ = launch("grpo.py", *LONGER, "--out", tmp_path / "run")
    assert code == 128 + number and time.time() - sent[0] < 2 and "--resume goes on from here" in output
    assert [r["step"] for r in metrics(tmp_path / "run") if r["phase"] == "rl"] == [0, 1, 2, 3]
    finish("grpo.py", "--resume", "--out", tmp_path / "run")
    assert metrics(tmp_path / "run") == metrics(uninterrupted)
    assert (tmp_path / "run/claims.json").read_text() == (uninterrupted / "claims.json").read_text()


def test_a_terminated_process_saves_and_ends_with_its_code(tmp_path):
    process = subprocess.Popen([sys.executable, ROOT / "grpo.py", *map(str, LONGER), "--out", tmp_path], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    log = tmp_path / "metrics.jsonl"
    while not (log.exists() and log.read_text()):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)
    process.terminate()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143 and "--resume goes on from here" in output and (tmp_path / "model.pt").exists()


def test_a_quick_run_in_bf16_corrects_for_its_sampler(tmp_path):
    finish("grpo.py", "--quick", "--dtype", "bfloat16", "--correction", "tis", "--sft-steps", 40, "--entropy-bonus", 0.1, "--out", tmp_path / "run")
    assert all(row["grad_norm"] > 0 for row in metrics(tmp_path / "run") if row["phase"] == "rl" and row["step"])


# ---------------------------------------------------------------------------------------------------------------------------
# Several processes (gloo)

UPDATES = [dict(loss=loss, minibatches=m, micro_batch=3) for loss in LOSSES for m in (1, 2)] + [
    dict(loss="grpo", beta=0.1), dict(loss="dr_grpo", beta=0.1, kl="k1", kl_in="reward", entropy_bonus=0.1), dict(loss="cispo", positive_only=True)]


def gradients(folder):
    """The gradient and the metrics of an update of each kind; of several processes each holds its own rows, in any order, or none at all."""
    rank, processes = grpo.world()
    dealt = ([[3, 1, 0], [2]], [[0, 1, 2, 3], []])
    results = []
    for choices, deal in itertools.product(UPDATES, dealt):
        config = small(**choices)
        rollout = answers(policy(config), config)
        rows = torch.arange(16).view(4, 4)[deal[rank] if processes == 2 else [0, 1, 2, 3]].flatten()
        part = rollout[rows]
        part.rows = rows
        gradient, _, metrics = one_update(config, part)
        results.append((gradient, metrics))
    torch.save(results, Path(folder) / f"{(rank, processes)}.pt")


def test_two_processes_have_the_gradient_and_the_metrics_of_one_whatever_the_loss_and_however_the_rows_are_dealt(tmp_path):
    code = tmp_path / "worker.py"
    code.write_text(f"import test_grpo as t\nt.grpo.join('cpu')\nt.gradients({str(tmp_path)!r})\n")
    rc, output = torchrun(code)
    assert rc == 0, output
    gradients(tmp_path)
    alone, first, second = (torch.load(tmp_path / f"{w}.pt") for w in ((0, 1), (0, 2), (1, 2)))
    for (g, m), (g0, m0), (g1, m1) in zip(alone, first, second, strict=True):
        assert torch.equal(g0, g1) and m0 == m1 and g.abs().max() > 0
        assert close(g0, g, 1e-6) and m0 == pytest.approx(m, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("flags", [[], ["--loss", "dapo", "--minibatches", 2, "--digits", 1, "--sft-steps", 100, "--sft-batch", 8, "--steps", 1, "--prompts", 5, "--eval-prompts", 7]])
def test_two_processes_write_the_metrics_of_one(flags, quick, tmp_path):
    alone = quick if not flags else tmp_path / "alone"
    if flags:
        finish("grpo.py", "--quick", *flags, "--out", alone)
    rc, output = torchrun(ROOT / "grpo.py", "--quick", *flags, "--out", tmp_path / "two")
    assert rc == 0 and output.count("held-out pass@1: base") == 1, output
    assert check_whole(tmp_path / "two") == "train"
    for ours, theirs in zip(metrics(alone), metrics(tmp_path / "two"), strict=True):
        for k in ours | theirs:
            assert ours[k] == theirs[k] or theirs[k] == pytest.approx(ours[k], rel=1e-3, abs=1e-5), k


def test_a_shared_stream_gives_each_process_its_own_numbers():
    config, problems = small(prompts=4), [draw_problem(random.Random(i), 2) for i in range(4)]
    generator = lambda: torch.Generator().manual_seed(1)
    draws = [generator() for _ in range(3)]
    whole = grpo.sample(policy(config), problems, 4, config, draws[0])[0].tokens()
    parts = [grpo.sample(policy(config), problems, 4, config, g, "iid", mine)[0].tokens() for g, mine in zip(draws[1:], (slice(0, 1), slice(1, 4)))]
    assert parts[0] + parts[1] == whole and len({tuple(g.get_state().tolist()) for g in draws}) == 1


def test_only_rank_0_writes(quick, tmp_path, monkeypatch):
    monkeypatch.setattr("experiment.world", lambda: (1, 2))
    monkeypatch.setenv("WORLD_SIZE", "2")
    handlers = [(s, signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM)]
    try:
        folder = shutil.copytree(quick, tmp_path / "resumed")
        before = {p.name: p.read_bytes() for p in folder.iterdir()}
        for out, resume in ((folder, True), (tmp_path / "new", False)):
            run = Run(small(out=str(out), resume=resume))
            run.log(step=1)
            run.save("phase", step=1)
            run.finish(None, [])
            assert run.rows[-1] == dict(step=1) and not run.due
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == before and not (tmp_path / "new").exists()
    finally:
        for s, handler in handlers:
            signal.signal(s, handler)


def test_a_process_that_dies_ends_the_run_with_a_message(tmp_path):
    code = tmp_path / "worker.py"
    code.write_text("""import os, grpo
update, calls = grpo.update, []
def dying(*args):
    calls.append(1)
    if len(calls) == 2 and grpo.world()[0] == 0:
        os._exit(7)
    return update(*args)
grpo.update = dying
grpo.command(grpo.main)
""")
    rc, output = torchrun(code, "--quick", "--steps", 3, "--out", tmp_path / "run")
    assert rc != 0 and "exitcode  : 7" in output and "error: rank 1 lost another process" in output
    assert (tmp_path / "run/model.pt").exists()


@pytest.mark.parametrize("flags", [["--figure", "length"], ["--prompts", "1"]])
def test_what_several_processes_cannot_do_is_refused_before_anything_is_written(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(grpo, "world", lambda: (0, 2))
    assert "2 processes" in complain("grpo.py", "--quick", *flags, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags, words", [("--beta 0.1 --kl k1", "gradient has mean zero"), ("--out FOREIGN", "which no run wrote"),
                                          ("--lr 1e20 --entropy-bonus 1 --steps 4", "of dr_grpo 0")])
def test_a_mistake_under_torchrun_is_one_line_by_rank_0(flags, words, tmp_path):
    (tmp_path / "claims.json").write_text("mine")
    out = () if "--out" in flags else ("--out", tmp_path / "run")
    rc, output = torchrun(ROOT / "grpo.py", "--quick", *out, *(str(tmp_path) if f == "FOREIGN" else f for f in flags.split()))
    errors = [line for line in output.splitlines() if "error: " in line and line.startswith("grpo.py")]
    assert rc != 0 and len(errors) == 1 and words in errors[0], output


def test_a_script_that_knows_of_one_process_only_refuses_several(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "opd.py", "--quick", "--out", tmp_path / "run"], env={**os.environ, "WORLD_SIZE": "2"}, capture_output=True, text=True)
    assert done.returncode == 2 and "one process" in done.stderr and not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------------------------------------
# Real checkpoints, real data

@pytest.mark.parametrize("text, answer", [
    ("She has 48/2 = <<48/2=24>>24.\n#### 72", "72"), ("#### 1,234", "1234"), ("#### -5", "-5"), ("#### 3.50", "3.50"), ("#### 5.", "5"), ("#### 12 apples", "12"),
    ("#### 1\n#### 2", "1"), ("#### $5", None), ("####7", None), ("72", None), ("", None), ("#### 1,000,000.", "1000000"), ("x #### 9", "9"),
    ("#### , that is 5", None), ("#### ... 5", None), ("#### -.", None), ("#### .5", ".5"), ("#### , #### 5", None)])
def test_an_answer_is_read_as_gsm8ks_authors_read_it_but_for_a_final_dot(text, answer):
    assert extract_answer(text) == answer


ROWS = [dict(question=f"What is {a} + {b}?\u2028", answer=f"{a} and {b} make\n#### {a + b + 1000:,}") for a in range(8) for b in range(8)]
CHAT = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A tiny checkpoint with a tokenizer and a chat template, and word problems as JSONL and as Parquet."""
    import pyarrow
    import pyarrow.parquet
    folder = tmp_path_factory.mktemp("real")
    content = make_json(merges_of("What is 1 + 2? Think step by step. End with the answer as: #### number", 20))
    save_json(folder / "like", content, eos_token="<|im_end|>", chat_template=CHAT)
    torch.manual_seed(0)
    GPT(GPTConfig(300, 256, 1, 2, 32, n_kv_head=1, qkv_bias=True)).save_pretrained(folder / "checkpoint", like=folder / "like")
    (folder / "sums.jsonl").write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in ROWS))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "sums.parquet")
    return folder


def real_config(real, **choices):
    return small(**{**dict(init=str(real / "checkpoint"), data=str(real / "sums.jsonl")), **choices})


def test_word_problems_come_from_jsonl_or_parquet_and_a_tenth_is_held_out(real):
    train, held_out = load_problems(str(real / "sums.jsonl"))
    assert load_problems(str(real / "sums.parquet")) == [train, held_out]
    assert sorted(train + held_out) == sorted((r["question"], str(i // 8 + i % 8 + 1000)) for i, r in enumerate(ROWS)) and not set(train) & set(held_out)
    assert 0 < len(held_out) < 20


def test_gsm8k_comes_through_datasets_with_its_own_splits(monkeypatch):
    import datasets
    rows = dict(train=ROWS[:9], test=ROWS[9:12])
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config, split: rows[split] if (name, config) == ("openai/gsm8k", "main") else None)
    train, held_out = load_problems("gsm8k")
    assert [q for q, _ in train] == [r["question"] for r in ROWS[:9]] and [q for q, _ in held_out] == [r["question"] for r in ROWS[9:12]]


def test_the_prompt_is_the_template_or_the_chat_with_the_question_in_it(real):
    tokenizer, problem = load_tokenizer(real / "checkpoint"), ("2 {x} + 2?", "4")
    ask = lambda **choices: grpo.task_of(real_config(real, **choices)).prompt(problem)
    assert tokenizer.decode(ask(template="Q: {question}\\nA:")) == "Q: 2 {x} + 2?\nA:"
    ids = ask(template="{question} #", chat=True)
    assert tokenizer.decode(ids) == "<|im_start|>user\n2 {x} + 2? #<|im_end|>\n<|im_start|>assistant\n"
    assert ids[0] == 1 and ids.count(1) == 2 and ids.count(2) == 1      # special tokens, not their letters


def test_a_word_problem_is_judged_by_its_own_number_whether_finished_or_not(real, monkeypatch):
    config, problems = real_config(real), [("one", "1001"), ("two", "1002")]
    tokenizer = load_tokenizer(real / "checkpoint")
    texts = ["#### 1,001", "so #### 1002", "no", "#### 1002", "#### 1002.", "#### 1002 #### 3"]
    rows = [tokenizer.encode(t) + [tokenizer.eos] * (i % 2) for i, t in enumerate(texts)]
    T = max(map(len, rows)) + 1
    ids, mask = torch.zeros(6, T, dtype=torch.long), torch.zeros(6, T)
    for i, row in enumerate(rows):
        ids[i, 1:len(row) + 1], mask[i, 1:len(row) + 1] = torch.tensor(row), 1
    monkeypatch.setattr(grpo, "generate", lambda *_, **__: Rollout(ids, mask, mask, torch.ones(6, dtype=torch.long)))
    _, seen, rewards = grpo.sample(None, problems, 3, config, None)
    assert seen == texts and rewards.tolist() == [[1, 0, 0], [1, 1, 1]]


def test_held_out_word_problems_are_never_trained_on_and_none_twice(real, monkeypatch):
    config, sampled = real_config(real, prompts=200, eval_prompts=1000), []
    monkeypatch.setattr(grpo, "sample", fake_sample(sampled, lambda _, P, n: torch.zeros(P, n)))
    grpo.collect(None, config, random.Random(0), None)
    grpo.evaluate(None, config, 1)
    train, held_out = load_problems(config.data)
    assert set(sampled[0]) <= set(train) and len(set(sampled[0])) > 40 and sorted(sampled[1]) == sorted(held_out)


def test_a_real_run_samples_what_it_scores_and_checkpointing_changes_no_gradient(real):
    gradients, calls = [], []
    for checkpointing in (False, True):
        config = real_config(real, checkpointing=checkpointing, max_new_tokens=12)
        model = grpo.build(config, "cpu")
        assert model.checkpointing == checkpointing and model.lm_head.weight.dtype == torch.float32
        rollout, rewards, _ = grpo.collect(model, config, random.Random(0), torch.Generator().manual_seed(0))
        logp = grpo.score_all(model, rollout, config)
        assert ((logp - rollout.logp) * rollout.mask).abs().max() < 1e-4
        model.blocks[0].norm1.register_forward_hook(lambda *_: calls.append(checkpointing))
        grpo.update(model, None, torch.optim.SGD(model.parameters(), 0.0), rollout, REWARDS, config, None)
        gradients.append(flat(model, gradient=True))
    assert calls == [False, True, True]         # computed again in the backward pass
    assert torch.equal(*gradients) and gradients[0].abs().max() > 0


REAL = "--quick", "--max-new-tokens", 8, "--steps", 2


@pytest.mark.parametrize("flags", [("--chat", "--dtype", "bfloat16", "--checkpointing"), ("--loss", "grpo", "--beta", 0.01)])
def test_a_real_run_ends_with_a_checkpoint_that_can_be_opened_and_resumes_to_itself(flags, real, tmp_path):
    out, trained = tmp_path / "run", f"{'grpo' if 'grpo' in flags else 'dr_grpo'} 0"
    finish("grpo.py", *REAL, *flags, "--init", real / "checkpoint", "--data", real / "sums.parquet", "--out", out)
    assert {p.name for p in out.iterdir()} == {"train.png", "metrics.jsonl", "claims.json", "config.json", "model.pt", trained}
    before = metrics(out)
    assert [r["phase"] for r in before] == ["rl"] * 3 + ["pass@k"] * 2 and not any("guessed_carries" in r for r in before)
    assert GPT.from_pretrained(out / trained).config == GPT.from_pretrained(real / "checkpoint").config
    assert load_tokenizer(out / trained).stop == load_tokenizer(real / "checkpoint").stop == [2]
    finish("grpo.py", "--resume", "--out", out)
    assert metrics(out) == before


def test_a_real_run_stops_at_each_end_that_its_checkpoint_names_and_saves_them(real, tmp_path):
    init = shutil.copytree(real / "checkpoint", tmp_path / "checkpoint")
    (init / "generation_config.json").write_text(json.dumps(dict(eos_token_id=[2, 5])))
    finish("grpo.py", *REAL, "--init", init, "--data", real / "sums.jsonl", "--out", tmp_path / "run")
    assert load_tokenizer(tmp_path / "run/dr_grpo 0").stop == [2, 5] and json.loads((tmp_path / "run/dr_grpo 0/config.json").read_text())["eos_token_id"] == [2, 5]
    config = small(init=str(init), data=str(real / "sums.jsonl"), group=64)
    rollout, *_ = grpo.collect(grpo.build(config, "cpu"), config, random.Random(0), torch.Generator().manual_seed(0))
    ends = [(row[n - 1].item(), (row[:n - 1] == 5).any().item()) for row, n in zip([r[p:] for r, p in zip(rollout.ids, rollout.prompt_lens)], rollout.lengths)]
    assert any(last == 5 for last, _ in ends) and not any(passed for _, passed in ends)


@pytest.mark.parametrize("what", ["data", "init"])
def test_a_real_run_whose_data_or_checkpoint_has_changed_does_not_resume(what, real, tmp_path):
    data, init = tmp_path / "sums.jsonl", shutil.copytree(real / "checkpoint", tmp_path / "checkpoint")
    data.write_text((real / "sums.jsonl").read_text())
    finish("grpo.py", *REAL, "--init", init, "--data", data, "--out", tmp_path / "run")
    before = (tmp_path / "run/model.pt").read_bytes(), metrics(tmp_path / "run")
    if what == "data":
        data.write_text(data.read_text() + json.dumps(ROWS[0]) + "\n")
    else:
        shutil.copytree(real / "checkpoint", init, dirs_exist_ok=True)
        torch.manual_seed(1)
        GPT(GPTConfig(300, 256, 1, 2, 32, n_kv_head=1, qkv_bias=True)).save_pretrained(init, like=real / "like")
    assert f"--{what} is no longer" in complain("grpo.py", "--resume", "--out", tmp_path / "run")
    assert before == ((tmp_path / "run/model.pt").read_bytes(), metrics(tmp_path / "run"))


def test_a_model_in_out_that_no_run_wrote_is_not_overwritten(real, tmp_path):
    mine = tmp_path / "dr_grpo 0" / "model.safetensors"
    mine.parent.mkdir()
    mine.write_text("mine")
    assert "dr_grpo 0" in complain("grpo.py", *REAL, "--init", real / "checkpoint", "--data", real / "sums.jsonl", "--out", tmp_path)
    assert mine.read_text() == "mine" and list(tmp_path.iterdir()) == [mine.parent]


ODD_REAL = ["--init FILE", "--init FOLDER", "--init LONG", "--data FOLDER", "--data LONG", "--data /dev/null", "--data FILE", "--template x", "--max-new-tokens 4294967295",
            "--data gsm9k", "--prompts 4294967295", "--eval-prompts 4294967295", "--micro-batch 4294967295 --prompts 500000000"]


@pytest.mark.parametrize("flags", ODD_REAL)
def test_an_odd_command_line_of_a_real_run_is_one_line_before_anything_is_written(flags, real, tmp_path):
    (tmp_path / "FILE").write_text("mine")
    (tmp_path / "FOLDER").mkdir()
    flags = [str(tmp_path / f) if f in ("FILE", "FOLDER") else "x" * 300 if f == "LONG" else f for f in flags.split()]
    complain("grpo.py", *REAL, "--init", real / "checkpoint", "--data", real / "sums.jsonl", "--out", tmp_path / "run", *flags)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["FILE", "FOLDER"] and (tmp_path / "FILE").read_text() == "mine"


@pytest.mark.parametrize("data, words", [
    ("none.jsonl", ["no such file"]), ("gsm9k", ["no such file"]), ("[1]\n", ["row 1", "no JSON object"]), ("{", ["row 1", "JSON"]), ('{"question": "a", "solution": "#### 1"}', ["row 1", "answer is missing"]),
    ('{"answer": "#### 1"}', ["row 1", "question is missing"]), ('{"question": "a", "answer": "1"}', ["row 1", "####"]), ('{"question": "a", "answer": 1}', ["row 1", "answer is 1"]),
    ('{"question": "a", "answer": "#### 1"}', ["too few"]), ('{"question": 1, "answer": "#### 1"}', ["question is 1"]), ("", ["too few"]), (b"PAR1 no parquet", ["ArrowInvalid"]), (b"\xff", ["UTF-8"])])
def test_data_that_cannot_be_used_is_one_line_that_says_why(data, words, real, tmp_path):
    file = tmp_path / ("x.parquet" if data == b"PAR1 no parquet" else "x.jsonl")
    if "no such file" in words:
        file = tmp_path / data if data.endswith("jsonl") else data
    else:
        file.write_bytes(data if isinstance(data, bytes) else data.encode())
    err = complain("grpo.py", *REAL, "--init", real / "checkpoint", "--data", file, "--out", tmp_path / "run")
    assert all(w in err for w in words) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags, words", [
    (["--init", "CHECKPOINT"], ["--init and --data"]), (["--data", "DATA"], ["--init and --data"]), (["--init", "CHECKPOINT", "--data", "DATA", "--figure", "variants"], ["--figure"]),
    (["--init", "CHECKPOINT", "--data", "DATA", "--template", "no"], ["{question}"]), (["--init", "/no/such", "--data", "DATA"], ["/no/such"]),
    (["--init", "CHECKPOINT", "--data", "DATA", "--max-new-tokens", "250"], ["256 positions", "--max-new-tokens"]), (["--max-new-tokens", "225"], ["224"]),
    (["--init", "INSIDE", "--data", "DATA"], ["a run writes its model there"]), (["--figure", "length", "--max-new-tokens", "225"], ["224"])])
def test_a_mistake_in_the_flags_of_a_real_run_is_one_line(flags, words, real, tmp_path):
    flags = [dict(CHECKPOINT=real / "checkpoint", DATA=real / "sums.jsonl", INSIDE=tmp_path / "run" / "base").get(f, f) for f in flags]
    err = complain("grpo.py", *REAL[:1], *flags, "--out", tmp_path / "run")
    assert all(w in err for w in words) and not (tmp_path / "run").exists()


def test_a_checkpoint_without_a_chat_template_or_with_a_damaged_one_is_one_line(real, tmp_path):
    for template, word in ((None, "chat template"), ("{% for", "fails"), ("{{ raise_exception('no') }}", "fails"), ("{{ ''.__class__.__mro__ }}{{ 1 / 0 }}", "fails")):
        folder = shutil.copytree(real / "checkpoint", tmp_path / word / str(template).strip("{ }%/")[:3])
        (folder / "tokenizer_config.json").write_text(json.dumps(dict(eos_token="<|im_end|>", chat_template=template)))
        assert word in complain("grpo.py", *REAL, "--chat", "--init", folder, "--data", real / "sums.jsonl", "--out", tmp_path / "run")


def test_the_chat_is_that_of_transformers(real):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(real / "checkpoint/tokenizer.json"), chat_template=CHAT, eos_token="<|im_end|>")
    expected = tokenizer.apply_chat_template([dict(role="user", content="a {b}\n c")], add_generation_prompt=True, tokenize=False)
    assert load_chat_template(real / "checkpoint")("a {b}\n c") == expected
