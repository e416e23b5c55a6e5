"""ALFWorld: the household text games of Shridhar et al. (2021), played without TextWorld."""
