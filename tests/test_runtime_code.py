import subprocess

import pytest
from imports import loaded_by

from ecodiff.runtime import code
from ecodiff.runtime.code import code_hash


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of three modules, the first of which uses the second."""
    code_hash.cache_clear()
    monkeypatch.setattr(code, "PACKAGE", tmp_path)
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


def test_a_template_beside_a_module_counts(package):
    (package / "stage/templates").mkdir()
    assert rehashed(package, "stage/templates/page.html", "<p>")


def test_an_unknown_stage_is_an_error():
    with pytest.raises(ModuleNotFoundError, match="nothing"):
        code_hash("nothing")


def test_pruning_hashes_reach_structures_through_imports():
    names = {path.name for path in code._sources("prune")}
    assert {"structures.py", "cut.py"} <= names
    assert not {"quality.py", "config.py"} & names


def git(folder, *words):
    identity = ["-c", "user.name=n", "-c", "user.email=e"]
    subprocess.run(["git", "-C", str(folder), *identity, *words], check=True, capture_output=True)


def test_the_commit_says_when_files_differ_from_it(tmp_path, monkeypatch):
    monkeypatch.setattr(code, "PACKAGE", tmp_path)
    (tmp_path / "a").write_text("1")
    git(tmp_path, "init")
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "-m", "x")
    commit = code.git_commit()
    assert commit and len(commit) == 40
    (tmp_path / "a").write_text("2")
    assert code.git_commit() == commit + "+"


def test_outside_a_repository_there_is_no_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(code, "PACKAGE", tmp_path)
    assert code.git_commit() is None


def test_importing_code_needs_no_torch():
    assert not {"torch", "diffusers"} & loaded_by("ecodiff.runtime.code")
