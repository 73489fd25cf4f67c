"""What is promised to those who install, cite or copy this project."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import pkgutil
import re
import subprocess
import sys
from importlib.metadata import packages_distributions

import pytest
import yaml
from imports import PROJECT, ROOT, closure, normal, run_with_only
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import ecodiff
from ecodiff.config.run import Config, load_config
from ecodiff.runtime.extras import EXTRAS

STAGES = tuple(EXTRAS)
OPTIONAL = {"torchao"}  # in no extra: where it is installed, each import of diffusers takes it
EXTRA = PROJECT["optional-dependencies"]
# Every module of some rooms, and the libraries that were missing.
IMPORT_ALL = """
import importlib, pkgutil, ecodiff
missing = set()
for module in pkgutil.walk_packages(ecodiff.__path__, "ecodiff."):
    if module.name.endswith("__main__"):
        continue
    try:
        importlib.import_module(module.name)
    except ModuleNotFoundError as error:
        missing.add(f"{module.name.split('.')[1]}:{error.name.split('.')[0]}")
print(*sorted(missing))
"""
# The README's lines, on a tiny pipeline.
PRUNE = """
import tempfile
import ecodiff
from ecodiff.config.sections import MaskSettings
from tiny import CALLS, tiny_sdxl

FEW = MaskSettings(iterations=2, batch=2)
pipe = tiny_sdxl()
pipe.set_progress_bar_config(disable=True)
structures = ecodiff.discover(pipe)
prompts = ["a red square", "a blue ring"]
mask = ecodiff.learn_mask(pipe, prompts, sparsity=0.2, call=CALLS["sdxl"], settings=FEW)
ecodiff.prune(pipe, mask)
with tempfile.TemporaryDirectory() as folder:
    ecodiff.save(pipe, folder)
    pipe = ecodiff.load(folder)
print(pipe(prompts, **CALLS["sdxl"]).images[0].size)
"""


def test_stages_with_an_extra_are_those_of_the_package():
    rooms = {module.name for module in pkgutil.iter_modules(ecodiff.__path__)}
    assert set(STAGES) <= rooms
    assert set(STAGES) <= EXTRA.keys()


@pytest.mark.parametrize("extra", STAGES)
def test_users_are_told_of_each_library_of_an_extra(extra):
    owners = packages_distributions()
    told = {normal(owner) for library in EXTRAS[extra] for owner in owners[library]}
    assert told == {normal(Requirement(text).name) for text in EXTRA[extra]}


def test_the_workflow_has_all_stages():
    assert closure(f"ecodiff[{','.join(STAGES)}]") < closure("ecodiff[workflow]")


def test_each_library_that_is_imported_is_asked_for_by_name():
    """What comes along with another library may stay away with its next version."""
    imported = set()
    for path in (ROOT / "ecodiff").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module.partition(".")[0])
    asked = [*PROJECT["dependencies"], *(text for stage in STAGES for text in EXTRA[stage])]
    names = {normal(Requirement(text).name) for text in asked}
    owners = packages_distributions()
    libraries = imported - sys.stdlib_module_names - OPTIONAL - {"ecodiff"}
    assert not {name for name in libraries if not names & {*map(normal, owners.get(name, []))}}


@pytest.mark.slow
@pytest.mark.parametrize("extra", [None, *STAGES])
def test_all_but_other_extras_is_imported_with_one_extra(extra):
    done = run_with_only(IMPORT_ALL, f"ecodiff[{extra}]" if extra else "ecodiff")
    assert done.returncode == 0, done.stderr
    missing = [entry.split(":") for entry in done.stdout.split()]
    others = {library for other in STAGES if other != extra for library in EXTRAS[other]}
    assert {library for _, library in missing} <= others
    # The toys are made, not used, with what several stages need.
    assert {room for room, _ in missing} <= {*STAGES, "toys"} - {extra}


@pytest.mark.slow
def test_what_is_hidden_is_not_installed():
    code = """
import importlib.metadata, importlib.util
assert importlib.util.find_spec("peft") is None
try:
    importlib.metadata.version("peft")
except importlib.metadata.PackageNotFoundError:
    print(importlib.metadata.version("pydantic"))
