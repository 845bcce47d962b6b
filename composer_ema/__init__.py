"""Weight averaging for PyTorch, used first through MosaicML Composer."""

from typing import TYPE_CHECKING, Any

from composer_ema.version import __version__  # the package's version

if TYPE_CHECKING:
    from composer_ema.batchnorm import update_bn  # BatchNorm's statistics for the weights held now, or for an average
    from composer_ema.checkpoints.opening import read_checkpoint  # what a file holds, its checksums compared
    from composer_ema.checkpoints.reading import CheckpointError, load_average  # the average of a checkpoint
    from composer_ema.functional import compute_ema  # one functional update
    from composer_ema.interchange.export import export  # the average of a checkpoint, as many libraries read it
    from composer_ema.optimizer import EMAOptimizer  # averages after each step of any optimizer, in any loop
    from composer_ema.posthoc.merge import merge  # one file of the weighted sum of several checkpoints
    from composer_ema.posthoc.reconstruct import reconstruct  # any average of a run, from what it kept
    from composer_ema.posthoc.snapshots import Snapshots  # averages written while any loop trains
    from composer_ema.shadow.shadow_model import ShadowModel  # the averaged copy: update, swap, state
    from composer_ema.shadow.shadow_models import ShadowModels  # several averages of one model, updated together
    from composer_ema.shadow.state import gather_state_dict  # a state of pieces, whole on rank 0
    from composer_ema.trainer.ema import EMA  # the Composer algorithm
    from composer_ema.trainer.safe_loading import safe_loading  # a Trainer loads without executing its checkpoint
    from composer_ema.trainer.swa import SWA  # the Composer algorithm for an equal average

__all__ = [
    'EMA',
    'SWA',
    'CheckpointError',
    'EMAOptimizer',
    'ShadowModel',
    'ShadowModels',
    'Snapshots',
    '__version__',
    'compute_ema',
    'export',
    'gather_state_dict',
    'load_average',
    'merge',
    'read_checkpoint',
    'reconstruct',
    'safe_loading',
    'update_bn',
]

#: Where each name comes from on first use: Composer is not needed for all, nor torch for the command line's help.
_LAZY = {
    'EMA': 'composer_ema.trainer.ema',
    'SWA': 'composer_ema.trainer.swa',
    'CheckpointError': 'composer_ema.checkpoints.reading',
    'EMAOptimizer': 'composer_ema.optimizer',
    'ShadowModel': 'composer_ema.shadow.shadow_model',
    'ShadowModels': 'composer_ema.shadow.shadow_models',
    'Snapshots': 'composer_ema.posthoc.snapshots',
    'compute_ema': 'composer_ema.functional',
    'export': 'composer_ema.interchange.export',
    'gather_state_dict': 'composer_ema.shadow.state',
    'load_average': 'composer_ema.checkpoints.reading',
    'merge': 'composer_ema.posthoc.merge',
    'read_checkpoint': 'composer_ema.checkpoints.opening',
    'reconstruct': 'composer_ema.posthoc.reconstruct',
    'safe_loading': 'composer_ema.trainer.safe_loading',
    'update_bn': 'composer_ema.batchnorm',
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    import importlib

    try:
        value = getattr(importlib.import_module(_LAZY[name]), name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split('.')[0] != 'composer':
            raise
        raise ImportError(
            f'composer_ema.{name} needs MosaicML Composer, which is not installed. '
            "Install it with: pip install 'composer-ema[composer]'"
        ) from error
    globals()[name] = value  # compute_ema is called after every step
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
