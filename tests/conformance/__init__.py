"""Every class of every supported family, through every entry, against the unpatched model."""
