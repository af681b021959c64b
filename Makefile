# make demo    installs what the demo needs and runs it
# make test    installs everything, then lint, types and every test, in JOBS processes

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2

BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable

.PHONY: demo test lint clean

demo: $(VENV)/.installed-demo
	$(BIN)/python examples/semantic_search.py

test: lint
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist worksteal

# mypy reads the passes through the link fp8fx/passes; naming the folder passes as well would show it every module twice.
lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict fp8fx

$(VENV)/.installed-demo: EXTRAS := demo
$(VENV)/.installed-test: EXTRAS := demo,test,dev
$(VENV)/.installed-%: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) '.[$(EXTRAS)]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
