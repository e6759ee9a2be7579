"""The condenser: a context as a few vectors that a frozen decoder reads in place of its tokens.

    stream 1   [segment, slots] of all contexts      -> condenser (LoRA)   -> one call
    vectors    norm and projection of the slots' hidden states, or of means over spans
    stream 2   [BOS, vectors, prompt, completion]    -> decoder (frozen)   -> one call

Nothing is padded on either side. Slots read their own segment alone, so the vectors of a context do
not depend on the other contexts of a batch (ICAE, arXiv 2307.06945; mean pooling, 2510.20797).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ...adapters.patching import transformers_model
from .carriers import CondenserProjection, pooled
from .configuration import CondenserConfig
from .files import CondenserFiles
from .layout import (
    ContextLayout,
    DecoderLayout,
    Integers,
    Sources,
    context_layout,
    count_vectors,
    decoder_layout,
    host_array,
    vector_rows,
)
from .objectives import ObjectiveSums, Rows, compute_objectives
from .parts import (
    Head,
    check_adapter,
    embedding_of,
    embedding_width,
    max_positions,
    pack_part,
    root_mean_square,
    run_base,
)
from .texts import CondenserTexts


@dataclass
class CondenserOutput(ModelOutput):
    """What `Condenser.forward` returns.

    Attributes:
        loss: ``()``, the weighted sum of all targets' losses over the number of targets.
        completion_loss, continuation_loss, reconstruction_loss, distillation_loss: ``()``, the mean
            of each objective over its own targets in this batch, without weight and gradient. None
            if the batch has no such target or the weight is 0.
        num_targets: how many targets the batch has.
    """

    loss: Tensor | None = None
    completion_loss: Tensor | None = None
    continuation_loss: Tensor | None = None
    reconstruction_loss: Tensor | None = None
    distillation_loss: Tensor | None = None
    num_targets: int | None = None


class Condenser(CondenserFiles, CondenserTexts, PreTrainedModel):
    """A condenser model and a frozen decoder, joined by learned slots and a projection.

    The decoder stays in evaluation mode, and none of its parameters gets a gradient. Of the
    condenser model, the adapter of PEFT is trained, and nothing if it has none. Both models are
    changed in place: `tokenpack.patch_model` patches them, unless they pack by themselves.

    Attributes:
        condenser: the condenser model, as it was given.
        decoder: the decoder.
        slots: ``(num_slot_embeddings, condenser width)``, the learned tokens. None if tokens are
            pooled.
        projection: norm and projection.
        reconstruction_flags, completion_flags: ``(n, decoder width)``, or None.
        separator: ``(1, decoder width)``, the vector behind each segment, or None.
        bos_embedding: ``(1, decoder width)``, in place of the decoder's BOS, or None.
    """

    config_class = CondenserConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: CondenserConfig, condenser: Any, decoder: Any) -> None:
        """Join two models.

        Args:
            config: its widths are set here.
            condenser: any causal model that packs, with or without an adapter of PEFT.
            decoder: any causal model that packs. Another object than ``condenser``.

        Raises:
            TypeError, ValueError: if a model is not causal or cannot be packed, or the
                configuration was made for other widths.
        """
        pack_part("condenser", condenser)
        pack_part("decoder", decoder)
        check_adapter(condenser)
        if transformers_model(condenser) is transformers_model(decoder):
            raise ValueError(
                "condenser and decoder must be two objects, got one: the adapter of the condenser "
                "would change the decoder (copy.deepcopy makes a second one)"
            )
        _set_widths(config, embedding_width(condenser), embedding_width(decoder))
        super().__init__(config)
        self.condenser, self.decoder = condenser, decoder
        if not hasattr(condenser, "peft_config"):
            condenser.requires_grad_(False)
        decoder.requires_grad_(False)
        weight = embedding_of(decoder).weight
        scale = root_mean_square(weight)
        self.projection = CondenserProjection(config, scale)
        self.slots = self._learned(
            config.num_slot_embeddings if config.carrier == "slots" else 0, condenser
        )
        flags, completion = config.num_reconstruction_flags, config.num_completion_flags
        self.reconstruction_flags = self._learned(flags, decoder)
        self.completion_flags = self._learned(completion, decoder)
        self.separator = self._learned(int(config.separate_segments), decoder)
        self.bos_embedding = self._learned(int(config.fixed_bos_embedding), decoder)
        if self.bos_embedding is not None:
            self.bos_embedding.requires_grad_(False)
        if self.reconstruction_flags is not None and not config.reconstruction_weight:
            self.reconstruction_flags.requires_grad_(False)  # DDP waits for every gradient
        self.projection.to(weight.device)
        self._head = Head(decoder)
        self.post_init()
        self.train(self.training)

    def _learned(self, rows: int | None, like: Any) -> nn.Parameter | None:
        """Learned vectors of the size of a model's embeddings; None for no rows."""
        if not rows:
            return None
        weight = embedding_of(like).weight
        drawn = torch.randn(rows, weight.shape[1]) * root_mean_square(weight)
        return nn.Parameter(drawn.to(weight.device))

    def init_weights(self) -> None:
        """Do nothing: both models have their weights, and the rest is drawn in the constructor."""

    def get_input_embeddings(self) -> Any:
        """The embedding of the condenser model."""
        return embedding_of(self.condenser)

    def train(self, mode: bool = True) -> Condenser:
        """Set the mode. The decoder stays in evaluation mode."""
        super().train(mode)
        self.decoder.eval()
        return self

    # ----------------------------------------------------------------------------------- stream 1

    def vectors(
        self, input_ids: Tensor, lengths: Integers, ratios: Integers | None = None
    ) -> tuple[Tensor, ContextLayout]:
        """Condense contexts, in one call of the condenser model.

        Args:
            input_ids: ``(total,)`` int64, the contexts one after the other, in the condenser's ids.
            lengths: ``(num_docs,)`` int64, tokens of each context, on the host.
            ratios: ``(num_docs,)`` int64. Default: the first ratio of the configuration.

        Returns:
            ``(num_vectors, decoder width)``, document by document, and the layout.

        Raises:
            ValueError: if a context is empty or too long.
        """
        config = self.config
        layout = self.layout_of(lengths, ratios)
        device, pools = input_ids.device, config.carrier == "mean_pool"
        rows = embedding_of(self.condenser)(input_ids)
        if self.slots is not None:
            rows = torch.cat([rows, self.slots.to(rows.dtype)])
        hidden = run_base(
            self.condenser,
            rows[_on(layout.source, device)],
            _on(layout.cu_seqlens, device).int(),
            _on(layout.position_ids, device),
            config.num_last_layers,
        )
        if pools:
            carriers = pooled(hidden, _on(layout.spans, device))
        else:
            carriers = hidden[_on(layout.slot_at, device)]
        weight = next(self.projection.parameters(), carriers)
        return self.projection(carriers.to(weight.dtype)), layout

    def layout_of(self, lengths: Integers, ratios: Integers | None = None) -> ContextLayout:
        """The layout of stream 1. Arguments and errors are those of `vectors`."""
        config = self.config
        if not len(lengths) or int(lengths.min()) < 1:
            where = int(lengths.argmin()) if len(lengths) else 0
            raise ValueError(
                f"context must have at least one token, got context {where} with none: drop it"
                if len(lengths)
                else "contexts must hold at least one context, got none"
            )
        if ratios is None:
            ratios = np.full(len(lengths), config.ratios[0] if config.ratios else 1, np.int64)
        pools = config.carrier == "mean_pool"
        counted = count_vectors(
            lengths, config.segment_length, config.num_condense_tokens, ratios, pools
        )
        rows = config.num_slot_embeddings
        if not pools and 1 < rows < int(counted[2].max()):
            raise ValueError(
                f"ratios must give at most num_slot_embeddings={rows} slots to a segment, got "
                f"{int(counted[2].max())}"
            )
        layout = context_layout(
            *counted,
            pools=pools,
            slot_positions=config.slot_positions,
            num_slot_embeddings=rows,
        )
        limit = max_positions(self.condenser)
        needed = int(layout.position_ids.max()) + 1
        if limit is not None and needed > limit:
            raise ValueError(
                f"context must fit into the condenser's {limit} positions, got a segment that "
                f"needs {needed} (its slots included): set segment_length, or cut the context"
            )
        return layout

    # ----------------------------------------------------------------------------------- stream 2

    def decoder_stream(
        self,
        vectors: Tensor | None,
        layout: ContextLayout | None,
        documents: Integers,
        reconstructs: NDArrayBool,
        token_ids: Tensor,
        token_lengths: Integers,
    ) -> tuple[Tensor, DecoderLayout]:
        """Build stream 2 by one gather.

        Args:
            vectors: ``(num_vectors, width)``, or None if no sequence begins with any.
            layout: that of stream 1.
            documents: ``(num_seqs,)``, the document of each sequence; -1 for none.
            reconstructs: ``(num_seqs,)`` bool: the sequence has the flags of the reconstruction.
            token_ids: ``(num_tokens,)``, the decoder's ids that follow.
            token_lengths: ``(num_seqs,)``, how many follow in each sequence.

        Returns:
            ``(total, width)`` embeddings and their layout.

        Raises:
            ValueError: if a sequence has more tokens than the decoder has positions.
        """
        embed = embedding_of(self.decoder)
        tokens = embed(token_ids)
        bos = self._bos(token_ids)
        flags = [self.separator, self.completion_flags, self.reconstruction_flags]
        sources = Sources(
            0 if bos is None else 1,
            0 if vectors is None else len(vectors),
            *(0 if each is None else len(each) for each in flags),
        )
        parts = [each.to(tokens.dtype) for each in (bos, vectors, *flags) if each is not None]
        none = np.zeros(0, np.int64)
        rows, counts = none, none
        if layout is not None:
            rows, counts = vector_rows(layout.segment_vectors, layout.doc_segments, sources)
        names = ("completion_flags", "reconstruction_flags")
        first, number = (
            np.array([get(name) for name in names])[reconstructs.astype(np.int64)]
            for get in (sources.first, lambda name: getattr(sources, name))
        )
        number = np.where(documents < 0, 0, number)
        made = decoder_layout(
            rows,
            counts if len(counts) else np.zeros(1, np.int64),
            documents,
            first,
            number,
            token_lengths,
            sources,
        )
        limit, longest = max_positions(self.decoder), int(np.diff(made.cu_seqlens).max())
        if limit is not None and longest > limit:
            raise ValueError(
                f"prompt and completion must fit into the decoder's {limit} positions together "
                f"with the condensed vectors, got a sequence of {longest}"
            )
        return torch.cat([*parts, tokens])[_on(made.source, token_ids.device)], made

    def run_decoder(self, stream: Tensor, layout: DecoderLayout) -> Tensor:
        """``(total, width)``, the decoder's last hidden states of stream 2."""
        device = stream.device
        cu_seqlens = _on(layout.cu_seqlens, device).int()
        return run_base(self.decoder, stream, cu_seqlens, _on(layout.position_ids, device))

    @property
    def head(self) -> Head:
        """The decoder's head."""
        return self._head

    @property
    def has_bos(self) -> bool:
        """Whether the decoder's sequences begin with BOS."""
        known = getattr(transformers_model(self.decoder).config, "bos_token_id", None) is not None
        return self.bos_embedding is not None or (self.config.decoder_bos and known)

    def _bos(self, ids: Tensor) -> Tensor | None:
        """``(1, width)``, or None."""
        if self.bos_embedding is not None or not self.has_bos:
            return self.bos_embedding
        bos = transformers_model(self.decoder).config.bos_token_id
        return embedding_of(self.decoder)(ids.new_tensor([bos]))

    # ------------------------------------------------------------------------------------ training

    def forward(
        self,
        input_ids: Tensor,
        cu_seqlens: Tensor,
        decoder_input_ids: Tensor | None = None,
        decoder_cu_seqlens: Tensor | None = None,
        labels: Tensor | None = None,
        reference_ids: Tensor | None = None,
        reference_cu_seqlens: Tensor | None = None,
        ratios: Tensor | None = None,
        is_text: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        return_dict: bool | None = None,
    ) -> CondenserOutput | tuple[Any, ...]:
        """The loss of a packed batch, as `tokenpack.data.condense.CondenseCollator` makes it.

        Args:
            input_ids: ``(1, total)`` int64, the contexts in the condenser's ids.
            cu_seqlens: ``(num_docs + 1,)`` int32, the boundaries of the contexts.
            decoder_input_ids: ``(1, decoder_total)`` int64, prompt and completion of each document.
            decoder_cu_seqlens: ``(num_docs + 1,)`` int32.
            labels: ``(1, decoder_total)`` int64, the ids of the completion, and -100 elsewhere. Not
                shifted: each target is predicted by the place in front of it, which may be the last
                condensed vector.
            reference_ids, reference_cu_seqlens: the contexts in the decoder's ids, which
                reconstruction and distillation need.
            ratios: ``(num_docs,)`` int64. Default: the first ratio of the configuration.
            is_text: ``(num_docs,)`` bool, True if the labels continue the context's own text
                (objective ``continuation``, not ``completion``).
            num_items_in_batch: denominator of the loss. Default: the targets of this batch.
            return_dict: False to get a tuple.

        Raises:
            ValueError: if a context is empty or too long, or the weights need what is missing.
        """
        bounds = host_array(cu_seqlens)
        given = None if ratios is None else host_array(ratios)
        vectors, layout = self.vectors(input_ids.reshape(-1), np.diff(bounds), given)
        rows = Rows.of(
            len(bounds) - 1,
            (decoder_input_ids, decoder_cu_seqlens),
            labels,
            (reference_ids, reference_cu_seqlens),
            is_text,
        )
        sums = compute_objectives(self, vectors, layout, rows)
        return self._output(sums, num_items_in_batch, return_dict)

    def _output(self, sums: ObjectiveSums, num_items: Any, return_dict: bool | None) -> Any:
        weights, total = self.config.weights, sums.zero
        for name, value in sums.sums.items():
            total = total + weights[name] * value
        if isinstance(num_items, Tensor):
            num_items = num_items.to(total.device)
        output = CondenserOutput(
            loss=total / (sums.num_targets if num_items is None else num_items),
            num_targets=sums.num_targets,
            **{
                f"{name}_loss": each.detach() / sums.counts[name]
                for name, each in sums.sums.items()
            },
        )
        return output.to_tuple() if return_dict is False else output


NDArrayBool = np.ndarray[Any, np.dtype[np.bool_]]


def _set_widths(config: CondenserConfig, condenser: int, decoder: int) -> None:
    """Write the widths of both models into the configuration, or compare them with it.

    Raises:
        ValueError: if the configuration was made for other widths.
    """
    for name, width in (("condenser", condenser), ("decoder", decoder)):
        known = getattr(config, f"{name}_hidden_size")
        if known is not None and known != width:
            raise ValueError(
                f"{name} must have a width of {known}, for which this condenser was made, got a "
                f"model of width {width}"
            )
    config.condenser_hidden_size, config.decoder_hidden_size = condenser, decoder
    config.validate_architecture()


def _on(values: Integers, device: torch.device) -> Tensor:
    return torch.from_numpy(values).to(device, non_blocking=True)
