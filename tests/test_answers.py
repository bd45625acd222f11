import time

import pytest

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
    started = time.perf_counter()
    assert (
        extract("\\boxed{7}" + "\\boxed{" * 2000, "math") == "7"
        and time.perf_counter() - started < 0.2
    )


@pytest.mark.parametrize(
    "text", ["x``` " + " " * 30000 + "y", "```" + " " * 30000 + "`", "\\" * 30000, "```\n" * 10000]
)
def test_no_text_takes_long(text):
    started = time.perf_counter()
    assert (
        not extract(text, "math")
        and not extract(text, "code")
        and time.perf_counter() - started < 1
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
