"""Text to ids and back, and the chat template that wraps an agent's prompt.

Files: tokenizer.json (read by `tokenizers`), tokenizer_config.json (names of the special tokens), chat_template.jinja.
A template runs in Jinja's immutable sandbox with the filters and globals that the released agents' templates use: it
can compute text and reach nothing else.
"""

import json
from functools import cached_property

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tokenizers import Tokenizer as FastTokenizer
from tokenizers.processors import TemplateProcessing

from .common import InputError, check_text, entry, read_json, required

DATE = "26 Jul 2024"  # what Llama 3.2's template falls back to; fixed, so that a run can be repeated


def raise_exception(message):
    """What templates call to refuse a conversation."""
    raise jinja2.TemplateError(message)


def template_environment():
    """The sandbox in which chat templates run."""
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    env.globals["raise_exception"] = raise_exception
    # Jinja's own tojson escapes < > & ' for HTML; prompts need them as they are. The arguments are those of transformers.
    env.filters["tojson"] = lambda x, ensure_ascii=False, indent=None, separators=None, sort_keys=False: json.dumps(
        x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    return env


class Tokenizer:
    """One agent's tokenizer and chat template.

    fast      a tokenizers.Tokenizer
    named     its special tokens by name, {"eos_token": "</s>", ...}
    template  Jinja text
    """

    def __init__(self, fast, named, template):
        self.fast, self.named = fast, named
        self.template = template_environment().from_string(template)
        self.eos_id = fast.token_to_id(named.get("eos_token", ""))
        self.embedding_rows = None  # of the agent, which sets it: encode refuses ids from here on

    def encode(self, text, special=False):
        """Text -> list of ids; `special` adds the tokens that the tokenizer itself puts around a text, such as BOS.

        InputError if the agent has no embedding for one; that is not asked before, since many tokenizers hold unused ids.
        """
        ids = self.fast.encode(text, add_special_tokens=special).ids
        if self.embedding_rows and (last := max(ids, default=0)) >= self.embedding_rows:
            raise InputError(f"the text has token {last}, {self.fast.id_to_token(last)!r}, but the agent has embeddings "
                             f"for {self.embedding_rows}: fetch its tokenizer.json and weights again, or leave that token out")
        return ids

    def decode(self, ids, strip=True):
        """Ids -> text without special tokens."""
        text = self.fast.decode(list(ids), skip_special_tokens=True)
        return text.strip() if strip else text

    def chat(self, system, user, date=DATE):
        """The rendered prompt up to the point where the assistant speaks, with thinking mode off.

        A template that refuses a system role (Mistral's) gets both texts as one user message; InputError if that fails.
        """
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": user})
        try:
            return self.render(messages, date)
        except Exception as e:  # a template is a program, it can raise anything
            if "roles must alternate" in str(e) and system:
                return self.chat("", system + "\n\n" + user, date)
            raise InputError("the chat template refuses a system and a user message: "
                             f"{(str(e) or type(e).__name__).splitlines()[0]}") from e

    @cached_property
    def ending(self):
        """What ends an assistant's reply: the first word that the template writes after it, else the eos token."""
        mark = "[reply]"
        try:
            text = self.render([{"role": "user", "content": "?"}, {"role": "assistant", "content": mark}], DATE, False)
        except Exception:
            text = mark
        return next(iter(text.partition(mark)[2].split()), self.named.get("eos_token", ""))

    def render(self, messages, date, add_generation_prompt=True):
        """The template's text for messages. It raises anything if it fails, jinja2.TemplateError if it refuses them."""
        text = self.template.render(messages=messages, tools=None, documents=None, enable_thinking=False, date_string=date,
                                    add_generation_prompt=add_generation_prompt, **self.named)
        if not text.strip():
            raise jinja2.TemplateError("its text is blank")
        check_text(text, "what it renders")
        return text


def load_tokenizer(folder):
    """The Tokenizer in a folder, with its chat template; InputError if a file is missing or damaged."""
    file = required(folder, "tokenizer.json")
    try:
        fast = FastTokenizer.from_file(str(file))
    except Exception as e:  # tokenizers raises bare Exception
        raise InputError(f"{file} is damaged ({e}): fetch it again") from e
    fast.no_truncation()  # the length limit of some training may have been saved with it
    fast.no_padding()
    config = read_json(named_in := required(folder, "tokenizer_config.json"))
    special = {k: entry(named_in, config, k, "content", type_=str) if isinstance(v, dict) else v for k, v in config.items()
               if k.endswith("_token") and isinstance(v, (str, dict))}
    if "add_bos_token" in config or "add_eos_token" in config:  # overrides what tokenizer.json puts around a plain text
        bos, eos = ([special[name]] if config.get(f"add_{name}") and name in special else []
                    for name in ("bos_token", "eos_token"))
        ids = [(token, fast.token_to_id(token)) for token in bos + eos]
        if unknown := [token for token, number in ids if number is None]:
            raise InputError(f"{named_in} puts {unknown[0]!r} around a text, but {file} does not know it: fetch both again")
        fast.post_processor = TemplateProcessing(single=[*bos, "$A", *eos], special_tokens=ids)
    in_config = config.get("chat_template")  # some base models have it there
    place = folder / "chat_template.jinja"
    if place.is_file() or not isinstance(in_config, str):
        template = required(folder, place.name).read_bytes()
    else:
        place, template = f"chat_template in {named_in}", in_config.encode()
    try:
        return Tokenizer(fast, special, template.decode())
    except Exception as e:  # Jinja computes constants here, and compiles: more can go wrong than the syntax
        why = (str(e) or type(e).__name__).splitlines()[0]
        raise InputError(f"{place} is damaged, it is not a Jinja template ({why}): fetch it again") from e
