"""Cleans English text to the way it is spoken: numbers and abbreviations written out, lower case, ASCII.

There are two cleaners, by name in `TEXT_CLEANERS`:

- "transformers": as the CLVP tokenizer of transformers, with its quirks ("1st" is "onest", "café" is "caf");
- "tortoise": as in CLVP's training ("first", "cafe", years in pairs of digits), by inflect and unidecode, which are
  imported when this cleaner is first used.

Both take a string and return a string.
"""

import re
from collections.abc import Callable
from functools import cache

# fmt: off
_ONES = (
    "", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen",
    "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)
# fmt: on
_TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_SCALES = ("", " thousand", " million", " billion", " trillion", " quadrillion")

# Replaced in this order, because an earlier replacement can remove the word boundary of a later one.
_ABBREVIATIONS = [
    (re.compile(rf"\b{short}\."), long)
    for short, long in {
        "mrs": "misess",  # as the training text spells it
        "mr": "mister",
        "dr": "doctor",
        "st": "saint",
        "co": "company",
        "jr": "junior",
        "maj": "major",
        "gen": "general",
        "drs": "doctors",
        "rev": "reverend",
        "lt": "lieutenant",
        "hon": "honorable",
        "sgt": "sergeant",
        "capt": "captain",
        "esq": "esquire",
        "ltd": "limited",
        "col": "colonel",
        "ft": "fort",
    }.items()
]

# inflect has no names for numbers past decillions.
_MAX_NAMED_DIGITS = 36


def clean_like_transformers(text: str) -> str:
    """Clean `text` as transformers' CLVP tokenizer does; characters outside ASCII are dropped."""
    return _clean(text.encode("ascii", "ignore").decode("ascii"), _stock_ordinal, _stock_number)


def clean_like_tortoise(text: str) -> str:
    """Clean `text` as Tortoise does; characters outside ASCII are transliterated.

    Raises:
        ImportError: inflect or unidecode is not installed.
        ValueError: a number of more than 36 digits, which has no name.
    """
    return _clean(_transliterate(text), _inflect_ordinal, _inflect_number)


TEXT_CLEANERS: dict[str, Callable[[str], str]] = {
    "transformers": clean_like_transformers,
    "tortoise": clean_like_tortoise,
}


def _clean(text: str, ordinal: Callable[[str], str], number: Callable[[str], str]) -> str:
    """Run the steps that both cleaners share. `ordinal` gets "21st", `number` a number's digits; `text` is ASCII."""
    text = text.lower()
    text = re.sub(r"[0-9][0-9,]+[0-9]", lambda match: match[0].replace(",", ""), text)
    text = re.sub(r"\$([0-9.,]*[0-9])", lambda match: _dollars(match[1]), text)
    # Only from the first digit of a run, because tries from every digit would take quadratic time for a long number.
    text = re.sub(r"(?<![0-9])[0-9]++\.[0-9]+", lambda match: match[0].replace(".", " point "), text)
    text = re.sub(r"(?<![0-9])[0-9]++(?:st|nd|rd|th)", lambda match: ordinal(match[0]), text)
    text = re.sub(r"[0-9]+", lambda match: number(match[0]), text)
    for pattern, long in _ABBREVIATIONS:
        text = pattern.sub(long, text)
    return re.sub(r"\s+", " ", text).replace('"', "")


def _dollars(amount: str) -> str:
    """Split "12.5" into digits and unit words (12 dollars, 5 cents: the part after the point counts as cents)."""
    whole, *rest = amount.split(".")
    if len(rest) > 1:
        return f"{amount} dollars"
    dollars, cents = (_integer(part.replace(",", "") or "0") for part in (whole, rest[0] if rest else ""))
    units = ((dollars, "dollar"), (cents, "cent"))
    parts = [f"{count} {unit}" if count == 1 else f"{count} {unit}s" for count, unit in units if count]
    return ", ".join(parts) or "zero dollars"


def _integer(digits: str) -> int:
    """Return the value of `digits`, or of the first 4000: Python's `int` takes no more, and no name is so long."""
    return int(digits.lstrip("0")[:4000] or "0")


def _stock_words(value: int) -> str:
    """Name `value` in English, in groups of three digits: 1105 is "one thousand, one hundred five"."""
    if value >= 1000 ** len(_SCALES):
        return "number out of range"
    groups = []
    for scale in _SCALES:
        value, group = divmod(value, 1000)
        if group:
            groups.append(_words_below_1000(group) + scale)
    return ", ".join(reversed(groups)) or "zero"


def _words_below_1000(value: int) -> str:
    hundreds, rest = divmod(value, 100)
    if rest < 20:
        below = _ONES[rest]
    else:
        tens, ones = divmod(rest, 10)
        below = f"{_TENS[tens]}-{_ONES[ones]}" if ones else _TENS[tens]
    return " ".join(part for part in (f"{_ONES[hundreds]} hundred" if hundreds else "", below) if part)


def _stock_ordinal(text: str) -> str:
    """Append the ending of the value to the cardinal: "21st" is "twenty-onest". The written ending does not matter."""
    value = _integer(text[:-2])
    regular = value % 100 // 10 == 1
    return _stock_words(value) + ("th" if regular else {1: "st", 2: "nd", 3: "rd"}.get(value % 10, "th"))


def _stock_number(digits: str) -> str:
    value = _integer(digits)
    return _century_words(value, _stock_words) or _stock_words(value)


def _inflect_ordinal(text: str) -> str:
    return _inflect_words(text)


def _inflect_number(digits: str) -> str:
    value = _integer(digits)
    if words := _century_words(value, _inflect_words):
        return words
    if 1000 < value < 3000:
        return _inflect_words(value, andword="", zero="oh", group=2).replace(", ", " ")
    return _inflect_words(value, andword="")


def _century_words(value: int, words: Callable[[int], str]) -> str | None:
    """Return the names of 1100, 1200, ..., 2000 to 2009, ..., 2900 as years, and None for all other values."""
    if not 1000 < value < 3000:
        return None
    if 2000 <= value < 2010:
        return f"two thousand {words(value % 100)}" if value % 100 else "two thousand"
    return f"{words(value // 100)} hundred" if value % 100 == 0 else None


@cache
def _inflect_engine():
    try:
        import inflect
    except ImportError as error:
        raise ImportError('text_cleaning="tortoise" needs inflect: `pip install inflect`.') from error
    return inflect.engine()


def _inflect_words(number: int | str, **options) -> str:
    digits = str(number).rstrip("dhnrst").lstrip("0")
    if len(digits) > _MAX_NAMED_DIGITS:
        raise ValueError(
            f"the text has a number of {len(digits)} digits ({digits[:12]}...), but numbers have names up to "
            f"{_MAX_NAMED_DIGITS} digits: shorten it or write its digits apart."
        )
    words = _inflect_engine().number_to_words(str(number), **options)
    assert isinstance(words, str)  # only `wantlist` makes it a list
    return words


def _transliterate(text: str) -> str:
    try:
        from unidecode import unidecode
    except ImportError as error:
        raise ImportError('text_cleaning="tortoise" needs unidecode: `pip install unidecode`.') from error
    # unidecode also drops lone surrogates, but warns of them.
    return unidecode(text.encode("utf-8", "ignore").decode("utf-8"))
