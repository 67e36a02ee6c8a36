"""Sections of a report, a file each: its record, how it is built, its rows, its metrics, and the warnings that concern it."""
