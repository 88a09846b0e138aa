"""The workloads of the design, each printing one table."""
