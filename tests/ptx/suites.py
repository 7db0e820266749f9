"""The tests of each kernel, and the committed rows of the tests that their compiled forms passed (checked.jsonl)."""

import ast
import hashlib
import io
import json
import re
import tokenize
from pathlib import Path

from clvp_fast.native import build

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "kernels"
ROWS = Path(__file__).with_name("checked.jsonl")
PAGE = ROOT / "docs/kernels.md"
#: The faults in compiled kernels that tests saw, reasons why others change nothing, and the page that shows both.
MUTATED, EQUIVALENT = (Path(__file__).with_name(name) for name in ("mutated.jsonl", "equivalent.jsonl"))
FAULTS_PAGE = ROOT / "docs/ptx.md"
TARGETS = (80, 90)

#: Files of kernels/ that launch nothing.
NO_KERNELS = {"target", "overlap", "pages"}
#: Kernels of csrc/cuda/, which nvcc compiles (tests/ptx/native.py).
NATIVE = build.CUDA_SOURCES
#: For these, and each other file of kernels/, its files of tests/.
SUITES = {
    "embedding": ("ops/test_embedding",),
    "linear": ("ops/test_linear",),
    "log_mel": ("ops/test_log_mel", "ops/test_log_mel_calls", "ptx/test_log_mel_as_ptx"),
    "mlp": ("ops/test_mlp", "ops/test_mlp_calls", "ops/test_mlp_int8"),
    "norm": ("ops/test_norm", "ops/test_merge_norm"),
    "paged_attention": ("ops/test_paged_attention", "ops/test_paged_attention_memory"),
    "paged_prefill": ("ops/test_paged_prefill",),
    "persistent_decode": ("ptx/test_persistent_as_ptx",),
    "rotary_attention": ("ops/test_rotary_attention", "ops/test_rotary_attention_calls"),
    "sampling": ("ops/test_sampling", "ops/test_sampling_state"),
    "window_attention": ("ops/test_window_attention", "ops/test_window_attention_layouts"),
}
#: Files of this folder on which no kernel's result depends; native.py executes those of csrc/cuda/ alone.
_NO_EMULATOR = {"__main__", "assembled", "conftest", "mutants", "mutating", "native", "suites"}
#: The expression that selects the tests of these files that run a kernel.
CHOSEN = "interpreted or as_ptx"


def files(kernel: str) -> list[str]:
    return [f"tests/{name}.py" for name in SUITES[kernel]]


def core(target: int) -> list[str]:
    """Return tests that CI always runs; on sm_90 those whose code differs most from that of sm_80."""
    return Path(__file__).with_name(f"core_sm{target}.txt").read_text().splitlines()


def source_hash(kernel: str) -> str:
    """Hash the kernel's file and the files of kernels/ that it imports."""
    if kernel in NATIVE:
        return _hash(sorted(_included(ROOT / f"csrc/cuda/{kernel}.cu")))
    todo, found = [kernel], set()
    while todo:
        name = todo.pop()
        if name in found:
            continue
        found.add(name)
        for node in ast.walk(ast.parse((KERNELS / f"{name}.py").read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("clvp_fast.kernels"):
                inside = node.module.removeprefix("clvp_fast.kernels").lstrip(".")
                todo += [inside] if inside else [alias.name for alias in node.names]
    return _hash(KERNELS / f"{name}.py" for name in sorted(found))


def _included(path: Path) -> set[Path]:
    """Return a file of csrc/ and all files that it includes from there."""
    todo, found = [path], set()
    while todo:
        if (path := todo.pop()) not in found:
            found.add(path)
            names = re.findall(r'^\s*#\s*include\s+"([^"]+)"', path.read_text(), re.M)
            todo += [(path.parent / name).resolve() for name in names]
    return found


def checker_hash(kernel: str) -> str:
    """Hash the kernel's tests and the emulator."""
    others = {*_NO_EMULATOR} - ({"native"} if kernel in NATIVE else set())
    emulator = (path for path in Path(__file__).parent.glob("*.py") if path.stem not in others)
    parts = [path for path in sorted(emulator) if not path.name.startswith("test_")]
    parts += [ROOT / "tests/csrc/launches.cpp"] * (kernel in NATIVE)
    return _hash([*parts, *(ROOT / name for name in files(kernel))])


def _hash(paths) -> str:
    """Hash the code of files: rows outlive changes of docstrings, comments and blank lines, which change no result."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(_code(path.read_text(), path.suffix == ".py").encode())
    return digest.hexdigest()[:16]


def _code(text: str, is_python: bool) -> str:
    if not is_python:
        return "\n".join(re.sub(r"/\*.*?\*/|//[^\n]*", " ", text, flags=re.DOTALL).split())
    lines = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            lines[token.start[0] - 1] = lines[token.start[0] - 1][: token.start[1]]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            docstring = node.body[0]
            lines[docstring.lineno - 1 : docstring.end_lineno] = [""] * (docstring.end_lineno - docstring.lineno + 1)
    return "\n".join(line.rstrip() for line in lines if line.strip())


def rows() -> dict[tuple[str, str], dict]:
    """Return the committed rows, by kernel and target."""
    lines = ROWS.read_text().splitlines() if ROWS.exists() else []
    return {(row["kernel"], row["target"]): row for row in map(json.loads, lines)}


def write(row: dict) -> None:
    """Replace the row of a kernel and target, and write the rows into the page."""
    every = rows() | {(row["kernel"], row["target"]): row}
    ROWS.write_text("".join(json.dumps(every[key]) + "\n" for key in sorted(every)))
    PAGE.write_text(with_table(PAGE.read_text()))


def with_table(document: str) -> str:
    """Return the page with its table made of the rows."""
    lines = ["| kernel | target | tests | seconds | instructions that ran | compiler |", "|---|---|---|---|---|---|"]
    for (kernel, target), row in sorted(rows().items()):
        share = f"{row['ran']} of {row['instructions']}"
        lines.append(f"| {kernel} | {target} | {row['tests']} | {row['seconds']} | {share} | {row['compiler']} |")
    head, rest = document.split("<!-- checked -->\n")
    return "\n".join([head + "<!-- checked -->", *lines, rest[rest.index("<!-- end -->") :]])


def with_faults(document: str) -> str:
    """Return the page with its tables made of the rows on faults."""
    surveyed = [json.loads(line) for line in MUTATED.read_text().splitlines()]
    lines = ["| kernel | faults | seen | places | seen | equivalent | open |", "|---|---|---|---|---|---|---|"]
    for kernel in [*SUITES, "all"]:
        mine = [row for row in surveyed if kernel in (row["kernel"], "all")]
        sums = [sum(row[name] for row in mine) for name in ("faults", "seen", "places", "seen_places")]
        sums += [sum(len(row[name]) for row in mine) for name in ("equivalent", "open")]
        lines.append(f"| {kernel} | {' | '.join(map(str, sums))} |" if mine else f"| {kernel} |" + " |" * 6)
    for name, title in (("equivalent", "why nothing changes"), ("open", "an instruction there")):
        lines += ["", f"| {name} | kind | {title} |", "|---|---|---|"]
        lines += [f"| {at} | {row['kind']} | {text} |" for row in surveyed for at, text in row[name].items()]
    head, rest = document.split("<!-- faults -->\n")
    return "\n".join([head + "<!-- faults -->", *lines, rest[rest.index("<!-- end -->") :]])


def changed(target: str) -> list[str]:
    """Return kernels whose source differs from that of the committed row."""
    known = rows()
    return [name for name in SUITES if known.get((name, target), {}).get("source") != source_hash(name)]
