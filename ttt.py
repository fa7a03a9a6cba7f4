"""ttt.py: test-time training, end to end: a model that goes on training on the text it reads.

(Tandon, Dalal, Li et al., arXiv 2512.23675.) A GPT whose layers see a short window only. Its last
block has one more MLP, W, the fast weights: attention, fast MLP, ordinary MLP. Each document starts
from the same W_0, and is read in chunks:

    score the chunk with W_c     loss_c = mean of -log p(next token)     honest: before the step
    then step on it              W_c+1 = W_c - eta g / max(1, |g|)       g = d loss_c / d W_c

Training minimises the mean of all loss_c with respect to all weights, W_0 included, and
differentiates through the steps: gradients of gradients. So W_0 and all that feeds it learn to make
a step help, and what the window has lost can be in W. The attention lies below W and is computed
once for the whole document.

The task (tasks/maps.py): a document follows a random map of 32 tokens, its own, with probability
.9, and jumps with probability .1. After some 100 tokens the map can be known.

    map  a->q  q->c  c->x  x->a ...     document  a q c x a q c | m f d m f ...

The floor is the entropy of the next token for who knows the map. Three layers of windows of 4 reach
10 tokens; short cycles of the map come round within them, so that a rule written by hand gets 3.2
nats from 4 tokens, 2.8 from 10, and .8 from all of them at the end of a document.
(`test_a_rule_written_by_hand_says_what_windows_allow_and_what_documents_do`.)

    python ttt.py                       2 to 5 minutes on two cores
    python -m experiments.context       real text: loss against the length of the context (25 min)
    python -m experiments.cost          time and memory per token against that length (1 min)

What to see: TTT falls nearly to the floor, as full attention does, in constant memory. The same
model trained without steps gains little from steps at test time (classical dynamic evaluation, by
plain SGD), whatever their size. `samples.txt` holds the ends of three documents, and what the
window and TTT knew of them.

How this differs from the paper:
1. 0.1 million parameters for 125 million to 3 billion, a window of 4 tokens for 8,192, and
   documents drawn from random maps. (experiments/context.py reads text.)
2. A chunk (16) is longer than the window, in the paper it is an eighth of it: what has left the
   window need not be in W yet.
3. One block of three has fast weights, the paper's last quarter. Its W has two matrices and no
   gate, and the norm behind it starts at 0.1.
4. All arms have the same initial weights; in the rivals W is an ordinary MLP. "Full attention" sees
   everything in its last layer only, without rotation there (or it would fail past the trained
   length for that reason alone), and below it through the same windows: with full attention in all
   three layers it had not found the map after 1,000 steps.
5. The window gets five times the steps of the others, which have stopped falling: slowly it learns
   what 10 tokens tell.
"""

import copy
import functools
import math
import random
import time
from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from experiment import (
    Flags,
    Run,
    UserError,
    band,
    claim,
    command,
    descend,
    flag,
    lr_at,
    parse_args,
    pick_device,
    seeds_of,
    series,
)
from meter import spend
from model import GPT, Block, GPTConfig, RMSNorm
from tasks.maps import V, documents, floor

SOURCE = "Tandon et al., arXiv 2512.23675"
ARMS = ("TTT", "sliding window", "full attention")
# times the steps: after the default 300 the others fall no more, the window has hardly begun
LONGER = {"sliding window": 5}
OFF = "TTT, updates off"
# dynamic evaluation: which weights take the steps, and the step sizes and decays that are tried
FAST = "dynamic evaluation, fast MLP"
ALL = "dynamic evaluation, all weights"
ETAS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
DECAYS = (0.0, 0.1)
SWEEP = [(FAST, eta, 0.0) for eta in ETAS]
SWEEP += [(ALL, eta, decay) for eta in ETAS[:-1] for decay in DECAYS]
PARTS = 16  # of a document: a measured curve has a point for each


