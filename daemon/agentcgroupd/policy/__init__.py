"""What to do when the pool runs short: decided purely (engine), applied to the kernel (guard)."""
