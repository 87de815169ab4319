"""From what was asked for to hashed cells and units of work: spec, plan, cells. Nothing is run or fetched here."""
