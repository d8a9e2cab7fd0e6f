"""`late_upsampling`: 1×1 convolutions run before the upsampling of their input."""

from typing import Any

from torch import nn

from .._checks import fail
from .changed import Handle, Plans, check_model
from .late_search import find


class LateUpsampling(Handle):
    """The result of `late_upsampling`. `remove()` restores the order of the model's calls."""

    @property
    def moved(self) -> list[str]:
        """A line for each convolution that runs before the upsampling, with its name."""
        return [*self._found]

    def __repr__(self) -> str:
        return f"late_upsampling of {type(self._model).__name__}: {'; '.join(self.moved)}"


def late_upsampling(model: nn.Module, *args: Any, **kwargs: Any) -> LateUpsampling:
    """Upsample after a model's 1×1 convolutions instead of before, where this is exactly the same:

        ao.late_upsampling(model, images)

    Heads of segmentation networks upsample maps, join them with torch.cat and apply a 1×1
    convolution. Upsampling is linear in space and the same for each channel, the convolution
    linear in the channels and the same at each pixel. So they commute:

        conv(cat(up(x_1), …, up(x_n))) = Σ_i up(conv_i(x_i))

    Where x_i is a linear layer M_i of tokens without an activation, as in SegFormer, the weights
    are multiplied: conv_i(x_i) = (W_i·M_i)·f_i. The parameters and their names do not change, nor
    do outputs and gradients, except by rounding: the products of weights are computed in float32
    at least, also under autocast.

    Dry runs as those of `low_resolution`, in both modes, find the calls of F.interpolate, in any
    mode, whose results only a convolution with kernel 1, stride 1, no padding and one group reads,
    directly or through torch.cat along the channels. After that these calls run later; maps that
    are upsampled under torch.no_grad, as those of a frozen network, are detached. A map is left as
    it is where the convolution has so many outputs that upsampling them takes longer, and a
    convolution where less than a quarter of its multiplications is saved. On a GPU upsampling takes
    as long as more multiplications, so fewer maps are moved: call it when the model is on the
    device where it will run (each but the CPU counts as a GPU).

    In every forward, the layers that would see a map that is not computed are checked: if one got a
    hook (as by attach), a forward or a compilation of its own, or another class (by an adapter, a
    parametrisation, quantisation or FSDP), the module around it runs as before. A forward with
    other calls than the dry run raises a RuntimeError. So does one that reads or keeps such a map,
    a checkpoint that begins between the upsampling and the convolution, and a graph break of
    torch.compile there.

    Call it as early as `low_resolution`, before or after it and `attach`, and again after layers of
    PEFT were added or merged. The convolution's result is a plain tensor, even where its input is
    of a subclass. If only an extension, or a hook of all modules, reads an upsampled map, without
    torch's functions, this is not detected.

    Args:
        model: any model.
        args, kwargs: the arguments of one forward, such as `images`; any batch, and an image size
            like those of training: the ratio of the sizes decides what is worth moving.

    Returns:
        LateUpsampling, with `moved` and `remove()`. A record of the logger "anchorops" names what
        was moved.

    Raises:
        ValueError: nothing can be moved; the message says what reads the upsampled maps (in a
            U-Net 3×3 convolutions, which do not commute). Also: the model is wrapped or cannot be
            copied; late_upsampling was called twice.
    """
    model = check_model("late_upsampling", model, args, kwargs)
    training, evaluation = (find(model, args, kwargs, mode) for mode in (True, False))
    if not (training.plans or evaluation.plans):
        expected = "a 1×1 convolution that alone reads upsampled maps, directly or by torch.cat"
        shown = training.left[:3] + [f"{len(training.left) - 3} more"] * (len(training.left) > 3)
        fail("late_upsampling", "model", expected, "; ".join(shown) or "no call of F.interpolate")
    plans = {
        model.get_submodule(name): Plans(training.plans.get(name), evaluation.plans.get(name))
        for name in dict.fromkeys([*training.plans, *evaluation.plans])
    }
    moved = dict.fromkeys([*training.moved, *evaluation.moved])
    return LateUpsampling("late_upsampling", model, plans, moved)
