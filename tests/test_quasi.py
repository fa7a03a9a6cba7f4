"""quasi.py: the joint law of the uniforms and the law of each answer, pass@n of groups against
closed forms and fresh groups, the task by brute force, and the commands. quasi_rl.py: what becomes
of the baseline.
"""

import itertools
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from common import check_help, check_mistake, check_quick, check_resume, make, seeded

import grpo
from electives import quasi
from electives.quasi import (
    COUPLED,
    Config,
    answer,
    coupled_pass,
    demonstrate,
    different_pass,
    exact,
    group_uniforms,
    independent_pass,
    question,
    samples_saved,
    solutions,
    union_bound,
)
from engine import generate
from experiments import quasi_rl
from tasks import numbers, safe


def surprise(counts, probs):
    """Pearson's chi-squared of counts (..., cells), as the normal deviate that is as unlikely
    (Wilson and Hilferty): above 3.7 by chance once in 10^4.
    """
    counts = np.atleast_2d(counts)
    expected = np.atleast_2d(probs) * counts.sum(-1, keepdims=True)
    assert expected.min() > 3
    df = counts.size - len(counts)
    ratio = ((counts - expected) ** 2 / expected).sum() / df
    return (ratio ** (1 / 3) - (1 - 2 / (9 * df))) / (2 / (9 * df)) ** 0.5


def uniforms(kind, groups=4000, n=8, tokens=3, seed=0):
    """(groups, n, coordinates)"""
    u = group_uniforms(kind, groups, n, tokens, seeded(seed))
    return u.view(groups, n, -1)


# --------------------------------------------------------------------------------------------------
# The uniforms


@pytest.mark.parametrize("kind", COUPLED)
def test_every_number_of_a_group_is_uniform_on_its_own(kind):
    u = uniforms(kind)
    assert u.dtype == torch.float64 and 0 <= u.min() <= u.max() < 1
    for column in u.flatten(1).T:
        counts = np.bincount((column * 20).long(), minlength=20)
        assert surprise(counts, [1 / 20] * 20) < 3.7


def test_a_lattice_is_an_even_grid_with_its_own_shift_in_each_group():
    u = uniforms("lattice")[..., 0]
    steps = (u.roll(-1, 1) - u) % 1
    torch.testing.assert_close(steps, torch.full_like(u, 1 / 8), atol=1e-12, rtol=0)
    assert len((u[:, 0] * 1e9).long().unique()) > 3990


def test_stratified_numbers_stand_one_in_each_interval_in_every_order_alike():
    strata = (uniforms("stratified", n=4)[..., 0] * 4).long()
    assert (strata.sort(1).values == torch.arange(4)).all()
    order = (strata * 4 ** torch.arange(4)).sum(1)
    _, counts = order.unique(return_counts=True)
    assert len(counts) == 24 and surprise(counts.numpy(), [1 / 24] * 24) < 3.7


def test_stratified_numbers_are_independent_inside_their_intervals():
    inside = (uniforms("stratified", n=4)[..., 0] * 4) % 1  # (groups, 4)
    for i, j in itertools.combinations(range(4), 2):
        cells = (inside[:, i] * 4).long() * 4 + (inside[:, j] * 4).long()
        assert surprise(np.bincount(cells, minlength=16), [1 / 16] * 16) < 3.7


