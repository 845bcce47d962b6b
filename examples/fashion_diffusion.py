"""Trains a small diffusion model of Fashion-MNIST, then asks which half-life of its average draws the best images.

    python examples/fashion_diffusion.py --out runs/fashion_diffusion

The model is a U-Net of 313,124 parameters in plain PyTorch, with the noise levels, the preconditioning and the
deterministic sampler of Karras et al. (2022, https://arxiv.org/abs/2206.00364), at a constant learning rate. While it
trains, `composer_ema.Snapshots` keeps two power averages. Afterwards averages of many half-lives are reconstructed from
them; each draws images from the same noise, and the Frechet distance between these images and the test images is
measured in the features of a small classifier that the script trains as well.

It needs composer_ema, matplotlib, torchvision and tqdm, but no Composer. A run that was stopped goes on when the script
is started again with the same arguments. It leaves distances.json and two pictures in its folder.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from composer_ema import Snapshots, read_checkpoint, reconstruct
from composer_ema.files import beside, write_beside
from composer_ema.zoo.fetch import load_fashion_mnist

#: Standard deviation of the images between -1 and 1, roughly.
SIGMA_DATA = 0.7
#: Mean and standard deviation of the logarithm of the noise levels in training.
LOG_SIGMA = (-1.2, 1.2)
#: Noise levels of the sampler, from the highest to the lowest, and how they are spaced.
SIGMA_MAX, SIGMA_MIN, RHO = 80.0, 0.01, 7.0
TRAINING_WEIGHTS = 'training weights'
#: Averages whose predicted error is larger are drawn hollow.
LARGEST_ERROR = 0.05
HALF_LIVES = (0.002, 0.005, 0.01, 0.02, 0.04, 0.07, 0.12, 0.2, 0.35)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    data = load_fashion_mnist(options.root)
    train(options, data['train_inputs'])
    if options.train_only:
        return
    features = trained_classifier(options, data)
    distances = sweep(options, features, data['test_inputs'])
    draw(options, distances)


# Training


def train(options: argparse.Namespace, images: Tensor) -> None:
    torch.manual_seed(options.seed)
    model = UNet()
    optimizer = torch.optim.Adam(model.parameters(), lr=options.lr)
    checkpoint = options.out / 'training.pt'
    snapshots = Snapshots(
        model,
        options.out / 'snapshots',
        every='0.03125dur',
        halvings=0,
        num_steps=options.steps,
        overwrite=not checkpoint.exists(),  # what a run left that was killed before its first checkpoint
    )
    step = 0
    if checkpoint.exists():
        state = read_checkpoint(checkpoint)
        check_same_run(options, state['run'], checkpoint)
        model.load_state_dict(state['model'])
        optimizer.load_state_dict(state['optimizer'])
        snapshots.load_state_dict(state['snapshots'])
        step = state['step']
    if step == options.steps:
        return
    with tqdm(total=options.steps, initial=step, desc='training', unit='step') as bar:
        while step < options.steps:
            loss = loss_of(model, images, options, step)
            optimizer.zero_grad()
            loss.backward()
            snapshots.wait_for_reads()
            optimizer.step()
            snapshots.update(options.batch_size)
            step += 1
            bar.update()
            bar.set_postfix(loss=f'{loss.item():.3f}')
            if step == options.steps:
                snapshots.finish()
            if step % options.save_every == 0 or step == options.steps:
                state = {'model': model.state_dict(), 'optimizer': optimizer.state_dict(), 'step': step}
                with beside(checkpoint) as written:
                    torch.save({**state, 'snapshots': snapshots.state_dict(), 'run': run_of(options)}, written)


def loss_of(model: UNet, images: Tensor, options: argparse.Namespace, step: int) -> Tensor:
    """The weighted squared error of one batch; the step alone decides on images and noise, so that runs resume."""
    generator = torch.Generator().manual_seed(options.seed * 1_000_003 + step)
    chosen = torch.randint(len(images), (options.batch_size,), generator=generator)
    clean = scaled(images[chosen])
    mean, deviation = LOG_SIGMA
    sigma = (mean + deviation * torch.randn(len(clean), 1, 1, 1, generator=generator)).exp()
    noise = sigma * torch.randn(clean.shape, generator=generator)
    weight = (sigma**2 + SIGMA_DATA**2) / (sigma * SIGMA_DATA) ** 2
    return (weight * (model.denoised(clean + noise, sigma) - clean) ** 2).mean()


def scaled(images: Tensor) -> Tensor:
    return images.float().view(-1, 1, 28, 28) / 127.5 - 1


def run_of(options: argparse.Namespace) -> dict[str, float]:
    return {name: getattr(options, name) for name in ('seed', 'steps', 'batch_size', 'lr')}


def check_same_run(options: argparse.Namespace, other: dict[str, float], checkpoint: Path) -> None:
    if other != run_of(options):
        raise SystemExit(
            f'{checkpoint} belongs to a run with {other}, this one has {run_of(options)}. Pass the same values, or '
            'another --out.'
        )


# The model


class UNet(nn.Module):
    """Halves the images twice, to 14 x 14 and to 7 x 7 places, and back."""

    def __init__(self, channels: int = 32, embedding: int = 64) -> None:
        super().__init__()
        wide = 2 * channels
        self.embed = nn.Sequential(nn.Linear(32, embedding), nn.SiLU(), nn.Linear(embedding, embedding), nn.SiLU())
        self.enter = nn.Conv2d(4, channels, 3, padding=1)
        self.down = nn.ModuleList([Block(channels, channels, embedding) for _ in range(2)])
        self.shrink = nn.Conv2d(channels, wide, 3, stride=2, padding=1)
        self.middle = nn.ModuleList([Block(wide, wide, embedding), Attention(wide), Block(wide, wide, embedding)])
        self.grow = nn.Conv2d(wide, channels, 3, padding=1)
        self.up = nn.ModuleList([Block(2 * channels, channels, embedding), Block(channels, channels, embedding)])
        self.norm = nn.GroupNorm(8, channels)
        self.leave = nn.Conv2d(channels, 4, 3, padding=1)
        nn.init.zeros_(self.leave.weight)

    def denoised(self, noisy: Tensor, sigma: Tensor) -> Tensor:
        """The images that are expected behind ``noisy``, preconditioned so that the network sees unit variance."""
        total = sigma**2 + SIGMA_DATA**2
        found = self(noisy / total.sqrt(), sigma.log() / 4)
        return SIGMA_DATA**2 / total * noisy + sigma * SIGMA_DATA / total.sqrt() * found

    def forward(self, inputs: Tensor, level: Tensor) -> Tensor:
        angles = level.view(-1, 1) * torch.logspace(0, 2, 16)
        embedding = self.embed(torch.cat([angles.sin(), angles.cos()], dim=1))
        hidden = self.enter(functional.pixel_unshuffle(inputs, 2))
        for block in self.down:
            hidden = block(hidden, embedding)
        coarse = self.shrink(hidden)
        for block in self.middle:
            coarse = block(coarse, embedding)
        hidden = torch.cat([hidden, self.grow(functional.interpolate(coarse, scale_factor=2))], dim=1)
        for block in self.up:
            hidden = block(hidden, embedding)
        return functional.pixel_shuffle(self.leave(functional.silu(self.norm(hidden))), 2)


class Block(nn.Module):
    """Two convolutions beside a shortcut, told the noise level in between."""

    def __init__(self, inputs: int, outputs: int, embedding: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.GroupNorm(8, inputs), nn.SiLU(), nn.Conv2d(inputs, outputs, 3, padding=1))
        self.level = nn.Linear(embedding, outputs)
        self.second = nn.Sequential(nn.GroupNorm(8, outputs), nn.SiLU(), nn.Conv2d(outputs, outputs, 3, padding=1))
        self.shortcut = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, inputs: Tensor, embedding: Tensor) -> Tensor:
        hidden = self.first(inputs) + self.level(embedding)[:, :, None, None]
        return self.shortcut(inputs) + self.second(hidden)


class Attention(nn.Module):
    """Every place looks at every other one."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, channels)
        self.project = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, inputs: Tensor, embedding: Tensor) -> Tensor:
        del embedding
        query, key, value = self.project(self.norm(inputs)).flatten(2).transpose(1, 2).chunk(3, dim=-1)
        seen = functional.scaled_dot_product_attention(query, key, value)
        return inputs + self.out(seen.transpose(1, 2).reshape(inputs.shape))


