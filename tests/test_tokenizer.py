"""Folders whose tokens and templates stand in other files, against transformers where it is installed, else against
what transformers 5.3 gave.
"""

import json

import pytest
import tokenizers
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from minimas import InputError
from minimas.tokenizer import load_tokenizer

TEXT = "He said , it 's 5 ! <s>a</s> <end> b <Tool>c <X>d <x>e"


def make_folder(folder, tokens=(), lowercase=False, config=None, **files):
    """tokenizer.json of bytes with added `tokens`, tokenizer_config.json, and `files`, whose names stand without
    .json.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    if lowercase:
        tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.add_tokens(list(tokens))
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": "{{ bos_token }}{{ messages[0].content }}",
    } | (config or {})
    for name, content in (files | {"tokenizer_config": config}).items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def theirs(folder):
    """transformers' tokenizer of a folder, None if transformers is not installed."""
    try:
        from transformers import AutoTokenizer
    except ImportError:
        return None
    return AutoTokenizer.from_pretrained(folder)


def check_as_in_transformers(folder):
    """minimas' tokenizer, after a comparison of ids, decoded text, end token and rendered chat."""
    ours, other = load_tokenizer(folder), theirs(folder)
    if other:
        ids = other.encode(TEXT, add_special_tokens=False)
        assert ours.encode(TEXT) == ids and ours.encode(TEXT, special=True) == other.encode(TEXT)
        assert ours.decode(ids, strip=False) == other.decode(ids, skip_special_tokens=True)
        assert ours.eos_id == other.eos_token_id
        messages = [{"role": "user", "content": "U"}]
        assert ours.chat("", "U") == other.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
    return ours


def as_list(*tokens):
    """added_tokens_decoder of tokenizer_config.json."""
    flags = {
        "lstrip": False,
        "rstrip": False,
        "single_word": False,
        "normalized": False,
        "special": True,
    }
    return {
        str(256 + i): flags | ({"content": token} if isinstance(token, str) else token)
        for i, token in enumerate(tokens)
    }


