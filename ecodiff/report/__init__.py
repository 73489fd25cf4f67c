"""Tables and figures of a run, made from the files that its stages wrote. Imports no torch."""
