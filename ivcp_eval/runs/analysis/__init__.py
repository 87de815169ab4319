"""Questions about pruning that one row per variant does not answer: controlled selections, changed prompts, search.

Each analysis answers samples under conditions of its own through `study.Study`, which keeps the answers, so that an
analysis that was interrupted goes on where it was; scores are VLMEvalKit's, as in every evaluation.
"""
