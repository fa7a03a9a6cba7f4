"""README.md says what results/ holds. `python tests/test_readme.py --write` puts the tables of claims there."""
import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAD = "| claim | source | paper | ours | threshold | holds |\n|---|---|---|---|---|---|\n"
#                 the picture                                       what stands between    the table
FIGURE = re.compile(r"(!\[[^\]]*\]\(results/(\w+)/(\w+)\.png\)\n)((?:(?!\| claim|!\[).*\n)*)\| claim \|.*\n(?:\|.*\n)*")


def table(script, figure):
    claims = json.loads((ROOT / "results" / script / f"{figure}.claims.json").read_text())
    return HEAD + "".join(f"| {c['claim']} | {c['source']} | {c['paper']} | {c['ours']} | {c['threshold']} | {'yes' if c['holds'] else '**no**'} |\n" for c in claims)


def rewritten(text):
    return FIGURE.sub(lambda m: m[1] + m[4] + table(m[2], m[3]), text)


README = (ROOT / "README.md").read_text()
FIGURES = sorted(p for p in (ROOT / "results").rglob("*.png"))


def test_the_tables_are_those_of_results():
    assert rewritten(README) == README


@pytest.mark.parametrize("png", FIGURES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_a_figure_is_shown_with_its_command_table_metrics_claims_and_config(png):
    script, figure = png.parent.name, png.stem
    assert [m[3] for m in FIGURE.finditer(README) if m[2] == script].count(figure) == 1 or not png.with_suffix(".claims.json").exists()
    assert f"(results/{script}/{figure}.png)" in README and f"python {script}.py" in README
    assert png.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("path", sorted((ROOT / "results").rglob("*.claims.json")), ids=lambda p: f"{p.parent.name}/{p.name}")
def test_results_hold_the_metrics_the_config_and_the_figure_of_every_claim(path):
    stem = path.name.removesuffix(".claims.json")
    assert all((path.parent / f"{stem}{suffix}").stat().st_size for suffix in (".png", ".jsonl", ".config.json"))
    config = json.loads((path.parent / f"{stem}.config.json").read_text())
    assert config["revision"] not in ("", "unknown") and stem in (config["config"]["figure"], config["config"].get("init"))
    assert all(json.loads(line) for line in (path.parent / f"{stem}.jsonl").read_text().splitlines())


def test_every_test_that_the_readme_names_exists():
    tests = "".join(p.read_text() for p in (ROOT / "tests").glob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", README)
    assert len(named) > 20 and [name for name in named if f"def {name}(" not in tests] == []


def test_every_file_the_readme_links_to_exists():
    assert [path for path in re.findall(r"\]\((?!http|#)([^)]+)\)", README) if not (ROOT / path).exists()] == []


def test_every_script_stands_in_the_table_of_files():
    scripts = {p.name for p in ROOT.glob("*.py")}
    assert scripts == set(re.findall(r"^\| \[`(\w+\.py)`\]", README, re.M))


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        raise SystemExit("python tests/test_readme.py --write")
    (ROOT / "README.md").write_text(rewritten(README))
