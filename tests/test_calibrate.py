"""electives/calibrate.py: scoring rules by enumeration, the judges of forecasts by brute force,
what a model says exactly against what it samples, the loss against its exact gradient, the command.
"""

import copy
import itertools
import random

import matplotlib.pyplot as plt
import pytest
import torch
from common import Memory, check_help, check_mistake, check_quick, check_resume, seeded

from electives import calibrate
from electives.calibrate import (
    ASK,
    FACTS,
    FORECASTS,
    N_VALUES,
    RULES,
    SAID,
    WORDS,
    Config,
    accuracy,
    agreement,
    auroc,
    brier,
    ece,
    joint,
    questions,
    recalibrated,
    rewards,
    rl_loss,
    tabled,
)
from engine import generate
from model import GPT, GPTConfig

N = len(WORDS)


def small(facts=4, seed=0):
    """A model whose weights are large, so that what it says depends on what it is asked."""
    torch.manual_seed(seed)
    shape = GPTConfig(FACTS + facts, block_size=4, n_layer=1, n_head=2, n_embd=16, tie=False)
    model = GPT(shape)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
        # as after imitation: nearly all answers are a value and a word
        model.lm_head.weight[ASK:] *= 0.1
    return model


def answers(seed, n=60):
    """Random answers: the index of each one's word, and whether it is right."""
    rng = random.Random(seed)
    return [(rng.choice((0, 3, 5, 8, 10)), rng.random() < 0.6) for _ in range(n)]


def counted(said):
    table = torch.zeros(N, 2)
    for word, right in said:
        table[word, int(right)] += 1 / len(said)
    return table


# --------------------------------------------------------------------------------------------------
# Scoring rules


def expected(rule, p):
    """The mean reward of each word where the chance of being right is p (11,)."""
    c = FORECASTS.double()
    return p * rule(c, torch.tensor(1.0)) + (1 - p) * rule(c, torch.tensor(0.0))


@pytest.mark.parametrize("p", [i / 100 for i in range(101) if i % 10 != 5])
def test_the_proper_rule_pays_most_for_the_word_nearest_to_the_chance(p):
    assert expected(RULES["proper"], p).argmax() == round(10 * p)


@pytest.mark.parametrize("p", [0.01, 0.2, 0.49, 0.51, 0.8, 0.99])
def test_the_improper_rules_pay_most_for_an_end(p):
    assert expected(RULES["absolute"], p).argmax() == (N - 1 if p > 0.5 else 0)
    assert expected(RULES["product"], p).argmax() == N - 1


def test_a_reward_is_the_rules_and_what_is_no_word_gets_nothing():
    words = torch.tensor([[SAID.start, SAID.stop - 1, ASK, FACTS], [SAID.start + 3, 0, 19, ASK]])
    right = torch.tensor([True, False])
    got = rewards(RULES["proper"], words, right)
    assert torch.allclose(got, torch.tensor([[0.0, 1.0, 0.0, 0.0], [1 - 0.3**2, 0.0, 0.0, 0.0]]))


# --------------------------------------------------------------------------------------------------
# The judges


@pytest.mark.parametrize("seed", range(5))
def test_the_measures_of_a_table_equal_those_of_its_answers_one_by_one(seed):
    said = answers(seed)
    table = counted(said)
    c = [FORECASTS[word].item() for word, _ in said]
    right = [float(r) for _, r in said]
    assert accuracy(table).item() == pytest.approx(sum(right) / len(said))
    squares = [(a - b) ** 2 for a, b in zip(c, right, strict=True)]
    assert brier(table).item() == pytest.approx(sum(squares) / len(said), rel=1e-5)
    gap = 0
    for word in range(N):
        of_word = [r for w, r in said if w == word]
        gap += abs(len(of_word) * word / 10 - sum(of_word)) / len(said)
    assert ece(table).item() == pytest.approx(gap, rel=1e-5)
    pairs = [(a, b) for a, r in zip(c, right, strict=True) if r for b, s in said if not s]
    wins = [(a > b / 10 + 1e-6) + (abs(a - b / 10) < 1e-6) / 2 for a, b in pairs]
    assert auroc(table).item() == pytest.approx(sum(wins) / len(pairs), rel=1e-5)


