"""The tests of each kernel, and the committed rows of the tests that their compiled forms passed (checked.jsonl)."""

import ast
import hashlib
import io
import json
import os
import re
import tokenize
from pathlib import Path

from clvp_fast.native import build
from tests.ptx.parse import instructions_of

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
    "sampling": ("ops/test_sampling", "ops/test_sampling_state", "ops/test_sampling_tiles"),
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


def cache() -> Path:
    """Return the folder of compiled kernels, which lack what a GPU would need."""
    return Path(os.environ.get("PTX_CACHE") or ROOT / "out/ptx-cache")


def source_hash(kernel: str, target: int) -> str | None:
    """Hash the kernel's file and the files of kernels/ that it imports; of csrc/cuda/, what is executed.

    None: there is no nvcc to tell it.
    """
    if kernel in NATIVE:
        return _executed_hash(kernel, target)
    todo, found = [kernel], set()
    while todo:
        name = todo.pop()
        if name in found:
            continue
        found.add(name)
        todo += _kernels_imported((KERNELS / f"{name}.py").read_text())
    return _hash(KERNELS / f"{name}.py" for name in sorted(found))


def _kernels_imported(text: str) -> list[str]:
    """Return the files of kernels/ that one imports, in any form of the statement."""
    package, modules = "clvp_fast.kernels", []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            inside = f"{package}.{node.module or ''}".rstrip(".") if node.level else node.module
            modules += [f"{package}.{alias.name}" for alias in node.names] if inside == package else [inside]
    return [name.removeprefix(f"{package}.") for name in modules if name.startswith(f"{package}.")]


def _executed_hash(kernel: str, target: int) -> str | None:
    """Hash PTX and the files that launch it: headers serve CPUs too, and most changes of them change nothing here."""
    from tests.ptx import native  # which needs this file

    if native.missing():
        return None
    ptx = (native.compiled(target, cache()) / f"{kernel}.ptx").read_text()
    return _hash([ROOT / f"csrc/cuda/{name}" for name in (f"{kernel}.cu", "device.cuh")], instructions_of(ptx))


def checker_hash(kernel: str) -> str:
    """Hash the kernel's tests and the emulator."""
    others = {*_NO_EMULATOR} - ({"native"} if kernel in NATIVE else set())
    emulator = (path for path in Path(__file__).parent.glob("*.py") if path.stem not in others)
    parts = [path for path in sorted(emulator) if not path.name.startswith("test_")]
    parts += [ROOT / "tests/csrc/launches.cpp"] * (kernel in NATIVE)
    return _hash([*parts, *(ROOT / name for name in files(kernel))])


def _hash(paths, text: str = "") -> str:
    """Hash the code of files: rows outlive changes of docstrings, comments and blank lines, which change no result."""
    digest = hashlib.sha256(text.encode())
    for path in paths:
        digest.update(_code(path.read_text(), path.suffix == ".py").encode())
    return digest.hexdigest()[:16]


def _code(text: str, is_python: bool) -> str:
    if not is_python:
        strings_and_comments = r'("(?:\\.|[^"\\\n])*")|/\*.*?\*/|//[^\n]*'
        return "\n".join(re.sub(strings_and_comments, lambda m: m[1] or " ", text, flags=re.DOTALL).split())
    lines = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            lines[token.start[0] - 1] = lines[token.start[0] - 1][: token.start[1]]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            docstring = node.body[0]
            first, last = docstring.lineno - 1, docstring.end_lineno - 1
            # Code may stand on its lines. Columns are bytes of UTF-8.
            behind = text.splitlines()[last].encode()[docstring.end_col_offset :].decode()
            before = text.splitlines()[first].encode()[: docstring.col_offset].decode()
            lines[first : last + 1] = [""] * (last - first + 1)
            lines[first] = before + (behind if behind.strip() and not behind.lstrip().startswith("#") else "")
    return "\n".join(line.rstrip() for line in lines if line.strip())