@dataclass
class Config(Flags):
    steps: int = flag(300, "training steps of an arm", quick=4, low=1)
    batch: int = flag(16, "documents per step", quick=2, low=1, high=1024)
    length: int = flag(
        256,
        "tokens of a document in training, a multiple of 16 and of --chunk",
        quick=64,
        low=16,
        high=2**16,
    )
    chunk: int = flag(16, "tokens between two inner steps", low=1)
    window: int = flag(4, "tokens that attention sees", quick=8, low=1)
    eta: float = flag(
        1.0, "step size of the inner loop (SGD, gradient clipped to norm 1 per document)", low=0
    )
    checkpointing: bool = flag(
        False, "compute a chunk again in the backward pass: memory of one at a time, twice the time"
    )
    lr: float = flag(2e-3, "peak learning rate (AdamW, warm-up then cosine to a tenth)", low=0)
    n_layer: int = flag(3, "layers", low=1, high=64)
    n_head: int = flag(4, "heads", low=1)
    n_embd: int = flag(64, "channels", quick=32, low=8, high=4096)
    n_fast: int = flag(128, "width of the fast MLP", quick=32, low=1, high=4096)
    eval_docs: int = flag(32, "documents to test on", quick=2, low=1, high=1024)


# --------------------------------------------------------------------------------------------------
# The model: a GPT whose last block has fast weights


class FastBlock(Block):
    """Attention, fast MLP, ordinary MLP, in series.

    `forward` stops where the fast weights begin, `upper` goes on from there.
    """

    def __init__(self, config, layer, n_fast, rotary=True):
        super().__init__(config, layer)
        C = config.n_embd
        self.rotary = rotary  # False: attention does not know how far back a token is
        self.norm_in = RMSNorm(C, config.norm_eps)
        self.norm_out = RMSNorm(C, config.norm_eps)
        # a norm's output has size 1, whatever W is; embeddings begin at 0.02, so start small
        nn.init.constant_(self.norm_out.weight, 0.1)
        # W_0, which is trained like any other weight
        self.w1 = nn.Parameter(0.02 * torch.randn(C, n_fast))
        self.w2 = nn.Parameter(0.02 * torch.randn(n_fast, C))

    def forward(self, x, rope, mask=None, cache=None):
        if not self.rotary:
            rope = torch.ones_like(rope)
        return x + self.attn(self.norm1(x), rope, mask, cache)  # (B, T, C)

    def upper(self, x, w1, w2):
        """x (B, b, C), each document's fast weights w1 (B, C, F), w2 (B, F, C) -> (B, b, C)."""
        h = F.silu(self.norm_in(x) @ w1)  # (B, b, F): each document meets its own W
        x = x + self.norm_out(h @ w2)  # (B, b, C)
        return x + self.mlp(self.norm2(x))


class TTT(GPT):
    """`hidden` gives the states below the fast weights, `logits` what follows.

    To decode, see `Reader` in experiments/cost.py: engine.generate takes no inner steps. Rotations
    are made for the positions at hand: no table of them grows with the text or ends it. full: the
    last layer sees the whole context.
    """

    def __init__(self, config, n_fast, full=False):
        super().__init__(config)
        last = FastBlock(config, config.n_layer - 1, n_fast, rotary=not full)
        # GPT's initial weights, not torch's
        last.load_state_dict(self.blocks[-1].state_dict(), strict=False)
        self.blocks[-1] = last
        # the last norm comes after the fast weights, in `logits`
        self.final, self.norm = self.norm, nn.Identity()
        # the layers below have their windows already; a cache, sized by config.window, has to keep
        # everything
        if full:
            config.window = last.attn.window = None

    def rotations(self, start, T):
        """The rotary factors of positions start to start + T - 1 -> (T, 1, D/2), complex."""
        D = self.config.head_dim
        theta = self.config.rope_theta ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)
        positions = torch.arange(start, start + T, dtype=torch.float64)
        angle = torch.outer(positions, theta)  # (T, D/2)
        return torch.polar(torch.ones_like(angle), angle).to(torch.complex64)[:, None]

    def hidden(self, ids, cache=None):
        """ids (B, T) -> the states below the fast weights (B, T, C).

        With a cache, ids continue its rows, and are added to it.
        """
        T = ids.shape[1]
        start = 0 if cache is None else cache.extend(T)[0].start
        spend(self.config.flops(len(ids), T, start + T))
        rope = self.rotations(start, T).to(ids.device)
        x = self.wte(ids)  # (B, T, C)
        for block in self.blocks:
            x = block(x, rope, cache=cache)
        return x

    def fast(self, B):
        """W_0 for B documents: a tuple of (B, C, F), (B, F, C)."""
        last = self.blocks[-1]
        return last.w1.expand(B, -1, -1), last.w2.expand(B, -1, -1)

    def logits(self, x, fast):
        """States x (B, b, C) from `hidden`, fast weights -> (B, b, V)."""
        spend(4 * x.numel() * fast[0].shape[2])  # of the fast MLP
        return self.lm_head(self.final(self.blocks[-1].upper(x, *fast)))

    def forward(self, ids):
        return self.logits(self.hidden(ids), self.fast(len(ids)))


