"""`mel` of one recording and of folders: the model's own features, under the right names, whatever else lies there."""

import errno
import json
import os
import threading

import numpy as np
import pytest
import soundfile

from clvp_fast import ClvpFeatureExtractor
from clvp_fast.audio import load_audio, read_audio
from clvp_fast.cli import mel, report
from clvp_fast.demo import build_random
from clvp_fast.io import files

SECONDS = {"a": 0.9, "deep/b": 7.3, "deep/deeper/c.d": 6.0, "z": 0.013}


def write_sound(path, seconds=1.0, rate=22050, channels=1, seed=0):
    noise = np.random.default_rng(seed).normal(size=(round(seconds * rate), channels)) * 0.1
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, noise, rate)
    return path


@pytest.fixture
def folder(tmp_path):
    """Give recordings of several kinds, rates and lengths, and files that must be passed over."""
    kinds = [("a.WAV", 22050, 1), ("deep/b.flac", 16000, 2), ("deep/deeper/c.d.ogg", 44100, 1), ("z.mp3", 22050, 1)]
    for seed, (name, rate, channels) in enumerate(kinds):
        name = name.replace(".mp3", ".wav") if "MP3" not in soundfile.available_formats() else name
        seconds = SECONDS[name.rpartition(".")[0]]
        write_sound(tmp_path / "in" / name, seconds, rate, channels, seed)
    for other in ("notes.txt", "._a.wav", ".hidden/x.wav"):
        path = tmp_path / "in" / other
        path.parent.mkdir(exist_ok=True)
        path.write_text("no sound")
    return tmp_path / "in"


def expected(path, extractor=None, whole=False):
    """Return the features by the extractor alone, one recording a call."""
    extractor = extractor or ClvpFeatureExtractor()
    samples, _ = load_audio(path, extractor.sampling_rate)
    length = {"max_length": len(samples)} if whole else {}
    return extractor(samples, sampling_rate=extractor.sampling_rate, **length)["input_features"][0]


def contents(folder) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def recordings(folder) -> dict:
    found = {path.relative_to(folder).with_suffix("").as_posix(): path for path in folder.rglob("[a-z]*.*")}
    return {name: path for name, path in found.items() if name in SECONDS}


def test_mel_is_what_the_model_sees(cli, voice, tmp_path):
    outcome = cli("mel", voice, "--out", tmp_path)
    assert outcome.code == 0 and outcome.err == f"note: {voice}: only the first 6 s are used\n"
    written = np.load(tmp_path / "voice.npy")
    np.testing.assert_array_equal(written, expected(voice))
    assert written.shape == (80, 517) and written.dtype == np.float32
    assert (tmp_path / "voice.png").read_bytes().startswith(b"\x89PNG")
    assert "80 bins by 517 frames" in outcome.out and contents(tmp_path) == {"voice.npy", "voice.png"}


