"""What verbs share: their options, where settings come from, how a model is loaded."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from ecodiff.config.reading import read_settings
from ecodiff.config.run import Config, load_config
from ecodiff.config.sections import CallSettings, LoadSettings, Settings
from ecodiff.runtime.artifacts import check_output, manifest_of
from ecodiff.runtime.errors import UserError
from ecodiff.runtime.locks import claimed
from ecodiff.runtime.provenance import begin

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Model = Annotated[str, typer.Argument(help="Hub id, folder or file of a diffusers pipeline.")]
Table = Annotated[Path, typer.Argument(help="Prompt table, as `ecodiff prompts` writes it.")]
Record = Annotated[Path, typer.Argument(help="What `ecodiff calibrate` wrote.")]
Out = Annotated[Path, typer.Argument(help="Where to write.")]
Run = Annotated[Path, typer.Argument(help="results/<run>, with its config.yaml.")]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="A run's config: settings come from its sections.")
]
Of = Annotated[
    str | None, typer.Option("--model", help="The model in that config, for its own sections.")
]
Text = Annotated[
    str | None, typer.Option(help="Settings, put over the config's: YAML file or text.")
]
Load = Annotated[str | None, typer.Option(help="dtype, device, revision, variant: YAML.")]
Call = Annotated[str | None, typer.Option(help="How to call the pipeline: YAML file or text.")]
Batch = Annotated[int, typer.Option(min=1, help="Prompts that run together.")]
Shard = Annotated[int, typer.Option(min=0, help="Which part of the table.")]
ShardSize = Annotated[int | None, typer.Option(min=1, help="Rows a part; all.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:<n>.")]

S = TypeVar("S", bound=Settings)


@dataclass(frozen=True)
class Source:
    """Where a verb's settings come from: the defaults, a run's config over them, options over both.

    Attributes:
        config: the file of a run's config; None for defaults.
        model: the model of that config whose sections count.
    """

    config: Path | None = None
    model: str | None = None

    @cached_property
    def run(self) -> Config | None:
        """The whole config."""
        return None if self.config is None else load_config(self.config)

    def read(self, kind: type[S], text: str | None, *path: str, option: str = "--settings") -> S:
        """The settings of a section, changed by what an option says.

        Args:
            kind: the section's class.
            text: YAML file or text; None changes nothing.
            path: where the section lies in the config; those of models lie below `models`.
            option: what gave the text, for messages.

        Raises:
            UserError: the config has no such section, or a value is not allowed.
        """
        if self.run is None:
            return read_settings(kind, text, name=option)
        found: Any = self.run.model_dump(mode="json")
        for key in path:
            if not isinstance(found, dict) or found.get(key) is None:
                raise UserError(f"{self.config}: there is no section {'.'.join(path)}")
            found = found[key]
        return read_settings(kind, text, found, name=option)

    def of_model(
        self, kind: type[S], text: str | None, *path: str, option: str = "--settings"
    ) -> S:
        """The settings of a section that each model has of its own."""
        if self.run is not None and self.model is None:
            raise UserError("--config needs --model: one of " + ", ".join(self.run.models))
        return self.read(kind, text, "models", self.model or "", *path, option=option)

    def call(self, text: str | None) -> dict[str, Any]:
        """How the pipeline is called, as its keyword arguments."""
        return self.of_model(CallSettings, text, "call", option="--call").model_dump(
            exclude_none=True
        )

    def load(self, model: str, text: str | None, **changes: Any) -> DiffusionPipeline:
        """Load a pipeline; `changes` are keywords of `load_pipeline` that a verb insists on."""
        from ecodiff.models.loading import load_pipeline
        from ecodiff.runtime.devices import choose_device, keep_freed_memory

        keep_freed_memory()
        chosen = self.of_model(LoadSettings, text, "load", option="--load").model_dump() | changes
        device = choose_device(chosen["device"])
        wanted = self.run.models[self.model or ""].resources.gpu if self.run else 0
        if wanted and chosen["device"] == "auto" and device == "cpu":
            raise UserError(
                f"models.{self.model}.resources.gpu: {wanted}, but torch sees no GPU here;"
                " load.device: cpu computes without"
            )
        return load_pipeline(model, **{**chosen, "device": device})


@contextmanager
def job(
    stage: str,
    *files: Path,
    folders: Sequence[Path] = (),
    reads: Sequence[str | Path | None] = (),
    bytes_needed: int = 0,
    **details: Any,
) -> Iterator[dict[str, Any]]:
    """Around the work of a verb: it may write its outputs, no other process makes them meanwhile,
    and in the end each has a manifest.

    Args:
        stage: the module that does the work.
        files, folders: what it writes.
        reads: files, folders and names of models that it reads; None is skipped.
        bytes_needed: about how much it writes.
        details: what the manifest says of settings; more can be put into what is given.

    Raises:
        UserError, OSError: of `check_output` and `claimed`, before any work.
    """
    outputs = [*files, *folders]
    for out in outputs:
        others = [other for other in outputs if other is not out]
        others += [*map(manifest_of, outputs), *reads]
        check_output(out, stage, folder=out in folders, others=others, bytes_needed=bytes_needed)
    with ExitStack() as claims:
        if is_first():
            for out in outputs:
                claims.enter_context(claimed(out, stage))
        begun = begin(stage, filter(None, reads))
        yield details
        for out in outputs:
            begun.write_manifest(out, details)


def is_first() -> bool:
    """Whether this process writes and speaks: the only one, or the first of `accelerate launch`."""
    return os.environ.get("RANK", "0") == "0"


def weight_bytes(model: str) -> int:
    """The bytes of a model's weights; 0 where it is no local file or folder."""
    path = Path(model)
    files = [path] if path.is_file() else path.rglob("*.safetensors")
    return sum(file.stat().st_size for file in files)


def variants(pairs: list[str]) -> dict[str, str]:
    """The values of `--variant name=value`, the dense one's first.

    Raises:
        UserError: one has another form, two have one name, or the first is not the dense one.
    """
    found: dict[str, str] = {}
    for pair in pairs:
        name, _, value = pair.partition("=")
        if not name or not value:
            raise UserError(f"--variant: {pair!r} is not name=value")
        if name in found:
            raise UserError(f"--variant: {name} is given twice: {found[name]} and {value}")
        found[name] = value
    if next(iter(found), None) != "dense":
        raise UserError("--variant: the first one must be dense=..., which others are compared to")
    return found
