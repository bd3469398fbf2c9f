"""What the texts that end up in a job script may hold. Floor 0, for the keys of `config.schema`.

A pattern is matched as a whole (`$` is the very end to pydantic's regular expressions). Only
SHELL_LINE has room for blanks, quotes, `$` or backquotes, only FEATURES for `&` and `|`, and only
FLAG for a hyphen in front.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

NAME = r"^[A-Za-z0-9_][A-Za-z0-9_.@+-]*$"
NAMES = r"^[A-Za-z0-9_][A-Za-z0-9_.@+-]*(,[A-Za-z0-9_][A-Za-z0-9_.@+-]*)*$"
NODE_LIST = r"^[A-Za-z0-9_][A-Za-z0-9_.,\[\]-]*$"
FEATURES = r"^[A-Za-z0-9_(\[][A-Za-z0-9_.&|*()\[\],:=+-]*$"
DURATION = r"^([0-9]{1,4}-[0-9]{1,3}|[0-9]{1,7})(:[0-5]?[0-9]){0,2}$"
MEMORY = r"^[0-9]{1,12}[KMGTkmgt]?$"
ADDRESS = r"^[A-Za-z0-9_][A-Za-z0-9_.+-]*(@[A-Za-z0-9]+([.-][A-Za-z0-9]+)*)?$"
_MAIL = (
    "(NONE|ALL|BEGIN|END|FAIL|REQUEUE|INVALID_DEPEND|STAGE_OUT|TIME_LIMIT(_90|_80|_50)?"
    "|ARRAY_TASKS)"
)
MAIL_TYPES = rf"^{_MAIL}(,{_MAIL})*$"
INTERFACES = r"^[A-Za-z0-9_][A-Za-z0-9_.:-]*(,[A-Za-z0-9_][A-Za-z0-9_.:-]*)*$"
GRES = r"^[A-Za-z0-9_][A-Za-z0-9_.+-]*(:[A-Za-z0-9_][A-Za-z0-9_.+-]*){0,2}$"
FLAG = r"^--[a-z][a-z0-9-]*(=[A-Za-z0-9_.,:/@%+*\[\]=-]+)?$"
SHELL_LINE = r"^[^\x00-\x1f\x7f-\x9f\u2028\u2029]*[^\x00-\x1f\x7f-\x9f\u2028\u2029\\]$"
IMAGE = r"^[A-Za-z0-9_./][A-Za-z0-9_./:@#+=-]*$"
MOUNT = r"^/[A-Za-z0-9_./@+=-]*(:/[A-Za-z0-9_./@+=-]*(:r[ow])?)?$"
LONGEST_TEXT = 1000


def _digits(value: Any) -> Any:
    """YAML reads `time: 90` and `mem: 0` as whole numbers; they are meant as they stand."""
    return str(value) if type(value) is int and value >= 0 else value


_Whole = Annotated[int, Field(ge=0)]
Duration = Annotated[
    str,
    BeforeValidator(
        _digits, json_schema_input_type=_Whole | Annotated[str, Field(pattern=DURATION)]
    ),
    Field(pattern=DURATION),
]
Memory = Annotated[
    str,
    BeforeValidator(_digits, json_schema_input_type=_Whole | Annotated[str, Field(pattern=MEMORY)]),
    Field(pattern=MEMORY),
]
ShellLine = Annotated[str, Field(pattern=SHELL_LINE, max_length=LONGEST_TEXT)]
Mount = Annotated[str, Field(pattern=MOUNT, max_length=LONGEST_TEXT)]
Flag = Annotated[str, Field(pattern=FLAG, max_length=LONGEST_TEXT)]
Gres = Annotated[str, Field(pattern=GRES, max_length=LONGEST_TEXT)]
A_DURATION = "a duration such as 90 (minutes), 08:00:00 or 1-12:00:00"
A_SIZE = "a size such as 120G, or 0"


def duration_s(text: str) -> int:
    """Seconds of a duration as Slurm reads it: `90` is minutes, `1:30` minutes and seconds, `1-0`
    days and hours."""
    days, dash, rest = text.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if not dash and len(parts) < 3:
        parts.insert(0, 0)
    hours, minutes, seconds = (*parts, 0, 0)[:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def megabytes(text: str) -> int:
    """MiB of a size as Slurm reads it: `32G`, `900` (megabytes); 0 stands for all a node has."""
    number, unit = text.rstrip("KMGTkmgt"), text.lstrip("0123456789").upper()
    kib = {"K": 1, "": 1 << 10, "M": 1 << 10, "G": 1 << 20, "T": 1 << 30}[unit]
    return int(number) * kib >> 10
