"""Checkpoints that mmdet 3 does not load as they are, converted into such that it loads strictly.

Two kinds: detectors of Microsoft's Swin-Transformer-Object-Detection (mmdet 2.11 with a Swin of its own), and
detectors of mmdet 2.x, whose keys mmdet 3 kept outside the DETR and MaskFormer families.
"""

import contextlib
import math
import re
from collections import Counter, OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmdet.datasets import CocoDataset
from torch import Tensor

from apq_mmdet.engine.checkpoint import META_KEY
from apq_mmdet.engine.float_config import build_model, config_files, read_config
from apq_mmdet.engine.options import refuse_overwriting
from apq_mmdet.errors import BadInputError
from apq_mmdet.files import check_target, safe_load, tensor_bytes, write_atomic
from apq_mmdet.layers.base import quantized_layers
from apq_mmdet.layers.state import VERSION_KEY

MICROSOFT, MMDET2 = "Microsoft's Swin-Transformer-Object-Detection", "mmdet 2.x"
HEADS = ("rpn_head", "roi_head", "bbox_head", "mask_head", "semantic_head", "segm_head", "panoptic_head")
PARTS = ("backbone", "neck", *HEADS)
# what mmdet 3 built anew, with other keys: the DETR family and the MaskFormers
REBUILT = ("bbox_head.transformer.", "panoptic_head.")
COCO_CLASSES = 80

# Microsoft's Swin, key by key; mmdet calls a layer a stage and takes its attention and FFN from wrappers
_BLOCK, _NEW_BLOCK = r"layers\.(\d+)\.blocks\.(\d+)\.", r"stages.\1.blocks.\2."
_SWIN_KEYS = {
    r"patch_embed\.proj\.(\w+)": r"patch_embed.projection.\1",
    r"(patch_embed\.norm\.\w+)": r"\1",
    _BLOCK + r"(norm[12]\.\w+)": _NEW_BLOCK + r"\3",
    _BLOCK + r"attn\.(relative_position_\w+|qkv\.\w+|proj\.\w+)": _NEW_BLOCK + r"attn.w_msa.\3",
    _BLOCK + r"mlp\.fc1\.(\w+)": _NEW_BLOCK + r"ffn.layers.0.0.\3",
    _BLOCK + r"mlp\.fc2\.(\w+)": _NEW_BLOCK + r"ffn.layers.1.\3",
    r"layers\.(\d+)\.downsample\.(norm|reduction)\.(\w+)": r"stages.\1.downsample.\2.\3",
    r"(norm\d\.\w+)": r"\1",
}
_TABLE, _INDEX = "relative_position_bias_table", "relative_position_index"


class NothingToConvertError(BadInputError):
    """A checkpoint is one of mmdet 3."""


@dataclass(frozen=True)
class Conversion:
    """A checkpoint for mmdet 3, and what became of its source; each source key is in ``names`` or in ``dropped``.

    Args:
        kind: MICROSOFT or MMDET2.
        state: the weights under mmdet 3's keys.
        meta: ``dataset_meta`` with the class names, where they are known, and the kind.
        names: source key -> key in ``state``.
        dropped: source key -> why nothing of it is left.
        derived: keys in ``state`` that the source did not have.
        left: entries of the file beside weights and meta (optimizer, ...), not carried over.
    """

    kind: str
    state: OrderedDict[str, Tensor]
    meta: dict[str, Any]
    names: dict[str, str]
    dropped: dict[str, str]
    derived: list[str]
    left: list[str]

    def summary(self) -> str:
        """What became of the keys, one line each way."""
        what = Counter(_what_happened(*pair) for pair in self.names.items())
        what += Counter(f"dropped ({reason})" for reason in self.dropped.values())
        lines = [f"a detector of {self.kind}, {len(self.names) + len(self.dropped)} keys"]
        lines += [f"{count:>6} {fate}" for fate, count in what.items()]
        if self.derived:
            lines.append(f"{len(self.derived):>6} added ({_INDEX}, which the file lacks)")
        classes = self.meta.get("dataset_meta", {}).get("classes", ())
        shown = [*map(str, classes[:3]), *(["..."] if len(classes) > 3 else [])]
        lines.append(f"class names: {len(classes)} ({', '.join(shown)})" if classes else "class names: unknown")
        if self.left:
            lines.append(f"not carried over: {', '.join(self.left)}")
        return "\n".join(lines)


