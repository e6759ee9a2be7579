"""`CondenseTrainer`: trains a condenser on a token budget that counts both streams.

    tokens of a document = [segments and slots] + [BOS, vectors, flags, prompt, completion]
                           + the sequences of reconstruction and of the full context

Everything about steps, ranks, retries and checkpoints is that of `TokenBudgetTrainer`. This file is
above it and above the condenser: the other files of this folder know no model.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import TrainingArguments

from ..checks import IGNORE_INDEX
from ..data.condense import CondenseCollator
from ..models.condenser import Condenser, CondenserConfig
from ..models.condenser.layout import count_vectors
from ..models.condenser.objectives import count_targets
from ..models.condenser.texts import condense_ids, evaluating, generate_ids
from .measure import ModelTraits, SequenceSizes
from .step import StepRunner
from .trainer import TokenBudgetTrainer

GROUPS = ("lora", "slots", "projection")
_COLUMNS = ["context_ids", "reference_ids", "prompt_ids", "completion_ids", "is_text"]
_LENGTHS = ("context", "reference", "prompt", "completion")


@dataclasses.dataclass
class CondenseTraits(ModelTraits):
    """Measures documents: ``source`` is stream 1, ``target`` is all that the decoder reads.

    Attributes:
        config: of the condenser.
        has_bos: the decoder's sequences begin with BOS.
    """

    config: CondenserConfig = None  # type: ignore[assignment]
    has_bos: bool = True

    def loss_inputs(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """The batch itself."""
        return inputs

    def measure(self, inputs: Mapping[str, Any]) -> SequenceSizes:
        """Measure a `CondenseBatch` on the host."""
        context, decoder, reference = (
            inputs[name].cpu().diff().numpy().astype(np.int64)
            for name in ("cu_seqlens", "decoder_cu_seqlens", "reference_cu_seqlens")
        )
        ratios = inputs.get("ratios")
        sizes = self.sizes(
            context, decoder, reference, None if ratios is None else ratios.cpu().numpy()
        )
        labels = inputs["labels"].flatten().cpu().numpy() != IGNORE_INDEX
        seen = np.append(0, labels.cumsum())[inputs["decoder_cu_seqlens"].cpu().numpy()]
        targets = count_targets(self.config.weights, np.diff(seen), reference)
        return SequenceSizes(sizes[:, 0], sizes[:, 1], targets, np.zeros_like(context), sizes[:, 0])

    def sizes(
        self,
        context: NDArray[np.int64],
        decoder: NDArray[np.int64],
        reference: NDArray[np.int64],
        ratios: NDArray[np.int64] | None,
    ) -> NDArray[np.int64]:
        """``(num_docs, 2)``, the tokens of both streams.

        Args:
            context, decoder, reference: ``(num_docs,)``, tokens of the contexts, of prompts and
                completions, and of the contexts in the decoder's ids.
            ratios: ``(num_docs,)``, or None for the ratio that gives the most vectors.
        """
        config = self.config
        if ratios is None:
            ratios = np.full(len(context), min(config.ratios) if config.ratios else 1, np.int64)
        pools = config.carrier == "mean_pool"
        segments, _, per_segment = count_vectors(
            np.maximum(context, 1), config.segment_length, config.num_condense_tokens, ratios, pools
        )
        vectors = np.add.reduceat(per_segment, np.append(0, segments.cumsum()[:-1]))
        prefix = int(self.has_bos) + vectors + segments * config.separate_segments
        after = np.zeros_like(context)
        weights = config.weights
        if any(weights[name] for name in ("completion", "continuation", "distillation")):
            after = after + prefix + config.num_completion_flags + decoder
        if weights["reconstruction"]:
            after = after + prefix + config.num_reconstruction_flags + reference
        if weights["distillation"]:
            after = after + int(self.has_bos) + reference + decoder
        return np.stack([context + (0 if pools else vectors), after], axis=1)


class _CondenseRunner(StepRunner):
    """Keeps the losses of the attempt that succeeded: a step that ran out of memory is repeated."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.attempt: dict[str, list[Tensor]] = {}

    def _attempt(self, *arguments: Any) -> Any:
        self.attempt = {}
        return super()._attempt(*arguments)


