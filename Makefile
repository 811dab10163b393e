# Two commands do everything on a machine with Python and make: `make demo` and `make test`. `make help` lists the rest.
#
# The environment lies in .venv and is brought up to date only when pyproject.toml or constraints.txt change. PyTorch is
# installed first and on its own, at the version that constraints.txt pins, so that nothing after it can swap the build
# that pip found (CPU or CUDA) for another; to choose one, point pip at it with PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS.
#
# TORCH and LIGHTNING choose other versions than the pinned ones, in an environment of their own: `make test TORCH=2.6.0`
# lies in .venv-torch-2.6.0. PYTHON is the interpreter that an environment is made with; VENV names another environment.

PYTHON ?= python3
TORCH ?=
LIGHTNING ?=
VENV ?= .venv$(if $(TORCH),-torch-$(TORCH))$(if $(LIGHTNING),-lightning-$(LIGHTNING))
WORKERS ?= 2
LOGDIR ?= lightning_logs
# Passed on: `make demo DEMO_ARGS="--weighting MGDA"`, `make test TEST_ARGS="-k MGDA"`.
DEMO_ARGS ?=
TEST_ARGS ?=
# `make mutants MUTANTS=gradients/`: those alone whose description or file has this in it.
MUTANTS ?=
# `make bench-torchjd BENCH_ARGS=--quick`.
BENCH_ARGS ?=
RESULTS ?= benchmarks/results

BIN := $(VENV)/bin
CONSTRAINTS := $(if $(TORCH)$(LIGHTNING),$(VENV)/constraints.txt,constraints.txt)
PIP := $(BIN)/python -m pip --disable-pip-version-check
# $(call install,EXTRA): the package, editable, with one of its extras.
install = $(PIP) install --quiet --constraint $(CONSTRAINTS) --editable ".[$(1)]"

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo test test-slow check lint doctest docs notebooks fmt env hooks clean distclean
.PHONY: bench bench-step bench-floor bench-torchjd bench-methods bench-solvers bench-toy bench-gpu
.PHONY: bench-methods-work bench-gradnorm-toy bench-physics bench-units mutants

help: ## List the targets.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-19s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.examples ## Train the quickstart on its embedded data; says how to open TensorBoard.
	env -u LIGHTNING_MTL_DATA $(BIN)/python examples/quickstart.py --logdir $(LOGDIR) $(DEMO_ARGS)

# One thread a process: the tests' models are too small to share, and WORKERS processes run side by side.
test test-slow doctest: export OMP_NUM_THREADS = 1

test: $(VENV)/.dev ## Run the tests but the slow ones; TORCH=2.6.0 LIGHTNING=2.6.0 PYTHON=python3.10: with these versions.
	$(BIN)/python -m pytest -n $(WORKERS) -m "not slow" $(TEST_ARGS)

test-slow: $(VENV)/.dev ## Run the slow tests, in less than twenty minutes.
	$(BIN)/python -m pytest -n $(WORKERS) -m slow $(TEST_ARGS)

check: lint doctest test ## What a reviewer runs: format, lint, types, import layers, doctests, tests.

lint: $(VENV)/.dev ## Format, lint, types and import layers; changes nothing.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

doctest: $(VENV)/.dev ## Run the examples in the docstrings.
	$(BIN)/python -m pytest --doctest-modules lightning_mtl

docs: $(VENV)/.docs ## Build the documentation in docs/_build/html, warnings being errors. Python 3.11 or later.
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html

notebooks: $(VENV)/.dev ## Execute the notebooks and keep their tables and pictures in them.
	cd docs/notebooks && $(abspath $(BIN))/jupyter execute --inplace *.ipynb

mutants: $(VENV)/.dev ## Put slips into copies of the package; list those that no test notices. A quarter of an hour.
	$(BIN)/python -m tests.mutants --workers $(WORKERS) "$(MUTANTS)"

fmt: $(VENV)/.dev ## Format the code and mend what the linter can.
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

# Each writes its figures, with the machine, the versions and the date, to $(RESULTS); BENCH_ARGS go to all of them.
bench: bench-step bench-floor bench-torchjd bench-methods bench-solvers ## All benchmarks but the GPU's: two to three hours.
bench: bench-toy bench-gradnorm-toy bench-methods-work bench-units

