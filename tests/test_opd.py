"""opd.py: each of the three choices against closed forms, the trainer, and the command."""

import importlib
import json
import math
import os
import signal
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from common import Memory, check_help, check_quick, check_resume, complain, finish, launch, metrics

import opd
import tasks.walkers as walkers
from engine import generate, inverse_cdf
from experiment import NotFinite, Run, descend, load_checkpoint, parse_args
from model import GPT
from opd import (
    METHODS,
    Config,
    advantages,
    collect,
    divergence,
    draft,
    loss_of,
    trust_region,
    write_together,
)
from tasks.walkers import answer_logprobs, from_scratch, shape
from tasks.walks import ANSWER, EOS, PLACES, PROMPT, VOCAB, far_task, prompt

KINDS = ["forward", "reverse", "jsd", "sampled", "top_raw", "top_renormalised", "top_stopgrad"]


def logprobs(*shape, seed=0, scale=2.0):
    return (
        scale
        * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ).log_softmax(-1)


def small(**choices):
    return Config(
        **{
            **dict(
                n_embd=16, expert_embd=16, batch=8, group=4, steps=2, eval_prompts=8, eval_every=1
            ),
            **choices,
        }
    )


def policy(seed=0, sharp=3.0):
    """A raw model with large weights."""
    torch.manual_seed(seed)
    model = GPT(shape(16))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(sharp)
    return model


def test_divergences_are_what_their_names_say_on_two_tokens():
    p, q = torch.tensor([0.75, 0.25]).double(), torch.tensor([0.5, 0.5]).double()

    def kl(a, b):
        return sum(x * math.log(x / y) for x, y in zip(a.tolist(), b.tolist(), strict=True))

    m = (p + q) / 2

    def value(kind):
        return divergence(
            p.log()[None, None], q.log()[None, None], torch.tensor([[0]]), kind, top=1
        ).item()

    assert value("forward") == pytest.approx(kl(q, p))
    assert value("reverse") == pytest.approx(kl(p, q))
    assert value("jsd") == pytest.approx((kl(q, m) + kl(p, m)) / 2)
    assert value("token") == pytest.approx(-math.log(0.75))
    assert value("top_raw") == pytest.approx(0.75 * math.log(0.75 / 0.5))
    assert value("top_renormalised") == pytest.approx(0)


@pytest.mark.parametrize("kind", KINDS)
def test_where_both_agree_divergence_and_gradient_are_zero_but_for_the_raw_top_k(kind):
    z = logprobs(2, 3, 10).requires_grad_()
    lp = z.log_softmax(-1)
    d = divergence(lp, lp.detach(), torch.zeros(2, 3, dtype=torch.long), kind)
    d.sum().backward()
    assert d.abs().max() < 1e-12
    gradient, z.grad = z.grad, None
    if kind == "top_raw":  # the bias: it pushes mass out of the top tokens
        z.log_softmax(-1).exp().topk(4).values.sum().backward()
        assert z.grad.abs().max() > 0.01 and torch.allclose(gradient, z.grad)
    else:
        assert gradient.abs().max() < 1e-12


@pytest.mark.parametrize("kind", ["sampled", "token"])
def test_the_expected_gradient_of_an_estimator_by_enumeration_of_the_tokens(kind):
    z, lq = logprobs(1, 1, 10).requires_grad_(), logprobs(1, 1, 10, seed=1)

    def gradient(loss):
        return torch.autograd.grad(loss, z)[0]

    lp = z.log_softmax(-1)
    writer = (
        lp if kind == "sampled" else lq
    )  # the student writes: reverse KL; the teacher writes: forward KL
    expected = sum(
        writer.detach().exp()[0, 0, v]
        * gradient(divergence(z.log_softmax(-1), lq, torch.tensor([[v]]), kind).sum())
        for v in range(10)
    )
    exact = gradient(
        divergence(z.log_softmax(-1), lq, None, "reverse" if kind == "sampled" else "forward").sum()
    )
    assert torch.allclose(expected, exact, atol=1e-12) and exact.abs().max() > 0.01


@pytest.mark.parametrize("tail, lr, good", [(32, 0.2, math.exp(-1)), (1, 0.02, 0.8)])
def test_the_raw_top_4_leaves_one_over_e_if_the_tail_is_even_and_four_fifths_if_it_is_one_word(
    tail, lr, good
):
    lq = torch.tensor([0.25] * 4 + [1e-9] * tail).double().log().log_softmax(-1)
    z = torch.tensor([0.24] * 4 + [0.04 / tail] * tail).double().log().requires_grad_()
    for _ in range(5000):
        (gradient,) = torch.autograd.grad(
            divergence(z.log_softmax(-1)[None, None], lq[None, None], None, "top_raw").sum(), z
        )
        z = (z - lr * gradient).detach().requires_grad_()
    p = z.softmax(-1)
    assert (
        p[:4].sum().item() == pytest.approx(good, abs=0.02) and p.argmax() < 4
    )  # greedy decoding sees nothing
    assert p[4:].tolist() == pytest.approx([(1 - good) / tail] * tail, abs=0.02)


