"""What cells measured: scores of stored answers, records, rows and tables made from them."""