def rows() -> dict[tuple[str, str], dict]:
    """Return the committed rows, by kernel and target."""
    lines = ROWS.read_text().splitlines() if ROWS.exists() else []
    return {(row["kernel"], row["target"]): row for row in map(json.loads, lines)}


def write(row: dict) -> None:
    """Replace the row of a kernel and target, and write the rows into the page."""
    every = rows() | {(row["kernel"], row["target"]): row}
    _replace(ROWS, "".join(json.dumps(every[key]) + "\n" for key in sorted(every)))
    _replace(PAGE, with_table(PAGE.read_text()))


def _replace(path: Path, text: str) -> None:
    """Write a file at once, so that a run that is killed leaves the former one."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text)
    os.replace(part, path)


def with_table(document: str) -> str:
    """Return the page with its table made of the rows."""
    lines = ["| kernel | target | tests | seconds | instructions that ran | compiler |", "|---|---|---|---|---|---|"]
    for (kernel, target), row in sorted(rows().items()):
        share = f"{row['ran']} of {row['instructions']}"
        lines.append(f"| {kernel} | {target} | {row['tests']} | {row['seconds']} | {share} | {row['compiler']} |")
    head, rest = document.split("<!-- checked -->\n")
    return "\n".join([head + "<!-- checked -->", *lines, rest[rest.index("<!-- end -->") :]])


def faults() -> list[dict]:
    """Return the committed rows on faults."""
    return [json.loads(line) for line in MUTATED.read_text().splitlines()]


def write_faults(rows: list[dict]) -> None:
    """Write the rows on faults, and the page from them; those of an earlier source are marked."""
    for row in rows:
        now = source_hash(row["kernel"], int(row["target"].removeprefix("sm_")))
        row["outdated"] = row.get("outdated", False) if now is None else row["source"] != now
    _replace(MUTATED, "".join(json.dumps(row) + "\n" for row in rows))
    _replace(FAULTS_PAGE, with_faults(FAULTS_PAGE.read_text()))


def with_faults(document: str) -> str:
    """Return the page with its tables made of the rows on faults."""
    surveyed = faults()
    titles = ("kernel", "target", "faults", "seen", "places", "seen", "equivalent", "open")
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for kernel, target in [*sorted({(row["kernel"], row["target"]) for row in surveyed}), ("all", "")]:
        mine = [row for row in surveyed if kernel == "all" or (row["kernel"], row["target"]) == (kernel, target)]
        mark = " (of an earlier source)" if kernel != "all" and mine[0]["outdated"] else ""
        counts = [sum(row[name] for row in mine) for name in ("seen", "places", "seen_places")]
        counts += [sum(len(row[name]) for row in mine) for name in ("equivalent", "open")]
        lines.append(f"| {' | '.join(map(str, (kernel + mark, target, _share(mine), *counts)))} |")
    for name, title in (("equivalent", "why nothing changes"), ("open", "an instruction there")):
        left = {(row["kernel"], at, row["kind"]): text for row in surveyed for at, text in row[name].items()}
        lines += ["", f"| {name} in | place | kind | {title} |", "|---|---|---|---|"]
        lines += [f"| {' | '.join(place)} | {text} |" for place, text in left.items()]
    head, rest = document.split("<!-- faults -->\n")
    return "\n".join([head + "<!-- faults -->", *lines, rest[rest.index("<!-- end -->") :]])


def _share(rows: list[dict]) -> str:
    """Return how many faults were planted, of all that could be; the first rows do not tell the latter."""
    tried = sum(row["faults"] for row in rows)
    return f"{tried} of {sum(row['of'] for row in rows)}" if all(row["of"] for row in rows) else str(tried)


def changed(target: int) -> list[str]:
    """Return kernels whose source differs from that of the committed row, as far as can be told here."""
    known, now = rows(), {name: source_hash(name, target) for name in SUITES}
    return [name for name in SUITES if now[name] not in (None, known.get((name, f"sm_{target}"), {}).get("source"))]
