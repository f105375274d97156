"""What corrupting inputs costs beside the training step it feeds: SmolLM2-135M shapes, 4 rows of 512, one thread.

    OMP_NUM_THREADS=1 python benchmarks/corruption.py

CPU seconds. "corrupt" is the draw alone; "prepare, beyond next_token's" is all the objective does on the CPU more than
plain training does. Weights are random: a step's cost does not depend on them.
"""

from __future__ import annotations

import statistics
import time

from steps import make_batch, ours, smollm2  # of this folder


def seconds(work, rounds: int) -> float:
    """Median CPU seconds of a call, after one to warm up."""
    taken = []
    for _ in range(rounds + 1):
        before = time.process_time()
        work()
        taken.append(time.process_time() - before)
    return statistics.median(taken[1:])


def main() -> None:
    import numpy as np
    import torch

    from adapt.objectives.base import Facts
    from adapt.objectives.masked_thought import MaskedThought, MaskedThoughtConfig
    from adapt.objectives.meap import Meap, MeapConfig
    from adapt.objectives.next_token import NextToken
    from adapt.tokenization.vocabulary import Vocabulary

    torch.set_num_threads(1)
    vocabulary = Vocabulary(special=np.arange(17), ordinary=np.arange(17, 49152))
    facts = Facts(mask_token_id=5, vocabulary=vocabulary, total_steps=100)
    batch = make_batch(4, 512)
    batch.input_ids.clamp_(min=17)
    batch.labels[:, 1:].clamp_(min=17)
    plain = NextToken(Facts())
    arms = {
        "meap": Meap(MeapConfig(), facts),
        "meap, sft copies": Meap(MeapConfig(ratio=0.1, sft_layout="separate"), facts),
        "masked_thought": MaskedThought(MaskedThoughtConfig(), facts),
        "masked_thought, random ids": MaskedThought(MaskedThoughtConfig(replace_rate=1.0), facts),
    }
    step = seconds(ours(smollm2(30), batch, plain), 3)
    base = seconds(lambda: plain.prepare(batch, seed=0, step=50), 100)
    print(f"next_token step, forward and backward: {step:.2f} CPU s; its prepare {1e3 * base:.2f} ms")
    print("| objective | corrupt, ms | % of the step | prepare, beyond next_token's, ms | % of the step |")
    print("|---|---|---|---|---|")
    for name, goal in arms.items():
        draw = seconds(lambda goal=goal: goal.corrupted(batch, 0.4, seed=0, step=50), 100)
        more = seconds(lambda goal=goal: goal.prepare(batch, seed=0, step=50), 100) - base
        print(f"| {name} | {1e3 * draw:.2f} | {draw / step:.3%} | {1e3 * more:.2f} | {more / step:.3%} |")


if __name__ == "__main__":
    main()
