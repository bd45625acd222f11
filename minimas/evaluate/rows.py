"""Where rows come from: local .json, .jsonl and .csv files, files on the hub, or the hub's Parquet export of a data set.

Rows are read one at a time. A file on the hub is downloaded when its first row is asked for.
"""

import ast
import csv
import io
import json
import tokenize
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

from ..common import InputError, parse_json

NO_VALUE = "", "null", "nan", "NaN", "inf", "-inf"  # of a number, as programs write it
PARQUET = "refs/convert/parquet"  # the revision under which the hub keeps its Parquet export of every data set


@dataclass(frozen=True)
class Row:
    """A row, and its place in the data. Its accessors take our names for columns, which `columns` translates."""

    cells: dict
    file: str | Path  # or the data set
    number: int  # from 1: of the row, or in a .jsonl file of its line
    columns: dict  # {our name: its name in the file}, for those that differ
    offset: int | None = None  # of its line in a .jsonl file, in bytes

    def __str__(self):
        return f"{self.file} {'row' if self.offset is None else 'line'} {self.number}"

    def cell(self, name, required=True):
        """The value of a column, as it is; InputError if there is no such column; None if it need not be there.

        A column that the user named is always required.
        """
        column = self.columns.get(name, name)
        if column in self.cells or not required and name not in self.columns:
            return self.cells.get(column)
        raise InputError(
            f"{self} has no column {column!r}, only {', '.join(self.cells) or 'an empty row'}: "
            f"say which it is, as in {name}=COLUMN"
        )

    def text(self, name, required=True):
        """The text of a column, "" if it is blank or no value; InputError if it holds a list or an object."""
        return text_of(self.cell(name, required), f"{self}: column {name!r}")

    def value(self, name, required=True):
        """The list or object of a column, also if a text spells it, as in CSV files; else its text as in `text`."""
        cell = self.cell(name, required)
        if isinstance(cell, str) and cell.lstrip()[:1] in ("[", "{"):  # "" is neither
            with suppress(InputError):
                return parse_json(cell, self)
            with suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
                return literal(cell.strip())
        return cell if isinstance(cell, (list, dict)) else self.text(name, required)


def text_of(value, what):
    """The text that a cell is, "" if it is blank or no value; InputError if it is a list or an object."""
    if isinstance(value, (list, dict)):
        raise InputError(f"{what} holds a {type(value).__name__}, expected text or a number")
    if value is None or str(value).strip() in NO_VALUE:
        return ""
    return (
        f"{Decimal(str(value)):f}" if isinstance(value, (float, Decimal)) else str(value)
    )  # 0.00001, not 1e-05


def literal(text):
    """The value of a Python literal; ValueError, TypeError and others if there is none that JSON could hold, too.

    numpy prints a list without commas, so that Python would join its texts.
    """
    value = ast.literal_eval(text)
    json.dumps(value, ensure_ascii=False).encode()
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        return value
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return [ast.literal_eval(token.string) for token in tokens if token.type == tokenize.STRING]


# Files


def file_rows(file, columns):
    """Yield the Rows of a local file; InputError says where it is damaged."""
    if file.suffix not in FILE_READERS or not file.is_file():
        raise InputError(
            f"{file} is not there, or not one of {', '.join(FILE_READERS)}: give a file of rows"
        )
    try:
        for row in FILE_READERS[file.suffix](file, columns):
            if not isinstance(row.cells, dict):
                raise InputError(
                    f"{row} holds {str(row.cells)[:40]!r}, expected an object with named columns"
                )
            yield row
    except (UnicodeDecodeError, csv.Error, OSError) as e:
        raise InputError(f"{file} cannot be read ({e}): save it as UTF-8, or fetch it again") from e


def jsonl_rows(file, columns):
    """Rows of a file with a JSON object per line."""
    with open(file, "rb") as lines:
        for n, line in enumerate(lines, 1):
            if line.strip():
                yield Row(
                    parse_json(line, f"{file} line {n}"), file, n, columns, lines.tell() - len(line)
                )


def json_rows(file, columns):
    """Rows of a JSON file: a list of objects, or one under "data"."""
    rows = parse_json(file.read_bytes(), file)
    rows = rows.get("data", rows) if isinstance(rows, dict) else rows
    return (
        Row(cells, file, n, columns)
        for n, cells in enumerate(rows if isinstance(rows, list) else [rows], 1)
    )


def csv_rows(file, columns):
    """Rows of a CSV file whose first line names the columns."""
    csv.field_size_limit(
        2**30
    )  # bytes: explanations in GPQA may be longer than the default of 128 KiB
    with open(file, newline="", encoding="utf-8-sig") as lines:
        for n, cells in enumerate(reader := csv.DictReader(lines, strict=True), 1):
            if None in cells or None in cells.values():
                raise InputError(
                    f"{file} line {reader.line_num} has more or fewer cells than the header: correct it"
                )
            yield Row(cells, file, n, columns)


FILE_READERS = {".json": json_rows, ".jsonl": jsonl_rows, ".csv": csv_rows}


# The hub


def parquet_rows(repository, config, split):
    """Yield the rows of a split as dicts, in order, from the hub's Parquet export of a data set.

    Raises InputError if pyarrow is not installed, or the split cannot be fetched, is not exported whole, or is damaged.
    """
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as e:
        raise InputError(
            f"{repository} is read from Parquet files, which needs pyarrow: pip install 'minimas[data]', "
            "or give a local file of the same columns"
        ) from e
    pattern = f"{config}/{split}/*.parquet"  # what is exported in part only is named partial-SPLIT
    files = sorted(downloaded(repository, pattern, PARQUET).glob(pattern))
    if not files:
        raise InputError(
            f"the hub's Parquet export of {repository} has no files {pattern}: the split is not there, or "
            "too large to be exported whole; give a local file of the same columns"
        )
    for file in files:
        try:
            with parquet.ParquetFile(file) as table:
                for batch in table.iter_batches(batch_size=100):
                    yield from batch.to_pylist()
        except (ArrowException, OSError, UnicodeDecodeError) as e:
            why = " ".join(str(e).split())  # some of pyarrow's messages have several lines
            raise InputError(
                f"{file} cannot be read ({why}): delete it, and it is fetched again"
            ) from e


def downloaded(repository, pattern, revision):
    """The local folder with the files of a data set on the hub that match a pattern."""
    from ..load import download  # here, because it brings torch along: a local file needs none

    return download(repository, [pattern], repo_type="dataset", revision=revision)