# tokens of tokenizer.json and what the other files say -> ids of "a<X>b<end>", the end token's id, and their text
OLDER = tokenizers.__version__.split(".")[:2] < ["0", "23"]
ELSEWHERE = [
    (
        {"added_tokens": {"<X>": 256, "<end>": 257}, "config": {"eos_token": "<end>"}},
        [64, 256, 65, 257],
        257,
        "a<X>b",
    ),
    # ids follow the order of the ids in the file, from the first free one
    ({"added_tokens": {"<end>": 900, "<X>": 700}}, [64, 256, 65, 257], None, "a<X>b<end>"),
    # an id that tokenizer.json gives to another token: that one stays
    (
        {"added_tokens": {"<X>": 256}, "tokens": ["<end>"], "config": {"eos_token": "<end>"}},
        [64, 27, 55, 29, 65, 256],
        256,
        "a<X>b",
    ),
    (
        {
            "added_tokens": {"<X>": 256, "<end>": 257},
            "special_tokens_map": {"eos_token": {"content": "<end>"}},
        },
        [64, 256, 65, 257],
        257,
        "a<X>b",
    ),
    (
        {"config": {"added_tokens_decoder": as_list("<X>", "<end>"), "eos_token": "<end>"}},
        [64, 256, 65, 257],
        257,
        "ab",
    ),
    (
        {
            "config": {
                "added_tokens_decoder": as_list({"content": "<X>", "special": False}, "<end>")
            }
        },
        [64, 256, 65, 257],
        None,
        "a<X>b",
    ),
    (
        {
            "config": {
                "added_tokens_decoder": {"1000": {"content": "<X>"}, "900": {"content": "<end>"}}
            }
        },
        [64, 257, 65, 256],
        None,
        "a<X>b<end>",
    ),
    # it matches <x> too, and is special; tokenizers 0.23 no longer leaves it out of a decoded text
    (
        {"lowercase": True, "added_tokens": {"<X>": 256}, "config": {"image_token": "<X>"}},
        [64, 256, 65, 27, 68, 77, 67, 29],
        None,
        "ab<end>" if OLDER else "a<x>b<end>",
    ),
    # with that list, the older files are not asked
    (
        {
            "config": {"added_tokens_decoder": as_list("<end>"), "eos_token": "<end>"},
            "added_tokens": {"<X>": 257},
            "special_tokens_map": {"eos_token": "<X>"},
        },
        [64, 27, 55, 29, 65, 256],
        256,
        "a<X>b",
    ),
    # an end token that is not flagged special, or is a plain word of the vocabulary
    (
        {"tokens": ["<X>", "<end>"], "config": {"eos_token": "<end>"}},
        [64, 256, 65, 257],
        257,
        "a<X>b",
    ),
    (
        {
            "tokens": ["<X>", "<end>"],
            "special_tokens_map": {"eos_token": "<end>"},
            "config": {"eos_token": "<X>"},
        },
        [64, 256, 65, 257],
        257,
        "a<X>b",
    ),
    (
        {
            "tokens": ["<X>", "<end>"],
            "config": {"eos_token": {"__type": "AddedToken", "content": "<end>", "lstrip": False}},
        },
        [64, 256, 65, 257],
        257,
        "a<X>b",
    ),
    ({"config": {"eos_token": "<end>", "image_token": "<X>"}}, [64, 257, 65, 256], 256, "ab"),
    (
        {"config": {"eos_token": "<end>"}, "special_tokens_map": {"bos_token": "<X>"}},
        [64, 256, 65, 257],
        257,
        "ab",
    ),
    (
        {"config": {"extra_special_tokens": ["<X>"], "eos_token": "<end>"}},
        [64, 257, 65, 256],
        256,
        "ab",
    ),
    ({"config": {"additional_special_tokens": ["<X>", "<end>"]}}, [64, 256, 65, 257], None, "ab"),
    (
        {"config": {"extra_special_tokens": {"call": "<X>", "reply_token": "<end>"}}},
        [64, 256, 65, 257],
        None,
        "ab",
    ),
    (
        {"special_tokens_map": {"additional_special_tokens": ["<X>", "<end>"]}},
        [64, 256, 65, 257],
        None,
        "ab",
    ),
    (
        {"tokens": ["<X>", "<end>"], "config": {"extra_special_tokens": ["<X>", "<end>"]}},
        [64, 256, 65, 257],
        None,
        "a<X>b<end>",
    ),
    (
        {"config": {"split_special_tokens": True, "eos_token": "<end>"}},
        [64, 27, 55, 29, 65, 27, 68, 77, 67, 29],
        256,
        "a<X>b<end>",
    ),
]


@pytest.mark.parametrize("parts, ids, eos, text", ELSEWHERE)
def test_tokens_that_other_files_name(tmp_path, parts, ids, eos, text):
    tokenizer = check_as_in_transformers(make_folder(tmp_path, **parts))
    assert tokenizer.encode("a<X>b<end>") == ids
    assert tokenizer.eos_id == eos and tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    "flags, ids",
    [
        ({}, [64, 220, 256, 220, 65, 256, 66, 27, 87, 29]),
        ({"lstrip": True}, [64, 256, 220, 65, 256, 66, 27, 87, 29]),
        ({"rstrip": True}, [64, 220, 256, 65, 256, 66, 27, 87, 29]),
        ({"normalized": True}, [64, 220, 256, 220, 65, 256, 66, 256]),
        ({"single_word": True}, [64, 220, 256, 220, 65, 27, 87, 29, 66, 27, 87, 29]),
    ],
)
@pytest.mark.parametrize("tokens", [[], [AddedToken("<X>", special=True, normalized=False)]])
def test_how_an_added_token_matches(tmp_path, tokens, flags, ids):
    """tokenizer_config.json says it, for a token that tokenizer.json has and for one that it lacks."""
    config = {"added_tokens_decoder": as_list({"content": "<X>"} | flags)}
    tokenizer = check_as_in_transformers(
        make_folder(tmp_path, tokens, lowercase=True, config=config)
    )
    if tokens and "normalized" in flags and OLDER:
        ids = [
            *ids[:-1],
            27,
            87,
            29,
        ]  # before 0.23 the tokenizers library keeps what tokenizer.json says of that
    assert tokenizer.encode("a <X> b<X>c<x>") == ids


