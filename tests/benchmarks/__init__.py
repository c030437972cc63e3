"""How fast, and no worse: ``python -m tests.benchmarks``, see README.md here."""
