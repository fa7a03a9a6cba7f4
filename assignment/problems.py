"""problems.py: the table of the course. Tests, grader and the project's own tests all go by it."""

import inspect
from collections.abc import Callable
from typing import NamedTuple

from assignment import set1, set2, set3, set4, set5, set6
from assignment.checks import guarded


class Problem(NamedTuple):
    name: str  # of the function
    set: int
    points: int
    properties: list[Callable]  # each takes the function; its docstring says what has to hold
    hint: str
    writes: tuple[int, ...] = ()  # arguments that the function is to change


SETS = {
    1: "the model",
    2: "sampling",
    3: "reinforcement learning",
    4: "kernels",
    5: "distillation",
    6: "exploration, coverage, learning while reading",
}

# fmt: off
PROBLEMS = [
    Problem("bpe_merges", 1, 4, set1.BPE_MERGES,
            "count words first, then pairs; `max` takes a key, and a tuple is a key"),
    Problem("rms_norm", 1, 2, set1.RMS_NORM,
            "one line; `keepdim=True`"),
    Problem("rotary", 1, 4, set1.ROTARY,
            "`x[..., 0::2]` and `x[..., 1::2]`; angles of shape (B, T, 1, D/2)"),
    Problem("attention", 1, 5, set1.ATTENTION,
            "one matrix (T, S) of query position minus key position says all about masks"),
    Problem("cache_step", 2, 6, set2.CACHE_STEP,
            "`keys[torch.arange(R), lens] = k`; a mask `slots <= lens`, for scores and for values",
            writes=(0, 1)),
    Problem("inverse_cdf", 2, 3, set2.INVERSE_CDF,
            "count the sums that are at most u; then think of zeros and of rounding"),
    Problem("truncate", 2, 4, set2.TRUNCATE,
            "the mass before a token in the sorted row decides; `scatter` puts it back in place"),
    Problem("stratified_uniforms", 2, 2, set2.STRATIFIED_UNIFORMS,
            "the argsort of random numbers is a random order"),
    Problem("lattice_uniforms", 2, 2, set2.LATTICE_UNIFORMS,
            "a grid (group,) plus a shift (prompts, 1)"),
    Problem("pass_at_k", 2, 3, set2.PASS_AT_K,
            "the quotient of the binomials is a product of 1 - c / j"),
    Problem("advantages", 3, 4, set3.ADVANTAGES,
            "where all of a row's rewards equal its first, write 0"),
    Problem("policy_loss", 3, 7, set3.POLICY_LOSS,
            "draw the table first: sign of A, rho below, within and above the range"),
    Problem("aggregation_weights", 3, 4, set3.AGGREGATION_WEIGHTS,
            "mask / divisor; `clamp_min(1)` for the row without tokens"),
    Problem("kl_estimate", 3, 3, set3.KL_ESTIMATE,
            "which way round is the ratio in k3? Try it on two tokens by hand"),
    Problem("token_logprobs", 4, 6, set4.TOKEN_LOGPROBS,
            "keep m, the sum of e^(z-m) and that of z e^(z-m); both shrink by e^(old m - new m)"),
    Problem("token_logprobs_backward", 4, 8, set4.TOKEN_LOGPROBS_BACKWARD,
            "dz of a block, then dz W and dz^T h; where does the temperature go?"),
    Problem("flash_attention", 4, 8, set4.FLASH_ATTENTION,
            "the same trick, with the output as a third sum; the maximum begins at -inf"),
    Problem("reverse_kl", 5, 2, set5.REVERSE_KL,
            "`lp.exp()`"),
    Problem("jsd", 5, 3, set5.JSD,
            "`torch.logaddexp(lp, lq)` is log(p + q)"),
    Problem("sampled_reverse_kl", 5, 4, set5.SAMPLED_REVERSE_KL,
            "a policy gradient: what is its reward?"),
    Problem("trust_region", 5, 5, set5.TRUST_REGION,
            "bisection of all rows at once; try b = 1 first"),
    Problem("budget_rule", 6, 2, set6.BUDGET_RULE,
            "`sorted`, then the first that fits"),
    Problem("coverage_profile", 6, 2, set6.COVERAGE_PROFILE,
            "`not below` is true of nan, `at least` is not"),
    Problem("tournament", 6, 3, set6.TOURNAMENT,
            "all differences at once have shape (C, C, M)"),
    Problem("inner_update", 6, 4, set6.INNER_UPDATE,
            "one norm (B,) of all tensors; give it the shape of each"),
]
# fmt: on


def words_of(check):
    """What a property says, on one line."""
    return " ".join(inspect.getdoc(check).split())


def verify(problem, check, function):
    """Hold a function against one property. AssertionError in words if it does not hold."""
    check(guarded(function, problem.writes))


def first_failure(problem, function, started):
    """What a student has to read about a function: None if all properties hold, else how many do
    and the first that does not.

    started(words): called before each property, after a failure with what is wrong so far.
    """
    first, held = None, 0
    for check in problem.properties:
        words = words_of(check)
        started(first or words)
        try:
            verify(problem, check, function)
            held += 1
        except NotImplementedError as e:
            return first or f"NotImplementedError: {e}"
        except (Exception, SystemExit) as e:
            first = first or f"{words} HERE: {complaint(e)}"
    count = f"{held} of {len(problem.properties)} properties hold. The first that does not:"
    return first and f"{count} {first}"


def complaint(error):
    """What an exception says to a student."""
    if isinstance(error, AssertionError):
        return str(error)
    if isinstance(error, SystemExit):
        return "it ends the program"
    # torch's own is a RuntimeError
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return "it asks for too much memory"
    return f"{type(error).__name__}: {error}".splitlines()[0]
