# The same at 4 bits.
_base_ = "./cascade-mask-rcnn_swin-b-p4-w7_fpn_4conv1fc-giou-ms-crop-3x_coco_apq-plus-w8a8.py"

model = dict(quant=dict(w_bits=4, a_bits=4))
