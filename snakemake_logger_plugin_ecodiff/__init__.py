"""How a run is watched: `snakemake --logger ecodiff`, which the default profile asks for.

On a terminal: a bar for each stage that has begun, the jobs that run, and the time that is left.
Elsewhere: one line a finished job. Both show the end of a failed job's log; Snakemake's own
messages go to the file that it keeps below `.snakemake/log`. A dry-run is shown as Snakemake shows
it.
"""

from __future__ import annotations

import logging
import re
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text
from snakemake.logging import DefaultFilter, DefaultFormatter
from snakemake_interface_logger_plugins.base import LogHandlerBase
from snakemake_interface_logger_plugins.common import LogEvent

from ecodiff.config.reading import read_document
from ecodiff.runtime.errors import ERROR, UserError

TAIL = 15  # lines of a failed job's log
ONE_LINE = {
    "cannot be locked": "another run works in this folder; when none does (it was killed): "
    "snakemake --unlock",
}
# What a failed job says better itself.
SAID_BETTER = (
    "Exiting because a job",
    "Error in rule",
    "RuleException",
    "WorkflowError:\nAt least one",
)
# Parts of what Snakemake says when it cannot read a config file.
CONFIG_UNREAD = ("load_configfile", "Config file is not valid", "Config file must be")
# Said by Snakemake without an event, and worth a line.
WORTH_SAYING = ("Nothing to be done", "Unlocking")


class LogHandler(LogHandlerBase):
    """Snakemake's door to this module."""

    writes_to_stream = True
    writes_to_file = False
    has_filter = True
    has_formatter = True
    needs_rulegraph = False

    def __post_init__(self) -> None:
        self.console = Console(stderr=not self.common_settings.stdout, highlight=False)
        if self.common_settings.dryrun:
            self.watch: Watch | Plain = Plain(self.console, self.common_settings)
        else:
            self.watch = Watch(self.console)

    def emit(self, record: logging.LogRecord) -> None:
        """Shows a message of Snakemake's."""
        try:
            self.watch.show(record)
        except Exception:  # a message that cannot be shown must not end a run
            self.handleError(record)

    def close(self) -> None:
        """Leaves the terminal as it was."""
        self.watch.end()
        super().close()


class Plain:
    """Messages as Snakemake words them."""

    def __init__(self, console: Console, settings: Any) -> None:
        self.console = console
        self.formatter = DefaultFormatter(settings.quiet, settings.show_failed_logs)
        self.filter = DefaultFilter(
            settings.quiet,
            settings.debug_dag,
            settings.verbose,
            settings.dryrun,
            settings.printshellcmds,
        )

    def show(self, record: logging.LogRecord) -> None:
        """Print a message unless it is filtered."""
        if self.filter.filter(record):
            print(self.formatter.format(record), file=self.console.file)

    def end(self) -> None:
        """Nothing is left to do."""


