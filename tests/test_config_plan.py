"""Which file serves which job."""

import json

import pytest
import yaml
from imports import loaded_by

from ecodiff.config.plan import Plan
from ecodiff.config.run import load_config

CALL = {"num_inference_steps": 1, "height": 8, "width": 8}
VARIANTS = [{"method": "random", "sparsities": [0.1]}]


def planned(**changes):
    """The plan of a small run, with some sections changed."""
    sections = {
        "run": "small",
        "mask": {"batch": 2},
        "retrain": {"lora": {"batch": 2}},
        "evaluate": {"mask_cost": None},
        "models": {
            "a": {"source": "org/a", "call": {"num_inference_steps": 1, "height": 8, "width": 8}},
            "b": {"source": "folder", "call": {"num_inference_steps": 1, "height": 8, "width": 8}},
        },
        "variants": [
            {"method": "ecodiff", "sparsities": [0.1, 0.2, 0.3]},
            {"method": "ecodiff", "sparsities": [0.2], "compensation": True, "retrain": "lora"},
            {"method": "magnitude", "sparsities": [0.1, 0.4], "models": ["a"]},
        ],
        "prompts": {
            "calibration": {"source": "shapeworld", "count": 4},
            "evaluation": {"source": "shapeworld", "count": 10, "seed": 100},
        },
    }
    return Plan(load_config({**sections, **changes}))


@pytest.mark.parametrize(
    ("sparsities", "mask"), [("shared", "ecodiff-20"), ("per-sparsity", "ecodiff-10")]
)
def test_one_mask_serves_all_sparsities_where_learning_is_shared(sparsities, mask):
    plan = planned(mask={"sparsities": sparsities, "batch": 2})
    assert plan.mask("a", "ecodiff-10") == f"results/small/a/masks/{mask}/mask.safetensors"


def test_methods_that_do_not_learn_are_scored_once():
    assert planned().all_masks() == [
        "results/small/a/masks/ecodiff-10/mask.safetensors",
        "results/small/a/masks/ecodiff-20/mask.safetensors",
        "results/small/a/masks/ecodiff-30/mask.safetensors",
        "results/small/a/masks/magnitude-10/mask.safetensors",
        "results/small/b/masks/ecodiff-10/mask.safetensors",
        "results/small/b/masks/ecodiff-20/mask.safetensors",
        "results/small/b/masks/ecodiff-30/mask.safetensors",
    ]


def test_a_seed_in_a_masks_name_is_that_of_its_settings():
    plan = planned(mask={"seed": 5, "batch": 2})
    assert plan.mask_settings("a", "ecodiff-20").seed == 5
    assert plan.mask_settings("a", "ecodiff-20-s7").seed == 7
    assert plan.aim("ecodiff-20-s7")[-1] == json.dumps({"seed": 7})
    assert plan.aim("ecodiff-20") == ["--method", "ecodiff", "--percent", "20"]


def test_only_methods_that_look_at_data_need_the_calibration():
    plan = planned()
    assert plan.mask_data("a", "ecodiff-20") == ["results/small/a/calibration.safetensors"]
    assert plan.mask_data("a", "magnitude-20") == []


@pytest.mark.parametrize(
    ("groups", "data"),
    [
        (1, {"grams": "results/small/a/grams"}),
        (4, {"calibration": "results/small/a/calibration.safetensors"}),
    ],
)
def test_compensation_reads_grams_or_in_groups_the_calibration(groups, data):
    plan = planned(prune={"groups": groups})
    assert plan.compensation("a", "ecodiff-20-comp") == data
    assert plan.compensation("a", "ecodiff-20") == {}


def test_a_retrained_variant_starts_from_its_pruned_one():
    plan = planned()
    start = plan.before_retraining("b", "ecodiff-20-comp-lora")
    assert start == "results/small/b/ecodiff-20-comp/model"
    assert start in plan.all_pruned()


def test_retraining_may_have_prompts_of_its_own():
    lora = {"prompts": "evaluation", "batch": 2, "states": "dense"}
    plan = planned(retrain={"lora": lora}, allow_overlap=True, generate={"shard_size": 4})
    folder = "results/small/a/trajectories"
    shards = [f"{folder}/evaluation-2/{shard}" for shard in range(3)]
    assert plan.trajectories("a", "ecodiff-20-comp-lora") == shards
    lora = {"batch": 2, "states": "dense"}
    plan = planned(retrain={"lora": lora})
    assert plan.trajectories("a", "ecodiff-20-comp-lora") == [f"{folder}/calibration-2/0"]


def test_retraining_is_at_the_states_that_the_recipe_names():
    found = {}
    for states in ("dense", "both", "pictures"):
        plan = planned(retrain={"lora": {"batch": 2, "states": states}})
        found[states] = plan.trajectories("a", "ecodiff-20-comp-lora")
    dense = "results/small/a/trajectories/calibration-2"
    own = "results/small/a/ecodiff-20-comp/trajectories/calibration-2"
    assert found["dense"] == [f"{dense}/0"]
    assert found["both"] == [f"{dense}/0", f"{own}/0"]
    assert found["pictures"] == [f"{dense}-pictures/0"]


