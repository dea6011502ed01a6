# make math    from a fresh clone to a trained adapter: installs what is needed, then runs the recipe
# make quick   the same set-up, then the quick tests
# make test    the same set-up and the system's packages, then every test
# make check   ruff, its formatter, the type checker and the order of imports
# make bench   stock TRL and grpo-ext side by side; options through ARGS, such as ARGS=--quick
# make study   learning curves of the embedded model under seven settings; ARGS="--seeds 1" for one run of each
# make docs    API pages from the docstrings, in outputs/docs; fails on broken cross-references
# make release VERSION=X.Y.Z   checks and tags this commit, and pushes the tag, which publishes it

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
INSTALLED := $(VENV)/.installed
TOOLS := $(VENV)/.tools
# `accelerate launch` gives a CPU process one thread unless told otherwise.
CORES := $(shell $(PYTHON) -c "import os; print(len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count())" 2>/dev/null || echo 1)

# What the tests need beside Python packages, each as command:package-of-Debian.
SYSTEM := bwrap:bubblewrap chromium:chromium chromedriver:chromium-driver

.PHONY: math quick test check fix bench study docs release-check release clean system

math: $(INSTALLED)
	OMP_NUM_THREADS=$(CORES) $(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no recipes/math.py

# Small models gain nothing from a second thread; as many tests run side by side as there are cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(CORES) --dist loadfile --no-loadscope-reorder

quick: $(TOOLS)
	$(PYTEST) -m "not slow"

test: $(TOOLS) system
	$(PYTEST)

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

# Installs what is missing where that needs no password, and says elsewhere what to type. One package at a time: not
# every distribution has each under this name.
system:
	@missing() { for pair in $(SYSTEM); do command -v "$${pair%%:*}" >/dev/null || echo "$${pair##*:}"; done; }; \
	sudo=$$([ "$$(id -u)" = 0 ] || echo "sudo -n"); \
	[ -z "$$(missing)" ] || \
		{ command -v apt-get && $$sudo apt-get update && \
			for package in $$(missing); do $$sudo apt-get install -y $$package; done; } >/dev/null 2>&1; \
	[ -z "$$(missing)" ] || echo "Some tests are skipped without: sudo apt install" $$(missing)

clean:
	rm -rf $(VENV) outputs .pytest_cache .ruff_cache .mypy_cache

# Installed again only when the packages or their versions changed.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'grpo-ext needs Python 3.11 or newer, this is ' + sys.version.split()[0] + '. Try: make PYTHON=python3.11')"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -e .
	@touch $(INSTALLED)

# What the tests need on top; reasoning-gym, one of them, compiles a part of itself.
$(TOOLS): $(INSTALLED)
	$(PIP) -e ".[dev]"
	@touch $(TOOLS)
