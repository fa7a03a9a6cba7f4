"""prompt.py: teach a model that may not change: find the input that makes it do what you want.

(Prompt tuning: Lester et al., arXiv 2104.08691. Prefix tuning: Li and Liang, arXiv 2101.00190.)
A prompt is k tokens, and a token is a row of the embedding. Instead of choosing rows, make new ones
and train them by gradient descent, with every weight of the model frozen:

    soft prompt    x = [P; wte(ids)]                              P (k, C) is trained
    prefix         every layer sees k more keys and values        (layers, 2, k, C) are trained
    discrete       the k tokens of the vocabulary with the least loss, by search: nothing is trained
    full           every weight is trained, without a prompt      the rival

The model is a small GPT that follows orders (tasks/orders.py): two words say what becomes of five
letters. Then the words are left out, and something has to say in their place what is wanted:

    known     two words that it has often followed together
    unseen    two words that it has followed, but never together
    new       a secret alphabet and a secret order of places: no words for it

    python -m electives.prompt                  3 minutes on two cores

What to see: sixteen tokens, less than a hundredth of the parameters, are nearly as good as full
fine-tuning where the model has the parts, also where no one or two words bring them out. What it
has never done they teach, too, but not reliably. `samples.txt` has what each way makes of a text.

How this differs from the papers:
1. A GPT of 0.1 million parameters and tasks of five letters; there T5 up to 11 billion, where the
   gap to full fine-tuning closes with size.
2. The prefix's keys and values are trained as they are, not through an MLP.
3. Each method has its own learning rate, the best of four on another seed (0.03 to 0.3 for prompts,
   0.0003 to 0.003 for all weights).
"""

import copy
import itertools
import random
from dataclasses import dataclass
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from torch.func import functional_call

from engine import KVCache
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
from meter import Meter
from model import GPT, GPTConfig
from tasks import orders

SOURCE = "Lester et al., arXiv 2104.08691"
TASKS = "known", "unseen", "new"
KNOWN = "LN"  # two words
SOFT = 1, 2, 4, 8, 16  # tokens
PREFIX = 1, 3
ARMS = [("soft", k) for k in SOFT] + [("prefix", k) for k in PREFIX] + [("full", 0)]
STARTS = 8  # tokens of the soft prompt that begins as words, or at random
RATES = {"soft": 0.2, "prefix": 0.2, "full": 1e-3}


@dataclass
class Config(Flags):
    base_steps: int = flag(2500, "steps in which the model learns to follow words", 5, low=1)
    steps: int = flag(400, "steps of each method on each task", quick=3, low=1)
    batch: int = flag(32, "texts a step", quick=4, low=1)
    problems: int = flag(512, "held-out texts", quick=8, low=1)
    eval_every: int = flag(25, "steps between two measurements", quick=1, low=1)


# --------------------------------------------------------------------------------------------------
# The model and the three tasks


def build(device):
    shape = GPTConfig(
        orders.tokenizer.n_vocab,
        block_size=64,
        n_layer=3,
        n_head=4,
        n_embd=64,
        qk_norm=True,
        tie=False,
    )
    return GPT(shape).to(device)


def encode(pairs, device):
    """(prompt, answer) texts of one length each -> ids (B, T), without an end."""
    ids = [orders.tokenizer.encode(prompt + answer) for prompt, answer in pairs]
    return torch.tensor(ids, device=device)


def answer_loss(logits, ids):
    """Cross-entropy of the five letters of the answer, logits (B, T, V) of ids (B, T)."""
    said = logits[:, -orders.SIZE - 1 : -1]  # (B, 5, V)
    return F.cross_entropy(said.flatten(0, 1), ids[:, -orders.SIZE :].flatten())


def accuracy(logits, ids):
    """The fraction of answers whose every letter is the likeliest: what greedy decoding writes."""
    said = logits[:, -orders.SIZE - 1 : -1].argmax(2)  # (B, 5)
    return (said == ids[:, -orders.SIZE :]).all(1).float().mean().item()


