"""adapters.py: the functions of the course, to be written by you. assignment/README.md is the
handout; `python -m assignment.grade assignment/adapters.py` says how far you are.

Copy this file or fill it in where it is. Helpers and imports of your own are welcome; what a
function is called, takes and gives back has to stay. Tensors are torch's; the tests use float64
and small float32 ones, so take dtypes from what you are given (`torch.zeros_like`, `x.new_zeros`).
Unless a docstring says otherwise, leave your arguments as they are.

Shapes: B batch, T time, S positions that are seen, H query heads, K key heads, D channels of a
head, C channels, N tokens, V vocabulary, P problems, G answers to each, R rows.
"""

# --------------------------------------------------------------------------------------------------
# Set 1: the model


def bpe_merges(words, n_merges):
    """Byte-pair encoding: which pairs of tokens to join, learnt from a text.

    words: the text, cut into words: a list of byte strings, in which a word stands as often as it
    occurs. Every word begins as single bytes. Repeat: count all pairs of neighbours within a word
    (`aaa` has two), take the most frequent one, of equally frequent ones the greater pair (tuples
    of byte strings, as Python compares them), and join it in every word, from left to right.
    -> the joined tokens, a list of at most n_merges byte strings in their order; fewer if no pair
    is left.

    Source: Sennrich et al., arXiv 1508.07909, Algorithm 1.
    """
    raise NotImplementedError("bpe_merges")


def rms_norm(x, weight, eps):
    """x (..., C), weight (C,) -> (..., C).

        y = weight * x / sqrt(mean(x^2) + eps)          the mean is over the C channels of a row

    Source: Zhang and Sennrich, arXiv 1910.07467, equation 4.
    """
    raise NotImplementedError("rms_norm")


def rotary(x, positions, theta):
    """Rotary positions: x (B, T, H, D), positions (B, T) int64 -> (B, T, H, D).

    Channels 2j and 2j + 1 (neighbours, not halves) are the two coordinates of a point in the plane.
    At position p it is turned by the angle a = p * theta^(-2j / D), counter-clockwise:

        (u, w) -> (u cos a - w sin a,  u sin a + w cos a)

    Source: Su et al., arXiv 2104.09864, equation 34.
    """
    raise NotImplementedError("rotary")


def attention(q, k, v, window=None):
    """Causal attention with grouped heads: q (B, H, T, D), k and v (B, K, S, D) -> (B, H, T, D).

        softmax(q k^T / sqrt(D)) v                      over the keys that the query sees

    The T queries are the LAST T of the S positions. A query sees its own position and those before
    it; with a window, only the last `window` of these, its own included. Query heads share key
    heads in groups: heads 0 .. H/K - 1 use key head 0, the next H/K use key head 1, and so on.

    Sources: Vaswani et al., arXiv 1706.03762; Ainslie et al., arXiv 2305.13245 (grouped heads).
    """
    raise NotImplementedError("attention")


# --------------------------------------------------------------------------------------------------
# Set 2: sampling


def cache_step(keys, values, lens, q, k, v):
    """One new token for each row of a KV cache whose rows have different lengths (one head).

    keys, values (R, S, D): of row r the first lens[r] < S slots hold its tokens, in the others
    stands anything, inf and nan too. lens (R,) int64. q, k, v (R, D): of the new token. Write the
    row's k and v into its own next slot, IN PLACE: in the tensors that you were given. Then let its
    q see all tokens of its row, the new one included:

        out[r] = softmax(q[r] keys[r]^T / sqrt(D)) values[r]

    -> out (R, D), the new lens (R,) int64: a new tensor; lens stays.

    Source: point 1 of the docstring of engine.py; Pope et al., arXiv 2211.05102.
    """
    raise NotImplementedError("cache_step")


def inverse_cdf(probs, u):
    """Draw a token by inversion: probs (R, V), u (R,) in [0, 1) -> token (R,) int64.

    Token i owns the interval [p_0 + .. + p_(i-1), p_0 + .. + p_i): row r's token is the one in
    whose interval u[r] lies. A token of probability 0 owns nothing. If rounding leaves the sum of
    a row a little below 1 and u beyond it, the token is the last one that has a probability.

    Source: Devroye, Non-Uniform Random Variate Generation, 1986, chapter III.2.
    """
    raise NotImplementedError("inverse_cdf")


