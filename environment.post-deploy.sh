#!/usr/bin/env bash
# Snakemake runs this in the conda environment that it has made of a copy of environment.yml; the
# Snakefile says where the project lies.
set -euo pipefail
python -m pip install --require-hashes -r "$ECODIFF_PROJECT/requirements.lock"
python -m pip install --no-deps "$ECODIFF_PROJECT"
