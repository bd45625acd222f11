"""The server: it speaks the protocol, answers as System.run does, refuses what it must, and drains when it ends."""

import asyncio
import itertools
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from shared import load

import minimas
from minimas.agent import Agent
from minimas.common import InputError
from minimas.serve.protocol import MAX_STOP, Refused, Served, is_longer, question_in, read
from minimas.settings import Settings
from minimas.styles import STYLES, Origin

starlette = pytest.importorskip("starlette", reason="needs the extra serve")
pytest.importorskip("uvicorn", reason="needs the extra serve")
pytest.importorskip("httpx", reason="needs the extra clients")

import uvicorn
from serving import running
from starlette.testclient import TestClient

from minimas.generate import Batch
from minimas.runs import needs
from minimas.serve import app as app_module
from minimas.serve.__main__ import listener, main
from minimas.serve.app import LOOPBACK, App, Server, events_from, serve_on
from minimas.serve.batches import Batches
from minimas.serve.job import Job, Text

CHAINS = ["7 +5 *3 -4 +8 *7 -1 +6", "1 +1 *3", "3 *7 *9", "2 *9 +4 *3 -5"]
URL = "http://127.0.0.1:8000"
JSON = {"content-type": "application/json"}
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def tiny():
    return minimas.load_mas_system("tiny", device="cpu", fast=True)


def client_of(system, batch_size=8, wait=0.0, limit=64, **options):
    served = {"tiny": Served(system, Settings(batch_size=batch_size))}
    batches = Batches(served, batch_size, wait, limit)
    app = App(batches, **{"hosts": LOOPBACK} | options)
    return TestClient(app.starlette(), base_url=URL, raise_server_exceptions=False), batches


@pytest.fixture(scope="module")
def client(tiny):
    made, _ = client_of(tiny)
    with made:
        yield made


def body(question=CHAINS[0], **more):
    return {"model": "tiny", "messages": [{"role": "user", "content": question}]} | more


def error_of(response, status):
    """The error object of a response: it has this status, and no traceback."""
    assert response.status_code == status, response.text
    assert response.json().keys() == {"error"} and "Traceback" not in response.text
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"} and error["message"]
    return error


def events(response):
    """The objects of a stream, which ends as the protocol says."""
    assert response.headers["content-type"].startswith("text/event-stream"), response.text
    *parts, done, rest = response.text.split("\n\n")
    assert done == "data: [DONE]" and rest == ""
    return [json.loads(part.removeprefix("data: ")) for part in parts]


# Answers


def test_models(client):
    (model,) = client.get("/v1/models").json()["data"]
    assert model["id"] == "tiny" and model["object"] == "model"
    assert client.get("/v1/models/tiny").json() == model
    assert error_of(client.get("/v1/models/other"), 404)["code"] == "model_not_found"


def test_a_chat_is_answered_as_by_run(client, tiny):
    (expected,) = tiny.run([CHAINS[0]])
    answer = client.post(CHAT, json=body()).json()
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": expected.text, "refusal": None}
    assert choice["finish_reason"] == "stop" and choice["index"] == 0
    assert choice["minimas"] == {"answer": "5", "rounds": 3, "retried": False}
    assert answer["object"] == "chat.completion" and answer["model"] == "tiny"


def test_usage(client, tiny):
    """Prompt tokens are those of the last agent, without its latents: eight turns think five each."""
    (expected,) = tiny.run([CHAINS[0]], keep_states=True)
    *_, pieces = expected.prompts.values()
    tokens = tiny.agents["solver"].tokens(pieces)
    text = sum(len(piece) for piece in tokens if not piece.is_floating_point())
    usage = client.post(CHAT, json=body()).json()["usage"]
    assert usage == {
        "prompt_tokens": text,
        "completion_tokens": expected.new_tokens,
        "total_tokens": text + expected.new_tokens,
        "prompt_tokens_details": {"latents": 5},
        "completion_tokens_details": {"latents": 40, "intermediate_tokens": 0},
    }
    (spoken,) = tiny.run([CHAINS[0]], channel="text", rounds=2)
    usage = client.post(CHAT, json=body(channel="text", rounds=2)).json()["usage"]
    details = {"latents": 0, "intermediate_tokens": spoken.heard_tokens}
    assert usage["completion_tokens_details"] == details and spoken.heard_tokens > 20


def test_a_stream(client, tiny):
    (expected,) = tiny.run([CHAINS[0]])
    options = {"stream": True, "stream_options": {"include_usage": True}}
    first, *others, last, usage = events(client.post(CHAT, json=body(**options)))
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    texts = [event["choices"][0]["delta"]["content"] for event in others]
    assert "".join(texts) == expected.text and len(texts) > 3
    assert last["choices"][0]["finish_reason"] == "stop" and last["choices"][0]["delta"] == {}
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == expected.new_tokens
    assert {event["id"] for event in (first, *others, last, usage)} == {first["id"]}
    without = events(client.post(CHAT, json=body(stream=True)))
    assert all("usage" not in event and event["choices"] for event in without)


def test_several_texts(client, tiny):
    options = {"temperature": 0.9, "seed": 3, "top_p": 0.8}
    expected = tiny.run([CHAINS[0]], rollouts=3, **options)
    answer = client.post(CHAT, json=body(n=3, **options)).json()
    texts = [choice["message"]["content"] for choice in answer["choices"]]
    assert texts == [result.text for result in expected]
    assert answer["usage"]["completion_tokens"] == sum(result.new_tokens for result in expected)
    written = ["", "", ""]
    for event in events(client.post(CHAT, json=body(n=3, stream=True, **options))):
        choice = event["choices"][0]
        written[choice["index"]] += choice["delta"].get("content", "")
    assert written == texts


