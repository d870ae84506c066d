# Two commands for a fresh clone: `make demo` and `make test`. Both set up .venv first, once.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN = $(VENV)/bin

# A file at a time in each of two processes, the longest files early. They share the cores, so threads that wait sleep.
# Without restarts a process that crashes ends the run; with them pytest-xdist 3.8 waits forever for the rest of its file.
IN_TWO = -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart=0
test: export OMP_WAIT_POLICY = passive

.PHONY: demo test fuzz faults sanitize lint bench gpu-dry-run build clean

demo: $(VENV)/demo
	$(BIN)/fastrlhf run --output demo --resume

test: $(VENV)/dev
	$(BIN)/python -m pytest $(IN_TWO)

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

bench: $(VENV)/dev
	$(BIN)/python -m benchmarks --save

# Two processes on one output folder, and kills while a run is overwritten: about a quarter of an hour.
faults: $(VENV)/dev
	$(BIN)/python tests/faults

gpu-dry-run: $(VENV)/dev
	PYTHON=$(BIN)/python benchmarks/gpu.sh all --dry-run

build: $(VENV)/dev
	$(BIN)/python -m build

clean:
	rm -rf $(VENV) build dist *.egg-info fastrlhf/*.so

# torch first and alone, so that the requirement torch>=2.11 is met by it and brings nothing more
$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --upgrade pip
	$(BIN)/python -m pip install "$(TORCH)"
	touch $@

$(VENV)/demo $(VENV)/dev: $(VENV)/%: $(VENV)/torch setup.py pyproject.toml $(wildcard csrc/*.h csrc/*/*)
	$(BIN)/python -m pip install -e ".[$*]"
	touch $@
