r"""The letter of an option in a box, as models write it: B, (b), B., \text{B}, B: text, B - text, B \text{text}.

First fonts and LaTeX's blanks are taken away. Then a letter must begin the text, and what follows it decides whether it
is an option or begins something else: C(5,2), A - 2B, [A]_0 and B^2 are expressions.
"""

import re
import string
import unicodedata

# Commands that say how their argument looks. \mathbb is none of them: \mathbb{C} are the complex numbers.
FONT_OF_ARGUMENT = re.compile(
    r"""\\(?:
        (?P<text>text(?!color|circled)[a-z]* | [mhf]box | emph | underline)  # what it holds is text
        | math(?!bb)[a-z]* | boldsymbol | bm | pmb | operatorname\*? | (?:text)?circled | ensuremath
        | (?:text)?color\s*\{[^{}]*\}
    )\s*(?:(?P<brace>\{) | (?=[A-Za-z]\b))""",
    re.VERBOSE,
)
# Commands that change the font up to the end of their group, and marks that say nothing
NO_MEANING = re.compile(
    r"""\\(?:
        bf|rm|it|sf|tt|sl|sc|em|bfseries|rmfamily|sffamily|ttfamily|itshape|upshape|scshape|normalfont
        |displaystyle|textstyle|tiny|scriptsize|footnotesize|small|normalsize|large|Large|LARGE|huge|Huge|checkmark
        |left|right|[Bb]igg?[lr]?
    )(?![a-zA-Z])
    | \*\* | __ | [{}"`“”✓✔]""",
    re.VERBOSE,
)
BLANK = re.compile(r"\\[ ,;:\\()\[\]]|\\(?:q?quad|thinspace)(?![a-z])|(?<!\\)\$|~")
# Text in a command of its own is no word with the letter before it: C \text{warfarin}, but not C\text{arbon}
TEXT_AFTER = re.compile(
    r"(?<![A-Za-z\\])([A-Z])\}*(?:\s+\\TEXT\{|\\TEXT\{(?=[\s(]))"  # C \text{warfarin}
    r"|([)\]])[\s}]*\\TEXT\{"  # (C)\text{warfarin}
)
# As in: the correct answer is option
WORDS_BEFORE = re.compile(
    r"""\s*[(\[]?\s*
        (?:(?:the|my|our|so|thus|hence|correct|right|best|final|choose|select)\b[\s,]*)*
        (?:(?:options?|choices?|answer)\b[\s:\#]*)+
        (?:is\b[\s:]*)?
        (?:(?:the\s+)?(?:option|choice)\b[\s:\#]*)?""",
    re.VERBOSE | re.IGNORECASE,
)
OPTION = re.compile(r"\s*([(\[]?)\s*([A-Za-z])(?![A-Za-z0-9])")
ONLY_MARKS = re.compile(r"[\s.!:;,)\]]*")
# How text begins: with a word that is no name of a function, or with a number and its unit
PROSE = re.compile(
    r"""\s*(?:
        (?!(?:sin|cos|tan|cot|sec|csc|arc[a-z]+|log|exp|det|min|max|lim|gcd|lcm|mod|dim|ker|inf|sup)\b)
        [A-Za-z]{3,}
        | (?:an?|no|it|in|is|of|to|up|at|by|on|we|if|do)\s+[A-Za-z]{2,}
        | no\b
        | [-+]?\d[\d.,]*\s*(?:%|°|[A-Za-z]{2,}\b)
    )""",
    re.VERBOSE | re.IGNORECASE,
)
NUMBER = re.compile(r"\s*[-+]?\d[\d.,/]*\s*%?\s*")
# Text after a symbol: its unit, or when it holds
UNIT_OR_CONDITION = re.compile(
    r"\s*(?:(?:[cmk]?m|k?g|s|[kM]?[NJWVKTF]|[kM]?Hz|mol)(?:[\s/^\d·-]+(?:m|s|kg|K|mol|C))*[\s^\d-]*$"
    r"|(?:if|when|where|for|such that)\b)"
)
# As in: B is correct
CONFIRMED = re.compile(
    r"!?\s+(?:is\s+(?:the\s+)?(?:correct|right|answer|best|true)\b|only\W*$)|!\s+[A-Z][a-z]"
)
# What goes on from A: as in A: B: C = 1: 2: 3
RATIO = re.compile(r"\s*[A-Z]\s*(?::|=[^:]*:)")
# Signs that make an expression of a letter in round brackets before them
OPERATOR = re.compile(
    r"""[=+*/^_<>&|≤≥≠≈×·÷∪∩∈→⇒±] | [-−](?![\d.])
    | \\(?:cup|cap|to|times|cdot|in|ni|subset|supset|subseteq|supseteq|leq?|geq?|lt|gt|neq?|approx|equiv
        |sim|simeq|cong|pm|mp|div|implies|iff|[Rr]ightarrow|[Ll]eftrightarrow|longrightarrow|xrightarrow|mapsto
        |rightleftharpoons|mid|setminus|oplus|otimes|wedge|vee|land|lor|perp|parallel|circ|ast|star|propto
        )(?![a-z])
    | mod\b""",
    re.VERBOSE,
)


