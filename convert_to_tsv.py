"""RefCOCO / RefCOCO+ / RefCOCOg to VLMEvalKit TSV files; the work sits in :mod:`ivcp_eval.benchmarks.refcoco`.

python convert_to_tsv.py --images_folder train2014 --annotations_files finetune_refcoco_*.json --output_dir $LMUData
"""

from __future__ import annotations

from ivcp_eval.benchmarks.refcoco.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
