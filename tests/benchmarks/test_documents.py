"""No number stands in the documents, and no picture, without its row."""

import inspect
import json
import re

import pytest

from benchmarks import ahead_document, conftest, document, front_page, plots, providers, report
from benchmarks.harness import write_rows
from benchmarks.run import WORKLOADS
from clvp_fast.cli.parser import build_parser


def row(workload, provider="a", device="AMD EPYC", median=2.0, **more):
    seconds = {"q20": median, "median": median, "q80": 1.1 * median, "repeats": 3} if median else None
    machine = {"name": device, "threads": 2, "copy_bytes_per_s": 1e10, "matmul_flop_per_s": {"float32": 1e11}}
    context = {"device": machine, "commit": "abc", "utc": "2026-01-02T03:04:05+00:00"}
    context["versions"] = {"torch": "1", "transformers": "2"}
    measured = {"workload": workload, "shape": {}, "provider": provider, "seconds": seconds, "ratio": 1.5}
    return measured | context | {"error": 1e-6, "peak_extra_bytes": None} | more


def step(candidates, median, **more):
    shape = {"candidates": candidates, "text_tokens": 60, "stored": 250}
    return row("decode_step", "clvp_fast float32", median=median, shape=shape, tokens=candidates, **more)


@pytest.mark.parametrize(
    ("path", "make", "part"),
    report.DOCUMENTS,
    ids=["gain", "README", "figures", "architecture", "ahead", "benchmarks", "scaling"],
)
def test_documents_say_what_the_rows_say(path, make, part):
    text = path.read_text(encoding="utf-8")
    assert report.updated(text, report.newest_rows(), make, part) == text, "run: make docs-benchmarks"


def test_the_gain_is_of_one_machine_that_was_not_held_down():
    shape = {"candidates": 16, "new_tokens": 64}
    theirs = row("generate", "transformers float32", median=20.0, shape=shape)
    ours = row("generate", "clvp_fast engine, float32", median=8.0, shape=shape)
    said = front_page.gain([theirs, ours]).replace("\n", " ")
    assert "**2.5 times as fast" in said and "8.00 s instead of 20.00 s" in said and "unmeasured on a GPU" in said
    assert all(len(line) <= 120 for line in front_page.gain([theirs, ours]).splitlines())
    elsewhere = ours | {"device": ours["device"] | {"name": "another"}}
    held_down = [one | {"device": one["device"] | {"isa": "avx2", "isa_forced": True}} for one in (theirs, ours)]
    for rows in ([theirs, elsewhere], held_down, [ours]):
        assert front_page.gain(rows) == front_page.table(rows) == "Not measured yet."


def test_the_front_page_is_of_the_cpu_with_the_newest_whole_calls():
    shape = {"candidates": 16, "new_tokens": 64}
    rows = [
        row("generate", provider, device, median, shape=shape, utc=utc)
        for device, utc, theirs in (("A", "2026-01-02", 20.0), ("B", "2026-01-03", 30.0))
        for provider, median in (("transformers float32", theirs), ("clvp_fast engine, float32", 10.0))
    ]
    for given in rows, rows[::-1], [*rows, row("score", "transformers float32", "A", utc="2026-01-04")]:
        assert "**3.0 times" in front_page.gain(given) and " of B, commit abc" in front_page.gain(given)


def test_the_table_and_the_picture_of_the_front_page_show_the_rows(tmp_path):
    shape = {"candidates": 16, "new_tokens": 64}
    rows = [
        row("generate", "transformers float32", median=20.0, shape=shape),
        row("generate", "clvp_fast engine, float32", median=8.0, shape=shape),
        row("generate", "clvp_fast engine, bfloat16", median=5.0, shape=shape),
        row("score", "transformers float32", median=3.0, shape={"candidates": 4, "length": 9}),
        row("score", "clvp_fast float32", median=2.0, shape={"candidates": 4, "length": 9}),
    ]
    assert front_page.table(rows).splitlines()[2:] == [
        "| generate 16 candidates of 64 tokens | 20.00 s | 8.00 s (2.5x) | 5.00 s (4.0x) |",
        "| embed 4 candidates of 9 tokens | 3.00 s | 2.00 s (1.5x) | not measured |",
    ]
    picture = tmp_path / "gain.svg"
    front_page.draw(rows, picture)
    assert front_page.is_current(front_page.drawing(rows), picture)
    assert all(words in picture.read_text() for words in ("20.0 s", "5.0 s  (4.0x)", "AMD EPYC", "commit abc"))
    rows[0]["seconds"]["median"] = 30.0
    assert not front_page.is_current(front_page.drawing(rows), picture)


