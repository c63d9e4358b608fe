"""TRL's RewardTrainer as a side of the training benchmark: its settings, one training with them, and the sweep that finds the fastest."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from typing import Any

import torch
from torch import nn

from benchmarks._common import Stopwatch
from synpref_ray.errors import ConfigError, SynprefError
from synpref_ray.reward.render import RenderedPairs

SHIPPED_BATCH_PAIRS = 8  # the default of per_device_train_batch_size
MAX_GRAPHS = 64  # torch counts the graphs of earlier trainers, too, and beyond its limit of 8 would no longer compile
ACCELERATE_LEFTOVERS = ("forward", "_original_forward", "_is_accelerate_prepared")
"""What accelerate leaves on a model. While the mark is there, the next trainer does not put autocast around the forward pass: it runs in float32."""


@dataclass(frozen=True)
class TrlSetting:
    """What a user of TRL can choose.

    `as_shipped`: nothing is chosen, so a device batch of 8 in random order with gradient checkpointing; otherwise gradient checkpointing is off.
    `compiled`: torch_compile, whose first epoch compiles and is not timed.
    """

    batch_pairs: int
    order: str
    as_shipped: bool = False
    compiled: bool = False

    def __str__(self) -> str:
        what = "as shipped" if self.as_shipped else f"{self.batch_pairs} pairs a device batch, {self.order}"
        return what + ", torch_compile" * self.compiled


class TrlSide:
    """TRL's trainer over tokenised pairs: one model and one optimizer for all rounds, a fresh trainer for each."""

    def __init__(self, model: Any, tokenizer: Any, global_batch_pairs: int, stopwatch: Stopwatch, folder: str):
        self.model = model
        self._tokenizer = tokenizer
        self._global_batch_pairs = global_batch_pairs
        self._stopwatch = stopwatch
        self._folder = folder
        self._optimizer: Any = None
        model.base_model.layers[0].register_forward_pre_hook(_require_autocast)

    def train(self, pairs: RenderedPairs, setting: TrlSetting) -> Mapping[str, float]:
        """Train on the pairs once; return the seconds of the loop, and loss and gradient norm of the first step.

        Raises:
            SynprefError: the model ran outside bfloat16 autocast.
        """
        from datasets import Dataset
        from transformers import PrinterCallback, TrainerCallback

        peer: Any = import_module("trl")
        stopwatch = self._stopwatch

        class Clock(TrainerCallback):
            started = seconds = 0.0

            def on_train_begin(self, *arguments: Any, **named: Any) -> None:
                self.started = time.perf_counter()

            def on_epoch_begin(self, *arguments: Any, **named: Any) -> None:
                if setting.compiled:  # the last epoch is the one that counts
                    stopwatch.take()
                    self.started = time.perf_counter()

            def on_train_end(self, *arguments: Any, **named: Any) -> None:
                self.seconds = time.perf_counter() - self.started

        sequences = [pairs.sequences(pair) for pair in range(len(pairs))]
        if setting.order == "sorted":
            sequences.sort(key=lambda pair: -max(len(sequence) for sequence in pair))
        columns = {
            "chosen_ids": [chosen.tolist() for chosen, _ in sequences],
            "rejected_ids": [rejected.tolist() for _, rejected in sequences],
            "length": [max(len(chosen), len(rejected)) for chosen, rejected in sequences],
        }
        clock = Clock()
        trainer = peer.RewardTrainer(
            model=self.model,
            args=peer.RewardConfig(**self._config(setting, log=len(pairs) == self._global_batch_pairs)),
            train_dataset=Dataset.from_dict(columns),
            processing_class=self._tokenizer,
            optimizers=(self._optimizer, None),
            callbacks=[clock],
        )
        trainer.remove_callback(PrinterCallback)
        if self._optimizer is None:
            self._optimizer = trainer.create_optimizer()
            self._optimizer.step = stopwatch.around(self._optimizer.step)
        accelerator = trainer.accelerator
        accelerator.backward = stopwatch.around(accelerator.backward)
        accelerator.clip_grad_norm_ = stopwatch.around(accelerator.clip_grad_norm_)
        if setting.compiled:  # nothing of ours inside the compiled graph; the few operations of the loss then count as the model's
            trainer.compute_loss = stopwatch.around(trainer.compute_loss)
        else:
            self.model.forward = stopwatch.around(self.model.forward)
        stopwatch.take()
        with torch._dynamo.config.patch(recompile_limit=MAX_GRAPHS):
            trainer.train()
        self.clean()
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        first = {"loss": logs[0]["loss"], "grad_norm": logs[0]["grad_norm"]} if logs else {}
        return {"seconds": clock.seconds, **first}

    def _config(self, setting: TrlSetting, *, log: bool) -> dict[str, Any]:
        """Return what is told to TRL: for all settings the same pairs, optimizer steps and learning rate; then what the setting chooses."""
        batch_pairs = min(setting.batch_pairs, self._global_batch_pairs)
        if self._global_batch_pairs % batch_pairs:
            raise ConfigError(f"TRL's device batch of {batch_pairs} pairs does not divide the global batch of {self._global_batch_pairs}")
        config = {
            "output_dir": self._folder,
            "gradient_accumulation_steps": self._global_batch_pairs // batch_pairs,
            "num_train_epochs": 2 if setting.compiled else 1,
            "learning_rate": 1e-6,
            "lr_scheduler_type": "constant",
            "max_length": None,
            "use_cpu": True,
            "dataloader_pin_memory": False,
            "remove_unused_columns": False,  # the sampler reads the column of lengths; the collator takes what it needs
            "torch_compile": setting.compiled,
            "logging_steps": 1 if log else 10**9,
            "save_strategy": "no",
            "eval_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
        }
        if setting.as_shipped:
            return config
        return {
            **config,
            "per_device_train_batch_size": batch_pairs,
            "train_sampling_strategy": "sequential" if setting.order == "sorted" else setting.order,
            "length_column_name": "length",
            "max_grad_norm": 1.0,
            "bf16": True,
            "gradient_checkpointing": False,
        }

    def clean(self) -> None:
        """Make the model what it was, so that the next trainer begins as on a fresh one."""
        for name in ACCELERATE_LEFTOVERS:
            self.model.__dict__.pop(name, None)
        self.model.gradient_checkpointing_disable()


