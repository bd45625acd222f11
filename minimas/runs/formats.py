"""The records of a data file, by what the file holds rather than by its name.

JSON lines    an object on each line
JSON          a list of objects, one object, or either under "data"
table         lines of cells with names in the first: commas, semicolons, tabs or bars between them
Parquet       with pyarrow

All but Parquet may be compressed with gzip. What cannot be told apart by its first bytes goes by the name of the file.
A key or column that stands twice is refused, because a reader could only guess which of the two is meant.
"""

import gzip
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from ..common import (
    InputError,
    Repeated,
    first_repeated,
    parse_unique,
    parse_with_repeated,
    twice,
)

TABLES = (".csv", ".tsv")
LINES = (".jsonl", ".ndjson")
SUFFIXES = (".json", ".jsonl", ".csv", ".ndjson", ".tsv", ".parquet")  # each also before .gz
COMPRESSED = b"\x1f\x8b"  # the first bytes of a gzip file
PARQUET = b"PAR1"  # and of a Parquet file
BOM = "\ufeff"
JSON_BEGINS = (b"[", b"{")
OTHERS = {  # the first bytes of files that are not read: (what they are, what to do)
    b"PK\x03\x04": ("a ZIP archive or a sheet of a spreadsheet", "unpack it, or save it as .csv"),
    b"BZh": ("compressed with bzip2", "unpack it"),
    b"\xfd7zXZ": ("compressed with xz", "unpack it"),
    b"\x28\xb5\x2f\xfd": ("compressed with Zstandard", "unpack it"),
    b"ARROW1": ("an Arrow file", "save it as .parquet or .jsonl"),
    b"\xff\xff\xff\xff": ("an Arrow stream", "save it as .parquet or .jsonl"),
    b"SQLite format 3": ("a database", "save a table of it as .csv or .jsonl"),
    b"\xff\xfe": ("text in UTF-16", "save it as UTF-8"),
    b"\xfe\xff": ("text in UTF-16", "save it as UTF-8"),
    b"version https://git-lfs": ("a pointer of Git LFS", "fetch the file itself (git lfs pull)"),
    b"<!DOCTYPE": ("a web page", "fetch the file itself"),
    b"<!doctype": ("a web page", "fetch the file itself"),
    b"<html": ("a web page", "fetch the file itself"),
}

NO_VALUE = ("null", "nan", "NaN", "inf", "-inf")  # of a number, as programs write it into a table


class Record(NamedTuple):
    """What a file holds of a row, and where."""

    cells: Any  # a dict, if the file is right
    number: int  # from 1: of the row, or of its line
    unit: str = "row"  # or line
    offset: int | None = None  # of its line in bytes, if it can be found again by that


def suffix_of(file: Path) -> str:
    """The suffix in lower case, of rows.JSONL.gz .jsonl."""
    names = [suffix.lower() for suffix in file.suffixes]
    if names[-1:] == [".gz"]:
        names.pop()
    return names[-1] if names else ""


def read_records(file: Path) -> Iterator[Record]:
    """Yield the records of a file; InputError says what the file is, or where it is damaged."""
    kind = kind_of(file)
    if kind == "parquet":
        return parquet_records(file)
    if kind == "lines":
        return line_records(file)
    return json_records(file) if kind == "json" else table_records(file)


def opened(file: Path) -> BinaryIO:
    """A file as a stream of bytes, unpacked if it is compressed."""
    if is_compressed(file):
        return gzip.open(file)  # type: ignore[return-value]
    return open(file, "rb")


def is_compressed(file: Path) -> bool:
    """Whether a file begins as one of gzip does."""
    with open(file, "rb") as stream:
        return stream.read(len(COMPRESSED)) == COMPRESSED


# What a file is


def kind_of(file: Path) -> str:
    """parquet, lines, json or table; InputError if it is none of them, or it is not plain which."""
    suffix = suffix_of(file)
    with opened(file) as stream:
        start = stream.read(32)
    if start.startswith(PARQUET):
        return "parquet"
    looks_like_json = start.lstrip(BOM.encode() + b" \t\r\n")[:1] in JSON_BEGINS
    if suffix == ".parquet" and not looks_like_json:
        return "parquet"  # a damaged one, whose reader will say so
    for beginning, (what, remedy) in OTHERS.items():
        if start.startswith(beginning):
            raise InputError(f"{file} is {what}, expected {', '.join(SUFFIXES)}: {remedy}")
    return kind_of_text(file, suffix)