def letter(box: str, options: int = 4) -> str | None:
    r"""The option that a box names, as in B, (b), B., B!, \text{B}, B: text, B - text or B \text{text}; else None.

    A letter that begins an expression is no option: C(5,2), A - 2B, [A]_0 or B^2.
    options  how many there are, named by the letters from A on
    """
    plain = without_fonts(box)
    before = WORDS_BEFORE.match(plain)
    found = OPTION.match(plain, before.end() if before else 0)
    if found is None:
        return None
    bracket, option = found.groups()
    known = string.ascii_uppercase[:options]
    after = plain[found.end() :]
    if option.upper() not in known or names_another_option(after, option, known):
        return None
    if bracket:
        is_option = is_option_in_brackets(bracket, after)
    else:
        is_option = is_option_before(after, is_capital=option.isupper())
    return option.upper() if is_option else None


def without_fonts(text: str) -> str:
    r"""A box without fonts and braces, with blanks for LaTeX's; a colon takes the place of a \text{ after a letter."""
    text = re.sub("[ℂ𝔸-𝔻]", r"\\mathbb{C}", text)  # the next line would make letters of them
    text = unicodedata.normalize("NFKC", text)  # Ⓑ and 𝐁 are B
    text = BLANK.sub(" ", text)
    text = re.sub(r"([_^])\s*\\text", r"\1\\script", text)  # no text, but an index
    text = FONT_OF_ARGUMENT.sub(
        lambda font: r"\TEXT{" if font["text"] and font["brace"] else "{", text
    )
    text = re.sub(r"^[\s{]*\\TEXT\{", "{", text)
    text = TEXT_AFTER.sub(lambda text_after: f"{text_after[1] or text_after[2]}: ", text)
    text = NO_MEANING.sub("", text.replace(r"\TEXT{", "{")).rstrip("\\ \n\t").lstrip()
    quoted = re.fullmatch(r"(['*_‘])(.*)(['*_’])", text, re.DOTALL)
    return quoted[2] if quoted else text


def names_another_option(after: str, option: str, known: str) -> bool:
    """Whether a second option follows as an answer: A, B or (A) and (B), but not (B) A cat."""
    others = known.replace(option.upper(), "")
    if not others:
        return False
    second = re.match(
        rf"\W*(?:(?:and|or)\W+[{others}{others.lower()}]\b|[{others}]\W*(?:$|[,/&]|and\b|or\b))",
        after,
    )
    return second is not None


def is_option_in_brackets(bracket: str, after: str) -> bool:
    """Whether a letter after a bracket is an option: (B), [B], (B) text, (B. text), but not (B + 1) or [B]_0."""
    closing = re.match(r"\s*[.:]?\s*([)\]])", after)
    if closing is None:
        return re.match(r"[.:]\s|\s+[-–—]", after) is not None and is_option_before(after, True)
    rest = after[closing.end() :]
    if bracket + closing[1] not in ("()", "[]"):
        return False
    if ONLY_MARKS.fullmatch(rest):
        return True
    text = re.sub(r"^\s*(?:[.:;,]|[-–—](?=\s))", "", rest).strip()
    is_apart = re.match(r"\s*[.:;,]|\s(?!\s*[-–—]\s)", rest) is not None
    if bracket == "(" and is_apart:
        return OPERATOR.match(text) is None
    return PROSE.match(text) is not None


def is_option_before(after: str, is_capital: bool) -> bool:
    """Whether a letter without brackets is an option, from what follows it."""
    if ONLY_MARKS.fullmatch(after) and (is_capital or "!" not in after):
        return True
    if after.startswith((".", ")", ":")):
        text = after[1:]
        is_colon = after.startswith(":")
        if is_colon and (UNIT_OR_CONDITION.match(text) or RATIO.match(text)):
            return False
        return text[:1].isspace() or PROSE.match(text) is not None
    if not is_capital:
        return False
    if after.startswith((",", ";")):
        text = after[1:]
        return "=" in text or bool(PROSE.match(text) or NUMBER.fullmatch(text))
    if dash := re.match(r"\s+[-−–—]+\s+|\s*—\s*", after):
        return PROSE.match(after, dash.end()) is not None
    if bracketed := re.fullmatch(r"(\s*)\(([^()]*(?:\([^()]*\)[^()]*)*)\)?(.*)", after, re.DOTALL):
        blank, text, rest = bracketed.groups()
        is_word = PROSE.match(text) if blank else re.match(r"[A-Za-z]{4,}", text)
        return is_word is not None and OPERATOR.match(rest.strip()) is None
    return CONFIRMED.match(after) is not None
