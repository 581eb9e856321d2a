# Everything runs in .venv, which the first target that needs it creates:
#   make test                                      with the versions in requirements/constraints.txt
#   make test PYTHON=python3.12 CONSTRAINTS=       with another Python and the newest versions
#   make test CONSTRAINTS=requirements/oldest.txt  with the oldest PyTorch that the package supports
PYTHON ?= python3
CONSTRAINTS ?= requirements/constraints.txt
# Processes that share the tests; each takes about 1 GB.
PYTEST_JOBS ?= 2

SHELL := /bin/bash
# Tests start many processes, which would compile PyTorch anew.
export PYTHONDONTWRITEBYTECODE :=
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help venv demo docs lint test test-compiled test-interpreted test-package nightly fuzz soak bench experiments verify hub release clean

VENV := .venv
RUN := $(VENV)/bin/python
# One stamp for each choice of Python and constraints, so that another choice makes another environment. Modules are
# compiled when they are first imported, since most never are.
STAMP := $(VENV)/made-with-$(notdir $(PYTHON))-$(or $(notdir $(CONSTRAINTS)),newest)

help: ## List the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 22

venv: $(STAMP) ## Create .venv with the package and everything its targets need

$(STAMP): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "$(PYTHON) is older than Python 3.10: name another by PYTHON=...")'
	@if [ ! -e $@ ] && ls $(VENV)/made-with-* &> /dev/null; then rm -rf $(VENV); fi
	test -e $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --no-compile $(addprefix --constraint ,$(CONSTRAINTS)) --editable '.[bench,demo,compare,cli,test,frameworks]'
	@touch $@

demo: $(STAMP) ## Train a detector for handwritten digits, evaluate and draw it (demo-output/)
	$(RUN) examples/digits/train.py --output demo-output --require-ap50 0.8

$(STAMP)-docs: $(STAMP)
	$(RUN) -m pip install --quiet --no-compile $(addprefix --constraint ,$(CONSTRAINTS)) --editable '.[docs]'
	@touch $@

docs: $(STAMP)-docs ## Build the site into build/site, with warnings as errors
	$(RUN) -m mkdocs build
	$(RUN) -m pytest tests/test_site.py

lint: $(STAMP) ## Style and types
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

test: lint test-compiled test-interpreted test-package ## Style, types and tests
	@tail -qn 1 $(addprefix $(VENV)/test-,$(addsuffix .log,compiled interpreted package))

# What is left out of it says pyproject.toml, among the markers.
QUICK ?= --quick
PYTEST = $(RUN) -m pytest -n $(PYTEST_JOBS) --dist loadgroup $(QUICK)

# What the other backends are held against elsewhere, the kernels are held against in processes of their own: compiled, on the
# virtual GPU of tests/virtual_gpu, for a target such as 80, 90 or 100 and in an order of warps drawn by a seed; and in
# Triton's interpreter, of which Triton is told when it is first imported. To compile takes longest, and so the quick tests
# are those that try inputs of every kind; of the interpreter what tells whether it still runs the kernels.
test_files = $(addprefix tests/test_,$(addsuffix .py,$(1)))
INTERPRETED_TESTS := tests/kernels/test_passes.py $(call test_files,golden figure1)
COMPILED_TESTS := tests/kernels \
	$(call test_files,golden figure1 edge_cases layouts groups groups_layouts determinism fuzz waiting monitor verify_kernels balance warm_up)
KERNEL_TESTS := $(COMPILED_TESTS) $(call test_files,theorems family calls framework framework_mistakes pair_functions \
	rank_sort rank_sort_module boxes module modes_functional modes_operators group group_training)
TARGET ?= 90
SEED ?= 0
export VIRTUAL_GPU_CACHE ?= $(CURDIR)/$(VENV)/virtual-gpu
test-compiled: $(STAMP)
	set -o pipefail; VIRTUAL_GPU=$(TARGET) VIRTUAL_GPU_SEED=$(SEED) $(PYTEST) \
		$(if $(QUICK),$(COMPILED_TESTS),$(KERNEL_TESTS)) | tee $(VENV)/test-compiled.log

