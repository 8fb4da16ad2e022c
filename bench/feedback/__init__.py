"""Scripted agents at recorded calls that were killed: one obeys what it is told, others guess."""
