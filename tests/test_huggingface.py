"""Hugging Face folders: our logits are those of an independent forward pass and of transformers,
our ids those of the tokenizers library, what we write they read, and what we can't read is one
line. The oracles in this file need neither library; both are used where installed.
"""

import contextlib
import itertools
import json
import os
import random
import re
import resource
import subprocess
import sys
import unicodedata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pytest
import regex
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import huggingface
from engine import generate
from experiment import UserError
from huggingface import hf_config, load_chat_template, load_tokenizer
from model import GPT, GPTConfig
from tasks.wordproblems import word_problems
from tokenizer import SPLIT, bpe_merges

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = [[3], [1, 4, 1, 5, 9, 2, 6], [5, 3, 5], [8, 9, 7, 9] * 5]
BASE = dict(
    hidden_act="silu",
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=96,
    rms_norm_eps=1e-4,
    torch_dtype="float32",
)
KINDS = {
    "llama": dict(model_type="llama", tie_word_embeddings=False, rope_theta=500.0),
    "smollm": dict(
        model_type="llama",
        tie_word_embeddings=True,
        num_attention_heads=3,
        num_key_value_heads=1,
        hidden_size=24,
        rope_parameters=dict(rope_type="default", rope_theta=100.0),
    ),
    "qwen2": dict(
        model_type="qwen2",
        tie_word_embeddings=True,
        rope_theta=1000.0,
        sliding_window=8,
        use_sliding_window=False,
        max_window_layers=2,
    ),
    "qwen3": dict(
        model_type="qwen3",
        tie_word_embeddings=False,
        head_dim=16,
        rope_theta=1e6,
        rope_scaling=None,
        layer_types=["full_attention"] * 2,
    ),
}


def tensors_of(c, seed=0):
    """Every weight of a config.json by Hugging Face's names, random and large."""
    g, C, M = torch.Generator().manual_seed(seed), c["hidden_size"], c["intermediate_size"]
    H, K, kind = c["num_attention_heads"], c["num_key_value_heads"], c["model_type"]
    D = c.get("head_dim") or C // H
    shapes = {"model.embed_tokens.weight": (c["vocab_size"], C), "model.norm.weight": (C,)}
    if not c["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (c["vocab_size"], C)
    for i in range(c["num_hidden_layers"]):
        a, m = f"model.layers.{i}.self_attn.", f"model.layers.{i}.mlp."
        shapes |= {
            f"model.layers.{i}.{n}_layernorm.weight": (C,) for n in ("input", "post_attention")
        }
        shapes |= {
            a + "q_proj.weight": (H * D, C),
            a + "k_proj.weight": (K * D, C),
            a + "v_proj.weight": (K * D, C),
            a + "o_proj.weight": (C, H * D),
        }
        shapes |= {
            m + "gate_proj.weight": (M, C),
            m + "up_proj.weight": (M, C),
            m + "down_proj.weight": (C, M),
        }
        if kind == "qwen2":
            shapes |= {
                a + "q_proj.bias": (H * D,),
                a + "k_proj.bias": (K * D,),
                a + "v_proj.bias": (K * D,),
            }
        if kind == "qwen3":
            shapes |= {a + "q_norm.weight": (D,), a + "k_norm.weight": (D,)}
    return {
        k: torch.randn(s, generator=g) * 0.3 + k.endswith("norm.weight") for k, s in shapes.items()
    }


def write(folder, c, tensors, shards=0):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(c))
    if not shards:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    def name(i):
        return f"model-{i + 1:05d}-of-{shards:05d}.safetensors"

    where = {k: name(i % shards) for i, k in enumerate(sorted(tensors))}
    for i in range(shards):
        save_file(
            {k: tensors[k] for k, f in where.items() if f == name(i)},
            folder / name(i),
            metadata={"format": "pt"},
        )
    (folder / "model.safetensors.index.json").write_text(
        json.dumps(dict(metadata={}, weight_map=where))
    )
    return folder


