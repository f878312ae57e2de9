# Every target sets up what it needs: a virtual environment in .venv with the versions that
# constraints.txt pins. Only Python 3.11 or later, git and make have to be there already.
# Another interpreter:  make demo PYTHON=/path/to/python3.12

SUITABLE := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))
CANDIDATES := python3 python3.13 python3.12 python3.11
PYTHON ?= $(or $(shell for p in $(CANDIDATES); do \
	$$p -c "$(SUITABLE)" 2>/dev/null && echo $$p && break; done),python3)
VENV := .venv
CORE := $(VENV)/.core-installed
DEV := $(VENV)/.dev-installed
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-browser fuzz lint format docs bench results setup clean distclean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(CORE) ## Compare every solver on the built-in network, into demo/
	$(VENV)/bin/fewstep demo --out demo

test: $(DEV) ## The everyday tests (minutes)
	$(VENV)/bin/python -m pytest -n auto --dist worksteal -m "not slow"

test-all: $(DEV) ## All tests, the slow ones too (longer)
	$(VENV)/bin/python -m pytest

test-browser: $(DEV) ## The page of `fewstep serve`, in a headless Chromium
	$(VENV)/bin/python -m pytest tests/serve/test_page.py

fuzz: $(DEV) ## Send `fewstep serve` what its interface allows, and what not, for 5 minutes
	FEWSTEP_FUZZ_SECONDS=300 $(VENV)/bin/python -m pytest tests/serve/test_fuzz.py

lint: $(DEV) ## Style, format and types
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/pyright

format: $(DEV) ## Rewrite the files in the project's format
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format

docs: $(DEV) ## Build these pages and the API reference as one site, into site/
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

bench: $(DEV) ## Time what a solver adds to the network's own work
	$(VENV)/bin/python benchmarks/step_overhead.py

results: $(DEV) ## Write docs/results.md and the README's table from results/
	$(VENV)/bin/python studies/make_results.py

setup: $(DEV) ## Only set up .venv, for work on fewstep itself

clean: ## Remove what the targets made (demo/, site/, caches), but not .venv
	rm -rf demo build dist site .pytest_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -type d -name __pycache__ -exec rm -rf {} +

distclean: clean ## Remove .venv as well
	rm -rf $(VENV)

# Each stamp is touched last, so that an interrupted set-up starts again.
$(CORE): pyproject.toml constraints.txt
	@$(PYTHON) -c "$(SUITABLE)" 2>/dev/null || { echo "fewstep needs Python 3.11 or later with\
	 the venv module (Debian, Ubuntu: apt install python3-venv), and $(PYTHON) is not that;\
	 name one with: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@echo "Setting up $(VENV), once; torch is a large download."
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt -e .
	@touch $@

$(DEV): $(CORE)
	$(PIP) install -c constraints.txt -e ".[dev]"
	@touch $@