def imitate(config, run, seed, device):
    """A GPT that follows two words."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    model = build(device)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.01, fused=True)
    for step in run.loop(f"base {seed}", config.base_steps, model, optimizer, rng):
        left = 1 - step / config.base_steps
        optimizer.param_groups[0]["lr"] = 3e-3 * min((step + 1) / 50, left)
        texts = [(orders.draw_words(rng), orders.draw_text(rng)) for _ in range(64)]
        ids = encode([(f"{w}{x}=", orders.follow(w, x)) for w, x in texts], device)
        loss = answer_loss(model(ids), ids)
        optimizer.zero_grad()
        loss.backward()
        descend(optimizer, loss)
        if step % 100 == 0 or step + 1 == config.base_steps:
            run.log(phase="base", seed=seed, step=step, loss=loss.item())
            run.say(loss=loss.item())
    return model


def function_of(task, seed):
    """What a task makes of a text."""
    if task == "known":
        return partial(orders.follow, KNOWN)
    rng = random.Random(f"secret {seed}")
    if task == "unseen":
        return partial(orders.follow, rng.choice(orders.UNSEEN))
    letters = rng.sample(orders.LETTERS, len(orders.LETTERS))
    places = rng.sample(range(orders.SIZE), orders.SIZE)
    secret = dict(zip(orders.LETTERS, letters, strict=True))
    return lambda text: "".join(secret[text[place]] for place in places)


def examples(function, rng, n, device, held_out=False):
    """n texts and what the function makes of them, without words (n, 11)."""
    texts = [orders.draw_text(rng, held_out) for _ in range(n)]
    return encode([(f"{text}=", function(text)) for text in texts], device)


# --------------------------------------------------------------------------------------------------
# Ways to tell the model


class SoftPrompt(torch.nn.Module):
    """k new tokens in front of every text. start (k, C): what their rows are before training."""

    def __init__(self, model, start):
        super().__init__()
        self.frozen = [model]  # in a list: not one of this module's own parameters
        self.rows = torch.nn.Parameter(start.clone())

    def forward(self, ids):
        (model,) = self.frozen
        V, k = model.config.vocab_size, len(self.rows)
        # the vocabulary has k more tokens, V to V + k - 1, at the input only
        table = torch.cat((model.wte.weight, self.rows))  # (V + k, C)
        prompt = torch.arange(V, V + k, device=ids.device).expand(len(ids), k)
        logits = functional_call(model, {"wte.weight": table}, torch.cat((prompt, ids), dim=1))
        return logits[:, k:]


class Prefix(torch.nn.Module):
    """k keys and values that every layer finds in its cache before the text begins.

    They begin as those of some words (k,), as Li and Liang found best.
    """

    def __init__(self, model, words):
        super().__init__()
        self.frozen = [model]
        self.length = len(words)  # of what is in the cache
        dtype = model.wte.weight.dtype
        cache = KVCache(model.config, 1, self.length, device=words.device, dtype=dtype)
        with torch.no_grad():
            model.hidden(words[None], cache)
        kv = [torch.cat(pair) for pair in zip(cache.k, cache.v, strict=True)]  # (2, k, K, D) each
        self.kv = torch.nn.Parameter(torch.stack(kv))  # (layers, 2, k, K, D)

    def forward(self, ids):
        (model,) = self.frozen
        return model.lm_head(model.hidden(ids, cache=self))

    def extend(self, T):
        """As engine.KVCache does: the positions of T more tokens, and no mask."""
        return slice(self.length, self.length + T), None

    def append(self, layer, k, v):
        """(B, T, K, D) of the text -> (B, k + T, K, D)."""
        before = self.kv[layer][:, None].expand(-1, len(k), -1, -1, -1)  # (2, B, k, K, D)
        return torch.cat((before[0], k), dim=1), torch.cat((before[1], v), dim=1)


@torch.no_grad()
def search(model, ids):
    """The prompt of one or two tokens with the least loss in front of ids (B, T): all are tried."""
    V = model.config.vocab_size
    best = torch.inf, None
    for k in (1, 2):
        for prompt in itertools.product(range(V), repeat=k):
            texts = torch.cat((ids.new_tensor([prompt] * len(ids)), ids), dim=1)
            loss = answer_loss(model(texts)[:, k:], ids).item()
            best = min(best, (loss, prompt))
    return list(best[1])


def learner_of(base, method, k, seed, words=True):
    """What is trained; it is called with ids (B, T). A prompt begins as k random words, or at
    random: rows as large as theirs.
    """
    if method == "full":
        return copy.deepcopy(base).requires_grad_(True)
    generator = torch.Generator().manual_seed(seed)
    table = base.wte.weight.detach()
    chosen = torch.randint(len(orders.WORDS), (k,), generator=generator).to(table.device)
    if method == "prefix":
        return Prefix(base, chosen)
    noise = table.std() * torch.randn((k, table.shape[1]), generator=generator)
    return SoftPrompt(base, table[chosen] if words else noise.to(table.device))


def tune(config, run, base, task, name, learner, rate, seed):
    """Train what may be trained of a learner on a task; its accuracy goes to the log."""
    device = base.lm_head.weight.device
    function = function_of(task, seed)
    test = examples(function, random.Random(f"test {seed}"), config.problems, device, held_out=True)
    learnt = [p for p in learner.parameters() if p.requires_grad]
    size = sum(p.numel() for p in learnt)
    optimizer = torch.optim.AdamW(learnt, rate, weight_decay=0.0)
    rng = random.Random(seed)
    where = dict(phase="tune", task=task, arm=name, seed=seed, size=size)
    for step in run.loop(f"{task} {name} {seed}", config.steps, learner, optimizer, rng):
        optimizer.param_groups[0]["lr"] = rate * min((step + 1) / 20, 1 - step / config.steps)
        ids = examples(function, rng, config.batch, device)
        loss = answer_loss(learner(ids), ids)
        optimizer.zero_grad()
        loss.backward()
        descend(optimizer, loss)
        if (step + 1) % config.eval_every == 0 or step + 1 == config.steps:
            meter = Meter()
            with torch.no_grad():
                reached = accuracy(learner(test), test)
            cost = meter.solved(reached * config.problems)
            run.log(**where, step=step + 1, loss=loss.item(), accuracy=reached, **cost)
            run.say(accuracy=reached)
    return learner


def try_words(config, base, task, seed):
    """What search finds, and its accuracy."""
    device = base.lm_head.weight.device
    function = function_of(task, seed)
    prompt = search(base, examples(function, random.Random(seed), 2 * config.batch, device))
    rng = random.Random(f"test {seed}")
    test = examples(function, rng, config.problems, device, held_out=True)
    return dict(
        prompt=orders.tokenizer.decode(prompt), accuracy=accuracy(worded(base, prompt)(test), test)
    )


def worded(base, prompt):
    """The base with a prompt of tokens (k,), called as the learners are."""
    return SoftPrompt(base, base.wte.weight.detach()[torch.tensor(prompt)])


def train(config, run, seed, device):
    """A base and all ways to tell it -> by task: what search has found, the largest learners."""
    base = imitate(config, run, seed, device).requires_grad_(False)
    learners = {}
    for task in TASKS:
        where = dict(phase="search", task=task, seed=seed)
        run.log_once(partial(try_words, config, base, task, seed), **where, step=0)
        found = next(row for row in run.rows if where.items() <= row.items())["prompt"]
        learners[task, "search"] = worded(base, orders.tokenizer.encode(found))
        told = partial(tune, config, run, base, task, seed=seed)
        for method, k in ARMS:
            learner = learner_of(base, method, k, seed)
            learners[task, method] = told(f"{method} {k}", learner, RATES[method])
        learner = learner_of(base, "soft", STARTS, seed, words=False)
        told("random start", learner, RATES["soft"])
    return learners


# --------------------------------------------------------------------------------------------------
# The figure and its claims


def reached(run, task, name):
    """The last accuracy of an arm (seeds,), and its size."""
    rows = [row for row in run.rows if row.get("task") == task and row.get("arm") == name]
    last = max(row["step"] for row in rows)
    return np.array([row["accuracy"] for row in rows if row["step"] == last]), rows[0]["size"]


def figure(config, run):
    fig, axes = plt.subplots(1, 4, figsize=(19, 4.8), layout="constrained", sharey=True)
    ends = {}
    for ax, task in zip(axes[:3], TASKS, strict=True):
        for method, marker in (("soft", "o"), ("prefix", "s"), ("full", "D")):
            names = [f"{m} {k}" for m, k in ARMS if m == method]
            ends |= {(task, name): reached(run, task, name) for name in names}
            y = np.array([ends[task, name][0] for name in names]).T  # (seeds, sizes)
            sizes = [ends[task, name][1] for name in names]
            band(ax, sizes, y, {"full": "all weights", "soft": "soft prompt"}.get(method, method))
            ax.lines[-1].set_marker(marker)
        found = [row["accuracy"] for row in run.rows if row.get("phase") == "search"]
        found = np.array(found).reshape(-1, len(TASKS))[:, TASKS.index(task)]  # (seeds,)
        ends[task, "search"] = found, 0
        ax.axhline(found.mean(), color="k", ls="--", lw=1, label="best one or two words")
        last = f"soft {ends[task, f'soft {SOFT[-1]}'][0].mean():.2f}"
        last += f", all weights {ends[task, 'full 0'][0].mean():.2f}"
        ax.set(xscale="log", xlabel="trained parameters", ylim=(-0.03, 1.03))
        ax.set_title(f"{task}: {last}")
        ax.legend(loc="center right")
    axes[0].set_ylabel("held-out texts done rightly (fraction)")
    for name, label in ((f"soft {STARTS}", "some words"), ("random start", "random numbers")):
        ends[label] = series(run, "accuracy", task="unseen", arm=name)
        band(axes[3], *ends[label], f"it begins as {label}")
    axes[3].set(title=f"unseen, soft prompt of {STARTS} tokens", xlabel="step")
    axes[3].legend(loc="center right")
    share = ends["known", f"soft {SOFT[-1]}"][1] / ends["known", "full 0"][1]
    soft = f"soft {SOFT[-1]}"
    behind = [(ends[task, soft][0] - ends[task, "full 0"][0]).mean() for task in TASKS]
    told = [f"{gap:+.2f} ({task})" for task, gap in zip(TASKS, behind, strict=True)]
    fig.suptitle(
        f"A soft prompt of {share:.1%} of the parameters, minus training them all: "
        f"{', '.join(told)} ({config.seeds} seed{'s' * (config.seeds > 1)})"
    )
    return fig, judge(ends, share, config.seeds)


def judge(ends, share, n):
    def minus(task, name, other):
        """Accuracy of one arm minus that of another, seed by seed."""
        return ends[task, name][0] - ends[task, other][0]

    soft, prefix = f"soft {SOFT[-1]}", f"prefix {PREFIX[-1]}"
    words, numbers = ends["some words"][1], ends["random numbers"][1]  # (seeds, steps) each
    start = (words - numbers).mean(1)
    rows = [
        (
            "share",
            "soft prompt: trained parameters over all",
            ".0001",
            share,
            "<=",
            0.01,
        ),
        (
            "known",
            "known: soft minus all weights",
            "0 (11B)",
            minus("known", soft, "full 0"),
            ">=",
            -0.05,
        ),
        (
            "unseen",
            "unseen: soft minus all weights",
            "0 (11B)",
            minus("unseen", soft, "full 0"),
            ">=",
            -0.05,
        ),
        (
            "new",
            "new: all weights minus soft",
            "-",
            minus("new", "full 0", soft),
            ">=",
            0.05,
        ),
        (
            "prefix",
            "new: prefix minus soft",
            "-",
            minus("new", prefix, soft),
            ">",
            0,
        ),
        (
            "words",
            "unseen: soft minus the best words",
            "-",
            minus("unseen", soft, "search"),
            ">",
            0,
        ),
        ("start", "words minus random as a start, mean of steps", "> 0", start, ">", 0),
    ]
    return [claim(id, text, SOURCE, *rest, n) for id, text, *rest in rows]


# --------------------------------------------------------------------------------------------------
# The run


@torch.no_grad()
def write(learner, text, device):
    """What a learner makes of a text, greedily."""
    ids = encode([(f"{text}=", "")], device)
    for _ in range(orders.SIZE):
        following = learner(ids)[:, -1:].argmax(2)  # (1, 1)
        ids = torch.cat((ids, following), dim=1)
    return orders.tokenizer.decode(ids[0, -orders.SIZE :].tolist())


def show(run, learners, seed, device):
    """A held-out text for each task, and what each way to tell the model makes of it."""
    rng = random.Random(7)
    texts = [orders.draw_text(rng, held_out=True) for _ in TASKS]
    written = {}
    for (task, method), learner in learners.items():
        text = texts[TASKS.index(task)]
        answer = write(learner, text, device)
        right = answer == function_of(task, seed)(text)
        written.setdefault(method, []).append((answer, float(right)))
    run.samples([f"{task}: {text}=" for task, text in zip(TASKS, texts, strict=True)], **written)


def main():
    config = parse_args(Config, __doc__)
    device = pick_device(config.device)
    with Run(config) as run:
        run.introduce(device, build(device).config.parameters)
        for seed in seeds_of(config):
            learners = train(config, run, seed, device)
        show(run, learners, seed, device)
        run.finish(*figure(config, run))


if __name__ == "__main__":
    command(main)
