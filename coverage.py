"""coverage.py: the coverage principle (Chen et al., arXiv 2510.15020). Why the checkpoint with the best loss is not the one to sample from.

    python coverage.py                        `principle`: cross-entropy falls all the time, Pass@N in the end, too; 4 minutes on two cores
    python coverage.py --figure horizon       KL grows with the length of the answers, coverage does not, up to a point
    python coverage.py --figure optimizers    the linear model: SGD needs a step size for each length, others take one for all

The coverage profile of a model p of data D is the tail of the log density ratio whose mean is the KL divergence:

    Cov_N = Pr[ D(y|x) / p(y|x) >= N ]        KL = E[ log D(y|x) / p(y|x) ]        (x, y) from D; lower is better

Best-of-N needs an answer to keep a probability of about 1/N, no more: it fails where Cov_N is large, whatever the KL (Prop. D.6, D.7).

The task of `principle`: a path through a layered graph, given as a list of edges. In two of three layers the path may go either way:

    prompt    23 18  2 18  19 2  19 23  19 11  7 5  14 19  14 10  7 19  14 5  7 10  9 14  9 13  9 7  / 9 18 =         from 9 to 18
    answer    7 19 23 18        edges of the last layer come first; 14 leads to 19, too, and 2 to 18; 5, 10, 11 and 13 lead nowhere

The data go by the even or odd nodes of a layer in nine of ten graphs, by the others in the tenth; which it is, a parity over half of the ids
tells, and nobody learns that. Cross-entropy ends at .9 and .1, or further apart: the rarer path falls below 1/N. The base, which
was trained on all four paths, samples it. So fine-tuning first mends the coverage (mixed paths vanish), then breaks it.

How this differs from the paper:
1. A model of 0.2 million parameters; graphs of 3 layers of 3 nodes (2 forks) with ids below 24. The paper: 11 million, 8 layers of 4 nodes.
   New graphs at every step in pre-training, too; fine-tuning of 700 steps at 4e-5 instead of 50,000 at 5e-6.
2. The paper draws no curve of DCO (arXiv 2502.07154), the loss -log(1 - (1 - p)^N), which stops pushing answers that are likely already.
3. `horizon` is a table learnt by counting; the paper trains on graphs of growing depth.
4. The paper's sections on optimisers are theory without experiments. `optimizers` is ours, on the construction of the lower bound's proof, with
   step sizes found by trial (normalised SGD with batches of one; TTT and distillation with longer steps than the theorems').

What to see: KL falls all the time, Pass@8 rises and then falls below its start; the tournament (checkpoints judged by their mutual
coverage) picks a checkpoint near the top, the best validation loss one at the bottom. Here the data's answer is the only right one, so that
Pass@8 of the validation answers could choose as well; the tournament does not need that.
"""
import copy
import math
import random
from dataclasses import dataclass

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch

from engine import generate
from experiment import NotFinite, Run, band, claim, command, descend, flag, need_memory, parse_args, pick_device, seeds_of, series
from kernels import token_logprobs
from model import GPT, GPTConfig

FIGURES = {"principle": "fine-tuning on the graph task: KL, coverage, Pass@N, the tournament, DCO (within 5 minutes)",
           "horizon": "a table learnt by counting; a coin (seconds)",
           "optimizers": "SGD, normalised SGD, distillation and test-time training on two prompts (about 1 minute)"}
SOURCE = "Chen et al., arXiv 2510.15020"


@dataclass
class Config:
    seed: int = flag(0, "random seed; with --seeds K: the first of K", low=0, high=2 ** 32 - 1)
    seeds: int = flag(None, "repeat over this many seeds (default: 1 for principle, 5 for horizon, 50 for optimizers)", low=1)
    device: str = flag("auto", "where to run", choices=("auto", "cpu", "cuda", "mps"))
    dtype: str = flag("float32", "bfloat16: autocast training", choices=("float32", "bfloat16"))
    out: str = flag("out/coverage", "folder for figure, metrics, claims and checkpoint")
    resume: bool = flag(False, "go on from the checkpoint in --out")
    quick: bool = flag(False, "a run of a few seconds that shows nothing but that it runs")
    figure: str = flag("principle", "which figure: " + "; ".join(f"{k}: {v}" for k, v in FIGURES.items()), choices=tuple(FIGURES))
    steps: int = flag(None, "steps (default: 700 of fine-tuning; optimizers: 800 sequences of the linear model, of which TTT takes 300 at most)", quick=4, low=2)
    lr: float = flag(4e-5, "learning rate of fine-tuning (AdamW, constant)", low=0)
    batch: int = flag(64, "graphs per step", quick=8, low=1)
    dco: int = flag(8, "N of the DCO loss (there are half a million answers)", low=1, high=10 ** 6)
    n_layer: int = flag(3, "layers", low=1)
    n_head: int = flag(4, "heads", low=1)
    n_embd: int = flag(64, "channels", quick=32, low=8)
    sft_steps: int = flag(2200, "steps of pre-training", quick=10, low=1)
    sft_lr: float = flag(4e-3, "learning rate of pre-training (up in 50 steps, then linear to 0)", low=0)
    eval_every: int = flag(20, "steps of fine-tuning between checkpoints", quick=2, low=1)
    eval_prompts: int = flag(512, "graphs of each class to evaluate on", quick=16, low=8)

    def idle(self):
        if self.figure == "principle":
            return {}
        network = ("dtype", "lr", "batch", "dco", "n_layer", "n_head", "n_embd", "sft_steps", "sft_lr", "eval_every", "eval_prompts")
        idle = {name: f"figure {self.figure} trains no network" for name in network}
        if self.device not in ("auto", "cpu"):
            idle["device"] = f"figure {self.figure} is computed on the CPU"
        if self.figure == "horizon":
            idle["steps"] = "a table is learnt by counting"
        return idle

    @property
    def name(self):
        return self.figure


# ---------------------------------------------------------------------------------------------------------------------------
# Coverage, and what it says about best-of-N

