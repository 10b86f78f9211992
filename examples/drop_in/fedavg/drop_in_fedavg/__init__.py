"""Scikit-learn's digits on ten nodes."""