def convert_file(source: str, target: Path, config: str | None = None) -> Conversion:
    """Convert a checkpoint and write it; nothing is written where anything is wrong.

    Args:
        source: checkpoint to read.
        target: checkpoint to write; loads with ``weights_only=True``.
        config: config of the float detector that the result must fit, key by key and shape by shape.

    Raises:
        BadInputError: no checkpoint of a kind that is converted here, one that does not fit the config, or a target
            that is the source or the config.
    """
    check_target(target)
    conversion = convert(safe_load(source), source)
    if target.exists() and target.samefile(source):
        raise BadInputError(f"{target} is the source itself; name another file to write")
    if config:
        refuse_overwriting([target], config_files(read_config(config)), "DST")
        check_against(config, conversion.state, source)
    write_atomic(target, tensor_bytes({"meta": conversion.meta, "state_dict": conversion.state}))
    return conversion


def convert(content: Any, path: str) -> Conversion:
    """Convert what a checkpoint file holds.

    Args:
        content: of the file.
        path: of the file, for messages.

    Raises:
        BadInputError: not of a kind that is converted here, a key that is not known, or two keys for one.
    """
    state = _weights(content, path)
    meta = content.get("meta") if "state_dict" in content else None
    meta = meta if isinstance(meta, dict) else {}
    kind = _kind(state, meta, path)
    converted: OrderedDict[str, Tensor] = OrderedDict()
    names: dict[str, str] = {}
    dropped: dict[str, str] = {}
    for source, value in state.items():
        key = _plain(source)
        if reason := _why_dropped(key):
            dropped[source] = reason
            continue
        target = _swin_name(key, path) if kind == MICROSOFT and key.startswith("backbone.") else key
        if target in converted:
            raise BadInputError(f"checkpoint {path}: {source!r} and another key both become {target!r}")
        names[source] = target
        reorder = kind == MICROSOFT and ".downsample." in target
        if reorder and (not value.dim() or value.shape[-1] % 4):
            raise BadInputError(
                f"checkpoint {path}: {source!r} is not of four patches, its shape is {list(value.shape)}"
            )
        converted[target] = merged_by_channel(value) if reorder else value
    derived = _complete_position_indices(converted, path)
    version = meta.get("mmdet_version")
    origin = f"{kind} (mmdet {version})" if version else kind
    new_meta = {"converted_from": origin, **_dataset_meta(meta, converted)}
    left = [key for key in content if key not in ("state_dict", "meta")] if "state_dict" in content else []
    return Conversion(kind, converted, new_meta, names, dropped, derived, left)


def merged_by_channel(value: Tensor) -> Tensor:
    """Re-order weights of patch merging from Microsoft's order of its inputs to that of mmdet.

    The four patches that are merged are concatenated by Microsoft as (column, row, channel), and by the ``nn.Unfold``
    of mmdet as (channel, row, column).

    Args:
        value: (..., 4 * channels), of the norm or of the reduction.
    """
    return value.unflatten(-1, (2, 2, -1)).transpose(-1, -3).flatten(-3)


def position_index(window: int) -> Tensor:
    """(window ** 2, window ** 2) rows of the table of biases for each query and key of a window, int64."""
    row, column = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
    rows, columns = (part.flatten()[:, None] - part.flatten()[None, :] + window - 1 for part in (row, column))
    return rows * (2 * window - 1) + columns


def check_against(config: str, state: OrderedDict[str, Tensor], path: str) -> None:
    """Load a state strictly into the model of a config.

    Raises:
        BadInputError: the config builds no float model, or the state does not fit it; keys and shapes are named.
    """
    cfg = read_config(config)
    model = build_model(cfg)
    if any(True for _ in quantized_layers(model)):
        raise BadInputError(f"config {config} quantizes its model; give the config of the float detector")
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:]]
        shown = [line if len(line) < 300 else line[:300] + " ..." for line in lines[:5]]
        more = [f"and {len(lines) - len(shown)} more"] if len(lines) > len(shown) else []
        raise BadInputError("\n  ".join([f"checkpoint {path} does not fit config {config}:", *shown, *more])) from error


def _plain(key: str) -> str:
    """A key without the prefix that distributed training leaves."""
    return key.removeprefix("module.")


def _weights(content: Any, path: str) -> dict[str, Tensor]:
    """The state_dict of a checkpoint, also where it lies under ``model`` (classification) or bare."""
    state = content
    if isinstance(content, dict):
        state = content.get("state_dict", content.get("model", content))
    weights = isinstance(state, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items())
    if not weights or not state:
        raise BadInputError(f"{path} is no checkpoint of a detector: it holds no state_dict")
    return state


