"""From files to batches: sources of documents, token shards on disk, rows in a derived order."""
