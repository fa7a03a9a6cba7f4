"""experiments/replay_rl.py: the loss against the lesson's and against its parts, what is measured,
the runs that are made, the claims, the command.
"""

import copy

import matplotlib.pyplot as plt
import pytest
import torch
from common import Memory, check_help, check_mistake, check_quick, check_resume, make, seeded

from electives import forget
from electives.forget import BLOCK, BLOCKS, N_FILLERS, N_KEYS, N_VALUES, STREAM
from experiments import replay, replay_rl
from experiments.replay_rl import ARMS, EVEN, FASTER, HALF, LENGTHS, LR, WITH, WITHOUT, Config

V = N_KEYS + N_VALUES + N_FILLERS


def small():
    model = make(vocab_size=V, block_size=STREAM + 2 * max(LENGTHS))
    return model.requires_grad_(True)


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(replay_rl, "LENGTHS", (1, 2))
    monkeypatch.setattr(replay_rl, "LONGEST", 2)


def batch_of(model, L, keep=0.5):
    """A batch whose advantages are no zeros: an untrained model is hardly ever right."""
    ids, logp, rounds, reward, _ = replay.practise(
        model, Config(streams=1, keep=keep), L, seeded(), "cpu"
    )
    return ids, logp, rounds, reward, torch.randn(len(ids), generator=seeded(1))


def stepped(base, batch, arm):
    model = copy.deepcopy(base)
    loss, _ = replay_rl.policy_loss(model, batch, arm)
    forget.step_on(forget.optimizer_of(model, 1e-2), loss)
    return torch.cat([p.flatten() for p in model.parameters()])


# --------------------------------------------------------------------------------------------------
# The loss


def test_where_nothing_is_forgotten_both_arms_take_the_same_step_to_the_bit():
    base = small()
    start = torch.cat([p.flatten() for p in base.parameters()])
    batch = batch_of(base, 1, keep=1.0)
    masks, none, half = (stepped(base, batch, arm) for arm in (WITH, WITHOUT, HALF))
    assert not torch.equal(masks, start) and torch.equal(masks, none)
    assert torch.allclose(masks, half, atol=1e-3), "two passes: the same but for rounding"
    batch = batch_of(base, 1)
    assert not torch.equal(stepped(base, batch, WITH), stepped(base, batch, WITHOUT))


@pytest.mark.parametrize("arm", [WITH, WITHOUT])
def test_with_one_answer_the_loss_is_the_lessons(arm):
    model = small()
    ids, _, rounds, _, advantage = batch = batch_of(model, 1)
    loss, _ = replay_rl.policy_loss(model, batch, arm)
    said = ids[:, STREAM + 1]
    theirs = forget.rl_loss(model, ids[:, :-1], said, rounds, advantage, True, arm == WITH)
    assert loss.item() == pytest.approx(theirs.item(), rel=1e-5)


def test_each_arm_has_the_masks_where_it_says():
    model = small()
    ids, sampled, rounds, _, advantage = batch = batch_of(model, 4)
    answers, kept = {}, {}
    for replayed in (True, False):
        answers[replayed], kept[replayed] = replay.scored(model, ids, rounds, replayed)
    assert (kept[True] - kept[False]).abs().max() > 0.01
    for arm, first, second in ((WITH, 1, 1), (WITHOUT, 0, 0), (HALF, 1, 0)):
        loss, off = replay_rl.policy_loss(model, batch, arm)
        logp = answers[first].sum(1) + kept[second]
        assert loss.item() == pytest.approx(-(advantage * logp).mean().item(), rel=1e-5)
        wanted = (answers[first] - sampled).abs().mean().item()
        assert off.item() == pytest.approx(wanted, abs=1e-6)
        assert off < 1e-4 if first else off > 0.01


# --------------------------------------------------------------------------------------------------
# What is measured


def test_measuring_counts_right_answers_facts_that_are_kept_and_what_a_whole_cache_knows():
    model, L, n = small(), 4, 32
    test = ids, questions, right = replay.ask(n, L, EVEN, seeded(), "cpu")
    text, _, rounds = replay.write(model, ids, questions, 0.5)
    row = replay_rl.measure(model, Config(), test)
    hits = [text[r, STREAM + 2 * i + 1] == right[r, i] for r in range(n) for i in range(L)]
    assert row["accuracy"] == pytest.approx(sum(hits).item() / (n * L))
    kept = [
        block < BLOCKS and ids[r, BLOCK * block].item() % 2 == 0
        for r in range(n)
        for block in rounds[-1][-1, r].tolist()
    ]
    assert row["kept"] == pytest.approx(sum(kept) / (EVEN * n))
    # a pass of the model's own, answer by answer
    known = 0
    for i in range(L):
        seen = replay.text(ids, questions, right)[:, : STREAM + 2 * i + 1]
        known += (model(seen)[:, -1].argmax(1) == right[:, i]).sum().item()
    assert row["whole"] == pytest.approx(known / (n * L))


