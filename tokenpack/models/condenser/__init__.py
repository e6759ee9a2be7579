"""The condenser: long contexts as a few vectors that a frozen decoder reads in place of tokens.

from tokenpack.models.condenser import Condenser, CondenserConfig
"""

from transformers import AutoConfig

from .configuration import CondenserConfig
from .modeling import Condenser, CondenserOutput

__all__ = ["Condenser", "CondenserConfig", "CondenserOutput"]

AutoConfig.register(CondenserConfig.model_type, CondenserConfig, exist_ok=True)
