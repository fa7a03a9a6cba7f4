"""All answers to a problem as a tree of prefixes, with a verifier's opinion of each: small enough
to hold, so that the law of a method is a vector. And three verifiers with a known fault.

    target(y) = base(y) tau(y) / sum            tau: is the whole answer y right, or how good is it
    V*(v) = E[tau | prefix v, the base goes on]

The base is a GPT (`tabulate`), or uniform.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch

FEWEST = 0.03  # tokens that the base gives less are cut


@dataclass
class Tree:
    """All prefixes of the answers, shorter ones first, siblings side by side; 0 is the empty one.

    (N,) each: the last token; the prefix without it; the base's probability of that token there;
    the verifier's value, which is tau, exactly, for whole answers.
    """

    token: np.ndarray
    parent: np.ndarray
    prior: np.ndarray
    value: np.ndarray
    starts: list  # starts[h]: where the prefixes of h tokens begin; the last one is N

    @property
    def H(self):
        """Tokens of a whole answer."""
        return len(self.starts) - 2

    def level(self, h):
        return slice(self.starts[h], self.starts[h + 1])

    @property
    def leaves(self):
        """The whole answers."""
        return self.level(self.H)

    def sum(self, x):
        """The sum of x (N,) over the children of each prefix (N,)."""
        return np.bincount(self.parent[1:], x[1:], len(self.parent))

    def tokens(self, v):
        """The tokens of a prefix, a list."""
        if v == 0:
            return []
        before = self.tokens(self.parent[v])
        return [*before, int(self.token[v])]


def reach(tree, policy):
    """The probability of each prefix (N,), if policy (N,) is that of its last token."""
    p = np.ones(len(policy))
    for h in range(1, tree.H + 1):
        rows = tree.level(h)
        p[rows] = p[tree.parent[rows]] * policy[rows]
    return p


def true_value(tree):
    """V* (N,)."""
    value = np.zeros(len(tree.prior))
    value[tree.leaves] = tree.value[tree.leaves]
    for h in range(tree.H, 0, -1):
        rows = tree.level(h)
        share = tree.prior[rows] * value[rows]
        value += np.bincount(tree.parent[rows], share, len(value))
    return value


def target(tree):
    """The law of the whole answers that is wanted (leaves,)."""
    law = reach(tree, tree.prior)[tree.leaves] * tree.value[tree.leaves]
    return law / law.sum()


def distance(p, q):
    """The total variation distance of two laws, each normalised first; 1 from nothing."""
    if p.sum() == 0 or q.sum() == 0:
        return 1.0
    p = p / p.sum()
    q = q / q.sum()
    return abs(p - q).sum() / 2


def draw_child(tree, upto, node, rng):
    """A child of each node (n,), in proportion to its weight -> (n,). upto: the weights' cumsum."""
    # The children of a node stand side by side: their weights are a piece of one long sum
    first = np.searchsorted(tree.parent[1:], node) + 1
    last = np.searchsorted(tree.parent[1:], node, side="right")
    low = upto[first - 1]
    u = low + rng.random(len(node)) * (upto[last] - low)
    return np.clip(np.searchsorted(upto, u, side="right"), first, last)


def sample_blocks(tree, policy, length, M, n, rng):
    """n answers, block by block: of M candidates for the next `length` tokens, drawn from policy
    (N,), the one of the largest value is kept -> all candidates, in order (n, M * blocks).

    length = H is best-of-n, and a single candidate is plain sampling.
    """
    upto = np.cumsum(policy)
    node = np.zeros(n, int)
    asked = []
    for h in range(0, tree.H, length):
        candidates = node.repeat(M)
        for _ in range(min(length, tree.H - h)):
            candidates = draw_child(tree, upto, candidates, rng)
        candidates = candidates.reshape(n, M)
        asked.append(candidates)
        best = tree.value[candidates].argmax(1)  # the first of equals: their order is chance
        node = candidates[np.arange(n), best]
    return np.concatenate(asked, 1)


