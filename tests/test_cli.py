"""The command line, as a person meets it: what is printed where, and how it ends."""

import importlib
import io
import json
import os
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import minimas
from minimas import __main__ as program
from minimas.commands import ask, options
from minimas.commands.ask import main
from minimas.commands.failures import command
from minimas.evaluate import __main__ as evaluate
from minimas.runs.outputs import writable_file
from minimas.tiny import build
from minimas.train import __main__ as train

CHAIN = "7 +5 *3 -4 +8 *7 -1 +6"
MODULES = {"recurse": ask, "evaluate": evaluate, "train": train, "tiny.build": build}


def test_the_answer_goes_to_stdout():
    ask = [sys.executable, "-m", "minimas.recurse", "--prompt", "-"]
    done = subprocess.run(ask, input=CHAIN, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "g+6\\boxed{5}\nanswer: 5\n"
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr


def test_json_and_stdin(monkeypatch, capsys):
    args = ["--prompt", "-", "--prompt", "1 +1", "--json", "--rounds", "2", "--batch-size", "2"]
    monkeypatch.setattr(sys, "argv", ["recurse", *args])
    monkeypatch.setattr(sys, "stdin", io.StringIO("7 +5\n\n7 *3\n"))
    main()
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["question"] for row in rows] == ["7 +5", "7 *3", "1 +1"] and [
        row["answer"] for row in rows
    ] == ["2", "1", "2"]
    assert all(
        set(row)
        == {"question", "text", "answer", "rounds", "latent_steps", "new_tokens", "seconds"}
        for row in rows
    )
    assert {(row["rounds"], row["latent_steps"], row["new_tokens"]) for row in rows} == {(2, 5, 6)}


def test_only_a_line_feed_ends_a_question(monkeypatch):
    monkeypatch.setattr(
        sys, "stdin", io.StringIO("\ufeffone page\x0cand the next\u2028\n\nanother\n")
    )
    assert options.read_questions(["-"]) == ["one page\x0cand the next\u2028", "another"]


@pytest.mark.parametrize(
    "args, complaint",
    [
        (["--prompt", "what is love"], "cannot read 'what is love'"),
        (["--prompt", ""], "empty"),
        ([], "--prompt"),
        (["--prompt", CHAIN, "--rounds", "0"], "rounds is 0"),
        (["--prompt", CHAIN, "--rounds", "two"], "--rounds"),
        (["--prompt", CHAIN, "--style", "x"], "style 'x'"),
        (["--prompt", CHAIN, "--checkpoint", "planner"], "ROLE=PATH"),
        (["--prompt", CHAIN, "--checkpoint", "planner=/nowhere"], "/nowhere"),
        (["--prompt", CHAIN, "--device", "abacus"], "abacus"),
        (["--prompt", "-"], "no question"),
        (["--prompt", CHAIN, "--checkpoint", ""], "ROLE=PATH"),
        (
            ["--prompt", CHAIN, "--checkpoint", "planner=a", "--checkpoint", "planner=b"],
            "gives planner twice",
        ),
        (
            ["--prompt", CHAIN, "--device", "planner=cpu,critic,solver=cpu"],
            "expected ROLE=DEVICE,ROLE=DEVICE",
        ),
        (
            ["--prompt", CHAIN, "--device", "planner=cpu,critic=cpu,solver=cpu,solver=cuda"],
            "each role once",
        ),
        (["--prompt", CHAIN, "--fn-name", "f"], "add --task code"),
        (["--prompt", CHAIN, "--task", "code", "--fn-name", "f g"], "--fn-name is 'f g', expected"),
        (["--prompt", "7 +5\udce9"], "is not valid text"),
        (["--prompt", CHAIN, "--tools", "python"], "tools are given"),
        (["--prompt", CHAIN, "--no-such-option"], "--no-such-option"),
    ],
)
def test_bad_input_is_one_message(args, complaint, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["recurse", *args])
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    with pytest.raises(SystemExit) as end:
        command(main)
    out, err = capsys.readouterr()
    assert end.value.code == 2 and out == ""
    assert err.count("\n") == 1 and err.startswith("minimas: ") and complaint in err


@pytest.mark.parametrize(
    "option, value, complaint",
    [
        ("--rounds", "0", "rounds is 0"),
        ("--style", "x", "style 'x' is not known, expected one of tiny, "),
        ("--fn-name", "f", "--fn-name"),
        ("--channel", "sound", "channel 'sound' is not known"),
        ("--trace", "/nowhere/page.html", "--trace '/nowhere/page.html' cannot be written"),
        ("--trace", "", "--trace: the path is empty: give one, or leave the option out"),
        ("--trace", "tr.png", "--trace: 'tr.png' ends in .png, expected .html or .htm"),
    ],
)
def test_settings_are_checked_before_anything_is_loaded(
    option, value, complaint, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "argv", ["recurse", "--prompt", CHAIN, option, value])
    monkeypatch.setattr(
        ask, "load_mas_system", lambda *_, **__: pytest.fail("something was loaded")
    )
    with pytest.raises(SystemExit) as end:
        command(main)
    assert end.value.code == 2 and complaint in capsys.readouterr().err


