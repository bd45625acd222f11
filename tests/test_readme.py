"""The README tells the truth: its snippet runs and prints what its comments say, and its map names every file."""

import re
from pathlib import Path

import minimas
from minimas.peek import peek, table

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def test_snippet(capsys):
    snippet = next(block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "import minimas" in block)
    exec(snippet, {})
    assert capsys.readouterr().out.split("\n")[:-1] == re.findall(r"print\(.*\)\s+# (.*)", snippet)


def test_map():
    modules = {file.name for file in Path(minimas.__file__).parent.glob("*.py")} - {"__init__.py"}
    assert modules and all(f"(minimas/{name})" in README for name in modules)


def test_accuracy_table_is_the_report():
    """The shipped seed's column says what report.json says."""
    import json
    report = json.loads((Path(minimas.__file__).parent / "tiny" / "report.json").read_text())
    rows = {int(row[0]): row[1:] for row in re.findall(r"^\| (\d) \| ([\d.]+) \|.*\| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", README, re.MULTILINE)}
    assert set(rows) == {1, 2, 3, 4, 5}
    for rounds, (latent, tokens, text, text_tokens) in rows.items():
        figures = [report[channel][str(rounds)][name] for channel in ("latent", "text") for name in ("percent", "tokens")]
        assert [float(latent), float(tokens), float(text), float(text_tokens)] == figures


def test_what_peek_shows():
    """The excerpt's steps, norms to a tenth, and closest tokens."""
    shown = re.search(r"```\n(round 1, planner.*?)```", README, re.DOTALL)[1].splitlines()
    system = minimas.load_mas_system("tiny", device="cpu")
    now = table(peek(system, system.run(["7 +5 *3 -4 +8"], keep_states=True)[0].states)).splitlines()
    assert shown[:2] == now[:2]
    for line, other in zip(shown[2:], now[2:7]):
        (step, norm, *_), (_, found, *_) = line.split(), other.split()
        assert line.split("  ")[-3:][0] == other.split("  ")[-3:][0] and abs(float(norm) - float(found)) < 0.1 and step == other.split()[0]
