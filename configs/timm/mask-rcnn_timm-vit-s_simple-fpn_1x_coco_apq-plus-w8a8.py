# Mask R-CNN with timm's ViT-S, its backbone quantized by the recipe `apq_plus` to 8 bits.
_base_ = ["./mask-rcnn_timm-vit-s_simple-fpn_1x_coco.py", "../_base_/recipes/apq_plus.py"]

model = dict(type="apq_mmdet.MaskRCNN", quant={{_base_.quant}})
