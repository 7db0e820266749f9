"""The summary of a job at its end: counts, rates and failures, and a picture of scores and lengths."""

from collections import Counter
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from clvp_fast.batch.folder import JobFolder
from clvp_fast.batch.overview import draw_overview

# The most reasons and remarks in the summary, the most frequent first; failures.jsonl has all.
_REASONS = 10


def write_summary(folder: JobFolder, manifest: dict[str, Any], now: Counter[str], seconds: float) -> dict[str, Any]:
    """Write manifest.json, failures.jsonl, summary.json and overview.png of a finished job, and return the summary.

    Args:
        now: `rows`, `candidates` and `tokens` of this run. seconds: its duration.
    """
    shards = []
    totals: Counter[str] = Counter(spoken=0, failed=0, candidates=0, tokens=0)
    reasons: Counter[str] = Counter()
    remarks: Counter[str] = Counter()
    paths = sorted(folder.shards.glob("part-*.parquet"))
    for path in paths:
        about = folder.about(path)
        reasons.update(failure["error"] for failure in about["failures"])
        first = pq.read_table(path, columns=["candidates", "tokens", "remarks"], filters=pc.field("rank") == 1)
        remarks.update(pc.call_function("list_flatten", [first["remarks"]]).to_pylist())
        counts = {
            "spoken": first.num_rows,
            "failed": len(about["failures"]),
            "candidates": _sum(first["candidates"]),
            "tokens": _sum(first["tokens"]),
        }
        totals.update(counts)
        shards.append({"file": f"{folder.shards.name}/{path.name}", "bytes": path.stat().st_size, **counts})
    folder.write_failures(failure for path in paths for failure in folder.about(path)["failures"])
    folder.write_json("manifest.json", manifest | {"shards": shards})
    files = ["shards", "failures.jsonl", "manifest.json", "summary.json"]
    if totals["spoken"]:
        draw_overview(folder.folder / "overview.png", paths, totals["failed"])
        files.append("overview.png")
    summary = {
        "rows": manifest["rows"],
        **totals,
        "failures": [{"error": error, "rows": rows} for error, rows in reasons.most_common(_REASONS)],
        "remarks": [{"remark": remark, "rows": rows} for remark, rows in remarks.most_common(_REASONS)],
        "this_run": {
            **now,
            "seconds": round(seconds, 3),
            **{f"{name}_per_second": round(count / seconds, 3) for name, count in now.items() if seconds},
        },
        "files": files,
    }
    folder.write_json("summary.json", summary)
    return summary


def _sum(column: pa.ChunkedArray) -> int:
    return pc.call_function("sum", [column]).as_py() or 0
