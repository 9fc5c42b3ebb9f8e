# The same at 4 bits.
_base_ = "./mask-rcnn_timm-vit-s_simple-fpn_1x_coco_apq-plus-w8a8.py"

model = dict(quant=dict(w_bits=4, a_bits=4))
