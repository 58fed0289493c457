"""Files of conversations: made from published sets, and answered anew by the target itself."""
