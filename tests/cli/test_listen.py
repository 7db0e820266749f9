"""`generate --listen`: recordings of the kept candidates, and a page that Chromium opens, plays and sorts."""

import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file

from clvp_fast.cli.page import Page, Section, data_url
from tests.kit.browser import Browser

QUICK = ("--num-candidates", 4, "--max-new-tokens", 24, "--no-pictures", "--listen")
NASTY = '<script>alert(1)</script> & "quotes" \' \u2028 </script> </style> <!-- sailed'


def test_recordings_and_page(cli, voice, checkpoint, tmp_path):
    outcome = cli("generate", "hello there", "--voice", voice, "--checkpoint", checkpoint, "--out", tmp_path, *QUICK)
    assert outcome.code == 0, outcome.err
    assert f"wrote {tmp_path}/report.html" in outcome.out and f"wrote {tmp_path}/sound" in outcome.out
    rows = json.loads((tmp_path / "candidates.json").read_text())["candidates"]
    assert [row["sound"] for row in rows] == [f"sound/rank-{rank}.wav" for rank in (1, 2, 3, 4)]
    for row in rows:
        samples, rate = soundfile.read(tmp_path / row["sound"])
        assert rate == 22050 and len(samples) == (4 * row["tokens"] - 1) * 256
        assert row["seconds"] == pytest.approx(len(samples) / rate, abs=1e-3) and np.abs(samples).max() > 0.05
    assert sorted(path.name for path in (tmp_path / "sound").iterdir()) == [f"rank-{n}.wav" for n in (1, 2, 3, 4)]
    page = (tmp_path / "report.html").read_text()
    assert page.count("<audio ") == 4 and str(tmp_path) not in page and str(voice.parent) not in page


def test_kept_ones_alone_are_spoken(cli, voice, checkpoint, tmp_path):
    argv = ("generate", "hello", "there", "--voice", voice, "--checkpoint", checkpoint, "--out", tmp_path)
    outcome = cli(*argv, *QUICK, "--keep", 1)
    assert outcome.code == 0
    assert len(list(tmp_path.rglob("*.wav"))) == 2 and len(list(tmp_path.rglob("report.html"))) == 1
    page = (tmp_path / "report.html").read_text()
    assert page.count("<audio ") == 2 and page.count("<h2>") == 3
    assert f"wrote {tmp_path}/report.html" in outcome.out and "sound" not in outcome.out


def test_without_a_vocoder_one_sentence_and_codes(cli, voice, tmp_path):
    outcome = cli("generate", "hello", "--voice", voice, "--out", tmp_path, *QUICK)
    assert outcome.code == 0
    told = [line for line in outcome.err.splitlines() if "vocoder" in line]
    assert told == [
        "note: checkpoint 'random' has no vocoder (vocoder.json and vocoder.safetensors), so there is nothing "
        "to hear; codes and scores are still written"
    ]
    assert {path.name for path in tmp_path.iterdir()} == {"codes.npz", "candidates.json"}


def test_a_saved_voice_says_what_is_missing(cli, voice, checkpoint, tmp_path):
    common = (
        "--checkpoint",
        checkpoint,
        "--num-candidates",
        2,
        "--max-new-tokens",
        8,
        "--no-pictures",
        "--out",
        tmp_path,
    )
    saved = tmp_path / "saved.safetensors"
    assert cli("generate", "hello", "--voice", voice, "--save-voice", saved, *common).code == 0
    outcome = cli("generate", "hello", "--voice", saved, "--listen", *common)
    assert (
        outcome.code == 0
        and "nothing can be heard: a saved voice has no recording, which the vocoder needs" in outcome.err
    )
    assert not (tmp_path / "report.html").exists() and (tmp_path / "codes.npz").exists()


