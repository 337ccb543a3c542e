"""What a run notes of its subspaces: a line for every refresh, beside the metrics."""

from __future__ import annotations

from typing import Any

import torch

from galore_rrf.diagnostics import SubspaceRecord

QUANTITIES = ("rank", "energy_kept", "residual_norm", "angle", "refreshes", "refresh_seconds")
"""Of a record, what is shown over training."""


class Refreshes:
    """Finds the subspaces that were refreshed; the counts are in the state, so a resumed run goes on with them."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._diagnostics = getattr(optimizer, "diagnostics", list)
        self._known = {record.name: record.refreshes for record in self._diagnostics()}

    def latest(self) -> list[SubspaceRecord]:
        """Of every parameter refreshed since this was last asked for, its last refresh."""
        found = [r for r in self._diagnostics() if r.refreshes != self._known.get(r.name, 0)]
        self._known |= {record.name: record.refreshes for record in found}
        return found


def line(record: SubspaceRecord, step: int) -> dict[str, Any]:
    """What diagnostics.jsonl says of a record of after `step` steps: of the step that refreshed."""
    assert record.since_refresh is not None
    values = record.as_dict()
    for key in ("steps", "since_refresh"):
        del values[key]
    return {"step": step, "refreshed_at": step - record.since_refresh, **values}
