"""Pruning in other people's trainers: one module for each library, which is imported with that library alone."""
