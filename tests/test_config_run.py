from pathlib import Path

import pytest
import yaml
from imports import loaded_by

from ecodiff.config import run as module
from ecodiff.config.reading import read_settings
from ecodiff.config.run import load_config
from ecodiff.config.sections import MaskSettings
from ecodiff.config.variants import Variant
from ecodiff.runtime.errors import UserError

ROOT = Path(__file__).parents[1]
CALL = {"num_inference_steps": 2, "height": 64, "width": 64}
SET = {"source": "shapeworld", "count": 4}


def minimal(**changes):
    return {
        "run": "test",
        "models": {"toy": {"source": "somewhere", "call": CALL}},
        "variants": [{"method": "ecodiff", "sparsities": [0.1, 0.29]}],
        "prompts": {"calibration": SET, "evaluation": {**SET, "seed": 100}},
        **changes,
    }


def lines(source):
    """The lines of what is wrong with a config."""
    with pytest.raises(UserError) as error:
        load_config(source)
    return str(error.value).splitlines()


def message(**changes):
    [line] = lines(minimal(**changes))
    return line


@pytest.mark.parametrize("name", ["config.yaml", "few-steps.yaml", "compare.yaml", "paper.yaml"])
def test_shipped_configs_are_valid(name):
    assert load_config(ROOT / "config" / name).variants


def test_schema_file_is_in_sync():
    written = (ROOT / "workflow/schemas/config.schema.json").read_text()
    assert written == module.schema(), "run: make schema"


def test_dense_comes_first_and_sparsities_are_rounded_to_percents():
    names = [variant.name for variant in load_config(minimal()).variants_of("toy")]
    assert names == ["dense", "ecodiff-10", "ecodiff-29"]


def test_a_model_changes_single_keys_of_shared_sections():
    models = {"toy": {"source": "x", "call": CALL, "mask": {"lr": {"heads": 0.5}}}}
    config = load_config(minimal(models=models, mask={"iterations": 7, "lr": {"neurons": 0.2}}))
    mask = config.models["toy"].mask
    assert (mask.iterations, mask.lr.heads, mask.lr.neurons) == (7, 0.5, 0.2)


def test_a_model_changes_single_keys_of_retraining():
    models = {"toy": {"source": "x", "call": CALL, "retrain": {"lora": {"rank": 3}}}}
    config = load_config(minimal(models=models, retrain={"lora": {"steps": 5}}))
    lora = config.models["toy"].retrain["lora"]
    assert (lora.kind, lora.rank, lora.steps) == ("lora", 3, 5)
    assert config.models["toy"].retrain["full"].kind == "full"


def test_a_variant_for_each_seed_of_the_scores():
    family = {"method": "taylor", "sparsities": [0.1], "seeds": [0, 2], "compensation": True}
    names = [v.name for v in load_config(minimal(variants=[family])).variants_of("toy")]
    assert names == ["dense", "taylor-10-s0-comp", "taylor-10-s2-comp"]
    variant = Variant.parse("taylor-10-s2-comp-lora")
    assert (variant.seed, variant.mask, variant.scores.name) == (2, "taylor-10-s2", "taylor-10-s2")
    assert variant.pruned.name == "taylor-10-s2-comp"


def test_a_family_can_hold_several_methods_with_and_without_compensation():
    family = {"method": ["obs", "wanda"], "sparsities": [0.1], "compensation": [False, True]}
    names = [v.name for v in load_config(minimal(variants=[family])).variants_of("toy")]
    assert names == ["dense", "obs-10", "obs-10-comp", "wanda-10", "wanda-10-comp"]


