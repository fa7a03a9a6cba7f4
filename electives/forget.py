"""forget.py: a model that learns which parts of its own KV cache to keep.

(Neural Garbage Collection, Li et al., arXiv 2604.18002.) What a model has read stays in its cache
as keys and values, and the cache grows. After every 16 tokens each layer keeps a few blocks of 4
and forgets the rest for good. Which ones is an action of the policy, like a token. Its logits need
no new parameter: s_j = log of the attention that block j gets from the last 4 queries, mean over
heads, queries and the block's keys. Blocks are drawn without replacement (Plackett-Luce), which is
the top K of the scores with Gumbel noise:

    log p(a_1 ... a_K) = sum_j  s_(a_j) - log sum of exp(s_b) over the blocks b not drawn before
    loss = - advantage * [ log p(answer | what was kept) + sum over rounds, layers log p(a) ]

The first term teaches to answer from what is left, the second (the memory loss) what to leave.
Both are computed in one pass over the whole stream. There a mask must hide from each query what had
been forgotten when it was read (the replay mask): else the log-probabilities are another policy's.

The task, flagged recall: twelve facts go by, each a key, its value and two fillers. Only then comes
the question, a key; and it is always an even one. Nothing says so but the reward.

    python -m electives.forget                  3 minutes on two cores
    python -m electives.forget --seeds 3        what results/ holds

What to see: with half of the cache any rule of thumb answers about half of the questions: it keeps
facts that nobody will ask for. RL finds out which ones matter, and answers nearly all.

How this differs from the paper:
1. A GPT of 0.1 million parameters that recalls facts; there 1.5 billion that reason for 1,000s of
   tokens. The cache is forgotten while it is filled; the model writes one token, the answer.
2. A round keeps a share of all blocks READ so far (2, 4, 6 of 4, 8, 12). To keep half of what is
   left, round by round, would leave 3 or 4.
3. The rate is constant (there a staircase up to it), no token is protected.
"""

import copy
import random
from dataclasses import dataclass
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F

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
from kernels import visible
from meter import Meter, spend
from model import GPT, GPTConfig, rotate

SOURCE = "Li et al., arXiv 2604.18002"
N_KEYS = 32  # ids 0 to 31: the even ones are asked for
N_VALUES = 16
N_FILLERS = 4
BLOCK = 4  # tokens: key, value, two fillers
BLOCKS = 12
NEW = 4  # blocks that are read between two rounds of forgetting
ROUND = NEW * BLOCK  # the same in tokens
STREAM = BLOCK * BLOCKS
ENDS = range(ROUND, STREAM + 1, ROUND)  # tokens read before each round of forgetting
QUERIES = 4  # the last ones of a round, whose attention says what to keep
GROUP = 8  # answers to each stream
ARMS = {  # name: memory loss, replay masks
    "learned": (True, True),
    "no memory loss": (False, True),
    "no replay masks": (True, False),
}
SHARES = (1.0, 0.75, 0.5, 0.375, 0.25)  # of the cache that is kept, at the end


@dataclass
class Config(Flags):
    steps: int = flag(120, "steps of reinforcement learning", quick=2, low=1)
    streams: int = flag(32, "streams a step", quick=2, low=1)
    lr: float = flag(1e-3, "learning rate of RL", low=0)
    keep: float = flag(0.5, "share of the blocks read that a round keeps", low=0.25, high=1)
    recall: int = flag(3000, "steps of pre-training at most", quick=4, low=1)
    test: int = flag(1024, "streams to measure on", quick=8, low=1)
    eval_every: int = flag(10, "steps between two measurements", quick=1, low=1)


# --------------------------------------------------------------------------------------------------
# The task


