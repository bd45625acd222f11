"""Units: what is one, and one spelling for each. spellings.txt lists those that are known."""

import re
from itertools import chain

from .spellings import SPELLINGS

# Where the plain letters of a unit may begin: after a blank, or if none but a unit is written so: 5cm
UNIT_BEGINS = re.compile(r"(?<=[\d)}])(?:\s+|(?=(?:[ckm]m|kg|ml|mph|kmh?)\b))(?=[A-Za-z])")
WORDS_OF_UNIT = re.compile(r"[A-Za-z]{2}[A-Za-z. /]*")
PLAIN_UNIT = re.compile(r"[A-Za-z][A-Za-z.\s/*^{}\d-]*")
# Words after which a number is another, or no number: no unit
CHANGING = re.compile(
    r"""[^a-z]*[\d!\\] | [eixyz]$ | (squared|cubed|factorial|plus|minus|is|pi)\b
    | .*\b(
        hundred|thousand|(m|b|tr)illion|dozen|half|halve|third|(four|fif|six|seven|eigh|nin|ten)th
        |and|or|more|less|least|most|not
    )(th)?s?\b""",
    re.DOTALL | re.VERBOSE,
)
SYMBOLS = frozenset("msghLlNJWV")
UNITS = [line.split()[1:] for line in SPELLINGS if line.startswith("unit ")]
SHORT = {unit[0]: unit[-1] for unit in UNITS}  # without a plural s
KNOWN = set(chain(*UNITS))


def words_of(name: str) -> list[str]:
    """The words of a unit without a plural s, in lower case unless they are symbols of one or two letters."""
    words = []
    for word in re.findall(r"[A-Za-z]+", name):
        is_symbol = len(word) <= 2
        words.append(word if is_symbol else singular(word.lower()))
    return words


def singular(word: str) -> str:
    """A word without its plural s."""
    return word[:-1] if len(word) > 2 and word.endswith("s") else word


def is_plain_unit(name: str) -> bool:
    """Whether plain letters are a unit: all of its words are known. Other letters are factors."""
    is_cut_short = re.search(r"[/*^-]\s*$", name)
    if is_cut_short or not PLAIN_UNIT.fullmatch(name):
        return False
    words = words_of(name)
    is_alone = len(words) == 1
    return all(is_word_of_unit(word, is_alone) for word in words)


def is_word_of_unit(word: str, is_alone: bool) -> bool:
    """Whether a word is one of a unit. A single letter that is alone must be in SYMBOLS: others are variables."""
    if word in SYMBOLS:
        return True
    return word in KNOWN and not (is_alone and len(word) == 1)


def unit_of(name: str) -> str:
    """One spelling for a unit: square centimeters, sq cm and cm^2 become "cm^{2}", meters per second "m/s"."""
    name = re.sub(r"\s+per\s+", "/", name.strip())
    name = re.sub(r"\^\s*(\d)", r"^{\1}", name)
    name = re.sub(r"\s*\*?\s*\b([A-Za-z]+)\^\{-(\d)\}", r"/\1^{\2}", name).replace("^{1}", "")
    name = re.sub(r"\b(?:sq|square)\.?\s+([A-Za-z]+)", r"\1^{2}", name, flags=re.IGNORECASE)
    name = re.sub(r"\bcubic\s+([A-Za-z]+)", r"\1^{3}", name, flags=re.IGNORECASE)
    name = re.sub(r"[A-Za-z]+", lambda word: short_unit(word[0]), name)
    return re.sub(r"[.\s*]", "", name)


def short_unit(word: str) -> str:
    """The short form of a word of a unit."""
    word = singular(word.lower())
    return SHORT.get(word, word)
