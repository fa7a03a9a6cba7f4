"""set2.py: what has to hold of the functions that sample."""

import math
from itertools import combinations

import torch

from assignment.checks import close, normal, parts, say, seeded, tensor, zeros

# --------------------------------------------------------------------------------------------------
# cache_step

LENS = [0, 2, 1]


def cache(lens, junk=100.0):
    """Keys and values (R, 5, 2): small numbers where a row's tokens are, junk where nothing is."""
    lens = torch.tensor(lens)
    empty = (torch.arange(5) >= lens[:, None])[..., None]
    keys = torch.where(empty, junk, normal(len(lens), 5, 2))
    values = torch.where(empty, junk, normal(len(lens), 5, 2, seed=1))
    return keys, values, lens


def each_row_writes_into_its_own_slot(cache_step):
    """The new key and value of row r go into slot lens[r] of that row (slots count from 0), and
    nothing else in the cache changes.
    """
    keys, values, lens = cache(LENS)
    want_keys, want_values = keys.clone(), values.clone()
    q, k, v = normal(3, 3, 2, seed=2)
    for row, length in enumerate(LENS):
        want_keys[row, length] = k[row]
        want_values[row, length] = v[row]
    cache_step(keys, values, lens, q, k, v)
    close(keys, want_keys, "the keys")
    close(values, want_values, "the values")


def every_row_grows_by_one(cache_step):
    """The new lens are the old ones plus 1, in an int64 tensor of their own."""
    _, new = parts(cache_step(*cache(LENS), *normal(3, 3, 2, seed=2)), 2)
    close(new, tensor(1, 3, 2))
    assert new.dtype == torch.int64, f"the new lens are {new.dtype}, not int64"


def a_token_sees_itself(cache_step):
    """The new token sees itself: in an empty row its value is the output."""
    q, k, v = normal(3, 3, 2, seed=2)
    out, _ = parts(cache_step(*cache([0, 0, 0]), q, k, v), 2)
    close(out, v)


def a_row_sees_its_own_tokens_only(cache_step):
    """A row sees its own lens[r] + 1 tokens and nothing beyond: not the slots that only longer rows
    have filled. With a query of 0 the output is the mean of these values.
    """
    keys, values, lens = cache(LENS)
    _, k, v = normal(3, 3, 2, seed=2)
    want = [torch.cat((values[r, :n], v[r : r + 1])).mean(0) for r, n in enumerate(LENS)]
    out, _ = parts(cache_step(keys, values, lens, torch.zeros_like(k), k, v), 2)
    close(out, torch.stack(want))


def unused_slots_may_hold_anything(cache_step):
    """What stands in the slots beyond may be anything, inf and nan too: it is left out of keys and
    values, not multiplied by 0, for 0 times nan is nan.
    """
    token = normal(3, 3, 2, seed=2)
    want, _ = parts(cache_step(*cache(LENS), *token), 2)
    for junk in (math.inf, math.nan):
        out, _ = parts(cache_step(*cache(LENS, junk), *token), 2)
        close(out, want, f"with {junk} in all unused slots")


def scores_may_be_large(cache_step):
    """Scores of 20,000 or -20,000 give numbers: the largest is subtracted before exp, and unused
    slots get a score of -inf, not just a low one. Where a row's keys are all equal, the output is
    the mean of its values.
    """
    keys, values, lens = cache(LENS)
    v = normal(3, 2)
    one = torch.ones_like(v)
    want = [torch.cat((values[r, :n], v[r : r + 1])).mean(0) for r, n in enumerate(LENS)]
    for q in (20_000 * one, -20_000 * one):
        out, _ = parts(cache_step(torch.ones_like(keys), values.clone(), lens, q, one, v), 2)
        close(out, torch.stack(want), f"with a query of {q[0, 0]:g}")


def scores_are_divided_by_the_root_of_D(cache_step):
    """Scores are divided by sqrt(D), as in `attention`."""
    keys, values, _ = cache([1])
    keys[0, 0] = 0
    values[0, 0] = 0
    q = tensor([2**0.5, 0])  # with the new key (1, 0) the score is 1
    one = tensor([1, 0])
    out, _ = parts(cache_step(keys, values, torch.tensor([1]), q, one, one), 2)
    want = tensor([math.e / (1 + math.e), 0])
    close(out, want)


CACHE_STEP = [
    each_row_writes_into_its_own_slot,
    every_row_grows_by_one,
    a_token_sees_itself,
    a_row_sees_its_own_tokens_only,
    unused_slots_may_hold_anything,
    scores_may_be_large,
    scores_are_divided_by_the_root_of_D,
]


