"""context.py: does test-time training help on real text, and does it go on helping as the context
gets longer than any in training?

    python -m experiments.context                 the standard library's sources; 25 minutes
    python -m experiments.context --data PATH     the same on your text

The lesson (ttt.py) draws documents from random maps. Here the same model, larger, reads documents
in tokens of a BPE, sees 32 of them at once, trains at a length of 1,024, and is tested on the same
tokens after 64 to 16,384 others. Beside it the same model without steps, and dynamic evaluation of
that: plain SGD at test time, on the fast MLP or on all weights, with the best of several step
sizes.

What to see: test-time training goes on gaining out to 16 times the trained length. On text dynamic
evaluation gains much, too: by steps on all weights, at five times the cost, it is far behind
test-time training after 1,024 tokens and level with it after 16,384.

How this differs from the paper, beside what the lesson says:
1. 0.6 million parameters, trained for minutes; windows of 32 tokens, chunks of 64.
2. There is no full attention here: 200 steps are too few for it to learn to look back. Larger
   models, trained for longer, do.
"""

import hashlib
from dataclasses import dataclass
from functools import partial

import matplotlib.pyplot as plt
import torch

import ttt as lesson
from experiment import (
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
from experiments.cost import clock
from pretrain import load_documents
from tasks.text import passages, split, stretches
from ttt import ALL, FAST, OFF, SOURCE

# the step sizes of dynamic evaluation that are tried
ETAS = {FAST: (3.0, 10.0, 30.0), ALL: (0.1, 0.3, 1.0, 3.0)}
SWEEP = {f"{arm}, eta = {eta:g}": (arm, eta) for arm, etas in ETAS.items() for eta in etas}
WINDOW = "sliding window"


@dataclass
class Config(lesson.Config):
    seeds: int = flag(3, "repeat over this many seeds", quick=1, low=1)
    steps: int = flag(200, "training steps of an arm", quick=4, low=1)
    batch: int = flag(4, "stretches of text per step", quick=2, low=1, high=1024)
    length: int = flag(
        1024,
        "tokens of a stretch in training, a multiple of 16 and of --chunk",
        quick=64,
        low=16,
        high=2**16,
    )
    chunk: int = flag(64, "tokens between two inner steps", quick=16, low=1)
    window: int = flag(32, "tokens that attention sees", quick=8, low=1)
    lr: float = flag(4e-3, "peak learning rate (AdamW, warm-up then cosine to a tenth)", low=0)
    n_embd: int = flag(128, "channels", quick=32, low=8, high=4096)
    n_fast: int = flag(256, "width of the fast MLP", quick=32, low=1, high=4096)
    eval_docs: int = flag(8, "passages to test on", quick=2, low=1, high=1024)
    data: str = flag(
        "",
        "a folder, a text file or a Hugging Face dataset with a text column "
        "(default: the standard library's sources)",
    )
    vocab_size: int = flag(512, "size of the BPE vocabulary", quick=257, low=257, high=2**17)
    context: int = flag(16384, "the longest context in tokens", quick=256, low=128, high=2**20)


# --------------------------------------------------------------------------------------------------
# Training and measuring


def targets(config):
    """How many tokens at the end of each passage are tested on."""
    return config.length // 2


def contexts(config):
    """The lengths of what stands before the first target."""
    return [c for c in (64, 256, 1024, 4096) if c < config.context] + [config.context]


def tests(arm, config):
    """What is measured on the model of an arm: name -> (the kind of reading, eta)."""
    if arm == "TTT":
        return {"TTT": ("TTT", config.eta), OFF: (OFF, 0)}
    return {WINDOW: (WINDOW, 0)} | SWEEP


def target_loss(config, kind, model, ids, eta):
    loss = lesson.score(kind, model, ids, eta, config.chunk, rows=4)  # (B, T)
    return {"loss": loss[:, -targets(config) :].mean().item()}


def speed(config, kind, model, ids, eta, device):
    """How fast ids (1, length + 1) are read: the fastest of three times."""
    seconds = []
    for _ in range(3):
        started = clock(device)
        loss = lesson.score(kind, model, ids, eta, config.chunk)
        loss.sum().item()  # waits for a GPU
        seconds.append(clock(device) - started)
    return {"tokens_per_s": config.length / min(seconds)}


def measure_arm(config, run, arm, seed, model, test, device):
    """Log the loss of the same targets after contexts of several lengths, and the speed."""
    for name, (kind, eta) in tests(arm, config).items():
        for context in contexts(config):
            # only what comes before the targets is cut
            ids = test[:, -context - targets(config) - 1 :]
            measure = partial(target_loss, config, kind, model, ids, eta)
            run.log_once(
                measure, phase="test", arm=name, seed=seed, steps=config.steps, step=context
            )
        # once for each kind: the step size changes nothing
        if kind != OFF and eta not in ETAS.get(kind, ())[1:]:
            ids = test[:1, : config.length + 1]
            measure = partial(speed, config, kind, model, ids, eta, device)
            run.log_once(measure, phase="speed", arm=kind, seed=seed, step=config.length)


# --------------------------------------------------------------------------------------------------
# The figure


def curves(config, run):
    """Name -> loss (seeds, contexts) of all that was measured."""
    names = ("TTT", OFF, WINDOW, *SWEEP)
    return {
        name: series(run, "loss", phase="test", arm=name, steps=config.steps)[1] for name in names
    }


def cost(run, kind):
    """Microseconds that a token takes, in the fastest seed."""
    return 1e6 / series(run, "tokens_per_s", phase="speed", arm=kind)[1][:, -1].max()


def strongest(loss, merit, kinds=ETAS):
    """The name of the dynamic evaluation with the largest mean merit.

    It is chosen on the test passages themselves, in its favour. merit: loss (seeds, contexts) ->
    (seeds,).
    """
    names = [name for name, (kind, _) in SWEEP.items() if kind in kinds]
    return max(names, key=lambda name: merit(loss[name]).mean())


def at_the_longest(y):
    return -y[:, -1]


def fall(y):
    return y[:, 0] - y[:, -1]


def figure(config, run):
    loss = curves(config, run)
    best = {kind: strongest(loss, at_the_longest, (kind,)) for kind in ETAS}
    fig, (left, right) = plt.subplots(1, 2, figsize=(14, 5), layout="constrained")
    shown = {"TTT": "TTT", WINDOW: WINDOW, OFF: OFF} | best
    draw_losses(left, config, {name: loss[name] for name in shown.values()})
    draw_costs(right, config, run, {k: loss[name] for k, name in shown.items() if k != OFF})
    for ax in (left, right):
        ax.legend()
    rival = strongest(loss, at_the_longest)
    kind, _ = SWEEP[rival]
    ahead = loss[rival][:, -1] - loss["TTT"][:, -1]  # (seeds,): of TTT
    verdict = "ahead of" if ahead.mean() > 0 else "behind"
    if ahead.min() < 0 < ahead.max():
        verdict = "level with"
    fig.suptitle(
        f"After {config.context:,} tokens of {config.data or 'source code'}, "
        f"seen through {config.window}, test-time training "
        f"({loss['TTT'][:, -1].mean():.3f} nats) is {verdict} "
        f"{kind} ({loss[rival][:, -1].mean():.3f}), at "
        f"{cost(run, 'TTT') / cost(run, kind):.1g} of its time (seeds: {config.seeds})"
    )
    return fig, judge(config, loss)


def draw_losses(ax, config, loss):
    """Loss against the length of the context."""
    lengths = contexts(config)
    for (name, y), style in zip(loss.items(), ("-", "-", ":", "--", "--"), strict=True):
        band(ax, lengths, y, name, marker="o", ls=style)
    n = targets(config)
    ax.set(title=f"Loss on the same {n} tokens", ylabel="loss (nats per token)", xscale="log")
    ax.set_xlabel(f"tokens before the first of them (before the last: {n - 1} more)")
    ax.set_xticks(lengths, lengths)
    ax.set_ylim(0, None)  # room for the legend
    ax.axvline(config.length, color="k", label="length in training")


def draw_costs(ax, config, run, loss):
    """Loss after the longest context against the time that a token takes."""
    for (kind, y), color in zip(loss.items(), ("C0", "C1", "C3", "C4"), strict=True):
        last = y[:, -1]  # (seeds,)
        spread = last.std(ddof=min(1, len(last) - 1))  # 0 for one seed
        ax.errorbar(cost(run, kind), last.mean(), spread, fmt="o", color=color, label=kind)
    ax.set(title=f"After {config.context:,} tokens", ylabel="loss (nats per token)", xscale="log")
    ax.set_xlabel("time to read a token of one text (µs, on a CPU its time; fastest seed)")


def over_dynamic(id, what, merit, loss, name):
    """The claim that TTT has more merit than a dynamic evaluation, the strongest, has."""
    gap = merit(loss["TTT"]) - merit(loss[name])  # (seeds,)
    spread = f" ± {gap.std(ddof=1):.2g}" if len(gap) > 1 else ""
    return claim(
        id,
        f"dynamic evaluation minus TTT: {what}, worst seed",
        SOURCE,
        "-",
        gap.min(),
        ">",
        0,
        len(gap),
        f" ({gap.mean():.3g}{spread}; {name.removeprefix('dynamic evaluation, ')})",
    )


def judge(config, loss):
    lengths = contexts(config)
    trained = max(c for c in lengths if c <= max(config.length, lengths[0]))

    def deep(context):
        return f"{context:,} to {context + targets(config) - 1:,} tokens deep"

    def at_the_trained(y):
        return -y[:, lengths.index(trained)]

    at_longest = strongest(loss, at_the_longest)
    # the fall alone would choose the step size that ruins the start
    return [
        claim(
            "ttt",
            f"TTT: loss {deep(lengths[0])} minus {deep(lengths[-1])}, worst seed",
            SOURCE,
            "falls",
            fall(loss["TTT"]).min(),
            ">",
            0,
            len(loss["TTT"]),
        ),
        over_dynamic(
            "over dynamic, trained length",
            f"loss {deep(trained)}",
            at_the_trained,
            loss,
            strongest(loss, at_the_trained),
        ),
        over_dynamic(
            "over dynamic, longest",
            f"loss {deep(lengths[-1])}",
            at_the_longest,
            loss,
            at_longest,
        ),
        over_dynamic(
            "over dynamic, fall",
            "how much less its loss falls from the least context to the most",
            fall,
            loss,
            at_longest,
        ),
    ]


def main():
    config = parse_args(Config, __doc__)
    lesson.check_length(config)
    device = pick_device(config.device)
    parameters = lesson.build(config, config.vocab_size).parameters()
    texts = load_documents(config.data)
    train_docs, test_docs = split(
        texts, config.vocab_size, config.length, config.context + targets(config)
    )
    digest = hashlib.sha256("".join(texts).encode())
    test = passages(test_docs, config.context + targets(config) + 1, config.eval_docs)

    def draw(rng):
        return stretches(rng, train_docs, config.batch, config.length + 1)

    with Run(config, inputs={"the text that --data names": digest.hexdigest()}) as run:
        run.introduce(device, sum(p.numel() for p in parameters))
        for seed in seeds_of(config):
            for arm in ("TTT", WINDOW):
                torch.manual_seed(seed)
                model = lesson.build(config, config.vocab_size).to(device)
                model = lesson.train(config, run, arm, seed, model, draw, config.steps)
                measure_arm(config, run, arm, seed, model, test, device)
        run.finish(*figure(config, run))


if __name__ == "__main__":
    command(main)
