"""`python -m handbook.prose`: lists sentences whose subject is a clause, in the documents and in public docstrings.

"What it costs is told below" has a clause ("what it costs") for its subject, and a reader has to decode it. A sentence
that begins with one of `OPENERS` is taken for such a one unless it is a question.
"""

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

OPENERS = ("What", "Who", "Whoever", "Whatever", "Of which", "Of what", "Whose", "Whichever")
# Documents, and modules with public docstrings, as patterns below the repository.
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "docs/**/*.md")
MODULES = ("clvp_fast/**/*.py",)
_BEGINS = re.compile(rf"(?:{'|'.join(OPENERS)})\b")


@dataclass(frozen=True)
class Finding:
    """A sentence, and the place of its first word."""

    path: str
    line: int
    sentence: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: a clause is the subject: {self.sentence[:100]}"


def findings(root: Path) -> list[Finding]:
    """All such sentences of a repository's documents and public docstrings."""
    found = []
    for pattern in DOCUMENTS:
        for path in sorted(root.glob(pattern)):
            text = without_code(path.read_text(encoding="utf-8"))
            found += _found(str(path.relative_to(root)), text, 1)
    for pattern in MODULES:
        for path in sorted(root.glob(pattern)):
            for line, docstring in docstrings(path.read_text(encoding="utf-8")):
                found += _found(str(path.relative_to(root)), docstring, line)
    return found


def _found(path: str, text: str, first: int) -> list[Finding]:
    return [Finding(path, first + line, sentence) for line, sentence in sentences(text) if is_clause(sentence)]


def is_clause(sentence: str) -> bool:
    return bool(_BEGINS.match(sentence)) and not sentence.endswith("?")


def sentences(text: str) -> Iterator[tuple[int, str]]:
    """The sentences of a text with the number of lines before each; cells, items and paragraphs end one."""
    for block in re.finditer(r"[^\n|]+(?:\n(?![\s]*(?:[-*|#]|\d+\.|$))[^\n|]+)*", text):
        line = text.count("\n", 0, block.start())
        start = 0
        for end in (*(m.end() for m in re.finditer(r"[.!?:;]\**\s+", block[0])), len(block[0])):
            sentence = " ".join(block[0][start:end].split())
            begun = line + block[0].count("\n", 0, start)
            if sentence := re.sub(r"^(?:[-*#>]+\s+|\d+\.\s+|\w[\w, ]*:\s+(?=[A-Z]))?[*_]*", "", sentence):
                yield begun, sentence
            start = end


def without_code(text: str) -> str:
    """A document without its fenced blocks, comments and headings; lines keep their numbers."""
    pattern = r"^```.*?^```$|<!--.*?-->|^#+ [^\n]*$"
    return re.sub(pattern, lambda match: "\n" * match[0].count("\n"), text, flags=re.MULTILINE | re.DOTALL)


def docstrings(source: str) -> Iterator[tuple[int, str]]:
    """The docstrings of a module and of its public classes and functions, each with its first line."""

    named = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    documented = (ast.Module, *named)

    def walk(node: ast.AST) -> Iterator[tuple[int, str]]:
        body = getattr(node, "body", [])
        if isinstance(node, documented) and (docstring := ast.get_docstring(node, clean=False)):
            yield body[0].value.lineno, docstring
        for child in body:
            if isinstance(child, named) and not child.name.startswith("_"):
                yield from walk(child)

    yield from walk(ast.parse(source))


def main() -> int:
    found = findings(Path(__file__).resolve().parents[1])
    print(*found, sep="\n")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
