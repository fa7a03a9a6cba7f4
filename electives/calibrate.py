"""calibrate.py: a model that says how sure it is, and means it.

(Linguistic calibration, Band et al., arXiv 2404.00474.) The text of an answer holds words of
confidence; a reader turns them into a forecast c of "this answer is right". The text is calibrated
if, of all answers that are read as c, a share c is right. Training pays the forecast with a proper
scoring rule: one whose expectation is highest where c is the true chance p of being right.

    proper      1 - (c - right)^2       its mean at chance p is highest at c = p
    absolute    1 - |c - right|         highest at c = 0 where p < 1/2, else at c = 1
    product     c * right               highest at c = 1, whatever p

The world is 2,000 facts that a small GPT has read some 140 times, or once, or never, so that it
knows half of them and guesses the rest. Imitation teaches it to add a word to each answer, "surely"
nine times in ten. RL asks for one half of the facts, the other half is the test: whether words fit
facts that were never asked for shows if the model looks into itself.

    python -m electives.calibrate               2 minutes on two cores
    python -m electives.calibrate --seeds 3     what results/ holds

What to see: the expected calibration error (ECE) falls, the answers stay the same. The ECE alone is
a poor judge: one constant word has almost none. The Brier score and the AUROC (does a right answer
get the larger forecast?) tell a model that knows what it knows from one that always says "maybe".
The model's own probability of its value knows still more, to a reader who may look at it.

How this differs from the paper:
1. The reader is a table of eleven words; the paper's is a language model that reads a paragraph.
2. The quadratic score, which is finite everywhere, instead of the logarithm.
3. The policy gradient acts on the word of confidence alone, and its baseline is the mean over words
   for the same value: a reward on the value would teach the facts that are asked for. As weights
   are shared, the values would still move: a KL to the imitator holds them, embeddings are frozen.
4. The paper teaches the words first by how many sampled answers agree. Here that is a rival, in the
   limit of infinitely many samples (the model's own probability of its value), before and after it
   is calibrated on the training facts.
"""

import copy
import random
from dataclasses import dataclass
from functools import partial

import matplotlib.pyplot as plt
import torch

from engine import KVCache, generate
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
from model import GPT, GPTConfig

SOURCE = "Band et al., arXiv 2404.00474"
N_VALUES = 20
WORDS = (
    "surely not",  # read as 0
    "hardly",
    "very unlikely",
    "unlikely",
    "rather not",
    "maybe",  # read as .5
    "rather",
    "likely",
    "very likely",
    "almost surely",
    "surely",  # read as 1
)
FORECASTS = torch.linspace(0, 1, len(WORDS))  # the reader
# token ids: values, then words, then the one that begins a question, then facts
VALUES = slice(0, N_VALUES)
SAID = slice(N_VALUES, N_VALUES + len(WORDS))
ASK = SAID.stop
FACTS = ASK + 1
TRIES = 4  # values that are sampled for each question
WORDS_EACH = 4  # words that are sampled for each of them


@dataclass
class Config(Flags):
    facts: int = flag(2000, "facts; RL asks for the first half", quick=40, low=4, high=10**5)
    reading: int = flag(40, "steps of pre-training on the facts", quick=4, low=1)
    imitation: int = flag(150, "steps of imitation of answers with words", quick=4, low=1)
    steps: int = flag(400, "steps of reinforcement learning", quick=4, low=2)
    questions: int = flag(64, "questions a step", quick=4, low=1, high=2**14)
    lr: float = flag(4e-3, "its learning rate (constant for half of it, then down)", low=0)
    beta: float = flag(4.0, "weight of the KL of the values to the imitator's", low=0)
    entropy: float = flag(0.1, "weight of the words' entropy at the start", low=0)
    eval_every: int = flag(40, "steps between two measurements", quick=2, low=1)


# --------------------------------------------------------------------------------------------------
# Scoring rules, and the judges of forecasts


def proper(c, right):
    """The quadratic (Brier) score."""
    return 1 - (c - right) ** 2


def absolute(c, right):
    """Looks like the quadratic one, but is not proper."""
    return 1 - (c - right).abs()


def product(c, right):
    """Pays for being sure and right, and takes nothing for being sure and wrong."""
    return c * right


RULES = {"proper": proper, "absolute": absolute, "product": product}

# A table (11, 2) holds the share of all answers by word and by whether they are wrong or right. All
# that is measured is a function of it.


def accuracy(table):
    return table[:, 1].sum()


