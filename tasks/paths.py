"""A path through a layered graph, which is given as a list of edges. In all layers but one the path
may go either way:

    xs cs tc tx tl hf ot ok ht of hk jo jn jh /js=    find a way from j to s (no spaces in fact)
    htxs                                              by h, t, x; t leads to c, too, and c to s

Edges of the last layer come first, so that the path is found by reading backwards; f, k, l and n
lead nowhere. A node is a letter, and even (a, c, e, ...) or odd. There are three classes of graphs,
which say where the path goes at a fork of layer i (from 1):

    G1      to the node of i's parity           nine of ten graphs that `draw` gives
    G2      to the other node                   the tenth
    G3      either way, by chance               what the demonstrators do with any graph

Which of G1 and G2 it is, a parity over half of the letters tells, and nobody learns that. So a
model can learn to find paths, and then only how often each class comes. The task of Chen et al.,
arXiv 2510.15020, Section 4, with fewer and smaller layers.
"""

import numpy as np

from experiment import UserError
from tasks import held_out as is_held_out
from tasks import tries
from tokenizer import CharTokenizer

SIZE = 3  # layers
LARGEST = 5  # then the letters are used up
NODES = 24
tokenizer = CharTokenizer("abcdefghijklmnopqrstuvwx-/=")
PAD, SLASH, EQUALS = tokenizer.encode("-/=")
G1, G2, G3 = 0, 1, 2
SECRET = np.random.default_rng(2510).permutation(NODES) < NODES // 2  # the letters that count


def budget(size):
    """A node of each layer, the goal, and the end."""
    return size + 2


def edges_of(size):
    """3 edges from the start, 6 to each further layer, 1 to the goal if the last layer is no fork.

    Another layer that is no fork makes fewer: the list is padded.
    """
    return 3 + 6 * (size - 1) + 1


def prompt_length(size):
    """The edges, two tokens each, then the slash, start, goal and equals sign."""
    return 2 * edges_of(size) + 4


def graphs(rng, classes, size=SIZE):
    """A graph of each class (B,) -> ids (B, prompt_length + size + 1), the answer last.

    Every layer has an even node, an odd node and another one. At a fork the even and the odd node
    lead on. In the one layer that is no fork a single node does.
    """
    B = len(classes)
    rows = np.arange(B)
    nodes, start, goal = name_nodes(rng, classes, size)
    # Which nodes lead on
    narrow = rng.integers(size, size=B)  # (B,): the layer that is no fork
    leads_on = np.zeros((B, size, 3), bool)
    leads_on[:, :, :2] = True
    leads_on[rows, narrow] = False
    leads_on[rows, narrow, rng.integers(3, size=B)] = True
    # The path: slot 0 of a layer is its even node, slot 1 the odd one
    chance = rng.integers(2, size=(B, size))
    kind = classes[:, None]  # (B, 1)
    other_way = np.where(kind == G3, chance, kind)
    layer = np.arange(1, size + 1)
    slot = layer % 2 ^ other_way  # (B, size)
    is_fork = leads_on.sum(2) == 2
    only_way = leads_on.argmax(2)
    slot = np.where(is_fork, slot, only_way)
    path = np.take_along_axis(nodes, slot[..., None], 2)  # (B, size, 1)
    edges = list_edges(rng, nodes, leads_on, start, goal)  # (B, E, 2)
    columns = [
        edges.reshape(B, -1),
        np.full(B, SLASH),
        start,
        goal,
        np.full(B, EQUALS),
        path.squeeze(2),
        goal,
    ]
    return np.column_stack(columns)


