"""Propulsion (arXiv 2409.10927) as a PEFT method: frozen layers whose outputs are scaled by a trained `z**k`.

Importing this package registers the method with PEFT, after which every stock call works:

    from peft import get_peft_model
    from peft_cpift.propulsion import PropulsionConfig

    model = get_peft_model(base_model, PropulsionConfig(degree=15))
"""

from peft_cpift.propulsion.config import PropulsionConfig
from peft_cpift.propulsion.layer import Embedding, Linear, PropulsionLayer
from peft_cpift.propulsion.model import PropulsionModel
from peft_cpift.propulsion.registration import register_propulsion

__all__ = ["Embedding", "Linear", "PropulsionConfig", "PropulsionLayer", "PropulsionModel", "register_propulsion"]

register_propulsion()
