"""README.md and docs/ tell the truth: what their snippets and commands print is what they show, the tour names every
file, and links lead somewhere.
"""

import json
import re
import shlex
import sys
import textwrap
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import minimas
from minimas import STYLES, Settings, recurse
from minimas.commands import ask
from minimas.commands.options import origin_of
from minimas.evaluate import __main__ as evaluate
from minimas.evaluate import grade
from minimas.evaluate.measure import chosen, planned
from minimas.serve import __main__ as serve
from minimas.styles import style_named
from minimas.train import __main__ as train

ROOT = Path(__file__).parent.parent
PACKAGE = Path(minimas.__file__).parent
PAGES = {
    file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8")
    for file in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
}
COMMANDS = {
    "minimas.recurse": ask,
    "minimas.evaluate": evaluate,
    "minimas.train": train,
    "minimas.serve": serve,
}


def blocks(page, language):
    """The contents of a page's fenced code blocks in this language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGES[page], re.DOTALL | re.MULTILINE)


def sessions():
    """(page, command, lines of output) for each command of the console sessions, as parameters of a test."""
    for page in PAGES:
        one_line = re.sub(r"\s*\\\n\s*", " ", "".join(blocks(page, "console")))
        for part in one_line.split("$ ")[1:]:
            command, *shown = part.rstrip("\n").split("\n")
            long = "--limit 200" in command  # questions, several times
            yield pytest.param(page, command, shown, marks=[pytest.mark.slow] if long else [])


def named_commands():
    """(page, module, options) for each command that a page names, in a block or a sentence."""
    for page, text in PAGES.items():
        one_line = re.sub(r"\s*\\\n\s*", " ", text)
        for module, options in re.findall(
            r"(?:python -m|torchrun .*?-m) (minimas\.[\w.]+)((?: [^`\n&]*)?)", one_line
        ):
            yield page, module, options


def test_every_page_is_here():
    pages = ("reading", "tiny", "evaluating", "training", "speed", "extending", "own", "serving")
    assert PAGES.keys() == {"README.md", *(f"docs/{name}.md" for name in pages)}
    readme = PAGES["README.md"].split("\n")
    assert max(map(len, readme)) <= 125
    assert all(f"docs/{name}.md" in PAGES["README.md"] for name in pages)


def test_the_loop():
    """The README's loop, as it is printed there, leads to the prompts that recurse ends with."""
    (loop,) = (block for block in blocks("README.md", "python") if "import" not in block)
    names = {"send_latents": recurse.send_latents}
    exec(
        "def loop(system, style, questions, settings, inbox):\n" + textwrap.indent(loop, "    "),
        names,
    )
    system = minimas.load_mas_system("tiny", device="cpu")
    settings = minimas.Settings(rounds=2).completed(system.style)
    questions = system.style.questions(["7 +5 *3 -4 +8 *7", "1 +2"])
    with torch.no_grad():
        own = names["loop"](system, system.style, questions, settings, {})
        *_, last = recurse.recurse(system, questions, settings)
    for prompt, other in zip(own, last.prompts, strict=True):
        for piece, expected in zip(prompt, other, strict=True):
            if torch.is_tensor(expected):
                torch.testing.assert_close(piece, expected)
            else:
                assert piece == expected
        assert any(torch.is_tensor(piece) for piece in prompt)


@pytest.mark.parametrize(
    "page", [page for page in PAGES if any("import" in code for code in blocks(page, "python"))]
)
def test_snippets(page, capsys):
    """The snippets of a page share their names; each prints what its comments say."""
    names, before = {}, dict(STYLES)
    try:
        for snippet in blocks(page, "python"):
            if "print(" in snippet:
                exec(snippet, names)
                assert capsys.readouterr().out.split("\n")[:-1] == re.findall(
                    r"print\(.*\)\s+# (.*)", snippet
                )
    finally:
        for name in STYLES.keys() - before.keys():
            del STYLES[name]


def test_pages_with_snippets():
    printing = {page: sum("print(" in code for code in blocks(page, "python")) for page in PAGES}
    assert {page: n for page, n in printing.items() if n} == {
        "README.md": 1,
        "docs/evaluating.md": 1,
        "docs/extending.md": 14,
        "docs/serving.md": 1,
    }


def is_shown(shown, found):
    """Whether two lines are alike word by word, numbers to the last digit's neighbourhood; ... stands for the rest."""
    shown, found = shown.split(), found.split()
    if shown[-1:] == ["..."]:
        shown, found = shown[:-1], found[: len(shown) - 1]
    number = re.compile(r"-?\d+\.\d+")
    alike = lambda a, b: (
        abs(float(a) - float(b)) <= max(0.1, 0.01 * abs(float(b)))
        if number.fullmatch(a) and number.fullmatch(b)
        else a == b
    )
    return len(shown) == len(found) and all(map(alike, shown, found))


