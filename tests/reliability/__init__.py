"""What survives kills, Ctrl-C, full disks and second runs: measured here, tested beside."""
