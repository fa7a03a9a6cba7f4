"""recover.py: where mistakes are inevitable, teach the way back.

(RaC, recovery and correction: Hu et al. 2025, arXiv 2509.07953, on robots.) A model that has seen
nothing but flawless demonstrations has never seen a mistake. Here it keeps running totals with a
hand that slips (tasks/totals.py): whatever letter it means, now and then a blot is written,

    p(letter) = (1 - slip) policy(letter)           p(blot) = slip policy(any letter)

and then the total is lost, and those after it are guesses. In each round the model answers, an
oracle finds the first blot or wrong total about which nothing is done, takes over, writes one of

    recovery      < and the line anew: back to a page that the demonstrations know, and on from it
    correction    the next line as it should be: ahead to a total that the demonstrations know

and stops there. The model learns the oracle's tokens; the page before them is only read:

    loss = - mean over lessons, and over the oracle's tokens in each, of log p(token | the page)

Valid states to start from are many, the right total is one: back is easier than ahead. Recovery is
one new token, then what the demonstrations do; a correction sums three digits in one step, which
no demonstration shows. Both are held to the same number of the oracle's tokens, and so are further
full demonstrations, without slips (full), and by a hand that slips as the model's does (shaky).

    python -m electives.recover             4 minutes on two cores

What to see: left, success against what the oracle has written. Recoveries lift it far above
corrections and flawless demonstrations; but a demonstrator whose hand slips as often shows the way
back, too, and in whole answers: shaky ends above all. Right, the causal test that the paper lacks:
ONE model, which may cross out nothing, one line, two, ... The paper's plot of success against
retries compares models that have also seen different data.

How this differs from the paper:
1. A GPT that writes lines, not a robot that folds shirts; mistakes are the hand's, and to be seen.
2. The oracle takes over at the first mistake, always; a human does when failure looks imminent.
3. A correction of the last line is a recovery: no line is left in which to make up for it.
4. None of the model's own answers are learnt, not even those that succeed by themselves.
"""

import copy
import math
import random
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import torch

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
    series,
)
from kernels import token_logprobs
from meter import Meter
from model import GPT, GPTConfig
from tasks import totals

SOURCE = "Hu et al., arXiv 2509.07953"
ARMS = {  # how each is drawn
    "full": dict(label="full demonstrations", marker="s"),
    "shaky": dict(label="the same by a shaky hand", marker="^"),
    "correct": dict(label="corrections", marker="d"),
    "recover": dict(label="recoveries", marker="o"),
}
RETRIES = (0, 1, 2, 4, 8)
BATCH = 64
CROWD = 256  # answers that the oracle looks at together
LETTERS = len(totals.LETTERS)
LINE = 3  # tokens
EOS = totals.tokenizer.eos
BLOT, BACK = totals.tokenizer.encode(totals.BLOT + totals.BACK)

SHAPE = GPTConfig(
    totals.tokenizer.n_vocab,
    block_size=512,  # a page may be long and senseless
    n_layer=3,
    n_head=4,
    n_embd=64,
    qk_norm=True,
    tie=False,  # tokens that no demonstration holds are learnt later
)


@dataclass
class Config(Flags):
    slip: float = flag(0.1, "chance that a letter becomes a blot", low=0, high=1)
    demos: int = flag(1000, "full demonstrations that all begin with", quick=20, low=1)
    warm_up: int = flag(250, "steps of imitation of those", quick=5, low=1)
    rounds: int = flag(4, "rounds of teaching", quick=1, low=1)
    tokens: int = flag(600, "what the oracle may write in a round", quick=60, low=25)
    answers: int = flag(3072, "most answers that it looks at in a round", quick=16, low=1)
    updates: int = flag(100, "steps of imitation in a round", quick=3, low=1)
    lr: float = flag(5e-4, "their learning rate (AdamW, to 0 in each round)", low=0)
    retries: int = flag(8, "crossings-out that an answer may have", quick=1, low=0, high=16)
    problems: int = flag(1024, "held-out problems", quick=16, low=1)


# --------------------------------------------------------------------------------------------------
# Acting with a hand that slips


