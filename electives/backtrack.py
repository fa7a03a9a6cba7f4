"""backtrack.py: a verifier that is often wrong can still guide, if the walk may take a step back.

(VGB, value-guided sampling with stochastic backtracking: Rohatgi et al., arXiv 2510.03149.) A
verifier says of each unfinished answer v how promising it is, V(v), and of whole answers whether
they are right, tau. We want the base's own right answers, in the base's own proportions:

    target(y) = base(y) tau(y) / sum            V*(v) = E[tau | prefix v, the base goes on]

Action-level sampling takes the next token a with probability ~ base(a|v) V(va). With V* it is
exact; with a V that errs by a factor at each token, the errors multiply. VGB is a random walk on
the tree of all prefixes instead. Half of the time it stays, else it goes

    to the child va    with probability ~ base(a|v) V(va)
    to the parent      with probability ~ V(v)

Up to a constant an edge has the same weight both ways, base(va) V(va). So the walk is reversible,
and at rest it is at a whole answer y in proportion to base(y) tau(y): the target, whatever V says
within. A bad V only makes it slow: with a fair one it takes about H^2 steps for H tokens, and then
is at a whole answer once in 2 H steps. So T steps are walked, begun anew until one ends at a whole
answer. Quicker and less true is a walk that keeps its direction, up to the first whole answer:
action-level sampling that goes back where V turns out to have promised too much.

    python -m electives.backtrack           2 minutes on two cores
    python -m experiments.squarecb          which way of decoding suits which problem?

What to see: above, verifiers with a known fault. Action-level sampling drifts from the target as
answers grow, or errors do; the walk of 4 H^2 steps does not, or comes back with more steps. Below,
a GPT that likes square brackets is to use round ones (tasks/dyck.py), and its verifier has seen
2,000 answers. VGB is true to the target, and pays for it in calls of the verifier: action-level
sampling, begun anew until it is right, needs far fewer, and whole answers of the base, judged until
one is right (outcome-level), are as true and cheaper still than VGB as long as one in some hundred
is right. That price grows exponentially with the length; VGB's does not.

How this differs from the paper:
1. Trees small enough to hold every prefix (tasks/trees.py), so that each method's law is exact;
   calls are counted on sampled walks. Tokens that the base gives less than .03 are cut.
2. The rare kind is asked for by the verdict, not only by the prompt; whole answers are judged
   exactly. The verifier starts from the base's weights.
3. The momentum walk is the lift of Hayes and Sinclair 2010 in the form whose balance we can check.
"""

import copy
import math
import random
from dataclasses import dataclass
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F

import tasks
from engine import generate
from experiment import (
    Flags,
    Run,
    band,
    claim,
    command,
    descend,
    flag,
    parse_args,
    pick_device,
    seeds_of,
)
from model import GPT, GPTConfig
from tasks import dyck
from tasks.trees import (
    calls_until,
    delayed,
    distance,
    draw_child,
    noisy,
    perturbed,
    reach,
    sample_blocks,
    tabulate,
    target,
)

SOURCE = "Rohatgi et al., arXiv 2510.03149"
FAULTS = {"perturbed": (perturbed, (4, 6, 8, 10)), "delayed": (delayed, (6, 8, 10, 12, 14))}
NOISE = (0.25, 0.5, 1.0, 1.5)  # standard deviations of log V
BUDGETS = [round(2**i) for i in np.arange(3, 12.5, 0.5)]  # calls of the verifier
CANDIDATES = 1500  # at most, of the methods that begin anew
BLOCKS = [(length, M) for length in (1, 2, 5, 10) for M in (2, 4, 8, 16, 32, 64)]
BLOCK = "block best-of-n"
FIRST = "momentum to a leaf"
COLORS = {
    "outcome-level": "C7",
    BLOCK: "C2",
    "action-level": "C3",
    FIRST: "C1",
    "VGB": "C0",
    "VGB, 16 H²": "C9",
}


@dataclass
class Config(Flags):
    size: int = flag(10, "brackets of a problem, and of its answer", quick=4, low=4, high=10)
    base_steps: int = flag(600, "steps of imitation", quick=5, low=1)
    rollouts: int = flag(2000, "answers of the base that teach the verifier", quick=32, low=1)
    value_steps: int = flag(300, "steps of the verifier", quick=5, low=1)
    problems: int = flag(4, "problems a seed, held out; as many to tune with", quick=1, low=1)
    walks: int = flag(100, "sampled answers a problem, to count calls", quick=4, low=1)


# --------------------------------------------------------------------------------------------------
# Forwards only


