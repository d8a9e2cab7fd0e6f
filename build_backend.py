"""setuptools' build backend, which compiles with the torch that is already installed.

If torch were named in `build-system.requires`, every isolated build would download it again, and
compile with a version that differs from the user's.
"""

import sysconfig
from importlib.metadata import distributions

from setuptools import build_meta
from setuptools.build_meta import (  # noqa: F401
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)


def _missing_torch() -> list[str]:
    for torch in distributions(name="torch", path=[sysconfig.get_path("purelib")]):
        if tuple(map(int, torch.version.split(".")[:2])) >= (2, 10):
            return []
    return ["torch>=2.10"]


def get_requires_for_build_wheel(config_settings=None):
    return build_meta.get_requires_for_build_wheel(config_settings) + _missing_torch()


def get_requires_for_build_editable(config_settings=None):
    return build_meta.get_requires_for_build_editable(config_settings) + _missing_torch()
