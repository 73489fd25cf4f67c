"""Draw with a pruned model, without ecodiff: python docs/load_with_diffusers.py <folder> <png>."""

import sys

from diffusers import DiffusionPipeline

folder, png = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
pipe("a small red ring left of a large blue square on navy").images[0].save(png)
