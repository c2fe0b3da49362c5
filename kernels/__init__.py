"""One op, one file: the plain-torch reference of every op the policy is made of. Imports nothing of colora."""
