"""How the cores of a machine without a GPU are shared among workers."""

from __future__ import annotations

import os

#: Every process imports torch, transformers and VLMEvalKit: 15 s of one core and this much memory.
PROCESS_BYTES = 1_500_000_000
#: Fewer answers than these are made before a second process has started.
WORTH_A_PROCESS = 200


def cpu_workers(weights_bytes: int, answers: int, cores: int = 0, memory: int = 0) -> tuple[int, int]:
    """(processes, torch threads of each) that use the cores best.

    One process with several threads waits for its slowest thread at every matrix product, and most of a small model's
    time is not spent in them; processes share nothing. `ivcp bench eval` measures both.

    Args:
        weights_bytes: of the model as it is loaded; every process holds its own. answers: samples times variants.
        cores, memory: bytes; 0 takes what this process may use.
    """
    cores = cores or len(os.sched_getaffinity(0))
    if not memory:
        import psutil

        memory = psutil.virtual_memory().total
    fit = int(0.7 * memory / (2 * weights_bytes + PROCESS_BYTES))
    processes = max(1, min(cores, fit, answers // WORTH_A_PROCESS))
    return processes, max(1, cores // processes)
