"""electives/forget.py: draws without replacement by enumeration, the pass that is scored against
the cache that was sampled with, the streams, the rules of thumb, the command.
"""

import itertools
import math
from functools import partial

import matplotlib.pyplot as plt
import pytest
import torch
from common import Memory, check_help, check_mistake, check_quick, check_resume, make, seeded

from electives import forget
from electives.forget import (
    BLOCK,
    BLOCKS,
    N_KEYS,
    N_VALUES,
    ROUND,
    STREAM,
    Config,
    answer_of,
    draw,
    forgetful,
    gumbel,
    kept_after,
    memory_logp,
    plackett_luce,
    policy,
    read,
    replay_masks,
    rl_loss,
    select,
)
from engine import KVCache

V = N_KEYS + N_VALUES + forget.N_FILLERS


def small(seed=0, **choices):
    return make(seed, vocab_size=V, block_size=STREAM + BLOCKS, **choices)


def sampled(model, n=6, share=0.5, seed=0):
    """Streams, and how the policy forgot them."""
    ids, block = draw(n, seeded(seed))
    logits, rounds = forgetful(model, ids, share, partial(policy, generator=seeded(seed + 1)))
    return ids, block, logits, rounds


# --------------------------------------------------------------------------------------------------
# The task


def test_of_each_four_facts_two_have_an_even_key_and_an_even_one_is_asked_for():
    ids, block = draw(200, seeded())
    blocks = ids[:, :STREAM].view(200, BLOCKS, BLOCK)
    keys, asked = blocks[..., 0], ids[:, STREAM]
    assert ids.shape == (200, STREAM + 1) and keys.min() >= 0 and keys.max() < N_KEYS
    assert all(len(set(row)) == BLOCKS for row in keys.tolist())
    assert torch.equal((keys % 2 == 0).view(200, 3, 4).sum(2), torch.full((200, 3), 2))
    assert (asked % 2 == 0).all()
    assert torch.equal(keys.gather(1, block[:, None]).squeeze(1), asked)
    values = blocks[..., 1]
    assert values.min() == N_KEYS and values.max() == N_KEYS + N_VALUES - 1
    assert torch.equal(answer_of(ids, block), values.gather(1, block[:, None]).squeeze(1))
    assert blocks[..., 2:].min() == N_KEYS + N_VALUES and blocks[..., 2:].max() == V - 1
    assert len(set(block.tolist())) == BLOCKS, "any place may be asked for"


def test_a_round_keeps_its_share_of_all_that_was_read():
    assert kept_after(0.5) == [2, 4, 6] and kept_after(1.0) == [4, 8, 12]
    assert kept_after(0.25) == [1, 2, 3] and kept_after(0.375) == [2, 3, 4]


# --------------------------------------------------------------------------------------------------
# Draws without replacement


def test_the_probabilities_of_all_ordered_choices_sum_to_one():
    scores = torch.randn(5, generator=seeded())
    orders = torch.tensor(list(itertools.permutations(range(5), 2)))
    p = plackett_luce(scores.expand(len(orders), 5), orders).exp()
    assert p.sum().item() == pytest.approx(1)
    w = scores.exp()
    for order, ours in zip(orders.tolist(), p.tolist(), strict=True):
        a, b = order
        assert ours == pytest.approx((w[a] / w.sum() * w[b] / (w.sum() - w[a])).item(), rel=1e-5)


def test_the_best_of_noisy_scores_are_such_a_draw_chi_squared():
    scores = torch.tensor([0.5, -1.0, 1.5, 0.0])
    n = 40_000
    noisy = scores + gumbel(torch.zeros(n, 4), seeded())
    drawn = noisy.topk(2, dim=1).indices
    orders = torch.tensor(list(itertools.permutations(range(4), 2)))
    mean = n * plackett_luce(scores.expand(12, 4), orders).exp()
    seen = torch.stack([(drawn == order).all(1).sum() for order in orders])
    assert ((seen - mean) ** 2 / mean).sum() < 35, "11 degrees of freedom"


def test_what_is_not_there_is_never_drawn():
    scores = torch.tensor([0.5, -torch.inf, 1.5]).requires_grad_()
    logp = plackett_luce(scores[None], torch.tensor([[2, 0]]))
    logp.sum().backward()
    assert logp.exp().item() == pytest.approx(1 / (1 + torch.tensor(-1.0).exp().item()))
    assert scores.grad.isfinite().all() and scores.grad[1] == 0


# --------------------------------------------------------------------------------------------------
# Cache and masks


