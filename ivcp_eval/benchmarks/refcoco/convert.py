"""Conversion of annotation files: check everything first, read each picture once, write one TSV per split."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ivcp_eval.benchmarks.refcoco.images import encode_file, ordered_map
from ivcp_eval.benchmarks.refcoco.mdetr import MdetrFile, read_mdetr
from ivcp_eval.benchmarks.refcoco.partial import PartialTsv, is_up_to_date, report_path
from ivcp_eval.benchmarks.refcoco.records import BadRecord, ConversionError, FrameRule, Problem, Record
from ivcp_eval.benchmarks.refcoco.splits import SPLIT_SIZES, dataset_of_split, split_of_annotation_file
from ivcp_eval.benchmarks.refcoco.writer import (
    Options,
    SplitWriter,
    fingerprint_of,
    log_report,
    progress_bar,
    target_of,
)
from ivcp_eval.files import file_digest

__all__ = ["check_targets", "convert_mdetr", "name_of"]

_log = logging.getLogger(__name__)


def name_of(annotations: Path) -> str:
    """``finetune_refcoco_val.json`` -> ``RefCOCO_val``; a file of no known split keeps its own name."""
    return split_of_annotation_file(annotations.stem) or annotations.stem.removeprefix("finetune_")


def check_targets(targets: Sequence[Path]) -> None:
    """Raise :class:`ConversionError` if two sources would write the same file."""
    for target in targets:
        if targets.count(target) > 1:
            raise ConversionError(f"two annotation files would both be written to {target}; convert them separately")


def convert_mdetr(annotations: Path, images_folder: Path, output_dir: Path, options: Options) -> dict[str, Any]:
    """Convert one MDETR annotation file; returns the report that also lies beside the TSV.

    A TSV already made from the same inputs is left alone, an interrupted one is continued.

    Raises:
        FileNotFoundError: the annotation file does not exist.
        ConversionError: unusable entries (unless skipped), wrong split size, or an existing TSV from other inputs.
        DiskFullError: no space left; nothing was kept.
    """
    source = read_mdetr(annotations)
    name = _checked_name(annotations, source, options)
    stats = {image: _stat(images_folder / image) for image in sorted({r.image_id for r in source.records})}
    records, problems = _usable(source, stats, options.rule)
    if problems and not options.skip_bad:
        raise ConversionError.of_problems(str(annotations), problems)
    target = target_of(name, output_dir, options.rule)
    fingerprint = fingerprint_of(options, name, annotations=file_digest(annotations), images=stats)
    if is_up_to_date(target, fingerprint, options.skip_bad):
        report: dict[str, Any] = json.loads(report_path(target).read_text(encoding="utf-8"))
        _log.info("%s is up to date", target)
        log_report(target, report)
        return report
    if target.exists() and not options.overwrite:
        raise ConversionError(f"{target} exists and was made from other inputs or options; --overwrite replaces it")
    output_dir.mkdir(parents=True, exist_ok=True)
    with PartialTsv(target, fingerprint) as part, progress_bar(source.entries, name) as bar:
        writer = SplitWriter(name, part, options)
        writer.problems += problems
        bar.update(source.entries - len(records))
        _write(records, images_folder, writer, options.workers, bar)
        return writer.finish(annotations.name, source.entries)


def _write(records: Sequence[Record], folder: Path, writer: SplitWriter, workers: int, bar: tqdm[Any]) -> None:
    for record in records:
        writer.adopt(record.index, record.image_id)
    # In order of first appearance: the loop below takes one result at the first record of each of these images.
    image_ids = dict.fromkeys(record.image_id for record in records if not writer.has_image(record.image_id))
    paths = [folder / image_id for image_id in image_ids]
    broken: dict[str, str] = {}
    with closing(ordered_map(encode_file, paths, min(workers, len(paths)))) as images:
        for record in records:
            key = record.image_id
            try:
                if key in broken:
                    raise BadRecord(broken[key])
                writer.add(record, key, None if writer.has_image(key) else next(images))
            except BadRecord as error:
                broken[key] = str(error)
                writer.reject(record.problem(str(error)))
            bar.update()


def _checked_name(annotations: Path, source: MdetrFile, options: Options) -> str:
    name = name_of(annotations)
    if name not in SPLIT_SIZES:
        if not options.allow_partial:
            raise ConversionError(
                f"{annotations.name} is not named like one of the eight splits (finetune_refcoco[+|g]_<split>.json), "
                "so its size cannot be checked; --allow-partial converts it all the same"
            )
        return name
    others = source.dataset_names - {dataset_of_split(name)}
    if others:
        raise ConversionError(f"{annotations.name} says dataset_name {sorted(others)}; is the file misnamed?")
    if source.entries != SPLIT_SIZES[name] and not options.allow_partial:
        raise ConversionError(
            f"{annotations.name} has {source.entries} expressions, {name} has {SPLIT_SIZES[name]}; get the whole file, "
            "or pass --allow-partial to convert it as it is"
        )
    return name


def _stat(path: Path) -> list[int] | None:
    """Size and modification time, ``None`` if there is no such file: changed images make a new fingerprint."""
    try:
        status = path.stat()
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns] if path.is_file() else None


def _usable(
    source: MdetrFile, stats: dict[str, list[int] | None], rule: FrameRule
) -> tuple[list[Record], list[Problem]]:
    problems, records = list(source.problems), []
    sizes: dict[str, set[tuple[int, int]]] = {}
    for record in source.records:
        sizes.setdefault(record.image_id, set()).add((record.width, record.height))
    for record in source.records:
        try:
            if len(sizes[record.image_id]) > 1:
                raise BadRecord(f"entries of this image state different sizes: {sorted(sizes[record.image_id])}")
            if stats[record.image_id] is None:
                raise BadRecord("the image is missing from the images folder")
            rule.answer(record)
        except BadRecord as error:
            problems.append(record.problem(str(error)))
        else:
            records.append(record)
    return records, problems