def test_texts_that_are_all_the_same(client):
    """At temperature 0 one is written, and given as often as it was asked for."""
    first, second = client.post(CHAT, json=body(n=2)).json()["choices"]
    assert first["message"] == second["message"] and second["index"] == 1
    one, two = (client.post(CHAT, json=body(n=n)).json()["usage"] for n in (1, 2))
    assert one == two, "what was written once counts once"
    written = ["", ""]
    for event in events(client.post(CHAT, json=body(n=2, stream=True))):
        choice = event["choices"][0]
        written[choice["index"]] += choice["delta"].get("content", "")
    assert written == [first["message"]["content"]] * 2


def test_completions(client, tiny):
    expected = [result.text for result in tiny.run(CHAINS[:2])]
    answer = client.post(COMPLETIONS, json={"model": "tiny", "prompt": CHAINS[:2]}).json()
    assert [choice["text"] for choice in answer["choices"]] == expected
    assert answer["object"] == "text_completion"
    one = {"model": "tiny", "prompt": CHAINS[1], "stream": True}
    streamed = events(client.post(COMPLETIONS, json=one))
    assert "".join(event["choices"][0]["text"] for event in streamed) == expected[1]


@pytest.mark.parametrize("stream", (False, True))
@pytest.mark.parametrize(
    "stop, text", [("6", "g+"), (["nothing", "}", "5"], "g+6\\boxed{"), ("{5}x", "g+6\\boxed{5}")]
)
def test_a_stop_string(client, stop, text, stream):
    """The text ends before it, nobody sees a part of it, and no answer is asked for after it."""
    response = client.post(CHAT, json=body(stop=stop, stream=stream))
    if stream:
        choices = [event["choices"][0] for event in events(response)]
        found = "".join(choice["delta"].get("content", "") for choice in choices)
    else:
        choices = response.json()["choices"]
        found = choices[0]["message"]["content"]
    assert found == text and choices[-1]["finish_reason"] == "stop"
    assert not choices[-1]["minimas"]["retried"]
    assert choices[-1]["minimas"]["answer"] == ("5" if "}" in text else None)


def test_stop_strings_in_pieces():
    text = Text(["END", "NO"])
    assert [text.add(new, False) for new in ("a", "E", "N", "N", "EN")] == ["a", "", "", "EN", "N"]
    assert text.add("D", False) == "" and text.stopped and text.text == "aENN"
    for stops in (["abab", "ba"], ["aab"], ["bbbb", "a"]):
        for whole in itertools.product("ab", repeat=6):
            found = Text(stops)
            shown = "".join(found.add(new, False) for new in whole) + found.add("", True)
            text = "".join(whole)
            beginnings = [text[:n] for n in range(7)]
            stopped = [one for one in beginnings if any(stop in one for stop in stops)]
            first = stopped[0] if stopped else text  # when a stop string is complete
            ends = [first.find(stop) for stop in stops if stop in first]
            assert shown == text[: min(ends, default=6)], (stops, text)
    kept = Text(["END"])
    assert kept.add("aEN", False) == "a" and kept.add("", True) == "EN"


def test_a_text_that_is_cut(client, tiny):
    (expected,) = tiny.run([CHAINS[0]], max_new_tokens=2, retry=False)
    for name in ("max_tokens", "max_completion_tokens"):
        answer = client.post(CHAT, json=body(retry=False, **{name: 2})).json()
        (choice,) = answer["choices"]
        assert choice["message"]["content"] == expected.text
        assert choice["finish_reason"] == "length" and answer["usage"]["completion_tokens"] == 2


def test_a_text_that_was_asked_for_an_answer(folders):
    """Miniatures never write one."""
    system = load(folders, "sequential_light")
    options = {"rounds": 1, "latent_steps": 2, "temperature": 0.9}
    (expected,) = system.run(["How much?"], max_new_tokens=12, **options)
    first = system.run(["How much?"], max_new_tokens=2, retry=False, **options)[0].text
    made, _ = client_of(system)
    with made:
        answer = made.post(CHAT, json=body("How much?", max_tokens=12, **options)).json()
        stopped = made.post(CHAT, json=body("How much?", max_tokens=2, stop=first[-1], **options))
        streamed = events(
            made.post(CHAT, json=body("How much?", max_tokens=12, stream=True, **options))
        )
    (choice,) = answer["choices"]
    texts = [event["choices"][0]["delta"].get("content", "") for event in streamed]
    assert expected.retried and choice["minimas"]["retried"] and len(texts) > 4
    (one,) = stopped.json()["choices"]
    assert one["message"]["content"] == first[: first.index(first[-1])]
    assert not one["minimas"]["retried"], "a text that is stopped by its last token is complete"
    assert choice["message"]["content"] == "".join(texts) == expected.text
    assert answer["usage"]["completion_tokens"] == expected.new_tokens


def test_fields_of_our_own(client, tiny):
    for options in ({"rounds": 1}, {"latent_steps": 1}, {"channel": "text", "rounds": 2}):
        (expected,) = tiny.run([CHAINS[0]], **options)
        (choice,) = client.post(CHAT, json=body(**options)).json()["choices"]
        assert choice["message"]["content"] == expected.text
        assert choice["minimas"]["rounds"] == expected.rounds


def test_what_others_send_is_ignored(client):
    more = {"user": "me", "presence_penalty": 0.5, "metadata": {}, "temperature": None, "tools": []}
    assert client.post(CHAT, json=body(**more)).status_code == 200


def test_the_trace_of_an_answer(client):
    (choice,) = client.post(CHAT, json=body(trace=True)).json()["choices"]
    page = client.get(choice["minimas"]["trace"])
    assert page.headers["content-type"].startswith("text/html")
    assert CHAINS[0] in page.text and "What planner, critic, solver thought" in page.text
    streamed = events(client.post(CHAT, json=body(trace=True, stream=True)))
    path = streamed[-1]["choices"][0]["minimas"]["trace"]
    assert client.get(path).status_code == 200
    error_of(client.get("/traces/none"), 404)
    error_of(client.post(CHAT, json=body(trace=True, channel="text")), 400)


