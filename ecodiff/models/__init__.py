"""The models: what can be removed of them, how pipelines are called, loaded and saved."""
