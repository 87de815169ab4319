"""One file per model family; the file name is the family's only name. See ivcp_eval.interface.AbstractAdapter."""
