# make math    from a fresh clone to a trained adapter: installs what is needed, then runs the recipe
# make quick   the same set-up, then the quick tests; ARGS=tests/engine for a part of them
# make test    the same set-up and the system packages, then every test
# make oldest  the quick tests with the lowest versions that pyproject.toml allows; ARGS as above
# make newest  the same with the newest versions that it allows
# make check   ruff, its formatter, the type checker and the order of imports
# make bench   stock TRL and grpo-ext side by side; pass options in ARGS, such as ARGS=--quick
# make study   learning curves of the embedded model under seven settings; ARGS="--seeds 1" for one run of each,
#              ARGS="--task mixed" for difficulty pools, ARGS="--task sweep" for LoRA ranks and learning rates
# make docs    API pages from the docstrings, in outputs/docs; fails on broken cross-references
# make release VERSION=X.Y.Z   checks and tags this commit, and pushes the tag, which publishes it

PYTHON ?= python3
VENV := .venv
CONSTRAINTS := constraints.txt
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS)
INSTALLED := $(VENV)/.installed
TOOLS := $(VENV)/.tools
# `accelerate launch` gives a CPU process one thread unless told otherwise.
CORES := $(shell $(PYTHON) -c "import os; print(len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count())" 2>/dev/null || echo 1)

# What the tests need in addition to Python packages, as command:Debian-package.
SYSTEM := bwrap:bubblewrap chromium:chromium chromedriver:chromium-driver

.PHONY: math quick test oldest newest check fix bench study docs release-check release clean system

math: $(INSTALLED)
	OMP_NUM_THREADS=$(CORES) $(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no recipes/math.py

# Small models gain nothing from a second thread, so the tests run in parallel, one per core.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(CORES) --dist loadfile --no-loadscope-reorder

quick: $(TOOLS)
	$(PYTEST) -m "not slow" $(ARGS)

test: $(TOOLS) system
	$(PYTEST)

# Each in a fresh environment under outputs/. torch stays at the version of constraints.txt.
oldest: BOUNDS = sed -nE 's/^ *"([A-Za-z0-9_-]+)(\[.*\])?[>=]=([0-9.]+).*/\1==\3/p' pyproject.toml
oldest newest:
	rm -rf outputs/$@ && mkdir -p outputs
	(grep '^torch==' constraints.txt; $(BOUNDS)) > outputs/$@.txt
	$(MAKE) quick VENV=outputs/$@ CONSTRAINTS=outputs/$@.txt

check: $(TOOLS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

fix: $(TOOLS)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(TOOLS)
	$(BIN)/python tests/benchmarks/compare_trl.py $(ARGS)

study: $(TOOLS)
	$(BIN)/python -m grpo_ext.recipes.tiny_math.study $(ARGS)

docs: $(TOOLS)
	$(BIN)/python -m tests.docs.api_pages outputs/docs

# What must hold before a version is published; the release workflow checks it again.
release-check:
	@test -n "$(VERSION)" || { echo "Which version? make release VERSION=X.Y.Z"; exit 1; }
	@grep -qxF '__version__ = "$(VERSION)"' grpo_ext/__init__.py || \
		{ echo "__version__ in grpo_ext/__init__.py is not $(VERSION)."; exit 1; }
	@grep -qE '^## \[$(subst .,\.,$(VERSION))\] - [0-9]{4}-[0-9]{2}-[0-9]{2}$$' CHANGELOG.md || \
		{ echo "CHANGELOG.md has no section '## [$(VERSION)] - YYYY-MM-DD'."; exit 1; }
	@test -z "$$(git status --porcelain)" || { echo "The working tree has changes that are not committed."; exit 1; }

release: release-check
	git tag -a "v$(VERSION)" -m "grpo-ext $(VERSION)"
	git push origin "v$(VERSION)"

# Installs what is missing if that needs no password, and otherwise prints what to type. One package at a time, since not
# every distribution has each of them under this name.
system:
	@missing() { for pair in $(SYSTEM); do command -v "$${pair%%:*}" >/dev/null || echo "$${pair##*:}"; done; }; \
	sudo=$$([ "$$(id -u)" = 0 ] || echo "sudo -n"); \
	[ -z "$$(missing)" ] || \
		{ command -v apt-get && $$sudo apt-get update && \
			for package in $$(missing); do $$sudo apt-get install -y $$package; done; } >/dev/null 2>&1; \
	[ -z "$$(missing)" ] || echo "Some tests are skipped without: sudo apt install" $$(missing)

# What the targets above made, without the runs, adapters and measurements in outputs/.
clean:
	rm -rf $(VENV) outputs/oldest* outputs/newest* outputs/docs outputs/cache .pytest_cache .ruff_cache .mypy_cache

# Reinstalled only if the packages or their versions have changed.
$(INSTALLED): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'grpo-ext needs Python 3.11 or newer; this is ' + sys.version.split()[0] + '. Try: make PYTHON=python3.11')"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -e .
	@touch $(INSTALLED)

# The packages that the tests need in addition; one of them, reasoning-gym, compiles a part of itself.
$(TOOLS): $(INSTALLED)
	$(PIP) -e ".[dev]"
	@touch $(TOOLS)
