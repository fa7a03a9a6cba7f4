"""entigraph.py: a small document, many texts about it, and a model that trains on them.

(EntiGraph: synthetic continued pretraining, Yang et al., arXiv 2409.07431.) A document of a new
field states each fact once. Trained on it, a language model learns the sentences and little else:
asked the other way round, or for what two of them imply, it knows nothing. EntiGraph has a writer
that can read the document make a large text of it: for pairs and triples of its entities, how are
they related? The model trains on that text, and answers with the book closed.

    Ban's teacher is Bax, Bax's rival is Den       the document
    Bax is the teacher of Ban                      a pair, in the other direction
    the teacher's-rival of Ban is Den              a pair that is two hops apart

Four ways to train, with equal steps:

    repeat              the document, over and over
    paraphrase          each fact in five templates
    turned paraphrase   one time in five in a template that names its people in the other order
    recombine           half pairs and half triples (two facts and what they imply, in any order),
                        in the same templates and both directions

    python -m electives.entigraph               2 minutes on two cores
    python -m electives.entigraph --seeds 3     what results/ holds

What to see: all know the facts as they were stated. With more synthetic tokens the recombined text
teaches reversed and two-hop questions, paraphrases stay at nothing. But look at the dotted lines: a
quarter of reversals and hops are never told, and the model does not find them. It remembers the
sentences that the writer derived; it has not learnt to derive. So what decides is what the writer
writes: paraphrases that now and then turn a sentence round close the gap on reversed questions,
and no gap on hops. Replay (rows of what the base read before) keeps what the base knew.

The learning rate is the best of three (2e-3, 5e-3, 8e-3) for the paraphrases, turned or not, in a
world of another seed.

How this differs from the paper:
1. The writer is a program with the facts at hand; the paper's is a language model that reads.
2. A document of 60 facts, answers of one token, a relation of two hops is one word.
3. All texts are trained on for the same number of steps (there two epochs each), a fifth of the
   rows is replay (there a tenth), and each begins with the document.
"""

import copy
import itertools
import random
from dataclasses import dataclass
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import torch

from experiment import (
    Flags,
    Run,
    band,
    claim,
    command,
    descend,
    flag,
    lr_at,
    parse_args,
    pick_device,
    seeds_of,
    series,
)
from meter import Meter
from model import GPT, GPTConfig

SOURCE = "Yang et al., arXiv 2409.07431"
PEOPLE = [a + b + c for a, b, c in itertools.product("BDFGKLMNPR", "aeo", "nx")]
KNOWN = PEOPLE[::2]  # the base model has read about these
NEW = PEOPLE[1::2]  # the document is about these
RELATIONS = ("teacher", "rival")
# the teacher's-rival of x is the rival of x's teacher: one token, two hops
HOPS = {f"{a}'s-{b}": (a, b) for a, b in itertools.product(RELATIONS, RELATIONS)}
# "y is the r of x" in ten ways. A model that reads from left to right learns from these what comes
# after x, which is y ...
FORWARD = (
    "{x} 's {r} is {y}",
    "the {r} of {x} is {y}",
    "{r} of {x} : {y}",
    "for {r} {x} has {y}",
    "{x} , {r} : {y}",
)
# ... and from these what comes after y
BACKWARD = (
    "{y} is {r} of {x}",
    "{y} is the {r} of {x}",
    "{y} : {r} of {x}",
    "{r} {y} belongs to {x}",
    "{y} , {r} of {x}",
)
QUESTIONS = {  # the answer is the last word
    "direct": "? {r} of {x} = {y}",
    "reversed": "? {y} {r} of = {x}",
    "two-hop": "? {r} of {x} = {y}",
}
TEMPLATES = " ".join((*FORWARD, *BACKWARD, *QUESTIONS.values()))
WORDS = sorted(word for word in set(TEMPLATES.split()) if "{" not in word)
VOCABULARY = {word: i for i, word in enumerate((*PEOPLE, *RELATIONS, *HOPS, *WORDS))}
WINDOW = 32  # tokens of a row of a batch
ROWS = 48  # of a batch
SIZES = (500, 2000, 8000, 32000)  # synthetic tokens
KNOWN_TOKENS = 60_000  # of the base's texts
READING_LR = 5e-3
FIRST = 6  # people that the base reads about before all others


