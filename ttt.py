"""ttt.py: test-time training, end to end (Tandon, Dalal, Li et al., arXiv 2512.23675). A model that goes on training on the text it reads.

    python ttt.py                     `memory`: every document has a map of its own; who learns it while reading? within 5 minutes on two cores
    python ttt.py --figure context    real text, the standard library's sources: loss against the length of the context, out to 16k tokens
    python ttt.py --figure cost       time and memory per token against the length of the context

A GPT whose layers see a short window only. Its last block has one more MLP, W, the fast weights: attention, fast MLP, ordinary MLP.
Each document starts from the same W_0, and is read in chunks:

    score the chunk with W_c                  loss_c = mean of -log p(next token)         (honest: scored before the step)
    then step on it                           W_c+1 = W_c - eta g / max(1, |g|)           g = d loss_c / d W_c

Training minimises the mean of all loss_c with respect to all weights, W_0 included, and differentiates through the steps: gradients of
gradients. So W_0 and all that feeds it are made to be trained, and what the window has lost can be in W. The attention lies below W and
is computed once for the whole document.

The task of `memory`: a document follows a random map of 32 tokens with probability .9, and jumps with probability .1.

    map  a->q  q->c  c->x  x->a ...     document  a q c x a q c | m f d m f ...         after some 100 tokens the map can be known

The floor is the entropy of the next token for who knows the map. Three layers of windows of 4 reach 10 tokens; short cycles of the map
come round within them, so that a rule written by hand gets 3.2 nats from 4 tokens, 2.8 from 10, and .8 from all of them at the end of a
document. (`test_a_rule_written_by_hand_says_what_windows_allow_and_what_documents_do`.)

How this differs from the paper:
1. 0.1 million parameters (`context`: 0.6) for 125 million to 3 billion. Windows of 4 and 32 tokens for 8,192.
2. A chunk (16, 64) is longer than the window, in the paper it is an eighth of it: what has left the window need not be in W yet.
3. One block of three has fast weights, the paper's last quarter. Its W has two matrices and no gate, and the norm behind it starts at 0.1.
4. `memory` is synthetic; `context` trains for minutes, at the length of 1,024 only, and is then tested out to 16,384.
5. All arms have the same weights; in the rivals W is an ordinary MLP. "Full attention" sees everything in its last layer only, without
   rotation there (or it would fail past the trained length for that reason alone), and below it through the same windows: with full
   attention in all three layers it had not found the map after 1,000 steps. (In `cost` every layer sees everything.)
   It is not in `context`: on text 200 steps are too few for it to learn to look back; larger models, trained for longer, do.
6. In `memory` the window gets five times the steps of the others, which have stopped falling: slowly it learns what 10 tokens tell.

What to see: TTT falls nearly to the floor, as full attention does, in constant memory. The same model trained without steps gains little
from steps at test time on a map (classical dynamic evaluation, by plain SGD), whatever their size. On text it gains much: by steps on all
its weights, at five times the cost, it is far behind TTT after 1,024 tokens and level with it after 16,384.
"""
import copy
import ctypes
import dataclasses
import functools
import hashlib
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from engine import KVCache
from experiment import Run, UserError, band, claim, command, descend, flag, lr_at, need_memory, parse_args, pick_device, seeds_of, series
from model import GPT, Block, GPTConfig, RMSNorm
from pretrain import load_documents
from tokenizer import train_bpe

FIGURES = {"memory": "documents with a map of their own: loss against position (within 5 minutes)",
           "context": "real text: loss against the length of the context (about 25 minutes)",
           "cost": "time and memory per token against the length of the context (1 minute)"}
SOURCE = "Tandon et al., arXiv 2512.23675"
#  what a figure takes where no flag says otherwise
SIZES = {"memory": dict(seeds=1, steps=300, lr=2e-3, batch=16, length=256, chunk=16, window=4, n_embd=64, n_fast=128, eval_docs=32),
         "context": dict(seeds=3, steps=200, lr=4e-3, batch=4, length=1024, chunk=64, window=32, n_embd=128, n_fast=256, eval_docs=8),
         "cost": dict(seeds=3, chunk=64, window=32, n_embd=128, n_fast=256)}


