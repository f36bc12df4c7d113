"""The report of a run: a page of tables and a picture."""
