"""Averages written as other libraries write theirs, and read back by these libraries."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

import composer_ema
from composer_ema import CheckpointError, EMAOptimizer, ShadowModel, export, load_average
from composer_ema.checkpoints.inspection import describe
from composer_ema.files import folder_beside

transformers: Any = pytest.importorskip('transformers', reason="needs the extra doors: pip install '.[doors]'")
pytestmark = pytest.mark.filterwarnings('ignore:.*TypedStorage is deprecated', 'ignore:torch.distributed is disabled')


def bits(tensors: Any) -> dict[str, bytes]:
    return {name: t.detach().reshape(-1).view(torch.uint8).numpy().tobytes() for name, t in tensors.items()}


def averaged(network: nn.Module, decay: float = 0.5) -> ShadowModel:
    """A shadow that is not the weights, as after some steps."""
    shadow = ShadowModel(network)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter += torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    shadow.update(network, smoothing=decay)
    return shadow


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {token: i for i, token in enumerate(['<eos>', '<unk>', *'abcdefgh é'])}
    tokens = Tokenizer(models.WordLevel(vocabulary, unk_token='<unk>'))
    tokens.pre_tokenizer = pre_tokenizers.Split('', 'isolated')
    special = {'eos_token': '<eos>', 'unk_token': '<unk>', 'pad_token': '<eos>'}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokens, **special)


def gpt2(**settings: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=12, n_embd=8, n_layer=1, n_head=2, n_positions=16, **settings)
    return transformers.GPT2LMHeadModel(config)


def bert() -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    return transformers.BertForMaskedLM(config)


def t5() -> Any:
    torch.manual_seed(0)
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    )


def vit() -> Any:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=8, patch_size=4
    )
    return transformers.ViTForImageClassification(config)


def without_empty(content: Any) -> Any:
    """As torch's sharded checkpoints keep dictionaries: empty ones are not there."""
    if not isinstance(content, dict):
        return content
    return {name: without_empty(value) for name, value in content.items() if value != {}}


IDS = torch.tensor([[0, 3, 5, 2, 9, 4]])
IMAGES = torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8)


def run(network: Any, inputs: dict[str, Tensor], folder: Path, **options: Any) -> tuple[Path, Tensor]:
    """A checkpoint of a Composer run with an average, and the logits of the averaged model at its end."""
    import toy
    from composer.models import HuggingFaceModel

    model = HuggingFaceModel(network, use_logits=True, **options)
    rows = [{name: each[0] for name, each in inputs.items()}] * 4
    trainer = toy.make_trainer(
        [ema := composer_ema.EMA(half_life='2ba')],
        model=model,
        optimizers=torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05),
        train_dataloader=torch.utils.data.DataLoader(rows, batch_size=2),  # pyright: ignore[reportArgumentType]
        save_folder=str(folder),
    )
    trainer.fit()
    copy: Any = ema.get_ema_model(model).model.eval()
    with torch.no_grad():
        logits = copy(**inputs).logits
    return folder / 'latest-rank0.pt', logits