@dataclass
class Config:
    seed: int = flag(0, "random seed; with --seeds K: the first of K", low=0, high=2 ** 32 - 1)
    seeds: int = flag(None, "repeat over this many seeds (default: 1 for memory, 3 for the others)", quick=1, low=1)
    device: str = flag("auto", "where to run", choices=("auto", "cpu", "cuda", "mps"))
    dtype: str = flag("float32", "bfloat16: autocast training", choices=("float32", "bfloat16"))
    out: str = flag("out/ttt", "folder for figure, metrics, claims and checkpoint")
    resume: bool = flag(False, "go on from the checkpoint in --out")
    quick: bool = flag(False, "a run of a few seconds that shows nothing but that it runs")
    figure: str = flag("memory", "which figure: " + "; ".join(f"{k}: {v}" for k, v in FIGURES.items()), choices=tuple(FIGURES))
    steps: int = flag(None, "training steps of an arm (default: 300, context 200; cost trains nothing)", quick=4, low=1)
    batch: int = flag(None, "documents per step (default: 16, context 4)", quick=2, low=1)
    length: int = flag(None, "tokens of a document in training, a multiple of 16 and of --chunk (default: 256, context 1024)", quick=64, low=16)
    chunk: int = flag(None, "tokens between two inner steps (default: 16, context and cost 64)", quick=16, low=1)
    window: int = flag(None, "tokens that attention sees (default: 4, context and cost 32)", quick=8, low=1)
    eta: float = flag(1.0, "step size of the inner loop (SGD, gradient clipped to norm 1 per document)", low=0)
    checkpointing: bool = flag(False, "make a chunk's graph again in the backward pass: memory of one chunk at a time, twice the time")
    lr: float = flag(None, "learning rate of the outer loop (AdamW, warm-up then cosine to a tenth; default: 2e-3, context 4e-3)", low=0)
    n_layer: int = flag(3, "layers", low=1)
    n_head: int = flag(4, "heads", low=1)
    n_embd: int = flag(None, "channels (default: 64, context and cost 128)", quick=32, low=8, high=2 ** 16)
    n_fast: int = flag(None, "width of the fast MLP (default: 128, context and cost 256)", quick=32, low=1, high=2 ** 16)
    eval_docs: int = flag(None, "documents to test on (default: 32, context 8 passages)", quick=2, low=1)
    data: str = flag("", "context: a folder, a text file or a Hugging Face dataset with a text column (default: the standard library's sources)")
    vocab_size: int = flag(512, "context: size of the BPE vocabulary", quick=257, low=257)
    context: int = flag(16384, "context and cost: the longest context in tokens", quick=256, low=128)

    def idle(self):
        """The flags that do nothing in a figure -> why."""
        idle = {"memory": ("data", "vocab_size", "context"), "context": (),
                "cost": ("dtype", "steps", "batch", "length", "lr", "checkpointing", "eval_docs", "data", "vocab_size")}
        why = "its documents are drawn from random maps" if self.figure == "memory" else "it trains nothing"
        return {name: f"--figure {self.figure}: {why}" for name in idle[self.figure]}

    @property
    def name(self):
        return self.figure


# ---------------------------------------------------------------------------------------------------------------------------
# The model: a GPT whose last block has fast weights

class FastBlock(Block):
    """Attention, fast MLP, ordinary MLP, in series. `forward` stops where the fast weights begin, `upper` goes on from there."""

    def __init__(self, config, layer, n_fast, rotary=True):
        super().__init__(config, layer)
        C, self.rotary = config.n_embd, rotary
        self.norm_in, self.norm_out = RMSNorm(C, config.norm_eps), RMSNorm(C, config.norm_eps)
        nn.init.constant_(self.norm_out.weight, 0.1)            # a norm's output has size 1, whatever W is; embeddings have 0.02
        self.w1, self.w2 = nn.Parameter(0.02 * torch.randn(C, n_fast)), nn.Parameter(0.02 * torch.randn(n_fast, C))     # W_0

    def forward(self, x, rope, mask=None, cache=None):
        return x + self.attn(self.norm1(x), rope if self.rotary else torch.ones_like(rope), mask, cache)

    def upper(self, x, w1, w2):
        """x (B, b, C), the fast weights of each document w1 (B, C, F), w2 (B, F, C) -> (B, b, C)."""
        x = x + self.norm_out(F.silu(self.norm_in(x) @ w1) @ w2)
        return x + self.mlp(self.norm2(x))


class TTT(GPT):
    """`hidden` gives the states below the fast weights, `logits` what follows: decode with a Reader, not with model.generate.

    Rotations are made for the positions at hand: no table of them grows with the text or ends it. full: the last layer sees the whole context.
    """

    def __init__(self, config, n_fast, full=False):
        super().__init__(config)
        last = FastBlock(config, config.n_layer - 1, n_fast, rotary=not full)
        last.load_state_dict(self.blocks[-1].state_dict(), strict=False)        # GPT's initial weights, not torch's
        self.blocks[-1] = last
        self.final, self.norm = self.norm, nn.Identity()
        if full:        # and a cache, which goes by config.window, keeps it
            config.window = self.blocks[-1].attn.window = None

    def hidden(self, ids, cache=None):
        """ids (B, T) -> the states below the fast weights (B, T, C). With a cache, ids continue its rows, and are added to it."""
        T, D = ids.shape[1], self.config.head_dim
        start = 0 if cache is None else cache.extend(T)[0].start
        theta = self.config.rope_theta ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)
        angle = torch.outer(torch.arange(start, start + T, dtype=torch.float64), theta)                 # (T, D/2)
        rope = torch.polar(torch.ones_like(angle), angle).to(torch.complex64)[:, None].to(ids.device)
        x = self.wte(ids)
        for block in self.blocks:
            x = block(x, rope, cache=cache)
        return x

    def fast(self, B):
        """W_0 for B documents: a tuple of (B, C, F), (B, F, C)."""
        return tuple(w.expand(B, -1, -1) for w in (self.blocks[-1].w1, self.blocks[-1].w2))

    def logits(self, x, fast):
        return self.lm_head(self.final(self.blocks[-1].upper(x, *fast)))

    def forward(self, ids):
        return self.logits(self.hidden(ids), self.fast(len(ids)))


