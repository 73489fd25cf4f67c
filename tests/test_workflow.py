"""The workflow as users run it: plans, refusals, reruns, and once everything on a tiny model."""

import re
import shutil

import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file
from workflow_runs import ROOT, run, snakemake, tiny_models, tiny_run

from ecodiff.config.methods import METHODS
from ecodiff.config.run import load_config

MODELS = ("resources/toys/toy-sdxl", "resources/toys/toy-flux", "resources/toys/toy-clip")


def write_config(folder, base="config.yaml", **changes):
    config = yaml.safe_load((ROOT / "config" / base).read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump({**config, **changes}))
    return folder / "config.yaml"


def stand_ins(folder):
    """Make it seem that the demo's models are there."""
    for model in MODELS:
        (folder / model).mkdir(parents=True)
        (folder / model / "model_index.json").write_text("{}")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A working directory where the demo's models seem to be."""
    folder = tmp_path_factory.mktemp("place")
    stand_ins(folder)
    return folder


def planned(folder, config, *words):
    """The jobs of a dry-run by rule, and its text."""
    done = snakemake(folder, "--configfile", config, "--dry-run", "--cores", 2, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    text = done.stdout + done.stderr
    table = text.split("Job stats:")[1].split("total")[0]
    return {name: int(count) for name, count in re.findall(r"^(\w+) +(\d+)$", table, re.M)}, text


def jobs_of(text, rule):
    """What a plan says of each job of a rule."""
    return re.findall(rf"^(?:local)?rule {rule}:\n((?:    .*\n)+)", text, re.M)


@pytest.fixture(scope="module")
def demo(place):
    return planned(place, ROOT / "config/config.yaml")


def test_the_demo_is_planned_whole(demo):
    counts, _ = demo
    variants = sum(
        len(load_config(ROOT / "config/config.yaml").variants_of(model))
        for model in ("toy-sdxl", "toy-flux")
    )
    assert counts["generate"] == counts["see"] == counts["quality"] == variants
    assert counts["real"] == 1  # both models draw in one size
    assert counts["efficiency"] == 2
    assert counts["tables"] == counts["figures"] == 1


def test_shared_work_is_done_once_a_model(demo):
    counts, _ = demo
    assert [counts[rule] for rule in ("calibrate", "grams", "efficiency", "mask_cost")] == [2] * 4


def test_measurements_take_all_cores(demo):
    _, text = demo
    for rule in ("efficiency", "mask_cost"):
        assert all("threads: 2" in job for job in jobs_of(text, rule))
    assert not any("threads: 2" in job for job in jobs_of(text, "generate"))


def test_no_job_of_the_demo_trains_a_toy(demo):
    assert "toy" not in demo[0]


def test_every_job_has_a_log_and_a_benchmark(demo):
    _, text = demo
    rules = set(demo[0]) - {"all"}
    for rule in rules:
        for job in jobs_of(text, rule):
            assert "log: results/demo/logs/" in job
            assert "benchmark: results/demo/benchmarks/" in job


@pytest.mark.parametrize("profile", ["default", "slurm"])
def test_the_paper_is_planned_without_its_data(tmp_path, profile):
    words = ("--workflow-profile", ROOT / "profiles" / profile)
    data = tmp_path / "resources/data"
    data.parent.mkdir()
    shutil.copy(ROOT / "resources/published.csv", data.parent)
    config = ROOT / "config/paper.yaml"
    counts, text = planned(tmp_path, config, *words)
    assert not data.exists()
    assert counts["calibrate"] >= 3
    assert all("gpu=1" in job for job in jobs_of(text, "mask"))


@pytest.mark.parametrize("attempt", [1, 3])
def test_each_try_asks_for_more_memory_and_time_and_gpus_where_they_are_used(tmp_path, attempt):
    config = yaml.safe_load((ROOT / "config/paper.yaml").read_text())
    config["models"] = {"sdxl": config["models"]["sdxl"]}
    config["models"]["sdxl"]["resources"] = {"gpu": 4, "mem_mb": 100, "runtime": 10}
    config["variants"] = [{"method": "ecodiff", "sparsities": [0.2]}]
    config["evaluate"] |= {"efficiency": {}, "mask_cost": None}
    config["report"]["published"] = None
    (tmp_path / "paper.yaml").write_text(yaml.safe_dump(config))
    words = ("--workflow-profile", ROOT / "profiles/slurm", "--attempt", attempt)
    _, text = planned(tmp_path, tmp_path / "paper.yaml", *words)
    for rule, gpu in {"mask": 4, "calibrate": 1, "prune": 1, "generate": 1}.items():
        for job in jobs_of(text, rule):
            assert f"mem_mb={100 * attempt}," in job and f"runtime={10 * attempt}," in job
            assert f"gpu={gpu}" in job and "nodes=1" in job
    [job] = jobs_of(text, "efficiency")
    assert "slurm_extra=--exclusive" in job


def test_every_rule_of_a_job_has_its_threads_in_the_profile_for_slurm(demo):
    profile = yaml.safe_load((ROOT / "profiles/slurm/config.yaml").read_text())
    known = {word.split("=")[0] for word in profile["set-threads"]}
    on_one_core = {"all", "tables", "figures", "gallery", "drawn_prompts", "prompts"}
    assert known >= set(demo[0]) - on_one_core
    assert known >= {"trajectory", "retrain", "ablation", "mask_error"}


def test_a_mistyped_profile_is_one_line_and_nothing_runs(place):
    words = ("--configfile", ROOT / "config/config.yaml", "--cores", 1)
    done = snakemake(place, *words, "--workflow-profile", "profiles/slrum")
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith("--workflow-profile: there is no profile profiles/slrum; ")


def test_toys_are_trained_only_when_asked(place):
    counts, _ = planned(place, ROOT / "config/config.yaml", "toys")
    assert counts == {"toy": 4, "toys": 1}


def test_ablations_learn_a_mask_a_point_and_judge_them_in_one_job(place, demo):
    config = load_config(ROOT / "config/config.yaml")
    points = len(config.ablations_of("toy-sdxl"))
    counts, _ = planned(place, ROOT / "config/config.yaml", "ablations")
    assert counts["ablation"] == 2 * points
    assert counts["mask_error"] == 2
    assert "generate" not in counts
    assert "ablation" not in demo[0]


def test_grams_are_gathered_only_for_compensation(place, tmp_path):
    variants = [{"method": "ecodiff", "sparsities": [0.1]}]
    counts, _ = planned(place, write_config(tmp_path, variants=variants))
    assert "grams" not in counts


def masks_of(text):
    """The learned masks that a plan makes and those that it prunes by, without their folders."""
    made = re.findall(r"masks/(ecodiff-[\ds-]+)/mask", "".join(jobs_of(text, "mask")))
    used = re.findall(r"masks/(ecodiff-[\ds-]+)/mask", "".join(jobs_of(text, "prune")))
    return set(made), set(used)


@pytest.mark.parametrize("settings", [{"objective": "penalty"}, {"sparsities": "shared"}])
def test_one_shared_learning_serves_all_sparsities(place, tmp_path, settings):
    config = write_config(tmp_path, mask={"sparsities": "per-sparsity", **settings})
    _, text = planned(place, config, "pruned")
    assert masks_of(text) == ({"ecodiff-20"}, {"ecodiff-20"})


def test_each_sparsity_can_be_learned_for_itself(place, tmp_path):
    config = write_config(tmp_path, mask={"sparsities": "per-sparsity"})
    _, text = planned(place, config, "pruned")
    assert masks_of(text) == ({"ecodiff-10", "ecodiff-20", "ecodiff-30", "ecodiff-60"},) * 2


def test_baselines_are_scored_once_for_all_sparsities(demo):
    counts, _ = demo
    assert counts["baseline"] == 2 * len(["magnitude", "random"])


def test_every_method_is_planned_with_what_it_looks_at(place, tmp_path):
    variants = [{"method": method, "sparsities": [0.1, 0.2]} for method in METHODS]
    _, text = planned(place, write_config(tmp_path, variants=variants), "masks")
    found = {}
    for job in [*jobs_of(text, "mask"), *jobs_of(text, "baseline")]:
        found[re.search(r"masks/([a-z-]+)-10/", job)[1]] = "calibration.safetensors" in job
    assert found == {m.name: m.looks_at == "calibration" for m in METHODS.values()}


def test_each_seed_has_its_own_scores(place, tmp_path):
    family = {"method": "ecodiff", "sparsities": [0.1, 0.2], "seeds": [3, 4]}
    config = write_config(tmp_path, variants=[family])
    _, text = planned(place, config, "pruned", "--printshellcmds")
    assert masks_of(text) == ({"ecodiff-10-s3", "ecodiff-10-s4"},) * 2
    for seed in (3, 4):
        command = re.search(rf"ecodiff mask .*masks/ecodiff-10-s{seed}/.*", text)[0]
        assert f"--percent 10 --settings '{{\"seed\": {seed}}}'" in command


def test_retraining_may_have_prompts_of_its_own(place, tmp_path):
    config = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    prompts = {**config["prompts"], "more": {"source": "shapeworld", "count": 9}}
    changes = {"prompts": prompts, "retrain": {"lora": {"prompts": "more", "batch": 4}}}
    counts, text = planned(place, write_config(tmp_path, **changes))
    assert counts["trajectory"] == counts["retrain"] == 1
    assert all("trajectories/more-4/0" in job for job in jobs_of(text, "retrain"))


def test_a_retrained_variant_brings_its_pruned_one(place, tmp_path):
    variants = [{"method": "random", "sparsities": [0.1], "retrain": "light"}]
    counts, _ = planned(place, write_config(tmp_path, variants=variants))
    assert counts["prune"] == counts["trajectory"] == counts["retrain"] == 2
    assert counts["own_trajectory"] == 2
    assert counts["generate"] == 4


def test_the_dense_model_answers_where_a_pruned_one_leads(place, tmp_path):
    variants = [{"method": "random", "sparsities": [0.1], "retrain": "light"}]
    config = write_config(tmp_path, variants=variants)
    _, text = planned(place, config, "all", "--printshellcmds")
    found = re.findall(r"ecodiff trajectory (\S+) .*--leader (\S+)", text)
    assert sorted(found) == [
        (f"resources/toys/{model}", f"results/demo/{model}/random-10/model")
        for model in ("toy-flux", "toy-sdxl")
    ]


def test_what_is_not_measured_is_not_planned(place, tmp_path):
    config = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    evaluate = {**config["evaluate"], "efficiency": None, "mask_cost": None}
    counts, _ = planned(place, write_config(tmp_path, evaluate=evaluate))
    assert not {"efficiency", "mask_cost"} & counts.keys()


def test_large_sets_are_generated_in_shards(place, tmp_path):
    generate = {"shard_size": 100}
    variants = [{"method": "random", "sparsities": [0.1]}]
    counts, _ = planned(place, write_config(tmp_path, generate=generate, variants=variants))
    assert counts["generate"] == 2 * 2 * 3


@pytest.mark.parametrize(
    "target",
    [
        "results/demo/toy-sdxl/ecodiff-11/model",
        "results/demo/toy-sd/dense/quality/evaluation.json",
        "results/demo/prompts/nothing.parquet",
        "results/other/tables/main.csv",
    ],
)
def test_nothing_is_made_for_names_that_the_config_lacks(place, target):
    config = ROOT / "config/config.yaml"
    done = snakemake(place, "--configfile", config, "--dry-run", "--cores", 1, target)
    assert done.returncode != 0
    assert "MissingRuleException" in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"mask": {"betta": 1}},
            "mask.betta: unknown key; did you mean beta?",
        ),
        ({"run": 3}, "run: should be a valid string, not 3"),
    ],
)
def test_a_bad_config_is_one_line_and_nothing_is_written(tmp_path, changes, line):
    place = tmp_path / "place"
    place.mkdir()
    config = write_config(tmp_path, **changes)
    done = snakemake(place, "--configfile", config, "--cores", 1, "--workflow-profile", "none")
    assert done.returncode == 2
    [said] = done.stderr.splitlines()
    assert re.fullmatch(rf"config: {re.escape(str(config))}, line \d+: {re.escape(line)}", said)
    assert [path.name for path in place.iterdir()] in ([], [".snakemake"])


