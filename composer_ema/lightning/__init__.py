"""Lightning's Trainer: a callback that averages the weights and lends the average to evaluation."""

from composer_ema.lightning.callback import WeightAverage

__all__ = ['WeightAverage']
