"""Every setting of a run. Imports nothing heavy, so that `maskllm learn --help` is quick."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

ParameterisationName = Literal["categorical", "per-item"]
Schedule = Literal["linear", "exponential"]
Optimizer = Literal["adamw", "adamw8bit"]
Parallel = Literal["ddp", "fsdp"]
Share = Annotated[float, Field(ge=0, le=1)]

NOT_THE_RESULT = {
    "out",
    "data",
    "heldout",
    "heldout_windows",
    "eval_every",
    "checkpoint_every",
    "gradient_checkpointing",
    "parallel",
    "resume",
    "log_dir",
}
"""Settings that may change when a run is resumed (the text itself may not)."""


class LearnConfig(BaseModel):
    """How to learn one mask. The defaults are the paper's, whose budget is 2.1 billion tokens."""

    model_config = ConfigDict(use_attribute_docstrings=True, extra="forbid", frozen=True)

    out: Path
    """Where the mask goes, a .safetensors file; a picture of the run is put beside it, and an unfinished run
    keeps its checkpoint there."""
    data: list[str]
    """What to learn from: text files, folders of *.txt and *.jsonl, JSON lines, or
    hf:NAME[:SPLIT[:CONFIG]]; for an image classifier a folder with one folder of images a class."""
    heldout: list[str]
    """What the hard mask is measured on while it learns and when it is done, given like --data."""
    columns: list[str] = ["text"]
    """Fields of JSON lines and datasets that make a document."""
    stream: bool = False
    """Read the text in its own order as it is needed instead of drawing windows of all of it."""

    n: PositiveInt = 2
    """Weights kept in every group."""
    m: PositiveInt = 4
    """Weights in a group."""
    include: list[str] = []
    """Globs of layer names to mask; all linear layers of the decoder blocks if there is none."""
    exclude: list[str] = []
    """Globs of layer names to leave dense."""

    parameterisation: ParameterisationName = "categorical"
    """A logit for every pattern of a group (the paper), or for every weight: 1 logit a weight instead of 1.5
    for 2:4, and the only choice where there are many patterns, as in 8:16."""
    schedule: Schedule = "linear"
    """How temperature and scale move from first to last."""
    anneal_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the steps in which they do; in the rest they stay at their last value."""
    tau: tuple[PositiveFloat, PositiveFloat] = (4.0, 0.05)
    """Gumbel temperature, first step to last."""
    scale: tuple[PositiveFloat, PositiveFloat] = (1e2, 5e2)
    """What the logits are multiplied by before the noise is added, first step to last."""
    distill: Share = 0.0
    """How much of the loss is the divergence from the dense base's own answers instead of the data's."""
    prior: str = "sparsegpt"
    """What to start from: magnitude, wanda, sparsegpt (the paper), reconstruct, none, or a mask file of this
    base."""
    prior_strength: NonNegativeFloat = 3.0
    """How many standard deviations of the logits the prior's patterns are ahead."""
    weight_reg: NonNegativeFloat = 10.0
    """Reward for the share of the squared norm of the masked layers that the soft masks keep; falls to 0
    over the run. The paper's 1e-5 is not divided by that norm: it is 10 here where the norm is 1e6, that
    of 2.5 billion weights around 0.02."""

    steps: PositiveInt = 2_000
    """Optimizer steps."""
    batch: PositiveInt = 256
    """Windows (or images) a step, over all processes."""
    micro_batch: PositiveInt = 1
    """Windows that share one draw of soft masks and one pass through the model."""
    length: Annotated[int, Field(ge=2)] = 4_096
    """Tokens a window."""
    lr: PositiveFloat = 5e-4
    """Learning rate of the logits, which falls to a tenth along a cosine. A few hundred steps want 1e-3
    to 3e-3."""
    weight_decay: NonNegativeFloat = 0.1
    """AdamW's decay of the logits."""
    optimizer: Optimizer = "adamw"
    """AdamW with its two moments in float32, 8 bytes a logit, or in 8 bits, 2 bytes (bitsandbytes)."""
    settled: NonNegativeInt = 0
    """Stop early once this many measurements in a row moved fewer than a thousandth of the groups and the
    hard loss by less than a thousandth; 0 never."""
    seed: NonNegativeInt = 0
    """Seed of the text's order, the first logits and the noise."""

    heldout_windows: PositiveInt = 128
    """Windows measured of each held-out source, from its beginning."""
    eval_every: PositiveInt = 100
    """Steps between two measurements of the hard mask."""
    checkpoint_every: PositiveInt = 500
    """Steps between two checkpoints."""
    resume: bool = False
    """Go on from the checkpoint of a run that was stopped."""
    log_dir: Path | None = None
    """Folder for TensorBoard; nothing is written without one."""
    device: Annotated[str, Field(pattern=r"^(cpu|cuda(:\d+)?)$")] | None = None
    """cpu, cuda or cuda:1; a GPU if there is one."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the base is held and computed in; logits, losses and soft masks are float32."""
    gradient_checkpointing: bool = False
    """Keep only what enters each block and compute the rest again going backwards: less memory, a third
    more time."""
    parallel: Parallel = "ddp"
    """How torchrun's processes share the run: each with the whole base, or weights and logits sharded."""

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.optimizer == "adamw8bit" and self.parallel == "fsdp":
            raise ValueError("--optimizer adamw8bit goes with --parallel ddp only: bitsandbytes cannot shard")
        return self