def build(config, vocab, full=False, window=True):
    model = TTT(GPTConfig(vocab, 1, config.n_layer, config.n_head, config.n_embd, n_hidden=2 * config.n_embd, qk_norm=True, tie=False,
                          window=config.window if window else None), config.n_fast, full)
    if config.figure == "memory":       # from smaller weights full attention finds the map after 300 steps, not 100; on text they are no help to any arm
        nn.init.normal_(model.blocks[-1].attn.proj.weight, std=0.05)
    return model


# ---------------------------------------------------------------------------------------------------------------------------
# The inner loop

def token_losses(model, x, y, fast):
    """x (B, b, C) from `hidden`, targets y (B, b) -> -log p of each (B, b), in nats."""
    return F.cross_entropy(model.logits(x, fast).flatten(0, 1), y.flatten(), reduction="none").view(y.shape)


def inner_update(fast, grads, eta):
    """W_c+1 = W_c - eta g / max(1, |g|) in each document on its own. fast, grads: tuples of (B, C, F), (B, F, C); |g| is over both matrices."""
    norm = sum(g.square().sum((1, 2)) for g in grads).sqrt()                        # (B,)
    scale = eta / norm.clamp_min(1.0)
    return tuple(w - scale[:, None, None] * g for w, g in zip(fast, grads))


def score_then_step(model, x, y, fast, eta, outer=False):
    """A chunk, x and y as in `token_losses` -> its losses (B, b), and the fast weights for the next one.

    outer: differentiable, gradients of gradients included.
    """
    with torch.enable_grad():
        if not outer:
            fast = tuple(w.detach().requires_grad_() for w in fast)
        loss = token_losses(model, x, y, fast)
        grads = torch.autograd.grad(loss.mean(1).sum(), fast, create_graph=outer)   # the sum over documents: each has its own W
    if not outer:
        loss, fast = loss.detach(), [w.detach() for w in fast]
    return (loss, *inner_update(fast, grads, eta))


def read(model, ids, eta, chunk, outer=False, checkpointing=False):
    """Documents ids (B, T + 1), each from W_0 -> the loss of every next token (B, T), in nats. eta 0 is the plain forward pass.

    outer: keep the graph for a backward pass through the inner steps.
    checkpointing: of one chunk at a time (reentrant, as there is a gradient inside: only for .backward()).
    """
    x, y, fast, losses = model.hidden(ids[:, :-1]), ids[:, 1:], model.fast(len(ids)), []
    if eta == 0:
        return token_losses(model, x, y, fast)
    step = lambda x, y, *fast: score_then_step(model, x, y, fast, eta, outer)
    for part_x, part_y in zip(x.split(chunk, 1), y.split(chunk, 1)):
        loss, *fast = checkpoint(step, part_x, part_y, *fast, use_reentrant=True) if checkpointing else step(part_x, part_y, *fast)
        losses.append(loss)
    return torch.cat(losses, 1)


class Reader:
    """Reads on and on at a constant cost, wherever the text ends: its state is a cache of the window, the fast weights and the unfinished chunk.

    The token that ends a chunk is the first one of the next: a step is taken when it comes in. A cache of full attention grows to `capacity`.
    """

    def __init__(self, model, rows, eta, chunk, capacity=0):
        window, weight = model.config.window, model.lm_head.weight
        self.model, self.eta, self.chunk, self.fast = model, eta, chunk, model.fast(rows)
        self.cache = KVCache(model.config, rows, 2 * (window + chunk) if window else capacity, weight.device, weight.dtype)
        self.x, self.ids = weight.new_empty(rows, 0, weight.shape[1]), torch.empty(rows, 0, dtype=torch.long, device=weight.device)

    @torch.no_grad()
    def feed(self, ids):
        """ids (B, t), any t -> the logits of the token after each, (B, t, V)."""
        out = []
        while ids.shape[1]:
            if self.x.shape[1] == self.chunk:
                if self.eta:
                    y = torch.cat((self.ids[:, 1:], ids[:, :1]), 1)
                    _, *self.fast = score_then_step(self.model, self.x, y, self.fast, self.eta)
                self.x, self.ids = self.x[:, :0], self.ids[:, :0]
            part = ids[:, :self.chunk - self.x.shape[1]]
            x = self.model.hidden(part, self.cache)
            self.x, self.ids, ids = torch.cat((self.x, x), 1), torch.cat((self.ids, part), 1), ids[:, part.shape[1]:]
            out.append(self.model.logits(x, self.fast))
        return torch.cat(out, 1)


