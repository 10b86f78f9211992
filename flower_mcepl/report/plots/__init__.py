"""Pictures of run records. The numbers behind each are calculated apart from its drawing.

Needs the extra ``report`` (matplotlib), which is imported only when something is drawn.
"""
