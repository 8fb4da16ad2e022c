"""What a call of one session takes beside another session that floods the daemon, against twice
what it takes alone and 20 ms more."""
