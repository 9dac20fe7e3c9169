"""One folder a vendor, its build half and its run half together."""