def files_of(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_nothing_of_an_earlier_run_is_left_beside_new_results(cli, voice, checkpoint, tmp_path):
    common = ("generate", "hello", "--voice", voice, "--checkpoint", checkpoint, "--out", tmp_path)
    short = ("--max-new-tokens", 8)
    assert cli(*common, "--num-candidates", 10, *short, "--latents", "--listen").code == 0
    (tmp_path / "sound/mine.wav").write_bytes(b"x")
    assert {"candidates.png", "latents.npz", "sound/rank-10.wav"} <= files_of(tmp_path)
    outcome = cli(*common, *QUICK, "--num-candidates", 2)
    assert outcome.code == 0 and f"{tmp_path}/candidates.png and 11 more of an earlier run" in outcome.err
    plain = {"codes.npz", "candidates.json", "sound/mine.wav"}
    assert files_of(tmp_path) == plain | {"report.html", "sound/rank-1.wav", "sound/rank-2.wav"}
    outcome = cli(*common, "--num-candidates", 2, *short, "--no-pictures")
    assert outcome.code == 0 and files_of(tmp_path) == plain
    (tmp_path / "report.html").write_text("<title>A page of mine</title>")
    assert cli(*common, "--num-candidates", 2, *short, "--no-pictures").code == 0
    assert files_of(tmp_path) == plain | {"report.html"}


def test_voices_that_are_called_as_results(cli, voice, checkpoint, tmp_path):
    folders = [tmp_path / name for name in ("report.html", "Summary.json")]
    for folder in folders:
        folder.mkdir()
        shutil.copy(voice, folder)
    argv = ("generate", "hello", "--voice", folders[0], "--voice", folders[1], "--checkpoint", checkpoint)
    outcome = cli(*argv, "--out", tmp_path / "out", *QUICK)
    assert outcome.code == 0, outcome.err
    names = {"report.html", "summary.json", "report.html-2", "Summary.json-2"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    assert (tmp_path / "out/report.html").is_file()


class Outline(HTMLParser):
    """The elements of a page with their attributes, and the texts of its headings."""

    def __init__(self, page: str):
        super().__init__()
        self.found, self.headings, self._inside = [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        self._inside = tag
        if tag in ("h1", "h2"):
            self.headings.append("")

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside in ("h1", "h2"):
            self.headings[-1] += data


def a_row(rank: int, score=1.5, **changes) -> dict:
    return {"rank": rank, "candidate": 10 - rank, "tokens": 7, "score": score, "stopped": True, **changes}


def test_names_and_texts_are_escaped_in_the_page():
    page = Page("Heard", {"checkpoint": NASTY})
    page.add_section(Section(NASTY, NASTY, [NASTY], data_url("image/png", b"x")))
    page.add(0, a_row(1), 0.5, data_url("audio/wav", b"x"), None)
    outline = Outline(page.html())
    assert NASTY in outline.headings
    tags = [tag for tag, _ in outline.found]
    assert tags.count("script") == 1 and tags.count("style") == 1 and "alert" not in tags
    (policy,) = (attributes["content"] for tag, attributes in outline.found if "http-equiv" in attributes)
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    assert len(re.findall("'sha256-[^']+'", policy)) == 2


def test_page_keeps_the_best_that_fit():
    page = Page("Heard", limit=230_000)
    for number in range(2):
        page.add_section(Section(f"text {number}", "voice", []))
        for rank in range(1, 6):
            page.add(number, a_row(rank, score=None if rank == 5 else -rank), 0.5, "data:," + "x" * 5000, None)
    content = page.html()
    kept = [tuple(map(int, found)) for found in re.findall(r'data-rank="(\d)" data-score="(-?\d)', content)]
    assert page.left_out == 5 and [rank for rank, _ in kept] == [1, 2, 3, 1, 2]
    assert len(content.encode()) <= 230_000 and "has at most 0 MB: 5 candidates; all" in content


def test_page_has_a_voice_once_and_leaves_out_what_has_no_room():
    page = Page("Heard", limit=400_000)
    first = data_url("image/png", bytes(15_000))
    for number in range(200):
        picture = first if number < 50 else data_url("image/png", bytes([number]) * 15_000)
        page.add_section(Section(f"text {number}" + "x" * 2000, "voice", [], picture))
        page.add(number, a_row(1), 0.5, data_url("audio/wav", bytes(1000)), None)
    content = page.html()
    shown = content.count("<audio ")
    assert len(content.encode()) <= 400_000 and 20 < shown == 200 - page.left_out == content.count("<ol>")
    assert content.count("<figure>") == content.count(first) == 1, "later voices' sections have no room"
    assert f"{200 - shown} candidates, {200 - shown} texts with all of theirs, 147 pictures of voices" in content
    few = Page("Heard", limit=400_000)
    for number in range(8):
        few.add_section(Section("text", "voice", [], data_url("image/png", bytes([number]) * 15_000)))
        few.add(number, a_row(1), 0.5, data_url("audio/wav", b"x"), None)
    assert few.html().count("<audio ") == 8 and few.html().count("<figure>") == 4
    assert few.what_is_left_out == "4 pictures of voices"


def test_a_vocoder_without_sound_leaves_codes_and_scores(cli, voice, checkpoint, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(checkpoint, damaged)
    weights = load_file(damaged / "vocoder.safetensors")
    save_file({name: value * torch.nan for name, value in weights.items()}, damaged / "vocoder.safetensors")
    argv = ("generate", "hello", "--voice", voice, "--checkpoint", damaged, "--out", tmp_path / "out", *QUICK)
    outcome = cli(*argv)
    assert outcome.code == 0, outcome.err
    assert "nothing can be heard: the vocoder gives samples that are NaN or infinite" in outcome.err
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"codes.npz", "candidates.json"}


def test_any_vocoder_without_sound(cli, voice, checkpoint, tmp_path, monkeypatch):
    def speak(self, codes, *_):
        return [np.full(5000, np.nan, dtype=np.float32) for _ in codes]

    monkeypatch.setattr("clvp_fast.vocoder.CodecVocoder.speak", speak)
    outcome = cli("generate", "hello", "--voice", voice, "--checkpoint", checkpoint, "--out", tmp_path, *QUICK)
    assert outcome.code == 0 and "nothing can be heard: " in outcome.err
    assert {path.name for path in tmp_path.iterdir()} == {"codes.npz", "candidates.json"}


def test_a_voice_whose_name_is_no_utf8(cli, voice, checkpoint, tmp_path):
    odd = tmp_path / "v\udcff.flac"
    shutil.copy(voice, odd)
    outcome = cli("generate", "hello", "--voice", odd, "--checkpoint", checkpoint, "--out", tmp_path / "out", *QUICK)
    assert outcome.code == 0, outcome.err
    assert (tmp_path / "out/report.html").read_text().count("<audio ") == 4


@pytest.fixture(scope="module")
def spoken(tmp_path_factory, checkpoint):
    """Give a page of two texts, one of them nasty, with four candidates each."""
    from clvp_fast.cli import main
    from tests.cli.conftest import ROOT

    out = tmp_path_factory.mktemp("spoken")
    argv = ["generate", NASTY, "hello there", "--voice", ROOT / "examples/voice.flac", "--checkpoint", checkpoint]
    assert main([str(part) for part in (*argv, "--out", out, *QUICK)]) == 0
    return out


ORDER = "return [...document.querySelectorAll('ol')].map(l => [...l.children].map(i => Number(i.dataset[%r])))"


def test_chromium_opens_plays_and_sorts_it(spoken, tmp_path):
    rows = [json.loads(path.read_text())["candidates"] for path in sorted(spoken.glob("0*/candidates.json"))]
    with Browser(tmp_path) as browser:
        browser.open(spoken / "report.html")
        durations = browser.run(
            "return Promise.all([...document.querySelectorAll('audio')].map(p => p.readyState ? p.duration :"
            " new Promise(done => p.addEventListener('loadedmetadata', () => done(p.duration)))))"
        )
        assert durations == pytest.approx([row["seconds"] for of_text in rows for row in of_text], abs=0.01)
        played = browser.run(
            "const p = document.querySelector('audio'); return p.play().then(() => new Promise(done =>"
            " p.addEventListener('timeupdate', () => p.currentTime > 0 && done(p.currentTime))))"
        )
        assert 0 < played <= durations[0]
        # The second player stops the first.
        assert browser.run(
            "const [a, b] = document.querySelectorAll('audio'); a.loop = true;"
            " return a.play().then(() => b.play()).then(() => new Promise(done => setTimeout(done, 200)))"
            ".then(() => a.paused)"
        )
        assert browser.run(ORDER % "rank") == [[1, 2, 3, 4]] * 2
        browser.run("document.getElementById('order').focus()")
        browser.press("l")  # by the keyboard: "length"
        seconds = browser.run(ORDER % "seconds")
        assert seconds == [sorted(of_text) for of_text in seconds]
        assert browser.run("return document.getElementById('said').textContent") == "Sorted by length."
        browser.press("r")
        assert browser.run(ORDER % "rank") == [[1, 2, 3, 4]] * 2
        pictures = browser.run("return [...document.images].every(i => i.complete && i.naturalWidth > 1 && i.alt)")
        names = browser.run("return [...document.querySelectorAll('audio')].map(p => p.ariaLabel)")
        assert pictures and len(set(names)) == 8 and all("candidate" in name for name in names)
        assert "alert(1)" in browser.run("return document.querySelector('h2').textContent")
        assert browser.console() == []


def test_chromium_shows_it_at_phone_width(spoken, tmp_path):
    with Browser(tmp_path, phone=360) as browser:
        browser.open(spoken / "report.html")
        width, needed, furthest, lowest = browser.run(
            "const all = [...document.querySelectorAll('li, audio, img, dl, select')];"
            " return [document.documentElement.clientWidth, document.documentElement.scrollWidth,"
            " Math.max(...all.map(e => e.getBoundingClientRect().right)),"
            " document.getElementById('order').offsetHeight]"
        )
        assert width == 360 and needed <= 360 and furthest <= 360 and lowest >= 40  # a finger's height
