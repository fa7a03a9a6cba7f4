"""tokenizer.py: text to ids and back: characters, byte-pair encoding trained from scratch, and that
of a real checkpoint, whose file huggingface.py reads.

All have `encode`, `decode`, `n_vocab` and the id `eos`, which ends a text.
"""

import heapq
import re
import unicodedata
from collections import Counter, defaultdict
from itertools import pairwise

import regex  # \p{L}: the standard library's re does not know Unicode classes; comes with tiktoken
import tiktoken

from experiment import UserError

# GPT-2's split: contractions, then runs of letters, of digits, of anything else, each with the
# space before it, then space
SPLIT = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


class CharTokenizer:
    """One id per character of the alphabet, in its order; `eos` comes after the last one and
    decodes to nothing.
    """

    def __init__(self, alphabet):
        if twice := [c for c in alphabet if alphabet.count(c) > 1]:
            raise UserError(f"{twice[0]!r} stands twice in the alphabet")
        self.alphabet = alphabet
        self.index = {c: i for i, c in enumerate(alphabet)}
        self.eos = len(alphabet)
        self.stop = [self.eos]
        self.n_vocab = len(alphabet) + 1

    def encode(self, text):
        """UserError for a character that is not in the alphabet."""
        try:
            return [self.index[c] for c in text]
        except KeyError as e:
            raise UserError(f"{e} is not in the alphabet (text {text!r})") from None

    def decode(self, ids):
        return "".join(self.alphabet[i] for i in ids if i != self.eos)


def next_pair(word, a, b, start):
    """Where in word, from start on, a is followed by b; len(word) if nowhere."""
    try:
        while True:
            start = word.index(a, start)
            if word[start + 1] == b:
                return start
            start += 1
    except (ValueError, IndexError):  # there is no further a; the a found is the last token
        return len(word)


def merge(word, a, b):
    """Join each a, b of a word into one token -> the new word, the pairs that are gone, and those
    that have come: one for each place where they stood, or stand.
    """
    new, gone, come, start = [], [], [], 0
    while (i := next_pair(word, a, b, start)) < len(word):
        new += word[start:i]
        start = i + 2
        gone.append((a, b))
        if new:  # the neighbour on the left
            gone.append((new[-1], a))
            come.append((new[-1], a + b))
        if start < len(word):  # the one on the right
            gone.append((b, word[start]))
            come.append((a + b, word[start]))
        new.append(a + b)
    return new + word[start:], gone, come


def descending(token):
    """A key that sorts byte strings the other way round: the greatest first."""
    return (*(255 - byte for byte in token), 256)


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
    # 1. Cut the text into words, and each word, once, into bytes
    counted = Counter(regex.findall(SPLIT, text))
    counts = list(counted.values())
    words = [[bytes([byte]) for byte in word.encode()] for word in counted]
    # 2. Count the pairs
    pairs = Counter()
    where = defaultdict(set)  # pair -> the words that hold it, or once did
    for i, word in enumerate(words):
        for pair in pairwise(word):
            pairs[pair] += counts[i]
            where[pair].add(i)

    def entry(pair):  # the smallest one comes first
        return (-pairs[pair], descending(pair[0]), descending(pair[1]), pair)

    heap = [entry(pair) for pair in pairs]
    heapq.heapify(heap)
    # 3. Merge
    merges = []
    known = {bytes([byte]) for byte in range(256)}
    while heap and len(merges) < n_merges:
        count, *_, pair = heapq.heappop(heap)
        if -count != pairs[pair]:  # out of date
            if pairs[pair] > 0:
                heapq.heappush(heap, entry(pair))
            continue
        token = pair[0] + pair[1]
        if token not in known:  # two pairs can spell the same bytes: one token, one rank
            known.add(token)
            merges.append(token)
        grown = set()
        for i in where.pop(pair):
            words[i], gone, come = merge(words[i], *pair)
            for old in gone:
                pairs[old] -= counts[i]
            for new in come:
                pairs[new] += counts[i]
                where[new].add(i)
            grown.update(come)
        for new in grown:
            if pairs[new] > 0:  # not gone again at the next place
                heapq.heappush(heap, entry(new))
    return merges


