"""Parts that follow the installed release of transformers: names, warnings, and which releases are served at all."""

import inspect
import os
import re
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from transformers import DynamicCache

import clvp_fast
from clvp_fast.models import transformers_versions
from clvp_fast.models.transformers_versions import NEWEST, OLDEST
from tests.models.clvp.builders import STOP, assert_same, clips, codes, pair, texts

ROOT = Path(__file__).resolve().parents[2]
DECODERS = ["ClvpDecoder", "ClvpModel", "ClvpForCausalLM"]
#: By the arguments of transformers' own model, not by the package's answer.
NAME = "cache" if "cache" in inspect.signature(transformers.ClvpForCausalLM.forward).parameters else "past_key_values"
TOKENS = dict(max_new_tokens=6, do_sample=False, eos_token_id=STOP, pad_token_id=STOP)


def run_with(release: str, code: str) -> subprocess.CompletedProcess:
    """Run `code` in a new interpreter, where transformers claims to be of `release`."""
    stand_in = f"import transformers; transformers.__version__ = {release!r}"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path, str(ROOT)])}
    command = [sys.executable, "-c", f"{stand_in}\n{code}"]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_a_release_that_is_too_old():
    """Import the package, and say what to do for every name that needs transformers."""
    code = """
import clvp_fast
for name in "ClvpForCausalLM", "ClvpTokenizer", "ClapModel", "CLVPConfig", "CandidateEngine":
    try:
        getattr(clvp_fast, name)
    except ImportError as error:
        print(error)
"""
    done = run_with("5.16.1", code)
    newest = ".".join(map(str, NEWEST))
    sentence = (
        f"clvp_fast {clvp_fast.__version__} needs transformers 5.17 or newer, and 5.16.1 is installed: "
        f"install a newer one, as with pip install 'transformers=={newest}.*'"
    )
    assert done.stdout.splitlines() == [sentence] * 5, done.stderr


def test_a_release_that_is_newer_than_the_tested():
    """Warn once for all imports, and go on."""
    release = f"{NEWEST[0]}.{NEWEST[1] + 1}.0.dev0"
    done = run_with(release, "import clvp_fast\nfor name in clvp_fast.__all__: getattr(clvp_fast, name)\nprint('on')")
    assert done.returncode == 0 and done.stdout == "on\n", done.stderr
    said = f"clvp_fast {clvp_fast.__version__} is tested with transformers up to {'.'.join(map(str, NEWEST))}, and "
    assert f"UserWarning: {said}{release} is installed: results and arguments may differ\n" in done.stderr
    assert done.stderr.count("Warning") == 1


@pytest.mark.parametrize("release", [OLDEST, NEWEST, (NEWEST[0] + 1, 0), (OLDEST[0], OLDEST[1] - 1), (4, 57)])
def test_the_range_is_of_minor_releases(release, monkeypatch):
    monkeypatch.setattr(transformers_versions, "INSTALLED", release)
    if release < OLDEST:
        with pytest.raises(ImportError, match=r"needs transformers 5\.17 or newer"):
            transformers_versions.check_release()
        return
    _, said = recorded(transformers_versions.check_release)
    assert [category for category, _ in said] == ([UserWarning] if release > NEWEST else [])


def test_pyproject_has_the_same_bounds():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (bounds,) = (text for text in project["dependencies"] if text.startswith("transformers"))
    numbers = [tuple(map(int, pair)) for pair in re.findall(r"(\d+)\.(\d+)", bounds)]
    assert re.sub(r"[\d.]+", "", bounds) == "transformers>=,<"
    assert numbers == [OLDEST, (NEWEST[0], NEWEST[1] + 1)]


def test_no_other_module_knows_a_name_that_changed():
    """Find the cache's old name and the release in one module only."""
    sources = [path for path in (ROOT / "clvp_fast").rglob("*.py") if path.name != "transformers_versions.py"]
    for path in sources:
        text = path.read_text(encoding="utf-8")
        assert "past_key_values" not in text and "transformers.__version__" not in text, path


@pytest.mark.parametrize(
    ("name", "method"),
    [*((name, "forward") for name in DECODERS), ("ClvpForCausalLM", "prepare_inputs_for_generation")],
)
def test_the_cache_stands_where_stock_has_it(name, method):
    stock, ours = (getattr(getattr(package, name), method) for package in (transformers, clvp_fast))
    expected, found = (list(inspect.signature(function).parameters) for function in (stock, ours))
    shared = [parameter for parameter in found if parameter in expected]
    assert NAME in shared and shared == [parameter for parameter in expected if parameter in found]
    assert found[: found.index(NAME) + 1] == expected[: expected.index(NAME) + 1]


def test_names_kept_where_they_are_moved():
    stock, ours = pair("ClvpForCausalLM")
    assert set(ours._skip_keys_device_placement) == set(stock._skip_keys_device_placement) == {NAME}


def recorded(call):
    """Return a call's result and its warnings, as category and text."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = call()
    return result, [(warning.category, str(warning.message)) for warning in caught]


@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_the_old_name_works_and_warns_as_in_stock(name):
    """Refuse the other name where the release has one alone, as stock does."""
    ids, results = codes(2, 6), []
    for model in pair(name, dtype=torch.float64):
        outputs = model(ids[:, :5], use_cache=True)
        call = recorded(lambda model=model, outputs=outputs: model(ids[:, 5:], past_key_values=outputs[NAME])[0])
        results.append((*call, outputs[NAME].get_seq_length(), model(ids)[0][:, 5:]))
    (expected, *said), (found, *own) = results
    assert own[:2] == said[:2] and own[1] == 6
    assert bool(own[0]) == (NAME == "cache")
    assert_same(found, expected)
    assert_same(found, own[2])


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_generate_takes_the_names_that_stock_takes(name):
    results = []
    for model in pair("ClvpForCausalLM"):
        cache = DynamicCache(config=model.config)
        try:
            tokens, said = recorded(lambda model=model, cache=cache: model.generate(codes(), **TOKENS, **{name: cache}))
        except ValueError as error:
            tokens, said = torch.empty(0), str(error)
        results.append((tokens.tolist(), said, cache.get_seq_length()))
    assert results[1] == results[0]
    assert bool(results[0][2]) == (name == NAME or NAME == "cache")


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_that_is_given_continues_embeddings(name):
    """Fill the caller's cache for conditioning embeddings too, and no other one."""
    _, ours = pair()
    prompt = ours.conditioning_encoder(clips(), texts()).detach()
    decoder = ours.speech_decoder_model
    expected = decoder.generate(conditioning_embeds=prompt, use_engine=False, **TOKENS)
    cache = DynamicCache(config=decoder.config)
    if name not in (NAME, "past_key_values"):
        with pytest.raises(ValueError, match="not used by the model"):
            decoder.generate(conditioning_embeds=prompt, **TOKENS, **{name: cache})
        return
    found, said = recorded(lambda: decoder.generate(conditioning_embeds=prompt, **TOKENS, **{name: cache}))
    assert found.tolist() == expected.tolist()
    assert cache.get_seq_length() == prompt.shape[1] + found.shape[1] - 1
    assert [category for category, _ in said] == ([FutureWarning] if name != NAME else [])


@torch.no_grad()
def test_outputs_answer_to_the_names_that_stock_has():
    for model in pair("ClvpForCausalLM"):
        outputs = model(codes(), use_cache=True)
        assert list(outputs) == ["logits", NAME] and outputs.to_tuple()[1] is outputs[NAME]
        assert outputs.past_key_values is outputs[NAME] is outputs["past_key_values"]
        assert hasattr(outputs, "cache") == (NAME == "cache")
