"""Rows of local files, read by what a file holds and not by its name, for evaluation and for training."""

import gzip
import json

import pytest

from minimas import STYLES, InputError
from minimas.evaluate.benchmarks import load_dataset
from minimas.train.examples import load_examples

ROWS = [{"question": "1+1?", "answer": "2"}, {"question": "2+2?", "answer": "4"}]
PAIRS = [("1+1?", "2"), ("2+2?", "4")]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def evaluated(file, columns=None):
    """(question, answer) of each row, as evaluation reads them."""
    examples = load_dataset(str(file), columns=columns, warn=lambda message: None)
    return [(example.question, example.gold) for example in examples]


def trained(file, columns=None):
    """The same, as training reads them."""
    columns = {"summarizer" if name == "answer" else name: c for name, c in (columns or {}).items()}
    examples = load_examples(str(file), STYLES["mixture"], ["summarizer"], columns)
    return [(example.question.text, *example.texts["summarizer"]) for example in examples]


@pytest.fixture(params=[evaluated, trained], ids=["evaluation", "training"])
def read(request):
    return request.param


def write(folder, name, content):
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


def write_parquet(file, rows):
    pytest.importorskip("pyarrow")
    from pyarrow import Table, parquet

    parquet.write_table(Table.from_pylist(rows), file)
    return file


# A column or a key twice


@pytest.mark.parametrize(
    "name, content, complaint",
    [
        (
            "a.csv",
            "question,answer,answer\nq,1,2\n",
            "a.csv line 1 names the column 'answer' twice",
        ),
        ("a.csv", 'question, answer,"answer "\nq,1,2\n', "line 1 names the column 'answer' twice"),
        ("a.csv", "question,answer,\ufeffanswer\nq,1,2\n", "names the column 'answer' twice"),
        ("a.csv", "note,question,answer,note\n,q,1,\n", "names the column 'note' twice"),
        ("a.tsv", "question\tanswer\tquestion\nq\t1\tr\n", "names the column 'question' twice"),
        (
            "a.csv",
            "question,answer,Answer \nq,1,2\n",
            r"a.csv row 1 has the column 'answer' twice, spelled 'answer' and 'Answer'.*--columns",
        ),
        (
            "a.jsonl",
            '{"question": "q", "answer": 1}\n{"question": "q", "answer": 1, "answer": 2}\n',
            "a.jsonl line 2 has the key 'answer' twice in one object, for 1 and 2",
        ),
        (
            "a.jsonl",
            '{"question": "q", "answer": "a", "x": [{"y": {"k": 1, "k": 1}}]}\n',
            "a.jsonl line 1 has the key 'k' twice",
        ),
        (
            "a.json",
            '[{"question": "q", "answer": 1}, {"question": "q", "x": {"k": 1, "k": 2}}]',
            "a.json row 2 has the key 'k' twice",
        ),
        ("a.json", '{"data": [{"question": "q", "answer": 1}], "data": []}', "key 'data' twice"),
        (
            "a.json",
            '{"data": [{"question": "q", "answer": 1}], "x": {"k": 1, "k": 2}}',
            "'k' twice",
        ),
        (
            "a.jsonl",
            '{"question": "q", "answer": 1, "\\u0061nswer": 2}\n',
            "key 'answer' twice",
        ),
        ("a.jsonl", '{"question": "q", "answer": 1, "ANSWER": 2}\n', "'answer' and 'ANSWER'"),
        ("a.jsonl", '{"question": "q", "answer": 1, " answer": 2}\n', "'answer' and ' answer'"),
    ],
)
def test_a_column_that_stands_twice(tmp_path, read, name, content, complaint):
    with pytest.raises(InputError, match=complaint):
        read(write(tmp_path, name, content))


def test_a_column_of_parquet_that_stands_twice(tmp_path, read):
    pytest.importorskip("pyarrow")
    from pyarrow import array, parquet, table

    file = tmp_path / "a.parquet"
    columns = [array(["q"]), array(["1"]), array(["2"])]
    parquet.write_table(table(columns, names=["question", "answer", "answer"]), file)
    with pytest.raises(InputError, match="a.parquet names the column 'answer' twice"):
        read(file)


def test_columns_that_nobody_confuses(tmp_path, read):
    """Columns without a name, as spreadsheets add them, and a second spelling if the user says which one it is."""
    assert read(write(tmp_path, "a.csv", ",question,answer,,\n0,1+1?,2,,\n")) == PAIRS[:1]
    file = write(tmp_path, "b.jsonl", '{"question": "1+1?", "answer": "2", "Answer": "3"}\n')
    assert read(file, {"answer": "answer"}) == PAIRS[:1]
    assert read(file, {"answer": "Answer"}) == [("1+1?", "3")]


