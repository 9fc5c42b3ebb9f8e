"""Small timm models that the tests share."""

from torch import nn

from apq_mmdet.models.timm_import import import_timm

timm = import_timm()

SWIN = dict(
    model_name="swin_tiny_patch4_window7_224",
    embed_dim=16,
    depths=(2, 1),
    num_heads=(2, 4),
    always_partition=True,
    dynamic_img_size=True,
)
VIT = dict(model_name="vit_tiny_patch16_224", embed_dim=16, depth=2, num_heads=2, dynamic_img_size=True)
DEIT = dict(VIT, model_name="deit_tiny_distilled_patch16_224")
MODELS = {"swin": SWIN, "vit": VIT, "deit": DEIT}


def build(name: str, **settings) -> nn.Module:
    """A small model without a classifier, with random weights and biases, in eval mode."""
    model = timm.create_model(**{**MODELS[name], "num_classes": 0, **settings})
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()
