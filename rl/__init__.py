"""The trainer: configuration, policy, losses and the loop."""
