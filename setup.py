"""Packaging of clvp_fast. `kernels/` stands at the top level of the repository and installs as `clvp_fast.kernels`."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["clvp_fast", "clvp_fast.*"]), "clvp_fast.kernels"],
    package_dir={"clvp_fast.kernels": "kernels"},
    package_data={"clvp_fast": ["py.typed", "*.pyi"]},
)