def test_the_page(client):
    page = client.get("/")
    assert page.status_code == 200 and "<form" in page.text
    assert not re.search(r"(src|href)=\"(?!data:)", page.text), "it fetches nothing from elsewhere"


# Conversations


def test_a_conversation(folders):
    """The last question of the user, after what was said; system messages are for the agent that answers."""
    system = load(folders, "sequential_light")
    served = {"light": Served(system, Settings())}
    said = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": None},
        {"role": "assistant", "content": "Hi"},
        {"role": "developer", "content": [{"type": "text", "text": "Be kind."}]},
        {"role": "user", "content": [{"type": "text", "text": "How "}, {"type": "text", "text": "much?"}]},
        {"role": "assistant", "content": "left out"},
    ]  # fmt: skip
    (question,) = read({"model": "light", "messages": said}, served, True).questions
    assert question.system == "Be brief.\n\nBe kind." and question.typed == "How much?"
    assert question.text == (
        "The conversation so far:\n\nUser: Hello\n\nAssistant: \n\nAssistant: Hi\n\n"
        "The question now:\n\nHow much?"
    )
    (alone,) = read({"model": "light", "messages": said[1:2]}, served, True).questions
    assert alone == system.style.question("Hello")
    texts = {}
    for role in system.style.order:
        inbox = {edge: ["heard"] for edge in system.style.edges}
        (prompt,) = system.prompts_for(role, [question], inbox)
        texts[role] = "".join(prompt)
    assert {role for role, text in texts.items() if "Be brief.\n\nBe kind." in text} == {"solver"}
    assert all("How much?" in text for text in texts.values())


def test_options_of_an_earlier_question_are_not_those_of_the_last(folders):
    system = load(folders, "sequential_light")
    said = [{"role": "user", "content": "Which?\nA. one\nB. two"}]
    said.append({"role": "assistant", "content": "A"})
    said.append({"role": "user", "content": "What is 3+4?"})
    question = question_in({"messages": said}, system.style)
    alone = system.style.question("What is 3+4?")
    ends = []
    for asked in (question, alone, system.style.question(said[0]["content"])):
        (prompt,) = system.prompts_for(
            "solver", [asked], {edge: ["x"] for edge in system.style.edges}
        )
        ends.append("".join(prompt).rpartition("?")[2])
    assert ends[0] == ends[1] != ends[2]


def test_the_tiny_system_reads_the_last_question_only(tiny):
    said = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    said.append({"role": "user", "content": CHAINS[1]})
    assert question_in({"messages": said}, tiny.style) == tiny.style.question(CHAINS[1])


# Batches


def test_requests_that_arrive_together_are_one_batch(tiny, monkeypatch):
    """Each is answered as alone, and with those that agree with it in all that is chosen for a batch."""
    made, _ = client_of(tiny, batch_size=4, wait=20)
    batches, write = [], tiny.write

    def counted(questions, settings, **options):
        batches.append((len(questions), settings.rounds))
        return write(questions, settings, **options)

    monkeypatch.setattr(tiny, "write", counted)
    asked = [body(question, rounds=rounds) for rounds in (3, 2) for question in CHAINS]
    with made, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda one: made.post(CHAT, json=one).json(), asked))
    monkeypatch.undo()
    texts = [answer["choices"][0]["message"]["content"] for answer in answers]
    expected = [
        tiny.run([question], rounds=rounds)[0].text for rounds in (3, 2) for question in CHAINS
    ]
    assert texts == expected and sorted(batches) == [(4, 2), (4, 3)]


class Gate:
    """Holds a system's answers back until it is opened."""

    def __init__(self, system, monkeypatch):
        self.opened = threading.Event()
        self.asked = []
        write = system.write

        def held(questions, settings, **options):
            self.asked.append([question.typed for question in questions])
            assert self.opened.wait(20)
            return write(questions, settings, **options)

        monkeypatch.setattr(system, "write", held)

    def wait(self, n):
        """Wait until n batches were begun."""
        late = time.monotonic() + 20
        while len(self.asked) < n and time.monotonic() < late:
            time.sleep(0.005)
        assert len(self.asked) == n


def test_a_full_queue(tiny, monkeypatch):
    made, batches = client_of(tiny, batch_size=1, limit=2)
    gate = Gate(tiny, monkeypatch)
    with made, ThreadPoolExecutor(4) as pool:
        running = pool.submit(made.post, CHAT, json=body())
        gate.wait(1)
        waiting = [pool.submit(made.post, CHAT, json=body(question)) for question in CHAINS[1:3]]
        while len(batches.waiting) < 2:
            time.sleep(0.005)
        refused = made.post(CHAT, json=body())
        assert error_of(refused, 429)["type"] == "rate_limit_error"
        assert refused.headers["retry-after"]
        gate.opened.set()
        assert all(one.result().status_code == 200 for one in (running, *waiting))


def test_what_fails_in_a_batch_fails_alone(tiny, monkeypatch):
    """As an InputError of one question does that is found when prompts are read."""
    made, batches = client_of(tiny, batch_size=3, wait=20)
    prompts_for = tiny.prompts_for

    def picky(role, questions, *args):
        if any(question.typed == CHAINS[1] for question in questions):
            raise InputError("cannot be read")
        return prompts_for(role, questions, *args)

    monkeypatch.setattr(tiny, "prompts_for", picky)
    with made, ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda one: made.post(CHAT, json=body(one)), CHAINS[:3]))
    assert [answer.status_code for answer in answers] == [200, 400, 200]
    assert error_of(answers[1], 400)["message"] == "cannot be read"


