"""electives/backtrack.py: every law against matrices and enumeration, every sampler against its
law, the tree (tasks/trees.py) against the model, the brackets (tasks/dyck.py), and the command.
"""

import itertools
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from common import check_help, check_mistake, check_quick, check_resume, make

import tasks
from electives import backtrack as bt
from tasks import dyck, trees
from tasks.trees import distance, reach, target, true_value


def ragged(seed=0, H=3, ties=False):
    """A tree with one to three children a prefix, random priors and values, some of them 0."""
    rng = np.random.default_rng(seed)
    token, parent, prior, value, starts = [0], [0], [1.0], [0.7], [0, 1]
    for h in range(H):
        for v in range(starts[h], starts[h + 1]):
            n = int(rng.integers(1, 4))
            token += range(n)
            parent += [v] * n
            prior += list(rng.dirichlet(np.ones(n)))
            value += list(rng.choice([0.5, 1.0], n) if ties else rng.random(n) + 0.1)
        starts.append(len(token))
    value = np.array(value)
    value[-2:] = 0  # two answers are wrong
    return trees.Tree(np.array(token), np.array(parent), np.array(prior), value, starts)


def matrix(tree):
    """The lazy walk's transition matrix, from the definition, prefix by prefix."""
    N = len(tree.value)
    P = np.zeros((N, N))
    for v in range(N):
        weight = {u: tree.prior[u] * tree.value[u] for u in range(1, N) if tree.parent[u] == v}
        if v:
            weight[tree.parent[v]] = tree.value[v]
        total = sum(weight.values())
        for u, w in weight.items():
            P[v, u] = w / total / 2 if total else 0
        P[v, v] = 1 - P[v].sum()
    return P


def answers(tree):
    """Each whole answer's prefixes, by walking up from its leaf."""
    for leaf in range(tree.starts[tree.H], len(tree.value)):
        path = [leaf]
        while path[-1]:
            path.append(tree.parent[path[-1]])
        yield path[::-1]


def chi_squared(counts, p):
    """How many standard deviations Pearson's statistic is above its mean."""
    keep = p > 0
    assert counts[~keep].sum() == 0
    expected = counts.sum() * p[keep]
    statistic = ((counts[keep] - expected) ** 2 / expected).sum()
    degrees = keep.sum() - 1
    return (statistic - degrees) / np.sqrt(2 * degrees)


