"""tasks: what is asked, and how an answer is judged. A task is a module with the same few names:

    tokenizer                             text to ids and back; its id `eos` ends an answer
    SIZE                                  how large a problem is; reinforce.py and grpo.py have
                                          a flag --size
    budget(size)                          tokens that an answer may take
    draw(rng, size=SIZE, held_out=False)  a problem; a tenth of all is held out, never trained on
    prompt(problem)                       its text
    demonstrate(rng, problem)             an answer by somebody who knows the steps, without care
    reward(problem, text)                 1.0 if the answer is right, else 0.0

"Train on your own task" is: write such a file, then `--task path/to/mytask.py`.
"""

import importlib
import importlib.util
import os
import random
import traceback
import zlib
from pathlib import Path
from types import SimpleNamespace

import torch

from engine import Rollout, generate
from experiment import UserError, descend
from kernels import token_logprobs

# those of this folder that have these names; the others ask otherwise
TASKS = ("addition", "countdown", "dyck", "numbers", "paths", "pipelines", "safe", "totals")
NAMES = ("tokenizer", "SIZE", "budget", "draw", "prompt", "demonstrate", "reward")


def load(name):
    """The task of that name in this folder, or of a .py file -> the module. UserError if there is
    none, or if it lacks a name.
    """
    path = Path(__file__).parent / f"{name}.py" if name in TASKS else Path(name)
    if not name.endswith(".py") and name not in TASKS or not os.path.isfile(path):
        raise UserError(f"task {name}: no such .py file, and not one of {', '.join(TASKS)}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    task = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(task)
    except Exception as e:
        raise UserError(f"task {name}: {type(e).__name__}: {e}") from None
    if missing := [n for n in NAMES if not hasattr(task, n)]:
        raise UserError(f"task {name}: has no {', '.join(missing)}")
    try:
        try_out(task)
    except Exception as e:
        where = traceback.extract_tb(e.__traceback__)[-1]
        raise UserError(
            f"task {name}: {type(e).__name__}: {e} ({where.name}, line {where.lineno})"
        ) from None
    return task


def try_out(task):
    """What a beginner forgets, found before an earlier run's folder is touched. ValueError."""
    rng = random.Random(0)
    lengths = []  # of demonstrations, with the token that ends them
    for i in range(40):
        problem = task.draw(rng, task.SIZE, held_out=i % 2 == 0)
        text = task.demonstrate(rng, problem)
        task.tokenizer.encode(task.prompt(problem))
        lengths.append(len(task.tokenizer.encode(text)) + 1)
        for answer in (text, "", text[::-1]):
            if task.reward(problem, answer) not in (0, 1):
                raise ValueError(f"the reward of {answer!r} is neither 0 nor 1")
    usual = sorted(lengths)[20]
    if usual > task.budget(task.SIZE):
        raise ValueError(f"answers take {usual} tokens, with their end: past the budget")


def held_out(text):
    """Whether the problem with this text is held out: a tenth of all texts, by a hash, the same on
    every machine.
    """
    return zlib.crc32(text.encode("utf-8", "surrogatepass")) % 10 == 0


def tries(size, held_out):
    """For a `draw` that draws until a problem falls on the side that is asked for: it ends in a
    UserError where none does.
    """
    yield from range(10_000)
    side = "held-out" if held_out else "training"
    raise UserError(f"no {side} problem of size {size}: the task has too few problems")


def answer(model, task, problems, n, budget, generator, temperature=1.0, at_once=None):
    """n answers of at most `budget` tokens to each of P problems -> Rollout of R = P * n rows,
    their texts, their rewards (P, n). An answer that did not end is wrong.

    at_once: problems, all without it. Many rows at a time are slower on a CPU.
    """
    stop = task.tokenizer.stop
    prompts = [task.tokenizer.encode(task.prompt(problem)) for problem in problems]
    at_once = at_once or len(prompts)
    parts = []
    for i in range(0, len(prompts), at_once):
        some = prompts[i : i + at_once]
        part = generate(
            model,
            some,
            n=n,
            max_new_tokens=budget,
            temperature=temperature,
            stop=stop,
            generator=generator,
        )
        parts.append(part)
    rollout = Rollout.cat(parts)
    texts = rollout.texts(task.tokenizer)
    ended = rollout.ended(stop).tolist()
    rewards = [task.reward(problems[i // n], text) * ended[i] for i, text in enumerate(texts)]
    return rollout, texts, torch.tensor(rewards).view(-1, n)


def pass_at_k(n, correct, k):
    """Unbiased pass@k (Chen et al., arXiv 2107.03374): 1 - C(n - c, k) / C(n, k) of each problem.

    correct (...): how many of n answers are right. ValueError unless 1 <= k <= n.
    """
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs 1 <= k <= n, have n = {n} samples")
    c = torch.as_tensor(correct).double()
    # C(n - c, k) / C(n, k) is the product of 1 - c / j over these j: 0 once c > n - k
    j = torch.arange(n - k + 1, n + 1, dtype=torch.float64)
    return 1 - (1 - c[..., None] / j).prod(-1)


def padded(pairs, tokenizer):
    """(prompt, answer) texts -> ids (B, T) int64, each answer ended by eos and padded on the right,
    and mask (B, T), 1 on the answer's tokens.
    """
    ids, mask, _ = laid_out([[text] for text in encoded(pairs, tokenizer)])
    return ids, mask


def packed(pairs, tokenizer):
    """The same texts with less padding: as many side by side in a row as fit into the length of the
    longest (sequence packing; first fit, long ones first) -> ids and mask (B, T) as above, and
    number (B, T): which text of its row a token belongs to, -1 for padding. No prompt may be empty:
    its answer would be predicted from the text before it.
    """
    texts = sorted(encoded(pairs, tokenizer), key=lambda text: -len(text[0] + text[1]))
    rows = []  # of each, the texts in it
    room = []  # of each, the tokens that it has left
    for q, a in texts:
        size = len(q) + len(a)
        i = next((i for i, left in enumerate(room) if left >= size), len(rows))
        if i == len(rows):
            rows.append([])
            room.append(len(texts[0][0] + texts[0][1]))
        rows[i].append((q, a))
        room[i] -= size
    return laid_out(rows)


def encoded(pairs, tokenizer):
    """(prompt, answer) texts -> their ids, the answers' ended by eos."""
    return [(tokenizer.encode(q), tokenizer.encode(a) + [tokenizer.eos]) for q, a in pairs]


def laid_out(rows):
    """Rows of (prompt, answer) ids, side by side -> ids, mask, number as in `packed`."""
    T = max(sum(len(q) + len(a) for q, a in texts) for texts in rows)
    ids = torch.zeros(len(rows), T, dtype=torch.long)
    mask = torch.zeros(len(rows), T)
    number = torch.full((len(rows), T), -1)
    for i, texts in enumerate(rows):
        start = 0
        for n, (q, a) in enumerate(texts):
            end = start + len(q) + len(a)
            ids[i, start:end] = torch.tensor(q + a)
            mask[i, start + len(q) : end] = 1
            number[i, start:end] = n
            start = end
    return ids, mask, number


class Apart:
    """Takes a cache's place in GPT.hidden: keeps nothing, and lets a token see only its own text,
    by number (B, T) as `packed` makes them; a sliding window is not heeded. Positions run on
    through a row: a rotation knows distances only.
    """

    length = 0

    def __init__(self, number):
        self.number = number

    def extend(self, T):
        same = self.number[:, None, :, None] == self.number[:, None, None]  # (B, 1, T, T)
        return slice(T), same.tril()

    def append(self, layer, k, v):
        return k, v


def imitate(model, tokenizer, draw, run, seed, steps, rng, peak=3e-3, batch=32):
    """Supervised training on texts, loss on the answers' tokens only -> the model.

    draw() -> (prompt, answer), with `rng` as its only source of chance.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(), peak, betas=(0.9, 0.95), weight_decay=0.01, fused=True
    )
    device = model.lm_head.weight.device
    for step in run.loop(f"base {seed}", steps, model, optimizer, rng):
        # up in a line, then down in a line
        optimizer.param_groups[0]["lr"] = peak * min((step + 1) / 50, 1 - step / steps)
        pairs = [draw() for _ in range(batch)]
        ids, mask, number = (x.to(device) for x in packed(pairs, tokenizer))  # (B, T) each
        hidden = model.hidden(ids[:, :-1], Apart(number[:, :-1]))  # (B, T - 1, C)
        logp, _ = token_logprobs(hidden, model.lm_head.weight, ids[:, 1:])
        loss = -(logp * mask[:, 1:]).sum() / mask.sum()
        optimizer.zero_grad()
        loss.backward()
        descend(optimizer, loss)
        if step % 50 == 0 or step + 1 == steps:
            run.log(phase="sft", seed=seed, step=step, loss=loss.item())
            run.say(loss=loss.item())
    return model


def in_tokens(task):
    """A task at its own SIZE as scale.py asks one: prompts are ids. Has what word_problems has."""
    size = task.SIZE

    def held_out(rng, n):
        return [task.draw(rng, size, held_out=True) for _ in range(n)]

    def prompt(problem):
        return task.tokenizer.encode(task.prompt(problem))

    return SimpleNamespace(
        tokenizer=task.tokenizer,
        prompt=prompt,
        draw=lambda rng: task.draw(rng, size),
        held_out=held_out,
        judged=True,
        judge=lambda problem, text, finished: task.reward(problem, text) * finished,
    )
