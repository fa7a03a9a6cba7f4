"""electives/floq.py: mazes and exact values, flows, bins, training, claims."""

import itertools
import math

import matplotlib.pyplot as plt
import pytest
import torch
from common import Memory, check_help, check_mistake, check_quick, check_resume, seeded

from electives import floq
from electives.floq import (
    ARMS,
    CELLS,
    CENTRES,
    EDGES,
    FLOW,
    GAMMA,
    HL_GAUSS,
    INPUTS,
    MATCHED,
    PLAIN,
    READ,
    SLIP,
    STEPS,
    A,
    Categorical,
    Config,
    Flow,
    MLPs,
    Plain,
    backup,
    bell,
    distances,
    errors,
    integrate,
    interpolate,
    maze,
    pairs,
    policy,
    target,
    walk,
    world_of,
)

# --------------------------------------------------------------------------------------------------
# Mazes and exact values


@pytest.mark.parametrize("seed", range(3))
def test_a_maze_is_in_one_piece_and_a_move_leads_to_a_neighbour_or_nowhere(seed):
    cells, successor, goals = maze(seed, 3)
    assert len(set(cells)) == CELLS and len(set(goals)) == 3
    assert distances(successor, goals[0]).isfinite().all()
    for k, (cell, a) in enumerate(itertools.product(cells, floq.MOVES.values())):
        there = (cell[0] + a[0], cell[1] + a[1])
        leads = cells[successor.flatten()[k]]
        assert leads == (there if there in cells else cell)


def test_the_policy_takes_a_shortest_way_but_for_slips():
    _, successor, (goal,) = maze(0, 1)
    d = distances(successor, goal)
    pi = policy(successor, goal)
    assert torch.allclose(pi.sum(1), torch.ones(CELLS))
    closer = d[successor] == d[:, None] - 1
    closer[goal] = True  # whatever it does there: it is not asked
    assert torch.allclose((pi * closer).sum(1) - SLIP / A * closer.sum(1), torch.tensor(1 - SLIP))


def test_the_linear_system_gives_what_the_backup_repeated_converges_to():
    world = world_of([maze(0, 2), maze(1, 2)], 1, "cpu")
    v = torch.zeros(2, CELLS).double()
    for _ in range(800):
        q = backup(world, v)
        v = (world.policy * q).sum(2)
    assert torch.allclose(q, world.q, atol=1e-6)
    assert world.q.min() > -1 and world.q.max() <= -(1 - GAMMA)


