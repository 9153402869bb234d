"""How a group of settings is written down: a frozen dataclass whose fields pydantic checks, unknown keys refused.

Values live in `conf/`, so fields have no defaults here. This module may be imported by every room of the house and
imports none of them; nor does it import torch, so that a configuration is validated in well under a second.
"""

from typing import Annotated, Any

from pydantic import BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

settings = dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True, allow_inf_nan=False))
"""Class decorator. Cross-field rules go into `__post_init__` and raise ValueError with both values in the message."""

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Proportion = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]


def section(cls: type) -> Any:
    """The type of a field that is a group of settings itself, given as a mapping: `stop_if: section(Limits)`."""

    def made(value: Any) -> Any:
        try:
            return cls(**value) if isinstance(value, dict) else value
        except ValidationError as error:
            lines = (f"{'.'.join(map(str, item['loc']))}: {_plain(item)}" for item in error.errors())
            raise ValueError("; ".join(lines)) from None

    return Annotated[cls, BeforeValidator(made)]


def _plain(item: Any) -> str:
    if item["type"] == "unexpected_keyword_argument":
        return "unknown key"
    expected = item["msg"].removeprefix("Input should be ")
    return "missing" if item["type"] == "missing" else f"expected {expected}, got {item['input']!r}"
