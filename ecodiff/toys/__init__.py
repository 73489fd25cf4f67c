"""ShapeWorld, a synthetic world of captioned images, and the toy pipelines trained on it."""

TOYS = ("toy-vae", "toy-sdxl", "toy-flux", "toy-clip")
