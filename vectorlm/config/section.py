"""What every section of the YAML file is made of. Floor 0, for `schema` and `job_schema`."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=1)]
Ratio = Annotated[float, Field(ge=0.0, le=1.0)]
Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=()
    )


def said(default: Any, allowed: str, description: str) -> Any:
    """A key whose type has the pattern, or holds several values; `allowed` says them in words."""
    return Field(default, description=description, json_schema_extra={"allowed": allowed})