def test_variants_can_be_of_some_models_only():
    models = {name: {"source": "x", "call": CALL} for name in ("a", "b")}
    variants = [{"method": "random", "sparsities": [0.5], "models": ["b"]}]
    config = load_config(minimal(models=models, variants=variants))
    assert [len(config.variants_of(name)) for name in ("a", "b")] == [1, 2]


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"mask": {"betta": 1}}, ["mask.betta: unknown key", "did you mean beta?"]),
        ({"masks": {}}, ["masks: unknown key", "mask"]),
        ({"mask": {"objective": "x"}}, ["mask.objective:", "'penalty' or 'budget'", "'x'"]),
        ({"mask": 3}, ["mask: should be a mapping, not 3"]),
        ({"run": None}, ["run: should be a valid string"]),
        ({"run": "a/b"}, ["run: "]),
        ({"models": {}}, ["models: "]),
        ({"models": {"toy": {"call": CALL}}}, ["models.toy.source: this key is missing"]),
        ({"variants": [{"method": "ecodif", "sparsities": [0.1]}]}, ["variants.0.method.0:"]),
        ({"variants": [{"method": "random", "sparsities": [20]}]}, ["variants.0.sparsities.0:"]),
        ({"variants": [{"method": "random", "sparsities": [0.123]}]}, ["whole per cent"]),
        ({"variants": [{"method": "random", "sparsities": [0.999999999]}]}, ["whole per cent"]),
        ({"variants": [{"method": "random", "sparsities": [1e-9]}]}, ["whole per cent"]),
        ({"variants": [{"method": "random", "sparsities": [0.1, 0.1]}]}, ["named twice"]),
        ({"variants": []}, ["variants: ", "at least one"]),
        ({"variants": [{"method": "random", "sparsities": []}]}, ["sparsities: ", "at least one"]),
        ({"variants": [{"method": [], "sparsities": [0.1]}]}, ["method: ", "at least one"]),
        ({"report": {"shown": []}}, ["report.shown: ", "at least one"]),
        ({"mask": {"seed": 2**40}}, ["mask.seed: should be less than"]),
        ({"mask": {"checkpoint": False, "keep_steps": 2}}, ["keep_steps: nothing reads it"]),
        ({"mask": {"memory_mb": 2}}, ["memory_mb: nothing reads it"]),
        (
            {"variants": [{"method": "random", "sparsities": [0.1], "models": ["no"]}]},
            ["no model 'no'", "toy"],
        ),
        ({"evaluate": {"prompts": "no"}}, ["evaluate.prompts", "'no'", "calibration"]),
        ({"retrain": {"lora": {"prompts": "no"}}}, ["retrain.lora.prompts", "'no'"]),
        ({"ablations": {"prompts": "no", "vary": {}}}, ["ablations.prompts", "'no'"]),
        (
            {"allow_overlap": True, "ablations": {"prompts": "evaluation", "vary": {"bacth": [2]}}},
            ["ablations.vary: bacth: unknown key; did you mean batch?"],
        ),
        (
            {"allow_overlap": True, "ablations": {"prompts": "evaluation", "vary": {"batch": [0]}}},
            ["ablations.vary: batch: should be greater than 0, not 0"],
        ),
        (
            {
                "allow_overlap": True,
                "ablations": {"prompts": "evaluation", "vary": {"batch": [2, 2]}},
            },
            ["ablations.vary: batch-2 is named twice"],
        ),
        ({"retrain": {"lora": {"kind": "full"}}}, ["kind must be lora, as its name says"]),
        (
            {"prompts": {"calibration": {"source": "gcc", "count": 1}, "evaluation": SET}},
            ["prompts.calibration: source gcc needs the key path"],
        ),
    ],
)
def test_a_mistake_is_one_line_that_names_key_and_choice(changes, parts):
    text = message(**changes)
    assert all(part in text for part in parts), text


def test_all_that_is_wrong_is_said_at_once():
    found = lines(minimal(mask={"beta": -1, "batch": 0}, masks={}))
    assert [line.partition(":")[0] for line in found] == ["mask.beta", "mask.batch", "masks"]


def test_a_mistake_in_a_shared_section_is_said_once():
    models = {name: {"source": "x", "call": CALL} for name in ("a", "b")}
    assert message(models=models, mask={"betta": 1}).startswith("mask.betta: ")


def test_a_models_own_mistake_is_named_with_the_model():
    models = {"toy": {"source": "x", "call": CALL, "mask": {"betta": 1}}}
    assert message(models=models).startswith("models.toy.mask.betta: ")


def test_mistakes_are_told_with_file_and_line_in_the_order_of_the_file(tmp_path):
    path = tmp_path / "c.yaml"
    config = minimal(mask={"betta": 1}, evaluate={"prompts": "no"})
    path.write_text(yaml.safe_dump(config, sort_keys=False).replace("run: test", "run: 3"))
    found = lines(path)
    number = 1 + path.read_text().splitlines().index("  betta: 1")
    assert [line.split(": ")[0] for line in found] == [f"{path}, line 1", f"{path}, line {number}"]