def missed(log_ratio, N):
    """Whether D / p >= N, from the log ratios. A ratio that is no number counts as missed: it is never the best of anything."""
    return ~(np.asarray(log_ratio) < math.log(N) - 1e-12)


def coverage(log_ratio, N, weights=None):
    """Cov_N from log D(y|x) - log p(y|x) (..., n) of draws of D (float64) -> (...). weights (n,): of the draws, if not alike."""
    return np.average(missed(log_ratio, N), axis=-1, weights=weights)


def kl_bound(kl, N):
    """Prop. 3.1: Cov_N is at most this, for N > 1. kl in nats, a number or an array."""
    return kl / (math.log(N) - 1 + 1 / N)


def pass_at(logp, N):
    """Pass@N = E[1 - (1 - p)^N] of the one right answer's exact log-probability (..., n) -> (..., n); average it."""
    return -np.expm1(N * np.log1p(-np.minimum(np.exp(logp), 1 - 1e-12)))


def best_of_n(p, reward, N):
    """p, reward (outcomes,) -> the expected reward of the best of N draws of p, exactly: sort by reward, P(best <= r) = P(one <= r)^N."""
    order = np.argsort(reward)
    below = np.minimum(np.cumsum(p[order]), 1.0) ** N
    return float(reward[order] @ np.diff(below, prepend=0.0))


def best_of_n_loss(coverage_of, N):
    """Prop. D.6: the best of N loses at most Cov_M + eps to a comparator, for N >= 2 M log(1 / eps) and Cov_M <= 1/2; the best M.

    coverage_of: M -> Cov_M. Rewards are within [0, 1], so that 1 is a bound, too.
    """
    return min([1.0] + [coverage_of(M) + math.exp(-N / (2 * M)) for M in np.geomspace(1, N, 40) if coverage_of(M) <= 0.5])


def hard_reward(D, p, N):
    """Prop. D.7: a reward of 0 and 1, at which the best of N loses at least half of Cov_2N: paid where D is 2N times as likely as p."""
    return (D >= 2 * N * p).astype(float)


def sound(logp):
    """Which checkpoints (C,) have log-probabilities (C, n) that are all numbers (-inf, a probability of 0, is one)."""
    return (logp < np.inf).all(-1)


def worst_rival(score, fit):
    """score (C, C) of each checkpoint against each rival, fit (C,) -> (C,): the largest. What is not fit scores inf and is nobody's rival."""
    return np.where(fit, score[:, fit].max(1, initial=-np.inf), np.inf)


def beaten(own, rivals, N):
    """Pr[rival / own >= N] from log-probabilities own (n,), rivals (C, n) -> (C,). Where both give 0 own is beaten, too."""
    with np.errstate(invalid="ignore"):
        return coverage(rivals - own, N)


def tournament(logp, N):
    """Checkpoints' log-probabilities of validation answers (C, n) -> score (C,), lower is better: max over rivals of Pr[rival / own >= N] (Eq. 29).

    For Pass@K take N of about K / 2. Where N is too large, many score 0.
    """
    return worst_rival(np.array([beaten(each, logp, N) for each in logp]), sound(logp))


def offset_tournament(logp, own, N, a=0.0):
    """The same minus 2 N^a Pr[rival / own >= N] over the checkpoint's own answers, own (C, C, n): own[i, j] is j's log-probability of i's (Eq. 32).

    Its theorem asks for N^(1 - 2a) >= 8; we use it with N = 4 and a = 0 all the same.
    """
    scores = [beaten(each, logp, N) - 2 * N ** a * beaten(theirs[i], theirs, N) for i, (each, theirs) in enumerate(zip(logp, own))]
    return worst_rival(np.array(scores), sound(logp) & sound(own).all(0))


def best(score, logp):
    """The checkpoint (an index) with the lowest score (C,), of equals the one with the better loss; logp (C, n).

    NotFinite if there is none whose score and log-probabilities are numbers.
    """
    fit = np.flatnonzero(sound(logp) & ~np.isnan(score))
    if not len(fit):
        raise NotFinite("no checkpoint has a score that is a number")
    return int(min(fit, key=lambda i: (score[i], -logp[i].mean())))


def dco_loss(logp, N):
    """-log(1 - (1 - p)^N) of each answer, p = exp(logp). Its gradient is cross-entropy's times N p (1 - p)^(N-1) / (1 - (1 - p)^N).

    An answer below 1e-8 has no gradient.
    """
    p = logp.exp().clamp(1e-8, 1 - 1e-6)
    return -torch.log(-torch.expm1(N * torch.log1p(-p)))


def ranks(x):
    """x (n,), numbers -> (n,): 1 for the smallest; equals share the mean of their ranks."""
    return (x[:, None] > x).sum(1) + ((x[:, None] == x).sum(1) + 1) / 2


def spearman(x, y):
    """The correlation of the ranks; 0 if one of the two never changes, nan if one holds what is no number."""
    if np.isnan(x).any() or np.isnan(y).any():
        return math.nan
    return float(np.corrcoef(ranks(x), ranks(y))[0, 1]) if np.ptp(x) and np.ptp(y) else 0.0


# ---------------------------------------------------------------------------------------------------------------------------
# The task: a path through a layered graph

IDS, LAYERS, EDGES = 24, 3, 16
PAD, SLASH, EQUALS = IDS, IDS + 1, IDS + 2
VOCAB, PROMPT, ANSWER = IDS + 3, 2 * EDGES + 4, LAYERS + 1
SECRET = np.random.default_rng(2510).permutation(IDS) < IDS // 2        # half of the ids; their parity in a graph tells its class


