# `make demo` and `make test` do their own set-up on a fresh clone.
.PHONY: demo test lint docs clean
.DEFAULT_GOAL := demo

venv/.ready: setup.sh requirements.txt pyproject.toml
	./setup.sh

demo: venv/.ready
	venv/bin/sheepop demo

# The tests come last, so that their summary is the last line. Each computes on one thread and waits for a third of its
# time, so three files at a time are for two cores.
test: lint
	venv/bin/python -m pytest -q -n 3 --dist loadfile --durations 40

lint: venv/.ready
	venv/bin/ruff check .
	venv/bin/ruff format --check .
	venv/bin/mypy
	venv/bin/lint-imports

# What the pages have from the code, tables and diagrams, then all pages as a site in build/site, which opens without a
# server. A test fails when a page is out of date.
docs: venv/.ready
	venv/bin/python docs/generate.py
	PYTHONPATH=docs venv/bin/python -m website

clean:
	rm -rf venv build *.egg-info .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis
