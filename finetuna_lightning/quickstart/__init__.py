"""The quickstart: a small backbone and three adapter domains, all made from what every CPython install carries."""
