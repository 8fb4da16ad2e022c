"""What outlives sessions: reports, sessions and decisions, in a store on disk of bounded size.

May import units, errors and what is below.
"""
