# `make help` lists what there is. Each target makes the environment that it needs.

SHELL       := bash
.SHELLFLAGS := -o pipefail -c

# Threads that spin while they wait slow each other down where there are fewer free cores than threads.
export OMP_WAIT_POLICY ?= PASSIVE

# Python keeps what it has compiled, even where the environment says that it should not: tests start many processes, and
# each of them would compile PyTorch and transformers anew.
unexport PYTHONDONTWRITEBYTECODE

VENV  := .venv
BIN   := $(VENV)/bin
STAMP := $(VENV)/installed

# The first of these that runs and is new enough (a name on the PATH alone may be a pyenv shim that leads nowhere).
PYTHON ?= $(firstword $(foreach p,python3.11 python3,$(shell $(p) -c 'import sys; sys.version_info >= (3, 11) and print("$(p)")' 2>/dev/null)))

# What `make reproduce` passes on: QUICK=1, SEEDS=n, EXPERIMENTS="animals"
OPTIONS := $(EXPERIMENTS) $(if $(SEEDS),--seeds $(SEEDS)) $(if $(QUICK),--quick)

# What `make workshop` passes on: PORT=n, and for a page that other computers can reach BIND=address PUBLIC=1
SERVE := $(if $(BIND),--host $(BIND)) $(if $(PORT),--port $(PORT)) $(if $(PUBLIC),--public)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help reproduce check test fuzz workshop lessons export browser docs

help: ## say what there is to make
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' Makefile

reproduce: $(STAMP) ## run the experiment notebooks again and write figures/   (QUICK=1, SEEDS=n, EXPERIMENTS="animals")
	$(BIN)/tokenlabel fetch
	$(BIN)/tokenlabel $(strip reproduce $(OPTIONS))

check: $(STAMP) ## unit tests on tiny models, layers, export and links: no model to download, no browser, two minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist worksteal -m "not slow" --ignore tests/test_browser.py --ignore tests/test_visitors.py tests

test: $(STAMP) browser ## check that code, notebooks and README agree, run the lessons and the tests
	$(BIN)/tokenlabel fetch
	$(BIN)/python -m pytest -ra tests/test_browser.py tests/test_visitors.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -ra -n auto --dist worksteal --ignore tests/test_browser.py --ignore tests/test_visitors.py tests

fuzz: $(STAMP) ## more random damage to files and model folders   (FUZZ=inputs of each kind, SEED=another draw)
	FUZZ=$(or $(FUZZ),500) SEED=$(or $(SEED),1) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto tests/test_fuzz.py tests/test_kills.py

workshop: $(STAMP) ## serve the explorer at the printed address, with its token   (PORT=n; for others, too: BIND=address PUBLIC=1)
	$(BIN)/tokenlabel $(strip workshop $(SERVE))

lessons: $(STAMP) ## write a learner's copy of the lessons   (FOLDER=../lessons)
	$(BIN)/tokenlabel lessons $(or $(FOLDER),../lessons)

# The tests in a browser need Chromium, which pip cannot install. Without it they are skipped, and counted as that.
browser:
	@command -v chromium >/dev/null || { test "$$(id -u)" = 0 && command -v apt-get >/dev/null \
	  && apt-get update -q && apt-get install -y -q --no-install-recommends chromium; } \
	  || echo "No chromium here: the tests in a browser will be skipped. On Debian: apt-get install chromium"

export: $(STAMP) ## write tokenlabel/ and README.md from the notebooks, and clean these
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean
	rm -f README.md
	$(MAKE) README.md

# Sphinx has an environment of its own: it needs neither the package nor PyTorch, and its requirements are not ours.
docs: .venv-docs/installed ## build the documentation in _docs/ from the committed notebooks; a warning is an error
	.venv-docs/bin/sphinx-build -q -E -W --keep-going -j auto -c nbs/docs -d _docs/doctrees nbs _docs/html
	@echo "The documentation is in _docs/html/index.html"

.venv-docs/installed: nbs/docs/requirements.txt
	test -x .venv-docs/bin/python || $(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install -q -r $<
	touch $@

# Links and pictures in the notebook are relative to nbs/, those in README.md to the folder above. The language of code
# is named once more, because clean notebooks do not carry it. The style of a pandas table would be shown as text.
README.md: nbs/index.ipynb $(STAMP)
	$(BIN)/python -m nbconvert --to markdown --stdout $< \
	  | cat -s | awk '/^```/ { if (!inside && $$0 == "```") $$0 = "```python"; inside = !inside } 1' \
	  | sed -E -e '/<style scoped>/,/<\/style>/d' -e 's#(\]\(|(src|href)=")\.\./#\1#g; s#(\]\(|href=")(docs/[a-z]+\.md|[A-Za-z0-9_/]+\.ipynb)#\1nbs/\2#g' > $@

# Most of what is installed is never imported, so Python compiles what is when it is: pip would take twice the time.
$(STAMP): settings.ini setup.py constraints.txt
	@$(if $(PYTHON)$(wildcard $(BIN)/python),,$(error tokenlabel needs Python 3.11 or newer, found $(shell python3 --version 2>&1); \
	  install it, or name it: make PYTHON=/path/to/python3.11))
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --no-compile -c constraints.txt -e '.[dev,workshop]'
	touch $@