def action_level(tree):
    """The policy (N,) that weighs the base's next token by the value of what it leads to."""
    weight = tree.prior * tree.value
    total = tree.sum(weight)[tree.parent]
    # Where every child is worth 0 the answer is lost: go on as the base does
    return np.where(total > 0, weight / np.where(total > 0, total, 1), tree.prior)


# --------------------------------------------------------------------------------------------------
# With steps back


def weights(tree):
    """What the walk weighs (N,) each: the edge into a prefix from its parent, the edge back, and
    the sum of a prefix's edges.
    """
    into = tree.prior * tree.value
    back = tree.value.copy()
    into[0] = back[0] = 0  # the empty prefix has no parent
    total = tree.sum(into) + back
    total[total == 0] = 1  # a prefix worth 0 is never entered
    return into, back, total


def vgb(tree, steps):
    """The law (N,) of where the walk is after each of so many steps."""
    into, back, total = weights(tree)
    law = np.eye(1, len(into))[0]  # it begins with nothing written
    for _ in range(steps):
        share = law / total
        children = share[tree.parent] * into
        parents = tree.sum(share * back)
        law = (law + children + parents) / 2  # half of the time it stays
        yield law


def momentum(tree, steps, to_leaf=False):
    """The lift: a walk that keeps its direction while it can -> its law (N,) after each step.

    Downwards it goes to a child, upwards to the parent, and turns with what the other way weighs
    more. So each prefix is left as often as it is entered, in either direction; it never idles.
    With true values it goes straight down. to_leaf: it ends at the first whole answer.
    """
    into, back, total = weights(tree)
    forth = total - back
    larger = np.maximum(forth, back)
    turn_up = np.maximum(back - forth, 0) / larger
    turn_down = np.maximum(forth - back, 0) / larger
    if to_leaf:
        turn_up[tree.leaves] = 0  # from there it goes nowhere, and is gone
    down = np.eye(1, len(into))[0]
    up = np.zeros(len(into))
    for _ in range(steps):
        children = (down / larger)[tree.parent] * into
        parents = tree.sum(up * back / larger)
        turned = down * turn_up
        down = children + up * turn_down
        up = parents + turned
        yield down + up


def sample_walk(tree, steps, n, rng, lifted):
    """n walks, with momentum if lifted -> where they are after each step (n, steps)."""
    into, back, total = weights(tree)
    forth = total - back
    larger = np.maximum(forth, back)
    upto = np.cumsum(into)
    node = np.zeros(n, int)
    up = np.zeros(n, bool)  # the direction
    visited = []
    for _ in range(steps):
        if lifted:
            u = rng.random(n) * larger[node]
            goes_up = up & (u < back[node])
            goes_down = ~up & (u < forth[node])
            up = up ^ ~(goes_up | goes_down)
        else:
            u = rng.random(n) * 2 * total[node]
            goes_up = u < back[node]
            goes_down = ~goes_up & (u < total[node])
        child = draw_child(tree, upto, node[goes_down], rng)
        node = np.where(goes_up, tree.parent[node], node)
        node[goes_down] = child
        visited.append(node)
    return np.stack(visited, 1)


# --------------------------------------------------------------------------------------------------
# A base and its verifier


def imitate(config, run, seed, device):
    """The base: it has read whole words by authors who seldom open a round bracket."""
    torch.manual_seed(seed)
    rng = random.Random(seed)

    def draw():
        word = dyck.write(rng, "", 2 * config.size, 2 * config.size)
        return word[:1], word[1:]

    V = dyck.tokenizer.n_vocab
    shape = GPTConfig(V, block_size=3 * config.size, n_layer=2, n_head=4, n_embd=64, qk_norm=True)
    model = GPT(shape).to(device)
    return tasks.imitate(model, dyck.tokenizer, draw, run, seed, config.base_steps, rng, batch=64)


def roll_out(config, base, seed):
    """What the base makes of half-finished answers.

    -> words (R, 2 size) of ids; whether each is right (R,); 1 for the prefixes from which on the
    base has written (R, size), after 1 to `size` brackets of the answer.
    """
    rng = random.Random(seed + 1)
    size, total = config.size, 2 * config.size
    # Finished to any point: of whole answers few are right, and teach little
    lengths = [rng.randrange(size, total) for _ in range(config.rollouts)]
    prompts = [dyck.write(rng, "", length, total, habit=1) for length in lengths]
    ids = [dyck.tokenizer.encode(text) for text in prompts]
    generator = torch.Generator().manual_seed(seed + 1)
    words = generate(base, ids, 1, size, generator=generator).ids[:, :total]
    texts = [dyck.tokenizer.decode(word) for word in words.tolist()]
    right = torch.tensor([dyck.reward(text[:size], text[size:]) for text in texts])
    written = torch.arange(size + 1, total + 1) >= torch.tensor(lengths)[:, None]
    return words, right.to(words.device), written.float().to(words.device)


