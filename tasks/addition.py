"""Column addition. A problem is two numbers, their digits named by column; the answer fills in the
columns, one by one:

    c8C3b3B7a1A6=       831 + 376: column c holds 8 and 3, b holds 3 and 7, a (the units) 1 and 6
    a1A6007             column a: 1 and 6, carry in 0, make 07
    b3B7010             column b: 3 and 7, carry in 0, make 10
    c8C3112             column c: 8 and 3, carry in 1, make 12

The last digits say 207 (the last carry is not asked for): reward 1. The demonstrators take the
columns in random order, guess a carry that they can't know yet, and now and then go back to a
column: they can do every step, and are right about a quarter of the time. What there is to find is
what every child is told: work from right to left, and nothing is guessed.
"""

from tasks import held_out as is_held_out
from tasks import tries
from tokenizer import CharTokenizer

SIZE = 5  # columns
COLUMNS = "abcdefgh"  # a: units
LINE = 7  # characters in a line of work
tokenizer = CharTokenizer("0123456789" + COLUMNS + COLUMNS.upper() + "=")


def budget(size):
    """Three lines more than there are columns, or two and the end."""
    return LINE * (size + 3)


def draw(rng, size=SIZE, held_out=False):
    """Pairs of digits, units first."""
    for _ in tries(size, held_out):
        problem = [(rng.randrange(10), rng.randrange(10)) for _ in range(size)]
        if is_held_out(prompt(problem)) == held_out:
            return problem


def prompt(problem):
    text = "="
    for c, (x, y) in zip(COLUMNS, problem, strict=False):
        text = f"{c}{x}{c.upper()}{y}" + text
    return text


def demonstrate(rng, problem, revisit=0.1):
    """Columns in random order, unknown carries guessed, a finished column sometimes done again."""
    order = list(range(len(problem)))
    rng.shuffle(order)
    carry_out = {}  # of the columns that are done
    lines = []
    while order:
        again = carry_out and rng.random() < revisit
        j = rng.choice(sorted(carry_out)) if again else order.pop()
        x, y = problem[j]
        carry = 0 if j == 0 else carry_out.get(j - 1, rng.randrange(2))
        carry_out[j] = (x + y + carry) // 10
        column = COLUMNS[j]
        lines.append(f"{column}{x}{column.upper()}{y}{carry}{x + y + carry:02d}")
    return "".join(lines)


def reward(problem, text):
    """1.0 if the last line of every column ends in the right digit and there are only whole lines,
    else 0.0.
    """
    lines = [text[i : i + LINE] for i in range(0, len(text), LINE)]
    written = {line[0]: line[-1] for line in lines}
    right = {}
    carry = 0
    for c, (x, y) in zip(COLUMNS, problem, strict=False):
        right[c] = str((x + y + carry) % 10)
        carry = (x + y + carry) // 10
    return float(written == right and len(text) % LINE == 0)


def guessed_carries(text):
    """The fraction of an answer's lines, units apart, written before the column to their right:
    their carry was a guess. None where there are none.
    """
    columns = text[::LINE]
    lines = [i for i, c in enumerate(columns) if c in COLUMNS[1:]]
    guesses = [COLUMNS[COLUMNS.find(columns[i]) - 1] not in columns[:i] for i in lines]
    return sum(guesses) / len(guesses) if guesses else None
