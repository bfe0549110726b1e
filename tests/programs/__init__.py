"""Programs that the tests move; each says by itself whether it came through whole."""
