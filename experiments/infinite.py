"""infinite.py: the text is fixed, compute is free: what lowers the loss on text not seen?

(Pre-training under infinite compute, Kim, Kotha, Liang and Hashimoto, arXiv 2509.14786.)

    python -m experiments.infinite --seeds 3        5 minutes of one core

The lesson (pretrain.py) has more text than it can read. Here a GPT has 128 passages of the standard
library, 4,224 characters, and reads them up to 32 times. Three answers to overfitting:

    weight decay    W <- W - lr decay W at each step, for the matrices of the blocks: up to 160
                    times the usual 0.1
    an ensemble     K models, each with a start and an order of the data of its own;
                    p(next) = mean of the p_i(next)
    a student       one model of a member's size learns the ensemble's p(next), along passages that
                    the members wrote

Each is judged by the asymptote E of a power law, loss = E + A (n_0 / n)^gamma, in parameters or in
members n. Four points and three numbers to fit: the figure shows the residuals.

Decay and epochs are chosen by one part of the held-out text, for each width and for the ensemble
apart, seed by seed; the losses that are told are of the other part.

What to see: at the usual decay the loss rises again with width; with decay and epochs of its own
each width is better than the one before; four models together are better than any single one.

How this differs from the paper: characters, models of 5 to 140 thousand parameters; the learning
rate goes as 1 / sqrt(width) and was found on another text; decay leaves embeddings and norms alone;
the student learns probabilities, and nothing of the true text.
"""

import random
from dataclasses import dataclass
from itertools import combinations, product

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F

from engine import generate
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
    seeds_of,
)
from model import GPT, GPTConfig
from pretrain import hold_out, load_documents
from tasks.text import stretches

SOURCE = "Kim et al., arXiv 2509.14786"
T = 32  # context in characters
V = 128  # ASCII's characters
BATCH = 16  # passages
RATE = 4.6e-3  # the peak at a member's width
WIDTHS = (16, 24, 48, 104)
MEMBER = 48  # the width of members and student; 104 has 4.2 times the parameters
MEMBERS = 4
USUAL = 0.1
DECAYS = (USUAL, 4.0, 16.0)
LAST = 32
EPOCHS = (8, 16, LAST)


@dataclass
class Config(Flags):
    passages: int = flag(128, "the text: so many passages of 33 characters", quick=4, low=2)

    def idle(self):
        return (
            {}
            if self.device in ("auto", "cpu")
            else {"device": "models this small are trained on the CPU"}
        )


# --------------------------------------------------------------------------------------------------
# Models


def shape(width):
    return GPTConfig(V, block_size=T, n_layer=1, n_head=4, n_embd=width, qk_norm=True)


def train(run, phase, seed, setting, x, y):
    """A GPT that has learnt what follows each character of x (n, T). setting: width, decay, epochs;
    y: the characters (n, T), or their probabilities (n, T, V).
    """
    width, decay, epochs = setting
    generator = torch.manual_seed(seed)
    model = GPT(shape(width))
    matrices = [p for p in model.blocks.parameters() if p.dim() == 2]
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.95), fused=True)
    steps = epochs * len(x) // BATCH
    for step in run.loop(phase, steps, model, optimizer, random.Random(0), generator):
        lr = lr_at(step, steps, RATE * (MEMBER / width) ** 0.5)
        rows = torch.randint(len(x), (BATCH,), generator=generator)
        logits = model(x[rows]).flatten(0, 1)  # (BATCH * T, V)
        loss = F.cross_entropy(logits, y[rows].flatten(0, 1))
        optimizer.zero_grad()
        loss.backward()
        # AdamW's decay, apart from the gradient: embeddings and norms have none
        for p in matrices:
            p.data.mul_(1 - lr * decay)
        optimizer.param_groups[0]["lr"] = lr
        descend(optimizer, loss)
    return model


@torch.no_grad()
def probabilities(models, x):
    """What each model expects after each character of x (n, T): (models, n, T, V)."""
    return torch.stack([model(x).softmax(-1) for model in models])


def ensemble_losses(models, ids):
    """Nats per character of ids (n, T + 1) for ensembles of 1, 2, ... of the models: a mean over
    all choices of so many.
    """
    after = ids[:, 1:, None].expand(len(models), -1, -1, -1)
    p = probabilities(models, ids[:, :-1]).gather(-1, after)  # (models, n, T, 1)
    losses = []
    for k in range(1, len(p) + 1):
        choices = [torch.stack(some).mean(0) for some in combinations(p, k)]
        losses.append(-torch.stack(choices).log().mean().item())
    return losses


def asymptote(n, loss):
    """The least squares fit of loss (points,) = E + A (n_0 / n)^gamma -> E, A, gamma. For each of
    400 gammas the best E and A are known.
    """
    fits = []
    for gamma in np.geomspace(0.1, 5, 400):
        (A, E), error, *_ = np.polyfit((n[0] / n) ** gamma, loss, 1, full=True)
        fits.append((error.sum(), E, A, gamma))
    return min(fits)[1:]


# --------------------------------------------------------------------------------------------------
# The grid, the student


