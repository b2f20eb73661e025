# Two commands do everything on a fresh machine: `make demo` and `make test`. The set-up is in scripts/setup.sh.
#
#   PYTHON=python3.12   the interpreter (3.11 or newer)
#   TORCH_INDEX=URL     package index for torch alone (PyTorch has one with small CPU builds)
#   V=1                 show what pip does
#   ARGS="..."          more arguments for the demo or for pytest

SHELL := /bin/sh
BIN := .venv/bin
export PYTHON TORCH_INDEX V
.DEFAULT_GOAL := help
.PHONY: help demo test lint format types docs setup setup-dev clean distclean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile
	@echo '  settings: PYTHON=python3.12  TORCH_INDEX=https://...  V=1  ARGS="..."'

setup: ## make .venv with what the demo needs
	@sh scripts/setup.sh demo

setup-dev: ## make .venv with the test tools too
	@sh scripts/setup.sh test

demo: setup ## draw one image privately: prompt -> image and report, three local parties
	@$(BIN)/sfumato demo $(ARGS)

# What computes runs on all cores at once; what starts parties or a browser has deadlines to keep, and runs alone.
test: setup-dev ## run the test suite
ifeq ($(strip $(ARGS)),)
	@$(BIN)/python -m pytest -n auto --dist loadfile -m "not processes and not browser"
	@$(BIN)/python -m pytest -m "processes or browser"
else
	@$(BIN)/python -m pytest $(ARGS)
endif

lint: setup-dev ## style: ruff check and ruff format
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: setup-dev ## let ruff rewrite what it can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

types: setup-dev ## mypy, strict
	@$(BIN)/mypy

docs: ## build the documentation site into site/; any warning is an error
	@sh scripts/setup.sh docs
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean: ## remove caches and build output
	@rm -rf build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis sfumato-demo
	@find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +

distclean: clean ## remove .venv as well
	@rm -rf .venv
