"""`python -m handbook.prose`: lists sentences that a reader has to decode, in documents, docstrings and comments.

There are three kinds. "What it costs is told below" has a clause ("what it costs") for its subject; a sentence that
begins with one of `OPENERS` counts as one unless it is a question, and so does a test's name, which has no question
mark. "Nothing is `not` read" negates twice, which `DOUBLE` finds in its plainest forms. "Of a layer's weights" is no
verb in the imperative, with which the docstring of a function begins: ruff's D401 knows articles and other forms of
verbs, `NO_VERBS` the rest.
"""

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

OPENERS = (
    "What",
    "Who",
    "Whoever",
    "Whatever",
    "Whose",
    "Whichever",
    "Whether",
    "How",
    "Of which",
    "Of what",
    "Of whom",
)
_NO_VERBS = """after all any around as at before behind between both by during each every for from if in inside into it
its no none of on one only or outside their these those to when where with"""
NO_VERBS = frozenset(_NO_VERBS.split())
# Documents, modules, and sources in C++, as patterns below the repository.
DOCUMENTS = (
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "docs/**/*.md",
    "examples/**/*.md",
    "kernels/*.md",
    "clvp_fast/**/*.md",
)
MODULES = (
    "benchmarks/**/*.py",
    "clvp_fast/**/*.py",
    "examples/**/*.py",
    "handbook/*.py",
    "kernels/*.py",
    "tests/**/*.py",
)
CPLUSPLUS = ("csrc/**/*.*", "tests/csrc/**/*.cpp", "tests/csrc/**/*.h")
_BEGINS = re.compile(rf"(?:{'|'.join(OPENERS)})\b")
_NAMED = re.compile(rf"test_(?:{'|'.join(OPENERS)})_".replace(" ", "_"), re.IGNORECASE)
# Within a clause: a word that denies all, or `not`, before another word that denies.
_ALL, _NOT = r"(?:[Nn]obody|none|[Nn]othing|[Nn]o one|[Nn]ever|[Nn]either)", r"(?:not|cannot)"
_ON = r"(?:(?!\b(?:and|but|or|than|that|unless|where|which|who|whose)\b)[^,.;:()`])*"
DOUBLE = re.compile(
    rf"\b{_ALL}\b{_ON}\b(?:{_ALL}|{_NOT}|no|without)\b|\b{_NOT}\b{_ON}\b(?:{_ALL}|without|no)\b"
    rf"|\b[Nn]o\b {_ON}\b(?:{_NOT}|without)\b|\bnot un(?!der|til|less|i)\w+"
)


@dataclass(frozen=True)
class Finding:
    """A sentence, the place of its first word, and what is wrong with it."""

    path: str
    line: int
    fault: str
    sentence: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.fault}: {self.sentence[:100]}"


def findings(root: Path) -> list[Finding]:
    """Find all such sentences of a repository."""
    found = []
    for patterns, texts_of in ((DOCUMENTS, _document), (MODULES, prose_of_python), (CPLUSPLUS, comments_of_cplusplus)):
        for path in sorted({path for pattern in patterns for path in root.glob(pattern) if path.is_file()}):
            source, name = path.read_text(encoding="utf-8"), str(path.relative_to(root))
            for line, text in texts_of(source):
                found += _found(name, text, line)
            if path.suffix == ".py":
                found += [Finding(name, line, "no verb begins it", text) for line, text in without_verb(source)]
                found += [Finding(name, line, "a clause is the name", test) for line, test in named_by_a_clause(source)]
    return found


def _found(path: str, text: str, first: int) -> list[Finding]:
    faults = ((line, sentence, fault_of(sentence)) for line, sentence in sentences(text))
    return [Finding(path, first + line, fault, sentence) for line, sentence, fault in faults if fault]


def fault_of(sentence: str) -> str | None:
    """Name what is wrong with a sentence, or return None."""
    if _BEGINS.match(sentence) and not sentence.endswith("?"):
        return "a clause is the subject"
    return "a double negation" if DOUBLE.search(sentence) else None


def sentences(text: str) -> Iterator[tuple[int, str]]:
    """Yield the sentences of a text with the number of lines before each; cells, items and paragraphs end one."""
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
    """Return a document without its fenced blocks, comments and headings; lines keep their numbers."""
    pattern = r"^```.*?^```$|<!--.*?-->|^#+ [^\n]*$"
    return re.sub(pattern, lambda match: "\n" * match[0].count("\n"), text, flags=re.MULTILINE | re.DOTALL)


def _document(text: str) -> Iterator[tuple[int, str]]:
    yield 1, without_code(text)


def without_verb(source: str) -> Iterator[tuple[int, str]]:
    """Yield the docstrings of a module's functions that begin with no verb; those of properties may do so."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and (docstring := ast.get_docstring(node)):
            first = docstring.split()[0]
            is_property = any("property" in ast.unparse(decorator) for decorator in node.decorator_list)
            is_label = first.endswith(":")  # such as the name of an instruction
            if not (is_property or is_label) and (first.lower() in NO_VERBS or not first.strip(",.;").isalpha()):
                yield node.lineno, docstring


def named_by_a_clause(source: str) -> Iterator[tuple[int, str]]:
    """Yield the tests of a module whose names begin with one of `OPENERS`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and _NAMED.match(node.name):
            yield node.lineno, node.name


def prose_of_python(source: str) -> Iterator[tuple[int, str]]:
    """Yield the docstrings and comments of a module, each with its first line."""
    yield from _docstrings(ast.parse(source))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    yield from _blocks((t.start[0], t.string, t.line.lstrip()[0] == "#") for t in tokens if t.type == tokenize.COMMENT)


def _docstrings(node: ast.AST) -> Iterator[tuple[int, str]]:
    documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
    if documented and (docstring := ast.get_docstring(node, clean=False)):
        yield node.body[0].value.lineno, docstring
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt):  # no expression has a docstring
            yield from _docstrings(child)


def comments_of_cplusplus(source: str) -> Iterator[tuple[int, str]]:
    """Yield the comments of a source in C++, each with its first line."""
    for block in re.finditer(r"/\*(.*?)\*/", source, re.DOTALL):
        yield source.count("\n", 0, block.start()) + 1, re.sub(r"(?m)^[ ]*\*[ ]", "", block[1])
    lines = ((number, line.partition("//")) for number, line in enumerate(source.splitlines(), start=1))
    yield from _blocks((number, f"//{rest}", not before.strip()) for number, (before, mark, rest) in lines if mark)


def _blocks(comments: Iterator[tuple[int, str, bool]]) -> Iterator[tuple[int, str]]:
    """Join comments (line, text, whether it is alone on its line) of neighbouring lines, without their marks."""
    block, first, joins = [], 0, False
    for line, comment, alone in comments:
        if block and not (joins and alone and line == first + len(block)):
            yield first, "\n".join(block)
            block = []
        if not block:
            first, joins = line, alone
        block.append(re.sub(r"^(?:#[:!]?|///?<?)\s?", "", comment))
    if block:
        yield first, "\n".join(block)


def main() -> int:
    found = findings(Path(__file__).resolve().parents[1])
    print(*found, sep="\n")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
