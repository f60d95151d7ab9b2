# `make demo` and `make test` need only python3 >= 3.10 and a package index.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test soak structure lint clean

demo: $(VENV)/.installed
	$(BIN)/paged-kv demo

# Triton's kernels are interpreted where there is no GPU; what the compiler makes of them is looked
# at in a second run.
test: $(VENV)/.installed lint
	$(BIN)/python -m pytest -n 2 --dist loadgroup -q
	TRITON_INTERPRET=0 $(BIN)/python -m pytest -n 2 -q tests/kernels/test_machine_code.py tests/kernels/test_triton_machine_code.py tests/kernels/test_tune.py

# Random operations on the block manager beside a reference; a mismatch says how to repeat it.
STEPS ?= 1000000
SEED ?= 0
soak: $(VENV)/.installed
	PYTHONPATH=bench $(BIN)/python -m tests.soak.soak_block_manager --steps $(STEPS) --seed $(SEED)

# Every file in one line, from what it says of itself.
structure:
	$(PYTHON) bench/tools/house.py --tree > docs/structure.md

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# torch is asked for by its exact version first, so that pip resolves nothing else for it.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade "pip>=25.1"
	$(BIN)/python -m pip install -q -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[models,cpu,gpu,xformers]" --group dev
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
