import json

import pytest
from imports import loaded_by

from ecodiff.runtime.artifacts import SNAKEMAKES, atomic, write_text
from ecodiff.runtime.code import code_hash
from ecodiff.runtime.errors import UserError
from ecodiff.runtime.provenance import BLOCK, BLOCKS, begin, content, digest, explain


def made(path, text="x", inputs=(), **settings):
    """An output of the stage `prompts` with its manifest; its id."""
    begun = begin("prompts", inputs)
    write_text(path, text)
    begun.write_manifest(path, settings)
    return json.loads((path.parent / f"{path.name}.manifest.json").read_text())


def test_a_manifest_says_how_an_output_came_about(tmp_path):
    write_text(tmp_path / "captions.txt", "a ring\n")
    found = made(tmp_path / "out.csv", inputs=[tmp_path / "captions.txt"], seed=7)
    assert found["stage"] == "prompts"
    assert found["settings"] == {"seed": 7}
    assert found["code"] == code_hash("prompts")
    assert list(found["inputs"]) == [str(tmp_path / "captions.txt")]
    libraries = {"python", "torch", "diffusers", "torchmetrics", "torch-fidelity", "torchvision"}
    assert libraries | {"numpy", "accelerate", "pillow"} <= found["versions"].keys()
    assert found["device"] and found["began"] and found["seconds"] >= 0
    assert found["edited"] in (True, False, None)


def test_the_id_is_of_what_shapes_the_result_and_not_of_when(tmp_path):
    write_text(tmp_path / "in", "1")
    one = made(tmp_path / "a", inputs=[tmp_path / "in"], seed=7)
    assert made(tmp_path / "b", inputs=[tmp_path / "in"], seed=7)["id"] == one["id"]
    assert made(tmp_path / "c", inputs=[tmp_path / "in"], seed=8)["id"] != one["id"]
    write_text(tmp_path / "in", "2")
    assert made(tmp_path / "d", inputs=[tmp_path / "in"], seed=7)["id"] != one["id"]


def test_a_change_far_back_changes_all_ids_after_it(tmp_path):
    ids = []
    for text in ("1", "2"):
        write_text(tmp_path / "in", text)
        made(tmp_path / "a", "same", inputs=[tmp_path / "in"])
        made(tmp_path / "b", "same", inputs=[tmp_path / "a"])
        ids.append(made(tmp_path / "c", "same", inputs=[tmp_path / "b"])["id"])
    assert ids[0] != ids[1]


def test_a_runs_config_is_no_input(tmp_path):
    write_text(tmp_path / "config.yaml", "a: 1")
    assert made(tmp_path / "a", inputs=[tmp_path / "config.yaml"])["inputs"] == {}


def test_a_large_file_is_told_from_one_with_other_bytes_all_over(tmp_path):
    size = BLOCK * (BLOCKS + 5)
    (tmp_path / "a").write_bytes(bytes(size))
    (tmp_path / "b").write_bytes(b"\1" * size)
    (tmp_path / "c").write_bytes(bytes(size + 1))
    (tmp_path / "end").write_bytes(bytes(size - 1) + b"\1")
    assert len({content(tmp_path / name) for name in ("a", "b", "c", "end")}) == 4


def test_a_folder_is_its_files_and_names_but_not_what_snakemake_puts_there(tmp_path):
    with atomic(tmp_path / "f", folder=True) as scratch:
        (scratch / "a").write_text("1")
    before = content(tmp_path / "f")
    (tmp_path / "f" / SNAKEMAKES).touch()
    assert content(tmp_path / "f") == before
    (tmp_path / "f/a").rename(tmp_path / "f/b")
    assert content(tmp_path / "f") != before


def test_nothing_is_known_of_a_name_that_is_no_file(tmp_path):
    assert digest("someone/never-downloaded") is None
    assert digest(str(tmp_path / "no/such/file")) is None


@pytest.fixture
def chain(tmp_path):
    """captions.txt -> prompts -> pictures (a folder) -> table."""
    write_text(tmp_path / "captions.txt", "a ring\n")
    made(tmp_path / "prompts", inputs=[tmp_path / "captions.txt"], seed=7)
    begun = begin("generate", [tmp_path / "prompts"])
    with atomic(tmp_path / "pictures", folder=True) as scratch:
        (scratch / "0.png").write_text("p")
    begun.write_manifest(tmp_path / "pictures", {})
    made(tmp_path / "table.csv", inputs=[tmp_path / "pictures", tmp_path / "prompts"])
    return tmp_path


def test_a_number_is_explained_back_to_the_prompts(chain):
    lines = explain(chain / "table.csv")
    heads = [line for line in lines if "by " not in line and "settings" not in line]
    assert [line.strip() for line in heads] == [
        str(chain / "table.csv"),
        str(chain / "pictures"),
        str(chain / "prompts"),
        str(chain / "captions.txt"),
        f"{chain / 'prompts'} (above)",
    ]
    assert '"seed": 7' in "".join(lines)
    assert not any("CHANGED" in line for line in lines)


def test_a_file_of_a_folder_is_explained_by_the_folder(chain):
    assert explain(chain / "pictures/0.png")[0] == (
        f"{chain / 'pictures/0.png'}, of {chain / 'pictures'}"
    )


def test_what_was_changed_by_hand_is_told(chain):
    write_text(chain / "captions.txt", "a square\n")
    (chain / "pictures/0.png").write_text("edited")
    lines = explain(chain / "table.csv")
    assert any("captions.txt (HAS CHANGED" in line for line in lines)
    at = next(n for n, line in enumerate(lines) if line.strip() == str(chain / "pictures"))
    assert "CHANGED SINCE IT WAS WRITTEN" in lines[at + 2]


@pytest.mark.parametrize("name", ["captions.txt", "none"])
def test_what_ecodiff_did_not_write_is_one_line(chain, name):
    with pytest.raises(UserError, match=f"{name}: "):
        explain(chain / name)


def test_importing_provenance_needs_no_torch():
    assert not {"torch", "diffusers"} & loaded_by("ecodiff.runtime.provenance")
