"""The stage `retrain`: a pruned model learns from the dense one."""
