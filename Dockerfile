# The workflow and all its software, from the lock of versions and hashes:
#   docker build --tag ecodiff .
#   docker run --rm --volume ecodiff-results:/ecodiff/results ecodiff
# Other commands follow the image's name: `ecodiff snakemake --cores 8 --configfile config/paper.yaml`
# (with --gpus all), `ecodiff ecodiff --help`.
FROM python:3.11-slim

WORKDIR /ecodiff
# Before the project's own files, so that their edits install nothing anew.
COPY requirements.lock ./
RUN pip install --no-cache-dir --require-hashes --requirement requirements.lock

COPY pyproject.toml README.md LICENSE Snakefile ./
COPY ecodiff ecodiff
COPY snakemake_logger_plugin_ecodiff snakemake_logger_plugin_ecodiff
RUN pip install --no-cache-dir --no-deps --no-build-isolation --editable .
COPY workflow workflow
COPY config config
COPY profiles profiles
COPY resources resources

RUN useradd --create-home ecodiff && mkdir results && chown ecodiff . results
USER ecodiff
CMD ["snakemake", "--cores", "2"]
