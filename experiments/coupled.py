"""coupled.py: easy problems and short answers, then hard ones and longer answers: does that beat
hard problems from the start?

(The coupled curriculum of e3, Setlur et al., arXiv 2506.09026, Section 6.) Stage 1 has four numbers
and 16 tokens, stage 2 eight numbers and B* tokens. With J(B), the success at a budget on the hard
problems after stage 1,

    B* = min { B >= B0 : J(2B) <= kappa J(B) }              (Eq. 6.1; B0 = 16 tokens)

Three rivals sample as many tokens: hard problems at B* from the start (`hard only`), four numbers
and then eight at B* (`data only`), eight numbers at 16 tokens and then at B* (`budget only`).

    python -m experiments.coupled           3 seeds, 25 minutes of two cores

What to see: the curriculum does not beat its rivals. It should help where short answers never
succeed; on eight numbers they do.
"""

import copy
import random
from dataclasses import dataclass
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import torch

import curriculum
from curriculum import (
    BUDGETS,
    LONGEST,
    SOURCE,
    adamw,
    build,
    draw_budgets,
    evaluate,
    practise,
    show,
    tested,
    told,
    warm_up,
)
from experiment import (
    Run,
    UserError,
    band,
    claim,
    command,
    flag,
    parse_args,
    pick_device,
    restore,
    seeds_of,
)
from tasks import numbers

EASY, HARD = 4, 8  # numbers in a problem
FIRST = BUDGETS[0]
GRID = BUDGETS[:-1]  # what the rule can pick
TESTS = (*BUDGETS, LONGEST)  # up to 4 times that
RIVALS = {"hard only": "+0.09", "data only": "more", "budget only": "+0.07"}  # by the paper


@dataclass
class Config(curriculum.Config):
    seeds: int = flag(3, "repeat over this many seeds", quick=1, low=1)
    stage_tokens: int = flag(
        400_000, "sampled tokens of each of the two stages, at most", quick=6_000, low=1
    )
    kappa: float = flag(
        1.2, "budget rule: doubling the budget must multiply the success by more", low=1
    )

    def idle(self):
        why = "the curriculum has its own problems and budgets, and counts tokens"
        return dict.fromkeys(("size", "budget", "steps"), why)


def budget_rule(success, kappa):
    """{budget: J} -> the smallest budget whose double was measured and does not multiply J by more
    than kappa (Eq. 6.1); the largest of them if there is none.

    Where J is 0 nothing was seen, no plateau either: measure pass@k instead, as the paper does.
    """
    budgets = [b for b in sorted(success) if 2 * b in success]
    plateau = (b for b in budgets if 0 < success[2 * b] <= kappa * success[b])
    return next(plateau, budgets[-1])


def judge(model, config, seed):
    """J(B) on hard problems: pass@1, or, where a budget sees next to none, pass@16."""
    for k in (1, 16):
        n = config.eval_prompts // (4 if k > 1 else 1)
        row = evaluate(model, HARD, BUDGETS, f"rule {seed}", n, held_out=False, k=k)
        J = {f"J of {b}": row[f"pass@{k} of {b}"] for b in BUDGETS}
        if min(J.values()) >= 0.01:
            break
    return {"k": k} | J


def rule(config, run, seed):
    """What stage 1 of a seed was found to be -> {budget: J}, the B* that follows."""
    row = next(r for r in run.rows if r["phase"] == "rule" and r["seed"] == seed)
    J = {b: row[f"J of {b}"] for b in BUDGETS}
    return J, budget_rule(J, config.kappa)


def train(config, run, arm, seed, base, stages, after=None):
    """GRPO from the base through stages of (numbers, budget, sampled tokens) -> the trained model.

    A stage ends where its next batch might sample more than its tokens. after: an arm whose state
    this one goes on with, optimizer and random streams included: its stages are the first of this
    arm's. So the curriculum is treated as its rivals are, and stage 1 is paid for once.
    """
    phase = f"{arm} {seed}"
    model = copy.deepcopy(base)
    optimizer = adamw(model, config)
    rng, generator = random.Random(seed + 1), torch.Generator().manual_seed(seed + 1)
    kept = {"sampled": 0}
    if after:
        before = run.state[f"{after} {seed}"]
        restore(before, model, optimizer, rng, generator)
        kept.update(before["kept"])
    limits = np.cumsum([tokens for *_, tokens in stages])  # sampled tokens at which a stage ends

    def stage():
        """(numbers, budget) of the next batch; None at the end."""
        for (size, budget, _), limit in zip(stages, limits, strict=True):
            if kept["sampled"] + config.prompts * config.group * budget <= limit:
                return size, budget
        return None

    def test(step, where, **row):
        n = config.eval_prompts if where else config.eval_prompts // 4
        # arms that end at different steps are tested on the same problems
        row |= evaluate(model, stages[-1][0], TESTS, f"{seed} {where or 'the end'}", n)
        run.log(phase="rl", arm=arm, seed=seed, step=step, sampled_tokens=kept["sampled"], **row)
        return row

    if phase not in run.state:
        test(0, "the start")
    for step in run.loop(
        phase, 10**9, model, optimizer, rng, generator, kept, until=lambda: stage() is None
    ):
        size, budget = stage()
        problems = [numbers.draw(rng, size) for _ in range(config.prompts)]
        row, sampled = practise(model, optimizer, problems, budget, config, generator)
        kept["sampled"] += sampled
        done = stage() is None
        if (step + 1) % config.eval_every == 0 or done:
            row = test(step + 1, "the end" if done else None, **row)
            run.say(success=row[f"pass@1 of {TESTS[-1]}"], attempts=row["attempts"])
    return model


