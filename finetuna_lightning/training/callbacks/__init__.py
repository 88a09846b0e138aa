"""Lightning callbacks, one a file: the frozen backbone is proved, the memory counted, the best adapters kept, the
progress shown."""
