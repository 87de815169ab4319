"""Sweeps: models x methods x ratios x benchmarks from one file, resumable, in one process or on a cluster.

`spec` reads and checks a file, `plan` turns it into hashed cells and units of work, `work` answers and scores them,
`slurm` starts workers on a cluster, `status` and `command` are what people see. A sweep keeps its state in files only:
whoever finds work left takes it, and any process may be killed at any moment.
"""
