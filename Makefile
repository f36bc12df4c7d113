# make demo   the whole method on the embedded model, ending with a table and a picture
# make test   the test suite; `make test-oldest` runs it with the oldest dependencies that pyproject.toml allows
# Each sets up what it needs in .venv. See constraints/cpu.txt for the choice of the torch build.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH_INDEX ?=
ifeq ($(shell command -v nvidia-smi 2>/dev/null),)
CONSTRAINTS ?= constraints/cpu.txt
endif

export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test test-oldest test-slow lint format clean

demo: $(VENV)/.installed
	$(BIN)/cpift demo

test: $(VENV)/.installed
	$(BIN)/pytest -n 2 --dist loadfile

test-oldest:
	$(MAKE) test VENV=.venv-oldest CONSTRAINTS=constraints/oldest.txt

test-slow: $(VENV)/.installed
	$(BIN)/pytest -m slow

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS)) \
		$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) .venv-oldest runs build *.egg-info