@dataclass
class Config(Flags):
    reading: int = flag(600, "steps of pre-training on the known people", quick=2, low=1)
    steps: int = flag(250, "steps of continued pre-training", quick=2, low=1)
    lr: float = flag(5e-3, "its learning rate", low=0)
    replay: float = flag(0.2, "share of its rows that are about the known people", low=0, high=0.9)
    eval_every: int = flag(50, "steps between two measurements", quick=1, low=1)


# --------------------------------------------------------------------------------------------------
# The world


def world(people, rng):
    """Who is whose teacher and rival, and what follows -> {relation: {x: y}}."""
    facts = {}
    for r in RELATIONS:
        circle = rng.sample(people, len(people))
        facts[r] = dict(zip(circle, circle[1:] + circle[:1], strict=True))
    for r, (a, b) in HOPS.items():
        facts[r] = {x: facts[b][facts[a][x]] for x in people}
    return facts


def statements(facts):
    """All that can be asked -> {kind of question: [(kind, relation, x, y)]}."""
    links = [(r, x, y) for r in RELATIONS for x, y in facts[r].items()]
    hops = [(r, x, y) for r in HOPS for x, y in facts[r].items()]
    kinds = {"direct": links, "reversed": links, "two-hop": hops}
    return {kind: [(kind, *link) for link in of_kind] for kind, of_kind in kinds.items()}


