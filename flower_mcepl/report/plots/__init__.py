"""Pictures of run records; the numbers behind each are calculated apart from drawing.

Needs the extra ``report`` (matplotlib), which is imported only when something is drawn.
"""
