"""The parts of docs/scaling.md about a job on a cluster: what the workload `cluster` measured, and a model of more."""

from benchmarks import scaling_model as model
from benchmarks.document import seconds, thousands
from benchmarks.scaling_model import Call, Device, Types
from clvp_fast.batch.ray_workers import _TURNS

# Rows of a corpus: of many long candidates, two at once, and of few short ones.
ROWS = {
    "256 candidates of 500 tokens": Call(candidates=256, text_tokens=60, new_tokens=500, requests=2, slots=512),
    "16 candidates of 200 tokens": Call(candidates=16, text_tokens=60, new_tokens=200, requests=32, slots=512),
}
GPUS = (1, 8, 64, 512)


def table(titles: list[str], lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [titles, ["---"] * len(titles), *lines])


def rate(row: dict) -> float:
    """Return rows a second from the first result on, as several workers may finish their first rows together."""
    ahead = row["shape"]["rows"] // _TURNS if "workers" in row["provider"] else 0
    return (row["shape"]["rows"] - ahead) / row["parts"]["work"]


def measured(rows: list[dict]) -> str:
    """Write the section of a device; `rows` are its rows of the workload."""
    with_model = [row for row in rows if row["shape"]["model"] != "none"]
    idle = [row for row in rows if row["shape"]["model"] == "none"]
    if not with_model or not idle:
        return "### On a cluster\n\nNot measured."
    shape, last = with_model[0]["shape"], with_model[-1]
    lines = [
        [row["provider"], seconds(row["seconds"]["median"]), seconds(row["parts"]["start"]), f"{rate(row):.2f}"]
        + [f"{rate(row) / rate(with_model[0]):.2f}x"]
        for row in with_model
    ]
    here, cluster = (thousands(rate(row)) for row in idle)
    return "\n\n".join(
        [
            "### On a cluster",
            f"{shape['rows']} rows of {shape['candidates']} candidates of {shape['new_tokens']} tokens, on the small "
            "random model. Start is until the first row is done: of Ray with its own start and with workers that load "
            "Python, torch and the model, first one to describe itself, then all. Rates are from there on.",
            table(["executor", "the whole job", "of it start", "rows a second", "rate"], lines),
            f"Of {thousands(idle[0]['shape']['rows'])} rows whose workers answer at once, a job takes in {here} rows a "
            f"second in one process, and {cluster} over Ray in pieces of 64 rows: what reading, passing on and writing "
            "leave.",
            f"Threads: {last['device']['threads']}, torch {last['versions']['torch']}, at commit {last['commit']}.",
        ]
    )


def modelled(rows: list[dict], device: Device, types: Types) -> str:
    """Write rows a second by number of GPUs, and where a job gains no more; `rows` are those of the workload."""
    title = "## A job on many GPUs, by the model"
    over_ray = [rate(row) for row in rows if row["shape"]["model"] == "none" and "Ray" in row["provider"]]
    if not over_ray:
        return f"{title}\n\nWhat a job takes in is not measured."
    most = min(over_ray)
    each = {name: call.requests / model.seconds(call, device, types) for name, call in ROWS.items()}
    lines = [[str(count), *(_limited(count * one, most) for one in each.values())] for count in GPUS]
    reached = ", and ".join(f"{thousands(most / one)} GPUs at {name}" for name, one in each.items())
    return "\n\n".join(
        [
            title,
            "Rows a second of `clvp-fast batch --ray`, at the GPUs' limit, with a worker on each:",
            table(["GPUs", *ROWS], lines),
            f"The job's own process takes in {thousands(most)} rows a second, as measured above: {reached} give as "
            "many. Where they give more, several jobs with folders of their own share the work. Not in the model: "
            "start and end, shared storage and the network.",
        ]
    )


def _limited(rate: float, most: float) -> str:
    return thousands(rate) if rate <= most else f"{thousands(most)} (the job's own process)"