def test_one_constant_word_can_have_no_calibration_error_and_knows_nothing():
    table = torch.zeros(N, 2)
    table[5] = torch.tensor([0.5, 0.5])
    assert ece(table) == 0 and auroc(table) == 0.5 and brier(table) == 0.25


@pytest.mark.parametrize("seed", range(5))
def test_a_recalibrated_reader_errs_by_half_a_word_at_most_on_what_it_was_made_from(seed):
    table = counted(answers(seed))
    again = recalibrated(table, table)
    assert ece(again) <= 0.05 + 1e-6 and accuracy(again).item() == pytest.approx(accuracy(table))
    assert brier(again) <= brier(table) + 1e-6, "the nearest word to the mean has the least error"


def test_words_that_mean_nothing_become_one_word_when_recalibrated():
    table = torch.rand(N, 1, generator=seeded()) * torch.tensor([[0.58, 0.42]])
    table /= table.sum()
    again = recalibrated(table, table)
    assert again[4].tolist() == pytest.approx([0.58, 0.42]) and again.sum().item() == pytest.approx(
        1
    )


# --------------------------------------------------------------------------------------------------
# What a model says


def test_the_exact_law_of_answers_is_that_of_two_plain_passes():
    model = small()
    ids = questions([0, 3], "cpu")
    p = joint(model, ids)
    assert p.shape == (2, N_VALUES, N) and torch.allclose(p.sum((1, 2)), torch.ones(2))
    for i, value in itertools.product(range(2), (0, 7, 19)):
        read = torch.cat((ids[i], torch.tensor([value])))[None]
        logits = model(read)[0].detach()
        value_p = logits[1, :N_VALUES].softmax(-1)[value]
        word_p = logits[2, SAID].softmax(-1)
        assert torch.allclose(p[i, value], value_p * word_p, atol=1e-6)


def follows(seen, mean):
    """Whether Pearson's statistic of the cells with a mean above 5 is no more than chance."""
    often = mean > 5
    chi2, cells = ((seen - mean) ** 2 / mean)[often].sum().item(), int(often.sum())
    assert cells > 10
    return chi2 < cells + 5 * (2 * cells) ** 0.5


def test_sampled_answers_have_the_exact_law_chi_squared():
    model = small(seed=1)
    asked = questions([2], "cpu")
    rollout = generate(model, asked.tolist(), 40_000, max_new_tokens=2, generator=seeded())
    value, word = rollout.ids[:, 2], rollout.ids[:, 3] - SAID.start
    legal = (value < N_VALUES) & (word >= 0) & (word < N)
    seen = torch.zeros(N_VALUES, N).index_put_(
        (value[legal], word[legal]), torch.ones(int(legal.sum())), accumulate=True
    )
    p = joint(model, asked)[0]
    values = value[value < N_VALUES].bincount(minlength=N_VALUES)
    assert follows(values, p.sum(1) * values.sum())
    # words, of each value by itself
    assert follows(seen, p / p.sum(1, keepdim=True) * seen.sum(1, keepdim=True))
    assert not follows(seen, p.roll(1, 1) / p.sum(1, keepdim=True) * seen.sum(1, keepdim=True))


def test_the_table_is_the_share_of_each_word_among_right_and_wrong_answers():
    p = torch.rand(3, N_VALUES, N, generator=seeded())
    p /= p.sum((1, 2), keepdim=True)
    truth = torch.tensor([4, 0, 19])
    table = torch.zeros(N, 2)
    for i, value, word in itertools.product(range(3), range(N_VALUES), range(N)):
        table[word, int(value == truth[i])] += p[i, value, word] / 3
    assert torch.allclose(tabled(p, truth), table, atol=1e-6)


def test_agreement_says_the_share_of_samples_with_the_same_value():
    p = torch.zeros(1, N_VALUES, N)
    p[0, 3, :2] = 0.34  # .68 together: nearest to .7
    p[0, 5, 10] = 0.32
    says = agreement(p)
    assert says[0, 3, 7] == pytest.approx(0.68) and says[0, 5, 3] == pytest.approx(0.32)
    assert says.sum().item() == pytest.approx(1)