def test_what_fails_after_a_text_was_sent_says_nothing_of_others(tiny, monkeypatch):
    """The one that got nothing is answered alone, whichever of them arrived first."""
    made, _ = client_of(tiny, batch_size=2, wait=20)
    write = tiny.write

    def broken(questions, settings, **options):
        for new in write(questions, settings, **options):
            yield new
            streamed = questions[new.question].typed == CHAINS[0]
            if len(questions) > 1 and streamed and new.text:
                raise InputError("a secret")

    monkeypatch.setattr(tiny, "write", broken)
    asked = [body(CHAINS[0], stream=True), body(CHAINS[2])]
    with made, ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda one: made.post(CHAT, json=one), asked)
    last = json.loads(first.text.strip().split("\n\n")[-1].removeprefix("data: "))
    assert last["error"]["type"] == "server_error" and "secret" not in first.text
    assert second.status_code == 200


def test_clients_that_have_left_do_not_fill_the_queue(tiny):
    served = {"tiny": Served(tiny, Settings())}

    async def fill():
        batches = Batches(served, 8, 0, 2)
        jobs = [Job(read(body(), served, True)) for _ in range(3)]
        for job in jobs[:2]:
            batches.add(job)
            job.leave()
        batches.add(jobs[2])
        return batches.waiting == jobs[2:]

    assert asyncio.run(fill())


@pytest.mark.parametrize(
    "fault, status, words",
    [
        (ZeroDivisionError("a secret"), 500, "inside the server"),
        (RuntimeError("CUDA out of memory. Tried"), 503, "out of memory"),
    ],
)
def test_a_fault_of_ours(tiny, monkeypatch, fault, status, words, caplog):
    """Says nothing of its inside, and the server answers on."""
    made, batches = client_of(tiny)

    def fail(*args, **options):
        raise fault

    with made:
        with monkeypatch.context() as patch:
            patch.setattr(tiny, "write", fail)
            error = error_of(made.post(CHAT, json=body()), status)
            assert words in error["message"] and error["type"] == "server_error"
            error_of(made.post(CHAT, json=body(stream=True)), status)
        assert made.post(CHAT, json=body()).status_code == 200


def test_a_fault_in_a_stream(tiny, monkeypatch):
    """After the first text the status is sent already: the error comes as an event."""
    made, _ = client_of(tiny)
    write = tiny.write

    def broken(*args, **options):
        yield next(write(*args, **options))
        raise ZeroDivisionError

    monkeypatch.setattr(tiny, "write", broken)
    with made:
        response = made.post(CHAT, json=body(stream=True))
    last = json.loads(response.text.strip().split("\n\n")[-1].removeprefix("data: "))
    assert response.status_code == 200 and last["error"]["type"] == "server_error"


# What is refused


