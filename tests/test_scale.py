"""scale.py: its steps are the lessons' to the bit, several processes are one big batch, sharded or
not, and a run on a real checkpoint is sound. tasks/wordproblems.py: what is read, asked and judged.
"""

import json
import math
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from common import (
    ROOT,
    Memory,
    check_help,
    check_resume,
    complain,
    finish,
    launch,
    metrics,
    seeded,
    torchrun,
)
from test_huggingface import CORPUS, make_json, merges_of, refused, save_json

import grpo
import parallel
import scale
import tasks
from engine import Rollout
from experiment import UserError, command, load_checkpoint
from grpo import LOSSES
from huggingface import load_chat_template, load_tokenizer
from model import GPT, GPTConfig
from opd import divergence
from parallel import LostProcess, all_sum, together
from scale import DISTILLATION, Config, correction_weights
from tasks.wordproblems import extract_answer, load_problems, load_teacher, word_problems

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SUMS = [(a, b) for a in range(8) for b in range(8)]
ROWS = [
    dict(question=f"What is {a} + {b}?\u2028", answer=f"{a} and {b} make\n#### {a + b + 1000:,}")
    for a, b in SUMS
]
REWARDS = torch.tensor([[1, 0, 0, 1], [0, 1, 1, 1], [0, 0, 0, 1], [1, 1, 0, 0.0]])


def save_gpt(folder, like, vocab, n_embd, seed, positions=256, sharp=8):
    torch.manual_seed(seed)
    shape = dict(n_layer=1, n_head=2, n_embd=n_embd, n_kv_head=1, qkv_bias=True, tie=seed > 0)
    model = GPT(GPTConfig(vocab, positions, **shape))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(sharp if p.dim() == 2 else 1)
    model.save_pretrained(folder, like=like)


def write_rows(path, rows):
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """Tiny checkpoints with a tokenizer and a chat template; word problems as JSONL and Parquet.

    The student's head is its own, the teacher's tied; the teacher's embedding is padded.
    """
    import pyarrow
    import pyarrow.parquet

    folder = tmp_path_factory.mktemp("real")
    text = "What is 1 + 2? Think step by step. End with the answer as: #### number"
    settings = dict(eos_token="<|im_end|>", chat_template=CHAT)
    save_json(folder / "like", make_json(merges_of(text, 20)), **settings)
    save_json(folder / "unlike", make_json(merges_of("other words than those, then", 20)))
    for name, *shape in (
        ("student", "like", 300, 32, 0),
        ("teacher", "like", 310, 48, 1),
        ("narrow", "like", 290, 48, 1),
        ("foreign", "unlike", 300, 48, 1),
        ("short", "like", 300, 48, 1, 90),
    ):
        save_gpt(folder / name, folder / shape[0], *shape[1:])
    write_rows(folder / "sums.jsonl", ROWS)
    write_rows(folder / "questions.jsonl", [dict(question=r["question"]) for r in ROWS])
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "sums.parquet")
    return folder


def config_for(real, method="dr_grpo", **choices):
    given = dict(method=method, init=str(real / "student"), data=str(real / "sums.jsonl"))
    if method in DISTILLATION:
        given["teacher"] = str(real / "teacher")
    small = dict(template="{question}", prompts=4, group=4, max_new_tokens=8, eval_prompts=5)
    return Config(**{**given, **small, "micro_batch": 3, **choices})


def opened(config):
    """The task, the student and the teacher (or None) of a configuration."""
    about = (config.init, config.data, config.template, config.chat)
    task = word_problems(*about, answers=not config.distils)
    student = scale.load_model(config, "init", task)
    student.checkpointing = config.checkpointing
    return task, student, load_teacher(config, task, student) if config.distils else None


def a_rollout(config, task, model, n=None):
    """A ragged batch: answers to config.prompts problems, cut to 1, 2, 3, ... tokens."""
    n = n or config.group
    problems = [task.draw(random.Random(i)) for i in range(config.prompts)]
    whole, _, _ = scale.sample(
        parallel.plain(model, config.dtype), task, problems, n, config, seeded()
    )
    column = torch.arange(whole.ids.shape[1])
    length = 1 + torch.arange(len(whole.ids)) % config.max_new_tokens
    mask = whole.mask * (column < (whole.prompt_lens + length)[:, None])
    return Rollout(whole.ids, mask, whole.logp * mask, whole.prompt_lens)


def flat(model, gradient=False):
    tensors = [p.grad if gradient else p for p in model.parameters()]
    whole = [t.full_tensor() if hasattr(t, "full_tensor") else t for t in tensors]
    return torch.cat([t.flatten() for t in whole]).detach().clone()


def still(model):
    """An optimizer that does not move."""
    return torch.optim.SGD(model.parameters(), 0.0)


def close(a, b, tolerance):
    return (a - b).abs().max() <= tolerance * b.abs().max()


# --------------------------------------------------------------------------------------------------
# One process takes the lessons' steps


STEPS = [dict(), dict(minibatches=2), dict(beta=0.1)]


@pytest.mark.parametrize("choices", STEPS, ids=str)
@pytest.mark.parametrize("loss", LOSSES)
def test_one_process_takes_the_step_of_grpo_to_the_bit(loss, choices):
    choices = dict(choices, prompts=4, group=4, micro_batch=3)
    theirs = grpo.Config(loss=loss, **choices)
    ours = Config(method=loss, data="addition", max_new_tokens=16, **choices)
    toy = tasks.load("addition")
    shape = GPTConfig(toy.tokenizer.n_vocab, 256, 1, 2, 32, qk_norm=True)

    def policy(seed):
        torch.manual_seed(seed)
        model = GPT(shape)
        for p in model.parameters():  # far from uniform
            p.data *= 6 if p.dim() == 2 else 1
        return model

    task = tasks.in_tokens(toy)
    problems = [toy.draw(random.Random(i), 1 + i % 3) for i in range(4)]  # ragged
    rollout, _, _ = scale.sample(policy(0), task, problems, 4, ours, seeded())
    after = []
    for update, of in ((grpo.update, [theirs, 16]), (scale.update, [ours])):
        model, base = policy(0), policy(1)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        row = update(model, base, optimizer, rollout, REWARDS, *of, seeded(1))
        after.append((flat(model), row["grad_norm"]))
    assert torch.equal(after[0][0], after[1][0]) and after[0][1] == after[1][1] > 0
    assert not torch.equal(after[0][0], flat(policy(0)))


