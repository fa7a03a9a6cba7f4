"""set5.py: what has to hold of the divergences between student p and teacher q."""

import math

import torch

from assignment.checks import close, gradient, normal, parts, say, tensor

V = 5
LOGITS = normal(2, 3, V)  # of the student
LQ = normal(2, 3, V, seed=1).log_softmax(-1)


def pair(p, q):
    """Log-probabilities (1, 1, V) of student and teacher."""
    return tensor([p]).log(), tensor([q]).log()


def slope(divergence, logits, *more):
    """The gradient with respect to the student's logits."""
    logits = logits.clone().requires_grad_()
    return gradient(divergence(logits.log_softmax(-1), *more), logits)


def slope_of_reverse_kl(logits, lq):
    """In closed form: p (log p - log q - KL)."""
    lp = logits.log_softmax(-1)
    kl = (lp.exp() * (lp - lq)).sum(-1, keepdim=True)
    return lp.exp() * (lp - lq - kl)


# --------------------------------------------------------------------------------------------------
# reverse_kl


def equals_have_no_divergence(divergence):
    """Where student and teacher agree it is 0."""
    close(divergence(LQ, LQ), torch.zeros(2, 3))


def the_students_probabilities_weigh(reverse_kl):
    """The reverse KL is weighed by the STUDENT's probabilities, p log(p / q), and summed (not
    averaged) over the vocabulary: of (1/2, 1/2) and (1/4, 3/4) it is log(4/3) / 2.
    """
    got = reverse_kl(*pair([1 / 2, 1 / 2], [1 / 4, 3 / 4]))
    want = tensor([math.log(4 / 3) / 2])
    close(got, want)


def positions_do_not_mix(reverse_kl):
    """Every position of every row has a divergence of its own: (B, T, V) -> (B, T)."""
    lp = LOGITS.log_softmax(-1)
    alone = reverse_kl(lp[1:, 2:], LQ[1:, 2:])
    close(reverse_kl(lp, LQ)[1:, 2:], alone)


def the_weights_move_too(reverse_kl):
    """The gradient with respect to the student's logits is p (log p - log q - KL): the p in front
    moves, too, and must not be detached.
    """
    close(slope(reverse_kl, LOGITS, LQ), slope_of_reverse_kl(LOGITS, LQ))


REVERSE_KL = [
    equals_have_no_divergence,
    the_students_probabilities_weigh,
    positions_do_not_mix,
    the_weights_move_too,
]


# --------------------------------------------------------------------------------------------------
# jsd


def it_is_log_2_at_most(jsd):
    """Where student and teacher have nothing in common it is log 2, its largest value: each is
    twice as likely under itself as under the mean of the two PROBABILITIES (not of their logs).
    """
    sure = pair([1 - 1e-12, 1e-12], [1e-12, 1 - 1e-12])
    want = tensor([math.log(2)])
    close(jsd(*sure), want)


def both_halves_count(jsd):
    """It is half of KL(p || m) plus half of KL(q || m): of (1/2, 1/2) and (1, 0) the mean m is
    (3/4, 1/4).
    """
    got = jsd(*pair([1 / 2, 1 / 2], [1 - 1e-12, 1e-12]))
    to_p = math.log(2 / 3) / 2 + math.log(2) / 2
    want = tensor([to_p / 2 + math.log(4 / 3) / 2])
    close(got, want)


def it_is_symmetric(jsd):
    """Exchanging student and teacher changes nothing."""
    lp = LOGITS.log_softmax(-1)
    close(jsd(lp, LQ), jsd(LQ, lp))


def the_gradient_is_the_definitions(jsd):
    """The gradient with respect to the student's logits is that of the definition, with nothing
    detached: checked by moving each logit a little.
    """
    got = slope(jsd, LOGITS, LQ)
    h = 1e-5
    for v in range(V):
        moved = h * torch.eye(V, dtype=torch.float64)[v]
        up, down = (jsd((LOGITS + s * moved).log_softmax(-1), LQ).detach() for s in (1, -1))
        want = (up - down) / (2 * h)
        close(got[..., v], want, f"the gradient of logit {v}")


JSD = [
    equals_have_no_divergence,
    it_is_log_2_at_most,
    both_halves_count,
    it_is_symmetric,
    the_gradient_is_the_definitions,
]


# --------------------------------------------------------------------------------------------------
# sampled_reverse_kl


def its_mean_gradient_is_the_reverse_kls(function):
    """Over all tokens that the student may draw, each with its probability, the gradient adds up to
    that of KL(p || q): it lowers the KL. (logp - logq alone has a mean gradient of 0.)
    """
    p = LOGITS.softmax(-1)
    some = function(p.log(), LQ, torch.zeros(2, 3, dtype=torch.long))
    assert some.shape == (2, 3), f"it gives back shape {tuple(some.shape)}, not (B, T)"
    total = torch.zeros_like(LOGITS)
    for token in range(V):
        y = torch.full((2, 3), token)
        total += p[..., token, None] * slope(function, LOGITS, LQ, y)
    close(total, slope_of_reverse_kl(LOGITS, LQ), "the mean gradient")


