# The demo Cascade Mask R-CNN, its backbone quantized by the recipe `apq` to 8 bits.
_base_ = ["./cascade-mask-rcnn_swin-demo.py", "../_base_/recipes/apq.py"]

model = dict(type="apq_mmdet.CascadeRCNN", quant={{_base_.quant}})
