"""The correctness contract: what must hold for every method on every family.

`checks` has one function per promise, each taking a `Case`; `test_contract` runs every check on every case, and
`test_mutations` proves that a broken engine fails them. A new file in ``ivcp_eval/methods`` or ``model_adapters`` is
covered by existing (the latter needs its ``tests/model_adapters/families/<family>.py``). A pair that cannot work raises
`ivcp_eval.interface.Unsupported` and is skipped with its reason.
"""
