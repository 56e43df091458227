"""The published tables, what was recorded, how the two compare, and the report. Only entry points import it."""