@pytest.mark.parametrize("module", ("minimas.recurse", "minimas.evaluate", "minimas.train"))
def test_bad_input_ends_every_command_with_2(module, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [module, "--no-such-option"])
    for name in (module, f"{module}.__main__"):  # it is found as `python -m` finds it
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(SystemExit) as end:
        runpy.run_module(module, run_name="__main__")
    out, err = capsys.readouterr()
    assert (
        end.value.code == 2 and out == "" and err.count("\n") == 1 and err.startswith("minimas: ")
    )


@pytest.mark.slow
def test_a_reader_who_has_seen_enough_ends_it_quietly():
    ask = f"{sys.executable} -m minimas.recurse --prompt '{CHAIN}' --peek"
    done = subprocess.run(
        ["bash", "-c", f"{ask} | head -n 1; exit ${{PIPESTATUS[0]}}"],
        capture_output=True,
        text=True,
    )
    assert (
        done.stdout == "round 1, planner\n"
        and "Traceback" not in done.stderr
        and done.returncode in (0, 141)
    )
    done = subprocess.run(["bash", "-c", f"{ask} > /dev/full"], capture_output=True, text=True)
    assert (
        done.returncode == 2
        and "No space left on device" in done.stderr
        and "Traceback" not in done.stderr
    )


def test_a_terminal_that_lacks_a_letter_is_shown_its_number(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    command(lambda: print("π"))
    assert written.getvalue() == b"\\u03c0\n"


def test_out_of_memory_is_a_message(capsys):
    def main():
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with pytest.raises(SystemExit) as end:
        command(main)
    assert end.value.code == 2 and capsys.readouterr().err.startswith(
        "minimas: out of memory: try fewer"
    )


def test_to_try_whether_a_file_can_be_written_touches_no_other(tmp_path):
    other = tmp_path / f"t.html.{os.getpid()}"
    other.write_text("precious")
    writable_file("--trace", tmp_path / "t.html")
    assert other.read_text() == "precious" and list(tmp_path.iterdir()) == [other]


@pytest.mark.parametrize(
    "name, args, written",
    [
        ("recurse", ["--prompt", "7 +5", "--trace", "no/../t.html"], {"t.html"}),
        (
            "evaluate",
            [
                "--dataset",
                "tiny",
                "--limit",
                "1",
                "--rounds",
                "1",
                "--out",
                "no/../r.jsonl",
                "--csv",
                "no/../t.csv",
            ],
            {"r.jsonl", "t.csv"},
        ),
        (
            "train",
            [
                "outer",
                "--data",
                "tiny",
                "--limit",
                "1",
                "--steps",
                "0",
                "--init",
                "random",
                "--out",
                "no/../links",
            ],
            {"links"},
        ),
    ],
)
def test_a_folder_before_dots_is_neither_needed_nor_made(
    tmp_path, monkeypatch, capsys, name, args, written
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, *args])
    MODULES[name].main()
    assert {file.name for file in tmp_path.iterdir()} == written


def test_a_file_that_is_closed_is_a_message(monkeypatch, capsys):
    def closed(*_):
        raise PermissionError(13, "Permission denied", "/closed/config.json")

    monkeypatch.setattr(sys, "argv", ["recurse", "--prompt", CHAIN])
    monkeypatch.setattr("minimas.config.read_json", closed)
    with pytest.raises(SystemExit) as end:
        command(main)
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.count("\n") == 1
    assert err.startswith("minimas: /closed/config.json cannot be read")


def test_a_trace_that_is_broken_off_shows_what_there_is(tmp_path, monkeypatch, capsys):
    def stream(self, *args, stream=minimas.System.stream, **options):
        yield next(stream(self, *args, **options))
        raise KeyboardInterrupt

    monkeypatch.setattr(minimas.System, "stream", stream)
    asked = ["--prompt", CHAIN, "--prompt", "1 +1", "--trace", str(tmp_path / "t.html")]
    monkeypatch.setattr(sys, "argv", ["recurse", *asked])
    with pytest.raises(SystemExit) as end:
        command(main)
    assert end.value.code == 130 and CHAIN in (tmp_path / "t.html").read_text()


def test_stdin_that_is_not_utf8_is_a_message(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["recurse", "--prompt", "-"])
    monkeypatch.setattr(
        sys, "stdin", io.TextIOWrapper(io.BytesIO(b"7 +5\n7 +\xe9\n"), encoding="utf-8")
    )
    with pytest.raises(SystemExit) as end:
        command(main)
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.count("\n") == 1
    assert "the question '7 +\\udce9' is not valid text" in err


