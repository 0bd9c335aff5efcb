"""Data sets by name, resident in memory where they fit, with a validation split held out of training."""