def test_mistakes_that_only_the_whole_config_shows_have_their_line_too(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(minimal(evaluate={"prompts": "no"}), sort_keys=False))
    [line] = lines(path)
    number = 1 + path.read_text().splitlines().index("  prompts: 'no'")
    assert line.startswith(f"{path}, line {number}: evaluate.prompts: no prompt set 'no'")


def test_a_key_that_stands_twice_is_named_with_both_lines(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("run: a\nmask:\n  batch: 1\n  beta: 2\n  batch: 3\nrun: b\n")
    assert lines(path) == [
        f"{path}: the key batch stands twice, in lines 3 and 5",
        f"{path}: the key run stands twice, in lines 1 and 6",
    ]
    with pytest.raises(UserError, match="batch stands twice"):
        read_settings(MaskSettings, "{batch: 1, batch: 2}")


def test_keys_of_a_yaml_merge_may_be_put_over():
    text = "models: &m {lr: {heads: 1.0}}"
    assert read_settings(MaskSettings, "{lr: {<<: {heads: 1.0}, neurons: 2.0}}").lr.heads == 1.0
    assert text


@pytest.mark.parametrize("value", ["yes", "on", "true", "no"])
@pytest.mark.parametrize("key", ["iterations", "beta", "seed"])
def test_a_truth_value_is_no_number(key, value):
    with pytest.raises(UserError, match=f"{key}: should be no truth value"):
        read_settings(MaskSettings, f"{key}: {value}")


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan"])
@pytest.mark.parametrize("key", ["beta", "first_logit", "lr: {heads"])
def test_an_infinity_is_no_number(key, value):
    with pytest.raises(UserError, match=r"finite|greater|sensitivity"):
        read_settings(MaskSettings, f"{key}: {value}{'}' if '{' in key else ''}")


def test_values_are_echoed_in_short():
    assert len(message(run="x y" * 10_000)) < 250


def test_settings_that_are_no_mapping_name_their_option():
    with pytest.raises(UserError, match="--settings: should be a mapping, not 5"):
        read_settings(MaskSettings, "5", name="--settings")


@pytest.mark.parametrize(
    "name", ["dense", "ecodiff-20", "ecodiff-20-comp", "random-5-lora", "magnitude-30-comp-full"]
)
def test_variant_names_are_parsed_back(name):
    assert Variant.parse(name).name == name


@pytest.mark.parametrize(
    "name", ["ecodiff", "ecodiff-0", "ecodiff-20-lora-comp", "dense-10", "x-1"]
)
def test_other_names_are_no_variants(name):
    with pytest.raises(UserError, match="expected dense or"):
        Variant.parse(name)


def test_a_retrained_variant_starts_from_its_pruned_one():
    variant = Variant.parse("ecodiff-30-comp-lora")
    assert (variant.pruned.name, variant.mask, variant.sparsity) == (
        "ecodiff-30-comp",
        "ecodiff-30",
        0.3,
    )


def test_settings_are_read_from_text_files_and_nothing(tmp_path):
    (tmp_path / "mask.yaml").write_text("beta: 2")
    assert read_settings(MaskSettings, str(tmp_path / "mask.yaml")).beta == 2
    assert read_settings(MaskSettings, '{"beta": 3}').beta == 3
    assert read_settings(MaskSettings, None) == MaskSettings()


@pytest.mark.parametrize(
    ("text", "part"),
    [("a: [", "not YAML"), ("no.yaml", "no.yaml: there is no such file"), ("3", "mapping")],
)
def test_unreadable_settings_are_one_line(text, part):
    with pytest.raises(UserError, match=part) as error:
        read_settings(MaskSettings, text)
    assert "\n" not in str(error.value)


def test_resolved_config_is_a_config_again():
    config = load_config(ROOT / "config/config.yaml")
    again = yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json")))
    assert load_config(again) == config


def test_importing_the_config_needs_no_torch():
    assert not {"torch", "diffusers"} & loaded_by("ecodiff.config")
