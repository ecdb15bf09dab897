"""Rollouts: how prompts become episodes."""
