"""electives/relay.py and tasks/sudoku.py: boards by brute force, the bound and the sampler against
a joint law that is known, the rule that fills cells in, what the gradient passes through, the
command.
"""

import itertools
import math
import random

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from common import Memory, check_help, check_mistake, check_quick, check_resume, seeded

import tasks
from electives import relay
from electives.relay import (
    ARMS,
    ETAS,
    MASK,
    OWN,
    PASSES,
    WIDTH,
    Config,
    Denoiser,
    ancestral,
    between,
    boards,
    bound,
    cross_entropy,
    noised,
    nothing,
    renamed,
    reveal,
    solve,
    two_passes,
)
from tasks.sudoku import BOX, CELLS, COLUMN, ROW, N, draw, solutions


@pytest.fixture(scope="module")
def puzzles():
    """Boards of 16 givens, and their solutions."""
    return boards(random.Random(0), 12, 16)


def large(seed=0, layers=1):
    """A model whose weights are large, the relay's too: everything depends on everything."""
    torch.manual_seed(seed)
    model = Denoiser(layers)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


# --------------------------------------------------------------------------------------------------
# The task


def legal(filled):
    """Whether every row, column and box holds six different digits."""
    return all(
        len({filled[c] for c in range(CELLS) if unit[c] == i}) == N
        for unit in (ROW, COLUMN, BOX)
        for i in range(N)
    )


def test_a_board_is_part_of_its_solution_which_is_legal():
    for givens in (11, 16, 30):
        board, solution = draw(random.Random(givens), givens)
        assert legal(solution) and sum(digit > 0 for digit in board) == givens
        assert all(a in (0, b) for a, b in zip(board, solution, strict=True))


@pytest.mark.parametrize("seed", range(4))
def test_solutions_are_those_that_brute_force_finds(seed):
    rng = random.Random(seed)
    _, solution = draw(rng, 30)
    # two digits taken out of some rows: seldom one solution
    board = [
        0 if digit <= 2 and row < 2 else digit for digit, row in zip(solution, ROW, strict=True)
    ]
    blanks = [cell for cell in range(CELLS) if not board[cell]]
    found = set()
    for digits in itertools.product((1, 2), repeat=len(blanks)):
        filled = list(board)
        for cell, digit in zip(blanks, digits, strict=True):
            filled[cell] = digit
        if legal(filled):
            found.add(tuple(filled))
    assert set(solutions(board, 100)) == found and solution in found
    assert len(solutions(board, 1)) == 1


def test_a_drawn_board_has_one_solution_and_one_without_a_digit_it_needs_has_more():
    board, solution = draw(random.Random(1), 11)
    assert solutions(board, 2) == [solution]
    more = 0
    for cell in np.flatnonzero(board):
        fewer = list(board)
        fewer[cell] = 0
        more += len(solutions(fewer, 2)) == 2
    assert more


def test_held_out_solutions_stay_so_under_other_names_for_the_digits():
    def named(solution):
        return "".join(str(list(solution).index(digit)) for digit in solution)

    for held_out in (False, True):
        board, solution = boards(random.Random(0), 8, 20, held_out)
        _, other = renamed(board, solution, seeded())
        assert not torch.equal(solution, other)
        assert all(
            tasks.held_out(named(s)) == held_out for s in (*solution.tolist(), *other.tolist())
        )


def test_renamed_boards_belong_to_their_solutions_and_have_the_same_blanks(puzzles):
    board, solution = renamed(*puzzles, seeded())
    assert torch.equal(board == MASK, puzzles[0] == MASK)
    assert ((board == solution) | (board == MASK)).all()
    assert all(legal(s) for s in solution.tolist())


# --------------------------------------------------------------------------------------------------
# Masked diffusion. A law of three cells with two digits that is known: 8 boards


