"""README.md says what results/ holds. `python tests/test_readme.py --write` puts the tables, the exercises and the line counts there."""
import builtins
import dataclasses
import dis
import importlib.util
import itertools
import json
import re
import shlex
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
from common import Memory, launch

from experiment import parse_args

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


# What each exercise asks to change, (script, number) -> (old, new) in turn. Whoever changes a line that an exercise quotes changes it here and in exercises.json.
EDITS = {
    ("grpo", 2): [('return float(written == right and len(text) % LINE == 0)',
                   'return float(all(right.get(c) == d for c, d in written.items()) and len(text) % LINE == 0)')],
    ("grpo", 3): [('return adv.reshape(-1, 1)', 'return adv.reshape(-1, 1).roll(1, 0)')],
    ("grpo", 4): [('kl = kl_estimate(logp, ref_logp[rows], config.kl)', 'kl = kl_estimate(logp, ref_logp[rows], "k1")')],
    ("grpo", 5): [('rng.shuffle(order)', '')],
    ("opd", 2): [('return PASSWORDS[zlib.crc32(repr(tuple(pair)).encode()) % len(PASSWORDS)]', 'return PASSWORDS[0]')],
    ("opd", 3): [('return (logp - logq).detach() * logp', 'return logp - logq')],
    ("opd", 4): [('return Task(pairs[256:][:train], pairs[:256], told, (*range(PLACES), EOS), recall=8, keep=4)',
                  'return Task(pairs[256:][:train], pairs[:256], told, (*range(PLACES), *STYLES, EOS), recall=8, keep=4)')],
    ("curriculum", 2): [('sum_token(a + b if honest else rng.randrange(3, 2 * HIGHEST))', 'sum_token(3)')],
    ("curriculum", 3): [('reward(p, t) for p, t in zip(repeated, answers)', 'float(OK in t) for t in answers')],
    ("curriculum", 4): [('np.where(right, 1.0, 0.0 if masked else -1.0)', 'np.where(right, 2.0 if masked else 0.0, 0.0 if masked else -2.0)')],
    ("curriculum", 5): [('for _ in range(attempts):', 'pairs = [(a, b) for i, a in enumerate(xs) for b in xs[i + 1:]]\n    for _ in range(attempts):'),
                        ('a, b = rng.sample(xs, 2)', 'a, b = pairs.pop(0)')],
    ("coverage", 1): [('def table(H, n, seed, prompts=1000, V=4, a=0.01):', 'def table(H, n, seed, prompts=1000, V=4, a=0.1):')],
    ("coverage", 2): [('def select(config, model, valid, weights, seed, N=4):', 'def select(config, model, valid, weights, seed, N=64):')],
    ("coverage", 3): [('model = train(config, run, phase, seed, base, (0.9, 0.1, 0.0), config.steps, config.lr, loss, at=at, kept=kept)',
                       'model = train(config, run, phase, seed, base, (0.5, 0.5, 0.0), config.steps, config.lr, loss, at=at, kept=kept)')],
    ("coverage", 4): [('counts = counts * truncated_weights(np.broadcast_to(e, (seeds, H)), math.log(N)).mean(-1, keepdims=True)',
                       'counts = counts * truncated_weights(np.broadcast_to(e, (seeds, H)), math.inf).mean(-1, keepdims=True)')],
    ("coverage", 5): [('g = g / (1 + np.linalg.norm(g, axis=-1, keepdims=True))', 'g = np.sign(g)')],
    ("ttt", 2): [('return tuple(w - scale[:, None, None] * g for w, g in zip(fast, grads))',
                  'return tuple(w - scale[:, None, None] * g.mean(0) for w, g in zip(fast, grads))')],
    ("ttt", 3): [('return (loss, *inner_update(fast, grads, eta))',
                  'fast = inner_update(fast, grads, eta)\n    return (token_losses(model, x, y, fast), *fast)')],
    ("ttt", 4): [('return (loss, *inner_update(fast, grads, eta))', 'return (loss, *inner_update(fast, [g.detach() for g in grads], eta))')],
    ("ttt", 5): [('for t in range(1, T):', 'for t in range(1, T):\n        if t == T // 2: successor = rng.random((B, V)).argsort(1)')],
    ("model", 1): [('temperature=0.8', 'temperature=0')],
    ("model", 2): [('y = attention(*(t.transpose(1, 2) for t in (q, k, v)), window=self.window, mask=mask)',
                    'y = attention(*(t.transpose(1, 2) for t in (q, k, v)), window=self.window, mask=mask, causal=False)')],
    ("model", 3): [('cache.set_lens(lens)', '')],
    ("model", 4): [('used_up = spent > budget', 'used_up = spent > math.inf')],
    ("kernels", 1): [('BLOCK = 2 ** 24', 'BLOCK = 2 ** 20')],
    ("kernels", 2): [('m_new = torch.maximum(m, z.amax(-1))', 'm_new = torch.zeros_like(m)')],
    ("kernels", 3): [('dh = torch.zeros(h.shape, dtype=torch.float32, device=h.device)', 'dh = torch.zeros(h.shape, dtype=h.dtype, device=h.device)')],
    ("kernels", 4): [('acc = dot((p * (dp - sums[:, None])).to(q.dtype), k_tile, acc)', 'acc = dot((p * dp).to(q.dtype), k_tile, acc)')],
}
TASKS = [(script, i) for script in read("exercises.json")["about"] for i in range(1, 6)]


