"""engine.py: sampling from a GPT: the KV cache and `generate`.

What to know before changing `generate`:
1. A cache slot is a position. Prompts of different lengths are padded on the right, every row then
   appends at its own length, and a mask hides what lies beyond. Row i of a batch is therefore the
   row alone, up to float rounding.
2. A prompt is read once, then its cache is cloned to its n samples. A row that has met the stop
   token leaves the batch: the last live row moves into its place, so that a step costs only what is
   still alive.
3. Every token is drawn by inverting the CDF at a uniform number. Independent samples use a new
   number per token; `uniforms` gives each row ONE number for its whole sequence (arithmetic
   decoding, Vilnis et al., arXiv 2210.15458): after each token the number is rescaled to its place
   inside the bin it fell in, and is uniform again.
4. On a GPU a step of a small model is a few hundred launches that each take longer to ask for than
   to run. There the same step has fewer kernels and is replayed as a CUDA graph: decoding.py. On a
   CPU its attention is C++, where that can be compiled: decoding.cpp.

Shapes: R = prompts * n rows, of which `live` are still being written; T time, S slots of the cache,
K key heads, D channels of a head, V vocabulary.
"""

import contextlib
import copy
import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from decoding import decode_static, native
from experiment import NotFinite
from kernels import gemm_dtype
from meter import spend

# cuDNN's attention plans anew for each length, and decoding meets a new one at every step
torch.backends.cuda.enable_cudnn_sdp(False)

# --------------------------------------------------------------------------------------------------
# The cache


