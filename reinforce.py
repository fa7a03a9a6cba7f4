"""reinforce.py: reinforcement learning with a verifier, whole: from `logprobs` to `reinforce`.

A small GPT has read answers to column additions (tasks/addition.py) whose authors take the columns
in any order and guess the carries that they do not know yet: it is right about one time in three.

    b9B3a7A5=          97 + 35: column b holds 9 and 3, column a (the units) 7 and 5
    a7A5012b9B3113     right: column a first, 7 + 5 with carry 0 is 12; then b, 9 + 3 with 1 is 13
    b9B3012a7A5012     wrong: column b first, its carry guessed to be 0

A small letter stands before a digit of the first number, a capital before one of the second. Seven
characters are one column: its four, the carry that comes in, its sum in two digits. Only the last
digits of the sums count: 32 for 132.

Nobody shows it a better answer. It writes several answers to each problem, a program says which are
right, and two equations do the rest (REINFORCE, Williams 1992, with the mean of the same problem's
rewards as the baseline):

    advantage_i = reward_i - mean of the rewards of the same problem's answers
    loss = - sum_{i,t} advantage_i * log p(token_{i,t} | problem, tokens before) / number of tokens

The gradient raises every token of an answer that was better than its siblings, and lowers every
token of one that was worse. Where all are right, or all wrong, the gradient is 0. The tokens that
are counted are those of all answers of a step.

    python reinforce.py                     a minute on two cores
    python reinforce.py --task countdown    another task; or your own: --task path/to/mytask.py

What to see: held-out success rises from about .3 to over .9 in 40 steps, and the answers printed at
the end work from right to left. The loss stays around 0 and says nothing: watch the reward.

What grpo.py adds: advantages divided by their spread, several steps on one batch with a clip, other
ways to average, a KL to the base, dynamic sampling, pass@k, and log-probabilities that never hold
the logits of a whole vocabulary.
"""

import copy
import random
from dataclasses import dataclass

import matplotlib.pyplot as plt
import torch

import tasks
from engine import generate
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
from meter import Meter
from model import GPT, GPTConfig

PROBLEMS = 32  # in each step
GROUP = 8  # answers to each of them


@dataclass
class Config(Flags):
    task: str = flag(
        "addition", "addition, countdown, another of tasks.TASKS, or a file like those in tasks/"
    )
    size: int = flag(4, "how large a problem is: columns, or numbers", low=1, high=8)
    warm_up: int = flag(600, "steps of imitation, which make the base model", quick=5, low=1)
    steps: int = flag(40, "steps of reinforcement learning", quick=2, low=1)
    lr: float = flag(3e-4, "learning rate of reinforcement learning", low=0)


def logprobs(model, ids):
    """The log-probability of each token of ids (B, T) given those before it -> (B, T - 1)."""
    logp = model(ids[:, :-1]).log_softmax(-1)  # (B, T - 1, V)
    return logp.gather(2, ids[:, 1:, None]).squeeze(2)  # (B, T - 1)