@pytest.mark.parametrize("kind", sorted({kind for _, kind in DISTILLATION.values()}))
def test_the_divergence_of_checkpoints_is_that_of_whole_distributions_however_cut(
    kind, real, monkeypatch
):
    config = config_for(real, next(m for m, (_, k) in DISTILLATION.items() if k == kind))
    task, student, teacher = opened(config)
    rollout = a_rollout(config, task, student)
    x, y, mask = rollout.ids[:, :-1], rollout.ids[:, 1:], rollout.mask[:, 1:]
    lp, lq = (m(x).log_softmax(-1) for m in (student, teacher))
    expected = (divergence(lp, lq.detach(), y, kind) * mask).sum() / mask.sum()
    expected.backward()
    wanted = flat(student, gradient=True)
    for logits, micro_batch in ((2**26, 64), (1, 3), (1000, 1)):
        monkeypatch.setattr(scale, "LOGITS", logits)
        config.micro_batch = micro_batch
        row = scale.distil(student, teacher, still(student), rollout, config)
        assert row["loss"] == pytest.approx(expected.item(), abs=1e-5)
        got = flat(student, gradient=True) * max(1, row["grad_norm"])
        assert close(got, wanted, 1e-4) and wanted.abs().max() > 1e-3
    assert all(p.grad is None for p in teacher.parameters())


def test_the_divergence_sees_neither_prompt_nor_padding_nor_rows_without_an_answer(real):
    config = config_for(real, "opd", micro_batch=64)
    task, student, teacher = opened(config)
    rollout = a_rollout(config, task, student, n=1)
    R, extra = len(rollout.ids), torch.nn.functional.pad
    ids = extra(rollout.ids, (0, 3, 0, 2), value=9)
    mask, logp = (extra(t, (0, 3, 0, 2)) for t in (rollout.mask, rollout.logp))
    padded = Rollout(ids, mask, logp, extra(rollout.prompt_lens, (0, 2), value=2))
    parts = (rollout, padded, padded[torch.arange(R)])
    a, b, c = (sum(scale.divergences(student, teacher, r, "reverse", config)) for r in parts)
    assert a.item() > 0 and torch.allclose(torch.stack((b, c)), a, rtol=1e-5)
    nothing = scale.divergences(student, teacher, padded[[R, R + 1]], "reverse", config)
    assert sum(nothing).item() == 0


def test_the_sampler_and_the_scorer_agree_and_checkpointing_changes_no_gradient(real):
    gradients, calls = [], []
    for checkpointing in (False, True):
        config = config_for(real, checkpointing=checkpointing)
        task, model, _ = opened(config)
        rollout = a_rollout(config, task, model)
        with torch.no_grad():
            logp = scale.score(model, rollout, torch.arange(16), config)
        assert ((logp - rollout.logp) * rollout.mask).abs().max() < 1e-4
        model.blocks[0].norm1.register_forward_hook(lambda *_, c=checkpointing: calls.append(c))
        config.micro_batch = 16
        scale.update(model, None, still(model), rollout, REWARDS, config, None)
        gradients.append(flat(model, gradient=True))
    assert calls == [False, True, True]  # computed again in the backward pass
    assert torch.equal(*gradients) and gradients[0].abs().max() > 0


@pytest.mark.parametrize(
    "kind, expected",
    [
        ("none", [[1, 1, 1], [1, 1, 1]]),
        ("tis", [[0.5, 2, 1], [1, 2, 1]]),
        ("seq_tis", [[1.5] * 3, [2] * 3]),
        ("mis", [[0, 0, 1], [1, 0, 1]]),
    ],
)
def test_corrections_are_old_over_sampler_capped_dropped_or_by_answer_without_gradient(
    kind, expected
):
    old = torch.tensor([[0.5, 3, 1], [1, 4, 7]]).log().requires_grad_()
    mask = torch.tensor([[1, 1, 1], [1, 1, 0.0]])
    w = correction_weights(old, torch.zeros(2, 3), mask, kind)
    assert torch.allclose(w, torch.tensor(expected).float()) and not w.requires_grad
    same = correction_weights(old, old.detach(), mask, kind)
    assert torch.equal(same, torch.ones(2, 3))


