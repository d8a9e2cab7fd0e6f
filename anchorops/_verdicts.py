"""The verdicts of `anchorops-doctor --verify`: which operators of a backend are right on a device.

They are kept in the user's cache, each for the versions of anchorops, torch, Triton and the driver
with which it was found. The file is read once, when anchorops is imported.
"""

import contextlib
import json
import logging
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

import torch

OPERATORS = (
    "class_moments",
    "softmax_moments",
    "pixel_kl_divergence",
    "pixel_argmax",
    "confusion",
    "centroid_info_nce",
    "upsampled_sums",
    "split_groups",
    "kth_largest",
)
ON_GPU = ("cuda", "triton")
VERIFY = "anchorops-doctor --verify"

_logger = logging.getLogger("anchorops")
_FIELDS = ("anchorops", "torch", "triton", "driver", "device", "backend")
_Key = tuple[str, ...]  # the values of these fields
_version = ""  # of anchorops
_records: dict[_Key, dict[str, bool]] = {}  # for each operator, whether it is right
_here: dict[tuple[str, torch.device], dict[str, bool] | None] = {}  # those of this machine
_told: set[tuple[str, bool] | str] = set()  # what was said in this process
_ignored = False


def path() -> Path:
    """The file of all verdicts of this user."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache, "anchorops", "verdicts.json")


def load(version: str) -> None:
    """Read the verdicts; `version` is that of anchorops. CUDA is not initialised."""
    global _version
    _version = version
    _set(_read())


def _set(records: dict[_Key, dict[str, bool]]) -> None:
    global _records
    _records = records
    _here.clear()


def _read() -> dict[_Key, dict[str, bool]]:
    try:
        return {
            tuple(str(record[field]) for field in _FIELDS): {
                str(operator): right is True for operator, right in record["right"].items()
            }
            for record in json.loads(path().read_text(encoding="utf-8"))
        }
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        _logger.warning("%s cannot be read and is not used: %r", path(), error)
        return {}


def remember(backend: str, device: torch.device, verdicts: dict[str, bool]) -> Path:
    """Write which operators are right, here and with these versions. A former record of the same
    versions is replaced. A file that cannot be written is no error.

    Args:
        verdicts: for each of `OPERATORS` that was checked, whether it is right.

    Returns:
        The file.
    """
    assert set(verdicts) <= set(OPERATORS), verdicts
    file = path()
    _set(_read() | {_key(backend, device): verdicts})
    records = [
        {**dict(zip(_FIELDS, key, strict=True)), "right": right} for key, right in _records.items()
    ]
    temporary = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(records, indent=1), encoding="utf-8")
        os.replace(temporary, file)
    except OSError as error:
        message = "%s cannot be written: the verdict is forgotten when this process ends (%s)"
        _logger.warning(message, file, error)
        with contextlib.suppress(OSError):
            temporary.unlink()
    return file


def wrong(backend: str, device: torch.device) -> frozenset[str]:
    """The operators that were found wrong there."""
    return frozenset(name for name, right in (_record(backend, device) or {}).items() if not right)


def verified(backend: str, device: torch.device) -> bool:
    """Whether this backend was verified there, with these versions."""
    return _record(backend, device) is not None


@contextlib.contextmanager
def ignored() -> Iterator[None]:
    """Nothing is looked up or said inside: for the check itself."""
    global _ignored
    _ignored = True
    try:
        yield
    finally:
        _ignored = False


@torch.compiler.assume_constant_result  # torch.compile calls it, also its warning, when it traces
def found_wrong(
    backend: str, device: torch.device, operators: Sequence[str], used: bool = False
) -> bool:
    """Whether one of these operators was found wrong there. It is said once for each backend, and
    once that a backend was never verified on a GPU.

    used: whether the backend is used all the same.
    """
    if _ignored:
        return False
    if verified(backend, device):
        faults = sorted(wrong(backend, device))
        if not set(operators).intersection(faults):
            return False
        if (backend, used) not in _told:
            _told.add((backend, used))
            names = f"{', '.join(faults)} of the backend {backend} on {device_name(device)}"
            outcome = "It is used" if used else '"auto" takes another backend'
            again = f"{VERIFY} --all" if backend == "triton" else VERIFY
            message = f"{VERIFY} found wrong: {names}. {outcome}; to verify again: {again}"
            warnings.warn(f"anchorops: {message}", stacklevel=2)
        return True
    on_gpu = backend in ON_GPU and device.type == "cuda" and torch.cuda.is_available()
    if on_gpu and "never verified" not in _told:
        _told.add("never verified")
        message = "the backend %s was never verified on %s. It takes minutes: %s"
        _logger.warning(message, backend, device_name(device), VERIFY)
    return False


def device_name(device: torch.device) -> str:
    """The name of the GPU, or "cpu" with its instruction set."""
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_properties(device).name
    return f"{device.type} ({torch.backends.cpu.get_cpu_capability()})"


def _record(backend: str, device: torch.device) -> dict[str, bool] | None:
    if not _records:
        return None
    if (backend, device) not in _here:
        _here[backend, device] = _records.get(_key(backend, device))
    return _here[backend, device]


def _key(backend: str, device: torch.device) -> _Key:
    triton = _triton() if backend == "triton" else ""
    gpu_driver = driver() if device.type == "cuda" else ""
    return _version, str(torch.__version__), triton, gpu_driver, device_name(device), backend


def _triton() -> str:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version("triton")
    return "unknown"


def driver() -> str:
    """The version of the GPUs' driver."""
    for file in ("/proc/driver/nvidia/version", "/sys/module/amdgpu/version"):
        with contextlib.suppress(OSError):
            if match := re.search(r"\d+\.[\d.]+", Path(file).read_text()):
                return match[0]
    return "unknown"
