"""The trace page: all of a run is on it, nothing of a run can break out of it,
and a browser shows it without scrolling sideways.
"""

import re
import shutil
import sys
from html.parser import HTMLParser

import pytest
import torch

import minimas
from minimas import InputError
from minimas.commands import ask
from minimas.commands.failures import command
from minimas.jinja import environment
from minimas.look.logit_lens import logit_lens
from minimas.look.trace import page

CHAIN = "7 +5 *3 -4 +8 *7 -1 +6"
HOSTILE = "<script>alert(1)</script> {math} [slot 0] $question \"&amp;' </pre><!-- \x00\x1b ${n}"
KEEP = {"keep_states": True, "keep_latents": True}
VOID = {"meta", "br", "img", "link", "input", "hr"}
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))),
    None,
)


class Reader(HTMLParser):
    """A page as a tree of [tag, attributes, children], a child being a text or a tree; asserts that tags nest."""

    def __init__(self, html):
        super().__init__()
        self.root = ["", {}, []]
        self.open = [self.root]
        self.feed(html)
        self.close()
        assert self.open == [self.root], f"not closed: {[tag for tag, *_ in self.open[1:]]}"

    def handle_starttag(self, tag, attributes):
        assert len(attributes) == len(dict(attributes))
        self.open[-1][2].append(node := [tag, dict(attributes), []])
        if tag not in VOID:
            self.open.append(node)

    def handle_startendtag(self, tag, attributes):
        self.open[-1][2].append([tag, dict(attributes), []])

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        self.open[-1][2].append(data)


def words(node):
    """All text below a node, as it is shown, less the line break that HTML drops behind <pre>."""
    text = "".join(child if isinstance(child, str) else words(child) for child in node[2])
    return text.removeprefix("\n") if node[0] == "pre" else text


def find(node, tag, **attributes):
    """The nodes of a tag below a node, in order."""
    found = []
    for child in node[2]:
        if not isinstance(child, str):
            if child[0] == tag and all(
                child[1].get(key.rstrip("_")) == value for key, value in attributes.items()
            ):
                found.append(child)
            found += find(child, tag, **attributes)
    return found


def slots(pieces, origins):
    """What a prompt looks like on the page: texts, and slots with what they hold."""
    origins = iter(origins)
    return "".join(
        piece if isinstance(piece, str) else f"slot: {len(piece)} latents from {next(origins)}"
        for piece in pieces
    )


@pytest.fixture(scope="module")
def tiny():
    """The tiny system's results for two questions, the page, and it parsed."""
    system = minimas.load_mas_system("tiny", device="cpu")
    results = system.run([CHAIN, "2 +3"], **KEEP)
    html = page(system, results)
    return system, results, html, Reader(html).root


@pytest.fixture(scope="module")
def hostile(folders):
    """The same of a style with a hostile question, four agents and 32 latents."""
    system = minimas.load_mas_system("mixture", checkpoints=folders("mixture"), device="cpu")
    results = system.run(
        [HOSTILE + " word" * 80],
        max_new_tokens=100,
        temperature=1.5,
        top_p=1.0,
        top_k=0,
        retry=False,
        **KEEP,
    )
    html = page(system, results)
    return system, results, html, Reader(html).root


BOTH = pytest.mark.parametrize("made", ["tiny", "hostile"])


def test_stages_are_what_was_run(tiny, monkeypatch):
    """Result.stages has the prompts that agents thought from, and times that go up;
    nothing of it where it is not asked for.
    """
    system, (result, _), _, _ = tiny
    given = []
    for role, agent in system.agents.items():

        def think(prompts, m, tick, role=role, own=agent.think):
            given.append((role, prompts[0]))
            return own(prompts, m, tick)

        monkeypatch.setattr(agent, "think", think)
    again = system.run([CHAIN], **KEEP)[0]
    stages = [(r, role) for r in (1, 2, 3) for role in system.style.order]
    assert list(again.stages) == list(result.stages) == stages and list(again.states) == stages[:-1]
    assert [role for role, _ in given] == [role for _, role in stages[:-1]]
    for (_, pieces), (_, kept) in zip(given, again.stages.values()):
        assert all(
            a == b if isinstance(a, str) else torch.equal(a, b)
            for a, b in zip(pieces, kept, strict=True)
        )
        assert all(
            piece.untyped_storage().nbytes() == piece.nbytes
            for piece in kept
            if not isinstance(piece, str)
        )
    ends = [end for end, _ in again.stages.values()]
    assert 0 < ends[0] and ends == sorted(set(ends)) and ends[-1] <= again.seconds
    assert (
        "".join(p for p in again.stages[3, "solver"][1] if isinstance(p, str)).count("solver") == 1
    )
    assert system.run([CHAIN], rounds=1)[0].stages == {}


