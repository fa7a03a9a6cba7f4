"""set6.py: what has to hold of the functions of exploration, coverage and test-time training."""

import math

import torch

from assignment.checks import close, gradient, normal, ones, parts, tensor, zeros

# --------------------------------------------------------------------------------------------------
# budget_rule


def picks(budget_rule, success, kappa, want):
    got = budget_rule(success, kappa)
    assert got == want, f"of {success} with kappa {kappa:g} it takes {got}, not {want}"


def the_smallest_budget_on_the_plateau(budget_rule):
    """It takes the smallest budget whose double does not multiply the success by more than kappa:
    that budget, not its double, and not the last one.
    """
    success = {16: 0.2, 32: 0.4, 64: 0.44, 128: 0.45}
    picks(budget_rule, success, 1.2, 32)


def budgets_come_in_any_order(budget_rule):
    """The budgets of a dict may stand in any order: it is their size that counts."""
    success = {128: 0.45, 64: 0.44, 32: 0.4, 16: 0.2}
    picks(budget_rule, success, 1.2, 32)


def the_border_belongs_to_the_plateau(budget_rule):
    """J(2B) = kappa J(B) is still a plateau: at most kappa times, not less than that."""
    success = {16: 0.25, 32: 0.5, 64: 0.75}
    picks(budget_rule, success, 2.0, 16)


def it_compares_with_the_double(budget_rule):
    """It compares with the double of a budget, not with whichever comes next, and passes over
    budgets whose double was not measured.
    """
    success = {16: 0.2, 24: 0.21, 32: 0.4, 64: 0.41}
    picks(budget_rule, success, 1.2, 32)


def no_success_is_no_plateau(budget_rule):
    """Where the doubled budget has success 0 nothing was seen, no plateau either."""
    success = {16: 0.0, 32: 0.0, 64: 0.3, 128: 0.31}
    picks(budget_rule, success, 1.2, 64)


def without_a_plateau_the_largest(budget_rule):
    """If the success keeps growing, it is the largest budget whose double was measured."""
    success = {16: 0.1, 32: 0.2, 64: 0.4}
    picks(budget_rule, success, 1.5, 32)


BUDGET_RULE = [
    the_smallest_budget_on_the_plateau,
    budgets_come_in_any_order,
    the_border_belongs_to_the_plateau,
    it_compares_with_the_double,
    no_success_is_no_plateau,
    without_a_plateau_the_largest,
]


# --------------------------------------------------------------------------------------------------
# coverage_profile


def it_counts_what_is_missed(coverage_profile):
    """It is the share of answers that are MISSED, whose ratio is N or more: lower is better, and it
    falls as N grows.
    """
    got = coverage_profile(tensor(-100, 100, 100, 200), [2, 4])
    close(got, tensor(0.75, 0.75))


def ratios_come_as_logarithms(coverage_profile):
    """log_ratio is a natural logarithm: it is compared with log N, not with N. A log ratio of 2 is
    a ratio of 7.4.
    """
    got = coverage_profile(tensor(2, 2), [7, 8])
    close(got, tensor(1, 0))
    ratios = tensor(1.5, 3, 5, 9)
    got = coverage_profile(ratios.log(), [2, 4, 8, 16])
    want = tensor(0.75, 0.5, 0.25, 0)
    close(got, want)


def a_ratio_of_n_is_missed(coverage_profile):
    """A ratio of exactly N counts: at least N, not above N."""
    got = coverage_profile(tensor(0, -1), [1])
    close(got, tensor(0.5))


def broken_answers_are_missed(coverage_profile):
    """An answer of probability 0 (inf) is missed at every N, and so is one whose log-probability is
    no number (nan): both stay in the count of answers.
    """
    got = coverage_profile(tensor(math.inf, math.nan, 0, 0), [2, 1000])
    close(got, tensor(0.5, 0.5))


COVERAGE_PROFILE = [
    it_counts_what_is_missed,
    ratios_come_as_logarithms,
    a_ratio_of_n_is_missed,
    broken_answers_are_missed,
]


# --------------------------------------------------------------------------------------------------
# tournament


def a_checkpoint_is_beaten_where_a_rival_is_far_likelier(tournament):
    """A checkpoint loses an answer where the RIVAL gives it n times its probability or more (p_j /
    p_i, not p_i / p_j): lower scores are better.
    """
    got = tournament(tensor([0, 0, 0, 0], [100, 0, 0, 0]), 3)
    close(got, tensor(0.25, 0))


def the_worst_rival_counts(tournament):
    """The score is that of the worst rival: the largest share, not the mean over rivals."""
    got = tournament(tensor([0, 0], [100, -100]), 3)
    close(got, tensor(0.5, 0.5))


def rivals_are_met_one_at_a_time(tournament):
    """Each rival's share is counted on its own: two rivals that each beat a checkpoint at another
    answer are not one that beats it at both.
    """
    got = tournament(tensor([0.1, 0.1], [0.8, 0.1], [0.1, 0.8]).log(), 4)
    want = tensor(0.5, 0.5, 0.5)
    close(got, want)


