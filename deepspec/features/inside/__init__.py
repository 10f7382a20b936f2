"""What runs inside an engine's process, in its own environment: nothing here imports DeepSpec."""
