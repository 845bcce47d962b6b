"""Mistakes in recipes: each is refused in words, with the key and the value, before anything is built or written."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest
import torch
from hostile_recipes import draw, judge, workplace

from composer_ema.recipe import interpolation, names, schema
from composer_ema.recipe.arguments import Place, RecipeError
from composer_ema.recipe.build import as_yaml, build
from composer_ema.recipe.preview import preview

MNIST1D = Path(__file__).parent.parent / 'yamls' / 'mnist1d.yaml'

# Ten lines that stand for 10^9 values.
ALIASES = 'v0: &v0 [x]\n' + ''.join(f'v{n}: &v{n} [{", ".join([f"*v{n - 1}"] * 10)}]\n' for n in range(1, 10))
# Override, the key to blame (None: that of the override), and words of the message.
REFUSED = [
    *((f'max_duration={time}', None, said) for time, said in (
        ('0.5ep', "'0.5ep' is no whole number, and Composer counts whole epochs"),
        ('1.5ba', 'Write part of an epoch in batches, as in 20ba'),
        ('infba', "'infba' is no time"), ('nanep', "'nanep' is no time"), ('1e400ba', "'1e400ba' is no time"),
        ('nandur', "'nandur' is no time"), ('" 1ep "', "' 1ep ' is no time"),
        ('-1ep', "at least 1 and at most 1,000,000,000,000,000, got '-1ep'"), ('0ba', "got '0ba'"),
        ('1' + '0' * 30 + 'ba', 'at most 1,000,000,000,000,000'),
        ('1dur', 'never ends a run'), ('2dur', 'never ends a run'), ('1sec', 'counts seconds'),
        ('1TOK', 'counts tokens'),
    )),
    *((f'{key}={time}', None, said) for key in ('eval_interval', 'save_interval') for time, said in (
        ('0.5ep', 'Write part of an epoch in batches'), ('infep', 'is no time'), ('nandur', 'is no time'),
        ('infdur', 'is no time'),
        ('-0.1dur', "must be at least 0, got '-0.1dur'"), ('0dur', 'For never, write 0ep'),
        ('1iter', 'counts iterations'),
    )),
    ('console_log_interval=0ba', None, "must be above 0, got '0ba'"),
    ('console_log_interval=0.1dur', None, 'must be in epochs or batches'),
    ('algorithms.ema.half_life=1iter', None, 'counts iterations'),
    ('algorithms.ema.ema_start=1TOK', None, 'counts tokens'),
    ('algorithms.ema.half_life={ema: 1 tok}', 'algorithms.ema.half_life.ema', 'counts tokens'),
    ('algorithms.ema.snapshots={every: 1tok}', 'algorithms.ema.snapshots.every', 'counts tokens'),
    ('algorithms.ema.snapshots={every: 1ba, folder: "{x}"}', 'algorithms.ema.snapshots.folder', 'holds {x}'),
    ('callbacks={early_stopper: {monitor: a, dataloader_label: b, patience: infep}}',
    'callbacks.early_stopper.patience',
     "'infep' is no time"),
    ('callbacks.activation_monitor.interval=0', None, 'must be above 0, got 0'),
    ('callbacks.checkpoint_saver.filename="{x}"', None, 'holds {x}'),
    *((f'scheduler={{name: cosine_with_warmup, t_warmup: {time}}}', 'scheduler.t_warmup', said) for time, said in (
        ('0.5ep', 'no whole number'), ('infba', 'is no time'), ('-1ba', "at least 0, got '-1ba'"),
        ('1sec', 'counts seconds'),
    )),
    ('scheduler={name: cosine, t_max: 0ba}', 'scheduler.t_max', "must be above 0, got '0ba'"),
    ('scheduler={name: multi_step, milestones: [1ep, 0.5ep]}', 'scheduler.milestones.1', "'0.5ep' is no whole number"),
    ('scheduler={name: polynomial_lr, power: .nan}', 'scheduler.power', 'is nan'),
    ('scheduler={name: one_cycle_lr, max_lr: .inf}', 'scheduler.max_lr', 'must be a finite number, got inf'),
    ('optimizer.lr=1e400', None, 'must be a finite number, got inf'),
    *((f'run_name={name}', None, said) for name, said in (
        ('"{rank}"', "'{rank}' holds a brace"), ('"{"', 'holds a brace'), ('..', "a part of it is '..'"),
        ('.', "is '.'"),
        ('a/../../b', "is '..'"), ('/tmp/x', "is ''"), ('a//b', "is ''"), ('"   "', 'spaces'), ('"a "', 'spaces'),
        ('"~/x"', "is '~'"), ('"a\\nb"', r"'a\nb' holds characters that cannot be seen"),
        ('"a\\e[31mb"', 'cannot be seen'), ('"\\u202ea"', 'cannot be seen'), ('"a\\0b"', 'holds the character NUL'),
        ('k' * 300, 'has 300 bytes, and a name at most 200'), ('1', 'write it in quotes: "1"'), ('yes', 'got True'),
        ('1e3', 'got 1000.0'),
    )),
    *((override, override.partition('=')[0], said) for override, said in (
        ('save_folder="{x}"', 'holds {x}, which nothing fills in'), ('save_folder=""', "must be a path, got ''"),
        ('save_folder="~/x"', f'only a shell replaces by a folder. Write {os.path.expanduser("~/x")}.'),
        ('save_filename="{x}.pt"', 'Legal names are run_name'), ('save_filename="{"', "'{' is no path"),
        ('save_filename="{epoch:>9999999}.pt"', 'nothing fills in'),
        ('save_filename="{rank.__class__}"', 'nothing fills in'),
        ('save_filename=../ep{epoch}.pt', 'leads out of save_folder'),
        ('save_filename=a.pt', 'is the same for every checkpoint'),
        ('save_latest_filename=ep0-ba2-rank0.pt', 'may be the name of a checkpoint'), ('load_path="{x}"', 'holds {x}'),
        ('load_path=""', 'must be a path'), ('runs_folder="{rank}"', 'holds {rank}'),
        ('runs_folder="~/x"', 'begins with ~'),
    )),
    ('train_subset_num_batches=0', None, 'must be at least 1, or -1 for all, got 0'),
    ('train_subset_num_batches=-5', None, 'got -5'),
    ('eval_subset_num_batches=0', None, 'To evaluate nothing, write evaluate: []'),
    ('save_num_checkpoints_to_keep=0', None, 'To save nothing, write save_folder: null'),
    ('device_train_microbatch_size=0', None, 'at least 1, or auto on a GPU, got 0'),
    ('device_train_microbatch_size=0.5', None, 'got 0.5'),
    ('device_train_microbatch_size=auto', None, 'auto needs a GPU'),
    ('precision=amp_fp16', None, 'amp_fp16 needs a GPU'),
    ('dist_timeout=-1', None, 'above 0, got -1'),
    ('seed=100000000000000000000', None, 'more than 64 bits'),
    ('scale_schedule_ratio=0.5', None, 'multiply max_duration'),
    ('accumulate_train_batch_on_tokens=true', None, 'weighs by tokens'),
    ('console_stream=nowhere', None, "must be stdout or stderr, got 'nowhere'"),
    ('python_log_level=loud', None, "got 'loud'"),
    ('train_dataloader_label=eval_ema', None, "'eval_ema' is what an evaluation is called"),
    ('compile_config={moed: x}', 'compile_config.moed', "Did you mean 'mode'?"),
    ('model={name: mnist1d_mlp, width: 1000000000000000}', 'model.width', "can't allocate memory"),
    ('algorithms.randaugment.augmentation_set=x', None, 'randaugment_augmentation_set'),
    ('variables.v=${oc.env:HOME}', None, '${oc.env:HOME} calls a function'),
    ('variables.v=${oc.decode:"[1]"}', None, 'calls a function'),
    ('variables.v=${variables.v}', None, 'stands for itself: variables.v -> variables.v'),
    ('variables.v=a${optimizer}', None, 'puts a list or a mapping into text'),
    ('variables.v=' + '${' * 40 + '}' * 40, None, ''),
    ('variables.v=' + '[' * 60 + ']' * 60, 'variables.v' + '.0' * 51, 'lies in more than 50 lists and mappings'),
    ('variables.v=' + '[' * 3000 + ']' * 3000, None, ''),
    ('variables.v=.nan', None, 'is nan'),
    ('evaluate.-1=ema', None, 'there is no such entry'),
    ('a' + '.a' * 60 + '=1', '', 'more than 50 keys'),
    ('variables.v=\udcff', None, 'surrogates not allowed'),
]  # fmt: skip


@pytest.fixture
def recipe(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    if torch.cuda.is_available():
        monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '')
    path = tmp_path / 'mnist1d.yaml'
    path.write_bytes(MNIST1D.read_bytes())
    return path


@pytest.mark.parametrize(
    ('override', 'key', 'said'), REFUSED, ids=[each[0][:60].encode('ascii', 'replace').decode() for each in REFUSED]
)
def test_refused_with_the_key_before_anything_is_built(recipe, monkeypatch, override, key, said):
    monkeypatch.setattr('composer_ema.recipe.build.Trainer', lambda **_: pytest.fail('a Trainer was built'))
    with pytest.raises(RecipeError) as refused:
        build(schema.load(recipe, [override, 'device=cpu']))
    assert said in str(refused.value)
    assert refused.value.key == (override.partition('=')[0] if key is None else key)
    assert list(recipe.parent.iterdir()) == [recipe]


def test_what_fails_while_the_trainer_is_built_is_blamed_on_the_algorithm_that_raised_it(recipe):
    with pytest.raises(RecipeError, match=r'algorithms\.factorize: cannot convert float infinity'):
        build(schema.load(recipe, ['algorithms.factorize.latent_features=1e400', 'device=cpu']))


@pytest.mark.parametrize(
    'override',
    [
        'max_duration=1EP', 'max_duration=1e2ba', 'max_duration=3', 'eval_interval=0', 'eval_interval=0.5dur',
        'eval_interval=2dur', 'eval_interval=1sec', 'save_interval=0ep', 'save_interval=1e9ba', 'save_folder=null',
        'run_name=sub/folder', 'run_name="[/x]"', 'run_name=-x', 'run_name=é', 'save_filename=ep{epoch}.pt',
        'save_folder="{run_name}/c"', 'save_filename=a.pt', 'train_subset_num_batches=-1',
        'algorithms.ema.half_life=0.5ep',
        'scheduler={name: cosine_with_warmup, t_warmup: 0ba}', r'variables.v=\${x}', 'variables.v=${optimizer.lr}',
    ],
)  # fmt: skip
def test_what_a_run_can_do_is_planned(recipe, override):
    schema.plan(schema.load(recipe, [override, *(['save_overwrite=true'] if override.endswith('=a.pt') else [])]))


class TestFiles:
    @pytest.mark.parametrize(
        ('text', 'said'),
        [
            (b'a: &a [*a]', 'has an alias within what the alias stands for (line 1)'),
            (ALIASES.encode(),
             'holds more than 10,000 keys and values, with each alias counted'),
            (b'v: x\n' * 60_000, 'and a recipe has at most 262,144'),
            (b'v: ' + b'[' * 1000 + b']' * 1000, 'cannot be read as a recipe'),
            (b'run_name: ' + b'k' * 20_000, 'has 20,000 letters, and a string has at most 10,000'),
            (b'seed: ' + b'9' * 5000, 'cannot be read as a recipe: Exceeds the limit'),
            (b'seed: 0x' + b'f' * 20_000, 'seed: is a whole number of more than 64 bits'),
            (b'seed: !!int x', 'cannot be read as a recipe'),
            (b'null: 1', 'with string keys'),
            (b'v: !!set {a}', 'A recipe holds strings, numbers'),
            (b'v: ${', 'this cannot be read. Write an interpolation'),
            ('run_name: é'.encode('latin-1'), 'Save it as UTF-8'),
            ('run_name: x'.encode('utf-16'), 'Save it as UTF-8'),
        ],
    )  # fmt: skip
    def test_that_are_no_recipe_are_refused_in_words_and_at_once(self, recipe, text, said):
        recipe.write_bytes(text)
        began = time.monotonic()
        with pytest.raises(RecipeError) as refused:
            schema.load(recipe)
        assert said in str(refused.value)
        assert time.monotonic() - began < 5

    def test_a_byte_order_mark_is_no_mistake(self, recipe):
        recipe.write_bytes(b'\xef\xbb\xbf' + MNIST1D.read_bytes())
        schema.plan(schema.load(recipe))

    def test_that_no_bytes_come_from_are_not_waited_for(self, tmp_path):
        os.mkfifo(tmp_path / 'pipe.yaml')
        (tmp_path / 'loop.yaml').symlink_to('loop.yaml')
        for path, said in (
            (tmp_path / 'pipe.yaml', 'is no regular file'),
            ('/dev/zero', 'is no regular file'),
            (tmp_path / 'loop.yaml', 'cannot be read as a recipe'),
            ('a\0b.yaml', 'embedded null byte'),
            ('k' * 400 + '.yaml', 'too long'),
        ):
            with pytest.raises(RecipeError, match=said):
                schema.load(path)


class TestInterpolations:
    def test_that_double_are_bounded_in_time_and_memory(self, recipe):
        text = MNIST1D.read_text()
        for first, step in (
            ('x', '"${variables.v%d}${variables.v%d}"'),
            ('[x]', '["${variables.v%d}", "${variables.v%d}"]'),
        ):
            lines = ''.join(f'  v{n}: {step % (n - 1, n - 1)}\n' for n in range(1, 60))
            recipe.write_text(f'variables:\n  v0: {first}\n{lines}{text}')
            began = time.monotonic()
            with pytest.raises(RecipeError, match=r'variables\.v\d+.*stand for more than 200,000 letters and values'):
                schema.load(recipe)
            assert time.monotonic() - began < 5

    def test_that_follow_one_another_without_end_are_refused(self, recipe):
        lines = ''.join(f'  v{n}: ${{variables.v{n - 1}}}\n' for n in range(200, 0, -1))
        recipe.write_text(f'variables:\n  v0: 1\n{lines}{MNIST1D.read_text()}')
        with pytest.raises(RecipeError, match='goes through more than 50 others'):
            schema.load(recipe)

    def test_follow_omegaconfs_notation(self):
        values = {
            'x': 1, 'l': [1, '${x}'], 'm': {'a': '${x}', 'r': '${.a}', 'u': '${..x}', 'k': 'a'}, 'q': '${m}', 'n': None,
            'v': ['${l.1}', '${l[1]}', '${ x }', '${m.${m.k}}', '${q.a}', 'a${x}b${n}', '\\${x}', '\\\\${x}', '$x',
                  '${x}}'],
        }  # fmt: skip
        found = interpolation.resolved(values, Place('a.yaml'))
        assert found['v'] == [1, 1, 1, 1, 1, 'a1bNone', '${x}', '\\1', '$x', '1}']
        assert found['m'] == found['q'] == {'a': 1, 'r': 1, 'u': 1, 'k': 'a'}

    def test_an_override_within_one_leaves_the_others_to_later_overrides(self, recipe):
        recipe.write_text(
            'variables: {rate: 1.0, opt: {name: sgd, lr: "${variables.rate}"}}\noptimizer: ${variables.opt}'
        )
        values = schema.load(recipe, ['optimizer.momentum=0.5', 'variables.rate=3.0']).values
        assert values['optimizer'] == {'name': 'sgd', 'lr': 3.0, 'momentum': 0.5}

    def test_the_written_recipe_is_read_as_the_same(self, recipe, tmp_path):
        loaded = schema.load(recipe, [r'variables.v=\\\${x} \${ ${seed}'])
        assert loaded.values['variables'] == {'v': r'\${x} ${ 1'}
        (tmp_path / 'written.yaml').write_text(as_yaml(loaded))
        assert schema.load(tmp_path / 'written.yaml').values == loaded.values


class TestNames:
    def test_come_from_the_file_and_the_environment_by_the_same_rules(self, recipe, monkeypatch):
        odd = recipe.rename(recipe.with_name('my recipe{rank}.yaml'))
        with pytest.raises(RecipeError, match=r"'my recipe\{rank\}' holds a brace.* run_name="):
            schema.plan(schema.load(odd))
        schema.plan(schema.load(odd, ['run_name=fine']))
        schema.plan(schema.load(odd.rename(recipe.with_name('[x].yaml'))))
        monkeypatch.setenv('RUN_NAME', '../x')
        with pytest.raises(RecipeError, match=r"^RUN_NAME: '\.\./x' is no name"):
            schema.plan(schema.load(recipe.with_name('[x].yaml')))

    def test_a_run_stays_under_its_runs_folder_also_behind_links(self, recipe, tmp_path):
        (tmp_path / 'elsewhere').mkdir()
        (tmp_path / 'runs').mkdir()
        (tmp_path / 'runs/out').symlink_to('../elsewhere')
        with pytest.raises(RecipeError, match=r'run_name: runs/out/a leads to .*/elsewhere/a, out of runs'):
            schema.plan(schema.load(recipe, ['run_name=out/a']))
        (tmp_path / 'linked').symlink_to('elsewhere')
        schema.plan(schema.load(recipe, ['run_name=a', 'runs_folder=linked']))

    def test_what_composer_fills_in_is_what_it_says(self):
        from composer.utils.file_helpers import FORMAT_NAME_WITH_DIST_AND_TIME_TABLE, FORMAT_NAME_WITH_DIST_TABLE

        for table, legal in (
            (FORMAT_NAME_WITH_DIST_TABLE, names.OF_PROCESS),
            (FORMAT_NAME_WITH_DIST_AND_TIME_TABLE, names.OF_PROCESS + names.OF_TIME),
        ):
            assert {line.split('``')[1].strip('{}') for line in table.splitlines() if '``{' in line} == set(legal)


def test_a_picture_of_more_batches_than_can_be_stepped_through_is_refused(recipe):
    with pytest.raises(RecipeError, match="max_duration: '1000000000ba' is 1,000,000,000 batches"):
        preview(schema.load(recipe, ['max_duration=1000000000ba']))


def test_an_override_longer_than_a_name_on_a_disk_is_an_override(call, recipe):
    code, _, err = call('plot', recipe, f'variables.v={"k" * 300}', 'nonsense=1')
    assert code == 2
    assert 'nonsense: a recipe has no such key' in err


def test_a_hundred_absurd_inputs_are_refused_in_words_or_sound():
    rng = random.Random(14)
    with workplace() as folder:
        for _ in range(100):
            attempt = draw(rng)
            assert (str(attempt), judge(attempt, folder)[1]) == (str(attempt), None)
