"""Orders: words that say what is to be done with five letters.

    RNabcde=fedcb      R: turn it around, N: each letter becomes the next one of eight
    NRabcde=fedcb      first N, then R: here it is the same
    LSdbaec=abcde      L: the first letter goes to the end, S: sort

A prompt has two words, of which either may be any but for the pairs in UNSEEN: those are never
trained on together, and no other pair does the same. Without its words nothing in a prompt says
what to do.
"""

from tasks import held_out as is_held_out
from tokenizer import CharTokenizer

LETTERS = "abcdefgh"
SIZE = 5  # letters
WORDS = {
    "R": "turn it around",
    "S": "sort",
    "L": "the first letter goes to the end",
    "W": "the first and the last change places",
    "E": "neighbours change places, the last stays",
    "N": "each letter becomes the next",
    "P": "each letter becomes the one before",
    "M": "the alphabet is mirrored: a becomes h",
}
UNSEEN = "RL", "WE", "SN"  # no other pair does what one of these does
tokenizer = CharTokenizer("".join(WORDS) + LETTERS + "=")


def shifted(text, by):
    return "".join(LETTERS[(LETTERS.index(c) + by) % len(LETTERS)] for c in text)


def follow(words, text):
    """What the words make of a text, one after the other."""
    for word in words:
        if word == "R":
            text = text[::-1]
        elif word == "S":
            text = "".join(sorted(text))
        elif word == "L":
            text = text[1:] + text[0]
        elif word == "W":
            text = text[-1] + text[1:-1] + text[0]
        elif word == "E":
            text = text[1] + text[0] + text[3] + text[2] + text[4]
        elif word == "N":
            text = shifted(text, 1)
        elif word == "P":
            text = shifted(text, -1)
        else:
            text = "".join(LETTERS[-1 - LETTERS.index(c)] for c in text)
    return text


def draw_text(rng, held_out=False):
    while True:
        text = "".join(rng.choice(LETTERS) for _ in range(SIZE))
        if is_held_out(text) == held_out:
            return text


def draw_words(rng):
    """Two words that may be trained on."""
    while True:
        words = rng.choice(list(WORDS)) + rng.choice(list(WORDS))
        if words not in UNSEEN:
            return words