# Files under another name


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.json", LINES),
        ("a.json", "\ufeff\n" + LINES),
        ("a.txt", LINES),
        ("a", LINES),
        ("a.csv", LINES),
        ("a.parquet", LINES),
        ("a.JSONL", LINES),
        ("a.NdJson", LINES),
        ("a.jsonl", json.dumps(ROWS)),
        ("a.jsonl", json.dumps(ROWS, indent=1)),
        ("a.jsonl", json.dumps({"data": ROWS}, indent=1)),
        ("a.csv", json.dumps(ROWS)),
        ("a.txt", json.dumps(ROWS)),
        ("a.JSON", json.dumps({"data": ROWS})),
        ("a.Csv", "question,answer\n1+1?,2\n2+2?,4\n"),
        ("a.tsv", "question\tanswer\n1+1?\t2\n2+2?\t4\n"),
        ("a.csv", "question,answer\n1+1?,2\n,\n2+2?,4\n , \n,,,\n"),
        ("a.csv", "question\tanswer\n1+1?\t2\n2+2?\t4\n"),
        ("a.csv", '"question";"answer"\r\n1+1?;2\r\n2+2?;4\r\n'),
        ("a.csv", "question|answer\n1+1?|2\n2+2?|4\n"),
        ("a.csv", "question,answer\r1+1?,2\r2+2?,4\r"),
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)),
        ("a.jsonl", gzip.compress(LINES.encode(), mtime=0)),
        ("a.json.gz", gzip.compress(json.dumps(ROWS).encode(), mtime=0)),
        ("a.CSV.GZ", gzip.compress(b"question,answer\n1+1?,2\n2+2?,4\n", mtime=0)),
    ],
)
def test_a_file_is_read_by_what_it_holds(tmp_path, read, name, content):
    assert read(write(tmp_path, name, content)) == PAIRS


@pytest.mark.parametrize("cell", ["z", 3, None, [1, 2], ["a"], []])
def test_one_row_with_a_column_data(tmp_path, read, cell):
    file = write(tmp_path, "a.json", json.dumps(ROWS[0] | {"data": cell}))
    assert read(file) == PAIRS[:1]
    assert read(write(tmp_path, "b.json", json.dumps({"data": ROWS[0]}))) == PAIRS[:1]


def test_rows_under_data_may_have_other_keys_beside_them(tmp_path, read):
    for data in (ROWS, ROWS[0]):
        file = write(tmp_path, "a.json", json.dumps({"version": 1, "data": data}))
        assert read(file) == PAIRS[: len(data) if data is ROWS else 1]


def test_a_list_alone_under_data_holds_rows(tmp_path, read):
    with pytest.raises(InputError, match="row 1 holds '1', expected an object"):
        read(write(tmp_path, "a.json", '{"data": [1, 2]}'))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_value_that_is_no_object(tmp_path, read, name):
    with pytest.raises(InputError, match="holds 'None', expected an object with named columns"):
        read(write(tmp_path, name, "null\n"))


@pytest.mark.parametrize("name", ["a.parquet", "A.PARQUET", "a.json", "a.csv", "a"])
def test_a_local_parquet_file(tmp_path, read, name):
    assert read(write_parquet(tmp_path / name, ROWS)) == PAIRS