@pytest.mark.parametrize(
    "change, param",
    [
        ({"model": None}, "model"),
        ({"model": 3}, "model"),
        ({"messages": None}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": ["hello"]}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": ""}]}, None),
        ({"messages": [{"role": "user", "content": "what is love"}]}, None),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": -1}, None),
        ({"temperature": True}, "temperature"),
        ({"temperature": 10**400}, None),
        ({"top_p": 10**400}, None),
        ({"top_p": 0}, None),
        ({"n": 0}, "n"),
        ({"n": 1.5}, "n"),
        ({"n": 1000}, "n"),
        ({"seed": "x"}, "seed"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_tokens": 10**9}, "max_tokens"),
        ({"stop": [1]}, "stop"),
        ({"stop": 1}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": "x" * (MAX_STOP + 1)}, "stop"),
        ({"n": 17, "trace": True}, "trace"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": []}, "stream_options"),
        ({"rounds": 10**6}, "rounds"),
        ({"rounds": 0}, "rounds"),
        ({"latent_steps": -1}, "latent_steps"),
        ({"channel": "radio"}, None),
        ({"hear": "static"}, None),
        ({"hear": "other"}, "hear"),
        ({"logprobs": True}, "logprobs"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_body_that_is_wrong(client, change, param):
    error = error_of(client.post(CHAT, json=body() | change), 400)
    assert error["param"] == param and error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "change, words",
    [
        ({"temperature": "hot"}, "expected a number$"),
        ({"seed": 0.5}, "expected a whole number$"),
        ({"retry": 1}, "expected true or false$"),
        ({"stop": 1}, "expected a list or a string$"),
    ],
    ids=str,
)
def test_all_types_that_are_expected_are_named(client, change, words):
    message = error_of(client.post(CHAT, json=body() | change), 400)["message"]
    assert re.search(words, message), message


def test_what_is_wrong_is_not_repeated_whole(client):
    long = "x" * 100_000
    said = {"messages": [{"role": long, "content": "x"}]}
    for change in (said, {"channel": long}, {"hear": long}, {"rounds": 10**4000}):
        message = error_of(client.post(CHAT, json=body() | change), 400)["message"]
        assert len(message) < 400, message[:100]


def test_log_probabilities_are_refused(client):
    """Of completions even 0 asks for some. In a chat it is no number, and 0 is none."""
    asked = {"model": "tiny", "prompt": CHAINS[1]}
    for n in (0, 1, 5):
        error = error_of(client.post(COMPLETIONS, json=asked | {"logprobs": n}), 400)
        assert error["param"] == "logprobs"
    for nothing in (None, False):
        assert client.post(COMPLETIONS, json=asked | {"logprobs": nothing}).status_code == 200
    assert client.post(CHAT, json=body(top_logprobs=0)).status_code == 200


def test_a_temperature_beyond_64_bits(client, tiny):
    """It is a number like any other: all tokens are then equally likely."""
    (expected,) = tiny.run([CHAINS[0]], temperature=1e39, top_p=1)
    (same,) = tiny.run([CHAINS[0]], temperature=10**39, top_p=1)
    asked = client.post(CHAT, json=body(temperature=10**39, top_p=1))
    (choice,) = asked.json()["choices"]
    assert choice["message"]["content"] == same.text == expected.text
    assert type(Settings(temperature=1, top_p=1).completed(tiny.style).top_p) is float


def single_of():
    """The solver of the tiny system alone, as style single has it: it reads any text."""
    folder = Path(minimas.__file__).parent / "tiny" / "solver"
    return minimas.load_mas_system("single", checkpoints=folder, device="cpu")


def test_a_question_that_is_longer_than_an_agent_can_read():
    """It would be read to its end, and nobody could leave meanwhile."""
    system = single_of()
    (agent,) = system.agents.values()
    assert agent.model.config.max_position_embeddings == 256
    made, _ = client_of(system)
    fits, too_long = "7 " + "+5 " * 80, "7 " + "+5 " * 3000
    assert len(agent.tokenizer.encode(fits)) < 256
    said = [{"role": "user", "content": too_long}, {"role": "user", "content": fits}]
    with made:
        assert made.post(CHAT, json=body(fits, max_tokens=1)).status_code == 200
        for asked in (body(too_long), body() | {"messages": said}):
            error = error_of(made.post(CHAT, json=asked), 400)
            assert "more tokens than the 256 positions that agent was made for" in error["message"]
            assert error["param"] == "messages"
        both = {"model": "tiny", "prompt": [fits, too_long]}
        assert error_of(made.post(COMPLETIONS, json=both), 400)["param"] == "prompt"
        system_message = [{"role": "system", "content": too_long}, *said[1:]]
        error_of(made.post(CHAT, json=body() | {"messages": system_message}), 400)
        agent.model.config.max_position_embeddings = None
        assert made.post(CHAT, json=body(too_long, max_tokens=1)).status_code == 200


def test_a_question_that_an_agent_cannot_embed():
    system = single_of()
    model = system.agents["agent"].model
    model.config = replace(model.config, vocab_size=1)
    made, _ = client_of(system)
    with made:
        error = error_of(made.post(CHAT, json=body()), 400)
        assert "the agent has embeddings for 1:" in error["message"]


def test_a_text_is_longer_than_a_limit(tiny):
    tokenizer = tiny.agents["solver"].tokenizer
    for n in (1, 5, 400):
        text = "7 +5 " * n
        tokens = len(tokenizer.encode(text))
        assert is_longer(text, tokens - 1, tokenizer) and not is_longer(text, tokens, tokenizer)
    assert not is_longer("", 1, tokenizer)


def test_caches_that_do_not_fit(tiny, monkeypatch):
    """A batch that fits neither is answered request by request. Whoever does not fit alone is told so, before work."""
    options = {"temperature": 1.0, "top_p": 1.0, "rounds": 1}
    made, batches = client_of(tiny, batch_size=8, wait=20)
    row = needs.layers_bytes(batches.empty["tiny"]["solver"], 500)
    room = 4 * row
    released = []
    for agent in tiny.agents.values():
        monkeypatch.setattr(agent, "release", lambda: released.append(1))
    monkeypatch.setattr(needs, "available_on", lambda device: room)
    monkeypatch.setattr(Agent, "kept_bytes", lambda agent: 0)
    reads = []
    read_prompts = tiny.agents["solver"].read

    def spied(prompts, room, copies):
        reads.append(len(prompts) * copies)
        return read_prompts(prompts, room, copies)

    monkeypatch.setattr(tiny.agents["solver"], "read", spied)
    asked = [body(one, n=4, max_tokens=500, retry=False, **options) for one in CHAINS[:2]]
    with made, ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda one: made.post(CHAT, json=one), asked))
        assert [answer.status_code for answer in answers] == [200, 200]
        assert reads == [4, 4] and released
        reads.clear()
        for change in ({"n": 8}, {"n": 8, "max_tokens": 251}, {"n": 128, "max_tokens": 32768}):
            error = error_of(made.post(CHAT, json=asked[0] | change), 503)
            assert "the KV cache of solver needs" in error["message"]
            assert f"cpu has {needs.size(room)} available" in error["message"]
            assert error["message"].endswith("(max_tokens), or again later")
        assert not reads


@pytest.mark.parametrize("prompt", ([], "", None, [1], 3, ["7 +5", ""]), ids=str)
def test_a_prompt_that_is_wrong(client, prompt):
    error_of(client.post(COMPLETIONS, json={"model": "tiny", "prompt": prompt}), 400)


@pytest.mark.parametrize(
    "data", (b"", b"{", b"[]", b"\xff", b'"x"', b"null", b'{"model": "\\ud800"}', b"[" * 9999)
)
def test_a_body_that_is_no_object(client, data):
    error_of(client.post(CHAT, content=data, headers=JSON), 400)


def test_an_unknown_model_and_place(client):
    assert error_of(client.post(CHAT, json=body(model="gpt")), 404)["code"] == "model_not_found"
    error_of(client.post("/v1/embeddings", json={}), 404)
    error_of(client.get(CHAT), 405)
    assert client.get(CHAT).headers["allow"] == "POST"


def test_a_body_that_is_too_long(client, monkeypatch):
    monkeypatch.setattr(app_module, "MAX_BODY", 1000)
    error_of(client.post(CHAT, content=b" " * 1001, headers=JSON), 413)
    error_of(client.post(CHAT, content=iter([b" " * 600] * 2), headers=JSON), 413)
    assert client.post(CHAT, json=body()).status_code == 200


def test_a_key(tiny):
    made, _ = client_of(tiny, key="secret")
    with made:
        for headers in ({}, {"authorization": "Bearer no"}, {"authorization": "sécret".encode()}):
            asked = [
                made.get("/v1/models", headers=headers),
                made.get("/traces/x", headers=headers),
            ]
            asked.append(made.post(CHAT, json=body(), headers=headers))
            for response in asked:
                assert error_of(response, 401)["code"] == "invalid_api_key"
        right = {"authorization": "Bearer secret"}
        assert made.post(CHAT, json=body(), headers=right).status_code == 200
        assert made.get("/").status_code == 200, "the page asks for the key"


def test_pages_of_others(tiny, client):
    """A browser sends what they ask without asking us first, unless it is JSON; or by a name that leads here."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", "", "application/jsonp"):
        headers = {"origin": "http://evil.test", "content-type": kind}
        error_of(client.post(CHAT, content=json.dumps(body()), headers=headers), 415)
    error_of(client.post(CHAT, json=body(), headers={"host": "evil.test"}), 403)
    error_of(client.post(CHAT, json=body(), headers={"host": "["}), 400)
    charset = {"content-type": "application/JSON; charset=utf-8", "host": "LOCALHOST:1"}
    response = client.post(CHAT, content=json.dumps(body()), headers=charset)
    assert response.status_code == 200
    assert not [name for name in response.headers if name.startswith("access-control")]
    made, _ = client_of(tiny, origins=["http://chat.test"])
    before = {"access-control-request-method": "POST"}
    before["access-control-request-headers"] = "authorization, content-type"
    with made:
        for server, origin, status in (
            (made, "http://chat.test", 200),
            (made, "http://evil.test", 400),
            (client, "http://chat.test", 405),
        ):
            response = server.options(CHAT, headers=before | {"origin": origin})
            assert response.status_code == status
            allowed = response.headers.get("access-control-allow-origin")
            assert allowed == (origin if status == 200 else None)
        response = made.post(CHAT, json=body(), headers={"origin": "http://chat.test"})
        assert response.headers["access-control-allow-origin"] == "http://chat.test"


@pytest.mark.parametrize("allowed", ["MyServer.local", "myserver.local"])
@pytest.mark.parametrize("asked", ["MyServer.local", "myserver.local:8000"])
def test_the_case_of_a_host_does_not_matter(tiny, allowed, asked):
    made, _ = client_of(tiny, hosts=[*LOOPBACK, allowed])
    with made:
        assert made.get("/v1/models", headers={"host": asked}).status_code == 200
        error = error_of(made.get("/v1/models", headers={"host": "other.local"}), 403)
        assert error["message"].endswith("127.0.0.1, localhost, ::1, myserver.local")


def test_tools_are_for_whoever_starts_the_server():
    """No field of a body chooses them."""
    from minimas.serve.protocol import FIELDS

    chosen = {field.setting for field in FIELDS.values()}
    assert chosen.isdisjoint({"tools", "batch_size", "date"})


# A process


class Process:
    """`python -m minimas.serve` on a free port."""

    def __init__(self, *options, env=None):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "minimas.serve", "--port", "0", *options],
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | (env or {}),
        )
        self.said = self.process.stderr.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+)", self.said)
        assert found, self.said + self.process.stderr.read()
        self.port = int(found[1])
        self.url = found[0]

    def end(self, number=signal.SIGTERM):
        """(exit status, seconds that it took, stderr)"""
        began = time.monotonic()
        self.process.send_signal(number)
        _, err = self.process.communicate(timeout=20)
        return self.process.returncode, time.monotonic() - began, err


def raw(port, text):
    """A connection over which this request was sent."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=20)
    connection.sendall(text.encode())
    return connection


def post(data, path=CHAT):
    text = json.dumps(data)
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(text)}\r\n\r\n{text}"


