"""A run of the benchmarks: what is refused, kept, left out and compared."""

import importlib
import json
from types import SimpleNamespace

import pytest
import torch

from benchmarks import compare, harness, models, providers, run
from benchmarks.harness import Machine, Provider, Task, measure


@pytest.fixture(autouse=True)
def no_machine_is_measured(monkeypatch):
    monkeypatch.setattr(Machine, "measure", lambda *arguments: Machine("m", 1, 1.0, {"float32": 1.0}))


@pytest.fixture
def workload(monkeypatch):
    """Replace every workload by one of three shapes; `errors` says how each goes, `measured` are those that ran."""
    state = SimpleNamespace(errors={}, measured=[])

    def rows(n):
        state.measured.append(n)
        error = state.errors.get(n, 0.0)
        if isinstance(error, BaseException):
            raise error
        return measure("score", {"n": n}, [Provider("a", lambda: None, error, 1e-3)], repeats=1)

    def tasks(device, smoke=False):
        return [Task({"n": n}, lambda n=n: rows(n)) for n in range(3)]

    monkeypatch.setattr(run.importlib, "import_module", lambda name: SimpleNamespace(tasks=tasks))
    return state


def shapes(folder):
    return [row["shape"]["n"] for row in harness.stored_rows(folder / "cpu")]


