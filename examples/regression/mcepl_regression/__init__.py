"""Regression over a table: ten practices predict the progression of diabetes."""
