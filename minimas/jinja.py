"""Jinja for the pages and pictures that minimas writes. (compat/template.py has the sandbox for chat templates.)

All that is filled in is escaped, and shows its control characters: nothing of a question, a model or a tokenizer can
break out of the place where it stands.
"""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

# Unicode's pictures of the control characters, which HTML forbids
PICTURES = {code: 0x2400 + code for code in range(32)} | {127: 0x2421}
IN_TEXT = {code: picture for code, picture in PICTURES.items() if chr(code) not in "\t\n"}
IN_TOKEN = PICTURES | {ord(" "): 0x2423}


def environment(folder: Path) -> Environment:
    """Jinja for the templates in a folder. The filter `blanks` shows blanks and line feeds, too."""
    env = Environment(
        loader=FileSystemLoader(folder, encoding="utf-8"),
        autoescape=True,
        finalize=visible,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    env.filters["blanks"] = blanks
    return env


def visible(value: Any) -> Any:
    """A text with pictures for control characters other than tab and line feed; anything else as it is."""
    return value.translate(IN_TEXT) if isinstance(value, str) else value


def blanks(token: str) -> str:
    """A token with pictures for all control characters and for blanks."""
    return token.translate(IN_TOKEN)
