"""tasks/source.py: texts are drawn as the probabilities say, and nobody beats the entropy."""

import math

import pytest
import torch
from common import seeded

from tasks import source as text


def test_pairs_are_stationary_and_probabilities_sum_to_1():
    source = text.make(0, vocab_size=12)
    assert source.p.sum(-1) == pytest.approx(1)
    assert source.pairs.sum().item() == pytest.approx(1)
    after = torch.einsum("ab,abx->bx", source.pairs, source.p)
    assert (after - source.pairs).abs().max() < 1e-9
    # a pair is as common as its first token is, and as its last token is
    assert source.pairs.sum(0) == pytest.approx(source.pairs.sum(1), abs=1e-9)


def test_what_is_drawn_comes_as_often_as_the_probabilities_say():
    source = text.make(1, vocab_size=6)
    ids = text.draw(source, seeded(), 20000, 6)
    for t in range(4):  # wherever in a text
        a, b, x = ids[:, t], ids[:, t + 1], ids[:, t + 2]
        counts = torch.bincount(a * 36 + b * 6 + x, minlength=216).double()
        expected = 20000 * (source.pairs[..., None] * source.p).flatten()
        assert counts[expected == 0].sum() == 0
        often = expected > 5
        chi2 = ((counts - expected)[often] ** 2 / expected[often]).sum()
        df = often.sum() - 1
        assert chi2 < df + 4 * (2 * df) ** 0.5


def test_half_of_a_bag_goes_with_the_last_token_alone():
    source = text.make(2, vocab_size=10, slots=8)
    halves = source.bags.sort(-1).values
    shared = source.p.min(0).values  # what every a leaves to (b, x)
    assert halves.shape == (10, 10, 8)
    assert (shared.sum(-1) >= 0.5 - 1e-12).all() and (source.p.std(0).sum(-1) > 0).all()


def test_the_entropy_is_what_a_reader_pays_who_knows_the_source_and_others_pay_more():
    source = text.make(3, vocab_size=8)
    ids = text.draw(source, seeded(), 4000, 9)
    p = source.p[ids[:, :-2], ids[:, 1:-1]]
    paid = -p.gather(2, ids[:, 2:, None]).log().mean()
    assert paid.item() == pytest.approx(text.entropy(source), abs=0.02)

    # its logits at a position are of the token after it; those at the first do not count
    def knows(x):
        first = torch.full((4000, 1, 8), 99.0)
        return torch.cat((first, source.p[x[:, :-1], x[:, 1:]].clamp(min=1e-30).log()), 1)

    assert text.excess(source, knows, ids) == pytest.approx(0, abs=1e-9)
    entropies = -torch.xlogy(p, p).sum(-1).mean().item()
    uniform = text.excess(source, lambda x: torch.zeros(*x.shape, 8), ids)
    assert uniform == pytest.approx(math.log(8) - entropies, abs=1e-6)


def test_a_source_and_its_texts_are_the_seed_s():
    one, same, other = text.make(0), text.make(0), text.make(1)
    assert torch.equal(one.bags, same.bags) and not torch.equal(one.bags, other.bags)
    a, b = text.draw(one, seeded(4), 5, 9), text.draw(one, seeded(4), 5, 9)
    assert torch.equal(a, b)
