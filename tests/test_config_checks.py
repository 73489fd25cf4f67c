"""What is known to go wrong before the first job."""

import pytest

from ecodiff.config.checks import inception_weights, is_local, missing
from ecodiff.config.run import load_config, load_planned
from ecodiff.runtime.errors import UserError

CALL = {"num_inference_steps": 4, "height": 64, "width": 64}


def config(**changes):
    sets = {
        name: {"source": "shapeworld", "count": 6, "seed": 100 * place}
        for place, name in enumerate(("calibration", "evaluation", "validation"))
    }
    return {
        "run": "test",
        "models": {"toy": {"source": "org/model", "call": CALL}},
        "variants": [{"method": "ecodiff", "sparsities": [0.1], "retrain": "lora"}],
        "prompts": sets,
        "retrain": {"lora": {"batch": 2}},
        **changes,
    }


def said(**changes):
    with pytest.raises(UserError) as error:
        load_config(config(**changes))
    return str(error.value)


def sets(**changes):
    found = config()["prompts"]
    return {name: {**one, **changes.get(name, {})} for name, one in found.items()}


def test_a_config_without_mistakes_is_taken():
    load_config(config())


SWEEP = {"prompts": "validation", "vary": {"batch": [2]}}


def test_no_more_shards_than_names_in_a_command():
    prompts = sets(evaluation={"count": 10_000, "seed": 1000, "split": "held-out"})
    load_config(config(prompts=prompts, generate={"shard_size": 20}))
    line = "generate.shard_size: 19 a shard of 10000 prompts; 20 at least"
    assert line in said(prompts=prompts, generate={"shard_size": 19})


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"evaluate": {"prompts": "calibration"}}, "evaluate.prompts: is the prompt set of"),
        ({"ablations": {**SWEEP, "prompts": "calibration"}}, "ablations.prompts: is the prompt"),
        ({"ablations": {**SWEEP, "prompts": "evaluation"}}, "ablations.prompts: is the prompt"),
        (
            {"retrain": {"lora": {"batch": 2, "prompts": "evaluation"}}},
            "retrain.lora.prompts: is the prompt set of evaluate.prompts",
        ),
        ({"prompts": sets(evaluation={"seed": 5})}, "evaluate.prompts: starts from noise"),
        (
            {
                "prompts": {
                    "calibration": {"source": "file", "path": "p.txt", "count": 4},
                    "evaluation": {"source": "file", "path": "p.txt", "count": 4, "seed": 9},
                }
            },
            "evaluate.prompts: takes its captions from the file of calibrate.prompts",
        ),
    ],
)
def test_a_model_is_not_judged_on_what_it_learned_from_unless_that_is_meant(changes, key):
    line = said(**changes)
    assert key in line and "allow_overlap: true" in line
    load_config(config(**changes, allow_overlap=True))


def test_a_model_may_learn_twice_from_the_same_prompts():
    load_config(config(retrain={"lora": {"batch": 2, "prompts": "calibration"}}))


def test_a_model_may_be_judged_on_several_sets_and_none_of_them_learned_from():
    load_config(config(evaluate={"prompts": ["evaluation", "validation"]}))
    load_config(config(evaluate={"prompts": "evaluation"}))
    line = said(evaluate={"prompts": ["evaluation", "calibration"]})
    assert "evaluate.prompts.1: is the prompt set of calibrate.prompts" in line
    assert "evaluation is named twice" in said(evaluate={"prompts": ["evaluation"] * 2})
    assert "no prompt set 'no'" in said(evaluate={"prompts": ["evaluation", "no"]})


