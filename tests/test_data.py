"""Benchmarks from a hub on loopback, also one in trouble, and local files."""

import base64
import json
import os
import pickle
import random
import re
import subprocess
import sys
import tracemalloc
import zlib
from functools import partial

import pytest
import standin
from huggingface_hub import constants

import minimas
from minimas import InputError
from minimas.common import no_op
from minimas.evaluate.benchmarks import BENCHMARKS, load_dataset, settings_for
from minimas.evaluate.grade import same_math
from minimas.evaluate.records import graded
from minimas.prompts import Question
from minimas.runs.rows import parquet_rows
from minimas.settings import Settings
from minimas.styles import STYLES
from minimas.tiny.task import questions as chains

MBPP = [
    {
        "task_id": n,
        "prompt": f"Write function {n}.",
        "code": f"def helper(x):\n    return x\ndef f{n}(x):\n    return helper(x)\n",
        "test_list": [f"assert set(f{n}(helper({i}))) == {i}" for i in range(4)],
        "test": f"assert f{n}(1) == 1\n",
    }
    for n in range(250)
]
GPQA = [
    "Record ID,Question,Correct Answer,Incorrect Answer 1,Incorrect Answer 2,Incorrect Answer 3,Explanation",
    *(
        f'rec{n},"Question {n}, with\na second line?",right {n} ,wrong a,wrong b,wrong c,'
        f"{'long ' * 30000 if n == 1 else ''}"
        for n in range(8)
    ),
]


class Malicious:
    """Unpickled by anyone but us, it makes a folder."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def packed(value):
    return base64.b64encode(zlib.compress(pickle.dumps(value))).decode()


def livecodebench(file, number, private, starter="", name=None):
    case = lambda kind: [
        {"input": f"{kind} {file}", "output": "1", "testtype": "functional" if starter else "stdin"}
    ]
    return {
        "question_id": f"{file}_{number}",
        "question_content": f"Problem {number} of {file}.",
        "starter_code": starter,
        "platform": "x",
        "public_test_cases": json.dumps(case("public")),
        "private_test_cases": private(json.dumps(case("private"))),
        "metadata": json.dumps({"func_name": name} if name else {}),
    }


def write(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def write_parquet(folder, rows, per_file=10**6, name="{:04}.parquet"):
    """Rows as files of the hub's Parquet export, if they can be written here."""
    try:
        from pyarrow import Table, parquet
    except ImportError:
        return
    folder.mkdir(parents=True, exist_ok=True)
    for n, start in enumerate(range(0, len(rows), per_file)):
        parquet.write_table(
            Table.from_pylist(rows[start : start + per_file]),
            folder / name.format(n),
            row_group_size=70,
        )


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    data = root / "datasets"
    write(
        data / "HuggingFaceH4/MATH-500/test.jsonl",
        [
            {
                "problem": f"What is {n}?",
                "solution": "...",
                "answer": f"\\frac{{{n}}}{{1}}",
                "level": 1,
                "unique_id": f"test/{n}.json",
            }
            for n in range(5)
        ],
    )
    write(data / "math-ai/aime25/test.jsonl", [{"problem": "p", "answer": 70}])
    (data / "Idavidrein/gpqa").mkdir(parents=True)
    (data / "Idavidrein/gpqa/gpqa_diamond.csv").write_text("\n".join(GPQA))
    for n, file in enumerate(BENCHMARKS["livecodebench"]["files"]):
        write(
            data / "livecodebench/code_generation_lite" / file,
            [
                livecodebench(n, 1, packed),
                livecodebench(n, 2, str, "class Solution:\n    def g(self):", "g"),
                livecodebench(n, 3, lambda tests: "", "class Solution:"),
            ],
        )
    write_parquet(data / "evalplus/mbppplus/default/test", MBPP, per_file=100)
    write_parquet(
        data / "MathArena/aime_2026/default/train",
        [{"problem_idx": 1, "problem": "p", "answer": 277}],
    )
    write_parquet(
        data / "chiayewken/bamboogle/default/test", [{"Question": "Who?", "Answer": "Ada Lovelace"}]
    )
    write_parquet(
        data / "hotpotqa/hotpot_qa/distractor/validation",
        [{"id": "5a8", "question": "Who?", "answer": "Ada", "context": {"title": ["x"]}}],
    )
    with standin.serve(root) as server:
        yield server


@pytest.fixture
def client(hub, tmp_path, monkeypatch):
    """The hub with an empty cache; .patch is the monkeypatch."""
    standin.connect(monkeypatch, hub, tmp_path / "files")
    hub.patch = monkeypatch
    monkeypatch.delenv("HF_TOKEN", raising=False)
    hub.asked.clear(), hub.revisions.clear(), hub.tokens.clear(), hub.failing.clear()
    return hub


@pytest.fixture
def parquet():
    pytest.importorskip("pyarrow")


def load(name, **options):
    """Examples, and what was told."""
    told = []
    return load_dataset(name, warn=told.append, **options), told


def local(file, **options):
    return load(str(file), **options)[0]


def refused(name, **options):
    with pytest.raises(InputError) as told:
        load_dataset(str(name), **options)
    assert "\n" not in str(told.value)
    return str(told.value)


def test_settings_are_the_papers():
    """The table of spec.md section 4."""
    paper = {
        "math500": (2000, 0.6, 1, "math"),
        "gpqa": (4000, 0.6, 1, "choice"),
        "medqa": (4000, 0.6, 1, "choice"),
        "aime25": (16000, 0.6, 10, "math"),
        "aime26": (16000, 0.6, 10, "math"),
        "mbppplus": (4000, 0.2, 1, "code"),
        "livecodebench": (4000, 0.2, 1, "code"),
        "bamboogle": (4000, 0.6, 1, "text"),
        "hotpotqa": (4000, 0.6, 1, "text"),
    }
    names = ("max_new_tokens", "temperature", "rollouts", "grader")
    assert {
        name: tuple(settings_for(name, "mixture")[key] for key in names)
        for name in BENCHMARKS
        if name not in ("tiny", "gsm8k", "humaneval")
    } == paper
    for name, tokens, grader in (
        ("gsm8k", 512, "math"),
        ("humaneval", 768, "code"),
    ):  # not in the paper
        assert settings_for(name, "mixture") == {
            "grader": grader,
            "rollouts": 1,
            "max_new_tokens": tokens,
            "temperature": 0.0,
        }
    assert settings_for("math500", "sequential_light")["max_new_tokens"] == 1000
    assert [d.get("questions") for d in BENCHMARKS.values()] == [
        None,
        500,
        198,
        300,
        30,
        30,
        378,
        1055,
        None,
        None,
        1319,
        164,
    ]
    assert (
        settings_for("tiny", "tiny")["rounds"] == [1, 2, 3, 4, 5]
        and settings_for("x.csv", "tiny", task="choice")["grader"] == "choice"
    )
    for name in paper:
        own = {
            key: value
            for key, value in settings_for(name, "mixture").items()
            if key not in ("grader", "rollouts")
        }
        assert Settings(**own).completed(STYLES["mixture"])