class KVCache:
    """Keys and values of every layer, (rows, capacity, K, D), allocated once. In memory a head's
    slots are side by side: that is how attention reads them. The token at position p of a row sits
    in slot p - base.

    A step writes its tokens at each row's own length (`lens`) and reads the slots up to the longest
    row's (`length`), exactly: a mask is needed only while the rows' lengths differ. `base` is 0 but
    with a sliding window: there, slots that nobody can see any more are given up when the capacity
    is reached, so that memory is constant at any length. Slots start as zeros, not as whatever
    memory held: a masked slot counts 0 times, and 0 * nan is nan.
    """

    def __init__(self, config, rows, capacity, device="cpu", dtype=torch.float32):
        self.config = config
        self.rows = rows
        self.capacity = capacity
        self.base = 0
        shape = (rows, config.n_kv_head, capacity, config.head_dim)
        blank = partial(torch.zeros, shape, device=device, dtype=dtype)
        self.k = [blank().transpose(1, 2) for _ in range(config.n_layer)]
        self.v = [blank().transpose(1, 2) for _ in range(config.n_layer)]
        self.set_lens([0] * rows)

    def set_lens(self, lens):
        """The tokens that each row truly holds: forgets the padding of a prefill, or rejected draft
        tokens.
        """
        oldest = max(0, min(lens) - (self.config.window or 0) + 1)  # position still to be seen
        assert self.base <= oldest, "a sliding cache has given up what these rows would see"
        self.lens = torch.as_tensor(lens, device=self.k[0].device)
        self.length = max(lens)
        self.ragged = len(set(lens)) > 1

    def extend(self, T):
        """Room for T more tokens in each row -> their positions, a slice or (rows, T), and the mask
        if causality is not enough: (rows, 1, T, S) bool, True = sees.
        """
        if self.length - self.base + T > self.capacity:
            self.slide(T)
        window, device = self.config.window, self.lens.device
        self.length += T
        first, end = 0, self.length - self.base  # the slots that append returns
        if self.ragged:  # each row writes at its own length, and must not see what it has not
            positions = self.lens[:, None] + torch.arange(T, device=device)  # (rows, T)
            seen = torch.arange(self.base, self.length, device=device)  # (S,)
            distance = positions[:, None, :, None] - seen  # (rows, 1, T, S), >= 0 for the past
            mask = distance >= 0
            if window is not None:
                mask &= distance < window
            self.written = torch.arange(self.rows, device=device)[:, None], positions - self.base
        else:
            positions, mask = slice(self.length - T, self.length), None
            self.written = slice(self.rows), slice(end - T, end)
            if window is not None:
                first = max(0, end - T - window + 1)  # older ones are out of sight
        self.seen = slice(self.rows), slice(first, end)
        self.lens = self.lens + T
        return positions, mask

    def append(self, layer, k, v):
        """Write the (rows, T, K, D) that extend made room for -> this layer's keys and values so
        far, (rows, S, K, D).
        """
        keys, values = self.k[layer], self.v[layer]
        keys[self.written] = k.to(keys.dtype)
        values[self.written] = v.to(values.dtype)
        return keys[self.seen], values[self.seen]

    def slide(self, T):
        """Make room for T more tokens: give up the slots that no row will see again."""
        oldest = int(self.lens.min()) - (self.config.window or math.inf) + 1
        drop = max(oldest, 0) - self.base
        kept = self.length - self.base - drop
        assert kept + T <= self.capacity, f"cache of {self.capacity} tokens is full"
        for t in self.k + self.v:
            t[: self.rows, :kept] = t[: self.rows, drop : drop + kept].clone()
        self.base += drop

    def expand(self, n, capacity):
        """Each row of a fresh prefill n times, into a new cache: one prefill serves the n samples
        of a prompt.
        """
        k = self.k[0]
        untouched = self.rows == len(k) and self.base == 0
        assert untouched, "expand before rows are dropped or the window slides"
        new = KVCache(self.config, self.rows * n, capacity, device=k.device, dtype=k.dtype)
        for old, t in zip(self.k + self.v, new.k + new.v, strict=True):
            t[:, : self.length] = old[:, : self.length].repeat_interleave(n, dim=0)
        new.set_lens(self.lens.repeat_interleave(n).tolist())
        return new

    def keep(self, alive):
        """Drop the rows that are not alive (rows,) bool: live rows from the end move into the holes
        -> their order (live,).
        """
        n = int(alive.sum())
        order = torch.arange(n, device=alive.device)
        holes = (~alive[:n]).nonzero().squeeze(1)
        movers = n + alive[n:].nonzero().squeeze(1)
        order[holes] = movers
        end = self.length - self.base
        for t in self.k + self.v:
            t[holes, :end] = t[movers, :end]
        self.rows = n
        if n:
            self.set_lens(self.lens[order].tolist())
        return order


@dataclass
class Rollout:
    """Sampled continuations, row order prompt-major. Prompt first, then the generated tokens, then
    padding (any id: trust `mask`).
    """

    ids: torch.Tensor  # (R, T) int64
    mask: torch.Tensor  # (R, T) fp32, 1 on generated tokens up to and with the stop token
    logp: torch.Tensor  # (R, T) fp32, of each generated token, in the law it was drawn from
    prompt_lens: torch.Tensor  # (R,) int64

    @property
    def lengths(self):
        """Generated tokens in each row, the stop token included (R,)."""
        return self.mask.sum(1).long()

    def ended(self, stop):
        """Whether each row's last token is one of the stop ids (R,) bool: else its budget was
        spent.
        """
        last = self.ids.gather(1, (self.prompt_lens + self.lengths - 1)[:, None]).squeeze(1)
        return among(last, torch.as_tensor(stop, device=last.device).flatten())

    def tokens(self):
        """The generated tokens of each row, a list of lists."""
        starts, lengths = self.prompt_lens.tolist(), self.lengths.tolist()
        rows = zip(self.ids.tolist(), starts, lengths, strict=True)
        return [row[start : start + n] for row, start, n in rows]

    def texts(self, tokenizer):
        """The generated text of each row, without the ids that end a text."""
        texts = ([t for t in row if t not in tokenizer.stop] for row in self.tokens())
        return [tokenizer.decode(text) for text in texts]

    def __getitem__(self, rows):
        """The rows of an index or mask, the columns cut to the longest of them."""
        T = max((self.prompt_lens + self.lengths)[rows].tolist(), default=1)
        parts = (x[rows, :T] for x in (self.ids, self.mask, self.logp))
        return Rollout(*parts, self.prompt_lens[rows])

    @staticmethod
    def cat(rollouts):
        """The rows of several rollouts, one after the other, padded to the longest."""
        T = max(r.ids.shape[1] for r in rollouts)

        def joined(name):
            parts = (getattr(r, name) for r in rollouts)
            return torch.cat([F.pad(x, (0, T - x.shape[1])) for x in parts])

        prompt_lens = torch.cat([r.prompt_lens for r in rollouts])
        return Rollout(*map(joined, ("ids", "mask", "logp")), prompt_lens)


