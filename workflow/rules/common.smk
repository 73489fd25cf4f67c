import inspect
import os
import re
import sys
from pathlib import Path

import yaml

from snakemake.jobs import Job

from ecodiff.config.plan import Plan
from ecodiff.config.run import load_planned
from ecodiff.config.sections import SEEN_BY
from ecodiff.runtime import forkserver
from ecodiff.runtime.artifacts import write_text
from ecodiff.runtime.code import code_hash
from ecodiff.runtime.errors import UserError, users_fault
from ecodiff.runtime.slurm import left_behind, profile_mistake
from ecodiff.toys import TOYS

if mistake := profile_mistake(sys.argv, Path(workflow.basedir)):
    print(mistake, file=sys.stderr)
    sys.exit(2)

try:
    run, absent = load_planned(config, workflow.configfiles)
    if absent and not workflow.output_settings.dryrun:
        raise UserError("\n".join(absent))
except UserError as error:
    # A WorkflowError would print where it came from too; these lines say all that a user needs.
    print("\n".join(f"config: {line}" for line in str(error).splitlines()), file=sys.stderr)
    sys.exit(2)

for line in absent:
    print(f"config: needed before a run: {line}", file=sys.stderr)

plan = Plan(run)
CONFIG = f"{plan.results}/config.yaml"  # written when a run starts; jobs read their sections of it
SETTINGS = plan.config.model_dump(mode="json")  # complete, so that `lookup` finds defaults too

# Jobs find the command in the active environment, or else in the one that Snakemake runs in, and
# keep what Python compiles even where containers forbid it: they start in half the time.
os.environ.update(
    PATH=os.pathsep.join([os.environ.get("PATH", ""), str(Path(sys.executable).parent)]),
    ECODIFF_PROJECT=str(Path(workflow.basedir).resolve()),  # environment.post-deploy.sh reads it
)
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


pathvars:
    results=plan.results,
    logs=f"{plan.results}/logs",
    benchmarks=f"{plan.results}/benchmarks",


def one_of(names):
    """A wildcard's constraint to known values; to none when there are no values."""
    return "|".join(sorted({re.escape(str(name)) for name in names})) or r"\b\B"


wildcard_constraints:
    model=one_of(plan.config.models),
    variant=one_of(plan.names()),
    set=one_of(plan.config.prompts),
    shard=r"\d+",


def of(function):
    """A function of the plan for a rule: called with those wildcards that it names."""
    names = inspect.signature(function).parameters
    return lambda wildcards: function(
        **{name: value for name, value in wildcards.items() if name in names}
    )


def settings(dpath):
    """A part of the config, as a parameter: a job runs again when what it reads of CONFIG changes."""
    return lookup(dpath=dpath, within=SETTINGS)


def resource(name):
    """What a job that holds a model asks for, from that model's section; each try asks for more."""

    def asked(wildcards, attempt):
        return attempt * getattr(plan.config.models[wildcards.model].resources, name)

    return asked


def growing(amount):
    """An amount of memory or time that each try asks more of."""
    return lambda wildcards, attempt: attempt * amount


def gpus(launched=False):
    """The GPUs of a job: all of its model's where it takes several, else one.

    Args:
        launched: whether `launch` starts a process on each.
    """

    def asked(wildcards):
        model = plan.config.models[wildcards.model]
        several = launched or model.load.device_map is not None
        return model.resources.gpu if several else min(1, model.resources.gpu)

    return asked


def tries_left(job):
    """How often a job that failed is tried again: not at all where only its user can mend it.

    The next try writes over the log, so it is kept under the try's number.
    """
    logs = [Path(log) for log in job.log]
    if any(map(users_fault, logs)):
        return 0
    if job.attempt <= job.rule.restart_times:
        for log in filter(Path.exists, logs):
            log.replace(log.with_suffix(f".try-{job.attempt}.log"))
    return job.rule.restart_times


Job.restart_times = property(tries_left)  # Snakemake asks it when a job has failed, and only then


def each(flag, name):
    """A flag before each file of a named input, which may be one file, several or none."""

    def flags(wildcards, input):
        found = input.get(name) or []
        return [
            word for path in ([found] if isinstance(found, str) else found) for word in (flag, path)
        ]

    return flags


def launch(wildcards):
    """What starts a job on several GPUs, a process on each; nothing for one."""
    gpus = plan.config.models[wildcards.model].resources.gpu
    start = (
        "accelerate launch --multi_gpu --num_machines 1 --mixed_precision no --dynamo_backend no"
    )
    return f"{start} --num_processes {gpus} --no_python " if gpus > 1 else ""


def all_cores():
    """A measurement takes the whole machine; on a cluster, the profile asks for a whole node."""
    return workflow.resource_settings.cores or 1


def toy_inputs(toy):
    """The autoencoder that both toy pipelines are trained on."""
    return "results/toys/toy-vae" if toy in ("toy-sdxl", "toy-flux") else []


# The stage of the workflow that a figure tells of: its category in `snakemake --report`.
TELLS_OF = {
    "learning": "3 mask",
    "mask-cost": "3 mask",
    "removed": "4 prune",
    "analysis": "4 prune",
    "pictures": "6 generate",
    "quality": "7 evaluate",
    "cost": "7 evaluate",
}


def shown(file, name, category, model="all"):
    """A file in the report, with the caption of its name."""
    labels = {"result": name, "model": model, "format": file.rpartition(".")[2]}
    return report(file, caption=f"../report/{name}.rst", category=category, labels=labels)


def shown_table(name):
    """A table that can be sorted, and its raw values."""
    file = f"{plan.results}/tables/{name}"
    return [shown(f"{file}.{suffix}", name, "7 evaluate") for suffix in ("html", "csv")]


def figure_files(suffix):
    """All figures: (name, model, file)."""
    return [
        (name, model, f"{plan.results}/figures/{name}-{model}.{suffix}")
        for model in plan.config.models
        for name in plan.figures(model)
    ]


def shown_figures():
    return [shown(file, name, TELLS_OF[name], model) for name, model, file in figure_files("png")]


def begin():
    """Writes all values of the run, defaults included, and makes jobs of this machine start at once.

    On a cluster, what a killed Snakemake left in the queue has to go first.
    """
    name = getattr(workflow.scheduler._executor, "run_uuid", None)  # of all jobs, on SLURM
    if name is not None:
        file = Path(plan.results, "logs/slurm-name.txt")
        before = file.read_text() if file.exists() else ""
        if left := left_behind(before):
            print(
                f"slurm: jobs {', '.join(left)} of this run go on from a Snakemake that was killed;"
                f" wait for them, or scancel --name {before}; then again",
                file=sys.stderr,
            )
            sys.exit(2)
        write_text(file, name)
        if workflow.resource_settings.cores:
            print("slurm: --cores caps the threads of each job; leave it out", file=sys.stderr)
    text = yaml.safe_dump(SETTINGS, sort_keys=False)
    if not Path(CONFIG).is_file() or Path(CONFIG).read_text() != text:
        write_text(CONFIG, text)
    if workflow.local_exec and forkserver.SOCKET not in os.environ:
        os.environ.update({forkserver.SOCKET: forkserver.start()})


def summarise():
    """Prints the main table, if there is one, and where everything is."""
    table = Path(plan.results, "tables/main.csv")
    if table.exists():
        import pandas

        from ecodiff.report.tables import print_table

        print_table(pandas.read_csv(table))
    places = {"tables": "tables", "figures": "figures", "pictures": "index.html"}
    places |= {"settings": "config.yaml"}
    for name, place in places.items():
        if Path(plan.results, place).exists():
            print(f"{name}: {plan.results}/{place}")
