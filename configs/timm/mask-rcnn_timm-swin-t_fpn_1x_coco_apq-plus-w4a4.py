# The same at 4 bits; images keep 8, as the recipe has it for mmdet's patch embedding, which has another name.
_base_ = "./mask-rcnn_timm-swin-t_fpn_1x_coco_apq-plus-w8a8.py"

model = dict(quant=dict(w_bits=4, a_bits=4, formats=dict(patch_embed=dict(pattern="*patch_embed.proj"))))
