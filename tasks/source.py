"""source.py: endless text of known entropy, for models of text. Nothing is asked, so this is no
task for --task.

Each pair of tokens (a, b) has a bag of tokens, one of which, drawn evenly, comes next. Half of the
bag goes with b alone, half with the pair: there is something to learn from one token, more from
two, and nothing from three. Bags are filled by Zipf's law, so that most pairs are rare.

As all probabilities are known, so are the entropy, which no model can go below, and how far above
it a model is: E[-log q] = entropy + E[KL(p || q)], which has no noise of the drawn tokens in it.
"""

from dataclasses import dataclass

import torch


@dataclass
class Source:
    bags: torch.Tensor  # (V, V, SLOTS) int64: what may follow the tokens a, b
    p: torch.Tensor  # (V, V, V): probability of the next token
    pairs: torch.Tensor  # (V, V): how often a pair comes in an endless text


def make(seed, vocab_size=64, slots=8):
    """A Source, drawn by the seed."""
    generator = torch.Generator().manual_seed(seed)
    V = vocab_size
    zipf = 1 / torch.arange(1, V + 1, dtype=torch.float64)
    of_one = torch.multinomial(zipf.expand(V, V), slots // 2, True, generator=generator)
    of_two = torch.multinomial(zipf.expand(V * V, V), slots - slots // 2, True, generator=generator)
    one = of_one[:, : slots // 2].expand(V, V, -1)  # (V, V, slots / 2): the same for all a
    bags = torch.cat((one, of_two.view(V, V, -1)), -1)
    p = torch.zeros(V, V, V, dtype=torch.float64)
    p.scatter_add_(2, bags, torch.full(bags.shape, 1 / slots, dtype=torch.float64))
    return Source(bags, p, stationary(p))


def stationary(p, steps=200):
    """How often each pair comes in an endless text (V, V), by power iteration."""
    V = len(p)
    pairs = torch.full((V, V), 1 / V**2, dtype=p.dtype)
    for _ in range(steps):
        pairs = torch.einsum("ab,abx->bx", pairs, p)
    return pairs


def entropy(source):
    """Nats per token that nobody can save, of a reader who knows the source."""
    return -(source.pairs[..., None] * torch.xlogy(source.p, source.p)).sum().item()


def draw(source, generator, rows, length):
    """Texts of the source -> ids (rows, length) int64. They begin anywhere: with a pair drawn as
    often as it comes in an endless text.
    """
    V, slots = len(source.bags), source.bags.shape[-1]
    first = torch.multinomial(source.pairs.flatten(), rows, True, generator=generator)
    ids = torch.empty(rows, length, dtype=torch.long)
    ids[:, 0] = first // V
    ids[:, 1] = first % V
    for t in range(2, length):
        slot = torch.randint(slots, (rows,), generator=generator)
        ids[:, t] = source.bags[ids[:, t - 2], ids[:, t - 1], slot]
    return ids


def excess(source, ids, logq):
    """How far above the entropy a reader is: the mean KL(p || q) in nats per token.

    ids (B, T + 1); logq (B, T, V), its log-probabilities of the token after each of the first T.
    Where one token alone was seen nothing is measured: p is a pair's.
    """
    p = source.p[ids[:, :-2], ids[:, 1:-1]]  # (B, T - 1, V)
    # what never comes has p log p = 0
    kl = torch.xlogy(p, p) - p * logq[:, 1:].double()
    return kl.sum(-1).mean().item()