def truncate(logits, top_k=None, top_p=None):
    """logits (R, V) -> (R, V), with -inf for the tokens that must not be drawn.

    top_k: keep the k largest of a row, and what equals the smallest of them; more than V keeps all.
    top_p: sort a row by probability; keep the smallest number of likeliest tokens (of equally
    likely ones any) whose probabilities add up to top_p or more (the token that crosses the line is
    kept), at least one: top_p = 0 keeps one.
    With both, top_k comes first, and top_p is a share of what it has left. What is kept keeps its
    logit.

    Source: Fan et al., arXiv 1805.04833 (top-k); Holtzman et al., arXiv 1904.09751 (top-p).
    """
    raise NotImplementedError("truncate")


def stratified_uniforms(prompts, group, generator):
    """Numbers that drive the answers to a prompt, spread out -> (prompts, group) float64 in [0, 1).

    Of a row's `group` numbers one lies in each interval [i / group, (i + 1) / group), at a random
    place in it, and they stand in random order, so that each on its own is uniform on [0, 1). All
    randomness is of the torch.Generator `generator`, fresh for every row. The generator moves on: a
    second call gives other numbers.

    Source: Owen, Monte Carlo theory, methods and examples, chapter 8; Li et al., arXiv 2607.01179.
    """
    raise NotImplementedError("stratified_uniforms")


def lattice_uniforms(prompts, group, generator):
    """Numbers that drive the answers to a prompt, each uniform on [0, 1) on its own as above, made
    of one random number per prompt -> (prompts, group) float64 in [0, 1).

        u_i = (i / group + shift) mod 1         shift uniform on [0, 1), another one for every row

    All randomness is of the torch.Generator `generator`, which moves on: a second call gives other
    numbers.

    Source: Cranley and Patterson 1976; Li et al., arXiv 2607.01179.
    """
    raise NotImplementedError("lattice_uniforms")


def pass_at_k(n, correct, k):
    """The chance that k answers, drawn without replacement from n, hold a right one.

    correct (P,) int64: how many of the n answers to each problem are right -> (P,) float64,

        1 - C(n - c, k) / C(n, k)

    ValueError unless 1 <= k <= n. n may be ten thousand.

    Source: Chen et al., arXiv 2107.03374, equation 1.
    """
    raise NotImplementedError("pass_at_k")


# --------------------------------------------------------------------------------------------------
# Set 3: reinforcement learning


def advantages(rewards, kind):
    """How much better an answer is than its baseline: rewards (P, G) -> (P, G). kind is one of

        mean    r_i - mean of the problem's rewards
        std     the same, divided by (their standard deviation, with G - 1, plus 1e-6)
        rloo    r_i - mean of the problem's OTHER rewards
        batch   r_i - mean of all rewards

    Except for batch, a problem whose rewards are all equal gets exactly 0, not rounding noise.

    Sources: Shao et al., arXiv 2402.03300 (std); Liu et al., arXiv 2503.20783 (mean); Ahmadian et
    al., arXiv 2402.14740 (rloo); Williams 1992 (batch).
    """
    raise NotImplementedError("advantages")


def policy_loss(logp, old_logp, adv, mask, ratio, eps_low, eps_high):
    """What is minimised, for each token: logp, old_logp, mask (R, T), adv (R, 1) -> (R, T).

    mask (0 or 1, of any dtype) is 1 on the tokens of the answer; a row may have none. What stands
    at the others, -inf and nan too, must not matter: their loss may be any finite number, the
    gradient with respect to their logp is 0. old_logp is a constant, even where it is logp itself.
    With rho = exp(logp - old_logp) and clip(x) = x cut to 1 - eps_low .. 1 + eps_high:

        none        -A logp
        token       -min(rho A, clip(rho) A)      no part of it detached, rho bounded by clip alone
        sequence    -min(..) as for token, with the row's geometric mean of rho over its tokens, s,
                    as the value of the ratio, while its gradient is each token's own:
                    s * exp(logp - sg(logp)), where s and sg(..) carry no gradient (GSPO-token)
        cispo       -sg(clip(rho)) A logp: the weight is clipped, the gradient never lost

    Sources: Schulman et al., arXiv 1707.06347, equation 7 (token); Zheng et al., arXiv 2507.18071,
    section 4.3 (sequence); MiniMax-M1, arXiv 2506.13585, section 3 (cispo).
    """
    raise NotImplementedError("policy_loss")