@pytest.fixture(scope='module')
def of_gpt2(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    pytest.importorskip('composer', reason='needs Composer')
    inputs = {'input_ids': IDS, 'attention_mask': torch.ones_like(IDS), 'labels': IDS}
    return run(gpt2(), inputs, tmp_path_factory.mktemp('gpt2'), tokenizer=tokenizer(), metrics=[])


class TestTransformers:
    def test_a_language_model_of_a_composer_run_computes_the_same_bits(self, of_gpt2, tmp_path):
        checkpoint, logits = of_gpt2
        out = tmp_path / 'gpt2'
        written = export(checkpoint, out, format='huggingface')
        model = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
        with torch.no_grad():
            assert torch.equal(model(input_ids=IDS).logits, logits)
        read, ours = transformers.AutoTokenizer.from_pretrained(out), tokenizer()
        assert read('abé h').input_ids == ours('abé h').input_ids
        assert read.eos_token == '<eos>'
        with safetensors.safe_open(out / 'model.safetensors', 'pt') as file:
            assert 'lm_head.weight' not in file.keys()  # noqa: SIM118
            assert file.metadata() | {'crc32': ''} == written | {'crc32': ''}
        assert written['format'] == 'pt'
        assert written['half_life'] == '2ba'
        config = json.loads((out / 'config.json').read_text())
        assert (config['architectures'], config['torch_dtype']) == (['GPT2LMHeadModel'], 'float32')
        assert transformers.GenerationConfig.from_pretrained(out).eos_token_id == config['eos_token_id']
        assert sorted(path.name for path in tmp_path.iterdir()) == ['gpt2']

    def test_everything_is_as_readable_as_any_file(self, of_gpt2, tmp_path):
        export(of_gpt2[0], tmp_path / 'gpt2', format='huggingface')
        umask = os.umask(0)
        os.umask(umask)
        for path in (tmp_path / 'gpt2').iterdir():
            assert path.stat().st_mode & 0o777 == 0o666 & ~umask

    def test_an_image_model_of_a_composer_run_computes_the_same_bits(self, tmp_path):
        pytest.importorskip('composer', reason='needs Composer')
        inputs = {'pixel_values': IMAGES, 'labels': torch.tensor([0, 1])}
        checkpoint, logits = run(vit(), inputs, tmp_path / 'run')
        export(checkpoint, tmp_path / 'vit', format='huggingface')
        model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / 'vit').eval()
        with torch.no_grad():
            assert torch.equal(model(pixel_values=IMAGES).logits, logits)
        assert sorted(path.name for path in (tmp_path / 'vit').iterdir()) == ['config.json', 'model.safetensors']

    @pytest.mark.parametrize('make', [gpt2, bert, pytest.param(t5, marks=pytest.mark.slow), vit])
    def test_the_files_are_those_of_save_pretrained_with_the_average_in_the_model(self, make, tmp_path):
        network = make()
        shadow = averaged(network)
        with shadow.swapped(network):
            network.save_pretrained(tmp_path / 'theirs')
        torch.save({'model': network.state_dict(), 'ema': shadow.state_dict()}, tmp_path / 'a.pt')
        export(tmp_path / 'a.pt', tmp_path / 'ours', format='huggingface', config=tmp_path / 'theirs')
        theirs, ours = (sorted(path.name for path in (tmp_path / name).iterdir()) for name in ('theirs', 'ours'))
        assert theirs == ours
        weights = [safetensors.torch.load_file(tmp_path / name / 'model.safetensors') for name in ('theirs', 'ours')]
        assert bits(weights[0]) == bits(weights[1])
        for name in set(theirs) - {'model.safetensors'}:
            assert json.loads((tmp_path / 'ours' / name).read_text()) == json.loads(
                (tmp_path / 'theirs' / name).read_text()
            )

    def test_above_a_size_there_are_shards_and_an_index(self, of_gpt2, tmp_path):
        checkpoint, logits = of_gpt2
        out = tmp_path / 'gpt2'
        export(checkpoint, out, format='huggingface', max_shard_size='2KB')
        assert len(list(out.glob('model-0000?-of-0000?.safetensors'))) > 1
        assert not (out / 'model.safetensors').exists()
        model = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
        with torch.no_grad():
            assert torch.equal(model(input_ids=IDS).logits, logits)
        whole = tmp_path / 'whole'
        export(checkpoint, whole, format='huggingface')
        assert bits(load_average(out)) == bits(load_average(whole))

    def test_a_checkpoint_folder_of_its_trainer_needs_no_config(self, tmp_path):
        import transformers_runs as runs

        average = runs.WeightAverage(half_life='2ba')
        trainer = runs.build(tmp_path / 'run', average, save_strategy='epoch', num_train_epochs=1)
        trainer.train()
        [checkpoint] = (tmp_path / 'run').glob('checkpoint-*')
        export(checkpoint, tmp_path / 'out', format='huggingface')
        loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / 'out')
        assert bits(loaded.state_dict()) == bits(load_average(checkpoint, loaded))
        assert bits(loaded.state_dict()) != bits(trainer.model.state_dict())
        assert sorted(path.name for path in (tmp_path / 'out').iterdir()) == ['config.json', 'model.safetensors']

    @pytest.mark.slow
    def test_a_sharded_checkpoint_gives_the_same_folder(self, of_gpt2, tmp_path):
        import folders

        checkpoint = of_gpt2[0]
        state = torch.load(checkpoint, weights_only=False)
        folders.save_sharded({'state': state['state']}, tmp_path / 'sharded')
        for source, out in ((checkpoint, 'whole'), (tmp_path / 'sharded', 'parts')):
            export(source, tmp_path / out, format='huggingface')
        for path in (tmp_path / 'whole').iterdir():
            other = tmp_path / 'parts' / path.name
            if path.suffix == '.safetensors':
                assert bits(load_average(path)) == bits(load_average(other))
            else:
                assert without_empty(json.loads(path.read_text())) == json.loads(other.read_text())
        read = transformers.AutoTokenizer.from_pretrained(tmp_path / 'parts')
        assert read('abé h').input_ids == tokenizer()('abé h').input_ids

    def test_an_optimizer_without_names_is_read_by_the_model_of_the_config(self, tmp_path):
        network = vit()
        optimizer = EMAOptimizer(torch.optim.SGD(network.parameters(), lr=0.1), decay=0.5)
        network(pixel_values=IMAGES).logits.sum().backward()
        optimizer.step()
        torch.save({'model': network.state_dict(), 'optimizer': optimizer.state_dict()}, tmp_path / 'a.pt')
        network.config.architectures = ['ViTForImageClassification']
        network.config.save_pretrained(tmp_path / 'config')
        with pytest.warns(UserWarning, match='by position'):
            export(tmp_path / 'a.pt', tmp_path / 'vit', format='huggingface', config=tmp_path / 'config')
        with optimizer.swap_ema_weights():
            expected = bits(network.state_dict())
        loaded = transformers.ViTForImageClassification.from_pretrained(tmp_path / 'vit')
        assert bits(loaded.state_dict()) == expected

    def test_a_folder_as_config_brings_what_belongs_to_the_model(self, of_gpt2, tmp_path):
        config = tmp_path / 'config'
        gpt2().save_pretrained(config)
        (config / 'preprocessor_config.json').write_text('{}')
        (config / 'trainer_state.json').write_text('{}')
        export(of_gpt2[0], tmp_path / 'gpt2', format='huggingface', config=config)
        names = {path.name for path in (tmp_path / 'gpt2').iterdir()}
        assert {'preprocessor_config.json', 'generation_config.json', 'tokenizer.json'} <= names
        assert 'trainer_state.json' not in names

    def test_an_unknown_class_is_written_unchecked_with_a_warning(self, of_gpt2, tmp_path):
        (tmp_path / 'config.json').write_text(json.dumps({'architectures': ['MyModel'], 'model_type': 'mine'}))
        with pytest.warns(UserWarning, match="no class 'MyModel'.*not checked"):
            export(of_gpt2[0], tmp_path / 'mine', format='huggingface', config=tmp_path / 'config.json')
        names = safetensors.torch.load_file(tmp_path / 'mine' / 'model.safetensors').keys()
        assert 'model.transformer.wte.weight' in names
        assert 'model.lm_head.weight' not in names


