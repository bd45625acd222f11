import random
import time

import pytest

from minimas import answers
from minimas.answers import extract


@pytest.mark.parametrize(
    "text, answer",
    [
        (r"so \boxed{7}", "7"),
        (r"\boxed{1} then \boxed{ \frac{1}{2} }", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{7} and \boxed{8", "7"),
        (r"\boxed{8", None),
        ("7", None),
        ("", None),
        (r"\boxed{}", None),
        (r"\boxed{7} \boxed{}", None),
        (r"\boxed{a \boxed{b} c}", "b"),
        (r"\boxed{a {b} c", None),
        (r"} \boxed {7}}", "7"),
        (r"\boxed{\left\{ x>0 \right.}", r"\left\{ x>0 \right."),
        (r"\boxed{a\\{b}}", r"a\\{b}"),
        (r"\\boxed{7}", "7"),
    ],
)
def test_math(text, answer):
    assert extract(text, "math") == answer


def test_boxes_that_are_never_closed_take_no_time():
    started = time.process_time()
    assert (
        extract("\\boxed{7}" + "\\boxed{" * 2000, "math") == "7"
        and time.process_time() - started < 0.2
    )


@pytest.mark.parametrize(
    "text",
    [
        "x``` " + " " * 30000 + "y",
        "```" + " " * 30000 + "`",
        "\\" * 30000,
        "```\n" * 10000,
        ">" * 30000,
        "- " * 3000 + "\nx" * 300,
    ],
)
def test_no_text_takes_long(text):
    started = time.process_time()
    assert (
        not extract(text, "math")
        and not extract(text, "code")
        and time.process_time() - started < 1
    )


@pytest.mark.parametrize(
    "text, answer",
    [
        (r"\boxed{B}", "B"),
        (r"\boxed{b}", "B"),
        (r"\boxed{(C)}", "C"),
        (r"\boxed{\text{D}}", "D"),
        (r"\boxed{A. aspirin}", "A"),
        (r"\boxed{E}", None),
        (r"\boxed{Aspirin}", None),
        ("A", None),
        (r"\boxed{\mathbf{B}}", "B"),
        (r"\boxed{\textit{B}}", "B"),
        (r"\boxed{$B$}", "B"),
        (r"\boxed{\text{ B}}", "B"),
        (r"\boxed{\ B}", "B"),
        (r"\boxed{\textbf{(B)} 12 mg}", "B"),
        (r"\boxed{B) 12 mg}", "B"),
        (r"\boxed{B.}", "B"),
        (r"\boxed{B: text}", "B"),
        (r"\boxed{\text{B}. some text}", "B"),
        (r"\boxed{(B) A cat}", "B"),
        (r"\boxed{a cat}", None),
        (r"\boxed{d = 5}", None),
        (r"\boxed{A or B}", None),
        (r"\boxed{}", None),
        # with its text
        (r"\boxed{C - warfarin}", "C"),
        (r"\boxed{C \text{(warfarin)}}", "C"),
        (r"\boxed{C (warfarin)}", "C"),
        (r"\boxed{C – warfarin}", "C"),
        (r"\boxed{C \text{ warfarin}}", "C"),
        (r"\boxed{C\text{ warfarin}}", "C"),
        (r"\boxed{\text{C} \quad \text{warfarin}}", "C"),
        (r"\boxed{\textbf{C}\ \text{warfarin}}", "C"),
        (r"\boxed{C, warfarin}", "C"),
        (r"\boxed{\text{Option C}}", "C"),
        (r"\boxed{Answer: C}", "C"),
        (r"\boxed{[C]}", "C"),
        (r"\boxed{**C**}", "C"),
        (r"\boxed{\text{C - beta-blocker}}", "C"),
        (r"\boxed{B: a and b}", "B"),
        (r"\boxed{\mathrm{(C)}\ \text{warfarin}}", "C"),
        # two letters, and words
        (r"\boxed{A, B}", None),
        (r"\boxed{A and C}", None),
        (r"\boxed{(A) and (C)}", None),
        (r"\boxed{A. B.}", None),
        (r"\boxed{A - B}", None),
        (r"\boxed{A \text{ or } B}", None),
        (r"\boxed{A, B, and C}", None),
        (r"\boxed{A \text{ and C}}", None),
        (r"\boxed{A/B}", None),
        (r"\boxed{\text{A} \text{B}}", None),
        (r"\boxed{B-cell}", None),
        (r"\boxed{C\text{arbon}}", None),
        (r"\boxed{C-reactive protein}", None),
        (r"\boxed{d - 5}", None),
        (r"\boxed{a (cat)}", None),
        (r"\boxed{D dimer}", None),
        (r"\boxed{A and a cat}", None),
    ],
)
def test_choice(text, answer):
    assert extract(text, "choice") == answer


@pytest.mark.parametrize(
    "text, answer",
    [
        ("so\n```python\nx = 1\n```\n", "x = 1"),
        ("```\nx\n```\nor\n```py\ny\n```", "y"),
        ("```python\nx = 1", "x = 1"),
        ("```python\nx\n```\n```\n```", "x"),
        ("x = 1", None),
        ("```python\nx\n```\nprints\n```\n5\n```", "x"),
        ("```Python\nx\n```\n```py\ny\n```\n```text\n5", "y"),
        ("1. so\n   ```python\n   if x:\n       y\n   ```\n2. b\n```\n5\n```", "if x:\n    y"),
        ("``` python\nx\n```\n```\n5\n```", "x"),
        ('```python title="x"\nx\n```\n```text a\n5\n```', "x"),
        ("```python {cell}\nx\n```\n```\n5\n```", "x"),
        ("```python3.10\nx\n```\n```\n5\n```", "x"),
        ("so: ```python\r\nx\r\ny\r\n```\r\n", "x\ny"),
        ("write ``` at its end\n```python\nx\n```", "x"),
        ("```python\nprint('```')\nx\n```\n", "print('```')\nx"),
        ("```python\nx = 1```\ny", "x = 1"),
        ("```python\nprint('```')\nx", "print('```')\nx"),
    ],
)
def test_code(text, answer):
    assert extract(text, "code") == answer


@pytest.mark.parametrize(
    "box",
    [
        r"C(5,2) = 10",
        r"A - 2B",
        r"[A]_0 e^{-kt}",
        r"\mathbf{B}(r) = 0",
        r"C_6H_{12}O_6",
        r"\text{C}_2\text{H}_5",
        r"A^{-1}",
        r"A = \begin{pmatrix}1&2\end{pmatrix}",
        r"A \cap B",
        r"A\cup B",
        r"D = \{1,2\}",
        r"A(x) = x^2",
        r"B \sin(\omega t)",
        r"\mathrm{C}_6\mathrm{H}_6",
        r"\mathbf{A}\mathbf{x} = \mathbf{b}",
        r"\mathbb{C}",
        r"\vec{B} = \mu_0 H",
        r"A'",
        r"A + B",
        r"C \frac{1}{2}",
        r"D\sqrt{2}",
        r"[A][B]",
        r"[A] = 5",
        r"(A)^2",
        r"(A + B)^2",
        r"(A, 5)",
        r"A \times B",
        r"C - 5",
        r"C - x",
        r"D - \frac{1}{2}",
        r"A! = 24",
        r"A, B, C",
        r"B^2 - 4AC",
        r"C\,\text{V}",
        r"C \text{ J/K}",
        r"A \text{ m/s}^2",
        r"B_{12}",
        r"D(0, 2)",
        r"A \to B",
        r"A:B = 3:2",
        r"A: B = 3: 2",
        r"A : B : C = 1 : 2 : 3",
        r"A: B: C = 1: 2: 3",
        r"A\vec{x} = \vec{b}",
        r"D.C.",
        r"C++",
        r"C=O",
        r"CO_2",
        r"\text{CO}_2",
        r"B(A)",
        r"A\cdot B",
        r"\bf{A}x = b",
        r"A e^{kt} + B",
        r"D \ln 2",
        r"\mathbf{B} = 0",
        r"\mathbf{B} \times \mathbf{A}",
        r"a(b+c)",
        r"C(n, k)",
        r"\text{A}^{T}",
        r"(A) = 5",
        r"(A)(x)",
        r"A_1",
        r"C\_1",
        r"C2H5OH",
        r"B\Omega",
        r"\ce{C6H6}",
        r"D(f) = \mathbb{R}",
        r"A|B",
        r"B - mg",
        r"C–H",
        r"\{A, B\}",
        r"A \lor B",
        r"A \implies B",
        r"A x + B",
        r"\boldsymbol{A} \mathbf{x}",
        r"B(t)",
        r"ℂ",
        r"A \text{ if } x>0",
        r"A B",
        r"\operatorname{A}(x)",
        r"A \mod 5",
        r"D_{2O}",
        r"A\,x",
        r"B\quad C",
        r"C > 0",
        r"A \leq B",
        r"B/2",
        r"C \, e^{-x}",
        r"A[x]",
        r"B[0]",
        r"(C) \cup D",
        r"A.B",
        r"C + O_2 \to CO_2",
        r"\text{B-cell}",
        r"C_p - C_v",
        r"\dot{C}",
        r"\#B",
        r"\text{B} \rightarrow \text{text}",
        r"\text{Option B} - \text{x}",
        r"B\%",
        r"\{B\}",
    ],
)
def test_a_letter_that_begins_an_expression_is_no_option(box):
    assert extract(rf"\boxed{{{box}}}", "choice") is None


@pytest.mark.parametrize(
    "box, option",
    [
        (r"\text{Option}~B", "B"),
        (r"\bf B", "B"),
        (r"\(B\)", "B"),
        (r"B!", "B"),
        (r"\bf C", "C"),
        (r"{\bf B}", "B"),
        (r"\bf{B}", "B"),
        (r"\[B\]", "B"),
        (r"\mathbf B", "B"),
        (r"\boldsymbol{B}", "B"),
        (r"\underline{B}", "B"),
        (r"\emph{B}", "B"),
        (r"\textcolor{red}{B}", "B"),
        (r"\color{blue} B", "B"),
        (r"\color{blue}{B}", "B"),
        (r"\large\textbf{B}", "B"),
        (r"\left(B\right)", "B"),
        (r"\left[ B \right]", "B"),
        (r"\text{Option } \mathbf{B}", "B"),
        (r"\text{The correct answer is (B)}", "B"),
        (r"\text{Answer:}\ B", "B"),
        ('"B"', "B"),
        (r"'B'", "B"),
        (r"`B`", "B"),
        (r"\textbf{(C)}\ 5", "C"),
        (r"\textbf{(C)} \frac{1}{2}", "C"),
        (r"(B) -5", "B"),
        (r"(B) 2x + 3", "B"),
        (r"\mbox{B}", "B"),
        (r"\text{(B) }12", "B"),
        (r"\rm D", "D"),
        (r"\mathrm{D}", "D"),
        (r"\Large{B}", "B"),
        (r"Ⓑ", "B"),
        (r"𝐁", "B"),
        (r"\textbf{B.}", "B"),
        (r"\textbf{B)}", "B"),
        (r"\text{B. }5", "B"),
        (r"\text{B: }x^2", "B"),
        (r"B:\ x^2", "B"),
        (r"B. x = 5", "B"),
        (r"C, x = 5", "C"),
        (r"\text{Choice D}", "D"),
        (r"B\text{ is correct}", "B"),
        (r"B is correct", "B"),
        (r"B \text{ (12 mg)}", "B"),
        (r"C(warfarin)", "C"),
        (r"\text{C} - \text{warfarin}", "C"),
        (r"C -- warfarin", "C"),
        (r"C — warfarin", "C"),
        (r"C—warfarin", "C"),
        (r"**B**", "B"),
        (r"*B*", "B"),
        (r"\pmb{B}", "B"),
        (r"\bm{B}", "B"),
        (r"\bfseries B", "B"),
        (r"\textsf{B}", "B"),
        (r"\texttt{B}", "B"),
        (r"\fbox{B}", "B"),
        (r"\displaystyle B", "B"),
        ("B\\\\", "B"),
        (r"~B~", "B"),
        (r"\,B\,", "B"),
        (r"B\checkmark", "B"),
        (r"(B)!", "B"),
        (r"\text{B}!", "B"),
        (r"\text{Option (B)}", "B"),
        (r"\text{(Option B)}", "B"),
        (r"option b", "B"),
        (r"[b]", "B"),
        (r"b)", "B"),
        (r"\textit{b}", "B"),
        (r"\text{B, since } x > 0", "B"),
        (r"B - 12 mg", "B"),
        (r"A. \text{aspirin}", "A"),
        (r"\text{A: } A^{-1}", "A"),
        (r"(B)\text{ aspirin}", "B"),
        (r"\textbf{(B)}~\text{aspirin}", "B"),
        (r"\mathsf{B}", "B"),
        (r"\mathit{B}", "B"),
        (r"\hbox{B}", "B"),
        (r"$\mathbf{B}$", "B"),
        (r"\text{$B$}", "B"),
        (r"\text{B }", "B"),
        (r"\text{\bf B}", "B"),
        (r"\textbf{Option B}: 5", "B"),
        (r"\text{The answer is B}", "B"),
        (r"B,", "B"),
        (r"B\;", "B"),
        (r"\ensuremath{B}", "B"),
        (r"\text{Final answer: } B", "B"),
        (r"\textbf{B}: \frac{1}{2}", "B"),
        (r"\mathcal{B}", "B"),
        (r"\operatorname{B}", "B"),
        (r"\text{\textbf{B}}", "B"),
        (r"\text{Option}\ \text{B}", "B"),
        (r"\text{Option}\;\mathbf{B}", "B"),
        (r"\text{B}\text{ }", "B"),
        (r"\textbf{B }", "B"),
        (r"\scriptsize B", "B"),
        (r"\it B", "B"),
        (r"\tt B", "B"),
        (r"\Huge B", "B"),
        (r"\left(\text{B}\right)", "B"),
        (r"\bigl(B\bigr)", "B"),
        (r"B\;\text{only}", "B"),
        (r"\text{B only}", "B"),
        (r"\text{(B) only}", "B"),
        (r"\text{Option: }\mathbf{(B)}", "B"),
        (r"\textbf{ANSWER: B}", "B"),
        (r"(\text{B})", "B"),
        (r"(\mathbf{B})", "B"),
        (r"\text{B (the second)}", "B"),
        (r"\mathbf{\text{B}}", "B"),
        (r"\textrm B", "B"),
        (r"\rm{B}", "B"),
        (r"\sf B", "B"),
    ],
)
def test_letters_in_other_fonts_and_with_their_text(box, option):
    assert extract(rf"\boxed{{{box}}}", "choice") == option


@pytest.mark.parametrize(
    "box, options, option",
    [
        ("E", 5, "E"),
        (r"\text{Option}~G", 8, "G"),
        ("(e) text", 5, "E"),
        ("E", 4, None),
        ("C", 2, None),
        ("D, E", 5, None),
        ("E = mc^2", 5, None),
        ("F(x)", 6, None),
        ("B. E", 5, None),
        ("J", 10, "J"),
    ],
)
def test_letters_go_as_far_as_there_are_options(box, options, option):
    assert extract(rf"\boxed{{{box}}}", "choice", options) == option


PROGRAM = 'def f():\n    """\n    >>> f()\n    """\n    return 1'
NESTED = 'def f():\n    """\n    ```\n    f()\n    ```\n    """\n    return 1'
AT_MARGIN = 'def f():\n    """\n```\nf()\n```\n    """\n    return 1'


def indented(text, blanks):
    return "".join(blanks + line for line in text.splitlines(keepends=True))


@pytest.mark.parametrize(
    "text, program",
    [
        (f"```python\n{NESTED}\n```\nThat is it.", NESTED),
        (f"```python\n{NESTED}", NESTED),
        (f"````python\n{AT_MARGIN}\n````\nThat is it.", AT_MARGIN),
        (f"~~~python\n{AT_MARGIN}\n~~~\nThat is it.", AT_MARGIN),
        (f"~~~\n{PROGRAM}\n~~~~~\n", PROGRAM),
        (f"```{{.python .numbers}}\n{PROGRAM}\n```\n```\n5\n```", PROGRAM),
        (indented(f"```python\n{PROGRAM}\n```\n", "> "), PROGRAM),
        (
            f"- so:\n\n  1. do\n\n{indented(f'```python{chr(10)}{NESTED}{chr(10)}```', '     ')}\n",
            NESTED,
        ),
        (f"````markdown\nHi\n```python\n{PROGRAM}\n```\n````\n", PROGRAM),
        (f"```text\n```python\n5\n```\n```python\n{PROGRAM}\n```\n", PROGRAM),
    ],
)
def test_fences_in_fences(text, program):
    assert extract(text, "code") == program


@pytest.mark.parametrize(
    "text",
    [
        "Sure:\n```python\nPROGRAM",
        '```python title="f.py"\nPROGRAM\n```\ndone',
        "Here\n```python\nPROGRAM\n```\nIt works, and it's short.\n".replace("\n", "\r\n"),
        "```python\nx\n```\nand\n```python\nPROGRAM\n```\nprints\n```\n5\n```\n",
        "```python\nx = 2\n```\nbetter: ```python\nPROGRAM\n```\nThat's it.",
        "   ```python\nPROGRAM\n      ```\nThat's it.",
        "1. Do:\n   ```python\nPROGRAM\n   ```\nThat's it.",
        "<answer>\n```python\nPROGRAM\n```\n</answer>",
        "---\n```python3\nPROGRAM\n```\n---",
        "```python\nPROGRAM```\nThat's it.",
        "* **Code**\n```python\nPROGRAM\n```\n* x",
    ],
)
def test_programs_in_what_models_write(text):
    text = text.replace("PROGRAM", PROGRAM)
    assert extract(text, "code") == PROGRAM


@pytest.mark.parametrize(
    "box",
    [
        r"\text{" * 3000 + "}" * 3000,
        "B" + " " * 20000 + "x",
        "the " * 5000 + "B",
        "(" * 20000,
        "B (" + "()" * 10000,
        "B - " + "ab " * 5000,
        "A, " * 5000,
        "_" * 20000,
        "$" * 20000,
        "B: " + "1" * 20000,
    ],
)
def test_no_box_takes_long(box):
    started = time.process_time()
    extract(rf"\boxed{{{box}}}", "choice")
    assert time.process_time() - started < 1


LINES = [
    *(
        "```",
        "````",
        "~~~",
        "```python",
        "~~~~python",
        "``` py a",
        "```a`b",
        "```  ",
        "x = 1",
        "    y",
        "\tz",
        "",
    ),
    *(
        "    ```",
        "   ```",
        " ```python",
        "\t```",
        "      ```",
        "   \t```",
        "- ```",
        "-\t```",
        "-     ```",
        "> ```",
    ),
    *(
        "- a",
        "-",
        "1.",
        "1. b",
        "2. c",
        "10. d",
        "- - e",
        "1) f",
        "  g",
        "     h",
        "  - i",
        "    - j",
        "> k",
        "> > l",
    ),
    *(
        "> ",
        ">\t```",
        ">     ```",
        "- > ```",
        "> - ```",
        "# m",
        "---",
        "***",
        "* * *",
        "===",
        "`n`",
    ),
]


def test_fences_are_read_as_by_markdown_it():
    markdown_it = pytest.importorskip("markdown_it")
    judge = markdown_it.MarkdownIt("commonmark").disable("html_block")
    chance = random.Random(1)
    for _ in range(1500):
        text = "\n".join(chance.choice(LINES) for _ in range(chance.randint(1, 9)))
        expected = [token.content for token in judge.parse(text) if token.type == "fence"]
        found = [block.code for block in answers.fenced_blocks(text)]
        assert [code.rstrip("\n ") for code in found] == [
            code.rstrip("\n ") for code in expected
        ], text
