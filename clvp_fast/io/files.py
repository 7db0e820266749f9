"""Output files that are written atomically, and the folder for the package's own files."""

import errno
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


class UnwritableError(OSError):
    """A folder or file that cannot be written; the message is one sentence."""

    @classmethod
    def explain(cls, error: OSError, folder: Path) -> "UnwritableError":
        if error.errno == errno.ENOSPC:
            reason = "the disk is full; free some space or choose another folder"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            reason = "no permission to write there; choose another folder"
        elif error.errno == errno.EISDIR:
            reason = f"a folder stands where the file {error.filename} should be; move it away or choose another folder"
        elif error.errno in (errno.ENOTDIR, errno.EEXIST):
            reason = "a file stands where the folder should be; choose another folder"
        else:
            reason = error.strerror or str(error)
        return cls(error.errno, f"cannot write into {folder}: {reason}")


def user_path(place: str | os.PathLike) -> Path:
    """Return `place` as a path. A `~` of an existing user at its beginning becomes the home folder; any other stays.

    Raises:
        ValueError: it is "", perhaps from a variable that is not set; Python would take that for the working folder.
    """
    if not os.fspath(place):
        raise ValueError("a path is empty: it must be that of a file or a folder, and . is the working folder")
    return Path(os.path.expanduser(place))


def is_special(path: Path) -> bool:
    """Tell whether `path` is a pipe, a socket or a device, and not a file or folder."""
    return path.exists() and not (path.is_file() or path.is_dir())


def cache_folder() -> Path:
    """Return the folder of the package's own files: `$CLVP_FAST_CACHE`, else clvp_fast in the user's cache folder.

    Raises:
        UnwritableError: the user has no home folder, and neither `CLVP_FAST_CACHE` nor `XDG_CACHE_HOME` names another.
    """
    chosen = os.environ.get("CLVP_FAST_CACHE")
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        if chosen:
            return Path(chosen).expanduser()
        return (Path(base) if base else Path.home() / ".cache") / "clvp_fast"
    except RuntimeError as error:
        raise UnwritableError(
            errno.ENOENT, "this user has no home folder for a cache: name a folder in CLVP_FAST_CACHE"
        ) from error


def make_private(folder: Path) -> None:
    """Make `folder` and its missing parents, for this user alone."""
    for place in reversed([place for place in (folder, *folder.parents) if not place.exists()]):
        with suppress(FileExistsError):  # another process was faster
            place.mkdir(mode=0o700)


def changeable_by_others(path: Path, root: Path) -> str | None:
    """Return why another user could change the file at `path` or its folders up to `root`, or None.

    Root does not count. In a folder with the sticky bit, such as /tmp, users cannot touch each other's files.
    """
    for place in (path, *path.parents):
        found = os.stat(place)
        if found.st_uid not in (0, os.geteuid()):
            return f"{place} belongs to another user (number {found.st_uid})"
        if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not found.st_mode & stat.S_ISVTX:
            return f"other users may write into {place}"
        if place == root:
            break
    return None


@contextmanager
def staged_folder(target: str | Path) -> Iterator[Path]:
    """Yield a scratch folder. Its files move into `target` when the block succeeds, and are removed otherwise.

    The scratch folder lies inside `target`, which is made if it does not exist. So an unwritable place is found before
    any work is done, and each file arrives by one rename: readers see the old file or the new one, never a part.
    Folders inside the scratch folder are merged into those of `target`.

    Raises:
        UnwritableError: `target` cannot be made or written, a folder has the name of a file, or the disk is full. The
            former content is untouched.
    """
    target = Path(target)
    made = [folder for folder in (target, *target.parents) if not folder.exists()]
    scratch = None
    try:
        target.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".clvp-fast-", dir=target))
        yield scratch
        paths = sorted(scratch.rglob("*"))
        files = [path for path in paths if not path.is_dir()]
        for path in files:
            with open(path, "rb") as handle:
                os.fsync(handle.fileno())
        for path in files:  # flush all of them before the first is moved
            if (arrived := target / path.relative_to(scratch)).is_dir():
                raise UnwritableError.explain(IsADirectoryError(errno.EISDIR, "", str(arrived)), target)
        for folder in (target / path.relative_to(scratch) for path in paths if path.is_dir()):
            if not folder.is_dir():
                made.insert(0, folder)
                folder.mkdir()
        for path in files:
            os.replace(path, target / path.relative_to(scratch))
    except UnwritableError:
        raise
    except Exception as error:
        refused = _refusal(error)
        # An error about a file that was not written here passes unchanged.
        if refused and (
            refused.errno == errno.ENOSPC
            or scratch is None
            or _inside(refused.filename, scratch)
            or refused.filename in map(str, made)
        ):
            raise UnwritableError.explain(refused, target) from error
        raise
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
        for folder in made:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def build_folder_once(target: Path, build) -> Path:
    """Return `target`, after `build(folder)` filled it if it did not exist. If two processes race, one result stays."""
    if target.is_dir():
        return target
    try:
        make_private(target.parent)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise UnwritableError.explain(error, target.parent) from error
    try:
        build(scratch)
        os.chmod(scratch, 0o755)
        os.rename(scratch, target)
    except Exception as error:
        refused = _refusal(error)
        if refused is None:
            raise
        if not target.is_dir():  # otherwise another process was first, and its folder is equal
            raise UnwritableError.explain(refused, target.parent) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def _refusal(error: Exception) -> OSError | None:
    """Return the system's error, if `error` is one or, as from safetensors, has one in its message."""
    if isinstance(error, OSError):
        return error
    number = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(number[1]), os.strerror(int(number[1]))) if number else None


def _inside(filename, folder: Path) -> bool:
    return isinstance(filename, (str, os.PathLike)) and Path(filename).is_relative_to(folder)


def json_text(document, encoding: str = "utf-8", indent: int | None = 2) -> str:
    """Return `document` as JSON with a final newline, in ASCII if `encoding` cannot represent it.

    No encoding can represent file names that are not UTF-8, which Python keeps as lone surrogates.
    """
    text = json.dumps(document, indent=indent, ensure_ascii=False)
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        text = json.dumps(document, indent=indent)
    return text + "\n"


def write_json(path: Path, document) -> None:
    """Write `document` as indented UTF-8 JSON with a final newline."""
    path.write_text(json_text(document), encoding="utf-8")


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yield a path to write to; it is renamed to `target` when the block succeeds, and removed otherwise.

    Raises:
        UnwritableError: it cannot be written, or the disk is full. An existing `target` is untouched.
    """
    scratch = target.with_name(f".{target.name}.part")
    try:
        yield scratch
        with open(scratch, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(scratch, target)
    except OSError as error:
        # An error about another file, such as an input, passes unchanged.
        if error.filename is not None and Path(error.filename) not in (scratch, target):
            raise
        raise UnwritableError.explain(error, target.parent) from error
    finally:
        scratch.unlink(missing_ok=True)
