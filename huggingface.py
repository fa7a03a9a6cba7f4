"""huggingface.py: Hugging Face folders: names of tensors, tokenizers and chat templates.

`GPT.from_pretrained` and `save_pretrained` (model.py) stand on it: Llama, SmolLM2, Qwen2, Qwen2.5,
Qwen3, strictly: what is not supported, missing, left over or of a wrong type is an error that
names it.
What a folder leaves unsaid is what transformers takes it to mean.
"""

import contextlib
import datetime
import functools
import json
import os
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save

from experiment import UserError, whole
from tokenizer import SPLIT, PretrainedBPE

# --------------------------------------------------------------------------------------------------
# Hugging Face's names for all this

HF_TYPES = {
    "llama": (False, False),
    "qwen2": (True, False),
    "qwen3": (False, True),
}  # model_type: (qkv_bias, qk_norm)
HF_NAMES = {
    "norm1": "input_layernorm",
    "norm2": "post_attention_layernorm",
    "attn.proj": "self_attn.o_proj",
    "attn.q_norm": "self_attn.q_norm",
    "attn.k_norm": "self_attn.k_norm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.proj": "mlp.down_proj",
}


def hub_folder(name):
    """A folder, as it is; anything else is a hub id, whose files come into the hub's cache."""
    if os.path.isdir(name):
        return Path(name)
    try:
        from huggingface_hub import snapshot_download  # comes with datasets

        return Path(
            snapshot_download(str(name), allow_patterns=["*.json", "*.jinja", "*.safetensors"])
        )
    except Exception as e:
        why = f"no such model within reach on the hub ({type(e).__name__})"
        raise UserError(f"{name}: no such folder, and {why}") from None


LARGEST = 2**30  # no size, id or base of a rotation is larger
SHOULD = {
    str: "a text",
    bool: "true or false",
    list: "a list",
    dict: "an object",
    int: "a whole number",
    float: "a number",
}


class Section:
    """A JSON object that somebody else wrote, read with its types and ranges checked.

    UserError names the file, the key and what stands there.
    """

    def __init__(self, where, content):
        if not isinstance(content, dict):
            raise UserError(f"{where} is no JSON object")
        self.where, self.content = where, content

    def get(self, key, kind, default=None, low=1, high=LARGEST):
        """A key's value, `default` if missing or null. dict: a Section; int, float: low to high."""
        value = self.content.get(key)
        if value is None:
            if default is ...:
                raise UserError(f"{self.where}: {key} is missing or null")
            return default
        number = kind in (int, float)
        fits = type(value) is kind or kind is float and type(value) is int
        if not fits or number and not low <= value <= high:
            should = SHOULD[kind] + number * f" from {low} to {high}"
            raise UserError(f"{self.where}: {key} is {value!r:.60}, should be {should}")
        return Section(f"{self.where}: {key}", value) if kind is dict else value

    need = functools.partialmethod(get, default=...)  # the key has to be there

    def ids(self, key):
        """A token id, a list of them, or nothing -> a list."""
        value = self.content.get(key)
        several = value if isinstance(value, list) else [] if value is None else [value]
        return [Section(self.where, {key: i}).need(key, int, low=0) for i in several]

    def sections(self, key):
        """A list of objects -> Sections."""
        return [
            Section(f"{self.where}: {key} {i}", part)
            for i, part in enumerate(self.get(key, list, []))
        ]


def read_text(path, where=None):
    """A text file, which may begin with a byte order mark. UserError if it can't be read."""
    try:
        return Path(path).read_text("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{where or path}: no such file") from None
    except OSError as e:
        raise UserError(f"{where or path} cannot be read: {e.strerror}") from None
    except UnicodeDecodeError as e:
        raise UserError(f"{where or path} is not UTF-8 text (byte {e.start + 1})") from None