# --------------------------------------------------------------------------------------------------
# Drawing a token


def truncate(logits, top_k=None, top_p=None):
    """(R, V) logits with -inf outside the top_k largest (and their ties), then outside the smallest
    set that holds top_p of what is left.
    """
    if top_k is not None:
        smallest = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]  # (R, 1)
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if top_p is not None and top_p < 1:
        probs, order = logits.softmax(-1).sort(-1, descending=True)
        above = probs.cumsum(-1) - probs  # the mass of what is likelier than each token
        above = torch.empty_like(above).scatter_(-1, order, above)  # back in the vocabulary's order
        logits = logits.masked_fill(above >= top_p, -torch.inf)
    return logits


def inverse_cdf(probs, u):
    """Draw by inversion: the token in whose bin of the CDF u falls. probs (R, V), u (R,) in [0, 1)
    -> token (R,), and the place of u inside that bin (R,), uniform again.
    """
    cdf = probs.cumsum(-1, dtype=u.dtype)  # (R, V)
    total = cdf[:, -1:]  # 1, up to rounding: u is scaled to it, and stays strictly below
    u = torch.minimum(u[:, None] * total, total.nextafter(torch.zeros_like(total)))  # (R, 1)
    token = torch.searchsorted(cdf, u, right=True)  # (R, 1), the first bin that ends above u
    token = token.clamp_max(probs.shape[-1] - 1)
    low = cdf.gather(1, (token - 1).clamp_min(0)).masked_fill(token == 0, 0)  # where it begins
    place = (u - low) / (cdf.gather(1, token) - low)
    return token.squeeze(1), place.squeeze(1).clamp(0, 1 - torch.finfo(u.dtype).eps)


def inverse_cdf_in_two(probs, u):
    """inverse_cdf of a large vocabulary: first the block of tokens, then the token in it, at the
    place of u inside the block's bin. The same law, and no sum in float64 runs over all of V.
    """
    blocks = F.pad(probs, (0, -probs.shape[1] % 256)).unflatten(1, (-1, 256))  # (R, V / 256, 256)
    block, place = inverse_cdf(blocks.sum(-1, dtype=u.dtype), u)
    token, place = inverse_cdf(blocks[torch.arange(len(u), device=u.device), block], place)
    return (256 * block + token).clamp_max(probs.shape[1] - 1), place  # past V only of nan


def among(token, stops):
    """Which of the tokens (R,) are one of the ids (n,), bool. torch.isin may sort, which a CUDA
    graph cannot hold.
    """
    return (token[:, None] == stops).any(1)


