"""Folders as people and tools leave them: recognising their format, their layout, their classes and splits."""
