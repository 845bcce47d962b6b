"""What callbacks and algorithms show of the averages that they keep, whoever trains."""

from __future__ import annotations

from composer_ema import plain
from composer_ema.run.keeper import Keeper
from composer_ema.shadow.shadow_model import ShadowModel


class Door:
    """The averages of what has a :class:`~composer_ema.run.keeper.Keeper`, by label."""

    _keeper: Keeper

    @property
    def labels(self) -> tuple[str, ...]:
        """What evaluations, metrics and checkpoints call the averages, the one seen by default first."""
        return self._keeper.labels

    def shadow(self, label: str | None = None) -> ShadowModel | None:
        """An average; None before it is built: when training starts, or by Composer's Trainer when that is built.

        Args:
            label: of the average. Default: the first.

        Raises:
            ValueError: there is none of that label.
        """
        chosen = self.labels[0] if label is None else plain.label('label', label, self.labels)
        return self._keeper.averages.shadow(chosen)
