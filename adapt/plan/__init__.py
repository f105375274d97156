"""What a run needs of a cluster, from shapes and formulas alone: memory, communication, arithmetic, time."""
