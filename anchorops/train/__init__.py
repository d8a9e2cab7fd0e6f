"""The training program: HRNet, SegFormer and any segmentation-models-pytorch architecture."""