def value_loss(logits, right, written):
    """How badly logits (B, size) of prefixes foretell whether their words are right (B,)."""
    labels = right[:, None].expand_as(logits)
    loss = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    return (loss * written).sum() / written.sum()


def learn_value(config, run, seed, base):
    """The verifier: will this unfinished answer be right? -> a GPT with one logit a prefix."""
    words, right, written = roll_out(config, base, seed)
    model = copy.deepcopy(base)
    torch.manual_seed(seed + 2)
    rng = random.Random(seed + 2)
    model.lm_head = torch.nn.Linear(model.config.n_embd, 1, bias=False).to(words.device)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    for step in run.loop(f"verifier {seed}", config.value_steps, model, optimizer, rng):
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / config.value_steps)
        rows = torch.tensor(rng.choices(range(len(words)), k=64))
        logits = model(words[rows])[:, config.size :, 0]  # (64, size)
        loss = value_loss(logits, right[rows], written[rows])
        optimizer.zero_grad()
        loss.backward()
        descend(optimizer, loss)
        if step % 50 == 0:
            run.log(phase="verifier", seed=seed, step=step, loss=loss.item())
    return model


def tree_of(base, verifier, problem):
    """The tree of the base's answers to a problem, with the verifier's values."""
    prompt, n = dyck.tokenizer.encode(problem), len(problem)

    def tau(ids):
        return dyck.reward(problem, dyck.tokenizer.decode(ids))

    # The brackets only: an answer's length is known, no token ends it
    return tabulate(base, verifier, prompt, n, dyck.tokenizer.eos, tau)


# --------------------------------------------------------------------------------------------------
# What is measured


def laws_of(tree):
    """The exact law of each method's whole answers -> name: (leaves,)."""
    T = 4 * tree.H**2
    laws = {
        "outcome-level": reach(tree, tree.prior),
        "action-level": reach(tree, action_level(tree)),
        FIRST: sum(momentum(tree, T, to_leaf=True)),
    }
    for step, law in enumerate(vgb(tree, 4 * T), 1):
        if step in (T, 4 * T):
            laws["VGB" if step == T else "VGB, 16 H²"] = law
    return {name: law[tree.leaves] for name, law in laws.items()}


def measure(tree):
    """Each method's answers: how far the law of the right ones is from the target, how many are."""
    right = tree.value[tree.leaves] > 0
    laws = laws_of(tree)
    tv = {name: distance(law * right, target(tree)) for name, law in laws.items()}
    return dict(tv=tv, right={name: law @ right / law.sum() for name, law in laws.items()})


def more_visits(tree):
    """How much more often the walk with momentum is at a whole answer than the one without."""
    steps = 4 * tree.H**2
    plain, lifted = (
        sum(law[tree.leaves].sum() for law in walk(tree, steps)) for walk in (vgb, momentum)
    )
    return lifted / plain