def test_settings_of_the_released_runner():
    """Its recommended latent steps and batch sizes; other styles are left open."""
    light, scaled = (
        {
            name: tuple(
                settings_for(name, style, "released")[key] for key in ("latent_steps", "batch_size")
            )
            for name in ("math500", "medqa", "gpqa", "mbppplus")
        }
        for style in ("sequential_light", "sequential_scaled")
    )
    assert light == {
        "math500": ([48], 32),
        "medqa": ([32], 16),
        "gpqa": ([32], 16),
        "mbppplus": ([16], 16),
    }
    assert scaled == {
        "math500": ([32], 16),
        "medqa": ([48], 16),
        "gpqa": ([48], 16),
        "mbppplus": ([16], 16),
    }
    for name in "gpqa", "medqa", "mbppplus":
        assert settings_for(name, "mixture", "released") == settings_for(name, "mixture")
    assert settings_for("math500", "mixture", "released") == settings_for("math500", "mixture") | {
        "grader": "released"
    }
    assert settings_for("math500", "sequential_light", "released") == {
        "grader": "released",
        "rollouts": 1,
        "max_new_tokens": 1000,
        "temperature": 0.6,
        "latent_steps": [48],
        "batch_size": 32,
    }
    assert "latent_steps" not in settings_for("math500", "sequential_light"), (
        "nothing of it is left behind in the table"
    )
    for name, protocol, complaint in [
        (
            "aime25",
            "released",
            "aime25 has no released settings: .* math500, gpqa, medqa, mbppplus$",
        ),
        ("maths", "paper", "not known"),
        ("x.csv", "released", "x.csv has no released"),
        ("math500", "mine", "expected paper"),
    ]:
        with pytest.raises(InputError, match=complaint):
            settings_for(name, "mixture", protocol)
    assert [name for name, dataset in BENCHMARKS.items() if "released" in dataset] == [
        "math500",
        "gpqa",
        "medqa",
        "mbppplus",
    ]


def test_tiny_is_its_test_split():
    examples = load_dataset("tiny")
    assert {(e.question, e.gold) for e in examples} < {
        (c.question, str(c.answer)) for c in chains("test", 150)
    } and len(examples) == 600
    assert [len(e.question.split()) for e in examples] == [3, 4, 5, 6, 7, 8, 9, 10] * 75
    some = examples[:8]
    results = minimas.load_mas_system("tiny", device="cpu").run(
        [e.question for e in some], dataset="tiny"
    )
    assert [r.answer for r in results] == [e.gold for e in some]


def test_math500(client):
    examples, told = load("math500")
    assert [(e.id, e.question, e.gold, e.task) for e in examples[:2]] == [
        ("test/0.json", "What is 0?", "\\frac{0}{1}", "math"),
        ("test/1.json", "What is 1?", "\\frac{1}{1}", "math"),
    ]
    assert told == ["math500 has 5 questions here, 500 in the benchmark: results do not compare"]
    assert load("math500", limit=2) == (examples[:2], [])
    client.patch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert load("math500")[0] == examples
    assert re.search(
        "Idavidrein/gpqa cannot be fetched .*HF_HUB_OFFLINE is set.*local file", refused("gpqa")
    )


def test_revisions_are_pinned(client, tmp_path):
    """A commit that the cache holds is not asked for again: the set stays, and so do results."""
    examples = load("aime25")[0]
    assert [file.parent.name for file in (tmp_path / "files").rglob("test.jsonl")] == [
        BENCHMARKS["aime25"]["revision"]
    ]
    client.patch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        "http://127.0.0.1:1/{repo_id}/{revision}/{filename}",
    )
    client.patch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    assert load("aime25")[0] == examples and examples[0].gold == "70"


def test_small_sets_from_parquet(client, parquet):
    for name, expected in {
        "aime26": ("1", "p", "277"),
        "bamboogle": ("row 1", "Who?", "Ada Lovelace"),
        "hotpotqa": ("5a8", "Who?", "Ada"),
    }.items():
        example = load(name)[0][0]
        assert (example.id, example.question, example.gold) == expected and example.task == "math"


def test_gpqa(client):
    examples = load("gpqa")[0]
    assert (
        len(examples) == 8 and {e.task for e in examples} == {"choice"} and examples[3].id == "rec3"
    )
    for n, e in enumerate(examples):
        stem, options = e.question.split("?\n")
        letters = dict(re.findall(r"^([A-D])\. (.*)$", options, re.MULTILINE))
        assert stem == f"Question {n}, with\na second line" and options.endswith(
            "\n\nChoose the correct option (A/B/C/D)."
        )
        assert (
            list(letters) == list("ABCD")
            and letters[e.gold] == f"right {n}"
            and sorted(letters.values())[1:] == ["wrong a", "wrong b", "wrong c"]
        )
    assert len({e.gold for e in examples}) > 1, "the right one moves"
    other = load("gpqa", seed=7)[0]
    assert other != examples and [e.question[:10] for e in other] == [
        e.question[:10] for e in examples
    ]


def test_gpqa_order_depends_on_the_question_alone(client, tmp_path):
    file, rows = tmp_path / "gpqa.csv", GPQA[1:]
    random.Random(0).shuffle(rows)
    file.write_text("\n".join([GPQA[0], *rows]))
    assert {e.question: e.gold for e in load("gpqa", file=file)[0]} == {
        e.question: e.gold for e in load("gpqa")[0]
    }
    file.write_text(
        "Record ID,Question,Correct Answer,Incorrect Answer 1,Incorrect Answer 2,Incorrect Answer 3\n"
        "r,Why?,0,1,2,3\n"
    )
    assert load("gpqa", file=file)[0][0].question.startswith("Why?\nA. 2\nB. 0\nC. 1\nD. 3\n"), (
        "as the released runner for seed 42"
    )


@pytest.mark.parametrize("name", ["gpqa", "mbppplus"])
def test_a_hub_in_trouble(client, name):
    if name == "mbppplus":
        pytest.importorskip("pyarrow")
    for failure, complaint in [
        ((403, "GatedRepo"), "is gated: accept its terms .* HF_TOKEN"),
        ((401, "RepoNotFound"), "is not on the hub, or private and closed to you.*HF_TOKEN"),
        ((500, "Oops"), "cannot be fetched from the hub .*check the network, or give a local file"),
        ((404, "RevisionNotFound"), "cannot be fetched from the hub"),
    ]:
        client.failing[name] = failure
        assert re.search(f"/{name} {complaint}", refused(name))
    client.failing.clear()
    client.patch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    assert re.search(
        "no connection.*local file of the same columns; --dataset tiny runs offline", refused(name)
    )