def test_a_whole_recording(cli, voice, tmp_path):
    outcome = cli("mel", voice, "--out", tmp_path, "--whole", "--json")
    (row,) = json.loads(outcome.out)["recordings"]
    samples, _ = load_audio(voice)
    written = np.load(tmp_path / "voice.npy")
    np.testing.assert_array_equal(written, expected(voice, whole=True))
    assert row["shape"] == [80, 1 + len(samples) // 256] == list(written.shape)
    assert row["remark"] is None
    (row,) = json.loads(cli("mel", voice, "--out", tmp_path, "--json").out)["recordings"]
    assert row["remark"] == "only the first 6 s are used"


def test_mel_norms_of_a_checkpoint(cli, voice, tmp_path):
    norms = np.linspace(0.5, 2.0, 80)
    (tmp_path / "checkpoint").mkdir()
    build_random(tmp_path / "checkpoint")
    ClvpFeatureExtractor(mel_norms=norms.tolist()).save_pretrained(tmp_path / "checkpoint")
    assert cli("mel", voice, "--out", tmp_path / "a").code == 0
    assert cli("mel", voice, "--out", tmp_path / "b", "--checkpoint", tmp_path / "checkpoint").code == 0
    plain, normed = np.load(tmp_path / "a/voice.npy"), np.load(tmp_path / "b/voice.npy")
    np.testing.assert_allclose(normed, plain / norms[:, None], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("batch_samples", [1, 150000, 1 << 21])
def test_a_folder_keeps_its_shape(cli, folder, tmp_path, monkeypatch, whole, batch_samples):
    monkeypatch.setattr(mel, "_BATCH_SAMPLES", batch_samples)
    outcome = cli("mel", folder, "--out", tmp_path / "out", *(["--whole"] if whole else []))
    assert outcome.code == 0, outcome.err
    assert contents(tmp_path / "out") == {f"{name}.npy" for name in SECONDS} | {"overview.png"}
    assert [path.name for path in (tmp_path / "out").iterdir() if path.name.startswith(".")] == []
    for name, path in recordings(folder).items():
        written = np.load(tmp_path / "out" / f"{name}.npy")
        np.testing.assert_allclose(written, expected(path, whole=whole), rtol=1e-5, atol=1e-5)
        frames = 1 + int(SECONDS[name] * 22050) // 256 if whole else 517
        assert written.dtype == np.float32 and written.shape[0] == 80 and abs(written.shape[1] - frames) <= 9
    assert "recordings" in outcome.err and "4/4" in outcome.err and "a second" in outcome.err
    assert "note: 1 of the recordings: 2 channels mixed down to one; resampled from 16000 Hz" in outcome.err
    assert "features of 4 recordings: 80 bins" in outcome.out and "overview.png" in outcome.out


def test_one_file_of_all(cli, folder, tmp_path):
    assert cli("mel", folder, "--out", tmp_path / "out", "--npz").code == 0
    assert contents(tmp_path / "out") == {"features.npz", "overview.png"}
    with np.load(tmp_path / "out/features.npz") as archive:
        assert set(archive) == set(SECONDS)
        for name, path in recordings(folder).items():
            np.testing.assert_allclose(archive[name], expected(path), rtol=1e-5, atol=1e-5)


def test_a_picture_of_each(cli, folder, tmp_path):
    assert cli("mel", folder, "--out", tmp_path / "out", "--pictures").code == 0
    assert contents(tmp_path / "out") == {f"{name}.{kind}" for name in SECONDS for kind in ("npy", "png")}


def test_an_overview_shows_the_first_on_one_scale(cli, tmp_path, monkeypatch):
    for index in range(15):
        write_sound(tmp_path / "in" / f"{index:02}.wav", 0.1, seed=index)
    drawn = []
    monkeypatch.setattr(mel, "draw_mels", lambda path, mels, extractor, total: drawn.append((mels, total)))
    assert cli("mel", tmp_path / "in", "--out", tmp_path / "out").code == 0
    ((mels, total),) = drawn
    assert [name for name, _ in mels] == [f"{index:02}" for index in range(12)] and total == 15
    np.testing.assert_array_equal(mels[7][1], np.load(tmp_path / "out/07.npy"))


def test_files_and_folders_together(cli, folder, voice, tmp_path):
    extra = write_sound(tmp_path / "elsewhere/extra.wav")
    argv = (extra, folder, voice, folder / "a.WAV")
    outcome = cli("mel", *argv, "--out", tmp_path / "out", "--json")
    document = json.loads(outcome.out)
    names = [row["name"] for row in document["recordings"]]
    assert names == ["extra", *sorted(SECONDS), "voice"] and document["failed"] == []
    assert document["recordings"][0]["recording"] == str(extra)
    assert {os.path.relpath(path, tmp_path / "out") for path in document["written"]} == contents(tmp_path / "out")
    for row in document["recordings"]:
        written = np.load(tmp_path / "out" / f"{row['name']}.npy")
        assert row["shape"] == list(written.shape)
        assert (row["min"], row["max"]) == (float(written.min()), float(written.max()))
        assert row["seconds"] == pytest.approx(SECONDS.get(row["name"], row["seconds"]), abs=0.06)


def spoil(folder) -> dict[str, str]:
    """Bad recordings beside the good ones, and the reason of each."""
    (folder / "b_broken.wav").write_bytes(b"RIFF nonsense")
    (folder / "deep/c_nothing.flac").write_bytes(b"")
    soundfile.write(folder / "d_empty.wav", np.zeros(0), 22050)
    soundfile.write(folder / "e_silent.wav", np.zeros(500), 22050)
    soundfile.write(folder / "f_nan.wav", np.array([0.1, np.nan, 0.2]), 22050, subtype="FLOAT")
    soundfile.write(folder / "y_late.wav", np.concatenate((np.zeros(7 * 8000), np.ones(8000))), 8000)
    soundfile.write(folder / "h_loud.wav", np.full((9, 2), 3e38), 22050, subtype="FLOAT")
    (folder / "g_away.wav").symlink_to("nowhere.wav")
    return {
        "b_broken.wav": "cannot be read",
        "deep/c_nothing.flac": "cannot be read",
        "d_empty.wav": "has no samples",
        "e_silent.wav": "is silent",
        "f_nan.wav": "NaN or infinite",
        "y_late.wav": "its first 6 s are silent",
        "g_away.wav": "no recording",
        "h_loud.wav": "has floats up to 3e+38, and full scale is 1",
    }


@pytest.mark.parametrize("npz", [False, True])
def test_bad_recordings_are_named_and_the_others_written(cli, folder, tmp_path, npz):
    reasons = spoil(folder)
    outcome = cli("mel", folder, "--out", tmp_path / "out", "--json", *(["--npz"] if npz else []))
    assert outcome.code == 1
    document = json.loads(outcome.out)
    assert [row["name"] for row in document["recordings"]] == sorted(SECONDS)
    failed = {os.path.relpath(row["recording"], folder): row["reason"] for row in document["failed"]}
    assert failed.keys() == reasons.keys() and all(reasons[name] in failed[name] for name in reasons)
    good = {"features.npz"} if npz else {f"{name}.npy" for name in SECONDS}
    assert contents(tmp_path / "out") == good | {"overview.png"}
    *_, last = lines = outcome.err.strip().splitlines()
    assert last == (
        "clvp-fast: error: 8 of 12 recordings cannot be used, and the notes name each; "
        "the features of the others are written"
    )
    for name, reason in reasons.items():
        assert any(line.startswith("note: ") and str(folder / name) in line and reason in line for line in lines)
    assert "12/12" in outcome.err
    load = np.load(tmp_path / "out/features.npz") if npz else lambda name: np.load(tmp_path / "out" / f"{name}.npy")
    for name, path in recordings(folder).items():
        written = load[name] if npz else load(name)
        np.testing.assert_allclose(written, expected(path), rtol=1e-5, atol=1e-5)


def test_only_bad_recordings_are_an_error(fails, tmp_path):
    for name in ("a.wav", "b.wav"):
        soundfile.write(tmp_path / name, np.zeros(500), 22050)
    sentence = fails("mel", tmp_path / "a.wav", tmp_path / "b.wav", "--out", tmp_path / "out")
    assert sentence == "none of the 2 recordings can be used; the notes name each"
    assert not (tmp_path / "out").exists()


def test_places_that_cannot_be_taken(fails, folder, tmp_path, monkeypatch):
    out = tmp_path / "out"
    (tmp_path / "none/deep").mkdir(parents=True)
    (tmp_path / "none/.x.wav").write_bytes(b"")
    sentence = fails("mel", folder, tmp_path / "none", "--out", out)
    assert sentence == f"{tmp_path}/none has no recordings in it (WAV, FLAC, MP3 or OGG)"
    twin = write_sound(folder / "deep/b.wav")
    sentence = fails("mel", folder, "--out", out)
    assert sentence == (
        f"{folder}/deep/b.flac and {twin} would both be written to deep/b.npy: rename one, or give them different --out"
    )
    twin.unlink()
    other = write_sound(tmp_path / "other/a.wav")
    assert f"{folder}/a.WAV and {other} would both be written to a.npy" in fails("mel", folder, other, "--out", out)

    def scandir(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(mel.os, "scandir", scandir)
    assert fails("mel", folder, "--out", out) == f"Permission denied: {folder}"
    assert not out.exists()


def test_a_pipe_in_a_folder(fails, folder, tmp_path):
    """Nobody may ever write into it, so that nothing waits for it."""
    os.mkfifo(folder / "deep/pipe.wav")
    sentence = fails("mel", folder, "--out", tmp_path / "out")
    assert sentence.startswith(f"{folder}/deep/pipe.wav is a pipe or a device among recordings: move it away")
    sentence = fails("generate", "Yes.", "--voice", folder / "deep", "--out", tmp_path / "out")
    assert sentence.startswith(f"{folder}/deep/pipe.wav is a pipe or a device among recordings: move it away")


def test_a_file_where_a_subfolder_should_be(fails, folder, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "deep").write_text("mine")
    sentence = fails("mel", folder, "--out", out)
    assert sentence == f"cannot write into {out}: a file stands where the folder should be; choose another folder"
    assert contents(out) == {"deep"} and (out / "deep").read_text() == "mine"


def test_a_full_disk_keeps_what_was_there(cli, fails, folder, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert cli("mel", folder, "--out", out).code == 0
    before = {name: (out / name).read_bytes() for name in contents(out)}
    saved = []

    def save(path, array):
        if len(saved) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        saved.append(path)
        path.write_bytes(b"half")

    monkeypatch.setattr(mel.np, "save", save)
    assert "the disk is full" in fails("mel", folder, "--out", out, "--whole")
    assert len(saved) == 2 and before == {name: (out / name).read_bytes() for name in contents(out)}


@pytest.mark.parametrize("npz", [False, True])
@pytest.mark.parametrize("existing", [False, True])
def test_an_interrupt_midway_leaves_the_folder_as_it_was(cli, folder, tmp_path, monkeypatch, npz, existing):
    out = tmp_path / "out"
    option = ["--npz"] if npz else []
    if existing:
        assert cli("mel", folder, "--out", out, *option).code == 0
    before = {name: (out / name).read_bytes() for name in contents(out)} if existing else None
    calls = []

    def features(self, *args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    original = ClvpFeatureExtractor.__call__
    monkeypatch.setattr(ClvpFeatureExtractor, "__call__", features)
    monkeypatch.setattr(mel, "_BATCH_SAMPLES", 1)
    outcome = cli("mel", folder, "--out", out, "--whole", *option)
    assert outcome.code == 130 and outcome.err.endswith("clvp-fast: interrupted; nothing was written\n")
    assert outcome.out == "" and len(calls) == 3
    if existing:
        assert before == {name: (out / name).read_bytes() for name in contents(out)}
        assert {path.name for path in out.iterdir()} == {name.split("/")[0] for name in before}
    else:
        assert not out.exists()


def test_an_interrupt_while_files_arrive_leaves_whole_files(cli, folder, tmp_path, monkeypatch):
    moved = []

    def replace(source, target):
        if len(moved) == 2:
            raise KeyboardInterrupt
        moved.append(target)
        os.rename(source, target)

    monkeypatch.setattr(files.os, "replace", replace)
    out = tmp_path / "out"
    assert cli("mel", folder, "--out", out).code == 130
    assert len(moved) == 2 and {out / name for name in contents(out)} == set(moved)
    for path in moved:
        assert np.load(path).shape == (80, 517)


def test_memory_does_not_grow_with_the_number(cli, tmp_path, monkeypatch):
    """Bound the decoded recordings that wait, and those in the extractor at a time."""
    write_sound(tmp_path / "one.wav", 2.0)
    (tmp_path / "in").mkdir()
    for index in range(30):
        (tmp_path / f"in/{index}.wav").symlink_to(tmp_path / "one.wav")
    decoded, done, most, batches = [], [], [0], []

    def load(path, rate, seconds):
        decoded.append(path)
        most[0] = max(most[0], len(decoded) - len(done))
        return read_audio(path, rate, seconds)

    def extract(self, clips, **options):
        batches.append(len(clips))
        done.extend(clips)
        return original(self, clips, **options)

    original = ClvpFeatureExtractor.__call__
    monkeypatch.setattr(mel, "read_audio", load)
    monkeypatch.setattr(mel.torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(ClvpFeatureExtractor, "__call__", extract)
    monkeypatch.setattr(mel, "_BATCH_SAMPLES", 4 * 44100)
    assert cli("mel", tmp_path / "in", "--out", tmp_path / "out").code == 0
    assert batches == [4] * 7 + [2]
    assert len(decoded) == 30 and most[0] <= 4 + 3  # a batch, and what two threads have decoded ahead


@pytest.mark.parametrize("npz", [False, True])
def test_formats_of_a_folder(cli, voice, tmp_path, npz):
    """Read each supported format, name each other recording, and leave other files alone."""
    samples, rate = soundfile.read(voice)
    for suffix in ("aiff", "opus", "au", "caf", "w64", "oga", "AIF"):
        given = {"opus": ("OGG", "OPUS", 48000), "oga": ("OGG", "VORBIS", rate)}.get(suffix, (None, None, rate))
        format = given[0] or {"AIF": "AIFF"}.get(suffix)
        soundfile.write(tmp_path / f"in-{suffix}.{suffix}", samples, given[2], format=format, subtype=given[1])
    soundfile.write(tmp_path / "both.flac", samples, rate)
    (tmp_path / "both.m4a").write_bytes(b"\0\0\0 ftypM4A ")
    (tmp_path / "notes.txt").write_text("Hello.")
    outcome = cli("mel", tmp_path, "--out", tmp_path / "out", "--json", *(["--npz"] if npz else []))
    document = json.loads(outcome.out)
    names = {row["name"] for row in document["recordings"]}
    assert names == {"both", *(f"in-{suffix}" for suffix in ("aiff", "opus", "au", "caf", "w64", "oga", "AIF"))}
    (failed,) = document["failed"]
    assert failed["recording"].endswith("both.m4a") and "cannot be read as a recording" in failed["reason"]
    assert outcome.code == 1 and "both.m4a" in outcome.err and "notes.txt" not in outcome.err


@pytest.mark.parametrize("npz", [False, True])
def test_a_name_that_is_no_utf_8(cli, voice, tmp_path, npz):
    """Write the name as other programs of the system do, escaped where UTF-8 is required."""
    path = tmp_path / os.fsdecode(b"v\xffice.flac")
    path.write_bytes(voice.read_bytes())
    found = cli("mel", path, "--out", tmp_path / "out", "--json", *(["--npz"] if npz else []))
    assert found.code == 0, found.err
    (row,) = json.loads(found.out)["recordings"]
    assert row["recording"] == str(path)
    written = np.load(tmp_path / "out/features.npz") if npz else {"": np.load(tmp_path / f"out/{path.stem}.npy")}
    assert [array.shape for array in dict(written).values()] == [(80, 517)]


def test_a_pipe(cli, voice, tmp_path):
    """Read a pipe such as /dev/stdin."""
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_bytes(voice.read_bytes()))
    writer.start()
    found = cli("mel", tmp_path / "pipe", "--out", tmp_path / "out")
    writer.join()
    assert found.code == 0, found.err
    np.testing.assert_array_equal(np.load(tmp_path / "out/pipe.npy"), expected(voice))


def test_a_long_list_is_cut(capsys, tmp_path):
    report.print_written([tmp_path / str(index) for index in range(40)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 33 and lines[-1] == "and 8 more"
