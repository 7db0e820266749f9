"""`python -m benchmarks.rivals.llama_avx2`: compiles llama.cpp for AVX2, beside the installed one (some minutes).

llama.cpp's kernels are for the instruction set that it was compiled for. This compiles the installed version of
`llama-cpp-python` from its sources into the cache folder, with pip, CMake and a C++ compiler.
"""

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from benchmarks.providers import Absent
from benchmarks.rivals.held_down import before
from clvp_fast.io.files import build_folder_once, cache_folder

# Without GGML_NATIVE, options of newer sets are off; LLAVA_BUILD is for pictures.
OPTIONS = ("GGML_NATIVE=OFF", "GGML_AVX2=ON", "GGML_FMA=ON", "GGML_F16C=ON", "GGML_BMI2=ON", "LLAVA_BUILD=OFF")


def variables() -> dict[str, str]:
    """Return the variables of a Python process that imports the package for AVX2, or raise `Absent`."""
    folder = _folder()
    if not folder.is_dir():
        raise Absent(f"its kernels are chosen when it is compiled: python -m {__name__} compiles those of AVX2")
    return {"PYTHONPATH": before(folder, "PYTHONPATH")}


def main() -> None:
    print(build_folder_once(_folder(), _compile))


def _folder() -> Path:
    return cache_folder() / "rivals" / f"llama_cpp-{version('llama-cpp-python')}-avx2"


def _compile(folder: Path) -> None:
    name = "llama-cpp-python"
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-cache-dir", "--no-binary", name]
    environment = os.environ | {"CMAKE_ARGS": " ".join(f"-D{option}" for option in OPTIONS)}
    subprocess.run([*command, "--target", str(folder), f"{name}=={version(name)}"], env=environment, check=True)


if __name__ == "__main__":
    main()
