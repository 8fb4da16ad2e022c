"""The guard of the pool's memory: samples it, asks the policy, applies what was decided.

May import calls and everything below.
"""
