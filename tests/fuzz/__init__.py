"""Random and damaged inputs for everything that reads a file of somebody else (`python -m tests.fuzz --help`)."""