def measure(config, run, seed):
    """A row for each width, decay and number of epochs, and one for the student."""
    texts = [list(text.encode("ascii", "replace")) for text in load_documents("")]
    documents, held_out = hold_out(list(map(torch.tensor, texts)))
    rng = np.random.default_rng(seed)
    text = stretches(rng, documents, config.passages, T + 1)
    x, y = text[:, :-1], text[:, 1:]
    # one part to choose by, one to judge by
    tune, test = (
        stretches(rng, docs, 4 * config.passages, T + 1) for docs in (held_out[::2], held_out[1::2])
    )

    def losses(models):
        return dict(tune=ensemble_losses(models, tune), test=ensemble_losses(models, test))

    def models_of(*setting):
        """One model; of a member's width MEMBERS, each with a start and an order of its own."""
        models = []
        for i in range(MEMBERS if setting[0] == MEMBER else 1):
            own = MEMBERS * seed + i
            models.append(train(run, f"{setting} {own}", own, setting, x, y))
        return models

    def student():
        # the best ensemble again, to the bit
        best = chosen(run, seed, MEMBERS, width=MEMBER)
        members = models_of(MEMBER, best["decay"], best["step"])
        # each member writes on, twice, from the first character of each passage
        generator = torch.Generator().manual_seed(seed)
        firsts = x[:, :1].tolist()
        written = torch.cat(
            [
                generate(m, firsts, n=2, max_new_tokens=T - 1, generator=generator).ids
                for m in members
            ]
        )
        p = probabilities(members, written).mean(0)  # (passages * 2 * MEMBERS, T, V)
        setting = MEMBER, USUAL, EPOCHS[0]
        return losses([train(run, f"student {seed}", seed, setting, written, p)])

    for setting in product(WIDTHS, DECAYS, EPOCHS):
        where = dict(zip(("width", "decay", "step"), setting, strict=True))
        run.log_once(
            lambda s=setting: losses(models_of(*s)),
            arm="text",
            seed=seed,
            **where,
        )
        run.state.clear()  # weights that nobody needs again
    run.log_once(student, arm="student", seed=seed, step=EPOCHS[0])
    run.state.clear()


def chosen(run, seed, k=1, **where):
    """The row whose ensembles of k models have the least loss on the part to choose by."""
    where = dict(arm="text", seed=seed) | where
    rows = (row for row in run.rows if where.items() <= row.items())
    return min(rows, key=lambda row: row["tune"][k - 1])


# --------------------------------------------------------------------------------------------------
# The figure


def draw_law(ax, name, n, loss):
    """The power law through the mean of loss (seeds, points), and what it leaves -> E."""
    E, A, gamma = asymptote(n, loss.mean(0))
    law = E + A * (n[0] / n) ** gamma
    left = np.round(1000 * (loss.mean(0) - law), 1)
    ax.plot(n, law, "k:", label=f"power law to {E:.3f}, leaves {left} / 1000")
    ax.set(xlabel=name, xscale="log", ylabel="held-out loss (nats per character)")
    ax.set_xticks(n, n)
    ax.minorticks_off()
    ax.legend()
    return E


def rise(loss):
    """The largest step up of loss (seeds, widths) from one width to the next: < 0 if all fall."""
    return np.diff(loss).max(1)


def bend(loss):
    """How far the better end of the widths lies above the best width (seeds,)."""
    return loss[:, [0, -1]].min(1) - loss.min(1)


def figure(config, run):
    def judged(k=1, **where):
        """The loss on the other part (seeds, members)."""
        return np.array([chosen(run, s, k, **where)["test"] for s in seeds_of(config)])

    def by_width(label, **where):
        loss = np.stack([judged(width=w, **where)[:, 0] for w in WIDTHS], 1)  # (seeds, widths)
        band(left, size, loss, label, marker="o")
        return loss

    fig, (left, right) = plt.subplots(1, 2, figsize=(14, 6), layout="constrained")
    size = np.array([shape(width).parameters for width in WIDTHS])
    usual = by_width("decay 0.1, 32 epochs", decay=USUAL, step=LAST)
    stopped = by_width("decay 0.1, best epochs", decay=USUAL)
    longest = by_width("best decay, 32 epochs", step=LAST)
    tuned = by_width("best decay, best epochs")
    # the setting is the best for all members
    together = judged(MEMBERS, width=MEMBER)  # (seeds, members)
    members = np.arange(1, MEMBERS + 1)
    band(right, members, together, f"models of width {MEMBER}, together", marker="o")
    best, student = judged()[:, 0], judged(arm="student")[:, 0]
    right.axhline(best.mean(), color="C3", label="best single model")
    right.axhline(student.mean(), color="C2", label="student")
    lower = draw_law(left, "parameters", size, tuned)
    lower -= draw_law(right, "models in the ensemble", members, together)
    ensemble, alone = together[:, -1], judged(width=MEMBER)[:, 0]
    gain = best - ensemble
    kept = (alone - student) / (alone - ensemble)
    fig.suptitle(
        f"{MEMBERS} models together lose {gain.mean():.3f} nats less than the best one, "
        f"one student keeps {kept.mean():.0%} of their gain over one of them"
    )
    rows = [
        ("usual", "decay 0.1, 32 epochs: better end minus bottom", "U", bend(usual), ">", 0),
        ("stopped", "decay 0.1, best epochs: better end minus bottom", "U", bend(stopped), ">", 0),
        ("longest", "best decay, 32 epochs: largest rise by width", "-", rise(longest), "<", 0),
        ("tuned", "best decay, best epochs: largest rise by width", "falls", rise(tuned), "<", 0),
        ("ensemble", "best single model minus ensemble", "-", gain, ">=", 0.05),
        (
            "larger",
            "4.2 times a member's size, minus ensemble",
            "-",
            tuned[:, -1] - ensemble,
            ">=",
            0.05,
        ),
        ("student", "share of the ensemble's gain in a student", "0.83", kept, ">=", 0.6),
        ("asymptote", "asymptote in size minus that in members", "0.09", lower, ">", 0),
    ]
    return fig, [claim(id, text, SOURCE, *row, config.seeds) for id, text, *row in rows]


def main():
    config = parse_args(Config, __doc__)
    with Run(config) as run:
        run.introduce("cpu", shape(MEMBER).parameters)
        for seed in seeds_of(config):
            measure(config, run, seed)
        run.finish(*figure(config, run))


if __name__ == "__main__":
    command(main)
