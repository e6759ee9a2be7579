"""The published checkpoints of condense-trainer: three formats of ``modules.pt``.

    A  {"modules": {"pre_condensed_tokens": (1, K, H), "linear_state_dict", "norm_state_dict"}}
       vectors = linear(norm(the last n hidden states, concatenated)),  n = inputs of linear / H
    B  {"modules": {"condense_tokens": (1, K, H), "ae_embedding", "bos_embedding",
       optional "span_concat_embedding", "lm_embedding"}}
    C  {"gist_tokens": (K, H), "lm_embedding": (m, H), "auto_encoding_embedding": (m, H)}
       slots have the positions of the first tokens of their spans

In B and C, vectors are the last hidden states themselves. The adapter of PEFT is in the folder, and
``modules.pt`` in it or in its folder ``checkpoints``.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .configuration import CondenserConfig
from .parts import embedding_width

_PLACES = ("modules.pt", "checkpoints/modules.pt")
_FORMATS = {
    "A": ({"pre_condensed_tokens", "linear_state_dict", "norm_state_dict"}, set()),
    "B": (
        {"condense_tokens", "ae_embedding", "bos_embedding"},
        {"span_concat_embedding", "lm_embedding"},
    ),
    "C": ({"gist_tokens", "lm_embedding", "auto_encoding_embedding"}, set()),
}


class Published(NamedTuple):
    """What a ``modules.pt`` says: the configuration, and the tensors by our names."""

    config: CondenserConfig
    weights: dict[str, Tensor]


def is_published(folder: Path) -> bool:
    """Whether a folder is one of condense-trainer."""
    return not (folder / "config.json").is_file() and _path(folder) is not None


def _path(folder: Path) -> Path | None:
    return next((folder / name for name in _PLACES if (folder / name).is_file()), None)


def read_published(
    folder: Path, condenser: Any, decoder: Any, options: dict[str, Any]
) -> Published:
    """Read the ``modules.pt`` of a folder.

    Args:
        folder: that of the checkpoint.
        condenser, decoder: the two models.
        options: fields of the configuration that the file does not have.

    Raises:
        ValueError: if a model is missing, or the file has another content or other widths.
    """
    for name, model in (("condenser", condenser), ("decoder", decoder)):
        if model is None:
            raise ValueError(
                f"{name} must be given for modules.pt, which does not name it, got None"
            )
    path = _path(folder)
    assert path is not None
    modules = _load(path)
    width, out = embedding_width(condenser), embedding_width(decoder)
    kind = _format_of(modules, path)
    fields, weights = {"A": _read_a, "B": _read_b, "C": _read_c}[kind](modules, width)
    if kind != "A" and width != out:
        raise ValueError(
            f"decoder must be as wide as the condenser, {width}, because {path.name} has no linear "
            f"layer, got a width of {out}"
        )
    made_for = weights["slots"].shape[1]
    if made_for != width:
        raise ValueError(
            f"condenser must have a width of {made_for}, which {path.name} is made for, got {width}"
        )
    fields = {"condenser_hidden_size": width, "decoder_hidden_size": out, **fields, **options}
    return Published(CondenserConfig(**fields), weights)


def _load(path: Path) -> dict[str, Any]:
    """The content of the file, which holds tensors and no code.

    Raises:
        ValueError: if it holds anything else.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{path} must be a file of tensors that torch.load reads with weights_only=True, got "
            f"something else: {reason:.200}"
        ) from None
    inner = content.get("modules", content) if isinstance(content, dict) else content
    if not isinstance(inner, dict):
        raise ValueError(f"{path} must hold a dict of tensors, got a {type(inner).__name__}")
    return inner


def _format_of(modules: dict[str, Any], path: Path) -> str:
    for kind, (required, optional) in _FORMATS.items():
        if required <= modules.keys() <= required | optional:
            return kind
    known = "; ".join(f"{kind}: {', '.join(sorted(r))}" for kind, (r, _) in _FORMATS.items())
    raise ValueError(
        f"{path} must have the keys of a known format ({known}), got {sorted(modules) or 'none'}"
    )


def _rows(value: Any, name: str) -> Tensor:
    """``(n, width)`` of a tensor with leading dimensions of 1."""
    if not isinstance(value, Tensor) or value.dim() not in (2, 3) or 0 in value.shape:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name} must be a tensor of (1, n, width) or (n, width), got {got}")
    return value.detach().reshape(-1, value.shape[-1]).float()


def _read_a(modules: dict[str, Any], width: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    slots = _rows(modules["pre_condensed_tokens"], "pre_condensed_tokens")
    linear, norm = modules["linear_state_dict"], modules["norm_state_dict"]
    if "weight" not in linear or "weight" not in norm:
        raise ValueError(
            "linear_state_dict and norm_state_dict must have a weight, got "
            f"{sorted(linear)} and {sorted(norm)}"
        )
    inputs = linear["weight"].shape[1]
    if inputs % slots.shape[1]:
        raise ValueError(
            f"linear_state_dict must take a multiple of {slots.shape[1]} inputs, got {inputs}"
        )
    fields: dict[str, Any] = {
        "num_condense_tokens": len(slots),
        "num_last_layers": inputs // slots.shape[1],
        "norm": "layer_norm" if "bias" in norm else "rms_norm",
        "projection_bias": "bias" in linear,
        "num_reconstruction_flags": 0,
    }
    weights = {"slots": slots}
    for name, values in (("projection.norm", norm), ("projection.linear", linear)):
        weights |= {f"{name}.{key}": value.float() for key, value in values.items()}
    return fields, weights


def _direct(slots: Tensor, positions: str) -> dict[str, Any]:
    """The fields of a format whose vectors are the hidden states themselves."""
    return {
        "num_condense_tokens": len(slots),
        "norm": "none",
        "projection": "none",
        "slot_positions": positions,
    }


def _read_b(modules: dict[str, Any], width: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    names = {
        "condense_tokens": "slots",
        "ae_embedding": "reconstruction_flags",
        "bos_embedding": "bos_embedding",
        "span_concat_embedding": "separator",
        "lm_embedding": "completion_flags",
    }
    weights = {names[key]: _rows(value, key) for key, value in modules.items()}
    fields = {
        **_direct(weights["slots"], "end"),
        "fixed_bos_embedding": True,
        "num_reconstruction_flags": len(weights["reconstruction_flags"]),
        "num_completion_flags": len(weights.get("completion_flags", ())),
        "separate_segments": "separator" in weights,
    }
    return fields, weights


def _read_c(modules: dict[str, Any], width: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    names = {
        "gist_tokens": "slots",
        "auto_encoding_embedding": "reconstruction_flags",
        "lm_embedding": "completion_flags",
    }
    weights = {names[key]: _rows(value, key) for key, value in modules.items()}
    fields = {
        **_direct(weights["slots"], "span_starts"),
        "num_reconstruction_flags": len(weights["reconstruction_flags"]),
        "num_completion_flags": len(weights["completion_flags"]),
    }
    return fields, weights
