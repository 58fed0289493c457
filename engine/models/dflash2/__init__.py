"""DFlash2: DFlash with convolutions within a block and a selector of candidates."""