def ece(table):
    """Expected calibration error: the mean distance from a word's forecast to its share right."""
    says = table.sum(1)  # (11,), how often each word is said
    return (says * FORECASTS - table[:, 1]).abs().sum()


def brier(table):
    """The mean of (c - right)^2."""
    wrong, right = table.T  # (11,) each
    return wrong @ FORECASTS**2 + right @ (1 - FORECASTS) ** 2


def auroc(table):
    """The chance that a right answer has a larger forecast than a wrong one; a tie counts half."""
    wrong, right = table.T / table.sum(0)[:, None].clamp_min(1e-12)  # (11,) each, sums are 1
    below = wrong.cumsum(0) - wrong  # wrong answers with smaller forecasts
    return right @ (below + wrong / 2)


def recalibrated(table, train):
    """The table when the reader takes each word for what it was worth on the training facts."""
    share = train[:, 1] / train.sum(1).clamp_min(1e-12)  # (11,)
    worth = (share * (len(WORDS) - 1)).round().long()  # the nearest word
    return torch.zeros_like(table).index_add_(0, worth, table)


MEASURES = {"ECE": ece, "Brier score": brier, "AUROC": auroc, "accuracy": accuracy}
ONE_WORD = "one word for all"
AGREEMENT = "agreement, calibrated"


def judged(table):
    """A table as what a row of metrics holds."""
    numbers = {name: measure(table).item() for name, measure in MEASURES.items()}
    wrong, right = table.T.tolist()
    return dict(**numbers, wrong=wrong, right=right)


# --------------------------------------------------------------------------------------------------
# The world, and what a model says of it, exactly


