"""problems.py: the table of the course. Tests, grader and the project's own tests all go by it."""

import inspect
from collections.abc import Callable
from typing import NamedTuple

from assignment import set1, set2, set3, set4, set5, set6
from assignment.checks import guarded


class Problem(NamedTuple):
    name: str  # of the function
    week: int  # the problem set
    points: int
    hint: str
    properties: list[Callable]  # each takes the function; its docstring says what has to hold
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
    Problem("bpe_merges", 1, 4, "a Counter of words first, then one of pairs; max() with a key",
            set1.BPE_MERGES),
    Problem("rms_norm", 1, 2, "one line; keepdim=True", set1.RMS_NORM),
    Problem("rotary", 1, 4, "x[..., 0::2] and x[..., 1::2]; angles (B, T, 1, D/2)", set1.ROTARY),
    Problem("attention", 1, 5, "the distance query position - key position (T, S) says it all",
            set1.ATTENTION),
    Problem("cache_step", 2, 6, "keys[torch.arange(R), lens] = k; a mask slots <= lens",
            set2.CACHE_STEP, writes=(0, 1)),
    Problem("inverse_cdf", 2, 3, "count the sums that are <= u", set2.INVERSE_CDF),
    Problem("truncate", 2, 4, "the mass of what is likelier than a token; scatter it back",
            set2.TRUNCATE),
    Problem("stratified_uniforms", 2, 2, "argsort of random numbers is a random order",
            set2.STRATIFIED_UNIFORMS),
    Problem("lattice_uniforms", 2, 2, "a grid (group,) plus a shift (prompts, 1)",
            set2.LATTICE_UNIFORMS),
    Problem("pass_at_k", 2, 3, "the quotient of binomials is a product of 1 - c / j",
            set2.PASS_AT_K),
    Problem("advantages", 3, 4, "where a row's rewards all equal its first, 0", set3.ADVANTAGES),
    Problem("policy_loss", 3, 7, "a table: sign of A, rho below, within, above", set3.POLICY_LOSS),
    Problem("aggregation_weights", 3, 4, "mask / divisor; clamp_min(1)", set3.AGGREGATION_WEIGHTS),
    Problem("kl_estimate", 3, 3, "which way round is the ratio in k3?", set3.KL_ESTIMATE),
    Problem("token_logprobs", 4, 6, "sums of e^(z-m) and z e^(z-m), both scaled by e^(m_old-m_new)",
            set4.TOKEN_LOGPROBS),
    Problem("token_logprobs_backward", 4, 8, "dz of a block, then dz W and dz^T h",
            set4.TOKEN_LOGPROBS_BACKWARD),
    Problem("flash_attention", 4, 8, "start from a maximum of -inf; a tile has its own mask",
            set4.FLASH_ATTENTION),
    Problem("reverse_kl", 5, 2, "lp.exp()", set5.REVERSE_KL),
    Problem("jsd", 5, 3, "torch.logaddexp(lp, lq) - log 2", set5.JSD),
    Problem("sampled_reverse_kl", 5, 4, "a policy gradient; what is its reward?",
            set5.SAMPLED_REVERSE_KL),
    Problem("trust_region", 5, 5, "bisection of all rows at once; try b = 1 first",
            set5.TRUST_REGION),
    Problem("budget_rule", 6, 2, "sorted(), then the first that fits", set6.BUDGET_RULE),
    Problem("coverage_profile", 6, 2, "`not below` is true of nan, `at least` is not",
            set6.COVERAGE_PROFILE),
    Problem("tournament", 6, 3, "differences (C, C, M)", set6.TOURNAMENT),
    Problem("inner_update", 6, 4, "a norm (B,) of all tensors, in the shape of each",
            set6.INNER_UPDATE),
]
# fmt: on


def words_of(check):
    """What a property says, on one line."""
    return " ".join(inspect.getdoc(check).split())


def verify(problem, check, function):
    """Hold a function against one property. AssertionError in words if it does not hold."""
    check(guarded(function, problem.writes))


def first_failure(problem, function, started):
    """What a student has to read about a function: None if all properties hold, else a text.

    started(words): called before each property.
    """
    for check in problem.properties:
        words = words_of(check)
        started(words)
        try:
            verify(problem, check, function)
        except NotImplementedError as e:
            return f"NotImplementedError: {e}"
        except AssertionError as e:
            return f"{words} HERE: {e}"
        except SystemExit:
            return f"{words} HERE: it ends the program"
        except MemoryError:
            return f"{words} HERE: it asks for too much memory"
        except Exception as e:
            return f"{words} HERE: {type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"
    return None
