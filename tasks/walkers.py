"""The models that walk the map of walks.py, and how their answers are measured.

The base model has seen short walks without hints and long ones with. Without a hint it finds a far
place once in ten times; with it almost always, half of the time by the password, and it then
prefers style A. The cold base has seen single moves only. The expert is a larger model that knows
the map.
"""

import math
import os
import random
from pathlib import Path

import numpy as np
import torch

from engine import generate
from experiment import UserError, band, descend, load_checkpoint, save_checkpoint, series
from meter import Meter
from model import GPT, GPTConfig
from tasks.walks import (
    ALIASES,
    ANSWER,
    EOS,
    PASSWORDS,
    PROMPT,
    PW,
    RENAMED,
    STYLES,
    VOCAB,
    base_documents,
    expert_documents,
    prompt,
    renames,
    reward,
    text,
)

BATCH = 64  # documents that a model reads in a step
LR = 6e-3  # up to this in 50 steps, then linear to 0

# ------------------------------------------------------------------------------------------------
# How they are trained


def shape(n_embd):
    """UserError for a width that four heads cannot share."""
    return GPTConfig(
        vocab_size=VOCAB,
        block_size=PROMPT + ANSWER,
        n_layer=2,
        n_head=4,
        n_embd=n_embd,
        n_hidden=4 * n_embd,
        qk_norm=True,
        tie=False,
    )


def answer_logprobs(model, ids):
    """ids (B, PROMPT + T) -> log p(. | what stands before) at each position of the answers
    (B, T, V)."""
    hidden = model.hidden(ids[:, :-1])[:, PROMPT - 1 :]  # (B, T, C)
    return model.lm_head(hidden).log_softmax(-1)  # (B, T, V)


def with_slips(rng, ids, mask, rate, learn):
    """Documents in which a fraction `rate` of the style words are slips of the pen, words of
    passwords -> ids, mask. learn: whether to make them, too."""
    slip = rng.random(ids.shape) < rate
    slip &= np.isin(ids, STYLES)
    words = rng.integers(PASSWORDS[0], PASSWORDS[-1] + 1, ids.shape)
    return np.where(slip, words, ids), mask & (learn | ~slip)


def cold_documents(rng, n):
    """Those of a base that has seen single moves only, where it had no hint."""
    return base_documents(rng, n, longest_plain=1)


DOCUMENTS = {"base": base_documents, "cold base": cold_documents, "expert": expert_documents}


def document_loss(model, name, slips, rng):
    """-log p of the tokens to learn in some documents of the model `name`, the mean."""
    draws = np.random.default_rng(rng.getrandbits(32))
    ids, mask = DOCUMENTS[name](draws, BATCH)
    ids, mask = with_slips(draws, ids, mask, slips, learn=name != "expert")
    device = model.lm_head.weight.device
    ids = torch.as_tensor(ids, device=device)
    mask = torch.as_tensor(mask[:, PROMPT:], device=device).float()  # (B, T)
    y = ids[:, PROMPT:, None]  # (B, T, 1)
    logp = answer_logprobs(model, ids).gather(2, y).squeeze(2)  # (B, T)
    return (-logp * mask).sum() / mask.sum()


def model_file(config, name):
    """The file in --out of the model `name`, and what is in it: {} without such a file. UserError
    for one that no run wrote."""
    file = name.replace(" ", "_") + ".pt"
    path = Path(config.out) / file
    saved = load_checkpoint(path) if os.path.lexists(path) else {}
    ours = isinstance(saved, dict) and (not saved or {"made_by", "model"} <= set(saved))
    if not ours:
        raise UserError(f"{path} is not a model that this script trained: choose another --out")
    return path, saved


def model_files(config, *names):
    """The names of the files in --out that models will be kept in."""
    return [model_file(config, name)[0].name for name in names]


