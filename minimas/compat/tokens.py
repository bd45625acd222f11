"""Special and added tokens that files beside tokenizer.json name, as transformers 5.3 reads them.

tokenizer_config.json lists them by name and by id. Older folders have special_tokens_map.json and added_tokens.json.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as FastTokenizer

from ..common import entry, read_json

NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")  # of a token, beside its text

Named = dict[str, AddedToken]  # special tokens by name, {"eos_token": its token}


def add_tokens(fast: FastTokenizer, folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Add to `fast` the tokens that other files name -> the special ones by name, {"eos_token": "</s>", ...}.

    tokenizer_config.json lists tokens by id, or the older files beside it do. A new token gets the next free id,
    whatever its file says, as in transformers: first those with an id, then those with a name, then the rest.
    """
    file = folder / "tokenizer_config.json"
    known = fast.get_added_tokens_decoder()
    named, extra = special_tokens(file, config)
    if "added_tokens_decoder" in config:
        tokens = tokens_by_id(file, config)
    else:
        older_named, older_extra = older_special_tokens(folder)
        named = named | older_named
        tokens = older_tokens(folder, known, named, extra)
        extra = extra + older_extra
    texts = {name: token.content for name, token in named.items()}
    for token in tokens:
        if token.content in texts.values():
            token.special = True
    order = dict.fromkeys((*NAMES, *named))
    rest = [named[name] for name in order if name in named] + extra
    seen = {token.content for token in (*tokens, *known.values())}
    fast.add_tokens(tokens + [token for token in rest if token.content not in seen])
    return texts


def special_tokens(file: Path, content: Mapping[str, Any]) -> tuple[Named, list[AddedToken]]:
    """The special tokens that a JSON file names: {"eos_token": AddedToken, ...}, and a list of those without a name."""
    named = {}
    for key, value in content.items():
        if key.endswith("_token") and isinstance(value, (str, dict)):
            named[key] = value
    extra = content.get("extra_special_tokens", content.get("additional_special_tokens")) or []
    if isinstance(extra, dict):  # these have names too
        named |= extra
        extra = []
    entry(file, {"extra_special_tokens": extra}, "extra_special_tokens", type_=list)
    return (
        {key: added_token(file, key, value, special=True) for key, value in named.items()},
        [added_token(file, "extra_special_tokens", value, special=True) for value in extra],
    )


def tokens_by_id(file: Path, config: Mapping[str, Any]) -> list[AddedToken]:
    """The tokens that tokenizer_config.json lists by id, in that order."""
    by_id = entry(file, config, "added_tokens_decoder", type_=dict)
    ids = sorted(by_id, key=lambda i: (len(i), i))  # texts of numbers
    return [added_token(file, f"added_tokens_decoder.{i}", by_id[i]) for i in ids]


def older_special_tokens(folder: Path) -> tuple[Named, list[AddedToken]]:
    """The special tokens of special_tokens_map.json, as `special_tokens` gives them; none without that file."""
    file = folder / "special_tokens_map.json"
    return special_tokens(file, read_json(file) if file.is_file() else {})


def older_tokens(
    folder: Path, known: dict[int, AddedToken], named: Named, extra: Iterable[AddedToken]
) -> list[AddedToken]:
    """The tokens of added_tokens.json together with the known ones of tokenizer.json, by their ids."""
    file = folder / "added_tokens.json"
    ids = read_json(file) if file.is_file() else {}
    special = {named[name].content for name in NAMES if name in named}
    special |= {token.content for token in extra}
    by_id = {}
    for text in ids:
        token = AddedToken(text, normalized=text not in special, special=text in special)
        by_id[entry(file, ids, text, type_=int)] = token
    by_id |= known
    return [by_id[i] for i in sorted(by_id)]


def added_token(file: Path, name: str, value: Any, **flags: bool) -> AddedToken:
    """The AddedToken of a text, or of an object that also says how it matches; `flags` override what it says."""
    table = {name: value if isinstance(value, dict) else {"content": value}}
    given = {}
    for flag in FLAGS:
        if flag in table[name]:
            given[flag] = entry(file, table, name, flag, type_=bool)
    return AddedToken(entry(file, table, name, "content", type_=str), **given | flags)
