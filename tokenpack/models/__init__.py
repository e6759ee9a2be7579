"""Models of our own, each in a package of its own. A package registers its classes on import."""