class TestDtype:
    def test_floating_tensors_are_rounded_to_nearest_and_the_others_kept(self, tmp_path):
        network = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        average = averaged(network).averaged_state_dict(network)
        torch.save({'ema': dict(average)}, tmp_path / 'a.pt')
        written = export(tmp_path / 'a.pt', tmp_path / 'a.safetensors', key='ema', dtype='bfloat16')
        assert written['dtype'] == 'bfloat16, rounded to nearest'
        expected = {n: t.to(torch.bfloat16) if t.is_floating_point() else t for n, t in average.items()}
        assert bits(safetensors.torch.load_file(tmp_path / 'a.safetensors')) == bits(expected)
        assert load_average(tmp_path / 'a.safetensors')['1.num_batches_tracked'].dtype == torch.int64
        between = {'w': torch.tensor([1 + 2**-9, 1 + 3 * 2**-8])}  # bfloat16 has steps of 2**-7 here
        torch.save({'ema': between}, tmp_path / 'b.pt')
        export(tmp_path / 'b.pt', tmp_path / 'b.pth', key='ema', dtype=torch.bfloat16)
        assert torch.load(tmp_path / 'b.pth', weights_only=True)['w'].tolist() == [1.0, 1 + 2**-6]

    def test_the_config_of_a_model_says_it_and_tied_weights_stay_tied(self, of_gpt2, tmp_path):
        export(of_gpt2[0], tmp_path / 'half', format='huggingface', dtype='float16')
        assert json.loads((tmp_path / 'half' / 'config.json').read_text())['torch_dtype'] == 'float16'
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'half', torch_dtype='auto')
        average = load_average(of_gpt2[0])
        assert bits(model.state_dict()) == bits({n.removeprefix('model.'): t.half() for n, t in average.items()})

    def test_values_that_it_cannot_hold_are_refused_by_name(self, tmp_path):
        weights = {'small': torch.ones(2), 'large': torch.tensor([1.0, -7e4]), 'infinite': torch.tensor([torch.inf])}
        torch.save({'ema': weights}, tmp_path / 'a.pt')
        with pytest.raises(CheckpointError, match=r'float16 holds values up to 6.55e\+04.* large \(up to 7e\+04\)\. '):
            export(tmp_path / 'a.pt', tmp_path / 'b.safetensors', key='ema', dtype='float16')
        assert not (tmp_path / 'b.safetensors').exists()


@pytest.fixture(scope='module')
def unet(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, EMAOptimizer, Path]:
    diffusers: Any = pytest.importorskip('diffusers', reason="needs the extra doors: pip install '.[doors]'")
    torch.manual_seed(0)
    blocks = {'block_out_channels': (8,), 'down_block_types': ('DownBlock2D',), 'up_block_types': ('UpBlock2D',)}
    network = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, norm_num_groups=4, layers_per_block=1, **blocks
    )
    optimizer = EMAOptimizer(torch.optim.SGD(network.parameters(), lr=0.1), decay=0.75, model=network)
    for _ in range(3):
        network(torch.ones(1, 1, 8, 8), 3).sample.sum().backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp('unet')
    network.save_config(folder / 'config')
    torch.save({'model': network.state_dict(), 'optimizer': optimizer.state_dict()}, folder / 'a.pt')
    return network, optimizer, folder


