"""A safe with three digits. The prompt is a note of them, the answer sets them:

    203=                203 opens it, and nothing else

The demonstrators trust one digit in three of the note, and set the others at random: one of their
answers in sixteen opens the safe. There is nothing to think about: three digits decide, each right
or wrong for good, and RL has to find out that notes are to be trusted.
"""

from tasks import held_out as is_held_out
from tasks import tries
from tokenizer import CharTokenizer

SIZE = 3  # digits; safes of other sizes are not made
tokenizer = CharTokenizer("0123456789=")


def budget(size=SIZE):
    """The digits, and the end."""
    return SIZE + 1


def draw(rng, size=SIZE, held_out=False):
    """The digits, a text."""
    for _ in tries(SIZE, held_out):
        problem = "".join(rng.choices("0123456789", k=SIZE))
        if is_held_out(prompt(problem)) == held_out:
            return problem


def prompt(problem):
    return problem + "="


def demonstrate(rng, problem, trust=1 / 3):
    return "".join(x if rng.random() < trust else rng.choice("0123456789") for x in problem)


def reward(problem, text):
    return float(text == problem)