def test_a_wrong_or_failed_shape_is_told_and_the_others_are_kept(workload, tmp_path, capsys):
    assert run.main(["score", "--results", str(tmp_path)]) == 0 and shapes(tmp_path) == [0, 1, 2]
    workload.errors = {0: 1.0, 1: RuntimeError("no such kernel")}
    assert run.main(["score", "--results", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert "score n=1: RuntimeError: no such kernel" in said and "wrong or failed: score n=0; score n=1" in said
    assert shapes(tmp_path) == [0, 1, 2, 0, 2]


def test_an_interrupted_run_keeps_its_rows_and_goes_on_behind_them(workload, tmp_path, capsys, monkeypatch):
    workload.errors = {1: KeyboardInterrupt()}
    assert run.main(["score", "--results", str(tmp_path)]) == 130
    assert "interrupted; the rows that were measured are kept" in capsys.readouterr().err
    assert shapes(tmp_path) == [0]
    workload.errors, workload.measured = {}, []
    assert run.main(["score", "--results", str(tmp_path), "--resume"]) == 0
    assert workload.measured == [1, 2] and shapes(tmp_path) == [0, 1, 2]
    # Rows of other code are no reason to leave anything out.
    monkeypatch.setattr(harness, "source", lambda: "another")
    assert run.main(["score", "--results", str(tmp_path), "--resume"]) == 0
    assert workload.measured == [1, 2, 0, 1, 2]


def test_a_file_of_rows_that_cannot_be_written_is_told_before_anything_is_measured(workload, tmp_path, capsys):
    (tmp_path / "cpu/sample.jsonl").mkdir(parents=True)
    with pytest.raises(SystemExit):
        run.main(["score", "sample", "--results", str(tmp_path)])
    assert "sample.jsonl" in (said := capsys.readouterr().err) and "choose another place with --results" in said
    assert workload.measured == [] and run.main(["score", "--results", str(tmp_path)]) == 0


def test_shapes_beyond_the_time_are_left_and_named(workload, tmp_path, capsys):
    assert run.main(["score", "--results", str(tmp_path), "--seconds", "0"]) == 0
    assert workload.measured == [] and "3 shapes are left for another run with --resume: score n=0; " in (
        capsys.readouterr().err
    )


def test_a_smoke_test_leaves_no_rows(workload, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    assert run.main(["score", "--smoke"]) == 0 and workload.measured == [0, 1, 2]
    assert not list(tmp_path.iterdir())


def test_every_workload_is_a_module_with_tasks():
    for name in run.WORKLOADS:
        path = harness.ROOT / "benchmarks" / f"{name}.py"
        assert "\ndef tasks(device: str, smoke: bool = False) -> Iterator[Task]:" in path.read_text(), name


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.filterwarnings("ignore:.*takes the slower torch path")
def test_tasks_name_their_providers_before_anything_is_made(device, monkeypatch):
    monkeypatch.setattr(models, "ClvpConfig", None)  # without which no model is made
    for name in run.WORKLOADS:
        tasks = list(importlib.import_module(f"benchmarks.{name}").tasks(device))
        shapes = [harness.task_key({"workload": name, "shape": task.shape}) for task in tasks]
        assert tasks and len(set(shapes)) == len(shapes), name
        assert all(task.makers and not set(task.makers) & set(task.absent) and task.repeats > 1 for task in tasks), name


def test_the_list_names_every_workload_and_group(capsys):
    assert run.main(["--list"]) == 0
    workloads, groups = capsys.readouterr().out.split("\n\nof --providers:\n")
    assert [line.split()[0] for line in workloads.splitlines()] == list(run.WORKLOADS)
    assert [line.split()[0] for line in groups.splitlines()] == list(providers.GROUPS)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nonsense"], "no workload nonsense: there are generate, decode_step, score, "),
        (["score", "--providers", "ours,theirs"], "no provider theirs: there are ours, torch, sdpa, tortoise, "),
        (["score", "--providers", ","], "--providers names none: there are ours, torch, "),
        (["--compare", "nowhere", "nothing"], "nowhere is no file or folder of rows, and "),
        (["score", "--results", "/proc/nowhere"], "/proc/nowhere/cpu cannot be written ("),
        (["score", "--results", __file__], "cannot be written"),
        pytest.param(
            ["score", "--device", "cuda"],
            "--device cuda needs an NVIDIA GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="tells what happens without a GPU"),
        ),
    ],
)
def test_impossible_options_are_refused(words, message, workload, capsys):
    with pytest.raises(SystemExit) as stopped:
        run.main(words)
    assert stopped.value.code == 2 and message in capsys.readouterr().err and workload.measured == []


def row(commit, provider, q20, median, q80):
    seconds = {"q20": q20, "median": median, "q80": q80, "repeats": 5} if median else None
    shape = {"device": {"name": "m"}, "workload": "w", "shape": {"n": 1}}
    return json.dumps(shape | {"commit": commit, "provider": provider, "seconds": seconds}) + "\n"


def test_two_commits_are_compared_and_only_what_lies_apart_is_marked(tmp_path, capsys):
    (tmp_path / "cpu").mkdir()
    old = [row("aaa", "a", 1.0, 1.1, 1.2), row("aaa", "b", 1.0, 1.1, 1.2), row("aaa", "c", 1.0, 1.1, 1.2)]
    new = [row("bbb", "a", 1.25, 1.3, 1.4), row("bbb", "b", 1.1, 1.2, 1.4), row("bbb", "c", 0.5, 0.55, 0.6)]
    (tmp_path / "cpu/w.jsonl").write_text("".join([*old, *new, row("bbb", "wrong", 0, None, 0)]))
    found = {one.name[-1]: one for one in compare.compare("aaa", "bbb", tmp_path)}
    assert {name: one.verdict for name, one in found.items()} == {"a": "slower", "b": "", "c": "faster"}
    assert found["c"].ratio == pytest.approx(0.5) and found["a"].ratio == pytest.approx(1.3 / 1.1)
    assert run.main(["--compare", "aaa", "bbb", "--results", str(tmp_path)]) == 0
    assert "1 slower and 1 faster beyond the spread, of 3" in capsys.readouterr().out


def test_two_files_or_folders_are_compared_and_have_something_in_common(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name / "cpu").mkdir(parents=True)
    one, two = tmp_path / "one/cpu/w.jsonl", tmp_path / "two/cpu/w.jsonl"
    one.write_text(row("aaa", "a", 1.0, 1.1, 1.2) + row("aab", "a", 2.0, 2.1, 2.2))
    two.write_text(row("aaa", "a", 1.0, 1.05, 1.2))
    for first, second in ((one, two), (one.parent, two.parent), (tmp_path / "one", tmp_path / "two")):
        (found,) = compare.compare(str(first), str(second), tmp_path)
        assert found.ratio == pytest.approx(0.5) and found.verdict == "faster"  # against the newest of the first
    two.write_text(row("aaa", "b", 1.0, 1.05, 1.2))
    with pytest.raises(ValueError, match="have no row of one device, instruction set, shape and provider"):
        compare.compare(str(one), str(two), tmp_path)


def test_without_git_rows_say_so(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    harness.commit.cache_clear()
    assert harness.commit() == "unknown"
    harness.commit.cache_clear()
