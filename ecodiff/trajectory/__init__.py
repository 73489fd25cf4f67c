"""The denoising trajectory with gates: differentiable, in the memory of one step."""