# --------------------------------------------------------------------------------------------------
# inverse_cdf


def drawn(inverse_cdf, probs, *numbers):
    """The token that each number draws from the same probabilities."""
    probs = tensor(probs).expand(len(numbers), -1)
    return inverse_cdf(probs, tensor(*numbers))


def each_token_owns_its_interval(inverse_cdf):
    """Token i owns the numbers from the sum of the probabilities before it (included) to the sum
    with its own (excluded): with .25, .25, .5 the number .25 draws token 1.
    """
    got = drawn(inverse_cdf, [0.25, 0.25, 0.5], 0.0, 0.2, 0.25, 0.49, 0.5, 0.99)
    close(got, tensor(0, 0, 1, 1, 2, 2))


def each_row_uses_its_own_number(inverse_cdf):
    """Every row is drawn with its own u: the answers to one prompt must not share their token."""
    got = drawn(inverse_cdf, [0.5, 0.5], 0.1, 0.9, 0.2, 0.8)
    want = tensor(0, 1, 0, 1)
    close(got, want)


def the_vocabulary_keeps_its_order(inverse_cdf):
    """A token is an index of the vocabulary, whichever way the probabilities are sorted, and even
    numbers draw each as often as its probability says.
    """
    numbers = (torch.arange(20) + 0.5) / 20
    got = drawn(inverse_cdf, [0.1, 0.6, 0.3], *numbers.tolist())
    want = tensor(2, 12, 6)
    close(torch.bincount(got, minlength=3), want)


def what_has_probability_0_is_never_drawn(inverse_cdf):
    """A token of probability 0 is never drawn: not at u = 0, not on a border."""
    got = drawn(inverse_cdf, [0, 0.5, 0, 0.5], 0.0, 0.5)
    close(got, tensor(1, 3))


def rounding_does_not_fall_off_the_end(inverse_cdf):
    """Ten times .1 add up to a little less than 1. The largest u below 1 still draws the last token
    that has a probability, not one beyond it.
    """
    largest = 1 - 2**-53
    got = drawn(inverse_cdf, [0.1] * 10 + [0], largest)
    close(got, tensor(9))
    got = drawn(inverse_cdf, [0.1] * 10, largest)
    close(got, tensor(9))


INVERSE_CDF = [
    each_row_uses_its_own_number,
    the_vocabulary_keeps_its_order,
    each_token_owns_its_interval,
    what_has_probability_0_is_never_drawn,
    rounding_does_not_fall_off_the_end,
]


# --------------------------------------------------------------------------------------------------
# truncate

INF = math.inf
LOGITS = tensor(0.2, 0.4, 0.1, 0.3).log()  # sorted: tokens 1, 3, 0, 2
SORTED = tensor(0.4, 0.3, 0.2, 0.1).log()


def kept(logits, *tokens):
    """The logits (1, V) with -inf but for some tokens."""
    want = torch.full_like(logits, -INF)
    want[list(tokens)] = logits[list(tokens)]
    return want[None]


def top_k_keeps_the_k_largest(truncate):
    """top_k keeps the k largest logits of each row as they are; the others become -inf, so that
    their probability is 0.
    """
    got = truncate(LOGITS[None], top_k=2)
    want = kept(LOGITS, 1, 3)
    close(got, want)
    two = torch.stack((LOGITS, LOGITS.flip(0) + 9))
    want = torch.cat((kept(LOGITS, 1), kept(two[1], 2)))
    close(truncate(two, top_k=1), want)


def top_k_keeps_ties_and_may_be_large(truncate):
    """What equals the k-th largest logit is kept, too, and a top_k beyond V keeps all."""
    got = truncate(tensor([1, 2, 2, 0]), top_k=1)
    want = tensor([-INF, 2, 2, -INF])
    close(got, want)
    close(truncate(LOGITS[None], top_k=9), LOGITS[None])


def top_p_keeps_the_token_that_crosses_the_line(truncate):
    """top_p keeps the likeliest tokens until their sum reaches top_p, the token that crosses the
    line included: .4 + .3 are less than .75, so a third one stays; one stays always.
    """
    got = truncate(SORTED[None], top_p=0.75)
    want = kept(SORTED, 0, 1, 2)
    close(got, want)
    got = truncate(SORTED[None], top_p=0.65)
    want = kept(SORTED, 0, 1)
    close(got, want)
    got = truncate(SORTED[None], top_p=0.01)
    close(got, kept(SORTED, 0))