class Watch:
    """What is done, what runs and what is left of a run."""

    def __init__(self, console: Console) -> None:
        self.console, self.began = console, time.monotonic()
        self.jobs: dict[int, tuple[str, str, float]] = {}  # id -> rule, what of it, when it began
        self.planned: Counter[str] = Counter()
        self.done: Counter[str] = Counter()
        self.seconds: defaultdict[str, list[float]] = defaultdict(list)
        self.failed: dict[int, str] = {}  # id -> what failed, and why in a line
        self.bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            console=console,
            expand=True,
        )
        self.tasks: dict[str, Any] = {}
        self.live = Live(
            get_renderable=self._screen, console=console, refresh_per_second=4, transient=True
        )

    def show(self, record: logging.LogRecord) -> None:
        """Take note of a message, and print what a person should read of it."""
        match getattr(record, "event", None):
            case LogEvent.RUN_INFO:
                self._plan(record.stats)
            case LogEvent.JOB_INFO:
                self._begin(record)
            case LogEvent.JOB_FINISHED:
                self._finish(record.job_id)
            case LogEvent.JOB_ERROR:
                self._fail(record)
            case LogEvent.ERROR:
                self._say(record)
            case None:
                message = record.getMessage()
                if record.levelno >= logging.WARNING or message.startswith(WORTH_SAYING):
                    self._say(record)

    def end(self) -> None:
        """Take the bars away; what failed is said last, each reason once."""
        if self.live.is_started:
            self.live.stop()
        for line in dict.fromkeys(self.failed.values()):
            self.console.print(Text(line, "red"), soft_wrap=True)
        self.failed.clear()

    def left(self) -> float | None:
        """Seconds until all is done; None before any job has ended.

        Each job is taken to last as long as those of its rule, or else as the mean of all, as many
        at once as have run at once so far.
        """
        known = {rule: mean(found) for rule, found in self.seconds.items()}
        if not known:
            return None
        usual = mean(second for found in self.seconds.values() for second in found)
        work = sum(
            (count - self.done[rule]) * known.get(rule, usual)
            for rule, count in self.planned.items()
        )
        now = time.monotonic()
        running = sum(
            min(now - began, known.get(rule, usual)) for rule, _, began in self.jobs.values()
        )
        at_once = sum(map(sum, self.seconds.values())) + running
        return max(0.0, work - running) / max(1.0, at_once / max(now - self.began, 1e-3))

    def _plan(self, stats: dict[str, int]) -> None:
        self.planned = Counter({rule: n for rule, n in stats.items() if rule != "total"})
        self.began = time.monotonic()
        self.console.print(f"{self.planned.total()} jobs")
        if self.console.is_terminal:
            self.tasks["all"] = self.bars.add_task("all", total=self.planned.total())
            self.live.start()

    def _begin(self, job: Any) -> None:
        named = (str(value) for value in (job.wildcards or {}).values())
        names = "/".join(value for value in named if value)
        self.jobs[job.jobid] = (job.rule_name, names, time.monotonic())
        if job.rule_name not in self.tasks:
            total = self.planned[job.rule_name]
            self.tasks[job.rule_name] = self.bars.add_task(job.rule_name, total=total)

    def _finish(self, job: int) -> None:
        rule, names, began = self.jobs.pop(job)
        took = time.monotonic() - began
        self.seconds[rule].append(took)
        self.done[rule] += 1
        self.failed.pop(job, None)  # its second try was better
        self.bars.advance(self.tasks[rule])
        if "all" in self.tasks:
            self.bars.advance(self.tasks["all"])
        else:
            what = " ".join([rule, names]).strip()
            counted = f"[{self.done.total()}/{self.planned.total()}]"
            left = f"about {span(self.left() or 0)} left"
            self.console.print(Text(f"{counted} {what} ({span(took)}), {left}"), soft_wrap=True)
        if self.done == self.planned:
            self.end()

    def _fail(self, job: Any) -> None:
        rule, names, _ = self.jobs.pop(job.jobid, (job.rule_name, "", 0.0))
        if job.jobid in self.failed:  # told when it failed, and by Snakemake again at the end
            return
        what = f"{rule} {names}".strip()
        self.console.print(Text(f"failed: {what}", "bold red"), soft_wrap=True)
        said, began = of_slurm(getattr(job, "rule_msg", None) or "")
        reasons = [f"{what} failed", *said]
        for line in said:
            self.console.print(Text(f"  {line}"), soft_wrap=True)
        for path in (job.log or ()) if began else ():
            lines = tail(Path(path))
            for line in lines:
                self.console.print(Text(f"  {line}"), soft_wrap=True)
            self.console.print(Text(f"  log: {path}", "dim"), soft_wrap=True)
            if lines and ERROR in lines[-1]:
                reasons = [lines[-1]]
                break
            killed = "" if lines else " (empty: it was killed; out of memory or time?)"
            reasons.append(f"see {path}{killed}")
        self.failed[job.jobid] = "; ".join(reasons)

    def _say(self, record: logging.LogRecord) -> None:
        message = record.getMessage().strip()
        if any(part in message for part in CONFIG_UNREAD):
            message = config_mistake(sys.argv) or message
        for part, line in ONE_LINE.items():
            if part in message:
                message = line
        if message.startswith(SAID_BETTER) or not message:
            return
        style = "red" if record.levelno >= logging.ERROR else ""
        self.console.print(Text(message, style), soft_wrap=True)

    def _screen(self) -> Group:
        """The bars, and below them the jobs that run."""
        now = time.monotonic()
        lines = [
            Text(f"{rule} {names} ({span(now - began)})", no_wrap=True, overflow="ellipsis")
            for rule, names, began in self.jobs.values()
        ]
        left = self.left()
        time_left = "" if left is None else f", about {span(left)} left"
        return Group(self.bars, *lines, Text(f"{span(now - self.began)} so far{time_left}"))


def config_mistake(words: Sequence[str]) -> str | None:
    """What is wrong with the config files of a command line, which Snakemake tells by a traceback.

    None when there is nothing wrong with them.
    """
    begin = next((n for n, word in enumerate(words) if word.startswith("--configfile")), len(words))
    first = words[begin].partition("=")[2:] if begin < len(words) else ()
    rest = takewhile(lambda word: not word.startswith("-"), words[begin + 1 :])
    for file in [*filter(None, first), *rest]:
        if not Path(file).exists() and not Path(file).suffix:
            return (
                f"config: there is no file {file}; Snakemake takes every word behind --configfile "
                "for one, so name targets before it"
            )
        try:
            document = read_document(Path(file))
        except UserError as error:
            return "\n".join(f"config: {line}" for line in str(error).splitlines())
        if not isinstance(document.values, dict):
            return f"config: {file}: should be a mapping of sections"
    return None


def of_slurm(message: str) -> tuple[list[str], bool]:
    """What SLURM says of a job that failed, in a line, and whether the job began at all."""
    if refused := re.search(r"The error message was '(.*?)'\.?\n", message, re.DOTALL):
        words = " ".join(refused[1].split()).removeprefix("sbatch: error: ")
        return [f"slurm: {words.replace('sbatch: error: ', '')}"], False
    if ended := re.search(r"SLURM-job '(\w+)' failed, SLURM status is: '(\w+)'", message):
        return [f"slurm: job {ended[1]} ended as {ended[2]}"], True
    return [], True


def tail(log: Path) -> list[str]:
    """The end of a failed job's log: the error of the user's when it is one, or the last lines."""
    try:
        lines = log.read_text(errors="replace").splitlines()
    except OSError:
        return []
    errors = [line for line in lines if line.startswith(ERROR)]
    return errors[-1:] or lines[-TAIL:]


def span(seconds: float) -> str:
    """A time for people: 8 s, 2 min 05 s, 1 h 20 min."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
