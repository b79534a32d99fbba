"""Text and tokens: documents → tokenizer → shards → windows. Nothing here knows the network."""