def test_tokens_around_a_plain_text(tmp_path):
    """tokenizer.json says what they are; transformers 5.3 does not read add_bos_token and add_eos_token beside it."""
    config = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True, "add_eos_token": True}
    tokenizer = check_as_in_transformers(make_folder(tmp_path, ["<s>", "</s>"], config=config))
    assert tokenizer.encode("a", special=True) == [64]


@pytest.mark.parametrize(
    "config, text",
    [
        ({}, "a , b . it 's n't ' c ?"),
        ({"clean_up_tokenization_spaces": False}, "a , b . it 's n't ' c ?"),
        ({"clean_up_tokenization_spaces": True}, "a, b. it'sn't'c?"),
    ],
)
def test_spaces_before_punctuation(tmp_path, config, text):
    tokenizer = check_as_in_transformers(make_folder(tmp_path, config=config))
    assert tokenizer.decode(tokenizer.encode("a , b . it 's n't ' c ?")) == text


# Templates

TEMPLATES = [  # and what they make of a user message " U " with tokens <s> and </s>
    (
        "a{% generation %} {% set x = 1 %}{{ messages[0].content }}{% endgeneration %}{{ x }}b",
        "a  U b",
    ),
    (
        "{% for m in messages %}{%- generation -%} {{ loop.index }} {%- endgeneration -%} {% endfor %}",
        "1",
    ),
    (
        "{% for i in 'abcd' %}{% if i == 'b' %}{% continue %}{% elif i == 'd' %}{% break %}{% endif %}{{ i }}{% endfor %}",  # noqa: E501
        "ac",
    ),
    (
        "{{ tools is none }}{{ documents is none }}{{ add_generation_prompt }}{{ tools is defined }}",
        "TrueTrueTrueTrue",
    ),
    (
        "{{ bos_token }}{{ eos_token }}{{ unk_token }}|{{ call }}|{{ nothing }}{{ nothing is defined }}",
        "<s></s>|<c>|False",
    ),
    (
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
        "1",
    ),
    (
        "{{ (messages | selectattr('role', 'equalto', 'user') | list)[0].content | trim }}{{ loop }}",
        "U",
    ),
    (
        "{{ {'b': 1} | tojson(indent=4) }}{% for k, v in messages[0].items() %}{{ k }}{% endfor %}",
        '{\n    "b": 1\n}rolecontent',
    ),
    (
        "{% if messages[0].content is string %}{{ messages[0]['content'] }}{% else %}parts{% endif %}",
        " U ",
    ),
    ("{% macro m(x) %}<{{ x }}>{% endmacro %}{{ m(messages[-1]['content']) }}", "< U >"),
    (
        "  {% if true %}\n  x\r\n  {%- endif %}\n{{ messages[0].content.strip().split('U') }}\n",
        "  x['', '']",
    ),
]


@pytest.mark.parametrize("template, text", TEMPLATES)
def test_what_a_template_can_use(tmp_path, template, text):
    config = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "chat_template": template,
        "extra_special_tokens": {"call": "<c>"},
    }
    folder = make_folder(tmp_path, config=config)
    assert load_tokenizer(folder).chat("", " U ") == text
    if other := theirs(folder):
        messages = [{"role": "user", "content": " U "}]
        assert (
            other.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == text
        )


