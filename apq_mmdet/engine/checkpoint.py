"""Checkpoints: float weights in, checked strictly; the quantized model out, packed."""

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.runner.checkpoint import load_state_dict
from torch import nn

from apq_mmdet.errors import BadInputError, listed
from apq_mmdet.files import safe_load, tensor_bytes, write_atomic
from apq_mmdet.layers.state import FORMAT_VERSION, VERSION_KEY, is_added, packed_state_dict

CHECKPOINT = "quantized.pth"  # in a work dir
META_KEY = "apq_mmdet"  # in a checkpoint's meta
PREPROCESSOR = "data_preprocessor."


def float_state(
    content: Any, path: str | Path, places: Sequence[str] = ("state_dict",)
) -> OrderedDict[str, torch.Tensor]:
    """The weights of a float checkpoint, named without the prefix that distributed training leaves.

    With it come the versions of its modules, by which some of them know checkpoints that they have to convert.

    Args:
        content: what the file holds.
        places: keys under which the weights may lie; they may also lie bare.

    Raises:
        BadInputError: there are none, they are quantized, or hold NaN or infinity.
    """
    for key in places:
        content = content.get(key, content) if isinstance(content, dict) else content
    if not isinstance(content, dict) or not content or not all(isinstance(v, torch.Tensor) for v in content.values()):
        raise BadInputError(f"checkpoint {path} holds no state_dict")
    if VERSION_KEY in content:
        raise BadInputError(f"checkpoint {path} is already quantized; quantization starts from a float checkpoint")
    broken = [key for key, value in content.items() if value.is_floating_point() and not value.isfinite().all()]
    if broken:
        raise BadInputError(f"checkpoint {path}: weights {broken[0]!r} hold NaN or infinity ({len(broken)} such)")
    state = OrderedDict((_without_wrapper(key), value) for key, value in content.items())
    if hasattr(content, "_metadata"):
        state._metadata = OrderedDict((_without_wrapper(name), kept) for name, kept in content._metadata.items())
    return state


def _without_wrapper(name: str) -> str:
    return "" if name == "module" else name.removeprefix("module.")


def load_float_weights(model: nn.Module, path: str) -> dict[str, Any]:
    """Load a float checkpoint into a quantized model, all of it or nothing; returns the checkpoint's meta.

    Raises:
        BadInputError: unreadable, already quantized, of another architecture, or with NaN weights.
    """
    checkpoint = safe_load(path)
    own = model.state_dict()
    # early versions of mmengine saved what the preprocessor has from the config, which is what counts in mmdet too
    state = float_state(checkpoint, path)
    for key in [key for key in state if key.startswith(PREPROCESSOR) and key not in own]:
        del state[key]
    _refuse_other_architecture(own, state, path)
    load_state_dict(model, state, strict=False)
    meta = checkpoint.get("meta") if "state_dict" in checkpoint else None
    return meta if isinstance(meta, dict) else {}


def _refuse_other_architecture(own: dict[str, torch.Tensor], state: dict[str, torch.Tensor], path: str) -> None:
    own = {key: value for key, value in own.items() if not is_added(key)}
    ignored = "num_batches_tracked"
    missing = [key for key in own if key not in state and ignored not in key]
    extra = [key for key in state if key not in own and ignored not in key]
    shapes = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(value.shape)}"
        for key, value in own.items()
        if key in state and state[key].shape != value.shape
    ]
    for what, found in (("lacks", missing), ("has other shapes:", shapes), ("holds unknown", extra)):
        if found:
            foreign = "backbone.patch_embed.proj.weight" in state  # as Swin's authors and mmdet 2 name it
            remedy = "; if it is Microsoft's or of mmdet 2, convert it first: tools/convert_checkpoint.py" * foreign
            raise BadInputError(
                f"checkpoint {path} is of another architecture than the config: it {what} {listed(found)}{remedy}"
            )


def save_quantized(model: nn.Module, path: Path, meta: dict[str, Any]) -> None:
    """Write a calibrated model: packed weight codes, everything else as it is; the same bytes for the same model.

    Args:
        meta: plain containers; ``dataset_meta`` in it is what mmdet's inference reads the class names from.
    """
    meta = {**meta, META_KEY: {"format_version": FORMAT_VERSION, **meta.get(META_KEY, {})}}
    write_atomic(path, tensor_bytes({"meta": meta, "state_dict": packed_state_dict(model)}))
