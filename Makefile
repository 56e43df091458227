# The two commands: `make reproduce` and `make test`. Everything else is a convenience.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
UV = $(PY) -m uv pip install --python $(PY)
PACKAGES := $(VENV)/.packages
STAMP := $(VENV)/.installed
DIRECTORIES := common scala hourglass_swag dvt sit uvc
# Extras of pyproject.toml, and the address of an index with another torch, e.g. the one without CUDA.
EXTRAS ?= dev
TORCH_INDEX ?=
# Extra words for the main job, e.g. `make reproduce PAPER=hourglass_swag FORCE=1 ARGS="--columns gmacs"`.
PAPER ?=
ARGS ?=
OUT ?= report/gpu
BUDGET_S ?= 480
SEEDS ?= 5
MINUTES ?= 60
# Threads that wait must not spin: on a machine shared with anything else, spinning made small networks 50 times slower.
export OMP_WAIT_POLICY ?= passive

.PHONY: help install dependencies operators reproduce test fuzz check format docs evidence bench gpu clean

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(STAMP)  ## create .venv with the pinned versions and this project (editable); EXTRAS names what is optional

# The packages alone, without this project: a change of the source does not install them again.
dependencies: $(PACKAGES)

$(PACKAGES): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; (3, 11) <= v < (3, 14) or sys.exit(f"LeanViT needs Python 3.11 to 3.13, but $(PYTHON) is {v.major}.{v.minor}. Name another: make install PYTHON=python3.12")'
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt uv
	$(UV) --compile-bytecode -c constraints.txt -r pyproject.toml $(addprefix --extra ,$(EXTRAS)) \
		$(if $(TORCH_INDEX),--index $(TORCH_INDEX) --index-strategy unsafe-best-match)
	@touch $@

$(STAMP): $(PACKAGES)
	$(UV) --no-deps -c constraints.txt -e .
	@$(PY) -m compileall -q $(DIRECTORIES)
	@touch $@

operators: install  ## compile the optional operators of ACT and SMYRF (a C++ compiler; nvcc for those on GPUs)
	$(UV) --no-deps --no-build-isolation ./hourglass_swag/models/ops -e ./hourglass_swag/models/ops/tome

reproduce: install  ## the main job: the ledger of published tables, and a live run of each paper
	$(PY) -m common.reproduce $(PAPER) --live --report report $(if $(FORCE),--force) $(ARGS)

test: install  ## the test suite (CPU; GPU tests skip themselves)
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist worksteal $(ARGS)

fuzz: install  ## odd and damaged files for every reader, MINUTES of them; what they find that is not a named error
	OMP_NUM_THREADS=1 $(PY) -m common.tests.fuzz --minutes $(MINUTES) $(ARGS)

check: install  ## lint, format and types, changing nothing; lines of Python without tests
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/basedpyright
	@count() { git ls-files "$$1*.py" | grep -vE "/tests/|$$2" | tr '\n' '\0' | xargs -0 cat | wc -l; }; \
	echo "lines of Python without tests: $$(count '' '^$$') in all, $$(count common/ledger/ '^$$') in common/ledger/," \
		"$$(count common/ '^common/(ledger|hosts)/') in the rest of common/ without hosts/"

format: install  ## apply the formatter and the safe fixes
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

docs: install  ## render the tables inside the READMEs from tables/ and results/
	$(PY) -m common.docs

evidence: install  ## each paper's claims on real images, SEEDS networks a side (hours; goes on where it stopped)
	$(PY) -m common.evidence $(PAPER) --seeds $(SEEDS) $(ARGS)

bench: install  ## speed of each method against its dense backbone on this machine
	$(PY) -m common.reproduce $(PAPER) --columns fps,throughput_ips $(ARGS)

gpu:  ## on a GPU machine, with its own interpreter: GPU tests and speed rows within BUDGET_S, one JSON file in OUT
	PYTHONPATH=. $(PYTHON) -m common.gpu --output $(OUT) --budget-s $(BUDGET_S) $(ARGS)

clean:  ## remove what the commands above made, except results/
	rm -rf $(VENV) .cache report build *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
