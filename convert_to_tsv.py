"""RefCOCO / RefCOCO+ / RefCOCOg to VLMEvalKit TSV files: ``ivcp refcoco`` under the name that its users know.

python convert_to_tsv.py --images_folder train2014 --annotations_files finetune_refcoco_*.json --output_dir $LMUData
"""

from __future__ import annotations

import sys

from ivcp_eval.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["refcoco", *sys.argv[1:]]))