def ratios_are_compared_with_n(tournament):
    """Log-probabilities are subtracted and compared with log n; a ratio of n counts."""
    logp = tensor([0, 0], [2, 0])
    got = tournament(logp, 7)
    close(got, tensor(0.5, 0))
    got = tournament(logp, 8)
    close(got, tensor(0, 0))
    got = tournament(0 * logp, 1)
    close(got, tensor(1, 1))


TOURNAMENT = [
    the_worst_rival_counts,
    a_checkpoint_is_beaten_where_a_rival_is_far_likelier,
    ratios_are_compared_with_n,
    rivals_are_met_one_at_a_time,
]


# --------------------------------------------------------------------------------------------------
# inner_update: two documents, a matrix (1, 2) and a matrix (2, 1) each


def step(inner_update, first, second, eta=0.5):
    """How far two documents' weights of 1 move, (2, 4), for gradients (2, 2) of both tensors."""
    fast = ones(2, 1, 2), ones(2, 2, 1)
    grads = first[:, None], second[:, :, None]
    new = parts(inner_update(fast, grads, eta), 2)
    want = tensor(2, 1, 2)
    close(tensor(*new[0].shape), want, "the shape of the first tensor")
    return torch.cat([x.flatten(1) for x in new], 1) - 1


def a_short_gradient_is_a_plain_step(inner_update):
    """A gradient shorter than 1 is taken as it is: W - eta g, downhill, and never made longer."""
    first = tensor([0.1, 0.2], [0.3, 0])
    second = tensor([0.4, 0], [0, 0])
    moved = step(inner_update, first, second)
    want = tensor([-0.05, -0.1, -0.2, 0], [-0.15, 0, 0, 0])
    close(moved, want)


def a_long_gradient_is_cut_to_length_1(inner_update):
    """A gradient longer than 1 is divided by its length: the step is as long as eta. With a
    gradient of 0 the weights stay.
    """
    first = tensor([3, 4], [0, 0])
    second = tensor([0, 0], [0, 0])
    moved = step(inner_update, first, second)
    want = tensor([-0.3, -0.4, 0, 0], [0, 0, 0, 0])
    close(moved, want)


def both_tensors_have_one_length(inner_update):
    """The length is that of a document's gradient over all of its tensors together, so that the
    direction of the step stays that of the gradient.
    """
    first = tensor([3, 0], [3, 0])
    second = tensor([0.4, 0], [0.4, 0])
    moved = step(inner_update, first, second)
    got = moved[0] / moved[0, 0]
    want = tensor(1, 0, 0.4 / 3, 0)
    close(got, want, "the direction")
    close(moved.norm(dim=1), tensor(0.5, 0.5), "the length")


def documents_do_not_share_a_length(inner_update):
    """Every document is cut by its own length: one with a long gradient does not shorten another's
    step.
    """
    first = tensor([30, 0], [0.1, 0])
    second = tensor([40, 0], [0.2, 0])
    moved = step(inner_update, first, second)
    want = tensor([-0.3, 0, -0.4, 0], [-0.05, 0, -0.1, 0])
    close(moved, want)


def training_goes_through_the_step(inner_update):
    """The new weights hang on the old ones and on the gradients, with nothing detached, the length
    included: gradients of gradients go through the step. Nor is it nan at 0, where a root has no
    derivative: clip before you take it.
    """
    fast = normal(1, 2, 2).requires_grad_()
    short = (0.1 * normal(1, 2, 2)).requires_grad_()
    (new,) = parts(inner_update((fast,), (short,), 0.5), 1)
    want = ones(1, 2, 2)
    close(gradient(new, fast), want, "with respect to the old weights")
    (new,) = inner_update((fast,), (short,), 0.5)
    close(gradient(new, short), -0.5 * want, "with respect to the gradients")
    none = zeros(1, 2, 2).requires_grad_()
    (new,) = inner_update((fast,), (none,), 0.5)
    close(gradient(new, none), -0.5 * want, "with respect to gradients of 0")
    long = tensor([[3, 4]]).requires_grad_()
    (new,) = inner_update((zeros(1, 1, 2),), (long,), 0.5)
    # of -g / (2 |g|): -1 / (2 |g|) + g (3 + 4) / (2 |g|^3)
    want = tensor([[-0.016, 0.012]])
    close(gradient(new, long), want, "with respect to a gradient longer than 1")


def tensors_may_have_any_number_of_dimensions(inner_update):
    """A tensor may have any number of dimensions after the first: (B,) and (B, C) as well as
    (B, C, D). The length is over all of them.
    """
    shapes = (2,), (2, 3), (2, 1, 2), (2, 1, 1, 2)
    fast = tuple(zeros(*shape) for shape in shapes)
    grads = tuple(ones(*shape) for shape in shapes)
    # a document has 1 + 3 + 2 + 2 = 8 gradients of 1
    for new, g in zip(parts(inner_update(fast, grads, 0.5), 4), grads, strict=True):
        close(new, -0.5 * g / 8**0.5, f"shape {tuple(g.shape)}")


INNER_UPDATE = [
    a_short_gradient_is_a_plain_step,
    a_long_gradient_is_cut_to_length_1,
    both_tensors_have_one_length,
    documents_do_not_share_a_length,
    training_goes_through_the_step,
    tensors_may_have_any_number_of_dimensions,
]
