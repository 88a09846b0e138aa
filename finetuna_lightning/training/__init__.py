"""The rooms that know Lightning."""
