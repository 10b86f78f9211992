"""A recurrent classifier: ten agents read digits row by row."""
