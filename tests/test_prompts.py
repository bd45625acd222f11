import hashlib
import json

import checkpoints
import pytest

from minimas import InputError
from minimas.prompts import PROMPTS, Question, Slot, prompt, wrap
from minimas.tokenizer import load_tokenizer


def text(family, role, question, task="math", heard=False, fn_name="", dataset=None):
    """A prompt's user message with its slots shown as <role>."""
    pieces = prompt(family, role, Question(question, fn_name, dataset), task, heard)[1]
    return "".join(f"<{p.role}>" if isinstance(p, Slot) else p for p in pieces)


def test_strings_are_the_released_ones():
    """Byte for byte: the digest was taken of the strings that the released links were trained with."""
    released = json.dumps(
        {name: part for name, part in PROMPTS.items() if name != "tiny"}, sort_keys=True
    )
    assert hashlib.sha256(released.encode()).hexdigest() == (
        "c2427a8db4e05a2e8c55dddb1dc6232ac21bb498257866e9ab5d8ecd863d8ac0"
    )


def test_sequential_whole():
    assert text("sequential", "planner", "1 + 1?") == (
        "You are a planner agent in a multi-agent system.\nGive a plan for the question below.\nQuestion:\n1 + 1?\n"
        "Your response should be in the format of:\nStep 1: ...\n...\nStep n: ..."
    )
    assert text("sequential", "solver", "1 + 1?") == (
        "You are a solver agent in a multi-agent system.\nHere is the refined plan:\nRefined Plan:\n<critic>\n"
        "The question is:\nQuestion:\n1 + 1?\n\n"
        "Solve the question given information and put the final answer inside \\boxed{}, for example \\boxed{1}."
    )
    assert (
        "This is round 2.\nQuestion:\nq\nFeedback signal from the previous solver round:\n<solver>\n"
        in text("sequential", "planner", "q", heard=True)
    )
    assert "later recursive round.\nWrite a complete program" in text(
        "sequential", "planner", "q", "code", heard=True
    )


def test_final_follows_task_and_options():
    letter, number = "for example \\boxed{A}.", "for example \\boxed{1}."
    for options in "A) 1\nB) 2", "x\na. 1", "D: 4", "C- 3", "x\n  B. 2", "A ) 1", "A.\n1":
        assert text("sequential", "solver", options).endswith(letter) and text(
            "distillation", "learner", options
        ).endswith(letter)
    for none in "A cat", "E. 5", "A)1", "x A) 1", "AB. 2":
        assert text("sequential", "solver", none, "choice").endswith(number) and text(
            "mixture", "summarizer", none
        ).endswith(number)
    assert text("mixture", "summarizer", "A cat", "choice").endswith(letter)
    assert text("sequential", "solver", "q", "code").endswith(
        r"for example ```python\n<your solution code>\n```."
    )


def test_gpqa_has_a_solver_prompt_of_its_own():
    options = "q\nA. 1\nB. 2"
    assert text("sequential", "solver", options, "choice", dataset="gpqa") == (
        "You are a solver agent in a multi-agent system.\nHere is the refined plan:\nRefined Plan:\n<critic>\n"
        f"The question is:\nQuestion:\n{options}\n"
        "Final Choice: put only the option letter in \\boxed{}, e.g., \\boxed{A}."
    )
    others = (
        ("sequential", "planner", True),
        ("sequential", "planner", False),
        ("sequential", "critic", False),
        ("mixture", "summarizer", False),
    )
    for family, role, heard in others:
        assert text(family, role, options, "choice", heard, dataset="gpqa") == text(
            family, role, options, "choice", heard
        )
    assert text("sequential", "solver", options, "choice", dataset="medqa") == text(
        "sequential", "solver", options, "choice"
    )


def test_context():
    assert "\nQuestion:\nq\n\nChoose the correct option (A/B/C/D).\nProvide" in text(
        "distillation", "expert", "q \n", "choice"
    )
    assert "\nQuestion:\nCHOOSE the correct Option\nProvide" in text(
        "distillation", "expert", "CHOOSE the correct Option\n", "choice"
    )
    assert "\nQuestion:\nq \n\nProvide" in text("distillation", "expert", "q \n")


@pytest.mark.parametrize(
    "fn_name, sentence",
    [
        ("f", "Implement and return the function `f` only."),
        ("", "Write a complete program that reads"),
        (None, "Implement and return the required function only."),
    ],
)
def test_interface(fn_name, sentence):
    for family, role in (
        ("sequential", "critic"),
        ("mixture", "code"),
        ("deliberation", "reflector"),
    ):
        assert sentence in text(family, role, "q", "code", fn_name=fn_name)


def test_what_was_filled_in_stays_as_typed():
    """A question that looks like a field, a slot or a mark is none of them."""
    question = "{critic} {question} {final} {fn_name} [slot 0] [slot 1] [slot"
    assert question in text("sequential", "solver", question)
    assert "function `{question}` only" in text(
        "sequential", "solver", "q", "code", fn_name="{question}"
    )


LOOKS_LIKE_A_SLOT = "{critic} {question} {final} [slot 0] [slot 1] <critic> [slot"


