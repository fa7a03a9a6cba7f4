"""pretrained.py: Hugging Face folders, their names for our tensors, their tokenizers and chat templates; word problems for them to answer.

`GPT.from_pretrained` and `save_pretrained` (model.py) stand on it: Llama, SmolLM2, Qwen2, Qwen2.5, Qwen3, strictly: what is not supported, missing
or left over is an error that names it.
"""
import functools
import json
import math
import os
import re
import time
import unicodedata
import zlib
from pathlib import Path
from types import SimpleNamespace

import tiktoken
import torch
from safetensors.torch import load_file, save_file

from run import UserError


# ---------------------------------------------------------------------------------------------------------------------------
# Hugging Face's names for all this

HF_TYPES = {"llama": (False, False), "qwen2": (True, False), "qwen3": (False, True)}        # model_type: (qkv_bias, qk_norm)
HF_NAMES = {"norm1": "input_layernorm", "norm2": "post_attention_layernorm", "attn.proj": "self_attn.o_proj", "attn.q_norm": "self_attn.q_norm",
            "attn.k_norm": "self_attn.k_norm", "mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj", "mlp.proj": "mlp.down_proj"}


def hub_folder(name):
    """A folder, as it is; anything else is a hub id, whose files are fetched into the hub's cache."""
    if Path(name).is_dir():
        return Path(name)
    try:
        from huggingface_hub import snapshot_download       # comes with datasets
        return Path(snapshot_download(str(name), allow_patterns=["*.json", "*.jinja", "*.safetensors"]))
    except Exception as e:
        raise UserError(f"{name}: no such folder, and no such model within reach on the hub ({type(e).__name__})") from None


def read_json(path):
    try:
        content = json.loads(Path(path).read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError) as e:
        raise UserError(f"{path} is not readable JSON ({type(e).__name__})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is no JSON object")
    return content


def hf_config(path, block_size=None):
    """config.json -> the fields of a GPTConfig. What a key that is not there means is what transformers takes it to mean."""
    c = {k: v for k, v in read_json(path).items() if v is not None}
    kind, rope, layers = c.get("model_type"), {**(c.get("rope_scaling") or {}), **(c.get("rope_parameters") or {})}, c.get("num_hidden_layers") or 0
    scaling = rope.get("rope_type", rope.get("type", "default"))
    sliding = "sliding_attention" in c["layer_types"] if c.get("layer_types") else c.get("use_sliding_window") and layers > c.get("max_window_layers", 28)
    for what, wrong in ((f"model_type {kind!r}", kind not in HF_TYPES), (f"rope scaling {scaling!r}", scaling != "default" or any(isinstance(v, dict) for v in rope.values())),
                        ("partial_rotary_factor", {c.get("partial_rotary_factor"), rope.get("partial_rotary_factor")} - {None, 1}),
                        (f"hidden_act {c.get('hidden_act')!r}", c.get("hidden_act", "silu") != "silu"), ("attention_bias", c.get("attention_bias")),
                        ("mlp_bias", c.get("mlp_bias")), ("sliding-window layers", sliding), ("quantization_config", c.get("quantization_config"))):
        if wrong:
            raise UserError(f"{path}: {what} is not supported")
    try:
        qkv_bias, qk_norm = HF_TYPES[kind]
        positions = c["max_position_embeddings"]
        return dict(
            vocab_size=c["vocab_size"], block_size=min(positions, block_size or positions), n_layer=c["num_hidden_layers"], n_head=c["num_attention_heads"],
            n_embd=c["hidden_size"], n_kv_head=c.get("num_key_value_heads"), head_dim=c.get("head_dim") or (128 if kind == "qwen3" else None),
            n_hidden=c["intermediate_size"], qkv_bias=qkv_bias, qk_norm=qk_norm, tie=c.get("tie_word_embeddings", False),
            rope_theta=rope.get("rope_theta") or c.get("rope_theta", 10000.0), norm_eps=c.get("rms_norm_eps", 1e-6))
    except KeyError as e:
        raise UserError(f"{path}: {e.args[0]} is missing") from None


