"""Grade-school word problems with worked answers, made from templates: unlimited, free, and right by construction.

The form is GSM8K's (Cobbe et al. 2021, arXiv 2110.14168): steps with `<<expression=value>>` annotations, then
`#### answer`. The problems are our own.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

VERSION = 1
"""Raise it when a template or the way of drawing changes."""
NAMES = (
    "Ana", "Boris", "Chen", "Dalia", "Emeka", "Fatima", "Goran", "Hana", "Igor", "Jonas", "Kavya", "Leila", "Mateo",
    "Nora", "Omar", "Priya", "Quinn", "Rosa", "Sven", "Tariq", "Uma", "Vera", "Wen", "Yusuf", "Zofia",
)  # fmt: skip
THINGS = (
    "apples", "pencils", "stickers", "marbles", "stamps", "shells", "buttons", "cards", "beads", "coins", "candles",
    "magnets", "postcards", "balloons", "notebooks", "badges",
)  # fmt: skip
PLACES = ("market", "school fair", "library", "club", "workshop", "museum", "camp", "bakery")
TRIES = 10_000

Step = tuple[str, str, str]
"""Name of the result, expression, sentence with `{}` where the calculation stands."""


@dataclass(frozen=True)
class Template:
    question: str
    steps: tuple[Step, ...]
    numbers: dict[str, range]
    """What each number of the question may be."""


@dataclass(frozen=True)
class Problem:
    template: int
    numbers: tuple[int, ...]
    question: str
    solution: str
    """Step lines, then `#### answer`."""
    answer: int
    words: dict[str, str]
    """Names, things and places in it."""


def T(question: str, *steps: Step, **numbers: range) -> Template:
    return Template(question, steps, numbers)


def r(first: int, last: int, step: int = 1) -> range:
    return range(first, last + 1, step)


TEMPLATES = (
    T("{name} has {a} {things} and buys {b} packs of {c} {things} each. How many {things} does {name} have now?",
      ("x", "b*c", "The packs hold {} {things}."), ("y", "a+x", "{name} now has {} {things}."),
      a=r(3, 60), b=r(2, 9), c=r(3, 12)),
    T("{name} had {a} {things}, gave {b} to {other} and lost {c}. How many {things} are left?",
      ("x", "b+c", "{name} has {} {things} less."), ("y", "a-x", "{} {things} are left."),
      a=r(30, 99), b=r(3, 15), c=r(2, 14)),
    T("A box holds {a} {things}. {name} fills {b} boxes and has {c} {things} over. How many {things} are there?",
      ("x", "a*b", "In the boxes are {} {things}."), ("y", "x+c", "With the rest there are {} {things}."),
      a=r(4, 24), b=r(3, 12), c=r(1, 11)),
    T("{name} shares {a} {things} equally among {b} friends, and each friend gives {c} of them away. How many {things} does "
      "each friend keep?",
      ("x", "a/b", "Each friend gets {} {things}."), ("y", "x-c", "Each keeps {} {things}."),
      a=r(24, 144), b=r(2, 9), c=r(1, 6)),
    T("{name} reads {a} pages a day for {b} days, and then {c} pages a day for {d} days. How many pages are that?",
      ("x", "a*b", "First {name} reads {} pages."), ("y", "c*d", "Then {name} reads {} pages."),
      ("z", "x+y", "Together these are {} pages."),
      a=r(8, 40), b=r(2, 9), c=r(5, 30), d=r(2, 9)),
    T("Tickets for the {place} cost {a} dollars for adults and {b} dollars for children. What do {c} adults and {d} "
      "children pay?",
      ("x", "a*c", "The adults pay {} dollars."), ("y", "b*d", "The children pay {} dollars."),
      ("z", "x+y", "Together they pay {} dollars."),
      a=r(6, 20), b=r(2, 9), c=r(2, 6), d=r(2, 9)),
    T("{name} buys {a} {things} at {b} dollars each and pays with {c} dollars. How much change does {name} get?",
      ("x", "a*b", "The {things} cost {} dollars."), ("y", "c-x", "The change is {} dollars."),
      a=r(2, 9), b=r(2, 9), c=r(20, 100, 10)),
    T("{name} earns {a} dollars an hour and works {b} hours a day, {c} days a week. Rent takes {d} dollars of a week's "
      "pay. How many dollars of it are left?",
      ("x", "a*b", "A day brings {} dollars."), ("y", "x*c", "A week brings {} dollars."),
      ("z", "y-d", "After the rent {} dollars are left."),
      a=r(8, 25), b=r(4, 8), c=r(3, 6), d=r(40, 180, 5)),
    T("A farmer has {a} rows of {b} trees. Each tree gives {c} kilograms of fruit, and {d} kilograms spoil. How many "
      "kilograms can be sold?",
      ("x", "a*b", "There are {} trees."), ("y", "x*c", "They give {} kilograms."), ("z", "y-d", "{} can be sold."),
      a=r(3, 12), b=r(4, 15), c=r(5, 20), d=r(10, 90)),
    T("{name} is {a} years old and {other} is {b} times as old. How old will {other} be in {c} years?",
      ("x", "a*b", "{other} is {} years old."), ("y", "x+c", "In {c} years {other} will be {} years old."),
      a=r(5, 20), b=r(2, 4), c=r(2, 20)),
    T("{name} drives {a} kilometres an hour for {b} hours and {c} kilometres an hour for {d} hours. The whole way is {e} "
      "kilometres. How many kilometres remain?",
      ("x", "a*b", "The first part is {} kilometres."), ("y", "c*d", "The second part is {} kilometres."),
      ("z", "x+y", "{name} has driven {} kilometres."), ("w", "e-z", "{} kilometres remain."),
      a=r(40, 90, 5), b=r(1, 4), c=r(50, 110, 5), d=r(1, 4), e=r(300, 900, 10)),
    T("A shirt costs {a} dollars. It is on sale for {b} percent less, and {name} buys {c} of them. What does {name} pay?",
      ("x", "a*b/100", "The reduction is {} dollars."), ("y", "a-x", "A shirt now costs {} dollars."),
      ("z", "y*c", "{name} pays {} dollars."),
      a=r(20, 100, 5), b=r(10, 60, 10), c=r(2, 7)),
    T("{a} percent of the {b} visitors of the {place} come by bus, the others walk. How many visitors walk?",
      ("x", "a*b/100", "By bus come {} visitors."), ("y", "b-x", "{} visitors walk."),
      a=r(10, 90, 5), b=r(40, 400, 20)),
    T("{name} bakes {a} trays of {b} biscuits. A third of them burn, and {other} eats {c}. How many biscuits are left?",
      ("x", "a*b", "{name} bakes {} biscuits."), ("y", "x/3", "Of these, {} burn."), ("z", "x-y", "{} are good."),
      ("w", "z-c", "{} biscuits are left."),
      a=r(2, 9), b=r(6, 24), c=r(1, 9)),
    T("An empty tank has room for {a} litres. {b} litres a minute flow in while {c} litres a minute leak out. How many "
      "litres are missing after {d} minutes?",
      ("x", "b-c", "The tank gains {} litres a minute."), ("y", "x*d", "In {d} minutes it gains {} litres."),
      ("z", "a-y", "{} litres are missing."),
      a=r(200, 800, 10), b=r(8, 25), c=r(1, 7), d=r(5, 20)),
    T("{name} saves {a} dollars a month and {other} saves {b} dollars more than that. How many dollars do both have after "
      "{c} months?",
      ("x", "a+b", "{other} saves {} dollars a month."), ("y", "a+x", "Both save {} dollars a month."),
      ("z", "y*c", "After {c} months they have {} dollars."),
      a=r(10, 60), b=r(3, 30), c=r(2, 12)),
    T("{a} {things} are packed into boxes of {b}. Each box weighs {c} kilograms. How many kilograms are two lorries loaded "
      "with if each takes half of the boxes and {d} kilograms of tools?",
      ("x", "a/b", "There are {} boxes."), ("y", "x*c", "They weigh {} kilograms."),
      ("z", "2*d", "The tools weigh {} kilograms."), ("w", "y+z", "Together these are {} kilograms."),
      a=r(60, 600, 6), b=r(3, 12), c=r(2, 15), d=r(5, 40)),
    T("At the {place}, {name} sells {a} {things} in the morning and {b} times as many in the afternoon, for {c} dollars "
      "each. How many dollars does {name} take?",
      ("x", "a*b", "In the afternoon {name} sells {} {things}."), ("y", "a+x", "In all {name} sells {} {things}."),
      ("z", "y*c", "{name} takes {} dollars."),
      a=r(4, 30), b=r(2, 5), c=r(2, 9)),
    T("A rectangular garden is {a} metres long and {b} metres wide. A fence around it costs {c} dollars a metre. What "
      "does the fence cost?",
      ("x", "a+b", "Length and width are {} metres together."), ("y", "2*x", "The fence is {} metres long."),
      ("z", "y*c", "It costs {} dollars."),
      a=r(8, 40), b=r(5, 30), c=r(3, 15)),
    T("A floor is {a} metres long and {b} metres wide. A pack of tiles covers {c} square metres and costs {d} dollars. "
      "What do the tiles for the floor cost?",
      ("x", "a*b", "The floor has {} square metres."), ("y", "x/c", "That takes {} packs."),
      ("z", "y*d", "The tiles cost {} dollars."),
      a=r(4, 20), b=r(3, 15), c=r(2, 6), d=r(6, 30)),
    T("{name} scored {a}, {b} and {c} points in three games. How many points above the average of {d} is the average of "
      "these games?",
      ("x", "a+b+c", "In three games {name} scored {} points."), ("y", "x/3", "On average these are {} points."),
      ("z", "y-d", "That is {} points more."),
      a=r(10, 60), b=r(10, 60), c=r(10, 60), d=r(5, 30)),
    T("A class of {a} pupils goes to the {place} in cars that seat {b} besides the driver. Fuel is {c} dollars a car, and "
      "the school pays {d} dollars. How many dollars remain to be paid?",
      ("x", "a/b", "They need {} cars."), ("y", "x*c", "Fuel costs {} dollars."), ("z", "y-d", "{} dollars remain."),
      a=r(16, 60), b=r(3, 5), c=r(8, 40), d=r(10, 90, 5)),
    T("{name} walks {a} minutes to school and the same way back, {b} days a week. How many minutes are that in {c} weeks?",
      ("x", "2*a", "A day takes {} minutes."), ("y", "x*b", "A week takes {} minutes."),
      ("z", "y*c", "{c} weeks take {} minutes."),
      a=r(6, 35), b=r(3, 6), c=r(2, 10)),
    T("{name} has {a} dollars. {other} has half as much, and a third friend has {b} dollars more than {other}. How many "
      "dollars do the three have?",
      ("x", "a/2", "{other} has {} dollars."), ("y", "x+b", "The third friend has {} dollars."),
      ("z", "a+x", "{name} and {other} have {} dollars."), ("w", "z+y", "All three have {} dollars."),
      a=r(12, 120, 2), b=r(3, 40)),
    T("A printer makes {a} pages a minute. It runs {b} minutes, stops, and runs {c} minutes again. {d} pages are spoiled, "
      "and the good ones are bound into books of {e} pages. How many books are that?",
      ("x", "b+c", "It runs for {} minutes."), ("y", "a*x", "It prints {} pages."), ("z", "y-d", "{} pages are good."),
      ("w", "z/e", "They make {} books."),
      a=r(8, 30), b=r(3, 12), c=r(3, 12), d=r(2, 40), e=r(4, 20)),
    T("{name} plants {a} seeds. {b} percent of them grow, and each plant carries {c} tomatoes. {name} sells them in bags "
      "of {d} for {e} dollars a bag. How many dollars does {name} take?",
      ("x", "a*b/100", "{} seeds grow."), ("y", "x*c", "They carry {} tomatoes."), ("z", "y/d", "That fills {} bags."),
      ("w", "z*e", "{name} takes {} dollars."),
      a=r(20, 120, 10), b=r(20, 90, 10), c=r(4, 15), d=r(4, 12), e=r(2, 9)),
    T("A bus starts with {a} passengers. At the first stop {b} get off and {c} get on, at the second {d} get off and {e} "
      "get on. How many passengers are on the bus?",
      ("x", "a-b", "{} passengers stay."), ("y", "x+c", "After the first stop there are {}."),
      ("z", "y-d", "At the second stop {} stay."), ("w", "z+e", "In the end there are {} passengers."),
      a=r(15, 50), b=r(2, 14), c=r(1, 20), d=r(2, 14), e=r(1, 20)),
    T("{name} swims {a} lengths of {b} metres on each of {c} days and {d} metres on the last day. How many metres more than "
      "{e} are that?",
      ("x", "a*b", "A day has {} metres."), ("y", "x*c", "{c} days have {} metres."), ("z", "y+d", "In all there are {}."),
      ("w", "z-e", "That is {} metres more."),
      a=r(6, 30), b=r(20, 50, 5), c=r(2, 6), d=r(100, 900, 50), e=r(200, 1500, 100)),
    T("{name} orders {a} {things} at {b} dollars each and {c} bags at {d} dollars each. Delivery is {e} dollars, and a "
      "voucher takes {f} dollars off. What does {name} pay?",
      ("x", "a*b", "The {things} cost {} dollars."), ("y", "c*d", "The bags cost {} dollars."),
      ("z", "x+y", "Together they cost {} dollars."), ("w", "z+e", "With delivery that is {} dollars."),
      ("v", "w-f", "After the voucher {name} pays {} dollars."),
      a=r(2, 12), b=r(2, 15), c=r(2, 6), d=r(1, 9), e=r(3, 9), f=r(2, 12)),
    T("Two workers paint {a} walls in a day, each as many. {name} paints alone for {b} days, then {other} helps for {c} "
      "days. How many walls get painted?",
      ("x", "a/2", "One worker paints {} walls a day."), ("y", "x*b", "Alone {name} paints {} walls."),
      ("z", "a*c", "Both paint {} walls."), ("w", "y+z", "In all {} walls get painted."),
      a=r(4, 20, 2), b=r(2, 7), c=r(2, 7)),
)  # fmt: skip


def problem(rng: Any, templates: Sequence[int]) -> Problem:
    """One of the templates, with numbers for which every step is a whole number above zero. rng: numpy's Generator."""
    number = int(templates[int(rng.integers(len(templates)))])
    template = TEMPLATES[number]
    for _ in range(TRIES):
        drawn = {name: int(choices[int(rng.integers(len(choices)))]) for name, choices in template.numbers.items()}
        worked = work(template, drawn)
        if worked is not None:
            break
    else:
        raise RuntimeError(f"no numbers fit template {number}")
    first, second = rng.choice(len(NAMES), size=2, replace=False)
    words = {
        "name": NAMES[int(first)],
        "other": NAMES[int(second)],
        "things": THINGS[int(rng.integers(len(THINGS)))],
        "place": PLACES[int(rng.integers(len(PLACES)))],
    }
    question = template.question.format(**words, **drawn)
    solution = _written(template, worked, words, drawn)
    return Problem(number, tuple(drawn.values()), question, solution, worked[-1][1], words)