def test_the_opened_pass_is_the_models_own():
    model = small()
    ids, _ = draw(3, seeded())
    T = STREAM + 1
    masks = torch.ones(2, 3, T, T, dtype=torch.bool).tril()
    logits, weights = read(model, ids, masks)
    assert torch.allclose(logits, model(ids), atol=1e-5)
    assert torch.allclose(weights[1].sum(-1), torch.ones(3, 4, T), atol=1e-5)


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_what_is_scored_is_what_was_sampled(share):
    model = small()
    ids, _, logits, rounds = sampled(model, share=share)
    replayed, weights = read(model, ids, replay_masks(rounds))
    assert torch.allclose(replayed[:, -1], logits, atol=1e-5)
    # the choices: with the scores that the cache gave at the time
    noted = []

    def noting(w, cache, held):
        scores = policy(w, cache, held)
        kept = rounds[len(noted)]  # as before
        order = (kept[..., None] == held[:, :, None]).int().argmax(3)
        noted.append(plackett_luce(scores, order).sum(0))
        bonus = torch.arange(order.shape[2], 0, -1.0).expand(order.shape)
        return torch.zeros_like(scores).scatter(2, order, bonus)

    again, rounds_again = forgetful(model, ids, share, noting)
    assert all(torch.equal(a, b) for a, b in zip(rounds, rounds_again, strict=True))
    assert torch.allclose(again, logits)
    assert torch.allclose(sum(noted), memory_logp(weights, rounds), atol=1e-4)


def test_without_replay_masks_it_is_not():
    model = small()
    ids, _, logits, rounds = sampled(model)
    whole = torch.ones_like(replay_masks(rounds)).tril()
    assert (read(model, ids, whole)[0][:, -1] - logits).abs().max() > 0.01


def test_a_mask_shows_each_query_what_was_left_when_it_was_read():
    _, _, _, rounds = sampled(small(), n=2)
    masks = replay_masks(rounds)
    for layer, row, q, t in itertools.product(range(2), range(2), range(0, 49, 3), range(49)):
        seen = t <= q
        for i, held in enumerate(rounds):
            end = (i + 1) * ROUND
            if q >= end > t:
                seen &= t // BLOCK in held[layer, row].tolist()
        assert masks[layer, row, q, t] == seen


def test_a_round_chooses_among_the_blocks_that_are_there():
    _, _, _, rounds = sampled(small(), n=3)
    alike = [
        torch.ones(3, 4, STREAM + 1, STREAM + 1) for _ in range(2)
    ]  # all blocks weigh the same
    ways = [math.perm(4, 2), math.perm(2 + 4, 4), math.perm(4 + 4, 6)]
    logp = -2 * sum(math.log(w) for w in ways)  # of two layers
    assert memory_logp(alike, rounds).tolist() == pytest.approx([logp] * 3, rel=1e-5)


def test_slots_that_are_selected_keep_their_positions():
    model = small()
    ids, _ = draw(2, seeded())
    caches = [KVCache(model.config, 2, STREAM + 1) for _ in range(2)]
    first = [model.hidden(ids[:, :16], cache) for cache in caches]
    assert torch.equal(*first)
    for layer in range(2):  # all of them, in another order of each row and layer
        order = torch.stack([torch.randperm(16, generator=seeded(layer + r)) for r in range(2)])
        select(caches[1], layer, order)
    assert torch.allclose(
        model.hidden(ids[:, 16:20], caches[0]), model.hidden(ids[:, 16:20], caches[1]), atol=1e-5
    )
    for layer in range(2):
        select(caches[0], layer, torch.tensor([[0, 5], [3, 19]]))
    assert caches[0].extend(1)[0] == slice(20, 21)
    k = torch.zeros(2, 1, *caches[0].k[0].shape[2:])
    assert caches[0].append(0, k, k)[0].shape[1] == 3, "two that were kept, and the new one"


# --------------------------------------------------------------------------------------------------
# The loss, and what rivals keep


def gradient(model, loss):
    model.requires_grad_(True).zero_grad()
    loss().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def test_the_loss_is_that_of_the_answer_and_of_all_that_was_kept():
    model = small()
    ids, block, logits, rounds = sampled(model)
    answer = answer_of(ids, block)
    advantage = torch.tensor([1.0, -0.5, 0.25, 0.0, -1.0, 2.0])
    logp = logits.log_softmax(-1).gather(1, answer[:, None]).squeeze(1)
    kept = memory_logp(read(model, ids, replay_masks(rounds))[1], rounds)
    for memory_loss, score in ((False, logp), (True, logp + kept)):
        loss = rl_loss(model, ids, answer, rounds, advantage, memory_loss, replay=True)
        assert loss.item() == pytest.approx(-(advantage * score).mean().item(), abs=1e-4)
    part = partial(rl_loss, model, ids, answer, rounds, torch.zeros(6), True, True)
    assert gradient(model, part).abs().max() == 0, "equal rewards teach nothing"


