"""The command line: `main` is the entrance."""
