"""Anomaly-detection methods; `registry` lists them. Nothing is imported here, so that torch is not loaded."""
