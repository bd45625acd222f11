"""Texts while they are written: the pieces are the text, rows that nobody wants leave, and a terminal shows them."""

import builtins
import io
import sys
from collections import defaultdict

import pytest
import torch
from shared import SCRIPTS, load, scripted

import minimas
from minimas.commands.ask import main
from minimas.commands.failures import command
from minimas.commands.terminal import print_as_written
from minimas.generate import Batch
from minimas.result import NewText
from minimas.settings import Settings
from minimas.tokenizer import Decoding

CHAINS = ["7 +5 *3 -4 +8 *7 -1 +6", "1 +1 *3", "3 *7 *9"]


@pytest.fixture(scope="module")
def tiny():
    return minimas.load_mas_system("tiny", device="cpu", fast=True)


def written(system, asked, wanted=None, **options):
    """The pieces of each text, the Results, and how many texts were written after each step."""
    settings = Settings(**options).completed(system.style)
    pieces, results = defaultdict(list), {}
    more = {} if wanted is None else {"wanted": wanted}
    for new in system.write(system.style.questions(asked), settings, **more):
        pieces[new.question, new.rollout].append(new.text)
        assert (new.question, new.rollout) not in results, "nothing follows the last piece"
        if new.result is not None:
            results[new.question, new.rollout] = new.result
    return pieces, results


@pytest.mark.parametrize("retry", (True, False))
@pytest.mark.parametrize("style", ("sequential_light", "mixture"))
def test_the_pieces_are_the_text(folders, style, retry):
    """Miniatures write bytes at random, most of which are no characters, and never an answer."""
    system = load(folders, style)
    options = {"rounds": 1, "latent_steps": 2, "max_new_tokens": 12, "temperature": 0.9}
    options |= {"rollouts": 2, "retry": retry}
    asked = ["How much is it?", "And this?"]
    pieces, results = written(system, asked, **options)
    whole = system.run(asked, **options)
    assert list(results) != [] and len(results) == len(whole) == 4
    for key, expected in zip(sorted(results), whole):
        result = results[key]
        assert "".join(pieces[key]) == result.text == expected.text
        assert result.token_ids == expected.token_ids and result.retried == retry
        assert len(pieces[key]) > 3 and result.seconds > 0


def test_the_results_are_those_of_run(tiny):
    pieces, results = written(tiny, CHAINS)
    for b, expected in enumerate(tiny.run(CHAINS)):
        result = results[b, 0]
        result.seconds = expected.seconds
        assert result == expected and "".join(pieces[b, 0]) == expected.text
        assert len(pieces[b, 0]) > 2


def test_what_a_tool_replies_is_written_too(folders, monkeypatch):
    system = load(folders, "deliberation")
    scripted(system.agents["toolcaller"], SCRIPTS, monkeypatch)
    options = {"rounds": 1, "latent_steps": 2, "max_new_tokens": 100, "temperature": 0.0}
    pieces, results = written(system, ["1 + 1", "and?"], tools=("python",), **options)
    assert "".join(pieces[0, 0]) == results[0, 0].text
    assert "<result> 42 </result> so" in results[0, 0].text


def test_a_text_that_nobody_wants_leaves_at_the_next_step(tiny, monkeypatch):
    """The others are as they would be alone; it is complete as far as it was written, and never asked for again."""
    rows, take_steps = [], Batch.take_steps

    def counted(self, *args):
        rows.append(len(self.rows))
        return take_steps(self, *args)

    monkeypatch.setattr(Batch, "take_steps", counted)
    asked = []

    def wanted(b, rollout):
        asked.append(b)
        return b != 1 or asked.count(1) < 2

    pieces, results = written(tiny, CHAINS, wanted)
    assert rows[:3] == [3, 2, 2]
    assert results[1, 0].new_tokens == 2 and not results[1, 0].retried
    assert "".join(pieces[1, 0]) == results[1, 0].text != ""
    expected = tiny.run(CHAINS)
    assert [results[b, 0].text for b in (0, 2)] == [expected[b].text for b in (0, 2)]
    after = tiny.run(CHAINS)
    assert [result.text for result in after] == [result.text for result in expected]


