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
coverage) picks a checkpoint near the top, the best validation loss one at the bottom.
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
from tqdm import tqdm

from kernels import token_logprobs
from model import GPT, GPTConfig, generate
from run import Run, band, claim, command, flag, parse_args, pick_device, restore, seeds_of, series, snapshot

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
    steps: int = flag(None, "steps (default: 700 of fine-tuning; optimizers: 800 sequences of the linear model, 300 for TTT)", quick=4, low=2)
    lr: float = flag(4e-5, "learning rate of fine-tuning (AdamW, constant)", low=0)
    batch: int = flag(64, "graphs per step", quick=8, low=1)
    dco: int = flag(8, "N of the DCO loss", low=1)
    n_layer: int = flag(3, "layers", low=1)
    n_head: int = flag(4, "heads", low=1)
    n_embd: int = flag(64, "channels", quick=32, low=8)
    sft_steps: int = flag(2200, "steps of pre-training", quick=10, low=1)
    sft_lr: float = flag(4e-3, "learning rate of pre-training (up in 50 steps, then linear to 0)", low=0)
    eval_every: int = flag(20, "steps of fine-tuning between checkpoints", quick=2, low=1)
    eval_prompts: int = flag(512, "graphs of each class to evaluate on", quick=16, low=8)


# ---------------------------------------------------------------------------------------------------------------------------
# Coverage, and what it says about best-of-N

def coverage(log_ratio, N, weights=None):
    """Cov_N from log D(y|x) - log p(y|x) (..., n) of draws of D (float64) -> (...). weights (n,): of the draws, if not alike."""
    return np.average(np.asarray(log_ratio) >= math.log(N) - 1e-12, axis=-1, weights=weights)


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


def tournament(logp, N):
    """Checkpoints' log-probabilities of validation answers (C, n) -> score (C,), lower is better: max over rivals of Pr[rival / own >= N] (Eq. 29).

    For Pass@K take N of about K / 2. Where N is too large, many score 0.
    """
    return coverage(logp[None] - logp[:, None], N).max(1)


def offset_tournament(logp, own, N, a=0.0):
    """The same minus 2 N^a Pr[rival / own >= N] over the checkpoint's own answers, own (C, C, n): own[i, j] is j's log-probability of i's (Eq. 32).

    Its theorem asks for N^(1 - 2a) >= 8; we use it with N = 4 and a = 0 all the same.
    """
    by_itself = coverage(own - np.einsum("iin->in", own)[:, None], N)
    return (coverage(logp[None] - logp[:, None], N) - 2 * N ** a * by_itself).max(1)


def dco_loss(logp, N):
    """-log(1 - (1 - p)^N) of each answer, p = exp(logp). Its gradient is cross-entropy's times N p (1 - p)^(N-1) / (1 - (1 - p)^N).

    An answer below 1e-8 has no gradient.
    """
    p = logp.exp().clamp(1e-8, 1 - 1e-6)
    return -torch.log(-torch.expm1(N * torch.log1p(-p)))


def ranks(x):
    """x (n,) -> (n,): 1 for the smallest; equals share the mean of their ranks."""
    return (x[:, None] > x).sum(1) + ((x[:, None] == x).sum(1) + 1) / 2


def spearman(x, y):
    """The correlation of the ranks; 0 if one of the two never changes."""
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
    """The same without gradients, as float64 numpy."""
    device = model.lm_head.weight.device
    return np.concatenate([score(model, part.to(device)).cpu().double().numpy() for part in torch.as_tensor(ids).split(256)])


def train(config, run, phase, seed, model, mixture, steps, lr, loss=None, decay=False, at=None, kept=None):
    """`steps` steps on graphs whose classes come from `mixture` (3,) -> a trained copy of the model. loss: of log-probabilities (R,), default -log p.

    decay: the learning rate goes up in 50 steps, then linearly to 0; else it is constant. at(step, model) is called at the start and after each step; what it puts into `kept` is saved with the rest.
    """
    rng, model = random.Random(f"{seed} {mixture}"), copy.deepcopy(model)       # the same graphs for every loss
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    start = restore(run.state.get(phase), model, optimizer, rng)
    bar = tqdm(range(start, steps), phase, initial=start, total=steps)
    if at and start == 0:
        at(0, model)
    for step in bar:
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
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step + 1 == steps:
            bar.set_postfix_str(f"loss {value.item():.3f}")
        if at:
            at(step + 1, model)
        elif step % 50 == 0 or step + 1 == steps:
            run.log(phase="pretrain", seed=seed, step=step, loss=value.item())
        if run.due:
            run.save(phase, **snapshot(step + 1, model, optimizer, rng, kept=kept))
    run.save(phase, **snapshot(steps, model, optimizer, rng, kept=kept))
    return model


