"""Sentences of the demo's domain: a grammar over some 500 common words, and rows of words without grammar.

A sentence is lower case and without punctuation, as a recogniser hears it. `written` gives it as a user may write it.
"""

import random
import tomllib
from collections.abc import Collection, Iterator
from pathlib import Path

_LISTS = tomllib.loads(Path(__file__).with_name("words.toml").read_text(encoding="utf-8"))


def _words(name: str) -> list[str]:
    """Return a list of words.toml."""
    text = _LISTS[name]
    return [" ".join(entry.split()) for entry in text.split(",")] if "," in text else text.split()


ADJECTIVES = _words("adjectives")
PEOPLE = _words("people")
THINGS = _words("things")
VERBS = _words("verbs")
ACTIONS = _words("actions")
PREPOSITIONS = _words("prepositions")
TIMES = _words("times")
ADVERBS = _words("adverbs")
NUMBERS = _words("numbers")
DIGITS = _words("digits")
PLACES = _words("places")
NAMES = _words("names")
DETERMINERS = _words("determiners")
PRONOUNS = _words("pronouns")
FUNCTION_WORDS = _words("function_words")
NUMBERED = _words("numbered")
NO_PLURAL = _words("no_plural")
JOURNEYS = ("lives in", "came from", "went to", "flew to", "wrote from")

# Sentences of documents and examples; they are used as they are there, and varied.
SHOWN = (
    "hello there",
    "this is an example text",
    "one sentence",
    "and another",
    "the birch canoe slid on the smooth planks",
    "glue the sheet to the dark blue background",
    "it is easy to tell the depth of a well",
    "the doctor paid twenty five dollars for it",
)

LONGEST = 84


def plural(word: str) -> str:
    """Return the plural of one of `THINGS`; those without a regular one are replaced by "letters"."""
    word = "letter" if word in NO_PLURAL else word
    return word + ("es" if word.endswith(("s", "x", "ch", "sh")) else "s")


def _vocabulary() -> list[str]:
    groups = (ADJECTIVES, PEOPLE, THINGS, VERBS, ACTIONS, PREPOSITIONS, ADVERBS, NUMBERS, DIGITS, PLACES, NAMES)
    phrases = [*TIMES, *JOURNEYS, *SHOWN]
    words = {word for group in (*groups, DETERMINERS, PRONOUNS, FUNCTION_WORDS, NUMBERED) for word in group}
    return sorted(words | {word for phrase in phrases for word in phrase.split()} | set(map(plural, THINGS)) | {"an"})


#: Every word that a sentence can have.
WORDS = _vocabulary()


class Writer:
    """Writes sentences, the same for the same seed."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)

    def choose(self, words):
        return self.random.choice(words)

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    def noun_phrase(self, nouns) -> str:
        phrase = self.choose(nouns)
        if self.chance(0.45):
            phrase = f"{self.choose(ADJECTIVES)} {phrase}"
        determiner = self.choose(DETERMINERS)
        return ("an " if determiner == "a" and phrase[0] in "aeiou" else determiner + " ") + phrase

    def person(self) -> str:
        kind = self.random.random()
        if kind < 0.35:
            return self.choose(NAMES if kind < 0.2 else PRONOUNS)
        return self.noun_phrase(PEOPLE)

    def counted(self) -> str:
        number, things = self.choose(NUMBERS), plural(self.choose(THINGS))
        if number.endswith("ty") and self.chance(0.5):
            number += f" {self.choose(DIGITS[1:])}"
        return f"{number} {self.choose(ADJECTIVES)} {things}" if self.chance(0.4) else f"{number} {things}"

    def object(self) -> str:
        if self.chance(0.3):
            return self.counted()
        return self.noun_phrase(THINGS if self.chance(0.75) else PEOPLE)

    def deed(self) -> str:
        """Write a deed: somebody does something, somewhere or at some time."""
        said = f"{self.person()} {self.choose(VERBS)} {self.object()}"
        kind = self.random.random()
        if kind < 0.35:
            return f"{said} {self.choose(PREPOSITIONS)} {self.noun_phrase(THINGS)}"
        if kind < 0.6:
            return f"{said} {self.choose(TIMES)}"
        return f"{said} {self.choose(ADVERBS)}" if kind < 0.72 else said

    def action(self) -> str:
        said = f"{self.person()} {self.choose(ACTIONS)}"
        said += f" {self.choose(ADVERBS)}" if self.chance(0.5) else ""
        if self.chance(0.6):
            said += f" {self.choose(PREPOSITIONS)} {self.noun_phrase(THINGS)}"
        else:
            said += f" {self.choose(TIMES)}"
        return said + (f" {self.choose(FUNCTION_WORDS)} {self.choose(ACTIONS)}" if self.chance(0.2) else "")

    def shown(self) -> str:
        """Return a sentence of the documents, as it is there or with other words."""
        kind = self.random.random()
        if kind < 0.4:
            return self.choose(SHOWN)
        adjective, thing = self.choose(ADJECTIVES), self.choose(THINGS)
        if kind < 0.55:
            return f"the {self.choose(ADJECTIVES)} {self.choose(['canoe', *THINGS])} slid on the {adjective} planks"
        if kind < 0.7:
            return f"glue the {thing} to the {adjective} {self.choose(['background', *THINGS])}"
        if kind < 0.8:
            return f"it is {adjective} to tell the depth of {self.noun_phrase(THINGS)}"
        if kind < 0.9:
            return f"{self.person()} paid {self.choose(NUMBERS)} dollars for {self.choose(['it', self.object()])}"
        return f"{self.choose(['this', 'that', 'there', 'here', 'it'])} is {self.noun_phrase(THINGS)}"

    def sentence(self) -> str:
        kind = self.random.random()
        if kind < 0.40:
            return self.deed()
        if kind < 0.56:
            return self.action()
        if kind < 0.64:
            return f"{self.choose(NAMES)} {self.choose(JOURNEYS)} {self.choose(PLACES)} {self.choose(TIMES)}"
        if kind < 0.72:
            digits = [self.choose(DIGITS) for _ in range(self.random.randint(2, 5))]
            return " ".join([self.choose(NUMBERED), *digits])
        if kind < 0.77:
            return self.shown()
        if kind < 0.81:
            return f"{self.choose([self.deed(), self.shown()])} and {self.choose([self.deed(), self.action()])}"
        return " ".join(self.choose(WORDS) for _ in range(self.random.randint(2, 7)))

    def sentences(self, avoid: Collection[str] = ()) -> Iterator[str]:
        """Yield sentences without end, none of `avoid` and none that is too long."""
        while True:
            said = self.sentence()
            if len(said) <= LONGEST and said not in avoid:
                yield said


def unique(seed: int, count: int, avoid: Collection[str] = ()) -> list[str]:
    """Yield `count` different sentences, none of `avoid`."""
    found: dict[str, None] = {}
    for said in Writer(seed).sentences(avoid):
        found.setdefault(said)
        if len(found) == count:
            break
    return list(found)


def written(said: str, ending: str) -> str:
    """Return a sentence as the model reads it: `ending` is "", "." or another mark behind it."""
    return said + ending


# Nothing is trained on these. The first are watched during training; the others are only for figures.
HELD_OUT = unique(999, 256, avoid=SHOWN)
EVALUATION = unique(424242, 300, avoid={*HELD_OUT, *SHOWN})
UNSEEN = frozenset(HELD_OUT) | frozenset(EVALUATION)