class Sampler:
    """Draws a token for each live row at a time, and writes it down. What it keeps from one token
    to the next is changed in place: a CUDA graph knows addresses only.

    fresh (R, max_new_tokens) in [0, 1): a number for each token. uniforms: in its place, or (R,):
    one number for a whole row, see `generate`. stops (n,) int64: the ids that end a row.
    """

    def __init__(self, fresh, uniforms, stops, temperature, top_k, top_p):
        R, device = len(fresh), fresh.device
        self.fresh = fresh
        self.stops = stops
        self.temperature = temperature
        self.top_k = top_k
        self.top_p = top_p
        # what comes out, (R, max_new_tokens); token -1: never drawn
        self.tokens = torch.full(fresh.shape, -1, device=device)
        self.logps = torch.zeros(fresh.shape, device=device)
        self.finite = torch.ones((), dtype=torch.bool, device=device)  # whether all logits were
        # of each live row: its row in what comes out, its last token, whether that ended it
        self.rows = torch.arange(R, device=device)
        self.token = torch.zeros(R, dtype=torch.long, device=device)
        self.done = torch.zeros(R, dtype=torch.bool, device=device)
        self.number = None  # the row's one number, and how many bits of it are spent
        if uniforms is not None:
            good = uniforms.shape in ((R,), fresh.shape) and uniforms.is_floating_point()
            if not (good and 0 <= uniforms.min() <= uniforms.max() < 1):
                raise ValueError(f"{R} rows need {R} uniforms in [0, 1)")
            if uniforms.dim() == 2:
                self.fresh = uniforms.to(fresh)
                return
            self.number = uniforms.to(fresh, copy=True)
            self.spent = torch.zeros(R, device=device)
            eps = max(torch.finfo(uniforms.dtype).eps, torch.finfo(fresh.dtype).eps)
            self.budget = -math.log2(eps) / 2  # half of the bits that such a number has

    def draw(self, logits, t):
        """The t-th token of each live row, from its logits (live, V). t: a number, or a tensor (1,)
        that holds it.
        """
        # all are, if their sum is: one pass (in fp64, where no sum of fp32 numbers overflows)
        self.finite.logical_and_(logits.sum(dtype=self.fresh.dtype).isfinite())
        if self.temperature == 0:
            token = logits.argmax(-1)
            logp = torch.zeros_like(token, dtype=torch.float)
        else:
            token, logp = self.choose(logits.float() / self.temperature, self.fresh[self.rows, t])
        # a row that is done may stay for a while (decode_static): it goes on, but unrecorded
        self.tokens[self.rows, t] = token.masked_fill(self.done, -1)
        self.logps[self.rows, t] = logp.masked_fill(self.done, 0)
        self.token.copy_(token)
        self.done.logical_or_(among(token, self.stops))

    def choose(self, logits, fresh):
        """logits (live, V), a fresh number for each row (live,) -> token, logp (live,)."""
        probs = truncate(logits, self.top_k, self.top_p).softmax(-1)  # (live, V)
        draw = inverse_cdf_in_two if probs.shape[1] > 16384 else inverse_cdf
        token, place = draw(probs, fresh if self.number is None else self.number)
        logp = probs.gather(1, token[:, None]).squeeze(1).log()
        if self.number is not None:
            spent = self.spent - logp / math.log(2)  # a token of probability p costs -log2 p bits
            used_up = spent > self.budget
            self.number.copy_(torch.where(used_up, fresh, place))
            self.spent.copy_(spent.masked_fill(used_up, 0))
        return token, logp

    def retire(self, cache, unit=1):
        """Drop rows that are done, here and from the cache, `unit` of them at a time -> whether any
        row still has to be written.
        """
        if len(self.stops) == 0:
            return True
        done, rows = int(self.done.sum()), len(self.done)
        leaving = done // unit * unit
        if leaving:
            gone = self.done & (self.done.cumsum(0) <= leaving)
            order = cache.keep(~gone)
            self.rows = self.rows[order]
            self.token = self.token[order]
            self.done = self.done[order]
            if self.number is not None:
                self.number = self.number[order]
                self.spent = self.spent[order]
        return done < rows


STATIC_ON = ("cuda",)  # where generate takes decoding.decode_static, the fast one, instead of:


