"""The README tells the truth: what its snippets and commands print is what it shows, and its tour names every file."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

import minimas
from minimas import cli, evaluate, grade, train
from minimas.tiny import build

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
PYTHON = [block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "import" in block]
SESSIONS = [part for block in re.findall(r"```console\n(.*?)```", README, re.DOTALL) for part in block.split("$ ")[1:]]
COMMANDS = re.findall(r"(?:python -m|torchrun .*?-m) (minimas\.[\w.]+)((?: [^`\n&]*)?)",
                      re.sub(r"\s*\n(?=--)", " ", README))


def test_snippets(capsys):
    names = {}
    for snippet in PYTHON:
        exec(snippet, names)
        assert capsys.readouterr().out.split("\n")[:-1] == re.findall(r"print\(.*\)\s+# (.*)", snippet)
    assert len(PYTHON) == 2
    del names["STYLES"]["open"]


def is_shown(shown, found):
    """Whether two lines are alike word by word, numbers to the last digit's neighbourhood; ... stands for the rest."""
    shown, found = shown.split(), found.split()
    if shown[-1:] == ["..."]:
        shown, found = shown[:-1], found[:len(shown) - 1]
    number = re.compile(r"-?\d+\.\d+")
    alike = lambda a, b: (abs(float(a) - float(b)) <= max(0.1, 0.02 * abs(float(b)))
                          if number.fullmatch(a) and number.fullmatch(b) else a == b)
    return len(shown) == len(found) and all(map(alike, shown, found))


@pytest.mark.parametrize("session", SESSIONS, ids=lambda session: session.split("\n")[0][-40:])
def test_sessions(session, capsys, monkeypatch, tmp_path):
    command, *shown = session.rstrip("\n").split("\n")
    _, _, module, *options = shlex.split(command)
    monkeypatch.setattr(sys, "argv", [module, *options])
    monkeypatch.setattr(grade, "default_grader", lambda: "plain")
    monkeypatch.chdir(tmp_path)
    {"minimas.recurse": cli, "minimas.evaluate": evaluate}[module].main()
    found = [line.rstrip() for line in capsys.readouterr().out.rstrip("\n").split("\n")]
    if shown[-1] == "...":
        shown, found = shown[:-1], found[:len(shown) - 1]
    assert len(shown) == len(found) and all(map(is_shown, shown, found)), "\n".join(found)


@pytest.mark.parametrize("module, options", COMMANDS)
def test_commands_are_understood(module, options, monkeypatch):
    """Those that are only named, too: their options exist."""
    own = {"minimas.recurse": cli, "minimas.evaluate": evaluate, "minimas.train": train}.get(module)
    monkeypatch.setattr(sys, "argv", [module, *shlex.split(options)])
    if options == " --help":
        with pytest.raises(SystemExit):
            own.arguments()
    elif own and options.strip():
        assert own.arguments().style in minimas.STYLES
    else:
        assert own or module == build.__name__


def test_tour():
    package = Path(minimas.__file__).parent
    modules = ({file.name for file in [*package.glob("*.py"), *package.glob("*.json"), *package.glob("*.html")]}
               - {"__init__.py"})
    assert len(modules) > 30 and not {name for name in modules if f"(minimas/{name})" not in README}
    linked = re.findall(r"\]\(((?:minimas|tests)/[^)]*)\)", README)
    assert all((package.parent / name).exists() for name in linked)


def test_accuracy_table_is_the_report():
    """The shipped seed's column says what report.json says."""
    report = json.loads((Path(minimas.__file__).parent / "tiny" / "report.json").read_text())
    rows = {int(row[0]): row[1:] for row in re.findall(
        r"^\| (\d) \| ([\d.]+) \|.*\| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", README, re.MULTILINE)}
    assert set(rows) == {1, 2, 3, 4, 5}
    for rounds, (latent, tokens, text, text_tokens) in rows.items():
        figures = [report[channel][str(rounds)][name]
                   for channel in ("latent", "text") for name in ("percent", "tokens")]
        assert [float(latent), float(tokens), float(text), float(text_tokens)] == figures