def graphs(rng, classes):
    """A graph of each class (B,), 0, 1 or 2 (G1, G2, G3) -> ids (B, PROMPT + ANSWER), the answer last. rng: numpy.

    Every layer has an even node, an odd node and another one. Two layers are forks: their even and odd node lead on. In the third
    one node does. At a fork of layer i (from 1) G1 takes the node of i's parity, G2 the other one, G3 either.
    """
    B, rows = len(classes), np.arange(len(classes))
    key = rng.random((B, IDS))
    evens, odds = 2 * key[:, ::2].argsort(1)[:, :LAYERS], 2 * key[:, 1::2].argsort(1)[:, :LAYERS] + 1
    np.put_along_axis(key, np.concatenate([evens, odds], 1), 2.0, 1)                                 # used: last in the order of the rest
    rest = key.argsort(1)[:, :IDS - 2 * LAYERS]
    t, nodes = rest[:, 0], np.stack([evens, odds, rest[:, 1:1 + LAYERS]], 2)                           # (B, LAYERS, 3)
    others = SECRET[nodes].sum((1, 2)) + SECRET[t]
    bit = np.where(classes == 2, rng.integers(2, size=B), classes == 0)
    fits = SECRET[rest[:, 1 + LAYERS:]] == ((others + bit) % 2 == 1)[:, None]
    s = rest[rows, 1 + LAYERS + fits.argmax(1)]                                                      # the start makes the parity right
    single = rng.integers(LAYERS, size=B)
    passable = np.zeros((B, LAYERS, 3), bool)
    passable[:, :, :2] = True
    passable[rows, single] = False
    passable[rows, single, rng.integers(3, size=B)] = True
    # the path: slot 0 is even, slot 1 odd
    parity = (np.arange(1, LAYERS + 1) % 2)[None] ^ np.where(classes[:, None] == 2, rng.integers(2, size=(B, LAYERS)), classes[:, None])
    path = np.take_along_axis(nodes, np.where(passable.sum(2) == 2, parity, passable.argmax(2))[..., None], 2)[..., 0]
    # edges: a passable node leads to every node of the next layer; listed from the last layer back, shuffled within one
    parts = [(nodes[:, -1], t[:, None], passable[:, -1])]
    parts += [(nodes[:, i], nodes[:, i + 1], passable[:, i]) for i in reversed(range(LAYERS - 1))]
    parts += [(s[:, None], nodes[:, 0], np.ones((B, 1), bool))]
    edges, order = [], []
    for i, (sources, targets, leads) in enumerate(parts):
        shape = (B, sources.shape[1], targets.shape[1])
        edges.append(np.stack(np.broadcast_arrays(sources[:, :, None], targets[:, None]), -1).reshape(B, -1, 2))
        order.append(np.where(np.broadcast_to(leads[:, :, None], shape).reshape(B, -1), i + rng.random((B, shape[1] * shape[2])), -1.0))
    edges, order = np.concatenate(edges, 1), np.concatenate(order, 1)
    pick = order.argsort(1)[:, -EDGES:]
    edges = np.where((np.take_along_axis(order, pick, 1) >= 0)[..., None], np.take_along_axis(edges, pick[..., None], 1), PAD)
    column = lambda x: np.broadcast_to(x, B)[:, None]
    return np.concatenate([edges.reshape(B, -1), column(SLASH), column(s), column(t), column(EQUALS), path, column(t)], 1)


def held_out(seed, n):
    """Graphs to evaluate on: n of G1 and n of G2, and the weight of each (2n,): nine tenths on G1. (The chance of drawing one in training is nil.)"""
    classes = np.repeat([0, 1], n)
    return graphs(np.random.default_rng([seed, 1]), classes), np.where(classes == 0, 0.9, 0.1) / n


# ---------------------------------------------------------------------------------------------------------------------------
# Training

def build(config, device):
    return GPT(GPTConfig(VOCAB, PROMPT + ANSWER, config.n_layer, config.n_head, config.n_embd, n_hidden=4 * config.n_embd, qk_norm=True, tie=False)).to(device)


def score(model, ids):
    """The answers' log-probabilities (R,) of ids (R, PROMPT + ANSWER)."""
    return token_logprobs(model.hidden(ids[:, :-1])[:, -ANSWER:], model.lm_head.weight, ids[:, -ANSWER:])[0].sum(1)


@torch.no_grad()
def score_all(model, ids):
    """The same without gradients, as float64 numpy. NotFinite if one of them is no number."""
    device = model.lm_head.weight.device
    logp = np.concatenate([score(model, part.to(device)).cpu().double().numpy() for part in torch.as_tensor(ids).split(256)])
    if np.isnan(logp).any():
        raise NotFinite("an answer's log-probability is nan")
    return logp


def train(config, run, phase, seed, model, mixture, steps, lr, loss=None, decay=False, at=None, kept=None):
    """`steps` steps on graphs whose classes come from `mixture` (3,) -> a trained copy of the model. loss: of log-probabilities (R,), default -log p.

    decay: the learning rate goes up in 50 steps, then linearly to 0; else it is constant. at(step, model) is called at the start and
    after each step; what it puts into `kept` is saved with the rest. NotFinite for a loss, a gradient or a weight that is no number.
    """
    rng, model = random.Random(f"{seed} {mixture}"), copy.deepcopy(model)       # the same graphs for every loss
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    if at and phase not in run.state:
        at(0, model)
    for step in run.loop(phase, steps, model, optimizer, rng, kept=kept):
        if decay:
            for g in optimizer.param_groups:
                g["lr"] = lr * min((step + 1) / 50, 1 - step / steps)
        step_rng = np.random.default_rng(rng.getrandbits(64))
        ids = torch.as_tensor(graphs(step_rng, step_rng.choice(3, config.batch, p=mixture)), device=model.lm_head.weight.device)
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
            logp = score(model, ids)
        value = (-logp if loss is None else loss(logp)).mean()
        optimizer.zero_grad()
        value.backward()
        descend(optimizer, value)
        if step % 50 == 0 or step + 1 == steps:
            run.bar.set_postfix_str(f"loss {value.item():.3f}")
        if at:
            at(step + 1, model)
        elif step % 50 == 0 or step + 1 == steps:
            run.log(phase="pretrain", seed=seed, step=step, loss=value.item())
    return model


