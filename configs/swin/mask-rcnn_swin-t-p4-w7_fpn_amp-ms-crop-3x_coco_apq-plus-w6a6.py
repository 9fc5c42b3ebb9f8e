# The same at 6 bits.
_base_ = "./mask-rcnn_swin-t-p4-w7_fpn_amp-ms-crop-3x_coco_apq-plus-w8a8.py"

model = dict(quant=dict(w_bits=6, a_bits=6))
