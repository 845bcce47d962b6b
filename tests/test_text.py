"""Text as data: what a sample is, that order survives a resume, what is refused, and tokenizers that others read."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import toy
from composer import Callback
from composer.utils import dist
from torch.utils.data import DataLoader

from composer_ema import EMA
from composer_ema.recipe import schema
from composer_ema.recipe.arguments import RecipeError
from composer_ema.recipe.preview import preview
from composer_ema.trainer.run import ComposerRun
from composer_ema.zoo import text as zoo_text
from composer_ema.zoo.dataset import counts_tokens, extent
from composer_ema.zoo.loading import as_is
from composer_ema.zoo.models import build_model
from composer_ema.zoo.own_data import own_dataset
from composer_ema.zoo.text import Blocks, python_docs, text_file
from composer_ema.zoo.tokens import Characters

TEXT = 'The quick brown fox jumps over the lazy dog.\n'


@pytest.fixture
def file(tmp_path):
    path = tmp_path / 'a.txt'
    path.write_text(TEXT * 20, encoding='utf-8')
    return str(path)


def ids(loader):
    return torch.cat([batch['input_ids'] for batch in loader])


def order(loader, epoch):
    loader.sampler.set_epoch(epoch)
    return [batch['input_ids'] for batch in loader]


class TestBlocks:
    def test_they_are_the_text_in_a_row_and_the_last_ones_are_held_out(self, file):
        made = text_file(path=file, sequence_length=10, batch_size=4, validation_split=0.2)
        characters = Characters.of(TEXT)
        expected = torch.from_numpy(characters.encode(TEXT * 20).astype(np.int64)).reshape(-1, 10)
        assert len(expected) == 90
        held_out, trained = ids(made.evaluation), ids(made.train)
        assert torch.equal(held_out, expected[72:])
        assert torch.equal(trained.unique(dim=0), expected[:72].unique(dim=0))
        assert len(trained) == 72

    def test_labels_are_the_inputs_in_memory_of_their_own(self, file):
        batch = next(iter(text_file(path=file, sequence_length=10, batch_size=4).train))
        assert batch.keys() == {'input_ids', 'labels'}
        assert all(each.dtype == torch.int64 and each.shape == (4, 10) for each in batch.values())
        assert torch.equal(batch['input_ids'], batch['labels'])
        assert batch['input_ids'].data_ptr() != batch['labels'].data_ptr()  # HuggingFaceModel shifts labels in place

    def test_what_is_left_behind_the_last_block_is_not_used(self, file):
        made = text_file(path=file, sequence_length=400, batch_size=1, validation_split=0.5)
        assert len(ids(made.train)) == len(ids(made.evaluation)) == 1

    def test_seed_and_epoch_alone_decide_the_order(self, file):
        one, same, other = (text_file(path=file, sequence_length=10, batch_size=7, seed=seed) for seed in (1, 1, 2))
        for epoch in (3, 0):
            torch.manual_seed(epoch)
            first = order(one.train, epoch)
            torch.manual_seed(epoch + 1)
            assert all(map(torch.equal, first, order(same.train, epoch)))
            assert not all(map(torch.equal, first, order(other.train, epoch)))
        assert not all(map(torch.equal, order(one.train, 0), order(one.train, 1)))

    def test_processes_share_the_batches_of_one(self, file, monkeypatch):
        whole = order(text_file(path=file, sequence_length=10, batch_size=6).train, 1)
        monkeypatch.setattr(dist, 'get_world_size', lambda: 2)
        parts = []
        for rank in range(2):
            monkeypatch.setattr(dist, 'get_global_rank', lambda rank=rank: rank)
            parts.append(order(text_file(path=file, sequence_length=10, batch_size=6).train, 1))
        for all_of, *of_ranks in zip(whole[:-1], *parts, strict=False):
            assert sorted(all_of.tolist()) == sorted(torch.cat(of_ranks).tolist())

    def test_the_length_of_an_epoch_is_known_beforehand(self, file):
        arguments = {'path': file, 'sequence_length': 10, 'batch_size': 8, 'validation_split': 0.25}
        found, made = extent(text_file, arguments), text_file(**arguments)
        assert found is not None
        assert (found.samples, found.batches) == (len(made.train.dataset), len(made.train)) == (68, 9)

    def test_the_text_is_read_once_and_again_where_it_changes(self, file, monkeypatch):
        read = []
        monkeypatch.setattr(
            zoo_text,
            'read_texts',
            lambda paths, argument, own=zoo_text.read_texts: read.append(1) or own(paths, argument),
        )
        zoo_text._of_versions.cache_clear()
        arguments = {'path': file, 'sequence_length': 10, 'batch_size': 8}
        extent(text_file, arguments)
        text_file(**arguments)
        assert len(read) == 1
        with open(file, 'a') as more:
            more.write(TEXT)
        assert len(text_file(**arguments).train.dataset) > 81
        assert len(read) == 2


class TestFiles:
    def test_several_are_one_text(self, file, tmp_path):
        (tmp_path / 'b.txt').write_bytes(b'\xef\xbb\xbf' + 'äß\r\n'.encode() * 30)
        made = text_file(path=[file, str(tmp_path / 'b.txt')], sequence_length=10, batch_size=4)
        text = TEXT * 20 + 'äß\r\n' * 30  # without the byte order mark, with its line ends
        assert torch.equal(
            ids(made.evaluation).flatten(),
            torch.from_numpy(Characters.of(text).encode(text).astype(np.int64))[-100:],
        )

    def test_another_text_is_evaluated_on_with_the_tokens_of_the_first(self, file, tmp_path):
        (tmp_path / 'b.txt').write_text('the dog\n' * 5)
        made = text_file(
            path=file, sequence_length=8, batch_size=4, validation_split=0, test_path=str(tmp_path / 'b.txt')
        )
        assert len(ids(made.train)) == len(TEXT) * 20 // 8
        assert torch.equal(
            ids(made.evaluation)[0], torch.from_numpy(Characters.of(TEXT).encode('the dog\n').astype(np.int64))
        )

    def test_characters_of_the_other_text_that_the_first_lacks_are_warned_of(self, file, tmp_path):
        (tmp_path / 'b.txt').write_text('the DOG\n' * 5)
        with pytest.warns(UserWarning, match=r'15 of 40 characters to evaluate on are not in the text to train on'):
            made = text_file(
                path=file, sequence_length=8, batch_size=4, validation_split=0, test_path=str(tmp_path / 'b.txt')
            )
        assert (ids(made.evaluation)[0] == 0).tolist() == [False] * 4 + [True] * 3 + [False]

    @pytest.mark.parametrize(
        ('content', 'message'),
        [
            (b'abc\xe4bc', r'a\.txt is not UTF-8: byte 3 is 0xe4, .* Convert it, .* iconv -f latin1 -t utf-8 '),
            (b'', r'a\.txt is empty\. Leave it out'),
            (b'abc', r'2 blocks of sequence_length=128 must fit into the text, got 3 tokens\. Pass more text or a'),
        ],
    )
    def test_a_file_that_cannot_be_used_is_named(self, file, content, message):
        with open(file, 'wb') as replaced:
            replaced.write(content)
        with pytest.raises(ValueError, match=message) as caught:
            text_file(path=file)
        assert caught.value.argument == 'path'

    def test_what_is_no_file_is_named(self, tmp_path):
        with pytest.raises(ValueError, match=r'is a folder\. List its files'):
            text_file(path=[str(tmp_path)])
        with pytest.raises(ValueError, match=r'none\.txt cannot be read: No such file or directory\. Pass a text file'):
            text_file(path=str(tmp_path / 'none.txt'))
        with pytest.raises(ValueError, match=r'path must be a text file or a list of them, got \[\]'):
            text_file(path=[])

    @pytest.mark.parametrize(
        ('arguments', 'argument', 'message'),
        [
            ({'sequence_length': 1}, 'sequence_length', r'at least 2, got 1\. A model predicts all tokens'),
            ({'tokenizer': ''}, 'tokenizer', r"got ''"),
            ({'validation_split': 0}, 'validation_split', r'Pass validation_split=0\.1 alone, or'),
            ({'test_path': 'x'}, 'test_path', r"got validation_split=0\.1 and test_path='x'"),
            (
                {'batch_size': 82, 'sequence_length': 10, 'drop_last': True},
                'batch_size',
                'every batch would be dropped',
            ),
        ],
    )
    def test_a_setting_that_cannot_be_is_refused_with_a_remedy(self, file, arguments, argument, message):
        with pytest.raises(ValueError, match=message) as caught:
            text_file(path=file, **arguments)
        assert caught.value.argument == argument


class TestPythonDocs:
    def test_no_paragraph_is_both_trained_and_evaluated_on(self):
        made = python_docs(sequence_length=64)
        text = zoo_text._of_docs('characters')
        alphabet = '\ufffd' + text.tokenizer.alphabet
        whole = ''.join(alphabet[token] for token in text.tokens)
        cut = len(made.train.dataset) * 64
        trained = set(whole[:cut].split('\n\n'))
        assert len(whole) > 300_000
        assert not trained & set(whole[cut:].split('\n\n')[1:])

    def test_there_is_no_other_text_to_evaluate_on(self):
        with pytest.raises(ValueError, match=r'validation_split must be above 0: there is no other text'):
            python_docs(validation_split=0)

    def test_a_python_without_it_says_what_to_do(self, monkeypatch):
        monkeypatch.setattr(zoo_text, '_TOPICS', 'pydoc_data.none')
        zoo_text._of_docs.cache_clear()
        with pytest.raises(ImportError, match=r'this Python lacks pydoc_data\.none.*text_file'):
            python_docs()


class TestCharacters:
    def test_unknown_ones_are_token_0(self):
        characters = Characters.of('ba\nab\U0001f600')
        assert characters.alphabet == '\nab\U0001f600'
        assert characters.encode('ab\U0001f600\nz\ufffd').tolist() == [2, 3, 4, 1, 0, 0]
        assert characters.count_unknown('ab\U0001f600\nz\ufffd') == 1

    def test_transformers_reads_the_same_tokens_also_from_a_folder(self, tmp_path):
        transformers = pytest.importorskip('transformers')
        text = 'héllo\r\n\t wörld\u2028 <unk> \U0001f600e\u0301'
        characters = Characters.of(text)
        made = characters.pretrained()
        made.save_pretrained(tmp_path)
        loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
        for each in (made, loaded):
            assert len(each) == characters.size
            assert each(text)['input_ids'] == characters.encode(text).tolist()
            assert set(each(text)) == {'input_ids', 'attention_mask'}
            assert each.decode(each(text)['input_ids']) == text
            assert each('h?o')['input_ids'] == characters.encode('h?o').tolist()


class TestTokenizers:
    @pytest.fixture
    def folder(self, tmp_path_factory):
        """A small byte-pair tokenizer as `save_pretrained` writes it, with tokens that it would add around a text."""
        transformers = pytest.importorskip('transformers')
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

        made = Tokenizer(models.BPE())
        made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=['<s>'],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        made.train_from_iterator([TEXT * 20], trainer)
        made.post_processor = processors.TemplateProcessing(single='<s> $A', special_tokens=[('<s>', 0)])
        folder = tmp_path_factory.mktemp('tokenizer')
        transformers.PreTrainedTokenizerFast(tokenizer_object=made, bos_token='<s>').save_pretrained(folder)
        return folder

    @pytest.mark.parametrize('name', ['', 'tokenizer.json'])
    def test_a_given_one_makes_the_tokens_and_adds_none(self, file, folder, name, caplog):
        made = text_file(path=file, tokenizer=str(folder / name), sequence_length=8, batch_size=4)
        tokens = torch.cat([ids(made.evaluation)[0]]).tolist()
        text = zoo_text._of_files(file, str(folder / name))
        assert 0 not in text.tokens
        assert text.tokenizer.pretrained().decode(text.tokens) == TEXT * 20
        # The folder says itself what its tokenizer gives. A file does not, and GPT-2 embeds token types as tokens.
        assert ('token_type_ids' in text.tokenizer.pretrained()('a')) == (not name)
        assert len(text.tokens) < len(TEXT) * 10
        assert tokens in text.tokens[: len(text.tokens) // 8 * 8].reshape(-1, 8).tolist()
        assert 'longer than' not in caplog.text

    def words(self, numbers: dict[str, int], path) -> str:
        pytest.importorskip('transformers')
        from tokenizers import Tokenizer, models, pre_tokenizers

        made = Tokenizer(models.WordLevel(numbers))
        made.pre_tokenizer = pre_tokenizers.Whitespace()
        made.save(str(path / 'tokenizer.json'))
        return str(path / 'tokenizer.json')

    @pytest.mark.parametrize('last', [5, 70_000])
    def test_numbers_with_gaps_below_them_fit_the_model(self, tmp_path, last):
        (tmp_path / 'words.txt').write_text('a b ' * 40)
        given = self.words({'a': 0, 'b': last}, tmp_path)
        text = zoo_text._of_files(str(tmp_path / 'words.txt'), given)
        assert text.tokens.tolist() == [0, last] * 40
        assert text.tokenizer.size == last + 1
        model = build_model(
            'hf_causal_lm',
            config={'model_type': 'gpt2', 'n_embd': 2, 'n_layer': 1, 'n_head': 1},
            tokenizer=text.tokenizer,
        )
        assert model.config.vocab_size == last + 1

    def test_a_text_that_one_cannot_encode_is_refused(self, tmp_path):
        (tmp_path / 'words.txt').write_text('a b c ' * 40)
        given = self.words({'a': 0, 'b': 1}, tmp_path)
        with pytest.raises(ValueError, match=r'the tokenizer cannot encode the text: .*Pass another') as caught:
            text_file(path=str(tmp_path / 'words.txt'), tokenizer=given)
        assert caught.value.argument == 'tokenizer'

    def test_one_that_is_not_there_is_refused(self, file, tmp_path):
        pytest.importorskip('transformers')
        with pytest.raises(ValueError, match=r"tokenizer='.*none' is neither characters nor a folder that") as caught:
            text_file(path=file, tokenizer=str(tmp_path / 'none'))
        assert caught.value.argument == 'tokenizer'

    def test_without_transformers_the_error_says_how_to_install_it(self, file, monkeypatch):
        monkeypatch.setitem(__import__('sys').modules, 'transformers', None)
        with pytest.raises(ImportError, match=r'pip install "transformers>=4\.46,<4\.54", or pass characters'):
            text_file(path=file, tokenizer='gpt-none')
        assert len(text_file(path=file, sequence_length=10).train) > 0


class StepAt(Callback):
    """Sets the weight to 1 when so many tokens are trained; what the average then becomes is all newer than that."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def batch_end(self, state, logger) -> None:
        if state.timestamp.token.value == self.tokens:
            state.model.weight.data.fill_(1.0)