def kind_of_text(file: Path, suffix: str) -> str:
    """lines, json or table, by the first line that is not blank, and where that says too little by the suffix."""
    with opened(file) as stream:
        first = next(lines_with_text(stream), b"")
        begins_as_json = first.lstrip()[:1] in JSON_BEGINS
        if is_object(first):
            has_more = next(lines_with_text(stream), None) is not None
            if has_more or suffix in LINES:
                return "lines"
    if not first:
        return "lines"  # none of them
    if not begins_as_json:
        if suffix in TABLES:
            return "table"
        # The reader of what is JSON will say that it is no object
        if suffix in (*LINES, ".json") and is_value(first):
            return "lines" if suffix in LINES else "json"
        raise InputError(
            f"{file} begins with {shown(first)}, which is neither JSON nor named as a table: "
            "name it .csv or .tsv if its first line names columns, else save it as JSON"
        )
    if suffix in LINES + TABLES and not is_json(file):
        return "table" if suffix in TABLES else "lines"
    return "json"


def lines_with_text(stream: BinaryIO) -> Iterator[bytes]:
    """The lines of a stream that are not blank, without a byte order mark."""
    for line in stream:
        line = line.removeprefix(BOM.encode())
        if line.strip():
            yield line


def is_object(line: bytes) -> bool:
    """Whether a line is a whole object in JSON."""
    # The first character is asked for, too, so that a list is not read that is the whole file
    return line.lstrip().startswith(b"{") and is_value(line)


def is_json(file: Path) -> bool:
    """Whether a whole file is JSON."""
    with opened(file) as stream:
        return is_value(stream.read())


def is_value(data: bytes) -> bool:
    """Whether bytes are one value in JSON."""
    try:
        json.loads(data)
    except (ValueError, RecursionError):
        return False
    return True


def shown(line: bytes) -> str:
    """The beginning of a line, for a message."""
    return repr(line.decode("utf-8", "replace").strip()[:40])


# JSON


def line_records(file: Path) -> Iterator[Record]:
    """Records of a file with a JSON object on each line."""
    can_seek = not is_compressed(file)
    with opened(file) as lines:
        for number, line in enumerate(lines, 1):
            if not line.removeprefix(BOM.encode()).strip():
                continue
            cells = parse_unique(line, f"{file} line {number}")
            offset = lines.tell() - len(line) if can_seek else None
            yield Record(cells, number, "line", offset)


def json_records(file: Path) -> Iterator[Record]:
    """Records of a JSON file: a list of objects or one object, or either under "data"."""
    with opened(file) as stream:
        data = stream.read()
    try:
        value, repeated = parse_with_repeated(data, file)
    except InputError as e:
        if "Extra data" not in str(e):
            raise
        raise InputError(
            f"{file} is not readable JSON: a second value follows the first; "
            "put all rows into one list, or each on a line of its own"
        ) from e
    rows = value["data"] if has_rows(value) else value
    if not isinstance(rows, list):
        rows = [rows]
    for number, cells in enumerate(rows, 1):
        if repeated:
            for inner in objects_in(cells):
                if isinstance(inner, Repeated):
                    raise twice(f"{file} row {number}", inner)
        yield Record(cells, number)
    if repeated:  # beside the rows
        raise twice(file, repeated[0])


def has_rows(value: Any) -> bool:
    """Whether a JSON value is an object with rows under "data", rather than one row with a column of that name.

    An object there is a row. A list there holds rows if there is nothing beside it, or if it has an object in it.
    """
    if not isinstance(value, dict):
        return False
    data = value.get("data")
    if isinstance(data, list):
        return len(value) == 1 or any(isinstance(item, dict) for item in data)
    return isinstance(data, dict)


def objects_in(value: Any) -> Iterator[dict]:
    """The objects in a JSON value, at every depth."""
    remaining = [value]
    while remaining:
        value = remaining.pop()
        if isinstance(value, dict):
            yield value
            remaining.extend(value.values())
        elif isinstance(value, list):
            remaining.extend(value)


# Tables


def table_records(file: Path) -> Iterator[Record]:
    """Records of a text table, whose first line names the columns."""
    with opened(file) as stream:
        text = stream.read().decode("utf-8-sig")
    delimiter = delimiter_of(text, suffix_of(file))
    names: list[str] | None = None
    number = 0
    for line, cells in table_rows(text, delimiter, file):
        if names is None:
            names = column_names(cells, f"{file} line {line}")
            continue
        if len(cells) != len(names):
            raise InputError(
                f"{file} line {line} has more or fewer cells than the header, {len(cells)} and not "
                f"{len(names)}: correct it; a cell with {delimiter!r} in it needs quotes around it"
            )
        number += 1
        values = ["" if cell.strip() in NO_VALUE else cell for cell in cells]
        yield Record(dict(zip(names, values, strict=True)), number)


