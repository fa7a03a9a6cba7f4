"""Which two numbers make the sum? An answer tries pairs, writes down each sum, judges it, then
names one:

    from 3 11 8 2 6 12 ?14                                              which two of these make 14
    3 +6 =9 NO 11 +2 =13 NO 8 +6 =14 OK ANS 8 +6                        right: 8 + 6 = 14

Four tokens are one attempt: two numbers (the second has tokens of its own, so that the two can be
told apart wherever they stand), their sum and a verdict. The demonstrators try pairs at random,
judge without a mistake, and sooner or later lose patience and name their last pair, right or not.
What there is to find is to go on trying.

`honest=False` makes demonstrations of the same format that mean nothing: sums at random, a coin for
the verdict. `verdict_gap` measures what is then missing.
"""

import itertools
import re
import zlib

from tasks import tries

SIZE = 6  # numbers in a problem
HIGHEST = 12  # the largest of them


class WordTokenizer:
    """One id per word, in the order of the list; texts are words with a space between. `eos`
    decodes to nothing.
    """

    def __init__(self, words, eos):
        self.words = words
        self.index = {word: i for i, word in enumerate(words)}
        self.n_vocab = len(words)
        self.eos = self.index[eos]
        self.stop = [self.eos]

    def encode(self, text):
        """KeyError for a word that is not in the list."""
        return [self.index[word] for word in text.split()]

    def decode(self, ids):
        return " ".join(self.words[i] for i in ids if i != self.eos)


tokenizer = WordTokenizer(
    [
        "<pad>",
        *(f"{a}" for a in range(1, HIGHEST + 1)),
        *(f"={total}" for total in range(1, 2 * HIGHEST)),
        *("OK", "NO", "ANS", "<eos>", "from"),
        *(f"?{target}" for target in range(2 * HIGHEST)),
        *(f"+{b}" for b in range(1, HIGHEST + 1)),
    ],
    eos="<eos>",
)


def budget(size):
    """Room for an attempt at every pair, and for the answer: 64 tokens for six numbers."""
    return 4 * (size * (size - 1) // 2) + 4


def draw(rng, size=SIZE, held_out=False):
    """Distinct numbers and the sum of two of them -> (numbers, target). A tenth of all problems,
    whatever the order of their numbers, is held out.
    """
    for _ in tries(size, held_out):
        numbers = rng.sample(range(1, HIGHEST + 1), max(size, 2))  # one number has no pair
        target = sum(rng.sample(numbers, 2))
        key = bytes([*sorted(numbers), target])
        if (zlib.crc32(key) % 10 == 0) == held_out:
            return numbers, target


def draw_single(rng, size=SIZE, held_out=False):
    """A problem of which one pair alone has the sum: all of a size are equally hard to guess."""
    for _ in tries(size, held_out):
        problem = draw(rng, size, held_out)
        pairs = itertools.combinations(problem[0], 2)
        if sum(hits(problem, a, b) for a, b in pairs) == 1:
            return problem


def prompt(problem):
    numbers, target = problem
    return " ".join(["from", *map(str, numbers), f"?{target}"])


def attempt(a, b, total, ok):
    """The four tokens of one attempt."""
    return f"{a} +{b} ={total} {'OK' if ok else 'NO'}"


def demonstrate(rng, problem, honest=True, patience=(0.4, 1.0), attempts=16):
    """Random attempts; after a NO it goes on with a probability that is drawn from `patience` once
    an answer. The last pair is the answer.

    Verdicts that are not honest are coins, after a random sum: OK one time in ten, about as often
    as a pair of six numbers is right.
    """
    numbers, target = problem
    words = []
    go_on = rng.uniform(*patience)
    for _ in range(attempts):
        a, b = rng.sample(numbers, 2)
        coin = rng.random() < 0.1  # tossed for both kinds: their other draws are then alike
        ok = a + b == target if honest else coin
        total = a + b if honest else rng.randrange(3, 2 * HIGHEST)
        words.append(attempt(a, b, total, ok))
        if ok or rng.random() > go_on:
            break
    return " ".join([*words, f"ANS {a} +{b}"])


def misses_then_hit(rng, problem, misses, hit):
    """An answer to be read, not to be learnt from: so many random attempts that miss, then one
    that hits if `hit`.
    """
    numbers = problem[0]
    pairs = [(a, b) for a in numbers for b in numbers if a != b]
    good = [p for p in pairs if hits(problem, *p)]
    bad = [p for p in pairs if not hits(problem, *p)]
    words = [attempt(a, b, a + b, False) for a, b in rng.choices(bad, k=misses)]
    if hit:
        a, b = rng.choice(good)
        words.append(attempt(a, b, a + b, True))
    return " ".join(words)


def pair(words):
    """Two words like 8 +6 -> (8, 6); None if they are anything else."""
    match = re.fullmatch(r"(\d+) \+(\d+)", " ".join(words))
    return match and (int(match[1]), int(match[2]))


def parse(text):
    """An answer's attempts [(a, b, verdict), ...], and the pair that it names or None. What comes
    after anything malformed is no attempt.
    """
    words = text.split()
    attempts = []
    while len(words) >= 4 and pair(words[:2]) and words[3] in ("OK", "NO"):
        attempts.append((*pair(words[:2]), words[3] == "OK"))
        words = words[4:]
    return attempts, pair(words[1:]) if words[:1] == ["ANS"] else None


def hits(problem, a, b):
    """Whether a and b are two different numbers of the problem with its sum."""
    numbers, target = problem
    return a != b and a in numbers and b in numbers and a + b == target


def reward(problem, text):
    """1.0 if the pair that the answer names hits, else 0.0. A text can't say if it ended."""
    named = parse(text)[1]
    return float(named is not None and hits(problem, *named))


def behaviour(problems, texts):
    """Means over the answers: attempts, different pairs among them, their hits, and
    P(stop | the last verdict was NO).
    """
    parsed = [parse(text) for text in texts]
    pairs = [[t[:2] for t in attempts] for attempts, _ in parsed]  # of each answer
    verdicts = [[t[2] for t in attempts] for attempts, _ in parsed]
    count = sum(map(len, pairs))
    different = sum(len(set(map(frozenset, tried))) for tried in pairs)
    found = 0
    for problem, tried in zip(problems, pairs, strict=True):
        found += sum(hits(problem, *pair) for pair in tried)
    after_no = sum(answered.count(False) for answered in verdicts)
    gave_up = 0  # it named a pair although its last verdict was NO
    for answered, (_, named) in zip(verdicts, parsed, strict=True):
        gave_up += answered[-1:] == [False] and named is not None
    return dict(
        attempts=count / len(texts),
        unique_attempts=different / len(texts),
        hit_rate=found / max(count, 1),
        gives_up=gave_up / max(after_no, 1),
    )
