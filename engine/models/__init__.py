"""The draft, its config, its vocabulary, and what differs between target families."""