def test_sobol_numbers_are_even_in_each_coordinate_and_in_boxes_of_the_first_two():
    u = uniforms("sobol", groups=200, n=16, tokens=5)  # (groups, 16, 5)
    for t in range(5):
        assert ((u[..., t] * 16).long().sort(1).values == torch.arange(16)).all()
    for across in (2, 4, 8):  # boxes of 1/across by across/16
        box = (u[..., 0] * across).long() * (16 // across) + (u[..., 1] * 16 / across).long()
        assert (box.sort(1).values == torch.arange(16)).all()


def test_n_sobol_points_in_a_row_are_the_first_n_with_bits_flipped():
    points = torch.quasirandom.SobolEngine(6).draw(64, dtype=torch.float64)
    bits = (points * 2**30).long().view(8, 8, 6)  # (blocks, n, tokens)
    for block in bits:
        flips = block[0] ^ bits[0]  # (n, tokens): one of these carries the first block to this one
        carried = [sorted((bits[0] ^ flip).tolist()) for flip in flips]
        assert sorted(block.tolist()) in carried


def test_groups_are_independent_of_one_another():
    for kind in COUPLED:
        u = uniforms(kind)[:, 0, 0]
        cells = (u[::2] * 5).long() * 5 + (u[1::2] * 5).long()
        assert surprise(np.bincount(cells, minlength=25), [1 / 25] * 25) < 3.7


@pytest.mark.parametrize("kind", ["independent", *COUPLED])
def test_each_answer_of_a_group_has_the_models_own_law(kind):
    """Each place in a group, three tokens of a vocabulary of three: 27 sequences by enumeration."""
    gpt, n, groups = make(vocab_size=3), 4, 3000
    probs = np.ones(27)
    for i, sequence in enumerate(itertools.product(range(3), repeat=3)):
        logp = gpt(torch.tensor([[1, *sequence]]))[0].double().log_softmax(-1)
        for t, token in enumerate(sequence):
            probs[i] *= logp[t, token].exp().item()
    u = group_uniforms(kind, groups, n, 3, seeded(1))
    rows = generate(gpt, [[1]] * groups, n, 3, uniforms=u, generator=seeded(2)).tokens()
    cells = (torch.tensor(rows) @ torch.tensor([9, 3, 1])).view(groups, n)
    for column in cells.T:
        counts = np.bincount(column, minlength=27)
        assert surprise(counts, probs) < 3.7


# --------------------------------------------------------------------------------------------------
# pass@n


def hits(kind, pieces, groups, n, seed=0):
    """Which numbers fall into the intervals: (groups, n), of stratified ones in their order."""
    u = uniforms(kind, groups, n, 1, seed)[..., 0]
    u = u.sort(1).values if kind == "stratified" else u
    return torch.stack([(u >= low) & (u < high) for low, high in pieces]).any(0)


@pytest.mark.parametrize("kind", COUPLED)
@pytest.mark.parametrize("pieces", [[(0.13, 0.23)], [(0.02, 0.07), (0.31, 0.36)]])
def test_pass_at_n_of_larger_groups_is_that_of_fresh_groups_of_n(kind, pieces):
    large = hits(kind, pieces, 8000, 32)
    for n in (1, 4, 8, 32):
        fresh = hits(kind, pieces, 16000, n, seed=1)
        ours = coupled_pass(kind, large, n).mean().item()
        assert ours == pytest.approx(fresh.any(1).double().mean().item(), abs=0.015)


def test_one_interval_reaches_the_bound_with_a_lattice_and_stratified_numbers_do_what_they_should():
    low, high, n = 0.13, 0.23, 8
    p = torch.tensor(high - low, dtype=torch.float64)
    lattice = coupled_pass("lattice", hits("lattice", [(low, high)], 20000, 32), n).mean()
    assert lattice == pytest.approx(union_bound(p, n).item(), abs=0.01)
    # it covers .96 of the second interval of an eighth minus what lies before .13, and so on
    covered = [min(high, (i + 1) / n) - max(low, i / n) for i in range(n)]
    closed = 1 - np.prod([1 - n * max(c, 0) for c in covered])
    stratified = coupled_pass("stratified", hits("stratified", [(low, high)], 20000, 32), n).mean()
    assert stratified == pytest.approx(closed, abs=0.01)
    assert independent_pass(p, n) < closed < lattice


def test_stratified_pass_at_n_counts_all_choices_of_one_from_each_interval():
    right = torch.rand(5, 8, generator=seeded()) < 0.3
    choices = torch.tensor(list(itertools.product(range(2), repeat=4)))  # (16, 4)
    picked = (
        right.view(5, 1, 4, 2).expand(5, 16, 4, 2).gather(3, choices.expand(5, 16, 4)[..., None])
    )
    brute = picked.squeeze(3).any(2).double().mean(1)
    torch.testing.assert_close(coupled_pass("stratified", right, 4), brute)


@pytest.mark.parametrize("kind", COUPLED)
def test_no_coupling_exceeds_the_bound(kind):
    rng = np.random.default_rng(0)
    for _ in range(5):
        ends = np.sort(rng.random(6)) * 0.4
        pieces = [(ends[i], ends[i + 1]) for i in (0, 2, 4)]
        p = torch.tensor(sum(high - low for low, high in pieces))
        passed = coupled_pass(kind, hits(kind, pieces, 4000, 16), 8).mean()
        assert passed <= union_bound(p, 8) + 0.02


def test_half_as_many_samples_for_the_same_success_are_half_saved():
    ns = [1, 2, 4, 8, 16]
    coupled = np.array([[0.2, 0.4, 0.6, 0.7, 0.8]])
    saved = samples_saved(ns, coupled, np.array([[0.1, 0.2, 0.4, 0.6, 0.7]]))
    np.testing.assert_allclose(saved, [[0, 0.5, 0.5, 0.5, 0.5]])
    halfway = samples_saved(ns, coupled, np.array([[0.2, 0.4, 0.4, 0.65, 0.8]]))
    assert halfway[0, 3] == pytest.approx(1 - 32**0.5 / 8)  # between 4 and 8


def test_different_answers_are_counted_once_in_the_order_in_which_they_come():
    texts = [*"aabaabbc", *"bacbcaab", *"aaaaaaaa"]
    right = torch.tensor([[text == "b" for text in texts]]).view(3, 8)
    passed = [different_pass(texts, right, n) for n in (1, 2, 3, 4)]
    assert passed == [1 / 3, 2 / 3, 2 / 3, 2 / 3]


# --------------------------------------------------------------------------------------------------
# The task


def test_the_solutions_are_all_right_answers_that_a_demonstrator_writes():
    rng = random.Random(0)
    for _ in range(20):
        problem = numbers.draw(rng)
        texts = solutions(problem)
        written = {demonstrate(rng, problem, False) for _ in range(300)}
        assert len(written) == 15
        right = {text for text in written if text.endswith(f" ={problem[1]}")}
        assert right == set(texts) and all(numbers.hits(problem, *pair(text)) for text in right)


def pair(text):
    return numbers.pair(text.split()[:2])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_probability_of_a_right_answer_is_the_product_of_its_tokens(temperature, monkeypatch):
    torch.manual_seed(0)
    model = quasi.build(Config(n_embd=32), "cpu")
    problems = [numbers.draw(random.Random(i)) for i in range(3)]
    encode, eos = numbers.tokenizer.encode, numbers.tokenizer.eos

    def brute(stem, problem):
        total = 0
        for text in solutions(problem):
            ids, tokens = encode(stem), [*encode(text), eos]
            logits = model(torch.tensor([ids + tokens]))[0].double() / temperature
            logp = logits.log_softmax(-1)[len(ids) - 1 :]
            total += np.exp(sum(logp[t, x].item() for t, x in enumerate(tokens)))
        return total

    plain = [brute(question(problem, False), problem) for problem in problems]
    ours = exact(model, problems, False, None, temperature)
    np.testing.assert_allclose(ours, plain, rtol=1e-4)
    noise = ["=3 =17 =9 =9", "=1 =1 =1 =1"]
    hums = [encode(text) for text in noise]
    monkeypatch.setattr(quasi, "write", lambda _, stems, n, *__: hums * len(stems))
    hummed = [
        np.mean([brute(f"{question(problem, True)} {text}", problem) for text in noise])
        for problem in problems
    ]
    ours = exact(model, problems, True, None, temperature, hums=2)
    np.testing.assert_allclose(ours, hummed, rtol=1e-4)


@pytest.mark.parametrize("hum", [False, True])
def test_an_answer_is_judged_by_what_follows_the_hum(hum, monkeypatch):
    problem = ([3, 11, 8, 2, 6, 12], 14)
    noise = "=3 =17 =9 =9 " * hum
    texts = ["8 +6 =14", "6 +3 =9", "6 +8 =14"]
    written = [[*numbers.tokenizer.encode(noise + text), numbers.tokenizer.eos] for text in texts]
    monkeypatch.setattr(quasi, "write", lambda _, prompts, *__: written * len(prompts))
    told, right = answer(None, [problem] * 2, hum, "lattice", 3, seeded())
    assert told == texts * 2 and right.tolist() == [[True, False, False]] * 2


def test_a_hum_is_of_so_many_sums_and_comes_before_the_answer():
    problem = numbers.draw(random.Random(0))
    words = demonstrate(random.Random(1), problem, True).split()
    assert all(word[0] == "=" for word in words[: quasi.HUM])
    assert len(words) == quasi.HUM + quasi.ANSWER - 1 and words[-2][0] == "+"


# --------------------------------------------------------------------------------------------------
# quasi_rl.py


@pytest.mark.parametrize("kind", ["independent", *COUPLED])
@pytest.mark.parametrize("p, G", [(0.06, 8), (0.25, 8), (0.3, 3)])
def test_a_groups_mean_as_the_baseline_scales_the_gradient_by_one_minus_d_over_g(kind, p, G):
    """One logit, right with probability p: the score of an answer is r - p, and E[r (r - p)] is
    p (1 - p). Leaving one out scales by (G - D) / (G - 1).
    """
    u = torch.rand(40000, G, generator=seeded())
    if kind != "independent":
        u = uniforms(kind, 40000, G, 1)[..., 0]
    r = ((u >= 0.11) & (u < 0.11 + p)).double()
    C = r.sum(1, keepdim=True)
    D = ((C - G * p) ** 2).mean() / (G * p * (1 - p))
    mean = ((r - C / G) * (r - p)).mean() / (p * (1 - p))
    leave_one_out = ((r - (C - r) / (G - 1)) * (r - p)).mean() / (p * (1 - p))
    assert mean == pytest.approx(1 - D.item() / G, abs=0.01)
    assert leave_one_out == pytest.approx((G - D.item()) / (G - 1), abs=0.015)
    assert abs(D - 1) < 0.03 if kind == "independent" else D < 0.9


def test_a_lattice_whose_count_is_constant_has_an_unbiased_mean():
    u = uniforms("lattice", 4000, 8)[..., 0]
    C = ((u >= 0.11) & (u < 0.36)).sum(1)
    assert (C == 2).all()


def test_the_success_is_the_product_of_the_digits_and_the_end():
    model = grpo.build(quasi_rl.Config(n_embd=32), safe, "cpu")
    for problem in ("203", "999"):
        tokens = [*safe.tokenizer.encode(problem), safe.tokenizer.eos]
        logp = model(torch.tensor([safe.tokenizer.encode(problem + "=") + tokens]))[0]
        logp = logp.double().log_softmax(-1)[3:]
        brute = np.exp(sum(logp[t, x].item() for t, x in enumerate(tokens)))
        assert quasi_rl.success(model, [problem]).item() == pytest.approx(brute, rel=1e-4)


def trained(steps, independent=20, G=8, seeds=2):
    """A Run's rows: every sampler but the independent one takes so many steps, at any rate."""
    run = SimpleNamespace(rows=[])
    for kind, seed in itertools.product(quasi_rl.SAMPLERS, range(seeds)):
        numbers = dict(zero_variance=0.5, dispersion=1.0, scale=1 - 1 / G)
        run.rows.append(dict(phase="baseline", arm=kind, seed=seed, step=0, **numbers))
        for lr in quasi_rl.LRS:
            last = independent if kind == "independent" else steps
            for step in range(1, min(last, 30) + 1):
                where = dict(phase="rl", arm=kind, lr=lr, seed=seed, step=step)
                run.rows.append(dict(**where, success=0.9 if step == last else 0.5))
    return run


def test_as_many_steps_are_no_gain_and_a_run_that_does_not_arrive_counts_one_more():
    config = quasi_rl.Config(seeds=2, steps=30)

    def claims(run):
        return {c["id"]: c["holds"] for c in quasi_rl.figure(config, run)[1]}

    equal = claims(trained(steps=20))
    assert not equal["lattice steps"] and not equal["lattice groups"] and equal["law"]
    assert claims(trained(steps=15))["lattice steps"]
    assert not claims(trained(steps=16))["lattice steps"]
    late = quasi_rl.steps_of(config, trained(steps=40), "lattice", quasi_rl.LRS[0])
    assert late.tolist() == [31, 31]


def test_one_demonstration_in_sixteen_opens_the_safe_and_held_out_notes_are_never_drawn():
    rng = random.Random(0)
    problems = [safe.draw(rng) for _ in range(4000)]
    opened = sum(safe.reward(x, safe.demonstrate(rng, x)) for x in problems) / 4000
    assert opened == pytest.approx(0.4**3, abs=0.015)
    assert not set(problems) & {safe.draw(rng, held_out=True) for _ in range(500)}


# --------------------------------------------------------------------------------------------------
# The commands

NAMES = "electives.quasi", "experiments.quasi_rl"


@pytest.mark.parametrize("name, also", [(NAMES[0], ["samples.txt"]), (NAMES[1], [])])
def test_a_quick_run_writes_all_that_a_run_writes(name, also, tmp_path):
    assert check_quick(name, tmp_path, also=also) == name.split(".")[1]


@pytest.mark.parametrize("name", NAMES)
def test_help_lists_every_flag(name):
    check_help(name)


@pytest.mark.parametrize(
    "name, flags",
    [
        ("electives.quasi", "--samples 48"),
        ("electives.quasi", "--samples 16"),
        ("experiments.quasi_rl", "--lr 1"),
        ("experiments.quasi_rl", "--size 4"),
    ],
)
def test_a_mistake_is_one_line(name, flags, tmp_path):
    check_mistake(name, flags, tmp_path)


@pytest.mark.parametrize(
    "name, mark",
    [(NAMES[0], dict(phase="coverage", hum=False)), (NAMES[1], dict(arm="lattice", step=1))],
)
def test_a_run_goes_on_to_the_bit(name, mark, tmp_path, monkeypatch):
    monkeypatch.setattr(quasi_rl, "LRS", quasi_rl.LRS[:1])  # each run is saved: few are faster
    monkeypatch.setattr(quasi_rl, "SAMPLERS", quasi_rl.SAMPLERS[:3])
    check_resume(name, tmp_path, (dict(phase="sft", step=9), mark), "--quick")
