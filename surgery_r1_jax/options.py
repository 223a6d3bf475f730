"""Every key of a run's YAML file, with its range and its default: `SFT` and `GRPO` are the two programs.

Knows no JAX, so that a mistyped key is refused before anything heavy is imported. What a section does is told by
the module that it is handed to: `Data` and `Targets` pipeline.py, `Augment` augment.py, `Optimizer` optim.py, `Lora`
lora.py, `Compute` model.py, `Schedule` run.py, `Evaluation` evaluate.py, `Sampler` sampling.py, `Reward` rewards.py,
`Objective` objectives.py.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from surgery_r1_jax import config, errors

Boxes = Literal["pixel", "unit", "thousand"] | None
_ROOT = "data set folder: EndoVis-VQLA, your own frames with a table of records, or what tensorflow-datasets prepared"
_BOXES = "what the boxes of a table of records are written in, where its data.json does not say"


class Source(config.Config):
    """One of several data sets that a run draws from."""

    root: str = Field(description=_ROOT)
    weight: float = Field(1.0, gt=0, description="rows drawn of this set, relative to the weights of the others")
    boxes: Boxes = Field(None, description=_BOXES)


class Augment(config.Config):
    """What is changed at random about the frames that are trained on; by default nothing."""

    flip_left_right: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of frames mirrored, boxes and location words with them. Your own frames only where no class"
        " and no question has a word such as left or upper, since nothing is known of what it would become",
    )
    flip_top_bottom: float = Field(0.0, ge=0, le=1, description="share of frames mirrored top-bottom, as above")
    crop: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of frames of which a part is enlarged to the whole, where no location word turns false. What"
        " has no box may be cut off: not for questions such as how many there are",
    )
    crop_least: float = Field(0.75, gt=0, le=1, description="shortest side of a crop, as a share of the frame's")
    crop_visible: float = Field(0.6, gt=0, le=1, description="least share of each box that a crop must leave")
    light: float = Field(0.0, ge=0, le=1, description="share of frames in another light; these are its bounds:")
    brightness: float = Field(0.25, ge=0, le=4, description="multiplied or divided by up to 1 + this")
    contrast: float = Field(0.25, ge=0, le=4, description="the same, about the frame's mean")
    gamma: float = Field(0.2, ge=0, le=4, description="exponent of up to 1 + this, or one over that")
    colour: float = Field(0.0, ge=0, le=1, description="share of frames in other colours; these are its bounds:")
    saturation: float = Field(0.3, ge=0, le=4, description="multiplied or divided by up to 1 + this")
    white_balance: float = Field(0.1, ge=0, le=4, description="the same, of red and of blue")
    smoke: float = Field(0.0, ge=0, le=1, description="share of frames with the smoke of cautery in front")
    smoke_density: float = Field(0.8, gt=0, le=1, description="most that it hides where it is thickest")
    blood: float = Field(0.0, ge=0, le=1, description="share of frames with drops and a film of blood")
    blood_cover: float = Field(0.15, gt=0, le=1, description="most of the frame that it covers")

    @property
    def on(self) -> bool:
        """Whether any frame is changed."""
        kinds = (self.flip_left_right, self.flip_top_bottom, self.crop, self.light, self.colour, self.smoke, self.blood)
        return any(kinds)


class Data(config.Config):
    """Which frames are read and how they are batched."""

    root: str | None = Field(None, description=_ROOT)
    boxes: Boxes = Field(None, description=_BOXES)
    mix: tuple[Source, ...] = Field((), description="several data sets with their weights, in place of root and boxes")
    split: str = Field("train", description="train, dev, val or all")
    frames: int = Field(8, ge=1, description="frames in a batch, over all processes")
    questions: int = Field(5, ge=1, description="most questions of a frame in one row")
    strict: bool = Field(False, description="refuse boxes outside the image instead of clipping them")
    limit: int = Field(0, ge=0, description="use only so many frames, spread evenly; 0: all")
    threads: int = Field(2, ge=1, description="decoding threads of a process")
    workers: int = Field(0, ge=0, description="decoding processes beside the main one")
    augment: Augment = Augment()
    buckets: int = Field(
        4, ge=1, le=64, description="most shapes of a batch: each is compiled, more leave less padding"
    )
    cache: float = Field(
        0.375, ge=0, description="GiB of resized pictures that are kept, shared out evenly over all processes of a host"
    )

    @model_validator(mode="after")
    def _one_source(self):
        if (self.root is None) == (not self.mix) or (self.mix and self.boxes):
            raise ValueError("give either root (and boxes), or mix with a root for each data set")
        return self

    @property
    def sources(self) -> tuple[Source, ...]:
        """The data sets, one or several."""
        return self.mix or (Source(root=self.root, boxes=self.boxes),)

    @property
    def name(self) -> str:
        """Their folders."""
        return ", ".join(source.root for source in self.sources)


class Targets(config.Config):
    """What SFT teaches of a record."""

    reasoning: float = Field(1.0, ge=0, le=1, description="share of answers with their reasoning in front")
    answer_only: float = Field(0.0, ge=0, le=1, description="share of questions that want no box: visual QA")
    box_only: float = Field(0.0, ge=0, le=1, description="share of questions that want only the box: grounding QA")
    box_slack: float = Field(
        0.0,
        ge=0,
        le=1,
        description="push each side of a box outwards by up to this share of its size (coarse labels)",
    )

    @model_validator(mode="after")
    def _shares_fit(self):
        if self.answer_only + self.box_only > 1:
            raise ValueError(f"answer_only {self.answer_only} and box_only {self.box_only} are more than 1 together")
        return self


class Rates(config.Config):
    """Share of the learning rate that each part learns with; 0 freezes it and keeps no moments for it."""

    tower: float = Field(1.0, ge=0)
    merger: float = Field(1.0, ge=0)
    decoder: float = Field(1.0, ge=0)


class Optimizer(config.Config):
    """How gradients become updates."""

    kind: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = Field(1e-5, gt=0)
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    warmup: float = Field(0.03, ge=0, le=1, description="share of the steps in which the rate rises from 0")
    hold: float = Field(0.0, ge=0, le=1, description="share of the steps after warm-up at the full rate")
    final: float = Field(0.0, ge=0, le=1, description="rate at the last step, as a share of the full one")
    b1: float = Field(0.9, ge=0, lt=1)
    b2: float = Field(0.999, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0, description="of kernels and embeddings, not of norms and biases")
    clip_norm: float = Field(1.0, gt=0)
    adam_share: float = Field(0.2, gt=0, description="with muon: rate of what is no matrix, embeddings included")
    rates: Rates = Rates()


class Lora(config.Config):
    """Adapters of low rank, which are trained in place of the weights themselves."""

    rank: int = Field(0, ge=0, le=4096, description="numbers between an adapter's two matrices; 0: no adapters")
    alpha: float = Field(16.0, gt=0, description="what an adapter adds is multiplied by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="share of an adapter's inputs left out while training")
    rslora: bool = Field(False, description="multiply by alpha / sqrt(rank) instead")
    targets: tuple[str, ...] = Field(
        ("decoder",), min_length=1, description="tower, merger, decoder, or modules such as q_proj or visual.*.mlp.*"
    )
    base: Literal["float32", "bfloat16", "int4", "nf4"] = Field(
        "float32",
        description="how frozen weights are kept; int4, nf4: the decoder's matrices, but no experts (QLoRA, by qwix)",
    )

    @property
    def four_bits(self) -> bool:
        """Whether there is a base in four bits."""
        return self.rank > 0 and self.base in ("int4", "nf4")

    @property
    def still(self) -> "Lora":
        """The same without dropout, as all but training runs it."""
        return self.model_copy(update=dict(dropout=0.0))

    @property
    def kept(self) -> str:
        """The precision in which the weights of a checkpoint are read."""
        return "bfloat16" if self.four_bits else self.base if self.rank else "float32"

    @property
    def scale(self) -> float:
        """What an adapter's output is multiplied by."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