def train_bpe(text, vocab_size):
    """A byte-level BPE of `vocab_size` ids as a tiktoken.Encoding: 256 bytes, the merges, and
    <|endoftext|> last, its `eos`.

    A short text may run out of pairs to merge: then there are fewer ids (`n_vocab`). ValueError for
    a vocab_size below 257.
    """
    if vocab_size < 257:
        raise ValueError(f"vocab_size {vocab_size} < 257: 256 bytes and <|endoftext|>")
    return byte_level(bpe_merges(text, vocab_size - 257))


# so many spaces in a row tiktoken's regular expression can take: a million overflow its stack
RUN = 2**16


def short_runs(text):
    """Text in parts, cut in runs of more than RUN spaces: ids there may not be the library's."""
    runs = re.finditer(r"\s+", text)
    cuts = [i for run in runs for i in range(run.start() + RUN, run.end(), RUN)]
    return [text[i:j] for i, j in pairwise([0, *cuts, len(text)])]


class BPE(tiktoken.Encoding):
    def encode_ordinary(self, text):
        """The ids of a text, cut in its longest runs of spaces."""
        ids = []
        for part in short_runs(text):
            ids += super().encode_ordinary(part)
        return ids


def byte_level(merges):
    """The tiktoken.Encoding that these merged byte strings make, in their order."""
    vocab = [bytes([byte]) for byte in range(256)] + merges
    encoding = BPE(
        "rollout",
        pat_str=SPLIT,
        mergeable_ranks={token: i for i, token in enumerate(vocab)},
        special_tokens={"<|endoftext|>": len(vocab)},
    )
    encoding.eos = encoding.eot_token
    encoding.stop = [encoding.eos]
    return encoding


def plain(text):
    """Text that has bytes: half of a surrogate pair, which JSON can hold, is replaced."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class PretrainedBPE(tiktoken.Encoding):
    """A tokenizer.json as a tiktoken.Encoding that does what the library does, not tiktoken.

    Text is brought to NFC first if the file says so, a byte that has no token is dropped, an id
    that has no token (padding of the embedding) decodes to nothing.
    """

    def encode(self, text, *, allowed_special=frozenset(), disallowed_special="all"):
        """Special tokens in the text are an error, or with allowed_special="all" their ids.

        No token is added.
        """
        allowed = self.special_tokens_set if allowed_special == "all" else set(allowed_special)
        every = self.special_tokens_set - allowed
        for token in every if disallowed_special == "all" else disallowed_special:
            if token in text:
                how = 'allowed_special="all" makes it a special token, encode_ordinary plain text'
                raise ValueError(f"{token!r} in the text: {how}")
        # as the library looks for them
        order = sorted(allowed, key=lambda token: (token in self.normalized, -len(token)))
        pieces = re.split(f"({'|'.join(map(re.escape, order))})", text) if allowed else [text]
        ids = []
        for piece in pieces:
            special = piece in allowed
            ids += [self.encode_single_token(piece)] if special else self.encode_ordinary(piece)
        return ids

    def encode_ordinary(self, text):
        text = plain(text)
        ids = []
        for part in short_runs(unicodedata.normalize("NFC", text) if self.nfc else text):
            if self.missing.isdisjoint(part.encode()):
                ids += super().encode_ordinary(part)
                continue
            for piece in regex.findall(self._pat_str, part):
                if known := bytes(b for b in piece.encode() if b not in self.missing):
                    ids += self._encode_single_piece(known)
        return ids

    def decode(self, ids, errors="replace"):
        return super().decode([i for i in ids if i in self.known], errors)
