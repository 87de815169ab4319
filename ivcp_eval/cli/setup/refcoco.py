"""Convert RefCOCO, RefCOCO+ and RefCOCOg to VLMEvalKit TSV files."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from ivcp_eval.benchmarks.boxes import QWEN_MAX_PIXELS, QWEN_MIN_PIXELS
from ivcp_eval.benchmarks.refcoco.images import available_cores
from ivcp_eval.benchmarks.refcoco.records import ConversionError, FrameRule
from ivcp_eval.runs.planning.numbers import COUNT

_log = logging.getLogger(__name__)
_DESCRIPTION = """\
Convert MDETR-format RefCOCO / RefCOCO+ / RefCOCOg annotations and COCO train2014 images, or VLMEvalKit's stock
RefCOCO.tsv, into one VLMEvalKit TSV per split. Each image is stored once, byte for byte."""
_EPILOG = """\
Every TSV gets a <name>.tsv.report.json beside it. An interrupted run is continued by the same command; a finished,
unchanged file is left alone. To give up an interrupted run, delete the hidden .<name>.tsv.part* files.
Exit status: 0 all converted, 1 at least one file was not, 2 wrong usage."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb, and of ``convert_to_tsv.py``."""
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--annotations_files", "--annotations-files", nargs="+", type=Path, metavar="JSON",
        help="finetune_refcoco_val.json and the like; needs --images_folder",
    )  # fmt: skip
    source.add_argument("--stock_tsv", "--stock-tsv", type=Path, metavar="TSV", help="VLMEvalKit's RefCOCO.tsv")
    parser.add_argument(
        "--images_folder", "--images-folder", type=Path, help="folder of the COCO images, usually train2014"
    )
    parser.add_argument("--output_dir", "--output-dir", type=Path, required=True, help="usually $LMUData")
    frame = parser.add_argument_group("ground truth in the frame of Qwen2.5-VL's resized image")
    frame.add_argument("--qwen25", action="store_true", help="state answers in that frame; adds _for_qwen25vl to names")
    frame.add_argument(
        "--patch_size", "--patch-size", type=COUNT, default=28, help="patch times merge size (%(default)s)"
    )
    frame.add_argument("--min_pixels", "--min-pixels", type=COUNT, default=QWEN_MIN_PIXELS, help="default %(default)s")
    frame.add_argument("--max_pixels", "--max-pixels", type=COUNT, default=QWEN_MAX_PIXELS, help="default %(default)s")
    parser.add_argument(
        "--skip-bad", "--skip_bad", action="store_true", help="leave unusable entries out and list them in the report"
    )
    parser.add_argument(
        "--allow-partial", "--allow_partial", action="store_true", help="accept files that are not a whole known split"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace TSVs made from other inputs or options")
    parser.add_argument("--workers", type=COUNT, default=available_cores(), help="processes (default: all %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Run the converter; 0 all converted, 1 at least one file was not.

    Raises:
        ValueError: options that do not fit together, or name nothing.
    """
    logging.basicConfig(level=logging.WARNING if args.quiet else logging.INFO, format="%(message)s")
    rule = FrameRule(args.qwen25, args.patch_size, args.min_pixels, args.max_pixels)
    if args.annotations_files and args.images_folder is None:
        raise ValueError("--annotations_files needs --images_folder")
    if args.images_folder is not None and not args.images_folder.is_dir():
        raise ValueError(f"the images folder {args.images_folder} does not exist")
    for path in args.annotations_files or [args.stock_tsv]:
        if not path.is_file():
            raise ValueError(f"there is no file {path}")
    try:
        return _convert(args, rule)
    except (ConversionError, OSError) as error:
        _log.error("error: %s", error)
        return 1
    except KeyboardInterrupt:
        _log.error("interrupted; the same command goes on from here")
        return 130


def _convert(args: argparse.Namespace, rule: FrameRule) -> int:
    from ivcp_eval.benchmarks.refcoco.convert import check_targets, convert_mdetr, name_of
    from ivcp_eval.benchmarks.refcoco.stock import convert_stock
    from ivcp_eval.benchmarks.refcoco.writer import Options, target_of

    options = Options(rule, args.skip_bad, args.allow_partial, args.overwrite, args.workers)
    if args.stock_tsv is not None:
        convert_stock(args.stock_tsv, args.output_dir, options)
        return 0
    check_targets([target_of(name_of(path), args.output_dir, rule) for path in args.annotations_files])
    failed = 0
    for path in args.annotations_files:
        try:
            convert_mdetr(path, args.images_folder, args.output_dir, options)
        except ConversionError as error:  # the other files may be fine; a full disk is not caught here
            _log.error("error: %s", error)
            failed += 1
    if failed:
        _log.error("%d of %d files were not converted", failed, len(args.annotations_files))
    return int(failed > 0)
