"""tokenizer.py: texts lose nothing, merges are those of brute force."""

import itertools
import random
from collections import Counter

import pytest
import regex

import tokenizer
from experiment import UserError
from tokenizer import SPLIT, CharTokenizer, bpe_merges, train_bpe

TEXT = (
    "Der Übermut der Ärzte: naïve façade, naïve œuvre… 東京都と京都、東京タワー 🙂🙂🙃 "
    "it's they'll we've\n\n"
    "the theme of the thesis is the thing; banana bandana aaaa aaaaa aaaaaaa 1234 12 123   "
    "\tindent\n"
)
# many ties, and words of one letter
TEXT += " ".join("".join(random.Random(i).choices("aabé", k=i % 9)) for i in range(200))


def naive_bpe(text, n):
    """Count every pair again at each step -> merges, and the words as they end up."""
    words, merges = [[bytes([b]) for b in w.encode()] for w in regex.findall(SPLIT, text)], []
    while len(merges) < n and (pairs := Counter(p for w in words for p in itertools.pairwise(w))):
        best = max(pairs, key=lambda p: (pairs[p], p))
        if best[0] + best[1] not in merges:
            merges.append(best[0] + best[1])
        for w in words:
            j = 0
            while j < len(w) - 1:
                if (w[j], w[j + 1]) == best:
                    w[j : j + 2] = [best[0] + best[1]]
                j += 1
    return merges, words


def test_a_character_that_is_not_in_the_alphabet_is_named():
    with pytest.raises(UserError, match="',' is not in the alphabet .text '1,2'"):
        CharTokenizer("12").encode("1,2")


def test_bpe_merges_are_those_of_the_worked_example():
    # CS336's, after Sennrich et al.
    text = "\n".join(["low"] * 5 + ["lower"] * 2 + ["widest"] * 3 + ["newest"] * 6)
    assert bpe_merges(text, 6) == [b"st", b"est", b"ow", b"low", b"west", b"ne"]


def test_of_equally_frequent_pairs_the_greater_is_merged():
    assert bpe_merges("ab\nzy\nza\nz", 1) == [b"zy"]
    # (b, ab), (ab, c), ...: pairs of bytes, not of ids
    assert bpe_merges("aba\nabb\nabc\nbab", 3) == [b"ab", b"bab", b"abc"]


def test_bpe_with_kept_counts_is_bpe_with_fresh_counts():
    assert bpe_merges(TEXT, 120) == naive_bpe(TEXT, 120)[0]


@pytest.mark.parametrize("alphabet", ["a", "ab", "acgt", "ab é", "東京都タ ", "abc  \n1"])
def test_bpe_merges_of_random_texts_are_those_of_brute_force_to_the_last_pair(alphabet):
    for seed in range(60):
        text = "".join(random.Random(seed).choices(alphabet, k=2 * seed))
        for n in (3, 1000):
            assert bpe_merges(text, n) == naive_bpe(text, n)[0]


@pytest.mark.parametrize("characters", ["acgt", "".join(map(chr, range(0x4E00, 0x5200)))])
def test_text_without_spaces_takes_a_few_heap_operations_for_each_byte_however_many_merges(
    monkeypatch, characters
):
    text = "".join(random.Random(0).choices(characters, k=4000))
    operations = Counter()

    def counted(name):
        original = getattr(tokenizer.heapq, name)
        return lambda heap, *item: operations.update([name]) or original(heap, *item)

    for name in ("heappush", "heappop"):
        monkeypatch.setattr(tokenizer.heapq, name, counted(name))
    assert len(bpe_merges(text, 700)) == 700
    assert operations.total() <= 4 * len(text.encode())


def test_tiktoken_cuts_the_training_text_as_training_did():
    encoding = train_bpe(TEXT, 256 + 120 + 1)
    assert [encoding.decode_single_token_bytes(t) for t in encoding.encode(TEXT)] == list(
        itertools.chain(*naive_bpe(TEXT, 120)[1])
    )


@pytest.mark.parametrize("text", [TEXT, "", "never seen: ß ü \x00 \U0001f9ea 한국어\r\n\t  x "])
def test_a_trained_bpe_gives_any_text_back(text):
    encoding = train_bpe(TEXT, 300)
    assert encoding.decode(encoding.encode(text)) == text


def test_the_end_of_text_is_the_last_id():
    encoding = train_bpe(TEXT, 300)
    assert encoding.eos == 299 == encoding.n_vocab - 1 and encoding.stop == [299]
    assert train_bpe(TEXT, 257).eos == 256


def test_a_vocabulary_too_small_for_bytes_is_a_value_error():
    with pytest.raises(ValueError):
        train_bpe(TEXT, 256)


def test_characters_come_back_and_eos_decodes_to_nothing():
    tokenizer = CharTokenizer("abc =é")
    assert tokenizer.decode(tokenizer.encode("a = bé") + [tokenizer.eos]) == "a = bé"
    assert tokenizer.eos == 6 == tokenizer.n_vocab - 1 and tokenizer.stop == [6]
    with pytest.raises(UserError, match="stands twice"):
        CharTokenizer("abca")


@pytest.mark.parametrize("space", [" ", "\n"])
def test_a_million_spaces_are_text_like_any_other(space):
    text = "a b" + 10**6 * space + "c"
    encoding = train_bpe(text, 300)
    assert encoding.decode(encoding.encode_ordinary(text)) == text
    assert encoding.encode_ordinary_batch([text, "a b"]) == [
        encoding.encode_ordinary(text),
        encoding.encode("a b"),
    ]