def test_the_workflow_passes_snakemakes_linter(place):
    done = snakemake(place, "--configfile", ROOT / "config/config.yaml", "--lint")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """A copy of the workflow and its package that tests may edit, with its prompts made."""
    folder = tmp_path_factory.mktemp("house")
    for name in ("Snakefile", "environment.yml"):
        shutil.copy(ROOT / name, folder)
    stand_ins(folder)
    for name in ("workflow", "config", "ecodiff"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    sets = {"calibration": 0, "evaluation": 100}
    prompts = {name: {"source": "shapeworld", "count": 8, "seed": s} for name, s in sets.items()}
    write_config(folder / "config", prompts=prompts, ablations=None, retrain={"lora": {"batch": 4}})
    done = snakemake(folder, *made(folder), "--cores", 1, root=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def made(folder):
    return [f"results/demo/prompts/{name}.parquet" for name in ("calibration", "evaluation")]


def again(folder):
    """Which prompt sets a dry-run would make anew."""
    done = snakemake(folder, *made(folder), "--dry-run", "--cores", 1, root=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return sorted(set(re.findall(r"wildcards: set=(\w+)", done.stdout + done.stderr)))


@pytest.mark.slow
def test_what_is_made_is_not_made_again(house):
    assert again(house) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "sets"),
    [
        ("prompts/sources.py", ["calibration", "evaluation"]),
        ("generate.py", []),
        ("toys/sdxl.py", []),
    ],
)
def test_an_edit_of_the_package_reruns_the_stages_that_it_touches(house, module, sets):
    file = house / "ecodiff" / module
    before = file.read_text()
    file.write_text(f"{before}\nEDITED = True\n")
    try:
        assert again(house) == sets
    finally:
        file.write_text(before)


@pytest.mark.slow
def test_an_edit_of_a_key_reruns_what_reads_it(house):
    file = house / "config/config.yaml"
    before = file.read_text()
    config = yaml.safe_load(before)
    config["prompts"]["evaluation"]["seed"] = 108
    config["mask"]["iterations"] = 7
    file.write_text(yaml.safe_dump(config))
    try:
        assert again(house) == ["evaluation"]
    finally:
        file.write_text(before)


@pytest.mark.slow
def test_all_stages_run_on_a_tiny_model(tmp_path):
    tiny_models(tmp_path)
    call = {"num_inference_steps": 2, "max_sequence_length": 16, "height": 64, "width": 64}
    prompts = {"source": "shapeworld", "split": "held-out", "count": 4}
    config = {
        "run": "small",
        "models": {"tiny": {"source": "tiny", "call": call, "load": {"device": "cpu"}}},
        "variants": [
            {"method": "ecodiff", "sparsities": [0.2], "retrain": "lora"},
            {"method": "magnitude", "sparsities": [0.2], "compensation": True},
        ],
        "prompts": {"calibration": {**prompts, "split": "train", "seed": 9}, "evaluation": prompts},
        "mask": {"iterations": 2, "batch": 2},
        "retrain": {"lora": {"steps": 2, "batch": 2, "rank": 2}},
        "generate": {"shard_size": 3},
        "evaluate": {
            "features": "clip",
            "clip_model": "local-dir:clip",
            "clip_pretrained": None,
            "efficiency": {"repeats": 1, "warmup": 0},
            "mask_cost": {"steps": [1, 2], "batch": 1},
        },
        "ablations": {"prompts": "evaluation", "judged_at": [0.1], "vary": {"batch": [1]}},
        "allow_overlap": True,
    }
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(config))
    done = snakemake(tmp_path, "--configfile", "small.yaml", "--cores", 2)
    assert done.returncode == 0, done.stdout + done.stderr
    results = tmp_path / "results/small"
    table = pd.read_csv(results / "tables/main.csv")
    assert table["variant"].tolist() == ["dense", "ecodiff-20-lora", "magnitude-20-comp"]
    dense, *pruned = table["sparsity"]
    assert dense == 0
    # Less than a unit over; the largest, a head of both streams, is 5 % of so small a model.
    assert all(0.2 <= sparsity < 0.2 + 0.051 for sparsity in pruned)
    assert len(list((results / "figures").glob("*.png"))) == 7
    assert "ecodiff" in done.stdout.lower()
    assert "tables: results/small/tables" in done.stdout
    resolved = load_config(results / "config.yaml")
    assert resolved.models["tiny"].mask.iterations == 2
    done = snakemake(tmp_path, "--configfile", "small.yaml", "--cores", 2, "ablations")
    assert done.returncode == 0, done.stdout + done.stderr
    table = pd.read_csv(results / "tables/ablations.csv")
    assert table["setting"].tolist() == ["default", "batch"]
    assert (table["latent_error"] > 0).all()


