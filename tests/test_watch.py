"""What a person sees of a run, from the messages that Snakemake sends."""

import io
import logging
from types import SimpleNamespace

import pytest
from rich.console import Console
from snakemake_interface_logger_plugins.common import LogEvent

import snakemake_logger_plugin_ecodiff as plugin
from snakemake_logger_plugin_ecodiff import Watch, span, tail


@pytest.fixture
def clock(monkeypatch):
    """A clock that tests turn."""
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(plugin.time, "monotonic", lambda: now.seconds)
    return now


def record(event=None, message="", level=logging.INFO, **fields):
    found = logging.LogRecord("snakemake", level, "", 0, message, None, None)
    found.__dict__.update(fields, **({} if event is None else {"event": event}))
    return found


def begin(job, rule, log=(), **wildcards):
    return record(LogEvent.JOB_INFO, jobid=job, rule_name=rule, wildcards=wildcards, log=log)


class Seen:
    """A run that is watched on a terminal, or not, of some width."""

    def __init__(self, terminal=False, width=80):
        self.file = io.StringIO()
        console = Console(file=self.file, force_terminal=terminal, width=width, highlight=False)
        self.watch = Watch(console)

    def __call__(self, *records):
        before = len(self.file.getvalue())
        for one in records:
            self.watch.show(one)
        return self.file.getvalue()[before:]


PLAN = record(LogEvent.RUN_INFO, stats={"prune": 2, "generate": 2, "total": 4})


def ended(job):
    return record(LogEvent.JOB_FINISHED, job_id=job)


def test_elsewhere_each_finished_job_is_a_line(clock):
    seen = Seen()
    assert seen(PLAN) == "4 jobs\n"
    assert seen(begin(1, "prune", model="toy", variant="ecodiff-20")) == ""
    clock.seconds = 65
    line = seen(ended(1))
    assert line == "[1/4] prune toy/ecodiff-20 (1 min 05 s), about 3 min 15 s left\n"


def test_time_left_knows_what_each_stage_takes_and_how_many_jobs_run_at_once(clock):
    seen = Seen()
    seen(PLAN, begin(1, "prune"), begin(2, "generate"))
    clock.seconds = 10
    seen(ended(1))
    clock.seconds = 30
    seen(ended(2))
    # 40 s of work in 30 s; a prune of 10 s and a generate of 30 s are left.
    assert seen.watch.left() == pytest.approx(30)
    seen(begin(3, "prune"))
    clock.seconds = 34
    # 4 of the 40 s have been worked since; 44 s of work in 34 s.
    assert seen.watch.left() == pytest.approx(36 / (44 / 34))


def test_a_terminal_shows_stages_that_have_begun_and_the_jobs_that_run(clock):
    seen = Seen(terminal=True)
    seen(PLAN, begin(1, "prune", model="toy"))
    clock.seconds = 7
    seen.watch.end()
    with seen.watch.console.capture() as captured:
        seen.watch.console.print(seen.watch._screen())
    shown = captured.get()
    assert "prune toy (7 s)" in shown
    assert "0/2" in shown and "0/4" in shown
    assert "generate" not in shown


@pytest.mark.parametrize("width", [40, 60])
def test_a_narrow_terminal_has_a_line_a_stage_and_a_line_a_job(clock, width):
    seen = Seen(terminal=True, width=width)
    seen(PLAN, begin(1, "prune", model="a-model-of-a-very-long-name", variant="ecodiff-20-comp"))
    seen.watch.end()
    with seen.watch.console.capture() as captured:
        seen.watch.console.print(seen.watch._screen())
    assert len(captured.get().splitlines()) == 4  # all, prune, the job, the time


def test_a_failed_job_is_told_once_with_the_end_of_its_log(tmp_path, clock):
    log = tmp_path / "x.log"
    log.write_text("\n".join(f"line {number}" for number in range(100)))
    failed = begin(1, "prune", [str(log)], model="toy")
    failed.event = LogEvent.JOB_ERROR
    seen = Seen()
    shown = seen(PLAN, begin(1, "prune", model="toy"), failed)
    assert "failed: prune toy" in shown
    assert "line 99" in shown and "line 84" not in shown
    assert str(log) in shown
    assert seen(failed) == ""


def test_reasons_are_said_last_and_once(tmp_path, clock):
    log = tmp_path / "x.log"
    log.write_text("ecodiff: error: call: no\n")
    seen = Seen()
    seen(PLAN)
    for job in (1, 2):
        failed = begin(job, "generate", [str(log)], shard=job)
        failed.event = LogEvent.JOB_ERROR
        seen(failed)
    seen(record(None, "WorkflowError:\nAt least one job did not complete.", logging.ERROR))
    before = len(seen.file.getvalue())
    seen.watch.end()
    assert seen.file.getvalue()[before:] == "ecodiff: error: call: no\n"


