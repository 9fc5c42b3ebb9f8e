# `make demo` and `make test` do all set-up that they need and skip what is done.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.ready

.PHONY: demo test lint setup clean

setup: $(STAMP)

$(STAMP): requirements.txt setup.py tools/setup_env.sh
	PYTHON=$(PYTHON) VENV=$(VENV) sh tools/setup_env.sh
	touch $@

demo: $(STAMP)
	$(PY) tools/demo.py

test: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pytest tests -n 2 --dist loadfile --no-loadscope-reorder

lint: $(STAMP)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean:
	rm -rf $(VENV) work_dirs data/demo
