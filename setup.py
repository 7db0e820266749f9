"""Packaging of clvp_fast. `kernels/` stands at the top level of the repository and installs as `clvp_fast.kernels`.

A wheel carries the parts of the native library that can be compiled in clvp_fast/_native, for all instruction sets, and
is tagged by the oldest glibc that they run with; what cannot be compiled is told in one sentence. An editable install
carries none: clvp_fast/native/__init__.py compiles it at first use.
"""

import re
import shutil
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


def _load(name):
    """Load a module of the package by its path, without the package's own imports."""
    spec = spec_from_file_location(f"native_{name}", ROOT / f"clvp_fast/native/{name}.py")
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def _description():
    """README.md as a package index shows it, which has no other file: names of files for links, and no pictures."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"^(!\[[^\]]*\]\([^)]*\)\n\n|<!--.*-->\n)", "", text, flags=re.MULTILINE)
    return re.sub(r"\[([^\]]+)\]\((?!https?://)([^)#]+)[^)]*\)", r"\1 (`\2`)", text)


native_build, native_calls = _load("build"), _load("calls")


class BuildWithLibrary(build_py):
    def run(self):
        super().run()
        if self.editable_mode:
            return
        shutil.rmtree(Path(self.build_lib) / "clvp_fast/_native", ignore_errors=True)
        for part in native_build.LIBRARIES:
            folder = Path(self.build_lib) / "clvp_fast/_native" / part
            folder.mkdir(parents=True)
            try:
                tools = native_build.find_toolchain(part, elsewhere=True)
                native_build.build(ROOT / "csrc", folder, tools, part, native_calls.VERSION)
            except native_build.BuildError as error:
                shutil.rmtree(folder)
                print(f"{error.log}clvp_fast is installed without its native library for {part}: {error}")


class PlatformWheel(bdist_wheel):
    def run(self):
        self.run_command("build")
        if self._libraries():
            self.root_is_pure = False
            self.distribution.has_ext_modules = lambda: True  # installs among the platform's files
        super().run()

    def get_tag(self):
        _, _, platform = super().get_tag()
        # ctypes loads the libraries: no Python ABI is in them.
        return "py3", "none", native_build.platform_tag(self._libraries(), platform)

    def _libraries(self):
        return sorted(Path(self.get_finalized_command("build").build_lib).glob("clvp_fast/_native/*/lib*.so"))


setup(
    long_description=_description(),
    long_description_content_type="text/markdown",
    packages=[*find_packages(include=["clvp_fast", "clvp_fast.*"]), "clvp_fast.kernels"],
    package_dir={"clvp_fast.kernels": "kernels"},
    package_data={"clvp_fast": ["py.typed", "*.pyi", "trained_demo/*"], "clvp_fast.cli": ["page.css", "page.js"]},
    cmdclass={"build_py": BuildWithLibrary, "bdist_wheel": PlatformWheel},
)