@contextmanager
def slipping(model, slip, forbidden=()):
    """While on, what is drawn from the model is what its hand writes; ids may be forbidden."""

    def shake(head, inputs, logits):
        p = logits.softmax(-1)  # (R, V)
        for i in forbidden:  # a list as an index would be copied to the GPU at each step
            p[:, i] = 0
        letters = p[:, :LETTERS]  # the tokenizer's first ids
        p[:, BLOT] = slip * letters.sum(1)
        letters *= 1 - slip
        return p.clamp_min(1e-30).log()  # the sampler normalises

    hook = model.lm_head.register_forward_hook(shake)
    try:
        yield
    finally:
        hook.remove()


def act(model, problems, slip, retries, generator):
    """An answer to each problem, with at most so many crossings-out -> all that was written, and
    1.0 if it is finished and right.
    """
    prompts = [totals.tokenizer.encode(totals.prompt(p)) for p in problems]
    pages = [list(prompt) for prompt in prompts]  # what the model reads
    written = [[] for _ in problems]
    new = totals.budget(len(problems[0]))
    going = range(len(problems))
    for left in range(retries, -1, -1):
        # 1. Up to the next crossing-out; who has none left goes on without
        with slipping(model, slip, forbidden=[] if left else [BACK]):
            begun = [pages[i] for i in going]
            rollout = generate(model, begun, 1, new, stop=[EOS, BACK], generator=generator)
        for i, tokens in zip(going, rollout.tokens(), strict=True):
            written[i] += tokens
            pages[i] += tokens
        # 2. It takes the last line off the page
        going = [i for i in going if written[i][-1] == BACK]
        for i in going:
            pages[i] = prompts[i] + pages[i][len(prompts[i]) : -1 - LINE]
        if not going:
            break
    texts = [totals.tokenizer.decode(tokens) for tokens in written]
    rewards = [
        totals.reward(problem, text) * (tokens[-1] == EOS)
        for problem, text, tokens in zip(problems, texts, written, strict=True)
    ]
    return texts, rewards


# --------------------------------------------------------------------------------------------------
# What the oracle writes: lessons, which are ids and the weight of each, 1 for the oracle's tokens


def lesson(given, written, end=False):
    """The oracle goes on from a text, and may end it."""
    given = totals.tokenizer.encode(given)
    written = totals.tokenizer.encode(written) + [EOS] * end
    return given + written, [0] * len(given) + [1] * len(written)


def demonstration(problem):
    """A whole answer."""
    return [lesson(totals.prompt(problem), totals.demonstrate(None, problem), end=True)]


def shaky_demonstration(rng, problem, slip):
    """The same by a hand that slips as the model's does: the oracle crosses out what is wrong."""
    lessons = demonstration(problem)
    page = totals.prompt(problem)
    for i in range(len(problem)):
        line = totals.line(problem, i)
        while rng.random() < slip:
            ids, weights = lesson(page, line[:-1] + totals.BLOT + totals.BACK)
            weights[-2] = 0  # the blot is no lesson
            lessons.append((ids, weights))
        page += line
    return lessons


def intervention(arm, problem, text):
    """The oracle's recovery or correction where the model goes wrong; nothing if it does not."""
    page = totals.mistake(problem, text)
    if page is None:
        return []
    wrong = totals.prompt(problem) + "".join(page)
    if arm == "correct" and len(page) < len(problem):
        return [lesson(wrong, totals.line(problem, len(page)))]
    back = totals.prompt(problem) + "".join(page[:-1])
    return [lesson(wrong, totals.BACK), lesson(back, totals.line(problem, len(page) - 1))]


