"""Environments of other interfaces: gymnasium's, and those behind an OpenEnv server."""
