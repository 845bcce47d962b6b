"""Models by name as Composer classifiers: three small networks for the embedded data sets, and torchvision's."""

import difflib
import inspect
import numbers
from collections.abc import Callable, Sequence

import torch
import torchvision
from composer.models import ComposerClassifier

__all__ = ['MNIST1DCNN', 'MNIST1DMLP', 'MODELS', 'FashionCNN', 'build_model']


def build_model(name: str, **arguments: object) -> ComposerClassifier:
    """Builds a classifier for batches `(inputs, targets)`, trained by cross entropy.

    Its training metric is `MulticlassAccuracy`, its evaluation metrics are `CrossEntropy` and `MulticlassAccuracy`.

    Args:
        name: One of `MODELS`.
        arguments: Keyword arguments of `MODELS[name]`.

    Returns:
        The classifier; `.module` is the network.

    Raises:
        ValueError: The name is not legal; the message has the nearest ones. Or an argument is out of range.
        TypeError: The network has no argument of that name; the message has the nearest one.
    """
    if name not in MODELS:
        near = difflib.get_close_matches(str(name), MODELS, n=3)
        remedy = f'Did you mean {" or ".join(map(repr, near))}?' if near else f'Legal names are {", ".join(MODELS)}.'
        raise ValueError(f'model name must be a known model, got {name!r}. {remedy}')
    legal = inspect.signature(MODELS[name]).parameters
    for key in arguments:
        if key not in legal:
            near = difflib.get_close_matches(key, legal, n=1)
            remedy = f'Did you mean {near[0]!r}?' if near else f'It takes {", ".join(legal)}.'
            raise TypeError(f'model {name!r} has no argument {key!r}. {remedy}')
    network = MODELS[name](**arguments)
    num_classes = arguments.get('num_classes', legal['num_classes'].default)
    assert isinstance(num_classes, int)
    return ComposerClassifier(network, num_classes=num_classes)


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
        _check_positive('num_classes', num_classes, 'Pass the number of classes of the data set.')
        _check_positive('in_channels', in_channels, 'Pass 1 for grey images, 3 for colour.')
        if isinstance(widths, str) or not isinstance(widths, Sequence) or len(widths) != 4:
            raise ValueError(f'widths must hold 4 numbers of channels, got {widths!r}. Pass [8, 16, 32, 64].')
        for width in widths:
            _check_positive('each of widths', width, 'Pass 4 numbers of channels, for example [8, 16, 32, 64].')
        _check_positive('first_kernel_size', first_kernel_size, 'Pass 5 or 3.')
        if first_kernel_size % 2 == 0:
            raise ValueError(f'first_kernel_size must be odd, got {first_kernel_size}. Pass 5 or 3.')
        _check_share('negative_slope', negative_slope, 'Pass 0.1, or 0 for a plain ReLU.')

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
        _check_positive('num_classes', num_classes, 'Pass the number of classes of the data set.')
        _check_positive('input_length', input_length, 'Pass 40, the length of the signals of MNIST-1D.')
        _check_positive('width', width, 'Pass the number of units of a hidden layer, for example 100.')
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
        _check_positive('num_classes', num_classes, 'Pass the number of classes of the data set.')
        _check_positive('channels', channels, 'Pass the channels of a convolution, for example 25.')
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


def _check_positive(name: str, value: object, remedy: str) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or int(value) < 1:
        raise ValueError(f'{name} must be a whole number of at least 1, got {value!r}. {remedy}')


def _check_share(name: str, value: object, remedy: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise ValueError(f'{name} must lie in [0, 1), got {value!r}. {remedy}')


def _torchvision_model(architecture: str) -> Callable[..., torch.nn.Module]:
    """A builder of one torchvision model whose signature shows what torchvision takes through `**kwargs`."""
    legal = _torchvision_signature(architecture)

    def build(**arguments: object) -> torch.nn.Module:
        _check_positive('num_classes', arguments.get('num_classes', 1), 'Pass the number of classes of the data set.')
        weights = arguments.get('weights')
        if weights is not None:
            _check_weights(architecture, weights)
        if 'aux_logits' in legal.parameters:
            # With auxiliary heads they return a tuple while training, which no classification loss takes.
            arguments.setdefault('aux_logits', False)
            if weights is None and arguments.get('init_weights') is None:
                arguments['init_weights'] = True  # torchvision's default, without its warning
        try:
            return torchvision.models.get_model(architecture, **arguments)
        except TypeError as error:
            raise ValueError(
                f'torchvision cannot build {architecture!r} from {arguments}: {error}. '
                f'Leave out what the architecture fixes; legal arguments are {", ".join(legal.parameters)}.'
            ) from error

    build.__name__ = architecture
    build.__doc__ = torchvision.models.get_model_builder(architecture).__doc__
    build.__annotations__ = {name: parameter.annotation for name, parameter in legal.parameters.items()}
    build.__signature__ = legal  # pyright: ignore[reportFunctionMemberAccess] # inspect.signature reads it
    return build


def _check_weights(architecture: str, weights: object) -> None:
    legal = list(torchvision.models.get_model_weights(architecture).__members__)
    if not isinstance(weights, str) or weights.rpartition('.')[2] not in legal:
        raise ValueError(
            f'weights of {architecture} must be one of {", ".join(legal)}, got {weights!r}. '
            'Leave it out to train from random weights.'
        )


def _torchvision_signature(architecture: str) -> inspect.Signature:
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


MODELS: dict[str, Callable[..., torch.nn.Module]] = {
    'fashion_cnn': FashionCNN,
    'mnist1d_cnn': MNIST1DCNN,
    'mnist1d_mlp': MNIST1DMLP,
    **{name: _torchvision_model(name) for name in torchvision.models.list_models(module=torchvision.models)},
}
