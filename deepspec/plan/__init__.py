"""What a pipeline will take, from its parameters, its target's configuration and a machine's rates alone."""