def teach(config, arm, model, rng, generator):
    """A round of the oracle -> its lessons, of at most config.tokens tokens in all."""
    lessons = []
    left = config.tokens
    crowd = min(CROWD, config.answers)
    for _ in range(config.answers // crowd):
        problems = [totals.draw(rng) for _ in range(crowd)]
        if arm == "full":
            new = [demonstration(problem) for problem in problems]
        elif arm == "shaky":
            new = [shaky_demonstration(rng, problem, config.slip) for problem in problems]
        else:
            texts, _ = act(model, problems, config.slip, config.retries, generator)
            new = [intervention(arm, p, text) for p, text in zip(problems, texts, strict=True)]
        for some in new:
            left -= sum(sum(weights) for _, weights in some)
            if left < 0:
                return lessons
            lessons += some
    return lessons  # a model that seldom fails asks for less


# --------------------------------------------------------------------------------------------------
# Training


def imitation_loss(model, lessons):
    """Cross-entropy of the oracle's tokens. Each lesson counts as much, however short it is."""
    T = max(len(ids) for ids, _ in lessons)
    padded = [
        (ids + [0] * (T - len(ids)), weights + [0] * (T - len(ids))) for ids, weights in lessons
    ]
    device = model.lm_head.weight.device
    ids, weights = torch.tensor(padded, device=device).unbind(1)  # (B, T) each
    hidden = model.hidden(ids[:, :-1])  # (B, T - 1, C)
    logp, _ = token_logprobs(hidden, model.lm_head.weight, ids[:, 1:])
    per_lesson = (logp * weights[:, 1:]).sum(1) / weights.sum(1)  # (B,)
    return -per_lesson.mean()


def imitate(model, optimizer, rng, lessons, lr):
    """A step on some of the lessons."""
    optimizer.param_groups[0]["lr"] = lr
    loss = imitation_loss(model, rng.choices(lessons, k=BATCH))
    optimizer.zero_grad()
    loss.backward()
    descend(optimizer, loss)
    return loss.item()


def adamw(model):
    return torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.01, fused=True)


