# The demo Mask R-CNN, its backbone quantized by the recipe `apq` to 8 bits.
_base_ = ["./mask-rcnn_swin-demo.py", "../_base_/recipes/apq.py"]

model = dict(type="apq_mmdet.MaskRCNN", quant={{_base_.quant}})
