"""electives/metagrad.py: the derivative through a training against finite differences, a closed
form and backpropagation through the loop; its memory; the generator; the claims; the command.
"""

import itertools
import math
import weakref
from functools import partial

import matplotlib.pyplot as plt
import pytest
import torch
from common import Memory, check_help, check_mistake, check_quick, check_resume, seeded
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from electives import metagrad
from electives.metagrad import (
    ARMS,
    COLUMNS,
    GROUP,
    PICTURE,
    PROMPTS,
    ROWS,
    RULES,
    SIGNS,
    Config,
    T,
    V,
    adam,
    advantages,
    change,
    logprobs,
    losses,
    make_target,
    metagradient,
    metric,
    ones,
    pay_by_dataset,
    pay_each,
    pixels_right,
    sgd,
    train_on,
    train_step,
    train_target,
    write,
)

SCRIPT = "electives.metagrad"

# --------------------------------------------------------------------------------------------------
# The derivative, on a small regression: losses are (tanh(x a) b - y)^2, P = 4 * 3 + 3 weights


def regression(theta, batch):
    x, y = batch[:, :4], batch[:, 4]
    return ((x @ theta[:12].view(4, 3)).tanh() @ theta[12:] - y) ** 2


def problem(rule, M, n=5, seed=0):
    """A training of M steps of n examples -> step, metric, start, batches, weights."""
    g = seeded(seed)
    start = torch.zeros(1 if rule is sgd else 3, 15, dtype=torch.float64)
    start[0] = torch.randn(15, generator=g).double()
    batches = [torch.randn(n, 5, generator=g).double() for _ in range(M)]
    weights = [0.5 + torch.rand(n, generator=g).double() for _ in range(M)]
    judge = torch.randn(7, 5, generator=g).double()
    step = partial(train_step, regression, partial(rule, lr=0.05))
    return step, lambda theta: -regression(theta, judge).mean(), start, batches, weights


def unrolled(step, metric, start, batches, weights):
    """Backpropagation through the whole loop, every step's graph in memory."""
    weights = [w.clone().requires_grad_() for w in weights]
    state = start.clone().requires_grad_()
    for t, (batch, w) in enumerate(zip(batches, weights, strict=True)):
        state = step(state, t, batch, w)
    return torch.autograd.grad(metric(state[0]), weights), state.detach()


