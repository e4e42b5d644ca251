"""What executes graphs. Each backend is one file that imports its own library."""