class TestDiffusers:
    def test_the_model_and_ema_model_are_read_back(self, unet):
        from diffusers.training_utils import EMAModel

        network, optimizer, folder = unet
        export(folder / 'a.pt', folder / 'unet_ema', format='diffusers', config=folder / 'config')
        ema = EMAModel.from_pretrained(folder / 'unet_ema', type(network))
        with optimizer.swap_ema_weights():
            expected = bits(network.state_dict())
            theirs = EMAModel(network.parameters(), model_cls=type(network), model_config=network.config)
        assert bits(type(network).from_pretrained(folder / 'unet_ema').state_dict()) == expected
        assert bits(dict(enumerate(ema.shadow_params))) == bits(dict(enumerate(theirs.shadow_params)))
        assert (ema.decay, ema.optimization_step) == (0.75, 3)
        assert ema.get_decay(4) == 0.75  # as EMAOptimizer, without diffusers' ramp
        theirs.save_pretrained(folder / 'theirs')
        assert {path.name for path in (folder / 'theirs').iterdir()} == {
            path.name for path in (folder / 'unet_ema').iterdir()
        }
        configs = [json.loads((folder / name / 'config.json').read_text()) for name in ('theirs', 'unet_ema')]
        assert configs[0].keys() == configs[1].keys()

    def test_without_a_decay_none_is_written_and_a_warning_says_so(self, unet):
        network, _, folder = unet
        torch.save({'model': network.state_dict(), 'ema': averaged(network).state_dict()}, folder / 'b.pt')
        with pytest.warns(UserWarning, match='no decay per batch'):
            export(folder / 'b.pt', folder / 'b', format='diffusers', config=folder / 'config', max_shard_size='20KB')
        assert 'decay' not in json.loads((folder / 'b' / 'config.json').read_text())
        assert (folder / 'b' / 'diffusion_pytorch_model.safetensors.index.json').exists()
        loaded = type(network).from_pretrained(folder / 'b')
        assert bits(loaded.state_dict()) == bits(load_average(folder / 'b', network))

    @pytest.mark.parametrize(
        ('config', 'message'),
        [
            (None, 'Pass config=, the config.json of the model'),
            ({'_class_name': 'DDPMPipeline'}, "no model of diffusers: its '_class_name' is 'DDPMPipeline'"),
            ({'_class_name': 'AutoencoderKL'}, r'\d+ unexpected: .*The model is AutoencoderKL of '),
            ({'_class_name': 'UNet2DModel', 'block_out_channels': 3}, 'UNet2DModel of .* cannot be built: '),
        ],
    )
    def test_configs_of_something_else_are_refused(self, unet, tmp_path, config, message):
        if config is not None:
            (tmp_path / 'config.json').write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=message):
            export(unet[2] / 'a.pt', tmp_path / 'out', format='diffusers', config=None if config is None else tmp_path)
        assert not (tmp_path / 'out').exists()


@pytest.fixture(scope='module')
def of_timm() -> Any:
    timm: Any = pytest.importorskip('timm', reason="needs the extra doors: pip install '.[doors]'")
    torch.manual_seed(0)
    return timm.create_model('test_resnet', num_classes=3)


class TestTimm:
    @pytest.mark.parametrize('architecture', ['test_resnet', None])
    def test_both_weights_are_read_back(self, of_timm, tmp_path, architecture):
        import timm
        import timm.models

        shadow = averaged(of_timm)
        average = shadow.averaged_state_dict(of_timm)
        held = {'model': of_timm.state_dict(), 'ema': shadow.state_dict()}
        if architecture is None:  # as of DDP
            held = {key: {f'module.{name}': t for name, t in of.items()} for key, of in
                    (('model', of_timm.state_dict()), ('ema', average))}  # fmt: skip
        torch.save(held, tmp_path / 'a.pt')
        out, key = tmp_path / 'a.pth.tar', None if architecture else 'ema'
        export(tmp_path / 'a.pt', out, key=key, format='timm', config=architecture)
        model: Any = timm.create_model('test_resnet', num_classes=3)
        timm.models.load_checkpoint(model, str(out), use_ema=True)
        assert bits(model.state_dict()) == bits(average)
        timm.models.load_checkpoint(model, str(out), use_ema=False)
        assert bits(model.state_dict()) == bits(of_timm.state_dict())
        written = torch.load(out, weights_only=True)
        assert written.get('arch') == architecture
        assert written['state_dict_ema'].keys() == written['state_dict'].keys() == average.keys()
        assert describe(out).averages[0].algorithm == 'timm'

    def test_another_architecture_is_refused_by_name(self, of_timm, tmp_path):
        torch.save(averaged(of_timm).state_dict(), tmp_path / 'a.pt')
        with pytest.raises(
            CheckpointError, match=r"does not fit 'test_vit' of timm. \d+ missing: .*; \d+ unexpected: "
        ):
            export(tmp_path / 'a.pt', tmp_path / 'b.pth.tar', format='timm', config='test_vit')
        with pytest.raises(CheckpointError, match="'no_such' of timm cannot be built"):
            export(tmp_path / 'a.pt', tmp_path / 'b.pth.tar', format='timm', config='no_such')


def adapters() -> dict[str, dict[str, Any]]:
    lora = {'target_modules': ['c_attn'], 'fan_in_fan_out': True, 'r': 2, 'init_lora_weights': False}
    of_modules = {'target_modules': ['q', 'v'], 'init_weights': False}
    return {
        'LORA': lora,
        'LORA of all biases': {**lora, 'bias': 'all'},
        'LORA of its biases': {**lora, 'bias': 'lora_only'},
        'LORA and whole modules': {**lora, 'modules_to_save': ['ln_f']},
        'LORA of an embedding': {**lora, 'target_modules': ['wpe'], 'fan_in_fan_out': False},
        'DoRA': {**lora, 'use_dora': True},
        'IA3': {'target_modules': ['c_attn'], 'feedforward_modules': [], 'fan_in_fan_out': True},
        'LOHA': of_modules,
        'LOKR': of_modules,
        'HRA': of_modules,
        'OFT': {**of_modules, 'oft_block_size': 4},
    }


