"""Which subset of visual tokens costs a model least: scored in batches, and searched for with the answer in view."""
