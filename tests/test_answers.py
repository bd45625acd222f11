import pytest

from minimas.answers import extract


@pytest.mark.parametrize("text, answer", [
    (r"so \boxed{7}", "7"), (r"\boxed{1} then \boxed{ \frac{1}{2} }", r"\frac{1}{2}"), (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
    (r"\boxed{7} and \boxed{8", "7"), (r"\boxed{8", None), ("7", None), ("", None), (r"\boxed{}", None)])
def test_math(text, answer):
    assert extract(text, "math") == answer


@pytest.mark.parametrize("text, answer", [
    (r"\boxed{B}", "B"), (r"\boxed{b}", "B"), (r"\boxed{(C)}", "C"), (r"\boxed{\text{D}}", "D"), (r"\boxed{A. aspirin}", "A"),
    (r"\boxed{E}", None), (r"\boxed{Aspirin}", None), ("A", None)])
def test_choice(text, answer):
    assert extract(text, "choice") == answer


@pytest.mark.parametrize("text, answer", [
    ("so\n```python\nx = 1\n```\n", "x = 1"), ("```\nx\n```\nor\n```py\ny\n```", "y"), ("```python\nx = 1", "x = 1"),
    ("```python\nx\n```\n```\n```", "x"), ("x = 1", None)])
def test_code(text, answer):
    assert extract(text, "code") == answer
