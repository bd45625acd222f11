"""docs/tour.ipynb runs from its first cell to its last, and prints what is committed in it."""

import json
import re
from pathlib import Path

import pytest

TOUR = Path(__file__).parent.parent / "docs" / "tour.ipynb"
NUMBER = re.compile(r"\(?(\d+(?:\.\d+)?)[%,)]*")
MEASURED = (
    "right",
    "of 100",
    "latent', ",
)  # what a cell says that measures or trains: it may differ by rounding


def printed(cell):
    """What a code cell printed to stdout."""
    texts = [output["text"] for output in cell["outputs"] if output.get("name") == "stdout"]
    return "".join(text if isinstance(text, str) else "".join(text) for text in texts)


def alike(found, committed):
    """Whether a cell printed the same words; numbers of a measurement may differ by 3 in a hundred questions."""
    measured = any(word in committed for word in MEASURED)
    words = found.split(), committed.split()
    if len(words[0]) != len(words[1]):
        return False
    for a, b in zip(*words, strict=True):
        numbers = NUMBER.fullmatch(a), NUMBER.fullmatch(b)
        if measured and all(numbers):
            if abs(float(numbers[0][1]) - float(numbers[1][1])) > 3:
                return False
        elif a != b:
            return False
    return True


def test_words_and_numbers_are_compared():
    assert alike("2 -> 9", "2 -> 9") and not alike("2 -> 8", "2 -> 9") and not alike("2", "2 -> 9")
    assert alike("96.0 percent right", "95.5 percent right")
    assert not alike("80.0 percent right", "95.5 percent right")


def test_it_is_committed_with_its_outputs():
    tour = json.loads(TOUR.read_text(encoding="utf-8"))
    cells = [cell for cell in tour["cells"] if cell["cell_type"] == "code"]
    assert len(cells) > 10 and all(cell["execution_count"] for cell in cells)
    pictures = [
        output
        for cell in cells
        for output in cell["outputs"]
        if "image/png" in output.get("data", {})
    ]
    assert len(pictures) == 3 and sum(bool(printed(cell)) for cell in cells) > 8
    assert not any(output.get("name") == "stderr" for cell in cells for output in cell["outputs"])


@pytest.mark.slow  # a minute
def test_it_prints_what_it_shows():
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("matplotlib")
    pytest.importorskip("ipykernel")
    committed = nbformat.read(TOUR, as_version=4)
    tour = nbformat.read(TOUR, as_version=4)
    where = {"metadata": {"path": str(TOUR.parent)}}
    nbclient.NotebookClient(tour, timeout=300, kernel_name="python3", resources=where).execute()
    for n, (cell, shown) in enumerate(zip(tour.cells, committed.cells, strict=True)):
        if cell.cell_type == "code":
            assert alike(printed(cell), printed(shown)), f"cell {n}: {printed(cell)!r}"
