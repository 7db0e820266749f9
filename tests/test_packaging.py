"""Tests of the package as installed: bare checkout, wheel, lazy imports, no triton."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import import_module
from pathlib import Path

import pytest

import clvp_fast
from clvp_fast.native import build
from tests.kit import isa
from tests.kit.documents import blocks

ROOT = Path(__file__).resolve().parents[1]
# All of the library is compiled for it once more, where --wheel names none.
of_a_built_wheel = pytest.mark.slow
HEAVY = ("torch", "transformers", "triton", "matplotlib", "numpy", "soundfile", "rich")


def run_python(code: str, *path: Path, cwd: Path) -> str:
    """Run `code` in a fresh interpreter that sees `path` first, in a folder that is not the checkout."""
    return run_command(sys.executable, "-c", code, cwd=cwd, PYTHONPATH=os.pathsep.join(map(str, path))).strip()


def run_command(*command, cwd: Path, **environment) -> str:
    environment = os.environ | {"PYTHONPATH": ""} | environment
    done = subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def wheel_of(source: Path, folder: Path, **environment) -> Path:
    pip_wheel = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", folder]
    run_command(*pip_wheel, source, cwd=folder, **environment)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Give a copy of the sources, so that no build folder is left in the checkout."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("clvp_fast", "kernels", "csrc"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    return copy


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory, request) -> Path:
    """Give the wheel of the source distribution, its native library without CUDA (tests/kernels compiles that)."""
    if given := request.config.getoption("--wheel"):
        return Path(given).resolve()
    work = tmp_path_factory.mktemp("wheel")
    build = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    run_command(sys.executable, "-c", build, work, cwd=source)
    (sdist,) = work.glob("*.tar.gz")
    return wheel_of(sdist, work, CUDA_HOME="/nonexistent")


@of_a_built_wheel
def test_wheel_holds_the_package_and_no_top_level_kernels(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    top_level = {name.split("/")[0] for name in names}
    assert {name for name in top_level if not name.endswith(".dist-info")} == {"clvp_fast"}
    assert {"clvp_fast/py.typed", "clvp_fast/cli/page.css", "clvp_fast/cli/page.js"} <= set(names)
    assert "clvp_fast/kernels/__init__.py" not in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    for source in (ROOT / "kernels").glob("*.py"):
        assert f"clvp_fast/kernels/{source.name}" in names


@of_a_built_wheel
def test_wheel_imports(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    (tmp_path / "site/clvp_fast/kernels").mkdir(exist_ok=True)
    code = "import clvp_fast, clvp_fast.kernels as k; print(clvp_fast.__file__); print(list(k.__path__)[0])"
    package, kernels = run_python(code, tmp_path / "site", cwd=tmp_path).splitlines()
    assert Path(package) == tmp_path / "site/clvp_fast/__init__.py"
    assert Path(kernels) == tmp_path / "site/clvp_fast/kernels"


@of_a_built_wheel
def test_wheel_carries_the_native_library(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    native = tmp_path / "site/clvp_fast/_native"
    code = """
