"""Several environments as one: each part's tasks in proportion to its weight."""
