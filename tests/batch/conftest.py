"""Jobs without a model, which end in milliseconds."""

import pytest

from clvp_fast.batch import job, summary
from tests.batch.jobs import VOICE, NoModel, blank_overview, failures, records, results, write_jsonl


@pytest.fixture
def corpus(tmp_path):
    return write_jsonl(tmp_path / "corpus.jsonl", records(50))


@pytest.fixture
def no_model(monkeypatch):
    """Run jobs without a model; give the executors that were made, and options for those to come."""
    made: list[NoModel] = []
    options: dict = {}

    def executor(settings, *_):
        made.append(NoModel(settings, **options))
        return made[-1]

    monkeypatch.setattr(job, "_executor", executor)
    monkeypatch.setattr(summary, "draw_overview", blank_overview)
    executor.made, executor.options = made, options
    return executor


@pytest.fixture
def run(no_model, corpus, out):
    """Give `run(...)`, which does the corpus, in shards of 8 rows, into `out`, and returns the summary."""

    def do(source=corpus, out=out, **options):
        return job.run(source, out, **{"shard_rows": 8, "progress": False, "voice": VOICE, **options})

    return do


@pytest.fixture
def out(tmp_path):
    """Give the folder that `run` writes into."""
    return tmp_path / "out"


@pytest.fixture
def undisturbed(run, tmp_path):
    """Give results and failures of a run that nothing stops."""
    run(out=tmp_path / "undisturbed")
    return results(tmp_path / "undisturbed"), failures(tmp_path / "undisturbed")


@pytest.fixture
def null_job(monkeypatch):
    """Run jobs with a worker over an engine without a model; give the exceptions that results shall have, by row."""
    from tests.batch.null_worker import null_worker

    strange: dict[str, Exception] = {}
    monkeypatch.setattr(job, "_executor", lambda settings, *_: job.Here(null_worker(settings, strange)))
    monkeypatch.setattr(summary, "draw_overview", blank_overview)
    return strange
