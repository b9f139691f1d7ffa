"""Everything random about a batch: the order of an epoch and the plan of a step."""
