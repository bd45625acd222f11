"""The answer inside a text: the last \\boxed{...} for task math, its letter for choice, the last code block for code."""

import re


def boxed(text):
    """Content of the last \\boxed{...} that is closed, braces inside balanced; None where there is none or it is empty."""
    for start in reversed([m.end() for m in re.finditer(r"\\boxed\s*\{", text)]):
        depth = 1
        for i in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[i], 0)
            if depth == 0:
                return text[start:i].strip() or None
    return None


def letter(text):
    """The option A to D in the last box, alone or as in (B), B., \\text{B}, "B) 12 mg"; None otherwise."""
    found = re.match(r"\(?([A-Da-d])(?![A-Za-z])", re.sub(r"^\\(text|textbf|mathrm)\{", "", boxed(text) or ""))
    return found and found[1].upper()


def code_block(text):
    """Inside of the last Markdown code block that holds something; one left open runs to the end, as in Markdown."""
    blocks = [b.strip("\n") for b in re.findall(r"```[\w+-]*[ \t]*\n(.*?)(?:```|\Z)", text, re.DOTALL)]
    return next((b for b in reversed(blocks) if b.strip()), None)


def extract(text, task):
    """The answer of a text for task math, choice or code, or None where it holds none in the expected form."""
    return {"math": boxed, "choice": letter, "code": code_block}[task](text)
