"""set3.py: what has to hold of the losses of reinforcement learning."""

import math

import torch

from assignment.checks import close, gradient, normal, ones, say, tensor, zeros

# --------------------------------------------------------------------------------------------------
# advantages


def mean_is_the_distance_from_the_problems_mean(advantages):
    """`mean` subtracts the mean of the same problem's rewards (a row); other problems do not
    matter.
    """
    rewards = tensor([1, 0, 0, 0], [1, 1, 1, 0])
    want = tensor([0.75, -0.25, -0.25, -0.25], [0.25, 0.25, 0.25, -0.75])
    close(advantages(rewards, "mean"), want)


def std_divides_by_the_problems_spread(advantages):
    """`std` divides by the standard deviation of the same problem's rewards, the one with G - 1:
    rewards 1 0 0 0 have .5, whatever the other problems have.
    """
    rewards = tensor([1, 0, 0, 0], [4, 0, 0, 0])
    got = advantages(rewards, "std")
    want = tensor([1.5, -0.5, -0.5, -0.5])
    close(got, want.expand(2, 4))


def rloo_leaves_the_answer_out(advantages):
    """`rloo` subtracts the mean of the OTHER rewards, the answer's own left out: of 1 0 0 0 the
    first gets 1.
    """
    want = tensor([1, -1 / 3, -1 / 3, -1 / 3])
    got = advantages(tensor([1, 0, 0, 0]), "rloo")
    close(got, want)


def batch_has_one_mean_for_all(advantages):
    """`batch` subtracts one mean, of all rewards: a problem that is always right gets positive
    advantages.
    """
    got = advantages(tensor([1, 1], [0, 0]), "batch")
    want = tensor([0.5, 0.5], [-0.5, -0.5])
    close(got, want)


def equal_rewards_teach_nothing(advantages):
    """Equal rewards give exactly 0 in mean, std and rloo. The mean of three times .1 is not .1 to
    the last bit, and noise divided by a spread of 0 + 1e-6 is no advantage.
    """
    for dtype in (torch.float32, torch.float64):
        rewards = torch.full((2, 3), 0.1, dtype=dtype)
        rewards[1] = 0.7
        for kind in ("mean", "std", "rloo"):
            got = advantages(rewards, kind)
            assert (got == 0).all(), f"{kind}: rewards .1 .1 .1 give {got[0].tolist()}"


ADVANTAGES = [
    mean_is_the_distance_from_the_problems_mean,
    std_divides_by_the_problems_spread,
    rloo_leaves_the_answer_out,
    batch_has_one_mean_for_all,
    equal_rewards_teach_nothing,
]


# --------------------------------------------------------------------------------------------------
# policy_loss, where the clip is .8 .. 1.5

RATIOS = "none", "token", "sequence", "cispo"


def losses(policy_loss, ratio, rho, A, mask=None):
    """Loss and gradient of tokens with these ratios rho (a row's list) and one advantage, where the
    old log-probabilities are -1.
    """
    logp = (tensor(rho).log() - 1).requires_grad_()
    old = torch.full_like(logp, -1.0).detach()
    mask = torch.ones_like(old) if mask is None else torch.tensor([mask])
    loss = policy_loss(logp, old, tensor([A]), mask, ratio, 0.2, 0.5)
    assert isinstance(loss, torch.Tensor), f"it gives back {type(loss).__name__}, not a tensor"
    assert loss.shape == logp.shape, f"the loss has shape {tuple(loss.shape)}, not (R, T)"
    return loss[mask > 0], gradient(loss[mask > 0], logp)[mask > 0]


def none_is_reinforce(policy_loss):
    """`none` is -A logp: the gradient is -A at every token, whatever the old log-probabilities."""
    loss, slope = losses(policy_loss, "none", [2.0, 0.5], 3.0)
    close(slope, tensor(-3, -3), "the gradient")
    want = -3 * (tensor(2, 0.5).log() - 1)
    close(loss, want, "the loss")


def the_first_step_is_reinforce(policy_loss):
    """Where the policy is still what it was, rho = 1, the gradient of all four is -A, also where
    old_logp is logp itself: old_logp is a constant.
    """
    want = tensor(-2, -2)
    for ratio in RATIOS:
        got = losses(policy_loss, ratio, [1.0, 1.0], 2.0)[1]
        close(got, want, ratio)
        logp = tensor([-1, -1]).requires_grad_()
        loss = policy_loss(logp, logp, tensor([2]), ones(1, 2), ratio, 0.2, 0.5)
        close(gradient(loss, logp)[0], want, f"{ratio}: with logp as old_logp")


def rho_is_new_over_old(policy_loss):
    """rho is the new probability over the old one, exp(logp - old_logp): a token that has become
    1.2 times as likely counts 1.2.
    """
    loss, _ = losses(policy_loss, "token", [1.2, 0.9], 1.0)
    close(loss, tensor(-1.2, -0.9))


