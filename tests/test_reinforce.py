"""reinforce.py, the first lesson: its losses against closed forms and the next lesson's step."""

from types import SimpleNamespace

import pytest
import torch
from common import Memory
from test_grpo import REWARDS, TASK, close, flat, policy, with_row

import grpo
import reinforce
import tasks
from tasks.addition import demonstrate, prompt


def config(**choices):
    return reinforce.Config(**{**dict(size=2, steps=1, warm_up=1), **choices})


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(reinforce, "PROBLEMS", 4)
    monkeypatch.setattr(reinforce, "GROUP", 4)
    monkeypatch.setattr(reinforce, "held_out", lambda *_: dict(success=0.5))


def test_a_step_is_that_of_the_next_lesson_with_the_groups_mean_no_ratio_and_all_tokens_alike(
    monkeypatch,
):
    answer, seen, run = reinforce.answer, [], Memory()

    def judged(*how):
        rollout, texts, _ = answer(*how)
        seen.append(rollout)
        return rollout, texts, REWARDS

    monkeypatch.setattr(reinforce, "answer", judged)
    trained = reinforce.reinforce(config(), TASK, run, 0, policy())
    choices = with_row(monkeypatch, advantage="mean", ratio="none", aggregation="token")
    same = policy()
    still = torch.optim.SGD(same.parameters(), 0.0)
    row = grpo.update(same, None, still, seen[0], REWARDS, choices, 16, torch.Generator())
    assert run.rows[-1]["loss"] == pytest.approx(row["loss"], rel=1e-4) and abs(row["loss"]) > 1e-3
    assert close(flat(trained, gradient=True), flat(same, gradient=True), 1e-4)
    assert not torch.equal(flat(trained), flat(policy()))
    assert run.rows[-1]["reward"] == pytest.approx(REWARDS.mean().item())


def test_imitation_is_the_mean_over_the_demonstrations_tokens_the_end_included(monkeypatch):
    losses, texts, padded = [], [], tasks.padded
    monkeypatch.setattr(reinforce, "descend", lambda _, loss: losses.append(loss.item()))
    monkeypatch.setattr(tasks, "padded", lambda pairs, t: texts.extend(pairs) or padded(pairs, t))
    model = reinforce.imitate(config(), TASK, Memory(), 0, "cpu")  # took no step
    encode, logps = TASK.tokenizer.encode, []
    for question, text in texts:
        q, a = encode(question), [*encode(text), TASK.tokenizer.eos]
        logp = model(torch.tensor([q + a]))[0].log_softmax(-1)
        logps += [logp[len(q) - 1 + i, token].item() for i, token in enumerate(a)]
    assert losses == pytest.approx([-sum(logps) / len(logps)], rel=1e-4) and len(texts) == 32


def test_held_out_problems_are_never_trained_on_and_each_seed_has_its_own(monkeypatch):
    shown, asked = {}, {}
    watched = SimpleNamespace(**vars(TASK))
    watched.demonstrate = lambda rng, p: shown[seed].append(p) or demonstrate(rng, p)
    answer = reinforce.answer
    monkeypatch.setattr(
        reinforce, "answer", lambda m, t, ps, *how: asked[seed].extend(ps) or answer(m, t, ps, *how)
    )
    for seed in (0, 1):
        shown[seed], asked[seed] = [], []
        base = reinforce.imitate(config(warm_up=4), watched, Memory(), seed, "cpu")
        reinforce.reinforce(config(steps=9), watched, Memory(), seed, base)
    for problems in (*shown.values(), *asked.values()):
        assert len(problems) > 30 and not any(tasks.held_out(prompt(p)) for p in problems)
    assert shown[0] != shown[1] and asked[0] != asked[1]
