"""The torch backend: runs everywhere, and is what CPUs use."""
