# Each target sets up what it needs, in .venv beside this file. make PYTHON=/path/to/python chooses the
# interpreter; without it, the first on the PATH that is new enough is taken.
.PHONY: demo test check clean
export PYTHON

demo: # Draw parts, train on the good ones, evaluate, write demo/report.html. No download of images or weights.
	@scripts/setup train
	.venv/bin/blemish demo

test: # Run every test.
	@scripts/setup dev
	@scripts/test

check: # Formatting, lint and types.
	@scripts/setup dev
	@scripts/check

clean: # Remove the environment, builds and caches; demo/ stays.
	rm -rf .venv build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