def slipped(rng: Any, found: Problem) -> str:
    """The solution with one calculation gone wrong, by up to 10, and what follows from it: a wrong answer that is as well
    written as the right one. rng: numpy's Generator."""
    template = TEMPLATES[found.template]
    drawn = dict(zip(template.numbers, found.numbers, strict=True))
    for _ in range(TRIES):
        by = int(rng.integers(1, 11)) * (1 if rng.integers(2) else -1)
        worked = work(template, drawn, slip=(int(rng.integers(len(template.steps))), by))
        if worked is not None and worked[-1][1] != found.answer:
            return _written(template, worked, found.words, drawn)
    raise RuntimeError(f"no calculation of template {found.template} can go wrong with {drawn}")


def _written(template: Template, worked: list[tuple[str, int]], words: dict[str, str], drawn: dict[str, int]) -> str:
    lines = [
        sentence.format(f"{shown} = <<{shown}={value}>>{value}", **words, **drawn)
        for (_, _, sentence), (shown, value) in zip(template.steps, worked, strict=True)
    ]
    return "\n".join([*lines, f"#### {worked[-1][1]}"])


def work(
    template: Template, drawn: dict[str, int], slip: tuple[int, int] | None = None
) -> list[tuple[str, int]] | None:
    """(expression in numbers, value) of each step; None where a value is no whole number above zero. `slip`: a step, and
    by how much its value is wrong."""
    known, steps = dict(drawn), []
    for number, (name, expression, _) in enumerate(template.steps):
        # Exact fractions, so that 7/2*2 is no whole number on the way; expressions are this module's own constants.
        value = eval(expression, {"__builtins__": {}}, {k: Fraction(v) for k, v in known.items()})
        if slip is not None and number == slip[0]:
            value += slip[1]
        if value.denominator != 1 or value < 1:
            return None
        shown = re.sub(r"[a-z]", lambda m, known=known: str(known[m[0]]), expression)
        known[name] = int(value)
        steps.append((shown, int(value)))
    return steps


def is_held_out(found: Problem, fraction: float) -> bool:
    """By a hash of template and numbers: the same problem under other names stays on its side."""
    digest = hashlib.sha256(repr((found.template, found.numbers)).encode()).hexdigest()
    return int(digest[:12], 16) / 16**12 < fraction