@pytest.mark.slow
def test_a_job_on_two_gpus_is_two_processes_that_make_what_one_makes_of_the_doubled_batch(tmp_path):
    """As the rules start them, on the CPU; the first one claims, writes and speaks."""
    made = []
    for gpus, batch in ((2, 1), (1, 2)):
        folder = tmp_path / str(gpus)
        folder.mkdir()
        tiny_models(folder)
        config = tiny_run(
            variants=[{"method": "ecodiff", "sparsities": [0.2], "retrain": "light"}],
            mask={"batch": batch, "iterations": 3, "modulation": "channels"},
            retrain={"light": {"steps": 3, "batch": batch, "states": "dense"}},
        )
        config["models"]["tiny"]["resources"] = {"gpu": gpus, "mem_mb": 100, "runtime": 1}
        target = "results/small/tiny/ecodiff-20-light/model"
        done = run(folder, config, target, "--resources", f"gpu={gpus}")
        assert done.returncode == 0, done.stdout + done.stderr
        weights = folder / target / "transformer/diffusion_pytorch_model.safetensors"
        mask = folder / "results/small/tiny/masks/ecodiff-20/mask.safetensors"
        made.append((load_file(weights), load_file(mask)))
        log = (folder / "results/small/logs/tiny/mask/ecodiff-20.log").read_text()
        assert log.count("mask 3/3") == 1
    (two, masks), (one, mask) = made
    assert all(torch.equal(masks[key], mask[key]) for key in mask if key.startswith("kept/"))
    assert two.keys() == one.keys()
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-4, atol=1e-5)