def reference(c, w, ids):
    """The Llama family's equations with Hugging Face's tensors and its halves (i, i + D/2) ->
    logits (T, V).
    """

    def norm(x, name):
        return (
            x
            * (x.square().mean(-1, keepdim=True) + c["rms_norm_eps"]).rsqrt()
            * w[name + ".weight"]
        )

    def linear(x, name):
        return F.linear(x, w[name + ".weight"], w.get(name + ".bias"))

    H, K, T, x = (
        c["num_attention_heads"],
        c["num_key_value_heads"],
        len(ids),
        w["model.embed_tokens.weight"][ids],
    )
    D, theta = (
        c.get("head_dim") or c["hidden_size"] // H,
        c.get("rope_theta") or c["rope_parameters"]["rope_theta"],
    )
    angle = torch.arange(T)[:, None] * theta ** (-torch.arange(0, D, 2) / D)
    cos, sin = torch.cat((angle, angle), -1).cos(), torch.cat((angle, angle), -1).sin()  # (T, D)

    def turn(x):
        return x * cos + torch.cat((-x[..., D // 2 :], x[..., : D // 2]), -1) * sin

    for i in range(c["num_hidden_layers"]):
        a, y = f"model.layers.{i}.self_attn.", norm(x, f"model.layers.{i}.input_layernorm")
        q, k, v = (linear(y, f"{a}{n}_proj").view(T, -1, D).transpose(0, 1) for n in "qkv")
        q, k = (
            (norm(q, a + "q_norm"), norm(k, a + "k_norm")) if c["model_type"] == "qwen3" else (q, k)
        )
        k, v = turn(k).repeat_interleave(H // K, 0), v.repeat_interleave(H // K, 0)
        scores = (turn(q) @ k.mT / D**0.5).masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)
        x = x + linear((scores.softmax(-1) @ v).transpose(0, 1).reshape(T, -1), a + "o_proj")
        y, m = norm(x, f"model.layers.{i}.post_attention_layernorm"), f"model.layers.{i}.mlp."
        x = x + linear(
            F.silu(linear(y, m + "gate_proj")) * linear(y, m + "up_proj"), m + "down_proj"
        )
    return (
        norm(x, "model.norm")
        @ w["model.embed_tokens.weight" if c["tie_word_embeddings"] else "lm_head.weight"].T
    )


@pytest.fixture(params=KINDS)
def kind(request):
    return {**BASE, **KINDS[request.param]}


def refused(*words):
    """One line that holds these words."""
    return pytest.raises(
        UserError, match=r"\A[^\n]*" + "[^\n]*".join(map(re.escape, words)) + r"[^\n]*\Z"
    )


# --------------------------------------------------------------------------------------------------
# Weights


@pytest.mark.parametrize("shards", [0, 3])
def test_logits_are_those_of_the_halves_and_the_names_of_hugging_face(kind, shards, tmp_path):
    w = tensors_of(kind)
    gpt = GPT.from_pretrained(write(tmp_path, kind, w, shards))
    for prompt in PROMPTS:
        with torch.no_grad():
            assert (gpt(torch.tensor([prompt]))[0] - reference(kind, w, prompt)).abs().max() < 1e-4


def test_saving_gives_back_every_tensor_to_the_bit_and_loading_it_again_the_same_model(
    kind, tmp_path
):
    w = tensors_of(kind)
    gpt = GPT.from_pretrained(write(tmp_path / "a", kind, w))
    gpt.save_pretrained(tmp_path / "b")
    saved, c = (
        load_file(tmp_path / "b/model.safetensors"),
        json.loads((tmp_path / "b/config.json").read_text()),
    )
    assert saved.keys() == w.keys() and all(torch.equal(saved[k], w[k]) for k in w)
    assert c["model_type"] == kind["model_type"]
    assert c["tie_word_embeddings"] == kind["tie_word_embeddings"]
    assert c["max_position_embeddings"] == 96
    again = GPT.from_pretrained(tmp_path / "b")
    assert again.config == gpt.config
    assert all(torch.equal(a, b) for a, b in zip(gpt.parameters(), again.parameters(), strict=True))
    assert not list(tmp_path.glob("b/*.tmp"))


def test_a_loaded_model_trains_and_a_tied_head_stays_tied(kind, tmp_path):
    gpt = GPT.from_pretrained(write(tmp_path, kind, tensors_of(kind)))
    gpt(torch.tensor([[1, 2, 3]])).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in gpt.parameters())
    assert (gpt.lm_head.weight is gpt.wte.weight) == kind["tie_word_embeddings"]
    assert len(list(gpt.parameters())) == len(list(GPT(gpt.config).parameters()))


def test_the_dtype_is_the_files_or_the_callers_and_fewer_positions_change_nothing_else(
    kind, tmp_path
):
    w = {k: v.bfloat16() for k, v in tensors_of(kind).items()}
    # some checkpoints mix: the embedding decides
    w["model.norm.weight"] = w["model.norm.weight"].float()
    write(tmp_path, kind, w)
    assert {p.dtype for p in GPT.from_pretrained(tmp_path).parameters()} == {torch.bfloat16}
    gpt = GPT.from_pretrained(tmp_path, dtype=torch.float32, block_size=20)
    assert {p.dtype for p in gpt.parameters()} == {torch.float32}
    assert gpt.config.block_size == 20 == len(gpt.rope)
    with torch.no_grad():
        assert (
            gpt(torch.tensor([PROMPTS[1]]))[0]
            - reference(kind, {k: v.float() for k, v in w.items()}, PROMPTS[1])
        ).abs().max() < 1e-4
    assert GPT.from_pretrained(tmp_path, block_size=10**6).config.block_size == 96
    GPT.from_pretrained(tmp_path).save_pretrained(tmp_path / "b")
    assert json.loads((tmp_path / "b/config.json").read_text())["torch_dtype"] == "bfloat16"


def test_a_tied_head_may_be_stored_twice_but_not_differ_and_old_rotary_tables_are_no_weights(
    tmp_path,
):
    c, w = {**BASE, **KINDS["smollm"]}, tensors_of({**BASE, **KINDS["smollm"]})
    GPT.from_pretrained(
        write(
            tmp_path / "a",
            c,
            {
                **w,
                "lm_head.weight": w["model.embed_tokens.weight"].clone(),
                "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
            },
        )
    )
    with refused("lm_head.weight", "left over"):
        GPT.from_pretrained(
            write(tmp_path / "b", c, {**w, "lm_head.weight": w["model.embed_tokens.weight"] + 1})
        )


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(model_type="gemma3"), ["gemma3"]),
        (dict(model_type=None), ["model_type"]),
        (dict(rope_scaling=dict(rope_type="llama3", factor=8.0)), ["rope scaling", "llama3"]),
        (dict(rope_scaling=dict(type="linear", factor=2.0)), ["rope scaling", "linear"]),
        (dict(rope_parameters=dict(rope_type="yarn", rope_theta=1.0)), ["yarn"]),
        (dict(rope_parameters=dict(full_attention=dict(rope_type="linear"))), ["rope scaling"]),
        (dict(num_hidden_layers=None), ["num_hidden_layers is missing"]),
        (dict(partial_rotary_factor=0.5), ["partial_rotary_factor"]),
        (dict(hidden_act="gelu"), ["gelu"]),
        (dict(attention_bias=True), ["attention_bias"]),
        (dict(mlp_bias=True), ["mlp_bias"]),
        (dict(layer_types=["full_attention", "sliding_attention"]), ["sliding"]),
        (
            dict(
                model_type="qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=1
            ),
            ["sliding"],
        ),
        (dict(quantization_config=dict(bits=4)), ["quantization_config"]),
        (
            dict(num_attention_heads=3, num_key_value_heads=2, head_dim=8),
            ["config.json", "n_kv_head"],
        ),
        (dict(is_causal=False), ["is_causal"]),
        (dict(layer_types=["full_attention", "linear_attention"]), ["layers"]),
        (dict(rope_scaling=dict(partial_rotary_factor=0.5)), ["partial_rotary_factor"]),
    ],
)
def test_what_is_not_supported_is_one_line_that_names_it(change, words, tmp_path):
    with refused(*words):
        GPT.from_pretrained(
            write(tmp_path, {**BASE, **KINDS["llama"], **change}, {"x": torch.zeros(1)})
        )


YARN = dict(type="yarn", factor=4.0, original_max_position_embeddings=2048)


@pytest.mark.parametrize(
    "scaling, parameters, words",
    [
        (YARN, dict(rope_type="default", rope_theta=500.0), ["rope scaling", "yarn"]),
        (YARN, None, ["rope scaling", "yarn"]),
        (None, YARN, ["rope scaling", "yarn"]),
        (dict(type="default"), {**YARN, "rope_type": "yarn"}, ["rope scaling", "yarn"]),
        (dict(type="default"), dict(rope_theta=500.0), ["rope_scaling beside"]),
        (None, dict(rope_theta=400.0), ["more than one rope_theta", "400"]),
        (dict(rope_theta=500.0), dict(rope_theta=500.0), None),
        (None, dict(rope_theta=500), None),
    ],
)
def test_two_spellings_of_a_rotation_agree_or_are_refused(scaling, parameters, words, tmp_path):
    c = {**BASE, **KINDS["llama"], "rope_scaling": scaling, "rope_parameters": parameters}
    folder = write(tmp_path, c, tensors_of(c))
    if words is None:
        assert GPT.from_pretrained(folder).config.rope_theta == 500.0
    else:
        with refused("config.json", *words):
            GPT.from_pretrained(folder)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(rope_scaling="linear"), ["rope_scaling", "linear", "object"]),
        (dict(vocab_size="300"), ["vocab_size", "300", "whole number"]),
        (dict(hidden_size=-16), ["hidden_size", "-16"]),
        (dict(hidden_size=0), ["hidden_size is 0"]),
        (dict(num_hidden_layers=True), ["num_hidden_layers", "whole number"]),
        (dict(num_hidden_layers=10**9), ["num_hidden_layers", "1000000000"]),
        (dict(vocab_size=10**40), ["vocab_size"]),
        (dict(max_position_embeddings=2**30, head_dim=2**29), ["positions", "GiB"]),
        (dict(num_key_value_heads=0), ["num_key_value_heads"]),
        (dict(rms_norm_eps=float("nan")), ["rms_norm_eps"]),
        (dict(rope_theta=float("inf")), ["rope_theta"]),
        (dict(rope_theta=0), ["rope_theta"]),
        (dict(model_type=["llama"]), ["model_type"]),
        (dict(attention_bias="false"), ["attention_bias", "true or false"]),
        (dict(layer_types=8), ["layer_types"]),
        (dict(hidden_act=dict()), ["hidden_act"]),
        (dict(head_dim=8.5), ["head_dim"]),
        (dict(partial_rotary_factor=[1]), ["partial_rotary_factor"]),
        (dict(hidden_size=33), ["n_embd 33"]),
    ],
)
def test_a_config_of_a_wrong_type_or_out_of_range_is_one_line_that_names_it(
    change, words, tmp_path
):
    with refused("config.json", *words):
        GPT.from_pretrained(
            write(tmp_path, {**BASE, **KINDS["llama"], **change}, {"x": torch.zeros(1)})
        )


