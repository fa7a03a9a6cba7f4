"""The course: our own functions pass, stubs fail by name, every mistake is caught with the words
that a student needs, and what a student's file does harms nobody but itself.
"""

import inspect
import math
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import solution
import torch
from common import ROOT
from wrong import WRONG

import coverage
import engine
import grpo
import kernels
import model
import opd
import tokenizer
import ttt
from assignment import adapters
from assignment.grade import grade, main
from assignment.problems import PROBLEMS, SETS, first_failure, words_of
from electives import quasi
from experiments import coupled, selection

BY_NAME = {problem.name: problem for problem in PROBLEMS}
EACH = pytest.mark.parametrize("name", BY_NAME)


def judged(name, function):
    return first_failure(BY_NAME[name], function, started=len)


# --------------------------------------------------------------------------------------------------
# Our own functions, in the students' signatures


def shape(**fields):
    """A GPT of one layer and one head."""
    return model.GPTConfig(vocab_size=2, n_layer=1, **fields)


def bpe_merges(words, n_merges):
    return tokenizer.bpe_merges(b"".join(words).decode(), n_merges)


def rms_norm(x, weight, eps):
    return kernels.RMSNormFunction.apply(x, weight, eps)


def rotary(x, positions, theta):
    D = x.shape[-1]
    config = shape(block_size=64, n_head=1, n_embd=D, rope_theta=theta)
    return model.rotate(x, model.rotations(config)[positions])


def cache_step(keys, values, lens, q, k, v):
    R, S, D = keys.shape
    config = shape(block_size=S, n_head=1, n_embd=D)
    cache = engine.KVCache(config, R, S, dtype=keys.dtype)
    for ours, given in ((cache.k[0], keys), (cache.v[0], values)):
        # ours begins with zeros and holds what it was told: nothing but numbers
        ours.copy_(given[:, :, None].nan_to_num(0, posinf=0))
    cache.set_lens(lens.tolist())
    mask = cache.extend(1)[1]
    seen = cache.append(0, k[:, None, None], v[:, None, None])  # (R, S, 1, D) each
    heads = (x.transpose(1, 2) for x in (q[:, None, None], *seen))
    out = kernels.attention(*heads, mask=mask)  # (R, 1, 1, D)
    keys.copy_(cache.k[0][:, :, 0])
    values.copy_(cache.v[0][:, :, 0])
    return out[:, 0, 0], cache.lens


def policy_loss(logp, old_logp, adv, mask, ratio, eps_low, eps_high):
    # ours is given numbers wherever the mask is 0: log-probabilities of padding
    logp = torch.where(mask > 0, logp, 0)
    # a trainer gives old_logp without a gradient
    return grpo.policy_loss(logp, old_logp.detach(), adv, mask, ratio, eps_low, eps_high)[0]


def token_logprobs(hidden, weight, targets, temperature, block):
    context = SimpleNamespace(save_for_backward=lambda *saved: kept.extend(saved))
    kept = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "BLOCK", len(hidden) * block)
        given = hidden.float(), weight.float(), targets, 1 / temperature, False
        logp, entropy = kernels.ChunkedLogprobs.forward(context, *given)
    return logp, entropy, kept[3]


def token_logprobs_backward(
    hidden, weight, targets, lse, entropy, g_logp, g_entropy, temperature, block
):
    saved = hidden.float(), weight.float(), targets, lse.float(), entropy.float()
    context = SimpleNamespace(saved_tensors=saved, inv_t=1 / temperature, compiled=False)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(kernels, "BLOCK", len(hidden) * block)
        slopes = kernels.ChunkedLogprobs.backward(context, g_logp.float(), g_entropy.float())
    return slopes[:2]


def flash_attention(q, k, v, tile):
    """Triton's, in its interpreter: it chooses its own tiles, and keeps lse in powers of two."""
    heads = (x.float()[None, None].requires_grad_() for x in (q, k, v))
    o = kernels.FlashAttention.apply(*heads, kernels.FAR, 0)
    lse = o.grad_fn.saved_tensors[4]
    return o[0, 0], lse[0, 0] * math.log(2)


def truncate(logits, top_k=None, top_p=None):
    # `generate` asks ours for a top_p above 0
    return engine.truncate(logits, top_k, 1e-30 if top_p == 0 else top_p)


