"""Documents → a prepared corpus: token shards, a tokenizer and a manifest, published whole or not at all.

The way, each step in parallel and in bounded memory, its results kept in a working folder beside the output until the
corpus is published, so that a run that was killed goes on where it was:

1. gather: files → cleaned, filtered documents in parts (`gather.py`), encoded already where the tokenizer is given;
2. plan: duplicates, weights and the split, from 64 bits and a size a document (`plan.py`);
3. train the tokenizer, if none is given, on the training side alone, and encode the parts (`shards.py`);
4. join what is planned of the parts (`shards.py`), look for leakage (`leakage.py`), write the manifest, rename.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sheepop.data.corpus import FORMAT, MANIFEST_FILE, VERSION, Corpus, is_prepared, open_corpus
from sheepop.data.documents import list_files
from sheepop.data.duplicates import near_duplicates
from sheepop.data.gather import GIVEN_TOKENIZER, GatherSettings, forget_others, units_of
from sheepop.data.gathered import Gathered, gather_all
from sheepop.data.leakage import lines_of_part, seen_in
from sheepop.data.plan import Plan, copies_by_weight, first_occurrences, make_plan
from sheepop.data.selection import Selection
from sheepop.data.shards import EncodeTask, dtype_of, encode_part, join_parts, write_halves
from sheepop.data.tokenizer import KINDS, TOKENIZER_FILE, Tokenizer
from sheepop.data.workers import available_cores, parallel_map, tell_progress
from sheepop.data.working_folder import working_folder
from sheepop.utils.errors import ConfigError, DataError, did_you_mean
from sheepop.utils.files import atomic_folder, full_disk_is_a_clear_error, sha256_of_file, to_json, write_json
from sheepop.utils.logging import format_count, log, warn

PREPARATION = 3  # raised when the same text and settings give other files
SMALL_INPUT = 8_000_000  # bytes of files below which starting processes costs more than it saves
TRAIN_TOKENIZER_ON = 256_000_000  # bytes; bounds the time that training a tokenizer takes
LEAKAGE_TO_WARN_OF = 0.01


def prepare_corpus(
    sources: Sequence[Path],
    output: Path,
    *,
    tokenizer: str,
    vocab_size: int,
    val_fraction: float,
    seed: int,
    separator: str | None,
    selection: Selection | None = None,
    overwrite: bool = False,
    incremental: bool = False,
    num_workers: int | None = None,
) -> Corpus:
    """Tokenize documents into `output`: `train.bin`, `val.bin`, `tokenizer.json`, `manifest.json`.

    Every document begins with the end-of-text token, and one more closes the split. Where there are two or more
    different documents the split is by document, identical ones on the same side; a single one is cut by position,
    its end held out. A tokenizer is trained on the training side alone. The files depend on the text and the settings,
    and neither on the number of workers nor on earlier runs that were cut off.

    Args:
        sources: files and folders.
        output: must not exist yet, unless `overwrite` or `incremental` and it is a prepared folder.
        tokenizer: `bpe`, `char`, `word`, or the path of a tokenizer.
        vocab_size: entries of a tokenizer that is trained; lowered where the text cannot fill it.
        val_fraction: share of the bytes to hold out.
        seed: of the split.
        separator: text that ends a document inside a file, or None.
        selection: cleaning, filters, duplicates and weights.
        overwrite: replace a prepared folder.
        incremental: keep the work beside the output, so that a later run with more files does only what is new.
        num_workers: processes; None for one a core, or none at all for little text.

    Raises:
        DataError: there is no text, or too little.
        ConfigError: a setting is out of range, or `output` is in use.
    """
    selection = selection or Selection()
    if not 0 < val_fraction < 1:
        raise ConfigError(f"The validation share is {val_fraction}, but must lie between 0 and 1, for instance 0.1.")
    for source in sources:
        if is_prepared(source):
            raise ConfigError(f"{source} is prepared already; train on it as it is, or name the text it was made from.")
    if tokenizer not in KINDS and not Path(tokenizer).exists():
        raise ConfigError(
            f"There is no tokenizer '{tokenizer}', neither a kind nor a path.{did_you_mean(tokenizer, KINDS)} "
            f"Choose {', '.join(KINDS)}, or the path of a {TOKENIZER_FILE}."
        )
    selection.validate(sources)
    _check_output(output, overwrite=overwrite or incremental)
    closed: list[str] = []
    files = list_files(sources, include=selection.include, exclude=selection.exclude, unreadable=closed)
    if closed and selection.strict:
        raise DataError(closed[0])
    given = None if tokenizer in KINDS else Tokenizer.load(Path(tokenizer))
    gathering = GatherSettings(
        separator=separator,
        cleaning=selection.cleaning,
        filters=selection.filters,
        find_near_duplicates=selection.deduplicate == "near",
        strict=selection.strict,
        tokenizer=given.fingerprint if given else None,
    )
    units = units_of(files, sources, gathering)
    if num_workers is None:
        num_workers = available_cores() if sum(path.stat().st_size for path in files) > SMALL_INPUT else 1

    with full_disk_is_a_clear_error(output), working_folder(output, keep=incremental) as work:
        _check_output(output, overwrite=overwrite or incremental)  # again: another process may have been here meanwhile
        if given:
            given.save(work / GIVEN_TOKENIZER)
        gathered = gather_all(units, work, gathering, num_workers, closed)
        if not gathered.parts:
            raise DataError(
                f"There is no text in {', '.join(map(str, sources))}: the files are empty, were filtered out, or none "
                f"of them is text. Name files with text inside.{_first_of(gathered.skipped)}"
            )
        plan = _plan_all(gathered, sources, selection, val_fraction=val_fraction, seed=seed)
        used = given or _train_tokenizer(tokenizer, vocab_size, gathered, plan, work)
        if not given and used.vocab_size < vocab_size:
            log(f"the text fills {used.vocab_size} of the {vocab_size} entries that were asked for")
        if not given and plan.train_share is None:
            tasks = [EncodeTask(part, work / TOKENIZER_FILE, used.fingerprint) for part in gathered.parts]
            for _ in tell_progress(parallel_map(encode_part, tasks, num_workers), "encoded", len(tasks)):
                pass
        leakage = _find_leakage(gathered, plan)
        with atomic_folder(output) as folder:
            if plan.train_share is None:
                copies, held_out = gathered.by_part(plan.copies), gathered.by_part(plan.held_out)
                counts, sums = join_parts(gathered.parts, copies, held_out, folder, used)
            else:
                _, text = next(gathered.texts(plan.copies > 0))
                counts, sums = write_halves(text, plan.train_share, int(plan.copies.sum()), folder, used)
            for side, counted in counts.items():
                if counted.tokens - counted.documents < 2:  # the separators do not count
                    raise DataError(
                        f"The text is too short: its {side} split has {counted.characters} characters. Add more text, "
                        "or change the share that is held out (data.val_fraction)."
                    )
            used.save(folder / TOKENIZER_FILE)
            sums[TOKENIZER_FILE] = sha256_of_file(folder / TOKENIZER_FILE)
            manifest = {
                "format": FORMAT,
                "version": VERSION,
                "dtype": dtype_of(used),
                "vocab_size": used.vocab_size,
                "end_of_text_id": used.end_of_text_id,
                "splits": {side: asdict(counted) for side, counted in counts.items()},
                "files": sums,
                "sources": gathered.files,
                "settings": {
                    "tokenizer": tokenizer,
                    "vocab_size": vocab_size,
                    "val_fraction": val_fraction,
                    "seed": seed,
                    "separator": separator,
                    "selection": asdict(selection),
                },
                "report": {
                    "encodings": gathered.encodings,
                    "skipped": gathered.skipped,
                    "dropped": {reason: vars(what) for reason, what in sorted(gathered.dropped.items())},
                    "leakage": leakage,
                },
            }
            write_json(folder / MANIFEST_FILE, manifest)
        if incremental:
            forget_others(units, work)
    corpus = open_corpus(output)
    _tell(corpus, how=plan.how)
    return corpus


def _plan_all(
    gathered: Gathered, sources: Sequence[Path], selection: Selection, *, val_fraction: float, seed: int
) -> Plan:
    weights = np.array([selection.weights.get(str(source), 1.0) for source in sources])
    copies = copies_by_weight(gathered.hashes, weights[gathered.source_of], seed=seed)
    if selection.deduplicate != "none":
        again = ~first_occurrences(gathered.hashes)
        gathered.drop(again, "identical to an earlier document")
        copies[again] = 0
    if selection.deduplicate == "near":
        signatures = np.concatenate([np.load(part.index)["signatures"] for part in gathered.parts])
        kept = np.flatnonzero(copies)
        again = np.zeros(len(copies), dtype=bool)
        again[kept] = near_duplicates(signatures[kept], threshold=selection.near_threshold)
        gathered.drop(again, "nearly identical to an earlier document")
        copies[again] = 0
    return make_plan(gathered.hashes, gathered.sizes, copies, val_fraction=val_fraction, seed=seed)


def _train_tokenizer(kind: str, vocab_size: int, gathered: Gathered, plan: Plan, work: Path) -> Tokenizer:
    """Train a tokenizer on the training side; it also stands in the working folder."""
    file = work / TOKENIZER_FILE
    key = hashlib.sha256(to_json([PREPARATION, kind, vocab_size, plan.train_share]).encode())
    for array in (gathered.hashes, plan.copies, plan.held_out):
        key.update(array.tobytes())
    note = work / "tokenizer.key"
    if file.exists() and note.exists() and note.read_text() == key.hexdigest():
        return Tokenizer.load(file)
    used = (plan.copies > 0) & ~plan.held_out
    total = int(gathered.sizes[used].sum())
    if total > TRAIN_TOKENIZER_ON:  # evenly over the corpus
        share = TRAIN_TOKENIZER_ON / total
        numbers = np.cumsum(used)
        used &= np.floor(numbers * share) > np.floor((numbers - 1) * share)
        log(f"the tokenizer is trained on {share:.0%} of the text")

    def texts() -> Iterator[str]:
        for _, text in gathered.texts(used):
            yield text if plan.train_share is None else text[: int(len(text) * plan.train_share)]

    trained = Tokenizer.train(kind, texts(), vocab_size=vocab_size)
    note.unlink(missing_ok=True)
    trained.save(file)
    note.write_text(key.hexdigest())
    return trained


def _find_leakage(gathered: Gathered, plan: Plan) -> dict[str, int] | None:
    """Count the long lines that are held out, and those of them that are trained on too."""
    if plan.train_share is not None:
        return None

    def lines(wanted: NDArray[np.bool_]) -> Iterator[NDArray[np.uint64]]:
        return map(lines_of_part, gathered.parts, gathered.by_part(wanted))

    held_out = np.unique(np.concatenate(list(lines(plan.held_out))))
    seen = np.zeros(len(held_out), dtype=bool)
    for others in lines((plan.copies > 0) & ~plan.held_out):
        seen |= seen_in(held_out, others)
    found = {"held_out_lines": len(held_out), "also_trained_on": int(seen.sum())}
    if found["also_trained_on"] > LEAKAGE_TO_WARN_OF * len(held_out):
        warn(
            f"of {len(held_out)} long lines that were looked at in the held-out text, {found['also_trained_on']} also "
            "stand in the text to train on, so its loss will look better than it is; drop near duplicates "
            "(--deduplicate near), or boilerplate"
        )
    return found


def _first_of(skipped: Sequence[str]) -> str:
    return f" The first problem: {skipped[0]}" if skipped else ""


def prepare_on_the_way(sources: Sequence[Path], data_dir: Path, **settings: Any) -> Corpus:
    """Open a prepared folder, or prepare text into `data_dir`, where the same text is found again the next time.

    Args:
        sources: one prepared folder, or text files and folders.
        data_dir: the corpus goes to `data_dir/prepared/NAME-KEY`; the key follows from content and settings.
        settings: those of `prepare_corpus`.

    Raises:
        DataError, ConfigError: as `prepare_corpus`.
    """
    if len(sources) == 1 and is_prepared(sources[0]):
        return open_corpus(sources[0])
    if settings["tokenizer"] not in KINDS:
        settings["tokenizer"] = str(Path(settings["tokenizer"]).resolve())
        how = {**settings, "tokenizer": Tokenizer.load(Path(settings["tokenizer"])).fingerprint}
    else:
        how = settings
    content = [(path.name, sha256_of_file(path)) for path in list_files(sources)]
    key = hashlib.sha256(to_json([PREPARATION, content, how]).encode()).hexdigest()[:12]
    output = data_dir / "prepared" / f"{sources[0].resolve().stem}-{key}"
    if is_prepared(output):
        log(f"the text was prepared before: {output}")
        return open_corpus(output)
    try:
        return prepare_corpus(sources, output, **settings)
    except ConfigError:
        if is_prepared(output):  # by another process, while this one waited for it
            return open_corpus(output)
        raise


def _check_output(output: Path, *, overwrite: bool) -> None:
    if output.is_file():
        raise ConfigError(f"The output {output} is a file. Choose a folder that does not exist yet.")
    if output.is_dir() and any(output.iterdir()):
        if not is_prepared(output):
            raise ConfigError(f"The folder {output} holds other files. Choose a folder that does not exist yet.")
        if not overwrite:
            raise ConfigError(f"{output} is a prepared folder already. Replace it with --overwrite, or choose another.")
    ground = next(folder for folder in output.resolve().parents if folder.exists())
    if not ground.is_dir() or not os.access(ground, os.W_OK):
        raise ConfigError(f"The output {output} cannot be made: {ground} is no folder that you may write to.")


def _tell(corpus: Corpus, *, how: str) -> None:
    train, val = corpus.split("train"), corpus.split("val")
    tokens, num_bytes = train.num_tokens + val.num_tokens, train.num_bytes + val.num_bytes
    log(
        f"prepared {train.num_documents + val.num_documents} document(s), {format_count(num_bytes)} bytes, as "
        f"{format_count(tokens)} tokens ({num_bytes / tokens:.2f} bytes a token, {corpus.manifest['vocab_size']} "
        f"entries): "
        f"{format_count(train.num_tokens)} to train on, {format_count(val.num_tokens)} to validate ({how})"
    )
    dropped = corpus.manifest["report"]["dropped"]
    for reason, what in dropped.items():
        first = what["examples"][0]["text"].replace("\n", " ")[:60] if what["examples"] else ""
        log(f"left out {what['documents']} document(s), {format_count(what['bytes'])} bytes: {reason} (as: {first!r})")
