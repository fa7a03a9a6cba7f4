"""selfteach.py: a model as its own teacher: the base model, told more than the student.

    python selfteach.py                  two kinds of hints, nine ways to learn from them, 3 seeds:
                                         7 minutes on two cores
    python selfteach.py --arms opsd      rows of METHODS, for the password only

The task is a map that only the weights know (tasks/walks.py): a right answer is a walk between two
places, or this pair's password and nothing else. Told the password and two places on the way, the
base model is nearly always right, half of the time by the password; told a rule, it calls a place
by its alias. Without a hint it finds a far place once in ten times. The student never sees the
hint: an answer is scored once after the student's prompt (p) and once after the teacher's (q),
position by position.

    loss = sum_t m_t w_t D(p, q)_t / sum_t m_t

A method is a row of METHODS, five choices:

    1. rollout     who writes the answers y: the student, or the teacher
    2. teacher     self, the frozen base model with the hint; live, today's student with the hint;
                   pedagogue, the base with the hint, trained to be right in a way that the student
                   finds plausible; none
    3. divergence  D: reverse KL(p|q), or token -log p(y)
    4. mask        m: all tokens; gap, where log p(y) and log q(y) differ most; judge, only what
                   matters of where they differ most (RMSD); verified, the answers that are right
    5. weight      w: one; clip, 0 where D is large; gate, small where p finds y implausible;
                   advantage (GRPO: no teacher at all)

How this differs from the papers:
1. Their models have billions of parameters and answers of thousands of tokens. Here an answer has
   at most 18, so RMSD keeps 4 of 8 positions (5 of 20).
2. RMSD's judge is a language model. Ours accepts tokens that name places (and EOS); under a rule
   only the renamed place and its alias.
3. OPSD's code clips each token of the vocabulary under JSD; our clip gives weight 0 to positions
   whose reverse KL is above 0.5 nats (they still count in the mean).
4. GRPO takes one step per batch (no ratio, no clip), and the mean over all tokens.
5. Seeds vary prompts and samples. The base model is the same for all seeds, and evaluations draw
   the same random numbers for all arms.

What to see: a student can learn what its teacher knows from the weights they share (the map), or
from a hint that is always the same (a rule), but not what is told anew for each pair. Its success
rises, then falls as it learns to say passwords, any of them, that it cannot know. A clip or a judge
stops it. Watch pass@1 and password_rate together.
"""

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import matplotlib.pyplot as plt
import torch

from engine import generate
from experiment import (
    Flags,
    Run,
    UserError,
    claim,
    command,
    descend,
    flag,
    parse_args,
    pick_device,
    seeds_of,
)
from tasks.walkers import (
    advantages,
    alive,
    answer_logprobs,
    at,
    curves,
    end,
    evaluate,
    first_at,
    from_scratch,
    model_files,
    over,
    shape,
    show,
)
from tasks.walks import (
    ALIASES,
    ANSWER,
    EOS,
    PLACES,
    PROMPT,
    RENAMED,
    far_task,
    prompt,
    prompt_with_password,
    prompt_with_rule,
    rule_task,
)

# fmt: off
#  name:        rollout, teacher, divergence, mask, weight
METHODS = {
    "opsd": ("student", "self", "reverse", "all", "one"),           # Zhao et al., arXiv 2601.18734
    "opsd_live": ("student", "live", "reverse", "all", "one"),
    "opsd_clip": ("student", "self", "reverse", "all", "clip"),
    "rmsd": ("student", "self", "reverse", "judge", "one"),         # Applied Compute 2026
    "rmsd_no_judge": ("student", "self", "reverse", "gap", "one"),
    "imitation": ("teacher", "self", "token", "verified", "one"),
    "grpo": ("student", None, "token", "all", "advantage"),         # Shao et al., arXiv 2402.03300
    "pedagogical": ("teacher", "pedagogue", "token", "verified", "gate"),   # Chakraborty et al.
    "pedagogical_no_gate": ("teacher", "pedagogue", "token", "verified", "one"),
}
# fmt: on
# What the figure compares: with a password, with a rule, with a teacher that is trained
SECRET_ARMS = "opsd,opsd_live,opsd_clip,rmsd,rmsd_no_judge,imitation"
RULE_ARMS = {f"{method}, rule": method for method in ("opsd", "rmsd", "grpo")}
PEDAGOGUES = "pedagogue", "pedagogue, reward only"
STUDENTS = "pedagogical", "pedagogical, reward only"


