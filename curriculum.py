"""curriculum.py: learning to explore: a model that judges better than it guesses learns to go on
trying, and goes on beyond the budget that it was trained with.

(e3, Setlur et al., arXiv 2506.09026. Its curriculum, easy problems and short answers first, is
experiments/coupled.py.) The task is to name two of six numbers that make a sum (tasks/numbers.py).
An answer tries pairs, judges each of them, then names one:

    BOS 3 11 8 2 6 12 ?14        3 +6 =9 NO  11 +2 =13 NO  8 +6 =14 OK  ANS 8 +6 EOS

An attempt is four tokens, the last of them its verdict. With a reward at the end only, GRPO can
raise the share of attempts that hit, or the number of attempts. The second takes an asymmetry, and
it is measured before RL begins:

    gap = balanced accuracy of the verdicts - share of the attempts that hit

Two base models were trained on answers of this format. In those of one of them sums and verdicts
were honest: its gap is above .9. In the other's they were random: its gap is about .4, a coin's.
Then both get

    A_i  = (r_i - mean of the group) / std of the group          r: 1 if it names a right pair
    loss = - mean over tokens of  A_i log p(token | problem, tokens before)

    python curriculum.py                    4 minutes on two cores
    python curriculum.py --seeds 3          the figure with error bands
    python -m experiments.budget            four training budgets, each tested at all of them
    python -m experiments.coupled           easy and short, then hard and long: a curriculum
    python -m experiments.mask              GRPO without its negative advantages
    python -m experiments.negatives         the same of a table of logits, where all is exact

What to see: with the gap, attempts per answer grow several times and success rises, most where the
test budget is larger than the training budget; without it neither moves. `samples.txt` shows an
answer of the base, which gives up, beside one of the trained model, which does not. A bad run:
attempts stay, or fall; then look at the gap.

How this differs from the paper:
1. A model of 0.1 million parameters from scratch, sums for equations, budgets of 16 to 256 tokens
   for 1k to 32k.
2. One gradient step a batch, so that nothing is clipped; no KL term; temperature 1.
3. Positions: only half of the pairs of channels turn (partial rotary, periods of 6 to 35 tokens,
   all seen in training); the others look for content alone. A longer answer then shows the model
   little that is new, and `verdicts_by_place` measures how little.
"""

import copy
import random
from dataclasses import dataclass
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import torch

