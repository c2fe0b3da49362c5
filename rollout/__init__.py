"""Rollouts: the engine protocol, its implementations, and the token ledger they fill."""