def test_mbppplus(client, parquet):
    """Three files, in their order, all batches of each."""
    examples, told = load("mbppplus")
    assert client.asked == {f"mbppplus/default/test/000{n}.parquet" for n in range(3)}
    assert client.revisions == {("mbppplus", "refs/convert/parquet")}
    assert [e.id for e in examples] == [
        str(n) for n in range(250)
    ] and "378 in the benchmark" in told[0]
    e = examples[249]
    assert (e.id, e.gold, e.tests, e.fn_name, e.task) == (
        "249",
        MBPP[249]["code"],
        ["assert f249(1) == 1\n"],
        "f249",
        "code",
    )
    assert e.question == (
        "Write function 249.\n\nYour solution should satisfy assertions like:\n"
        "assert set(f249(helper(0))) == 0\n"
        "assert set(f249(helper(1))) == 1\n"
        "assert set(f249(helper(2))) == 2"
    )
    scope = {}
    exec(e.gold + e.tests[0], scope)
    client.asked.clear()
    client.patch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert load("mbppplus")[0] == examples and not client.asked, "from the cache"


def test_rows_of_parquet_are_read_when_they_are_asked_for(client, parquet):
    assert len(load("mbppplus", limit=150)[0]) == 150
    rows = parquet_rows("evalplus/mbppplus", "default", "test")
    assert next(rows) == MBPP[0] and list(rows) == MBPP[1:]


def test_parquet_that_is_damaged_or_not_whole(client, parquet, tmp_path):
    """A file that was cut short is told of by its name; a split that is exported in part only is not read."""
    load("mbppplus")
    (file,) = (tmp_path / "files").rglob("snapshots/*/default/test/0001.parquet")
    whole = file.read_bytes()
    for damaged in (
        b"",
        b"nothing",
        whole[:-9],
        whole[:40] + bytes(40) + whole[80:],
        whole[:-2000] + bytes(2000 - 8) + whole[-8:],
    ):
        file.write_bytes(damaged)
        assert re.search("0001.parquet cannot be read .*: delete it", refused("mbppplus"))
    assert len(load("mbppplus", limit=100)[0]) == 100, "the first file is whole"
    write_parquet(tmp_path / "datasets/evalplus/mbppplus/default/partial-test", MBPP)
    with standin.serve(tmp_path) as server:
        standin.connect(client.patch, server, tmp_path / "other files")
        assert (
            "has no files default/test/*.parquet: the split is not there, or too large"
            in refused("mbppplus")
        )


def test_without_pyarrow(client, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert re.fullmatch(
        r"evalplus/mbppplus .*needs pyarrow: pip install 'minimas\[data\]', or give a local file of .*",
        refused("mbppplus"),
    )
    assert not client.revisions and load("gpqa", limit=1)[0], "only these sets need it"


@pytest.mark.slow
def test_the_environment_is_heard(client, tmp_path):
    """HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE,
    in a process that only they tell of the stand-in; and no torch is loaded.
    """
    code = (
        "import sys; from minimas.evaluate.benchmarks import load_dataset; assert 'torch' not in sys.modules\n"
        "print([len(load_dataset(name, limit=4)) for name in ('math500', 'gpqa')])"
    )
    env = os.environ | {
        "HF_ENDPOINT": client.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": "hf_mine",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
    }
    offline = env | {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:1"}
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=one)
        for one in (env, offline)
    ]
    assert [run.stdout for run in runs] == ["[4, 4]\n"] * 2, runs[-1].stderr
    assert client.tokens == {"Bearer hf_mine"} and (tmp_path / "home" / "hub").is_dir()


def test_livecodebench(client):
    examples, told = load("livecodebench")
    assert len(examples) == 18 and len(client.asked) == 6 and "1055 in the benchmark" in told[0]
    program, method, unnamed = examples[15:]
    assert (program.id, program.question, program.fn_name, program.task) == (
        "5_1",
        "Problem 1 of 5.",
        "",
        "code",
    )
    assert (method.question, method.fn_name) == (
        "Problem 2 of 5.\n\nStarter code:\nclass Solution:\n    def g(self):",
        "g",
    )
    assert unnamed.fn_name is None
    assert program.tests() == method.tests() == [
        ("public 5", "1"),
        ("private 5", "1"),
    ] and unnamed.tests() == [("public 5", "1")]
    assert len(pickle.loads(pickle.dumps(program)).tests()) == 2, (
        "it can be sent to a process that grades"
    )


def test_livecodebench_is_not_held_in_memory(tmp_path):
    file = write(
        tmp_path / "lcb.jsonl", [livecodebench(n, n, lambda _: "x" * 2**21) for n in range(20)]
    )
    tracemalloc.start()
    examples = load("livecodebench", file=file)[0]
    now, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(examples) == 20 and most < 5 * 2**21 and now < 2**21, "a few lines at most, not 20"


def test_livecodebench_fetches_what_it_reads(client, tmp_path):
    assert len(load("livecodebench", limit=3)[0]) == 3 and client.asked == {
        "code_generation_lite/test.jsonl"
    }
    (tmp_path / "lcb.json").write_text(json.dumps([livecodebench(1, 1, packed)]))
    assert "from .jsonl files only" in refused("livecodebench", file=tmp_path / "lcb.json")


@pytest.mark.parametrize(
    "tests",
    [
        packed(7),
        packed([1]),
        packed("[1]"),
        "no base 64",
        base64.b64encode(b"not compressed").decode(),
        packed("not JSON"),
        "[",
    ],
)
def test_private_tests_that_are_damaged(tmp_path, tests):
    example = load(
        "livecodebench", file=write(tmp_path / "lcb.jsonl", [livecodebench(1, 1, lambda _: tests)])
    )[0][0]
    with pytest.raises(InputError, match="lcb.jsonl: tests at byte 0 cannot be read"):
        example.tests()


def test_nothing_in_a_pickle_is_run(tmp_path):
    made = tmp_path / "made"
    example = load(
        "livecodebench",
        file=write(
            tmp_path / "lcb.jsonl", [{}, livecodebench(1, 1, lambda _: packed(Malicious(made)))][1:]
        ),
    )[0][0]
    with pytest.raises(InputError, match="tests at byte 0 cannot be read"):
        example.tests()
    assert not made.exists()
    pickle.loads(zlib.decompress(base64.b64decode(packed(Malicious(made)))))
    assert made.exists(), "the bait works"


