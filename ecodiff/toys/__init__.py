"""ShapeWorld and the toy pipelines trained on it: the embedded default."""

TOYS = ("toy-vae", "toy-sdxl", "toy-flux", "toy-clip")
