"""Text to ids and back, and the chat template that wraps an agent's prompt, as transformers 5.3 reads a folder.

Files: tokenizer.json (read by `tokenizers`), tokenizer_config.json (special and added tokens, sometimes the template),
chat_template.jinja, and in older folders others beside them (compat/).
"""

from contextlib import suppress
from functools import cached_property, partial

from jinja2 import TemplateError
from tokenizers import Tokenizer as FastTokenizer

from .common import InputError, check_text, read_json, required
from .compat.template import compile_template, date_as, find_template
from .compat.tokens import add_tokens

DATE = (
    "26 Jul 2024"  # what Llama 3.2's template falls back to; fixed, so that a run can be repeated
)
CLEANED = (
    " .",
    " ?",
    " !",
    " ,",
    " ' ",
    " n't",
    " 'm",
    " 's",
    " 've",
    " 're",
)  # clean_up_tokenization_spaces strips them


class Tokenizer:
    """One agent's tokenizer and chat template.

    fast      a tokenizers.Tokenizer
    named     its special tokens by name, {"eos_token": "</s>", ...}
    template  Jinja text
    clean_up  decode removes spaces before punctuation, as older tokenizers ask for
    """

    def __init__(self, fast, named, template, clean_up=False):
        self.fast, self.named, self.clean_up = fast, named, clean_up
        self.template = compile_template(template)
        self.eos_id = fast.token_to_id(named.get("eos_token", ""))
        self.embedding_rows = None  # of the agent, which sets it: encode refuses ids from here on

    def encode(self, text, special=False):
        """Text -> list of ids; `special` adds the tokens that the tokenizer itself puts around a text, such as BOS.

        InputError if the agent has no embedding for one; that is not asked before, since many tokenizers hold unused ids.
        """
        ids = self.fast.encode(text, add_special_tokens=special).ids
        if self.embedding_rows and (last := max(ids, default=0)) >= self.embedding_rows:
            raise InputError(
                f"the text has token {last}, {self.fast.id_to_token(last)!r}, but the agent has embeddings "
                f"for {self.embedding_rows}: fetch its tokenizer.json and weights again, or leave that token out"
            )
        return ids

    def decode(self, ids, strip=True):
        """Ids -> text without special tokens."""
        text = self.fast.decode(list(ids), skip_special_tokens=True)
        for spaced in CLEANED if self.clean_up else ():
            text = text.replace(spaced, spaced.strip())
        return text.strip() if strip else text

    def chat(self, system, user, date=DATE):
        """The rendered prompt up to the point where the assistant speaks, with thinking mode off.

        A template that refuses a system message (Mistral's, Gemma 2's) or leaves it out gets both texts as one user message.
        InputError if it refuses that too.
        """
        try:
            if system and "system" not in self.roles:
                system, user = "", system + "\n\n" + user
            messages = [{"role": "system", "content": system}] if system else []
            return self.render([*messages, {"role": "user", "content": user}], date)
        except Exception as e:  # a template is a program, it can raise anything
            raise InputError(
                "the chat template refuses a system and a user message: "
                f"{(str(e) or type(e).__name__).splitlines()[0]}"
            ) from e

    @cached_property
    def roles(self):
        """The roles whose messages the template shows: ("system", "user"), or ("user",), or none."""
        for roles in ("system", "user"), ("user",):
            with suppress(TemplateError):  # it refuses one of them
                text = self.render([{"role": role, "content": f"[{role}]"} for role in roles], DATE)
                if all(f"[{role}]" in text for role in roles):
                    return roles
        return ()

    def render(self, messages, date, add_generation_prompt=True):
        """The template's text for messages. It raises anything if it fails, TemplateError if it refuses them."""
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
        if not text.strip():
            raise TemplateError("its text is blank")
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
    config = read_json(required(folder, "tokenizer_config.json"))
    fast.encode_special_tokens = bool(
        config.get("split_special_tokens")
    )  # true: those in a text are read as its letters
    named = add_tokens(fast, folder, config)
    place, template = find_template(folder, config)
    try:
        return Tokenizer(fast, named, template.decode(), config.get("clean_up_tokenization_spaces"))
    except (
        Exception
    ) as e:  # Jinja computes constants here, and compiles: more can go wrong than the syntax
        why = (str(e) or type(e).__name__).splitlines()[0]
        raise InputError(
            f"{place} is damaged, it is not a Jinja template ({why}): fetch it again"
        ) from e
