"""quasi.py: n answers that spread out, each of them still an exact sample of the model.

(QuasiMoTTo, Li et al., arXiv 2607.01179; arithmetic sampling, Vilnis et al., arXiv 2210.15458.)
Lay a model's answers side by side on [0, 1), each as wide as it is probable, in the order of their
tokens. A uniform number U falls on an answer with the answer's probability: to sample is to throw a
dart. Of n independent darts many fall close together. But only the law of each dart matters to the
law of its answer, so the n may be thrown together (engine.generate's `uniforms`):

    independent     U_i ~ Unif[0, 1), new ones for each token
    stratified      one in each interval [i/n, (i+1)/n), in random order
    lattice         U_i = i/n + U mod 1: one number moves an even grid
    sobol           a number for each token: n points of a Sobol sequence, one coordinate a token,
                    the bits of each coordinate flipped by a coin of their own

Whatever the coupling, the chance that one of n answers at least is right obeys, with p the
probability of a right answer,

    pass@n <= min(1, n p)          independent darts: 1 - (1 - p)^n

A lattice reaches the bound where the right answers are one interval of [0, 1). But n numbers
coordinate log2 n bits, which the first tokens of an answer spend: where these decide nothing, the
rest is as good as independent.

The task (tasks/numbers.py): which two of six numbers make the sum? A small GPT has read answers
that name one pair at random, so its first two tokens decide. Asked in another way, the same GPT
first hums four random sums, and then its first tokens decide nothing.

    python -m electives.quasi                   3 seeds, under 3 minutes on two cores
    python -m experiments.quasi_rl              reinforcement learning with such groups

What to see: pass@n of the lattice near the bound, so that a third of 16 samples can be saved; after
humming, nothing is gained but by Sobol, which spreads every token. `samples.txt` holds 8 answers of
each kind: the lattice hardly repeats one.

How this differs from the paper:
1. A GPT of 0.1 million parameters that names a pair; the paper: language models on mazes, sudoku,
   countdown and 1D-ARC.
2. The right answers can be listed, so that p, the bound and independent pass@n are exact.
3. A number whose bits are spent goes on with fresh ones (engine.py): the law stays exact.
4. Sobol points are randomised by flipping bits (a digital shift), not by scrambling.
"""

import itertools
import random
from collections import Counter
from dataclasses import dataclass
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import torch

import tasks
from engine import generate
from experiment import (
    Flags,
    Run,
    UserError,
    band,
    claim,
    command,
    flag,
    parse_args,
    pick_device,
    seeds_of,
)
from kernels import token_logprobs
from meter import Meter
from model import GPT, GPTConfig
from tasks import numbers

SOURCE = "Li et al., arXiv 2607.01179"
COUPLED = "stratified", "lattice", "sobol"
HUM = 4  # sums that decide nothing
ANSWER = 4  # tokens, with the end
TEMPERATURES = 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.5
AT = 8  # samples, where a claim is about one n


@dataclass
class Config(Flags):
    seeds: int = flag(3, "repeat over this many seeds", quick=1, low=1)
    n_embd: int = flag(64, "channels of the GPT: 2 layers, 4 heads", quick=32, low=8, high=4096)
    sft_steps: int = flag(600, "steps of supervised training", quick=10, low=1)
    problems: int = flag(1024, "held-out problems", quick=8, low=1, high=2**16)
    samples: int = flag(64, "answers to each, a power of 2", quick=32, low=32, high=1024)

    def __post_init__(self):
        if self.samples & (self.samples - 1):
            raise UserError(f"--samples {self.samples}: must be a power of 2")

    @property
    def ns(self):
        """The n of pass@n: 1, 2, 4 ... samples."""
        return [2**i for i in range(self.samples.bit_length())]


# --------------------------------------------------------------------------------------------------
# The numbers that answers are drawn with, and what they make of pass@n


