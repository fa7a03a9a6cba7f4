"""experiments/replay.py: the pass that is scored against what was written with a
cache that forgets, the questions, the gradients, the claims, the command.
"""

import itertools
from functools import partial

import matplotlib.pyplot as plt
import pytest
import torch
from common import Memory, check_help, check_mistake, check_quick, check_resume, make, seeded

from electives import forget
from electives.forget import BLOCK, BLOCKS, N_FILLERS, N_KEYS, N_VALUES, STREAM, plackett_luce
from experiments import replay
from experiments.replay import ARMS, LENGTHS, ask, ends_of, said, scored, write

V = N_KEYS + N_VALUES + N_FILLERS


def small():
    return make(vocab_size=V, block_size=STREAM + 2 * max(LENGTHS))


def written(L, model=None, share=0.5, n=4):
    ids, questions, _ = ask(n, L, 6, seeded(), "cpu")
    return write(model or small(), ids, questions, share, seeded(1))


def test_questions_are_about_facts_of_the_stream_and_even_ones_where_they_should():
    for among, odd in ((6, False), (12, True)):
        ids, questions, right = ask(50, 16, among, seeded(), "cpu")
        facts = ids.view(50, BLOCKS, BLOCK)
        for row, asked, values in zip(
            *(t.tolist() for t in (facts, questions, right)), strict=True
        ):
            known = {key: value for key, value, *_ in row}
            assert [known[q] for q in asked] == values
        assert (questions % 2).any() == odd


def test_a_round_follows_every_two_answers_but_the_last():
    assert ends_of(1) == ends_of(2) == [16, 32, 48]
    assert ends_of(3) == ends_of(4) == [16, 32, 48, 52]
    assert ends_of(16)[-1] == 76 and len(ends_of(16)) == 10


def test_with_one_answer_a_text_is_the_lessons():
    model = small()
    ids, logp, rounds = written(1, model)
    policy = partial(forget.policy, generator=seeded(1))
    logits, theirs = forget.forgetful(model, ids[:, :-1], 0.5, policy)
    assert all(torch.equal(a, b) for a, b in zip(rounds, theirs, strict=True))
    wanted = logits.log_softmax(-1).gather(1, said(ids))
    assert torch.allclose(logp, wanted, atol=1e-5)


@pytest.mark.parametrize("L", LENGTHS)
def test_what_is_scored_is_what_was_written(L, monkeypatch):
    noted = []
    policy = forget.policy

    def noting(weights, cache, held, generator=None):
        scores = policy(weights, cache, held)
        noisy = scores + forget.gumbel(scores, generator)
        K = (2, 4, 6)[min(len(noted), 2)]
        noted.append(plackett_luce(scores, noisy.topk(K, dim=2).indices).sum(0))
        return noisy

    monkeypatch.setattr(forget, "policy", noting)
    model = small()
    ids, logp, rounds = written(L, model)
    ours, memory = scored(model, ids, rounds, replay=True)
    assert logp.shape == (4, L) and torch.allclose(ours, logp, atol=1e-4)
    assert len(rounds) == len(noted) == len(ends_of(L))
    assert torch.allclose(memory, sum(noted), atol=1e-3)
    blind, _ = scored(model, ids, rounds, replay=False)
    assert (blind - logp).abs().max() > 0.01


def test_rounds_keep_six_blocks_and_what_is_gone_is_gone():
    _, _, rounds = written(16)
    assert [held.shape[2] for held in rounds] == [2, 4, 6] + [6] * 7
    for i, (before, after) in enumerate(itertools.pairwise(rounds[2:])):
        rows = (held.flatten(0, 1).tolist() for held in (before, after))
        for kept, new in zip(*rows, strict=True):
            assert len(set(new)) == 6 and set(new) <= {*kept, BLOCKS + i}


def test_nothing_forgotten_is_the_models_own_pass():
    model = small()
    ids, logp, rounds = written(8, model, share=1.0)
    rounds = [torch.arange(end // BLOCK).expand(2, 4, -1) for end in ends_of(8)]
    with_masks, _ = scored(model, ids, rounds, replay=True)
    without, _ = scored(model, ids, rounds, replay=False)
    theirs = model(ids)[:, STREAM:-1:2].log_softmax(-1).gather(2, said(ids)[..., None]).squeeze(2)
    assert torch.allclose(with_masks, theirs, atol=1e-4)
    assert torch.allclose(without, theirs, atol=1e-4)


def test_the_best_answer_is_the_most_probable():
    model = small()
    ids, questions, _ = ask(4, 3, 6, seeded(), "cpu")
    best, logp, _ = write(model, ids, questions, 0.5)
    assert torch.equal(best[:, STREAM::2], questions) and torch.equal(best[:, :STREAM], ids)
    assert (logp.exp() > 1 / V).all()
    again, _, _ = write(model, ids, questions, 0.5)
    assert torch.equal(best, again)


def test_gradients_of_one_score_are_alike(monkeypatch):
    config = replay.Config(streams=2)
    model = small().requires_grad_(True)
    row = replay.compare(model, config, 4, 0, "cpu")
    assert row["replay masks"] < 1e-4 < row["no replay masks"]
    assert row["both"] < 0.999
    monkeypatch.setattr(replay, "ARMS", dict.fromkeys(ARMS, True))
    row = replay.compare(model, config, 4, 0, "cpu")
    assert [row[part] for part in replay.PARTS] == pytest.approx([1, 1, 1], abs=1e-4)


def claimed(module, config, run):
    fig, claims = module.figure(config, run)
    titles = " ".join(ax.get_title() for ax in fig.axes)
    plt.close(fig)
    return {c["id"]: (float(c["ours"].split()[0]), c["holds"]) for c in claims}, titles


def test_the_claims_of_the_comparison():
    for off, fall in ((5.0, 0.02), (0.5, -0.02)):
        run = Memory()
        for seed in (0, 1):
            for i, L in enumerate(LENGTHS):
                row = dict(answers=0.05 if off > 1 else 0.5, memory=0.5, both=0.4 - fall * i)
                arms = {"replay masks": 0.01 / off**9, "no replay masks": off}
                run.log(L=L, seed=seed, step=0, **arms, **row)
        ours, titles = claimed(replay, replay.Config(seeds=2), run)
        assert ours["length"][0] == pytest.approx(4 * fall)
        assert [holds for _, holds in ours.values()] == [off > 1] * 4
        assert f"{off:.1f} nats" in titles


def test_a_quick_run_writes_all_that_a_run_writes(tmp_path):
    assert check_quick("experiments.replay", tmp_path) == "replay"


def test_help_lists_every_flag():
    check_help("experiments.replay")


def test_a_mistake_in_the_flags_is_one_line_and_exit_code_2(tmp_path):
    check_mistake("experiments.replay", "--keep 0", tmp_path)


def test_an_interrupted_run_goes_on_to_the_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(plt.Figure, "savefig", lambda self, f, **_: f.write(b"\x89PNG"))
    marks = (dict(L=1, seed=0), dict(L=8, seed=0))
    check_resume("experiments.replay", tmp_path, marks, "--quick")
