"""Text to ids and back, and the chat template that wraps an agent's prompt, as transformers 5.3 reads a folder.

Files: tokenizer.json (read by `tokenizers`), tokenizer_config.json (special and added tokens, sometimes the template),
chat_template.jinja, and in older folders others beside them (compat/).
"""

from collections.abc import Iterable
from contextlib import suppress
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from tokenizers import Tokenizer as FastTokenizer

from .common import InputError, check_text, read_json, required
from .compat.folder import check_no_pointer
from .compat.template import compile_template, date_as, find_template
from .compat.tokens import add_tokens

# What Llama 3.2's template falls back to; fixed, so that a run can be repeated.
DATE = "26 Jul 2024"
# clean_up_tokenization_spaces takes the blanks out of these
CLEANED = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")


class Tokenizer:
    """One agent's tokenizer and chat template.

    fast       a tokenizers.Tokenizer
    named      its special tokens by name, {"eos_token": "</s>", ...}
    template   the compiled chat template; template_text is its Jinja text
    clean_up   decode removes spaces before punctuation, as older tokenizers ask for
    """

    def __init__(
        self,
        fast: FastTokenizer,
        named: dict[str, str],
        template: str,
        clean_up: bool = False,
    ) -> None:
        self.fast = fast
        self.named = named
        self.template_text = template
        self.template = compile_template(template)
        self.clean_up = clean_up
        self.eos_id = fast.token_to_id(named.get("eos_token", ""))

    def __getstate__(self) -> dict[str, Any]:
        """For copy.deepcopy and pickle, which cannot take a compiled template: it travels as text."""
        return {name: value for name, value in vars(self).items() if name != "template"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.template = compile_template(self.template_text)

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Text -> ids; `special` adds the tokens that the tokenizer itself puts around a text, such as BOS."""
        ids: list[int] = self.fast.encode(text, add_special_tokens=special).ids
        return ids

    def decode(self, ids: Iterable[int], strip: bool = True) -> str:
        """Ids -> text without special tokens."""
        text: str = self.fast.decode(list(ids), skip_special_tokens=True)
        if self.clean_up:
            for spaced in CLEANED:
                text = text.replace(spaced, spaced.strip())
        return text.strip() if strip else text

    def chat(self, system: str, user: str, date: str = DATE) -> str:
        """The rendered prompt up to the point where the assistant speaks, with thinking mode off.

        A template that refuses a system message (Mistral's, Gemma 2's) or leaves it out gets both texts as one user
        message. InputError if it refuses that too.
        """
        try:
            messages = [{"role": "user", "content": user}]
            if system and "system" in self.roles:
                messages.insert(0, {"role": "system", "content": system})
            elif system:
                messages[0]["content"] = system + "\n\n" + user
            return self.render(messages, date)
        except TemplateError as e:
            raise template_fault(e) from e

    @cached_property
    def roles(self) -> tuple[str, ...]:
        """The roles whose messages the template shows: ("system", "user"), or ("user",), or none.

        InputError if it fails, which is not taken for a refusal.
        """
        attempts: list[tuple[str, ...]] = [("system", "user"), ("user",)]
        for roles in attempts:
            messages = [{"role": role, "content": f"[{role}]"} for role in roles]
            with suppress(TemplateError):  # it refuses one of them
                text = self.render(messages, DATE)
                if all(f"[{role}]" in text for role in roles):
                    return roles
        return ()

    def render(
        self, messages: list[dict[str, str]], date: str, add_generation_prompt: bool = True
    ) -> str:
        """The template's text for messages; InputError if it fails, TemplateError if it refuses them."""
        try:
            text = self.template.render(
                messages=messages,
                tools=None,
                documents=None,
                enable_thinking=False,
                date_string=date,
                add_generation_prompt=add_generation_prompt,
                strftime_now=partial(date_as, date),
                **self.named,
            )
        except TemplateError:
            raise
        except Exception as e:  # a template is a program, it can raise anything
            raise template_fault(e) from e
        if not text.strip():
            raise TemplateError("its text is blank")
        check_text(text, "what it renders")
        return text


def template_fault(error: Exception) -> InputError:
    """What to raise if a chat template raised an error."""
    why = (str(error) or type(error).__name__).splitlines()[0]
    return InputError(f"the chat template refuses a system and a user message: {why}")


class Decoding:
    """A text while it is written, in pieces that are never taken back.

    before  what stands before the ids
    given   what was given of the text
    """

    def __init__(self, tokenizer: Tokenizer, before: str = "", given: str = "") -> None:
        self.tokenizer = tokenizer
        self.before = before
        self.given = given

    def text(self, ids: Iterable[int]) -> str:
        """All of the text, if it ends here."""
        return (self.before + self.tokenizer.decode(ids, strip=False)).strip()

    def new_text(self, ids: Iterable[int], ended: bool = False) -> str:
        """What these ids, all of the text so far, add to what was given.

        Kept back until the text goes on or has ended: a character of which bytes are missing, and blanks, which are not
        part of a text that ends with them.
        """
        text = self.text(ids)
        if not ended:
            text = text.rstrip("\N{REPLACEMENT CHARACTER}").rstrip()
            if self.tokenizer.clean_up:  # which may still change what is around the last blank
                without_last_word = text.rsplit(maxsplit=1)[:-1]
                text = "".join(without_last_word)
        new = text[len(self.given) :]
        self.given += new
        return new


def load_tokenizer(folder: Path) -> Tokenizer:
    """The Tokenizer in a folder, with its chat template; InputError if a file is missing or damaged."""
    file = required(folder, "tokenizer.json")
    check_no_pointer(file)
    try:
        fast = FastTokenizer.from_file(str(file))
    except Exception as e:  # tokenizers raises bare Exception
        raise InputError(f"{file} is damaged ({e}): fetch it again") from e
    fast.no_truncation()  # the length limit of some training may have been saved with it
    fast.no_padding()
    config = read_json(required(folder, "tokenizer_config.json"))
    # If it is true, a special token in a text is read as plain text.
    fast.encode_special_tokens = bool(config.get("split_special_tokens"))
    named = add_tokens(fast, folder, config)
    place, template = find_template(folder, config)
    clean_up = bool(config.get("clean_up_tokenization_spaces"))
    try:
        return Tokenizer(fast, named, template.decode(), clean_up)
    except Exception as e:  # Jinja compiles here, and computes constants: anything can go wrong
        why = (str(e) or type(e).__name__).splitlines()[0]
        raise InputError(
            f"{place} is damaged, it is not a Jinja template ({why}): fetch it again"
        ) from e
