"""Executes compiled kernels without a GPU: the PTX that a GPU would be given, every access checked.

docs/ptx.md tells what is modelled and what is not. Files name sections of NVIDIA's "PTX ISA" by their titles, as their
numbers change from version to version.

parse.py: PTX text to kernels of basic blocks.
translate.py, arithmetic.py, transfers.py: a basic block to a Python function over arrays with an element a thread.
forms.py: the modifiers of instructions that are modelled.
integers.py, floats.py, matrices.py, atomics.py: what instructions compute.
threads.py, machine.py: warps, CTAs, barriers, control flow, grids.
regions.py, global_memory.py, shared_memory.py, dependent.py: memory, and in which order it is read and written.
groups.py, copies.py, warpgroups.py: what ends later than it begins. exchange.py: what the lanes of a warp exchange.
launching.py, native.py, plugin.py: the project's launchers and tests on it, of kernels/ and of csrc/cuda/.
suites.py, coverage.py, __main__.py: what CI and `make` run. mutants.py, mutating.py: planted faults.
"""
