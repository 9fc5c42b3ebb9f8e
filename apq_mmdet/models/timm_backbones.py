"""timm's Swin, ViT and DeiT as backbones of mmdet's detectors."""

import difflib
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch.nn.functional as F
from mmengine.model import BaseModule
from torch import Tensor

from apq_mmdet.errors import BadInputError
from apq_mmdet.models.timm_import import import_timm
from apq_mmdet.registry import MODELS

SWIN, VIT, DEIT = (f"timm.models.{name}" for name in ("swin_transformer", "vision_transformer", "deit"))
# module of timm that defines a family -> arguments that let its models take images of any size. Without
# `always_partition` a Swin's last stage, one window of its classification images, would never shift.
FAMILIES = {
    SWIN: dict(dynamic_img_size=True, always_partition=True),
    VIT: dict(dynamic_img_size=True),
    DEIT: dict(dynamic_img_size=True),
}


@MODELS.register_module()
class TimmBackbone(BaseModule):
    """Feature maps of a Swin, ViT or DeiT of timm, in float; ``quant`` of the detector makes it a quantized one.

    Images are padded with zeros on the right and at the bottom to a multiple of the largest stride. Inside, timm pads
    the maps of a Swin to whole windows, and it interpolates the position embeddings of a ViT to the image's patches.
    The head and the last norm of the classifier are left out, so no map is normalised, as with timm's
    ``features_only``.

    Args:
        model_name: timm's: 'swin_tiny_patch4_window7_224', 'vit_small_patch16_224', 'deit_small_patch16_224', ...
        out_indices: of the stages of a Swin or the blocks of a ViT, negative ones from the end; by default all stages
            and the last block.
        pretrained: take timm's weights, which downloads them, when mmengine initialises the weights for training. A
            detector that is only tested has its weights in its own checkpoint.
        checkpoint_path: the same with a classifier's checkpoint on disk.
        init_cfg: mmengine's.
        model_args: arguments of the model that differ from what its name stands for, such as ``drop_path_rate``.

    Raises:
        BadInputError: timm is not installed, it knows no such model, the model is of another family, or arguments or
            indices do not fit.
    """

    def __init__(
        self,
        model_name: str,
        out_indices: Sequence[int] | None = None,
        pretrained: bool = False,
        checkpoint_path: str | None = None,
        init_cfg: dict[str, Any] | list[dict[str, Any]] | None = None,
        **model_args: Any,
    ) -> None:
        super().__init__(init_cfg)
        timm = import_timm()
        family = _family(timm, model_name)
        self.model_args = dict(model_name=model_name, **{**FAMILIES[family], **model_args})
        self.weights = dict(pretrained=pretrained, checkpoint_path=checkpoint_path)
        default = None if family == SWIN else 1  # timm's words for all stages and for the last block
        wanted = default if out_indices is None else list(out_indices)
        try:
            self.model = timm.create_model(**self.model_args)
            self.out_indices = self.model.prune_intermediate_layers(wanted, prune_norm=True)
        except Exception as error:  # models refuse arguments in any way
            raise BadInputError(f"timm model {model_name!r}, {model_args}, out_indices={wanted}: {error}") from error
        self.stride = max(self.model.feature_info[index]["reduction"] for index in self.out_indices)
        self.model.is_init = True  # by timm; mmengine would call timm's init_weights again

    def init_weights(self) -> None:
        """As mmengine's, after the pretrained weights, where they are asked for."""
        if not self.is_init and any(self.weights.values()):
            classifier = import_timm().create_model(**self.model_args, **self.weights).state_dict()
            own = self.model.state_dict().keys()
            self.model.load_state_dict({key: classifier[key] for key in classifier if key in own}, strict=False)
        super().init_weights()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """[B, 3, H, W] -> maps [B, C, H / stride, W / stride], where H and W are rounded up to the largest stride."""
        height, width = x.shape[2:]
        x = F.pad(x, (0, -width % self.stride, 0, -height % self.stride))
        return tuple(self.model.forward_intermediates(x, self.out_indices, intermediates_only=True))


def _family(timm: ModuleType, model_name: str) -> str:
    name = model_name.partition(".")[0]  # without the tag of its weights
    known = timm.list_models()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        raise BadInputError(f"timm knows no model {model_name!r}" + "".join(f"; did you mean {n!r}?" for n in near))
    family = timm.models.model_entrypoint(name).__module__
    if family not in FAMILIES:
        raise BadInputError(f"timm model {model_name!r} is no Swin, ViT or DeiT, but of {family}")
    return family