@BOTH
def test_every_turn_with_its_prompt_and_slots(made, request):
    system, results, _, root = request.getfixturevalue(made)
    order = system.style.order
    sections = [s for s in find(root, "section") if s[1]["aria-labelledby"] != "agents"]
    assert len(sections) == len(results)
    for n, (section, result) in enumerate(zip(sections, results, strict=True), 1):
        assert words(find(section, "pre")[0]) == seen(result.question)
        turns = [(r, role) for r in (1, 2, 3) for role in order]
        shown_turns = find(section, "details")
        assert [words(find(turn, "h4")[0]) for turn in shown_turns] == [
            f"round {r}, {role}" for r, role in turns
        ]
        for (r, role), turn in zip(turns, shown_turns):
            sources = [
                (r if order.index(source) < order.index(role) else r - 1, source)
                for source, target in system.style.edges
                if target == role
            ]
            sources = [(when, source) for when, source in sources if when]
            pieces = result.stages[r, role][1]
            assert words(find(turn, "pre")[0]) == seen(
                slots(pieces, [f"{source}, round {when}" for when, source in sources])
            )
            marks = find(turn, "mark")
            assert len(marks) == len(sources) == sum(torch.is_tensor(p) for p in pieces)
            assert [find(mark, "a")[0][1]["href"] for mark in marks] == [
                f"#q{n}-{when}-{source}" for when, source in sources
            ]
        assert words(find(section, "pre")[-1]) == seen(result.text)
    ids = [
        node[1]["id"]
        for tag in ("div", "h2", "h3", "marker")
        for node in find(root, tag)
        if "id" in node[1]
    ]
    assert len(ids) == len(set(ids))
    assert {a[1]["href"][1:] for a in find(root, "a")} <= set(ids)


def seen(text):
    """Text with control characters as their pictures."""
    return "".join(
        chr(0x2400 + ord(c)) if ord(c) < 32 and c not in "\t\n" else c for c in text
    ).replace("\x7f", "\u2421")


def test_a_result_without_states_is_refused():
    system = minimas.load_mas_system("tiny", device="cpu")
    kept, plain = system.run(["7 +5"], **KEEP)[0], system.run(["1 +2"])[0]
    with pytest.raises(InputError, match="states of '1 .2' were not kept.* ask with keep_states=T"):
        page(system, [kept, plain])


@BOTH
def test_tokens_and_cosines(made, request):
    system, results, _, root = request.getfixturevalue(made)
    tables, visible = (
        find(root, "table", class_="strip"),
        lambda text: (
            seen(text.replace(" ", "\u2423")).replace("\n", "\u240a").replace("\t", "\u2409")
        ),
    )
    for result in results:
        rows = logit_lens(system, result.states)
        for key in result.states:
            own, table = [row for row in rows if (row["round"], row["role"]) == key], tables.pop(0)
            lines = {words(find(line, "th")[0]): line for line in find(table, "tr")}
            cells = {
                name: [words(cell) for cell in find(line, "td")] for name, line in lines.items()
            }
            assert [words(th) for th in find(lines["step"], "th")[1:]] == [
                str(row["step"]) for row in own
            ]
            for i, rank in enumerate(("closest token", "second", "third")):
                assert cells[rank] == [
                    f"{visible(row['tokens'][i][0])} {row['tokens'][i][1]:.0%}" for row in own
                ]
            for name in "step", "round":
                cosines = [row[f"{name}_cosine"] for row in own]
                assert cells[f"cosine, {name} before"] == [
                    "none" if c is None else f"{c:.2f}" for c in cosines
                ]
                for cell, c in zip(find(lines[f"cosine, {name} before"], "td"), cosines):
                    assert cell[1] == (
                        {}
                        if c is None
                        else {
                            "class": "heat" if c >= 0 else "cold",
                            "style": f"--c:{abs(c) * 100:.0f}",
                        }
                    )
        agent, strip = (
            system.agents[system.style.order[-1]],
            find(root, "p", class_="tokens")[results.index(result)],
        )
        decoded = [
            agent.tokenizer.fast.decode([i], skip_special_tokens=False) for i in result.token_ids
        ]
        assert [words(code) for code in find(strip, "code")] == list(map(visible, decoded))
    assert not tables


