"""pretrain.py: next-token prediction on text, from bytes to a sample: where base models come from.

    loss = mean over windows of the text and their tokens t of   -log p(token_t | those before it)

    python pretrain.py                                  3 minutes on two cores
    python pretrain.py --data FILE|FOLDER|HF_DATASET    the same on your text

The text is the Python standard library's own source, of which every tenth file is held out. On the
others a byte-pair encoding of about a thousand ids is trained (tokenizer.py), then a small GPT on
random windows of its ids. What the held-out text costs is measured in nats per token, which
depends on what a token is, and

    bits per byte = nats per token / ln 2 / bytes per token

which does not: it compares across tokenizers, and with a file compressor, because a model that
gives its text the probability p can store it in -log2 p bits (for who has the model already: gzip
needs none).

What to see: the loss starts near ln 1024 = 6.9 (all ids equally likely) and falls to about 3.3. The
held-out text ends at about 1.8 bits per byte, where gzip needs 1.9. The sample at the end looks
like Python, and means nothing.

How it differs from nanoGPT's train.py: the model is of Llama's family (model.py), weight decay
takes in all weights, and no logits of the whole vocabulary are held (kernels.token_logprobs).
"""

import hashlib
import json
import math
import os
import random
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from engine import generate
from experiment import (
    Flags,
    Run,
    UserError,
    band,
    claim,
    command,
    descend,
    flag,
    load_checkpoint,
    lr_at,
    parse_args,
    pick_device,
    seeds_of,
    series,
)
from kernels import can_compile, token_logprobs
from model import GPT, GPTConfig
from tokenizer import byte_level, train_bpe


@dataclass
class Config(Flags):
    data: str = flag(
        "",
        "a text file, a folder, or a Hugging Face dataset with a text column "
        "(default: the standard library's sources)",
    )
    vocab_size: int = flag(1024, "size of the BPE vocabulary", quick=300, low=257)
    block_size: int = flag(256, "context in tokens", quick=64, low=2)
    n_layer: int = flag(4, "layers", quick=1, low=1)
    n_head: int = flag(4, "heads", low=1)
    n_kv_head: int = flag(2, "key heads", low=1)
    n_embd: int = flag(128, "channels", quick=32, low=8)
    steps: int = flag(600, "training steps", quick=5, low=1)
    batch: int = flag(16, "windows per step", quick=4, low=1, high=2**16)
    lr: float = flag(3e-3, "peak learning rate (AdamW, warm-up then cosine to a tenth)", low=0)
    dtype: str = flag("float32", "bfloat16: autocast training", choices=("float32", "bfloat16"))
    compile: bool = flag(False, "torch.compile the model: a minute to compile, then faster steps")
    eval_every: int = flag(50, "steps between evaluations", quick=5, low=1)


# --------------------------------------------------------------------------------------------------
# The text


def text_files(data):
    """The files of --data: the standard library's modules, a file, or a folder's text files."""
    path = Path(data) if data else Path(os.__file__).parent
    if path.is_file():
        return [path]
    if not data:
        return sorted(path.glob("*.py"))
    suffixes = (".txt", ".md", ".py", ".rst")
    return sorted(p for p in path.rglob("*") if p.suffix in suffixes and p.is_file())


def dataset_texts(name):
    """The texts of a Hugging Face dataset, or of what `datasets` makes of a folder."""
    try:
        import datasets

        return list(datasets.load_dataset(name, split="train")["text"])
    except Exception as e:
        raise UserError(
            f"--data {name}: no text file, no folder of texts, no dataset with a text column "
            f"({type(e).__name__})"
        ) from None


def load_documents(data):
    """'' -> the standard library's modules; a text file -> [text]; a folder -> its text files, or
    if it has none what `datasets` makes of it; any other name -> the texts of that Hugging Face
    dataset. UserError where there is no text.
    """
    try:
        texts = [file.read_text("utf-8", errors="replace") for file in text_files(data)]
    except OSError as e:  # no right to read it, or a name that is too long for a file
        raise UserError(f"--data {data}: cannot read {e.filename or data} ({e.strerror})") from None
    texts = texts or dataset_texts(data)
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise UserError(f"--data {data}: row {i + 1} is no text but {text!r:.40}")
    if not "".join(texts).strip():
        raise UserError(f"--data {data}: no text in it")
    return texts


