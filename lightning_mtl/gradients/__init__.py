"""Per-task gradients are measured in four ways here, and applied in one backward pass."""
