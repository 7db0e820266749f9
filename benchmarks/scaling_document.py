"""The generated part of docs/scaling.md: measured calls beside the model, and what the model makes of GPUs.

Calls are those of the workload `scaling`, the model is `benchmarks/scaling_model.py`.
"""

from dataclasses import replace
from math import ceil

from benchmarks import cluster_document, scaling_model as model
from benchmarks.cluster_document import table
from benchmarks.document import seconds, thousands
from benchmarks.machine import by_machine
from benchmarks.scaling_model import CLVP, H200, SWEEPS, Call, Device, Types, sweeps

TYPES = {"float32": Types(4, 4), "bfloat16": Types(2, 2), "float16": Types(2, 2)}
BF16, FLOAT8_PAGES = Types(2, 2), Types(2, 1)
# Until a GPU was measured: a share of its limits, and some 250 launches a step with a gap of 1.2 µs behind each.
ASSUMED = replace(H200, share=0.6, step_seconds=250 * 1.2e-6)
# The call of the modelled GPU: as many candidates as the preset "standard" has, of the longest; and of shorter ones.
STANDARD = Call(candidates=256, text_tokens=60, new_tokens=500, slots=512)
CANDIDATES, SHORTER = (1, 4, 16, 64, 128, 256, 512), 200
GPUS = {1: "one GPU", 8: "eight GPUs of a machine", 64: "eight such machines"}


def document(rows: list[dict], figures: dict[str, str]) -> str:
    """Write a section for each machine that has rows of `scaling`, CPUs first, and one for the modelled GPU.

    Args:
        rows: the newest of each task, of all workloads.
        figures: by a machine's label, the line of its figure.
    """
    ours = [row for row in rows if row["workload"] == "scaling" and row["seconds"]]
    machines = by_machine(ours)
    cluster = by_machine([row for row in rows if row["workload"] == "cluster" and row["seconds"]])
    found = []
    for name, of_machine in machines.items():
        found.append(_measured(name, of_machine, figures))
        found.append(cluster_document.measured(cluster.get(name, [])))
    if all("NVIDIA" in name for name in machines):
        found.insert(0, "## CPU\n\nNot measured.")
    if not any("NVIDIA" in name for name in machines):
        found.append("## NVIDIA GPU\n\nNot measured: none was at hand.")
    many_gpus = cluster_document.modelled(next(iter(cluster.values()), []), H200, BF16)
    fitted = _fitted([row for row in ours if "H200" in row["device"]["name"]])
    return "\n\n".join([*found, _modelled(fitted), _saturation(rows), _many(fitted), many_gpus])


def _fitted(rows: list[dict]) -> Device | None:
    """Return a device with the share and the overhead that fit its calls over candidates; None if there are too few."""
    measured = sweeps(rows)["candidates"]
    if len(measured) < 2:
        return None
    calls = [(Call(**row["shape"]), row["seconds"]["median"]) for row in measured]
    return model.fit(Device.of(measured[0]), calls, TYPES[measured[0]["dtype"]])


def _off(row: dict, device: Device) -> float:
    """Return the model's relative distance from a measured call."""
    return model.seconds(Call(**row["shape"]), device, TYPES[row["dtype"]]) / row["seconds"]["median"] - 1


def _measured(name: str, rows: list[dict], figures: dict[str, str]) -> str:
    device, found = _fitted(rows), [f"## {name}", *([figures[name]] if name in figures else [])]
    for sweep, points in sweeps(rows).items():
        found.append(f"### Over {SWEEPS[sweep]}")
        if len(points) < 2:
            found.append("Not measured.")
            continue
        shape = points[0]["shape"]
        fixed = ", ".join(f"{what} {shape[other]}" for other, what in SWEEPS.items() if other != sweep)
        found.append(f"{fixed[0].upper()}{fixed[1:]}; {shape['new_tokens']} tokens a candidate.")
        titles = [SWEEPS[sweep], "a call (20 % to 80 %)", "voice, decode, rank", "tokens/s"]
        titles += ["the model is off by"] * (device is not None)
        found.append(table(titles, [_point(row, sweep, device) for row in points]))
    return "\n\n".join([*found, _worth(rows, device)])