def figure(config, run):
    n, tokens = config.seeds, config.stage_tokens
    rules = [rule(config, run, seed) for seed in seeds_of(config)]
    chosen = [b for _, b in rules]
    # (seeds, trained at, tested at)
    trained = np.stack([tested(run, f"stage 2 at {b}", budgets=TESTS) for b in GRID], 1)
    coupled = np.stack([trained[i, GRID.index(b)] for i, b in enumerate(chosen)])
    rivals = {arm: tested(run, arm, budgets=TESTS) for arm in RIVALS}

    def at_multiple(y, factor):
        """y (seeds, tests) at a multiple of each seed's own B* (seeds,)."""
        return np.array([row[TESTS.index(b * factor)] for row, b in zip(y, chosen, strict=True)])

    ahead = {
        arm: np.stack([at_multiple(coupled, f) - at_multiple(y, f) for f in (1, 2, 4)], 1)
        for arm, y in rivals.items()
    }  # (seeds, 3) each, paired
    lost = trained[:, :, -1].max(1) - coupled[:, -1]
    fig, axes = plt.subplots(1, 3, figsize=(18, 5), layout="constrained")
    base = tested(run, "hard only", False, TESTS)
    draw_budgets(
        axes[0],
        {"coupled": coupled} | rivals | {"base": base},
        f"Hard problems, {2 * tokens // 1000}k sampled tokens each; "
        f"B* = {', '.join(map(str, chosen))}",
        TESTS,
    )
    draw_ahead(axes[1], ahead)
    J = np.array([list(J.values()) for J, _ in rules])  # (seeds, budgets)
    stage_1 = np.pad(J, ((0, 0), (0, 1)), constant_values=np.nan)  # not measured at 512
    draw_budgets(
        axes[2],
        {"after stage 1": stage_1} | {f"stage 2 at {b}": trained[:, i] for i, b in enumerate(GRID)},
        f"B* against the best of {len(GRID)} budgets, at {LONGEST} tokens: {told(-lost)}",
        TESTS,
    )
    for b in set(chosen):
        axes[2].axvline(b, color="k", ls=":", lw=1)
    against = ", ".join(f"{told(y[:, 2])} against {arm}" for arm, y in ahead.items())
    fig.suptitle(
        f"Easy problems and short answers, then hard ones and longer answers: {against} "
        f"({n} seed{'s' * (n > 1)})"
    )
    claims = [
        claim(f"over {arm}", f"coupled minus {arm}, at 4x", SOURCE, paper, y, ">=", 0.03, n)
        for (arm, paper), y in zip(RIVALS.items(), (d[:, 2] for d in ahead.values()), strict=True)
    ]
    text = f"pass@1 at {LONGEST} tokens: best training budget minus B*'s"
    return fig, [*claims, claim("rule", text, SOURCE, "at the plateau", lost, "<=", 0.03, n)]


def draw_ahead(ax, ahead):
    for arm, y in ahead.items():
        band(ax, np.array([1, 2, 4]), y, f"coupled minus {arm}", marker="o")
    ax.axhline(0, color="k", lw=1)
    ax.set_title(
        "Coupled minus each rival at 4x: " + ", ".join(told(y[:, 2]) for y in ahead.values())
    )
    ax.set(xlabel="test budget over B*", ylabel="difference of pass@1, seed by seed", xscale="log")
    ax.set_xticks((1, 2, 4), (1, 2, 4))
    ax.minorticks_off()
    ax.legend()


def main():
    config = parse_args(Config, __doc__)
    device = pick_device(config.device)
    tokens, batch = config.stage_tokens, config.prompts * config.group * GRID[-1]
    if tokens < batch:
        raise UserError(f"--stage-tokens {tokens}: too few for a batch, which may sample {batch}")
    size = sum(p.numel() for p in build(config, device).parameters())
    with Run(config) as run:
        run.introduce(device, size)
        for seed in seeds_of(config):
            base = warm_up(config, run, seed, device)
            first = (EASY, FIRST, tokens)
            stage_1 = train(config, run, "stage 1", seed, base, [first])
            where = dict(phase="rule", seed=seed, step=0)
            run.log_once(partial(judge, stage_1, config, seed), **where)
            J, b = rule(config, run, seed)
            print(f"\nseed {seed}: J(B) of stage 1 on hard problems: {J} -> B* = {b}")
            coupled = {}
            for at in GRID:
                stages = [first, (HARD, at, tokens)]
                coupled[at] = train(config, run, f"stage 2 at {at}", seed, base, stages, "stage 1")
            last = (HARD, b, tokens)
            train(config, run, "hard only", seed, base, [(HARD, b, 2 * tokens)])
            train(config, run, "data only", seed, base, [(EASY, b, tokens), last])
            train(config, run, "budget only", seed, base, [(HARD, FIRST, tokens), last])
        show(run, HARD, LONGEST, base=base, trained=coupled[b])
        run.finish(*figure(config, run))


if __name__ == "__main__":
    command(main)