def test_the_rules_of_thumb_keep_what_they_say():
    model = small()
    ids, _ = draw(4, seeded())

    def rounds_of(name):
        return forgetful(model, ids, 0.5, forget.RULES[name])[1]

    assert (rounds_of("recency")[-1].sort(2).values == torch.arange(6, 12)).all()
    attention = forgetful(model, ids, 0.5, policy)[1]
    assert torch.equal(rounds_of("attention")[0], attention[0])
    # the first round: norms of the first layer's keys, by hand
    block = model.blocks[0]
    x = block.norm1(model.wte(ids[:, :ROUND]))
    k = block.attn.qkv(x).chunk(3, dim=2)[1].unflatten(2, (4, -1))  # turning keeps norms
    norms = k.norm(dim=3).mean(2).view(4, 4, BLOCK).mean(2)  # (rows, blocks)
    smallest = norms.topk(2, largest=False).indices.sort(1).values
    assert torch.equal(rounds_of("key norm")[0][0].sort(1).values, smallest)
    assert len(set(map(tuple, rounds_of("random")[-1].flatten(0, 1).tolist()))) > 1


def test_measuring_counts_right_answers_and_needed_blocks():
    model = small()
    ids, block = test = draw(64, seeded())
    row = forget.measure(model, 1.0, test)
    assert row["needed"] == [1.0, 1.0], "nothing was forgotten"
    right = (model(ids)[:, -1].argmax(1) == answer_of(ids, block)).float().mean()
    assert row["accuracy"] == pytest.approx(right.item())
    needed = forget.measure(model, 0.5, test, forget.recency)["needed"]
    assert needed == pytest.approx([(block >= 6).float().mean().item()] * 2)


# --------------------------------------------------------------------------------------------------
# The claims, from rows


def told(learned=0.96, others=None, layer=0.97):
    """A run of two seeds whose arms end at these accuracies."""
    ends = {"learned": learned, "no memory loss": 0.55, "no replay masks": 0.9, **(others or {})}
    ends |= dict(recency=0.54, attention=0.52, random=0.5, **{"key norm": 0.58})
    ends |= others or {}
    run = Memory()
    for seed, (arm, end) in itertools.product((0, 1), ends.items()):
        if arm in forget.ARMS:
            for step, y in ((0, 0.5), (120, end)):
                row = dict(accuracy=y, needed=[0.5, layer if step else 0.5])
                run.log(phase="rl", arm=arm, seed=seed, step=step, **row)
        if arm in ("learned", *forget.RULES):
            for share in forget.SHARES:
                where = dict(phase="budget", arm=arm, seed=seed, step=120, share=share)
                run.log(**where, accuracy=end if share == 0.5 else 0.1)
    return run


def claimed(run):
    fig, claims = forget.figure(Config(seeds=2), run)
    titles = " ".join(ax.get_title() for ax in fig.axes)
    plt.close(fig)
    return {c["id"]: (float(c["ours"].split()[0]), c["holds"]) for c in claims}, titles


def test_the_claims_compare_what_they_say():
    ours, titles = claimed(told())
    assert {k: v for k, (v, _) in ours.items()} == pytest.approx(
        dict(learned=0.96, rules=0.58, memory=0.41, replay=0.06, needed=0.97), abs=1e-3
    )
    assert all(holds for _, holds in ours.values())
    assert "learned 0.96, best rule 0.58" in titles and "+0.41" in titles and "0.97" in titles


def test_a_model_that_learns_nothing_keeps_no_claim():
    others = dict.fromkeys(("no memory loss", "no replay masks"), 0.5)
    ours, _ = claimed(told(0.5, {**others, "key norm": 0.7}, layer=0.5))
    assert not any(holds for _, holds in ours.values())


# --------------------------------------------------------------------------------------------------
# The command


def test_a_quick_run_writes_figure_samples_metrics_claims_config_and_checkpoint(tmp_path):
    assert check_quick("electives.forget", tmp_path, also=("samples.txt",)) == "forget"


def test_help_lists_every_flag():
    check_help("electives.forget")


@pytest.mark.parametrize("flags", ["--keep 0", "--keep 1.5", "--steps 0", "--blocks 3"])
def test_a_mistake_in_the_flags_is_one_line_and_exit_code_2(flags, tmp_path):
    check_mistake("electives.forget", flags, tmp_path)


def test_an_interrupted_run_goes_on_to_the_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(plt.Figure, "savefig", lambda self, f, **_: f.write(b"\x89PNG"))
    marks = (dict(phase="rl", arm="no memory loss", step=1), dict(phase="budget", arm="random"))
    check_resume("electives.forget", tmp_path, marks, "--quick")