@BOTH
def test_timeline(made, request):
    system, results, _, root = request.getfixturevalue(made)
    timelines = [table for table in find(root, "table") if find(table, "thead")]
    for table, result in zip(timelines, results, strict=True):
        begun, whole = 0, list(result.stages.values())[-1][0]
        for line, ((r, role), (end, pieces)) in zip(
            find(table, "tr")[1:], result.stages.items(), strict=True
        ):
            T = system.agents[role].embed([pieces])[0].shape[0]
            thought = 0 if (r, role) not in result.states else len(result.states[r, role])
            numbers = [T, thought, 0 if thought else result.new_tokens, f"{end - begun:.3f}"]
            assert [words(find(line, "th")[0])] + [
                words(cell) for cell in find(line, "td")[:-1]
            ] == [f"round {r}, {role}", *map(str, numbers)]
            assert (
                find(line, "i")[0][1]["style"]
                == f"margin-left:{begun / whole:.1%};width:{(end - begun) / whole:.1%}"
            )
            begun = end


@BOTH
def test_graph(made, request):
    system, _, _, root = request.getfixturevalue(made)
    (svg,) = find(root, "svg")
    told, drawn = svg[1]["aria-label"], [words(t) for t in find(svg, "text")]
    assert told.startswith(", ".join(system.style.order)) and [
        t for t in drawn if t in system.style.order
    ] == list(system.style.order)
    for (source, target), key in system.style.edges.items():
        assert f"{source} to {target} by {key}" in told and drawn.count(key) == 1
    assert len([p for p in find(svg, "path") if "marker-end" in p[1]]) == len(system.style.edges)
    width, height = map(float, svg[1]["viewbox"].split()[2:])
    for path in find(svg, "path")[1:]:
        numbers = [float(x) for x in re.findall(r"-?\d+\.?\d*", path[1]["d"])]
        assert all(0 <= x <= width for x in numbers[::2]) and all(
            0 <= y <= height for y in (numbers[1], numbers[-1])
        )


@BOTH
def test_nothing_breaks_out_or_is_fetched(made, request):
    _, _, html, root = request.getfixturevalue(made)
    assert (
        html.count("http")
        == html.count('xmlns="http://www.w3.org/2000/svg"') + html.count("http-equiv")
        == 2
    )
    assert not any(
        find(root, tag) for tag in ("script", "link", "img", "iframe", "object", "base")
    ) and "url(" not in html.replace("url(#arrow)", "")
    assert "@import" not in html and not re.search(r"<[^>]*\s(src|on\w+)=", html)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", html)
    levels = [int(tag[1]) for tag in re.findall(r"<(h[1-6])", html)]
    assert (
        levels[0] == 1
        and levels.count(1) == 1
        and all(b <= a + 1 for a, b in zip(levels, levels[1:]))
    )
    for box in find(root, "div", class_="scroll"):
        assert box[1]["tabindex"] == "0" and box[1]["role"] == "region" and box[1]["aria-label"]
    assert len(html.encode()) < 300_000


def test_hostile_text_is_shown_as_typed(hostile, tmp_path):
    _, (result,), html, root = hostile
    assert "<script" not in html.lower() and "alert(1)" in html and html.count("<!--") == 0
    assert words(find(root, "pre")[0]) == seen(result.question) and HOSTILE in result.question
    assert (
        html.count("[slot 0]") == 13 and html.count("{math}") == 13
    )  # the question, and in each of twelve prompts
    filled = (
        environment(tmp_path)
        .from_string("{{ text }}|{{ token | blanks }}")
        .render(text="<\x07\r\n", token="<b> \n")
    )
    assert filled == "&lt;\u2407\u240d\n|&lt;b&gt;\u2423\u240a"


def test_no_latents_no_answer_and_rollouts(hostile):
    """What is not there is said, and each of several texts has its section."""
    system = hostile[0]
    results = system.run(
        ["1 + 1"], rounds=2, latent_steps=0, max_new_tokens=3, rollouts=2, retry=False, **KEEP
    )
    root = Reader(page(system, results)).root
    assert (
        len(find(root, "h2")) == 3
        and len(find(root, "details")) == 16
        and not find(root, "table", class_="strip")
    )
    assert {words(mark) for mark in find(root, "mark")} == {"slot: 0 latents"}
    assert [words(strong) for strong in find(root, "strong")] == ["none was found"] * 2


def call(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["recurse", "--prompt", CHAIN, "--device", "cpu", *args])
    command(ask.main)


