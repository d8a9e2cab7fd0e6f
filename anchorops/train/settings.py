"""Named sets of arguments of the methods, for `--setting NAME`."""

from collections.abc import Mapping, Sequence

PUBLISHED = "published"  # the methods' own defaults

# The published weights of OCCL and CeCo are for a backbone from ImageNet. With random weights their
# gradient on the features is several times that of the cross-entropy (docs/methods.md).
SETTINGS: Mapping[str, Mapping[str, str]] = {
    PUBLISHED: {},
    "from-scratch": {
        "occl.centroid_weight": "0.1",
        "occl.category_weight": "0.03",
        "ceco.loss_weight": "0.2",
    },
}


def setting_options(setting: str, methods: Sequence[str]) -> dict[str, str]:
    """METHOD.ARGUMENT and its value, for the chosen methods."""
    options = SETTINGS[setting].items()
    return {name: value for name, value in options if name.partition(".")[0] in methods}