def test_a_json_that_is_no_object_of_objects_is_one_line_that_names_it(tmp_path):
    c = {**BASE, **KINDS["llama"]}
    for index in (dict(weight_map=["a"]), dict(weight_map=dict(x=["a"])), dict(), [1]):
        write(tmp_path, c, {})
        (tmp_path / "model.safetensors").unlink()
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        with refused("model.safetensors.index.json"):
            GPT.from_pretrained(tmp_path)
    for text in ("[" * 10**5, "{" + '"a":{' * 10**5, '\ufeff"no"', "9" * 10**5):
        (tmp_path / "config.json").write_text(text)
        with refused("config.json", "JSON"):
            GPT.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(c), "utf-16")
    with refused("config.json", "UTF-8"):
        GPT.from_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").mkdir()
    with refused("config.json", "cannot be read"):
        GPT.from_pretrained(tmp_path)
    for name in ("a" * 300, "a\0b", tmp_path / "config.json" / "b"):
        with refused("no such folder"):
            GPT.from_pretrained(name)


def test_what_a_config_leaves_out_is_what_transformers_takes_it_to_mean(tmp_path):
    least = {
        k: v
        for k, v in BASE.items()
        if k not in ("rms_norm_eps", "num_key_value_heads", "hidden_act")
    }
    for name, head_dim in (("llama", None), ("qwen2", None), ("qwen3", 128)):
        (tmp_path / "config.json").write_text(json.dumps({**least, "model_type": name}))
        c = hf_config(tmp_path / "config.json")
        assert (c["tie"], c["rope_theta"], c["norm_eps"], c["head_dim"], c["n_kv_head"]) == (
            False,
            10000.0,
            1e-6,
            head_dim,
            None,
        )
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                **BASE,
                "model_type": "qwen2",
                "use_sliding_window": True,
                "sliding_window": 8,
                "max_window_layers": 2,
            }
        )
    )
    # no layer past max_window_layers: none slides
    assert hf_config(tmp_path / "config.json")["n_layer"] == 2


@pytest.mark.parametrize(
    "key",
    [
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "max_position_embeddings",
    ],
)
def test_a_config_without_a_number_that_it_needs_is_one_line_that_names_it(key, tmp_path):
    with refused("config.json", key):
        GPT.from_pretrained(
            write(
                tmp_path,
                {k: v for k, v in {**BASE, **KINDS["llama"]}.items() if k != key},
                {"x": torch.zeros(1)},
            )
        )


def test_a_tensor_missing_left_over_or_of_a_wrong_shape_is_one_line_that_names_it(kind, tmp_path):
    w = tensors_of(kind)
    for i, name in enumerate(w):
        with refused(name, "missing"):
            GPT.from_pretrained(
                write(tmp_path / f"missing{i}", kind, {k: v for k, v in w.items() if k != name})
            )
        for wrong in (w[name].flatten()[1:], w[name][:-2], w[name][None], w[name].to(torch.int8)):
            with refused(name, "shape"):
                GPT.from_pretrained(write(tmp_path / f"shape{i}", kind, {**w, name: wrong}))
    for name in (
        "model.layers.2.input_layernorm.weight",
        "model.layers.0.self_attn.o_proj.bias",
        "visual.weight",
    ):
        with refused(name, "left over"):
            GPT.from_pretrained(write(tmp_path / "more", kind, {**w, name: torch.zeros(3)}))


def test_a_missing_or_damaged_file_is_one_line_that_names_it(tmp_path):
    c = {**BASE, **KINDS["llama"]}
    w = tensors_of(c)
    file = write(tmp_path, c, w) / "model.safetensors"
    whole = file.read_bytes()
    for damaged in (b"", whole[:5], whole[:200], whole[:-1], b"x" * 100):
        file.write_bytes(damaged)
        with refused("model.safetensors", "not a readable"):
            GPT.from_pretrained(tmp_path)
    file.unlink()
    with refused("model.safetensors", "no such file"):
        GPT.from_pretrained(tmp_path)
    write(tmp_path, c, w, shards=2)
    file.unlink(missing_ok=True)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with refused("model-00002-of-00002.safetensors", "no such file"):
        GPT.from_pretrained(tmp_path)
    for damaged in ("{", "[]", ""):
        (tmp_path / "config.json").write_text(damaged)
        with refused("config.json", "JSON"):
            GPT.from_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with refused("config.json", "no such file"):
        GPT.from_pretrained(tmp_path)


