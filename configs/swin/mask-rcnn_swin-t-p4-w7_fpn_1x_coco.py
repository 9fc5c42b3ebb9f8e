# mmdet's Mask R-CNN with Swin-T, trained for 12 epochs.
_base_ = "mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py"