def group_uniforms(kind, groups, n, tokens, generator):
    """What generate takes as `uniforms` for groups of n answers of at most so many tokens: float64
    (groups * n,), for sobol (groups * n, tokens), None for independent.

    Every single number is uniform on [0, 1); those of two groups are independent.
    """
    if kind == "independent":
        return None

    def rand(*shape):
        return torch.rand(*shape, dtype=torch.float64, generator=generator)

    if kind == "sobol":
        points = torch.quasirandom.SobolEngine(tokens).draw(n, dtype=torch.float64)
        bits = (points * 2**30).long()  # (n, tokens): all the bits that torch's points have
        coins = torch.randint(2**30, (groups, 1, tokens), generator=generator)
        # the points of a group stand to one another as before, and each is uniform on its own
        flipped = bits ^ coins  # (groups, n, tokens)
        u = (flipped + rand(groups, n, tokens)) / 2**30
        return u.flatten(0, 1)
    grid = torch.arange(n, dtype=torch.float64) / n
    if kind == "lattice":
        u = (grid + rand(groups, 1)) % 1  # (groups, n)
    else:
        u = grid + rand(groups, n) / n
        # without a random order the first answer would always come from the first interval
        order = rand(groups, n).argsort(1)
        u = u.gather(1, order)
    return u.flatten()


def independent_pass(p, n):
    """pass@n of n independent answers, each right with probability p."""
    return 1 - (1 - p) ** n


def union_bound(p, n):
    """What no coupling can exceed: the chances of the n answers added up."""
    return (n * p).clamp_max(1)


