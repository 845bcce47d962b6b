"""Models by name as Composer classifiers, and three small networks for the data sets of the package.

A package registers further ones under the entry point group ``composer_ema.models``, as setup.cfg does these: a class
or function with keyword arguments, among them ``num_classes``, that returns a network or a ComposerModel.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from composer.models import ComposerClassifier, ComposerModel

from composer_ema.spans import ArgumentError
from composer_ema.wording import suggestion
from composer_ema.zoo.blocks import offer_blocks
from composer_ema.zoo.checks import check_share, check_whole
from composer_ema.zoo.plugins import plugins

__all__ = ['MNIST1DCNN', 'MNIST1DMLP', 'FashionCNN', 'build_model']


def build_model(name: str, **arguments: Any) -> ComposerModel:
    """Builds a classifier for batches `(inputs, targets)`, trained by cross entropy.

    Its training metric is `MulticlassAccuracy`, its evaluation metrics are `CrossEntropy` and `MulticlassAccuracy`. A
    plug-in that returns a ComposerModel has its own loss and metrics.

    Args:
        name: A registered model: `'fashion_cnn'`, `'mnist1d_cnn'`, `'mnist1d_mlp'`, one of torchvision's classifiers,
            or one that another package registers.
        arguments: Keyword arguments of that model.

    Returns:
        The classifier; `.module` is the network.

    Raises:
        ValueError: The name is not legal; the message has the near ones, or all. Or an argument is out of range.
        TypeError: The model has no argument of that name; the message has the near one, or all.
    """
    models = plugins('models')
    if name not in models:
        raise ValueError(f'model name must be a known model, got {name!r}. {suggestion(name, models)}')
    builder = models[name]
    parameters = inspect.signature(builder).parameters
    legal = [name for name, each in parameters.items() if each.kind is not each.VAR_KEYWORD]
    for key in arguments:
        if key not in legal and len(legal) == len(parameters):
            raise TypeError(f'model {name!r} has no argument {key!r}. {suggestion(key, legal, "It takes")}')
    return classifier(builder, **arguments)


def classifier(builder: Callable[..., torch.nn.Module], **arguments: Any) -> ComposerModel:
    """Calls a registered class or function and makes a Composer classifier of the network; see :func:`build_model`.

    Under `parallelism_config: {fsdp2: {}}` Composer shards the network by its :func:`~composer_ema.zoo.blocks.blocks`,
    unless it has an `fsdp_wrap_fn` of its own.

    Raises:
        TypeError: ``builder`` returns neither a ComposerModel nor a network that says of how many classes it is: by
            the argument ``num_classes`` of ``builder``, or by its own ``num_classes``.
    """
    network = builder(**arguments)
    if isinstance(network, ComposerModel):
        return network
    name = getattr(builder, '__name__', repr(builder))
    if not isinstance(network, torch.nn.Module):
        raise TypeError(f'{name} must return a network or a ComposerModel, got {type(network).__name__}.')
    parameter = inspect.signature(builder).parameters.get('num_classes')
    default = None if parameter is None else parameter.default
    num_classes = next(
        filter(_is_count, (arguments.get('num_classes'), default, getattr(network, 'num_classes', None))), None
    )
    if num_classes is None:
        raise TypeError(
            f'{name} returns a network, which is trained as a classifier, and does not say of how many classes. Let it '
            'take num_classes, as in num_classes: int = 10, or return a ComposerModel with its own loss and metrics.'
        )
    offer_blocks(network)
    return _Classifier(network, num_classes=num_classes)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


class _Classifier(ComposerClassifier):
    """What :func:`classifier` makes of a network."""


def is_plain_classifier(model: torch.nn.Module) -> bool:
    """Whether a model is a network that this package made a classifier of, for batches (inputs, classes)."""
    return isinstance(model, _Classifier)


class FashionCNN(torch.nn.Module):
    """Five convolutions of stride 2 that take an image of up to 32 x 32 pixels to one number per class.

    Each convolution halves the image (28, 14, 7, 4, 2, 1). The first four have BatchNorm in place of a bias and a leaky
    ReLU; the fifth has a bias alone, since its output is the logits. Kernels are 5 x 5, then 3 x 3, by default.
    Weights are drawn from a normal distribution of variance `2 / ((1 + negative_slope**2) * fan_in)` (He et al. 2015,
    arXiv:1502.01852, equation 15); biases start at 0.

    With widths w0, ..., w3, a first kernel of side f, c input channels and k classes it has
    `f*f*c*w0 + 9*(w0*w1 + w1*w2 + w2*w3 + w3*k) + 2*(w0 + w1 + w2 + w3) + k` parameters: 30,402 by default.

    Args:
        num_classes: Number of classes, at least 1.
        in_channels: Channels of the image, at least 1.
        widths: Channels after each of the first four convolutions.
        first_kernel_size: Side of the first convolution's kernel in pixels, odd; the others' is 3.
        negative_slope: Slope of the leaky ReLU below zero, in [0, 1).

    Shapes:
        Input float `(n, in_channels, height, width)`, height and width 17 to 32; output `(n, num_classes)`.

    Example:
        >>> FashionCNN()(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        *,
        num_classes: int = 10,
        in_channels: int = 1,
        widths: Sequence[int] = (8, 16, 32, 64),
        first_kernel_size: int = 5,
        negative_slope: float = 0.1,
    ) -> None:
        super().__init__()
        check_whole('num_classes', num_classes, 1, 'Pass the number of classes of the data set.')
        check_whole('in_channels', in_channels, 1, 'Pass 1 for grey images, 3 for colour.')
        if isinstance(widths, str) or not isinstance(widths, Sequence) or len(widths) != 4:
            message = f'widths must hold 4 numbers of channels, got {widths!r}. Pass [8, 16, 32, 64].'
            raise ArgumentError(message, 'widths')
        for width in widths:
            check_whole(
                'each of widths',
                width,
                1,
                'Pass 4 numbers of channels, for example [8, 16, 32, 64].',
                argument='widths',
            )
        check_whole('first_kernel_size', first_kernel_size, 1, 'Pass 5 or 3.')
        if first_kernel_size % 2 == 0:
            message = f'first_kernel_size must be odd, got {first_kernel_size}. Pass 5 or 3.'
            raise ArgumentError(message, 'first_kernel_size')
        check_share('negative_slope', negative_slope, 'Pass 0.1, or 0 for a plain ReLU.')

        layers: list[torch.nn.Module] = []
        channels = in_channels
        for kernel_size, width in zip((first_kernel_size, 3, 3, 3), widths, strict=True):
            layers += [
                torch.nn.Conv2d(channels, width, kernel_size, stride=2, padding=kernel_size // 2, bias=False),
                torch.nn.BatchNorm2d(width),
                torch.nn.LeakyReLU(negative_slope),
            ]
            channels = width
        layers.append(torch.nn.Conv2d(channels, num_classes, 3, stride=2, padding=1))
        self.layers = torch.nn.Sequential(*layers)
        self.num_classes = num_classes
        _initialise_kaiming(self, negative_slope)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits of `images`."""
        height, width = images.shape[-2:]
        if not (16 < height <= 32 and 16 < width <= 32):
            raise ValueError(
                f'fashion_cnn takes images of 17 to 32 pixels a side, got {height} x {width}. '
                'Resize them, or take a torchvision model.'
            )
        return self.layers(images).flatten(1)


class MNIST1DMLP(torch.nn.Module):
    """Two hidden layers with ReLU for the signals of MNIST-1D.

    With width h, input length d and k classes it has `h*(d + 1) + h*(h + 1) + k*(h + 1)` parameters: 15,210 by default.
    Kaiming initialisation of the weights; biases start at 0.

    Args:
        num_classes: Number of classes, at least 1.
        input_length: Length of a signal, at least 1.
        width: Units of each hidden layer, at least 1.

    Shapes:
        Input float `(n, input_length)`; output `(n, num_classes)`.
    """

    def __init__(self, *, num_classes: int = 10, input_length: int = 40, width: int = 100) -> None:
        super().__init__()
        check_whole('num_classes', num_classes, 1, 'Pass the number of classes of the data set.')
        check_whole('input_length', input_length, 1, 'Pass 40, the length of the signals of MNIST-1D.')
        check_whole('width', width, 1, 'Pass the number of units of a hidden layer, for example 100.')
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(input_length, width),
            torch.nn.ReLU(),
            torch.nn.Linear(width, width),
            torch.nn.ReLU(),
            torch.nn.Linear(width, num_classes),
        )
        self.num_classes = num_classes
        _initialise_kaiming(self, negative_slope=0.0)

    def forward(self, signals: torch.Tensor) -> torch.Tensor:
        """Logits of `signals`."""
        return self.layers(signals)


class MNIST1DCNN(torch.nn.Module):
    """Three convolutions of stride 2 with BatchNorm and ReLU, and a linear layer, for the signals of MNIST-1D.

    The length goes 40, 20, 10, 5. Kernels are 5, 3 and 3 long, without bias. With c channels and k classes it has
    `5*c + 2*3*c**2 + 3*2*c + k*(5*c + 1)` parameters: 5,285 by default. Kaiming initialisation; biases start at 0.

    Args:
        num_classes: Number of classes, at least 1.
        channels: Channels of each convolution, at least 1.

    Shapes:
        Input float `(n, 40)`; output `(n, num_classes)`.
    """

    def __init__(self, *, num_classes: int = 10, channels: int = 25) -> None:
        super().__init__()
        check_whole('num_classes', num_classes, 1, 'Pass the number of classes of the data set.')
        check_whole('channels', channels, 1, 'Pass the channels of a convolution, for example 25.')
        layers: list[torch.nn.Module] = []
        for kernel_size, before in ((5, 1), (3, channels), (3, channels)):
            layers += [
                torch.nn.Conv1d(before, channels, kernel_size, stride=2, padding=kernel_size // 2, bias=False),
                torch.nn.BatchNorm1d(channels),
                torch.nn.ReLU(),
            ]
        self.layers = torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Linear(5 * channels, num_classes))
        self.num_classes = num_classes
        _initialise_kaiming(self, negative_slope=0.0)

    def forward(self, signals: torch.Tensor) -> torch.Tensor:
        """Logits of `signals`."""
        return self.layers(signals.unsqueeze(1))


def _initialise_kaiming(network: torch.nn.Module, negative_slope: float) -> None:
    for layer in network.modules():
        if isinstance(layer, torch.nn.Conv1d | torch.nn.Conv2d | torch.nn.Linear):
            torch.nn.init.kaiming_normal_(layer.weight, a=negative_slope, nonlinearity='leaky_relu')
            if layer.bias is not None:
                torch.nn.init.zeros_(layer.bias)
