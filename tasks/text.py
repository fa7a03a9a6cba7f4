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
    parts = []
    for purpose, part, least in (("train", train, train_least), ("test", test, test_least)):
        parts.append([torch.tensor(tokenizer.encode_ordinary(text)) for text in part])
        if not any(len(ids) > least for ids in parts[-1]):
            raise UserError(f"--data: no document to {purpose} on has more than {least} tokens")
    return parts


def stretches(rng, docs, B, T):
    """B random stretches of T tokens, of documents at least that long -> ids (B, T).

    A document is drawn in proportion to the places where a stretch can start. rng: numpy's.
    """
    docs = [d for d in docs if len(d) >= T]
    starts = np.array([len(d) - T + 1 for d in docs])
    rows = []
    for i in rng.choice(len(docs), B, p=starts / starts.sum()):
        first = rng.integers(starts[i])
        rows.append(docs[i][first : first + T])
    return torch.stack(rows)


def passages(docs, T, n):
    """The first n stretches of T tokens, or as many as there are -> ids (n, T).

    One of each document that is long enough, then a second of each; none overlaps another.
    """
    starts = sorted((a, i) for i, d in enumerate(docs) for a in range(0, len(d) - T + 1, T))
    return torch.stack([docs[i][a : a + T] for a, i in starts[:n]])
