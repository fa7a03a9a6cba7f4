"""text.py: documents to read, for models of text: split, in tokens, and cut. Nothing is asked, so
this is no task for --task.
"""

import numpy as np
import torch

from experiment import UserError
from tokenizer import train_bpe


def split(texts, vocab_size, train_least, test_least):
    """Documents in tokens -> those to train on, those to test on: two lists of ids (n,).

    Every fifth is tested on, or the last fifth of the only one; the BPE is trained on the others.
    UserError if no document of one of them has more than so many tokens.
    """
    if len(texts) > 1:
        train = [text for i, text in enumerate(texts) if i % 5]
        test = texts[::5]
    else:
        cut = len(texts[0]) * 4 // 5
        train = [texts[0][:cut]]
        test = [texts[0][cut:]]
    tokenizer = train_bpe("".join(train), vocab_size)
    train_ids = [torch.tensor(tokenizer.encode_ordinary(text)) for text in train]
    test_ids = [torch.tensor(tokenizer.encode_ordinary(text)) for text in test]
    for purpose, docs, least in (
        ("train", train_ids, train_least),
        ("test", test_ids, test_least),
    ):
        longest = max(len(ids) for ids in docs)
        if longest <= least:
            raise UserError(f"--data: no document to {purpose} on has more than {least} tokens")
    return train_ids, test_ids


def stretches(rng, docs, B, T):
    """B random stretches of T tokens, of documents at least that long -> ids (B, T).

    A document is drawn in proportion to the places where a stretch can start. rng: numpy's.
    """
    docs = [ids for ids in docs if len(ids) >= T]
    starts = np.array([len(ids) - T + 1 for ids in docs])  # how many there are in each
    share = starts / starts.sum()
    picks = rng.choice(len(docs), B, p=share)
    rows = []
    for i in picks:
        first = rng.integers(starts[i])
        row = docs[i][first : first + T]
        rows.append(row)
    return torch.stack(rows)  # (B, T)


def passages(docs, T, n):
    """The first n stretches of T tokens, or as many as there are -> ids (n, T).

    One of each document that is long enough, then a second of each; none overlaps another.
    """
    starts = []
    for i, ids in enumerate(docs):
        for first in range(0, len(ids) - T + 1, T):
            starts.append((first, i))
    starts.sort()  # the first passage of every document, then the second ones
    return torch.stack([docs[i][first : first + T] for first, i in starts[:n]])
