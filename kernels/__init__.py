"""Triton kernels. Import them lazily, because CPU builds of torch do not include Triton.

To read those of logits in the order of the data: logits are upsampled in the cells of lanes
(upsampling.py), labels and maps belong to the same lanes (lanes.py), then come exponentials
(exponentials.py), their sums (softmax.py), losses and their slopes (loss_options.py), and the
gradients of logits (upsampling_transposed.py). All of this is used by softmax_moments.py and by the
other operators of pixels. Those of features need the key of each pixel (class_keys.py,
split_groups.py, tile_keys.py), views and tiles of features (features.py), or labels around a
feature (splat.py). constants.py and launch.py are for all.
"""