def uniforms(kind):
    def draw(prompts, group, generator):
        return quasi.group_uniforms(kind, prompts, group, 1, generator).view(prompts, group)

    return draw


def divergence(kind):
    return lambda lp, lq, y=None: opd.divergence(lp, lq, y, kind)


def coverage_profile(log_ratio, ns):
    return torch.stack([torch.tensor(coverage.coverage(log_ratio, n)) for n in ns])


def inner_update(fast, grads, eta):
    # ours are matrices
    matrices = ([x.reshape(len(x), -1, 1) for x in xs] for xs in (fast, grads))
    new = ttt.inner_update(*matrices, eta)
    return tuple(x.view_as(w) for x, w in zip(new, fast, strict=True))


OURS = {
    "bpe_merges": bpe_merges,
    "rms_norm": rms_norm,
    "rotary": rotary,
    "attention": kernels.attention,
    "cache_step": cache_step,
    "inverse_cdf": lambda probs, u: engine.inverse_cdf(probs, u)[0],
    "truncate": truncate,
    "stratified_uniforms": uniforms("stratified"),
    "lattice_uniforms": uniforms("lattice"),
    "pass_at_k": grpo.pass_at_k,
    "advantages": grpo.advantages,
    "policy_loss": policy_loss,
    "aggregation_weights": grpo.aggregation_weights,
    "kl_estimate": grpo.kl_estimate,
    "token_logprobs": token_logprobs,
    "token_logprobs_backward": token_logprobs_backward,
    "flash_attention": flash_attention,
    "reverse_kl": divergence("reverse"),
    "jsd": divergence("jsd"),
    "sampled_reverse_kl": divergence("sampled"),
    "trust_region": opd.trust_region,
    "budget_rule": coupled.budget_rule,
    "coverage_profile": coverage_profile,
    "tournament": lambda logp, n: torch.tensor(selection.tournament(logp.numpy(), n)),
    "inner_update": inner_update,
}


@EACH
def test_our_own_functions_have_all_properties(name):
    if name == "flash_attention" and kernels.no_triton(torch.zeros(1)):
        pytest.skip(kernels.no_triton(torch.zeros(1)))
    assert judged(name, OURS[name]) is None


# --------------------------------------------------------------------------------------------------
# Stubs and mistakes


@EACH
def test_a_stub_fails_by_name(name):
    assert judged(name, getattr(adapters, name)) == f"NotImplementedError: {name}"


def broken(name, old, new):
    """The function of tests/solution.py with a mistake in it."""
    source = inspect.getsource(getattr(solution, name))
    assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in {name}"
    names = dict(vars(solution))
    exec(source.replace(old, new), names)
    return names[name]


CASES = [(name, *case) for name, cases in WRONG.items() for case in cases]


@pytest.mark.parametrize("name, old, new, said", CASES, ids=lambda x: x[:20])
def test_a_mistake_is_caught_with_the_words_that_a_student_needs(name, old, new, said):
    torch.manual_seed(0)  # some of the mistakes draw
    assert said in (judged(name, broken(name, old, new)) or "nothing is wrong")


def test_a_failure_is_told_on_while_the_other_properties_are_counted():
    told = []
    twice = broken("kl_estimate", "d**2 / 2", "d**2")
    wrong = first_failure(BY_NAME["kl_estimate"], twice, told.append)
    assert wrong == f"3 of 4 properties hold. The first that does not: {told[-1]}"
    assert told[1] in told[-1] and "HERE: " in told[-1]


def test_every_function_has_three_mistakes_or_more():
    assert list(WRONG) == list(BY_NAME)
    assert [name for name, cases in WRONG.items() if len(cases) < 3] == []


# --------------------------------------------------------------------------------------------------
# What is handed out


@EACH
def test_a_stub_says_what_the_function_is_and_where_it_comes_from(name):
    text = inspect.getdoc(getattr(adapters, name))
    assert re.search(r"\bSources?: ", text) and re.search(r"-> |gives back", text)
    given = inspect.signature(getattr(adapters, name)).parameters
    assert [x for x in given if not re.search(rf"\b{x}\b", text)] == []
    assert list(given) == list(inspect.signature(getattr(solution, name)).parameters)


