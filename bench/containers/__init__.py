"""What a container start and an execution cost more, by runtime and way."""
