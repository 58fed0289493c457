"""DFlash: a block of tokens is drafted in one forward."""