def test_a_job_whose_second_try_ends_well_has_not_failed(tmp_path, clock):
    failed = begin(1, "prune")
    failed.event = LogEvent.JOB_ERROR
    seen = Seen()
    seen(PLAN, begin(1, "prune"), failed, begin(1, "prune"), ended(1))
    before = len(seen.file.getvalue())
    seen.watch.end()
    assert seen.file.getvalue()[before:] == ""


def test_an_error_of_the_users_is_its_line_alone(tmp_path):
    log = tmp_path / "x.log"
    log.write_text("loading\necodiff: error: call: no\n")
    assert tail(log) == ["ecodiff: error: call: no"]


REFUSED = (
    "SLURM sbatch failed. The error message was 'sbatch: error: invalid partition specified: x\n"
    "sbatch: error: Batch job submission failed: Invalid partition name specified'.\n"
    "    sbatch call:"
)


def last_line(job):
    """What is said in the end of a run in which a job failed."""
    seen = Seen()
    seen(PLAN, job)
    before = len(seen.file.getvalue())
    seen.watch.end()
    return seen.file.getvalue()[before:].strip()


def test_what_slurm_refuses_is_its_reason_and_no_old_log(tmp_path):
    log = tmp_path / "x.log"
    log.write_text("ecodiff: error: call: of last week\n")
    failed = begin(1, "mask", [str(log)])
    failed.event, failed.rule_msg = LogEvent.JOB_ERROR, REFUSED
    line = last_line(failed)
    assert line.startswith("mask failed; slurm: invalid partition specified: x Batch job")
    assert "last week" not in line


def test_a_job_that_slurm_killed_says_how_it_ended_and_where_to_look(tmp_path):
    log = tmp_path / "x.log"
    log.touch()
    failed = begin(1, "mask", [str(log)])
    failed.event = LogEvent.JOB_ERROR
    failed.rule_msg = "SLURM-job '7' failed, SLURM status is: 'OUT_OF_MEMORY'. Detailed"
    line = last_line(failed)
    assert line.startswith("mask failed; slurm: job 7 ended as OUT_OF_MEMORY; see ")
    assert "(empty: it was killed" in line


def test_a_log_that_is_not_there_is_no_fault(tmp_path):
    assert tail(tmp_path / "none") == []


def test_a_lock_is_one_line_that_says_what_to_do():
    text = "Error: Directory cannot be locked. Please make sure that\nno other\n/x"
    shown = Seen()(record(LogEvent.ERROR, text, logging.ERROR))
    assert shown.count("\n") == 1
    assert "--unlock" in shown


@pytest.mark.parametrize("message", ["Nothing to be done (all requested files are present)."])
def test_what_ends_a_run_early_is_said(message):
    assert Seen()(record(None, message)) == message + "\n"


@pytest.mark.parametrize("message", ["Building DAG of jobs...", "Select jobs to execute..."])
def test_what_only_snakemake_needs_is_not(message):
    assert Seen()(record(None, message)) == ""


def test_warnings_are_said():
    assert "careful" in Seen()(record(None, "careful", logging.WARNING))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(8, "8 s"), (125, "2 min 05 s"), (4800, "1 h 20 min"), (59.7, "1 min 00 s")],
)
def test_times_are_for_people(seconds, text):
    assert span(seconds) == text


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"run: caf\xe9\n", "line 1"),
        (b"run: [a\nmodels: 1\n", "not YAML"),
        (b"", "should be a mapping"),
        (b"- a\n", "should be a mapping"),
    ],
)
def test_a_config_file_that_cannot_be_read_is_a_line(tmp_path, content, line):
    file = tmp_path / "c.yaml"
    file.write_bytes(content)
    found = plugin.config_mistake(["snakemake", "--configfile", str(file), "--cores", "1"])
    assert found.startswith(f"config: {file}") and line in found
    assert "\n" not in found


def test_a_config_file_that_is_not_there_is_a_line(tmp_path):
    found = plugin.config_mistake(["snakemake", f"--configfile={tmp_path}/no.yaml"])
    assert found == f"config: {tmp_path}/no.yaml: there is no such file"


def test_a_target_behind_the_config_file_is_told_apart(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("run: a\n")
    found = plugin.config_mistake(["snakemake", "--configfile", str(file), "tables"])
    assert "no file tables" in found and "targets before it" in found


def test_config_files_without_a_mistake_are_none(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("run: a\n")
    assert plugin.config_mistake(["snakemake", "--configfile", str(file)]) is None
    assert plugin.config_mistake(["snakemake"]) is None


def test_snakemakes_traceback_about_a_config_file_is_that_line(tmp_path, monkeypatch):
    monkeypatch.setattr(plugin.sys, "argv", ["snakemake", "--configfile", "tables"])
    text = "Traceback (most recent call last):\n load_configfile(f)\nFileNotFoundError: tables"
    shown = Seen()(record(LogEvent.ERROR, text, logging.ERROR))
    assert shown.startswith("config: there is no file tables") and shown.count("\n") == 1
