"""The training program anchorops-train."""

IGNORED = -1  # the label of ignored pixels: never a class, for any number of classes
MULTIPLE = 32  # the coarsest stride of the networks: image sides are multiples of it
