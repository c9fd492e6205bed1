# make demo | results | mvtec | visa | test | test-all | gpu-check | lint | notebooks | peers | lab | clean; PYTHON=python3.12 chooses the interpreter of a new environment
PYTHON ?= python3
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export OMP_NUM_THREADS ?= 2

.PHONY: demo results mvtec visa test test-all gpu-check lint notebooks peers lab clean check-notebooks check-studies
# From a fresh clone to a table and a picture; only what a run needs is installed. The light decoder and batches of 8 are for the clock.
DEMO := -p detector=patchcore,rd4ad,mddnet -p seed=0,1 -p size=192 -p batch=8 -p epochs=6 -p options=mddnet.decoder=light
demo: .venv/.demo
	OMP_NUM_THREADS=1 mdd_bench sweep benchmark $(DEMO) --out results/demo

# What results/ shows and does not have yet (results/plan.yaml). FLAGS=--dry-run says what that is and how long it takes. REAL=folder names the real
# images and WEIGHTS=file an ImageNet ResNet-18, once; without them, what needs them is left out.
results: .venv/.demo
	$(if $(REAL),ls -d "$(REAL)" > /dev/null; ln -sfn "$(abspath $(REAL))" real)
	$(if $(WEIGHTS),ls -d "$(WEIGHTS)" > /dev/null; ln -sfn "$(abspath $(WEIGHTS))" resnet18.pth)
	OMP_NUM_THREADS=1 mdd_bench make results/plan.yaml $(FLAGS)

# Our numbers beside published ones: the backbone of RD4AD and PatchCore, 256 pixels, whole recipes; hours on a GPU. MVTEC or VISA names the folder
# of the data. Without it they are fetched, once their licence is agreed to (ACCEPT_LICENCE=1). FLAGS are further flags of the sweep; a -p
# among them, e.g. "-p seed=0,1,2", stands for the one here.
PUBLISHED := detector=patchcore,rd4ad,simplenet,mddnet weights=pretrained size=256 epochs=none seed=0 protocols=exact,ader
published = $(foreach p,$(PUBLISHED),$(if $(findstring -p $(firstword $(subst =, ,$(p)))=,$(FLAGS)),,-p $(p)))
fetch = mdd_bench download $(1) $(if $(ACCEPT_LICENCE),--accept-licence,|| { echo 'with make: ACCEPT_LICENCE=1'; exit 1; })
mvtec: .venv/.demo
	$(if $(MVTEC),,$(call fetch,mvtec-ad))
	mdd_bench sweep benchmark -p data="$(or $(MVTEC),data/mvtec-ad)" $(published) --out results/mvtec-ad $(FLAGS)

visa: .venv/.demo
	$(if $(VISA),,$(call fetch,visa))
	mdd_bench sweep benchmark -p data="$(or $(VISA),data/visa)" $(published) --out results/visa $(FLAGS)

test: .venv/.installed lint check-notebooks
	OMP_NUM_THREADS=1 pytest -q -n 2 -m "not slow"

test-all: .venv/.installed lint check-notebooks check-studies
	OMP_NUM_THREADS=1 pytest -q -n 2

# What only a GPU can show, in under 8 minutes; it needs what a run needs, and no environment of ours. The report: $(GPU_OUT)/gpu_check.md
GPU_OUT ?= results/gpu
gpu-check:
	PYTHONUNBUFFERED=1 python3 tests/gpu_check.py --out $(GPU_OUT)

# The style of notebooks, tests and hand-written files (pyproject.toml says which rules); the library is what the notebooks are.
lint: .venv/.installed
	ruff check nbs tests setup.py mdd_bench/__init__.py

# Every library notebook runs from top to bottom (one thread per worker, or they fight for the cores).
check-notebooks: .venv/.installed
	OMP_NUM_THREADS=1 nbdev_test --n_workers 2 --do_print --skip_folder_re '^[_.]|^studies$$'

# Every study as its notebook stands, at smoke size; each makes its runs on all cores, so one comes after the other.
check-studies: .venv/.installed
	OMP_NUM_THREADS=1 nbdev_test --n_workers 1 --do_print --path nbs/studies

# Export the library, write the parameter cells of the studies, execute what is out of date, clean, and stamp each notebook with the hash of its code.
notebooks: .venv/.installed
	nbdev_export
	python tests/notebooks.py

# What the studies `speed`, `coreset` and `parity` compare with, in an environment of its own, several gigabytes; adeval uses np.trapz, which numpy 2.4 has no longer.
peers:
	test -x .venv-peers/bin/python || $(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check 'anomalib>=2.7,<3' 'adeval>=1.1,<2' 'numpy<2.4'

lab: .venv/.installed
	jupyter lab nbs

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .hypothesis .last_checked nbs/_text

# A changed settings.ini updates the environment; otherwise it is used as it is. pip would compile every file of every package, most of
# them for nothing; a module that is used is compiled on its first import.
unexport PYTHONDONTWRITEBYTECODE
INSTALLED_FROM := settings.ini setup.py pyproject.toml
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --no-compile

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mdd_bench needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv

.venv/.demo: $(INSTALLED_FROM) | .venv/bin/python
	$(INSTALL) -e '.[lite0]'
	touch $@

.venv/.installed: $(INSTALLED_FROM) | .venv/bin/python
	$(INSTALL) --quiet -e '.[dev]'
	touch $@ .venv/.demo
