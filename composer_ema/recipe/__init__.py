"""From a YAML recipe to a trained network: ``schema`` checks, ``build`` builds, ``run`` trains and reports."""

from composer_ema.zoo.registering import (
    register_algorithm,
    register_callback,
    register_dataset,
    register_logger,
    register_model,
    register_optimizer,
    register_scheduler,
)

__all__ = [
    'register_algorithm',
    'register_callback',
    'register_dataset',
    'register_logger',
    'register_model',
    'register_optimizer',
    'register_scheduler',
]
