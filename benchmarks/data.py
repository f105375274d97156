"""Data preparation side by side, and what it costs in memory.

    python benchmarks/data.py prepare --mb 24        # tokenise + pack: adapt data prepare against datasets.map, 2 processes each
    python benchmarks/data.py clean --mb 2           # every cleaning step alone
    python benchmarks/data.py memory --mb 64 256 --tokenizer words    # peak memory of preparation as the input grows
    python benchmarks/data.py access                 # the first batch at sample 0 and at sample 10^7
    python benchmarks/data.py core --mb 1            # the tokenizer's core with offsets and without

Every run is a process of its own and the arms take turns; the table gives medians. CPU seconds (of all its processes)
are disturbed less by a busy machine than wall seconds; both count from when the tokenizer is loaded. The text is made of
the docstrings of installed packages, shuffled by line with a seed. `--tokenizer` is any model folder or Hub id, or `words`: one id per word, fast, for
measuring what does not depend on the tokenizer.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
SEQ_LEN = 1024
CASES = ("prepare", "clean", "memory", "access", "core")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--mb", type=int, nargs="+", default=[24], help="size of the input")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--tokenizer", default="HuggingFaceTB/SmolLM2-135M")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        arm, folder, mb = args.child.split(",")
        print("RESULT " + json.dumps(ARMS[arm](args, Path(folder), int(mb))))
        return
    with tempfile.TemporaryDirectory() as folder:
        globals()[args.case](args, Path(folder))


def prepare(args: argparse.Namespace, folder: Path) -> None:
    (mb,) = args.mb
    corpus(folder / f"{mb}.jsonl", mb)
    found = turns(args, folder, [("ours", mb), ("datasets", mb), ("run_clm", mb)], args.rounds)
    print(f"tokenise and pack {mb} MB, {args.workers} processes; medians of {args.rounds}")
    cpu = {arm: statistics.median(r["cpu"] for r in runs) for (arm, _), runs in found.items()}
    for (arm, _), runs in found.items():
        wall = statistics.median(r["wall"] for r in runs)
        print(
            f"  {arm:<9} {mb / wall:6.2f} MB/s wall  {mb / cpu[arm]:6.2f} MB per CPU second  "
            f"{cpu['datasets'] / cpu[arm]:.2f}x datasets' CPU  {runs[0]['tokens']:,d} tokens"
        )


def clean(args: argparse.Namespace, folder: Path) -> None:
    from adapt.components import CleanerChoice, cleaners
    from adapt.config.decode import decode
    from adapt.data.documents import Document
    from adapt.errors import UserError

    (mb,) = args.mb
    corpus(folder / f"{mb}.jsonl", mb)
    lines = (folder / f"{mb}.jsonl").read_text().splitlines()
    documents = [Document(id=str(i), text=json.loads(line)["text"]) for i, line in enumerate(lines)]
    size = sum(len(d.text.encode()) for d in documents) / 1e6
    print(f"cleaning {size:.1f} MB, one process; best of {args.rounds}")
    for name in cleaners.names():
        try:
            choice = decode(name, CleanerChoice)
        except UserError as error:
            print(f"  {name:<24} needs settings: {error}")
            continue
        spent = []
        for _ in range(args.rounds):
            step = choice.build()
            step(documents[0])  # loads what it needs
            started = time.process_time()
            kept = sum(not isinstance(step(d), str) for d in documents)
            spent.append(time.process_time() - started)
        print(f"  {name:<24} {size / min(spent):8.1f} MB/s   {kept:,d} of {len(documents):,d} documents kept")


def memory(args: argparse.Namespace, folder: Path) -> None:
    for mb in args.mb:
        corpus(folder / f"{mb}.jsonl", mb)
    found = turns(args, folder, [("ours", mb) for mb in args.mb], 1)
    print(f"peak memory of preparation, {args.workers} workers")
    for (_, mb), (run,) in found.items():
        print(
            f"  {mb:>5} MB of text: {run['peak'] - run['before']:6.0f} MB above the {run['before']:.0f} MB of the "
            f"process with its tokenizer; all workers {run['workers']:.0f} MB"
        )


def access(args: argparse.Namespace, folder: Path) -> None:
    (run,) = turns(args, folder, [("access", 0)], 1).values()
    print(f"time to the first batch of 8 rows, {run[0]['rows']:,d} rows")
    for sample, seconds in run[0]["seconds"].items():
        print(f"  from sample {int(sample):>12,d}: {1e3 * seconds:7.2f} ms")


def core(args: argparse.Namespace, folder: Path) -> None:
    (mb,) = args.mb
    corpus(folder / f"{mb}.jsonl", mb)
    texts = [json.loads(line)["text"] for line in (folder / f"{mb}.jsonl").read_text().splitlines()]
    backend = tokenizer_of(args).backend_tokenizer
    spent: dict[str, list[float]] = {"encode_batch": [], "encode_batch_fast": []}
    for _ in range(args.rounds):
        for name, times in spent.items():
            started = time.process_time()
            getattr(backend, name)(texts)
            times.append(time.process_time() - started)
    for name, times in spent.items():
        print(f"  {name:<18} {mb / min(times):6.2f} MB per CPU second")


def turns(args: argparse.Namespace, folder: Path, arms: list[tuple[str, int]], rounds: int) -> dict:
    results: dict[tuple[str, int], list[dict]] = {arm: [] for arm in arms}
    for _ in range(rounds):
        for arm, mb in arms:
            command = [sys.executable, __file__, args.case, "--child", f"{arm},{folder},{mb}", "--tokenizer",
                       args.tokenizer, "--workers", str(args.workers)]  # fmt: skip
            out = subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True)
            lines = [line for line in out.stdout.splitlines() if line.startswith("RESULT ")]
            if not lines:
                sys.exit(out.stdout + out.stderr)
            results[arm, mb].append(json.loads(lines[0].removeprefix("RESULT ")))
    return results


def corpus(file: Path, mb: int) -> None:
    """JSONL of documents of about 3 KB: docstrings whose lines are drawn at random, so that none is a copy."""
    from adapt.data.sources.docstrings import DocstringsConfig, DocstringsSource

    lines: list[str] = []
    for document in DocstringsSource(DocstringsConfig(packages=("numpy", "torch", "scipy"))).documents():
        lines += document.text.splitlines()
        if len(lines) > 100_000:
            break
    rng, size = random.Random(0), 0
    with file.open("w") as stream:
        while size < mb * 1e6:
            text = "\n".join(rng.choices(lines, k=60))
            size += len(text.encode())
            stream.write(json.dumps({"text": text}) + "\n")


def clock():
    """Seconds so far: wall, and CPU of this process and of the children that ended."""
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter(), sum(u.ru_utime + u.ru_stime for u in (own, children))


def tokenizer_of(args: argparse.Namespace):
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if args.tokenizer == "words":
        from tokenizers import Tokenizer, models, pre_tokenizers

        core = Tokenizer(models.WordLevel({"<unk>": 0, "the": 1, "<eos>": 2}, "<unk>"))
        core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", unk_token="<unk>")
    return AutoTokenizer.from_pretrained(args.tokenizer)


def ours(args: argparse.Namespace, folder: Path, mb: int) -> dict:
    """Preparation as `adapt data prepare` does it, with its exact deduplication; rows are cut when they are read."""
    from adapt.components import ObjectiveChoice
    from adapt.config.decode import decode
    from adapt.config.schema import Data, Recipe
    from adapt.data.prepare import prepare as prepared_of

    tokenizer = tokenizer_of(args)
    with tempfile.TemporaryDirectory() as cache:
        source = {"name": "jsonl", "path": str(folder / f"{mb}.jsonl")}
        data = decode({"train": [{"source": source}], "workers": args.workers, "cache": cache}, Data)
        others = dict.fromkeys(("run", "model", "optimizer", "schedule", "trainer"))
        recipe = Recipe(**others, data=data, objective=decode("next_token", ObjectiveChoice))
        before = resident(os.getpid())
        watch = Watch()
        wall, cpu = clock()
        prepared = prepared_of(recipe, tokenizer, progress=False)
        after = clock()
        tokens = prepared.train[0].num_tokens
        peak, workers = watch.stop()
    return {"wall": after[0] - wall, "cpu": after[1] - cpu, "tokens": tokens, "before": before, "peak": peak,
            "workers": workers}  # fmt: skip


def datasets(args: argparse.Namespace, folder: Path, mb: int) -> dict:
    """The usual recipe: map a tokenizer over the texts, then concatenate and cut into blocks with a second map."""
    import datasets as hf

    tokenizer = tokenizer_of(args)

    def tokenise(batch):
        ids = tokenizer(batch["text"])["input_ids"]
        return {"input_ids": [[*i, tokenizer.eos_token_id] for i in ids]}

    def pack(batch):
        flat = [i for ids in batch["input_ids"] for i in ids]
        return {"input_ids": [flat[k : k + SEQ_LEN] for k in range(0, len(flat), SEQ_LEN)]}

    with tempfile.TemporaryDirectory() as cache:
        wall, cpu = clock()
        found = hf.load_dataset("json", data_files=str(folder / f"{mb}.jsonl"), split="train", cache_dir=cache)
        found = found.map(tokenise, batched=True, num_proc=args.workers, remove_columns=found.column_names)
        found = found.map(pack, batched=True, num_proc=args.workers)
        after = clock()
        tokens = sum(len(row) for row in found["input_ids"])
    return {"wall": after[0] - wall, "cpu": after[1] - cpu, "tokens": tokens}


def run_clm(args: argparse.Namespace, folder: Path, mb: int) -> dict:
    """The same as transformers' example script does it: all columns that the tokenizer gives are kept, and a copy of the
    ids as labels; the rest of each batch is dropped."""
    import itertools

    import datasets as hf

    tokenizer = tokenizer_of(args)

    def pack(batch):
        flat = {k: list(itertools.chain(*batch[k])) for k in batch}
        size = len(flat["input_ids"]) // SEQ_LEN * SEQ_LEN
        rows = {k: [v[i : i + SEQ_LEN] for i in range(0, size, SEQ_LEN)] for k, v in flat.items()}
        return {**rows, "labels": rows["input_ids"].copy()}

    with tempfile.TemporaryDirectory() as cache:
        wall, cpu = clock()
        found = hf.load_dataset("json", data_files=str(folder / f"{mb}.jsonl"), split="train", cache_dir=cache)
        found = found.map(
            lambda batch: tokenizer(batch["text"]), batched=True, num_proc=args.workers, remove_columns=["text"]
        )
        found = found.map(pack, batched=True, num_proc=args.workers)
        after = clock()
        tokens = found.num_rows * SEQ_LEN
    return {"wall": after[0] - wall, "cpu": after[1] - cpu, "tokens": tokens}


def first_batch(args: argparse.Namespace, folder: Path, mb: int) -> dict:
    """A stream over made-up shards, opened anew for each start."""
    import numpy as np

    from adapt.data.encode import Encoded
    from adapt.data.rows import Rows
    from adapt.data.shards import ShardWriter, TokenShards
    from adapt.data.stream import TrainStream

    rng = np.random.default_rng(0)
    place = folder / "shards"
    place.mkdir()
    writer = ShardWriter(place, np.dtype(np.uint16))
    for _ in range(20_000):
        size = int(rng.integers(50, 2000))
        writer.add(Encoded(rng.integers(0, 49_000, size).astype(np.uint16), None, size))
    writer.finish({"label": "made-up", "pairs": False, "pad_id": 0}, {"hashes": np.zeros(0, np.uint64)})
    seconds, shards = {}, TokenShards(place)
    rows = Rows(shards, SEQ_LEN, 0)
    for sample in (0, 10**7, 0, 10**7):  # the first two warm up
        stream = TrainStream([rows], [1.0], 0)
        started = time.perf_counter()
        stream.batch(range(sample, sample + 8))
        seconds[sample] = time.perf_counter() - started
    return {"rows": len(rows), "seconds": seconds}


def resident(pid: int) -> float:
    import psutil

    return psutil.Process(pid).memory_info().rss / 2**20


class Watch:
    """Peak memory in MB of this process and, summed, of its children; looked at every 50 ms."""

    def __init__(self):
        self.own = self.children = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def stop(self) -> tuple[float, float]:
        self._stop.set()
        self._thread.join()
        return self.own, self.children

    def _look(self) -> None:
        import psutil

        process = psutil.Process()
        while not self._stop.wait(0.05):
            self.own = max(self.own, process.memory_info().rss / 2**20)
            total = 0.0
            for child in process.children():
                try:
                    total += child.memory_info().rss / 2**20
                except psutil.NoSuchProcess:
                    continue
            self.children = max(self.children, total)


ARMS = {"ours": ours, "datasets": datasets, "run_clm": run_clm, "access": first_batch}

if __name__ == "__main__":
    main()
