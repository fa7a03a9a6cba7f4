"""peers.py: other people's code, asked for the work that ours does: what bench.py races against.

Each is called as its own documentation calls it, and none is required.
"""

from contextlib import redirect_stdout
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch.nn.utils.rnn import pad_sequence

from experiment import UserError

# What each goes without. `reference` is attention and log-probabilities in plain torch, `sdpa` is
# torch's own attention
WITHOUT = {
    "reference": "",
    "sdpa": "",
    "liger": "without log-probabilities of single tokens and entropy",
    "cce": "without entropy",
    "flash": "",
    "transformers": "without log-probabilities",
    "nanoGPT": "without rotations, gates and entropy",
}

# --------------------------------------------------------------------------------------------------
# Kernels: the same arguments as token_logprobs or attention

MODULES = dict(liger="liger_kernel", cce="cut_cross_entropy", flash="flash_attn")


def liger(hidden, weight, targets):
    """The sum of all log-probabilities, negative. Its gradient is made here, not backward."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss(reduction="sum")(weight, hidden, targets)


def cce(hidden, weight, targets):
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(hidden, weight, targets, reduction="none")


def flash(q, k, v):
    from flash_attn import flash_attn_func

    return flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), causal=True).transpose(1, 2)


KERNELS = dict(liger=liger, cce=cce, flash=flash)

# --------------------------------------------------------------------------------------------------
# Whole models


def llama(ours):
    """Hugging Face's Llama with the weights of ours, by way of the files that both read."""
    from transformers import LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    weight = ours.lm_head.weight
    with TemporaryDirectory() as folder:
        ours.save_pretrained(folder)
        peer = LlamaForCausalLM.from_pretrained(folder, pad_token_id=0)
    return peer.to(weight.device, weight.dtype).eval()


def transformers(peer, prompts, n, new, stop):
    """Racers with each of its caches: n continuations of each prompt -> how many tokens each row
    has, up to the stop token.
    """
    # transformers wants its padding on the left; no prompt holds a 0
    ids = pad_sequence([torch.tensor(p) for p in prompts], True, 0, "left").to(peer.device)
    mask = (ids > 0).long()  # (prompts, width)

    def race(cache):
        out = peer.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=True,
            top_k=0,
            num_return_sequences=n,
            max_new_tokens=new,
            eos_token_id=stop,
            cache_implementation=cache,
        )[:, ids.shape[1] :]  # (prompts * n, new)
        stops = (out == (-1 if stop is None else stop)).long()
        earlier_stops = stops.cumsum(1) - stops
        return (earlier_stops == 0).sum(1).tolist()

    return {
        "transformers": partial(race, None),
        "transformers, static cache": partial(race, "static"),
    }


def load_nanogpt(folder):
    """GPT and GPTConfig of a checkout of karpathy/nanoGPT. UserError if they are not there."""
    path = Path(folder) / "model.py"
    spec = spec_from_file_location("nanogpt_model", path)
    module = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        return module.GPT, module.GPTConfig
    except Exception as e:
        raise UserError(f"--nanogpt {folder}: no checkout of nanoGPT: {e}") from None


def nanogpt(classes, config):
    """Its model of the same shape, which must be without grouped heads."""
    PeerGPT, PeerConfig = classes
    fields = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")
    shape = {name: getattr(config, name) for name in fields}
    with redirect_stdout(StringIO()):  # it tells its size
        return PeerGPT(PeerConfig(**shape, dropout=0.0, bias=False))