def test_a_hub_name_while_offline_is_one_line_and_exit_code_2(tmp_path):
    names = ["no/such-model", "nothing", "/no/such/folder", "not a name!"]
    code = """
import sys
from experiment import command
from model import GPT
for name in sys.argv[1:]:
    try:
        command(lambda: GPT.from_pretrained(name))
    except SystemExit as stopped:
        assert stopped.code == 2
"""
    done = subprocess.run(
        [sys.executable, "-c", code, *names],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    for name, line in zip(names, done.stderr.splitlines(), strict=True):
        assert line.startswith(f"-c: error: {name}: ")


def test_a_model_without_a_name_at_hugging_face_is_not_written(tmp_path):
    for more in (dict(window=4), dict(qkv_bias=True, qk_norm=True)):
        with refused("save_pretrained"):
            GPT(GPTConfig(11, 16, 1, 2, 16, **more)).save_pretrained(tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_an_interrupted_save_leaves_the_old_checkpoint_whole(tmp_path, monkeypatch):
    GPT(GPTConfig(11, 16, 1, 2, 16)).save_pretrained(tmp_path)
    before = contents(tmp_path)

    def dies(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("experiment.os.fsync", dies)
    with pytest.raises(KeyboardInterrupt):
        GPT(GPTConfig(11, 16, 2, 2, 16)).save_pretrained(tmp_path)
    assert contents(tmp_path) == before


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize("room", [100, 900, 12000])
def test_a_full_disk_is_one_line_and_leaves_the_older_save_whole_and_nothing_else(room, tmp_path):
    GPT(GPTConfig(300, 16, 1, 2, 16)).save_pretrained(tmp_path)
    before, limits = contents(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    # no file may grow larger: nor does /dev/full let a folder be
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        with refused("cannot write", str(tmp_path)):
            GPT(GPTConfig(300, 16, 2, 2, 16)).save_pretrained(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert contents(tmp_path) == before


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_disk_that_is_full_when_the_smallest_file_comes_leaves_the_older_save_whole(
    tmp_path, monkeypatch
):
    GPT(GPTConfig(300, 16, 1, 2, 16)).save_pretrained(tmp_path)
    before, whole = contents(tmp_path), huggingface.whole

    @contextlib.contextmanager
    def full(path):
        with whole(path) as f, open("/dev/full", "wb") as nothing:
            yield nothing if path.name == "config.json" else f

    monkeypatch.setattr(huggingface, "whole", full)
    with refused("cannot write", "config.json", "No space left"):
        GPT(GPTConfig(300, 16, 2, 2, 16)).save_pretrained(tmp_path)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "model.safetensors",
        "generation_config.json",
        "chat_template.jinja",
        "tokenizer.json",
    ],
)
def test_a_save_touches_no_file_that_no_save_wrote(name, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / name).write_text("mine")
    before = contents(tmp_path)
    with refused(str(tmp_path), name, "another folder"):
        GPT(GPTConfig(11, 16, 1, 2, 16)).save_pretrained(tmp_path)
    assert contents(tmp_path) == before
    (tmp_path / name).unlink()
    for layers in (1, 2):
        GPT(GPTConfig(11, 16, layers, 2, 16)).save_pretrained(tmp_path)
        assert GPT.from_pretrained(tmp_path).config.n_layer == layers
        assert (tmp_path / "README.md").read_text() == "mine"


def test_a_folder_holds_what_was_saved_last_and_nothing_older(merges, tmp_path):
    a = save_json(tmp_path / "a", make_json(merges))
    b = save_json(
        tmp_path / "b",
        make_json(merges),
        eos_token="<|im_end|>",
        chat_template="B{{ messages[0]['content'] }}",
    )
    out = tmp_path / "out"
    (a / "chat_template.jinja").write_text("A")

    def save(**like):
        return GPT(GPTConfig(600, 16, 1, 2, 16)).save_pretrained(out, **like)

    save(like=a)
    assert load_chat_template(out)("?") == "A"
    save(like=b)
    assert load_chat_template(out)("?") == "B?"
    assert contents(out).keys() == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    save(like=out)
    assert load_chat_template(out)("?") == "B?"
    save()
    assert contents(out).keys() == {"config.json", "model.safetensors"}
    with safe_open(out / "model.safetensors", "pt") as f:
        assert f.metadata()["format"] == "pt"


# --------------------------------------------------------------------------------------------------
# Tokenizers

QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = [*range(33, 127), *range(161, 173), *range(174, 256)]
PRINTABLE = {b: chr(b) for b in BYTES} | {
    b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in BYTES)
}
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "<think>!"]


def level(use_regex):
    return dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=use_regex)


def sequence(first, use_regex):
    return dict(type="Sequence", pretokenizers=[first, level(use_regex)])


def split(pattern):
    return dict(type="Split", pattern=dict(Regex=pattern), behavior="Isolated", invert=False)


GPT2 = level(True)
TOKENIZERS = {
    "gpt2": dict(pre_tokenizer=GPT2),
    "smollm": dict(pre_tokenizer=sequence(dict(type="Digits", individual_digits=True), True)),
    "digit runs": dict(pre_tokenizer=sequence(dict(type="Digits", individual_digits=False), True)),
    "qwen": dict(pre_tokenizer=sequence(split(QWEN), False), normalizer=dict(type="NFC")),
    "llama3": dict(
        pre_tokenizer=sequence(split(QWEN.replace(r"\p{N}|", r"\p{N}{1,3}|")), False),
        ignore_merges=True,
    ),
    "missing bytes": dict(pre_tokenizer=GPT2, drop=[0x04, 0x13, 0xF1, 0xF2]),
}
CORPUS = (
    (ROOT / "LICENSE").read_text()
    + "def f(x):\n    return x + 1  # don't 12, 1234 == 5\n\n" * 5
    + "naïve café 東京都と京都 Übermut 123 1234 12   \n\n" * 9
)


def merges_of(text, n):
    """The pairs of a BPE: what each merged byte string is made of, by the merges before it."""
    ranks, pairs = {}, []
    for merged in bpe_merges(text, n):
        parts = bpe([bytes([b]) for b in merged], ranks)
        assert len(parts) == 2
        pairs.append(tuple(parts))
        ranks[pairs[-1]] = len(ranks)
    return pairs


def bpe(parts, ranks):
    while True:
        rank, i = min(
            ((ranks.get(p, len(ranks)), i) for i, p in enumerate(itertools.pairwise(parts))),
            default=(len(ranks), 0),
        )
        if rank == len(ranks):
            return parts
        parts = parts[:i] + [parts[i] + parts[i + 1]] + parts[i + 2 :]


@pytest.fixture(scope="module")
def merges():
    return merges_of(CORPUS, 300)


@pytest.fixture(params=TOKENIZERS)
def tokenizer_json(request, merges):
    return make_json(merges, **TOKENIZERS[request.param])


def make_json(merges, pre_tokenizer=GPT2, normalizer=None, ignore_merges=False, drop=()):
    """Special tokens first, as SmolLM2's, then bytes in an order of their own, then merges, then
    what was added later.
    """

    def write(data):
        return "".join(PRINTABLE[b] for b in data)

    vocab = [
        *SPECIAL[:3],
        *(PRINTABLE[b] for b in sorted(range(256), key=lambda b: PRINTABLE[b]) if b not in drop),
        *(write(a + b) for a, b in merges),
    ]
    added = [
        dict(
            id=i if i < 3 else len(vocab) + i - 3,
            content=s,
            single_word=False,
            lstrip=False,
            rstrip=False,
            normalized=False,
            special=i < 3,
        )
        for i, s in enumerate(SPECIAL)
    ]
    return dict(
        version="1.0",
        truncation=None,
        padding=None,
        added_tokens=added,
        normalizer=normalizer,
        pre_tokenizer=pre_tokenizer,
        post_processor=None,
        decoder=level(True),
        model=dict(
            type="BPE",
            dropout=None,
            unk_token=None,
            continuing_subword_prefix="",
            end_of_word_suffix="",
            fuse_unk=False,
            byte_fallback=False,
            ignore_merges=ignore_merges,
            vocab={t: i for i, t in enumerate(vocab)},
            merges=[[write(a), write(b)] for a, b in merges],
        ),
    )


def save_json(folder, content, **settings):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(settings or dict(eos_token="<|im_end|>"))
    )
    return folder


