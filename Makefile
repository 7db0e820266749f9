# The targets are the steps that CI runs. `make demo` and `make test` need Python 3.11 or newer; with a C++ compiler they
# build the native library and use it.
#
#   make demo  PYTHON=python3.12     another interpreter for .venv
#   make test  PYTEST_ARGS="tests/ops -k rotary"
#   make stress SECONDS=600
#   make setup CONSTRAINTS=          the newest versions that pyproject.toml allows, instead of the tested ones
#   make setup PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
#                                    a machine without a GPU: torch's CPU build (0.2 GB) instead of the CUDA build (3 GB)

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= .ci/constraints.txt
PIP_ARGS ?=
PYTEST_ARGS ?=
TEST_WORKERS ?= 2
# How long `make stress` and `make ptx-mutate` take.
SECONDS ?= 3600
# The gpu targets use the torch that is installed on the GPU machine, not a virtual environment.
GPU_PYTHON ?= python3
SANITIZER ?= compute-sanitizer
# What one call of them may take, and where it writes.
GPU_SECONDS ?= 540
GPU_OUT ?= out/gpu
GPU_ARGS ?=
PTX_ARGS ?=
BENCH_ARGS ?=

PY := $(VENV)/bin/python
# Workers that run neighbouring tests share what those set up; one that has none left takes half of another's.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n $(TEST_WORKERS) --dist worksteal
# Every test process reads the same sources: they are compiled once.
unexport PYTHONDONTWRITEBYTECODE
PIP_INSTALL := $(PY) -m pip install --quiet --disable-pip-version-check $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) $(PIP_ARGS)
RUNTIME_STAMP := $(VENV)/.stamp-runtime
DEV_STAMP := $(VENV)/.stamp-dev
DOCS_STAMP := $(VENV)/.stamp-docs

CPP_SOURCES := $(wildcard csrc/*.* csrc/*/*.* benchmarks/rivals/*.cpp tests/csrc/*.cpp tests/csrc/*.h tests/csrc/*/*.h)

DEMO_TEXT := The old man found a golden ring.
DEMO_OUT ?= out/demo

.PHONY: setup test test-all wheel demo demo-quality lint types format portability canary stress bench-cpu docs docs-packages prose docs-benchmarks kernel-report ptx-core ptx-check ptx-mutate gpu-check gpu-bench gpu-evidence clean

setup: $(RUNTIME_STAMP)

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "clvp_fast needs Python 3.11 or newer; choose one with: make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(RUNTIME_STAMP): pyproject.toml setup.py $(CONSTRAINTS) | $(PY)
	$(PIP_INSTALL) -e '.[kernels,test]'
	@echo '$(CONSTRAINTS)' > $@

$(DEV_STAMP): $(RUNTIME_STAMP)
	$(PIP_INSTALL) -e '.[dev]'
	@touch $@

$(DOCS_STAMP): $(DEV_STAMP)
	$(PIP_INSTALL) -e '.[docs]'
	@touch $@

# Every promise of the documents, in minutes. `make test-all` adds full-size models, long runs and whole grids.
test: $(RUNTIME_STAMP)
	$(PYTEST) -m "not gpu and not slow and not full_size" $(PYTEST_ARGS)

test-all: $(RUNTIME_STAMP)
	$(PYTEST) -m "not gpu" $(PYTEST_ARGS)

demo: $(RUNTIME_STAMP)
	$(PY) -m clvp_fast generate "$(DEMO_TEXT)" --voice examples/voice.flac --checkpoint demo --listen --out $(DEMO_OUT)

# Whether the checkpoint `demo` still says what its model card says: 60 sentences of 16 candidates each, about 15 minutes.
# It takes flite (apt-get install flite), and the packages hibari-tts and pocketsphinx.
demo-quality: $(RUNTIME_STAMP)
	$(PIP_INSTALL) hibari-tts pocketsphinx
	OMP_NUM_THREADS=1 $(PY) -m examples.train quality

