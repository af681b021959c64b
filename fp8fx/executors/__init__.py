"""One file an executor: what quantizes and multiplies."""