def world(config, seed, device):
    """The value of each fact (F,), and how often it is read, within three decades (F,)."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randint(N_VALUES, (config.facts,), generator=generator)
    often = 10 ** (3 * torch.rand(config.facts, generator=generator))
    return truth.to(device), often.tolist()


def questions(facts, device):
    """facts (Q,), a list of numbers -> the tokens that ask for them (Q, 2)."""
    return torch.tensor([[ASK, FACTS + fact] for fact in facts], device=device)


@torch.no_grad()
def joint(model, ids):
    """P(value, word) of the answers to questions (Q, 2) -> (Q, 20, 11).

    Among answers that are a value and a word: nearly all are.
    """
    cache = KVCache(model.config, len(ids), ids.shape[1], device=ids.device)
    hidden = model.hidden(ids, cache)[:, -1]  # (Q, C)
    value_p = model.lm_head(hidden)[:, VALUES].softmax(-1)  # (Q, 20)
    # every value as if it had been said: the questions are read once
    cache = cache.expand(N_VALUES, capacity=ids.shape[1] + 1)
    every = torch.arange(N_VALUES, device=ids.device).repeat(len(ids))[:, None]  # (Q * 20, 1)
    hidden = model.hidden(every, cache)[:, 0]  # (Q * 20, C)
    word_p = (hidden @ model.lm_head.weight[SAID].T).softmax(-1)  # (Q * 20, 11)
    return value_p[..., None] * word_p.view(len(ids), N_VALUES, -1)


def tabled(p, truth):
    """P(value, word) (Q, 20, 11) and the true values (Q,) -> the table (11, 2)."""
    right = p[torch.arange(len(p)), truth]  # (Q, 11)
    wrong = p.sum(1) - right
    return torch.stack((wrong, right), dim=2).mean(0).cpu()


def agreement(p):
    """P(value, word), the word being how many of infinitely many samples agree with the value."""
    value_p = p.sum(2)  # (Q, 20)
    word = (value_p * (len(WORDS) - 1)).round().long()  # the nearest
    return torch.zeros_like(p).scatter_(2, word[..., None], value_p[..., None])


# --------------------------------------------------------------------------------------------------
# Training


def optimizer_of(model, lr):
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(
        parameters,
        lr,
        betas=(0.9, 0.95),
        weight_decay=0.0,
        fused=True,
    )


def take_step(optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    descend(optimizer, loss)


def read(config, run, seed, truth, often):
    """Pre-training: facts in proportion to how often they occur -> a model that answers."""
    torch.manual_seed(seed)
    shape = GPTConfig(
        FACTS + config.facts,
        block_size=4,
        n_layer=2,
        n_head=4,
        n_embd=64,
        qk_norm=True,
        tie=False,
    )
    model = GPT(shape).to(truth.device)
    optimizer = optimizer_of(model, 3e-3)
    rng = random.Random(seed)
    for _ in run.loop(f"reading {seed}", config.reading, model, optimizer, rng):
        facts = rng.choices(range(config.facts), often, k=1024)
        ids = questions(facts, truth.device)  # (1024, 2)
        logp = model(ids)[:, 1].log_softmax(-1)  # (1024, V)
        right = logp.gather(1, truth[facts][:, None])
        take_step(optimizer, -right.mean())
    return model


def imitate(config, run, seed, truth, base):
    """Imitation: the base's own answers, with a word that says little -> the imitator.

    The values come from the base, so that no fact is learnt; the word is "surely" in nine cases of
    ten, and any word in the tenth.
    """
    model = copy.deepcopy(base)
    optimizer = optimizer_of(model, 1e-3)
    rng = random.Random(seed + 1)
    generator = torch.Generator().manual_seed(seed + 1)
    law = torch.full((len(WORDS),), 0.1 / len(WORDS))
    law[-1] += 0.9
    for _ in run.loop(f"imitation {seed}", config.imitation, model, optimizer, rng, generator):
        ids = questions(rng.choices(range(config.facts), k=128), truth.device)  # (128, 2)
        with torch.no_grad():
            value_p = base(ids)[:, 1, VALUES].softmax(-1)  # (128, 20)
        value = value_p.cpu().multinomial(1, generator=generator).to(truth.device)  # (128, 1)
        word = law.multinomial(128, replacement=True, generator=generator)
        word = SAID.start + word.to(truth.device)[:, None]  # (128, 1)
        logp = model(torch.cat((ids, value), dim=1)).log_softmax(-1)  # (128, 3, V)
        value_logp = logp[:, 1, VALUES]  # (128, 20)
        word_logp = logp[:, 2].gather(1, word)
        value_loss = -(value_p * value_logp).sum(1).mean()
        word_loss = -word_logp.mean()
        take_step(optimizer, value_loss + word_loss)
    return model


def rewards(rule, words, right):
    """words (R, n), token ids, and whether each row's value is right (R,) -> (R, n).

    What is no word of confidence gets 0, the least that any rule pays.
    """
    index = words - SAID.start
    legal = (index >= 0) & (index < len(WORDS))
    index = index.clamp(0, len(WORDS) - 1)
    c = FORECASTS.to(words.device)[index]
    return rule(c, right.float()[:, None]) * legal


def rl_loss(config, model, imitator, ids, words, reward, step):
    """ids (R, 3), questions with a value; words (R, n) said after it, and their rewards -> loss."""
    # of words for the same value, those with more than their mean rise, the others fall
    advantage = reward - reward.mean(1, keepdim=True)  # (R, n)
    logits = model.lm_head(model.hidden(ids)[:, 1:])  # (R, 2, V): of the value, of the word
    value_logp, word_logp = logits.log_softmax(-1).unbind(1)  # (R, V) each
    policy = -(advantage * word_logp.gather(1, words)).mean()
    # values get no reward: the KL alone acts on them, and holds them where they were
    with torch.no_grad():
        ref_logp = imitator(ids[:, :2])[:, 1].log_softmax(-1)  # (R, V)
    kl = (value_logp.exp() * (value_logp - ref_logp)).sum(1).mean()
    # While nothing tells right from wrong, one word in the middle is the best. Were it the only
    # one, the ends would never be tried: entropy keeps all alive, less and less
    entropy = -(word_logp.exp() * word_logp).sum(1).mean()
    weight = config.entropy * max(0, 1 - 1.25 * step / config.steps)  # 0 from 80% of the steps
    return policy + config.beta * kl - weight * entropy


def reinforce(config, run, rule, seed, truth, imitator, evaluate):
    """RL on the words for the first half of the facts -> the trained model."""
    model = copy.deepcopy(imitator)
    model.wte.requires_grad_(False)  # a fact's own vector would be trained for the asked ones only
    optimizer = optimizer_of(model, config.lr)
    rng = random.Random(seed + 2)
    generator = torch.Generator().manual_seed(seed + 2)
    phase = f"{rule} {seed}"
    where = dict(arm=rule, seed=seed)
    if phase not in run.state:
        run.log(**where, step=0, **evaluate(model))
    for step in run.loop(phase, config.steps, model, optimizer, rng, generator):
        left = 2 - 2 * step / config.steps  # 2 at the start, 1 in the middle, 0 at the end
        optimizer.param_groups[0]["lr"] = config.lr * min(1, max(0.05, left))
        # 1. Questions; values; for each of these, words
        facts = rng.choices(range(config.facts // 2), k=config.questions)
        prompts = questions(facts, "cpu").tolist()
        ids = generate(model, prompts, TRIES, max_new_tokens=1, generator=generator).ids  # (R, 3)
        said = generate(model, ids.tolist(), WORDS_EACH, max_new_tokens=1, generator=generator)
        words = said.ids[:, 3].view(-1, WORDS_EACH)  # (R, n)
        # 2. What the reader makes of a word, and what the rule pays for it
        right = ids[:, 2] == truth[facts].repeat_interleave(TRIES)  # (R,)
        reward = rewards(RULES[rule], words, right)  # (R, n)
        # 3. A step
        loss = rl_loss(config, model, imitator, ids, words, reward, step)
        take_step(optimizer, loss)
        row = dict(reward=reward.mean().item(), loss=loss.item())
        if (step + 1) % config.eval_every == 0 or step + 1 == config.steps:
            row |= evaluate(model)
            run.say(reward=row["reward"], ECE=row["ECE"], AUROC=row["AUROC"])
        run.log(**where, step=step + 1, **row)
    return model


def rivals(imitator, asked, test, truth):
    """The imitator's values with other words -> the name of each choice of words, its table."""
    asked_p = joint(imitator, asked)
    test_p = joint(imitator, test)
    asked_truth, test_truth = truth.split([len(asked), len(test)])
    # its own words say nothing: calibrated, they become one word, the share that is right
    own = tabled(test_p, test_truth)
    agreed = tabled(agreement(test_p), test_truth)
    asked_agreed = tabled(agreement(asked_p), asked_truth)
    return {
        ONE_WORD: recalibrated(own, tabled(asked_p, asked_truth)),
        "agreement": agreed,
        AGREEMENT: recalibrated(agreed, asked_agreed),
    }


