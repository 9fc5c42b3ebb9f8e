"""timm classifiers: built, loaded, measured, and read back from a quantized checkpoint."""

import argparse
import difflib
import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from apq_mmdet.calibration import CalibrationTask, Recipe
from apq_mmdet.engine.checkpoint import CHECKPOINT, META_KEY, float_state
from apq_mmdet.errors import BadInputError, listed
from apq_mmdet.files import accepted_globals, safe_load
from apq_mmdet.layers import quantize_model
from apq_mmdet.layers.convert import leave_float
from apq_mmdet.models.losses import categorical_kl
from apq_mmdet.models.timm_import import import_timm

TOP = 5


class LogitsTask(CalibrationTask):
    """A classifier, by the Kullback-Leibler divergence of its class probabilities; samples are images [1, 3, H, W]."""

    def student(self, model: nn.Module, sample: Tensor, context: None) -> Tensor:
        """As the teacher."""
        return model(sample.to(_device(model)))

    def loss(self, student: Tensor, teacher: Tensor, context: None) -> Tensor:
        """KL(teacher || student), the mean over images."""
        return categorical_kl(student, teacher)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


# -- float models ---------------------------------------------------------------------------------------------


def build_classifier(name: str, model_args: dict[str, Any], pretrained: bool = False) -> nn.Module:
    """A float classifier in eval mode; without ``pretrained`` its weights are random and no network is used.

    Args:
        name: timm's, with or without the tag of its weights: ``vit_small_patch16_224``.
        model_args: arguments of the model that differ from what the name stands for.
        pretrained: let timm download the weights.

    Raises:
        BadInputError: no such model or tag, arguments that do not fit, no class scores, or a failed download.
    """
    timm = import_timm()
    known = timm.list_models()
    if name.partition(".")[0] not in known:
        near = difflib.get_close_matches(name, known, n=1)
        raise BadInputError(f"timm knows no model {name!r}" + "".join(f"; did you mean {other!r}?" for other in near))
    if pretrained and "num_classes" in model_args:
        raise BadInputError("--pretrained: with another num_classes the last layer's weights would be random")
    try:
        model = timm.create_model(name, pretrained=pretrained, **model_args)
    except Exception as error:  # models and downloads can fail in any way
        given = f" with {model_args}" if model_args else ""
        raise BadInputError(f"timm cannot build {name}{given}: {error}") from error
    if not model.num_classes:
        raise BadInputError(f"{name} with {model_args} gives no class scores; num_classes must be at least 1")
    return model.eval()


def load_weights(model: nn.Module, path: str | Path, resample: bool = False) -> None:
    """Load a float checkpoint, all of it or nothing: of timm, of the models' authors, or ``.safetensors``.

    Keys and shapes pass through timm's own conversion of published checkpoints.

    Args:
        model: of timm.
        path: of the checkpoint.
        resample: whether that may make embeddings for other sizes of images, patches or windows.

    Raises:
        BadInputError: unreadable, already quantized, of another architecture, or with NaN weights.
    """
    state = float_state(_read_content(path), path, ("state_dict", "model"))  # of timm and mmengine; of DeiT and Swin
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", lambda state, model: state)
    if "adapt_layer_scale" in inspect.signature(convert).parameters:  # of DeiT III, whose factors have other names
        convert = partial(convert, adapt_layer_scale=True)
    other = f"checkpoint {path} is of another architecture than the model: it"
    shapes = {key: value.shape for key, value in state.items()}
    try:
        converted = convert(state, model)
        resampled = [key for key, value in converted.items() if _is_resampled(shapes.get(key), value.shape)]
        if resampled and not resample:
            raise BadInputError(
                f"{other} has other sizes of {listed(resampled)}; to resample it, name the model's own sizes, one of "
                f"img_size, patch_size and window_size, with --model-args (resample=True from Python)"
            )
        found = model.load_state_dict(converted, strict=False)
    except BadInputError:
        raise
    except Exception as error:  # other shapes, or modules that the model has not: timm's conversions fail in any way
        lines = str(error).splitlines()
        raise BadInputError(f"{other} does not fit: {listed([line.strip() for line in lines[1:] or lines])}") from error
    for what, keys in (("lacks", found.missing_keys), ("holds unknown", found.unexpected_keys)):
        if keys:
            raise BadInputError(f"{other} {what} {listed(keys)}")