def name_nodes(rng, classes, size):
    """Letters for a graph of each class (B,).

    -> nodes (B, size, 3), of each layer an even one, an odd one and any; start (B,); goal (B,).
    """
    B = len(classes)
    key = rng.random((B, NODES))  # sorted, they shuffle the letters
    evens = 2 * key[:, ::2].argsort(1)
    odds = 2 * key[:, 1::2].argsort(1) + 1
    evens = evens[:, :size]
    odds = odds[:, :size]
    used = np.concatenate([evens, odds], 1)
    np.put_along_axis(key, used, 2.0, 1)  # now these come last
    rest = key.argsort(1)[:, : NODES - 2 * size]
    goal = rest[:, 0]
    thirds = rest[:, 1 : 1 + size]
    nodes = np.stack([evens, odds, thirds], 2)  # (B, size, 3)
    # The start is the first letter left that makes the secret parity tell the class
    left = rest[:, 1 + size :]
    chance = rng.integers(2, size=B)
    parity = np.where(classes == G3, chance, classes == G1)
    others = SECRET[nodes].sum((1, 2))
    others = others + SECRET[goal]
    odd_one_needed = (others + parity) % 2 == 1
    fits = SECRET[left] == odd_one_needed[:, None]
    first = fits.argmax(1)
    start = left[np.arange(B), first]
    return nodes, start, goal


def list_edges(rng, nodes, leads_on, start, goal):
    """The edges (B, E, 2) of graphs, from the last layer back, shuffled within a layer.

    A node that leads on does so to every node of the next layer. nodes, leads_on: (B, size, 3).
    Where there are fewer than E, PAD stands before them.
    """
    B, size, _ = nodes.shape
    start_leads_on = np.ones((B, 1), bool)
    sources = [start[:, None], *nodes.swapaxes(0, 1)]
    targets = [*nodes.swapaxes(0, 1), goal[:, None]]
    exists = [start_leads_on, *leads_on.swapaxes(0, 1)]
    edges = []
    order = []
    for i in range(size + 1):
        j = size - i  # from the last layer back
        arrays = np.broadcast_arrays(
            sources[j][:, :, None],
            targets[j][:, None],
            exists[j][:, :, None],
        )  # (B, sources, targets) each
        source, target, real = (x.reshape(B, -1) for x in arrays)  # (B, sources * targets)
        edges.append(np.stack([source, target], 2))
        chance = rng.random(real.shape)
        order.append(np.where(real, i + chance, -1.0))
    edges = np.concatenate(edges, 1)
    order = np.concatenate(order, 1)
    # Edges that do not exist come first: the last edges_of(size) are all that do, and some padding
    last = order.argsort(1)[:, -edges_of(size) :]
    real = np.take_along_axis(order, last, 1) >= 0
    edges = np.take_along_axis(edges, last[..., None], 1)
    return np.where(real[..., None], edges, PAD)


def draw(rng, size=SIZE, held_out=False):
    """The ids of a graph and its answer, a list. rng: a random.Random."""
    if size > LARGEST:
        raise UserError(f"a path of {size} layers: there are letters for {LARGEST}")
    for _ in tries(size, held_out):
        kind = G1 if rng.random() < 0.9 else G2
        numpy_rng = np.random.default_rng(rng.getrandbits(64))
        ids = graphs(numpy_rng, np.array([kind]), size)
        problem = ids[0].tolist()
        if is_held_out(prompt(problem)) == held_out:
            return problem


def prompt(problem):
    return tokenizer.decode(problem[: problem.index(EQUALS) + 1])


def demonstrate(rng, problem):
    """A way to the goal, either way at each fork."""
    slash = problem.index(SLASH)
    sources = problem[:slash:2]
    targets = problem[1:slash:2]
    node, goal = problem[slash + 1 : slash + 3]
    lead_on = {*sources, goal}
    path = []
    while node != goal:
        edges = zip(sources, targets, strict=True)
        node = rng.choice([v for u, v in edges if u == node and v in lead_on])
        path.append(node)
    return tokenizer.decode(path)


def reward(problem, text):
    """1.0 for the path of the graph's class, else 0.0: another way to the goal is wrong, too."""
    answer = problem[problem.index(EQUALS) + 1 :]
    return float(text == tokenizer.decode(answer))
