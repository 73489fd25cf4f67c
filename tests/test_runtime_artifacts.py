import json
import subprocess

import pytest
from imports import loaded_by

from ecodiff.runtime import artifacts
from ecodiff.runtime.artifacts import atomic, code_hash, write_json, write_manifest, write_text


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of three modules, the first of which uses the second."""
    code_hash.cache_clear()
    monkeypatch.setattr(artifacts, "PACKAGE", tmp_path)
    (tmp_path / "stage").mkdir()
    (tmp_path / "stage/__init__.py").write_text("")
    (tmp_path / "stage/work.py").write_text("def f():\n    from ecodiff.used import g\n")
    (tmp_path / "used.py").write_text("import ecodiff.config\ng = 1\n")
    (tmp_path / "other.py").write_text("h = 1\n")
    (tmp_path / "config.py").write_text("x = 1\n")
    yield tmp_path
    code_hash.cache_clear()


def rehashed(package, file, text):
    before = code_hash("stage")
    (package / file).write_text(text)
    code_hash.cache_clear()
    return before != code_hash("stage")


@pytest.mark.parametrize("file", ["stage/work.py", "used.py", "stage/__init__.py"])
def test_a_change_of_what_a_stage_imports_changes_its_hash(package, file):
    assert rehashed(package, file, (package / file).read_text() + "more = 2\n")


@pytest.mark.parametrize("file", ["other.py", "config.py"])
def test_a_change_elsewhere_does_not(package, file):
    assert not rehashed(package, file, "changed = 3\n")


def test_comments_and_layout_do_not_count(package):
    assert not rehashed(package, "used.py", "# why\nimport ecodiff.config\n\n\ng   = 1\n")
    assert not rehashed(package, "used.py", '"""What."""\nimport ecodiff.config\ng = 1\n')


def test_an_unknown_stage_is_an_error():
    with pytest.raises(ModuleNotFoundError, match="nothing"):
        code_hash("nothing")


def test_pruning_hashes_reach_structures_through_imports():
    names = {path.name for path in artifacts._sources("prune")}
    assert {"structures.py", "cut.py"} <= names
    assert not {"quality.py", "config.py"} & names


def test_a_file_appears_when_it_is_whole(tmp_path):
    with atomic(tmp_path / "deep/file") as scratch:
        scratch.write_text("x")
        assert not (tmp_path / "deep/file").exists()
    assert (tmp_path / "deep/file").read_text() == "x"


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_after_an_error_the_old_one_stays_and_nothing_else(tmp_path, kind):
    target = tmp_path / "target"
    inner = target if kind == "file" else target / "inner"
    inner.parent.mkdir(exist_ok=True)
    inner.write_text("old")
    with pytest.raises(RuntimeError), atomic(target) as scratch:
        scratch.mkdir() if kind == "folder" else scratch.write_text("half")
        raise RuntimeError
    assert inner.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    (tmp_path / "f").mkdir()
    (tmp_path / "f/stale").write_text("")
    with atomic(tmp_path / "f") as scratch:
        scratch.mkdir()
        (scratch / "new").write_text("")
    assert [path.name for path in (tmp_path / "f").iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_json_ends_in_a_newline(tmp_path):
    write_json(tmp_path / "a.json", {"a": None})
    assert (tmp_path / "a.json").read_text() == '{\n  "a": null\n}\n'


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_json_is_never_written(tmp_path, value):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"a": value})
    assert not list(tmp_path.iterdir())


def test_a_manifest_says_how_an_output_came_about(tmp_path):
    write_text(tmp_path / "out.csv", "")
    write_manifest(tmp_path / "out.csv", "prompts", {"seed": 7})
    manifest = json.loads((tmp_path / "out.csv.manifest.json").read_text())
    assert manifest["stage"] == "prompts"
    assert manifest["settings"] == {"seed": 7}
    assert manifest["code"]["hash"] == code_hash("prompts")
    assert {"python", "torch", "diffusers"} <= manifest["versions"].keys()
    assert manifest["device"] and manifest["written"]


def git(folder, *words):
    identity = ["-c", "user.name=n", "-c", "user.email=e"]
    subprocess.run(["git", "-C", str(folder), *identity, *words], check=True, capture_output=True)


def test_the_commit_says_when_files_differ_from_it(tmp_path, monkeypatch):
    monkeypatch.setattr(artifacts, "PACKAGE", tmp_path)
    (tmp_path / "a").write_text("1")
    git(tmp_path, "init")
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "-m", "x")
    commit = artifacts.git_commit()
    assert commit and len(commit) == 40
    (tmp_path / "a").write_text("2")
    assert artifacts.git_commit() == commit + "+"


def test_outside_a_repository_there_is_no_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(artifacts, "PACKAGE", tmp_path)
    assert artifacts.git_commit() is None


def test_importing_artifacts_needs_no_torch():
    assert not {"torch", "diffusers"} & loaded_by("ecodiff.runtime.artifacts")