def test_the_top_are_the_students_and_weighed_as_the_names_say():
    lp, lq = (
        torch.tensor([[[0.5, 0.3, 0.2]]]).double().log().requires_grad_(),
        torch.tensor([[[0.2, 0.2, 0.6]]]).double().log(),
    )
    advantage = [0.625 * math.log(0.5 / 0.2), 0.375 * math.log(0.3 / 0.2)]  # of the tokens 0 and 1
    value = {
        kind: divergence(lp, lq, None, kind, top=2)
        for kind in ("top_raw", "top_renormalised", "top_stopgrad")
    }
    assert value["top_raw"].item() == pytest.approx(
        0.5 * math.log(0.5 / 0.2) + 0.3 * math.log(0.3 / 0.2)
    )
    assert value["top_renormalised"].item() == pytest.approx(
        0.625 * math.log(0.625 / 0.5) + 0.375 * math.log(0.375 / 0.5)
    )
    assert value["top_stopgrad"].item() == pytest.approx(
        advantage[0] * math.log(0.5) + advantage[1] * math.log(0.3)
    )
    assert torch.autograd.grad(value["top_stopgrad"].sum(), lp)[
        0
    ].flatten().tolist() == pytest.approx([*advantage, 0])


@pytest.mark.parametrize("kind", ["top_raw", "top_renormalised", "top_stopgrad"])
def test_the_top_of_all_tokens_is_the_reverse_kl(kind):
    z, lq = logprobs(2, 3, 10).requires_grad_(), logprobs(2, 3, 10, seed=1)
    gradients = [
        torch.autograd.grad(divergence(z.log_softmax(-1), lq, None, k, top=10).sum(), z)[0]
        for k in (kind, "reverse")
    ]
    assert torch.allclose(*gradients, atol=1e-12)


def test_the_jensen_shannon_divergence_is_bounded_where_the_teacher_says_never():
    lp, lq = torch.tensor([[[0.5, 0.5]]]).log(), torch.tensor([[[1 - 1e-30, 1e-30]]]).double().log()
    assert (
        divergence(lp.double(), lq, None, "jsd").item()
        <= math.log(2)
        < 5
        < divergence(lp.double(), lq, None, "reverse").item()
    )


@pytest.mark.parametrize("kind", ["token", *KINDS])
def test_a_divergence_leaves_its_inputs_alone(kind):
    lp, lq, y = logprobs(2, 3, 10), logprobs(2, 3, 10, seed=1), torch.ones(2, 3, dtype=torch.long)
    before = lp.clone(), lq.clone(), y.clone()
    divergence(lp, lq, y, kind)
    assert all(torch.equal(a, b) for a, b in zip(before, (lp, lq, y), strict=True))


def test_equal_rewards_give_advantages_of_exactly_zero_and_others_are_standardised():
    for group in range(2, 20):  # the mean of equal numbers is not always that number
        assert all((advantages(torch.full((1, group), r)) == 0).all() for r in (0.1, 0.3, 0.7))
    a = advantages(torch.tensor([[0.1] * 4, [1.0, 0, 0, 0]]))
    assert (a[0] == 0).all() and a[1].tolist() == pytest.approx([1.5, -0.5, -0.5, -0.5], abs=1e-3)


# ------------------------------------------------------------------------------------------------
# The loss


