"""What can be trained: one file each, which defines ``Part``, beside its default configuration, configs/NAME.yaml.

The file's name is the part's only name, and that of the method that reads its weights.
"""