NS = (2, 3, 4, 6, 8)                                        # of Cov_N
TRIES = (1, 4, 8, 12, 16)                                   # of Pass@N


def fine_tune(config, run, arm, seed, base, loss=None):
    """From the base on .9 G1 + .1 G2. Logs KL, coverage and Pass@N of every checkpoint.

    -> the model; each checkpoint's log-probabilities of the validation answers {step: (n,)}; the weights of every fourth {step: state}.
    """
    phase = f"{arm} {seed}"
    kept = dict(valid={}, weights={})
    test, weights = held_out(seed, config.eval_prompts)
    validation = graphs(np.random.default_rng([seed, 2]), np.random.default_rng([seed, 3]).choice(2, 2 * config.eval_prompts, p=(0.9, 0.1)))

    def at(step, model):
        if step % config.eval_every and step != config.steps:
            return
        logp = score_all(model, test)
        run.log(phase="finetune", arm=arm, seed=seed, step=step, kl=-logp @ weights,
                **{f"cov@{N}": coverage(-logp, N, weights) for N in NS}, **{f"pass@{N}": pass_at(logp, N) @ weights for N in TRIES})
        if loss is None:                                # DCO's checkpoints do not compete
            kept["valid"][step] = torch.from_numpy(score_all(model, validation))
        if loss is None and step % (4 * config.eval_every) == 0:
            kept["weights"][step] = {k: v.clone() for k, v in model.state_dict().items()}
    model = train(config, run, phase, seed, base, (0.9, 0.1, 0.0), config.steps, config.lr, loss, at=at, kept=kept)
    return model, kept["valid"], kept["weights"]


def select(config, model, valid, weights, seed, N=4):
    """The steps of the checkpoints that best validation loss, validation Pass@8, the tournament and, of those with weights, the offset tournament choose.

    Validation Pass@8 takes the answer given for the only right one, as it is here. For the offset tournament each checkpoint answers other
    validation prompts, and all of them score all answers.
    """
    steps, logp = list(valid), torch.stack(list(valid.values())).numpy()
    ids = graphs(np.random.default_rng([seed, 5]), np.random.default_rng([seed, 6]).choice(2, config.eval_prompts, p=(0.9, 0.1)))
    models, own = [copy.deepcopy(model) for _ in weights], []
    for m, state in zip(models, weights.values()):
        m.load_state_dict(state)
    for m in models:
        answers = generate(m, [row[:PROMPT].tolist() for row in ids], 1, ANSWER, generator=torch.Generator().manual_seed(seed)).ids.cpu().numpy()
        own.append([score_all(rival, answers) for rival in models])
    own_prompts = np.array([score_all(m, ids) for m in models])
    return {"best validation loss": steps[best(-logp.mean(1), logp)], "validation Pass@8": steps[best(-pass_at(logp, 8).mean(1), logp)], "tournament": steps[best(tournament(logp, N), logp)],
            "offset": list(weights)[best(offset_tournament(own_prompts, np.array(own), N), own_prompts)]}


def sampled_pass(model, seed, N):
    """On 256 held-out graphs, a tenth of G2: Pass@k for k = 1 to N, unbiased (N,), and the exact log-probabilities (256,)."""
    classes = np.repeat([0, 1], (230, 26))
    ids = graphs(np.random.default_rng([seed, 4]), classes)
    rollout = generate(model, [row[:PROMPT].tolist() for row in ids], N, ANSWER, generator=torch.Generator().manual_seed(seed))
    answers = np.array(rollout.tokens()).reshape(len(ids), N, ANSWER)
    right = (answers == ids[:, None, PROMPT:]).all(2)
    unbiased = [np.mean([1 - math.comb(N - c, k) / math.comb(N, k) for c in right.sum(1).tolist()]) for k in range(1, N + 1)]
    return np.array(unbiased), score_all(model, ids)


# ---------------------------------------------------------------------------------------------------------------------------
# Coverage generalises sooner than cross-entropy: a table, a coin

def table(H, n, seed, prompts=1000, V=4, a=0.01):
    """1,000 prompts of Zipf frequencies, each with one answer of H tokens, learnt by counting n draws with a little smoothing -> KL, Cov_16.

    The smoothing costs a prompt that was drawn once a factor of 1.03 a token: from 95 tokens on these are lost to Cov_16, too (those drawn twice: from 187 on).
    """
    p = 1 / np.arange(1, prompts + 1)
    p /= p.sum()
    count = np.random.default_rng([seed, n, H]).multinomial(n, p)
    log_ratio = H * np.log((count + V * a) / (count + a))
    return p @ log_ratio, coverage(log_ratio, 16, p)


def coin(n, seed, p=0.01, runs=20_000):
    """Maximum likelihood of a coin from n throws -> how often its KL is infinite, and the mean of Cov_2."""
    q = np.random.default_rng([seed, n]).binomial(n, p, runs) / n
    cov = p * (p >= 2 * q) + (1 - p) * (1 - p >= 2 * (1 - q))
    return ((q == 0) | (q == 1)).mean(), cov.mean()


# ---------------------------------------------------------------------------------------------------------------------------
# Optimisers: an autoregressive linear model and two prompts (the proof of the lower bound for SGD)

LOUD, B_LOUD, B_QUIET = 0.98, 35.0, 14.0
#  features (prompt, token, dim) of tokens -1, 0, 1: the loud prompt has two dimensions, the quiet one the third
FEATURES = np.zeros((2, 3, 3))
FEATURES[0, :, :2] = B_LOUD * np.array([(0.6, -0.8), (1.0, 0.0), (0.6, 0.8)])
FEATURES[1, :, 2] = B_QUIET * np.array([-1, 0, 1])
TRUTH, START = np.array([1.0, 0.0, 1.0]), np.array([0.6, 0.8, 0.0])