def hold_out(texts):
    """Training and held-out documents: every tenth is held out; where there are no more than ten,
    the last tenth of each.
    """
    if len(texts) > 10:
        return [text for i, text in enumerate(texts) if i % 10], texts[::10]
    cuts = [(text, len(text) * 9 // 10) for text in texts]
    return [text[:cut] for text, cut in cuts], [text[cut:] for text, cut in cuts]


def tokenizer_of(config, text):
    """A BPE trained on the text. A run that goes on has it in its checkpoint (see `main`)."""
    if config.resume:
        state = load_checkpoint(Path(config.out) / "model.pt")["state"]
        if "tokenizer" in state:
            return byte_level(state["tokenizer"]["merges"])
    return train_bpe(text, config.vocab_size)


def encoded(tokenizer, documents):
    """The ids of all documents in a row (N,) int64, each closed by the end of text."""
    rows = tokenizer.encode_ordinary_batch(documents)
    return torch.tensor([i for row in rows for i in [*row, tokenizer.eos]])


@dataclass
class Corpus:
    train_ids: torch.Tensor  # (N,) int64
    val_ids: torch.Tensor  # (M,) int64, held out
    bytes_per_token: float  # of the held-out text


# --------------------------------------------------------------------------------------------------
# Training


def loss_on(config, hidden, head, ids, starts):
    """The mean of -log p over the windows of ids (N,) that begin at starts (B,), in nats per token.
    hidden: ids -> hidden states; head: the output matrix (V, C).
    """
    T = config.block_size
    # one token more than the context: inputs are the first T, targets the last T
    x = torch.stack([ids[i : i + T + 1] for i in starts]).to(head.device)  # (B, T + 1)
    autocast = config.dtype == "bfloat16"
    with torch.autocast(head.device.type, torch.bfloat16, enabled=autocast):
        logp, _ = token_logprobs(hidden(x[:, :-1]), head, x[:, 1:])  # (B, T)
        return -logp.mean()


@torch.no_grad()
def held_out_loss(config, hidden, head, ids, windows=None):
    """The loss on whole windows of ids (N,) side by side: all of them, or at least so many."""
    starts = torch.arange(0, len(ids) - config.block_size, config.block_size)
    if windows:
        starts = starts[:: max(1, len(starts) // windows)]
    parts = starts.split(16)
    losses = [loss_on(config, hidden, head, ids, part).item() * len(part) for part in parts]
    return sum(losses) / len(starts)


def pretrain(config, run, seed, device, shape, corpus):
    """A model of that shape (a GPTConfig), trained from scratch to predict the next token. Logs its
    loss on the training text and on the held-out text.
    """
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = GPT(shape).to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), config.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    hidden = torch.compile(model.hidden) if config.compile else model.hidden
    head = model.lm_head.weight
    rng = random.Random(seed)  # not used here: a loop saves one
    # run.loop counts the steps, and saves what it is given, so that --resume can go on from there
    for step in run.loop(f"gpt {seed}", config.steps, model, optimizer, rng, generator):
        started = time.time()
        optimizer.param_groups[0]["lr"] = lr_at(step, config.steps, config.lr)
        # random windows: some reach from one document into the next, and attention sees across;
        # after the last start there are T + 1 tokens
        n_starts = len(corpus.train_ids) - config.block_size
        starts = torch.randint(n_starts, (config.batch,), generator=generator)  # (B,)
        loss = loss_on(config, hidden, head, corpus.train_ids, starts)
        optimizer.zero_grad()
        loss.backward()
        norm = descend(optimizer, loss)  # cuts the gradient and steps -> its norm before
        row = dict(
            tokens=(step + 1) * config.batch * config.block_size,
            loss=loss.item(),
            grad_norm=norm,
            seconds=time.time() - started,
        )
        last = step + 1 == config.steps
        if last or (step + 1) % config.eval_every == 0:
            # a part of the text is enough on the way, all at the end
            windows = None if last else 64
            nats = held_out_loss(config, hidden, head, corpus.val_ids, windows)
            row["val_loss"] = nats
            row["val_bits_per_byte"] = nats / math.log(2) / corpus.bytes_per_token
            run.say(loss=row["loss"], held_out=nats, bits_per_byte=row["val_bits_per_byte"])
        run.log(seed=seed, step=step + 1, **row)
    return model


def sample(config, model, tokenizer, prompt):
    """The prompt, and what the model makes of it."""
    ids = tokenizer.encode_ordinary(prompt)[: config.block_size]
    # the last new token is not read again: it needs no position
    rollout = generate(
        model,
        [ids],
        max_new_tokens=min(120, config.block_size + 1 - len(ids)),
        temperature=0.8,
        stop=tokenizer.stop,
        generator=torch.Generator().manual_seed(config.seed),
    )
    return prompt + rollout.texts(tokenizer)[0]


# --------------------------------------------------------------------------------------------------
# The figure


def gzip_bits_per_byte(data):
    return 8 * len(zlib.compress(data, level=9)) / len(data)


def figure(config, run):
    fig, ax = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for key, label, alpha in (("loss", "training batch", 0.5), ("val_loss", "held out", 1)):
        steps, loss = series(run, key)
        millions = steps * config.batch * config.block_size / 1e6
        band(ax, millions, loss, label, alpha=alpha)
    final = series(run, "val_bits_per_byte")[1][:, -1]  # (seeds,)
    gzip = next(row["bits_per_byte"] for row in run.rows if row.get("arm") == "gzip -9")
    ax.set(
        xlabel="training tokens (millions)",
        ylabel="loss (nats per token)",
        title=f"A small GPT needs {final.mean():.2f} bits per byte of held-out text, "
        f"gzip {gzip:.2f}",
    )
    ax.legend()
    return fig, [
        claim(
            "compression",
            "held-out bits per byte; threshold: gzip -9",
            source="-",
            paper="-",
            value=final,
            op="<=",
            threshold=gzip,
            seeds=config.seeds,
        )
    ]


def main():
    config = parse_args(Config, __doc__)
    device = pick_device(config.device)
    if config.compile and not can_compile(device):
        raise UserError("--compile: torch.compile does not work on this machine")
    # 1. Text, tokenizer, ids
    texts = load_documents(config.data)
    started = time.time()
    train_docs, val_docs = hold_out(texts)
    tokenizer = tokenizer_of(config, "".join(train_docs))
    train_ids, val_ids = encoded(tokenizer, train_docs), encoded(tokenizer, val_docs)
    if min(len(train_ids), len(val_ids)) <= config.block_size + 1:
        raise UserError(
            f"--data: {len(train_ids)} + {len(val_ids)} held-out tokens are too few for "
            f"--block-size {config.block_size}"
        )
    val_text = "".join(val_docs)
    corpus = Corpus(train_ids, val_ids, len(val_text.encode()) / len(val_ids))
    shape = GPTConfig(
        tokenizer.n_vocab,
        block_size=config.block_size,
        n_layer=config.n_layer,
        n_head=config.n_head,
        n_embd=config.n_embd,
        n_kv_head=config.n_kv_head,
        qk_norm=True,
    )
    GPT(shape)  # UserError if it is too large: said before the last run's folder is cleared
    data_hash = hashlib.sha256(json.dumps(texts).encode()).hexdigest()
    with Run(config, inputs={f"the text of --data {config.data}".strip(): data_hash}) as run:
        # Into the checkpoint, for `tokenizer_of`: the bytes of each merge, in order, up to eos
        merges = [tokenizer.decode_single_token_bytes(i) for i in range(256, tokenizer.eos)]
        run.keep("tokenizer", dict(merges=merges))
        run.introduce(device, shape.parameters)
        print(
            f"{len(train_ids):,} tokens to train on, {len(val_ids):,} held out, "
            f"{tokenizer.n_vocab} ids, {corpus.bytes_per_token:.2f} bytes per token, "
            f"BPE and encoding {time.time() - started:.0f} s"
        )
        # 2. Train, sample
        for seed in seeds_of(config):
            model = pretrain(config, run, seed, device, shape, corpus)
        # of the last seed
        written = sample(config, model, tokenizer, val_text[:20] if config.data else "def ")
        run.write("samples.txt", written + "\n")
        print(f"\nA sample at temperature 0.8:\n{written}\n")
        # 3. What gzip needs for the same text
        run.log_once(
            lambda: dict(bits_per_byte=gzip_bits_per_byte(val_text.encode())),
            arm="gzip -9",
            step=0,
        )
        run.finish(*figure(config, run))


if __name__ == "__main__":
    command(main)
