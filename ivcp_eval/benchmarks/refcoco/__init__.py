"""RefCOCO, RefCOCO+ and RefCOCOg: from MDETR annotations (or VLMEvalKit's stock file) to one TSV per split.

``splits`` names the eight test sets and their sizes; ``records`` is one expression and its TSV line; ``mdetr`` and
``stock`` read the two sources; ``images`` reads pictures; ``partial`` is the resumable output file and ``writer`` fills
it; ``convert`` puts them together and ``cli`` is the command line behind ``convert_to_tsv.py``.
"""
