"""engine.py: sampling from a GPT: the KV cache, `generate`, and CUDA graphs last.

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
   to run. There the same step runs on fixed shapes with all that changes in tensors, is captured
   once in a CUDA graph and replayed (`decode_static`).
"""

import copy
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from experiment import NotFinite
from kernels import gemm_dtype, say_once

# --------------------------------------------------------------------------------------------------
# The cache


class KVCache:
    """Keys and values of every layer, (rows, capacity, K, D), allocated once. The token at position
    p of a row sits in slot p.

    A step writes its tokens at each row's own length (`lens`) and reads the slots up to the longest
    row's (`length`), exactly: a mask is needed only while the rows' lengths differ. With a sliding
    window, slots that nobody can see any more are given up when the capacity is reached (`base` is
    the position of slot 0), so that memory is constant at any length. Slots start as zeros, not as
    whatever memory held: a masked slot counts 0 times, and 0 * nan is nan.
    """

    def __init__(self, config, rows, capacity, device="cpu", dtype=torch.float32):
        shape = (rows, capacity, config.n_kv_head, config.head_dim)
        self.config, self.capacity, self.rows, self.base = config, capacity, rows, 0
        self.k = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.v = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.set_lens([0] * rows)

    def set_lens(self, lens):
        """The tokens that each row truly holds: forgets the padding of a prefill, or rejected draft
        tokens.
        """
        assert self.base <= max(0, min(lens) - (self.config.window or 0) + 1), (
            "a sliding cache has given up what these rows would see"
        )
        self.lens = torch.as_tensor(lens, device=self.k[0].device)
        self.length, self.ragged = max(lens), len(set(lens)) > 1

    def extend(self, T):
        """Room for T more tokens in each row -> their positions, a slice or (rows, T), and the mask
        if causality is not enough.
        """
        if self.length - self.base + T > self.capacity:
            self.slide(T)
        self.start, self.length, mask = self.length, self.length + T, None
        positions = slice(self.start, self.length)
        if self.ragged:
            # (rows, T)
            positions = self.lens[:, None] + torch.arange(T, device=self.lens.device)
            distance = positions[:, None, :, None] - torch.arange(
                self.base, self.length, device=self.lens.device
            )
            # (rows, 1, T, S)
            mask = distance >= 0
            if self.config.window is not None:
                mask &= distance < self.config.window
            self.slots = (
                torch.arange(self.rows, device=self.lens.device)[:, None],
                positions - self.base,
            )
        self.lens = self.lens + T
        return positions, mask

    def slide(self, T):
        """Make room for T more tokens: give up the slots that no row will see again."""
        # the oldest position that can still be seen
        first = int(self.lens.min()) - (self.config.window or math.inf) + 1
        drop = max(first, 0) - self.base
        assert self.length - self.base - drop + T <= self.capacity, (
            f"cache of {self.capacity} tokens is full"
        )
        for t in self.k + self.v:
            t[: self.rows, : self.length - self.base - drop] = t[
                : self.rows, drop : self.length - self.base
            ].clone()
        self.base += drop

    def append(self, layer, k, v):
        """Write the (rows, T, K, D) that extend made room for -> this layer's keys and values so
        far, (rows, S, K, D).
        """
        window = self.config.window
        # older ones are out of sight
        a = self.base if self.ragged or window is None else max(self.base, self.start - window + 1)
        where = (
            self.slots
            if self.ragged
            else (slice(self.rows), slice(self.start - self.base, self.length - self.base))
        )
        self.k[layer][where], self.v[layer][where] = (
            k.to(self.k[layer].dtype),
            v.to(self.v[layer].dtype),
        )
        seen = slice(self.rows), slice(a - self.base, self.length - self.base)
        return self.k[layer][seen], self.v[layer][seen]

    def expand(self, n, capacity):
        """Each row of a fresh prefill n times, into a new cache: one prefill serves the n samples
        of a prompt.
        """
        assert self.rows == len(self.k[0]) and self.base == 0, (
            "expand before rows are dropped or the window slides"
        )
        new = KVCache(self.config, self.rows * n, capacity, self.k[0].device, self.k[0].dtype)
        for old, t in zip(self.k + self.v, new.k + new.v):
            t[:, : self.length] = old[:, : self.length].repeat_interleave(n, dim=0)
        new.set_lens(self.lens.repeat_interleave(n).tolist())
        return new

    def keep(self, alive):
        """Drop the rows that are not alive (rows,) bool: live rows from the end move into the holes
        -> their order (live,).
        """
        n = int(alive.sum())
        order = torch.arange(n, device=alive.device)
        holes, movers = (~alive[:n]).nonzero().squeeze(1), n + alive[n:].nonzero().squeeze(1)
        order[holes] = movers
        for t in self.k + self.v:
            t[holes, : self.length - self.base] = t[movers, : self.length - self.base]
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
    # (R, T) fp32, log-probability of each generated token under the distribution it was drawn from
    logp: torch.Tensor
    prompt_lens: torch.Tensor  # (R,) int64
    # (R,) int64, set where several processes hold a batch together: the places of this one's rows
    # in it
    rows = None

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
        spans = zip(self.ids.tolist(), self.prompt_lens.tolist(), self.lengths.tolist())
        return [row[p : p + n] for row, p, n in spans]

    def texts(self, tokenizer):
        """The generated text of each row, without the ids that end a text."""
        return [
            tokenizer.decode([t for t in row if t not in tokenizer.stop]) for row in self.tokens()
        ]

    def __getitem__(self, rows):
        """The rows of an index or mask, the columns cut to the longest of them."""
        T = max((self.prompt_lens + self.lengths)[rows].tolist(), default=1)
        return Rollout(
            self.ids[rows, :T], self.mask[rows, :T], self.logp[rows, :T], self.prompt_lens[rows]
        )

    @staticmethod
    def cat(rollouts):
        """The rows of several rollouts, one after the other, padded to the longest."""
        T = max(r.ids.shape[1] for r in rollouts)
        pad = lambda name: torch.cat(
            [F.pad(getattr(r, name), (0, T - r.ids.shape[1])) for r in rollouts]
        )
        return Rollout(
            pad("ids"), pad("mask"), pad("logp"), torch.cat([r.prompt_lens for r in rollouts])
        )


