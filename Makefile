PROFILE ?= default
COHORT ?= data/synthetic$(if $(filter smoke,$(PROFILE)),-small)
PYTHON ?= python3
BIN := .venv/$(if $(filter Windows_NT,$(OS)),Scripts,bin)

# What a user has set for other work does not reach this one.
unexport PYTHONPATH PYTHONDONTWRITEBYTECODE PIP_USER PIP_TARGET PIP_PREFIX MPLBACKEND JUPYTER_PATH
export PYTHONNOUSERSITE := 1

.PHONY: figures test notebooks bench soak
.DELETE_ON_ERROR:

# pip would compile all modules, one after the other; Python compiles those that are imported.
.venv/.installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-compile --requirement requirements.txt
	touch $@

.venv/.tested: .venv/.installed
	$(BIN)/pip install --quiet --no-compile --editable '.[test,diffusion]'
	touch $@

# The table is written last: where it is, the cohort is whole.
data/synthetic/unrestricted_behavioral.csv: | .venv/.installed
	$(BIN)/python -m brainsex synthesize data/synthetic

data/synthetic-small/unrestricted_behavioral.csv: | .venv/.installed
	$(BIN)/python -m brainsex synthesize data/synthetic-small --subjects 16 --spacing 5

# A cohort of one's own must exist; only these two are written when absent.
NEEDS := $(if $(filter data/synthetic data/synthetic-small,$(COHORT)),$(COHORT)/unrestricted_behavioral.csv)

figures: .venv/.installed $(NEEDS)
	$(BIN)/python notebooks/run.py --cohort $(COHORT) --profile $(PROFILE) $(if $(TABLE),--table $(TABLE))

notebooks: .venv/.installed data/synthetic/unrestricted_behavioral.csv
	$(BIN)/python notebooks/run.py --in-place
	$(BIN)/python notebooks/tour.py

# As many tests at once as there are cores, each on one.
test: export OMP_NUM_THREADS = 1
test: .venv/.tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pytest --numprocesses auto --dist worksteal

bench: .venv/.tested
	$(BIN)/python -m tests.benchmarks

soak: .venv/.tested
	$(BIN)/pytest -m soak