def column_names(cells: list[str], place: str) -> list[str]:
    """The names in a header, without the blanks around them. InputError if one stands there twice."""
    names = [cell.replace(BOM, "").strip() for cell in cells]
    repeated = first_repeated(name for name in names if name)  # spreadsheets leave columns unnamed
    if repeated:
        raise InputError(
            f"{place} names the column {repeated!r} twice, expected it once: rename or remove one of the two"
        )
    return names


def delimiter_of(text: str, suffix: str) -> str:
    """What stands between cells: of the usual characters the first that the header has outside of quotes."""
    header = re.match(r'[\r\n]*((?:"[^"]*"|[^"\r\n])*)', text)
    assert header  # it matches nothing, too
    names = re.sub(r'"[^"]*"', "", header[1])
    usual = "\t,;|" if suffix == ".tsv" else ",;\t|"
    return next((character for character in usual if character in names), usual[0])


def table_rows(text: str, delimiter: str, file: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield (number of its first line, its cells) of each row in which not all cells are blank."""
    read_cell = cell_reader(delimiter)
    line = 1
    position = 0
    while position < len(text):
        start = position
        cells = []
        while True:
            cell, position = read_cell(text, position, f"{file} cannot be read: line {line}")
            cells.append(cell)
            if text[position : position + 1] != delimiter:
                break
            position += 1  # past the delimiter
        if any(cell.strip() for cell in cells):
            yield line, cells
        position += 2 if text.startswith("\r\n", position) else 1
        line += len(re.findall(r"\r\n|\r|\n", text[start:position]))


def cell_reader(delimiter: str) -> Callable[[str, int, str], tuple[str, int]]:
    """A function that reads the cell of a table at a position: (text, position, place) -> (cell, where it ends).

    Quotes may have blanks around them, which do not belong to the cell: 2, "x"
    """
    blank = r"[ \xa0]*" if delimiter == "\t" else r"[ \t\xa0]*"
    end = rf"(?=[{re.escape(delimiter)}\r\n]|\Z)"
    quoted = re.compile(rf'{blank}"((?:[^"]++|"")*+)"{blank}{end}')
    unquoted = re.compile(rf"[^{re.escape(delimiter)}\r\n]*")

    def read_cell(text: str, position: int, place: str) -> tuple[str, int]:
        cell = quoted.match(text, position)
        if cell:
            return cell[1].replace('""', '"'), cell.end()
        cell = unquoted.match(text, position)
        assert cell  # it matches nothing, too
        check_quotes(cell[0], place)
        return cell[0], cell.end()

    return read_cell


def check_quotes(cell: str, place: str) -> None:
    """InputError if an unquoted cell begins with quotes that should have made it a quoted one.

    Blanks, a title in quotes and more text are a cell as it stands: 2, "Emma" by Austen
    """
    begins_after_blanks = cell.lstrip().startswith('"')
    is_open = cell.count('"') % 2 == 1
    if cell.startswith('"') or (begins_after_blanks and is_open):
        raise InputError(
            f"{place} has a cell that begins with quotes, {cell.strip()[:40]!r}, and does not end with them: "
            "close them, and double each quote inside"
        )


# Parquet


def parquet_records(file: Path) -> Iterator[Record]:
    """Records of a local Parquet file."""
    check_pyarrow(file, "save it as .jsonl or .csv")
    rows = parquet_cells(file, "make it again, or save it as .jsonl")
    return (Record(cells, number) for number, cells in enumerate(rows, 1))


def check_pyarrow(what: object, otherwise: str) -> None:
    """InputError if Parquet cannot be read here."""
    try:
        import pyarrow  # noqa: F401
    except ImportError as e:
        raise InputError(
            f"{what} is read from Parquet files, which needs pyarrow: pip install 'minimas[data]', or {otherwise}"
        ) from e


def parquet_cells(file: Path, remedy: str) -> Iterator[dict]:
    """Yield the rows of a Parquet file as dicts; InputError if it is damaged, or names a column twice."""
    from pyarrow import ArrowException, parquet

    try:
        with parquet.ParquetFile(file) as table:
            column_names(table.schema_arrow.names, str(file))
            for batch in table.iter_batches(batch_size=100):
                yield from batch.to_pylist()
    except (ArrowException, OSError, UnicodeDecodeError) as e:
        why = " ".join(str(e).split())  # some of pyarrow's messages have several lines
        raise InputError(f"{file} cannot be read ({why}): {remedy}") from e
