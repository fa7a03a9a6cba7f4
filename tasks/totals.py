"""Running totals, kept with a hand that slips. A problem is a column of digits; the answer has a
line for each: its name, the digit, and the total so far modulo 5, as a letter (A is 0, E is 4):

    a3b4c1d2=           3, 4, 1 and 2 are to be summed
    a3Db4Cc1Dd2A        3; 3 + 4 = 7, C; 2 + 1 = 3, D; 3 + 2 = 5, A
    a3Db4*<b4Cc1Dd2A    a blot in b: < crosses out the last line that stands; b is written anew
    a3Db4*c1Dd2A        the blot is left and made up for: c is 3 + 4 + 1

All three are right: what counts is the total in the last line. So whoever has slipped has two ways
on: back to a page that is right, or ahead to one. What is crossed out is gone from the page that
the author reads: above, b was then written after `a3D`. Only letters turn into blots.
"""

from tasks import held_out as is_held_out
from tasks import tries
from tokenizer import CharTokenizer

SIZE = 8  # lines
NAMES = "abcdefgh"
LETTERS = "ABCDE"
BLOT = "*"
BACK = "<"
tokenizer = CharTokenizer(LETTERS + BLOT + "01234" + NAMES + BACK + "=")


def budget(size):
    """Every line once, and the end: what may be written between two crossings-out."""
    return 3 * size + 1


def draw(rng, size=SIZE, held_out=False):
    """The digits."""
    for _ in tries(size, held_out):
        problem = [rng.randrange(len(LETTERS)) for _ in range(size)]
        if is_held_out(prompt(problem)) == held_out:
            return problem


def prompt(problem):
    return "".join(f"{NAMES[i]}{digit}" for i, digit in enumerate(problem)) + "="


def line(problem, i):
    """The i-th line as it should be."""
    return f"{NAMES[i]}{problem[i]}{LETTERS[sum(problem[: i + 1]) % len(LETTERS)]}"


def demonstrate(rng, problem):
    """By a hand that does not slip."""
    return "".join(line(problem, i) for i in range(len(problem)))


def replay(problem, text):
    """Yields the page, a list of the lines that stand, after each line and each crossing-out; None,
    and no more, where the text goes on with neither.
    """
    page = []
    read = 0
    while read < len(text):
        right = line(problem, len(page)) if len(page) < len(problem) else ""
        written = text[read : read + 3]
        if text[read] == BACK and page:
            page = page[:-1]
            read += 1
        elif right and written[:2] == right[:2] and written[2:] and written[2] in LETTERS + BLOT:
            page = [*page, written]
            read += 3
        else:
            page = None
        yield page
        if page is None:
            return


def is_right(problem, page):
    """Whether the last line that stands, if any does, has the right total."""
    return not page or page[-1] == line(problem, len(page) - 1)


def reward(problem, text):
    """1.0 if all is lines and crossings-out, every line stands and the last is right, else 0.0."""
    page = [[], *replay(problem, text)][-1]
    return float(page is not None and len(page) == len(problem) and is_right(problem, page))


def mistake(problem, text):
    """The first page that ends in a wrong line about which its author does nothing: he neither
    crosses it out nor makes up for it in the next line. None if there is none.
    """
    wrong = None  # a page that has yet to be mended
    for page in replay(problem, text):
        if page is None:
            break
        right = is_right(problem, page)
        if wrong and not right:
            return wrong
        wrong = None if right else page
    return wrong
