"""Tables and figures of a run, made from the files that its stages left. Imports no torch."""