def coupled_pass(kind, right, n):
    """pass@n of groups of n, from larger groups: right (P, N) bool -> (P,), unbiased.

    The usual formula for pass@k takes every n of the N, and they are not coupled as n should be.
    These are: every (N/n)-th number of a lattice is a lattice; n numbers of a Sobol sequence that
    follow one another, from a multiple of n on, differ from its first n by a flip of bits. Of
    stratified numbers one from each N/n intervals that follow one another: here all such choices
    count, which takes `right` in the order of the intervals.
    """
    P, N = right.shape
    if kind == "lattice":
        found = right.view(P, n, N // n).any(1)  # (P, N / n)
        return found.double().mean(1)
    if kind == "sobol":
        found = right.view(P, N // n, n).any(2)  # (P, N / n)
        return found.double().mean(1)
    intervals = right.view(P, n, N // n).double()
    missed = 1 - intervals.mean(2)  # (P, n): by the one from each
    return 1 - missed.prod(1)


def gap_closed(coupled, independent, bound):
    """The share of the way from independent samples to the bound."""
    return (coupled - independent) / (bound - independent)


def samples_saved(ns, coupled, independent):
    """1 - m/n, where m coupled samples reach the pass@n of n independent ones (seeds, ns).

    m is read off the curve of the coupled ones, between two measurements along log m.
    """
    logs = np.log2(ns)
    m = [
        np.exp2(np.interp(target, curve, logs))
        for target, curve in zip(independent, coupled, strict=True)
    ]
    return 1 - np.stack(m) / ns


# --------------------------------------------------------------------------------------------------
# The task, and a way to ask in which the first tokens decide nothing


def question(problem, hum):
    return numbers.prompt(problem) + " NO" * hum  # no answer yet


def name_pair(a, b):
    return f"{a} +{b} ={a + b}"


def demonstrate(rng, problem, hum):
    """A pair at random, the larger number first."""
    noise = [f"={rng.randrange(1, 2 * numbers.HIGHEST)}" for _ in range(HUM * hum)]
    b, a = sorted(rng.sample(problem[0], 2))
    return " ".join([*noise, name_pair(a, b)])


def solutions(problem):
    """Every right answer of that kind, a list of texts."""
    falling = sorted(problem[0], reverse=True)  # as demonstrators write a pair
    pairs = itertools.combinations(falling, 2)
    return [name_pair(*pair) for pair in pairs if numbers.hits(problem, *pair)]


def build(config, device):
    shape = GPTConfig(
        numbers.tokenizer.n_vocab,
        block_size=128,
        n_layer=2,
        n_head=4,
        n_embd=config.n_embd,
        qk_norm=True,
    )
    return GPT(shape).to(device)


def train(config, run, seed, device):
    """A GPT that has read demonstrations, half of them hummed."""
    torch.manual_seed(seed)
    model = build(config, device)
    rng = random.Random(seed)

    def draw():
        # fewer numbers teach sooner to name those of the prompt
        problem = numbers.draw(rng, rng.randint(2, numbers.SIZE))
        hum = rng.random() < 0.5
        return question(problem, hum), demonstrate(rng, problem, hum)

    return tasks.imitate(model, numbers.tokenizer, draw, run, seed, config.sft_steps, rng)


def write(model, prompts, n, tokens, generator, uniforms=None):
    """n answers of at most so many tokens to each prompt -> their tokens, prompt-major."""
    ids = [numbers.tokenizer.encode(text) for text in prompts]
    stop = numbers.tokenizer.stop
    rollout = generate(model, ids, n, tokens, stop=stop, generator=generator, uniforms=uniforms)
    return rollout.tokens()


def answer(model, problems, hum, kind, n, generator):
    """n answers to each problem -> texts without the hum (P * n,), right (P, n) bool.

    Of stratified numbers the answers come in the order of the intervals.
    """
    skip = HUM * hum
    prompts = [question(problem, hum) for problem in problems]
    written = []
    at_once = max(1, 2048 // n)
    for i in range(0, len(prompts), at_once):
        part = prompts[i : i + at_once]
        u = group_uniforms(kind, len(part), n, skip + ANSWER, generator)
        if kind == "stratified":
            u = u.view(-1, n).sort(1).values.flatten()
        written += write(model, part, n, skip + ANSWER, generator, u)
    texts = [numbers.tokenizer.decode(tokens[skip:]) for tokens in written]
    accepted = [solutions(problem) for problem in problems]
    right = [text in accepted[i // n] for i, text in enumerate(texts)]
    return texts, torch.tensor(right).view(-1, n)


@torch.no_grad()
def probability(model, pairs, temperature):
    """Of each answer, given what stands before it: (before, answer) texts -> (R,) float64."""
    ids, mask = tasks.padded(pairs, numbers.tokenizer)  # (R, T)
    weight = model.lm_head.weight
    logp = []
    for part in ids.to(weight.device).split(1024):
        # inputs ids[:, :-1], targets ids[:, 1:]
        hidden = model.hidden(part[:, :-1])
        token_logp, _ = token_logprobs(hidden, weight, part[:, 1:], temperature)
        logp.append(token_logp.cpu())
    logp = torch.cat(logp) * mask[:, 1:]  # (R, T - 1)
    return logp.sum(1).double().exp()


def exact(model, problems, hum, generator, temperature=1.0, hums=16):
    """The probability of a right answer to each problem (P,): that of all right answers together.

    What the model hums is drawn, `hums` times for each problem; what follows is exact.
    """
    stems = [question(problem, hum) for problem in problems]
    if hum:
        noise = write(model, stems, hums, HUM, generator)
        hummed = [numbers.tokenizer.decode(tokens) for tokens in noise]
        stems = [f"{stems[i // hums]} {text}" for i, text in enumerate(hummed)]
    each = len(stems) // len(problems)
    pairs = []
    owner = []  # the problem that each pair is of
    for i, stem in enumerate(stems):
        texts = solutions(problems[i // each])
        pairs += [(stem, text) for text in texts]
        owner += [i // each] * len(texts)
    p = probability(model, pairs, temperature) / each  # (R,)
    total = torch.zeros(len(problems), dtype=torch.float64)
    return total.index_add(0, torch.tensor(owner), p)


# --------------------------------------------------------------------------------------------------
# What is measured


def measure(config, model, hum, seed):
    """pass@n for each n of config.ns, by each sampler, on held-out problems."""
    rng = random.Random(f"held out {seed}")
    generator = torch.Generator().manual_seed(seed)
    # the same problems for every sampler
    problems = [numbers.draw(rng, held_out=True) for _ in range(config.problems)]

    def curve(passed, *given):
        return [passed(*given, n).mean().item() for n in config.ns]

    # Exact where it can be, estimated from groups of the largest n elsewhere
    p = exact(model, problems, hum, generator)
    row = dict(independent=curve(independent_pass, p), bound=curve(union_bound, p))
    for kind in COUPLED:
        _, right = answer(model, problems, hum, kind, config.samples, generator)
        row[kind] = curve(coupled_pass, kind, right)
    if hum:
        return row
    # A rival: independent answers at the temperature that is best for each n, on other problems
    others = [numbers.draw(rng) for _ in problems]
    tuning, tested = [], []
    for temperature in TEMPERATURES:
        for asked, curves in ((others, tuning), (problems, tested)):
            p = exact(model, asked, hum, generator, temperature)
            curves.append(curve(independent_pass, p))
    best = np.argmax(tuning, 0)  # (ns,)
    row["tuned"] = [tested[i][j] for j, i in enumerate(best)]
    # Another one: independent draws, until n of them are different
    meter = Meter()
    texts, right = answer(model, problems, hum, "independent", config.samples, generator)
    row |= meter.solved(right.sum())
    row["different"] = [different_pass(texts, right, n) for n in config.ns[:-2]]
    return row


def different_pass(texts, right, n):
    """pass@n of the first n different answers: texts (P * N,), right (P, N)."""
    groups = np.array(texts).reshape(len(right), -1)  # (P, N)
    found = 0
    for group, flags in zip(groups, right.tolist(), strict=True):
        # a dict has its keys in the order in which they came first
        different = dict(zip(group, flags, strict=True))
        first = list(different.values())[:n]
        found += any(first)
    return found / len(groups)


def examples(model, problems, kind):
    """8 answers to each problem, counted -> [(text, 1.0 if one of them is right)]."""
    generator = torch.Generator().manual_seed(0)
    texts, right = answer(model, problems, False, kind, 8, generator)
    written = []
    for i, flags in enumerate(right):
        counts = Counter(texts[8 * i : 8 * (i + 1)])
        told = "  ".join(f"{count} x {text}" for text, count in counts.most_common())
        written.append((told, float(flags.any())))
    return written


# --------------------------------------------------------------------------------------------------
# The figure and its claims


def curves(run, hum):
    """What was measured with or without humming, by name: (seeds, ns) each."""
    rows = [row for row in run.rows if row.get("hum") is hum]
    names = set(rows[0]) - {"phase", "hum", "seed", "step"}
    return {name: np.array([row[name] for row in rows]) for name in names}


def figure(config, run):
    ns, n = config.ns, config.seeds
    at, twice = ns.index(AT), ns.index(2 * AT)
    plan, hummed = curves(run, False), curves(run, True)
    closed = [
        gap_closed(*(c[name][:, at] for name in ("lattice", "independent", "bound")))
        for c in (plan, hummed)
    ]  # (seeds,) each
    fig, axes = plt.subplots(1, 3, figsize=(17, 5), layout="constrained")
    fig.suptitle(
        f"{AT} samples from a lattice go {closed[0].mean():.0%} of the way from independent ones "
        f"to the bound; {closed[1].mean():.0%} if the first tokens decide nothing ({n} seeds)"
    )
    draw_passes(axes[0], ns, plan, "The first tokens decide")
    draw_passes(axes[1], ns, hummed, "The first tokens decide nothing")
    few = slice(1, -2)  # where a curve is not yet flat
    for kind, color in (("lattice", "C1"), ("stratified", "C0"), ("sobol", "C2")):
        share = samples_saved(ns, plan[kind], plan["independent"])  # (seeds, ns)
        band(axes[2], ns[few], 100 * share[:, few], kind, marker="o", color=color)
    fewer = samples_saved(ns, plan["lattice"], plan["independent"])[:, twice]
    title = f"The first tokens decide\n{fewer.mean():.0%} fewer than {2 * AT} suffice"
    axes[2].set(title=title, xlabel="independent samples", ylabel="samples saved (%)")
    axes[2].axhline(0, color="k", lw=1)
    axes[2].legend()
    for ax, ticks in zip(axes, (ns, ns, ns[few]), strict=True):
        ax.set_xscale("log", base=2)
        ax.set_xticks(ticks, ticks)
    return fig, claims_of(n, at, plan, hummed, closed, fewer)


def claims_of(n, at, plan, hummed, closed, fewer):
    wrong = []  # pass@1 of a coupled answer, against the exact one
    for c in (plan, hummed):
        wrong += [c[kind][:, 0] - c["independent"][:, 0] for kind in COUPLED]
    tuned = plan["lattice"] - plan["tuned"]
    local = hummed["sobol"] - hummed["independent"]
    where = "where the first tokens decide"
    rows = [
        ("exact", "pass@1 minus the model's own, largest", "0", np.abs(wrong).max(), "<=", 0.01),
        ("decide", f"lattice, n = {AT}: gap closed {where}", "often all", closed[0], ">=", 0.4),
        ("nothing", f"lattice, n = {AT}: gap closed {where} nothing", "-", closed[1], "<=", 0.05),
        ("saved", f"lattice: fewer for independent pass@{2 * AT}", ".25 to .47", fewer, ">=", 0.25),
        (
            "tuned",
            f"pass@{AT}: lattice minus independent at its best temperature",
            "-",
            tuned[:, at],
            ">",
            0,
        ),
        (
            "different",
            f"pass@{AT}: lattice minus {AT} different answers",
            "-",
            plan["lattice"][:, at] - plan["different"][:, at],
            ">",
            0,
        ),
        ("local", f"pass@{AT} {where} nothing: sobol minus independent", "-", local[:, at], ">", 0),
    ]
    return [claim(id, text, SOURCE, *rest, n) for id, text, *rest in rows]


def draw_passes(ax, ns, curves, title):
    """pass@n minus that of independent answers, seed by seed; dashed: rivals."""
    looks = {
        "bound": ("k", ":", "bound"),
        "lattice": ("C1", "-", "lattice"),
        "stratified": ("C0", "-", "stratified"),
        "sobol": ("C2", "-", "sobol"),
        "tuned": ("C3", "--", "independent, best temperature"),
        "different": ("C4", "--", "n different answers"),
    }
    for name, (color, line, label) in looks.items():
        if name in curves:
            k = curves[name].shape[1]
            gain = curves[name] - curves["independent"][:, :k]  # (seeds, k)
            band(ax, ns[:k], gain, label, color=color, ls=line)
    at = ns.index(AT)
    told = [f"{k} {curves[k][:, at].mean():.2f}" for k in ("independent", "lattice", "bound")]
    ax.set(title=f"{title}\npass@{AT}: " + ", ".join(told), ylim=(-0.05, 0.25))
    ax.set(xlabel="n (samples)", ylabel="held-out pass@n minus independent samples'")
    ax.axhline(0, color="k", lw=1)
    ax.legend()


def main():
    config = parse_args(Config, __doc__)
    device = pick_device(config.device)
    parameters = build(config, device).config.parameters  # an impossible shape ends here
    problems = [numbers.draw(random.Random(i), held_out=True) for i in range(3)]
    with Run(config) as run:
        run.introduce(device, parameters)
        for seed in seeds_of(config):
            model = train(config, run, seed, device)
            for hum in (False, True):
                where = dict(phase="coverage", hum=hum, seed=seed, step=config.sft_steps)
                run.log_once(partial(measure, config, model, hum, seed), **where)
        written = {kind: examples(model, problems, kind) for kind in ("independent", "lattice")}
        run.samples([numbers.prompt(problem) for problem in problems], **written)
        run.finish(*figure(config, run))


if __name__ == "__main__":
    command(main)
