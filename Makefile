# Every target sets up what it needs. The environment is installed again only when one of $(PINS) changes, or Python does.
# ARGS goes to the program: make train ARGS="trainer.max_steps=50", make test ARGS="tests/nn -x".
# PYTHON picks the interpreter: make test PYTHON=python3.12.

VENV := .venv
PINS := pyproject.toml setup.cfg constraints.txt
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
LOG := $(VENV)/install.log
TEST_WORKERS ?= auto
# what pip leaves uncompiled is compiled once, and not by every process again
unexport PYTHONDONTWRITEBYTECODE

# What an installed environment depends on: the pins, the interpreter, and where the editable install points.
KEY := import hashlib, os, pathlib, sys; \
  pins = [pathlib.Path(name).read_bytes() for name in sys.argv[1:]]; \
  print(hashlib.sha256(b"".join([*pins, sys.version.encode(), os.getcwd().encode()])).hexdigest())

.DEFAULT_GOAL := help
.PHONY: help setup train test lint types wheel notebooks clean

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## */  make \1|/p' $(firstword $(MAKEFILE_LIST)) | while IFS='|' read -r target what; do \
	  printf '%-18s %s\n' "$$target" "$$what"; \
	done

setup:  ## create .venv and install the pinned environment, if that has not been done
	@# A name on PATH may be a shim that only prints an error, so a candidate counts when it runs.
	@# pip would compile all files, one after another; what is imported, a third of them, is compiled and kept then.
	@found=; \
	for candidate in $(or $(PYTHON),python3 python3.13 python3.12 python3.11); do \
	  if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
	    found=$$candidate; break; \
	  fi; \
	done; \
	if [ -z "$$found" ]; then \
	  echo "No Python 3.11 or newer among: $(or $(PYTHON),python3 python3.13 python3.12 python3.11)." >&2; \
	  echo "Install one, or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3" >&2; \
	  exit 1; \
	fi; \
	key=$$("$$found" -c '$(KEY)' $(PINS)) || exit 1; \
	if [ "$$(cat $(STAMP) 2>/dev/null)" = "$$key" ]; then exit 0; fi; \
	version='import sys; print(*sys.version_info[:3], sep=".")'; \
	wanted=$$("$$found" -c "$$version"); \
	if [ "$$($(BIN)/python -c "$$version" 2>/dev/null)" != "$$wanted" ]; then \
	  if ! "$$found" -c 'import ensurepip, venv' >/dev/null 2>&1; then \
	    echo "$$found (Python $$wanted) has no venv module. On Debian and Ubuntu: apt install python3-venv" >&2; \
	    exit 1; \
	  fi; \
	  echo "Creating $(VENV) with Python $$wanted"; \
	  "$$found" -m venv --clear $(VENV) || exit 1; \
	fi; \
	echo "Installing PyTorch, Lightning, Transformers and the test tools into $(VENV), as pinned in constraints.txt."; \
	echo "The first time takes a few minutes (log: $(LOG))."; \
	rm -f $(STAMP); \
	if ! $(BIN)/python -m pip install --disable-pip-version-check --no-compile -c constraints.txt -e '.[test]' >$(LOG) 2>&1; then \
	  cat $(LOG) >&2; \
	  echo "The installation failed; the log above is in $(LOG). Another interpreter: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; \
	  exit 1; \
	fi; \
	echo "$$key" >$(STAMP)

train: setup  ## train the quickstart's adapters side by side and show the tables
	@$(BIN)/python -m finetuna_lightning.train experiment=quickstart $(ARGS)

test: setup  ## run the tests
	@$(BIN)/python -m pytest -n $(TEST_WORKERS) --maxprocesses 4 --dist loadfile $(ARGS)

lint: setup  ## check the style and the format
	@$(BIN)/python -m ruff check .
	@$(BIN)/python -m ruff format --check .

types: setup  ## check the types
	@$(BIN)/python -m mypy

# The clean environment gets the wheel and what the wheel itself asks for, never the test extra: a dependency that
# setup.cfg forgot shows here. The programs start in an empty folder, so nothing comes from the checkout.
wheel: setup  ## build the wheel, install it into a clean environment and run it there
	@rm -rf build dist
	@$(BIN)/python -m build --wheel --no-isolation >$(LOG) 2>&1 || { cat $(LOG) >&2; exit 1; }
	@set -e; \
	clean=$$(mktemp -d); trap 'rm -rf "$$clean"' EXIT; trap 'exit 1' INT TERM; \
	mkdir "$$clean/empty"; \
	$(BIN)/python -m venv "$$clean/venv"; \
	echo "Installing $$(ls dist/*.whl) into a clean environment"; \
	"$$clean/venv/bin/python" -m pip install --disable-pip-version-check --no-compile -c constraints.txt dist/*.whl >$(LOG) 2>&1 \
	  || { cat $(LOG) >&2; exit 1; }; \
	"$$clean/venv/bin/python" -m pip check; \
	cd "$$clean/empty"; \
	"$$clean/venv/bin/finetuna-train" --help >/dev/null; \
	"$$clean/venv/bin/finetuna-cli" --help >/dev/null; \
	"$$clean/venv/bin/finetuna-estimate" experiment=quickstart; \
	"$$clean/venv/bin/finetuna-train" experiment=quickstart trainer.max_steps=1 trainer.val_check_interval=1 \
	  trainer.limit_val_batches=1 report=false $(ARGS); \
	echo "The wheel works from a clean environment."

notebooks: setup  ## execute the notebooks
	@$(BIN)/python -m pytest -n $(TEST_WORKERS) --maxprocesses 4 -m notebook tests/notebooks $(ARGS)

clean:  ## remove the environment and everything that was built or written here
	rm -rf $(VENV) build dist outputs multirun lightning_logs *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
