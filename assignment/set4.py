"""set4.py: what has to hold of the kernels: what the definitions say, without their memory."""

import math

import torch

from assignment.checks import Largest, close, normal, ones, parts, tensor

N, C, V = 6, 3, 10
BLOCK = 4  # the last block has 2 columns


def problem():
    """hidden (N, C), weight (V, C), targets (N,) in all blocks."""
    return normal(N, C), normal(V, C, seed=1), torch.tensor([0, 3, 4, 7, 8, 9])


def definition(hidden, weight, targets, temperature=1.0):
    """logp, entropy, lse from all logits."""
    z = hidden @ weight.T / temperature
    logp = z.log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    return logp.gather(1, targets[:, None])[:, 0], entropy, z.logsumexp(-1)


def compare(got, want, tol=1e-5):
    names = "logp", "entropy", "lse"
    for name, a, b in zip(names, parts(got, 3), want, strict=True):
        close(a, b, name, tol=tol)


def by_definition(token_logprobs, case, block, temperature=1.0):
    """AssertionError unless a case (hidden, weight, targets) gives what the definitions give."""
    got = token_logprobs(*case, temperature, block)
    want = definition(*case, temperature)
    compare(got, want)


def all_logits_equal(token_logprobs):
    """Where all logits are 0 every token has log-probability -log V, the entropy is log V, in nats:
    every column counts once, those of a last, narrower block too.
    """
    hidden, weight, targets = problem()
    log_v = torch.full((N,), math.log(V))
    got = token_logprobs(0 * hidden, weight, targets, 1.0, BLOCK)
    compare(got, (-log_v, log_v, log_v))


def the_definition_holds(token_logprobs):
    """logp, entropy and lse are what the definitions give; here with one block of all columns."""
    by_definition(token_logprobs, problem(), V)


def the_block_does_not_matter(token_logprobs):
    """The result is the same for any block, targets in the first or the last: sums so far are
    scaled down when a later block has a larger maximum.
    """
    hidden, _, targets = problem()
    # logits grow along the vocabulary: every block has a new maximum
    rising = ones(V, C).cumsum(0)
    loud = hidden.abs(), rising, targets
    for block in (1, BLOCK):
        by_definition(token_logprobs, loud, block)
        by_definition(token_logprobs, problem(), block)


def temperature_divides_the_logits(token_logprobs):
    """The logits are divided by the temperature before all else, for the entropy as well."""
    by_definition(token_logprobs, problem(), V, temperature=0.5)


def logits_may_be_large(token_logprobs):
    """Logits of a thousand, or of minus a thousand, overflow nothing: exp is taken of what is left
    after the maximum. Adding the same to all logits changes neither logp nor entropy.
    """
    weight = tensor([1000], [1001], [1002])
    for sign in (1, -1):
        got = token_logprobs(sign * ones(1, 1), weight, torch.tensor([1]), 1.0, 2)
        z = sign * tensor(0, 1, 2)
        logp = z.log_softmax(0)
        entropy = -(logp.exp() * logp).sum()
        lse = sign * 1000 + z.logsumexp(0)
        compare(got, (logp[1:2], entropy[None], lse[None]), tol=1e-4)


LARGE, WIDE = 40, 600  # tokens, and columns in blocks of at most 256


def too_large(numbers, limit, what):
    assert numbers <= limit, f"a tensor of {numbers:,} numbers was made; {what}: {limit:,}"


def it_never_holds_all_logits(token_logprobs):
    """No tensor has more than N * block numbers: the logits of the whole vocabulary never exist."""
    hidden, weight = normal(LARGE, 4), normal(WIDE, 4, seed=1)
    with Largest() as largest:
        token_logprobs(hidden, weight, torch.arange(LARGE), 1.0, 256)
    too_large(largest.numbers, LARGE * 256, "N * block is")


TOKEN_LOGPROBS = [
    all_logits_equal,
    the_definition_holds,
    temperature_divides_the_logits,
    the_block_does_not_matter,
    logits_may_be_large,
    it_never_holds_all_logits,
]


# --------------------------------------------------------------------------------------------------
# token_logprobs_backward

ONES = ones(N)


def slopes(function, g_logp, g_entropy, temperature=1.0, block=V):
    """The function's gradients, and those of autograd through the definition."""
    hidden, weight, targets = problem()
    with torch.enable_grad():
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        logp, entropy, lse = definition(*leaves, targets, temperature)
        want = torch.autograd.grad((g_logp * logp + g_entropy * entropy).sum(), leaves)
    known = lse.detach(), entropy.detach()
    got = function(hidden, weight, targets, *known, g_logp, g_entropy, temperature, block)
    return parts(got, 2), want


def compare_slopes(got, want):
    close(got[0], want[0], "the gradient of hidden")
    close(got[1], want[1], "the gradient of weight")


def the_gradient_of_logp(function):
    """d logp / dz is onehot(target) - p: the target pulls up, everything pushes down."""
    compare_slopes(*slopes(function, ONES, 0 * ONES))


def the_gradient_of_the_entropy(function):
    """d entropy / dz is -p (log p + entropy), whatever the target. The mean of log p is MINUS the
    entropy, so that the gradients of a row's logits add up to 0.
    """
    compare_slopes(*slopes(function, 0 * ONES, ONES))


def every_token_has_its_own_weight(function):
    """Each token's gradient is multiplied by its own g_logp and g_entropy, which may be 0 or
    negative.
    """
    g_logp = tensor(1, -2, 0, 0.5, 3, -1)
    g_entropy = tensor(0, 1, -1, 2, 0, 0.5)
    compare_slopes(*slopes(function, g_logp, g_entropy))


