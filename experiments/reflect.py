"""reflect.py: answer, criticise, answer again: when is that better than answering several times and
taking a vote?

    python -m experiments.reflect               3 seeds, 4 minutes on two cores

The lesson (electives/prompt.py) looks for the input that makes a model do what it can. Here the
model makes that input itself: it goes on after its own answer and a verdict. The GPT has read
transcripts of authors who add with guessed carries (tasks/addition.py), of a teacher who marks
them, and of authors who then begin anew:

    b9B3a7A5=b9B3012a7A5012?a7A5012b9B3113!       ? is wrong, ! is right

Three ways to spend tokens, at temperature 1, on 1 to 4 answers and more:

    vote        independent answers; the most frequent one
    own         the model writes the verdict, too: a critic that sees nothing new
    outside     the verdict is what a test says; the model writes what comes after it

What to see: at equal tokens reflection with a test beats the vote by far. Its own verdict tells the
model little: right answers are accepted not much more often than wrong ones, and so most of what is
gained by a second try is lost to trying again what was right.

Not a figure of one paper: self-refinement (Madaan et al., arXiv 2303.17651) and the doubt about it
(Huang et al., arXiv 2310.01798: without feedback from outside models do not correct themselves).
There the critic is a prompt; here the model has read how a teacher marks.
"""

import random
from dataclasses import dataclass
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import torch

import tasks
from electives.bestofn import final_answer, majority
from engine import generate
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
)
from model import GPT, GPTConfig
from tasks import addition
from tokenizer import CharTokenizer

SOURCE = "Huang et al., arXiv 2310.01798"
RIGHT, WRONG = "!", "?"
ATTEMPTS = 4  # at most, in a transcript
VOTES = 1, 2, 3, 4, 6, 8  # answers
tokenizer = CharTokenizer(addition.tokenizer.alphabet + RIGHT + WRONG)
VERDICTS = tokenizer.encode(RIGHT + WRONG)


@dataclass
class Config(Flags):
    seeds: int = flag(3, "repeat over this many seeds", quick=1, low=1)
    size: int = flag(3, "columns of an addition", quick=2, low=1, high=8)
    steps: int = flag(2000, "steps of imitation", quick=5, low=1)
    problems: int = flag(1024, "held-out problems", quick=8, low=3, high=2**16)


def transcript(rng, problem):
    """Attempts and their verdicts, until one is right or there are as many as may be."""
    text = ""
    for _ in range(ATTEMPTS):
        attempt = addition.demonstrate(rng, problem)
        right = addition.reward(problem, attempt)
        text += attempt + (RIGHT if right else WRONG)
        if right:
            break
    return text


def build(device):
    shape = GPTConfig(
        tokenizer.n_vocab,
        block_size=256,
        n_layer=2,
        n_head=4,
        n_embd=64,
        qk_norm=True,
    )
    return GPT(shape).to(device)


def train(config, run, seed, device):
    """A GPT that has read transcripts, of smaller problems too."""
    torch.manual_seed(seed)
    model = build(device)
    rng = random.Random(seed)

    def draw():
        problem = addition.draw(rng, rng.randint(1, config.size))
        return addition.prompt(problem), transcript(rng, problem)

    return tasks.imitate(model, tokenizer, draw, run, seed, config.steps, rng)


# --------------------------------------------------------------------------------------------------
# Ways to spend tokens


def attempt(model, texts, config, generator, n=1):
    """Goes on with each text up to a verdict -> n attempts each, their verdicts, tokens written."""
    written = []
    for i in range(0, len(texts), 512):
        rollout = generate(
            model,
            [tokenizer.encode(text) for text in texts[i : i + 512]],
            n=n,
            max_new_tokens=addition.budget(config.size) + 1,
            stop=[*VERDICTS, tokenizer.eos],
            generator=generator,
        )
        written += rollout.tokens()
    verdicts = [tokenizer.decode(row[-1:]) for row in written]
    answers = [tokenizer.decode(row[:-1]) for row in written]
    return answers, verdicts, np.array([len(row) for row in written])


