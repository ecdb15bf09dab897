"""Environments and games: what answers a policy between its turns."""
