"""set1.py: what has to hold of the model's functions. The docstring of a property is what a student
reads when it fails.
"""

import math

import torch

from assignment.checks import close, normal, ones, tensor, zeros


def words(text):
    """Words as a tokenizer cuts them: each with the space before it."""
    return [f" {word}".encode() for word in text.split()]


# --------------------------------------------------------------------------------------------------
# bpe_merges


def says(got, want):
    assert isinstance(got, list), f"it gives back {type(got).__name__}, not a list"
    assert got == want, f"it joins {got}, and should join {want}"


def the_most_frequent_pair_comes_first(bpe_merges):
    """The first pair is the one that occurs most often in the text: a word that stands there three
    times counts three times.
    """
    says(bpe_merges(words("xab yab zab"), 1), [b"ab"])
    says(bpe_merges(words("abab abab xcd ycd zcd"), 1), [b"ab"])


def of_equal_pairs_the_greater_one(bpe_merges):
    """Of equally frequent pairs the greater one is joined, as Python compares tuples of bytes: not
    the first that was met, and not the smaller one.
    """
    says(bpe_merges(words("abcd"), 1), [b"cd"])
    says(bpe_merges(words("dcba"), 1), [b"dc"])


def pairs_are_counted_anew(bpe_merges):
    """After a merge the pairs are counted again, of the tokens as they are now: a joined token
    takes part in later pairs, its former parts do not.
    """
    text = " ".join(["low"] * 5 + ["lower"] * 2 + ["newest"] * 6 + ["widest"] * 3)
    want = [b"st", b"est", b"ow", b"low", b" low", b"west", b"ne"]
    says(bpe_merges(words(text), 7), want)


def from_left_to_right(bpe_merges):
    """Within a word pairs are joined from left to right: `aaab` becomes `aa` `a` `b`."""
    says(bpe_merges(words("aaab aaab"), 2), [b"aa", b"aaa"])


def no_pair_across_words(bpe_merges):
    """The end of a word and the beginning of the next are no pair."""
    says(bpe_merges(words("xa ya za"), 1), [b"za"])


def where_no_pair_is_left_it_ends(bpe_merges):
    """Where every word is one token no pair is left, and the list ends early."""
    says(bpe_merges(words("ab ab"), 9), [b"ab", b" ab"])


BPE_MERGES = [
    the_most_frequent_pair_comes_first,
    of_equal_pairs_the_greater_one,
    no_pair_across_words,
    pairs_are_counted_anew,
    from_left_to_right,
    where_no_pair_is_left_it_ends,
]


# --------------------------------------------------------------------------------------------------
# rms_norm


def the_mean_of_the_squares_is_one(rms_norm):
    """With weight 1 and eps 0 the mean (not the sum) of the squares of each row is 1."""
    x = tensor([1, -1, 1, -1], [3, -4, -3, 4])
    y = rms_norm(x, ones(4), 0.0)
    got = y.square().mean(-1)
    close(got, tensor(1, 1))


def no_mean_is_subtracted(rms_norm):
    """RMSNorm is not LayerNorm: no mean is subtracted, and a constant row stays constant."""
    y = rms_norm(tensor([3, 3, 3, 3]), ones(4), 0.0)
    close(y, tensor([1, 1, 1, 1]))


def each_row_has_its_own_size(rms_norm):
    """The mean is over the last dimension only: a row does not depend on the other rows."""
    x = normal(2, 3, 4)
    weight = ones(4)
    got = rms_norm(x, weight, 1e-5)[1, 2]
    want = rms_norm(x[1, 2], weight, 1e-5)
    close(got, want)


def eps_is_under_the_root(rms_norm):
    """eps is added to the mean of the squares, under the root: a row of 0.001 with eps 0.000001
    becomes 1 / sqrt(2).
    """
    x = tensor([1e-3, 1e-3])
    got = rms_norm(x, ones(2), 1e-6)
    want = 0.5**0.5
    close(got, tensor([want, want]))


def the_weight_comes_last(rms_norm):
    """The weight multiplies what has been normalised, channel by channel."""
    x = tensor([2, 2, 2])
    weight = tensor(1, 10, -1)
    close(rms_norm(x, weight, 0.0), weight[None])


RMS_NORM = [
    the_mean_of_the_squares_is_one,
    no_mean_is_subtracted,
    each_row_has_its_own_size,
    eps_is_under_the_root,
    the_weight_comes_last,
]


# --------------------------------------------------------------------------------------------------
# rotary


def rows(*heads):
    """Vectors as x (1, T, 1, D)."""
    return tensor(*heads)[None, :, None]


def position_0_turns_nothing(rotary):
    """At position 0 nothing is turned."""
    x = normal(1, 1, 2, 8)
    got = rotary(x, torch.zeros(1, 1, dtype=torch.long), 10000.0)
    close(got, x)


def one_pair_turns_counter_clockwise(rotary):
    """With D = 2 position p turns by p radians, counter-clockwise: (1, 0) gives (cos p, sin p)."""
    x = rows([1, 0], [1, 0], [0, 1])
    got = rotary(x, torch.tensor([[1, 2, 1]]), 10000.0)
    c = math.cos(1)
    s = math.sin(1)
    want = rows([c, s], [math.cos(2), math.sin(2)], [-s, c])
    close(got, want)


