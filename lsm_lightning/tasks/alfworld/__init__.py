"""Text ALFWorld: household games of six types, played on the genuine engine.

Importing this package needs nothing but the standard library; playing needs the `alfworld` extra.
"""
