"""The same training over seeds and folds, evaluated and summarised."""
