"""The YAML of a comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

Rates = Annotated[list[PositiveFloat], Field(min_length=1)]


class Row(BaseModel):
    """An optimizer: `fields` of its trainings, the values that its two peak learning rates are swept over."""

    model_config = ConfigDict(extra="forbid")

    lr: Rates
    plain_lr: Rates
    fields: dict[str, Any] = {}


class Scale(BaseModel):
    """A setting that the rows, or the `rows` named, are compared in.

    `rates`: ``"swept"`` here too; ``"lr"``: that of the matrices is, that of all else is carried over from the first
    scale; ``"carried"``: both are.  `row_fields`: those of rows that are others here.
    """

    model_config = ConfigDict(extra="forbid")

    fields: dict[str, Any] = {}
    rates: Literal["swept", "lr", "carried"] = "swept"
    rows: list[str] | None = None
    row_fields: dict[str, dict[str, Any]] = {}
    seeds: Annotated[list[NonNegativeInt], Field(min_length=1)] | None = None


class Comparison(BaseModel):
    """A comparison: `configs` (beside this file) and `fields` of all trainings, `rows` and `scales` where they differ.

    Learning rates are swept on the first of the `seeds`, the best trained on the others.  `jobs` trainings run at
    once; a sweep goes on up to `beyond` times beyond the end of its values.  Times are those of a training of its
    own, of `alone_steps` steps (None: all), with none beside it.  Differences are to the `baseline`, by default the
    first row; `against` names, for rows, the others that the report compares them with.
    """

    model_config = ConfigDict(extra="forbid")

    title: str | None = None
    configs: list[Path]
    out: Path
    rows: Annotated[dict[str, Row], Field(min_length=1)]
    scales: Annotated[dict[str, Scale], Field(min_length=1)] = {"": Scale()}
    seeds: Annotated[list[NonNegativeInt], Field(min_length=1)] = [0]
    baseline: str | None = None
    against: dict[str, list[str]] = {}
    jobs: PositiveInt = 1
    beyond: NonNegativeInt = 2
    alone_steps: PositiveInt | None = None
    fields: dict[str, Any] = {}

    @model_validator(mode="after")
    def _consistent(self) -> Comparison:
        named = {"baseline": [self.baseline] if self.baseline else [], "against": list(self.against)}
        named["against"] += [name for others in self.against.values() for name in others]
        named |= {f"scales.{name}.rows": scale.rows or [] for name, scale in self.scales.items()}
        named |= {f"scales.{name}.row_fields": list(scale.row_fields) for name, scale in self.scales.items()}
        for where, names in named.items():
            if unknown := [name for name in names if name not in self.rows]:
                raise ValueError(f"{where} names {unknown[0]!r} (the rows are {', '.join(self.rows)})")
        first, *later = self.scales.values()
        if first.rates != "swept":
            raise ValueError(
                f"rates of the first scale are {first.rates!r} (must be 'swept': there are none yet)"
            )
        for scale in later:
            missing = set(self.rows_of(scale)) - set(self.rows_of(first))
            if scale.rates != "swept" and missing:
                raise ValueError(
                    f"rates of {sorted(missing)[0]!r} cannot be carried over: the first scale lacks it"
                )
        return self

    def seeds_of(self, scale: str) -> list[int]:
        return self.scales[scale].seeds or self.seeds

    def rows_of(self, scale: Scale) -> list[str]:
        return [row for row in self.rows if scale.rows is None or row in scale.rows]

    def entries(self) -> list[tuple[str, str]]:
        """Scale and row of everything compared, in the order that it is trained in."""
        return [(name, row) for name, scale in self.scales.items() for row in self.rows_of(scale)]
