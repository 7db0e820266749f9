"""Every command and every Python example of README.md runs; hub ids stand for a local checkpoint folder."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from clvp_fast import ClapConfig, ClapFeatureExtractor, ClapModel, ClapProcessor
from clvp_fast.audio import load_audio
from clvp_fast.cli import main
from clvp_fast.demo import demo_checkpoint
from tests.models.clap.test_processing import tokenizer

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
HUB_ID = "susnato/clvp_dev"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


COMMANDS = [line for block in blocks("sh") for line in block.splitlines() if line]


def small_clap(folder: Path) -> None:
    """A small random CLAP below `folder`, under the hub id that the README names."""
    folder = folder / "laion/clap-htsat-unfused"
    folder.mkdir(parents=True)
    extractor = ClapFeatureExtractor(truncation="rand_trunc")
    ClapProcessor(extractor, tokenizer(folder)).save_pretrained(folder)
    text = dict(vocab_size=300, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    audio = dict(patch_embeds_hidden_size=16, depths=[1, 1], num_attention_heads=[1, 2], hidden_size=32)
    ClapModel(ClapConfig(text_config=text, audio_config=audio)).save_pretrained(folder)


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """The folder of a person who follows the README: a clone with its examples."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_nothing_is_left_out():
    assert len(blocks("python")) == 7
    assert len(COMMANDS) == 11
    assert set(re.findall(r"^```(\S+)", README, flags=re.MULTILINE)) == {"python", "sh"}


def test_commands_in_order(reader, capsys):
    small_clap(reader)
    for command in COMMANDS:
        program, *arguments = shlex.split(command)
        if program == "make":  # only whether the target is there: it would set up another environment
            done = subprocess.run(["make", "-n", *arguments], cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
        elif program == "pip":  # only whether it could: this environment has the package already
            options = ["--dry-run", "--no-deps", "--no-build-isolation", "--quiet"]
            done = subprocess.run(
                [sys.executable, "-m", "pip", *arguments, *options], cwd=ROOT, capture_output=True, text=True
            )
            assert done.returncode == 0, done.stderr
        elif "autoregressive.pth" in arguments:  # needs files that are not to be had; its own tests make some
            assert main(arguments) == 1
            assert "autoregressive.pth" in capsys.readouterr().err
        else:
            assert program == "clvp-fast"
            assert main(arguments) == 0, capsys.readouterr().err
    assert (reader / "out/candidates.png").exists() and (reader / "out/voice.npy").exists()
    texts = (reader / "examples/texts.txt").read_text().splitlines()
    assert len(list((reader / "out/texts").glob("00[1-9]-*/codes.npz"))) == len(texts) == 2
    assert (reader / "out/corpus/shards/part-000000.parquet").exists()
    assert (reader / "out/texts/summary.json").exists() and (reader / "out/narrator.safetensors").exists()


def test_first_screen(reader, capsys):
    """At most 40 lines, and an example of six that prints what stands beside it, whatever the instruction set."""
    screen = README.split("\n## ")[0]
    example = blocks("python")[0]
    assert len(screen.splitlines()) <= 40 and example in screen
    assert len([line for line in example.splitlines() if line]) == 6
    exec(compile(example, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip() == re.search(r"# speech tokens: (\[[\d, ]+\])", example)[1]


def test_first_example(reader):
    torch.manual_seed(0)
    names = run(blocks("python")[1])
    assert names["best"].dtype == torch.int64 and names["best"].ndim == 1
    scores = names["candidates"].logits_per_text[0]
    assert scores.shape == (4,) and torch.isfinite(scores).all()


def test_engine_example(reader, capsys):
    exec(compile(blocks("python")[3], "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert printed.count("array(") == 4 and "One sentence. [(" in printed and "And another. [(" in printed


def test_scorer_example(reader):
    scores = run(blocks("python")[4])["scores"]
    assert scores.shape == (1, 2) and torch.isfinite(scores).all() and scores[0, 0] != scores[0, 1]


def test_documented_example(reader, monkeypatch):
    """With stand-ins for the hub's checkpoint and for the `datasets` package with its recording."""
    samples, _ = load_audio(reader / "examples/voice.flac")
    rows = [{"audio": {"array": samples, "sampling_rate": 22050}}]
    dataset = SimpleNamespace(cast_column=lambda column, audio: rows)
    module = SimpleNamespace(load_dataset=lambda *a, **k: dataset, Audio=lambda sampling_rate: None)
    monkeypatch.setitem(sys.modules, "datasets", module)
    output = run(blocks("python")[2])["generated_output"]
    codes = output[0]
    assert codes.dtype == torch.int64 and codes.shape[0] == 1 and codes.shape[1] >= 1
    assert all(torch.isfinite(part).all() for part in output[1:5])


def test_clap_example(reader):
    """With a small random CLAP in place of the hub's."""
    small_clap(reader)
    names = {}
    exec(compile(blocks("python")[5], "README.md", "exec"), names)
    assert names["probabilities"].shape == (1, 2)
    torch.testing.assert_close(names["probabilities"].sum(-1), torch.ones(1))


def test_corpus_example(reader):
    names = {}
    exec(compile(blocks("python")[6], "README.md", "exec"), names)
    assert names["summary"]["spoken"] == 3
    best = names["best"].to_pylist()
    assert [row["id"] for row in best] == ["canoe", "sheet", "depth"]
    assert [row["candidates"] for row in best] == [4, 2, 4]
    assert len({row["seed"] for row in best}) == 3


def run(example: str) -> dict:
    assert HUB_ID in example
    names = {}
    exec(compile(example.replace(HUB_ID, str(demo_checkpoint())), "README.md", "exec"), names)
    return names


@pytest.mark.parametrize(
    "document", sorted(path.relative_to(ROOT) for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")))
)
def test_links_lead_somewhere(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / document).parent.joinpath(target).exists(), f"{document} links to {target}"