def calls_until(asked, done, price):
    """Calls of the verifier until the first `done`, inf if there is none -> (n,).

    asked (n, m): prefixes in the order in which they are asked about. price (N,): the calls that
    one takes the first time; answers are remembered.
    """
    calls = np.full(len(asked), math.inf)
    for i in np.flatnonzero(done.any(1)):
        upto = done[i].argmax() + 1
        known = np.unique(np.append(asked[i, :upto], 0))  # the empty prefix comes first
        calls[i] = price[known].sum()
    return calls


@torch.no_grad()
def tabulate(base, verifier, prompt, H, A, tau):
    """The tree of a GPT's answers of H tokens out of the first A. prompt: ids.

    verifier: a GPT with one logit, of the value. tau: from an answer's ids to its value.
    """
    ids = torch.tensor([prompt], device=base.lm_head.weight.device)
    starts = [0, 1]
    token = [[0]]
    parent = [[0]]
    prior = [[1.0]]
    value = []
    for _ in range(H):
        parts = ids.split(4096)
        logits = [base(part)[:, -1, :A] for part in parts]
        p = torch.cat(logits).double().softmax(1)  # (prefixes, A)
        p = p * (p >= FEWEST)
        p = p / p.sum(1, keepdim=True)
        logits = [verifier(part)[:, -1, 0] for part in parts]
        value.append(torch.cat(logits).sigmoid().tolist())
        row, a = p.nonzero(as_tuple=True)  # by row: siblings side by side
        token.append(a.tolist())
        parent.append((starts[-2] + row).tolist())
        prior.append(p[row, a].tolist())
        starts.append(starts[-1] + len(row))
        ids = torch.cat([ids[row], a[:, None]], 1)  # a token longer
    answers = ids[:, len(prompt) :].tolist()
    value.append([tau(answer) for answer in answers])
    return Tree(
        np.concatenate(token),
        np.concatenate(parent),
        np.concatenate(prior),
        np.concatenate(value),
        starts,
    )


def full(A, H, tau):
    """The tree of all answers of H tokens out of A, with true values.

    tau: from how often each token stands in each whole answer (leaves, A) -> (leaves,).
    """
    starts = [(A**h - 1) // (A - 1) for h in range(H + 2)]
    index = np.arange(starts[-1])
    parent = np.maximum(index - 1, 0) // A
    token = (index - 1) % A
    count = np.zeros((len(index), A), int)
    for h in range(1, H + 1):
        rows = slice(starts[h], starts[h + 1])
        count[rows] = count[parent[rows]] + np.eye(A, dtype=int)[token[rows]]
    value = np.zeros(len(index))
    value[starts[H] :] = tau(count[starts[H] :])
    prior = np.full(len(index), 1 / A)
    tree = Tree(token, parent, prior, value, starts)
    return replace(tree, value=true_value(tree))


def no_c(count):
    """Right if the token 2 of a, b, c is not there."""
    return (count[:, 2] == 0).astype(float)


def many_ones(count):
    return np.exp(2.0 * count[:, 1])


def perturbed(H):
    """After the token a the verifier says twice the truth."""
    tree = full(3, H, no_c)
    inner = slice(1, tree.starts[H])
    tree.value[inner] *= 1 + (tree.token[inner] == 0)
    return tree


def delayed(H):
    """The verifier says what was true one token ago."""
    tree = full(2, H, many_ones)
    inner = slice(1, tree.starts[H])
    tree.value[inner] = tree.value[tree.parent[inner]]
    return tree


def noisy(H, sd, seed):
    """Each value is off by a factor of its own, whose logarithm has the standard deviation sd."""
    tree = full(3, H, no_c)
    rng = np.random.default_rng([seed, round(100 * sd)])
    inner = slice(1, tree.starts[H])
    errors = sd * rng.standard_normal(len(tree.value))
    tree.value[inner] *= np.exp(errors[inner])
    return tree
