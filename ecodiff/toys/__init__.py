"""ShapeWorld and the toy pipelines trained on it: the embedded default."""
