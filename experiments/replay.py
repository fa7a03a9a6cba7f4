"""replay.py: what training without replay masks does to scores and gradients, by length of answer.

(After Neural Garbage Collection, Li et al., arXiv 2604.18002.)

    python -m experiments.replay                1 minute on two cores
    python -m experiments.replay --seeds 3      what results/ holds

The lesson (electives/forget.py) trains with and without replay masks, which hide from a token what
had been forgotten when it was written. It finds no difference, where the paper's model collapses
(49.6% with masks, 2.5% without). There a thousand tokens are written, in the lesson one. Here L
questions follow the stream, one after the other, each with the answer that the model gives:

    key value filler filler ... (12 times)   question answer question answer ...

After every two answers each layer gives up one block of four tokens: a fact, or earlier questions
and answers. So what is written comes from caches that a pass without masks never sees, and is read
again. Reward: the share of right answers. Loss: as in the lesson, summed over the L answers.

Nothing is trained but the base, once. Both passes score the same texts, by L:

    mismatch    |log p trained - log p sampled| of an answer: 0 if training knows what was seen
    cosine      of the policy gradient without masks with the true one; of its two terms alone, too
                (answers: what was said; memory: what was kept)

What to see: without masks an answer is scored several nats off, and the gradient of what was said
has next to nothing to do with the true one. What is left of the direction is the memory's.

Nothing here is trained by RL, so this does not say whether training collapses: a pass that sees
everything knows the answer, and a wrong direction may still lead there.
"""

import random
from dataclasses import dataclass
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F

from electives import forget
from electives.forget import BLOCK, BLOCKS, ENDS, GROUP, SOURCE, STREAM
from engine import KVCache
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
from model import rotations

LENGTHS = (1, 2, 4, 8, 16)  # answers to a stream, L
ARMS = {"replay masks": True, "no replay masks": False}
PARTS = ("answers", "memory", "both")  # of the loss


@dataclass
class Config(Flags):
    streams: int = flag(64, "streams of a batch", quick=2, low=1)
    keep: float = flag(0.5, "share of the blocks read that a round keeps", low=0.25, high=1)
    recall: int = flag(3000, "steps of pre-training at most", quick=4, low=1)
    turns: int = flag(100, "steps that teach to read answers between questions", quick=2, low=1)


def ask(n, L, among, generator, device):
    """n streams (n, 48), L questions to each and the right answers (n, L).

    among: 6, questions are about even keys; 12, about any.
    """
    ids = forget.draw(n, generator, device)[0][:, :STREAM]
    odd = ids[:, ::BLOCK] % 2  # (n, 12)
    blocks = odd.argsort(dim=1, stable=True)  # those with an even key first
    which = torch.randint(among, (n, L), generator=generator).to(device)
    start = BLOCK * blocks.gather(1, which)  # (n, L): where their facts stand
    return ids, ids.gather(1, start), ids.gather(1, start + 1)


def text(ids, questions, answers):
    """Streams (R, 48), then question, answer, question, ... -> (R, 48 + 2L)."""
    return torch.cat((ids, torch.stack((questions, answers), dim=2).flatten(1)), dim=1)


def said(ids):
    """The answers in such a text (R, L)."""
    return ids[:, STREAM + 1 :: 2]


def ends_of(L):
    """Tokens read before each round of forgetting: the lesson's, then one for every two answers.

    Nobody needs a round after the last answer.
    """
    return [*ENDS, *range(STREAM + BLOCK, STREAM + 2 * L, BLOCK)]


def latest(reads):
    """Attention in reads since a round, a token each but in the stream: as of one read."""
    S = reads[-1][0].shape[3]
    return [
        torch.cat([F.pad(w, (0, S - w.shape[3])) for w in layer], dim=2)  # (R, H, queries, S)
        for layer in zip(*reads, strict=True)
    ]


@torch.no_grad()
def write(model, ids, questions, share, generator=None):
    """Read streams (R, 48), answer questions (R, L) one by one, with a cache that forgets.

    With a generator answers, and what is kept, are drawn; else the best is taken -> the text
    (R, 48 + 2L), log-probabilities of its answers (R, L), the blocks kept in each round.
    """
    R, L = questions.shape
    cache = KVCache(model.config, R, STREAM + 2 * L, device=ids.device)
    ids = text(ids, questions, questions)  # the answers take their places below
    held = ids.new_zeros(len(model.blocks), R, 0)
    kept = forget.kept_after(share)
    kept += kept[-1:] * L  # from then on a block goes for each that comes
    start = before = 0
    logps, rounds, reads = [], [], []
    # the stream in the lesson's chunks, then token by token
    for end in [*ENDS, *range(STREAM + 1, STREAM + 2 * L)]:
        logits, weights = forget.read(model, ids[:, start:end], cache=cache)
        reads.append(weights)
        start = end
        if end in ends_of(L):
            # 1. A round: what was read since the last one comes to what is held
            n = end // BLOCK  # blocks read so far
            new = ids.new_tensor(range(before, n)).expand(*held.shape[:2], -1)
            held = torch.cat((held, new), dim=2)  # (layers, R, n)
            scores = forget.policy(latest(reads), cache, held, generator)
            order = scores.topk(kept[len(rounds)], dim=2).indices  # (layers, R, K)
            held = held.gather(2, order)
            slots = BLOCK * order[..., None] + ids.new_tensor(range(BLOCK))
            for layer in range(len(held)):
                forget.select(cache, layer, slots[layer].flatten(1))
            rounds.append(held)
            reads = []
            before = n
        elif end % 2:
            # 2. A question was read: an answer to it
            logp = logits[:, -1].log_softmax(-1)  # (R, V)
            ids[:, end] = logp.argmax(1)
            if generator is not None:
                ids[:, end, None] = logp.exp().cpu().multinomial(1, generator=generator)
            logps.append(logp.gather(1, ids[:, end, None]))
    return ids, torch.cat(logps, dim=1), rounds


