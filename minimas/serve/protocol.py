"""The protocol: the body of a request becomes questions and settings, and what is written becomes a response.

It is that of chat completions and completions, as many servers speak it, with fields of our own (`FIELDS`).

    {"model": "tiny", "messages": [{"role": "user", "content": "7 +5 *3"}], "rounds": 2}
"""

import json
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..common import JSON_TYPES, InputError, is_number
from ..prompts import Question
from ..settings import CompletedSettings, Settings, hears_others
from ..styles import REWRITES, Style
from ..system import System
from ..tokenizer import Tokenizer

MAX_TEXTS = 128  # of a request
MAX_TRACES = 16  # texts of a request whose traces are wanted, and pages that are kept
MAX_STOPS = 16
MAX_STOP = 256  # characters of a stop string


class Field(NamedTuple):
    """A field of a body that chooses a setting: its types, and for some numbers the range."""

    setting: str
    types: tuple[type, ...]
    allowed: range | None = None


TOKENS = range(1, 32768 + 1)
FIELDS = {
    "temperature": Field("temperature", (int, float)),
    "top_p": Field("top_p", (int, float)),
    "seed": Field("seed", (int,)),
    "n": Field("rollouts", (int,), range(1, MAX_TEXTS + 1)),
    "max_tokens": Field("max_new_tokens", (int,), TOKENS),
    "max_completion_tokens": Field("max_new_tokens", (int,), TOKENS),  # the newer name counts
    # Our own
    "rounds": Field("rounds", (int,), range(1, 64 + 1)),
    "latent_steps": Field("latent_steps", (int,), range(1024 + 1)),
    "channel": Field("channel", (str,)),
    "hear": Field("hear", (str,)),
    "retry": Field("retry", (bool,)),
}
# Characters of a text that are encoded at a time, so that others are served in between
PART = 1 << 14
# Whoever asks for one of these relies on it
REFUSED = ("logprobs", "top_logprobs", "echo", "suffix", "tools", "functions", "response_format")
# Values of theirs that ask for nothing
MEANINGLESS: tuple[object, ...] = (None, False, [], {}, "", {"type": "text"})
WORDS = JSON_TYPES | {float: "a number"}
NO_OTHER = (
    "hear is other, and a request has no question before it: expected own, none, noise or shuffled"
)


class Refused(Exception):
    """A request that gets an error object in place of an answer.

    status  of HTTP
    param   the field that is wrong
    code    a word for programs
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code

    def body(self) -> dict[str, Any]:
        """The protocol's error object."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        if self.status == 429:
            kind = "rate_limit_error"
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


@dataclass(frozen=True)
class Served:
    """A system that is served, and the settings of whoever asks for none."""

    system: System
    settings: Settings


@dataclass(frozen=True)
class Asked:
    """A request that has been checked.

    n        choices for each question
    stop     a text ends before the first of these
    usage    whether a stream ends with the usage
    traced   whether the page of the trace is wanted
    """

    model: str
    questions: list[Question]
    settings: CompletedSettings
    n: int
    stop: tuple[str, ...]
    stream: bool
    usage: bool
    traced: bool
    is_chat: bool
    id: str = field(default_factory=lambda: "minimas-" + secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))


# The request


def read(body: object, served: Mapping[str, Served], is_chat: bool) -> Asked:
    """What the body of a request asks for; Refused if it cannot be answered."""
    if not isinstance(body, dict):
        raise Refused(400, f"the body is {type(body).__name__}, expected a JSON object")
    model = value(body, "model", (str,))
    if model is None:
        raise Refused(400, f"there is no model: give one of {', '.join(served)}", "model")
    style = served_as(model, served).system.style
    for name in REFUSED:
        if asks_for(name, body.get(name), is_chat):
            raise Refused(400, f"{name} is not supported: leave it out", name)
    try:
        settings = settings_in(body, served[model].settings, style)
        questions = [question_in(body, style)] if is_chat else questions_in(body, style)
    except InputError as e:
        raise Refused(400, str(e)) from e
    if hears_others(settings):
        raise Refused(400, NO_OTHER, "hear")
    n = value(body, "n", (int,), 1)
    texts = n * len(questions)
    if texts > MAX_TEXTS:
        raise Refused(400, f"{texts} texts are asked for, expected at most {MAX_TEXTS}")
    for question in questions:
        check_length(question, served[model].system, "messages" if is_chat else "prompt")
    options = value(body, "stream_options", (dict,), {})
    return Asked(
        model,
        questions,
        settings,
        n,
        stop=stops_in(body),
        stream=value(body, "stream", (bool,), False),
        usage=value(options, "include_usage", (bool,), False),
        traced=is_traced(body, settings, texts),
        is_chat=is_chat,
    )


