# demo: install and show the main job.  test: install and pass lint, types and tests; test-fast: all but the slow ones.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
SOURCES := $(shell find kernels/csrc offload/csrc -name "*.cpp" -o -name "*.h")
NATIVE := CMakeLists.txt $(SOURCES)
PARTS := cli.py quantize runtime instruments offload kernels cost src examples benchmarks tests docs

.PHONY: demo test test-fast lint format docs bench clean

demo: .venv/installed
	$(BIN)/moebox demo

test: .venv/tested lint
	$(BIN)/pytest

test-fast: .venv/tested lint
	$(BIN)/pytest -m "not slow"

lint: .venv/tested
	$(BIN)/ruff check $(PARTS)
	$(BIN)/ruff format --check $(PARTS)
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(SOURCES)

format: .venv/tested
	$(BIN)/ruff check --fix $(PARTS)
	$(BIN)/ruff format $(PARTS)
	$(BIN)/clang-format -i $(SOURCES)

docs: .venv/tested
	$(BIN)/python docs/generate_cli.py

bench: .venv/tested
	$(BIN)/python benchmarks/cpu_experts.py

clean:
	rm -rf .venv build dist out

# Editable, so Python edits are live; a change of the C++ sources or of the dependencies reinstalls.
.venv/installed: pyproject.toml constraints.txt $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e .
	touch $@

.venv/tested: .venv/installed
	$(BIN)/pip install --quiet -c constraints.txt -e '.[test]'
	touch $@