def test_command_line(tmp_path, monkeypatch, capsys):
    file = tmp_path / "page.html"
    file.write_text("old")
    call(monkeypatch, "--prompt", "2 +3", "--trace", str(file))
    assert capsys.readouterr().out == "g+6\\boxed{5}\nanswer: 5\na+3\\boxed{5}\nanswer: 5\n"
    root = Reader(file.read_text(encoding="utf-8")).root
    assert [words(h2) for h2 in find(root, "h2")] == [
        "Agents and links",
        "Question 1",
        "Question 2",
    ] and len(find(root, "details")) == 18
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    "path, complaint",
    [
        ("{}/none/page.html", "No such file or directory"),
        ("{}", "not an ordinary file"),
        ("/dev/null", "not an ordinary file"),
        ("{}/file/page.html", "Not a directory"),
        ("{}/" + "x" * 300, "File name too long"),
    ],
)
def test_a_file_that_cannot_be_written_is_refused_first(
    path, complaint, tmp_path, monkeypatch, capsys
):
    (tmp_path / "file").touch()
    monkeypatch.setattr(
        ask, "load_mas_system", lambda *_, **__: pytest.fail("something was computed")
    )
    with pytest.raises(SystemExit) as end:
        call(monkeypatch, "--trace", path.format(tmp_path))
    out, err = capsys.readouterr()
    assert (
        end.value.code == 2
        and out == ""
        and err.count("\n") == 1
        and err.startswith("minimas: --trace ")
        and complaint in err
    )
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_the_text_channel_has_no_trace(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as end:
        call(monkeypatch, "--trace", str(tmp_path / "page.html"), "--channel", "text")
    out, err = capsys.readouterr()
    assert (
        end.value.code == 2
        and out == ""
        and "--trace shows latents" in err
        and not list(tmp_path.iterdir())
    )


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium or Chrome is installed")
@BOTH
def test_in_a_browser(made, request, tmp_path):
    """Nothing is asked for or complained of, keys open a turn, 360 px suffice, and dark is dark."""
    sync_playwright = pytest.importorskip("playwright.sync_api").sync_playwright
    file, noise, asked = tmp_path / "page.html", [], []
    file.write_text(request.getfixturevalue(made)[2], encoding="utf-8")
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for scheme, width in ("light", 1000), ("dark", 1000), ("light", 360), ("dark", 360):
            tab = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
            tab.on("console", lambda message: noise.append(message.text))
            tab.on("pageerror", lambda error: noise.append(str(error)))
            tab.on("dialog", lambda dialog: (noise.append(dialog.message), dialog.dismiss()))
            tab.on("request", lambda request: asked.append(request.url))
            tab.goto(file.as_uri())
            details = tab.locator("details")
            first = details.first
            assert not first.locator("pre").is_visible()
            first.locator("summary").focus()
            tab.keyboard.press("Enter")
            assert first.locator("pre").is_visible()
            for i in range(1, details.count()):
                details.nth(i).locator("summary").click()
            assert tab.locator("details[open]").count() == details.count()
            assert tab.evaluate("document.documentElement.scrollWidth") == width
            wide = tab.evaluate("""[...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll') &&
                e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))""")
            assert wide == []
            paper, ink = (
                tab.evaluate(f"getComputedStyle(document.body).{name}")
                for name in ("backgroundColor", "color")
            )
            paper, ink = (sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (paper, ink))
            assert paper > 700 > 200 > ink if scheme == "light" else paper < 100 < 600 < ink
            assert (
                tab.evaluate("getComputedStyle(document.querySelector('.heat')).backgroundColor")
                != "rgba(0, 0, 0, 0)"
            )
            strip = tab.locator(".scroll:has(.strip)").last
            if strip.evaluate("e => e.scrollWidth > e.clientWidth"):
                strip.focus()
                tab.keyboard.press("ArrowRight")
                tab.wait_for_function("e => e.scrollLeft > 0", arg=strip.element_handle())
                # names of lines stay in sight, and do not lie on what they name
                strip.evaluate("e => e.scrollLeft = 1e6")
                names, steps = (
                    strip.locator("th:first-child").first.bounding_box(),
                    strip.locator("th[scope=col]:not(:first-child)"),
                )
                start, end = steps.first.bounding_box(), steps.last.bounding_box()
                assert (
                    start["x"]
                    < names["x"]
                    < names["x"] + names["width"]
                    <= end["x"]
                    < end["x"] + end["width"]
                    <= width
                )
            tab.close()
        tab = browser.new_page()
        tab.goto(file.as_uri())
        tab.locator("tbody th a").nth(3).click()  # of the timeline, to a turn that is closed
        assert tab.locator("details").nth(3).locator("pre").is_visible()
        browser.close()
    assert noise == [] and set(asked) == {file.as_uri()}
