"""What is wrong with one row of conversations. Floor 1; raised in this folder, made a bad row by
`vectorlm.data.chat.encoder`, a finding by `vectorlm.check`.
"""

from __future__ import annotations

REFUSED = "refused by the template"
UNCLEAR = "turns not found"
UNWRITTEN = "not written by the template"
OF_THE_TEMPLATE = (REFUSED, UNCLEAR, UNWRITTEN)  # another one may be fine with the row


class RowProblem(Exception):
    """`reason` is what rows are counted by, `detail` the sentence for this one."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail
