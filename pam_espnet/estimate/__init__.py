"""What a training will cost, reckoned from its configuration before it starts; nothing here is measured."""
