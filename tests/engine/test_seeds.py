"""A seed gives the same codes in another process, whatever that process has done before and in whatever order."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from clvp_fast import CandidateEngine, CandidateRequest, SamplingParams

TEXTS = {"a": "Hello.", "b": "The birch canoe slid.", "c": "No."}
SEEDS = {"a": 2**63 + 1, "b": 7, "c": -3}


def drawn(order: str, max_batch: int) -> dict[str, list]:
    """Return the codes of the requests of these names, which are made in this order."""
    engine = CandidateEngine.from_pretrained("random", device="cpu", max_batch=max_batch, max_new_tokens=24)
    clip = np.random.default_rng(0).standard_normal(12000).astype(np.float32) * 0.1
    requests = [
        CandidateRequest(
            text=TEXTS[name],
            audio=clip,
            sampling_rate=22050,
            id=name,
            sampling=SamplingParams(num_candidates=3, seed=SEEDS[name], max_new_tokens=20),
        )
        for name in order
    ]
    return {result.request.id: result.codes.tolist() for result in engine.generate(requests)}


def test_seeds_reproduce_in_another_process():
    hash_seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    environment = os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(Path(__file__).parents[2])}
    code = "import json, torch; from tests.engine.test_seeds import drawn; torch.set_num_threads(1); "
    code += "torch.manual_seed(2); print(json.dumps(drawn('cab', 9)))"
    found = subprocess.run([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
    assert found.returncode == 0
    torch.manual_seed(1)
    first = drawn("abc", 4)
    assert first == json.loads(found.stdout)
    assert len({tuple(row) for codes in first.values() for row in codes}) == 9
