# Each target sets up what it needs, once, in .venv inside the checkout; any order, no other preparation.
#   make demo    two models under a third of their memory, with tables and pictures in demo/
#   make test    the tests
#   make test-comfyui   the node pack in the real host: COMFYUI_PATH names a checkout, COMFYUI_PYTHON its interpreter (docs/comfyui.md)
#   make lint    style, types and import contracts
#   make clean   removes .venv, caches and the demo's output
# PYTHON=python3.12 chooses the interpreter (3.10 or newer); SYSTEM_PACKAGES=1 uses its torch instead of installing one.

PYTHON ?= python3
SYSTEM_PACKAGES ?= 0
TEST_PROCESSES ?= 2
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.ready

.PHONY: demo test test-comfyui lint clean
.DELETE_ON_ERROR:

demo: $(STAMP)
	$(PY) -m overflowml demo

test: $(STAMP)
	@$(PY) -m pytest -n $(TEST_PROCESSES) --dist worksteal

test-comfyui: $(STAMP)
	@test -n "$(COMFYUI_PATH)" || { echo "COMFYUI_PATH is not set: give a checkout of ComfyUI (docs/comfyui.md)" >&2; exit 2; }
	@$(PY) -m pytest tests/comfyui

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/lint-imports

clean:
	rm -rf $(VENV) demo build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt tools/setup.sh
	@SYSTEM_PACKAGES=$(SYSTEM_PACKAGES) tools/setup.sh "$(PYTHON)" "$(VENV)" "$(STAMP)"
