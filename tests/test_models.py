"""Models: shapes, parameter counts by hand, initialisation, and errors that name the nearest legal word."""

import inspect
import math

import pytest
import torch
import torchvision
from composer.metrics import CrossEntropy
from composer.models import ComposerClassifier
from torchmetrics.classification import MulticlassAccuracy

from composer_ema.recipe import registry
from composer_ema.zoo.models import MNIST1DCNN, MNIST1DMLP, FashionCNN, build_model

MODELS = registry.models().classes

pytestmark = pytest.mark.filterwarnings(
    'error',
    'ignore:Implicitly cleaning up:ResourceWarning',  # a folder of a Composer Trainer that another test has left
)


def count(network):
    return sum(parameter.numel() for parameter in network.parameters())


class TestFashionCNN:
    def test_five_convolutions_take_28_pixels_to_one(self):
        network = FashionCNN().eval()
        sizes = []
        for layer in network.layers:
            if isinstance(layer, torch.nn.Conv2d):
                layer.register_forward_hook(lambda *call: sizes.append(tuple(call[2].shape[1:])))
        assert network(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
        assert sizes == [(8, 14, 14), (16, 7, 7), (32, 4, 4), (64, 2, 2), (10, 1, 1)]

    def test_parameter_count_by_hand(self):
        convolutions = 1 * 8 * 25 + 8 * 16 * 9 + 16 * 32 * 9 + 32 * 64 * 9 + 64 * 10 * 9 + 10
        assert count(FashionCNN()) == convolutions + 2 * (8 + 16 + 32 + 64) == 30_402

    @pytest.mark.parametrize(('c', 'w', 'f', 'k'), [(1, (8, 16, 32, 64), 5, 10), (3, (4, 5, 6, 7), 3, 2)])
    def test_parameter_count_is_that_of_the_docstring(self, c, w, f, k):
        formula = f * f * c * w[0] + 9 * (w[0] * w[1] + w[1] * w[2] + w[2] * w[3] + w[3] * k) + 2 * sum(w) + k
        network = FashionCNN(in_channels=c, widths=list(w), first_kernel_size=f, num_classes=k)
        assert count(network) == formula
        assert network(torch.zeros(2, c, 28, 28)).shape == (2, k)

    def test_batchnorm_follows_every_convolution_but_the_last(self):
        kinds = [type(layer).__name__ for layer in FashionCNN().layers]
        assert kinds == ['Conv2d', 'BatchNorm2d', 'LeakyReLU'] * 4 + ['Conv2d']
        assert all(layer.stride == (2, 2) for layer in FashionCNN().layers if isinstance(layer, torch.nn.Conv2d))

    @pytest.mark.parametrize('slope', [0.0, 0.1, 0.5])
    def test_weights_have_the_variance_of_kaiming_initialisation(self, slope):
        torch.manual_seed(0)
        network = FashionCNN(widths=(64, 64, 64, 64), num_classes=64, negative_slope=slope)
        for layer in network.layers:
            if isinstance(layer, torch.nn.Conv2d):
                fan_in = layer.in_channels * layer.kernel_size[0] ** 2
                expected = math.sqrt(2 / ((1 + slope**2) * fan_in))
                # 1600 samples in the smallest layer: the deviation of a standard deviation is 1 / sqrt(2n) = 1.8 %.
                assert layer.weight.std().item() == pytest.approx(expected, rel=0.06)
                assert abs(layer.weight.mean().item()) < 4 * expected / math.sqrt(layer.weight.numel())
                if layer.bias is not None:
                    assert not layer.bias.any()
            if isinstance(layer, torch.nn.LeakyReLU):
                assert layer.negative_slope == slope

    def test_one_seed_gives_one_network(self):
        def weights(seed):
            torch.manual_seed(seed)
            return FashionCNN().layers[0].weight

        assert torch.equal(weights(1), weights(1))
        assert not torch.equal(weights(1), weights(2))

    @pytest.mark.parametrize('side', [17, 32])
    def test_images_of_17_to_32_pixels_are_taken(self, side):
        assert FashionCNN()(torch.zeros(2, 1, side, side)).shape == (2, 10)

    @pytest.mark.parametrize(('height', 'width'), [(33, 28), (28, 33), (16, 28), (28, 16)])
    def test_other_images_are_refused(self, height, width):
        with pytest.raises(ValueError, match=f'17 to 32 pixels a side, got {height} x {width}. Resize'):
            FashionCNN()(torch.zeros(2, 1, height, width))

    @pytest.mark.parametrize(
        ('arguments', 'message'),
        [
            ({'widths': [8, 16]}, r'widths must hold 4 .* got \[8, 16\]\. Pass'),
            ({'widths': 8}, r'widths must hold 4 .* got 8'),
            ({'widths': [8, 16, 0, 4]}, r'each of widths must be .* got 0'),
            ({'num_classes': 0}, r'num_classes must be a whole number of at least 1, got 0'),
            ({'in_channels': True}, r'in_channels must be .* got True'),
            ({'first_kernel_size': 4}, r'first_kernel_size must be odd, got 4\. Pass 5 or 3'),
            ({'first_kernel_size': 0}, r'first_kernel_size must be .* got 0'),
            ({'negative_slope': 1}, r'negative_slope must lie in \[0, 1\), got 1\. Pass 0\.1'),
            ({'negative_slope': 'leaky'}, r"got 'leaky'"),
        ],
    )
    def test_a_value_out_of_range_is_refused_with_a_remedy(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            FashionCNN(**arguments)


class TestMnist1dModels:
    @pytest.mark.parametrize(('network', 'parameters'), [(MNIST1DMLP, 15_210), (MNIST1DCNN, 5_285)])
    def test_40_numbers_give_10_logits(self, network, parameters):
        assert network()(torch.zeros(3, 40)).shape == (3, 10)
        assert count(network()) == parameters

    def test_parameter_counts_are_those_of_the_docstrings(self):
        h, d, k, c = 7, 11, 3, 6
        mlp = MNIST1DMLP(num_classes=k, input_length=d, width=h)
        assert count(mlp) == h * (d + 1) + h * (h + 1) + k * (h + 1)
        cnn = MNIST1DCNN(num_classes=k, channels=c)
        assert count(cnn) == 5 * c + 2 * 3 * c**2 + 3 * 2 * c + k * (5 * c + 1)

    def test_weights_have_the_variance_of_kaiming_initialisation(self):
        torch.manual_seed(0)
        for network in (MNIST1DMLP(width=300), MNIST1DCNN(channels=100)):
            for layer in network.layers:
                if isinstance(layer, torch.nn.Linear | torch.nn.Conv1d):
                    fan_in = layer.weight[0].numel()
                    assert layer.weight.std().item() == pytest.approx(math.sqrt(2 / fan_in), rel=0.12)

    @pytest.mark.parametrize(
        'arguments',
        [{'num_classes': 0}, {'width': 0}, {'input_length': -40}],
        ids=lambda arguments: next(iter(arguments)),
    )
    def test_the_mlp_refuses_what_is_out_of_range(self, arguments):
        with pytest.raises(ValueError, match='must be a whole number of at least 1'):
            MNIST1DMLP(**arguments)

    def test_the_cnn_refuses_what_is_out_of_range(self):
        with pytest.raises(ValueError, match='channels must be a whole number of at least 1, got 0'):
            MNIST1DCNN(channels=0)


class TestBuildModel:
    @pytest.mark.parametrize('name', ['fashion_cnn', 'mnist1d_mlp', 'mnist1d_cnn', 'squeezenet1_1'])
    def test_it_returns_a_classifier_with_accuracy_and_loss(self, name):
        model = build_model(name, num_classes=7)
        assert isinstance(model, ComposerClassifier)
        assert model.num_classes == 7
        assert {type(metric) for metric in model.get_metrics(is_train=True).values()} == {MulticlassAccuracy}
        assert {type(metric) for metric in model.get_metrics(is_train=False).values()} == {
            MulticlassAccuracy,
            CrossEntropy,
        }

    def test_every_torchvision_classifier_is_there_and_no_other(self):
        own = {'fashion_cnn', 'mnist1d_cnn', 'mnist1d_mlp', 'hf_causal_lm', 'hf_image_classifier'}
        assert set(MODELS) - own == set(torchvision.models.list_models(module=torchvision.models))
        assert {'resnet18', 'vit_b_16', 'convnext_tiny'} <= set(MODELS)

    @pytest.mark.parametrize(
        ('name', 'arguments', 'side'),
        [
            ('resnet18', {}, 32),
            ('mobilenet_v3_small', {}, 32),
            ('vit_b_16', {'image_size': 32}, 32),
            ('googlenet', {}, 64),
        ],
    )
    def test_a_torchvision_model_returns_logits_while_training(self, name, arguments, side):
        model = build_model(name, num_classes=10, **arguments)
        model.train()
        batch = torch.zeros(2, 3, side, side), torch.tensor([0, 9])
        outputs = model(batch)
        assert outputs.shape == (2, 10)
        assert model.loss(outputs, batch).isfinite()

    def test_nothing_is_downloaded_unless_weights_are_named(self, monkeypatch):
        asked = []

        def load(*_, **__):
            asked.append('weights')
            return torchvision.models.resnet18().state_dict()

        monkeypatch.setattr(torchvision.models._api.WeightsEnum, 'get_state_dict', load)
        build_model('resnet18', num_classes=10)
        assert asked == []
        build_model('resnet18', weights='DEFAULT')
        build_model('resnet18', weights='ResNet18_Weights.IMAGENET1K_V1')
        assert asked == ['weights'] * 2

    @pytest.mark.parametrize(
        ('name', 'arguments', 'head'),
        [
            ('mobilenet_v3_small', {'num_classes': 3}, (3, 1024)),
            ('squeezenet1_1', {'num_classes': 3}, (3, 512, 1, 1)),
            ('squeezenet1_1', {'num_classes': 1000}, None),
            ('squeezenet1_1', {}, None),
        ],
    )
    def test_pretrained_weights_take_another_number_of_classes(self, monkeypatch, name, arguments, head):
        loaded = torchvision.models.get_model(name).state_dict()
        monkeypatch.setattr(torchvision.models._api.WeightsEnum, 'get_state_dict', lambda *_, **__: loaded)
        found = build_model(name, weights='DEFAULT', **arguments).module.state_dict()
        changed = {key: value.shape for key, value in found.items() if not torch.equal(value, loaded[key])}
        last = [key for key in found if key.endswith('weight')][-1]
        assert {key: tuple(shape) for key, shape in changed.items() if key.endswith('weight')} == (
            {last: head} if head else {}
        )
        assert len(changed) == (2 if head else 0)

    @pytest.mark.parametrize('name', ['resnet18', 'vit_b_16', 'maxvit_t', 'googlenet', 'densenet121', 'fashion_cnn'])
    def test_signatures_show_the_legal_keys(self, name):
        parameters = inspect.signature(MODELS[name]).parameters
        assert 'num_classes' in parameters
        for parameter in parameters.values():
            assert parameter.kind is inspect.Parameter.KEYWORD_ONLY
            assert parameter.default is not inspect.Parameter.empty

    @pytest.mark.parametrize(
        ('name', 'nearest'), [('fashion_cn', 'fashion_cnn'), ('resnet-18', 'resnet18'), ('mnist1d_mpl', 'mnist1d_mlp')]
    )
    def test_an_unknown_name_is_refused_with_the_nearest(self, name, nearest):
        with pytest.raises(ValueError, match=f"got '{name}'. Did you mean '{nearest}'"):
            build_model(name)

    def test_a_name_near_to_none_is_answered_with_all(self):
        with pytest.raises(ValueError, match=r'Legal names are fashion_cnn, .*mnist1d_mlp, alexnet'):
            build_model('qqq')

    @pytest.mark.parametrize(
        ('name', 'key', 'nearest'),
        [
            ('resnet18', 'num_clases', 'num_classes'),
            ('fashion_cnn', 'width', 'widths'),
            ('resnet18', 'weight', 'weights'),
        ],
    )
    def test_an_unknown_argument_is_refused_with_the_nearest(self, name, key, nearest):
        with pytest.raises(TypeError, match=f"'{name}' has no argument '{key}'. Did you mean '{nearest}'"):
            build_model(name, **{key: 3})

    def test_an_argument_near_to_none_is_answered_with_all(self):
        legal = 'num_classes, in_channels, widths, first_kernel_size, negative_slope'
        with pytest.raises(TypeError, match=f'It takes {legal}'):
            build_model('fashion_cnn', qqq=3)

    def test_unknown_weights_are_refused_with_the_legal_ones(self):
        with pytest.raises(ValueError, match=r"must be one of IMAGENET1K_V1, DEFAULT, got 'imagenet'\. Leave it out"):
            build_model('resnet18', weights='imagenet')

    @pytest.mark.parametrize(
        ('name', 'arguments'), [('densenet121', {'growth_rate': 3}), ('resnet18', {'num_classes': 10, 'groups': 'two'})]
    )
    def test_what_torchvision_refuses_is_refused_with_its_reason(self, name, arguments):
        with pytest.raises(ValueError, match=f"torchvision cannot build '{name}'|groups"):
            build_model(name, **arguments)
