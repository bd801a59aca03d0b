"""What a careful engineer checks in a data set before training on it; nothing is repaired here."""
