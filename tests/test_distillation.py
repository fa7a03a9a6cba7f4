"""experiments/cold, few, estimators, fastslow: what they measure, their claims, their commands."""

import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from common import Memory, check_help, check_quick, check_resume, check_whole
from test_opd import (
    claims_of,
    cut_by_a_signal,
    interrupted,
    is_about,
    level,
    policy,
    refused,
    small,
    spoils,
)
from test_walks import curve

import tasks.walkers as walkers
from engine import Rollout, generate
from experiments import cold, estimators, fastslow
from tasks.walks import (
    ANSWER,
    EOS,
    NOHINT,
    PAD,
    PASSWORDS,
    PROMPT,
    PW,
    RULES,
    STYLES,
    far_task,
    password,
    prompt,
    walk_of,
)

EXPERIMENTS = {
    "cold": ["base.pt", "cold_base.pt", "expert.pt"],
    "few": ["base.pt", "expert.pt"],
    "estimators": ["base.pt", "expert.pt"],
    "fastslow": ["base.pt"],
}


def fast_config(**choices):
    return fastslow.Config(**{**dict(n_embd=16, batch=8, group=4, steps=2), **choices})


@pytest.mark.parametrize("arm, moves", [("fast and slow", True), ("slow", True), ("fast", False)])
def test_the_fast_arm_keeps_what_works_and_only_the_slow_one_moves_weights(arm, moves, monkeypatch):
    monkeypatch.setattr(fastslow, "obeyed", lambda pair, tokens, rule: float(tokens[0] % 2))
    base, run = policy(0), Memory()
    fastslow.fast_and_slow(fast_config(steps=4), run, arm, 0, base)
    state, population = (run.state[f"{arm} 0"][key] for key in ("model", "kept"))
    population = population["population"]
    assert any(not torch.equal(v, base.state_dict()[k]) for k, v in state.items()) == moves
    assert [row["stage"] for row in run.rows] == [0, 1, 1, 2, 2] and 1 <= len(population) <= 4
    assert (population == [NOHINT]) == (arm == "slow")


def test_the_words_with_half_of_the_best_ones_reward_live_on_and_the_best_is_deployed(monkeypatch):
    worth, asked = {NOHINT: 0.4, RULES[1]: 1.0, PASSWORDS[2]: 0.6, 3: 0.5}, []

    def echo(model, prompts, n, *budget, **more):  # answers with the word in the hint slot
        words = [p[5] for p in prompts for _ in range(n)]
        asked.append(words)
        ids = torch.tensor([[*p, p[5], EOS] for p in prompts for _ in range(n)])
        mask = (torch.arange(ids.shape[1]) >= PROMPT).float().expand(ids.shape)
        return Rollout(ids, mask, 0 * mask, torch.full((len(ids),), PROMPT))

    monkeypatch.setattr(fastslow, "generate", echo)
    monkeypatch.setattr(walkers, "generate", echo)
    monkeypatch.setattr(fastslow, "obeyed", lambda pair, tokens, rule: worth.get(tokens[0], 0.0))
    run = Memory()
    word = fastslow.fast_and_slow(fast_config(steps=60), run, "fast and slow", 0, policy(0))[1]
    best = [RULES[1], PASSWORDS[2], 3]
    assert run.state["fast and slow 0"]["kept"]["population"] == best
    assert run.rows[-1]["pass@1"] == 1.0
    assert run.rows[-1]["word"] == word == RULES[1]
    assert [words for words in asked if len(words) == 8][-1] == [best[i % 3] for i in range(8)]


def test_the_probe_lets_the_teacher_complete_what_was_begun_and_not_what_was_ended(monkeypatch):
    student, teacher, task, config, calls = policy(0), policy(1), far_task(), small(quick=True), []
    assert 0 <= cold.continuation(student, teacher, task, 0.1, 4, config, 0) <= 1

    def begin(
        student, teacher, prompts, choose, generator, limit
    ):  # every other answer is a password, complete
        begun = [
            [PW, password(p[1:3]), EOS, PAD] if i % 2 else walk_of(tuple(p[1:3]))[1 : 1 + limit]
            for i, p in enumerate(prompts)
        ]
        calls.append((student, teacher, limit))
        return torch.tensor(begun), (torch.tensor(begun) != PAD).float(), 0.0

    def go_on(model, prompts, n, budget, stop, generator):
        calls.append((model, {len(p) for p in prompts}, budget))
        return SimpleNamespace(tokens=lambda: [[*walk_of(tuple(p[1:3]))[5:], EOS] for p in prompts])

    monkeypatch.setattr(cold, "write_together", begin)
    monkeypatch.setattr(cold, "generate", go_on)
    assert cold.continuation(student, teacher, task, 0.1, 4, config, 0) == 1.0
    assert calls == [(student, teacher, 4), (teacher, {PROMPT + 3, PROMPT + 4}, ANSWER - 4)]


