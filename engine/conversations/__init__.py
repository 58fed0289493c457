"""Prepare conversation files from published data sets, and regenerate replies with the target."""
