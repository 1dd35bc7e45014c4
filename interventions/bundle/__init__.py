"""What a loaded dense model carries: bridges, channels, packaged bundles, the passes in progress."""