def the_clip_stops_what_went_far_enough(policy_loss):
    """The clip takes the gradient where A > 0 and rho > 1 + eps_high, or A < 0 and rho < 1 -
    eps_low: where the step has gone far enough. A mistake that has become likelier keeps its
    gradient, however large rho is, nor does a good answer that has become less likely lose its
    gradient (the minimum of rho A and clip(rho) A, not the maximum).
    """
    for A in (1.0, -1.0):
        _, slope = losses(policy_loss, "token", [0.5, 1.0, 2.0], A)
        want = tensor(-0.5, -1, 0) if A > 0 else tensor(0, 1, 2)
        half = "(half of it at rho = 1: the minimum of two equal numbers shares it)"
        close(slope, want, f"the gradient at rho = .5, 1, 2 with A = {A:g} {half}")
    _, slope = losses(policy_loss, "token", [1e6], -1.0)
    close(slope, tensor(1e6), "the gradient at rho = 1,000,000 with A = -1")


def eps_low_is_below_and_eps_high_above(policy_loss):
    """eps_low is how far down rho may go, eps_high how far up: with .2 and .5 the range is .8 to
    1.5.
    """
    got = losses(policy_loss, "token", [9.0], 1.0)[0]
    close(got, tensor(-1.5), "A = 1, rho = 9")
    got = losses(policy_loss, "token", [0.1], -1.0)[0]
    close(got, tensor(0.8), "A = -1, rho = .1")


def a_sequence_has_a_geometric_mean(policy_loss):
    """`sequence`: the value of the ratio is the geometric mean of rho over the answer's own tokens,
    exp(mean(log rho)). What stands where the mask is 0 does not count, not even as a length, and
    each row has a length of its own.
    """
    mask = [0.0, 1.0, 1.0, 0.0]
    loss, _ = losses(policy_loss, "sequence", [50.0, 1.44, 1.0, 50.0], 1.0, mask)
    close(loss, tensor(-1.2, -1.2))
    logp = tensor([1.2, 50], [1.44, 1]).log()
    mask = tensor([1, 0], [1, 1])
    two = policy_loss(logp, 0 * logp, tensor([1], [1]), mask, "sequence", 0.2, 0.5)
    close(two[mask > 0], tensor(-1.2, -1.2, -1.2), "two rows")


def a_sequence_gives_each_token_its_own_gradient(policy_loss):
    """`sequence`: the gradient is each token's own, -A s where nothing is clipped, not a share of
    it; and 0 for all where s is clipped.
    """
    logp = tensor([1.44, 1]).log().requires_grad_()
    zero = torch.zeros_like(logp).detach()
    loss = policy_loss(logp, zero, tensor([1]), zero + 1, "sequence", 0.2, 0.5)
    got = gradient(loss[:, :1], logp)
    want = tensor([-1.2, 0])
    close(got, want, "of the first token's loss at s = 1.2")
    _, slope = losses(policy_loss, "sequence", [4.0, 1.0], 1.0)
    close(slope, tensor(0, 0), "the gradient at s = 2")


def cispo_never_loses_a_gradient(policy_loss):
    """`cispo`: the clipped ratio is a weight without gradient, and logp keeps its own: the gradient
    is -clip(rho) A, and never 0.
    """
    _, slope = losses(policy_loss, "cispo", [0.5, 1.0, 2.0], 1.0)
    close(slope, tensor(-0.8, -1, -1.5), "the gradient at rho = .5, 1, 2")


def what_is_masked_may_be_anything(policy_loss):
    """Where the mask is 0 logp may be anything, -inf and nan too, and no answer's token feels it in
    its loss or gradient: it is left out, not multiplied by 0, for 0 times nan is nan.
    """
    mask = [False, True, True, False]
    numbers = [1.0, 1.44, 1.0, 1.0]
    junk = [math.nan, 1.44, 1.0, 0.0]
    for ratio in RATIOS:
        loss, slope = losses(policy_loss, ratio, junk, 1.0, mask)
        want_loss, want_slope = losses(policy_loss, ratio, numbers, 1.0, mask)
        close(loss, want_loss, f"{ratio}: the loss")
        close(slope, want_slope, f"{ratio}: the gradient")


def what_is_masked_has_a_gradient_of_0(policy_loss):
    """Where the mask is 0 the loss is finite and the gradient 0, whatever stands there, also in a
    row without any token. So mask what goes in, not only what comes out: a gradient of 0 that goes
    back through exp(nan) is nan.
    """
    junk = tensor(
        [math.nan, 0, -math.inf],
        [math.nan, 0, -math.inf],
    )
    mask = tensor(
        [0, 1, 0],
        [0, 0, 0],
    )
    for ratio in RATIOS:
        logp = junk.clone().requires_grad_()
        adv = tensor([1], [1])
        loss = policy_loss(logp, 0 * mask, adv, mask, ratio, 0.2, 0.5)
        told = f"{ratio}: the losses are {say(loss)}"
        assert loss.isfinite().all(), told
        slope = gradient(loss[mask > 0], logp)
        close(slope[mask == 0], zeros(5), f"{ratio}: the gradient where the mask is 0")