class Compute(config.Config):
    """How the model computes, apart from what: none of it changes the result but for rounding."""

    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    remat: bool = Field(False, description="recompute each decoder layer in the backward pass")
    tower_remat: bool = Field(False, description="recompute the tower's layers too")
    attention: Literal["auto", "xla", "pallas", "cudnn"] = Field(
        "auto", description="pallas: flash kernels on TPUs; cudnn: on NVIDIA GPUs, in bfloat16; auto: what there is"
    )
    query_chunk: int | None = Field(
        512,
        ge=1,
        description="with xla: queries of a frame whose scores exist at once, in image, prefix and branches",
    )
    mesh: tuple[int, int, int] = Field((1, -1, 1), description="devices along data, fsdp, tensor; -1: what is left")
    offload: bool = Field(
        False, description="keep moments, and GRPO's copy of the start, in the host's memory until they are needed"
    )


class Schedule(config.Config):
    """How long, how often."""

    steps: int | None = Field(None, ge=1, description="1000 where epochs are not given either")
    epochs: float | None = Field(None, gt=0, description="passes over the rows of all data sets, in place of steps")
    eval_every: int = Field(0, ge=0, description="steps between evaluations on the dev split; 0: only at the end")
    save_every: int = Field(200, ge=1)
    log_every: int = Field(10, ge=1)
    max_bad_steps: int = Field(3, ge=1, description="non-finite steps in a row that end the run")
    tensorboard: bool = False

    @model_validator(mode="before")
    @classmethod
    def _steps_or_epochs(cls, given):
        if not isinstance(given, dict):
            return given
        steps, epochs = given.get("steps"), given.get("epochs")
        if steps is not None and epochs is not None:
            raise ValueError(f"steps {steps} and epochs {epochs} are both given; take one out, or set it to null")
        return given | {"steps": 1000} if steps is None and epochs is None else given

    def evaluates(self, step: int) -> bool:
        """Whether the dev split is asked after this step."""
        return step == self.steps or (self.eval_every > 0 and step % self.eval_every == 0)

    def saves(self, step: int) -> bool:
        """Whether a checkpoint is written after this step, whatever happens."""
        return step == self.steps or step % self.save_every == 0


