"""Counts the memory of a computation on fake tensors: which storages exist at each time."""

import contextlib
import functools
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from anchorops._ops.volumes import SLAB


class Made(NamedTuple):
    """A storage, the operator that made it, and the first tensor in it."""

    bytes: int
    phase: str
    operator: str
    shape: tuple[int, ...]
    dtype: str


class Storages(TorchDispatchMode):
    """Logs every storage that operators make, and when it is freed.

    made: all storages. log: i + 1 where made[i] appears, −i − 1 where it is freed. Set `phase` to
    mark the storages that are made from then on.
    """

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Made] = []
        self.log: list[int] = []
        self.phase = ""
        self._alive: dict[int, int] = {}  # address of a storage: its index in made
        self._references: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.add.Tensor and _accumulates(args[0]):
            return args[0]
        result = func(*args, **(kwargs or {}))
        name = func.name().removeprefix("aten::")
        if func.namespace == "anchorops":
            first = len(self.made)
            for size in workspace(func, args):
                self._add(Made(size, self.phase, f"workspace of {name}", (), "uint8"))
            self.log += [-1 - i for i in range(first, len(self.made))]
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.see(tensor, name)
        return result

    def see(self, tensor: Tensor, operator: str) -> int:
        """The index of a tensor's storage, which is added if it is new."""
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address not in self._alive:
            self._alive[address] = len(self.made)
            free = functools.partial(self._free, address)
            self._references[address] = weakref.ref(storage, free)
            dtype = str(tensor.dtype).removeprefix("torch.")
            self._add(Made(storage.nbytes(), self.phase, operator, tuple(tensor.shape), dtype))
        return self._alive[address]

    def _add(self, made: Made) -> None:
        self.made.append(made)
        self.log.append(len(self.made))

    def _free(self, address: int, _: object) -> None:
        del self._references[address]
        self.log.append(-1 - self._alive.pop(address))

    def bytes_alive(self) -> np.ndarray:
        """The number of bytes after each entry of the log."""
        return self._sums([made.bytes for made in self.made])

    def by_image(self, batch: int) -> tuple[np.ndarray, np.ndarray]:
        """After each entry of the log, the bytes that any batch needs, and those of one image.

        batch: the number of images of this count; a prime that divides no other size of a tensor.
        Then a storage contains the images exactly if the batch divides its size.
        """
        per_image = [made.bytes // batch * (made.bytes % batch == 0) for made in self.made]
        fixed = [made.bytes * (made.bytes % batch != 0) for made in self.made]
        return self._sums(fixed), self._sums(per_image)

    def _sums(self, sizes: list[int]) -> np.ndarray:
        log = np.array(self.log)
        return np.cumsum(np.sign(log) * np.array(sizes)[np.abs(log) - 1])

    def alive_after(self, entry: int) -> list[int]:
        """The storages that exist after an entry of the log."""
        alive: set[int] = set()
        for number in self.log[: entry + 1]:
            (alive.add if number > 0 else alive.remove)(abs(number) - 1)
        return sorted(alive)


def largest_batch(capacity: int, fixed: np.ndarray, per_image: np.ndarray) -> int:
    """The most images with which no time of a step needs more bytes than the capacity."""
    grows = per_image > 0
    return max(int(((capacity - fixed)[grows] // per_image[grows]).min()), 0)


def _accumulates(gradient: Tensor) -> bool:
    """Whether this is a sum in the backward pass to which nobody else refers. Autograd then adds in
    place, but never to a fake tensor."""
    if torch._C._current_graph_task_id() < 0 or torch.is_grad_enabled():
        return False
    storage = gradient.untyped_storage()._cdata
    return gradient._use_count() <= 4 and torch._C._storage_Use_Count(storage) <= 2  # pyright: ignore


MULTIPROCESSORS = 132  # of an H100 or H200; a smaller GPU needs less


def workspace(func: Any, args: Sequence[Any]) -> tuple[int, ...]:
    """What an operator of ours allocates on a GPU in addition to its results, which are all that
    fake tensors show: limits of the bytes that any batch needs, and of those that grow with the
    images. They are those of the backend that `auto` takes, and are in docs/how-it-works.md."""
    name, x = func._schema.name.removeprefix("anchorops::"), args[0]
    if name.startswith("softmax_moments") and x.shape[2:] == args[1].shape[1:]:  # of triton
        return () if "backward" in name else (16 << 20, x.numel() * x.element_size() // 8)
    if name.startswith(("softmax_moments", "volume_moments")):
        partials = MULTIPROCESSORS << 18
        if name.startswith("volume_moments"):  # float32: a slab and its gradient, four slices
            slices = max(x[0, :, 0].numel(), SLAB // args[1].shape[1])
            partials += 8 * max(SLAB, slices) + 16 * slices
        return partials, 8 * (x.numel() // x.shape[1]) + x.numel() // 16
    if name == "class_moments":
        return 16 << 20, x.numel() * x.element_size() // 4
    if name == "upsampled_sums":
        return 10 << 20, 4 * len(x) * x.shape[1] * (args[3] + 3)
    if name == "split_groups":
        return 24 * args[1].numel(), 12 * x.numel()
    if name == "centroid_info_nce":  # two numbers of each row and 32 keys
        return (8 * x[..., 0].numel() * (len(args[1]) // 32 + 2), 0)
    if name in (
        "class_keys",
        "class_moments_backward",
        "upsampled_sums_backward",
        "centroid_info_nce_backward",
    ):
        return ()
    raise NotImplementedError(f"the workspace of {name} is not known")


def _fake(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype)


def make_fake(module: nn.Module) -> None:
    """Replace parameters and buffers by fake ones. Call it inside FakeTensorMode."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                fake = nn.Parameter(_fake(parameter), parameter.requires_grad)
                part._parameters[name] = fake
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = _fake(buffer)


# Autograd does not run on fake tensors on "cuda" where there is no GPU. So they are on "cpu", and
# where PyTorch computes with other tensors on CUDA, it does so here too. Operators that autocast
# runs in float32 on CUDA and not on the CPU, of those that networks and losses call; and the
# opposite, with those that it gives the widest dtype.
FLOAT32_ON_CUDA = (
    *("softmax.int", "log_softmax.int", "layer_norm", "native_layer_norm", "group_norm"),
    *("upsample_bilinear2d", "upsample_trilinear3d", "upsample_nearest2d", "upsample_nearest3d"),
    *("sum", "sum.dim_IntList", "cumsum", "linalg_vector_norm", "logsumexp", "exp", "log"),
    *("pow.Tensor_Scalar", "pow.Tensor_Tensor", "rsqrt", "reciprocal"),
)
CAST_ON_CPU = (
    *("cross_entropy_loss", "cat", "stack", "index_copy", "avg_pool3d", "max_pool3d"),
    *("adaptive_avg_pool3d", "adaptive_max_pool3d", "reflection_pad2d", "replication_pad2d"),
)


def _to_float32(x: Tensor) -> Tensor:
    return x.float() if x.is_floating_point() and x.dtype != torch.float64 else x


def _in_float32(operator: Any) -> Any:
    """Autocast's kernel of an operator: it casts to float32, or passes dtype=float32."""
    has_dtype = any(argument.name == "dtype" for argument in operator._schema.arguments)
    here = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)

    def kernel(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(here):
            if has_dtype:
                dtype = kwargs.pop("dtype", None) or next(
                    (x for x in args if isinstance(x, torch.dtype)), torch.float32
                )
                args = tuple(x for x in args if not isinstance(x, torch.dtype))
                return operator(*args, **kwargs, dtype=dtype)
            return operator(*tree_map_only(Tensor, _to_float32, args), **kwargs)

    return kernel


def _dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """On CUDA the mask is bool; on the CPU it has the dtype of x."""
    return torch.native_dropout(x, p, True)[0] if training and p > 0 else x


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any
) -> Tensor:
    """Memory-efficient attention. The bias is padded to multiples of 16 and expanded."""
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = (x.to(dtype) for x in (query, key, value))
        attn_mask = None if attn_mask is None else attn_mask.to(dtype)
    if attn_mask is not None:
        keys = key.shape[2]
        padded = F.pad(attn_mask, (0, -keys % 16))[..., :keys]
        attn_mask = padded.expand(*query.shape[:3], keys)
    operator = torch.ops.aten._scaled_dot_product_efficient_attention
    assert not options.pop("enable_gqa", False)
    return operator(query, key, value, attn_mask, True, **options)[0]


@contextlib.contextmanager
def as_on_cuda() -> Iterator[None]:
    """Autocast, dropout and attention use the dtypes and tensors that they use on CUDA. It is for
    fake tensors alone: some of these operators do not run on the CPU."""
    library = torch.library.Library("aten", "IMPL")
    for name in FLOAT32_ON_CUDA:
        packet, _, overload = name.partition(".")
        operator = getattr(getattr(torch.ops.aten, packet), overload or "default")
        library.impl(name, _in_float32(operator), "AutocastCPU")
    for name in CAST_ON_CPU:
        library.impl(name, torch.library.fallthrough_kernel, "AutocastCPU")
    replaced = {"dropout": _dropout, "scaled_dot_product_attention": _attention}
    try:
        with mock.patch.multiple(F, **replaced):
            yield
    finally:
        library._destroy()
