"""A corpus through the job of `clvp-fast batch`, compared with the bare engine on the same requests.

On the small random model and with few candidates, where the job's own work (rows, journals, shards, the summary and its
picture) weighs most: with a full-size one it is below what can be measured. The model is loaded already; the error is
the share of rows whose best candidate differs.
"""

import json
import random
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pyarrow.parquet as pq

from benchmarks.harness import ROOT, Provider, Task, task
from clvp_fast import CandidateRequest
from clvp_fast.batch import Settings, job
from clvp_fast.batch.inputs import read_rows
from clvp_fast.batch.worker import Worker

VOICE = str(ROOT / "examples/voice.flac")
WORDS = "the birch canoe slid on smooth planks and a doctor paid for it glue sheet to dark blue background"
# Rows, candidates of each, and tokens of a candidate.
SHAPES = {"cpu": ((600, 2, 16), (32, 16, 64)), "cuda": ((5000, 16, 64),)}
SMOKE = ((6, 2, 4),)


def tasks(device: str, smoke: bool = False) -> Iterator[Task]:
    for rows, candidates, new_tokens in SMOKE if smoke else SHAPES[device]:
        settings = Settings(device=device, voice=VOICE, num_candidates=candidates, max_new_tokens=new_tokens)
        both = _Both(settings, rows)
        makers = {
            "clvp_fast engine": partial(_provider, both, "clvp_fast engine", both.engine),
            "clvp_fast batch": partial(_provider, both, "clvp_fast batch", both.batch),
        }
        shape = {"rows": rows, "candidates": candidates, "new_tokens": new_tokens, "model": "random"}
        yield task("corpus", shape, makers, 1 if smoke else 5)


class _Both:
    """The two ways over one model and one corpus; each gives the codes of the best candidate by row."""

    def __init__(self, settings: Settings, rows: int):
        self._settings, self._count = settings, rows
        self._worker = None

    def prepare(self) -> None:
        if self._worker is not None:
            return
        rng = random.Random(0)
        self._folder = tempfile.TemporaryDirectory()
        self._source = Path(self._folder.name, "corpus.jsonl")
        texts = (" ".join(rng.choices(WORDS.split(), k=rng.randint(3, 15))) for _ in range(self._count))
        rows = ({"id": index, "text": text} for index, text in enumerate(texts))
        self._source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        self._worker = Worker(self._settings)

    def engine(self) -> dict[int, list[int]]:
        engine, settings = self._worker.engine, self._worker.settings
        voice, _ = self._worker.voice(VOICE)
        requests = (
            CandidateRequest(
                text=row.text,
                conditioning=voice,
                sampling=settings.sampling(seed=row.seed(settings.seed)),
                id=row.index,
            )
            for row in read_rows(self._source)
        )
        return {result.request.id: result.best(1)[0][1].tolist() for result in engine.generate(requests)}

    def batch(self) -> dict[int, list[int]]:
        out = tempfile.mkdtemp(dir=self._folder.name)
        with patch.object(job, "_executor", lambda *_: job.Here(self._worker)):
            job.run(self._source, out, progress=False, **self._settings.as_dict())
        lines = pq.read_table(Path(out, "shards")).to_pylist()
        return {line["row"]: line["codes"] for line in lines}


def _provider(both: _Both, name: str, run) -> Provider:
    both.prepare()
    expected, found = both.engine(), run()
    different = sum(found.get(row) != codes for row, codes in expected.items()) / len(expected)
    return Provider(name, run, different, 0.0)