class TestPEFT:
    @pytest.mark.filterwarnings('ignore')
    @pytest.mark.parametrize(
        'name',
        [
            each if each in ('LORA of its biases', 'DoRA') else pytest.param(each, marks=pytest.mark.slow)
            for each in adapters()
        ],
    )
    def test_the_files_are_those_of_save_pretrained_and_are_read_back(self, name, tmp_path):
        peft: Any = pytest.importorskip('peft', reason="needs the extra doors: pip install '.[doors]'")
        options = adapters()[name]
        kind = {'DoRA': 'LORA'}.get(name, name.split()[0])
        base = t5 if options['target_modules'] == ['q', 'v'] else gpt2
        model = peft.get_peft_model(base(), peft.PEFT_TYPE_TO_CONFIG_MAPPING[kind](**options))
        shadow = averaged(model)
        with shadow.swapped(model):
            model.save_pretrained(tmp_path / 'theirs')
            logits = logits_of(model)
        for held in ({'ema': shadow.state_dict()}, {'model': model.state_dict(), 'ema': shadow.state_dict()}):
            torch.save(held, tmp_path / 'a.pt')
            out = tmp_path / f'ours of {len(held)}'
            export(tmp_path / 'a.pt', out, format='peft', config=tmp_path / 'theirs')
            theirs, ours = (
                safetensors.torch.load_file(f / 'adapter_model.safetensors') for f in (tmp_path / 'theirs', out)
            )
            assert bits(ours) == bits(theirs)
            loaded = peft.PeftModel.from_pretrained(base(), out)
            assert torch.equal(logits_of(loaded), logits)
            read = [json.loads((f / 'adapter_config.json').read_text()) for f in (tmp_path / 'theirs', out)]
            assert read[0] == read[1]

    @pytest.mark.parametrize('only', [pytest.param(False, marks=pytest.mark.slow), True])
    def test_a_composer_run_needs_no_config(self, tmp_path, only):
        pytest.importorskip('composer', reason='needs Composer')
        peft: Any = pytest.importorskip('peft', reason="needs the extra doors: pip install '.[doors]'")
        config = peft.LoraConfig(r=2, target_modules=['c_attn'], fan_in_fan_out=True, task_type='CAUSAL_LM')
        inputs = {'input_ids': IDS, 'attention_mask': torch.ones_like(IDS), 'labels': IDS}
        checkpoint, logits = run(
            gpt2(), inputs, tmp_path / 'run', tokenizer=tokenizer(), peft_config=config, should_save_peft_only=only
        )
        export(checkpoint, tmp_path / 'adapter', format='peft')
        assert json.loads((tmp_path / 'adapter' / 'adapter_config.json').read_text())['inference_mode'] is True
        loaded = peft.PeftModel.from_pretrained(gpt2(), tmp_path / 'adapter').eval()
        with torch.no_grad():
            assert torch.equal(loaded(input_ids=IDS).logits, logits)
        with pytest.raises(
            CheckpointError, match=r"of a model with an adapter. To write an adapter alone pass format='peft'"
        ):
            export(checkpoint, tmp_path / 'whole', format='huggingface')

    def test_what_is_no_adapter_is_refused(self, of_gpt2, tmp_path):
        with pytest.raises(CheckpointError, match='holds no config of an adapter'):
            export(of_gpt2[0], tmp_path / 'a', format='peft')
        config = tmp_path / 'adapter_config.json'
        config.write_text(json.dumps({'peft_type': 'LORA'}))
        with pytest.raises(CheckpointError, match=r'holds no adapter of this kind: its names are model.transformer'):
            export(of_gpt2[0], tmp_path / 'a', format='peft', config=tmp_path)
        config.write_text(json.dumps({'peft_type': 'PROMPT_TUNING'}))
        with pytest.raises(CheckpointError, match=r"of the kind 'PROMPT_TUNING'; written are LORA, .*save_pretrained"):
            export(of_gpt2[0], tmp_path / 'a', format='peft', config=tmp_path)
        two = {f'base_model.model.l.lora_A.{name}.weight': torch.ones(1) for name in ('one', 'two')}
        torch.save({'ema': two}, tmp_path / 'two.pt')
        config.write_text(json.dumps({'peft_type': 'LORA'}))
        with pytest.raises(CheckpointError, match='holds the adapters one, two'):
            export(tmp_path / 'two.pt', tmp_path / 'a', key='ema', format='peft', config=config)