def test_where_a_template_is_found(tmp_path):
    """A file of its own goes before tokenizer_config.json, and in a list or an object the default is meant."""
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "list"}]
    for template in named, {"tool_use": "t", "default": "list"}, "list":
        folder = make_folder(tmp_path / "a", config={"chat_template": template})
        assert check_as_in_transformers(folder).chat("", "U") == "list"
    (folder / "chat_template.jinja").write_text("file")
    assert check_as_in_transformers(folder).chat("", "U") == "file"
    (folder / "additional_chat_templates").mkdir()
    for name in "tool_use", "default":
        (folder / "additional_chat_templates" / f"{name}.jinja").write_text(name)
        assert (
            check_as_in_transformers(folder).chat("", "U")
            == {"tool_use": "file", "default": "default"}[name]
        )


@pytest.mark.parametrize(
    "template, complaint",
    [
        ([{"name": "rag", "template": "x"}], "no chat template named default, only rag"),
        ([], "only an empty list"),
        (["x"], "no chat template named default"),
        (5, "chat_template.default is 5, expected a string"),
        ([{"name": "default"}], "chat_template.default is None"),
        ("{% generation %}", "is not a Jinja template"),
        ("{% endgeneration %}", "is not a Jinja template"),
    ],
)
def test_templates_that_cannot_be(tmp_path, template, complaint):
    with pytest.raises(InputError, match="tokenizer_config.json.*" + complaint):
        load_tokenizer(make_folder(tmp_path, config={"chat_template": template}))


def test_the_date_of_a_template_is_that_of_the_run(tmp_path):
    template = (
        "{{ strftime_now is defined }} {{ strftime_now('%d %B %Y, %H:%M') }}"
        "{% macro m() %}{{ strftime_now('%A') }}{% endmacro %}{{ m() }}"
    )
    tokenizer = load_tokenizer(make_folder(tmp_path, config={"chat_template": template}))
    assert tokenizer.chat("", "U") == "True 26 July 2024, 00:00Friday"
    for date in "01 Feb 2025", "1 February 2025", "2025-02-01":
        assert tokenizer.chat("", "U", date) == "True 01 February 2025, 00:00Saturday"
    with pytest.raises(
        InputError, match="asks for the date as '%d %B.*'today' .*give a --date such as 26 Jul 2024"
    ):
        tokenizer.chat("", "U", "today")
    unasked = load_tokenizer(make_folder(tmp_path, config={"chat_template": "{{ date_string }}"}))
    assert unasked.chat("", "U", "today") == "today"


REFUSE = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"  # noqa: E501


@pytest.mark.parametrize(
    "template, text",
    [
        (REFUSE + "<{{ m.role }}>{{ m.content }}{% endfor %}", "<user>S\n\nU"),  # Gemma 2
        (
            "{% if messages[0].role != 'user' %}{{ raise_exception('x') }}{% endif %}{{ messages[0].content }}",
            "S\n\nU",
        ),
        (
            "{{ {'user': 'U'}[messages[0].role] + ':' + messages[0].content }}",
            "U:S\n\nU",
        ),  # a role that it does not know
        (
            "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}",
            "S\n\nU",
        ),  # left out silently
        (
            "{% if messages[0].role == 'system' %}{% set s = messages[0].content %}{% set messages = messages[1:] %}{% endif %}"  # noqa: E501
            "{% for m in messages %}[{{ s if loop.first }}|{{ m.content | trim }}]{% endfor %}",
            "[S|U]",
        ),
    ],
)  # Gemma 3, Llama 2
def test_a_system_message_that_a_template_does_not_take(tmp_path, template, text):
    assert (
        load_tokenizer(make_folder(tmp_path, config={"chat_template": template})).chat("S", "U")
        == text
    )


def test_a_fault_in_a_template_is_not_taken_for_a_refusal(tmp_path):
    template = (
        "{% if messages[0].role == 'system' %}{{ 1 / 0 }}{% endif %}{{ messages[-1].content }}"
    )
    tokenizer = load_tokenizer(make_folder(tmp_path, config={"chat_template": template}))
    assert tokenizer.chat("", "U") == "U"
    with pytest.raises(InputError, match="division by zero"):
        tokenizer.chat("S", "U")