def test_a_correction_weighs_each_token_of_the_loss(real):
    config = config_for(real, dtype="bfloat16")
    task, model, _ = opened(config)
    rollout = a_rollout(config, task, model)
    norms = {}
    for kind in ("none", "tis", "mis"):
        config.correction = kind
        for shift in (0.0, 5.0):  # every token was e^5 times likelier to the sampler
            off = Rollout(rollout.ids, rollout.mask, rollout.logp + shift, rollout.prompt_lens)
            row = scale.update(model, None, still(model), off, REWARDS, config, None)
            norms[kind, shift] = row["grad_norm"]
    assert norms["none", 5.0] == norms["none", 0.0] > 0 == norms["mis", 5.0]
    assert norms["tis", 5.0] == pytest.approx(math.exp(-5) * norms["none", 0.0], rel=0.1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_plain_model_samples_what_the_model_would(dtype, real):
    for name in ("student", "teacher"):  # one with a head of its own, one tied
        model = GPT.from_pretrained(real / name)
        copied = parallel.plain(model, dtype)
        assert (copied is model) == (dtype == "float32")
        assert (copied.lm_head.weight is copied.wte.weight) == model.config.tie
        for (k, a), b in zip(model.state_dict().items(), copied.state_dict().values(), strict=True):
            assert torch.equal(a.to(getattr(torch, dtype)), b), k
        assert copied.lm_head.weight.dtype == getattr(torch, dtype)
        assert model.lm_head.weight.dtype == torch.float32


# --------------------------------------------------------------------------------------------------
# Batches


def dealt(monkeypatch, rewards_of):
    """Replace sampling: the i-th problem drawn has answers of these rewards and of i + 1 tokens."""
    drawn = []

    def sample(_, task, problems, n, config, generator):
        r = []
        ids = torch.zeros(len(problems) * n, 40, dtype=torch.long)
        mask = torch.zeros(ids.shape)
        for i in range(len(problems)):
            r.append(rewards_of(len(drawn)))
            drawn.append(problems[i])
            mask[i * n : (i + 1) * n, 1 : len(drawn) + 1] = 1
        lens = torch.ones(len(ids), dtype=torch.long)
        return Rollout(ids, mask, -mask, lens), None, torch.tensor(r).float()

    monkeypatch.setattr(scale, "sample", sample)
    return drawn


def test_dynamic_sampling_keeps_only_mixed_groups_and_counts_every_token(monkeypatch, real):
    config = config_for(real, "dapo", prompts=3, group=2)
    task, model, _ = opened(config)
    drawn = dealt(monkeypatch, lambda i: [1, 0] if i in (1, 5, 6, 7) else [1, 1])
    rollout, rewards, row = scale.collect(model, task, config, random.Random(0), seeded())
    assert len(drawn) == 9 and rewards.tolist() == [[1, 0]] * 3
    assert rollout.lengths.tolist() == [2, 2, 6, 6, 7, 7]
    assert row["tokens"] == 2 * sum(range(1, 10)) and row["entropy"] == 1
    assert row["zero_variance"] == pytest.approx(5 / 9) and row["reward"] == pytest.approx(7 / 9)


@pytest.mark.parametrize("method, batches", [("dapo", 4), ("grpo", 1)])
def test_without_a_mixed_group_the_last_batch_is_taken_after_four(
    method, batches, monkeypatch, real
):
    config = config_for(real, method, prompts=3, group=2)
    task, model, _ = opened(config)
    drawn = dealt(monkeypatch, lambda i: [0, 0])
    rollout, rewards, _ = scale.collect(model, task, config, random.Random(0), seeded())
    assert len(drawn) == 3 * batches and rewards.tolist() == [[0, 0]] * 3
    last = range(3 * batches - 2, 3 * batches + 1)
    assert rollout.lengths.tolist() == [n for n in last for _ in range(2)]


def test_held_out_problems_are_never_trained_on_and_none_twice(real, monkeypatch):
    config = config_for(real, prompts=200, group=2, eval_prompts=1000)
    task, model, _ = opened(config)
    drawn = dealt(monkeypatch, lambda i: [0, 0])
    monkeypatch.setattr(scale, "even", lambda rollouts, device: Rollout.cat(rollouts[:1]))
    scale.collect(model, task, config, random.Random(0), seeded())
    train, held_out = load_problems(config.data)
    assert set(drawn) <= set(train) and len(set(drawn)) > 40
    for processes in (1, 2):  # of several each has its share
        drawn.clear()
        for rank in range(processes):
            monkeypatch.setattr(scale, "world", lambda here=(rank, processes): here)
            scale.held_out(model, None, task, config)
        assert sorted(drawn) == sorted(held_out)


def test_held_out_is_the_reverse_kl_per_token_and_the_rate_of_right_answers(real, monkeypatch):
    config = config_for(real, "opd", micro_batch=64, eval_prompts=4)
    task, student, teacher = opened(config)
    task.judge = lambda problem, text, finished: float(problem[0] == problems[0][0])
    problems = task.held_out(random.Random("held out"), 4)
    row = scale.held_out(student, teacher, task, config)
    with torch.no_grad():
        rollout, _, _ = scale.sample(student, task, problems, 1, config, seeded(0))
        lp, lq = (m(rollout.ids[:, :-1]).log_softmax(-1) for m in (student, teacher))
    kl = (divergence(lp, lq, None, "reverse") * rollout.mask[:, 1:]).sum() / rollout.mask.sum()
    assert row["kl"] == pytest.approx(kl.item(), rel=1e-4) and kl > 0 and row["pass@1"] == 0.25


# --------------------------------------------------------------------------------------------------
# Distillation


@pytest.mark.parametrize("method", DISTILLATION)
def test_a_student_that_is_its_own_teacher_has_nothing_to_learn(method, real):
    config = config_for(real, method, teacher=str(real / "student"), steps=1, lr=1e-3)
    task, student, teacher = opened(config)
    run = Quiet()
    scale.train(config, task, run, 0, student, teacher, "cpu")
    assert run.rows[0]["kl"] == pytest.approx(0, abs=1e-6)
    if method not in ("sft", "opd_top4"):  # those have a gradient there, too
        assert abs(run.rows[1]["loss"]) < 1e-6 and run.rows[1]["grad_norm"] < 1e-5


@pytest.mark.parametrize("method", ["sft", "kd", "opd", "opd_jsd", "opd_sampled"])
def test_a_student_comes_nearer_to_its_teacher_which_does_not_move(method, real):
    more = dict(steps=25, prompts=32, group=1, micro_batch=32, eval_every=25, eval_prompts=64)
    config = config_for(real, method, lr=1e-2, **more)
    task, student, teacher = opened(config)
    before = [flat(m) for m in (student, teacher)]
    run = Quiet()
    scale.train(config, task, run, 0, student, teacher, "cpu")
    assert all(torch.equal(a, flat(m)) for a, m in zip(before, (student, teacher), strict=True))
    assert all(p.grad is None for m in (student, teacher) for p in m.parameters())
    assert len(run.rows) == 26 and run.rows[-1]["kl"] < 0.8 * run.rows[0]["kl"]


def test_a_bf16_run_scores_with_a_bf16_teacher(real):
    config = config_for(real, "opd", dtype="bfloat16", checkpointing=True)
    task, student, teacher = opened(config)
    assert student.lm_head.weight.dtype == torch.float32
    assert teacher.lm_head.weight.dtype == torch.bfloat16
    rollout = a_rollout(config, task, student)
    row = scale.distil(student, teacher, still(student), rollout, config)
    config.dtype = "float32"
    exact = scale.distil(student, teacher.float(), still(student), rollout, config)
    assert row == pytest.approx(exact, rel=0.05)


# --------------------------------------------------------------------------------------------------
# Several processes (gloo): all of this in one start of torchrun, which takes seconds


METHODS = [dict(method=m) for m in (*LOSSES, *DISTILLATION)] + [dict(method="grpo", beta=0.1)]
SHARDED = [METHODS[i] for i in (0, 2, 4, -1)] + [dict(method="opd")]
DEAL = {1: [[0, 1, 2, 3]], 2: [[3, 1, 0], [2]]}  # the problems of each process


class Quiet(Memory, parallel.Team):
    """A run that keeps rows and state in memory, and shows nothing."""

    def __init__(self):
        super().__init__()
        self.silent = parallel.world()[0] > 0

    def samples(self, *_, **__):
        pass


def gradient(folder, shard, choices):
    """The gradient of a batch of which this process has some rows, and the step's metrics."""
    rank, processes = parallel.world()
    config = config_for(folder, shard=shard, **choices)
    task, student, teacher = opened(config)
    rollout = a_rollout(config, task, student)
    mine = torch.arange(16).view(4, 4)[DEAL[processes][rank]].flatten()
    rollout = scale.even([rollout[mine]], "cpu")
    model = parallel.place(student, config, "cpu")
    if config.distils:
        teacher = parallel.place(teacher, config, "cpu")
        row = scale.distil(model, teacher, still(model), rollout, config)
    else:
        base = parallel.place(GPT.from_pretrained(folder / "other"), config, "cpu")
        rewards = REWARDS[DEAL[processes][rank]]
        row = scale.update(model, base, still(model), rollout, rewards, config, seeded())
    return flat(model, gradient=True) * max(1, row["grad_norm"]), row


def curve(folder, shard, method, halves=False):
    """The rows of a short training, and the trained weights; 3 problems never come out even.

    halves: interrupted in the middle, and resumed from what rank 0 kept.
    """
    config = config_for(folder, method, shard=shard, prompts=3, lr=1e-2, steps=4, eval_every=2)
    task, student, teacher = opened(config)
    task.judge = lambda problem, text, finished: len(text) % 2
    if teacher is not None:
        teacher = parallel.place(teacher, config, "cpu")
    run = Quiet()
    for steps in (2, 4) if halves else (4,):
        config.steps = steps
        trained = scale.train(config, task, run, 0, student, teacher, "cpu")
        box = [run.state]
        dist.broadcast_object_list(box, 0)
        run.state = box[0]
    rows = [{k: v for k, v in row.items() if k != "tokens_per_s"} for row in run.rows]
    return rows, flat(parallel.plain(trained, "float32"))


def worker(folder):
    """What each process measures."""
    folder = Path(folder)
    rank, processes = parallel.world()
    results = {str(choices): gradient(folder, False, choices) for choices in METHODS}
    if processes == 2:
        results["sharded"] = {str(choices): gradient(folder, True, choices) for choices in SHARDED}
        for method in ("dr_grpo", "opd"):
            results[method] = [curve(folder, shard, method) for shard in (False, True)]
            results[method].append(curve(folder, True, method, halves=True))
    torch.save(results, folder / f"{rank} of {processes}.pt")


def test_two_processes_are_one_big_batch_and_sharded_weights_train_as_whole_ones(real, tmp_path):
    folder = shutil.copytree(real, tmp_path / "real")
    save_gpt(folder / "other", folder / "like", 300, 32, 0, sharp=7)
    code = tmp_path / "worker.py"
    code.write_text(
        f"import parallel, test_scale as t\nparallel.join('cpu')\nt.worker({str(folder)!r})\n"
        "parallel.dist.destroy_process_group()\n"
    )
    rc, output = torchrun(code)
    assert rc == 0, output
    worker(folder)
    parts = [torch.load(folder / f"{name}.pt") for name in ("0 of 1", "0 of 2", "1 of 2")]
    compare_gradients(*parts, 2e-6)
    compare_gradients(parts[0], *(part["sharded"] for part in parts[1:]), 1e-5)
    for method in ("dr_grpo", "opd"):
        compare_curves(parts[1][method], parts[2][method])


def compare_gradients(one, first, second, tolerance):
    """However the problems are dealt, two processes have the gradient and the metrics of one."""
    compared = [name for name in one if name in first]
    assert len(compared) > 4
    for name in compared:
        (g, row), (g0, row0), (g1, row1) = one[name], first[name], second[name]
        assert torch.equal(g0, g1) and row0 == row1, name
        assert g.abs().max() > 0 and close(g0, g, tolerance), name
        assert row0 == pytest.approx(row, rel=1e-5, abs=1e-6), name


def compare_curves(first, second):
    """Sharded or not the rows are the same, an interrupted run's to the bit, in each process."""
    (rows, weights), (sharded_rows, sharded), (resumed_rows, resumed) = first
    assert len(rows) == 5 and rows[1]["loss"] != rows[2]["loss"] != 0
    for ours, theirs in zip(rows, sharded_rows, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    assert close(sharded, weights, 1e-3)
    assert torch.equal(resumed, sharded) and resumed_rows == sharded_rows
    assert [r for r, _ in second] == [rows, sharded_rows, resumed_rows]


def test_each_process_draws_problems_and_answers_of_its_own(real, monkeypatch):
    config = config_for(real, steps=2, prompts=2, group=7)
    task, model, _ = opened(config)
    sample, drawn = scale.sample, []

    def noted(model, task, problems, n, config, generator):
        done = sample(model, task, problems, n, config, generator)
        if n == 7:
            drawn.append(str(done[0].tokens()))
        return done

    monkeypatch.setattr(scale, "sample", noted)
    monkeypatch.setattr(scale, "even", lambda rollouts, device: Rollout.cat(rollouts))
    for here in ((0, 2), (1, 2)):
        monkeypatch.setattr(scale, "world", lambda here=here: here)
        scale.train(config, task, Quiet(), 0, model, None, "cpu")
    assert len(drawn) == len(set(drawn)) == 4  # of two processes, at two steps


REAL = "--quick", "--micro-batch", 3, "--template", "{question}"


def flags_for(real, method="dr_grpo", data="sums.jsonl"):
    teacher = ("--teacher", real / "teacher") if method in DISTILLATION else ()
    return "--method", method, "--init", real / "student", "--data", real / data, *teacher


FILES = {
    "scale.png",
    "metrics.jsonl",
    "claims.json",
    "cost.json",
    "config.json",
    "model.pt",
    "samples.txt",
}


def test_a_sum_leaves_its_argument_alone_and_tells_a_lost_process_from_a_lack_of_memory(
    monkeypatch,
):
    def fails(error):
        raise error

    (
        monkeypatch.setattr(dist, "is_initialized", lambda: True),
        monkeypatch.setattr(dist, "get_backend", lambda: "gloo"),
    )
    monkeypatch.setattr(parallel, "world", lambda: (1, 2))
    monkeypatch.setattr(dist, "all_reduce", lambda x: x.add_(5))
    x = torch.ones(3)
    assert all_sum(x).tolist() == [6, 6, 6] and x.tolist() == [1, 1, 1]
    for error, seen in (
        (torch.OutOfMemoryError("no"), torch.OutOfMemoryError),
        (RuntimeError("no"), LostProcess),
    ):
        monkeypatch.setattr(dist, "all_reduce", lambda x, error=error: fails(error))
        with pytest.raises(seen):
            all_sum(x)


@pytest.mark.parametrize("rank, lines", [("0", 1), ("1", 0)])
def test_a_mistake_in_several_processes_is_said_by_rank_0_alone(monkeypatch, capsys, rank, lines):
    def fails(error):
        raise error

    monkeypatch.setattr(sys, "argv", ["script.py"]), monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    for error, said in ((UserError("no"), lines), (LostProcess("rank 1 lost another"), 1)):
        with pytest.raises(SystemExit) as stopped:
            command(together(lambda error=error: fails(error)))
        assert stopped.value.code == 2 and capsys.readouterr().err.count("\n") == said


def test_several_processes_make_one_run_sharded_and_in_bf16(real, tmp_path):
    more = "--shard --dtype bfloat16 --checkpointing --prompts 3 --correction tis "
    more += "--minibatches 2 --beta 0.1"
    rc, output = torchrun(
        ROOT / "scale.py", *REAL, *flags_for(real, "dapo"), *more.split(), "--out", tmp_path
    )
    assert rc == 0 and output.count("claims, metrics") == 1, output
    assert {p.name for p in tmp_path.iterdir()} == FILES | {"dapo 0"}
    assert len(metrics(tmp_path)) == 3
    trained = GPT.from_pretrained(tmp_path / "dapo 0")
    assert trained.config == GPT.from_pretrained(real / "student").config


def test_a_process_that_dies_ends_the_run_with_a_message(real, tmp_path):
    code = tmp_path / "worker.py"
    code.write_text("""import os, parallel, scale
update, calls = scale.update, []
def dying(*args):
    calls.append(1)
    if len(calls) == 2 and parallel.world()[0] == 0:
        os._exit(7)
    return update(*args)
scale.update = dying
scale.command(scale.main)
""")
    rc, output = torchrun(code, *REAL, *flags_for(real), "--steps", 3, "--out", tmp_path / "run")
    assert rc != 0 and "exitcode  : 7" in output, output
    assert "error: rank 1 lost another process" in output


@pytest.mark.parametrize("flags", [["--shard"], ["--prompts", "1"]])
def test_what_so_many_processes_cannot_do_is_refused_before_anything_is_written(
    flags, real, tmp_path, monkeypatch
):
    if "--prompts" in flags:
        monkeypatch.setattr(scale, "world", lambda: (0, 2))
    said = complain("scale.py", *REAL, *flags_for(real), *flags, "--out", tmp_path / "run")
    assert "processes" in said and not (tmp_path / "run").exists()


def test_a_process_without_a_gpu_of_its_own_says_so(monkeypatch):
    monkeypatch.setattr(parallel.dist, "is_torchelastic_launched", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    for device in ("cuda", "mps"):
        with pytest.raises(UserError, match=f"process 2 .* no {device} device"):
            parallel.join(device)


# --------------------------------------------------------------------------------------------------
# The command


def test_help_lists_every_flag():
    check_help("scale.py")


@pytest.mark.parametrize(
    "method, flags",
    [
        ("dr_grpo", ("--chat", "--dtype", "bfloat16", "--checkpointing", "--correction", "tis")),
        ("grpo", ("--beta", 0.01, "--minibatches", 2)),
        ("opd", ("--dtype", "bfloat16", "--checkpointing", "--chat")),
        ("sft", ()),
    ],
)
def test_a_run_ends_with_a_checkpoint_that_can_be_opened_and_resumes_to_itself(
    method, flags, real, tmp_path
):
    data = "questions.jsonl" if method == "opd" else "sums.parquet"
    finish("scale.py", *REAL, *flags_for(real, method, data), *flags, "--out", tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == FILES | {f"{method} 0"}
    before = metrics(tmp_path)
    assert [r["step"] for r in before] == [0, 1, 2]
    assert all(("kl" in r) == (method in DISTILLATION) for r in before)
    assert all(("pass@1" in r) == (method != "opd") for r in before)
    trained = tmp_path / f"{method} 0"
    assert GPT.from_pretrained(trained).config == GPT.from_pretrained(real / "student").config
    assert load_tokenizer(trained).stop == load_tokenizer(real / "student").stop
    assert (tmp_path / "samples.txt").read_text().count("trained") == 3
    finish("scale.py", "--resume", "--out", tmp_path)
    assert metrics(tmp_path) == before


def test_a_toy_learns_from_scratch(tmp_path):
    finish("scale.py", "--quick", "--data", "addition", "--out", tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == FILES | {"dr_grpo 0"}
    assert GPT.from_pretrained(tmp_path / "dr_grpo 0").config.qk_norm


@pytest.mark.parametrize("method", ["grpo", "kd"])
def test_interrupt_and_resume_give_the_metrics_of_an_uninterrupted_run_to_the_bit(
    method, real, tmp_path
):
    flags = *REAL, *flags_for(real, method), "--steps", 3
    check_resume("scale.py", tmp_path, [dict(step=1), dict(step=2)], *flags)


def test_a_signal_while_a_checkpoint_is_measured_ends_the_run_at_once_and_loses_nothing(
    real, monkeypatch, tmp_path
):
    measure, calls, last = scale.divergences, [], math.inf

    def counted(model, teacher, rollout, kind, config):
        for d in measure(model, teacher, rollout, kind, config):
            calls.append(kind)
            if calls.count("reverse") == last:  # of the last measurement the last part
                os.kill(os.getpid(), signal.SIGTERM)
                raise AssertionError("the signal was not heeded")
            yield d

    monkeypatch.setattr(scale, "divergences", counted)
    flags = *REAL, *flags_for(real, "kd")  # trained by the forward KL
    finish("scale.py", *flags, "--out", tmp_path / "whole")
    last = calls.count("reverse")
    calls.clear()
    code, out, _ = launch("scale.py", *flags, "--out", tmp_path / "cut")
    assert code == 143 and "--resume" in out and last > 2
    last = math.inf
    finish("scale.py", "--resume", "--out", tmp_path / "cut")
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")


def test_ctrl_c_while_a_checkpoint_loads_ends_at_once_and_leaves_nothing(
    real, monkeypatch, tmp_path
):
    def loads(_):
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the signal was not heeded")

    monkeypatch.setattr("huggingface.load_file", loads)
    code, _, err = launch("scale.py", *REAL, *flags_for(real), "--out", tmp_path / "run")
    assert code == 130 and err == "" and not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", ["grpo", "opd"])
def test_a_number_that_is_none_ends_the_run_before_it_spoils_the_weights(
    method, real, monkeypatch, tmp_path
):
    take_step, steps = scale.take_step, []

    def spoilt(model, optimizer, losses):
        steps.append(1)
        nan = len(steps) == 2
        return take_step(model, optimizer, (loss * math.nan if nan else loss for loss in losses))

    monkeypatch.setattr(scale, "take_step", spoilt)
    flags = *REAL, *flags_for(real, method), "--steps", 4, "--out", tmp_path
    code, _, err = launch("scale.py", *flags)
    assert code == 2 and f"the loss is nan at step 2 of {method} 0" in err.splitlines()[-1]
    (phase,) = load_checkpoint(tmp_path / "model.pt")["state"].values()
    assert phase["step"] == 1 and not (tmp_path / f"{method} 0").exists()
    assert all(torch.isfinite(w).all() for w in phase["model"].values())


def test_answers_end_at_each_of_the_checkpoints_stop_ids_and_the_model_is_saved_with_them(
    real, tmp_path
):
    folder = shutil.copytree(real, tmp_path / "real")
    eos = load_tokenizer(folder / "student").eos
    stops = [*dict.fromkeys([eos, *range(32, 122)])]  # most letters: they are likely
    text = json.dumps(dict(eos_token_id=stops))
    (folder / "student" / "generation_config.json").write_text(text)
    config = config_for(folder, max_new_tokens=32, prompts=64, group=2)
    task, model, _ = opened(config)
    problems = [task.draw(random.Random(i)) for i in range(64)]
    rollout, _, _ = scale.sample(model, task, problems, 1, config, seeded())
    for tokens in rollout.tokens():
        assert not set(tokens[:-1]) & set(stops) and (tokens[-1] in stops or len(tokens) == 32)
    assert len({tokens[-1] for tokens in rollout.tokens()} & set(stops)) > 3
    finish("scale.py", *REAL, *flags_for(folder), "--out", tmp_path / "run")
    assert load_tokenizer(tmp_path / "run" / "dr_grpo 0").stop == stops


def test_a_resume_refuses_models_or_data_that_have_changed(real, tmp_path):
    folder, out = shutil.copytree(real, tmp_path / "real"), tmp_path / "run"
    finish("scale.py", *REAL, *flags_for(folder, "opd"), "--out", out)
    before = {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()}
    for flag, file in (
        ("--data", "sums.jsonl"),
        ("--teacher", "teacher/config.json"),
        ("--init", "student/tokenizer_config.json"),
    ):
        was = (folder / file).read_bytes()
        (folder / file).write_bytes(was + b"\n")
        said = complain("scale.py", "--resume", "--out", out)
        assert f"{flag} is no longer what the run" in said
        (folder / file).write_bytes(was)
    assert before == {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()}


def test_a_trained_model_never_takes_the_place_of_what_no_run_saved(real, tmp_path):
    mine = tmp_path / "dr_grpo 0" / "model.safetensors"
    mine.parent.mkdir()
    mine.write_text("mine")
    flags = *REAL, *flags_for(real), "--out", tmp_path
    assert "dr_grpo 0" in complain("scale.py", *flags)
    assert [p.name for p in tmp_path.iterdir()] == ["dr_grpo 0"]
    mine.parent.rename(tmp_path / "kept")
    finish("scale.py", *flags)
    shutil.rmtree(tmp_path / "dr_grpo 0")
    (tmp_path / "kept").rename(mine.parent)  # in a folder that a run has written, too
    code, _, err = launch("scale.py", *flags)
    assert code == 2 and "which no save wrote" in err and mine.read_text() == "mine"


MISTAKES = [
    ("--init STUDENT", "needs --data"),
    ("--data DATA", "no such .py file, and not one of addition"),
    ("", "needs --data"),
    ("--data addition --init STUDENT", "addition: no such file"),
    ("--data addition --method opd", "--teacher"),
    ("--init STUDENT --data DATA --method opd", "--teacher"),
    ("--init STUDENT --teacher TEACHER --data DATA", "--teacher"),
    ("--init STUDENT --data DATA --method trb", "invalid choice"),
    ("--init STUDENT --data DATA --template no", "{question}"),
    ("--init STUDENT --data DATA --max-new-tokens 250", "256 positions"),
    ("--init STUDENT --data DATA --max-new-tokens 4294967295", "positions"),
    ("--init STUDENT --data DATA --group 1", "--group 1"),
    ("--init STUDENT --data DATA --minibatches 5", "--minibatches"),
    ("--init STUDENT --data DATA --prompts 4294967295", "9999"),
    ("--init STUDENT --data DATA --lr nan", "from 0"),
    ("--init STUDENT --data QUESTIONS", "answer is missing"),
    ("--init STUDENT --data /no/such.jsonl", "no such file"),
    ("--init STUDENT --data FOLDER", "directory"),
    ("--init STUDENT --data LONG", "too long"),
    ("--init STUDENT --data BROKEN", "row 1: question is missing"),
    ("--init STUDENT --data EMPTY --template {question}", "empty prompt"),
    ("--init /no/such --data DATA", "/no/such: no such folder"),
    ("--init FILE --data DATA", "no such folder"),
    ("--init LONG --data DATA", "no such folder"),
    ("--init FOLDER --data DATA", "no such file"),
    ("--init FOREIGN --data DATA --chat", "chat template"),
    ("--init INSIDE --data DATA", "a run writes its models there"),
    ("--data nothing", "task nothing"),
    ("--data wordproblems", "task wordproblems"),
    ("--method opd --init STUDENT --teacher INSIDE --data DATA", "a run writes its models there"),
    ("--method opd --init STUDENT --teacher FOREIGN --data DATA", "vocabulary is not that of"),
    ("--method opd --init STUDENT --teacher NARROW --data DATA", "290 ids"),
    ("--method opd --init STUDENT --teacher SHORT --data DATA --max-new-tokens 90", "90 positions"),
    ("--method opd --init STUDENT --teacher /no/such --data DATA", "/no/such: no such folder"),
]
IDLE = [
    ("--init STUDENT --data DATA --correction tis", "correction"),
    ("--data addition --chat", "chat"),
    ("--data addition --template {question}!", "template"),
    ("--method opd --init STUDENT --teacher TEACHER --data DATA --minibatches 1", "minibatches"),
    ("--method opd --init STUDENT --teacher TEACHER --data DATA --beta 0.1", "beta"),
]


@pytest.mark.parametrize("flags, words", MISTAKES + IDLE)
def test_a_mistake_is_one_line_and_nothing_is_written(flags, words, real, tmp_path):
    write_rows(real / "broken.jsonl", [dict(prompt="a")])
    rows = [dict(question=q, answer="#### 1") for q in ("", "a", *"bcdefghijklmnop")]
    write_rows(real / "empty.jsonl", rows)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    names = {
        name.upper(): real / name for name in ("student", "teacher", "foreign", "narrow", "short")
    }
    names |= {k.upper(): real / f"{k}.jsonl" for k in ("questions", "broken", "empty")}
    names |= dict(DATA=real / "sums.jsonl", INSIDE=tmp_path / "run" / "opd", LONG="x" * 300)
    names |= dict(FILE=tmp_path / "file", FOLDER=tmp_path / "folder")
    flags = [names.get(f, f) for f in flags.split()]
    said = complain("scale.py", "--quick", "--out", tmp_path / "run", *flags)
    assert words in said and sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == "mine"


# --------------------------------------------------------------------------------------------------
# Word problems


@pytest.mark.parametrize(
    "text, answer",
    [
        ("She has 48/2 = <<48/2=24>>24.\n#### 72", "72"),
        ("#### 1,234", "1234"),
        ("#### -5", "-5"),
        ("#### 3.50", "3.50"),
        ("#### 5.", "5"),
        ("#### 12 apples", "12"),
        ("#### 1\n#### 2", "1"),
        ("#### $5", None),
        ("####7", None),
        ("72", None),
        ("", None),
        ("#### 1,000,000.", "1000000"),
        ("x #### 9", "9"),
        ("#### , that is 5", None),
        ("#### ... 5", None),
        ("#### -.", None),
        ("#### .5", ".5"),
        ("#### , #### 5", None),
    ],
)
def test_an_answer_is_read_as_gsm8ks_authors_read_it_but_for_a_final_dot(text, answer):
    assert extract_answer(text) == answer


def test_problems_come_from_jsonl_or_parquet_and_a_tenth_is_held_out(real):
    train, held_out = load_problems(str(real / "sums.jsonl"))
    assert load_problems(str(real / "sums.parquet")) == (train, held_out)
    everything = [(r["question"], str(a + b + 1000)) for r, (a, b) in zip(ROWS, SUMS, strict=True)]
    assert sorted(train + held_out) == sorted(everything) and not set(train) & set(held_out)
    assert 0 < len(held_out) < 20


def test_gsm8k_comes_through_datasets_with_its_own_splits(monkeypatch):
    import datasets

    rows = dict(train=ROWS[:9], test=ROWS[9:12])

    def load_dataset(name, config, split):
        return rows[split] if (name, config) == ("openai/gsm8k", "main") else None

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for part, of in zip(load_problems("gsm8k"), (ROWS[:9], ROWS[9:12]), strict=True):
        assert [q for q, _ in part] == [r["question"] for r in of]


def test_the_prompt_is_the_template_or_the_chat_with_the_question_in_it(real):
    tokenizer, problem = load_tokenizer(real / "student"), ("2 {x} + 2?", "4")
    about = str(real / "student"), str(real / "sums.jsonl")
    plain = word_problems(*about, "Q: {question}\\nA:", False).prompt(problem)
    assert tokenizer.decode(plain) == "Q: 2 {x} + 2?\nA:"
    ids = word_problems(*about, "{question} #", True).prompt(problem)
    text = "<|im_start|>user\n2 {x} + 2? #<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(ids) == text
    assert ids[0] == 1 and ids.count(1) == 2 and ids.count(2) == 1  # special tokens, not letters


def test_a_word_problem_is_judged_by_its_own_number_whether_finished_or_not(real, monkeypatch):
    config, problems = config_for(real), [("one", "1001"), ("two", "1002")]
    task, _, _ = opened(config)
    texts = ["#### 1,001", "so #### 1002", "no", "#### 1002", "#### 1002.", "#### 1002 #### 3"]
    tokenizer = task.tokenizer
    rows = [tokenizer.encode(t) + [tokenizer.eos] * (i % 2) for i, t in enumerate(texts)]
    ids = torch.zeros(6, max(map(len, rows)) + 1, dtype=torch.long)
    mask = torch.zeros(ids.shape)
    for i, row in enumerate(rows):
        ids[i, 1 : len(row) + 1] = torch.tensor(row)
        mask[i, 1 : len(row) + 1] = 1
    answers = Rollout(ids, mask, mask, torch.ones(6, dtype=torch.long))
    monkeypatch.setattr(scale, "generate", lambda *_, **__: answers)
    _, seen, rewards = scale.sample(None, task, problems, 3, config, None)
    assert seen == texts and rewards.tolist() == [[1, 0, 0], [1, 1, 1]]


def test_an_answer_of_a_toy_task_that_did_not_end_is_wrong(monkeypatch):
    toy = tasks.load("addition")
    task = tasks.in_tokens(toy)
    problem = [(1, 6), (3, 7), (8, 3)]
    text = "a1A6007b3B7010c8C3112"
    assert task.judge(problem, text, True) == 1 and task.judge(problem, text, False) == 0
    assert toy.tokenizer.decode(task.prompt(problem)) == toy.prompt(problem)


def test_the_chat_is_that_of_transformers(real):
    transformers = pytest.importorskip("transformers")
    file = str(real / "student/tokenizer.json")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=file, chat_template=CHAT)
    messages = [dict(role="user", content="a {b}\n c")]
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert load_chat_template(real / "student")("a {b}\n c") == expected


@pytest.mark.parametrize(
    "data, words",
    [
        ("[1]\n", ["row 1", "no JSON object"]),
        ("{", ["row 1", "JSON"]),
        ('{"question": "a", "solution": "#### 1"}', ["row 1", "answer is missing"]),
        ('{"answer": "#### 1"}', ["row 1", "question is missing"]),
        ('{"question": "a", "answer": "1"}', ["row 1", "####"]),
        ('{"question": "a", "answer": 1}', ["row 1", "answer is 1"]),
        ('{"question": "a", "answer": "#### 1"}', ["too few"]),
        ('{"question": 1, "answer": "#### 1"}', ["question is 1"]),
        ("", ["too few"]),
        (b"PAR1 no parquet", ["ArrowInvalid"]),
        (b"\xff", ["UTF-8"]),
    ],
)
def test_data_that_cannot_be_used_is_one_line_that_says_why(data, words, tmp_path):
    file = tmp_path / ("x.parquet" if data == b"PAR1 no parquet" else "x.jsonl")
    file.write_bytes(data if isinstance(data, bytes) else data.encode())
    with refused("--data", *words):
        load_problems(str(file))


ONE = '{"question": "What is 1 plus %d?", "answer": "#### %d"}\n'
PLUS = "".join(ONE % (i, i + 1) for i in range(60))


def data(tmp_path, content):
    (tmp_path / "x.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(tmp_path / "x.jsonl")


@pytest.mark.parametrize(
    "row, words",
    [
        ('{"question": null, "answer": "#### 1"}', ["question is missing or null"]),
        ('{"question": 7, "answer": "#### 1"}', ["question is 7", "a text"]),
        ('{"question": "a", "answer": 5}', ["answer is 5", "a text"]),
        ('{"question": "a", "answer": null}', ["answer is missing or null"]),
        ('{"question": "a"}', ["answer is missing"]),
        ('["a", "#### 1"]', ["no JSON object"]),
        ('{"question": "a", "answ', ["JSON", "Unterminated"]),
        ('{"question": "a", "answer": "5"}', ["####"]),
        ('{"question": "a", "answer": "#### , that is 5"}', ["####"]),
        ('{"question": "a", "answer": "#### ... 5"}', ["####"]),
        ('{"question": "a", "answer": "#### -."}', ["####"]),
        ("[" * 10**5, ["JSON"]),
        ("9" * 10**5, ["JSON"]),
    ],
)
def test_a_row_that_cannot_be_used_is_one_line_with_its_number_and_the_cause(row, words, tmp_path):
    with refused("--data", "x.jsonl", "row 62", *words):
        load_problems(data(tmp_path, PLUS + "\n" + row))


def test_a_file_that_cannot_be_used_is_one_line_with_the_cause(tmp_path):
    for content, words in (
        (PLUS.encode("utf-16"), ["UTF-8"]),
        (PLUS.encode("utf-16-le"), ["row 1", "JSON"]),
        (json.dumps([dict(question="a", answer="#### 1")]), ["row 1", "no JSON object"]),
        ("[\n" + PLUS, ["row 1", "JSON"]),
        (b"", ["too few"]),
        (b"\xff", ["UTF-8"]),
    ):
        with refused("--data", "x.jsonl", *words):
            load_problems(data(tmp_path, content))
    for name, words in (
        (tmp_path, "directory"),
        (tmp_path / ("a" * 300), "too long"),
        ("a" * 300, "too long"),
        (tmp_path / "none", "no such file"),
        (tmp_path / "x.jsonl" / "y", "directory"),
        (f"{tmp_path}/none.parquet", "none.parquet"),
    ):
        with refused("--data", words):
            load_problems(str(name))


def test_a_byte_order_mark_a_lone_surrogate_and_a_final_dot_change_nothing(tmp_path):
    expected = load_problems(data(tmp_path, PLUS))
    assert load_problems(data(tmp_path, "\ufeff" + PLUS)) == expected
    assert (
        load_problems(data(tmp_path, PLUS.replace('"}', '."}').replace("\n", "\r\n"))) == expected
    )
    ((question, answer),) = [
        p
        for part in load_problems(
            data(tmp_path, PLUS + '{"question": "\\ud83d 1+1?", "answer": "#### 2."}')
        )
        for p in part
        if "+" in p[0]
    ]
    assert answer == "2"
    tokenizer = load_tokenizer(save_json(tmp_path, make_json(merges_of(CORPUS, 20))))
    assert tokenizer.decode(tokenizer.encode(question)) == "\ufffd 1+1?"
    assert (
        word_problems(tmp_path, str(tmp_path / "x.jsonl"), "{question}", False).judge(
            (question, answer), "it is #### 2.", True
        )
        == 1
    )


def test_without_answers_a_row_may_lack_one_but_not_have_something_else_there(tmp_path):
    rows = PLUS.replace(', "answer": "#### 3"', "").replace('"#### 4"', "null")
    assert {a for part in load_problems(data(tmp_path, rows), answers=False) for _, a in part} >= {
        None,
        "5",
    }
    with refused("row 61", "answer is 5"):
        load_problems(data(tmp_path, rows + '{"question": "a", "answer": 5}'), answers=False)