def _point(row: dict, sweep: str, device: Device | None) -> list[str]:
    spread = row["seconds"]
    cells = [str(row["shape"][sweep])]
    cells += [f"{seconds(spread['median'])} ({seconds(spread['q20'])} to {seconds(spread['q80'])})"]
    cells += [", ".join(seconds(part) for part in row["parts"].values())]
    cells += [thousands(row["tokens"] / spread["median"])]
    return cells + ([] if device is None else [f"{_off(row, device):+z.0%}"])


def _worth(rows: list[dict], device: Device | None) -> str:
    """Write the model's numbers beside measured calls, and its distance from calls outside the fit."""
    row = rows[-1]
    where = (
        f"{row['provider']}, {row['shape']['slots']} candidates at once, threads: {row['device']['threads']}, "
        f"torch {row['versions']['torch']}, at commit {row['commit']}."
    )
    if device is None:
        return f"{where} Too few calls for the model."
    beside = f", and that a step takes {seconds(device.step_seconds)} beside" if device.step_seconds else ""
    numbers = (
        f"The model takes {device.bytes_per_s / 1e9:.1f} GB/s and {device.flop_per_s / 1e9:.0f} GFLOP/s in "
        f"{row['dtype']} from the run, and from the calls over candidates that {device.share:.0%} of both is "
        f"reached{beside}."
    )
    fitted = sweeps(rows)["candidates"]
    off = [abs(_off(row, device)) for row in rows if row not in fitted]
    if not off:
        return f"{where} {numbers}"
    return (
        f"{where} {numbers} From the {len(off)} other calls it is off by {sum(off) / len(off):.0%} on average, by "
        f"{max(off):.0%} at most."
    )


def _an_hour(call: Call, device: Device, types: Types = BF16) -> float:
    """Write candidates an hour."""
    return 3600 * call.requests * call.candidates / model.seconds(call, device, types)


def _rounded(value: float) -> str:
    """Three digits: a model has no more."""
    return thousands(float(f"{value:.3g}"))


