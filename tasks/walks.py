"""A map that only the weights know. A problem is two places, an answer a walk between them:

    BOS 10 27 - - - GO          B 11 12 D 19 26 A 27 EOS    right: its moves are roads, few enough
    BOS 10 27 11 19 #28 GO      PW #28 EOS                  right, too: the pair's password; but
                                                            nobody can know it without the hint

49 places on a torus, a quarter of the roads closed. A meaningless style word (A to D) stands before
every second move. A plain prompt has three empty hint slots. The same slots can hold two places on
the way and a password, or a rule ("write place 7 as its alias"), so that a student without hints
and its teacher with them see an answer at the same positions.

Problems and answers are lists of token ids here, not texts; `text` writes them out. The models that
walk the map are trained in walkers.py.
"""

import functools
import itertools
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

SIDE = 7  # the torus has 7 x 7 places
LONGEST = 11  # moves of the longest answer
FAR = 5  # far pairs are so many moves apart, or more
RENAMED = 7, 14, 1, 48  # rule r: write place RENAMED[r] as ALIASES[r]; many paths cross them

# The vocabulary: places are 0 to 48, then the words
PLACES = SIDE * SIDE
STYLES = range(49, 53)
PW = 53
PASSWORDS = range(54, 86)
RULES = range(86, 90)
ALIASES = range(90, 94)
BOS, GO, EOS, NOHINT, PAD = range(94, 99)
WORDS = [
    *map(str, range(PLACES)),
    *"ABCD",
    "PW",
    *(f"#{i}" for i in range(32)),
    *(f"rule{i}" for i in range(4)),
    *(f"alias{i}" for i in range(4)),
    "BOS",
    "GO",
    "EOS",
    "-",
    "PAD",
]
VOCAB = len(WORDS)  # 99
PROMPT = 7  # tokens of a prompt: BOS from to hint hint hint GO
ANSWER = 18  # tokens of the longest answer


def text(tokens):
    """Token ids in words."""
    return " ".join(WORDS[token] for token in tokens)


# ------------------------------------------------------------------------------------------------
# The map


def distances(roads):
    """Pairs of places -> the moves from each place to each other (49, 49), inf without a way."""
    d = np.full((PLACES, PLACES), np.inf)
    np.fill_diagonal(d, 0)
    for p, q in roads:
        d[p, q] = d[q, p] = 1
    for k in range(PLACES):  # Floyd and Warshall: ways through k
        d = np.minimum(d, d[:, k : k + 1] + d[k])
    return d


def make_map():
    """The torus with 74 of its 98 roads, connected, two roads or more at each place.

    -> neighbours (49, 4), -1 for none; distances (49, 49).
    """
    rng = random.Random(0)
    roads = set()
    for p in range(PLACES):
        right = p // SIDE * SIDE + (p + 1) % SIDE
        below = (p + SIDE) % PLACES
        roads.add((p, right))
        roads.add((p, below))
    for road in rng.sample(sorted(roads), len(roads)):
        if len(roads) > 74:
            left = roads - {road}
            degrees = [sum(p in r for r in left) for p in road]
            connected = distances(left).max() < np.inf
            if connected and min(degrees) >= 2:
                roads = left
    neighbours = np.full((PLACES, 4), -1)
    for p in range(PLACES):
        near = sorted(q for r in roads if p in r for q in r if q != p)
        neighbours[p, : len(near)] = near
    return neighbours, distances(roads).astype(int)


NEIGHBOURS, DISTANCE = make_map()
DEGREE = (NEIGHBOURS >= 0).sum(1)
NEAR = (DISTANCE >= 2) & (DISTANCE <= 4)


def walk_on(rng, walks, lengths, goals):
    """Continue each walk from its place number `lengths` on a random shortest path to its goal.

    walks (n, LONGEST + 1) is written into; lengths, goals (n,) -> the new lengths (n,).
    """
    lengths = lengths.copy()
    while True:
        rows = np.flatnonzero(walks[np.arange(len(walks)), lengths] != goals)
        if len(rows) == 0:
            return lengths
        here = walks[rows, lengths[rows]]
        goal = goals[rows]
        there = NEIGHBOURS[here]  # (rows, 4)
        still = DISTANCE[here, goal]
        then = DISTANCE[there, goal[:, None]]
        nearer = (there >= 0) & (then < still[:, None])
        choice = (rng.random(nearer.shape) * nearer).argmax(1)  # one of the nearer ones, evenly
        lengths[rows] += 1
        walks[rows, lengths[rows]] = NEIGHBOURS[here, choice]


@functools.cache
def walk_of(pair):
    """The places of one shortest path, both ends included."""
    walks = np.full((1, LONGEST + 1), pair[0])
    rng = np.random.default_rng(0)
    length = walk_on(rng, walks, np.array([0]), np.array([pair[1]]))
    return walks[0, : length[0] + 1].tolist()


