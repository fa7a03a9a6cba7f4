"""Countdown: reach a number from others with + and -, each used once, every step written down.

    7 3 12>16=          use 7, 3 and 12 to make 16
    12+7=19;19-3=16;    each step takes numbers that are still there and puts its result back

The demonstrators combine what is left at random, add and subtract without a mistake, and stop when
one number remains: right steps, aimless. What there is to find is to look ahead.
"""

from tasks import held_out as is_held_out
from tasks import tries
from tokenizer import CharTokenizer

SIZE = 3  # numbers
tokenizer = CharTokenizer("0123456789+-=>; ")


def budget(size):
    """A step takes at most ten characters; then the end."""
    return 10 * (size - 1) + 1


def combine(rng, numbers):
    """One step: two of the numbers, the larger first -> its text, the numbers then left."""
    i, j = rng.sample(range(len(numbers)), 2)
    a, b = max(numbers[i], numbers[j]), min(numbers[i], numbers[j])
    sign, result = rng.choice((("+", a + b), ("-", a - b)))
    return f"{a}{sign}{b}={result};", [n for k, n in enumerate(numbers) if k not in (i, j)] + [
        result
    ]


def draw(rng, size=SIZE, held_out=False):
    """Numbers, and a target that they can make."""
    for _ in tries(size, held_out):
        numbers = [rng.randrange(1, 20) for _ in range(size)]
        left = numbers
        while len(left) > 1:
            _, left = combine(rng, left)
        problem = (numbers, left[0])
        if is_held_out(prompt(problem)) == held_out:
            return problem


def prompt(problem):
    numbers, target = problem
    return " ".join(map(str, numbers)) + f">{target}="


def demonstrate(rng, problem):
    """Steps at random until one number is left."""
    left, text = problem[0], ""
    while len(left) > 1:
        step, left = combine(rng, left)
        text += step
    return text


def reward(problem, text):
    """1.0 if every step takes two numbers that are there and is right, and what is left in the end
    is the target alone, else 0.0.
    """
    left = list(problem[0])
    for step in text.split(";")[:-1]:
        try:
            work, result = step.split("=")
            sign = "+" if "+" in work else "-"
            a, b = map(int, work.split(sign))
            left.remove(a)
            left.remove(b)
            left.append(int(result))
        except ValueError:  # no step, or a number that is not there
            return 0.0
        if left[-1] != (a + b if sign == "+" else a - b):
            return 0.0
    return float(left == [problem[1]] and text.endswith(";"))
