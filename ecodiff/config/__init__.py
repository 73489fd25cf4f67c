"""The typed settings of a run, and what a workflow needs to plan it. Imports no torch."""
