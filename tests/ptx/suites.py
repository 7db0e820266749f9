"""The tests of each kernel, and the committed rows of what their compiled forms passed (checked.jsonl)."""

import ast
import hashlib
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "kernels"
ROWS = Path(__file__).with_name("checked.jsonl")
PAGE = ROOT / "docs/ptx.md"
TARGETS = (80, 90)

#: Files of kernels/ that launch nothing.
NO_KERNELS = {"target", "overlap", "pages"}
#: For each other file of kernels/, its tests in tests/ops/.
SUITES = {
    "embedding": ("embedding",),
    "linear": ("linear",),
    "mlp": ("mlp", "mlp_calls", "mlp_int8"),
    "norm": ("norm", "merge_norm"),
    "paged_attention": ("paged_attention", "paged_attention_memory"),
    "paged_prefill": ("paged_prefill",),
    "rotary_attention": ("rotary_attention", "rotary_attention_calls"),
    "sampling": ("sampling", "sampling_state"),
    "window_attention": ("window_attention", "window_attention_layouts"),
}


def files(kernel: str) -> list[str]:
    return [f"tests/ops/test_{name}.py" for name in SUITES[kernel]]


def core(target: int) -> list[str]:
    """Tests that CI always runs; on sm_90 those whose code differs most from that of sm_80."""
    return Path(__file__).with_name(f"core_sm{target}.txt").read_text().splitlines()


def source_hash(kernel: str) -> str:
    """Of the kernel's file and of those of kernels/ that it imports."""
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


def checker_hash(kernel: str) -> str:
    """Of the kernel's tests and of what executes them."""
    emulator = (path for path in Path(__file__).parent.glob("*.py") if not path.name.startswith("test_"))
    return _hash([*sorted(emulator), *(ROOT / name for name in files(kernel))])


def _hash(paths) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def rows() -> dict[tuple[str, str], dict]:
    """The committed rows, by kernel and target."""
    lines = ROWS.read_text().splitlines() if ROWS.exists() else []
    return {(row["kernel"], row["target"]): row for row in map(json.loads, lines)}


def write(row: dict) -> None:
    """Puts a row in the place of that of its kernel and target, and the rows into the page."""
    every = rows() | {(row["kernel"], row["target"]): row}
    ROWS.write_text("".join(json.dumps(every[key]) + "\n" for key in sorted(every)))
    PAGE.write_text(with_table(PAGE.read_text()))


def with_table(document: str) -> str:
    """The page with its table made of the rows."""
    lines = ["| kernel | target | tests | seconds | instructions that ran | triton |", "|---|---|---|---|---|---|"]
    for (kernel, target), row in sorted(rows().items()):
        share = f"{row['ran']} of {row['instructions']}"
        lines.append(f"| {kernel} | {target} | {row['tests']} | {row['seconds']} | {share} | {row['triton']} |")
    head, rest = document.split("<!-- checked -->\n")
    return "\n".join([head + "<!-- checked -->", *lines, rest[rest.index("<!-- end -->") :]])


def changed(target: str) -> list[str]:
    """Kernels whose source is not that of the committed row."""
    known = rows()
    return [name for name in SUITES if known.get((name, target), {}).get("source") != source_hash(name)]