class Known:
    """A model that knows the joint law of x (2, 2, 2): its logits are the exact conditionals."""

    def __init__(self, joint):
        self.joint = joint

    def __call__(self, canvas, h):
        """canvas (R, 3) -> logits (R, 3, 6)."""
        kinds, which = canvas.unique(dim=0, return_inverse=True)
        logits = torch.full((*kinds.shape, N), -torch.inf)
        for row, seen in enumerate(kinds.tolist()):
            fits = self.joint.clone()
            for x in itertools.product((0, 1), repeat=3):
                if any(digit not in (MASK, a + 1) for digit, a in zip(seen, x, strict=True)):
                    fits[x] = 0
            for cell in range(3):
                others = [i for i in range(3) if i != cell]
                logits[row, cell, :2] = (fits.sum(others) / fits.sum()).log()
        return logits[which], h


@pytest.fixture
def joint():
    law = torch.rand((2, 2, 2), generator=seeded(3), dtype=torch.float64) ** 3
    return (law / law.sum()).float()


def test_the_bound_of_the_exact_conditionals_is_minus_log_p(joint):
    # given t, a set of masked cells of size m has probability t^m (1 - t)^(3 - m); over t, by Gauss
    nodes, weights = np.polynomial.legendre.leggauss(8)
    for x in itertools.product((0, 1), repeat=3):
        solution = torch.tensor([[a + 1 for a in x]])
        blank_board = torch.zeros_like(solution)
        total = 0
        for masked in itertools.product((False, True), repeat=3):
            canvas = solution.masked_fill(torch.tensor([masked]), MASK)
            logits, _ = Known(joint)(canvas, None)
            loss = cross_entropy(logits, solution)
            m = sum(masked)
            for t, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
                chance = t**m * (1 - t) ** (3 - m)
                nats = bound(loss.nan_to_num(), canvas, blank_board, torch.tensor([t]))
                total += weight * chance * nats.item()
        assert 3 * total == pytest.approx(-joint[x].log().item(), rel=1e-4), "per blank"


def test_each_blank_is_masked_with_probability_t_and_the_ts_of_a_batch_are_spread(puzzles):
    board, solution = (x[:1].expand(4000, -1) for x in puzzles)
    canvas, t = noised(board, solution, seeded())
    blank = board == MASK
    assert torch.equal(canvas[~blank], solution[~blank]), "what is given stays"
    assert ((canvas == solution) | (canvas == MASK)).all()
    # one t in each 4000th of (0.001, 1)
    u = (t - 1e-3) / (1 - 1e-3)
    assert u.min() >= 0 and u.max() <= 1 and (u.sort().values.diff() - 1 / 4000).abs().max() < 1e-5
    share = (canvas == MASK).sum(1) / blank.sum(1)
    for low in (0.0, 0.25, 0.5, 0.75):
        some = (t > low) & (t < low + 0.25)
        assert share[some].mean().item() == pytest.approx(t[some].mean().item(), abs=0.012)


def sampler_law(joint, steps):
    """What the sampler draws in `steps` passes, by enumeration: each cell's pass is any of them."""
    law = torch.zeros(2, 2, 2)
    for when in itertools.product(range(steps), repeat=3):
        for x in itertools.product((0, 1), repeat=3):
            p = 1 / steps**3
            for now in range(steps):
                canvas = torch.tensor(
                    [[a + 1 if w < now else MASK for a, w in zip(x, when, strict=True)]]
                )
                q = Known(joint)(canvas, None)[0][0].softmax(-1).nan_to_num()
                p *= math.prod(q[i, x[i]].item() for i in range(3) if when[i] == now)
            law[x] += p
    return law


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_sampler_has_the_law_that_enumeration_gives_chi_squared(joint, steps):
    n = 6000
    drawn = ancestral(Known(joint), torch.zeros(n, 3, dtype=torch.long), steps, seeded(steps))
    seen = torch.zeros(2, 2, 2).index_put_(tuple((drawn - 1).T), torch.ones(n), accumulate=True)
    mean = n * sampler_law(joint, steps)
    chi2 = ((seen - mean) ** 2 / mean).sum().item()
    assert chi2 < 7 + 5 * 14**0.5
    if steps == 1:
        assert ((seen - n * joint) ** 2 / (n * joint)).sum() > 60, "one pass draws cells apart"


