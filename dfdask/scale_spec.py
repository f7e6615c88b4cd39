"""The ``scale`` key of a job: workers that come and go while it runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Discriminator, Field, StrictInt, StrictStr, Tag, model_validator

Count = Annotated[StrictInt, Field(ge=1)]
Name = Annotated[StrictStr, Field(min_length=1, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
Amount = Annotated[float, Field(ge=0, strict=True)]
_NumberOrClasses = Discriminator(lambda value: "<classes>" if isinstance(value, Mapping) else "<number>")


class Scale(BaseModel):
    """Workers that come and go with the work: ``max``, ``min`` and ``price`` by class, or a number for all alike.

    ``deadline`` in seconds from the start of the job, ``budget`` in the unit of ``price``, which is per worker hour.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    max: Annotated[
        Annotated[Count, Tag("<number>")] | Annotated[dict[Name, Count], Field(min_length=1), Tag("<classes>")],
        _NumberOrClasses,
    ] = Field(examples=[8])
    min: Annotated[
        Annotated[StrictInt, Field(ge=0), Tag("<number>")]
        | Annotated[dict[Name, Annotated[StrictInt, Field(ge=0)]], Tag("<classes>")],
        _NumberOrClasses,
    ] = Field(default=0, examples=[0])
    price: Annotated[
        Annotated[Amount, Tag("<number>")] | Annotated[dict[Name, Amount], Tag("<classes>")], _NumberOrClasses
    ] = Field(default=0.0, examples=[2.5])
    deadline: Annotated[float, Field(gt=0, strict=True)] | None = Field(default=None, examples=[3600])
    budget: Annotated[float, Field(gt=0, strict=True)] | None = Field(default=None, examples=[40])

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        most = self.classes("max")
        for name in ("min", "price"):
            given = getattr(self, name)
            if isinstance(given, Mapping) and (unknown := sorted(set(given) - set(most))):
                raise ValueError(
                    f"`{name}` names {', '.join(unknown)}, but the classes of `max` are {', '.join(most)}; use those"
                )
        for name, least in self.classes("min").items():
            if least > most[name]:
                raise ValueError(f"needs min <= max, got min {least:g} and max {most[name]:g}; change one")
        if self.budget is not None and not any(self.classes("price").values()):
            raise ValueError("`budget` needs a `price` for an hour of a worker, got none; give it, e.g. price: 2.5")
        return self

    def classes(self, key: Literal["max", "min", "price"]) -> dict[str, float]:
        """The value of ``key`` for each class of ``max``; a single number is for all, named ``worker`` where there is
        one only."""
        names = list(self.max) if isinstance(self.max, Mapping) else ["worker"]
        value = getattr(self, key)
        return {name: float(value.get(name, 0) if isinstance(value, Mapping) else value) for name in names}