def dynamic_evaluation(model, ids, eta, decay, chunk):
    """Krause et al., ICML 2018: step on ALL weights after each chunk of one document ids (T + 1,), decay towards where they began -> losses (T,).

    The weights that the caller has stay. Each chunk is read with as much before it as the windows of all layers reach.
    """
    reach, model = model.config.n_layer * model.config.window, copy.deepcopy(model)
    weights, losses = list(model.parameters()), []
    start = [w.detach().clone() for w in weights]
    for a in range(0, len(ids) - 1, chunk):
        first = max(0, a - reach)
        part = ids[None, first:a + chunk + 1]
        loss = token_losses(model, model.hidden(part[:, :-1]), part[:, 1:], model.fast(1))[0, a - first:]
        grads = torch.autograd.grad(loss.mean(), weights)
        norm = torch.stack([g.square().sum() for g in grads]).sum().sqrt()
        with torch.no_grad():
            for w, g, w0 in zip(weights, grads, start):
                w.add_(-eta / norm.clamp_min(1.0) * g + decay * (w0 - w))
        losses.append(loss.detach())
    return torch.cat(losses)


# ---------------------------------------------------------------------------------------------------------------------------
# The two tasks

V, FOLLOW = 32, 0.9


def floor():
    """The entropy of the next token for who knows the map, in nats."""
    p = FOLLOW + (1 - FOLLOW) / V
    return -p * math.log(p) - (V - 1) * (1 - FOLLOW) / V * math.log((1 - FOLLOW) / V)


def documents(rng, B, T):
    """Each with a random permutation of its own, which it follows with probability FOLLOW, else any token -> ids (B, T). rng: numpy."""
    successor, ids, rows = rng.random((B, V)).argsort(1), rng.integers(V, size=(B, T)), np.arange(B)
    follows = rng.random((B, T)) < FOLLOW
    for t in range(1, T):
        ids[:, t] = np.where(follows[:, t], successor[rows, ids[:, t - 1]], ids[:, t])
    return torch.from_numpy(ids)


