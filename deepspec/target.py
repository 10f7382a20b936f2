"""The verifier (stub; being written)."""