def log_probs(theta, prompt):
    """log pi_theta(token | prompt), alike at every position: theta (..., 3), prompt (...) -> (..., 3)."""
    logits = (FEATURES[prompt] @ theta[..., None])[..., 0]
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def project(theta):
    """theta (..., 3) with its first two dimensions moved onto the unit ball, its third onto [-1, 1]."""
    theta = theta.copy()
    theta[..., :2] /= np.maximum(1, np.linalg.norm(theta[..., :2], axis=-1, keepdims=True))
    theta[..., 2] = theta[..., 2].clip(-1, 1)
    return theta


def gradient(theta, prompt, counts):
    """Of the log-likelihood of sequences that hold each token `counts` (..., 3) times, in theta (..., 3); prompt (...) -> (..., 3)."""
    expected = np.exp(log_probs(theta, prompt)) * counts.sum(-1, keepdims=True)
    return ((counts - expected)[..., None] * FEATURES[prompt]).sum(-2)


def draw(rng, H, shape):
    """Sequences of H tokens of the truth -> prompt (shape), counts of each token (*shape, 3)."""
    prompt = (rng.random(shape) >= LOUD).astype(int)
    return prompt, rng.multinomial(H, np.exp(log_probs(np.broadcast_to(TRUTH, (*shape, 3)), prompt)))


def exact_coverage(theta, H, N, most=3):
    """Cov_N (...) of theta (..., 3) on answers of H tokens, exactly but for sequences with more than `most` unlikely tokens of either kind."""
    total = 0.0
    for prompt, share in ((0, LOUD), (1, 1 - LOUD)):
        truth, own = log_probs(TRUTH, prompt), log_probs(theta, np.full(theta.shape[:-1], prompt))
        likely = int(truth.argmax())
        u, v = (i for i in range(3) if i != likely)
        for i in range(min(most, H) + 1):
            for j in range(min(most, H - i) + 1):
                log_choose = math.lgamma(H + 1) - math.lgamma(i + 1) - math.lgamma(j + 1) - math.lgamma(H - i - j + 1)
                counts = np.zeros(3)
                counts[[u, v, likely]] = i, j, H - i - j
                total = total + share * math.exp(log_choose + counts @ truth) * missed((truth - own) @ counts, N)
    return total


def truncated_weights(e, A):
    """Weights alpha_h (..., H) of tokens with divergences e_h: 1 while their running sum is at most A, a fraction where it crosses, then 0.

    sum alpha e = min(A, sum e): the truncated distillation gradient (Section 5).
    """
    before = np.cumsum(e, -1) - e
    return np.clip((A - before) / np.maximum(e, 1e-300), 0, 1)