@pytest.mark.parametrize("rule", [sgd, adam])
@pytest.mark.parametrize("M", [1, 2, 3, 4, 7, 10])
def test_replay_equals_backpropagation_through_the_loop(rule, M):
    tau, last = metagradient(*problem(rule, M))
    expected, last_expected = unrolled(*problem(rule, M))
    assert torch.equal(last, last_expected)
    for got, want in zip(tau, expected, strict=True):
        assert torch.allclose(got, want, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("rule", [sgd, adam])
@pytest.mark.parametrize("M", [1, 4, 9])
def test_the_metagradient_equals_finite_differences(rule, M, h=1e-6):
    step, metric, start, batches, weights = problem(rule, M)
    tau, _ = metagradient(step, metric, start, batches, weights)
    finite = []
    for t, i in itertools.product(range(M), range(5)):
        ends = []
        for by in (h, -h):
            moved = [w.clone() for w in weights]
            moved[t][i] += by
            ends.append(metric(train_target(step, start, batches, moved)[0]).item())
        finite.append((ends[0] - ends[1]) / (2 * h))
    finite = torch.tensor(finite, dtype=torch.float64)
    assert (torch.cat(tau) - finite).norm() / finite.norm() < 1e-6


def test_one_step_of_sgd_has_the_closed_form():
    step, metric, start, (batch,), (weights,) = problem(sgd, M=1)
    (tau,), last = metagradient(step, metric, start, [batch], [weights])
    end = last[0].clone().requires_grad_()
    (goal,) = torch.autograd.grad(metric(end), end)
    slopes = torch.autograd.functional.jacobian(
        lambda th: regression(th, batch), start[0]
    )  # (n, P)
    assert torch.allclose(tau, -0.05 / len(batch) * slopes @ goal, rtol=1e-10)


@pytest.mark.parametrize("rule", [sgd, adam])
def test_the_rules_are_torchs(rule):
    step, _, start, batches, weights = problem(rule, M=5)
    state = train_target(step, start, batches, weights)
    theta = start[0].clone().requires_grad_()
    if rule is sgd:
        optimizer = torch.optim.SGD([theta], lr=0.05)
    else:
        optimizer = torch.optim.Adam([theta], lr=0.05, betas=(0.9, 0.95), eps=0)
        step = partial(train_step, regression, partial(adam, lr=0.05, root=0))
        state = train_target(step, start, batches, weights)
    for batch, w in zip(batches, weights, strict=True):
        optimizer.zero_grad()
        (w * regression(theta, batch)).mean().backward()
        optimizer.step()
    assert torch.allclose(state[0], theta, rtol=1e-10)


class Watch(TorchDispatchMode):
    """The most bytes of tensors that are alive at any time."""

    def __init__(self):
        super().__init__()
        self.seen, self.now, self.most = WeakIdKeyDictionary(), 0, 0

    def add(self, size):
        self.now += size
        self.most = max(self.most, self.now)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            storage = out.untyped_storage()
            if storage not in self.seen:
                self.seen[storage] = True
                self.add(storage.nbytes())
                weakref.finalize(storage, self.add, -storage.nbytes())
        return out


def peak(derivative, M):
    given = problem(adam, M)
    with Watch() as watch:
        derivative(*given)
    return watch.most


def test_the_memory_of_replay_grows_like_the_root_of_the_steps():
    assert peak(metagradient, M=36) < 5 * peak(metagradient, M=4)
    assert peak(unrolled, M=36) > 7 * peak(unrolled, M=4)
    assert peak(unrolled, M=36) > 2 * peak(metagradient, M=36)


def test_the_states_that_replay_keeps_are_some_two_roots_of_all(monkeypatch):
    step, metric, start, batches, weights = problem(adam, M=64)
    alive, most = weakref.WeakSet(), []
    advance = metagrad.advance

    def watched(*args):
        after = advance(*args)
        alive.add(after)
        most.append(len(alive))
        return after

    monkeypatch.setattr(metagrad, "advance", watched)
    metagradient(step, metric, start, batches, weights)
    assert 8 <= max(most) <= 18


# --------------------------------------------------------------------------------------------------
# The target and the picture


def test_the_loss_of_an_example_is_the_mean_cross_entropy_of_its_tokens():
    theta = make_target(0, "SGD")[0]
    ids = torch.randint(V, (3, T + 1), generator=seeded())
    embedding, hidden, output = theta.split([V * 32, 32 * 32, V * 32])
    for i, loss in enumerate(losses(theta, ids)):
        total = 0
        for now, then in itertools.pairwise(ids[i].tolist()):
            h = torch.tanh(embedding.view(V, 32)[now] @ hidden.view(32, 32))
            logits = output.view(V, 32) @ h
            total += logits.logsumexp(0) - logits[then]
        assert loss.item() == pytest.approx(total.item() / T)


def test_the_metric_is_minus_log_2_where_nothing_moved_and_points_to_the_picture():
    before = make_target(0, "SGD")[0]
    theta = before.clone().requires_grad_()
    value = metric(theta, before)
    assert value.item() == pytest.approx(-math.log(2))
    (slope,) = torch.autograd.grad(value, theta)
    after = before + 0.01 * slope.sign()
    assert pixels_right(after, before) == 1 and metric(after, before) > value
    assert pixels_right(before - 0.01 * slope.sign(), before) == 0
    assert (slope != 0).sum() == SIGNS.numel()


def test_row_i_and_column_j_of_the_picture_is_channel_i_of_token_j():
    before = make_target(0, "SGD")[0]
    after = before.clone()
    after[-V * 32 :].view(V, 32)[3, 5] += 1  # token 3, channel 5
    moved = change(after, before)
    assert moved.shape == (ROWS, COLUMNS) and moved[5, 3] == 1 and moved.sum() == 1


# --------------------------------------------------------------------------------------------------
# The generator, and what it is paid


def test_examples_are_drawn_from_the_table_and_scored_as_they_are_drawn():
    table = torch.randn(V, V, generator=seeded()) * 2
    ids = write(table, torch.full((4000,), 7), seeded(1))
    assert ids.shape == (4000, T + 1) and (ids[:, 0] == 7).all()
    p = table[7].softmax(-1)
    seen = ids[:, 1].bincount(minlength=V)
    often = 4000 * p > 5
    chi2 = ((seen - 4000 * p) ** 2 / (4000 * p))[often].sum().item()
    assert chi2 < often.sum() + 5 * (2 * often.sum()) ** 0.5
    # p(a, b | 7) of all pairs sums to 1
    pairs = torch.cartesian_prod(torch.tensor([7]), torch.arange(V), torch.arange(V))
    assert logprobs(table, pairs).exp().sum().item() == pytest.approx(1, rel=1e-4)
    logp = table.log_softmax(-1)
    by_hand = sum(logp[a, b] for a, b in itertools.pairwise(ids[0].tolist()))
    assert logprobs(table, ids)[0].item() == pytest.approx(by_hand.item(), rel=1e-5)


def setting(rule="SGD"):
    prompts = torch.arange(PROMPTS).repeat_interleave(GROUP)
    ids = write(torch.zeros(V, V), prompts, seeded())
    start = make_target(0, rule)
    return partial(train_step, losses, RULES[rule]), partial(metric, before=start[0]), start, ids


@pytest.mark.parametrize("rule", RULES)
def test_each_example_is_paid_its_own_derivative(rule, h=1e-4):
    step, goal, start, ids = setting(rule)
    reward, theta = pay_each(step, goal, start, ids, 4, seeded(1))
    order = torch.randperm(len(ids), generator=seeded(1))
    batches = ids[order].chunk(4)
    assert torch.equal(theta, train_target(step, start, batches, ones(batches))[0])
    for i in (0, 100, 255):
        ends = []
        for by in (h, -h):
            weights = torch.ones(len(ids), dtype=torch.float64)
            weights[i] += by
            last = train_target(step, start, batches, weights[order].chunk(4))
            ends.append(goal(last[0]).item())
        assert reward[i].item() == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=1e-4)


