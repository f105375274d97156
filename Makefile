# Everything runs in $(VENV). It is made once, and again when the dependencies change; one that exists is kept.
VENV ?= .venv
PYTHON ?= python3
READY = $(VENV)/.ready

.PHONY: demo test test-slow check clean

demo: $(READY)
	$(VENV)/bin/adapt fit -c nbdiff --resume=auto

test: $(READY)
	$(VENV)/bin/python -m pytest

test-slow: $(READY)
	$(VENV)/bin/python -m pytest -m "slow and not gpu"

check: $(READY)
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	-$(VENV)/bin/ty check --python $(VENV) --exit-zero --output-format concise adapt

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find adapt tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): pyproject.toml requirements.lock
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -c requirements.lock -e ".[dev]"
	touch $@