def texts(config):
    """The documents of --data in tokens of a BPE trained on four fifths of them -> those, and the others: two lists of ids (n,)."""
    docs = load_documents(config.data)
    cut = len(docs[0]) * 4 // 5
    parts = ([t for i, t in enumerate(docs) if i % 5], docs[::5]) if len(docs) > 1 else ([docs[0][:cut]], [docs[0][cut:]])
    tokenizer = train_bpe("".join(parts[0]), config.vocab_size)
    train, test = ([torch.tensor(tokenizer.encode_ordinary(t)) for t in part] for part in parts)
    for part, name, least in ((train, "to train on", config.length), (test, "to test on", config.context + config.length // 2)):
        if not any(len(ids) > least for ids in part):
            raise UserError(f"--data: no document {name} has more than {least} tokens")
    return train, test


def stretches(rng, docs, B, T):
    """B random stretches of T tokens of documents longer than that -> ids (B, T). A document is drawn in proportion to where one can start."""
    docs = [d for d in docs if len(d) >= T]
    room = np.array([len(d) - T + 1 for d in docs])
    picks = rng.choice(len(docs), B, p=room / room.sum())
    return torch.stack([docs[i][a:a + T] for i in picks for a in [rng.integers(room[i])]])


def passages(docs, T, n):
    """The first n stretches of T tokens (n, T), or fewer: one of each document that is long enough, then a second of each, none overlapping another."""
    places = sorted((a, i) for i, d in enumerate(docs) for a in range(0, len(d) - T + 1, T))
    return torch.stack([docs[i][a:a + T] for a, i in places[:n]])


# ---------------------------------------------------------------------------------------------------------------------------
# Training

ARMS = ("TTT", "sliding window", "full attention")
LONGER = {"sliding window": 5}      # times the steps, in `memory`: after 300 the others fall no more, the window has hardly begun


def train(config, run, arm, seed, device, vocab, draw, longer=1):
    """An arm from scratch, or from where its checkpoint stopped -> the model. draw: numpy generator -> ids (B, T + 1); longer: times the steps."""
    steps, phase, rng = longer * config.steps, f"{arm} {seed}", random.Random(seed)
    torch.manual_seed(seed)
    model = build(config, vocab, arm == "full attention").to(device)
    optimizer = torch.optim.AdamW(model.parameters(), config.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    for step in run.loop(phase, steps, model, optimizer, rng):
        started = time.time()
        for g in optimizer.param_groups:
            g["lr"] = lr_at(step, steps, config.lr, 40)
        eta = config.eta * min(1.0, 0.1 + 9 * step / steps) if arm == "TTT" else 0        # grows over the first tenth
        ids = draw(np.random.default_rng(rng.getrandbits(64))).to(device)
        with torch.autocast(device, torch.bfloat16, enabled=config.dtype == "bfloat16"):
            loss = read(model, ids, eta, config.chunk, outer=True, checkpointing=config.checkpointing).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = descend(optimizer, loss.item())
        run.log(phase="train", arm=arm, seed=seed, step=step, loss=loss.item(), grad_norm=norm, seconds=time.time() - started)
        run.bar.set_postfix_str(f"loss {loss.item():.3f}")
    return model


@torch.no_grad()
def losses(model, ids, eta, chunk, rows):
    """`read` without an outer graph, `rows` documents at a time."""
    device = model.lm_head.weight.device
    return torch.cat([read(model, part.to(device), eta, chunk).cpu() for part in ids.split(rows)])


# ---------------------------------------------------------------------------------------------------------------------------
# Figures and claims

ETAS, DECAYS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0), (0.0, 0.1)
OFF, FAST, ALL = "TTT, updates off", "dynamic evaluation, fast MLP", "dynamic evaluation, all weights"
TEXT_ETAS = {FAST: (3.0, 10.0, 30.0), ALL: (0.1, 0.3, 1.0, 3.0)}
SWEEP = [(FAST, eta, 0.0) for eta in ETAS] + [(ALL, eta, decay) for eta in ETAS[:-1] for decay in DECAYS]


def figure_memory(config, run, device):
    T, n = config.length, config.seeds
    ends = [(i + 1) * T // 16 for i in range(16)]
    by_sixteenth = lambda loss: loss.view(len(loss), 16, -1).mean((0, 2)).tolist()      # (docs, T) -> 16 numbers

    def log(arm, seed, measure, **more):
        values = functools.cache(lambda: by_sixteenth(measure()))
        for i, x in enumerate(ends):
            run.log_once(lambda: {"loss": values()[i]}, phase="test", arm=arm, seed=seed, steps=config.steps, step=x, **more)

    for seed in seeds_of(config):
        draw = lambda rng: documents(rng, config.batch, T + 1)
        test = documents(np.random.default_rng([seed, 1]), config.eval_docs, T + 1)
        models = {arm: train(config, run, arm, seed, device, V, draw, LONGER.get(arm, 1)) for arm in ARMS}
        for arm, model in models.items():
            log(arm, seed, lambda: losses(model, test, config.eta if arm == "TTT" else 0, config.chunk, 32))
        log(OFF, seed, lambda: losses(models["TTT"], test, 0, config.chunk, 32))
        plain = models["sliding window"]
        for arm, eta, decay in SWEEP:
            log(arm, seed, lambda: losses(plain, test, eta, config.chunk, 32) if arm == FAST else
                torch.stack([dynamic_evaluation(plain, ids, eta, decay, config.chunk) for ids in test.to(device)]).cpu(), eta=eta, decay=decay)
    get = lambda arm, **more: series(run, "loss", phase="test", arm=arm, steps=config.steps, **more)[1]                # (seeds, 16)
    swept = {(arm, eta, decay): get(arm, eta=eta, decay=decay) for arm, eta, decay in SWEEP}
    best = {arm: min((k for k in swept if k[0] == arm), key=lambda k: swept[k].mean()) for arm in (FAST, ALL)}         # chosen on the test documents themselves
    curves = {arm: get(arm) for arm in (*ARMS, OFF)}
    curves |= {f"{arm}, eta = {eta:g}" + f", decay {decay}" * (decay > 0): swept[arm, eta, decay] for arm, eta, decay in best.values()}
    fig, axes = plt.subplots(1, 2, figsize=(14, 5), layout="constrained")
    for (arm, y), style in zip(curves.items(), ("-", "-", "-", ":", "--", "--")):
        band(axes[0], np.array(ends) - T / 32, y, arm, ls=style)
    axes[0].axhline(floor(), color="k", lw=1, label="floor: the map is known")
    axes[0].set(title="Loss while reading", xlabel="position in the document (tokens)", ylabel="loss (nats per token)", ylim=(0, None))
    for arm, decay, color, style in ((FAST, 0.0, "C4", "o-"), (ALL, 0.0, "C5", "s-"), (ALL, DECAYS[1], "C5", "s--")):
        keys = [k for k in SWEEP if k[0] == arm and k[2] == decay]
        band(axes[1], [k[1] for k in keys], np.stack([swept[k].mean(1) for k in keys], 1), arm + (f", decay {decay}" if decay else ""), color=color, marker=style[0], ls=style[1:])
    for arm, color in (("TTT", "C0"), ("sliding window", "C1")):
        axes[1].axhline(get(arm).mean(), color=color, label=arm)
    axes[1].set(title="Dynamic evaluation of a model that was not trained for it", xlabel="step size eta", ylabel="loss, mean of the document (nats per token)",
                xscale="log", ylim=(0, 5.5))
    for ax in axes:
        ax.legend()
    mean, late = lambda y: y.mean(1), lambda y: y[:, 12:].mean(1)                       # of the document, of its last quarter: (seeds,)
    ttt, full = late(get("TTT")), late(get("full attention"))
    print(f"\n{'loss (nats per token)':<52} document   last quarter")
    for arm, y in curves.items():
        print(f"{arm:<52} {mean(y).mean():8.3f} {late(y).mean():14.3f}")
    fig.suptitle(f"A window of {config.window} tokens at the end of a document: {ttt.mean():.2f} nats with test-time training, {late(get('sliding window')).mean():.2f} without; the floor is {floor():.2f} "
                 f"({n} seed{'s' if n > 1 else ''})")
    dynamic = np.min([mean(swept[k]) for k in best.values()], 0)
    return fig, [
        claim("floor", "TTT on the last quarter minus the floor, worst seed (nats)", SOURCE, "near full attention", (ttt - floor()).max(), "<=", 0.25, n),
        claim("dynamic", "best dynamic evaluation minus TTT, whole documents, worst seed", SOURCE, "-", (dynamic - mean(get("TTT"))).min(), ">=", 1.5, n),
        claim("off", "updates off minus the plain sliding window, largest difference", SOURCE, "-", np.abs(mean(get(OFF)) - mean(get("sliding window"))).max(), "<=", 0.3, n),
        claim("full", "full attention on the last quarter minus the floor, worst seed", "fair comparison", "-", (full - floor()).max(), "<=", 0.3, n)]


def clock(device):
    """Seconds so far: on a CPU those that this process had it for, as others may be at work there."""
    return time.process_time() if device == "cpu" else time.perf_counter()


def speed(measure, tokens, device, repeats=3):
    """Tokens per second of measure(), which reads `tokens` of them: the fastest of a few."""
    times = []
    for _ in range(repeats):
        started = clock(device)
        measure().sum().item()          # waits for a GPU
        times.append(clock(device) - started)
    return tokens / min(times)


def figure_context(config, run, device, train_docs, test_docs):
    target, n, context = config.length // 2, config.seeds, config.context
    contexts = [c for c in (64, 256, 1024, 4096) if c < context] + [context]
    test = passages(test_docs, context + target + 1, config.eval_docs)
    print(f"{sum(map(len, train_docs)):,} tokens to train on; tested on the last {target} tokens of {len(test)} passages")
    sweep = {f"{arm}, eta = {eta:g}": (arm, eta) for arm, etas in TEXT_ETAS.items() for eta in etas}
    tests = {"TTT": {"TTT": ("TTT", config.eta), OFF: (OFF, 0)},
             "sliding window": {"sliding window": ("sliding window", 0)} | sweep}
    timed = ("TTT", "sliding window", *(f"{arm}, eta = {etas[0]:g}" for arm, etas in TEXT_ETAS.items()))

    def read_by(kind, model, ids, eta):
        if kind == ALL:
            return torch.stack([dynamic_evaluation(model, row, eta, 0.0, config.chunk) for row in ids.to(device)]).cpu()
        return losses(model, ids, eta, config.chunk, 4)

    for seed in seeds_of(config):
        draw = lambda rng: stretches(rng, train_docs, config.batch, config.length + 1)
        for arm in tests:
            model = train(config, run, arm, seed, device, config.vocab_size, draw)
            for name, (kind, eta) in tests[arm].items():
                for c in contexts:      # the same targets: only what comes before them is cut
                    run.log_once(lambda: {"loss": read_by(kind, model, test[:, -c - target - 1:], eta)[:, -target:].mean().item()},
                                 phase="test", arm=name, seed=seed, steps=config.steps, step=c)
                if name in timed:
                    reading = lambda: read_by(kind, model, test[:1, :config.length + 1], eta)
                    run.log_once(lambda: {"tokens_per_s": speed(reading, config.length, device)},
                                 phase="speed", arm=kind, seed=seed, step=config.length)
    get = lambda arm: series(run, "loss", phase="test", arm=arm, steps=config.steps)[1]                # (seeds, contexts)
    cost = lambda arm: 1e6 / series(run, "tokens_per_s", phase="speed", arm=arm)[1][:, -1].max()       # microseconds
    # which step size dynamic evaluation takes is decided on the test passages themselves, in its favour, for each claim anew
    rival = lambda merit, among=(FAST, ALL): max((k for k in sweep if sweep[k][0] in among), key=lambda k: merit(get(k)).mean())
    after = lambda c: lambda y: -y[:, contexts.index(c)]
    fall = lambda y: y[:, 0] - y[:, -1]
    best = {kind: rival(after(context), (kind,)) for kind in (FAST, ALL)}
    curves = ["TTT", "sliding window", OFF, *best.values()]
    fig, axes = plt.subplots(1, 2, figsize=(14, 5), layout="constrained")
    for arm, style in zip(curves, ("o-", "o-", "o:", "o--", "s--")):
        band(axes[0], contexts, get(arm), arm, marker=style[0], ls=style[1:])
    axes[0].set(title=f"Loss on the same {target} tokens", xscale="log", ylabel="loss (nats per token)",
                xlabel=f"tokens before the first of them (before the last: {target - 1} more)")
    axes[0].set_xticks(contexts, contexts)
    axes[0].axvline(config.length, color="k", ls=":", lw=1, label="length in training")
    low, high = axes[0].get_ylim()
    axes[0].set_ylim(bottom=low - 0.45 * (high - low))      # room for the legend
    axes[0].legend(loc="lower left")
    for arm, kind, color in (("TTT", "TTT", "C0"), ("sliding window", "sliding window", "C1"), (best[FAST], FAST, "C3"), (best[ALL], ALL, "C4")):
        y = get(arm)[:, -1]
        axes[1].errorbar(cost(kind), y.mean(), y.std(ddof=1) if n > 1 else 0, fmt="o", color=color, capsize=4)
        axes[1].annotate(kind, (cost(kind), y.mean()), (0, -20 if kind == "TTT" else 10), textcoords="offset points", ha="center", color=color)
    axes[1].set(title=f"After {context:,} tokens: loss against cost", xlabel=f"{'CPU ' * (device == 'cpu')}time to read a token of one text (µs, fastest seed)",
                ylabel="loss (nats per token)", xscale="log")
    axes[1].margins(0.35, 0.15)
    costs = sorted(map(cost, ("TTT", "sliding window", ALL)))
    axes[1].set_xticks(costs, [f"{c:.0f}" for c in costs])
    for ax in axes:
        ax.minorticks_off()
    print(f"\n{'loss (nats per token)':<50}" + "".join(f"{f'after {c:,}':>14}" for c in contexts) + "   us per token")
    for arm in curves:
        kind = sweep.get(arm, (arm,))[0]
        print(f"{arm:<50}" + "".join(f"{v:14.3f}" for v in get(arm).mean(0)) + (f"{cost(kind):15.0f}" if kind in ("TTT", "sliding window", FAST, ALL) else ""))
    strongest = rival(after(context))
    ahead = get(strongest)[:, -1] - get("TTT")[:, -1]                                                   # (seeds,): of TTT
    verdict = "level with" if ahead.min() < 0 < ahead.max() else "ahead of" if ahead.mean() > 0 else "behind"
    text = Path(config.data).name if config.data else "source code"
    fig.suptitle(f"After {context:,} tokens of {text}, seen through {config.window}, test-time training ({get('TTT')[:, -1].mean():.3f} nats) is {verdict} "
                 f"{sweep[strongest][0]} ({get(strongest)[:, -1].mean():.3f}), at {cost('TTT') / cost(sweep[strongest][0]):.1g} of its time ({n} seed{'s' * (n > 1)})")

    def over_dynamic(id, what, merit, by=None):
        name = rival(by or merit)       # a fall alone would choose the step that ruins the start
        gap = merit(get("TTT")) - merit(get(name))
        return claim(id, f"dynamic evaluation minus TTT: {what}, worst seed", SOURCE, "-", gap.min(), ">", 0, n,
                     f" ({gap.mean():.3g}{f' ± {gap.std(ddof=1):.2g}' if n > 1 else ''}; {name.removeprefix('dynamic evaluation, ')})")

    trained = max(c for c in contexts if c <= max(config.length, contexts[0]))
    deep = lambda c: f"{c:,} to {c + target - 1:,} tokens deep"
    return fig, [
        claim("ttt", f"TTT: loss {deep(contexts[0])} minus {deep(context)}, worst seed", SOURCE, "falls", fall(get("TTT")).min(), ">", 0, n),
        over_dynamic("over dynamic, trained length", f"loss {deep(trained)}", after(trained)),
        over_dynamic("over dynamic, longest", f"loss {deep(context)}", after(context)),
        over_dynamic("over dynamic, fall", "how much less its loss falls between the first claim's depths", fall, by=after(context))]


def allocated(device):
    """Bytes in use, as the allocator counts them: torch's on a GPU, glibc's on a CPU. None where neither can be asked."""
    if device == "cuda":
        return torch.cuda.memory_allocated()
    if device == "mps":
        return torch.mps.current_allocated_memory()

    class Counts(ctypes.Structure):
        names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
        _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

    try:
        ask = ctypes.CDLL(None).mallinfo2
    except (AttributeError, OSError, TypeError):
        return None
    ask.restype = Counts
    counts = ask()
    return counts.uordblks + counts.hblkhd


def decode(model, context, eta, config, device, seed, chunks=5):
    """Read `context` random tokens, then write chunks one token at a time -> microseconds per token of each, and the bytes that the reader
    kept in between, as the allocator has it: those that are free when the reader is gone.

    Every chunk has one inner step in it. The first warms up, of the others the median counts.
    """
    ids = torch.randint(V, (1, context + chunks * config.chunk), generator=torch.Generator().manual_seed(seed)).to(device)
    reader, seconds = Reader(model, 1, eta, config.chunk, ids.shape[1]), []
    for parts in ([ids[:, :context].split(config.chunk, 1)] + [part.split(1, 1) for part in ids[:, context:].split(config.chunk, 1)]):
        started = clock(device)
        for part in parts:
            logits = reader.feed(part)
        logits.sum().item()         # waits for a GPU
        seconds.append(clock(device) - started)
    logits, kept = None, allocated(device)
    del reader
    kept = None if kept is None else kept - allocated(device)
    return {"read_us_per_token": 1e6 * seconds[0] / context, "us_per_token": 1e6 * np.median(seconds[2:]).item() / config.chunk, "bytes": kept}


def figure_cost(config, run, device):
    contexts = [config.context // k for k in (16, 8, 4, 2, 1)]
    models = {"TTT": (build(config, V), config.eta), "sliding window": (build(config, V), 0), "full attention, every layer": (build(config, V, window=False), 0)}
    for model, _ in models.values():
        model.to(device)
    for model, eta in models.values():
        decode(model, contexts[0], eta, config, device, 0)                          # the first call of everything
    for seed in tqdm(seeds_of(config), "round"):
        for context in contexts:
            for arm, (model, eta) in models.items():
                run.log_once(lambda: decode(model, context, eta, config, device, seed), phase="cost", arm=arm, seed=seed, step=context)
    get = lambda arm, key: series(run, key, phase="cost", arm=arm)[1]                                                   # (seeds, contexts)
    fig, axes = plt.subplots(1, 3, figsize=(16, 5), layout="constrained")
    measured = get("TTT", "bytes").size > 0         # not on every system
    for arm, style in zip(models, ("o-", "s--", "o-")):
        slope = np.polyfit(np.array(contexts) / 1000, np.median(get(arm, "us_per_token"), 0), 1)[0]
        panels = [(axes[0], get(arm, "us_per_token") / 1000, f"{arm}: {slope:+.0f} µs per 1,000 tokens"),
                  (axes[1], get(arm, "read_us_per_token") / 1000, arm)]
        for ax, y, label in panels + [(axes[2], get(arm, "bytes") / 2 ** 20, arm)] * measured:
            line, = ax.plot(contexts, np.median(y, 0), style, label=label)
            ax.fill_between(contexts, y.min(0), y.max(0), color=line.get_color(), alpha=0.15, lw=0)
    unit = f"{'CPU ' * (device == 'cpu')}time per token (ms)"
    axes[0].set(title=f"Writing the next token (median and range of {config.seeds} rounds)", ylabel=unit, ylim=(0, None))
    axes[1].set(title=f"Reading, {config.chunk} tokens at a time", ylabel=unit, ylim=(0, None))
    axes[2].set(title="What is kept between two tokens" if measured else "No allocator here that could be asked",
                ylabel="allocated, beside the weights (MiB)", yscale="log")
    for ax in axes:
        ax.set(xlabel="length of the context (tokens)", xscale="log")
        ax.set_xticks(contexts, contexts)
        ax.minorticks_off()
        if ax.lines:
            ax.legend()
    ratio = lambda arm, key: get(arm, key)[:, -1] / get(arm, key)[:, 0]                                                 # (rounds,)
    full = "full attention, every layer"
    fig.suptitle(f"From {contexts[0]:,} to {contexts[-1]:,} tokens of context: a token takes {np.median(ratio('TTT', 'us_per_token')):.2f} times the time with test-time training, "
                 f"{np.median(ratio(full, 'us_per_token')):.1f} times with full attention")
    name, n = f"{contexts[-1]:,} over {contexts[0]:,} tokens of context", config.seeds
    return fig, [
        claim("time", f"TTT, time per token: {name}", SOURCE, "constant", ratio("TTT", "us_per_token"), "<=", 1.15, n),
        claim("memory", f"TTT, memory (allocated): {name}", SOURCE, "constant", ratio("TTT", "bytes") if measured else math.nan, "<=", 1.15, n),
        claim("full time", f"full attention, time per token: {name}", SOURCE, "grows", ratio(full, "us_per_token"), ">=", 1.5, n)]


def size(config, vocab):
    """The number of parameters of an arm, from the shapes of one layer and of two."""
    def count(n_layer):
        with torch.device("meta"):
            return sum(p.numel() for p in build(dataclasses.replace(config, n_layer=n_layer), vocab).parameters())

    return count(1) + (config.n_layer - 1) * (count(2) - count(1))


def least_memory(config, vocab, parameters):
    """Bytes that a figure cannot do without: it may take more."""
    if config.figure == "cost":             # weights, and the cache of the arm that keeps everything
        tokens = max(config.context + 5 * config.chunk, 2 * (config.window + config.chunk))
        return 4 * parameters + 8 * config.n_layer * config.n_embd * tokens
    tokens = config.batch * config.length
    states = config.n_layer * config.n_embd + vocab + 2 * config.n_embd * config.n_fast // config.chunk
    test = config.eval_docs * (config.length if config.figure == "memory" else config.context)
    return 16 * parameters + 4 * tokens * states + 8 * test         # weights, gradient, two moments; one number of each state; token ids


def main():
    config = parse_args(Config, __doc__)
    for name, value in SIZES[config.figure].items():
        if getattr(config, name) is None:
            setattr(config, name, value)
    if config.figure != "cost" and (config.length % 16 or config.length % config.chunk):
        raise UserError(f"--length {config.length} must be a multiple of 16 and of --chunk {config.chunk}")
    device = pick_device(config.device)
    vocab = config.vocab_size if config.figure == "context" else V
    parameters = size(config, vocab)        # an impossible shape ends here, before anything is written
    need_memory(least_memory(config, vocab, parameters), f"{parameters:,} parameters, and the least that their figure keeps beside them", device)
    data = texts(config) if config.figure == "context" else ()
    digest = hashlib.sha256(b"".join(ids.numpy().tobytes() for part in data for ids in part)).hexdigest()
    with Run(config, inputs={"the text that --data names": digest}) as run:
        run.introduce(device, parameters)
        fig, claims = globals()[f"figure_{config.figure}"](config, run, device, *data)
        run.finish(fig, claims)


if __name__ == "__main__":
    command(main)