def test_every_pass_of_the_sampler_unmasks_the_same_share_of_the_cells():
    passed = itertools.count()

    def clock(canvas, h):  # sure of the digit that numbers the pass
        logits = torch.full((*canvas.shape, N), -torch.inf)
        logits[..., next(passed)] = 0
        return logits, h

    drawn = ancestral(clock, torch.zeros(2000, CELLS, dtype=torch.long), N, seeded())
    counts = (drawn - 1).flatten().bincount(minlength=N)
    assert (counts - 12_000).abs().max() < 5 * (12_000 * 5 / 6) ** 0.5


def test_more_passes_bring_the_sampler_nearer_to_the_joint_law(joint):
    distance = [(sampler_law(joint, steps) - joint).abs().sum().item() / 2 for steps in (1, 2, 4)]
    assert distance[0] > distance[1] > distance[2] > 0


def test_the_sampler_fills_the_blanks_and_leaves_what_is_given(puzzles):
    board = puzzles[0]
    full = ancestral(large(), board, 3, seeded())
    assert ((full >= 1) & (full <= N)).all() and torch.equal(full[board > 0], board[board > 0])


# --------------------------------------------------------------------------------------------------
# The rule


@pytest.mark.parametrize("eta", [0.0, 0.1, 0.5, 2.0, 100.0])
def test_the_surest_cells_are_filled_in_as_long_as_their_doubts_stay_below_eta(eta):
    logits = 2 * torch.randn(50, CELLS, N, generator=seeded())
    masked = torch.rand(50, CELLS, generator=seeded(1)) < 0.5
    masked[0] = False
    chosen = reveal(logits, masked, eta)
    doubt = 1 - logits.softmax(-1).amax(-1)
    for row in range(50):
        order = sorted(masked[row].nonzero().flatten().tolist(), key=lambda c: doubt[row, c].item())
        total, want = 0.0, set(order[:1])
        for cell in order:
            total += doubt[row, cell].item()
            if total >= eta:
                break
            want.add(cell)
        assert set(chosen[row].nonzero().flatten().tolist()) == want


# --------------------------------------------------------------------------------------------------
# The relay


def test_before_training_the_relay_changes_nothing(puzzles):
    torch.manual_seed(0)
    model = Denoiser(2)
    h = torch.randn(12, CELLS, WIDTH)
    assert torch.equal(model(puzzles[0], h)[0], model(puzzles[0], nothing(puzzles[0]))[0])
    model = large()
    assert not torch.allclose(model(puzzles[0], h)[0], model(puzzles[0], nothing(puzzles[0]))[0])


def test_a_cells_prediction_follows_its_digits_names_and_its_rows_order(puzzles):
    # no cell has a place: two rows of a band may change places
    model, board = large(layers=2), puzzles[0]
    order = torch.arange(CELLS).view(N, N)[[1, 0, 2, 3, 5, 4]].flatten()
    logits, h = model(board, nothing(board))
    logits_there, h_there = model(board[:, order], nothing(board))
    assert torch.allclose(logits[:, order], logits_there, atol=1e-4)
    assert torch.allclose(h[:, order], h_there, atol=1e-4)
    # but rows of two bands may not
    order = torch.arange(CELLS).view(N, N)[[2, 1, 0, 3, 4, 5]].flatten()
    assert not torch.allclose(
        logits[:, order], model(board[:, order], nothing(board))[0], atol=1e-2
    )


def passes(model, puzzles, relays, gradient, eta=0.5):
    torch.manual_seed(1)
    h = torch.randn(len(puzzles[0]), CELLS, WIDTH, dtype=torch.float64)
    return two_passes(model, *puzzles, h, eta, relays, gradient)


def test_the_relays_gradient_is_that_of_the_whole_loss_and_the_others_leave_a_part_out(puzzles):
    """Along a direction in the weights, against the loss's own difference quotient (model.rotate
    works in fp32, hence the tolerance).
    """
    model = large().double()
    p = model.gpt.blocks[0].mlp.proj.weight
    torch.manual_seed(2)
    direction = torch.randn_like(p)

    def slope(relays, gradient):
        model.zero_grad()
        passes(model, puzzles, relays, gradient)[0].backward()
        return (p.grad * direction).sum().item()

    def quotient(relays, step=1e-5):
        ends = []
        with torch.no_grad():
            for sign in (1, -1):
                p.add_(sign * step * direction)
                ends.append(passes(model, puzzles, relays, True)[0].item())
                p.sub_(sign * step * direction)
        return (ends[0] - ends[1]) / (2 * step)

    assert slope(True, True) == pytest.approx(quotient(True), rel=1e-3)
    assert slope(False, False) == pytest.approx(quotient(False), rel=1e-3)
    assert slope(True, False) != pytest.approx(quotient(True), rel=1e-2)


