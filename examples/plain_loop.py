"""Trains Fashion-MNIST in a plain PyTorch loop, evaluates the weights and their average, and resumes if killed.

    python examples/plain_loop.py --epochs 5

It needs composer_ema, torchvision and tqdm, but no Composer. The run writes one file, its checkpoint. Start the script
again and it resumes from there; on a CPU it ends with the bits of an uninterrupted run. To start over, delete the file.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from composer_ema import EMAOptimizer, read_checkpoint
from composer_ema.zoo.fetch import load_fashion_mnist


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    torch.manual_seed(options.seed)
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    data = {name: tensor.to(device) for name, tensor in load_fashion_mnist(options.root).items()}
    inputs, labels = data['train_inputs'][: options.limit], data['train_labels'][: options.limit]
    test_inputs, test_labels = data['test_inputs'][: options.limit], data['test_labels'][: options.limit]

    model = build_model().to(device)
    optimizer = EMAOptimizer(
        torch.optim.AdamW(model.parameters(), lr=options.lr), half_life=options.half_life, model=model
    )
    epoch, done = load(options, model, optimizer)

    while epoch < options.epochs:
        order = shuffled(len(inputs), options.seed, epoch).to(device)
        batches = order.split(options.batch_size)
        with tqdm(total=len(batches), initial=done, desc=f'epoch {epoch + 1}', unit='batch') as bar:
            for batch in batches[done:]:
                loss = cross_entropy(model(scaled(inputs[batch])), labels[batch].long())
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                done += 1
                bar.update()
                if done % options.save_every == 0 and done < len(batches):
                    save(options, model, optimizer, epoch, done)
        training = accuracy(model, test_inputs, test_labels)
        with optimizer.swap_ema_weights():
            averaged = accuracy(model, test_inputs, test_labels)
        tqdm.write(
            f'epoch {epoch + 1}: accuracy {training:.4f} with the training weights, {averaged:.4f} with the average'
        )
        epoch, done = epoch + 1, 0
        save(options, model, optimizer, epoch, done)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0] if __doc__ else None)
    parser.add_argument('--epochs', type=at_least_one, default=5)
    parser.add_argument('--batch-size', type=at_least_one, default=128)
    parser.add_argument('--lr', type=float, default=3e-3)
    parser.add_argument('--half-life', type=float, default=300, help='half-life of the average, in steps')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--limit', type=at_least_one, help='number of images to train and test on; default: all')
    parser.add_argument('--root', type=Path, help='folder with Fashion-MNIST; searched before the usual places')
    parser.add_argument(
        '--checkpoint', type=Path, default=Path('plain_loop.pt'), help='file to write, and to resume from'
    )
    parser.add_argument('--save-every', type=at_least_one, default=100, help='batches between two checkpoints')
    return parser.parse_args(arguments)


def at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f'must be at least 1, got {number}')
    return number


def build_model() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 6 * 6, 10),
    )


def shuffled(length: int, seed: int, epoch: int) -> Tensor:
    """Returns the order of an epoch. It depends on seed and epoch alone, so a resumed run need not save it."""
    return torch.randperm(length, generator=torch.Generator().manual_seed(1_000_003 * seed + epoch))


def scaled(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1


@torch.no_grad()
def accuracy(model: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    model.eval()
    parts = zip(inputs.split(1000), labels.split(1000), strict=True)
    correct = sum((model(scaled(part)).argmax(1) == wanted).sum().item() for part, wanted in parts)
    model.train()
    return correct / len(labels)


def save(options: argparse.Namespace, model: nn.Module, optimizer: EMAOptimizer, epoch: int, done: int) -> None:
    """Writes a new file and renames it, so that a complete checkpoint exists whenever the process is killed."""
    path = options.checkpoint
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f'.{path.name}.unfinished')
    state = {'model': model.state_dict(), 'optimizer': optimizer.state_dict(), 'epoch': epoch, 'done': done}
    torch.save({**state, 'data': what_orders_the_data(options)}, beside)
    beside.replace(path)


def load(options: argparse.Namespace, model: nn.Module, optimizer: EMAOptimizer) -> tuple[int, int]:
    """Loads the checkpoint, if there is one. Returns the epoch to continue and the number of its batches done."""
    path = options.checkpoint
    if not path.exists():
        return 0, 0
    state = read_checkpoint(path)
    if state['data'] != what_orders_the_data(options):
        raise SystemExit(
            f'{path} belongs to a run with {state["data"]}, this one has {what_orders_the_data(options)}. '
            'Pass the same values, or another --checkpoint.'
        )
    model.load_state_dict(state['model'])
    optimizer.load_state_dict(state['optimizer'])
    print(f'resuming from {path}: {state["epoch"]} epochs and {state["done"]} batches done')
    return state['epoch'], state['done']


def what_orders_the_data(options: argparse.Namespace) -> dict[str, int | None]:
    """Returns the options that a resumed run must share with the run that it continues."""
    return {name: getattr(options, name) for name in ('seed', 'batch_size', 'limit')}


if __name__ == '__main__':
    main()
