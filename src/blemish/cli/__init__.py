"""The command line; its entry point is `main.main`."""