def build(config, vocab, full=False):
    """A model of the flags' shape. It has no positions to run out of: block_size is idle."""
    shape = GPTConfig(
        vocab,
        block_size=1,
        n_layer=config.n_layer,
        n_head=config.n_head,
        n_embd=config.n_embd,
        n_hidden=2 * config.n_embd,
        qk_norm=True,
        tie=False,
        window=config.window,
    )
    return TTT(shape, config.n_fast, full)


# --------------------------------------------------------------------------------------------------
# The inner loop


def token_losses(model, x, y, fast):
    """x (B, b, C) from `hidden`, targets y (B, b) -> -log p of each (B, b), in nats."""
    logits = model.logits(x, fast).flatten(0, 1)  # (B * b, V)
    return F.cross_entropy(logits, y.flatten(), reduction="none").view(y.shape)


def inner_update(fast, grads, eta):
    """W_c+1 = W_c - eta g / max(1, |g|) in each document on its own.

    fast, grads: tuples of (B, C, F), (B, F, C); |g| is over both matrices.
    """
    squares = sum(g.square().sum((1, 2)) for g in grads)  # (B,): |g|^2
    # a chunk that surprises has a long gradient: the clip bounds what one step can do to W. Below
    # the root, because that has no derivative at 0
    scale = eta / squares.clamp_min(1.0).sqrt()  # (B,)
    return tuple(w - scale[:, None, None] * g for w, g in zip(fast, grads, strict=True))


def score_then_step(model, x, y, fast, eta, outer=False):
    """A chunk, x and y as in `token_losses` -> its losses (B, b), and the next fast weights.

    outer: differentiable, gradients of gradients included.
    """
    with torch.enable_grad():
        # In training W hangs on W_0 and on all chunks so far. At test time there is no graph of how
        # it came about: W is all that learns
        if not outer:
            fast = tuple(w.detach().requires_grad_() for w in fast)
        loss = token_losses(model, x, y, fast)  # (B, b)
        # The sum over documents: each has its own W, and gets the gradient of its own mean.
        # create_graph: the gradient is itself a function of the weights, to be differentiated
        grads = torch.autograd.grad(loss.mean(1).sum(), fast, create_graph=outer)
    if not outer:
        loss = loss.detach()
        fast = [w.detach() for w in fast]  # values again, no leaves
    return (loss, *inner_update(fast, grads, eta))


def read(model, ids, eta, chunk, outer=False, checkpointing=False):
    """Documents ids (B, T + 1), each from W_0 -> the loss of every next token (B, T), in nats.

    eta 0 is the plain forward pass. outer: keep the graph for a backward pass through the inner
    steps. checkpointing: compute each chunk again in that backward pass (reentrant, because there
    is a gradient inside: then it works with .backward(), not with torch.autograd.grad).
    """
    x = model.hidden(ids[:, :-1])  # (B, T, C): no step changes what lies below W
    y = ids[:, 1:]
    fast = model.fast(len(ids))
    if eta == 0:
        return token_losses(model, x, y, fast)

    def step(part_x, part_y, *fast):
        return score_then_step(model, part_x, part_y, fast, eta, outer)

    if checkpointing:
        step = functools.partial(checkpoint, step, use_reentrant=True)
    # a chunk's losses are of the W that the chunks before it made
    losses = []
    for part_x, part_y in zip(x.split(chunk, 1), y.split(chunk, 1), strict=True):
        loss, *fast = step(part_x, part_y, *fast)
        losses.append(loss)
    return torch.cat(losses, 1)  # (B, T)


