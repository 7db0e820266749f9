"""The resources of nvcc's kernels of `csrc/cuda/*.cu`, read from the log of the native library's own build."""

import re
import subprocess

from clvp_fast import native
from clvp_fast.native import build


def rows(family: str, arch: int) -> list[dict]:
    """Return one row for each kernel of a source in the library for `arch`.

    `family` is the source's name without `.cu`, and that of its kernels. Raises `RuntimeError` where the library
    has no CUDA part; a device need not be there.
    """
    found = parse((native.folder("cuda") / build.LOG).read_text(encoding="utf-8"))
    found = [row for row in found if row["arch"] == arch and row["kernel"].partition("<")[0] == family]
    return [row | {"nvcc": native.record("cuda")["nvcc_version"]} for row in found]


def parse(log: str) -> list[dict]:
    """Parse the output of `ptxas -v` into rows by kernel and architecture: resources, and spills."""
    found = []
    for part in log.split("Compiling entry function ")[1:]:
        name, arch = re.match(r"'(\w+)' for 'sm_(\d+)\w*'", part).groups()
        frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        shared = re.search(r"(\d+) bytes smem", part)
        found.append(
            {
                "kernel": name,
                "arch": int(arch),
                "registers": int(re.search(r"Used (\d+) registers", part)[1]),
                "shared_bytes": int(shared[1]) if shared else 0,
                "stack_bytes": sum(int(frame) for frame, _, _ in frames),
                "spilled_bytes": sum(int(stores) + int(loads) for _, stores, loads in frames),
            }
        )
    for row, readable in zip(found, _readable([row["kernel"] for row in found]), strict=True):
        row["kernel"] = readable
    return sorted(found, key=lambda row: (row["arch"], [int(n) for n in re.findall(r"\d+", row["kernel"])]))


def _readable(names: list[str]) -> list[str]:
    """Return C++ names without their arguments' types; as the linker knows them where there is no c++filt."""
    try:
        command = ["c++filt", "--no-params"]
        done = subprocess.run(command, input="\n".join(names), capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return names
    return [re.sub(r"^void |clvp_fast::|\(anonymous namespace\)::", "", line) for line in done.stdout.splitlines()]
