"""Models of Hugging Face's transformers, by a configuration or from pretrained weights, as Composer's HuggingFaceModel.

transformers takes seconds to import, so it is imported where a recipe names one of these models.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from composer.metrics import LanguageCrossEntropy, LanguagePerplexity
from composer.models import ComposerClassifier, HuggingFaceModel
from torch import nn

from composer_ema.spans import ArgumentError
from composer_ema.wording import suggestion
from composer_ema.zoo.blocks import offer_blocks
from composer_ema.zoo.checks import check_whole
from composer_ema.zoo.tokens import Tokenizer, count_tokens

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_REMEDY = "Install it with: pip install 'transformers>=4.46,<4.54'"


def hf_causal_lm(
    *,
    pretrained: str | None = None,
    config: dict[str, Any] | None = None,
    tokenizer: str | Tokenizer | None = None,
) -> HuggingFaceModel:
    """A language model that predicts the next token: GPT-2, Llama, Qwen, ..., trained by cross entropy.

    Batches are mappings with `input_ids` and `labels`, both int64 `(n, length)`; the model compares each position with
    the label after it, and leaves out labels of -100. The two may not share memory: an evaluation shifts the labels
    in place. Its evaluation metrics are `LanguageCrossEntropy` and `LanguagePerplexity`.

    Args:
        pretrained: Name or folder of a model to begin with.
        config: Arguments of the model's configuration, such as `{model_type: gpt2, n_layer: 2}`. Without `pretrained`
            it must have a `model_type`, and the weights are random; with it, it changes the model's own.
        tokenizer: Name or folder of the tokenizer, which every checkpoint then keeps, and an export with it. A model
            from a `config` gets its number of tokens and its special tokens, where the `config` does not say them.
            Default: that of the data set; none where that has none.

    Returns:
        The model; `.model` is that of transformers.

    Raises:
        ValueError: Neither `pretrained` nor `config` is given, or the configuration has no such argument.
        ImportError: transformers is not installed.
    """
    transformers = _transformers('hf_causal_lm')
    own = _tokenizer(transformers, tokenizer)
    if pretrained is None and own is not None:
        config = {**_described(own), **(config or {})}
    network = _network(transformers.AutoModelForCausalLM, pretrained, _configuration(transformers, pretrained, config))
    if getattr(network, 'loss_type', '') is None:
        # GPT-2's class does not say it by its name, and transformers (4.53) warns before it takes this one.
        network.loss_type = 'ForCausalLM'
    return HuggingFaceModel(
        network, own, use_logits=True, eval_metrics=[LanguageCrossEntropy(), LanguagePerplexity()], shift_labels=True
    )


def hf_image_classifier(
    *,
    pretrained: str | None = None,
    config: dict[str, Any] | None = None,
    num_classes: int = 10,
) -> HuggingFaceModel:
    """An image classifier: ViT, ResNet, ConvNeXt, ..., for batches `(images, classes)`, trained by cross entropy.

    Its training metric is `MulticlassAccuracy`, its evaluation metrics are `CrossEntropy` and `MulticlassAccuracy`.

    Args:
        pretrained: Name or folder of a model to begin with. A last layer for other classes is drawn anew.
        config: Arguments of the model's configuration, such as `{model_type: vit, image_size: 32, patch_size: 4}`.
            Without `pretrained` it must have a `model_type`, and the weights are random; with it, it changes the
            model's own.
        num_classes: Number of classes, at least 1.

    Returns:
        The model; `.model` is that of transformers.

    Raises:
        ValueError: Neither `pretrained` nor `config` is given, or the configuration has no such argument.
        ImportError: transformers is not installed.
    """
    check_whole('num_classes', num_classes, 1, 'Pass the number of classes of the data set.')
    transformers = _transformers('hf_image_classifier')
    found = _configuration(transformers, pretrained, {**(config or {}), 'num_labels': num_classes})
    network = _network(transformers.AutoModelForImageClassification, pretrained, found, ignore_mismatched_sizes=True)
    return _ImageClassifier(network, num_classes)


class _ImageClassifier(HuggingFaceModel):
    """An image classifier that takes pairs, as the data sets of recipes give them."""

    def __init__(self, network: Any, num_classes: int) -> None:
        as_others = ComposerClassifier(nn.Identity(), num_classes=num_classes)
        training, evaluation = (list(as_others.get_metrics(is_train).values()) for is_train in (True, False))
        super().__init__(network, use_logits=True, metrics=training, eval_metrics=evaluation, shift_labels=False)
        self.num_classes = num_classes

    def forward(self, batch: Any) -> Any:
        return super().forward(_named(batch))

    def loss(self, outputs: Any, batch: Any) -> Any:
        return super().loss(outputs, _named(batch))

    def eval_forward(self, batch: Any, outputs: Any = None) -> Any:
        return super().eval_forward(dict(_named(batch)), outputs)


def _named(batch: Any) -> Mapping[str, Any]:
    return batch if isinstance(batch, Mapping) else {'pixel_values': batch[0], 'labels': batch[1]}


def _transformers(model: str) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError(f'{model} needs transformers: {error}. {_REMEDY}') from error
    return transformers


def _tokenizer(transformers: Any, given: str | Tokenizer | None) -> Any:
    if given is None:
        return None
    if isinstance(given, str):
        return transformers.AutoTokenizer.from_pretrained(given, trust_remote_code=False)
    return given.pretrained()


def _described(tokenizer: Any) -> dict[str, Any]:
    """What a configuration says of the tokenizer."""
    special = ('bos_token_id', 'eos_token_id', 'pad_token_id')
    return {'vocab_size': count_tokens(tokenizer), **{name: getattr(tokenizer, name) for name in special}}


def _network(family: Any, pretrained: str | None, config: PretrainedConfig, **options: Any) -> Any:
    # Neither may run code that comes with the model, as transformers otherwise asks on a terminal.
    if pretrained is None:
        network = family.from_config(config, trust_remote_code=False)
    else:
        network = family.from_pretrained(pretrained, config=config, trust_remote_code=False, **options)
    network.train()
    offer_blocks(network)
    return network


def _configuration(transformers: Any, pretrained: str | None, config: Mapping[str, Any] | None) -> PretrainedConfig:
    given = dict(config or {})
    model_type = given.pop('model_type', None)
    if pretrained is not None:
        found = transformers.AutoConfig.from_pretrained(pretrained, trust_remote_code=False)
        if model_type not in (None, found.model_type):
            raise ArgumentError(
                f'config has model_type {model_type!r}, and {pretrained} is {found.model_type!r}. Leave it out.',
                'config',
            )
        _check_arguments(type(found), given)
        found.update(given)
        return found
    if model_type is None:
        raise ArgumentError(
            f'a model needs pretrained, or a config with a model_type, got config={config!r}. Write '
            'config: {model_type: gpt2, n_layer: 2}, for example.',
            'config',
        )
    legal = transformers.models.auto.configuration_auto.CONFIG_MAPPING
    if model_type not in legal:
        raise ArgumentError(
            f'transformers has no model_type {model_type!r}. {suggestion(model_type, legal.keys())}', 'config'
        )
    _check_arguments(legal[model_type], given)
    return legal[model_type](**given)


def _check_arguments(kind: type[PretrainedConfig], given: Mapping[str, Any]) -> None:
    """Refuses what a configuration would keep without using it: it takes every name."""
    parameters = inspect.signature(kind).parameters.values()
    legal = [each.name for each in parameters if each.kind is not each.VAR_KEYWORD]
    others = {*kind.attribute_map, *kind().to_dict(), 'num_labels'}
    for name in given:
        if name not in legal and name not in others:
            raise ArgumentError(
                f'{kind.__name__} has no argument {name!r}. {suggestion(name, legal, "It takes")}', 'config'
            )
