"""Propulsion (arXiv 2409.10927) as a PEFT method: frozen layers whose outputs are scaled by a trained `z**k`.

Importing this package registers the method with PEFT, after which every stock call works:

    from peft import get_peft_model
    from peft_cpift.propulsion import PropulsionConfig

    model = get_peft_model(base_model, PropulsionConfig(degree=15))
"""

from peft_cpift.propulsion.card import update_card
from peft_cpift.propulsion.config import PropulsionConfig
from peft_cpift.propulsion.experts import ParamWrapper
from peft_cpift.propulsion.hotswap import hotswap_adapter
from peft_cpift.propulsion.layer import Conv, Embedding, Linear, PropulsionLayer
from peft_cpift.propulsion.lora import LoraConversion, convert_to_lora
from peft_cpift.propulsion.model import PropulsionModel
from peft_cpift.propulsion.registration import register_propulsion

__all__ = [
    "Conv",
    "Embedding",
    "Linear",
    "LoraConversion",
    "ParamWrapper",
    "PropulsionConfig",
    "PropulsionLayer",
    "PropulsionModel",
    "convert_to_lora",
    "hotswap_adapter",
    "register_propulsion",
    "update_card",
]

register_propulsion()