# oneDNN compiles the bf16 products of a CPU anew for each number of rows, which takes longer than a
# step: there rows leave by sixteens, the height of a tile, or by eighths of a small batch. So few
# numbers of rows there are, the same in every call
def leave_by(rows, dtype):
    return min(16, -(-rows // 8)) if dtype == torch.bfloat16 else 1


def decode_eager(model, cache, logits, sampler):
    """Draw, retire the rows that stop, step the others: one token at a time."""
    new = sampler.fresh.shape[1]
    unit = leave_by(len(logits), logits.dtype)
    stand_in = native(cache)  # the cache itself, where decoding.cpp does not run
    for t in range(new):
        sampler.draw(logits, t)
        if t + 1 == new or not sampler.retire(cache, unit):
            break
        x = model.hidden(sampler.token[:, None], stand_in)  # (live, 1, C)
        logits = model.lm_head(x[:, -1])  # (live, V)


# --------------------------------------------------------------------------------------------------
# On a CPU: weights in the order in which they are read


@contextlib.contextmanager
def packed(model, steps):
    """For `steps` steps of a bf16 model on a CPU: its products read weights in the order that the
    matrix units want. Otherwise oneDNN puts them in order anew at each step, which takes half as
    long as the product of a few rows; once costs as much as a dozen steps save. The same numbers,
    to the bit.
    """
    head = model.lm_head
    order = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)
    bf16 = head.weight.device.type == "cpu" and head.weight.dtype == torch.bfloat16
    pays = bf16 and order and steps >= 24
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear)] if pays else []
    try:
        for layer in layers:
            weight = order(layer.weight.detach(), None)
            layer.forward = partial(product, weight, layer.bias, counts=layer is head)
        yield
    finally:
        for layer in layers:  # all, or those before one that memory did not suffice for
            vars(layer).pop("forward", None)  # the class's own again


def product(weight, bias, x, counts):
    """x (..., C) times an ordered weight (V, C), plus the bias -> (..., V)."""
    y = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    if counts:  # as model.Head
        spend(2 * x.numel() * y.shape[-1])
    return y


# --------------------------------------------------------------------------------------------------
# generate


@torch.no_grad()
def generate(
    model,
    prompts,
    n=1,
    max_new_tokens=128,
    temperature=1.0,
    top_k=None,
    top_p=None,
    stop=None,
    generator=None,
    uniforms=None,
):
    """n continuations of each prompt (a list of non-empty token lists of any lengths) -> Rollout
    with R = len(prompts) * n rows.

    stop: token id that ends a row, a list of them, or None. temperature 0 is greedy: then logp is
    0, the choice being certain. uniforms in [0, 1), (R, max_new_tokens): the number that draws each
    token, in the place of the generator's; (R,): one number drives its whole row. Such a number
    of b bits pays -log2 p for each token; once half of the b are spent, the row goes on with fresh
    bits from `generator`: the low half of a uniform is independent of its high half, so the law
    stays exact, up to the 2^(-b/2) that the last number drawn with is rounded to. Raises ValueError
    for an empty prompt, an argument out of its range, or more positions than the model's
    block_size; NotFinite for a model whose logits are not all finite.
    """
    lens = [len(p) for p in prompts]
    law = dict(temperature=temperature, top_k=top_k, top_p=top_p)
    check(model.config.block_size, lens, n=n, max_new_tokens=max_new_tokens, **law)
    device = model.lm_head.weight.device
    if gemm_dtype(model.lm_head.weight) != model.lm_head.weight.dtype:
        model = copy.deepcopy(model).float()  # emulated bf16: the same weights in fp32 are faster

    # 1. All random numbers, in one call: what a row draws does not depend on when others stop.
    fresh = torch.rand(
        (len(prompts) * n, max_new_tokens),
        generator=generator,
        dtype=torch.float32 if device.type == "mps" else torch.float64,
        device=generator.device if generator else None,
    ).to(device)
    stops = torch.as_tensor([] if stop is None else stop, dtype=torch.long, device=device).flatten()
    sampler = Sampler(fresh, uniforms, stops, **law)
    # 2. Read each prompt once.
    rows = [torch.as_tensor(p, dtype=torch.long) for p in prompts]
    ids = pad_sequence(rows, batch_first=True).to(device)  # (prompts, longest), zeros to the right
    static = device.type in STATIC_ON and not torch.is_autocast_enabled(device.type)
    decode = decode_static if static else decode_eager
    # (inference_mode asks for less at each step than no_grad; on other devices it would taint what
    # a model moves there at its first use)
    with torch.inference_mode(device.type == "cpu"), packed(model, max_new_tokens):
        cache, logits = read_prompts(model, ids, lens, n=n, capacity=max(lens) + max_new_tokens - 1)
        # 3. Draw, retire the rows that stop, step the others.
        decode(model, cache, logits, sampler)
    if not sampler.finite:
        raise NotFinite("generate: the model's logits are not all finite")
    # 4. Prompt and continuation of each row side by side.
    return side_by_side(ids, torch.as_tensor(lens, device=device), sampler.tokens, sampler.logps)


