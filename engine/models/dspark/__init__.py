"""DSpark: DFlash with a head that lets drafted tokens depend on each other."""