def arrived(server, *bodies):
    """Connections over which these were sent in this order, all of which the server has begun to read."""
    import httpx

    connections = [raw(server.port, post(one)) for one in bodies]
    # The server accepts connections in order, so what is answered on a later one came after these
    assert httpx.get(server.url + "/v1/models", timeout=20).status_code == 200
    return connections


def status_of(connection):
    """The status of the response, when it comes."""
    with connection, connection.makefile("rb") as response:
        return int(response.readline().split()[1])


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_lets_requests_end(number):
    """One request is answered, one waits: both get their answers, and there is no traceback."""
    server = Process("--batch-size", "1")
    asked = arrived(server, *map(body, CHAINS[:2]))
    status, seconds, err = server.end(number)
    assert [status_of(one) for one in asked] == [200] * 2
    assert status == 128 + number and seconds < 10 and "Traceback" not in err, err


@pytest.mark.slow
def test_what_takes_too_long_after_a_signal_is_refused():
    """The process is gone within ten seconds all the same."""
    server = Process("--batch-size", "1")
    asked = arrived(server, *[body(rounds=64, latent_steps=1024)] * 2)
    status, seconds, err = server.end()
    assert [status_of(one) for one in asked] == [503] * 2
    assert status == 143 and 5 < seconds < 10 and "Traceback" not in err, err


def test_a_signal_that_is_ignored_stays_so():
    """As SIGINT is in a job that a script starts in the background, and SIGHUP under nohup."""
    numbers = (signal.SIGINT, signal.SIGHUP)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        server = Server(uvicorn.Config(None), None, lambda: None)
        with server.capture_signals():
            for number in numbers:
                signal.raise_signal(number)
            assert not server.should_exit
            assert signal.getsignal(signal.SIGTERM) == server.handle_exit
        assert all(signal.getsignal(number) is signal.SIG_IGN for number in numbers)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_closed_terminal_ends_the_server():
    """What handled SIGHUP before gets it when the server has ended: that decides the exit status."""
    told = []
    before = signal.signal(signal.SIGHUP, lambda number, frame: told.append(number))
    handler = signal.getsignal(signal.SIGHUP)
    try:
        server = Server(uvicorn.Config(None), None, lambda: None)
        with server.capture_signals():
            signal.raise_signal(signal.SIGHUP)
            assert server.should_exit and not told
        assert told == [signal.SIGHUP] and signal.getsignal(signal.SIGHUP) is handler
    finally:
        signal.signal(signal.SIGHUP, before)


def test_an_error_after_the_first_event_is_an_event():
    """Whoever fails the job may not have seen yet that it was begun."""

    async def sent():
        async def others():
            yield "data: 2\n\n"
            yield Refused(503, "it ends")
            yield "data: 3\n\n"

        return [event async for event in events_from("data: 1\n\n", others())]

    first, second, last = asyncio.run(sent())
    assert (first, second) == ("data: 1\n\n", "data: 2\n\n")
    error = json.loads(last.removeprefix("data: "))["error"]
    assert error["message"] == "it ends" and error["type"] == "server_error"