def test_arms_share_the_base_and_the_first_streams(short, monkeypatch):
    base, seen = small(), []
    practise = replay.practise

    def noting(model, config, L, generator, device):
        batch = practise(model, config, L, generator, device)
        seen.append((L, batch[0][:, : STREAM + 1]))
        return batch

    monkeypatch.setattr(replay, "teach", lambda *_: base)
    monkeypatch.setattr(replay, "practise", noting)
    run = Memory()
    run.silent = True
    before = copy.deepcopy(base.state_dict())
    config = Config(streams=1, steps=2, trial=1, test=2)
    models = replay_rl.train(config, run, 0, "cpu")
    assert list(models) == ["base", *ARMS]
    assert all(torch.equal(p, before[name]) for name, p in base.state_dict().items())
    taken = {}
    for row in run.rows:
        taken.setdefault((row["L"], row["arm"], row["lr"]), []).append(row["step"])
    assert taken == {
        **{(L, arm, LR): [0, 1, 2] for L in (1, 2) for arm in (WITH, WITHOUT)},
        (2, HALF, LR): [0, 1, 2],
        **{(2, arm, lr): [0, 1] for lr in FASTER for arm in (WITH, WITHOUT)},
    }
    for L, starts in ((1, 2), (2, 7)):
        first = next(text for length, text in seen if length == L)
        assert sum(length == L and torch.equal(text, first) for length, text in seen) == starts


# --------------------------------------------------------------------------------------------------
# The claims, from rows


def told(low, end, half, heals):
    """Two seeds. low: accuracy in the middle, without masks; end: at last; half: of that arm."""
    run = Memory()
    for seed in (0, 1):
        for L in LENGTHS:
            long = L > 4
            for arm, lr in [(a, LR) for a in ARMS] + [(a, r) for r in FASTER for a in ARMS]:
                last = {WITH: 0.7, WITHOUT: end if long else 0.7 - 0.01 * L**2, HALF: half}[arm]
                middle = last if arm == WITH else low
                if lr == FASTER[-1]:
                    middle = last = 0.1
                for step in range(0, 141 if lr == LR else 61, 20):
                    accuracy = 0.5 if step == 0 else middle if step < 100 else last
                    # on average, the last three are as `last` says
                    accuracy += (arm == WITH) * {100: -0.06, 140: 0.06}.get(step, 0)
                    off = 5.0 if long or step < 70 else 5.0 * heals
                    # seeds are level apart: pairs are not
                    row = dict(accuracy=accuracy + seed * 0.1, mismatch=off)
                    run.log(L=L, arm=arm, lr=lr, seed=seed, step=step, **row)
                    for between in range(step + 1, step + 20 if lr == LR else 0):
                        run.log(L=L, arm=arm, lr=lr, seed=seed, step=between, mismatch=off)
    return run


def claimed(run):
    fig, claims = replay_rl.figure(Config(seeds=2), run)
    titles = " ".join(ax.get_title() for ax in fig.axes)
    plt.close(fig)
    return {c["id"]: (float(c["ours"].split()[0]), c["holds"]) for c in claims}, titles


def test_the_claims_compare_what_they_say():
    ours, titles = claimed(told(low=0.3, end=0.2, half=0.65, heals=0.1))
    assert {id: x for id, (x, _) in ours.items()} == pytest.approx(
        {
            "no masks 0.0003": -0.3,
            "no masks 0.001": -0.2,
            "no masks 0.003": -0.4,
            "masks 0.003": -0.4,
            "gap": 0.5,
            "length": 0.49,
            "answers": 0.45,
            "rate": 0.0,
            "best": 0.4,
            "heals": -0.9,
        },
        abs=1e-3,
    )
    assert [id for id, (_, holds) in ours.items() if not holds] == ["rate"], "a tie is none"
    assert "+0.01 at 1 answer, +0.50 at 16" in titles and "end over start: 0.10 at 1" in titles
    assert "no masks: its lowest after the start is -0.30" in titles


def test_where_masks_make_no_difference_no_claim_holds_but_that_of_the_high_rate():
    ours, _ = claimed(told(low=0.7, end=0.7, half=0.7, heals=1.0))
    assert {id for id, (_, holds) in ours.items() if holds} == {"no masks 0.003", "masks 0.003"}


def test_a_collapse_on_one_seed_alone_is_none():
    run = told(low=0.3, end=0.6, half=0.7, heals=1.0)
    for row in run.rows:
        if row["seed"] == 1 and row["arm"] == WITHOUT and "accuracy" in row and row["step"]:
            row["accuracy"] = max(row["accuracy"], 0.65)
    ours, _ = claimed(run)
    assert ours["no masks 0.0003"] == (pytest.approx(0.05), False)


# --------------------------------------------------------------------------------------------------
# The command


def test_a_quick_run_writes_all_that_a_run_writes(tmp_path):
    assert check_quick("experiments.replay_rl", tmp_path, also=("samples.txt",)) == "replay_rl"


def test_help_lists_every_flag():
    check_help("experiments.replay_rl")


@pytest.mark.parametrize("flags", ["--steps 0", "--keep 0", "--lr 1e-3"])
def test_a_mistake_in_the_flags_is_one_line_and_exit_code_2(flags, tmp_path):
    check_mistake("experiments.replay_rl", flags, tmp_path)


def test_an_interrupted_run_goes_on_to_the_bit(short, tmp_path, monkeypatch):
    monkeypatch.setattr(plt.Figure, "savefig", lambda self, f, **_: f.write(b"\x89PNG"))
    marks = (dict(L=1, arm=WITHOUT, step=1), dict(L=2, arm=HALF, step=1))
    check_resume("experiments.replay_rl", tmp_path, marks, "--quick", "--steps", "2")
