"""Where rows come from: local files and folders, files on the hub, or the hub's Parquet export of a data set.

A file on the hub is downloaded when its first row is asked for. formats.py reads the files.
"""

import ast
import io
import json
import os
import re
import tokenize
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..common import InputError, first_repeated, local_path, parse_with_repeated, twice
from .formats import (
    BOM,
    NO_VALUE,
    SUFFIXES,
    check_pyarrow,
    parquet_cells,
    read_records,
    suffix_of,
)

# Our names for columns, which a file may call otherwise. All others have the same name in every file.
COLUMNS = ("question", "answer", "options", "id", "tests", "fn_name")
EXPORT = "refs/convert/parquet"  # the revision under which the hub keeps its Parquet export of every data set
# The name of a part of a file: train-00000-of-00002.parquet
PART = re.compile(r"(.*-)(\d+)-of-(\d+)(\D*)")
NO_ROWS = ("dataset_info.json", "dataset_infos.json", "state.json")  # beside data


@dataclass(frozen=True)
class Row:
    """A row, and its place in the data. Its accessors take our names for columns, which `columns` translates."""

    cells: dict
    file: str | Path  # or the data set
    number: int  # from 1: of the row, or of its line
    columns: dict[str, str]  # {our name: its name in the file}, for those that differ
    offset: int | None = None  # of its line in an uncompressed file of JSON lines, in bytes
    unit: str = "row"  # what `number` counts, row or line

    def __str__(self) -> str:
        return f"{self.file} {self.unit} {self.number}"

    def cell(self, name: str, required: bool = True) -> Any:
        """The value of a column, as it is; InputError if there is no such column; None if it need not be there.

        A column that the user named is always required.
        """
        column = self.columns.get(name, name)
        if column in self.cells:
            return self.at(column)
        if not required and name not in self.columns:
            return None
        advice = "give the column that is meant this name"
        if name in COLUMNS or name in self.columns:
            advice = f"say which it is, as in {name}=COLUMN"
        found = ", ".join(self.cells) or "an empty row"
        raise InputError(f"{self} has no column {column!r}, only {found}: {advice}")

    def at(self, column: str) -> Any:
        """The value of a column by its name in the file.

        InputError if a second column has the same name but for blanks and capitals, unless the user named this one.
        """
        if column not in self.columns.values():
            same = named_like(column, tuple(self.cells))
            if len(same) > 1:
                raise InputError(
                    f"{self} has the column {column!r} twice, spelled {' and '.join(map(repr, same))}: "
                    f"rename or remove one of them, or say which it is with --columns"
                )
        return self.cells[column]

    def text(self, name: str, required: bool = True) -> str:
        """The text of a column, "" if it is blank or no value; InputError if it holds a list or an object."""
        return text_of(self.cell(name, required), f"{self}: column {name!r}")

    def value(self, name: str, required: bool = True) -> Any:
        """The list or object of a column, also if a text spells it, as in CSV files; else its text as in `text`."""
        cell = self.cell(name, required)
        if isinstance(cell, str) and cell.lstrip()[:1] in ("[", "{"):  # "" is neither
            with suppress(ValueNotSpelled):
                return spelled(cell, f"{self}: column {name!r}")
        if isinstance(cell, (list, dict)):
            return cell
        return self.text(name, required)


def check_columns(columns: object) -> None:
    """InputError unless what a caller gave as `columns` is None or a dict of texts."""
    if columns is None:
        return
    if isinstance(columns, Mapping) and all(isinstance(name, str) for name in columns.values()):
        return
    raise InputError(
        f"columns is {columns!r:.80}, expected {{our name: the column in the data}}, such as "
        "{'question': 'problem'}"
    )


def checked_rows(rows: Iterable[Any], source: str, expected: str) -> Iterator[dict[str, Any]]:
    """Rows as dicts; InputError names one that is something else, and says in words what is expected."""
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping):
            raise InputError(f"{source} row {number} is {row!r:.80}, expected {expected}")
        yield dict(row)


def numbered(rows: Iterable[dict], source: str, columns: dict[str, str]) -> Iterator[Row]:
    """Dicts as the Rows of a data set of this name."""
    return (Row(cells, source, number, columns) for number, cells in enumerate(rows, 1))


@lru_cache(maxsize=1024)  # rows of one file mostly have the same columns
def named_like(column: str, columns: tuple[str, ...]) -> list[str]:
    """The columns that have the name of this one but for blanks and capitals; it is among them."""
    return [other for other in columns if plain_name(other) == plain_name(column)]


def plain_name(name: str) -> str:
    """A column's name without what is easily overlooked: capitals, blanks around it, a byte order mark."""
    return name.replace(BOM, "").strip().casefold()


def text_of(value: Any, what: str) -> str:
    """The text that a cell is, "" if it is blank or no value; InputError if it is a list, an object or bytes.

    A text "null" is a text here. In a table, where it may stand for no value, formats.py has taken it away.
    """
    if isinstance(value, (list, dict, bytes)):
        raise InputError(f"{what} holds a {type(value).__name__}, expected text or a number")
    if isinstance(value, str):
        return value if value.strip() else ""
    if value is None or str(value) in NO_VALUE:
        return ""
    if isinstance(value, (float, Decimal)):
        return f"{Decimal(str(value)):f}"  # 0.00001, not 1e-05
    return str(value)


# Lists and objects that a text spells


class ValueNotSpelled(ValueError):
    """A text spells no list or object."""