def neighbours_are_a_pair(rotary):
    """Channels 2j and 2j + 1 are a pair (neighbours), not j and j + D/2 (halves)."""
    x = rows([1, 0, 0, 0])
    got = rotary(x, torch.tensor([[1]]), 10000.0)
    want = rows([math.cos(1), math.sin(1), 0, 0])
    close(got, want)


def later_pairs_turn_slower(rotary):
    """Pair j turns by theta^(-2j / D) radians a position: with D = 4 and theta = 100 the second
    pair by 0.1.
    """
    x = rows([0, 0, 1, 0])
    got = rotary(x, torch.tensor([[1]]), 100.0)
    want = rows([0, 0, math.cos(0.1), math.sin(0.1)])
    close(got, want)


def each_row_has_its_own_positions(rotary):
    """A token is turned by its entry in `positions`, not by its place in the tensor: rows may
    begin anywhere.
    """
    x = normal(2, 3, 1, 4)
    positions = torch.tensor([[0, 1, 2], [7, 8, 9]])
    alone = rotary(x[1:, 2:], torch.tensor([[9]]), 10000.0)
    got = rotary(x, positions, 10000.0)[1:, 2:]
    close(got, alone)


def only_the_distance_counts(rotary):
    """The product of a query at position m and a key at position n depends on m - n only."""
    x = normal(2, 2, 1, 8)
    early = torch.tensor([[3, 1], [3, 1]])
    near = rotary(x, early, 100.0)
    far = rotary(x, early + 37, 100.0)
    got = (near[:, 0] * near[:, 1]).sum(-1)
    want = (far[:, 0] * far[:, 1]).sum(-1)
    close(got, want, tol=1e-4)


ROTARY = [
    position_0_turns_nothing,
    one_pair_turns_counter_clockwise,
    neighbours_are_a_pair,
    later_pairs_turn_slower,
    each_row_has_its_own_positions,
    only_the_distance_counts,
]


# --------------------------------------------------------------------------------------------------
# attention. Where all queries are 0 all scores are equal, and the output is a plain mean


def means_of_what_is_seen(attention, T, S, window=None):
    """The outputs (T,) of equal scores and values 1, 2, .. S."""
    q = zeros(1, 1, T, 2)
    k = normal(1, 1, S, 2)
    v = ones(1, 1, S, 2).cumsum(2)
    got = attention(q, k, v, window=window)
    close(got[..., 0], got[..., 1])
    return got[0, 0, :, 0]


def a_token_sees_itself_and_the_past(attention):
    """A query sees its own position and those before it, nothing later: with equal scores the
    output is the mean of the values so far.
    """
    want = tensor(1, 1.5, 2, 2.5)
    close(means_of_what_is_seen(attention, 4, 4), want)


def the_queries_are_the_last_positions(attention):
    """With fewer queries than keys (T < S) the queries are the last T positions: the very last one
    sees everything.
    """
    got = means_of_what_is_seen(attention, 1, 4)
    close(got, tensor(2.5))
    got = means_of_what_is_seen(attention, 2, 4)
    close(got, tensor(2, 2.5))


def a_window_includes_the_token_itself(attention):
    """A window of w shows the last w positions, the query's own included: a window of 1 the token
    alone, a window of 2 one neighbour more.
    """
    got = means_of_what_is_seen(attention, 4, 4, window=1)
    want = tensor(1, 2, 3, 4)
    close(got, want)
    got = means_of_what_is_seen(attention, 4, 4, window=2)
    want = tensor(1, 1.5, 2.5, 3.5)
    close(got, want)


def scores_are_divided_by_the_root_of_D(attention):
    """Scores are divided by sqrt(D), D the channels of a head: with D = 4 by 2."""
    q = tensor([0, 0, 0, 0], [2, 0, 0, 0])[None, None]
    k = tensor([0, 0, 0, 0], [1, 0, 0, 0])[None, None]
    v = tensor([0, 0, 0, 0], [1, 1, 1, 1])[None, None]
    p = math.e / (1 + math.e)  # the scores are 0 and 2 * 1 / sqrt(4) = 1
    got = attention(q, k, v)[0, 0, 1]
    want = tensor(p, p, p, p)
    close(got, want)


def query_heads_share_key_heads_in_groups(attention):
    """Of 4 query heads and 2 key heads the first two queries use key head 0, the last two key head
    1: heads are repeated one by one (0 0 1 1), not as a whole (0 1 0 1).
    """
    q = normal(1, 4, 1, 2)
    k = normal(1, 2, 1, 2)
    v = tensor([[5, 5]], [[7, 7]])[None]
    got = attention(q, k, v)[0, :, 0, 0]
    want = tensor(5, 5, 7, 7)
    close(got, want)


def scores_may_be_large(attention):
    """Scores in the thousands give numbers, not nan: the largest is subtracted before exp."""
    q = 10_000 * tensor([1, 0], [1, 0])[None, None]
    k = tensor([1, 0], [-1, 0])[None, None]
    v = tensor([3, 4], [5, 6])[None, None]
    got = attention(q, k, v)
    want = tensor([3, 4], [3, 4])[None, None]
    close(got, want)


ATTENTION = [
    a_token_sees_itself_and_the_past,
    the_queries_are_the_last_positions,
    a_window_includes_the_token_itself,
    scores_are_divided_by_the_root_of_D,
    query_heads_share_key_heads_in_groups,
    scores_may_be_large,
]