def a_token_speaks_for_itself(function):
    """The loss looks at the token y of each position, and at no other: the gradient of one sample
    is (log p(y) - log q(y)) times the gradient of log p(y), which is onehot(y) - p.
    """
    y = torch.tensor([[0, 1, 2], [3, 4, 0]])
    lp = LOGITS.log_softmax(-1)
    onehot = torch.nn.functional.one_hot(y, V)
    log_ratio = (lp - LQ).gather(2, y[..., None])
    want = log_ratio * (onehot - lp.exp())
    close(slope(function, LOGITS, LQ, y), want, "the gradient")


def agreement_is_silent(function):
    """Where student and teacher give the drawn token the same probability, the gradient of that
    very sample is exactly 0, not only its mean.
    """
    y = torch.tensor([[0, 1, 2], [3, 4, 0]])
    close(slope(function, LQ, LQ, y), torch.zeros_like(LQ), "the gradient")


SAMPLED_REVERSE_KL = [
    its_mean_gradient_is_the_reverse_kls,
    agreement_is_silent,
    a_token_speaks_for_itself,
]


# --------------------------------------------------------------------------------------------------
# trust_region

STUDENT = normal(3, V, seed=2).log_softmax(-1)
TEACHER = (4 * normal(3, V, seed=3)).log_softmax(-1)
EPS = 0.1


def from_the_student(m, lp):
    """KL(m || p) of each row."""
    return (m.exp() * (m - lp)).sum(-1)


def it_is_a_distribution(trust_region):
    """The probabilities of the mixture add up to 1: p^(1-b) q^b has to be divided by its sum."""
    m, b = parts(trust_region(STUDENT, TEACHER, EPS), 2)
    close(b.new_tensor(b.shape), tensor(3), "the shape of b")
    got = m.exp().sum(-1)
    want = tensor(1, 1, 1)
    close(got, want, "the sums")


def without_a_budget_the_student(trust_region):
    """With eps = 0 the mixture is the student: b = 0. If b is 1 here, the divergence was measured
    to the teacher, or p and q are exchanged.
    """
    m, b = parts(trust_region(STUDENT, TEACHER, 0.0), 2)
    close(b, tensor(0, 0, 0), "b", tol=1e-4)
    close(m, STUDENT, "the mixture", tol=1e-3)


def with_a_large_budget_the_teacher(trust_region):
    """Where the teacher itself is within the budget the mixture is the teacher: b = 1, exactly."""
    m, b = parts(trust_region(STUDENT, TEACHER, 100.0), 2)
    assert (b == 1).all(), f"b is {b.tolist()}"
    close(m, TEACHER, "the mixture")


def the_mixture_is_geometric(trust_region):
    """It mixes log-probabilities, (1 - b) log p + b log q up to a constant, with the b that is
    given back; it is not the mean (1 - b) p + b q.
    """
    m, b = parts(trust_region(STUDENT, TEACHER, EPS), 2)
    rest = m - (1 - b)[:, None] * STUDENT - b[:, None] * TEACHER
    got = rest - rest.mean(-1, keepdim=True)
    want = torch.zeros(3, V)
    close(got, want, "what is left", tol=1e-4)


def the_budget_is_spent(trust_region):
    """b is the largest that the budget allows, in each row on its own: KL(m || p), from the mixture
    to the student, is eps, and not above it.
    """
    m, _ = parts(trust_region(STUDENT, TEACHER, EPS), 2)
    want = tensor(EPS, EPS, EPS)
    close(from_the_student(m, STUDENT), want, "KL(m || p)", tol=1e-4)


def a_row_within_the_budget_says_nothing_of_others(trust_region):
    """A batch may mix rows whose teacher is within the budget (b = 1, exactly) and rows whose
    teacher is beyond it; there b may be anywhere from 0 to 1, above 1/2 too.
    """
    lp = STUDENT[:2]
    lq = torch.stack((STUDENT[0], TEACHER[1]))
    whole = from_the_student(lq, lp)[1].item()
    for share in (0.3, 0.8):
        m, b = parts(trust_region(lp, lq, share * whole), 2)
        assert b[0] == 1, f"b is {say(b)}, and the first row's teacher is the student"
        want = tensor(0, share * whole)
        close(from_the_student(m, lp), want, f"KL(m || p), b is {say(b)}", tol=1e-3)


TRUST_REGION = [
    it_is_a_distribution,
    without_a_budget_the_student,
    with_a_large_budget_the_teacher,
    the_mixture_is_geometric,
    the_budget_is_spent,
    a_row_within_the_budget_says_nothing_of_others,
]
