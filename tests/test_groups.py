"""Optimizers of recipes: each one trains and resumes, groups by pattern, and what cannot work is told beforehand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from torch import nn

from composer_ema.pictures import conclusion
from composer_ema.recipe import groups, registry, run, schema
from composer_ema.recipe.arguments import RecipeError
from composer_ema.recipe.build import build
from composer_ema.zoo.models import FashionCNN

RECIPE: dict[str, Any] = {
    'max_duration': '2ba',
    'progress_bar': False,
    'device': 'cpu',
    'seed': 3,
    'save_interval': '1ba',
    'model': {'name': 'fashion_cnn', 'widths': [2, 3, 4, 5], 'num_classes': 3},
    'data': {'name': 'fake', 'image_size': [1, 17, 17], 'num_classes': 3, 'size': 16, 'eval_size': 4, 'batch_size': 8},
    'algorithms': {'ema': {'half_life': '1ba'}},
    'evaluate': ['training'],
}
OPTIMIZERS = registry.optimizers().classes
#: Those of which Composer wants the learning rate.
NEED_LR = {'DecoupledSGDW'}


class SparseNetwork(nn.Module):
    """One row of a table for dark pictures and one for bright ones."""

    def __init__(self, *, num_classes: int = 3) -> None:
        super().__init__()
        self.embedding = nn.Embedding(2, num_classes, sparse=True)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.embedding((images.flatten(1).sum(1) > 0).long())


@pytest.fixture
def recipe(tmp_path: Path, register: Callable[..., None]) -> Callable[..., schema.Recipe]:
    """Writes the recipe with an optimizer and loads it; ``sparse`` is among the models."""
    register('models', 'sparse', SparseNetwork)

    def recipe(optimizer: dict[str, Any], **values: Any) -> schema.Recipe:
        path = tmp_path / 'recipe.yaml'
        path.write_text(
            yaml.safe_dump({**RECIPE, 'runs_folder': str(tmp_path / 'runs'), 'optimizer': optimizer, **values})
        )
        return schema.load(path)

    return recipe


def arguments_of(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """An optimizer and the model that it can train, as recipes say it."""
    cls = OPTIMIZERS[name]
    model = {'name': 'sparse', 'num_classes': 3} if cls is torch.optim.SparseAdam else RECIPE['model']
    return {'name': name, **({'lr': 0.1} if cls.__name__ in NEED_LR else {})}, {'model': model}


def trained(recipe: schema.Recipe) -> dict[str, torch.Tensor]:
    """The weights after training."""
    built = build(recipe)
    built.trainer.fit()
    built.trainer.close()
    return {name: value.clone() for name, value in built.trainer.state.model.state_dict().items()}


def test_all_of_torch_can_be_named():
    of_torch = {
        value.__name__
        for value in vars(torch.optim).values()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and value is not torch.optim.Optimizer
    }
    assert len(of_torch) >= 14
    assert {registry.optimizers().find(name).__name__ for name in of_torch} == of_torch
    assert {'DecoupledSGDW', 'DecoupledAdamW'} <= {each.__name__ for each in OPTIMIZERS.values()}


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_every_optimizer_trains_a_batch(recipe, name):
    optimizer, values = arguments_of(name)
    before = {
        name: value.clone()
        for name, value in build(recipe(optimizer, **values), scratch=Path()).trainer.state.model.named_parameters()
    }
    after = trained(recipe(optimizer, max_duration='1ba', **values))
    assert before.keys() <= after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert all(after[name].isfinite().all() for name in before)


@pytest.mark.parametrize('name', [name for name in OPTIMIZERS if name not in ('lbfgs', 'sparse_adam')])
def test_every_optimizer_resumes_exactly(recipe, name):
    optimizer, values = arguments_of(name)
    whole = trained(recipe(optimizer, run_name='whole', **values))
    trained(recipe(optimizer, run_name='part', max_duration='1ba', **values))
    resumed = trained(recipe(optimizer, run_name='part', autoresume=True, **values))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize(
    ('optimizer', 'values', 'key', 'said'),
    [
        ({'name': 'lbfgs'}, {'autoresume': True}, 'optimizer', 'Leave autoresume out'),
        ({'name': 'lbfgs'}, {'load_path': 'a.pt'}, 'optimizer', 'Leave load_path out'),
        ({'name': 'sparse_adam'}, {'autoresume': True}, 'optimizer', 'Leave autoresume out'),
        ({'name': 'lbfgs'}, {'precision': 'amp_fp16'}, 'optimizer', 'precision: fp32'),
        ({'name': 'lbfgs', 'param_groups': [{'match': 'bias'}]}, {}, 'optimizer.param_groups', 'Leave param_groups'),
        ({'name': 'sparse_adam'}, {}, 'optimizer.name', r'module\.layers\.0\.weight.*Take adam'),
        ({'name': 'adam', 'param_groups': 3}, {}, 'optimizer.param_groups', 'must be a list of mappings'),
        ({'name': 'adam', 'param_groups': [3]}, {}, 'optimizer.param_groups.0', 'with a pattern, as in'),
        ({'name': 'adam', 'param_groups': [{'lr': 1}]}, {}, 'optimizer.param_groups.0', 'with a pattern, as in'),
        (
            {'name': 'adam', 'param_groups': [{'match': '('}]},
            {},
            'optimizer.param_groups.0.match',
            'not a regular expression',
        ),
        (
            {'name': 'adam', 'param_groups': [{'match': 'a', 'weight_decy': 0}]},
            {},
            'optimizer.param_groups.0.weight_decy',
            "Did you mean 'weight_decay'?",
        ),
        (
            {'name': 'adam', 'param_groups': [{'match': 'a', 'lr': 'fast'}]},
            {},
            'optimizer.param_groups.0.lr',
            'must be a number',
        ),
        (
            {'name': 'adam', 'param_groups': [{'match': 'a', 'lr': -1.0}]},
            {},
            'optimizer.param_groups.0.lr',
            'Invalid learning rate: -1.0',
        ),
        (
            {'name': 'adam', 'param_groups': [{'match': r'\.fc\.', 'lr': 1.0}]},
            {},
            'optimizer.param_groups.0.match',
            r'matches no parameter of the model\. Their names are module\.layers\.0\.weight, ',
        ),
        (
            {'name': 'adam', 'param_groups': [{'match': 'layers'}, {'match': 'bias$', 'lr': 1.0}]},
            {},
            'optimizer.param_groups.1.match',
            'only parameters of earlier groups',
        ),
    ],
)
def test_what_cannot_work_is_refused_before_data_is_touched(
    recipe, monkeypatch, tmp_path, optimizer, values, key, said
):
    def touched(self: Any) -> None:
        raise AssertionError('data was touched')

    monkeypatch.setattr('composer_ema.zoo.dataset.Batching.__post_init__', touched)
    with pytest.raises(RecipeError, match=said) as refused:
        build(recipe(optimizer, **values))
    assert refused.value.key == key
    assert not (tmp_path / 'runs').exists()


def test_lbfgs_may_begin_with_the_weights_of_a_checkpoint(recipe, tmp_path):
    first = trained(recipe({'name': 'lbfgs'}, run_name='first', max_duration='1ba'))
    checkpoint = str(tmp_path / 'runs/first/checkpoints/latest-rank0.pt')
    built = build(recipe({'name': 'lbfgs'}, run_name='second', load_path=checkpoint, load_weights_only=True))
    built.trainer.close()
    loaded = built.trainer.state.model.state_dict()
    assert all(torch.equal(first[name], loaded[name]) for name in first)


GROUPS = [
    {'match': 'bias$', 'weight_decay': 0.0},
    {'match': r'layers\.(0|12)\.', 'lr': 0.5, 'betas': [0.8, 0.9]},
]


class TestGroups:
    @pytest.fixture
    def built(self, recipe, tmp_path) -> Any:
        built = build(recipe({'name': 'adamw', 'lr': 0.1, 'param_groups': GROUPS}), scratch=tmp_path)
        built.trainer.close()
        return built

    def test_first_match_wins_and_the_rest_comes_last(self, built):
        names = {id(each): name for name, each in built.trainer.state.model.named_parameters()}
        found = [
            [names[id(each)] for each in group['params']] for group in built.trainer.state.optimizers[0].param_groups
        ]
        assert all(name.endswith('bias') for name in found[0])
        assert 'module.layers.12.bias' in found[0]
        assert found[1] == ['module.layers.0.weight', 'module.layers.12.weight']
        assert set(found[2]) == set(names.values()) - {*found[0], *found[1]}

    def test_each_has_its_options_and_else_the_optimizers(self, built):
        options = [
            (group['lr'], tuple(group['betas']), group['weight_decay'])
            for group in built.trainer.state.optimizers[0].param_groups
        ]
        assert options == [(0.1, (0.9, 0.999), 0.0), (0.5, (0.8, 0.9), 0.01), (0.1, (0.9, 0.999), 0.01)]

    def test_are_shown_once_as_a_table(self, built):
        [table] = built.remarks
        console = Console(width=120, color_system=None)
        with console.capture() as captured:
            console.print(table)
        lines = [[cell.strip() for cell in line.split('│')[1:-1]] for line in captured.get().splitlines()]
        assert [line for line in lines if line] == [
            ['0', 'bias$', '5', '17', 'weight_decay: 0.0'],
            ['1', r'layers\.(0|12)\.', '2', '185', 'betas: [0.8, 0.9], lr: 0.5'],
            ['2', 'all others', '7', '356', "the optimizer's"],
        ]

    def test_train_as_in_plain_pytorch_and_resume_exactly(self, recipe):
        optimizer = {'name': 'adamw', 'lr': 0.1, 'param_groups': GROUPS}
        scheduler = {'name': 'one_cycle_lr', 'max_lr': [0.1, 0.2, 0.3], 'total_steps': 4}
        whole = trained(recipe(optimizer, run_name='whole', scheduler=scheduler))
        trained(recipe(optimizer, run_name='part', scheduler=scheduler, max_duration='1ba'))
        resumed = trained(recipe(optimizer, run_name='part', autoresume=True, scheduler=scheduler))
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)
        same_for_all = trained(
            recipe({'name': 'adamw', 'lr': 0.1}, run_name='other', scheduler={**scheduler, 'max_lr': 0.1})
        )
        assert any(not torch.equal(whole[name], same_for_all[name]) for name in whole)

    def test_that_leave_nothing_have_no_last_group(self, recipe, tmp_path):
        entries = [{'match': 'bias$'}, {'match': '', 'lr': 0.5}]
        built = build(recipe({'name': 'adam', 'param_groups': entries}), scratch=tmp_path)
        built.trainer.close()
        assert [len(group['params']) for group in built.trainer.state.optimizers[0].param_groups] == [5, 9]

    def test_hold_frozen_parameters_as_model_parameters_does(self):
        model = FashionCNN()
        model.layers[0].weight.requires_grad_(False)
        place = schema.Place('a.yaml', 'optimizer')
        optimizer = schema.Named(place, 'sgd', torch.optim.SGD, {'lr': 0.1})
        entries = groups.read([{'match': r'^layers\.0'}], place / 'param_groups', optimizer)
        for chosen, counts in (([], [14]), (entries, [1, 13])):
            built = groups.build_optimizer(optimizer, chosen, model)
            assert [len(group['params']) for group in built.param_groups] == counts
            assert built.param_groups[0]['params'][0] is model.layers[0].weight

    def test_are_shown_by_a_run_and_by_a_rehearsal(self, recipe):
        shown: list[Any] = []
        loaded = recipe({'name': 'adamw', 'param_groups': GROUPS}, scheduler={'name': 'linear_lr'})
        conclusion.of_rehearsal(run.rehearse(loaded), shown.append)
        again: list[Any] = []
        run.train(loaded, again.append)
        for table, line in (shown[2:], again[:2]):
            assert table.title == 'parameter groups'
            assert line == 'scheduler: LinearLR(total_iters=1 (from the length of the run)) per epoch'
