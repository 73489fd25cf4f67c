# Two commands on a fresh machine: `make demo` and `make test`.
# `make demo PROFILE=profiles/plain` shows all that Snakemake says.
PYTHON ?= python3
CORES ?= 2
VENV := .venv
BIN := $(VENV)/bin
UV_VERSION := 0.13.8
export UV_LINK_MODE ?= copy

# What users install: the core, or with the extra of a stage.
INSTALLS := . .[evaluate] .[prompts] .[report] .[retrain] .[workflow]

.PHONY: demo test test-slurm test-install bench lint lock schema install clean

demo: install
	$(BIN)/snakemake --cores $(CORES) $(if $(PROFILE),--workflow-profile $(PROFILE))

# A thread a worker: threads of several workers would wait for each other on the same cores.
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not slurm" -n $(CORES) --dist loadfile \
		--no-loadscope-reorder --durations=15

# The workflow through a SLURM of one node with a fake GPU, which comes and goes with the tests; needs
# root on Debian, and takes up to ten minutes. DRILLS chooses some, as pytest's -k.
test-slurm: install
	$(BIN)/python -m pytest -q -s -x -m slurm tests/test_slurm.py -k "$(DRILLS)"

# Each as a user gets it: a fresh environment, the package built, the versions of the lock.
# What an earlier build left would be packaged too.
test-install: install
	rm -rf build
	set -e; fresh=$$(mktemp -d); trap "rm -rf $$fresh" EXIT; for what in $(INSTALLS); do \
		$(BIN)/uv venv --quiet --clear --python $(BIN)/python $$fresh; \
		$(BIN)/uv pip install --quiet --link-mode hardlink --python $$fresh/bin/python \
			--constraint requirements.lock "$$what"; \
		$(BIN)/uv pip check --quiet --python $$fresh/bin/python; \
		(cd $$fresh && bin/ecodiff --help > help.txt && bin/python -c "import ecodiff; ecodiff.discover"); \
		echo "installed: $$what"; \
	done

bench: install
	$(BIN)/python benchmarks/learning.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/snakefmt --check Snakefile workflow
	$(BIN)/snakemake --lint

install: $(VENV)/.installed

# Versions and hashes come from the lock alone; uv only downloads faster than pip.
$(VENV)/.installed: requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed"'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv==$(UV_VERSION)
	$(BIN)/uv pip sync --quiet --python $(BIN)/python --require-hashes requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	touch $@

# Pin anew what pyproject.toml asks for, all extras included.
lock:
	$(BIN)/uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 \
		--generate-hashes --no-emit-index-url --no-annotate --no-header --upgrade --quiet \
		--output-file requirements.lock

schema: install
	$(BIN)/python -m ecodiff.config.run > workflow/schemas/config.schema.json

clean:
	rm -rf $(VENV) .snakemake build
