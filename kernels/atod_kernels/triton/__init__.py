"""The Triton backend: kernels for GPUs. Importing one of its modules needs triton."""