def test_the_points_make_100_in_six_sets():
    assert sum(problem.points for problem in PROBLEMS) == 100
    assert sorted({problem.set for problem in PROBLEMS}) == list(SETS) == [1, 2, 3, 4, 5, 6]
    checks = [check for problem in PROBLEMS for check in problem.properties]
    assert [check for check in checks if words_of(check)[-1] not in ".)"] == []


def test_the_handout_has_every_function_with_its_points_and_the_hint_that_the_grader_gives():
    page = (ROOT / "assignment/README.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (\d+) \| (.*) \|$", page, re.M)
    assert rows == [(p.name, str(p.points), p.hint) for p in PROBLEMS]


# --------------------------------------------------------------------------------------------------
# A student's file


class Outcomes:
    """A plugin of pytest that keeps what became of each test."""

    def __init__(self):
        self.errors = {}

    def pytest_runtest_makereport(self, item, call):
        if call.when == "call":
            self.errors[item.name] = call.excinfo and call.excinfo.value


def outcomes(file, *flags):
    """`python -m pytest assignment --solution FILE`, in this process -> {test: its exception}."""
    plugin = Outcomes()
    flags += "-n", "0", "-q", "--tb=no", "-p", "no:cacheprovider", "--solution", str(ROOT / file)
    pytest.main([str(ROOT / "assignment"), *flags], plugins=[plugin])
    return plugin.errors


def test_a_plain_solution_has_all_properties_by_pytest():
    errors = outcomes("tests/solution.py")
    assert len(errors) == sum(len(problem.properties) for problem in PROBLEMS)
    assert {test: error for test, error in errors.items() if error} == {}


def test_pytest_says_which_stub_is_to_be_written():
    errors = outcomes("assignment/adapters.py", "-k", "rotary")
    assert len(errors) == len(BY_NAME["rotary"].properties)
    assert {repr(error) for error in errors.values()} == {"NotImplementedError('rotary')"}


HARMFUL = """
from solution import *

def rms_norm(x, weight, eps):
    while True:
        pass

def rotary(x, positions, theta):
    import sys
    sys.exit(0)

def attention(q, k, v, window=None):
    import os
    os._exit(0)

def jsd(lp, lq):
    print("x" * 10**6)
    return sum(reverse_kl(p, torch.logaddexp(lp, lq) - math.log(2)) for p in (lp, lq)) / 2

def inverse_cdf(probs, u):
    held = []
    while True:
        held.append(torch.empty(2**27))

def pass_at_k(n, correct, k):
    return correct.new_ones(2**30)

def budget_rule(success, kappa):
    return budget_rule(success, kappa)

def tournament(logp, n):
    return [0.0] * len(logp)

del advantages
"""
SAID = {
    "rms_norm": "it did not end within 4 seconds",
    "rotary": "it ends the program",
    "attention": "it ended the process",
    "inverse_cdf": "it asks for too much memory",
    "pass_at_k": "it asks for too much memory",
    "advantages": "the file has no function of this name",
    "budget_rule": "RecursionError",
    "tournament": "it gives back list, not a tensor",
}


def test_a_harmful_function_gets_nothing_and_the_others_are_graded(tmp_path):
    path = tmp_path / "harmful.py"
    path.write_text(HARMFUL)
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "assignment.grade", str(path), "--seconds", "4"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    out = done.stdout
    assert done.returncode == 0 and done.stderr == "" and "xxx" not in out
    blocks = re.findall(r"^  (\w+) +(\d+) / (\d+)\n((?: {6}\S?.*\n)*)", out, re.M)
    assert [name for name, *_ in blocks] == list(BY_NAME)
    for name, got, of, text in blocks:
        assert got == ("0" if name in SAID else of), name
        assert SAID.get(name, "") in " ".join(text.split()), name


def test_a_file_that_cannot_be_loaded_is_said_and_so_is_one_that_is_not_there(tmp_path, capsys):
    path = tmp_path / "broken.py"
    path.write_text("def rms_norm(:")
    grades = grade(path, PROBLEMS[:2])
    assert all("SyntaxError" in wrong for wrong in grades.values())
    assert main([str(tmp_path / "nothing.py")]) == 2
    assert capsys.readouterr().err.startswith("grade.py: error: there is no file")
