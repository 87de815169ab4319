"""Where workers run: on this machine, or on a Slurm cluster."""
