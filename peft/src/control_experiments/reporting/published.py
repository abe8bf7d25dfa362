"""The paper's figures and recipes as results/paper.json carries them, each with its status."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError

#: What tables print where nothing was found; never zero.
NOT_PUBLISHED = "not published"


@dataclass(frozen=True)
class Figure:
    """One published figure; `status` is "exact" (as printed) or "inferred" (computed from printed figures)."""

    table: str
    model: str
    row: str
    column: str
    quantity: str
    value: float
    unit: str
    status: str
    source: str
    runs: dict[str, float] | None = None
    spread_as_printed: float | None = None
    note: str | None = None

    def __str__(self) -> str:
        """Value, spread as it was printed, and status."""
        spread = "" if self.spread_as_printed is None else f" ± {self.spread_as_printed:g}"
        value = (
            f"{self.value:,.0f}"
            if self.value >= 1000
            else f"{self.value:.2f}"
            if self.unit == "%"
            else f"{self.value:g}"
        )
        unit = "" if self.unit == "%" else f" {self.unit}"
        return f"{value}{spread}{unit} ({self.status})"


@dataclass(frozen=True)
class Paper:
    """All published figures, what is known to be wrong with them, and the recipes."""

    figures: tuple[Figure, ...]
    sources: dict[str, str]
    weaknesses: tuple[str, ...]
    recipes: dict[str, dict]

    def find(self, table: str, model: str, row: str, column: str, quantity: str) -> Figure | None:
        """The figure of that place, or None: not published."""
        wanted = (table, model, row, column, quantity)
        for figure in self.figures:
            if (figure.table, figure.model, figure.row, figure.column, figure.quantity) == wanted:
                return figure
        return None

    def of_task(self, table: str, model: str, column: str) -> list[Figure]:
        """All figures of a model on a task."""
        return [f for f in self.figures if (f.table, f.model, f.column) == (table, model, column)]

    def models(self, table: str) -> list[str]:
        """Models with a figure in the table, in the paper's order."""
        return list(dict.fromkeys(figure.model for figure in self.figures if figure.table == table))

    def rows(self, table: str, model: str) -> list[str]:
        """Rows of the model with a figure in the table."""
        return list(dict.fromkeys(f.row for f in self.figures if (f.table, f.model) == (table, model)))


def read_paper(path: Path) -> Paper:
    """Read results/paper.json.

    Raises:
        UserError: it is missing or broken.
    """
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
        figures = tuple(Figure(**entry) for entry in contents["figures"])
        return Paper(figures, contents["sources"], tuple(contents["known_weaknesses"]), contents["recipes"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is missing or broken ({error}): restore it with git checkout") from error