def reference_ids(content, text):
    """What a tokenizer.json means, step by step: special tokens, normalizer, each pre-tokenizer in
    turn, bytes, merges in their order.
    """
    vocab, ranks = (
        content["model"]["vocab"],
        {tuple(p): i for i, p in enumerate(content["model"]["merges"])},
    )
    special, ids = {t["content"]: t["id"] for t in content["added_tokens"]}, []
    for part in re.split(
        "(" + "|".join(map(re.escape, sorted(special, key=len, reverse=True))) + ")", text
    ):
        if part in special:
            ids.append(special[part])
            continue
        pieces = [unicodedata.normalize("NFC", part) if content["normalizer"] else part]
        stages = content["pre_tokenizer"].get("pretokenizers", [content["pre_tokenizer"]])
        for s in stages:
            if s["type"] == "Digits":
                pieces = [
                    q
                    for p in pieces
                    for q in regex.findall(
                        (r"\p{N}" if s["individual_digits"] else r"\p{N}+") + r"|\P{N}+", p
                    )
                ]
            if s["type"] == "Split" or s.get("use_regex"):
                pieces = [
                    q
                    for p in pieces
                    for q in regex.findall(
                        s["pattern"]["Regex"] if s["type"] == "Split" else SPLIT, p
                    )
                ]
        for piece in pieces:
            ids += [
                vocab[t]
                for t in bpe([PRINTABLE[b] for b in piece.encode() if PRINTABLE[b] in vocab], ranks)
            ]
    return ids


def strings(n, seed=0):
    """Code, Unicode from everywhere, words between all kinds of space, special tokens whole and
    torn, digits and contractions.
    """
    r = random.Random(seed)
    code = "".join((ROOT / f).read_text() for f in ("model.py", "kernels.py", "engine.py"))
    spaces = " \t\n\r\xa0\u2003\u3000\x0b\x0c\x85\u200b\u2028\ufeff"
    text = (
        "the cat don't I'LL WE'VE naïve cafe\u0301 A\u030a 北京 हिन्दी العربية 한국어 한 🙂 👨‍👩‍👧 "
        "½ ² Ⅷ ٣ 12 3.14 1,234 007 x=1 -> != #### </s> _a __init__ é\u0338 >\u0338 "
        "\x04 !\x13! \U00045678a"
    )
    words = text.split(" ")

    def any_char():
        return chr(
            r.choice(
                (
                    r.randrange(0x80),
                    r.randrange(0xA0, 0x3000),
                    r.randrange(0x3000, 0xD800),
                    r.randrange(0xE000, 0x110000),
                )
            )
        )

    draw = [
        lambda: (lambda a: code[a : a + r.randrange(1, 150)])(r.randrange(len(code))),
        lambda: "".join(any_char() for _ in range(r.randrange(1, 30))),
        lambda: "".join(
            r.choice(words) + "".join(r.choices(spaces, k=r.choice((0, 1, 1, 1, 2, 5))))
            for _ in range(r.randrange(1, 15))
        ),
        lambda: "".join(
            r.choices([*SPECIAL, *words, " ", "  ", "\n", "1", "<|", "|>"], k=r.randrange(1, 15))
        ),
        lambda: "".join(r.choices(spaces + "a1!'", k=r.randrange(20))),
        lambda: "".join(
            r.choices("0123456789 .,+-=$%()[]{}'\"sStTlLdDmMrReEvV\n", k=r.randrange(1, 40))
        ),
    ]
    return [draw[i % len(draw)]() for i in range(n)]


def test_ids_are_those_of_a_tokenizer_json_taken_step_by_step(tokenizer_json, tmp_path):
    tokenizer = load_tokenizer(save_json(tmp_path, tokenizer_json))
    for s in strings(600):
        assert tokenizer.encode(s, allowed_special="all") == reference_ids(tokenizer_json, s), repr(
            s
        )


def test_ids_and_texts_are_those_of_the_tokenizers_library(tokenizer_json, tmp_path):
    library = pytest.importorskip("tokenizers").Tokenizer.from_file(
        str(save_json(tmp_path, tokenizer_json) / "tokenizer.json")
    )
    tokenizer = load_tokenizer(tmp_path)
    for s in strings(2000, seed=1):
        ids = tokenizer.encode(s, allowed_special="all")
        assert ids == library.encode(s, add_special_tokens=False).ids, repr(s)
        assert tokenizer.decode(ids) == library.decode(ids, skip_special_tokens=False)


def test_any_text_comes_back_but_for_its_normal_form_and_bytes_without_a_token(
    tokenizer_json, tmp_path
):
    tokenizer = load_tokenizer(save_json(tmp_path, tokenizer_json))
    for s in strings(300, seed=2):
        if tokenizer.missing.isdisjoint(s.encode()):
            normal = unicodedata.normalize("NFC", s) if tokenizer_json["normalizer"] else s
            assert tokenizer.decode(tokenizer.encode_ordinary(s)) == normal
            assert tokenizer.encode_ordinary_batch([s]) == [tokenizer.encode_ordinary(s)]


def test_special_tokens_are_an_error_unless_they_are_allowed_and_the_longest_wins(merges, tmp_path):
    tokenizer = load_tokenizer(save_json(tmp_path, make_json(merges)))
    with pytest.raises(ValueError, match="im_end"):
        tokenizer.encode("a<|im_end|>")
    special = {t["content"]: t["id"] for t in make_json(merges)["added_tokens"]}
    assert tokenizer.encode("<think>!<think><|im_end|>", allowed_special="all") == [
        special[s] for s in ("<think>!", "<think>", "<|im_end|>")
    ]
    plain = tokenizer.encode("<|im_end|>", disallowed_special=())
    assert plain == tokenizer.encode_ordinary("<|im_end|>") and special["<|im_end|>"] not in plain
    assert tokenizer.decode(plain) == tokenizer.decode([special["<|im_end|>"]]) == "<|im_end|>"


def test_of_two_special_tokens_at_one_place_the_one_that_the_library_looks_for_first_wins(
    merges, tmp_path
):
    content = edited(make_json(merges), ("added_tokens", 4, "normalized"), True)
    tokenizer = load_tokenizer(save_json(tmp_path, content))
    special = {t["content"]: t["id"] for t in content["added_tokens"]}
    ids = tokenizer.encode("<think>!", allowed_special="all")
    assert ids == [special["<think>"], *tokenizer.encode("!")]
    library = pytest.importorskip("tokenizers").Tokenizer.from_file(
        str(tmp_path / "tokenizer.json")
    )
    assert ids == library.encode("<think>!", add_special_tokens=False).ids


def test_an_id_without_a_token_decodes_to_nothing(merges, tmp_path):
    tokenizer = load_tokenizer(save_json(tmp_path, make_json(merges)))
    a, b = tokenizer.encode("a"), tokenizer.encode("b")
    assert tokenizer.decode(a + [tokenizer.n_vocab, 10**6] + b) == "ab"


@pytest.mark.parametrize(
    "generation, config, stop",
    [
        (dict(eos_token_id=[2, 0]), dict(eos_token_id=1), [2, 0]),
        (dict(eos_token_id=[0, 1]), {}, [2, 0, 1]),
        (dict(eos_token_id=0), {}, [2, 0]),
        (dict(eos_token_id=2), dict(eos_token_id=0), [2]),
        (None, dict(eos_token_id=[0, 2, 0]), [2, 0]),
        (dict(temperature=0.6), dict(eos_token_id=0), [2, 0]),
        ({}, {}, [2]),
    ],
)
def test_a_text_ends_at_each_id_that_transformers_ends_it_at_and_at_the_tokenizers_own(
    generation, config, stop, merges, tmp_path
):
    save_json(tmp_path, make_json(merges))
    (tmp_path / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.stop == stop and tokenizer.eos == stop[0]


def test_saved_again_a_list_of_ends_is_the_same_list(merges, tmp_path):
    like = save_json(tmp_path / "like", make_json(merges))
    (like / "generation_config.json").write_text(json.dumps(dict(eos_token_id=[2, 0])))
    model = GPT(GPTConfig(600, 16, 1, 2, 16))
    for folder, stop, more in (("b", [2, 0], {}), ("c", [2, 1], dict(stop=[1]))):
        model.save_pretrained(tmp_path / folder, like=like, **more)
        assert load_tokenizer(tmp_path / folder).stop == stop
        transformers = pytest.importorskip("transformers")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / folder
        ).generation_config.eos_token_id
        assert theirs == (more.get("stop") or stop)


