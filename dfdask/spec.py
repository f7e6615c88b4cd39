"""The job: what to make, from what, with which model. Validated once, frozen, described completely.

Every problem is a SpecError that reads "where: what is wrong, got value; what to do"; all problems of a job
come in one message.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    Discriminator,
    Field,
    PrivateAttr,
    StrictBool,
    StrictInt,
    StrictStr,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from dfdask.arguments import canonical_json, check_argument, check_argument_name, shown
from dfdask.errors import SpecError
from dfdask.job_file import Lines, load_yaml
from dfdask.problems import explain, located, problem
from dfdask.scale_spec import Scale
from dfdask.spec_parts import Adapter, Count, Name, Part, Scheduler, prompt_entry
from dfdask.speed import Quantization, Speed

StageName = Annotated[StrictStr, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_-]*$")]
ITEM_KEYS = ("prompt", "id", "seed")


class PromptFile(Part):
    """Prompts in a file.

    ``columns`` says which column holds ``prompt``, ``id``, ``seed`` or a pipeline argument; null means: do
    not read it. ``limit`` keeps the first rows only.
    """

    file: Name = Field(examples=["prompts.txt"])
    columns: dict[StrictStr, Name | None] = Field(default={}, examples=["{prompt: caption}"])
    limit: Count | None = Field(default=None, examples=[100])

    @field_validator("file", mode="before")
    @classmethod
    def _path_text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, Path) else value

    @field_validator("columns")
    @classmethod
    def _known_columns(cls, value: dict[str, str | None]) -> dict[str, str | None]:
        for name in value:
            if name not in ITEM_KEYS:
                located((name,), check_argument_name, name)
        if value.get("prompt", "") is None:
            raise ValueError("must name the column of the prompts, got null; write e.g. {prompt: caption}")
        return value


Seconds = Annotated[float, Field(ge=0, strict=True)]


class FakeShift(Part):
    """Other seconds per item from the row ``at`` on: a change of the mix in mid-run."""

    at: Annotated[StrictInt, Field(ge=0)] = Field(examples=[300])
    stages: dict[StageName, Seconds] = Field(examples=["{encode: 0.3}"])


class FakeStages(Part):
    """A model without a model: stages that sleep, for tests, demonstrations and simulations.

    ``weights`` are the bytes of each stage's only component, ``load_seconds`` what bringing one to the device takes;
    ``speeds`` multiplies all seconds on workers of a device class. Items in ``fail`` raise (until the file
    ``fail_until`` exists), those in ``kill`` end their worker's process, both in ``fail_stage``.
    """

    stages: dict[StageName, Seconds] = Field(
        default={"encode": 0.0, "denoise": 0.0, "decode": 0.0}, min_length=1, examples=["{encode: 0.1}"]
    )  # seconds per item
    shift: FakeShift | None = Field(default=None, examples=["{at: 300, stages: {encode: 0.3}}"])
    weights: dict[StageName, Annotated[StrictInt, Field(ge=0)]] = {}
    load_seconds: Seconds = 0.0
    speeds: dict[Name, Annotated[float, Field(gt=0, strict=True)]] = {}
    handoff_bytes: Annotated[StrictInt, Field(ge=0)] = 0
    width: Count = 8
    height: Count = 8
    fail: list[StrictStr] = []
    fail_until: Name | None = Field(default=None, examples=["/tmp/mended"])
    kill: list[StrictStr] = []
    fail_stage: StageName = "denoise"

    @model_validator(mode="after")
    def _stages_exist(self) -> Self:
        if (self.fail or self.kill) and self.fail_stage not in self.stages:
            raise ValueError(f"`fail_stage` must be one of {list(self.stages)}, got {self.fail_stage!r}; name one")
        for key, named in (("weights", self.weights), ("shift.stages", self.shift.stages if self.shift else {})):
            unknown = [stage for stage in named if stage not in self.stages]
            if unknown:
                raise ValueError(f"`{key}` must name stages of {list(self.stages)}, got {unknown[0]!r}; correct it")
        return self


class FakeModel(Part):
    """``model: {fake: {...}}``."""

    fake: FakeStages = Field(examples=["{stages: {encode: 0.1, denoise: 1.0, decode: 0.1}}"])


class WorkerGroup(Part):
    """``count`` local workers that are bound to ``stages`` (None: the scheduler gives them what there is to do).

    ``device_class`` names what they run on where there are several kinds; ``memory`` are the bytes that components
    may take there.
    """

    count: Count = Field(default=1, examples=[2])
    stages: Annotated[list[Name], Field(min_length=1)] | None = Field(default=None, examples=["[encode, decode]"])
    device_class: Name | None = Field(default=None, examples=["h100"])
    memory: Count | None = Field(default=None, examples=[24000000000])

    @field_validator("stages")
    @classmethod
    def _unique(cls, value: list[str] | None) -> list[str] | None:
        if value and len(set(value)) < len(value):
            raise ValueError(f"must name each stage once, got {value}; remove the duplicates")
        return value


def _kind(single: type, name: str, several: str) -> Discriminator:
    """Tells a union's two members apart by their shape alone, so that problems name the user's keys."""
    return Discriminator(lambda value: f"<{name}>" if isinstance(value, (single, Mapping)) else f"<{several}>")


class JobSpec(Part):
    """A validated job. See ``jobs/README.md`` for what each key means."""

    model: Annotated[
        Annotated[Name, Tag("<name>")] | Annotated[FakeModel, Tag("<fake>")], _kind(FakeModel, "fake", "name")
    ] = Field(examples=["bundled"])
    prompts: Annotated[
        Annotated[list[Any], Tag("<list>")] | Annotated[PromptFile, Tag("<file>")],
        _kind(PromptFile, "file", "list"),
    ] = Field(examples=["prompts.txt"])
    images_per_prompt: Annotated[StrictInt, Field(ge=1, le=65536)] = Field(default=1, examples=[1])
    seed: Annotated[StrictInt, Field(ge=0, lt=2**32)] = Field(default=0, examples=[0])
    arguments: dict[Any, Any] = Field(default={}, examples=["{num_inference_steps: 30}"])
    adapters: list[Adapter] = Field(default=[], examples=["[{path: loras/ink.safetensors, scale: 0.8}]"])
    scheduler: Scheduler | None = Field(default=None, examples=["{class: EulerDiscreteScheduler}"])
    output: Name | None = Field(default=None, examples=["local/my-run"])
    revision: Name | None = Field(default=None, examples=["main"])
    dtype: Literal["float32", "bfloat16", "float16"] = Field(default="float32", examples=["bfloat16"])
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", examples=["auto"])
    batch: Count = Field(default=8, examples=[8])
    shard: Count | None = Field(default=None, examples=[64])
    strict: StrictBool = Field(default=False, examples=["true"])
    share_encodings: StrictBool = Field(default=False, examples=["true"])
    priority: Annotated[float, Field(gt=0, strict=True)] = Field(default=1.0, examples=[2.0])
    speed: Speed = Field(default=Speed(), examples=["{compile: true}"])
    workers: (
        Annotated[
            Annotated[Count, Tag("<count>")] | Annotated[list[WorkerGroup], Field(min_length=1), Tag("<groups>")],
            Discriminator(lambda value: "<groups>" if isinstance(value, list) else "<count>"),
        ]
        | None
    ) = Field(default=None, examples=[2])
    scale: Scale | None = Field(default=None, examples=["{max: 8}"])

    _base_dir: Path = PrivateAttr(default_factory=Path.cwd)
    _job_dir: Path | None = PrivateAttr(default=None)  # of the job file; None for a job made in Python

    def __init__(self, **fields: Any) -> None:
        """Raises SpecError."""
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise SpecError(explain(error, "job", {}, _part_at)) from None
        except RecursionError:
            raise SpecError("job: nested too deeply to be a job; flatten it") from None

    def __repr_args__(self) -> Iterable[tuple[str | None, Any]]:
        """A few prompts stand for all: pydantic would write out a million."""
        for name, value in super().__repr_args__():
            many = name == "prompts" and isinstance(value, list) and len(value) > 4
            yield name, [*value[:3], f"... {len(value):,} in all"] if many else value

    @field_validator("model", mode="before")
    @classmethod
    def _model_text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, Path) else value

    @field_validator("prompts", mode="before")
    @classmethod
    def _prompt_source(cls, value: Any) -> Any:
        if isinstance(value, (str, Path)):
            return {"file": value}
        if isinstance(value, (Mapping, PromptFile)):
            return value
        if isinstance(value, (set, frozenset)):
            raise ValueError("must have an order, got a set; pass sorted(...)")
        if hasattr(value, "columns"):  # iterating over a data frame gives its column names
            raise ValueError("must be texts or mappings, got a table; pass table['prompt'] or its rows as mappings")
        if isinstance(value, (bytes, bytearray)) or not isinstance(value, Iterable):
            raise ValueError(f"must be a file or a list of prompts, got {shown(value)}; write e.g. [red apple]")
        return [prompt_entry(place, entry) for place, entry in enumerate(value)]

    @field_validator("arguments")
    @classmethod
    def _plain_arguments(cls, value: dict[Any, Any]) -> dict[str, Any]:
        checked, problems = {}, []
        for name, entry in value.items():
            try:
                checked[name] = check_argument(name, entry)
            except ValueError as error:
                problems.append(((str(name),), str(error)))
        if problems:
            raise problem(*problems)
        return checked

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        if self.scale is not None and self.workers is not None:
            raise problem((("workers",), f"cannot be fixed beside `scale`, got {shown(self.workers)}; leave one out"))
        return self

    @classmethod
    def from_mapping(cls, fields: Mapping[str, Any]) -> JobSpec:
        """The job with these keys; relative prompt files are looked up in the current directory."""
        return cls._made(fields, "job", {})

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: Mapping[str, Any] | None = None) -> JobSpec:
        """The job in a YAML file. ``overrides`` replaces top-level keys, as if given in Python.

        A prompt file is looked up beside the job file, and must lie there or below the current directory: a
        job from someone else cannot read other files. ``overrides`` may name any file.
        """
        path = Path(path)
        fields, lines = load_yaml(path)
        changes = dict(overrides or {})
        lines = {where: line for where, line in lines.items() if where[0] not in changes}
        if fields.get("output") is None:
            fields["output"] = f"local/{re.sub(r'[^A-Za-z0-9._-]+', '-', path.stem)}"
        spec = cls._made({**fields, **changes}, str(path), lines)
        spec._job_dir = path.resolve().parent
        if "prompts" not in changes:
            spec._base_dir = spec._job_dir
            spec._confine(path, lines)
        return spec

    def replace(self, **fields: Any) -> JobSpec:
        """The same job with other values, validated again."""
        known = {name: getattr(self, name) for name in self.model_fields_set}
        spec = self._made({**known, **fields}, "job", {})
        spec._job_dir = self._job_dir
        if "prompts" not in fields:
            spec._base_dir = self._base_dir
        return spec

    def limited(self, limit: int) -> JobSpec:
        """The same job with only the first ``limit`` prompts."""
        if limit < 1:
            raise SpecError(f"limit: must be at least 1, got {limit}; write e.g. 100")
        if isinstance(self.prompts, list):
            return self.replace(prompts=self.prompts[:limit])
        source = self.prompts.model_copy(update={"limit": min(limit, self.prompts.limit or limit)})
        spec = self.replace(prompts=source)
        spec._base_dir = self._base_dir
        return spec

    @property
    def base_dir(self) -> Path:
        """The directory that a relative prompt file is looked up in."""
        return self._base_dir

    def prompt_path(self) -> Path | None:
        """Where the prompt file is; None for inline prompts."""
        return None if isinstance(self.prompts, list) else self._base_dir / self.prompts.file

    def picture_folders(self) -> tuple[Path, tuple[Path, ...] | None]:
        """Where relative picture files are looked up, and the folders that they must lie in; None: anywhere."""
        if self._job_dir is None:
            return Path.cwd(), None
        path = self.prompt_path()
        return self._job_dir, (self._job_dir, Path.cwd(), *([path.parent] if path else []))

    def base_file(self, text: str) -> str:
        """A file or folder that the job names: below the job file's folder where it is there, else as it is written."""
        beside = (self._job_dir or Path.cwd()) / text
        return str(beside) if beside.exists() else text

    def canonical(self) -> dict[str, Any]:
        """What determines the pixels, besides the items, as JSON-able data."""
        names = (
            "model",
            "revision",
            "dtype",
            "seed",
            "images_per_prompt",
            "arguments",
            "adapters",
            "scheduler",
            "batch",
            "shard",
            "strict",
        )
        chosen = self.model_dump(mode="json", include=set(names))
        # Runs that were made before there was a choice stay what they are.
        chosen = {name: value for name, value in chosen.items() if name not in _NEWER or value}
        if self.speed != Speed():
            chosen["speed"] = self.speed.model_dump(mode="json", exclude_defaults=True)
        return chosen

    @classmethod
    def _made(cls, fields: Mapping[str, Any], source: str, lines: Lines) -> JobSpec:
        spec = cls.__new__(cls)
        for key in fields:
            if not isinstance(key, str):
                raise SpecError(
                    f"{source}: the key {shown(key)} is not text; known keys: {', '.join(cls.model_fields)}"
                )
        try:
            cls.__pydantic_validator__.validate_python(dict(fields), self_instance=spec)
        except ValidationError as error:
            raise SpecError(explain(error, source, lines, _part_at)) from None
        except RecursionError:
            raise SpecError(f"{source}: nested too deeply to be a job; flatten it") from None
        return spec

    def _confine(self, job: Path, lines: Lines) -> None:
        path = self.prompt_path()
        if path is None:
            return
        allowed = (self._base_dir, Path.cwd().resolve())
        if not any(path.resolve().is_relative_to(folder) for folder in allowed):
            line = lines.get(("prompts", "file"), lines.get(("prompts",), 1))
            raise SpecError(
                f"{job}: line {line}: prompts: the file must lie in the folder of the job file or below the "
                f"current directory, got {path}; move it there, or name it on the command line (--prompts)"
            )