def test_two_passes_fill_in_the_right_digits_and_carry_a_state_without_its_graph(puzzles):
    model = large().double()
    first = passes(model, puzzles, True, True)
    loss, canvas, h = first
    assert ((canvas == puzzles[1]) | (canvas == MASK)).all()
    filled = (canvas != MASK).sum(1) - (puzzles[0] != MASK).sum(1)
    assert (filled >= 2).all(), "one cell a pass at least"
    assert not h.requires_grad and loss.requires_grad
    # the same loss and canvas without the gradient; another one without the relay
    second = passes(model, puzzles, True, False)
    assert second[0].item() == pytest.approx(loss.item()) and torch.equal(second[1], canvas)
    assert passes(model, puzzles, False, False)[0].item() != pytest.approx(loss.item())


def test_the_loss_counts_masked_cells_alone(puzzles):
    board, solution = puzzles
    model = large()
    loss, *_ = two_passes(model, board, solution, nothing(board), 0.0, False, False)
    total = 0
    for _ in range(2):
        logits, _ = model(board, nothing(board))
        logp = logits.log_softmax(-1).gather(2, solution[..., None] - 1).squeeze(2)
        total -= logp[board == MASK].mean().item()
        board = torch.where(reveal(logits, board == MASK, 0.0), solution, board)
    assert loss.item() == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("relays", [False, True])
def test_a_board_is_filled_in_among_others_as_it_is_alone(puzzles, relays):
    model = large(1)
    filled, when = solve(model, puzzles[0], relays, 1.0)
    assert torch.equal(when == 0, puzzles[0] != MASK), "what is given is never changed"
    assert torch.equal(filled[when == 0], puzzles[0][when == 0])
    assert len(set(when.amax(1).tolist())) > 1, "some boards are full before others"
    for i in range(4):
        alone = solve(model, puzzles[0][i : i + 1], relays, 1.0)
        assert torch.equal(alone[0][0], filled[i]) and torch.equal(alone[1][0], when[i])
    for row in when.tolist():  # no pass of a board goes by without a cell
        assert set(row) - {0} == set(range(1, max(row) + 1))


def test_solving_hands_on_what_the_last_pass_thought(puzzles):
    model = large(2)
    canvas, h = puzzles[0][:1], nothing(puzzles[0][:1])
    _, when = solve(model, canvas, True, 0.0)
    for now in (1, 2, 3):
        logits, h = model(canvas, h)
        chosen = reveal(logits, canvas == MASK, 0.0)
        assert torch.equal(chosen, when == now)
        canvas = torch.where(chosen, logits.argmax(-1) + 1, canvas)


def test_full_boards_leave_the_buffer_with_all_that_was_thought_of_them(puzzles, monkeypatch):
    seen = []

    def watched(model, canvas, solution, h, eta, relays, gradient):
        seen.append((canvas.clone(), solution.clone(), h.clone()))
        return two_passes(model, canvas, solution, h, eta, relays, gradient)

    monkeypatch.setattr(relay, "two_passes", watched)
    config = Config(steps=8, batch=12, eta=4.0)
    relay.train(config, Memory(), "relay", 0, puzzles, "cpu")
    fresh = 0
    for canvas, solution, h in seen:
        assert (canvas == MASK).any(1).all(), "nothing is left to learn from a full board"
        assert ((canvas == solution) | (canvas == MASK)).all()
        empty = (h == 0).all(2).all(1)
        fresh += empty.sum().item()
        # a board that has just come is as it was given
        if seen[0][0] is not canvas:
            assert ((canvas[empty] != MASK).sum(1) == 16).all()
            assert ((canvas[~empty] != MASK).sum(1) > 16).all()
    assert fresh > 12


