# make install | quickstart | test | test-all | drills | bench | parity | pods | lint | docs | report | lock | clean
# VENV=DIR puts the environment elsewhere; PYTHON=python3.12 makes it with another interpreter.

VENV ?= .venv
PYTHON ?= $(shell command -v python3.11 || command -v python3 || echo python3)
RUN_DIR ?= runs/quickstart
# Two processes. One, to see prints or to debug: make test PYTEST_FLAGS="-n 0"
PYTEST_FLAGS ?= -n 2 --dist worksteal
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq

.PHONY: install quickstart test test-all drills bench parity parity-environment pods lint docs report lock clean
.DEFAULT_GOAL := install

install: $(STAMP)

# An interrupted install leaves no stamp, and the next one goes on from where it was.
$(STAMP): requirements.lock setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "make: mlrl needs Python 3.11 or newer, $(PYTHON) is older: make PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing the versions of requirements.lock into $(VENV) (a few minutes the first time)"
	@$(PIP) install -r requirements.lock
	@$(PIP) install --no-deps --no-build-isolation -e .
	@touch $@

quickstart: install
	$(BIN)/mlrl train experiments/quickstart/grpo.gin --run_dir $(RUN_DIR) --report

test: install
	$(BIN)/python -m pytest -m "not slow" $(PYTEST_FLAGS)

test-all: install
	$(BIN)/python -m pytest $(PYTEST_FLAGS)

# What must not break, tried many times: hours, and cut it goes on where it was; SHORT=1: a few trials of each.
drills: install
	JAX_PLATFORMS=cpu $(BIN)/python -m drills $(if $(SHORT),--short)

# Beside bare JAX, TRL and tunix, the latter two in environments of their own; QUICK=1: beside bare JAX only.
bench: install
	JAX_PLATFORMS=cpu $(BIN)/python -m benchmarks.run $(if $(QUICK),--quick)

# Losses beside TRL's and models beside transformers', in an environment of their own; says so when that cannot be made.
parity: install
	JAX_PLATFORMS=cpu $(BIN)/python parity/trl_parity.py
	JAX_PLATFORMS=cpu $(BIN)/python parity/transformers_parity.py

parity-environment: install
	$(BIN)/python parity/environment.py

# Compiles for a small TPU topology, with libtpu in a folder of its own; says so when that cannot be installed.
pods: install
	JAX_PLATFORMS=cpu $(BIN)/python -m benchmarks.pods.libtpu $(BIN)/python -m pytest tests/pods/tpu_test.py $(PYTEST_FLAGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/mypy

# The documents as a site of files, into site/; a link that leads nowhere is an error.
docs: install
	$(BIN)/mkdocs build --strict

report: install
	$(BIN)/mlrl report $(RUN_DIR)

# Freezes what $(VENV) holds now, after upgrading it by hand.
lock:
	@{ sed -n '/^#/p' requirements.lock; $(PIP) freeze --all --exclude-editable | grep -vE '^(pip|wheel|mlrl)=='; } \
	  > requirements.lock.new && mv requirements.lock.new requirements.lock

clean:
	rm -rf .venv benchmarks/peers/.venv-tunix .libtpu .jax_cache .pytest_cache .ruff_cache .mypy_cache build dist site *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
