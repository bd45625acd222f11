"""Chat templates: where a checkpoint has one, and how it runs. It is a program in Jinja.

Templates run in Jinja's immutable sandbox with what transformers 5.3 gives to them: they can compute text and reach nothing
else. Facts from transformers/utils/chat_template_utils.py.
"""

import json
from contextlib import suppress
from datetime import datetime

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..common import InputError, entry, required

DATE_FORMATS = (
    "%d %b %Y",
    "%d %B %Y",
    "%Y-%m-%d",
)  # what --date may be for a template that reformats it


class Generation(Extension):
    """`{% generation %}` ... `{% endgeneration %}`: rendered as it is. For training, transformers marks a reply so."""

    tags = {"generation"}

    def parse(self, parser):
        lineno = next(parser.stream).lineno
        return jinja2.nodes.Scope(
            parser.parse_statements(["name:endgeneration"], drop_needle=True), lineno=lineno
        )


def raise_exception(message):
    """What templates call to refuse a conversation."""
    raise jinja2.TemplateError(message)


def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    """Jinja's own filter escapes < > & ' for HTML; prompts need them as they are."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def find_template(folder, config):
    """Where the chat template of a folder is, and its bytes; config: that of tokenizer_config.json.

    A file of its own is taken first, and of several templates the default. InputError if there is none.
    """
    for file in (
        folder / "additional_chat_templates" / "default.jinja",
        folder / "chat_template.jinja",
    ):
        if file.is_file():
            return file, file.read_bytes()
    place, found = folder / "tokenizer_config.json", config.get("chat_template")
    if found is None:
        required(folder, "chat_template.jinja")
    if isinstance(found, list):
        found = {
            str(one.get("name")): one.get("template") for one in found if isinstance(one, dict)
        }
    found = found if isinstance(found, dict) else {"default": found}
    if "default" not in found:
        raise InputError(
            f"{place} has no chat template named default, only {', '.join(found) or 'an empty list'}: "
            "save the one to use as chat_template.jinja"
        )
    return f"chat_template in {place}", entry(
        place, {"chat_template": found}, "chat_template", "default", type_=str
    ).encode()


def compile_template(text):
    """A Jinja template of its text; it raises anything if the text is damaged, and when it is rendered."""
    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    env.globals["raise_exception"], env.filters["tojson"] = raise_exception, tojson
    return env.from_string(text)


def date_as(date, format):
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
