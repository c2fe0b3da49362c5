"""Reward functions and the runner that calls them. Imports nothing of the rest of colora."""
