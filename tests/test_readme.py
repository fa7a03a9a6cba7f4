"""README.md and docs/ say what results/ holds. `python tests/test_readme.py --write` puts the
tables, the exercises and the times there.
"""

import builtins
import dataclasses
import dis
import importlib.util
import itertools
import json
import re
import shlex
import subprocess
import sys
import types
from os.path import commonprefix
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from common import Memory, launch

from experiment import parse_args

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results"
PAGES = {p: p.read_text() for p in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
TEXT = "\n".join(PAGES.values())
# of lessons and experiments
NAMES = sorted(p.parent.name for p in RESULTS.glob("*/claims.json"))
HEAD = "| claim | source | paper | ours | threshold | holds |\n|---|---|---|---|---|---|\n"
CLAIMS = re.compile(
    r"(!\[[^\]]*\]\(\.\./results/(\w+)/\w+\.png\)\n(?:(?!<details>|!\[).*\n)*)"
    r"<details><summary>Claims.*\n\n(?:\|.*\n)*\n</details>\n"
)
EXERCISES = re.compile(
    r"(<details><summary><code>(?:electives/)?(\w+)\.py</code>)[^\n]*\n(?:(?!</details>).*\n)*</details>\n"
)
BENCH = re.compile(r"(<!-- results/bench/benchmark.txt -->\n```text\n)[^`]*(\n```)")
# docs/claims.md, and what counts it
ALL = re.compile(r"^(\| claim \| figure \|.*\n\|[-|]+\n)(?:\|.*\n)*", re.M)
COUNT = re.compile(r"\b\d+ claims, \d+ hold, \d+ fail\b")
LESSON = re.compile(r"^(\| \[`(\w+\.py)`\]\(\2\) \|[^|]*\| )[^|]*( \|[^|]*\|)$", re.M)


def read(path):
    return json.loads((RESULTS / path).read_text())


def rows_of(name):
    return [
        json.loads(line) for line in (RESULTS / name / "metrics.jsonl").read_text().splitlines()
    ]


def line(cells):
    """A line of a table: a bar in a cell would end it."""
    cells = [str(cell).replace("|", "\\|") for cell in cells]
    return f"| {' | '.join(cells)} |\n"


def table(name):
    claims = read(f"{name}/claims.json")
    rows = ""
    for c in claims:
        holds = "yes" if c["holds"] else "**no**"
        rows += line([c["claim"], c["source"], c["paper"], c["ours"], c["threshold"], holds])
    hold = sum(c["holds"] for c in claims)
    summary = f"<details><summary>Claims: {hold} of {len(claims)} hold</summary>"
    return f"{summary}\n\n{HEAD}{rows}\n</details>\n"


def all_claims():
    """(figure, claim) of all, in the order of the pages."""
    shown = [m[2] for m in CLAIMS.finditer(TEXT)]
    return [(name, c) for name in shown if name in NAMES for c in read(f"{name}/claims.json")]


def anchor(heading):
    """What a link to a heading ends in, as GitHub writes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def section_of(name):
    """Where a figure is shown: page#heading."""
    for page, text in PAGES.items():
        before, shown, _ = text.partition(f"](../results/{name}/{name}.png)")
        if shown:
            return f"{page.name}#{anchor(re.findall(r'(?m)^##? (.*)$', before)[-1])}"


def table_of_all():
    """The claims that failed first, each with why."""
    why, rows = read("why.json"), {False: "", True: ""}
    for name, c in all_claims():
        verdict = "holds" if c["holds"] else f"**no.** {why.get(name + '/' + c['id'], '')}"
        figure = f"[{name}]({section_of(name)})"
        cells = [c["claim"], figure, c["paper"], c["ours"], c["threshold"], verdict]
        rows[c["holds"]] += line(cells)
    return rows[False] + rows[True]


def count():
    holds = [c["holds"] for _, c in all_claims()]
    return f"{len(holds)} claims, {sum(holds)} hold, {len(holds) - sum(holds)} fail"


def exercises(script):
    tasks = read("exercises.json")
    text = f"</summary>\n\n{tasks['about'][script]}\n\n"
    for i, e in enumerate(tasks[script], 1):
        text += f"**{i}.** {e['exercise']}\n\n```bash\n{e['command']}\n```\n\n"
        text += f"*What should happen.* {e['expect']}\n\n"
    return text + "</details>\n"


def minutes(script):
    seconds = read("times.json")["default runs, seconds"].get(script)
    return "" if seconds is None else f"{seconds} s" if seconds < 100 else f"{seconds / 60:.1f} min"


def rewritten(text):
    text = CLAIMS.sub(lambda m: m[1] + table(m[2]), text)
    text = ALL.sub(lambda m: m[1] + table_of_all(), text)
    text = COUNT.sub(count(), text)
    text = EXERCISES.sub(lambda m: m[1] + exercises(m[2]), text)
    bench = (RESULTS / "bench/benchmark.txt").read_text().strip()
    text = BENCH.sub(lambda m: f"{m[1]}{bench}{m[2]}", text)
    return LESSON.sub(lambda m: f"{m[1]}{minutes(m[2])}{m[3]}", text)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_tables_exercises_and_times_are_up_to_date(page):
    assert rewritten(PAGES[page]) == PAGES[page]


def test_the_front_page_is_short():
    assert len(PAGES[ROOT / "README.md"].split()) <= 1800


@pytest.mark.parametrize("name", NAMES)
def test_a_figure_is_shown_with_its_command_and_claims(name):
    assert [m[2] for m in CLAIMS.finditer(TEXT)].count(name) == 1
    assert (
        f"python {name}.py" in TEXT
        or f"python -m experiments.{name}" in TEXT
        or f"python -m electives.{name}" in TEXT
    )
    assert (RESULTS / name / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", NAMES)
def test_results_hold_the_metrics_and_the_config_of_every_claim(name):
    assert read(f"{name}/config.json")["revision"] not in ("", "unknown") and rows_of(name)


# --------------------------------------------------------------------------------------------------
# Claims


class Replay(Memory):
    """A Run whose rows are those of results/."""

    def __init__(self, name):
        super().__init__()
        self.rows = rows_of(name)

    def log(self, **row):
        raise AssertionError(f"not in results: {row}")


def module_of(name):
    """The lesson at the root, the experiment or the elective of that name."""
    folder = next(
        f for f in ("", "experiments/", "electives/") if (ROOT / f"{f}{name}.py").exists()
    )
    return importlib.import_module(f"{folder}{name}".replace("/", "."))


@pytest.mark.parametrize("name", [n for n in NAMES if n != "scale"])
def test_the_claims_are_what_the_present_code_makes_of_the_metrics(name):
    module, recorded = module_of(name), read(f"{name}/config.json")["config"]
    fields = {f.name for f in dataclasses.fields(module.Config)}
    config = module.Config(
        **{k: v for k, v in recorded.items() if k in fields and k not in ("out", "resume")}
    )
    claims = module.figure(config, Replay(name))[1]
    plt.close("all")
    assert claims == read(f"{name}/claims.json")


def test_every_failed_claim_and_no_other_has_a_why():
    failed = {f"{name}/{c['id']}" for name, c in all_claims() if not c["holds"]}
    assert set(read("why.json")) == failed
    assert {name for name, _ in all_claims()} == set(NAMES)


# --------------------------------------------------------------------------------------------------
# Numbers


def numbers_in(x):
    """Every number in some JSON, those inside its texts included: "0.0338 (0.51)", "2,000 draws",
    "k = 4".
    """
    if isinstance(x, dict):
        return itertools.chain.from_iterable(map(numbers_in, [*x, *x.values()]))
    if isinstance(x, list):
        return itertools.chain.from_iterable(map(numbers_in, x))
    if isinstance(x, str):
        return (
            float(n.replace(",", "")) for n in re.findall(r"(?<![\w.])-?(?:\d[\d,]*)?\.?\d+", x)
        )
    return () if x is None or isinstance(x, bool) else (float(x),)


def numbers_of(name):
    """What a figure's files say: claims, flags, and of the metrics the last row of each phase, arm
    and seed, with the means over seeds.
    """
    known, last, means = (
        set(numbers_in([read(f"{name}/claims.json"), read(f"{name}/config.json")])),
        {},
        {},
    )
    for row in rows_of(name):
        key = tuple((k, v) for k, v in row.items() if isinstance(v, str))
        last.setdefault((key, row.get("seed")), {}).update(row)
    for (key, _), row in last.items():
        known.update(numbers_in(row))
        for k, v in row.items():
            means.setdefault((key, k), []).append(v)
    return known | {
        sum(v) / len(v) for v in means.values() if all(isinstance(x, (int, float)) for x in v)
    }


def told(text):
    """The numbers that a text tells, as it writes them: not those in code, links, names of papers,
    tables of claims and exercises, or dimensions (4 x 128).
    """
    for gone in (
        r"(?s)```.*?```",
        r"(?s)<details>.*?</details>",
        r"`[^`]*`",
        r"\]\([^)]*\)",
        r"https?://\S+",
        r"arXiv:? ?\d{4}\.\d{4,5}",
        r"\b(?:19|20)\d\d\b",
        r"(?m)^#.*$",
        r"\b[A-Z][A-Za-z]*-?\d[\w.]*(?:-\w+)?",
        r"\b\d+ x \d+(?: x \d+)?\b",
        r"(?m)^\s*\d+\. ",
        r"(?m)\d+ \|$",
        r"\| [\d.]+ (?:min|s) \|",
    ):
        text = re.sub(gone, " ", text)
    return re.findall(r"(?<![\w.\-/])[+-]?(?:\d[\d,]*)?\.?\d+(?![\d/])", text)


def found(number, known):
    value, digits = abs(float(number.replace(",", ""))), len(number.partition(".")[2])
    # percent, thousands, millions
    scales = (1, 100, 1e-3, 1e-6) if digits == 0 or value >= 1 else (1,)
    return any(abs(value - abs(k) * s) <= 0.5001 * 10**-digits for k in known for s in scales)


SHARED = set(
    numbers_in(
        [
            read(name)
            for name in ("times.json", "tried.json", "exercises.json", "bench/benchmark.json")
        ]
    )
)
SHARED |= set(numbers_in((RESULTS / "bench/benchmark.txt").read_text()))
SHARED |= set(numbers_in(count()))
SECTIONS = [s for s in re.split(r"^(?=##? )", TEXT, flags=re.M) if told(s)]


@pytest.mark.parametrize("section", SECTIONS, ids=lambda s: s.splitlines()[0].strip("# "))
def test_every_number_is_found_in_results(section):
    shown = [
        name for name in re.findall(r"\(\.\./results/(\w+)/\w+\.png\)", section) if name in NAMES
    ]
    if shown:
        known = SHARED.union(*map(numbers_of, shown))
    else:  # a section without a figure may tell of all
        known = SHARED.union(
            *(
                numbers_in(read(f"{name}/{kind}.json"))
                for name in NAMES
                for kind in ("claims", "config")
            )
        )
    assert [n for n in told(section) if not found(n, known)] == []


@pytest.mark.parametrize("claim", read("why.json"))
def test_a_why_is_short_and_its_numbers_are_found_in_its_figures_results(claim):
    why = read("why.json")[claim]
    assert 0 < len(why.split()) <= 25
    known = SHARED | numbers_of(claim.partition("/")[0])
    assert [n for n in told(why) if not found(n, known)] == []


def test_a_number_that_is_in_no_result_is_missed():
    assert told("a rise of 0.37 in 45 steps, `x = 3`, arXiv 2504.13837, 4 x 128, GPT-2") == [
        "0.37",
        "45",
    ]
    assert found("0.37", {0.3712})
    assert found("37", {0.3712})
    assert found("300", {300000})
    assert not found("0.38", {0.3712})
    assert not found("46", {45.0})


# --------------------------------------------------------------------------------------------------
# Names


@pytest.mark.parametrize("script", read("exercises.json")["about"])
def test_an_exercise_quotes_the_file_and_tells_what_was_measured(script):
    source, tasks = (
        "".join((ROOT / path).read_text() for path in SOURCES),
        read("exercises.json")[script],
    )
    assert len(tasks) == 5
    for e in tasks:
        quotes = re.findall(r"`([^`]+)`", e["exercise"])
        assert any(q in source for q in quotes) or any(q.startswith("--") for q in quotes), e[
            "exercise"
        ]
        known = set(numbers_in([e["measured"], e["command"], e["exercise"]]))
        assert [n for n in told(e["expect"]) if not found(n, known)] == [], e["expect"]


# What each exercise asks to change, (script, number) -> (old, new) in turn. Whoever changes a line
# that an exercise quotes changes it here and in exercises.json.
EDITS = {
    ("reinforce", 3): [
        ("advantage = rewards - rewards.mean(1, keepdim=True)", "advantage = rewards")
    ],
    ("reinforce", 4): [
        ("GROUP = 8  # answers to each of them", "GROUP = 2  # answers to each of them")
    ],
    ("reinforce", 5): [
        ("mask = rollout.mask[:, 1:]", "mask = torch.ones_like(rollout.mask[:, 1:])")
    ],
    ("grpo", 2): [
        (
            "return float(written == right and len(text) % LINE == 0)",
            "return float(all(right.get(c) == d for c, d in written.items())"
            " and len(text) % LINE == 0)",
        )
    ],
    ("grpo", 3): [("return adv.reshape(-1, 1)", "return adv.reshape(-1, 1).roll(1, 0)")],
    ("grpo", 4): [
        (
            "kl = kl_estimate(logp, ref_logp[rows], config.kl)",
            'kl = kl_estimate(logp, ref_logp[rows], "k1")',
        )
    ],
    ("grpo", 5): [("rng.shuffle(order)", "")],
    ("opd", 2): [
        (
            "return PASSWORDS[zlib.crc32(repr(tuple(pair)).encode()) % len(PASSWORDS)]",
            "return PASSWORDS[0]",
        )
    ],
    ("opd", 3): [("return (logp - logq).detach() * logp", "return logp - logq")],
    ("opd", 4): [
        (
            "PASSWORD = Hint(prompt_with_password, (*range(PLACES), EOS), recall=8, keep=4)",
            "PASSWORD = Hint(prompt_with_password, (*range(PLACES), *range(49, 53), EOS), "
            "recall=8, keep=4)",
        )
    ],
    ("selfteach", 1): [
        (
            "def proximity(lp, y, mask, spike=5.0, strength=1.0):",
            "def proximity(lp, y, mask, spike=0.01, strength=1.0):",
        )
    ],
    ("selfteach", 2): [
        (
            "return (lp.exp() * (lp - lq)).sum(-1)  # reverse",
            "return (lq.exp() * (lq - lp)).sum(-1)  # reverse",
        )
    ],
    ("selfteach", 3): [
        (
            "w = torch.sigmoid(slope * (logp.detach() - gamma))",
            "w = torch.sigmoid(slope * (logp - gamma))",
        )
    ],
    ("selfteach", 4): [("return (d < clip).float()", "return (clip / d).clamp(0, 1)")],
    ("selfteach", 5): [
        (
            "with torch.no_grad():\n            # whatever asks",
            "with torch.enable_grad():\n            # whatever asks",
        )
    ],
    ("curriculum", 2): [
        ("total = a + b if honest else rng.randrange(3, 2 * HIGHEST)", "total = 3")
    ],
    ("curriculum", 3): [
        (
            "rollout, texts, rewards = answer(model, problems, config.group, budget, generator)",
            "rollout, texts, rewards = answer(model, problems, config.group, budget, generator)\n"
            '    rewards = torch.tensor([float("OK" in text) for text in texts])'
            ".view(-1, config.group)",
        )
    ],
    ("curriculum", 4): [
        (
            "np.where(right, 1.0, 0.0 if masked else -1.0)",
            "np.where(right, 2.0 if masked else 0.0, 0.0 if masked else -2.0)",
        )
    ],
    ("curriculum", 5): [
        (
            "for _ in range(attempts):",
            "pairs = [(a, b) for i, a in enumerate(numbers) for b in numbers[i + 1:]]\n"
            "    for _ in range(attempts):",
        ),
        ("a, b = rng.sample(numbers, 2)", "a, b = pairs.pop(0)"),
    ],
    ("coverage", 1): [
        (
            "def table(H, n, seed, prompts=1000, V=4, a=0.01):",
            "def table(H, n, seed, prompts=1000, V=4, a=0.1):",
        )
    ],
    ("coverage", 2): [
        (
            "def select(config, model, valid, weights, seed, N=4):",
            "def select(config, model, valid, weights, seed, N=64):",
        )
    ],
    ("coverage", 3): [
        (
            "for step, _ in train(config, run, loop, seed, model, DATA, rates, loss_of, kept):",
            "for step, _ in "
            "train(config, run, loop, seed, model, (0.5, 0.5, 0.0), rates, loss_of, kept):",
        )
    ],
    ("coverage", 4): [
        (
            "weights = truncated_weights(np.broadcast_to(e, (seeds, H)), math.log(N))",
            "weights = truncated_weights(np.broadcast_to(e, (seeds, H)), math.inf)",
        )
    ],
    ("coverage", 5): [
        ("g = g / (1 + np.linalg.norm(g, axis=-1, keepdims=True))", "g = np.sign(g)")
    ],
    ("ttt", 2): [
        (
            "return tuple(w - scale[:, None, None] * g for w, g in zip(fast, grads, strict=True))",
            "return tuple(w - scale[:, None, None] * g.mean(0) "
            "for w, g in zip(fast, grads, strict=True))",
        )
    ],
    ("ttt", 3): [
        (
            "return (loss, *inner_update(fast, grads, eta))",
            "fast = inner_update(fast, grads, eta)\n"
            "    return (token_losses(model, x, y, fast), *fast)",
        )
    ],
    ("ttt", 4): [
        (
            "return (loss, *inner_update(fast, grads, eta))",
            "return (loss, *inner_update(fast, [g.detach() for g in grads], eta))",
        )
    ],
    ("ttt", 5): [
        (
            "for t in range(1, T):",
            "for t in range(1, T):\n"
            "        if t == T // 2: successor = rng.random((B, V)).argsort(1)",
        )
    ],
    ("pretrain", 1): [("temperature=0.8", "temperature=0")],
    ("pretrain", 2): [
        (
            "y = attention(*(t.transpose(1, 2) for t in (q, k, v)), window=self.window, mask=mask)",
            "y = attention(*(t.transpose(1, 2) for t in (q, k, v)), "
            "window=self.window, mask=mask, causal=False)",
        )
    ],
    ("pretrain", 3): [("cache.set_lens(lens)", "")],
    ("pretrain", 4): [("used_up = spent > self.budget", "used_up = spent > math.inf")],
    ("kernels", 1): [("BLOCK = 2**24", "BLOCK = 2**20")],
    ("kernels", 2): [("m_new = torch.maximum(m, z.amax(-1))", "m_new = torch.zeros_like(m)")],
    ("kernels", 3): [
        (
            "dh = torch.zeros(h.shape, dtype=torch.float32, device=h.device)",
            "dh = torch.zeros(h.shape, dtype=h.dtype, device=h.device)",
        )
    ],
    ("kernels", 4): [
        (
            "acc = dot((p * (dp - sums[:, None])).to(q.dtype), k_tile, acc)",
            "acc = dot((p * dp).to(q.dtype), k_tile, acc)",
        )
    ],
    ("bestofn", 2): [
        (
            "def make_table(seed, K=20_000, overrated=0.002):",
            "def make_table(seed, K=20_000, overrated=0.0002):",
        )
    ],
    ("bestofn", 3): [("return scores.argmax(1)", "return scores.clamp_max(0.9).argmax(1)")],
    ("bestofn", 4): [
        (
            "passed[:, -1] = True",
            "passed |= ~passed.any(1, keepdim=True) & (tried == tried.max(1, keepdim=True).values)",
        )
    ],
    ("bestofn", 5): [("    return a.max(1).values", "    return a[:, -1]")],
    ("quasi", 2): [
        (
            "u = (grid + rand(groups, 1)) % 1  # (groups, n)",
            "u = grid.repeat(groups, 1)  # (groups, n)",
        )
    ],
    ("quasi", 3): [
        (
            "        order = rand(groups, n).argsort(1)",
            "        order = torch.arange(n).repeat(groups, 1)",
        )
    ],
    ("quasi", 4): [
        (
            "flipped = bits ^ coins  # (groups, n, tokens)",
            "flipped = bits ^ (0 * coins)  # (groups, n, tokens)",
        )
    ],
    ("quasi", 5): [("HUM = 4  # sums that decide nothing", "HUM = 1  # sums that decide nothing")],
    ("backtrack", 2): [("back = tree.value.copy()", "back = 0 * tree.value")],
    ("backtrack", 3): [("back = tree.value.copy()", "back = (tree.value > 0).astype(float)")],
    ("backtrack", 4): [
        (
            "law = (law + children + parents) / 2",
            "law = children + parents",
        )
    ],
    ("backtrack", 5): [
        (
            "tree.value[inner] *= 1 + (tree.token[inner] == 0)",
            "tree.value[inner] *= 1 + 9 * (tree.token[inner] == 0)",
        )
    ],
    ("calibrate", 1): [("return 1 - (c - right) ** 2", "return 1 - (c - right) ** 4")],
    ("calibrate", 2): [
        (
            "return (says * FORECASTS - table[:, 1]).abs().sum()",
            "return (says * FORECASTS - table[:, 1]).sum().abs()",
        )
    ],
    ("calibrate", 3): [("return right @ (below + wrong / 2)", "return right @ (below + wrong)")],
    ("calibrate", 4): [
        ("return rule(c, right.float()[:, None]) * legal", "return rule(c, right.float()[:, None])")
    ],
    ("calibrate", 5): [
        (
            "word = (value_p * (len(WORDS) - 1)).round().long()  # the nearest",
            "word = (value_p * (len(WORDS) - 1)).floor().long()  # the nearest",
        )
    ],
    ("recover", 2): [("weights[-2] = 0  # the blot is no lesson", "")],
    ("recover", 3): [
        (
            "if wrong and not right:\n            return wrong",
            "if not right:\n            return page",
        )
    ],
    ("recover", 4): [
        ("return -per_lesson.mean()", "return -(logp * weights[:, 1:]).sum() / weights.sum()")
    ],
    ("recover", 5): [("p[:, BLOT] = slip * letters.sum(1)", "p[:, BLOT] += slip * letters.sum(1)")],
    ("floq", 2): [
        (
            "z = z + velocity(z, torch.full_like(z, i / K)) / K",
            "z = z + velocity(z, torch.zeros_like(z)) / K",
        )
    ],
    ("floq", 3): [("v = v.scatter(1, world.goal[:, None], 0)", "")],
    ("floq", 4): [("STARTS = 4  # of a reading", "STARTS = 1  # of a reading")],
    ("floq", 5): [
        (
            "told = torch.cat((x, place, time), dim=3)",
            "told = torch.cat((x, 0 * place, 0 * time), dim=3)",
        )
    ],
    ("forget", 1): [
        ("return -(-u.log()).log().to(like.device)", "return -u.log().to(like.device)")
    ],
    ("forget", 2): [("scores = scores.scatter(-1, a, -torch.inf)", "")],
    ("forget", 3): [
        (
            "masks[:, :, end:, :end] &= tokens[:, :, None]",
            "masks[:, :, end + 1 :, :end] &= tokens[:, :, None]",
        )
    ],
    ("forget", 4): [("cache.base = cache.length - n", "cache.length = n")],
    ("forget", 5): [("return (mass + 1e-9).log()", "return (mass + 1e-9).log().detach()")],
    ("prompt", 1): [("return logits[:, k:]", "return logits")],
    ("prompt", 2): [
        ("return slice(self.length, self.length + T), None", "return slice(0, T), None")
    ],
    ("prompt", 3): [
        ("torch.cat((prompt, ids), dim=1))", "torch.cat((ids, prompt), dim=1))"),
        ("return logits[:, k:]", "return logits[:, :-k]"),
    ],
    ("prompt", 4): [
        (
            "return torch.cat((before[0], k), dim=1), torch.cat((before[1], v), dim=1)",
            "return torch.cat((k, before[0]), dim=1), torch.cat((v, before[1]), dim=1)",
        )
    ],
    ("prompt", 5): [('UNSEEN = "RL", "WE", "SN"', 'UNSEEN = "RN", "LM", "PE"')],
    ("relay", 1): [("chosen = doubt.cumsum(1) < eta", "chosen = doubt < eta")],
    ("relay", 2): [
        (
            "stays = torch.rand(canvas.shape, generator=generator) < (i - 1) / i",
            "stays = torch.rand(canvas.shape, generator=generator) < (i - 1) / steps",
        )
    ],
    ("relay", 3): [
        (
            "return (loss * masked).sum(1) / t / (board == MASK).sum(1)",
            "return (loss * masked).sum(1) / (board == MASK).sum(1)",
        )
    ],
    ("relay", 4): [
        (
            "sees = torch.stack((*units, torch.ones_like(units[0])))",
            "sees = torch.stack((*units, units[0]))",
        )
    ],
    ("relay", 5): [("h = after if gradient else after.detach()", "h = after.detach()")],
    ("metagrad", 1): [
        (
            "(pull[0],) = torch.autograd.grad(metric(theta), theta)",
            "(pull[0],) = torch.autograd.grad(-metric(theta), theta)",
        )
    ],
    ("metagrad", 2): [
        (
            "return torch.stack(rewards).repeat(len(ids) // group), theta",
            "return torch.stack(rewards).repeat_interleave(len(ids) // group), theta",
        )
    ],
    ("metagrad", 3): [("every = math.isqrt(M - 1) + 1", "every = 1")],
    ("metagrad", 4): [
        (
            "pull, tau[t] = torch.autograd.grad(after, (state, w), pull)",
            "(tau[t],) = torch.autograd.grad(after, w, pull)",
        )
    ],
    ("metagrad", 5): [
        (
            "def adam(state, grad, t, lr, beta1=0.9, beta2=0.95, root=1e-4):",
            "def adam(state, grad, t, lr, beta1=0.9, beta2=0.95, root=1e-12):",
        )
    ],
    ("entigraph", 2): [
        (
            'turned = rng.random() < 0.5 and ("reversed", *link) in told["reversed"]',
            "turned = rng.random() < 0.5",
        )
    ],
    ("entigraph", 3): [
        ("TURNED: partial(paraphrase, turned=0.2),", "TURNED: partial(paraphrase, turned=0.02),")
    ],
    ("entigraph", 4): [
        ("while len(tokens) < n:", "for _ in range(n // 5):"),
        ("return tokens[:n]", "return tokens"),
    ],
    ("entigraph", 5): [
        (
            "facts[r] = {x: facts[b][facts[a][x]] for x in people}",
            "facts[r] = {x: facts[a][facts[b][x]] for x in people}",
        )
    ],
    ("compose", 1): [("if argument != string:", "if argument not in (string, *given):")],
    ("compose", 2): [
        (
            'text += "".join(name + "." * LENGTH for name in names[1:])',
            'text += "".join(name + string for name in names[1:])',
        )
    ],
    ("compose", 3): [("if lines[last][2] != pipe[-1][2]:", "if pipe[-1][2] not in text:")],
    ("compose", 4): [
        (
            "return centred if negatives else centred.clamp_min(0)",
            "return centred if negatives else rewards",
        )
    ],
    ("compose", 5): [
        (
            "centred = rewards - rewards.mean(1, keepdim=True)",
            "centred = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, "
            "keepdim=True) + 1e-6)",
        )
    ],
}
TASKS = [(script, i) for script in read("exercises.json")["about"] for i in range(1, 6)]


def fragments(old, new):
    """What differs in each line of the two."""
    for a, b in itertools.zip_longest(old.split("\n"), new.split("\n"), fillvalue=""):
        start = len(commonprefix((a, b)))
        end = len(commonprefix((a[start:][::-1], b[start:][::-1])))
        yield from (a[start : len(a) - end].strip(), b[start : len(b) - end].strip())


def changed(script, number, folder):
    """A copy of the project in a folder, with an exercise's edits -> the paths that they change.
    Each old line stands in one place of the project.
    """
    for path in SOURCES:
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text((ROOT / path).read_text())
    edited = []
    for old, new in EDITS.get((script, number), []):
        places = [path for path in SOURCES if old in (folder / path).read_text()]
        count = sum((folder / path).read_text().count(old) for path in places)
        assert count == 1, f"{count} times in {', '.join(map(str, places))}: {old}"
        (folder / places[0]).write_text((folder / places[0]).read_text().replace(old, new))
        edited.append(places[0])
    return edited


SOURCES = [
    p.relative_to(ROOT)
    for f in (".", "tasks", "experiments", "electives")
    for p in sorted((ROOT / f).glob("*.py"))
]
MODULES = {str(p.with_suffix("")).replace("/", ".").removesuffix(".__init__") for p in SOURCES} | {
    "experiments",
    "electives",
}


@pytest.fixture
def elsewhere(monkeypatch, tmp_path):
    """Imports in this test find the project's modules in tmp_path."""
    before = {name: sys.modules.pop(name) for name in MODULES if name in sys.modules}
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in MODULES:
        sys.modules.pop(name, None)
    sys.modules.update(before)


def unknown_names(code, module):
    """The global names that a code object and all inside it ask for and nobody has."""
    asked = {
        i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")
    }
    inside = [unknown_names(c, module) for c in code.co_consts if isinstance(c, types.CodeType)]
    # a class body sets names of its own
    local = set(code.co_names) if "__qualname__" in code.co_names else set()
    return {
        name for name in asked - local if name not in vars(module) and not hasattr(builtins, name)
    }.union(*inside)


@pytest.mark.parametrize("script, number", TASKS)
def test_an_exercise_asks_for_the_changes_that_the_tests_make(script, number):
    text = read("exercises.json")[script][number - 1]["exercise"]
    for old, new in EDITS.get((script, number), []):
        assert [f for f in fragments(old, new) if f.strip(", ") not in text] == []
    asks = re.search(
        r"(?i)\b(replace\b|change `|delete the line\b|insert\b|put `|gets `|add the argument\b)",
        text,
    )
    assert (script, number) in EDITS or number == 5 or asks is None, text


@pytest.mark.parametrize("script, number", list(EDITS))
def test_the_change_of_an_exercise_can_be_made_in_one_place_and_leaves_no_name_unknown(
    script, number, elsewhere
):
    for path in changed(script, number, elsewhere):
        module = importlib.import_module(
            str(path.with_suffix("")).replace("/", ".").removesuffix(".__init__")
        )
        assert Path(module.__file__) == elsewhere / path
        assert unknown_names(compile((elsewhere / path).read_text(), path, "exec"), module) == set()


def commands(script, number):
    """The runs that an exercise asks for: module, flags, whether they come before the change."""
    for line in read("exercises.json")[script][number - 1]["command"].splitlines():
        if re.match(r"python (-m (experiments|electives)\.)?\w+", line) and not line.startswith(
            "python -c"
        ):
            _, *words = shlex.split(line.replace("python -m ", "python "), comments=True)
            name = words[0].removesuffix(".py")
            # not a file that the reader is to write
            if Path(f"{name.replace('.', '/')}.py") in SOURCES:
                yield name, words[1:], "# before the change" in line


@pytest.mark.parametrize("script, number", [task for task in TASKS if list(commands(*task))])
def test_the_command_of_an_exercise_is_one_and_runs_quickly_after_the_change(
    script, number, elsewhere
):
    """All flags are read as they are; then the run has only those whose value --quick does not
    choose.
    """
    changed(script, number, elsewhere)
    for name, given, before in commands(script, number):
        Config = importlib.import_module(name).Config
        quick = {
            "--" + f.name.replace("_", "-")
            for f in dataclasses.fields(Config)
            if f.metadata["quick"] is not None
        }
        if "--resume" not in given:
            parse_args(Config, "", given)
        if (script, number) not in EDITS or before:
            continue
        kept, i = [], 0
        while i < len(given):
            width = 1 if i + 1 == len(given) or given[i + 1].startswith("--") else 2
            if given[i] not in quick | {"--out"}:
                kept += given[i : i + width]
            i += width
        code, _, err = launch(
            name, *kept, *([] if "--resume" in kept else ["--quick"]), "--out", elsewhere / "out"
        )
        assert code == 0, err
        assert (elsewhere / "out" / "claims.json").exists()


# python -c "..." that takes seconds
PIECES = {
    ("curriculum", 4),
    ("pretrain", 4),
    ("kernels", 2),
    ("kernels", 3),
    ("kernels", 4),
    ("bestofn", 5),
    ("quasi", 2),
    *itertools.product(
        ("calibrate", "recover", "relay", "metagrad", "entigraph", "compose"), range(1, 6)
    ),
    *itertools.product(("selfteach",), range(1, 5)),
    ("forget", 2),
    ("prompt", 3),
}


@pytest.mark.parametrize("script, number", sorted(PIECES))
def test_a_piece_of_code_in_an_exercise_runs_after_the_change(script, number, elsewhere, capsys):
    changed(script, number, elsewhere)
    command = read("exercises.json")[script][number - 1]["command"]
    piece = re.search(r'python -c "(.*?)"$', command, re.S | re.M)[1]
    exec(compile(piece, "exercise", "exec"), {"__name__": "exercise"})
    assert capsys.readouterr().out


def test_every_test_that_the_pages_name_exists():
    tests = "".join(p.read_text() for p in (ROOT / "tests").glob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", TEXT)
    assert len(named) > 20 and [name for name in named if f"def {name}(" not in tests] == []


def test_every_mistake_on_the_page_of_tests_has_a_test():
    page = PAGES[ROOT / "docs" / "tested.md"]
    rows = re.findall(r"(?m)^\| (.*) \|$(?!\n\|-)", page)  # not the heads of tables
    assert len(rows) > 100 and [r for r in rows if "`test_" not in r.split("|")[-1]] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_file_that_a_page_links_to_exists(page):
    assert [
        path
        for path in re.findall(r"\]\((?!http|#)([^)#]+)", PAGES[page])
        if not (page.parent / path).exists()
    ] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_heading_that_a_page_links_to_exists(page):
    for path, heading in re.findall(r"\]\((?!http)([^)#]*)#([^)]+)\)", PAGES[page]):
        there = PAGES[(page.parent / path).resolve()] if path else PAGES[page]
        assert heading in map(anchor, re.findall(r"(?m)^#+ (.*)$", there)), heading


def test_every_lesson_foundation_and_experiment_stands_on_a_page():
    assert [
        p.name for p in ROOT.glob("*.py") if f"({p.name})" not in PAGES[ROOT / "README.md"]
    ] == []
    assert [
        p.stem for p in ROOT.glob("experiments/[a-z]*.py") if f"experiments.{p.stem}" not in TEXT
    ] == []


@pytest.mark.parametrize("question", ["check", "format --check"])
def test_ruff_has_nothing_to_mend(question):
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *question.split(), "--no-cache", "."],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        raise SystemExit("python tests/test_readme.py --write")
    for page, text in PAGES.items():
        page.write_text(rewritten(text))