def by_the_chain_rule_1_over_temperature(function):
    """The temperature divides the logits, so by the chain rule it divides the gradients, too."""
    compare_slopes(*slopes(function, ONES, ONES, temperature=0.5))


def blocks_add_up(function):
    """The gradient of hidden is a SUM over the blocks, that of weight has the rows of each block:
    any block gives the same. p = exp(z - lse) with the lse given, not the block's own, and a target
    counts in its own block only.
    """
    for block in (1, BLOCK):
        compare_slopes(*slopes(function, ONES, ONES, block=block))


def it_never_holds_all_slopes(function):
    """No tensor has more than N * block numbers: p is computed anew in each block, not kept."""
    hidden, weight = normal(LARGE, 4), normal(WIDE, 4, seed=1)
    targets = torch.arange(LARGE)
    _, entropy, lse = definition(hidden, weight, targets)
    with Largest() as largest:
        function(hidden, weight, targets, lse, entropy, lse, lse, 1.0, 256)
    too_large(largest.numbers, LARGE * 256, "N * block is")


TOKEN_LOGPROBS_BACKWARD = [
    the_gradient_of_logp,
    the_gradient_of_the_entropy,
    by_the_chain_rule_1_over_temperature,
    every_token_has_its_own_weight,
    blocks_add_up,
    it_never_holds_all_slopes,
]


# --------------------------------------------------------------------------------------------------
# flash_attention: 7 tokens in tiles of 3

T, D = 7, 2


def softmax_attention(q, k, v):
    """o and lse from all scores."""
    scores = q @ k.T / q.shape[1] ** 0.5
    future = torch.arange(len(k)) > torch.arange(len(q))[:, None]
    scores = scores.masked_fill(future, -math.inf)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def compare_attention(flash_attention, q, k, v, tile, tol=1e-4):
    """Of float32 numbers: what fast kernels work with."""
    q, k, v = q.float(), k.float(), v.float()
    o, lse = parts(flash_attention(q, k, v, tile), 2)
    want_o, want_lse = softmax_attention(q.double(), k.double(), v.double())
    close(o, want_o, "o", tol=tol)
    close(lse, want_lse, "lse", tol=tol)


def equal_scores_give_means(flash_attention):
    """With queries of 0 the output is the mean of the values so far: each query sees itself and the
    past, and the sum divides once, at the end. lse is then the log of how many it sees.
    """
    rising = ones(T, D).cumsum(0)
    compare_attention(flash_attention, torch.zeros(T, D), normal(T, D), rising, 3)


def it_is_softmax_attention(flash_attention):
    """o and lse are those of softmax(q k^T / sqrt(D)) v, with lse in nats; here with one tile."""
    q, k, v = normal(3, T, D)
    compare_attention(flash_attention, q, k, v, T)


def a_larger_maximum_scales_down_what_came_before(flash_attention):
    """When a later tile of keys has a larger maximum, the sum AND the output so far are scaled down
    by exp(old maximum - new maximum).
    """
    rising = ones(T, D).cumsum(0)  # so that scores grow
    compare_attention(flash_attention, ones(T, D), rising, normal(T, D), 3)


def any_tile_will_do(flash_attention):
    """The result is the same for every size of the tiles, also where the last is not full, and
    where one holds all.
    """
    for tile in (1, 2, 3, 16):
        q, k, v = normal(3, T, D)
        compare_attention(flash_attention, q, k, v, tile)


def scores_may_be_large(flash_attention):
    """Scores of hundreds, above 0 or below, give numbers, not inf or nan: the running maximum is
    that of the scores alone, and begins at -inf.
    """
    k = 10 * normal(T, D)
    compare_attention(flash_attention, 30 * ones(T, D), k, normal(T, D), 3, tol=1e-3)
    low = -30 * ones(T, 4)
    v = normal(T, 4)
    compare_attention(flash_attention, -low, low, v, 3, tol=1e-3)


def every_query_has_its_own_maximum(flash_attention):
    """The running maximum is each query's own, not one for the tile; it is taken of the keys that
    the query sees, after the causal mask; and it goes on growing after the first tile.
    """
    v = normal(T, D)
    signs = tensor(1, -1, 1, -1, -1, 1, -1)[:, None]
    k = 10 * normal(T, D).abs() + 10
    q = 50 * signs * ones(T, D)
    compare_attention(flash_attention, q, k, v, 3, tol=1e-3)
    loud = ones(T, D)
    loud[2] = loud[5] = 100  # keys that the queries before them do not see
    same = ones(T, D)
    compare_attention(flash_attention, 10 * same, loud, v, 3, tol=1e-3)
    rising = same.cumsum(0)
    compare_attention(
        flash_attention,
        100 * same,
        rising,
        v,
        3,
        tol=1e-3,
    )


def it_never_holds_a_row_of_scores(flash_attention):
    """No tensor has more numbers than the larger of T * D and tile * tile: a tile of queries never
    meets more than a tile of keys at a time.
    """
    q, k, v = normal(3, 16, D)
    with Largest() as largest:
        flash_attention(q, k, v, 4)
    too_large(largest.numbers, 16 * D, "the larger of T * D and tile * tile is")


FLASH_ATTENTION = [
    equal_scores_give_means,
    it_is_softmax_attention,
    a_larger_maximum_scales_down_what_came_before,
    any_tile_will_do,
    scores_may_be_large,
    every_query_has_its_own_maximum,
    it_never_holds_a_row_of_scores,
]