def hf_tensors(folder):
    """Every tensor of model.safetensors, or of the shards that model.safetensors.index.json lists."""
    files, index = [folder / "model.safetensors"], folder / "model.safetensors.index.json"
    if not files[0].exists() and index.exists():
        files = sorted(folder / name for name in set(read_json(index).get("weight_map", {}).values()))
    tensors = {}
    for file in files:
        try:
            tensors.update(load_file(file))
        except FileNotFoundError:
            raise UserError(f"{file}: no such file") from None
        except Exception as e:
            raise UserError(f"{file} is not a readable safetensors file ({type(e).__name__})") from None
    return tensors


def hf_layout(model):
    """Our parameter -> what it is the concatenation of: (Hugging Face's name, shape, whether its rows are channels that get rotated)."""
    c, layout = model.config, {}
    for ours, p in model.named_parameters():
        if not ours.startswith("blocks."):
            layout[ours] = [({"wte.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight"}.get(ours, ours), p.shape, False)]
            continue
        layer, name, leaf = re.fullmatch(r"blocks\.(\d+)\.(.+)\.(\w+)", ours).groups()
        if name == "attn.qkv":
            layout[ours] = [(f"model.layers.{layer}.self_attn.{x}_proj.{leaf}", (heads * c.head_dim, *p.shape[1:]), x != "v")
                            for x, heads in zip("qkv", (c.n_head, c.n_kv_head, c.n_kv_head))]
        else:
            layout[ours] = [(f"model.layers.{layer}.{HF_NAMES[name]}.{leaf}", p.shape, name in ("attn.q_norm", "attn.k_norm"))]
    return layout


