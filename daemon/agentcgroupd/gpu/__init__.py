"""GPUs: who has which part, device files, shares by MPS or time slices, memory quotas.

May import enforce, sessions and everything below, but not calls.
"""