def spelled(text: str, place: str) -> Any:
    """The value that a text spells in JSON or as a Python literal.

    Raises ValueNotSpelled if it spells none, and InputError if a key stands twice in one object.
    """
    try:
        value, repeated = parse_with_repeated(text, place)
    except InputError:
        return literal(text.strip(), place)
    if repeated:
        raise twice(place, repeated[0])
    return value


def literal(text: str, place: str) -> Any:
    """The value of a Python literal; ValueNotSpelled if there is none that JSON could hold, too.

    numpy prints a list without commas, so that Python would join its texts.
    """
    try:
        tree = ast.parse(text, mode="eval")
        value = ast.literal_eval(tree)
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as e:
        raise ValueNotSpelled from e
    check_keys_of(tree, place)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        return value
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return [ast.literal_eval(token.string) for token in tokens if token.type == tokenize.STRING]


def check_keys_of(tree: ast.AST, place: str) -> None:
    """InputError if a dict of a Python literal has a key twice."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Dict):
            continue
        keys = [key.value for key in node.keys if isinstance(key, ast.Constant)]
        if len(set(keys)) < len(keys):
            raise InputError(
                f"{place} has the key {first_repeated(keys)!r} twice in one object, expected it once: "
                "remove or rename one of the two"
            )


# Files


def is_file_name(name: str | Path) -> bool:
    """Whether a name is that of a data file or folder, and not of something else that data can come from."""
    path = local_path(name)
    return suffix_of(path) in SUFFIXES or os.path.exists(path)


def file_rows(path: Path, columns: dict[str, str]) -> Iterator[Row]:
    """Yield the Rows of a local file, or of a folder that holds one data set; InputError says where it is damaged."""
    for file in data_files(path):
        yield from rows_of_file(file, columns)


def rows_of_file(file: Path, columns: dict[str, str]) -> Iterator[Row]:
    """Yield the Rows of one file."""
    try:
        for record in read_records(file):
            row = Row(
                record.cells, file, record.number, columns, offset=record.offset, unit=record.unit
            )
            if not isinstance(row.cells, dict):
                raise InputError(
                    f"{row} holds {str(row.cells)[:40]!r}, expected an object with named columns: "
                    "give each row as {column: value}"
                )
            yield row
    except UnicodeDecodeError as e:
        raise InputError(f"{file} cannot be read ({e}): save it as UTF-8, or fetch it again") from e
    except (OSError, EOFError, zlib.error) as e:
        raise InputError(
            f"{file} cannot be read ({e}): fetch it again, and allow yourself to read it"
        ) from e


def data_files(path: Path) -> list[Path]:
    """The files of rows: the path itself, or the one in a folder, in parts or whole.

    InputError if there is none, or more than one.
    """
    names = ", ".join(SUFFIXES)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise InputError(f"{path} is not there: give a file of rows, {names}")
    found = [*sorted(path.glob("*")), *sorted(path.glob("*/*"))]
    files = [file for file in found if has_data_name(file, path) and file.is_file()]
    if not files:
        raise InputError(
            f"{path} is a folder, and a file of rows is not there: give a file ({names})"
        )
    is_complete = are_parts(files) if PART.fullmatch(str(files[0])) else len(files) == 1
    if not is_complete:
        some = [str(file.relative_to(path)) for file in files[:5]]
        if len(files) > 5:
            some.append("...")
        raise InputError(
            f"{path} is a folder with {len(files)} files of rows ({', '.join(some)}), "
            "expected one, or all parts of one: give the file itself"
        )
    return files


def are_parts(files: list[Path]) -> bool:
    """Whether files are all the parts of one, in order: train-00000-of-00002.parquet, train-00001-of-00002.parquet."""
    found = [PART.fullmatch(str(file)) for file in files]
    parts = [match.groups() for match in found if match]
    names = {(before, total, suffix) for before, _, total, suffix in parts}
    numbers = [int(number) for _, number, _, _ in parts]
    is_all = len(parts) == len(files) and numbers == list(range(int(parts[0][2])))
    return len(names) == 1 and is_all


def has_data_name(file: Path, folder: Path) -> bool:
    """Whether a file in a folder, or in a folder in that, looks like one of rows by its name."""
    is_near = folder in file.parents[:2]
    if not is_near:
        return False
    is_hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    has_rows = suffix_of(file) in SUFFIXES and file.name not in NO_ROWS
    return has_rows and not is_hidden


# The hub


def parquet_rows(repository: str, config: str, split: str) -> Iterator[dict]:
    """Yield the rows of a split as dicts, in order, from the hub's Parquet export of a data set.

    Raises InputError if pyarrow is not installed, or the split cannot be fetched, is not exported whole, or is damaged.
    """
    check_pyarrow(repository, "give a local file of the same columns")
    pattern = f"{config}/{split}/*.parquet"  # what is exported in part only is named partial-SPLIT
    files = sorted(downloaded(repository, pattern, EXPORT).glob(pattern))
    if not files:
        raise InputError(
            f"the hub's Parquet export of {repository} has no files {pattern}: the split is not there, or "
            "too large to be exported whole; give a local file of the same columns"
        )
    for file in files:
        yield from parquet_cells(file, "delete it, and it is fetched again")


def downloaded(repository: str, pattern: str, revision: str | None) -> Path:
    """The local folder with the files of a data set on the hub that match a pattern."""
    # Here, because the hub's client takes half a second to load: a local file needs none.
    from ..compat.hub import download

    return download(repository, [pattern], repo_type="dataset", revision=revision)