@pytest.mark.parametrize("place", ["system", "question", "both"])
@pytest.mark.parametrize("model_type", ["qwen3", "mistral"])  # Mistral's template has one message
def test_a_text_that_looks_like_a_slot_is_none(tmp_path, model_type, place):
    """In the rendered prompt there are the slots of the template, and every other text as it was typed."""
    tokenizer = load_tokenizer(checkpoints.make_agent(tmp_path, model_type))
    question = "q" if place == "system" else LOOKS_LIKE_A_SLOT
    system = "S" if place == "question" else LOOKS_LIKE_A_SLOT
    _, pieces = prompt("sequential", "solver", Question(question), "math", False)
    wrapped = wrap(tokenizer, system, pieces, "")
    assert [piece for piece in wrapped if isinstance(piece, Slot)] == [Slot("critic")]
    before, _, after = wrapped
    assert system in before and question in after


def test_texts_that_make_up_a_mark_together(tmp_path):
    """A question between the brackets of a prompt of one's own."""
    tokenizer = load_tokenizer(checkpoints.make_agent(tmp_path, "qwen2"))
    own = {"writer": "[slot {question}] {thinker}"}
    system, pieces = prompt(own, "writer", Question("0"), "math", False)
    before, slot, _ = wrap(tokenizer, system, pieces, "")
    assert before.endswith("[slot 0] ") and slot == Slot("thinker")


def test_a_system_text_is_filled_in():
    """It may have the fields that a prompt may have, but no slot."""
    own = {"system": "You are asked {question}. {final} {interface}", "writer": "{question}"}
    question = Question("{final}", fn_name="f")
    system, _ = prompt(own, "writer", question, "code", False)
    assert system == (
        f"You are asked {{final}}. {PROMPTS['final']['code']} "
        "Implement and return the function `f` only."
    )
    with pytest.raises(InputError, match="the system text has a slot for thinker"):
        prompt(own | {"system": "{thinker}"}, "writer", question, "code", False)


@pytest.mark.parametrize(
    "model_type, expected",
    [
        (
            "qwen3",
            "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        ),
        (
            "qwen2",
            "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            "llama",
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2024\n\nS<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nU<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
    ],
)
def test_chat(tmp_path, model_type, expected):
    tokenizer = load_tokenizer(checkpoints.make_agent(tmp_path, model_type))
    assert tokenizer.chat("S", "U") == expected
    before, after = expected.split("U<")
    pieces = ["[slot 0", Slot("critic"), "]", Slot("critic"), "[slot 1]"]
    assert wrap(tokenizer, "S", pieces, "26 Jul 2024") == [
        before + "[slot 0",
        Slot("critic"),
        "]",
        Slot("critic"),
        "[slot 1]<" + after,
    ]


def with_template(folder, template):
    checkpoints.make_agent(folder, "qwen2")
    (folder / "chat_template.jinja").write_text(template)
    return load_tokenizer(folder)


def test_template_that_refuses_a_system_role(tmp_path):
    tokenizer = with_template(
        tmp_path,
        """{{ bos_token }}{% for m in messages %}\
{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}\
[INST] {{ m.content }} [/INST]{% endfor %}""",
    )
    assert tokenizer.chat("S", "U") == "<|endoftext|>[INST] S\n\nU [/INST]"


@pytest.mark.parametrize(
    "template, complaint",
    [
        ("{{ raise_exception('no') }}", "no"),
        ("{{ messages.__class__.__mro__ }}", "template"),
        ("{% for m in messages %}", "chat_template.jinja"),
        ("{{ messages.clear() }}", "template"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ 'a' + 1 }}", "str"),
        ("{% include 'x' %}", "no loader"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "Range too big"),
        ("{{ 'a' * 10 ** 18 }}", "MemoryError|OverflowError"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
        ("{{ 10 ** 5000 }}", "chat_template.jinja.*4300"),
        ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "chat_template.jinja"),
        ("", "blank"),
        (" {{ '\\n' }}", "blank"),
        ("{{ '\\ud800' }}", "a lone surrogate"),
        ("{{ raise_exception('a\\nb') }}", "a"),
    ],
)
def test_templates_that_fail_or_reach_out(tmp_path, template, complaint):
    with pytest.raises(InputError, match=complaint) as told:
        with_template(tmp_path, template).chat("S", "U")
    assert "\n" not in str(told.value)


def test_tojson_is_that_of_transformers(tmp_path):
    template = (
        "{{ {'b': 'é<', 'a': [1]} | tojson }}{{ 'é' | tojson(ensure_ascii=True) }}{{ 'é' | tojson(True) }}"
        "{{ {'b': 1, 'a': 2} | tojson(indent=1, separators=(';', '='), sort_keys=True) }}"
    )
    assert with_template(tmp_path, template).chat("S", "U") == (
        '{"b": "é<", "a": [1]}"\\u00e9""\\u00e9"{\n "a"=2;\n "b"=1\n}'
    )


@pytest.mark.parametrize(
    "template",
    [
        "hello",
        "{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}",
    ],
)
def test_a_template_that_leaves_out_the_user_message(tmp_path, template):
    """The second one takes lists of parts only: of a text it shows nothing."""
    for pieces in [Slot("critic")], ["U"]:
        with pytest.raises(InputError, match="leaves out the user message"):
            wrap(with_template(tmp_path, template), "S", pieces, "")


def test_a_template_that_fails(tmp_path):
    """It fails when it is asked which roles it shows, before a message is rendered."""
    tokenizer = with_template(tmp_path, "{{ messages[0]['content'] + 1 }}")
    with pytest.raises(InputError, match="the chat template refuses .*: can only concatenate str"):
        wrap(tokenizer, "S", ["U"], "")


def test_a_template_that_repeats_the_user_message(tmp_path):
    with pytest.raises(InputError, match="shows the user message's 1 slot.* 2 times"):
        wrap(with_template(tmp_path, "{{ messages[0].content * 2 }}"), "", [Slot("a")], "")