@dataclass
class Config(Flags):
    seeds: int = flag(3, "repeat over this many seeds", quick=1, low=1, high=1000)
    arms: str = flag(SECRET_ARMS, "rows of METHODS, for the password; others: only these")
    steps: int = flag(150, "of a method (rule, pedagogical: 100; pedagogue: 50)", quick=2, low=1)
    batch: int = flag(64, "answers per step", quick=8, low=8, high=4096)
    group: int = flag(8, "answers per prompt where there is no teacher (grpo)", quick=4, low=2)
    lr: float = flag(1e-3, "learning rate: 5 steps of warm-up; rule: 0.3 of it", low=0, high=1)
    clip: float = flag(0.5, "opsd_clip: no gradient where D is larger (nats)", low=0)
    n_embd: int = flag(64, "channels of the model", quick=32, low=8, high=1024)
    sft_steps: int = flag(1800, "steps of training the base model", quick=10, low=1)
    eval_every: int = flag(10, "steps between evaluations (rule: at most 2)", low=1)
    eval_prompts: int = flag(256, "held-out pairs of places", quick=16, low=1, high=256)

    def __post_init__(self):
        possible = [name for name, (_, teacher, *_) in METHODS.items() if teacher != "pedagogue"]
        unknown = sorted(set(self.methods) - set(possible))
        if unknown:
            names = ", ".join(possible)
            raise UserError(f"--arms: no such method: {', '.join(unknown)}; there are {names}")
        if len(set(self.methods)) < len(self.methods):
            raise UserError(f"--arms {self.arms}: a method stands there twice")
        grouped = "group" not in self.idle() and self.group > 0  # ranges are checked later
        if grouped and self.batch % self.group:
            raise UserError(f"--batch {self.batch} is no multiple of --group {self.group}")
        shape(self.n_embd)  # an error if there is no such model

    @property
    def methods(self):
        return self.arms.split(",")

    @property
    def complete(self):
        """Whether all arms are trained that the figure and its claims are about."""
        return self.arms == SECRET_ARMS

    def idle(self):
        """The flags that do nothing beside the others -> {field: why}."""
        useful_to = {"group": "advantage", "clip": "clip"}  # flag -> the weight that reads it
        weights = {METHODS[arm][4] for arm in (METHODS if self.complete else self.methods)}
        return {
            name: f"no arm has the weight {weight}"
            for name, weight in useful_to.items()
            if weight not in weights
        }


@dataclass
class Hint:
    teacher_prompt: Callable  # pair -> the prompt that tells it
    judged: tuple  # RMSD's judge: the tokens that matter
    recall: int  # RMSD: of the `recall` positions where student and teacher differ most,
    keep: int  # those that matter, at most `keep`


PASSWORD = Hint(prompt_with_password, (*range(PLACES), EOS), recall=8, keep=4)
RULE = Hint(prompt_with_rule, (RENAMED[0], ALIASES[0]), recall=6, keep=2)


# ------------------------------------------------------------------------------------------------
# The loss


def log_prob(lp, y):
    """log p(y): lp (B, T, V), y (B, T) -> (B, T)."""
    return lp.gather(2, y[..., None]).squeeze(2)


def divergence(lp, lq, y, kind):
    """D at each position (B, T), from the log-probabilities of student lp and teacher lq (B, T, V)
    and the tokens y (B, T) that stand there."""
    if kind == "token":
        return -log_prob(lp, y)
    return (lp.exp() * (lp - lq)).sum(-1)  # reverse: KL(p|q), over the whole vocabulary


def largest(gap, k):
    """1.0 at the k largest finite values of each row of gap (B, T), else 0.0."""
    values, index = gap.topk(min(k, gap.shape[1]))  # (B, k)
    return torch.zeros_like(gap).scatter(1, index, (values > -torch.inf).to(gap.dtype))