def test_the_first_table_tells_where_a_rival_is_ahead():
    shape = {"candidates": 1}
    rows = [
        row("decode_step", name, median=median, shape=shape)
        for name, median in (
            ("transformers float32, no draw", 5.0),
            ("ONNX Runtime float32, no draw", 2.0),
            ("llama.cpp float32, no draw", 1.0),
            ("clvp_fast float32", 3.0),
            ("llama.cpp float16, no draw", 1.0),  # within the spread of ours
            ("clvp_fast bfloat16", 1.05),
            ("clvp_fast bfloat16, int8 weights", 0.5),
            ("clvp_fast float32, int8 weights", 0.7),
            ("OpenVINO int8 weights, no draw", 0.6),
        )
    ]
    rows.append(row("score", "transformers float32", median=1.0))  # nothing of ours to compare with
    expected = "| AMD EPYC | decode_step, candidates 1 | 32 | llama.cpp float32, no draw | 1.00 s | clvp_fast float32"
    assert ahead_document.table(rows).splitlines()[2:] == [f"{expected} | 3.00 s | 3.00x |"]
    rows[6]["seconds"] = dict.fromkeys(("q20", "median", "q80"), 0.8)
    assert "| 8 | OpenVINO int8 weights, no draw | 0.60 s |" in ahead_document.table(rows)
    assert ahead_document.table(rows[4:7]) == "Nowhere, of what is measured."


def test_the_picture_of_the_front_page_shows_what_the_rows_say():
    drawing = front_page.drawing(report.newest_rows())
    assert drawing and front_page.is_current(drawing), "run: make docs-benchmarks"


def test_rows_that_were_measured_alone_are_compared_when_they_are_read(tmp_path):
    """Give rows different times; those of one code belong together, and their reference comes first."""

    def alone(provider, median, utc, source="s"):
        how = dict(alone=True, ratio=None, compared_with="torch", source=source)
        return row("decode_step", provider, median=median, utc=utc, **how)

    old, ours, theirs = alone("other", 1.0, "1", "old"), alone("clvp_fast", 2.0, "2"), alone("torch", 4.0, "3")
    write_rows([old, ours], tmp_path / "card")
    assert [one["ratio"] for one in report.newest_rows(tmp_path)] == [None]
    assert "| clvp_fast | 2.00 s (2.00 s to 2.20 s) |  |" in document.measured(report.newest_rows(tmp_path), {})
    write_rows([theirs], tmp_path / "card")
    found = report.newest_rows(tmp_path)
    assert [(one["provider"], one["ratio"]) for one in found] == [("torch", 1.0), ("clvp_fast", 2.0)]
    assert "2.00x" in document.measured(found, {})


def test_figures_show_what_the_rows_say():
    wanted = plots.drawings(report.newest_rows())
    assert {path.name for path in plots.FIGURES.glob("*.svg")} == set(wanted), "run: make docs-benchmarks"
    assert all(plots.is_current(plots.FIGURES / name, drawing) for name, drawing in wanted.items())


def test_every_workload_has_its_place_or_is_named_as_not_measured():
    text = document.measured([step(1, 0.5), step(16, 0.25)], {"AMD EPYC": "![figure](x.svg)"})
    (headings, without) = (
        re.findall("^### (.*)", text, flags=re.M),
        re.findall("^Not measured here: (.*)[.]$", text, re.M),
    )
    assert headings == ["decode_step"] and "## AMD EPYC\n\n![figure](x.svg)\n\n### decode_step" in text
    assert without[0].split(", ") == [name for name in WORKLOADS if name != "decode_step"]
    assert "Text_tokens 60, stored 250." in text
    assert "| candidates 16 | clvp_fast float32 | 250.0 ms (250.0 ms to 275.0 ms) | 1.50x | 1.0e-06 | 64 |" in text
    assert "commit abc, 2026-01-02, torch 1, transformers 2, memory at 10.0 GB/s, threads: 2." in text
    assert text.endswith("## NVIDIA GPU\n\nNot measured: none was at hand.")
    both = document.measured([row("score", device="NVIDIA H200"), row("score")], {})
    assert re.findall("^## (.*)", both, flags=re.MULTILINE) == ["AMD EPYC", "NVIDIA H200"]


def test_a_refused_provider_and_an_absent_rival_are_told():
    rows = [row("score", "good", absent={"rival": "no wheel"}), row("score", "bad", median=None, refused="error 0.5")]
    text = document.measured(rows, {})
    assert "| bad | error 0.5 |  |  |" in text and "Absent: rival (no wheel)." in text


def test_columns_stand_where_rows_have_what_they_say():
    rows = [
        row("generate", "stock", tokens=1024),
        row("generate", "engine", tokens=1024, peak_bytes=5 * 2**30, weights_bytes=2**32, kv_bytes=2**29),
        row("end_to_end", tokens=8, parts={"features": 0.002, "decode": 1.5}),
        row("scheduler", slow_step_seconds=4e-5, late_over_early=1.02),
        row("score", fraction_of_limit=0.512),
        row("decode_step", process_bytes=3 * 2**29),
    ]
    text = document.measured(rows, {})
    assert "| engine | 2.00 s (2.00 s to 2.20 s) | 1.50x | 1.0e-06 | 512 | 512 MiB |" in text
    assert "| features 2.00 ms, decode 1.50 s |" in text and "| 40.0 µs | 1.02 |" in text and "| 51.2% |" in text
    assert "| memory of its process |" in text and "| 1536 MiB |" in text