bench-step: $(VENV)/.dev ## The cost of a step against plain Lightning.
	$(BIN)/python -m benchmarks.step_time --json $(RESULTS)/step_time.json $(BENCH_ARGS)

bench-floor: $(VENV)/.dev ## A step over plain training or the cost of rows as tasks, model and batch grow.
	$(BIN)/python -m benchmarks.floor --json $(RESULTS)/floor.json --png $(RESULTS)/floor.png $(BENCH_ARGS)

bench-torchjd: $(VENV)/.bench ## A step and its memory against TorchJD's.
	$(BIN)/python -m benchmarks.against_torchjd --json $(RESULTS)/torchjd.json --png $(RESULTS)/torchjd.png $(BENCH_ARGS)

bench-methods: $(VENV)/.dev ## The cost of a step with every method.
	$(BIN)/python -m benchmarks.methods --json $(RESULTS)/methods.json $(BENCH_ARGS)

bench-solvers: $(VENV)/.bench ## A solve of each small convex problem, beside TorchJD's.
	$(BIN)/python -m benchmarks.solvers --json $(RESULTS)/solvers.json $(BENCH_ARGS)

bench-toy: $(VENV)/.dev ## Every method on the toy Pareto problem.
	$(BIN)/python -m benchmarks.toy_pareto --full --json $(RESULTS)/toy_pareto.json --png $(RESULTS)/toy_pareto.png $(BENCH_ARGS)

bench-gpu: $(VENV)/.bench ## The contract, NCCL, waits and step times on a GPU.
	$(BIN)/python -m benchmarks.on_gpu --json $(RESULTS)/gpu.json $(BENCH_ARGS)

bench-methods-work: $(VENV)/.dev ## Train with every named method on real data: which differ from equal weights?
	$(BIN)/python -m benchmarks.do_methods_work $(BENCH_ARGS)

bench-physics: $(VENV)/.dev ## Physics-informed networks as the boundary's loss is scaled: an hour; goes on where it was stopped.
	$(BIN)/python -m benchmarks.physics --json $(RESULTS)/physics.json --png $(RESULTS)/physics.png $(BENCH_ARGS)

# DATA="rf1 school qm9" BENCH_ARGS="--data-dir FOLDER": the other data; rf1 and school are files, qm9 a package.
DATA ?= quickstart
bench-units: $(VENV)/.dev ## Unlike units of the losses, and random weights: half an hour a data set; goes on where it was stopped.
	$(BIN)/python -m benchmarks.units --data $(DATA) --results $(RESULTS) $(BENCH_ARGS)

bench-gradnorm-toy: $(VENV)/.dev ## Train GradNorm's toy; the paper's claims beside the outcome.
	$(BIN)/python -m benchmarks.gradnorm_toy $(BENCH_ARGS)

env: $(VENV)/.dev ## Make the environment with the tools for developers.

hooks: $(VENV)/.dev ## Have git run the quick checks before each commit.
	$(BIN)/pre-commit install

clean: ## Remove caches and built files; keeps the environment and the logs.
	rm -rf .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis build dist docs/_build docs/generated
	find . -path './.venv*' -prune -o -type d -name __pycache__ -exec rm -rf {} +

distclean: clean ## Remove the environments, too.
	rm -rf $(VENV) .venv-torch-* .venv-lightning-*

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# Each torch asks for a sympy of its own: 2.6 for exactly 1.13.1.
$(VENV)/constraints.txt: constraints.txt | $(BIN)/python
	sed -E $(if $(TORCH),-e '/^(torch|sympy)==/d') $(if $(LIGHTNING),-e '/^(pytorch-)?lightning==/d') constraints.txt > $@
	printf '%s\n' $(if $(TORCH),torch==$(TORCH)) $(if $(LIGHTNING),lightning==$(LIGHTNING) pytorch-lightning==$(LIGHTNING)) >> $@

$(VENV)/.torch: $(CONSTRAINTS) | $(BIN)/python
	$(PIP) install --quiet --constraint $(CONSTRAINTS) torch
	@touch $@

$(VENV)/.examples: $(VENV)/.torch pyproject.toml
	$(call install,examples)
	@touch $@

# `dev` contains `examples`.
$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(call install,dev)
	@touch $(VENV)/.examples $@

$(VENV)/.docs: $(VENV)/.torch pyproject.toml
	$(call install,docs)
	@touch $@

$(VENV)/.bench: $(VENV)/.dev
	$(call install,bench)
	@touch $@