def test_parquet_without_pyarrow(tmp_path, read, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    file = write(tmp_path, "a.json", b"PAR1 and more")
    with pytest.raises(InputError, match=r"a.json .*needs pyarrow: pip install 'minimas\[data\]'"):
        read(file)


def test_a_folder_with_one_data_file(tmp_path, read):
    write(tmp_path, "README.md", "about")
    write(tmp_path, "LICENSE.txt", "terms")
    write(tmp_path, "dataset_info.json", "{}")
    write(tmp_path, ".cache/a.json", "{}")
    with pytest.raises(InputError, match="is a folder, and a file of rows is not there"):
        read(tmp_path)
    write(tmp_path, "data/train.JSONL", LINES)
    assert read(tmp_path) == PAIRS
    write(tmp_path, "b.csv", "question,answer\n")
    with pytest.raises(
        InputError, match=r"2 files of rows \(b.csv, data.train.JSONL\), expected one"
    ):
        read(tmp_path)


def test_a_folder_with_the_parts_of_a_file(tmp_path, read):
    write(tmp_path, "data/train-00000-of-00002.jsonl", LINES.splitlines()[0])
    with pytest.raises(InputError, match="expected one, or all parts of one"):
        read(tmp_path)
    write(tmp_path, "data/train-00001-of-00002.jsonl", LINES.splitlines()[1])
    assert read(tmp_path) == PAIRS
    write(tmp_path, "data/test-00000-of-00001.jsonl", LINES)
    with pytest.raises(InputError, match="is a folder with 3 files of rows"):
        read(tmp_path)


@pytest.mark.parametrize(
    "name, content, complaint",
    [
        ("a.txt", "question,answer\nq,1\n", "a.txt begins with 'question,answer'.*name it .csv"),
        ("a.json", "question,answer\nq,1\n", "a.json begins with 'question,answer'.*name it .csv"),
        ("a.jsonl", "question,answer\nq,1\n", "a.jsonl begins with .*name it .csv or .tsv"),
        ("a.json", '{\n"question": 1}\n{\n"question": 2}\n', "a second value follows the first"),
        (
            "a.csv",
            b"PK\x03\x04...",
            "a.csv is a ZIP archive or a sheet of a spreadsheet.*save it as",
        ),
        ("a.json", "<!DOCTYPE html>", "a.json is a web page.*fetch the file itself"),
        ("a.jsonl", "version https://git-lfs.github.com/spec/v1", "is a pointer of Git LFS"),
        ("a.csv", "question,answer\n".encode("utf-16"), "is text in UTF-16.*save it as UTF-8"),
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)[:-9], "a.jsonl.gz cannot be read"),
    ],
)
def test_a_file_that_is_something_else(tmp_path, read, name, content, complaint):
    with pytest.raises(InputError, match=complaint):
        read(write(tmp_path, name, content))


def test_a_damaged_parquet_file(tmp_path, read):
    pytest.importorskip("pyarrow")
    with pytest.raises(InputError, match="a.parquet cannot be read .*make it again"):
        read(write(tmp_path, "a.parquet", b"PAR1nothing"))


# Quotes


@pytest.mark.parametrize(
    "cells, pair",
    [
        ('2, "x"', ("2", "x")),
        ('2,\t"x" ', ("2", "x")),
        (' "2" , "x"', ("2", "x")),
        ('2, "x, y"', ("2", "x, y")),
        ('2, "say ""x"""', ("2", 'say "x"')),
        ('2, "x\ny"', ("2", "x\ny")),
        ('2,"x"', ("2", "x")),
        ('2, "Emma" by Austen', ("2", '"Emma" by Austen')),  # a cell of text as it stands
        ('2,5" and 6"', ("2", '5" and 6"')),
        ("2,'x'", ("2", "'x'")),
    ],
)
@pytest.mark.parametrize("delimiter", [",", ";"])
def test_quotes_with_blanks_around_them(tmp_path, read, cells, pair, delimiter):
    text = f"question,answer\n{cells}\n".replace(",", delimiter)
    expected = [tuple(text.replace(",", delimiter) for text in pair)]
    assert read(write(tmp_path, "a.csv", text)) == expected


@pytest.mark.parametrize("cell", [' "x', '"x', '"x" y', '"x"y"', ' "x, y" z', ' "x" "'])
def test_quotes_that_do_not_end_a_cell(tmp_path, read, cell):
    file = write(tmp_path, "a.csv", f"question,answer\n1,2\n3,{cell}\n")
    with pytest.raises(
        InputError, match="a.csv cannot be read: line 3 has a cell that begins with"
    ):
        read(file)


def test_the_line_of_a_row_that_does_not_fit(tmp_path, read):
    file = write(tmp_path, "a.csv", 'question,answer\n"a\nb",2\n\n3,x, y\n')
    with pytest.raises(InputError, match="a.csv line 5 has more or fewer cells.*3 and not 2"):
        read(file)


def test_blanks_of_cells_without_quotes_stay(tmp_path):
    file = write(tmp_path, "a.csv", "question,answer\n  1+1? , 2\n")
    assert evaluated(file) == [("  1+1? ", "2")]


@pytest.mark.parametrize("text", ["null", "NaN", "inf"])
def test_a_text_of_json_is_a_text(read, text, tmp_path):
    """In a table it is what programs write where there is no value, so that its row has no answer."""
    row = {"question": "q", "answer": text, "summarizer": text}
    other = {"question": "p", "answer": "1", "summarizer": "1"}
    lines = "".join(json.dumps(one) + "\n" for one in (row, other))
    assert read(write(tmp_path, "a.jsonl", lines)) == [("q", text), ("p", "1")]
    if read is evaluated:
        assert read(write(tmp_path, "a.csv", f"question,answer\nq,{text}\np,1\n")) == [("p", "1")]