class Evaluation(config.Config):
    """How a split is evaluated while training."""

    split: str = Field("dev", description="chooses the best checkpoint; val is only ever reported")
    frames: int = Field(16, ge=1, description="frames in a batch, over all processes")
    questions: int = Field(9, ge=1, description="most questions of a frame decoded together")
    limit: int = Field(0, ge=0, description="use only so many frames; 0: all")
    max_tokens: int = Field(256, ge=1)


class Sampler(config.Config):
    """How completions are drawn."""

    max_tokens: int = Field(256, ge=1, description="longest completion, stop token included")
    temperature: float = Field(1.0, ge=0, description="0 takes the likeliest token")
    top_k: int = Field(0, ge=0, description="draw among the k likeliest tokens; 0: all")
    top_p: float = Field(1.0, gt=0, le=1, description="draw among the likeliest tokens holding this much probability")


class Reward(config.Config):
    """Weights and forms of the terms; the defaults give a total in [0, 4]."""

    format_weight: float = Field(1.0, ge=0)
    accuracy_weight: float = Field(1.0, ge=0)
    iou_weight: float = Field(1.0, ge=0)
    coherence_weight: float = Field(1.0, ge=0)
    tau: float = Field(0.5, gt=0, le=1, description="IoU from which a box counts as a hit")
    iou_form: Literal["true", "threshold", "squared", "giou"] = "true"
    coherence_form: Literal[
        "joint", "joint_soft", "harmonic", "concord", "geometry", "think_answer", "think_box", "triple"
    ] = "joint"
    concord_lambda: float = Field(0.5, ge=0, le=1)
    location_reference: Literal["organ", "image"] = "organ"
    location_top: Literal["larger_y", "smaller_y"] = "larger_y"


# What a paper leaves open is TRL's default. CISPO: no lower bound, and ScaleRL's cap of 5 (arXiv 2510.13786).
PRESETS: dict[str, dict] = {
    "grpo": {"aggregate": "sequence", "beta": 0.04},  # arXiv 2402.03300
    "dr_grpo": {"aggregate": "constant", "scale": "none"},  # arXiv 2503.20783
    "dapo": {"aggregate": "token", "epsilon_high": 0.28, "mask_truncated": True},  # arXiv 2503.14476
    "bnpo": {"aggregate": "token_micro"},  # trl grpo_trainer.py
    "gspo": {"ratio": "sequence", "epsilon_low": 3e-4, "epsilon_high": 4e-4},  # arXiv 2507.18071
    "cispo": {
        "surrogate": "cispo",
        "aggregate": "token",
        "epsilon_low": 1.0,
        "epsilon_high": 4.0,
    },  # 2506.13585
}


