"""Learns features of Fashion-MNIST without labels, from a teacher that is the average of the network in training.

    python examples/byol.py

BYOL (Grill et al. 2020, arXiv:2006.07733): the network predicts, from one view of an image, what the teacher makes of
another view. The teacher is `shadow.module(network)`, which computes in the memory of the average, so that there is no
second copy and nothing to swap. At the end the features are judged by their nearest neighbours among views of 1000
labelled images, beside those of a network with random weights. It needs composer_ema and torchvision, but no Composer.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import affine_grid, cosine_similarity, grid_sample, normalize

from composer_ema import ShadowModel
from composer_ema.zoo.fetch import load_fashion_mnist

WIDTH = 64
NUM_NEIGHBOURS = 5


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    data = load_fashion_mnist(options.root)
    images, labels = data['train_inputs'][: options.images], data['train_labels'][: options.labelled].long()
    test_images, test_labels = data['test_inputs'][: options.test], data['test_labels'][: options.test].long()
    for seed in options.seeds:
        torch.manual_seed(seed)
        network = Network()
        shadow = ShadowModel(network)
        teacher = shadow.module(network)
        found = {'random': accuracy(network.encoder, images, labels, test_images, test_labels)}
        train(network, shadow, teacher, images, options)
        found['network'] = accuracy(network.encoder, images, labels, test_images, test_labels)
        found['teacher'] = accuracy(teacher.encoder, images, labels, test_images, test_labels)
        print(f'seed {seed}: ' + ', '.join(f'{name} {100 * share:.1f} %' for name, share in found.items()), flush=True)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0] if __doc__ else None)
    parser.add_argument('--seeds', type=int, nargs='+', default=[0], help='one run for each; default: 0')
    parser.add_argument('--steps', type=int, default=400)
    parser.add_argument('--batch-size', type=int, default=96)
    parser.add_argument('--lr', type=float, default=1e-2)
    parser.add_argument(
        '--smoothing', type=float, default=0.8, help='of the average at the start; at the end it is 0.999'
    )
    parser.add_argument('--images', type=int, default=20_000, help='images to learn from, without labels')
    parser.add_argument('--labelled', type=int, default=1000, help='labelled images to find neighbours among')
    parser.add_argument('--test', type=int, default=2000, help='images to classify')
    parser.add_argument('--root', type=Path, help='folder with Fashion-MNIST; searched before the usual places')
    return parser.parse_args(arguments)


class Network(nn.Module):
    """An encoder, whose features are what is wanted, and the heads that training needs."""

    def __init__(self) -> None:
        super().__init__()
        widths = (1, 16, 32, WIDTH)
        self.encoder = nn.Sequential(
            *(block(before, after) for before, after in itertools.pairwise(widths)),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.projector, self.predictor = head(), head()

    def forward(self, views: Tensor) -> Tensor:
        return self.projector(self.encoder(views))


def block(before: int, after: int) -> nn.Module:
    convolution = nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(after), nn.ReLU())


def head() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, WIDTH))


def train(
    network: Network, shadow: ShadowModel, teacher: nn.Module, images: Tensor, options: argparse.Namespace
) -> None:
    optimizer = torch.optim.AdamW(network.parameters(), lr=options.lr, weight_decay=1e-4)
    network.train()
    teacher.train()  # as in the paper: BatchNorm normalises the teacher's batch, too
    for step in range(options.steps):
        share_done = (1 - math.cos(math.pi * step / options.steps)) / 2
        smoothing = options.smoothing + (0.999 - options.smoothing) * share_done
        batch = scaled(images[torch.randint(len(images), (options.batch_size,))])
        views = torch.cat([view(batch), view(batch)])
        with torch.no_grad():
            targets = torch.cat(teacher(views).chunk(2)[::-1])  # of the other view
        loss = 2 - 2 * cosine_similarity(network.predictor(network(views)), targets).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        shadow.update(network, smoothing=smoothing)
    network.eval()
    teacher.eval()


def view(images: Tensor) -> Tensor:
    """The images shifted, scaled, mirrored, brightened and with a patch cut out, each in its own way."""
    count = len(images)
    scale = torch.empty(count).uniform_(0.6, 1.0)
    mirror = 1 - 2 * torch.randint(2, (count,))
    transform = torch.zeros(count, 2, 3)
    transform[:, 0, 0], transform[:, 1, 1] = scale * mirror, scale
    transform[:, :, 2] = torch.empty(count, 2).uniform_(-1, 1) * (1.1 - scale)[:, None]
    seen = grid_sample(images, affine_grid(transform, list(images.shape), align_corners=False), align_corners=False)
    seen = seen * torch.empty(count, 1, 1, 1).uniform_(0.5, 1.5)
    rows, columns = torch.arange(28)[None, :, None], torch.arange(28)[None, None, :]
    top, left = torch.randint(20, (2, count, 1, 1))
    is_cut = (rows >= top) & (rows < top + 8) & (columns >= left) & (columns < left + 8)
    return seen.masked_fill(is_cut[:, None], 0) + 0.05 * torch.randn_like(images)


def scaled(images: Tensor) -> Tensor:
    return images.float().reshape(-1, 1, 28, 28) / 255


@torch.no_grad()
def accuracy(encoder: nn.Module, images: Tensor, labels: Tensor, test_images: Tensor, test_labels: Tensor) -> float:
    """The share of the views of test images that have the label of most of their nearest labelled views."""
    was_training = encoder.training
    encoder.eval()
    known, asked = (
        normalize(torch.cat([encoder(view(scaled(part))) for part in each.split(500)]))
        for each in (images[: len(labels)], test_images)
    )
    encoder.train(was_training)
    nearest = (asked @ known.T).topk(NUM_NEIGHBOURS).indices
    votes = labels[nearest].mode().values
    return (votes == test_labels).float().mean().item()


if __name__ == '__main__':
    main()
