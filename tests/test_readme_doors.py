"""The README's table of doors: the lines of each row run with the library that they are for, and keep an average."""

import re
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from composer_ema import ShadowModel

README = Path(__file__).parents[1] / 'README.md'


def lines_of(trainer: str) -> str:
    (row,) = (line for line in README.read_text().splitlines() if line.startswith(f'| {trainer} |'))
    return '\n'.join(re.findall(r'`([^`]+)`', row.split('|')[2]))


def run(trainer: str, **names: object) -> dict:
    exec(lines_of(trainer), names)
    return names


@pytest.fixture
def model():
    torch.manual_seed(0)
    return torch.nn.Linear(4, 2)


@pytest.fixture
def samples():
    return TensorDataset(torch.randn(8, 4), torch.randint(2, (8,)))


def is_average_of(shadow: ShadowModel, model: torch.nn.Module, updates: int) -> bool:
    """Whether as many updates were made, and the average lags behind the weights."""
    average = shadow.averaged_state_dict(model)
    return shadow.num_updates == updates and not torch.equal(next(iter(average.values())), next(model.parameters()))


def test_composer(model, samples):
    from composer import Trainer
    from composer.models import ComposerClassifier

    found = run(
        'Composer', model=ComposerClassifier(model, num_classes=2), loader=DataLoader(samples, 2), Trainer=Trainer
    )
    (ema,) = (each for each in found['trainer'].state.algorithms if type(each).__name__ == 'EMA')
    assert is_average_of(ema.ema_model, found['trainer'].state.model, 8)


def test_lightning(model, samples, tmp_path, monkeypatch):
    L = pytest.importorskip('lightning.pytorch')
    monkeypatch.chdir(tmp_path)

    class Module(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.inner = model

        def training_step(self, batch):
            return torch.nn.functional.cross_entropy(self.inner(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters())

    found = run('Lightning', module=Module(), loader=DataLoader(samples, 2), L=L)
    (average,) = (each for each in found['trainer'].callbacks if type(each).__name__ == 'WeightAverage')
    assert is_average_of(average.shadow(), found['module'], 8)


def test_transformers(tmp_path):
    transformers = pytest.importorskip('transformers')
    config = transformers.GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    args = transformers.TrainingArguments(
        str(tmp_path), num_train_epochs=2, per_device_train_batch_size=2, report_to=[], use_cpu=True, disable_tqdm=True
    )
    data = [{'input_ids': tokens, 'labels': tokens} for tokens in torch.randint(11, (8, 8))]
    model = transformers.GPT2LMHeadModel(config)
    found = run('transformers', Trainer=transformers.Trainer, model=model, args=args, data=data)
    callbacks = found['trainer'].callback_handler.callbacks
    (average,) = (each for each in callbacks if type(each).__name__ == 'WeightAverage')
    assert is_average_of(average.shadow(), model, 8)


def test_accelerate(model, samples):
    accelerate = pytest.importorskip('accelerate')
    accelerator = accelerate.Accelerator(cpu=True)
    found = run('accelerate', model=model, loader=DataLoader(samples, 2), accelerator=accelerator, torch=torch)
    for inputs, targets in found['loader']:
        accelerator.backward(torch.nn.functional.cross_entropy(found['model'](inputs), targets))
        found['optimizer'].step()
        found['optimizer'].zero_grad()
    assert is_average_of(found['optimizer'].optimizer.shadow, model, 4)


def test_a_loop_of_your_own(model):
    found = run('a loop of your own', model=model)
    assert found['shadow'].num_updates == 1


def test_a_teacher_beside_it(model):
    found = run('a teacher beside it', model=model)
    with torch.no_grad():
        model.weight.add_(1.0)
    found['shadow'].update(model, smoothing=0.0)
    inputs = torch.randn(3, 4)
    assert torch.equal(found['teacher'](inputs), model(inputs))


def test_a_recipe():
    import yaml

    from composer_ema.recipe.registry import algorithms

    ((name, arguments),) = yaml.safe_load(lines_of('a recipe'))['algorithms'].items()
    assert algorithms().find(name)(**arguments).half_life.value == 1000
