# Two commands: `make book` and `make test`. Each does all the setting up that is still to be done.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.nanolm-ready
POCKET := runs/pocket
PAGE := _build/html/index.html

.DEFAULT_GOAL := help
.PHONY: help book test tangle check clean

help:
	@echo "make book   install, train the pocket model, print samples, render the book"
	@echo "make test   install, check everything"

# a second run installs nothing, unless the package's settings or the locked versions have changed
$(READY): pyproject.toml book/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
	  { echo "nanolm needs Python 3.10 or newer: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { echo "could not make $(VENV): on Debian or Ubuntu, install python3-venv"; exit 1; }
	@echo "installing into $(VENV) (minutes the first time, then not again)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  --constraint book/constraints.txt --editable '.[test]'
	@touch $@

# the last checkpoint of a finished run is the one that its config.json asks for
FINISHED := import json, pathlib; run = pathlib.Path("$(POCKET)"); \
  steps = json.loads((run / "config.json").read_text())["train"]["steps"]; \
  raise SystemExit(not (run / f"step-{steps:06d}").is_dir())

book: $(READY)
	@if $(BIN)/python -c '$(FINISHED)' 2>/dev/null; then echo "$(POCKET) is trained already"; \
	elif test -e $(POCKET)/config.json; then $(BIN)/python -m nanolm train --preset pocket --resume; \
	else $(BIN)/python -m nanolm train --preset pocket; fi
	@echo; echo "What it has learnt to write:"; echo
	@$(BIN)/python -m nanolm sample $(POCKET) --seed 1 --prompt "Once" --prompt "Once, behind a"
	@echo "rendering the book"
	@$(BIN)/jupyter-book build -q . > _build.log 2>&1 || { cat _build.log; exit 1; }
	@rm -f _build.log
	@echo "the book is ready: open $(CURDIR)/$(PAGE)"
	@echo "and the model: $(BIN)/nanolm sample, or $(BIN)/nanolm serve for a page to try it on"

test: $(READY)
	@OMP_WAIT_POLICY=passive $(BIN)/python -m pytest --nbval --nbval-current-env -n 2 --dist loadfile \
	  --cov=nanolm --cov-report=term --cov-fail-under=93 --durations=10 tests book

# for people who write chapters
tangle: $(READY)
	@$(BIN)/python -m nanolm.tangle

check: $(READY)
	@$(BIN)/python -m nanolm.tangle --check

clean:
	rm -rf _build build *.egg-info .coverage .coverage.* .mypy_cache .ruff_cache book/_static/mathjax
