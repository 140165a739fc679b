"""Ways of quantizing, as hosts call them, whose weights cannot be streamed, and what to do instead. Data alone; knows no host."""

from __future__ import annotations

from overflowml_core.errors import Unsupported

_REFUSED = {
    "bitsandbytes": "a weight keeps what decodes it in an attribute (Params4bit.quant_state), which cannot be moved along",
    "hqq": "scales lie in a dictionary of the layer (HQQLinear.meta), not in parameters or buffers",
    "quanto": "nobody has tried whether its tensors come through unchanged",
}
"""Why, by the name that a host's quantization_config gives the method."""


def refuse_quantizer(quantizer: object, class_name: str) -> None:
    """Refuse a model that is quantized in a way that cannot be streamed.

    Args:
        quantizer: the host's, whose ``quantization_config.quant_method`` names the method; None for a model that is not quantized.
        class_name: of the model, for the message.

    Raises:
        Unsupported: the method is one of these.
    """
    config = getattr(quantizer, "quantization_config", None)
    method = getattr(config, "quant_method", None)
    name = str(getattr(method, "value", method))
    if name in _REFUSED:
        raise Unsupported(
            f"{class_name}: quantized by {name} ({type(quantizer).__name__}), which overflowml cannot stream: {_REFUSED[name]}; "
            "quantize it with torchao (quantization_config=TorchAoConfig(...)) or load it without overflow"
        )