def _require_autocast(module: nn.Module, inputs: Any) -> None:
    if not torch.is_autocast_enabled("cpu") or torch.get_autocast_dtype("cpu") is not torch.bfloat16:
        raise SynprefError("TRL's model ran outside bfloat16 autocast: its figures would be those of float32, and the comparison unfair")


def sweep_trl(trl: TrlSide, pairs: RenderedPairs, batches: Sequence[int], orders: Sequence[str]) -> list[tuple[TrlSetting, dict[str, Any]]]:
    """Train with each setting on the same pairs once and return what each took, the fastest first.

    Tried are TRL as shipped, all batches in all orders, and the fastest of these once more with torch_compile. A compilation that fails is left out,
    and said.
    """
    found: list[tuple[TrlSetting, dict[str, Any]]] = []

    def measure(setting: TrlSetting) -> None:
        seconds = trl.train(pairs, setting)["seconds"]
        found.append((setting, {**asdict(setting), "seconds": seconds, "pairs_per_second": len(pairs) / seconds}))
        found.sort(key=lambda one: float(one[1]["seconds"]))
        print(f"sweep: TRL, {setting}: {len(pairs) / seconds:.3f} pairs/s", flush=True)

    measure(TrlSetting(SHIPPED_BATCH_PAIRS, "random", as_shipped=True))
    for batch in batches:
        for order in orders:
            measure(TrlSetting(batch, order))
    try:
        measure(replace(found[0][0], compiled=True))
    except torch._dynamo.exc.TorchDynamoException as error:
        print(f"sweep: TRL, torch_compile does not run here: {str(error).splitlines()[0]}", flush=True)
        trl.clean()
    return found
