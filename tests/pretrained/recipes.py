"""Recipes with the sections these tests read; the others stand for themselves."""

from __future__ import annotations

from adapt.components import ConversionChoice, ObjectiveChoice, OptimizerChoice, ScheduleChoice, SourceChoice
from adapt.config.decode import decode
from adapt.config.schema import Data, Dataset, Export, Model, Recipe, Run, Tokenizer, Trainable, Trainer


def recipe(
    base, *, seq_len=64, tokenizer=None, conversions=(), lora=None, dtype="bfloat16", objective="next_token", **model
):
    return Recipe(
        run=Run(name="tiny"),
        model=Model(base=str(base), conversions=tuple(decode(c, ConversionChoice) for c in conversions), **model),
        tokenizer=Tokenizer(path=tokenizer and str(tokenizer)),
        data=Data(train=(Dataset(source=SourceChoice("text", None)),), seq_len=seq_len),
        objective=decode(objective, ObjectiveChoice),
        optimizer=OptimizerChoice("adamw", None),
        schedule=ScheduleChoice("cosine", None),
        trainer=Trainer(steps=10),
        trainable=Trainable(lora=lora),
        export=Export(dtype=dtype),
    )
