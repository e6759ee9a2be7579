"""A decoder of our own: every attention, feed-forward, norm and position from one configuration.

    from tokenpack.models.decoder import DecoderConfig, DecoderForCausalLM

Importing this package registers both with transformers' Auto classes.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .callbacks import RouterBiasCallback
from .configuration import DecoderConfig
from .modeling import DecoderForCausalLM, DecoderModel

__all__ = ["DecoderConfig", "DecoderForCausalLM", "DecoderModel", "RouterBiasCallback"]

AutoConfig.register(DecoderConfig.model_type, DecoderConfig, exist_ok=True)
AutoModel.register(DecoderConfig, DecoderModel, exist_ok=True)
AutoModelForCausalLM.register(DecoderConfig, DecoderForCausalLM, exist_ok=True)