def test_the_plain_arm_sees_as_many_boards_in_one_pass_and_no_relay(puzzles, monkeypatch):
    seen = []
    forward = Denoiser.forward
    monkeypatch.setattr(
        Denoiser, "forward", lambda s, c, h: seen.append((c, h)) or forward(s, c, h)
    )
    config = Config(steps=2, batch=12)
    relay.train(config, Memory(), "plain", 0, puzzles, "cpu")
    assert [len(canvas) for canvas, _ in seen] == [24, 24] and not any(h.any() for _, h in seen)
    seen.clear()
    relay.train(config, Memory(), "rollout buffer", 0, puzzles, "cpu")
    assert [len(canvas) for canvas, _ in seen] == [12] * 4 and not any(h.any() for _, h in seen)


# --------------------------------------------------------------------------------------------------
# The claims, from rows


def test_between_is_linear_level_on_the_left_and_nan_on_the_right():
    x, y = np.array([[1.0, 3.0], [2.0, 4.0]]), np.array([[0.2, 0.6], [0.0, 1.0]])
    assert between(x, y, 2.5) == pytest.approx([0.5, 0.25])
    assert between(x, y, 1.5) == pytest.approx([0.3, 0.0])
    assert np.isnan(between(x, y, 3.5)).tolist() == [True, False]


def told(**shift):
    """A run whose arms solve .5 + shift of the boards in 4 passes, on straight lines."""
    run = Memory()
    for seed, arm in itertools.product((0, 1), (*ARMS, OWN)):
        for x in PASSES if arm == OWN else range(2, 2 + len(ETAS)):
            accuracy = 0.5 + shift.get(arm, 0) + 0.2 * (x - 4) + 0.02 * seed
            run.log(phase="curve", arm=arm, seed=seed, step=9, passes=x, accuracy=accuracy)
        board = dict(digits=[1] * CELLS, when=[1] * CELLS, right=[1] * 35 + [2])
        run.log(phase="picture", arm=arm, seed=seed, step=9, **board)
    return run


def claimed(run):
    fig, claims = relay.figure(Config(seeds=2), run)
    titles = " ".join(ax.get_title() for ax in fig.axes)
    plt.close(fig)
    return {c["id"]: (float(c["ours"].split()[0]), c["holds"]) for c in claims}, titles


def test_the_claims_compare_what_they_say():
    ours, titles = claimed(
        told(**{"relay": 0.2, "relay, no gradient": -0.02, "plain": -0.1, OWN: -0.4})
    )
    assert {k: v for k, (v, _) in ours.items()} == pytest.approx(
        {
            "relay": 0.2,
            "no gradient": 0.02,
            "taught": 0.22,
            "buffer": 0.1,
            "order": 0.3,
            "passes": (4.95 / 5.95),
        },
        abs=2e-3,
    )
    assert all(holds for _, holds in ours.values())
    assert "relay 0.71" in titles and "mistakes: 1" in titles


def test_arms_that_are_all_the_same_keep_no_claim_but_that_of_no_difference():
    ours, _ = claimed(told())
    assert [k for k, (_, holds) in ours.items() if holds] == ["no gradient"]
    ours, _ = claimed(told(**{"relay, no gradient": 0.1}))
    assert not any(holds for _, holds in ours.values())


# --------------------------------------------------------------------------------------------------
# The command


def test_a_quick_run_writes_figure_samples_metrics_claims_config_and_checkpoint(tmp_path):
    assert check_quick("electives.relay", tmp_path, also=("samples.txt",)) == "relay"
    text = (tmp_path / "samples.txt").read_text()
    assert all(text.count(f"    {arm} ") >= 3 for arm in ARMS)


def test_help_lists_every_flag():
    check_help("electives.relay")


@pytest.mark.parametrize("flags", ["--givens 9", "--eta -1", "--test 2", "--cells 3"])
def test_a_mistake_in_the_flags_is_one_line_and_exit_code_2(flags, tmp_path):
    check_mistake("electives.relay", flags, tmp_path)


def test_an_interrupted_run_goes_on_to_the_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(plt.Figure, "savefig", lambda self, f, **_: f.write(b"\x89PNG"))
    marks = (dict(arm=OWN), dict(phase="train", arm="relay", step=2))
    check_resume("electives.relay", tmp_path, marks, "--quick")
