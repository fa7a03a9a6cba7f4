"""README.md says what results/ holds. `python tests/test_readme.py --write` puts the tables, the exercises and the line counts there."""
import dataclasses
import importlib
import itertools
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest

from common import Memory

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results"
README = (ROOT / "README.md").read_text()
FIGURES = sorted(RESULTS.rglob("*.png"))
HEAD = "| claim | source | paper | ours | threshold | holds |\n|---|---|---|---|---|---|\n"
CLAIMS = re.compile(r"(!\[[^\]]*\]\(results/(\w+)/(\w+)\.png\)\n(?:(?!<details>|!\[).*\n)*)<details><summary>Claims.*\n\n(?:\|.*\n)*\n</details>\n")
EXERCISES = re.compile(r"(<details><summary><code>(\w+)\.py</code>)[^\n]*\n(?:(?!</details>).*\n)*</details>\n")
FILE = re.compile(r"^(\| \[`(\w+\.py)`\].*\| )[^|]*( \|[^|]*\| )\d+ \|$", re.M)


def read(path):
    return json.loads((RESULTS / path).read_text())


def table(script, figure):
    claims = read(f"{script}/{figure}.claims.json")
    rows = "".join(f"| {c['claim']} | {c['source']} | {c['paper']} | {c['ours']} | {c['threshold']} | {'yes' if c['holds'] else '**no**'} |\n" for c in claims)
    return f"<details><summary>Claims: {sum(c['holds'] for c in claims)} of {len(claims)} hold</summary>\n\n{HEAD}{rows}\n</details>\n"


def exercises(script):
    tasks = read("exercises.json")
    return f"</summary>\n\n{tasks['about'][script]}\n\n" + "".join(f"**{i}.** {e['exercise']}\n\n```bash\n{e['command']}\n```\n\n*What should happen.* {e['expect']}\n\n"
        for i, e in enumerate(tasks[script], 1)) + "</details>\n"


def minutes(script):
    seconds = read("times.json")["default runs, seconds"].get(script)
    return "" if seconds is None else f"{seconds} s" if seconds < 100 else f"{seconds / 60:.1f} min"


def rewritten(text):
    text = CLAIMS.sub(lambda m: m[1] + table(m[2], m[3]), text)
    text = EXERCISES.sub(lambda m: m[1] + exercises(m[2]), text)
    return FILE.sub(lambda m: f"{m[1]}{minutes(m[2])}{m[3]}{len((ROOT / m[2]).read_text().splitlines())} |", text)


def test_the_tables_the_exercises_and_the_line_counts_are_up_to_date():
    assert rewritten(README) == README


