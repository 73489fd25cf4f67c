"""The denoising loop with gates, differentiable end to end in the memory of one step."""
