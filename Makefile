# Two commands for a fresh machine with Python and make: `make quickstart` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The oldest transformers that setup.cfg allows, with what was current beside it.
OLDEST := transformers==5.4.* huggingface_hub==1.8.* datasets==4.7.* accelerate==1.13.* peft==0.18.* trl==1.0.* \
	torchao==0.17.*
export TOKENIZERS_PARALLELISM := false
export HF_HUB_OFFLINE := 1

.PHONY: quickstart test test-oldest test-gpu sanitize-gpu lint install

install: $(VENV)/.installed

$(VENV)/.installed: setup.cfg pyproject.toml Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q torch==2.13.0
	$(BIN)/python -m pip install -q -e '.[recipes]'
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install -q -e '.[test]'
	touch $@

quickstart: install
	$(BIN)/python recipes/quickstart.py

# One process per core, each on one thread.
test: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

test-oldest: .venv-oldest/.installed
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -n 2 --dist worksteal tests/integration

.venv-oldest/.installed: setup.cfg pyproject.toml Makefile
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install -q --upgrade pip
	.venv-oldest/bin/python -m pip install -q torch==2.13.0
	.venv-oldest/bin/python -m pip install -q $(OLDEST) matplotlib evaluate pyyaml tensorboard \
		hypothesis lm-eval pytest pytest-timeout pytest-xdist bitsandbytes optimum-quanto
	.venv-oldest/bin/python -m pip install -q --no-deps -e . 'entmax>=1.3'
	touch $@

# On a machine with a GPU: the kernels, and models on the GPU.
GPU_TESTS := analysis composite conversion export families generation invariance loading long_rows masks peft refusals registration
test-gpu: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m gpu
	$(BIN)/python -m pytest --device cuda $(GPU_TESTS:%=tests/integration/test_%.py)
	$(BIN)/python -m pytest tests/integration/test_training.py

sanitize-gpu: $(VENV)/.installed-test
	for tool in memcheck racecheck initcheck synccheck; do \
		PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 1 \
			$(BIN)/python tests/ops/sanitize_kernels.py || exit 1; \
	done

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
