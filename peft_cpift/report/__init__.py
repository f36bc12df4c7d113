"""The report of a run: pages of tables, heat maps and curves, a picture, and the same of several runs side by side."""