def from_scratch(config, run, name, device, slips=0.0):
    """The model `name` (base, cold base, expert), trained, or loaded if an earlier run left it in
    --out. The same for all seeds. slips: a fraction of the style words that it reads."""
    expert = name == "expert"
    steps = config.expert_steps if expert else config.sft_steps
    torch.manual_seed(0)
    width = config.expert_embd if expert else config.n_embd
    model = GPT(shape(width)).to(device)
    # Whatever changes the model, the documents or the loss changes the first loss, too
    with torch.no_grad():
        first = document_loss(model, name, slips, random.Random(0)).item()
    made_by = dict(steps=steps, lr=LR, slips=slips, first_loss=first)
    kept = dict(made_by=made_by)
    path, saved = model_file(config, name)
    if saved.get("made_by") == made_by:
        model.load_state_dict(saved["model"])
        return model
    rng = random.Random(0)
    optimizer = torch.optim.AdamW(
        model.parameters(), LR, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    for step in run.loop(name, steps, model, optimizer, rng, kept=kept):
        lr = LR * min((step + 1) / 50, 1 - step / steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = document_loss(model, name, slips, rng)
        optimizer.zero_grad()
        loss.backward()
        descend(optimizer, loss)
        if step % 50 == 0 or step + 1 == steps:
            run.log(phase="pretrain", model=name, step=step, loss=loss.item())
            run.say(loss=loss.item())
    save_checkpoint(path, model=model.state_dict(), **kept)
    return model


# ------------------------------------------------------------------------------------------------
# What their answers are worth


def answer(model, pairs, ask, n, seed, temperature=1.0):
    """n answers to each pair's prompt, ask(pair) -> [(pair, tokens)]."""
    prompts = [ask(pair) for pair in pairs]
    generator = torch.Generator().manual_seed(seed)
    rollout = generate(
        model,
        prompts,
        n=n,
        max_new_tokens=ANSWER,
        temperature=temperature,
        stop=EOS,
        generator=generator,
    )
    repeated = [pair for pair in pairs for _ in range(n)]
    answers = rollout.tokens()
    return list(zip(repeated, answers, strict=True))


def mean(values):
    return sum(values) / len(values) if values else None


def advantages(rewards):
    """rewards (P, G) -> (P, G): minus the group's mean, over its standard deviation; exactly 0
    where all are equal.
    """
    equal = (rewards == rewards[:, :1]).all(1, keepdim=True)
    centred = torch.where(equal, 0.0, rewards - rewards.mean(1, keepdim=True))
    return centred / (rewards.std(1, keepdim=True) + 1e-4)


def evaluate(model, task, config, seed, ask=prompt):
    """Sampled once at temperature 1 for each held-out pair (few pairs: more often).

    pass@1; password_rate, of the answers; formal: style A, of the style words. Under a rule also
    renamed: how often it is obeyed where the place is named; off_topic: aliases where none belong.
    """
    pairs = task.test[: config.eval_prompts]
    n = max(1, config.eval_prompts // len(pairs))
    meter = Meter()
    answers = answer(model, pairs, ask, n, seed)
    rewards = [reward(*a) for a in answers]
    cost = meter.solved(sum(rewards))
    styles = [word for _, tokens in answers for word in tokens if word in STYLES]
    row = {
        "pass@1": mean(rewards),
        "password_rate": mean([tokens[0] == PW for _, tokens in answers]),
        "formal": mean([word == STYLES[0] for word in styles]),
        **cost,
    }
    if task.off_topic:
        names = {RENAMED[0], ALIASES[0]}
        named = [tokens for _, tokens in answers if names & set(tokens)]
        others = answer(model, task.off_topic, ask, 4, seed)
        row["renamed"] = mean([renames(tokens) for tokens in named])
        row["off_topic"] = mean([ALIASES[0] in tokens for _, tokens in others])
    return row


def show(run, task, **models):
    """What each model answers to three held-out problems."""
    pairs = task.test[:6:2]  # there, and not back
    written = {}
    for name, model in models.items():
        answers = answer(model, pairs, prompt, 1, 0)
        written[name] = [(text(tokens), reward(pair, tokens)) for pair, tokens in answers]
    run.samples([text(prompt(pair)) for pair in pairs], **written)


# ------------------------------------------------------------------------------------------------
# How curves are read: each returns a number of each seed (seeds,)


def measured(run, arm, key, **where):
    """A metric of an arm -> the steps at which all its seeds have it (n,), values (seeds, n); n is
    0 if a seed never has it."""
    x, y = series(run, key, phase="train", arm=arm, **where)
    seeds = len({row["seed"] for row in run.rows if row.get("arm") == arm})
    if len(y) < seeds:
        return x[:0], np.empty((seeds, 0))
    return x, y


def end(run, arm, key="pass@1"):
    """The mean of a metric over the last third of the steps; nan where it was never measured."""
    x, y = measured(run, arm, key)
    if not len(x):
        return np.full(len(y), math.nan)
    last_third = x > x[-1] * 2 / 3
    return y[:, last_third].mean(1)


def at(run, arm, step, key="pass@1"):
    """A metric at the first evaluation at or after a step (one, or one of each seed; nan for inf),
    or at the last one."""
    x, y = measured(run, arm, key)
    if not len(x):
        return np.full(len(y), math.nan)
    step = np.broadcast_to(step, len(y))
    reached = np.minimum(step, x[-1])
    column = np.searchsorted(x, reached)
    value = y[range(len(y)), column]
    return np.where(np.isfinite(step), value, math.nan)


def first_at(run, arm, level, key="pass@1", unit="sampled_tokens", **where):
    """Where a metric first reaches a level, in tokens or steps (linear between evaluations), or
    inf."""
    steps, y = measured(run, arm, key, **where)
    x = np.tile(steps, (len(y), 1))  # (seeds, n)
    if unit != "step":
        x = series(run, unit, phase="train", arm=arm, **where)[1]
    first = np.full(len(y), math.inf)
    for seed, above in enumerate(y >= level):
        if above.any():
            # Between the last evaluation below the level and the first above it
            i = above.argmax()
            before = max(0, i - 1)
            rise = y[seed, i] - y[seed, before]
            part = (level - y[seed, before]) / rise if i else 1
            width = x[seed, i] - x[seed, before]
            first[seed] = x[seed, i] - (1 - part) * width
    return first


def over(a, b):
    """a / b; nan, of which no claim holds, where either was never reached or b is 0."""
    good = np.isfinite(a) & np.isfinite(b) & (b != 0)
    divisor = np.where(good, b, 1)
    return np.where(good, a / divisor, math.nan)


def alive(run, arm, value):
    """value, but nan for a seed that is never right at the end: a model that answers nothing leaks
    nothing."""
    return np.where(end(run, arm) > 0, value, math.nan)


def curves(ax, run, arms, key, title, ylabel, unit="sampled_tokens"):
    """A metric of each arm against the tokens sampled so far, or against steps."""
    for i, arm in enumerate(arms):
        x, y = series(run, key, phase="train", arm=arm)
        if unit != "step":
            steps, tokens = series(run, unit, phase="train", arm=arm)
            column = np.searchsorted(steps, x)
            x = tokens.mean(0)[column] / 1e3
        dashes = "-" if i < 10 else "--"
        band(ax, x, y, arm, color=f"C{i}", ls=dashes)
    xlabel = "step" if unit == "step" else "sampled tokens (thousands)"
    ax.set(title=title, xlabel=xlabel, ylabel=ylabel, ylim=(-0.02, 1.02))
