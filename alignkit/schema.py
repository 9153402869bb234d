"""How a group of settings is written down: a frozen dataclass whose fields pydantic checks, unknown keys refused.

Values live in `conf/`, so fields have no defaults here. This module may be imported by every room of the house and
imports none of them; nor does it import torch, so that a configuration is validated in well under a second.
"""

from typing import Annotated

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

settings = dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True, allow_inf_nan=False))
"""Class decorator. Cross-field rules go into `__post_init__` and raise ValueError with both values in the message."""

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Proportion = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