def top_p_keeps_no_more_than_it_takes(truncate):
    """The mass before a token decides, and of equal tokens no more than it takes are kept: of four
    with .25 each top_p = .5 keeps two, of eight with .125 four. One stays always: top_p = 0 keeps
    one.
    """
    for V, top_p, count in ((4, 0.5, 2), (8, 0.5, 4), (4, 0.0, 1)):
        got = truncate(zeros(1, V), top_p=top_p)
        close((got == 0).sum(), count, f"how many of {V} equal tokens top_p = {top_p:g} keeps")
    close(truncate(SORTED[None], top_p=0.0), kept(SORTED, 0), "top_p = 0")


def the_vocabulary_keeps_its_place(truncate):
    """After sorting, every token goes back to its own place in the vocabulary; rows are sorted on
    their own.
    """
    two = torch.stack((LOGITS, LOGITS.roll(1)))
    want = torch.cat((kept(LOGITS, 1, 3), kept(two[1], 0, 2)))
    close(truncate(two, top_p=0.65), want)


def nothing_asked_nothing_done(truncate):
    """Without top_k and top_p, and with top_p = 1, the logits come back as they are."""
    logits = 5 * normal(2, 6)
    close(truncate(logits), logits)
    close(truncate(logits, top_p=1.0), logits)


def top_p_is_a_share_of_what_top_k_left(truncate):
    """top_k comes first, and top_p is a share of what it has left: of .4 and .3 the first alone is
    .57 of the two.
    """
    got = truncate(LOGITS[None], top_k=2, top_p=0.5)
    close(got, kept(LOGITS, 1))


TRUNCATE = [
    top_k_keeps_the_k_largest,
    top_k_keeps_ties_and_may_be_large,
    top_p_keeps_the_token_that_crosses_the_line,
    top_p_keeps_no_more_than_it_takes,
    the_vocabulary_keeps_its_place,
    nothing_asked_nothing_done,
    top_p_is_a_share_of_what_top_k_left,
]


# --------------------------------------------------------------------------------------------------
# stratified_uniforms and lattice_uniforms

MANY, GROUP = 4000, 4


def uniforms(function, seed=0):
    """(MANY, GROUP) numbers that were checked to be in [0, 1)."""
    u = function(MANY, GROUP, seeded(seed))
    assert isinstance(u, torch.Tensor), f"it gives back {type(u).__name__}, not a tensor"
    assert u.shape == (MANY, GROUP), f"it gives back shape {tuple(u.shape)}, not (prompts, group)"
    assert u.dtype == torch.float64, f"its numbers are {u.dtype}, not float64"
    assert u.min() >= 0 and u.max() < 1, "a number is outside of [0, 1)"
    return u


def numbers_between_0_and_1(function):
    """The shape is (prompts, group), the numbers are float64 from 0 to below 1, made by the
    generator: the same seed gives the same ones.
    """
    assert torch.equal(uniforms(function), uniforms(function)), "the same seed gives other numbers"
    changed = not torch.equal(uniforms(function), uniforms(function, 1))
    assert changed, "another seed gives the same numbers: there is nothing random in them"


def a_second_call_gives_other_numbers(function):
    """The generator moves on: a second call with the same one gives other numbers. It is not seeded
    anew, and many shifts or places are possible, not a hundred.
    """
    generator = seeded()
    first, second = (function(MANY, GROUP, generator) for _ in range(2))
    assert not torch.equal(first, second), "two calls with one generator give the same numbers"
    different = (first * GROUP % 1)[:, 0].mul(1e9).round().unique().numel()
    assert different > 0.9 * MANY, f"{MANY} rows have {different} different places only"


def one_in_each_interval(function):
    """Of a row's numbers one lies in each of the `group` equal intervals."""
    got = (uniforms(function) * GROUP).floor().sort(1).values
    want = torch.arange(4.0).expand(MANY, 4)
    close(got, want)


def flat(x, what):
    """AssertionError unless the quarters of [0, 1) hold equally many of the numbers x (n,), up to 6
    standard errors.
    """
    counts = torch.histc(x.float(), bins=4, min=0, max=1)
    n = len(x) / 4
    uneven = (counts - n).abs().max() > 6 * math.sqrt(n)
    assert not uneven, f"{what}: the quarters of [0, 1) hold {say(counts)} of {len(x)} numbers"