import tasks
from experiment import (
    Flags,
    Run,
    UserError,
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
from meter import Meter
from model import GPT, GPTConfig
from tasks import numbers

SOURCE = "Setlur et al., arXiv 2506.09026"
# A base model: what is different about its demonstrations
BASES = {"gap": dict(), "no gap": dict(honest=False)}
BUDGETS = (16, 32, 64, 128, 256)  # tokens that an answer may have in a test; 16: three attempts
LONGEST = 512  # and the most that the model has positions for
SIZES = (3, 4, 6, 8)  # numbers in the problems that a base model learns from
TASK = numbers.tokenizer


@dataclass
class Config(Flags):
    steps: int = flag(80, "RL steps of an arm", quick=2, low=1)
    size: int = flag(6, "numbers in a problem", choices=SIZES)
    # 16 is an arm of its own, and beyond 256 there is no test
    budget: int = flag(64, "tokens that an answer may have in training", choices=BUDGETS[1:-1])
    prompts: int = flag(32, "problems per step", quick=4, low=1, high=1000)
    group: int = flag(8, "answers per problem", quick=4, low=2, high=1000)
    lr: float = flag(4e-4, "RL learning rate (AdamW, constant)", low=0)
    gate: float = flag(0.6, "verdict gap that a base needs before RL starts", quick=-1.0)
    n_layer: int = flag(2, "layers", low=1)
    n_head: int = flag(4, "heads", low=1)
    n_embd: int = flag(64, "channels", quick=32, low=8)
    sft_steps: int = flag(1200, "steps of training each base model", quick=10, low=1)
    sft_batch: int = flag(64, "demonstrations per step", quick=8, low=1, high=10_000)
    sft_lr: float = flag(6e-3, "their learning rate (up in 50 steps, then linear to 0)", low=0)
    eval_every: int = flag(20, "RL steps between evaluations", low=1)
    eval_prompts: int = flag(
        1024,
        "held-out problems at the first and the last evaluation, a quarter of them on the way",
        quick=8,
        low=4,
        high=100_000,
    )


# --------------------------------------------------------------------------------------------------
# The method


def advantages(rewards):
    """rewards (P, G) -> (P, G): minus the group's mean, over its standard deviation.

    A group of equal rewards gets exactly 0, not rounding noise over 1e-6.
    """
    equal = (rewards == rewards[:, :1]).all(1, keepdim=True)  # (P, 1)
    centred = torch.where(equal, 0.0, rewards - rewards.mean(1, keepdim=True))  # (P, G)
    return centred / (rewards.std(1, keepdim=True) + 1e-6)


def verdict_gap(problems, texts):
    """Balanced accuracy of the verdicts minus the success of an attempt: how much better the model
    judges than it guesses. A coin's is about .4.
    """
    judged = [
        (numbers.hits(problem, a, b), verdict)
        for problem, text in zip(problems, texts, strict=True)
        for a, b, verdict in numbers.parse(text)[0]
    ]

    def accuracy(truth):
        # .5 where there is nothing to judge
        return np.mean([verdict == truth for hit, verdict in judged if hit == truth] or [0.5])

    balanced = (accuracy(True) + accuracy(False)) / 2
    success = np.mean([hit for hit, _ in judged] or [0.0])
    return float(balanced - success)


def score(model, ids):
    """Log-probability and entropy (R, T - 1) of each token of ids (R, T) given those before it."""
    return token_logprobs(model.hidden(ids[:, :-1]), model.lm_head.weight, ids[:, 1:])


def answer(model, problems, n, budget, generator):
    """n sampled answers to each problem -> Rollout of R = P * n rows, their texts, their rewards
    (P, n). An answer that did not end is wrong.
    """
    return tasks.answer(model, numbers, problems, n, budget, generator)


def update(model, optimizer, rollout, adv):
    """One step of policy gradient on the R answers of a batch; adv (P, G) -> row of metrics. The
    loss is the mean over all tokens of all answers. As a number it is the mean of -A, about 0.
    """
    adv = adv.view(-1, 1).to(rollout.ids.device)  # (R, 1): one number for all tokens of an answer
    count = rollout.mask.sum()  # tokens of all answers
    row = dict(loss=0.0, entropy=0.0)
    optimizer.zero_grad()
    for rows in rollout.lengths.argsort().split(64):  # short answers together: less padding
        part = rollout[rows]  # cut to its longest row
        mask = part.mask[:, 1:]  # (64, T - 1), as logp and entropy: 1 on the answers' tokens
        logp, entropy = score(model, part.ids)
        # The ratio to the policy that sampled, as in GRPO's papers: in a batch's only step it is 1,
        # and its gradient that of logp (several steps would need the sampler's log-probabilities)
        rho = (logp - logp.detach()).exp()
        loss = -(rho * adv[rows] * mask).sum() / count
        loss.backward()
        row["loss"] += loss.item()
        row["entropy"] += ((entropy * mask).sum() / count).item()
    # cuts the gradient and steps -> its norm before; a loss that is no number ends the run
    row["grad_norm"] = descend(optimizer, row["loss"])
    return row


# --------------------------------------------------------------------------------------------------
# Training


def build(config, device):
    shape = GPTConfig(
        vocab_size=TASK.n_vocab,
        block_size=2 + max(SIZES) + LONGEST,
        n_layer=config.n_layer,
        n_head=config.n_head,
        n_embd=config.n_embd,
        n_hidden=4 * config.n_embd,
        qk_norm=True,
        tie=False,
        rope_theta=100.0,
    )
    model = GPT(shape).to(device)
    # Partial rotary: the slower half of the pairs does not turn (angle 0 is the complex number 1)
    model.rope[..., model.rope.shape[-1] // 2 :] = 1
    return model


def warm_up(config, run, seed, device, kind="gap"):
    """Supervised training on demonstrations, from scratch -> a base model of a row of BASES.
    UserError if the one of honest demonstrations does not judge better than it guesses: then there
    is nothing to build on.
    """
    name = f"{kind} {seed}"
    rng = random.Random(seed)
    torch.manual_seed(seed)
    model = build(config, device)

    def demonstration():
        problem = numbers.draw(rng, rng.choice(SIZES))
        return numbers.prompt(problem), numbers.demonstrate(rng, problem, **BASES[kind])

    tasks.imitate(
        model,
        TASK,
        demonstration,
        run,
        name,
        config.sft_steps,
        rng,
        config.sft_lr,
        config.sft_batch,
    )
    gap = evaluate(model, config.size, (64,), "gate", config.eval_prompts)["gap"]
    print(f"base {name}: its verdicts are {gap:.2f} better than its attempts")
    if kind == "gap" and gap < config.gate:
        raise UserError(
            f"base {name}: a verdict gap of {gap:.2f} is no asymmetry to build on "
            f"(--gate {config.gate}); give it more --sft-steps"
        )
    return model


def evaluate(model, size, budgets, seed, n, held_out=True, k=1, draw=numbers.draw):
    """(Its options are for experiments/.) k answers to each of n problems at the largest budget,
    cut to the smaller ones -> row of metrics: the share of the problems that one of the k solves,
    at each budget; behaviour at the largest, `gap` and the entropy in `nats` per token (from the
    sampled tokens) included.
    """
    rng = random.Random(f"{size} {seed}")
    problems = [draw(rng, size, held_out) for _ in range(n)]
    seed_of_answers = rng.getrandbits(32)
    generator = torch.Generator().manual_seed(seed_of_answers)
    meter = Meter()
    rollout, texts, rewards = answer(model, problems, k, max(budgets), generator)
    row = meter.solved(rewards.sum())
    lengths = rollout.lengths.view(n, k).cpu()
    for budget in budgets:  # what is cut did not end: it is wrong
        solved = (rewards * (lengths <= budget)).amax(1)  # (n,)
        row[f"pass@{k} of {budget}"] = solved.sum().item() / n
    repeated = [p for p in problems for _ in range(k)]
    row |= numbers.behaviour(repeated, texts)
    row["gap"] = verdict_gap(repeated, texts)
    row["nats"] = -(rollout.logp.sum() / rollout.mask.sum()).item()
    return row


def adamw(model, config):
    return torch.optim.AdamW(
        model.parameters(), config.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )


def outcome(rollout, rewards):
    """Of a batch: mean reward, mean length, and that of right and of wrong answers (or None)."""
    lengths = rollout.lengths.float().cpu()  # (R,)
    right = rewards.flatten() > 0  # (R,)

    def mean(x):
        return x.mean().item() if len(x) else None

    return dict(
        reward=rewards.mean().item(),
        length=mean(lengths),
        length_right=mean(lengths[right]),
        length_wrong=mean(lengths[~right]),
    )


def practise(model, optimizer, problems, budget, config, generator):
    """One step of GRPO -> row of metrics, sampled tokens."""
    # 1. Answers, and which of them are right
    rollout, texts, rewards = answer(model, problems, config.group, budget, generator)
    # 2. How much better each is than the others to its problem
    adv = advantages(rewards)
    # 3. More of what was better, less of what was worse
    row = update(model, optimizer, rollout, adv)
    return row | outcome(rollout, rewards), int(rollout.mask.sum())


def train(config, run, arm, seed, base, budget):
    """GRPO from the base with answers of at most `budget` tokens -> the trained model. Logs the
    success at each of BUDGETS, on held-out problems.
    """
    phase = f"{arm} {seed}"
    model = copy.deepcopy(base)
    optimizer = adamw(model, config)
    rng = random.Random(seed + 1)
    generator = torch.Generator().manual_seed(seed + 1)
    kept = {"sampled": 0}  # what a checkpoint holds beside the weights

    def test(step, **row):
        n = config.eval_prompts
        if step not in (0, config.steps):
            n //= 4
        row |= evaluate(model, config.size, BUDGETS, f"{seed} {step}", n)
        run.log(phase="rl", arm=arm, seed=seed, step=step, sampled_tokens=kept["sampled"], **row)
        return row

    if phase not in run.state:  # not when it goes on after an interrupt
        test(0)
    for step in run.loop(phase, config.steps, model, optimizer, rng, generator, kept):
        problems = [numbers.draw(rng, config.size, held_out=False) for _ in range(config.prompts)]
        row, sampled = practise(model, optimizer, problems, budget, config, generator)
        kept["sampled"] += sampled
        if (step + 1) % config.eval_every == 0 or step + 1 == config.steps:
            row = test(step + 1, **row)
            run.say(success=row[f"pass@1 of {BUDGETS[-1]}"], attempts=row["attempts"])
    return model


@torch.no_grad()
def verdicts_by_place(model, config, seed, places=56, n=16):
    """Balanced accuracy of the verdict on the 1st, 2nd, ... attempt, of long answers that the
    model is made to read (misses, then a hit) -> row of metrics, `right` (places,).

    The base model stops early; this asks whether it could go on, and so whether positions are what
    fails in long answers.
    """
    rng = random.Random(f"places {seed}")
    rows = []
    # Row r reads hit_at[r] misses, then a hit (where that is `places`: misses only), then padding
    hit_at = torch.arange(places + 1).repeat(n)  # (R,)
    for place in hit_at.tolist():
        problem = numbers.draw(rng, config.size, held_out=True)
        text = numbers.misses_then_hit(rng, problem, place, hit=place < places)
        ids = TASK.encode(f"{numbers.prompt(problem)} {text}")
        rows.append(ids + [0] * (2 + config.size + 4 * places - len(ids)))
    ids = torch.tensor(rows, device=model.lm_head.weight.device)  # (R, T)
    same = [model(part[:, :-1]).argmax(-1) == part[:, 1:] for part in ids.split(64)]
    # The last of the four tokens of each attempt is its verdict
    right = torch.cat(same)[:, -1 - 4 * (places - 1) :: 4].float().cpu()  # (R, places)
    balanced = []
    for i in range(places):
        no = right[hit_at > i, i].mean()  # rows that have not hit yet
        ok = right[hit_at == i, i].mean()  # rows that hit here
        balanced.append(((no + ok) / 2).item())
    return dict(right=balanced)


def show(run, size, budget, **models):
    """What the models answer to three held-out problems."""
    problems = [numbers.draw(random.Random(i), size, held_out=True) for i in range(3)]
    written = {}
    for name, model in models.items():
        generator = torch.Generator().manual_seed(0)
        _, texts, rewards = answer(model, problems, 1, budget, generator)
        marks = rewards.flatten().tolist()
        written[name] = list(zip(texts, marks, strict=True))
    run.samples([numbers.prompt(p) for p in problems], **written)


# --------------------------------------------------------------------------------------------------
# Figure and claims


def of(run, arm, key, last=True):
    """The last (first) value of a metric, of each seed (seeds,)."""
    here = [r for r in run.rows if r["phase"] == "rl" and r["arm"] == arm]
    rows = [r for r in here if r.get(key) is not None]
    seeds = sorted({r["seed"] for r in rows})
    by_seed = [[r[key] for r in rows if r["seed"] == seed] for seed in seeds]
    return np.array([values[-1 if last else 0] for values in by_seed])


def tested(run, arm, last=True, budgets=BUDGETS):
    """Success at each of the budgets (seeds, budgets)."""
    return np.stack([of(run, arm, f"pass@1 of {b}", last) for b in budgets], 1)


def told(difference, digits=2):
    """A paired difference of each seed (seeds,): its mean and standard deviation, as text."""
    spread = f" ± {difference.std(ddof=1):.{digits}f}" if len(difference) > 1 else ""
    return f"{difference.mean():+.{digits}f}{spread}"


def draw_budgets(ax, curves, title, budgets=BUDGETS):
    for label, y in curves.items():
        band(ax, np.array(budgets), y, label, marker="o")
    ax.set_title(title)
    ax.set(xlabel="test budget (tokens)", ylabel="held-out pass@1")
    ax.set_xscale("log")
    ax.set_ylim(0, 1)
    ax.set_xticks(budgets, budgets)
    ax.minorticks_off()
    ax.legend()


def growth(run, arm):
    """Attempts per answer after training, over before (seeds,): no number if there was none."""
    before = of(run, arm, "attempts", last=False)
    after = of(run, arm, "attempts")
    with np.errstate(divide="ignore", invalid="ignore"):
        return after / before


def figure(config, run):
    n = config.seeds
    trained_at = f"trained at {config.budget}"
    fig, axes = plt.subplots(1, 3, figsize=(18, 5), layout="constrained")
    grown = {arm: growth(run, arm) for arm in ("full", "no gap")}
    for arm, label in (("full", "gap"), ("no gap", "no gap")):
        band(axes[0], *series(run, "attempts", phase="rl", arm=arm), label)
    axes[0].set_title(
        f"Attempts: x{grown['full'].mean():.1f} from a base that checks its guesses; "
        f"x{grown['no gap'].mean():.1f} without"
    )
    axes[0].set_xlabel("RL step")
    axes[0].set_ylabel(f"attempts per answer (of {BUDGETS[-1]} tokens)")
    axes[0].set_ylim(0)
    right = np.array([r["right"] for r in run.rows if r["phase"] == "places"])  # (seeds, places)
    near = right[:, :16].mean(1)  # (seeds,): 16 attempts is the longest demonstration
    far = right[:, 16:].mean(1)
    band(axes[1], np.arange(1, right.shape[1] + 1), right, "the base, made to read on")
    axes[1].axvline(16, color="k", ls=":", lw=1, label="longest demonstration")
    axes[1].set_title(
        f"Verdicts of attempts 1 to 16: {near.mean():.2f} right, beyond: {far.mean():.2f}"
    )
    axes[1].set(xlabel="attempt", ylabel="balanced accuracy of the verdict")
    axes[1].set_ylim(0, 1.02)
    curves = {
        "base": tested(run, "full", False),
        "trained at 16": tested(run, "budget 16"),
        trained_at: tested(run, "full"),
        f"no gap, {trained_at}": tested(run, "no gap"),
    }
    base = curves["base"].T  # (budgets, seeds)
    short = curves["trained at 16"].T
    draw_budgets(
        axes[2],
        curves,
        f"16 to 64 tokens: {short[0].mean():.2f} to {short[2].mean():.2f} trained at 16; "
        f"base {base[0].mean():.2f} to {base[2].mean():.2f}",
    )
    for ax in axes[:2]:
        ax.legend()
    fig.suptitle(
        f"Told only right or wrong in the end: attempts x{grown['full'].mean():.1f} with verdicts "
        f"to trust, x{grown['no gap'].mean():.1f} without ({n} seed{'s' * (n > 1)})"
    )
    return fig, claims_of(config, run, grown, far - near, base, short)


def claims_of(config, run, grown, far_minus_near, base, short):
    n = config.seeds
    key = f"pass@1 of {config.budget}"
    rise = {arm: of(run, arm, key) - of(run, arm, key, False) for arm in grown}
    gap = of(run, "no gap", "gap", last=False).max()
    more = short[2] - short[0]  # at 64 tokens (the third of BUDGETS) minus at 16
    base_more = base[2] - base[0]
    both = f" ({more.mean():.2f}, {base_more.mean():.2f})"

    def held(id, text, paper, value, op, threshold, beside=""):
        source = "design of the task" if paper == "-" else SOURCE
        return claim(id, text, source, paper, value, op, threshold, n, beside)

    # Each could fail: the base may judge, attempts may stay, a longer budget may not help
    no_gap = "verdict gap of the base without one, largest"
    positions = "verdicts: mean of attempts 17 to 56 minus that of 1 to 16"
    attempts = "attempts (of 256 tokens), after over before"
    rises = "rise of pass@1 at the training budget"
    longer = "pass@1 at 64 minus at 16 tokens: trained at 16 minus base"
    return [
        held("no gap", no_gap, "no gap", gap, "<=", 0.5),
        held("positions", positions, "-", far_minus_near, ">=", -0.05),
        held("attempts", f"{attempts}, gap", "grow", grown["full"], ">=", 2.5),
        held("attempts no gap", f"{attempts}, no gap", "flat", grown["no gap"], "<=", 1.15),
        held("rise", f"{rises}, gap", "0.2 to 0.5", rise["full"], ">=", 0.30),
        held("rise no gap", f"{rises}, no gap", "about 0", rise["no gap"], "<=", 0.04),
        held("extrapolation", longer, "+0.11", more - base_more, ">=", 0.1, both),
    ]


def main():
    config = parse_args(Config, __doc__)
    device = pick_device(config.device)
    size = sum(p.numel() for p in build(config, device).parameters())
    with Run(config) as run:
        run.introduce(device, size)
        for seed in seeds_of(config):
            bases = {kind: warm_up(config, run, seed, device, kind) for kind in BASES}
            base = bases["gap"]
            run.log_once(
                partial(verdicts_by_place, base, config, seed), phase="places", seed=seed, step=0
            )
            # Three arms: the method, a base that can't judge, a budget of three attempts
            trained = train(config, run, "full", seed, base, config.budget)
            train(config, run, "no gap", seed, bases["no gap"], config.budget)
            train(config, run, "budget 16", seed, base, 16)
        # of the last seed
        show(run, config.size, config.budget, base=base, trained=trained)
        run.finish(*figure(config, run))


if __name__ == "__main__":
    command(main)
