"""One file or folder per training framework."""
