"""The pool and the sessions in it: made, adopted, found again, removed.

May import state, intents and everything below.
"""
