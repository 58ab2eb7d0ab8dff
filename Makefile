# Everything lives in one virtual environment, .venv. The files core, test, docs and dev in it are
# stamps: nothing is installed twice until setup.cfg, pyproject.toml or constraints.txt changes.

PYTHON ?= python3
VENV := .venv
# CPU=1 leaves CUDA out: torch's own index has builds without, which count as newer than those of PyPI.
INDEX := $(if $(CPU),--extra-index-url https://download.pytorch.org/whl/cpu)
INSTALL := $(VENV)/bin/python -m pip install $(INDEX) --constraint constraints.txt --editable
# A process for each core, so one thread in each.
PYTEST := OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --numprocesses auto --dist loadfile
REQUIREMENTS := setup.cfg pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help quickstart kernels study results tables pictures bench storm zoo docs test proofs check format lint types dist clean

help: ## show this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | awk -F '\t' '{ printf "  make %-12s%s\n", $$1, $$2 }'

quickstart: $(VENV)/core ## install, then train on the embedded digits (half a minute)
	$(VENV)/bin/nm fit --config configs/quickstart.yaml

kernels: $(VENV)/core ## build the norms' kernels for this CPU (needs a C++ compiler)
	$(VENV)/bin/nm kernels build

STUDY := study_short
SEEDS := 1 2 3
RULES := wd_on wd_off lr_correction norm_schedule exponential_lr

study: $(VENV)/core ## the weight-decay study on SEEDS='1 2 3', short; whole with STUDY=study
	for seed in $(SEEDS); do for rule in $(RULES); do \
	    $(VENV)/bin/nm fit --config configs/$(STUDY)_$$rule.yaml --seed_everything $$seed \
	        $(OPTIONS) || exit 1; done; done
	$(VENV)/bin/nm compare $(foreach rule,$(RULES),runs/$(STUDY)_$(rule))

results: $(VENV)/test ## make the missing runs of results/plan.yaml; OPTIONS='--only wd_on --data-root DIR'
	$(VENV)/bin/python results/run_plan.py $(OPTIONS)

tables: $(VENV)/core ## docs/results.md, its pictures and README's table from results/
	$(VENV)/bin/python results/make_tables.py

pictures: $(VENV)/core ## all pictures of docs but those of long runs, from short runs (needs Chromium)
	$(VENV)/bin/python docs/take_pictures.py $(OPTIONS)

bench: $(VENV)/test ## measure every target of speed and memory (15 minutes); OPTIONS='--only N2 N3'
	$(VENV)/bin/python benchmarks/speed.py $(OPTIONS)

storm: $(VENV)/test ## bad inputs, random kills and full disks, under ten minutes; OPTIONS='--seed 2 --only kills'
	$(VENV)/bin/python benchmarks/storm.py $(OPTIONS)

zoo: $(VENV)/zoo ## try every model of timm and more, optimizers and loops (hours; it resumes where it stopped)
	for zoo in zoo_optimizers zoo_loops zoo; do $(VENV)/bin/python benchmarks/$$zoo.py $(OPTIONS) && \
	$(VENV)/bin/python benchmarks/$$zoo.py --write docs/compatibility.md $(OPTIONS) || exit; done

docs: $(VENV)/docs ## the site, in site/; a dead link or anchor is an error, and so is what needs another host
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict
	@! grep -rnoE '<(script|link|img|iframe)[^>]+(src|href)="?(https?:)?//[^ >]*' site --include=*.html

test: $(VENV)/test ## install with the test extra, then run the tests
	$(PYTEST) -m "not slow"

proofs: $(VENV)/test ## the slow tests, which make test skips
	$(PYTEST) -m slow

check: format lint types docs test ## format, lint, types, site and tests, as CI: run it before a pull request

format: $(VENV)/dev ## format the code
	$(VENV)/bin/ruff check --fix-only --quiet .
	$(VENV)/bin/ruff format .

lint: $(VENV)/dev ## check style and formatting
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(VENV)/dev ## mypy --strict
	$(VENV)/bin/mypy

dist: $(VENV)/dev ## build and check a release in dist/
	rm -rf dist && $(VENV)/bin/python -m build && $(VENV)/bin/twine check --strict dist/*

clean: ## remove build outputs, but not runs/ and data/
	rm -rf $(VENV) build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache

# Debian's python3 comes without ensurepip; then the pip beside it equips the environment.
$(VENV)/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	    echo "nmlightning needs Python 3.10 or newer, and '$(PYTHON)' is not. Choose another:" \
	         "make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "Making the virtual environment $(VENV) with $$($(PYTHON) --version)"
	@if $(PYTHON) -c 'import ensurepip' 2>/dev/null; then $(PYTHON) -m venv $(VENV); \
	else $(PYTHON) -m venv --without-pip $(VENV) \
	    && $(PYTHON) -m pip --python $(VENV)/bin/python install --quiet pip; fi || { \
	    rm -rf $(VENV); \
	    echo "'$(PYTHON) -m venv' could not make an environment with pip. On Debian or Ubuntu:" \
	         "apt install python3-venv. Elsewhere: make PYTHON=another-python $(MAKECMDGOALS)" >&2; \
	    exit 1; }

$(VENV)/core: $(REQUIREMENTS) | $(VENV)/bin/pip
	@echo "Installing nmlightning and what it needs (a few minutes the first time)"
	$(INSTALL) .
	@touch $@

$(VENV)/test: $(REQUIREMENTS) | $(VENV)/bin/pip
	@echo "Installing nmlightning with its tests (a few minutes the first time)"
	$(INSTALL) '.[test]'
	@touch $(VENV)/core $@

$(VENV)/zoo: $(REQUIREMENTS) | $(VENV)/bin/pip
	@echo "Installing nmlightning with the zoos of models (a few minutes the first time)"
	$(INSTALL) '.[zoo]'
	@touch $(VENV)/core $@

$(VENV)/docs: $(REQUIREMENTS) | $(VENV)/bin/pip
	@echo "Installing nmlightning with what writes its site (a few minutes the first time)"
	$(INSTALL) '.[docs]'
	@touch $(VENV)/core $@

$(VENV)/dev: $(REQUIREMENTS) | $(VENV)/bin/pip
	@echo "Installing nmlightning with its tests and tools (a few minutes the first time)"
	$(INSTALL) '.[dev]'
	@touch $(VENV)/core $(VENV)/docs $(VENV)/test $@
