"""What a job may trade for speed. All of it can change pixels, so all of it is part of what identifies a run."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StrictStr, model_validator

Name = Annotated[StrictStr, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
Setting = StrictBool | StrictInt | StrictFloat | StrictStr
# Those that diffusers would fetch as code from the Hub are left out.
Attention = Literal[
    "native",
    "_native_cudnn",
    "_native_efficient",
    "_native_flash",
    "_native_math",
    "flex",
    "flash",
    "_flash_3",
    "sage",
    "xformers",
]


class Quantization(BaseModel):
    """How one component's weights are stored: a backend of diffusers' and the options of its configuration."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    backend: Literal["bitsandbytes_4bit", "bitsandbytes_8bit", "quanto", "torchao"] = Field(
        examples=["bitsandbytes_4bit"]
    )
    options: dict[Name, Setting] = Field(default={}, examples=["{bnb_4bit_quant_type: nf4}"])


class Speed(BaseModel):
    """``speed:`` of a job.

    ``compile`` compiles the denoiser's repeated blocks; ``attention`` is a backend of diffusers'; ``quantize`` maps
    components to how they are quantised; ``first_block_cache`` is the change of a step's first block below which the
    other blocks are not computed again: it loses detail. ``tf32`` lets CUDA round float32 products.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    compile: StrictBool = Field(default=False, examples=["true"])
    attention: Attention | None = Field(default=None, examples=["_native_cudnn"])
    quantize: dict[Name, Quantization] = Field(default={}, examples=["{transformer: {backend: bitsandbytes_4bit}}"])
    first_block_cache: Annotated[float, Field(gt=0, lt=1, strict=True)] | None = Field(default=None, examples=[0.08])
    tf32: StrictBool = Field(default=True, examples=["false"])

    @property
    def lossy(self) -> tuple[str, ...]:
        """What makes pictures differ visibly from the model's own."""
        return tuple(name for name in ("quantize", "first_block_cache") if getattr(self, name))

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if self.compile and self.first_block_cache is not None:
            raise ValueError("`compile` and `first_block_cache` cannot be used together; choose one of them")
        return self
