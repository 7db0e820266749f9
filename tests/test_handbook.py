"""Every command and every example of the handbook runs; hub ids stand for checkpoints of this machine."""

import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import clvp_fast
from clvp_fast import ClapConfig, ClapFeatureExtractor, ClapModel, ClapProcessor, batch, ops
from clvp_fast.audio import load_audio
from clvp_fast.cli import main
from clvp_fast.demo import random_checkpoint
from tests.kit.documents import CLAP_ID, HUB_ID, ROOT, blocks, clone, commands, run, text_of, would_run
from tests.models.clap.test_processing import tokenizer

PAGES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))
DOCUMENTS = [*sorted(path.name for path in ROOT.glob("*.md")), *PAGES]
# By page: Python blocks, and lines of shell blocks. Those of the pages below are run here, the others where it says.
HERE = {
    "docs/change-the-import.md": (3, 0),
    "docs/clap.md": (1, 1),
    "docs/command-line.md": (0, 6),
    "docs/convert.md": (0, 1),
    "docs/servers.md": (3, 0),
    "docs/tutorial.md": (1, 4),
}
ELSEWHERE = {
    "docs/batch.md": (2, 4),  # here, and of a cluster in tests/batch/test_distributed.py
    "docs/benchmarks.md": (0, 4),  # tests/benchmarks/test_documents.py
    "docs/kernels.md": (1, 0),  # tests/ops/test_norm.py
    "docs/ptx.md": (0, 1),  # tests/ptx
    "docs/tortoise.md": (1, 4),  # here, but for `pip`, and for `speak` in tests/integrations/test_tortoise_vocoder.py
    "docs/scaling.md": (0, 2),  # tests/benchmarks/test_scaling.py
}


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """Give the folder of a reader of the handbook, with a small random CLAP under the hub id that it names."""
    monkeypatch.chdir(clone(tmp_path))
    return tmp_path


