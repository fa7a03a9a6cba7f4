"""recipe.py: the teacher errs: which of its answers should a student learn from? At equal tokens,
more questions or more answers to each; all answers, or what a filter lets pass.

(OpenThoughts3, Guha et al., arXiv 2506.04178, varied one part of such a recipe at a time: 16
answers to a question beat one, and no filter of answers beat keeping them all.)

    python -m experiments.recipe            9 minutes of one core

The teacher adds from right to left (tasks/addition.py), and is right about half of the time:

    slips     one line in five says any sum at all: two mistakes are seldom alike
    habit     a carry of 1 is forgotten three times in five: the mistake is what it mostly does

A student, a small GPT that knows nothing, reads 12,800 answers once, of equal length: to as many
questions, or 4 or 16 to each of fewer. A filter throws answers away, and the teacher writes more
until there are as many:

    none        keeps all
    majority    keeps those whose result is the question's most frequent (of one answer: all)
    verified    keeps those that are right, which takes a program that knows

One student without a filter reads three times as many: does what a filter adds remain?

What to see: a student is a distribution, and there are two ways to read it. Its greedy answer takes
the most frequent line: slips are outvoted by the same sum in other questions, and the student gets
better than its teacher; a habit is not outvoted, and it gets worse. A filter makes slips go sooner,
and a majority of 16 finds them as well as a verifier; three times the tokens make them go, too. Of
a habit majorities know nothing. A sample errs like the teacher, or more, until a filter helps. More
questions are a little better than more answers, unless a filter needs the answers.

How this differs from the paper: the size of all; a student that is no pretrained model, and so
needs the questions to learn what an addition is, and would still learn more; a teacher that is
wrong more often; answers that are thrown away cost nothing.
"""

import random
from collections import Counter
from dataclasses import dataclass
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import torch

import tasks
from experiment import (
    Flags,
    Run,
    band,
    claim,
    command,
    flag,
    parse_args,
    pick_device,
    seeds_of,
    series,
)
from model import GPT, GPTConfig
from tasks import addition

SOURCE = "Guha et al., arXiv 2506.04178"
TEACHERS = {"slips": (0.2, 0.0), "habit": (0.0, 0.6)}  # how often: a slip, a carry forgotten
FILTERS = "none", "majority", "verified"
ANSWERS = 1, 4, 16  # to a question
ARMS = [("slips", n, rule) for n in ANSWERS for rule in FILTERS if (n, rule) != (1, "majority")]
ARMS += [("habit", 4, rule) for rule in FILTERS]
LONGER = "none, 3 x tokens"
ARMS += [("slips", 1, LONGER)]
SIZE = 3  # columns
BATCH = 32


@dataclass
class Config(Flags):
    seeds: int = flag(3, "repeat over this many seeds", quick=1, low=1)
    steps: int = flag(400, "steps of a student, of 32 answers each", quick=1, low=1)
    problems: int = flag(400, "held-out problems", quick=3, low=3)


# --------------------------------------------------------------------------------------------------
# The teacher's answers, and what a filter keeps of them


def teach(rng, problem, slip, forget):
    """An answer from right to left."""
    text = ""
    carry = 0
    for (x, y), c in zip(problem, addition.COLUMNS, strict=False):
        if rng.random() < forget:
            carry = 0
        total = rng.randrange(20) if rng.random() < slip else x + y + carry
        text += f"{c}{x}{c.upper()}{y}{carry}{total:02d}"
        carry = total // 10  # the next column takes what stands there, right or not
    return text


def keep(problem, answers, rule):
    """The answers to one question that a filter lets pass."""
    if rule == "verified":
        return [answer for answer in answers if addition.reward(problem, answer)]
    if rule == "majority":
        # lines end in the digits of the result; of equally frequent results the first one
        results = [answer[addition.LINE - 1 :: addition.LINE] for answer in answers]
        (most, _), *_ = Counter(results).most_common(1)
        return [a for a, result in zip(answers, results, strict=True) if result == most]
    return answers


def collect(rng, teacher, n, rule, rows):
    """Questions with n answers each, until a filter has kept `rows` -> (prompt, answer) pairs, and
    what they are.
    """
    pairs, drawn, right = [], 0, 0
    while len(pairs) < rows:
        problem = addition.draw(rng, SIZE)
        answers = [teach(rng, problem, *TEACHERS[teacher]) for _ in range(n)]
        kept = keep(problem, answers, rule)[: rows - len(pairs)]
        pairs += [(addition.prompt(problem), answer) for answer in kept]
        right += sum(addition.reward(problem, answer) for answer in kept)
        drawn += n
    questions = len({prompt for prompt, _ in pairs})
    return pairs, dict(drawn=drawn, questions=questions, right=right / rows)


# --------------------------------------------------------------------------------------------------
# The student


def train(run, seed, arm, pairs, steps, device):
    """A GPT that has read the pairs, each once on average."""
    torch.manual_seed(seed)
    shape = GPTConfig(
        addition.tokenizer.n_vocab,
        block_size=96,
        n_layer=2,
        n_head=4,
        n_embd=64,
        qk_norm=True,
    )
    model = GPT(shape).to(device)
    rng = random.Random(seed)
    name = " ".join(map(str, (seed, *arm)))

    def draw():
        return rng.choice(pairs)

    return tasks.imitate(
        model,
        addition.tokenizer,
        draw,
        run,
        name,
        steps,
        rng,
        batch=BATCH,
    )


def answer(model, problems, temperature):
    """An answer to each problem -> [(text, reward)]."""
    generator = torch.Generator().manual_seed(0)
    budget = addition.budget(SIZE)
    _, texts, rewards = tasks.answer(model, addition, problems, 1, budget, generator, temperature)
    return list(zip(texts, rewards[:, 0].tolist(), strict=True))