def test_medqa_is_a_local_file(tmp_path):
    assert re.search("medqa is not on the hub: give it as a local file", refused("medqa"))
    file, rows = (
        tmp_path / "medqa.json",
        [
            {
                "idx": 0,
                "question": "?",
                "query": "Cause?",
                "options": ["A. Cholera", "B. C. difficile", "C. Flu", "D. None"],
                "answer": "C. difficile",
            },
            {
                "idx": 1,
                "question": "?",
                "query": "Cause?\nA. x\nB. y\nC. z\nD. w",
                "options": ["A. x", "B. y", "C. z", "D. w"],
                "answer": "(c)",
            },
            {
                "idx": 2,
                "question": "?",
                "query": "C. difficile:\nwhat?",
                "options": ["x", "y", "C. difficile"],
                "answer": "C. C.  difficile",
            },
        ],
    )
    file.write_text(json.dumps(rows))
    examples, told = load("medqa", file=file)
    assert [(e.id, e.gold) for e in examples] == [
        ("0", "B"),
        ("1", "C"),
        ("2", "C"),
    ] and "300 in the benchmark" in told[0]
    assert examples[0].question == (
        "Cause?\nA. Cholera\nB. C. difficile\nC. Flu\nD. None\n\nChoose the correct option (A/B/C/D)."
    )
    assert examples[1].question == rows[1]["query"] + "\n\nChoose the correct option (A/B/C/D)."
    assert examples[2].question.startswith("C. difficile:\nwhat?\nA. x\nB. y\nC. C. difficile\n")
    for answer in "Malaria", "E", "None of these", "B":
        file.write_text(
            json.dumps([rows[0] | {"options": ["B", "A", "AB", "O"], "answer": answer}])
        )
        assert f"json row 1: the answer {answer!r} is not the letter" in refused("medqa", file=file)


GSM8K = [
    {"question": "How many?", "answer": "She has 500 * 2 = <<500*2=1000>>1,000 eggs.\n#### 1,000"},
    {"question": "And cold?", "answer": "#### -3"},
]
HUMANEVAL = [
    {
        "task_id": "HumanEval/0",
        "entry_point": "double",
        "canonical_solution": "    return twice(x)\n",
        "prompt": 'def twice(x):\n    return 2 * x\n\n\ndef double(x: int) -> int:\n    """ A \\d. """\n',
        "test": "METADATA = {}\n\n\ndef check(candidate):\n    assert candidate(2) == 4\n    assert twice(1) == 2\n",
    }
]


def test_gsm8k_and_humaneval(client, tmp_path, parquet):
    """By name from the hub's Parquet export, or from a local copy."""
    data = tmp_path / "hub/datasets/openai"
    write_parquet(data / "gsm8k/main/test", GSM8K)
    write_parquet(data / "openai_humaneval/openai_humaneval/test", HUMANEVAL)
    with standin.serve(tmp_path / "hub") as server:
        standin.connect(client.patch, server, tmp_path / "files of openai")
        loaded = {name: load(name)[0] for name in ("gsm8k", "humaneval")}
    assert loaded == {
        name: load(name, file=write(tmp_path / "copy.jsonl", rows))[0]
        for name, rows in (("gsm8k", GSM8K), ("humaneval", HUMANEVAL))
    }
    assert [(e.question, e.gold, e.task) for e in loaded["gsm8k"]] == [
        ("How many?", "1,000", "math"),
        ("And cold?", "-3", "math"),
    ]
    assert all(same_math(answer, "1,000", "plain") for answer in ("1000", "1,000", r"\$1{,}000"))
    e, row = loaded["humaneval"][0], HUMANEVAL[0]
    assert (e.id, e.question, e.tests, e.fn_name) == (
        "HumanEval/0",
        row["prompt"],
        [row["test"]],
        "double",
    )
    assert e.gold == e.head + row["canonical_solution"] and e.head == row["prompt"]


def test_an_answer_repeats_the_head_or_goes_on(tmp_path, recwarn):
    e = local(
        write(
            tmp_path / "rows.jsonl",
            [
                {"question": row["prompt"], "tests": row["test"], "fn_name": row["entry_point"]}
                for row in HUMANEVAL
            ],
        ),
        task="code",
    )[0]
    assert not recwarn, "the backslash in its text is nobody's concern"
    for answer in (
        "    return twice(x)",
        "return twice(x)",
        "if x:\n    return twice(x)\nreturn 0",
        e.head + "    return twice(x)",
        "def double(x):\n    return x + x",
        "double = lambda x: x + x",
    ):
        scope = {}
        exec(e.program(answer), scope)
        assert scope["double"](2) == 4 and scope["twice"](3) == 6
    for question in (
        "Write a function.\n\ndef double(x):\n    pass",
        "def other(x):\n    pass",
        "double",
    ):
        e = local(
            write(
                tmp_path / "rows.jsonl", [{"question": question, "tests": "1", "fn_name": "double"}]
            ),
            task="code",
        )[0]
        assert e.program("x = 1") == "x = 1"


MBPP_TESTS = ["assert f('a' ' b') == 1", 'assert f("it\'s") == [2, "c"]']


@pytest.mark.parametrize(
    "spell",
    [list, json.dumps, str, lambda tests: "[" + "\n ".join(map(repr, tests)) + "]"],
    ids=["list", "JSON", "Python", "numpy"],
)
def test_lists_as_tables_hold_them(tmp_path, spell):
    """As a list, or as the text that JSON, Python or pandas (through numpy, without commas) writes into a CSV file."""
    row = {
        "prompt": "Write f.",
        "code": "def f(x):\n    pass\n",
        "test": "assert f(1) == 2",
        "task_id": 1,
    }
    e = load(
        "mbppplus", file=write(tmp_path / "rows.jsonl", [row | {"test_list": spell(MBPP_TESTS)}])
    )[0][0]
    assert e.question.splitlines()[-2:] == MBPP_TESTS and e.fn_name == "f"
    row = {
        "question": "?",
        "tests": spell(MBPP_TESTS),
        "test_setup_code": "x = 1",
        "test_imports": spell(["import math"]),
    }
    assert local(write(tmp_path / "rows.jsonl", [row]), task="code")[0].tests == [
        "\n".join(["import math", "x = 1", *MBPP_TESTS])
    ]
    row = {"question": "Which?", "answer": "no's", "options": spell(["yes", "no's"])}
    e = local(write(tmp_path / "rows.jsonl", [row]), task="choice")[0]
    assert e.question.startswith("Which?\nA. yes\nB. no's\n") and e.gold == "B"