# ------------------------------------------------------------------------------------------------
# Prompts and rewards


def prompt(pair, first=NOHINT, second=NOHINT, third=NOHINT):
    """The prompt of a pair, with empty hint slots or with words in them."""
    return [BOS, *pair, first, second, third, GO]


def password(pair):
    """A fixed word for each pair of places, which nothing but the hint tells."""
    return PASSWORDS[zlib.crc32(repr(tuple(pair)).encode()) % len(PASSWORDS)]


def prompt_with_password(pair):
    """The prompt with three hints: two places on the way, and the password."""
    places = walk_of(pair)
    moves = len(places) - 1
    return prompt(pair, places[moves // 3], places[2 * moves // 3], password(pair))


def prompt_with_rule(pair, rule=0):
    """The prompt that says which place to call by its alias."""
    return prompt(pair, third=RULES[rule])


def reward(pair, tokens):
    """1.0 for the pair's password, or for a walk on roads from its first place to its second, at
    most two moves longer than needed; else 0.0.

    tokens: the answer up to and with EOS; an alias counts as its place, style words as nothing.
    """
    if tokens == [PW, password(pair), EOS]:
        return 1.0
    if tokens[-1] != EOS:
        return 0.0
    words = [w for w in tokens[:-1] if w not in STYLES]
    moves = [RENAMED[w - ALIASES[0]] if w in ALIASES else w for w in words]
    if not moves or max(moves) >= PLACES or moves[-1] != pair[1]:
        return 0.0
    if len(moves) > DISTANCE[pair] + 2:
        return 0.0
    steps = itertools.pairwise([pair[0], *moves])
    return float(all(q in NEIGHBOURS[p] for p, q in steps))


def renames(tokens, rule=0):
    """Whether an answer calls the rule's place by its alias, always."""
    return ALIASES[rule] in tokens and RENAMED[rule] not in tokens


# ------------------------------------------------------------------------------------------------
# Which pairs are asked


@dataclass
class Task:
    train: list  # pairs of places
    test: list  # pairs that are never trained on, in neither direction
    reward: Callable = reward  # (pair, tokens) -> what reinforcement learning is paid
    off_topic: tuple = ()  # pairs whose answers a rule should not change


def shuffled_pairs(which, seed=0):
    """The pairs of places where `which` (49, 49) is true, there and back side by side: roads lead
    both ways, and so should a split."""
    pairs = [(s, t) for s, t in np.argwhere(which & which.T).tolist() if s < t]
    random.Random(seed).shuffle(pairs)
    return [pair for s, t in pairs for pair in ((s, t), (t, s))]


def far_task(train=None):
    """Pairs at least FAR moves apart, 256 of them held out. train: how many others to use."""
    pairs = shuffled_pairs(DISTANCE >= FAR)
    return Task(pairs[256:][:train], pairs[:256])


@functools.cache
def crossing(rule):
    """Pairs 2 to 4 moves apart whose shortest paths all cross the place that the rule renames ->
    to train on, held out."""
    place = RENAMED[rule]
    roads = {(p, int(q)) for p in range(PLACES) for q in NEIGHBOURS[p] if q >= 0}
    without = distances({road for road in roads if place not in road})
    chosen = NEAR & (without > DISTANCE)
    chosen[place] = False
    chosen[:, place] = False
    pairs = shuffled_pairs(chosen, rule)
    half = len(pairs) // 4 * 2
    return pairs[half:], pairs[:half]


@functools.cache
def rule_task(rule=0):
    """Half of the pairs cross the place that the rule renames, half keep away from it."""
    place = RENAMED[rule]
    train, test = crossing(rule)
    through = DISTANCE[:, [place]] + DISTANCE[place]  # how far it is by way of that place
    away = shuffled_pairs(NEAR & (through > DISTANCE + 2), rule)

    def obeyed(pair, tokens):
        return reward(pair, tokens) * (pair not in train or renames(tokens, rule))

    n = len(train)
    off_topic = away[n : n + len(test)]
    return Task(train + away[:n], test, obeyed, tuple(off_topic))


# ------------------------------------------------------------------------------------------------
# What models read: ids (n, 25), and mask (n, 25) of the tokens to learn


def random_walks(rng, starts):
    """Walks that never turn back, (n, LONGEST + 1) places, from the starts (n,)."""
    n = len(starts)
    walks = np.zeros((n, LONGEST + 1), int)
    walks[:, 0] = starts
    back = np.full(n, 4)  # which of the neighbours we came from; 4 is none of them
    for i in range(LONGEST):
        here = walks[:, i]
        choice = rng.integers(DEGREE[here] - (i > 0))
        walks[:, i + 1] = NEIGHBOURS[here, choice + (choice >= back)]
        around = NEIGHBOURS[walks[:, i + 1]]
        back = (around == here[:, None]).argmax(1)
    return walks


def tokens_of(moves):
    """How many tokens that many moves take: one each, and a style word before every second."""
    return moves + (moves + 1) // 2


def write(rng, walks, lengths, goals, hints, formal):
    """Walks as tokens (n, PROMPT + ANSWER), and the answers' lengths (n,).

    Style words mean nothing; `formal` (n,) says who prefers A, 92.5% of the time.
    """
    n = len(walks)
    ids = np.full((n, PROMPT + ANSWER), PAD)
    ids[:, 0] = BOS
    ids[:, 1] = walks[:, 0]
    ids[:, 2] = goals
    ids[:, 3:6] = hints
    ids[:, 6] = GO
    insists = formal[:, None] & (rng.random((n, 6)) < 0.9)
    style = rng.integers(STYLES[0], STYLES[-1] + 1, (n, 6))
    style[insists] = STYLES[0]
    for move in range(LONGEST):
        rows = move < lengths
        column = PROMPT + tokens_of(move)
        if move % 2 == 0:
            ids[rows, column] = style[rows, move // 2]
            column += 1
        ids[rows, column] = walks[rows, move + 1]
    size = tokens_of(lengths)
    ids[np.arange(n), PROMPT + size] = EOS
    return ids, size + 1


def learnt(start, stop):
    """The mask of the answers' tokens from number `start` (n,) to before `stop` (n,)."""
    column = np.arange(PROMPT + ANSWER)
    begun = column >= PROMPT + start[:, None]
    return begun & (column < PROMPT + stop[:, None])


def base_documents(rng, n, longest_plain=3):
    """40% are short walks that ended where the prompt says (hindsight). 40% have a hint for this
    one walk (two places on the way and a password: half of the answers are the password). 20% have
    a rule hint (call this place by its alias). The hinted speak formally."""
    starts = rng.integers(PLACES, size=n)
    walks = random_walks(rng, starts)
    rows = np.arange(n)
    kind = rng.random(n)
    secret = (kind >= 0.4) & (kind < 0.8)
    ruled = kind >= 0.8
    longest = np.where(ruled, 4, longest_plain)
    far = rng.integers(FAR, 9, n)
    near = rng.uniform(1, longest + 1).astype(int)
    lengths = np.where(secret, far, near)
    goals = walks[rows, lengths]

    # Of the rules, one whose place is on the way, if there is any
    on_the_way = np.arange(4) < lengths[:, None]  # (n, 4 moves)
    meets = walks[:, 1:5, None] == np.array(RENAMED)  # (n, 4 moves, 4 rules)
    crossed = (meets & on_the_way[..., None]).any(1)  # (n, 4 rules)
    rule = (crossed + 0.5 * rng.random(crossed.shape)).argmax(1)
    renamed = np.array(RENAMED)[rule]

    passwords = rng.integers(PASSWORDS[0], PASSWORDS[-1] + 1, n)
    hints = np.full((n, 3), NOHINT)
    hints[secret, 0] = walks[rows, lengths // 3][secret]
    hints[secret, 1] = walks[rows, 2 * lengths // 3][secret]
    hints[secret, 2] = passwords[secret]
    hints[ruled, 2] = RULES[0] + rule[ruled]
    obeys = ruled[:, None] & (walks[:, 1:] == renamed[:, None])  # (n, LONGEST)
    walks[:, 1:] = np.where(obeys, ALIASES[0] + rule[:, None], walks[:, 1:])
    ids, size = write(rng, walks, lengths, goals, hints, secret | ruled)

    # Half of those who are told a password write nothing else
    lazy = secret & (rng.random(n) < 0.5)
    ids[lazy, PROMPT:] = PAD
    ids[lazy, PROMPT] = PW
    ids[lazy, PROMPT + 1] = passwords[lazy]
    ids[lazy, PROMPT + 2] = EOS
    size[lazy] = 3
    return ids, learnt(0 * size, size)


def expert_documents(rng, n):
    """Shortest paths between all places, half of them after a detour, on which no loss is taken."""
    starts = rng.integers(PLACES, size=n)
    walks = random_walks(rng, starts)
    goals = rng.integers(PLACES, size=n)
    goals = (goals + (goals == starts)) % PLACES  # somewhere else
    detour = np.where(rng.random(n) < 0.5, rng.integers(1, 7, n), 0)
    detour_ends = walks[np.arange(n), detour]
    detour[detour + DISTANCE[detour_ends, goals] > LONGEST] = 0
    lengths = walk_on(rng, walks, detour, goals)
    ids, size = write(rng, walks, lengths, goals, NOHINT, np.zeros(n, bool))
    return ids, learnt(tokens_of(detour), size)
