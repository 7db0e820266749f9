"""A seed gives the same codes in another process, whatever that process has done before and in whatever order."""

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import json, sys
import numpy as np
import torch
from clvp_fast import CandidateEngine, CandidateRequest, SamplingParams

torch.set_num_threads(1)
order, max_batch, torch_seed = json.loads(sys.argv[1])
torch.manual_seed(torch_seed)
engine = CandidateEngine.from_pretrained("demo", device="cpu", max_batch=max_batch, max_new_tokens=24)
clip = np.random.default_rng(0).standard_normal(12000).astype(np.float32) * 0.1
texts = {"a": "Hello.", "b": "The birch canoe slid.", "c": "No."}
seeds = {"a": 2**63 + 1, "b": 7, "c": -3}
requests = [
    CandidateRequest(
        text=texts[name], audio=clip, sampling_rate=22050, id=name,
        sampling=SamplingParams(num_candidates=3, seed=seeds[name], max_new_tokens=20),
    )
    for name in order
]
print(json.dumps({result.request.id: result.codes.tolist() for result in engine.generate(requests)}))
"""


def started(order, max_batch, torch_seed, hash_seed):
    environment = os.environ | {"PYTHONHASHSEED": str(hash_seed), "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", SCRIPT, json.dumps([order, max_batch, torch_seed])]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def test_seeds_reproduce_in_other_processes():
    runs = [started("abc", 4, 1, hash_seed=1), started("cab", 9, 2, hash_seed=2)]
    first, other = (json.loads(run.communicate()[0]) for run in runs)
    assert all(run.returncode == 0 for run in runs)
    assert first == other
    assert len({tuple(row) for codes in first.values() for row in codes}) == 9
