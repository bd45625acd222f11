"""Clients that people already have ask the server: the openai package, lm-eval, curl, and a browser."""

import asyncio
import base64
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

import minimas
from minimas.evaluate import evaluate, load_dataset
from minimas.tiny.task import random_chain

pytest.importorskip("starlette", reason="needs the extra serve")
pytest.importorskip("uvicorn", reason="needs the extra serve")

from serving import running

CHAIN = "7 +5 *3 -4 +8 *7 -1 +6"


@pytest.fixture(scope="module")
def tiny():
    return minimas.load_mas_system("tiny", device="cpu", fast=True)


@pytest.fixture(scope="module")
def url(tiny):
    with running(tiny, key="k") as url:
        yield url


def chains(n):
    """n different chains of two to nine steps."""
    rng = random.Random(5)
    return [random_chain(rng, rng.randint(2, 9), "test") for _ in range(n)]


# The openai package


@pytest.fixture
def openai():
    return pytest.importorskip("openai", reason="needs the extra clients")


def asked(question, **more):
    return {"model": "tiny", "messages": [{"role": "user", "content": question}], **more}


def test_openai(openai, url, tiny):
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0)
    assert [model.id for model in client.models.list()] == ["tiny"]
    (expected,) = tiny.run([CHAIN])
    answer = client.chat.completions.create(**asked(CHAIN))
    assert answer.choices[0].message.content == expected.text
    assert answer.choices[0].minimas["answer"] == "5"
    assert answer.usage.completion_tokens == expected.new_tokens
    (hasty,) = tiny.run([CHAIN], rounds=1)
    own = {"rounds": 1, "latent_steps": 5, "channel": "latent"}
    answer = client.chat.completions.create(**asked(CHAIN, extra_body=own))
    assert answer.choices[0].message.content == hasty.text
    whole = client.completions.create(model="tiny", prompt=CHAIN)
    assert whole.choices[0].text == expected.text
    client.close()


def test_openai_streams(openai, url, tiny):
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(client.chat.completions.create(**asked(CHAIN, **options)))
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(texts) == tiny.run([CHAIN])[0].text and len(texts) > 4
    assert chunks[-1].usage.total_tokens > 20
    with client.chat.completions.create(**asked(CHAIN, stream=True)) as stream:
        next(iter(stream))  # and leaves
    client.close()


def test_openai_errors(openai, url):
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0)
    with pytest.raises(openai.BadRequestError, match="the tiny system cannot read"):
        client.chat.completions.create(**asked("what is love"))
    with pytest.raises(openai.NotFoundError, match="not served"):
        client.chat.completions.create(**asked(CHAIN) | {"model": "gpt"})
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="x").chat.completions.create(**asked(CHAIN))
    client.close()


def test_sixteen_at_once(openai, url, tiny):
    """Each gets what it gets alone, streamed or not."""
    questions = [chain.question for chain in chains(16)]
    expected = [result.text for result in tiny.run(questions, batch_size=1)]

    async def ask(client, i):
        if i % 2:
            answer = await client.chat.completions.create(**asked(questions[i]))
            return answer.choices[0].message.content
        stream = await client.chat.completions.create(**asked(questions[i], stream=True))
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def all_at_once():
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0) as client:
            return await asyncio.gather(*[ask(client, i) for i in range(16)])

    assert asyncio.run(all_at_once()) == expected


# lm-eval

