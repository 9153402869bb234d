"""How a group of settings is written down: a frozen dataclass whose fields pydantic checks, unknown keys refused.

Values live in `conf/`, so fields have no defaults here. This module may be imported by every room of the house and
imports none of them; nor does it import torch, so that a configuration is validated in well under a second.
"""

from typing import Annotated, Any, TypeVar, dataclass_transform

from pydantic import BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

Class = TypeVar("Class")


@dataclass_transform(frozen_default=True)
def settings(cls: type[Class]) -> type[Class]:
    """Class decorator. Rules across fields go into `__post_init__` and raise ValueError naming both values."""
    return dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True, allow_inf_nan=False))(cls)  # type: ignore[return-value]


Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Proportion = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]


def section(cls: type) -> BeforeValidator:
    """For a field that is a group of settings itself: `stop_if: Annotated[Limits, section(Limits)]` takes a mapping."""

    def made(value: Any) -> Any:
        try:
            return cls(**{str(key): item for key, item in value.items()}) if isinstance(value, dict) else value
        except ValidationError as error:
            lines = (f"{'.'.join(map(str, item['loc']))}: {_plain(item)}" for item in error.errors())
            raise ValueError("; ".join(lines)) from None

    return BeforeValidator(made)


def _plain(item: Any) -> str:
    if item["type"] == "unexpected_keyword_argument":
        return "unknown key"
    expected = item["msg"].removeprefix("Input should be ")
    return "missing" if item["type"] == "missing" else f"expected {expected}, got {item['input']!r}"