@pytest.mark.parametrize("seed", range(3))
def test_the_walk_is_the_matrix_of_its_definition(seed):
    tree = ragged(seed)
    P = matrix(tree)
    law = np.eye(len(P))[0]
    for ours in bt.vgb(tree, 30):
        law = law @ P
        np.testing.assert_allclose(ours, law, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_at_rest_the_walk_ends_at_the_target_whatever_the_verifier_says_within(seed):
    tree = ragged(seed)
    rest = np.linalg.matrix_power(matrix(tree), 2**14)[0]
    leaves = tree.level(tree.H)
    np.testing.assert_allclose(rest[leaves] / rest[leaves].sum(), target(tree), atol=1e-9)
    *_, ours = bt.vgb(tree, 4000)
    np.testing.assert_allclose(ours, rest, atol=1e-9)


def test_with_true_values_a_leaf_is_met_once_in_two_h_steps():
    tree = trees.full(3, 4, trees.no_c)
    *_, law = bt.vgb(tree, 4000)
    assert law[tree.level(4)].sum() == pytest.approx(1 / 8)


@pytest.mark.parametrize("seed", range(3))
def test_the_lift_rests_at_the_target_too(seed):
    tree = ragged(seed)
    laws = list(bt.momentum(tree, 20000))
    np.testing.assert_allclose([law.sum() for law in laws[:50]], 1)
    mean = np.mean(laws[10000:], 0)
    into, back, _ = bt.weights(tree)
    rest = reach(tree, tree.prior) * np.maximum(tree.sum(into), back)
    np.testing.assert_allclose(mean, rest / rest.sum(), atol=1e-3)
    leaves = tree.level(tree.H)
    assert distance(mean[leaves], target(tree)) < 3e-3


def lifted_matrix(tree):
    """The transition matrix of (prefix, direction), from the definition: down first, then up."""
    N = len(tree.value)
    P = np.zeros((2 * N, 2 * N))
    for v in range(N):
        children = {u: tree.prior[u] * tree.value[u] for u in range(1, N) if tree.parent[u] == v}
        forth = sum(children.values())
        back = tree.value[v] if v else 0.0
        larger = max(forth, back) or 1.0
        for u, w in children.items():
            P[v, u] = w / larger
        P[v, N + v] = max(back - forth, 0) / larger
        P[N + v, N + tree.parent[v]] += back / larger
        P[N + v, v] += max(forth - back, 0) / larger
    return P


@pytest.mark.parametrize("seed", range(3))
def test_the_lift_is_the_matrix_of_its_definition(seed):
    tree = ragged(seed)
    P = lifted_matrix(tree)
    N = len(tree.value)
    law = np.eye(2 * N)[0]
    for ours in bt.momentum(tree, 30):
        law = law @ P
        np.testing.assert_allclose(ours, law[:N] + law[N:], atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_the_first_leaf_is_that_of_an_absorbing_matrix(seed):
    tree = ragged(seed)
    N, inner = len(tree.value), tree.starts[tree.H]
    within = [*range(inner), *range(N, N + inner)]
    P = lifted_matrix(tree)
    visits = np.linalg.inv(np.eye(2 * inner) - P[np.ix_(within, within)])[0]
    exact = visits @ P[np.ix_(within, range(inner, N))]
    ours = sum(bt.momentum(tree, 3000, to_leaf=True))[tree.leaves]
    np.testing.assert_allclose(ours, exact, atol=1e-9)
    assert exact.sum() == pytest.approx(1)


@pytest.mark.parametrize("seed", range(3))
def test_true_values_and_the_target_are_those_of_enumeration(seed):
    tree = ragged(seed)
    value = np.zeros(len(tree.value))
    weight = []
    for path in answers(tree):
        tau = tree.value[path[-1]]
        for h, v in enumerate(path):
            value[v] += np.prod(tree.prior[path[h + 1 :]]) * tau
        weight.append(np.prod(tree.prior[path]) * tau)
    np.testing.assert_allclose(true_value(tree), value)
    np.testing.assert_allclose(target(tree), np.array(weight) / sum(weight))


@pytest.mark.parametrize("seed", range(3))
def test_action_level_sampling_is_exact_with_true_values_only(seed):
    tree = ragged(seed)
    leaves = tree.level(tree.H)
    true = replace(tree, value=true_value(tree))
    exact = reach(true, bt.action_level(true))[leaves]
    np.testing.assert_allclose(exact, target(tree), atol=1e-12)
    assert distance(reach(tree, bt.action_level(tree))[leaves], target(tree)) > 0.01


def brute_force_blocks(tree, length, M):
    """The law of the leaves, over all M-tuples of candidates of every block."""
    law = {0: 1.0}
    for h in range(0, tree.H, length):
        end = min(h + length, tree.H)
        after = {}
        for v, mass in law.items():
            blocks = {}
            for path in answers(tree):
                if path[h] == v:
                    blocks[path[end]] = np.prod(tree.prior[path[h + 1 : end + 1]])
            for drawn in itertools.product(blocks, repeat=M):
                p = mass * np.prod([blocks[u] for u in drawn])
                best = max(tree.value[u] for u in drawn)
                winners = [u for u in drawn if tree.value[u] == best]
                for u in winners:
                    after[u] = after.get(u, 0) + p / len(winners)
        law = after
    return np.array([law.get(v, 0) for v in range(tree.starts[tree.H], len(tree.value))])


@pytest.mark.parametrize("lifted", [False, True])
def test_sampled_walks_follow_the_law(lifted):
    tree = ragged(1)
    *_, law = (bt.momentum if lifted else bt.vgb)(tree, 12)
    nodes = bt.sample_walk(tree, 12, 20000, np.random.default_rng(0), lifted)[:, -1]
    law = np.where(law < 1e-12, 0, law)
    assert abs(chi_squared(np.bincount(nodes, minlength=len(law)), law)) < 4


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("length,M", [(1, 2), (2, 2), (3, 1), (3, 2)])
def test_block_best_of_n_follows_the_law_of_enumeration(length, M, ties):
    tree = ragged(3, ties=ties)
    law = brute_force_blocks(tree, length, M)
    asked = trees.sample_blocks(tree, tree.prior, length, M, 20000, np.random.default_rng(0))
    assert asked.shape == (20000, M * -(-tree.H // length))
    last = asked[:, -M:]
    kept = last[np.arange(20000), tree.value[last].argmax(1)] - tree.starts[tree.H]
    assert abs(chi_squared(np.bincount(kept, minlength=len(law)), law)) < 4


def test_action_level_answers_follow_the_law():
    tree = ragged(2)
    policy = bt.action_level(tree)
    law = reach(tree, policy)[tree.level(tree.H)]
    asked = trees.sample_blocks(tree, policy, 1, 1, 20000, np.random.default_rng(0))
    counts = np.bincount(asked[:, -1] - tree.starts[tree.H], minlength=len(law))
    assert abs(chi_squared(counts, law)) < 4


def test_a_prefix_is_paid_for_once():
    price = np.array([3.0, 3.0, 3.0, 0.0, 0.0])
    asked = np.array([[1, 0, 1, 3, 2], [1, 2, 1, 2, 4], [1, 1, 1, 1, 1]])
    calls = trees.calls_until(asked, asked >= 3, price)
    assert calls.tolist() == [6, 9, np.inf]


@pytest.mark.parametrize("kind", bt.FAULTS)
def test_the_faults_are_within_and_whole_answers_are_judged_exactly(kind):
    H = 4
    tree = bt.FAULTS[kind][0](H)
    true = true_value(tree)
    leaves = tree.level(H)
    np.testing.assert_array_equal(tree.value[leaves], true[leaves])
    for path in answers(tree):
        tokens = tree.token[path[1:]]
        ones = (tokens == 1).sum()
        tau = float(2 not in tokens) if kind == "perturbed" else np.exp(2.0 * ones)
        assert tree.value[path[-1]] == pytest.approx(tau)
        for h in range(1, H):
            twice = true[path[h]] * (1 + (tokens[h - 1] == 0))
            late = true[path[h - 1]]
            wrong = twice if kind == "perturbed" else late
            assert tree.value[path[h]] == pytest.approx(wrong)


# --------------------------------------------------------------------------------------------------
# The tree of a model


def models():
    """A base of four tokens and one that ends, and a verifier of one logit."""
    base, verifier = (make(seed, vocab_size=dyck.tokenizer.n_vocab) for seed in (0, 1))
    verifier.lm_head = torch.nn.Linear(verifier.config.n_embd, 1, bias=False)
    return base, verifier


def test_the_tree_has_the_models_own_probabilities_and_values(monkeypatch):
    monkeypatch.setattr(trees, "FEWEST", 0.0)
    base, verifier = models()
    tree = bt.tree_of(base, verifier, "([(")
    assert tree.starts == [0, 1, 5, 21, 85]
    logp = np.log(reach(tree, tree.prior))
    for path in list(answers(tree))[::7]:
        y = tree.token[path[1:]].tolist()
        assert tree.tokens(path[-1]) == y
        ids = torch.tensor([dyck.tokenizer.encode("([(") + y])
        with torch.no_grad():
            exact = base(ids)[0, 2:-1, :4].log_softmax(-1).gather(1, torch.tensor(y)[:, None])
            values = verifier(ids)[0, 2:, 0].sigmoid()
        assert logp[path[-1]] == pytest.approx(exact.sum().item(), abs=1e-4)
        np.testing.assert_allclose(tree.value[path[:-1]], values[:-1], atol=1e-5)
        assert tree.value[path[-1]] == dyck.reward("([(", dyck.tokenizer.decode(y))


def test_rare_tokens_are_cut_and_siblings_stand_side_by_side():
    tree = bt.tree_of(*models(), "([((")
    assert (np.diff(tree.parent[1:]) >= 0).all()
    assert tree.prior.min() >= trees.FEWEST
    np.testing.assert_allclose(tree.sum(tree.prior)[: tree.starts[tree.H]], 1)


def test_the_verifier_learns_from_what_the_base_wrote_and_from_nothing_else():
    config = bt.Config(size=4, rollouts=64)
    base, _ = models()
    words, right, written = bt.roll_out(config, base, 0)
    assert words.shape == (64, 8) and right.shape == (64,) and written.shape == (64, 4)
    for word, seen in zip(words.tolist(), written.tolist(), strict=True):
        # of what came before the base went on, no value is learnt
        n = int(4 - sum(seen))
        assert seen == [0.0] * n + [1.0] * (4 - n)
        assert "[" not in dyck.tokenizer.decode(word[: 4 + n + 1 if n else 4])
    assert set(written.sum(1).tolist()) == {2.0, 3.0, 4.0}
    logits = torch.randn(64, 4, requires_grad=True)
    loss = bt.value_loss(logits, right, written)
    loss.backward()
    p = logits.sigmoid()
    exact = -(right[:, None] * p.log() + (1 - right[:, None]) * (1 - p).log())
    assert loss.item() == pytest.approx(exact[written == 1].mean().item(), abs=1e-5)
    assert (logits.grad[written == 0] == 0).all()


# --------------------------------------------------------------------------------------------------
# Brackets


def balanced(text):
    """By taking out pairs until none is left."""
    while True:
        shorter = text.replace("()", "").replace("[]", "")
        if shorter == text:
            return text == ""
        text = shorter


def test_the_reward_is_that_of_taking_out_pairs():
    for word in itertools.product("()[]", repeat=6):
        text = "".join(word)
        problem, answer = text[:3], text[3:]
        wanted = balanced(text) and "[" not in text
        assert dyck.reward(problem, answer) == wanted
        assert (dyck.still_open(text) == []) == balanced(text)
    assert dyck.reward("(", ")()") == dyck.reward("((", "))()") == 0  # balanced, but too long


def test_authors_close_well_and_open_round_as_seldom_as_said():
    rng = random.Random(0)
    opened = ""
    for _ in range(1000):
        problem = dyck.draw(rng)
        answer = dyck.demonstrate(rng, problem)
        assert len(problem) == len(answer) == dyck.SIZE
        assert balanced(problem + answer) and "[" not in problem
        opened += answer.replace(")", "").replace("]", "")
    assert opened.count("(") / len(opened) == pytest.approx(dyck.ROUND, abs=0.03)


def test_held_out_problems_are_apart():
    rng = random.Random(0)
    for size in range(4, 11):  # all that the flag allows
        ours, theirs = ({dyck.draw(rng, size, held) for _ in range(100)} for held in (False, True))
        assert ours and theirs and not ours & theirs
    task = tasks.load("dyck")
    assert all(hasattr(task, name) for name in tasks.NAMES)


# --------------------------------------------------------------------------------------------------
# The command


def test_quick(tmp_path):
    assert check_quick("electives.backtrack", tmp_path, also=("samples.txt",)) == "backtrack"


def test_help():
    check_help("electives.backtrack")


@pytest.mark.parametrize("flags", ["--size 11", "--size 3", "--problems 0", "--rollouts none"])
def test_a_mistake_is_one_line(flags, tmp_path):
    check_mistake("electives.backtrack", flags, tmp_path)


def test_resume(tmp_path):
    marks = dict(phase="noise", sd=0.5), dict(phase="verifier", step=0)
    check_resume("electives.backtrack", tmp_path, marks, "--quick")