def test_a_system_that_was_let_go_answers_on(tiny):
    questions = tiny.style.questions(CHAINS)
    pieces = tiny.write(questions, Settings().completed(tiny.style))
    assert isinstance(next(pieces), NewText) and torch.is_grad_enabled()
    pieces.close()
    assert tiny.run(CHAINS)[1].answer == "6" and tiny.lock.holder is None


class Letters:
    """A tokenizer whose ids are bytes of UTF-8."""

    def __init__(self, clean_up=False):
        self.clean_up = clean_up

    def decode(self, ids, strip):
        text = bytes(ids).decode(errors="replace")
        return text.replace(" n't", "n't").replace(" .", ".") if self.clean_up else text


def decoded(text, clean_up=False):
    """The pieces of a text, byte by byte."""
    decoding = Decoding(Letters(clean_up))
    ids = list(text.encode())
    pieces = [decoding.new_text(ids[:n]) for n in range(1, len(ids))]
    return [*pieces, decoding.new_text(ids, ended=True)]


def test_a_character_comes_whole_and_blanks_wait():
    assert decoded("  né €") == ["", "", "n", "", "é", "", "", "", " €"]
    assert decoded("a \n") == ["a", "", ""]
    assert decoded("a\ufffd") == ["a", "", "", "\ufffd"], "the text may itself hold that sign"
    assert "".join(decoded("I do n't . You do .", clean_up=True)) == "I don't. You do."


# On a terminal


def test_texts_are_shown_one_after_another(tiny, capsys):
    results = tiny.run([CHAINS[0]], rollouts=2, temperature=0.5)
    pieces = [
        NewText(0, 0, "a"),
        NewText(0, 1, "x"),
        NewText(0, 1, "y", results[1]),
        NewText(0, 0, "b", results[0]),
    ]
    shown, begun = [], []

    def given():
        for piece in pieces:
            yield piece
            shown.append(capsys.readouterr().out)

    found = print_as_written(given(), lambda: begun.append(1), lambda result: "!")
    assert shown == ["a", "", "", "b!\nxy!\n"] and found == results and begun


class Screen(io.StringIO):
    """A terminal that remembers what it showed whenever it was flushed."""

    def __init__(self):
        super().__init__()
        self.shown = [""]

    def isatty(self):
        return True

    def flush(self):
        if self.getvalue() != self.shown[-1]:
            self.shown.append(self.getvalue())


@pytest.mark.parametrize("options", ((), ("--json",), ("--peek",)))
def test_an_answer_appears_while_it_is_written(monkeypatch, options, tmp_path):
    """As JSON, or after the rows of --peek, it can only come whole."""
    screen, lines = Screen(), iter([CHAINS[0]])

    def type_line(sign):
        line = next(lines, None)
        if line is None:
            raise EOFError
        return line

    monkeypatch.setattr(builtins, "input", type_line)
    monkeypatch.setattr(sys, "stdin", type("Terminal", (), {"isatty": lambda self: True})())
    monkeypatch.setattr(sys, "stdout", screen)
    page = tmp_path / "t.html"
    trace = () if options else ("--trace", str(page))
    monkeypatch.setattr(sys, "argv", ["recurse", "--device", "cpu", *options, *trace])
    command(main)
    text = "g+6\\boxed{5}"
    if options:
        assert len(screen.shown) == 2 and text in screen.shown[-1].replace("\\\\", "\\")
    else:
        assert screen.shown[1:3] == ["g", "g+6"] and len(screen.shown) > 4
        assert screen.getvalue() == f"{text}\nanswer: 5\n" and CHAINS[0] in page.read_text()
