"""coverage.py: the checkpoint with the best loss is not the one to sample from.

(The coverage principle, Chen et al., arXiv 2510.15020.) The coverage profile of a model p of data D
is the tail of the log density ratio whose mean is the KL divergence; (x, y) are drawn from D:

    Cov_N = Pr[ D(y|x) / p(y|x) >= N ]        KL = E[ log D(y|x) / p(y|x) ]        lower is better

One of N samples is likely right if the right answer keeps a probability of about 1/N; more does not
help. So best-of-N fails where Cov_N is large, whatever the KL. Cross-entropy lowers the KL, and may
do so by giving up answers that are rare already.

The task is a path through a graph (tasks/paths.py). In nine of ten graphs (class G1) it follows
one rule, in the tenth (G2) the opposite one. A parity of the letters says which: a graph has one
answer, D(y|x) = 1, and Cov_N is the share of answers with p <= 1/N. But nobody learns that parity.
The base was trained on all ways to the goal (G3: some other way), and samples any. Fine-tuning
first mends the coverage (ways that the data never take vanish), then breaks it: cross-entropy ends
at .9 and .1, or further apart, and the rarer path falls below 1/N.

    python coverage.py                          3 minutes on two cores
    python -m experiments.selection             which checkpoint to take? a tournament of coverage
    python -m experiments.dco                   a loss that leaves alone what is likely enough
    python -m experiments.horizon               long answers have a larger KL, not a larger Cov_N
    python -m experiments.optimizers            step rules that keep the coverage at any length
    python -m experiments.token_steps           the same with a step after every token

What to see: the KL falls all the time; Pass@8 rises a little, then falls below its start, while
Cov_4 falls a little, then rises. `samples.txt` holds 8 answers to each of three graphs: the base
spreads them over two to four paths, the fine-tuned model writes one, 8 times. Of the third graph
the right path is the rarer one: the base finds it among 8, the fine-tuned model does not.

How this differs from the paper:
1. A model of 0.2 million parameters; graphs of 3 layers of 3 nodes (2 forks). The paper: 11
   million, 8 layers of 4 nodes.
2. New graphs at every step in pre-training, too; fine-tuning of 700 steps at 4e-5 instead of 50,000
   at 5e-6.
3. The data's answer is the only right one here, so that its exact probability gives Pass@N.
"""

import copy
import math
import random
from collections import Counter
from dataclasses import dataclass
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import torch

