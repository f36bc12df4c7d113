"""What the studies of quality share: runs that are stored under their settings, and intervals over seeds."""
