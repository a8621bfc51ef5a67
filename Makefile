# Every target explains itself: make help
.DEFAULT_GOAL := help
.PHONY: help demo test test-faults lint bench-ingest bench-retarget bench-send bench-console browser peers screenshots format protos docs constraints clean

PYTHON ?= python3
BIN := .venv/bin
PLUGINS := $(wildcard plugins/*/pyproject.toml)

help: ## Show this list.
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## /\1|/' | while IFS='|' read -r name text; do printf '  make %-12s %s\n' "$$name" "$$text"; done

demo: .venv/server ## Set up, then run the main job end to end on an embedded database: send, hear back, retarget.
	$(BIN)/aftertouch demo

test: .venv/dev ## Set up, then run all tests on an embedded database (ARGS='-k name' chooses, ARGS='--dsn URL' takes another).
	@! command -v npm >/dev/null || $(MAKE) --no-print-directory peers || echo "what others wrote could not be installed"
	$(BIN)/python -m pytest -n auto --dist loadfile $(ARGS)

test-faults: .venv/dev ## Kill and cut everything at random while events come in, 3 minutes with one process and 3 with two (ARGS='--seconds 600'); nothing may be missing.
	$(BIN)/python -m tests.faults $(ARGS)

lint: .venv/dev ## Check style, types, layers, and the protos with their stubs; changes nothing.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PYTHONPATH=server $(BIN)/lint-imports --no-logo
	$(BIN)/buf lint
	$(BIN)/buf format --diff --exit-code protos
	$(BIN)/python tests/house/breaking.py
	$(BIN)/python tests/house/stubs.py --check

bench-ingest: .venv/dev ## Measure durable events per second over one stream, beside a COPY of the same rows.
	$(BIN)/python -m tests.bench.ingest

bench-retarget: .venv/dev ## Measure questions of a campaign to 10 million people, beside a table with a row for each delivery.
	$(BIN)/python -m tests.bench.retarget

bench-send: .venv/dev ## Measure messages per second of one worker, beside ECDH alone and a loop over pywebpush; and a launch to 10 million.
	$(BIN)/python -m tests.bench.send

bench-console: .venv/dev ## Measure the console's pages of a campaign to 10 million people.
	$(BIN)/python -m tests.bench.console

browser: ## Install Debian's Chromium where there is none: the console's tests and screenshots need it.
	command -v chromium || (apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends chromium)

peers: ## Install what tests need of JavaScript: what others wrote for the channels to be held against, and the TypeScript client.
	command -v npm || (apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends nodejs npm)
	for folder in tests/peers clients/typescript; do (cd $$folder && { cmp -s package-lock.json node_modules/installed || \
	  { npm ci && cp package-lock.json node_modules/installed; }; }) || exit 1; done

screenshots: .venv/dev browser ## Take the pictures of the console in docs/images again; look at each.
	$(BIN)/python -m tests.house.screenshots

format: .venv/dev ## Format Python and protos.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/buf format protos -w

protos: .venv/dev ## Generate the committed stubs from protos/.
	$(BIN)/python tests/house/stubs.py

docs: .venv/dev ## Write the generated parts of docs/ and README.md again: settings, channels and snippets.
	$(BIN)/python tests/house/pages.py

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
