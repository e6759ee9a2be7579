"""Saving and loading: the learned parts and the adapter, without the weights of the two models.

config.json                  `CondenserConfig`, which names the two models
model.safetensors            slots, projection, flags
adapter_config.json, adapter_model.safetensors     of PEFT, if the condenser has an adapter
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from ...adapters.patching import transformers_model
from .configuration import CondenserConfig
from .published import is_published, read_published

WEIGHTS = "model.safetensors"
ADAPTER = "adapter_model.safetensors"
_MODELS = ("condenser.", "decoder.")


class CondenserFiles:
    """The part of `Condenser` that reads and writes folders."""

    @classmethod
    def from_models(
        cls: Any,
        condenser: Any,
        decoder: Any,
        config: CondenserConfig | None = None,
        *,
        lora: Any = None,
        condenser_tokenizer: Any = None,
        decoder_tokenizer: Any = None,
        **options: Any,
    ) -> Any:
        """Make a condenser of two models, with new slots, projection and LoRA.

        Args:
            condenser: a causal model.
            decoder: another causal model, which may be of any family and width.
            config: the configuration. Default: made of ``options``.
            lora: a ``peft.LoraConfig``, or a dict of its arguments. Default: rank 16 in all linear
                layers. Not for a condenser that has an adapter of PEFT already.
            condenser_tokenizer, decoder_tokenizer: for `condense` and `generate`.
            options: fields of `CondenserConfig`.

        Raises:
            TypeError, ValueError: as `Condenser` and `CondenserConfig`.
            ImportError: without PEFT (``pip install tokenpack[condense]``).
        """
        config = CondenserConfig(**options) if config is None else config
        for name, model in (("condenser", condenser), ("decoder", decoder)):
            if getattr(config, f"{name}_name_or_path") is None:
                path = getattr(transformers_model(model).config, "name_or_path", "") or None
                setattr(config, f"{name}_name_or_path", path)
        if not hasattr(condenser, "peft_config"):
            condenser = _with_lora(condenser, lora)
        elif lora is not None:
            raise ValueError("lora must be None for a condenser that has an adapter already")
        model = cls(config, condenser, decoder)
        model.set_tokenizers(condenser_tokenizer, decoder_tokenizer)
        return model

    @classmethod
    def from_pretrained(
        cls: Any,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        condenser: Any = None,
        decoder: Any = None,
        is_trainable: bool = False,
        model_options: dict[str, Any] | None = None,
        config_options: dict[str, Any] | None = None,
        **hub_options: Any,
    ) -> Any:
        """Load a condenser that `save_pretrained` or condense-trainer has written.

        Args:
            pretrained_model_name_or_path: a folder, or a name on the hub. A folder of
                condense-trainer has ``modules.pt`` or ``checkpoints/modules.pt`` instead of a
                configuration, and needs ``condenser`` and ``decoder``.
            condenser: the condenser model, without the adapter. Default: loaded from where the
                configuration says.
            decoder: the decoder, likewise.
            is_trainable: whether the adapter is trained further.
            model_options: for ``AutoModelForCausalLM.from_pretrained`` of the two models.
            config_options: fields of the configuration, for ``modules.pt``, which does not have
                them (``segment_length``).
            hub_options: of ``huggingface_hub.snapshot_download``, such as ``revision``.

        Returns:
            The condenser in evaluation mode.

        Raises:
            ValueError: if a file is missing or unknown, or made for models of other widths.
        """
        folder = _folder(pretrained_model_name_or_path, hub_options)
        published = is_published(folder)
        weights: dict[str, Tensor]
        if published:
            found = read_published(folder, condenser, decoder, config_options or {})
            config, weights = found.config, found.weights
        elif config_options:
            raise ValueError(
                "config_options must be None for a folder with a configuration, got "
                f"{config_options}"
            )
        else:
            config, weights = CondenserConfig.from_pretrained(folder), _read(folder / WEIGHTS)
        models = {"condenser": condenser, "decoder": decoder}
        for name, model in models.items():
            where = getattr(config, f"{name}_name_or_path")
            if model is None and not where:
                raise ValueError(f"{name} must be given, because config.json does not name it")
            if model is None:
                loaded = AutoModelForCausalLM.from_pretrained(where, **(model_options or {}))
                models[name] = loaded
        if (folder / "adapter_config.json").is_file():
            models["condenser"] = _with_adapter(models["condenser"], folder, is_trainable)
        model = cls(config, models["condenser"], models["decoder"])
        model.load_own(weights)
        return model.eval()

    def save_pretrained(
        self: Any,
        save_directory: str | os.PathLike[str],
        *,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **options: Any,
    ) -> None:
        """Write the folder described above. Weights of the two models are not in it.

        Args:
            save_directory: the folder.
            push_to_hub: also upload the folder.
            repo_id: the repository. Default: the name of the folder.
            options: of ``push_to_hub``. Others are ignored, as trainers pass them.
        """
        if options.get("is_main_process") is False:
            return
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        self.config.architectures = [type(self).__name__]
        self.config.save_pretrained(folder)
        save_file(self.own_state_dict(), folder / WEIGHTS, metadata={"format": "pt"})
        if hasattr(self.condenser, "peft_config"):
            self.condenser.save_pretrained(folder, save_embedding_layers=False)
        if push_to_hub:
            names = ("commit_message", "private", "token", "revision", "create_pr")
            given = {name: options[name] for name in names if name in options}
            self.push_to_hub(repo_id or folder.name, **given)

    def own_state_dict(self: Any) -> dict[str, Tensor]:
        """The learned tensors that belong to neither of the two models, on the CPU."""
        return {
            name: value.detach().cpu().contiguous()
            for name, value in self.state_dict().items()
            if not name.startswith(_MODELS)
        }

    def load_own(self: Any, weights: dict[str, Tensor]) -> None:
        """Copy `own_state_dict` into the model.

        Raises:
            ValueError: if tensors are missing, unknown, or of other shapes.
        """
        own = {n: v for n, v in self.state_dict().items() if not n.startswith(_MODELS)}
        for name in sorted(own.keys() | weights.keys()):
            if name not in own or name not in weights:
                have = "an unknown" if name not in own else "no"
                raise ValueError(
                    f"checkpoint must have the tensors of its configuration ({', '.join(own)}), "
                    f"got {have} {name}"
                )
            if own[name].shape != weights[name].shape:
                raise ValueError(
                    f"checkpoint must be for a condenser of these widths: {name} must be "
                    f"{tuple(own[name].shape)}, got {tuple(weights[name].shape)}"
                )
        with torch.no_grad():
            for name, value in weights.items():
                own[name].copy_(value)

    def load_checkpoint(self: Any, folder: str | os.PathLike[str]) -> None:
        """Load the weights of a folder into this model, adapter included.

        Raises:
            ValueError: if a file is missing or does not fit.
        """
        self.load_own(_read(Path(folder, WEIGHTS)))
        if hasattr(self.condenser, "peft_config"):
            from peft import set_peft_model_state_dict

            weights = _read(Path(folder, ADAPTER))
            result = set_peft_model_state_dict(self.condenser, weights)
            unknown = list(getattr(result, "unexpected_keys", None) or ())
            if unknown:
                raise ValueError(f"{ADAPTER} must be of this adapter, got an unknown {unknown[0]}")


def _with_lora(condenser: Any, lora: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    if not isinstance(lora, LoraConfig):
        given = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", **(lora or {})}
        lora = LoraConfig(**given)
    return get_peft_model(condenser, lora)


def _with_adapter(condenser: Any, folder: Path, is_trainable: bool) -> Any:
    """Load the adapter in ``folder`` onto a model.

    Raises:
        ValueError: if it is for a model of other widths.
    """
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(condenser, folder, is_trainable=is_trainable)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"condenser must be the model that the adapter in {folder} was made for, got another: "
            f"{reason:.300}"
        ) from None


def _folder(name: str | os.PathLike[str], options: dict[str, Any]) -> Path:
    """The folder, downloaded if it is a name on the hub."""
    if os.path.isdir(name):
        return Path(name)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(str(name), **options))


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"{path.parent} must hold a condenser, but {path.name} is missing")
    return load_file(path)
