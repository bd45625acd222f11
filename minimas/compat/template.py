"""Chat templates: where a checkpoint has one, and how it runs. It is a program in Jinja.

Templates run in Jinja's immutable sandbox with what transformers 5.3 gives to them: they can compute text and reach
nothing else. Facts from transformers/utils/chat_template_utils.py.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..common import InputError, entry, required

# what --date may be for a template that reformats it
DATE_FORMATS = ("%d %b %Y", "%d %B %Y", "%Y-%m-%d")


class Generation(Extension):
    """`{% generation %}` ... `{% endgeneration %}`: rendered as it is. For training, transformers marks a reply so."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> jinja2.nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=lineno)


def raise_exception(message: str) -> NoReturn:
    """What templates call to refuse a conversation."""
    raise jinja2.TemplateError(message)


def tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes < > & ' for HTML; prompts need them as they are."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def find_template(folder: Path, config: Mapping[str, Any]) -> tuple[Path | str, bytes]:
    """Where the chat template of a folder is, and its bytes; config: that of tokenizer_config.json.

    A file of its own is taken first, and of several templates the default. InputError if there is none.
    """
    for file in (
        folder / "additional_chat_templates" / "default.jinja",
        folder / "chat_template.jinja",
    ):
        if file.is_file():
            return file, file.read_bytes()
    place = folder / "tokenizer_config.json"
    found = config.get("chat_template")
    if found is None:
        required(folder, "chat_template.jinja")
    if isinstance(found, list):
        objects = [one for one in found if isinstance(one, dict)]
        found = {str(one.get("name")): one.get("template") for one in objects}
    elif not isinstance(found, dict):
        found = {"default": found}
    if "default" not in found:
        raise InputError(
            f"{place} has no chat template named default, only {', '.join(found) or 'an empty list'}: "
            "save the one to use as chat_template.jinja"
        )
    text = entry(place, {"chat_template": found}, "chat_template", "default", type_=str)
    return f"chat_template in {place}", text.encode()


def compile_template(text: str) -> jinja2.Template:
    """A Jinja template of its text; it raises anything if the text is damaged, and when it is rendered."""
    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    env.globals["raise_exception"] = raise_exception
    env.filters["tojson"] = tojson
    return env.from_string(text)


def date_as(date: str, format: str) -> str:
    """A date in another format: `strftime_now` of the date of the run, so that a run can be repeated.

    InputError if the date is in none of DATE_FORMATS.
    """
    for known in DATE_FORMATS:
        with suppress(ValueError):
            return datetime.strptime(date, known).strftime(format)
    raise InputError(
        f"it asks for the date as {format!r}, which {date!r} cannot be put in: "
        f"give a --date such as {datetime(2024, 7, 26):{DATE_FORMATS[0]}}"
    )
