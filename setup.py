"""Packaging of clvp_fast. `kernels/` stands at the top level of the repository and installs as `clvp_fast.kernels`.

A wheel carries the native library in clvp_fast/_native and is tagged for the platform; where it cannot be compiled the
wheel goes without, in one sentence. An editable install carries none: clvp_fast/native.py compiles it at first use.
"""

import shutil
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


def _native_build():
    """clvp_fast/native_build.py by its path: what the package itself imports need not be there."""
    spec = spec_from_file_location("native_build", ROOT / "clvp_fast/native_build.py")
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


class BuildWithLibrary(build_py):
    def run(self):
        super().run()
        if self.editable_mode:
            return
        native_build = _native_build()
        folder = Path(self.build_lib) / "clvp_fast/_native"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        try:
            record = native_build.build(ROOT / "csrc", folder, native_build.find_toolchain())
        except native_build.BuildError as error:
            shutil.rmtree(folder)
            print(f"{error.log}clvp_fast is installed without its native library: {error}")
            return
        if record["no_cuda"]:
            print(f"clvp_fast's native library is built without CUDA: {record['no_cuda']}")


class PlatformWheel(bdist_wheel):
    def run(self):
        self.run_command("build")
        if (Path(self.get_finalized_command("build").build_lib) / "clvp_fast/_native").is_dir():
            self.root_is_pure = False
            self.distribution.has_ext_modules = lambda: True  # installs among the platform's files
        super().run()

    def get_tag(self):
        _, _, platform = super().get_tag()
        return "py3", "none", platform  # ctypes loads the library: no Python ABI is in it


setup(
    packages=[*find_packages(include=["clvp_fast", "clvp_fast.*"]), "clvp_fast.kernels"],
    package_dir={"clvp_fast.kernels": "kernels"},
    package_data={"clvp_fast": ["py.typed", "*.pyi"]},
    cmdclass={"build_py": BuildWithLibrary, "bdist_wheel": PlatformWheel},
)
