# Each target does all the set-up that it needs on a fresh clone.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: install demo demo-train test test-versions test-pages test-real test-gemma3 test-faults test-faults-quick lint

install: $(INSTALLED)
	@echo 'Installed in $(VENV). To have the command landmark in this shell:  . $(BIN)/activate'

# torch comes first and alone: pip then takes a CPU wheel where one lies at hand, and leaves it in place afterwards.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "landmark needs Python 3.10 or newer: make PYTHON=...")'
	@echo 'Installing into $(VENV), which takes some minutes.'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(INSTALLED)
	PATH="$(CURDIR)/$(BIN):$$PATH" bash recipes/demo/run.sh

demo-train: $(INSTALLED)
	PATH="$(CURDIR)/$(BIN):$$PATH" bash recipes/demo/train.sh

# Two processes of one thread each do better than one of two: much of the time is starting processes.
test: $(INSTALLED) lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not gpu and not real and not faults and not pages" -n 2 --dist worksteal

# What leans on transformers most, with the oldest one that pyproject.toml allows; the newest is the environment's own.
OLDEST := $(VENV)/oldest
VERSION := $(shell sed -n 's/^ *"transformers>=\([0-9.]*\)",/\1/p' pyproject.toml)
test-versions: $(OLDEST)/$(VERSION)
	PYTHONPATH=$(CURDIR)/$(OLDEST):$(CURDIR) OMP_NUM_THREADS=1 LANDMARK_TRANSFORMERS=$(VERSION) \
	  $(BIN)/python -m pytest -p no:cacheprovider -m "not slow and not gpu and not gemma3" -n 2 \
	  tests/inference/test_calls.py tests/models/test_layers.py tests/models/test_decoders.py \
	  tests/training/test_distillation.py tests/models/test_pretrained.py::test_a_soft_cap_is_never_left_out \
	  tests/test_registration.py::test_transformers_knows_our_models

$(OLDEST)/$(VERSION): $(INSTALLED)
	rm -rf $(OLDEST)
	$(BIN)/python -m pip install --quiet --no-deps --target $(OLDEST) \
	  'transformers==$(VERSION)' 'huggingface-hub<2' 'tokenizers<=0.23.0' httpx httpcore
	touch $@

# Opens the page of `landmark generate --trace` in a headless Chromium: CHROME_BIN's, the system's or one that Playwright
# installed. Where there is none a line says that these tests were left out; one that CHROME_BIN names has to be there.
test-pages: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt playwright
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m pages -rs tests/inference/test_trace_page.py

test-real: $(INSTALLED)
	$(BIN)/python -m pytest -m "real and not gemma3"

# Fetches 240 MB the first time; who runs it agrees to the Gemma Terms of Use (https://ai.google.dev/gemma/terms).
test-gemma3: $(INSTALLED)
	$(BIN)/python -m pytest -m gemma3

# Every promise about kills, damaged files, full disks and signals, tried thousands of times; and a part of it.
test-faults: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults --write docs/reliability.md

test-faults-quick: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults --quick

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