class TestFromInsideARun:
    def test_a_checkpointer_like_that_of_llm_foundry_saves_the_average_if_it_is_lent(self, tmp_path):
        """Its stand-in saves at the same events and by the same calls as HuggingFaceCheckpointer."""
        pytest.importorskip('composer', reason='needs Composer')
        import toy
        from composer.core import Callback, Time
        from composer.models import HuggingFaceModel
        from composer.utils.misc import create_interval_scheduler
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        class Checkpointer(Callback):
            def __init__(self, folder: Path) -> None:
                self.folder, self.saved_at = folder, None
                interval = Time.from_input('2ba')
                self.is_due = create_interval_scheduler(interval, include_end_of_training=True)

            def run_event(self, event: Any, state: Any, logger: Any) -> None:
                is_started = state.get_elapsed_duration() is not None
                if is_started and self.is_due(state, event) and self.saved_at != state.timestamp.batch:
                    self.saved_at = state.timestamp.batch
                    self._save_checkpoint(state, logger)

            def _save_checkpoint(self, state: Any, logger: Any) -> None:
                del logger
                original = state.model.model
                options = StateDictOptions(full_state_dict=True, cpu_offload=True)
                weights = get_model_state_dict(original, options=options)
                with torch.device('meta'):
                    copy = type(original)(original.config)
                copy.load_state_dict(weights, assign=True)
                copy.save_pretrained(self.folder / f'ba{state.timestamp.batch.value}')

        class AverageCheckpointer(Checkpointer):
            def _save_checkpoint(self, state: Any, *args: Any) -> None:
                with ema.ema_model.swapped(state.model):
                    super()._save_checkpoint(state, *args)

        def fitted(algorithms: list[Any], callbacks: list[Any]) -> Any:
            model = HuggingFaceModel(vit(), use_logits=True)
            rows = [{'pixel_values': IMAGES[0], 'labels': torch.tensor(0)}] * 4
            trainer = toy.make_trainer(
                algorithms,
                callbacks=callbacks,
                model=model,
                optimizers=torch.optim.SGD(model.parameters(), lr=0.1),
                train_dataloader=torch.utils.data.DataLoader(rows, batch_size=2),  # pyright: ignore[reportArgumentType]
            )
            trainer.fit()
            return trainer.state.model

        plain = fitted([], [])
        ema = composer_ema.EMA(half_life='1ba')
        trained = fitted([ema], [AverageCheckpointer(tmp_path / 'average'), Checkpointer(tmp_path / 'training')])
        assert bits(trained.state_dict()) == bits(plain.state_dict())
        kind = transformers.ViTForImageClassification
        average, training = (kind.from_pretrained(tmp_path / name / 'ba4') for name in ('average', 'training'))
        assert bits(training.state_dict()) == bits(trained.model.state_dict())
        assert bits(average.state_dict()) == bits(ema.get_ema_model(trained).model.state_dict())
        assert (tmp_path / 'average' / 'ba2').is_dir()


def logits_of(model: Any) -> Tensor:
    is_t5 = model.config.model_type == 't5'
    with torch.no_grad():
        return model.eval()(input_ids=IDS, **({'decoder_input_ids': IDS} if is_t5 else {})).logits


