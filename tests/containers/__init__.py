"""Real container runtimes in a test guest: a Debian root with them, and tests that run in it."""