from clvp_fast import native
print(native.folder("cpu"), native.missing("cpu"), native.library().clvp_fast_cpu_isa().decode())"""
    said = run_python(code, tmp_path / "site", cwd=tmp_path)
    assert said.startswith(f"{native}/cpu None ")
    assert said.endswith(tuple(f" {name}" for name in isa.ISAS))
    assert (native / "cpu/clvp_fast.h").read_bytes() == (ROOT / "csrc/clvp_fast.h").read_bytes()
    recorded = json.loads((native / "cpu/build.json").read_text())
    if recorded["machine"] == "x86_64":  # also those that this CPU lacks
        assert [*recorded["isas"], *recorded["left_out"]] == list(build.ISA_FLAGS)
        assert "avx2" in recorded["isas"]
    # The library holds no Python ABI; a platform's name, and not `any`, is in the tag.
    assert re.fullmatch(r"clvp_fast-[\d.]+-py3-none-(?!any)\w+\.whl", wheel.name)
    (purity,) = (tmp_path / "site").glob("*.dist-info/WHEEL")
    assert "Root-Is-Purelib: false" in purity.read_text()


@of_a_built_wheel
def test_wheel_needs_nothing_but_glibc(wheel, tmp_path):
    """Compare the tag's glibc with the needs of the library, as auditwheel does in `make wheel`."""
    zipfile.ZipFile(wheel).extractall(tmp_path)
    needed, minors = set(), set()
    for library in tmp_path.glob("clvp_fast/_native/*/lib*.so"):
        said = run_command("readelf", "--wide", "--dynamic", "--dyn-syms", library, cwd=tmp_path)
        needed |= set(re.findall(r"\(NEEDED\) .*\[(.+)\]", said))
        minors |= {int(minor) for minor in re.findall(r"@GLIBC_2\.(\d+)", said)}
    assert {name.split(".")[0] for name in needed} <= {
        "libc",
        "libm",
        "libdl",
        "libpthread",
        "librt",
        "ld-linux-x86-64",
    }
    assert f"-manylinux_2_{max(minors)}_" in wheel.name


@pytest.fixture(scope="module")
def fresh(wheel, tmp_path_factory):
    """Give a runner of commands in an environment with the wheel: no compiler, no source tree, a home of its own.

    The packages that the wheel depends on are those of the tests.
    """
    home = tmp_path_factory.mktemp("fresh")
    run_command(sys.executable, "-m", "venv", "--without-pip", home / "env", cwd=home)
    install = [sys.executable, "-m", "pip", "--python", home / "env/bin/python", "install", "--no-deps", "--no-index"]
    run_command(*install, wheel, cwd=home)
    (site,) = home.glob("env/lib/python*/site-packages")
    (site / "tests.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    shutil.copytree(ROOT / "examples", home / "examples")
    kept = {
        name: value for name, value in os.environ.items() if not re.match("CLVP_FAST_CACHE|XDG_|CUDA_HOME|CXX", name)
    }
    kept |= {"PYTHONPATH": "", "PATH": str(home / "env/bin"), "HOME": str(home)}

    def run(program, *arguments):
        command = [str(home / "env/bin" / program), *arguments]
        done = subprocess.run(command, cwd=home, env=kept, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "slower torch path" not in done.stderr
        return done.stdout

    return home, run


@of_a_built_wheel
def test_an_installed_wheel_runs_the_demo(fresh):
    home, run = fresh
    code = "import shutil, clvp_fast; from clvp_fast import native; print(native.folder('cpu'), shutil.which('g++'))"
    (site,) = home.glob("env/lib/python*/site-packages")
    assert run("python", "-c", code) == f"{site}/clvp_fast/_native/cpu None\n"
    text = "The birch canoe slid on the smooth planks."
    options = ["--voice", "examples/voice.flac", "--checkpoint", "demo", "--max-new-tokens", "20", "--out", "out"]
    run("clvp-fast", "generate", text, *options)
    assert (home / "out/codes.npz").exists() and (home / "out/candidates.png").exists()
    assert not (home / ".cache/clvp_fast/native").exists(), "nothing is compiled"


@of_a_built_wheel
def test_an_installed_wheel_runs_the_documented_example(fresh):
    """Run the handbook's first example that loads a checkpoint; the demo stands for the hub's."""
    _, run = fresh
    example = blocks("docs/change-the-import.md", "python")[0]
    folder = run("python", "-c", "from clvp_fast.demo import random_checkpoint; print(random_checkpoint())").strip()
    shape = run(
        "python", "-c", example.replace("susnato/clvp_dev", folder) + "\nprint(*best.shape, best.dtype)"
    ).split()
    assert int(shape[-2]) > 0 and shape[-1] == "torch.int64"


def test_install_without_a_compiler(source, tmp_path):
    """Succeed, and give the reason for the missing library in one sentence."""
    wheel = wheel_of(source, tmp_path, CXX="/bin/false")
    assert wheel.name.endswith("-py3-none-any.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = "from clvp_fast import native; print(native.missing('cpu'))"
    said = run_python(code, tmp_path / "site", cwd=tmp_path)
    assert said == (
        "this installation of clvp-fast holds no whole native library: reinstall it where there is a C++ compiler"
    )


def test_editable_install_compiles_nothing(source, tmp_path):
    compiler = tmp_path / "g++"
    compiler.write_text(f"#!/bin/sh\ntouch {tmp_path}/called\n")
    compiler.chmod(0o755)
    build = "import sys; from setuptools import build_meta; build_meta.build_editable(sys.argv[1])"
    run_command(sys.executable, "-c", build, tmp_path, cwd=source, CXX=str(compiler))
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not (tmp_path / "called").exists()


def test_bare_checkout_imports_with_its_kernels(tmp_path):
    code = "import clvp_fast, clvp_fast.kernels as k; print(clvp_fast.__file__); print(list(k.__path__)[0])"
    package, kernels = run_python(code, ROOT, cwd=tmp_path).splitlines()
    assert Path(package) == ROOT / "clvp_fast/__init__.py"
    assert Path(kernels) == ROOT / "kernels"


def test_no_kernels_package_marker():
    assert not (ROOT / "kernels/__init__.py").exists(), "it would shadow the well-known `kernels` package"


def test_import_loads_nothing_heavy(tmp_path):
    code = f"import sys, clvp_fast; print([name for name in {HEAVY!r} if name in sys.modules])"
    assert run_python(code, ROOT, cwd=tmp_path) == "[]"


def test_command_line_help_loads_nothing_heavy(tmp_path):
    code = f"""
import sys
from clvp_fast.cli import main
try:
    main(["--help"])
except SystemExit as stop:
    assert stop.code == 0
print([name for name in {HEAVY!r} if name in sys.modules])"""
    assert run_python(code, ROOT, cwd=tmp_path).splitlines()[-1] == "[]"


@pytest.mark.parametrize("name", clvp_fast.__all__)
def test_public_name_resolves(name):
    value = getattr(clvp_fast, name)
    module = clvp_fast._MODULE_OF.get(name)
    assert value is (clvp_fast.__version__ if module is None else getattr(import_module(module), name))
    assert name in dir(clvp_fast)


def test_type_checkers_see_every_public_name():
    """Compare the stub with the lazy module, whose names type checkers cannot see."""
    public = {
        name.asname or name.name: node.module
        for node in ast.parse((ROOT / "clvp_fast/__init__.pyi").read_text()).body
        if isinstance(node, ast.ImportFrom)
        for name in node.names
    }
    assert public == clvp_fast._MODULE_OF


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'ClvpNothing'"):
        _ = clvp_fast.ClvpNothing


def test_everything_public_works_without_triton(tmp_path):
    code = """
import sys
sys.modules["triton"] = None  # what `import triton` meets where it is not installed
import clvp_fast
for name in clvp_fast.__all__:
    getattr(clvp_fast, name)
print(len(clvp_fast.__all__))"""
    assert int(run_python(code, ROOT, cwd=tmp_path)) == len(clvp_fast.__all__)


def test_every_environment_variable_is_in_the_table():
    sources = [path for name in ("clvp_fast", "kernels", "tests", "benchmarks") for path in (ROOT / name).rglob("*.py")]
    used = {
        name  # alone in its quotes: macros of csrc/ have the same prefix
        for path in sources
        for name in re.findall(r"""["'](CLVP_FAST_[A-Z_]*[A-Z])["']""", path.read_text(encoding="utf-8"))
    }
    table = re.findall(
        r"^\| `(CLVP_FAST_\w+)` \|", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert used == set(table)
    assert len(table) == len(set(table)) <= 6