COPIES = {
    "math500": {"problem": "p", "answer": "1", "unique_id": "u"},
    "aime26": {"problem": "p", "answer": 1, "problem_idx": 1},
    "gpqa": {
        "Record ID": "r",
        "Question": "q",
        "Correct Answer": "a",
        "Incorrect Answer 1": "b",
        "Incorrect Answer 2": "c",
        "Incorrect Answer 3": "d",
    },
    "medqa": {"idx": 1, "query": "q", "options": ["a", "b"], "answer": "a"},
    "mbppplus": MBPP[0],
    "livecodebench": livecodebench(1, 1, packed, "def g(x):", "g"),
    "hotpotqa": {"id": "i", "question": "q", "answer": "a"},
    "bamboogle": {"Question": "q", "Answer": "a"},
    "gsm8k": GSM8K[0],
    "humaneval": HUMANEVAL[0],
    "math": {"id": 1, "question": "q", "answer": "a"},
    "choice": {"id": 1, "question": "q", "options": ["a", "b"], "answer": "a"},
    "code": {
        "id": 1,
        "question": "q",
        "answer": "a",
        "tests": ["assert f(1) == 2"],
        "fn_name": "f",
        "test_imports": ["import math"],
        "test_setup_code": "x = 1",
    },
}


@pytest.mark.parametrize(
    "name, ours, theirs",
    [
        ("gpqa", "question", "Question"),
        ("gpqa", "answer", "Correct Answer"),
        ("mbppplus", "question", "prompt"),
        ("mbppplus", "answer", "code"),
        ("mbppplus", "tests", "test"),
        ("livecodebench", "question", "question_content"),
        ("bamboogle", "answer", "Answer"),
    ],
)
def test_the_advice_on_a_column_works(tmp_path, name, ours, theirs):
    """Whatever the benchmark calls it, the name to give is ours."""
    whole = load_dataset(name, write(tmp_path / "whole.jsonl", [COPIES[name]]), warn=no_op)
    row = {("Spalte" if key == theirs else key): cell for key, cell in COPIES[name].items()}
    file = write(tmp_path / "renamed.jsonl", [row])
    with pytest.raises(InputError, match=f"no column '{theirs}'.*as in {ours}=COLUMN"):
        load_dataset(name, file, warn=no_op)
    (found,) = load_dataset(name, file, columns={ours: "Spalte"}, warn=no_op)
    assert (found.question, found.gold) == (whole[0].question, whole[0].gold)
    if name != "livecodebench":  # its tests are read from the file
        assert found == whole[0]


@pytest.mark.parametrize(
    "name, column",
    [
        ("gpqa", "Incorrect Answer 2"),
        ("mbppplus", "test_list"),
        ("livecodebench", "starter_code"),
    ],
)
def test_a_column_that_cannot_be_named(tmp_path, name, column):
    row = {key: cell for key, cell in COPIES[name].items() if key != column}
    with pytest.raises(InputError, match=f"no column '{column}'.*that is meant this name$"):
        load_dataset(name, write(tmp_path / "rows.jsonl", [row]), warn=no_op)


MISSING = object()
ODD = [
    None,
    7,
    0.5,
    True,
    float("nan"),
    "",
    " ",
    "null",
    "[",
    "{",
    "[]",
    "{}",
    "[1, 2]",
    "['a']",
    "{'a': [1]}",
    "['a' 'b']",
    '["\\ud83d", "b"]',
    "{1, 2}",
    "[b'a']",
    "[" * 10000,
    [],
    [None],
    [1],
    [[]],
    ["a", 7],
    [{}],
    {},
    {"a": 1},
    {"func_name": 7},
    {"func_name": ["g"]},
    {"inputs": None, "outputs": 1},
    {"inputs": [None], "outputs": [None], "fn_name": 7},
    '{"fn_name": 7}',
    MISSING,
]


@pytest.mark.parametrize("name", COPIES)
def test_no_cell_ends_in_a_traceback(tmp_path, name):
    """Each cell is replaced by each odd value: the row is read, left out, or refused with one message."""
    task, rows = (
        (name, "rows.jsonl") if name in ("math", "choice", "code") else (None, "copy.jsonl")
    )
    for column in COPIES[name]:
        for odd in ODD:
            cells = {
                key: odd if key == column else value
                for key, value in COPIES[name].items()
                if key != column or odd is not MISSING
            }
            file = write(tmp_path / rows, [cells, COPIES[name]])
            try:
                source = (
                    {"name": str(file), "task": task} if task else {"name": name, "file": str(file)}
                )
                examples = load_dataset(**source, warn=no_op)
                for example in examples:
                    example.question.encode()
                    example.tests() if callable(example.tests) else None
            except InputError as e:
                assert "\n" not in str(e), (column, odd)


@pytest.mark.parametrize(
    "column, odd, complaint",
    [
        ("test_list", "'a'", "test_list is .*expected a list of asserts"),
        ("test_list", [1], "test_list is .*expected a list of"),
        ("metadata", None, None),
        ("metadata", "{}", None),
        ("metadata", "[]", "metadata are .*expected an object"),
        ("metadata", [1], "metadata are .*expected an object"),
        ("metadata", "x", "metadata are "),
        ("tests", {"inputs": ["'a'"], "outputs": ["1"]}, "is not readable JSON"),
        ("tests", {"inputs": ["[" * 10000], "outputs": ["1"]}, "is not readable JSON"),
        ("tests", {"inputs": ['{"a": 1, "a": 2}'], "outputs": ["1"]}, "has the key .* twice"),
        ("tests", "[]", "holds no question"),
        ("fn_name", "f()", "no name of a function"),
        ("options", "['a']", "expected a list of 2 to 26"),
        ("options", [None, "x"], "holds no question"),
        ("options", [{}, "a"], "an option holds a dict"),
    ],
)
def test_cells_that_are_refused(tmp_path, column, odd, complaint):
    name = {"test_list": "mbppplus", "metadata": "livecodebench", "options": "medqa"}.get(
        column, "code"
    )
    file = write(tmp_path / "rows.jsonl", [COPIES[name] | {column: odd}])
    read = (
        partial(load_dataset, str(file), task="code")
        if name == "code"
        else partial(load_dataset, name, file=str(file))
    )
    if complaint:
        with pytest.raises(InputError, match=complaint):
            read(warn=no_op)
    else:
        assert read(warn=no_op)


def test_livecodebench_without_a_test_that_can_fail(tmp_path):
    """It is left out when the row is read; the private tests are read then only if the public ones show nothing."""
    blank, other = [{"input": "1", "output": " "}], [{"input": "1", "output": "1"}]
    rows = [
        livecodebench(1, n, packed)
        | {"public_test_cases": json.dumps(public), "private_test_cases": private}
        for n, (public, private) in enumerate(
            [
                (blank, packed(json.dumps(other))),
                (blank, packed(json.dumps(blank))),
                ([], ""),
                (other, "damaged, but not read"),
            ]
        )
    ]
    examples, told = load("livecodebench", file=write(tmp_path / "lcb.jsonl", rows))
    assert [e.id for e in examples] == ["1_0", "1_3"] and "2 of 4 rows left out" in told[0]