def _kind(state: dict[str, Tensor], meta: dict[str, Any], path: str) -> str:
    """MICROSOFT or MMDET2, or a refusal that says what the file is instead."""
    if VERSION_KEY in state or META_KEY in meta:
        raise BadInputError(f"checkpoint {path} is already quantized, by apq_mmdet; its float original is converted")
    keys = [_plain(key) for key in state]
    parts = {key.split(".")[0] for key in keys if not key.startswith("ema_")}
    of_mmdet3 = "mmengine_version" in meta
    if not of_mmdet3 and any(key.startswith(REBUILT) for key in keys):
        raise BadInputError(
            f"checkpoint {path} holds a detector of the DETR or MaskFormer family, whose keys mmdet 3 changed; "
            "take the weights that mmdet 3's model zoo lists for it"
        )
    if "backbone" not in parts or not parts.intersection(HEADS):
        raise BadInputError(
            f"checkpoint {path} holds no detector of mmdet but {', '.join(sorted(parts)[:5])}; a classifier or a bare "
            "backbone is what mmdet trains a detector from (init_cfg of its backbone)"
        )
    of_mmdet2 = any(key in meta for key in ("mmdet_version", "mmcv_version", "CLASSES")) or any(map(_why_dropped, keys))
    of_microsoft = "backbone.patch_embed.proj.weight" in keys and any(k.startswith("backbone.layers.") for k in keys)
    if of_mmdet3 or not (of_mmdet2 or of_microsoft):
        raise NothingToConvertError(
            f"checkpoint {path} has the keys of mmdet 3 already: nothing has to be done, use it as it is"
        )
    if unknown := sorted(parts.difference(PARTS)):
        raise BadInputError(f"checkpoint {path}: unknown part {unknown[0]!r}; known are {', '.join(PARTS)}")
    version = str(meta.get("mmdet_version", ""))
    if version.startswith(("0.", "1.")):
        raise BadInputError(
            f"checkpoint {path} is of mmdet {version}, whose class order differs; mmdet 2.x upgrades it"
        )
    return MICROSOFT if of_microsoft else MMDET2


def _why_dropped(key: str) -> str | None:
    if key.startswith("ema_") and "." not in key:
        return "the EMA hook's copies; mmdet 2.x tests the plain keys"
    if key.endswith(".attn_mask"):
        return "masks of shifted windows, built anew at each forward"
    return None


def _swin_name(key: str, path: str) -> str:
    """A key of Microsoft's backbone as mmdet names it."""
    own = key.removeprefix("backbone.")
    if own == "absolute_pos_embed":
        raise BadInputError(
            f"checkpoint {path} holds {key!r}, which Microsoft's code resizes to each image; mmdet's Swin does not"
        )
    for pattern, name in _SWIN_KEYS.items():
        if match := re.fullmatch(pattern, own):
            return "backbone." + match.expand(name)
    raise BadInputError(f"checkpoint {path}: unknown key {key!r}, of no Swin Transformer (V1)")


def _complete_position_indices(state: OrderedDict[str, Tensor], path: str) -> list[str]:
    """Check the window attentions' position indices, which their tables determine; add and return the missing ones."""
    derived = []
    for table in [key for key in state if key.startswith("backbone.stages.") and key.endswith(_TABLE)]:
        key = table.removesuffix(_TABLE) + _INDEX
        window = (math.isqrt(len(state[table])) + 1) // 2
        index = position_index(window)
        if (2 * window - 1) ** 2 != len(state[table]) or not torch.equal(state.get(key, index), index):
            raise BadInputError(f"checkpoint {path}: {key!r} is not the one of square windows in mmdet's order")
        if key not in state:
            derived.append(key)
            state[key] = index
    return derived


def _dataset_meta(meta: dict[str, Any], state: dict[str, Tensor]) -> dict[str, Any]:
    """Class names and colours of the source; COCO's where it has none and its box head has 80 classes."""
    known: dict[str, Any] = {}
    if isinstance(meta.get("CLASSES"), list | tuple):
        known["classes"] = tuple(str(name) for name in meta["CLASSES"])
        with contextlib.suppress(TypeError, ValueError):  # none, or no colours
            known["palette"] = [tuple(int(part) for part in colour) for colour in meta.get("PALETTE")]
    else:
        boxes = [len(value) - 1 for key, value in state.items() if key.endswith(".fc_cls.bias")]  # + background
        known = dict(CocoDataset.METAINFO) if set(boxes) == {COCO_CLASSES} else {}
    return {"dataset_meta": known} if known else {}


def _what_happened(source: str, target: str) -> str:
    if _plain(source) == target:
        return "unchanged"
    return "renamed and re-ordered (patch merging)" if ".downsample." in target else "renamed"