def aggregation_weights(mask, kind, budget):
    """What each token's loss counts in a batch: mask (R, T) -> (R, T), 0 where the mask is 0. kind
    is one of

        sequence    1 / (R * tokens of its row)         mean over rows of the mean over tokens
        token       1 / tokens of all rows              mean over tokens
        constant    1 / (R * budget)                    budget: tokens that an answer may have

    A row without any token gets zeros.

    Source: Liu et al., arXiv 2503.20783; Yu et al., arXiv 2503.14476.
    """
    raise NotImplementedError("aggregation_weights")


def kl_estimate(logp, ref_logp, kind):
    """KL(pi || ref) of each token, estimated from a token that pi has drawn: logp, ref_logp (R, T)
    -> (R, T). With d = logp - ref_logp, kind is one of

        k1 = d          k2 = d^2 / 2          k3 = exp(-d) - 1 + d

    Source: Schulman, Approximating KL divergence, 2020, http://joschu.net/blog/kl-approx.html.
    """
    raise NotImplementedError("kl_estimate")


# --------------------------------------------------------------------------------------------------
# Set 4: kernels


def token_logprobs(hidden, weight, targets, temperature, block):
    """Log-probabilities and entropies without the logits of a whole vocabulary.

    hidden (N, C), weight (V, C), targets (N,) int64 -> logp, entropy, lse (N,) each. Of the logits
    z = hidden weight^T / temperature (N, V):

        lse = log sum_v exp(z_v)     logp = z[target] - lse     entropy = - sum_v p_v log p_v

    Walk over the vocabulary, `block` columns at a time (the last block may be narrower), and keep
    of each row a running maximum and sums relative to it. No tensor may have more than N * block
    numbers, the arguments aside.

    Source: Milakov and Gimelshein, arXiv 1805.02867, Algorithm 3.
    """
    raise NotImplementedError("token_logprobs")


def token_logprobs_backward(
    hidden, weight, targets, lse, entropy, g_logp, g_entropy, temperature, block
):
    """The gradient of sum_n g_logp[n] logp[n] + g_entropy[n] entropy[n], in blocks as above.

    g_logp, g_entropy (N,); hidden, weight, targets, temperature and block as token_logprobs takes
    them, lse and entropy as it gives them back -> the gradients with respect to hidden (N, C) and
    weight (V, C). With p = exp(z - lse), computed anew in each block:

        d logp / dz = onehot(target) - p            d entropy / dz = -p * (log p + entropy)

    No autograd here. Tensors are of size (N, C), (block, C) and (N, block) only, and one is (V, C):
    the gradient with respect to weight.

    Source: Wijmans et al., arXiv 2411.09009, section 4.
    """
    raise NotImplementedError("token_logprobs_backward")


def flash_attention(q, k, v, tile):
    """Causal attention of one head that never holds a row of scores: q, k, v (T, D) -> o (T, D),
    lse (T,).

        o = softmax(q k^T / sqrt(D)) v          lse = log of the softmax's denominator

    `tile` queries at a time meet `tile` keys at a time (the last tiles may be smaller). A tile of
    queries keeps a running maximum, sum and output; when the maximum grows, the two others are
    scaled down. The output is divided by the sum once, at the end. Scores exist only in tiles of at
    most tile x tile; no tensor has more numbers than the larger of T * D and tile * tile.

    Source: Dao, arXiv 2307.08691, Algorithm 1.
    """
    raise NotImplementedError("flash_attention")


