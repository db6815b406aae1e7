"""Speed: `python -m tests.bench` measures the figures P1 to P20, on inputs of its own making."""