@pytest.mark.parametrize(
    "file, content, words",
    [
        ("generation_config.json", dict(eos_token_id="2"), ["eos_token_id"]),
        ("generation_config.json", dict(eos_token_id=[2, None]), ["eos_token_id"]),
        ("generation_config.json", [], ["no JSON object"]),
        ("config.json", dict(eos_token_id=-1), ["eos_token_id", "-1"]),
        ("tokenizer_config.json", dict(eos_token=7), ["eos_token is 7"]),
        ("tokenizer_config.json", dict(eos_token=dict(id=2)), ["eos_token is {'id': 2}"]),
    ],
)
def test_an_end_that_is_no_token_is_one_line_that_names_it(file, content, words, merges, tmp_path):
    save_json(tmp_path, make_json(merges))
    (tmp_path / file).write_text(json.dumps(content))
    with refused(file, *words):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "settings, config, eos",
    [
        (dict(eos_token="<|im_end|>"), dict(eos_token_id=0), 2),
        (dict(eos_token=dict(content="<|endoftext|>", lstrip=False)), {}, 0),
        (dict(eos_token=None), dict(eos_token_id=1), 1),
        (dict(other=1), dict(eos_token_id=[2, 0]), 2),
        (dict(eos_token=None), dict(eos_token_id=0), 0),
    ],
)
def test_eos_is_the_tokenizers_or_the_models(settings, config, eos, merges, tmp_path):
    save_json(tmp_path, make_json(merges), **settings)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_tokenizer(tmp_path).eos == eos


def test_a_folder_without_an_end_of_text_is_refused(merges, tmp_path):
    with refused("end-of-text"):
        load_tokenizer(save_json(tmp_path, make_json(merges), eos_token="<unknown>"))


def edited(content, path, value):
    content = json.loads(json.dumps(content))
    *keys, last = path
    part = content
    for k in keys:
        part = part[k]
    part[last] = value
    return content


@pytest.mark.parametrize(
    "path, value, words",
    [
        (("model", "type"), "Unigram", ["Unigram"]),
        (("model", "byte_fallback"), True, ["byte_fallback"]),
        (("model", "dropout"), 0.1, ["dropout"]),
        (("model", "end_of_word_suffix"), "</w>", ["end_of_word_suffix"]),
        (("normalizer",), dict(type="Lowercase"), ["Lowercase"]),
        (
            ("normalizer",),
            dict(type="Sequence", normalizers=[dict(type="Prepend", prepend="_")]),
            ["Sequence"],
        ),
        (("pre_tokenizer",), None, ["pre-tokenizer"]),
        (("pre_tokenizer",), dict(type="Metaspace"), ["Metaspace"]),
        (("pre_tokenizer", "add_prefix_space"), True, ["pre-tokenizer"]),
        (("pre_tokenizer",), sequence(dict(type="Punctuation"), True), ["Punctuation"]),
        (("pre_tokenizer",), sequence(split(QWEN), True), ["pre-tokenizer"]),
        (
            ("pre_tokenizer",),
            sequence({**split(QWEN), "behavior": "MergedWithNext"}, False),
            ["MergedWithNext"],
        ),
        (("pre_tokenizer",), sequence(split("("), False), ["parenthesis"]),
        (("added_tokens", 1, "lstrip"), True, ["added token", "lstrip"]),
        (("added_tokens", 2, "single_word"), True, ["added token", "single_word"]),
        (("decoder",), None, ["decoder"]),
        (("decoder", "type"), "Metaspace", ["decoder", "Metaspace"]),
        (("added_tokens", 4, "id"), 9999, ["numbered"]),
        (("added_tokens", 4, "id"), 0, ["numbered"]),
        (("added_tokens", 0, "id"), 1, ["numbered"]),
        (("added_tokens", 4, "content"), "", ["empty"]),
        (("added_tokens", 4, "content"), "<think>", ["twice"]),
        # shapes and types
        (("model",), ["a"], ["model", "object"]),
        (("model", "vocab"), [["a", -1.5]], ["vocab", "object"]),
        (("model", "vocab", "a"), "7", ["vocab", "a is '7'"]),
        (("model", "vocab", "a"), -7, ["a is -7"]),
        (("model", "vocab", "a"), 5, ["an id that is there twice"]),
        (("model", "vocab", ""), 9999, ["empty"]),
        (("model", "merges"), dict(a=1), ["merges"]),
        (("model", "merges", 0), ["a"], ["merge"]),
        (("model", "merges", 0), 7, ["merge"]),
        (("model", "merges", 0), [1, 2], ["merge"]),
        (("pre_tokenizer",), ["a"], ["pre_tokenizer", "object"]),
        (("pre_tokenizer",), dict(type="Sequence", pretokenizers=["a"]), ["pretokenizers 0"]),
        (("pre_tokenizer",), sequence(dict(split(""), pattern="a"), False), ["pattern", "object"]),
        (("pre_tokenizer", "type"), ["ByteLevel"], ["type"]),
        (("normalizer",), "NFC", ["normalizer", "object"]),
        (("added_tokens",), dict(a=1), ["added_tokens", "list"]),
        (("added_tokens", 3), "<think>", ["added_tokens 3"]),
        (("added_tokens", 3), dict(id=9), ["added_tokens 3", "content is missing"]),
        (("added_tokens", 3, "id"), "9", ["id is '9'"]),
        (("added_tokens", 3, "content"), ["<think>"], ["content"]),
        (("post_processor",), ["a"], ["post_processor", "object"]),
    ],
)
def test_a_tokenizer_that_is_not_supported_is_one_line_that_names_why(
    path, value, words, merges, tmp_path
):
    with refused("tokenizer.json", *words):
        load_tokenizer(save_json(tmp_path, edited(make_json(merges), path, value)))


def test_a_real_unigram_tokenizer_is_one_line_that_says_so(tmp_path):
    content = dict(
        added_tokens=[],
        normalizer=None,
        pre_tokenizer=dict(type="Metaspace"),
        model=dict(type="Unigram", unk_id=0, vocab=[["<unk>", 0.0], ["▁the", -3.2]]),
    )
    with refused("tokenizer.json", "Unigram"):
        load_tokenizer(save_json(tmp_path, content))


