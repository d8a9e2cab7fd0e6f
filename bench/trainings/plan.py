"""Which networks are trained, on what, with which methods, and for how long."""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

from anchorops.train.commands import DEMO

HRNET, SEGFORMER, EFFICIENTNET = "hrnet-w18-small", "segformer-b0", "efficientnet-lite0"
CAMVID = "camvid"
PRESETS = {**dict(zip((HRNET, SEGFORMER), DEMO, strict=True)), EFFICIENTNET: CAMVID}
BACKBONE_WEIGHTS = "data/tf_efficientnet_lite0-imagenet-fp16.pth"
PUBLISHED, SCRATCH = "published", "from-scratch"  # weights of the methods; a preset of its own
# schedule: steps between them
EVALUATIONS = {500: 100, 1_000: 250, 1_500: 250, 3_000: 500, 4_000: 500, 8_000: 1_000}
SCHEDULES = (500, 1_500, 4_000)
# head_tail: chosen so that there are four head, four body and three tail classes
SCENES: dict[str, dict[str, Any]] = {
    "digits": {},
    "few": {"train_images": 500, "data_seed": 0},
    "steep": {"zipf": 2.0, "head_tail": [0.013, 0.003]},
    CAMVID: {"dataset": "folder", "root": "data/camvid"},
}
Choice = tuple[str, str]  # methods, as "cbp+occl" or "plain", and their setting


def choices(names: str) -> list[Choice]:
    """Of names as in that of a run: plain, or methods, which may be from scratch."""
    ends = ((name, name.removesuffix(f"-{SCRATCH}")) for name in names.split())
    return [(methods, PUBLISHED if methods == name else SCRATCH) for name, methods in ends]


PLAIN = choices("plain")
MAIN = choices("plain sar occl occl-from-scratch ceco ceco-from-scratch mvsc")
REST = choices("cr cbp cbp+occl cbp+occl-from-scratch")
BALANCED = "balanced"  # the baseline whose cross-entropy has balanced class weights
HARD = choices("plain sar occl-from-scratch ceco-from-scratch mvsc")
RARE = choices("plain sar mvsc")  # what helped where data are rare
PHOTOGRAPHS = choices("plain sar mvsc cbp+occl ceco")


class Run(NamedTuple):
    """Its fields are those of a row."""

    scenes: str
    model: str
    methods: str
    setting: str
    steps: int
    seed: int

    @property
    def name(self) -> str:
        setting = "" if self.setting == PUBLISHED else f"-{self.setting}"
        return f"{self.scenes}-{self.model}-{self.methods}{setting}-{self.steps}-{self.seed}"

    @property
    def names(self) -> list[str]:
        """Of the methods."""
        return [] if self.methods in ("plain", BALANCED) else self.methods.split("+")

    @property
    def options(self) -> list[str]:
        """Those of `anchorops-train fit`."""
        presets = [PRESETS[self.model], *[SCRATCH] * (self.setting == SCRATCH)]
        options = {
            **{f"data.{name}": value for name, value in SCENES[self.scenes].items()},
            "model.methods": f"[{', '.join(self.names)}]",
            "data.steps": self.steps,
            "val_every": EVALUATIONS[self.steps],
            "seed": self.seed,
        }
        if self.methods == BALANCED:
            options["model.class_weights"] = BALANCED
        if self.scenes == CAMVID:
            options["model.backbone_weights"] = BACKBONE_WEIGHTS
        named = [*(("config", name) for name in presets), *options.items()]
        return [word for name, value in named for word in (f"--{name}", str(value))]


def plan() -> list[Run]:
    """Every run once, the most useful first."""

    def runs(
        scenes: str,
        model: str,
        choices: Sequence[Choice],
        schedules: Sequence[int] = SCHEDULES,
        seeds: Sequence[int] = (0, 1, 2),
    ) -> list[Run]:
        order = itertools.product(seeds, schedules, choices)
        return [Run(scenes, model, *choice, steps, seed) for seed, steps, choice in order]

    every = [
        *runs("digits", HRNET, MAIN, seeds=[0]),
        *runs("digits", HRNET, PLAIN, schedules=[8_000], seeds=[0]),
        *runs("digits", HRNET, MAIN, seeds=[1, 2]),
        *runs("digits", SEGFORMER, MAIN, seeds=[0]),
        *runs("few", HRNET, HARD, schedules=[1_500]),
        *runs("steep", HRNET, HARD, schedules=[1_500]),
        *runs("digits", HRNET, REST, schedules=[500]),
        *runs("digits", SEGFORMER, MAIN + REST, schedules=[500]),  # seed 0 of MAIN is above
        *runs("digits", SEGFORMER, MAIN, seeds=[1, 2]),
        *runs("digits", SEGFORMER, PLAIN, schedules=[8_000], seeds=[0]),
        *runs("digits", HRNET, REST, schedules=[1_500, 4_000]),
        *runs("few", SEGFORMER, HARD, schedules=[1_500]),
        *runs("steep", SEGFORMER, HARD, schedules=[1_500]),
        *(
            run
            for seed, model, scenes in itertools.product(
                (0, 1, 2), (SEGFORMER, HRNET), ("few", "steep")
            )
            for run in runs(scenes, model, RARE, schedules=[4_000], seeds=[seed])
        ),
        *runs("digits", SEGFORMER, REST, schedules=[1_500, 4_000]),
        *runs(CAMVID, EFFICIENTNET, PHOTOGRAPHS, schedules=[1_000]),
        *runs(CAMVID, EFFICIENTNET, choices("plain mvsc"), schedules=[3_000], seeds=[0]),
        *runs("steep", HRNET, choices(BALANCED), schedules=[1_500]),
        *runs("steep", SEGFORMER, choices(BALANCED), schedules=[1_500]),
    ]
    return [*dict.fromkeys(every)]