# --------------------------------------------------------------------------------------------------
# Training, and the losses of test documents


def train(config, run, arm, seed, model, draw, steps):
    """Train an arm, or go on where its checkpoint stopped -> the model.

    draw: numpy generator -> ids (B, T + 1).
    """
    rng = random.Random(seed)
    device = model.lm_head.weight.device
    optimizer = torch.optim.AdamW(
        model.parameters(), config.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    for step in run.loop(f"{arm} {seed}", steps, model, optimizer, rng):
        started = time.time()
        optimizer.param_groups[0]["lr"] = lr_at(step, steps, config.lr, warmup=40)
        # the inner steps grow over the first tenth: W_0 is of no use yet
        eta = config.eta * min(1.0, 0.1 + 9 * step / steps) if arm == "TTT" else 0
        # the arms of a seed draw the same documents
        ids = draw(np.random.default_rng(rng.getrandbits(64))).to(device)
        loss = read(
            model, ids, eta, config.chunk, outer=True, checkpointing=config.checkpointing
        ).mean()
        optimizer.zero_grad()
        loss.backward()  # through every inner step, to W_0 and to all that feeds it
        norm = descend(optimizer, loss)  # cuts the gradient and steps -> its norm before
        row = dict(loss=loss.item(), grad_norm=norm, seconds=time.time() - started)
        run.log(phase="train", arm=arm, seed=seed, step=step, **row)
        run.say(loss=row["loss"])
    return model


@torch.no_grad()
def losses(model, ids, eta, chunk, rows):
    """`read` without an outer graph, `rows` documents at a time -> (B, T), on the CPU."""
    device = model.lm_head.weight.device
    parts = [read(model, part.to(device), eta, chunk).cpu() for part in ids.split(rows)]
    return torch.cat(parts)


def dynamic_evaluation(model, ids, eta, decay, chunk):
    """Krause et al., ICML 2018: step on ALL weights after each chunk of a document ids (T + 1,).

    They decay towards where they began. -> losses (T,). The weights that the caller has stay. Each
    chunk is read with at least as much before it as the windows of all layers reach.
    """
    reach = model.config.n_layer * model.config.window  # a model with full attention has none
    model = copy.deepcopy(model)
    weights = list(model.parameters())
    start = [w.detach().clone() for w in weights]
    losses = []
    for a in range(0, len(ids) - 1, chunk):
        first = max(0, a - reach)
        part = ids[None, first : a + chunk + 1]  # (1, reach + chunk + 1)
        # the weights below have moved, too: states from before the last step are of no use
        x = model.hidden(part[:, :-1])
        # of the chunk alone: (chunk,)
        loss = token_losses(model, x, part[:, 1:], model.fast(1))[0, a - first :]
        grads = torch.autograd.grad(loss.mean(), weights)
        norm = torch.stack([g.square().sum() for g in grads]).sum().sqrt()
        with torch.no_grad():
            for w, g, w0 in zip(weights, grads, start, strict=True):
                w.add_(-eta / norm.clamp_min(1.0) * g + decay * (w0 - w))
        losses.append(loss.detach())
    return torch.cat(losses)


def score(kind, model, ids, eta, chunk, decay=0.0, rows=32):
    """Documents ids (B, T + 1), read with inner steps or by dynamic evaluation -> losses (B, T)."""
    if kind != ALL:  # FAST is the inner loop itself, of a model that was trained without it
        return losses(model, ids, eta, chunk, rows)
    ids = ids.to(model.lm_head.weight.device)
    return torch.stack([dynamic_evaluation(model, row, eta, decay, chunk) for row in ids]).cpu()


def log_losses(config, run, seed, arm, model, ids, eta, decay=None):
    """Log the loss of documents ids (B, T + 1) in each of their parts. decay: dynamic evaluation's.

    A row's step is its position in the document. A resumed run that has the rows does not measure
    again.
    """

    @functools.cache
    def by_part():
        loss = score(arm, model, ids, eta, config.chunk, decay)
        return loss.view(len(ids), PARTS, -1).mean((0, 2)).tolist()  # PARTS numbers

    where = dict(phase="test", arm=arm, seed=seed, steps=config.steps)
    swept = {} if decay is None else dict(eta=eta, decay=decay)
    for i in range(PARTS):
        end = (i + 1) * config.length // PARTS
        run.log_once(lambda i=i: {"loss": by_part()[i]}, **where, step=end, **swept)


def compare(config, run, seed, device):
    """Train all arms on the same documents (the window on more of them), and test them on others
    -> {arm: model}.
    """

    def draw(rng):
        return documents(rng, config.batch, config.length + 1)

    models = {}
    for arm in ARMS:
        torch.manual_seed(seed)
        model = build(config, V, full=arm == "full attention")
        # GPT's initial weights are smaller: from those full attention finds the map after 300
        # steps, from these after 100. All arms have these
        nn.init.normal_(model.blocks[-1].attn.proj.weight, std=0.05)
        steps = config.steps * LONGER.get(arm, 1)
        models[arm] = train(config, run, arm, seed, model.to(device), draw, steps)
    # other maps than those of training: a permutation of 32 is hardly ever drawn twice
    test = documents(np.random.default_rng([seed, 1]), config.eval_docs, config.length + 1)
    for arm, model in models.items():
        log_losses(config, run, seed, arm, model, test, config.eta if arm == "TTT" else 0)
    log_losses(config, run, seed, OFF, models["TTT"], test, 0)
    # steps at test time for a model that was not trained for them
    for arm, eta, decay in SWEEP:
        log_losses(config, run, seed, arm, models["sliding window"], test, eta, decay)
    return models


# --------------------------------------------------------------------------------------------------
# The figure


def measured(config, run):
    """What the rows say: curves of the arms, of the best dynamic evaluations, and of all of them.

    A curve is losses (seeds, PARTS). The second dict has names for keys, the third (arm, eta,
    decay). Which of them is best is decided on the test documents themselves: in its favour.
    """

    def curve(arm, **swept):
        return series(run, "loss", phase="test", arm=arm, steps=config.steps, **swept)[1]

    arms = {arm: curve(arm) for arm in (*ARMS, OFF)}  # each (seeds, PARTS)
    swept = {(arm, eta, decay): curve(arm, eta=eta, decay=decay) for arm, eta, decay in SWEEP}
    dynamic = {}
    for kind in (FAST, ALL):
        keys = [key for key in SWEEP if key[0] == kind]
        arm, eta, decay = best = min(keys, key=lambda key: swept[key].mean())
        dynamic[f"{arm}, eta = {eta:g}" + f", decay {decay}" * (decay > 0)] = swept[best]
    return arms, dynamic, swept


def last_quarter(y):
    """The mean of curves (seeds, PARTS) over the end of the document -> (seeds,)."""
    return y[:, -PARTS // 4 :].mean(1)


def figure(config, run):
    arms, dynamic, swept = measured(config, run)
    fig, (left, right) = plt.subplots(1, 2, figsize=(14, 5), layout="constrained")
    ttt, window = (last_quarter(arms[arm]).mean() for arm in ("TTT", "sliding window"))
    seeds = f"{config.seeds} seed{'s' * (config.seeds > 1)}"
    fig.suptitle(
        f"A window of {config.window} tokens at the end of a document: {ttt:.2f} nats with "
        f"test-time training, {window:.2f} without; the floor is {floor():.2f} ({seeds})"
    )
    middles = (np.arange(PARTS) + 0.5) * config.length / PARTS
    styles = ("-", "-", "-", ":", "--", "--")
    for (arm, y), style in zip((arms | dynamic).items(), styles, strict=True):
        band(left, middles, y, arm, ls=style)
    left.axhline(floor(), color="k", lw=1, label="floor: the map is known")
    left.set(title="Loss while reading", xlabel="position in the document (tokens)")
    left.set(ylabel="loss (nats per token)", ylim=(0, None))
    draw_sweep(right, arms, swept)
    for ax in (left, right):
        ax.legend()
    return fig, judge(arms, dynamic)


def draw_sweep(ax, arms, swept):
    """Dynamic evaluation against its step size, beside two arms."""
    styles = ((FAST, 0.0, "C4", "o-"), (ALL, 0.0, "C5", "s-"), (ALL, DECAYS[1], "C5", "s--"))
    for arm, decay, color, style in styles:
        keys = [key for key in SWEEP if key[0] == arm and key[2] == decay]
        means = np.stack([swept[key].mean(1) for key in keys], 1)  # (seeds, etas)
        etas = [eta for _, eta, _ in keys]
        label = arm + (f", decay {decay}" if decay else "")
        band(ax, etas, means, label, color=color, marker=style[0], ls=style[1:])
    for arm, color in (("TTT", "C0"), ("sliding window", "C1")):
        ax.axhline(arms[arm].mean(), color=color, label=arm)
    ax.set(title="Dynamic evaluation of a model that was not trained for it", ylim=(0, 5.5))
    ax.set(xlabel="step size eta", xscale="log")
    ax.set_ylabel("loss, mean of the document (nats per token)")


def judge(arms, dynamic):
    """The claims, from curves (seeds, PARTS)."""
    mean = {arm: y.mean(1) for arm, y in arms.items()}  # of the document: (seeds,)
    rival = np.min([y.mean(1) for y in dynamic.values()], 0)
    n = len(rival)
    return [
        claim(
            "floor",
            "TTT on the last quarter minus the floor, worst seed (nats)",
            SOURCE,
            "near full attention",
            (last_quarter(arms["TTT"]) - floor()).max(),
            "<=",
            0.25,
            n,
        ),
        claim(
            "dynamic",
            "best dynamic evaluation minus TTT, whole documents, worst seed",
            SOURCE,
            "-",
            (rival - mean["TTT"]).min(),
            ">=",
            1.5,
            n,
        ),
        claim(
            "off",
            "updates off minus the plain sliding window, largest difference",
            SOURCE,
            "-",
            np.abs(mean[OFF] - mean["sliding window"]).max(),
            "<=",
            0.3,
            n,
        ),
        claim(
            "full",
            "full attention on the last quarter minus the floor, worst seed",
            "fair comparison",
            "-",
            (last_quarter(arms["full attention"]) - floor()).max(),
            "<=",
            0.3,
            n,
        ),
    ]


def print_losses(config, run):
    arms, dynamic, _ = measured(config, run)
    print(f"\n{'loss (nats per token)':<52} document   last quarter")
    for arm, y in (arms | dynamic).items():
        print(f"{arm:<52} {y.mean():8.3f} {last_quarter(y).mean():14.3f}")


def examples(config, models):
    """The ends of three documents, and what two arms knew of them -> prompts, answers.

    An answer has each token to which the arm gave more than one half, and - for the others.
    """
    ids = documents(np.random.default_rng([config.seed, 2]), 3, config.length + 1)
    letters = np.array([*"abcdefghijklmnopqrstuvwxyz012345"])[ids[:, -16:]]  # (3, 16)
    answers = {}
    for arm, eta in (("sliding window", 0), ("TTT", config.eta)):
        loss = losses(models[arm], ids, eta, config.chunk, 3)[:, -16:]
        knew = (loss < math.log(2)).numpy()  # (3, 16)
        texts = [" ".join(row) for row in np.where(knew, letters, "-")]
        answers[arm.removeprefix("sliding ")] = list(zip(texts, knew.mean(1) > 0.5, strict=True))
    return [f"{'a document ends':<25}{' '.join(row)}" for row in letters], answers


def check_length(config):
    if config.length % PARTS or config.length % config.chunk:
        raise UserError(
            f"--length {config.length} must be a multiple of {PARTS} and of --chunk {config.chunk}"
        )


def main():
    config = parse_args(Config, __doc__)
    check_length(config)
    device = pick_device(config.device)
    parameters = build(config, V).parameters()  # an impossible shape ends here
    with Run(config) as run:
        run.introduce(device, sum(p.numel() for p in parameters))
        for seed in seeds_of(config):
            models = compare(config, run, seed, device)
        print_losses(config, run)
        prompts, answers = examples(config, models)
        run.samples(prompts, **answers)
        run.finish(*figure(config, run))


if __name__ == "__main__":
    command(main)
