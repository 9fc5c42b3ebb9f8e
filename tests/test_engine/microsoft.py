"""Detectors as Swin-Transformer-Object-Detection saves them: keys and shapes, written down from its sources."""

from collections import OrderedDict

import torch

SWIN = {
    "t": dict(embed_dims=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24)),
    "s": dict(embed_dims=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24)),
    "b": dict(embed_dims=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32)),
}


def layer(name, *shape):
    """Weight and bias of one layer."""
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def microsoft_swin(embed_dims, depths, num_heads):
    shapes = layer("patch_embed.proj", embed_dims, 3, 4, 4) | layer("patch_embed.norm", embed_dims)
    for i, (depth, number) in enumerate(zip(depths, num_heads, strict=True)):
        width = embed_dims * 2**i
        for j in range(depth):
            block = f"layers.{i}.blocks.{j}"
            shapes |= layer(f"{block}.norm1", width) | layer(f"{block}.norm2", width)
            shapes |= {f"{block}.attn.relative_position_bias_table": (13 * 13, number)}
            shapes |= {f"{block}.attn.relative_position_index": (49, 49)}
            shapes |= layer(f"{block}.attn.qkv", 3 * width, width) | layer(f"{block}.attn.proj", width, width)
            shapes |= layer(f"{block}.mlp.fc1", 4 * width, width) | layer(f"{block}.mlp.fc2", width, 4 * width)
        if i < len(depths) - 1:
            shapes |= layer(f"layers.{i}.downsample.norm", 4 * width)
            shapes |= {f"layers.{i}.downsample.reduction.weight": (2 * width, 4 * width)}
        shapes |= layer(f"norm{i}", width)
    return {f"backbone.{key}": shape for key, shape in shapes.items()}


def fpn_and_rpn(channels):
    shapes = {}
    for i in range(4):
        shapes |= layer(f"neck.lateral_convs.{i}.conv", 256, channels * 2**i, 1, 1)
        shapes |= layer(f"neck.fpn_convs.{i}.conv", 256, 256, 3, 3)
    shapes |= layer("rpn_head.rpn_conv", 256, 256, 3, 3)
    return shapes | layer("rpn_head.rpn_cls", 3, 256, 1, 1) | layer("rpn_head.rpn_reg", 12, 256, 1, 1)


def mask_head(name):
    shapes = {}
    for i in range(4):
        shapes |= layer(f"{name}.convs.{i}.conv", 256, 256, 3, 3)
    return shapes | layer(f"{name}.upsample", 256, 256, 2, 2) | layer(f"{name}.conv_logits", 80, 256, 1, 1)


def predictors(name):
    return layer(f"{name}.fc_cls", 81, 1024) | layer(f"{name}.fc_reg", 320, 1024)


def mask_rcnn_heads():
    box = "roi_head.bbox_head"
    shapes = layer(f"{box}.shared_fcs.0", 1024, 256 * 49) | layer(f"{box}.shared_fcs.1", 1024, 1024)
    return shapes | predictors(box) | mask_head("roi_head.mask_head")


def cascade_heads():
    """Three heads of four convolutions with SyncBN and one linear layer."""
    shapes = {}
    for stage in range(3):
        box = f"roi_head.bbox_head.{stage}"
        for i in range(4):
            conv = f"{box}.shared_convs.{i}"
            shapes |= {f"{conv}.conv.weight": (256, 256, 3, 3), f"{conv}.bn.num_batches_tracked": ()}
            shapes |= {f"{conv}.bn.{part}": (256,) for part in ("weight", "bias", "running_mean", "running_var")}
        shapes |= layer(f"{box}.shared_fcs.0", 1024, 256 * 49) | predictors(box)
        shapes |= mask_head(f"roi_head.mask_head.{stage}")
    return shapes


def index_by_hand(window=7):
    """Row of the bias table for each pair of a window's positions: their distance down, then their distance right."""
    places = [(row, column) for row in range(window) for column in range(window)]
    span = 2 * window - 1
    return torch.tensor([[(a - c + window - 1) * span + b - d + window - 1 for c, d in places] for a, b in places])


def microsoft_detector(size, heads):
    """State of a Mask R-CNN ("mask") or Cascade Mask R-CNN ("cascade"); its tensors take no memory."""
    shapes = microsoft_swin(**SWIN[size]) | fpn_and_rpn(SWIN[size]["embed_dims"])
    shapes |= cascade_heads() if heads == "cascade" else mask_rcnn_heads()
    special = {"relative_position_index": index_by_hand(), "num_batches_tracked": torch.tensor(7)}
    return OrderedDict((k, special.get(k.split(".")[-1], torch.ones(()).expand(s))) for k, s in shapes.items())


def as_microsoft(state):
    """The demo detector as Microsoft's code would have saved it; inputs of merged patches are moved one by one."""
    old = OrderedDict()
    for key, value in state.items():
        name = key
        if key.startswith("backbone."):
            for new, original in (
                (".stages.", ".layers."),
                (".attn.w_msa.", ".attn."),
                (".ffn.layers.0.0.", ".mlp.fc1."),
                (".ffn.layers.1.", ".mlp.fc2."),
                ("patch_embed.projection", "patch_embed.proj"),
            ):
                name = name.replace(new, original)
        if ".downsample." in name:
            channels = value.shape[-1] // 4
            moved = torch.empty_like(value)
            for channel in range(channels):
                for place, (row, column) in enumerate([(0, 0), (1, 0), (0, 1), (1, 1)]):
                    moved[..., place * channels + channel] = value[..., channel * 4 + row * 2 + column]
            value = moved
        old[name] = value
    return old