def test_the_exact_value_is_the_mean_discounted_reward_of_walks():
    _, successor, (goal,) = mazes = maze(0, 1)
    world = world_of([mazes], 0, "cpu")
    start = distances(successor, goal).argsort()[CELLS // 2]
    cell = successor[start, 2].expand(20_000)  # all begin with one move
    generator = seeded()
    total = torch.full((len(cell),), GAMMA - 1)
    for n in range(1, 200):
        going = cell != goal
        total -= GAMMA**n * (1 - GAMMA) * going
        a = world.policy[0][cell].multinomial(1, generator=generator)
        cell = torch.where(going, successor[cell].gather(1, a).squeeze(1), cell)
    error = total.std() / len(total) ** 0.5
    assert abs(total.mean() - world.q[0, start, 2]) < 4 * error


def test_the_exact_values_are_their_own_target_and_have_no_error():
    world = world_of([maze(0, 1), maze(1, 1)], 0, "cpu")

    class Knows:
        def value(self, x):
            return world.q.flatten(1)

    assert torch.allclose(target(world, Knows(), None), world.q.flatten(1), atol=1e-6)
    assert errors(world, world.q.flatten(1)).tolist() == [0, 0]
    mean = world.q.flatten(1).mean(1, keepdim=True).expand(-1, CELLS * A)
    assert errors(world, mean).tolist() == pytest.approx([1, 1])


def test_a_target_is_cut_to_the_range_of_values():
    world = world_of([maze(0, 1)], 0, "cpu")
    for guess, least, most in ((5.0, -1, 0), (-5.0, -1, -1 + GAMMA)):
        critic = Plain(Config(), [0])
        critic.net.biases[2].data.fill_(guess)
        y = target(world, critic, pairs([maze(0, 1)], "cpu"))
        assert least <= y.min() and y.max() <= most


def test_a_pair_is_told_by_its_place_and_action():
    mazes = [maze(0, 1), maze(1, 1)]
    x = pairs(mazes, "cpu")
    assert x.shape == (2, CELLS * A, INPUTS)
    row, column = mazes[1][0][7]
    assert x[1, 7 * A + 2].tolist() == pytest.approx([row / 5 - 1, column / 5 - 1, 0, 0, 1, 0])


# --------------------------------------------------------------------------------------------------
# The flow


def test_the_velocity_of_a_path_is_its_derivative_and_the_path_leads_from_noise_to_target():
    z, y, t = torch.rand(3, 50, generator=seeded()).double()
    z_t, v = interpolate(z, y, t)
    later, _ = interpolate(z, y, t + 1e-6)
    assert torch.allclose((later - z_t) / 1e-6, v, atol=1e-6)
    assert torch.equal(interpolate(z, y, 0 * t)[0], z)
    assert torch.allclose(interpolate(z, y, 0 * t + 1)[0], y)


def test_the_mean_velocity_at_a_place_is_the_closed_form_for_one_target_and_for_two():
    z, t = torch.rand(2, 2_000_000, generator=seeded())
    t = 0.4 + 0.02 * (t - 0.5)  # nearly one time
    # one target: the place tells the noise
    z_t, v = interpolate(-z, torch.tensor(-0.7), t)
    near = (z_t + 0.5).abs() < 0.01
    assert v[near].mean().item() == pytest.approx((-0.7 + 0.5) / (1 - 0.4), abs=2e-3)
    # two targets that are equally likely, both of which could have come by: their mean
    y = -0.7 - 0.2 * (torch.rand(len(z), generator=seeded(1)) < 0.5)
    z_t, v = interpolate(-z, y, t)
    near = (z_t + 0.5).abs() < 0.01
    assert v[near].mean().item() == pytest.approx((-0.8 + 0.5) / (1 - 0.4), abs=4e-3)


@pytest.mark.parametrize("K", [1, 2, 3, 8, 16])
def test_euler_is_exact_on_the_closed_form_and_on_a_constant_field_whatever_k(K):
    z, y = torch.rand(2, 30, generator=seeded()).double()
    assert torch.allclose(integrate(lambda z, t: (y - z) / (1 - t), z, K), y)
    assert torch.allclose(integrate(lambda _, t: y - z, z, K), y)


def test_euler_errs_by_order_one_over_k_on_a_curved_field():
    # z' = z: z(1) = e z(0)
    error = [
        math.e - integrate(lambda z, t: z, torch.ones(1).double(), K).item() for K in (64, 128)
    ]
    assert error[0] == pytest.approx(2 * error[1], rel=0.02) and error[1] > 0


def test_a_later_step_mends_what_an_earlier_one_did_wrong():
    y = torch.tensor(-0.6).double()

    def wrong_at_first(z, t):
        return (y - z) / (1 - t) + 3.0 * (t == 0)

    z = torch.zeros(1).double()
    assert integrate(wrong_at_first, z, 1).item() == pytest.approx(2.4)
    assert integrate(wrong_at_first, z, 2).item() == pytest.approx(-0.6)


def fields(x, z, t):
    """A velocity with a known answer: the target is the mean of the pair's features."""
    return (x.mean(2, keepdim=True) - z) / (1 - t)


def test_the_flow_of_the_best_field_has_its_value_and_no_loss(monkeypatch):
    critic = Flow(Config(), [0])
    monkeypatch.setattr(critic, "velocity", fields)
    x = -torch.rand(1, 20, INPUTS, generator=seeded())
    assert torch.allclose(critic.value(x), x.mean(2), atol=1e-6)
    assert critic.loss(x, x.mean(2), seeded()).max() < 1e-6
    assert critic.loss(x, x.mean(2) + 0.1, seeded()).min() > 1e-3


def test_the_loss_draws_noise_and_time_from_their_ranges_and_reading_starts_in_the_noise():
    config = Config(kappa=0.5, noises=64)
    seen = []
    for latest in (1.0, 0.0):
        critic = Flow(config, [0], latest=latest)
        critic.velocity = lambda x, z, t: seen.append((z, t)) or 0 * z
        critic.loss(torch.zeros(1, 200, INPUTS), torch.zeros(1, 200), seeded())
    (z, t), (z_0, t_0) = seen
    z = z / (1 - t)  # the target is 0
    assert (
        -0.5 <= z.min() < -0.49
        and -0.01 < z.max() <= 0
        and z.mean().item() == pytest.approx(-0.25, abs=0.01)
    )
    assert t.max() > 0.99 and t.mean().item() == pytest.approx(0.5, abs=0.01)
    assert (t_0 == 0).all() and z_0.min() < -0.49
    # a field that is 0 leaves the noise where it is: its mean, exactly
    assert critic.value(torch.zeros(1, 3, INPUTS)).tolist()[0] == pytest.approx([-0.25] * 3)


def test_the_steps_of_a_reading_ask_at_their_times():
    critic, seen = Flow(Config(), [0], K=4), []
    critic.velocity = lambda x, z, t: seen.append(t.unique().item()) or 0 * z
    critic.value(torch.zeros(1, 3, INPUTS))
    critic.value(torch.zeros(1, 3, INPUTS), K=2)
    assert seen == [0, 0.25, 0.5, 0.75, 0, 0.5]


# --------------------------------------------------------------------------------------------------
# The rivals


def test_hl_gauss_bins_sum_to_one_and_keep_the_mean_of_every_value():
    y = torch.linspace(-1, 0, 201).double()
    mass = bell(y, EDGES.double(), 0.75 * (EDGES[1] - EDGES[0]))
    assert torch.allclose(mass.sum(1), torch.ones(201).double()) and (mass >= 0).all()
    assert (mass @ CENTRES.double() - y).abs().max() < 1e-3
    inner = (y > -0.95) & (y < -0.05)
    assert (mass @ CENTRES.double() - y)[inner].abs().max() < 2e-5


def test_a_bell_is_the_normal_law_cut_to_the_bins():
    edges = torch.tensor([-1.0, -0.5, 0.0])
    law = torch.distributions.Normal(-0.4, 0.3)
    below = law.cdf(edges)
    got = bell(torch.tensor([-0.4]), edges, 0.3)[0]
    assert torch.allclose(got, below.diff() / (below[2] - below[0]), atol=1e-6)


def test_the_categorical_loss_is_least_at_the_projection_and_its_value_is_the_targets():
    critic = Categorical(Config(), [0])
    x, y = torch.zeros(1, 4, INPUTS), torch.tensor([[-0.9, -0.33, -0.5, -0.05]])
    best = bell(y, EDGES, 0.75 * (EDGES[1] - EDGES[0])).clamp_min(1e-30).log()
    logits = best.clone().requires_grad_()
    critic.net.forward = lambda x: logits
    critic.loss(x, y, None).sum().backward()
    assert logits.grad.abs().max() < 1e-6
    assert torch.allclose(critic.value(x), y, atol=1e-3)


def test_matched_rivals_have_hardly_more_parameters_than_the_flow():
    def parameters(make):
        return sum(p.numel() for p in make(Config(), [0]).parameters())

    flow = parameters(Flow)
    for name in (MATCHED, HL_GAUSS):
        assert 1 <= parameters(ARMS[name][0]) / flow < 1.05
    assert parameters(Plain) < flow


def test_the_network_of_a_seed_hears_nothing_of_the_others():
    x = torch.randn(3, 10, INPUTS, generator=seeded())
    together = MLPs([5, 6, 7], INPUTS, 16, 1)
    alone = MLPs([6], INPUTS, 16, 1)
    for nets in (together, alone):
        assert not nets(x[: len(nets.biases[0])]).any(), "0 at the start"
        torch.nn.init.ones_(nets.weights[2])
        nets.weights[2].data *= torch.arange(1, 17)[:, None]
    assert torch.allclose(together(x)[1], alone(x[1:2])[0], atol=1e-4)


# --------------------------------------------------------------------------------------------------
# Training


def test_critics_learn_a_maze_and_their_error_is_small_when_it_is_easy(monkeypatch):
    monkeypatch.setattr(floq, "GAMMA", 0.5)  # values of the next few steps only
    config = Config(seeds=2, steps=400, eval_every=100)
    mazes = [maze(seed, 2) for seed in range(2)]
    goals = [world_of(mazes, g, "cpu") for g in range(1)]
    for arm, most in ((MATCHED, 0.7), (HL_GAUSS, 0.7), (FLOW, 0.9)):
        run = Memory()
        floq.learn(config, run, arm, goals, pairs(mazes, "cpu"))
        last = [row["error"] for row in run.rows if row["step"] == 400]
        assert len(last) == 2 and max(last) < most


def test_the_targets_change_when_it_is_time_and_when_the_goal_moves(monkeypatch):
    config = Config(seeds=1, steps=25, goals=2, eval_every=6)
    mazes = [maze(0, 2)]
    goals = [world_of(mazes, g, "cpu") for g in range(2)]
    asked = []
    make = floq.target
    monkeypatch.setattr(floq, "target", lambda w, c, x: asked.append(w) or make(w, c, x))
    floq.learn(config, Memory(), PLAIN, goals, pairs(mazes, "cpu"))
    assert [w is goals[1] for w in asked] == [False, False, True, True]  # 0, 20, 25, 40
    asked.clear()
    floq.learn(config, Memory(), "flow, K = 1", goals, pairs(mazes, "cpu"))
    assert len(asked) == 2, "one goal"


def test_the_older_weights_are_the_moving_mean_of_the_newer(monkeypatch):
    config = Config(seeds=1, steps=4, eval_every=1)
    mazes = [maze(0, 2)]
    goals = [world_of(mazes, 0, "cpu")]
    x = pairs(mazes, "cpu")
    values = {}
    for tau in (0.0, 0.5, 1.0):
        monkeypatch.setattr(floq, "TAU", tau)
        run = Memory()
        values[tau] = floq.learn(config, run, PLAIN, goals, x).value(x)
        weights = run.state[PLAIN]["model"]  # of the newer (0.), of the older (1.)
        same = torch.equal(weights["0.net.weights.1"], weights["1.net.weights.1"])
        assert same == (tau == 1)
    assert not values[0.0].any(), "as at the start"
    assert 0 < values[0.5].abs().mean() < values[1.0].abs().mean()


def test_a_walk_follows_the_best_moves_and_says_when_it_goes_in_a_circle():
    cells, successor, (goal,) = maze(0, 1)
    d = distances(successor, goal)
    start = d.argmax().item()
    text, arrives = walk(successor, -d[successor], start, goal)
    assert arrives and text.endswith(f"({d.max().int()} moves)")
    away, arrives = walk(successor, d[successor], start, goal)
    assert not arrives and "circle" in away


# --------------------------------------------------------------------------------------------------
# The claims, from rows


def told(seeds=(0, 1), **arms):
    """A run whose critics settle at these errors, at every goal."""
    known = {"plain": 0.1, MATCHED: 0.1, HL_GAUSS: 0.1, "flow, t = 0 only": 0.1}
    known |= {f"flow, K = {K}": 0.05 / K for K in STEPS} | arms
    run = Memory()
    for seed, (arm, error) in itertools.product(seeds, known.items()):
        errors = error if isinstance(error, list) else [error, error]
        for g, e in enumerate(errors[: 2 if arm in floq.FOLLOW else 1]):
            run.log(arm=arm, seed=seed, step=40 * g + 10, error=1.0)
            run.log(arm=arm, seed=seed, step=40 * g + 40, error=e * (1 + 0.1 * seed))
    for seed, K in itertools.product(seeds, STEPS):
        run.log(arm=READ, seed=seed, step=K, error=0.1)
    return run


def claimed(run):
    fig, claims = floq.figure(Config(seeds=2, steps=40, goals=2), run)
    plt.close(fig)
    return {c["id"]: (float(c["ours"].split()[0]), c["holds"]) for c in claims}


def test_the_claims_compare_what_they_say():
    ours = claimed(told())
    assert {k for k, (_, holds) in ours.items() if not holds} == {"plastic"}, "a tie does not hold"
    assert ours["steps"][0] == pytest.approx(0.05 - 0.05 / 16, rel=1e-2)
    assert ours["more"][0] == pytest.approx(0.05 / 2 - 0.05 / 8, rel=1e-2)
    assert ours["categorical"][0] == pytest.approx(1.05 * (0.1 - 0.05 / 8), rel=1e-2)
    assert ours["moved"][0] == pytest.approx(1.05 * (0.1 - 0.05 / 8) / 2, rel=1e-2)
    ours = claimed(told(**{FLOW: [0.01, 0.02], MATCHED: [0.1, 0.4]}))
    assert ours["moved"][0] == pytest.approx(1.05 * (0.4 - 0.02) / 2, rel=1e-2)
    assert ours["plastic"] == (pytest.approx(-math.log(2), rel=1e-2), True)


def test_critics_that_are_alike_keep_no_claim():
    alike = dict.fromkeys(ARMS, 0.1)
    assert not any(holds for _, holds in claimed(told(**alike)).values())


# --------------------------------------------------------------------------------------------------
# The command


def test_a_quick_run_writes_figure_samples_metrics_claims_config_and_checkpoint(tmp_path):
    assert check_quick("electives.floq", tmp_path, also=("samples.txt",)) == "floq"
    text = (tmp_path / "samples.txt").read_text()
    assert text.count("    exact        right") == 3 and text.count("G") >= 3


def test_help_lists_every_flag():
    check_help("electives.floq")


@pytest.mark.parametrize("flags", ["--goals 1", "--eval-every 2000", "--kappa 2"])
def test_a_mistake_in_the_flags_is_one_line_and_exit_code_2(flags, tmp_path):
    check_mistake("electives.floq", flags, tmp_path)


def test_an_interrupted_run_goes_on_to_the_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(plt.Figure, "savefig", lambda self, f, **_: f.write(b"\x89PNG"))
    marks = (dict(arm=FLOW, step=10), dict(arm=READ, step=2))
    check_resume("electives.floq", tmp_path, marks, "--quick")