# --------------------------------------------------------------------------------------------------
# Drawing a token


def truncate(logits, top_k=None, top_p=None):
    """(R, V) logits with -inf outside the top_k largest (and their ties), then outside the smallest
    set that holds top_p of what is left.
    """
    if top_k is not None:
        logits = logits.masked_fill(
            logits < logits.topk(min(top_k, logits.shape[-1])).values[:, -1:], -torch.inf
        )
    if top_p is not None and top_p < 1:
        probs, order = logits.softmax(-1).sort(-1, descending=True)
        # the mass above each token
        before = torch.empty_like(probs).scatter_(-1, order, probs.cumsum(-1) - probs)
        logits = logits.masked_fill(before >= top_p, -torch.inf)
    return logits


def inverse_cdf(probs, u):
    """Draw by inversion. probs (R, V), u (R,) in [0, 1) -> token (R,), and the place of u inside
    the token's bin (R,), uniform again.
    """
    cdf = probs.cumsum(-1, dtype=u.dtype)  # (R, V)
    total = cdf[:, -1:]
    # (R, 1), strictly below the total
    v = torch.minimum(u[:, None] * total, total.nextafter(torch.zeros_like(total)))
    # (R, 1): the first bin that ends above v
    token = torch.searchsorted(cdf, v, right=True).clamp_max(probs.shape[-1] - 1)
    low = cdf.gather(1, (token - 1).clamp_min(0)).masked_fill(token == 0, 0)
    place = (v - low) / (cdf.gather(1, token) - low)
    return token.squeeze(1), place.squeeze(1).clamp(0, 1 - torch.finfo(u.dtype).eps)


def among(token, stops):
    """Which of the tokens (R,) are one of the ids (n,), bool. torch.isin may sort, which a CUDA
    graph cannot hold.
    """
    return (token[:, None] == stops).any(1)