def choose_mask(kind, mask, gap, accepted, rewards, recall, keep):
    """m (B, T) from the answers' mask (B, T).

    gap (B, T): |log p(y) - log q(y)|; accepted (B, T): the judge's verdict; rewards (B,). gap keeps
    the `keep` positions where it is largest. judge is RMSD's two steps: the `recall` positions of
    largest gap; of those the accepted ones, at most `keep`.
    """
    if kind == "verified":
        return mask * (rewards > 0)[:, None]
    if kind == "all":
        return mask
    gap = gap.masked_fill(mask == 0, -torch.inf)  # padding is never chosen
    if kind == "judge":
        gap = gap.masked_fill(largest(gap, recall) * accepted == 0, -torch.inf)
    return largest(gap, keep)


def choose_weight(kind, d, m, logp, rewards, group, clip, slope=2.0, gamma=-4.0):
    """w (B, T), detached. d (B, T): the divergence; m (B, T): the mask; logp (B, T): log p(y);
    rewards (B,). slope and gamma are the gate's (Pedagogical RL)."""
    if kind == "clip":
        return (d < clip).float()
    if kind == "gate":
        # Half at log p(y) = gamma; divided by its mean, so that the step is as long as without
        w = torch.sigmoid(slope * (logp.detach() - gamma))
        return w * m.sum() / (w * m).sum().clamp_min(1e-6)
    if kind == "advantage":
        return advantages(rewards.view(-1, group)).view(-1, 1).expand_as(d)
    return torch.ones_like(d)


def loss_of(method, lp, lq, y, mask, rewards, hint, config):
    """The whole family: sum m w D / sum m. lp, lq (B, T, V), lq None where neither D nor m needs a
    teacher; y, mask (B, T); rewards (B,), prompt by prompt."""
    _, _, divergence_kind, mask_kind, weight_kind = METHODS[method]
    d = divergence(lp, lq, y, divergence_kind)
    logp = log_prob(lp, y)
    # How far the two are apart about the token that was written
    gap = None if lq is None else (logp - log_prob(lq, y)).detach().abs()
    accepted = torch.isin(y, torch.tensor(hint.judged, device=y.device))
    m = choose_mask(mask_kind, mask, gap, accepted, rewards, hint.recall, hint.keep)
    w = choose_weight(weight_kind, d.detach(), m, logp, rewards, config.group, config.clip)
    return (m * w * d).sum() / m.sum().clamp_min(1)


def proximity(lp, y, mask, spike=5.0, strength=1.0):
    """G (B,) in (0, 1] of Pedagogical RL: how plausible the student p finds an answer, its worst
    token counting most.

    exp(-strength / spike * log mean_t exp(spike * gap_t)) with gap_t = max log p - log p(y_t): the
    mean gap for spike -> 0, the largest for infinity.
    """
    gap = lp.max(-1).values - log_prob(lp, y)  # (B, T), 0 for the student's favourite
    log_mean = (spike * gap).masked_fill(mask == 0, -torch.inf).logsumexp(1) - mask.sum(1).log()
    return (-strength / spike * log_mean).exp()


# ------------------------------------------------------------------------------------------------
# Training


def collect(writer, ask, pairs, task, generator):
    """One answer of the writer to each pair -> tokens (B, T), mask (B, T), rewards (B,)."""
    prompts = [ask(pair) for pair in pairs]  # PROMPT tokens each, with a hint or without
    rollout = generate(
        writer,
        prompts,
        n=1,
        max_new_tokens=ANSWER,
        stop=EOS,
        generator=generator,
    )
    rewards = [task.reward(*answer) for answer in zip(pairs, rollout.tokens(), strict=True)]
    y = rollout.ids[:, PROMPT:]
    return y, rollout.mask[:, PROMPT:], torch.tensor(rewards, device=y.device)


def read(reader, ask, pairs, y):
    """The answers y (B, T) after the reader's own prompts -> its log-probabilities (B, T, V)."""
    prompts = torch.tensor([ask(pair) for pair in pairs], device=y.device)
    return answer_logprobs(reader, torch.cat((prompts, y), 1))


