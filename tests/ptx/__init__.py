"""Executes compiled kernels without a GPU: the PTX that a GPU would be given, every access checked.

docs/ptx.md tells what is modelled and what is not. Files name sections of NVIDIA's "PTX ISA" by their titles, as their
numbers change from version to version.

parse.py: PTX text to kernels of basic blocks.
translate.py, arithmetic.py, transfers.py: a basic block to a Python function over arrays with an element a thread.
integers.py, floats.py, matrices.py: what instructions compute.
threads.py, machine.py: warps, CTAs, barriers, control flow, grids.
regions.py, globals.py, shared.py, copies.py, exchange.py: memory, its order, asynchronous copies, what warps exchange.
launching.py, plugin.py: the project's launchers and tests on it.
"""