@pytest.mark.parametrize(
    "page, command, shown", list(sessions()), ids=lambda value: str(value)[-40:]
)
def test_sessions(page, command, shown, capsys, monkeypatch, tmp_path):
    _, _, module, *options = shlex.split(command)
    monkeypatch.setattr(sys, "argv", [module, *options])
    monkeypatch.setattr(grade, "default_grader", lambda: "plain")
    monkeypatch.chdir(tmp_path)
    COMMANDS[module].main()
    found = [line.rstrip() for line in capsys.readouterr().out.rstrip("\n").split("\n")]
    if shown[-1] == "...":
        shown, found = shown[:-1], found[: len(shown) - 1]
    assert len(shown) == len(found) and all(map(is_shown, shown, found)), "\n".join(found)


def planned_points(args):
    """What an evaluation would measure; InputError if its settings do not go together."""
    options = {one.name: getattr(args, one.name) for one in fields(Settings)}
    run = planned(
        origin_of(args),
        args.dataset,
        chosen(**options),
        protocol=args.protocol,
        graders=args.grader,
        allow_code_execution=args.allow_code_execution,
        task=args.task,
    )
    return run.points


@pytest.mark.parametrize("page, module, options", list(named_commands()))
def test_commands_are_understood(page, module, options, tmp_path, monkeypatch):
    """Those that are only named, too: their options exist. Each style that they name is the one that extending.md
    writes.
    """
    monkeypatch.chdir(tmp_path)
    for name in re.findall(r"--style (\S+\.json)", options):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(blocks("docs/extending.md", "json")[0])
    own = COMMANDS.get(module)
    monkeypatch.setattr(sys, "argv", [module, *shlex.split(options)])
    if options == " --help":
        with pytest.raises(SystemExit):
            own.arguments()
    elif own and options.strip():
        args = own.arguments()
        assert style_named(args.style).order
        if own is evaluate:
            assert planned_points(args)
    else:
        assert own or module == "minimas.tiny.build"


def test_commands_of_the_benchmarks():
    """They need the oracle, so only their scripts and options are looked up."""
    named = [
        found
        for text in PAGES.values()
        for found in re.findall(r"python (tools/\w+\.py)([^`\n]*)", text)
    ]
    assert len(named) > 5
    for script, options in named:
        source = (ROOT / script).read_text(encoding="utf-8")
        assert all(f'"{option}"' in source for option in re.findall(r"--[a-z-]+", options)), (
            script,
            options,
        )


def links(page):
    """The local paths that a page links, relative to the root, with what follows #."""
    for name in re.findall(r"\]\((?!https?:)([^)]*)\)", PAGES[page]):
        path, _, heading = name.partition("#")
        yield (ROOT / page).parent / path if path else ROOT / page, heading


@pytest.mark.parametrize("page", PAGES)
def test_links(page):
    for file, heading in links(page):
        assert file.exists(), file
        if heading:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in {title.lower().replace(" ", "-") for title in headings}


def test_tour():
    """The tour links every file of the package that people read; the README names them all."""
    files = {
        file
        for ending in ("py", "json", "html", "svg", "txt")
        for file in PACKAGE.rglob(f"*.{ending}")
        if file.name not in ("__init__.py", "report.json", "recursion.svg", "rounds.svg")
        and file.parent.parent != PACKAGE / "tiny"
    }
    linked = {file.resolve() for file, _ in links("docs/reading.md")}
    assert len(files) > 40 and not {str(file) for file in files if file.resolve() not in linked}
    tree = next(block for block in blocks("README.md", "") if "the kernel" in block)
    assert not {
        file.name
        for file in files
        if not re.search(rf"\b{file.stem}\b", tree) and file.stem != "__main__"
    }


def test_accuracy_tables_are_the_report():
    """The shipped seed's columns say what report.json says."""
    report = json.loads((PACKAGE / "tiny" / "report.json").read_text())
    for page in ("README.md", "docs/tiny.md"):
        rows = {
            int(row[0]): row[1:]
            for row in re.findall(
                r"^\| (\d) \| ([\d.]+) \|.*?([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$",
                PAGES[page],
                re.MULTILINE,
            )
        }
        assert set(rows) == {1, 2, 3, 4, 5}
        for rounds, (latent, tokens, text, text_tokens) in rows.items():
            figures = [
                report[channel][str(rounds)][name]
                for channel in ("latent", "text")
                for name in ("percent", "tokens")
            ]
            assert [float(latent), float(tokens), float(text), float(text_tokens)] == figures