# --------------------------------------------------------------------------------------------------
# The loss


def plain(**choices):
    return Config(facts=4, **{**dict(beta=0.0, entropy=0.0, steps=10), **choices})


def gradient(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_the_mean_over_all_pairs_of_words_is_the_exact_gradient_times_one_minus_1_over_n():
    model = small(facts=1).double()
    V = FACTS + 1
    ids = torch.tensor([[ASK, FACTS, 3]])
    pays = rewards(RULES["proper"], torch.arange(V)[None], torch.tensor([True]))[0].double()  # (V,)
    p = model(ids)[0, 2].softmax(-1)
    exact = gradient(model, -(p * pays).sum())
    pairs = torch.cartesian_prod(torch.arange(V), torch.arange(V))  # (V * V, 2)
    weight = (p[pairs[:, 0]] * p[pairs[:, 1]]).detach()
    # the loss is a mean over rows: weigh each row's advantage, which is linear in its reward
    rows = ids.expand(len(pairs), 3)
    reward = pays[pairs] * weight[:, None] * len(pairs)
    got = gradient(model, rl_loss(plain(), model, model, rows, pairs, reward, step=0))
    assert torch.allclose(got, exact / 2, atol=1e-6)


def test_rewards_that_are_equal_for_a_value_teach_nothing():
    model = small()
    ids = torch.tensor([[ASK, FACTS, 3], [ASK, FACTS, 4]])
    words = SAID.start + torch.tensor([[0, 10, 4], [1, 5, 5]])
    reward = torch.tensor([[0.9] * 3, [0.1] * 3])  # a right value is worth more: not its word
    got = gradient(model, rl_loss(plain(), model, model, ids, words, reward, step=0))
    assert got.abs().max() < 1e-7


def test_the_kl_is_that_of_the_values_and_pulls_the_model_back():
    model, imitator = small(seed=2), small(seed=3)
    ids = torch.tensor([[ASK, FACTS, 3], [ASK, FACTS + 1, 4]])
    words = torch.full((2, 2), SAID.start)
    reward = torch.ones(2, 2)

    def kl(weight=1.0):
        return rl_loss(plain(beta=weight), model, imitator, ids, words, reward, step=0)

    p, q = (m(ids[:, :2])[:, 1].softmax(-1) for m in (model, imitator))
    assert kl().item() == pytest.approx((p * (p / q).log()).sum(1).mean().item(), rel=1e-5)
    assert kl(4.0).item() == pytest.approx(4 * kl().item())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    before = kl().item()
    for _ in range(10):
        optimizer.zero_grad()
        kl().backward()
        optimizer.step()
    assert kl().item() < before
    assert all(p.grad is None for p in imitator.parameters())


def test_the_entropy_of_the_words_counts_less_and_less_and_nothing_in_the_last_fifth():
    model = small()
    ids = torch.tensor([[ASK, FACTS, 3]])
    words, reward = torch.full((1, 2), SAID.start), torch.ones(1, 2)
    p = model(ids)[0, 2].softmax(-1)
    config = plain(entropy=0.5)
    values = [
        rl_loss(config, model, model, ids, words, reward, step).item() for step in (0, 4, 8, 9)
    ]
    bonus = 0.5 * (p * p.log()).sum().item()
    assert values == pytest.approx([bonus, bonus / 2, 0, 0], abs=1e-5)


# --------------------------------------------------------------------------------------------------
# Training


def test_rl_asks_for_the_first_half_of_the_facts_only_and_leaves_embeddings_alone(monkeypatch):
    config = Config(facts=20, steps=3, questions=8)
    truth, _ = calibrate.world(config, 0, "cpu")
    imitator = small(facts=20)
    before = copy.deepcopy(imitator)
    seen = []
    ask = calibrate.questions
    monkeypatch.setattr(calibrate, "questions", lambda f, d: seen.extend(f) or ask(f, d))
    run = Memory()

    def no_measure(model):
        return dict(ECE=0.0, AUROC=0.0)

    model = calibrate.reinforce(config, run, "proper", 0, truth, imitator, no_measure)
    assert len(seen) == 24 and max(seen) < 10
    assert torch.equal(model.wte.weight, before.wte.weight)
    assert not torch.equal(model.lm_head.weight, before.lm_head.weight)
    for a, b in zip(imitator.parameters(), before.parameters(), strict=True):
        assert torch.equal(a, b), "the imitator stands still"


# --------------------------------------------------------------------------------------------------
# The claims, from rows


def row(word_right, word_wrong, share):
    """Answers of which a share is right, with one word for the right and one for the wrong ones."""
    table = torch.zeros(N, 2)
    table[word_right, 1] += share
    table[word_wrong, 0] += 1 - share
    return calibrate.judged(table)


def told(seeds=(0, 1), **arms):
    """A run whose arms end with these rows; before RL all is said with the last word."""
    run = Memory()
    arms = {
        **dict(proper=(9, 1, 0.6), absolute=(10, 0, 0.6), product=(10, 10, 0.6)),
        **{"one word for all": (6, 6, 0.6), "agreement, calibrated": (8, 2, 0.6)},
        **{"agreement": (5, 1, 0.6)},
        **arms,
    }
    for seed, (arm, words) in itertools.product(seeds, arms.items()):
        if arm in RULES:
            run.log(arm=arm, seed=seed, step=0, **row(10, 10, 0.6))
        run.log(arm=arm, seed=seed, step=40 * (arm in RULES), **row(*words))
    return run


def claimed(run):
    fig, claims = calibrate.figure(Config(seeds=2, steps=40), run)
    titles = " ".join([fig._suptitle.get_text(), *(ax.get_title() for ax in fig.axes)])
    plt.close(fig)
    return {c["id"]: (float(c["ours"].split()[0]), c["holds"]) for c in claims}, titles


def test_the_claims_compare_what_they_say():
    ours, titles = claimed(told())
    assert {k: v for k, (v, _) in ours.items()} == pytest.approx(
        {
            "before": 0.4,
            "ece": 0.1,
            "brier": 0.01,
            "auroc": 1.0,
            "same": 0.0,
            "ends": 1.0,
            "one": 1.0,
            "gamed": 0.23,
            "agreement": 0.03,
        },
        abs=1e-3,
    )
    assert [k for k, (_, holds) in ours.items() if not holds] == ["ece"]
    assert "ECE 0.40 → 0.100" in titles and "100% at 0 or 1" in titles


def test_a_model_that_learns_nothing_or_one_word_only_keeps_no_claim():
    ours, _ = claimed(told(proper=(6, 6, 0.63), absolute=(6, 6, 0.6), product=(6, 6, 0.6)))
    assert [k for k, (_, holds) in ours.items() if holds] == ["before", "ece"]
    ours, _ = claimed(told(proper=(8, 2, 0.6)))
    assert not ours["agreement"][1], "a tie does not hold"


# --------------------------------------------------------------------------------------------------
# The command


def test_a_quick_run_writes_figure_samples_metrics_claims_config_and_checkpoint(tmp_path):
    name = check_quick("electives.calibrate", tmp_path, also=("samples.txt",))
    assert name == "calibrate"
    text = (tmp_path / "samples.txt").read_text()
    assert text.count("    proper ") == text.count("    imitator ") == 3


def test_help_lists_every_flag():
    check_help("electives.calibrate")


@pytest.mark.parametrize("flags", ["--facts 3", "--beta -1", "--steps 1", "--words 3"])
def test_a_mistake_in_the_flags_is_one_line_and_exit_code_2(flags, tmp_path):
    check_mistake("electives.calibrate", flags, tmp_path)


def test_an_interrupted_run_goes_on_to_the_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(plt.Figure, "savefig", lambda self, f, **_: f.write(b"\x89PNG"))
    marks = (dict(arm="agreement"), dict(arm="absolute", step=3))
    check_resume("electives.calibrate", tmp_path, marks, "--quick")
