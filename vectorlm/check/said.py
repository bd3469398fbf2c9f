"""Findings as lines for people, and as an object for programs. Floor 1, used by `check_door`."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from vectorlm.check.finding import Finding

WIDTH = 100


def as_text(found: Sequence[Finding]) -> str:
    return "\n".join(_entry(finding) for finding in found)


def _entry(finding: Finding) -> str:
    head = f"{finding.severity}: {finding.where}: {finding.text}"
    return f"{_wrapped(head, '    ')}\n{_wrapped(f'    -> {finding.cure}', '       ')}"


def _wrapped(text: str, indent: str) -> str:
    # A path or a command that is broken over two lines cannot be copied.
    return textwrap.fill(
        text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def counted(found: Sequence[Finding]) -> str:
    """`2 errors, 1 warning`; empty where there is neither."""
    texts = []
    for severity in ("error", "warning"):
        count = sum(finding.severity == severity for finding in found)
        if count:
            texts.append(f"{count} {severity}{'s' if count > 1 else ''}")
    return ", ".join(texts)


def has_errors(found: Sequence[Finding]) -> bool:
    return any(finding.severity == "error" for finding in found)


def as_object(found: Sequence[Finding]) -> dict[str, Any]:
    return {"sound": not has_errors(found), "findings": [asdict(finding) for finding in found]}
