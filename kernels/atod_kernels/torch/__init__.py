"""The torch backend: runs on any device, and is the one for CPUs."""
