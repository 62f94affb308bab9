"""Long fine-tunes of compressed networks, which survive their end. Import from the modules."""
