"""Conversations in, packed batches out: rendering with the assistant's mask, cutting, packing, sharding by rank."""
