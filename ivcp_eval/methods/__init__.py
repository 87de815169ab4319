"""One file per pruning method; the file name is the registered name and the value in the CSV."""