class Objective(config.Config):
    """Settings of the objective; `preset` fills in whatever is not given beside it."""

    preset: Literal["grpo", "dr_grpo", "dapo", "bnpo", "gspo", "cispo"] = "grpo"
    scale: Literal["group", "batch", "none"] = Field(
        "group", description="divide advantages by the spread of rewards in the group, in the batch, or not"
    )
    ratio: Literal["token", "sequence"] = Field(
        "token", description="probability ratio of each token, or its geometric mean over the sequence"
    )
    surrogate: Literal["clip", "cispo"] = Field(
        "clip", description="clipped gain, or the log-probability weighted by the clipped ratio as a constant"
    )
    aggregate: Literal["sequence", "token", "token_micro", "constant"] = Field(
        "sequence",
        description="mean of sequence means; token mean of the batch; of each micro-batch;"
        " sum / (sequences x longest completion allowed)",
    )
    epsilon_low: float = Field(0.2, ge=0, description="the ratio is clipped below 1 - epsilon_low")
    epsilon_high: float = Field(0.2, ge=0, description="the ratio is clipped above 1 + epsilon_high")
    delta: float | None = Field(None, description="dual clip: cap of the ratio where the advantage is negative")
    beta: float = Field(0.0, ge=0, description="weight of the KL term; 0 needs no reference model")
    kl_bound: float = Field(10.0, gt=0, le=40, description="log-ratio beyond which the KL term goes on straight")
    mask_truncated: bool = Field(False, description="leave completions cut by the length limit out of the loss")
    truncated_in_baseline: bool = Field(
        True, description="they still count in their group's mean and spread, masked or not (as in TRL)"
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, given):
        if not isinstance(given, dict):
            return given
        return PRESETS.get(str(given.get("preset", "grpo")), {}) | given

    @model_validator(mode="after")
    def _delta_above_clip(self):
        if self.delta is not None and self.delta <= 1 + self.epsilon_high:
            raise ValueError(f"delta {self.delta} must be greater than 1 + epsilon_high = {1 + self.epsilon_high}")
        return self


def _check_four_bits(lora: Lora, compute: Compute) -> None:
    if lora.four_bits and not compute.remat:
        raise ValueError(
            f"lora.base {lora.base} wants compute.remat: true, without which every unpacked matrix is kept for the "
            "backward pass"
        )


class SFT(config.Config):
    """A whole SFT run."""

    model: str = Field(description="Hugging Face folder, or a run folder, to start from")
    seed: int = Field(0, ge=0, lt=2**32)
    accumulate: int = Field(1, ge=1, description="parts that each batch is cut into, one after the other on the device")
    smoothing_sigma: float = Field(0.0, ge=0, description="spread box number targets over their neighbours; 0: off")
    data: Data
    targets: Targets = Targets()
    optimizer: Optimizer = Optimizer()
    lora: Lora = Lora()
    compute: Compute = Compute()
    schedule: Schedule = Schedule()
    evaluation: Evaluation = Evaluation()

    @model_validator(mode="after")
    def _parts_divide(self):
        if self.data.frames % self.accumulate:
            raise ValueError(
                f"data.frames {self.data.frames} does not divide by accumulate {self.accumulate}: parts are made of "
                "whole frames"
            )
        _check_four_bits(self.lora, self.compute)
        return self


class GRPO(config.Config):
    """A whole GRPO run."""

    model: str = Field(description="Hugging Face folder, or a run folder, to start from; also the frozen reference")
    seed: int = Field(0, ge=0, lt=2**32)
    samples: int = Field(8, ge=2, description="completions of a question (G); they compete with each other")
    updates: int = Field(1, ge=1, description="updates on each rollout")
    minibatches: int = Field(1, ge=1, description="parts of the rollout's frames, one optimiser step each")
    accumulate: int = Field(1, ge=1, description="parts that a minibatch is cut into, one after the other")
    mask_flat: bool = Field(False, description="leave groups whose rewards are all equal out of the loss")
    resample_flat: int = Field(0, ge=0, description="times that flat groups are drawn anew before they are accepted")
    table_rows: int = Field(4, ge=0, description="sampled completions shown and written at every evaluation")
    data: Data
    sampler: Sampler = Sampler()
    reward: Reward = Reward()
    objective: Objective = Objective()
    optimizer: Optimizer = Optimizer(learning_rate=1e-6)
    lora: Lora = Lora()
    compute: Compute = Compute()
    schedule: Schedule = Schedule()
    evaluation: Evaluation = Evaluation()

    @model_validator(mode="after")
    def _parts_divide(self):
        if self.data.frames % (self.minibatches * self.accumulate):
            raise ValueError(
                f"data.frames {self.data.frames} does not divide by minibatches {self.minibatches} x accumulate "
                f"{self.accumulate}: minibatches are made of whole frames"
            )
        if self.sampler.temperature == 0:
            raise ValueError("sampler.temperature 0 draws the same completion every time; GRPO needs variety")
        _check_four_bits(self.lora, self.compute)
        return self


def load(path: str | Path, overrides: Sequence[str] = ()) -> SFT | GRPO:
    """The configuration as that of the program whose keys it has.

    Raises: InputError with the mistakes in it, those of the closer program.
    """
    refusals = []
    for program in (GRPO, SFT):
        try:
            return config.load(program, path, overrides)
        except errors.InputError as refusal:
            refusals.append(refusal)
    raise min(refusals, key=lambda refusal: (str(refusal).count("unknown key"), str(refusal).count("\n"))) from None
