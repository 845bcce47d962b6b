"""Weight averaging for PyTorch, used first through MosaicML Composer."""

from composer_ema.version import __version__

__all__ = ['__version__']
