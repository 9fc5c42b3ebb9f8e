# Cascade Mask R-CNN with Swin-T, its backbone quantized by the recipe `apq_plus` to 8 bits.
_base_ = ["./cascade-mask-rcnn_swin-t-p4-w7_fpn_4conv1fc-giou-ms-crop-3x_coco.py", "../_base_/recipes/apq_plus.py"]

model = dict(type="apq_mmdet.CascadeRCNN", quant={{_base_.quant}})
