"""pretrain.py: the smallest pre-training that is worth looking at: next-token prediction on text,
from bytes to a sample.

    python pretrain.py                                  a small GPT on the Python standard library's own sources (3 minutes, two cores)
    python pretrain.py --data FILE|FOLDER|HF_DATASET    the same on your text

The loss is the mean of -log p(next token) over random windows of the training text; a BPE of a few
thousand ids is trained on it first. Held-out bits per byte compare across tokenizers, and with
gzip.
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
    need_memory,
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
    dtype: str = flag("float32", "bfloat16: autocast training", choices=("float32", "bfloat16"))
    steps: int = flag(600, "training steps", quick=5, low=1)
    data: str = flag(
        "",
        "a text file, a folder, or a Hugging Face dataset with a text column (default: the standard library's sources)",
    )
    vocab_size: int = flag(1024, "size of the BPE vocabulary", quick=300, low=257)
    block_size: int = flag(256, "context in tokens", quick=64, low=2)
    n_layer: int = flag(4, "layers", quick=1, low=1)
    n_head: int = flag(4, "heads", low=1)
    n_kv_head: int = flag(2, "key heads", low=1)
    n_embd: int = flag(128, "channels", quick=32, low=8)
    batch: int = flag(16, "sequences per step", quick=4, low=1)
    lr: float = flag(3e-3, "peak learning rate (AdamW, warm-up then cosine to a tenth)", low=0)
    compile: bool = flag(False, "torch.compile the model: a minute to compile, then faster steps")
    eval_every: int = flag(50, "steps between evaluations", quick=5, low=1)


def load_documents(data):
    """'' -> the standard library's modules; a text file -> [text]; a folder -> its text files, or
    if it has none what `datasets` makes of it; any other name -> the texts of that Hugging Face
    dataset.
    """
    path, suffixes = (
        Path(data) if data else Path(os.__file__).parent,
        (".txt", ".md", ".py", ".rst"),
    )
    read = lambda file: file.read_text("utf-8", errors="replace")
    try:
        if path.is_file():
            texts = [read(path)]
        else:
            files = (
                (p for p in path.rglob("*") if p.suffix in suffixes and p.is_file())
                if data
                else path.glob("*.py")
            )
            texts = [read(file) for file in sorted(files)]
    except OSError as e:  # of a name that is too long, too
        raise UserError(f"--data {data}: cannot read {e.filename or path} ({e.strerror})") from None
    if not texts:
        try:
            import datasets

            texts = list(datasets.load_dataset(data, split="train")["text"])
        except Exception as e:
            raise UserError(
                f"--data {data}: no text file, no folder of texts, no dataset with a text column ({type(e).__name__})"
            ) from None
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
        return [t for i, t in enumerate(texts) if i % 10], texts[::10]
    cuts = [len(t) * 9 // 10 for t in texts]
    return [t[:n] for t, n in zip(texts, cuts)], [t[n:] for t, n in zip(texts, cuts)]


def pretrain(config, run, seed, device, gpt_config, train_ids, val_ids, bytes_per_token):
    """Next-token prediction on random windows of train_ids -> the model. Logs the training and the
    held-out loss.

    train_ids, val_ids (N,) int64 on the CPU; bytes_per_token turns nats per held-out token into
    bits per byte of its text.
    """
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = GPT(gpt_config).to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), config.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    hidden = torch.compile(model.hidden) if config.compile else model.hidden
    T = config.block_size

    def loss_on(ids, starts):
        x = torch.stack([ids[i : i + T + 1] for i in starts]).to(device)  # (B, T + 1)
        with torch.autocast(device, torch.bfloat16, enabled=config.dtype == "bfloat16"):
            return -token_logprobs(hidden(x[:, :-1]), model.lm_head.weight, x[:, 1:])[0].mean()

    for step in run.loop(
        f"gpt {seed}", config.steps, model, optimizer, random.Random(seed), generator
    ):
        started = time.time()
        for g in optimizer.param_groups:
            g["lr"] = lr_at(step, config.steps, config.lr)
        loss = loss_on(
            train_ids, torch.randint(len(train_ids) - T, (config.batch,), generator=generator)
        )
        optimizer.zero_grad()
        loss.backward()
        value = loss.item()
        norm = descend(optimizer, value)
        row = dict(
            seed=seed,
            step=step + 1,
            tokens=(step + 1) * config.batch * T,
            loss=value,
            grad_norm=norm,
            seconds=time.time() - started,
        )
        if (step + 1) % config.eval_every == 0 or step + 1 == config.steps:
            with torch.no_grad():
                # every window at the end, about 64 of them on the way
                starts = torch.arange(0, len(val_ids) - T, T)
                starts = (
                    starts if step + 1 == config.steps else starts[:: max(1, len(starts) // 64)]
                )
                row["val_loss"] = sum(
                    loss_on(val_ids, part).item() * len(part) for part in starts.split(16)
                ) / len(starts)
            row["val_bits_per_byte"] = row["val_loss"] / math.log(2) / bytes_per_token
            run.bar.set_postfix_str(
                f"loss {value:.3f}, held out {row['val_loss']:.3f} nats/token = {row['val_bits_per_byte']:.3f} bits/byte"
            )
        run.log(**row)
    return model


def main():
    config = parse_args(Config, __doc__)
    device = pick_device(config.device)
    if config.compile and not can_compile(device):
        raise UserError("--compile: torch.compile does not work on this machine")
    texts, started = load_documents(config.data), time.time()
    train_docs, val_docs = hold_out(texts)
    # 1. Train the BPE on the training text, encode both; a run that goes on has its BPE in the
    # checkpoint
    saved = (
        load_checkpoint(Path(config.out) / "model.pt")["state"].get("tokenizer")
        if config.resume
        else None
    )
    tokenizer = (
        byte_level(saved["merges"]) if saved else train_bpe("".join(train_docs), config.vocab_size)
    )
    train_ids, val_ids = (
        torch.tensor(
            [i for ids in tokenizer.encode_ordinary_batch(docs) for i in [*ids, tokenizer.eos]]
        )
        for docs in (train_docs, val_docs)
    )
    val_text = "".join(val_docs)
    if min(len(train_ids), len(val_ids)) <= config.block_size + 1:
        raise UserError(
            f"--data: {len(train_ids)} + {len(val_ids)} held-out tokens are too few for --block-size {config.block_size}"
        )
    val_bytes = val_text.encode()
    bytes_per_token = len(val_bytes) / len(val_ids)
    gpt_config = GPTConfig(
        tokenizer.n_vocab,
        config.block_size,
        config.n_layer,
        config.n_head,
        config.n_embd,
        config.n_kv_head,
        qk_norm=True,
    )
    GPT(gpt_config)  # UserError if it is too large
    # two norms in a layer, each keeps its input and its output
    need_memory(
        16 * config.batch * config.block_size * config.n_layer * config.n_embd,
        f"what the backward pass needs of --batch {config.batch} x --block-size {config.block_size}",
        device,
    )
    # 2. Only now the folder: a mistake in the flags leaves the last run's alone
    data = hashlib.sha256(json.dumps(texts).encode()).hexdigest()
    with Run(config, inputs={f"the text of --data {config.data}".strip(): data}) as run:
        run.keep(
            "tokenizer",
            merges=[tokenizer.decode_single_token_bytes(i) for i in range(256, tokenizer.eos)],
        )
        run.introduce(device, gpt_config.parameters)
        print(
            f"{len(train_ids):,} tokens to train on, {len(val_ids):,} held out, {tokenizer.n_vocab} ids, {bytes_per_token:.2f} bytes per token, "
            f"BPE and encoding {time.time() - started:.0f} s"
        )
        # 3. Train, sample
        for seed in seeds_of(config):
            model = pretrain(
                config, run, seed, device, gpt_config, train_ids, val_ids, bytes_per_token
            )
        prompt = "def " if not config.data else val_text[:20]
        start = tokenizer.encode_ordinary(prompt)[: config.block_size]
        sample = generate(
            model,
            [start],
            max_new_tokens=min(120, config.block_size + 1 - len(start)),
            temperature=0.8,
            stop=tokenizer.stop,
            generator=torch.Generator().manual_seed(config.seed),
        )
        written = prompt + sample.texts(tokenizer)[0]
        run.write("samples.txt", written + "\n")
        print(f"\nA sample at temperature 0.8:\n{written}\n")
        # 4. Figure and claim
        final = series(run, "val_bits_per_byte")[1][:, -1]  # (seeds,)
        gzip = 8 * len(zlib.compress(val_bytes, 9)) / len(val_bytes)
        run.finish(
            plot_loss(run, config, gzip, final.mean()),
            [
                claim(
                    "compression",
                    "held-out bits per byte; threshold: gzip -9",
                    "-",
                    "-",
                    final,
                    "<=",
                    gzip,
                    config.seeds,
                )
            ],
        )


def plot_loss(run, config, gzip, final):
    fig, ax = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for key, label in (("loss", "training batch"), ("val_loss", "held out")):
        steps, y = series(run, key)
        band(
            ax,
            steps * config.batch * config.block_size / 1e6,
            y,
            label,
            alpha=0.5 if key == "loss" else 1,
        )
    ax.set(
        xlabel="training tokens (millions)",
        ylabel="loss (nats per token)",
        title=f"A small GPT needs {final:.2f} bits per byte of held-out text, gzip {gzip:.2f}",
    )
    ax.legend()
    return fig


if __name__ == "__main__":
    command(main)
