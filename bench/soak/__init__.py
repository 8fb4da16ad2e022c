"""Whether anything grows while the daemon works for long, is killed, and is started again."""
