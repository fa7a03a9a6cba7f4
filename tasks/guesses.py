"""The p^k model (Setlur et al., arXiv 2506.09026, Section 4): a softmax table instead of a network,
whose success, length and entropy are known without sampling.

An episode draws guesses, each by the row of the one before, until one is right or it draws `stop`.
Of its actions the first `right` are right, those up to K - 1 wrong, and K is stop.
"""

import numpy as np
import torch


def pk_start(K=30, right=1, stop=1.5, low=-3.0, seed=0):
    """Logits (K, K + 1) float64 of the next action given the last: stop has no row. The first
    action is nobody's choice (`pk_sample`).
    """
    rng = np.random.default_rng(seed)
    M = torch.as_tensor(rng.uniform(-0.3, 0.3, (K, K + 1)))
    M[:, :right] = low
    M[:, K] = stop
    return M


def pk_sample(M, right, budget, n, rng):
    """n episodes of at most `budget` draws, of which the first is uniform over the wrong actions
    whatever M is (the paper's pi_0) -> draws (3, N): episode, last, next; success (n,); lengths
    (n,), the first draw included.
    """
    K = len(M)
    cdf = M.softmax(-1).cumsum(-1).numpy()
    last = rng.integers(right, K, n)
    alive = np.arange(n)  # the episodes that go on
    draws = []
    success = np.zeros(n, bool)
    lengths = np.ones(n, int)
    for _ in range(budget - 1):
        # inversion; rounding must not find an action after stop
        u = rng.random(len(alive))[:, None]  # (alive, 1)
        before = last[alive]
        below = u > cdf[before]  # (alive, K + 1)
        action = np.minimum(below.sum(1), K)
        draws.append(np.stack((alive, before, action)))
        lengths[alive] += 1
        last[alive] = action
        hit = action < right
        success[alive] = hit
        alive = alive[~hit & (action < K)]
    return np.concatenate(draws, 1), success, lengths


def pk_sums(M, draws, weight):
    """The weights (n,) of the episodes, summed over the draws of each (last, next): (K, K + 1). All
    that a table's gradient needs of them.
    """
    episode, last, action = draws
    sums = np.zeros(M.shape)
    np.add.at(sums, (last, action), weight[episode])
    return torch.as_tensor(sums)


def pk_gradient(M, sums):
    """sum A grad log pi over the draws, by d log pi(a) / dM_b = 1[a = b] - pi_b."""
    total = sums.sum(1, keepdim=True)  # (K, 1)
    return sums - total * M.softmax(-1)


def pk_exact(M, right, budget):
    """Success, entropy per draw of the table (nats), draws per episode, and exp of the entropy of
    which right action it was. No sampling.
    """
    p = M.softmax(-1)  # (K, K + 1)
    K = len(M)
    last = torch.full((K,), 1 / (K - right), dtype=M.dtype)  # the probability of each last action
    entropy = torch.special.entr(p).sum(1)  # (K,)
    draws = 1.0
    nats = 0.0
    found = torch.zeros(right, dtype=M.dtype)
    for _ in range(budget - 1):
        last[:right] = 0  # found: the episode is over
        draws += last.sum().item()
        nats += (last @ entropy).item()
        found = found + last @ p[:, :right]
        last = last @ p[:, :K]
    success = found.sum()
    share = found / success
    different = torch.special.entr(share).sum().exp()
    return success.item(), nats / (draws - 1), draws, different.item()