def decode_eager(model, cache, logits, draw, fresh, u, spent, stops):
    """The second part of generate, one step at a time. fresh (R, max_new_tokens) decides its
    length; stops (n,) int64: the ids that end a row.
    """
    R, new = fresh.shape
    tokens, logps = (
        torch.full((R, new), -1, device=fresh.device),
        torch.zeros(R, new, device=fresh.device),
    )
    # the output row of each live row
    rows = torch.arange(R, device=fresh.device)
    for t in range(new):
        token, logp, u, spent = draw(logits, fresh[rows, t], u, spent)
        tokens[rows, t], logps[rows, t] = token, logp
        if t + 1 == new:
            break
        if len(stops) and not (alive := ~among(token, stops)).all():
            order = cache.keep(alive)
            rows, token, u, spent = rows[order], token[order], u[order], spent[order]
            if len(rows) == 0:
                break
        # (live, V)
        logits = model.lm_head(model.hidden(token[:, None], cache)[:, -1])
    return tokens, logps


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
    0, the choice being certain. uniforms (R,) in [0, 1): one number drives its whole row. A number
    of b bits pays -log2 p for each token; once half of the b are spent, the row goes on with fresh
    bits from `generator`: the low half of a uniform is independent of its high half, so the law
    stays exact, up to the 2^(-b/2) that the last number drawn with is rounded to. Raises ValueError
    for an empty prompt, an argument out of its range, or more positions than the model's
    block_size; NotFinite for a model whose logits are not all finite.
    """
    lens, device = [len(p) for p in prompts], model.lm_head.weight.device
    if not lens or min(lens) < 1:
        raise ValueError("every prompt needs at least one token")
    if max(lens) + max_new_tokens - 1 > model.config.block_size:
        raise ValueError(
            f"prompt of {max(lens)} + {max_new_tokens} new tokens: past block_size {model.config.block_size}"
        )
    for name, value, good in (
        ("temperature", temperature, temperature == 0 or temperature >= 1e-30),
        ("n", n, n >= 1),
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1),
        ("top_k", top_k, top_k is None or top_k >= 1),
        ("top_p", top_p, top_p is None or 1e-30 <= top_p <= 1),
    ):
        if not good:
            raise ValueError(f"{name} is out of range: {value}")
    # emulated bf16: the same weights in fp32 are twice as fast
    if gemm_dtype(model.lm_head.weight) != model.lm_head.weight.dtype:
        model = copy.deepcopy(model).float()
    R, P = len(prompts) * n, max(lens)
    real = torch.float32 if device.type == "mps" else torch.float64
    fresh = torch.rand(
        R,
        max_new_tokens,
        generator=generator,
        dtype=real,
        device=generator.device if generator else None,
    ).to(device)
    u, spent = fresh[:, 0], torch.zeros(R, device=device)  # both are for `uniforms` only
    stops = torch.as_tensor([] if stop is None else stop, dtype=torch.long, device=device).flatten()
    # whether all logits were: looked at once, at the end
    finite = torch.ones((), dtype=torch.bool, device=device)
    if uniforms is not None:
        if uniforms.shape != (R,) or not (
            uniforms.is_floating_point() and 0 <= uniforms.min() <= uniforms.max() < 1
        ):
            raise ValueError(f"{R} rows need {R} uniforms in [0, 1)")
        # bits
        u, budget = (
            uniforms.to(device, real),
            -math.log2(max(torch.finfo(uniforms.dtype).eps, torch.finfo(real).eps)) / 2,
        )

    # 1. Read each prompt once (padding on the right is invisible to what comes before it), then
    # clone its cache to its n rows.
    ids = torch.zeros(len(prompts), P, dtype=torch.long)
    for i, p in enumerate(prompts):
        ids[i, : lens[i]] = torch.as_tensor(p)
    ids = ids.to(device)
    cache = KVCache(model.config, len(prompts), P, device, model.lm_head.weight.dtype)
    # (prompts, C): each one's last token
    x = model.hidden(ids, cache)[torch.arange(len(prompts)), torch.as_tensor(lens) - 1]
    cache.set_lens(lens)
    cache = cache.expand(n, P + max_new_tokens - 1)
    logits = model.lm_head(x).repeat_interleave(n, dim=0)  # (R, V)

    # 2. Draw, retire the rows that stop, step the others.
    def draw(logits, number, u, spent):
        """logits (R, V), a fresh number, the row's own number and the bits it has paid, each (R,)
        -> token, logp, u, spent.
        """
        finite.logical_and_(logits.isfinite().all())
        if temperature == 0:
            return logits.argmax(-1), torch.zeros_like(number, dtype=torch.float32), u, spent
        probs = truncate(logits.float() / temperature, top_k, top_p).softmax(-1)  # (R, V)
        token, place = inverse_cdf(probs, number if uniforms is None else u)
        logp = probs.gather(1, token[:, None]).squeeze(1).log()
        if uniforms is not None:
            spent = spent - logp / math.log(2)
            used_up = spent > budget
            u, spent = torch.where(used_up, number, place), spent.masked_fill(used_up, 0)
        return token, logp, u, spent

    decode = (
        decode_static
        if device.type in STATIC_ON and not torch.is_autocast_enabled(device.type)
        else decode_eager
    )
    # (R, max_new_tokens); token -1: never drawn
    tokens, logps = decode(model, cache, logits, draw, fresh, u, spent, stops)
    if not finite:
        raise NotFinite("generate: the model's logits are not all finite")

    # 3. Prompt and continuation of each row side by side.
    drawn = tokens >= 0
    prompt_lens = torch.as_tensor(lens, device=device).repeat_interleave(n)  # (R,)
    T = int((prompt_lens + drawn.sum(1)).max())
    out = torch.zeros(R, P + max_new_tokens, dtype=torch.long, device=device)
    mask, logp = torch.zeros(out.shape, device=device), torch.zeros(out.shape, device=device)
    out[:, :P] = ids.repeat_interleave(n, dim=0)
    # (R, max_new_tokens)
    columns = prompt_lens[:, None] + torch.arange(max_new_tokens, device=device)
    (
        out.scatter_(1, columns, tokens.clamp_min(0)),
        mask.scatter_(1, columns, drawn.float()),
        logp.scatter_(1, columns, logps),
    )
    return Rollout(out[:, :T], mask[:, :T], logp[:, :T], prompt_lens)


def skip_draws(rows, config, generator):
    """Draw, and drop, the numbers that generate takes for so many rows: processes that share a
    batch share one random stream.
    """
    torch.rand(rows, config.max_new_tokens, dtype=torch.float64, generator=generator)


# --------------------------------------------------------------------------------------------------
# On a GPU: the same steps as CUDA graphs


class StaticCache:
    """Some steps of one token each over a KVCache, every one the same kernels on the same
    addresses: what a CUDA graph needs. Positions are a tensor that each step advances in place;
    each step reads all the slots that the last one will, and a mask hides the rest.
    """

    length = 0  # a tensor now: generate has checked that all steps fit

    def __init__(self, cache, steps):
        device, S = cache.lens.device, min(cache.capacity, -(-(cache.length + steps) // 64) * 64)
        self.cache, self.lens = cache, cache.lens.clone()
        self.rows, self.slots = (
            torch.arange(cache.rows, device=device),
            torch.arange(S, device=device),
        )

    def extend(self, T):
        self.now = self.lens.clone()
        distance = self.now[:, None, None, None] - self.slots  # (rows, 1, 1, S)
        self.lens += T
        return self.now[:, None], (distance >= 0) & (
            distance < (self.cache.config.window or self.cache.capacity + 1)
        )

    def append(self, layer, k, v):
        k_slots, v_slots = self.cache.k[layer], self.cache.v[layer]
        k_slots[self.rows, self.now], v_slots[self.rows, self.now] = k[:, 0], v[:, 0]
        return k_slots[: len(self.rows), : len(self.slots)], v_slots[
            : len(self.rows), : len(self.slots)
        ]


STATIC_ON = ("cuda",)  # where generate decodes with decode_static
SPAN = 128  # steps between two looks at which rows have stopped, and two captures


def decode_static(model, cache, logits, draw, fresh, u, spent, stops):
    """decode_eager for a GPU: nothing comes back from the device for SPAN steps, of which all but
    the first are one CUDA graph's replays. Then rows that have stopped leave, and the graph is
    captured again for the rows left and the slots that they have come to need.
    """
    R, new = fresh.shape
    tokens, logps = (
        torch.full((R, new), -1, device=fresh.device),
        torch.zeros(R, new, device=fresh.device),
    )
    rows = torch.arange(R, device=fresh.device)
    token, logps[:, 0], u, spent = draw(logits, fresh[:, 0], u, spent)
    tokens[:, 0] = token
    for start in range(1, new, SPAN):
        if len(stops):
            order = cache.keep(~among(token, stops))
            rows, token, u, spent = rows[order], token[order], u[order], spent[order]
            if len(rows) == 0:
                break
        steps = min(SPAN, new - start)
        static, numbers, t = (
            StaticCache(cache, steps),
            fresh[rows, start : start + steps],
            torch.zeros(1, dtype=torch.long, device=fresh.device),
        )
        state = [x.clone() for x in (token, u, spent)]
        drawn, scored = (
            torch.full(numbers.shape, -1, device=fresh.device),
            torch.zeros(numbers.shape, device=fresh.device),
        )

        def step():
            old = state[0]
            # (live, V)
            z = model.lm_head(model.hidden(old[:, None], static)[:, -1])
            token, logp, u, spent = draw(z, numbers.index_select(1, t).squeeze(1), *state[1:])
            # a row that has stopped goes on drawing, unrecorded
            done = among(old, stops)
            (
                drawn.index_copy_(1, t, token.masked_fill(done, -1)[:, None]),
                scored.index_copy_(1, t, logp.masked_fill(done, 0)[:, None]),
            )
            for x, y in zip(state, (torch.where(done, old, token), u, spent)):
                x.copy_(y)
            t.add_(1)

        step()
        again = captured(step, fresh.device) if steps > 8 else step
        for _ in range(steps - 1):
            again()
        tokens[rows, start : start + steps], logps[rows, start : start + steps] = drawn, scored
        token, u, spent = state
        cache.set_lens(static.lens.tolist())
    return tokens, logps


def captured(step, device):
    """A function that repeats what `step` does on the device: a CUDA graph's replay; where there
    are none, step itself, from then on without trying.
    """
    global STATIC_ON
    if device.type != "cuda":
        return step
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream(device)
    try:
        with torch.cuda.graph(graph):
            step()
    except RuntimeError as e:
        STATIC_ON = ()
        torch.cuda.set_stream(stream)  # a capture that fails may leave us on its own
        say_once(
            f"generate: this step cannot be a CUDA graph, runs it eagerly instead ({str(e).splitlines()[0]})"
        )
        return step
    return graph.replay