POLICY_LOSS = [
    none_is_reinforce,
    rho_is_new_over_old,
    the_clip_stops_what_went_far_enough,
    eps_low_is_below_and_eps_high_above,
    a_sequence_has_a_geometric_mean,
    a_sequence_gives_each_token_its_own_gradient,
    cispo_never_loses_a_gradient,
    what_is_masked_may_be_anything,
    what_is_masked_has_a_gradient_of_0,
    the_first_step_is_reinforce,
]


# --------------------------------------------------------------------------------------------------
# aggregation_weights: an answer of 4 tokens and one of 64, after a prompt

BUDGET = 64
MASK = torch.zeros(2, 70, dtype=torch.float64)
MASK[0, 2:6] = 1
MASK[1, 5:69] = 1


def each_token(aggregation_weights, kind):
    """The weights of a token of the short answer and of the long one."""
    got = aggregation_weights(MASK, kind, BUDGET)
    assert isinstance(got, torch.Tensor), f"it gives back {type(got).__name__}, not a tensor"
    assert got.shape == MASK.shape, f"it gives back shape {tuple(got.shape)}, not (R, T)"
    return torch.stack((got[0, 2], got[1, 5]))


def sequence_is_a_mean_of_means(aggregation_weights):
    """`sequence`: each answer counts 1 / R, shared by its own tokens: 1/8 for each of 4 tokens,
    1/128 for each of 64, in a batch of two.
    """
    want = tensor(1 / 8, 1 / 128)
    close(each_token(aggregation_weights, "sequence"), want)


def token_is_one_mean(aggregation_weights):
    """`token`: all tokens of the batch count the same, 1 / 68 with answers of 4 and 64. It is one
    mean, not a mean of means.
    """
    want = tensor(1 / 68, 1 / 68)
    close(each_token(aggregation_weights, "token"), want)


def constant_divides_by_the_budget(aggregation_weights):
    """`constant`: 1 / (R * budget) for every token, whatever the lengths; the budget is given, not
    measured.
    """
    want = tensor(1 / 128, 1 / 128)
    close(each_token(aggregation_weights, "constant"), want)
    got = aggregation_weights(tensor([0, 1, 1, 0]), "constant", 10)
    close(got, tensor([0, 0.1, 0.1, 0]))


def prompts_and_padding_count_0(aggregation_weights):
    """Where the mask is 0 the weight is 0: no prompt and no padding in a loss."""
    for kind in ("sequence", "token", "constant"):
        got = aggregation_weights(MASK, kind, BUDGET)[MASK == 0].abs().max()
        close(got, 0.0, kind)


def an_empty_answer_is_no_nan(aggregation_weights):
    """A row without any token gets zeros, not 0 / 0; it still counts as one of the R rows."""
    mask = tensor([0, 0], [1, 1])
    want = tensor([0, 0], [0.25, 0.25])
    close(aggregation_weights(mask, "sequence", 2), want, "sequence")
    close(aggregation_weights(0 * mask, "token", 2), 0 * mask, "token, no token at all")


AGGREGATION_WEIGHTS = [
    prompts_and_padding_count_0,
    sequence_is_a_mean_of_means,
    token_is_one_mean,
    constant_divides_by_the_budget,
    an_empty_answer_is_no_nan,
]


# --------------------------------------------------------------------------------------------------
# kl_estimate: two distributions over 50 tokens, whose KL is known

P = normal(50).softmax(0)
Q = normal(50, seed=1).softmax(0)
KL = (P * (P / Q).log()).sum()


def expected(kl_estimate, kind):
    """The mean of the estimate over a token that is drawn from P."""
    values = kl_estimate(P.log()[None], Q.log()[None], kind)
    close(values.new_tensor(values.shape), tensor(1, 50), "its shape")
    return (P * values[0]).sum()


def k1_has_the_kl_as_its_mean(kl_estimate):
    """k1 is logp - ref_logp: its mean over tokens of pi is KL(pi || ref), not minus that."""
    close(expected(kl_estimate, "k1"), KL, "its mean")


def k3_has_the_kl_as_its_mean(kl_estimate):
    """k3 has the KL as its mean, too, and is never negative. With its ratio upside down (pi / ref
    in place of ref / pi) the mean is something else.
    """
    close(expected(kl_estimate, "k3"), KL, "its mean")


def k2_is_half_a_square(kl_estimate):
    """k2 is half of the square of the log ratio."""
    got = kl_estimate(tensor([0, 0, 2]), tensor([0, 2, 0]), "k2")
    want = tensor([0, 2, 2])
    close(got, want)


def ratios_are_as_the_docstring_says(kl_estimate):
    """At log ratios of 1 and -1 k3 is exp(-1) and exp(1) - 2; where the two agree all are 0."""
    got = kl_estimate(tensor([1, -1]), tensor([0, 0]), "k3")
    want = tensor([math.exp(-1), math.e - 2])
    close(got, want)
    for kind in ("k1", "k2", "k3"):
        close(kl_estimate(tensor([-3]), tensor([-3]), kind), tensor([0]), kind)


KL_ESTIMATE = [
    k1_has_the_kl_as_its_mean,
    k2_is_half_a_square,
    k3_has_the_kl_as_its_mean,
    ratios_are_as_the_docstring_says,
]