def imitate(config, task, run, seed, device):
    """Next-token prediction on demonstrations -> the base model."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    V = task.tokenizer.n_vocab
    shape = GPTConfig(
        V,
        block_size=256,
        n_layer=2,
        n_head=8,
        n_embd=128,
        qk_norm=True,  # attention's queries and keys are normalised: it stays stable
    )
    model = GPT(shape).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), fused=True)
    # run.loop takes a name, the number of steps, and all that changes from step to step: it saves
    # that now and then, so that --resume can go on from there
    for step in run.loop(f"imitation {seed}", config.warm_up, model, optimizer, rng):
        # the lower of two lines: one goes up for 50 steps, one down to 0 at the end
        optimizer.param_groups[0]["lr"] = 3e-3 * min((step + 1) / 50, 1 - step / config.warm_up)
        # in smaller problems the rule of a column is learnt sooner
        problems = [task.draw(rng, rng.randint(1, config.size)) for _ in range(32)]
        pairs = [(task.prompt(p), task.demonstrate(rng, p)) for p in problems]
        ids, mask = (x.to(device) for x in tasks.padded(pairs, task.tokenizer))
        mask = mask[:, 1:]  # (32, T - 1): a row's first token has no log-probability
        loss = -(logprobs(model, ids) * mask).sum() / mask.sum()
        optimizer.zero_grad()
        loss.backward()
        descend(optimizer, loss)  # cuts the gradient to norm 1, then optimizer.step()
    return model


def answer(model, task, problems, n, size, generator):
    """n answers to each of P problems -> the rollout, their texts, their rewards (P, n)."""
    stop = task.tokenizer.stop
    prompts = [task.tokenizer.encode(task.prompt(p)) for p in problems]
    # Sampled from the model as it is (temperature 1), without gradients. A row of rollout.ids is a
    # problem, its answer, padding; rollout.mask is 1 on the answer and the token that ends it
    rollout = generate(model, prompts, n, task.budget(size), stop=stop, generator=generator)
    texts = rollout.texts(task.tokenizer)
    ended = rollout.ended(stop).tolist()  # an answer that did not end is wrong
    rewards = [task.reward(problems[i // n], text) * ended[i] for i, text in enumerate(texts)]
    return rollout, texts, torch.tensor(rewards).float().view(-1, n)


def held_out(model, task, config):
    """The fraction of right answers to problems that are never trained on, and what one costs."""
    # The same problems and random numbers at every measurement: only the model differs
    meter = Meter()
    rng = random.Random("held out")
    generator = torch.Generator().manual_seed(0)
    problems = [
        task.draw(rng, config.size, held_out=True) for _ in range(8 if config.quick else 128)
    ]
    _, _, rewards = answer(model, task, problems, 4, config.size, generator)
    # meter.solved: the floating-point operations since `meter` was made, for each right answer
    return dict(success=rewards.mean().item(), **meter.solved(rewards.sum()))


def reinforce(config, task, run, seed, base):
    """REINFORCE from the base -> the trained model."""
    model = copy.deepcopy(base)
    # random numbers are drawn on the CPU, the same for every device
    rng = random.Random(seed + 1)
    generator = torch.Generator().manual_seed(seed + 1)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=config.lr,
        betas=(0.9, 0.95),
        weight_decay=0.0,
        fused=True,
    )
    phase = f"reinforce {seed}"
    if phase not in run.state:  # not when it goes on after an interrupt
        run.log(seed=seed, step=0, **held_out(model, task, config))
    for step in run.loop(phase, config.steps, model, optimizer, rng, generator):
        # 1. Problems, answers, and which of them are right
        problems = [task.draw(rng, config.size) for _ in range(PROBLEMS)]
        rollout, _, rewards = answer(model, task, problems, GROUP, config.size, generator)
        # 2. How much better each answer is than its siblings
        advantage = rewards - rewards.mean(1, keepdim=True)  # (P, G)
        # (P * G, 1): one number for all tokens of an answer
        advantage = advantage.view(-1, 1).to(rollout.ids.device)
        # 3. The loss, on the answers' tokens only. Their log-probabilities are computed again:
        # those of the sampling (rollout.logp) have no gradients
        mask = rollout.mask[:, 1:]  # (P * G, T - 1), as the log-probabilities
        loss = -(advantage * logprobs(model, rollout.ids) * mask).sum() / mask.sum()
        optimizer.zero_grad()
        loss.backward()
        descend(optimizer, loss)
        row = dict(reward=rewards.mean().item(), loss=loss.item())
        if step % 10 == 9 or step + 1 == config.steps:
            row |= held_out(model, task, config)
            run.say(success=row["success"])  # beside the progress bar
        run.log(seed=seed, step=step + 1, **row)
    return model


def figure(config, run):
    """The figure and its claims, from the rows of the run."""
    fig, ax = plt.subplots(figsize=(7, 4.5), layout="constrained")
    band(ax, *series(run, "reward"), "training problems", alpha=0.5)
    steps, success = series(run, "success")  # (seeds, measurements)
    band(ax, steps, success, "held-out problems", marker="o")
    before, after = success[:, 0], success[:, -1]
    title = f"Told only right or wrong: success {before.mean():.2f} → {after.mean():.2f}"
    ax.set(title=title, xlabel="step", ylabel="right answers (fraction)", ylim=(0, 1))
    ax.legend()
    source, n = "design of the task", config.seeds
    gain = after - before
    # name, what is measured, whose claim, the paper's number ("-": none), ours, the comparison and
    # the threshold that it has to pass, seeds
    return fig, [
        claim("trained", "success after, worst seed", source, "-", after.min(), ">=", 0.9, n),
        claim("gain", "success after minus before", source, "-", gain, ">=", 0.5, n),
    ]


def main():
    config = parse_args(Config, __doc__)
    device = pick_device(config.device)
    task = tasks.load(config.task)
    problems = [task.draw(random.Random(i), config.size, held_out=True) for i in range(3)]
    with Run(config) as run:
        for seed in seeds_of(config):
            base = imitate(config, task, run, seed, device)
            trained = reinforce(config, task, run, seed, base)
        # What the models of the last seed write
        examples = {}
        for name, model in (("base", base), ("trained", trained)):
            generator = torch.Generator().manual_seed(0)
            _, texts, rewards = answer(model, task, problems, 1, config.size, generator)
            examples[name] = list(zip(texts, rewards.flatten().tolist(), strict=True))
        run.samples([task.prompt(p) for p in problems], **examples)
        run.finish(*figure(config, run))


if __name__ == "__main__":
    command(main)
