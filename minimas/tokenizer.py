"""Text to ids and back, and the chat template that wraps an agent's prompt, as transformers 5.3 reads a folder.

Files: tokenizer.json (read by `tokenizers`), tokenizer_config.json (special and added tokens, sometimes the template),
chat_template.jinja; in older folders also added_tokens.json and special_tokens_map.json. A template is a program, which
runs in a sandbox (sandbox/template.py).
"""

from functools import cached_property, partial

from jinja2 import TemplateError
from tokenizers import AddedToken
from tokenizers import Tokenizer as FastTokenizer

from .common import InputError, check_text, entry, read_json, required
from .sandbox.template import compile_template, date_as, find_template

DATE = "26 Jul 2024"  # what Llama 3.2's template falls back to; fixed, so that a run can be repeated
NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
FLAGS = "lstrip", "rstrip", "single_word", "normalized", "special"  # of an added token, beside its text
CLEANED = " .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're"  # clean_up_tokenization_spaces strips them


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
            raise InputError(f"the text has token {last}, {self.fast.id_to_token(last)!r}, but the agent has embeddings "
                             f"for {self.embedding_rows}: fetch its tokenizer.json and weights again, or leave that token out")
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
            raise InputError("the chat template refuses a system and a user message: "
                             f"{(str(e) or type(e).__name__).splitlines()[0]}") from e

    @cached_property
    def roles(self):
        """The roles whose messages the template shows: ("system", "user"), or ("user",), or none."""
        for roles in ("system", "user"), ("user",):
            try:
                text = self.render([{"role": role, "content": f"[{role}]"} for role in roles], DATE)
                if all(f"[{role}]" in text for role in roles):
                    return roles
            except TemplateError:  # it refuses one of them
                pass
        return ()

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
        """The template's text for messages. It raises anything if it fails, TemplateError if it refuses them."""
        text = self.template.render(messages=messages, tools=None, documents=None, enable_thinking=False, date_string=date,
                                    add_generation_prompt=add_generation_prompt,
                                    strftime_now=partial(date_as, date), **self.named)
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
    fast.encode_special_tokens = bool(config.get("split_special_tokens"))  # true: those in a text are read as its letters
    named = add_tokens(fast, folder, config)
    place, template = find_template(folder, config)
    try:
        return Tokenizer(fast, named, template.decode(), config.get("clean_up_tokenization_spaces"))
    except Exception as e:  # Jinja computes constants here, and compiles: more can go wrong than the syntax
        why = (str(e) or type(e).__name__).splitlines()[0]
        raise InputError(f"{place} is damaged, it is not a Jinja template ({why}): fetch it again") from e


def added_token(file, name, value, **flags):
    """The AddedToken of a text, or of an object that also says how it matches; `flags` override what the object says."""
    table = {name: value if isinstance(value, dict) else {"content": value}}
    own = {flag: entry(file, table, name, flag, type_=bool) for flag in FLAGS if flag in table[name]}
    return AddedToken(entry(file, table, name, "content", type_=str), **own | flags)


def special_tokens(file, content):
    """The special tokens that a JSON file names: {"eos_token": AddedToken, ...}, and a list of those without a name."""
    extra = content.get("extra_special_tokens", content.get("additional_special_tokens")) or []
    named = {key: value for key, value in content.items() if key.endswith("_token") and isinstance(value, (str, dict))}
    named, extra = (named | extra, []) if isinstance(extra, dict) else (named, extra)
    entry(file, {"extra_special_tokens": extra}, "extra_special_tokens", type_=list)
    return ({key: added_token(file, key, value, special=True) for key, value in named.items()},
            [added_token(file, "extra_special_tokens", value, special=True) for value in extra])


def add_tokens(fast, folder, config):
    """Add to `fast` the tokens that other files name -> the special ones by name, {"eos_token": "</s>", ...}.

    tokenizer_config.json lists tokens by id, or the older files beside it do. A new token gets the next free id, whatever
    its file says, as in transformers: first those with an id, then those with a name, then the rest.
    """
    file, known = folder / "tokenizer_config.json", fast.get_added_tokens_decoder()
    named, extra = special_tokens(file, config)
    if "added_tokens_decoder" in config:
        by_id = entry(file, config, "added_tokens_decoder", type_=dict)
        tokens = [added_token(file, f"added_tokens_decoder.{i}", by_id[i]) for i in sorted(by_id, key=lambda i: (len(i), i))]
    else:
        older_file, file = folder / "special_tokens_map.json", folder / "added_tokens.json"
        older, more = special_tokens(older_file, read_json(older_file) if older_file.is_file() else {})
        ids, named = read_json(file) if file.is_file() else {}, named | older
        special = {token.content for token in [*(named[name] for name in NAMES if name in named), *extra]}
        extra = extra + more
        by_id = {entry(file, ids, text, type_=int): AddedToken(text, normalized=text not in special, special=text in special)
                 for text in ids} | known
        tokens = [by_id[i] for i in sorted(by_id)]
    texts = {name: token.content for name, token in named.items()}
    for token in tokens:
        token.special |= token.content in texts.values()
    seen = {token.content for token in (*tokens, *known.values())}
    rest = [*(named[name] for name in dict.fromkeys((*NAMES, *named)) if name in named), *extra]
    fast.add_tokens(tokens + [token for token in rest if token.content not in seen])
    return texts