def before(*names, after=()):
    """A post-processor as Llama 3's: these tokens before a text."""

    def piece(name):
        return dict(SpecialToken=dict(id=name, type_id=0))

    def text(letter):
        return [*map(piece, names), dict(Sequence=dict(id=letter, type_id=0)), *map(piece, after)]

    tokens = {
        name: dict(id=name, ids=[SPECIAL.index(name)], tokens=[name]) for name in {*names, *after}
    }
    return dict(
        type="Sequence",
        processors=[
            level(True),
            dict(
                type="TemplateProcessing",
                single=text("A"),
                pair=text("A") + text("B"),
                special_tokens=tokens,
            ),
        ],
    )


@pytest.mark.parametrize(
    "post, prefix",
    [
        (before("<|endoftext|>"), [0]),
        (before("<|im_start|>", "<|endoftext|>"), [1, 0]),
        (before(), []),
        (level(True), []),
        (before("<|im_end|>")["processors"][1], [2]),
        (None, []),
    ],
)
def test_a_prompt_begins_with_what_the_post_processor_puts_before_it_and_a_chat_with_its_template(
    post, prefix, merges, tmp_path
):
    save_json(
        tmp_path,
        {**make_json(merges), "post_processor": post},
        eos_token="<|im_end|>",
        chat_template="<|im_start|>{{ messages[0]['content'] }}\n",
    )
    (tmp_path / "data.jsonl").write_text(
        "".join(
            json.dumps(dict(question=f"What is {i}?", answer=f"#### {i}")) + "\n" for i in range(99)
        )
    )
    assert load_tokenizer(tmp_path).prefix == prefix

    def ask(chat):
        return word_problems(tmp_path, str(tmp_path / "data.jsonl"), "Q: {question}", chat).prompt(
            ("the <|im_end|>?", "1")
        )

    plain, chat = ask(False), ask(True)
    assert plain[: len(prefix)] == prefix and 2 in plain[len(prefix) :] and chat[0] == 1
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert plain == theirs("Q: the <|im_end|>?").input_ids
    assert chat == theirs.apply_chat_template(
        [dict(role="user", content="Q: the <|im_end|>?")],
        add_generation_prompt=True,
        return_dict=False,
    )


@pytest.mark.parametrize(
    "post, words",
    [
        (before("<|im_start|>", after=["<|im_end|>"]), ["after the text"]),
        (dict(type="RobertaProcessing", sep=["</s>", 2], cls=["<s>", 0]), ["RobertaProcessing"]),
        (
            dict(
                type="TemplateProcessing",
                single=[dict(SpecialToken=dict(id="<s>")), dict(Sequence=dict(id="A"))],
                special_tokens={},
            ),
            ["<s> is missing"],
        ),
        (
            dict(
                type="TemplateProcessing",
                single=[dict(SpecialToken=dict(id="<s>")), dict(Sequence=dict(id="A"))],
                special_tokens={"<s>": dict(ids=[9999])},
            ),
            ["without a token"],
        ),
        (dict(type="TemplateProcessing"), ["after the text"]),
        (dict(type="Sequence", processors="a"), ["processors"]),
    ],
)
def test_what_a_post_processor_does_beside_is_one_line_that_names_it(post, words, merges, tmp_path):
    with refused("tokenizer.json", *words):
        load_tokenizer(save_json(tmp_path, {**make_json(merges), "post_processor": post}))


MESSAGES = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


@pytest.mark.parametrize(
    "template, expected",
    [
        (
            "{% for m in messages %}{{ m | tojson }}{% endfor %}",
            '{"role": "user", "content": "1 < 2 & \'é\'?"}',
        ),
        ("{{ messages | tojson(indent=1) }}", None),
        (
            "{% if tools is not none %}TOOLS{% endif %}"
            "{% if documents is not none %}DOCUMENTS{% endif %}" + MESSAGES,
            "<user>1 < 2 & 'é'?",
        ),
        (
            "{% for m in messages %}{% generation %}{% set x = 1 %}{{ m.content }}"
            "{% endgeneration %}{{ x }}{% endfor %}!",
            "1 < 2 & 'é'?!",
        ),
        (
            "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ unk_token }}|{{ sep_token }}",
            "<think>|<|im_end|>|<|endoftext|>||",
        ),
        ("{{ strftime_now('%Y') }}", None),
        (
            "{% for m in messages %}\n {% if 1 %}\n{{ m.content }}\n {% endif %}\n{% endfor %}\n",
            "1 < 2 & 'é'?\n",
        ),
        (
            [dict(name="tool_use", template="T"), dict(name="default", template=MESSAGES)],
            "<user>1 < 2 & 'é'?",
        ),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        (
            "{% set n = namespace(x=0) %}{% for m in messages %}{% set n.x = n.x + 1 %}{% endfor %}"
            "{{ n.x }}{% if add_generation_prompt %}!{% endif %}",
            "1!",
        ),
    ],
)
def test_a_chat_template_renders_what_transformers_renders(template, expected, merges, tmp_path):
    tokens = dict(
        eos_token="<|im_end|>",
        bos_token=dict(content="<think>", special=True),
        pad_token="<|endoftext|>",
    )
    save_json(
        tmp_path, make_json(merges), **tokens, chat_template=template, added_tokens_decoder={}
    )
    mine = load_chat_template(tmp_path)("1 < 2 & 'é'?")
    assert expected is None or mine == expected
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(
        save_json(
            tmp_path / "b",
            make_json(merges),
            **{**tokens, "bos_token": "<think>"},
            chat_template=template,
        )
    )
    assert mine == theirs.apply_chat_template(
        [dict(role="user", content="1 < 2 & 'é'?")], add_generation_prompt=True, tokenize=False
    )


def test_special_tokens_of_older_folders_are_in_a_file_of_their_own(merges, tmp_path):
    save_json(tmp_path, make_json(merges), chat_template="{{ bos_token }}{{ eos_token }}")
    (tmp_path / "special_tokens_map.json").write_text(
        json.dumps(dict(bos_token=dict(content="<think>"), eos_token="<|im_end|>"))
    )
    assert load_tokenizer(tmp_path).stop == [2]
    assert load_chat_template(tmp_path)("") == "<think><|im_end|>"


@pytest.mark.parametrize(
    "template, words",
    [
        ("{{ raise_exception('only to me') }}", ["fails", "only to me"]),
        ([dict(name="tool_use", template="T")], ["has a chat template"]),
        (None, ["has a chat template"]),
        ([dict(name="default")], ["template is missing"]),
        ("{% generation %}", ["fails"]),
        (7, ["has a chat template"]),
    ],
)
def test_a_chat_template_that_is_none_is_one_line_that_says_why(template, words, merges, tmp_path):
    with refused(str(tmp_path), *words):
        load_chat_template(
            save_json(tmp_path, make_json(merges), eos_token="<|im_end|>", chat_template=template)
        )
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfea")
    with refused("chat_template.jinja", "UTF-8"):
        load_chat_template(tmp_path)