# dist/*.whl with the native library, for all instruction sets and, where nvcc is, for CUDA. auditwheel confirms its tag.
wheel: $(DEV_STAMP)
	rm -rf build dist
	$(PY) -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation -w dist .
	$(VENV)/bin/auditwheel show dist/*.whl
	@tag=$$($(VENV)/bin/auditwheel show dist/*.whl | tr '\n' ' ' | sed 's/.* platform tag: "\([^"]*\)".*/\1/'); \
	  case $$(echo dist/*.whl) in *-$$tag.whl) ;; *) echo "the wheel's tag is not $$tag"; exit 1;; esac

lint: $(DEV_STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $(CPP_SOURCES)

# What the package promises in `py.typed`.
types: $(DEV_STAMP)
	$(VENV)/bin/basedpyright --pythonpath $(PY)

format: $(DEV_STAMP)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(CPP_SOURCES)

# By hand, once a month: the newest release of every dependency, in an environment of its own (8 GB with torch's CUDA build).
canary:
	$(PYTHON) tests/canary.py --workers $(TEST_WORKERS) -- $(PIP_ARGS)

# By hand: tasks, threads, planted faults, cancellations and timeouts on one engine; its figures become a row.
stress: $(RUNTIME_STAMP)
	OMP_NUM_THREADS=1 $(PY) -m benchmarks.stress --seconds $(SECONDS)

# Run again after an interrupt, it goes on behind what the code as it is has rows of; BENCH_ARGS="generate score" chooses.
bench-cpu: $(RUNTIME_STAMP)
	$(PY) -m benchmarks.run --device cpu --resume $(BENCH_ARGS)
	$(PY) -m benchmarks.report

# The handbook in out/site, which reads from disk (out/site/index.html); a warning or a link that leads nowhere is an error.
docs: docs-packages
	NO_MKDOCS_2_WARNING=1 PATH="$(abspath $(VENV))/bin:$$PATH" $(PY) -m mkdocs build --strict
	@echo "out/site/index.html"

# Alone, so that CI can tell packages that cannot be had from a handbook that is wrong.
docs-packages: $(DOCS_STAMP)

# Sentences of documents, docstrings and comments that have a clause as their subject, or negate twice.
prose: | $(PY)
	$(PY) -m handbook.prose

# Every number and figure of the documents, from the rows in benchmarks/results.
docs-benchmarks: $(RUNTIME_STAMP)
	$(PY) -m benchmarks.report

# Kernels as compiled, without a GPU (docs/ptx.md): a fixed core, and all of each kernel that was changed.
ptx-core: $(RUNTIME_STAMP)
	$(PY) -m tests.ptx core --workers $(TEST_WORKERS)

# All of every kernel, into tests/ptx/checked.jsonl; interrupted, it goes on. PTX_ARGS="norm --arch 80" chooses.
ptx-check: $(RUNTIME_STAMP)
	$(PY) -m tests.ptx check $(PTX_ARGS) --workers $(TEST_WORKERS)

# Faults planted in compiled kernels for SECONDS: which their tests see, into tests/ptx/mutated.jsonl. Called again, it goes on.
ptx-mutate: $(RUNTIME_STAMP)
	$(PY) -m tests.ptx mutate $(PTX_ARGS) --seconds $(SECONDS)

# In parts of at most GPU_SECONDS: called again, they go on. All is written to GPU_OUT as it comes, and the last line names
# what failed. GPU_ARGS=--count tells without a GPU what would be run.
define on_gpu
PYTHONPATH=.$${PYTHONPATH:+:$$PYTHONPATH} $(GPU_PYTHON) -m benchmarks.gpu $(@:gpu-%=%) --out '$(GPU_OUT)' \
  --seconds '$(GPU_SECONDS)' --sanitizer '$(SANITIZER)' $(GPU_ARGS)
endef

# Correct on this GPU, and clean to the memory checker.
gpu-check:
	$(on_gpu)

# Kernels and models beside their rivals.
gpu-bench:
	$(on_gpu)

# Both, and a table against the aims of docs/kernels.md.
gpu-evidence:
	$(on_gpu)

# The library with the oldest compiler that is served, and for aarch64, whose programs run under QEMU.
portability: $(RUNTIME_STAMP)
	$(PY) -m tests.csrc.portability

kernel-report: $(RUNTIME_STAMP)
	$(PY) -m benchmarks.aot --write

clean:
	rm -rf $(VENV) .venv-canary build dist out ./*.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