def asks_for(name: str, found: object, is_chat: bool) -> bool:
    """Whether this value of a field of REFUSED asks for something."""
    if name == "logprobs" and not is_chat and is_number(found):
        return True  # 0 asks for those of the chosen tokens
    return found not in MEANINGLESS


def served_as(model: str, served: Mapping[str, Served]) -> Served:
    """What is served under this name; Refused if nothing is."""
    if model not in served:
        message = f"model {model!r:.80} is not served, expected one of {', '.join(served)}"
        raise Refused(404, message, "model", "model_not_found")
    return served[model]


def value(body: dict[str, Any], name: str, types: tuple[type, ...], default: Any = None) -> Any:
    """A field of a body; null is as good as none. Refused if it is of another type."""
    found = body.get(name)
    if found is None:
        return default
    is_bool = isinstance(found, bool)  # which Python takes for a whole number
    if not isinstance(found, types) or (is_bool and bool not in types):
        raise Refused(400, f"{name} is {found!r:.80}, expected {in_words(types)}", name)
    return found


def in_words(types: tuple[type, ...]) -> str:
    """The types of a field, for a message. A whole number is a number."""
    named = [one for one in types if one is not int or float not in types]
    return " or ".join(WORDS[one] for one in named)


def settings_in(body: dict[str, Any], settings: Settings, style: Style) -> CompletedSettings:
    """The Settings that a body asks for; InputError or Refused if they are out of range."""
    chosen = dict(vars(settings))
    for name, (setting, types, allowed) in FIELDS.items():
        found = value(body, name, types)
        if found is None:
            continue
        if allowed is not None and found not in allowed:
            message = f"{name} is {found!r:.80}, expected {allowed[0]} to {allowed[-1]}"
            raise Refused(400, message, name)
        chosen[setting] = found
    return Settings(**chosen).completed(style)


def is_traced(body: dict[str, Any], settings: CompletedSettings, texts: int) -> bool:
    """Whether the traces of this many texts are wanted; Refused if there can be none of them."""
    traced = value(body, "trace", (bool,), False)
    if traced and settings.channel == "text":
        raise Refused(400, "a trace shows latents, and on the text channel there are none", "trace")
    if traced and texts > MAX_TRACES:
        message = f"traces of {texts} texts are asked for, expected at most {MAX_TRACES}"
        raise Refused(400, message, "trace")
    return traced


def stops_in(body: dict[str, Any]) -> tuple[str, ...]:
    """The stop strings, without those that are empty; Refused if there are too many, or if one is too long."""
    stops = tuple(stop for stop in strings_in(body, "stop") if stop)
    if len(stops) > MAX_STOPS:
        raise Refused(400, f"stop has {len(stops)} strings, expected at most {MAX_STOPS}", "stop")
    longest = max(map(len, stops), default=0)
    if longest > MAX_STOP:
        message = f"a stop string has {longest} characters, expected at most {MAX_STOP}: shorten it"
        raise Refused(400, message, "stop")
    return stops


def strings_in(body: dict[str, Any], name: str) -> list[str]:
    """A field that is a string or a list of strings."""
    found = value(body, name, (list, str), [])
    strings = [found] if isinstance(found, str) else found
    if not all(isinstance(one, str) for one in strings):
        message = f"{name} is {found!r:.80}, expected a string or a list of strings"
        raise Refused(400, message, name)
    return strings


def questions_in(body: dict[str, Any], style: Style) -> list[Question]:
    """The Questions of the field `prompt`."""
    prompts = strings_in(body, "prompt")
    if not prompts:
        raise Refused(400, "there is no prompt: give a string or a list of strings", "prompt")
    return style.questions(prompts)


def question_in(body: dict[str, Any], style: Style) -> Question:
    """The Question of a conversation: its last user message, after the turns before it.

    System messages go to the agent that answers. A style that rewrites questions can read nothing but a question.
    """
    turns: list[tuple[str, str]] = []  # (user or assistant, text)
    system: list[str] = []
    for message in value(body, "messages", (list,), []):
        role, text = role_and_text(message)
        if role in ("user", "assistant"):
            turns.append((role, text))
        elif text.strip():
            system.append(text)
    while turns and turns[-1][0] != "user":
        turns.pop()
    if not turns:
        raise Refused(400, "messages have none of a user: add the question", "messages")
    *earlier, (_, asked) = turns
    (question,) = style.questions([asked])
    if style.paradigm in REWRITES:
        return question
    text = question.text
    if earlier:
        said = "\n\n".join(f"{role.capitalize()}: {content}" for role, content in earlier)
        text = f"The conversation so far:\n\n{said}\n\nThe question now:\n\n{text}"
    return Question(text, typed=asked, system="\n\n".join(system))


