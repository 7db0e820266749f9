"""`report.html`: candidates to hear and see, in one file that needs no network.

All content from outside is escaped, scripts and styles are allowed by their hashes, and the page may load nothing else.
"""

import base64
import hashlib
import heapq
from collections import Counter
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path

from clvp_fast.io.errors import cut as shorten

#: The page, and the folder of recordings beside an item's other files.
REPORT, SOUND = "report.html", "sound"
TITLE = "Candidates of clvp_fast, to be heard"

#: The greatest size of a page, in bytes.
PAGE_LIMIT = 50_000_000
# The bytes around the sections, and the bytes of tags around one.
_FRAME, _AROUND = 200_000, 100


def data_url(kind: str, content: bytes) -> str:
    """Return `content` as a data URL; `kind` is its media type."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def is_page(path: Path) -> bool:
    """Tell by its beginning whether a file is a page of candidates."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return f"<title>{TITLE}</title>".encode() in file.read(2000)


@dataclass
class Section:
    """A text in a voice: its head, and the number of its candidates."""

    text: str
    voice: str
    facts: list[str]
    picture: str | None = None
    candidates: int = 0


@dataclass
class Page:
    """The sections and candidates that fit: those of the best ranks.

    A voice's picture is in the first section of that voice; all such pictures take at most a quarter of the page. If no
    candidate of a section fits, the section is left out.

    title, settings: shown at the page's top and end. limit: the most bytes of the page.
    """

    title: str
    settings: dict[str, str] = field(default_factory=dict)
    limit: int = PAGE_LIMIT

    def __post_init__(self):
        self.sections: list[Section] = []
        self.left_out = 0
        self._size = _FRAME
        self._pictures: dict[str, bool] = {}  # digests of voices' pictures, and whether they fit
        self._pictures_size = 0
        self._shown: Counter[int] = Counter()  # the number of candidates by section
        self._kept: list[tuple[int, int, str]] = []  # a heap with the worst rank of the last section first

    def add_section(self, section: Section) -> int:
        """Add a section, and return its number."""
        if section.picture is not None and not self._has_room(section.picture):
            section = replace(section, picture=None)
        self.sections.append(section)
        return len(self.sections) - 1

    def add(self, number: int, row: dict, seconds: float, sound: str, picture: str | None) -> None:
        """Add a candidate to section `number`.

        Args:
            row: a row of candidates.json. sound, picture: from `data_url`.
        """
        self.sections[number].candidates += 1
        item = _candidate(self.sections[number].text, row, seconds, sound, picture)
        heapq.heappush(self._kept, (-row["rank"], -number, item))
        self._count(number, 1, item)
        while self._size > self.limit and self._kept:
            _, of_section, dropped = heapq.heappop(self._kept)
            self._count(-of_section, -1, dropped)
            self.left_out += 1

    def _has_room(self, picture: str) -> bool:
        """Tell whether a voice's picture is shown: it is shown once, if it leaves room for sound."""
        name = _hash(picture)
        if name in self._pictures:
            return False
        self._pictures[name] = self._pictures_size + len(picture) <= self.limit // 4
        self._pictures_size += len(picture) * self._pictures[name]
        return self._pictures[name]

    def _count(self, number: int, candidates: int, item: str) -> None:
        """Add a candidate to the size of the page, or subtract it; a section without candidates takes no room."""
        before = self._shown[number]
        self._shown[number] += candidates
        self._size += candidates * _bytes(item)
        if not before or not self._shown[number]:
            self._size += candidates * (_bytes(self._head(self.sections[number])) + _AROUND)

    @property
    def what_is_left_out(self) -> str:
        """Return a sentence on the parts that do not fit, or ""."""
        texts = sum(section.candidates > 0 and not self._shown[n] for n, section in enumerate(self.sections))
        pictures = len(self._pictures) - sum(self._pictures.values())
        counts = {"candidates": self.left_out, "texts with all of theirs": texts, "pictures of voices": pictures}
        return ", ".join(f"{count} {name}" for name, count in counts.items() if count)

    def html(self) -> str:
        style, script = (Path(__file__).with_name(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
        policy = (
            f"default-src 'none'; media-src data:; img-src data:; style-src '{_hash(style)}'; "
            f"script-src '{_hash(script)}'; base-uri 'none'; form-action 'none'"
        )
        items: dict[int, list[str]] = {number: [] for number in range(len(self.sections))}
        for _, number, item in sorted(self._kept, key=lambda kept: -kept[0]):
            items[-number].append(item)
        bodies = [
            f"<section>\n{self._head(section)}<ol>\n{''.join(items[number])}</ol>\n</section>\n"
            for number, section in enumerate(self.sections)
            if items[number]
        ]
        left_out = (
            f"<p>Left out, so that the page has at most {self.limit / 1e6:.0f} MB: {self.what_is_left_out}; all "
            "recordings lie beside it.</p>\n"
            if self.what_is_left_out
            else ""
        )
        facts = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>\n" for k, v in self.settings.items())
        return (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{escape(self.title)}</title>\n<style>{style}</style>\n</head>\n<body>\n<main>\n"
            f"<h1>{escape(self.title)}</h1>\n"
            '<p><label for="order">Sort by</label> <select id="order"><option value="rank">rank</option>'
            '<option value="score">score</option><option value="seconds">length</option>'
            '<option value="candidate">number</option></select> <span id="said" role="status"></span></p>\n'
            f"{left_out}{''.join(bodies)}"
            f"<section>\n<h2>Settings</h2>\n<dl>\n{facts}</dl>\n</section>\n"
            f"</main>\n<script>{script}</script>\n</body>\n</html>\n"
        )

    @staticmethod
    def _head(section: Section) -> str:
        picture = ""
        if section.picture:
            alt = escape(f"Log-mel spectrogram of the voice {section.voice}", quote=True)
            picture = (
                f'<figure><img src="{section.picture}" alt="{alt}"><figcaption>The voice: {escape(section.voice)}'
                "</figcaption></figure>\n"
            )
        facts = "".join(f"<p>{escape(fact)}</p>\n" for fact in section.facts)
        return f"<h2>{escape(section.text)}</h2>\n{facts}{picture}"


def _candidate(text: str, row: dict, seconds: float, sound: str, picture: str | None) -> str:
    """Return the HTML of a candidate, as an item of the list."""
    score = "none" if row["score"] is None else f"{row['score']:.4f}"
    sortable = -1e9 if row["score"] is None else row["score"]
    name = f"Rank {row['rank']}, candidate {row['candidate']}"
    called = escape(f"{name}: {shorten(text, 60)}")
    cut = "" if row["stopped"] else ", cut before its end"
    image = ""
    if picture:
        image = (
            f'<img src="{picture}" alt="Log-mel spectrogram of candidate {row["candidate"]}, {seconds:.2f} seconds">'
        )
    return (
        f'<li data-rank="{row["rank"]}" data-score="{sortable!r}" data-seconds="{seconds:.4f}" '
        f'data-candidate="{row["candidate"]}">\n<h3>{name}</h3>\n'
        f"<p>score {score}, {row['tokens']} codes, {seconds:.2f} s{cut}</p>\n"
        f'<audio controls preload="metadata" aria-label="{called}" src="{sound}"></audio>\n{image}</li>\n'
    )


def _bytes(content: str) -> int:
    """Return the length in bytes. A name that is not UTF-8 has lone surrogates, each written as `?`."""
    return len(content.encode(errors="replace"))


def _hash(content: str) -> str:
    """Return the hash of an inline script or style for a Content-Security-Policy."""
    return f"sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}"