def count_calls(tree, n, rng):
    """The fraction of n answers that are right within each budget of calls, by method."""
    H = tree.H
    nodes = np.arange(len(tree.value))
    right = (tree.value > 0) & (nodes >= tree.starts[H])
    per_candidate = nodes > 0
    per_step = tree.sum(np.ones(len(nodes)))  # all children of a prefix are asked about

    def again(policy, length, M):
        """All candidates of an answer begun anew, again and again."""
        blocks = -(-H // length)
        attempts = -(-CANDIDATES // (M * blocks))
        return sample_blocks(tree, policy, length, M, n * attempts, rng).reshape(n, -1)

    def within(asked, price, done=True):
        calls = calls_until(asked, right[asked] & done, price)
        return [float(np.mean(calls <= budget)) for budget in BUDGETS]

    result = {"outcome-level": within(again(tree.prior, H, 1), per_candidate)}
    for length, M in BLOCKS:
        result[f"{length}x{M}"] = within(again(tree.prior, length, M), per_candidate)
    result["action-level"] = within(again(action_level(tree), 1, 1), per_step)
    # With momentum to its first leaf; and walks of T steps, until one of them ends at a leaf
    T = 4 * H * H
    result[FIRST] = within(sample_walk(tree, T, n, rng, lifted=True), per_step)
    walks = sample_walk(tree, T, 64 * n, rng, lifted=False).reshape(n, -1)
    at_an_end = np.arange(1, 64 * T + 1) % T == 0
    result["VGB"] = within(walks, per_step, at_an_end)
    return result


def measure_fault(make, H):
    """A verifier with a known fault."""
    tree = make(H)
    return dict(**measure(tree), visits=more_visits(tree))


def averaged(results):
    """Dicts of numbers, or of lists of them, with the same names -> a dict of their means."""
    return {name: np.mean([one[name] for one in results], 0).tolist() for name in results[0]}


def measure_words(config, base, verifier, seed):
    """A learnt verifier: means over held-out problems; the rival is tuned on others."""
    walk_rng = np.random.default_rng(seed)
    within = []
    for held_out in (False, True):
        rng = random.Random(f"problems {seed}")
        problems = [dyck.draw(rng, config.size, held_out) for _ in range(config.problems)]
        trees = [tree_of(base, verifier, problem) for problem in problems]
        within.append(averaged([count_calls(tree, config.walks, walk_rng) for tree in trees]))
    tuning, words = within
    # Block best-of-n, at each budget with the length and M that are best on the other problems
    grid = [f"{length}x{M}" for length, M in BLOCKS]
    best = np.argmax([tuning[name] for name in grid], 0)  # (budgets,)
    words[BLOCK] = [words[grid[best_one]][i] for i, best_one in enumerate(best)]
    exact = [measure(tree) for tree in trees]
    means = {key: averaged([one[key] for one in exact]) for key in ("tv", "right")}
    return dict(within=words, **means)


def train(config, run, seed, device):
    """A seed's base and verifier; all that is measured is logged."""
    H = 3 if config.quick else 8
    for sd in NOISE:
        where = dict(phase="noise", seed=seed, sd=sd, step=H)
        run.log_once(partial(measure_fault, partial(noisy, sd=sd, seed=seed), H), **where)
    base = imitate(config, run, seed, device)
    verifier = learn_value(config, run, seed, base)
    words = partial(measure_words, config, base, verifier, seed)
    run.log_once(words, phase="words", seed=seed, step=config.value_steps)
    return base, verifier


def examples(base, verifier, problems):
    """An answer of each method to each problem, drawn from its law -> name: [(text, right)]."""
    rng = np.random.default_rng(7)
    written = {}
    for tree in (tree_of(base, verifier, problem) for problem in problems):
        for name, law in laws_of(tree).items():
            node = tree.starts[tree.H] + rng.choice(len(law), p=law / law.sum())
            text = dyck.tokenizer.decode(tree.tokens(node))
            written.setdefault(name, []).append((text, tree.value[node]))
    return written


# --------------------------------------------------------------------------------------------------
# The figure


def column(run, key, name, **where):
    """A method's numbers in the rows that match, an array."""
    return np.array([row[key][name] for row in run.rows if where.items() <= row.items()])


def draw_faults(by_length, by_noise, config, run):
    """How far each method is from the target: against the length, and the verifier's errors."""
    tv = {}
    off = {}
    for name in ("action-level", FIRST, "VGB", "VGB, 16 H²"):
        style = dict(color=COLORS[name], marker="o")
        for kind, line in (("perturbed", "-"), ("delayed", "--")):
            tv[name] = column(run, "tv", name, kind=kind)
            H = FAULTS[kind][1][: len(tv[name])]
            by_length.plot(H, tv[name], line, label=f"{name}, {kind}", **style)
        noise = [column(run, "tv", name, phase="noise", seed=s) for s in seeds_of(config)]
        band(by_noise, NOISE, np.array(noise), name, **style)
        off[name] = np.mean(noise, 0)[NOISE.index(1.0)]
    first, last = tv["action-level"][[0, -1]]
    by_length.set_title(
        f"A verifier one token late: action-level {first:.2f} → {last:.2f}, "
        f"VGB {tv['VGB'][0]:.3f} → {tv['VGB'][-1]:.3f}"
    )
    by_noise.set_title(
        f"Values off by e^±1: action-level {off['action-level']:.2f}, "
        f"VGB {off['VGB']:.2f}, with more steps {off['VGB, 16 H²']:.2f}"
    )
    by_length.set(xlabel="H (tokens of an answer)")
    by_noise.set(xlabel="error of log V (standard deviation, nats)")
    for ax in (by_length, by_noise):
        ax.set(ylabel="total variation to the target", ylim=(0, 1))


def draw_words(by_calls, by_cost, run):
    """Brackets: what is right within a budget of calls; then, how true the law of it is."""
    cost = {}
    tv = {}
    for name in ("outcome-level", BLOCK, "action-level", FIRST, "VGB"):
        style = dict(color=COLORS[name], label=name)
        curves = column(run, "within", name, phase="words")  # (seeds, budgets)
        band(by_calls, BUDGETS, curves, **style)
        cost[name] = 2 ** np.interp(0.5, curves.mean(0), np.log2(BUDGETS), right=math.nan)
        if name != BLOCK:
            y = column(run, "tv", name, phase="words")
            by_cost.errorbar(cost[name], y.mean(), y.std(), fmt="o", markersize=9, **style)
            tv[name] = y.mean()
    by_calls.set_title(
        f"Brackets, half right: {cost['outcome-level']:.0f} calls outcome-level, "
        f"{cost['action-level']:.0f} action-level, {cost[FIRST]:.0f} momentum"
    )
    by_cost.set_title(
        f"Their law is off by {tv['action-level']:.2f} action-level, {tv[FIRST]:.2f} momentum, "
        f"{tv['VGB']:.2f} VGB ({cost['VGB']:.0f} calls)"
    )
    by_calls.set(xlabel="calls of the verifier", ylabel="right answers (fraction)", ylim=(0, 1))
    by_cost.set(xlabel="calls until half are right", ylabel="total variation of right answers")
    for ax in (by_calls, by_cost):
        ax.set_xscale("log", base=2)
        ax.set_xlim(BUDGETS[0], BUDGETS[-1])


def figure(config, run):
    fig, axes = plt.subplots(2, 2, figsize=(14, 10), layout="constrained")
    draw_faults(*axes[0], config, run)
    draw_words(*axes[1], run)
    for ax in axes.flat:
        ax.legend(fontsize="small")
    return fig, judge(config, run)


def judge(config, run):
    """The claims."""
    n = config.seeds
    walk = column(run, "tv", "VGB", phase="exact")
    rise = min(np.diff(column(run, "tv", "action-level", kind=kind)).min() for kind in FAULTS)
    visits = min(row["visits"] for row in run.rows if row["phase"] == "exact")

    def gain(key, ours, rival, **where):
        """Ours minus the rival's (seeds,), or (seeds, budgets)."""
        return column(run, key, ours, **where) - column(run, key, rival, **where)

    words = dict(phase="words")
    off = gain("tv", "VGB", "action-level", phase="noise", sd=1.0)
    one = gain("right", "VGB", "action-level", **words)
    law = gain("tv", "VGB", "action-level", **words)
    over_action = gain("within", FIRST, "action-level", **words).mean(1)
    over_block = gain("within", FIRST, BLOCK, **words).mean(1)
    # fmt: off
    return [
        claim("grows", "action-level TV from one length to the next, smallest rise",
              SOURCE, "grows", rise,
              ">", 0, 1),
        claim("walk", "VGB's TV after 4 H^2 steps, worst",
              SOURCE, "small at any H", walk.max(),
              "<=", 0.015, 1),
        claim("momentum", "visits of whole answers, momentum over VGB, smallest",
              SOURCE, "more", visits,
              ">=", 1.5, 1),
        claim("noise", "values off by e^±1: TV, VGB minus action-level",
              SOURCE, "closer", off,
              "<", 0, n),
        claim("one answer", "brackets, one answer: right, VGB minus action-level",
              SOURCE, "more", one,
              ">=", 0.05, n),
        claim("law", "brackets: TV of right answers, VGB minus action-level",
              SOURCE, "closer", law,
              "<=", -0.05, n),
        claim("action", "brackets, the same calls: right, momentum minus action-level",
              SOURCE, "more", over_action,
              ">", 0, n),
        claim("block", "brackets, the same calls: right, momentum minus block best-of-n",
              SOURCE, "more", over_block,
              ">", 0, n),
    ]
    # fmt: on


def main():
    config = parse_args(Config, __doc__)
    device = pick_device(config.device)
    with Run(config) as run:
        for kind, (make, lengths) in FAULTS.items():
            for H in lengths[: 2 if config.quick else None]:
                run.log_once(partial(measure_fault, make, H), phase="exact", kind=kind, step=H)
        for seed in seeds_of(config):
            base, verifier = train(config, run, seed, device)
        rng = random.Random(7)
        problems = [dyck.draw(rng, config.size, held_out=True) for _ in range(3)]
        run.samples(problems, **examples(base, verifier, problems))
        run.finish(*figure(config, run))


if __name__ == "__main__":
    command(main)
