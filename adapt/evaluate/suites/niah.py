"""One needle in a haystack, RULER's niah_single_1 to 3 (Hsieh et al. 2024, arXiv 2404.06654).

    niah_<task>/<length>       fraction of answers whose text contains the value
    niah_<task>                mean over the lengths
    niah_nll/<task>/<length>   nats per token of the value, right after the prompt

and of each model to `compare` with, measured once: niah_<task>_teacher/<length>, niah_nll_window/<task>/<length>, and so on
(adapt/evaluate/others.py).

Task 1 hides a 7-digit number in noise (five sentences, over and over, one per line), 2 hides it in essays, 3 hides a UUID
in essays. RULER's essays are a third party's and do not ship: `essays` names a source of long texts, by default the
recipe's held-out data. The length is that of the prompt and the tokens decoded after it. The report draws length x depth.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from adapt.components import SourceChoice, suites
from adapt.errors import Problem, UserError
from adapt.evaluate.context import EvalContext
from adapt.evaluate.others import Other, compare_problems, others
from adapt.evaluate.sources import open_source, source_problems
from adapt.evaluate.suites.passkey import Cells, by_length, check_grid, grid_of, length_problems

if TYPE_CHECKING:
    from adapt.data.questions import Question

SALT = 2
VALUES = {1: "number", 2: "number", 3: "uuid"}
ESSAY_CHARACTERS = 1_000_000
"""As much of a source is read at most; haystacks longer than that repeat themselves."""


@dataclass(frozen=True, kw_only=True)
class NiahConfig:
    task: Literal[1, 2, 3] = 1
    """RULER's niah_single: 1 noise and a number, 2 essays and a number, 3 essays and a UUID."""
    essays: SourceChoice | None = None
    """Long texts to hide needles in, for tasks 2 and 3; null takes the recipe's held-out data (`data.eval`)."""
    lengths: tuple[int, ...] = (512, 1024)
    """Tokens of a prompt and of what is decoded after it."""
    depths: int = 5
    """Equal parts of the text; in noise a needle stands anywhere in its part, in essays at one of 40 percentiles. 10 is the
    full grid."""
    trials: int = 4
    """Texts of each length and depth. 20 is the full grid."""
    new_tokens: int = 128
    """Tokens decoded per text; the value may stand anywhere in them."""
    compare: tuple[Other, ...] = ()
    """Models measured beside the student: `teacher`, the base before conversions; `window`, the same with no more memory
    than the student's recurrent state."""

    def __post_init__(self) -> None:
        check_grid(self)
        check_needles(self)

    def problems(self, recipe) -> Iterator[Problem]:
        yield from length_problems("niah", self.lengths, recipe)
        yield from essay_problems("niah", self.task != 1, self.essays, recipe)
        yield from compare_problems("niah", self.compare, recipe)

    def metrics(self, recipe, datasets: list[str]) -> list[str]:
        """The student's: what is measured once is nothing for rules."""
        kinds = (f"niah_{self.task}", f"niah_nll/{self.task}")
        return [m for kind in kinds for m in (*(f"{kind}/{n}" for n in self.lengths), kind)]


class Niah:
    brings_data = True

    def __init__(self, config: NiahConfig):
        self.config = config

    def __call__(self, context: EvalContext) -> dict[str, float]:
        trials, questions, cells = self.ask(context)
        results = self.measure(context, trials, questions, cells)
        for name, title, other in others(context, self.config.compare, repr(self.config)):
            results |= self.measure(other, trials, questions, cells, f"_{name}", title)
        return results

    def ask(self, context: EvalContext) -> tuple[list[Any], list[Question], Cells]:
        """The same for all models."""
        from adapt.data.needles import Haystack, as_answer, draw_needles, trial_rng

        config, kind = self.config, VALUES[self.config.task]
        haystack = Haystack.noise() if config.task == 1 else Haystack.essays(essay_text(config.essays, context))
        writer = Writer("niah", context, haystack, kind, config.new_tokens)
        cells, trials, questions = [], [], []
        for length in config.lengths:
            for part in range(config.depths):
                for number in range(config.trials):
                    rng = trial_rng(context.seed, SALT, config.task, length, part, number)
                    needles = draw_needles(rng, haystack, kind, [part], config.depths)
                    trial = writer(needles, needles, length)
                    cells.append((length, part))
                    trials.append(trial)
                    questions.append(writer.asker(trial.prompt, as_answer(trial.answers[0], writer.asker.chat)))
        return trials, questions, cells

    def measure(
        self,
        context: EvalContext,
        trials: list[Any],
        questions: list[Question],
        cells: Cells,
        suffix: str = "",
        model: str = "",
    ) -> dict[str, float]:
        from adapt.evaluate.answers import answer_nats

        config = self.config
        texts = decoded_texts(context, questions, config.new_tokens)
        found = [float(t.answers[0] in text) for t, text in zip(trials, texts, strict=True)]
        nats = [n / len(q.answer) for n, q in zip(answer_nats(context, questions), questions, strict=True)]
        context.keep(grid_of(f"niah_{config.task}", config, cells, found, model))
        return by_length(f"niah_{config.task}{suffix}", found, cells) | by_length(
            f"niah_nll{suffix}/{config.task}", nats, cells
        )


