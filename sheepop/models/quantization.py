"""A trained model with its matrices in fewer bits."""

import torch

from sheepop.models.pretrained import stored_weights
from sheepop.models.quantized_layers import Quantization, QuantizedEmbedding, QuantizedLinear
from sheepop.models.transformer import TransformerModel
from sheepop.utils.errors import ConfigError


def quantize(model: TransformerModel, quantization: Quantization) -> TransformerModel:
    """Return the model with its linear layers in 8 or 4 bits and its token embedding and head in 8.

    Norms, learned positions and the tables of groups of tokens stay as they are; the model given is not changed.

    Raises:
        ConfigError: the model is quantized already.
    """
    if model.config.quantization != "none":
        raise ConfigError(
            f"The model is quantized already, to {model.config.quantization}; name the one it was made of."
        )
    settings = model.config.model_copy(update={"quantization": quantization})
    quantized = TransformerModel(settings).to(model.device)
    weights = stored_weights(model)
    for name, layer in quantized.named_modules():
        if isinstance(layer, QuantizedEmbedding):
            layer.matrix.fill(weights.pop(f"{name}.weight"), None)
        elif isinstance(layer, QuantizedLinear) and f"{name}.weight" in weights:
            layer.fill(weights.pop(f"{name}.weight"), weights.pop(f"{name}.bias", None))
    with torch.no_grad():
        quantized.load_state_dict(weights, strict=False)
    return quantized.train(model.training)