def role_and_text(message: object) -> tuple[str, str]:
    """Who says a message and what, which may be in parts."""
    if not isinstance(message, dict):
        raise Refused(400, f"a message is {message!r:.80}, expected an object", "messages")
    role = value(message, "role", (str,))
    if role not in ("system", "developer", "user", "assistant"):
        known = "system, developer, user or assistant"
        message = f"the role of a message is {role!r:.80}, expected {known}"
        raise Refused(400, message, "messages")
    content = value(message, "content", (list, str), "")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    text = ""
    for part in parts:
        is_text = isinstance(part, dict) and part.get("type") == "text"
        if not is_text or not isinstance(part.get("text"), str):
            raise Refused(400, f"a part of a message is {part!r:.80}, expected text", "messages")
        text += part["text"]
    return role, text


def check_length(question: Question, system: System, param: str) -> None:
    """Refused if a question has more tokens than an agent has positions.

    Once a prompt is being read nothing stops that, so whoever asks for too much would hold up all others. What a prompt
    adds to a question is not counted: the chat template, and what others send.
    """
    for role, agent in system.agents.items():
        positions = agent.model.config.positions
        text = question.text
        if role == system.style.order[-1]:
            text = question.system + text
        if positions and is_longer(text, positions, agent.tokenizer):
            message = (
                f"the question, with what was said before it, has more tokens than the {positions} positions that "
                f"{role} was made for: shorten it"
            )
            raise Refused(400, message, param)


def is_longer(text: str, limit: int, tokenizer: Tokenizer) -> bool:
    """Whether a text has more tokens than the limit. Of a text that is far too long only the beginning is encoded."""
    tokens = 0
    for start in range(0, len(text), PART):
        tokens += len(tokenizer.encode(text[start : start + PART]))
        if tokens > limit:
            return True
    return False


# The response


def response(asked: Asked, choices: Sequence[dict[str, Any]], usage: dict[str, Any]) -> dict:
    """The whole response; `choices` in the form of `choice`."""
    return head(asked) | {"choices": list(choices), "usage": usage}


def choice(
    asked: Asked, index: int, text: str, reason: str, extra: dict[str, Any]
) -> dict[str, Any]:
    """A text of a response. `extra` is what minimas says of it besides."""
    said: dict[str, Any] = {"text": text}
    if asked.is_chat:
        said = {"message": {"role": "assistant", "content": text, "refusal": None}}
    return {"index": index, **said, "logprobs": None, "finish_reason": reason, "minimas": extra}


def first_event(asked: Asked, index: int) -> str:
    """What the events of a choice begin with in a chat."""
    return chunk(asked, index, {"delta": {"role": "assistant", "content": ""}})


def text_event(asked: Asked, index: int, text: str) -> str:
    """The event of a choice's new text."""
    return chunk(asked, index, {"delta": {"content": text}} if asked.is_chat else {"text": text})


def end_event(asked: Asked, index: int, reason: str, extra: dict[str, Any]) -> str:
    """The event of a choice that is complete."""
    said: dict[str, Any] = {"delta": {}} if asked.is_chat else {"text": ""}
    return chunk(asked, index, said, finish_reason=reason, minimas=extra)


def last_event(asked: Asked, usage: dict[str, Any]) -> str:
    """What ends a stream."""
    counted = head(asked, ".chunk") | {"choices": [], "usage": usage}
    return (event(counted) if asked.usage else "") + "data: [DONE]\n\n"


def chunk(asked: Asked, index: int, said: dict[str, Any], **more: Any) -> str:
    """An event that says something of one choice."""
    one = {"index": index, **said, "logprobs": None, "finish_reason": None, **more}
    usage = {"usage": None} if asked.usage else {}
    return event(head(asked, ".chunk") | {"choices": [one]} | usage)


def head(asked: Asked, part: str = "") -> dict[str, Any]:
    """What every object of a response begins with; `part` is .chunk in an event of a stream."""
    name = f"chat.completion{part}" if asked.is_chat else "text_completion"
    return {"id": asked.id, "object": name, "created": asked.created, "model": asked.model}


def event(data: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


def usage(prompt: int, read: int, written: int, thought: int, intermediate: int) -> dict[str, Any]:
    """The usage of a request, all its texts together.

    prompt, read    tokens, and latents in the slots, of the prompt after which the last agent wrote
    written         tokens that it wrote
    thought         latents that all agents thought
    intermediate    tokens that agents wrote for one another
    """
    return {
        "prompt_tokens": prompt,
        "completion_tokens": written,
        "total_tokens": prompt + written,
        "prompt_tokens_details": {"latents": read},
        "completion_tokens_details": {"latents": thought, "intermediate_tokens": intermediate},
    }