def pretrain(config, run, seed, device):
    """The base: imitation of full demonstrations -> the model, and these."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    model = GPT(SHAPE).to(device)
    # short ones teach the same steps sooner
    sizes = [rng.randint(1, totals.SIZE) for _ in range(config.demos)]
    demos = [one for size in sizes for one in demonstration(totals.draw(rng, size))]
    optimizer = adamw(model)
    for step in run.loop(f"base {seed}", config.warm_up, model, optimizer, rng):
        # up in a line, down in a line
        lr = 3e-3 * min((step + 1) / 50, 1 - step / config.warm_up)
        loss = imitate(model, optimizer, rng, demos, lr)
        if step % 50 == 0:
            run.say(loss=loss)
    return model, demos


def held_out(config, model, slip, retries):
    """Success on problems that are never trained on; the same problems and numbers for all."""
    rng, generator = random.Random("held out"), torch.Generator().manual_seed(0)
    problems = [totals.draw(rng, held_out=True) for _ in range(config.problems)]
    meter = Meter()
    _, rewards = act(model, problems, slip, retries, generator)
    return dict(success=sum(rewards) / len(rewards), **meter.solved(sum(rewards)))


def rounds(config, run, arm, seed, base, demos):
    """Rounds of teaching and imitation, from the base -> the model."""
    model = copy.deepcopy(base)
    rng, generator = random.Random(seed + 1), torch.Generator().manual_seed(seed + 1)
    optimizer = adamw(model)
    known = dict(lessons=demos, tokens=0)

    def evaluate(round):
        measured = held_out(config, model, config.slip, config.retries)
        where = dict(phase="rounds", arm=arm, seed=seed, step=round)
        run.log(**where, tokens=known["tokens"], **measured)
        return measured["success"]

    phase = f"{arm} {seed}"
    if phase not in run.state:  # a resumed run has this row
        evaluate(0)
    steps = config.rounds * config.updates
    for step in run.loop(phase, steps, model, optimizer, rng, generator, kept=known):
        round, i = divmod(step, config.updates)
        # 1. The model acts, the oracle teaches
        if i == 0:
            new = teach(config, arm, model, rng, generator)
            known["lessons"] = known["lessons"] + new
            known["tokens"] += sum(sum(weights) for _, weights in new)
        # 2. Imitation of all that was ever taught
        lr = config.lr * min((i + 1) / 10, 1 - i / config.updates)
        imitate(model, optimizer, rng, known["lessons"], lr)
        # 3. How far it got
        if i + 1 == config.updates:
            run.say(success=evaluate(round + 1))
    return model


# --------------------------------------------------------------------------------------------------
# The figure


def enough(retries, slip, lines):
    """The chance that no more than so many lines go wrong before the last is right, if nothing but
    the hand errs: a negative binomial's.
    """
    ways = [math.comb(lines - 1 + k, k) * slip**k for k in range(retries + 1)]
    return sum(ways) * (1 - slip) ** lines


def figure(config, run):
    """The figure and its claims, from the rows of the run."""

    def curve(key, arm):
        return series(run, key, phase="rounds", arm=arm)[1]  # (seeds, rounds + 1)

    success = {arm: curve("success", arm) for arm in ARMS}
    capped = series(run, "success", phase="retries")[1]  # (seeds, caps)
    n = config.seeds

    fig, (left, right) = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    for arm, style in ARMS.items():
        x, y = curve("tokens", arm).mean(0), success[arm]
        spread = y.std(0, ddof=1) if n > 1 else 0 * x
        left.errorbar(x, y.mean(0), spread, capsize=3, **style)
    ours = success["recover"][:, -1]
    # a rival is as good as in its best round, even if more teaching made it worse
    best = {arm: success[arm].max(1) for arm in ("full", "shaky", "correct")}
    means = [f"{arm} {y.mean():.2f}" for arm, y in best.items()]
    left.set(title=f"Recoveries end at {ours.mean():.2f}; at best: " + ", ".join(means))
    left.set_ylim(0, 1.02)
    left.set(xlabel="tokens that the oracle has written in all rounds")
    left.set(ylabel="success on held-out problems (fraction)")
    few, many = (capped[:, RETRIES.index(k)] for k in (0, 4))
    band(right, RETRIES, capped, "the model that learnt to recover", marker="o")
    ideal = [enough(k, config.slip, totals.SIZE) for k in RETRIES]
    right.plot(RETRIES, ideal, "k:", label="the chance that no more lines go wrong")
    title = f"One model: {few.mean():.2f} without a retry, {many.mean():.2f} with four"
    right.set(title=title, ylim=(0, 1.02), xticks=RETRIES)
    right.set(xlabel="crossings-out that it may use", ylabel=left.get_ylabel())
    left.legend(loc="lower left")
    right.legend(loc="lower right")

    def ahead(arm, threshold, paper):
        text = f"success of recover at the end minus {arm} in its best round"
        beside = f" ({ours.mean():.2f}, {best[arm].mean():.2f})"
        op = ">=" if threshold else ">"
        return claim(arm, text, SOURCE, paper, ours - best[arm], op, threshold, n, beside)

    rise = np.diff(capped[:, : RETRIES.index(4) + 1], axis=1).min()
    steady = "success of one model, least rise by more retries, worst seed"
    gain = "success of one model, four retries minus none"
    derived = "design of the task"
    return fig, [
        ahead("full", 0.15, "0.61, 0.23"),
        ahead("correct", 0.05, "0.61, 0.22"),
        ahead("shaky", 0, "-"),
        claim("retries", gain, derived, "-", many - few, ">=", 0.1, n),
        claim("steady", steady, derived, "-", rise, ">", 0, n),
    ]


def main():
    config = parse_args(Config, __doc__)
    device = pick_device(config.device)
    with Run(config) as run:
        run.introduce(device, SHAPE.parameters)
        for seed in seeds_of(config):
            base, demos = pretrain(config, run, seed, device)
            # by a hand that does not slip
            measure = partial(held_out, config, base, 0.0, 0)
            run.log_once(measure, phase="base", seed=seed, step=config.warm_up)
            trained = {arm: rounds(config, run, arm, seed, base, demos) for arm in ARMS}
            for retries in RETRIES:
                measure = partial(held_out, config, trained["recover"], config.slip, retries)
                run.log_once(measure, phase="retries", seed=seed, step=retries)
        problems = [totals.draw(random.Random(i), held_out=True) for i in range(3)]
        examples = {}
        for name, model in (("base", base), ("trained", trained["recover"])):
            generator = torch.Generator().manual_seed(0)
            answers = act(model, problems, config.slip, config.retries, generator)
            examples[name] = list(zip(*answers, strict=True))
        run.samples([totals.prompt(p) for p in problems], **examples)
        run.finish(*figure(config, run))


if __name__ == "__main__":
    command(main)
