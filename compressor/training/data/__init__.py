"""Data sets by name, resident in memory where they fit, with a validation part held out of training."""