def batch(seed=0, B=8, T=6):
    g = torch.Generator().manual_seed(seed)
    mask = (torch.arange(T) < torch.randint(2, T + 1, (B, 1), generator=g)).double()
    return (
        logprobs(B, T, VOCAB, seed=seed),
        logprobs(B, T, VOCAB, seed=seed + 1),
        torch.randint(VOCAB, (B, T), generator=g),
        mask,
        torch.tensor([1.0, 0, 0, 1] * (B // 4)).double(),
    )


@pytest.mark.parametrize("method", METHODS)
def test_padding_changes_neither_loss_nor_gradient(method):
    lp, lq, y, mask, rewards = batch()
    results = []

    def wide(x, other, noise):
        """With noise: `other` under the mask, and in three more positions."""
        real = mask.bool().view(*mask.shape, *[1] * (x.dim() - 2))
        return torch.cat((torch.where(real, x, other), other[:, :3]), 1) if noise else x.clone()

    for noise in (0, 1):
        z = wide(lp, logprobs(*lp.shape, seed=7), noise).requires_grad_()
        other = torch.randint(VOCAB, y.shape, generator=torch.Generator().manual_seed(8))
        args = (
            wide(lq, logprobs(*lq.shape, seed=9), noise),
            wide(y, other, noise),
            torch.cat((mask, torch.zeros(len(mask), 3 * noise).double()), 1),
        )
        loss = loss_of(method, z.log_softmax(-1), *args, rewards, small())
        loss.backward()
        results.append((loss.item(), z.grad[:, : mask.shape[1]] * mask[..., None]))
        assert (z.grad[args[2] == 0] == 0).all()
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-12)
    assert torch.allclose(results[0][1], results[1][1], atol=1e-12)


@pytest.mark.parametrize("method", ["opd", "kd", "opd_jsd"])
def test_a_student_that_is_its_teacher_has_loss_and_gradient_zero(method):
    lp, _, y, mask, rewards = batch()
    z = lp.clone().requires_grad_()
    loss = loss_of(method, z.log_softmax(-1), lp, y, mask, rewards, small())
    loss.backward()
    assert abs(loss.item()) < 1e-12 and z.grad.abs().max() < 1e-12


def test_the_loss_is_the_mean_over_the_answers_tokens_in_grpo_times_the_advantage():
    lp, lq, y, mask, rewards = batch()
    reverse = (lp.exp() * (lp - lq)).sum(-1)
    assert loss_of("opd", lp, lq, y, mask, rewards, small()).item() == pytest.approx(
        (reverse * mask).sum().item() / mask.sum().item()
    )
    logp = lp.gather(2, y[..., None]).squeeze(2)
    adv = advantages(rewards.view(2, 4)).view(-1, 1)
    assert loss_of("grpo", lp, None, y, mask, rewards, small()).item() == pytest.approx(
        -(adv * logp * mask).sum().item() / mask.sum().item()
    )


# ------------------------------------------------------------------------------------------------
# Rollouts


@pytest.mark.parametrize("eps", [1e-3, 0.02, 0.1, 1.0])
def test_the_trust_regions_mixture_is_on_its_bound_or_is_the_teacher(eps):
    lp, lq = logprobs(50, VOCAB), logprobs(50, VOCAB, seed=1)
    lq[:10] = (0.02 * lq[:10] + 0.98 * lp[:10]).log_softmax(
        -1
    )  # teachers within a large enough budget
    mixed, b = trust_region(lp.float(), lq.float(), eps)
    mixed, b = mixed.double(), b.double()
    kl = (mixed.exp() * (mixed - lp)).sum(-1)
    whole = b == 1
    assert ((lq.exp() * (lq - lp)).sum(-1)[whole] <= eps + 1e-6).all()
    assert torch.allclose(mixed[whole], lq[whole], atol=1e-5)
    assert (kl[~whole] - eps).abs().max() < 1e-4
    assert torch.allclose(
        mixed, ((1 - b)[:, None] * lp + b[:, None] * lq).log_softmax(-1), atol=1e-5
    )


def test_the_trust_region_ends_at_student_and_teacher_and_is_the_nearest_to_the_teacher():
    lp, lq = logprobs(20, 5), logprobs(20, 5, seed=1)
    assert torch.allclose(trust_region(lp, lq, 0.0)[0], lp, atol=1e-5)
    assert torch.allclose(trust_region(lp, lq, 100.0)[0], lq, atol=1e-5)
    mixed, _ = trust_region(lp, lq, 0.05)

    def kl(a, b):
        return (a.exp() * (a - b)).sum(-1)

    rivals = (
        mixed + 0.1 * torch.randn(2000, 20, 5, generator=torch.Generator().manual_seed(0)).double()
    ).log_softmax(-1)
    nearer = (kl(rivals, lp) <= 0.05) & (kl(rivals, lq) < kl(mixed, lq) - 1e-4)
    assert ((kl(rivals, lp) <= 0.05).any(0)).all() and not nearer.any()


def test_skd_with_all_tokens_is_the_students_sample_with_one_the_teachers_argmax():
    lp, lq, u = (
        logprobs(200, 12),
        logprobs(200, 12, seed=1),
        torch.rand(200, 2, generator=torch.Generator().manual_seed(2)).double(),
    )
    student = inverse_cdf(lp.exp(), u[:, 0])[0]
    everything, replaced = draft(lp, lq, u, 12)
    assert torch.equal(everything, student) and replaced.sum() == 0
    one, replaced = draft(lp, lq, u, 1)
    assert torch.equal(one, lq.argmax(-1))
    assert torch.equal(replaced.bool(), student != lq.argmax(-1))
    assert 0 < replaced.mean() < 1
    some, replaced = draft(lp, lq, u, 4)
    assert (lq.topk(4).indices == some[:, None]).any(1).all()
    assert torch.equal(some[replaced == 0], student[replaced == 0])


def test_skd_replaces_by_the_teachers_top_tokens_in_their_proportions():
    lp, lq = torch.tensor([[0.25] * 4]).log(), torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log()
    u = torch.rand(20_000, 2, generator=torch.Generator().manual_seed(0)).double()
    tokens, replaced = draft(lp.expand(20_000, 4), lq.expand(20_000, 4), u, 2)
    corrections = tokens[
        replaced > 0
    ]  # of the tokens 0 and 1: the second draw owes nothing to the first
    assert abs(len(corrections) / 20_000 - 1 / 2) < 0.015
    assert np.allclose(
        np.bincount(corrections, minlength=4) / len(corrections), [0, 0, 3 / 7, 4 / 7], atol=0.015
    )


def test_collecting_with_skd_takes_its_own_k():
    student, teacher, prompts = policy(0), policy(1), [prompt(p) for p in far_task().test[:8]]
    changed = {
        k: collect(
            "draft",
            student,
            teacher,
            prompts,
            0.0,
            small(skd_top=k),
            torch.Generator().manual_seed(0),
        )[2]
        for k in (1, VOCAB)
    }
    assert changed[1] > 0.5 and changed[VOCAB] == 0


def test_side_by_side_both_models_see_what_they_would_see_without_a_cache():
    student, teacher, pairs, seen = policy(0), policy(1), far_task().test[:6], []

    def choose(lp, lq, u):
        seen.append((lp, lq))
        return inverse_cdf(lp.exp(), u[:, 0])[0], torch.full((len(lp),), float(len(seen)))

    prompts = [prompt(p) for p in pairs]
    tokens, mask, changed = write_together(
        student, teacher, prompts, choose, torch.Generator().manual_seed(0)
    )
    for i, model in enumerate((student, teacher)):
        expected = answer_logprobs(model, torch.cat((torch.tensor(prompts), tokens), 1))
        assert torch.allclose(torch.stack([s[i] for s in seen], 1), expected, atol=1e-4)
    for row, m in zip(tokens.tolist(), mask.tolist(), strict=True):
        size = row.index(EOS) + 1 if EOS in row else len(row)
        assert m == [1.0] * size + [0.0] * (len(row) - size)
    assert len({sum(m) for m in mask.tolist()}) > 1
    assert changed == pytest.approx(
        np.mean([t + 1 for m in mask.tolist() for t in range(int(sum(m)))])
    )


def test_a_budget_of_zero_is_the_student_and_a_large_one_the_teacher():
    student, teacher, pairs = policy(0), policy(1), far_task().test[:4] * 500
    prompts = [prompt(p) for p in pairs]
    for eps, model in ((1e-9, student), (1e9, teacher)):
        tokens, *_ = write_together(
            student, teacher, prompts, opd.blended(eps), torch.Generator().manual_seed(0), limit=1
        )
        p = answer_logprobs(model, torch.tensor([q + [0] for q in prompts[:4]]))[:, 0].exp().mean(0)
        counts = torch.bincount(tokens[:, 0], minlength=VOCAB).double()
        common = p * 2000 > 5
        chi2 = ((counts - 2000 * p)[common] ** 2 / (2000 * p)[common]).sum().item()
        assert chi2 < common.sum() + 5 * math.sqrt(2 * common.sum())


@pytest.mark.parametrize("kind", ["student", "teacher"])
def test_the_answers_are_the_student_s_or_the_teacher_s_as_the_row_says(kind, monkeypatch):
    seen = []
    monkeypatch.setattr(
        opd,
        "generate",
        lambda model, prompts, *a, **k: (
            seen.append((model, prompts)) or generate(model, prompts, *a, **k)
        ),
    )
    student, teacher, prompts = policy(0), policy(1), [prompt(p) for p in far_task().test[:4]]
    *_, changed = collect(
        kind, student, teacher, prompts, 0.0, small(), torch.Generator().manual_seed(0)
    )
    assert seen == [(teacher if kind == "teacher" else student, prompts)]
    assert changed == (kind == "teacher")


# ------------------------------------------------------------------------------------------------
# The trainer

# Raw models are never right: these tests pay for something else
ODD = replace(far_task(), reward=lambda pair, tokens: float(tokens[0] % 2))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_the_student_and_nobody_else(method):
    base, expert, run = policy(0), policy(1), Memory()
    before = [{k: v.clone() for k, v in m.state_dict().items()} for m in (base, expert)]
    model = opd.train(small(), run, method, 0, base, expert, ODD)
    for m, state in zip((base, expert), before, strict=True):
        assert all(p.grad is None for p in m.parameters())
        assert all(torch.equal(v, state[k]) for k, v in m.state_dict().items())
    assert any(not torch.equal(v, before[0][k]) for k, v in model.state_dict().items())
    assert [row["step"] for row in run.rows] == [0, 1, 2]
    assert all(math.isfinite(v) for row in run.rows for v in row.values() if isinstance(v, float))


def test_each_seed_asks_for_its_own_pairs_and_samples_its_own_answers(monkeypatch):
    drawn, collect = {}, opd.collect

    def noted(author, student, teacher, prompts, eps, config, generator):
        drawn[generator.initial_seed()] = prompts, generator.get_state().tolist()
        return collect(author, student, teacher, prompts, eps, config, generator)

    monkeypatch.setattr(opd, "collect", noted)
    for seed in (0, 1):
        opd.train(small(steps=1), Memory(), "opd", seed, policy(0), policy(1), far_task())
    (prompts, state), (others, other_state) = drawn[0], drawn[1]
    assert prompts != others and state != other_state


def test_student_and_teacher_score_the_same_answers_and_grpo_asks_no_teacher(monkeypatch):
    base, expert, seen = policy(0), policy(1), []
    monkeypatch.setattr(
        opd,
        "answer_logprobs",
        lambda model, ids: seen.append((model, ids)) or answer_logprobs(model, ids),
    )
    student = opd.train(small(), Memory(), "opd", 0, base, expert, ODD)
    assert [model for model, _ in seen] == [expert, student] * 2
    assert all(
        torch.equal(theirs, its)
        for (_, theirs), (_, its) in zip(seen[::2], seen[1::2], strict=True)
    )
    seen.clear()
    student = opd.train(small(), Memory(), "grpo", 0, base, None, ODD)
    assert [model for model, _ in seen] == [student] * 2


def test_a_step_asks_training_pairs_in_groups_and_pays_for_the_answer_only(monkeypatch):
    config, asked, paid, rates, g = (
        small(steps=3, trb_steps=2, batch=8),
        [],
        [],
        [],
        torch.Generator().manual_seed(0),
    )
    lengths = torch.tensor([3, 18, 5, 1, 7, 2, 18, 4])

    def fake(kind, student, teacher, prompts, eps, config, generator):
        asked.append(([tuple(p[1:3]) for p in prompts], eps))
        return (
            torch.randint(PLACES, (8, ANSWER), generator=g),
            (torch.arange(ANSWER) < lengths[:, None]).float(),
            0.25,
        )

    monkeypatch.setattr(opd, "collect", fake)
    monkeypatch.setattr(
        opd,
        "descend",
        lambda optimizer, *more: (
            rates.append(optimizer.param_groups[0]["lr"]) or descend(optimizer, *more)
        ),
    )
    task = replace(
        far_task(),
        reward=lambda pair, tokens: paid.append((pair, len(tokens))) or float(tokens[0] % 2),
    )
    run = Memory()
    for arm, seed in (("trb", 0), ("grpo", 0), ("grpo", 1)):
        opd.train(config, run, arm, seed, policy(0), policy(1), task)
    pairs, eps = [p for p, _ in asked], [e for _, e in asked[:3]]
    assert eps == pytest.approx([0.1, 0.05, 0])
    assert rates[:3] == pytest.approx([config.lr * k / 5 for k in (1, 2, 3)])
    assert paid == [
        (pair, n) for row in pairs for pair, n in zip(row, lengths.tolist(), strict=True)
    ]
    assert {p for row in pairs for p in row} <= set(task.train)
    assert all(len(set(row[i : i + 4])) == 1 for row in pairs[3:] for i in (0, 4))
    assert any(row[0] != row[4] for row in pairs[3:])
    assert any(len(set(row)) > 2 for row in pairs[:3]) and pairs[3:6] != pairs[6:]
    assert [
        (r["arm"], r["seed"], r["step"], r["sampled_tokens"], r.get("changed")) for r in run.rows
    ] == [
        (arm, seed, step, step * 58, 0.25 if step else None)
        for arm, seed in (("trb", 0), ("grpo", 0), ("grpo", 1))
        for step in range(4)
    ]


def interrupted(go, module, monkeypatch, steps):
    """go(run) twice: whole, and cut in the middle of the third step and begun again: both have the
    same rows and weights."""
    whole, halves, taken = Memory(), Memory(), []
    go(whole)

    def cut(*step):
        taken.append(1)
        if len(taken) == 3:
            raise KeyboardInterrupt
        return descend(*step)

    monkeypatch.setattr(module, "descend", cut)
    with pytest.raises(KeyboardInterrupt):
        go(halves)
    (kept,) = halves.state.values()
    del halves.rows[halves.kept_rows :]
    go(halves)
    assert 0 < kept["step"] <= 2 and len(taken) == 3 + steps - kept["step"]
    weights = [next(iter(run.state.values()))["model"].values() for run in (whole, halves)]
    assert halves.rows == whole.rows
    assert all(torch.equal(x, y) for x, y in zip(*weights, strict=True))


@pytest.mark.parametrize("method", ["grpo", "trb"])
def test_interrupting_in_the_middle_of_a_step_changes_nothing(method, monkeypatch):
    interrupted(
        lambda run: opd.train(
            small(steps=4, eval_every=2), run, method, 0, policy(0), policy(1), ODD
        ),
        opd,
        monkeypatch,
        4,
    )


def test_interrupting_the_training_of_the_base_changes_nothing(monkeypatch, tmp_path):
    folders = iter([tmp_path / "whole", tmp_path / "halves", tmp_path / "halves"])
    for name in ("whole", "halves"):
        (tmp_path / name).mkdir()
    interrupted(
        lambda run: from_scratch(small(sft_steps=4, out=str(next(folders))), run, "base", "cpu"),
        walkers,
        monkeypatch,
        4,
    )


def test_a_step_forgets_the_gradient_of_the_last(monkeypatch):
    """Without a gradient of its own, a step would otherwise take the last one's again."""
    gradients = []

    def noted(optimizer, loss):
        gradients.append([p.grad.clone() for p in optimizer.param_groups[0]["params"]])
        return descend(optimizer, loss)

    monkeypatch.setattr(opd, "descend", noted)
    losses = []
    monkeypatch.setattr(
        opd, "loss_of", lambda method, lp, *rest: losses.append(1) or lp.sum() * (len(losses) == 1)
    )
    opd.train(small(), Memory(), "opd", 0, policy(0), policy(1), ODD)
    assert any(g.any() for g in gradients[0]) and not any(g.any() for g in gradients[1])


def test_distillation_leads_the_student_to_its_teacher():
    config, expert = small(steps=30, batch=32, lr=1e-2, eval_every=40), policy(1, sharp=2.0)
    pairs = far_task().test[:64]

    @torch.no_grad()
    def gap(model):
        ids = generate(
            model,
            [prompt(p) for p in pairs],
            1,
            ANSWER,
            stop=EOS,
            generator=torch.Generator().manual_seed(0),
        )
        lp, lq = (answer_logprobs(m, ids.ids) for m in (model, expert))
        return (
            (divergence(lp, lq, None, "reverse") * ids.mask[:, PROMPT:]).sum() / ids.mask.sum()
        ).item()

    base = policy(0, sharp=1.0)
    before = gap(base)
    for method in ("opd", "opd_jsd", "kd"):
        assert (
            gap(opd.train(config, Memory(), method, 0, base, expert, far_task())) < 0.5 * before
        ), method


# ------------------------------------------------------------------------------------------------
# Claims


def made_up(arm):
    """An arm's level, rate of passwords and slope of style: numbers that no two arms share."""
    names = [
        *METHODS,
        "opsd",
        "opsd_live",
        "opsd_clip",
        "rmsd",
        "rmsd_no_judge",
        "imitation",
        "opsd, rule",
        "rmsd, rule",
        "grpo, rule",
        "pedagogue",
        "pedagogue, reward only",
        "pedagogical",
        "pedagogical, reward only",
    ]
    i = names.index(arm)
    return (
        dict(opd=0.95, grpo=0.9).get(arm, 0.3 + 0.011 * i),
        0.01 + 0.017 * i,
        0.1 + 0.003 * i**1.5,
    )


def log_made_up(run, arm, seed, silent):
    """Rows of an arm that rises to its level in 40 of 100 steps. silent: every answer is empty,
    nothing is ever right."""
    level, passwords, slope = made_up(arm)
    for step in range(0, 101, 20):
        obeyed = dict(
            zip(
                ("opsd, rule", "rmsd, rule", "grpo, rule"),
                (0.96 * min(1, step / 40), 0.98 * min(1, step / 20), 0.1),
                strict=True,
            )
        ).get(arm)
        row = dict(
            password_rate=passwords,
            formal=0.25 + slope * step / 100,
            renamed=obeyed,
            off_topic=level / 10,
            greedy=level / 2,
            style_mass=0.5,
            **{"pass@1": level * min(1, step / 40)},
        )
        if silent:
            row = {key: None if key in ("formal", "renamed") else 0.0 for key in row}
        run.log(
            phase="train",
            arm=arm,
            seed=seed,
            step=step,
            sampled_tokens=step * (300 if arm == "grpo" else 200 if arm == "skd" else 100),
            changed=0.0 if silent else 1 - step / 200 if step else None,
            **row,
        )


def claims_of(script, folder, patch, silent=False, steps=100):
    """The claims of a command that trains nothing, about made-up curves -> {id: claim}, what each
    arm was trained with."""
    module, calls = importlib.import_module(script.removesuffix(".py")), {}

    def train(config, run, arm, seed, base, expert, task, measure):
        calls[arm] = SimpleNamespace(base=base, expert=expert, task=task, measure=measure)
        log_made_up(run, arm, seed, silent)

    patch.setattr(opd, "train", train)
    patch.setattr(
        module,
        "from_scratch",
        lambda config, run, name, device, slips="": f"{name} {slips}".strip(),
    )
    patch.setattr(module, "show", lambda *_, **__: None)
    if hasattr(module, "evaluate"):
        patch.setattr(module, "evaluate", lambda *_: {"pass@1": 0.0 if silent else 0.98})
    finish(script, "--seeds", 2, "--steps", steps, "--out", folder)
    return {c["id"]: c for c in json.loads((folder / "claims.json").read_text())}, calls


def is_about(claims, **expected):
    assert {k: float(c["ours"].split()[0]) for k, c in claims.items()} == {
        k.replace("_", " "): pytest.approx(v, rel=6e-3, abs=1e-9) for k, v in expected.items()
    }


level, passwords, slope = (lambda arm, i=i: made_up(arm)[i] for i in range(3))


def test_the_claims_are_about_the_arms_that_they_name(monkeypatch, tmp_path):
    claims, calls = claims_of("opd.py", tmp_path, monkeypatch)
    is_about(
        claims,
        opd=0.95,
        opd_grpo=0.05,
        opd_expert=0.03,
        sft=level("sft"),
        sft_plateau=0.95 - level("sft"),
        grpo_tokens=3 * 0.95 / 0.9,
    )
    assert all((c.base, c.expert) == ("base", "expert") for c in calls.values())
    assert list(calls) == Config().methods


def test_the_papers_number_stands_where_it_stands_in_the_paper(monkeypatch, tmp_path):
    claims, _ = claims_of(
        "opd.py", tmp_path, monkeypatch
    )  # .550 is the checkpoint from which OPD (.744) and RL (.676) start, no rival of theirs
    assert claims["opd"]["paper"] == "0.744 (0.550; 0.676)"
    assert claims["opd"]["ours"].endswith("(0.00; 0.90)")
    assert claims["opd grpo"]["paper"] == "0.068"
    assert not any("SFT" in c["claim"] and "Qwen3" in c["source"] for c in claims.values())


def test_no_claim_holds_of_a_run_that_answers_nothing(monkeypatch, tmp_path):
    claims, _ = claims_of("opd.py", tmp_path, monkeypatch, silent=True)
    assert claims and [name for name, c in claims.items() if c["holds"]] == []


# ------------------------------------------------------------------------------------------------
# The command


def test_a_quick_run_writes_figure_metrics_claims_config_and_checkpoint_and_what_the_models_answer(
    tmp_path,
):
    assert check_quick("opd.py", tmp_path, also=["base.pt", "expert.pt", "samples.txt"]) == "opd"
    samples = (tmp_path / "samples.txt").read_text()
    assert samples.count("BOS 10 27 - - - GO\n") == 1
    assert all(samples.count(f"    {name} ") == 3 for name in ("base", "expert", *Config().methods))


def test_a_second_run_finds_the_models_of_the_first_and_a_changed_flag_trains_them_anew(tmp_path):
    finish("opd.py", "--quick", "--arms", "opd", "--out", tmp_path)
    made = (tmp_path / "base.pt").read_bytes()
    finish("opd.py", "--quick", "--arms", "kd", "--out", tmp_path)
    assert (tmp_path / "base.pt").read_bytes() == made
    assert not any(row["phase"] == "pretrain" for row in metrics(tmp_path))
    finish("opd.py", "--quick", "--arms", "opd", "--sft-steps", 12, "--out", tmp_path)
    assert {row.get("model") for row in metrics(tmp_path) if row["phase"] == "pretrain"} == {"base"}
    assert (tmp_path / "base.pt").read_bytes() != made
    assert json.loads((tmp_path / "claims.json").read_text()) == []


def test_help_lists_every_flag():
    check_help("opd.py")


def refused(script, flags, folder, *words):
    """The command must refuse before its run begins: one line with these words, exit code 2, and
    nothing is trained or written."""

    def begun(*_, **__):
        raise AssertionError("the run has begun")

    before = sorted(folder.rglob("*"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "__init__", begun)
        line = complain(script, "--out", folder, *flags)
    assert (
        all(word in line for word in words)
        and "Traceback" not in line
        and len(line) < 700
        and sorted(folder.rglob("*")) == before
    ), line


@pytest.mark.parametrize(
    "flags",
    [
        "--bogus",
        "--steps 0",
        "--arms nothing",
        "--arms pedagogical",
        "--arms opd,,grpo",
        "--arms ,",
        "--batch 20",
        "--group 0",
        "--group 1",
        "--lr nan",
        "--n-embd 65",
        "--expert-embd 98",
        "--resume",
        "--seed -1",
        "--seed 4294967296",
        "--steps 1.5",
        "--device tpu",
    ],
)
def test_a_mistake_in_the_flags_is_one_line_and_exit_code_2(flags, tmp_path):
    refused("opd.py", flags.split(), tmp_path)


@pytest.mark.parametrize(
    "flags, word",
    [
        ("--n-embd 100000000", "n-embd"),
        ("--expert-embd 100000000", "expert-embd"),
        ("--batch 4294967288", "batch"),
        ("--batch 99999999999999999999", "batch"),
        ("--group 4294967295", "group"),
        ("--seeds 4294967295", "seeds"),
        ("--eval-prompts 257", "eval-prompts"),
        ("--arms opd_top4 --top 100", "top"),
        ("--skd-top 4294967295", "skd-top"),
        ("--lr 1e20", "lr"),
        ("--lr 1e300", "lr"),
        ("--lr inf", "must be from 0"),
        ("--lr -1e-9", "lr"),
        ("--trb-eps 1e31", "trb-eps"),
        ("--trb-eps nan", "must be from 0"),
        ("--trb-steps 0", "trb-steps"),
        ("--steps 99999999999", "steps"),
        ("--eval-every 0", "eval-every"),
        ("--arms opd,opd", "twice"),
    ],
)
def test_an_absurd_size_or_an_extreme_number_is_refused_at_once(flags, word, tmp_path):
    refused("opd.py", flags.split(), tmp_path, word)


@pytest.mark.parametrize(
    "flags",
    [
        "--top 3",
        "--arms opd --skd-top 3",
        "--arms opd --trb-eps 0.2",
        "--arms skd --trb-steps 9",
        "--arms opd --group 4",
    ],
)
def test_a_flag_that_would_do_nothing_is_refused_by_its_name(flags, tmp_path):
    flag = [f for f in flags.split() if f.startswith("--") and f != "--arms"][0]
    refused("opd.py", flags.split(), tmp_path, flag, "does nothing here")


@pytest.mark.parametrize(
    "flags",
    [
        "--arms opd_top4 --top 3",
        "--arms skd --skd-top 3",
        "--arms trb --trb-eps 0.2 --trb-steps 9",
        "--arms grpo --group 4 --batch 8",
        "--arms opd --batch 9",
    ],
)
def test_a_flag_that_does_something_is_taken(flags):
    parse_args(Config, "", flags.split())


def test_a_flag_that_is_called_idle_changes_no_number_and_one_that_is_not_does():
    """What idle() says, against what training makes of the flag."""

    def rows(name, **choices):
        config, run = small(arms=name, steps=2, eval_prompts=1, eval_every=9, **choices), Memory()
        opd.train(config, run, name, 0, policy(0), policy(1), far_task())
        return run.rows, set(config.idle())

    for name in ("opd_top4_renormalised", "skd", "trb"):
        plainly, idle = rows(name)
        for key, other in dict(top=2, skd_top=1, trb_eps=5.0, trb_steps=1).items():
            assert (rows(name, **{key: other})[0] == plainly) == (key in idle), (name, key)


@pytest.mark.parametrize(
    "name, content",
    [
        ("base.pt", "rows"),
        ("expert.pt", "torch"),
        ("expert.pt", "list"),
        ("base.pt", "folder"),
        ("expert.pt", "cut"),
        ("base.pt", "empty"),
    ],
)
def test_a_file_that_is_no_model_of_ours_is_never_loaded_or_overwritten(name, content, tmp_path):
    path = tmp_path / name
    (tmp_path / "config.json").write_text(
        json.dumps(dict(name="opd", config=dict(seed=0), revision="1"))
    )  # the folder of a run, so that base.pt might be its own
    if content == "folder":
        path.mkdir()
    elif content in ("torch", "list"):
        torch.save(dict(weights=1) if content == "torch" else [1], path)
    else:
        path.write_bytes({"rows": b'{"step": 0}\n', "empty": b"", "cut": b"PK\x03\x04"}[content])
    before = path.is_dir() or path.read_bytes()
    refused("opd.py", (), tmp_path, str(path))
    assert (path.is_dir() or path.read_bytes()) == before


@pytest.mark.parametrize("name", ["base.pt", "expert.pt", "claims.json", "opd.png", "model.pt"])
def test_a_folder_with_somebody_elses_files_is_left_as_it_is(name, tmp_path):
    torch.save(dict(made_by="me", model={}), tmp_path / name)
    before = (tmp_path / name).read_bytes()
    assert name in complain("opd.py", "--quick", "--out", tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_bytes() == before


@pytest.mark.parametrize("out", ["file", "file/below", "x" * 300, "config.json"])
def test_an_out_that_can_be_no_folder_is_one_line(out, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "config.json").write_text("{}")
    complain("opd.py", "--quick", "--out", tmp_path / out if out != "config.json" else tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "file"]
    assert (tmp_path / "file").read_text() == "mine"


# ------------------------------------------------------------------------------------------------
# What ends a run early


def spoils(script, module, name, what, folder, *flags):
    """A run whose second value of module.name, a loss or what becomes one, has no number in it or
    in its gradient: it ends in one line, what is saved is finite, and it can be resumed."""
    right, values = getattr(module, name), []

    def spoilt(*more):
        value = right(*more)
        values.append(value)
        if len(values) != 2:
            return value
        return value * math.nan if what == "loss" else value + (0 * value).sqrt()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, spoilt)
        code, _, err = launch(script, "--quick", *flags, "--out", folder)
    line = err.splitlines()[-1]
    assert code == 2
    assert f"the {what} is nan" in line
    assert "step 2 of" in line
    assert "model.pt holds what was finite" in line
    assert "Traceback" not in err
    state = load_checkpoint(folder / "model.pt")["state"]
    assert state
    assert all(torch.isfinite(w).all() for phase in state.values() for w in phase["model"].values())
    assert not (folder / "claims.json").exists()
    assert all(
        math.isfinite(v) for row in metrics(folder) for v in row.values() if isinstance(v, float)
    )
    finish(script, "--resume", "--out", folder)


@pytest.mark.parametrize("what", ["loss", "gradient norm"])
def test_a_number_that_is_none_ends_the_run_before_it_can_spoil_the_weights(what, tmp_path):
    flags = "--arms opd --steps 4 --sft-steps 1 --expert-steps 1"
    spoils("opd.py", opd, "loss_of", what, tmp_path, *flags.split())


@pytest.mark.parametrize("method", ["opd", "trb", "skd", "grpo"])
def test_a_learning_rate_that_blows_up_ends_the_run(method):
    run = Memory()
    with pytest.raises(NotFinite):
        opd.train(small(lr=1e20, steps=9), run, method, 0, policy(0), policy(1), ODD)
    assert all(math.isfinite(v) for row in run.rows for v in row.values() if isinstance(v, float))


def test_two_models_that_write_together_never_draw_from_what_is_no_number():
    student, broken, prompts = policy(0), policy(1), [prompt(p) for p in far_task().test[:4]]
    broken.lm_head.weight.data[3] = math.nan
    for pair in ((student, broken), (broken, student)):
        with pytest.raises(NotFinite):
            collect("draft", *pair, prompts, 0.0, small(), torch.Generator().manual_seed(0))


def cut_by_a_signal(script, module, name, call, number, folder, *flags):
    """A run that gets a signal at some call of module.name ends at once and loses nothing: resumed,
    it is the run that nothing interrupted."""
    finish(script, *flags, "--out", folder / "whole")
    right, calls = getattr(module, name), []

    def cut(*more, **named):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), number)
            raise AssertionError("the signal was not heeded")
        return right(*more, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, cut)
        code, out, _ = launch(script, *flags, "--out", folder / "cut")
    assert code == 128 + number and "--resume" in out and len(calls) == call
    finish(script, "--resume", "--out", folder / "cut")
    assert metrics(folder / "cut") == metrics(folder / "whole")


def test_a_signal_during_an_evaluation_ends_the_run_at_once_and_loses_nothing(tmp_path):
    flags = "--quick --arms opd --steps 3 --eval-every 1 --sft-steps 1 --expert-steps 1"
    cut_by_a_signal("opd.py", walkers, "answer", 4, signal.SIGTERM, tmp_path, *flags.split())


def test_interrupt_and_resume_give_the_metrics_of_an_uninterrupted_run_to_the_bit(tmp_path):
    marks = dict(phase="pretrain"), dict(phase="train", arm="grpo")
    flags = "--quick --arms trb,grpo --expert-steps 2 --steps 4 --eval-every 2"
    check_resume("opd.py", tmp_path, marks, *flags.split())