# --------------------------------------------------------------------------------------------------
# Set 5: distillation. lp, lq: log-probabilities of student and teacher


def reverse_kl(lp, lq):
    """KL(p || q) = sum_v p_v (log p_v - log q_v): lp, lq (B, T, V) -> (B, T), in nats.

    Differentiable in lp.

    Source: Agarwal et al., arXiv 2306.13649, section 2.
    """
    raise NotImplementedError("reverse_kl")


def jsd(lp, lq):
    """The Jensen-Shannon divergence: lp, lq (B, T, V) -> (B, T), in nats.

        KL(p || m) / 2 + KL(q || m) / 2         m = (p + q) / 2, the mean of the probabilities

    Differentiable in lp.

    Source: Agarwal et al., arXiv 2306.13649, section 2, with beta = 1/2.
    """
    raise NotImplementedError("jsd")


def sampled_reverse_kl(lp, lq, y):
    """A loss of the tokens y (B, T) that the student has drawn: lp, lq (B, T, V) -> (B, T).

    Its value is of no interest. Its gradient with respect to lp, on average over y drawn from p,
    is that of KL(p || q); and where log p(y) = log q(y) it is 0 for that very sample. Look at
    log p and log q at y only: nothing of size V may be computed but by lookup.

    Source: Lu and Thinking Machines Lab, On-policy distillation, 2025; Williams 1992.
    """
    raise NotImplementedError("sampled_reverse_kl")


def trust_region(lp, lq, eps):
    """As much of the teacher as a budget allows: lp, lq (B, V), eps >= 0 -> log-probabilities of
    the mixture (B, V), b (B,).

        m = p^(1-b) q^b / Z         the largest b in [0, 1] for which KL(m || p) <= eps

    Each row has its own b. The KL grows with b: halve an interval 20 times, and take its lower end,
    whose KL is within the budget. A row whose teacher is within the budget gets b = 1, exactly.
    All log-probabilities are finite.

    Source: Plyusov et al., arXiv 2605.31159.
    """
    raise NotImplementedError("trust_region")


# --------------------------------------------------------------------------------------------------
# Set 6: exploration, coverage, learning while reading


def budget_rule(success, kappa):
    """{budget: success J}, kappa >= 1 -> the budget of the next stage,

        B* = the smallest budget B with J(2B) <= kappa J(B)

    among those whose double was measured, too. A budget whose double has success 0 shows no
    plateau: it is passed over. If none is left, the largest budget whose double was measured.

    Source: Setlur et al., arXiv 2506.09026, equation 6.1.
    """
    raise NotImplementedError("budget_rule")


def coverage_profile(log_ratio, ns):
    """Cov_N = share of the answers with D(y|x) / p(y|x) >= N, for each N of the list ns.

    log_ratio (n,): log D - log p of n answers drawn from the data D, in nats -> (len(ns),) float64.
    inf (p is 0) and nan (p is broken) count as missed: ratios at or above every N.

    Source: Chen et al., arXiv 2510.15020.
    """
    raise NotImplementedError("coverage_profile")


def tournament(logp, n):
    """Which of C checkpoints to take: logp (C, M), their log-probabilities of M validation answers
    -> score (C,) float64, lower is better.

        score_i = max over rivals j of the share of answers with p_j / p_i >= n

    Source: Chen et al., arXiv 2510.15020, equation 29.
    """
    raise NotImplementedError("tournament")


def inner_update(fast, grads, eta):
    """One step of test-time training: fast, grads are tuples of tensors (B, ...) with any number of
    further dimensions, the weights of B documents and their gradients -> the new weights, a tuple
    like `fast`.

        W - eta g / max(1, |g|)         |g|: of one document, over all of its tensors together

    Differentiable in fast and grads, with nothing detached, the length included: training goes
    through the step. With a gradient of 0 the weights stay, and are no nan.

    Source: Tandon et al., arXiv 2512.23675; Pascanu et al., arXiv 1211.5063 (the clip).
    """
    raise NotImplementedError("inner_update")
