"""The demo: three recorded agents on one pool under three strategies, to look at; no target."""
