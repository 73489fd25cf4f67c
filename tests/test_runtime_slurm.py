import os
from pathlib import Path

import pytest
from imports import loaded_by

from ecodiff.runtime.slurm import left_behind, profile_mistake

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "words",
    [
        ["snakemake"],
        ["snakemake", "--workflow-profile", "profiles/slurm"],
        ["snakemake", "--workflow-profile=slurm", "tables"],
        ["snakemake", "--workflow-profile", "none"],
        ["snakemake", "--configfile", "profiles/slrum"],
    ],
)
def test_a_profile_that_is_there_is_right(words):
    assert profile_mistake(words, ROOT) is None


@pytest.mark.parametrize(
    "words", [["--workflow-profile=profiles/slrum"], ["--workflow-profile", "profiles/slrum"]]
)
def test_a_mistyped_profile_is_told_with_those_that_there_are(words):
    said = profile_mistake(["snakemake", *words], ROOT)
    assert said.startswith("--workflow-profile: there is no profile profiles/slrum; there are")
    assert "profiles/slurm" in said


def test_a_profile_of_the_users_own_counts(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    assert profile_mistake(["--workflow-profile", "mine"], ROOT) is None


def test_jobs_left_behind_are_asked_for_by_name(tmp_path, monkeypatch):
    squeue = tmp_path / "squeue"
    squeue.write_text('#!/bin/sh\n[ "$4" = mine ] && printf "12\\n13\\n"\n')
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert left_behind("mine") == ["12", "13"]
    assert left_behind("other") == []
    assert left_behind("") == []


def test_without_slurm_nothing_is_left_behind(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert left_behind("mine") == []


def test_importing_slurm_needs_no_torch():
    assert not {"torch", "diffusers"} & loaded_by("ecodiff.runtime.slurm")
