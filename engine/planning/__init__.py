"""What a job will need, before it is started: memory, FLOPs and traffic, from configurations alone."""
