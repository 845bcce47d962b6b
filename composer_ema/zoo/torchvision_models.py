"""The classifiers of torchvision as one family of plug-ins, each with a signature that lists all that it takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
import torchvision

from composer_ema.spans import ArgumentError
from composer_ema.zoo.checks import check_whole
from composer_ema.zoo.plugins import Family


def names() -> list[str]:
    """The names of all classifiers of the installed torchvision."""
    return torchvision.models.list_models(module=torchvision.models)


def find(architecture: str) -> Callable[..., torch.nn.Module]:
    """A builder of one classifier, whose signature lists what torchvision takes through `**kwargs`.

    With `weights`, a `num_classes` other than theirs gives the network a new last layer, drawn at random.

    Args:
        architecture: One of :func:`names`.
    """
    legal = _signature(architecture)

    def build(**arguments: object) -> torch.nn.Module:
        check_whole('num_classes', arguments.get('num_classes', 1), 1, 'Pass the number of classes of the data set.')
        weights = arguments.get('weights')
        outputs = None
        if weights is not None:
            _check_weights(architecture, weights)
            outputs = arguments.pop('num_classes', None)  # with weights, torchvision takes only their own number
        if 'aux_logits' in legal.parameters:
            # With auxiliary heads they return a tuple while training, which no classification loss takes.
            arguments.setdefault('aux_logits', False)
            if weights is None and arguments.get('init_weights') is None:
                arguments['init_weights'] = True  # torchvision's default, without its warning
        try:
            network = torchvision.models.get_model(architecture, **arguments)
        except TypeError as error:
            raise ValueError(
                f'torchvision cannot build {architecture!r} from {arguments}: {error}. '
                f'Leave out what the architecture fixes; legal arguments are {", ".join(legal.parameters)}.'
            ) from error
        if isinstance(outputs, int):
            _resize_head(network, outputs)
        return network

    build.__name__ = architecture
    build.__doc__ = torchvision.models.get_model_builder(architecture).__doc__
    build.__annotations__ = {name: parameter.annotation for name, parameter in legal.parameters.items()}
    build.__signature__ = legal  # pyright: ignore[reportFunctionMemberAccess] # inspect.signature reads it
    return build


def _resize_head(network: torch.nn.Module, outputs: int) -> None:
    """Replaces the last layer by a new one unless it has as many outputs already."""
    layers = [each for each in network.named_modules() if isinstance(each[1], torch.nn.Linear | torch.nn.Conv2d)]
    name, last = layers[-1]
    if isinstance(last, torch.nn.Linear):
        new = torch.nn.Linear(last.in_features, outputs, bias=last.bias is not None)
    else:
        assert isinstance(last, torch.nn.Conv2d)
        new = torch.nn.Conv2d(last.in_channels, outputs, kernel_size=1)
    if last.weight.shape[0] != outputs:
        parent, _, child = name.rpartition('.')
        setattr(network.get_submodule(parent), child, new)
        if hasattr(network, 'num_classes'):  # Composer compares it
            network.num_classes = outputs  # pyright: ignore[reportArgumentType]: some of them keep a number there


def _check_weights(architecture: str, weights: object) -> None:
    legal = list(torchvision.models.get_model_weights(architecture).__members__)
    if not isinstance(weights, str) or weights.rpartition('.')[2] not in legal:
        raise ArgumentError(
            f'weights of {architecture} must be one of {", ".join(legal)}, got {weights!r}. '
            'Leave it out to train from random weights.',
            'weights',
        )


def _signature(architecture: str) -> inspect.Signature:
    network = inspect.signature(torchvision.models.get_model_builder(architecture)).return_annotation
    taken = [
        parameter.replace(
            kind=inspect.Parameter.KEYWORD_ONLY,
            default=False if parameter.name == 'aux_logits' else parameter.default,
        )
        for parameter in inspect.signature(network.__init__).parameters.values()
        if parameter.default is not inspect.Parameter.empty
    ]
    # The two that torchvision takes though its class has no default for them.
    for name, default in {'VisionTransformer': {'image_size': 224}, 'MaxVit': {'input_size': (224, 224)}}.get(
        network.__name__, {}
    ).items():
        taken.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=type(default)))
    weights = inspect.Parameter('weights', inspect.Parameter.KEYWORD_ONLY, default=None, annotation=str | None)
    return inspect.Signature([*taken, weights], return_annotation=network)


#: Registered under ``composer_ema.models_families`` in setup.cfg.
MODELS = Family(names, find)