def train(config, run, seed, device):
    """The base, its imitator, and one model for each rule -> those that say words, by name."""
    truth, often = world(config, seed, device)
    half = config.facts // 2
    asked = questions(range(half), device)
    test = questions(range(half, config.facts), device)

    def evaluate(model):
        return judged(tabled(joint(model, test), truth[half:]))

    base = read(config, run, seed, truth, often)
    imitator = imitate(config, run, seed, truth, base)
    for name, table in rivals(imitator, asked, test, truth).items():
        run.log_once(partial(judged, table), arm=name, seed=seed, step=0)
    models = {"imitator": imitator}
    for rule in RULES:
        models[rule] = reinforce(config, run, rule, seed, truth, imitator, evaluate)
    return models


# --------------------------------------------------------------------------------------------------
# The figure


def last(run, key, arm, i=-1):
    """A measure of an arm at its end (seeds, ...)."""
    return series(run, key, arm=arm)[1][:, i]


def says(run, arm, i=-1):
    """How often each word is said (seeds, 11)."""
    return last(run, "wrong", arm, i) + last(run, "right", arm, i)


def reliability(ax, run, i, label):
    """Share right by word, all seeds together; a point's area is how often the word is said."""
    often = says(run, "proper", i).mean(0)  # (11,)
    share = last(run, "right", "proper", i).mean(0) / often.clip(1e-12)
    used = often > 0.001
    c = FORECASTS.numpy()[used]
    (line,) = ax.plot(c, share[used], alpha=0.6, label=label)
    area = 20 + 600 * often[used]
    ax.scatter(c, share[used], s=area, color=line.get_color(), alpha=0.6)


