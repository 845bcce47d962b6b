"""A Trainer of transformers so small that a run takes a tenth of a second; for the tests and what their ranks run."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate_loops import as_accelerate_starts_a_rank, shard
from plain import same_bits
from sharded import whole
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

from composer_ema.model.wrappers import canonical_name, unwrap
from composer_ema.transformers import WeightAverage

#: Six batches of four samples to an epoch, and so three steps of the optimizer.
SAMPLES, BATCH, ACCUMULATED, STEPS = 24, 4, 2, 6


class Sentences(Dataset):
    """Random tokens, labelled by the parity of their sum."""

    def __init__(self, samples: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.tokens = torch.randint(0, 16, (samples, 6), generator=generator)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = self.tokens[index]
        return {'input_ids': tokens, 'attention_mask': torch.ones_like(tokens), 'labels': tokens.sum() % 2}


def network(**options: Any) -> BertForSequenceClassification:
    """Dropout in it; equal weights at every call."""
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=16, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
            max_position_embeddings=8, num_labels=2, **options,
        )
    )  # fmt: skip


class Record(TrainerCallback):
    """The weights before training, after each step, and in each step of an evaluation."""

    def __init__(self) -> None:
        self.trained: list[dict[str, Tensor]] = []
        self.evaluated: list[tuple[int, dict[str, Tensor]]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: nn.Module, **_: Any) -> None:
        self.trained.append(weights(model))

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: nn.Module, **_: Any) -> None:
        self.trained.append(weights(model))

    def on_prediction_step(self, args: Any, state: Any, control: Any, *, model: nn.Module, **_: Any) -> None:
        self.evaluated.append((state.global_step, weights(model)))


def build(
    folder: Path,
    average: WeightAverage | None = None,
    *,
    record: Record | None = None,
    kind: Callable[..., Trainer] = Trainer,
    model: nn.Module | None = None,
    train_dataset: Any = None,
    eval_dataset: Any = None,
    compute_metrics: Any = None,
    optimizers: Any = (None, None),
    **arguments: Any,
) -> Trainer:
    """A Trainer that evaluates after every second step and saves after every one, in two epochs."""
    callbacks = [each for each in (average, record) if each is not None]
    options = {
        'per_device_train_batch_size': BATCH, 'gradient_accumulation_steps': ACCUMULATED, 'num_train_epochs': 2,
        'learning_rate': 0.01, 'eval_strategy': 'steps', 'eval_steps': 2, 'save_strategy': 'steps', 'save_steps': 1,
        'logging_strategy': 'no', 'report_to': [], 'use_cpu': True, 'disable_tqdm': True,
    }  # fmt: skip
    return kind(
        model=network() if model is None else model,
        args=Arguments(str(folder), **{**options, **arguments}),
        train_dataset=Sentences(SAMPLES) if train_dataset is None else train_dataset,
        eval_dataset=Sentences(8, seed=1) if eval_dataset is None else eval_dataset,
        compute_metrics=compute_metrics,
        optimizers=optimizers,
        callbacks=callbacks,
    )


def averaged(average: WeightAverage, label: str | None = None) -> dict[str, Tensor]:
    """The parameters of an average; a collective call where they are shared."""
    return {name: whole(tensor) for name, tensor in average.shadow(label).named_parameters()}


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that a model holds; a collective call where they are shared."""
    return {canonical_name(name): whole(tensor) for name, tensor in unwrap(model).named_parameters()}


class Arguments(TrainingArguments):
    """On the CPU that torch.load knows: with several processes, transformers calls it ``cpu:0``."""

    @property
    def device(self) -> torch.device:
        return torch.device(super().device.type)


class Sharded(Trainer):
    """Shards the model by FSDP2 on the CPU, where accelerate would not."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        shard(self.accelerator)
        self.is_fsdp_enabled = True


def run_in_ranks(folder: str, *, sharded: bool, **settings: Any) -> dict[str, Any]:
    """Trains two epochs, saved after each step, and again from the fourth step on; and without an average."""
    as_accelerate_starts_a_rank()
    kind = Sharded if sharded else Trainer

    def trained(average: WeightAverage | None, name: str, **options: Any) -> tuple[Trainer, Record]:
        record = Record()
        trainer = build(
            Path(folder) / name, average, record=record, kind=kind, per_device_train_batch_size=2, **options
        )
        trainer.train(resume_from_checkpoint=options.get('resume_from_checkpoint'))
        return trainer, record

    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        average, again = WeightAverage('2ba', **settings), WeightAverage('2ba', **settings)
        trainer, record = trained(average, 'whole', logging_strategy='epoch')
        _, bare = trained(None, 'bare')
        at = str(Path(folder) / 'whole' / 'checkpoint-4')
        _, later = trained(again, 'again', resume_from_checkpoint=at)
        record.evaluated.clear()
        trainer.evaluate()
        _, seen = record.evaluated[-1]
    ends = averaged(average)
    return {
        'wrapper': type(trainer.model_wrapped).__name__,
        'untouched': [same_bits(one, other) for one, other in zip(record.trained, bare.trained, strict=True)],
        'resumed': [
            same_bits(later.trained[-1], record.trained[-1]),
            same_bits(averaged(again), ends),
            again.shadow().num_updates == average.shadow().num_updates == STEPS,
        ],
        'seen': same_bits(seen, ends),
        'distances': [row['ema/relative_distance'] for row in trainer.state.log_history if 'loss' in row],
        'given back': same_bits(weights(trainer.model), record.trained[-1]),
        'trained': [{name: tensor.tolist() for name, tensor in one.items()} for one in record.trained],
        'average': {name: tensor.tolist() for name, tensor in ends.items()},
    }
