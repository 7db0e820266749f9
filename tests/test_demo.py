"""The random checkpoint: standard layout, equal weights everywhere, candidates of varied lengths; and both names."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from clvp_fast import ClvpModelForConditionalGeneration, ClvpProcessor, ClvpTokenizer, demo, native
from clvp_fast.checkpoint import load_checkpoint, resolve_checkpoint
from clvp_fast.cli import main
from clvp_fast.demo import RANDOM_VERSION, build_random, is_random, random_checkpoint
from clvp_fast.io.files import UnwritableError, cache_folder
from tests.kit.isa import forget_library

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    build_random(folder)
    return folder


def test_layout(folder):
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        "config.json",
        "generation_config.json",
        "merges.txt",
        "model.safetensors",
        "preprocessor_config.json",
        "tokenizer_config.json",
        "vocab.json",
    }
    vocabulary = json.loads((folder / "vocab.json").read_text())
    assert sorted(vocabulary.values()) == list(range(255))
    assert [vocabulary[token] for token in ("[STOP]", "[UNK]", "[SPACE]")] == [0, 1, 2]


def test_vocabulary_is_reachable(folder):
    """Make every merge's token out of tokens before it; real text needs no [UNK]."""
    tokenizer = ClvpTokenizer.from_pretrained(folder)
    assert tokenizer.convert_tokens_to_ids("<|endoftext|>") == 255
    made = set("abcdefghijklmnopqrstuvwxyz")
    for line in (folder / "merges.txt").read_text().splitlines()[1:]:
        left, right = line.split(" ")
        assert left in made and right in made
        made.add(left + right)
    ids = tokenizer('The doctor paid 25 dollars, (or more); didn\'t he: yes/no? "so-so" it was!')["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert max(ids) <= 254
    assert len(ids) < 60


def test_the_same_weights_every_time(folder, tmp_path):
    state = torch.get_rng_state()
    build_random(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    first, second = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    digests = {hashlib.sha256((some / "model.safetensors").read_bytes()).hexdigest() for some in (folder, tmp_path)}
    assert len(digests) == 1


def test_plain_classes_load_it(folder):
    model, report = ClvpModelForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.decoder_config.vocab_size == 8194
    assert model.config.speech_config.vocab_size == 8192
    processor = ClvpProcessor.from_pretrained(folder)
    assert processor(text="hello")["input_ids"]


def test_candidates_end_at_varied_lengths():
    checkpoint = load_checkpoint("random")
    model = checkpoint.model
    ids = checkpoint.tokenizer("The birch canoe slid on the smooth planks.", return_tensors="pt")["input_ids"]
    torch.manual_seed(0)
    output = model.generate(
        ids,
        torch.randn(1, 80, 517),
        num_return_sequences=16,
        max_new_tokens=200,
        do_sample=True,
        temperature=0.8,
        top_p=0.8,
        repetition_penalty=2.0,
        return_dict_in_generate=True,
    )
    tokens = output.sequences[:, 1:]
    is_stop = tokens == 8193
    lengths = torch.where(is_stop.any(1), is_stop.int().argmax(1), tokens.shape[1])
    assert lengths.min() >= 30 and lengths.max() <= 160
    assert len(set(lengths.tolist())) >= 6
    assert len({tuple(row) for row in tokens.tolist()}) == 16
    scores = output.logits_per_text[0]
    assert torch.isfinite(scores).all() and scores.std() > 0.05


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("CLVP_FAST_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    assert random_checkpoint() == tmp_path / "own" / RANDOM_VERSION == resolve_checkpoint("random")
    monkeypatch.delenv("CLVP_FAST_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "clvp_fast"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "clvp_fast"


def test_random_and_demo_are_names_and_no_folders(monkeypatch, tmp_path, folder, capsys):
    """Take `demo` for the trained one of the package, and `random` for noise, whatever folders are beside."""
    monkeypatch.chdir(tmp_path)
    for name, place in (("demo", demo.TRAINED), ("random", random_checkpoint())):
        shutil.copytree(folder, tmp_path / name)
        assert resolve_checkpoint(name) == place and is_random(name) == (name == "random")
        assert resolve_checkpoint(f"./{name}") == Path(name) and not is_random(f"./{name}")
    common = ("--voice", ROOT / "examples/voice.flac", "--num-candidates", 1, "--max-new-tokens", 4, "--no-pictures")
    for name, told in (("random", 1), ("demo", 0)):
        argv = ("generate", "hello", "--checkpoint", name, *common, "--out", tmp_path / "out")
        assert main([str(part) for part in argv]) == 0
        assert capsys.readouterr().err.count(f"checkpoint '{name}' has random weights") == told


def homeless(monkeypatch):
    def home():
        raise RuntimeError("Could not determine home directory.")

    for name in ("CLVP_FAST_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", home)


@pytest.fixture
def no_library_yet(monkeypatch):
    """Let this process forget the native library, before and after the test."""
    monkeypatch.setattr(native, "_untold", set())
    forget_library()
    yield
    forget_library()


@pytest.mark.parametrize("loaded", [False, True], ids=["library not asked for", "library loaded"])
def test_no_home_is_one_sentence_and_info_shows_the_rest(monkeypatch, capsys, loaded, no_library_yet):
    if loaded:
        native.missing("cpu")
    homeless(monkeypatch)
    with pytest.raises(UnwritableError, match="no home folder for a cache: name a folder in CLVP_FAST_CACHE"):
        cache_folder()
    assert main(["info", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["cache"].startswith("none: this user has no home folder") and told["operators"]


def test_a_cache_that_cannot_be_written(tmp_path):
    """Make a folder of this user and this run, whether the cache is a file or the user has no home."""
    code = """
import os, stat
from pathlib import Path
from clvp_fast.demo import random_checkpoint

def show():
    folder = random_checkpoint()
    assert folder == random_checkpoint() and (folder / "model.safetensors").stat().st_size > 1e6
    print(folder, oct(stat.S_IMODE(folder.stat().st_mode)))

def homeless():
    raise RuntimeError

show()
del os.environ["CLVP_FAST_CACHE"]
Path.home = homeless
show()"""
    (tmp_path / "cache").write_text("")
    environment = {name: value for name, value in os.environ.items() if name != "XDG_CACHE_HOME"}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[1]), "TMPDIR": str(tmp_path)}
    environment["CLVP_FAST_CACHE"] = str(tmp_path / "cache")
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    shown = [line.split() for line in done.stdout.splitlines()]
    assert len({folder for folder, _ in shown}) == 2 and {mode for _, mode in shown} == {"0o700"}
    assert all(Path(folder).parent == tmp_path and not Path(folder).exists() for folder, _ in shown)
    assert done.stderr.count("is built for this run alone: ") == 2
