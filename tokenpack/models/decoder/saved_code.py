"""What a saved decoder has for programs that do not import this package: a file that does it.

``AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`` then loads a decoder
wherever tokenpack is installed. transformers would copy the source of the model instead. Such a
copy would go with one version of tokenpack's attention only, and register its ops twice.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

_FILE = "tokenpack_decoder.py"
_CODE = '''"""The decoder of tokenpack: pip install tokenpack."""

from tokenpack.models.decoder import DecoderConfig, DecoderForCausalLM, DecoderModel

__all__ = ["DecoderConfig", "DecoderForCausalLM", "DecoderModel"]
'''

AUTO_MAP = {
    "AutoConfig": f"{_FILE.removesuffix('.py')}.DecoderConfig",
    "AutoModel": f"{_FILE.removesuffix('.py')}.DecoderModel",
    "AutoModelForCausalLM": f"{_FILE.removesuffix('.py')}.DecoderForCausalLM",
}


class SavedCode:
    """A part of the configuration and of the models: saving writes the file too."""

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Nothing is left to do: all that is saved names these classes for the Auto classes.

        transformers calls this too, for a class that it has loaded by the file.
        """

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """Save as transformers does, with the file that imports tokenpack."""
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        if kwargs.get("is_main_process", True) and os.path.isdir(save_directory):
            Path(save_directory, _FILE).write_text(_CODE, encoding="utf-8")
