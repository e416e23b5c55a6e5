"""Train small language-model agents by annealed, turn-aware on-policy distillation (ATOD, arXiv 2606.27814)."""

__version__ = "0.1.0"
