"""What knows no model: errors, files, unfinished work, processes, devices."""
