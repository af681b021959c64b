# make demo         installs what the demo needs and runs it
# make test         installs everything, then lint, types and every test, in JOBS processes
# make quick        the tests that need no compiler, no GPU, no zoo and no patience, in JOBS processes; properties get a tenth of the examples
# make test-newest  the same tests on the newest torch, in an environment of its own; TESTS names some of them, FAST is a part

PYTHON ?= python3
VENV ?= .venv
NEWEST ?= .venv-newest
JOBS ?= 2

BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable

# Tests run in an order of each commit's own, which SEED repeats.
SEED ?= $(shell printf %d 0x$$(git rev-parse --short=7 HEAD 2>/dev/null || echo 0))
PYTEST := pytest --numprocesses $(JOBS) --dist worksteal --randomly-seed $(SEED)

# What a torch that writes its graphs otherwise would break first.
FAST := $(addprefix tests/,graph linears ops passes)
TESTS ?= tests

.PHONY: demo test quick test-newest test-newest-fast lint clean

demo: $(VENV)/.installed-demo
	$(BIN)/python examples/semantic_search.py

test: lint
	$(BIN)/python -m $(PYTEST)

quick: $(VENV)/.installed-test
	$(BIN)/python -m $(PYTEST) -m "not compiles and not slow and not gpu and not zoo" --hypothesis-profile quick

test-newest: $(NEWEST)/.installed
	$(NEWEST)/bin/python -m $(PYTEST) $(TESTS)

test-newest-fast: TESTS := $(FAST) -m "not slow and not gpu and not zoo" --hypothesis-profile quick
test-newest-fast: test-newest

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

# The environment's PIP_CONSTRAINT takes the place of one that a machine has set, which may cap torch.
$(NEWEST)/.installed: pyproject.toml constraints.txt constraints-newest.txt
	$(PYTHON) -m venv $(NEWEST)
	grep -vE '^(torch|triton)==' constraints.txt | cat - constraints-newest.txt >$(NEWEST)/constraints.txt
	PIP_CONSTRAINT=$(NEWEST)/constraints.txt $(NEWEST)/bin/python -m pip install --quiet --editable '.[demo,test]'
	touch $@

clean:
	rm -rf $(VENV) $(NEWEST) build dist *.egg-info