def parse_json(where, text):
    """A JSON object's text -> Section. UserError says why it is none."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise UserError(f"{where} is not readable JSON ({e})") from None
    return Section(where, content)


def read_json(path, optional=False):
    """A file's JSON object -> Section; an empty one if it's optional and there is no file."""
    return parse_json(path, "{}" if optional and not path.exists() else read_text(path))


def refuse(where, faults):
    """UserError for the first of the faults, name -> whether it is there."""
    for what, wrong in faults.items():
        if wrong:
            raise UserError(f"{where}: {what} is not supported")


def hf_config(path, block_size=None):
    """config.json -> the fields of a GPTConfig.

    What a key that is not there means is what transformers takes it to mean. UserError for what is
    missing, is not supported, or is said twice and differently.
    """
    c = read_json(path)
    kind, act = c.get("model_type", str), c.get("hidden_act", str, "silu")
    layers = c.need("num_hidden_layers", int, high=10**4)
    ropes = [s for k in ("rope_scaling", "rope_parameters") if (s := c.get(k, dict))]
    scalings = {s.get("rope_type", str, s.get("type", str, "default")) for s in ropes} - {"default"}
    thetas = {t for s in (c, *ropes) if (t := s.get("rope_theta", float))}
    types = c.get("layer_types", list) or ["sliding_attention"] * (
        c.get("use_sliding_window", bool, False)
        and layers > c.get("max_window_layers", int, 28, low=0)
    )
    refuse(
        path,
        {
            f"model_type {kind!r}": kind not in HF_TYPES,
            f"rope scaling {scalings}": scalings,
            "rope scaling by layers": any(
                isinstance(v, dict) for s in ropes for v in s.content.values()
            ),
            "rope_scaling beside other rope_parameters": len(ropes) == 2
            and ropes[0].content != ropes[1].content,
            f"more than one rope_theta {thetas}": len(thetas) > 1,
            "partial_rotary_factor": any(
                s.get("partial_rotary_factor", float, 1, 0) != 1 for s in (c, *ropes)
            ),
            f"hidden_act {act!r}": act != "silu",
            "attention_bias": c.get("attention_bias", bool),
            "mlp_bias": c.get("mlp_bias", bool),
            "is_causal false": not c.get("is_causal", bool, True),
            "sliding-window layers": any(t != "full_attention" for t in types),
            "quantization_config": c.content.get("quantization_config"),
        },
    )
    qkv_bias, qk_norm = HF_TYPES[kind]
    heads, width = c.need("num_attention_heads", int), c.need("hidden_size", int)
    head_dim = c.get("head_dim", int, 128 if kind == "qwen3" else None)
    positions = min(c.need("max_position_embeddings", int), block_size or LARGEST)
    return dict(
        vocab_size=c.need("vocab_size", int),
        block_size=positions,
        n_layer=layers,
        n_head=heads,
        n_embd=width,
        n_kv_head=c.get("num_key_value_heads", int),
        head_dim=head_dim,
        n_hidden=c.need("intermediate_size", int),
        qkv_bias=qkv_bias,
        qk_norm=qk_norm,
        tie=c.get("tie_word_embeddings", bool, False),
        rope_theta=max(thetas, default=10000.0),
        norm_eps=c.get("rms_norm_eps", float, 1e-6, low=0),
    )


def hf_tensors(folder):
    """Every tensor of model.safetensors, or of the shards that its index lists."""
    files, index = [folder / "model.safetensors"], folder / "model.safetensors.index.json"
    if not files[0].exists() and index.exists():
        shards = read_json(index).need("weight_map", dict)
        files = sorted({folder / shards.need(name, str) for name in shards.content})
    tensors = {}
    for file in files:
        try:
            tensors.update(load_file(file))
        except FileNotFoundError:
            raise UserError(f"{file}: no such file") from None
        except Exception as e:
            raise UserError(
                f"{file} is not a readable safetensors file ({type(e).__name__})"
            ) from None
    return tensors


def hf_layout(model):
    """Our parameter -> what it is the concatenation of.

    Each part: (Hugging Face's name, shape, whether its rows are channels that get rotated).
    """
    c, layout = model.config, {}
    for ours, p in model.named_parameters():
        if not ours.startswith("blocks."):
            layout[ours] = [
                (
                    {
                        "wte.weight": "model.embed_tokens.weight",
                        "norm.weight": "model.norm.weight",
                    }.get(ours, ours),
                    p.shape,
                    False,
                )
            ]
            continue
        layer, name, leaf = re.fullmatch(r"blocks\.(\d+)\.(.+)\.(\w+)", ours).groups()
        if name == "attn.qkv":
            layout[ours] = [
                (
                    f"model.layers.{layer}.self_attn.{x}_proj.{leaf}",
                    (heads * c.head_dim, *p.shape[1:]),
                    x != "v",
                )
                for x, heads in zip("qkv", (c.n_head, c.n_kv_head, c.n_kv_head), strict=True)
            ]
        else:
            layout[ours] = [
                (
                    f"model.layers.{layer}.{HF_NAMES[name]}.{leaf}",
                    p.shape,
                    name in ("attn.q_norm", "attn.k_norm"),
                )
            ]
    return layout


def regroup(rows, n, D):
    """Another order of each head's D channels: n blocks become n interleaved strands.

    Hugging Face rotates channels i and i + D/2 together, we 2i and 2i + 1: n = 2 leads from their
    order to ours, n = D/2 back.
    """
    return rows.unflatten(0, (-1, n, D // n)).transpose(1, 2).flatten(0, 2)


def hf_state(folder, model, dtype=None):
    """The tensors of a folder as a state_dict for model, of which only shapes are needed.

    UserError if one is missing, misshapen or left over.
    """
    config, tensors, state = model.config, hf_tensors(folder), {}
    for ours, parts in hf_layout(model).items():
        for theirs, shape, rotated in parts:
            if theirs not in tensors:
                raise UserError(f"{folder}: tensor {theirs} is missing")
            t = tensors.pop(theirs)
            if t.shape != shape or not t.is_floating_point():
                found, right = f"shape {tuple(t.shape)}, {t.dtype}", f"{tuple(shape)}, floats"
                raise UserError(f"{folder}: tensor {theirs} has {found}, should have {right}")
            dtype = dtype or t.dtype  # the embedding's: it comes first
            state.setdefault(ours, []).append(
                (regroup(t, 2, config.head_dim) if rotated else t).to(dtype)
            )

    # two tensors that may be left over say nothing new: the rotations, and a tied head
    left = [k for k in tensors if not k.endswith("rotary_emb.inv_freq")]
    head = tensors.get("lm_head.weight")
    if head is not None and config.tie and torch.equal(head.to(dtype), state["wte.weight"][0]):
        left.remove("lm_head.weight")
    if left:
        raise UserError(
            f"{folder}: tensor {min(left)} is left over: config.json tells of no such thing"
        )
    return {k: torch.cat(v) if len(v) > 1 else v[0] for k, v in state.items()}


TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


def saved_files(folder):
    """The names of what the last save_pretrained wrote into a folder: model.safetensors lists them.

    UserError if the folder holds more by the names that a checkpoint's files have: they would be
    overwritten, or read together with what is written.
    """
    try:
        with safe_open(folder / "model.safetensors", "pt") as f:
            saved = set((f.metadata() or {}).get("saved", "").split())
    except (OSError, SafetensorError):
        saved = set()
    for name in ("config.json", "generation_config.json", "model.safetensors", *TOKENIZER):
        if name not in saved and os.path.lexists(folder / name):
            raise UserError(f"{folder} holds {name}, which no save wrote: choose another folder")
    return saved


def hf_save(model, folder, like=None, stop=None):
    """See GPT.save_pretrained."""
    c, weights, tensors, files = model.config, model.state_dict(), {}, {}
    kind = {v: k for k, v in HF_TYPES.items()}.get((c.qkv_bias, c.qk_norm))
    if kind is None or c.window:
        raise UserError(
            "save_pretrained: no Hugging Face model_type of ours has "
            + ("a sliding window" if c.window else "QKV bias and QK-norm")
        )
    for ours, parts in hf_layout(model).items():
        rows = weights[ours].detach().cpu().split([shape[0] for _, shape, _ in parts])
        for (theirs, _, rotated), t in zip(parts, rows, strict=True):
            tensors[theirs] = regroup(t, c.head_dim // 2, c.head_dim) if rotated else t
    if like:
        source, stop = hub_folder(like), stop or load_tokenizer(like).stop
        files = {f: read_text(source / f).encode() for f in TOKENIZER if (source / f).exists()}
    files["config.json"] = json.dumps(
        dict(
            architectures=[kind.capitalize() + "ForCausalLM"],
            model_type=kind,
            vocab_size=c.vocab_size,
            hidden_size=c.n_embd,
            intermediate_size=c.n_hidden,
            num_hidden_layers=c.n_layer,
            num_attention_heads=c.n_head,
            num_key_value_heads=c.n_kv_head,
            head_dim=c.head_dim,
            hidden_act="silu",
            max_position_embeddings=c.block_size,
            rms_norm_eps=c.norm_eps,
            tie_word_embeddings=c.tie,
            rope_theta=c.rope_theta,
            attention_bias=False,
            bos_token_id=None,
            eos_token_id=stop,
            torch_dtype=str(model.lm_head.weight.dtype)[6:],
        ),
        indent=1,
    ).encode()
    files["model.safetensors"] = save(
        tensors, dict(format="pt", saved=" ".join([*files, "model.safetensors"]))
    )
    before = saved_files(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:  # all are written before the first takes its name
            for name, content in files.items():
                f = stack.enter_context(whole(folder / name))
                f.write(content)
                f.flush()
            for name in before - set(files):  # an older save's
                (folder / name).unlink(missing_ok=True)
    except OSError as e:
        raise UserError(f"cannot write to {folder}: {e.strerror}") from None


# --------------------------------------------------------------------------------------------------
# Tokenizers


def split_pattern(stages):
    """The regular expression of a tokenizer.json's pre-tokenizers, None for kinds we don't know."""
    *first, last = [s.get("type", str) for s in stages] or [None]
    if last != "ByteLevel" or stages[-1].get("add_prefix_space", bool):
        return None
    own, s = stages[-1].get("use_regex", bool, True), stages[0]
    if not first and own:
        return SPLIT
    if (
        first == ["Digits"] and own
    ):  # numbers are cut out first, so that the space before one stays with the spaces before it
        one = r"\p{N}" if s.get("individual_digits", bool) else r"\p{N}+"
        return SPLIT.replace(r" ?\p{N}+", one).replace(r"(?!\S)", r"(?![^\s\p{N}])")
    if (
        first == ["Split"]
        and not own
        and (s.get("behavior", str), s.get("invert", bool))
        in (("Isolated", False), ("Removed", True))
    ):
        return s.need("pattern", dict).get("Regex", str)
    return None


def put_before(post):
    """The ids that the post-processor puts before a text. UserError if it does more."""
    ids = []
    for s in post.sections("processors") or [post]:
        kind = s.get("type", str)
        refuse(post.where, {str(kind): kind not in ("ByteLevel", "TemplateProcessing")})
        if kind == "TemplateProcessing":
            *first, last = s.sections("single") or [s]
            refuse(s.where, {"anything after the text": "Sequence" not in last.content})
            names = [part.need("SpecialToken", dict).need("id", str) for part in first]
            tokens = s.need("special_tokens", dict)
            ids = [i for name in names for i in tokens.need(name, dict).ids("ids")] + ids
    return ids


def named_tokens(folder):
    """bos_token, eos_token and the like: name -> text, by the files beside tokenizer.json."""
    settings = read_json(folder / "tokenizer_config.json", optional=True)
    content = settings.content
    if "added_tokens_decoder" not in content:  # the older place
        content = content | read_json(folder / "special_tokens_map.json", optional=True).content
    texts = Section(
        settings.where,
        {k: v.get("content", v) if isinstance(v, dict) else v for k, v in content.items()},
    )
    names = [f"{k}_token" for k in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]
    return {name: text for name in names if (text := texts.get(name, str))}


def read_vocabulary(path, content, model):
    """-> (vocabulary: token -> id, added tokens: token -> id, those of them that are normalized).

    UserError for what the library would number or find otherwise.
    """
    vocab, added = model.need("vocab", dict), content.sections("added_tokens")
    vocab = {t: vocab.need(t, int, low=0) for t in vocab.content}
    special = {t.need("content", str): t.need("id", int, low=0) for t in added}
    normalized = {t.need("content", str) for t in added if t.get("normalized", bool)}
    # the library numbers added tokens itself: as in the vocabulary, or on from its end
    new = iter(range(len(vocab), len(vocab) + len(special)))
    order = sorted(special, key=special.get)
    numbered = {t: vocab[t] if t in vocab else next(new) for t in order}
    faults = {
        f"an added token with {k}": any(t.get(k, bool) for t in added)
        for k in ("lstrip", "rstrip", "single_word")
    }
    twice = len(added) > len(special) or len({*vocab.values()}) < len(vocab)
    refuse(
        path,
        {
            **faults,
            "an empty token": "" in special or "" in vocab,
            "a token or an id that is there twice": twice,
            "an added token that is not numbered on": numbered != special,
        },
    )
    return vocab, special, normalized


def read_merges(path, model, vocab, special):
    """-> (each token's byte string -> its id, as tiktoken has it; the bytes that have no token)."""
    # GPT-2 writes a byte as one printable character: itself where it is one, else one from 256 on
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = enumerate(sorted(set(range(256)) - set(printable)))
    byte = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in others}
    missing = set(byte.values()) - {byte.get(t) for t in vocab}
    pairs = [m.split(" ") if isinstance(m, str) else m for m in model.need("merges", list)]
    odd = [p for p in pairs if not isinstance(p, list) or [*map(type, p)] != [str, str]]
    made = [vocab.get("".join(p), -1) for p in pairs if not odd]
    foreign = [t for t in vocab if t not in special and not byte.keys() >= set(t)]
    merged = {i for t, i in vocab.items() if len(t) > 1 and t not in special}
    settings = ("dropout", "byte_fallback", "continuing_subword_prefix", "end_of_word_suffix")
    refuse(
        path,
        {
            **{k: model.content.get(k) for k in settings},
            "an unk_token for missing bytes": model.content.get("unk_token") and missing,
            f"token {foreign[:1]} (not byte-level)": foreign,
            f"merge {odd[:1]}": odd,
            "a merge order that is not that of the ids": -1 in made or made != sorted(made),
            "a token that no merge makes": merged - set(made),
        },
    )
    ranks = {bytes(byte[c] for c in t): i for t, i in vocab.items() if t not in special}
    return ranks, missing


def load_tokenizer(name):
    """The byte-level BPE of a Hugging Face folder or hub id -> tiktoken.Encoding, and more.

    stop: the ids that end a text: tokenizer_config.json's eos_token, then the eos_token_id of
    generation_config.json, or of config.json where that has none. eos: the first of them.
    prefix: the ids that the file's post-processor puts before a text; `encode` does not.
    UserError for a missing or damaged file, and for what is not supported: other tokenizers, other
    ways to split, merges that are not in the order of their ids, as tiktoken needs them. (That each
    token is what the merges make of its own bytes, as training ensures, is not checked.)
    """
    folder = hub_folder(name)
    path = folder / "tokenizer.json"
    content = read_json(path)
    model = content.need("model", dict)
    kind = model.get("type", str)
    refuse(path, {f"a {kind} model": kind != "BPE"})
    names = ("normalizer", "pre_tokenizer", "decoder", "post_processor")
    normalizer, splitter, decoder, post = (content.get(k, dict, Section(path, {})) for k in names)
    vocab, special, normalized = read_vocabulary(path, content, model)
    ranks, missing = read_merges(path, model, vocab, special)
    pattern = split_pattern(splitter.sections("pretokenizers") or [splitter])
    prefix = put_before(post) if post.content else []
    known = {*vocab.values(), *special.values()}
    form, written = normalizer.get("type", str), decoder.get("type", str)
    refuse(
        path,
        {
            f"normalizer {form}": normalizer.content and form != "NFC",
            f"pre-tokenizer {json.dumps(splitter.content)}": pattern is None,
            f"decoder {written}": written != "ByteLevel",
            "a post-processor's id without a token": set(prefix) - known,
        },
    )
    try:
        encoding = PretrainedBPE(
            str(name), pat_str=pattern, mergeable_ranks=ranks, special_tokens=special
        )
    except ValueError as e:
        raise UserError(f"{path}: {e}") from None
    encoding.nfc, encoding.missing = bool(normalizer.content), missing
    encoding.known, encoding.normalized = known, normalized
    encoding.prefix, encoding.stop = prefix, ends(folder, {**vocab, **special})
    encoding.eos = encoding.stop[0]
    return encoding


def ends(folder, vocab):
    """The ids that end a text, see load_tokenizer."""
    eos = vocab.get(named_tokens(folder).get("eos_token"))
    generation, config = (
        read_json(folder / f"{k}config.json", optional=True).ids("eos_token_id")
        for k in ("generation_", "")
    )
    stop = list(dict.fromkeys([eos] * (eos is not None) + (generation or config)))
    if not stop:
        raise UserError(f"{folder}: none of its config files names an end-of-text token")
    return stop


def chat_environment():
    """What transformers lets a chat template, which is a program, use."""
    import jinja2
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment  # comes with torch

    class Generation(jinja2.ext.Extension):
        """{% generation %} marks what an assistant wrote, and changes nothing."""

        tags = {"generation"}

        def parse(self, parser):
            next(parser.stream)
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return jinja2.nodes.Scope(body)

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(x, ensure_ascii=False, **more):  # jinja's own escapes HTML and sorts
        return json.dumps(x, ensure_ascii=ensure_ascii, **more)

    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return env


def load_chat_template(name):
    """The chat template of a Hugging Face folder or hub id, as a function.

    It takes a user's message to the text up to where the answer starts; its attribute `end` is the
    text that the template puts after an answer.
    """
    folder = hub_folder(name)
    settings, file = (
        read_json(folder / "tokenizer_config.json", optional=True),
        folder / "chat_template.jinja",
    )
    source = read_text(file) if file.exists() else settings.content.get("chat_template")
    if isinstance(source, list):
        source = {
            t.need("name", str): t.need("template", str) for t in settings.sections("chat_template")
        }
    if isinstance(source, dict):
        source = source.get("default")
    if not isinstance(source, str):
        raise UserError(
            f"{folder}: neither chat_template.jinja nor tokenizer_config.json has a chat template"
        )
    tokens, env = named_tokens(folder), chat_environment()

    def render(question, answer=None):
        messages = [dict(role="user", content=question), dict(role="assistant", content=answer)]
        try:
            return env.from_string(source).render(
                messages=messages[: 1 + bool(answer)],
                tools=None,
                documents=None,
                add_generation_prompt=not answer,
                **tokens,
            )
        except Exception as e:
            raise UserError(
                f"{folder}: its chat template fails ({type(e).__name__}: {e})"
            ) from None

    place = "\ufffc"  # stands nowhere else
    _, found, end = render("question", place).rpartition(place)
    render.end = end if found else ""
    return render