def test_noise_of_neighbours_does_not_overlap():
    load_config(config(prompts=sets(evaluation={"seed": 6})))


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"mask": {"batch": 7}}, "mask.batch: 7 of 6 prompts"),
        ({"mask": {"prompts": 3, "batch": 4}}, "mask.batch: 4 of 3 prompts"),
        ({"mask": {"keep_steps": 5}}, "mask.keep_steps: 5 of 4 steps"),
        ({"retrain": {"lora": {"batch": 7}}}, "retrain.lora.batch: 7 of 6 prompts; two"),
        (
            {"evaluate": {"efficiency": {"batch_size": 100}}},
            "evaluate.efficiency.batch_size: 100 of 6 prompts",
        ),
        ({"evaluate": {"mask_cost": {"batch": 8}}}, "evaluate.mask_cost.batch: 8 of 6 prompts"),
        (
            {"ablations": {**SWEEP, "vary": {"batch": [9]}}},
            "ablations.vary.batch: 9 of 6 prompts",
        ),
        (
            {"ablations": {**SWEEP, "vary": {"sparsity": [0.2555]}}},
            "ablations.vary.sparsity: 0.2555 is not a whole per cent",
        ),
        (
            {"models": {"toy": {"source": "a/b", "call": CALL, "mask": {"batch": 9}}}},
            "models.toy.mask.batch: 9 of 6 prompts",
        ),
        ({"prompts": sets(evaluation={"count": 1})}, "prompts.evaluation.count: two pictures"),
    ],
)
def test_more_than_there_is_is_refused(changes, line):
    assert line in said(**changes)


@pytest.mark.parametrize("name", ["tables", "config.yaml"])
def test_a_model_has_no_name_of_the_runs_own_files(name):
    assert f"models.{name}: " in said(models={name: {"source": "a/b", "call": CALL}})


@pytest.mark.parametrize("name", ["grams", "a.parquet"])
def test_a_prompt_set_has_no_name_of_other_files(name):
    extra = {name: {"source": "shapeworld", "count": 2, "seed": 900}}
    assert f"prompts.{name}: " in said(prompts={**sets(), **extra})


def test_the_run_is_not_named_as_the_folder_of_toys():
    assert said(run="toys").startswith("run: ")


@pytest.mark.parametrize(
    ("source", "local"),
    [("org/model", False), ("./models/x", True), ("/data/x", True), ("a/b/c", True), ("~/x", True)],
)
def test_a_path_is_no_hub_id(source, local):
    assert is_local(source) == local


def test_every_file_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    prompts = sets()
    prompts["evaluation"] = {"source": "coco", "path": "c.json", "images": "val", "count": 5}
    prompts["evaluation"]["seed"] = 500
    changes = {
        "models": {
            "toy": {"source": "./nothing", "call": CALL},
            "other": {"source": "./empty", "call": CALL},
        },
        "prompts": prompts,
        "evaluate": {"clip_model": "local-dir:no-clip", "clip_pretrained": None},
        "report": {"published": "no.csv"},
    }
    found = {
        ".".join(map(str, path)): text for path, text in missing(load_config(config(**changes)))
    }
    assert found == {
        "models.toy.source": "there is no file or folder ./nothing",
        "models.other.source": "./empty holds no model_index.json",
        "prompts.evaluation.path": "there is no file c.json",
        "prompts.evaluation.images": "there is no folder val",
        "evaluate.clip_model": "there is no folder no-clip",
        "report.published": "there is no file no.csv",
    }
    _, lines = load_planned(config(**changes), [])
    assert "prompts.evaluation.path: there is no file c.json" in lines


@pytest.mark.parametrize("features", ["inception", "clip"])
def test_weights_that_a_run_will_fetch_at_its_end_are_said_at_its_start(
    features, tmp_path, monkeypatch, caplog
):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    evaluate = {"features": features}
    load_planned(config(evaluate=evaluate), [])
    assert bool(caplog.messages) == (features == "inception")
    caplog.clear()
    place = inception_weights()
    assert tmp_path in place.parents
    place.parent.mkdir(parents=True)
    place.touch()
    load_planned(config(evaluate=evaluate), [])
    assert not caplog.messages


@pytest.mark.parametrize("part", ["unet", "transformer"])
def test_a_quantised_base_is_refused_before_the_first_job(part, tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    file = tmp_path / part / "config.json"
    file.parent.mkdir()
    for text in ("not JSON", "[]", "{}", '{"quantization_config": null}'):
        file.write_text(text)
        models = {"toy": {"source": str(tmp_path), "call": CALL}}
        assert not [*missing(load_config(config(models=models)))]
    file.write_text('{"quantization_config": {"quant_method": "bitsandbytes"}}')
    assert [*missing(load_config(config(models=models)))] == [
        (("models", "toy", "source"), f"{tmp_path} is quantised (bitsandbytes)")
    ]
