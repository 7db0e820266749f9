"""`generate()` on a GPU keeps its captured steps: the same tokens, no eager step, and no memory that stays."""

import copy
import gc

import pytest
import torch

import clvp_fast
from clvp_fast import CandidateEngine, CandidateRequest, ClvpFeatureExtractor, SamplingParams
from clvp_fast.engine.host_copy import HostCopy
from clvp_fast.engine.runner import Runner
from clvp_fast.models.clvp import kept
from tests.models.clvp.test_generation_on_engine import TORTOISE, prompts, tiny

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def nothing_is_left():
    kept.release_all()
    yield
    kept.release_all()


@pytest.fixture
def launched(monkeypatch):
    """Give the rows of each step that is launched or captured, and not replayed."""
    rows, step = [], Runner._step

    def noted(self, number, **shortcuts):
        rows.append(number)
        step(self, number, **shortcuts)

    monkeypatch.setattr(Runner, "_step", noted)
    return rows


def model_of(dtype=torch.bfloat16):
    return tiny(stop_bias=1.0).speech_decoder_model.to("cuda", dtype)


def drawn(model, candidates=6, new_tokens=40, seed=3):
    torch.manual_seed(seed)
    settings = TORTOISE | dict(num_return_sequences=candidates, max_new_tokens=new_tokens, use_engine=True)
    prompt = prompts(tiny(), 1).to(model.device, model.dtype)
    return model.generate(conditioning_embeds=prompt, **settings)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_are_those_without_captures(dtype, launched, monkeypatch):
    """Compare first and later calls with a runner that captures nothing; replays call no Python of a step."""
    model, init = model_of(dtype), Runner.__init__
    with monkeypatch.context() as patch:
        patch.setattr(Runner, "__init__", lambda self, *args, **options: init(self, *args, **options, capture=False))
        expected = [drawn(model, seed=seed) for seed in (3, 3, 4, 5)]
    assert not kept._KEPT
    found = [drawn(model, seed=3) for _ in range(2)]
    launched.clear()
    found += [drawn(model, seed=seed) for seed in (4, 5)]
    assert all(map(torch.equal, found, expected)) and not torch.equal(found[2], found[3])
    assert len(launched) <= 4, "sizes that came less than twice before"


def test_memory_comes_back():
    """Free pages and graphs by `release`, by a move, and with the model."""
    model = model_of()
    drawn(model, new_tokens=5)
    clvp_fast.release(model)
    torch.cuda.synchronize()
    gc.disable()
    try:
        before = torch.cuda.memory_allocated()
        for free in (clvp_fast.release, lambda model: model.to("cuda")):
            for _ in range(3):
                drawn(model)
            torch.cuda.synchronize()
            assert torch.cuda.memory_allocated() > before and len(kept._KEPT) == 1
            free(model)
            assert torch.cuda.memory_allocated() == before and not kept._KEPT
        drawn(model)
        size = sum(parameter.nbytes for parameter in model.parameters())
        del model
        assert torch.cuda.memory_allocated() < before - size / 2
    finally:
        gc.enable()


def test_copies_lack_it():
    model = model_of()
    expected = drawn(model)
    other = copy.deepcopy(model)
    assert len(kept._KEPT) == 1
    assert torch.equal(drawn(other), expected) and len(kept._KEPT) == 2


def test_memory_that_runs_out(monkeypatch):
    """Halve the batch, as without captures, and keep nothing."""
    model, decode, planted = model_of(), Runner.decode, []
    expected = drawn(model)
    assert torch.equal(drawn(model), expected)

    def failing(self, num_slots):
        if not planted:
            planted.append(None)
            torch.empty(1 << 50, dtype=torch.uint8, device="cuda")  # raises, as any tensor of a full device
        return decode(self, num_slots)

    monkeypatch.setattr(Runner, "decode", failing)
    assert torch.equal(drawn(model), expected) and not kept._KEPT


def test_a_step_that_cannot_be_captured_is_launched(monkeypatch, caplog):
    """Read the device within a step, which no capture allows; later calls draw the same, captured or not."""
    model, step = model_of(), Runner._step
    expected = drawn(model)
    kept.release_all()

    def reading(self, rows, **shortcuts):
        step(self, rows, **shortcuts)
        self.slots.tensors["seq_lens"].sum().item()

    with monkeypatch.context() as patch:
        patch.setattr(Runner, "_step", reading)
        assert torch.equal(drawn(model), expected) and not kept._KEPT
    assert "because they could not be captured" in caplog.text
    assert torch.equal(drawn(model), expected)


def test_a_copy_to_the_host_does_not_wait():
    """Copy behind work of some milliseconds: it has not arrived when the call returns, and then has its values."""
    x = torch.randn(4096, 4096, device="cuda")
    HostCopy(x[:1, :1]).wait()
    torch.cuda.synchronize()
    for _ in range(20):
        x = (x @ x).tanh()
    under_way = HostCopy(x[0], None, x[:2, :3].bfloat16().float())
    assert not under_way.arrived
    row, nothing, part = under_way.wait()
    assert nothing is None and under_way.arrived
    assert row.tolist() == x[0].tolist() and part.tolist() == x[:2, :3].bfloat16().float().tolist()


def test_results_come_while_others_decode():
    """Rank short requests beside long ones; a result waits for no later step of the others."""
    model = tiny(stop_bias=-100.0).to("cuda", torch.bfloat16)
    processor = type("Processor", (), dict(feature_extractor=ClvpFeatureExtractor(feature_size=20), tokenizer=None))()
    engine = CandidateEngine(model, processor, max_batch=8, max_new_tokens=60)
    engine.warm_up()

    def request(seed, new_tokens):
        sampling = SamplingParams(num_candidates=2, max_new_tokens=new_tokens, seed=seed)
        features = torch.randn(1, 20, 40, generator=torch.Generator().manual_seed(4))
        return CandidateRequest(input_ids=[5, 9, 17], input_features=features, sampling=sampling)

    alone = {seed: next(engine.generate(request(seed, new))) for seed, new in ((0, 5), (1, 60), (2, 20))}
    together = list(engine.generate([request(1, 60), request(0, 5), request(2, 20)]))
    assert [result.request.sampling.seed for result in together] == [0, 2, 1]
    for result in together:
        expected = alone[result.request.sampling.seed]
        assert result.error is None and result.codes.tolist() == expected.codes.tolist()
        assert abs(result.scores - expected.scores).max() < 1e-2 * abs(expected.scores).max()