def linear(kind, eta, H, steps, seeds, seed=0, N=16):
    """One pass of `steps` sequences, `seeds` times -> the mean of Cov_N over the second half of the iterates (seeds,).

    All passes are columns of one random stream: independent, but none of them can be made alone.
    sgd: eta times the gradient. normalised: eta * g / (1 + |g|). distilled: the truth's probabilities are known, tokens are truncated at log N.
    """
    rng, theta, total = np.random.default_rng(seed), np.tile(START, (seeds, 1)), 0.0
    for step in range(steps):
        prompt, counts = draw(rng, H, (seeds,))
        if kind == "distilled":         # tokens are independent: the weights of the first ones, in expectation over the order, scale the counts
            truth = log_probs(np.broadcast_to(TRUTH, theta.shape), prompt)
            e = (np.exp(truth) * (truth - log_probs(theta, prompt))).sum(-1, keepdims=True)
            counts = counts * truncated_weights(np.broadcast_to(e, (seeds, H)), math.log(N)).mean(-1, keepdims=True)
        g = gradient(theta, prompt, counts)
        if kind == "normalised":
            g = g / (1 + np.linalg.norm(g, axis=-1, keepdims=True))
        theta = project(theta + eta * g)
        if step >= steps // 2:
            total = total + exact_coverage(theta, H, N)
    return total / (steps - steps // 2)


def token_step(theta, prompt, token, eta):
    """theta (..., 3), prompt and token (...) -> log pi_theta(token) (...), and theta after one projected step on it."""
    counts = np.eye(3)[token]
    return (log_probs(theta, prompt) * counts).sum(-1), project(theta + eta * gradient(theta, prompt, counts))


def teacher_forced(theta, prompt, tokens, eta):
    """The log-likelihood (...) of tokens (..., H) under test-time training: each is scored, then stepped on. The caller's theta stays."""
    total = 0.0
    for h in range(tokens.shape[-1]):
        logp, theta = token_step(theta, prompt, tokens[..., h], eta)
        total = total + logp
    return total


def ttt_coverage(eta, H, steps, seeds, seed=0, N=16, n=4, kept=8):
    """Token-level SGD, never reset, on `steps` sequences; decoding by `teacher_forced` with the same eta -> Cov_N (seeds,).

    Averaged over `kept` iterates of the second half and n sequences of each prompt (nearly all alike: the truth is all but deterministic).
    """
    rng, theta, iterates = np.random.default_rng(seed), np.tile(START, (seeds, 1)), []
    sample = lambda prompt, n: (rng.random((*np.shape(prompt), n, 1)) > np.exp(log_probs(TRUTH, prompt)).cumsum(-1)[..., None, :-1]).sum(-1)      # (..., n) tokens
    for step in range(steps):
        prompt = (rng.random(seeds) >= LOUD).astype(int)
        tokens = sample(prompt, H)
        for h in range(H):
            _, theta = token_step(theta, prompt, tokens[:, h], eta)
        if step >= steps // 2 and step % max(1, steps // 2 // kept) == 0:
            iterates.append(theta)
    theta, total = np.stack(iterates)[:, :, None], 0.0                             # (kept, seeds, 1, 3)
    for prompt, share in ((0, LOUD), (1, 1 - LOUD)):
        tokens = sample(np.full(n, prompt), H)
        shape = (*theta.shape[:2], n)
        own = teacher_forced(np.broadcast_to(theta, (*shape, 3)), np.full(shape, prompt), np.broadcast_to(tokens, (*shape, H)), eta)
        truth = log_probs(TRUTH, prompt)[tokens].sum(-1)
        total = total + share * missed(truth - own, N).mean((0, 2))
    return total


# ---------------------------------------------------------------------------------------------------------------------------
# Figures and claims

def change(y):
    """For a title: how a curve y (seeds, n) ends, in the mean over the seeds, beside its start."""
    first, last = y.mean(0)[[0, -1]]
    return f"{'falls' if last < first else 'rises' if last > first else 'stays'} from {first:.3f} to {last:.3f}"


def figure_principle(config, run, device):
    arms, n = {"cross-entropy": None, f"DCO, N = {config.dco}": lambda logp: dco_loss(logp, config.dco)}, config.seeds
    ce, dco = arms
    for seed in seeds_of(config):
        torch.manual_seed(seed)
        base = train(config, run, f"base {seed}", seed, build(config, device), (1 / 3, 1 / 3, 1 / 3), config.sft_steps, config.sft_lr, decay=True)
        for arm, loss in arms.items():
            model, valid, weights = fine_tune(config, run, arm, seed, base, loss)
            if arm == ce:
                run.log_once(lambda: select(config, model, valid, weights, seed), phase="picks", seed=seed, step=config.steps)
                run.log_once(lambda: best_of_n_check(model, seed), phase="sampled", seed=seed, step=config.steps)
    get = lambda key, arm=ce: series(run, key, phase="finetune", arm=arm)                            # steps, (seeds, checkpoints)
    steps, kl = get("kl")
    passes, covs = {N: get(f"pass@{N}")[1] for N in TRIES}, {N: get(f"cov@{N}")[1] for N in NS}
    picks = {rule: np.array([list(steps).index(r[rule]) for r in run.rows if r["phase"] == "picks" and r["step"] == config.steps])
             for rule in ("best validation loss", "tournament", "offset", "validation Pass@8")}
    at = lambda y, pick: y[np.arange(n), pick]
    correlation = lambda x: np.array([spearman(a, b) for a, b in zip(passes[16], x)])
    markers = dict(zip(picks, "oDs^"))

    fig, axes = plt.subplots(2, 3, figsize=(16, 9), layout="constrained")
    for arm in arms:
        band(axes[0, 0], *get("kl", arm), arm)
    axes[0, 0].set(title=f"The KL {change(kl)} nats (cross-entropy)", xlabel="step of fine-tuning", ylabel="KL of the data from the model (nats)", ylim=(0, None))
    for N in NS:
        band(axes[0, 1], steps, covs[N], f"N = {N}")
    axes[0, 1].set(title=f"Cov_4 {change(covs[4])}; at its best {covs[4].mean(0).min():.3f}", xlabel="step of fine-tuning", ylabel="Cov_N (lower is better)")
    for i, N in enumerate((8, 16)):
        for arm, style in zip(arms, ("-", "--")):
            band(axes[0, 2], *get(f"pass@{N}", arm), f"Pass@{N}, {arm}", ls=style, color=f"C{i}")
        for pick, index in picks.items():
            axes[0, 2].plot(steps[index], at(passes[N], index), markers[pick], color=f"C{i}", mec="k", label=pick if i == 0 else None)
    axes[0, 2].set(title=f"Pass@8 {change(passes[8])}; at its best {passes[8].mean(0).max():.3f}", xlabel="step of fine-tuning", ylabel="Pass@N, exact")
    for ax, x, label in ((axes[1, 0], kl, "KL (nats)"), (axes[1, 1], covs[8], "Cov_8")):
        for i in range(n):
            ax.scatter(x[i], passes[16][i], c=steps, cmap="viridis", s=18)
            for (pick, index), color in zip(picks.items(), ("C3", "C2", "C1", "C4")):
                ax.scatter(x[i, index[i]], passes[16][i, index[i]], marker=markers[pick], s=90, color=color, ec="k", label=pick if i == 0 else None)
        ax.set(title=f"Pass@16 against {label}: rank correlation {correlation(x).mean():+.2f}", xlabel=label, ylabel="Pass@16")
    sampled = [r for r in run.rows if r["phase"] == "sampled" and r["step"] == config.steps]
    for key, label in (("sampled", "best of N samples"), ("exact", "exact"), ("floor", "coverage promises at least (Prop. D.6)")):
        band(axes[1, 2], np.arange(1, len(sampled[0][key]) + 1), np.array([r[key] for r in sampled]), label)
    final = {key: np.mean([r[key][-1] for r in sampled]) for key in ("sampled", "floor")}
    axes[1, 2].set(title=f"Best of {len(sampled[0]['floor'])} at the end {final['sampled']:.3f}, promised {final['floor']:.3f}", xlabel="N (samples)", ylabel="success", xscale="log", ylim=(0, 1.02))
    for ax in axes.flat:
        ax.legend()
    axes[0, 2].legend(fontsize="x-small", loc="lower left")
    fig.colorbar(axes[1, 1].collections[0], ax=axes[1, 1], label="step of fine-tuning")
    best8, end8 = passes[8].max(1), passes[8][:, -1]
    chosen, lowest, known = (at(passes[8], picks[rule]) for rule in ("tournament", "best validation loss", "validation Pass@8"))
    fig.suptitle(f"Fine-tuning: the KL {change(kl)} nats, Pass@16 {change(passes[16])}; Pass@8 of the checkpoint with the best loss {lowest.mean():.3f}, "
                 f"of the tournament's {chosen.mean():.3f} ({n} seed{'s' if n > 1 else ''})")
    share = lambda x, y: np.divide(x, y, out=np.full(n, np.nan), where=y > 0)       # of nothing there is no share
    return fig, [
        claim("kl", "KL at the end over the start, worst seed", SOURCE, "falls", (kl[:, -1] / kl[:, 0]).max(), "<=", 0.6, n),
        claim("kl steady", "KL, largest rise between checkpoints, share of its fall", SOURCE, "monotone", share(np.diff(kl).max(1), kl[:, 0] - kl[:, -1]).max(), "<=", 0.04, n),
        claim("pass falls", "Pass@8, best minus last", SOURCE, "0.04", best8 - end8, ">=", 0.015, n),
        claim("pass@16 falls", "Pass@16, before fine-tuning minus after", SOURCE, "0.04", passes[16][:, 0] - passes[16][:, -1], ">=", 0.02, n),
        claim("by coverage", "rank correlation of Pass@16 with Cov_8", SOURCE, "strong", correlation(covs[8]), "<=", -0.7, n),
        claim("by kl", "rank correlation of Pass@16 with KL", SOURCE, "wrong sign", correlation(kl), ">=", 0.2, n),
        claim("tournament", "Pass@8, tournament minus best validation loss", SOURCE, "0.04", chosen - lowest, ">=", 0.015, n),
        claim("near best", "Pass@8 that the tournament loses, share of best loss's, worst seed", SOURCE, "at the top", share(best8 - chosen, best8 - lowest).max(), "<=", 0.25, n),
        claim("rival", "Pass@8, tournament minus validation Pass@8's pick", "fair comparison", "-", chosen - known, ">", 0, n),
        claim("offset", "Pass@8, offset tournament minus best validation loss", SOURCE, "-", at(passes[8], picks["offset"]) - lowest, ">=", 0.015, n),
        claim("dco", "Pass@8 at the end, DCO minus cross-entropy", "Chen et al., arXiv 2502.07154", "rescues", get("pass@8", dco)[1][:, -1] - end8, ">=", 0.025, n)]


def best_of_n_check(model, seed, N=16):
    """Sampled and exact Pass@k for k to N, and the floor that coverage promises."""
    sampled, logp = sampled_pass(model, seed, N)
    return dict(sampled=sampled.tolist(), exact=[pass_at(logp, k).mean() for k in range(1, N + 1)],
                floor=[1 - best_of_n_loss(lambda M: coverage(-logp, M), k) for k in range(1, N + 1)])


def figure_horizon(config, run, device):
    lengths, sizes, throws, seeds = (8, 16, 32, 64, 128, 256), (500, 2000, 8000), (20, 50, 100, 200, 500), list(seeds_of(config))
    for seed in seeds:
        for n in sizes:
            for H in lengths:
                run.log_once(lambda: dict(zip(("kl", "cov@16"), table(H, n, seed))), phase="table", seed=seed, draws=n, step=H)
        for n in throws:
            run.log_once(lambda: dict(zip(("kl_infinite", "cov@2"), coin(n, seed))), phase="coin", seed=seed, step=n)
    run.save()
    kl, cov = (np.stack([series(run, key, phase="table", draws=n)[1] for n in sizes], 1) for key in ("kl", "cov@16"))      # (seeds, sizes, lengths)
    infinite, cov2 = (series(run, key, phase="coin")[1] for key in ("kl_infinite", "cov@2"))                              # (seeds, throws)
    times = lambda y, at: y.mean(0)[1, at] / y.mean(0)[1, 0]                # what y is, after 2,000 draws, of what it is at 8 tokens
    fig, axes = plt.subplots(1, 3, figsize=(16, 5), layout="constrained")
    for j, n in enumerate(sizes):
        band(axes[0], lengths, kl[:, j], f"{n} draws", marker="o")
        band(axes[1], lengths, cov[:, j], f"{n} draws", marker="o")
    axes[1].axvline(95, color="k", lw=0.5, label="drawn once: lost from here (see `table`)")
    axes[1].plot(lengths, kl_bound(kl[:, 1].mean(0), 16).clip(max=1), "k:", label="bound by the KL, 2000 draws")
    axes[0].set(title=f"KL: from 8 to 64 tokens x {times(kl, 3):.2f}, to 256 x {times(kl, -1):.1f}", xlabel="tokens of an answer", ylabel="KL (nats)", xscale="log", yscale="log")
    axes[1].set(title=f"Cov_16: from 8 to 64 tokens x {times(cov, 3):.2f}, to 256 x {times(cov, -1):.1f}", xlabel="tokens of an answer", ylabel="Cov_16", xscale="log", ylim=(0, 1.02))
    for ax in axes[:2]:
        ax.set_xticks(lengths, lengths)
        ax.minorticks_off()
    band(axes[2], throws, infinite, "KL is infinite", marker="o")
    band(axes[2], throws, cov2, "Cov_2", marker="o")
    axes[2].set(title=f"A coin, 20 throws: KL infinite in {infinite.mean(0)[0]:.0%}, Cov_2 {cov2.mean(0)[0]:.3f}", xlabel="throws of a coin that shows heads once in 100", ylabel="probability; mean", xscale="log", ylim=(0, 1))
    axes[2].set_xticks(throws, throws)
    axes[2].minorticks_off()
    for ax in axes:
        ax.legend()
    fig.suptitle(f"Answers 8 times as long, after 2,000 draws: {times(kl, 3):.1f} times the KL, {times(cov, 3):.2f} times the Cov_16 ({len(seeds)} seed{'s' if len(seeds) > 1 else ''})")
    return fig, [
        claim("coverage", "Cov_16 at 256 tokens over that at 8, 2,000 draws", SOURCE, "constant", cov[:, 1, -1] / cov[:, 1, 0], "<=", 1.1, len(seeds)),
        claim("draws", "Cov_16 after 8,000 draws over that after 500, 64 tokens", SOURCE, "about 1 / n", cov[:, 2, 3] / cov[:, 0, 3], "<=", 0.12, len(seeds))]


def figure_optimizers(config, run, device):
    lengths, seeds, steps = (16, 64, 256, 1024, 4096), config.seeds, config.steps
    arms = {f"SGD, eta H B = {k}": [("sgd", k / (H * B_LOUD)) for H in lengths] for k in (0.25, 1, 2, 2.5)}
    arms |= {"normalised SGD, eta = 0.2": [("normalised", 0.2)] * 5, "distilled, truncated, eta = 0.002": [("distilled", 2e-3)] * 5}
    each, ours = list(arms)[:4], list(arms)[4:]                                                     # SGD with a step size for each length
    one = [f"SGD, eta = {2 / (H * B_LOUD):.2g}" for H in lengths]                                    # and with one for all
    arms |= {arm: [("sgd", 2 / (H * B_LOUD))] * 5 for arm, H in zip(one, lengths)}
    ttt, few = "token SGD, decoded with TTT, eta = 0.003", min(steps, 300)
    cells = [(arm, H, steps, lambda H=H, choice=choice: linear(*choice, H, steps, seeds, config.seed)) for arm, choices in arms.items() for H, choice in zip(lengths, choices)]
    cells += [(ttt, H, few, lambda H=H: ttt_coverage(0.003, H, few, seeds, config.seed)) for H in lengths[:2 if config.quick else 4]]
    for arm, H, sequences, measure in cells:
        if not any(r["arm"] == arm and r["step"] == H and r["sequences"] == sequences for r in run.rows):           # a resumed run has it already
            for seed, cov in enumerate(measure(), config.seed):
                run.log(phase="linear", arm=arm, seed=seed, step=H, sequences=sequences, **{"cov@16": cov})
            print(f"{arm:<42} H {H:5d}  Cov_16 {np.mean([r['cov@16'] for r in run.rows[-seeds:]]):.4f}", flush=True)
            run.keep()
            if run.due:
                run.save()
    run.save()
    fig, ax = plt.subplots(figsize=(12, 5), layout="constrained")
    get = lambda arm: series(run, "cov@16", phase="linear", arm=arm, sequences=few if arm == ttt else steps)
    worst = {arm: get(arm)[1].mean(0).max() for arm in (*arms, ttt)}                                # of all lengths
    tuned = min(each, key=lambda arm: get(arm)[1][:, -1].mean())                                    # at 4,096 tokens
    single = min(one, key=worst.get)
    for arm in (*each, single, *ours, ttt):
        band(ax, *get(arm), {single: f"{arm}, the best of {len(one)}", ttt: f"{arm}, {few} sequences"}.get(arm, arm), marker="o")
    fig.suptitle(f"One step size for all lengths, the largest Cov_16: SGD {worst[single]:.2g}, normalised {worst[ours[0]]:.2g}, distilled {worst[ours[1]]:.2g}, "
                 f"TTT {worst[ttt]:.2g}\n(means of {seeds} seeds; SGD with the best of 4 step sizes for 4,096 tokens: {get(tuned)[1][:, -1].mean():.2g})")
    ax.set(xlabel="tokens of an answer", ylabel="Cov_16, mean of the second half of training", xscale="log")
    ax.set_yscale("symlog", linthresh=1e-3)
    ax.set_ylim(-1e-4, 1.5)
    ax.set_xticks(lengths, lengths)
    ax.minorticks_off()
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return fig, [
        claim("one eta", "one eta, largest Cov_16 of a seed: SGD minus normalised", SOURCE, "> 0", get(single)[1].max(1) - get(ours[0])[1].max(1), ">=", 0.01, seeds),
        claim("sgd", "Cov_16 at 4,096 tokens: SGD, best eta of 4, minus normalised", SOURCE, ">= c H / T", get(tuned)[1][:, -1] - get(ours[0])[1][:, -1], ">=", 0.001, seeds),
        claim("bounces", "SGD at eta H B = 2.5: Cov_16, smallest of all lengths", SOURCE, ">= c", get("SGD, eta H B = 2.5")[1].mean(0).min(), ">=", 0.9, seeds),
        claim("normalised", "normalised SGD, one eta: Cov_16, largest of all lengths", SOURCE, "no H", worst[ours[0]], "<=", 0.001, seeds),
        claim("distilled", "truncated distillation, one eta: the same", SOURCE, "no H", worst[ours[1]], "<=", 0.005, seeds),
        claim("ttt", f"TTT decoding, one eta, {few} sequences: the same, 16 to 1,024 tokens", SOURCE, "no H", worst[ttt], "<=", 0.005, seeds)]


def check_memory(config, device):
    """UserError, at once, for what the machine cannot hold. Each is counted low: a few arrays of those that there will be."""
    if config.figure == "optimizers":
        need_memory(4 * 8 * 4096 * config.seeds, "--seeds")
    if config.figure == "principle":
        weights, checkpoints = 4 * (16 * config.n_layer * config.n_embd ** 2 + 2 * VOCAB * config.n_embd), config.steps // config.eval_every
        need_memory(6 * weights, "--n-layer, --n-embd: weights, gradients, moments and the base", device)
        need_memory(4 * 16 * config.batch * (PROMPT + ANSWER) * config.n_layer * config.n_embd, "--batch", device)
        need_memory(2 * config.eval_prompts * (2000 + 8 * checkpoints), "--eval-prompts, --steps, --eval-every: log-probabilities of all checkpoints")
        need_memory(checkpoints // 4 * weights, "--steps, --eval-every: the weights of every fourth checkpoint")


def main():
    config = parse_args(Config, __doc__)
    config.seeds = config.seeds or (1 if config.quick else {"principle": 1, "horizon": 5, "optimizers": 50}[config.figure])
    config.steps = config.steps or {"principle": 700, "horizon": None, "optimizers": 800}[config.figure]
    device = pick_device(config.device if config.figure == "principle" else "cpu")
    check_memory(config, device)
    # an impossible shape ends here, before anything is written; `horizon` counts a thousand prompts, the linear model has three weights
    size = sum(p.numel() for p in build(config, device).parameters()) if config.figure == "principle" else {"horizon": 1000, "optimizers": 3}[config.figure]
    with Run(config) as run:
        run.introduce(device, size)
        run.finish(*globals()[f"figure_{config.figure}"](config, run, device))


if __name__ == "__main__":
    command(main)
