"""maps.py: documents to read: each follows a random map of 32 tokens, a permutation of its own.

With probability .9 the next token is where the map leads, with probability .1 it is any. Nothing is
asked, so this is no task for --task.
"""

import math

import numpy as np
import torch

V = 32  # tokens
FOLLOW = 0.9


def floor():
    """The entropy of the next token for who knows the map, in nats."""
    p = FOLLOW + (1 - FOLLOW) / V  # a jump may land where the map leads
    q = (1 - FOLLOW) / V
    return -p * math.log(p) - (V - 1) * q * math.log(q)


def documents(rng, B, T):
    """B documents of T tokens -> ids (B, T). rng: numpy's.

    Each has a random permutation of its own, which it follows with probability FOLLOW; else any
    token comes next.
    """
    successor = rng.random((B, V)).argsort(1)  # (B, V): the maps
    ids = rng.integers(V, size=(B, T))
    rows = np.arange(B)
    follows = rng.random((B, T)) < FOLLOW
    for t in range(1, T):
        ids[:, t] = np.where(follows[:, t], successor[rows, ids[:, t - 1]], ids[:, t])
    return torch.from_numpy(ids)
