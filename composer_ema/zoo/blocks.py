"""The blocks of a network: what FSDP2 gathers at a time, and what activation checkpointing recomputes.

Composer asks the network for both. Without an answer it shards the network as one group, which every rank holds whole
from its first layer to its last, and checkpoints nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn


class IsBlock:
    """Tells Composer whether a module is one of a network's :func:`blocks`.

    Args:
        network: It is looked through at each call, so blocks that an algorithm has replaced are found, too.
    """

    def __init__(self, network: nn.Module) -> None:
        self._network = network

    def __call__(self, module: nn.Module) -> bool:
        return any(block is module for block in blocks(self._network))


def blocks(network: nn.Module) -> Iterator[nn.Module]:
    """The outermost entries of `Sequential`s and `ModuleList`s that are made of several layers themselves.

    A stage that is a `Sequential` of blocks counts as its blocks. A `Sequential` of single layers, as the networks of
    this package are, has none: layers so small are not worth messages of their own.

    Args:
        network: A model, sharded or not. It is only read.

    Yields:
        Modules with parameters, none inside another, in the order of the network.

    Example:
        >>> block = lambda: nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        >>> network = nn.Sequential(nn.Linear(2, 2), block(), nn.Sequential(block(), block()))
        >>> [name for name, module in network.named_modules() if module in list(blocks(network))]
        ['1', '2.0', '2.1']
    """
    for child in network.children():
        if _is_list(network) and _has_layers(child) and not _holds_blocks(child):
            yield child
        else:
            yield from blocks(child)


def offer_blocks(network: nn.Module) -> None:
    """Lets Composer shard and checkpoint ``network`` block by block, unless it has an answer of its own."""
    offered: Any = network
    for question in ('fsdp_wrap_fn', 'activation_checkpointing_fn'):
        if not hasattr(network, question):
            setattr(offered, question, IsBlock(network))


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential | nn.ModuleList)


def _has_layers(module: nn.Module) -> bool:
    """Whether a module has modules inside, and parameters."""
    return any(True for _ in module.children()) and any(True for _ in module.parameters())


def _holds_blocks(module: nn.Module) -> bool:
    """Whether a module is a list of blocks: all of its entries that have parameters are made of several layers."""
    filled = [child for child in module.children() if any(True for _ in child.parameters())]
    return _is_list(module) and all(map(_has_layers, filled))
