"""State of a quantized model: packed weight codes out, packed or float weights in, and nothing half-loaded."""

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from apq_mmdet.errors import CheckpointError, listed
from apq_mmdet.layers.base import INPUT_CENTERS, INPUT_FACTORS, QuantizedLayer, quantizers_of
from apq_mmdet.layers.mlp_refit import REPLACED
from apq_mmdet.layers.output_compensation import NAME as OUTPUT_COMPENSATION
from apq_mmdet.quantizers import pack_codes, unpack_codes

FORMAT_VERSION = 2
VERSION_KEY = "apq_format_version"
PACKED_SUFFIX = "weight_codes"
FRESH = {INPUT_FACTORS: torch.ones_like, INPUT_CENTERS: torch.zeros_like, REPLACED: torch.zeros_like}
FORMAT_SUFFIX = ".format"  # of what each quantizer says about its codes


def is_added(key: str) -> bool:
    """Whether a key of a quantized model's state_dict is one that the float model has not."""
    parts = key.split(".")
    return (
        parts[-1] in (VERSION_KEY, INPUT_FACTORS, INPUT_CENTERS, REPLACED)
        or "quantizers" in parts
        or OUTPUT_COMPENSATION in parts
    )


def _weight_layers(model: nn.Module) -> Iterator[tuple[str, QuantizedLayer]]:
    """Every name of every layer with a quantized weight; a layer that stands in several places has several names."""
    for name, layer in model.named_modules(remove_duplicate=False):
        if isinstance(layer, QuantizedLayer) and "weight" in getattr(layer, "quantizers", ()):
            yield name, layer


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _own_state(model: nn.Module) -> OrderedDict[str, Tensor]:
    """The state_dict without what hooks make of it: every tensor under the name of the module that holds it."""
    state: OrderedDict[str, Tensor] = OrderedDict()
    state._metadata = OrderedDict()  # as torch's own state_dict has it
    for name, module in model.named_modules(remove_duplicate=False):
        state._metadata[name] = {"version": module._version}
        module._save_to_state_dict(state, f"{name}." if name else "", keep_vars=False)
    return state


@torch.no_grad()
def packed_state_dict(model: nn.Module) -> OrderedDict[str, Tensor]:
    """The state_dict of a calibrated model with quantized weights as densely packed integer codes.

    The key ``X.weight`` of each layer whose weight is quantized becomes ``X.weight_codes`` (uint8). Tensors are copies,
    on the CPU; one that has several names is one copy.

    Raises:
        CheckpointError: a quantizer is not calibrated.
    """
    own = _own_state(model)
    blank = _uncalibrated(own)
    if blank:
        raise CheckpointError(f"not calibrated: {listed(blank, 5, '; ')}")
    packed: dict[QuantizedLayer, Tensor] = {}
    for name, layer in _weight_layers(model):
        if layer not in packed:
            quantizer = layer.quantizers["weight"]
            codes = quantizer.encode(layer.weight) - quantizer.code_min
            packed[layer] = pack_codes(codes.cpu(), int(quantizer.bits))
        del own[_join(name, "weight")]
        own[_join(name, PACKED_SUFFIX)] = packed[layer]
    copies: dict[tuple[Any, ...], Tensor] = {}
    for key, value in own.items():
        if not isinstance(value, Tensor):  # a module's own extra state
            continue
        place = (value.device, value.data_ptr(), value.shape, value.stride(), value.dtype)
        if place not in copies:
            copies[place] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        own[key] = copies[place]
    return own


def install_state_hooks(model: nn.Module, device: torch.device) -> None:
    """Let ``model``, which begins on ``device``, load float checkpoints as before, and quantized ones all or not."""
    model.register_buffer(VERSION_KEY, torch.tensor(FORMAT_VERSION, device=device))
    # the public name of this method is younger than the oldest torch that is supported
    model._register_load_state_dict_pre_hook(_before_load, with_module=True)


