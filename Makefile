# `make` lists the targets. The environment is made once, in .venv, and again only when its requirements change.

PYTHON ?= python3
# Where pip finds a CPU build of torch, if the default index would bring a CUDA one:
#   make site TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
# The builder is pinned, and the site is tested with its successor too: no need to be told each time.
export NO_MKDOCS_2_WARNING := 1
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
CHROMIUM := $(firstword $(shell command -v chromium chromium-browser google-chrome 2>/dev/null))

.DEFAULT_GOAL := help
.PHONY: help site serve test check format bench clean

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' Makefile | expand -t 16

site: .venv/stamp  ## validate, run what exists, measure its claims, build the site into site/
	$(BIN)/effllm check
	$(BIN)/effllm run
	$(BIN)/effllm claims --measure
	$(BIN)/python -m tools.docs
	$(BIN)/python -m mkdocs build --strict --quiet
	@printf '\nThe site stands in site/. Open it with:\n\n  make serve\n\nTry next:\n\n'
	@printf '  %s\n' '$(BIN)/effllm show lora' '$(BIN)/effllm run rtn --seeds 3' '$(BIN)/effllm graph --around gptq -o gptq.svg'

serve:  ## serve site/ on http://127.0.0.1:8000
	@test -f site/index.html || { echo 'site/ is not built yet: make site'; exit 1; }
	@echo 'http://127.0.0.1:8000 (Ctrl-C stops)'
	@$(BIN)/python -m http.server --bind 127.0.0.1 --directory site 8000 2>/dev/null

test: .venv/stamp  ## every test, the browser's too; sets up what it needs
	@$(MAKE) --no-print-directory chromium
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 --dist loadgroup --doctest-modules taxonomy refimpl tools tests

check: .venv/stamp  ## the fast half: lint, types, doctests, taxonomy, unit tests
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/effllm check
	$(BIN)/python -m pytest -n 2 --dist loadgroup -q -m 'not slow and not browser' --doctest-modules taxonomy refimpl tools tests

format:  ## let ruff format the code and mend what it can
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

bench: .venv/stamp  ## measure what docs/results/ holds: every arena whole, claims, peers, scale (hours; goes on where it was)
	$(BIN)/effllm bench all --jobs 1 --output docs/results
	$(BIN)/effllm claims --measure --output docs/results/claims.json
	$(BIN)/python -m tools.peers --output docs/results/peers.json
	$(BIN)/python -m tools.scaling --output docs/results/scaling.json

clean:  ## remove what was built, the environment too
	rm -rf .venv build site dist

# A headless Chromium drives the browser tests; it comes from the system's package manager, where that may be used.
.PHONY: chromium
chromium:
ifeq ($(CHROMIUM),)
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo 'installing chromium by apt-get'; apt-get -qq update && apt-get -qq install -y chromium >/dev/null; \
	elif command -v sudo >/dev/null && sudo -n true 2>/dev/null && command -v apt-get >/dev/null; then \
		echo 'installing chromium by sudo apt-get'; sudo apt-get -qq update && sudo apt-get -qq install -y chromium >/dev/null; \
	else \
		echo 'No Chromium on this machine, and no right to install one: the browser tests will be skipped.'; \
		echo 'Install one (Debian: sudo apt install chromium) and run `make test` again.'; \
	fi
endif

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo 'Python 3.11 or newer is needed: make PYTHON=python3.12 …'; exit 1; }
	@$(PYTHON) -m venv .venv || { echo 'The venv module is missing (Debian: apt install python3-venv).'; rm -rf .venv; exit 1; }

.venv/stamp: pyproject.toml constraints.txt | .venv/bin/python
	@echo 'making the environment in .venv (a few minutes, once)'
	@$(PIP) --editable '.[run,docs,test]'
	@touch $@