def regroup(rows, n, D):
    """Another order of each head's D channels: n blocks become n interleaved strands. Hugging Face rotates channels i and i + D/2 together,
    we 2i and 2i + 1: n = 2 leads from their order to ours, n = D/2 back."""
    return rows.unflatten(0, (-1, n, D // n)).transpose(1, 2).flatten(0, 2)


def hf_state(folder, model, dtype=None):
    """The tensors of a folder as a state_dict for model, of which only shapes are needed. UserError if one is missing, misshapen or left over."""
    config, tensors, state = model.config, hf_tensors(folder), {}
    for ours, parts in hf_layout(model).items():
        for theirs, shape, rotated in parts:
            if theirs not in tensors:
                raise UserError(f"{folder}: tensor {theirs} is missing")
            t = tensors.pop(theirs)
            if t.shape != shape:
                raise UserError(f"{folder}: tensor {theirs} has shape {tuple(t.shape)}, should have {tuple(shape)}")
            dtype = dtype or t.dtype        # the embedding's: it comes first
            state.setdefault(ours, []).append((regroup(t, 2, config.head_dim) if rotated else t).to(dtype))
    twice = lambda k: k == "lm_head.weight" and config.tie and torch.equal(tensors[k].to(dtype), state["wte.weight"][0])
    left = [k for k in tensors if not twice(k) and not k.endswith("rotary_emb.inv_freq")]       # neither says anything new
    if left:
        raise UserError(f"{folder}: tensor {min(left)} is left over: config.json tells of no such thing")
    return {k: torch.cat(v) if len(v) > 1 else v[0] for k, v in state.items()}


def hf_save(model, folder, like=None):
    """See GPT.save_pretrained."""
    c, weights = model.config, model.state_dict()
    kind = {v: k for k, v in HF_TYPES.items()}.get((c.qkv_bias, c.qk_norm))
    if kind is None or c.window:
        raise UserError("save_pretrained: no Hugging Face model_type of ours has " + ("a sliding window" if c.window else "QKV bias and QK-norm"))
    tensors = {}
    for ours, parts in hf_layout(model).items():
        for (theirs, shape, rotated), t in zip(parts, weights[ours].split([shape[0] for _, shape, _ in parts])):
            tensors[theirs] = (regroup(t, c.head_dim // 2, c.head_dim) if rotated else t).detach().cpu().clone()
    text = json.dumps(dict(
        architectures=[kind.capitalize() + "ForCausalLM"], model_type=kind, vocab_size=c.vocab_size, hidden_size=c.n_embd, intermediate_size=c.n_hidden,
        num_hidden_layers=c.n_layer, num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head, head_dim=c.head_dim, hidden_act="silu",
        max_position_embeddings=c.block_size, rms_norm_eps=c.norm_eps, tie_word_embeddings=c.tie, rope_theta=c.rope_theta, attention_bias=False,
        torch_dtype=str(model.lm_head.weight.dtype)[6:], bos_token_id=None, eos_token_id=load_tokenizer(like).eos if like else None), indent=1)
    source = hub_folder(like) if like else folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file in [f for pattern in ("tokenizer*.json", "chat_template.jinja") for f in source.glob(pattern) if source != folder]:
            (folder / file.name).write_bytes(file.read_bytes())
        save_file(tensors, folder / "model.safetensors.tmp", metadata={"format": "pt"})
        (folder / "config.json.tmp").write_text(text)
        for file in ("model.safetensors", "config.json"):       # whole or not at all
            os.replace(folder / (file + ".tmp"), folder / file)
    except OSError as e:
        raise UserError(f"cannot write to {folder}: {e.strerror}") from None


# ---------------------------------------------------------------------------------------------------------------------------
# Tokenizers

# GPT-2's split: contractions, then runs of letters, of digits, of anything else, each with the space before it, then space
SPLIT = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


class PretrainedBPE(tiktoken.Encoding):
    """A tokenizer.json as a tiktoken.Encoding, which does what the reference does where tiktoken would not: text is brought to NFC first if the
    file says so, a byte that has no token is dropped, an id that has no token (padding of the embedding) decodes to nothing."""

    def encode(self, text, *, allowed_special=frozenset(), disallowed_special="all"):
        """Special tokens in the text are an error, or with allowed_special="all" their ids, as tiktoken has it. No token is added."""
        allowed = self.special_tokens_set if allowed_special == "all" else set(allowed_special)
        for token in self.special_tokens_set - allowed if disallowed_special == "all" else disallowed_special:
            if token in text:
                raise ValueError(f'{token!r} in the text: allowed_special="all" makes it a special token, encode_ordinary plain text')
        longest_first = "|".join(map(re.escape, sorted(allowed, key=len, reverse=True)))
        pieces = re.split(f"({longest_first})", text) if allowed else [text]
        return [i for piece in pieces for i in ([self.encode_single_token(piece)] if piece in allowed else self.encode_ordinary(piece))]

    def encode_ordinary(self, text):
        import regex
        text = unicodedata.normalize("NFC", text) if self.nfc else text
        if self.missing.isdisjoint(text.encode("utf-8", "replace")):
            return super().encode_ordinary(text)
        ids = []
        for piece in regex.findall(self._pat_str, text):
            parts = [bytes([b]) for b in piece.encode("utf-8", "replace") if b not in self.missing]
            while True:     # BPE by its definition: merge the pair whose union has the lowest rank, the leftmost of several
                rank, i = min(((self._mergeable_ranks.get(a + b, math.inf), i) for i, (a, b) in enumerate(zip(parts, parts[1:]))), default=(math.inf, 0))
                if rank == math.inf:
                    break
                parts[i:i + 2] = [parts[i] + parts[i + 1]]
            ids += [self._mergeable_ranks[p] for p in parts]
        return ids

    def decode(self, ids, errors="replace"):
        return super().decode([i for i in ids if i in self.known], errors)


def split_pattern(stages):
    """The regular expression of a tokenizer.json's pre-tokenizers (a list of them), None if it is none of the kinds we know."""
    *first, last = [s.get("type") for s in stages] or [None]
    if last != "ByteLevel" or stages[-1].get("add_prefix_space"):
        return None
    own, s = stages[-1].get("use_regex", True), stages[0]
    if not first and own:
        return SPLIT
    if first == ["Digits"] and own:     # numbers are cut out first, so that the space before one stays with the spaces before it
        return SPLIT.replace(r" ?\p{N}+", r"\p{N}" if s.get("individual_digits") else r"\p{N}+").replace(r"(?!\S)", r"(?![^\s\p{N}])")
    if first == ["Split"] and not own and (s.get("behavior"), s.get("invert")) in (("Isolated", False), ("Removed", True)):
        return s.get("pattern", {}).get("Regex")
    return None


def load_tokenizer(name):
    """The byte-level BPE in the tokenizer.json of a Hugging Face folder or hub id -> tiktoken.Encoding with `eos`.

    eos is tokenizer_config.json's eos_token, else config.json's eos_token_id (the first). UserError for a missing or damaged file, and for what is
    not supported: other tokenizers, other ways to split, merges that are not in the order of their ids, as tiktoken needs them.
    (That each token is what the merges make of its own bytes, as training a BPE ensures, is not checked.)
    """
    folder = hub_folder(name)
    path = folder / "tokenizer.json"
    content = read_json(path)
    bpe, added, normalizer, splitter = (content.get(k) or {} for k in ("model", "added_tokens", "normalizer", "pre_tokenizer"))
    special, vocab, pattern = {t["content"]: t["id"] for t in added}, bpe.get("vocab") or {}, split_pattern(splitter.get("pretokenizers", [splitter]))
    # GPT-2 writes a byte as one printable character: itself where it is one, else one of those from 256 on
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    byte = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(sorted(set(range(256)) - set(printable)))}
    foreign = next((t for t in vocab if t not in special and not byte.keys() >= set(t)), None)
    pairs = [m.split(" ") if isinstance(m, str) else m for m in bpe.get("merges") or []]
    made = [vocab.get("".join(p), -1) for p in pairs]
    missing = set(byte.values()) - {byte.get(t) for t in vocab}
    for what, wrong in ((f"a {bpe.get('type')} model", bpe.get("type") != "BPE"), (f"normalizer {normalizer.get('type')}", normalizer.get("type") not in (None, "NFC")),
                        (f"pre-tokenizer {json.dumps(splitter)}", pattern is None), (f"token {foreign!r} (not byte-level)", foreign is not None),
                        *((k, bpe.get(k)) for k in ("dropout", "byte_fallback", "continuing_subword_prefix", "end_of_word_suffix")),
                        ("an unk_token for missing bytes", bpe.get("unk_token") and missing),
                        *((f"added token {t['content']!r} with {k}", t.get(k)) for t in added for k in ("lstrip", "rstrip", "single_word")),
                        ("a merge order that is not that of the ids", -1 in made or made != sorted(made)),
                        ("a token that no merge makes", {i for t, i in vocab.items() if len(t) > 1 and t not in special} - set(made))):
        if wrong:
            raise UserError(f"{path}: {what} is not supported")
    ranks = {bytes(byte[c] for c in t): i for t, i in vocab.items() if t not in special}
    try:
        encoding = PretrainedBPE(str(name), pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    except ValueError as e:
        raise UserError(f"{path}: {e}") from None
    encoding.nfc, encoding.missing, encoding.known = bool(normalizer), missing, set(ranks.values()) | set(special.values())
    settings, config = (read_json(folder / f) if (folder / f).exists() else {} for f in ("tokenizer_config.json", "config.json"))
    eos = settings.get("eos_token") or config.get("eos_token_id")
    eos = eos["content"] if isinstance(eos, dict) else next(iter(eos), None) if isinstance(eos, list) else eos
    encoding.eos = special.get(eos, vocab.get(eos)) if isinstance(eos, str) else eos
    if encoding.eos is None:
        raise UserError(f"{folder}: neither tokenizer_config.json nor config.json names an end-of-text token")
    return encoding


def load_chat_template(name):
    """The chat template of a Hugging Face folder or hub id, as a function: a user's message -> the text up to where the answer starts."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment        # comes with torch
    folder = hub_folder(name)
    settings, file = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").exists() else {}, folder / "chat_template.jinja"
    source = file.read_text("utf-8") if file.exists() else settings.get("chat_template")
    if not isinstance(source, str):
        raise UserError(f"{folder}: neither chat_template.jinja nor tokenizer_config.json has a chat template")
    tokens = {k: t["content"] if isinstance(t, dict) else t for k in ("bos_token", "eos_token") if (t := settings.get(k))}
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    env.globals["strftime_now"] = lambda form: time.strftime(form)

    def render(message):
        try:
            return env.from_string(source).render(messages=[dict(role="user", content=message)], add_generation_prompt=True, **tokens)
        except Exception as e:      # a template is a program
            raise UserError(f"{folder}: its chat template fails ({type(e).__name__}: {e})") from None
    return render


# ---------------------------------------------------------------------------------------------------------------------------
# Word problems, and a checkpoint that answers them

def extract_answer(text):
    """The number after the first "#### ", as GSM8K's authors read it (github.com/openai/grade-school-math), or None."""
    match = re.search(r"#### (\-?[0-9\.\,]+)", text)
    return match.group(1).replace(",", "") if match else None


def load_problems(data, answers=True):
    """(question, answer) pairs to train on, and others: gsm8k's own splits; of a file, those whose question's hash says so.

    answers: every row has to have one, a text with '#### number'; without, the answer is None where there is no such thing.
    """
    try:
        if data == "gsm8k":
            import datasets
            splits = [list(datasets.load_dataset("openai/gsm8k", "main", split=s)) for s in ("train", "test")]
        elif data.endswith(".parquet"):
            import pyarrow.parquet          # comes with datasets
            splits = [pyarrow.parquet.read_table(data).to_pylist()]
        else:
            splits = [[json.loads(line) for line in Path(data).read_text("utf-8").split("\n") if line.strip()]]
        answer = lambda row: extract_answer(row["answer"] if answers else str(row.get("answer")))
        rows = [("" + row["question"], answer(row), i) for i, split in enumerate(splits) for row in split]
    except KeyError as e:
        raise UserError(f"--data {data}: a row has no column {e}") from None
    except FileNotFoundError:
        raise UserError(f"--data {data}: no such file, and not gsm8k") from None
    except Exception as e:
        raise UserError(f"--data {data}: no rows with a question{' and an answer' * answers} can be read from it ({type(e).__name__})") from None
    for q, a, _ in rows:
        if a is None and answers:
            raise UserError(f"--data {data}: the answer to {q[:50]!r} has no '#### number'")
    other = lambda q, split: split == 1 if len(splits) > 1 else zlib.crc32(q.encode()) % 10 == 0
    parts = [[(q, a) for q, a, split in rows if other(q, split) == held_out] for held_out in (False, True)]
    if not all(parts):
        raise UserError(f"--data {data}: {len(parts[0])} problems to train on, {len(parts[1])} held out are too few")
    return parts


@functools.cache
def word_problems(init, data, template, chat, answers=True):
    """How the problems of a file are drawn, held out, asked in the checkpoint's own tokens, and judged."""
    tokenizer, wrap, (train, held_out) = load_tokenizer(init), load_chat_template(init) if chat else lambda text: text, load_problems(data, answers)
    prompt = lambda p: tokenizer.encode(wrap(template.replace("\\n", "\n").replace("{question}", p[0])), allowed_special="all")
    lengths = [len(prompt(p)) for p in train + held_out]
    if not min(lengths):
        raise UserError(f"--data {data}: an empty question is an empty prompt under this --template")
    return SimpleNamespace(tokenizer=tokenizer, prompt=prompt, longest=max(lengths), draw=lambda rng: rng.choice(train),
                           held_out=lambda rng, n: rng.sample(held_out, min(n, len(held_out))), judged=all(a is not None for _, a in held_out),
                           judge=lambda p, text, finished: float(extract_answer(text) == p[1]))
