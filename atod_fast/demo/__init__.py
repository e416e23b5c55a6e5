"""The embedded demo: tiny models that learn in minutes on a CPU, in three environments."""