def fragments(old, new):
    """What differs in each line of the two."""
    for a, b in itertools.zip_longest(old.split("\n"), new.split("\n"), fillvalue=""):
        start = len(commonprefix(a, b))
        end = len(commonprefix(a[start:][::-1], b[start:][::-1]))
        yield from (a[start:len(a) - end].strip(), b[start:len(b) - end].strip())


def commonprefix(a, b):
    return "".join(x for x, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b)))


def changed(script, number, folder):
    """The module of a script with an exercise's edits, from a file of its own in a folder (Triton reads its source)."""
    source = (ROOT / f"{script}.py").read_text()
    for old, new in EDITS.get((script, number), []):
        assert source.count(old) == 1, f"{source.count(old)} times in {script}.py: {old}"
        source = source.replace(old, new)
    path = folder / f"{script}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(script, path)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, script, module)
        spec.loader.exec_module(module)
    return module, compile(source, path, "exec")


def unknown_names(code, module):
    """The global names that a code object and all inside it ask for and nobody has."""
    asked = {i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    inside = [unknown_names(c, module) for c in code.co_consts if isinstance(c, types.CodeType)]
    local = set(code.co_names) if "__qualname__" in code.co_names else set()        # a class body sets names of its own
    return {name for name in asked - local if name not in vars(module) and not hasattr(builtins, name)}.union(*inside)


@pytest.mark.parametrize("script, number", TASKS)
def test_an_exercise_asks_for_the_changes_that_the_tests_make(script, number):
    text = read("exercises.json")[script][number - 1]["exercise"]
    for old, new in EDITS.get((script, number), []):
        assert [f for f in fragments(old, new) if f.strip(", ") not in text] == []
    asks = re.search(r"(?i)\breplace\b|\bchange `|\bdelete the line\b|\binsert\b|\bput `|\bgets `|\badd the argument\b", text)
    assert (script, number) in EDITS or number == 5 or asks is None, text


@pytest.mark.parametrize("script, number", list(EDITS))
def test_the_change_of_an_exercise_can_be_made_in_one_place_and_leaves_no_name_unknown(script, number, tmp_path):
    module, code = changed(script, number, tmp_path)
    assert unknown_names(code, module) == set()


SCRIPTS = [(script, number) for script, number in TASKS for line in read("exercises.json")[script][number - 1]["command"].splitlines()
           if line.startswith(f"python {script}.py")]


@pytest.mark.parametrize("script, number", dict.fromkeys(SCRIPTS))
def test_the_command_of_an_exercise_is_one_and_runs_quickly_after_the_change(script, number, tmp_path, monkeypatch):
    """All flags are read as they are; then the run has only those whose value --quick does not choose."""
    monkeypatch.setattr(sys, "argv", ["pytest"])
    module, _ = changed(script, number, tmp_path)
    monkeypatch.setitem(sys.modules, script, module)
    quick = {"--" + f.name.replace("_", "-") for f in dataclasses.fields(module.Config) if f.metadata["quick"] is not None}
    for line in read("exercises.json")[script][number - 1]["command"].splitlines():
        if not line.startswith(f"python {script}.py"):
            continue
        given = shlex.split(line, comments=True)[2:]
        if "--resume" not in given:
            parse_args(module.Config, "", given)
        if (script, number) not in EDITS or "# before the change" in line:
            continue
        kept, i = [], 0
        while i < len(given):
            width = 1 if i + 1 == len(given) or given[i + 1].startswith("--") else 2
            if given[i] not in quick | {"--out"}:
                kept += given[i:i + width]
            i += width
        code, _, err = launch(f"{script}.py", *kept, *([] if "--resume" in kept else ["--quick"]), "--out", tmp_path / "out")
        assert code == 0, err
        assert (tmp_path / "out" / "claims.json").exists()


PIECES = {("curriculum", 4), ("model", 4), ("kernels", 2), ("kernels", 3), ("kernels", 4)}     # python -c "..." that takes seconds


@pytest.mark.parametrize("script, number", sorted(PIECES))
def test_a_piece_of_code_in_an_exercise_runs_after_the_change(script, number, tmp_path, monkeypatch, capsys):
    command = read("exercises.json")[script][number - 1]["command"]
    piece = re.search(r'python -c "(.*?)"$', command, re.S | re.M)[1]
    monkeypatch.setitem(sys.modules, script, changed(script, number, tmp_path)[0])
    exec(compile(piece, "exercise", "exec"), {"__name__": "exercise"})
    assert capsys.readouterr().out


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