def test_a_job_that_fails_has_one_error_and_nothing_after_it(tiny):
    """Whether it was begun or not: its connection decides how the error is sent."""
    served = {"tiny": Served(tiny, Settings())}

    async def queued():
        job = Job(read(body(stream=True), served, True))
        job.send_events(["data: 1\n\n"])
        job.begun = False  # as another thread may still see it
        job.fail(Refused(503, "it ends"))
        await asyncio.sleep(0)
        return [job.queue.get_nowait() for _ in range(job.queue.qsize())]

    *_, refused, end = asyncio.run(queued())
    assert isinstance(refused, Refused) and end is None


def test_a_client_that_has_left_its_stream_is_not_logged(monkeypatch, caplog):
    def run(server, sockets):
        log = logging.getLogger("asyncio")
        log.warning("socket.send() raised exception.")
        log.warning("something else")

    monkeypatch.setattr(Server, "run", run)
    serve_on(None, App(Batches({}, 1, 0.0, 1)), lambda: None)
    assert caplog.messages == ["something else"]


def test_a_client_that_leaves_frees_its_row(monkeypatch):
    """In the middle of a text, at the next step; while agents think, at the next position; or before it has asked."""
    system = minimas.load_mas_system("tiny", device="cpu", fast=True)
    for agent in system.agents.values():
        agent.generation_config.eos_ids = ()  # texts are as long as they may
    rows, take_steps = [], Batch.take_steps

    def counted(self, *args):
        rows.append(len(self.rows))
        return take_steps(self, *args)

    monkeypatch.setattr(Batch, "take_steps", counted)
    with running(system, batch_size=2, wait=1.0) as url:
        port = int(url.rpartition(":")[2])
        text = body(max_tokens=600, stream=True, rounds=1)
        leaving, staying = raw(port, post(text)), raw(port, post(text))
        shown = b""
        while shown.count(b"data: ") < 5:  # it leaves in the middle of the text
            shown += leaving.recv(1000)
        leaving.close()
        shown = b""
        while b"[DONE]" not in shown:
            shown += staying.recv(1 << 16)
        assert rows[0] == 2 and rows[-1] == 1 and len(rows) == 599
        thinking = raw(port, post(body(rounds=64, latent_steps=1024)))
        half = raw(port, post(text)[:-10])
        time.sleep(1.6)
        thinking.close()
        half.close()
        began = time.monotonic()
        short = raw(port, post(body(max_tokens=2)))
        assert b"200 OK" in short.recv(1000) and time.monotonic() - began < 5
        staying.close()
        short.close()


@pytest.mark.parametrize("channel", ("latent", "text"))
def test_a_question_whose_client_has_left_is_thought_about_no_further(tiny, monkeypatch, channel):
    """Its row leaves after the turn, and the other one is answered as alone."""
    (expected,) = tiny.run([CHAINS[1]], rounds=4, channel=channel)
    served = {"tiny": Served(tiny, Settings(batch_size=2))}
    read_by, prompts_for = [], tiny.prompts_for

    async def answered():
        jobs = [Job(read(body(one, rounds=4, channel=channel), served, True)) for one in CHAINS[:2]]

        def leaving(role, questions, *args):
            read_by.append((role, len(questions)))
            if len(read_by) == 4:
                jobs[0].leave()
            return prompts_for(role, questions, *args)

        monkeypatch.setattr(tiny, "prompts_for", leaving)
        Batches(served, 2, 0, 2).answer_or_fail(jobs)
        await asyncio.sleep(0)
        return [[job.queue.get_nowait() for _ in range(job.queue.qsize())] for job in jobs]

    left, (stayed,) = asyncio.run(answered())
    roles = tiny.style.order * 4
    assert read_by == [(role, 2) for role in roles[:4]] + [(role, 1) for role in roles[4:]]
    assert left == [None]
    assert stayed["choices"][0]["message"]["content"] == expected.text


@pytest.mark.slow
def test_options_of_the_command():
    """Defaults for requests, a key from the environment, and two models."""
    import httpx

    env = {"MINIMAS_API_KEY": "k"}
    server = Process("--rounds", "1", "--style", "tiny", env=env)
    try:
        assert httpx.get(server.url + "/v1/models").status_code == 401
        headers = {"authorization": "Bearer k"}
        answer = httpx.post(server.url + CHAT, json=body(), headers=headers).json()
        assert answer["choices"][0]["minimas"]["rounds"] == 1
    finally:
        server.end()