def every_answer_is_uniform_on_its_own(function):
    """Each answer's number is uniform on [0, 1) over the prompts: no answer always gets the first
    interval, so the intervals stand in random order.
    """
    u = uniforms(function)
    for answer in range(GROUP):
        flat(u[:, answer], f"answer {answer}")


def every_row_has_an_order_of_its_own(function):
    """The order of the intervals is drawn for each row: two rows share theirs by chance only."""
    order = uniforms(function).argsort(1)
    same = (order[1:] == order[:-1]).all(1).double().mean()
    assert same < 0.2, f"a row has the order of the one before it {same:.0%} of the time"


def places_are_random_and_independent(function):
    """Within its interval each number has a random place of its own: not the middle, and not the
    place of its neighbours.
    """
    place = uniforms(function) * GROUP % 1
    flat(place.flatten(), "the places within the intervals")
    apart = (place[:, 0] - place[:, 1]).abs().mean()
    assert apart > 0.2, "the numbers of a row share their place within the intervals"


STRATIFIED_UNIFORMS = [
    numbers_between_0_and_1,
    one_in_each_interval,
    every_row_has_an_order_of_its_own,
    every_answer_is_uniform_on_its_own,
    places_are_random_and_independent,
    a_second_call_gives_other_numbers,
]


def an_even_grid(lattice_uniforms):
    """The numbers of a row are an even grid: sorted, neighbours are 1 / group apart."""
    gaps = uniforms(lattice_uniforms).sort(1).values.diff(dim=1)
    want = torch.full((MANY, GROUP - 1), 1 / GROUP)
    close(gaps, want)


def the_shift_is_uniform_on_all_of_0_to_1(lattice_uniforms):
    """The shift is uniform on [0, 1), not only within the first interval: each answer's number is
    uniform on [0, 1) over the prompts. A row that has been sorted is not: do not sort.
    """
    u = uniforms(lattice_uniforms)
    for answer in range(GROUP):
        flat(u[:, answer], f"answer {answer}")


def every_row_has_a_shift_of_its_own(lattice_uniforms):
    """Every row draws a shift of its own."""
    shift = uniforms(lattice_uniforms) * GROUP % 1
    apart = (shift[1:, 0] - shift[:-1, 0]).abs().mean()
    assert apart > 0.2, "rows share their shift"


LATTICE_UNIFORMS = [
    numbers_between_0_and_1,
    an_even_grid,
    every_row_has_a_shift_of_its_own,
    the_shift_is_uniform_on_all_of_0_to_1,
    a_second_call_gives_other_numbers,
]


# --------------------------------------------------------------------------------------------------
# pass_at_k


def it_counts_subsets(pass_at_k):
    """It is the share of all sets of k answers out of n (drawn without replacement) that hold a
    right one; counted here for n = 5.
    """
    for k in range(1, 6):
        sets = list(combinations(range(5), k))
        # of c right answers let the first c be right
        want = [sum(min(s) < c for s in sets) / len(sets) for c in range(6)]
        got = pass_at_k(5, torch.arange(6), k)
        close(got, want, f"n = 5, k = {k}, c = 0 to 5")


def without_a_right_answer_it_is_0(pass_at_k):
    """Without any right answer it is 0, and with fewer than k wrong ones exactly 1."""
    got = pass_at_k(8, torch.tensor([0, 5, 8]), 4)
    assert isinstance(got, torch.Tensor), f"it gives back {type(got).__name__}, not a tensor"
    assert got.tolist() == [0, 1, 1], f"n = 8, c = 0, 5, 8, k = 4 give {got.tolist()}"


def more_answers_than_there_are(pass_at_k):
    """k above n, or below 1, is a ValueError: nothing can be said of 8 answers if 4 were drawn."""
    for k in (0, 5):
        try:
            got = pass_at_k(4, torch.tensor([1]), k)
        except ValueError:
            continue
        raise AssertionError(f"n = 4 and k = {k} give {got}")


def large_numbers_are_no_trouble(pass_at_k):
    """n = 10,000 overflows factorials and not a product of fractions: with one right answer pass@k
    is k / n.
    """
    try:
        got = pass_at_k(10_000, torch.tensor([1, 1]), 1000)
    except OverflowError as e:
        raise AssertionError(f"n = 10,000 and k = 1,000: {e}") from None
    close(got, tensor(0.1, 0.1), "c = 1, k = 1,000", tol=1e-8)


PASS_AT_K = [
    it_counts_subsets,
    without_a_right_answer_it_is_0,
    more_answers_than_there_are,
    large_numbers_are_no_trouble,
]