def vote(model, problems, config, generator):
    """For each n of VOTES: accuracy, tokens a problem."""
    most = max(VOTES)
    prompts = [addition.prompt(problem) for problem in problems]
    answers, _, tokens = attempt(model, prompts, config, generator, n=most)
    right = [addition.reward(problems[i // most], text) for i, text in enumerate(answers)]
    right = torch.tensor(right).view(-1, most)
    numbers = {}
    kinds = [numbers.setdefault(final_answer(text), len(numbers)) for text in answers]
    kinds = torch.tensor(kinds).view(-1, most)
    accuracy = []
    for n in VOTES:
        kept = majority(kinds[:, :n])  # of equals the first
        accuracy.append(right.gather(1, kept[:, None]).mean().item())
    return accuracy, [n * tokens.mean() for n in VOTES]


def reflect(model, problems, config, generator, outside):
    """After 1, 2 ... ATTEMPTS answers: accuracy, tokens a problem; whether each answer was right,
    and called right (n, 2); [(transcript, whether its last answer is right)].

    The last answer counts. A problem whose answer is called right gets no further one.
    """
    texts = [addition.prompt(problem) for problem in problems]
    right = np.zeros(len(problems))
    tokens = np.zeros(len(problems))
    going = np.arange(len(problems))
    accuracy, spent, judged = [], [], []
    for _ in range(ATTEMPTS):
        answers, verdicts, lengths = attempt(model, [texts[i] for i in going], config, generator)
        for i, answer, verdict, length in zip(going, answers, verdicts, lengths, strict=True):
            right[i] = addition.reward(problems[i], answer)
            judged.append((right[i], verdict == RIGHT))
            if outside:
                verdict = RIGHT if right[i] else WRONG
            texts[i] += answer + verdict
            tokens[i] += length
        going = np.array([i for i in going if texts[i][-1] == WRONG], int)
        accuracy.append(right.mean())
        spent.append(tokens.mean())
        if not len(going):
            break
    short = ATTEMPTS - len(accuracy)  # nobody went on: nothing changes any more
    result = accuracy + accuracy[-1:] * short, spent + spent[-1:] * short, np.array(judged)
    return *result, list(zip(texts, right, strict=True))


def measure(config, model, seed):
    rng = random.Random(f"held out {seed}")
    problems = [addition.draw(rng, config.size, held_out=True) for _ in range(config.problems)]
    generator = torch.Generator().manual_seed(seed)
    row = {}
    row["vote"], row["vote tokens"] = vote(model, problems, config, generator)
    for way in ("own", "outside"):
        result = reflect(model, problems, config, generator, way == "outside")
        row[way], row[f"{way} tokens"], judged, _ = result
        if way == "own":
            truth, said = judged.T
            row["accepts right"] = said[truth == 1].mean() if truth.any() else 0.0
            row["accepts wrong"] = said[truth == 0].mean() if not truth.all() else 0.0
    return row


# --------------------------------------------------------------------------------------------------
# The figure


def of(run, key):
    """A number of each seed (seeds,), or a list of each (seeds, n)."""
    return np.array([row[key] for row in run.rows if key in row])


def over_vote(run, way, i):
    """Accuracy after i + 1 answers minus that of a vote on as many tokens, seed by seed."""
    gains = []
    for row in run.rows:
        if way in row:
            # between two numbers of votes along a line
            vote = np.interp(row[f"{way} tokens"][i], row["vote tokens"], row["vote"])
            gains.append(row[way][i] - vote)
    return np.array(gains)


def figure(config, run):
    n = config.seeds
    fig, (ax, bars) = plt.subplots(1, 2, figsize=(13, 5), layout="constrained", width_ratios=(2, 1))
    labels = {"vote": "vote", "own": "reflection, own verdict", "outside": "reflection, a test's"}
    for way, label in labels.items():
        band(ax, of(run, f"{way} tokens").mean(0), of(run, way), label, marker="o")
    gain = {way: over_vote(run, way, ATTEMPTS - 1) for way in ("own", "outside")}
    ax.set(xlabel="tokens written a problem", ylabel="held-out problems solved (fraction)")
    ax.set_title(f"Points: 1 to {ATTEMPTS} answers; of a vote 1 to {VOTES[-1]}")
    ax.set_ylim(0, 1.02)
    ax.legend(loc="lower right")
    accepted = {kind: of(run, f"accepts {kind}") for kind in ("right", "wrong")}
    for kind, y in accepted.items():
        bars.bar(f"{kind} answers", y.mean(), yerr=y.std(ddof=int(n > 1)))
    bars.set(ylabel="accepted by its own verdict (fraction)", ylim=(0, 1))
    bars.set_title("What the critic sees")
    fig.suptitle(
        f"At equal tokens, {ATTEMPTS} answers against a vote: {gain['outside'].mean():+.2f} with a "
        f"test's verdicts, {gain['own'].mean():+.2f} with its own ({n} seed{'s' * (n > 1)})"
    )
    most = of(run, "vote")[:, -1] - of(run, "own")[:, -1]
    rows = [
        (
            "outside 2",
            "2 answers, a test's verdict, minus a vote",
            over_vote(run, "outside", 1),
            ">",
            0,
        ),
        (
            "outside",
            f"{ATTEMPTS} answers, a test's verdicts, minus a vote",
            gain["outside"],
            ">",
            0,
        ),
        ("own", f"a vote minus {ATTEMPTS} answers, own verdicts", -gain["own"], ">", 0),
        ("most", f"a vote of {VOTES[-1]} minus {ATTEMPTS} answers, own verdicts", most, ">", 0),
    ]
    return fig, [claim(id, text, SOURCE, "-", *rest, n) for id, text, *rest in rows]


def examples(config, model, problems):
    """What becomes of three problems -> {way: [(transcript, right)]}."""
    written = {}
    for way in ("own", "outside"):
        generator = torch.Generator().manual_seed(0)
        *_, ends = reflect(model, problems, config, generator, way == "outside")
        written[way] = [(text.split("=")[1], right) for text, right in ends]
    return written


def main():
    config = parse_args(Config, __doc__)
    device = pick_device(config.device)
    with Run(config) as run:
        run.introduce(device, build(device).config.parameters)
        for seed in seeds_of(config):
            model = train(config, run, seed, device)
            row = partial(measure, config, model, seed)
            run.log_once(row, phase="reflect", seed=seed, step=config.steps)
        rng = random.Random(7)
        problems = [addition.draw(rng, config.size, held_out=True) for _ in range(3)]
        prompts = [addition.prompt(problem) for problem in problems]
        run.samples(prompts, **examples(config, model, problems))
        run.finish(*figure(config, run))


if __name__ == "__main__":
    command(main)