def scored(model, ids, rounds, replay):
    """One pass over texts -> log-probabilities of answers (R, L), of all that was kept (R,)."""
    T = ids.shape[1] - 1  # nothing follows the last answer
    ends = ends_of(said(ids).shape[1])
    masks = forget.replay_masks(rounds, ends, T)
    if not replay:  # the cache is taken to be whole
        masks = torch.ones_like(masks).tril()
    logits, weights = forget.read(model, ids[:, :T], masks)
    logp = logits[:, STREAM::2].log_softmax(-1)  # (R, L, V)
    logp = logp.gather(2, said(ids)[..., None]).squeeze(2)  # (R, L)
    return logp, forget.memory_logp(weights, rounds, ends)


def practise(model, config, L, generator, device):
    """Answers to streams, each read GROUP times -> text, log-probabilities, rounds, reward (R,),
    advantage (R,).
    """
    drawn = ask(config.streams, L, BLOCKS // 2, generator, device)
    ids, questions, right = (t.repeat_interleave(GROUP, dim=0) for t in drawn)
    ids, logp, rounds = write(model, ids, questions, config.keep, generator)
    reward = (said(ids) == right).float().mean(1)  # (R,)
    groups = reward.view(-1, GROUP)
    return ids, logp, rounds, reward, (groups - groups.mean(1, keepdim=True)).flatten()


def compare(model, config, L, seed, device):
    """A row: how far scores are off, and the cosine of the gradients with and without masks."""
    ids, sampled, rounds, _, advantage = practise(
        model,
        config,
        L,
        torch.Generator().manual_seed(seed),
        device,
    )
    row = {}
    grads = []  # of each arm: answers, memory, both
    for arm, replay in ARMS.items():
        logp, memory = scored(model, ids, rounds, replay)
        row[arm] = (logp - sampled).abs().mean().item()
        parts = []
        for part in (logp.sum(1), memory):
            grad = torch.autograd.grad(
                -(advantage * part).mean(),
                list(model.parameters()),
                retain_graph=True,
                materialize_grads=True,  # the head has no part in what is kept
            )
            parts.append(torch.cat([g.flatten() for g in grad]))
        grads.append([*parts, sum(parts)])
    # the same samples, so that a difference is one of scoring
    for part, true, other in zip(PARTS, *grads, strict=True):
        row[part] = F.cosine_similarity(true, other, dim=0).item()
    return row


def teach(config, run, seed, device):
    """The lesson's base, used to reading an answer after each question, with a whole cache."""
    model = forget.pretrain(config, run, seed, device)
    # rotations have no parameters: more positions cost nothing
    model.config.block_size = STREAM + 2 * max(LENGTHS)
    model.rope = rotations(model.config)
    optimizer = forget.optimizer_of(model, 1e-3)
    generator = torch.Generator().manual_seed(seed + 1)
    for _ in run.loop(
        f"turns {seed}", config.turns, model, optimizer, random.Random(seed), generator
    ):
        ids, questions, answers = ask(64, max(LENGTHS), BLOCKS, generator, device)
        logits = model(text(ids, questions, answers))
        logp = logits[:, STREAM::2].log_softmax(-1)  # (64, L, V)
        forget.step_on(optimizer, -logp.gather(2, answers[..., None]).mean())
    return model


def figure(config, run):
    """The figure and its claims, from the rows of the run."""
    fig, (mismatch, cosine) = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")

    def by_length(key):
        """A number at each length (seeds, lengths)."""
        return np.concatenate([series(run, key, L=L)[1] for L in LENGTHS], axis=1)

    for ax, keys in ((mismatch, ARMS), (cosine, PARTS)):
        for key in keys:
            band(ax, LENGTHS, by_length(key), key, marker="o")
        ax.set_xscale("log", base=2)
        ax.set_xlabel("answers to a stream")
        ax.legend()
    exact, off = map(by_length, ARMS)
    first, *_, last = by_length("both").T  # (seeds,) each
    answers = by_length("answers")
    title = f"Without masks an answer is off by {off.mean():.1f} nats"
    mismatch.set(title=title, ylabel="|log p trained - log p sampled| (nats)")
    title = f"Cosine of both: {first.mean():.2f} at 1 answer, {last.mean():.2f} at 16"
    cosine.set(title=title, ylabel="cosine, with and without masks")
    n = config.seeds
    return fig, [
        claim(
            "exact",
            "mismatch in nats, replay masks",
            SOURCE,
            "-",
            exact.max(1),
            "<=",
            1e-3,
            n,
        ),
        claim("off", "mismatch in nats, without", SOURCE, "-", off.min(1), ">=", 1, n),
        claim(
            "answers",
            "answers' gradient: cosine",
            SOURCE,
            "-",
            answers.mean(1),
            "<=",
            0.1,
            n,
        ),
        claim("length", "cosine at 1 answer minus at 16", SOURCE, "-", first - last, ">", 0, n),
    ]


def main():
    config = parse_args(Config, __doc__)
    device = pick_device(config.device)
    with Run(config) as run:
        for seed in seeds_of(config):
            base = teach(config, run, seed, device)
            for L in LENGTHS:
                row = partial(compare, base, config, L, seed, device)
                run.log_once(row, L=L, seed=seed, step=0)
        run.finish(*figure(config, run))


if __name__ == "__main__":
    command(main)
