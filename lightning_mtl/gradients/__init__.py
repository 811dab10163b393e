"""Per-task gradients of the shared parameters, measured three ways and applied in one backward pass."""