_NEWER = ("adapters", "scheduler")  # what runs of earlier versions do not name


def fingerprint(canonical: Mapping[str, Any], items_digest: str) -> str:
    """One hex text for everything that determines a run's output."""
    return hashlib.sha256(f"{canonical_json(canonical)}\n{items_digest}".encode()).hexdigest()


def diff_specs(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between two ``canonical()`` forms, a line each; empty when they make the same output."""
    before, after = _flat(old), _flat(new)
    return [
        f"{key}: {_stored(before, key)} in the stored run, {_stored(after, key)} now"
        for key in dict.fromkeys([*before, *after])
        if key not in before or key not in after or canonical_json(before[key]) != canonical_json(after[key])
    ]


def _stored(values: Mapping[str, Any], key: str) -> str:
    return shown(values[key]) if key in values else "not set"


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat.update(_flat(value, f"{prefix}{key}."))
        elif not isinstance(value, Mapping):
            flat[f"{prefix}{key}"] = value
    return flat


def _part_at(path: tuple[str | int, ...]) -> type[BaseModel]:
    if path[:1] == ("prompts",):
        return PromptFile
    if path[:1] == ("model",):
        return FakeModel if len(path) == 1 else FakeStages
    if path[:1] == ("speed",):
        return Speed if len(path) == 1 else Quantization
    parts: dict[Any, type[BaseModel]] = {
        "workers": WorkerGroup,
        "adapters": Adapter,
        "scheduler": Scheduler,
        "scale": Scale,
    }
    return parts.get(path[0], JobSpec) if path else JobSpec