def test_paid_by_dataset_all_of_a_dataset_get_the_metric_of_its_own_target():
    step, goal, start, ids = setting()
    reward, theta = pay_by_dataset(step, goal, start, ids, 4, seeded(1))
    reward = reward.view(PROMPTS, GROUP)
    assert (reward == reward[0]).all() and len(set(reward[0].tolist())) == GROUP
    generator = seeded(1)
    for k in range(GROUP):
        alone = train_on(step, start, ids.view(PROMPTS, GROUP, -1)[:, k], 4, generator)
        assert reward[0, k] == goal(alone)
    assert torch.equal(theta, train_on(step, start, ids, 4, generator))


def test_advantages_compare_within_a_group_and_equal_rewards_give_exactly_0():
    reward = torch.tensor([[1.0, 2.0, 3.0], [101.0, 102.0, 103.0], [7.0, 7.0, 7.0]])
    assert torch.allclose(advantages(reward)[:2], torch.tensor([[-1.0, 0.0, 1.0]] * 2))
    assert (advantages(reward)[2] == 0).all()


# --------------------------------------------------------------------------------------------------
# The claims, from rows


def told(error=1e-7, **pixels):
    """A run of two seeds in which each arm ends with this share of right pixels."""
    ends = {"SGD": 0.99, "Adam": 0.96, "by dataset": 0.8, "by dataset, 4 times the data": 0.9}
    run = Memory()
    for seed in (0, 1):
        for rule in RULES:
            exact = [1.0 + error, 1.0 - error]
            run.log(rule=rule, seed=seed, step=0, exact=exact, finite=[1.0, 1.0])
        for arm, value in {**ends, **pixels}.items():
            steps = 20 * ARMS[arm][2]
            for step in range(1, steps + 1):
                row = dict(pixels=value if step > steps - 10 else 0.5)
                if step in (1, steps):
                    row["change"] = (SIGNS * 0.1).tolist()
                run.log(arm=arm, seed=seed, step=step, **row)
    return run


def claimed(run):
    fig, claims = metagrad.figure(Config(seeds=2, steps=20), run)
    plt.close(fig)
    return {c["id"]: (float(c["ours"].split()[0]), c["holds"]) for c in claims}


def test_the_claims_compare_what_they_say():
    ours = claimed(told())
    values = {k: v for k, (v, _) in ours.items()}
    assert values.pop("SGD exact") == values.pop("Adam exact") == pytest.approx(1e-7, rel=1e-2)
    assert values == pytest.approx(
        {"SGD": 0.99, "Adam": 0.96, "dataset": 0.8, "gain": 0.19, "longer": 0.09}
    )
    assert all(holds for _, holds in ours.values())


def test_each_claim_can_fail():
    ours = claimed(told(error=1e-4, SGD=0.9, Adam=0.94, **{"by dataset": 0.9}))
    assert [k for k, (_, holds) in ours.items() if holds] == []


def test_what_is_read_from_the_weights_is_marked_by_the_picture():
    run = told()
    read = metagrad.read_picture(run, 0, -1)
    assert [text for text, _ in read] == list(PICTURE) and all(right for _, right in read)
    metagrad.pictures(run, "SGD", 0)[0]["change"][2][0] *= -1
    assert [right for _, right in metagrad.read_picture(run, 0, 0)].count(False) == 1


# --------------------------------------------------------------------------------------------------
# The command


def test_a_quick_run_writes_figure_samples_metrics_claims_config_and_checkpoint(tmp_path):
    assert check_quick(SCRIPT, tmp_path, also=("samples.txt",)) == "metagrad"
    assert (tmp_path / "samples.txt").read_text().count(" last step ") == len(PICTURE)


def test_help_lists_every_flag():
    check_help(SCRIPT)


@pytest.mark.parametrize("flags", ["--inner 0", "--inner 17", "--device cuda", "--rule Adam"])
def test_a_mistake_in_the_flags_is_one_line_and_exit_code_2(flags, tmp_path):
    check_mistake(SCRIPT, flags, tmp_path)


def test_an_interrupted_run_goes_on_to_the_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(plt.Figure, "savefig", lambda self, f, **_: f.write(b"\x89PNG"))
    marks = dict(arm="SGD", step=1), dict(arm="by dataset", step=2)
    check_resume(SCRIPT, tmp_path, marks, "--quick")