class TestTokens:
    """A time in tokens means the same under any batch size."""

    @pytest.mark.parametrize(
        ('ema', 'expected'),
        [
            ({'half_life': '40tok'}, 1 - 2 ** (-64 / 40)),
            ({'half_life': '40tok', 'update_interval': '32tok'}, 1 - 2 ** (-64 / 40)),
        ],
        ids=['half_life', 'interval'],
    )
    @pytest.mark.parametrize('batches', [[4] * 4, [8] * 2, [1, 1, 2, 4, 8], [8, 4, 4], [3, 1, 4, 4, 3, 1]], ids=str)
    def test_the_share_of_what_is_newer_than_a_token_is_the_same_under_any_batch_size(self, batches, ema, expected):
        blocks = Blocks(np.zeros(128, np.uint16), 8)
        ends = np.cumsum(batches)
        sampler = [list(range(end - size, end)) for size, end in zip(batches, ends, strict=True)]
        loader = DataLoader(blocks, batch_sampler=sampler, collate_fn=as_is)
        algorithm, model = EMA(**ema), toy.OneWeight()
        toy.make_trainer(
            [algorithm],
            model=model,
            train_dataloader=loader,
            max_duration='128tok',
            callbacks=[StepAt(64)],
            device_train_microbatch_size=8,
        ).fit()
        average = algorithm.ema_model
        assert average is not None
        [(_, weight)] = average.named_parameters()
        assert weight.item() == pytest.approx(expected, rel=1e-12)

    def test_two_recipes_of_different_batch_sizes_give_a_stretch_of_tokens_the_same_share(self, file):
        """Of 86 blocks of 10 tokens, the last batch of an epoch holds 2 or 6."""
        ends, shares = zip(*(self.shares_of(file, batch_size) for batch_size in (4, 16)), strict=True)
        common = sorted(set(ends[0]) & set(ends[1]))
        assert len(common) > 10
        for time in common:
            for own, own_shares in zip(ends, shares, strict=True):
                older = sum(share for end, share in zip(own, own_shares, strict=True) if end <= time)
                assert older == pytest.approx(2 ** (-(1720 - time) / 400), rel=1e-9)

    @staticmethod
    def shares_of(path: str, batch_size: int) -> tuple[list[int], list[float]]:
        """The tokens trained at each update of a run, and the share of the update in the average at the end."""
        values = {
            'max_duration': '1720tok',
            'model': {'name': 'mnist1d_mlp'},
            'data': {
                'name': 'text_file',
                'path': path,
                'sequence_length': 10,
                'batch_size': batch_size,
                'validation_split': 0.05,
            },
            'optimizer': {'name': 'sgd', 'lr': 0.1},
            'algorithms': {'ema': {'half_life': '400tok'}},
        }
        recipe = schema.Recipe('a.yaml', 'a', values)
        size = schema.plan(recipe).extent()
        assert size is not None
        [profile] = preview(recipe).profiles
        per_batch = [10 * size.samples_of(batch) for batch in range(size.batches)] * 2
        ends = np.cumsum(per_batch)[profile.batch.astype(int) - 1]
        return ends.tolist(), profile.share.tolist()

    def test_a_recipe_whose_data_count_none_refuses_them(self):
        recipe = schema.Recipe(
            'a.yaml', 'a', {'max_duration': '9tok', 'model': {'name': 'mnist1d_mlp'}, 'data': {'name': 'mnist1d'}}
        )
        with pytest.raises(RecipeError, match='the data set of this recipe reports none'):
            schema.plan(recipe)

    @pytest.mark.parametrize('tokens', [8, lambda given: given['length']], ids=['number', 'function'])
    def test_a_data_set_of_ones_own_tells_how_many_its_samples_have(self, tokens):
        def lines(*, length: int = 8) -> tuple[list[int], list[int]]: ...

        found = extent(own_dataset(lines, samples=20, tokens=tokens), {'batch_size': 5})
        assert found is not None
        assert (found.tokens, found.batches_until(21, found.batches)) == (8, 5)
        assert counts_tokens(own_dataset(lines, tokens=tokens))
        assert not counts_tokens(own_dataset(lines))

    def test_the_length_of_a_run_in_tokens_is_known_before_it_trains(self):
        blocks = Blocks(np.zeros(128, np.uint16), 8)
        loader = DataLoader(blocks, batch_size=4, collate_fn=as_is)
        run = toy.make_trainer(
            [EMA(half_life='500tok')], model=toy.OneWeight(), train_dataloader=loader, max_duration='3ep'
        )
        assert ComposerRun(run.state).length('tok') == 384
        with pytest.warns(UserWarning, match=r"half_life='500tok'"):
            run.fit()
