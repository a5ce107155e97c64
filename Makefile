# Two commands for a newcomer: `make run` and `make test`. Each sets up what it needs: a virtual environment in
# .venv, the packages, and (for tests) the system packages they use. The second time all of that is skipped.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
JOBS   ?= 3
ARGS   ?=

.PHONY: help run test test-long check bench bench-peers format clean setup setup-test

run: setup ## serve the built-in hub with its chat page; ARGS="--workers 8" for options
	@echo "==> http://127.0.0.1:8000/ is the chat of examples/chat.py; Ctrl-C ends it"
	@cd examples && PYTHONPATH=.. ../$(BIN)/python -m supervisor --app chat:app $(ARGS)

test: setup-test ## all tests but the long forms; at most ten minutes
	@echo "==> tests"
	@$(BIN)/python -m pytest -n $(JOBS) $(ARGS)

test-long: setup-test ## also soaks and hundreds of repetitions
	@echo "==> tests, the long forms too"
	@$(BIN)/python -m pytest -n $(JOBS) -m "long or not long" --timeout 900 $(ARGS)

check: setup-test ## ruff and mypy --strict
	@echo "==> ruff"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@echo "==> mypy --strict"
	@$(BIN)/mypy

bench: setup-test ## the table of docs/performance.md, in five minutes
	@$(BIN)/python -m bench $(ARGS)

bench-peers: setup-test ## install the servers that the benchmark compares with
	@$(BIN)/python -m bench.install_peers $(ARGS)

format: setup-test ## ruff's corrections and layout
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

clean: ## remove what these commands have made
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist *.egg-info \
		tests/clients/.venv tests/clients/node_modules bench/bin bench/.peers

setup: $(VENV)/.run-is-set-up
setup-test: $(VENV)/.test-is-set-up

$(VENV)/bin/python:
	@echo "==> virtual environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV) 2>/dev/null || { sh .ci/system-packages python3-venv && $(PYTHON) -m venv $(VENV); }

$(VENV)/.run-is-set-up: pyproject.toml | $(VENV)/bin/python
	@echo "==> packages"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(VENV)/.test-is-set-up: pyproject.toml .ci/system-packages .ci/client-packages tests/clients/package.json | $(VENV)/bin/python
	@echo "==> packages for the tests"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[test]"
	@sh .ci/system-packages redis-server
	@PYTHON=$(abspath $(BIN)/python) sh .ci/client-packages
	@touch $@ $(VENV)/.run-is-set-up
