"""Special and added tokens that files beside tokenizer.json name, as transformers 5.3 reads them.

tokenizer_config.json lists them by name and by id. Older folders have special_tokens_map.json and added_tokens.json.
"""

from tokenizers import AddedToken

from ..common import entry, read_json

NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
FLAGS = (
    "lstrip",
    "rstrip",
    "single_word",
    "normalized",
    "special",
)  # of an added token, beside its text


def added_token(file, name, value, **flags):
    """The AddedToken of a text, or of an object that also says how it matches; `flags` override what the object says."""
    table = {name: value if isinstance(value, dict) else {"content": value}}
    own = {
        flag: entry(file, table, name, flag, type_=bool) for flag in FLAGS if flag in table[name]
    }
    return AddedToken(entry(file, table, name, "content", type_=str), **own | flags)


def special_tokens(file, content):
    """The special tokens that a JSON file names: {"eos_token": AddedToken, ...}, and a list of those without a name."""
    extra = content.get("extra_special_tokens", content.get("additional_special_tokens")) or []
    named = {
        key: value
        for key, value in content.items()
        if key.endswith("_token") and isinstance(value, (str, dict))
    }
    named, extra = (named | extra, []) if isinstance(extra, dict) else (named, extra)
    entry(file, {"extra_special_tokens": extra}, "extra_special_tokens", type_=list)
    return (
        {key: added_token(file, key, value, special=True) for key, value in named.items()},
        [added_token(file, "extra_special_tokens", value, special=True) for value in extra],
    )


def add_tokens(fast, folder, config):
    """Add to `fast` the tokens that other files name -> the special ones by name, {"eos_token": "</s>", ...}.

    tokenizer_config.json lists tokens by id, or the older files beside it do. A new token gets the next free id, whatever
    its file says, as in transformers: first those with an id, then those with a name, then the rest.
    """
    file, known = folder / "tokenizer_config.json", fast.get_added_tokens_decoder()
    named, extra = special_tokens(file, config)
    if "added_tokens_decoder" in config:
        by_id = entry(file, config, "added_tokens_decoder", type_=dict)
        tokens = [
            added_token(file, f"added_tokens_decoder.{i}", by_id[i])
            for i in sorted(by_id, key=lambda i: (len(i), i))
        ]
    else:
        older_file, file = folder / "special_tokens_map.json", folder / "added_tokens.json"
        older, more = special_tokens(
            older_file, read_json(older_file) if older_file.is_file() else {}
        )
        ids, named = read_json(file) if file.is_file() else {}, named | older
        special = {
            token.content for token in [*(named[name] for name in NAMES if name in named), *extra]
        }
        extra = extra + more
        by_id = {
            entry(file, ids, text, type_=int): AddedToken(
                text, normalized=text not in special, special=text in special
            )
            for text in ids
        } | known
        tokens = [by_id[i] for i in sorted(by_id)]
    texts = {name: token.content for name, token in named.items()}
    for token in tokens:
        token.special |= token.content in texts.values()
    seen = {token.content for token in (*tokens, *known.values())}
    rest = [*(named[name] for name in dict.fromkeys((*NAMES, *named)) if name in named), *extra]
    fast.add_tokens(tokens + [token for token in rest if token.content not in seen])
    return texts
