"""Parts of a job: what may stand in it, and how a job changes its model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr, field_validator

from dfdask.arguments import plain, shown
from dfdask.problems import located, problem

Count = Annotated[StrictInt, Field(ge=1)]
Name = Annotated[StrictStr, Field(min_length=1, pattern=r"^[^\x00-\x1f\x7f]+$")]


class Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Adapter(Part):
    """A LoRA: a safetensors file, a directory or a hub id, and how much of it."""

    path: Name = Field(examples=["loras/ink.safetensors"])
    weight_name: Annotated[Name, Field(pattern=r"\.safetensors$")] | None = Field(
        default=None, examples=["pytorch_lora_weights.safetensors"]
    )
    revision: Name | None = Field(default=None, examples=["main"])
    scale: Annotated[float, Field(ge=-100, le=100)] = Field(default=1.0, examples=[0.8])

    @field_validator("path", mode="before")
    @classmethod
    def _path_text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, Path) else value


class Scheduler(Part):
    """A scheduler class of diffusers instead of the model's own, with options of its configuration."""

    model_config = ConfigDict(serialize_by_alias=True, validate_by_name=True)

    kind: Annotated[StrictStr, Field(pattern=r"^[A-Za-z0-9_]+Scheduler$")] = Field(
        alias="class", examples=["EulerDiscreteScheduler"]
    )
    options: dict[StrictStr, Any] = Field(default={}, examples=["{use_karras_sigmas: true}"])

    @field_validator("options")
    @classmethod
    def _plain_options(cls, value: dict[str, Any]) -> dict[str, Any]:
        return {name: located((name,), plain, entry) for name, entry in value.items()}


def prompt_entry(place: int, entry: Any) -> str | dict[str, Any]:
    if type(entry) is str:
        return entry
    if isinstance(entry, str):
        return str(entry)
    if isinstance(entry, Mapping):
        entry = dict(entry)
        if isinstance(entry.get("prompt"), str) and all(isinstance(key, str) for key in entry):
            return {key: located((place, key), plain, value) for key, value in entry.items()}
        raise problem(((place,), f"must have a `prompt` that is text, got {shown(entry)}; write {{prompt: ...}}"))
    raise problem(((place,), f"must be text or a mapping, got {shown(entry)}; put it in quotes"))