ROWS = [
    {"problem": "1 + 1?", "solution": "2"},
    {"problem": " ", "solution": "3"},
    {"problem": "2 + 2?", "solution": 4},
    {"problem": "x", "solution": None},
]


@pytest.mark.parametrize(
    "name, content",
    [
        ("rows.json", json.dumps(ROWS)),
        ("rows.json", json.dumps({"data": ROWS})),
        ("rows.jsonl", "\n\n".join(map(json.dumps, ROWS)) + "\r\n"),
        ("rows.csv", "\ufeffproblem,solution\n1 + 1?,2\n ,3\n2 + 2?,4\nx,\n"),
    ],
)
def test_local_files(tmp_path, name, content):
    file = tmp_path / name
    file.write_text(content, encoding="utf-8")
    examples, told = load(str(file), columns={"question": "problem", "answer": "solution"})
    assert [(e.id, e.question, e.gold, e.task) for e in examples] == [
        ("row 1", "1 + 1?", "2", "math"),
        ("row 3", "2 + 2?", "4", "math"),
    ]
    assert len(told) == 1 and re.match(r"2 of 4 rows left out, .*; the first is .*rows", told[0])
    assert re.search(
        f"{name} {'line' if name.endswith('l') else 'row'} 1 has no column 'question', "
        "only problem, solution: say which it is",
        refused(file),
    )


def test_local_choice_and_code(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text('id,q,key\n7,"Which?\nA. x\nB. y",B\n7,"Which?\nA) x\nB) y",(a)\n')
    examples = local(file, task="choice", columns={"question": "q", "answer": "key"})
    assert [(e.id, e.gold) for e in examples] == [("7", "B"), ("row 2", "A")], "ids are unique"
    named = [{"id": name, "question": "q", "answer": "a"} for name in ("x", "x", "row 2")]
    assert [e.id for e in local(write(tmp_path / "ids.jsonl", named))] == ["x", "row 2", "row 3"]
    assert examples[0].question == "Which?\nA. x\nB. y\n\nChoose the correct option (A/B/C/D)."
    assert "options are 'B', expected a list of 2 to 26" in refused(
        file, task="choice", columns={"question": "q", "options": "key", "answer": "key"}
    )
    assert "has no column 'o', only id, q" in refused(
        file, task="choice", columns={"question": "q", "options": "o", "answer": "key"}
    )
    assert "has no column 'number'" in refused(
        file, columns={"question": "q", "answer": "key", "id": "number"}
    )
    rows = write(
        tmp_path / "rows.jsonl",
        [
            {"question": "Double.", "tests": "assert f(1) == 2", "fn_name": "f"},
            {"question": "?", "tests": ""},
            {"question": "?", "tests": " "},
        ],
    )
    assert [(e.question, e.gold, e.tests, e.fn_name) for e in local(rows, task="code")] == [
        ("Double.", "", ["assert f(1) == 2"], "f")
    ]
    write(
        rows,
        [
            {"question": "Add.", "tests": [{"input": "1 2", "output": "3", "testtype": "stdin"}]},
            {"question": "?", "tests": []},
        ],
    )
    assert [e.tests for e in local(rows, task="code")] == [[("1 2", "3")]]
    for tests in (
        [7],
        [{"input": "1"}],
        {"input": "1", "output": "2"},
        [{"input": 1, "output": 2}],
        [None],
        [["assert f(1)"]],
        ["assert f(1)", {"input": "", "output": ""}],
        {"inputs": [["1"]], "outputs": []},
        {"inputs": 1, "outputs": 2},
        [{"input": "1", "output": "2", "testtype": "functional"}],
        {"inputs": [[1]], "outputs": [2], "fn_name": "Solution().f"},
        {"inputs": [7], "outputs": [8], "fn_name": "f"},
    ):
        assert "rows.jsonl line 1: tests are " in refused(
            write(rows, [{"question": "?", "tests": tests}]), task="code"
        )


@pytest.mark.parametrize(
    "name, content, complaint",
    [
        (
            "a.jsonl",
            b'{"question": "q", "answer": "a"}\n{"question": \n',
            "a.jsonl line 2 is not readable JSON",
        ),
        ("a.json", b'[\n{"question": 1,,}]', "double quotes: line 2 column 16 "),
        ("a.json", b"[", "a.json is not readable JSON"),
        ("a.json", b'{"rows": []}', "no column 'question', only rows"),
        ("a.json", b"[7]", "holds '7', expected an object"),
        ("a.json", b"[]", "holds no question"),
        ("a.csv", b"question,answer\nq\n", "a.csv line 2 has more or fewer cells"),
        ("a.csv", b"question,answer\nq,a,b\n", "a.csv line 2 has more or fewer"),
        ("a.csv", b'question,answer\n"q,a\n', "a.csv cannot be read"),
        ("a.csv", b"question,answer\n\xff,a\n", "save it as UTF-8"),
        ("a.jsonl", b'{"question": "\xff"}', "save it as UTF-8"),
        (
            "a.jsonl",
            b'{"question": "\xed\xa0\xbd\xed\xb8\x80"}',
            "save it as UTF-8",
        ),  # two halves of a pair
        ("a.jsonl", b'{"question": ["q"], "answer": 1}', "'question' holds a list, expected text"),
        ("a.jsonl", b"", "holds no question"),
        (
            "a.jsonl",
            b'{"question": "q", "answer": "\\ud83d"}',
            "a.jsonl line 1 is not valid text (a lone",
        ),
        (
            "a.jsonl",
            b'{"question": "q", "answer": ' + b"1" * 5000 + b"}",
            "line 1 is not readable JSON",
        ),
        ("a.jsonl", b"[" * 100000, "a.jsonl line 1 is not readable JSON"),
    ],
)
def test_damaged_files(tmp_path, name, content, complaint):
    (tmp_path / name).write_bytes(content)
    assert complaint in refused(tmp_path / name)


def test_what_cannot_be_asked_for(tmp_path):
    assert re.search(
        "data set 'maths' for task 'math' is not known: "
        "expected one of tiny, math500, .*or a file .json, .jsonl, .csv",
        refused("maths"),
    )
    assert "is not there" in refused(tmp_path / "none.csv") and "is not there" in refused(
        "math500", file=tmp_path
    )
    assert "tasks math, choice, code" in refused(
        "a.csv", task="search"
    ) and "limit is 0" in refused("tiny", limit=0)
    assert "task code is given, but math500 has its own, math: leave it out" in refused(
        "math500", task="code"
    )
    assert "column 'problem' is not known" in refused("tiny", columns={"problem": "question"})


def test_the_data_set_reaches_the_prompts():
    assert STYLES["sequential_light"].questions(["q"], dataset="gpqa")[0].dataset == "gpqa"


# Options and answers


def choices(tmp_path, *rows, **options):
    """(the lines of the question, the letter of the right one) of each row."""
    file = write(tmp_path / "choices.jsonl", [{"question": "Which?"} | row for row in rows])
    return [(e.question.splitlines(), e.gold) for e in local(file, task="choice", **options)]


def golds(tmp_path, *rows, **options):
    return "".join(gold for _, gold in choices(tmp_path, *rows, **options))


WXYZ = ["w", "x", "y", "z"]


@pytest.mark.parametrize(
    "options",
    [
        {"A": "w", "B": "x", "C": "y", "D": "z"},
        {"D": "z", "B": "x", "C": "y", "A": "w"},
        {"a": "w", "b": "x", "c": "y", "d": "z"},
        {"(A)": "w", "(B)": "x", "(C)": "y", "(D)": "z"},
        {"option_a": "w", "option_b": "x", "option_c": "y", "option_d": "z"},
        {"0": "w", "1": "x", "2": "y", "3": "z"},
        {"1": "w", "2": "x", "3": "y", "4": "z"},
        {"A": "w", "B": "x", "C": "y", "D": "z", "E": None, "F": None},  # as Parquet has them
        '{"A": "w", "B": "x", "C": "y", "D": "z"}',
        "{'A': 'w', 'B': 'x', 'C': 'y', 'D': 'z'}",
        {"text": WXYZ, "label": ["A", "B", "C", "D"]},
        {"label": ["1", "2", "3", "4"], "text": WXYZ},
        [{"label": label, "text": text} for label, text in zip("ABCD", WXYZ, strict=True)],
        [{"key": label, "value": text} for label, text in zip("ABCD", WXYZ, strict=True)],
        [{label: text} for label, text in zip("ABCD", WXYZ, strict=True)],
        WXYZ,
        ["A) w", "B) x", "C) y", "D) z"],
        ["A)w", "B)x", "C)y", "D)z"],
        ["(a) w", "(b) x", "(c) y", "(d) z"],
        "A. w\nB. x\nC. y\nD. z",
    ],
)
@pytest.mark.parametrize("answer", ["B", "b", "(B)", "B.", "x", "B. x", "(b) x", "B) x", "B: x"])
def test_forms_of_options_and_answers(tmp_path, options, answer):
    ((lines, gold),) = choices(tmp_path, {"options": options, "answer": answer})
    assert lines[:5] == ["Which?", "A. w", "B. x", "C. y", "D. z"] and gold == "B"
    assert lines[5:] == ["", "Choose the correct option (A/B/C/D)."]


@pytest.mark.parametrize(
    "options",
    [
        ["A - B", "B - A"],
        ["A:B", "B:A"],
        ["1.5", "2.5"],
        ["A. x", "C. y"],
        ["A.", "B."],
        ["A", "B"],
    ],
)
def test_texts_that_look_like_letters(tmp_path, options):
    ((lines, gold),) = choices(tmp_path, {"options": options, "answer": options[1]})
    assert lines[1:3] == [f"A. {options[0]}", f"B. {options[1]}"] and gold == "B"
    rows = [{"options": ["1.5", "2.5"], "answer": answer} for answer in (1, 0)]
    assert golds(tmp_path, *rows) == "BA", "1 is no label of 1.5"


@pytest.mark.parametrize(
    "names", ["a,b,c", "option_a,option_b,option_c", "option_A,option_B,option_C", "opa,opb,opc"]
)
def test_a_column_for_each_option(tmp_path, names):
    file = tmp_path / "rows.csv"
    file.write_text(f"question,{names},answer\nWhich?,w,x,y,B\n")
    (example,) = local(file, task="choice")
    assert example.question.splitlines()[1:4] == ["A. w", "B. x", "C. y"] and example.gold == "B"


def test_columns_of_other_things_are_no_options(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text("a,b\nWhich?,B\n")
    (example,) = local(file, task="choice", columns={"question": "a", "answer": "b"})
    assert "A." not in example.question and example.gold == "B"


def test_options_in_a_column_choices(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"question": "Which?", "choices": ["w", "x"], "answer": "x"}\n')
    (example,) = local(file, task="choice")
    assert example.question.splitlines()[1:3] == ["A. w", "B. x"] and example.gold == "B"


def test_five_options_in_brackets_within_the_question(tmp_path):
    question = "Which?\n(A) v\n(B) w\n(C) x\n(D) y\n(E) z"
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"question": question, "answer": "E"}))
    (example,) = local(file, task="choice")
    assert example.gold == "E" and example.question.endswith("option (A/B/C/D/E).")


