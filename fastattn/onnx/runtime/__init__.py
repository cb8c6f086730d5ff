"""Running what was exported: `fastattn.load` and the models it returns."""
