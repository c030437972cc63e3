"""What survives kills, Ctrl-C and hostile files; tests/test_reliability.py runs it."""