def check(block_size, lens, n, max_new_tokens, temperature, top_k, top_p):
    """ValueError for what cannot be sampled."""
    longest = max(lens, default=0)
    for good, why in (
        (lens and min(lens) > 0, "every prompt needs at least one token"),
        (n > 0, f"n is {n}: at least 1"),
        (max_new_tokens > 0, f"max_new_tokens is {max_new_tokens}: at least 1"),
        (
            longest + max_new_tokens - 1 <= block_size,  # the last token is drawn, but never read
            f"prompt of {longest} + {max_new_tokens} new tokens: past block_size {block_size}",
        ),
        (
            temperature == 0 or temperature >= 1e-30,
            f"temperature is {temperature}: 0, or 1e-30 at least",
        ),
        (top_k is None or top_k > 0, f"top_k is {top_k}: at least 1"),
        (top_p is None or 1e-30 <= top_p <= 1, f"top_p is {top_p}: in (0, 1]"),
    ):
        if not good:
            raise ValueError(why)


def read_prompts(model, ids, lens, n, capacity):
    """Read each row of padded prompts once, and clone its cache to its n samples -> a cache of R
    rows and that capacity, and the logits of each row's next token (R, V).
    """
    rows, longest = ids.shape
    weight = model.lm_head.weight
    cache = KVCache(model.config, rows, longest, device=weight.device, dtype=weight.dtype)
    # padding on the right is invisible to the prompt before it: attention is causal
    hidden = model.hidden(ids, cache)  # (prompts, longest, C)
    last = hidden[torch.arange(rows), torch.as_tensor(lens) - 1]  # (prompts, C)
    logits = model.lm_head(last).repeat_interleave(n, dim=0)  # (R, V)
    cache.set_lens(lens)
    return cache.expand(n, capacity), logits


def side_by_side(ids, lens, tokens, logps):
    """Padded prompts (prompts, longest), what each row drew and its logp (R, max_new_tokens), token
    -1 where it drew none -> Rollout.
    """
    n, new = len(tokens) // len(ids), tokens.shape[1]
    ids, lens = ids.repeat_interleave(n, dim=0), lens.repeat_interleave(n)  # one for each row
    columns = lens[:, None] + torch.arange(new, device=lens.device)  # (R, new)

    def placed(x):
        """Each row of x (R, new) behind its prompt, zeros elsewhere -> (R, longest + new)."""
        return x.new_zeros(len(x), ids.shape[1] + new).scatter_(1, columns, x)

    drawn = tokens >= 0
    out = placed(tokens.clamp_min(0))
    out[:, : ids.shape[1]] += ids  # where one of the two is not 0, the other is
    T = int((lens + drawn.sum(1)).max())
    parts = (x[:, :T] for x in (out, placed(drawn.float()), placed(logps)))
    return Rollout(*parts, lens)
