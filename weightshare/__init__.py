"""One copy of the weights: their storage, the linear both sides run, and the adapter between masters and slots."""