def small_clap(folder: Path) -> None:
    folder = folder / CLAP_ID
    folder.mkdir(parents=True)
    extractor = ClapFeatureExtractor(truncation="rand_trunc")
    ClapProcessor(extractor, tokenizer(folder)).save_pretrained(folder)
    text = dict(vocab_size=300, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    audio = dict(patch_embeds_hidden_size=16, depths=[1, 1], num_attention_heads=[1, 2], hidden_size=32)
    ClapModel(ClapConfig(text_config=text, audio_config=audio)).save_pretrained(folder)


def test_every_page_with_examples_is_tested():
    found = {page: (len(blocks(page, "python")), len(commands(page))) for page in PAGES}
    assert {page: counts for page, counts in found.items() if any(counts)} == HERE | ELSEWHERE
    fences = {word for page in PAGES for word in re.findall(r"^```(\S+)", text_of(page), flags=re.MULTILINE)}
    assert fences == {"python", "sh"}


def run_commands(page: str, capsys) -> None:
    for command in commands(page):
        program, *arguments = shlex.split(command)
        if program in ("make", "pip"):
            done = would_run(program, arguments)
            assert done.returncode == 0, done.stderr
        elif "autoregressive.pth" in arguments:  # needs files that are not to be had; its own tests make some
            assert main(arguments) == 1
            assert "autoregressive.pth" in capsys.readouterr().err
        else:
            assert program == "clvp-fast"
            assert main(arguments) == 0, capsys.readouterr().err


def test_commands_of_the_command_line(reader, capsys):
    run_commands("docs/command-line.md", capsys)
    assert (reader / "out/candidates.png").exists() and (reader / "out/voice.npy").exists()
    texts = (reader / "examples/texts.txt").read_text().splitlines()
    assert len(list((reader / "out/texts").glob("00[1-9]-*/codes.npz"))) == len(texts) == 2
    assert (reader / "out/corpus/shards/part-000000.parquet").exists()
    assert (reader / "out/texts/summary.json").exists() and (reader / "out/narrator.safetensors").exists()


def test_tutorial(reader, capsys):
    run_commands("docs/tutorial.md", capsys)
    names = run(blocks("docs/tutorial.md", "python")[0], "docs/tutorial.md")
    assert names["best"].dtype == np.int64 and names["best"].ndim == 1
    assert names["scores"].shape == (4,) and (np.diff(names["scores"]) <= 0).all()


def test_commands_of_clap_and_of_conversion(reader, capsys):
    small_clap(reader)
    run_commands("docs/clap.md", capsys)
    run_commands("docs/convert.md", capsys)


def test_clap_example(reader):
    small_clap(reader)
    names = run(blocks("docs/clap.md", "python")[0], "docs/clap.md")
    assert names["probabilities"].shape == (1, 2)
    torch.testing.assert_close(names["probabilities"].sum(-1), torch.ones(1))


def of_the_hub(number: int) -> dict:
    page = "docs/change-the-import.md"
    return run(blocks(page, "python")[number], page, **{HUB_ID: str(random_checkpoint())})


def test_the_import_changed(reader):
    torch.manual_seed(0)
    names = of_the_hub(0)
    assert names["best"].dtype == torch.int64 and names["best"].ndim == 1
    scores = names["candidates"].logits_per_text[0]
    assert scores.shape == (4,) and torch.isfinite(scores).all()


def test_the_example_of_transformers(reader, monkeypatch):
    """Use stand-ins for the `datasets` package and its recording."""
    samples, _ = load_audio(reader / "examples/voice.flac")
    rows = [{"audio": {"array": samples, "sampling_rate": 22050}}]
    dataset = SimpleNamespace(cast_column=lambda column, audio: rows)
    module = SimpleNamespace(load_dataset=lambda *a, **k: dataset, Audio=lambda sampling_rate: None)
    monkeypatch.setitem(sys.modules, "datasets", module)
    output = of_the_hub(1)["generated_output"]
    codes = output[0]
    assert codes.dtype == torch.int64 and codes.shape[0] == 1 and codes.shape[1] >= 1
    assert all(torch.isfinite(part).all() for part in output[1:5])


def test_the_scorer_alone(reader):
    scores = of_the_hub(2)["scores"]
    assert scores.shape == (1, 2) and torch.isfinite(scores).all() and scores[0, 0] != scores[0, 1]


def test_many_texts_at_once(reader, capsys):
    run(blocks("docs/servers.md", "python")[0], "docs/servers.md")
    printed = capsys.readouterr().out
    assert printed.count("array(") == 4 and "One sentence. [(" in printed and "And another. [(" in printed


def test_a_server_answers_as_the_engine_alone(reader):
    names = run(blocks("docs/servers.md", "python")[1], "docs/servers.md")
    request = names["CandidateRequest"](text="One sentence.", audio=names["samples"], sampling_rate=22050)
    settings = names["SamplingParams"](num_candidates=4, max_new_tokens=20, seed=0)
    (alone,) = names["engine"].generate(request, settings)
    assert names["codes"][0] == alone.best(1)[0][1].tolist() != names["codes"][1]


def test_tokens_as_they_are_drawn(reader):
    names = run(blocks("docs/servers.md", "python")[2], "docs/servers.md")
    assert len(names["tokens"]) == int(names["result"].lengths.sum() + names["result"].stopped.sum())
    assert {candidate for candidate, _ in names["tokens"]} == {0, 1}


def test_corpus(reader, capsys):
    assert main(shlex.split(commands("docs/batch.md")[0])[1:]) == 0, capsys.readouterr().err
    assert (reader / "out/corpus/summary.json").exists()
    names = run(blocks("docs/batch.md", "python")[0], "docs/batch.md")
    assert names["summary"]["spoken"] == 3
    best = names["best"].to_pylist()
    assert [row["id"] for row in best] == ["canoe", "sheet", "depth"]
    assert [row["candidates"] for row in best] == [4, 2, 4]
    assert len({row["seed"] for row in best}) == 3


def test_the_reference_has_every_public_name():
    pages = [page for page in PAGES if page.startswith("docs/reference/")]
    named = [name for page in pages for name in re.findall(r"^::: clvp_fast\.(\S+)$", text_of(page), re.MULTILINE)]
    operators = {name for name in ops.__all__ if name.islower()} - {"backend", "explain"}
    wanted = {name for name in clvp_fast.__all__ if name != "__version__"}
    wanted |= {f"batch.{name}" for name in batch.__all__} | {f"ops.{name}" for name in operators}
    assert len(named) == len(set(named)), "a name stands twice"
    wanted |= {f"vocoder.{name}" for name in ("Vocoder", "CodecVocoder", "load_vocoder", "save_vocoder")}
    assert set(named) == wanted | {
        "audio.load_audio",
        "audio.Audio",
        "distributed.CandidateActor",
        "integrations.make_tortoise_importable",
    }


def test_every_page_is_in_the_navigation():
    text = text_of("mkdocs.yml")
    listed = set(re.findall(r"^ +- (?:[^:\n]+: )?(\S+\.md)$", text.split("\nnav:\n")[1], re.MULTILINE))
    assert listed == {page.removeprefix("docs/") for page in PAGES}


def test_the_site_asks_no_other_machine():
    """Replace the theme's fonts and the search's shim, which Material would load from elsewhere."""
    text = text_of("mkdocs.yml")
    assert "\n  font: false\n" in text and "polyfills:\n    - javascripts/iframe-worker.js\n" in text
    assert "http" not in text + text_of("docs/stylesheets/handbook.css") + text_of("docs/javascripts/iframe-worker.js")


def anchors(document: Path) -> set[str]:
    """Return the anchors of a document: its headings, as GitHub and the handbook write them."""
    text = re.sub(r"^```.*?^```$", "", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document):
    for link in re.findall(r"\]\(([^)\s:]+)\)", text_of(document)):
        target, _, anchor = link.partition("#")
        path = (ROOT / document).parent / target if target else ROOT / document
        assert path.exists(), f"{document} links to {target}"
        assert not anchor or anchor in anchors(path), f"{document} links to {link}, and {target} has no such heading"


def test_tortoise_example(reader, monkeypatch):
    """Use a stand-in for the package and its voices, which has positions for fewer tokens."""
    from tests.integrations import stand_in

    voice = [torch.rand(1, 22050) for _ in range(2)], None
    modules = {
        "tortoise": SimpleNamespace(),
        "tortoise.api": SimpleNamespace(TextToSpeech=lambda enable_redaction: stand_in.TextToSpeech()),
        "tortoise.utils": SimpleNamespace(),
        "tortoise.utils.audio": SimpleNamespace(load_voice=lambda name: voice),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("clvp_fast.integrations.make_tortoise_importable", lambda: ())
    shorter = {'preset="fast"': 'preset="fast", max_mel_tokens=20', "samples=96": "samples=4, max_mel_tokens=20"}
    names = run(blocks("docs/tortoise.md", "python")[0], "docs/tortoise.md", **shorter)
    assert names["sound"] is not None and len(names["sounds"]) == 2