def draw(n, generator, device="cpu"):
    """n streams with their question (n, 49), and which block answers it (n,).

    Of each four facts two have an even key, at random places; no key comes twice.
    """

    def shuffled(*shape):
        return torch.rand(shape, generator=generator).argsort(-1)

    pairs = BLOCKS // 2
    even = 2 * shuffled(n, N_KEYS // 2)[:, :pairs]  # (n, 6)
    odd = 2 * shuffled(n, N_KEYS // 2)[:, :pairs] + 1
    # rounds of four facts, two of a kind
    fours = torch.cat((even.view(n, -1, 2), odd.view(n, -1, 2)), dim=2)  # (n, 3, 4)
    keys = fours.gather(2, shuffled(*fours.shape)).view(n, BLOCKS)
    fillers = torch.randint(N_FILLERS, (n, BLOCKS, BLOCK), generator=generator)
    ids = N_KEYS + N_VALUES + fillers
    ids[..., 0] = keys
    ids[..., 1] = N_KEYS + torch.randint(N_VALUES, (n, BLOCKS), generator=generator)
    which = torch.randint(pairs, (n, 1), generator=generator)
    asked = even.gather(1, which)  # (n, 1)
    block = (keys == asked).int().argmax(1)
    ids = torch.cat((ids.flatten(1), asked), dim=1)
    return ids.to(device), block.to(device)


def answer_of(ids, block):
    """The value in a block of each stream (n,) -> (n,)."""
    return ids.gather(1, BLOCK * block[:, None] + 1).squeeze(1)


# --------------------------------------------------------------------------------------------------
# Forgetting


def read(model, ids, masks=None, cache=None):
    """GPT.hidden, opened up: it returns the attention, and each layer may see something else.

    ids (R, T). masks (layers, R, T, T) bool: what each layer sees; or a cache, which the ids
    continue -> logits (R, T, V), weights of each layer (R, H, T, S).
    """
    R, T = ids.shape
    spend(model.config.flops(R, T, T))
    positions = slice(T) if cache is None else cache.extend(T)[0]
    x = model.wte(ids)  # (R, T, C)
    weights = []
    for layer, block in enumerate(model.blocks):
        attn = block.attn
        # (R, T, H, D) each
        q, k, v = attn.qkv(block.norm1(x)).unflatten(2, (3, attn.n_head, -1)).unbind(2)
        q, k = (rotate(t, model.rope[positions]) for t in (q, k))
        if cache is not None:
            k, v = cache.append(layer, k, v)  # (R, S, H, D)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (R, H, T or S, D)
        if cache is None:
            mask = masks[layer][:, None]  # (R, 1, T, T)
        else:
            mask = visible(T, k.shape[2], causal=True, window=None, device=ids.device)
        scores = q @ k.transpose(2, 3) * attn.head_dim**-0.5
        weights.append(scores.masked_fill(~mask, -torch.inf).softmax(-1))  # (R, H, T, S)
        x = x + attn.proj((weights[-1] @ v).transpose(1, 2).flatten(2))
        x = x + block.mlp(block.norm2(x))
    return model.lm_head(model.norm(x)), weights


def select(cache, layer, slots):
    """Keep these slots (R, n) of a layer's cache alone, of every layer as many. Positions go on."""
    n = slots.shape[1]
    for t in (cache.k[layer], cache.v[layer]):  # (R, capacity, H, D)
        t[:, :n] = t.take_along_dim(slots[..., None, None], dim=1)
    cache.base = cache.length - n  # the next token, at position `length`, goes to slot n


def attention_scores(weights):
    """Attention of the last queries, weights (R, H, T, S) -> scores of the blocks (R, S / 4)."""
    mass = weights[:, :, -QUERIES:].mean((1, 2))  # (R, S)
    mass = mass.unflatten(1, (-1, BLOCK)).mean(2)  # (R, S / 4)
    return (mass + 1e-9).log()


def plackett_luce(scores, order):
    """The log-probability of drawing `order` (..., K) without replacement, by scores (..., n)."""
    logp = 0
    for a in order.split(1, dim=-1):
        logp = logp + scores.gather(-1, a) - scores.logsumexp(-1, keepdim=True)
        scores = scores.scatter(-1, a, -torch.inf)  # what is drawn is gone
    return logp.squeeze(-1)


def gumbel(like, generator):
    """Noise that makes the top K of scores + noise a draw without replacement."""
    u = torch.rand(like.shape, generator=generator).clamp_min(1e-20)
    return -(-u.log()).log().to(like.device)


def kept_after(share):
    """How many blocks are left after each round."""
    return [round(share * end / BLOCK) for end in ENDS]


@torch.no_grad()
def forgetful(model, ids, share, score):
    """Read streams (R, 49) with a cache that forgets.

    score(weights, cache, held): what the blocks of each layer are worth (layers, R, n); the best
    are kept -> logits of the answer (R, V), the blocks kept in each round [(layers, R, K)], best
    first.
    """
    layers = len(model.blocks)
    cache = KVCache(model.config, len(ids), STREAM + 1, device=ids.device)
    held = ids.new_zeros(layers, len(ids), 0)  # blocks that are in the cache
    rounds = []
    for i, K in enumerate(kept_after(share)):
        start = i * ROUND
        _, weights = read(model, ids[:, start : start + ROUND], cache=cache)
        new = ids.new_tensor(range(i * NEW, (i + 1) * NEW))
        new = new.expand(layers, len(ids), NEW)
        held = torch.cat((held, new), dim=2)  # (layers, R, n)
        order = score(weights, cache, held).topk(K, dim=2).indices  # (layers, R, K)
        held = held.gather(2, order)
        slots = BLOCK * order[..., None] + ids.new_tensor(range(BLOCK))
        for layer in range(layers):
            select(cache, layer, slots[layer].flatten(1))
        rounds.append(held)
    logits, _ = read(model, ids[:, STREAM:], cache=cache)
    return logits[:, -1], rounds


def policy(weights, cache, held, generator=None):
    """The policy's scores; with a generator, with the noise that makes the best of them a draw."""
    scores = torch.stack([attention_scores(w) for w in weights])  # (layers, R, n)
    return scores if generator is None else scores + gumbel(scores, generator)


def recency(weights, cache, held):
    """What was read last is kept."""
    return held.float()


def key_norm(weights, cache, held):
    """Small keys are kept (Devoto et al., arXiv 2406.11430)."""
    slots = cache.length - cache.base
    norms = [k[:, :slots].norm(dim=3).mean(2) for k in cache.k]  # (R, slots) each
    return -torch.stack(norms).unflatten(2, (-1, BLOCK)).mean(3)  # (layers, R, n)


def chance(weights, cache, held):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(held.shape, generator=generator)


# rules of thumb, for the model before RL
RULES = {"attention": policy, "recency": recency, "key norm": key_norm, "random": chance}


def left(held, n):
    """The blocks that are held (layers, R, K) -> whether each of n is (layers, R, n)."""
    return F.one_hot(held, n).sum(2).bool()


def replay_masks(rounds, ends=ENDS, T=STREAM + 1):
    """What each query saw in each layer when it was read (layers, R, T, T) bool."""
    causal = visible(T, T, causal=True, window=None, device=rounds[0].device)
    masks = causal.repeat(*rounds[0].shape[:2], 1, 1)  # (layers, R, T, T)
    for end, held in zip(ends, rounds, strict=True):
        tokens = left(held, end // BLOCK).repeat_interleave(BLOCK, dim=2)  # (layers, R, end)
        masks[:, :, end:, :end] &= tokens[:, :, None]  # for all queries that came later
    return masks


def memory_logp(weights, rounds, ends=ENDS):
    """The log-probability of all that was kept, over rounds and layers (R,)."""
    total = 0
    there = rounds[0][..., :0].bool()  # (layers, R, 0): before the first round
    for end, held in zip(ends, rounds, strict=True):
        n = end // BLOCK  # blocks read so far
        there = F.pad(there, (0, n - there.shape[2]), value=True)
        scores = [attention_scores(w[:, :, :end, :end]) for w in weights]
        scores = torch.stack(scores).masked_fill(~there, -torch.inf)  # (layers, R, n)
        total += plackett_luce(scores, held).sum(0)
        there = left(held, n)
    return total


# --------------------------------------------------------------------------------------------------
# Training


def optimizer_of(model, lr):
    return torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.95), weight_decay=0.0)


def step_on(optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    descend(optimizer, loss)


def pretrain(config, run, seed, device):
    """Recall with a full cache: every fact is asked for, so that nothing tells even from odd.

    The streams grow from 2 to 12 facts: with all from the start it takes many times as long.
    """
    torch.manual_seed(seed)
    shape = GPTConfig(
        N_KEYS + N_VALUES + N_FILLERS,
        block_size=STREAM + BLOCKS,
        n_layer=2,
        n_head=4,
        n_embd=64,
        tie=False,
    )
    model = GPT(shape).to(device)
    optimizer = optimizer_of(model, 1e-3)  # at 3e-3 it never learns to look values up
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    sizes = (2, 4, 8, 12)
    kept = dict(size=0, loss=3.0, left=300)

    def learnt():
        return kept["left"] == 0

    loop = run.loop(
        f"recall {seed}",
        config.recall,  # a run that never learns ends, too
        model,
        optimizer,
        rng,
        generator,
        kept=kept,
        until=learnt,
    )
    for _ in loop:
        n = sizes[kept["size"]]
        ids = draw(64, generator, device)[0][:, : BLOCK * n]
        asked = torch.rand(64, n, generator=generator).argsort(1)  # all, in any order
        asked = asked.to(device)
        questions = ids.gather(1, BLOCK * asked)
        answers = ids.gather(1, BLOCK * asked + 1)
        ids = torch.cat((ids, questions), dim=1)
        logits = model(ids)[:, -n:]
        logp = logits.log_softmax(-1)  # (64, n, V)
        loss = -logp.gather(2, answers[..., None]).mean()
        step_on(optimizer, loss)
        kept["loss"] = 0.9 * kept["loss"] + 0.1 * loss.item()
        if n == BLOCKS:
            kept["left"] -= kept["loss"] < 0.5
        elif kept["loss"] < 0.5:
            kept.update(size=kept["size"] + 1, loss=3.0)
        run.say(facts=n)
    return model


def rl_loss(model, ids, answer, rounds, advantage, memory_loss, replay):
    """The loss of answers (R,) to streams (R, 49) read with the forgetting of `rounds`."""
    masks = replay_masks(rounds)
    if not replay:  # what a program does that thinks of the cache as whole
        masks = torch.ones_like(masks).tril()
    logits, weights = read(model, ids, masks)
    logp = logits[:, -1].log_softmax(-1).gather(1, answer[:, None]).squeeze(1)  # (R,)
    if memory_loss:
        logp = logp + memory_logp(weights, rounds)
    return -(advantage * logp).mean()


@torch.no_grad()
def measure(model, share, test, score=policy):
    """Accuracy on test streams, and how often each layer keeps the block that is asked for."""
    meter = Meter()
    ids, block = test
    logits, rounds = forgetful(model, ids, share, score)
    right = logits.argmax(1) == answer_of(ids, block)  # (R,)
    return dict(
        accuracy=right.float().mean().item(),
        needed=(rounds[-1] == block[:, None]).any(2).float().mean(1).tolist(),  # of each layer
        **meter.solved(right.sum()),
    )


def reinforce(config, run, arm, seed, base, test):
    """RL on answers and on what is kept -> the trained model."""
    memory_loss, replay = ARMS[arm]
    model = copy.deepcopy(base)
    optimizer = optimizer_of(model, config.lr)
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    phase = f"{arm} {seed}"
    where = dict(phase="rl", arm=arm, seed=seed)
    if phase not in run.state:
        run.log(**where, step=0, **measure(model, config.keep, test))
    for step in run.loop(phase, config.steps, model, optimizer, rng, generator):
        # 1. Each stream is read several times, and forgotten differently; an answer is drawn
        ids, block = draw(config.streams, generator, test[0].device)
        ids = ids.repeat_interleave(GROUP, dim=0)  # (R, 49)
        right = answer_of(ids, block.repeat_interleave(GROUP))  # (R,)
        noisy = partial(policy, generator=generator)
        logits, rounds = forgetful(model, ids, config.keep, noisy)
        answer = logits.softmax(-1).cpu().multinomial(1, generator=generator)  # (R, 1)
        answer = answer.squeeze(1).to(ids.device)  # (R,)
        # 2. Better or worse than the other readings of the same stream?
        reward = (answer == right).float().view(-1, GROUP)
        advantage = (reward - reward.mean(1, keepdim=True)).flatten()  # (R,)
        # 3. A step
        loss = rl_loss(model, ids, answer, rounds, advantage, memory_loss, replay)
        step_on(optimizer, loss)
        row = dict(reward=reward.mean().item(), loss=loss.item())
        if (step + 1) % config.eval_every == 0 or step + 1 == config.steps:
            row |= measure(model, config.keep, test)
            run.say(reward=row["reward"], accuracy=row["accuracy"])
        run.log(**where, step=step + 1, **row)
    return model


def train(config, run, seed, device):
    """One base, one model for each arm, and rules of thumb beside them -> base, models by name."""
    generator = torch.Generator().manual_seed(10**6)  # the same streams for every seed
    test = draw(config.test, generator, device)
    base = pretrain(config, run, seed, device)
    models = {arm: reinforce(config, run, arm, seed, base, test) for arm in ARMS}
    for name, score in {**RULES, "learned": policy}.items():
        model = models.get(name, base)
        for share in SHARES:
            run.log_once(
                partial(measure, model, share, test, score),
                phase="budget",
                arm=name,
                seed=seed,
                step=config.steps,
                share=share,
            )
    return base, models


# --------------------------------------------------------------------------------------------------
# The figure


def by_share(run, arm):
    """Accuracy of an arm at each share (seeds, shares)."""
    where = dict(phase="budget", arm=arm)
    values = [series(run, "accuracy", share=share, **where)[1] for share in SHARES]
    return np.concatenate(values, axis=1)


def figure(config, run):
    """The figure and its claims, from the rows of the run."""
    fig, axes = plt.subplots(1, 3, figsize=(12.5, 4.6), layout="constrained")
    budget, training, needed = axes
    half = SHARES.index(0.5)
    reduction = 1 / np.array(SHARES)
    learned = by_share(run, "learned")
    band(budget, reduction, learned, "learned", marker="o")
    rules = []
    for rule in RULES:
        accuracy = by_share(run, rule)
        rules.append(accuracy[:, half])
        band(budget, reduction, accuracy, rule, marker=".", ls="--")
    learned = learned[:, half]  # (seeds,)
    best = max(rules, key=np.mean)
    budget.set(
        title=f"Half of the cache: learned {learned.mean():.2f}, best rule {best.mean():.2f}",
        xlabel="times smaller (2 = half of the cache kept)",
        ylabel="accuracy",
    )

    ends = {}
    for arm in ARMS:
        steps, accuracy = series(run, "accuracy", phase="rl", arm=arm)
        band(training, steps, accuracy, arm)
        ends[arm] = accuracy[:, -1]
    worth = ends["learned"] - ends["no memory loss"]
    replay = ends["learned"] - ends["no replay masks"]
    title = f"Memory loss {worth.mean():+.2f}; replay masks {replay.mean():+.2f}"
    training.set(title=title, xlabel="step of RL", ylabel="accuracy")

    steps, kept = series(run, "needed", phase="rl", arm="learned")  # (seeds, steps, layers)
    for layer in range(kept.shape[2]):
        band(needed, steps, kept[..., layer], f"layer {layer + 1} of 2")
    last = kept[:, -1, -1]
    needed.set(
        title=f"Last layer keeps what is asked for: {last.mean():.2f}",
        xlabel="step of RL",
        ylabel="P(kept | asked for)",
    )
    for ax in axes:
        ax.set_ylim(0, 1.02)
        ax.legend()
    n = config.seeds
    return fig, [
        claim("learned", "accuracy at 2x, learned", SOURCE, "0.496", learned, ">=", 0.85, n),
        claim("rules", "accuracy at 2x, best rule of thumb", SOURCE, "0.212", best, "<=", 0.6, n),
        claim("memory", "learned minus no memory loss", SOURCE, "0.139", worth, ">=", 0.1, n),
        claim("replay", "learned minus no replay masks", SOURCE, "0.471", replay, ">", 0, n),
        claim(
            "needed",
            "P(kept | asked for), last layer",
            "design of the task",
            "-",
            last,
            ">=",
            0.9,
            n,
        ),
    ]


def written(ids):
    """A stream with its question, as text."""
    facts = [f"{ids[i]}={ids[i + 1] - N_KEYS}" for i in range(0, STREAM, BLOCK)]
    return " ".join(facts) + f"   {ids[-1]}=?"


def answers(model, share, ids, block):
    """What a model says, the keys that its last layer kept, and whether it is right."""
    logits, rounds = forgetful(model, ids, share, policy)
    said = logits.argmax(1)
    right = said == answer_of(ids, block)
    keys = ids.gather(1, BLOCK * rounds[-1][-1]).sort(1).values  # (R, K)
    texts = [
        f"{value - N_KEYS}   (facts that its last layer kept: {kept})"
        for value, kept in zip(said.tolist(), keys.tolist(), strict=True)
    ]
    return list(zip(texts, right.tolist(), strict=True))


def main():
    config = parse_args(Config, __doc__)
    device = pick_device(config.device)
    with Run(config) as run:
        for seed in seeds_of(config):
            base, models = train(config, run, seed, device)
        test = draw(3, torch.Generator().manual_seed(7), device)
        run.samples(
            [written(row) for row in test[0].tolist()],
            **{
                "before RL": answers(base, config.keep, *test),
                "after RL": answers(models["learned"], config.keep, *test),
            },
        )
        run.finish(*figure(config, run))


if __name__ == "__main__":
    command(main)