@pytest.mark.parametrize("png", FIGURES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_a_figure_is_shown_with_its_command_and_claims(png):
    script, figure = png.parent.name, png.stem
    assert [m[3] for m in CLAIMS.finditer(README) if m[2] == script].count(figure) == 1 or not png.with_suffix(".claims.json").exists()
    assert f"(results/{script}/{figure}.png)" in README and f"python {script}.py" in README
    assert png.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("path", sorted(RESULTS.rglob("*.claims.json")), ids=lambda p: f"{p.parent.name}/{p.name}")
def test_results_hold_the_metrics_the_config_and_the_figure_of_every_claim(path):
    stem = path.name.removesuffix(".claims.json")
    assert all((path.parent / f"{stem}{suffix}").stat().st_size for suffix in (".png", ".jsonl", ".config.json"))
    config = json.loads((path.parent / f"{stem}.config.json").read_text())
    assert config["revision"] not in ("", "unknown") and stem in (config["config"]["figure"], config["config"].get("init"))
    assert all(json.loads(line) for line in (path.parent / f"{stem}.jsonl").read_text().splitlines())


# ---------------------------------------------------------------------------------------------------------------------------
# Claims

TRAINERS = {"grpo": ("warm_up", "train", "length_bias_gpt"), "opd": ("from_scratch", "train", "fast_and_slow"), "curriculum": ("warm_up", "train"),
            "coverage": ("train", "fine_tune"), "ttt": ("train", "decode", "passages")}


class Trained:
    """Whatever training returns: never looked into, because all measurements are among the rows already."""
    config = SimpleNamespace(figure="")

    def __iter__(self):
        return iter((self, self, self))

    def __len__(self):
        return 3

    def save_pretrained(self, *_, **__):
        pass


class Replay(Memory):
    """A Run whose rows are those of results/."""
    def __init__(self, rows, folder):
        super().__init__()
        self.rows, self.dir = rows, folder

    def log(self, **row):
        raise AssertionError(f"not in results: {row}")


def replayed(script, figure, folder):
    """What the present code makes of the metrics in results/, training nothing -> the figure, its claims."""
    module, recorded = importlib.import_module(script), read(f"{script}/{figure}.config.json")["config"]
    fields = {f.name for f in dataclasses.fields(module.Config)}
    config = module.Config(**{k: v for k, v in recorded.items() if k in fields and k not in ("out", "resume")})
    rows = [json.loads(line) for line in (RESULTS / script / f"{figure}.jsonl").read_text().splitlines()]
    with pytest.MonkeyPatch.context() as patch:
        for name in TRAINERS[script]:
            patch.setattr(module, name, lambda *_, **__: Trained())
        if script == "curriculum":
            patch.setattr(module, "pk_train", lambda *_, steps, **__: np.tile(np.linspace(0.1, 1, steps)[:, None], 3))
            patch.setattr(module, "pk_reuse", lambda *_, **__: np.tile(np.linspace(0.05, 1, 9)[:, None], 4))
        texts = ([], []) if (script, figure) == ("ttt", "context") else ()
        return getattr(module, f"figure_{config.figure}")(config, Replay(rows, folder), "cpu", *texts)


@pytest.mark.parametrize("path", [p for p in sorted(RESULTS.rglob("*.claims.json")) if p.parent.name in TRAINERS], ids=lambda p: f"{p.parent.name}/{p.name}")
def test_the_claims_are_what_the_present_code_makes_of_the_metrics(path, tmp_path):
    script, figure = path.parent.name, path.name.removesuffix(".claims.json")
    same = lambda claims: [c for c in claims if not c["id"].startswith("pk")]      # the p^k model runs anew in each figure, and takes seconds
    claims = replayed(script, figure, tmp_path)[1]
    plt.close("all")
    assert same(claims) == same(read(f"{script}/{figure}.claims.json"))


# ---------------------------------------------------------------------------------------------------------------------------
# Numbers

def numbers_in(x):
    """Every number in some JSON, those inside its texts included: "0.0338 (0.51)", "2,000 draws", "k = 4"."""
    if isinstance(x, dict):
        return itertools.chain.from_iterable(map(numbers_in, [*x, *x.values()]))
    if isinstance(x, list):
        return itertools.chain.from_iterable(map(numbers_in, x))
    if isinstance(x, str):
        return (float(n.replace(",", "")) for n in re.findall(r"(?<![\w.])-?(?:\d[\d,]*)?\.?\d+", x))
    return () if x is None or isinstance(x, bool) else (float(x),)


def numbers_of(script, figure):
    """What a figure's files say: claims, flags, and of the metrics the last row of each phase, arm and seed, with the means over seeds."""
    known, last, means = set(numbers_in([read(f"{script}/{figure}.claims.json"), read(f"{script}/{figure}.config.json")])), {}, {}
    for line in (RESULTS / script / f"{figure}.jsonl").read_text().splitlines():
        row = json.loads(line)
        name = tuple((k, v) for k, v in row.items() if isinstance(v, str))
        last.setdefault((name, row.get("seed")), {}).update(row)
    for (name, _), row in last.items():
        known.update(numbers_in(row))
        for k, v in row.items():
            means.setdefault((name, k), []).append(v)
    return known | {sum(v) / len(v) for v in means.values() if all(isinstance(x, (int, float)) for x in v)}


def told(text):
    """The numbers that a text tells, as it writes them: not those in code, links, names of papers, tables of claims and exercises, or dimensions (4 x 128)."""
    for gone in (r"(?s)```.*?```", r"(?s)<details>.*?</details>", r"`[^`]*`", r"\]\([^)]*\)", r"https?://\S+", r"arXiv:? ?\d{4}\.\d{4,5}", r"\b(?:19|20)\d\d\b",
                 r"(?m)^#.*$", r"\b[A-Z][A-Za-z]*-?\d[\w.]*(?:-\w+)?", r"\b\d+ x \d+(?: x \d+)?\b", r"(?m)^\s*\d+\. ", r"(?m)\d+ \|$", r"\| [\d.]+ (?:min|s) \|"):
        text = re.sub(gone, " ", text)
    return re.findall(r"(?<![\w.\-/])[+-]?(?:\d[\d,]*)?\.?\d+(?![\d/])", text)


def found(number, known):
    value, digits = abs(float(number.replace(",", ""))), len(number.partition(".")[2])
    scales = (1, 100, 1e-3, 1e-6) if digits == 0 or value >= 1 else (1,)        # percent, thousands, millions
    return any(abs(value - abs(k) * s) <= 0.5001 * 10 ** -digits for k in known for s in scales)


SHARED = set(numbers_in([read(name) for name in ("times.json", "tried.json", "exercises.json", "kernels/benchmark.json")]))
SHARED |= set(numbers_in((RESULTS / "model/benchmark.txt").read_text()))
SECTIONS = [s for s in re.split(r"^(?=###? )", README, flags=re.M) if told(s)]


@pytest.mark.parametrize("section", SECTIONS, ids=lambda s: s.splitlines()[0].strip("# "))
def test_every_number_is_found_in_results(section):
    shown = [(s, f) for s, f in re.findall(r"\(results/(\w+)/(\w+)\.png\)", section) if (RESULTS / s / f"{f}.claims.json").exists()]
    if not shown:                   # a section without a figure may tell of all
        shown = [(p.parent.name, p.name.removesuffix(".claims.json")) for p in RESULTS.rglob("*.claims.json")]
        known = SHARED.union(*(numbers_in(read(f"{s}/{f}.{kind}.json")) for s, f in shown for kind in ("claims", "config")))
    else:
        known = SHARED.union(*(numbers_of(s, f) for s, f in shown))
    assert [n for n in told(section) if not found(n, known)] == []


def test_a_number_that_is_in_no_result_is_missed():
    assert told("a rise of 0.37 in 45 steps, `x = 3`, arXiv 2504.13837, 4 x 128, GPT-2") == ["0.37", "45"]
    assert found("0.37", {0.3712}) and found("37", {0.3712}) and found("300", {300000}) and not found("0.38", {0.3712}) and not found("46", {45.0})


# ---------------------------------------------------------------------------------------------------------------------------
# Names

@pytest.mark.parametrize("script", read("exercises.json")["about"])
def test_an_exercise_quotes_the_file_and_tells_what_was_measured(script):
    source, tasks = (ROOT / f"{script}.py").read_text(), read("exercises.json")[script]
    assert len(tasks) == 5
    for e in tasks:
        quotes = re.findall(r"`([^`]+)`", e["exercise"])
        assert any(q in source for q in quotes) or any(q.startswith("--") for q in quotes), e["exercise"]
        known = set(numbers_in([e["measured"], e["command"], e["exercise"]]))
        assert [n for n in told(e["expect"]) if not found(n, known)] == [], e["expect"]


def test_every_test_that_the_readme_names_exists():
    tests = "".join(p.read_text() for p in (ROOT / "tests").glob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", README)
    assert len(named) > 20 and [name for name in named if f"def {name}(" not in tests] == []


def test_every_file_the_readme_links_to_exists():
    assert [path for path in re.findall(r"\]\((?!http|#)([^)]+)\)", README) if not (ROOT / path).exists()] == []


def test_every_script_stands_in_the_table_of_files():
    assert {p.name for p in ROOT.glob("*.py")} == {m[2] for m in FILE.finditer(README)}


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        raise SystemExit("python tests/test_readme.py --write")
    (ROOT / "README.md").write_text(rewritten(README))
