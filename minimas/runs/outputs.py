"""What a run puts out: the files that it may write, and a table as text."""

from pathlib import Path
from tempfile import NamedTemporaryFile

from ..common import InputError, local_path


def output_path(name: str | Path) -> Path:
    """The path of an output, with ~ as the home. A folder before a .. need not exist, and none is made for it."""
    path = local_path(name)
    return path.resolve() if ".." in path.parts else path


def named_output(name: str | Path, *suffixes: str) -> Path:
    """The path of an output; InputError if it ends in another suffix than these, if there are any. None is fine."""
    file = output_path(name)
    if suffixes and file.suffix.lower() not in ("", *suffixes):
        raise InputError(
            f"{str(name)!r} ends in {file.suffix}, expected {' or '.join(suffixes)}, which is what is "
            "written: rename it"
        )
    return file


def writable_file(option: str, name: str | Path, make_folder: bool = False) -> Path:
    """The Path of a file that a command is going to write; InputError if it cannot be written. It is not changed."""
    file = output_path(name)
    try:
        if make_folder:
            file.parent.mkdir(parents=True, exist_ok=True)
        if file.exists():
            if not file.is_file():
                raise OSError("it is not an ordinary file")
            file.open("a").close()
        # May files be made here, with such a name?
        NamedTemporaryFile(dir=file.parent, prefix=f"{file.name}.").close()
    except OSError as e:
        raise InputError(
            f"{option} {str(name)!r} cannot be written ({e.strerror or e}): "
            "give a file in an existing folder that you may write to"
        ) from e
    return file


def aligned(rows: list[list[str]]) -> str:
    """A table as text, from rows of texts; the first column begins at the left, the others end at the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=False)]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0])]
        cells += [text.rjust(width) for text, width in zip(others, widths[1:], strict=False)]
        lines.append("  ".join(cells))
    return "\n".join(lines)