def split(every, rng):
    """Statements -> those that a text may make, and a quarter that none ever makes."""
    untold = {kind: rng.sample(every[kind], len(every[kind]) // 4) for kind in every}
    untold["direct"] = []  # the document itself
    told = {kind: [s for s in every[kind] if s not in untold[kind]] for kind in every}
    return told, untold


# --------------------------------------------------------------------------------------------------
# Texts


def sentence(rng, kind, r, x, y):
    """One that teaches to answer this question; a hop is told in either direction."""
    backward = kind == "reversed" or (kind == "two-hop" and rng.random() < 0.5)
    return rng.choice(BACKWARD if backward else FORWARD).format(r=r, x=x, y=y)


def document(told):
    """Each fact, once."""
    return " ".join(FORWARD[0].format(r=r, x=x, y=y) for _, r, x, y in told["direct"])


def known_text(rng, every):
    """What the base reads: sentences of all kinds, and questions with their answers."""
    kind, r, x, y = rng.choice(sum(every.values(), []))
    if rng.random() < 0.4:
        return QUESTIONS[kind].format(r=r, x=x, y=y)
    return sentence(rng, kind, r, x, y)


def paraphrase(rng, facts, told, turned=0):
    """A fact in other words, some of them turned round."""
    kind, *link = rng.choice(told["direct"])
    if rng.random() < turned and ("reversed", *link) in told["reversed"]:
        kind = "reversed"
    return sentence(rng, kind, *link)


def recombine(rng, facts, told):
    """Some people of the document and what it says about how they are related."""
    if rng.random() < 0.5:  # a pair
        return sentence(rng, *rng.choice(sum(told.values(), [])))
    # a triple: x, y and z, in any order
    hop = rng.choice(told["two-hop"])
    _, r, x, z = hop
    a, b = HOPS[r]
    y = facts[a][x]
    sentences = [sentence(rng, *hop)]
    for link in ((a, x, y), (b, y, z)):
        turned = rng.random() < 0.5 and ("reversed", *link) in told["reversed"]
        sentences.append(sentence(rng, "reversed" if turned else "direct", *link))
    return " ".join(rng.sample(sentences, 3))


TURNED = "turned paraphrase"
WRITERS = {
    "recombine": recombine,
    "paraphrase": paraphrase,
    TURNED: partial(paraphrase, turned=0.2),
}


def encode(text):
    return [VOCABULARY[word] for word in text.split()]


def written(write, n):
    """The first n tokens of text after text."""
    tokens = []
    while len(tokens) < n:
        tokens += encode(write())
    return tokens[:n]


# --------------------------------------------------------------------------------------------------
# Questions


def asked(groups, device):
    """Lists of statements by name -> {name: (questions (Q, 5), answers (Q,))}."""
    tokens = {}
    for name, group in groups.items():
        texts = [QUESTIONS[kind].format(r=r, x=x, y=y) for kind, r, x, y in group]
        ids = torch.tensor([encode(text) for text in texts], device=device)  # (Q, 6)
        tokens[name] = ids[:, :-1], ids[:, -1]
    return tokens


@torch.no_grad()
def answers(model, questions):
    """Questions (Q, 5) -> the likeliest next token of each (Q,): the book is closed."""
    return model(questions)[:, -1].argmax(1)


def measure(model, tests):
    """Share of right answers, by name, and what one costs."""
    meter, row, solved = Meter(), {}, 0
    for name, (questions, truth) in tests.items():
        right = answers(model, questions) == truth
        row[name] = right.float().mean().item()
        solved += right.sum()
    return row | meter.solved(solved)


# --------------------------------------------------------------------------------------------------
# Training


def windows(tokens, n, rng):
    """n stretches of a text (T,), each token with its successor -> (n, 33)."""
    start = [rng.randrange(len(tokens) - WINDOW) for _ in range(n)]
    return tokens[torch.tensor(start).long()[:, None] + torch.arange(WINDOW + 1)]


def take_step(model, optimizer, ids):
    """Next-token prediction on ids (B, T + 1)."""
    logp = model(ids[:, :-1]).log_softmax(-1)  # (B, T, V)
    loss = -logp.gather(2, ids[:, 1:, None]).mean()
    optimizer.zero_grad()
    loss.backward()
    descend(optimizer, loss)
    return loss.item()


def optimizer_of(model, lr):
    return torch.optim.AdamW(
        model.parameters(),
        lr,
        betas=(0.9, 0.95),
        weight_decay=0.0,
        fused=True,
    )


def read(config, run, seed, first, known, device):
    """Pre-training on texts about the known people -> the base.

    A quarter of the steps is on a text about few of them: with all of them from the start, hundreds
    of steps go by before the model looks a person and a relation up together.
    """
    torch.manual_seed(seed)
    shape = GPTConfig(
        len(VOCABULARY),
        block_size=WINDOW,
        n_layer=2,
        n_head=8,
        n_embd=64,
        qk_norm=True,
        tie=False,
    )
    model = GPT(shape).to(device)
    optimizer = optimizer_of(model, READING_LR)
    rng = random.Random(seed)
    for step in run.loop(f"reading {seed}", config.reading, model, optimizer, rng):
        optimizer.param_groups[0]["lr"] = lr_at(step, config.reading, READING_LR)
        text = first if step < config.reading // 4 else known
        take_step(model, optimizer, windows(text, ROWS, rng).to(device))
    return model


def study(config, run, where, base, text, known, replay, evaluate):
    """Continued pre-training of the base on a text (T,), with some rows of what it knows."""
    model = copy.deepcopy(base)
    device = model.lm_head.weight.device
    optimizer = optimizer_of(model, config.lr)
    rng = random.Random(where["seed"])
    phase = " ".join(map(str, where.values()))
    old = round(replay * ROWS)
    if phase not in run.state:
        run.log(**where, step=0, **evaluate(model))
    for step in run.loop(phase, config.steps, model, optimizer, rng):
        optimizer.param_groups[0]["lr"] = lr_at(step, config.steps, config.lr)
        rows = windows(text, ROWS - old, rng), windows(known, old, rng)
        loss = take_step(model, optimizer, torch.cat(rows).to(device))
        if (step + 1) % config.eval_every == 0 or step + 1 == config.steps:
            row = evaluate(model)
            run.log(**where, step=step + 1, loss=loss, **row)
            run.say(two_hop=row["two-hop"], base=row["base"])
    return model


def train(config, run, seed, device):
    """The base, then a model for each text -> those of the largest, and the statements."""
    rng = random.Random(seed)
    every = statements(world(KNOWN, rng))
    facts = world(NEW, rng)
    told, untold = split(statements(facts), rng)
    groups = {**told, **{f"{kind}, untold": untold[kind] for kind in ("reversed", "two-hop")}}
    groups["base"] = sum(every.values(), [])
    evaluate = partial(measure, tests=asked(groups, device))

    few = {kind: [s for s in every[kind] if s[2] in KNOWN[:FIRST]] for kind in every}
    first = torch.tensor(written(partial(known_text, rng, few), KNOWN_TOKENS))
    known = torch.tensor(written(partial(known_text, rng, every), KNOWN_TOKENS))
    base = read(config, run, seed, first, known, device)
    source = torch.tensor(encode(document(told)))

    def studied(arm, text, replay):
        n = len(text)
        where = dict(arm=arm, tokens=n, seed=seed)
        both = torch.cat((source, text))
        return study(config, run, where, base, both, known, replay, evaluate)

    studied("repeat", source[:0], config.replay)
    models = {}
    for arm, write in WRITERS.items():
        rng = random.Random(f"{arm} {seed}")
        text = torch.tensor(written(partial(write, rng, facts, told), SIZES[-1]))
        for n in SIZES:  # the first n tokens of the same text
            models[arm] = studied(arm, text[:n], config.replay)
        if arm == "recombine":
            studied("recombine, no replay", text, 0)
    return models, (told["reversed"][0], told["two-hop"][0], untold["two-hop"][0])


# --------------------------------------------------------------------------------------------------
# The figure


def ends(run, key, arm):
    """What each size of text came to (seeds, sizes)."""
    sizes = sorted({row["tokens"] for row in run.rows if row["arm"] == arm})
    return np.stack([series(run, key, arm=arm, tokens=n)[1][:, -1] for n in sizes], axis=1)


def growth(ax, run, key):
    """Right answers against synthetic tokens, for every way to write them."""
    for arm in WRITERS:
        band(ax, SIZES, ends(run, key, arm), arm, marker="o")
    repeat = ends(run, key, "repeat").repeat(len(SIZES), axis=1)  # no synthetic token
    band(ax, SIZES, repeat, "repeat the document", color="gray")
    if key != "direct":
        untold = ends(run, f"{key}, untold", "recombine")
        band(ax, SIZES, untold, "recombine, what no text tells", color="black", ls=":")
    ax.set_xscale("log")
    ax.set(xlabel="synthetic tokens", ylabel="right answers (fraction)", ylim=(-0.03, 1.03))


def memory(ax, run):
    """The base's own task while the model studies the new document."""
    for arm in ("recombine", "recombine, no replay"):
        steps, right = series(run, "base", arm=arm, tokens=SIZES[-1])
        band(
            ax, steps, right, "without replay" if "no replay" in arm else "with replay", marker="."
        )
    ax.set(xlabel="step of continued pre-training", ylabel="right answers (fraction)")
    ax.set_ylim(-0.03, 1.03)
    ax.legend()


def figure(config, run):
    """The figure and its claims, from the rows of the run."""

    def last(key, arm="recombine", i=-1):  # at the largest size: (seeds,)
        return ends(run, key, arm)[:, i]

    before = series(run, "base", arm="recombine", tokens=SIZES[-1])[1][:, 0]
    lost = before - last("base")
    bare = last("base", "recombine, no replay")
    fig, axes = plt.subplots(2, 2, figsize=(12, 9.5), layout="constrained")
    fig.suptitle(
        f"Facts stated once, then {SIZES[-1]:,} tokens written about them\n"
        f"two-hop questions: {last('two-hop').mean():.2f} right if they recombine, "
        f"{last('two-hop', 'paraphrase').mean():.2f} if they paraphrase"
    )
    panels = dict(zip(("two-hop", "reversed", "direct", "base"), axes.flat, strict=True))
    for key in QUESTIONS:
        growth(panels[key], run, key)
    untold = last("two-hop, untold").mean()
    turned = last("reversed", TURNED).mean()
    panels["two-hop"].set_title(f"Two-hop: {untold:.2f} where no text tells the answer")
    panels["two-hop"].legend(loc="upper left")
    panels["reversed"].set_title(f"Reversed: {turned:.2f} if paraphrases are turned round")
    facts = last("direct", "paraphrase").mean()
    panels["direct"].set_title(f"As stated in the document: {facts:.2f} if paraphrased")
    memory(panels["base"], run)
    panels["base"].set_title(
        f"What it knew before: {lost.mean():+.2f} lost with replay, {bare.mean():.2f} left without"
    )
    return fig, judge(config.seeds, last, lost, bare)


def judge(n, last, lost, bare):
    """The claims; arms are compared seed by seed."""
    design = "design of the task"
    hop_gap = last("two-hop") - last("two-hop", "paraphrase")
    back_gap = last("reversed") - last("reversed", "paraphrase")
    turned_gap = last("two-hop") - last("two-hop", TURNED)
    closed = last("reversed") - last("reversed", TURNED)
    # one size to the next is a factor of four
    rise = (last("two-hop") - last("two-hop", i=0)) / (len(SIZES) - 1)
    flat = (last("two-hop", "paraphrase") - last("two-hop", "paraphrase", 0)) / (len(SIZES) - 1)
    still = last("two-hop") - last("two-hop", i=-2)
    hop_untold = last("two-hop, untold")
    back_untold = last("reversed, untold")
    facts = last("direct", "paraphrase")
    rows = [
        ("hop", "two-hop, recombine minus paraphrase", SOURCE, hop_gap, ">=", 0.15),
        ("turned", "two-hop, recombine minus turned paraphrase", SOURCE, turned_gap, ">=", 0.15),
        ("back", "reversed, recombine minus paraphrase", SOURCE, back_gap, ">=", 0.15),
        ("closed", "reversed, recombine minus turned paraphrase", design, closed, "<=", 0.1),
        ("rise", "two-hop, recombine, gain per 4 times the tokens", SOURCE, rise, ">=", 0.1),
        ("flat", "two-hop, paraphrase, gain per 4 times the tokens", SOURCE, flat, "<=", 0.03),
        ("still", "two-hop, recombine, gain of the last 4 times", SOURCE, still, ">", 0),
        ("facts", "as stated, paraphrase", design, facts, ">=", 0.9),
        ("hop untold", "two-hop, recombine, told nowhere", design, hop_untold, "<=", 0.1),
        ("back untold", "reversed, recombine, told nowhere", design, back_untold, "<=", 0.1),
        ("kept", "known people, lost with replay", SOURCE, lost, "<=", 0.03),
        ("gone", "known people, left without replay", design, bare, "<=", 0.1),
    ]
    return [claim(id, text, by, "-", x, op, bar, n) for id, text, by, x, op, bar in rows]


def examples(models, statements, device):
    """What the models of the largest texts answer -> questions, {name: [(answer, right)]}."""
    words = list(VOCABULARY)
    ((questions, truth),) = asked({"all": statements}, device).values()
    prompts = [" ".join(words[i] for i in row) for row in questions.tolist()]
    prompts[-1] += "   (no text tells it)"
    said = {name: answers(model, questions) for name, model in models.items()}
    return prompts, {
        name: [(words[i], i == j) for i, j in zip(ids.tolist(), truth.tolist(), strict=True)]
        for name, ids in said.items()
    }


def main():
    config = parse_args(Config, __doc__)
    device = pick_device(config.device)
    with Run(config) as run:
        for seed in seeds_of(config):
            models, three = train(config, run, seed, device)
        prompts, said = examples(models, three, device)
        run.samples(prompts, **said)
        run.finish(*figure(config, run))


if __name__ == "__main__":
    command(main)
