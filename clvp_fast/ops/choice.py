"""The answer of `clvp_fast.explain` for an operator."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Choice:
    """An operator's backend on a device, and why each other one is not used.

    dtype: of the tensors, as "float32"; "float32, bfloat16" where the same holds for both.
    backend: `None` if the forced one cannot serve.
    calls: the calls for which the backend is used; empty: all that it serves.
    implementation: the kind of the backend's kernel, "triton", "cuda" or "cpu"; without a kernel, the backend.
    """

    operator: str
    device: str
    dtype: str
    backend: str | None
    refused: dict[str, str]
    calls: str = ""
    implementation: str | None = None


class Choices(list):
    """A list of `Choice` that prints as a table."""

    def __str__(self) -> str:
        rows = [("operator", "device", "dtype", "backend", "for, and not used")]
        for choice in self:
            told = [f"for {choice.calls}"] if choice.calls else []
            told += [f"{name}: {reason}" for name, reason in choice.refused.items()]
            rows.append((choice.operator, choice.device, choice.dtype, choice.backend or "none", "; ".join(told)))
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = [
            "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]]) for row in rows
        ]
        return "\n".join(lines)