"""
    done = run_with_only(code, "pydantic")
    assert done.stdout.strip() == importlib.metadata.version("pydantic"), done.stderr


@pytest.mark.slow
def test_a_model_is_pruned_and_drawn_with_the_core_alone():
    done = run_with_only(PRUNE, "ecodiff")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "(64, 64)"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("extra", "tests"),
    [
        ("evaluate", ["test_evaluate_quality.py"]),
        ("report", ["test_report_tables.py", "test_report_figures.py"]),
        ("retrain", ["test_retrain.py"]),
    ],
)
def test_a_stage_works_with_its_extra_alone(extra, tests):
    words = ["-q", "-p", "no:cacheprovider", *(str(ROOT / "tests" / test) for test in tests)]
    code = f"import pytest; raise SystemExit(pytest.main({words}))"
    done = run_with_only(code, f"ecodiff[{extra}]", "pytest")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_licence_is_apache_2():
    text = (ROOT / "LICENSE").read_text()
    assert PROJECT["license"] == "Apache-2.0"
    assert PROJECT["license-files"] == ["LICENSE"]
    assert re.search(r"Apache License\n +Version 2.0, January 2004", text)
    assert "END OF TERMS AND CONDITIONS" in text


def test_citation_package_and_installation_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == ecodiff.__version__
    assert citation["license"] == PROJECT["license"]
    assert citation["authors"] == PROJECT["authors"]
    assert citation["preferred-citation"]["url"] == PROJECT["urls"]["Paper"]
    assert "version" in PROJECT["dynamic"]


def test_the_changelog_ends_with_this_version_or_what_follows_it():
    titles = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    released = [title for title in titles if title != "Unreleased"]
    assert released[0] == ecodiff.__version__
    assert "Unreleased" not in titles[1:]


def test_the_lock_holds_everything_that_is_asked_for_at_versions_that_are():
    lock = dict(re.findall(r"^([\w.-]+)==([^ ;]+)", (ROOT / "requirements.lock").read_text(), re.M))
    asked = [*PROJECT["dependencies"], *(text for extra in EXTRA.values() for text in extra)]
    for requirement in map(Requirement, asked):
        name = normal(requirement.name)
        assert name == PROJECT["name"] or lock[name] in requirement.specifier, name


def test_condas_python_is_one_that_the_project_takes():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    python, pip = environment["dependencies"]
    assert pip == "pip"
    version = next(iter(Requirement(python.replace("=", "==")).specifier)).version
    assert SpecifierSet(PROJECT["requires-python"]).contains(version)


def test_condas_second_step_finds_lock_and_project_from_any_folder(tmp_path):
    """Snakemake copies environment.yml elsewhere, and runs the script where it was started."""
    shim = tmp_path / "python"
    shim.write_text(
        """#!/bin/sh
for word in "$@"; do case $word in /*) ls "$word" > /dev/null || exit 1; esac; done
echo "$@" >> said
"""
    )
    shim.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["bash", str(ROOT / "environment.post-deploy.sh")]
    environment["ECODIFF_PROJECT"] = str(ROOT)
    subprocess.run(command, check=True, cwd=tmp_path, env=environment)
    first, second = (tmp_path / "said").read_text().splitlines()
    assert first.split()[2:] == ["install", "--require-hashes", "-r", f"{ROOT}/requirements.lock"]
    assert second.split()[2:] == ["install", "--no-deps", str(ROOT)]


def copied():
    """The sources of the Dockerfile's COPY lines."""
    lines = re.findall(r"^COPY (.+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    return [source for line in lines for source in line.split()[:-1]]


def test_an_image_copies_what_there_is_and_what_is_not_ignored():
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    sent = {line.removeprefix("!") for line in ignore if line.startswith("!")}
    assert "*" in ignore
    assert sent == {*copied()}
    assert all((ROOT / source).exists() for source in copied())


def test_an_image_holds_what_the_workflow_reads():
    needed = {"Snakefile", "workflow", "config", "profiles", "resources", "ecodiff"}
    # What pyproject.toml names is read while the package is installed.
    assert {*copied()} >= needed | {"pyproject.toml", PROJECT["readme"], *PROJECT["license-files"]}


def test_an_image_installs_the_lock_by_hash_and_runs_without_root():
    steps = (ROOT / "Dockerfile").read_text().splitlines()
    installs = [step for step in steps if "pip install" in step]
    assert "--require-hashes --requirement requirements.lock" in installs[0]
    assert all("--no-deps" in step for step in installs[1:])
    version = next(step for step in steps if step.startswith("FROM")).partition("python:")[2]
    assert version.startswith("3.11-")  # what the lock was made for
    assert [step for step in steps if step.startswith("USER")][-1] != "USER root"


CONFIG_README = (ROOT / "config/README.md").read_text()


def test_the_configs_readme_names_each_section_and_each_file():
    assert [*Config.model_fields] == re.findall(r"^\| `(\w+)` \|", CONFIG_README, re.MULTILINE)
    files = re.findall(r"^\| `([\w-]+\.yaml)` \|", CONFIG_README, re.MULTILINE)
    assert {*files} == {path.name for path in (ROOT / "config").glob("*.yaml")}


def test_the_example_of_the_configs_readme_is_a_run():
    example = CONFIG_README.split("## Your own model")[1]
    lines = [line for line in example.splitlines() if line.startswith("    ")]
    assert load_config(yaml.safe_load("\n".join(lines))).run == "mine"


def test_the_catalog_is_told_what_the_workflow_does():
    usage = yaml.safe_load((ROOT / ".snakemake-workflow-catalog.yml").read_text())["usage"]
    rules = [path.read_text() for path in (ROOT / "workflow/rules").glob("*.smk")]
    has_report = any("report(" in text for text in rules)
    assert usage["report"] == has_report
    deployment = usage["software-stack-deployment"]
    assert deployment["conda"] == any("conda:" in text for text in rules)
    assert deployment["apptainer"] == any("container:" in text for text in rules)