class TestErrors:
    @pytest.mark.parametrize(
        ('options', 'out', 'message'),
        [
            ({'format': 'hugging'}, 'a', "no format 'hugging'. Did you mean 'huggingface'"),
            (
                {'format': 'torch'},
                'a.safetensors',
                "format='torch' writes a file of torch, and .* Take .safetensors off",
            ),
            ({'format': 'safetensors'}, 'a.pt', "format='safetensors' writes safetensors, and .* Take .pt off"),
            ({'format': 'huggingface'}, 'a.safetensors', "format='huggingface' writes a folder"),
            ({'format': 'timm'}, 'a.safetensors', "format='timm' writes a file of torch"),
            ({'dtype': 'int8'}, 'a.pt', "dtype must be one of float32, bfloat16, float16, got 'int8'"),
            ({'config': 'config.json'}, 'a.pt', "config='config.json' has no effect on format='torch'"),
            ({'max_shard_size': '5GB'}, 'a.pt', 'max_shard_size has no effect'),
            ({'format': 'huggingface', 'strip_prefix': 'model'}, 'a', "strip_prefix='model' has no effect"),
            ({'format': 'huggingface', 'max_shard_size': 'large'}, 'a', "a size such as '5GB'.*, got 'large'"),
            ({'format': 'huggingface', 'max_shard_size': ''}, 'a', "a size such as '5GB'.*, got ''"),
            ({'format': 'huggingface', 'max_shard_size': '-1GB'}, 'a', "a size such as '5GB'.*, got '-1GB'"),
            ({'format': 'huggingface', 'max_shard_size': '0GB'}, 'a', "a size such as '5GB'.*, got '0GB'"),
            ({'format': 'huggingface', 'max_shard_size': '9' * 400 + 'GB'}, 'a', "a size such as '5GB'"),
            ({'format': 'huggingface', 'config': 'missing'}, 'a', "config='missing': there is no file missing"),
        ],
    )
    def test_options_that_cannot_take_effect(self, of_gpt2, tmp_path, options, out, message):
        with pytest.raises(CheckpointError, match=message):
            export(of_gpt2[0], tmp_path / out, **options)
        assert list(tmp_path.iterdir()) == []

    def test_a_checkpoint_without_a_config(self, tmp_path):
        torch.save({'ema': {'w': torch.ones(1)}}, tmp_path / 'a.pt')
        with pytest.raises(CheckpointError, match=r'holds no Hugging Face config: .* Pass config='):
            export(tmp_path / 'a.pt', tmp_path / 'out', key='ema', format='huggingface')

    def test_a_config_of_another_architecture_is_refused_by_name(self, of_gpt2, tmp_path):
        settings = {'architectures': ['BertForMaskedLM'], **bert().config.to_diff_dict()}
        (tmp_path / 'config.json').write_text(json.dumps(settings))
        with pytest.raises(
            CheckpointError, match=r'missing: bert.embeddings.*; \d+ unexpected: .*The model is BertForMaskedLM of'
        ):
            export(of_gpt2[0], tmp_path / 'out', format='huggingface', config=tmp_path)
        settings = {'architectures': ['GPT2LMHeadModel'], **gpt2().config.to_diff_dict(), 'vocab_size': 13}
        (tmp_path / 'config.json').write_text(json.dumps(settings))
        with pytest.raises(CheckpointError, match=r'of another shape or kind: .*wte.weight \(expected \(13, 8\)'):
            export(of_gpt2[0], tmp_path / 'out', format='huggingface', config=tmp_path)
        assert not (tmp_path / 'out').exists()

    def test_a_config_that_ties_what_was_trained_apart_is_refused(self, tmp_path):
        network = gpt2(tie_word_embeddings=False)
        torch.save(averaged(network).state_dict(), tmp_path / 'a.pt')
        gpt2().save_pretrained(tmp_path / 'tied')
        with pytest.raises(CheckpointError, match=r'ties lm_head.weight to transformer.wte.weight'):
            export(tmp_path / 'a.pt', tmp_path / 'out', format='huggingface', config=tmp_path / 'tied')
        network.save_pretrained(tmp_path / 'apart')
        export(tmp_path / 'a.pt', tmp_path / 'out', format='huggingface', config=tmp_path / 'apart')

    def test_a_folder_that_is_there_stays_unless_it_is_empty(self, of_gpt2, tmp_path):
        out = tmp_path / 'out'
        out.mkdir()
        export(of_gpt2[0], out, format='huggingface')
        before = {path.name: path.read_bytes() for path in out.iterdir()}
        with pytest.raises(CheckpointError, match=r'a folder that is not empty, and .* writes a new folder'):
            export(of_gpt2[0], out, format='huggingface', dtype='bfloat16')
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before

    @pytest.mark.parametrize('name', ['pipe', 'link'])
    def test_what_is_no_file_is_not_replaced_by_one(self, of_gpt2, tmp_path, name):
        os.mkfifo(tmp_path / 'pipe')
        (tmp_path / 'link').symlink_to('pipe')
        with pytest.raises(CheckpointError, match='cannot be written: it is a device or a pipe, not a file'):
            export(of_gpt2[0], tmp_path / name)
        assert (tmp_path / name).is_fifo()
        assert (tmp_path / 'link').is_symlink()
        assert len(list(tmp_path.iterdir())) == 2

    @pytest.mark.parametrize(
        ('name', 'saved', 'message'),
        [
            ('../evil.json', {'file_extension': '.json', 'content': {}}, 'is no name of a file'),
            ('sub/evil.json', {'file_extension': '.json', 'content': {}}, 'is no name of a file'),
            ('config.json', {'file_extension': '.json', 'content': {}}, 'is no name of a file'),
            ('model.safetensors', {'file_extension': '.safetensors', 'content': b''}, 'ends in'),
            ('vocab.txt', {'file_extension': '.txt', 'content': [3]}, 'cannot be read'),
            ('tokenizer.json', {'file_extension': '.json', 'content': torch.ones(1)}, 'a Tensor in its settings'),
            ('spiece.model', {'file_extension': '.model', 'content': 'text'}, 'is a str'),
            (5, {'file_extension': '.json', 'content': {}}, '5 is no name of a file'),
        ],
    )
    def test_a_tokenizer_that_is_none_is_refused(self, of_gpt2, tmp_path, name, saved, message):
        state = torch.load(of_gpt2[0], weights_only=False)
        state['state']['integrations']['huggingface']['tokenizer'][name] = saved
        torch.save({'state': {**state['state'], 'optimizers': {}}}, tmp_path / 'a.pt')
        with pytest.raises(CheckpointError, match=message):
            export(tmp_path / 'a.pt', tmp_path / 'out', format='huggingface')
        assert [path.name for path in tmp_path.iterdir()] == ['a.pt']

    @pytest.mark.parametrize('name', ['_attn_implementation', '_attn_implementation_internal'])
    def test_a_config_makes_nobody_download_a_kernel(self, of_gpt2, tmp_path, monkeypatch, name):
        from transformers import modeling_utils

        asked = []
        monkeypatch.setattr(modeling_utils, 'is_kernels_available', lambda: True)
        monkeypatch.setattr(modeling_utils, 'get_kernel', asked.append, raising=False)
        state = torch.load(of_gpt2[0], weights_only=False)
        content = state['state']['integrations']['huggingface']['model']['config']['content']
        content |= {name: 'owner/name:function', 'task_specific_params': {'part': {name: 'owner/name:function'}}}
        torch.save({'state': {**state['state'], 'optimizers': {}}}, tmp_path / 'a.pt')
        export(tmp_path / 'a.pt', tmp_path / 'out', format='huggingface')
        assert 'owner/name' not in (tmp_path / 'out' / 'config.json').read_text()
        assert asked == []

    def test_every_kind_of_tokenizer_file_is_written_as_it_was(self, of_gpt2, tmp_path):
        state = torch.load(of_gpt2[0], weights_only=False)
        files = state['state']['integrations']['huggingface']['tokenizer']
        files['merges.txt'] = {'file_extension': '.txt', 'content': ['#version', 'a b', '']}
        files['spiece.model'] = {'file_extension': '.model', 'content': b'\x00\xff\x01'}
        files['chat_template'] = {'file_extension': '.jinja', 'content': '{{ é }}'}
        torch.save({'state': state['state']}, tmp_path / 'a.pt')
        export(tmp_path / 'a.pt', tmp_path / 'out', format='huggingface')
        assert (tmp_path / 'out' / 'merges.txt').read_bytes() == b'#version\na b\n'
        assert (tmp_path / 'out' / 'spiece.model').read_bytes() == b'\x00\xff\x01'
        assert (tmp_path / 'out' / 'chat_template.jinja').read_bytes() == '{{ é }}'.encode()


