"""Raw scans, pictures and videos to shards."""