@torch.no_grad()
def sampled(model: UNet, noise: Tensor, steps: int) -> Tensor:
    """Images from noise of unit variance, by Heun's method: two looks at the model a step, and one in the last."""
    share = torch.linspace(0, 1, steps)
    sigmas = (SIGMA_MAX ** (1 / RHO) + share * (SIGMA_MIN ** (1 / RHO) - SIGMA_MAX ** (1 / RHO))) ** RHO
    images = noise * SIGMA_MAX
    for sigma, following in zip(sigmas, [*sigmas[1:], torch.zeros(())], strict=True):
        slope = (images - model.denoised(images, sigma.expand(len(images), 1, 1, 1))) / sigma
        stepped = images + (following - sigma) * slope
        if following > 0:
            other = (stepped - model.denoised(stepped, following.expand(len(images), 1, 1, 1))) / following
            stepped = images + (following - sigma) * (slope + other) / 2
        images = stepped
    return images.clamp(-1, 1)


# The distance


class Classifier(nn.Module):
    """Tells the ten kinds of clothes apart; its last hidden layer is what images are compared by."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 24, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(24, 48, 3, stride=2, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(48 * 49, 64), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


def trained_classifier(options: argparse.Namespace, data: dict[str, Tensor]) -> nn.Module:
    path = options.out / 'classifier.pt'
    torch.manual_seed(options.seed)
    model = Classifier()
    if not path.exists():
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        order = torch.randperm(len(data['train_inputs'])).repeat(3)[: options.classifier_batches * 100]
        for chosen in tqdm(order.split(100), desc='classifier', unit='batch'):
            logits = model(scaled(data['train_inputs'][chosen]))
            optimizer.zero_grad()
            functional.cross_entropy(logits, data['train_labels'][chosen].long()).backward()
            optimizer.step()
        with beside(path) as written:
            torch.save(model.state_dict(), written)
    model.load_state_dict(read_checkpoint(path))
    with torch.no_grad():
        found = model(scaled(data['test_inputs'])).argmax(1)
    tqdm.write(f'accuracy of the classifier: {(found == data["test_labels"]).float().mean():.4f}')
    return model.features.eval()


def statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    wide = features.double()
    return wide.mean(0), wide.T.cov()


def frechet_distance(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> float:
    """``|m - n|^2 + tr(C + D - 2 (C D)^(1/2))`` of two normal distributions (Heusel et al. 2017)."""
    (mean, covariance), (other_mean, other_covariance) = one, other
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    product = torch.linalg.eigvalsh(root @ other_covariance @ root).clamp(min=0).sqrt().sum()
    return float((mean - other_mean).square().sum() + covariance.trace() + other_covariance.trace() - 2 * product)


# The sweep


def sweep(options: argparse.Namespace, features: nn.Module, test_images: Tensor) -> dict[str, dict[str, float]]:
    """The distance of the images of each average from the test images, by its half-life as a share of the run."""
    path = options.out / 'distances.json'
    settings = {**run_of(options), 'images': options.images, 'sampler_steps': options.sampler_steps}
    kept = json.loads(path.read_text()) if path.exists() else {}
    found = kept.get('distances', {}) if kept.get('settings') == settings else {}
    with torch.no_grad():
        expected = statistics(features(scaled(test_images)))
    for name, model, error in tqdm(list(candidates(options, found)), desc='averages'):
        drawn = images_of(options, model, options.images)
        with torch.no_grad():
            distance = frechet_distance(statistics(features(drawn)), expected)
        found[name] = {'distance': distance, 'predicted_error': error}
        tqdm.write(f'{name}: {distance:.3f}')
        write_beside(path, json.dumps({'settings': settings, 'distances': found}, indent=2) + '\n')
    return found


def candidates(options: argparse.Namespace, found: dict[str, dict[str, float]]) -> Iterator[tuple[str, UNet, float]]:
    """The training weights and the averages that are not measured yet, each with its predicted error."""
    for name in (TRAINING_WEIGHTS, *map(str, options.half_lives)):
        if name not in found:
            model, error = model_of(options, name)
            yield name, model, error


def model_of(options: argparse.Namespace, name: str) -> tuple[UNet, float]:
    model = UNet()
    if name == TRAINING_WEIGHTS:
        model.load_state_dict(read_checkpoint(options.out / 'training.pt')['model'])
        return model.eval(), 0.0
    average = reconstruct(options.out / 'snapshots', half_life=f'{name}dur', anyway=True)
    average.load_into(model)
    return model.eval(), average.predicted_error


def images_of(options: argparse.Namespace, model: UNet, count: int) -> Tensor:
    noise = torch.randn(count, 1, 28, 28, generator=torch.Generator().manual_seed(options.seed))
    batches = noise.split(250)
    return torch.cat([sampled(model, batch, options.sampler_steps) for batch in batches])


# Pictures


def draw(options: argparse.Namespace, distances: dict[str, dict[str, float]]) -> None:
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot

    shares = sorted(float(name) for name in distances if name != TRAINING_WEIGHTS)
    averages = [distances[str(share)] for share in shares]
    # Where the average itself is uncertain, so is its distance.
    certain = [share for share in shares if distances[str(share)]['predicted_error'] <= LARGEST_ERROR] or shares
    best = min(certain, key=lambda share: distances[str(share)]['distance'])
    baseline = distances[TRAINING_WEIGHTS]['distance']

    figure, axes = pyplot.subplots(figsize=(6, 3.6), layout='constrained')
    axes.axhline(baseline, color='0.45', linestyle='--', label=TRAINING_WEIGHTS)
    axes.plot([100 * share for share in shares], [each['distance'] for each in averages], color='C0')
    for share, each in zip(shares, averages, strict=True):
        filled = 'C0' if each['predicted_error'] <= LARGEST_ERROR else 'white'
        axes.plot(100 * share, each['distance'], 'o', color='C0', markerfacecolor=filled)
    axes.plot(100 * best, distances[str(best)]['distance'], '*', markersize=14, color='C3', label=f'best: {best:.1%}')
    axes.set(xscale='log', yscale='log', xlabel='half-life, % of the run', ylabel='Fréchet distance')
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter('{x:g}')
    axes.yaxis.set_minor_formatter('{x:g}')
    axes.legend(frameon=False)
    figure.savefig(options.out / 'diffusion_sweep.png', dpi=150)
    pyplot.close(figure)

    figure, panels = pyplot.subplots(1, 2, figsize=(8, 4.3), layout='constrained')
    for axes, name in zip(panels, (TRAINING_WEIGHTS, str(best)), strict=True):
        images = images_of(options, model_of(options, name)[0], 64)
        axes.imshow(tiled(images).numpy(), cmap='gray_r', interpolation='nearest')
        words = name if name == TRAINING_WEIGHTS else f'average, half-life {best:.1%} of the run'
        axes.set_title(f'{words}: distance {distances[name]["distance"]:.2f}', fontsize=10)
        axes.axis('off')
    figure.savefig(options.out / 'diffusion_samples.png', dpi=120)
    pyplot.close(figure)


def tiled(images: Tensor) -> Tensor:
    side = math.isqrt(len(images))
    rows = images[: side**2].view(side, side, 28, 28)
    return rows.permute(0, 2, 1, 3).reshape(28 * side, 28 * side)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument('--out', type=Path, default=Path('runs/fashion_diffusion'), help='folder of the run')
    options.add_argument('--root', default=None, help='folder of Fashion-MNIST; looked for or fetched if not given')
    options.add_argument('--steps', type=at_least_one, default=6000, help='of training')
    options.add_argument('--batch-size', type=at_least_one, default=32)
    options.add_argument('--lr', type=float, default=2e-3, help='constant learning rate of Adam')
    options.add_argument('--seed', type=int, default=0)
    options.add_argument('--save-every', type=at_least_one, default=200, help='steps between two checkpoints')
    options.add_argument('--train-only', action='store_true', help='stop after training')
    options.add_argument('--half-lives', type=float, nargs='+', default=HALF_LIVES, help='as shares of the run')
    options.add_argument('--images', type=at_least_one, default=1000, help='images that each average draws')
    options.add_argument('--sampler-steps', type=at_least_one, default=12, help='two looks at the model each')
    options.add_argument('--classifier-batches', type=at_least_one, default=1200, help='of 100 images, at most 1800')
    return options.parse_args(arguments)


def at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f'must be at least 1, got {number}')
    return number


if __name__ == '__main__':
    main()
