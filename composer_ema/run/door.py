"""What the callbacks of all trainers show of the averages that they keep."""

from __future__ import annotations

from composer_ema import plain
from composer_ema.run.keeper import Keeper
from composer_ema.shadow.shadow_model import ShadowModel


class Door:
    """The averages of a callback, by label. The callback has a :class:`~composer_ema.run.keeper.Keeper`."""

    _keeper: Keeper

    @property
    def labels(self) -> tuple[str, ...]:
        """What the averages are called, the one that evaluations see by default first."""
        return self._keeper.labels

    def shadow(self, label: str | None = None) -> ShadowModel | None:
        """An average; None before training starts.

        Args:
            label: of the average. Default: the first.

        Raises:
            ValueError: there is none of that label.
        """
        chosen = self.labels[0] if label is None else plain.label('label', label, self.labels)
        return self._keeper.averages.shadow(chosen)
