"""A workspace as one self-contained HTML file, with the same numbers as JSON and CSV. `make.make_report` makes it, `page` writes it."""
