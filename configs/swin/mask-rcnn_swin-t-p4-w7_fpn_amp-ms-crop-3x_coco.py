# mmdet's Mask R-CNN with Swin-T, trained for 36 epochs at several scales.
_base_ = "mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_amp-ms-crop-3x_coco.py"
