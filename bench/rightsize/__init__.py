"""Ten commands that ask the machine how much there is, in a call that has a part of it."""