def test_the_style_mass_is_how_often_answers_begin_with_a_style_word():
    model, prompts = policy(), [prompt(pair) for pair in far_task().test[:8]]
    with torch.no_grad():
        model.lm_head.weight[list(STYLES)] *= 4
    first = generate(model, prompts, 1000, 1, generator=torch.Generator().manual_seed(0)).ids[
        :, PROMPT
    ]
    often = torch.isin(first, torch.tensor(list(STYLES))).float().mean().item()
    assert estimators.style_mass(model, prompts) == pytest.approx(often, abs=0.01)
    assert 0.02 < often < 0.98


def test_an_early_lead_is_measured_at_equal_steps_and_at_equal_tokens():
    # in 10 steps ours takes 200 tokens in the first seed, 50 in the second; the rival 100
    run = curve([0, 0.4, 0.8, 0.8, 0.8, 0.8], [0, 0.2, 0.4, 0.6, 0.8, 0.8], tokens=(200, 50))
    for seed in (0, 1):
        for i, v in enumerate([0, 0.3, 0.6, 0.8, 0.8, 0.8]):
            where = dict(phase="train", arm="b", seed=seed, step=10 * i, sampled_tokens=100 * i)
            run.log(**where, **{"pass@1": v})
    by_steps, by_tokens = cold.early(run, "a", "b")
    t = np.linspace(0, 400, 200)  # 40 steps take ours 800 tokens and the rival 400; or 200, 400
    expected = (
        np.interp(t, [0, 200, 400], [0, 0.4, 0.8]).mean()
        - np.interp(t, [0, 100, 200, 300, 400], [0, 0.3, 0.6, 0.8, 0.8]).mean()
    )
    assert by_steps == pytest.approx([0.3 / 4, -0.5 / 4])
    assert by_tokens == pytest.approx([expected, 0.4 - 0.3])
    assert expected < -0.1


def test_greedy_decoding_is_measured_beside_sampling(monkeypatch):
    temperatures = []
    monkeypatch.setattr(
        estimators,
        "answer",
        lambda model, pairs, ask, n, seed, temperature: (
            temperatures.append(temperature)
            or [(pair, [PW, password(pair), EOS]) for pair in pairs]
        ),
    )
    row = estimators.evaluate_both(policy(0), far_task(), small(), 0)
    assert row["greedy"] == 1.0 and temperatures == [0.0] and {"pass@1", "style_mass"} <= set(row)


def test_interrupting_the_fast_and_the_slow_changes_nothing(monkeypatch):
    monkeypatch.setattr(fastslow, "obeyed", lambda pair, tokens, rule: float(tokens[0] % 2))
    interrupted(
        lambda run: fastslow.fast_and_slow(fast_config(), run, "fast and slow", 0, policy(0)),
        fastslow,
        monkeypatch,
        6,
    )


# ------------------------------------------------------------------------------------------------
# Claims


def claims(name, folder, patch, silent=False):
    """Those of an experiment that trains nothing, about made-up curves -> {id: claim}, what each
    arm was trained with."""

    def probed(student, teacher, task, eps, length, *_):
        return (
            0.0
            if silent
            else eps * length / 10
            if (student, teacher) == ("base", "expert")
            else -1.0
        )

    def fast_and_slow(config, run, arm, seed, base):
        for step in range(5, 181, 5):
            learnt = (
                step % 60 == 0 and (arm != "slow" or step > 60) and (arm != "fast" or step == 120)
            )
            learnt |= (
                arm == "fast and slow"
                and step >= 20
                or arm == "slow"
                and 50 + 5 * seed <= step < 60
            )
            tokens = step * (12 if arm == "fast and slow" else 10)
            run.log(
                phase="train",
                arm=arm,
                seed=seed,
                step=step,
                stage=(step - 1) // 60,
                sampled_tokens=tokens,
                **{"pass@1": float(learnt and not silent)},
            )

    patch.setattr(cold, "continuation", probed)
    patch.setattr(fastslow, "fast_and_slow", fast_and_slow)
    return claims_of(
        f"experiments.{name}", folder, patch, silent, steps=60 if name == "fastslow" else 100
    )


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_no_claim_holds_of_a_run_that_answers_nothing(name, monkeypatch, tmp_path):
    found, _ = claims(name, tmp_path, monkeypatch, silent=True)
    assert found and [name for name, c in found.items() if c["holds"]] == []