def test_utf8_in_a_locale_that_is_none():
    code = (
        "import sys; from minimas.commands.options import read_questions; "
        "print(ascii(read_questions([sys.argv[1], '-'])))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "你好"],
        input="π\n".encode() + b"7 +\xe9\n",
        capture_output=True,
        env=os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    )
    assert done.stdout.decode().strip() == ascii(["你好", "π", "7 +\udce9"])


def test_lines_of_windows(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("\ufeff7 +5\r\n\r\n7 *3\r\n"))
    assert options.read_questions(["-", "1 +1"]) == ["7 +5", "7 *3", "1 +1"]


def test_version(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["recurse", "--version"])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code and capsys.readouterr().out == f"minimas {minimas.__version__}\n"


@pytest.mark.parametrize(
    "module, args, value",
    [
        ("recurse", ["--prompt", "-x"], "--prompt=-x"),
        ("recurse", ["--prompt", "-3", "--prompt", "-x^2"], "--prompt='-x^2'"),
        ("recurse", ["--prom", "-x"], "--prompt=-x"),
        ("recurse", ["--prompt", "-7 + 5", "--prompt", "-h"], "--prompt=-h"),
        ("recurse", ["--prompt", "-h is 5, what is h"], "--prompt='-h is 5, what is h'"),
        ("recurse", ["--prompt", "--", "-x"], "--prompt=--"),
        ("recurse", ["--prompt"], "--prompt=VALUE"),
        ("recurse", ["--trace", "-page.html", "--prompt", CHAIN], "--trace=-page.html"),
        ("recurse", ["--temperature", "-1e-5"], "--temperature=-1e-5"),
        ("evaluate", ["--dataset", "tiny", "--columns", "-a=b"], "--columns=-a=b"),
        ("evaluate", ["--dataset", "-mine.jsonl"], "--dataset=-mine.jsonl"),
        ("train", ["outer", "--checkpoint", "-folder"], "--checkpoint=-folder"),
        ("tiny.build", ["--out", "-folder"], "--out=-folder"),
    ],
)
def test_a_value_that_begins_with_a_dash(module, args, value, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [module, *args])
    with pytest.raises(SystemExit) as end:
        command(MODULES[module].main)
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.count("\n") == 1 and err.endswith(f" {value}\n")


def test_a_value_with_a_dash_after_an_equals_sign(monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["recurse", "--prompt=-x", "--prompt", "-7 +5", "--prompt=--json"]
    )
    assert ask.arguments().prompt == ["-x", "-7 +5", "--json"]


# The program `minimas`


def test_help_of_the_program_is_light():
    """It lists the commands, and imports neither torch nor a tokenizer."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "minimas", "--help"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "minimas.common" in done.stderr
    assert not any(name in done.stderr for name in ("torch", "tokenizers", "numpy"))
    assert all(f"  {name} " in done.stdout for name in ("ask", "evaluate", "train"))


@pytest.mark.parametrize(
    "name, own", [("evaluate", "--dataset"), ("train", "--data"), ("ask", "--prompt")]
)
def test_commands_of_the_program(name, own, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/minimas", name, "--help"])
    program.main()
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: minimas {name} [-h]") and own in shown


def test_the_program_asks(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/minimas", "ask", "--prompt", "7 +5", "--json"])
    program.main()
    assert json.loads(capsys.readouterr().out)["answer"] == "2"


def test_the_program_refuses_what_it_does_not_know(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/minimas", "aks"])
    with pytest.raises(SystemExit) as end:
        program.main()
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith(
        "minimas: 'aks' is no command, expected one of ask, evaluate, serve, train: "
    )


@pytest.mark.parametrize(
    "name, value", (("--checkpoint", "~no_such_user/x"), ("--style", "~no_such_user/x.json"))
)
def test_the_home_of_a_user_who_does_not_exist(monkeypatch, capsys, name, value):
    monkeypatch.setattr(
        sys, "argv", ["minimas ask", "--device", "cpu", name, value, "--prompt", "1 +1"]
    )
    with pytest.raises(SystemExit) as end:
        ask.run()
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "~no_such_user/x" in line


@pytest.mark.parametrize("args", ([], ["--help"], ["--version"]))
def test_the_program_without_a_command(args, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/minimas", *args])
    program.main()
    shown = capsys.readouterr().out
    assert shown.startswith("minimas 0." if "--version" in args else "usage: minimas COMMAND")


def test_the_script_of_the_package():
    project = tomllib.loads((Path(minimas.__file__).parent.parent / "pyproject.toml").read_text())
    module, _, function = project["project"]["scripts"]["minimas"].partition(":")
    assert getattr(importlib.import_module(module), function) is program.main
