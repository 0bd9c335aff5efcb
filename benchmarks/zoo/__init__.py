"""The parts of `benchmarks/graph_zoo.py`: which models, how a cut is checked, what it is timed against."""