def _before_load(
    model: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Any, strict: bool, *lists: list[str]
) -> None:
    """Runs once on the state of the whole model, before torch's or mmengine's loader walks the modules."""
    own = {prefix + key: value for key, value in _own_state(model).items()}
    if prefix + VERSION_KEY not in state:  # a float checkpoint
        stray = [key for key in state if key.startswith(prefix) and _is_quantized(key)]
        if stray:
            raise CheckpointError(
                f"the checkpoint holds quantized state ({stray[0]} and so on) but no {prefix + VERSION_KEY}: it is "
                f"incomplete, or of a model that was quantized as a whole where this one is in part"
            )
        for quantizer in quantizers_of(model):
            quantizer.reset()  # ranges of other weights say nothing of these
        model.weights_changed_by_calibration = False
        for key, value in own.items():
            if is_added(key):  # float weights have taken up no factors, and nothing is known of their inputs or errors
                parts = key.split(".")
                fresh = torch.zeros_like if OUTPUT_COMPENSATION in parts else FRESH.get(parts[-1])
                state.setdefault(key, fresh(value) if fresh else value)
        return
    version = int(state[prefix + VERSION_KEY])
    if version != FORMAT_VERSION:
        remedy = "install a newer apq_mmdet" if version > FORMAT_VERSION else "quantize the detector again"
        raise CheckpointError(
            f"the checkpoint has quantized format version {version}, this apq_mmdet reads {FORMAT_VERSION}: {remedy}"
        )
    for name, module in model.named_modules(remove_duplicate=False):
        if hasattr(module, "split_projections"):  # multi-head attention, whose state_dict() has torch's names
            module.split_projections(state, f"{prefix}{name}." if name else prefix)
    _unpack_weights(model, state, prefix)
    _refuse_incomplete(own, state, prefix)
    model.weights_changed_by_calibration = True


def _is_quantized(key: str) -> bool:
    return ".quantizers." in key or key.endswith(f".{PACKED_SUFFIX}")


def _unpack_weights(model: nn.Module, state: dict[str, Tensor], prefix: str) -> None:
    """Replace packed codes by the values they stand for; quantizing these again gives the same codes."""
    for name, layer in _weight_layers(model):
        key = prefix + _join(name, PACKED_SUFFIX)
        base = prefix + _join(name, "quantizers", "weight")
        if key not in state or any(f"{base}.{part}" not in state for part in ("bits", "scale", "zero_point")):
            continue  # named by _refuse_incomplete
        quantizer = layer.quantizers["weight"]
        bits = int(state[f"{base}.bits"])
        if bits != int(quantizer.bits):
            raise CheckpointError(
                f"layer {name!r}: the checkpoint holds {bits}-bit weights, the config asks for "
                f"{int(quantizer.bits)} bits; use the config.py that was written beside the checkpoint"
            )
        try:
            codes = unpack_codes(state.pop(key), bits, layer.weight.shape) + quantizer.code_min
        except ValueError as error:
            raise CheckpointError(f"layer {name!r}: {error}") from error
        scale, zero_point = state[f"{base}.scale"], state[f"{base}.zero_point"]
        if scale.numel() != quantizer.groups:
            continue  # a shape error, named by _refuse_incomplete
        offset = quantizer.per_element(zero_point, codes)
        state[prefix + _join(name, "weight")] = (codes - offset).to(scale.dtype) * quantizer.per_element(scale, codes)


def _refuse_incomplete(own: dict[str, Tensor], state: dict[str, Tensor], prefix: str) -> None:
    given = {key: value for key, value in state.items() if key.startswith(prefix)}
    problems = [f"missing {key}" for key in own if key not in given]
    problems += [f"unexpected {key}" for key in given if key not in own]
    problems += [
        f"shape of {key} is {_shape(value)}, the model has {_shape(own[key])}"
        for key, value in given.items()
        if key in own and _shape(value) != _shape(own[key]) and not key.endswith(FORMAT_SUFFIX)
    ]
    problems += [
        f"{key} is {int(given[key])} in the checkpoint, {int(value)} in the config"
        for key, value in own.items()
        if key.endswith(".bits") and key in given and int(given[key]) != int(value)
    ]
    problems += [
        f"{key} is {_text(given[key])!r} in the checkpoint, {_text(value)!r} in the config"
        for key, value in own.items()
        if key.endswith(FORMAT_SUFFIX) and key in given and _text(given[key]) != _text(value)
    ]
    problems += [f"not calibrated: {key}" for key in _uncalibrated(given)]
    if problems:
        raise CheckpointError(
            f"the quantized checkpoint does not fit this model: {listed(problems, 5, '; ')}. Load it with the "
            f"config.py that was written beside it"
        )


def _shape(value: Any) -> tuple[int, ...] | None:
    """None for what is no tensor: a module's own extra state."""
    return tuple(value.shape) if isinstance(value, Tensor) else None


def _text(characters: Tensor) -> str:
    return bytes(characters.to(torch.uint8).flatten().tolist()).decode(errors="replace")


def _uncalibrated(state: dict[str, Tensor]) -> list[str]:
    names = [
        key.removesuffix(".calibrated") for key, value in state.items() if key.endswith(".calibrated") and not value
    ]
    return [name.replace(".quantizers.", ", role ") for name in names]