NS = (2, 3, 4, 6, 8)                                        # of Cov_N
TRIES = (1, 4, 8, 12, 16)                                   # of Pass@N


def fine_tune(config, run, arm, seed, base, loss=None):
    """From the base on .9 G1 + .1 G2. Logs KL, coverage and Pass@N of every checkpoint.

    -> the model; each checkpoint's log-probabilities of the validation answers {step: (n,)}; the weights of every fourth {step: state}.
    """
    phase = f"{arm} {seed}"
    kept = run.state.get(phase, {}).get("kept", dict(valid={}, weights={}))
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
    """The steps of the checkpoints that best validation loss, the tournament and, of those with weights, the offset tournament choose.

    For the last one each checkpoint answers other validation prompts, and all of them score all answers.
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
    best = lambda score, logp: min(range(len(score)), key=lambda i: (score[i], -logp[i].mean()))            # of equals the one with the better loss
    return {"best validation loss": steps[int(logp.mean(1).argmax())], "tournament": steps[best(tournament(logp, N), logp)],
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
                total = total + share * math.exp(log_choose + counts @ truth) * ((truth - own) @ counts >= math.log(N))
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
        total = total + share * (truth - own >= math.log(N)).mean((0, 2))
    return total


# ---------------------------------------------------------------------------------------------------------------------------
# Figures and claims

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
    picks = {rule: np.array([list(steps).index(r[rule]) for r in run.rows if r["phase"] == "picks" and r["step"] == config.steps]) for rule in ("best validation loss", "tournament", "offset")}
    at = lambda y, pick: y[np.arange(n), pick]
    correlation = lambda x: np.mean([spearman(a, b) for a, b in zip(passes[16], x)])

    fig, axes = plt.subplots(2, 3, figsize=(16, 9), layout="constrained")
    for arm in arms:
        band(axes[0, 0], *get("kl", arm), arm)
    axes[0, 0].set(title="KL falls all the time", xlabel="step of fine-tuning", ylabel="KL of the data from the model (nats)", ylim=(0, None))
    for N in NS:
        band(axes[0, 1], steps, covs[N], f"N = {N}")
    axes[0, 1].set(title="Coverage mends, then breaks", xlabel="step of fine-tuning", ylabel="Cov_N (lower is better)")
    for i, N in enumerate((8, 16)):
        for arm, style in zip(arms, ("-", "--")):
            band(axes[0, 2], *get(f"pass@{N}", arm), f"Pass@{N}, {arm}", ls=style, color=f"C{i}")
        for (pick, index), marker in zip(picks.items(), "oDs"):
            axes[0, 2].plot(steps[index], at(passes[N], index), marker, color=f"C{i}", mec="k", label=pick if i == 0 else None)
    axes[0, 2].set(title="and Pass@N follows the coverage, not the KL", xlabel="step of fine-tuning", ylabel="Pass@N, exact")
    for ax, x, label in ((axes[1, 0], kl, "KL (nats)"), (axes[1, 1], covs[8], "Cov_8")):
        for i in range(n):
            ax.scatter(x[i], passes[16][i], c=steps, cmap="viridis", s=18)
            for (pick, index), marker in zip(picks.items(), "oDs"):
                ax.scatter(x[i, index[i]], passes[16][i, index[i]], marker=marker, s=90, color=dict(o="C3", D="C2", s="C1")[marker], ec="k", label=pick if i == 0 else None)
        ax.set(title=f"Pass@16 against {label}: rank correlation {correlation(x):+.2f}", xlabel=label, ylabel="Pass@16")
    sampled = [r for r in run.rows if r["phase"] == "sampled" and r["step"] == config.steps]
    for key, label in (("sampled", "best of N samples"), ("exact", "exact"), ("floor", "coverage promises at least (Prop. D.6)")):
        band(axes[1, 2], np.arange(1, len(sampled[0][key]) + 1), np.array([r[key] for r in sampled]), label)
    axes[1, 2].set(title="Best-of-N at the end, and what coverage promises", xlabel="N (samples)", ylabel="success", xscale="log", ylim=(0, 1.02))
    for ax in axes.flat:
        ax.legend()
    axes[0, 2].legend(fontsize="x-small", loc="lower left")
    fig.colorbar(axes[1, 1].collections[0], ax=axes[1, 1], label="step of fine-tuning")
    best8, end8 = passes[8].max(1), passes[8][:, -1]
    fig.suptitle(f"The loss falls, and so does the success of best-of-16: Pass@16 {passes[16].max(1).mean():.3f} at its best, {passes[16][:, -1].mean():.3f} at the end "
                 f"({n} seed{'s' if n > 1 else ''})")
    chosen, lowest = at(passes[8], picks["tournament"]), at(passes[8], picks["best validation loss"])
    return fig, [
        claim("kl", "KL at the end over the start, worst seed", SOURCE, "falls", (kl[:, -1] / kl[:, 0]).max(), "<=", 0.6, n),
        claim("kl steady", "largest rise of the KL between checkpoints (nats)", SOURCE, "monotone", np.diff(kl).max(), "<=", 0.02, n),
        claim("pass falls", "Pass@8, best minus last", SOURCE, "0.04", best8 - end8, ">=", 0.015, n),
        claim("pass@16 falls", "Pass@16, before fine-tuning minus after", SOURCE, "0.04", passes[16][:, 0] - passes[16][:, -1], ">=", 0.02, n),
        claim("by coverage", "rank correlation of Pass@16 with Cov_8", SOURCE, "strong", correlation(covs[8]), "<=", -0.7, n),
        claim("by kl", "rank correlation of Pass@16 with KL", SOURCE, "wrong sign", correlation(kl), ">=", 0.2, n),
        claim("tournament", "Pass@8, tournament minus best validation loss", SOURCE, "0.04", chosen - lowest, ">=", 0.015, n),
        claim("near best", "Pass@8, best checkpoint minus the tournament's, worst seed", SOURCE, "at the top", (best8 - chosen).max(), "<=", 0.006, n),
        claim("offset", "Pass@8, offset tournament minus best validation loss", SOURCE, "-", at(passes[8], picks["offset"]) - lowest, ">=", 0.015, n),
        claim("dco", "Pass@8 at the end, DCO minus cross-entropy", "Chen et al., arXiv 2502.07154", "rescues", get("pass@8", dco)[1][:, -1] - end8, ">=", 0.025, n),
        claim("bound", "best of 16, sampled, minus its floor by coverage (a theorem)", SOURCE, ">= 0", min(r["sampled"][-1] - r["floor"][-1] for r in sampled), ">=", 0, n),
        claim("sampled", "largest difference of sampled and exact Pass@N", "derived", "0", max(np.abs(np.subtract(r["sampled"], r["exact"])).max() for r in sampled), "<=", 0.06, n)]


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
    run.save("horizon")
    kl, cov = (np.stack([series(run, key, phase="table", draws=n)[1] for n in sizes], 1) for key in ("kl", "cov@16"))      # (seeds, sizes, lengths)
    infinite, cov2 = (series(run, key, phase="coin")[1] for key in ("kl_infinite", "cov@2"))                              # (seeds, throws)
    fig, axes = plt.subplots(1, 3, figsize=(16, 5), layout="constrained")
    for j, n in enumerate(sizes):
        band(axes[0], lengths, kl[:, j], f"{n} draws", marker="o")
        band(axes[1], lengths, cov[:, j], f"{n} draws", marker="o")
    axes[1].axvline(95, color="k", lw=0.5)
    axes[1].plot(lengths, kl_bound(kl[:, 1].mean(0), 16).clip(max=1), "k:", label="bound by the KL, 2000 draws")
    axes[0].set(title="KL grows with the length of the answers", xlabel="tokens of an answer", ylabel="KL (nats)", xscale="log", yscale="log")
    axes[1].set(title="their coverage does not, up to 95 tokens (see `table`)", xlabel="tokens of an answer", ylabel="Cov_16", xscale="log", ylim=(0, 1.02))
    for ax in axes[:2]:
        ax.set_xticks(lengths, lengths)
        ax.minorticks_off()
    band(axes[2], throws, infinite, "KL is infinite", marker="o")
    band(axes[2], throws, cov2, "Cov_2", marker="o")
    axes[2].set(title="A coin that shows heads once in 100, estimated", xlabel="throws", ylabel="probability; mean", xscale="log", ylim=(0, 1))
    axes[2].set_xticks(throws, throws)
    axes[2].minorticks_off()
    for ax in axes:
        ax.legend()
    fig.suptitle(f"What best-of-N needs is learnt from a number of answers that does not depend on their length ({len(seeds)} seeds)")
    mean, (eight, last) = cov.mean(0)[:, :4], kl.mean(0)[1, [0, 3]]        # up to 64 tokens
    return fig, [
        claim("kl", "KL at 64 tokens over KL at 8, 2,000 draws", SOURCE, "linear in H", last / eight, ">=", 7, len(seeds)),
        claim("kl at most", "the same, from above", SOURCE, "linear in H", last / eight, "<=", 9, len(seeds)),
        claim("coverage", "Cov_16, largest over smallest at 8 to 64 tokens, 2,000 draws", SOURCE, "constant", mean[1].max() / mean[1].min(), "<=", 1.1, len(seeds)),
        claim("draws", "Cov_16 after 8,000 draws over that after 500, 64 tokens", SOURCE, "about 1 / n", mean[2, -1] / mean[0, -1], "<=", 0.12, len(seeds)),
        claim("coin", "Cov_2 of a coin after 20 throws (KL infinite)", SOURCE, "finite", cov2[:, 0].mean(), "<=", 0.05, len(seeds), f" ({infinite[:, 0].mean():.2f})")]


def figure_optimizers(config, run, device):
    lengths, seeds, steps = (16, 64, 256, 1024, 4096), config.seeds, config.steps
    arms = {f"SGD, eta H B = {k}": [("sgd", k / (H * B_LOUD)) for H in lengths] for k in (0.25, 1, 2, 2.5)}
    arms |= {"normalised SGD, eta = 0.2": [("normalised", 0.2)] * 5, "distilled, truncated, eta = 0.002": [("distilled", 2e-3)] * 5}
    ttt = "token SGD, decoded with TTT, eta = 0.003"
    cells = [(arm, H, lambda H=H, choice=choice: linear(*choice, H, steps, seeds, config.seed)) for arm, choices in arms.items() for H, choice in zip(lengths, choices)]
    cells += [(ttt, H, lambda H=H: ttt_coverage(0.003, H, min(steps, 300), seeds, config.seed)) for H in lengths[:2 if config.quick else 4]]
    for arm, H, measure in cells:
        if not any(r["arm"] == arm and r["step"] == H and r["sequences"] == steps for r in run.rows):           # a resumed run has it already
            for seed, cov in enumerate(measure(), config.seed):
                run.log(phase="linear", arm=arm, seed=seed, step=H, sequences=steps, **{"cov@16": cov})
            print(f"{arm:<42} H {H:5d}  Cov_16 {np.mean([r['cov@16'] for r in run.rows[-seeds:]]):.4f}", flush=True)
            run.save("optimizers")
    fig, ax = plt.subplots(figsize=(11, 5), layout="constrained")
    get = lambda arm: series(run, "cov@16", phase="linear", arm=arm, sequences=steps)
    for arm in (*arms, ttt):
        band(ax, *get(arm), arm, marker="o")
    ax.set(title=f"SGD needs a step size for each length, the others take one for all ({seeds} seeds)",
           xlabel="tokens of an answer", ylabel="Cov_16, mean of the second half of training", xscale="log")
    ax.set_yscale("symlog", linthresh=1e-3)
    ax.set_ylim(-1e-4, 1.5)
    ax.set_xticks(lengths, lengths)
    ax.minorticks_off()
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    value = lambda arm: get(arm)[1].mean(0)
    return fig, [
        claim("sgd", "SGD at eta H B = 1: Cov_16 at 1,024 and 4,096 tokens, smaller", SOURCE, ">= c H / T", value("SGD, eta H B = 1")[3:].min(), ">=", 0.015, seeds),
        claim("bounces", "SGD at eta H B = 2.5: Cov_16, smallest of all lengths", SOURCE, ">= c", value("SGD, eta H B = 2.5").min(), ">=", 0.9, seeds),
        claim("normalised", "normalised SGD, one eta: Cov_16, largest of all lengths", SOURCE, "no H", value("normalised SGD, eta = 0.2").max(), "<=", 0.001, seeds),
        claim("distilled", "truncated distillation, one eta: the same", SOURCE, "no H", value("distilled, truncated, eta = 0.002").max(), "<=", 0.005, seeds),
        claim("ttt", "TTT decoding, one eta: the same, 16 to 1,024 tokens", SOURCE, "no H", value(ttt).max(), "<=", 0.005, seeds)]


def main():
    config = parse_args(Config, __doc__)
    config.seeds = config.seeds or (1 if config.quick else {"principle": 1, "horizon": 5, "optimizers": 50}[config.figure])
    config.steps = config.steps or (800 if config.figure == "optimizers" else 700)
    device = pick_device(config.device)
    size = sum(p.numel() for p in build(config, device).parameters())        # an impossible shape ends here, before anything is written
    run = Run(config)
    run.introduce(device, size)
    fig, claims = globals()[f"figure_{config.figure}"](config, run, device)
    run.finish(fig, claims)


if __name__ == "__main__":
    command(main)
