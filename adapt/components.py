"""The registries, and the recipe field type of each. Nothing heavy is imported here; entries load on first look-up."""

from __future__ import annotations

from adapt.registry import Registry, Selection

objectives = Registry(
    "objective", "adapt.objectives", "What is learned: config -> Objective; called by the training step."
)
block_sizes = Registry(
    "block_sizes",
    "adapt.objectives.growth",
    "How blocks grow: config, target -> BlockSizes; asked by the block-diffusion objective at every step.",
)
conversions = Registry(
    "conversion",
    "adapt.conversion",
    "How a pretrained model becomes the student: config, recipe -> Conversion; applied in order.",
)
initialisers = Registry(
    "initialiser",
    "adapt.conversion.initialisers",
    "How the rows of new tokens start: config -> Initialiser; called by the conversion that extends the vocabulary.",
)
optimizers = Registry("optimizer", "adapt.optim", "config -> build(model) -> torch.optim.Optimizer; one per stage.")
schedules = Registry(
    "schedule",
    "adapt.optim.schedules",
    "config -> f(step, total_steps) -> multiplier of every group's lr; a pure function.",
)
sources = Registry(
    "source", "adapt.data.sources", "Where documents come from: config -> Source; read by data preparation."
)
cleaners = Registry(
    "cleaner",
    "adapt.data.cleaning",
    "What is done to a document before it is tokenised: config -> Cleaner; called by data preparation, in order.",
)
suites = Registry(
    "suite",
    "adapt.evaluate.suites",
    "What is measured: config -> Suite; serves `adapt evaluate`, runs and reports.",
)
samplers = Registry(
    "sampler",
    "adapt.generation",
    "How text is decoded: config -> Sampler; serves `adapt generate` and suites.",
)
tokenizer_methods = Registry(
    "tokenizer method",
    "adapt.tokenization.methods",
    "How a tokenizer gets new tokens: config -> Method; called by `adapt tokenizer extend`.",
)
sections = Registry(
    "section", "adapt.report.sections", "A part of the report page: config -> Section; called in order."
)


class ObjectiveChoice(Selection):
    registry = objectives


class BlockSizesChoice(Selection):
    registry = block_sizes


class ConversionChoice(Selection):
    registry = conversions


class InitialiserChoice(Selection):
    registry = initialisers


class OptimizerChoice(Selection):
    registry = optimizers


class ScheduleChoice(Selection):
    registry = schedules


class SourceChoice(Selection):
    registry = sources


class CleanerChoice(Selection):
    registry = cleaners


class SuiteChoice(Selection):
    registry = suites


class SamplerChoice(Selection):
    registry = samplers


class TokenizerMethodChoice(Selection):
    registry = tokenizer_methods