def test_the_last_shard_may_be_smaller():
    plan = planned(generate={"shard_size": 4})
    shards = [f"results/small/a/dense/images/evaluation/{shard}" for shard in range(3)]
    assert plan.all_shards()[:3] == shards
    folder = "results/small/a/dense/seen/evaluation"
    expected = [f"{folder}/{shard}.safetensors" for shard in range(3)]
    assert plan.seen("a", "dense", "evaluation") == expected
    real = plan.real("a", "evaluation")
    assert real == plan.real("b", "evaluation") and len(real) == 3


def test_each_set_is_drawn_and_judged_by_itself():
    sets = {
        "calibration": {"source": "shapeworld", "count": 4},
        "evaluation": {"source": "shapeworld", "count": 10, "seed": 100},
        "more": {"source": "shapeworld", "count": 4, "seed": 800},
    }
    plan = planned(prompts=sets, evaluate={"prompts": ["evaluation", "more"]})
    folder = "results/small/a/dense"
    assert f"{folder}/images/more/0" in plan.all_shards()
    assert plan.judged()[:2] == [f"{folder}/quality/{name}.json" for name in ("evaluation", "more")]
    assert plan.timed() == "results/small/prompts/evaluation.parquet"
    assert plan.learned_tables("more") == ["results/small/prompts/calibration.parquet"]


def test_variants_of_other_models_are_not_there():
    assert not any("magnitude" in folder for folder in planned().folders("b"))


def test_a_folder_is_read_from_its_files_and_a_hub_model_from_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan = planned()
    assert plan.dense_files("a") == []
    (tmp_path / "folder/unet").mkdir(parents=True)
    for name in ("model_index.json", "unet/weights.safetensors", "readme.txt"):
        (tmp_path / "folder" / name).touch()
    assert plan.dense_files("b") == ["folder/model_index.json", "folder/unet/weights.safetensors"]
    assert plan.model_files("b", "ecodiff-10") == ["results/small/b/ecodiff-10/model"]


def test_a_single_file_is_read_from_itself(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.safetensors").touch()
    models = {"a": {"source": "model.safetensors", "call": CALL}}
    assert planned(models=models, variants=VARIANTS).dense_files("a") == ["model.safetensors"]


def test_a_tilde_is_the_home_of_who_plans(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    models = {"a": {"source": "~/model", "call": CALL}}
    assert planned(models=models, variants=VARIANTS).source("a") == f"{tmp_path}/model"


def test_figures_are_those_that_can_be_filled():
    plain = {"method": "random", "sparsities": [0.1]}
    learned = {"method": "ecodiff", "sparsities": [0.1], "models": ["a"]}
    plan = planned(variants=[plain, learned], evaluate={"efficiency": None, "mask_cost": None})
    assert plan.figures("a") == ["quality", "pictures", "removed", "analysis", "learning"]
    assert plan.figures("b") == ["quality", "pictures", "removed", "analysis"]


def test_an_ablation_is_told_what_it_changes():
    sweep = {"prompts": "evaluation", "vary": {"batch": [1], "lr": [0.3], "sparsity": [0.4]}}
    plan = planned(ablations=sweep, allow_overlap=True)
    *_, changes = plan.ablation_aim("a", "batch-1")
    assert json.loads(changes) == {"batch": 1}
    *_, changes = plan.ablation_aim("a", "lr-0.3")
    assert json.loads(changes) == {"lr": {"heads": 0.3, "neurons": 0.3, "modulation": 0.3}}
    assert plan.ablation_aim("a", "sparsity-0.4") == ["--method", "ecodiff", "--percent", "40"]


def test_what_a_job_reads_of_the_saved_config_is_what_was_planned(tmp_path):
    """A job gets its sections from config.yaml, and what its name says as options."""
    from ecodiff.cli.common import Source
    from ecodiff.config.sections import MaskSettings

    plan = planned(mask={"iterations": 7, "seed": 1, "batch": 2})
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(plan.config.model_dump(mode="json")))
    *_, changes = plan.aim("ecodiff-20-s3")
    found = Source(path, "a").of_model(MaskSettings, changes, "mask")
    assert found == plan.mask_settings("a", "ecodiff-20-s3")


def test_prompts_are_read_from_their_files_and_judged_by_their_pictures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.json").touch()
    (tmp_path / "val").mkdir()
    real = {"source": "coco", "path": "c.json", "images": "val", "count": 2, "seed": 50}
    shapes = {"source": "shapeworld", "count": 4}
    plan = planned(prompts={"calibration": shapes, "evaluation": real})
    assert plan.prompt_sets(drawn=True) == ["calibration"]
    assert plan.prompt_files("evaluation") == ["c.json", "val"]
    assert plan.real_pictures("evaluation") == ["val"]
    assert planned().real_pictures("evaluation") == ["results/small/prompts/evaluation"]


def test_what_is_judged_on_knows_what_is_learned_from():
    more = {"source": "shapeworld", "count": 4, "seed": 400}
    sets = {
        "calibration": {"source": "shapeworld", "count": 4},
        "evaluation": {"source": "shapeworld", "count": 10, "seed": 100},
        "more": more,
        "idle": {**more, "seed": 500},
    }
    plan = planned(prompts=sets, retrain={"lora": {"prompts": "more", "batch": 2}})
    assert plan.learned_tables("evaluation") == [plan.prompts("calibration"), plan.prompts("more")]


def test_planning_needs_no_torch():
    assert not {"torch", "diffusers"} & loaded_by("ecodiff.config.plan")