TURNS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize(
    "template, chat, stop",
    [
        (TURNS, True, [2, 0]),
        (TURNS, False, [0]),
        ("{{ messages[0].content }}", True, [0]),
        (MESSAGES + "{{ eos_token }}", True, [0]),
        (MESSAGES + "</s>", True, [0]),
    ],
)
def test_a_chat_ends_with_what_its_template_puts_after_an_answer(
    template, chat, stop, merges, tmp_path
):
    # like a base Qwen2.5
    save_json(tmp_path, make_json(merges), eos_token="<|endoftext|>", chat_template=template)
    (tmp_path / "data.jsonl").write_text(
        "".join(
            json.dumps(dict(question=f"What is {i}?", answer=f"#### {i}")) + "\n" for i in range(99)
        )
    )
    tokenizer = word_problems(tmp_path, str(tmp_path / "data.jsonl"), "{question}", chat).tokenizer
    assert tokenizer.stop == stop and tokenizer.eos == stop[0]


@pytest.mark.parametrize("char", [" ", "\n", " \n", "\u3000"])
def test_a_million_spaces_are_tokens_too(char, tokenizer_json, tmp_path):
    tokenizer = load_tokenizer(save_json(tmp_path, tokenizer_json))
    text = "x" + char * (10**6 // len(char)) + "y x"
    ids = tokenizer.encode(text, allowed_special="all")
    assert tokenizer.decode(ids) == text
    # the last space still belongs to the word
    assert ids[-3:] == tokenizer.encode(char * 3 + "y x")[-3:]


def test_half_a_surrogate_pair_is_replaced_in_every_tokenizer(tokenizer_json, tmp_path):
    tokenizer = load_tokenizer(save_json(tmp_path, tokenizer_json))
    assert tokenizer.encode("a\ud83d 1<think>", allowed_special="all") == tokenizer.encode(
        "a\ufffd 1<think>", allowed_special="all"
    )


def test_merges_that_tiktoken_would_take_in_another_order_are_refused(merges, tmp_path):
    content = make_json(merges)
    vocab, pairs = content["model"]["vocab"], content["model"]["merges"]
    first, last = "".join(pairs[0]), "".join(pairs[-1])
    for wrong in (
        edited(content, ("model", "merges"), pairs[1:] + pairs[:1]),
        edited(content, ("model", "vocab"), {**vocab, first: vocab[last], last: vocab[first]}),
    ):
        with refused("merge order"):
            load_tokenizer(save_json(tmp_path, wrong))
    with refused("no merge makes"):
        load_tokenizer(save_json(tmp_path, edited(content, ("model", "merges"), pairs[:-1])))
    with refused("▁the"):
        load_tokenizer(
            save_json(
                tmp_path,
                edited(
                    content,
                    ("model", "vocab"),
                    {"▁the" if t == last else t: i for t, i in vocab.items()},
                ),
            )
        )
    text = [" ".join(p) for p in pairs]  # the older way to write a merge
    assert load_tokenizer(save_json(tmp_path, edited(content, ("model", "merges"), text))).encode(
        "the"
    ) == load_tokenizer(save_json(tmp_path, content)).encode("the")


def test_a_missing_or_damaged_tokenizer_is_one_line_that_names_it(tmp_path):
    with refused("tokenizer.json", "no such file"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with refused("tokenizer.json", "JSON"):
        load_tokenizer(tmp_path)


def test_a_saved_model_takes_a_tokenizer_along(merges, tmp_path):
    like = save_json(tmp_path / "like", make_json(merges))
    GPT(GPTConfig(600, 16, 1, 2, 16)).save_pretrained(tmp_path / "b", like=like)
    assert load_tokenizer(tmp_path / "b").encode("the cat") == load_tokenizer(like).encode(
        "the cat"
    )
    assert json.loads((tmp_path / "b/config.json").read_text())["eos_token_id"] == [2]


# --------------------------------------------------------------------------------------------------
# transformers, where it is installed; a real checkpoint, where ROLLOUT_CHECKPOINT names its folder


def agree(folder, vocab, tmp_path, tolerance=1e-4):
    """Logits of ragged prompts, 64 greedy tokens, and the way back."""
    transformers = pytest.importorskip("transformers")

    def load(path):
        return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

    theirs, ours, g = (
        load(folder),
        GPT.from_pretrained(folder, dtype=torch.float32),
        torch.Generator().manual_seed(0),
    )
    prompts = [torch.randint(3, vocab, (n,), generator=g).tolist() for n in (3, 17, 9)]
    ours.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    rollout = generate(ours, prompts, 1, 64, temperature=0).tokens()
    for prompt, tokens in zip(prompts, rollout, strict=True):
        ids = torch.tensor([prompt])
        with torch.no_grad():
            logits = theirs(ids).logits
            assert (ours(ids) - logits).abs().max() < tolerance
            assert torch.equal(again(ids).logits, logits)
            greedy = theirs.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=64,
                min_new_tokens=64,
                eos_token_id=None,
                pad_token_id=0,
            )
        assert tokens == greedy[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    "name, tie, more",
    [
        ("Llama", False, {}),
        ("Llama", True, dict(num_attention_heads=6, num_key_value_heads=2, hidden_size=96)),
        ("Qwen2", True, {}),
        ("Qwen2", False, {}),
        ("Qwen3", True, dict(head_dim=32)),
        ("Qwen3", False, {}),
    ],
)
def test_a_model_of_transformers_has_the_same_logits_and_greedy_tokens_and_comes_back(
    name, tie, more, tmp_path
):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, name + "Config")(
        **{
            **dict(
                vocab_size=200,
                hidden_size=64,
                intermediate_size=96,
                num_hidden_layers=3,
                num_attention_heads=4,
                num_key_value_heads=2,
                rope_theta=50000.0,
                initializer_range=0.2,
                tie_word_embeddings=tie,
            ),
            **more,
        }
    )
    theirs = getattr(transformers, name + "ForCausalLM")(config)
    with torch.no_grad():
        for key, p in theirs.named_parameters():
            if p.dim() == 1:
                p.copy_(torch.randn(p.shape) * 0.3 + ("norm" in key))
    theirs.save_pretrained(tmp_path / "a", **(dict(max_shard_size="40KB") if tie else {}))
    agree(tmp_path / "a", 200, tmp_path)


@pytest.mark.skipif(
    "ROLLOUT_CHECKPOINT" not in os.environ,
    reason="ROLLOUT_CHECKPOINT names no folder of a real checkpoint",
)
def test_a_real_checkpoint_agrees_with_transformers_and_its_tokenizer_with_the_library(tmp_path):
    folder = Path(os.environ["ROLLOUT_CHECKPOINT"])
    tokenizer, library = (
        load_tokenizer(folder),
        pytest.importorskip("tokenizers").Tokenizer.from_file(str(folder / "tokenizer.json")),
    )
    for s in strings(2000, seed=3):
        s = s.replace("<think>", tokenizer.decode([tokenizer.eos]))
        ids = tokenizer.encode(s, allowed_special="all")
        assert ids == library.encode(s, add_special_tokens=False).ids, repr(s)
        assert not tokenizer.missing.isdisjoint(
            unicodedata.normalize("NFC", s).encode()
        ) or tokenizer.decode(ids) == (unicodedata.normalize("NFC", s) if tokenizer.nfc else s)
    # fp32 rounding of both, at logits of 30
    agree(folder, min(tokenizer.n_vocab, 40000), tmp_path, tolerance=2e-3)