from engine import generate
from experiment import (
    Flags,
    NotFinite,
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
from kernels import token_logprobs
from model import GPT, GPTConfig
from tasks import paths

SOURCE = "Chen et al., arXiv 2510.15020"
PROMPT = paths.prompt_length(paths.SIZE)  # tokens
ANSWER = paths.SIZE + 1
VOCAB = paths.EQUALS + 1  # an answer's length is known: no token ends it
ALL_WAYS = (1 / 3, 1 / 3, 1 / 3)  # shares of the classes G1, G2, G3 in pre-training
DATA = (0.9, 0.1, 0.0)  # and in the data of fine-tuning
NS = (2, 3, 4, 6, 8)  # of Cov_N
TRIES = (1, 4, 8, 12, 16)  # of Pass@N


@dataclass
class Config(Flags):
    steps: int = flag(700, "steps of fine-tuning", quick=4, low=2, high=10**5)
    lr: float = flag(4e-5, "learning rate of fine-tuning (AdamW, constant)", low=0)
    batch: int = flag(64, "graphs per step", quick=8, low=1, high=2**14)
    n_layer: int = flag(3, "layers", low=1)
    n_head: int = flag(4, "heads", low=1)
    n_embd: int = flag(64, "channels", quick=32, low=8)
    pretrain_steps: int = flag(2200, "steps of pre-training", quick=10, low=1, high=10**6)
    pretrain_lr: float = flag(4e-3, "its learning rate (50 steps up, down to 0)", low=0)
    eval_every: int = flag(20, "steps of fine-tuning between checkpoints", quick=2, low=1)
    eval_prompts: int = flag(
        512, "graphs of each class to evaluate on", quick=16, low=8, high=2**16
    )


# -------------------------------------------------------------------------------------------------
# Coverage, and what it says about best-of-N


def missed(log_ratio, N):
    """Whether D / p >= N, from the log ratios. A ratio that is no number counts as missed."""
    # "not below" instead of "at least": nan is neither. 1e-12: a ratio of N up to rounding counts.
    return ~(np.asarray(log_ratio) < math.log(N) - 1e-12)


def coverage(log_ratio, N, weights=None):
    """Cov_N from log D(y|x) - log p(y|x) of draws of D (..., n) -> (...).

    weights (n,): of the draws, if they do not all count the same.
    """
    return np.average(missed(log_ratio, N), axis=-1, weights=weights)


def kl_bound(kl, N):
    """Prop. 3.1: Cov_N is at most this, for N > 1. kl in nats, a number or an array."""
    return kl / (math.log(N) - 1 + 1 / N)


def pass_at_k(logp, k):
    """1 - (1 - p)^k from the one right answer's exact log-probability (..., n) -> (..., n).

    Its mean is Pass@k: the chance that one of k samples at least is right.
    """
    p = np.minimum(np.exp(logp), 1 - 1e-12)
    # expm1 and log1p keep the digits of a small p, which 1 - (1 - p)^k would lose
    return -np.expm1(k * np.log1p(-p))


def best_of_n_loss(coverage_of, N):
    """Prop. D.6: the reward that the best of N samples loses, at most, against the reward of the
    data's answers.

    It is Cov_M + eps for N >= 2 M log(1 / eps) and Cov_M <= 1/2; we take the best M. coverage_of:
    a function M -> Cov_M. Rewards are within [0, 1], so that 1 is a bound, too.
    """
    bounds = [1.0]
    for M in np.geomspace(1, N, 40):
        cov = coverage_of(M)
        if cov <= 0.5:
            # At a large M few answers are missed, but N samples are few: eps is large
            eps = math.exp(-N / (2 * M))
            bounds.append(cov + eps)
    return min(bounds)


def ranks(x):
    """x (n,), numbers -> (n,): 1 for the smallest; equals share the mean of their ranks."""
    smaller = (x[:, None] > x).sum(1)
    equal = (x[:, None] == x).sum(1)
    return smaller + (equal + 1) / 2


def spearman(x, y):
    """The correlation of the ranks of x and y (n,).

    0 if one of the two never changes, nan if a value is no number.
    """
    if np.isnan(x).any() or np.isnan(y).any():
        return math.nan
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    return float(np.corrcoef(ranks(x), ranks(y))[0, 1])


def spearman_of_seeds(x, y):
    """Of each row of x, y (seeds, n) -> (seeds,)."""
    return np.array([spearman(a, b) for a, b in zip(x, y, strict=True)])


# -------------------------------------------------------------------------------------------------
# The model, and what it gives to answers


def build(config, device):
    shape = GPTConfig(
        VOCAB,
        block_size=PROMPT + ANSWER,
        n_layer=config.n_layer,
        n_head=config.n_head,
        n_embd=config.n_embd,
        n_hidden=4 * config.n_embd,
        qk_norm=True,
        tie=False,
    )
    return GPT(shape).to(device)


def answer_logp(model, ids):
    """The log-probabilities (R,) of the answers that stand last in ids (R, PROMPT + ANSWER)."""
    # Inputs ids[:, :-1], targets ids[:, 1:]: the last ANSWER states predict the answer
    hidden = model.hidden(ids[:, :-1])[:, -ANSWER:]  # (R, ANSWER, C)
    targets = ids[:, -ANSWER:]
    logp, _ = token_logprobs(hidden, model.lm_head.weight, targets)  # (R, ANSWER)
    return logp.sum(1)  # the logarithm of a product of probabilities


@torch.no_grad()
def measure_logp(model, ids):
    """The same without gradients, as float64 numpy. NotFinite if one of them is no number."""
    parts = torch.as_tensor(ids, device=model.lm_head.weight.device).split(256)
    logp = torch.cat([answer_logp(model, part) for part in parts]).cpu()
    if logp.isnan().any():
        raise NotFinite("an answer's log-probability is nan")
    return logp.double().numpy()


def sample_answers(model, ids, n, seed):
    """n answers to the prompts of ids (P, PROMPT + ANSWER) -> (P, n, ANSWER)."""
    prompts = ids[:, :PROMPT].tolist()
    # A generator of its own: how many are sampled changes nothing else
    generator = torch.Generator().manual_seed(seed)
    rollout = generate(model, prompts, n, ANSWER, generator=generator)
    return np.array(rollout.tokens()).reshape(len(ids), n, ANSWER)


def best_of_n_curves(model, seed, N=16):
    """Pass@k for k = 1 to N on 256 graphs, of which a tenth is of class G2.

    By sampling, from the exact probabilities, and what the coverage promises (Prop. D.6).
    """
    classes = np.repeat([paths.G1, paths.G2], (230, 26))
    ids = paths.graphs(np.random.default_rng([seed, 4]), classes)
    answers = sample_answers(model, ids, N, seed)  # (256, N, ANSWER)
    right = (answers == ids[:, None, PROMPT:]).all(2)  # (256, N)
    wrong = (~right).sum(1).tolist()
    logp = measure_logp(model, ids)

    def sampled(k):
        """The chance that a right one is among k of the N samples, over all choices of them."""
        ways = math.comb(N, k)
        return np.mean([1 - math.comb(w, k) / ways for w in wrong])

    def floor(k):
        """At least so much is promised: the reward of the data's answers, 1, minus the loss."""
        return 1 - best_of_n_loss(lambda M: coverage(-logp, M), k)

    tries = range(1, N + 1)
    return dict(
        sampled=[sampled(k) for k in tries],
        exact=[pass_at_k(logp, k).mean() for k in tries],
        floor=[floor(k) for k in tries],
    )


# -------------------------------------------------------------------------------------------------
# Training


def cross_entropy(logp):
    """The loss of each answer from its log-probability (R,) -> (R,)."""
    return -logp


def train(config, run, phase, seed, model, mixture, rates, loss_of=cross_entropy, kept=None):
    """Train the model on new graphs at every step, whose classes come from `mixture` (3,).

    A generator, to be looped over: it yields, after each step, its number and its loss. rates: the
    learning rate of each step; so many steps are taken. loss_of: log-probabilities (R,) -> (R,).
    kept: a dict of what is saved beside the model. NotFinite for a loss, a gradient or a weight
    that is no number.
    """
    rng = random.Random(f"{seed} {mixture}")  # of a mixture: the same graphs for every loss
    betas = (0.9, 0.95)
    optimizer = torch.optim.AdamW(
        model.parameters(), rates[0], betas, weight_decay=0.01, fused=True
    )
    for step in run.loop(phase, len(rates), model, optimizer, rng, kept=kept):
        optimizer.param_groups[0]["lr"] = rates[step]
        # 1. Graphs with their answers: numpy draws them, seeded by rng, whose state `loop` saves
        step_rng = np.random.default_rng(rng.getrandbits(64))
        classes = step_rng.choice(3, config.batch, p=mixture)
        graphs = paths.graphs(step_rng, classes)
        ids = torch.as_tensor(graphs, device=model.lm_head.weight.device)  # (R, PROMPT + ANSWER)
        # 2. The loss, on the answers only
        logp = answer_logp(model, ids)  # (R,)
        loss = loss_of(logp).mean()
        # 3. A step
        optimizer.zero_grad()
        loss.backward()
        descend(optimizer, loss)  # cuts the gradient to norm 1, then optimizer.step()
        if step % 50 == 0:
            run.say(loss=loss.item())
        yield step, loss.item()


def pretrain(config, run, seed, device):
    """The base: trained on all ways to the goal."""
    torch.manual_seed(seed)
    model = build(config, device)
    steps = config.pretrain_steps

    def rate(step):
        """Up in 50 steps, under a line that falls to 0."""
        return config.pretrain_lr * min((step + 1) / 50, 1 - step / steps)

    rates = [rate(step) for step in range(steps)]
    for step, loss in train(config, run, f"base {seed}", seed, model, ALL_WAYS, rates):
        if step % 50 == 0 or step + 1 == steps:
            run.log(phase="pretrain", seed=seed, step=step, loss=loss)
    return model


def evaluation_graphs(config, seed):
    """As many of G1 as of G2, and the weight of each (2n,): nine tenths on G1.

    They are not kept out of training, where letters and edges are drawn anew each time.
    """
    classes = np.repeat([paths.G1, paths.G2], config.eval_prompts)
    class_weights = np.array(DATA)[classes]  # (2n,)
    rng = np.random.default_rng([seed, 1])
    return paths.graphs(rng, classes), class_weights / config.eval_prompts


def fine_tune(config, run, arm, seed, base, loss_of=cross_entropy, on_checkpoint=None, kept=None):
    """From the base on the data -> the model. Logs KL, coverage and Pass@N of every checkpoint.

    on_checkpoint(step, model), if there is one, is called at every checkpoint; what it puts into
    the dict `kept` is saved, and there again in a resumed run (experiments/selection.py).
    """
    model = copy.deepcopy(base)
    graphs, weights = evaluation_graphs(config, seed)

    def evaluate(step):
        logp = measure_logp(model, graphs)
        log_ratio = -logp  # log D - log p: a graph has one answer in the data, log D = 0
        row = dict(kl=log_ratio @ weights)
        row |= {f"cov@{N}": coverage(log_ratio, N, weights) for N in NS}
        row |= {f"pass@{N}": pass_at_k(logp, N) @ weights for N in TRIES}
        run.log(phase="finetune", arm=arm, seed=seed, step=step, **row)
        if on_checkpoint:
            on_checkpoint(step, model)

    loop = f"{arm} {seed}"
    if loop not in run.state:  # a resumed run has this row
        evaluate(0)
    rates = [config.lr] * config.steps
    for step, _ in train(config, run, loop, seed, model, DATA, rates, loss_of, kept):
        if (step + 1) % config.eval_every == 0 or step + 1 == config.steps:
            evaluate(step + 1)
    return model


# -------------------------------------------------------------------------------------------------
# The figure


def change(y):
    """For a title: how a curve y (seeds, n) ends, in the mean over the seeds, beside its start."""
    first, last = y.mean(0)[[0, -1]]
    verb = "falls" if last < first else "rises" if last > first else "stays"
    return f"{verb} from {first:.3f} to {last:.3f}"


def share(part, whole):
    """part / whole (seeds,), nan where the whole is not above 0."""
    undefined = np.full(len(whole), np.nan)
    return np.divide(part, whole, out=undefined, where=whole > 0)


def figure(config, run):
    def curve(key):
        return series(run, key, phase="finetune", arm="cross-entropy")[1]  # (seeds, checkpoints)

    steps, kl = series(run, "kl", phase="finetune", arm="cross-entropy")
    cov = {N: curve(f"cov@{N}") for N in NS}
    passed = {N: curve(f"pass@{N}") for N in TRIES}
    with_coverage = spearman_of_seeds(passed[16], cov[8])
    with_kl = spearman_of_seeds(passed[16], kl)

    fig, axes = plt.subplots(2, 2, figsize=(12, 8.5), layout="constrained")
    fig.suptitle(
        f"Fine-tuning: the KL {change(kl)} nats, and Pass@16 {change(passed[16])}\n"
        f"Pass@16: rank correlation with Cov_8 {with_coverage.mean():+.2f}, "
        f"with the KL {with_kl.mean():+.2f}"
    )
    top_left, top_right, bottom_left, bottom_right = axes.flat
    band(top_left, steps, kl, "cross-entropy")
    top_left.set(title=f"The KL {change(kl)}", ylabel="KL of the data from the model (nats)")
    top_left.set_ylim(0, None)
    for N in NS:
        band(top_right, steps, cov[N], f"N = {N}")
    best = cov[4].mean(0).min()
    top_right.set(title=f"Cov_4 {change(cov[4])}; at its best {best:.3f}")
    top_right.set_ylabel("Cov_N (lower is better)")
    for N in (8, 16):
        band(bottom_left, steps, passed[N], f"Pass@{N}")
    best = passed[8].mean(0).max()
    bottom_left.set(title=f"Pass@8 {change(passed[8])}; at its best {best:.3f}")
    bottom_left.set_ylabel("Pass@N, exact")
    for ax in (top_left, top_right, bottom_left):
        ax.set_xlabel("step of fine-tuning")
    draw_best_of_n(bottom_right, config, run)
    for ax in axes.flat:
        ax.legend()
    return fig, judge(kl, passed, with_coverage, with_kl)


def judge(kl, passed, with_coverage, with_kl):
    """The claims, from curves (seeds, checkpoints) and rank correlations (seeds,)."""
    n = len(kl)
    first = kl[:, 0]
    last = kl[:, -1]
    falls = "KL at the end over the start, worst seed"
    kl_left = (last / first).max()
    rise = share(np.diff(kl).max(1), first - last).max()
    steady = "KL, largest rise between checkpoints, share of its fall"
    below_best8 = passed[8].max(1) - passed[8][:, -1]
    below_start16 = passed[16][:, 0] - passed[16][:, -1]
    lost = "Pass@16, before fine-tuning minus after"
    rank = "rank correlation of Pass@16 with"
    return [
        claim("kl", falls, SOURCE, "falls", kl_left, "<=", 0.6, n),
        claim("kl steady", steady, SOURCE, "monotone", rise, "<=", 0.04, n),
        claim("pass falls", "Pass@8, best minus last", SOURCE, "0.04", below_best8, ">=", 0.015, n),
        claim("pass@16 falls", lost, SOURCE, "0.04", below_start16, ">=", 0.02, n),
        claim("by coverage", f"{rank} Cov_8", SOURCE, "strong", with_coverage, "<=", -0.7, n),
        claim("by kl", f"{rank} KL", SOURCE, "wrong sign", with_kl, ">=", 0.2, n),
    ]


def draw_best_of_n(ax, config, run):
    """What the best of N samples gets at the end of fine-tuning, and what the coverage promises."""
    labels = {
        "sampled": "best of N samples",
        "exact": "from the exact probabilities",
        "floor": "coverage promises at least (Prop. D.6)",
    }
    rows = [r for r in run.rows if r["phase"] == "sampled" and r["step"] == config.steps]
    final = {}
    for key, label in labels.items():
        curve = np.array([r[key] for r in rows])  # (seeds, N)
        N = curve.shape[1]
        band(ax, np.arange(1, N + 1), curve, label)
        final[key] = curve[:, -1].mean()
    ax.set(title=f"Best of {N} at the end {final['sampled']:.3f}, promised {final['floor']:.3f}")
    ax.set(xlabel="N (samples)", ylabel="success", xscale="log", ylim=(0, 1.02))


def examples(model, ids, seed):
    """8 answers to each of some graphs, counted -> [(text, 1.0 if one of them is right)]."""
    answers = sample_answers(model, ids, 8, seed).tolist()
    written = []
    for i, problem in enumerate(ids.tolist()):
        texts = [paths.tokenizer.decode(answer) for answer in answers[i]]
        counts = "  ".join(f"{n} x {text}" for text, n in Counter(texts).most_common())
        written.append((counts, max(paths.reward(problem, text) for text in texts)))
    return written


def main():
    config = parse_args(Config, __doc__)
    device = pick_device(config.device)
    parameters = build(config, device).parameters()  # an impossible shape ends here
    with Run(config) as run:
        run.introduce(device, sum(p.numel() for p in parameters))
        for seed in seeds_of(config):
            base = pretrain(config, run, seed, device)
            model = fine_tune(config, run, "cross-entropy", seed, base)
            where = dict(phase="sampled", seed=seed, step=config.steps)
            run.log_once(partial(best_of_n_curves, model, seed), **where)
        # What the models of the last seed write
        classes = np.array([paths.G1, paths.G1, paths.G2])
        ids = paths.graphs(np.random.default_rng(7), classes)
        prompts = [paths.prompt(row) for row in ids.tolist()]
        base_wrote = examples(base, ids, config.seed)
        run.samples(prompts, base=base_wrote, trained=examples(model, ids, config.seed))
        run.finish(*figure(config, run))


if __name__ == "__main__":
    command(main)
