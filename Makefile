# Every target explains itself: make help
.DEFAULT_GOAL := help
.PHONY: help demo test lint format protos constraints clean

PYTHON ?= python3
BIN := .venv/bin
STUBS := server/aftertouch/v1 server/buf
PROTOS := $(wildcard protos/aftertouch/v1/*.proto)
PLUGINS := $(wildcard plugins/*/pyproject.toml)

help: ## Show this list.
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## /\1|/' | while IFS='|' read -r name text; do printf '  make %-12s %s\n' "$$name" "$$text"; done

demo: .venv/server ## Set up, then run the main job end to end on an embedded database: send, hear back, retarget.
	$(BIN)/aftertouch demo

test: .venv/dev ## Set up, then run all tests on an embedded database (or on --dsn, see tests/README.md).
	$(BIN)/python -m pytest $(ARGS)

lint: .venv/dev ## Check style, types, layers, and the protos with their stubs.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/buf lint
	$(BIN)/buf format --diff --exit-code --path protos
	$(BIN)/python tests/house/breaking.py
	$(MAKE) --no-print-directory protos
	git diff --exit-code -- $(STUBS)

format: .venv/dev ## Format Python and protos.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/buf format -w protos

protos: .venv/dev ## Generate the committed stubs from protos/.
	$(BIN)/python -m grpc_tools.protoc -I protos -I third_party/protos \
	  --plugin=protoc-gen-mypy=$(BIN)/protoc-gen-mypy --plugin=protoc-gen-mypy_grpc=$(BIN)/protoc-gen-mypy_grpc \
	  --python_out=server --mypy_out=quiet:server third_party/protos/buf/validate/validate.proto
	$(BIN)/python -m grpc_tools.protoc -I protos -I third_party/protos \
	  --plugin=protoc-gen-mypy=$(BIN)/protoc-gen-mypy --plugin=protoc-gen-mypy_grpc=$(BIN)/protoc-gen-mypy_grpc \
	  --python_out=server --grpc_python_out=server --mypy_out=quiet:server --mypy_grpc_out=quiet:server $(PROTOS)

constraints: ## Pin the newest versions that fit constraints/*.in (needs uv).
	for set in server dev; do uv pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes --no-header \
	  --no-annotate --no-emit-index-url --no-emit-find-links constraints/$$set.in -o constraints/$$set.txt; done

clean: ## Remove the virtual environment and what tests and the demo left.
	rm -rf .venv build dist .aftertouch .pytest_cache .mypy_cache .ruff_cache .hypothesis

# The set-up is done again when a pin or a pyproject.toml changes.
.venv/server: constraints/server.txt pyproject.toml $(PLUGINS)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r constraints/server.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e . $(addprefix -e ,$(dir $(PLUGINS)))
	touch $@

.venv/dev: constraints/dev.txt .venv/server
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r constraints/dev.txt
	touch $@