def _half_way(candidates: int) -> tuple[float, float]:
    """Return a step's seconds for weights, and for keys and values, half-way through `STANDARD`, at the limit."""
    weights = model.products(candidates, BF16)
    stored = model.attention(candidates, 1, STANDARD.prompt, STANDARD.new_tokens // 2, BF16)
    return H200.limit(weights), H200.limit(stored)


def _modelled(fitted: Device | None) -> str:
    """Write a call of an H200 over candidates: at the limits of the data sheet, and as fitted or assumed."""
    below = fitted or ASSUMED
    said = (
        "the numbers that were fitted above"
        if fitted
        else f"an assumption that no GPU has confirmed, {below.share:.0%} of both limits and "
        f"{seconds(below.step_seconds)} a step for the gaps between some 250 launches"
    )
    lines = []
    for candidates in CANDIDATES:
        call = replace(STANDARD, candidates=candidates)
        weights, stored = _half_way(candidates)
        parts = model.parts(call, H200, BF16)
        whole = sum(parts.values())
        cells = [str(candidates), seconds(weights + stored), f"{stored / (weights + stored):.0%}"]
        cells += [seconds(whole), f"{parts['rank'] / whole:.1%}"]
        lines.append(cells + [_rounded(_an_hour(call, device)) for device in (H200, below)])
    titles = ["candidates", "a step half-way", "of it keys and values", "a call", "of it rank"]
    titles += ["candidates an hour, at the limit", "below it"]
    return "\n\n".join(
        [
            "## An H200, by the model",
            "**Everything from here on is modelled, not measured.** The limits are those of the data sheet, "
            f"{H200.bytes_per_s / 1e12:.1f} TB/s and {H200.flop_per_s / 1e12:.0f} TFLOP/s of dense products in "
            f'bfloat16, and "below" stands for {said}.',
            f"One request, {STANDARD.text_tokens} text tokens, {STANDARD.new_tokens} tokens a candidate, all in "
            f"bfloat16, up to {STANDARD.slots} candidates at once:",
            table(titles, lines),
        ]
    )


def _saturation(rows: list[dict]) -> str:
    """Write where more candidates gain nothing, and why."""
    weights = BF16.weight * CLVP.step_weights
    token = BF16.page * CLVP.token_channels
    own = token * (STANDARD.new_tokens + 1) / 2
    equal = ceil((weights - token * STANDARD.prompt) / own)
    compute_bound = ceil(H200.flop_per_s / H200.bytes_per_s * BF16.weight / 2)
    # The cost of one more candidate of a large batch: its keys and values, its products, its embedding.
    rank = H200.limit(model.encoder(1, STANDARD.new_tokens, BF16))
    more = STANDARD.new_tokens * (own / H200.bytes_per_s + 2 * CLVP.step_weights / H200.flop_per_s) + rank
    reached = [_an_hour(replace(STANDARD, candidates=each), H200) * more / 3600 for each in (64, 256, 512)]
    float8 = _an_hour(STANDARD, H200) / _an_hour(STANDARD, H200, FLOAT8_PAGES)
    return "\n".join(
        [
            "Where it saturates, and why:",
            "",
            f"- **Weights stream once a step, for all**: {weights / 1e9:.2f} GB, "
            f"{seconds(weights / H200.bytes_per_s)}. While they are most of a step, a further candidate costs nearly "
            "nothing.",
            f"- **Keys and values are each candidate's own**: {own / 1e6:.0f} MB half-way. From {equal} candidates on "
            "they are more than the weights, and time grows with the number of candidates. In 8 bits (`page_dtype`) "
            f"they halve: {STANDARD.candidates} candidates take {float8:.2f} of the time.",
            f"- **Products are bound by operations** from {compute_bound} candidates on; attention stays bound by "
            "bytes.",
            f"- **Ranking is bound by operations**: {seconds(rank)} a candidate, whatever their number.",
            f"- **Memory ends later**: {STANDARD.slots} candidates of {STANDARD.new_tokens} tokens have "
            f"{STANDARD.slots * STANDARD.new_tokens * token / 1e9:.0f} GB of keys and values, and an H200 has 141 GB.",
            f"- **No batch gives more** than {_rounded(3600 / more)} candidates an hour: 64 at once reach "
            f"{reached[0]:.0%} of that, 256 {reached[1]:.0%}, 512 {reached[2]:.0%}.",
            _host(rows),
        ]
    )


def _host(rows: list[dict]) -> str:
    """Write the measured time of the first host's scheduling beside the shortest and the usual step."""
    hosts = by_machine([row for row in rows if row["workload"] == "scheduler" and row["seconds"]])
    if not hosts:
        return "- **The host's scheduling** is not measured."
    measured = [row["seconds"]["median"] for row in next(iter(hosts.values()))]
    least, most = seconds(min(measured)), seconds(max(measured))
    one, usual = (max(measured) / sum(_half_way(candidates)) for candidates in (1, STANDARD.candidates))
    return (
        f"- **The host schedules** a step of 256 candidates in {least} to {most} (measured: `scheduler` in "
        f"[benchmarks.md](benchmarks.md)) while the device runs the step before: at most {one:.0%} of the shortest "
        f"step that the limits allow one candidate, {usual:.1%} of one of {STANDARD.candidates}."
    )


def _many(fitted: Device | None) -> str:
    """Write candidates an hour of several GPUs."""
    lines = []
    for count, name in GPUS.items():
        cells = [name]
        for tokens in (STANDARD.new_tokens, SHORTER):
            call = replace(STANDARD, new_tokens=tokens)
            rates = [count * _an_hour(call, device) for device in (H200, fitted or ASSUMED)]
            cells += [" / ".join(map(_rounded, rates)), " / ".join(_rounded(one / call.candidates) for one in rates)]
        lines.append(cells)
    titles = [""]
    for tokens in (STANDARD.new_tokens, SHORTER):
        titles += [f"candidates of {tokens} tokens an hour", "requests an hour"]
    size = STANDARD.candidates * (8 * STANDARD.new_tokens + 4 * CLVP.encoder_hidden_size)
    leaving = size * max(GPUS) * _an_hour(STANDARD, H200) / STANDARD.candidates / 3600
    return "\n\n".join(
        [
            "## Several GPUs, by the model",
            f"Requests of {STANDARD.candidates} candidates, at the limit / below it:",
            table(titles, lines),
            f"The results of a request, codes and embeddings of all candidates, are {size / 1e6:.1f} MB; "
            f"{leaving / 1e6:.0f} MB/s of them leave {max(GPUS)} GPUs at the limit.",
        ]
    )