def test_columns_that_are_named_as_letters(tmp_path):
    file = tmp_path / "mmlu.csv"
    file.write_text("question,A,B,C,D,E,answer\nWhich?,w,x,y,z,,B\nWhich?,w,x,y,z,v,e\n")
    four, five = local(file, task="choice")
    assert four.question.splitlines()[1:6] == ["A. w", "B. x", "C. y", "D. z", ""]
    assert five.question.splitlines()[5:] == ["E. v", "", "Choose the correct option (A/B/C/D/E)."]
    assert four.gold + five.gold == "BE"


@pytest.mark.parametrize("count", [2, 5, 10, 26])
def test_letters_go_as_far_as_options(tmp_path, count):
    options = [f"option {n}" for n in range(count)]
    last = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[count - 1]
    for answer in last, last.lower(), options[-1], f"{last}. {options[-1]}":
        ((lines, gold),) = choices(tmp_path, {"options": options, "answer": answer})
        assert gold == last and lines[count] == f"{last}. {options[-1]}"
    assert f"/{last})" in lines[-1] or count == 2
    listed = "\n".join(lines[: count + 1])
    ((lines, gold),) = choices(tmp_path, {"question": listed, "answer": last})
    assert gold == last and len(lines) == count + 3


def test_an_answer_beyond_d_is_graded(tmp_path):
    """A letter counts as an answer as far as the question lists options."""
    row = {"question": "Which?", "options": list("vwxyz"), "answer": "z"}
    (example,) = local(write(tmp_path / "five.jsonl", [row]), task="choice")
    texts = [rf"\boxed{{{letter}}}" for letter in "AEFe"]
    record = graded({"texts": texts}, example, ["choice"])
    assert record["answers"] == ["A", "E", None, "E"]
    assert record["right"] == {"choice": [False, True, False, True]}
    system = minimas.load_mas_system("tiny", device="cpu")
    system.task = "choice"
    assert system.answer_in(texts[1], Question(example.question)) == "E"
    assert system.answer_in(texts[1], Question("Which?\nA. v\nB. w")) is None


