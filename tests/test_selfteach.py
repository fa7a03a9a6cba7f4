"""selfteach.py: each of the five choices against closed forms, the trainer, and the command."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from common import Memory, check_help, check_resume, check_whole, finish, metrics
from test_opd import (
    ODD,
    batch,
    interrupted,
    is_about,
    level,
    log_made_up,
    logprobs,
    passwords,
    policy,
    refused,
    slope,
    spoils,
)

import selfteach
from engine import generate
from experiment import NotFinite, parse_args
from selfteach import (
    METHODS,
    PASSWORD,
    RULE,
    Config,
    advantages,
    choose_mask,
    choose_weight,
    divergence,
    largest,
    loss_of,
    proximity,
)
from tasks.walkers import answer_logprobs
from tasks.walks import (
    ANSWER,
    PROMPT,
    VOCAB,
    far_task,
    prompt,
    prompt_with_password,
    prompt_with_rule,
    rule_task,
)


def small(**choices):
    return Config(
        **{**dict(n_embd=16, batch=8, group=4, steps=2, eval_prompts=8, eval_every=1), **choices}
    )


# ------------------------------------------------------------------------------------------------
# Masks and weights

GAP = torch.tensor([[5.0, 4, 3, 2, 1, 0.5], [1, 2, 3, 4, 9, 9]])
MASK = torch.tensor([[1.0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
ACCEPTED = torch.tensor([[0, 1, 0, 1, 1, 1], [1, 1, 1, 0, 1, 1]])


def chosen(kind):
    rewards = torch.tensor([1.0, 0.0])
    return choose_mask(kind, MASK, GAP, ACCEPTED, rewards, recall=4, keep=2).tolist()


def test_rmsd_keeps_the_accepted_of_the_largest_gaps_and_never_padding():
    assert chosen("judge") == [[0, 1, 0, 1, 0, 0], [0, 1, 1, 0, 0, 0]]
    assert choose_mask("judge", MASK, GAP, ACCEPTED, None, recall=2, keep=2).tolist() == [
        [0, 1, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0],
    ]
    assert choose_mask("judge", MASK, GAP, 0 * ACCEPTED, None, recall=4, keep=2).sum() == 0


def test_without_the_judge_the_largest_gaps_remain():
    assert chosen("gap") == [[1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0]]


def test_all_is_the_answer_and_verified_only_right_answers():
    assert chosen("all") == MASK.tolist() and chosen("verified") == [[1] * 6, [0] * 6]


def test_largest_takes_ties_once_and_what_is_there_at_most():
    assert largest(torch.ones(1, 5), 2).sum() == 2
    assert largest(torch.tensor([[1.0, -torch.inf]]), 2).tolist() == [[1, 0]]


def test_the_clip_takes_the_gradient_from_large_divergences_only():
    d = torch.tensor([[0.1, 0.49, 0.5, 3.0]])
    assert choose_weight("clip", d, None, None, None, 1, clip=0.5).tolist() == [[1, 1, 0, 0]]


def test_the_gate_is_small_for_what_the_student_finds_implausible_and_has_mean_one():
    logp = torch.tensor([[-0.1, -4.0, -9.0, -50.0]], requires_grad=True)
    m = torch.tensor([[1.0, 1, 1, 0]])
    w = choose_weight("gate", None, m, logp, None, 1, None)
    raw = [1 / (1 + math.exp(-2 * (x + 4))) for x in (-0.1, -4.0, -9.0)]
    assert w[0, :3].tolist() == pytest.approx([3 * r / sum(raw) for r in raw])
    assert not w.requires_grad
    assert choose_weight("gate", None, 0 * m, logp, None, 1, None).isfinite().all()


def test_proximity_lies_between_the_mean_and_the_largest_gap_and_ignores_padding():
    lp, y, mask = (
        logprobs(3, 5, 10),
        torch.randint(10, (3, 5), generator=torch.Generator().manual_seed(2)),
        torch.ones(3, 5).double(),
    )
    mask[1, 3:] = 0
    gap = lp.max(-1).values - lp.gather(2, y[..., None]).squeeze(2)
    mean, largest_gap = (gap * mask).sum(1) / mask.sum(1), (gap * mask).max(1).values
    assert torch.allclose(proximity(lp, y, mask, spike=1e-5), (-mean).exp(), rtol=1e-3)
    assert torch.allclose(proximity(lp, y, mask, spike=1e4), (-largest_gap).exp(), rtol=1e-2)
    g = proximity(lp, y, mask)
    assert ((-largest_gap).exp() <= g).all() and (g <= (-mean).exp()).all()
    assert torch.allclose(proximity(lp, lp.argmax(-1), mask), torch.ones(3).double())


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
        loss = loss_of(method, z.log_softmax(-1), *args, rewards, PASSWORD, small())
        loss.backward()
        results.append((loss.item(), z.grad[:, : mask.shape[1]] * mask[..., None]))
        assert (z.grad[args[2] == 0] == 0).all()
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-12)
    assert torch.allclose(results[0][1], results[1][1], atol=1e-12)


@pytest.mark.parametrize("method", ["opsd", "rmsd", "rmsd_no_judge", "opsd_clip"])
def test_a_student_that_is_its_teacher_has_loss_and_gradient_zero(method):
    lp, _, y, mask, rewards = batch()
    z = lp.clone().requires_grad_()
    loss = loss_of(method, z.log_softmax(-1), lp, y, mask, rewards, PASSWORD, small())
    loss.backward()
    assert abs(loss.item()) < 1e-12 and z.grad.abs().max() < 1e-12


def test_the_divergence_is_the_reverse_kl_or_the_surprise():
    lp, lq, y, *_ = batch()
    assert torch.allclose(divergence(lp, lq, y, "reverse"), (lp.exp() * (lp - lq)).sum(-1))
    assert torch.equal(divergence(lp, None, y, "token"), -lp.gather(2, y[..., None]).squeeze(2))


def test_the_loss_is_the_mean_over_the_chosen_tokens():
    lp, lq, y, mask, rewards = batch()
    logp = lp.gather(2, y[..., None]).squeeze(2)
    adv = advantages(rewards.view(2, 4)).view(-1, 1)
    assert loss_of("grpo", lp, None, y, mask, rewards, PASSWORD, small()).item() == pytest.approx(
        -(adv * logp * mask).sum().item() / mask.sum().item()
    )
    right = mask * rewards[:, None]
    assert loss_of(
        "imitation", lp, lq, y, mask, rewards, PASSWORD, small()
    ).item() == pytest.approx(-(logp * right).sum().item() / right.sum().item())


@pytest.mark.parametrize("method", ["rmsd", "rmsd_no_judge"])
def test_rmsd_takes_the_reverse_kl_where_the_gaps_are_largest_and_with_a_judge_matter(method):
    lp, lq, y, mask, rewards = batch(T=ANSWER)
    gap, reverse, kept = (
        (lp - lq).gather(2, y[..., None]).squeeze(2).abs(),
        (lp.exp() * (lp - lq)).sum(-1),
        [],
    )
    for row in range(len(y)):
        places = sorted(range(int(mask[row].sum())), key=lambda t: -gap[row, t])
        if method == "rmsd":
            places = [t for t in places[: PASSWORD.recall] if y[row, t].item() in PASSWORD.judged]
        kept += reverse[row, places[: PASSWORD.keep]].tolist()
    assert loss_of(method, lp, lq, y, mask, rewards, PASSWORD, small()).item() == pytest.approx(
        np.mean(kept)
    )
    assert len(kept) > 16


def test_no_verified_answer_is_no_loss_and_not_a_division_by_zero():
    lp, lq, y, mask, rewards = batch()
    for method in ("imitation", "pedagogical"):
        assert loss_of(method, lp, lq, y, mask, 0 * rewards, PASSWORD, small()).item() == 0


# ------------------------------------------------------------------------------------------------
# The trainer


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_the_student_and_nobody_else(method):
    base, pedagogue, run = policy(0), policy(2), Memory()
    before = [{k: v.clone() for k, v in m.state_dict().items()} for m in (base, pedagogue)]
    model = selfteach.train(small(), run, method, 0, base, ODD, PASSWORD, pedagogue=pedagogue)
    for m, state in zip((base, pedagogue), before, strict=True):
        assert all(p.grad is None for p in m.parameters())
        assert all(torch.equal(v, state[k]) for k, v in m.state_dict().items())
    assert any(not torch.equal(v, before[0][k]) for k, v in model.state_dict().items())
    assert [row["step"] for row in run.rows] == [0, 1, 2]
    assert all(math.isfinite(v) for row in run.rows for v in row.values() if isinstance(v, float))


@pytest.mark.parametrize(
    "method, who", [("opsd", "base"), ("opsd_live", "student"), ("rmsd", "base")]
)
@pytest.mark.parametrize("hint, ask", [(PASSWORD, prompt_with_password), (RULE, prompt_with_rule)])
def test_the_teacher_is_who_the_table_says_and_reads_its_own_prompt(
    hint, ask, method, who, monkeypatch
):
    base, seen = policy(0), []
    monkeypatch.setattr(
        selfteach,
        "answer_logprobs",
        lambda model, ids: seen.append((model, ids)) or answer_logprobs(model, ids),
    )
    student = selfteach.train(small(), Memory(), method, 0, base, far_task(), hint)
    assert len(seen) == 4
    for (teacher, theirs), (model, its) in zip(seen[::2], seen[1::2], strict=True):
        assert teacher is dict(base=base, student=student)[who]
        assert model is student
        assert torch.equal(theirs[:, PROMPT:], its[:, PROMPT:])
        pairs = [tuple(row) for row in its[:, 1:3].tolist()]
        assert its[:, :PROMPT].tolist() == [prompt(pair) for pair in pairs]
        assert theirs[:, :PROMPT].tolist() == [ask(pair) for pair in pairs]


def test_each_seed_asks_for_its_own_pairs_and_samples_its_own_answers(monkeypatch):
    drawn, collect = {}, selfteach.collect

    def noted(writer, ask, pairs, task, generator):
        drawn[len(drawn)] = pairs, generator.get_state().tolist()
        return collect(writer, ask, pairs, task, generator)

    monkeypatch.setattr(selfteach, "collect", noted)
    for seed in (0, 1):
        config = small(steps=1)
        selfteach.train(config, Memory(), "opsd", seed, policy(0), far_task(), PASSWORD)
    (pairs, state), (others, other_state) = drawn[0], drawn[1]
    assert pairs != others and state != other_state


@pytest.mark.parametrize(
    "method, who", [("opsd", "student"), ("imitation", "base"), ("pedagogical", "pedagogue")]
)
def test_who_writes_reads_the_own_prompt_and_is_paid_for_its_own_answer(method, who, monkeypatch):
    seen, paid, base, pedagogue = [], [], policy(0), policy(1)

    def noted(model, prompts, *more, **named):
        rollout = generate(model, prompts, *more, **named)
        seen.append((model, prompts, rollout.tokens()))
        return rollout

    monkeypatch.setattr(selfteach, "generate", noted)
    task = replace(far_task(), reward=lambda pair, tokens: paid.append((pair, tokens)) or 1.0)
    student = selfteach.train(
        small(), Memory(), method, 0, base, task, PASSWORD, pedagogue=pedagogue
    )
    ask = prompt if who == "student" else prompt_with_password
    for model, prompts, _ in seen:
        assert model is dict(student=student, base=base, pedagogue=pedagogue)[who]
        assert prompts == [ask(tuple(row[1:3])) for row in prompts]
    assert paid == [
        (tuple(row[1:3]), answer)
        for _, prompts, answers in seen
        for row, answer in zip(prompts, answers, strict=True)
    ]
    assert {pair for pair, _ in paid} <= set(task.train)


def test_grpo_asks_each_pair_of_a_group_as_often_as_the_group_is_large(monkeypatch):
    asked = []
    task = replace(
        far_task(), reward=lambda pair, tokens: asked.append(pair) or float(tokens[0] % 2)
    )
    selfteach.train(small(), Memory(), "grpo", 0, policy(0), task, PASSWORD)
    assert all(len(set(asked[i : i + 4])) == 1 for i in range(0, 16, 4)) and len(set(asked)) == 4


def test_the_meter_multiplies_the_reward_that_trains_and_not_the_one_that_is_logged(monkeypatch):
    rewards, read = [], []
    monkeypatch.setattr(
        selfteach,
        "answer_logprobs",
        lambda model, ids: (
            read.append((model, ids[:, :PROMPT].tolist())) or answer_logprobs(model, ids)
        ),
    )
    monkeypatch.setattr(
        selfteach,
        "loss_of",
        lambda method, lp, lq, y, mask, r, *rest: rewards.append(r) or lp.sum() * 0,
    )
    run, meter, task = Memory(), policy(1), replace(far_task(), reward=lambda pair, tokens: 1.0)
    selfteach.train(
        small(),
        run,
        "pedagogue",
        0,
        policy(0),
        task,
        PASSWORD,
        method="grpo",
        ask=prompt_with_password,
        meter=meter,
    )
    assert all(
        row == (prompt if model is meter else prompt_with_password)(tuple(row[1:3]))
        for model, rows in read
        for row in rows
    )
    assert sum(model is meter for model, _ in read) == 2
    assert all(((r > 0) & (r < 1)).all() for r in rewards)
    assert all(row["reward"] == 1.0 for row in run.rows[1:])
    assert [row["proximity"] for row in run.rows[1:]] == pytest.approx(
        [r.mean().item() for r in rewards]
    )


@pytest.mark.parametrize("method", ["rmsd", "pedagogue"])
def test_interrupting_in_the_middle_of_a_step_changes_nothing(method, monkeypatch):
    config, base = small(steps=4, eval_every=2), policy(0)
    how = dict(method="grpo", ask=prompt_with_password, meter=base) if method == "pedagogue" else {}
    interrupted(
        lambda run: selfteach.train(config, run, method, 0, base, ODD, PASSWORD, **how),
        selfteach,
        monkeypatch,
        4,
    )


def test_a_learning_rate_that_blows_up_ends_the_run():
    with pytest.raises(NotFinite):
        selfteach.train(small(lr=1e20, steps=9), Memory(), "rmsd", 0, policy(0), ODD, PASSWORD)


# ------------------------------------------------------------------------------------------------
# Claims


def claims_of(folder, patch, silent=False):
    """The claims of a command that trains nothing, about made-up curves -> {id: claim}, what each
    arm was trained with."""
    calls = {}

    def train(
        config,
        run,
        arm,
        seed,
        base,
        task,
        hint,
        method=None,
        pedagogue=None,
        ask=prompt,
        meter=None,
    ):
        calls[arm] = SimpleNamespace(
            method=method or arm,
            task=task,
            hint=hint,
            pedagogue=pedagogue,
            ask=ask,
            meter=meter,
            config=config,
        )
        log_made_up(run, arm, seed, silent)
        return f"trained {arm}"

    patch.setattr(selfteach, "train", train)
    patch.setattr(selfteach, "from_scratch", lambda config, run, name, device: name)
    patch.setattr(selfteach, "show", lambda *_, **__: None)
    finish("selfteach.py", "--seeds", 2, "--steps", 100, "--out", folder)
    return {c["id"]: c for c in json.loads((folder / "claims.json").read_text())}, calls


def test_the_claims_are_about_the_arms_that_they_name(monkeypatch, tmp_path):
    claims, calls = claims_of(tmp_path, monkeypatch)
    fast, slow = 20 * 0.9 / 0.98, 40 * 0.9 / 0.96
    is_about(
        claims,
        rule=0.96,
        rule_off_topic=level("opsd, rule") / 10,
        password=passwords("opsd"),
        live=passwords("opsd_live"),
        no_judge=passwords("rmsd_no_judge"),
        judge=passwords("rmsd"),
        judge_worst=passwords("rmsd"),
        judge_success=level("rmsd"),
        clip=passwords("opsd_clip"),
        clip_worst=passwords("opsd_clip"),
        clip_success=level("opsd_clip"),
        rmsd_faster=fast / slow,
        rmsd_drift=slope("rmsd, rule") * 20 / (slope("opsd, rule") * 40),
        rmsd_drift_end=slope("rmsd, rule") / slope("opsd, rule"),
        grpo=0.1,
        pedagogue=passwords("pedagogue"),
        pedagogue_reward=passwords("pedagogue, reward only"),
        pedagogical=level("pedagogical"),
    )
    how = {arm: (c.method, c.ask, c.meter, c.pedagogue) for arm, c in calls.items()}
    assert how["pedagogue"] == ("grpo", prompt_with_password, "base", None)
    assert how["pedagogue, reward only"] == ("grpo", prompt_with_password, None, None)
    assert how["pedagogical"] == ("pedagogical", prompt, None, "trained pedagogue")
    assert how["pedagogical, reward only"] == (
        "pedagogical_no_gate",
        prompt,
        None,
        "trained pedagogue, reward only",
    )
    assert {c.method for c in calls.values()} == set(METHODS)
    for method in ("opsd", "rmsd", "grpo"):
        c = calls[f"{method}, rule"]
        assert (c.method, c.task, c.hint, c.config.lr) == (
            method,
            rule_task(),
            RULE,
            0.3 * Config().lr,
        )
    assert all(c.hint is PASSWORD for arm, c in calls.items() if "rule" not in arm)


def test_no_claim_holds_of_a_run_that_answers_nothing(monkeypatch, tmp_path):
    claims, _ = claims_of(tmp_path, monkeypatch, silent=True)
    assert claims and [name for name, c in claims.items() if c["holds"]] == []


# ------------------------------------------------------------------------------------------------
# The command


def test_some_arms_alone_are_trained_with_the_password_only(tmp_path):
    finish("selfteach.py", "--quick", "--arms", "rmsd,grpo", "--out", tmp_path)
    assert {row.get("arm") for row in metrics(tmp_path)} == {None, "rmsd", "grpo"}
    assert json.loads((tmp_path / "claims.json").read_text()) == []


def test_help_lists_every_flag():
    check_help("selfteach.py")


@pytest.mark.parametrize(
    "flags, word",
    [
        ("--bogus", "bogus"),
        ("--arms nothing", "nothing"),
        ("--arms pedagogical", "pedagogical"),
        ("--arms opsd,opsd", "twice"),
        ("--arms ,", "no such method"),
        ("--batch 20", "--group 8"),
        ("--n-embd 65", "n_embd 65"),
        ("--clip -1", "clip"),
        ("--clip 1e300", "clip"),
        ("--lr nan", "must be from 0"),
        ("--steps 0", "steps"),
        ("--arms opsd --clip 0.3", "does nothing here"),
        ("--arms opsd --group 4", "does nothing here"),
    ],
)
def test_a_mistake_in_the_flags_is_one_line_and_exit_code_2(flags, word, tmp_path):
    refused("selfteach.py", flags.split(), tmp_path, word)


@pytest.mark.parametrize(
    "flags",
    [
        "--clip 0.3 --group 2",
        "--arms opsd_clip --clip 0.3",
        "--arms grpo --group 2",
        "--arms opsd --batch 9",
    ],
)
def test_a_flag_that_does_something_is_taken(flags):
    parse_args(Config, "", flags.split())


def test_a_number_that_is_none_ends_the_run_before_it_can_spoil_the_weights(tmp_path):
    flags = "--arms opsd --steps 4 --sft-steps 1"
    spoils("selfteach.py", selfteach, "loss_of", "gradient norm", tmp_path, *flags.split())


def test_a_quick_run_is_whole_and_its_interrupted_and_resumed_twin_the_same_to_the_bit(tmp_path):
    marks = dict(arm="opsd, rule"), dict(arm="pedagogical")
    flags = "--quick --sft-steps 1 --eval-prompts 4"
    check_resume("selfteach.py", tmp_path, marks, *flags.split())
    assert check_whole(tmp_path / "whole", also=["base.pt", "samples.txt"]) == "selfteach"
    samples = (tmp_path / "whole" / "samples.txt").read_text()
    assert all(samples.count(f"    {name} ") == 3 for name in ("base", *Config().methods))