def test_the_claims_of_cold_are_about_the_arms_that_they_name(monkeypatch, tmp_path):
    found, calls = claims("cold", tmp_path, monkeypatch)
    ahead = {arm: level(arm) - level("opd") for arm in ("trb", "skd")}

    def by_tokens(arm, tokens):
        return np.interp(
            np.linspace(0, 4000, 200), [0, 2 * tokens, 4 * tokens], [0, level(arm) / 2, level(arm)]
        ).mean()

    is_about(
        found,
        grpo=0.025,
        opd=0.475,
        probe=0.04,
        probe_monotone=0.004,
        trb=0.75 * ahead["trb"],
        trb_end=ahead["trb"],
        skd=0.75 * ahead["skd"],
        skd_anneals=0.55 / 0.9,
        trb_tokens=by_tokens("trb", 1000) - by_tokens("opd", 1000),
        skd_tokens=by_tokens("skd", 2000) - by_tokens("opd", 1000),
    )
    assert all((c.base, c.expert) == ("cold base", "expert") for c in calls.values())
    assert list(calls) == cold.Config().methods


def test_the_claims_of_estimators_are_about_the_arms_that_they_name(monkeypatch, tmp_path):
    found, calls = claims("estimators", tmp_path, monkeypatch)
    arms = [
        "opd",
        "opd_sampled",
        "opd_jsd",
        "opd_forward",
        "opd_top4_renormalised",
        "opd_top4_stopgrad",
    ]
    assert {k: float(c["ours"].split()[0]) for k, c in found.items()} == pytest.approx(
        {"raw sampled": -level("opd_top4") / 2, "raw greedy": level("opd_top4") / 2}
        | {arm: level(arm) for arm in arms},
        rel=6e-3,
    )
    assert all(
        c.measure is estimators.evaluate_both and (c.base, c.expert) == ("base 0.01", "expert 0.01")
        for c in calls.values()
    )


def test_the_claims_of_few_are_about_the_arms_that_they_name(monkeypatch, tmp_path):
    found, calls = claims("few", tmp_path, monkeypatch)
    is_about(found, opd=0.95 - level("sft"), sft=level("sft") - 0.9)
    assert all(len(c.task.train) == 24 for c in calls.values())


def test_the_claims_of_fastslow_are_of_each_seed_and_compare_sampled_tokens(monkeypatch, tmp_path):
    found, _ = claims("fastslow", tmp_path, monkeypatch)
    # Seed 0 of the slow arm is at .75 after 48.75 steps of 10 tokens, seed 1 after 53.75; both at
    # once after 18.75 steps of 12
    is_about(found, both=6, slow=1, fast=2 / 3, speed=487.5 / 225)
    assert found["speed"]["ours"].endswith("(2.2, 2.4)") and "tokens" in found["speed"]["claim"]


# ------------------------------------------------------------------------------------------------
# The commands


@pytest.mark.parametrize(
    "name, models", [(name, models) for name, models in EXPERIMENTS.items() if name != "fastslow"]
)
def test_a_quick_run_writes_figure_metrics_claims_config_and_checkpoint_and_what_the_models_answer(
    name, models, tmp_path
):
    assert check_quick(f"experiments.{name}", tmp_path, also=[*models, "samples.txt"]) == name
    assert (tmp_path / "samples.txt").read_text().count("BOS") == 3


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_help_lists_every_flag(name):
    check_help(f"experiments.{name}")


@pytest.mark.parametrize(
    "name, flags, word",
    [
        ("cold", "--arms opd", "does nothing here"),
        ("few", "--top 4", "does nothing here"),
        ("estimators", "--skd-top 4", "does nothing here"),
        ("estimators", "--group 4", "does nothing here"),
        ("few", "--trb-eps 0.1", "does nothing here"),
        ("cold", "--top 4", "does nothing here"),
        ("fastslow", "--expert-steps 9", "expert-steps"),
        ("fastslow", "--batch 20", "--group 8"),
        ("fastslow", "--n-embd 65", "n_embd 65"),
        ("few", "--batch 20", "--group 8"),
    ],
)
def test_a_mistake_in_the_flags_is_one_line_and_exit_code_2(name, flags, word, tmp_path):
    refused(f"experiments.{name}", flags.split(), tmp_path, word)


def test_a_number_that_is_none_ends_fastslow_before_it_can_spoil_the_weights(tmp_path):
    flags = "--steps 1 --sft-steps 1"
    spoils("experiments.fastslow", fastslow, "divergence", "loss", tmp_path, *flags.split())


def test_a_signal_during_the_probe_ends_the_run_at_once_and_loses_nothing(tmp_path):
    flags = "--quick --steps 1 --sft-steps 1 --expert-steps 1 --eval-prompts 2"
    cut_by_a_signal(
        "experiments.cold", cold, "continuation", 6, signal.SIGINT, tmp_path, *flags.split()
    )


def test_a_quick_run_of_fastslow_is_whole_and_its_interrupted_and_resumed_twin_the_same_to_the_bit(
    tmp_path,
):
    check_resume(
        "experiments.fastslow",
        tmp_path,
        (dict(arm="fast and slow"), dict(arm="fast")),
        "--quick",
        "--steps",
        1,
    )
    assert check_whole(tmp_path / "whole", also=["base.pt", "samples.txt"]) == "fastslow"
    assert (tmp_path / "whole" / "samples.txt").read_text().count("BOS") == 3
