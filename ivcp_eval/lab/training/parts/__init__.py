"""What can be trained: one file each, which defines ``Part``, beside its default configuration of the same name.

The file's name is the part's only name, and that of the method that reads its weights.
"""
