"""Methods that watch training: they score channels by what each step shows."""
