"""Word problems: questions in English whose answers are numbers, and checkpoints to answer them.

    Weng earns $12 an hour for babysitting. Yesterday, she just did 50 minutes. How much?
    50 minutes are 50/60 of an hour: 12 * 50 / 60 = 10
    #### 10

The first "#### number" of an answer, without commas, must be the reference's, letter by letter: the
verifier of GSM8K's authors (Cobbe et al., arXiv 2110.14168), but for a dot at its end. An answer
need not be finished. Problems are gsm8k's or those of a file; they are drawn with replacement.

Unlike the toy tasks this one has no tokenizer of its own: `word_problems` asks in a checkpoint's.
"""

import functools
import hashlib
import re
from pathlib import Path
from types import SimpleNamespace

import torch

from experiment import UserError
from huggingface import Section, load_chat_template, load_tokenizer, parse_json, read_text
from model import GPT
from tasks import held_out as is_held_out


def extract_answer(text):
    """The number after the first "#### ", or None."""
    match = re.search(r"#### (\-?[0-9\.\,]+)", text)
    number = match.group(1).replace(",", "").rstrip(".") if match else ""
    return number if re.search("[0-9]", number) else None


def read_rows(data):
    """What --data names -> its splits, each a list of Sections: gsm8k's two, of a file one."""
    where = f"--data {data}: row"
    try:
        if data == "gsm8k":
            import datasets

            names = ("train", "test")
            splits = [datasets.load_dataset("openai/gsm8k", "main", split=s) for s in names]
        elif data.endswith(".parquet"):
            import pyarrow.parquet  # comes with datasets

            splits = [pyarrow.parquet.read_table(data).to_pylist()]
        else:
            lines = enumerate(read_text(data, f"--data {data}").split("\n"), 1)
            return [[parse_json(f"{where} {i}", line) for i, line in lines if line.strip()]]
        return [[Section(f"{where} {i}", row) for i, row in enumerate(s, 1)] for s in splits]
    except UserError:
        raise
    except Exception as e:
        raise UserError(f"--data {data} cannot be read ({type(e).__name__}: {e})") from None


def fingerprint(path):
    """A hash of a file or of a folder's files; of what is neither (a hub id), the name itself.

    A run depends on it beside its flags: --resume compares it.
    """
    path = Path(path)
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    digest = hashlib.sha256()
    try:
        for file in files:
            digest.update(str(file.relative_to(path)).encode())
            with open(file, "rb") as f:
                digest.update(hashlib.file_digest(f, "sha256").digest())
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from None
    return digest.hexdigest() if files else str(path)


def load_problems(data, answers=True):
    """(question, answer) pairs to train on, and others.

    Of gsm8k its own splits; of a file, those whose question's hash says so. answers: every row has
    to have one, a text with '#### number'; without, the answer is None where there is none.
    """
    splits = read_rows(data)
    train, held_out = [], []
    for i, split in enumerate(splits):
        for row in split:
            question = row.need("question", str)
            text = row.need("answer", str) if answers else row.get("answer", str, "")
            answer = extract_answer(text)
            if answers and answer is None:
                raise UserError(f"{row.where}: its answer has no '#### number'")
            apart = i == 1 if len(splits) > 1 else is_held_out(question)
            (held_out if apart else train).append((question, answer))
    if not train or not held_out:
        counts = f"{len(train)} problems to train on, {len(held_out)} held out"
        raise UserError(f"--data {data}: {counts} are too few")
    return train, held_out


def end_with_turn(tokenizer, end):
    """A chat also ends with the first special token of what its template puts after an answer."""
    special = set(tokenizer._special_tokens.values())
    marks = [i for i in tokenizer.encode(end, allowed_special="all") if i in special]
    tokenizer.stop = list(dict.fromkeys(marks[:1] + tokenizer.stop))
    tokenizer.eos = tokenizer.stop[0]


@functools.cache
def word_problems(init, data, template, chat, answers=True):
    """How the problems of a file are drawn, held out, asked in the checkpoint's tokens, and judged.

    A chat begins with what its template writes, other text with the tokenizer's prefix.
    """
    if "{question}" not in template:
        raise UserError("--template has no {question}")
    tokenizer = load_tokenizer(init)
    train, held_out = load_problems(data, answers)
    prefix, wrap = tokenizer.prefix, str
    if chat:
        prefix, wrap = [], load_chat_template(init)
        end_with_turn(tokenizer, wrap.end)

    def prompt(problem):
        text = template.replace("\\n", "\n").replace("{question}", problem[0])
        return prefix + tokenizer.encode(wrap(text), allowed_special="all")

    def judge(problem, text, finished):
        return float(extract_answer(text) == problem[1])

    lengths = [len(prompt(p)) for p in train + held_out]
    if not min(lengths):
        raise UserError(f"--data {data}: an empty question is an empty prompt under --template")
    return SimpleNamespace(
        tokenizer=tokenizer,
        prompt=prompt,
        longest=max(lengths),
        draw=lambda rng: rng.choice(train),
        held_out=lambda rng, n: rng.sample(held_out, min(n, len(held_out))),
        judged=all(answer is not None for _, answer in held_out),
        judge=judge,
    )


def load_model(config, flag, task, dtype="float32"):
    """The model of the folder or hub id that a flag names.

    UserError if it can't hold the longest prompt with its answer, or lacks ids of the tokenizer.
    """
    name = getattr(config, flag)
    model = GPT.from_pretrained(name, getattr(torch, dtype))
    positions = task.longest + config.max_new_tokens - 1
    ids = task.tokenizer.n_vocab
    has = model.config
    if has.block_size < positions or has.vocab_size < ids:
        raise UserError(
            f"--{flag} {name}: has {has.block_size} positions, {has.vocab_size} ids; the prompts "
            f"with --max-new-tokens need {positions} and {ids}"
        )
    return model


def load_teacher(config, task, student):
    """The frozen teacher of a student, cut to its ids. UserError if their tokenizers differ."""
    name = config.teacher
    mine, its = load_tokenizer(config.init), load_tokenizer(name)
    if (mine._mergeable_ranks, mine._special_tokens) != (its._mergeable_ranks, its._special_tokens):
        raise UserError(f"--teacher {name}: its vocabulary is not that of --init {config.init}")
    teacher = load_model(config, "teacher", task, config.dtype)
    V = student.config.vocab_size
    if teacher.config.vocab_size < V:
        raise UserError(f"--teacher {name}: has {teacher.config.vocab_size} ids, the student {V}")
    for layer in (teacher.wte, teacher.lm_head):  # what is cut off only pads the embedding
        layer.weight = torch.nn.Parameter(layer.weight[:V])
    teacher.config.vocab_size = V
    return teacher.requires_grad_(False)