class CondenseTrainer(TokenBudgetTrainer):
    """`TokenBudgetTrainer` for a `Condenser`. Accepts the same arguments.

    Datasets have the columns of `tokenpack.data.condense.tokenize_documents`. The best checkpoint
    is that with the smallest ``eval_loss`` (``load_best_model_at_end=True``).

    Attributes:
        learning_rates: the learning rate of each group of parameters.
    """

    optimizer: Any

    def __init__(
        self,
        model: Condenser,
        args: TrainingArguments | None = None,
        *positional: Any,
        lora_learning_rate: float | None = None,
        slots_learning_rate: float | None = None,
        projection_learning_rate: float | None = None,
        generate_samples: int = 0,
        **keywords: Any,
    ) -> None:
        """Set up training.

        Args:
            model: the condenser.
            args: transformers' arguments.
            positional: as in `Trainer`, from ``data_collator`` on.
            lora_learning_rate: of the adapter. Default: ``args.learning_rate``.
            slots_learning_rate: of slots, flags and separator, likewise.
            projection_learning_rate: of norm and projection, likewise.
            generate_samples: documents to generate at each evaluation. Their greedy texts go to
                ``generated-STEP.jsonl`` in ``output_dir``, and ``eval_generated_accuracy`` is the
                share of the completions' tokens that they have at the same place.
            keywords: fields of `TokenBudget`, and the keywords of `Trainer`.

        Raises:
            TypeError: if ``model`` is no `Condenser`.
            ValueError: if an option of the budget or of ``args`` does not go together with it.
        """
        if not isinstance(model, Condenser):
            raise TypeError(f"model must be a Condenser, got a {type(model).__name__}")
        given = (lora_learning_rate, slots_learning_rate, projection_learning_rate)
        self._given_rates = dict(zip(GROUPS, given))
        self._generate_samples = generate_samples
        self._sums: dict[str, Tensor] = {}
        if not positional and keywords.get("data_collator") is None:
            seed = 0 if args is None else args.seed
            keywords["data_collator"] = CondenseCollator(model.config.ratios, seed=seed)
        super().__init__(model, args, *positional, **keywords)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                "fsdp and deepspeed must be off for a Condenser, whose checkpoints hold only parts "
                "of the model: use DDP (torchrun without them)"
            )
        self.can_return_loss = True
        self._signature_columns = list(_COLUMNS)
        self.learning_rates = {
            name: self.args.learning_rate if rate is None else rate
            for name, rate in self._given_rates.items()
        }

    def _patch(self, model: Any) -> None:
        """The parts of a condenser are patched when it is made."""
        budget = self.budget
        if not budget.pack:
            raise ValueError("pack must be True for a Condenser, which has no padded form")
        if budget.pad_to_total is not None:
            raise ValueError(
                f"pad_to_total must be None for a Condenser, got {budget.pad_to_total}: pass it to "
                "patch_model for each of its two models"
            )
        if budget.overlong == "truncate":
            raise ValueError(
                "overlong must be 'error' or 'drop' for a Condenser, got 'truncate': "
                "tokenize_documents cuts texts (max_context_tokens)"
            )

    def _make_runner(self) -> None:
        super()._make_runner()
        if self.label_smoother is not None or self.compute_loss_func is not None:
            raise ValueError(
                "label_smoothing_factor must be 0 and compute_loss_func None, because a Condenser "
                "computes its own loss"
            )
        traits = CondenseTraits(
            is_encoder_decoder=True,  # two streams
            shifts_labels=False,
            padded=False,
            hidden_size=self.model.config.decoder_hidden_size,
            config=self.model.config,
            has_bos=self.model.has_bos,
        )
        broadcasts = self.runner.broadcasts_buffers
        self.runner = _CondenseRunner(
            self.accelerator, self.budget, traits, self._mean_loss, self._backward
        )
        self.runner.broadcasts_buffers = broadcasts

    def _lengths_of(self, dataset: Any) -> NDArray[np.int64]:
        """``(n, 2)`` tokens of both streams, with the ratio that gives the most vectors."""
        names = getattr(dataset, "column_names", None) or ()
        if all(f"{name}_length" in names for name in _LENGTHS):
            columns = [np.asarray(dataset[f"{name}_length"], np.int64) for name in _LENGTHS]
        else:
            rows = [[len(row[f"{name}_ids"]) for name in _LENGTHS] for row in dataset]
            columns = list(np.array(rows, np.int64).reshape(-1, len(_LENGTHS)).T)
        context, reference, prompt, completion = columns
        empty = np.flatnonzero(context < 1)
        if len(empty):
            raise ValueError(
                f"context must have at least one token, got example {empty[0]} with none: drop it"
            )
        traits = self.runner.traits
        assert isinstance(traits, CondenseTraits)
        return traits.sizes(context, prompt + completion, reference, None)

    # ------------------------------------------------------------------------------------- a step

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The loss of a batch. Losses by objective are kept for the log."""
        outputs = model(**inputs, num_items_in_batch=num_items_in_batch)
        if self.model.training and isinstance(self.runner, _CondenseRunner):
            for name, value in outputs.items():
                if name.endswith("_loss"):
                    self.runner.attempt.setdefault(name, []).append(value.detach())
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def training_step(
        self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None
    ) -> Tensor:
        """Run the step, and keep its losses by objective."""
        assert isinstance(self.runner, _CondenseRunner)
        self.runner.attempt = {}
        loss = super().training_step(model, inputs, num_items_in_batch)
        for name, values in self.runner.attempt.items():
            sums = torch.stack([*values, torch.ones_like(values[0]) * len(values)])
            total = torch.stack([sums[:-1].sum(), sums[-1]])
            self._sums[name] = self._sums[name] + total if name in self._sums else total
        return loss

    def _token_logs(self) -> dict[str, float]:
        """Tokens and memory, and the mean of each objective over the micro-batches of the log."""
        logs = super()._token_logs()
        names = [f"{name}_loss" for name, weight in self.model.config.weights.items() if weight]
        numbers = torch.stack(
            [self._sums.get(name, torch.zeros(2)).to(self.args.device).double() for name in names]
        )
        if self.args.world_size > 1:
            numbers = self.accelerator.reduce(numbers, "sum")
        self._sums = {}
        for name, (total, count) in zip(names, numbers.tolist()):
            if count:
                logs[name] = round(total / count, 4)
        return logs

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The optimizer, with a learning rate for each group of parameters."""
        if self.optimizer is None:
            source = self.accelerator.unwrap_model(self.model if model is None else model)
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, source)
            self.optimizer = kind(self._parameter_groups(source), **options)
        return self.optimizer

    def _parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        found: dict[tuple[str, bool], list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            first = name.partition(".")[0]
            group = {"condenser": "lora", "projection": "projection"}.get(first, "slots")
            decays = group != "slots" and parameter.dim() > 1
            found.setdefault((group, decays), []).append(parameter)
        return [
            {
                "params": parameters,
                "lr": self.learning_rates[group],
                "weight_decay": self.args.weight_decay if decays else 0.0,
            }
            for (group, decays), parameters in found.items()
        ]

    # ------------------------------------------------------------------------------- checkpoints

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        source = self.accelerator.unwrap_model(self.model if model is None else model)
        source.load_checkpoint(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        assert best is not None
        self.accelerator.unwrap_model(self.model).load_checkpoint(best)

    # -------------------------------------------------------------------------------- evaluation

    def _unpacking_batches(self) -> Any:
        """Evaluate on packed batches, with the first ratio."""
        return _first_ratio(self)

    def prediction_step(
        self,
        model: Any,
        inputs: Any,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **options: Any,
    ) -> tuple[Any, Any, Any]:
        """The loss of a batch. There are no predictions to gather."""
        rows, own = self._count_rows(inputs)
        batch = getattr(inputs, "inputs", inputs).select(range(own or rows))
        num_targets = int(self.runner.traits.measure(batch).num_targets.sum()) if own else 0
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, self._prepare_inputs(batch))
        if self._evaluation is not None:
            self._evaluation.losses.append(loss.detach())
            self._evaluation.num_targets.append(num_targets)
        return loss.detach(), None, None

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Run `Trainer.evaluate`, and generate samples."""
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if (
            self._generate_samples
            and self.args.should_save
            and not isinstance(dataset, (str, dict))
        ):
            accuracy = self._generate(dataset)
            metrics[f"{metric_key_prefix}_generated_accuracy"] = accuracy
            self.log({f"{metric_key_prefix}_generated_accuracy": accuracy})
        return metrics

    @torch.no_grad()
    def _generate(self, dataset: Any) -> float:
        """Write greedy texts of the first documents. Returns the share of tokens that are right."""
        model = self.accelerator.unwrap_model(self.model)
        count = min(self._generate_samples, len(dataset))
        rows = [dataset[at] for at in range(count)]
        wanted = [list(row["completion_ids"]) for row in rows]
        with evaluating(model):
            vectors, layout = condense_ids(model, [row["context_ids"] for row in rows], None)
            prompts = [row["prompt_ids"] for row in rows]
            longest = max(map(len, wanted))
            options: Any = {"max_new_tokens": longest, "do_sample": False}
            made = generate_ids(model, vectors, layout, prompts, **options).tolist()
        right = sum(sum(a == b for a, b in zip(ours, theirs)) for ours, theirs in zip(made, wanted))
        decode = self._decoder_of_ids(model)
        path = Path(self.args.output_dir, f"generated-{self.state.global_step}.jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [
            json.dumps(
                {
                    "prompt": decode(prompt),
                    "generated": decode(ours[: len(theirs)]),
                    "completion": decode(theirs),
                },
                ensure_ascii=False,
            )
            for prompt, ours, theirs in zip(prompts, made, wanted)
        ]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return right / max(sum(map(len, wanted)), 1)

    def _decoder_of_ids(self, model: Condenser) -> Any:
        """From the decoder's ids to a text, or the ids themselves without a tokenizer."""
        known = (model._tokenizers or {}).get("decoder") or self.processing_class
        return list if known is None else known.decode


class _first_ratio:
    """While it is entered, the trainer's collator takes the first ratio for every document."""

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.before = trainer, trainer.data_collator

    def __enter__(self) -> None:
        if isinstance(self.before, CondenseCollator):
            first = CondenseCollator(self.before.ratios, seed=self.before.seed, draw=False)
            self.trainer.data_collator = first

    def __exit__(self, *_: Any) -> None:
        self.trainer.data_collator = self.before