test-interpreted: $(STAMP)
	set -o pipefail; TRITON_INTERPRET=1 $(PYTEST) \
		$(if $(QUICK),$(INTERPRETED_TESTS),$(KERNEL_TESTS)) | tee $(VENV)/test-interpreted.log

test-package: $(STAMP)
	set -o pipefail; $(PYTEST) --ignore=tests/kernels tests | tee $(VENV)/test-package.log

nightly: ## Style, types, all tests with all their cases, for more targets, and the fuzzer
	$(MAKE) test QUICK=
	$(MAKE) test-compiled QUICK= TARGET=80 SEED=1
	$(MAKE) test-compiled QUICK= TARGET=100 SEED=2
	$(MAKE) fuzz

# Another seed: make fuzz FUZZ_SEED=1; what is done is kept, so that it may be interrupted.
FUZZ_SEED ?= 0
FUZZ_CASES ?= 100000
fuzz: export FUZZ_KEEP := $(VENV)/fuzz-$(FUZZ_SEED)
fuzz: $(STAMP) ## Fuzz all losses with hostile input: 100,000 cases, ten minutes to an hour
	FUZZ_CASES=$(FUZZ_CASES) FUZZ_SEED=$(FUZZ_SEED) $(RUN) -m pytest -n $(PYTEST_JOBS) -k every_case tests/test_fuzz.py; \
		status=$$?; $(RUN) tests/fuzz.py --show $(FUZZ_KEEP); exit $$status

soak: $(STAMP) ## Take 100,000 steps of all losses, an hour, to see whether memory grows, and draw it
	SOAK_STEPS=100000 $(RUN) -m pytest tests/test_soak.py
	$(RUN) -m benchmarks.report

BENCH := cpu cpu-scale family memory step-share
bench: $(STAMP) ## Measure speed, scale and memory on the CPU (10 GB); write CSVs, plots and the tables of docs/
	rm -f $(BENCH:%=benchmarks/results/suite-%.csv)
	set -e; for preset in $(BENCH); do \
		$(RUN) -m benchmarks.run --preset $$preset --output benchmarks/results/suite-$$preset.csv; done
	$(RUN) -m benchmarks.report

experiments: $(STAMP) ## Train what is missing of docs/design/experiments.md, which two CPU cores do in 90 minutes, and rewrite it
	$(RUN) -m benchmarks.digits

verify: $(STAMP) ## Check every backend of this machine against the float64 reference
	$(VENV)/bin/alrp-triton verify

hub: $(STAMP) ## Assemble build/hub/, which Hugging Face's kernels library loads
	rm -rf build/hub
	$(RUN) tools/hub.py build/hub

# Built is what is committed, and at the time of that commit, so that the wheel is the same whoever builds it. An empty
# environment then has the wheel and what pip chooses for it.
FRESH := build/fresh
release: export SOURCE_DATE_EPOCH = $(shell git log -1 --format=%ct)
release: $(STAMP) hub ## Build dist/, check it, and check the wheel in an empty environment
	rm -rf dist build/source $(FRESH)
	mkdir -p build/source
	git archive HEAD | tar -x -C build/source
	$(RUN) -m pip install --quiet 'twine>=6'
	$(RUN) -m build --outdir dist build/source > build/release.log
	$(RUN) -m twine check --strict dist/*
	$(RUN) -m pytest -q tests/test_packaging.py
	$(PYTHON) -m venv $(FRESH)
	$(FRESH)/bin/pip install --quiet dist/*.whl
	cd $(FRESH) && bin/alrp-triton verify
	cd $(FRESH) && bin/python -X importtime -c 'import torch, alrp_triton' 2> import.log && grep -E '\| (torch|alrp_triton)$$' import.log
	$(FRESH)/bin/pip install --quiet 'kernels>=0.17'
	cd $(FRESH) && bin/python ../../tests/hub_beside.py ../hub
	ls -l dist

clean: ## Remove all that these targets make, .venv included
	rm -rf $(VENV) demo-output build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find alrp_triton kernels tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} +
