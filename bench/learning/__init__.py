"""Calls for which the room kept by recorded peaks suffices, against the share asked for, and pairs
of calls told apart by the shape of their command, against those told apart by its tool alone."""
