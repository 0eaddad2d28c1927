// A driver library that loads and holds nothing: the core asks no more of it.
int moesaic_no_driver = 0;
