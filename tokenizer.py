"""tokenizer.py: text to ids and back: characters, and byte-pair encoding trained from scratch.

Both have `encode`, `decode`, `n_vocab` and the id `eos`, which ends a text. Tokenizers of real
checkpoints are read by huggingface.py.
"""

import heapq
import re
from collections import Counter, defaultdict

import regex  # \p{L}: the standard library's re does not know Unicode classes; comes with tiktoken
import tiktoken

# GPT-2's split: contractions, then runs of letters, of digits, of anything else, each with the
# space before it, then space
SPLIT = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


class CharTokenizer:
    """One id per character of the alphabet, in its order; `eos` comes after the last one and
    decodes to nothing.
    """

    def __init__(self, alphabet):
        assert len(set(alphabet)) == len(alphabet), "a character stands twice in the alphabet"
        self.alphabet, self.eos, self.n_vocab = alphabet, len(alphabet), len(alphabet) + 1
        self.stop = [self.eos]
        self.index = {c: i for i, c in enumerate(alphabet)}

    def encode(self, text):
        """KeyError for a character that is not in the alphabet."""
        return [self.index[c] for c in text]

    def decode(self, ids):
        return "".join(self.alphabet[i] for i in ids if i != self.eos)


def next_pair(word, a, b, start):
    """Where in word, from start on, a is followed by b; len(word) if nowhere."""
    try:
        while word[(start := word.index(a, start)) + 1] != b:
            start += 1
        return start
    except (ValueError, IndexError):
        return len(word)


def bpe_merges(text, n_merges):
    """Byte-pair encoding (Sennrich et al., arXiv 1508.07909) over the bytes of GPT-2's pre-tokens
    -> merged byte strings, in order.

    Each step merges the most frequent adjacent pair; of equally frequent ones, the
    lexicographically greater pair of byte strings. Counts are kept up to date: a merge visits only
    the words that hold the pair, and a heap finds the next one. Only pairs with the merged token
    become more frequent, so only they are pushed; an entry whose count is out of date is put back
    with the right one. So there are a few heap operations for each pair that a merge replaces, of
    which a text has no more than bytes.
    """
    words = Counter(regex.findall(SPLIT, text))
    counts, words = list(words.values()), [[bytes([b]) for b in w.encode()] for w in words]
    # pair -> its count; pair -> the words that hold it, or once did
    pairs, where = Counter(), defaultdict(set)
    for i, w in enumerate(words):
        for pair in zip(w, w[1:]):
            pairs[pair] += counts[i]
            where[pair].add(i)
    # heapq pops the smallest: turn the order round
    descending = lambda b: tuple(255 - x for x in b) + (256,)
    entry = lambda pair: (-pairs[pair], descending(pair[0]), descending(pair[1]), pair)
    heap, merges, known = [entry(p) for p in pairs], [], {bytes([b]) for b in range(256)}
    heapq.heapify(heap)
    while heap and len(merges) < n_merges:
        count, *_, pair = heapq.heappop(heap)
        if -count != pairs[pair]:
            if pairs[pair] > 0:
                heapq.heappush(heap, entry(pair))
            continue
        a, b = pair
        merged = a + b
        if merged not in known:  # two pairs can spell the same bytes: one token, one rank
            known.add(merged)
            merges.append(merged)
        grown = set()
        for i in where.pop(pair):
            old, new, j = words[i], [], 0
            while (k := next_pair(old, a, b, j)) < len(old):
                new += old[j:k]
                j = k + 2
                pairs[pair] -= counts[i]
                # what was a pair with a or b, and is one with merged now
                beside = [((new[-1], a), (new[-1], merged))] if new else []
                beside += [((b, old[j]), (merged, old[j]))] if j < len(old) else []
                for before, after in beside:
                    pairs[before] -= counts[i]
                    pairs[after] += counts[i]
                    where[after].add(i)
                    grown.add(after)
                new.append(merged)
            words[i] = new + old[j:]
        for p in grown:
            if pairs[p] > 0:  # not merged again by the next site
                heapq.heappush(heap, entry(p))
    return merges


def train_bpe(text, vocab_size):
    """A byte-level BPE of `vocab_size` ids as a tiktoken.Encoding: 256 bytes, the merges, and
    <|endoftext|> last, its `eos`.

    A short text may run out of pairs to merge: then there are fewer ids (`n_vocab`). ValueError for
    a vocab_size below 257.
    """
    if vocab_size < 257:
        raise ValueError(
            f"a byte-level BPE needs 256 bytes and <|endoftext|>: vocab_size {vocab_size} < 257"
        )
    return byte_level(bpe_merges(text, vocab_size - 257))


# GPT-2's split: contractions, then runs of letters, of digits, of anything else, each with the
# so many spaces in a row tiktoken's regular expression can take: a million overflow its stack
RUN = 2**16


def short_runs(text):
    """Text in parts, cut in runs of more than RUN spaces: ids there may not be the library's."""
    cuts = [i for m in re.finditer(r"\s+", text) for i in range(m.start() + RUN, m.end(), RUN)]
    return [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)])]


class BPE(tiktoken.Encoding):
    def encode_ordinary(self, text):
        """The ids of a text. Its longest runs of spaces are cut: tiktoken's regular expression
        cannot take them.
        """
        ids = []
        for part in short_runs(text):
            ids += super().encode_ordinary(part)
        return ids


def byte_level(merges):
    """The tiktoken.Encoding that these merged byte strings make, in their order."""
    vocab = [bytes([b]) for b in range(256)] + merges
    encoding = BPE(
        "rollout",
        pat_str=SPLIT,
        mergeable_ranks={b: i for i, b in enumerate(vocab)},
        special_tokens={"<|endoftext|>": len(vocab)},
    )
    encoding.eos, encoding.stop = encoding.eot_token, [encoding.eot_token]
    return encoding
