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
    half = slots // 2
    one = zipf.expand(V, V)
    of_one = torch.multinomial(one, half, replacement=True, generator=generator)
    of_one = of_one.expand(V, V, -1)  # the same for all a
    two = zipf.expand(V * V, V)
    of_two = torch.multinomial(two, slots - half, replacement=True, generator=generator)
    of_two = of_two.view(V, V, -1)
    bags = torch.cat((of_one, of_two), -1)  # (V, V, slots)
    p = torch.zeros(V, V, V, dtype=torch.float64)
    shares = torch.full(bags.shape, 1 / slots, dtype=p.dtype)
    p.scatter_add_(2, bags, shares)
    pairs = stationary(p)
    return Source(bags, p, pairs)


def stationary(p, steps=200):
    """How often each pair comes in an endless text (V, V), by power iteration."""
    V = len(p)
    pairs = torch.ones(V, V, dtype=p.dtype)
    pairs = pairs / V**2
    for _ in range(steps):
        pairs = torch.einsum("ab,abx->bx", pairs, p)
    return pairs


def entropy(source):
    """Nats per token that nobody can save, of a reader who knows the source."""
    of_each = -torch.xlogy(source.p, source.p).sum(-1)  # (V, V)
    return (source.pairs * of_each).sum().item()


def draw(source, generator, rows, length):
    """Texts of the source -> ids (rows, length) int64. They begin anywhere: with a pair drawn as
    often as it comes in an endless text.
    """
    V = len(source.bags)
    slots = source.bags.shape[-1]
    pairs = source.pairs.flatten()
    first = torch.multinomial(pairs, rows, replacement=True, generator=generator)
    ids = torch.empty(rows, length, dtype=torch.long)
    ids[:, 0] = first // V
    ids[:, 1] = first % V
    for t in range(2, length):
        slot = torch.randint(slots, (rows,), generator=generator)
        a = ids[:, t - 2]
        b = ids[:, t - 1]
        ids[:, t] = source.bags[a, b, slot]
    return ids


@torch.no_grad()
def excess(source, model, ids):
    """How far above the entropy a model of text is: the mean KL(p || q) in nats per token.

    model: ids (B, T) -> logits (B, T, V), as GPT is. ids (B, T + 1). Where one token alone was seen
    nothing is measured: p is a pair's.
    """
    logits = model(ids[:, :-1])[:, 1:]  # (B, T - 1, V)
    logq = torch.log_softmax(logits.double(), -1).cpu()
    a = ids[:, :-2].cpu()
    b = ids[:, 1:-1].cpu()
    p = source.p[a, b]
    # what never comes has p log p = 0
    kl = torch.xlogy(p, p) - p * logq
    kl = kl.sum(-1)
    return kl.mean().item()