@pytest.mark.parametrize(
    "answers, letters",
    [
        ([0], "A"),
        ([4], "D"),
        ([1, 0], "BA"),
        ([1, 4], "AD"),
        (["2", "0"], "CA"),
        ([2.0, 0.0], "CA"),  # as pandas writes a column with gaps
        (["B", 0], "BA"),
    ],
)
def test_answers_that_are_numbers(tmp_path, answers, letters):
    """They count options from 0 or from 1, whichever fits all rows."""
    rows = [{"options": WXYZ, "answer": answer} for answer in answers]
    assert golds(tmp_path, *rows) == letters
    assert golds(tmp_path, *rows, limit=1) == letters[0], "other rows say so, read or not"


NUMBERS = ["1", "2", "3", "4"]


@pytest.mark.parametrize(
    "rows, letters",
    [
        ([(NUMBERS, "2")], "B"),  # a text like the options
        ([([1, 2, 3, 4], 2)], "B"),
        ([(["5", "2"], "5")], "A"),
        ([(NUMBERS, 2), (WXYZ, 0)], "CA"),
        ([(NUMBERS, "2"), (WXYZ, "4")], "BD"),
        ([(NUMBERS, 2), (["10", "12"], 12)], "BB"),
        ([(["1", "0"], 1), (["0", "1"], 0)], None),  # texts, or counted from 0
        ([({"1": "w", "2": "x"}, 1)], "A"),  # the names of the options
        ([(["1. w", "2. x"], "2")], "B"),
        ([(["9", "8", "2", "7"], 2), (WXYZ, 0)], "CA"),
    ],
)
def test_numbers_that_may_be_texts(tmp_path, rows, letters):
    rows = [{"options": options, "answer": answer} for options, answer in rows]
    if letters:
        assert golds(tmp_path, *rows) == letters
    else:
        with pytest.raises(InputError, match="names no option for certain"):
            golds(tmp_path, *rows)


@pytest.mark.parametrize(
    "options, answer, complaint",
    [
        (WXYZ, 1, r"the answer 1 names no option .*B \(counted from 0\) or A \(counted from 1\)"),
        (NUMBERS, 2, r"the answer 2 names no option .*B \(its text\) or C \(counted from 0\)"),
        (WXYZ, 5, "the answer '5' is not the letter, the text or the number of just one of"),
        (WXYZ, -1, "the answer '-1' is not the letter"),
        (["B", "A"], "B", "the answer 'B' is not the letter, the text"),
        (["w", "w"], "w", "the answer 'w' is not"),
        (WXYZ, "B. y", "the answer 'B. y' is not"),
        ({"A": "w", "C": "x"}, "A", "options are named A, C, expected A, B, C, ... or numbers"),
        ({"A": "w", "a": "x"}, "A", "options are named A, a, expected"),
        ({"x": "w", "y": "x"}, "x", "options are named x, y, expected"),
        ('{"A": "w", "A": "x", "B": "y"}', "A", "column 'options' has the key 'A' twice"),
        ("{'A': 'w', 'A': 'x', 'B': 'y'}", "A", "column 'options' has the key 'A' twice"),
        ({"A": "w"}, "A", "options are .*, expected a list of 2 to 26 texts"),
        ([str(n) * 2 for n in range(27)], "A", "options are .*, expected a list of 2 to 26 texts"),
        ("w or x", "A", "options are .*, expected a list of 2 to 26 texts"),
        ({"text": WXYZ, "label": ["A"]}, "A", "options are .*, expected a list of 2 to 26 texts"),
    ],
)
def test_options_that_are_not_plain(tmp_path, options, answer, complaint):
    with pytest.raises(InputError, match=f"choices.jsonl line 1: {complaint}"):
        choices(tmp_path, {"options": options, "answer": answer})


def test_numbers_that_contradict_each_other(tmp_path):
    rows = [{"options": WXYZ, "answer": answer} for answer in (0, 4)]
    with pytest.raises(InputError, match="line 1: .* other rows count options from another number"):
        golds(tmp_path, *rows)


# Identity


@pytest.mark.parametrize(
    "given, ids",
    [
        (["x", "x", "x"], ["x", "row 2", "row 3"]),
        ([1, "1", 2], ["1", "row 2", "2"]),
        (["row 3", "x", "x"], ["row 3", "x", "row 3 (2)"]),
        (["row 3", "row 3 (2)", "row 3"], ["row 3", "row 3 (2)", "row 3 (3)"]),
        ([None, "row 1", ""], ["row 1", "row 2", "row 3"]),
    ],
)
def test_ids_are_unique(tmp_path, given, ids):
    rows = [{"id": own, "question": "q", "answer": "a"} for own in given]
    file = write(tmp_path / "rows.jsonl", rows)
    assert [e.id for e in local(file)] == ids
    assert [e.id for e in local(file, limit=2)] == ids[:2], "and do not depend on later rows"


# Keys that stand twice in what a cell spells


@pytest.mark.parametrize(
    "column, text",
    [
        ("tests", '{"inputs": [[1]], "outputs": [2], "outputs": [3], "fn_name": "f"}'),
        ("tests", "{'inputs': [[1]], 'outputs': [2], 'outputs': [3], 'fn_name': 'f'}"),
        ("tests", '[{"input": "1", "output": "2", "output": "3", "testtype": "functional"}]'),
        ("tests", '[{"input": "{\\"a\\": 1, \\"a\\": 2}", "output": "2"}]'),
        ("public_test_cases", '[{"input": "1", "input": "2", "output": "3"}]'),
        ("metadata", '{"func_name": "f", "func_name": "g"}'),
    ],
)
def test_a_key_that_stands_twice_in_a_cell(tmp_path, column, text):
    name = "code" if column == "tests" else "livecodebench"
    row = {key: cell for key, cell in COPIES[name].items() if not key.startswith("test_")}
    file = write(tmp_path / "rows.jsonl", [row | {column: text}])
    with pytest.raises(InputError, match="rows.jsonl line 1: .*the key '.*' .*twice"):
        if name == "code":
            load_dataset(str(file), task="code")
        else:
            load_dataset(name, file=str(file))


def test_a_key_that_stands_twice_in_private_tests(tmp_path):
    tests = '[{"input": "1", "output": "2", "output": "3"}]'
    row = livecodebench(1, 1, lambda _: packed(tests))
    (example,) = load("livecodebench", file=write(tmp_path / "lcb.jsonl", [row]))[0]
    with pytest.raises(InputError, match="private_test_cases has the key 'output' twice"):
        example.tests()


def test_livecodebench_in_a_folder(tmp_path):
    """All of its files are read if the folder has them; else the folder must hold one data file."""
    names = BENCHMARKS["livecodebench"]["files"]
    for number, name in enumerate(names):
        write(tmp_path / name, [livecodebench(number, 1, packed)])
    examples = load("livecodebench", file=tmp_path)[0]
    assert [e.id for e in examples] == [f"{number}_1" for number in range(len(names))]
    (tmp_path / names[-1]).unlink()
    assert "is a folder with 5 files of rows" in refused("livecodebench", file=tmp_path)