def train(
    config, run, arm, seed, base, task, hint, method=None, pedagogue=None, ask=prompt, meter=None
):
    """A row of METHODS (default: the arm's name) from the base -> the trained model.

    ask: pair -> what the trained model sees; meter: the base, which stands for a student: the
    reward is multiplied by how plausible it finds the answer after a plain prompt (`proximity`).
    """
    method = method or arm
    # 1. A copy of the base, its teacher, two random streams: pairs, and everything else
    author, who, divergence_kind, mask_kind, weight_kind = METHODS[method]
    phase = f"{arm} {seed}"
    model = copy.deepcopy(base)
    teacher = {"self": base, "live": model, "pedagogue": pedagogue, None: None}[who]
    optimizer = torch.optim.AdamW(
        model.parameters(), config.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True
    )
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    group = config.group if weight_kind == "advantage" else 1
    eval_seed = 10_000 + 1000 * seed  # the same random numbers for every arm
    kept = dict(sampled=0)
    if phase not in run.state:  # not when it goes on after an interrupt
        row = evaluate(model, task, config, eval_seed, ask)
        run.log(phase="train", arm=arm, seed=seed, step=0, sampled_tokens=0, **row)
    # run.loop counts the steps, and saves what it is given, so that --resume can go on from there
    for step in run.loop(phase, config.steps, model, optimizer, rng, generator, kept):
        for parameters in optimizer.param_groups:
            parameters["lr"] = config.lr * min(1, (step + 1) / 5)
        # 2. Pairs, answers, rewards
        asked = rng.choices(task.train, k=config.batch // group)
        pairs = [pair for pair in asked for _ in range(group)]
        writer = (teacher, hint.teacher_prompt) if author == "teacher" else (model, ask)
        y, mask, rewards = collect(*writer, pairs, task, generator)
        # 3. What the teacher thinks of them, and how plausible the meter finds them
        lq, near = None, torch.ones_like(rewards)
        with torch.no_grad():
            # whatever asks the teacher is named here
            if divergence_kind != "token" or mask_kind in ("gap", "judge"):
                lq = read(teacher, hint.teacher_prompt, pairs, y)  # (B, T, V)
            if meter:
                near = proximity(read(meter, prompt, pairs, y), y, mask)  # (B,)
        # 4. The loss, a step
        lp = read(model, ask, pairs, y)  # (B, T, V)
        loss = loss_of(method, lp, lq, y, mask, rewards * near, hint, config)
        optimizer.zero_grad()
        loss.backward()
        norm = descend(optimizer, loss)  # cuts the gradient and steps -> its norm before
        kept["sampled"] += int(mask.sum())
        # 5. Log
        if (step + 1) % config.eval_every == 0 or step + 1 == config.steps:
            row = evaluate(model, task, config, eval_seed + step + 1, ask)
            row |= dict(loss=loss.item(), grad_norm=norm, reward=rewards.mean().item())
            row |= dict(changed=float(author == "teacher"), sampled_tokens=kept["sampled"])
            if meter:
                row["proximity"] = near.mean().item()
            run.log(phase="train", arm=arm, seed=seed, step=step + 1, **row)
            run.say(**{"pass@1": row["pass@1"], "passwords": row["password_rate"]})
    return model


def train_with_password(config, run, base, task):
    """Each pair has its own hint -> {arm: the model of the last seed}."""
    trained = {}
    for seed in seeds_of(config):
        for arm in config.methods:
            trained[arm] = train(config, run, arm, seed, base, task, PASSWORD)
    return trained


def train_with_rule(config, run, seed, base):
    """The hint is the same for all pairs."""
    steps = min(config.steps, 100)
    every = min(config.eval_every, 2)
    config = replace(config, steps=steps, eval_every=every, lr=0.3 * config.lr)
    for arm, method in RULE_ARMS.items():
        train(config, run, arm, seed, base, rule_task(), RULE, method=method)


def train_with_pedagogue(config, run, seed, base, task):
    """First the teacher, which sees the hint, learns to be right, and with a meter also plausible;
    then the student learns from it."""
    teaching = replace(config, steps=min(config.steps, 50))
    learning = replace(config, steps=min(config.steps, 100))
    # meter of the teacher, method of the student: with both of the paper's ideas, and without
    pairs = (base, "pedagogical"), (None, "pedagogical_no_gate")
    arms = zip(PEDAGOGUES, STUDENTS, pairs, strict=True)
    for teacher_arm, student_arm, (meter, method) in arms:
        how = dict(method="grpo", ask=prompt_with_password, meter=meter)
        pedagogue = train(teaching, run, teacher_arm, seed, base, task, PASSWORD, **how)
        how = dict(method=method, pedagogue=pedagogue)
        train(learning, run, student_arm, seed, base, task, PASSWORD, **how)


# ------------------------------------------------------------------------------------------------
# The figure


def figure(config, run):
    rows = 2 if config.complete else 1
    size = (16, 4.5 * rows)
    fig, axes = plt.subplots(rows, 3, figsize=size, layout="constrained", squeeze=False)
    success, leak, third = axes[0]
    title = "The hint is a password: "
    curves(success, run, config.methods, "pass@1", title + "success", "held-out pass@1")
    curves(leak, run, config.methods, "password_rate", title + "leak", "fraction of answers")
    if not config.complete:  # the title and the claims are about all
        title = "Drift: style A, which means nothing (base .25)"
        curves(third, run, config.methods, "formal", title, "fraction of style words")
        success.legend()
        return fig, []
    title = "Pedagogical RL, the student (without its teacher's tokens)"
    curves(third, run, STUDENTS, "pass@1", title, "held-out pass@1")
    obeyed, drift, passwords = axes[1]
    title = "The hint is a rule: "
    named = "of the answers that name it"
    curves(obeyed, run, RULE_ARMS, "renamed", title + "the place is renamed", named, unit="step")
    words = "fraction of style words"
    curves(drift, run, RULE_ARMS, "formal", title + "drift to style A", words, unit="step")
    title = "Pedagogical RL, its teacher: passwords"
    curves(passwords, run, PEDAGOGUES, "password_rate", title, "fraction of answers")
    for ax in axes.flat:
        ax.legend()
    rule = end(run, "opsd, rule", "renamed").mean()
    told = end(run, "opsd", "password_rate").mean()
    fig.suptitle(
        f"Its own teacher (opsd): a shared rule is obeyed in {rule:.2f} of the answers that "
        f"name the place, a password that cannot be known is told in {told:.2f} "
        f"({config.seeds} seeds)"
    )
    return fig, [*rule_claims(config, run), *password_claims(config, run)]


PRIVILEGED = "arXiv 2605.11182"
OPSD_CODE = "arXiv 2601.18734, code"
RMSD = "Applied Compute 2026"
PEDAGOGY = "Chakraborty et al. 2026"


# end: of each seed, the mean of the last third of the evaluations (default: of pass@1)
def rule_claims(config, run):
    n = config.seeds
    obeyed = end(run, "opsd, rule", "renamed")
    # alive: nan, of which no claim holds, for a model that answers nothing and so leaks nothing
    off_topic = alive(run, "opsd, rule", end(run, "opsd, rule", "off_topic"))
    # Steps until the rule is obeyed nine times in ten, and how far the style has drifted by then
    fast = first_at(run, "rmsd, rule", 0.9, "renamed", "step")
    slow = first_at(run, "opsd, rule", 0.9, "renamed", "step")
    beside = f" ({fast.mean():.0f}, {slow.mean():.0f})"

    def drift(arm, step):
        return at(run, arm, step, "formal") - at(run, arm, 0, "formal")

    by_then = over(drift("rmsd, rule", fast), drift("opsd, rule", slow))
    last = min(config.steps, 100)
    at_end = over(drift("rmsd, rule", last), drift("opsd, rule", last))
    # fmt: off
    return [
        claim("rule", "OPSD, shared rule: obeyed where the place is named",
              PRIVILEGED, "works",
              obeyed, ">=", 0.9, n),
        claim("rule off topic", "OPSD, shared rule: aliases where none belong",
              RMSD, "specificity .93",
              off_topic, "<=", 0.05, n),
        claim("rmsd faster", "steps to .9 on the rule, RMSD over OPSD",
              RMSD, "about half",
              over(fast, slow), "<=", 0.8, n, beside),
        claim("rmsd drift", "drift to style A at .9 on the rule, RMSD over OPSD",
              RMSD, "-",
              by_then, "<=", 0.5, n),
        claim("rmsd drift end", "drift to style A at the end, RMSD over OPSD",
              RMSD, "-",
              at_end, "<=", 0.5, n),
        claim("grpo", "GRPO on the rule: never samples what it needs",
              RMSD, "RL never sees it",
              end(run, "grpo, rule", "renamed"), "<=", 0.02, n),
    ]
    # fmt: on


def password_claims(config, run):
    n = config.seeds
    arms = *config.methods, *STUDENTS
    success = {arm: end(run, arm) for arm in arms}
    beside = {arm: f" ({success[arm].mean():.2f})" for arm in arms}
    leak = {arm: end(run, arm, "password_rate") for arm in config.methods}
    clip = alive(run, "opsd_clip", leak["opsd_clip"])
    judge = alive(run, "rmsd", leak["rmsd"])
    plausible, reward_only = (at(run, arm, config.steps, "password_rate") for arm in PEDAGOGUES)
    # fmt: off
    return [
        claim("password", "OPSD, password: rate of passwords (pass@1)",
              PRIVILEGED, "fails",
              leak["opsd"], ">=", 0.3, n, beside["opsd"]),
        claim("live", "OPSD, live teacher: rate of passwords (pass@1)",
              "arXiv 2601.18734", "freeze it",
              leak["opsd_live"], ">=", 0.3, n, beside["opsd_live"]),
        claim("no judge", "RMSD without a judge: rate of passwords",
              RMSD, "-",
              leak["rmsd_no_judge"], ">=", 0.3, n),
        claim("judge", "RMSD: rate of passwords (pass@1)",
              RMSD, "-",
              judge, "<=", 0.02, n, beside["rmsd"]),
        claim("judge worst", "RMSD: rate of passwords, worst seed",
              RMSD, "-",
              judge.max(), "<=", 0.02, n),
        claim("judge success", "RMSD, pass@1 at the end",
              RMSD, "-",
              success["rmsd"], ">=", 0.83, n),
        claim("clip", "OPSD with clip: rate of passwords (pass@1)",
              OPSD_CODE, "clip added",
              clip, "<=", 0.02, n, beside["opsd_clip"]),
        claim("clip worst", "OPSD with clip: rate of passwords, worst seed",
              OPSD_CODE, "clip added",
              clip.max(), "<=", 0.02, n),
        claim("clip success", "OPSD with clip, pass@1 at the end",
              OPSD_CODE, "clip added",
              success["opsd_clip"], ">=", 0.83, n),
        claim("pedagogue", "pedagogue: rate of passwords, worst seed",
              PEDAGOGY, "-",
              alive(run, "pedagogue", plausible).max(), "<=", 0.05, n),
        claim("pedagogue reward", "pedagogue trained on the reward only: rate of passwords",
              PEDAGOGY, "-",
              reward_only, ">=", 0.9, n),
        claim("pedagogical", "Pedagogical RL, student's pass@1 (no proximity, no gate)",
              PEDAGOGY, "+40% relative",
              success["pedagogical"], ">=", 0.8, n,
              beside["pedagogical, reward only"]),
    ]
    # fmt: on


def main():
    config = parse_args(Config, __doc__)
    device = pick_device(config.device)
    task = far_task()
    with Run(config, also=model_files(config, "base")) as run:
        run.introduce(device, shape(config.n_embd).parameters)
        base = from_scratch(config, run, "base", device)
        trained = train_with_password(config, run, base, task)
        if config.complete:
            for seed in seeds_of(config):
                train_with_rule(config, run, seed, base)
                train_with_pedagogue(config, run, seed, base, task)
        show(run, task, base=base, **trained)
        run.finish(*figure(config, run))


if __name__ == "__main__":
    command(main)