def test_bfloat16_stands_beside_its_ratio_to_float32_of_the_same_shape():
    short, long = {"candidates": 16, "length": 200}, {"candidates": 4, "length": 500}
    rows = [
        row("score", f"clvp_fast {name}", median=median, shape=shape)
        for shape, name, median in (
            (short, "float32", 3.0),
            (short, "bfloat16", 2.0),
            (long, "float32", 1.0),
            (long, "bfloat16", 4.0),
            (long, "engine, bfloat16", 1.0),
        )
    ]
    lines = document.measured(rows, {}).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    assert cells[0][-1] == "against float32"
    assert [(line[1], line[-1]) for line in cells[2:]] == [
        ("clvp_fast float32", ""),
        ("clvp_fast bfloat16", "1.50x"),
        ("clvp_fast float32", ""),
        ("clvp_fast bfloat16", "0.25x"),
        ("clvp_fast engine, bfloat16", ""),
    ]


def test_figures_are_drawn_once_for_the_same_rows(tmp_path):
    counted = dict(flop=1e9, bytes=1e9, dtype="float32")
    rows = [step(1, 0.5, **counted), step(16, 0.6, **counted | dict(flop=16e9, bytes=2e9))]
    (tmp_path / "gone.svg").write_text("of a device that has no rows")
    plots.draw_all(rows, tmp_path)
    names = ["amd-epyc-decode-step.svg", "amd-epyc-roofline.svg"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    times = [(tmp_path / name).stat().st_mtime_ns for name in names]
    plots.draw_all(rows, tmp_path)
    assert [(tmp_path / name).stat().st_mtime_ns for name in names] == times
    assert "![A decode step over the batch](benchmarks/amd-epyc-decode-step.svg)" in plots.lines_of(rows)["AMD EPYC"]
    rows[0]["seconds"]["median"] = 0.4
    assert not any(plots.is_current(tmp_path / name, drawing) for name, drawing in plots.drawings(rows).items())
    drawn = (tmp_path / names[0]).read_text()
    assert "weights of 32 bits" in drawn and "AMD EPYC: one decode step" in drawn
    points = plots.drawings(rows)[names[1]]["points"]
    name = "decode_step float32"
    assert json.loads(json.dumps(points)) == [[name, 1.0, 2.5e9], [name, 8.0, 16e9 / 0.6]]


def test_a_roofline_has_the_roofs_of_the_runs_that_have_points():
    counted = dict(flop=1e9, bytes=1e9, dtype="float32")
    rows = [step(1, 0.5, **counted), step(16, 0.5, **counted), step(4, 0.5), step(64, 0.5, **counted)]
    other = {"copy_bytes_per_s": 2e10, "matmul_flop_per_s": {"float32": 3e11, "bfloat16": 4e11}}
    rows[3]["device"] = rows[3]["device"] | other
    rows[2]["device"] = rows[2]["device"] | {"copy_bytes_per_s": 5e10}
    drawing = plots.drawings(rows)["amd-epyc-roofline.svg"]
    assert len(drawing["points"]) == 3 and drawing["roofs"] == {"float32": [[1e10, 1e11], [2e10, 3e11]]}


def test_the_commands_of_the_document_are_ones(monkeypatch):
    text = report.BENCHMARKS.read_text(encoding="utf-8")
    (block,) = re.findall(r"^```sh\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    parsed = [build_parser().parse_args(line.split()[1:]) for line in block.splitlines()]
    assert [one.command for one in parsed] == ["bench"] * 4
    assert all(set(one.workload) <= set(WORKLOADS) for one in parsed)
    assert providers.parsed(parsed[2].providers) == ("ours", "sdpa", "flashinfer")
    words = re.search(r"`pytest benchmarks/(\w+)\.py --benchmark-only`, with `(--\w+)` .*`(--\w+) cuda`", text).groups()
    assert words[0] in WORKLOADS and all(f'"{word}"' in inspect.getsource(conftest) for word in words[1:])
    for target in re.findall(r"`make ([a-z-]+)`", text):
        assert f"\n{target}:" in (report.ROOT / "Makefile").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("value", "text"), [(24.52, "24.5 s"), (0.5, "0.50 s"), (0.1234, "123.4 ms"), (0.0005, "0.50 ms"), (4e-6, "4.0 µs")]
)
def test_times_are_readable(value, text):
    assert document.seconds(value) == text