def run(monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", ["serve", *options])
    main()


def served_by(monkeypatch, *options):
    """The App that the command serves with these options."""
    served = []
    monkeypatch.setattr(app_module, "serve_on", lambda sock, app, ready: served.append(app))
    run(monkeypatch, "--port", "0", "--device", "cpu", *options)
    return served[0]


def copy_of_tiny(folder_of_file, **changes):
    """The file of a style mine, which is the tiny one with these changes."""
    folder = Path(minimas.__file__).parent / "tiny"
    entry = json.loads((folder.parent / "styles.json").read_text())["tiny"]
    entry["agents"] = {role: str(folder / role) for role in entry["order"]}
    entry |= {"links": str(folder / "links"), **changes}
    file = folder_of_file / "mine.json"
    file.write_text(json.dumps(entry))
    return file


def test_two_styles(monkeypatch, tmp_path, tiny):
    """A model's name chooses the style; here the second is in a file and has other defaults."""
    file = copy_of_tiny(tmp_path, latent_steps=1)
    app = served_by(monkeypatch, "--style", f"tiny,{file}")
    with TestClient(app.starlette(), base_url=URL) as made:
        listed = made.get("/v1/models").json()["data"]
        answers = [made.post(CHAT, json=body(model=one["id"])).json() for one in listed]
    assert [answer["model"] for answer in answers] == ["tiny", "mine"]
    for answer, steps in zip(answers, (5, 1), strict=True):
        (expected,) = tiny.run([CHAINS[0]], latent_steps=steps)
        assert answer["choices"][0]["message"]["content"] == expected.text
        assert answer["usage"]["completion_tokens_details"]["latents"] == 8 * steps


def test_who_may_reach_it(monkeypatch, capsys):
    assert set(served_by(monkeypatch).hosts) == set(LOOPBACK)
    assert capsys.readouterr().err == ""
    assert served_by(monkeypatch, "--host", "0.0.0.0").hosts is None
    assert "whoever can reach 0.0.0.0 may ask" in capsys.readouterr().err
    app = served_by(monkeypatch, "--host", "0.0.0.0", "--allow-host", "my.test", "--api-key", "k")
    assert {"my.test", "localhost"} <= set(app.hosts) and capsys.readouterr().err == ""
    assert set(served_by(monkeypatch, "--host", "LocalHost").hosts) == set(LOOPBACK)
    assert capsys.readouterr().err == ""
    assert served_by(monkeypatch, "--allow-origin", "http://x.test/").origins == ["http://x.test"]
    monkeypatch.setenv("MINIMAS_API_KEY", "k")
    assert served_by(monkeypatch).key == "k"


def test_quantised_weights(monkeypatch):
    app = served_by(monkeypatch, "--quantize", "int8")
    system = app.batches.served["tiny"].system
    assert {agent.quantize for agent in system.agents.values()} == {"int8"}


def test_a_command_that_is_wrong(monkeypatch):
    monkeypatch.setattr(app_module, "serve_on", lambda *args: None)
    taken = socket.create_server(("127.0.0.1", 0))
    port = str(taken.getsockname()[1])
    for options, words in (
        (("--port", port), "cannot be had"),
        (("--host", "256.0.0.1"), "cannot be had"),
        (("--port", "99999"), "cannot be had"),
        (("--queue", "0"), "--queue is 0"),
        (("--wait", "-1"), "--wait is -1"),
        (("--style", "none"), "style 'none' is not known"),
        (("--rounds", "0"), "rounds is 0"),
        (("--tools", "python"), "call none"),
        (("--style", "tiny,single", "--checkpoint", "x"), "several styles"),
        (("--style", "a/tiny.json,b/tiny.json"), "two models the name tiny"),
        (("--style", "tiny,tiny"), "give it once, or rename"),
        (("--host", "é" * 70), "cannot be had"),
        (("--allow-host", "my.test:8000"), "give the name alone"),
        (("--allow-host", "http://my.test"), "give the name alone"),
        (("--allow-host", "[::1]"), "give the name alone"),
        (("--allow-host", ""), "give the name alone"),
        (("--api-key", "sécret"), "--api-key has a character .* printable ASCII"),
        (("--api-key", "secret\n"), "--api-key has a character"),
        (("--api-key", " secret"), "a blank around it"),
        (("--hear", "other"), "--hear is other"),
        (("--api-key", ""), "the API key is empty"),
        (("--style", "tiny,single", "--tools", "python"), "call none"),
    ):
        with pytest.raises(InputError, match=words):
            run(monkeypatch, *options)
    taken.close()


def test_a_port_is_taken_as_soon_as_a_server_starts():
    """Before it has loaded anything, the second one is refused."""
    with listener("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(InputError, match=f"--port {port} cannot be had .* give another"):
            listener("127.0.0.1", port)


def test_hosts_are_kept_in_order(monkeypatch):
    names = ["b.test", "a.test", "fe80::1", "c_1.test", "10.0.0.1"]
    options = [part for name in names for part in ("--allow-host", name)]
    assert served_by(monkeypatch, *options).hosts == [*LOOPBACK, *names]


def test_needs(monkeypatch, capsys):
    run(monkeypatch, "--style", "tiny", "--needs")
    assert capsys.readouterr().out.count("planner") == 1


@pytest.fixture
def two_styles(tmp_path):
    """--style with tiny, and a copy of it in a file."""
    return f"tiny,{copy_of_tiny(tmp_path)}"


def test_needs_of_two_styles(monkeypatch, capsys, two_styles):
    run(monkeypatch, "--style", two_styles, "--needs", "--device", "cpu")
    first, second, together = re.split(r"\n\n(?=mine|all together)", capsys.readouterr().out)
    assert first.startswith("tiny\n") and second.startswith("mine\n")
    assert together.startswith("all together: tiny, mine\n")

    def megabytes(text):
        return float(re.search(r"^cpu +([\d.]+) MB", text, re.MULTILINE)[1])

    assert abs(megabytes(together) - megabytes(first) - megabytes(second)) < 0.02


def test_all_styles_have_to_fit_together(monkeypatch, two_styles):
    """All weights are loaded, and one batch is answered at a time."""
    origin, settings = Origin("tiny", device="cpu", fast=True), Settings().completed(STYLES["tiny"])
    alone = needs.needs_of(origin, STYLES["tiny"], [settings], prompt=0)
    weights = sum(need.weights for need in alone.values())
    cache = 8 * max(need.cache for need in alone.values())
    monkeypatch.setattr(needs, "memory_of", lambda device: 2 * weights + cache)
    assert len(served_by(monkeypatch, "--style", two_styles).batches.served) == 2
    monkeypatch.setattr(needs, "memory_of", lambda device: 2 * weights + cache - 1)
    with pytest.raises(InputError, match="cpu has .* of memory, and this run needs at least"):
        served_by(monkeypatch, "--style", two_styles)
    served_by(monkeypatch, "--style", "tiny")


def test_without_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "minimas.serve.app", None)
    error = ModuleNotFoundError("No module named 'starlette'", name="starlette")

    class Missing:
        def find_spec(self, name, *args):
            if name == "minimas.serve.app":
                raise error

    monkeypatch.delitem(sys.modules, "minimas.serve.app")
    monkeypatch.setattr(sys, "meta_path", [Missing(), *sys.meta_path])
    with pytest.raises(InputError, match=r"needs starlette.*pip install 'minimas\[serve\]'"):
        run(monkeypatch, "--port", "0")
