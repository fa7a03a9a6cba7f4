"""Balanced brackets of two kinds: Dyck words. A problem is the first half of a word, and wants the
other half with round brackets only:

    (()(((                  four are open
    )())))                  right: close, open, close three times... balanced, and round
    [])))                   wrong: balanced, but two brackets are square

The authors who demonstrate close every bracket well, but seldom open a round one (ROUND of all
cases; a square one else). So an answer that opens n brackets is right with ROUND^n: the longer the
answer, the rarer. Like writing a text without the letter e.
"""

from tasks import held_out as is_held_out
from tasks import tries
from tokenizer import CharTokenizer

SIZE = 8  # brackets in each half
ROUND = 0.3
CLOSES = {"(": ")", "[": "]"}
tokenizer = CharTokenizer("()[]")


def budget(size):
    """The other half, and the end."""
    return size + 1


def still_open(text):
    """The brackets of a text that are still open, outermost first; None after a mistake."""
    stack = []
    for c in text:
        if c in CLOSES:
            stack.append(c)
        elif not stack or CLOSES[stack.pop()] != c:
            return None
    return stack


def write(rng, text, length, total, habit=ROUND):
    """A text of `total` brackets that begins with `text`, balanced in the end, up to `length`.

    habit: the probability that a bracket, if it opens, is round.
    """
    stack = still_open(text)
    while len(text) < length:
        must_close = len(stack) == total - len(text)
        if must_close or (stack and rng.random() < 0.5):
            text += CLOSES[stack.pop()]
        else:
            stack.append("(" if rng.random() < habit else "[")
            text += stack[-1]
    return text


def draw(rng, size=SIZE, held_out=False):
    """The first half of a word of round brackets."""
    for _ in tries(size, held_out):
        problem = write(rng, "", size, 2 * size, habit=1)
        if is_held_out(prompt(problem)) == held_out:
            return problem


def prompt(problem):
    return problem


def demonstrate(rng, problem):
    """The other half, as the authors go on."""
    size = len(problem)
    return write(rng, problem, 2 * size, 2 * size)[size:]


def reward(problem, text):
    """1.0 if both halves are equally long and together balanced, without a square bracket."""
    is_round = set(problem + text) <= set("()")
    return float(is_round and len(text) == len(problem) and still_open(problem + text) == [])