def figure(config, run):
    """The figure and its claims, from the rows of the run."""
    before = last(run, "ECE", "proper", 0)  # (seeds,), as all that follows
    after = last(run, "ECE", "proper")
    moved = last(run, "accuracy", "proper") - last(run, "accuracy", "proper", 0)
    at_ends = says(run, "absolute")[:, [0, -1]].sum(1)
    at_one = says(run, "product")[:, -1]
    fig, axes = plt.subplots(2, 2, figsize=(12, 9), layout="constrained")
    diagram, training, use, plane = axes.flat
    change = f"ECE {before.mean():.2f} → {after.mean():.3f}"
    fig.suptitle(
        f"Words of confidence, paid by a proper scoring rule: {change}\n"
        "(measured on facts that RL never asked for)"
    )
    diagram.plot((0, 1), (0, 1), color="gray", ls="--", label="calibrated")
    reliability(diagram, run, 0, "before RL")
    reliability(diagram, run, -1, "after RL, proper rule")
    area = last(run, "AUROC", "proper", 0).mean(), last(run, "AUROC", "proper").mean()
    diagram.set(title=f"What a word is worth: AUROC {area[0]:.2f} → {area[1]:.2f}")
    diagram.set_xlabel("what the word is read as")
    diagram.set_ylabel("share right (area: how often said)")

    for key in MEASURES:
        band(training, *series(run, key, arm="proper"), key, marker=".")
    training.set(title=f"The answers behind the words: accuracy {moved.mean():+.3f}")
    training.set(xlabel="step of RL, proper rule", ylabel="on a scale from 0 to 1")

    for rule in RULES:
        band(use, FORECASTS.numpy(), says(run, rule), rule, marker=".")
    use.set(title=f"absolute: {at_ends.mean():.0%} at 0 or 1; product: {at_one.mean():.0%} at 1")
    use.set(xlabel="what the word is read as", ylabel="share of answers with this word")
    use.set_ylim(0, 1.02)

    plane.scatter(before, last(run, "Brier score", "proper", 0), label="before RL")
    for arm in (*RULES, ONE_WORD, "agreement", AGREEMENT):
        plane.scatter(last(run, "ECE", arm), last(run, "Brier score", arm), label=arm)
    error = last(run, "ECE", ONE_WORD).mean()
    area = last(run, "AUROC", ONE_WORD).mean()
    plane.set(title=f"One word for all: ECE {error:.3f}, AUROC {area:.2f}")
    plane.set(xlabel="ECE (lower is better)", ylabel="Brier score (lower is better)")
    for ax in axes.flat:
        ax.legend()
    return fig, judge(config.seeds, run, before, after, moved, at_ends, at_one)


def judge(n, run, before, after, moved, at_ends, at_one):
    """The claims."""
    ours = last(run, "Brier score", "proper")
    one = last(run, "Brier score", ONE_WORD) - ours
    agreed = last(run, "Brier score", AGREEMENT) - ours
    error = f" (its ECE: {last(run, 'ECE', ONE_WORD).mean():.3f})"
    design = "design of the task"
    area = last(run, "AUROC", "proper")
    farthest = abs(moved).max()
    return [
        claim("before", "ECE before RL", design, "-", before, ">=", 0.25, n),
        claim("ece", "ECE after RL", SOURCE, "falls", after, "<=", 0.05, n),
        claim("brier", "Brier score after RL", design, "-", ours, "<=", 0.1, n),
        claim("auroc", "AUROC after RL", design, "-", area, ">=", 0.85, n),
        claim("same", "accuracy moved, worst seed", SOURCE, "-", farthest, "<=", 0.02, n),
        claim(
            "ends",
            "rule 1 - |c - right|: share of words read as 0 or 1",
            "derived",
            "all",
            at_ends,
            ">=",
            0.95,
            n,
        ),
        claim(
            "one",
            "rule c * right: share of the word read as 1",
            "derived",
            "all",
            at_one,
            ">=",
            0.95,
            n,
        ),
        claim("gamed", "Brier score, one word minus ours", design, "-", one, ">=", 0.1, n, error),
        claim(
            "agreement",
            "Brier score, calibrated agreement minus ours",
            SOURCE,
            "-",
            agreed,
            ">",
            0,
            n,
        ),
    ]


def examples(models, config, seed, device):
    """Three test facts, read often, seldom and hardly ever -> prompts, {name: [(text, right)]}."""
    truth, often = world(config, seed, device)
    by_often = sorted(range(config.facts // 2, config.facts), key=often.__getitem__)
    facts = [by_often[len(by_often) * i // 10] for i in (9, 5, 1)]
    prompts = [f"fact {i}, read {often[i]:.0f} times as often as the rarest" for i in facts]
    asked = questions(facts, "cpu").tolist()
    answers = {name: [] for name in models}
    for name, model in models.items():
        generator = torch.Generator().manual_seed(seed)
        said = generate(model, asked, max_new_tokens=2, generator=generator).tokens()
        for fact, (value, word) in zip(facts, said, strict=True):
            sure = dict(enumerate(WORDS, SAID.start)).get(word, "(no word of confidence)")
            answers[name].append((f"{value}, {sure}", value == truth[fact].item()))
    return prompts, answers


def main():
    config = parse_args(Config, __doc__)
    device = pick_device(config.device)
    with Run(config) as run:
        for seed in seeds_of(config):
            models = train(config, run, seed, device)
        prompts, answers = examples(models, config, seed, device)
        run.samples(prompts, **answers)
        run.finish(*figure(config, run))


if __name__ == "__main__":
    command(main)