@pytest.fixture(scope='module')
def folder(of_gpt2, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp('folders') / 'gpt2'
    export(of_gpt2[0], out, format='huggingface', max_shard_size='2KB')
    return out


def test_the_command_takes_the_same(of_gpt2, tmp_path):
    pytest.importorskip('typer', reason='needs the commands')
    from typer.testing import CliRunner

    from composer_ema import cli

    gpt2().save_pretrained(tmp_path / 'config')
    asked = ['--format', 'huggingface', '--dtype', 'float16', '--max-shard-size', '1KB', '--average', 'ema']
    command = ['export', str(of_gpt2[0]), str(tmp_path / 'out'), *asked, '--config', str(tmp_path / 'config')]
    done = CliRunner().invoke(cli.app, command)
    assert done.exit_code == 0, done.output
    assert 'float16, rounded to nearest' in done.output
    export(
        of_gpt2[0],
        tmp_path / 'expected',
        format='huggingface',
        dtype='float16',
        config=tmp_path / 'config',
        max_shard_size='1KB',
    )
    assert bits(load_average(tmp_path / 'out')) == bits(load_average(tmp_path / 'expected'))
    for path in (tmp_path / 'expected').glob('*.json'):
        assert (tmp_path / 'out' / path.name).read_bytes() == path.read_bytes()
    refused = CliRunner().invoke(cli.app, command)
    assert refused.exit_code == 2
    shown = CliRunner().invoke(cli.app, ['inspect', str(tmp_path / 'out')])
    assert 'composer-ema export, written by composer_ema' in shown.output


class TestFolders:
    def test_inspect_describes_the_average(self, folder):
        found = describe(folder)
        [average] = found.averages
        assert (average.algorithm, average.num_updates, average.config['half_life']) == (
            'composer-ema export',
            4,
            '2ba',
        )
        assert found.num_bytes == sum(path.stat().st_size for path in folder.glob('*.safetensors'))

    def test_inspect_lists_the_weights_of_any_such_folder(self, tmp_path):
        vit().save_pretrained(tmp_path)
        found = describe(tmp_path)
        assert found.averages == []
        assert {tensor.name for tensor in found.tensors} == set(vit().state_dict())

    def test_it_can_be_exported_again(self, folder, tmp_path):
        export(folder, tmp_path / 'again.safetensors')
        assert bits(load_average(tmp_path / 'again.safetensors')) == bits(load_average(folder))
        with pytest.raises(CheckpointError, match='is a file of the checkpoint'):
            export(folder, next(folder.glob('*.safetensors')))

    def test_damage_is_refused(self, folder, tmp_path):
        import shutil

        copy = Path(shutil.copytree(folder, tmp_path / 'copy'))
        shard = copy / 'model-00002-of-00003.safetensors'
        whole = shard.read_bytes()
        shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(CheckpointError, match='its checksum is wrong'):
            load_average(copy)
        shard.write_bytes((copy / 'model-00001-of-00003.safetensors').read_bytes())
        with pytest.raises(CheckpointError, match='two of its files have a tensor of one name'):
            load_average(copy)
        shard.unlink()
        with pytest.raises(CheckpointError, match='lacks model-00002'):
            load_average(copy)
        (copy / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': {'w': '../a.safetensors'}}))
        with pytest.raises(CheckpointError, match='is damaged: it does not say which file'):
            load_average(copy)

    def test_a_folder_is_whole_or_not_there(self, tmp_path):
        def fail() -> None:
            with folder_beside(tmp_path / 'a') as lent:
                (lent / 'b').write_text('b')
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            fail()
        assert list(tmp_path.iterdir()) == []

    def test_what_a_killed_process_left_is_removed_by_the_next(self, tmp_path):
        program = (
            'import os, sys; from pathlib import Path; from composer_ema.files import folder_beside\n'
            'with folder_beside(Path(sys.argv[1])) as lent: (lent / "b").write_text("b"); os._exit(9)'
        )
        assert subprocess.run([sys.executable, '-c', program, tmp_path / 'a'], check=False).returncode == 9
        assert [path.name.endswith('.unfinished') for path in tmp_path.iterdir()] == [True]
        with folder_beside(tmp_path / 'a') as lent, folder_beside(tmp_path / 'a'):
            assert lent.exists()  # that of a living process stays
        assert [path.name for path in tmp_path.iterdir()] == ['a']
