"""Pipelines: what do functions, one after the other, make of a string?

    AfdB..C..?                  C(B(A(fd))): dots stand for what came out before
    Afd=de;Bde=fe;Cfe=fg;       a line for each application

A function of two letters swaps them or not, and moves each on by 0 to 2 places of the alphabet,
around its end: seventeen do anything, A to Q, and nothing in a name tells what. A question may hold
several pipelines. The functions have three roles:

    TRAINED     what is drawn to train on
    HELD_OUT    what is drawn to test on: never trained on but one at a time
    BRIDGE      what shows that results go on: who writes demonstrations composes only these

`listed` and `bridged` draw what a base model learns from: all functions one at a time, and
pipelines of the bridge's. Demonstrations are right. What there is to find is to compose the others.
"""

import itertools
import random
import re

from tokenizer import CharTokenizer

SIZE = 2  # functions in a pipeline
LETTERS = "abcdefgh"
LENGTH = 2  # of a string
LINE = LENGTH * 2 + 3  # characters in a line of work
NAMES = "ABCDEFGHIJKLMNOPQ"
TRAINED, HELD_OUT, BRIDGE = NAMES[:8], NAMES[8:13], NAMES[13:]
MISTAKES = "slip", "garbled", "ignored", "order"
tokenizer = CharTokenizer(LETTERS + NAMES + ".=;?")


def make_functions():
    """Name -> the order that it brings the letters into, and by how much it then moves each on."""
    orders = (0, 1), (1, 0)
    moves = list(itertools.product(range(3), repeat=LENGTH))
    kinds = list(itertools.product(orders, moves))[1:]  # all but the one that changes nothing
    random.Random("functions").shuffle(kinds)
    return dict(zip(NAMES, kinds, strict=True))


FUNCTIONS = make_functions()


def apply(name, string):
    order, moves = FUNCTIONS[name]
    places = [LETTERS.index(string[i]) for i in order]
    return "".join(LETTERS[(a + b) % len(LETTERS)] for a, b in zip(places, moves, strict=True))


def budget(size):
    """A line for each function, one for an application beside them, and the end."""
    return LINE * (size + 1) + 1


def pipeline(rng, size, names):
    """A string, and the functions that it goes through: any of `names`, again and again too."""
    string = "".join(rng.choice(LETTERS) for _ in range(LENGTH))
    return string, "".join(rng.choice(names) for _ in range(size))


def beside(rng, problem, names):
    """The same, in half of all cases with another application before or after it: how many lines
    there are to write is then not the same for all.
    """
    if rng.random() < 0.5:
        problem.insert(rng.randrange(2), pipeline(rng, 1, names))
    return problem


def draw(rng, size=SIZE, held_out=False):
    """A pipeline, in training sometimes with an application beside it."""
    if held_out:
        return [pipeline(rng, size, HELD_OUT)]
    return beside(rng, [pipeline(rng, size, TRAINED)], TRAINED)


def listed(rng):
    """One to five applications of any functions, that have nothing to do with one another."""
    return [pipeline(rng, 1, NAMES) for _ in range(rng.randint(1, 5))]


def bridged(rng):
    """A pipeline of two to five bridge functions, sometimes with an application beside it."""
    return beside(rng, [pipeline(rng, rng.randint(2, 5), BRIDGE)], NAMES)


def prompt(problem):
    text = ""
    for string, names in problem:
        text += names[0] + string
        text += "".join(name + "." * LENGTH for name in names[1:])
    return text + "?"


def work(problem):
    """The lines of a right answer -> [(name, argument, result)] of each pipeline."""
    pipelines = []
    for string, names in problem:
        lines = []
        for name in names:
            lines.append((name, string, apply(name, string)))
            string = lines[-1][2]
        pipelines.append(lines)
    return pipelines


def demonstrate(rng, problem):
    lines = itertools.chain(*work(problem))
    return "".join(f"{name}{argument}={result};" for name, argument, result in lines)


def parse(text):
    """The lines of an answer -> [(name, argument, result)], None if it is anything but lines."""
    line = f"([{NAMES}])([{LETTERS}]{{{LENGTH}}})=([{LETTERS}]{{{LENGTH}}});"
    return re.findall(line, text) if re.fullmatch(f"({line})+", text) else None


def reward(problem, text):
    """1.0 if there are as many lines as functions and each pipeline ends in the right string, else
    0.0. How it came about is nobody's business: `mistake` looks at that.
    """
    lines = parse(text) or []
    if len(lines) != sum(len(names) for _, names in problem):
        return 0.0
    last = -1  # the line in which a pipeline ends
    for pipe in work(problem):
        last += len(pipe)
        if lines[last][2] != pipe[-1][2]:
            return 0.0
    return 1.0


def mistake(problem, text):
    """What first went wrong in an answer, None if nothing did.

    order: the right functions in another order. ignored: a function is missing or added, or works
    on a string of the question where it should go on with a result. garbled: it works on no string
    that stands there. slip: its result is wrong.
    """
    lines = parse(text) or []
    wanted = list(itertools.chain(*work(problem)))
    names, right = [line[0] for line in lines], [line[0] for line in wanted]
    if sorted(names) != sorted(right):
        return "ignored"
    if names != right:
        return "order"
    given = [string for string, _ in problem]
    written = iter(lines)
    for string, functions in problem:
        for name in functions:
            _, argument, result = next(written)
            if argument != string:
                return "ignored" if argument in given else "garbled"
            if result != apply(name, argument):
                return "slip"
            string = result  # what was written has to go on
    return None
