"""The parts of `benchmarks/intraining.py`: each has `NOTE` and `cells`, what measures its rows, by name."""
