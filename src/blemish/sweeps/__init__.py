"""The same training over several seeds and folds, evaluated and summarised."""