@suites.register("niah")
def niah(config: NiahConfig) -> Niah:
    return Niah(config)


class Writer:
    """Needles -> the longest text with them that leaves room for what is decoded."""

    def __init__(self, suite: str, context: EvalContext, haystack: Any, kind: str, new_tokens: int):
        from adapt.data.questions import Asker
        from adapt.evaluate.answers import require_causal

        require_causal(suite, context)
        self.asker, self.haystack, self.kind, self.new_tokens = Asker(context.tokenizer), haystack, kind, new_tokens
        self.last: dict[int, int] = {}

    def __call__(self, needles, asked, length: int):
        from adapt.data.needles import niah

        def count(prompt: str, answer: str) -> int:
            return len(self.asker(prompt, answer).prompt) + self.new_tokens

        guess = self.last.get(length, length // 12)
        trial, self.last[length] = niah(self.haystack, needles, asked, self.kind, length, count, guess)
        return trial


def decoded_texts(context: EvalContext, questions: list[Question], new_tokens: int) -> list[str]:
    """What greedy decoding writes after each prompt, up to the end of the text. Collective."""
    from adapt.evaluate.answers import ends, greedy

    stop = ends(context, questions)
    rows = greedy(context, [q.prompt for q in questions], [new_tokens] * len(questions), stop)
    return [context.tokenizer.decode(row, skip_special_tokens=True) for row in rows]


def essay_text(source: SourceChoice | None, context: EvalContext) -> str:
    """One long text: of the source, or of the held-out rows in their order. The same on every rank. Collective."""
    if source is None:
        texts = held_out_texts(context)
    else:
        from adapt.data.documents import BadRecord

        documents = (d for d in open_source(source, context.tokenizer).documents() if not isinstance(d, BadRecord))
        texts = (text for d in documents for text in d.strings())
    return "\n".join(_until(texts, ESSAY_CHARACTERS))


def held_out_texts(context: EvalContext) -> list[str]:
    from adapt.data.batch import PAD

    if not context.datasets:
        raise UserError(
            "essays are needed as a haystack, and there is no held-out data to take: name a source, e.g. "
            "{name: niah, task: 2, essays: 'text:essays/'}, or use task 1 (noise)"
        )
    rows = []
    for number, label in enumerate(context.datasets):
        for batch in context.batches(label):
            for row in range(batch.num_rows):
                ids = batch.input_ids[row][batch.role[row] != PAD].tolist()
                text = context.tokenizer.decode(ids, skip_special_tokens=True)
                rows.append(((number, int(batch.sample_index[row])), text))
    return [text for _, text in sorted(context.gather(rows)) if text.strip()]


def _until(texts, characters: int) -> Iterator[str]:
    total = 0
    for text in texts:
        yield text
        total += len(text)
        if total >= characters:
            return


def check_needles(config) -> None:
    if config.new_tokens < 1:
        raise ValueError(f"new_tokens={config.new_tokens} must be 1 or more")
    if min(config.lengths) <= config.new_tokens:
        raise ValueError(
            f"lengths={list(config.lengths)} count the {config.new_tokens} new tokens too, so each must be longer; "
            f"give greater lengths, or lower new_tokens"
        )


def essay_problems(suite: str, needed: bool, source: SourceChoice | None, recipe) -> Iterator[Problem]:
    if not needed and source is not None:
        yield Problem("", f"{suite} hides nothing in essays here (its haystack is noise); leave `essays` out")
    elif needed and source is None and not recipe.data.eval:
        yield Problem("", f"{suite} needs a haystack: give it `essays: text:FOLDER`, or the recipe a data.eval entry")
    elif source is not None:
        yield from source_problems(source)