def success(model, problems, **about):
    """The share of right answers, greedy ones and samples, beside what the student has read."""
    greedy, sampled = (np.mean([r for _, r in answer(model, problems, t)]) for t in (0, 1))
    return dict(about, greedy=greedy, sampled=sampled)


# --------------------------------------------------------------------------------------------------
# The figure


def at(run, key, teacher, n, rule):
    """A metric of each seed (seeds,)."""
    steps, y = series(run, key, teacher=teacher, filter=rule)
    return y[:, steps == n].squeeze(1)


def figure(config, run):
    fig, (left, middle, right) = plt.subplots(1, 3, figsize=(16, 5), layout="constrained")
    for ax, key in ((left, "greedy"), (middle, "sampled")):
        for rule in FILTERS:
            band(ax, *series(run, key, teacher="slips", filter=rule), rule, marker="o")
        longer = at(run, key, "slips", 1, LONGER)
        ax.plot(1, longer.mean(), "k*", label=LONGER, markersize=12)
        ax.set(xscale="log", xlabel="answers to a question, at equal tokens", xticks=ANSWERS)
        ax.set_xticklabels(ANSWERS)
        ax.minorticks_off()
    for i, key in enumerate(("greedy", "sampled")):
        y = np.array([at(run, key, "habit", 4, rule) for rule in FILTERS])  # (filters, seeds)
        x = np.arange(len(FILTERS)) + 0.4 * i
        right.bar(x, y.mean(1), 0.38, yerr=y.std(1), label=key, color=f"C{i + 3}", ecolor="0.3")
    right.set_xticks(np.arange(len(FILTERS)) + 0.2, FILTERS)
    for ax, teacher in ((left, "slips"), (middle, "slips"), (right, "habit")):
        own = series(run, "right", teacher=teacher, filter="none")[1].mean()
        ax.axhline(own, color="k", ls=":", label="the teacher")
        ax.set(ylim=(0, 1.02), ylabel="held-out problems solved (fraction)")
    left.legend(loc="lower left")
    right.legend(loc="upper left")

    def mean(key, teacher, n, rule):
        return f"{at(run, key, teacher, n, rule).mean():.2f}"

    few, many = (mean("greedy", "slips", m, "none") for m in (1, 16))
    sample, checked = (mean("sampled", "slips", 1, rule) for rule in ("none", "verified"))
    habit, mended = (mean("greedy", "habit", 4, rule) for rule in ("none", "verified"))
    left.set_title(f"Slips, greedy, no filter: {few} with 1 answer, {many} with 16")
    middle.set_title(f"Slips, samples: {sample} without a filter, {checked} verified")
    right.set_title(f"A habit, greedy: {habit} without a filter, {mended} verified")
    right.set_xlabel("filter (4 answers to a question)")
    n = config.seeds
    fig.suptitle(
        f"Without a filter slips are outvoted ({few}, with three times the tokens "
        f"{mean('greedy', 'slips', 1, LONGER)}), a habit is not ({habit}) ({n} seeds)"
    )
    return fig, judge(run, n)


def judge(run, n):
    """The claims, by pairs, seed by seed."""

    def over_none(teacher, numbers, rule, key="greedy"):
        """What a filter adds, the mean over numbers of answers (seeds,)."""
        gains = [at(run, key, teacher, m, rule) - at(run, key, teacher, m, "none") for m in numbers]
        return np.mean(gains, axis=0)

    more = at(run, "greedy", "slips", 16, "none") - at(run, "greedy", "slips", 1, "none")
    verified = over_none("slips", ANSWERS, "verified")
    majority = over_none("slips", (4, 16), "majority")
    left = 1 - at(run, "greedy", "slips", 1, LONGER)
    sampled = over_none("slips", ANSWERS, "verified", "sampled")
    good = over_none("habit", (4,), "verified")
    useless = over_none("habit", (4,), "majority")
    own = "design of the task"
    none = "minus none"
    return [
        claim("answers", "slips, none: 16 answers minus 1", SOURCE, "more", more, ">", 0, n),
        claim("verified", f"slips: verified {none}", SOURCE, "<= 0", verified, "<=", 0.02, n),
        claim("majority", f"slips: majority {none}", SOURCE, "<= 0", majority, "<=", 0.02, n),
        claim("left", "slips: 1 minus none, 3 x tokens", SOURCE, "<= 0", left, "<=", 0.02, n),
        claim("sampled", f"slips, sampled: verified {none}", own, "-", sampled, ">=", 0.1, n),
        claim("habit", f"habit: verified {none}", own, "-", good, ">=", 0.1, n),
        claim("habit majority", f"habit: majority {none}", own, "-", useless, "<=", 0.02, n),
    ]


def main():
    config = parse_args(Config, __doc__)
    device = pick_device(config.device)
    rng = random.Random("held out")
    problems = [addition.draw(rng, SIZE, held_out=True) for _ in range(config.problems)]
    examples = {}
    with Run(config) as run:
        for seed in seeds_of(config):
            for arm in ARMS:
                teacher, n, rule = arm
                rng = random.Random(f"{seed} {teacher}")
                steps = config.steps * (3 if rule == LONGER else 1)
                pairs, about = collect(rng, *arm, rows=steps * BATCH)
                model = train(run, seed, arm, pairs, steps, device)
                where = dict(teacher=teacher, filter=rule, seed=seed, step=n)
                run.log_once(partial(success, model, problems, **about), **where)
                # what the students of the last seed write
                examples[" ".join(map(str, arm))] = answer(model, problems[:3], 0)
        run.samples([addition.prompt(problem) for problem in problems[:3]], **examples)
        run.finish(*figure(config, run))


if __name__ == "__main__":
    command(main)