def _is_resampled(before: torch.Size | None, after: torch.Size) -> bool:
    """Whether a tensor has other sizes than before; one of another number of axes was only written otherwise."""
    return before is not None and len(before) == len(after) and before != after


def _read_content(path: str | Path) -> Any:
    if not os.path.isfile(path):
        raise BadInputError(f"checkpoint {path} does not exist")
    if str(path).endswith(".safetensors"):
        from safetensors.torch import load_file  # comes with timm, which is optional

        try:
            return load_file(path)
        except Exception as error:  # SafetensorError among others
            raise BadInputError(f"checkpoint {path} cannot be read: {error}") from error
    with accepted_globals([argparse.Namespace]):  # the command line that timm keeps in training checkpoints
        return safe_load(path)


# -- images ---------------------------------------------------------------------------------------------------


def data_config(model: nn.Module, model_args: dict[str, Any]) -> dict[str, Any]:
    """How the model's images are resized, cropped and normalised, by timm's configuration of it.

    Raises:
        BadInputError: the model does not take RGB images.
    """
    size = model_args.get("img_size")
    asked = {} if size is None else {"input_size": (3, *((size, size) if isinstance(size, int) else size))}
    config = import_timm().data.resolve_model_data_config(model, asked)
    channels = model_args.get("in_chans", config["input_size"][0])
    if channels != 3:
        raise BadInputError(f"the model takes images of {channels} channels; only RGB images are read")
    return config


def make_transform(config: dict[str, Any]) -> Callable[[Image.Image], Tensor]:
    """The evaluation transform of a data configuration: an RGB image to [3, H, W]."""
    return import_timm().data.create_transform(**config, is_training=False)


@torch.no_grad()
def evaluate(model: nn.Module, images: Dataset, batch_size: int, workers: int, title: str) -> dict[str, float]:
    """Top-1 and, for more than five classes, top-5 accuracy in percent.

    Args:
        model: maps [B, 3, H, W] to scores [B, classes].
        images: items are ([3, H, W], label).
        batch_size: images that run together.
        workers: processes that read images; 0 reads them in this one.
        title: of the progress bar.
    """
    right = torch.zeros(TOP, dtype=torch.int64)  # images whose label is the 1st, 2nd, ... best class
    loader = DataLoader(images, batch_size, num_workers=workers)
    for x, labels in tqdm(loader, desc=title, unit="batch"):
        scores = model(x.to(_device(model)))  # [B, classes]
        best = scores.topk(min(TOP, scores.shape[1])).indices.cpu()  # [B, up to TOP]
        right[: best.shape[1]] += (best == labels[:, None]).sum(0)
    percent = 100 * right.double() / len(images)
    top1 = {"top1": float(percent[0])}
    return top1 if scores.shape[1] <= TOP else {**top1, "top5": float(percent.sum())}


# -- quantized models -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Classifier:
    """A quantized classifier as it was calibrated.

    Attributes:
        model: maps images [B, 3, H, W] to scores [B, classes]; in eval mode.
        data: timm's data configuration of its images.
        classes: class names in the order of the scores, where they are known.
    """

    model: nn.Module
    data: dict[str, Any]
    classes: list[str] | None

    @property
    def transform(self) -> Callable[[Image.Image], Tensor]:
        """From an RGB image to [3, H, W]."""
        return make_transform(self.data)


def load_classifier(path: str | Path, device: str = "cpu") -> Classifier:
    """The quantized classifier that a run of ``tools/quantize_cls.py`` wrote; its scores are those of that run.

    Number formats of the caller's own have to be imported before.

    Args:
        path: the work dir, or the ``quantized.pth`` in it.
        device: to put the model on.

    Raises:
        BadInputError: no such file, or none of that tool.
        CheckpointError: an incomplete or newer one.
    """
    path = Path(path) / CHECKPOINT if os.path.isdir(path) else Path(path)
    content = safe_load(path)
    meta = content.get("meta") if isinstance(content, dict) else None
    run = meta.get(META_KEY, {}) if isinstance(meta, dict) else {}
    if "data" not in run:
        raise BadInputError(f"{path} is no quantized classifier of tools/quantize_cls.py")
    model = build_classifier(run["model"], run["model_args"])
    quantize_model(model, Recipe.from_dict(run["quant"]).policy)
    leave_float(model, run["left_float"])
    model.load_state_dict(content["state_dict"])
    return Classifier(model.to(device), run["data"], run["classes"])
