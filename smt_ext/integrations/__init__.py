"""smt_ext in the training front ends of others; each module imports the library that it is for."""