TASK = """task: chains
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["Question:"], max_gen_toks: 64, temperature: 0}
filter_list:
  - name: boxed
    filter:
      - {function: regex, regex_pattern: '\\\\boxed\\{(\\d)\\}', group_select: -1}
      - {function: take_first}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""


@pytest.mark.slow
def test_lm_eval(tiny, tmp_path):
    """Forty rows in the form of GSM8K, in one round, which is too few for half of them: the score of `evaluate`."""
    pytest.importorskip("lm_eval", reason="needs the extra clients")
    rows = [{"question": one.question, "answer": str(one.answer)} for one in chains(40)]
    file = tmp_path / "chains.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "chains.yaml").write_text(TASK.replace("FILE", str(file)))
    table = evaluate(
        tiny, load_dataset(str(file)), rounds=[2], out=tmp_path / "records.jsonl", graders="plain"
    )
    with running(tiny, settings={"rounds": 2}) as url:
        command = [sys.executable, "-m", "lm_eval", "--model", "local-chat-completions"]
        command += [
            "--model_args",
            f"model=tiny,base_url={url}/v1/chat/completions,num_concurrent=8",
        ]
        command += ["--tasks", "chains", "--include_path", str(tmp_path), "--apply_chat_template"]
        command += ["--output_path", str(tmp_path / "out")]
        offline = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
        done = subprocess.run(command, env=offline, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    (report,) = (tmp_path / "out").rglob("results_*.json")
    score = json.loads(report.read_text())["results"]["chains"]["exact_match,boxed"]
    (row,) = table.rows
    assert 100 * score == row["plain %"] and 0.3 < score < 0.9


# curl


def test_curl(url, tiny):
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("needs curl")
    command = [curl, "-sS", f"{url}/v1/chat/completions", "-H", "Authorization: Bearer k"]
    command += ["-H", "Content-Type: application/json"]
    data = json.dumps(asked(CHAIN))
    done = subprocess.run([*command, "-d", data], capture_output=True, text=True, check=True)
    expected = tiny.run([CHAIN])[0].text
    assert json.loads(done.stdout)["choices"][0]["message"]["content"] == expected
    data = json.dumps(asked(CHAIN, stream=True))
    done = subprocess.run([*command, "-N", "-d", data], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("data: {") and done.stdout.endswith("data: [DONE]\n\n")


# A browser

CHROMIUM = "/usr/bin/chromium"
CHROMEDRIVER = "/usr/bin/chromedriver"
FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --window-size=900,1400"
FLAGS += " --disable-background-networking --disable-component-update --disable-sync"


class Browser:
    """Headless Chromium, driven by the WebDriver protocol."""

    def __init__(self, profile):
        command = [CHROMEDRIVER, "--port=0"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        for line in self.process.stdout:
            found = re.search(r"on port (\d+)", line)
            if found and "successfully" in line:
                break
        self.url = f"http://127.0.0.1:{found[1]}/session"
        chrome = {"binary": CHROMIUM, "args": [*FLAGS.split(), f"--user-data-dir={profile}"]}
        made = self.send("", capabilities={"alwaysMatch": {"goog:chromeOptions": chrome}})
        self.url += "/" + made["sessionId"]

    def send(self, path, **data):
        request = urllib.request.Request(self.url + path, json.dumps(data).encode())
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)["value"]

    def run(self, script):
        """The value of a script in the page."""
        return self.send("/execute/sync", script=script, args=[])

    def wait(self, script):
        """Wait until a script gives something true."""
        late = time.monotonic() + 30
        while not self.run(script):
            assert time.monotonic() < late, (script, self.run("return document.body.innerText"))
            time.sleep(0.02)

    def screenshot(self, file):
        with urllib.request.urlopen(self.url + "/screenshot", timeout=60) as response:
            file.write_bytes(base64.b64decode(json.load(response)["value"]))

    def close(self):
        request = urllib.request.Request(self.url, method="DELETE")
        urllib.request.urlopen(request, timeout=60).close()
        self.process.terminate()
        self.process.wait()


@pytest.mark.slow
def test_the_page_in_a_browser(tiny, tmp_path, monkeypatch):
    """A question is asked, its answer streams, and its trace opens; without the key, the page says what is missing."""
    if not Path(CHROMIUM).exists() or not Path(CHROMEDRIVER).exists():
        pytest.skip("needs Debian's chromium and chromium-driver")
    write = tiny.write

    def slowly(*args, **options):
        for new in write(*args, **options):
            yield new
            time.sleep(0.2)

    monkeypatch.setattr(tiny, "write", slowly)
    browser = Browser(tmp_path / "profile")
    try:
        with running(tiny, key="k") as url:
            browser.send("/url", url=url)
            browser.wait("return trouble.textContent.includes('API key is missing')")
            browser.run("key.value = 'k'; key.onchange()")
            browser.wait("return model.value == 'tiny' && !trouble.textContent")
            browser.run(f"question.value = {CHAIN!r}; rounds.value = 3; send.click()")
            seen = set()
            while not browser.run("return document.querySelector('article button') != null"):
                seen.add(browser.run("return document.querySelector('article pre')?.textContent"))
            assert {"g", "g+6"} & seen, "the text is seen while it is written"
            shown = browser.run("return document.querySelector('article').innerText")
            assert tiny.run([CHAIN])[0].text in shown and "Answer: 5 (3 rounds)" in shown
            browser.run("document.querySelector('article button').click()")
            browser.wait("return document.querySelector('iframe')?.srcdoc")
            trace = browser.run("return document.querySelector('iframe').srcdoc")
            assert "What planner, critic, solver thought" in trace and CHAIN in trace
            browser.run("question.value = 'what is <b>love</b>'; send.click()")
            browser.wait("return document.querySelector('article .error') != null")
            shown = browser.run("return document.querySelector('article').innerText")
            assert "what is <b>love</b>" in shown and "cannot read" in shown
            assert browser.run("return document.documentElement.scrollWidth <= innerWidth")
            browser.screenshot(Path(os.environ.get("MINIMAS_SCREENSHOT", tmp_path / "page.png")))
    finally:
        browser.close()


@pytest.mark.slow
def test_the_load(capsys, monkeypatch):
    """The tool that puts a server under load, with few clients: every good request is answered right."""
    load_serve = pytest.importorskip("load_serve")
    options = ["--clients", "12", "--requests", "4", "--questions", "8"]
    monkeypatch.setattr(sys, "argv", ["load_serve", *options, "--batch-sizes", "8"])
    load_serve.main()
    shown = capsys.readouterr().out
    assert re.search(r"batch 8: .* right/s, p50 .* s, p95 .* s", shown) and "wrong" not in shown
    assert int(re.search(r"(\d+) right;", shown)[1]) > 36
    monkeypatch.setattr(sys, "argv", ["load_serve", *options, "--memory", "48"])
    load_serve.main()
    assert "%)" in capsys.readouterr().out
